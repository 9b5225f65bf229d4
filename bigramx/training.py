"""The training loop, its history, and the optimum that it approaches."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bigramx.data import get_batch
from bigramx.model import BigramLanguageModel
from bigramx.optim import AdamW
from bigramx.storage import read_tensors, write_tensors

_KIND = "history"


def optimal_loss(tokens: Tensor) -> float:
    """The least mean cross-entropy, in nats, that any bigram table has on ``tokens``, (N), with no table made.

    It is the conditional entropy H(next | last) of the pairs: the loss of W = log(counts) in closed form. NaN for fewer
    than two tokens.
    """
    tokens = tokens.long()
    if len(tokens) < 2:
        return float("nan")
    last, following = tokens[:-1], tokens[1:]
    pair_counts = _occurrences(last * (int(tokens.max()) + 1) + following)
    last_counts = _occurrences(last)
    pairs = len(tokens) - 1
    return float(
        (torch.special.xlogy(last_counts, last_counts).sum() - (pair_counts * pair_counts.log()).sum()) / pairs
    )


def _occurrences(values: Tensor) -> Tensor:
    """How often each distinct value occurs, float64."""
    counts: Tensor = torch.unique(values, return_counts=True)[1]
    return counts.double()


@dataclass
class History:
    """What a run of ``fit`` left behind; given to another as ``resume``, that one goes on where it ended.

    Attributes:
        losses: The loss of each step's batch, before the step.
        steps: The steps at which the model was evaluated; step 0 is before the first.
        train_losses: The exact loss on the training tokens at each of them, nats per token.
        val_losses: The same on the validation tokens; empty without them.
        optimum: The least loss that a bigram table can have on the training tokens.
        interrupted: Whether Ctrl-C ended the run.
        optimizer_state: The optimizer's state_dict at the end.
        generator_state: The state of the generator that drew the batches, at the end.
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    optimum: float = float("nan")
    interrupted: bool = False
    optimizer_state: dict[str, Any] | None = field(default=None, repr=False)
    generator_state: Tensor | None = field(default=None, repr=False)

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return len(self.losses)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the history to one safetensors file, whole or not at all."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        if self.generator_state is not None:
            tensors["generator_state"] = self.generator_state
        numbers: dict[str, object] = {}  # SparseAdam counts its steps in an int
        for index, entries in (self.optimizer_state or {}).get("state", {}).items():
            for name, value in entries.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{index}.{name}"] = value
        values = {
            "steps": self.steps,
            "train_losses": self.train_losses,
            "val_losses": self.val_losses,
            "optimum": self.optimum,
            "interrupted": self.interrupted,
            "param_groups": self.optimizer_state and self.optimizer_state["param_groups"],
            "numbers": numbers,
        }
        write_tensors(path, _KIND, tensors, {"history": json.dumps(values)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: The file is damaged, cut short, or holds something else.
            OSError: It cannot be read.
        """
        tensors, metadata = read_tensors(path, _KIND)
        values = json.loads(metadata["history"])
        groups = values.pop("param_groups")
        state: dict[int, dict[str, object]] = {}
        for key, value in {**tensors, **values.pop("numbers")}.items():
            if key.startswith("optimizer."):
                _prefix, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        return cls(
            losses=tensors["losses"].tolist(),
            optimizer_state=None if groups is None else {"state": state, "param_groups": groups},
            generator_state=tensors.get("generator_state"),
            **values,
        )


def fit(
    model: BigramLanguageModel,
    train_tokens: Tensor,
    val_tokens: Tensor | None = None,
    *,
    batch_size: int = 32,
    block_size: int = 8,
    max_steps: int = 3000,
    lr: float = 1e-2,
    eval_interval: int = 300,
    generator: torch.Generator | None = None,
    resume: History | None = None,
    on_step: Callable[[History], None] | None = None,
    on_evaluation: Callable[[History], None] | None = None,
) -> History:
    """The lecture's training loop: get_batch, forward, backward, AdamW; evaluated exactly, not on sampled batches.

    Ctrl-C ends the run early and cleanly: the history says so, and the model is what the last whole step made of it.

    Args:
        model: Trained in place. With a sparse gradient the optimizer is torch.optim.SparseAdam.
        train_tokens: (N) tokens, N > block_size.
        val_tokens: Evaluated beside the training tokens.
        batch_size: B, blocks a step.
        block_size: T, tokens a block.
        max_steps: Steps in all, those of ``resume`` included.
        lr: Learning rate.
        eval_interval: Steps between evaluations; the first is before the first step, the last after the last.
        generator: Draws the batches; None: PyTorch's default generator.
        resume: The history of an earlier run of this model. Its steps count, its optimizer goes on, and the generator
            is set to where it ended: the result equals that of one run.
        on_step: Called with the history after each step.
        on_evaluation: Called with the history after each evaluation.

    Returns:
        The history: losses, evaluations, the optimum.

    Raises:
        ValueError: A size or an interval is not positive, or there are too few tokens.
        IndexError: A token is out of range for the model.
    """
    if max_steps < 0 or eval_interval < 1:
        raise ValueError(f"expected max_steps >= 0 and eval_interval >= 1, got {max_steps} and {eval_interval}")
    sparse = model.token_embedding_table.sparse
    optimizer = (torch.optim.SparseAdam if sparse else AdamW)(model.parameters(), lr=lr)
    history = History(optimum=optimal_loss(train_tokens)) if resume is None else resume
    history.interrupted = False
    if history.optimizer_state is not None:
        optimizer.load_state_dict(history.optimizer_state)
    if history.generator_state is not None:
        _set_state(generator, history.generator_state)

    def evaluate() -> None:
        if history.steps and history.steps[-1] == history.step:
            return
        history.steps.append(history.step)
        history.train_losses.append(model.evaluate(train_tokens))
        if val_tokens is not None:
            history.val_losses.append(model.evaluate(val_tokens))
        if on_evaluation is not None:
            on_evaluation(history)

    try:
        while history.step < max_steps:
            if history.step % eval_interval == 0:
                evaluate()
            idx, targets = get_batch(train_tokens, batch_size, block_size, generator=generator)
            _logits, loss = model(idx.to(model.device), targets.to(model.device), return_logits=False)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            history.losses.append(loss.item())
            if on_step is not None:
                on_step(history)
        evaluate()
    except KeyboardInterrupt:
        history.interrupted = True
    history.optimizer_state = optimizer.state_dict()
    history.generator_state = _get_state(generator)
    return history


def _get_state(generator: torch.Generator | None) -> Tensor:
    return torch.get_rng_state() if generator is None else generator.get_state()


def _set_state(generator: torch.Generator | None, state: Tensor) -> None:
    if generator is None:
        torch.set_rng_state(state)
    else:
        generator.set_state(state)
