"""Tests of goodness of fit, their power, and the exact distributions that draws are held to; all in float64.

Pearson's chi-square and the G test (likelihood ratio) are asymptotic. Cochran's rule, at least 5 expected in each cell,
is made for levels of 5 %; at 10^-7 the tail of a Poisson variable of mean m is about exp(z^3 / (6 sqrt(m))) times that
of the normal one, z = 5.2. So cells with fewer than 1000 expected are merged into one, where that factor is 2; and
where even that cell is too rare, its count is held to Poisson's distribution, which is exact for rare events (and
conservative for others). The other tests are exact bounds: a token of probability zero never occurs; the Dvoretzky-
Kiefer-Wolfowitz inequality with Massart's constant bounds the Kolmogorov-Smirnov statistic of any distribution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_EXPECTED = 1000


def chi_square_tail(statistic: Tensor, degrees: Tensor) -> Tensor:
    """The probability that chi-square of these degrees of freedom is above the statistic; 1 without freedom."""
    tail = torch.special.gammaincc(degrees.double().clamp(min=1) / 2, statistic.double() / 2)
    return torch.where(degrees > 0, tail, 1.0)


def chi_square_bound(alpha: float, degrees: int) -> float:
    """The statistic that chi-square is above with probability alpha, by bisection."""
    low, high = 0.0, degrees + 100 * math.sqrt(degrees) + 1000
    for _ in range(100):
        middle = (low + high) / 2
        is_below = float(chi_square_tail(torch.tensor(middle), torch.tensor(degrees))) > alpha
        low, high = (middle, high) if is_below else (low, middle)
    return high


def power(noncentrality: float, degrees: int, alpha: float) -> float:
    """The probability that a test at level alpha finds a bias: the tail of the non-central chi-square.

    That is a mixture of chi-squares of degrees + 2 k, k of Poisson's distribution with mean noncentrality / 2.
    """
    mean = max(noncentrality / 2, 1e-300)
    k = torch.arange(max(0, int(mean - 12 * math.sqrt(mean) - 20)), int(mean + 12 * math.sqrt(mean) + 20)).double()
    weights = (k * math.log(mean) - mean - torch.lgamma(k + 1)).exp()
    bound = torch.tensor(chi_square_bound(alpha, degrees))
    return float((weights * chi_square_tail(bound, degrees + 2 * k)).sum())


def effect(probs: Tensor, biased: Tensor) -> float:
    """What a single draw from ``biased`` adds to the non-centrality of a test for ``probs``."""
    possible = probs > 0
    return float(((biased - probs)[possible].square() / probs[possible]).sum())


def samples_needed(effect: float, degrees: int, alpha: float, sought: float = 0.99) -> int:
    """How many draws find a bias of this effect with the power that is sought."""
    low, high = 0.0, 1.0
    while power(high, degrees, alpha) < sought:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, degrees, alpha) < sought else (low, middle)
    return math.ceil(high / effect)


def planted(probs: Tensor, raised: Tensor, bias: float) -> Tensor:
    """The distribution with the raised categories 1 + bias times as likely, and the others less, all alike."""
    share = probs[raised].sum()
    return torch.where(raised, probs * (1 + bias), probs * (1 - bias * share / (1 - share)))


def p_values(counts: Tensor, probs: Tensor) -> dict[str, Tensor]:
    """The p-values of four tests, each (...).

    counts: (..., R, C), how often each category was drawn in each of R circumstances. probs: (R, C), the distribution
    in each. Totals are taken as given, circumstance by circumstance.
    """
    totals = counts.sum(-1, keepdim=True).double()
    is_possible = counts.masked_fill(probs > 0, 0).sum((-2, -1)) == 0
    # Of many categories most are too rare, and no copies are made of them.
    frequent = totals.amax() * probs.amax(-2) >= MIN_EXPECTED
    cells, shares = counts[..., frequent].double(), probs[:, frequent]
    is_cell = totals * shares >= MIN_EXPECTED
    rest = probs.masked_fill(frequent, 0).sum(-1, keepdim=True) + (shares * ~is_cell).sum(-1, keepdim=True)
    shares = torch.cat((shares * is_cell, rest), dim=-1)
    cells = torch.cat((cells * is_cell, totals - (cells * is_cell).sum(-1, keepdim=True)), dim=-1)
    kept = totals * shares >= MIN_EXPECTED
    rare = poisson_p_value((cells * ~kept).sum((-2, -1)), (totals * shares * ~kept).sum((-2, -1)))
    observed, shares = cells * kept, shares * kept
    expected = observed.sum(-1, keepdim=True) * shares / shares.sum(-1, keepdim=True).clamp(min=1e-300)
    degrees = (kept.sum(-1) - 1).clamp(min=0).sum(-1)
    positive = expected.clamp(min=1e-300)
    table = {
        "Pearson": chi_square_tail(((observed - expected).square() / positive).sum((-2, -1)), degrees),
        "G": chi_square_tail(2 * torch.special.xlogy(observed, observed / positive).sum((-2, -1)), degrees),
        "rare": torch.where(is_possible, rare, 0.0),
    }
    if probs.size(-2) == 1:
        distance = ((counts / totals).cumsum(-1) - probs.cumsum(-1)).abs().amax((-2, -1))
        table["Kolmogorov-Smirnov"] = (2 * (-2 * totals[..., 0, 0] * distance.square()).exp()).clamp(max=1)
    return table


def poisson_p_value(count: Tensor, mean: Tensor) -> Tensor:
    """Twice the smaller tail of Poisson's distribution."""
    above = torch.where(count > 0, torch.special.gammainc(count.clamp(min=1), mean), 1.0)
    below = torch.special.gammaincc(count + 1, mean)
    return (2 * torch.minimum(above, below)).clamp(max=1)


