"""The rule of the fused path: what a plain table is, and what a model that does not have one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bigramx import BigramLanguageModel, fusion, ops


class FunctionLog(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchLog(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class OwnForward(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class OwnTensor(Tensor):
    pass


Touch = Callable[[BigramLanguageModel], Any]


def set_table(table: nn.Module) -> Touch:
    return lambda model: setattr(model, "token_embedding_table", table)


def in_table(name: str, value: object) -> Touch:
    return lambda model: setattr(model.token_embedding_table, name, value)


TOUCHES: dict[str, Touch] = {
    "forward hook": lambda model: model.token_embedding_table.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda model: model.token_embedding_table.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda model: model.token_embedding_table.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda model: model.token_embedding_table.register_full_backward_pre_hook(lambda *_: None),
    "hook on the model": lambda model: model.register_forward_hook(lambda *_: None),
    "max_norm": in_table("max_norm", 1.0),
    "scale_grad_by_freq": in_table("scale_grad_by_freq", True),
    "forward of the instance": in_table("forward", lambda idx: idx),
    "forward of the model": lambda model: setattr(model, "forward", lambda idx: idx),
    "compiled": lambda model: model.token_embedding_table.compile(),
    "a subclass": set_table(OwnForward(5, 5)),
    "another module": set_table(nn.Sequential(nn.Embedding(5, 5))),
    "more rows": set_table(nn.Embedding(6, 5)),
    "a subclass of Tensor": in_table("weight", nn.Parameter(torch.ones(5, 5).as_subclass(OwnTensor))),
    "pruned": lambda model: prune.l1_unstructured(model.token_embedding_table, "weight", 0.5),
    "parametrized": lambda model: parametrize.register_parametrization(
        model.token_embedding_table, "weight", nn.Tanh()
    ),
}


@pytest.mark.filterwarnings("ignore")  # of torch about itself, when it is asked to compile
@pytest.mark.parametrize("name", TOUCHES)
def test_a_touched_model_is_not_fused(name: str) -> None:
    model = BigramLanguageModel(5)
    assert model.is_fused
    TOUCHES[name](model)
    assert not model.is_fused


@pytest.mark.filterwarnings("ignore")  # of torch about itself, when it is asked to compile
def test_a_compiled_model_is_fused() -> None:
    programs = []

    def compiler(program: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        programs.append(program.code)
        return program

    idx = torch.zeros((2, 3), dtype=torch.long)
    torch.compile(BigramLanguageModel(5), backend=compiler)(idx, idx)
    assert sum("bigramx.embedding_cross_entropy" in program for program in programs) == 1
    assert not any("nn.functional" in program for program in programs)


def test_hooks_that_are_removed_leave_no_trace() -> None:
    model = BigramLanguageModel(5)
    model.token_embedding_table.register_forward_hook(lambda *_: None).remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not model.is_fused
    assert model.is_fused


@contextmanager
def patched(owner: object, name: str) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: original(*arguments, **options))
    try:
        yield
    finally:
        setattr(owner, name, original)


@pytest.mark.parametrize(
    "observer",
    [
        FunctionLog,
        DispatchLog,
        FakeTensorMode,
        lambda: patched(F, "embedding"),
        lambda: patched(F, "cross_entropy"),
        lambda: patched(nn.Embedding, "forward"),
        lambda: patched(nn.Module, "__call__"),
    ],
    ids=["function mode", "dispatch mode", "fake tensors", "F.embedding", "F.cross_entropy", "forward", "call"],
)
def test_an_observed_model_is_not_fused(observer: Callable[[], Any]) -> None:
    model = BigramLanguageModel(5)
    with observer():
        assert not model.is_fused
    assert model.is_fused


def test_a_default_device_is_no_observer() -> None:
    model = BigramLanguageModel(5)
    with torch.device("meta"):
        assert model.is_fused
    with torch.device("meta"), FunctionLog():
        assert not model.is_fused


def test_plain_tensors() -> None:
    assert fusion.is_plain_tensor(torch.ones(2))
    assert fusion.is_plain_tensor(nn.Parameter(torch.ones(2)))
    assert not fusion.is_plain_tensor(torch.ones(2).as_subclass(OwnTensor))
    assert not fusion.is_plain_tensor(None)
    with FakeTensorMode():
        assert not fusion.is_plain_tensor(nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_kernels_are_called_only_where_the_model_is_fused(is_fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward, evaluate and generate alike."""
    called: list[str] = []

    def recorded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            called.append(name)
            return kernel(*arguments)

        return call

    for name in ("embedding_cross_entropy", "count_bigrams"):
        monkeypatch.setattr(ops, name, recorded(name, getattr(ops, name)))
    model, seen = BigramLanguageModel(5), []
    if not is_fused:
        model.token_embedding_table.register_forward_hook(lambda *_: seen.append(1))
    idx = torch.randint(5, (2, 8))
    model(idx, idx)
    assert called == ["embedding_cross_entropy"] * is_fused
    assert len(seen) == (not is_fused)
    called.clear()
    seen.clear()
    model.evaluate(torch.randint(5, (500,)))
    assert called == ["count_bigrams"] * is_fused
    assert len(seen) == (not is_fused)
    seen.clear()
    model.generate(idx, 3)
    assert len(seen) == 3 * (not is_fused)
