"""File formats of the project: read, validate, write atomically.

Every stage hands its result to the next as a file, so the formats are the contract between stages:

    demonstrations.jsonl  {"prompt", "response", "user", "source": "labeler"|"customer", "use_case"}
    prompts.jsonl         {"prompt", "user", "source", "use_case"}
    candidates.jsonl      {"prompt", "user", "source", "use_case",
                           "responses": [K], "ended": [K bools], "models": [K]}
    comparisons.jsonl     candidates + {"ranks": [K ints, 1 is best, equal is a tie], "labeler"}
                          ("ended" and "models" are optional there)
    pretrain.txt          documents separated by a line that holds only <|endoftext|>

JSON Lines is UTF-8, one object a line. Unknown keys are allowed and kept. A file is either read
whole or refused whole with a `BadInput` that names file, line, key and what was expected, and a
file is either written whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

END_OF_TEXT = "<|endoftext|>"
MAX_LINE_BYTES = 16 * 2**20  # one record; a longer line is almost surely not JSON Lines
MAX_JSON_BYTES = 2**28  # of a config, a tokenizer, a world, a measurement
MAX_BLANK = 100_000  # white space in a row; the tokenizer's engine overflows at some 500,000

Record = dict[str, Any]


class BadInput(ValueError):
    """Input that cannot be used; its message is one line for who gave it (exit code 2)."""


# ------------------------------------------------------------------------------------------------
# JSON Lines


def _is_list(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(good, value))


# What a value may be: the test, and the words for it.
_Check = tuple[Callable[[Any], bool], str]
_STRING: _Check = (lambda v: isinstance(v, str), "a string")
_FILLED: _Check = (lambda v: isinstance(v, str) and v.strip() != "", "a string that is not blank")
_SOURCE: _Check = (lambda v: v in ("labeler", "customer"), '"labeler" or "customer"')
_STRINGS: _Check = (lambda v: _is_list(v, _STRING[0]), "a list of strings")
_BOOLS: _Check = (lambda v: _is_list(v, lambda x: isinstance(x, bool)), "a list of true and false")
_RANKS: _Check = (
    lambda v: _is_list(v, lambda x: type(x) is int and x >= 1),
    "a list of whole numbers from 1 (1 is best, equal numbers are a tie)",
)
_PROMPT = {"prompt": _FILLED, "user": _FILLED, "source": _SOURCE, "use_case": _STRING}
_MADE = {"ended": _BOOLS, "models": _STRINGS}
_RANKED = {"responses": _STRINGS, "ranks": _RANKS, "labeler": _FILLED}
# kind -> (required keys, optional keys), each key with its check.
KINDS: dict[str, tuple[dict[str, _Check], dict[str, _Check]]] = {
    "demonstrations": (_PROMPT | {"response": _FILLED}, {}),
    "prompts": (_PROMPT, {}),
    "candidates": (_PROMPT | {"responses": _STRINGS} | _MADE, {}),
    "comparisons": (_PROMPT | _RANKED, _MADE),
}


def check_record(record: Any, kind: str, where: str) -> None:
    """Raise `BadInput`, beginning with `where`, unless `record` is a valid record of `kind`."""
    required, optional = KINDS[kind]
    if not isinstance(record, dict):
        raise BadInput(f"{where}: expected a JSON object, found {type(record).__name__}")
    for key in required:
        if key not in record:
            raise BadInput(f'{where}: key "{key}" is missing; a record of {kind} needs it')
    for key, (good, expected) in (required | optional).items():
        if key in record and not good(record[key]):
            found = _shown(record[key])
            raise BadInput(f'{where}: key "{key}": expected {expected}, found {found}')
    for text in [record[key] for key in ("prompt", "response") if key in required]:
        check_blank(text, where)
    if "responses" not in required:
        return
    for text in record["responses"]:
        check_blank(text, where)
    num_responses = len(record["responses"])
    if num_responses < 2:
        raise BadInput(f'{where}: key "responses": expected at least 2, found {num_responses}')
    for key in ("ended", "models", "ranks"):
        if key in record and len(record[key]) != num_responses:
            expected = f"one entry for each of the {num_responses} responses"
            found = len(record[key])
            raise BadInput(f'{where}: key "{key}": expected {expected}, found {found}')


def check_blank(text: str, where: str) -> None:
    """Raise `BadInput` for more white space in a row than the tokenizer can take."""
    if len(text) > MAX_BLANK and (most := max(map(len, re.findall(r"\s+", text)), default=0)):
        if most > MAX_BLANK:
            raise BadInput(f"{where}: {most} characters of white space in a row, over {MAX_BLANK}")


def _shown(value: Any) -> str:
    """The beginning of a value, for an error message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"number {digits[:20]} is out of range")
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'key "{twice}" stands twice')
    return record


_WORDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}


def _expected(shape: Any) -> str:
    if isinstance(shape, tuple):
        return f"{', '.join(map(_expected, shape[:-1]))} or {_expected(shape[-1])}"
    if isinstance(shape, dict | list):
        return "an object" if isinstance(shape, dict) else "a list"
    return _WORDS[shape] if isinstance(shape, type) else json.dumps(shape)


def check(value: Any, shape: Any, where: str, key: str = "") -> None:
    """Raise `BadInput`, beginning with `where`, unless a value out of JSON has this shape: a type,
    a value, (x, y) either, {"a": x, "b?": y} an object with a and perhaps b, {str: x} with any key,
    [x, y] a list of these two, [x, ...] of any number of x, [x, y, ...] of an x and then of y.
    Numbers are at most 1e30 in size."""

    def fail(fault: str = "") -> NoReturn:
        named = f': key "{key}"' if key else ""
        fault = fault or f": expected {_expected(shape)}, found {_shown(value)}"
        raise BadInput(f"{where}{named}{fault}")

    if isinstance(shape, tuple):
        if not any(_has_shape(value, each) for each in shape):
            fail()
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            fail()
        for name, inner in (dict.fromkeys(value, shape[str]) if str in shape else shape).items():
            own = name.removesuffix("?")
            inside = f"{key}.{own}".removeprefix(".")
            if own in value:
                check(value[own], inner, where, inside)
            elif own == name:
                raise BadInput(f'{where}: key "{inside}" is missing')
    elif isinstance(shape, list):
        if not isinstance(value, list):
            fail()
        if ... in shape:
            shape = shape[:-2] + shape[-2:-1] * (len(value) - len(shape) + 2)
        if len(shape) != len(value):
            fail(f": expected {len(shape)} entries, found {len(value)}")
        for i, (each, inner) in enumerate(zip(value, shape, strict=True)):
            check(each, inner, where, f"{key}[{i}]")
    elif isinstance(shape, type):
        kinds = (int, float) if shape is float else (shape,)
        if type(value) not in kinds or shape is not str and abs(value) > 1e30:
            fail()
    elif type(value) is not type(shape) or value != shape:
        fail()


def _has_shape(value: Any, shape: Any) -> bool:
    with suppress(BadInput):
        check(value, shape, "")
        return True
    return False


def parse_json(text: str, where: str) -> Any:
    """Parse strict JSON: finite numbers, no duplicate keys, bounded depth. Raises `BadInput`."""
    strict = {"parse_constant": _refuse_constant, "parse_float": _finite_float}
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates, **strict)
    except RecursionError:
        raise BadInput(f"{where}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON ({error.msg} at character {error.pos})") from None
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from None


def read_text(path: Path | str, most: int = 2**36) -> str:
    """The file as text: UTF-8, byte-order mark dropped, line ends made "\\n". Raises `BadInput`,
    also for a file of more than `most` bytes."""
    path = Path(path)
    refuse_special(path)
    try:
        if (size := path.stat().st_size) > most:
            raise BadInput(f"{path}: {size} bytes, expected at most {most}")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: not UTF-8 text (byte {error.start})") from None
    return text.replace("\r\n", "\n")


def read_json(path: Path | str) -> Record:
    """The object that a JSON file holds. Raises `BadInput` for any other file."""
    content = parse_json(read_text(path, MAX_JSON_BYTES), str(path))
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def refuse_special(path: Path) -> None:
    """Raise `BadInput` for a pipe or a device: files are read more than once, and must end."""
    try:
        special = not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode)
    except (OSError, ValueError):
        return  # opening it says why
    if special:
        raise BadInput(f"{path}: is a pipe or a device; expected a regular file")


