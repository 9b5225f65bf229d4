"""The commands: `bigramx count|train|generate|evaluate|plot|info`. Needs typer and rich."""

from __future__ import annotations

import contextlib
import enum
import io
import itertools
import logging
import os
import stat
import sys
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Protocol

import torch
import typer
from torch import Tensor

import bigramx
from bigramx import console, data, memory, storage
from bigramx import tokenizer as tokenizers
from bigramx.console import Bar, CommandError, Signals, print_line, printed_warnings
from bigramx.counts import BigramCounts
from bigramx.data import TokenShards
from bigramx.distributed_counts import CountProgress, count_shards
from bigramx.evaluation import Evaluation, optimal_loss
from bigramx.evaluation import evaluate as evaluate_model
from bigramx.history import History
from bigramx.model import BigramLanguageModel
from bigramx.shards import Shard
from bigramx.smoothed_model import SmoothedBigramModel
from bigramx.token_files import are_tokens, files_of
from bigramx.tokenizer import CharTokenizer, Tokenizer
from bigramx.training import fit

app = typer.Typer(
    help="The bigram language model: train it on a text, let it write, measure it exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = BigramLanguageModel | SmoothedBigramModel

_MODEL, _HISTORY, _LOSSES, _TABLE = "model.safetensors", "history.safetensors", "loss.png", "table.png"
_KINDS: dict[str, type[Model]] = {"model": BigramLanguageModel, "smoothed-model": SmoothedBigramModel}
_MOST_HEADER = 2**27  # bytes of a file's header, which has the tokenizer
_STREAM_TOKENS = 256  # generated in one call before they are printed
_UNKNOWN_SHOWN = 10  # characters
_MANY_ROWS = 2000  # of a table: a steps' tokens are few for them
_MOST = 2**31 - 1


class SamplerName(enum.Enum):
    """functional.Sampler as an enum, which typer needs for choices."""

    torch = "torch"
    philox = "philox"


class Smoothing(enum.Enum):
    """The methods of SmoothedBigramModel."""

    kneser_ney = "kneser-ney"
    witten_bell = "witten-bell"
    absolute_discounting = "absolute-discounting"
    jelinek_mercer = "jelinek-mercer"
    add_k = "add-k"


class TokenType(enum.Enum):
    """What .bin files without a header hold."""

    uint8 = "uint8"
    uint16 = "uint16"
    uint32 = "uint32"
    int32 = "int32"
    int64 = "int64"


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A model that `bigramx train` saved.")]
TextPaths = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[TEXT]...",
        help="UTF-8 texts, or tokens (.bin, .npy): files, folders, patterns. Default: the Python language reference",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
VocabSize = Annotated[int | None, typer.Option(min=1, max=_MOST, help="Of .bin tokens. Default: the largest + 1.")]
Dtype = Annotated[TokenType | None, typer.Option(help="What .bin files without a header hold. Default: uint16.")]
Eot = Annotated[
    str | None, typer.Option(help="The token that ends a document, its number or its text: no pair begins with it.")
]
TokenizerPath = Annotated[
    Path | None,
    typer.Option(help="The tokenizer of the texts: a tokenizer.json, or a file of SentencePiece or minbpe."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"bigramx {bigramx.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Of the command itself, before its subcommands."""


# ------------------------------------------------------------------------------------------------- models and tokens


def _load(path: Path) -> Model:
    with storage.open_to_read(path) as file:
        return _load_from(file if file.seekable() else io.BytesIO(file.read()))


def _load_from(file: IO[bytes]) -> Model:
    """The model in a file, of the kind that its header says."""
    size, kind = int.from_bytes(file.read(8), "little"), ""
    with contextlib.suppress(ValueError):  # load says it better
        kind = storage.parse_header(file.read(min(size, _MOST_HEADER)))[1].get("kind", "")
    file.seek(0)
    return _KINDS.get(kind, BigramLanguageModel).load(file)


def _need_tokenizer(model: Model, path: Path) -> Tokenizer:
    if model.tokenizer is None:
        raise CommandError(f"{path}: this model was saved without a tokenizer, and works on .bin tokens alone")
    return model.tokenizer


class _Encoder(Protocol):
    """What makes tokens of a text."""

    @property
    def vocab_size(self) -> int:
        """Greater than every token."""

    def encode(self, text: str) -> Tensor:
        """(N) int64 tokens."""


class _Texts:
    """The texts of files, read anew whenever they are iterated over, but for those of pipes.

    Args:
        files: Their paths; None: the Python language reference.
    """

    def __init__(self, files: list[str] | None) -> None:
        self.names = ["the Python language reference"] if files is None else files
        self._kept = {self.names[0]: data.default_text()} if files is None else {}

    def __iter__(self) -> Iterator[str]:
        for name in self.names:
            yield self._kept[name] if name in self._kept else self._read(name)

    def _read(self, name: str) -> str:
        text = data.read_text(name)
        if not stat.S_ISREG(os.stat(name).st_mode):
            self._kept[name] = text
        return text

    def shown(self, title: str) -> Iterator[str]:
        """The texts, with a bar of the bytes that were taken."""
        sizes = [len(self._kept[name]) if name in self._kept else os.stat(name).st_size for name in self.names]
        with Bar(title, sum(sizes), "bytes") as bar:
            for text, num_bytes in zip(self, itertools.accumulate(sizes), strict=True):
                yield text
                bar.show(num_bytes)

    def characters(self) -> CharTokenizer:
        """The tokenizer of the characters that occur."""
        characters: set[str] = set()
        for text in self:
            characters.update(text)
        if not characters:
            raise CommandError(f"{self.names[0]}: the text is empty")
        return CharTokenizer("".join(sorted(characters)))

    def trained_bpe(self, vocab_size: int) -> Tokenizer:
        """A BPE of so many tokens, trained on them."""
        with printed_warnings():
            return tokenizers.train_bpe(self.shown("training the BPE"), vocab_size)

    def encoded(self, encoder: _Encoder, eot: int | None) -> TokenShards:
        """The tokens of each, as a shard."""
        dtype = torch.uint16 if encoder.vocab_size <= 2**16 else torch.int32
        texts = zip(self.names, self.shown("encoding"), strict=True)
        shards = (Shard(encoder.encode(text).to(dtype), name, num_bytes=len(text.encode())) for name, text in texts)
        return TokenShards.of(shards, eot)


class _Source:
    """Where a command takes its tokens from.

    Args:
        paths: Files, folders and patterns; None: the Python language reference.
        dtype: What .bin files without a header hold.

    Attributes:
        texts: The texts; None: the files are those of tokens.
    """

    def __init__(self, paths: list[Path] | None, dtype: TokenType | None) -> None:
        self._paths, self._dtype = paths or [], dtype
        with printed_warnings():
            files = [file for path in self._paths for file in files_of(path)]
        self.texts = None if any(map(are_tokens, files)) else _Texts(files if paths else None)

    def tokens(self, encoder: _Encoder | None, eot: int | None) -> TokenShards:
        """The tokens of the files, of which texts are encoded."""
        if self.texts is not None and encoder is not None:
            return self.texts.encoded(encoder, eot)
        with printed_warnings():
            return data.read_tokens(self._paths, tokenizer=encoder, dtype=_name_of(self._dtype), eot=eot)

    def tokenizer(self, path: Path | None, bpe: int | None) -> Tokenizer | None:
        """The tokenizer that is named, or one that is made of the texts; None for tokens without one."""
        if path is not None:
            if bpe is not None:
                raise CommandError("expected --tokenizer or --bpe, got both")
            return tokenizers.load(path)
        if self.texts is not None:
            return self.texts.characters() if bpe is None else self.texts.trained_bpe(bpe)
        if bpe is not None:
            raise CommandError("--bpe is for texts: these are tokens already")
        vocabularies = [path / "meta.pkl" for path in self._paths]  # in folders of nanoGPT's
        return next((data.read_meta(path) for path in vocabularies if path.exists()), None)


def _name_of(dtype: TokenType | None) -> str | None:
    return None if dtype is None else dtype.value


def _eot_of(text: str | None, encoder: _Encoder | None) -> int | None:
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    if encoder is None:
        raise CommandError(f"expected --eot to be the number of a token, got {text!r}")
    return _token_of(text, "--eot", encoder)


def _token_of(text: str, option: str, encoder: _Encoder) -> int:
    tokens = encoder.encode(text)
    if len(tokens) != 1:
        kind = "character" if isinstance(encoder, CharTokenizer) else "token"
        raise CommandError(f"expected {option} to be one {kind}, got {text!r}")
    return int(tokens)


# -------------------------------------------------------------------------------------------------------------- count


@app.command()
def count(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARDS...", help="Tokens (.bin, .npy) or texts: files, folders, patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("counts.safetensors"),
    vocab_size: VocabSize = None,
    dtype: Dtype = None,
    eot: Eot = None,
    tokenizer: TokenizerPath = None,
) -> None:
    """Counts how often each token follows each other one; in several processes under torchrun."""
    encoder = None if tokenizer is None else tokenizers.load(tokenizer)
    signals = Signals("interrupted: the same command goes on from what is counted so far")
    is_first = os.environ.get("RANK", "0") == "0"  # which alone has progress; the others end at once
    with signals if is_first else contextlib.nullcontext(), printed_warnings(), Bar("counting", None, "bytes") as bar:

        def on_progress(progress: CountProgress) -> None:
            bar.show(progress.num_bytes, progress.num_tokens, title=progress.stage, total=progress.total_bytes)
            signals.check()

        result = count_shards(
            shards,
            out,
            vocab_size=vocab_size,
            eot=_eot_of(eot, encoder),
            dtype=_name_of(dtype),
            tokenizer=encoder,
            progress=on_progress,
            report=bar.print,
        )
    if result.rank == 0:
        print_line(_described(result.num_pairs, result.num_distinct, result.vocab_size))
        print_line(f"wrote {result.path}")


def _described(num_pairs: int, num_distinct: int, vocab_size: int) -> str:
    return f"{num_pairs:,} pairs, {num_distinct:,} of them distinct, of a vocabulary of {vocab_size:,}"


# -------------------------------------------------------------------------------------------------------------- train


@app.command()
def train(
    text: TextPaths = None,
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
    vocab_size: VocabSize = None,
    dtype: Dtype = None,
    eot: Eot = None,
    tokenizer: TokenizerPath = None,
    bpe: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Train a byte-level BPE of so many tokens on the texts.")
    ] = None,
    smoothing: Annotated[
        Smoothing | None, typer.Option(help="Take no steps: estimate a smoothed model from the pair counts.")
    ] = None,
    from_counts: Annotated[
        Path | None, typer.Option(help="Estimate a smoothed model from what `bigramx count` wrote.")
    ] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="Texts or tokens to measure a smoothed model on. Default: the last tenth.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, max=_MOST, help="Tokens to write at the end.")] = 300,
) -> None:
    """Trains a model, and saves it: with its history, again and again while it trains, and two pictures of both."""
    torch.manual_seed(seed)
    method = Smoothing.kneser_ney if smoothing is None and from_counts is not None else smoothing
    if method is not None and resume:
        raise CommandError("--resume is for training by steps: a smoothed model is estimated at once")
    if method is None and held_out:
        raise CommandError("--held-out is for --smoothing and --from-counts")
    if from_counts is not None and (text or any(option is not None for option in (bpe, vocab_size, eot))):
        raise CommandError("--from-counts takes the place of a text, --bpe, --vocab-size and --eot")
    if method is not None and from_counts is not None:
        counts = BigramCounts.load(from_counts)
        made = None if tokenizer is None else tokenizers.load(tokenizer)
        validation = _Source(held_out, dtype).tokens(made, counts.eot) if held_out else None
        _estimate(counts, method, made, validation, out, sample)
        return
    source = _Source(text, dtype)
    if vocab_size is not None and source.texts is not None:
        raise CommandError("--vocab-size is for .bin tokens: a text has the characters that it has")
    run = _load_run(out) if resume else None
    if run is not None and bpe is not None and _is_bpe(run[0].tokenizer, bpe):
        made = run[0].tokenizer  # to train it again would give the same
    else:
        made = source.tokenizer(tokenizer, bpe)
    end = _eot_of(eot, made)
    tokens = source.tokens(made, end)
    if len(tokens) == 0:
        raise CommandError("the text is too short: 0 tokens")
    size = vocab_size or (data.token_range(tokens)[1] + 1 if made is None else made.vocab_size)
    if method is not None:
        train_tokens, validation = data.split(tokens)
        if held_out:
            train_tokens, validation = tokens, _Source(held_out, dtype).tokens(made, end)
        print_line(_sizes(tokens, size, len(train_tokens)))
        _check_place(out, 16 * size)
        _estimate(_counted(train_tokens, size), method, made, validation, out, sample)
        return
    if run is not None and run[1] is None:
        raise CommandError(f"{out / _MODEL}: this model was saved without a history to go on with")
    if run is not None and (run[0].vocab_size, run[0].tokenizer) != (size, made):
        raise CommandError(f"{out / _MODEL}: this model was trained on another vocabulary than the text has")
    if run is None:
        model, history = _model_of_size(size), None
        model.tokenizer = made
    else:
        model, history = run
    schedule = {
        "batch_size": batch_size,
        "block_size": block_size,
        "max_steps": steps,
        "lr": lr,
        "eval_interval": eval_interval,
    }
    history = _take_steps(model, history, tokens, out, checkpoint_interval, schedule)
    try:
        pictures = _draw(model, history, out)
    finally:
        _print_sample(model, sample)
        _print_written(out, _MODEL)
    _print_written(out, *pictures)


def _is_bpe(tokenizer: Tokenizer | None, most: int) -> bool:
    """Whether `--bpe` with this number may have made it: of fewer tokens, where the texts have fewer merges."""
    return not isinstance(tokenizer, CharTokenizer | None) and tokenizer.vocab_size <= most


def _model_of_size(vocab_size: int) -> BigramLanguageModel:
    try:
        memory.check_training(vocab_size, has_gradient=False)
    except MemoryError as error:
        raise CommandError(f"{error}; --smoothing kneser-ney takes memory for the pairs that occur alone") from None
    return BigramLanguageModel(vocab_size)


def _sizes(tokens: TokenShards, vocab_size: int, num_train: int) -> str:
    return f"{len(tokens):,} tokens, a vocabulary of {vocab_size:,}; the first {num_train:,} to train on"


def _check_place(out: Path, num_bytes: int) -> None:
    """Raises before the work what saving a model would raise after it."""
    out.mkdir(parents=True, exist_ok=True)
    storage.check_writable(out / _MODEL, num_bytes)


def _print_sample(model: Model, num_tokens: int) -> None:
    if model.tokenizer is not None and num_tokens > 0:
        print_line("\nA sample", style="bold")
        _stream(model, model.tokenizer, _start_of(model), num_tokens, (), {})


def _print_written(out: Path, *names: str) -> None:
    for name in names:
        print_line(f"wrote {out / name}")


# ------------------------------------------------------------------------------------------------- smoothed, at once


def _counted(tokens: TokenShards, vocab_size: int) -> BigramCounts:
    counts = BigramCounts(vocab_size, eot=tokens.eot)
    num_done = 0
    with Signals() as signals, Bar("counting", len(tokens), "tokens") as bar:

        def on_progress(num_tokens: int) -> None:
            nonlocal num_done
            num_done += num_tokens
            bar.show(num_done, num_done)
            signals.check()

        counts.update(tokens, progress=on_progress)
    return counts


def _estimate(
    counts: BigramCounts,
    method: Smoothing,
    tokenizer: Tokenizer | None,
    validation: TokenShards | None,
    out: Path,
    sample: int,
) -> None:
    """Estimates a smoothed model, saves it, and measures it."""
    _check_place(out, 8 * counts.num_distinct + 16 * counts.vocab_size)
    print_line(_described(counts.num_pairs, counts.num_distinct, counts.vocab_size))
    held_out = validation if method is Smoothing.jelinek_mercer else None
    model = SmoothedBigramModel.from_counts(counts, method.value, held_out=held_out)
    model.tokenizer = tokenizer
    model.save(out / _MODEL)
    if validation is not None:
        print_line(f"{method.value} on held-out tokens")
        _print_evaluation(_evaluated(model, validation))
    _print_sample(model, sample)
    _print_written(out, _MODEL)


# --------------------------------------------------------------------------------------------------------- by steps


def _load_run(out: Path) -> tuple[BigramLanguageModel, History | None]:
    """The model and the history of a run: of one file or, as earlier versions wrote them, of two."""
    with storage.open_to_read(out / _MODEL) as file:
        model = _load_from(file)
        if isinstance(model, SmoothedBigramModel):
            raise CommandError(f"{out / _MODEL}: a smoothed model has neither steps nor a table")
        file.seek(0)
        history = History._load_if_any(file)
    if history is None and (out / _HISTORY).exists():
        history = History.load(out / _HISTORY)
    table = model.token_embedding_table.weight.detach()
    if history is not None and history.table_checksum != storage.checksum(table):
        raise CommandError(f"{out}: the history is not of this model: its run ended with another table")
    return model, history


def _take_steps(
    model: BigramLanguageModel,
    history: History | None,
    tokens: TokenShards,
    out: Path,
    checkpoint_interval: float,
    schedule: dict[str, Any],
) -> History:
    """Trains a model by ``fit``, and saves it in the folder."""
    train_tokens, val_tokens = (_in_one(part) for part in data.split(tokens))
    block_size, steps = schedule["block_size"], schedule["max_steps"]
    if min(len(train_tokens), len(val_tokens)) <= block_size:
        raise CommandError(f"the text is too short: {len(tokens)} tokens, blocks of {block_size}")
    progress = _Progress(steps, schedule["batch_size"] * block_size, 0 if history is None else history.step)
    checkpoint = _Checkpoint(model, out / _MODEL, checkpoint_interval, progress)
    checkpoint.check(steps)
    with Signals() as signals, progress:
        progress.print(_sizes(tokens, model.vocab_size, len(train_tokens)))
        if model.vocab_size > _MANY_ROWS and model.vocab_size**2 > len(train_tokens):
            progress.print("note: the tokens meet a part of the table alone; --smoothing kneser-ney may do better")

        def on_progress(history: History) -> None:
            progress.show_step(history)
            checkpoint.save_when_due(history)
            signals.check()

        def on_evaluation(history: History) -> None:
            progress.show_evaluation(history)
            signals.check()

        try:
            history = fit(
                model,
                train_tokens,
                val_tokens,
                **schedule,
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
        raise signals.error(f"interrupted after {history.step} steps; saved in {out}; go on with --resume")
    return history


def _in_one(tokens: TokenShards) -> Tensor | TokenShards:
    """Tokens in memory as one tensor, of which ``fit`` takes steps faster."""
    return tokens[:] if all(part.file is None for part in tokens.parts) else tokens


class _Checkpoint:
    """The file of a run, model and history, which is replaced while the run lasts and at its end."""

    def __init__(self, model: BigramLanguageModel, path: Path, interval: float, progress: _Progress) -> None:
        self._model, self._path, self._interval, self._progress = model, path, interval, progress
        self._next_time = time.monotonic() + interval

    def check(self, steps: int) -> None:
        """Raises before the training what saving would raise after it."""
        num_states, num_other = 2, 2**15  # AdamW's; the header, the generator's state and the evaluations
        table = self._model.token_embedding_table.weight.nbytes
        _check_place(self._path.parent, (1 + num_states) * table + 8 * steps + num_other)

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


class _Progress(Bar):
    """A progress bar over the steps, and a line for each evaluation above it.

    Attributes:
        history: The one that ``fit`` records, once it has taken steps.
    """

    def __init__(self, steps: int, tokens_per_step: int, first_step: int) -> None:
        super().__init__("training", steps, "steps")
        self.history: History | None = None
        self._tokens_per_step, self._first_step = tokens_per_step, first_step
        self._width = len(str(steps))

    def show_step(self, history: History) -> None:
        """Called many times a second."""
        self.history = history
        self.show(history.step, (history.step - self._first_step) * self._tokens_per_step)

    def show_evaluation(self, history: History) -> None:
        self.print(
            f"step {history.step:>{self._width}}: train loss {history.train_losses[-1]:.4f}, "
            f"val loss {history.val_losses[-1]:.4f}; optimum {history.optimum:.4f}"
        )


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
            print_line("no pictures: matplotlib is not installed; type: pip install matplotlib")
            return []
        raise CommandError(f"no pictures: {error}") from error
    return [_TABLE] if history is None else [_LOSSES, _TABLE]


# ----------------------------------------------------------------------------------------------------------- generate


@app.command()
def generate(
    model_path: ModelPath = Path("runs") / _MODEL,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=0, max=_MOST, help="How many tokens to write.")] = 500,
    prompt: Annotated[str, typer.Option(help="The text to go on with.")] = "",
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text, of which each line is a prompt to go on with.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, max=_MOST, help="Keep the k most likely.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep the most likely, up to this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep those with this share of the largest probability.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End with this token, given as its text. May be given several times.")
    ] = None,
    sampler: Annotated[SamplerName, typer.Option(help="How to draw.")] = SamplerName.torch,
    seed: Annotated[int | None, typer.Option(help="Seed. Default: a new one each time.")] = None,
    tokens_only: Annotated[
        bool, typer.Option("--tokens-only", help="Prompts, stops and what is written are numbers of tokens, not text.")
    ] = False,
) -> None:
    """Writes text, and prints it while it is generated."""
    model = _load(model_path)
    tokenizer = _Numbers(model.vocab_size) if tokens_only else _need_tokenizer(model, model_path)
    if prompt_file is not None and prompt:
        raise CommandError("expected --prompt or --prompt-file, got both")
    prompts = [prompt] if prompt_file is None else data.read_text(prompt_file).splitlines()
    stops = [_token_of(text, "--stop", tokenizer) for text in stop or []]
    encoded = [tokenizer.encode(text)[None] if text else _start_of(model) for text in prompts]
    torch.seed() if seed is None else torch.manual_seed(seed)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "sampler": sampler.value}
    for text, idx in zip(prompts, encoded, strict=True):
        sys.stdout.write(console.shown(text))
        _stream(model, tokenizer, idx, tokens, stops, options, is_prompted=text != "")


