"""The bigram language model as a module."""

from __future__ import annotations

import json
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.types import FileLike
from torch.utils.hooks import RemovableHandle

from bigramx import evaluation, functional, fusion, reference
from bigramx.counts import BigramCounts
from bigramx.data import TokenShards, are_worth_counting, check_tokens, shards_of
from bigramx.functional import Sampler
from bigramx.history import PREFIX, History
from bigramx.storage import name_of, read_tensors, write_tensors
from bigramx.tokenizer import Tokenizer, deserialize, serialize

_Value = TypeVar("_Value")

_KIND = "model"
_WEIGHT, _CLASS_WEIGHT = "token_embedding_table.weight", "class_weight"


class _Derived(Generic[_Value]):
    """A property that gives way to an attribute of the same name, which scripts assign to their models."""

    def __init__(self, get: Callable[[Any], _Value]) -> None:
        self._get = get
        self.__doc__ = get.__doc__

    @overload
    def __get__(self, model: None, owner: type) -> _Derived[_Value]: ...

    @overload
    def __get__(self, model: nn.Module, owner: type) -> _Value: ...

    def __get__(self, model: nn.Module | None, owner: type) -> _Derived[_Value] | _Value:
        return self if model is None else self._get(model)


def _call_each(hooks: Sequence[Callable[[Tensor | None], object]], idx: Tensor | None) -> None:
    for hook in hooks:
        hook(idx)


def _number_in(metadata: dict[str, str], name: str, kind: type, default: object, least: Any, most: Any) -> Any:
    """A number that the metadata of a file hold as JSON; a ValueError where it is none, or out of range.

    Where ``default`` is None, there may be none.
    """
    try:
        value = json.loads(metadata.get(name, json.dumps(default)))
    except (ValueError, RecursionError):
        value = ()
    if value is None and default is None:
        return None
    if type(value) is not kind or not least <= value <= most:
        raise ValueError(f"expected {name} to be of type {kind.__name__} and between {least} and {most}")
    return value


