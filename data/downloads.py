"""
Download the sources of data/sources.py: resumable, checked, and never half a file under its name.

    python -m data.prepare --download hh-rlhf gpt2
    python -m data.prepare --download list

A file is received as NAME.part beside its final name. A connection that breaks is taken up again
where it broke, in the same run or the next one: by a Range request with If-Range, so that bytes of
two versions of a file are never joined. The whole file is then checked and renamed. Its checksum
is the one in the table; where that has none, the first download's is recorded in SHA256SUMS beside
the files, and later downloads must equal it.
"""

import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from data.files import BadInput, write_atomic
from data.sources import SOURCES, RemoteFile

CHUNK_BYTES = 1 << 18
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
LOCAL_COPIES = "or fetch it by other means and pass its folder to --from"
# what a server says when it is busy or restarting; anything else will not pass by waiting
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


def download(names: Sequence[str], folder: Path) -> int:
    """Fetch the named sources into `folder`/NAME; "list" prints the table instead. Returns 0."""
    if list(names) == ["list"]:
        for name, source in SOURCES.items():
            size = sum(file.size or 0 for file in source.files)
            more = "over " if any(file.size is None for file in source.files) else ""
            shown = f"{size / 1e6:,.1f} MB" if size else "unknown size"
            print(f"{name:20} {(more if size else '') + shown:>16}  {source.licence:30} "
                  f"{source.becomes}")
        return 0
    for name in names:
        if name not in SOURCES:
            raise BadInput(f"unknown source {name!r}; known are {', '.join(SOURCES)}")
    for name in names:
        source = SOURCES[name]
        print(f"{name}: {source.becomes}; licence: {source.licence}")
        for file in source.files:
            fetch(file, folder / name)
    return 0


def fetch(file: RemoteFile, folder: Path, attempts: int = 5, timeout: float = 30.0,
          pause: float = 1.0) -> None:
    """
    Download one file into `folder`, unless it is there already, and unpack what is to be unpacked.

    `attempts` is how often in a row a connection may fail without bringing a new byte, with
    `pause`, 2 `pause`, 4 `pause`, ... seconds between; `timeout` is seconds without a byte.

    Raises BadInput if the server cannot be reached, refuses, keeps closing early, or sends
    something else than expected; OSError (ENOSPC) if the disk is full. What was received stays for
    the next run, but for content that is wrong.
    """
    target = folder / file.path
    recorded = _read_records(folder)
    expected = file.sha256 or recorded.get(file.path)
    if target.exists():
        found = _sha256(target)
        if expected is not None and found != expected:
            raise BadInput(f"{target}: checksum {found}, expected {expected}; the file was changed "
                           "or belongs to another version: remove it and run again")
        print(f"    {file.path}: already there")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        _receive(file, part, attempts, timeout, pause)
        found = _check(file, part, expected, recorded_before=file.sha256 is None)
        os.replace(part, target)
        _validator_file(part).unlink(missing_ok=True)
    if recorded.get(file.path) != found:
        recorded[file.path] = found
        lines = (f"{digest}  {path}\n" for path, digest in sorted(recorded.items()))
        write_atomic(folder / "SHA256SUMS", "".join(lines))
    for member, path in file.unpack:
        if not (folder / path).exists():
            _unpack(target, member, folder / path)


def _receive(file: RemoteFile, part: Path, attempts: int, timeout: float, pause: float) -> None:
    """Fill `part` with the whole body, over as many connections as it takes."""
    host = urllib.request.Request(file.url).host
    failures, furthest = 0, _size(part)
    with tqdm(desc=f"    {file.path}", total=file.size, unit="B", unit_scale=True,
              disable=None) as bar:
        while True:
            try:
                if _receive_once(file, part, timeout, bar):
                    return
                problem = "the connection closed early"
            except urllib.error.HTTPError as error:
                problem = f"the server answered {error.code} {error.reason}"
                if error.code not in PASSING_STATUS:
                    raise BadInput(f"{file.url}: {problem}; the address may have changed, or the "
                                   f"file needs an account: see its page, {LOCAL_COPIES}") from None
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
                    TimeoutError, ssl.SSLError) as error:
                reason = getattr(error, "reason", None) or error
                problem = str(reason) or type(reason).__name__
                if isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError)):
                    raise BadInput(f"{file.url}: cannot reach {host} ({problem}); check the "
                                   f"network and run again, {LOCAL_COPIES}") from None
            failures = 0 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures >= attempts:
                raise BadInput(f"{file.url}: {problem}, {attempts} times, with {_size(part):,} "
                               f"bytes received; run again to go on from there, {LOCAL_COPIES}")
            time.sleep(pause * 2 ** max(failures - 1, 0))


