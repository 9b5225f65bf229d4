"""functional.interpolated_bigram and interpolated_bigram_generate: their twins, and the probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, library

from bigramx import SmoothedBigramModel, functional, reference
from tests.interrupts import call_until_handled, call_with_handlers

pytestmark = pytest.mark.cpu_only

generate = functional.interpolated_bigram_generate
OPS = torch.ops.bigramx
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.5},
    {"temperature": 2},
    {"temperature": 0.003},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.02},
]


def some_model(vocab_size: int = 60, dtype: torch.dtype = torch.float32, method: Any = "kneser-ney") -> Parts:
    """With rows of all sizes, tokens that never occur, and equal probabilities."""
    generator = torch.Generator().manual_seed(3)
    weights = 1 / torch.arange(1, vocab_size - 3) ** 1.2
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.int64)
    tokens = torch.multinomial(weights, 30 * vocab_size, replacement=True, generator=generator)
    counts.index_put_((tokens[:-1], tokens[1:]), torch.tensor(1), accumulate=True)
    counts[0, :-2] += 1  # nearly all
    return SmoothedBigramModel.from_counts(counts, method).to(dtype)._parts()


def dense(parts: Parts) -> Tensor:
    """(V, V) float64."""
    crow, columns, pair_probs, backoff, unigram = parts
    own = torch.zeros(len(unigram), len(unigram), dtype=torch.float64)
    rows = torch.arange(len(unigram)).repeat_interleave(crow.diff())
    own[rows, columns.long()] = pair_probs.double()
    return own + backoff.double()[:, None] * unigram.double()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------ probabilities of pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_order", [True, False])
def test_equals_the_twin(dtype: torch.dtype, in_order: bool) -> None:
    parts = some_model(300, dtype)
    idx, targets = torch.cartesian_prod(torch.arange(300), torch.arange(300)).T.contiguous()
    if not in_order:
        order = torch.randperm(len(idx))
        idx, targets = idx[order], targets[order]
    probs, is_seen = functional.interpolated_bigram(idx, targets, *parts)
    assert probs.dtype == torch.float64
    assert torch.equal(probs, dense(parts)[idx, targets])
    for made, expected in zip((probs, is_seen), reference.interpolated_bigram(idx, targets, *parts), strict=True):
        assert torch.equal(made, expected)


def test_shapes_and_dtypes_of_tokens() -> None:
    parts = some_model()
    idx, targets = torch.randint(60, (2, 3, 4)), torch.randint(60, (2, 3, 4))
    expected = functional.interpolated_bigram(idx, targets, *parts)
    for made in (
        functional.interpolated_bigram(idx.int(), targets, *parts),
        functional.interpolated_bigram(idx.transpose(0, 2), targets.int().transpose(0, 2), *parts),
    ):
        assert torch.equal(made[0].sort().values.flatten().sort().values, expected[0].flatten().sort().values)
    empty = functional.interpolated_bigram(idx[:0], targets[:0], *parts)
    assert [tuple(made.shape) for made in empty] == [(0, 3, 4)] * 2


@pytest.mark.parametrize("name", ["idx", "targets"])
@pytest.mark.parametrize("token", [-1, 60, 2**40])
def test_tokens_out_of_range(name: str, token: int) -> None:
    tokens = {"idx": torch.zeros(5000, dtype=torch.int64), "targets": torch.zeros(5000, dtype=torch.int64)}
    tokens[name][[3500, 4000]] = token
    with pytest.raises(IndexError, match=f"{name} holds {token} at position 3500, expected 0 <= {name} < 60"):
        functional.interpolated_bigram(tokens["idx"], tokens["targets"], *some_model())


def changed(parts: Parts, position: int, value: Tensor) -> Parts:
    made = list(parts)
    made[position] = value
    return (made[0], made[1], made[2], made[3], made[4])


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda crow: crow[:-1], r"expected crow_indices to be 1-D of size 61"),
        (0, lambda crow: crow.int(), r"expected crow_indices to have one of the dtypes"),
        (1, lambda columns: columns.long(), r"expected col_indices to have one of the dtypes"),
        (2, lambda probs: probs[1:], r"expected pair_probs to be 1-D of size"),
        (2, lambda probs: probs.double(), r"expected pair_probs to have one of the dtypes"),
        (3, lambda backoff: backoff[None], r"expected backoff to be 1-D of size 60"),
        (4, lambda unigram: unigram.half(), r"expected unigram to have one of the dtypes"),
        (4, lambda unigram: unigram[:59], r"expected crow_indices to be 1-D of size 60"),
    ],
)
def test_parts_that_do_not_fit(position: int, change: Any, message: str) -> None:
    parts = some_model()
    wrong = changed(parts, position, change(parts[position]))
    idx = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=message):
        functional.interpolated_bigram(idx, idx, *wrong)
    with pytest.raises(RuntimeError, match=message):
        functional.interpolated_bigram_generate(idx, *wrong, 3)


def test_gradients_are_those_of_plain_pytorch() -> None:
    crow, columns, *probs = some_model(dtype=torch.float64)
    pair_probs, backoff, unigram = (part.requires_grad_() for part in probs)
    idx, targets = torch.randint(60, (2, 50))
    made, _is_seen = functional.interpolated_bigram(idx, targets, crow, columns, pair_probs, backoff, unigram)
    grads = torch.autograd.grad(made.log().sum(), (pair_probs, backoff, unigram))
    assert all(grad.abs().sum() > 0 for grad in grads)
    with pytest.raises(RuntimeError, match="not to require a gradient"):
        OPS.interpolated_bigram(idx, targets, crow, columns, pair_probs, backoff, unigram)
    with torch.no_grad():
        OPS.interpolated_bigram(idx, targets, crow, columns, pair_probs, backoff, unigram)


def test_targets_of_another_shape() -> None:
    idx = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected targets to have the shape of idx, \[3\], got \[2\]"):
        functional.interpolated_bigram(idx, idx[:2], *some_model())


# --------------------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*[(options, torch.float32) for options in OPTIONS], *[(options, torch.float64) for options in OPTIONS[::4]]],
    ids=str,
)
def test_generates_what_the_twin_does(options: dict[str, Any], dtype: torch.dtype) -> None:
    parts = some_model(dtype=dtype)
    idx = torch.tensor([[0, 59], [7, 3], [5, 0]])
    tokens = functional.interpolated_bigram_generate(idx, *parts, 30, **options, generator=seeded(5))
    expected = reference.interpolated_bigram_generate(idx, *parts, 30, **options, generator=seeded(5))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("method", ["add-k", "witten-bell", "absolute-discounting"])
def test_of_all_methods(method: str) -> None:
    parts = some_model(method=method)
    idx = torch.tensor([[0], [59]])
    several: list[dict[str, Any]] = [{}, {"top_p": 0.8}, {"top_k": 20, "temperature": 0.7}]
    for options in several:
        tokens = functional.interpolated_bigram_generate(idx, *parts, 20, **options, generator=seeded(6))
        expected = reference.interpolated_bigram_generate(idx, *parts, 20, **options, generator=seeded(6))
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("stop", [None, 0, [4, 0, 17], []])
def test_stop(stop: Any) -> None:
    parts = some_model()
    idx = torch.tensor([[1], [2], [3]])
    tokens = functional.interpolated_bigram_generate(idx, *parts, 60, stop=stop, generator=seeded(7))
    expected = reference.interpolated_bigram_generate(idx, *parts, 60, stop=stop, generator=seeded(7))
    assert torch.equal(tokens, expected)
    assert (tokens.size(1) < 61) == (stop not in (None, []))
    no_tokens = functional.interpolated_bigram_generate(idx[:0], *parts, 60, stop=stop)
    assert no_tokens.shape == reference.interpolated_bigram_generate(idx[:0], *parts, 60, stop=stop).shape


def test_same_tokens_for_any_threads_and_splits() -> None:
    parts = some_model(500)
    idx = torch.randint(500, (3, 1))
    before = torch.get_num_threads()
    made = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            made.append(functional.interpolated_bigram_generate(idx, *parts, 40000, generator=seeded(8)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    shorter = functional.interpolated_bigram_generate(idx[:2], *parts, 30000, generator=seeded(8))
    assert torch.equal(made[0][:2, :30001], shorter)


@pytest.mark.parametrize("options", [option for option in OPTIONS if option.get("temperature") != 0], ids=str)
def test_follows_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square of the next tokens, row by row, against what filter_logits makes of the logarithms."""
    parts = some_model(24)
    chains = 60000
    for row in (0, 3, 23):
        idx = torch.full((chains, 1), row)
        drawn = functional.interpolated_bigram_generate(idx, *parts, 1, **options, generator=seeded(9))[:, 1]
        numbers = torch.bincount(drawn, minlength=24).double()
        expected = chains * reference.filter_logits(dense(parts)[row].log(), **options).softmax(0)
        assert (numbers[expected == 0] == 0).all()
        is_often = expected >= 5
        statistic = ((numbers - expected) ** 2 / expected)[is_often].sum()
        degrees = int(is_often.sum()) - 1
        assert statistic < degrees + 6 * max(2 * degrees, 1) ** 0.5 + 6  # far beyond what chance makes


