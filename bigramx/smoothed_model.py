"""A bigram model for held-out text, from sparse pair counts: its memory is in proportion to the distinct pairs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn as nn
from torch import Tensor
from torch.types import FileLike

from bigramx import functional, fusion, memory, reference, smoothing
from bigramx.counts import BigramCounts
from bigramx.functional import Sampler
from bigramx.model import BigramLanguageModel
from bigramx.smoothing import ESTIMATORS
from bigramx.storage import name_of, read_tensors, write_tensors
from bigramx.tokenizer import Tokenizer, deserialize, serialize

if TYPE_CHECKING:
    from bigramx.data import TokenShards

Method = Literal["kneser-ney", "witten-bell", "absolute-discounting", "jelinek-mercer", "add-k"]

_KIND = "smoothed-model"
_IGNORED = -100  # the target that counts in no loss, as F.cross_entropy has it
_SUM_TOLERANCE = 1e-6
_DTYPES = {"crow_indices": (torch.int64,), "col_indices": (torch.int32,)}
_FLOATS = (torch.float32, torch.float64)
_KERNEL_DEVICES = ("cpu", "meta")
_BUFFERS = ("crow_indices", "col_indices", "pair_probs", "backoff", "unigram")


class SmoothedBigramModel(nn.Module):
    """p(j | i) = pair_probs[i, j] + backoff[i] * unigram[j], the first for pairs that were seen: never a (V, V) table.

    A model as it is constructed has no pairs, and is uniform; ``from_counts`` estimates one. It has buffers and no
    parameters: nothing in it is trained. ``forward`` returns log-probabilities as logits, so that it mixes with a
    neural model, or serves as its prior.

    Args:
        vocab_size: V.
        device: The device of the buffers.
        dtype: float32 or float64.

    Attributes:
        crow_indices: (V + 1) int64, the pairs of each row: torch.sparse_csr's.
        col_indices: (nnz) int32, the second token of each pair; ascending within a row.
        pair_probs: (nnz) float32 or float64. ``.to`` a dtype of 16 bits leaves the probabilities as they are, as a
            row's sum would not stay 1.
        backoff: (V), alike.
        unigram: (V), alike.
        method: How the probabilities were estimated; None: otherwise.
        eot: The token that ends a document, as the counts had it: no pair that begins with it was counted. None: none.
        tokenizer: Saved and loaded with the model, as ``BigramLanguageModel``'s; None without one.
    """

    crow_indices: Tensor
    col_indices: Tensor
    pair_probs: Tensor
    backoff: Tensor
    unigram: Tensor

    def __init__(
        self, vocab_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"expected vocab_size >= 1, got {vocab_size}")
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in _FLOATS:
            raise TypeError(f"expected dtype to be float32 or float64, got {dtype}")
        self.method: str | None = None
        self.eot: int | None = None
        self.tokenizer: Tokenizer | None = None
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("crow_indices", torch.zeros(vocab_size + 1, dtype=torch.int64, device=device))
        self.register_buffer("col_indices", torch.zeros(0, dtype=torch.int32, device=device))
        self.register_buffer("pair_probs", torch.zeros(0, **options))
        self.register_buffer("backoff", torch.ones(vocab_size, **options))
        self.register_buffer("unigram", torch.full((vocab_size,), 1 / vocab_size, **options))

    @classmethod
    def from_counts(
        cls,
        counts: BigramCounts | Tensor,
        method: Method = "kneser-ney",
        *,
        held_out: BigramCounts | TokenShards | Tensor | None = None,
        discount: float | Sequence[float] | None = None,
        weight: float | None = None,
        smoothing: float | None = None,
        uniform_weight: float | None = None,
    ) -> SmoothedBigramModel:
        """Estimates a model from pair counts. The options are those of bigramx.smoothing, each for some methods.

        Args:
            counts: ``BigramCounts``, or (V, V) integers, sparse or dense.
            method: ``"kneser-ney"`` (interpolated, modified), ``"witten-bell"``, ``"absolute-discounting"``,
                ``"jelinek-mercer"`` or ``"add-k"``.
            held_out: What Jelinek-Mercer's weight is fitted to: tokens (N), their shards, or pair counts.
            discount: Of Kneser-Ney and absolute discounting, in place of the estimated ones.
            weight: Of Jelinek-Mercer, in place of the fitted one.
            smoothing: Of add-k: k, 1 by default.
            uniform_weight: Of all but add-k: the weight of the uniform distribution in the unigram. With 0, tokens that
                never occur have probability 0, as in nltk.lm.

        Raises:
            ValueError: ``method`` is unknown, an option is not one of its, or out of range, or a count is negative.
            RuntimeError: ``counts`` is not square.
            TypeError: The counts are not integers.
        """
        if method not in ESTIMATORS:
            raise ValueError(f"expected method to be one of {', '.join(get_args(Method))}, got {method!r}")
        estimator = ESTIMATORS[method]
        csr = _csr(counts)
        options: dict[str, Any] = {
            "held_out": held_out,
            "discount": discount,
            "weight": weight,
            "smoothing": smoothing,
            "uniform_weight": uniform_weight,
        }
        options = {name: value for name, value in options.items() if value is not None}
        unknown = options.keys() - inspect.signature(estimator).parameters.keys()
        if unknown:
            raise ValueError(f"{method} takes no {' and no '.join(sorted(unknown))}")
        if held_out is not None:
            options["held_out"] = _csr_of_tokens(held_out, csr.size(0))
        model = cls(csr.size(0), device="meta")
        model.crow_indices, model.col_indices = csr.crow_indices(), csr.col_indices().int()
        model.pair_probs, model.backoff, model.unigram = estimator(csr, **options)
        model.method, model.eot = method, getattr(counts, "eot", None)
        return model

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.unigram)

    @property
    def num_distinct(self) -> int:
        """The number of pairs with a probability of their own."""
        return len(self.col_indices)

    @property
    def device(self) -> torch.device:
        """The device of the buffers."""
        return self.unigram.device

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.vocab_size}, num_distinct={self.num_distinct}, method={self.method!r}"

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """The log-probabilities of the token after each of ``idx`` and, given targets, the loss.

        Args:
            idx: (B, T) tokens, int64 or int32; any shape is accepted.
            targets: The token that follows each, as many as ``idx`` has. Those of -100 do not count.
            return_logits: False, with targets: the logits are None, and no (N, V) tensor exists.

        Returns:
            Without targets: logits (B, T, V), whose softmax are the probabilities, and None. With targets: logits
            (B*T, V), and the mean cross-entropy (), in nats.

        Raises:
            IndexError: A token is out of range.
            ValueError: ``targets`` has another number of tokens than ``idx``.
            RuntimeError: A dtype or device is off.
        """
        if targets is None:
            return self._logits(idx), None
        loss = self.loss(idx, targets)
        return self._logits(idx.reshape(-1)) if return_logits else None, loss

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy (), in nats; NaN where no target counts. The arguments are those of ``forward``."""
        counts = targets != _IGNORED
        log_probs = self.log_probs(idx, targets.where(counts, 0))
        return -log_probs.where(counts.reshape(idx.shape), 0).sum() / counts.sum()

    def log_probs(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The log of p(targets | idx) of each pair, in the shape of ``idx``.

        Args:
            idx: int64 or int32, any shape.
            targets: As many.

        Raises:
            IndexError: A token is out of range.
            ValueError: ``targets`` has another number of tokens than ``idx``.
            RuntimeError: A dtype or device is off.
        """
        return self._probs(idx, targets)[0].log().to(self.unigram.dtype)

    def _probs(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The probability of each pair, float64, and whether it was seen."""
        if targets.numel() != idx.numel():
            raise ValueError(
                f"expected as many targets as idx has tokens, {tuple(idx.shape)}, got {tuple(targets.shape)}"
            )
        targets = targets.reshape(idx.shape)
        if self.device.type in _KERNEL_DEVICES:
            return functional.interpolated_bigram(idx, targets, *self._parts())
        self._check("idx", idx)
        self._check("targets", targets)
        return reference.interpolated_bigram(idx, targets, *self._parts())

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.crow_indices, self.col_indices, self.pair_probs, self.backoff, self.unigram

    def _logits(self, idx: Tensor) -> Tensor:
        self._check("idx", idx)
        if self.unigram.is_meta:
            return self.unigram.new_empty(*idx.shape, self.vocab_size)
        return reference.interpolated_bigram_rows(idx, *self._parts()).log_()

    def _check(self, name: str, tokens: Tensor) -> None:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"expected {name} to be int64 or int32, got {tokens.dtype}")
        if tokens.device != self.device:
            raise RuntimeError(f"expected {name} on the model's device, {self.device}, got {tokens.device}")
        if tokens.is_meta or tokens.numel() == 0:
            return
        smallest, largest = tokens.aminmax()
        if smallest >= 0 and largest < self.vocab_size:
            return
        flat = tokens.reshape(-1)
        n = int(((flat < 0) | (flat >= self.vocab_size)).nonzero()[0])
        raise IndexError(
            f"index out of range: {name} holds {int(flat[n])} at position {n}, expected 0 <= {name} < {self.vocab_size}"
        )

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

        The options and the errors are those of ``functional.generate``. With ``sampler="torch"``, the default on the
        CPU, the tokens and the generator's state equal those of a loop over
        ``torch.multinomial(softmax(logits), 1)`` with this model's logits. With ``"philox"``, the default on a GPU, the
        tokens are those of ``functional.interpolated_bigram_generate``, which runs on the CPU, with the memory and at
        the cost of the pairs of the rows that are met, for any V: sequence b at step t depends on (seed, b, t) alone.

        Where the module has hooks or another ``forward``, its logits are drawn from.
        """
        options: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "stop": stop,
        }
        # The errors of functional.generate, from a table of this size in no memory and no sequences.
        no_table = torch.zeros((), device=idx.device).expand(self.vocab_size, self.vocab_size)
        functional.generate(idx[:0], no_table, max_new_tokens, **options, sampler=sampler)
        self._check("idx", idx)
        on_cpu = self.device.type == "cpu"
        is_philox = sampler == "philox" or (sampler is None and not on_cpu) or temperature == 0
        if not is_philox or not fusion.runs_only(self, SmoothedBigramModel.forward):
            options |= {"sampler": sampler, "generator": generator}
            return reference.continue_by(lambda idx: self(idx[:, -1:])[0][:, -1], idx, max_new_tokens, **options)
        generator = generator if on_cpu else _on_cpu(generator, self.device)
        crow, columns, pair_probs, backoff, unigram = (part.cpu() for part in self._parts())
        tokens = functional.interpolated_bigram_generate(
            idx.cpu(), crow, columns, pair_probs, backoff, unigram, max_new_tokens, **options, generator=generator
        )
        return tokens.to(idx.device)

    def evaluate(self, tokens: Tensor | TokenShards) -> float:
        """The exact mean loss of each token of ``tokens``, (N), given the one before it, in nats.

        The pairs are counted and joined with the model's: all count, at the cost of their distinct ones. The sums are
        float64. NaN for no pair.

        Raises:
            RuntimeError: ``tokens`` is not 1-D, or of another dtype.
            IndexError: A token is out of range.
        """
        return self._loss_of(_csr_of_tokens(tokens, self.vocab_size))

    def evaluate_counts(self, counts: BigramCounts | Tensor) -> float:
        """What ``evaluate`` gives for tokens with these pair counts, (V, V), sparse or dense. NaN for no pairs.

        Raises:
            RuntimeError: ``counts`` is not (V, V).
        """
        return self._loss_of(self._csr(counts))

    def _loss_of(self, counts: Tensor) -> float:
        total = 0.0
        for rows, columns, numbers in smoothing.entry_blocks(counts):
            losses = self._probs(rows, columns)[0].log_().mul_(numbers)
            # So few at once are not divided among threads: their sums are the same for any number of these.
            total -= float(torch.stack([part.sum() for part in losses.split(2**14)]).sum())
        num_pairs = int(counts.values().sum())
        return total / num_pairs if num_pairs > 0 else float("nan")

    def num_unseen(self, counts: BigramCounts | Tensor) -> int:
        """How many pairs of these counts, (V, V), have no probability of their own, as they were not seen."""
        blocks = smoothing.entry_blocks(self._csr(counts))
        return sum(int(numbers[~self._probs(rows, columns)[1]].sum()) for rows, columns, numbers in blocks)

    def _csr(self, counts: BigramCounts | Tensor) -> Tensor:
        csr = _csr(counts)
        if csr.size(0) != self.vocab_size:
            raise RuntimeError(f"expected counts to be (V, V) with V = {self.vocab_size}, got {tuple(csr.shape)}")
        return csr

    def to_dense(self) -> BigramLanguageModel:
        """The table of the log-probabilities, (V, V), to go on training from: its softmax gives the same probabilities.

        Raises:
            MemoryError: The table cannot fit into the device's memory.
        """
        num_bytes = self.vocab_size**2 * self.unigram.element_size()
        total = memory.total_memory(self.device)
        if total is not None and num_bytes > total:
            raise MemoryError(
                f"a table with V = {self.vocab_size:,} takes {num_bytes / 1e9:,.1f} GB, and {self.device} has "
                f"{total / 1e9:,.1f} GB of memory in all"
            )
        model = BigramLanguageModel(self.vocab_size, device="meta", dtype=self.unigram.dtype)
        table = torch.empty(self.vocab_size, self.vocab_size, dtype=self.unigram.dtype, device=self.device)
        rows_at_once = max(1, 2**20 // self.vocab_size)
        for rows, part in zip(
            torch.arange(self.vocab_size, device=self.device).split(rows_at_once),
            table.split(rows_at_once),
            strict=True,
        ):
            part.copy_(self._logits(rows))
        model.token_embedding_table.weight = nn.Parameter(table)
        model.tokenizer = self.tokenizer
        return model

    def save(self, path: FileLike) -> None:
        """Writes the probabilities and the tokenizer to one safetensors file, whole or not at all.

        Args:
            path: A path, or a binary file object.

        Raises:
            OSError: The file cannot be written; an old one is unchanged.
            TypeError: ``path`` is neither, or the tokenizer is none, or one that cannot be saved.
            ValueError: The tokenizer has more tokens than the model; or a buffer was changed, and a row is no
                distribution any more.
        """
        tensors = dict(zip(_BUFFERS, self._parts(), strict=True))
        _check_parts(tensors)
        metadata = {} if self.method is None else {"method": self.method}
        if self.eot is not None:
            metadata["eot"] = str(self.eot)
        if self.tokenizer is not None:
            metadata["tokenizer"] = serialize(self.tokenizer, self.vocab_size)
        write_tensors(path, _KIND, tensors, metadata)

    @classmethod
    def load(cls, path: FileLike) -> SmoothedBigramModel:
        """Reads what ``save`` wrote.

        Args:
            path: A path, or a binary file object, which is read to its end.

        Raises:
            ValueError: The file is damaged, cut short, or holds something else.
            OSError: It cannot be read, or is no regular file.
            MemoryError: The model does not fit into memory.
            ImportError: The library of the model's tokenizer is not installed.
        """
        tensors, metadata = read_tensors(path, _KIND)
        try:
            _check_parts(tensors)
            model = cls(len(tensors["unigram"]), device="meta", dtype=tensors["unigram"].dtype)
            for name in _BUFFERS:
                setattr(model, name, tensors[name])
            model.method, model.eot = metadata.get("method"), _eot_in(metadata, model.vocab_size)
            if "tokenizer" in metadata:
                model.tokenizer = deserialize(metadata["tokenizer"], model.vocab_size)
            return model
        except ValueError as error:
            raise ValueError(f"{name_of(path)}: {error}") from None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As nn.Module's, for any number of pairs; what makes no model of this V is refused as a whole."""
        parts = {name: state_dict[prefix + name] for name in _BUFFERS if prefix + name in state_dict}
        if len(parts) == len(_BUFFERS) and not any(part.is_meta for part in parts.values()):
            try:
                _check_parts(parts)
                if len(parts["unigram"]) != self.vocab_size:
                    raise ValueError(f"expected V = {self.vocab_size}, got {len(parts['unigram'])}")
            except ValueError as error:
                error_msgs.append(f"{prefix or type(self).__name__}: {error}")
                return
            for name in ("col_indices", "pair_probs"):
                setattr(self, name, getattr(self, name).new_empty(parts[name].shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SmoothedBigramModel:
        """As nn.Module's, but the probabilities keep 32 bits at least."""

        def keep_digits(buffer: Tensor) -> Tensor:
            applied: Tensor = fn(buffer)
            if buffer.is_floating_point() and applied.dtype not in _FLOATS:
                return buffer.to(applied.device)
            return applied

        super()._apply(keep_digits, recurse)  # type: ignore[no-untyped-call]
        return self


def _on_cpu(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """One on the CPU, with a seed drawn from one on the device, or from that device's default."""
    if generator is not None and generator.device.type == "cpu":
        return generator
    seed = torch.empty((), dtype=torch.int64, device=device).random_(generator=generator)
    return torch.Generator().manual_seed(int(seed))


def _check_parts(tensors: dict[str, Tensor]) -> None:
    """Raises a ValueError where the tensors are not those of a model."""
    if tensors.keys() != set(_BUFFERS):
        raise ValueError(f"expected the tensors {', '.join(_BUFFERS)}")
    dtype = tensors["unigram"].dtype
    for name, tensor in tensors.items():
        allowed = _DTYPES.get(name, (dtype,) if dtype in _FLOATS else _FLOATS)
        if tensor.dim() != 1 or tensor.dtype not in allowed:
            raise ValueError(f"expected {name} to be 1-D, of dtype {allowed[0]}")
    crow, columns, pair_probs, backoff, unigram = (tensors[name] for name in _BUFFERS)
    vocab_size = len(unigram)
    if vocab_size < 1 or len(backoff) != vocab_size or len(crow) != vocab_size + 1:
        raise ValueError(f"expected crow_indices, backoff and unigram of V + 1, V and V numbers, V = {vocab_size}")
    if len(columns) != len(pair_probs) or crow[0] != 0 or crow[-1] != len(columns) or (crow.diff() < 0).any():
        raise ValueError("expected crow_indices to ascend from 0 to the number of pairs")
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < vocab_size:
        raise ValueError(f"expected col_indices from 0 to V - 1, V = {vocab_size}")
    is_first = torch.zeros(len(columns) + 1, dtype=torch.bool, device=crow.device).index_fill_(0, crow, True)
    if not (is_first[1:-1] | (columns.diff() > 0)).all():
        raise ValueError("expected the col_indices of a row to ascend")
    for name in _BUFFERS[2:]:
        if not ((tensors[name] >= 0) & (tensors[name] <= 1)).all():
            raise ValueError(f"expected {name} to be from 0 to 1")
    sums = smoothing.row_sums(crow, pair_probs) + backoff * unigram.double().sum()
    if not ((sums - 1).abs() <= _SUM_TOLERANCE).all():
        raise ValueError(f"expected the probabilities of a row to sum to 1 within {_SUM_TOLERANCE}")


def _csr(counts: BigramCounts | Tensor) -> Tensor:
    """Pair counts as (V, V) torch.sparse_csr, int64, all positive."""
    if not isinstance(counts, Tensor):
        return counts.to_csr()
    if counts.dim() != 2 or counts.size(0) != counts.size(1):
        raise RuntimeError(f"expected counts to be square, (V, V), got shape {tuple(counts.shape)}")
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"expected counts to be integers, got {counts.dtype}")
    return BigramCounts.from_csr(counts).to_csr()


def _eot_in(metadata: dict[str, str], vocab_size: int) -> int | None:
    """The token that a file's metadata name; a ValueError where it is none."""
    text = metadata.get("eot")
    if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < vocab_size):
        raise ValueError(f"expected eot to be a token, 0 <= eot < {vocab_size}")
    return None if text is None else int(text)


def _csr_of_tokens(tokens: BigramCounts | TokenShards | Tensor, vocab_size: int) -> Tensor:
    """Pair counts, (V, V) torch.sparse_csr, of tokens, or as they are given."""
    if isinstance(tokens, BigramCounts) or (isinstance(tokens, Tensor) and tokens.dim() == 2):
        csr = _csr(tokens)
        if csr.size(0) != vocab_size:
            raise RuntimeError(f"expected counts to be (V, V) with V = {vocab_size}, got {tuple(csr.shape)}")
        return csr
    counts = BigramCounts(vocab_size, eot=getattr(tokens, "eot", None))
    counts.update(tokens)
    return counts.to_csr()