def read_jsonl(path: Path | str, kind: str) -> list[Record]:
    """Read the records of a file of the given `kind`, a key of `KINDS`.

    Blank lines are skipped. Raises `BadInput` that names file, line and key if the file is missing,
    empty, not UTF-8, or any line is not a valid record.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise BadInput(f"{where}: line of {len(line)} characters, over {MAX_LINE_BYTES}")
        if "\x00" in line:
            raise BadInput(f"{where}: holds a NUL byte; expected text")
        record = parse_json(line, where)
        check_record(record, kind, where)
        if "\\u" in line:  # an escape may hold half a surrogate pair, which is no text
            _to_json(record, where)
        records.append(record)
    if not records:
        raise BadInput(f"{path}: holds no records; expected {kind}, one JSON object a line")
    return records


def write_jsonl(path: Path | str, records: Iterable[Record], kind: str) -> None:
    """Check every record, then write them atomically.

    Raises `BadInput`, and writes nothing, if any record is not one that `read_jsonl` would read.
    """
    lines = []
    for number, record in enumerate(records, start=1):
        where = f"{path}: record {number}"
        check_record(record, kind, where)
        lines.append(_to_json(record, where) + "\n")
    write_atomic(path, "".join(lines))


def _to_json(record: Record, where: str) -> str:
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{where}: cannot be written as JSON ({error})") from None
    check_text(line, f"{where}:")
    return line


def check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where} holds half a surrogate pair; expected Unicode text") from None


# ------------------------------------------------------------------------------------------------
# Pretraining text


def read_documents(path: Path | str) -> list[str]:
    """Read pretrain.txt: documents separated by a line that holds only <|endoftext|>.

    A literal <|endoftext|> inside a longer line is ordinary text. Blank documents and newlines
    around a document are dropped. Raises `BadInput` if there is no document.
    """
    documents, lines = [], []
    for line in [*read_text(path).split("\n"), END_OF_TEXT]:
        if line.strip() == END_OF_TEXT:
            document = "\n".join(lines).strip("\n")
            if document.strip():
                check_blank(document, f"{path}: document {len(documents) + 1}")
                documents.append(document)
            lines = []
        else:
            lines.append(line)
    if not documents:
        raise BadInput(f"{path}: holds no documents; expected text")
    return documents


def write_documents(path: Path | str, documents: Iterable[str]) -> None:
    """Write pretrain.txt atomically. Raises `BadInput`, and writes nothing, for a document that
    would split on reading."""
    documents = list(documents)
    for number, document in enumerate(documents, start=1):
        if any(line.strip() == END_OF_TEXT for line in document.split("\n")):
            raise BadInput(f"{path}: document {number} has a line that holds only {END_OF_TEXT}")
        check_text(document, f"{path}: document {number}")
    write_atomic(path, f"\n{END_OF_TEXT}\n".join(documents) + "\n")


# ------------------------------------------------------------------------------------------------
# Atomic writes


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder, so that a later rename cannot be on disk before its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` inside names `path`: a full disk's names none, that of a copy its source."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Write aside, flush, rename: at any moment `path` is the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
            flush_to_disk(aside)
            os.replace(aside, path)
            flush_to_disk(path.parent)
    finally:
        aside.unlink(missing_ok=True)


# What a process has aside: `.<what it becomes>.<process>.tmp`, or the folder that it replaces.
LEFTOVER = re.compile(r"(?s)\.(.+)\.\d+\.(tmp|replaced)")


def write_folder_atomic(folder: Path | str, write: Callable[[Path], None]) -> None:
    """Call `write(aside)` on an empty folder aside, add checksums, flush, rename it to `folder`.

    A folder already there is replaced: it steps aside whole, and goes when the new one is in its
    place. Where that fails (`OSError`) it stays; where the process is killed between the two
    renames, `remove_leftovers` puts it back. SHA256SUMS is in the format of the sha256sum command.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    replaced = aside.with_suffix(".replaced")
    _put_back(replaced, folder)  # of a killed process of the same number
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with naming(folder):
            aside.mkdir()
            write(aside)
            sums = "".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(aside.iterdir()))
            (aside / "SHA256SUMS").write_text(sums)
            for file in aside.iterdir():
                flush_to_disk(file)
            flush_to_disk(aside)
            if folder.is_dir() and not folder.is_symlink():
                os.rename(folder, replaced)  # not of a mount point: nothing is lost then
            os.replace(aside, folder)
            flush_to_disk(folder.parent)
    finally:
        _put_back(replaced, folder)
        shutil.rmtree(aside, ignore_errors=True)


