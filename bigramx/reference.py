"""The functions of bigramx.functional and the lecture's model in plain PyTorch: what the kernels are tested against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bigramx.functional import Reduction, Sampler, _stop_tokens
from bigramx.locks import without_warnings
from bigramx.shards import TokenShards


class BigramLanguageModel(nn.Module):
    """The lecture's model: a table whose row i holds the logits of the token that follows token i."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx, targets (B, T) -> logits (B, T, C) and None, or logits (B*T, C) and the loss ()."""
        logits = self.token_embedding_table(idx)
        if targets is None:
            return logits, None
        B, T, C = logits.shape
        logits = logits.view(B * T, C)
        return logits, F.cross_entropy(logits, targets.view(B * T))

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """Idx (B, T) -> (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _loss = self(idx)
            probs = F.softmax(logits[:, -1, :], dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, num_samples=1)), dim=1)
        return idx


def embedding_cross_entropy(
    idx: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """See functional.embedding_cross_entropy; makes the (N, C) logits."""
    return embedding_cross_entropy_with_logits(
        idx,
        weight,
        targets,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        padding_idx=padding_idx,
        sparse=sparse,
    )[0]


def embedding_cross_entropy_with_logits(
    idx: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    padding_idx: int | None = None,
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See functional.embedding_cross_entropy_with_logits."""
    logits = F.embedding(idx.reshape(-1), weight, padding_idx=padding_idx, sparse=sparse)
    is_soft = targets.is_floating_point()
    flat_targets = targets.reshape(logits.shape) if is_soft else targets.reshape(-1).long()
    loss = F.cross_entropy(
        logits,
        flat_targets,
        class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if z_loss != 0:
        counts = torch.ones_like(idx.reshape(-1), dtype=torch.bool) if is_soft else flat_targets != ignore_index
        penalties = (z_loss * logits.logsumexp(-1) ** 2).masked_fill(~counts, 0)
        if reduction == "none":
            loss = loss + penalties
        else:
            loss = loss + penalties.sum() / (counts.sum() if reduction == "mean" else 1)
    if reduction == "none":
        loss = loss.view(idx.shape)
    return loss, logits


def multinomial(
    probs: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """See functional.multinomial."""
    if sampler != "philox":
        return torch.multinomial(probs, num_samples, replacement, generator=generator)
    seed = _draw_seed(generator)
    rows = probs if probs.dim() == 2 else probs[None]
    left, largest = rows.clone(), rows.amax(-1, keepdim=True)
    samples = torch.empty(len(rows), num_samples, dtype=torch.int64, device=probs.device)
    for k in range(num_samples):
        weights = weights_of_probs(left, largest)
        is_small = weights.sum(-1, keepdim=True) < 2**54  # less than the largest weight of any row
        if not replacement and bool(is_small.any()):
            largest = torch.where(is_small, left.amax(-1, keepdim=True), largest)
            weights = weights_of_probs(left, largest)
        r = draws(seed, torch.arange(len(rows), device=probs.device), k)
        drawn = tokens_of_draws(weights, r[:, None]).clamp(max=rows.size(1) - 1)  # if none is left: overwritten below
        if not replacement:
            left.scatter_(1, drawn, 0)
        samples[:, k] = drawn[:, 0]
    for b in range(len(rows) if not replacement else 0):  # then tokens of probability zero, in order
        num_positive = int((rows[b] > 0).sum())
        samples[b, num_positive:] = (rows[b] == 0).nonzero()[: max(num_samples - num_positive, 0), 0]
    return samples if probs.dim() == 2 else samples[0]


def count_bigrams(tokens: Tensor, vocab_size: int, layout: torch.layout = torch.strided) -> Tensor:
    """See functional.count_bigrams."""
    tokens = tokens.long()
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    if layout == torch.sparse_csr:
        return _csr_of_pairs(pairs, vocab_size)
    if layout != torch.strided:
        raise NotImplementedError(f"count_bigrams: not implemented for layout {layout}")
    return torch.bincount(pairs, minlength=vocab_size * vocab_size).view(vocab_size, vocab_size)


def _csr_of_pairs(pairs: Tensor, vocab_size: int) -> Tensor:
    """Pairs, row * V + column -> (V, V) counts."""
    distinct, counts = pairs.unique(return_counts=True)
    borders = torch.arange(vocab_size + 1, device=pairs.device) * vocab_size
    crow_indices, size = torch.searchsorted(distinct, borders), (vocab_size, vocab_size)
    # The second warning is torch 2.11's, whatever it is asked to check.
    with without_warnings("Sparse (CSR tensor support is in beta|invariant checks are implicitly)"):
        return torch.sparse_csr_tensor(crow_indices, distinct % vocab_size, counts, size, check_invariants=False)


def interpolated_bigram(
    idx: Tensor,
    targets: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pair_probs: Tensor,
    backoff: Tensor,
    unigram: Tensor,
) -> tuple[Tensor, Tensor]:
    """See functional.interpolated_bigram; takes 16 bytes of memory for each of the nnz pairs."""
    # Clones: PyTorch's indexing reads the memory of a tensor of lazy zeros, which has none.
    rows, columns = (tensor.long().clone() if tensor._is_zerotensor() else tensor.long() for tensor in (idx, targets))
    vocab_size = len(unigram)
    all_rows = torch.arange(vocab_size, device=idx.device).repeat_interleave(crow_indices.diff())
    # With one pair more, beyond all others, for the search to end at.
    keys = F.pad(all_rows * vocab_size + col_indices, (0, 1), value=vocab_size**2)
    wanted = rows * vocab_size + columns
    places = torch.searchsorted(keys, wanted)
    is_seen = keys[places] == wanted
    own = F.pad(pair_probs, (0, 1))[places].double().where(is_seen, 0)
    return own + backoff[rows].double() * unigram[columns].double(), is_seen


def interpolated_bigram_rows(
    idx: Tensor, crow_indices: Tensor, col_indices: Tensor, pair_probs: Tensor, backoff: Tensor, unigram: Tensor
) -> Tensor:
    """P(j | i) of all j for each i of ``idx``: its shape and V, in the dtype of the parts."""
    rows = idx.reshape(-1).long()
    probs = backoff[rows, None] * unigram
    begins, sizes = crow_indices[rows], crow_indices.diff()[rows]
    of_row = torch.arange(len(rows), device=idx.device).repeat_interleave(sizes)
    ends = sizes.cumsum(0)
    places = torch.arange(len(of_row), device=idx.device) + (begins - ends + sizes)[of_row]
    pairs = of_row, col_indices[places].long()  # each of them once
    probs[pairs] = probs[pairs] + pair_probs[places]
    return probs.view(*idx.shape, len(unigram))


def interpolated_bigram_generate(
    idx: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pair_probs: Tensor,
    backoff: Tensor,
    unigram: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """See functional.interpolated_bigram_generate; sorts a row of V weights at each step where there are filters."""
    parts = (crow_indices, col_indices, pair_probs.double(), backoff.double(), unigram.double())
    seed = _draw_seed(generator) if temperature > 0 and idx.size(0) > 0 and max_new_tokens > 0 else 0
    rows = _InterpolatedRows(*parts, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    stops = set(_stop_tokens(stop))
    sequences: list[list[int]] = idx.tolist()
    length = idx.size(1)
    for t in range(max_new_tokens):
        stopped = [t > 0 and tokens[-1] in stops for tokens in sequences]
        if stops and all(stopped):
            break
        for b, tokens in enumerate(sequences):
            tokens.append(tokens[-1] if stopped[b] else rows.draw(tokens[-1], seed, b, t))
        length += 1
    return torch.tensor(sequences, dtype=torch.int64, device=idx.device).view(len(sequences), length)


class _InterpolatedRows:
    """What csrc/cpu/interpolated_bigram_rows.h prepares, anew for each draw."""

    def __init__(
        self,
        crow_indices: Tensor,
        col_indices: Tensor,
        pair_probs: Tensor,
        backoff: Tensor,
        unigram: Tensor,
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
    ) -> None:
        self.crow_indices, self.col_indices = crow_indices.tolist(), col_indices.long()
        self.pair_probs, self.backoff, self.unigram = pair_probs, backoff, unigram
        self.exponent = 1 / temperature if temperature > 0 else 1.0
        self.is_argmax = temperature == 0
        self.top_k = 1 if self.is_argmax else min(top_k or len(unigram), len(unigram))
        self.top_p, self.min_p = 1.0 if top_p is None else top_p, min_p or 0.0
        self.largest = unigram.amax()
        self.weights = (unigram / self.largest) ** self.exponent
        self.order = unigram.argsort(descending=True, stable=True)
        self.ranks = torch.empty_like(self.order).index_copy_(0, self.order, torch.arange(len(unigram)))
        integers = weights_of_probs(self.weights[self.order])
        self.cdf = fixed_point_cdf(integers)
        total = sum(integers.tolist())
        self.unit = 2.0 ** (max(total.bit_length() - 63, 0) - 54)

    def draw(self, last: int, seed: int, sequence: int, step: int) -> int:
        tokens, weights, unigram_weight, count = self.row(last)
        all_weights = weights_of_probs(torch.cat((weights, unigram_weight[None])))
        of_sequence = torch.tensor([sequence])
        place = int(tokens_of_draws(all_weights, draws(seed, of_sequence, step)))
        if place < len(tokens):
            return int(tokens[place])
        target = share_of_total(draws(seed, of_sequence | 2**62, step), self.cdf[count - 1])
        return int(self.order[torch.searchsorted(self.cdf, target, right=True)])

    def row(self, last: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """The tokens with weights of their own, these, that of the unigram, and how many tokens it draws from."""
        begin, end = self.crow_indices[last], self.crow_indices[last + 1]
        tokens, own, backoff = self.col_indices[begin:end], self.pair_probs[begin:end], self.backoff[last]
        whole = own + backoff * self.unigram[tokens]
        largest = torch.cat((whole, backoff * self.largest[None])).amax()
        scaled_backoff = (backoff * self.largest / largest) ** self.exponent
        weights = scaled_backoff * self.weights
        powers = (whole / largest) ** self.exponent
        own = own / largest if self.exponent == 1 else (powers - weights[tokens]).clamp(min=0)
        count = len(self.unigram)
        total = sum(own.tolist()) + scaled_backoff * self.unigram_sum(count)
        if self.top_k == count and self.top_p == 1 and self.min_p == 0:
            return tokens, own, scaled_backoff * self.unigram_sum(count), count
        is_unseen = torch.ones(count, dtype=torch.bool).index_fill_(0, tokens, False)
        weights[tokens] = powers
        is_kept = self.keep(weights, total)
        count = int((self.ranks[is_kept & is_unseen] + 1).amax()) if bool((is_kept & is_unseen).any()) else 0
        of_unigram = torch.where(self.ranks[tokens] < count, scaled_backoff * self.weights[tokens], 0)
        own = (powers - of_unigram).clamp(min=0)
        return tokens[is_kept[tokens]], own[is_kept[tokens]], scaled_backoff * self.unigram_sum(count), count

    def unigram_sum(self, count: int) -> Tensor:
        return self.cdf[count - 1].double() * self.unit if count > 0 else torch.zeros((), dtype=torch.float64)

    def keep(self, weights: Tensor, total: Tensor) -> Tensor:
        """Which tokens the filters keep."""
        by_weight, order = weights.sort(descending=True, stable=True)
        kept = torch.ones_like(order, dtype=torch.bool)
        if self.is_argmax:
            kept[1:] = False
        elif self.top_k < len(weights):
            kept = by_weight >= by_weight[self.top_k - 1]
            total = by_weight[kept].cumsum(0)[-1]
        before = F.pad(by_weight.cumsum(0), (1, 0))[:-1]
        if self.top_p < 1:
            kept &= before < self.top_p * total
        kept &= by_weight >= self.min_p * by_weight[0]
        return torch.zeros_like(kept).index_copy_(0, order, kept)


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Logits (..., V) -> logits divided by the temperature, -inf for the tokens that the filters remove.

    Filters that may remove tokens make float32 of 16-bit logits, and compute in it.
    """
    vocab_size = logits.size(-1)
    if temperature == 0:
        is_argmax = F.one_hot(logits.argmax(-1), vocab_size).bool()
        return logits.masked_fill(~is_argmax, float("-inf"))
    top_k = None if top_k is None or top_k >= vocab_size else top_k
    top_p = None if top_p == 1 else top_p
    min_p = None if min_p == 0 else min_p
    if not top_k is top_p is min_p is None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits / temperature
    if top_k is not None:
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        sums = probs.cumsum(-1, dtype=torch.float64)
        removed = sums - probs >= top_p * sums[..., -1:]  # the sum of long rows is not quite 1, as softmax rounds
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), float("-inf"))
    if min_p is not None:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))
    return logits


def philox(seed: int, sequence: Tensor, position: int) -> Tensor:
    """A word of Philox4x32-10 (Salmon et al., SC 2011): the counter is (position // 4, sequence), low words first.

    sequence: int64 of any shape -> int64 of that shape, each 0 to 2^32 - 1.
    """
    mask = 0xFFFFFFFF
    words = [
        torch.full_like(sequence, position // 4 & mask),
        torch.full_like(sequence, position // 4 >> 32),
        sequence & mask,
        sequence >> 32 & mask,
    ]
    key = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        low0, high0 = _multiply(0xD2511F53, words[0])
        low1, high1 = _multiply(0xCD9E8D57, words[2])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return words[position % 4]


def draws(seed: int, sequence: Tensor, position: int) -> Tensor:
    """Uniform numbers of 63 bits: 31 from the word at a position, 32 from that of the sequence with its top bit set.

    sequence: int64 of any shape, not negative -> int64 of that shape.
    """
    return philox(seed, sequence, position) >> 1 << 32 | philox(seed, sequence | -(2**63), position)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high words of the product of two 32-bit numbers, without leaving int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    product_high = (high + (low >> 16)) >> 16
    product_low = (low + ((high & 0xFFFF) << 16)) & 0xFFFFFFFF
    return product_low, product_high


def _draw_seed(generator: torch.Generator | None) -> int:
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)) % 2**64


def weights_of_logits(logits: Tensor) -> Tensor:
    """Logits (..., V) -> (..., V) int64: e^(logit - the largest) 2^55, as csrc/sampling/fixed_point_cdf.h."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    x = (logits - logits.amax(-1, keepdim=True)).float().clamp(min=-39)
    shifted = _fma(x, float.fromhex("0x1.715476p0"), 1.5 * 2**23)
    n = shifted - 1.5 * 2**23
    r = _fma(n, -float.fromhex("0x1.62e400p-1"), x)
    r = _fma(n, -float.fromhex("0x1.7f7d1cp-20"), r)
    series = torch.full_like(x, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1, 1):
        series = _fma(series, r, coefficient)
    return (series * _power_of_two(n.long() + 55)).long()


def filtered_weights(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Logits (..., V) -> (..., V) int64: the weights of the logits divided by the temperature, which is not 0.

    0 for the tokens that the filters remove. As csrc/sampling/token_filter.h: top-p goes by exact sums of the weights,
    in descending order of the logits, where ``filter_logits`` adds rounded probabilities.
    """
    removes_mass, removes_below = top_p is not None and top_p < 1, min_p is not None and min_p > 0
    if removes_mass or removes_below or (top_k is not None and top_k < logits.size(-1)):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = filter_logits(logits, temperature=temperature, top_k=top_k)
    weights = weights_of_logits(logits)
    if top_p is not None and removes_mass:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        cdf = fixed_point_cdf(weights.gather(-1, order))
        draw = torch.tensor(math.ceil(top_p * 2**63) - 1, device=logits.device)
        removed = F.pad(cdf, (1, -1)) > share_of_total(draw, cdf[..., -1:])
        weights = weights.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), 0)
    if min_p is not None and removes_below:
        least = math.ceil(torch.tensor(min_p * 2**55, dtype=torch.float32).item())
        weights = weights.masked_fill(weights < least, 0)
    return weights


def _fma(a: Tensor, b: float | Tensor, c: float | Tensor) -> Tensor:
    """A * b + c in float32, rounded once."""
    a, b, c = (torch.as_tensor(value, dtype=torch.float32, device=a.device).double() for value in (a, b, c))
    product = a * b  # exact
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    # Round to odd: where inexact, the neighbour with an odd last bit, which rounds to float32 as the exact sum does.
    is_even = total.view(torch.int64) & 1 == 0
    odd = torch.nextafter(total, torch.copysign(torch.full_like(total, float("inf")), error))
    return torch.where((error != 0) & is_even, odd, total).float()


def weights_of_probs(probs: Tensor, largest: Tensor | None = None) -> Tensor:
    """Probabilities (..., V) -> (..., V) int64: scaled so that the largest (..., 1) is from 2^54 to 2^55."""
    largest = probs.amax(-1, keepdim=True) if largest is None else largest
    shift = 55 - torch.frexp(largest.double()).exponent
    return (probs * _power_of_two(shift // 2) * _power_of_two(shift - shift // 2)).long()


def _power_of_two(exponent: Tensor) -> Tensor:
    return (exponent.long() + 1023 << 52).view(torch.float64)


def fixed_point_cdf(weights: Tensor) -> Tensor:
    """Weights (..., V) -> (..., V) int64: their cumulative sums, shifted right until the last has at most 63 bits."""
    high, low = (weights >> 25).cumsum(-1), (weights & 2**25 - 1).cumsum(-1)
    high, low = high + (low >> 25), low & 2**25 - 1
    shift = torch.stack([high[..., -1:] >= 2 ** (38 + k) for k in range(25)]).sum(0)
    return (high << 25 - shift) + (low >> shift)


def tokens_of_draws(weights: Tensor, r: Tensor) -> Tensor:
    """Weights (..., V), r (..., K) of 63 bits -> (..., K): the first token whose cdf is above r cdf[-1] / 2^63."""
    cdf = fixed_point_cdf(weights)
    return torch.searchsorted(cdf, share_of_total(r, cdf[..., -1:]), right=True)


def share_of_total(r: Tensor, total: Tensor) -> Tensor:
    """Floor(r total / 2^63), for int64 that are not negative, without leaving int64."""
    mask = 2**31 - 1  # digits of 31, 31 and 1 bits
    r_digits, total_digits = ([number >> 31 * k & mask for k in range(3)] for number in (r, total))
    carry = torch.zeros_like(r + total)
    digits = []
    for k in range(5):
        for i in range(max(k - 2, 0), min(k, 2) + 1):
            carry = carry + r_digits[i] * total_digits[k - i]
        digits.append(carry & mask)
        carry = carry >> 31
    return digits[2] >> 1 | digits[3] << 30 | digits[4] << 61


def get_batch(
    tokens: Tensor | TokenShards,
    batch_size: int,
    block_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """See data.get_batch: the lecture's stacks of slices."""
    offsets = torch.randint(len(tokens) - block_size, (batch_size,), generator=generator, device="cpu")
    idx = torch.stack([tokens[i : i + block_size] for i in offsets])
    targets = torch.stack([tokens[i + 1 : i + block_size + 1] for i in offsets])
    return idx.to(device, torch.int64), targets.to(device, torch.int64)


def generate(
    idx: Tensor,
    weight: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Sequence[int] | None = None,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """See functional.generate."""
    return continue_by(
        lambda idx: F.embedding(idx[:, -1], weight),
        idx,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=stop,
        sampler=sampler,
        generator=generator,
    )


def continue_by(
    logits_after: Callable[[Tensor], Tensor],
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Sequence[int] | None = None,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The lecture's loop with the options of functional.generate; logits_after: (B, T) tokens -> (B, V) logits."""
    idx = idx.long()
    seed = 0
    if sampler == "philox" and temperature > 0 and idx.size(0) > 0 and max_new_tokens > 0:
        seed = _draw_seed(generator)
    stops = torch.tensor(_stop_tokens(stop), dtype=torch.int64, device=idx.device)
    stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    for t in range(max_new_tokens):
        if len(stops) > 0 and bool(stopped.all()):
            break
        logits = logits_after(idx)
        if temperature == 0:
            idx_next = logits.argmax(-1, keepdim=True)
        elif sampler == "philox":
            weights = filtered_weights(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            idx_next = tokens_of_draws(weights, draws(seed, torch.arange(idx.size(0), device=idx.device), t)[:, None])
        else:
            logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            idx_next = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        if len(stops) > 0:
            idx_next = torch.where(stopped[:, None], idx[:, -1:], idx_next)
            stopped |= torch.isin(idx_next[:, 0], stops)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """See functional.adamw_."""
    if maximize:
        grad = -grad
    if weight_decay != 0:
        param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    largest = exp_avg_sq
    if max_exp_avg_sq is not None:
        largest = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    number = step.item()
    denominator = largest.sqrt() / (1 - beta2**number) ** 0.5 + eps
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**number))


def deferred_adamw_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_steps: Tensor,
    schedule: Tensor,
    step: int,
    rows: Tensor | None = None,
    grad: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """See the op deferred_adamw_ (csrc/deferred_adamw.h): each row takes its steps one after another."""
    rows = torch.arange(len(param)) if rows is None else rows
    for k, row in enumerate(rows.tolist()):
        while row_steps[row] < step:
            row_steps[row] += 1
            is_last = bool(row_steps[row] == step)
            lr, beta1, beta2, eps, weight_decay = schedule.clone()[int(row_steps[row]) - step - 1].tolist()
            adamw_(
                param[row],
                grad[k] if grad is not None and is_last else torch.zeros_like(param[row]),
                exp_avg[row],
                exp_avg_sq[row],
                step=row_steps[row],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
            )


def fit_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    losses: Tensor,
    tokens: Tensor,
    batch_size: int,
    block_size: int,
    padding_idx: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_seconds: float,
    generator: torch.Generator | None = None,
    row_steps: Tensor | None = None,
) -> int:
    """See the op fit_ (csrc/fit.h): the loop, a step for each element of ``losses`` or until the time is up.

    All rows take each step; with ``row_steps``, first those that they have missed.
    """
    start = time.monotonic()
    if row_steps is not None:
        schedule = torch.tensor([lr, beta1, beta2, eps, weight_decay], dtype=torch.float64).expand(int(step), 5)
        deferred_adamw_(weight, exp_avg, exp_avg_sq, row_steps, schedule, int(step))
    for k in range(len(losses)):
        if k > 0 and time.monotonic() - start > max_seconds:
            return k
        idx, targets = get_batch(tokens, batch_size, block_size, generator=generator)
        leaf = weight.detach().requires_grad_()
        with torch.enable_grad():
            loss = embedding_cross_entropy(idx, leaf, targets, padding_idx=None if padding_idx == -1 else padding_idx)
            (grad,) = torch.autograd.grad(loss, leaf)
        step += 1
        if row_steps is not None:
            row_steps += 1
        adamw_(
            weight,
            grad,
            exp_avg,
            exp_avg_sq,
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )
        losses[k] = loss.detach()
    return len(losses)
