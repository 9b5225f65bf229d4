"""Reads files that were damaged at random, along their structure and guided by the coverage of the readers.

python -m tests.trust.fuzz_files [SECONDS] [--seed N]    # by atheris, which it installs into build/fuzz

A reader may return what the file says, or raise one of the errors that it documents, with the file's name. Anything
else is a finding, as are a gigabyte of memory and 20 seconds for one file; its file is kept in build/fuzz.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import importlib
import importlib.util
import io
import json
import os
import pickle
import pickletools
import re
import resource
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy
import torch

from bigramx import BigramLanguageModel, CharTokenizer, History, SmoothedBigramModel, data, storage, token_files
from tests import processes, tree
from tests.trust import report

FOLDER = tree.ROOT / "build" / "fuzz"
PACKAGE = str(tree.ROOT / "bigramx")
ATHERIS = "atheris>=3"
SECONDS_A_FILE = 20
BYTES_A_FILE = 2**30
MAX_BYTES = 2**17  # of a file


@dataclass(frozen=True)
class Reader:
    """What reads one kind of file.

    Attributes:
        load: A path -> what bigramx reads from it.
        content: What was loaded -> its content, which can be compared.
        says: The bytes of a file -> its content, found out in another way.
        mutate: Damages a file along its structure.
        seeds: Sound files.
    """

    load: Callable[[Path], Any]
    content: Callable[[Any], object]
    says: Callable[[bytes], object]
    mutate: Callable[[bytes, Random], bytes]
    seeds: Callable[[], list[bytes]]


def finding(reader: Reader, content: bytes, path: Path) -> str | None:
    """What is wrong with how a file is read, in a line; None: nothing."""
    path.unlink(missing_ok=True)  # a file system may write at once what replaces the content of a file
    path.write_bytes(content)
    try:
        loaded = reader.load(path)
    except (ValueError, OSError) as error:
        return None if str(path) in str(error) else f"an error that does not name the file: {_in_a_line(error)}"
    except Exception as error:  # a MemoryError as well, which is for files that are large
        return f"raises {_in_a_line(error)}"
    try:
        same = reader.content(loaded) == reader.says(content)
    except Exception as error:
        return f"what was loaded cannot be used, or not be told from the file: {_in_a_line(error)}"
    return None if same else "what was loaded is not what the file says"


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]!r}"


# Mutations -----------------------------------------------------------------------------------------------------------

_NUMBERS = [0, 1, -1, 2, 7, 127, 255, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30, -(2**63) - 1]
_NESTED = ["[" * 50_000, '{"a":' * 10_000]
_TEXTS = ["", "a", "\0", "\ud800", "é", "\x1b[2J", "1e999", "NaN", "null", "{}", "true", "9" * 5000, *_NESTED]
_TEXTS += ["F64", "F32", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "losses", "model", "history"]
_EMPTY: list[Any] = [None, "", [], {}]
_VALUES: list[Any] = [*_EMPTY, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), [[]], [0, 0], [0, 2**63]]
_VALUES += [{kind: inner} for kind in ("tensor", "tuple", "dict", "numpy", "sparse_coo") for inner in _EMPTY]
_VALUES += [{"dict": [[[], 1]]}, {"numpy": ["object", 1]}, {"numpy": ["<M8[s]", 1]}, {"tensor": "losses"}]
_VALUES += [*_NUMBERS, *_TEXTS]


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """Changes, drops, repeats or adds some bytes anywhere."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        begin = random.randrange(len(changed) + 1)
        end = min(len(changed), begin + random.choice((0, 1, 2, 8, 64, 10_000)))
        number = random.choice(_NUMBERS) % 2**64
        pieces = (
            b"",
            changed[begin:end] * 2,
            random.randbytes(end - begin),
            random.randbytes(3),
            number.to_bytes(8, "little"),
        )
        changed[begin:end] = random.choice(pieces)
    return bytes(changed[:MAX_BYTES])


def mutate_json(value: Any, random: Random) -> Any:
    """Replaces, drops, repeats or wraps one of the values in another, JSON within strings included."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.85:
        return _mutate_items(value, random)
    if isinstance(value, str) and value[:1] in ("{", "[") and random.random() < 0.9:
        with contextlib.suppress(ValueError, RecursionError):
            return json.dumps(mutate_json(json.loads(value), random))
    if isinstance(value, int) and random.random() < 0.4:
        return value + random.choice((-1, 1, 8, 2**32))
    return random.choice((random.choice(_VALUES), [value], {"a": value}, str(value)))


def _mutate_items(value: dict[str, Any] | list[Any], random: Random) -> Any:
    items: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    index = random.randrange(len(items))
    key, inner = items[index]
    how = random.random()
    if how < 0.7:
        items[index] = (key, mutate_json(inner, random))
    elif how < 0.8:
        del items[index]
    elif how < 0.9:
        items.append((random.choice(_TEXTS), inner))
    else:
        items[index] = (key, random.choice(items)[1])
    return dict(items) if isinstance(value, dict) else [inner for _key, inner in items]


def mutate_tokenizer(content: bytes, random: Random) -> bytes:
    """Damages JSON, or bytes."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(content, random)
    return mutate_bytes(content, random) if random.random() < 0.2 else json.dumps(mutate_json(value, random)).encode()


