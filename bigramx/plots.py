"""Pictures of a run and of a table, as files. Needs matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bigramx.model import BigramLanguageModel
from bigramx.storage import write_with
from bigramx.training import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CELLS = 1024  # along an axis
_BLUE, _ORANGE, _GREY = "#2563a8", "#d9772b", "#9aa3ad"


def plot_losses(history: History, path: str | os.PathLike[str]) -> None:
    """Draws the losses over the steps, with the optimum as the line they approach.

    Args:
        history: Of ``fit``.
        path: Where to write; the suffix gives the format, .png or .svg or another of matplotlib's.
    """
    figure = _new_figure(8, 4.5)
    axes = figure.add_subplot()
    axes.plot(range(len(history.losses)), history.losses, color=_GREY, linewidth=0.6, alpha=0.6, label="batch")
    axes.plot(history.steps, history.train_losses, color=_BLUE, marker="o", markersize=4, label="train")
    if history.val_losses:
        axes.plot(history.steps, history.val_losses, color=_ORANGE, marker="o", markersize=4, label="validation")
    axes.axhline(history.optimum, color="black", linestyle="--", linewidth=1, label=f"optimum {history.optimum:.4f}")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_title("The loss and the closed-form optimum")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_table(model: BigramLanguageModel, path: str | os.PathLike[str]) -> None:
    """Draws the table as a heat map: the probability of each token (across) after each token (down).

    Args:
        model: If it has a tokenizer, its characters label the axes.
        path: Where to write; the suffix gives the format.
    """
    probs = _pooled_probs(model)
    size = min(max(4.0, model.vocab_size * 0.14), 24.0)
    figure = _new_figure(size + 1.2, size)
    axes = figure.add_subplot()
    # The square root makes rare pairs visible next to common ones.
    image = axes.imshow(probs.sqrt().numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    if model.tokenizer is not None and model.vocab_size <= 200:
        labels = [_label(character) for character in model.tokenizer.characters]
        axes.set_xticks(range(len(labels)), labels, fontsize=6, family="DejaVu Sans Mono")
        axes.set_yticks(range(len(labels)), labels, fontsize=6, family="DejaVu Sans Mono")
    axes.tick_params(length=0)
    axes.set_xlabel("next token")
    axes.set_ylabel("last token")
    axes.set_title("P(next | last)")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    ticks = [0.0, 0.01, 0.1, 0.25, 0.5, 1.0]
    bar.set_ticks([tick**0.5 for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    _save(figure, path)


def _pooled_probs(model: BigramLanguageModel) -> Tensor:
    """P(next | last), (V, V); for a table larger than the picture the means over squares, computed in parts."""
    weight = model.token_embedding_table.weight.detach()
    square = -(-model.vocab_size // _MOST_CELLS)
    rows = [rows.float().softmax(dim=1).mean(dim=0, keepdim=True).cpu() for rows in weight.split(square)]
    means: Tensor = F.avg_pool1d(torch.cat(rows)[:, None], square, ceil_mode=True)
    return means[:, 0]


def _new_figure(width: float, height: float) -> Figure:
    # The object, not pyplot: no window, no global state, any thread.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    file_format = Path(path).suffix.lstrip(".") or "png"
    write_with(path, lambda temporary: figure.savefig(temporary, format=file_format, dpi=144))


def _label(character: str) -> str:
    """The character as an axis label."""
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "\u2423", "$": r"\$"}
    return named.get(character, character if character.isprintable() else f"U+{ord(character):04X}")
