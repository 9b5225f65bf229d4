"""The command line: `bigramx train|generate|evaluate|plot|info`. Needs typer and rich."""

from __future__ import annotations

import contextlib
import enum
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import bigramx
from bigramx import data, memory, storage
from bigramx.evaluation import optimal_loss
from bigramx.history import History
from bigramx.model import BigramLanguageModel
from bigramx.tokenizer import CharTokenizer
from bigramx.training import fit

app = typer.Typer(
    help="The bigram language model: train it on a text, let it write, measure it exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Console(Console):
    """One that raises an error where nobody reads any more, as files do."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

_MODEL, _HISTORY, _LOSSES, _TABLE = "model.safetensors", "history.safetensors", "loss.png", "table.png"
_STREAM_TOKENS = 256  # generated in one call before they are printed

_MOST = 2**31 - 1
_CLOSED_PIPE = 128 + signal.SIGPIPE  # the status of other tools, as quiet, whose reader has gone away
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newlines and tabs

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A model that `bigramx train` saved.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        _print(f"bigramx {bigramx.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Of the command itself, before its subcommands."""


class SamplerName(enum.Enum):
    """functional.Sampler as an enum, which typer needs for choices."""

    torch = "torch"
    philox = "philox"


class CommandError(RuntimeError):
    """An error for the user, printed as one line.

    Attributes:
        status: The exit status of the process.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def _shown(text: str) -> str:
    """The text as it is for files and pipes; for a terminal, without the characters that it would obey."""
    if not sys.stdout.isatty():
        return text
    return _CONTROL_CHARACTERS.sub(lambda match: storage.printable(match.group()), text)


def _print(text: str, style: str | None = None) -> None:
    console.print(_shown(text), style=style)


def _need_tokenizer(model: BigramLanguageModel, path: Path) -> CharTokenizer:
    if model.tokenizer is None:
        raise CommandError(f"{path}: this model was saved without a tokenizer, and works on .bin tokens alone")
    return model.tokenizer


def _read_tokens(path: Path, model: BigramLanguageModel, model_path: Path) -> Tensor:
    if path.suffix == ".bin":
        return data.read_bin(path)
    return _need_tokenizer(model, model_path).encode(data.read_text(path))


def _new_model(text: Path | None, vocab_size: int | None) -> tuple[BigramLanguageModel, Tensor]:
    if text is not None and text.suffix == ".bin":
        tokens = data.read_bin(text)
        return _model_of_size(vocab_size or data.token_range(tokens)[1] + 1), tokens
    if vocab_size is not None:
        raise CommandError("--vocab-size is for .bin tokens: a text has the characters that it has")
    content = data.default_text() if text is None else data.read_text(text)
    if not content:
        raise CommandError(f"{text}: the text is empty")
    tokenizer = CharTokenizer.from_text(content)
    model = _model_of_size(tokenizer.vocab_size)
    model.tokenizer = tokenizer
    return model, tokenizer.encode(content)


def _model_of_size(vocab_size: int) -> BigramLanguageModel:
    memory.check_training(vocab_size)
    return BigramLanguageModel(vocab_size)


@app.command()
def train(
    text: Annotated[
        Path | None,
        typer.Argument(help="UTF-8 text, or nanoGPT's .bin tokens. Default: the Python language reference."),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, max=_MOST, help="Steps in all.")] = 3000,
    batch_size: Annotated[int, typer.Option(min=1, max=_MOST, help="Blocks a step.")] = 32,
    block_size: Annotated[int, typer.Option(min=1, max=_MOST, help="Tokens a block.")] = 8,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate of AdamW.")] = 1e-2,
    eval_interval: Annotated[int, typer.Option(min=1, max=_MOST, help="Steps between evaluations.")] = 300,
    seed: Seed = 1337,
    out: Annotated[Path, typer.Option(help="Folder for the model, its history and the pictures.")] = Path("runs"),
    checkpoint_interval: Annotated[
        float, typer.Option(min=0.0, help="Seconds between two savings of model and history while it trains.")
    ] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Of .bin tokens. Default: the largest + 1.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, max=_MOST, help="Characters to write at the end.")] = 300,
) -> None:
    """Trains a model; saves it with its history, again and again while it trains, and draws two pictures."""
    torch.manual_seed(seed)
    model, tokens = _new_model(text, vocab_size)
    history = None
    if resume:
        fresh, (model, history) = model, _load_run(out)
        if history is None:
            raise CommandError(f"{out / _MODEL}: this model was saved without a history to go on with")
        if (model.vocab_size, model.tokenizer) != (fresh.vocab_size, fresh.tokenizer):
            name = out / _MODEL
            raise CommandError(f"{name}: this model was trained on another vocabulary than the text has")
    train_tokens, val_tokens = data.split(tokens)
    if min(len(train_tokens), len(val_tokens)) <= block_size:
        raise CommandError(f"the text is too short: {len(tokens)} tokens, blocks of {block_size}")
    progress = _Progress(steps)
    checkpoint = _Checkpoint(model, out / _MODEL, checkpoint_interval, progress)
    checkpoint.check(steps)
    with _Signals() as signals, progress:
        progress.print(
            f"{len(tokens):,} tokens, a vocabulary of {model.vocab_size:,}; the first {len(train_tokens):,} to train on"
        )

        def on_progress(history: History) -> None:
            progress.show(history)
            checkpoint.save_when_due(history)
            signals.end_run()

        def on_evaluation(history: History) -> None:
            progress.show_evaluation(history)
            signals.end_run()

        try:
            history = fit(
                model,
                train_tokens,
                val_tokens,
                batch_size=batch_size,
                block_size=block_size,
                max_steps=steps,
                lr=lr,
                eval_interval=eval_interval,
                resume=history,
                progress=False,  # there is a bar already
                on_progress=on_progress,
                on_evaluation=on_evaluation,
            )
        except BaseException:
            if progress.history is not None:
                checkpoint.save(progress.history)
            raise
        checkpoint.save(history)
    if signals.received is not None:
        message = f"interrupted after {history.step} steps; saved in {out}; go on with --resume"
        raise CommandError(message, 128 + signals.received)
    try:
        pictures = _draw(model, history, out)
    finally:
        if model.tokenizer is not None and sample > 0:
            _print("\nA sample", style="bold")
            _stream(model, model.tokenizer, torch.zeros((1, 1), dtype=torch.long), sample, {})
        _print_written(out, _MODEL)
    _print_written(out, *pictures)


def _load_run(out: Path) -> tuple[BigramLanguageModel, History | None]:
    """The model and the history of a run: of one file or, as earlier versions wrote them, of two."""
    with storage.open_to_read(out / _MODEL) as file:
        model = BigramLanguageModel.load(file)
        file.seek(0)
        history = History._load_if_any(file)
    if history is None and (out / _HISTORY).exists():
        history = History.load(out / _HISTORY)
    table = model.token_embedding_table.weight.detach()
    if history is not None and history.table_checksum != storage.checksum(table):
        raise CommandError(f"{out}: the history is not of this model: its run ended with another table")
    return model, history


def _print_written(out: Path, *names: str) -> None:
    for name in names:
        _print(f"wrote {out / name}")


class _Checkpoint:
    """The file of a run, model and history, which is replaced while the run lasts and at its end."""

    def __init__(self, model: BigramLanguageModel, path: Path, interval: float, progress: _Progress) -> None:
        self._model, self._path, self._interval, self._progress = model, path, interval, progress
        self._next_time = time.monotonic() + interval

    def check(self, steps: int) -> None:
        """Raises before the training what saving would raise after it."""
        num_states, num_other = 2, 2**15  # AdamW's; the header, the generator's state and the evaluations
        self._path.parent.mkdir(parents=True, exist_ok=True)
        table = self._model.token_embedding_table.weight.nbytes
        storage.check_writable(self._path, (1 + num_states) * table + 8 * steps + num_other)

    def save(self, history: History) -> None:
        self._model.save(self._path, history=history)

    def save_when_due(self, history: History) -> None:
        """Saves once in each interval; where that fails, the training goes on, and the next time may do better."""
        if time.monotonic() < self._next_time:
            return
        try:
            self.save(history)
        except OSError as error:
            self._progress.print(f"step {history.step}: not saved: {error}")
        self._next_time = time.monotonic() + self._interval


class _Signals:
    """Ends a run at SIGINT, SIGTERM or SIGHUP: they are only remembered, until the run is between two steps.

    What is ignored stays so: SIGHUP under nohup, SIGINT in the background job of a shell.

    Attributes:
        received: The first of them.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _frame: object) -> None:
        if self.received is None:
            self.received = number

    def end_run(self) -> None:
        """Called between two steps of ``fit``, which a KeyboardInterrupt ends."""
        if self.received is not None:
            raise KeyboardInterrupt


