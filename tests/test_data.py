"""Reading texts and tokens."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from bigramx import data, storage


def test_split() -> None:
    train, val = data.split(torch.arange(105))
    assert (len(train), len(val)) == (94, 11)
    assert val[0] == 94
    with pytest.raises(ValueError, match=r"got 1\.5"):
        data.split(torch.arange(9), 1.5)


def test_reads_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufefféa\r\nb\U0001f600".encode())
    assert data.read_text(path) == "éa\r\nb\U0001f600"


def test_names_the_byte_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"text.txt: expected UTF-8 text, got byte 0xff at position 3"):
        data.read_text(path)


def test_default_text_is_about_half_a_million_characters() -> None:
    assert 300_000 < len(data.default_text()) < 1_000_000


def test_reads_nanogpts_bin(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(struct.pack("<5H", 0, 1, 50256, 65535, 7))
    tokens = data.read_bin(path)
    assert tokens.dtype == torch.uint16
    assert tokens.tolist() == [0, 1, 50256, 65535, 7]
    idx, targets = data.get_batch(tokens, 2, 4)
    assert idx.tolist() == [[0, 1, 50256, 65535]] * 2
    assert targets.tolist() == [[1, 50256, 65535, 7]] * 2


def test_bin_is_mapped_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(struct.pack("<2H", 1, 2))
    data.read_bin(path).zero_()
    assert path.read_bytes() == struct.pack("<2H", 1, 2)


def test_bin_stays_as_it_was_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(struct.pack("<2H", 1, 2))
    tokens = data.read_bin(path)
    storage.write_with(path, lambda file: file.write(b"\0"))
    assert tokens.tolist() == [1, 2]
    path.unlink()
    assert tokens.clone().tolist() == [1, 2]


def test_counts_are_small_compared_with_the_tokens_and_the_memory() -> None:
    tokens = torch.zeros((), dtype=torch.uint8)
    assert data.are_worth_counting(tokens.expand(4 * 65**2), 65)
    assert not data.are_worth_counting(tokens.expand(4 * 65**2 - 1), 65)
    assert data.are_worth_counting(tokens.expand(10**12), 11_585)  # of 1 GB
    assert not data.are_worth_counting(tokens.expand(10**12), 11_586)


def test_bin_is_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(struct.pack("<2H", 1, 2))
    with torch.device("meta"):
        assert data.read_bin(path).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [1, 2**18, 2**19 + 1])
def test_range_of_tokens(dtype: torch.dtype, num_tokens: int) -> None:
    tokens = torch.full((2 * num_tokens,), 7).to(dtype)[::2]
    assert data.token_range(tokens) == (7, 7)
    largest = torch.iinfo(dtype).max
    tokens[-1] = largest
    assert data.token_range(tokens) == ((largest if num_tokens == 1 else 7), largest)
    data.check_range(tokens[:-1], 8)
    with pytest.raises(
        IndexError, match=f"tokens holds {largest} at position {num_tokens - 1}, expected 0 <= token < 8"
    ):
        data.check_range(tokens, 8)
    if dtype.is_signed:
        smallest = torch.iinfo(dtype).min
        tokens[0] = smallest
        assert data.token_range(tokens)[0] == smallest
        with pytest.raises(IndexError, match=f"tokens holds {smallest} at position 0, "):
            data.check_range(tokens, 8)


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_bad_bin(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train.bin: expected a file of uint16 tokens, got {len(content)} bytes"):
        data.read_bin(tmp_path / "train.bin")


def test_missing_files(tmp_path: Path) -> None:
    for read in (data.read_bin, data.read_text):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
        with pytest.raises(IsADirectoryError):
            read(tmp_path)
