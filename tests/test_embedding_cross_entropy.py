"""functional.embedding_cross_entropy against its float64 reference and the semantics of F.cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigramx import functional, reference
from bigramx.functional import Reduction
from tests.devices import IN_SIMT, fewer, graph_nodes, on_device, raises_in_kernel, runs_on_gpu, skip_if_long
from tests.names import name_of
from tests.tolerances import assert_as_close_as_eager

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Less than a vector, whole vectors and one element, whole vectors less one element, more than one block of rows.
SIZES = [(1, 1), (2, 3), (65, 256), (67, 1), (127, 333), (1000, 77), (65, 0)]


class OpNames(TorchDispatchMode):
    """The names of the ops that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@dataclass
class Case:
    """The arguments of a call, which can be run and checked."""

    idx: Tensor
    weight: Tensor
    targets: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Callable[..., Any], dtype: torch.dtype, grad_loss: float = 1.0) -> tuple[Tensor, Tensor]:
        """The loss and the dense gradient of the weight."""
        weight = self.weight.detach().to(dtype).requires_grad_()
        options = dict(self.options)
        if options.get("class_weight") is not None:
            options["class_weight"] = options["class_weight"].to(dtype)
        loss = function(self.idx, weight, self.targets, **options)
        loss.backward(torch.full_like(loss, grad_loss))
        assert weight.grad is not None
        return loss.detach(), weight.grad.to_dense() if weight.grad.is_sparse else weight.grad

    def check(self, grad_loss: float = 1.0) -> None:
        """Asserts that the kernel is as close to float64 as eager is."""
        dtype = self.weight.dtype
        actual = self.run(functional.embedding_cross_entropy, dtype, grad_loss)
        eager = self.run(reference.embedding_cross_entropy, dtype, grad_loss)
        exact = self.run(reference.embedding_cross_entropy, torch.float64, grad_loss)
        assert_as_close_as_eager(actual[0], eager[0], exact[0])
        assert_as_close_as_eager(actual[1], eager[1], exact[1], self.largest_term(grad_loss))

    def largest_term(self, grad_loss: float) -> float:
        """The most that the pairs of one row add to or subtract from an entry of the gradient."""
        counts = self.targets.flatten() != self.options.get("ignore_index", -100)
        pair_weights = torch.ones(len(counts))[counts]
        if self.options.get("class_weight") is not None:
            pair_weights = self.options["class_weight"].float()[self.targets.flatten()[counts].long()]
        if len(pair_weights) == 0:
            return 0.0
        total = pair_weights.sum() if self.options.get("reduction", "mean") == "mean" else 1.0
        row_weights = torch.bincount(self.idx.flatten()[counts].long(), weights=pair_weights)
        return abs(grad_loss) * float(row_weights.max() / total)


def make_case(vocab_size: int, num_pairs: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    return Case(
        torch.randint(vocab_size, (num_pairs,)),
        torch.randn(vocab_size, vocab_size).to(dtype),
        torch.randint(vocab_size, (num_pairs,)),
        options,
    )


@pytest.mark.parametrize(("vocab_size", "num_pairs"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_reference(vocab_size: int, num_pairs: int, dtype: torch.dtype, reduction: str) -> None:
    make_case(vocab_size, num_pairs, dtype, reduction=reduction).check()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Square and other tables, all dtypes and options, several memory layouts."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    # For 300 rows, a table of pair counts is too large, so the pairs are sorted.
    num_rows, num_classes = draw(st.sampled_from([1, 2, 7, 40, 300])), draw(st.integers(1, 70))
    shape = draw(st.sampled_from([(0,), (1,), (7,), (4, 5), (2, 3, 4), ()]))
    dtype = draw(st.sampled_from(DTYPES))
    weight = torch.randn(num_rows, num_classes) * draw(st.sampled_from([0.1, 1.0, 8.0]))
    layout = draw(st.sampled_from(["contiguous", "transposed", "wide", "every second"]))
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "wide":
        weight = torch.randn(num_rows, num_classes + 3).narrow(1, 1, num_classes)
    elif layout == "every second":
        weight = torch.randn(2 * num_rows, 2 * num_classes)[::2, ::2]
    idx = torch.randint(num_rows, shape).to(draw(st.sampled_from([torch.int64, torch.int32])))
    targets = torch.randint(num_classes, shape).to(draw(st.sampled_from([torch.int64, torch.int32])))
    ignore_index = draw(st.sampled_from([-100, 0, num_classes + 5]))
    if draw(st.booleans()):
        targets = torch.where(torch.rand(shape) < 0.3, torch.tensor(ignore_index, dtype=targets.dtype), targets)
    if len(shape) == 2 and draw(st.booleans()):
        idx, targets = idx.t().contiguous().t(), targets.t()
        idx = idx.t()
    options = {
        "class_weight": draw(st.sampled_from([None, torch.rand(num_classes) + 0.1])),
        "ignore_index": ignore_index,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
        "padding_idx": draw(st.sampled_from([None, 0, -1])),
        "sparse": draw(st.booleans()),
    }
    return Case(idx, weight.to(dtype), targets, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 2, 65, 127, 1000, 2100])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"sparse": True}, {"ignore_index": 0}])
def test_a_softmax_of_one_has_no_gradient(dtype: torch.dtype, vocab_size: int, options: dict[str, Any]) -> None:
    """Exactly none, as in PyTorch: of a rounding of the scale, which is no power of 2, AdamW would make steps."""
    weight = torch.full((vocab_size, vocab_size), -1000.0, dtype=dtype).fill_diagonal_(0.0).requires_grad_()
    for num_pairs in (1, 7, 120, 999):
        idx = torch.randint(vocab_size, (num_pairs,))
        loss = functional.embedding_cross_entropy(idx, weight, idx, **options)
        for factor in (3, -3):
            (grad,) = torch.autograd.grad(loss * factor, weight, retain_graph=True)
            assert torch.count_nonzero(grad.coalesce().values() if grad.is_sparse else grad) == 0


@settings(max_examples=fewer(300))
@given(case=cases(), grad_loss=st.sampled_from([1.0, -2.5]))
def test_equals_reference_for_any_options(case: Case, grad_loss: float) -> None:
    case.check(grad_loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2}, {"z_loss": 0.1}, {"class_weight": torch.rand(5).double()}, {"ignore_index": 2}],
    ids=name_of,
)
def test_gradcheck(reduction: str, options: dict[str, Any]) -> None:
    idx, targets = torch.tensor([0, 3, 3, 4, 0]), torch.tensor([1, 2, 0, 4, 1])
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    options = {name: on_device(value) for name, value in options.items()}
    assert torch.autograd.gradcheck(
        lambda weight: functional.embedding_cross_entropy(idx, weight, targets, reduction=reduction, **options),  # type: ignore[arg-type]
        (weight,),
        nondet_tol=1e-12,  # a GPU sums the gradients of "none" in any order
    )


def test_gradcheck_through_logits() -> None:
    idx, targets = torch.tensor([0, 3, 3]), torch.tensor([1, 2, 0])
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda weight: functional.embedding_cross_entropy_with_logits(idx, weight, targets), (weight,)
    )


