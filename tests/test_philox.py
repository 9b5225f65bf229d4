"""philox.h and fixed_point_cdf.h, compiled on their own, match known answers and the reference bit for bit."""

from __future__ import annotations

import bisect
import itertools
import math
import os
import random
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from bigramx import reference
from tests import processes

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
KNOWN_ANSWERS = [  # from Random123's kat_vectors: (key, sequence, counter, words)
    (0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (2**64 - 1, 2**64 - 1, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (  # the digits of pi
        0x299F31D0A4093822,
        0x0370734413198A2E,
        0x85A308D3243F6A88,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
PROGRAM = """
#include <cstdio>
#include <vector>
#include "sampling/fixed_point_cdf.h"

int main() {
    using namespace bigramx;
    unsigned long long seed, sequence, position, count, r;
    float logit;
    double prob, largest;
    char kind;
    while (scanf(" %c", &kind) == 1) {
        if (kind == 'p') {
            scanf("%llu %llu %llu", &seed, &sequence, &position);
            const Philox philox(seed, sequence, position);
            for (const uint32_t word : philox.words) printf("%u ", word);
        } else if (kind == 'd') {
            scanf("%llu %llu %llu", &seed, &sequence, &position);
            printf("%llu ", (unsigned long long)draw(seed, sequence, position));
        } else if (kind == 'l') {
            scanf("%f", &logit);
            printf("%llu ", (unsigned long long)round_down(scaled_exponential(logit)));
        } else if (kind == 'w') {
            scanf("%lf %lf", &prob, &largest);
            printf("%llu ", (unsigned long long)round_down(ProbScale<double>(largest).scaled(prob)));
        } else {  // the token that r draws from `count` weights, and the CDF
            scanf("%llu %llu", &r, &count);
            std::vector<WeightSum> sums(count);
            for (size_t j = 0; j < count; ++j) {
                scanf("%llu", &seed);
                sums[j] = (j > 0 ? sums[j - 1] : 0) + seed;
            }
            const FixedPointCdf cdf(sums.back());
            size_t token = 0;
            while (sums[token] < cdf.target_sum(r)) ++token;
            printf("%zu ", token);
            for (const WeightSum sum : sums) printf("%llu ", (unsigned long long)cdf.cdf(sum));
        }
    }
}
"""


@pytest.mark.parametrize(("key", "sequence", "counter", "words"), KNOWN_ANSWERS)
def test_known_answers_of_the_reference(key: int, sequence: int, counter: int, words: list[int]) -> None:
    signed = sequence - 2**64 if sequence >= 2**63 else sequence
    for k, word in enumerate(words):
        assert int(reference.philox(key, torch.tensor(signed), 4 * counter + k)) == word


@pytest.fixture(scope="module", params=["-O0", "-O3 -march=native"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the second flags, the compiler may fuse products and sums where the processor can."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("philox")
    (folder / "main.cpp").write_text(PROGRAM)
    flags = [*request.param.split(), "-std=c++17", "-Wall", "-Wextra", f"-I{CSRC}"]
    processes.run([COMPILER, *flags, "main.cpp", "-o", "main", "-lm"], cwd=folder, check=True)
    return folder / "main"


def run(program: Path, lines: list[str]) -> list[int]:
    result = processes.run([program], input="\n".join(lines), check=True)
    return [int(word) for word in result.stdout.split()]


def test_known_answers_of_the_header(program: Path) -> None:
    lines = [f"p {key} {sequence} {counter}" for key, sequence, counter, _ in KNOWN_ANSWERS]
    assert run(program, lines) == [word for *_, words in KNOWN_ANSWERS for word in words]


def test_draws(program: Path) -> None:
    """The high bits from the sequence, the low ones from that with the top bit set."""
    keys = [(0, 0, 0), (2**64 - 1, 2**63 - 1, 2**63 - 1), (5, 7, 1), (5, 7, 2**40 + 6)]
    actual = run(program, [f"d {seed} {sequence} {position}" for seed, sequence, position in keys])
    assert actual == [int(reference.draws(seed, torch.tensor(seq), position)) for seed, seq, position in keys]
    signed = torch.tensor(7 - 2**63)
    high, low = (int(reference.philox(5, sequence, 1)) for sequence in (torch.tensor(7), signed))
    assert actual[2] == (high >> 1) * 2**32 + low


def test_weights_of_logits(program: Path) -> None:
    rare = [0.0, -1e-8, -22.0, -38.1, -38.2, -39.0, -1e30, float("-inf")]
    logits = torch.cat((torch.tensor(rare), -42 * torch.rand(20_000)))
    assert (
        run(program, [f"l {logit.hex()}" for logit in logits.tolist()]) == reference.weights_of_logits(logits).tolist()
    )


@pytest.mark.parametrize("lowest", [-1.0, -22.0, -38.0, -100.0])
def test_weights_of_logits_are_exponentials(lowest: float) -> None:
    logits = torch.cat((torch.zeros(1), lowest * torch.rand(100_000)))
    exact = logits.double().exp() * 2**55
    assert ((reference.weights_of_logits(logits) - exact).abs() <= 1 + 2 * 2**-24 * exact).all()


@pytest.mark.parametrize("largest", [1.0, 0.3, 5e-324, 1e-310, 1e300])
def test_weights_of_probs(program: Path, largest: float) -> None:
    shares = torch.cat((torch.tensor([1.0, 0.0, 1e-12, 1e-17, 1e-30]), torch.rand(1000) ** 8)).double()
    probs = shares * largest
    actual = run(program, [f"w {prob.hex()} {largest.hex()}" for prob in probs.tolist()])
    assert actual == reference.weights_of_probs(probs).tolist()
    scale = Fraction(2) ** (55 - math.frexp(largest)[1])
    assert actual == [math.floor(Fraction(prob) * scale) for prob in probs.tolist()]
    assert 2**54 <= actual[0] <= 2**55


def test_shares_of_totals() -> None:
    numbers = [0, 1, 2, 2**31 - 1, 2**31, 2**32 + 1, 2**62 - 1, 2**62, 2**63 - 1]
    numbers += (torch.randint(2**63 - 1, (100,)) >> torch.randint(63, (100,))).tolist()
    r = torch.tensor(numbers)
    actual = reference.share_of_total(r[:, None], r)
    assert actual.tolist() == [[a * b >> 63 for b in numbers] for a in numbers]


def rows_of_weights() -> list[list[int]]:
    """With totals of 55 to 70 bits."""
    largest, tiny = 2**55, [0, 1, 2, 0, 3]
    return [
        [largest],
        [0, largest, 0],
        [largest, *tiny],
        [*tiny, 2**54],
        [largest - k for k in range(300)],
        [1] * 1000 + [largest] * 40_000 + tiny,
        torch.randint(2**55, (1000,)).tolist(),
    ]


@pytest.mark.parametrize("weights", rows_of_weights(), ids=lambda weights: str(len(weights)))
def test_tokens_of_draws(program: Path, weights: list[int]) -> None:
    """By the formula in Python's integers; at the bounds of each token, and in between."""
    sums = list(itertools.accumulate(weights))
    shift = max(sums[-1].bit_length() - 63, 0)
    cdf = [total >> shift for total in sums]
    assert reference.fixed_point_cdf(torch.tensor(weights)).tolist() == cdf
    bounds = [-(-total * 2**63 // cdf[-1]) for total in random.Random(1).sample(cdf, min(len(cdf), 20))]
    draws = [r for bound in bounds for r in (bound - 1, bound) if 0 <= r < 2**63] + [0, 2**62 + 1, 2**63 - 1]
    expected = [bisect.bisect_right(cdf, r * cdf[-1] >> 63) for r in draws]
    assert reference.tokens_of_draws(torch.tensor(weights), torch.tensor(draws)).tolist() == expected
    for r, token in list(zip(draws, expected, strict=True))[:: 1 + len(weights) // 2000]:
        assert weights[token] > 0
        assert run(program, [f"c {r} {len(weights)} " + " ".join(map(str, weights))]) == [token, *cdf]


def rows_of_probs() -> dict[str, torch.Tensor]:
    """Rows that coarse weights would distort."""
    generator = torch.Generator().manual_seed(1)
    zeros, uniform = torch.zeros(2**18, dtype=torch.float64), torch.rand(2**18, generator=generator).double()
    return {
        "one": zeros.index_fill(0, torch.tensor(77), 1e-30),
        "a long tail": (zeros + 1e-15).index_fill(0, torch.tensor(77), 1),
        "equal": zeros + 1,
        "3 * 2^16 equal": zeros.index_fill(0, torch.arange(3 * 2**16), 0.1),
        "uniform": uniform,
        "all magnitudes": torch.exp2(-1000 * uniform),
        "of two magnitudes": torch.where(uniform < 0.5, uniform, uniform * 2**-31),
    }


def total_variation(probs: torch.Tensor, cdf: torch.Tensor) -> float:
    """Between probabilities and what a fixed-point CDF draws, in float64."""
    drawn = cdf.diff(prepend=torch.zeros(1, dtype=torch.int64)).double() / int(cdf[-1])
    return float((drawn - probs / probs.sum()).abs().sum() / 2)


@pytest.mark.parametrize("name", rows_of_probs())
def test_the_distribution_of_probs(name: str) -> None:
    probs = rows_of_probs()[name]
    cdf = reference.fixed_point_cdf(reference.weights_of_probs(probs))
    assert total_variation(probs, cdf) <= len(probs) * 2**-54 + 1e-14
    single = probs.float()
    cdf = reference.fixed_point_cdf(reference.weights_of_probs(single))
    assert total_variation(single.double(), cdf) <= len(probs) * 2**-54 + 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", rows_of_probs())
def test_the_distribution_of_logits(name: str, dtype: torch.dtype) -> None:
    """To the accuracy of float32, also of all tokens but the likeliest together."""
    logits = rows_of_probs()[name].log().clamp(min=-60000).to(dtype)
    cdf = reference.fixed_point_cdf(reference.weights_of_logits(logits))
    probs = logits.double().softmax(-1)
    assert total_variation(probs, cdf) < 1e-6
    weights, others = reference.weights_of_logits(logits).double(), probs < probs.amax()
    drawn, expected = weights.where(others, 0).sum() / weights.sum(), probs.where(others, 0).sum()
    assert abs(drawn - expected) <= 1e-5 * expected + len(probs) * 2**-54
