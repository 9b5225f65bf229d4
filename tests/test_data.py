"""Reading texts and tokens."""

from __future__ import annotations

import array
import contextlib
import os
import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from bigramx import CharTokenizer, data, memory, shards, storage, token_files
from bigramx.data import TokenShards

REUSES_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


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


def header(magic: int, version: int, num_tokens: int, *reserved: int) -> bytes:
    """256 numbers of 32 bits, as llm.c and modded-nanogpt write them."""
    return struct.pack("<256i", magic, version, num_tokens, *reserved, *[0] * (253 - len(reserved)))


def packed(tokens: list[int], code: str = "H") -> bytes:
    return struct.pack(f"<{len(tokens)}{code}", *tokens)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_or_blamed(read: Callable[[Path], Any], path: Path) -> Any:
    """What is read; None where an error names the file."""
    error: ValueError | None = None
    try:
        return read(path)
    except ValueError as raised:
        error = raised
    assert str(error).startswith(f"{path}: ")
    return None


class TestHeaders:
    @pytest.mark.parametrize(
        ("magic", "version", "code", "dtype"), [(20240520, 1, "H", torch.uint16), (20240801, 7, "I", torch.uint32)]
    )
    @pytest.mark.parametrize("tokens", [[5, 50256, 0, 65535], []], ids=str)
    def test_of_llm_c(
        self, tmp_path: Path, magic: int, version: int, code: str, dtype: torch.dtype, tokens: list[int]
    ) -> None:
        content = header(magic, version, len(tokens), 17) + packed(tokens, code)
        path = write(tmp_path / "fineweb_train_000001.bin", content)
        for given_dtype in (None, dtype, str(dtype).removeprefix("torch.")):
            read = data.read_bin(path, given_dtype)
            assert read.dtype == dtype
            assert read.tolist() == tokens
        with pytest.raises(
            ValueError, match=r"000001\.bin: expected int64 tokens, got uint(16|32) tokens by its header"
        ):
            data.read_bin(path, torch.int64)
        if tokens:
            assert data.token_range(read) == (0, 65535)

    def test_tokens_of_32_bits(self, tmp_path: Path) -> None:
        tokens = [128_255, 2**32 - 1, 0]
        path = write(tmp_path / "a.bin", header(20240801, 7, 3) + packed(tokens, "I"))
        shards = data.read_tokens(path)
        assert [int(token) for token in shards] == tokens
        assert data.get_batch(shards, 2, 2, generator=torch.Generator())[0].tolist() == [tokens[:2]] * 2
        with pytest.raises(IndexError, match=f"tokens holds {2**32 - 1} at position 1, "):
            data.check_range(shards, 2**31)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (header(20240520, 2, 1) + b"ab", "expected version 1 of the magic number 20240520, got 2"),
            (header(20240801, 1, 1) + b"abcd", "expected version 7 of the magic number 20240801, got 1"),
            (header(20240520, 1, 2) + b"ab", "expected the 2 tokens of its header in 1028 bytes, got 1026 bytes"),
            (header(20240520, 1, 1) + b"abcd", "expected the 1 tokens of its header in 1026 bytes, got 1028 bytes"),
            (header(20240520, 1, 1) + b"abc", "got 1027 bytes"),
            (header(20240801, 7, 1) + b"ab", "expected the 1 tokens of its header in 1028 bytes, got 1026 bytes"),
            (header(20240520, 1, -1) + b"ab", "expected the -1 tokens of its header"),
            (header(20240520, 1, 0)[:-2], "got 1022 bytes"),
            (packed([20240520], "i"), "expected version 1 of the magic number 20240520, got 0"),
            (header(20240522, 1, 1) + b"ab", "got the header of an evaluation, magic number 20240522"),
            (header(20240326, 3, 1024) + b"ab", "got the header of a model, magic number 20240326"),
            (header(20240521, 1, 1) + b"ab", "got the header of another kind of file, magic number 20240521"),
            (header(20260101, 1, 1) + b"ab", "got the header of another kind of file, magic number 20260101"),
            (struct.pack(">256i", 20240520, 1, 1, *[0] * 253) + b"ab", "got the header of another kind of file"),
            (header(0x4D4D4944, 1, 1) + b"ab", "got the header of another kind of file"),
            (header(-123456, 1, 1) + b"ab", "got the header of another kind of file"),
            (b"\x93NUMPY\x01\x00", r"got a NumPy array, expected to be named \.npy"),
            (b"PK\x03\x04" * 8, "got a zip archive"),
            (b"a", "expected a file of uint16 tokens, got 1 bytes"),
            (b"", "expected a file of uint16 tokens, got 0 bytes"),
        ],
    )
    def test_bad(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = write(tmp_path / "a.bin", content)
        for read in (data.read_bin, data.read_tokens):
            with pytest.raises(ValueError, match=rf"a\.bin: .*{message}"):
                read(path)

    @REUSES_FOLDER
    @given(
        numbers=st.lists(st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 7, 20240520, 20240801]), max_size=5),
        tail=st.binary(max_size=9),
        padding=st.booleans(),
        dtype=st.sampled_from([None, *shards.DTYPES]),
    )
    def test_any(
        self, tmp_path: Path, numbers: list[int], tail: bytes, padding: bool, dtype: torch.dtype | None
    ) -> None:
        """The tokens are what the bytes say, or an error names the file."""
        start = struct.pack(f"<{len(numbers)}i", *numbers)
        content = (start.ljust(1024, b"\0") if padding else start) + tail
        path = write(tmp_path / "a.bin", content)
        magic, version, num_tokens, *_rest = [*numbers, 0, 0, 0]
        tokens = read_or_blamed(lambda path: data.read_bin(path, dtype), path)
        if tokens is None:
            return
        has_header = magic in (20240520, 20240801)
        assert not has_header or (version, num_tokens) == ((1, len(tokens)) if magic == 20240520 else (7, len(tokens)))
        expected = {20240520: torch.uint16, 20240801: torch.uint32}.get(magic, dtype or torch.uint16)
        assert tokens.dtype == expected
        assert tokens.numpy().tobytes() == content[1024 * has_header :]

    @pytest.mark.parametrize("dtype", shards.DTYPES)
    def test_the_dtype_of_a_file_without_header(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tokens = torch.tensor([1, 2, 200], dtype=dtype)
        path = write(tmp_path / "a.bin", tokens.numpy().tobytes())
        assert torch.equal(data.read_tokens(path, dtype=dtype)[:], tokens)
        assert torch.equal(data.read_tokens(path, dtype=str(dtype).removeprefix("torch."))[:], tokens)
        if dtype.itemsize > 1:
            write(path, path.read_bytes()[:-1])
            with pytest.raises(ValueError, match=f"expected a file of {str(dtype)[6:]} tokens, got"):
                data.read_bin(path, dtype)

    @pytest.mark.parametrize("dtype", [torch.int16, torch.float32, "float32"])
    def test_other_dtypes(self, dtype: Any) -> None:
        with pytest.raises(ValueError, match="expected dtype to be uint8, uint16, uint32, int32 or int64, got torch"):
            data.read_tokens([1], dtype=dtype)

    @pytest.mark.parametrize("dtype", ["<u2", "Tensor", int, 16])
    def test_what_is_no_dtype(self, dtype: Any) -> None:
        with pytest.raises(TypeError, match=r"expected dtype to be a torch\.dtype or its name, got"):
            data.read_tokens([1], dtype=dtype)

    def test_little_endian_on_any_host(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "byteorder", "big")  # where tokens are swapped once more than they are here
        assert data.read_bin(write(tmp_path / "a.bin", packed([1, 0x0203]))).tolist() == [0x0100, 0x0302]


class TestNpy:
    @pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i4", "i8"])
    @pytest.mark.parametrize("version", [(1, 0), (2, 0)])
    def test_is_mapped(self, tmp_path: Path, dtype: str, version: tuple[int, int]) -> None:
        tokens = numpy.array([1, 2, 200], dtype=dtype)
        with open(tmp_path / "a.npy", "wb") as file:
            numpy.lib.format.write_array(file, tokens, version)
        shards = data.read_tokens(tmp_path)
        assert torch.equal(shards[:], torch.from_numpy(tokens))
        assert str(tmp_path / "a.npy") in Path("/proc/self/maps").read_text()
        assert torch.equal(pickle.loads(pickle.dumps(shards))[1:], torch.from_numpy(tokens)[1:])
        shards.shards[0].zero_()
        assert numpy.load(tmp_path / "a.npy").tolist() == [1, 2, 200]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (numpy.zeros((2, 2), dtype="u2"), r"1-D, got shape \(2, 2\)"),
            (numpy.zeros((), dtype="u2"), r"1-D, got shape \(\)"),
            (numpy.zeros(2), "got <f8"),
            (numpy.zeros(2, dtype=">u2"), "got >u2"),
            (numpy.zeros(2, dtype="i2"), "got <i2"),
            (numpy.array([1, "a"], dtype=object), r"got \|O"),
            (numpy.zeros(2, dtype=[("a", "u2")]), r"got \|V2"),
        ],
    )
    def test_other_arrays(self, tmp_path: Path, values: Any, message: str) -> None:
        numpy.save(tmp_path / "a.npy", values)
        with pytest.raises(ValueError, match=rf"a\.npy: expected .*{message}"):
            data.read_tokens(tmp_path)

    @pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"a"])
    def test_sizes_disagree(self, tmp_path: Path, change: Any) -> None:
        numpy.save(tmp_path / "a.npy", numpy.zeros(3, dtype="u2"))
        write(tmp_path / "a.npy", change((tmp_path / "a.npy").read_bytes()))
        with pytest.raises(ValueError, match=r"a\.npy: expected the 3 tokens of its header in 134 bytes, got 13[35]"):
            data.read_tokens(tmp_path)

    @pytest.mark.parametrize(
        "text",
        [
            "{'descr': '<u2', 'fortran_order': False, 'shape': (-3,), }",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (10**9,), }",
            "{'descr': '<u2', 'fortran_order': False, 'shape': ('a',), }",
            "{'descr': __import__('os').system('exit'), 'fortran_order': False, 'shape': (1,), }",
            "{'descr': 'nix', 'fortran_order': False, 'shape': (1,), }",
            "[" * 5000,
            "-" * 5000 + "1",
            "1if 1else 2",
            "(\n",
            "\0",
            "",
        ],
    )
    def test_bad_headers(self, tmp_path: Path, text: str) -> None:
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
        path = write(tmp_path / "a.npy", content.ljust(128, b"a"))
        with pytest.raises(ValueError, match=r"a\.npy: (not a NumPy file|expected)"):
            data.read_tokens(path)
        for length in (0, 5, 8, 9, len(content)):
            write(path, content[:length])
            with pytest.raises(ValueError, match=r"a\.npy: "):
                data.read_tokens(path)

    def test_tokens_that_are_not_aligned(self, tmp_path: Path) -> None:
        text = b"{'descr': '<u4', 'fortran_order': False, 'shape': (1,), }"
        write(tmp_path / "a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"abcd")
        with pytest.raises(ValueError, match="expected the tokens to begin at a multiple of 4 bytes, got 67"):
            data.read_tokens(tmp_path)


class TestFilesOf:
    """Which files a path names."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d", ".hidden", ".git/e.txt", "sub/.f.txt"):
            write(tmp_path / name, name.encode())
        return tmp_path

    def names(self, paths: Any, folder: Path) -> list[str]:
        tokenizer = CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyz./")
        shards = data.read_tokens(paths, tokenizer=tokenizer)
        names = [str(Path(name).relative_to(folder)) for name in shards.names]
        assert [tokenizer.decode(shard) for shard in shards.shards] == names
        return names

    def test_of_a_folder(self, folder: Path) -> None:
        expected = ["a.md", "b.txt", "sub/c.txt", "sub/deep/d"]
        for path in (folder, str(folder), str(folder) + "/", os.fsencode(folder)):
            assert self.names(path, folder) == expected

    def test_links(self, folder: Path) -> None:
        (folder / "sub" / "loop").symlink_to(folder)
        (folder / "sub" / "file").symlink_to(folder / "a.md")
        other = write(folder.parent / f"{folder.name}-other" / "g.txt", b"g").parent
        (folder / "tree").symlink_to(other)
        expected = ["a.md", "b.txt", "sub/c.txt", "sub/deep/d", "sub/file", "tree/g.txt"]
        assert token_files.files_of(folder) == [str(folder / name) for name in expected]
        (folder / "broken").symlink_to(folder / "nowhere")
        with pytest.raises(FileNotFoundError):
            data.read_tokens(folder, tokenizer=CharTokenizer("abcdefghijklmnopqrstuvwxyz./"))

    def test_of_a_folder_with_tokens(self, folder: Path) -> None:
        write(folder / "sub" / "Train.BIN", packed([1]))
        numpy.save(folder / "x.npy", numpy.array([2, 3]))
        assert data.read_tokens(folder)[:].tolist() == [1, 2, 3]

    def test_of_a_pattern(self, folder: Path) -> None:
        assert self.names(folder / "*", folder) == ["a.md", "b.txt"]
        assert self.names(f"{folder}/**/*.txt", folder) == ["b.txt", "sub/c.txt"]
        assert self.names(os.fsencode(folder / "[ab].*"), folder) == ["a.md", "b.txt"]
        assert self.names([folder / "sub/c.txt", folder / "?.md"], folder) == ["sub/c.txt", "a.md"]
        write(folder / "x[1].txt", b"x")
        assert data.read_tokens(folder / "x[1].txt", tokenizer=CharTokenizer("x"))[:].tolist() == [0]

    def test_what_is_no_text(self, folder: Path) -> None:
        write(folder / "b.png", b"\x89PNG\r\n")
        write(folder / "b.dat", b"abc\0")
        write(folder / "sub" / "e", ("a" * (2**13 - 1) + "é").encode())  # cut within a character
        expected = ["a.md", "b.txt", "sub/c.txt", "sub/deep/d", "sub/e"]
        with pytest.warns(UserWarning, match=r": 2 files that are no UTF-8 text are left out, the first .*b\.dat"):
            assert token_files.files_of(folder) == [str(folder / name) for name in expected]
        for path in (folder / "b.png", folder / "*.png"):  # it is named
            with pytest.raises(ValueError, match=r"b\.png: expected UTF-8 text, got byte 0x89"):
                data.read_tokens(path, tokenizer=CharTokenizer("a"))

    @pytest.mark.parametrize("path", ["*.bin", "none", "none.bin", "empty", "sub/*/*/*"])
    def test_nothing_is_there(self, folder: Path, path: str) -> None:
        (folder / "empty" / ".hidden").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match=re.escape(path)):
            data.read_tokens(folder / path)

    def test_what_is_no_regular_file(self, tmp_path: Path) -> None:
        for name in ("a.bin", "a.npy", "a.txt", "meta.pkl"):
            os.mkfifo(tmp_path / name)
            read = data.read_meta if name == "meta.pkl" else data.read_tokens
            with pytest.raises(OSError, match=f"expected a regular file, got a FIFO: '.*{name}'"):
                read(tmp_path / name)
            with pytest.raises(OSError, match="expected a regular file, got a device"):
                read("/dev/zero")
        with pytest.raises(IsADirectoryError):
            data.read_meta(tmp_path)


class TestTexts:
    def test_are_encoded(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", "\ufeffaé".encode())
        write(tmp_path / "b.txt", b"")
        tokenizer = CharTokenizer("aé")
        shards = data.read_tokens(tmp_path, tokenizer=tokenizer, eot=1)
        assert [shard.tolist() for shard in shards.shards] == [[0, 1], []]
        assert (shards.dtype, shards.num_bytes, shards.eot) == (torch.uint8, 3, 1)
        assert shards.between(0, 1).num_bytes is None
        assert data.read_tokens(tmp_path, tokenizer=tokenizer, dtype="uint32").dtype == torch.uint32
        assert data.read_tokens([tmp_path, [1]], tokenizer=tokenizer).num_bytes is None

    def test_by_any_tokenizer(self, tmp_path: Path) -> None:
        class Words:
            vocab_size = 10**6

            def encode(self, text: str) -> Tensor:
                return torch.tensor([len(word) + 70_000 for word in text.split()])

            def decode(self, tokens: Tensor | Sequence[int]) -> str:
                raise AssertionError(tokens)

            def to_json(self) -> str:
                raise AssertionError

        path = write(tmp_path / "a.txt", b"one three")
        shards = data.read_tokens(path, tokenizer=Words())
        assert shards[:].tolist() == [70_003, 70_005]
        assert shards.dtype == torch.int32
        with pytest.raises(ValueError, match=r"a\.txt: expected uint16 tokens, got 70005"):
            data.read_tokens(path, tokenizer=Words(), dtype=torch.uint16)
        with pytest.raises(TypeError, match="int"):
            data.read_tokens(path, tokenizer=5)

    def test_errors(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", b"ab\xff")
        with pytest.raises(ValueError, match=r"a\.txt: expected a tokenizer for a text, or a \.bin or \.npy file"):
            data.read_tokens(path)
        with pytest.raises(ValueError, match="byte 0xff at position 2"):
            data.read_tokens(path, tokenizer=CharTokenizer("ab"))
        write(path, b"abc")
        with pytest.raises(ValueError, match=r"a\.txt: unknown character 'c' at position 2"):
            data.read_tokens(path, tokenizer=CharTokenizer("ab"))

    def test_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "a.txt", b"a" * 1000)
        monkeypatch.setattr(memory, "total_memory", lambda _device: 5000)
        with pytest.raises(MemoryError, match=r"a\.txt: encoding 1,000 characters takes .* and cpu has"):
            data.read_tokens(path, tokenizer=CharTokenizer("a"))
        monkeypatch.setattr(memory, "total_memory", lambda _device: 500)
        with pytest.raises(MemoryError, match=r"a\.txt: 1,000 bytes to read, and 500 bytes of memory"):
            data.read_tokens(path, tokenizer=CharTokenizer("a"))
        with pytest.raises(MemoryError, match="paths, a range, takes"):
            data.read_tokens(range(10**6))


class TestMemory:
    """Tokens that are in memory stay where they are."""

    @pytest.mark.parametrize(
        "source",
        [
            [1, 2, 3],
            (1, 2, 3),
            range(1, 4),
            iter([[1], [2, 3]]),
            [numpy.int64(1), 2, numpy.uint16(3)],
            array.array("H", [1, 2, 3]),
            array.array("b", [1, 2, 3]),
            torch.tensor([1, 2, 3]),
            torch.tensor([1, 2, 3], dtype=torch.int8),
            torch.tensor([[1], [2], [3]], dtype=torch.uint8),
            numpy.array([1, 2, 3], dtype="i2"),
            numpy.array([1, 2, 3], dtype="u4"),
            numpy.array([1, 2, 3], dtype="u8"),
            numpy.array([[1], [2, 3]], dtype=object),
            [[1, 2], [], [3]],
            [[[1], [2]], [3]],
            [torch.tensor([1]), numpy.array([2]), (3,)],
            TokenShards([torch.tensor([1]), torch.tensor([2, 3])]),
        ],
        ids=lambda source: f"{type(source).__name__} {getattr(source, 'dtype', '')}",
    )
    def test_any_sequence(self, source: Any) -> None:
        assert data.read_tokens(source)[:].tolist() == [1, 2, 3]

    def test_rows_are_shards(self) -> None:
        for rows in ([[1, 2], [], [3, 4]], numpy.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])):
            shards = data.read_tokens(rows)
            assert [shard.tolist() for shard in shards.shards if len(shard)] == [[1, 2], [3, 4]]
            assert shards.names[-1] == f"paths[{len(rows) - 1}]"

    def test_nothing_is_copied(self, tmp_path: Path) -> None:
        for dtype in ("u1", "u2", "i2", "u4", "i4", "u8", "i8"):
            values = numpy.array([1, 2, 3], dtype=dtype)
            data.read_tokens(values).shards[0][0] = 7
            assert values[0] == 7
        numbers = array.array("I", [1, 2])
        data.read_tokens(numbers).shards[0][0] = 7
        assert numbers[0] == 7
        tokens = torch.zeros(3, 2, dtype=torch.int16)
        data.read_tokens(tokens).shards[1][0] = 7
        assert tokens[1].tolist() == [7, 0]
        mapped = numpy.memmap(write(tmp_path / "a", packed([1, 2])), dtype="<u2", mode="r")
        assert data.read_tokens(mapped).shards[0].data_ptr() == mapped.ctypes.data

    def test_dtype(self) -> None:
        for source in ([1, 2], range(1, 3)):
            assert data.read_tokens(source).dtype == torch.int64
            assert data.read_tokens(source, dtype="uint16").dtype == torch.uint16
        for sources in ([1, 70_000], range(70_001)):
            with pytest.raises(ValueError, match="paths: expected uint16 tokens, got 70000"):
                data.read_tokens(sources, dtype="uint16")
        with pytest.raises(ValueError, match="expected paths to hold uint16 tokens, got uint32"):
            data.read_tokens(numpy.zeros(2, dtype="u4"), dtype="uint16")

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            (None, TypeError, "expected paths to be a path, tokens or a sequence of these, got NoneType"),
            (5, TypeError, "got int"),
            ({"a": 1}, TypeError, "got dict"),
            ({1, 2}, TypeError, "got set"),
            ([1.5, 2], TypeError, r"expected paths\[0\] to be .*, got float"),
            ([1, True], TypeError, r"expected paths\[0\] to be .*, got int"),
            ([[1], [None]], TypeError, r"expected paths\[1\]\[0\] to be .*, got NoneType"),
            ([], ValueError, "expected paths to be paths or tokens, got none"),
            (iter(()), ValueError, "got none"),
            ([2**63], Exception, "verflow"),
            (numpy.zeros(3), RuntimeError, "uint8, uint16, uint32, int32 or int64, got torch.float64"),
            (torch.zeros(3, dtype=torch.bool), RuntimeError, "got torch.bool"),
            (torch.zeros(1, 1, 1, dtype=torch.long), RuntimeError, r"1-D, got shape \(1, 1, 1\)"),
            (torch.tensor(1), RuntimeError, r"1-D, got shape \(\)"),
            (numpy.array([1, -1], dtype="i2"), IndexError, "paths holds -1, expected 0 <= token"),
            (numpy.array([1, 2**63], dtype="u8"), IndexError, f"paths holds {2**63}, expected 0 <= token"),
            (array.array("d", [1]), TypeError, "expected an array of integers, got one of type code 'd'"),
            (sys.stdin, TypeError, "got"),
        ],
    )
    def test_anything_else(self, source: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            data.read_tokens(source)


CHARACTERS = "\n aé\U0001f600"


def meta_of(characters: str = CHARACTERS) -> dict[str, Any]:
    """As nanoGPT's prepare.py makes it."""
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: token for token, character in enumerate(characters)},
    }