class TestEdges:
    """Cases with few or no pairs, and with special values, as F.cross_entropy treats them."""

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_no_pairs(self, reduction: str) -> None:
        case = make_case(5, 0, reduction=reduction)
        for actual, eager in zip(
            case.run(functional.embedding_cross_entropy, torch.float32),
            case.run(reference.embedding_cross_entropy, torch.float32),
            strict=True,
        ):
            torch.testing.assert_close(actual, eager, equal_nan=True)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_all_ignored(self, reduction: str) -> None:
        case = make_case(5, 4, reduction=reduction)
        case.targets.fill_(-100)
        loss, grad = case.run(functional.embedding_cross_entropy, torch.float32)
        eager, _grad = case.run(reference.embedding_cross_entropy, torch.float32)
        torch.testing.assert_close(loss, eager, equal_nan=True)
        assert not grad.any()

    def test_no_rows(self) -> None:
        empty = torch.empty(0, dtype=torch.int64)
        assert functional.embedding_cross_entropy(empty, torch.empty(0, 0), empty).isnan()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_special_logits(self, value: float, dtype: torch.dtype) -> None:
        case = make_case(67, 100, dtype, reduction="none")
        case.weight[3, 5] = value
        case.weight[7] = value
        case.idx[:2], case.targets[:2] = 3, torch.tensor([5, 6])
        actual, _grad = case.run(functional.embedding_cross_entropy, dtype)
        eager, _grad = case.run(reference.embedding_cross_entropy, dtype)
        assert torch.equal(actual.isnan(), eager.isnan())
        assert torch.equal(actual.isinf(), eager.isinf())

    def test_large_logits(self) -> None:
        case = make_case(65, 256)
        case.weight.mul_(1e4)
        case.check()

    @pytest.mark.parametrize("value", [1.5e308, -1.5e308])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("vocab_size", [5, 600])
    def test_a_logsumexp_whose_double_overflows(self, vocab_size: int, reduction: str, value: float) -> None:
        """It matters to z-loss alone."""
        case = make_case(vocab_size, 8, torch.float64, reduction=reduction)
        case.weight[:] = value
        actual = case.run(functional.embedding_cross_entropy, torch.float64)
        eager = case.run(reference.embedding_cross_entropy, torch.float64)
        torch.testing.assert_close(actual, eager)
        assert actual[1].isfinite().all()

    @pytest.mark.parametrize("value", [3e38, -3e38])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_a_z_loss_that_overflows(self, reduction: str, value: float) -> None:
        """It is infinite, as in PyTorch; its gradient is finite."""
        case = make_case(5, 8, reduction=reduction, z_loss=0.01)
        case.weight[:] = value
        actual = case.run(functional.embedding_cross_entropy, torch.float32)
        eager = case.run(reference.embedding_cross_entropy, torch.float32)
        torch.testing.assert_close(actual[0], eager[0])
        assert actual[0].isinf().all()
        assert actual[1].isfinite().all()  # eager's is not: 2 * logsumexp overflows

    @pytest.mark.parametrize(("vocab_size", "num_pairs"), [(7, 40), (130, 40)])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1}, {"padding_idx": 3}], ids=str)
    def test_a_row_of_ignored_pairs(
        self, vocab_size: int, num_pairs: int, reduction: str, options: dict[str, Any]
    ) -> None:
        """Its gradient is 0 times the softmax: NaN where that is NaN. The GPU's kernels do not read the row."""
        for value in (float("nan"), float("inf"), float("-inf"), 1.0):
            for ignores_all in (False, True):
                case = make_case(vocab_size, num_pairs, reduction=reduction, **options)
                case.weight[3, 5] = value
                case.weight[4] = value
                case.idx[:5] = torch.tensor([3, 3, 3, 4, 4])
                case.targets[(case.idx == 3) | (case.idx == 4) | ignores_all] = -100
                actual = case.run(functional.embedding_cross_entropy, torch.float32)
                eager = case.run(reference.embedding_cross_entropy, torch.float32)
                if runs_on_gpu():
                    eager[1].nan_to_num_(0.0)
                torch.testing.assert_close(actual, eager, equal_nan=True, rtol=1e-4, atol=1e-5)


# The pairs are counted, on a GPU in one block or by several; or listed, as the table is too large.
@pytest.mark.parametrize(("vocab_size", "num_pairs"), [(7, 40), (70, 500), (150, 40), (300, 40)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
class TestInfinities:
    """In places where a product with zero would be NaN: each loss, and each gradient, is that of eager PyTorch."""

    VALUES = (float("inf"), float("-inf"), float("nan"))

    @staticmethod
    def check(case: Case) -> None:
        actual = case.run(functional.embedding_cross_entropy, case.weight.dtype)
        eager = case.run(reference.embedding_cross_entropy, case.weight.dtype)
        torch.testing.assert_close(actual, eager, equal_nan=True, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("occurs", [False, True])
    @pytest.mark.parametrize(
        "options",
        [{}, {"z_loss": 0.1}, {"sparse": True}, {"padding_idx": 2}, {"ignore_index": 1}, {"label_smoothing": 0.1}],
        ids=str,
    )
    def test_a_class_weight(
        self, vocab_size: int, num_pairs: int, reduction: str, occurs: bool, options: dict[str, Any]
    ) -> None:
        for value in (*self.VALUES, 0.0, -1.0):
            class_weight = torch.rand(vocab_size)
            class_weight[3] = value
            case = make_case(vocab_size, num_pairs, reduction=reduction, class_weight=class_weight, **options)
            if not occurs:
                case.targets[case.targets == 3] = 4
            self.check(case)

    @pytest.mark.parametrize("largest", [3, 5])
    @pytest.mark.parametrize("logit", [60.0, 1e4])
    @pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1}], ids=str)
    def test_a_class_weight_where_one_logit_exceeds_all(
        self, vocab_size: int, num_pairs: int, reduction: str, largest: int, logit: float, options: dict[str, Any]
    ) -> None:
        """The logarithm of the sum of the exponentials is 0 then."""
        for value in (*self.VALUES, 0.0, -1.0):
            class_weight = torch.rand(vocab_size)
            class_weight[3] = value
            case = make_case(vocab_size, num_pairs, reduction=reduction, class_weight=class_weight, **options)
            case.weight[:, largest] = logit
            self.check(case)

    @pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1}], ids=str)
    def test_class_weights_of_zero(
        self, vocab_size: int, num_pairs: int, reduction: str, options: dict[str, Any]
    ) -> None:
        class_weight = torch.zeros(vocab_size)
        class_weight[3] = 1.0
        case = make_case(vocab_size, num_pairs, reduction=reduction, class_weight=class_weight, **options)
        case.targets[case.targets == 3] = 4
        self.check(case)

    def test_the_class_weight_of_ignored_pairs(self, vocab_size: int, num_pairs: int, reduction: str) -> None:
        for value in self.VALUES:
            class_weight = torch.rand(vocab_size)
            class_weight[3] = value
            case = make_case(vocab_size, num_pairs, reduction=reduction, class_weight=class_weight, ignore_index=3)
            case.targets[::4] = 3
            self.check(case)

    @pytest.mark.parametrize(
        "options",
        [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"padding_idx": 3}],
        ids=str,
    )
    def test_a_logit(self, vocab_size: int, num_pairs: int, reduction: str, options: dict[str, Any]) -> None:
        """In a row that occurs, in one that does not, in the padding row, at targets and elsewhere."""
        for value in self.VALUES:
            case = make_case(vocab_size, num_pairs, reduction=reduction, **options)
            case.weight[3, 5] = value
            case.weight[4] = value
            case.idx[case.idx == 4] = 5
            case.idx[:2], case.targets[:2] = 3, torch.tensor([5, 6])
            self.check(case)