def mutate_tensors(content: bytes, random: Random) -> bytes:
    """Damages the header of a safetensors file, or bytes of its tensors; most often the checksums are made to match."""
    try:
        header, tensors = parts_of(content)
    except (ValueError, RecursionError):
        return mutate_bytes(content, random)
    if random.random() < 0.1:
        return mutate_bytes(content, random)
    if random.random() < 0.2:
        tensors = mutate_bytes(tensors, random)
    else:
        header = mutate_json(header, random)
    if random.random() < 0.9:
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # where a part is no longer there
            header["__metadata__"] |= checksums(header, tensors)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def mutate_bin(content: bytes, random: Random) -> bytes:
    """Changes the numbers of a header, or bytes; often the header agrees with the file afterwards."""
    if random.random() < 0.4:
        content = mutate_bytes(content, random)
    header = bytearray(content[:HEADER_BYTES])
    for _ in range(random.choice((0, 1, 1, 2))):
        position = 4 * random.choice((0, 1, 2, 2, 3, 60))
        header[position : position + 4] = (random.choice(_MAGIC_NUMBERS) % 2**32).to_bytes(4, "little")
    tail = content[HEADER_BYTES:]
    if random.random() < 0.5:
        header[8:12] = (len(tail) // random.choice((1, 2, 4))).to_bytes(4, "little")
    return bytes(header) + tail


# What files say ------------------------------------------------------------------------------------------------------


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, content[end:]


def bytes_of(header: Mapping[str, Any], tensors: bytes) -> dict[str, bytes]:
    """The bytes of each tensor."""
    entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: tensors[begin:end] for name, (begin, end) in entries.items()}


def checksums(header: Mapping[str, Any], tensors: bytes) -> dict[str, str]:
    """Those that belong into the metadata."""
    found = {f"crc32.{name}": str(zlib.crc32(part)) for name, part in bytes_of(header, tensors).items()}
    entries = sorted(item for item in {**header["__metadata__"], **found}.items() if item[0] != "crc32")
    return {**found, "crc32": str(zlib.crc32(json.dumps(entries).encode()))}


def tensors_said(content: bytes) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]]]:
    """The metadata and the tensors of a safetensors file; an AssertionError where a checksum does not match."""
    header, tensors = parts_of(content)
    metadata = header["__metadata__"]
    assert metadata == {**metadata, **checksums(header, tensors)}, "a file with a wrong checksum was loaded"
    parts = bytes_of(header, tensors)
    return metadata, {name: (header[name]["dtype"], header[name]["shape"], part) for name, part in parts.items()}


DTYPES = {name: dtype for dtype, name in storage.DTYPE_NAMES.items()}


HEADER_BYTES = 1024  # of llm.c's
_VERSIONS = [(20240520, 1), (20240801, 7)]
_MAGIC_NUMBERS = [20240520, 20240801, 20240522, 20240519, 1, 7, 2, *_NUMBERS]


def tokens_said(content: bytes) -> tuple[int, bytes]:
    """The bytes of each token, and of all."""
    magic = int.from_bytes(content[:4], "little")
    if magic not in (20240520, 20240801):
        return 2, content
    assert content[4:8] == (1 if magic == 20240520 else 7).to_bytes(4, "little")
    itemsize = 2 if magic == 20240520 else 4
    assert int.from_bytes(content[8:12], "little") * itemsize == len(content) - HEADER_BYTES
    return itemsize, content[HEADER_BYTES:]


def tokens_loaded(tokens: torch.Tensor) -> tuple[int, bytes]:
    """The same of tokens."""
    return tokens.element_size(), tokens.numpy().tobytes()


def array_said(content: bytes) -> tuple[int, bytes]:
    """The same of a NumPy file."""
    array = numpy.load(io.BytesIO(content), allow_pickle=False)
    return array.itemsize, array.tobytes()


