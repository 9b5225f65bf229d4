"""The record of a training run, and the file that it is saved to."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.types import FileLike

from bigramx.fusion import is_plain_tensor
from bigramx.locks import without_warnings
from bigramx.storage import DTYPE_NAMES, name_of, printable, read_tensors, write_tensors

PREFIX = "history."  # of the history's tensors in a model's file
_KIND = "history"
_LISTS = {"losses": torch.float64, "steps": torch.int64, "train_losses": torch.float64, "val_losses": torch.float64}
_VALUES = (
    "optimum",
    "interrupted",
    "stopped",
    "scheduler_is_due",
    "table_checksum",
    "optimizer_name",
    "scheduler_name",
)
_STATES = ("optimizer_state", "scheduler_state")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_LISTS, (list,)),
    **dict.fromkeys(_STATES, (dict, type(None))),
    **dict.fromkeys(("interrupted", "stopped", "scheduler_is_due"), (bool,)),
    **dict.fromkeys(("optimizer_name", "scheduler_name"), (str, type(None))),
    "optimum": (int, float),
    "table_checksum": (int, type(None)),
    "generator_state": (Tensor, type(None)),
}
_NUMPY_NUMBERS = {numpy.dtype(code).name: numpy.dtype(code).type for code in "?bhiqlBHIQLefd"}
_DICTS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


@dataclass(eq=False, repr=False)  # it holds tensors, and thousands of numbers
class History:
    """The record of a run of ``fit``; passed to another run as ``resume``, it continues where this one ended.

    While a run lasts, its callbacks may save or copy the history: the states and the checksum are then brought up to
    date, which takes a pass over the table.

    Attributes:
        losses: The loss of each step's batch, before the step.
        steps: The steps at which the model was evaluated; step 0 is before the first.
        train_losses: The exact loss on the training tokens at each of them, nats per token.
        val_losses: The same on the validation tokens; NaN where a run had none, empty where none had.
        optimum: The lowest loss that a bigram table can have on the training tokens; NaN if the model's loss has
            options.
        interrupted: Whether Ctrl-C ended the run.
        stopped: Whether a callback ended the run.
        optimizer_state: The optimizer's state_dict at the end; of a sharded tensor, the shard of this process.
        optimizer_name: The name of the optimizer's class.
        scheduler_state: The scheduler's state_dict at the end; None without one.
        scheduler_name: The name of the scheduler's class.
        scheduler_is_due: Whether the scheduler raised an error at the last step, which it has yet to follow.
        generator_state: The state of the generator that drew the batches, at the end.
        table_checksum: CRC-32 of the table at the end, to check that a model is the one to continue with; None where it
            could not be read.
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    optimum: float = float("nan")
    interrupted: bool = False
    stopped: bool = False
    optimizer_state: dict[str, Any] | None = None
    optimizer_name: str | None = None
    scheduler_state: dict[str, Any] | None = None
    scheduler_name: str | None = None
    scheduler_is_due: bool = False
    generator_state: Tensor | None = None
    table_checksum: int | None = None

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return len(self.losses)

    def __repr__(self) -> str:
        last = {"loss": self.losses, "train_loss": self.train_losses, "val_loss": self.val_losses}
        losses = "".join(f"{name}={values[-1]:.4f}, " for name, values in last.items() if values)
        ended = f"interrupted={self.interrupted}, stopped={self.stopped}"
        return f"History(step={self.step}, {losses}optimum={self.optimum:.4f}, {ended})"

    def _update(self) -> None:
        """Nothing; while a run lasts, a function of the run, which brings the states up to date, is in its place."""

    def __getstate__(self) -> dict[str, Any]:
        self._update()
        return {name: value for name, value in vars(self).items() if name != "_update"}

    def save(self, path: FileLike) -> None:
        """Writes the history to one safetensors file, whole or not at all.

        ``model.save(path, history=history)`` writes it into the model's file: neither is ever without the other.

        Args:
            path: A path, or a binary file object.

        Raises:
            OSError: The file cannot be written; an old one is unchanged.
            TypeError: ``path`` is neither; or a state holds what cannot be saved, for which ``fit`` raises the same
                before its first step, or after it if the optimizer makes the state there.
        """
        write_tensors(path, _KIND, *self.parts())

    def parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata of its file.

        Raises:
            TypeError: A state holds what cannot be saved.
        """
        self._update()
        tensors = {name: torch.tensor(getattr(self, name), dtype=dtype, device="cpu") for name, dtype in _LISTS.items()}
        if self.generator_state is not None:
            tensors["generator_state"] = self.generator_state
        values = {name: getattr(self, name) for name in _VALUES}
        values |= {name: encode_state(getattr(self, name), name, tensors) for name in _STATES}
        return tensors, {"history": json.dumps(values)}

    @classmethod
    def load(cls, path: FileLike) -> History:
        """Reads what ``save`` wrote, or the history in a model's file.

        Args:
            path: A path, or a binary file object, which is read to its end.

        Raises:
            ValueError: The file is damaged, cut short, or holds something else.
            OSError: It cannot be read, or is no regular file.
            MemoryError: It does not fit into memory.
        """
        history = cls._load_if_any(path)
        if history is None:
            raise ValueError(f"{name_of(path)}: not a history, but a model that was saved without one")
        return history

    @classmethod
    def _load_if_any(cls, path: FileLike) -> History | None:
        """As ``load``; None if it is the file of a model without a history."""
        tensors, metadata = read_tensors(path, _KIND, "model", is_wanted=_is_of_history)
        if metadata["kind"] == "model":
            if "history" not in metadata:
                return None
            tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        try:
            values = json.loads(metadata["history"])
            parts = _parts_of_version_0_1(tensors, values) if "param_groups" in values else _parts(tensors, values)
            history = cls(generator_state=tensors.get("generator_state"), **parts)
            history._check()
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
            reason = printable(str(error))
            raise ValueError(f"{name_of(path)}: a history of another version of bigramx ({reason})") from None
        return history

    def _check(self) -> None:
        """Raises a ValueError where a value is of a type that no history has."""
        for name, types in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ValueError(f"{name} is a {type(value).__name__}")
            if isinstance(value, list) and not all(type(number) in (int, float) for number in value):
                raise ValueError(f"{name} holds what is no number")
        float(self.optimum)
        state = self.generator_state
        if state is not None and (state.dim() != 1 or state.dtype != torch.uint8):
            raise ValueError(f"generator_state has dtype {state.dtype} and shape {tuple(state.shape)}")


def _is_of_history(kind: str, name: str) -> bool:
    return kind == _KIND or name.startswith(PREFIX)


def _parts(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    lists = {name: _list_of(tensors[name], dtype) for name, dtype in _LISTS.items()}
    return {**values, **lists, **{name: _decode(values[name], tensors) for name in _STATES}}


def _list_of(tensor: Tensor, dtype: torch.dtype) -> list[Any]:
    if tensor.dim() != 1 or tensor.dtype != dtype:
        raise ValueError(f"a list of numbers is a tensor of dtype {tensor.dtype} and shape {tuple(tensor.shape)}")
    values: list[Any] = tensor.tolist()
    return values


def _parts_of_version_0_1(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """Of the first release, whose optimizer was AdamW or SparseAdam."""
    groups, numbers = values.pop("param_groups"), values.pop("numbers")
    values["losses"] = tensors["losses"].tolist()
    if groups is None:
        return values
    state: dict[int, dict[str, object]] = {}
    for key, value in {**tensors, **numbers}.items():
        if key.startswith("optimizer."):
            _prefix, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    for group in groups:
        group["betas"] = tuple(group["betas"])
    name = "AdamW" if "weight_decay" in groups[0] else "SparseAdam"
    return {**values, "optimizer_name": name, "optimizer_state": {"state": state, "param_groups": groups}}


def encode_state(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state_dict as JSON takes it; its tensors are added to ``tensors``, and named in their place.

    Lists, tuples and dicts, their keys included, and NumPy's numbers come back as they were.

    Raises:
        TypeError: It holds something else; names it.
    """
    if isinstance(value, Tensor):
        return _encode_tensor(value, name, tensors)
    if isinstance(value, numpy.generic) and isinstance(value.item(), (bool, int, float)):
        return {"numpy": [value.dtype.name, value.item()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) in (list, tuple, torch.Size):
        items = [encode_state(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    for kind, of_dict in _DICTS.items():
        if type(value) is of_dict:
            items = value.items()
            return {kind: [[encode_state(k, name, tensors), encode_state(v, f"{name}.{k}", tensors)] for k, v in items]}
    raise TypeError(
        f"{name}: expected what a history can save: tensors, numbers, strings, None, and lists, tuples and dicts of "
        f"these, got {type(value).__module__}.{type(value).__qualname__}"
    )


def _encode_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, object]:
    if _is_subclass_in_name(value):
        value = value.as_subclass(Tensor)
    if is_plain_tensor(value) and value.layout is torch.sparse_coo:
        parts = [_encode_tensor(part, name, tensors) for part in (value._indices(), value._values())]
        return {"sparse_coo": [*parts, list(value.shape), value.is_coalesced()]}
    if is_plain_tensor(value) and value.layout is torch.strided and value.dtype in DTYPE_NAMES and not value.is_meta:
        return {"tensor": _keep(value, name, tensors)}
    raise TypeError(
        f"{name}: expected what a history can save: plain tensors of common dtypes, strided or COO, got a "
        f"{type(value).__name__} of dtype {value.dtype}, layout {value.layout}, device {str(value.device)!r}"
    )


def _is_subclass_in_name(value: Tensor) -> bool:
    """Whether the memory of a tensor of a subclass is its value."""
    has_own_ops = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not (is_plain_tensor(value) or has_own_ops or is_lazy(value)) and value.layout is torch.strided


def _keep(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    """Adds the tensor under a name of its own, which it returns; a tensor that is there keeps its name."""
    for known, kept in tensors.items():
        if kept is tensor:
            return known
    while name in tensors:
        name += "_"
    storages = [kept.untyped_storage().data_ptr() for kept in tensors.values()]
    is_view = tensor.untyped_storage().data_ptr() in storages  # of one that is there, which safetensors refuses
    tensors[name] = tensor.clone() if is_view else tensor
    return name


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``encode_state``."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(content, tensors))
    if kind == "numpy":
        dtype, number = content
        return _NUMPY_NUMBERS[dtype](number)
    if kind == "sparse_coo":
        *parts, shape, is_coalesced = content
        indices, values = (_decode(part, tensors) for part in parts)
        options: dict[str, Any] = {"is_coalesced": is_coalesced, "check_invariants": True, "device": "cpu"}
        # The warning is torch 2.11's, whatever it is asked to check.
        with without_warnings("Sparse invariant checks are implicitly disabled"):
            return torch.sparse_coo_tensor(indices, values, shape, **options)
    return _DICTS[kind]({_decode(key, tensors): _decode(item, tensors) for key, item in content})
