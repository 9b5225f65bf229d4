"""A process killed at any moment leaves either the old file or the new one, whole."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch

from bigramx import BigramLanguageModel, storage
from tests import processes

SAVE_FOREVER = """
import sys, torch, bigramx
models = []
for value in (1.0, 2.0):
    model = bigramx.BigramLanguageModel(300)
    torch.nn.init.constant_(model.token_embedding_table.weight, value)
    models.append(model)
models[0].save(sys.argv[1])
print("saving", flush=True)
while True:
    for model in models:
        model.save(sys.argv[1])
"""


def test_a_kill_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for delay in (0.0, 0.003, 0.011, 0.02):
        with processes.start([sys.executable, "-c", SAVE_FOREVER, path]) as process:
            processes.read_until(process, "saving")
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        weight = BigramLanguageModel.load(path).token_embedding_table.weight
        assert weight.unique().tolist() in ([1.0], [2.0])


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write_text(path, "old")

    def fail(temporary: str) -> None:
        Path(temporary).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_with(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_usual_permissions(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "ours", "")
    (tmp_path / "usual").write_text("")
    assert stat.S_IMODE(os.stat(tmp_path / "ours").st_mode) == stat.S_IMODE(os.stat(tmp_path / "usual").st_mode)


def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    storage.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o600


def test_long_names(tmp_path: Path) -> None:
    storage.write_text(tmp_path / ("n" * 250), "")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BigramLanguageModel(2).save(tmp_path / "none" / "model.safetensors")


def test_kinds_of_files_are_distinguished(tmp_path: Path) -> None:
    storage.write_tensors(tmp_path / "file", "model", {"a": torch.empty(0)}, {"note": "é"})
    tensors, metadata = storage.read_tensors(tmp_path / "file", "model")
    assert tensors["a"].shape == (0,)
    assert metadata["note"] == "é"
    with pytest.raises(ValueError, match="not a history that bigramx saved"):
        storage.read_tensors(tmp_path / "file", "history")
