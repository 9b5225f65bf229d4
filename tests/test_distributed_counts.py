"""Pair counts of shards in files: by one process here, by several ranks in distributed_counts_checks.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bigramx import BigramCounts, CharTokenizer, data, distributed_counts, parts, storage
from bigramx.distributed_counts import CountProgress, CountResult, count_shards
from tests import processes
from tests.tree import ROOT, TESTS

CHECKS = re.findall(r"^@check\ndef (\w+)", (TESTS / "distributed_counts_checks.py").read_text(), re.MULTILINE)
needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")

V = 50


def random_tokens(size: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (size,), generator=torch.Generator().manual_seed(seed))


def write_shard(path: Path, tokens: Tensor) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(tokens.to(torch.uint16).numpy().tobytes())


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of four shards, each of several pieces."""
    for k in range(4):
        write_shard(tmp_path / "shards" / f"{k}.bin", random_tokens(300, k))
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_counts, "_PIECE_BYTES", 250)


def counts_of(shards: Path, eot: int | None = None) -> BigramCounts:
    counts = BigramCounts(V, eot=eot)
    counts.update(data.read_tokens(shards))
    return counts


# -------------------------------------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong, by check."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.distributed_counts_checks", str(folder)]
    ended = processes.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    path = folder / "problems.json"
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if ended.returncode != 0:
        found[[*CHECKS, "the end"][len(found)]] = ended.stdout + ended.stderr
    return found


@needs_gloo
@pytest.mark.parametrize("name", CHECKS)
def test_ranks(name: str, problems: dict[str, str]) -> None:
    assert problems.get(name, "the checks did not get this far") == ""


