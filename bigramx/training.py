"""The training loop and its history."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bigramx import ops
from bigramx.data import get_batch
from bigramx.evaluation import optimal_loss, optimal_loss_of_counts
from bigramx.model import BigramLanguageModel
from bigramx.optim import AdamW, has_hooks, state_of
from bigramx.storage import checksum, read_tensors, write_tensors

_KIND = "history"


@dataclass(eq=False)  # it holds tensors
class History:
    """The record of a run of ``fit``; passed to another run as ``resume``, it continues where this one ended.

    Attributes:
        losses: The loss of each step's batch, before the step.
        steps: The steps at which the model was evaluated; step 0 is before the first.
        train_losses: The exact loss on the training tokens at each of them, nats per token.
        val_losses: The same on the validation tokens; NaN where a run had none, empty where none had.
        optimum: The lowest loss that a bigram table can have on the training tokens.
        interrupted: Whether Ctrl-C ended the run.
        optimizer_state: The optimizer's state_dict at the end.
        generator_state: The state of the generator that drew the batches, at the end.
        table_checksum: CRC-32 of the table at the end, to check that a model is the one to continue with.
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    optimum: float = float("nan")
    interrupted: bool = False
    optimizer_state: dict[str, Any] | None = field(default=None, repr=False)
    generator_state: Tensor | None = field(default=None, repr=False)
    table_checksum: int | None = field(default=None, repr=False)

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
            "table_checksum": self.table_checksum,
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
        try:
            return cls._from_parts(tensors, json.loads(metadata["history"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: a history of another version of bigramx ({error})") from None

    @classmethod
    def _from_parts(cls, tensors: dict[str, Tensor], values: dict[str, Any]) -> History:
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


class _Interrupt:
    """Records Ctrl-C during the steps, to be checked between two of them; a second Ctrl-C raises at once.

    Only in the main thread, where Python delivers it, and only in place of Python's own handler.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _Interrupt:
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._installed = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _remember(self, *_signal: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


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
    on_progress: Callable[[History], None] | None = None,
    on_evaluation: Callable[[History], None] | None = None,
) -> History:
    """The lecture's training loop: get_batch, forward, backward, AdamW; evaluated exactly, not on sampled batches.

    If the table is dense, float32 or float64, and on the CPU, the steps up to the next evaluation are one native call.
    Otherwise, or if a subclass overrides ``forward`` or there are hooks, the steps run in Python.

    Ctrl-C ends the run between two steps: the history records it, and the run can be resumed. A second Ctrl-C ends it
    at once.

    Args:
        model: Trained in place. With a sparse gradient the optimizer is torch.optim.SparseAdam.
        train_tokens: (N) tokens, N > block_size.
        val_tokens: Evaluated as well as the training tokens.
        batch_size: B, blocks per step.
        block_size: T, tokens per block.
        max_steps: Steps in all, those of ``resume`` included.
        lr: Learning rate.
        eval_interval: Steps between evaluations; the first is before the first step, the last after the last.
        generator: Draws the batches; None: PyTorch's default generator.
        resume: The history of an earlier run of this model, which is not modified. Its steps count, its optimizer
            continues (at ``lr``), and the generator is set to its state at the end: the result equals that of one run.
        on_progress: Called with the history several times a second, between two steps.
        on_evaluation: Called with the history after each evaluation.

    Returns:
        The history: losses, evaluations, the optimum.

    Raises:
        ValueError: A size or an interval is not positive, there are too few tokens, or ``resume`` is the history of
            another model.
        RuntimeError: The tokens are not 1-D, or of another dtype than uint8, uint16, int32 or int64.
        IndexError: A token is out of range for the model.
    """
    if max_steps < 0 or eval_interval < 1:
        raise ValueError(f"expected max_steps >= 0 and eval_interval >= 1, got {max_steps} and {eval_interval}")
    history = History() if resume is None else copy.deepcopy(resume)
    train, val = _Corpus(model, train_tokens), None if val_tokens is None else _Corpus(model, val_tokens)
    history.optimum = train.optimal_loss()
    history.interrupted = False
    optimizer = _optimizer(model, history, lr)
    if history.generator_state is not None:
        _set_state(generator, history.generator_state)

    loop = _Loop(model, optimizer, history, train_tokens, batch_size, block_size, generator)
    take_steps = loop.native_steps if loop.has_native_steps() else loop.python_step

    try:
        with _Interrupt() as interrupt:
            while history.step < max_steps and not interrupt.requested:
                if history.step % eval_interval == 0:
                    _evaluate(history, train, val, on_evaluation)
                most = min(max_steps - history.step, eval_interval - history.step % eval_interval)
                take_steps(most)
                if on_progress is not None:
                    on_progress(history)
            if not interrupt.requested:
                _evaluate(history, train, val, on_evaluation)
            history.interrupted = interrupt.requested
    except KeyboardInterrupt:
        history.interrupted = True
    history.optimizer_state = optimizer.state_dict()
    history.generator_state = _get_state(generator)
    history.table_checksum = _table_checksum(model)
    return history


@dataclass
class _Loop:
    """What a step needs, and two implementations of steps, which record the losses."""

    model: BigramLanguageModel
    optimizer: torch.optim.Optimizer
    history: History
    tokens: Tensor
    batch_size: int
    block_size: int
    generator: torch.Generator | None

    def has_native_steps(self) -> bool:
        """Whether the kernels do all that a step does: no other forward, no hooks."""
        model, weight = self.model, self.model.token_embedding_table.weight
        return (
            getattr(model.forward, "__func__", None) is BigramLanguageModel.forward
            and not (model._forward_hooks or model._forward_pre_hooks)
            and not (model._backward_hooks or model._backward_pre_hooks)
            and not (weight._backward_hooks or weight._post_accumulate_grad_hooks)
            and isinstance(self.optimizer, AdamW)
            and not has_hooks(self.optimizer)
            and isinstance(weight, torch.nn.Parameter)
            and weight.requires_grad
            and weight.is_cpu
            and weight.is_contiguous()
            and weight.dtype in (torch.float32, torch.float64)
        )

    @torch.no_grad()
    def native_steps(self, most: int) -> None:
        """Takes at least one step and at most `most`, as many as fit into the time for which Ctrl-C may wait."""
        max_seconds = 0.05
        table, (group,) = self.model.token_embedding_table, self.optimizer.param_groups
        state = state_of(self.optimizer, table.weight, group)
        losses = torch.empty(most, dtype=torch.float64)
        num_steps = ops.fit_(
            table.weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            losses,
            self.tokens.cpu(),
            self.batch_size,
            self.block_size,
            ops.NO_PADDING if table.padding_idx is None else table.padding_idx,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            max_seconds,
            self.generator,
        )
        table.weight.grad = None
        self.history.losses += losses[:num_steps].tolist()

    def python_step(self, _most: int) -> None:
        """Takes one step, for a model on any device, with any table and optimizer."""
        device = self.model.device
        idx, targets = get_batch(self.tokens, self.batch_size, self.block_size, generator=self.generator)
        _logits, loss = self.model(idx.to(device), targets.to(device), return_logits=False)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.history.losses.append(loss.item())


def _optimizer(model: BigramLanguageModel, history: History, lr: float) -> torch.optim.Optimizer:
    """A new optimizer, or the one that the history ended with, at the learning rate ``lr``."""
    sparse = model.token_embedding_table.sparse
    optimizer: torch.optim.Optimizer = (torch.optim.SparseAdam if sparse else AdamW)(model.parameters(), lr=lr)
    if history.optimizer_state is None:
        return optimizer
    if history.table_checksum != _table_checksum(model):
        raise ValueError("resume: the history is not of this model: its run ended with another table")
    if history.optimizer_state["param_groups"][0].keys() != optimizer.param_groups[0].keys():
        raise ValueError(
            f"resume: the history's optimizer is not {type(optimizer).__name__}, which sparse={sparse} takes"
        )
    optimizer.load_state_dict(history.optimizer_state)
    optimizer.param_groups[0]["lr"] = lr
    return optimizer


class _Corpus:
    """Tokens to evaluate a model on repeatedly: their pairs are counted once, where that pays."""

    def __init__(self, model: BigramLanguageModel, tokens: Tensor) -> None:
        self._model, self._tokens, self._counts = model, tokens, model.count_pairs(tokens)

    def loss(self) -> float:
        if self._counts is None:
            return self._model.evaluate(self._tokens)
        return self._model.evaluate_counts(self._counts)

    def optimal_loss(self) -> float:
        return optimal_loss(self._tokens) if self._counts is None else optimal_loss_of_counts(self._counts)


def _evaluate(
    history: History, train: _Corpus, val: _Corpus | None, on_evaluation: Callable[[History], None] | None
) -> None:
    if history.steps and history.steps[-1] == history.step:
        return
    train_loss = train.loss()
    val_loss = float("nan") if val is None else val.loss()
    if val is not None or history.val_losses:
        missing = len(history.steps) - len(history.val_losses)  # where earlier runs had no validation tokens
        history.val_losses += [float("nan")] * missing + [val_loss]
    history.steps.append(history.step)
    history.train_losses.append(train_loss)
    if on_evaluation is not None:
        on_evaluation(history)


def _table_checksum(model: BigramLanguageModel) -> int:
    weight = model.token_embedding_table.weight.detach().cpu().contiguous()
    return checksum(weight)


def _get_state(generator: torch.Generator | None) -> Tensor:
    return torch.get_rng_state() if generator is None else generator.get_state()


def _set_state(generator: torch.Generator | None, state: Tensor) -> None:
    if generator is None:
        torch.set_rng_state(state)
    else:
        generator.set_state(state)