def _receive_once(file: RemoteFile, part: Path, timeout: float, bar: tqdm) -> bool:
    """Go on with `part` over one connection; return whether the body is now complete."""
    offset = _size(part)
    validator = _validator_file(part).read_text() if _validator_file(part).exists() else ""
    headers = {"User-Agent": "data.downloads", "Accept-Encoding": "identity"}
    if offset and (validator or file.sha256):
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    # else from the start: nothing would tell if the file had changed between the two parts
    request = urllib.request.Request(file.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{offset}":
            return True
        part.unlink(missing_ok=True)  # longer than the file: of another version
        return False
    with response:
        length = response.headers.get("Content-Length")
        if response.status == 206:
            match = CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != offset:
                part.unlink()  # not what was asked for: start over, without a Range
                return False
            whole = int(match[2]) if match[2] != "*" else None
        else:
            offset, whole = 0, int(length) if length else None
        etag = response.headers.get("ETag", "")
        strong = etag if not etag.startswith("W/") else ""
        _validator_file(part).write_text(strong or response.headers.get("Last-Modified", ""))
        if whole is not None:
            bar.total = whole
            _check_space(part, whole - offset)
        bar.n = offset
        bar.refresh()
        with part.open("r+b" if offset else "wb") as stream:
            stream.seek(offset)
            # read() would lose the bytes that came just before a break
            while chunk := response.read1(CHUNK_BYTES):
                try:
                    stream.write(chunk)
                except OSError as error:  # run_command names the file and says "the disk is full"
                    raise OSError(error.errno, error.strerror, str(part)) from None
                bar.update(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
    return whole is None or _size(part) == whole


def _check(file: RemoteFile, part: Path, expected: str | None, recorded_before: bool) -> str:
    """Return the checksum of a complete `part`; raise BadInput and remove it if it is wrong."""
    with part.open("rb") as stream:
        head = stream.read(512).lstrip().lower()
    found = _sha256(part)
    if found == expected:
        return found
    if head.startswith((b"<!doctype html", b"<html")):
        problem = "a web page came instead of the file; it may have moved or need an account"
    elif head.startswith(b"version https://git-lfs"):
        problem = "a Git LFS pointer came instead of the file"
    elif expected is not None:
        origin = "recorded at the first download, in SHA256SUMS" if recorded_before else "expected"
        problem = (f"checksum {found}, but {expected} was {origin}: damaged on the way, or changed "
                   "by its publishers")
    else:
        return found
    part.unlink()
    _validator_file(part).unlink(missing_ok=True)
    raise BadInput(f"{file.url}: {problem}; nothing was kept: run again, {LOCAL_COPIES}")


def _unpack(archive: Path, member: str, target: Path) -> None:
    """Extract one member of a zip or tar file to `target`, atomically."""
    part = target.with_name(target.name + ".part")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened, opened.open(member) as source, \
                    part.open("wb") as stream:
                shutil.copyfileobj(source, stream)
        else:
            with tarfile.open(archive) as opened:
                source = opened.extractfile(member)
                if source is None:
                    raise KeyError(member)
                with source, part.open("wb") as stream:
                    shutil.copyfileobj(source, stream)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        part.unlink(missing_ok=True)
        raise BadInput(f"{archive}: cannot take {member} out of it ({error}); remove it and "
                       "run again") from None
    os.replace(part, target)
    print(f"    {target.name}: unpacked")


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise BadInput(f"{part.parent}: the disk has {free:,} bytes free and {needed:,} more are "
                       "to come; make room and run again to go on")


def _validator_file(part: Path) -> Path:
    """Where the ETag or date of the version that `part` belongs to is kept between runs."""
    return part.with_name(part.name + ".version")


def _read_records(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS of a source's folder -> {path: checksum}."""
    path = folder / "SHA256SUMS"
    if not path.exists():
        return {}
    lines = (line.split("  ", 1) for line in path.read_text().splitlines() if "  " in line)
    return {name: digest for digest, name in lines}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
