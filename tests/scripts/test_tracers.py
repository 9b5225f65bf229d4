"""What traces, compiles, exports or observes a model."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.scripts import IDX, TARGETS, Model, alike, grads_of, loss_of

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]


@alike
def test_fx_trace(model: Model) -> object:
    traced = torch.fx.symbolic_trace(model)
    logits, loss = traced(IDX, TARGETS)
    loss.backward()
    return logits, loss, grads_of(traced)


@alike
def test_fx_trace_without_targets(model: Model) -> object:
    traced = torch.fx.symbolic_trace(model, concrete_args={"targets": None})
    return traced(IDX)


@alike
def test_jit_trace(model: Model) -> object:
    traced = torch.jit.trace(model, (IDX, TARGETS))
    logits, loss = traced(TARGETS, IDX)
    loss.backward()
    return logits, loss, grads_of(model)


@alike
def test_jit_trace_saved(model: Model) -> object:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace_module(model, {"forward": (IDX, TARGETS)}), file)
    file.seek(0)
    return torch.jit.load(file)(TARGETS, IDX)


@alike
def test_jit_script(model: Model) -> object:
    scripted: Any = torch.jit.script(model)
    logits, loss = scripted(IDX, TARGETS)
    loss.backward()
    return scripted(IDX), logits, loss, grads_of(model)


@alike
def test_jit_script_of_the_table(model: Model) -> object:
    return torch.jit.script(model.token_embedding_table)(IDX)


@alike
def test_exported(model: Model) -> object:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (IDX, TARGETS), dynamic_shapes=({0: batch}, {0: batch}))
    alone = torch.export.export(model, (IDX,))
    return program.module()(IDX[:2], TARGETS[:2]), alone.module()(IDX)


@alike
def test_exported_and_decomposed(model: Model) -> object:
    program = torch.export.export(model, (IDX, TARGETS)).run_decompositions()
    return program.module()(IDX, TARGETS)


def compiled_by(model: Model, **options: Any) -> object:
    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, **options)
    logits, loss = compiled(IDX, TARGETS)
    logits.retain_grad()
    (loss + logits.mean()).backward()
    return compiled(IDX), compiled(IDX[:2], TARGETS[:2]), logits, loss, logits.grad, grads_of(model)


@alike
def test_compiled_eager(model: Model) -> object:
    return compiled_by(model, backend="eager")


@alike
def test_compiled_aot(model: Model) -> object:
    return compiled_by(model, backend="aot_eager", dynamic=True)


@alike
def test_compiled_step(model: Model) -> object:
    """The whole step in one graph."""
    torch.compiler.reset()

    @torch.compile(backend="aot_eager")
    def step() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    return step(), grads_of(model)


@alike
def test_fake_tensors(model: Model) -> object:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, loss = model(IDX, TARGETS)
    return logits.shape, loss.shape, logits.dtype, loss.dtype


@alike
def test_on_meta(model: Model) -> object:
    model = copy.deepcopy(model).to("meta")
    logits, loss = model(IDX.to("meta"), TARGETS.to("meta"))
    loss.backward()
    return logits.shape, loss.shape, logits.is_meta, loss.is_meta


@alike
def test_flop_counter(model: Model) -> object:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        loss_of(model).backward()
    return counter.get_total_flops()


@alike
def test_logged_functions(model: Model) -> object:
    class Log(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Log():
        logits, loss = model(IDX, TARGETS)
        loss.backward()
        return logits, loss, grads_of(model), model.generate(IDX, 3)


@alike
def test_profiled(model: Model) -> object:
    with torch.profiler.profile(profile_memory=True, with_modules=True) as profile:
        loss_of(model).backward()
    return len(profile.key_averages()) > 0