def _parse_options(metadata: dict[str, str], num_rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of the table and of the model; those that a file lacks, of an earlier version, are the defaults."""
    is_true = {name: metadata.get(name) == json.dumps(True) for name in ("sparse", "scale_grad_by_freq")}
    inf = float("inf")
    of_table = {
        **is_true,
        "padding_idx": _number_in(metadata, "padding_idx", int, None, -num_rows, num_rows - 1),
        "max_norm": _number_in(metadata, "max_norm", float, None, -inf, inf),
        "norm_type": _number_in(metadata, "norm_type", float, 2.0, -inf, inf),
        "requires_grad": metadata.get("requires_grad") != json.dumps(False),
    }
    of_loss = {
        "ignore_index": _number_in(metadata, "ignore_index", int, -100, -(2**63), 2**63 - 1),
        "label_smoothing": _number_in(metadata, "label_smoothing", float, 0.0, 0.0, 1.0),
    }
    return of_table, of_loss


def _are_plain(idx: object, targets: object) -> bool:
    """Whether the kernels may read the tokens: no subclass wants to see what is done with them."""
    return (type(idx) is Tensor and type(targets) is Tensor) or fusion.any_dtensor(idx, targets)


class BigramLanguageModel(nn.Module):
    """The lecture's model: a table (V, V) whose row i holds the logits of the token that follows token i.

    Args:
        vocab_size: V.
        sparse: The gradient of the table is sparse: only the rows that occur in the batch.
        ignore_index: Targets of this value do not count in the loss.
        class_weight: (V), a weight in the loss for each target; a buffer, outside the state_dict.
        label_smoothing: The share, 0 to 1, of each target that the loss spreads evenly over all tokens.
        device: The device of the table.
        dtype: float64, float32, bfloat16 or float16.

    Attributes:
        token_embedding_table: nn.Embedding(V, V), initialised as in the lecture: N(0, 1). Whatever a script does to
            it, or to the model, is honoured: see ``is_fused``.
        tokenizer: Saved and loaded with the model; None without one. A ``bigramx.tokenizer.Tokenizer``, or one that
            another library made, of which ``save`` writes what ``bigramx.tokenizer.adapt`` makes of it. It has as many
            tokens as the table has rows, or fewer.
    """

    __jit_unused_properties__ = ("is_fused",)
    if TYPE_CHECKING:  # torch.jit.script reads the annotations of a class, and knows no strings
        class_weight: Tensor | None
        tokenizer: Tokenizer | None

    # For subclasses with a constructor of their own that does not call this one.
    ignore_index = -100
    label_smoothing = 0.0
    tokenizer = None
    _table_pre_hooks: OrderedDict[int, Callable[[Tensor | None], object]] | None = None

    def __init__(
        self,
        vocab_size: int,
        *,
        sparse: bool = False,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        weight = torch.empty(vocab_size, vocab_size, device=device, dtype=dtype)
        table: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False, sparse=sparse)
        if not table.weight.is_meta:  # whose random numbers PyTorch draws by importing its compiler, for seconds
            table.reset_parameters()
        self.token_embedding_table = table
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weight", class_weight, persistent=False)  # the state_dict is the lecture's
        self.tokenizer = None

    @_Derived
    def vocab_size(self) -> int:
        """V, or as many rows as a table that has taken the place of this model's has."""
        table = self._table()
        return table.num_embeddings if hasattr(table, "num_embeddings") else self._vocab_size

    @_Derived
    def device(self) -> torch.device:
        """The device of the table's parameters; the CPU where it has none."""
        parameter = next(self._table().parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def is_fused(self) -> bool:
        """Whether the kernels do all that calling this model does.

        They do for a plain nn.Embedding(V, V) and this class's ``forward``, without hooks (bigramx.fusion has the
        rule). Otherwise forward, generate, evaluate and fit call the parts, as plain PyTorch does; the shards of
        a DTensor table take bigramx.distributed.
        """
        return self._is_direct() and not fusion.any_dtensor(self._table().weight)

    def _is_direct(self) -> bool:
        """Whether bigramx.functional on the table's weight does all that calling this model does."""
        table = self._fusable_table()
        is_square = table is not None and table.num_embeddings == table.embedding_dim
        return is_square and fusion.runs_only(self, BigramLanguageModel.forward)

    def _fusable_table(self) -> nn.Embedding | None:
        # Not self.token_embedding_table: nn.Module's __getattr__ takes as long as the rest of this.
        table = self._modules.get("token_embedding_table")
        if not (isinstance(table, nn.Embedding) and fusion.is_plain(table) and self._registers_table()):
            return None
        return None if "class_weight" in self._parameters else table  # which may have a gradient

    def _registers_table(self) -> bool:
        name = "token_embedding_table"
        if type(self) is BigramLanguageModel:
            return name not in self.__dict__
        return fusion.is_registered(self, name, BigramLanguageModel.__getattr__)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """The logits of the token after each of ``idx`` and, given targets, the loss.

        Args:
            idx: (B, T) tokens, int64 or int32; any shape is accepted.
            targets: The token that follows each, as many as ``idx`` has.
            return_logits: False, with targets: the logits are None, and the kernels materialise no (N, V) tensor.

        Returns:
            Without targets: logits (B, T, V) and None. With targets: logits (B*T, V), and the mean cross-entropy (),
            in nats. The loss depends on the logits: they have a gradient, and hooks, as in plain PyTorch.

        Raises:
            IndexError: A token is out of range.
            ValueError: ``targets`` has another number of tokens than ``idx``.
            RuntimeError: A dtype or device is off, or no kernel is built for the device.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self._table_pre_hooks is not None:
                self._before_reading(idx)
            if targets is None:
                return self._table()(idx), None
            table = self._fusable_table()
            if table is not None and _are_plain(idx, targets):
                return self._fused_forward(idx, table, targets, return_logits)
            return self._plain_forward(self._table()(idx), targets, return_logits)
        logits = self.token_embedding_table(idx)
        return (logits, None) if targets is None else self._plain_forward(logits, targets, return_logits)

    def register_table_pre_hook(self, hook: Callable[[Tensor | None], object]) -> RemovableHandle:
        """Registers a function that is called before rows of the table are read.

        ``hook(idx)`` is given the tokens whose rows a forward pass is about to read; or None before all rows may be:
        by generate, evaluate, save, state_dict, copies, casts, and by whoever looks up ``token_embedding_table``. An
        optimizer whose steps are deferred brings the rows up to date there. The model stays fused.

        Returns:
            A handle; its ``remove()`` removes the hook.
        """
        hooks = vars(self).setdefault("_table_pre_hooks", OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    @torch.jit.unused
    def _before_reading(self, idx: Tensor | None = None) -> None:
        if self._table_pre_hooks:
            fusion.uncompiled(_call_each)(tuple(self._table_pre_hooks.values()), idx)

    def _table(self) -> Any:
        """``token_embedding_table`` for those who read no row of it, or only rows that are up to date."""
        table = self._modules.get("token_embedding_table") if self._registers_table() else None
        return self.token_embedding_table if table is None else table

    def __getattr__(self, name: str) -> Any:
        if name == "token_embedding_table" and self._table_pre_hooks is not None:
            self._before_reading()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which has no optimizer."""
        self._before_reading()
        return {name: value for name, value in vars(self).items() if name != "_table_pre_hooks"}

    def apply(self, *arguments: Any, **options: Any) -> Any:
        """As that of every module; what ``register_table_pre_hook`` has registered runs before."""
        self._before_reading()
        return super().apply(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._before_reading()
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As that of every module; what ``register_table_pre_hook`` has registered runs before."""
        self._before_reading()
        return super().state_dict(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._before_reading()
        super()._load_from_state_dict(*arguments, **options)

    @torch.jit.unused
    def _fused_forward(
        self, idx: Tensor, table: nn.Embedding, targets: Tensor, return_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if targets.shape != idx.shape and targets.numel() == idx.numel() and not targets.is_floating_point():
            targets = targets.reshape(idx.shape)  # the lecture's targets.view(B * T)
        weight: Any = table._parameters["weight"]
        class_weight = self._buffers.get("class_weight")
        loss, logits = functional._loss_and_logits(
            idx,
            weight,
            targets,
            class_weight,
            self.ignore_index,
            "mean",
            self.label_smoothing,
            0.0,
            table.padding_idx,
            table.sparse,
            return_logits,
        )
        return logits if return_logits else None, loss

    def _plain_forward(
        self, logits: Tensor, targets: Tensor, return_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        logits = logits.reshape(-1, logits.size(-1))
        is_soft = isinstance(targets, Tensor) and targets.is_floating_point()  # no Tensor, but a proxy, in torch.fx
        targets = targets.reshape(logits.shape) if is_soft else targets.reshape(-1).long()
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            class_weight = self.class_weight
        else:
            class_weight = self._class_weight()
        loss = F.cross_entropy(
            logits,
            targets,
            class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return None if return_logits is False else logits, loss  # torch.fx cannot branch on what it traces

    def _known_size(self) -> int | None:
        """V; None for a class with a constructor of its own and a table that does not say it."""
        return getattr(self, "vocab_size", None)

    def _class_weight(self) -> Tensor | None:
        """Scripts may put a parameter in the buffer's place; classes with a constructor of their own may have none."""
        return self._parameters.get("class_weight", self._buffers.get("class_weight"))

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: int | Sequence[int] | None = None,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues each sequence of ``idx``, (B, T), by ``max_new_tokens``: (B, T + max_new_tokens) int64.

        The options are those of ``functional.generate``. With none of them, on the CPU, the tokens equal those of the
        lecture's loop for the same seed; that loop itself runs where the model is not fused.
        """
        options: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "stop": stop,
            "sampler": sampler,
            "generator": generator,
        }
        if self._is_direct() and not fusion.are_draws_observed():
            return functional.generate(idx, self.token_embedding_table.weight, max_new_tokens, **options)
        # The errors of the fused path, from a table of this size in no memory and no sequences.
        vocab_size = self._known_size() or 1
        no_table = torch.zeros((), device=idx.device).expand(vocab_size, vocab_size)
        functional.generate(idx[:0], no_table, max_new_tokens, **options)
        return reference.continue_by(lambda idx: self(idx)[0][:, -1], idx, max_new_tokens, **options)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor | TokenShards) -> float:
        """The exact mean loss of each token of ``tokens``, (N), given the one before it, in nats.

        Of shards the first token of each counts for nothing, nor does one that follows their ``eot``: no pair crosses
        from one shard or document to another.

        All pairs count, not sampled batches, at the cost of their distinct rows. Where the table is small compared with
        the tokens, the pairs are counted and the loss is computed in float64; otherwise the rows that occur are read,
        those of 16 bits in float32. NaN where there is no pair.

        The tokens may be memory-mapped, or lie on another device than the table: they are read in chunks, in 64 MB of
        memory at most beyond the table and the counts.

        Where the model is not fused, or its loss has options, the loss is that of ``forward``, which is called for many
        pairs at a time, each a sequence of one token.

        Raises:
            RuntimeError: ``tokens`` is not 1-D, or of another dtype than uint8, uint16, uint32, int32
                or int64.
            IndexError: A token is out of range.
        """
        if not self._is_plain_cross_entropy():
            with evaluation.evaluation_mode(self):
                return self._evaluate_by_calls(tokens)
        counts = self.count_pairs(tokens)
        if counts is not None:
            return self.evaluate_counts(counts)
        return evaluation.loss_of_tokens(self.token_embedding_table.weight, tokens)

    def _is_plain_cross_entropy(self) -> bool:
        """Whether the loss of a pair is the logsumexp of its row minus its logit."""
        return self.is_fused and self._has_plain_loss()

    def _has_plain_loss(self) -> bool:
        """Whether the loss has no options."""
        vocab_size = self._known_size()
        ignores_none = vocab_size is not None and not 0 <= self.ignore_index < vocab_size
        return ignores_none and self._class_weight() is None and self.label_smoothing == 0

    def _evaluate_by_calls(self, tokens: Tensor | TokenShards) -> float:
        most_logits, vocab_size = 2**21, self._known_size() or 2**13  # 8 MB of float32
        check_tokens(tokens)
        device = torch.device(self.device)
        if device.type == "meta":  # the weight is elsewhere, and a hook brings it
            device = tokens.device
        makes_logits = not self._is_direct()
        options = {} if makes_logits else {"return_logits": False}  # which not every forward knows
        step = max(1, most_logits // (vocab_size if makes_logits else 8))
        total, total_weight, any_counts, eot = 0.0, 0.0, False, getattr(tokens, "eot", None)
        chunks = (shard[n : n + step + 1] for shard in shards_of(tokens) for n in range(0, len(shard) - 1, step))
        for chunk in (chunk.to(device, torch.int64) for chunk in chunks):
            idx, targets = chunk[:-1, None], chunk[1:, None]
            if eot is not None:
                idx, targets = (side[chunk[:-1] != eot] for side in (idx, targets))
            counted = targets[targets != self.ignore_index]
            if counted.numel() > 0:
                any_counts, class_weight = True, self._class_weight()
                weight = counted.numel() if class_weight is None else class_weight.double()[counted].sum().item()
                total += self._sum_of_losses(idx, targets, weight, options)
                total_weight += weight
        if not any_counts:
            return float("nan")
        return torch.tensor(total, dtype=torch.float64, device="cpu").div(total_weight).item()  # by 0, too

    def _sum_of_losses(self, idx: Tensor, targets: Tensor, weight: float, options: dict[str, Any]) -> float:
        """Of a batch whose class weights, by which the mean is divided, have this sum."""
        if weight != 0:
            return weight * self(idx, targets, **options)[1].item()  # type: ignore[no-any-return]
        logits = self(idx, targets)[0]
        return F.cross_entropy(
            logits.double(),
            targets.reshape(-1),
            self._class_weight().double(),  # type: ignore[union-attr]
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        ).item()

    def count_pairs(self, tokens: Tensor | TokenShards) -> Tensor | None:
        """The pair counts of ``tokens``, (V, V), on the table's device; None where ``evaluate`` does not use them.

        It does where they are small compared with the tokens, and the loss is a plain cross-entropy.

        Raises:
            RuntimeError: ``tokens`` is not 1-D, or of another dtype than uint8, uint16, uint32, int32
                or int64.
            IndexError: A token is out of range.
        """
        check_tokens(tokens)
        if not self._is_plain_cross_entropy() or not are_worth_counting(tokens, self.vocab_size):
            return None
        return evaluation.count_pairs(tokens, self.vocab_size, self.device)

    @torch.no_grad()
    def evaluate_counts(self, counts: Tensor | BigramCounts) -> float:
        """What ``evaluate`` gives for tokens with these pair counts, (V, V), in float64. NaN for no pairs.

        Args:
            counts: (V, V), dense or sparse (CSR or COO), or BigramCounts.

        Raises:
            RuntimeError: ``counts`` is not (V, V), or lies on another device than the table.
            NotImplementedError: The model is not fused, or its loss has options: ``evaluate`` takes the tokens.
        """
        if not (self._is_direct() and self._has_plain_loss()):
            raise NotImplementedError("evaluate_counts: not implemented for a model that is not fused, or with options")
        counts = counts.to_csr() if isinstance(counts, BigramCounts) else counts
        if counts.shape != (self.vocab_size, self.vocab_size):
            raise RuntimeError(f"expected counts to be (V, V) with V = {self.vocab_size}, got {tuple(counts.shape)}")
        weight = self.token_embedding_table.weight
        if fusion.any_dtensor(weight):
            from bigramx import distributed

            return distributed.loss_of_counts(weight, counts.to_dense())
        return evaluation.loss_of_counts(weight, counts)

    @classmethod
    @torch.no_grad()
    def from_counts(cls, counts: Tensor | BigramCounts, smoothing: float = 1.0) -> BigramLanguageModel:
        """Row i is log((counts[i] + smoothing) / their sum): with smoothing 0 the closed-form optimum.

        Args:
            counts: (V, V), dense or sparse (CSR or COO), as ``functional.count_bigrams`` gives them; or BigramCounts.
            smoothing: Added to each count. With 0 the loss on the counted tokens is the least there is, and a pair that
                was never seen has probability 0; a row without any pair is uniform.

        Raises:
            RuntimeError: ``counts`` is not square.
            ValueError: ``smoothing`` or a count is negative, infinite or NaN.
        """
        if isinstance(counts, BigramCounts):
            counts = counts.to_csr()
        if counts.dim() != 2 or counts.size(0) != counts.size(1):
            raise RuntimeError(f"expected counts to be square, (V, V), got shape {tuple(counts.shape)}")
        if not 0 <= smoothing < float("inf"):
            raise ValueError(f"expected smoothing to be finite and >= 0, got {smoothing}")
        model = cls(counts.size(0), device=counts.device)
        weight = model.token_embedding_table.weight
        for logits, pair_counts in zip(evaluation.row_blocks(weight), evaluation.dense_blocks(counts), strict=True):
            smoothed = pair_counts.double() + smoothing
            valid = (pair_counts >= 0) & smoothed.isfinite()
            if not valid.all():
                raise ValueError(f"expected counts to be finite and >= 0, got {pair_counts[~valid][0].item()}")
            smoothed[smoothed.sum(dim=1) == 0] = 1
            logits.copy_((smoothed / smoothed.sum(dim=1, keepdim=True)).log())
        return model

    def save(self, path: FileLike, *, history: History | None = None) -> None:
        """Writes the table, its and the loss's options and the tokenizer to one safetensors file, whole or not at all.

        Where the table is sharded over ranks, all of them call this, and the first writes the whole table.

        Args:
            path: A path, or a binary file object.
            history: Of the run that trained the model, to be written to the same file, from which ``History.load``
                reads it: a checkpoint, of which there is the old one or the new one, whole.

        Raises:
            OSError: The file cannot be written; an old one is unchanged.
            TypeError: ``path`` is neither; the history holds what cannot be saved; the tokenizer is none, or one that
                could not be loaded again; or the model could not: it has other parameters or buffers, or a table that
                does more than an nn.Embedding.
            ValueError: The table is not square, or an option out of range; the tokenizer has more tokens than the table
                rows; or there is a history, and the table is sharded: each rank has a history of its own.
        """
        options = self._options_to_save()
        class_weight = self._class_weight()
        tensors = {} if class_weight is None else {_CLASS_WEIGHT: class_weight}
        recorded, metadata = ({}, {}) if history is None else history.parts()
        tensors |= {PREFIX + name: tensor for name, tensor in recorded.items()}
        metadata |= options
        if self.tokenizer is not None:
            metadata["tokenizer"] = serialize(self.tokenizer, self.vocab_size)

        def write(weight: Tensor) -> None:
            write_tensors(path, _KIND, {_WEIGHT: weight, **tensors}, metadata)

        # From the state_dict, because there FSDP has its shards, which forward may have left gathered, in 16 bits.
        weight = self.state_dict().get(_WEIGHT, self.token_embedding_table.weight)
        if fusion.any_dtensor(weight):
            from bigramx import distributed

            if history is not None:
                raise ValueError("save: of a sharded table each rank has a history of its own: history.save writes it")
            distributed.write_once(weight, write)
        else:
            write(weight)

    def _options_to_save(self) -> dict[str, str]:
        """Those of the table and of the loss, as JSON; raises where ``load`` could not make this model again."""
        # FSDP1's _flat_param is the table.
        state = {name for name in self.state_dict() if not name.endswith("_flat_param")} - {_CLASS_WEIGHT}
        others = sorted(name for name in state if not name.startswith("token_embedding_table."))
        if others:
            raise TypeError(
                f"save: expected a model whose only state is its table, got also {', '.join(others)}: torch.save of "
                "its state_dict() keeps them"
            )
        table = self.token_embedding_table
        for wrapped in ("_orig_mod", "_checkpoint_wrapped_module"):  # by torch.compile, and for checkpoints
            table = getattr(table, wrapped, table)
        if getattr(type(table), "forward", None) is not nn.Embedding.forward or "forward" in vars(table):
            raise TypeError(f"save: expected a table that does what nn.Embedding does, got {type(table).__name__}")
        if table.num_embeddings != table.embedding_dim:
            raise ValueError(f"save: expected a square table, got ({table.num_embeddings}, {table.embedding_dim})")
        class_weight, parameters = self._class_weight(), list(table.parameters())
        if class_weight is not None and not (
            class_weight.shape == (table.num_embeddings,) and class_weight.dtype.is_floating_point
        ):
            raise ValueError(f"save: expected class_weight to be {table.num_embeddings} floating-point numbers")
        options = {
            "sparse": bool(table.sparse),
            "padding_idx": None if table.padding_idx is None else operator.index(table.padding_idx),
            "max_norm": None if table.max_norm is None else float(table.max_norm),
            "norm_type": float(table.norm_type),
            "scale_grad_by_freq": bool(table.scale_grad_by_freq),
            "requires_grad": not parameters or any(parameter.requires_grad for parameter in parameters),
            "ignore_index": operator.index(self.ignore_index),
            "label_smoothing": float(self.label_smoothing),
        }
        metadata = {name: json.dumps(value) for name, value in options.items()}
        _parse_options(metadata, table.num_embeddings)
        return metadata

    @classmethod
    def load(cls, path: FileLike) -> BigramLanguageModel:
        """Reads what ``save`` wrote.

        Args:
            path: A path, or a binary file object, which is read to its end.

        Raises:
            ValueError: The file is damaged, cut short, or holds something else.
            OSError: It cannot be read, or is no regular file.
            MemoryError: The table does not fit into memory.
            ImportError: The library of the model's tokenizer is not installed.
        """
        tensors, metadata = read_tensors(path, _KIND, is_wanted=lambda _kind, name: name in (_WEIGHT, _CLASS_WEIGHT))
        try:
            return cls._of_parts(tensors, metadata)
        except ValueError as error:
            raise ValueError(f"{name_of(path)}: {error}") from None

    @classmethod
    def _of_parts(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> BigramLanguageModel:
        """The model whose file has these tensors and metadata; a ValueError where they make none."""
        weight, class_weight = tensors.get(_WEIGHT), tensors.get(_CLASS_WEIGHT)
        if weight is None or weight.dim() != 2 or weight.size(0) != weight.size(1) or not weight.is_floating_point():
            raise ValueError(f"expected a square table named {_WEIGHT}")
        if class_weight is not None and (
            class_weight.shape != weight.shape[:1] or not class_weight.is_floating_point()
        ):
            raise ValueError(f"expected {_CLASS_WEIGHT} to have {weight.size(0)} numbers")
        of_table, of_loss = _parse_options(metadata, weight.size(0))
        model = cls(weight.size(0), device="meta", dtype=weight.dtype)
        model.token_embedding_table.weight = nn.Parameter(weight, requires_grad=of_table.pop("requires_grad"))
        model.class_weight = class_weight
        vars(model.token_embedding_table).update(of_table)
        vars(model).update(of_loss)
        if "tokenizer" in metadata:
            model.tokenizer = deserialize(metadata["tokenizer"], model.vocab_size)
        return model
