"""The kernels as stateless functions, each with a plain-PyTorch twin of the same signature in bigramx.reference."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bigramx import fusion, ops
from bigramx.counts import count_csr

Reduction = Literal["none", "mean", "sum"]
Sampler = Literal["torch", "philox"]


def _reduction_code(reduction: str) -> int:
    if not isinstance(reduction, str) or reduction not in ops.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction; expected 'none', 'mean' or 'sum'")
    return ops.REDUCTIONS[reduction]


def _on_shards(name: str, arguments: dict[str, Any]) -> Any:
    """The function of this name for DTensors."""
    from bigramx import distributed  # its import takes as long as PyTorch's

    return getattr(distributed, name)(**arguments)


def _padding_row(padding_idx: int | None, weight: Tensor) -> int:
    """As F.embedding reads it: counted from the end where it is negative."""
    if padding_idx is None:
        return ops.NO_PADDING
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected weight to be a Tensor, got {type(weight).__name__}")
    if not isinstance(padding_idx, (int, torch.SymInt)):
        raise TypeError(f"expected padding_idx to be an int or None, got {type(padding_idx).__name__}")
    if weight.dim() != 2:
        raise RuntimeError(f"'weight' must be 2-D, got shape {list(weight.shape)}")
    num_embeddings = weight.size(0)
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise AssertionError(
            f"Padding_idx must be within num_embeddings: expected -{num_embeddings} <= padding_idx < "
            f"{num_embeddings}, got {padding_idx}"
        )
    return padding_idx % num_embeddings


def _loss_and_logits(
    idx: Tensor,
    weight: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    label_smoothing: float,
    z_loss: float,
    padding_idx: int | None,
    sparse: bool,
    return_logits: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and the logits or something without meaning. By position: keywords take time, at each step."""
    if fusion.any_dtensor(idx, weight, targets):
        arguments = locals()
        if arguments.pop("return_logits"):
            return _on_shards("embedding_cross_entropy_with_logits", arguments)  # type: ignore[no-any-return]
        return _on_shards("embedding_cross_entropy", arguments), weight
    return ops.embedding_cross_entropy(  # type: ignore[no-any-return]
        idx,
        weight,
        targets,
        class_weight,
        ignore_index,
        _reduction_code(reduction),
        label_smoothing,
        z_loss,
        _padding_row(padding_idx, weight),
        sparse,
        return_logits,
    )


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
    r"""``F.cross_entropy(F.embedding(idx, weight), targets)`` without the logits, and its gradient for ``weight``.

    With :math:`l_i = \mathrm{logsumexp}(W_i)` the loss of pair n is :math:`l_{x_n} - W_{x_n, y_n}`: one logsumexp for
    each distinct row, so the work is O(min(N, R) C + N + R), not O(N C); a dense gradient adds the writes of R C
    elements.

    PyTorch's own ops compute it, with (N, C) logits, where the kernels do not apply: for probabilities as targets, in
    forward mode, inside the transforms of torch.func, for the gradient under ``create_graph``, which can be
    differentiated again, and on the CPU for class weights in float64 beyond 1e270 or below 1e-270.

    Args:
        idx: Row of each pair. int64 or int32, any shape, N elements.
        weight: (R, C), float64, float32, bfloat16 or float16 (accumulated in float32). The gradient is written in
            the forward pass.
        targets: Class of each pair, int64, int32 or uint8, the shape of ``idx``; or, as F.cross_entropy takes them,
            probabilities of the classes, floating point, the shape of ``idx`` and (C).
        class_weight: (C), the dtype of ``weight``; a weight for the pairs of each target class. Summed in float64: the
            mean is right where PyTorch divides by a sum that overflows the dtype.
        ignore_index: Pairs with this target do not count. Where they alone meet a row whose softmax is NaN, so is its
            gradient, as in PyTorch; on a GPU it is zero, as the kernels do not read such a row.
        reduction: ``"mean"`` (over the class weights of the pairs that count), ``"sum"`` or ``"none"``. With
            ``"none"`` the gradient is computed in the backward pass, and ``weight`` must not change before it; on a
            GPU its last bits may differ from run to run, and ``torch.use_deterministic_algorithms`` refuses it.
        label_smoothing: The share, 0 to 1, of the target that is spread evenly over all classes.
        z_loss: Adds ``z_loss * logsumexp**2`` to the loss of each pair (PaLM, section 5); not class-weighted, and
            under ``"mean"`` divided by the number of pairs that count.
        padding_idx: This row gets no gradient. Negative: counted from the end.
        sparse: The gradient is a coalesced sparse tensor with the rows that occur in ``idx``. On a GPU, where their
            number is not known to the host, it has min(N, R) entries, the excess ones zero, and is not coalesced. There
            ``grad.coalesce()`` waits for the device. DistributedDataParallel reduces either kind over gloo, and none
            over NCCL, which has no sparse tensors.

    Returns:
        The loss, in the dtype of ``weight``, or under autocast in float32 where that has 16 bits: (), or for ``"none"``
        the shape of ``idx``. The mean over no pairs is NaN.

    Raises:
        IndexError: An index or a target is out of range. On a GPU that is an assertion on the device, as in PyTorch.
        ValueError: ``targets`` has another shape than ``idx``, ``reduction`` is not one of the three, or ``z_loss`` is
            negative.
        RuntimeError: A dtype, a device, the shape of ``weight`` or ``class_weight``, or ``label_smoothing`` is off;
            ``class_weight`` requires a gradient; or no kernel is built for the device.
        NotImplementedError: ``weight`` is not a floating-point tensor.
        AssertionError: ``padding_idx`` is out of range.
        TypeError: An argument is of the wrong type.
    """
    loss, _no_logits = _loss_and_logits(
        idx,
        weight,
        targets,
        class_weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        padding_idx,
        sparse,
        False,
    )
    return loss


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
    """``embedding_cross_entropy``, and the logits ``weight[idx]``, from one kernel.

    Args:
        idx: Row of each pair. int64 or int32, any shape, N elements.
        weight: (R, C), float64, float32, bfloat16 or float16.
        targets: Class of each pair, int64, int32 or uint8, the shape of ``idx``; or probabilities of the classes.
        class_weight: (C), the dtype of ``weight``.
        ignore_index: Pairs with this target count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: 0 to 1.
        z_loss: Adds ``z_loss * logsumexp**2`` to the loss of each pair.
        padding_idx: This row gets no gradient.
        sparse: The gradient is a sparse tensor with the rows that occur in ``idx``.

    Returns:
        The loss, () or for ``"none"`` the shape of ``idx``; and the logits, (N, C), in the dtype of ``weight``. The
        loss depends on the logits, as in PyTorch: ``logits.retain_grad()`` and hooks on them see its gradient, which
        otherwise is not computed.

    Raises:
        IndexError: An index or a target is out of range.
        ValueError: As ``embedding_cross_entropy``, and so are RuntimeError, NotImplementedError, AssertionError and
            TypeError.
    """
    return _loss_and_logits(
        idx,
        weight,
        targets,
        class_weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        padding_idx,
        sparse,
        True,
    )


