"""Exact losses of tokens and of pair counts.

Tokens are read chunk by chunk and tables block by block, so that a memory-mapped corpus stays on its disk: beyond a
table and its counts everything here takes less than 64 MB of memory, however many tokens there are. ``evaluate`` counts
the distinct pairs, as BigramCounts do.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bigramx import functional, fusion
from bigramx.counts import BigramCounts
from bigramx.data import (
    TokenShards,
    are_worth_counting,
    check_range,
    check_tokens,
    num_pairs,
    shards_of,
    token_range,
)
from bigramx.locks import new_lock
from bigramx.tokenizer import Tokenizer, decode_stream

if TYPE_CHECKING:
    from bigramx.smoothed_model import SmoothedBigramModel

_CHUNK = 2**18  # tokens, or elements of a table, that are read at once: 2 MB in 64 bits
_COUNTED_AT_ONCE = 2**24  # bytes of tokens that are given to count_bigrams
_LARGE_TABLE = 24 * 2**20  # bytes of a table of counts of which there should be only one
_CALLED_AT_ONCE = 2**20  # logits that a model is called for
_SAMPLE_STEP = 2**10  # every so many values of a run are in the sample by which runs are divided

# Reads a run, (2, n): n distinct values in ascending order, and how often each occurs.
_StoredRun = Callable[[], Tensor]
# The losses, (n) float64, of pairs, (n) and (n) int64; and which of them have been seen, where that is known.
_Losses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
_Sequences = list[tuple[str, Tensor]]  # and the names of their files
_Report = Callable[[int], object] | None


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts tokens, each from the one before it.

    Attributes:
        loss: The mean of -log p of the predicted tokens, in nats. Infinite where one has probability 0; NaN for none.
        perplexity: exp(loss).
        bits_per_byte: The sum of -log2 p of the predicted tokens over the bytes of the text: comparable between
            tokenizers, as the loss is not. The first token of a sequence is not predicted, but its bytes count. None
            where the bytes are not known, or tokens are out of the vocabulary.
        num_tokens: All tokens.
        num_pairs: The predicted tokens: all but the first of each sequence, those after ``eot``, and those that are, or
            follow, a token out of the vocabulary.
        num_unseen_pairs: The predicted tokens that never followed the one before in the counts that the model is
            estimated from. None for a model that does not know them.
        num_out_of_vocabulary: The tokens for which the model has no row.
        documents: (D) float64, the loss of each document, NaN where nothing is predicted; None unless asked for. A
            document ends with ``eot`` or its sequence; an ``eot`` that begins a sequence opens the first.
        num_bytes: The bytes of the text in UTF-8, without those of ``eot``; None: not known.
        notes: What makes these figures other than they seem, and what to do about it.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int
    num_pairs: int
    num_unseen_pairs: int | None
    num_out_of_vocabulary: int
    documents: Tensor | None
    num_bytes: int | None
    notes: tuple[str, ...]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tensor | TokenShards | str,
    *,
    num_bytes: int | None = None,
    eot: int | None = None,
    per_document: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Measures how well a model predicts each token from the one before it, in the figures that people report.

    All pairs of consecutive tokens count, but those across two shards. What counts is the probability that the model
    gives, the softmax of its logits in float64, whatever options its loss has.

    Args:
        model: A BigramLanguageModel, a SmoothedBigramModel, or any module which for idx, (B, T), returns logits
            (B, T, V), alone or first in a tuple. It is called for sequences of one token.
        tokens: (N), which may be memory-mapped; or shards, each a sequence of its own; or a text, which the model's
            tokenizer encodes.
        num_bytes: The bytes of the text that the tokens stand for. None: those of ``tokens`` if it is a text, or if
            its shards know them; else of what the model's tokenizer decodes the tokens to, if it has one.
        eot: The token that ends a document: what follows it is not predicted. None: that of the shards or, if they
            have none, of the model.
        per_document: Whether to tell the loss of each document: one ends with ``eot``, or with its shard.
        progress: Called several times a second with the number of tokens evaluated since the last call.

    Raises:
        RuntimeError: A tensor of tokens is not 1-D, or not of integers.
        ValueError: ``num_bytes`` is not positive; documents of one tensor are asked for without ``eot``; a text has a
            character that the tokenizer lacks.
        TypeError: ``tokens`` is of another type, or a text for a model without a tokenizer.

    Warns:
        UserWarning: The notes of the result: the loss is infinite, tokens are out of the vocabulary.
    """
    tokenizer: Tokenizer | None = getattr(model, "tokenizer", None)
    if num_bytes is not None and num_bytes <= 0:
        raise ValueError(f"expected num_bytes > 0, got {num_bytes}")
    if isinstance(tokens, str):
        if tokenizer is None:
            raise TypeError("evaluate: expected tokens, got a text, and the model has no tokenizer")
        num_bytes = len(tokens.encode("utf-8", "surrogatepass")) if num_bytes is None else num_bytes
        tokens = tokenizer.encode(tokens)
    if per_document and eot is None and isinstance(tokens, Tensor):
        raise ValueError("evaluate: per_document needs eot, the token that ends a document")
    sequences = _named_sequences(tokens)
    for owner in (tokens, model):
        eot = getattr(owner, "eot", None) if eot is None else eot
    num_bytes = getattr(tokens, "num_bytes", None) if num_bytes is None else num_bytes
    if num_bytes is None and tokenizer is not None:
        num_bytes = _num_bytes_of(sequences, tokenizer, eot, progress)
        progress = None
    with evaluation_mode(model):
        tally = _Tally(model, eot, per_document)
        if per_document or not tally.add_counted(sequences, progress):
            tally.add_all(sequences, progress)
    result = tally.result(num_bytes)
    for note in result.notes:
        warnings.warn(f"evaluate: {note}", stacklevel=2)
    return result


