"""The ops as PyTorch's compilers see them: schemas, fakes, autograd; and how the kernels are loaded."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

import bigramx
from bigramx import BigramLanguageModel, functional, ops
from tests import interrupts, processes
from tests.devices import on_device

pytestmark = pytest.mark.usefixtures("device")


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Idx and targets."""
    return torch.tensor([[0, 3, 3], [4, 0, 1]]), torch.tensor([[1, 2, 0], [4, 1, -100]])


def weight(requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 5, dtype=dtype, requires_grad=requires_grad)


LOSS_OPTIONS = [
    (),
    (torch.rand(5), -100, 2, 0.1, 0.01, 3),
    (None, -100, 0, 0.1),
    (None, -100, 1, 0.0, 0.0, -1, False, True),
]
OPS = torch.ops.bigramx


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=range(len(LOSS_OPTIONS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_embedding_cross_entropy(options: tuple[Any, ...], dtype: torch.dtype) -> None:
    options = tuple(on_device(value.to(dtype)) if isinstance(value, torch.Tensor) else value for value in options)
    idx, targets = pairs()
    library.opcheck(OPS.embedding_cross_entropy.default, (idx, weight(dtype=dtype), targets, *options))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck_embedding_cross_entropy_kernels(sparse: bool, reduction: int) -> None:
    idx, targets = pairs()
    arguments = (idx, weight(False), targets, None, -100, reduction, 0.1, 0.01, -1, sparse)
    library.opcheck(OPS.embedding_cross_entropy_forward.default, (*arguments, True, True))
    grad_loss = torch.ones(idx.shape if reduction == 0 else ())
    library.opcheck(OPS.embedding_cross_entropy_backward.default, (grad_loss, *arguments))


def test_opcheck_others() -> None:
    idx, _targets = pairs()
    certain = torch.eye(4)  # the result is the same, whatever is drawn
    library.opcheck(OPS.multinomial.default, (certain, 1))
    library.opcheck(OPS.multinomial.default, (certain, 1), {"sampler": "philox"})
    library.opcheck(OPS.generate.default, (idx, weight(False), 4, 0.0))
    library.opcheck(OPS.generate.default, (idx, weight(False), 4, 0.0, None, None, None, 3))
    library.opcheck(OPS.generate.default, (idx, weight(False), 4, 0.0), {"more_stop": [3, 1]})
    library.opcheck(OPS.count_bigrams.default, (idx[0], 5))
    library.opcheck(OPS.get_batch.default, (torch.arange(5), 2, 4))  # only one block is possible
    state = [torch.rand(3) for _ in range(4)]
    library.opcheck(OPS.adamw_.default, (*state, None, torch.tensor(1.0), 0.1, 0.9, 0.99, 1e-8, 0.1, False))


@pytest.mark.cpu_only
def test_opcheck_deferred_adamw() -> None:
    tables, row_steps = [torch.rand(4, 3) for _ in range(3)], torch.tensor([1, 0, 2, 1])
    schedule = torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.1]], dtype=torch.float64).expand(3, 5)
    library.opcheck(OPS.deferred_adamw_.default, (*tables, row_steps, schedule, 3))
    grad = torch.rand(2, 3)
    arguments = (*tables, row_steps, schedule, 3, torch.tensor([2, 0]), grad, True)
    library.opcheck(OPS.deferred_adamw_.default, arguments)


@pytest.mark.cpu_only
def test_opcheck_fit() -> None:
    table, losses = [torch.rand(4, 4) for _ in range(3)], torch.zeros(2, dtype=torch.float64)
    tokens = torch.arange(4)  # one block alone
    arguments = (*table, torch.zeros(()), losses, tokens, 2, 3, -1, 0.1, 0.9, 0.99, 1e-8, 0.1, 100.0)
    library.opcheck(OPS.fit_.default, arguments, test_utils=("test_schema", "test_autograd_registration"))
    with (
        FakeTensorMode() as mode,
        pytest.raises(NotImplementedError, match="fit_: not implemented under"),
    ):
        OPS.fit_.default(
            *(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments)
        )


# ----------------------------------------------------------------------------------------- what tensors may be

