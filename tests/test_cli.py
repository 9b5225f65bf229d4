"""The command line, as its users run it."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bigramx import (
    BigramCounts,
    BigramLanguageModel,
    CharTokenizer,
    History,
    SmoothedBigramModel,
    __version__,
    data,
    evaluate,
    functional,
    optimal_loss,
)
from bigramx.__main__ import main
from bigramx.tokenizer import Tokenizer
from tests import processes

pytest.importorskip("typer")
cli = pytest.importorskip("bigramx.cli")
console = pytest.importorskip("bigramx.console")
plots = pytest.importorskip("bigramx.plots")

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
COMMAND = [sys.executable, "-m", "bigramx"]


class Console(io.TextIOWrapper):
    """A standard output of some encoding."""

    def __init__(self, encoding: str, is_terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def getvalue(self) -> str:
        self.flush()
        content = self.buffer.getvalue()  # type: ignore[attr-defined]
        assert isinstance(content, bytes)
        return content.decode(self.encoding)


def bigramx(*arguments: str, cwd: Path, code: int = 0, encoding: str = "utf-8", on_terminal: bool = False) -> str:
    """Runs a command in this process, which is faster than in another; returns what it printed, stderr last."""
    output, errors = Console(encoding, on_terminal), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", ["bigramx", *arguments])
        patch.chdir(cwd)
        with pytest.raises(SystemExit) as ended:
            main()
    message = f"{ended.value.code}\n" if isinstance(ended.value.code, str) else ""
    printed = output.getvalue() + errors.getvalue() + message
    assert (1 if message else ended.value.code or 0) == code, printed
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run on it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    output = bigramx("train", "text.txt", "--steps", "40", "--eval-interval", "20", "--seed", "1", cwd=folder)
    assert "step  0: train loss" in output
    assert "step 40: train loss" in output
    assert "; optimum 0." in output
    assert "A sample" in output
    return folder


def test_train_leaves_model_and_pictures(folder: Path) -> None:
    runs = folder / "runs"
    assert {path.name for path in runs.iterdir()} == {
        "model.safetensors",
        "loss.png",
        "table.png",
    }
    model = BigramLanguageModel.load(runs / "model.safetensors")
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode("fox")) == "fox"


def test_resume(folder: Path) -> None:
    bigramx("train", "text.txt", "--steps", "10", "--out", "again", cwd=folder)
    bigramx("train", "text.txt", "--steps", "25", "--out", "again", "--resume", cwd=folder)
    assert History.load(folder / "again" / "model.safetensors").step == 25
    (folder / "other.txt").write_text(TEXT.upper())
    output = bigramx("train", "other.txt", "--out", "again", "--resume", cwd=folder, code=1)
    assert "another vocabulary" in output


def test_generate(folder: Path) -> None:
    first = bigramx("generate", "-n", "600", "--seed", "3", "--prompt", "the ", cwd=folder)
    assert first.startswith("the ")
    assert len(first) == 4 + 600 + 1
    assert bigramx("generate", "-n", "600", "--seed", "3", "--prompt", "the ", cwd=folder) == first
    stopped = bigramx("generate", "-n", "9999", "--stop", ".", "--top-k", "5", "--sampler", "philox", cwd=folder)
    assert stopped.index(".") == len(stopped) - 2


def test_evaluate(folder: Path) -> None:
    output = bigramx("evaluate", "runs/model.safetensors", "text.txt", cwd=folder)
    assert f"{len(TEXT) - 1:,} pairs: loss " in output
    assert "the optimum on this text: 0." in output


def test_plot_and_info(folder: Path) -> None:
    (folder / "runs" / "table.png").unlink()
    assert "wrote runs/table.png" in bigramx("plot", cwd=folder)
    assert "cpu_capability" in bigramx("info", cwd=folder)


def test_folders_with_brackets(folder: Path) -> None:
    output = bigramx("train", "text.txt", "--steps", "2", "--out", "a[red]b[/c]", cwd=folder)
    assert "wrote a[red]b[/c]/model.safetensors" in output


def test_bin_tokens(folder: Path) -> None:
    (folder / "tokens.bin").write_bytes(struct.pack("<300H", *(k % 7 for k in range(300))))
    bigramx("train", "tokens.bin", "--steps", "5", "--out", "bin", cwd=folder)
    assert BigramLanguageModel.load(folder / "bin" / "model.safetensors").vocab_size == 7
    assert "299 pairs" in bigramx("evaluate", "bin/model.safetensors", "tokens.bin", cwd=folder)
    assert "saved without a tokenizer" in bigramx("generate", "bin/model.safetensors", cwd=folder, code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "none.txt"], 1, "bigramx: [Errno 2] No such file or directory: 'none.txt'"),
        (["train", "short.txt"], 1, "bigramx: the text is too short: 3 tokens"),
        (["train", "empty.txt"], 1, "bigramx: empty.txt: the text is empty"),
        (["train", "latin1.txt"], 1, "bigramx: latin1.txt: expected UTF-8 text, got byte 0xe9 at position 0"),
        (["train", "--steps", "x"], 2, "Invalid value"),
        (["generate", "text.txt"], 1, "bigramx: text.txt: damaged, cut short, or no safetensors file"),
        (["generate", "--prompt", "X"], 1, "bigramx: unknown character 'X' at position 0"),
        (["generate", "--stop", "ab"], 1, "bigramx: expected --stop to be one character, got 'ab'"),
        (["generate", "--top-p", "0"], 1, "bigramx: generate: expected 0 < top_p <= 1, got 0"),
        (["evaluate", "runs/model.safetensors", "empty.txt"], 1, "bigramx: the text is too short: 0 tokens"),
        (["generate", "--top-k", "1" + "0" * 23], 2, "Invalid value"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: list[str], code: int, message: str) -> None:
    (folder / "short.txt").write_text("abc")
    (folder / "empty.txt").write_text("")
    (folder / "latin1.txt").write_bytes(b"\xe9")
    output = bigramx(*arguments, cwd=folder, code=code)
    assert message in output
    if code == 1:
        assert output.count("\n") == 1


def test_as_a_module() -> None:
    assert "let it write" in processes.run([*COMMAND, "--help"], check=True).stdout
    result = processes.run([*COMMAND, "generate", "none"])
    assert (result.returncode, result.stderr) == (1, "bigramx: [Errno 2] No such file or directory: 'none'\n")


def test_version() -> None:
    assert bigramx("--version", cwd=Path.cwd()) == f"bigramx {__version__}\n"


def test_help() -> None:
    for command in ("count", "train", "generate", "evaluate", "plot", "info"):
        assert "Usage" in bigramx(command, "--help", cwd=Path.cwd())


def test_a_reader_that_goes_away(folder: Path) -> None:
    with processes.start([*COMMAND, "generate", "-n", "10000000"], cwd=folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(100)
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == ""


def test_a_reader_of_the_training_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = [*COMMAND, "train", "text.txt", "--steps", "100000", "--eval-interval", "500"]
    with processes.start(command, cwd=tmp_path) as process:
        processes.read_until(process, "vocabulary")
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == ""
    assert History.load(tmp_path / "runs" / "model.safetensors").step == 100_000
    assert (tmp_path / "runs" / "table.png").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("end", "code", "errors"),
    [(">&- 2>&-", 0, ""), (">/dev/full", 1, "bigramx: [Errno 28] No space left on device\n")],
)
def test_outputs_that_take_nothing(folder: Path, end: str, code: int, errors: str) -> None:
    command = ["sh", "-c", f'exec "$0" -m bigramx plot {end}', sys.executable]
    (folder / "runs" / "table.png").unlink()
    result = processes.run(command, cwd=folder)
    assert (result.returncode, result.stderr) == (code, errors)
    assert (folder / "runs" / "table.png").read_bytes().startswith(b"\x89PNG")


FOREIGN = "día 日本 \u200b\U0001f600 ☃\r\n" * 60


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_consoles_that_lack_characters(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "text.txt").write_text(FOREIGN, encoding="utf-8", newline="")

    def run(*arguments: str, code: int = 0) -> str:
        return bigramx(*arguments, cwd=tmp_path, encoding=encoding, code=code)

    def shown(text: str) -> str:
        return text.encode(encoding, "replace").decode(encoding)

    runs = "日 :cat: \udcff"  # no emoji, and a byte that is no UTF-8
    output = run("train", "text.txt", "--steps", "20", "--eval-interval", "10", "--out", runs)
    assert f"wrote {shown(runs)}/model.safetensors\n" in output
    assert f"wrote {shown(runs)}/table.png\n" in output
    assert len(list((tmp_path / runs).iterdir())) == 3
    model = BigramLanguageModel.load(tmp_path / runs / "model.safetensors")
    assert model.tokenizer == CharTokenizer.from_text(FOREIGN)
    output = run("generate", f"{runs}/model.safetensors", "-n", "100", "--seed", "3", "--prompt", "日本\r\n")
    assert output.startswith(shown("日本\r\n"))
    assert len(output) == 4 + 100 + 1
    assert "pairs: loss" in run("evaluate", f"{runs}/model.safetensors", "text.txt")
    assert f"wrote {shown(runs)}/loss.png\n" in run("plot", runs)
    assert "cpu_capability" in run("info")
    assert "Usage" in run("train", "--help")
    assert "unknown character 'X' at position 0" in run(
        "generate", f"{runs}/model.safetensors", "--prompt", "X", code=1
    )
    assert "No such file or directory" in run("generate", "日.safetensors", code=1)
    assert "Invalid value" in run("train", "--steps", "日", code=2)


def test_control_characters_are_escaped_on_terminals(tmp_path: Path) -> None:
    controls = "\x00\x07\x08\x0b\r\x1b\x7f\x80\x9b\x9f"
    (tmp_path / "text.txt").write_text(f"a\n\tb日{controls}[31m" * 40, encoding="utf-8", newline="")
    bigramx("train", "text.txt", "--steps", "3", "--out", "a\x1b[31m", cwd=tmp_path)
    command = ["generate", "a\x1b[31m/model.safetensors", "-n", "400", "--seed", "1", "--prompt", "\x1b[31m\n"]
    plain = bigramx(*command, cwd=tmp_path)
    assert plain.startswith("\x1b[31m\n")
    assert set(controls) <= set(plain)
    shown = bigramx(*command, cwd=tmp_path, on_terminal=True)
    assert shown == "".join(f"\\x{ord(c):02x}" if c in controls else c for c in plain).replace("\\x0d", "\\r")
    assert "wrote a\\x1b[31m/loss.png\n" in bigramx("plot", "a\x1b[31m", cwd=tmp_path, on_terminal=True)
    assert "wrote a\x1b[31m/loss.png\n" in bigramx("plot", "a\x1b[31m", cwd=tmp_path)


def test_control_characters_are_escaped_in_errors(tmp_path: Path) -> None:
    (tmp_path / "\x1b[31m\n\x9b").write_text("")
    shown = "bigramx: \\x1b[31m\\n\\x9b: "
    for command in (["train"], ["generate"], ["evaluate"]):
        assert bigramx(*command, "\x1b[31m\n\x9b", cwd=tmp_path, code=1).startswith(shown)
    model = BigramLanguageModel(2)
    model.save(tmp_path / "\x1b\n")
    message = "bigramx: \\x1b\\n: this model was saved without a tokenizer, and works on .bin tokens alone\n"
    assert bigramx("generate", "\x1b\n", cwd=tmp_path, code=1) == message
    model.tokenizer = CharTokenizer("ab")
    model.save(tmp_path / "model")
    message = "bigramx: unknown character '\\x1b' at position 0: expected one of the tokenizer's 2 characters\n"
    assert bigramx("generate", "model", "--prompt", "\x1b", cwd=tmp_path, code=1) == message


class Terminal:
    """A pseudoterminal that becomes the controlling one of a command."""

    def __init__(self) -> None:
        self.master, self._slave = pty.openpty()

    def command(self, command: Sequence[str | Path]) -> list[str | Path]:
        return ["sh", "-c", 'exec "$@" <"$0" >"$0"', os.ttyname(self._slave), *command]

    def read_until(self, process: subprocess.Popen[str], text: bytes | None) -> str:
        """What is shown, up to the text; without one, until the process has ended."""
        output = b""
        while text is None or text not in output:
            ready, _, _ = select.select([self.master], [], [], 0.1)
            if ready:
                output += os.read(self.master, 4096)
            elif process.poll() is not None:
                assert text is None, (output, process.communicate()[1])
                break
        return output.decode()

    def hang_up(self) -> None:
        for handle in (self.master, self._slave):
            with contextlib.suppress(OSError):
                os.close(handle)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.hang_up()


def test_a_terminal_that_hangs_up(tmp_path: Path, terminal: Terminal) -> None:
    """The run is saved, although nothing can be printed any more; NO_COLOR was honoured until then."""
    (tmp_path / "text.txt").write_text(TEXT)
    command = [*COMMAND, "train", "text.txt", "--steps", "1000000000", "--eval-interval", "100000"]
    env = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    with processes.start(terminal.command(command), cwd=tmp_path, env=env) as process:
        shown = terminal.read_until(process, b"step     100000")
        terminal.hang_up()
        _output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGHUP
    assert re.fullmatch(r"bigramx: interrupted after \d+ steps; saved in runs; go on with --resume\n", errors)
    assert History.load(tmp_path / "runs" / "model.safetensors").interrupted
    assert "\x1b[?25l" in shown  # there is a bar
    assert not re.search(r"\x1b\[[0-9;]*[349][0-9][0-9;]*m", shown)


IN_A_HARSH_PLACE = """
import os, sys
from pathlib import Path
from bigramx.__main__ import main