def _named_sequences(tokens: Tensor | TokenShards) -> _Sequences:
    if isinstance(tokens, Tensor):
        check_tokens(tokens)
        return [("", tokens)]
    if not hasattr(tokens, "shards"):
        raise TypeError(f"expected tokens to be a Tensor, TokenShards or a str, got {type(tokens).__name__}")
    return list(zip(tokens.names, tokens.shards, strict=True))


class _Mode:
    """That of a module before it was evaluated, and the evaluations that go on: of which thread each is."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training, self.threads = module, module.training, dict[object, int]()

    def end(self, evaluation: object) -> None:
        """Puts the mode back, if it was the last. May be called for one that has not begun."""
        self.threads.pop(evaluation, None)
        if not self.threads:
            self.module.training = self.training
            _modes.pop(id(self.module), None)


_modes: dict[int, _Mode] = {}  # by the module's id
_lock = new_lock()  # of these


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()``, and afterwards the mode that each module had; the last of several threads puts it back."""
    evaluation, modules = object(), list(model.modules())
    try:
        with _lock:
            for module in modules:
                _modes.setdefault(id(module), _Mode(module)).threads[evaluation] = threading.get_ident()
        model.eval()
        yield
    finally:
        with _lock:
            for mode in [_modes[id(module)] for module in modules if id(module) in _modes]:
                mode.end(evaluation)


def _end_those_of_other_threads() -> None:
    """They are not there in a forked child."""
    for mode in list(_modes.values()):
        for evaluation, thread in list(mode.threads.items()):
            if thread != threading.get_ident():
                mode.end(evaluation)


os.register_at_fork(after_in_child=_end_those_of_other_threads)


