"""The package as users get it: an sdist, the wheel built from that, an environment with no more than it requires.

`make distcheck` runs this.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import torch

from tests import processes
from tests.linked_torch import link_torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "distcheck"
PYTHON = FOLDER / "venv" / "bin" / "python"

CORE = """
import importlib, pkgutil, torch
import bigramx
for module in pkgutil.iter_modules(bigramx.__path__):
    if module.name not in {"cli", "console", "plots"}:
        importlib.import_module(f"bigramx.{module.name}")
text = bigramx.data.default_text()
tokenizer = bigramx.CharTokenizer.from_text(text)
tokens = tokenizer.encode(text)
model = bigramx.BigramLanguageModel(tokenizer.vocab_size)
model.tokenizer = tokenizer
history = bigramx.fit(model, *bigramx.data.split(tokens), max_steps=20)
model.save("model.safetensors")
history.save("history.safetensors")
tokenizer.save("tokenizer.json")
loaded = bigramx.BigramLanguageModel.load("model.safetensors")
assert torch.equal(loaded.token_embedding_table.weight, model.token_embedding_table.weight)
assert loaded.tokenizer == bigramx.CharTokenizer.load("tokenizer.json") == tokenizer
assert bigramx.History.load("history.safetensors").losses == history.losses
"""
PLOTS = """
import bigramx.plots
bigramx.plots.plot_losses(bigramx.History.load("history.safetensors"), "loss.png")
bigramx.plots.plot_table(bigramx.BigramLanguageModel.load("model.safetensors"), "table.png")
"""


def run(*command: str | Path, cwd: Path = FOLDER, strict: bool = False) -> str:
    """Runs a command away from this checkout; with ``strict``, warnings are errors. Returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if strict:
        environment["PYTHONWARNINGS"] = "error"
    result = processes.run(command, cwd=cwd, env=environment, seconds=1200)
    if result.returncode != 0:
        sys.exit(f"make distcheck: {' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def build(kind: str, source: Path, *options: str) -> Path:
    """An sdist or a wheel of the sources."""
    out = FOLDER / kind
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, *options, source)
    (archive,) = out.iterdir()
    return archive


def wheel_of(sdist: Path) -> Path:
    """The wheel that is built from an sdist, with what was compiled here from the same sources: once is enough."""
    with tarfile.open(sdist) as archive:
        archive.extractall(FOLDER / "sources", filter="data")
    (sources,) = (FOLDER / "sources").iterdir()
    for here in (ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")):
        path = sources / here.relative_to(ROOT)
        if not path.exists() or path.read_bytes() != here.read_bytes():
            sys.exit(f"make distcheck: {here} is missing in {sdist}, or another there")
    run(sys.executable, "setup.py", "--quiet", "build_py", cwd=sources)
    (library,) = sources.glob("build/lib*/bigramx")
    shutil.copy(ROOT / "bigramx" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", library)
    return build("wheel", sources, "-C--build-option=--skip-build")


def requirements_of(archive: Path) -> set[str]:
    """What the metadata of an sdist or a wheel require, without the extras."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as files:
            (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
            lines = files.read(name).decode().splitlines()
    else:
        with tarfile.open(archive) as files:
            member = files.extractfile(archive.name.removesuffix(".tar.gz") + "/PKG-INFO")
            assert member is not None
            lines = member.read().decode().splitlines()
    required = {line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")}
    return {requirement for requirement in required if "extra ==" not in requirement}


def check_torch(archive: Path, requirement: str) -> None:
    """The torch that an archive requires."""
    if requirement not in requirements_of(archive):
        sys.exit(f"make distcheck: {archive.name} requires {requirements_of(archive)}, not {requirement}")


def main(torch_requirement: str) -> None:
    """Builds, installs, and uses the package; ends with a message where something fails."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    sdist = build("sdist", ROOT)
    wheel = wheel_of(sdist)
    check_torch(sdist, "torch>=2.11")
    check_torch(wheel, f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*")

    def install(*requirements: str) -> None:
        run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *requirements)

    run(sys.executable, "-m", "venv", PYTHON.parents[1])
    link_torch(PYTHON.parents[1])
    install(torch_requirement, str(wheel))
    run(PYTHON, "-c", CORE, strict=True)
    print(run(PYTHON, ROOT / "tests" / "readme_examples.py", strict=True).splitlines()[-1])
    install(f"{wheel}[plot]")
    run(PYTHON, "-c", PLOTS, strict=True)
    install(f"{wheel}[cli]")
    run(PYTHON.with_name("bigramx"), "train", "--steps", "20", strict=True)
    run(PYTHON, "-m", "bigramx", "generate", strict=True)
    run(PYTHON, "-m", "pip", "check")
    shutil.rmtree(FOLDER)
    print(f"make distcheck: {wheel.name} works in an environment with nothing but what it requires")


if __name__ == "__main__":
    main(sys.argv[1])
