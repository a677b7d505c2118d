"""
Download the sources of sources.py: checked, resumable, and never half a file under its name.

    python -m data.real.prepare --download list
    python -m data.real.prepare --download hh-rlhf gpt2
    python -m data.real.prepare --download hh-rlhf --from FOLDER     # local copies instead

The SHA-256 decides whether a file is there already; a new one gets its name once all of it is there
with that checksum. Where the table has none, the first download's is recorded in NAME.sha256 once
its members are unpacked, and later ones must equal it. Bytes are received into NAME.part. A broken
download goes on from there, in the same run or the next; one whose checksum is not in the table
starts over, since nothing would tell if the file had changed in between.
"""

import errno
import fcntl
import lzma
import os
import re
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.files import BadInput, flush_to_disk, read_text, write_atomic
from data.real.raw import most_unpacked
from data.real.sources import SOURCES, RemoteFile, is_weights
from data.tokenizer import gpt2_encoding, save_tokenizer

import pooch
import requests
from tqdm import tqdm

ATTEMPTS, PAUSE, TIMEOUT = 5, 1.0, 30.0  # connections a run; seconds before the second; of silence
SLOWEST = 60.0  # seconds for 2 KiB; a connection that is slower counts as failed
DAMAGED = (zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
REMEDY = "run again, or get the file by other means and pass its folder to --from"


def download(names: Sequence[str], folder: Path, copies: Path | None = None) -> None:
    """
    Bring the named sources to `folder`/NAME, GPT-2's weights with their tokenizer.

    With a folder of `copies`, files are taken from there and nothing is downloaded. Raises BadInput
    for a file that cannot be had or has another checksum, and if `copies` has no file of a source.
    """
    needed = ["gpt2-bpe"] if any(map(is_weights, names)) else []
    for name in dict.fromkeys([*needed, *names]):
        files, missing = SOURCES[name].files, []
        print(f"{name}: {SOURCES[name].becomes}; licence: {SOURCES[name].licence}")
        with sole(folder / name):
            for file in files:
                copy = copies and find_copy(copies, name, file)
                if copies and not copy and not (folder / name / file.path).exists():
                    missing.append(file.path)
                else:
                    fetch(file, folder / name, copy)
        if len(missing) == len(files):
            raise BadInput(f"{copies}: holds no file of {name}, such as {name}/{missing[0]}")
        if missing:
            print(f"    not there: {', '.join(missing)}")
        if is_weights(name):  # so that the folder is a checkpoint that --init can name
            save_tokenizer(gpt2_encoding(folder / "gpt2-bpe"), folder / name / "tokenizer.json")


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Lock a folder while it is filled. Raises BadInput where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EAGAIN:  # else the file system has no locks
            raise BadInput(f"{folder}: another download is at work; wait for its end") from None
    try:
        yield
    finally:
        os.close(handle)


def fetch(file: RemoteFile, folder: Path, copy: Path | None = None) -> None:
    """
    Bring one file to `folder` unless it is there, from its address or a local copy, and unpack it.

    Raises BadInput if the file cannot be received, is no data or has the wrong checksum.
    """
    target = folder / file.path
    part, record = (target.with_name(target.name + end) for end in (".part", ".sha256"))
    recorded = read_text(record).split()[:1] if record.exists() else []
    known = file.sha256 or (recorded[0].lower() if recorded else None)
    try:
        if not target.exists() or known not in (None, pooch.file_hash(str(target))):
            target.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copyfile(copy, part)
            else:
                receive(file, part)
            check_part(part, known)
            flush_to_disk(part)
            os.replace(part, target)
    except OSError as error:
        error.filename = error.filename or str(part)  # a full disk names none
        raise
    except ValueError as error:
        own = f"; without {record} a new version is accepted" if known and not file.sha256 else ""
        raise BadInput(f"{copy or file.url}: {error}{own}; {REMEDY}") from None
    for member, name in file.unpack:
        unpack(target, member, folder / name)
    if known is None:
        write_atomic(record, f"{pooch.file_hash(str(target))}  {target.name}\n")
    checksum = "as expected" if known else "recorded"
    print(f"    {file.path}: {target.stat().st_size:,} bytes, checksum {checksum}")


def check_part(part: Path, known: str | None) -> None:
    """Delete what is no data or has not the known checksum, and raise ValueError."""
    with part.open("rb") as stream:
        head = stream.read(99).lstrip(b"\xef\xbb\xbf\r\n ")
    fault = "a web page, an error message or nothing came instead of the file"
    if head and not head.startswith((b"<", b"version https://git-lfs")):
        if known in (None, found := pooch.file_hash(str(part))):
            return
        fault = f"the hash does not match: expected sha256:{known} but got {found}"
    part.unlink()
    raise ValueError(fault)


def receive(file: RemoteFile, part: Path) -> None:
    """Fill `part` over up to ATTEMPTS connections. Raises ValueError if that is not enough."""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            return receive_once(file, part)
        except requests.HTTPError as error:
            said = ascii(error.response.reason)[1:-1]  # without characters that steer a terminal
            problem = f"the server answered {error.response.status_code} {said}"
            if error.response.status_code < 500 and error.response.status_code != 429:
                break  # will not pass by waiting
        except requests.RequestException as error:
            problem = f"the connection failed ({type(error).__name__})"
    raise ValueError(problem)


def receive_once(file: RemoteFile, part: Path) -> None:
    """Receive the file, or what `part` lacks of one whose checksum is known. Raises
    RequestException, and ValueError for more than the file can be."""
    have = part.stat().st_size if file.sha256 and part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if have and response.status_code == 416:
            return  # there is no more; the checksum tells whether it is the file
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise ValueError("a web page came instead of the file")
        have = have if response.status_code == 206 else 0
        length = re.fullmatch("[0-9]{1,15}", response.headers.get("Content-Length", ""))
        total = have + int(length[0]) if length else None
        most = 1.1 * file.size + 2**20 if file.size else 2**63  # the table rounds some sizes
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=1, disable=None)
        with bar, part.open("ab" if have else "wb") as stream:
            start = time.monotonic()
            for chunk in response.iter_content(1 << 11):
                bar.update(stream.write(chunk))
                last, start = start, time.monotonic()
                if start - last > SLOWEST:
                    raise requests.Timeout
                if stream.tell() > most:
                    part.unlink()
                    raise ValueError(f"over {most:,.0f} bytes; expected about {file.size:,}")


