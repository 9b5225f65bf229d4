"""A file is replaced whole or not at all, whatever the file system, the target and the moment."""

from __future__ import annotations

import errno
import gzip
import io
import os
import select
import shutil
import signal
import socket
import stat
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import safetensors.torch
import torch

from bigramx import BigramLanguageModel, CharTokenizer, History, storage
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


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def fail_with(number: int) -> Callable[..., None]:
    """In place of a system call: it fails so."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_kill_while_saving_leaves_a_whole_file(tmp_path: Path, through_a_link: bool) -> None:
    path = tmp_path / "model.safetensors"
    target = tmp_path / "link" if through_a_link else path
    if through_a_link:
        target.symlink_to(path)
    for delay in (0.003,) if through_a_link else (0.0, 0.003, 0.011, 0.02):
        with processes.start([sys.executable, "-c", SAVE_FOREVER, target]) as process:
            processes.read_until(process, "saving")
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        weight = BigramLanguageModel.load(path).token_embedding_table.weight
        assert weight.unique().tolist() in ([1.0], [2.0])


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write_text(path, "old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_with(path, fail)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"file"}


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ETXTBSY])
@pytest.mark.parametrize("old", [None, "old", "a longer old text"])
def test_a_file_that_cannot_be_replaced_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, old: str | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
        os.link(path, tmp_path / "same")
    monkeypatch.setattr(os, "replace", fail_with(number))
    storage.write_text(path, "new text")
    assert path.read_text() == "new text"
    assert old is None or path.samefile(tmp_path / "same")
    assert len(names_in(tmp_path)) == (1 if old is None else 2)


@pytest.mark.parametrize("old", [None, "old", "a longer old text"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_what_was_overwritten_is_put_back_on_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, old: str | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
    calls: list[int] = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:  # after those of the temporary file, and before those that are put back
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail_with(errno.EBUSY))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"file'$") as raised:
        storage.write_text(path, "new text")
    assert raised.value.errno == number
    assert (path.read_text() if path.exists() else None) == old
    assert names_in(tmp_path) == (set() if old is None else {"file"})


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.ENOSYS])
@pytest.mark.parametrize("call", ["chmod", "utime", "setxattr", "fsync"])
def test_what_a_file_system_cannot_do_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "file"
    monkeypatch.setattr(os, call, fail_with(number), raising=False)
    for text in ("new", "and again"):
        storage.write_text(path, text)
        assert path.read_text() == text
    assert names_in(tmp_path) == {"file"}


def test_data_that_do_not_arrive_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: .*file"):
        storage.write_text(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"file"}


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_temporary_file_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    create = storage._create

    def refuse(folder: str, mode: int) -> IO[bytes]:
        if folder == str(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a name that nobody knows")
        return create(folder, mode)

    monkeypatch.setattr(storage, "_create", refuse)
    storage.write_text(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(PermissionError) as raised:
        storage.write_text(tmp_path / "other", "new")
    assert raised.value.filename == str(tmp_path / "other")
    assert names_in(tmp_path) == {"file"}


def test_the_usual_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        (tmp_path / "usual").write_text("")
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")  # it is the whole process's
            storage.write_text(tmp_path / "ours", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "usual").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(tmp_path / "ours").st_mode) == 0o640


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o600)

    def write(file: IO[bytes]) -> None:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600

    storage.write_with(path, write)


def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    target, link, second = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "second"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o620)
    link.symlink_to("folder/target")
    second.symlink_to(link)
    storage.write_text(second, "new")
    assert (link.is_symlink(), second.is_symlink()) == (True, True)
    assert target.read_text() == "new"
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o620
    assert names_in(tmp_path / "folder") == {"target"}


def test_a_link_to_nothing_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    storage.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=r"a'$") as raised:
        storage.write_text(tmp_path / "a", "new")
    assert raised.value.errno == errno.ELOOP
    assert names_in(tmp_path) == {"a", "b"}


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="no extended attributes here")
def test_extended_attributes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    try:
        os.setxattr(path, "user.note", b"kept")
    except OSError:
        pytest.skip("the file system has no extended attributes")
    storage.write_text(path, "new")
    assert os.getxattr(path, "user.note") == b"kept"


def test_the_time_is_now(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    os.utime(path, (1, 1))
    storage.write_text(path, "new")
    assert path.stat().st_mtime > 1e9


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, ".", "-", " ", "a\nb", "\udcff"])
def test_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model" if name == "." else tmp_path / name
    BigramLanguageModel(2).save(path)
    assert BigramLanguageModel.load(os.fsencode(path)).vocab_size == 2  # type: ignore[arg-type]
    assert names_in(tmp_path) == {path.name}


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("none/model", FileNotFoundError),
        ("file/model", NotADirectoryError),
        ("folder", IsADirectoryError),
        ("folder/", IsADirectoryError),
        ("new/", IsADirectoryError),
        ("n" * 256, OSError),
    ],
)
def test_places_that_take_no_file(tmp_path: Path, target: str, error: type[OSError]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    path = f"{tmp_path}/{target}"
    with pytest.raises(error) as raised:
        BigramLanguageModel(2).save(path)
    assert raised.value.filename == path
    assert names_in(tmp_path) == {"folder", "file"}
    assert names_in(tmp_path / "folder") == set()


@pytest.mark.parametrize("target", [None, 3, [], object()])
def test_neither_path_nor_file(target: Any) -> None:
    message = f"^expected a path or a file object, got {type(target).__name__}$"
    for call in (
        BigramLanguageModel(2).save,
        BigramLanguageModel.load,
        CharTokenizer("ab").save,
        CharTokenizer.load,
        History().save,
    ):
        with pytest.raises(TypeError, match=message):
            call(target)


def test_devices_stay_devices() -> None:
    model = BigramLanguageModel(2)
    model.save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            model.save("/dev/full")


@pytest.mark.parametrize("through_a_link", [False, True])
def test_pipes(tmp_path: Path, through_a_link: bool) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    model = BigramLanguageModel(40)  # more than a pipe holds
    end = link if through_a_link else pipe
    with open(pipe, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        os.set_blocking(file.fileno(), True)
        thread = threading.Thread(target=model.save, args=[end])
        thread.start()
        while not select.select([file], [], [], 60)[0]:
            pass
        loaded = BigramLanguageModel.load(file)
        thread.join()
    assert torch.equal(loaded.token_embedding_table.weight, model.token_embedding_table.weight)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names_in(tmp_path) == {"pipe", "link"}


def test_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(OSError, match="socket'"):
            storage.write_text("socket", "new")
        assert stat.S_ISSOCK(os.stat("socket").st_mode)


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no /dev/fd here")
def test_what_a_process_has_open(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        storage.write_text(f"/dev/fd/{file.fileno()}", "new")
        assert file.read() == b"new"
    assert names_in(tmp_path) == {"file"}


IN_A_NAMESPACE = """
import os, sys
from pathlib import Path
import torch
from bigramx import BigramLanguageModel

