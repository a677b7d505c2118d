"""
Files that were received: is it data, has it its form, unpack it, record its checksum.

What downloads.py does with a file once all of it is there, from a server or a local folder.
"""

import gzip
import hashlib
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from data.files import BadInput, write_atomic
from data.real.sources import RemoteFile

CHUNK_BYTES = 1 << 18


def not_data(path: Path) -> str | None:
    """Say what else than data a file is: a web page, a server's error message, a pointer."""
    with path.open("rb") as stream:
        head = stream.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page came instead of the file; it may have moved or need an account"
    if head.startswith(b"<?xml") and b"<error>" in head:
        return "an error message came instead of the file; it may have moved"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer came instead of the file"
    return None


def malformed(path: Path, name: str) -> str | None:
    """
    Say what is wrong with the form that the end of `name` promises, or None.

    gzip and zip files are read to the end, with their own checksums; .json is parsed, as JSON or
    as JSON Lines (some sets call those .json), .jsonl line by line; a .safetensors file must be as
    long as its header says. Of plain text, CSV and TSV only an empty file is noticed; JSON Lines
    that end early at the end of a line are not.
    """
    if path.stat().st_size == 0:
        return "an empty file"
    try:
        if name.endswith((".gz", ".tgz")):
            with gzip.open(path) as stream:
                while stream.read(CHUNK_BYTES):
                    pass
        elif name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                if member := archive.testzip():
                    return f"damaged zip file ({member})"
        elif name.endswith(".safetensors"):
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > path.stat().st_size:
                    return "no safetensors file"
                tensors = json.loads(stream.read(length))
            end = max(
                (
                    tensor["data_offsets"][1]
                    for key, tensor in tensors.items()
                    if key != "__metadata__"
                ),
                default=0,
            )
            if path.stat().st_size != 8 + length + end:
                return f"{path.stat().st_size:,} bytes where its header says {8 + length + end:,}"
        elif name.endswith((".json", ".jsonl")):
            return _malformed_json(path, name.endswith(".json"))
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        return f"damaged {name.rpartition('.')[2]} file ({error})"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"no {name.rpartition('.')[2]} file"
    return None


def _malformed_json(path: Path, may_be_one_value: bool) -> str | None:
    if may_be_one_value:
        try:
            json.loads(path.read_bytes())
            return None
        except ValueError:
            pass
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                if line.strip():
                    json.loads(line)
            except ValueError:
                return f"line {number} is not JSON"
    return None


# --- archives -----------------------------------------------------------------------------------


def unpack_all(file: RemoteFile, folder: Path) -> None:
    for member, path in file.unpack:
        if not (folder / path).exists():
            _unpack(folder / file.path, member, folder / path)


def _unpack(archive: Path, member: str, target: Path) -> None:
    """
    Extract one member of a zip or tar file to `target`, atomically.

    Only the member asked for is read, and where it goes does not depend on the archive.
    """
    part = target.with_name(target.name + ".part")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened, opened.open(member) as source:
                copy(source, part)
        else:
            with tarfile.open(archive) as opened:
                if not opened.getmember(member).isfile():  # a link could name another file
                    raise KeyError(f"{member} is not a plain file")
                with opened.extractfile(member) as source:
                    copy(source, part)
    except (
        KeyError,
        RuntimeError,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
        zipfile.BadZipFile,
        tarfile.TarError,
    ) as error:
        part.unlink(missing_ok=True)
        raise BadInput(
            f"{archive}: cannot take {member} out of it ({error}); its publishers may "
            "have changed it, or it is damaged: remove it and run again"
        ) from None
    os.replace(part, target)
    print(f"    {target.name}: unpacked")


def copy(source: IO[bytes], part: Path) -> None:
    """Copy a stream to `part`, which does not stay if the disk is full."""
    try:
        with part.open("wb") as stream:
            shutil.copyfileobj(source, stream, CHUNK_BYTES)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno is None:  # from reading an archive, not from writing
            raise
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(part)) from None


# --- checksums ----------------------------------------------------------------------------------


def read_records(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS of a source's folder -> {path: checksum}."""
    path = folder / "SHA256SUMS"
    if not path.exists():
        return {}
    lines = (line.split("  ", 1) for line in path.read_text().splitlines() if "  " in line)
    return {name: digest for digest, name in lines}


def write_records(folder: Path, records: Mapping[str, str]) -> None:
    lines = (f"{digest}  {path}\n" for path, digest in sorted(records.items()))
    write_atomic(folder / "SHA256SUMS", "".join(lines))


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
