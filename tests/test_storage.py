"""A file is replaced whole or not at all, whatever the file system, the target and the moment."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import json
import os
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import safetensors.torch
import torch

from bigramx import BigramLanguageModel, CharTokenizer, History, data, memory, storage
from tests import processes

SAVE_FOREVER = """
import sys, threading, torch, bigramx
def save(value):
    model = bigramx.BigramLanguageModel(300)
    torch.nn.init.constant_(model.token_embedding_table.weight, value)
    model.save(sys.argv[1])
    print("saving", flush=True)
    while True:
        model.save(sys.argv[1])
for value in (1.0, 2.0, 3.0, 4.0):
    threading.Thread(target=save, args=[value]).start()
"""


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def fail_with(number: int) -> Callable[..., None]:
    """In place of a system call: it fails so."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def values_in(path: Path) -> list[float]:
    values: list[float] = BigramLanguageModel.load(path).token_embedding_table.weight.unique().tolist()
    return values


@pytest.mark.parametrize("through_a_link", [False, True])
def test_four_writers_that_are_killed_leave_a_whole_file_and_no_others(tmp_path: Path, through_a_link: bool) -> None:
    path = tmp_path / "model.safetensors"
    target = tmp_path / "link" if through_a_link else path
    if through_a_link:
        target.symlink_to(path)
    with processes.start([sys.executable, "-c", SAVE_FOREVER, target]) as process:
        processes.read_until(process, "saving")
        for _ in range(30):
            assert values_in(target) in ([1.0], [2.0], [3.0], [4.0])
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert values_in(path) in ([1.0], [2.0], [3.0], [4.0])
    BigramLanguageModel(2).save(target)
    assert names_in(tmp_path) == {path.name, target.name}


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """And no others: those of processes that live are locked."""
    tmp_path.joinpath(".bigramx-0123456789abcdef.tmp").write_text("left")
    others = {".0123456789abcdef.tmp", ".bigramx-", ".bigramx-0.txt", "bigramx-0.tmp"}
    for name in others:
        (tmp_path / name).write_text("")
    (tmp_path / ".bigramx-1.tmp").symlink_to("bigramx-0.tmp")
    (tmp_path / ".bigramx-2.tmp").mkdir()

    def write(file: IO[bytes]) -> None:
        file.write(b"first")
        storage.write_text(tmp_path / "second", "second")  # as another process would
        assert os.path.exists(file.name)

    storage.write_with(tmp_path / "first", write)
    assert (tmp_path / "first").read_text() == "first"
    assert (tmp_path / "second").read_text() == "second"
    assert names_in(tmp_path) == {"first", "second", ".bigramx-1.tmp", ".bigramx-2.tmp", *others}


def test_a_temporary_file_that_was_removed_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    calls: list[int] = []

    def late(file: Any, operation: int) -> None:
        if not calls:
            os.unlink(file.name)
        calls.append(operation)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    storage.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert names_in(tmp_path) == {"file"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / ".bigramx-0.tmp").write_text("perhaps in use")
    monkeypatch.setattr(fcntl, "flock", fail_with(number))
    storage.write_text(tmp_path / "file", "new")
    assert names_in(tmp_path) == {"file", ".bigramx-0.tmp"}


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


READERS: dict[str, Callable[[Path], object]] = {
    "model": BigramLanguageModel.load,
    "history": History.load,
    "tokenizer": CharTokenizer.load,
    "text": data.read_text,
    "tokens": data.read_bin,
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, name: str) -> None:
    """It may never end."""
    read, pipe = READERS[name], tmp_path / "a\x1b pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"expected a regular file, got a FIFO: '.*/a.x1b pipe'$"):
        read(pipe)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match=f"expected a regular file, got a device: '{device}'$"):
            read(Path(device))
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    with pytest.raises(OSError, match="no process reads from this FIFO"):
        BigramLanguageModel(2).save(pipe)


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no /dev/fd here")
def test_pipes_that_the_process_has_open_are_read() -> None:
    """Such as /dev/stdin."""
    tokenizer = CharTokenizer("ab")
    source, sink = os.pipe()
    os.write(sink, tokenizer.to_json().encode())
    os.close(sink)
    try:
        assert CharTokenizer.load(f"/dev/fd/{source}") == tokenizer
    finally:
        os.close(source)


@pytest.mark.parametrize("name", ["tokenizer", "text", "model"])
def test_files_larger_than_the_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda _device: 99)
    BigramLanguageModel(20).save(tmp_path / "file")
    with pytest.raises(MemoryError, match=r"/file: .* bytes"):
        READERS[name](tmp_path / "file")


