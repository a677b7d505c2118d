"""
Raw files of public data sets: find them, read them, and refuse what is not what it should be.

Every error is a `BadInput` whose one line names the file, the line or record, and the key.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.files import BadInput, parse_json, read_text


def find_files(folder: Path, pattern: str) -> list[Path]:
    """
    Find the files that match `pattern` anywhere under `folder`; of x and x.gz only the plain one.

    Returns them sorted by path. The pattern is searched in the path relative to `folder`, and in
    the path from the folder's own name on, so that a folder that *is* `helpful-base` works too.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        relative = f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"
        names = (relative, relative.partition("/")[2])
        if any(re.search(pattern, name) for name in names) and path.is_file():
            found.append(path)
    return [path for path in found if path.suffix != ".gz" or path.with_suffix("") not in found]


def most_unpacked(archive: Path) -> int:
    """Bytes that a compressed file may hold: 100 times its own, where text takes 3 to 20."""
    return 100 * archive.stat().st_size + 2**20


def read_raw(path: Path) -> str:
    """Read UTF-8 text, gzipped or plain, without byte-order mark, CRLF and NUL characters."""
    if path.suffix == ".gz":
        try:
            with gzip.open(path) as stream:
                content = stream.read((most := most_unpacked(path)) + 1)
            if len(content) > most:
                raise BadInput(f"{path}: unpacks to over {most:,} bytes; expected text")
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
        except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: damaged gzip file ({error}); download it again") from None
    else:
        text = read_text(path)
    if text.startswith("version https://git-lfs"):
        raise BadInput(f"{path}: a Git LFS pointer, not the data; download the file itself")
    if path.suffix != ".txt" and text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise BadInput(f"{path}: a web page, not the data; download the file itself")
    return text.replace("\x00", "")


def parse(text: str, where: str) -> Any:
    """Parse JSON, without lone surrogates, which UTF-8 cannot hold. Raises `BadInput`."""
    value = parse_json(text, where)
    if re.search(r"\\u[dD]", text):
        text = json.dumps(value, ensure_ascii=False).encode("utf-8", "ignore").decode()
        value = parse_json(text, where)
    return value


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", value) for each line that is not blank."""
    for number, line in enumerate(read_raw(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", parse(line, f"{path}:{number}")


def read_rows(path: Path, delimiter: str = ",", **options: Any) -> Iterator[tuple[str, Any]]:
    """Yield ("file: row number", row) of a table with a heading row."""
    csv.field_size_limit(1 << 27)
    reader = csv.DictReader(io.StringIO(read_raw(path)), delimiter=delimiter, **options)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            yield f"{path}: row {number}", row
    except csv.Error as error:
        raise BadInput(f"{path}: row {number + 1}: {error}") from None


def read_json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file: record number", value) for each entry of a JSON array, counted from 1."""
    values = parse(read_raw(path), str(path))
    if not isinstance(values, list):
        raise BadInput(f"{path}: expected a JSON array, found {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        yield f"{path}: record {number}", value


TYPE_NAMES = {str: "a string", list: "a list", dict: "an object", int: "a whole number"}


def get(record: Any, key: str, kind: type, where: str, default: Any = None) -> Any:
    """Return `record[key]`, which must be of type `kind`; a null or absent key gives `default`."""
    if not isinstance(record, dict):
        raise BadInput(f"{where}: expected a JSON object, found {type(record).__name__}")
    value = record.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = f"found {str(value)[:60]!r}" if key in record else "it is missing"
        expected = f"expected {TYPE_NAMES[kind]}, {found}"
        raise BadInput(f'{where}: key "{key}": {expected}; the set\'s schema may have changed')
    return value


def clean(text: str) -> str:
    """Strip white space at both ends; drop NUL, and lone surrogates, which UTF-8 cannot hold."""
    text = text.encode("utf-8", "ignore").decode("utf-8")
    return text.replace("\r\n", "\n").replace("\x00", "").strip()
