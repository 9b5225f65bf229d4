"""The documentation: what it names exists, what it quotes is in the sources, its pictures are valid."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests import readme_examples
from tests.tree import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
FOLDERS = "benchmarks|bigramx|csrc|docs|examples|tests"
EXAMPLE = "count_tokens"  # the op that CONTRIBUTING.md adds


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    names = re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w./-]*\w/?(?![\w<])", (ROOT / page).read_text("utf-8"))
    assert names
    assert [name for name in names if EXAMPLE not in name and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/from-formula-to-kernel.md"])
def test_named_kernels_exist(page: str) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*_kernels.*"))
    sources += (ROOT / "csrc/cuda/base/pairs.cuh").read_text()
    kernels = set(re.findall(r"\b\w+_kernel\b", (ROOT / page).read_text("utf-8"))) - {f"{EXAMPLE}_kernel"}
    assert [kernel for kernel in sorted(kernels) if f" {kernel}(" not in sources] == []


def test_quoted_lines_are_in_the_sources() -> None:
    sources = {
        line.strip()
        for folder in ("csrc", "bigramx")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in {".h", ".cpp", ".py"}
        for line in path.read_text("utf-8").splitlines()
    }
    for page in PAGES:
        if not page.startswith("docs/"):
            continue
        for block in re.findall(r"^```\w+\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE):
            quoted = {line.strip() for line in block.splitlines()} - {"// ...", "# ...", ""}
            assert quoted <= sources, page


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_valid_and_small(picture: Path) -> None:
    assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert picture.stat().st_size < 20_000


def test_the_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    assert readme_examples.run() >= 1