def _put_back(replaced: Path, folder: Path) -> None:
    """Rename a folder that has stepped aside back, or delete it where its place is taken."""
    if not replaced.exists():
        return
    try:
        os.replace(replaced, folder)  # also over an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(folder: Path | str, *names: str) -> None:
    """Delete what killed processes left aside in `folder` before it could be renamed, and put back
    the folders that they were about to replace; only what was to become a file or folder of one of
    these names, which may be patterns: others may be at work beside it."""
    for path in sorted(Path(folder).glob(".*")):
        found = LEFTOVER.fullmatch(path.name)
        if not found or not any(fnmatch(found[1], name) for name in names):
            continue
        if found[2] == "replaced":
            _put_back(path, path.with_name(found[1]))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_is_intact(folder: Path | str) -> bool:
    """True if every file that SHA256SUMS names is there with that checksum."""
    folder = Path(folder)
    try:
        lines = read_text(folder / "SHA256SUMS").split("\n")[:-1]
        sums = [(folder / name, digest) for digest, name in (line.split("  ") for line in lines)]
        return bool(sums) and all(f.is_file() and _sha256(f) == digest for f, digest in sums)
    except (OSError, ValueError):
        return False


def fingerprint(path: Path | str) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file: which data a run has read."""
    refuse_special(Path(path))
    try:
        return _sha256(Path(path))[:16]
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def interned(value: Any) -> Any:
    """The same nested dicts and lists, equal keys being one object. Pickle writes each object once
    and then refers to it, so only then are the files of equal states equal."""
    if isinstance(value, dict):
        return {sys.intern(k) if isinstance(k, str) else k: interned(v) for k, v in value.items()}
    return [interned(v) for v in value] if isinstance(value, list) else value


def check_writable(folder: Path | str) -> None:
    """Raise `BadInput` unless files can be created in `folder`, which is made if it is absent."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_probe.{os.getpid()}.tmp"
        remove_leftovers(folder, "write_probe")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror})") from None


# ------------------------------------------------------------------------------------------------
# Logs


class Log:
    """A CSV file with one row a step, flushed; the first row sets the columns.

    The log of an earlier run stays until `keep()`: a run that dies before its first checkpoint
    destroys nothing. With `checkpoint`, a folder with a copy, that is what the log goes on from.
    `board`, a SummaryWriter of torch.utils.tensorboard, gets each cell that is not empty.
    """

    def __init__(self, path: Path, checkpoint: Path | None = None, board: Any = None):
        self.path, self.file, self.board = path, None, board
        self.lines = (checkpoint / path.name).read_text().splitlines(True) if checkpoint else []
        if checkpoint or not path.exists():
            self.keep()

    def keep(self) -> None:
        """From now on in the file, over what was there."""
        if self.file is None:
            write_atomic(self.path, "".join(self.lines))
            self.file = self.path.open("a", buffering=1)

    def write(self, row: dict[str, float | int | None]) -> None:
        """Append one row; None or no value is an empty cell, floats keep 9 digits (float32 is
        exact). Raises ValueError for a column that the header lacks."""
        if not self.lines:
            self._append(row)
        columns = self.lines[0].strip().split(",")
        if odd := sorted(set(row) - set(columns)):
            raise ValueError(f"{self.path}: the header has no columns {odd}")
        cells = [row.get(name) for name in columns]
        self._append(
            [f"{c:.9g}" if isinstance(c, float) else "" if c is None else str(c) for c in cells]
        )
        if self.board:
            for name, cell in zip(columns, cells, strict=True):
                if name != "step" and cell is not None:
                    self.board.add_scalar(name, cell, row["step"])
            self.board.flush()

    def _append(self, cells: Iterable[str]) -> None:
        self.lines.append(",".join(cells) + "\n")
        if self.file:
            with naming(self.path):
                self.file.write(self.lines[-1])


def read_log(path: Path | str) -> list[dict[str, str]]:
    """Rows of a log as strings, a torn last line left out."""
    whole = read_text(path).split("\n")[:-1]
    lines = [(number, line.split(",")) for number, line in enumerate(whole, start=1) if line]
    for number, cells in lines:
        if len(cells) != len(lines[0][1]):
            fault = f"{len(cells)} cells; expected {len(lines[0][1])}, as in the header"
            raise BadInput(f"{path}:{number}: {fault}")
    return [dict(zip(lines[0][1], cells, strict=True)) for _, cells in lines[1:]]