class _Tally:
    """Sums up the losses of sequences, chunk by chunk."""

    def __init__(self, model: nn.Module, eot: int | None, per_document: bool) -> None:
        self._device = _device_of(model)
        self._losses = _losses_under(model)
        self._vocab_size = _vocab_size_of(model, self._device)
        self._eot = eot
        self._total, self._num_tokens, self._num_pairs = 0.0, 0, 0
        self._num_unseen: int | None = None
        self._unknown, self._impossible = _Finds(), _Finds()
        self._documents = _Documents() if per_document else None

    def add_counted(self, sequences: _Sequences, progress: _Report) -> bool:
        """Adds the distinct pairs of sequences, by their counts: there are far fewer of them than tokens.

        Returns:
            False, with nothing added, where something is to be told of single tokens: that they are out of the
            vocabulary, or that they have probability 0.
        """
        if self._eot is not None and not 0 <= self._eot < self._vocab_size:
            return False
        counts = BigramCounts(self._vocab_size, eot=self._eot)
        try:
            for _name, sequence in sequences:
                counts.update(sequence, progress=progress)
        except IndexError:
            return False
        total, num_unseen = 0.0, None
        for rows, columns, pair_counts in _entries(counts.to_csr(), self._device):
            losses, is_seen = self._losses(rows, columns)
            total += _sum(losses.mul_(pair_counts))
            if is_seen is not None:
                num_unseen = (num_unseen or 0) + int(pair_counts[~is_seen].sum())
        if total == math.inf:
            return False
        self._total, self._num_pairs, self._num_unseen = total, counts.num_pairs, num_unseen
        self._num_tokens = sum(len(sequence) for _name, sequence in sequences)
        return True

    def add_all(self, sequences: _Sequences, progress: _Report) -> None:
        """Adds sequences pair by pair."""
        for name, sequence in sequences:
            self._begin(name, sequence)
            for chunk in _overlapping(sequence, _CHUNK):
                num_tokens = self._num_tokens
                self._add(chunk)
                if progress is not None:
                    progress(self._num_tokens - num_tokens)

    def _begin(self, name: str, sequence: Tensor) -> None:
        """What is added from here on belongs to this sequence."""
        self._place = f" of {name}" if name else ""
        self._position = 0
        if self._documents is not None and len(sequence) > 0:
            self._documents.begin(is_open=int(sequence[0]) == self._eot)

    def _add(self, chunk: Tensor) -> None:
        """Adds the pairs of a chunk, whose first token is the last one of the chunk before."""
        tokens = chunk.to(self._device).long()
        num_known = min(self._position, 1)
        is_counted = self._which_count(tokens, num_known)
        if is_counted is None:
            idx, targets = tokens[:-1], tokens[1:]
        else:
            idx, targets = tokens[:-1][is_counted], tokens[1:][is_counted]
        losses, is_seen = self._losses(idx, targets)
        total = _sum(losses)
        if not total < math.inf:
            places = (
                torch.arange(len(tokens) - 1, device=tokens.device)
                if is_counted is None
                else is_counted.nonzero()[:, 0]
            )
            self._impossible.add(
                losses == math.inf, lambda n: f"{targets[n]} after {idx[n]} {self._at(1 + int(places[n]))}"
            )
        if is_seen is not None:
            self._num_unseen = (self._num_unseen or 0) + len(idx) - int(is_seen.sum())
        if self._documents is not None:
            self._documents.add(tokens[:-1] == (-1 if self._eot is None else self._eot), is_counted, losses)
        self._total += total
        self._num_pairs += len(idx)
        self._num_tokens += len(tokens) - num_known
        self._position += max(len(tokens) - 1, 0)

    def _which_count(self, tokens: Tensor, num_known: int) -> Tensor | None:
        """Which pairs of a chunk count; None: all of them."""
        is_counted = None if self._eot is None else tokens[:-1] != self._eot
        if len(tokens) > 0:
            smallest, largest = tokens.aminmax()
            if smallest < 0 or largest >= self._vocab_size:
                is_unknown = (tokens < 0) | (tokens >= self._vocab_size)
                self._unknown.add(
                    is_unknown[num_known:], lambda n: f"{tokens[num_known + n]} {self._at(num_known + n)}"
                )
                are_known = ~(is_unknown[:-1] | is_unknown[1:])
                is_counted = are_known if is_counted is None else is_counted & are_known
        return is_counted

    def _at(self, n: int) -> str:
        return f"at position {self._position + n}{self._place}"

    def result(self, num_bytes: int | None) -> Evaluation:
        """What the chunks add up to."""
        loss = self._total / self._num_pairs if self._num_pairs > 0 else math.nan
        is_whole = self._unknown.count == 0
        notes = []
        if not is_whole:
            notes.append(
                f"{self._unknown.count:,} of {self._num_tokens:,} tokens are out of the model's vocabulary of "
                f"{self._vocab_size:,}, the first {self._unknown.first}: pairs with them are left out"
            )
        if self._impossible.count > 0:
            notes.append(
                f"{self._impossible.count:,} of {self._num_pairs:,} pairs have probability 0, the first "
                f"{self._impossible.first}: the loss is infinite, which smoothing avoids"
            )
        return Evaluation(
            loss=loss,
            perplexity=math.exp(loss) if loss < 709 else loss * math.inf,
            bits_per_byte=self._total / math.log(2) / num_bytes if num_bytes and is_whole else None,
            num_tokens=self._num_tokens,
            num_pairs=self._num_pairs,
            num_unseen_pairs=self._num_unseen,
            num_out_of_vocabulary=self._unknown.count,
            documents=None if self._documents is None else self._documents.means(),
            num_bytes=num_bytes,
            notes=tuple(notes),
        )


