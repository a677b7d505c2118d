"""
Download the sources of sources.py: resumable, checked, and never half a file under its name.

    python -m data.real.prepare --download hh-rlhf gpt2
    python -m data.real.prepare --download list
    python -m data.real.prepare --download hh-rlhf --from FOLDER     # local copies instead

A file is received as NAME.part beside its final name. A connection that breaks is taken up again
where it broke, in the same run or the next one: by a Range request with If-Range, so that bytes of
two versions of a file are never joined. The whole file is then checked and renamed. Its checksum
is the one in the table; where that has none, the first download's is recorded in SHA256SUMS beside
the files, and later downloads must equal it. A first download must at least have the form that its
name says (`malformed`), which finds most files that were cut short.
"""

import http.client
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from data.files import BadInput
from data.real.raw import find_files
from data.real.received import (
    CHUNK_BYTES,
    copy,
    malformed,
    not_data,
    read_records,
    sha256,
    unpack_all,
    write_records,
)
from data.real.sources import SOURCES, RemoteFile, Source
from data.tokenizer import gpt2_encoding, save_tokenizer

CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
LOCAL_COPIES = "or fetch it by other means and pass its folder to --from"
# what a server says when it is busy or restarting; anything else will not pass by waiting
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


def download(
    names: Sequence[str],
    folder: Path,
    copies: Path | None = None,
    patterns: Mapping[str, str] | None = None,
) -> int:
    """
    Bring the named sources to `folder`/NAME and what they need; "list" prints the table. Returns 0.

    With a folder of `copies`, files are taken from there and nothing is downloaded; `patterns`,
    {source: regular expression}, are the names under which copies of a source go (see
    `data.real.raw.find_files`), beside those in the table.
    """
    if "list" in names:
        print_table([name for name in names if name != "list"])
        return 0
    _check_names(names)
    wanted = dict.fromkeys(need for name in names for need in (*SOURCES[name].needs, name))
    for name in wanted:
        source = SOURCES[name]
        if name not in names and all((folder / name / file.path).exists() for file in source.files):
            continue  # needed, and there
        print(f"{name}: {source.becomes}; licence: {source.licence}")
        if copies is None:
            for file in source.files:
                fetch(file, folder / name)
        else:
            take(name, source, copies, folder / name, (patterns or {}).get(name))
        if "gpt2-bpe" in source.needs:  # so that the folder is a checkpoint that --init can name
            save_tokenizer(gpt2_encoding(folder / "gpt2-bpe"), folder / name / "tokenizer.json")
            print("    tokenizer.json: written")
    return 0


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in SOURCES:
            raise BadInput(f"unknown source {name!r}; known are {', '.join(SOURCES)}")


def print_table(names: Sequence[str]) -> None:
    """Print a line for every source, or for every file of the named ones."""
    _check_names(names)
    for name in names:
        for file in SOURCES[name].files:
            size = f"{file.size:,} bytes" if file.size else "size not known"
            print(
                f"{name}/{file.path}: {size}, SHA-256 {file.sha256 or 'of the first download'}\n"
                f"    {file.url}"
            )
            for member, path in file.unpack:
                print(f"    {member} is unpacked as {path}")
    if names:
        return
    print(f"{'name':19} {'MB':>8} {'files':>5} {'checked':>7}  {'licence':30} what it becomes")
    for name, source in SOURCES.items():
        sizes = [file.size for file in source.files]
        megabytes = sum(size or 0 for size in sizes) / 1e6
        total = f"{megabytes:,.{1 if megabytes >= 0.1 else 2}f}" if any(sizes) else "?"
        total += "+" if any(sizes) and None in sizes else ""
        known = sum(file.sha256 is not None for file in source.files)
        print(
            f"{name:19} {total:>8} {len(sizes):5} {known:7}  {source.licence:30} {source.becomes}"
        )
    print(
        "MB: +, and more in files whose size is not known; ?, not known.\n"
        "checked: files whose SHA-256 is known; that of others is recorded the first time.\n"
        "`--download list NAME` shows the addresses of a source, `--download NAME` fetches it,\n"
        '`--download NAME --from FOLDER` takes copies that lie in a folder. "prepare NAME" is\n'
        "python -m data.real.prepare NAME, which converts."
    )


