"""The plots are written and show what they should."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigramx import BigramLanguageModel, CharTokenizer, History

plots = pytest.importorskip("bigramx.plots")
pytest.importorskip("matplotlib")


@pytest.mark.parametrize("val_losses", [[], [3.2, 2.2]])
def test_losses(tmp_path: Path, val_losses: list[float]) -> None:
    history = History([3.0, 2.5, 2.0], [0, 3], [3.0, 2.0], val_losses, optimum=1.9)
    plots.plot_losses(history, tmp_path / "loss.svg")
    picture = (tmp_path / "loss.svg").read_text()
    assert "optimum 1.9000" in picture
    assert ("validation" in picture) == bool(val_losses)


def test_table_with_its_characters(tmp_path: Path) -> None:
    model = BigramLanguageModel(8)
    model.tokenizer = CharTokenizer("\n $a\u200bé_^")
    plots.plot_table(model, tmp_path / "table.svg")
    picture = (tmp_path / "table.svg").read_text()
    for label in (r"\n", "$", "U+200B", "é"):
        assert f"<!-- {label} -->" in picture.replace(r"\$", "$")


@pytest.mark.parametrize("vocab_size", [1, 300, 2050])
def test_table_without_characters(tmp_path: Path, vocab_size: int) -> None:
    plots.plot_table(BigramLanguageModel(vocab_size), tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
