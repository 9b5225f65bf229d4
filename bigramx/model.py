"""The bigram language model as a module."""

from __future__ import annotations

import json
import os

import torch
import torch.nn as nn
from torch import Tensor

from bigramx import functional, fusion
from bigramx.data import are_worth_counting, check_tokens
from bigramx.functional import Sampler
from bigramx.storage import read_tensors, write_tensors
from bigramx.tokenizer import CharTokenizer

_KIND = "model"
_WEIGHT = "token_embedding_table.weight"
_NO_TOKEN = torch.iinfo(torch.int64).min


class BigramLanguageModel(nn.Module):
    """The lecture's model: a table (V, V) whose row i holds the logits of the token that follows token i.

    Args:
        vocab_size: V.
        sparse: The gradient of the table is sparse: only the rows that occur in the batch.
        device: The device of the table.
        dtype: float64, float32, bfloat16 or float16.

    Attributes:
        token_embedding_table: nn.Embedding(V, V), initialised as in the lecture: N(0, 1).
        tokenizer: Saved and loaded with the model; None without one.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size, sparse=sparse, device=device, dtype=dtype)
        self.tokenizer: CharTokenizer | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.token_embedding_table.num_embeddings

    @property
    def device(self) -> torch.device:
        """The device of the table."""
        return self.token_embedding_table.weight.device

    @property
    def is_fused(self) -> bool:
        """Whether the kernels do all that calling this model does; otherwise its parts are called, as in plain PyTorch.

        They do for a plain nn.Embedding and this class's ``forward``, without hooks: see bigramx.fusion.
        """
        return fusion.runs_only(self, BigramLanguageModel.forward) and fusion.is_plain_table(self.token_embedding_table)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """The logits of the token after each of ``idx`` and, given targets, the loss.

        Args:
            idx: (B, T) tokens, int64 or int32; any shape is accepted.
            targets: The token that follows each, of the shape of ``idx``.
            return_logits: False, with targets: the logits are None, and no (N, V) tensor is materialised.

        Returns:
            Without targets: logits (B, T, V) and None. With targets: logits (B*T, V), differentiable, and the mean
            cross-entropy (), in nats.

        Raises:
            IndexError: A token is out of range.
            ValueError: ``targets`` has another shape than ``idx``.
            RuntimeError: A dtype or device is off, or no kernel is built for the device.
        """
        table = self.token_embedding_table
        if targets is None:
            return table(idx), None
        if not return_logits:
            return None, functional.embedding_cross_entropy(
                idx, table.weight, targets, padding_idx=table.padding_idx, sparse=table.sparse
            )
        loss, logits = functional.embedding_cross_entropy_with_logits(
            idx, table.weight, targets, padding_idx=table.padding_idx, sparse=table.sparse
        )
        return logits, loss

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: int | None = None,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues each sequence of ``idx``, (B, T), by ``max_new_tokens``: (B, T + max_new_tokens) int64.

        The options are those of ``functional.generate``. With none of them, on the CPU, the tokens equal those of the
        lecture's loop for the same seed.
        """
        return functional.generate(
            idx,
            self.token_embedding_table.weight,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop=stop,
            sampler=sampler,
            generator=generator,
        )

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> float:
        """The exact mean cross-entropy of each token of ``tokens``, (N), given the one before it, in nats.

        All pairs count, not sampled batches, at the cost of their distinct rows. Where the table is small compared with
        the tokens, the pairs are counted and the loss is computed in float64; otherwise a 16-bit table is read in
        float32. NaN for fewer than two tokens.

        Raises:
            RuntimeError: ``tokens`` is not 1-D, or of another dtype than uint8, uint16, int32 or int64.
            IndexError: A token is out of range.
        """
        counts = self.count_pairs(tokens)
        if counts is not None:
            return self.evaluate_counts(counts)
        weight = self.token_embedding_table.weight
        weight = weight if weight.dtype == torch.float64 else weight.float()
        tokens = tokens.to(self.device, torch.int64)
        return functional.embedding_cross_entropy(tokens[:-1], weight, tokens[1:], ignore_index=_NO_TOKEN).item()

    def count_pairs(self, tokens: Tensor) -> Tensor | None:
        """The pair counts of ``tokens``, (V, V), on the table's device; None if these are not small compared with them.

        Raises:
            RuntimeError: ``tokens`` is not 1-D, or of another dtype than uint8, uint16, int32 or int64.
            IndexError: A token is out of range.
        """
        check_tokens(tokens)
        if not are_worth_counting(tokens, self.vocab_size):
            return None
        return functional.count_bigrams(tokens.to(self.device), self.vocab_size)

    @torch.no_grad()
    def evaluate_counts(self, counts: Tensor) -> float:
        """What ``evaluate`` gives for tokens with these pair counts, (V, V), in float64. NaN for no pairs.

        Raises:
            RuntimeError: ``counts`` is not (V, V), or lies on another device than the table.
        """
        if counts.shape != (self.vocab_size, self.vocab_size):
            raise RuntimeError(f"expected counts to be (V, V) with V = {self.vocab_size}, got {tuple(counts.shape)}")
        losses = -self.token_embedding_table.weight.double().log_softmax(dim=1)
        losses = losses.mul_(counts).masked_fill_(counts == 0, 0)  # pairs that never occur may have probability 0
        return (losses.sum(dim=1).sum() / counts.sum()).item()  # row by row, so that threads do not change the sum

    @classmethod
    @torch.no_grad()
    def from_counts(cls, counts: Tensor, smoothing: float = 1.0) -> BigramLanguageModel:
        """Row i is log((counts[i] + smoothing) / their sum), float32: with smoothing 0 the closed-form optimum.

        Args:
            counts: (V, V), as ``functional.count_bigrams`` gives them.
            smoothing: Added to each count. With 0 the loss on the counted tokens is the least there is, and a pair that
                was never seen has probability 0; a row without any pair is uniform.

        Raises:
            RuntimeError: ``counts`` is not square.
            ValueError: ``smoothing`` or a count is negative, infinite or NaN.
        """
        if counts.dim() != 2 or counts.size(0) != counts.size(1):
            raise RuntimeError(f"expected counts to be square, (V, V), got shape {tuple(counts.shape)}")
        if not 0 <= smoothing < float("inf"):
            raise ValueError(f"expected smoothing to be finite and >= 0, got {smoothing}")
        smoothed = counts.double() + smoothing
        valid = (counts >= 0) & smoothed.isfinite()
        if not valid.all():
            raise ValueError(f"expected counts to be finite and >= 0, got {counts[~valid][0].item()}")
        smoothed[smoothed.sum(dim=1) == 0] = 1
        model = cls(counts.size(0), device=counts.device)
        model.token_embedding_table.weight.copy_((smoothed / smoothed.sum(dim=1, keepdim=True)).log())
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table, and the tokenizer where there is one, to one safetensors file, whole or not at all."""
        metadata = {"sparse": json.dumps(self.token_embedding_table.sparse)}
        if self.tokenizer is not None:
            metadata["tokenizer"] = self.tokenizer.to_json()
        write_tensors(path, _KIND, {_WEIGHT: self.token_embedding_table.weight}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BigramLanguageModel:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: The file is damaged, cut short, or holds something else.
            OSError: It cannot be read.
        """
        tensors, metadata = read_tensors(path, _KIND)
        weight = tensors.get(_WEIGHT)
        if weight is None or weight.dim() != 2 or weight.size(0) != weight.size(1) or not weight.is_floating_point():
            raise ValueError(f"{os.fspath(path)}: expected a square table named {_WEIGHT}")
        sparse = metadata.get("sparse") == json.dumps(True)
        model = cls(weight.size(0), sparse=sparse, device="meta", dtype=weight.dtype)
        model.token_embedding_table.weight = nn.Parameter(weight)
        if "tokenizer" in metadata:
            model.tokenizer = CharTokenizer.from_json(metadata["tokenizer"])
            if model.tokenizer.vocab_size != model.vocab_size:
                raise ValueError(
                    f"{os.fspath(path)}: the tokenizer has {model.tokenizer.vocab_size} characters, the table "
                    f"{model.vocab_size} rows"
                )
        return model
