"""Hugging Face datasets: their columns as tokens; and PyTorch's DataLoader, whose workers are sent the shards."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bigramx
from bigramx import CharTokenizer, data
from tests import processes
from tests.integration import framework

datasets = framework("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [[1, 2, 3], [], [4], [5, 6]]


@pytest.fixture(params=["memory", "disk"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = datasets.Dataset.from_dict({"tokens": ROWS, "flat": [1, 2, 3, 4], "text": list("abcd")})
    if request.param == "memory":
        return made
    made.save_to_disk(tmp_path)
    return datasets.load_from_disk(tmp_path)


def rows_of(column: Any) -> list[list[int]]:
    return [shard.tolist() for shard in data.read_tokens(column).shards]


@pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow", "pandas"])
def test_lists_are_shards(dataset: Any, form: str | None) -> None:
    dataset = dataset.with_format(form)
    assert rows_of(dataset["tokens"]) == ROWS
    assert rows_of(dataset.select([3, 0])["tokens"]) == [[5, 6], [1, 2, 3]]
    assert rows_of(datasets.concatenate_datasets([dataset, dataset])["tokens"]) == ROWS + ROWS
    assert rows_of(dataset["flat"]) == [[1, 2, 3, 4]]
    assert rows_of(datasets.concatenate_datasets([dataset, dataset])["flat"]) == [[1, 2, 3, 4] * 2]
    assert rows_of(dataset["tokens"][:2]) == ROWS[:2]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_dtypes(dtype: str) -> None:
    for feature in (
        datasets.Sequence(datasets.Value(dtype)),
        datasets.Sequence(datasets.Value(dtype), length=2),
        datasets.LargeList(datasets.Value(dtype)),
    ):
        made = datasets.Dataset.from_dict({"tokens": [[1, 2], [3, 4]]}, features=datasets.Features(tokens=feature))
        assert rows_of(made["tokens"]) == [[1, 2], [3, 4]]
        assert rows_of(made.select([1])["tokens"]) == [[3, 4]]


def test_columns_that_are_computed_or_nested(dataset: Any) -> None:
    def changed(batch: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": [[token + 1 for token in row] for row in batch["tokens"]]}

    assert rows_of(dataset.with_transform(changed)["tokens"]) == [[token + 1 for token in row] for row in ROWS]
    nested = datasets.Dataset.from_dict({"a": [{"tokens": [1, 2]}, {"tokens": [3]}]})
    assert rows_of(nested["a"]["tokens"]) == [[1, 2], [3]]


def test_a_column_on_disk_is_not_copied(dataset: Any) -> None:
    first, second = (data.read_tokens(dataset["tokens"]).shards[0] for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


def test_other_columns(dataset: Any) -> None:
    with pytest.raises(TypeError, match="hold integers or lists of them, without nulls, got string"):
        data.read_tokens(dataset["text"])
    texts = data.read_tokens(dataset["text"], tokenizer=CharTokenizer("abcd"))
    assert [shard.tolist() for shard in texts.shards] == [[0], [1], [2], [3]]
    assert texts.num_bytes == 4
    for rows in ([[1], None], [[1, None], [2]]):
        with pytest.raises(TypeError, match="without nulls, got list"):
            data.read_tokens(datasets.Dataset.from_dict({"tokens": rows})["tokens"])
    for source in (dataset, datasets.DatasetDict(train=dataset), dataset.to_iterable_dataset()):
        with pytest.raises(TypeError, match="expected paths to be a path, tokens or a sequence of these, got"):
            data.read_tokens(source)


SCRIPT = """
import sys

from torch.utils.data import DataLoader, Dataset

from bigramx import data


class Blocks(Dataset):
    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens) // 10

    def __getitem__(self, n):
        return self.tokens[10 * n : 10 * n + 10].long()


if __name__ == "__main__":
    blocks = Blocks(data.read_tokens(sys.argv[1]).between(0, 50))
    for batch in DataLoader(blocks, num_workers=2, multiprocessing_context=sys.argv[2]):
        print(*batch.flatten().tolist())
"""


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_of_a_data_loader(tmp_path: Path, start: str) -> None:
    for name, tokens in (("a", torch.arange(40)), ("b", torch.arange(40, 60))):
        (tmp_path / f"{name}.bin").write_bytes(tokens.to(torch.uint16).numpy().tobytes())
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(bigramx.__file__).parents[1])}
    done = processes.run([sys.executable, script, tmp_path, start], cwd=tmp_path, env=env, check=True)
    assert done.stdout.split() == list(map(str, range(50)))
