"""BigramLanguageModel, which extends the lecture's class."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.utils import prune

from bigramx import (
    BigramCounts,
    BigramLanguageModel,
    CharTokenizer,
    History,
    data,
    functional,
    fusion,
    optimal_loss,
    reference,
)
from bigramx.storage import write_tensors
from tests.devices import on_device, raises_in_kernel

pytestmark = pytest.mark.usefixtures("device")


def pair(vocab_size: int = 65) -> tuple[BigramLanguageModel, reference.BigramLanguageModel]:
    torch.manual_seed(7)
    ours = BigramLanguageModel(vocab_size)
    torch.manual_seed(7)
    return ours, reference.BigramLanguageModel(vocab_size)


def test_same_initial_weights_and_state_dict() -> None:
    ours, lectures = pair()
    assert list(ours.state_dict()) == list(lectures.state_dict()) == ["token_embedding_table.weight"]
    assert torch.equal(ours.token_embedding_table.weight, lectures.token_embedding_table.weight)
    other = BigramLanguageModel(65)
    other.load_state_dict(lectures.state_dict())
    lectures.load_state_dict(BigramLanguageModel(65).state_dict())
    assert torch.equal(other.token_embedding_table.weight, ours.token_embedding_table.weight)


def test_forward_equals_the_lectures() -> None:
    ours, lectures = pair()
    idx, targets = torch.randint(65, (4, 8)), torch.randint(65, (4, 8))
    logits, loss = ours(idx)
    assert loss is None
    assert logits.shape == (4, 8, 65)
    assert torch.equal(logits, lectures(idx)[0])
    logits, loss = ours(idx, targets)
    expected_logits, expected_loss = lectures(idx, targets)
    assert logits.shape == (32, 65)
    assert torch.equal(logits, expected_logits)
    torch.testing.assert_close(loss, expected_loss)
    (loss + logits.mean()).backward()
    (expected_loss + expected_logits.mean()).backward()
    torch.testing.assert_close(ours.token_embedding_table.weight.grad, lectures.token_embedding_table.weight.grad)


def test_without_logits() -> None:
    ours, _lectures = pair()
    idx, targets = torch.randint(65, (4, 8)), torch.randint(65, (4, 8))
    logits, loss = ours(idx, targets, return_logits=False)
    assert logits is None
    assert torch.equal(loss, ours(idx, targets)[1])


def test_sparse_gradient() -> None:
    model = BigramLanguageModel(65, sparse=True)
    idx = torch.randint(65, (4, 8))
    _logits, loss = model(idx, idx)
    loss.backward()
    assert model.token_embedding_table.weight.grad is not None
    assert model.token_embedding_table.weight.grad.is_sparse
    torch.optim.SparseAdam(model.parameters()).step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    model = BigramLanguageModel(65, dtype=dtype, device=torch.get_default_device())
    idx = torch.randint(65, (4, 8))
    logits, loss = model(idx, idx)
    assert logits.dtype == loss.dtype == dtype
    assert model.generate(idx, 3).shape == (4, 11)


@pytest.mark.cpu_only
def test_generate_equals_the_lectures_loop() -> None:
    ours, lectures = pair()
    idx = torch.zeros((1, 1), dtype=torch.long)
    torch.manual_seed(1)
    expected, state = lectures.generate(idx, 200), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(ours.generate(idx=idx, max_new_tokens=200), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.device_assertion
def test_tokens_out_of_range() -> None:
    model = BigramLanguageModel(5)
    idx = torch.tensor([[0, 1]])
    with pytest.raises(IndexError, match="index out of range"):
        model(idx + 4)
    with raises_in_kernel("embedding_cross_entropy", IndexError, "idx holds 5 at position 1"):
        model(idx + 4, idx)


def test_errors_name_the_argument() -> None:
    idx = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="targets to have the shape of idx"):
        BigramLanguageModel(5)(idx, idx[:, :1])


# Too few tokens for a table of counts to pay off, and enough.
@pytest.mark.parametrize("num_tokens", [5000, 20_000])
class TestEvaluate:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_is_exact(self, num_tokens: int, dtype: torch.dtype) -> None:
        model = BigramLanguageModel(65, dtype=dtype)
        tokens = torch.randint(65, (2 * num_tokens,))[::2]
        exact = reference.embedding_cross_entropy(tokens[:-1], model.token_embedding_table.weight.double(), tokens[1:])
        assert isinstance(exact, torch.Tensor)
        for tokens_dtype in (torch.int64, torch.int32, torch.uint16, torch.uint8):
            assert model.evaluate(tokens.to(tokens_dtype)) == pytest.approx(exact.item(), rel=1e-6)

    def test_impossible_pairs(self, num_tokens: int) -> None:
        model = BigramLanguageModel(65)
        with torch.no_grad():
            model.token_embedding_table.weight[:, 7] = -torch.inf
            model.token_embedding_table.weight[8] = torch.nan
        tokens = torch.randint(7, (num_tokens,))
        exact = reference.embedding_cross_entropy(tokens[:-1], model.token_embedding_table.weight, tokens[1:])
        assert isinstance(exact, torch.Tensor)
        assert model.evaluate(tokens) == pytest.approx(exact.item(), rel=1e-5)
        tokens[-1] = 7
        assert model.evaluate(tokens) == math.inf
        tokens[-1], tokens[-2] = 0, 8
        assert math.isnan(model.evaluate(tokens))

    def test_one_token_in_the_vocabulary(self, num_tokens: int) -> None:
        assert BigramLanguageModel(1).evaluate(torch.zeros(num_tokens, dtype=torch.int32)) == 0

    @pytest.mark.device_assertion
    @pytest.mark.parametrize("position", [0, 2500, -1])
    def test_token_out_of_range(self, num_tokens: int, position: int) -> None:
        tokens = torch.randint(65, (num_tokens,))
        for value in (-1, 65, -100):
            tokens[position] = value
            message = rf"tokens holds {value} at position {position % num_tokens}, expected 0 <= token < 65"
            counted = num_tokens > 4 * 65**2
            with (
                raises_in_kernel("count_bigrams", IndexError, message)
                if counted
                else pytest.raises(IndexError, match=message)
            ):
                BigramLanguageModel(65).evaluate(tokens)

    def test_bad_tokens(self, num_tokens: int) -> None:
        model = BigramLanguageModel(65)
        with pytest.raises(RuntimeError, match="1-D"):
            model.evaluate(torch.zeros(num_tokens, 1, dtype=torch.long))
        with pytest.raises(RuntimeError, match=r"got torch\.float32"):
            model.evaluate(torch.zeros(num_tokens))


def test_evaluates_counts_of_any_number_of_pairs() -> None:
    model, tokens = BigramLanguageModel(20), torch.randint(20, (50,))
    assert model.count_pairs(tokens) is None
    counts = functional.count_bigrams(tokens, 20)
    assert model.evaluate_counts(counts) == pytest.approx(model.evaluate(tokens), rel=1e-6)
    assert math.isnan(model.evaluate_counts(torch.zeros_like(counts)))
    with pytest.raises(RuntimeError, match=r"V = 20, got \(20, 1\)"):
        model.evaluate_counts(counts[:, :1])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "label_smoothing", 0.1),
        lambda model: setattr(model, "ignore_index", 3),
        lambda model: setattr(model, "class_weight", torch.ones(20)),
        lambda model: model.register_forward_hook(lambda *_: None),
        lambda model: model.token_embedding_table.register_forward_hook(lambda *_: None),
    ],
)
def test_counts_are_not_evaluated_as_what_they_are_not(change: Callable[[BigramLanguageModel], object]) -> None:
    model, counts = BigramLanguageModel(20), torch.ones(20, 20, dtype=torch.int64)
    change(model)
    with pytest.raises(NotImplementedError, match="evaluate_counts: not implemented for a model that is not fused"):
        model.evaluate_counts(counts)


def test_evaluate_too_few_tokens() -> None:
    for vocab_size in (1, 65):
        for num_tokens in (0, 1):
            assert math.isnan(BigramLanguageModel(vocab_size).evaluate(torch.zeros(num_tokens, dtype=torch.uint8)))


def test_evaluate_does_not_depend_on_threads(two_threads: None) -> None:
    model, tokens = BigramLanguageModel(250), torch.randint(250, (250_001,))
    loss = model.evaluate(tokens)
    torch.set_num_threads(1)
    assert model.evaluate(tokens) == loss


@pytest.mark.parametrize("shape", [(20,), (1, 20), (5, 4), (4, 5, 1)])
@pytest.mark.parametrize("is_fused", [True, False])
def test_targets_of_another_shape(shape: tuple[int, ...], is_fused: bool) -> None:
    """As in the lecture, which views them as (B*T)."""
    model, idx, targets = BigramLanguageModel(9), torch.randint(9, (4, 5)), torch.randint(9, (4, 5))
    if not is_fused:
        model.token_embedding_table.register_forward_hook(lambda *_: None)
    expected = model(idx, targets)
    actual = model(idx, targets.reshape(shape))
    assert [torch.equal(*each) for each in zip(actual, expected, strict=True)] == [True, True]


def test_a_class_weight_that_is_a_parameter() -> None:
    model, expected = BigramLanguageModel(9), BigramLanguageModel(9, class_weight=torch.arange(1.0, 10))
    expected.load_state_dict(model.state_dict())
    model.class_weight = torch.nn.Parameter(torch.arange(1.0, 10), requires_grad=False)
    idx, targets, tokens = torch.randint(9, (4, 5)), torch.randint(9, (4, 5)), torch.randint(9, (1000,))
    assert not model.is_fused
    torch.testing.assert_close(model(idx, targets), expected(idx, targets))
    assert model.evaluate(tokens) == pytest.approx(expected.evaluate(tokens))


@pytest.mark.parametrize("class_weight", [[0.0, 1, 1], [-1.0, 1, 1], [1.0, 0, 0]])
@pytest.mark.parametrize("is_fused", [True, False])
def test_evaluate_chunks_whose_class_weights_sum_to_no_positive_number(
    class_weight: list[float], is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunks have targets of one class alone."""
    model = BigramLanguageModel(3, class_weight=torch.tensor(class_weight), label_smoothing=0.1)
    tokens = torch.cat([torch.zeros(2**18 + 2**20, dtype=torch.long), torch.ones(2000, dtype=torch.long)])
    if not is_fused:
        model.token_embedding_table.register_forward_hook(lambda *_: None)
    weight = model.token_embedding_table.weight.double()
    counts = functional.count_bigrams(tokens, 3).double()
    losses, of_class = -weight.log_softmax(1), torch.tensor(class_weight, dtype=torch.float64)
    of_targets = (counts * of_class * losses).sum()
    spread = (counts.sum(1) * (of_class * losses).sum(1)).sum()
    expected = (0.9 * of_targets + 0.1 / 3 * spread) / (counts * of_class).sum()
    assert model.evaluate(tokens) == pytest.approx(expected.item(), rel=1e-4)