# The pairs are counted, or listed.
@pytest.mark.parametrize(("vocab_size", "num_pairs"), [(1, 100), (7, 40), (130, 40)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestSizesOfClassWeights:
    """Sums of class weights that overflow, or underflow, in the dtype of the loss: float64 says what is right."""

    @pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "sparse": True}, {"label_smoothing": 0.1}], ids=str)
    def test_of_a_class(
        self, vocab_size: int, num_pairs: int, reduction: str, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        for value, other in ((3e38, 1.0), (3e38, 3e38), (1e-45, 1e-45), (1e-38, 1.0), (2e-39, 1e-40), (3e38, 1e-45)):
            class_weight = torch.full((vocab_size,), other)
            class_weight[vocab_size // 2] = value
            case = make_case(
                vocab_size, num_pairs, dtype, reduction=reduction, class_weight=class_weight.to(dtype), **options
            )
            for actual, exact in zip(
                case.run(functional.embedding_cross_entropy, dtype),
                case.run(reference.embedding_cross_entropy, torch.float64),
                strict=True,
            ):
                expected = exact.to(dtype)
                assert torch.equal(actual.isfinite(), expected.isfinite())
                largest = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
                if vocab_size == 1:  # where terms of this size cancel
                    largest = num_pairs * max(value, 1.0)
                tolerance = 1e-4 if dtype == torch.float32 else 0.02
                torch.testing.assert_close(
                    actual.double(), expected.double(), rtol=tolerance, atol=tolerance * largest + 1e-44, equal_nan=True
                )


@pytest.mark.cpu_only
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", [{}, {"class_weight": [0.2, 0.9, 0.7], "label_smoothing": 1.0}], ids=str)
def test_gradients_of_a_row_whose_sum_float32_does_not_hold(reduction: str, options: dict[str, Any]) -> None:
    idx, targets = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 2] * 2)
    weight, gradients = torch.tensor([[0.0, 0.1, 0.2]]), []
    for dtype, function in ((torch.float32, functional), (torch.float64, reference)):
        leaf = weight.to(dtype).requires_grad_()
        given = {
            name: torch.tensor(value, dtype=dtype) if name == "class_weight" else value
            for name, value in options.items()
        }
        loss = function.embedding_cross_entropy(idx, leaf, targets, reduction=reduction, **given)
        (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3e38))
        gradients.append(gradient.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e32)