class _Progress:
    """A progress bar over the steps, and a line for each evaluation above it.

    Attributes:
        history: The one that ``fit`` records, once it has taken steps.
    """

    def __init__(self, steps: int) -> None:
        self.history: History | None = None
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._task = self._bar.add_task("training", total=steps)
        self._width = len(str(steps))
        self._next_time = 0.0

    # Where nobody reads any more, the training goes on.

    def __enter__(self) -> _Progress:
        with contextlib.suppress(OSError):
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._bar.stop()

    def show(self, history: History) -> None:
        """Called many times a second; shows ten of them."""
        self.history = history
        if (now := time.monotonic()) >= self._next_time:
            self._next_time = now + 0.1
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=history.step, refresh=True)

    def show_evaluation(self, history: History) -> None:
        self.print(
            f"step {history.step:>{self._width}}: train loss {history.train_losses[-1]:.4f}, "
            f"val loss {history.val_losses[-1]:.4f}; optimum {history.optimum:.4f}"
        )

    def print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            _print(text)


def _draw(model: BigramLanguageModel, history: History | None, out: Path) -> list[str]:
    """Draws the pictures; returns the names of the files written, none where matplotlib is missing.

    Raises:
        CommandError: They cannot be drawn, or not be written.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would warn of a home that it cannot write to
    try:
        from bigramx import plots

        if history is not None:
            plots.plot_losses(history, out / _LOSSES)
        plots.plot_table(model, out / _TABLE)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("matplotlib"):
            _print("no pictures: matplotlib is not installed; type: pip install matplotlib")
            return []
        raise CommandError(f"no pictures: {error}") from error
    return [_TABLE] if history is None else [_LOSSES, _TABLE]


@app.command()
def generate(
    model_path: ModelPath = Path("runs") / _MODEL,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=0, max=_MOST, help="How many characters to write.")
    ] = 500,
    prompt: Annotated[str, typer.Option(help="The text to go on with.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely character.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, max=_MOST, help="Keep the k most likely.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep the most likely, up to this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep those with this share of the largest probability.")
    ] = None,
    stop: Annotated[str | None, typer.Option(help="End with this character.")] = None,
    sampler: Annotated[SamplerName, typer.Option(help="How to draw.")] = SamplerName.torch,
    seed: Annotated[int | None, typer.Option(help="Seed. Default: a new one each time.")] = None,
) -> None:
    """Writes text, and prints it while it is generated."""
    model = BigramLanguageModel.load(model_path)
    tokenizer = _need_tokenizer(model, model_path)
    start = tokenizer.encode(prompt)[None] if prompt else torch.zeros((1, 1), dtype=torch.long)
    if stop is not None and len(stop) != 1:
        raise CommandError(f"expected --stop to be one character, got {stop!r}")
    torch.seed() if seed is None else torch.manual_seed(seed)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "stop": None if stop is None else int(tokenizer.encode(stop)),
        "sampler": sampler.value,
    }
    sys.stdout.write(_shown(prompt))
    _stream(model, tokenizer, start, tokens, options)


def _stream(
    model: BigramLanguageModel, tokenizer: CharTokenizer, idx: Tensor, num_tokens: int, options: Mapping[str, object]
) -> None:
    stop = options.get("stop")
    while num_tokens > 0:
        step = min(num_tokens, _STREAM_TOKENS)
        following = model.generate(idx, step, **options)[0, idx.size(1) :]  # type: ignore[arg-type]
        sys.stdout.write(_shown(tokenizer.decode(following)))
        sys.stdout.flush()
        if stop is not None and int(following[-1]) == stop:
            break
        idx, num_tokens = following[None, -1:], num_tokens - step
    sys.stdout.write("\n")


@app.command()
def evaluate(
    model_path: ModelPath,
    text: Annotated[
        Path | None, typer.Argument(help="UTF-8 text or .bin tokens. Default: the Python language reference.")
    ] = None,
) -> None:
    """Prints the exact loss on a text, and the lowest loss that any bigram table can reach on it."""
    model = BigramLanguageModel.load(model_path)
    if text is None:
        tokens = _need_tokenizer(model, model_path).encode(data.default_text())
    else:
        tokens = _read_tokens(text, model, model_path)
    if len(tokens) < 2:
        raise CommandError(f"the text is too short: {len(tokens)} tokens, no pair")
    loss = model.evaluate(tokens)
    _print(f"{len(tokens) - 1:,} pairs: loss {loss:.4f} nats a token, perplexity {torch.tensor(loss).exp():.3f}")
    _print(f"the optimum on this text: {optimal_loss(tokens):.4f}")


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="A folder that `bigramx train` left.")] = Path("runs"),
) -> None:
    """Draws the pictures of a run again."""
    model, history = _load_run(run)
    pictures = _draw(model, history, run)
    _print_written(run, *pictures)
    if not pictures:
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Prints how bigramx was built, and what it runs on."""
    rows = {"bigramx": bigramx.__version__, **bigramx.build_info(), "threads": str(torch.get_num_threads())}
    width = max(map(len, rows))
    for name, value in rows.items():
        _print(f"{name:<{width}}  {value or 'none'}")


def run() -> None:
    """Runs the command line; errors are printed as one line, without a traceback."""
    _prepare_streams()
    try:
        try:
            app()
        finally:
            _flush()
    except BrokenPipeError:
        sys.exit(_CLOSED_PIPE)
    except SystemExit as ended:  # which typer makes of it
        sys.exit(_CLOSED_PIPE if isinstance(ended.__context__, BrokenPipeError) else ended.code)
    except CommandError as error:
        _fail(str(error), error.status)
    except (OSError, ValueError, IndexError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
        # The first line of an error from C++ is its message; a stack trace may follow.
        _fail((str(error) or type(error).__name__).partition("\n")[0], 1)


def _fail(message: str, status: int) -> NoReturn:
    """Prints one line, if anyone still reads."""
    with contextlib.suppress(OSError):
        print(f"bigramx: {storage.printable(message)}", file=sys.stderr, flush=True)
    sys.exit(status)


def _prepare_streams() -> None:
    """A closed stream takes what is written and drops it; characters that the console lacks are replaced."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # it takes the lowest descriptor that is free, which a file of ours would get
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more when it ends, and would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