def test_a_token_that_has_no_probability_is_never_drawn() -> None:
    crow, columns = torch.tensor([0, 2, 3, 3]), torch.tensor([0, 2, 1], dtype=torch.int32)
    parts = (crow, columns, torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0]))
    tokens = functional.interpolated_bigram_generate(torch.tensor([[0]]), *parts, 3000, generator=seeded(1))
    ends = (tokens[0] == 1).nonzero()[0]
    assert set(tokens[0, :ends].tolist()) == {0, 2}
    assert (tokens[0, ends:] == 1).all()


def test_draws_nothing_for_temperature_0() -> None:
    parts = some_model()
    generator = seeded(1)
    before = generator.get_state()
    tokens = functional.interpolated_bigram_generate(
        torch.tensor([[2]]), *parts, 20, temperature=0, generator=generator
    )
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(tokens[0, 1:], dense(parts).argmax(1)[tokens[0, :-1]])


@pytest.mark.parametrize(
    ("position", "index", "value"),
    [
        (1, 0, -1),
        (1, 0, 60),
        (2, 0, float("nan")),
        (2, 0, -0.5),
        (2, 0, float("inf")),
        (3, 0, float("nan")),
        (3, 0, -1.0),
    ],
)
def test_a_row_that_is_not_a_distribution_raises_when_reached(position: int, index: int, value: float) -> None:
    parts = some_model()
    wrong = changed(parts, position, parts[position].clone())
    wrong[position][index] = value
    with pytest.raises(
        RuntimeError, match=r"probability tensor contains either `inf`, `nan` or element < 0: row 0 of pair_probs"
    ):
        functional.interpolated_bigram_generate(torch.tensor([[0]]), *wrong, 5)