def vocabulary_said(content: bytes) -> str:
    """The characters of a pickle that has been read, so that it is safe; as plain Python reads it, without frames."""
    opcodes = [(opcode.name, position) for opcode, _argument, position in pickletools.genops(content)]
    ends = [position for _name, position in opcodes[1:]] + [len(content)]
    parts = [
        content[begin:end] for (name, begin), end in zip(opcodes, ends, strict=True) if name not in ("PROTO", "FRAME")
    ]
    return "".join(pickle._loads(b"".join(parts))["itos"].values())  # type: ignore[attr-defined]


def tensor_said(dtype: str, shape: list[int], content: bytes) -> torch.Tensor:
    """A tensor from its bytes."""
    empty = torch.empty(0, dtype=DTYPES[dtype])
    return (torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]) if content else empty).reshape(shape)


def bits(tensor: torch.Tensor | None) -> object:
    """What is equal for equal tensors, NaNs included."""
    if tensor is None:
        return None
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def model_said(content: bytes) -> object:
    """The parts of a model."""
    metadata, tensors = tensors_said(content)
    weight, class_weight = (tensors.get(name) for name in ("token_embedding_table.weight", "class_weight"))
    assert weight is not None
    return {
        "weight": bits(tensor_said(*weight)),
        "class_weight": bits(None if class_weight is None else tensor_said(*class_weight)),
        "sparse": metadata.get("sparse") == "true",
        "ignore_index": json.loads(metadata.get("ignore_index", "-100")),
        "label_smoothing": json.loads(metadata.get("label_smoothing", "0.0")),
        "tokenizer": json.loads(metadata["tokenizer"])["code_points"] if "tokenizer" in metadata else None,
    }


def model_loaded(model: BigramLanguageModel) -> object:
    """The same of a model, which can be saved again."""
    model.save(io.BytesIO())
    return {
        "weight": bits(model.token_embedding_table.weight),
        "class_weight": bits(model.class_weight),
        "sparse": model.token_embedding_table.sparse,
        "ignore_index": model.ignore_index,
        "label_smoothing": model.label_smoothing,
        "tokenizer": [ord(c) for c in model.tokenizer.characters]
        if isinstance(model.tokenizer, CharTokenizer)
        else None,
    }


BUFFERS = ("crow_indices", "col_indices", "pair_probs", "backoff", "unigram")


def smoothed_model_said(content: bytes) -> object:
    """The buffers, the method and the tokenizer of a smoothed model."""
    metadata, tensors = tensors_said(content)
    return {
        **{name: bits(tensor_said(*tensors[name])) for name in BUFFERS},
        "method": metadata.get("method"),
        "tokenizer": json.loads(metadata["tokenizer"])["code_points"] if "tokenizer" in metadata else None,
    }


def smoothed_model_loaded(model: SmoothedBigramModel) -> object:
    """The same of a model, which can be used, and saved again."""
    model.save(io.BytesIO())
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 4, sampler="philox", top_p=0.9)
    assert model(torch.arange(model.vocab_size))[0].exp().sum(1).sub(1).abs().max() < 1e-5
    return {
        **{name: bits(getattr(model, name)) for name in BUFFERS},
        "method": model.method,
        "tokenizer": [ord(c) for c in model.tokenizer.characters]
        if isinstance(model.tokenizer, CharTokenizer)
        else None,
    }


LISTS = ("losses", "steps", "train_losses", "val_losses")


def history_said(content: bytes) -> object:
    """The lists of a history, in a file of its own or in a model's."""
    metadata, tensors = tensors_said(content)
    prefix = "history." if metadata["kind"] == "model" else ""
    return {name: repr(tensor_said(*tensors[prefix + name]).tolist()) for name in LISTS}


def history_loaded(history: History) -> object:
    """The same of a history, which can be printed and saved again."""
    assert repr(history)
    history.save(io.BytesIO())
    return {name: repr(getattr(history, name)) for name in LISTS}


# Readers -------------------------------------------------------------------------------------------------------------


def saved(value: Any, **options: Any) -> bytes:
    """The content of the file that it is saved to."""
    file = io.BytesIO()
    value.save(file, **options)
    return file.getvalue()


def models() -> list[bytes]:
    """Of several dtypes, with and without what may be saved with a model."""
    torch.manual_seed(0)
    plain, whole = BigramLanguageModel(2), BigramLanguageModel(3, sparse=True, ignore_index=7, dtype=torch.bfloat16)
    whole.class_weight, whole.tokenizer = torch.rand(3), CharTokenizer("abc")
    return [saved(plain), saved(whole), saved(plain, history=history())]


