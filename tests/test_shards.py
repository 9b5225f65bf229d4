"""TokenShards against the concatenated tokens, and whatever takes tokens given either."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from bigramx import BigramLanguageModel, data, evaluation, fit, functional, memory, reference
from bigramx.data import TokenShards

CPU = torch.device("cpu")
SIZES = st.lists(st.integers(0, 7), max_size=5)


def shards_of(sizes: list[int], *dtypes: torch.dtype) -> tuple[TokenShards, Tensor]:
    """Shards of these sizes, their dtypes by turns, and the concatenated tokens."""
    dtypes = dtypes or (torch.int64,)
    whole = torch.arange(sum(sizes))
    parts = [part.to(dtypes[k % len(dtypes)]) for k, part in enumerate(whole.split(sizes))]
    return TokenShards(parts), whole


def written(folder: Path, **files: list[int]) -> Path:
    """A folder of .bin files."""
    for name, tokens in files.items():
        (folder / f"{name}.bin").write_bytes(torch.tensor(tokens, dtype=torch.uint16).numpy().tobytes())
    return folder


class TestSequence:
    @given(sizes=SIZES, begin=st.integers(-30, 30), end=st.integers(-30, 30) | st.none(), step=st.integers(1, 9))
    def test_slices(self, sizes: list[int], begin: int, end: int | None, step: int) -> None:
        for dtypes in ((torch.int64,), (torch.uint16,), (torch.uint8, torch.int32, torch.uint32)):
            shards, whole = shards_of(sizes, *dtypes)
            piece = shards[begin:end:step]
            assert torch.equal(piece.long(), whole[begin:end:step])
            assert piece.dtype == shards.dtype
            low, high, _one = slice(begin, end).indices(len(whole))
            part = shards.between(low, high)
            assert torch.equal(part[:].long(), whole[low:high])
            assert len(part) == part.numel() == max(0, high - low)

    @given(sizes=SIZES)
    def test_indices_and_iteration(self, sizes: list[int]) -> None:
        shards, whole = shards_of(sizes)
        assert len(shards) == len(whole)
        assert [int(shards[n]) for n in range(len(whole))] == whole.tolist()
        assert [int(shards[n - len(whole)]) for n in range(len(whole))] == whole.tolist()
        assert [token.tolist() for token in shards] == whole.tolist()
        assert [list(positions) for positions in shards.ranges] == [shard.tolist() for shard in shards.shards]
        for n in (len(whole), -len(whole) - 1):
            with pytest.raises(IndexError, match=f"index {n} is out of bounds for dimension 0 with size {len(whole)}"):
                shards[n]

    def test_what_lies_within_a_shard_is_a_view(self) -> None:
        shards, _whole = shards_of([4, 4])
        shards[5:8].zero_()
        assert shards[:].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
        shards.between(2, 6).shards[0].zero_()
        assert shards[:].tolist() == [0, 1, 0, 0, 4, 0, 0, 0]

    def test_dtypes(self) -> None:
        assert shards_of([1, 1], torch.uint16)[0].dtype == torch.uint16
        assert shards_of([1, 1], torch.uint16, torch.uint32)[0].dtype == torch.int64
        mixed, _whole = shards_of([2, 2], torch.uint16, torch.uint32)
        assert {mixed[1:3].dtype, mixed[2:].dtype, mixed[0].dtype, next(iter(mixed)).dtype} == {torch.int64}
        assert TokenShards([]).dtype == torch.int64
        assert TokenShards([])[:].tolist() == []

    @pytest.mark.parametrize("index", [True, 1.0, "a", None, (0, 1), torch.tensor([0, 1])])
    def test_other_indices(self, index: Any) -> None:
        with pytest.raises(TypeError):
            shards_of([3])[0][index]

    def test_bad_slices(self) -> None:
        for step in (0, -1):
            with pytest.raises(ValueError, match="step"):
                shards_of([3])[0][::step]

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (([[1, 2]],), TypeError, "expected tokens to be a Tensor or TokenShards, got list"),
            (([torch.zeros(2, 2, dtype=torch.int64)],), RuntimeError, r"1-D, got shape \(2, 2\)"),
            (([torch.zeros(2)],), RuntimeError, "uint8, uint16, uint32, int32 or int64, got torch.float32"),
            (([torch.arange(2)], ["a", "b"]), ValueError, "as many names as shards, got 2 and 1"),
            (([], None, -1), ValueError, "eot >= 0, got -1"),
            (([], None, 1.5), TypeError, "eot to be an int, got float"),
            (([], None, True), TypeError, "eot to be an int, got bool"),
        ],
    )
    def test_bad_arguments(self, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
        shards, *rest = arguments
        with pytest.raises(error, match=message):
            TokenShards(shards, **dict(zip(("names", "eot"), rest, strict=False)))

    def test_a_copy_that_does_not_fit(self) -> None:
        shards = TokenShards([torch.zeros((), dtype=torch.uint16).expand(10**12)] * 2)
        assert shards[5 : 10**12].numel() == 10**12 - 5
        with pytest.raises(MemoryError, match=r"a copy of 2,000,000,000,000 tokens takes 4,000\.0 GB, and cpu has"):
            shards[:]

    def test_repr(self) -> None:
        assert repr(TokenShards([torch.arange(1500)], names=["a\x1b.bin"])) == (
            r"TokenShards(1,500 tokens, int64, 1 shard: a\x1b.bin)"
        )
        shards = TokenShards([torch.arange(2)] * 5, names=list("abcde"), eot=1)
        assert repr(shards) == "TokenShards(10 tokens, int64, eot=1, 5 shards: a, b, c, 2 more)"


class TestSplit:
    @given(sizes=SIZES, train_fraction=st.floats(0, 1))
    def test_by_position_as_of_a_tensor(self, sizes: list[int], train_fraction: float) -> None:
        shards, whole = shards_of(sizes)
        for ours, expected in zip(data.split(shards, train_fraction), data.split(whole, train_fraction), strict=True):
            assert torch.equal(ours[:], expected)
        assert [len(part) for part in data.split(shards)] == [len(part) for part in data.split(whole)]

    @pytest.mark.parametrize(
        ("train", "val"),
        [
            ("train", "val"),
            ("fineweb_train_000001", "fineweb_val_000000"),
            ("TinyStories-Train", "TinyStories-VAL"),
            ("wiki.training", "wiki.valid"),
            ("z_train2", "a_validation"),
        ],
    )
    def test_as_the_names_of_files_say(self, tmp_path: Path, train: str, val: str) -> None:
        written(tmp_path, **{train: [1, 2], val: [4, 5, 6], "some.test": [7]})
        parts = data.split(data.read_tokens(tmp_path, eot=9))
        assert [part[:].tolist() for part in parts] == [[1, 2], [4, 5, 6]]
        assert parts[0].eot == parts[1].eot == 9
        assert [len(part) for part in data.split(data.read_tokens(tmp_path), 0.5)] == [3, 3]
        written(tmp_path, other=[1, 2, 3, 4])  # of which nothing is said
        assert [len(part) for part in data.split(data.read_tokens(tmp_path))] == [9, 1]
        for alone in (train, val):
            tokens = data.read_tokens(tmp_path / f"{alone}.bin")
            assert [len(part) for part in data.split(tokens)] == [len(tokens) - 1, 1]

    def test_bad_fractions(self) -> None:
        with pytest.raises(ValueError, match=r"got 1\.5"):
            data.split(shards_of([3])[0], 1.5)


class TestFiles:
    def test_pickled_as_paths(self, tmp_path: Path) -> None:
        written(tmp_path, a=list(range(1000)) * 100, b=[7, 8, 9])
        shards = data.read_tokens([tmp_path / "a.bin", tmp_path / "b.bin", torch.tensor([5])], eot=3)
        for part in (shards, shards.between(99_990, 100_002), shards.between(5, 5), data.read_tokens(tmp_path)):
            content = pickle.dumps(part)
            assert len(content) < 2000
            for copied in (pickle.loads(content), copy.deepcopy(part)):
                assert torch.equal(copied[:], part[:])
                assert (copied.names, copied.eot, copied.dtype) == (part.names, part.eot, part.dtype)
        assert pickle.loads(pickle.dumps(shards[:])).tolist() == shards[:].tolist()

    def test_views_are_not_pickled_with_all_that_they_are_of(self) -> None:
        rows = torch.arange(20_000).view(1000, 20)
        shards = data.read_tokens([rows, torch.tensor([1, 2], dtype=torch.uint16), []])
        content = pickle.dumps(shards.between(0, 20_002))
        assert len(content) < 300_000
        copied = pickle.loads(content)
        assert [shard.tolist() for shard in copied.shards] == [*rows.tolist(), [1, 2]]
        assert [shard.dtype for shard in copied.shards[-2:]] == [torch.int64, torch.uint16]
        assert [shard.tolist() for shard in pickle.loads(pickle.dumps(TokenShards([]))).shards] == []

    def test_pickled_where_the_folder_was_another(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(written(tmp_path, a=[1, 2]))
        content = pickle.dumps(data.read_tokens("a.bin"))
        monkeypatch.chdir("/")
        assert pickle.loads(content)[:].tolist() == [1, 2]

    def test_a_file_that_has_changed_is_not_opened_again(self, tmp_path: Path) -> None:
        content = pickle.dumps(data.read_tokens(written(tmp_path, a=[1, 2])))
        written(tmp_path, a=[1, 2, 3])
        with pytest.raises(ValueError, match=r"a\.bin: the file has changed since its tokens were read"):
            pickle.loads(content)
        (tmp_path / "a.bin").unlink()
        with pytest.raises(FileNotFoundError):
            pickle.loads(content)

    def test_more_files_than_descriptors(self, tmp_path: Path) -> None:
        written(tmp_path, a=[1, 2])
        before = len(os.listdir("/proc/self/fd"))
        shards = data.read_tokens([tmp_path / "a.bin"] * 50)
        assert len(os.listdir("/proc/self/fd")) == before
        assert shards[:].tolist() == [1, 2] * 50

    def test_pages_live_as_long_as_tensors_of_them(self, tmp_path: Path) -> None:
        path = str(written(tmp_path, a=list(range(20))) / "a.bin")
        view = data.read_tokens(path).between(5, 15).shards[0][2:4]
        gc.collect()
        assert view.tolist() == [7, 8]
        assert path in Path("/proc/self/maps").read_text()
        del view
        gc.collect()
        assert path not in Path("/proc/self/maps").read_text()

    def test_a_file_larger_than_the_memory(self, tmp_path: Path) -> None:
        """Its pages may be written, which the system would keep room for unless told otherwise."""
        total = memory.total_memory(CPU)
        assert total is not None
        with open(tmp_path / "a.bin", "wb") as file:
            file.truncate(2 * total)  # a hole
        tokens = data.read_tokens(tmp_path)
        assert len(tokens) == total
        tokens.shards[0][-1] = 3
        assert int(tokens[-1]) == 3


class TestBatches:
    @given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 99), data_=st.data())
    def test_those_of_the_concatenated_tokens(self, sizes: list[int], seed: int, data_: st.DataObject) -> None:
        shards, whole = shards_of([2, *sizes], torch.uint16, torch.uint32)
        block_size = data_.draw(st.integers(1, len(whole) - 1))
        ours, theirs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        actual = data.get_batch(shards, 5, block_size, generator=ours)
        expected = data.get_batch(whole, 5, block_size, generator=theirs)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == torch.int64
            assert one.is_contiguous()
        assert torch.equal(ours.get_state(), theirs.get_state())
        ours.manual_seed(seed)
        assert torch.equal(reference.get_batch(shards, 5, block_size, generator=ours)[0], actual[0])

    def test_from_the_default_generator(self) -> None:
        shards, whole = shards_of([20, 30])
        torch.manual_seed(1)
        expected = data.get_batch(whole, 4, 8)[0]
        torch.manual_seed(1)
        assert torch.equal(data.get_batch(shards, 4, 8)[0], expected)
        torch.manual_seed(1)
        assert torch.equal(data.get_batch(TokenShards([whole]), 4, 8)[0], expected)

    @pytest.mark.parametrize("arguments", [(0, 8), (4, 0), (4, 9), (4, 2**63 - 1), (2**58, 8), (2**61, 8), (4.5, 8)])
    def test_errors_as_for_a_tensor(self, arguments: Any) -> None:
        shards, whole = shards_of([4, 5])
        with pytest.raises((ValueError, RuntimeError, TypeError)) as expected:
            data.get_batch(whole, *arguments)
        with pytest.raises(expected.type) as actual:
            data.get_batch(shards, *arguments)
        assert str(actual.value).split("\n")[0] == str(expected.value).split("\n")[0]


def cyclic(sizes: list[int], vocab_size: int) -> TokenShards:
    torch.manual_seed(0)
    return TokenShards([torch.randint(vocab_size, (size,)).to(torch.uint16) for size in sizes])


def pair_counts(shards: TokenShards, vocab_size: int) -> Tensor:
    none = torch.zeros(vocab_size, vocab_size, dtype=torch.int64)
    counts = sum((functional.count_bigrams(shard.long(), vocab_size) for shard in shards.shards), start=none)
    if shards.eot is not None:
        counts[shards.eot] = 0
    return counts


class TestEvaluation:
    """No pair of two shards counts."""

    @pytest.mark.parametrize(
        ("sizes", "vocab_size"),
        [*((sizes, 5) for sizes in ([600, 500, 400], [1, 0, 300, 2, 1], [5] * 200, [700], [1, 1], [])), ([9, 8], 1900)],
    )
    def test_counts(self, sizes: list[int], vocab_size: int) -> None:
        shards = cyclic(sizes, 5)
        assert data.num_pairs(shards) == sum(max(0, size - 1) for size in sizes)
        assert torch.equal(evaluation.count_pairs(shards, vocab_size, CPU), pair_counts(shards, vocab_size))
        of_documents = TokenShards(shards.shards, eot=3)
        counts = pair_counts(of_documents, vocab_size)
        assert data.num_pairs(of_documents) == counts.sum()
        assert torch.equal(evaluation.count_pairs(of_documents, vocab_size, CPU), counts)

    @pytest.mark.parametrize("eot", [None, 3])
    @pytest.mark.parametrize("sizes", [[600, 500, 400], [1, 0, 300, 2, 1], [5] * 200, [700], [1, 1], []])
    def test_losses(self, sizes: list[int], eot: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluation, "_CHUNK", 2**8)
        monkeypatch.setattr(evaluation, "_SAMPLE_STEP", 2**2)
        shards = TokenShards(cyclic(sizes, 5).shards, eot=eot)
        counts = pair_counts(shards, 5)
        model = BigramLanguageModel(5)
        expected = model.evaluate_counts(counts)
        assert model.evaluate(shards) == pytest.approx(expected, rel=1e-6, nan_ok=True)
        weight = model.token_embedding_table.weight.detach()
        assert evaluation.loss_of_tokens(weight, shards) == pytest.approx(expected, rel=1e-6, nan_ok=True)
        model.label_smoothing = 1e-300  # by calls of the model
        assert model.evaluate(shards) == pytest.approx(expected, rel=1e-6, nan_ok=True)
        optimum = evaluation.optimal_loss_of_counts(counts)
        wide = TokenShards([shard.long() * 2**40 for shard in shards.shards], eot=None if eot is None else eot * 2**40)
        for same in (shards, wide):
            assert evaluation.optimal_loss(same) == pytest.approx(optimum, rel=1e-9, nan_ok=True)

    def test_of_one_shard_as_of_its_tensor(self) -> None:
        shards = cyclic([3000], 65)
        model = BigramLanguageModel(65)
        assert model.evaluate(shards) == model.evaluate(shards[:])
        assert evaluation.optimal_loss(shards) == evaluation.optimal_loss(shards[:])
        assert data.token_range(shards) == data.token_range(shards[:])

    @pytest.mark.parametrize("vocab_size", [4, 40])
    def test_the_position_of_a_token_out_of_range(self, vocab_size: int) -> None:
        tokens = torch.zeros(100, dtype=torch.int64)
        tokens[77] = vocab_size
        shards = TokenShards(tokens.split([70, 7, 1, 22]))
        model = BigramLanguageModel(vocab_size)
        for call in (model.evaluate, lambda shards: fit(model, shards, max_steps=0)):
            with pytest.raises(IndexError, match=f"tokens holds {vocab_size} at position 77, "):
                call(shards)


def test_the_default_device_does_not_matter(tmp_path: Path) -> None:
    written(tmp_path, a=[1, 2, 3], b=[4, 1, 2])
    model = BigramLanguageModel(5)
    expected = model.evaluate(data.read_tokens(tmp_path))
    with torch.device("meta"):
        shards = data.read_tokens([tmp_path, [1, 2], range(3), torch.ones(2, 2, dtype=torch.int16, device="cpu")])
        assert shards[:].tolist() == [1, 2, 3, 4, 1, 2, 1, 2, 0, 1, 2, 1, 1, 1, 1]
        copied = pickle.loads(pickle.dumps(shards)).between(0, 6)
        assert [part.tolist() for part in data.documents(copied, 2)] == [[0], [2], [3]]
        assert data.get_batch(copied, 1, 5, generator=torch.Generator())[1].tolist() == [[2, 3, 4, 1, 2]]
        assert model.evaluate(copied) == expected
        assert evaluation.optimal_loss(copied) == pytest.approx(0)


class TestFit:
    @pytest.mark.parametrize("sizes", [[400], [150, 250], [399, 0, 1]])
    def test_steps_as_on_the_concatenated_tokens(self, sizes: list[int]) -> None:
        shards = cyclic(sizes, 12)
        runs = []
        for tokens in (shards, shards[:]):
            torch.manual_seed(2)
            model = BigramLanguageModel(12)
            generator = torch.Generator().manual_seed(1)
            history = fit(model, tokens, shards, max_steps=20, eval_interval=10, generator=generator)
            runs.append((history, model.token_embedding_table.weight, generator.get_state()))
        (ours, weight, state), (expected, expected_weight, expected_state) = runs
        assert ours.losses == pytest.approx(expected.losses, rel=1e-6)
        assert torch.allclose(weight, expected_weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(state, expected_state)
        assert ours.optimum == pytest.approx(evaluation.optimal_loss_of_counts(pair_counts(shards, 12)))
        assert ours.val_losses == pytest.approx(ours.train_losses)

    def test_resumes(self) -> None:
        shards = cyclic([150, 250], 12)
        torch.manual_seed(2)
        once, twice = BigramLanguageModel(12), BigramLanguageModel(12)
        twice.load_state_dict(once.state_dict())
        torch.manual_seed(3)
        whole = fit(once, shards, max_steps=8)
        torch.manual_seed(3)
        first = fit(twice, shards, max_steps=5)
        assert fit(twice, shards, max_steps=8, resume=first).losses == whole.losses

    def test_too_few_tokens(self) -> None:
        with pytest.raises(ValueError, match="more than block_size = 8 tokens, got 8"):
            fit(BigramLanguageModel(12), cyclic([4, 4], 12), max_steps=1)
        assert not math.isnan(fit(BigramLanguageModel(12), cyclic([4, 5], 12), max_steps=1).losses[0])


class TestDocuments:
    @given(sizes=SIZES, ends=st.sets(st.integers(0, 40)), chunk=st.integers(1, 5))
    def test_begin_where_shards_do_and_after_eot(self, sizes: list[int], ends: set[int], chunk: int) -> None:
        shards, whole = shards_of(sizes, torch.uint16)
        for n in range(len(whole)):
            shards[n].fill_(9 if n in ends else 1)
        expected = {positions[0] for positions in shards.ranges if positions}
        of_shards = sorted(expected)
        expected |= {n + 1 for positions in shards.ranges for n in positions[:-1] if n in ends}
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(data, "_CHUNK", chunk)
            parts = [part.tolist() for part in data.documents(shards, 9)]
        assert [begin for part in parts for begin in part] == sorted(expected)
        assert all(0 < len(part) <= chunk for part in parts)
        assert [int(part) for part in data.documents(shards)] == of_shards

    def test_the_eot_of_the_shards(self) -> None:
        tokens = torch.tensor([1, 9, 1, 9])
        assert torch.cat(list(data.documents(TokenShards([tokens], eot=9)))).tolist() == [0, 2]
        assert torch.cat(list(data.documents(tokens, 9))).tolist() == [0, 2]
