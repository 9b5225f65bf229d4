"""The scripts of examples/ give what one process gives with PyTorch alone, however many ranks share the work."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigramx
from bigramx import data, reference
from tests import processes
from tests.tree import ROOT

EXAMPLES = ROOT / "examples"
TEXT = "".join(chr(ord("a") + i * i % 19 + i % 11) for i in range(2000))  # 28 characters
STEPS, BATCH_SIZE, BLOCK_SIZE, LR, SEED = 6, 6, 4, 1e-2, 7

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


def run(script: str, num_ranks: int, folder: Path, out: str) -> str:
    """What the script prints."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    options = {
        "--text": folder / "text.txt",
        "--steps": STEPS,
        "--batch-size": BATCH_SIZE,
        "--block-size": BLOCK_SIZE,
        "--lr": LR,
        "--eval-interval": 4,
        "--seed": SEED,
        "--out": folder / out,
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    arguments = [str(word) for option in options.items() for word in option]
    command = [*torchrun, f"--nproc-per-node={num_ranks}", str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    ended = processes.run(command, cwd=folder, env=environment)
    # When all is done, a thread of Gloo may abort a process while Python ends (pytorch/pytorch#179291).
    assert ended.returncode == 0 or "terminate called without an active exception" in ended.stderr, ended.stderr
    return ended.stdout


def train(initial: str) -> tuple[Tensor, str]:
    """The same by PyTorch alone: the table, and what is printed."""
    tokenizer = bigramx.CharTokenizer.from_text(TEXT)
    train_tokens, val_tokens = data.split(tokenizer.encode(TEXT))
    torch.manual_seed(SEED)
    model: Any = reference.BigramLanguageModel(tokenizer.vocab_size)
    if initial == "zeros":
        nn.init.zeros_(model.token_embedding_table.weight)
        torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    lines = []
    for step in range(STEPS + 1):
        if step % 4 == 0 or step == STEPS:
            train_loss, val_loss = (exact_loss(model, tokens) for tokens in (train_tokens, val_tokens))
            lines.append(f"step {step:4}: train loss {train_loss:.4f}, val loss {val_loss:.4f}\n")
        if step < STEPS:
            optimizer.zero_grad()
            model(*reference.get_batch(train_tokens, BATCH_SIZE, BLOCK_SIZE))[1].backward()
            optimizer.step()
    sample = tokenizer.decode(model.generate(torch.zeros(1, 1, dtype=torch.long), 200)[0])
    return model.token_embedding_table.weight.detach(), "".join(lines) + sample + "\n"


@torch.no_grad()
def exact_loss(model: nn.Module, tokens: Tensor) -> float:
    return F.cross_entropy(model(tokens[None, :-1])[0][0], tokens[1:]).item()


def assert_same_output(actual: str, expected: str) -> None:
    """Losses to a unit in the last place that is printed, the rest exactly."""
    number = re.compile(r"\d\.\d{4}")
    assert number.sub("#", actual) == number.sub("#", expected)
    for one, other in zip(number.findall(actual), number.findall(expected), strict=True):
        assert abs(float(one) - float(other)) < 1.5e-4


@needs_gloo
@pytest.mark.parametrize("script", ["train_ddp.py", "train_fsdp2.py"])
def test_data_parallel(script: str, tmp_path: Path) -> None:
    weight, printed = train(initial="normal")
    assert_same_output(run(script, 2, tmp_path, "model.safetensors"), printed)
    model = bigramx.BigramLanguageModel.load(tmp_path / "model.safetensors")
    assert model.tokenizer is not None
    torch.testing.assert_close(model.token_embedding_table.weight.detach(), weight)


@needs_gloo
@pytest.mark.filterwarnings("ignore")  # PyTorch's, about a load by one process
def test_row_sharded(tmp_path: Path) -> None:
    """Three ranks, among which the rows do not divide evenly."""
    from torch.distributed import checkpoint

    weight, printed = train(initial="zeros")
    assert_same_output(run("train_row_sharded.py", 3, tmp_path, "checkpoint"), printed)
    model = bigramx.BigramLanguageModel(len(weight))
    checkpoint.load({"model": model.state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)  # type: ignore[attr-defined]
    torch.testing.assert_close(model.token_embedding_table.weight.detach(), weight)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100