def mount(*arguments):
    if os.spawnlp(os.P_WAIT, "mount", "mount", *map(str, arguments)) != 0:
        sys.exit(77)

def values(path):
    return BigramLanguageModel.load(path).token_embedding_table.weight.unique().tolist()

def names(folder):
    return sorted(path.name for path in folder.iterdir())

old, new = BigramLanguageModel(300), BigramLanguageModel(301)
torch.nn.init.constant_(old.token_embedding_table.weight, 1.0)
torch.nn.init.constant_(new.token_embedding_table.weight, 2.0)
top = Path(sys.argv[1])

# A file that is a mount point, as Docker's --volume makes them.
for name in ("source", "target"):
    old.save(top / name)
mount("--bind", top / "source", top / "target")
new.save(top / "target")
assert values(top / "target") == values(top / "source") == [2.0]

# The same in a folder that is read-only.
(top / "fixed").mkdir()
(top / "fixed" / "model").touch()
mount("--bind", top / "fixed", top / "fixed")
mount("--bind", top / "source", top / "fixed" / "model")
mount("-o", "remount,bind,ro", top / "fixed")
old.save(top / "fixed" / "model")
assert values(top / "source") == [1.0]
try:
    old.save(top / "fixed" / "other")
except OSError as error:
    assert str(error) == f"[Errno 30] Read-only file system: '{top}/fixed/other'", error