Arguments = dict[str, Any]


def arguments_of(op: str) -> Arguments:
    """Of a call that succeeds, and draws the same each time."""
    idx, targets = pairs()
    loss = {"idx": idx, "weight": weight(False), "targets": targets, "class_weight": torch.rand(5)}
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    drawn = {"generator": torch.Generator().manual_seed(1)}
    tables = {name: torch.rand(5, 5) for name in ("exp_avg", "exp_avg_sq")}
    tokens = {"tokens": idx.flatten()}
    batch = {**tokens, "batch_size": 2, "block_size": 3, **drawn}
    arguments: dict[str, Arguments] = {
        "embedding_cross_entropy": loss,
        "embedding_cross_entropy_forward": {**loss, "compute_grad": True},
        "embedding_cross_entropy_backward": {"grad_loss": torch.ones(()), **loss},
        "multinomial": {"probs": torch.rand(5, 5), "num_samples": 2, **drawn},
        "generate": {"idx": idx, "weight": weight(False), "max_new_tokens": 4, **drawn},
        "count_bigrams": {**tokens, "vocab_size": 5},
        "get_batch": batch,
        "adamw_": {
            **{name: torch.rand(4) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")},
            "step": torch.tensor(1.0),
            **numbers,
            "maximize": False,
        },
        "fit_": {
            "weight": torch.rand(5, 5),
            **tables,
            "step": torch.tensor(0.0),
            "losses": torch.zeros(2, dtype=torch.float64),
            **batch,
            "padding_idx": -1,
            **numbers,
            "max_seconds": 100.0,
            "row_steps": torch.zeros(5, dtype=torch.int64),
        },
        "deferred_adamw_": {
            **{name: torch.rand(5, 5) for name in ("param", "exp_avg", "exp_avg_sq")},
            "row_steps": torch.zeros(5, dtype=torch.int64),
            "schedule": torch.tensor(list(numbers.values()), dtype=torch.float64).expand(3, 5),
            "step": 3,
            "rows": torch.tensor([3, 0]),
            "grad": torch.rand(2, 5),
        },
    }
    return arguments[op]


def schema_of(op: str) -> list[Any]:
    schema: list[Any] = getattr(OPS, op).default._schema.arguments
    return schema


def call_op(op: str, entry: str, arguments: Arguments) -> Any:
    """By torch.ops, or by the function that this package calls, which passes them by."""
    values = [arguments.get(argument.name, argument.default_value) for argument in schema_of(op)]
    return getattr(OPS, op)(*values) if entry == "torch.ops" else getattr(ops, op)(*values)


def call_changed(op: str, entry: str, name: str, change: Any) -> Any:
    """The call that succeeds, but for one tensor."""
    arguments = arguments_of(op)
    arguments[name] = change(arguments[name])
    return call_op(op, entry, arguments)


def tensors_of(result: Any) -> list[torch.Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [value for value in results if isinstance(value, torch.Tensor)]


DIRECT_OPS = [
    "embedding_cross_entropy",
    "multinomial",
    "generate",
    "count_bigrams",
    "get_batch",
    "adamw_",
    "deferred_adamw_",
    "fit_",
]
CPU_ONLY = ("deferred_adamw_", "fit_")
KERNEL_OPS = ["embedding_cross_entropy_forward", "embedding_cross_entropy_backward"]
TENSORS = [
    pytest.param(
        op, argument.name, entry, id=f"{op}-{argument.name}-{entry}", marks=[pytest.mark.cpu_only] * (op in CPU_ONLY)
    )
    for op in DIRECT_OPS + KERNEL_OPS
    for argument in schema_of(op)
    if "Tensor" in str(argument.type)
    for entry in (("torch.ops", "direct") if op in DIRECT_OPS else ("torch.ops",))
]


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


def past_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """The second of two tensors in a storage that was cut between them."""
    second = torch.stack((tensor, tensor))[1]
    second.untyped_storage().resize_(tensor.nbytes)
    return second


@pytest.mark.parametrize("spoil", [freed, shrunk, past_the_end], ids=lambda function: function.__name__)
@pytest.mark.parametrize(("op", "name", "entry"), TENSORS)
def test_memory_that_does_not_hold_a_tensor(op: str, name: str, entry: str, spoil: Any) -> None:
    with pytest.raises(RuntimeError, match=f"expected the storage of {name} to hold its elements"):
        call_changed(op, entry, name, spoil)


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([tensor, tensor])


LAYOUTS = {
    "sparse": torch.Tensor.to_sparse,
    "csr": lambda tensor: tensor.reshape(-1, 1).to_sparse_csr(),
    "mkldnn": lambda tensor: tensor.float().reshape(-1, 1).to_mkldnn(),
    "quantized": quantized,
    "nested": nested,
}


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore")  # of torch, about layouts that are young or old
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("op", "name", "entry"), TENSORS)
def test_layouts_without_kernels_are_named(op: str, name: str, entry: str, make: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"not implemented for {name} of layout .*; expected a dense tensor"):
        call_changed(op, entry, name, make)


def is_written(op: str, name: str) -> bool:
    return any(argument.name == name and argument.alias_info for argument in schema_of(op))


@pytest.mark.parametrize(("op", "name", "entry"), TENSORS)
def test_lazy_views(op: str, name: str, entry: str) -> None:
    """A view that negates, and zeros without memory, give what their numbers give; none is written to."""
    for make in (torch.neg, torch.zeros_like):
        arguments, lazy = arguments_of(op), arguments_of(op)
        for given in (arguments, lazy):  # the same numbers, drawn once
            given.update({key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)})
        plain = arguments[name]
        value = make(plain)
        lazy[name] = (
            torch._neg_view(plain)
            if make is torch.neg
            else torch._efficientzerotensor(plain.shape, dtype=plain.dtype, device=plain.device)
        )
        arguments[name] = value
        if is_written(op, name):
            with pytest.raises(RuntimeError, match=f"expected {name}, which is written, to hold its numbers in memory"):
                call_op(op, entry, lazy)
            continue
        try:
            expected = call_op(op, entry, arguments)
        except (IndexError, ValueError) as error:  # of numbers out of range
            with pytest.raises(type(error)):
                call_op(op, entry, lazy)
            continue
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                call_op(op, entry, lazy)
            continue
        torch.testing.assert_close(tensors_of(call_op(op, entry, lazy)), tensors_of(expected), equal_nan=True)
        for key, value in arguments.items():
            if is_written(op, key):
                torch.testing.assert_close(lazy[key], value, equal_nan=True)