@pytest.mark.cpu_only
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "sparse": True}, {"label_smoothing": 0.1}], ids=str)
def test_sums_of_class_weights_beyond_float64_are_those_of_eager(reduction: str, options: dict[str, Any]) -> None:
    for value, other in ((1.7e308, 1.0), (1.7e308, 1.7e308), (5e-324, 5e-324), (1e-320, 1e-310), (1.7e308, 5e-324)):
        for vocab_size in (1, 7):
            class_weight = torch.full((vocab_size,), other, dtype=torch.float64)
            class_weight[vocab_size // 2] = value
            case = make_case(vocab_size, 40, torch.float64, reduction=reduction, class_weight=class_weight, **options)
            actual = case.run(functional.embedding_cross_entropy, torch.float64)
            eager = case.run(reference.embedding_cross_entropy, torch.float64)
            torch.testing.assert_close(actual, eager, rtol=1e-12, atol=0, equal_nan=True)


class TestLogits:
    """The loss lies behind the logits in the graph, for those who look."""

    Look = Callable[[Tensor, Tensor, Tensor], list[Tensor | None]]

    @staticmethod
    def retain_grad(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        logits.retain_grad()
        (loss + logits.square().mean()).backward()
        return [logits.grad, weight.grad]

    @staticmethod
    def hook(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        seen: list[Tensor | None] = []
        logits.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2 + 1)  # type: ignore[func-returns-value]
        loss.backward()
        return [*seen, weight.grad]

    @staticmethod
    def hook_on_the_node(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        seen: list[Tensor | None] = []
        assert logits.grad_fn is not None
        logits.grad_fn.register_prehook(lambda grads: seen.extend(grads))
        logits.grad_fn.register_hook(lambda grads, _outputs: seen.extend(grads))
        loss.backward()
        return [*seen, weight.grad]

    @staticmethod
    def hook_on_several(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        seen: list[Tensor | None] = []
        torch.autograd.graph.register_multi_grad_hook((logits, weight), lambda grads: seen.extend(grads))
        loss.backward()
        return [*seen, weight.grad]

    @staticmethod
    def gradient_of_logits(_weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss * 3, logits))

    @staticmethod
    def gradient_of_both(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        first = torch.autograd.grad(loss, (weight, logits), retain_graph=True)
        return [*first, *torch.autograd.grad(loss, (logits, weight))]

    @staticmethod
    def second_gradient_of_logits(_weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        return [grad, *torch.autograd.grad(grad.square().sum(), logits)]

    @staticmethod
    def second_loss_of_logits(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        (loss + (logits.softmax(-1) * logits).sum()).backward()
        return [weight.grad]

    @staticmethod
    def changed_afterwards(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        logits[:, 0] = -1e9
        logits.mul_(2)
        (loss + logits[:, 1:].mean()).backward()
        return [weight.grad]

    @staticmethod
    def changed_after_a_hook(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        logits.register_hook(lambda grad: grad * 2)
        logits[:, 0] = -1e9
        loss.backward()
        return [weight.grad]

    @staticmethod
    def weight_changed_before_a_look(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        logits.retain_grad()
        with torch.no_grad():
            weight.zero_()
        loss.backward(retain_graph=True)
        first = logits.grad
        logits.grad = None
        return [first, weight.grad, *torch.autograd.grad(loss, logits)]

    @staticmethod
    def second_gradient_after_a_change(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        logits.mul_(2)
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        return [grad, *torch.autograd.grad(grad.square().sum(), weight)]

    @staticmethod
    def detached_afterwards(weight: Tensor, loss: Tensor, logits: Tensor) -> list[Tensor | None]:
        logits.detach_()
        loss.backward()
        return [weight.grad]

    LOOKS = (
        retain_grad,
        hook,
        hook_on_the_node,
        hook_on_several,
        gradient_of_logits,
        gradient_of_both,
        second_gradient_of_logits,
        second_loss_of_logits,
        changed_afterwards,
        changed_after_a_hook,
        weight_changed_before_a_look,
        second_gradient_after_a_change,
        detached_afterwards,
    )

    @pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1, "padding_idx": 3}])
    @pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
    def test_equals_reference(self, look: Look, options: dict[str, Any]) -> None:
        case = make_case(65, 32, **options)
        results = []
        for module in (functional, reference):
            weight = case.weight.clone().requires_grad_()
            loss, logits = module.embedding_cross_entropy_with_logits(case.idx, weight, case.targets, **options)
            results.append(look(weight, loss, logits))
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("looks", [False, True])
    def test_their_gradient_is_computed_only_for_those_who_look(self, looks: bool) -> None:
        case = make_case(65, 32)
        loss, logits = functional.embedding_cross_entropy_with_logits(
            case.idx, case.weight.requires_grad_(), case.targets
        )
        if looks:
            logits.retain_grad()
        with OpNames() as ops:
            loss.backward()
        assert any("embedding" in name for name in ops.names) == looks


class TestPlainPath:
    """Where the kernels do not apply, PyTorch's own ops give what they give."""

    TRANSFORMS: tuple[Callable[[Callable[[Tensor], Tensor], Tensor], Any], ...] = (
        lambda loss, weight: torch.func.grad(loss)(weight),
        lambda loss, weight: torch.func.grad_and_value(loss)(weight),
        lambda loss, weight: torch.func.vjp(loss, weight)[1](torch.tensor(2.0)),
        lambda loss, weight: torch.func.jvp(loss, (weight,), (weight.cos(),)),
        lambda loss, weight: torch.func.linearize(loss, weight)[1](weight.cos()),
        lambda loss, weight: torch.func.jacrev(loss)(weight),
        lambda loss, weight: torch.func.jacfwd(loss)(weight),
        lambda loss, weight: torch.func.hessian(loss)(weight),
        lambda loss, weight: torch.func.vmap(loss)(torch.stack((weight, 2 * weight))),
        lambda loss, weight: torch.func.vmap(torch.func.grad(loss))(torch.stack((weight, 2 * weight))),
        lambda loss, weight: torch.func.grad(lambda weights: torch.func.vmap(loss)(weights).sum())(
            weight.expand(2, 5, 5)
        ),
        lambda loss, weight: torch.func.functionalize(torch.func.grad(loss))(weight),
        lambda loss, weight: torch.autograd.functional.hvp(loss, weight, weight.cos()),
    )

    @pytest.mark.filterwarnings("ignore")  # of torch about itself
    @pytest.mark.parametrize("transform", range(len(TRANSFORMS)))
    def test_transforms(self, transform: int) -> None:
        case = make_case(5, 7)
        results = [
            self.TRANSFORMS[transform](
                lambda weight: module.embedding_cross_entropy(case.idx, weight, case.targets),  # noqa: B023
                case.weight,
            )
            for module in (functional, reference)
        ]
        torch.testing.assert_close(*results)

    @pytest.mark.filterwarnings("ignore")  # of torch about itself
    def test_gradients_of_samples(self) -> None:
        idx, targets, weight = torch.randint(5, (6, 3)), torch.randint(5, (6, 3)), torch.randn(5, 5)
        results = [
            torch.func.vmap(torch.func.grad(module.embedding_cross_entropy, argnums=1), in_dims=(0, None, 0))(
                idx, weight, targets
            )
            for module in (functional, reference)
        ]
        torch.testing.assert_close(*results)

    def test_forward_mode(self) -> None:
        case, results = make_case(5, 7), []
        for module in (functional, reference):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(case.weight, case.weight.cos())
                loss = module.embedding_cross_entropy(case.idx, dual, case.targets)
                results.append(torch.autograd.forward_ad.unpack_dual(loss).tangent)
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"reduction": "none", "z_loss": 0.1},
            {"reduction": "sum", "label_smoothing": 0.1, "class_weight": torch.tensor([1.0, 0.0, 2.0, 3.0, 0.5])},
            {"z_loss": 0.1, "padding_idx": 2},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(7,), (2, 3), (0,), ()], ids=str)
    def test_soft_targets(self, dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, ...]) -> None:
        options = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in options.items()}
        options = {name: on_device(value) for name, value in options.items()}
        idx, targets = torch.randint(5, shape), torch.randn(*shape, 5).softmax(-1).to(dtype)
        results = []
        for function in (functional.embedding_cross_entropy, self.cross_entropy_of_probabilities):
            weight = torch.linspace(-2, 2, 25).view(5, 5).to(dtype).requires_grad_()
            loss = function(idx, weight, targets, **options)
            loss.sum().backward()
            results.append((loss, weight.grad))
        torch.testing.assert_close(*results, equal_nan=True)

    @staticmethod
    def cross_entropy_of_probabilities(
        idx: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float = 0.0,
        padding_idx: int | None = None,
        **options: Any,
    ) -> Tensor:
        logits = F.embedding(idx.flatten(), weight, padding_idx)
        losses = F.cross_entropy(logits, targets.view(logits.shape), options.pop("class_weight", None), **options)
        penalties = z_loss * logits.logsumexp(-1) ** 2
        if options.get("reduction") == "none":
            return (losses + penalties).view(idx.shape)
        return losses + penalties.mean() if z_loss > 0 else losses

    def test_soft_targets_that_pytorch_refuses(self) -> None:
        weight, idx = torch.randn(5, 5), torch.tensor([0, 1])
        with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
            functional.embedding_cross_entropy(idx, weight, torch.rand(2, 5), ignore_index=1)
        with pytest.raises(ValueError, match=r"targets to have the shape of idx, \[2, 5\], got \[2, 4\]"):
            functional.embedding_cross_entropy(idx, weight, torch.rand(2, 4))


class TestAutocast:
    """F.cross_entropy's rule: float32, but for float64."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("class_weight_dtype", [None, torch.float32, torch.bfloat16])
    def test_equals_eager(
        self, dtype: torch.dtype, reduction: Reduction, class_weight_dtype: torch.dtype | None
    ) -> None:
        case = make_case(65, 100, dtype, reduction=reduction)
        if class_weight_dtype is not None:
            class_weight = torch.rand(65).to(torch.float64 if dtype == torch.float64 else class_weight_dtype)
            case.options["class_weight"] = class_weight
        results = []
        for module in (functional, reference):
            weight = case.weight.clone().requires_grad_()
            with torch.autocast(weight.device.type, dtype=torch.bfloat16):
                loss = module.embedding_cross_entropy(case.idx, weight, case.targets, **case.options)
            loss.sum().backward()
            assert weight.grad is not None
            results.append((loss.detach(), weight.grad))
        (loss, grad), (eager, eager_grad) = results
        assert loss.dtype == eager.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss, eager)
        assert grad.dtype == dtype
        # Eager adds up the gradients of a row's pairs in 16 bits.
        torch.testing.assert_close(
            grad, eager_grad, atol=16 * torch.finfo(dtype).eps * float(eager_grad.abs().max()), rtol=0
        )

    def test_disabled_inside(self) -> None:
        case = make_case(5, 4, torch.bfloat16)
        device = case.weight.device.type
        with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
            assert functional.embedding_cross_entropy(case.idx, case.weight, case.targets).dtype == torch.bfloat16

    def test_double_class_weight_raises_as_in_eager(self) -> None:
        case = make_case(5, 4, class_weight=torch.rand(5).double())
        for module in (functional, reference):
            with torch.autocast(case.weight.device.type, dtype=torch.bfloat16), pytest.raises(RuntimeError):
                module.embedding_cross_entropy(case.idx, case.weight, case.targets, **case.options)

    def test_loss_scale_keeps_small_float16_gradients(self) -> None:
        """A gradient of the loss that float16 cannot hold."""
        case = make_case(5, 4, torch.float16)
        grads = []
        for module in (functional, reference):
            weight = case.weight.clone().requires_grad_()
            with torch.autocast(weight.device.type, dtype=torch.bfloat16):
                loss = module.embedding_cross_entropy(case.idx, weight, case.targets)
            (loss * 2.0**17 * 0.25).backward()
            grads.append(weight.grad)
        torch.testing.assert_close(*grads, rtol=1e-2, atol=64)


def test_the_exponential_is_accurate_down_to_subnormals() -> None:
    """Two classes with the logits 0 and x: the second gets the gradient e^x / (1 + e^x)."""
    skip_if_long(100_000 * 32)
    x = torch.cat((-torch.rand(100_000) * 103.9, torch.tensor([0.0, -87.33, -87.34, -103.0, -104.1, -1e30])))
    weight = torch.stack((torch.zeros_like(x), x), dim=1).requires_grad_()
    idx = torch.arange(len(x))
    functional.embedding_cross_entropy(idx, weight, torch.zeros_like(idx), reduction="sum").backward()
    assert weight.grad is not None
    exact = x.double().sigmoid()
    # 2 ulp for the exponential, and one rounding each for the sum, its reciprocal and the product.
    float32 = torch.finfo(torch.float32)
    allowed = 4 * float32.eps * exact + 2 * float32.smallest_normal * float32.eps
    assert ((weight.grad[:, 1].double() - exact).abs() <= allowed).all()


class TestAutograd:
    """The gradient that the forward pass wrote is handed over once and never changed after that."""

    def test_hands_over_without_copy_and_accumulates(self) -> None:
        case = make_case(65, 256)
        weight = case.weight.requires_grad_()
        functional.embedding_cross_entropy(case.idx, weight, case.targets).backward()
        assert weight.grad is not None
        once = weight.grad.clone()
        functional.embedding_cross_entropy(case.idx, weight, case.targets).backward()
        torch.testing.assert_close(weight.grad, 2 * once, rtol=0, atol=0)

    def test_second_backward(self) -> None:
        case = make_case(65, 256)
        weight = case.weight.requires_grad_()
        loss = functional.embedding_cross_entropy(case.idx, weight, case.targets)
        (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
        kept = first.clone()
        (scaled,) = torch.autograd.grad(3 * loss, weight, retain_graph=True)
        (again,) = torch.autograd.grad(loss, weight)
        assert torch.equal(first, kept)
        assert torch.equal(again, kept)
        torch.testing.assert_close(scaled, 3 * kept)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, weight)

    def test_scaled_first(self) -> None:
        case = make_case(65, 256)
        weight = case.weight.requires_grad_()
        loss = functional.embedding_cross_entropy(case.idx, weight, case.targets)
        (scaled,) = torch.autograd.grad(0.5 * loss, weight, retain_graph=True)
        kept = scaled.clone()
        (plain,) = torch.autograd.grad(loss, weight)
        assert torch.equal(scaled, kept)
        torch.testing.assert_close(plain, 2 * kept)

    def test_weight_changed_before_backward(self) -> None:
        """As in eager, whose softmax keeps its own output."""
        case = make_case(65, 256)
        weight = case.weight.requires_grad_()
        (expected,) = torch.autograd.grad(reference.embedding_cross_entropy(case.idx, weight, case.targets), weight)
        loss = functional.embedding_cross_entropy(case.idx, weight, case.targets)
        with torch.no_grad():
            weight.zero_()
        loss.backward()
        torch.testing.assert_close(weight.grad, expected)

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("change", [lambda weight: weight.data.zero_(), lambda weight: weight.zero_()])
    def test_weight_changed_between_two_backward_passes(self, change: Callable[[Tensor], Tensor], sparse: bool) -> None:
        """One way does not count as a change for autograd, nor does a step of torch's fused AdamW."""
        case = make_case(65, 256, sparse=sparse)
        results = []
        for module in (functional, reference):
            weight = case.weight.clone().requires_grad_()
            loss = module.embedding_cross_entropy(case.idx, weight, case.targets, **case.options)
            (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
            with torch.no_grad():
                change(weight)
                first.to_dense().zero_()
            (second,) = torch.autograd.grad(3 * loss, weight, retain_graph=True)
            (third,) = torch.autograd.grad(loss, weight)
            results.append((second.to_dense(), third.to_dense()))
        torch.testing.assert_close(*results)

    def test_weight_of_inference_mode(self) -> None:
        case = make_case(65, 32)
        with torch.inference_mode():
            weight = torch.nn.Parameter(case.weight.clone())
        loss = functional.embedding_cross_entropy(case.idx, weight, case.targets)
        torch.testing.assert_close(loss, reference.embedding_cross_entropy(case.idx, case.weight, case.targets))

    def test_loss_scale_keeps_small_float16_gradients(self) -> None:
        case = make_case(65, 4096, torch.float16)
        case.weight[0, 1] = -12.0  # its gradient underflows in float16 unless it is scaled
        case.check(grad_loss=2.0**14)

    @pytest.mark.parametrize("scale", [float("inf"), float("nan")])
    def test_an_infinite_gradient_stays_in_the_rows_that_occur(self, scale: float) -> None:
        idx = torch.tensor([0, 1])
        weight = torch.randn(5, 5, requires_grad=True)
        (grad,) = torch.autograd.grad(functional.embedding_cross_entropy(idx, weight, idx) * scale, weight)
        assert not grad[2:].any()
        assert not grad[:2].isfinite().any()

    def test_backward_through_the_logits_frees_the_graph(self) -> None:
        case = make_case(5, 4)
        loss, logits = functional.embedding_cross_entropy_with_logits(
            case.idx, case.weight.requires_grad_(), case.targets
        )
        logits.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    def test_logits_are_differentiable(self) -> None:
        case = make_case(65, 256)
        weights = [case.weight.clone().requires_grad_() for _ in range(2)]
        for weight, function in zip(weights, (functional, reference), strict=True):
            loss, logits = function.embedding_cross_entropy_with_logits(case.idx, weight, case.targets)
            assert logits.shape == (256, 65)
            (loss + logits.square().mean()).backward()
        torch.testing.assert_close(weights[0].grad, weights[1].grad)

    @pytest.mark.parametrize("with_logits", [False, True])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_second_derivatives(self, reduction: Reduction, with_logits: bool) -> None:
        case = make_case(5, 4, reduction=reduction, label_smoothing=0.1, z_loss=0.1, class_weight=torch.rand(5))
        results = []
        for module in (functional, reference):
            weight, scale = case.weight.clone().requires_grad_(), torch.tensor(3.0, requires_grad=True)
            function = module.embedding_cross_entropy_with_logits if with_logits else module.embedding_cross_entropy
            output = function(case.idx, weight, case.targets, **case.options)
            loss = scale * (output[0] if with_logits else output)
            (grad,) = torch.autograd.grad(loss.sum(), weight, create_graph=True)
            results.append((grad, *torch.autograd.grad(grad.square().sum(), (weight, scale))))
        torch.testing.assert_close(*results)

    def test_no_grad(self) -> None:
        case = make_case(5, 4)
        with torch.no_grad():
            assert not functional.embedding_cross_entropy(
                case.idx, case.weight.requires_grad_(), case.targets
            ).requires_grad

    def test_sparse_gradient_has_the_rows_that_nn_embedding_gives(self) -> None:
        idx, targets = torch.tensor([4, 2, 4, 0, 3]), torch.tensor([1, 1, 0, 2, -100])
        weight = torch.randn(6, 6, requires_grad=True)
        loss = functional.embedding_cross_entropy(idx, weight, targets, sparse=True, padding_idx=2)
        (grad,) = torch.autograd.grad(loss, weight)
        eager = weight.detach().clone().requires_grad_()
        F.cross_entropy(F.embedding(idx, eager, padding_idx=2, sparse=True), targets).backward()
        assert eager.grad is not None
        assert grad.is_sparse
        assert grad.is_coalesced() != runs_on_gpu()
        grad = grad.coalesce()
        expected = eager.grad.coalesce()
        assert torch.equal(grad.indices(), expected.indices())
        torch.testing.assert_close(grad.values(), expected.values())

    def test_sparse_gradients_accumulate(self) -> None:
        case = make_case(65, 9)
        weight = case.weight.requires_grad_()
        for _ in range(2):
            functional.embedding_cross_entropy(case.idx, weight, case.targets, sparse=True).backward()
        (dense,) = torch.autograd.grad(functional.embedding_cross_entropy(case.idx, weight, case.targets), weight)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.to_dense(), 2 * dense)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("vocab_size", "num_pairs"), [(65, 4096), (65, 200_000), (500, 70_000), (1000, 100_001)])
def test_same_bits_in_each_run_and_for_any_number_of_threads(
    vocab_size: int, num_pairs: int, reduction: str, two_threads: None
) -> None:
    skip_if_long(3 * (num_pairs + vocab_size**2))
    case = make_case(vocab_size, num_pairs, reduction=reduction, label_smoothing=0.1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(case.run(functional.embedding_cross_entropy, torch.float32))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        if reduction != "none" or not runs_on_gpu():
            assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("num_classes", [40_003, 120_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_longer_than_a_tile(num_classes: int, dtype: torch.dtype) -> None:
    """Tiles of the shared memory of a GPU: beside the row, and where the row itself does not fit."""
    weight = torch.randn(2, num_classes).to(dtype)
    targets = torch.tensor([0, num_classes - 1, 30_001, 5, 5])
    Case(torch.tensor([0, 0, 0, 1, 0]), weight, targets, {"label_smoothing": 0.1}).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 1}, {"sparse": True}, {"class_weight": torch.rand(1501)}], ids=name_of
)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_long_rows_with_few_and_many_pairs(dtype: torch.dtype, options: dict[str, Any], scale: float) -> None:
    """A GPU puts in the targets of few pairs after the gradient of the row; of a large maximum, it does not."""
    num_classes = 1501
    weight = (torch.randn(5, num_classes) * scale).to(dtype)
    idx = torch.arange(5).repeat_interleave(torch.tensor([64, 65, 1, 0, 7]))
    targets = torch.randint(num_classes, idx.shape)
    targets[:20] = 3  # one target of many pairs
    targets[130:] = targets[130]
    options = {name: on_device(value) for name, value in options.items()}
    Case(idx, weight, targets, options).check()


@pytest.mark.parametrize("value", [*TestInfinities.VALUES, 0.0])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("num_classes", [1501, 120_001])
def test_class_weights_of_long_rows(num_classes: int, options: dict[str, Any], value: float) -> None:
    """Of targets in each tile of a GPU's shared memory."""
    last = num_classes - 1
    class_weight = torch.rand(num_classes)
    class_weight[7] = class_weight[last] = value
    for target in (0, last):  # the last class does not occur, or does
        idx, targets = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([7, 8, target, last - 1, 9])
        weight = torch.randn(3, num_classes)
        TestInfinities.check(Case(idx, weight, targets, {**options, "class_weight": class_weight}))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"sparse": True}, {"label_smoothing": 0.1}], ids=str)