MAY_MOUNT = sys.argv[1] == "mount"
OUT = os.fsdecode(b"\\xe6\\x97\\xa5")  # as it comes from a command line

def mounted(*arguments):
    return MAY_MOUNT and os.spawnlp(os.P_WAIT, "mount", "mount", *arguments) == 0

def run(*arguments):
    sys.argv = ["bigramx", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("->", ended.code, file=sys.stderr)

run("train", "text.txt", "--steps", "20", "--eval-interval", "20", "--out", OUT)
run("generate", f"{OUT}/model.safetensors", "--seed", "1", "-n", "20")
run("count", "tokens.bin", "--out", f"{OUT}/counts.safetensors")
run("generate", OUT + "\\x1b")
os.mkdir("full")
os.mkdir("fixed")
if mounted("-t", "tmpfs", "-o", "size=8k", "tmpfs", "full") and mounted("--bind", "fixed", "fixed"):
    run("train", "text.txt", "--out", "full")
    run("count", "tokens.bin", "--out", "full/counts.safetensors")
    if mounted("-o", "remount,bind,ro", "fixed"):
        os.chdir("fixed")
        run("train", "../text.txt")
        run("count", "../tokens.bin")
        run("generate", f"../{OUT}/model.safetensors", "--seed", "1", "-n", "20")
"""


def test_harsh_places(tmp_path: Path, terminal: Terminal) -> None:
    """A dumb terminal, the C locale, no home, a full disk, a folder that cannot be written to."""
    (tmp_path / "text.txt").write_text(FOREIGN + "\x1b[31m", encoding="utf-8", newline="")
    write_bin(tmp_path / "tokens.bin", torch.arange(3000))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "HOME": "/none"}
    env |= {"TERM": "dumb", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_A_HARSH_PLACE]
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    may_mount = shutil.which("unshare") is not None and processes.run([*unshare, "true"]).returncode == 0
    command = [*unshare, *command, "mount"] if may_mount else [*command, "no mount"]
    with processes.start(terminal.command(command), cwd=tmp_path, env=env) as process:
        shown = terminal.read_until(process, None)
        errors = process.communicate()[1]
    first, _, rest = errors.partition("-> 0\n")
    assert first == ""
    assert shown.isascii()
    assert "\x1b" not in shown
    assert "step 20: train loss" in shown
    assert "wrote ???/table.png" in shown
    assert "wrote ???/counts.safetensors" in shown
    expected = ["-> 0", "-> 0", r"bigramx: \[Errno 2\] No such file or directory: '.*x1b'", "-> 1"]
    if may_mount and "Errno 28" in errors:
        expected += [
            r"bigramx: \[Errno 28\] [\d,]+ bytes to write, [\d,]+ bytes free: 'full/model.safetensors'",
            "-> 1",
            r"bigramx: \[Errno 28\] [^\n]*: 'full/counts.safetensors'",
            "-> 1",
        ]
    if may_mount and "Errno 30" in errors:
        expected += [r"bigramx: \[Errno 30\] Read-only file system: 'runs'", "-> 1"]
        expected += [r"bigramx: \[Errno 30\] Read-only file system: 'counts.safetensors'", "-> 1", "-> 0"]
    assert re.fullmatch("".join(f"{line}\n" for line in expected), rest), errors


def test_pictures_that_cannot_be_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise KeyError("a font\nand more")

    monkeypatch.setattr(plots, "plot_table", fail)
    output = bigramx("train", "text.txt", "--steps", "20", "--out", "undrawn", cwd=folder, code=1)
    assert "A sample" in output
    assert "wrote undrawn/model.safetensors\n" in output
    assert output.splitlines()[-1].startswith("bigramx: no pictures: 'a font")
    assert History.load(folder / "undrawn" / "model.safetensors").step == 20
    assert bigramx("plot", "undrawn", cwd=folder, code=1).startswith("bigramx: no pictures: 'a font")


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bigramx as package

    monkeypatch.delattr(package, "plots")
    monkeypatch.delitem(sys.modules, "bigramx.plots")
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    note = "no pictures: matplotlib is not installed; type: pip install matplotlib\n"
    output = bigramx("train", "text.txt", "--steps", "20", "--out", "plain", cwd=folder)
    assert note in output
    assert "A sample" in output
    assert "wrote plain/model.safetensors" in output
    assert bigramx("plot", "plain", cwd=folder, code=1) == note


def test_a_table_that_cannot_fit_is_refused_before_it_is_made(folder: Path) -> None:
    (folder / "large.bin").write_bytes(struct.pack("<40H", *range(40)))
    message = bigramx("train", "large.bin", "--vocab-size", str(2**24), cwd=folder, code=1)
    assert "bigramx: training a table with V = 16,777,216 takes" in message
    assert "would fit" in message


def failing_fit(fails_at: int) -> Callable[..., History]:
    """As fit, but for an error after this many steps."""

    def fit(*arguments: Any, on_progress: Callable[[History], None], **options: Any) -> History:
        if fails_at == 0:
            raise RuntimeError("no memory")

        def progress(history: History) -> None:
            on_progress(history)
            if history.step >= fails_at:
                raise RuntimeError("no memory")

        return real_fit(*arguments, on_progress=progress, **options)

    real_fit: Callable[..., History] = cli.fit
    return fit


def test_an_error_in_the_training_leaves_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["train", "text.txt", "--steps", "60", "--eval-interval", "20"]
    monkeypatch.setattr(cli, "fit", failing_fit(40))
    assert bigramx(*command, cwd=tmp_path, code=1).endswith("bigramx: no memory\n")
    assert History.load(tmp_path / "runs" / "model.safetensors").step == 40
    model = (tmp_path / "runs" / "model.safetensors").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(cli, "fit", failing_fit(0))
    bigramx(*command, cwd=tmp_path, code=1)
    assert (tmp_path / "runs" / "model.safetensors").read_bytes() == model
    monkeypatch.undo()
    bigramx(*command, "--resume", cwd=tmp_path)
    assert History.load(tmp_path / "runs" / "model.safetensors").step == 60


def signalled_fit(number: int, at_step: int) -> Callable[..., History]:
    """As fit, but for a signal to the process after this many steps, and another one right behind it."""
    real_fit: Callable[..., History] = cli.fit

    def fit(*arguments: Any, on_progress: Callable[[History], None], **options: Any) -> History:
        def progress(history: History) -> None:
            if history.step >= at_step:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            on_progress(history)

        return real_fit(*arguments, on_progress=progress, **options)

    return fit


def assert_same_run(one: Path, other: Path) -> None:
    histories = [History.load(path) for path in (one, other)]
    weights = [BigramLanguageModel.load(path).token_embedding_table.weight for path in (one, other)]
    assert histories[0].losses == histories[1].losses
    assert torch.equal(*weights)


@pytest.mark.usefixtures("keyboard_interrupt")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_that_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["train", "text.txt", "--steps", "90", "--eval-interval", "30"]
    bigramx(*command, "--out", "whole", cwd=tmp_path)
    handler = signal.signal(number, signal.default_int_handler)
    try:
        monkeypatch.setattr(cli, "fit", signalled_fit(number, 60))
        output = bigramx(*command, cwd=tmp_path, code=128 + number)
        assert output.endswith("bigramx: interrupted after 60 steps; saved in runs; go on with --resume\n")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, handler)
    monkeypatch.undo()
    assert History.load(tmp_path / "runs" / "model.safetensors").interrupted
    bigramx(*command, "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "runs" / "model.safetensors", tmp_path / "whole" / "model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_are_ignored_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Those of a shell's background job, and of nohup."""
    (tmp_path / "text.txt").write_text(TEXT)
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "fit", signalled_fit(number, 20))
        bigramx("train", "text.txt", "--steps", "60", "--eval-interval", "20", cwd=tmp_path)
    finally:
        signal.signal(number, handler)
    assert History.load(tmp_path / "runs" / "model.safetensors").step == 60