@pytest.mark.parametrize(("op", "name", "entry"), TENSORS)
def test_what_is_no_tensor_or_elsewhere(op: str, name: str, entry: str) -> None:
    arguments = arguments_of(op)
    optional = next(argument for argument in schema_of(op) if argument.name == name).type.kind() == "OptionalType"
    bad: list[Any] = [[1.0], 1, "x", *([] if optional else [None])]
    for value in bad:
        with pytest.raises(
            (TypeError, RuntimeError), match=f"argument '{name}'|expected {name} to be a Tensor, got None|no tensor arg"
        ):
            call_op(op, entry, {**arguments, name: value})
    if len([value for value in arguments.values() if isinstance(value, torch.Tensor)]) > 1:
        with pytest.raises(
            (RuntimeError, NotImplementedError), match=f"same device, .*{name}|{name} to be on|fit_: not"
        ):
            call_op(op, entry, {**arguments, name: arguments[name].to("meta")})


@pytest.mark.parametrize(
    "dtype",
    [torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool, torch.uint16],
    ids=str,
)
def test_a_dtype_that_no_loss_has_is_named(dtype: torch.dtype) -> None:
    arguments = {**arguments_of("embedding_cross_entropy_forward"), "class_weight": None, "loss_dtype": dtype}
    with pytest.raises(
        NotImplementedError, match="expected loss_dtype to be float64, float32, bfloat16 or float16, got"
    ):
        call_op("embedding_cross_entropy_forward", "torch.ops", arguments)


@pytest.mark.parametrize(("result", "called"), [(5, ["native"]), (NotImplemented, ["native", "op"])])
def test_an_op_is_asked_only_for_arguments_that_do_not_fit(result: object, called: list[str]) -> None:
    calls: list[str] = []

    def native(*_: object) -> object:
        calls.append("native")
        return result

    def op(*_: object) -> object:
        calls.append("op")
        return 6

    assert ops.direct(op, native)(1) == (5 if result == 5 else 6)
    assert calls == called