def test_more_long_rows_than_blocks(options: dict[str, Any]) -> None:
    """The blocks of a GPU take one row after another, some of them without pairs."""
    num_rows, num_classes = fewer(1000), 1501
    idx, targets = torch.randint(num_rows, (2 * num_rows,)), torch.randint(num_classes, (2 * num_rows,))
    Case(idx, torch.randn(num_rows, num_classes), targets, options).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_classes", "num_pairs"), [(65, 65, 256), (9, 128, 40), (65, 65, 600), (5, 3, 0)]
)
def test_logits_are_rows(num_rows: int, num_classes: int, num_pairs: int, dtype: torch.dtype) -> None:
    """A GPU copies few logits in the kernel of the loss; of a table whose rows may lie apart."""
    weight = torch.randn(num_rows, num_classes + 1).to(dtype)[:, :num_classes]
    idx, targets = torch.randint(num_rows, (num_pairs,)), torch.randint(num_classes, (num_pairs,))
    loss, logits = functional.embedding_cross_entropy_with_logits(idx, weight, targets)
    assert torch.equal(logits, weight[idx])
    assert loss.isfinite() or num_pairs == 0


# A GPU groups up to 2^13 pairs in one block, if its shared memory holds counters for all rows. Others are grouped by
# several blocks, which count in shared memory, or, where there are more rows than a block has pairs, in global.
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"class_weight": torch.rand(40)}, {"sparse": True}], ids=name_of
)
@pytest.mark.parametrize(
    ("num_rows", "num_pairs"),
    [(700, 1), (700, 1100), (9000, 2**13), (2000, 2**13 + 1), (9000, 2**13 + 1), (30_000, 100)],
)
def test_groups_of_pairs(num_rows: int, num_pairs: int, options: dict[str, Any]) -> None:
    idx = torch.randint(num_rows, (num_pairs,))
    idx[::3] = 5
    targets = torch.randint(40, (num_pairs,))
    targets[1::7] = -100
    options = {name: on_device(value) for name, value in options.items()}
    Case(idx, torch.randn(num_rows, 40), targets, options).check()