else:
    raise AssertionError

# A file system without room for a second file.
(top / "full").mkdir()
mount("-t", "tmpfs", "-o", "size=512k", "tmpfs", top / "full")
old.save(top / "full" / "model")
for _ in range(2):
    try:
        new.save(top / "full" / "model")
    except OSError as error:
        assert str(error) == f"[Errno 28] No space left on device: '{top}/full/model'", error
    else:
        raise AssertionError
    assert values(top / "full" / "model") == [1.0]
    assert names(top / "full") == ["model"]

if sys.argv[2] == "root":
    # Another owner, who stays: by root's word, or because the file is written in place.
    mount("-t", "tmpfs", "tmpfs", "/mnt")  # a place that they may enter
    theirs = Path("/mnt/theirs")
    theirs.mkdir()
    theirs.chmod(0o777)
    old.save(theirs / "model")
    os.chown(theirs / "model", 12345, 12345)
    new.save(theirs / "model")
    (theirs / "model").chmod(0o666)
    os.seteuid(54321)
    old.save(theirs / "model")
    assert values(theirs / "model") == [1.0]
    owner = (theirs / "model").stat()
    assert (owner.st_uid, owner.st_gid, owner.st_mode & 0o777) == (12345, 12345, 0o666)

    # A folder that one may not write to, a file that one may, and one that one may not.
    os.seteuid(0)
    theirs.chmod(0o755)
    os.seteuid(54321)
    new.save(theirs / "model")
    assert values(theirs / "model") == [2.0]
    os.seteuid(0)
    theirs.chmod(0o777)
    (theirs / "model").chmod(0o644)
    os.seteuid(54321)
    try:
        old.save(theirs / "model")
    except PermissionError as error:
        assert error.filename == str(theirs / "model")
    else:
        raise AssertionError
    assert values(theirs / "model") == [2.0]
    assert names(theirs) == ["model"]
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_mounts_and_owners(tmp_path: Path) -> None:
    """In a mount namespace of its own, which nothing outlives."""
    is_root = os.geteuid() == 0
    command = ["unshare", "--mount"] if is_root else ["unshare", "--user", "--map-root-user", "--mount"]
    if processes.run([*command, "true"]).returncode != 0:
        pytest.skip("no mount namespaces here")
    command += [sys.executable, "-c", IN_A_NAMESPACE, str(tmp_path), "root" if is_root else "user"]
    result = processes.run(command)
    if result.returncode == 77:
        pytest.skip(f"cannot mount here: {result.stderr}")
    assert (result.returncode, result.stderr) == (0, "")


def test_threads_save_at_once(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(4)]

    def save(text: str) -> None:
        for _ in range(20):
            storage.write_text(tmp_path / "file", text)
            assert (tmp_path / "file").read_text() in texts

    failures: list[BaseException] = []

    def run(text: str) -> None:
        try:
            save(text)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names_in(tmp_path) == {"file"}