def test_places_without_room_are_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for _ in range(2):
        storage.check_writable(path, 1)
        with pytest.raises(OSError, match=r"bytes to write, [\d,]+ bytes free: '.*file'") as raised:
            storage.check_writable(path, 2**80)
        assert raised.value.errno == errno.ENOSPC
        with monkeypatch.context() as patch:
            patch.setattr(resource, "getrlimit", lambda _which: (10, 10))
            with pytest.raises(OSError, match=r"11 bytes to write, limited to 10 bytes a file: '.*file'") as raised:
                storage.check_writable(path, 11)
            assert raised.value.errno == errno.EFBIG
        path.write_text("old")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"file"}
    for place, error in (("none/file", FileNotFoundError), ("", IsADirectoryError), ("file/file", NotADirectoryError)):
        with pytest.raises(error):
            storage.check_writable(tmp_path / place, 1)


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


def safetensors_file(header: object, content: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + content


def entry(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NO_SHAPES: list[Any] = [
    [-2], [-1, -2], [2.0], [True, 2], ["2"], None, 2, "2", [3], [2**63], [2**62, 2**62], [2**61 + 1, 8], [10**100],
    [0, 2], [2] * 65, [1] * 64 + [2],
]  # fmt: skip
NO_OFFSETS: list[Any] = [
    [0], [0, 8, 8], [8, 0], [0, 7], [-8, 0], [0.0, 8.0], [False, 8], None, {}, "08", [2**63, 2**63 + 8],
    [10**400, 10**400 + 8],
]  # fmt: skip
NO_ENTRIES: list[Any] = [None, 5, "F32", [], {}, {"dtype": "F32"}]
NO_DTYPES: list[Any] = ["F4", "", 5, None, [], {}]
DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\x08\0\0",
    "no header": safetensors_file(b""),
    "a length beyond the end": safetensors_file({}, length=100),
    "a length of 2**63": safetensors_file({}, length=2**63),
    "the largest length": safetensors_file({}, length=2**64 - 1),
    "no JSON": safetensors_file(b"{"),
    "no UTF-8": safetensors_file(b'{"\xff": 1}'),
    "UTF-16": safetensors_file("{}".encode("utf-16")),
    "NaN": safetensors_file(b'{"a": NaN}'),
    "deep lists": safetensors_file(b"[" * 100_000),
    "deep objects": safetensors_file(b'{"a":' * 100_000),
    "a huge number": safetensors_file(b'{"a": ' + b"9" * 100_000 + b"}"),
    "a list": safetensors_file([]),
    "a number": safetensors_file(5),
    "two keys": safetensors_file(b'{"a": 1, "a": 1}'),
    "two keys in an entry": safetensors_file(
        b'{"a": {"dtype": "F32", "dtype": "F64", "shape": [], "data_offsets": [0,4]}}'
    ),
    "metadata of numbers": safetensors_file({"__metadata__": {"format": 5}}),
    "a list of metadata": safetensors_file({"__metadata__": []}),
    "metadata of null": safetensors_file({"__metadata__": None}),
    **{f"an entry {value!r}": safetensors_file({"a": value}) for value in NO_ENTRIES},
    "too much in an entry": safetensors_file({"a": entry() | {"b": 1}}, bytes(8)),
    **{f"dtype {dtype!r}": safetensors_file({"a": entry(dtype=dtype)}, bytes(8)) for dtype in NO_DTYPES},
    **{f"shape {shape!r:.40}": safetensors_file({"a": entry(shape=shape)}, bytes(8)) for shape in NO_SHAPES},
    "an empty shape that overflows": safetensors_file({"a": entry(0, 0, [0, 2**62, 2**62])}),
    **{
        f"offsets {offsets!r:.40}": safetensors_file({"a": entry(shape=[2]) | {"data_offsets": offsets}}, bytes(8))
        for offsets in NO_OFFSETS
    },
    "a hole": safetensors_file({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "a hole at the beginning": safetensors_file({"a": entry(4, 12)}, bytes(12)),
    "an overlap": safetensors_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same twice": safetensors_file({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "too few bytes": safetensors_file({"a": entry(0, 8)}, bytes(7)),
    "too many bytes": safetensors_file({"a": entry(0, 8)}, bytes(9)),
    "2**60 bytes": safetensors_file({"a": entry(0, 2**60, [2**58])}, bytes(8)),
    "a name that acts on a terminal": safetensors_file({"\x1b[31m\ud800" + "n" * 10**5: 5}),
}


class Stream(io.RawIOBase):
    """A file object of unknown size, which reads less than it is asked for."""

    def __init__(self, content: bytes) -> None:
        self.rest = content

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        most = min(size, 5)
        chunk, self.rest = self.rest[:most], self.rest[most:]
        return chunk


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    sources: list[Any] = [tmp_path / "file", io.BytesIO(content), Stream(content)]
    for source in sources:
        for read in (BigramLanguageModel.load, History.load):
            with pytest.raises(
                ValueError, match=r"damaged, cut short, or no safetensors file|not a (model|history)"
            ) as raised:
                read(source)
            assert str(raised.value).isprintable()
            assert len(str(raised.value)) < 1000
            if isinstance(source, io.BytesIO):
                source.seek(0)


def sealed(header: dict[str, Any], content: bytes) -> bytes:
    """A file whose checksums are right, as those of a liar are."""
    metadata = {"format": "bigramx", "kind": "model"}
    for name, described in header.items():
        begin, end = described["data_offsets"]
        metadata[f"crc32.{name}"] = str(zlib.crc32(content[begin:end]))
    metadata["crc32"] = storage._header_checksum(metadata)
    return safetensors_file({"__metadata__": metadata, **header}, content)


def test_files_of_a_liar(tmp_path: Path) -> None:
    """Sizes, ends and values are checked even where all checksums match."""
    header = {"b": entry(8, 16), "a": entry(), "none": entry(8, 8, [0, 3]), "scalar": entry(16, 17, [], "BOOL")}
    content = struct.pack("<4f", 1, 2, 3, 4) + b"\1"
    whole = sealed(header, content)
    (tmp_path / "file").write_bytes(whole)
    for source in (tmp_path / "file", io.BytesIO(whole), Stream(whole)):
        tensors, _metadata = storage.read_tensors(source, "model")  # type: ignore[arg-type]
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
            "a": [1, 2],
            "b": [3, 4],
            "none": [],
            "scalar": True,
        }
    for size in range(len(whole)):
        (tmp_path / "file").write_bytes(whole[:size])
        for source in (tmp_path / "file", io.BytesIO(whole[:size])):
            with pytest.raises(ValueError, match="damaged, cut short"):
                storage.read_tensors(source, "model")
    for wrong in (
        whole + b"\0",
        sealed(header, content[:-1] + b"\2"),
        sealed({"a": entry(0, 2**60, [2**58])}, bytes(8)),
    ):
        (tmp_path / "file").write_bytes(wrong)
        for source in (tmp_path / "file", io.BytesIO(wrong), Stream(wrong)):
            with pytest.raises(ValueError, match="damaged"):
                storage.read_tensors(source, "model")  # type: ignore[arg-type]


class Odd(io.RawIOBase):
    """A file object whose reading gives what it should not."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def read(self, _size: int = -1, /) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("text", TypeError),
        (5, TypeError),
        (None, BlockingIOError),
        (bytes(100), ValueError),
        (OSError(5, "of its own"), OSError),
        (io.UnsupportedOperation("read"), io.UnsupportedOperation),
    ],
)
def test_odd_file_objects(answer: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        BigramLanguageModel.load(Odd(answer))  # type: ignore[arg-type]
    assert type(raised.value) is error
    with pytest.raises(TypeError, match="expected a binary file object, got one that reads str"):
        History.load(io.StringIO("12345678"))  # type: ignore[arg-type]


def test_a_file_that_is_rewritten_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short or replaced after its header was read: an error or the old content, and no signal."""
    path, chunk = tmp_path / "model", storage._chunk
    model = BigramLanguageModel(600)
    calls: list[int] = []

    def disturbed(file: IO[bytes], most: int) -> bytes:
        calls.append(most)
        if len(calls) == 3:
            disturb()
        return chunk(file, most)

    monkeypatch.setattr(storage, "_chunk", disturbed)
    for action in ("truncate", "replace", "remove"):
        calls.clear()
        model.save(path)
        disturb: Callable[[], object] = {
            "truncate": lambda: os.truncate(path, 1000),
            "replace": lambda: BigramLanguageModel(3).save(path),
            "remove": path.unlink,
        }[action]
        if action == "truncate":
            with pytest.raises(ValueError, match="damaged, cut short"):
                BigramLanguageModel.load(path)
        else:
            loaded = BigramLanguageModel.load(path)
            assert torch.equal(loaded.token_embedding_table.weight, model.token_embedding_table.weight)
        assert len(calls) > 3


def test_kinds_of_files_are_distinguished(tmp_path: Path) -> None:
    storage.write_tensors(tmp_path / "file", "model", {"a": torch.empty(0)}, {"note": "é"})
    with pytest.raises(ValueError, match="not a history that bigramx saved"):
        storage.read_tensors(tmp_path / "file", "history")