OTHERS: list[Any] = [OrderedDict(), 1.5, None, b"a", {1}, len]


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return os.system, self.arguments


class TestNanoGPT:
    def test_a_folder(self, tmp_path: Path) -> None:
        write(tmp_path / "train.bin", packed([0, 1, 2]))
        with pytest.raises(FileNotFoundError, match=r"train\.bin"):
            data.read_nanogpt(tmp_path / "none")
        assert data.read_nanogpt(tmp_path)[1:] == (None, None)
        write(tmp_path / "val.bin", packed([3, 4]))
        write(tmp_path / "meta.pkl", pickle.dumps(meta_of()))
        write(tmp_path / "prepare.py", b"\xff")
        train, val, tokenizer = data.read_nanogpt(os.fsencode(tmp_path), eot=4)
        assert val is not None
        assert (train[:].tolist(), val[:].tolist(), val.eot) == ([0, 1, 2], [3, 4], 4)
        assert tokenizer == CharTokenizer(CHARACTERS)
        split = data.split(data.read_tokens(tmp_path))
        assert [part[:].tolist() for part in split] == [[0, 1, 2], [3, 4]]

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_the_vocabulary_of_any_protocol(self, tmp_path: Path, protocol: int) -> None:
        characters = "".join(map(chr, range(32, 800)))
        for meta in (meta_of(characters), meta_of(characters[::-1]), meta_of("")):
            path = write(tmp_path / "meta.pkl", pickle.dumps(meta, protocol))
            assert data.read_meta(path).characters == "".join(meta["itos"].values())
        both = {**meta_of(), "others": [1, (2, "a"), (), [], (1, 2, 3, 4), {"a": ("b",)}]}
        assert data.read_meta(write(tmp_path / "meta.pkl", pickle.dumps(both, protocol))).vocab_size == 5

    def test_nothing_is_executed(self, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        contents = [pickle.dumps(Hostile(f"touch {mark}"), protocol) for protocol in range(6)]
        contents += [pickle.dumps({**meta_of(), "x": Hostile(f"touch {mark}")}, protocol) for protocol in range(6)]
        contents += [pickle.dumps({**meta_of(), "x": value}) for value in OTHERS]
        contents += [
            f"cos\nsystem\n(S'touch {mark}'\ntR.".encode(),
            f"(S'touch {mark}'\nios\nsystem\n.".encode(),
            f"(cos\nsystem\nS'touch {mark}'\no.".encode(),
            b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
            b"Pid\n.",
            b"\x80\x02K\x01Q.",
            b"\x80\x02\x82\x01.",
            b"\x80\x04}\x94(K\x01K\x02ub.",
        ]
        for content in contents:
            path = write(tmp_path / "meta.pkl", content)
            with pytest.raises(
                ValueError, match=r"meta\.pkl: expected a pickle of dicts, strings and ints, got the opcode"
            ):
                data.read_meta(path)
        assert not mark.exists()

    @pytest.mark.parametrize(
        "meta",
        [
            [],
            5,
            {},
            {"itos": {0: "a"}},
            {"stoi": {"a": 0}},
            {"itos": [], "stoi": {}},
            {**meta_of(), "vocab_size": 4},
            {**meta_of(), "itos": {**meta_of()["itos"], 5: "b"}},
            {**meta_of(), "itos": {**meta_of()["itos"], 0: "b"}},
            {**meta_of(), "stoi": {**meta_of()["stoi"], "a": 0}},
            {"itos": {0: "ab"}, "stoi": {"ab": 0}},
            {"itos": {1: "a"}, "stoi": {"a": 1}},
            {"itos": {0: "a", 1: "a"}, "stoi": {"a": 1}},
            {"itos": {0: 1}, "stoi": {1: 0}},
            {"itos": {0: "a"}, "stoi": {"a": [0]}},
            {"itos": {"0": "a"}, "stoi": {"a": 0}},
        ],
        ids=str,
    )
    def test_other_vocabularies(self, tmp_path: Path, meta: Any) -> None:
        path = write(tmp_path / "meta.pkl", pickle.dumps(meta))
        with pytest.raises(ValueError, match=r"meta\.pkl: expected"):
            data.read_meta(path)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"text",
            b".",
            b"K\x01",
            b"\x80\x04\x95",
            b"\x80\x04K\x01K\x02s.",
            b"]K\x01K\x02s.",
            b"}K\x01a.",
            b"u.",
            b"e.",
            b"t.",
            b"\x85.",
            b"(K\x01d.",
            b"}(.",
            b"}].",
            b"}(K\x01(K\x02us.",
            b"](K\x01a.",
            b"h\x05.",
            b"\x94.",
            b"q\x05.",
            b"g-1\n.",
            b"I" + b"9" * 5000 + b"\n.",
            b"I0x\n.",
            b"X\xff\xff\xff\xffa.",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
            b"V\\ud8\n.",
            b"(" * 10**5 + b".",
            b")" + b"\x85" * 10**5 + b".",
            b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
            b")" + b"\x94h\x00\x86" * 1000 + b".",  # a pair of itself twice, again and again
            b"})" + b"\x85" * 10**5 + b"K\x01s.",  # and such a thing as a key
            b"})" + b"2\x86" * 100 + b"K\x01s.",
            b"}\x94X\x04\x00\x00\x00itosh\x00s.",  # a dict that holds itself
            b"N" * 10,
        ],
        ids=lambda content: repr(content[:24]),
    )
    def test_damaged_and_bombs(self, tmp_path: Path, content: bytes) -> None:
        path = write(tmp_path / "meta.pkl", content)
        with pytest.raises(ValueError, match=r"meta\.pkl: "):
            data.read_meta(path)

    def test_more_opcodes_than_a_vocabulary_needs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "meta.pkl", pickle.dumps(meta_of()))
        monkeypatch.setattr(token_files, "_MOST_OPCODES", 60)
        assert data.read_meta(path).characters == CHARACTERS
        monkeypatch.setattr(token_files, "_MOST_OPCODES", 30)
        with pytest.raises(ValueError, match=r"meta\.pkl: expected 30 opcodes at most"):
            data.read_meta(path)

    def test_a_large_file_is_not_read(self, tmp_path: Path) -> None:
        with open(tmp_path / "meta.pkl", "wb") as file:
            file.truncate(10**12)
        with pytest.raises(ValueError, match=rf"meta\.pkl: expected a vocabulary of {2**25} bytes at most"):
            data.read_meta(tmp_path / "meta.pkl")

    @REUSES_FOLDER
    @given(position=st.integers(0, 500), byte=st.integers(0, 255), protocol=st.integers(0, 5))
    def test_any_byte_may_be_wrong(self, tmp_path: Path, position: int, byte: int, protocol: int) -> None:
        content = bytearray(pickle.dumps(meta_of(), protocol))
        content[position % len(content)] = byte
        path = write(tmp_path / "meta.pkl", bytes(content))
        tokenizer = read_or_blamed(data.read_meta, path)
        with contextlib.suppress(pickle.UnpicklingError, ValueError, EOFError):  # it minds the length of a frame, say
            meta = {} if tokenizer is None else pickle.loads(content)
            assert tokenizer is None or [tokenizer.characters, tokenizer.vocab_size] == [
                "".join(meta["itos"].values()),
                len(meta["stoi"]),
            ]
