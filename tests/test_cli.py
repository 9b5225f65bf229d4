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
import torch

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
    assert process.returncode == 130
    assert errors.startswith("bigramx: interrupted after ")
    assert errors.count("\n") == 1
    assert History.load(tmp_path / "runs" / "model.safetensors").interrupted
    BigramLanguageModel.load(tmp_path / "runs" / "model.safetensors")


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
    options = ["train", "text.txt", "--eval-interval", "1000000", "--sample", "0"]
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
        processes.read_until(process, "step")
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
