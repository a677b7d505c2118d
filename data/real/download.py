"""
Download the sources of sources.py: checked, resumable, and never half a file under its name.

    python -m data.real.prepare --download list
    python -m data.real.prepare --download hh-rlhf gpt2
    python -m data.real.prepare --download hh-rlhf --from FOLDER     # local copies instead

pooch decides by the SHA-256 whether a file is there already, and gives a new one its name once all
of it is there with that checksum. Where the table has none, the first download's is recorded in
NAME.sha256, and later ones must equal it. Bytes are received into NAME.part. A broken download goes
on from there, in the same run or the next; one whose checksum is not in the table starts over,
since nothing would tell if the file had changed in between.
"""

import os
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from data.files import BadInput, flush_to_disk, write_atomic
from data.real.sources import SOURCES, RemoteFile, is_weights
from data.tokenizer import gpt2_encoding, save_tokenizer

import pooch
import requests
from tqdm import tqdm

ATTEMPTS, PAUSE, TIMEOUT = 5, 1.0, 30.0  # connections a run; seconds before the second; of silence
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


def fetch(file: RemoteFile, folder: Path, copy: Path | None = None) -> None:
    """
    Bring one file to `folder` unless it is there, from its address or a local copy, and unpack it.

    Raises BadInput if the file cannot be received, is no data or has the wrong checksum.
    """
    target = folder / file.path
    part, record = (target.with_name(target.name + end) for end in (".part", ".sha256"))
    known = file.sha256 or (record.read_text().split()[0] if record.exists() else None)

    def fill(url: str, aside: str, _: object) -> None:
        if copy:
            shutil.copyfile(copy, part)
        else:
            receive(url, part, resume=file.sha256 is not None)
        flush_to_disk(part)
        os.replace(part, aside)  # what is wrong is not kept
        with open(aside, "rb") as stream:
            head = stream.read(99).lstrip(b"\xef\xbb\xbf\r\n ")
        if not head or head.startswith((b"<", b"version https://git-lfs")):
            raise ValueError("a web page, an error message or nothing came instead of the file")

    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(file.url, known and f"sha256:{known}", file.path, folder, downloader=fill)
    except OSError as error:
        error.filename = error.filename or str(part)  # a full disk names none
        raise
    except ValueError as error:
        raise BadInput(f"{copy or file.url}: {str(error).rstrip('.')}; {REMEDY}") from None
    if known is None:
        write_atomic(record, f"{pooch.file_hash(str(target))}  {target.name}\n")
    checksum = "as expected" if known else "recorded"
    print(f"    {file.path}: {target.stat().st_size:,} bytes, checksum {checksum}")
    for member, name in file.unpack:
        write_atomic(folder / name, unpack(target, member))


def receive(url: str, part: Path, resume: bool) -> None:
    """Fill `part` over up to ATTEMPTS connections. Raises ValueError if that is not enough."""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            return receive_once(url, part, resume)
        except requests.HTTPError as error:
            problem = f"the server answered {error.response.status_code} {error.response.reason}"
            if error.response.status_code < 500 and error.response.status_code != 429:
                break  # will not pass by waiting
        except requests.RequestException as error:
            problem = f"the connection failed ({type(error).__name__})"
    raise ValueError(problem)


def receive_once(url: str, part: Path, resume: bool) -> None:
    """Receive the file, or with `resume` what `part` lacks of it. Raises RequestException."""
    have = part.stat().st_size if resume and part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if have and response.status_code == 416:
            return  # there is no more; the checksum tells whether it is the file
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise ValueError("a web page came instead of the file")
        have = have if response.status_code == 206 else 0
        total = have + int(response.headers.get("Content-Length", 0)) or None
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=1, disable=None)
        with bar, part.open("ab" if have else "wb") as stream:
            for chunk in response.iter_content(1 << 16):
                bar.update(stream.write(chunk))


def unpack(archive: Path, member: str) -> bytes:
    """Read one member of a zip or tar file, whose links lead nowhere else. Raises BadInput."""
    is_zip = zipfile.is_zipfile(archive)
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
            return opened.read(member) if is_zip else opened.extractfile(member).read()
    except (KeyError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise BadInput(f"{archive}: {member}: {error}; remove the archive and {REMEDY}") from None


def find_copy(copies: Path, name: str, file: RemoteFile) -> Path | None:
    """Find FOLDER/NAME/PATH or FOLDER/PATH, or by name and checksum a file anywhere below."""
    direct = [path for path in (copies / name / file.path, copies / file.path) if path.is_file()]
    if direct or file.sha256 is None:
        return direct[0] if direct else None
    found = (path for path in sorted(copies.rglob(Path(file.path).name)) if path.is_file())
    return next((path for path in found if pooch.file_hash(str(path)) == file.sha256), None)
