"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import math
import operator
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from bigramx import memory
from bigramx.data import TokenShards, are_worth_counting, check_tokens, get_batch
from bigramx.evaluation import optimal_loss, optimal_loss_of_counts
from bigramx.fusion import is_plain_tensor, loaded
from bigramx.history import History
from bigramx.locks import without_warnings
from bigramx.model import BigramLanguageModel
from bigramx.steps import Steps, fsdp_in, new_optimizer, new_scheduler
from bigramx.wrappers import module_in

Callback = Callable[[History], object]


class _Signals:
    """Holds back SIGINT while a run lasts, and hands it to the handler that was there where all states agree.

    Only in the main thread, where Python delivers it, and only where a handler of Python's or of the user's would be
    called. In between the handler does nothing but note the time, so that no bytecode of a step is the last. Handlers
    of other signals are called at once, but see no table with rows that have missed steps.
    """

    _PATIENCE = 1.0  # seconds after which another SIGINT breaks what has not ended
    _ECHO = 0.1  # seconds after the SIGINT that ends the run in which others are the same: many senders send two
    # Never broken: what they do belongs together.
    _OWN = ("bigramx.training", "bigramx.steps", "bigramx.graph_steps", "bigramx.history")

    def __init__(self) -> None:
        self._history: History | None = None  # once the run is over
        self._handler: Any = None
        self._others: dict[int, Any] = {}  # of other signals
        self._catch_up: Callable[[], None] = lambda: None
        self._since: float | None = None  # when the first came that has not been handed over
        self._ended: float | None = None  # when the handler was given the one that it raised at
        self._is_to_end = False  # as one has ended a run that is a part of a callback of this one

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._hold)
        return self

    def watch(self, steps: Steps) -> None:
        """Lets these steps catch up before a handler is called."""
        self._catch_up = steps.catch_up
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals() - {signal.SIGINT}:
            handler = signal.getsignal(number)
            if callable(handler):
                self._others[number] = handler
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
        self._catch_up()
        self._others[number](number, frame)

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        for number, handler in self._others.items():
            if signal.getsignal(number) == self._pass_on:  # else the user has set another one
                signal.signal(number, handler)
        if self._handler is None:
            return
        if self._ended is not None:
            time.sleep(max(0.0, self._ended + self._ECHO - time.monotonic()))
        try:
            if signal.getsignal(signal.SIGINT) == self._hold:  # else the user has set another one
                signal.signal(signal.SIGINT, self._handler)  # which may be called at once, and raise
            self.hand_over()
        except BaseException as error:
            if self._history is None or kind is not None or not isinstance(error, KeyboardInterrupt):
                _add_history(error, self._history)
                raise
            self._history.interrupted = True

    def end(self, history: History) -> None:
        """Breaks nothing from here on: what the run did is recorded."""
        self._history = history

    def hand_over(self) -> None:
        """Calls the handler if there was a SIGINT. To be called where all states agree, as it may raise."""
        if self._since is not None:
            self._catch_up()
            self._since, self._ended = None, time.monotonic()
            self._call_handler()
            self._ended = None
        if self._is_to_end:
            self._is_to_end = False
            self._catch_up()
            raise KeyboardInterrupt

    def _call_handler(self) -> None:
        """The script's. The runs that this one is within end after it, if it ends so."""
        handler, around = self._handler, []
        while isinstance(run := getattr(handler, "__self__", None), _Signals):
            around.append(run)
            handler = run._handler
        try:
            handler(signal.SIGINT, sys._getframe())
        except KeyboardInterrupt:
            for run in around:
                run._is_to_end = True
            raise

    def _hold(self, _signal: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self._ended is not None and now - self._ended < self._ECHO:
            return
        if self._since is None:
            self._since = now
        elif now - self._since > self._PATIENCE and self._may_break(frame):
            self.hand_over()

    def _may_break(self, frame: types.FrameType | None) -> bool:
        return self._history is None and frame is not None and frame.f_globals.get("__name__") not in self._OWN


class _Recorded:
    """Brings the history up to date when the run ends, whatever ended it; a KeyboardInterrupt goes no further."""

    def __init__(self, steps: Steps, signals: _Signals) -> None:
        self._steps, self._signals = steps, signals
        self._grad_mode = torch.is_grad_enabled()

    def __enter__(self) -> None:
        self._steps.history._update = self._steps.record  # type: ignore[method-assign]

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        history = self._steps.history
        self._signals.end(history)
        torch._C._set_grad_enabled(self._grad_mode)  # a step may have been broken where this is due
        history.interrupted = isinstance(error, KeyboardInterrupt)
        try:
            self._steps.record()
        except Exception as of_record:
            if error is None or history.interrupted:
                _add_history(of_record, history)
                raise
        finally:
            del vars(history)["_update"]
        if error is not None and not history.interrupted:
            _add_history(error, history)
        return history.interrupted


class _Bar:
    """A progress bar over the steps, where one is wanted."""

    def __init__(self, progress: bool | None, history: History, max_steps: int) -> None:
        self._history, self._max_steps = history, max_steps
        self._is_shown = _is_watched() if progress is None else progress
        self._next_time = 0.0

    def __enter__(self) -> _Bar:
        if self._is_shown:
            with without_warnings():  # about ipywidgets, without which the bar is one of text
                from tqdm.auto import tqdm  # type: ignore[import-untyped]
            kind = type("tqdm", (tqdm,), {"monitor_interval": 0})  # no thread that outlives the run
            self._tqdm = kind(total=self._max_steps, initial=self._history.step, unit="step", mininterval=0)
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_shown:
            if self._tqdm.n < self._history.step:
                self._show()
            self._tqdm.__exit__(*error)

    def report(self) -> None:
        """Shows the steps taken, ten times a second at most."""
        if self._is_shown and (now := time.monotonic()) >= self._next_time:
            self._next_time = now + 0.1
            self._show()

    def _show(self) -> None:
        if self._history.losses:
            self._tqdm.set_postfix(loss=f"{self._history.losses[-1]:.4f}", refresh=False)
        self._tqdm.update(self._history.step - self._tqdm.n)


def _is_watched() -> bool:
    """Whether a person looks: at a terminal, or at a notebook. Of several processes only the first shows anything."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return False
    get_ipython = loaded("IPython", "get_ipython")
    ipython = None if get_ipython is None else get_ipython()
    if ipython is not None and "IPKernelApp" in ipython.config:
        return True
    with contextlib.suppress(AttributeError, ValueError):  # no standard error, or a closed one
        return sys.stderr.isatty()
    return False


def fit(
    model: nn.Module,
    train_tokens: Tensor | TokenShards,
    val_tokens: Tensor | TokenShards | None = None,
    *,
    batch_size: int = 32,
    block_size: int = 8,
    max_steps: int = 3000,
    lr: float | None = None,
    eval_interval: int = 300,
    optimizer: Callable[..., Optimizer] | None = None,
    scheduler: Callable[..., Any] | None = None,
    max_grad_norm: float | None = None,
    generator: torch.Generator | None = None,
    resume: History | None = None,
    progress: bool | None = None,
    on_progress: Callback | None = None,
    on_evaluation: Callback | None = None,
) -> History:
    """The lecture's training loop: get_batch, forward, backward, AdamW; evaluated exactly, not on sampled batches.

    The steps up to the next evaluation are one native call where nothing can tell the difference: a plain model on the
    CPU, float32 or float64, the default optimizer, no hooks. Such a model on a GPU takes them as CUDA graphs of up to
    128 steps, on the batches that it would get on the CPU; the host learns the losses after the last of them. Where no
    graph can be captured, as by a generator on the GPU, and otherwise the steps run in Python.

    Ctrl-C ends the run between two steps: the history records it, and the run can be resumed. In the main thread
    ``fit`` holds SIGINT back until then; a handler other than Python's is called then, too, and an exception of it ends
    the run. If a callback, a forward pass or an evaluation lasts, another Ctrl-C more than a second later interrupts
    it where it is; but for an optimizer's step that has begun, the run can be resumed after that as well. Any other
    exception that leaves the run has the history as its attribute ``history``, to be resumed, too.

    Args:
        model: A BigramLanguageModel, trained in place; or one in DistributedDataParallel, DataParallel,
            FullyShardedDataParallel or torch.compile, which is called at each step, while the model inside is
            evaluated. Each process draws batches of its own: seed each of them differently.
        train_tokens: (N) tokens, N > block_size; or shards, of which batches are drawn as of the concatenated tokens
            (by steps in Python if there are several), while no pair of two shards is evaluated.
        val_tokens: Evaluated as well as the training tokens.
        batch_size: B, blocks per step.
        block_size: T, tokens per block.
        max_steps: Steps in all, those of ``resume`` included.
        lr: Learning rate. None: that of ``resume`` or ``optimizer``, else 0.01.
        eval_interval: Steps between evaluations; the first is before the first step, the last after the last.
        optimizer: Called with the list of parameters, and with ``lr=lr`` if that is given, it makes the optimizer, as
            torch.optim.SGD does. None: bigramx.optim.AdamW, or torch.optim.SparseAdam if the gradient is sparse.
        scheduler: Called with the optimizer, it makes a learning rate scheduler, which follows each step;
            ReduceLROnPlateau is given the loss of the batch.
        max_grad_norm: The gradients are clipped to this norm, as torch.nn.utils.clip_grad_norm_ does.
        generator: Draws the batches; None: PyTorch's default generator.
        resume: The history of an earlier run of this model, which is not modified. Its steps count, its optimizer and
            scheduler continue, and the generator is set to its state at the end: the result equals that of one run.
        progress: Whether to show a progress bar. None: on a terminal and in a notebook.
        on_progress: Called with the history several times a second, between two steps; less often where that would
            take a fifth of the time, as the rows of a table of gigabytes first catch up. True ends the run.
        on_evaluation: Called with the history after each evaluation; True ends the run.

    Returns:
        The history: losses, evaluations, the optimum.

    Raises:
        TypeError: An argument is of the wrong type, or the state of the optimizer or the scheduler is of a type that
            ``History.save`` cannot save.
        ValueError: A size, an interval or a norm is not positive, there are too few tokens, or ``resume`` is the
            history of another model, optimizer or scheduler.
        RuntimeError: The tokens are not 1-D, or of another dtype than uint8, uint16, uint32, int32 or int64; or
            inference mode is on.
        NotImplementedError: The norm of a sparse gradient is to be clipped.
        IndexError: A token is out of range for the model.
        OverflowError: ``batch_size`` or ``block_size`` does not fit into 64 bits.
        MemoryError: The table, its gradient and the optimizer's states cannot fit into memory.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("fit: nothing can be trained under torch.inference_mode()")
    with _Signals() as signals:
        module = module_in(model)
        batch_size, block_size = _size("batch_size", batch_size), _size("block_size", block_size)
        max_steps, eval_interval = _integer("max_steps", max_steps), _integer("eval_interval", eval_interval)
        if max_steps < 0 or eval_interval < 1:
            raise ValueError(f"expected max_steps >= 0 and eval_interval >= 1, got {max_steps} and {eval_interval}")
        lr, max_grad_norm = _number("lr", lr), _number("max_grad_norm", max_grad_norm)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"expected max_grad_norm > 0, got {max_grad_norm}")
        _check_types(val_tokens, generator, resume)
        _check_callables(optimizer=optimizer, scheduler=scheduler, on_progress=on_progress, on_evaluation=on_evaluation)
        get_batch(train_tokens, batch_size, block_size, generator=torch.Generator())  # raises what a step would
        corpora = [tokens for tokens in (train_tokens, val_tokens) if tokens is not None]

        made_optimizer = new_optimizer(model, optimizer, lr)
        made_scheduler = None if scheduler is None else new_scheduler(scheduler, made_optimizer)
        steps = Steps(
            model,
            module,
            made_optimizer,
            made_scheduler,
            max_grad_norm,
            History(),
            train_tokens,
            batch_size,
            block_size,
            generator,
        )
        _check_memory(steps, corpora, optimizer, resume)
        if resume is not None:
            steps.history = copy.deepcopy(resume)
        history = steps.history
        history.interrupted = history.stopped = False
        evaluation = _Evaluation(steps, train_tokens, val_tokens, on_evaluation)
        steps.begin(lr)
        signals.watch(steps)
        next_look = 0.0
        with _Recorded(steps, signals), _Bar(progress, history, max_steps) as bar:
            while history.step < max_steps and not history.stopped:
                signals.hand_over()
                if history.step % eval_interval == 0 and evaluation.run():
                    history.stopped = True
                    break
                steps.take(min(max_steps - history.step, eval_interval - history.step % eval_interval))
                bar.report()
                # Rows that have missed steps take them at once, from memory: not after each native call.
                if on_progress is not None and (not steps.are_deferred or time.monotonic() >= next_look):
                    begin = time.monotonic()
                    steps.catch_up()
                    end = time.monotonic()
                    history.stopped = _is_true(on_progress(history)) and history.step < max_steps
                    next_look = end + max(0.25, 5 * (end - begin))
            signals.hand_over()
            evaluation.run()
    return history


