"""Exact losses of tokens and of counts, whatever is read in chunks, and in how much memory."""

from __future__ import annotations

import errno
import itertools
import math
import os
import sys
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from bigramx import (
    BigramCounts,
    BigramLanguageModel,
    CharTokenizer,
    SmoothedBigramModel,
    data,
    evaluate,
    evaluation,
    functional,
    optimal_loss,
    reference,
)
from tests import processes
from tests.devices import on_device, raises_in_kernel

pytestmark = pytest.mark.usefixtures("device")

CHUNK = 16
LIMITS = (0, 1, 64, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of so few tokens that a test has many of them."""
    monkeypatch.setattr(data, "_CHUNK", CHUNK)
    monkeypatch.setattr(evaluation, "_CHUNK", CHUNK)
    monkeypatch.setattr(evaluation, "_COUNTED_AT_ONCE", 8 * CHUNK)
    monkeypatch.setattr(evaluation, "_SAMPLE_STEP", 4)


def conditional_entropy(values: list[int]) -> float:
    """H(next | last) of the pairs."""
    pairs, last = Counter(itertools.pairwise(values)), Counter(values[:-1])
    return -sum(count * math.log(count / last[pair[0]]) for pair, count in pairs.items()) / (len(values) - 1)


def mean_loss(weight: Tensor, tokens: Tensor) -> float:
    """Plain PyTorch, in float64."""
    tokens = tokens.to(weight.device).long()
    exact = reference.embedding_cross_entropy(tokens[:-1], weight.double(), tokens[1:])
    assert isinstance(exact, Tensor)
    return exact.item()


class TestOptimalLoss:
    def test_is_that_of_the_closed_form(self) -> None:
        text = data.default_text()
        tokenizer = CharTokenizer.from_text(text)
        tokens = on_device(tokenizer.encode(text))
        model = BigramLanguageModel.from_counts(functional.count_bigrams(tokens, tokenizer.vocab_size), smoothing=0)
        assert optimal_loss(tokens) == pytest.approx(model.evaluate(tokens), rel=1e-6)
        for same in (tokens * 2**40, tokens - 1, tokens.int(), tokens.to(torch.uint16), tokens.to(torch.uint8)):
            assert optimal_loss(same) == pytest.approx(optimal_loss(tokens), rel=1e-12)

    def test_too_few_tokens(self) -> None:
        for num_tokens in (0, 1):
            assert math.isnan(optimal_loss(torch.zeros(num_tokens, dtype=torch.int64)))
        assert optimal_loss(torch.tensor([-7, 2**60])) == 0

    def test_bad_tokens(self) -> None:
        for wrong in (torch.zeros(2, 50, dtype=torch.int64), torch.zeros(50), torch.zeros(50, dtype=torch.int8)):
            with pytest.raises(RuntimeError, match="expected tokens to be"):
                optimal_loss(wrong)

    def test_tokens_of_which_each_is_followed_by_one(self) -> None:
        assert optimal_loss(torch.arange(10).repeat(5)) == pytest.approx(0, abs=1e-12)
        assert optimal_loss(torch.arange(10**5)) == pytest.approx(0, abs=1e-12)

    @pytest.mark.usefixtures("small_chunks")
    @given(
        seed=st.integers(0, 2**32),
        num_tokens=st.sampled_from([2, 3, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK, 300, 1500]),
        num_distinct=st.sampled_from([1, 2, 5, 40, 1000]),
        smallest=st.sampled_from([0, 1, -1, -40, 1000, *(-limit - 1 for limit in LIMITS)]),
        span=st.sampled_from(LIMITS),
        step=st.sampled_from([1, 2]),
    )
    def test_equals_a_counter(
        self, seed: int, num_tokens: int, num_distinct: int, smallest: int, span: int, step: int
    ) -> None:
        torch.manual_seed(seed)
        largest = min(smallest + span, 2**63 - 1)
        ends = torch.tensor([smallest, largest])
        values = torch.cat([ends, torch.randint(smallest, max(largest, smallest + 1), (num_distinct,))])
        tokens = values[torch.randint(len(values), (num_tokens * step,))][::step]
        assert optimal_loss(tokens) == pytest.approx(conditional_entropy(tokens.tolist()), rel=1e-9, abs=1e-12)

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
    def test_sorted_and_skewed_tokens(self, dtype: torch.dtype) -> None:
        """Runs whose values lie apart, nested in each other, or in one value."""
        for tokens in (
            torch.arange(2000) // 3,
            2000 - torch.arange(2000) // 3,
            torch.cat([torch.arange(500), torch.full((500,), 7), torch.arange(500)]),
            (torch.arange(2000) % 50) * (torch.arange(2000) // 50),
        ):
            expected = conditional_entropy(tokens.tolist())
            assert optimal_loss(tokens.to(dtype)) == pytest.approx(expected, rel=1e-9, abs=1e-12)

    @pytest.mark.usefixtures("two_threads")
    def test_does_not_depend_on_threads(self) -> None:
        tokens = torch.randint(50_000, (300_000,)) * torch.randint(2, (300_000,))
        loss = optimal_loss(tokens)
        torch.set_num_threads(1)
        assert optimal_loss(tokens) == loss

    @pytest.mark.usefixtures("small_chunks")
    def test_without_address_space_for_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = torch.randint(1000, (1500,))
        loss = optimal_loss(tokens)

        def refuse(*args: object, **options: object) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        monkeypatch.setattr("mmap.mmap", refuse)
        assert optimal_loss(tokens) == loss

    def test_from_counts(self) -> None:
        tokens = torch.randint(7, (500,))
        counts = functional.count_bigrams(tokens, 7)
        assert evaluation.optimal_loss_of_counts(counts) == pytest.approx(optimal_loss(tokens), rel=1e-12)
        assert math.isnan(evaluation.optimal_loss_of_counts(torch.zeros_like(counts)))


@pytest.mark.usefixtures("small_chunks")
class TestCountPairs:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
    @pytest.mark.parametrize("extra", [0, 1, 2, 100])
    def test_across_the_edge_of_a_chunk(self, dtype: torch.dtype, extra: int) -> None:
        num_tokens = 8 * CHUNK // dtype.itemsize + extra
        for tokens in (torch.randint(5, (num_tokens,)).to(dtype), torch.randint(5, (2 * num_tokens,)).to(dtype)[::2]):
            counts = evaluation.count_pairs(tokens, 5, tokens.device)
            assert torch.equal(counts, functional.count_bigrams(tokens, 5))

    @pytest.mark.parametrize("dtype", [torch.uint16, torch.int64])
    def test_large_vocabulary(self, dtype: torch.dtype) -> None:
        tokens = torch.randint(1900, (4000,)).to(dtype)[::2]
        counts = evaluation.count_pairs(tokens, 1900, tokens.device)
        assert torch.equal(counts, functional.count_bigrams(tokens, 1900))
        tokens[1234] = 1900
        with pytest.raises(IndexError, match="tokens holds 1900 at position 1234, expected 0 <= token < 1900"):
            evaluation.count_pairs(tokens, 1900, tokens.device)

    def test_too_few_tokens(self) -> None:
        for vocab_size, num_tokens in itertools.product((3, 1900), (0, 1)):
            tokens = torch.zeros(num_tokens, dtype=torch.int64)
            assert not evaluation.count_pairs(tokens, vocab_size, tokens.device).any()

    @pytest.mark.device_assertion
    @pytest.mark.parametrize("position", [0, CHUNK, CHUNK + 1, 499])
    def test_position_in_all_tokens(self, position: int) -> None:
        tokens = torch.zeros(500, dtype=torch.int64)
        tokens[position] = 9
        with raises_in_kernel("count_bigrams", IndexError, f"tokens holds 9 at position {position}, "):
            BigramLanguageModel(3).evaluate(tokens)


class TestLossOfTokens:
    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("num_tokens", [2, CHUNK, CHUNK + 1, CHUNK + 2, 500])
    def test_chunks(self, num_tokens: int) -> None:
        weight = torch.randn(65, 65)
        for tokens in (torch.randint(65, (num_tokens,)), torch.randint(65, (2 * num_tokens,))[::2].int()):
            expected = pytest.approx(mean_loss(weight, tokens), rel=1e-6)
            assert evaluation.loss_of_tokens(weight, tokens) == expected
            assert evaluation.loss_of_tokens(weight.t().contiguous().t(), tokens) == expected

    def test_tokens_on_the_cpu(self) -> None:
        tokens = torch.randint(65, (500,))
        weight = torch.randn(65, 65)
        assert evaluation.loss_of_tokens(weight, tokens.cpu()) == evaluation.loss_of_tokens(weight, tokens)

    @pytest.mark.usefixtures("small_chunks")
    def test_position_in_all_tokens(self) -> None:
        for position, value in itertools.product((0, CHUNK - 1, CHUNK, 499), (-(2**63), -1, 65, 2**63 - 1)):
            tokens = torch.randint(65, (500,))
            tokens[position] = value
            with pytest.raises(IndexError, match=f"tokens holds {value} at position {position}, expected 0 <= token"):
                evaluation.loss_of_tokens(torch.zeros(65, 65), tokens)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_large_logits(self, dtype: torch.dtype) -> None:
        """A constant added to a row changes nothing but what rounding leaves of the row."""
        weight = torch.randn(65, 65, dtype=torch.float64).to(dtype) + torch.randint(8, (65, 1)) * 2**14
        tokens = torch.randint(65, (500,))
        assert evaluation.loss_of_tokens(weight, tokens) == pytest.approx(mean_loss(weight, tokens), rel=1e-6)

    def test_values_that_are_not_finite_are_as_in_plain_pytorch(self) -> None:
        tokens = torch.arange(5)
        for value, position in itertools.product((torch.inf, -torch.inf, torch.nan), ((1, 2), (1, 3), (4, 0))):
            weight = torch.randn(5, 5)
            weight[position] = value
            expected = mean_loss(weight, tokens)
            assert evaluation.loss_of_tokens(weight, tokens) == pytest.approx(expected, rel=1e-6, nan_ok=True)
            counts = functional.count_bigrams(tokens, 5)
            assert evaluation.loss_of_counts(weight, counts) == pytest.approx(expected, rel=1e-6, nan_ok=True)
        weight[1] = -torch.inf
        assert math.isnan(evaluation.loss_of_tokens(weight, tokens))

    # Rows longer than what PyTorch reduces by one thread, and more tokens than that.
    @pytest.mark.usefixtures("two_threads")
    @pytest.mark.parametrize(("vocab_size", "num_tokens"), [(40_000, 50), (3000, 300_000)])
    def test_does_not_depend_on_threads(self, vocab_size: int, num_tokens: int) -> None:
        weight = torch.randn(1, vocab_size).expand(vocab_size, vocab_size)
        tokens = torch.randint(vocab_size, (num_tokens,))
        loss = evaluation.loss_of_tokens(weight, tokens)
        torch.set_num_threads(1)
        assert evaluation.loss_of_tokens(weight, tokens) == loss


class TestBlocksOfRows:
    @pytest.mark.usefixtures("small_chunks")
    def test_equal_the_whole(self) -> None:
        for vocab_size in (1, 3, 20):
            weight, counts = torch.randn(vocab_size, vocab_size), torch.randint(5, (vocab_size, vocab_size))
            losses = -weight.double().log_softmax(dim=1) * counts
            exact = (losses.sum() / counts.sum()).item()
            assert evaluation.loss_of_counts(weight, counts) == pytest.approx(exact, rel=1e-12, nan_ok=True)
            expected = (counts.double() + 0.5).log().log_softmax(dim=1).float()
            model = BigramLanguageModel.from_counts(counts, smoothing=0.5)
            torch.testing.assert_close(model.token_embedding_table.weight.detach(), expected)

    @pytest.mark.usefixtures("small_chunks")
    def test_names_the_first_bad_count(self) -> None:
        counts = torch.zeros(20, 20, dtype=torch.int64)
        counts[15, 3], counts[15, 4], counts[17, 0] = -3, -4, -5
        with pytest.raises(ValueError, match="counts to be finite and >= 0, got -3"):
            BigramLanguageModel.from_counts(counts)


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore:evaluate")
def test_impossible_pairs_whatever_the_default_device_is() -> None:
    model, tokens = BigramLanguageModel(5), torch.arange(5)
    with torch.no_grad():
        model.token_embedding_table.weight[1, 2] = -math.inf
    with torch.device("meta"):
        assert evaluate(model, tokens).notes == evaluate(model, tokens.clone()).notes != ()


@pytest.mark.cpu_only
def test_ambient_default_device() -> None:
    """In a notebook the default device is often the GPU, where tokens of the CPU have no business."""
    tokens, wide = torch.randint(65, (20_000,)), torch.randint(2**40, (500,))
    model = BigramLanguageModel(65)
    counts = functional.count_bigrams(tokens, 65)

    def results() -> list[float]:
        optimum = BigramLanguageModel.from_counts(counts)
        losses = [optimum.evaluate(tokens), model.evaluate(tokens), model.evaluate(tokens[:500])]
        large = evaluation.count_pairs(tokens[:500], 1900, tokens.device)
        return [*losses, optimal_loss(tokens), optimal_loss(wide), evaluation.optimal_loss_of_counts(large)]

    expected = results()
    with torch.device("meta"):
        assert results() == expected


# Each case may take 32 MB beyond the tables and the counts that its name has.
MEMORY_CASES = """
import resource, sys
import torch
from bigramx import BigramLanguageModel, data, evaluation, fit, optimal_loss

CPU = torch.device("cpu")
tokens, wide_tokens = (data.read_bin(path) for path in sys.argv[1:3])
model, large_model = BigramLanguageModel(65), BigramLanguageModel(6000, dtype=torch.bfloat16)
counts = torch.ones((), dtype=torch.int64).expand(6000, 6000)

cases = {
    "range": (0, lambda: data.token_range(wide_tokens)),
    "range of tokens apart": (0, lambda: data.token_range(wide_tokens[::2])),
    "counts, 23 MB": (23, lambda: evaluation.count_pairs(tokens, 1700, CPU)),
    "counts, 27 MB": (27, lambda: evaluation.count_pairs(tokens, 1850, CPU)),
    "optimum by a table of counts": (0, lambda: optimal_loss(tokens)),
    "optimum by a table of counts, of tokens apart": (0, lambda: optimal_loss(tokens[::2])),
    "optimum by 4 MB of distinct pairs": (4, lambda: optimal_loss(wide_tokens)),
    "optimum by 4 MB of distinct pairs, of tokens apart": (4, lambda: optimal_loss(wide_tokens[::2])),
    "evaluation by a table of counts": (0, lambda: model.evaluate(tokens)),
    "evaluation by rows": (0, lambda: large_model.evaluate(tokens)),
    "evaluation by rows, of tokens apart": (0, lambda: large_model.evaluate(tokens[::2])),
    "evaluation by rows, of few tokens": (0, lambda: large_model.evaluate(wide_tokens[:5000].int() % 6000)),
    "evaluation of counts": (0, lambda: large_model.evaluate_counts(counts)),
    "model from counts, 34 MB": (34, lambda: BigramLanguageModel.from_counts(counts[:3000, :3000])),
    "fit": (0, lambda: fit(model, tokens, tokens, max_steps=0)),
}


def data_in_memory():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmData:"))
    return 2**10 * int(line.split()[1])


model.evaluate(tokens[:10**6])  # allocates what is allocated once
for name in sys.argv[3:] or cases:
    counts_mb, call = cases[name]
    print(name, flush=True)
    resource.setrlimit(resource.RLIMIT_DATA, (data_in_memory() + (counts_mb + 32) * 2**20, resource.RLIM_INFINITY))
    call()
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("all")
"""


@pytest.mark.cpu_only
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux")
def test_memory_whatever_the_number_of_tokens(tmp_path: Path) -> None:
    """A corpus of 32 MB, where a copy in int64 takes 128 MB."""
    paths = [tmp_path / "zeros.bin", tmp_path / "wide.bin"]
    paths[0].touch()
    os.truncate(paths[0], 2**25)
    pattern = torch.randint(2**16, (2**19,), dtype=torch.int32).to(torch.uint16).numpy().tobytes()
    paths[1].write_bytes(pattern * 32)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # with more they spin where the machine is busy
    assert processes.run([sys.executable, "-c", MEMORY_CASES, *paths], env=environment, check=True).stdout.endswith(
        "all\n"
    )


def dense_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of each token but the first, float64, in plain PyTorch."""
    tokens = tokens.to(logits.device).long()
    return -logits.double().log_softmax(dim=1)[tokens[:-1], tokens[1:]]


class Plain(torch.nn.Module):
    """A module that nobody knows, which returns logits alone or first in a tuple."""

    def __init__(self, vocab_size: int, returns_tuple: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
        self.drop = torch.nn.Dropout()  # off while it is evaluated
        self.returns_tuple = returns_tuple

    def forward(self, idx: Tensor) -> Tensor | tuple[Tensor, None]:
        logits = self.drop(self.table(idx))
        return (logits, None) if self.returns_tuple else logits


def shards_of(*shards: Tensor, eot: int | None = None) -> data.TokenShards:
    return data.TokenShards(
        [on_device(shard) for shard in shards], names=[f"{n}.bin" for n in range(len(shards))], eot=eot
    )


class TestEvaluate:
    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("num_tokens", [2, CHUNK, CHUNK + 1, CHUNK + 2, 500])
    def test_equals_the_dense_formula(self, num_tokens: int) -> None:
        model = BigramLanguageModel(65)
        table = model.token_embedding_table.weight.detach()
        for dtype in (torch.uint8, torch.uint16, torch.int64):
            tokens = torch.randint(65, (num_tokens,)).to(dtype)
            result = evaluate(model, tokens, num_bytes=1000)
            losses = dense_losses(table, tokens)
            assert result.loss == pytest.approx(losses.mean().item(), rel=1e-12)
            assert result.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-12)
            assert result.bits_per_byte == pytest.approx(losses.sum().item() / math.log(2) / 1000, rel=1e-12)
            assert (result.num_tokens, result.num_pairs, result.num_bytes) == (num_tokens, num_tokens - 1, 1000)
            assert (result.num_unseen_pairs, result.num_out_of_vocabulary, result.notes) == (None, 0, ())
            assert result.documents is None

    @pytest.mark.parametrize("returns_tuple", [False, True])
    def test_any_module(self, returns_tuple: bool) -> None:
        model = Plain(40, returns_tuple)
        tokens = torch.randint(40, (300,))
        result = evaluate(model, tokens)
        assert result.loss == pytest.approx(dense_losses(model.table.weight.detach(), tokens).mean().item(), rel=1e-12)
        assert result.bits_per_byte is None
        assert model.training
        assert model.drop.training

    def test_many_calls_of_a_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluation, "_CALLED_AT_ONCE", 40 * 7)
        model, tokens = Plain(40, True), torch.randint(40, (300,))
        expected = dense_losses(model.table.weight.detach(), tokens).mean().item()
        assert evaluate(model, tokens).loss == pytest.approx(expected, rel=1e-12)

    def test_options_of_the_loss_do_not_count(self) -> None:
        """Perplexities are of probabilities."""
        model = BigramLanguageModel(9, label_smoothing=0.1, class_weight=torch.rand(9), ignore_index=3)
        tokens = torch.randint(9, (200,))
        expected = dense_losses(model.token_embedding_table.weight.detach(), tokens).mean().item()
        assert evaluate(model, tokens).loss == pytest.approx(expected, rel=1e-12)
        model.token_embedding_table.register_forward_hook(lambda _module, _idx, logits: 2 * logits)
        expected = dense_losses(2 * model.token_embedding_table.weight.detach(), tokens).mean().item()
        assert evaluate(model, tokens).loss == pytest.approx(expected, rel=1e-12)

    @pytest.mark.usefixtures("small_chunks")
    def test_no_pair_crosses_two_shards(self) -> None:
        model = BigramLanguageModel(20)
        table = model.token_embedding_table.weight.detach()
        shards = [torch.randint(20, (n,)).to(torch.uint16) for n in (50, 1, 0, 2, CHUNK + 1)]
        result = evaluate(model, shards_of(*shards))
        losses = torch.cat([dense_losses(table, shard) for shard in shards])
        assert result.loss == pytest.approx(losses.mean().item(), rel=1e-12)
        assert result.num_tokens == sum(map(len, shards))
        assert result.num_pairs == len(losses)
        assert evaluate(model, shards_of(*reversed(shards))).loss == pytest.approx(result.loss, rel=1e-12)

    def test_nothing_to_predict(self) -> None:
        for tokens in (torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), shards_of()):
            result = evaluate(BigramLanguageModel(3), tokens)
            assert math.isnan(result.loss)
            assert math.isnan(result.perplexity)
            assert result.num_pairs == 0

    @pytest.mark.usefixtures("small_chunks")
    @pytest.mark.parametrize("eot_first", [False, True])
    def test_documents(self, eot_first: bool) -> None:
        """Nothing is predicted after the token that ends one; that token itself is."""
        eot = 6
        model = BigramLanguageModel(7)
        table = model.token_embedding_table.weight.detach()
        documents = [torch.randint(6, (n,)) for n in (1, 5, 2, 40, 3)]
        end = torch.tensor([eot])
        parts = [torch.cat([end, part] if eot_first else [part, end]) for part in documents]
        tokens, last = torch.cat(parts), torch.randint(6, (4,))
        for tokens_of, option in ((shards_of(tokens, last), eot), (shards_of(tokens, last, eot=eot), None)):
            result = evaluate(model, tokens_of, eot=option, per_document=True)
            assert result.documents is not None
            ended = [torch.cat([part, end]) for part in documents]
            if eot_first:
                ended[-1] = documents[-1]  # no eot follows it
            expected = [dense_losses(table, part) for part in [*ended, last]]
            means = torch.stack([losses.mean() for losses in expected]).cpu()
            torch.testing.assert_close(result.documents, means, rtol=1e-12, atol=0)
            assert result.loss == pytest.approx(torch.cat(expected).mean().item(), rel=1e-12)
        each = evaluate(model, shards_of(*parts), per_document=True).documents
        assert each is not None
        assert len(each) == len(parts)
        with pytest.raises(ValueError, match="per_document needs eot"):
            evaluate(model, tokens, per_document=True)

    def test_more_documents_than_there_was_room_for(self) -> None:
        tokens = torch.tensor([1, 0]).repeat(5000)
        result = evaluate(BigramLanguageModel(2), tokens, eot=0, per_document=True)
        assert result.documents is not None
        assert len(result.documents) == 5000
        assert (result.documents == result.documents[0]).all()

    def test_pairs_of_probability_0_are_named(self) -> None:
        tokens = torch.tensor([0, 1, 2, 0, 2, 1, 0])
        counts = functional.count_bigrams(on_device(tokens[:4]), 3)
        model = BigramLanguageModel.from_counts(counts, smoothing=0)
        message = "3 of 6 pairs have probability 0, the first 2 after 0 at position 4: the loss is infinite"
        with pytest.warns(UserWarning, match=message):
            result = evaluate(model, tokens, num_bytes=7)
        assert result.loss == result.perplexity == result.bits_per_byte == math.inf
        with pytest.warns(UserWarning, match="the first 2 after 0 at position 4 of 1.bin: "):
            evaluate(model, shards_of(tokens[:2], tokens))

    @pytest.mark.usefixtures("small_chunks")
    def test_tokens_out_of_the_vocabulary_are_named_and_left_out(self) -> None:
        model = BigramLanguageModel(5)
        table = model.token_embedding_table.weight.detach()
        tokens = torch.randint(5, (100,))
        tokens[[CHUNK, CHUNK + 1, 99]] = torch.tensor([7, -2, 2**40])
        message = f"3 of 100 tokens are out of the model's vocabulary of 5, the first 7 at position {CHUNK}: pairs with"
        with pytest.warns(UserWarning, match=message):
            result = evaluate(model, tokens, num_bytes=50)
        losses = torch.cat([dense_losses(table, part) for part in (tokens[:CHUNK], tokens[CHUNK + 2 : 99])])
        assert result.loss == pytest.approx(losses.mean().item(), rel=1e-12)
        assert (result.num_tokens, result.num_pairs, result.num_out_of_vocabulary) == (100, len(losses), 3)
        assert result.bits_per_byte is None  # it would look better than it is

    def test_perplexities_that_no_float_holds(self) -> None:
        model = BigramLanguageModel(2, dtype=torch.float64)
        with torch.no_grad():
            model.token_embedding_table.weight.copy_(torch.tensor([[0.0, 2000.0], [2000.0, 0.0]]))
        result = evaluate(model, torch.zeros(3, dtype=torch.int64))
        assert (result.loss, result.perplexity) == (2000, math.inf)

    def test_bytes_of_a_text(self) -> None:
        text = "día 日本 \U0001f600\n" * 30
        model = BigramLanguageModel(len(set(text)))
        with pytest.raises(TypeError, match="got a text, and the model has no tokenizer"):
            evaluate(model, text)
        model.tokenizer = tokenizer = CharTokenizer.from_text(text)
        result = evaluate(model, text)
        tokens = on_device(tokenizer.encode(text))
        losses = dense_losses(model.token_embedding_table.weight.detach(), tokens)
        bits = losses.sum().item() / math.log(2) / len(text.encode())
        assert result.bits_per_byte == pytest.approx(bits, rel=1e-12)
        assert evaluate(model, tokens) == result  # decoded
        eot = int(tokenizer.encode("\n"))
        assert evaluate(model, tokens, eot=eot).num_bytes == len(text.replace("\n", "").encode())
        assert evaluate(model, tokens, num_bytes=3).num_bytes == 3
        with pytest.raises(ValueError, match="expected num_bytes > 0, got 0"):
            evaluate(model, tokens, num_bytes=0)

    def test_bytes_are_unknown_where_the_tokenizer_lacks_a_token(self) -> None:
        model = BigramLanguageModel(4)
        model.tokenizer = CharTokenizer("abc")
        assert evaluate(model, torch.tensor([0, 1, 3])).bits_per_byte is None
        assert evaluate(model, torch.tensor([0, 1, 3]), eot=3).num_bytes == 2

    def test_progress(self) -> None:
        shards = shards_of(torch.zeros(10).byte(), torch.zeros(600_000).byte())
        for per_document in (False, True):
            done: list[int] = []
            evaluate(BigramLanguageModel(3), shards, per_document=per_document, progress=done.append)
            assert sum(done) == 600_010

    def test_bad_arguments(self) -> None:
        model = BigramLanguageModel(3)
        with pytest.raises(TypeError, match="expected tokens to be a Tensor, TokenShards or a str, got float"):
            evaluate(model, 3.0)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="expected tokens to be 1-D"):
            evaluate(model, torch.zeros(2, 2, dtype=torch.int64))


