"""What traces, compiles, exports or observes a model."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.scripts import IDX, TARGETS, Model, V, alike, assert_same, grads_of, loss_of
from tests.scripts.test_circumstances import FunctionMode
from tests.scripts.treatments import CHANGES_OF_THE_MODEL, CHANGES_OF_THE_TABLE

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


def called_program(base: type[Model]) -> tuple[Model, Any, object]:
    """A new model, a program of it, and what its first call gave."""
    torch.compiler.reset()
    model = base(V)
    program: Any = torch.compile(model, backend="eager")
    return model, program, program(IDX, TARGETS)


CHANGES_BETWEEN = [
    "forward_hook", "pruned", "parametrized", "max_norm_set", "padding_idx_set", "forward_bound_anew", "class_assigned",
    "weight_of_a_subclass", "weight_data_assigned", "hook_on_the_model", "forward_of_the_model_patched",
]  # fmt: skip


@pytest.mark.parametrize("name", CHANGES_BETWEEN)
def test_changed_between_two_calls_of_a_program(name: str) -> None:
    def compute(base: type[Model]) -> object:
        model, program, before = called_program(base)
        if name in CHANGES_OF_THE_TABLE:
            CHANGES_OF_THE_TABLE[name](model.token_embedding_table)
        else:
            CHANGES_OF_THE_MODEL[name](model)
        logits, loss = program(IDX, TARGETS)
        loss.backward()
        return before, logits, loss, grads_of(model)

    assert_same(compute)


@pytest.mark.parametrize("function", [F.embedding, F.cross_entropy])
def test_a_mode_around_a_program(function: Any) -> None:
    def compute(base: type[Model]) -> object:
        _model, program, before = called_program(base)
        with FunctionMode(function):
            within = program(IDX, TARGETS)
        return before, within, program(IDX, TARGETS)

    assert_same(compute)


class Doubling(Tensor):
    """Tokens that have a word in what is done with them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return 2 * output if func in (F.embedding, F.cross_entropy) else output


@pytest.mark.parametrize("which", ["idx", "targets"])
def test_tokens_of_a_subclass(which: str) -> None:
    def compute(base: type[Model]) -> object:
        model, tokens = base(V), {"idx": IDX, "targets": TARGETS}
        tokens[which] = tokens[which].as_subclass(Doubling)
        logits, loss = model(**tokens)
        loss.backward()
        return logits.as_subclass(Tensor), loss.as_subclass(Tensor), grads_of(model)

    assert_same(compute)


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
