"""The same work done by others: the lecture's script in eager PyTorch, NumPy, JAX; on a GPU Liger-Kernel.

Each at its best: of several ways of writing it, the fastest. JAX, NumPy and Liger-Kernel are imported by the functions
that return their implementations, which raise a ModuleNotFoundError if they are not installed.
"""

from __future__ import annotations

import importlib
import math
import os
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Function
from bigramx import CharTokenizer, SmoothedBigramModel, data

GetBatch = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


def text_tokens(num_tokens: int, vocab_size: int = 65) -> Tensor:
    """(N) int64 tokens of a text, so that some are rare and some are not, below ``vocab_size``."""
    text = data.default_text()
    tokens = CharTokenizer.from_text(text).encode(text) % vocab_size
    return tokens.repeat(-(-num_tokens // len(tokens)))[:num_tokens].clone()


def zipf_tokens(num_tokens: int, vocab_size: int = 8192) -> Tensor:
    """(N) int64 tokens of which token k is about as frequent as 1 / (k + 1): as words are, and byte pairs."""
    ranks = (torch.rand(num_tokens, dtype=torch.float64) * math.log(vocab_size + 1)).exp().long()
    return ranks.clamp_(max=vocab_size) - 1


@cache
def package_texts(num_characters: int) -> list[str]:
    """The texts of installed modules, so many characters in all or fewer."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        if num_characters <= 0:
            break
        text = path.read_text(encoding="utf-8", errors="replace")[:num_characters]
        num_characters -= len(text)
        texts.append(text)
    return texts


@cache
def package_tokens(vocab_size: int) -> Tensor:
    """(N) int64 tokens of these texts, by a BPE that is trained on them.

    Raises:
        ImportError: tokenizers is not installed.
    """
    from bigramx.tokenizer import train_bpe

    texts = package_texts(4 * 10**6)
    return train_bpe(texts, vocab_size).encode("\n".join(texts)).long()


def chain_tokens(num_tokens: int, vocab_size: int) -> Tensor:
    """(N) uint16 or int32 tokens of chains: token k as frequent as for ``zipf_tokens``, and pairs far from independent.

    Two out of three tokens follow from the one before and a rank, which is low mostly, as the successors of a word do.
    """
    num_chains = 1 + num_tokens // 1000
    chains, last = [], torch.zeros(num_chains, dtype=torch.int64)
    for _ in range(-(-num_tokens // num_chains)):
        mixed = (last * 1000 + zipf_tokens(num_chains, 300)) * 0x9E3779B97F4A7C1 & (1 << 53) - 1
        bound = (mixed.double() / (1 << 53) * math.log(vocab_size + 1)).exp().long().clamp_(max=vocab_size) - 1
        last = torch.where(torch.rand(num_chains) < 2 / 3, bound, zipf_tokens(num_chains, vocab_size))
        chains.append(last.to(torch.uint16 if vocab_size <= 2**16 else torch.int32))
    return torch.stack(chains, dim=1).view(-1)[:num_tokens].clone()


def in_powers_of_ten(count: int) -> str:
    """As the names of cases have it: 2*10^7."""
    digits = str(count).rstrip("0")
    return f"{digits}*10^{len(str(count)) - len(digits)}".removeprefix("1*")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for the one shape of a case: what was compiled for another must not make it dynamic."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


# ---------------------------------------------------------------------------------------- the lecture


def lecture_get_batch(tokens: Tensor, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Two stacks of slices."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,))
    idx = torch.stack([tokens[i : i + block_size] for i in starts])
    targets = torch.stack([tokens[i + 1 : i + block_size + 1] for i in starts])
    return idx, targets


def lecture_step(model: nn.Module, optimizer: torch.optim.Optimizer, get_batch: GetBatch, tokens: Tensor) -> Tensor:
    """The body of the training loop, B = 32, T = 8; the loss."""
    idx, targets = get_batch(tokens, 32, 8)
    _logits, loss = model(idx, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    detached: Tensor = loss.detach()
    return detached


@torch.no_grad()
def lecture_estimate_loss(model: nn.Module, split: Tensor) -> float:
    """The mean over 200 batches."""
    losses = torch.zeros(200)
    for k in range(200):
        _logits, loss = model(*lecture_get_batch(split, 32, 8))
        losses[k] = loss.item()
    return losses.mean().item()


def eager_loss(idx: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss without the model around it."""
    return F.cross_entropy(F.embedding(idx, weight), targets)


# ----------------------------------------------------------------------------------------- Liger-Kernel


def liger_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Its cross entropy of the logits: idx, weight, targets -> the loss.

    Its fused linear cross entropy does something else: there the logits are products of hidden states and a weight,
    which an embedding does without.
    """
    cross_entropy = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss()

    def loss(idx: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = cross_entropy(F.embedding(idx, weight), targets)
        return value

    return loss


# ----------------------------------------------------------------------------------------------- NumPy


def numpy_get_batch(tokens: Tensor) -> Function:
    """B = 32, T = 8, the starts drawn by PyTorch so that the draws are the same."""
    import numpy

    array, steps = tokens.numpy(), numpy.arange(8)

    def get_batch() -> object:
        positions = torch.randint(len(array) - 8, (32, 1)).numpy() + steps
        return array[positions], array[positions + 1]

    return get_batch


def numpy_multinomial(probs: Tensor, num_samples: int) -> Function:
    """Draws with replacement by the running sums of each row of (B, V)."""
    import numpy

    array, generator = probs.numpy(), numpy.random.default_rng(0)

    def multinomial() -> object:
        sums = array.cumsum(axis=1)
        uniforms = generator.random((len(array), num_samples), dtype=numpy.float32) * sums[:, -1:]
        return numpy.stack([row.searchsorted(draws) for row, draws in zip(sums, uniforms, strict=True)])

    return multinomial


def numpy_generate(weight: Tensor, max_new_tokens: int) -> Function:
    """One chain from token 0 by the running sums of each row of probabilities; (1, 1 + max_new_tokens)."""
    import numpy

    logits, generator = weight.detach().numpy(), numpy.random.default_rng(0)

    def generate() -> object:
        sums = numpy.exp(logits - logits.max(axis=1, keepdims=True)).cumsum(axis=1)
        sums /= sums[:, -1:]
        sums[:, -1] = 1
        rows, tokens = list(sums), [0]
        for uniform in generator.random(max_new_tokens, dtype=numpy.float32):
            tokens.append(int(rows[tokens[-1]].searchsorted(uniform, side="right")))
        return [tokens]

    return generate


def numpy_count_bigrams(tokens: Tensor, vocab_size: int) -> Function:
    """numpy.bincount of the numbers of the pairs."""
    import numpy

    array = tokens.numpy()

    def count() -> object:
        pairs = array[:-1] * numpy.int64(vocab_size) + array[1:]
        return numpy.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)

    return count


def numpy_unique(tokens: Tensor, vocab_size: int) -> Function:
    """The numbers of the distinct pairs, ascending, and how often each occurs."""
    import numpy

    array = tokens.numpy()
    return lambda: numpy.unique(array[:-1] * numpy.int64(vocab_size) + array[1:], return_counts=True)


def scipy_count_bigrams(tokens: Tensor, vocab_size: int) -> Function:
    """Ones in COO, added up as that becomes CSR."""
    numpy, sparse = importlib.import_module("numpy"), importlib.import_module("scipy.sparse")
    array = tokens.numpy()

    def count() -> object:
        ones = numpy.ones(len(array) - 1, dtype=numpy.int64)
        csr = sparse.coo_matrix((ones, (array[:-1], array[1:])), shape=(vocab_size, vocab_size)).tocsr()
        csr.sum_duplicates()
        return csr

    return count


def polars_count_bigrams(tokens: Tensor) -> Function:
    """Groups of equal pairs, in no order."""
    polars = importlib.import_module("polars")
    array = tokens.numpy()
    return lambda: polars.DataFrame({"row": array[:-1], "column": array[1:]}).group_by("row", "column").len()


def counter_of_pairs(tokens: Tensor) -> Function:
    """A dictionary: what people write."""
    return lambda: Counter(zip(values := tokens.tolist(), values[1:], strict=False))


def numpy_kneser_ney(counts: Tensor) -> Function:
    """Interpolated modified Kneser-Ney of a CSR matrix, by reduceat and bincount; no row is empty."""
    import numpy

    crow, columns, values = (part.numpy() for part in (counts.crow_indices(), counts.col_indices(), counts.values()))
    vocab_size = counts.size(0)

    def discounts(counts: Any) -> Any:
        n = numpy.bincount(numpy.minimum(counts, 5), minlength=6).astype(float)
        y = n[1] / max(n[1] + 2 * n[2], 1)
        with numpy.errstate(invalid="ignore", divide="ignore"):
            of = numpy.array([0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]])
        return of if ((of[1:] > 0) & (of[1:] <= (1, 2, 3))).all() else numpy.array([0, 0.5, 1, 1.5])

    def estimate() -> object:
        removed = discounts(values)[numpy.minimum(values, 3)]
        sums = numpy.add.reduceat(values, crow[:-1])
        pair_probs = (values - removed) / numpy.repeat(sums, numpy.diff(crow))
        backoff = numpy.add.reduceat(removed, crow[:-1]) / sums
        continuations = numpy.bincount(columns, minlength=vocab_size)
        removed = discounts(continuations)[numpy.minimum(continuations, 3)]
        unigram = (continuations - removed + removed.sum() / vocab_size) / continuations.sum()
        return pair_probs.astype("float32"), backoff.astype("float32"), unigram.astype("float32")

    return estimate


def numpy_smoothed_loss(model: SmoothedBigramModel, tokens: Tensor) -> Function:
    """The pairs by numpy.unique, sought among the model's by searchsorted."""
    import numpy

    crow, columns, pair_probs, backoff, unigram = (part.numpy() for part in model._parts())
    vocab_size = model.vocab_size
    keys = numpy.repeat(numpy.arange(vocab_size), numpy.diff(crow)) * vocab_size + columns
    array = tokens.numpy()

    def evaluate() -> float:
        pairs, numbers = numpy.unique(array[:-1] * vocab_size + array[1:], return_counts=True)
        places = numpy.minimum(numpy.searchsorted(keys, pairs), len(keys) - 1)
        own = numpy.where(keys[places] == pairs, pair_probs[places], 0).astype("float64")
        probs = own + backoff[pairs // vocab_size].astype("float64") * unigram[pairs % vocab_size]
        return float(-(numpy.log(probs) * numbers).sum() / numbers.sum())

    return evaluate


def numpy_encode(text: str) -> Function:
    """A table from code points to tokens."""
    import numpy

    characters = numpy.array([ord(character) for character in sorted(set(text))])
    tokens = numpy.zeros(characters.max() + 1, dtype=numpy.int64)
    tokens[characters] = numpy.arange(len(characters))
    return lambda: tokens[numpy.frombuffer(text.encode("utf-32-le"), dtype=numpy.uint32)]


# ------------------------------------------------------------------------------------------------- JAX


def load_jax() -> Any:
    """JAX on as many threads as PyTorch."""
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # the size of its pool, read when it starts
    return importlib.import_module("jax")


def jitted(function: Callable[..., Any], *arguments: Any) -> Function:
    """Calls the compiled function with the arguments, and waits for what it returns; tensors become JAX's arrays."""
    jax = load_jax()
    compiled = jax.jit(function)
    arrays = [jax_array(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
    return lambda: jax.block_until_ready(compiled(*arrays))


def jax_array(tensor: Tensor) -> Any:
    """The same numbers for JAX; integers as int32."""
    array = tensor.detach().numpy()
    return load_jax().numpy.asarray(array if tensor.is_floating_point() else array.astype("int32"))


def jax_loss(weight: Any, idx: Any, targets: Any) -> tuple[Any, Any]:
    """The loss () and the logits (N, V). logsumexp takes less time here than log_softmax."""
    jax = load_jax()
    logits = weight[idx.reshape(-1)]
    correct = jax.numpy.take_along_axis(logits, targets.reshape(-1, 1), axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - correct).mean(), logits


def jax_value_and_grad(idx: Tensor, weight: Tensor, targets: Tensor, *, return_logits: bool = False) -> Function:
    """The loss and the gradient; with ``return_logits`` the logits are computed too."""
    jax = load_jax()

    def value_and_grad(weight: Any, idx: Any, targets: Any) -> Any:
        (loss, logits), gradient = jax.value_and_grad(jax_loss, has_aux=True)(weight, idx, targets)
        return loss, gradient, logits if return_logits else None

    step: Callable[[], Any] = jitted(value_and_grad, weight, idx, targets)
    return lambda: step()[:2]


def jax_fit(weight: Tensor, tokens: Tensor, steps: int) -> Function:
    """The whole loop in one scan, B = 32, T = 8: the losses.

    The starts of all batches are drawn at once, and each batch is a slice: of four ways the fastest.
    """
    jax = load_jax()
    jnp = jax.numpy

    def step(tokens: Any, state: tuple[Any, ...], starts: Any) -> tuple[tuple[Any, ...], Any]:
        weight, exp_avg, exp_avg_sq, number = state
        blocks = jax.vmap(lambda start: jax.lax.dynamic_slice(tokens, (start,), (9,)))(starts)
        (loss, _logits), gradient = jax.value_and_grad(jax_loss, has_aux=True)(weight, blocks[:, :-1], blocks[:, 1:])
        number = number + 1
        exp_avg = 0.9 * exp_avg + 0.1 * gradient
        exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * gradient**2
        denominator = jnp.sqrt(exp_avg_sq / (1 - 0.999**number)) + 1e-8
        weight = weight * (1 - 1e-2 * 1e-2) - 1e-2 / (1 - 0.9**number) * exp_avg / denominator
        return (weight, exp_avg, exp_avg_sq, number), loss

    def fit(weight: Any, tokens: Any, key: Any) -> Any:
        starts = jax.random.randint(key, (steps, 32), 0, len(tokens) - 8)
        state = (weight, jnp.zeros_like(weight), jnp.zeros_like(weight), jnp.float32(0))
        (weight, *_), losses = jax.lax.scan(partial(step, tokens), state, starts)
        return losses, weight

    loop: Callable[[], Any] = jitted(fit, weight, tokens, jax.random.key(0))
    return lambda: loop()[0]


def jax_multinomial(probs: Tensor) -> Function:
    """A draw from each row by its running sums, for which jax.random.categorical takes six times as long; (B, 1)."""
    jax = load_jax()

    def multinomial(probs: Any, key: Any) -> Any:
        sums = jax.numpy.cumsum(probs, axis=1)
        uniforms = jax.random.uniform(key, (len(probs), 1)) * sums[:, -1:]
        return (sums <= uniforms).sum(axis=1, keepdims=True)

    return jitted(multinomial, probs, jax.random.key(0))


def jax_choice(probs: Tensor, num_samples: int) -> Function:
    """Draws with replacement from (V)."""
    jax = load_jax()

    def choice(probs: Any, key: Any) -> Any:
        return jax.random.choice(key, len(probs), (num_samples,), p=probs / probs.sum())

    return jitted(choice, probs, jax.random.key(0))


def jax_generate(weight: Tensor, batch_size: int, max_new_tokens: int) -> Function:
    """Chains from token 0 in one scan, by the running sums of each row of probabilities; (B, max_new_tokens)."""
    jax = load_jax()

    def generate(weight: Any, key: Any) -> Any:
        sums = jax.numpy.cumsum(jax.nn.softmax(weight), axis=1)[:, :-1]

        def step(last: Any, uniforms: Any) -> tuple[Any, Any]:
            following = (sums[last] <= uniforms).sum(axis=1, dtype="int32")
            return following, following

        uniforms = jax.random.uniform(key, (max_new_tokens, batch_size, 1))
        return jax.lax.scan(step, jax.numpy.zeros(batch_size, dtype="int32"), uniforms)[1].T

    return jitted(generate, weight, jax.random.key(0))


def jax_count_bigrams(tokens: Tensor, vocab_size: int) -> Function:
    """jax.numpy.bincount of the numbers of the pairs."""
    jax = load_jax()

    def count(tokens: Any) -> Any:
        pairs = tokens[:-1] * vocab_size + tokens[1:]
        return jax.numpy.bincount(pairs, length=vocab_size**2).reshape(vocab_size, vocab_size)

    return jitted(count, tokens)
