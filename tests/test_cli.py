"""The command line, as its users run it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigramx import BigramLanguageModel, CharTokenizer, History, __version__
from bigramx.__main__ import main
from tests import processes

pytest.importorskip("typer")
cli = pytest.importorskip("bigramx.cli")
plots = pytest.importorskip("bigramx.plots")

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
COMMAND = [sys.executable, "-m", "bigramx"]


class Console(io.TextIOWrapper):
    """A standard output of some encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")

    def getvalue(self) -> str:
        self.flush()
        content = self.buffer.getvalue()  # type: ignore[attr-defined]
        assert isinstance(content, bytes)
        return content.decode(self.encoding)


def bigramx(*arguments: str, cwd: Path, code: int = 0, encoding: str = "utf-8") -> str:
    """Runs a command in this process, which is faster than in another; returns what it printed, stderr last."""
    output, errors = Console(encoding), io.StringIO()
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


def test_train_leaves_model_history_and_pictures(folder: Path) -> None:
    runs = folder / "runs"
    assert {path.name for path in runs.iterdir()} == {
        "model.safetensors",
        "history.safetensors",
        "loss.png",
        "table.png",
    }
    model = BigramLanguageModel.load(runs / "model.safetensors")
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode("fox")) == "fox"


def test_resume(folder: Path) -> None:
    bigramx("train", "text.txt", "--steps", "10", "--out", "again", cwd=folder)
    bigramx("train", "text.txt", "--steps", "25", "--out", "again", "--resume", cwd=folder)
    assert History.load(folder / "again" / "history.safetensors").step == 25
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
    for command in ("train", "generate", "evaluate", "plot", "info"):
        assert "Usage" in bigramx(command, "--help", cwd=Path.cwd())


def test_interrupted_training_saves_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = [*COMMAND, "train", "text.txt", "--steps", "100000000", "--eval-interval", "100000000"]
    with processes.start(command, cwd=tmp_path) as process:
        processes.read_until(process, "step")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("bigramx: interrupted after ")
    assert "Traceback" not in errors
    assert History.load(tmp_path / "runs" / "history.safetensors").interrupted
    BigramLanguageModel.load(tmp_path / "runs" / "model.safetensors")


def test_a_reader_that_goes_away(folder: Path) -> None:
    with processes.start([*COMMAND, "generate", "-n", "10000000"], cwd=folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(100)
        process.stdout.close()
        assert process.wait(timeout=60) in (0, 1)
        assert process.stderr.read() == ""


def test_a_reader_of_the_training_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = [*COMMAND, "train", "text.txt", "--steps", "100000", "--eval-interval", "500"]
    with processes.start(command, cwd=tmp_path) as process:
        processes.read_until(process, "vocabulary")
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) in (0, 1)
        assert process.stderr.read() == ""
    assert History.load(tmp_path / "runs" / "history.safetensors").step == 100_000
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
    assert len(list((tmp_path / runs).iterdir())) == 4
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


def test_pictures_that_cannot_be_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise KeyError("a font\nand more")

    monkeypatch.setattr(plots, "plot_table", fail)
    output = bigramx("train", "text.txt", "--steps", "20", "--out", "undrawn", cwd=folder, code=1)
    assert "A sample" in output
    assert "wrote undrawn/model.safetensors\nwrote undrawn/history.safetensors\n" in output
    assert output.splitlines()[-1].startswith("bigramx: no pictures: 'a font")
    assert History.load(folder / "undrawn" / "history.safetensors").step == 20
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
    assert History.load(tmp_path / "runs" / "history.safetensors").step == 40
    model = (tmp_path / "runs" / "model.safetensors").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(cli, "fit", failing_fit(0))
    bigramx(*command, cwd=tmp_path, code=1)
    assert (tmp_path / "runs" / "model.safetensors").read_bytes() == model
    monkeypatch.undo()
    bigramx(*command, "--resume", cwd=tmp_path)
    assert History.load(tmp_path / "runs" / "history.safetensors").step == 60


@pytest.mark.usefixtures("keyboard_interrupt")
def test_interrupts_do_not_stop_the_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    save = BigramLanguageModel.save

    def interrupted_save(model: BigramLanguageModel, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(model, path)

    monkeypatch.setattr(BigramLanguageModel, "save", interrupted_save)
    bigramx("train", "text.txt", "--steps", "20", cwd=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert History.load(tmp_path / "runs" / "history.safetensors").step == 20


@pytest.mark.parametrize("name", ["model.safetensors", "history.safetensors"])
def test_places_that_cannot_be_written_are_found_before_the_training(tmp_path: Path, name: str) -> None:
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