def csr_of(counts: Tensor) -> Tensor:
    return BigramCounts.from_csr(counts.cpu()).to_csr()


class TestSparseCounts:
    @pytest.mark.usefixtures("small_chunks")
    def test_losses(self) -> None:
        for vocab_size, num_tokens in ((1, 5), (20, 500), (20, 3), (200, 100)):
            tokens = torch.randint(vocab_size, (num_tokens,))
            dense = functional.count_bigrams(tokens, vocab_size)
            model = BigramLanguageModel(vocab_size)
            counts = BigramCounts(vocab_size)
            counts.update(tokens.cpu())
            expected = dense_losses(model.token_embedding_table.weight.detach(), tokens).mean().item()
            optimum = conditional_entropy(tokens.tolist())
            for sparse in (counts, csr_of(dense), dense.cpu().to_sparse_coo(), dense):
                assert model.evaluate_counts(sparse) == pytest.approx(expected, rel=1e-12)
                assert optimal_loss(sparse) == pytest.approx(optimum, rel=1e-12, abs=1e-12)
            shards = shards_of(tokens[: num_tokens // 2], tokens[num_tokens // 2 :])
            halves = BigramCounts(vocab_size)
            halves.update(shards)
            assert optimal_loss(shards) == pytest.approx(optimal_loss(halves), rel=1e-12, nan_ok=True)

    def test_no_pairs(self) -> None:
        assert math.isnan(optimal_loss(BigramCounts(5)))
        assert math.isnan(BigramLanguageModel(5).evaluate_counts(BigramCounts(5)))
        with pytest.raises(RuntimeError, match=r"expected counts to be \(V, V\) with V = 5, got \(4, 4\)"):
            BigramLanguageModel(5).evaluate_counts(BigramCounts(4))

    def test_documents_of_shards(self) -> None:
        tokens = torch.tensor([1, 2, 0, 1, 2, 0, 2, 1])
        counts = BigramCounts(3, eot=0)
        counts.update(tokens.cpu())
        assert optimal_loss(shards_of(tokens, eot=0)) == pytest.approx(optimal_loss(counts), rel=1e-12)


@pytest.mark.cpu_only
class TestSmoothedModel:
    @pytest.mark.usefixtures("small_chunks")
    def test_equals_its_dense_table(self) -> None:
        tokens, held_out = torch.randint(30, (400,)), torch.randint(30, (300,))
        counts = BigramCounts(30)
        counts.update(tokens)
        model = SmoothedBigramModel.from_counts(counts)
        logits = model(torch.arange(30)[None])[0]
        assert isinstance(logits, Tensor)
        losses = dense_losses(logits[0], held_out)
        result = evaluate(model, shards_of(held_out[:100], held_out[99:]), num_bytes=700)
        assert result.loss == pytest.approx(losses.mean().item(), rel=1e-6)
        assert result.loss == pytest.approx(model.evaluate(held_out), rel=1e-12)
        assert result.bits_per_byte == pytest.approx(losses.sum().item() / math.log(2) / 700, rel=1e-6)
        seen = functional.count_bigrams(tokens, 30)[held_out[:-1], held_out[1:]] > 0
        assert result.num_unseen_pairs == int((~seen).sum()) > 0
        assert evaluate(model, tokens).num_unseen_pairs == 0

    def test_what_stands_before_its_probabilities_is_honoured(self) -> None:
        counts = BigramCounts(30)
        counts.update(tokens := torch.randint(30, (400,)))
        model = SmoothedBigramModel.from_counts(counts)
        expected = evaluate(model, tokens).loss
        model.register_forward_hook(lambda _module, _idx, output: (0 * output[0], None))
        result = evaluate(model, tokens)
        assert result.loss == pytest.approx(math.log(30), rel=1e-9)
        assert result.loss != pytest.approx(expected, rel=1e-3)
        assert result.num_unseen_pairs is None

    def test_documents_end_with_the_token_that_the_model_knows(self) -> None:
        model = SmoothedBigramModel.from_counts(torch.ones(3, 3, dtype=torch.int64))
        tokens = torch.tensor([1, 2, 0, 1, 2])
        assert evaluate(model, tokens).num_pairs == 4
        model.eot = 0  # type: ignore[assignment, unused-ignore]
        assert evaluate(model, tokens).num_pairs == 3
        assert evaluate(model, shards_of(tokens, eot=2)).num_pairs == 3