def smoothed_models() -> list[bytes]:
    """Without pairs, with some, and with all that may be saved with them."""
    whole = SmoothedBigramModel.from_counts(torch.tensor([[2, 1, 0], [0, 0, 3], [0, 0, 0]])).double()
    whole.tokenizer = CharTokenizer("abc")
    some = SmoothedBigramModel.from_counts(torch.tensor([[2, 1], [0, 1]]), "add-k")
    return [saved(SmoothedBigramModel(2)), saved(some), saved(whole)]


def history() -> History:
    """One with all that it may hold."""
    state = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2, 2)}}, "param_groups": [{"betas": (0.9, 1)}]}
    return History(
        losses=[2.5, 1.25],
        steps=[0, 2],
        train_losses=[3.0, 1.5],
        val_losses=[float("nan"), 2.0],
        optimizer_state=state,
        scheduler_state={"last_lr": numpy.float64(1)},
        generator_state=torch.get_rng_state()[:8],
    )


def histories() -> list[bytes]:
    """With and without states, and in a model's file."""
    return [saved(History()), saved(history()), saved(BigramLanguageModel(2), history=history())]


def token_files_of_all_kinds() -> list[bytes]:
    """Without a header, and with both."""
    headers = [numpy.array([magic, version, 4, *[0] * 253], "<i4").tobytes() for magic, version in _VERSIONS]
    return [b"\x01\x00\xff\xff", bytes(range(256)), headers[0] + bytes(range(8)), headers[1] + bytes(range(16))]


def numpy_files() -> list[bytes]:
    """Of several dtypes."""
    files = []
    for dtype in ("u1", "<u2", "<u4", "<i8"):
        file = io.BytesIO()
        numpy.save(file, numpy.arange(5, dtype=dtype))
        files.append(file.getvalue())
    return files


def metas() -> list[bytes]:
    """NanoGPT's vocabulary, in several protocols."""
    itos = dict(enumerate("\nab\u20ac"))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {character: token for token, character in itos.items()}}
    return [pickle.dumps(meta, protocol) for protocol in range(5)]


READERS = {
    "model": Reader(BigramLanguageModel.load, model_loaded, model_said, mutate_tensors, models),
    "smoothed model": Reader(
        SmoothedBigramModel.load, smoothed_model_loaded, smoothed_model_said, mutate_tensors, smoothed_models
    ),
    "history": Reader(History.load, history_loaded, history_said, mutate_tensors, histories),
    "tokenizer": Reader(
        CharTokenizer.load,
        lambda tokenizer: [ord(character) for character in CharTokenizer.from_json(tokenizer.to_json()).characters],
        lambda content: json.loads(content)["code_points"],
        mutate_tokenizer,
        lambda: [saved(CharTokenizer("")), saved(CharTokenizer("abc\n\U0010ffff"))],
    ),
    "tokens": Reader(data.read_bin, tokens_loaded, tokens_said, mutate_bin, token_files_of_all_kinds),
    "npy": Reader(lambda path: token_files.open_npy(path).tokens, tokens_loaded, array_said, mutate_bytes, numpy_files),
    "meta": Reader(data.read_meta, lambda tokenizer: tokenizer.characters, vocabulary_said, mutate_bytes, metas),
    "text": Reader(
        data.read_text,
        lambda text: text,
        lambda content: content.removeprefix(b"\xef\xbb\xbf").decode(),
        mutate_bytes,
        lambda: [b"\xef\xbb\xbftext\r\n", "aé\u20ac\U0010ffff".encode()],
    ),
}


# The search ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Allocations fail beyond what a file may take."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES_A_FILE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Lines:
    """The lines of bigramx that have run."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        """For sys.settrace."""
        name = frame.f_code.co_filename
        if event == "call" and not name.startswith(PACKAGE):
            return None
        self.seen.add((name, frame.f_lineno))
        return self.trace


def search(reader: Reader, path: Path, seed: int) -> Iterator[tuple[bytes, str | None]]:
    """Damaged files without end, each with its finding; one that makes new lines run is damaged further."""
    random, lines, corpus = Random(seed), Lines(), reader.seeds()
    pending = list(corpus)
    while True:
        content = pending.pop() if pending else reader.mutate(random.choice(corpus), random)
        known = len(lines.seen)
        before = sys.gettrace()
        sys.settrace(lines.trace)
        faulthandler.dump_traceback_later(SECONDS_A_FILE, exit=True, file=2)
        try:
            found = finding(reader, content, path)
        finally:
            faulthandler.cancel_dump_traceback_later()
            sys.settrace(before)
        if len(lines.seen) > known:
            corpus.append(content)
        yield content, found


# The target ----------------------------------------------------------------------------------------------------------

# atheris instruments modules as they are imported.
INSTRUMENTED = """
import atheris
with atheris.instrument_imports(include=["bigramx"]):
    import bigramx
