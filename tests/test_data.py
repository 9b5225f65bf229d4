"""Reading of texts and tokens, and the batches of the lecture's script."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bigramx import data


def lectures_get_batch(tokens: torch.Tensor, batch_size: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    ix = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in ix])
    y = torch.stack([tokens[i + 1 : i + block_size + 1] for i in ix])
    return x, y


@given(
    seed=st.integers(0, 2**32),
    batch_size=st.sampled_from([1, 4, 32]),
    block_size=st.sampled_from([1, 8, 17]),
    extra=st.sampled_from([1, 2, 1000]),
    dtype=st.sampled_from([torch.uint8, torch.uint16, torch.int32, torch.int64]),
)
def test_draws_the_lectures_batches(
    seed: int, batch_size: int, block_size: int, extra: int, dtype: torch.dtype
) -> None:
    tokens = torch.randint(200, (block_size + extra,))
    torch.manual_seed(seed)
    expected, state = lectures_get_batch(tokens, batch_size, block_size), torch.get_rng_state()
    torch.manual_seed(seed)
    actual = data.get_batch(tokens.to(dtype), batch_size, block_size)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.int64
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)


def test_generator_leaves_the_default_one_alone() -> None:
    tokens, state = torch.arange(100), torch.get_rng_state()
    first = data.get_batch(tokens, 4, 8, generator=torch.Generator().manual_seed(1))
    again = data.get_batch(tokens, 4, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.arange(8), 4, 8), ValueError, "more than block_size = 8 tokens, got 8"),
        ((torch.arange(0), 4, 8), ValueError, "got 0"),
        ((torch.arange(9), 0, 8), ValueError, ">= 1, got 0 and 8"),
        ((torch.arange(9), 4, 0), ValueError, ">= 1, got 4 and 0"),
        ((torch.zeros(3, 9), 4, 8), RuntimeError, r"1-D, got shape \[3, 9\]"),
        (([1, 2, 3], 4, 8), TypeError, "'Tensor' for argument 'tokens'"),
        ((torch.arange(9), 4.5, 8), TypeError, "'int' for argument 'batch_size'"),
        ((torch.zeros(9), 4, 8), RuntimeError, r"\[Byte, UInt16, Int, Long\], got Float"),
    ],
)
def test_bad_batches(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        data.get_batch(*arguments)


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


def test_default_text_is_a_good_half_million_characters() -> None:
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