def fetch(
    file: RemoteFile, folder: Path, attempts: int = 5, timeout: float = 30.0, pause: float = 1.0
) -> None:
    """
    Download one file into `folder`, unless it is there already, and unpack what is to be unpacked.

    `attempts` is how often in a row a connection may fail without bringing a new byte, with
    `pause`, 2 `pause`, 4 `pause`, ... seconds between; `timeout` is seconds without a byte.

    Raises BadInput if the server cannot be reached, refuses, keeps closing early, or sends
    something else than expected; OSError (ENOSPC) if the disk is full. What was received stays for
    the next run, but for content that is wrong.
    """
    target = folder / file.path
    recorded = read_records(folder)
    expected = file.sha256 or recorded.get(file.path)
    if target.exists():
        found = sha256(target)
        if expected is not None and found != expected:
            raise BadInput(
                f"{target}: checksum {found}, expected {expected}; the file was changed "
                "or belongs to another version: remove it and run again"
            )
        print(f"    {file.path}: already there")
    elif file.unpack and all((folder / path).exists() for _, path in file.unpack):
        print(f"    {file.path}: its files are there")
        return
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        _receive(file, part, attempts, timeout, pause)
        found = _check(file, part, expected, recorded_before=file.sha256 is None)
        _finish(file, part, target, found, expected)
    if recorded.get(file.path) != found:
        write_records(folder, recorded | {file.path: found})
    unpack_all(file, folder)


def _finish(file: RemoteFile, part: Path, target: Path, found: str, expected: str | None) -> None:
    """Give a checked file its name and say so."""
    os.replace(part, target)
    _validator_file(part).unlink(missing_ok=True)
    checksum = "as expected" if expected else f"{found} recorded"
    print(f"    {file.path}: {target.stat().st_size:,} bytes, checksum {checksum}")


def _receive(file: RemoteFile, part: Path, attempts: int, timeout: float, pause: float) -> None:
    """Fill `part` with the whole body, over as many connections as it takes."""
    host = urllib.request.Request(file.url).host
    failures, furthest = 0, _size(part)
    with tqdm(
        desc=f"    {file.path}", total=file.size, unit="B", unit_scale=True, disable=None
    ) as bar:
        while True:
            try:
                if _receive_once(file, part, timeout, bar):
                    return
                problem = "the connection closed early"
            except urllib.error.HTTPError as error:
                problem = f"the server answered {error.code} {error.reason}"
                if error.code not in PASSING_STATUS:
                    raise BadInput(
                        f"{file.url}: {problem}; the address may have changed, or the "
                        f"file needs an account: see its page, {LOCAL_COPIES}"
                    ) from None
            except (
                urllib.error.URLError,
                http.client.HTTPException,
                ConnectionError,
                TimeoutError,
                ssl.SSLError,
            ) as error:
                reason = getattr(error, "reason", None) or error
                problem = str(reason) or type(reason).__name__
                if isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError)):
                    raise BadInput(
                        f"{file.url}: cannot reach {host} ({problem}); check the "
                        f"network and run again, {LOCAL_COPIES}"
                    ) from None
            failures = 0 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures >= attempts:
                raise BadInput(
                    f"{file.url}: {problem}, {attempts} times, with {_size(part):,} "
                    f"bytes received; run again to go on from there, {LOCAL_COPIES}"
                )
            time.sleep(pause * 2 ** max(failures - 1, 0))


def _receive_once(file: RemoteFile, part: Path, timeout: float, bar: tqdm) -> bool:
    """Go on with `part` over one connection; return whether the body is now complete."""
    offset = _size(part)
    validator = _validator_file(part).read_text() if _validator_file(part).exists() else ""
    headers = {"User-Agent": "data.real.downloads", "Accept-Encoding": "identity"}
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
        if response.headers.get_content_type() == "text/html":  # of no source; keep the part
            raise BadInput(
                f"{file.url}: a web page came instead of the file; it may have moved, "
                f"or the network asks to log in: open it in a browser, {LOCAL_COPIES}"
            )
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
    found = sha256(part)
    if found == expected:
        return found
    problem = not_data(part)
    if problem is None and expected is not None:
        origin = "recorded at the first download, in SHA256SUMS" if recorded_before else "expected"
        problem = (
            f"checksum {found}, but {expected} was {origin}: damaged on the way, or changed "
            "by its publishers"
        )
    elif problem is None and (flaw := malformed(part, file.path)):
        problem = f"{flaw}: cut short or damaged on the way"
    if problem is None:
        return found
    part.unlink()
    _validator_file(part).unlink(missing_ok=True)
    raise BadInput(f"{file.url}: {problem}; nothing was kept: run again, {LOCAL_COPIES}")