def _add_history(error: BaseException, history: History | None) -> None:
    """Adds the history to an exception that leaves the run, and a note that says so."""
    if history is None:
        return
    with contextlib.suppress(Exception):  # an exception may be frozen
        error.history = history  # type: ignore[attr-defined]
        can_resume = history.step > 0 and history.table_checksum is not None
        if can_resume and sys.version_info >= (3, 11):
            error.add_note(f"fit took {history.step} steps; fit(..., resume=error.history) goes on from there")


def _integer(name: str, value: object) -> int:
    """A Python int from an int of Python, NumPy or PyTorch."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in {"bool", "torch.bool"}
    if not is_bool:
        with contextlib.suppress(TypeError):
            return operator.index(value)  # type: ignore[arg-type]
    raise TypeError(f"expected {name} to be an int, got {value!r}")


def _size(name: str, value: object) -> int:
    """As ``_integer``, of what a kernel is given."""
    size = _integer(name, value)
    if not -(2**63) <= size < 2**63:
        raise OverflowError(f"expected {name} to be an int of 64 bits, got {size}")
    return size


def _number(name: str, value: Any) -> float | None:
    """A Python float from a number of Python, NumPy or PyTorch; None from None."""
    if value is None:
        return None
    if hasattr(value, "item"):
        if math.prod(value.shape) != 1:
            raise ValueError(f"expected {name} to be one number, got shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    return float(value)


def _check_types(val_tokens: object, generator: object, resume: object) -> None:
    if val_tokens is not None and not isinstance(val_tokens, (Tensor, TokenShards)):
        raise TypeError(f"expected val_tokens to be a Tensor or TokenShards, got {type(val_tokens).__name__}")
    if val_tokens is not None:
        check_tokens(val_tokens)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"expected generator to be a torch.Generator, got {type(generator).__name__}")
    if resume is not None and not isinstance(resume, History):
        raise TypeError(f"expected resume to be a History, as History.load(path) reads it, got {type(resume).__name__}")


def _check_callables(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"expected {name} to be callable, got {type(value).__name__}")


def _check_memory(steps: Steps, corpora: list[Tensor | TokenShards], factory: object, resume: History | None) -> None:
    """Raises a MemoryError where the run certainly cannot fit; what a factory's optimizer will keep is not known."""
    module = steps.module
    table = module._modules.get("token_embedding_table")
    weight = None if table is None else table._parameters.get("weight")
    if not isinstance(table, nn.Embedding) or weight is None or not is_plain_tensor(weight):
        return  # sharded over processes, for example, or computed at each look
    if weight.untyped_storage().filename is not None:
        return  # a file's pages are no memory of the process
    num_states = None if factory is None else 0
    if resume is not None and resume.optimizer_state is not None:
        kept = [value for value in tree_leaves(resume.optimizer_state) if isinstance(value, Tensor)]
        num_states = 2 * sum(value.shape == weight.shape for value in kept)  # and the run's own copy
    memory.check_training(
        table.num_embeddings,
        sparse=table.sparse,
        has_gradient=not steps.has_native_steps(),
        device=weight.device,
        dtype=weight.dtype,
        num_states=num_states,
        num_counts=sum(module.is_fused and are_worth_counting(tokens, table.num_embeddings) for tokens in corpora),
    )