@needs_gloo
def test_the_command_under_torchrun(shards: Path, tmp_path: Path) -> None:
    """Rank 0 alone prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    command = ["-m", "bigramx", "count", str(shards), "-o", str(tmp_path / "out"), "--eot", "3"]
    ended = processes.run(
        [*torchrun, "--nproc-per-node=2", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 0, ended.stderr
    assert re.findall("wrote (.*)", ended.stdout) == [str(tmp_path / "out" / "counts.safetensors.index.json")]
    assert BigramCounts.load(tmp_path / "out") == counts_of(shards, eot=3)


# --------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("eot", [None, 3])
def test_the_counts_are_those_of_the_shards(shards: Path, tmp_path: Path, eot: int | None) -> None:
    expected = counts_of(shards, eot)
    result = count_shards([shards], tmp_path / "pairs.safetensors", eot=eot)
    path = tmp_path / "pairs.safetensors"
    assert result == CountResult(path, V, eot, expected.num_pairs, expected.num_distinct, 1, 0)
    assert BigramCounts.load(path) == expected
    in_folder = count_shards([shards / "0.bin", str(shards / "[1-3].bin")], tmp_path / "out", eot=eot, vocab_size=V + 1)
    assert in_folder.path == tmp_path / "out" / "counts.safetensors"
    assert torch.equal(BigramCounts.load(tmp_path / "out").to_dense()[:V, :V], expected.to_dense())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs.safetensors", "shards"]


def test_a_token_that_ends_documents_and_never_occurs(shards: Path, tmp_path: Path) -> None:
    assert count_shards([shards], tmp_path / "out", eot=V + 5).vocab_size == V + 6


def test_texts(tmp_path: Path) -> None:
    for k, text in enumerate(["hello", "", "z"]):
        (tmp_path / f"{k}.txt").write_text(text)
    result = count_shards(
        [tmp_path / f"{k}.txt" for k in range(3)], tmp_path / "out", tokenizer=CharTokenizer.from_text("zhelo")
    )
    assert result.vocab_size == 5
    assert BigramCounts.load(result.path).num_pairs == 4


def test_progress(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_counts, "_INTERVAL", 0.0)
    seen: list[CountProgress] = []
    count_shards([shards], tmp_path / "out", progress=seen.append)
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ["reading", "counting", "writing"]
    for stage in stages[:2]:
        of_stage = [progress for progress in seen if progress.stage == stage]
        assert of_stage == sorted(of_stage, key=lambda progress: progress.num_bytes)
        assert of_stage[-1].num_bytes == of_stage[-1].total_bytes == 4 * 600
        assert of_stage[-1].num_tokens == 4 * (300 + 2)  # the first token of a piece ends the piece before it, too


@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError])
def test_an_interrupted_call_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    monkeypatch.setattr(distributed_counts, "_INTERVAL", 0.0)

    def interrupt(progress: CountProgress) -> None:
        if progress.stage == "counting" and progress.num_bytes > 1300:
            raise raised

    output, lines = tmp_path / "out.safetensors", list[str]()
    with pytest.raises(raised):
        count_shards([shards], output, progress=interrupt, report=lines.append)
    assert lines == []
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["rank-00000.safetensors"]
    result = count_shards([shards], output, report=lines.append)
    assert lines == [f"6 of 12 pieces of shards taken from {tmp_path / 'out.partial'}"]
    assert BigramCounts.load(result.path) == counts_of(shards)
    assert not (tmp_path / "out.partial").exists()


def leave_partial(shards: Path, output: Path, **options: int | None) -> None:
    """Interrupts a call when half of the tokens are counted."""

    def interrupt(progress: CountProgress) -> None:
        if progress.stage == "counting" and progress.num_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_counts, "_INTERVAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            count_shards([shards], output, progress=interrupt, **options)  # type: ignore[arg-type]


def test_a_changed_shard_is_counted_again(shards: Path, tmp_path: Path) -> None:
    leave_partial(shards, tmp_path / "out")
    write_shard(shards / "0.bin", random_tokens(300, 9))
    os.utime(shards / "0.bin", ns=(1, 1))
    lines: list[str] = []
    result = count_shards([shards], tmp_path / "out", report=lines.append)
    assert lines[0].startswith("0 of 12 pieces")
    assert BigramCounts.load(result.path) == counts_of(shards)


def test_a_further_shard_is_counted_beside_those_on_disk(shards: Path, tmp_path: Path) -> None:
    leave_partial(shards, tmp_path / "out")
    write_shard(shards / "4.bin", random_tokens(10))
    lines: list[str] = []
    result = count_shards([shards], tmp_path / "out", report=lines.append)
    assert lines[0].startswith("6 of 13 pieces")
    assert BigramCounts.load(result.path) == counts_of(shards)


@pytest.mark.parametrize("options", [{"vocab_size": V + 1}, {"eot": 4}, {"dtype": torch.uint8, "vocab_size": 256}])
def test_other_options_are_refused(shards: Path, tmp_path: Path, options: dict[str, int]) -> None:
    leave_partial(shards, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    name, value = next(iter(options.items()))
    with pytest.raises(
        ValueError, match=rf"expected counts with .*{name}={str(value).removeprefix('torch.')}.* remove"
    ):
        count_shards([shards], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_errors(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_shard(shards / "2.bin", torch.cat([random_tokens(250), torch.tensor([77]), random_tokens(49)]))
    with pytest.raises(IndexError, match=f"{shards}/2.bin: tokens holds 77 at position 250, expected 0 <= token < {V}"):
        count_shards([shards], out, vocab_size=V)
    with pytest.raises(ValueError, match=f"{shards}/1.bin: expected each file once, got it twice"):
        count_shards([shards, shards / "1.bin"], out)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        count_shards([tmp_path / "nowhere.bin"], out)
    with pytest.raises(ValueError, match="expected shards to count, got none"):
        count_shards([], out)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ValueError, match=r"text\.txt: expected a tokenizer"):
        count_shards([tmp_path / "text.txt"], tmp_path / "other", vocab_size=V)
    with pytest.raises(NotADirectoryError):
        count_shards([shards], tmp_path / "text.txt" / "out")


def test_damaged_partial_counts(shards: Path, tmp_path: Path) -> None:
    leave_partial(shards, tmp_path / "out")
    path = tmp_path / "out" / "counts.partial" / "rank-00000.safetensors"
    content = path.read_bytes()
    for damaged in (content[:100], content[:-1], content.replace(b"pieces", b"pisces"), b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path}: "):
            count_shards([shards], tmp_path / "out")
    path.write_bytes(content)
    metadata, kind = parts.read_metadata(path), "counts-partial"
    tensors, _metadata = storage.read_tensors(path, kind)
    for change in ({"pieces": "[[1]]"}, {"pieces": "[[[], 1, 1, 1, 1]]"}, {"pieces": "[" * 100_000}, {"options": "{"}):
        storage.write_tensors(path, kind, tensors, {**metadata, **change})
        with pytest.raises(ValueError, match=f"{path}: damaged"):
            count_shards([shards], tmp_path / "out")
    for name in tensors:
        storage.write_tensors(path, kind, {**tensors, name: tensors[name][:-1]}, metadata)
        with pytest.raises(ValueError, match=f"{path}: damaged"):
            count_shards([shards], tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Of counts in two parts."""
    tensors = {"crow_indices": torch.tensor([0, 2, 3]), "col_indices": torch.tensor([0, 3, 1], dtype=torch.int32)}
    first = parts.write_part(tmp_path / "1.safetensors", 0, {**tensors, "values": torch.tensor([5, 6, 7])})
    second = parts.write_part(tmp_path / "2.safetensors", 2, {**tensors, "values": torch.tensor([8, 9, 2**40])})
    index = parts.index_path(tmp_path / "counts.safetensors")
    parts.write_index(index, [first, second], {"vocab_size": "4", "eot": "null"})
    return index


