"""What surrounds a script: global hooks, modes, patches, what PyTorch is set to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.scripts import IDX, TARGETS, Model, assert_same, grads_of
from tests.scripts.treatments import TOLERANCES, TREATMENTS

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore:.*(Anomaly Detection|no inputs require gradients|Profiler clears events)"),
]


def is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def doubled_loss(module: nn.Module, _args: Any, output: Any) -> Any:
    return None if is_table(module) else (2 * output[0], None if output[1] is None else 2 * output[1])


def doubled(function: Any, *condition: Any) -> Any:
    """The function, its result doubled: for all calls, or for those whose first argument is a table."""

    def call(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        return 2 * output if not condition or is_table(args[0]) else output

    return call


class FunctionMode(TorchFunctionMode):
    """Doubles the results of some functions."""

    def __init__(self, *functions: object) -> None:
        self.functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return 2 * output if func in self.functions else output


class DispatchMode(TorchDispatchMode):
    """Doubles the results of some kernels."""

    def __init__(self, *kernels: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return 2 * output if func in self.kernels else output


@contextlib.contextmanager
def patched(owner: object, name: str, *condition: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, doubled(getattr(owner, name), *condition))
        yield


@contextlib.contextmanager
def never_the_first() -> Iterator[None]:
    """Draws the first token as often as the second."""
    draw = torch.multinomial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda *args, **kwargs: draw(*args, **kwargs).clamp(min=1))
        yield


@contextlib.contextmanager
def during(set_to: Callable[[Any], object], value: object, afterwards: object) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(afterwards)


CIRCUMSTANCES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "forward_hook": lambda: modules.register_module_forward_hook(
        lambda module, _args, output: 2 * output if is_table(module) else None
    ),
    "forward_hook_on_the_model": lambda: modules.register_module_forward_hook(doubled_loss),
    "forward_pre_hook": lambda: modules.register_module_forward_pre_hook(
        lambda _module, args: (args[0] % 7, *args[1:])  # type: ignore[arg-type]
    ),
    "backward_hook": lambda: modules.register_module_full_backward_hook(
        lambda _module, _grad_input, _grad_output: None
    ),
    "backward_pre_hook": lambda: modules.register_module_full_backward_pre_hook(
        lambda module, grads: (3 * grads[0],) if is_table(module) else None  # type: ignore[index]
    ),
    "embedding_patched": lambda: patched(F, "embedding"),
    "cross_entropy_patched": lambda: patched(F, "cross_entropy"),
    "softmax_patched": lambda: patched(F, "softmax"),
    "multinomial_patched": never_the_first,
    "forward_of_embeddings_patched": lambda: patched(nn.Embedding, "forward"),
    "call_of_modules_patched": lambda: patched(nn.Module, "__call__", is_table),
    "function_mode": lambda: FunctionMode(F.embedding, F.cross_entropy),
    "function_mode_that_looks": FunctionMode,
    "dispatch_mode": lambda: DispatchMode(torch.ops.aten.embedding.default),
    "dispatch_mode_that_looks": DispatchMode,
    "device_context": lambda: torch.device("cpu"),
    "anomaly_mode": torch.autograd.detect_anomaly,
    "saved_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_as_copies": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda saved: [saved.clone()], lambda packed: packed.pop()
    ),
    "saved_may_change": torch.autograd.graph.allow_mutation_on_saved_tensors,
    "autocast_bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cpu", torch.float16),
    "one_thread_of_backward": lambda: torch.autograd.set_multithreading_enabled(False),
    "profiler": lambda: torch.profiler.profile(record_shapes=True, with_stack=True),
    "deterministic": lambda: during(torch.use_deterministic_algorithms, True, False),
    "default_dtype": lambda: during(torch.set_default_dtype, torch.float64, torch.float32),
    "default_device": lambda: during(torch.set_default_device, "cpu", None),
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
@pytest.mark.parametrize("treatment", ["untreated", "to_bfloat16", "forward_hook"])
def test_circumstances(name: str, treatment: str) -> None:
    def compute(base: type[Model]) -> object:
        with CIRCUMSTANCES[name]():
            model = TREATMENTS[treatment](base)
            logits, loss = model(IDX, TARGETS)
            logits.retain_grad()
            (loss + logits.square().mean()).backward()
            torch.manual_seed(2)
            return logits, loss, logits.grad, grads_of(model), model.generate(IDX, 10)

    assert_same(compute, **TOLERANCES.get(treatment, {}))