def _is_true(answer: object) -> bool:
    """Whether a callback said True, Python's, NumPy's or PyTorch's; other answers, such as numbers, mean nothing."""
    is_bool = isinstance(answer, bool) or str(getattr(answer, "dtype", None)) in ("bool", "torch.bool")
    return is_bool and bool(answer)


class _Corpus:
    """Tokens to evaluate a model on repeatedly: their pairs are counted once, where that pays and gives the same."""

    def __init__(self, model: BigramLanguageModel, tokens: Tensor | TokenShards) -> None:
        self._model, self._tokens = model, tokens
        self._counts = model.count_pairs(tokens) if self._may_count() else None

    def _may_count(self) -> bool:
        model = self._model
        has_own = "evaluate" in vars(model) or type(model).evaluate is not BigramLanguageModel.evaluate
        return model.is_fused and model._has_plain_loss() and not has_own

    def loss(self) -> float:
        if self._counts is None or not self._may_count():
            return self._model.evaluate(self._tokens)
        return self._model.evaluate_counts(self._counts)

    def optimal_loss(self) -> float:
        return optimal_loss(self._tokens) if self._counts is None else optimal_loss_of_counts(self._counts)


class _Evaluation:
    """Records the exact losses of the model."""

    def __init__(
        self,
        steps: Steps,
        train_tokens: Tensor | TokenShards,
        val_tokens: Tensor | TokenShards | None,
        on_evaluation: Callback | None,
    ) -> None:
        self._steps, self._on_evaluation = steps, on_evaluation
        self._train = _Corpus(steps.module, train_tokens)
        self._val = None if val_tokens is None else _Corpus(steps.module, val_tokens)
        steps.history.optimum = self._train.optimal_loss() if steps.module._has_plain_loss() else float("nan")

    def run(self) -> bool:
        """Evaluates the model, unless it has been; returns whether the callback ends the run."""
        history = self._steps.history
        if history.steps and history.steps[-1] == history.step:
            return False
        step = history.step
        self._steps.catch_up()
        with _whole_parameters(self._steps.model):
            train_loss = self._train.loss()
            val_loss = float("nan") if self._val is None else self._val.loss()
        if self._val is not None or history.val_losses:
            missing = len(history.steps) - len(history.val_losses)  # where earlier runs had no validation tokens
            history.val_losses += [float("nan")] * missing + [val_loss]
        history.steps.append(step)
        history.train_losses.append(train_loss)
        return self._on_evaluation is not None and _is_true(self._on_evaluation(history))


def _whole_parameters(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """The parameters as evaluation reads them."""
    fsdp = fsdp_in(model)
    if fsdp is None:
        return contextlib.nullcontext()
    whole: contextlib.AbstractContextManager[object] = fsdp.summon_full_params(fsdp, writeback=False)
    return whole