from tests.trust import fuzz_files
fuzz_files.fuzz_by_atheris(*fuzz_files.sys.argv[1:])
"""
PLAIN = "from tests.trust import fuzz_files; fuzz_files.fuzz_plainly(*fuzz_files.sys.argv[1:])"


def keep(folder: Path, content: bytes, found: str) -> None:
    """Leaves a file and its finding in the folder, once for each kind of finding."""
    kind = hashlib.sha256(re.sub(r"\d+|'.*", "", found).encode()).hexdigest()[:8]
    (folder / f"{kind}.file").write_bytes(content)
    (folder / f"{kind}.finding").write_text(found, encoding="utf-8", errors="replace")


def fuzz_by_atheris(name: str, place: str, seconds: str, seed: str) -> None:
    """Gives a reader files, in the folder; never returns."""
    atheris = importlib.import_module("atheris")
    reader, folder = READERS[name], Path(place)
    (folder / "corpus").mkdir()
    for index, content in enumerate(reader.seeds()):
        (folder / "corpus" / str(index)).write_bytes(content)

    def read(content: bytes) -> None:
        if found := finding(reader, content, folder / "input"):
            keep(folder, content, found)

    def mutate(content: bytes, max_bytes: int, seed: int) -> bytes:
        return reader.mutate(content, Random(seed))[:max_bytes]

    limits = {"timeout": SECONDS_A_FILE, "max_total_time": seconds, "max_len": MAX_BYTES, "seed": seed}
    options = [f"-{option}={value}" for option, value in {**limits, "rss_limit_mb": 0, "verbosity": 1}.items()]
    atheris.Setup([name, *options, f"-artifact_prefix={folder}/", str(folder / "corpus")], read, custom_mutator=mutate)
    with bounded_memory():
        atheris.Fuzz()


def fuzz_plainly(name: str, place: str, seconds: str, seed: str) -> None:
    """The same by ``search``."""
    folder, end, runs = Path(place), time.monotonic() + float(seconds), 0
    with bounded_memory():
        for content, found in search(READERS[name], folder / "input", int(seed)):
            runs += 1
            if found:
                keep(folder, content, found)
            if time.monotonic() > end:
                break
    print(f"Done {runs} runs", file=sys.stderr)


def fuzz(name: str, folder: Path, seconds: float, seed: int, has_atheris: bool) -> tuple[int, list[str]]:
    """How many files one of the readers was given in a process of its own, and the findings."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = INSTRUMENTED if has_atheris else PLAIN
    command = [sys.executable, "-c", script, name, str(folder), f"{seconds:.0f}", str(seed)]
    environment = {**os.environ, "PYTHONPATH": f"{tree.ROOT}{os.pathsep}{FOLDER / 'packages'}"}
    result = processes.run(command, cwd=tree.ROOT, env=environment, seconds=2 * seconds + 300)
    findings = [f"{path.read_text('utf-8')} ({path.with_suffix('.file')})" for path in folder.glob("*.finding")]
    runs = re.search(r"^Done (\d+) runs", result.stderr, re.MULTILINE)
    if result.returncode != 0 or runs is None:
        findings.append(f"reading {folder / 'input'} ends with {result.returncode}: {result.stderr[-1000:]}")
    return int(runs[1]) if runs else 0, [f"{name}: {found}" for found in sorted(findings)]


def install_atheris() -> bool:
    """Whether it is there, or could be installed into the folder."""
    sys.path.append(str(FOLDER / "packages"))
    if importlib.util.find_spec("atheris") is None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        processes.run([*command, "--target", FOLDER / "packages", ATHERIS], seconds=600)
        importlib.invalidate_caches()
    return importlib.util.find_spec("atheris") is not None


def trial(seconds: float, seed: int) -> tuple[dict[str, int], list[str]]:
    """Gives each reader its share of the time."""
    has_atheris = install_atheris()
    how = "by atheris" if has_atheris else f"without {ATHERIS}, which pip cannot install here"
    print(f"make fuzz-files: seed {seed}, {how}", flush=True)
    results = {name: fuzz(name, FOLDER / name, seconds / len(READERS), seed, has_atheris) for name in READERS}
    tried = {f"files for {name}": count for name, (count, _findings) in results.items()}
    return tried, [found for _count, findings in results.values() for found in findings]


def main() -> None:
    """Fuzzes for some time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, nargs="?", default=600)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31 - 1) + 1)
    arguments = parser.parse_args()
    report.run("make fuzz-files", lambda: trial(arguments.seconds, arguments.seed))


if __name__ == "__main__":
    main()