@pytest.mark.skipif(not IN_SIMT, reason="needs the emulator, which counts")
@pytest.mark.parametrize(("num_pairs", "nodes"), [(2**13, 2), (2**13 + 1, 4)])
def test_nodes_of_a_graph(num_pairs: int, nodes: int) -> None:
    """The pairs are grouped, in one launch or in a memset and two; then come the rows."""
    idx, targets = torch.randint(300, (num_pairs,)), torch.randint(300, (num_pairs,))
    weight = torch.randn(300, 300, requires_grad=True)
    assert graph_nodes(lambda: functional.embedding_cross_entropy(idx, weight, targets))[0] == nodes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [200, 1501])  # a warp a row, a block a row
@pytest.mark.parametrize("num_pairs", [0, 10, 11])
def test_few_rows_occur(num_pairs: int, num_classes: int, dtype: torch.dtype) -> None:
    """A GPU clears the gradient at once where there are 16 rows for each pair; memory holds anything before."""
    weight = torch.randn(160, num_classes).to(dtype)
    targets = torch.randint(num_classes, (num_pairs,))
    case = Case(torch.randint(160, (num_pairs,)), weight, targets, {"reduction": "sum", "padding_idx": 3})
    case.idx[1:2] = 3
    case.targets[2:3] = -100
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        case.check()
        case.check(grad_loss=-2.5)
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_with_tables_of_several_widths() -> None:
    """On a GPU one kernel then runs with as many sizes of shared memory."""
    idx, targets = torch.arange(2), torch.arange(2)
    weights = [torch.randn(3, width) for width in (9000, 6600, 11_000)]
    expected = [F.cross_entropy(weight[idx], targets) for weight in weights]

    def run(k: int) -> Tensor:
        return functional.embedding_cross_entropy(idx, weights[k % 3], targets)

    with ThreadPoolExecutor(6) as pool:
        losses = list(pool.map(run, range(60)))
    for k, loss in enumerate(losses):
        torch.testing.assert_close(loss, expected[k % 3])


