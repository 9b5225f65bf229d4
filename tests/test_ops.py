"""The ops as PyTorch's compilers see them: schemas, fakes, autograd; and how the kernels are loaded."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

import bigramx
from bigramx import BigramLanguageModel, functional
from tests import processes
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
    library.opcheck(OPS.count_bigrams.default, (idx[0], 5))
    library.opcheck(OPS.get_batch.default, (torch.arange(5), 2, 4))  # only one block is possible
    state = [torch.rand(3) for _ in range(4)]
    library.opcheck(OPS.adamw_.default, (*state, None, torch.tensor(1.0), 0.1, 0.9, 0.99, 1e-8, 0.1, False))


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
def test_compile_with_sparse_gradients_raises() -> None:
    with pytest.raises(Exception, match=r"sparse gradients are not implemented under torch\.compile"):
        torch.compile(BigramLanguageModel(5, sparse=True), fullgraph=True)(*pairs())


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
    assert info.keys() == {"compiler", "parallel", "cpu_capability", "cuda_architectures", "torch_version"}
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


@pytest.mark.cpu_only
def test_import_is_light() -> None:
    """The command line's packages and matplotlib are neither needed nor imported."""
    script = "import bigramx, sys; print([name for name in ('typer', 'rich', 'matplotlib') if name in sys.modules])"
    assert processes.run([sys.executable, "-c", script], check=True).stdout == "[]\n"