def multinomial(
    probs: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``torch.multinomial``: the same samples for the same generator state (CPU), and any number of categories.

    On a GPU a generator on the CPU gives the samples that it gives on the CPU by ``"philox"``; one on the device, or
    none, advances as those of PyTorch do, and draws anew at each replay of a captured graph.

    Args:
        probs: (V) or (B, V) weights, finite and not negative, floating point; they need not sum to one.
        num_samples: How many tokens to draw from each row.
        replacement: Whether a token may be drawn twice.
        sampler: ``"torch"`` draws as torch.multinomial does, and leaves the generator in the same state; the default on
            the CPU, and only available there. ``"philox"`` draws by a counter from one 64-bit seed: sample k of row b
            depends on (seed, b, k) and the row alone, without replacement also on the samples before it; faster,
            especially for large V; the default on a GPU. Its distribution is within V 2^-54 of the probabilities, in
            total variation.
        generator: Where the randomness comes from; None: PyTorch's default generator.

    Returns:
        (num_samples) or (B, num_samples) int64.

    Raises:
        RuntimeError: ``probs`` holds a NaN, an infinity or a negative number, or a row of zeros (on a GPU that is an
            assertion on the device, as in PyTorch); has not 1 or 2 dimensions; is not floating point; or
            ``num_samples`` is out of range.
        ValueError: ``sampler`` is neither of the two, or ``"torch"`` on a GPU.
        TypeError: An argument is of the wrong type.
    """
    if fusion.any_dtensor(probs):
        on_shards: Tensor = _on_shards("multinomial", locals())
        return on_shards
    samples: Tensor = ops.multinomial(probs, num_samples, replacement, sampler, generator)
    return samples


def _stop_tokens(stop: int | Sequence[int] | None) -> list[int]:
    """The tokens at which a sequence ends, as ``generate`` takes them, as a list.

    Raises:
        TypeError: ``stop`` is no int, and no sequence of ints.
    """
    if stop is None:
        return []
    if isinstance(stop, (int, torch.SymInt)):
        return [stop]
    tokens: Any = stop.tolist() if hasattr(stop, "tolist") else stop  # a Tensor's or an array's ints
    are_several = isinstance(tokens, Collection) and not isinstance(tokens, (str, bytes))
    try:
        return [operator.index(token) for token in (tokens if are_several else [tokens])]
    except TypeError:
        raise TypeError(f"expected stop to be an int or a sequence of ints, got {type(stop).__name__}") from None


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
    """Continues each sequence token by token, the next drawn from ``softmax(weight[last])``.

    The filters act in the order of the arguments, each on the tokens that the ones before it keep. They depend on the
    last token alone, and are applied once to each row of the table that a chain meets. With ``"philox"`` they go by
    exact sums of the integer weights that tokens are drawn by, in descending order of the logits and, of equal ones, in
    ascending order of the tokens: the same are kept on every machine. With ``"torch"`` they go by the probabilities of
    torch.softmax.

    Where a filter may remove tokens (``top_k`` < V, ``top_p`` < 1, ``min_p`` > 0), all arithmetic on a bfloat16 or
    float16 table is float32, from the temperature to the draw. Otherwise the logits, their quotient by the temperature
    and, with ``"torch"``, their softmax have the dtype of the table, as in a loop in plain PyTorch.

    On the CPU a signal handler that raises, as Ctrl-C does, ends a long call within about a tenth of a second. Nothing
    is returned; the generator is free, and as far as it had been drawn from. In between, other threads may draw from
    it, as between the steps of a loop.

    Args:
        idx: (B, T) tokens, int64 or int32, T >= 1.
        weight: (V, V) logits, row i those of the token that follows i.
        max_new_tokens: How many tokens to add, >= 0.
        temperature: Divides the logits; 0 takes the most likely token (argmax) and draws nothing.
        top_k: Keeps the k most likely tokens, and all that tie with the k-th.
        top_p: Keeps the fewest most likely tokens whose probabilities sum to ``top_p`` or more, 0 < top_p <= 1. 1 keeps
            all.
        min_p: Keeps the tokens with at least ``min_p`` times the largest probability, 0 <= min_p <= 1.
        stop: A sequence ends at this token, or at the first of several; none of an empty sequence.
        sampler: ``"torch"`` draws as torch.multinomial does, so that the tokens, and the generator's state afterwards,
            equal those of a loop over ``torch.multinomial(softmax(weight[last]), 1)``; the default on the CPU, and
            only available there. ``"philox"`` draws by a counter from one 64-bit seed: sequence b at step t depends on
            (seed, b, t) alone; the default on a GPU. Its distribution is within V 2^-54 of the probabilities, in total
            variation, beside the rounding of float32 exponentials.
        generator: Where the randomness comes from; None: PyTorch's default generator, on a GPU that of the device. One
            on the CPU gives the same tokens on a GPU as on the CPU.

    Returns:
        (B, T + max_new_tokens) int64, ``idx`` first. With ``stop``: shorter where every sequence ends earlier;
        sequences that end before the longest are padded with the token at which they end.

    Raises:
        IndexError: A token is out of range, or T = 0.
        ValueError: An option is out of range.
        RuntimeError: ``weight`` is not square, ``idx`` is not 2-D, a dtype or device is off, or (temperature > 0) a
            chain meets a row that is not a distribution. On a GPU invalid tokens and rows are assertions on the device,
            as in PyTorch.
        NotImplementedError: ``weight`` is not a floating-point tensor.
        TypeError: An argument is of the wrong type.
    """
    if fusion.any_dtensor(idx, weight):
        on_shards: Tensor = _on_shards("generate", locals())
        return on_shards
    first: Any = stop
    more_stop: Sequence[int] = ()
    if stop is not None and not isinstance(stop, int):
        first, *more_stop = _stop_tokens(stop) or (None,)
    tokens: Tensor = ops.generate(
        idx, weight, max_new_tokens, temperature, top_k, top_p, min_p, first, sampler, generator, more_stop
    )
    return tokens


def interpolated_bigram(
    idx: Tensor,
    targets: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pair_probs: Tensor,
    backoff: Tensor,
    unigram: Tensor,
) -> tuple[Tensor, Tensor]:
    """p(j | i) = ``pair_probs[i, j] + backoff[i] * unigram[j]`` of pairs, where the first is sparse: CSR, (V, V).

    Pairs in the order of their rows and columns, as counts have them, are merged with the model's; others are searched.
    PyTorch's own ops compute it where a part requires a gradient, which the kernel does not have.

    Args:
        idx: i of each pair, int64 or int32, any shape.
        targets: j of each, alike.
        crow_indices: (V + 1) int64, where the pairs of each row begin, and where the last one's end.
        col_indices: (nnz) int32, the columns, ascending within a row.
        pair_probs: (nnz) float32 or float64.
        backoff: (V), the same dtype.
        unigram: (V), the same dtype.

    Returns:
        The probabilities, float64, and whether each pair is one of the nnz, bool; in the shape of ``idx``.

    Raises:
        IndexError: A token is out of range.
        ValueError: ``targets`` has another shape than ``idx``.
        RuntimeError: Another shape, a dtype or a device is off, or ``crow_indices`` does not ascend.
        TypeError: An argument is of the wrong type.
    """
    with torch.no_grad():
        probs, is_seen = ops.interpolated_bigram(idx, targets, crow_indices, col_indices, pair_probs, backoff, unigram)
    if torch.is_grad_enabled() and any(part.requires_grad for part in (pair_probs, backoff, unigram)):
        from bigramx import reference  # which imports this module

        return reference.interpolated_bigram(idx, targets, crow_indices, col_indices, pair_probs, backoff, unigram)
    return probs, is_seen


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
    """``generate`` by the sampler "philox" from the probabilities of ``interpolated_bigram``.

    A row is prepared when a chain first meets it, in memory in proportion to its pairs: 12 bytes each. Two draws of 63
    bits, of which the second is for the tokens that the unigram gives, depend on (seed, sequence, step) alone: the
    tokens are the same for any number of threads and any split of the batch. The distribution is within (V + nnz of a
    row) 2^-54 of the probabilities, in total variation, beside the rounding of float64.

    Temperature and filters act on the probabilities, in float64, in the same order and with the same rules for ties.

    Args:
        idx: (B, T) tokens, int64 or int32, T >= 1.
        crow_indices: (V + 1) int64.
        col_indices: (nnz) int32.
        pair_probs: (nnz) float32 or float64.
        backoff: (V), the same dtype.
        unigram: (V), the same dtype.
        max_new_tokens: How many tokens to add, >= 0.
        temperature: See ``generate``, and so are the options that follow.
        top_k: At least 1.
        top_p: 0 < top_p <= 1.
        min_p: 0 <= min_p <= 1.
        stop: A token or several.
        generator: Where the seed comes from; None: PyTorch's default generator of the CPU.

    Returns:
        (B, T + max_new_tokens) int64, or shorter, as ``generate``.

    Raises:
        IndexError: A token is out of range, or T = 0.
        ValueError: An option is out of range.
        RuntimeError: A shape, a dtype or a device is off, or a chain meets a row that is not a distribution.
        TypeError: An argument is of the wrong type.
    """
    tokens: Tensor = ops.interpolated_bigram_generate(
        idx,
        crow_indices,
        col_indices,
        pair_probs,
        backoff,
        unigram,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        _stop_tokens(stop),
        generator,
    )
    return tokens


def count_bigrams(tokens: Tensor, vocab_size: int, layout: torch.layout = torch.strided) -> Tensor:
    """Counts how often each token follows each other token.

    Args:
        tokens: (N) uint8, uint16, uint32, int32 or int64; on a GPU fewer than 2^32.
        vocab_size: V, greater than every token.
        layout: ``torch.strided``, or ``torch.sparse_csr``: memory in proportion to the distinct pairs, for any V up to
            2^31. Tokens on a GPU are then copied, and counted by the CPU; under torch.compile the graph is broken.

    Returns:
        counts (V, V) int64, on the device of ``tokens``: ``counts[i, j]`` is how often j follows i. In
        ``torch.sparse_csr`` the indices are int64, and the columns of a row are in ascending order.

    Raises:
        IndexError: A token is out of range. On a GPU, with ``torch.strided``, that is an assertion on the device, as in
            PyTorch.
        ValueError: ``vocab_size`` is not positive, or too large for ``torch.sparse_csr``.
        RuntimeError: ``tokens`` is not 1-D or of another dtype.
        NotImplementedError: ``layout`` is another one.
        MemoryError: There is not enough memory for the counts in ``torch.sparse_csr``.
        TypeError: An argument is of the wrong type.
    """
    if layout == torch.sparse_csr:
        # torch.compile would warn of native code that is no op.
        return fusion.uncompiled(count_csr)(tokens, vocab_size)
    if not isinstance(layout, torch.layout):
        raise TypeError(f"count_bigrams(): argument 'layout' must be torch.layout, not {type(layout).__name__}")
    if layout != torch.strided:
        raise NotImplementedError(
            f"count_bigrams: not implemented for layout {layout}; expected torch.strided or torch.sparse_csr"
        )
    counts: Tensor = ops.count_bigrams(tokens, vocab_size)
    return counts


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
    """One step of AdamW (Loshchilov, Hutter: "Decoupled Weight Decay Regularization"), in place.

    Args:
        param: Any shape, contiguous, float32 or float64, on the CPU or a GPU; the other tensors are alike.
        grad: The gradient of ``param``.
        exp_avg: The running mean of the gradients; updated.
        exp_avg_sq: The running mean of their squares; updated.
        max_exp_avg_sq: The largest ``exp_avg_sq`` so far, for AMSGrad; updated.
        step: The count of this step, from 1: one float32 or float64 element, on the CPU or on the device of ``param``,
            as ``torch._fused_adamw_`` takes it.
        lr: Learning rate.
        beta1: Decay of ``exp_avg``.
        beta2: Decay of ``exp_avg_sq``.
        eps: Added to the denominator.
        weight_decay: Shrinks ``param`` by ``lr * weight_decay`` first.
        maximize: Ascends the gradient.

    Raises:
        RuntimeError: A shape, dtype or device differs from that of ``param``; a tensor that is written is not
            contiguous, shares memory with another tensor, or requires a gradient; or ``lr`` is too large for ``param``.
        ValueError: ``step``, on the CPU, is less than 1, or ``beta1`` or ``beta2`` is not from 0 to below 1.
        TypeError: An argument is of the wrong type.
    """
    ops.adamw_(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, maximize)