# Grouped in several chunks, and of a row counted or listed.
MANY_PAIRS = pytest.mark.parametrize(("vocab_size", "num_pairs"), [(65, 65_536), (65, 100_001), (1000, 100_001)])


@MANY_PAIRS
def test_many_pairs(vocab_size: int, num_pairs: int, two_threads: None) -> None:
    skip_if_long(num_pairs + vocab_size**2)
    make_case(vocab_size, num_pairs, reduction="mean", ignore_index=3).check(1.0)


@pytest.mark.device_assertion
@MANY_PAIRS
def test_one_of_many_pairs_out_of_range(vocab_size: int, num_pairs: int, two_threads: None) -> None:
    skip_if_long(6 * (num_pairs + vocab_size**2))
    case = make_case(vocab_size, num_pairs)
    for position in (0, num_pairs // 2, num_pairs - 1):
        for name, message in (("idx", "idx holds"), ("targets", "Target")):
            pairs = {"idx": case.idx.clone(), "targets": case.targets.clone()}
            pairs[name][position] = vocab_size
            message = rf"{message} {vocab_size} .*at position {position},"
            with raises_in_kernel("embedding_cross_entropy", IndexError, message):
                functional.embedding_cross_entropy(pairs["idx"], case.weight, pairs["targets"])


@pytest.mark.parametrize("first", [-100.0, -5.0, 0.0, float("-inf")])
@pytest.mark.parametrize("last", [0.0, 3.0, 100.0, float("inf"), float("nan")])
def test_long_rows_whose_largest_logit_comes_late(first: float, last: float) -> None:
    weight = torch.randn(3, 3000)
    weight[1, :2500] = first
    weight[1, 2999] = last
    idx, targets = torch.tensor([0, 1, 1, 2]), torch.tensor([5, 2999, 2600, 2999])
    Case(idx, weight, targets, {"reduction": "sum"}).check()


@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.float32, 2800), (torch.bfloat16, 5600), (torch.float64, 1400)])
@pytest.mark.parametrize("num_classes", [3001, 3008])  # rows that are not aligned to vectors, and rows that are
def test_gradients_larger_than_the_caches(dtype: torch.dtype, num_rows: int, num_classes: int) -> None:
    skip_if_long(num_rows * num_classes)
    idx, targets = torch.randint(num_rows, (1000,)), torch.randint(num_classes, (1000,))
    weight = torch.randn(num_rows, num_classes).to(dtype).requires_grad_()
    assert weight.nbytes > 2**25
    gradients = []
    for tokens, rows in ((idx, weight), (torch.arange(1000), weight.detach()[idx].requires_grad_())):
        functional.embedding_cross_entropy(tokens, rows, targets, reduction="sum").backward()
        assert rows.grad is not None
        gradients.append(rows.grad)
    large = torch.zeros(num_rows, num_classes).index_add_(0, idx, gradients[1].float())
    torch.testing.assert_close(gradients[0].float(), large, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("num_classes", [5, 1500])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_offsets_beyond_32_bits(reduction: str, num_classes: int, device: torch.device) -> None:
    """Two rows; the memory between them is never accessed."""
    stride = 2**31 + 3
    weight = torch.empty(stride + num_classes, dtype=torch.bfloat16).as_strided((2, num_classes), (stride, 1))
    weight.copy_(torch.randn(2, num_classes))
    idx, targets = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 4, 2, 0])
    near, far = weight.clone().requires_grad_(), weight.requires_grad_()
    for table in (near, far):
        functional.embedding_cross_entropy(idx, table, targets, reduction=reduction).sum().backward()  # type: ignore[arg-type]
    assert near.grad is not None
    assert far.grad is not None
    torch.testing.assert_close(far.grad, near.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_rows", [1, 5, 2**31, 2**62])
@pytest.mark.parametrize("num_classes", [0, 1, 3])
def test_tables_larger_than_their_memory(num_rows: int, num_classes: int, reduction: Reduction) -> None:
    """Of equal rows that are one row in memory, or without columns."""
    if num_rows * num_classes >= 2**63:
        num_rows //= 4
    weight = torch.randn(1, num_classes).expand(num_rows, num_classes)
    idx = torch.tensor([0, num_rows - 1, num_rows // 2])
    targets = torch.full((3,), num_classes - 1 if num_classes else -100)
    for function in ("embedding_cross_entropy", "embedding_cross_entropy_with_logits"):
        actual, expected = (
            getattr(module, function)(idx, weight, targets, reduction=reduction) for module in (functional, reference)
        )
        torch.testing.assert_close(actual, expected, equal_nan=True)
    if num_rows < 10:
        tables = [weight.clone().requires_grad_() for _ in range(2)]
        for table, module in zip(tables, (functional, reference), strict=True):
            expanded = table[:1].expand(num_rows, num_classes)
            module.embedding_cross_entropy(idx, expanded, targets, reduction=reduction).sum().backward()
        torch.testing.assert_close(tables[0].grad, tables[1].grad)


@pytest.mark.parametrize("num_rows", [2**61, 2**62])
@pytest.mark.parametrize("num_classes", [0, 1])
def test_kernels_of_tables_larger_than_their_memory(num_rows: int, num_classes: int) -> None:
    """Asked for directly, they raise an error, of the memory that each row would take."""
    weight = torch.zeros(1, num_classes).expand(num_rows, num_classes)
    idx, targets = torch.tensor([0]), torch.tensor([-100])
    forward = torch.ops.bigramx.embedding_cross_entropy_forward
    for compute_grad in (False, True):
        with pytest.raises(RuntimeError):
            forward(idx, weight, targets, compute_grad=compute_grad)
    with pytest.raises(RuntimeError):
        torch.ops.bigramx.embedding_cross_entropy_backward(torch.ones(()), idx, weight, targets)


def test_the_stride_of_a_single_row_means_nothing() -> None:
    weight = torch.randn(1, 5)
    far = weight.as_strided((1, 5), (2**62, 1)).requires_grad_()
    idx, targets = torch.tensor([0, 0]), torch.tensor([3, 1])
    actual = functional.embedding_cross_entropy_with_logits(idx, far, targets)
    torch.testing.assert_close(actual, reference.embedding_cross_entropy_with_logits(idx, weight, targets))


IDX, TARGETS, WEIGHT = torch.tensor([0, 1]), torch.tensor([1, 2]), torch.randn(5, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"idx": torch.tensor([0.0, 1.0])}, RuntimeError, r"expected idx to have one of the dtypes .*, got Float"),
        ({"idx": torch.tensor([True, False])}, RuntimeError, r"expected idx to have one of the dtypes"),
        ({"targets": torch.tensor([0.0, 1.0])}, RuntimeError, r"expected targets to have one of the dtypes"),
        ({"targets": torch.tensor([0, 1, 2])}, ValueError, r"shape of idx, \[2\], got \[3\]"),
        ({"weight": torch.randn(5)}, RuntimeError, r"'weight' must be 2-D, got shape \[5\]"),
        ({"weight": torch.randn(5, 5, 5)}, RuntimeError, r"'weight' must be 2-D"),
        ({"weight": torch.ones(5, 5, dtype=torch.int64)}, NotImplementedError, r"weight of dtype Long"),
        ({"weight": torch.ones(5, 5, dtype=torch.complex64)}, NotImplementedError, r"weight of dtype Complex"),
        ({"class_weight": torch.ones(3)}, RuntimeError, r"all 5 classes or no classes .* shape: \[3\]"),
        ({"class_weight": torch.ones(5).double()}, RuntimeError, r"class_weight .*Float.*got Double"),
        ({"class_weight": torch.ones(5, requires_grad=True)}, RuntimeError, r"not differentiable .* class_weight"),
        ({"reduction": "foo"}, ValueError, r"foo is not a valid value for reduction"),
        ({"label_smoothing": 1.5}, RuntimeError, r"label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
        ({"label_smoothing": float("nan")}, RuntimeError, r"label_smoothing must be between"),
        ({"z_loss": -1.0}, ValueError, r"z_loss must be finite and >= 0, got -1"),
        ({"label_smoothing": float("inf")}, RuntimeError, r"label_smoothing must be between"),
        ({"z_loss": float("inf")}, ValueError, r"z_loss must be finite and >= 0, got inf"),
        ({"z_loss": float("nan")}, ValueError, r"z_loss must be finite and >= 0, got nan"),
        ({"ignore_index": 2**63}, (TypeError, RuntimeError), r"ignore_index|int"),
        ({"padding_idx": 5}, AssertionError, r"Padding_idx must be within num_embeddings.*got 5"),
        ({"padding_idx": -6}, AssertionError, r"Padding_idx must be within num_embeddings"),
        ({"idx": [0, 1]}, TypeError, r"'Tensor' for argument 'idx'"),
        ({"weight": None}, TypeError, r"expected weight to be a Tensor, got None"),
        ({"ignore_index": 1.5}, TypeError, r"'int' for argument 'ignore_index'"),
        ({"idx": IDX.to("meta")}, RuntimeError, r"same device, got idx on meta and weight on c"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"idx": IDX, "weight": WEIGHT, "targets": TARGETS, **arguments}
    with pytest.raises(error, match=message):
        functional.embedding_cross_entropy(**{name: on_device(value) for name, value in call.items()})


@pytest.mark.device_assertion
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"idx": torch.tensor([0, 5])}, r"idx holds 5 at position 1, expected 0 <= idx < 5"),
        ({"idx": torch.tensor([-1, 0])}, r"idx holds -1 at position 0"),
        ({"targets": torch.tensor([0, 5])}, r"Target 5 is out of bounds: at position 1"),
        ({"targets": torch.tensor([-1, 0])}, r"Target -1 is out of bounds"),
    ],
    ids=str,
)
def test_pairs_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with raises_in_kernel("embedding_cross_entropy", IndexError, message):
        functional.embedding_cross_entropy(**{"idx": IDX, "weight": WEIGHT, "targets": TARGETS, **arguments})