def test_evaluate_a_class_weight_of_nan() -> None:
    model = BigramLanguageModel(3, class_weight=torch.tensor([math.nan, 1, 1]))
    assert math.isnan(
        model.evaluate(torch.cat([torch.zeros(2**19, dtype=torch.long), torch.ones(9, dtype=torch.long)]))
    )


def test_a_constructor_that_does_not_call_ours_and_a_table_without_a_size() -> None:
    class Factored(BigramLanguageModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.token_embedding_table = torch.nn.Sequential(torch.nn.Embedding(7, 2), torch.nn.Linear(2, 7))  # type: ignore

    model, idx = Factored(), torch.zeros((1, 1), dtype=torch.long)
    assert model.generate(idx, 5).shape == (1, 6)
    assert math.isfinite(model.evaluate(torch.randint(7, (50,))))


class TestOptionsOfTheLoss:
    """ignore_index, class_weight and label_smoothing are F.cross_entropy's, in forward and evaluate."""

    OPTIONS: tuple[dict[str, Any], ...] = (
        {"ignore_index": -1},
        {"ignore_index": 3},
        {"class_weight": torch.tensor([1.0, 0.0, 2.0, 3.0, 0.5])},
        {"label_smoothing": 0.2},
        {"ignore_index": 0, "class_weight": torch.tensor([1.0, 0.0, 2.0, 3.0, 0.5]), "label_smoothing": 0.2},
    )

    @staticmethod
    def model(options: dict[str, Any]) -> BigramLanguageModel:
        return BigramLanguageModel(5, **{name: on_device(value) for name, value in options.items()})

    @staticmethod
    def expected_loss(model: BigramLanguageModel, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model.token_embedding_table(idx).view(-1, 5)
        options: dict[str, Any] = {"ignore_index": model.ignore_index, "label_smoothing": model.label_smoothing}
        return F.cross_entropy(logits, targets.reshape(-1), model.class_weight, **options)

    @pytest.mark.parametrize("is_fused", [True, False])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_forward_and_evaluate(self, options: dict[str, Any], is_fused: bool) -> None:
        model = self.model(options)
        if not is_fused:
            model.token_embedding_table.register_forward_hook(lambda *_: None)
        idx, targets = torch.randint(5, (4, 8)), torch.randint(5, (4, 8))
        if options.get("ignore_index") == -1:
            targets[:, ::3] = -1
        torch.testing.assert_close(model(idx, targets)[1], self.expected_loss(model, idx, targets))
        tokens = torch.randint(5, (3000,))
        expected = self.expected_loss(model, tokens[:-1], tokens[1:]).item()
        assert model.evaluate(tokens) == pytest.approx(expected, rel=1e-5)
        assert (model.count_pairs(tokens) is None) == (not is_fused or options != {"ignore_index": -1})

    def test_no_token_counts(self) -> None:
        model = BigramLanguageModel(5, ignore_index=2)
        assert math.isnan(model.evaluate(torch.full((10,), 2)))
        idx = torch.full((2, 2), 2)
        assert model(idx, idx)[1].isnan()

    def test_class_weight_is_a_buffer_outside_the_state_dict(self) -> None:
        model = BigramLanguageModel(5, class_weight=torch.ones(5))
        assert list(model.state_dict()) == ["token_embedding_table.weight"]
        assert model.double().class_weight is not None
        assert model.class_weight is not None
        assert model.class_weight.dtype == torch.float64
        idx = torch.randint(5, (2, 3))
        assert model(idx, idx)[1].dtype == torch.float64


def test_targets_of_another_shape_as_the_lectures_view() -> None:
    model = BigramLanguageModel(5)
    idx, targets = torch.randint(5, (4, 8)), torch.randint(5, (4, 8))
    expected = model(idx, targets)
    for touched in (False, True):
        if touched:
            model.token_embedding_table.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(idx, targets.view(-1)), expected)
        torch.testing.assert_close(model(idx.int(), targets.int()), expected)
        with pytest.raises(ValueError, match=r"to have the shape of idx|match target batch_size"):
            model(idx, targets[:3])


def test_probabilities_as_targets() -> None:
    model = BigramLanguageModel(5)
    idx, targets = torch.randint(5, (4, 8)), torch.rand(4, 8, 5)
    expected = F.cross_entropy(model.token_embedding_table(idx).view(-1, 5), targets.view(-1, 5))
    torch.testing.assert_close(model(idx, targets)[1], expected)
    model.token_embedding_table.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(idx, targets)[1], expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8, "min_p": 0.01},
        {"temperature": 0.0},
        {"sampler": "philox", "stop": 3},
        {"stop": [3, 4, 5]},
        {"sampler": "philox", "stop": range(3)},
    ],
    ids=str,
)
def test_a_touched_model_generates_the_same(options: dict[str, Any]) -> None:
    model, idx = BigramLanguageModel(65), torch.randint(65, (3, 4))
    torch.manual_seed(1)
    expected, state = model.generate(idx, 50, **options), torch.get_rng_state()
    lengths: list[int] = []
    model.token_embedding_table.register_forward_hook(lambda _table, args, _output: lengths.append(args[0].size(1)))
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 50, **options), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert lengths[:3] == [4, 5, 6]  # all tokens so far, as in the lecture


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature to be finite and >= 0, got -1"),
        ({"top_k": 0}, ValueError, "top_k >= 1, got 0"),
        ({"stop": 5}, ValueError, "0 <= stop < 5, got 5"),
        ({"stop": [1, 5]}, ValueError, "0 <= stop < 5, got 5"),
        ({"stop": "a"}, TypeError, "stop to be an int or a sequence of ints"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens >= 0, got -1"),
        ({"sampler": "foo"}, ValueError, "foo"),
        ({"idx": torch.zeros(2, dtype=torch.long)}, RuntimeError, "2-D"),
    ],
    ids=str,
)
def test_a_touched_model_raises_the_same(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"idx": torch.zeros(1, 1, dtype=torch.long), "max_new_tokens": 3} | arguments
    model = BigramLanguageModel(5)
    for touched in (False, True):
        if touched:
            model.token_embedding_table.register_forward_hook(lambda *_: None)
        with pytest.raises(error, match=message):
            model.generate(**{name: on_device(value) for name, value in call.items()})