def without_replacement(probs: Tensor, length: int) -> Tensor:
    """(V) -> (V^length): the probabilities of the first draws, in order."""
    joint = torch.ones((), dtype=torch.float64)
    left = probs.double()
    for _ in range(length):
        total = left.sum(-1, keepdim=True)
        nexts = torch.where(total > 0, left / total, 0.0)
        joint = joint[..., None] * nexts
        left = left[..., None, :] * (1 - torch.eye(len(probs), dtype=torch.float64))
    return joint.flatten()


def inclusion(probs: Tensor, length: int) -> Tensor:
    """(V) -> (V): the probability that a token is among the first draws without replacement.

    Tokens arrive at exponential times. Where one arrives at t, it is among the first if fewer than ``length`` others
    came before; the integral over log t is by the trapezoidal rule, which is as good as exact for it.
    """
    log_t = torch.linspace(-12, 24, 721, dtype=torch.float64)
    times = log_t.exp()
    result = torch.empty_like(probs)
    for token in range(len(probs)):
        arrived = torch.zeros(length, len(times), dtype=torch.float64)  # [k]: the probability that k others came
        arrived[0] = 1
        for other in range(len(probs)):
            if other != token:
                came = -torch.expm1(-probs[other] * times)
                previous = torch.cat((torch.zeros_like(arrived[:1]), arrived[:-1]))
                arrived = arrived * (1 - came) + previous * came
        density = probs[token] * (-probs[token] * times).exp() * times
        result[token] = torch.trapezoid(density * arrived.sum(0), log_t)
    return result


def rosenblatt(samples: Tensor, probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws without replacement, (N, K), as independent uniform numbers, (N, K): Rosenblatt's transform.

    Each draw is a random point between the cumulative sums around it, of what the draws before have left.
    """
    left = probs.double().expand(len(samples), -1).clone()
    noise = torch.rand(samples.shape, dtype=torch.float64, generator=generator)
    uniforms = torch.empty_like(noise)
    for k in range(samples.size(1)):
        token = samples[:, k : k + 1]
        sums = left.cumsum(-1)
        weight = left.gather(1, token)
        uniforms[:, k] = ((sums.gather(1, token) - weight * noise[:, k : k + 1]) / sums[:, -1:])[:, 0]
        left.scatter_(1, token, 0.0)
    return uniforms


def race(probs: Tensor) -> Tensor:
    """(V) -> (V) float64: what torch.multinomial draws of 16-bit probabilities, once or without replacement at first.

    It is the first largest of probs / q in 16 bits, with q exponential variates rounded to 16 bits, so that ties are
    frequent.
    """
    infinity = torch.tensor(math.inf, dtype=probs.dtype).view(torch.int16).item()
    variates = torch.arange(infinity, dtype=torch.int16).view(probs.dtype)
    borders = (variates[1:].double() + variates[:-1].double()) / 2
    inner = -torch.expm1(-borders)
    mass = torch.diff(inner, prepend=torch.zeros(1).double(), append=torch.ones(1).double())
    variates, mass = variates[mass > 0], mass[mass > 0]
    ratios = (probs[:, None].float() / variates.float()).to(probs.dtype).double().nan_to_num(nan=math.inf)
    values, place = ratios.unique(return_inverse=True)
    chances = torch.zeros(len(probs), len(values), dtype=torch.float64).scatter_add_(1, place, mass.expand_as(ratios))
    at_most = chances.cumsum(-1).clamp(max=1)
    below = at_most - chances
    ones = torch.ones(1, len(values), dtype=torch.float64)
    none_before = torch.cat((ones, below[:-1])).cumprod(0)
    none_after = torch.cat((ones, at_most.flip(0)[:-1])).cumprod(0).flip(0)
    return (chances * none_before * none_after).sum(-1)


def filtered(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """(R, V) logits -> (R, V) float64: the distribution that the filters of generate leave, row by row."""
    rows = []
    for row in logits.double() / temperature:
        probs, order = row.softmax(-1).sort(descending=True)
        if top_k is not None:
            probs = torch.where(probs >= probs[top_k - 1], probs, 0.0)
        probs = probs / probs.sum()
        probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0.0)
        probs = torch.where(probs >= min_p * probs[0], probs, 0.0)
        rows.append(torch.zeros_like(probs).scatter(0, order, probs / probs.sum()))
    return torch.stack(rows)
