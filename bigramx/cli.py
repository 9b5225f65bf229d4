"""The commands: `bigramx count|train|generate|evaluate|plot|info`. Needs typer and rich."""

from __future__ import annotations

import enum
import itertools
import logging
import os
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

import bigramx
from bigramx import console, data, evaluation, memory, storage, tokenizer
from bigramx.console import Bar, CommandError, Signals, print_line, shown
from bigramx.counts import BigramCounts
from bigramx.data import TokenShards
from bigramx.distributed_counts import CountProgress, count_shards
from bigramx.evaluation import optimal_loss
from bigramx.history import PREFIX, History
from bigramx.model import BigramLanguageModel
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

_MODEL, _HISTORY, _LOSSES, _TABLE = "model.safetensors", "history.safetensors", "loss.png", "table.png"
_STREAM_TOKENS = 256  # generated in one call before they are printed
_MOST = 2**31 - 1

Model = BigramLanguageModel | SmoothedBigramModel

_KINDS: dict[str, type[BigramLanguageModel] | type[SmoothedBigramModel]] = {
    "model": BigramLanguageModel,
    "smoothed-model": SmoothedBigramModel,
}


class SamplerName(enum.Enum):
    """functional.Sampler as an enum, which typer needs for choices."""

    torch = "torch"
    philox = "philox"


class Smoothing(enum.Enum):
    """The methods of SmoothedBigramModel.from_counts."""

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
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
VocabSize = Annotated[int | None, typer.Option(min=1, max=_MOST, help="Of .bin tokens. Default: the largest + 1.")]
Dtype = Annotated[TokenType | None, typer.Option(help="What .bin files without a header hold. Default: uint16.")]
Eot = Annotated[str | None, typer.Option(help="The token that ends a document, its number or its text.")]
TokenizerPath = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="A tokenizer.json, or another file of a tokenizer, for texts."),
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
    """The model in a file, of either kind."""
    tensors, metadata = storage.read_tensors(path, *_KINDS, is_wanted=lambda _kind, name: not name.startswith(PREFIX))
    try:
        return _KINDS[metadata["kind"]]._of_parts(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{storage.name_of(path)}: {error}") from None


def _need_tokenizer(model: Model, path: Path) -> Tokenizer:
    if model.tokenizer is None:
        raise CommandError(f"{path}: this model was saved without a tokenizer, and works on .bin tokens alone")
    return model.tokenizer


def _token_of(text: str, option: str, tokenizer: Tokenizer | None) -> int:
    """The token of an option, given as its text, or as its number where there is no tokenizer."""
    if tokenizer is None:
        if not text.isdecimal():
            raise CommandError(f"expected {option} to be the number of a token, got {text!r}")
        return int(text)
    tokens = tokenizer.encode(text)
    if len(tokens) != 1:
        kind = "character" if isinstance(tokenizer, CharTokenizer) else "token"
        raise CommandError(f"expected {option} to be one {kind}, got {text!r}")
    return int(tokens)


def _eot_of(text: str | None, tokenizer: Tokenizer | None) -> int | None:
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    return _token_of(text, "--eot", tokenizer)


class _Corpus(NamedTuple):
    """Tokens, and what made them of texts."""

    tokens: Tensor | TokenShards
    tokenizer: Tokenizer | None