# --- local copies -------------------------------------------------------------------------------


def take(name: str, source: Source, copies: Path, folder: Path, pattern: str | None) -> None:
    """
    Copy what `copies` holds of a source to `folder`, checked as downloads are.

    A published file is found as FOLDER/NAME/PATH, FOLDER/PATH, or anywhere deeper where the path's
    last two parts or the folder's name say that it is this source's (`_local_copy`); of an archive
    its unpacked members do. Where a published file is not there, files that can stand in for it
    are copied as they are: those that match `pattern` or the source's own. Raises BadInput if
    there is nothing, or a file has another checksum than the published one.
    """
    if not copies.is_dir():
        raise BadInput(f"{copies}: no such folder; expected one with copies of {name}")
    missing, taken = [], 0
    for file in source.files:
        members = [RemoteFile(file.url, path) for _, path in file.unpack]
        found = [
            (part, origin)
            for part in (file, *members)
            if (origin := _local_copy(name, part, copies))
        ]
        for part, origin in found:
            _install(part, origin, folder)
            taken += 1
        if found and found[0][0] is file:
            unpack_all(file, folder)
        elif len(found) < max(1, len(members)):
            missing.append(file.path)
    stand_ins = []
    for expression in filter(None, (source.stand_in, pattern) if missing else ()):
        stand_ins += find_files(copies, expression)
    published = {
        Path(path).name
        for file in source.files
        for path in (file.path, *(path for _, path in file.unpack))
    }
    for origin in dict.fromkeys(stand_ins):
        if origin.name not in published:
            print(f"    {origin.name}: stands in for the published file")
            _install(RemoteFile("", origin.name), origin, folder)
            taken += 1
    if not taken:
        raise BadInput(
            f"{copies}: holds no file of {name}, such as {name}/{source.files[0].path}; "
            f"`--download list {name}` lists them"
        )
    if missing:
        print(f"    not there: {', '.join(missing)}")


def _local_copy(name: str, file: RemoteFile, copies: Path) -> Path | None:
    """Find the copy of one published file under `copies`."""

    def plain(text: str) -> str:
        return re.sub(r"[-_ ]", "", text).lower()

    wanted = Path(file.path)
    flat = {plain(f"{name}/{file.path}".replace("/", "_")), plain(file.path.replace("/", "_"))}
    for origin in (copies / name / wanted, copies / wanted):
        if origin.is_file():
            return origin
    for origin in sorted(copies.rglob("*")):
        same_name = origin.name == wanted.name
        if not (same_name or plain(origin.name) in flat) or not origin.is_file():
            continue
        parent = plain(origin.resolve().parent.name)
        if (
            not same_name
            or parent == plain(name)
            and len(wanted.parts) == 1
            or len(wanted.parts) > 1
            and origin.parts[-2:] == wanted.parts[-2:]
            or file.sha256 is not None
            and sha256(origin) == file.sha256
        ):
            return origin
    return None


def _install(file: RemoteFile, origin: Path, folder: Path) -> None:
    """Copy a local file to its place under `folder`, atomically, and record its checksum."""
    target = folder / file.path
    recorded = read_records(folder)
    expected = file.sha256 or recorded.get(file.path)
    found = sha256(origin)
    problem = None
    if expected is not None and found != expected:
        problem = f"checksum {found}, expected {expected}: another version, or damaged"
    elif expected is None:
        flaw = not_data(origin) or malformed(origin, file.path)
        problem = f"{flaw}: cut short or damaged" if flaw else None
    if problem:
        raise BadInput(f"{origin}: {problem}; give another copy, or move this one away")
    if target.exists() and sha256(target) == found:
        print(f"    {file.path}: already there")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".copy")
        with origin.open("rb") as stream:
            copy(stream, part)
        _finish(file, part, target, found, expected)
    write_records(folder, recorded | {file.path: found})


# --- places -------------------------------------------------------------------------------------


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise BadInput(
            f"{part.parent}: the disk has {free:,} bytes free and {needed:,} more are "
            "to come; make room and run again to go on"
        )


def _validator_file(part: Path) -> Path:
    """Where the ETag or date of the version that `part` belongs to is kept between runs."""
    return part.with_name(part.name + ".version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