def test_integer_weight_cannot_require_grad() -> None:
    with pytest.raises(RuntimeError, match="can require gradients"):
        functional.embedding_cross_entropy(IDX, torch.ones(5, 5, dtype=torch.int64, requires_grad=True), TARGETS)


# Too many rows for a table of counts: pairs are listed, by chunks of 2**15 and more, eight at a time.
LONG_TABLE = (50_021, 3)
IDX_OF_PAIRS: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda num_rows, num_pairs: torch.randint(num_rows, (num_pairs,)),
    "one row": lambda num_rows, num_pairs: torch.full((num_pairs,), num_rows - 1),
    "descending": lambda num_rows, num_pairs: torch.arange(num_pairs).flip(0) % num_rows,
}


def pairs_of(num_rows: int, num_classes: int, num_pairs: int, rows: str = "random", **options: Any) -> Case:
    """Every third pair is ignored. The sums of float64 logits depend on the order of the pairs of a row."""
    targets = torch.randint(num_classes, (num_pairs,))
    targets[::3] = -100
    weight = torch.randn(num_rows, num_classes, dtype=torch.float64)
    return Case(IDX_OF_PAIRS[rows](num_rows, num_pairs), weight, targets, options)


@pytest.mark.cpu_only
@pytest.mark.parametrize("num_pairs", [1, 7, 8, 9, 65_535, 65_536, 65_537, 98_311])
@pytest.mark.parametrize("rows", IDX_OF_PAIRS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_listed_pairs_at_the_ends_of_chunks(reduction: str, rows: str, num_pairs: int, two_threads: None) -> None:
    case = pairs_of(*LONG_TABLE, num_pairs, rows, reduction=reduction)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(case.run(functional.embedding_cross_entropy, torch.float64))
    torch.testing.assert_close(
        results[0], case.run(reference.embedding_cross_entropy, torch.float64), rtol=1e-9, atol=1e-12, equal_nan=True
    )
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.cpu_only
@pytest.mark.parametrize("num_pairs", [65_535, 65_536, 65_537])
def test_counted_pairs_at_the_ends_of_chunks(num_pairs: int, two_threads: None) -> None:
    case = pairs_of(65, 65, num_pairs)
    actual, expected = (case.run(module.embedding_cross_entropy, torch.float64) for module in (functional, reference))
    torch.testing.assert_close(actual, expected)


@pytest.mark.device_assertion
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("size", [LONG_TABLE, (65, 65)], ids=["listed", "counted"])
def test_the_first_pair_out_of_range_is_named(size: tuple[int, int], reduction: Reduction, two_threads: None) -> None:
    """One alone, at the ends of chunks and of the lines that are read at a time; then with another after it."""
    num_rows, num_classes = size
    skip_if_long(24 * 65_539)
    case = pairs_of(num_rows, num_classes, 65_539)
    for position in (0, 7, 8, 32_768, 32_769, 65_538):
        for name, later, message in (("idx", "targets", "idx holds -1"), ("targets", "idx", "Target -1")):
            pairs: dict[str, Any] = {"idx": case.idx.clone(), "targets": case.targets.clone()}
            pairs[name][position] = -1
            for _ in range(2):
                with raises_in_kernel("embedding_cross_entropy", IndexError, rf"{message} .*at position {position},"):
                    functional.embedding_cross_entropy(weight=case.weight, reduction=reduction, **pairs)
                pairs[later][position + 1 :] = 10**12  # nothing may be read or written there