class _Finds:
    """How many there are of something, and what describes the first."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, is_one: Tensor, describe: Callable[[int], str]) -> None:
        found = is_one.nonzero()
        if len(found) > 0 and self.count == 0:
            self.first = describe(int(found[0]))
        self.count += len(found)


class _Documents:
    """The losses of documents, which follow each other in the pairs of sequences."""

    def __init__(self) -> None:
        self._sums = torch.zeros(
            (2, 1024), dtype=torch.float64, device="cpu"
        )  # of the losses of each document; and their number
        self._size = 0  # how many there are; the last one goes on

    def begin(self, is_open: bool) -> None:
        """A sequence begins; where it is open, its first token opens a document by itself."""
        self._size += not is_open

    def add(self, is_end: Tensor, is_counted: Tensor | None, losses: Tensor) -> None:
        """Adds the losses of the pairs that count, or all; after each pair that is an end another document begins."""
        numbers = self._size - 1 + is_end.cumsum(0).cpu()
        if len(numbers) == 0:
            return
        self._size = int(numbers[-1]) + 1
        if self._size > self._sums.size(1):
            self._sums = nn.functional.pad(self._sums, (0, self._size))
        numbers = numbers if is_counted is None else numbers[is_counted.cpu()]
        self._sums[0].index_add_(0, numbers, losses.cpu())
        self._sums[1].index_add_(0, numbers, torch.ones_like(numbers, dtype=torch.float64))

    def means(self) -> Tensor:
        """The loss of each, (D)."""
        sums, counts = self._sums[:, : self._size].unbind()
        return sums / counts


def _num_bytes_of(sequences: _Sequences, tokenizer: Tokenizer, eot: int | None, progress: _Report) -> int | None:
    """The bytes of the texts that tokens stand for; None where some tokens are not the tokenizer's."""
    counter = _ByteCounter(tokenizer, eot)
    for _name, sequence in sequences:
        for chunk in sequence.split(_CHUNK):
            counter.add(chunk)
            if progress is not None:
                progress(len(chunk))
        counter.end_text()
    return counter.num_bytes


class _ByteCounter:
    """Counts the bytes of the texts that tokens stand for, document by document."""

    def __init__(self, tokenizer: Tokenizer, eot: int | None) -> None:
        self._tokenizer, self._eot = tokenizer, eot
        self._stream = decode_stream(tokenizer)
        self.num_bytes: int | None = 0  # None: some tokens are not the tokenizer's

    def add(self, tokens: Tensor) -> None:
        """Adds the texts of tokens, (n), which go on with the last one."""
        tokens = tokens.cpu().long()
        ends = [] if self._eot is None else (tokens == self._eot).nonzero().flatten().tolist()
        for begin, end in zip([0, *(n + 1 for n in ends)], [*ends, len(tokens)], strict=True):
            part = tokens[begin:end]
            if len(part) > 0:
                if not 0 <= part.min() <= part.max() < self._tokenizer.vocab_size:
                    self.num_bytes = None
                self._count(self._stream.step, part)
            if end < len(tokens):
                self.end_text()

    def end_text(self) -> None:
        """The next tokens begin another text."""
        self._count(self._stream.finish)
        self._stream = decode_stream(self._tokenizer)

    def _count(self, decode: Callable[..., str], *tokens: Tensor) -> None:
        if self.num_bytes is not None:
            self.num_bytes += len(decode(*tokens).encode("utf-8", "surrogatepass"))