class Masked(BigramLanguageModel):
    """Forbids token 0, in the lecture's signature."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        logits = self.token_embedding_table(idx)
        logits = 4 * logits.masked_fill(torch.arange(self.vocab_size) == 0, -torch.inf)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, self.vocab_size), targets.view(-1))


class OwnAttributes(BigramLanguageModel):
    """As scripts write them: sizes and devices kept by the model, a constructor that builds everything."""

    def __init__(self, vocab_size: int) -> None:
        torch.nn.Module.__init__(self)
        self.token_embedding_table = torch.nn.Embedding(vocab_size, vocab_size)
        self.vocab_size = vocab_size
        self.device = "cpu"  # type: ignore[assignment]


@pytest.mark.cpu_only
def test_attributes_and_a_constructor_of_ones_own(tmp_path: Path) -> None:
    model, tokens = OwnAttributes(5), torch.randint(5, (300,))
    assert model.vocab_size == 5
    assert str(model.device) == "cpu"
    assert model.is_fused
    for touched in (False, True):
        if touched:
            model.token_embedding_table.register_forward_hook(lambda *_: None)
        expected = F.cross_entropy(model.token_embedding_table(tokens[:-1]), tokens[1:])
        torch.testing.assert_close(model(tokens[:-1], tokens[1:])[1], expected)
        assert model.evaluate(tokens) == pytest.approx(expected.item(), rel=1e-5)
        assert model.generate(tokens[None, :2], 3).shape == (1, 5)
    model.save(tmp_path / "model.safetensors")


def test_a_forward_of_ones_own() -> None:
    model, tokens = Masked(5), torch.randint(1, 5, (300,))
    expected = model(tokens[None, :-1], tokens[None, 1:])[1].item()
    assert model.evaluate(tokens) == pytest.approx(expected, rel=1e-5)
    assert 0 not in model.generate(tokens[None, :1], 200)[0]


def test_evaluation_leaves_the_mode_of_each_module() -> None:
    model = BigramLanguageModel(5)
    modes: list[bool] = []
    model.token_embedding_table.eval()
    model.token_embedding_table.register_forward_hook(lambda *_: modes.append(model.training))
    model.evaluate(torch.randint(5, (9,)))
    assert modes == [False]
    assert model.training
    assert not model.token_embedding_table.training


@pytest.mark.filterwarnings("ignore")  # of TorchScript, about its end
def test_torchscript(tmp_path: Path) -> None:
    model = BigramLanguageModel(5)
    idx, targets = torch.randint(5, (2, 3)), torch.randint(5, (2, 3))
    expected = model(idx, targets)
    for program in (torch.jit.script(model), torch.jit.trace(model, (idx, targets))):
        torch.jit.save(program, tmp_path / "model.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(idx, targets), expected)
        assert [node for node in program.inlined_graph.nodes() if "bigramx" in node.kind()] == []
    assert torch.jit.script(model)(idx, targets, False)[0] is None


@pytest.mark.cpu_only
def test_on_the_meta_device() -> None:
    model = BigramLanguageModel(5, device="meta")
    idx = torch.zeros(2, 3, dtype=torch.long, device="meta")
    logits, loss = model(idx, idx)
    loss.backward()
    assert (logits.shape, loss.shape, loss.device.type) == ((6, 5), (), "meta")
    assert model.token_embedding_table.weight.grad is not None


def test_symbolic_trace() -> None:
    model = BigramLanguageModel(5)
    idx, targets = torch.randint(5, (2, 3)), torch.randint(5, (2, 3))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(idx, targets), model(idx, targets))


def test_padding_idx_of_the_table() -> None:
    model = BigramLanguageModel(5)
    model.token_embedding_table.padding_idx = 1
    idx = torch.tensor([[0, 1, 2]])
    _logits, loss = model(idx, idx)
    loss.backward()
    grad = model.token_embedding_table.weight.grad
    assert grad is not None
    assert not grad[1].any()
    assert grad[0].any()


class TestFromCounts:
    def test_is_the_optimum(self) -> None:
        tokens = torch.randint(7, (5000,)) ** 2 % 7
        counts = functional.count_bigrams(tokens, 7)
        model = BigramLanguageModel.from_counts(counts, smoothing=0)
        frequencies = counts.double() / counts.sum()
        entropy = -torch.special.xlogy(frequencies, counts.double() / counts.sum(1, keepdim=True)).nansum()
        assert model.evaluate(tokens) == pytest.approx(entropy.item(), rel=1e-6)
        weight = model.token_embedding_table.weight
        seen = counts.sum(1) > 0
        torch.testing.assert_close(weight.detach()[seen].exp().sum(1), torch.ones(int(seen.sum())))
        assert weight.requires_grad

    def test_smoothing(self) -> None:
        model = BigramLanguageModel.from_counts(torch.tensor([[3, 0], [0, 0]]), smoothing=1)
        torch.testing.assert_close(model.token_embedding_table.weight.exp(), torch.tensor([[0.8, 0.2], [0.5, 0.5]]))

    def test_a_row_without_pairs_is_uniform(self) -> None:
        model = BigramLanguageModel.from_counts(torch.tensor([[3, 0], [0, 0]]), smoothing=0)
        torch.testing.assert_close(model.token_embedding_table.weight.exp(), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        assert model.generate(torch.tensor([[1]]), 10).shape == (1, 11)

    def test_bad_arguments(self) -> None:
        with pytest.raises(RuntimeError, match=r"square, \(V, V\), got shape \(2, 3\)"):
            BigramLanguageModel.from_counts(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="smoothing to be finite and >= 0, got -1"):
            BigramLanguageModel.from_counts(torch.zeros(2, 2), smoothing=-1)
        for value in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"counts to be finite and >= 0, got {value}"):
                BigramLanguageModel.from_counts(torch.full((2, 2), value))


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("vocab_size", [0, 1, 20, 2500])
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_from_sparse_counts(vocab_size: int, smoothing: float) -> None:
    """The last size has several blocks of rows."""
    tokens = torch.randint(vocab_size, (5000,)) if vocab_size > 0 else torch.empty(0, dtype=torch.int64)
    if vocab_size == 0:
        empty = torch.zeros(0, 0, dtype=torch.int64)
        assert BigramLanguageModel.from_counts(empty.to_sparse_csr(), smoothing).vocab_size == 0
        return
    expected = BigramLanguageModel.from_counts(functional.count_bigrams(tokens, vocab_size), smoothing)
    counts = BigramCounts(vocab_size)
    counts.update(tokens)
    csr = counts.to_csr()
    for each in (counts, csr, csr.to_sparse_coo()):
        actual = BigramLanguageModel.from_counts(each, smoothing)
        assert torch.equal(actual.token_embedding_table.weight, expected.token_embedding_table.weight)


class OwnHead(BigramLanguageModel):
    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.head = torch.nn.Linear(vocab_size, vocab_size)


class OwnForward(torch.nn.Embedding):
    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(idx)


def with_table(table: torch.nn.Module) -> BigramLanguageModel:
    model = BigramLanguageModel(3)
    model.token_embedding_table = table  # type: ignore[assignment]
    return model


def with_option(name: str, value: object) -> BigramLanguageModel:
    model = BigramLanguageModel(3)
    setattr(model, name, value)
    return model


class TestSaving:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("padding_idx", 1), ("padding_idx", -1), ("max_norm", 0.5), ("norm_type", 1.0), ("scale_grad_by_freq", True)],
    )
    def test_options_of_the_table(self, tmp_path: Path, name: str, value: object) -> None:
        model = with_table(torch.nn.Embedding(3, 3, max_norm=0.7))
        setattr(model.token_embedding_table, name, value)
        model.save(tmp_path / "model")
        loaded = BigramLanguageModel.load(tmp_path / "model").token_embedding_table
        assert getattr(loaded, name) == value
        assert repr(loaded) == repr(model.token_embedding_table)

    def test_frozen(self, tmp_path: Path) -> None:
        BigramLanguageModel(3).requires_grad_(False).save(tmp_path / "model")
        assert not BigramLanguageModel.load(tmp_path / "model").token_embedding_table.weight.requires_grad

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (
                lambda: OwnHead(3),
                TypeError,
                r"whose only state is its table, got also head.bias, head.weight: torch.save",
            ),
            (
                lambda: with_table(OwnForward(3, 3)),
                TypeError,
                "a table that does what nn.Embedding does, got OwnForward",
            ),
            (lambda: with_table(torch.nn.Linear(3, 3)), TypeError, "does what nn.Embedding does, got Linear"),
            (lambda: with_table(torch.nn.Embedding(4, 3)), ValueError, r"expected a square table, got \(4, 3\)"),
            (
                lambda: with_option("label_smoothing", 2.0),
                ValueError,
                "expected label_smoothing to be of type float and",
            ),
            (
                lambda: with_option("label_smoothing", math.nan),
                ValueError,
                "expected label_smoothing to be of type float",
            ),
            (lambda: with_option("ignore_index", 2.5), TypeError, "float"),
        ],
    )
    def test_what_could_not_be_loaded_is_not_saved(
        self, tmp_path: Path, make: Callable[[], BigramLanguageModel], error: type[Exception], message: str
    ) -> None:
        BigramLanguageModel(3).save(tmp_path / "model")
        before = (tmp_path / "model").read_bytes()
        with pytest.raises(error, match=message):
            make().save(tmp_path / "model")
        assert (tmp_path / "model").read_bytes() == before

    def test_a_pruned_table_is_no_frozen_one(self, tmp_path: Path) -> None:
        """Though its weight, which is computed, has no gradient after a forward pass without."""
        model = BigramLanguageModel(3)
        prune.l1_unstructured(model.token_embedding_table, "weight", amount=0.5)
        model.evaluate(torch.arange(3))
        model.save(tmp_path / "model")
        assert BigramLanguageModel.load(tmp_path / "model").token_embedding_table.weight.requires_grad

    @pytest.mark.parametrize("class_weight", [torch.ones(3, dtype=torch.int64), torch.ones(4)])
    def test_class_weights_that_could_not_be_loaded(self, tmp_path: Path, class_weight: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="save: expected class_weight to be 3 floating-point numbers"):
            with_option("class_weight", class_weight).save(tmp_path / "model")

    def test_a_compiled_or_pruned_table(self, tmp_path: Path) -> None:
        """They are nn.Embeddings, of a weight that is computed."""
        pruned, compiled = BigramLanguageModel(3), BigramLanguageModel(3)
        prune.l1_unstructured(pruned.token_embedding_table, "weight", amount=0.5)
        compiled.token_embedding_table = torch.compile(compiled.token_embedding_table, backend="eager")  # type: ignore
        for model in (pruned, compiled):
            model.save(tmp_path / "model")
            loaded = BigramLanguageModel.load(tmp_path / "model")
            assert torch.equal(loaded.token_embedding_table.weight.cpu(), model.token_embedding_table.weight.cpu())

    def test_loads_what_it_saves(self, tmp_path: Path) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            model = BigramLanguageModel(3, dtype=dtype)
            model.tokenizer = CharTokenizer.from_text("a\né")
            model.save(tmp_path / "model.safetensors")
            loaded = BigramLanguageModel.load(tmp_path / "model.safetensors")
            assert torch.equal(loaded.token_embedding_table.weight, model.token_embedding_table.weight.cpu())
            assert loaded.token_embedding_table.weight.dtype == dtype
            assert loaded.tokenizer == model.tokenizer
            idx = torch.tensor([[0, 1]], device="cpu")
            _logits, loss = loaded(idx, idx)
            loss.backward()

    def test_without_tokenizer(self, tmp_path: Path) -> None:
        BigramLanguageModel(3).save(tmp_path / "model.safetensors")
        assert BigramLanguageModel.load(str(tmp_path / "model.safetensors")).tokenizer is None

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            BigramLanguageModel.load(tmp_path / "none")

    def test_every_truncation_and_damage_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        model = BigramLanguageModel(3)
        model.save(path)
        whole = path.read_bytes()
        for size in range(0, len(whole), 7):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"model.safetensors: (damaged|not a model)"):
                BigramLanguageModel.load(path)
        for position in range(len(whole)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            with pytest.raises(ValueError, match=r"model.safetensors: "):
                BigramLanguageModel.load(path)

    def test_does_not_depend_on_its_file_after_loading(self, tmp_path: Path) -> None:
        model = BigramLanguageModel(300)
        model.save(tmp_path / "model.safetensors")
        loaded = BigramLanguageModel.load(tmp_path / "model.safetensors")
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.truncate(10)
        assert torch.equal(loaded.token_embedding_table.weight, model.token_embedding_table.weight.cpu())

    def test_keeps_sparse(self, tmp_path: Path) -> None:
        for sparse in (False, True):
            BigramLanguageModel(3, sparse=sparse).save(tmp_path / "model.safetensors")
            loaded = BigramLanguageModel.load(tmp_path / "model.safetensors")
            assert loaded.token_embedding_table.sparse == sparse

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            *(
                ("ignore_index", value)
                for value in ("", "[", "1.5", "true", "null", '"1"', str(2**63), "9" * 5000, "[" * 10**5)
            ),
            *(
                ("label_smoothing", value)
                for value in ("", "1", "NaN", "-0.5", "1.5", "1e999", "null", "[0.1]", "[" * 10**5)
            ),
            *(("tokenizer", value) for value in ("", "null", "[" * 10**5, CharTokenizer("abcd").to_json())),
            *(
                ("tokenizer", json.dumps({"format": "bigramx.CharTokenizer", "code_points": points}))
                for points in (
                    None,
                    "abc",
                    [97, 97, 98],
                    [1.0, 2, 3],
                    [True, 2, 3],
                    [-1, 2, 3],
                    [0x110000, 2, 3],
                    [10**30, 2, 3],
                )
            ),
        ],
        ids=lambda value: repr(value[-30:]),
    )
    def test_hostile_metadata(self, tmp_path: Path, name: str, content: str) -> None:
        path = tmp_path / "model"
        write_tensors(path, "model", {"token_embedding_table.weight": torch.zeros(3, 3)}, {name: content})
        with pytest.raises(ValueError, match="/model: ") as raised:
            BigramLanguageModel.load(path)
        assert type(raised.value) is ValueError

    @pytest.mark.parametrize(
        "tensors",
        [
            {},
            {"weight": torch.zeros(3, 3)},
            *({"token_embedding_table.weight": torch.zeros(shape)} for shape in ((), (3,), (3, 2), (3, 3, 1))),
            {"token_embedding_table.weight": torch.zeros(3, 3, dtype=torch.int64)},
            *(
                {"token_embedding_table.weight": torch.zeros(3, 3), "class_weight": weight}
                for weight in (torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
            ),
        ],
        ids=repr,
    )
    def test_hostile_tensors(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        write_tensors(tmp_path / "model", "model", tensors, {})
        with pytest.raises(ValueError, match="/model: expected "):
            BigramLanguageModel.load(tmp_path / "model")

    def test_a_sharded_table_is_saved_without_a_history(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fusion, "any_dtensor", lambda *_tensors: True)
        with pytest.raises(ValueError, match="each rank has a history of its own"):
            BigramLanguageModel(2).save(tmp_path / "model", history=History())
        assert not (tmp_path / "model").exists()

    def test_foreign_files(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"token_embedding_table.weight": torch.zeros(3, 3)}, path)
        with pytest.raises(ValueError, match="not a model that bigramx saved"):
            BigramLanguageModel.load(path)
        torch.save({"a": 1}, path)
        with pytest.raises(ValueError, match="damaged, cut short, or no safetensors file"):
            BigramLanguageModel.load(path)

    def test_copies_and_pickles(self) -> None:
        model = BigramLanguageModel(3)
        model.tokenizer = CharTokenizer.from_text("abc")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.token_embedding_table.weight, model.token_embedding_table.weight)
            assert other.tokenizer == model.tokenizer


@pytest.mark.cpu_only
def test_nothing_follows_an_ambient_device(tmp_path: Path) -> None:
    """As after torch.set_default_device("cuda") in a notebook."""
    model, tokens = BigramLanguageModel(4), torch.randint(4, (40,))
    model.tokenizer = CharTokenizer.from_text("abcd")
    (tmp_path / "tokens.bin").write_bytes(bytes(range(4)) * 4)
    with torch.device("meta"):
        model.save(tmp_path / "model.safetensors")
        loaded = BigramLanguageModel.load(tmp_path / "model.safetensors")
        assert torch.equal(loaded.token_embedding_table.weight, model.token_embedding_table.weight)
        assert model.tokenizer.decode(model.tokenizer.encode("dab")) == "dab"
        assert model.tokenizer.decode(range(4)) == "abcd"
        assert data.read_bin(tmp_path / "tokens.bin").is_cpu
        assert data.get_batch(tokens, 2, 3)[0].is_cpu
        assert functional.count_bigrams(tokens, 4).is_cpu
        assert functional.multinomial(torch.ones(4, device="cpu"), 2).is_cpu
        assert math.isfinite(model.evaluate(tokens))
        assert math.isfinite(optimal_loss(tokens))
        counts = functional.count_bigrams(tokens, 4)
        assert BigramLanguageModel.from_counts(counts).device.type == "cpu"
        for touched in (False, True):
            if touched:
                model.token_embedding_table.register_forward_hook(lambda *_: None)
            for sampler in ("torch", "philox"):
                assert model.generate(tokens[None, :1], 3, sampler=sampler).is_cpu
            _logits, loss = model(tokens, tokens)
            loss.backward()
            assert math.isfinite(model.evaluate(tokens))
