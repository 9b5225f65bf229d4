"""The plots are drawn for any run and any table, shown or written, and show what they should."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch

from bigramx import BigramLanguageModel, CharTokenizer, History

plots = pytest.importorskip("bigramx.plots")
figure_module = pytest.importorskip("matplotlib.figure")

NAN = float("nan")
PNG = b"\x89PNG"


@pytest.mark.parametrize("val_losses", [[], [3.2, 2.2]])
def test_losses(tmp_path: Path, val_losses: list[float]) -> None:
    history = History([3.0, 2.5, 2.0], [0, 3], [3.0, 2.0], val_losses, optimum=1.9)
    plots.plot_losses(history, tmp_path / "loss.svg")
    picture = (tmp_path / "loss.svg").read_text()
    assert "optimum 1.9000" in picture
    assert ("validation" in picture) == bool(val_losses)


@pytest.mark.parametrize(
    "history",
    [
        History(),
        History(optimum=1.0),
        History([2.0], [0, 1], [2.0, 1.9], [NAN, 2.0], 1.0),
        History([NAN, math.inf], [0, 2], [NAN, NAN], [NAN, NAN], NAN),
    ],
    ids=["empty", "no step", "partly validated", "nothing finite"],
)
def test_losses_of_any_history(history: History) -> None:
    figure = plots.plot_losses(history)
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert ("optimum 1.0000" in labels) == (not math.isnan(history.optimum))
    assert figure._repr_png_().startswith(PNG)


def test_table_with_its_characters(tmp_path: Path) -> None:
    model = BigramLanguageModel(8)
    model.tokenizer = CharTokenizer("\n $a\u200bé_^")
    plots.plot_table(model, tmp_path / "table.svg")
    picture = (tmp_path / "table.svg").read_text()
    for label in (r"\n", "$", "U+200B", "é"):
        assert f"<!-- {label} -->" in picture.replace(r"\$", "$")


def test_characters_that_no_font_has(tmp_path: Path) -> None:
    model = BigramLanguageModel(5)
    model.tokenizer = CharTokenizer("a日\ud800\U0001f600\U000e0001")
    figure = plots.plot_table(model, tmp_path / "table.png")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[:3] == ["a", "U+65E5", "U+D800"]
    assert labels[4] == "U+E0001"


@pytest.mark.parametrize("vocab_size", [1, 300, 2050])
def test_table_without_characters(tmp_path: Path, vocab_size: int) -> None:
    plots.plot_table(BigramLanguageModel(vocab_size), tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_table_of_any_values(value: float, dtype: torch.dtype) -> None:
    model = BigramLanguageModel(3, dtype=dtype)
    with torch.no_grad():
        model.token_embedding_table.weight[1] = value
    assert plots.plot_table(model)._repr_png_().startswith(PNG)


@pytest.mark.parametrize("plot", [plots.plot_losses, plots.plot_table])
def test_figures_are_returned_and_written(plot: object, tmp_path: Path) -> None:
    assert callable(plot)
    subject = History([2.0], [0, 1], [2.0, 1.0]) if plot is plots.plot_losses else BigramLanguageModel(3)
    assert isinstance(plot(subject), figure_module.Figure)
    buffer = io.BytesIO()
    assert isinstance(plot(subject, buffer), figure_module.Figure)
    assert buffer.getvalue().startswith(PNG)
    plot(subject, tmp_path / "picture")
    assert (tmp_path / "picture").read_bytes().startswith(PNG)
    with open(tmp_path / "picture.PDF", "wb") as file:
        plot(subject, file)
    assert (tmp_path / "picture.PDF").read_bytes().startswith(b"%PDF")
    (tmp_path / "picture.txt").write_text("old")
    with pytest.raises(ValueError, match="Format 'txt' is not supported"):
        plot(subject, tmp_path / "picture.txt")
    assert (tmp_path / "picture.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 3