def _device_of(model: nn.Module) -> torch.device:
    """That of the first parameter or buffer."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _vocab_size_of(model: nn.Module, device: torch.device) -> int:
    """V, or how many logits a model returns that does not say it."""
    vocab_size = getattr(model, "vocab_size", None)
    if isinstance(vocab_size, int):
        return vocab_size
    return _logits(model, torch.zeros(1, dtype=torch.int64, device=device)).size(1)


def _losses_under(model: nn.Module) -> _Losses:
    """What gives the losses of pairs under the model; kernels, where they do all that calling it does."""
    from bigramx.smoothed_model import SmoothedBigramModel  # which needs this module

    if isinstance(model, SmoothedBigramModel) and fusion.runs_only(model, SmoothedBigramModel.forward):
        return partial(_losses_of_probs, model)
    if getattr(model, "is_fused", False):
        return _TableLosses(model.get_parameter("token_embedding_table.weight"))
    return partial(_losses_of_calls, model)


def _losses_of_probs(model: SmoothedBigramModel, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    probs, is_seen = model._probs(idx, targets)
    return probs.log_().neg_(), is_seen


class _TableLosses:
    """The losses of pairs under the logits ``weight``, (V, V), of which each row is read once.

    The logsumexp of a row is kept in two parts: where logits are large, their sum would lose the digits of the second.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self._weight, self._dtype = weight, torch.promote_types(weight.dtype, dtype)
        self._largest = torch.full((len(weight),), torch.nan, dtype=torch.float64, device=weight.device)
        self._rest = torch.empty_like(self._largest)
        self._is_known = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)

    def __call__(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """The losses, (n) float64, of pairs, (n) each."""
        occurs = torch.zeros_like(self._is_known).index_fill_(0, idx, True)
        for rows in (occurs & ~self._is_known).nonzero().squeeze(1).split(_rows_at_once(len(self._weight))):
            logits = self._weight.index_select(0, rows).to(self._dtype)
            self._largest[rows] = logits.amax(dim=1).double()
            self._rest[rows] = -logits.log_softmax(dim=1).amax(dim=1).double()
        self._is_known |= occurs
        return self._largest[idx] - self._weight[idx, targets] + self._rest[idx], None


def _losses_of_calls(model: nn.Module, idx: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    """The losses of pairs, (n) each, under a model that is called for each distinct token once."""
    losses = torch.empty(len(idx), dtype=torch.float64, device=idx.device)
    rows, numbers, sizes = idx.unique(return_inverse=True, return_counts=True)
    step = max(1, _CALLED_AT_ONCE // _vocab_size_of(model, idx.device))
    pairs = numbers.argsort().split([int(part.sum()) for part in sizes.split(step)])
    for first, called, own in zip(range(0, len(rows), step), rows.split(step), pairs, strict=True):
        log_probs = _logits(model, called).double().log_softmax(dim=1)
        losses[own] = -log_probs[numbers[own] - first, targets[own]]
    return losses, None


def _logits(model: nn.Module, idx: Tensor) -> Tensor:
    """The logits, (n, V), after each of ``idx``, (n)."""
    output = model(idx[:, None])
    logits = output[0] if isinstance(output, tuple) else output
    whole: Tensor = logits.full_tensor() if hasattr(logits, "full_tensor") else logits  # of a DTensor
    return whole.reshape(len(idx), -1)


def count_pairs(tokens: Tensor | TokenShards, vocab_size: int, device: torch.device) -> Tensor:
    """``functional.count_bigrams`` on ``device`` of tokens, (N), that may lie elsewhere; of shards the sum of theirs.

    No pair whose first token is the ``eot`` of the shards is counted: it would join two documents.

    Raises:
        IndexError: A token is out of range. On a GPU that may be an assertion on the device.
    """
    if 8 * vocab_size**2 > _LARGE_TABLE or vocab_size**2 * len(shards_of(tokens)) > len(tokens):
        return _count_in_place(tokens, vocab_size, device)
    counts = torch.zeros((vocab_size, vocab_size), dtype=torch.int64, device=device)
    try:
        for chunk in _overlapping(tokens, _COUNTED_AT_ONCE // tokens.dtype.itemsize):
            counts += functional.count_bigrams(chunk.to(device), vocab_size)
    except IndexError:
        check_range(tokens, vocab_size)  # its message has the position among all tokens
        raise
    eot = getattr(tokens, "eot", None)
    if eot is not None and eot < vocab_size:
        counts[eot] = 0
    return counts


def _count_in_place(tokens: Tensor | TokenShards, vocab_size: int, device: torch.device) -> Tensor:
    check_range(tokens, vocab_size)
    counts = torch.zeros(vocab_size**2, dtype=torch.int64, device=device)
    for last, following in _pairs(tokens, device):
        entries = last * vocab_size + following
        counts.scatter_add_(0, entries, torch.ones_like(entries))
    return counts.view(vocab_size, vocab_size)


def loss_of_tokens(weight: Tensor, tokens: Tensor | TokenShards) -> float:
    """The mean cross-entropy of ``tokens``, (N), under the logits ``weight``, (V, V). NaN where there is no pair.

    One logsumexp for each row that occurs, in float64 for a float64 table and else in float32; all sums are in float64.

    Raises:
        IndexError: A token is out of range.
    """
    if num_pairs(tokens) == 0:
        return float("nan")
    check_range(tokens, len(weight))
    losses_of = _TableLosses(weight, torch.float32)
    return sum(_sum(losses_of(*pairs)[0]) for pairs in _pairs(tokens, weight.device)) / num_pairs(tokens)


def loss_of_counts(weight: Tensor, counts: Tensor) -> float:
    """The mean cross-entropy, in float64, of pairs with these counts, (V, V), under the logits ``weight``, (V, V).

    The counts may be sparse (CSR or COO): then the rows that occur are read.
    """
    total = 0.0
    if counts.layout != torch.strided:
        losses_of, counts = _TableLosses(weight), _csr(counts)
        for rows, columns, pair_counts in _entries(counts, weight.device):
            losses = losses_of(rows, columns)[0]
            total += _sum(losses.mul_(pair_counts).masked_fill_(pair_counts == 0, 0))
        return _mean(total, counts.values())
    for logits, pair_counts in zip(row_blocks(weight), row_blocks(counts), strict=True):
        losses = -logits.double().log_softmax(dim=1)
        # Pairs that never occur may have probability 0.
        total += _sum(losses.mul_(pair_counts).masked_fill_(pair_counts == 0, 0))
    return _mean(total, counts)


def _csr(counts: Tensor) -> Tensor:
    """Sparse counts of any layout, (V, V), as torch.sparse_csr."""
    return counts if counts.layout == torch.sparse_csr else BigramCounts.from_csr(counts).to_csr()


def _entries(counts: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows, the columns and the counts of counts in CSR, (V, V), chunk by chunk."""
    crow, columns, values = counts.crow_indices(), counts.col_indices(), counts.values()
    for begin in range(0, len(columns), _CHUNK):
        part = slice(begin, min(begin + _CHUNK, len(columns)))
        rows = torch.searchsorted(crow, torch.arange(part.start, part.stop, device=crow.device), right=True) - 1
        yield rows.to(device), columns[part].to(device).long(), values[part].to(device)


def optimal_loss(tokens: Tensor | TokenShards | BigramCounts) -> float:
    """The lowest mean cross-entropy, in nats, that a bigram table can have on these tokens.

    It is the conditional entropy H(next | last) of the pairs: the loss of W = log(counts) in closed form. NaN for no
    pair. Of shards that have an ``eot``, the pairs after it do not count.

    Where no table of counts pays off, the distinct pairs take 8 bytes of memory each (16 if the tokens span more than
    16 bits), and half as much again while they are counted.

    Args:
        tokens: (N), any integers; or shards, of which each is a sequence of its own; or the counts of pairs: dense
            integers, (V, V), sparse ones (CSR or COO), or BigramCounts.

    Raises:
        RuntimeError: ``tokens`` is neither 1-D nor square, or of another dtype than integers.
    """
    if isinstance(tokens, BigramCounts):
        return optimal_loss_of_counts(tokens.to_csr())
    if isinstance(tokens, Tensor) and (
        tokens.layout != torch.strided or (tokens.dim() == 2 and tokens.size(0) == tokens.size(1))
    ):
        return optimal_loss_of_counts(tokens)
    check_tokens(tokens)
    if num_pairs(tokens) == 0:
        return float("nan")
    smallest, largest = token_range(tokens)
    if smallest >= 0 and are_worth_counting(tokens, largest + 1):
        return optimal_loss_of_counts(count_pairs(tokens, largest + 1, tokens.device))
    last_runs = _occurrences(last for last, _following in _pairs(tokens, tokens.device))
    of_last = _sum_n_log_n(load()[1] for load in last_runs)
    if largest - smallest < 2**32:
        rank, num_ranks = partial(torch.sub, other=smallest), largest - smallest + 1
    else:
        never_last = [shard[-1:].long() for shard in shards_of(tokens)]
        if getattr(tokens, "eot", None) is not None:
            never_last.append(torch.tensor([tokens.eot], device=tokens.device))  # type: ignore[union-attr]
        values = torch.cat([load()[0] for load in last_runs] + never_last).unique()
        rank, num_ranks = partial(torch.searchsorted, values), len(values)
    del last_runs
    pair_runs = _occurrences(_numbered_pairs(tokens, rank, num_ranks))
    return (of_last - _sum_n_log_n(load()[1] for load in pair_runs)) / num_pairs(tokens)


def optimal_loss_of_counts(counts: Tensor) -> float:
    """The same from pair counts, (V, V), dense or sparse. NaN for no pairs."""
    if counts.layout == torch.strided:
        of_last = _sum_n_log_n(counts.sum(dim=1).split(_CHUNK))
        return _mean(of_last - _sum_n_log_n(row_blocks(counts)), counts)
    counts = _csr(counts)
    totals = torch.zeros(counts.size(0), dtype=torch.int64, device=counts.device)
    of_pairs = 0.0
    for rows, _columns, pair_counts in _entries(counts, counts.device):
        totals.index_add_(0, rows, pair_counts.long())
        of_pairs += _sum_n_log_n([pair_counts])
    return _mean(_sum_n_log_n(totals.split(_CHUNK)) - of_pairs, totals)


def row_blocks(table: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows of a table, (V, V), small enough to compute with in float64."""
    blocks: tuple[Tensor, ...] = table.split(_rows_at_once(table.size(1)))
    return blocks


def dense_blocks(counts: Tensor) -> Iterator[Tensor]:
    """The same of counts, which may be sparse: (CSR or COO), of which a block at a time is made dense."""
    if counts.layout == torch.strided:
        yield from row_blocks(counts)
        return
    counts, num_rows = _csr(counts), _rows_at_once(counts.size(1))
    crow, columns, values = counts.crow_indices(), counts.col_indices(), counts.values()
    for begin in range(0, max(len(crow) - 1, 1), num_rows):
        ends = crow[begin : begin + num_rows + 1]
        part = slice(int(ends[0]), int(ends[-1]))
        block = values.new_zeros(len(ends) - 1, counts.size(1))
        rows = torch.repeat_interleave(torch.arange(len(block), device=crow.device), ends.diff())
        block[rows, columns[part].long()] = values[part]
        yield block


def _rows_at_once(row_size: int) -> int:
    return max(1, _CHUNK // max(1, row_size))


def _overlapping(tokens: Tensor | TokenShards, num_pairs: int) -> Iterator[Tensor]:
    """Views of the tokens, with as many pairs each: the last token of one is the first of the next.

    The tokens of each shard by themselves.
    """
    for shard in shards_of(tokens):
        for begin in range(0, max(1, len(shard) - 1), num_pairs):
            yield shard[begin : begin + num_pairs + 1]


def _pairs(
    tokens: Tensor | TokenShards, device: torch.device, rank: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens but the last of each shard, chunk by chunk, and the one that follows each; int64, or their ranks.

    Without those that end a document.
    """
    eot = getattr(tokens, "eot", None)
    for views in _gathered(_overlapping(tokens, _CHUNK)):
        values = torch.cat([view.to(device, tokens.dtype) for view in views]).long()
        is_pair = torch.ones_like(values[1:], dtype=torch.bool)
        sizes = torch.tensor([len(view) for view in views[:-1]], dtype=torch.int64, device=device)
        is_pair[sizes.cumsum(0) - 1] = False  # of two shards
        if eot is not None:
            is_pair &= values[:-1] != eot
        values = values if rank is None else rank(values)
        last, following = values[:-1], values[1:]
        yield (last, following) if len(views) == 1 and eot is None else (last[is_pair], following[is_pair])


def _gathered(views: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of the views, each of about a chunk of tokens: shards may be much smaller."""
    gathered: list[Tensor] = []
    size = 0
    for view in views:
        if size + len(view) > _CHUNK + 1 and gathered:
            yield gathered
            gathered, size = [], 0
        if len(view) > 0:
            gathered.append(view)
            size += len(view)
    if gathered:
        yield gathered


def _sum(values: Tensor) -> float:
    """The sum, the same for any number of threads: so few values at once are not divided among them."""
    return torch.stack([part.sum() for part in values.flatten().split(2**14)]).sum().item()


def _sum_n_log_n(blocks: Iterable[Tensor]) -> float:
    return sum(_sum(torch.special.xlogy(counts, counts.double())) for counts in blocks)


def _mean(total: float, counts: Tensor) -> float:
    """``total`` divided by the sum of the counts: NaN where both are 0."""
    return (total / counts.sum().double()).item()


def _numbered_pairs(tokens: Tensor | TokenShards, rank: Callable[[Tensor], Tensor], num_ranks: int) -> Iterator[Tensor]:
    """A number for each pair of tokens, chunk by chunk: int32 if that holds it, and how often it may occur."""
    is_short = num_ranks <= 2**16 and len(tokens) <= 2**31
    for last, following in _pairs(tokens, tokens.device, rank):
        numbers = (last - num_ranks // 2) * num_ranks + following
        yield numbers.int() if is_short else numbers


def _occurrences(parts: Iterable[Tensor]) -> list[_StoredRun]:
    """How often each value of the parts occurs, as runs that follow each other. The counts fit into their dtype.

    The runs of new parts are merged into those before as soon as they are half as large: a value is merged a few times.
    """
    runs: list[_StoredRun] = []
    merged_size = new_size = 0
    for part in parts:
        values, counts = torch.unique(part, return_counts=True)
        runs.append(_store(torch.stack([values, counts.to(values.dtype)])))
        new_size += max(len(values), _CHUNK // 16)  # lest there be many small runs
        if new_size > max(2 * _CHUNK, merged_size // 2):
            runs = _merge(runs)
            merged_size, new_size = sum(load().size(1) for load in runs), 0
    return _merge(runs) if new_size else runs


def _merge(stored: list[_StoredRun]) -> list[_StoredRun]:
    """Merges runs that overlap into runs of about _CHUNK values that follow each other; ``stored`` is emptied."""
    runs = [load() for load in stored]
    stored.clear()
    sample = torch.cat([run[0, ::_SAMPLE_STEP] for run in runs]).sort().values
    step = _CHUNK // _SAMPLE_STEP
    borders = sample[step::step].contiguous()
    groups: list[list[Tensor]] = [[] for _ in range(len(borders) + 1)]
    while runs:
        run = runs.pop()
        ends = [0, *torch.searchsorted(run[0], borders).tolist(), run.size(1)]
        for group, begin, end in zip(groups, ends[:-1], ends[1:], strict=True):
            if begin < end:
                group.append(run[:, begin:end])
    for group in groups:
        if group:
            stored.append(_store(_sum_of_runs(torch.cat(group, dim=1))))
        group.clear()  # what has been merged is freed before the rest is
    return stored


def _sum_of_runs(runs: Tensor) -> Tensor:
    """The run of values that occur more than once in ``runs``, (2, n)."""
    values, counts = runs
    distinct, positions = torch.unique(values, return_inverse=True)
    return torch.stack([distinct, torch.zeros_like(distinct).index_add_(0, positions, counts)])


def _store(run: Tensor) -> _StoredRun:
    """Copies a run to pages of its own, and returns what reads it there.

    An allocator whose many large and short-lived tensors are interspersed with what stays cannot reuse their memory.
    """
    if not run.is_cpu:
        return lambda: run
    try:
        pages = mmap.mmap(-1, run.nbytes, flags=mmap.MAP_PRIVATE)
    except OSError:  # no more of it: the run stays where it is
        return lambda: run
    torch.frombuffer(pages, dtype=run.dtype).view(2, -1).copy_(run)
    dtype = run.dtype
    return lambda: torch.frombuffer(pages, dtype=dtype).view(2, -1)