def _start_of(model: Model) -> Tensor:
    """What a text goes on from that has no prompt, (1, 1): the end of another, else the first token."""
    eot = getattr(model, "eot", None)
    return torch.full((1, 1), 0 if eot is None else eot)


def _stream(
    model: Model,
    tokenizer: Tokenizer,
    idx: Tensor,
    num_tokens: int,
    stops: Collection[int],
    options: Mapping[str, Any],
    is_prompted: bool = False,
) -> None:
    """Prints what follows ``idx``, (1, T), which is the prompt, if there is one, while it is generated."""
    stream = tokenizers.decode_stream(tokenizer)
    if is_prompted:
        stream.step(idx[0])  # whose text is printed already: what follows may depend on it
    while num_tokens > 0:
        step = min(num_tokens, _STREAM_TOKENS)
        following = model.generate(idx, step, stop=list(stops) or None, **options)[0, idx.size(1) :]
        # A padded table has rows, and columns, that no text has.
        console.write(stream.step(following[following < tokenizer.vocab_size]))
        if int(following[-1]) in stops:
            break
        idx, num_tokens = following[None, -1:], num_tokens - step
    console.write(stream.finish() + "\n")


class _Numbers:
    """Tokens as their numbers, for models without a tokenizer: a Tokenizer that cannot be saved."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> Tensor:
        try:
            return torch.tensor([int(word) for word in text.split()], dtype=torch.int64)
        except ValueError:
            raise CommandError(f"expected numbers of tokens, got {text!r}") from None

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        return "".join(f" {int(token)}" for token in tokens)

    def to_json(self) -> str:
        raise TypeError("numbers of tokens are no tokenizer to save")


# ----------------------------------------------------------------------------------------------------------- evaluate


@app.command()
def evaluate(
    model_path: ModelPath,
    text: TextPaths = None,
    dtype: Dtype = None,
    eot: Eot = None,
    per_document: Annotated[
        bool, typer.Option("--per-document", help="The loss of each document, too: they end with --eot, or their file.")
    ] = False,
    num_bytes: Annotated[
        int | None, typer.Option(min=1, help="Of the text that the tokens stand for. Default: as they are decoded.")
    ] = None,
) -> None:
    """Prints the exact loss on a text, and the lowest loss that any bigram table can reach on it."""
    model = _load(model_path)
    source = _Source(text, dtype)
    known = None if source.texts is None else _Known(_need_tokenizer(model, model_path), model.vocab_size)
    end = getattr(model, "eot", None) if eot is None else _eot_of(eot, model.tokenizer)
    tokens = source.tokens(known, end)
    if data.num_pairs(tokens) == 0:
        raise CommandError(f"the text is too short: {len(tokens)} tokens, no pair")
    result = _evaluated(model, tokens, num_bytes, per_document)
    _print_evaluation(result)
    if known is not None and known.unknown:
        characters = ", ".join(f"{text!r} ({n:,})" for text, n in known.unknown.most_common(_UNKNOWN_SHOWN))
        print_line(f"characters that the model does not know: {characters}")
    print_line(f"the optimum on this text: {_optimum(tokens, model.vocab_size):.4f}")
    if result.documents is not None:
        losses = result.documents.tolist()
        names = tokens.names if end is None else [f"document {n}" for n in range(1, len(losses) + 1)]
        for name, loss in zip(names, losses, strict=True):
            print_line(f"{name}: loss {loss:.4f}")


def _optimum(tokens: TokenShards, vocab_size: int) -> float:
    counts = BigramCounts(vocab_size, eot=tokens.eot)
    try:
        counts.update(tokens)
    except IndexError:  # some are out of the vocabulary
        return optimal_loss(tokens)
    return optimal_loss(counts)


class _Known:
    """Encodes texts, those with characters that a CharTokenizer lacks as well, which it counts.

    They become a token that the model has no row for.
    """

    def __init__(self, tokenizer: Tokenizer, num_rows: int) -> None:
        self._tokenizer, self._num_rows = tokenizer, num_rows
        self.vocab_size = num_rows + 1
        self.unknown: Counter[str] = Counter()

    def encode(self, text: str) -> Tensor:
        if not isinstance(self._tokenizer, CharTokenizer):
            return self._tokenizer.encode(text)
        missing = set(text).difference(self._tokenizer.characters)
        self.unknown.update(character for character in text if character in missing)
        tokens = CharTokenizer(self._tokenizer.characters + "".join(missing)).encode(text)
        return tokens.masked_fill_(tokens >= self._tokenizer.vocab_size, self._num_rows)


def _evaluated(
    model: Model, tokens: TokenShards, num_bytes: int | None = None, per_document: bool = False
) -> Evaluation:
    num_done = 0
    with Bar("evaluating", len(tokens), "tokens") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the notes, which are printed

        def on_progress(num_tokens: int) -> None:
            nonlocal num_done
            num_done += num_tokens
            bar.show(num_done, num_done)

        return evaluate_model(model, tokens, num_bytes=num_bytes, per_document=per_document, progress=on_progress)


def _print_evaluation(result: Evaluation) -> None:
    line = f"{result.num_pairs:,} pairs: loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.3f}"
    if result.bits_per_byte is not None:
        line += f", {result.bits_per_byte:.4f} bits a byte"
    print_line(line)
    if result.num_unseen_pairs:
        share = result.num_unseen_pairs / result.num_pairs
        print_line(f"{result.num_unseen_pairs:,} of the pairs, {share:.1%}, were never seen in training")
    for note in result.notes:
        print_line(note)


# -------------------------------------------------------------------------------------------------------------- others


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
        print_line(f"{name:<{width}}  {value or 'none'}")


def run() -> None:
    """Runs the command line; errors are printed as one line, without a traceback."""
    console.run(app)
