"""Pictures of a run and of a table, as figures and files. Needs matplotlib."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import FT2Font
from torch import Tensor
from torch.types import FileLike

from bigramx.history import History
from bigramx.model import BigramLanguageModel
from bigramx.storage import name_of, write_with
from bigramx.tokenizer import adapt

_MOST_CELLS = 1024  # along an axis
_BLUE, _ORANGE, _GREY = "#2563a8", "#d9772b", "#9aa3ad"
_LABEL_FONT = "DejaVu Sans Mono"  # comes with matplotlib


def plot_losses(history: History, path: FileLike | None = None) -> Figure:
    """Draws the losses over the steps, with the optimum as the line they approach.

    Args:
        history: Of ``fit``.
        path: Where to write, a path or a binary file object; the suffix of its name gives the format, .png or .svg or
            another of matplotlib's; .png without one. None: nothing is written.

    Returns:
        The figure, which a notebook shows.

    Raises:
        ValueError: The format is none of matplotlib's.
        OSError: The file cannot be written; an old one is unchanged.
    """
    figure = _InlineFigure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(len(history.losses)), history.losses, color=_GREY, linewidth=0.6, alpha=0.6, label="batch")
    axes.plot(history.steps, history.train_losses, color=_BLUE, marker="o", markersize=4, label="train")
    if history.val_losses:
        axes.plot(history.steps, history.val_losses, color=_ORANGE, marker="o", markersize=4, label="validation")
    if not math.isnan(history.optimum):
        label = f"optimum {history.optimum:.4f}"
        axes.axhline(history.optimum, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_title("The loss and the closed-form optimum")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _saved(figure, path)


def plot_table(model: BigramLanguageModel, path: FileLike | None = None) -> Figure:
    """Draws the table as a heat map: the probability of each token (across) after each token (down).

    Args:
        model: If it has a tokenizer, the texts of its tokens label the axes.
        path: Where to write, as for ``plot_losses``.

    Returns:
        The figure, which a notebook shows.

    Raises:
        ValueError: The format is none of matplotlib's.
        OSError: The file cannot be written; an old one is unchanged.
    """
    probs = _pooled_probs(model)
    size = min(max(4.0, model.vocab_size * 0.14), 24.0)
    figure = _InlineFigure(figsize=(size + 1.2, size), layout="constrained")
    axes = figure.add_subplot()
    # The square root makes rare pairs visible next to common ones.
    image = axes.imshow(probs.sqrt().numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    labels = []
    if model.tokenizer is not None and model.vocab_size <= 200:
        font = get_font(findfont(_LABEL_FONT))
        tokenizer = adapt(model.tokenizer)
        texts = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
        labels = ["".join(_label(character, font) for character in text) for text in texts]
    axes.tick_params(length=0)
    axes.set_xlabel("next token")
    axes.set_ylabel("last token")
    axes.set_title("P(next | last)")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    ticks = [0.0, 0.01, 0.1, 0.25, 0.5, 1.0]
    bar.set_ticks([tick**0.5 for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    if labels:  # the place of all is that of the longest: to measure each, several times, takes a second
        _set_labels(axes, [max(labels, key=len)])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        _set_labels(axes, labels)
    return _saved(figure, path)


def _set_labels(axes: Axes, labels: list[str]) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(labels)), labels, fontsize=6, family=_LABEL_FONT)


def _pooled_probs(model: BigramLanguageModel) -> Tensor:
    """P(next | last), (V, V); for a table larger than the picture the means over squares, computed in parts."""
    weight = model.token_embedding_table.weight.detach()
    square = -(-model.vocab_size // _MOST_CELLS)
    rows = [rows.float().softmax(dim=1).mean(dim=0, keepdim=True).cpu() for rows in weight.split(square)]
    means: Tensor = F.avg_pool1d(torch.cat(rows)[:, None], square, ceil_mode=True)
    return means[:, 0]


class _InlineFigure(Figure):
    """Made without pyplot: no window, no global state, any thread. Notebooks show it even so."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def _saved(figure: Figure, path: FileLike | None) -> Figure:
    if path is not None:
        file_format = Path(name_of(path)).suffix.lstrip(".") or "png"
        write_with(path, lambda file: figure.savefig(file, format=file_format, dpi=144))
    return figure


def _label(character: str, font: FT2Font) -> str:
    """The character as an axis label; its code point if it cannot be seen, or the font lacks it."""
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "\u2423", "$": r"\$"}
    if character in named:
        return named[character]
    is_visible = character.isprintable() and font.get_char_index(ord(character)) != 0
    return character if is_visible else f"U+{ord(character):04X}"
