"""philox.h and fixed_point_cdf.h, compiled on their own, match known answers and the reference bit for bit."""

from __future__ import annotations

import os
import shutil
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
#include "sampling/fixed_point_cdf.h"

int main() {
    using namespace bigramx;
    char kind;
    while (scanf(" %c", &kind) == 1) {
        if (kind == 'p') {
            unsigned long long seed, sequence, counter;
            scanf("%llu %llu %llu", &seed, &sequence, &counter);
            const Philox philox(seed, sequence, counter);
            for (const uint32_t word : philox.words) printf("%u ", word);
        } else if (kind == 'l') {
            float logit;
            scanf("%f", &logit);
            printf("%u ", weight_of_logit(logit));
        } else {
            double prob, largest;
            scanf("%lf %lf", &prob, &largest);
            printf("%u ", weight_of_prob(prob, ProbScale<double>(largest)));
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


def test_weights_of_logits(program: Path) -> None:
    logits = torch.cat((torch.tensor([0.0, -1e-8, -22.0, -25.0, -1e30, float("-inf")]), -30 * torch.rand(20_000)))
    assert (
        run(program, [f"l {logit.hex()}" for logit in logits.tolist()]) == reference.weights_of_logits(logits).tolist()
    )


def test_weights_of_logits_are_exponentials() -> None:
    logits = torch.cat((torch.zeros(1), -22 * torch.rand(100_000)))
    exact = logits.double().exp() * 2**30
    assert ((reference.weights_of_logits(logits) - exact).abs() <= 0.5 + 2 * 2**-24 * exact).all()


@pytest.mark.parametrize("largest", [1.0, 0.3, 5e-324, 1e-310, 1e300])
def test_weights_of_probs(program: Path, largest: float) -> None:
    shares = torch.cat((torch.tensor([1.0, 0.0, 1e-12]), torch.rand(1000) ** 8)).double()
    probs = shares * largest
    actual = run(program, [f"w {prob.hex()} {largest.hex()}" for prob in probs.tolist()])
    assert actual == reference.weights_of_probs(probs).tolist()
    assert actual[0] >= 2**29
    assert all((weight > 0) == (prob > 0) for weight, prob in zip(actual, probs.tolist(), strict=True))
