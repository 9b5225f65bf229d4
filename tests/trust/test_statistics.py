"""The tests of make statistics find the bias they are sized for, raise no false alarm, and pass in their short form."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bigramx import functional, reference
from tests.test_multinomial import generator_that_draws
from tests.trust import goodness_of_fit, statistics
from tests.trust.statistics import ALPHA, BIAS, SOUGHT_POWER, Case, Correlations, Counts

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine several threads wait long for each other in calls as short as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CASES = [
    statistics.multinomial_cases,
    statistics.independence_cases,
    statistics.generate_cases,
    lambda: (statistics.get_batch_case(num_offsets) for num_offsets in (2, 3, 65, 1000)),
]


def failures(case: Case, bias: float) -> dict[str, float]:
    """The tests that a sampler fails when it draws as much as finds this bias."""
    short = dataclasses.replace(case, bias=bias)
    p_values, _ = statistics.examine(short, random.Random(case.name).getrandbits(63))
    return {f"{case.name}: {test}": p for test, p in p_values.items() if not p >= ALPHA}


@pytest.mark.parametrize("cases", CASES, ids=["multinomial", "independence", "generate", "get_batch"])
def test_cases(cases: Callable[[], Iterator[Case]]) -> None:
    """All but the large ones, each with a thousandth of the draws."""
    failed: dict[str, float] = {}
    for case in cases():
        failed |= failures(case, min(30 * case.bias, 0.2))
    assert failed == {}


def test_no_token_of_many_equal_ones_is_favoured() -> None:
    """Where the cumulative sums have too few bits, those of one residue modulo 3 were 0.39 % too rare."""
    view = Counts("residues", statistics.equal(48), lambda draws: draws % 48)
    options = {"sampler": "philox", "replacement": True}
    case = statistics.multinomial_case("equal weights", torch.ones(3 << 22), 1 << 22, [view], **options)  # type: ignore[arg-type]
    assert failures(case, 0.003) == {}


@pytest.mark.parametrize(("vocab_size", "weight"), [(1 << 24, 1e-15), (1 << 20, 1e-9), (1 << 12, 1e-12)])
def test_many_tiny_weights(vocab_size: int, weight: float) -> None:
    """Where every positive weight counts at least 1, they are drawn thousands of times."""
    weights = torch.full((vocab_size,), weight, dtype=torch.float64).index_fill(0, torch.tensor(0), 1)
    view = Counts("tail", statistics.tail(statistics.exact(weights)), lambda draws: (draws > 0).long())
    options = {"sampler": "philox", "replacement": True}
    case = statistics.multinomial_case("tiny weights", weights, 1 << 21, [view], **options)  # type: ignore[arg-type]
    assert failures(case, 0.02) == {}


def test_many_tiny_probabilities_of_a_table() -> None:
    """Where weights that are too small count nothing, they are never drawn."""
    assert failures(statistics.tail_of_logits_case(), 0.0015) == {}


# ---------------------------------------------------------------------------------------------- power

ONE_TOKEN = (statistics.exact(statistics.peaked(65, torch.float64)), torch.arange(65) == 0)
HALF_THE_TOKENS = (statistics.equal(8), torch.arange(8) % 2 == 0)


def simulated(probs: Tensor, size: int, times: int) -> Tensor:
    """The counts, (times, 1, C), of an ideal sampler. Their sum varies, but the tests take it as given."""
    generator = torch.Generator().manual_seed(1)
    return torch.poisson((size * probs).expand(times, 1, -1).contiguous(), generator)


@pytest.mark.parametrize("test", ["Pearson", "G"])
@pytest.mark.parametrize(("probs", "raised"), [ONE_TOKEN, HALF_THE_TOKENS], ids=["one token", "half the tokens"])
def test_a_bias_of_a_thousandth_is_found(probs: Tensor, raised: Tensor, test: str) -> None:
    """With the power that the non-central chi-square promises; and what is not biased is not found."""
    degrees, times = probs.size(1) - 1, 4000
    biased = goodness_of_fit.planted(probs[0], raised, BIAS)
    assert float(biased.sum()) == pytest.approx(1)
    size = statistics.samples_needed(BIAS, degrees)
    promised = goodness_of_fit.power(size * goodness_of_fit.effect(probs[0], biased), degrees, ALPHA)
    assert promised == pytest.approx(SOUGHT_POWER, abs=0.001)
    found = goodness_of_fit.p_values(simulated(biased, size, times), probs)[test] < ALPHA
    assert found.double().mean() > 0.99
    assert abs(found.double().mean() - promised) < 5 * (promised * (1 - promised) / times) ** 0.5
    assert not (goodness_of_fit.p_values(simulated(probs[0], size, times), probs)[test] < ALPHA).any()


@pytest.mark.parametrize(("probs", "raised"), [ONE_TOKEN, HALF_THE_TOKENS], ids=["one token", "half the tokens"])
def test_a_sampler_with_that_bias_is_found(probs: Tensor, raised: Tensor) -> None:
    biased = goodness_of_fit.planted(probs[0], raised, BIAS)
    view = Counts("tokens", probs)
    case = statistics.multinomial_case("planted", biased, statistics.CALL, [view], sampler="philox", replacement=True)
    assert failures(case, BIAS).keys() >= {"multinomial, philox, planted: tokens, Pearson"}


def test_power_by_known_values() -> None:
    """The central chi-square and the normal distribution, from tables."""
    assert goodness_of_fit.chi_square_bound(0.05, 1) == pytest.approx(3.841, abs=5e-4)
    assert goodness_of_fit.chi_square_bound(0.001, 100) == pytest.approx(149.449, abs=5e-4)
    assert goodness_of_fit.power(0, 7, 0.01) == pytest.approx(0.01)
    assert goodness_of_fit.power((1.959964 + 1.281552) ** 2, 1, 0.05) == pytest.approx(0.9, abs=1e-5)
    assert goodness_of_fit.samples_needed(0.5, 1, 0.05, 0.9) == pytest.approx(21, abs=1)


# ---------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("shape", [(1, 2), (1, 16), (4, 8)], ids=str)
def test_p_values_of_an_ideal_sampler_are_uniform(shape: tuple[int, int]) -> None:
    """Of one that draws by a float64 cumulative sum; to within the bound of Dvoretzky, Kiefer, Wolfowitz, Massart."""
    times, size = 250, 1200 * shape[1]
    probs = torch.full(shape, 1 / shape[1], dtype=torch.float64)
    sums, cells = probs[0].cumsum(0), shape[0] * shape[1]
    uniforms = torch.rand(times, shape[0], size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = torch.searchsorted(sums, uniforms, right=True)
    places = torch.arange(times)[:, None, None] * cells + torch.arange(shape[0])[:, None] * shape[1]
    counts = torch.bincount((tokens + places).flatten(), minlength=times * cells).view(times, *shape)
    for test, p in goodness_of_fit.p_values(counts, probs).items():
        ranks = torch.arange(1, times + 1) / times
        excess = ranks - p.sort().values  # where small p-values are too frequent
        if test in ("Pearson", "G"):
            excess = excess.abs()
        assert 2 * torch.exp(-2 * times * excess.max().clamp(min=0) ** 2) > 1e-4, test


def test_tails_are_not_too_heavy() -> None:
    """At 10^-3, where 10^5 simulations can see it, with as few expected in a cell as are allowed."""
    probs = torch.tensor([[0.998, 0.001, 0.001]], dtype=torch.float64)
    table = goodness_of_fit.p_values(simulated(probs[0], 10**6 + 10**5, 10**5), probs)
    for p in table.values():
        assert (p < 1e-3).sum() < 150


def test_rare_and_impossible_tokens_are_found() -> None:
    probs = torch.tensor([[0.0, 1e-12, 1e-9, 1 - 1e-9 - 1e-12]], dtype=torch.float64)
    counts = torch.tensor([[[0, 0, 0, 10**9]], [[1, 0, 0, 10**9]], [[0, 3, 0, 10**9]], [[0, 1, 20, 10**9]]])
    sound, impossible, rare, rarer = goodness_of_fit.p_values(counts, probs)["rare"].tolist()
    assert sound > 0.5
    assert impossible == 0
    assert rare == pytest.approx(0.16, abs=0.01)
    assert rarer < ALPHA


def test_poissons_p_value_is_exact() -> None:
    mean = torch.tensor(5.0, dtype=torch.float64)
    k = torch.arange(30, dtype=torch.float64)
    mass = (k * mean.log() - mean - torch.lgamma(k + 1)).exp()
    below, above = mass.cumsum(0), mass.flip(0).cumsum(0).flip(0)
    expected = (2 * torch.minimum(below, above)).clamp(max=1)
    torch.testing.assert_close(goodness_of_fit.poisson_p_value(k, mean), expected, atol=1e-9, rtol=0)


# ------------------------------------------------------------------------------- exact distributions


def test_draws_without_replacement() -> None:
    """All orders of four by enumeration, and what is among the first by both ways."""
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    joint = goodness_of_fit.without_replacement(probs, 4).view(4, 4, 4, 4)
    for order in itertools.permutations(range(4)):
        left, chance = 1.0, 1.0
        for token in order:
            chance *= float(probs[token]) / left
            left -= float(probs[token])
        assert float(joint[order]) == pytest.approx(chance)
    assert float(joint.sum()) == pytest.approx(1)
    for length in (1, 2, 3):
        first = goodness_of_fit.without_replacement(probs, length).view([4] * length)
        among = [float(sum(first[k] for k in itertools.product(range(4), repeat=length) if i in k)) for i in range(4)]
        assert goodness_of_fit.inclusion(probs, length).tolist() == pytest.approx(among, abs=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}], ids=str)
def test_filters(options: dict[str, float]) -> None:
    logits = torch.randn(50, 10, dtype=torch.float64)
    expected = reference.filter_logits(logits, **options).softmax(-1)  # type: ignore[arg-type]
    torch.testing.assert_close(goodness_of_fit.filtered(logits, **options), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "advantage"), [(torch.bfloat16, 0.0065), (torch.float16, 0.0008)], ids=str)
def test_the_race_in_16_bits(dtype: torch.dtype, advantage: float) -> None:
    """Against torch.multinomial, whose ties favour the first of equal tokens over the last."""
    probs = torch.ones(20, dtype=dtype)
    expected = goodness_of_fit.race(probs)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-6)
    assert float(expected[0] / expected[-1]) == pytest.approx(1 + advantage, abs=1e-4)
    samples = torch.multinomial(probs.expand(300_000, -1), 1, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(samples[:, 0], minlength=20)[None]
    assert min(p.item() for p in goodness_of_fit.p_values(counts, expected[None]).values()) > 1e-3


# -------------------------------------------------------------------------------------- planted faults


def uniform_tokens(generator: torch.Generator) -> Tensor:
    """(512, 512) of four, independent."""
    return torch.randint(4, (512, 512), generator=generator)


def copied(shift: tuple[int, int]) -> Callable[[torch.Generator], Tensor]:
    """The same, of which one in thirty repeats the one that is ``shift`` before it."""

    def draw(generator: torch.Generator) -> Tensor:
        tokens = uniform_tokens(generator)
        is_copy = torch.rand(tokens.shape, generator=generator) < 1 / 30
        return torch.where(is_copy, tokens.roll(shift, (0, 1)), tokens)

    return draw


@pytest.mark.parametrize(
    ("shift", "found"),
    [((0, 1), "steps 1"), ((0, 64), "steps 64"), ((2, 0), "rows 2"), ((0, 37), "lags"), ((0, 0), "")],
)
def test_dependent_draws_are_found(shift: tuple[int, int], found: str) -> None:
    probs = statistics.equal(4)
    views = statistics.pair_views(probs, {"rows": (0, (1, 2, 3)), "steps": (1, (1, 2, 64))})
    case = Case("planted", copied(shift), [*views, Correlations("lags", statistics.scores_of(probs))])
    tests = {test.removeprefix("planted: ")[: len(found)] for test in failures(case, 0.02)}
    assert found in tests if found else tests == set()


def test_draws_without_replacement_from_the_wrong_weights_are_found() -> None:
    """Each draw after the first from weights that are 5 % more even than they should be."""
    weights = torch.arange(1, 31).double()

    def draw(generator: torch.Generator, exponent: float) -> Tensor:
        noise = -torch.rand(4096, 30, dtype=torch.float64, generator=generator).log()
        times = noise / weights**exponent
        first = (noise / weights).argmin(-1, keepdim=True)
        samples = torch.cat((first, times.scatter(1, first, torch.inf).argsort(-1)[:, :19]), dim=1)
        return goodness_of_fit.rosenblatt(samples, weights, generator)

    view = Counts("draws", statistics.equal(16), lambda uniforms: (uniforms * 16).long())
    assert failures(Case("planted", lambda generator: draw(generator, 0.95), [view]), 0.01)
    assert not failures(Case("sound", lambda generator: draw(generator, 1.0), [view]), 0.01)


def test_the_keys_of_philox_are_those_that_are_set() -> None:
    for key in (0, 1, 2**52 + 12345):
        assert reference._draw_seed(generator_that_draws([key])) == key


# ------------------------------------------------------------------------------------------- the target


def planted_case(name: str, is_biased: Callable[[int], bool]) -> Case:
    """A coin that falls on one side in 60 % of the throws, under the seeds that are named."""
    fair, unfair = torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4])

    def draw(generator: torch.Generator) -> Tensor:
        probs = unfair if is_biased(generator.initial_seed()) else fair
        return functional.multinomial(probs, 1000, True, generator=generator)

    return Case(name, draw, [Counts("tokens", statistics.equal(2))], bias=0.1)


def test_the_target_reports_what_falls_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = random.Random("1 unlucky").getrandbits(63)
    monkeypatch.setattr(
        statistics,
        "cases",
        lambda: [
            planted_case("fair", lambda _: False),
            planted_case("unfair", lambda _: True),
            planted_case("unlucky", lambda seed: seed == once),
        ],
    )
    tried, findings = statistics.run(None, seed=1, only="")
    assert tried["cases"] == 3
    assert tried["tests"] == 12
    assert tried["samples"] > 2 * 10 * statistics.samples_needed(0.1, 1)
    assert {finding.partition(":")[0] for finding in findings} == {"unfair"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("FOUND") for line in lines] == [False, True, False]
    assert statistics.run(None, seed=1, only="fair")[1] == findings
    with pytest.raises(AssertionError, match="no case has 'dice'"):
        statistics.run(None, seed=1, only="dice")


def test_the_target_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "cases", lambda: [planted_case("fair", lambda _: False)])
    tried, findings = statistics.run(0.2, seed=1, only="")
    assert tried["cases"] > 1
    assert findings == []
