"""Readers take damaged files as they promise, and the fuzzer finds those that would not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bigramx import CharTokenizer
from tests.trust import fuzz_files
from tests.trust.fuzz_files import READERS, Reader

FILES = {
    "model": 1000,
    "smoothed model": 300,
    "history": 1000,
    "tokenizer": 1000,
    "tokens": 500,
    "npy": 200,
    "meta": 400,
    "text": 400,
}


def findings(reader: Reader, count: int, folder: Path) -> Iterator[str]:
    """What is found in so many files."""
    with fuzz_files.bounded_memory():
        for _content, found in itertools.islice(fuzz_files.search(reader, folder / "file", seed=0), count):
            if found:
                yield found


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    assert list(findings(READERS[name], FILES[name], tmp_path)) == []


@pytest.mark.parametrize("name", READERS)
def test_sound_files(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    assert len(reader.seeds()) >= 2
    for content in reader.seeds():
        (tmp_path / "file").write_bytes(content)
        assert reader.content(reader.load(tmp_path / "file")) == reader.says(content)


def code_points_without_a_check(path: Path) -> Any:
    return CharTokenizer("".join(map(chr, json.loads(path.read_bytes())["code_points"].copy())))


def one_character_short(path: Path) -> CharTokenizer:
    return CharTokenizer(CharTokenizer.load(path).characters[1:])


def much_memory(path: Path) -> CharTokenizer:
    tokenizer = CharTokenizer.load(path)
    bytearray(2**28 * tokenizer.vocab_size)
    return tokenizer


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (code_points_without_a_check, "raises AttributeError"),
        (one_character_short, "what was loaded is not what the file says"),
        (much_memory, "raises MemoryError"),
    ],
)
def test_finds_a_planted_fault(load: Any, expected: str, tmp_path: Path) -> None:
    found = findings(replace(READERS["tokenizer"], load=load), 500, tmp_path)
    assert any(text.startswith(expected) for text in found)


def test_finds_an_error_that_does_not_name_the_file(tmp_path: Path) -> None:
    def load(path: Path) -> CharTokenizer:
        return CharTokenizer.from_json(path.read_bytes())

    found = next(findings(replace(READERS["tokenizer"], load=load), 100, tmp_path))
    assert found.startswith("an error that does not name the file: ValueError")


def hidden(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:1] != b"b":
        raise ValueError(f"{path}: no b")
    if content[1:2] != b"u":
        raise ValueError(f"{path}: no u")
    if content[2:3] != b"g":
        raise ValueError(f"{path}: no g")
    raise AttributeError


def change_a_byte(content: bytes, random: Random) -> bytes:
    index = random.randrange(len(content))
    return content[:index] + random.randbytes(1) + content[index + 1 :]


def test_is_guided_by_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file in 2^24 has the fault; each of the lines before it leads to the next."""
    monkeypatch.setattr(fuzz_files, "PACKAGE", __file__)
    reader = Reader(hidden, bytes, bytes, change_a_byte, lambda: [b"none"])
    assert any(found.startswith("raises AttributeError") for found in findings(reader, 20_000, tmp_path))


def test_the_target(tmp_path: Path) -> None:
    count, found = fuzz_files.fuzz("tokens", tmp_path / "tokens", 1, seed=1, has_atheris=False)
    assert count > 1
    assert found == []