@pytest.mark.parametrize(("index", "value"), [(0, 1), (4, -5), (4, 2**50), (60, 0), (60, 10**6)])
def test_rows_that_do_not_follow_each_other(index: int, value: int) -> None:
    parts = some_model()
    wrong = changed(parts, 0, parts[0].clone())
    wrong[0][index] = value
    idx = torch.tensor([[0]])
    for call in (lambda: functional.interpolated_bigram(idx, idx, *wrong), lambda: generate(idx, *wrong, 5)):
        with pytest.raises(RuntimeError, match="expected crow_indices to ascend from 0 to"):
            call()


def test_a_unigram_that_is_not_a_distribution() -> None:
    parts = some_model()
    wrong = changed(parts, 4, parts[4].clone())
    wrong[4][3] = float("nan")
    with pytest.raises(RuntimeError, match=r"expected unigram to be finite and >= 0, got nan at position 3"):
        functional.interpolated_bigram_generate(torch.tensor([[0]]), *wrong, 5)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "expected temperature", {"temperature": -1}),
        (ValueError, "expected top_k", {"top_k": 0}),
        (ValueError, "top_p", {"top_p": 0}),
        (ValueError, "min_p", {"min_p": 2}),
        (ValueError, "stop", {"stop": 60}),
        (TypeError, "top_k", {"top_k": "1"}),
        (TypeError, "stop", {"stop": "a"}),
    ],
)
def test_options_out_of_range(error: type[Exception], match: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        functional.interpolated_bigram_generate(torch.tensor([[0]]), *some_model(), 5, **options)


def test_prompts() -> None:
    parts = some_model()
    with pytest.raises(IndexError, match="index out of range: idx holds 60 at position 1"):
        functional.interpolated_bigram_generate(torch.tensor([[0, 60]]), *parts, 5)
    with pytest.raises(IndexError, match="at least one token"):
        functional.interpolated_bigram_generate(torch.zeros(2, 0, dtype=torch.int64), *parts, 5)
    with pytest.raises(RuntimeError, match="2-D"):
        functional.interpolated_bigram_generate(torch.tensor([0]), *parts, 5)
    with pytest.raises(ValueError, match="max_new_tokens"):
        functional.interpolated_bigram_generate(torch.tensor([[0]]), *parts, -1)
    none = functional.interpolated_bigram_generate(torch.zeros(0, 3, dtype=torch.int64), *parts, 5)
    assert none.shape == (0, 8)


@pytest.mark.once
def test_a_handler_runs_and_may_raise() -> None:
    parts = some_model(500)
    idx = torch.tensor([[1]])

    def chain(size: int) -> Callable[[], Tensor]:
        num_tokens = size * 2 * 10**7
        return partial(functional.interpolated_bigram_generate, idx, *parts, num_tokens, generator=seeded(1))

    tokens, size = call_until_handled(chain)
    assert torch.equal(tokens, chain(size)())

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_with_handlers(chain(20 * size), interrupt)


# ----------------------------------------------------------------------------------------------------- as PyTorch's ops


@pytest.mark.once
@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_opcheck() -> None:
    parts, idx = some_model(), torch.tensor([[0, 3], [59, 2]])
    library.opcheck(OPS.interpolated_bigram.default, (idx, idx.flip(0), *parts))
    for stop in ([], [2]):
        arguments = (idx, *parts, 4, 0.0, None, None, None, stop)
        library.opcheck(OPS.interpolated_bigram_generate.default, arguments)