class ShortWriter(io.RawIOBase):
    """Writes less than it is given, as raw files may."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        part = memoryview(data).cast("B")[:1000]
        self.content += part
        return len(part)


def test_file_objects(tmp_path: Path) -> None:
    model = BigramLanguageModel(40)
    buffer, short = io.BytesIO(), ShortWriter()
    model.save(buffer)
    model.save(short)  # type: ignore[arg-type]
    assert not short.closed
    assert short.content == buffer.getvalue()
    with gzip.open(tmp_path / "gzip", "wb") as file:
        model.save(file)  # type: ignore[arg-type]
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive, archive.open("model", "w") as file:
        model.save(file)
    with gzip.open(tmp_path / "gzip", "rb") as packed, zipfile.ZipFile(tmp_path / "zip").open("model") as member:
        for source in (io.BytesIO(buffer.getvalue()), packed, member):
            weight = BigramLanguageModel.load(source).token_embedding_table.weight  # type: ignore[arg-type]
            assert torch.equal(weight, model.token_embedding_table.weight)


def test_the_options_of_the_loss_are_saved(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    model = BigramLanguageModel(
        3, sparse=True, ignore_index=-1, class_weight=weight, label_smoothing=0.25, dtype=torch.float64
    )
    model.save(tmp_path / "model")
    loaded = BigramLanguageModel.load(tmp_path / "model")
    assert (loaded.token_embedding_table.sparse, loaded.ignore_index, loaded.label_smoothing) == (True, -1, 0.25)
    assert loaded.class_weight is not None
    assert torch.equal(loaded.class_weight, weight)
    idx, targets = torch.tensor([0, 1, 2]), torch.tensor([1, -1, 0])
    assert torch.equal(loaded(idx, targets)[1], model(idx, targets)[1])
    plain = BigramLanguageModel(3)
    plain.save(tmp_path / "model")
    assert BigramLanguageModel.load(tmp_path / "model").class_weight is None


def test_history_in_a_file_object() -> None:
    buffer: Any = io.BytesIO()
    History(losses=[3.0, 2.0], steps=[0, 2]).save(buffer)
    buffer.seek(0)
    assert History.load(buffer).losses == [3.0, 2.0]


@pytest.mark.parametrize("binary", [False, True])
def test_tokenizer_in_a_file_object(binary: bool) -> None:
    tokenizer = CharTokenizer("aé\U0001f600")
    buffer: Any = io.BytesIO() if binary else io.StringIO()
    tokenizer.save(buffer)
    buffer.seek(0)
    assert CharTokenizer.load(buffer) == tokenizer


def test_errors_name_the_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^BytesIO: damaged, cut short, or no safetensors file"):
        BigramLanguageModel.load(io.BytesIO(b"x" * 20))
    with pytest.raises(ValueError, match=r"^StringIO: not a tokenizer: no valid JSON"):
        CharTokenizer.load(io.StringIO("[" * 100_000))
    (tmp_path / "file").write_bytes(b"\xff")
    with open(tmp_path / "file", "rb") as file, pytest.raises(ValueError, match=r"/file: damaged"):
        BigramLanguageModel.load(file)
    with pytest.raises(ValueError, match=r"/file: not a tokenizer: no valid JSON"):
        CharTokenizer.load(tmp_path / "file")


@pytest.mark.parametrize("dtype", storage.DTYPE_NAMES)
def test_files_are_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    memory = torch.arange(12).to(dtype)
    tensors = {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "scalar": memory[7],
        "transposed": memory.view(3, 4).t(),  # three in the same memory
        "part": memory[3:8],
        "empty": memory[:0],
    }
    storage.write_tensors(tmp_path / "file", "model", tensors, {"note": "é\U0001f600"})
    loaded, metadata = storage.read_tensors(tmp_path / "file", "model")
    assert metadata["note"] == "é\U0001f600"
    for found in (loaded, safetensors.torch.load_file(tmp_path / "file")):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_files_that_safetensors_wrote_are_read(tmp_path: Path) -> None:
    storage.write_tensors(tmp_path / "ours", "model", {"a": torch.ones(3)}, {})
    tensors, metadata = storage.read_tensors(tmp_path / "ours", "model")
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata)
    assert torch.equal(storage.read_tensors(tmp_path / "theirs", "model")[0]["a"], torch.ones(3))


def test_a_dtype_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^a: expected a dtype that can be saved, got torch\.complex128"):
        storage.write_tensors(tmp_path / "file", "model", {"a": torch.zeros(1, dtype=torch.complex128)}, {})
    assert names_in(tmp_path) == set()


def test_kinds_of_files_are_distinguished(tmp_path: Path) -> None:
    storage.write_tensors(tmp_path / "file", "model", {"a": torch.empty(0)}, {"note": "é"})
    with pytest.raises(ValueError, match="not a history that bigramx saved"):
        storage.read_tensors(tmp_path / "file", "history")