@pytest.mark.cpu_only
def test_an_error_within_a_call_does_not_repeat_it() -> None:
    """A TypeError of a signal handler, which says nothing about the arguments: each step is taken once."""
    arguments = {**arguments_of("fit_"), "losses": torch.full((10**7,), torch.nan, dtype=torch.float64)}
    begin = time.monotonic()

    def handle() -> None:
        if time.monotonic() - begin > 0.02:  # the call has begun
            raise TypeError("of a handler")

    with pytest.raises(TypeError, match="of a handler"):
        interrupts.call_with_handlers(lambda: call_op("fit_", "direct", arguments), handle)
    num_steps = int(arguments["step"])
    assert num_steps == int(arguments["losses"].isfinite().sum())
    assert num_steps > 0


@pytest.mark.once
@pytest.mark.filterwarnings("ignore")  # torch's compiler's, about itself
@pytest.mark.parametrize("return_logits", [True, False])
def test_compile_fullgraph(return_logits: bool) -> None:
    model = BigramLanguageModel(5)
    compiled = torch.compile(model, fullgraph=True)
    idx, targets = pairs()
    for scale in (1.0, 3.0):
        grads = []
        for callable_model in (model, compiled):
            model.zero_grad()
            logits, loss = callable_model(idx, targets, return_logits=return_logits)
            if logits is not None:
                loss = loss + logits.square().mean()
            (scale * loss).backward()
            grads.append((loss.detach(), model.token_embedding_table.weight.grad))
        torch.testing.assert_close(grads[0], grads[1])
    assert torch.equal(compiled(idx)[0], model(idx)[0])


@pytest.mark.filterwarnings("ignore")
def test_compile_with_sparse_gradients_raises_or_is_right() -> None:
    """How torch.compile traces decides which: torch 2.11 computes them, 2.13 does not."""
    model, (idx, targets) = BigramLanguageModel(5, sparse=True), pairs()
    weight = model.token_embedding_table.weight
    try:
        loss = torch.compile(model, fullgraph=True)(idx, targets)[1]
    except Exception as error:
        if "sparse gradients are not implemented under torch.compile" not in str(error):
            raise
    else:
        gradients = [torch.autograd.grad(each, weight)[0].to_dense() for each in (loss, model(idx, targets)[1])]
        torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd() -> None:
    model = BigramLanguageModel(5)
    idx, targets = pairs()

    @torch.compile(backend="aot_eager")
    def step() -> None:
        model(idx, targets)[1].backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        step()
    compiled = model.token_embedding_table.weight.grad
    model.zero_grad()
    model(idx, targets)[1].backward()
    torch.testing.assert_close(compiled, model.token_embedding_table.weight.grad)