def test_parts_are_read_as_one_file(index: Path) -> None:
    expected = torch.zeros(4, 4, dtype=torch.int64)
    expected[[0, 0, 1, 2, 2, 3], [0, 3, 1, 0, 3, 1]] = torch.tensor([5, 6, 7, 8, 9, 2**40])
    for path in (index, str(index), index.parent, index.parent / "counts.safetensors"):
        counts = BigramCounts.load(path)
        assert torch.equal(counts.to_dense(), expected)
    merged = BigramCounts(4)
    merged.merge(counts)
    merged.merge(counts)
    merged.save(index.parent / "counts.safetensors")  # the one file goes first
    assert torch.equal(BigramCounts.load(index.parent).to_dense(), 2 * expected)


def test_safetensors_reads_the_parts(index: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    for name, file in weight_map.items():
        with safetensors.safe_open(index.parent / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118, it is no dict
    assert set(weight_map.values()) == {"1.safetensors", "2.safetensors"}


def damage_a_part(index: Path) -> None:
    path = index.with_name("2.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def cut_a_part(index: Path) -> None:
    path = index.with_name("2.safetensors")
    path.write_bytes(path.read_bytes()[:-16])


def take_a_part_of_other_counts(index: Path) -> None:
    tensors = {"crow_indices": torch.tensor([0, 0, 1]), "col_indices": torch.tensor([1], dtype=torch.int32)}
    parts.write_part(index.with_name("2.safetensors"), 2, {**tensors, "values": torch.tensor([5])})


def swap_parts(index: Path) -> None:
    shutil.copyfile(index.with_name("1.safetensors"), index.with_name("2.safetensors"))


def edit(change: Callable[[str], str], *, with_checksum: bool = True) -> Callable[[Path], None]:
    def damage(index: Path) -> None:
        content = json.loads(change(index.read_text()))
        if with_checksum:
            content["metadata"]["crc32"] = parts._checksum_of(content)
        index.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damage_a_part,
        cut_a_part,
        take_a_part_of_other_counts,
        swap_parts,
        lambda index: index.write_text("{}"),
        lambda index: index.write_text("[" * 100_000),
        lambda index: index.write_bytes(b"\xff"),
        lambda index: index.write_text(""),
        edit(lambda text: text.replace('"end": 2', '"end": 3'), with_checksum=False),
        edit(lambda text: text.replace('"end": 2', '"end": 3')),
        edit(lambda text: text.replace('"begin": 2', '"begin": 1')),
        edit(lambda text: text.replace('"begin": 2,\n        "end": 4', '"begin": 2,\n        "end": 1')),
        edit(lambda text: text.replace('"num_distinct": 3', '"num_distinct": 2')),
        edit(lambda text: text.replace('"num_distinct": 3', '"num_distinct": 1000000000000000')),
        edit(lambda text: text.replace('"num_distinct": 3', '"num_distinct": true')),
        edit(lambda text: text.replace('"num_distinct": 3', '"num_distinct": 3, "further": 3')),
        edit(lambda text: text.replace("1.safetensors", "../1.safetensors")),
        edit(lambda text: text.replace('"eot": "null"', '"eot": null')),
        edit(lambda text: text.replace('"eot": "null"', '"eot": "4"')),
        edit(lambda text: text.replace('"vocab_size": "4"', '"vocab_size": "5"')),
        edit(lambda text: text.replace('"vocab_size": "4"', '"vocab": "4"')),
        edit(lambda text: text.replace('"kind": "counts"', '"kind": "model"')),
        edit(lambda text: re.sub(r'"parts": \[.*\]', '"parts": []', text, flags=re.DOTALL)),
    ],
)
def test_damaged_parts(index: Path, damage: Callable[[Path], object]) -> None:
    damage(index)
    with pytest.raises(ValueError, match=re.escape(str(index.parent))):
        BigramCounts.load(index)


def test_an_index_is_not_written_before_its_parts(index: Path) -> None:
    written, metadata = parts.read_index(index)
    index.with_name("1.safetensors").replace(index.with_name("2.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"1\.safetensors"):
        parts.write_index(index, written, metadata)
    with pytest.raises(ValueError, match=r"2\.safetensors: not the part"):
        parts.write_index(index, written[1:], metadata)


def test_missing_parts(index: Path) -> None:
    index.with_name("2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.safetensors"):
        BigramCounts.load(index)


def test_one_file_replaces_parts(index: Path, shards: Path) -> None:
    """Those of the index, and those that a job left which died before it wrote one; no others."""
    left = ["counts-00001-of-00002.safetensors", "counts-00002-of-00002.new.safetensors"]
    for name in left:
        shutil.copyfile(index.with_name("1.safetensors"), index.with_name(name))
    others = ["counts-00003-of-00003.safetensors", "counts-new-00001-of-00002.safetensors", "model.safetensors"]
    for name in others:
        index.with_name(name).write_text("of someone else")
    count_shards([shards], index.parent)
    names = {path.name for path in index.parent.glob("*.safetensors*")}
    assert names == {
        "counts.safetensors",
        "1.safetensors",
        "2.safetensors",
        *others,
    }  # its parts have names of their own
    assert BigramCounts.load(index.parent) == counts_of(shards)
