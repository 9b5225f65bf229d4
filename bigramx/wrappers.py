"""What PyTorch wraps around a model: data parallel, sharded, compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from bigramx.fusion import is_of
from bigramx.model import BigramLanguageModel


def module_in(model: object) -> BigramLanguageModel:
    """The model, without what wraps it.

    Raises:
        TypeError: There is none.
    """
    *_wrappers, module = layers_of(model)
    if isinstance(module, BigramLanguageModel):
        return module
    kind, what = (module, "the class ") if isinstance(module, type) else (type(module), "")
    advice = ""
    if kind.__name__ == "BigramLanguageModel" and kind is not BigramLanguageModel:
        advice = "; change the import: from bigramx import BigramLanguageModel"
    raise TypeError(
        "expected model to be a bigramx.BigramLanguageModel, or one in DistributedDataParallel, DataParallel, "
        f"FullyShardedDataParallel or torch.compile, got {what}{kind.__module__}.{kind.__qualname__}{advice}"
    )


def layers_of(model: object) -> Iterator[Any]:
    """The model, and what PyTorch's wrappers wrap, from the outside to the inside."""
    yield model
    wraps = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    if wraps or is_fsdp(model, "FullyShardedDataParallel"):
        yield from layers_of(model.module)  # type: ignore[attr-defined]
    elif hasattr(model, "_orig_mod"):  # of torch.compile
        yield from layers_of(model._orig_mod)


def is_fsdp(layer: object, kind: str) -> bool:
    """Whether it is of this class of torch.distributed.fsdp."""
    return is_of("torch.distributed.fsdp", kind, layer)