@pytest.mark.filterwarnings("ignore")
def test_compile_other_ops_and_reductions() -> None:
    idx, targets = pairs()

    def losses(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = functional.embedding_cross_entropy(idx, weight, targets, reduction="none", label_smoothing=0.1)
        return losses, functional.count_bigrams(idx[0], 5)

    table = weight()
    compiled_losses, compiled_counts = torch.compile(losses, fullgraph=True)(table)
    eager_losses, eager_counts = losses(table)
    torch.testing.assert_close(compiled_losses, eager_losses)
    assert torch.equal(compiled_counts, eager_counts)
    torch.testing.assert_close(
        torch.autograd.grad(compiled_losses.sum(), table), torch.autograd.grad(eager_losses.sum(), table)
    )


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_needs_no_ops_of_this_package() -> None:
    model = BigramLanguageModel(5)
    exported = torch.export.export(model, pairs())
    assert "bigramx" not in str(exported.graph)
    expected_logits, expected_loss = model(*pairs())
    logits, loss = exported.module()(*pairs())
    torch.testing.assert_close((logits, loss), (expected_logits, expected_loss))


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    with FakeTensorMode() as mode:
        fake_weight = mode.from_tensor(weight())
        idx, targets = map(mode.from_tensor, pairs())
        losses = functional.embedding_cross_entropy(idx, fake_weight, targets, reduction="none")
        assert losses.shape == idx.shape
        assert functional.generate(idx, fake_weight, 7, sampler="philox").shape == (2, 10)
        assert functional.multinomial(fake_weight, 2).shape == (5, 2)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("embedding_cross_entropy", "weight"),
        ("embedding_cross_entropy_forward", "weight"),
        ("embedding_cross_entropy_backward", "weight"),
        ("multinomial", "probs"),
        ("generate", "idx"),
        ("generate", "weight"),
        ("count_bigrams", "tokens"),
        ("get_batch", "tokens"),
    ],
)
def test_dimensions_are_checked_without_memory(op: str, name: str) -> None:
    arguments = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in arguments_of(op).items()
    }
    arguments[name] = torch.empty(2, 2, 2, dtype=arguments[name].dtype, device="meta")
    with pytest.raises(RuntimeError, match=rf"expected {name} to be .-D.*got shape \[2, 2, 2\]"):
        call_op(op, "torch.ops", arguments)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("count_bigrams", (torch.tensor([1, 2, 0]), 5)),
        ("multinomial", (torch.ones(3), 1)),
        ("generate", (torch.tensor([[1]]), torch.zeros(5, 5), 3)),
        ("adamw_", (*(torch.ones(2) for _ in range(4)), None, torch.tensor(1.0), 0.1, 0.9, 0.99, 1e-8, 0.1, False)),
        (
            "embedding_cross_entropy_forward",
            (
                torch.tensor([1]),
                torch.zeros(5, 5),
                torch.tensor([1]),
                *(None, -100, 1, 0.0, 0.0, -1, False, False, True),
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_device_without_kernels_is_named(name: str, arguments: tuple[Any, ...]) -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    with pytest.raises(RuntimeError, match=rf"{name}: no kernel is built for device xpu"):
        getattr(OPS, name).default.redispatch(keys, *arguments)


@pytest.mark.cpu_only
def test_build_info() -> None:
    info = bigramx.build_info()
    built = {"compiler", "parallel", "cpu_capability", "cuda_architectures", "torch_version"}
    assert info.keys() == {*built, "gradient_pool"}
    if sys.platform.startswith("linux"):
        assert info["parallel"] == "OpenMP"
    assert info["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert info["torch_version"] == torch.__version__.partition("+")[0]


@pytest.mark.cpu_only
def test_missing_kernels_raise_a_clear_error() -> None:
    script = "import sys; sys.modules['bigramx._C'] = None; import bigramx"
    result = processes.run([sys.executable, "-c", script])
    assert result.returncode == 1
    assert "ImportError: bigramx: the compiled kernels cannot be loaded" in result.stderr
    assert "pip install --no-build-isolation --no-deps --force-reinstall" in result.stderr


HEAVY = ["typer", "rich", "matplotlib", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"]
USE = """
model = bigramx.BigramLanguageModel(65)
tokens = torch.randint(65, (1000,))
idx, targets = bigramx.data.get_batch(tokens, 8, 4)
model(idx, targets)[1].backward()
model.generate(idx, 5)
model.evaluate(tokens)
counts = bigramx.functional.count_bigrams(tokens, 65, layout=torch.sparse_csr)
smoothed = bigramx.SmoothedBigramModel.from_counts(counts)
smoothed.generate(idx, 5)
model.load_state_dict(copy.deepcopy(smoothed.to_dense()).state_dict())
for each in (model, smoothed):
    file = io.BytesIO()
    each.save(file)
    type(each).load(io.BytesIO(file.getvalue()))
with torch.device("meta"):
    bigramx.BigramLanguageModel(65)
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize("use", ["", USE], ids=["import", "use"])
def test_imports_are_light(use: str) -> None:
    """Neither the command line's packages and matplotlib, nor the parts of PyTorch that take as long as all of it."""
    script = f"import copy, io, sys, torch, bigramx\n{use}\nprint([name for name in {HEAVY} if name in sys.modules])"
    assert processes.run([sys.executable, "-c", script], check=True).stdout == "[]\n"