def unpack(archive: Path, member: str, target: Path) -> None:
    """Write a regular member of a zip or tar file to `target`. Raises BadInput."""
    is_zip, part = zipfile.is_zipfile(archive), target.with_name(target.name + ".part")
    most = most_unpacked(archive)
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
            info = opened.getinfo(member) if is_zip else opened.getmember(member)
            size, mode = (info.file_size, info.external_attr >> 16) if is_zip else (info.size, 0)
            odd = info.is_dir() or stat.S_ISLNK(mode) if is_zip else not info.isreg()
            if odd or size > most:
                raise ValueError(f"expected a regular file of at most {most:,} bytes")
            source = opened.open(info) if is_zip else opened.extractfile(info)
            with source, part.open("wb") as stream:
                shutil.copyfileobj(source, stream)
        flush_to_disk(part)
        os.replace(part, target)
    except (LookupError, EOFError, OSError, RuntimeError, ValueError, *DAMAGED) as error:
        if getattr(error, "errno", None):
            raise  # a full disk, say
        raise BadInput(f"{archive}: {member}: {error}; remove the archive and {REMEDY}") from None
    finally:
        part.unlink(missing_ok=True)


def find_copy(copies: Path, name: str, file: RemoteFile) -> Path | None:
    """Find FOLDER/NAME/PATH or FOLDER/PATH, or by name and checksum a file anywhere below."""
    direct = [path for path in (copies / name / file.path, copies / file.path) if path.is_file()]
    if direct or file.sha256 is None:
        return direct[0] if direct else None
    found = (path for path in sorted(copies.rglob(Path(file.path).name)) if path.is_file())
    return next((path for path in found if pooch.file_hash(str(path)) == file.sha256), None)