def test_a_kill_costs_no_more_than_the_interval(tmp_path: Path) -> None:
    """By SIGKILL in the middle of a run, which goes on to the same bits; by SIGTERM where SIGINT is ignored."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["train", "text.txt", "--batch-size", "2048", "--block-size", "32", "--eval-interval", "1000000"]
    path = tmp_path / "runs" / "model.safetensors"
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *COMMAND, *options, "--steps", "1000000000"]
    with processes.start([*command, "--checkpoint-interval", "0.1"], cwd=tmp_path) as process:
        while not path.exists():
            time.sleep(0.01)
        saved = [History.load(path).step]
        while len(saved) < 3:
            step = History.load(path).step
            saved += [step] * (step > saved[-1])
        process.send_signal(signal.SIGKILL)
    step = History.load(path).step
    with processes.start([*command, "--resume"], cwd=tmp_path) as process:
        processes.read_until(process, "vocabulary")  # from here on signals are remembered
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("\n")) == (128 + signal.SIGTERM, 1)
    whole = str(History.load(path).step + 100)
    assert int(whole) > step + 100
    bigramx(*options, "--steps", whole, "--resume", cwd=tmp_path)
    bigramx(*options, "--steps", whole, "--out", "whole", cwd=tmp_path)
    assert_same_run(path, tmp_path / "whole" / "model.safetensors")
    assert {entry.name for entry in path.parent.iterdir()} == {"model.safetensors", "loss.png", "table.png"}


def test_a_checkpoint_that_fails_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    save, calls = BigramLanguageModel.save, [0]

    def failing_save(model: BigramLanguageModel, path: Path, **options: Any) -> None:
        calls[0] += 1
        if calls[0] in failures:
            raise OSError(28, "No space left on device", str(path))
        save(model, path, **options)

    monkeypatch.setattr(BigramLanguageModel, "save", failing_save)
    command = ["train", "text.txt", "--steps", "60", "--eval-interval", "20", "--checkpoint-interval", "0"]
    failures = {2, 3}
    output = bigramx(*command, cwd=tmp_path)
    assert "step 40: not saved: [Errno 28] No space left on device: 'runs/model.safetensors'\n" in output
    assert History.load(tmp_path / "runs" / "model.safetensors").step == 60
    failures, calls[0] = {2, 3, 4}, 0
    output = bigramx(*command, cwd=tmp_path, code=1)
    assert output.endswith("bigramx: [Errno 28] No space left on device: 'runs/model.safetensors'\n")
    assert History.load(tmp_path / "runs" / "model.safetensors").step == 20


def test_runs_of_earlier_versions_in_two_files(folder: Path) -> None:
    old = folder / "old"
    old.mkdir()
    whole = folder / "runs" / "model.safetensors"
    model, history = BigramLanguageModel.load(whole), History.load(whole)
    model.save(old / "model.safetensors")
    assert "without a history" in bigramx("train", "text.txt", "--out", "old", "--resume", cwd=folder, code=1)
    history.save(old / "history.safetensors")
    assert "wrote old/loss.png" in bigramx("plot", "old", cwd=folder)
    history.table_checksum = 5
    history.save(old / "other.safetensors")
    history_file = (old / "history.safetensors").read_bytes()
    (old / "other.safetensors").rename(old / "history.safetensors")
    for command in (["plot", "old"], ["train", "text.txt", "--out", "old", "--resume"]):
        assert "the history is not of this model" in bigramx(*command, cwd=folder, code=1)
    (old / "history.safetensors").write_bytes(history_file)
    bigramx("train", "text.txt", "--steps", "50", "--seed", "1", "--out", "old", "--resume", cwd=folder)
    bigramx("train", "text.txt", "--steps", "50", "--seed", "1", "--out", "whole", cwd=folder)
    assert_same_run(old / "model.safetensors", folder / "whole" / "model.safetensors")


@pytest.mark.usefixtures("keyboard_interrupt")
def test_interrupts_do_not_stop_the_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    save = BigramLanguageModel.save

    def interrupted_save(model: BigramLanguageModel, path: Path, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(model, path, **options)

    monkeypatch.setattr(BigramLanguageModel, "save", interrupted_save)
    output = bigramx("train", "text.txt", "--steps", "20", cwd=tmp_path, code=130)
    assert output.endswith("bigramx: interrupted after 20 steps; saved in runs; go on with --resume\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert History.load(tmp_path / "runs" / "model.safetensors").step == 20


def test_places_that_cannot_be_written_are_found_before_the_training(tmp_path: Path) -> None:
    name = "model.safetensors"
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "runs" / name).mkdir(parents=True)
    output = bigramx("train", "text.txt", cwd=tmp_path, code=1)
    assert output.endswith(f"bigramx: [Errno 21] Is a directory: 'runs/{name}'\n")
    assert "step" not in output


def test_without_typer(tmp_path: Path) -> None:
    script = "import sys; sys.modules['typer'] = None; from bigramx.__main__ import main; main()"
    result = processes.run([sys.executable, "-c", script])
    assert result.returncode == 1
    assert result.stderr == "bigramx: the command line needs typer; type: pip install typer rich matplotlib\n"


# ------------------------------------------------------------------------------- real vocabularies, shards, smoothing


def write_bin(path: Path, tokens: torch.Tensor) -> None:
    path.write_bytes(tokens.to(torch.uint16).numpy().tobytes())


def chain(vocab_size: int, num_tokens: int) -> torch.Tensor:
    """Tokens of which each has few that follow it."""
    steps = torch.randint(1, 5, (num_tokens,)) ** 2
    return steps.cumsum(0) % vocab_size


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards to train on and one to validate on, of 300 tokens of which 0 ends documents."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shards")
    for name in ("train_0", "train_1", "val_0"):
        write_bin(folder / f"{name}.bin", chain(300, 4000))
    return folder


def test_count_train_evaluate_and_generate_from_shards(shards: Path, tmp_path: Path) -> None:
    output = bigramx("count", f"{shards}/train_*.bin", "-o", "counts.safetensors", cwd=tmp_path)
    counts, expected = BigramCounts.load(tmp_path / "counts.safetensors"), BigramCounts(300)
    expected.update(data.read_tokens(f"{shards}/train_*.bin"))
    assert counts == expected
    assert output.startswith(f"7,998 pairs, {expected.num_distinct:,} of them distinct, of a vocabulary of 300\n")
    assert output.endswith("wrote counts.safetensors\n")
    output = bigramx("train", "--from-counts", "counts.safetensors", "--held-out", f"{shards}/val_0.bin", cwd=tmp_path)
    assert "kneser-ney on held-out tokens\n3,999 pairs: loss " in output
    model = SmoothedBigramModel.load(tmp_path / "runs" / "model.safetensors")
    assert model.method == "kneser-ney"
    assert torch.equal(model.pair_probs, SmoothedBigramModel.from_counts(expected).pair_probs)
    result = evaluate(model, data.read_bin(shards / "val_0.bin"))
    line = f"3,999 pairs: loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.3f}\n"
    assert line in output
    output = bigramx("evaluate", "runs/model.safetensors", f"{shards}/val*", cwd=tmp_path)
    assert output.startswith(f"{line}{result.num_unseen_pairs:,} of the pairs, ")
    assert f"the optimum on this text: {optimal_loss(data.read_bin(shards / 'val_0.bin')):.4f}\n" in output
    command = ["generate", "-n", "40", "--seed", "3", "--tokens-only"]
    written = bigramx(*command, "--prompt", "7 9", "--stop", "5", "--stop", "6", cwd=tmp_path)
    numbers = [int(word) for word in written.split()]
    assert numbers[:2] == [7, 9]
    assert not {5, 6} & set(numbers[2:-1])
    assert bigramx(*command, "--prompt", "7 9", "--stop", "5", "--stop", "6", cwd=tmp_path) == written
    message = "bigramx: expected numbers of tokens, got 'a b'\n"
    assert bigramx(*command, "--prompt", "a b", cwd=tmp_path, code=1) == message


def test_methods_of_smoothing(shards: Path, tmp_path: Path) -> None:
    losses = []
    for method in ("kneser-ney", "witten-bell", "absolute-discounting", "jelinek-mercer", "add-k"):
        output = bigramx("train", str(shards), "--smoothing", method, "--sample", "0", cwd=tmp_path)
        assert output.startswith("12,000 tokens, a vocabulary of 300; the first 8,000 to train on\n")  # val_0 is not
        assert SmoothedBigramModel.load(tmp_path / "runs" / "model.safetensors").method == method
        losses.append(re.search(r"3,999 pairs: loss ([\d.]+) nats", output)[1])  # type: ignore[index]
    assert len(set(losses)) == 5


def test_ends_of_documents(shards: Path, tmp_path: Path) -> None:
    tokens = data.read_bin(shards / "val_0.bin")
    bigramx("count", f"{shards}/val_0.bin", "--eot", "0", "--vocab-size", "300", cwd=tmp_path)
    counts = BigramCounts(300, eot=0)
    counts.update(tokens)
    assert BigramCounts.load(tmp_path / "counts.safetensors") == counts
    bigramx("train", "--from-counts", "counts.safetensors", cwd=tmp_path)
    model = SmoothedBigramModel.load(tmp_path / "runs" / "model.safetensors")
    result = evaluate(model, tokens, eot=0, per_document=True)
    output = bigramx(
        "evaluate", "runs/model.safetensors", f"{shards}/val_0.bin", "--eot", "0", "--per-document", cwd=tmp_path
    )
    assert output.startswith(f"{counts.num_pairs:,} pairs: loss {result.loss:.4f} nats")
    assert result.documents is not None
    assert output.endswith(f"document {len(result.documents)}: loss {result.documents[-1]:.4f}\n")
    assert f"the optimum on this text: {optimal_loss(counts):.4f}\n" in output


def test_a_folder_of_nanogpt(tmp_path: Path) -> None:
    """With its vocabulary, which is a pickle; val.bin is for validation."""
    characters = "\n abcdefghij"
    tokens = {"train": torch.randint(len(characters), (500,)), "val": torch.randint(len(characters), (70,))}
    for name, values in tokens.items():
        write_bin(tmp_path / f"{name}.bin", values)
    stoi = {character: token for token, character in enumerate(characters)}
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    output = bigramx("train", ".", "--steps", "4", "--eval-interval", "4", cwd=tmp_path)
    assert output.startswith("570 tokens, a vocabulary of 12; the first 500 to train on\n")
    model = BigramLanguageModel.load(tmp_path / "runs" / "model.safetensors")
    assert model.tokenizer == CharTokenizer(characters)
    assert f"val loss {model.evaluate(tokens['val']):.4f}" in output
    assert "70 tokens" not in bigramx("generate", "-n", "5", cwd=tmp_path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts, of characters of several bytes, and a model of a BPE that was trained on them."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts" / "more").mkdir(parents=True)
    for n, name in enumerate(("a.txt", "b.md", "more/validation.txt")):
        (folder / "texts" / name).write_text(f"{n} día 日本 \U0001f600 " + TEXT[n:] + FOREIGN, encoding="utf-8")
    command = ["train", "texts", "--bpe", "300", "--smoothing", "kneser-ney"]
    output = bigramx(*command, "--held-out", "texts/a.txt", cwd=folder)
    assert "tokens, a vocabulary of 300; the first " in output
    assert "bits a byte" in output
    assert "A sample" in output
    return folder


def test_bits_per_byte_of_a_bpe(corpus: Path) -> None:
    model = SmoothedBigramModel.load(corpus / "runs" / "model.safetensors")
    assert model.tokenizer is not None
    texts = [(corpus / "texts" / name).read_bytes().decode() for name in ("a.txt", "b.md")]
    nats = num_pairs = 0.0
    for text in texts:
        tokens = model.tokenizer.encode(text)
        nats -= model.log_probs(tokens[:-1], tokens[1:]).double().sum().item()
        num_pairs += len(tokens) - 1
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    output = bigramx("evaluate", "runs/model.safetensors", "texts/a.txt", "texts/*.md", "--per-document", cwd=corpus)
    assert f"loss {nats / num_pairs:.4f} nats a token" in output
    assert f", {bits:.4f} bits a byte\n" in output
    assert re.search(r"\ntexts/a.txt: loss [\d.]+\ntexts/b.md: loss [\d.]+\n$", output)


def test_generate_with_a_bpe(corpus: Path) -> None:
    """Characters of several tokens are printed whole."""
    command = ["generate", "-n", "600", "--seed", "1", "--top-k", "3", "--prompt", "día "]
    output = bigramx(*command, cwd=corpus)
    assert output.startswith("día ")
    assert "\ufffd" not in output[:-2]
    assert "日本" in output
    assert len(bigramx(*command, "--stop", "z", "--stop", "q", cwd=corpus)) <= len(output)
    message = "bigramx: expected --stop to be one token, got 'zqzqzq'\n"
    assert bigramx(*command, "--stop", "zqzqzq", cwd=corpus, code=1) == message
    (corpus / "prompts.txt").write_text("the quick\n\nlazy 日本\n", encoding="utf-8")
    lines = bigramx(
        "generate", "--prompt-file", "prompts.txt", "-n", "20", "--stop", "\n", "--stop", ".", cwd=corpus
    ).split("\n")
    assert lines[0].startswith("the quick")
    assert any(line.startswith("lazy 日本") for line in lines[2:])


def test_steps_with_a_bpe_and_their_resumption(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_losses", "plot_table"):  # which take long
        monkeypatch.setattr(plots, name, lambda _what, _path: None)
    command = ["train", "texts", "--bpe", "280", "--eval-interval", "10"]
    output = bigramx(*command, "--steps", "10", "--out", "part", cwd=corpus)
    num_tokens, num_train = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{4,}", output)[:2])
    assert num_train == int(0.9 * num_tokens)  # for all that a file is called validation.txt
    bigramx(*command, "--steps", "20", "--out", "part", "--resume", cwd=corpus)
    model = BigramLanguageModel.load(corpus / "part" / "model.safetensors")
    assert isinstance(model.tokenizer, Tokenizer)
    (corpus / "tokenizer.json").write_text(model.tokenizer.to_json())
    command = ["train", "texts", "--tokenizer", "tokenizer.json", "--eval-interval", "10"]
    bigramx(*command, "--steps", "20", "--out", "whole", cwd=corpus)
    assert_same_run(corpus / "whole" / "model.safetensors", corpus / "part" / "model.safetensors")
    for other in (["--bpe", "270"], []):
        output = bigramx("train", "texts", *other, "--out", "part", "--resume", cwd=corpus, code=1)
        assert output.endswith("this model was trained on another vocabulary than the text has\n")
    output = bigramx("count", "texts", "--tokenizer", "tokenizer.json", cwd=corpus)
    assert "of a vocabulary of 280\n" in output
    output = bigramx("train", "texts", "--bpe", "300", "--out", "runs", "--resume", cwd=corpus, code=1)
    assert output == "bigramx: runs/model.safetensors: a smoothed model has neither steps nor a table\n"


def test_characters_that_the_model_lacks(folder: Path) -> None:
    (folder / "new.txt").write_text("the fox XX jumps 日.\n" * 2)
    output = bigramx("evaluate", "runs/model.safetensors", "new.txt", cwd=folder)
    assert "6 of 40 tokens are out of the model's vocabulary of 29, the first 29 at position 8 of new.txt: " in output
    assert "characters that the model does not know: 'X' (4), '日' (2)\n" in output
    assert "bits a byte" not in output


def test_a_loss_that_is_infinite_says_why(tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin", torch.tensor([0, 1, 2, 0, 1]))
    model = BigramLanguageModel.from_counts(functional.count_bigrams(torch.tensor([0, 1, 2, 0, 1]), 3), smoothing=0)
    model.save(tmp_path / "model")
    write_bin(tmp_path / "val.bin", torch.tensor([0, 1, 0]))
    output = bigramx("evaluate", "model", "val.bin", cwd=tmp_path)
    assert output.startswith("2 pairs: loss inf nats a token, perplexity inf\n")
    assert "1 of 2 pairs have probability 0, the first 0 after 1 at position 2 of val.bin: the loss is inf" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["count", "none*.bin"], "bigramx: [Errno 2] no file is there: 'none*.bin'"),
        (["count", "text.txt"], "bigramx: text.txt: expected a tokenizer for a text, or a .bin or .npy file"),
        (["count", "odd.bin"], "bigramx: odd.bin: expected a file of uint16 tokens, got 3 bytes"),
        (["count", "tokens.bin", "--dtype", "uint32", "--vocab-size", "5"], "bigramx: tokens.bin"),
        (["count", "tokens.bin", "--eot", "x"], "bigramx: expected --eot to be the number of a token, got 'x'"),
        (["train", "--from-counts", "text.txt"], "bigramx: text.txt: damaged, cut short, or no safetensors file"),
        (["train", "--from-counts", "x", "text.txt"], "bigramx: --from-counts takes the place of a text"),
        (["train", "--smoothing", "add-k", "--resume"], "bigramx: --resume is for training by steps"),
        (["train", "--held-out", "text.txt"], "bigramx: --held-out is for --smoothing and --from-counts"),
        (["train", "tokens.bin", "--bpe", "300"], "bigramx: --bpe is for texts: these are tokens already"),
        (["train", "--bpe", "300", "--tokenizer", "x"], "bigramx: expected --tokenizer or --bpe, got both"),
        (["train", "--tokenizer", "text.txt"], "bigramx: "),
        (["train", "text.txt", "--vocab-size", "9"], "bigramx: --vocab-size is for .bin tokens"),
        (["generate", "--prompt", "a", "--prompt-file", "x"], "bigramx: expected --prompt or --prompt-file, got both"),
    ],
)
def test_errors_of_the_new_options_are_one_line(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "tokens.bin").write_bytes(struct.pack("<6H", *range(6)))
    (folder / "odd.bin").write_bytes(b"123")
    output = bigramx(*arguments, cwd=folder, code=1)
    assert output.startswith(message)
    assert output.count("\n") == 1


def test_a_folder_with_more_than_text(folder: Path) -> None:
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").write_text(TEXT)
    (folder / "mixed" / "b.png").write_bytes(b"\x89PNG")
    output = bigramx("evaluate", "runs/model.safetensors", "mixed", cwd=folder)
    assert output.startswith("mixed: 1 files that are no UTF-8 text are left out, the first mixed/b.png\n1,799 pairs: ")


def test_a_table_that_cannot_fit_names_what_does(folder: Path) -> None:
    write_bin(folder / "wide.bin", torch.tensor([0, 65_535] * 20))
    message = bigramx("train", "wide.bin", "--vocab-size", str(2**24), cwd=folder, code=1)
    assert message.endswith("--smoothing kneser-ney takes memory for the pairs that occur alone\n")
    bigramx("train", "wide.bin", "--vocab-size", str(2**17), "--smoothing", "kneser-ney", cwd=folder)


def test_bars_show_rate_and_remaining_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console._console, "is_interactive", True)
    monkeypatch.setattr(console, "_SHOWN_EVERY", 0)
    output = bigramx("train", "text.txt", "--steps", "90", "--out", "bar", cwd=folder, on_terminal=True)
    assert re.search(r"90/90 steps\S* \S*[\d.]+[kMG]? tokens/s\S* \S*0:00:00", output)
    output = bigramx("evaluate", "bar/model.safetensors", "text.txt", cwd=folder, on_terminal=True)
    assert re.search(r"1,800/1,800 tokens\S* \S*[\d.]+[kMG]? tokens/s", output)
    write_bin(folder / "bar.bin", torch.arange(5000))
    output = bigramx("count", "bar.bin", cwd=folder, on_terminal=True)
    assert re.search(r"counting.*10,000/10,000 bytes", output)


def signalled_count(number: int) -> Callable[..., Any]:
    """As count_shards, but for two signals to the process while it counts."""
    real_count: Callable[..., Any] = cli.count_shards

    def count_shards(*arguments: Any, progress: Callable[[Any], None], **options: Any) -> Any:
        def signalling(state: Any) -> None:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            progress(state)

        return real_count(*arguments, progress=signalling, **options)

    return count_shards


@pytest.mark.usefixtures("keyboard_interrupt")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_count_in_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The old file stays, and the same command goes on."""
    bigramx("count", f"{shards}/val_0.bin", cwd=tmp_path)
    old = (tmp_path / "counts.safetensors").read_bytes()
    handler = signal.signal(number, signal.default_int_handler)
    try:
        monkeypatch.setattr(cli, "count_shards", signalled_count(number))
        output = bigramx("count", f"{shards}/train_*.bin", cwd=tmp_path, code=128 + number)
        assert output == "bigramx: interrupted: the same command goes on from what is counted so far\n"
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, handler)
    monkeypatch.undo()
    assert (tmp_path / "counts.safetensors").read_bytes() == old
    bigramx("count", f"{shards}/train_*.bin", cwd=tmp_path)
    expected = BigramCounts(300)
    expected.update(data.read_tokens(f"{shards}/train_*.bin"))
    assert BigramCounts.load(tmp_path / "counts.safetensors") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["counts.safetensors"]


def test_texts_from_a_pipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, TEXT.encode())
    os.close(writing)
    bigramx("train", f"/dev/fd/{reading}", "--steps", "2", "--sample", "0", cwd=tmp_path)
    os.close(reading)
    model = BigramLanguageModel.load(tmp_path / "runs" / "model.safetensors")
    assert model.tokenizer == CharTokenizer.from_text(TEXT)
