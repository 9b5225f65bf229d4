"""BigramLanguageModel, which extends the lecture's class."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigramx import BigramLanguageModel, CharTokenizer, functional, reference
from tests.devices import raises_in_kernel

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
            op = "count_bigrams" if num_tokens > 4 * 65**2 else "embedding_cross_entropy"
            with raises_in_kernel(op, IndexError, f" {value} .*at position"):
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


def test_evaluate_too_few_tokens() -> None:
    for vocab_size in (1, 65):
        for num_tokens in (0, 1):
            assert math.isnan(BigramLanguageModel(vocab_size).evaluate(torch.zeros(num_tokens, dtype=torch.uint8)))


def test_evaluate_does_not_depend_on_threads(two_threads: None) -> None:
    model, tokens = BigramLanguageModel(250), torch.randint(250, (250_001,))
    loss = model.evaluate(tokens)
    torch.set_num_threads(1)
    assert model.evaluate(tokens) == loss


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


class TestSaving:
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
