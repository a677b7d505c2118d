"""Whose an output is: every command claims its --out before it works.

    claim(args.out, "sft", {"init": "out/base", "data": "out/data/train/demonstrations.jsonl"})

It is refused with one line, and nobody's file is touched, where the command would overwrite what it
reads, or anything but an earlier result of the same kind, and where another process is at work.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import re
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from data import files
from data.files import BadInput

FOLDERS = ("checkpoints", "epochs", "steps")  # of a run; models under names of its own
OWN = re.compile(r"checkpoints/[0-9]{8}|(epochs|steps)/[0-9]+")  # others there are the user's
MODEL = ("config.json", "tokenizer.json", "model.safetensors")  # a model's files
RUN = (*FOLDERS, *MODEL, "log.csv", "timing.csv")
PAGE = ("*.md", "*.csv", "*.txt", "*.png", "parts", "samples.jsonl")
DATA = ("train", "valid", "test", "tokenizer.json")
HEAD = 2**16  # characters of a file that tell what it is


class Kind(NamedTuple):
    """One kind of result, and how an earlier one is known.

    An output that is a file, of JSON, by the keys of its first object: ("ranks", "!noise") has
    ranks and no noise. A folder by a file in it, its mark, whose text begins with a pattern.
    """

    keys: tuple[str, ...] = ()  # of a file
    mark: str = ""  # the file, of a folder
    pattern: str = ""
    writes: tuple[str, ...] = ()  # names, or patterns of names, in a folder; "*": it is replaced
    never: tuple[str, ...] = ()  # what is not there, without the mark, whatever was interrupted


def run_of(stage: str) -> Kind:
    pattern = rf'(?s).*"stage": "{stage}"'
    return Kind((), "config.json", pattern, RUN, ("model.safetensors",))


KINDS = {
    "candidates": Kind(("responses", "models", "!ranks")),
    "simulated comparisons": Kind(("ranks", "noise")),
    "comparisons by hand": Kind(("ranks", "!noise")),
    "measurement": Kind(("name", "settings", "models")),
    "selection": Kind((), "selection.csv", "epoch,", ("*",)),
    **{stage: run_of(stage) for stage in ("base", "sft", "rm", "ppo")},
    "report": Kind((), "report.md", "# What each step did", PAGE),
    "report on public sets": Kind((), "report.md", "# Public sets", PAGE),
    "folds": Kind((), "folds.md", "# Reward models", ("fold_*", "folds.*")),
    "tiny world": Kind((), "world.json", r'\{\s*"seed": ', (*DATA, "world.json", "card.md"), DATA),
    "data set": Kind((), "account.txt", "", (*DATA, "account.txt"), ("model.safetensors",)),
}
SELECTION = {*MODEL, "selection.csv", "SHA256SUMS"}

_held: dict[Path, tuple[int, list[Path]]] = {}  # this process's locks: file, folders made for it


def check_inputs(out: str, kind: str, inputs: Mapping[str, Any]) -> None:
    """Raise `BadInput` where the result would overwrite an input: path, paths or name -> path."""
    real, writes = Path(os.path.realpath(out)), KINDS[kind].writes
    what, name = "folder" if writes else "file", Path(out).name
    if not out.strip() or not name.strip(".") or out.endswith("/") and not writes:
        raise BadInput(f"--out {out!r}: expected the name of a {what}")
    if len(os.fsencode(name)) > 200 or not name.isprintable():
        raise BadInput(f"--out {out!r}: expected a name of at most 200 bytes, all printable")
    if any(f.name in FOLDERS and _is_run(f.parent) for f in (real, *real.parents)):
        raise BadInput(f"--out {out}: lies among the models that a run keeps; give another {what}")
    for flag, given in inputs.items():
        given = given.values() if isinstance(given, Mapping) else given
        for path in [given] if isinstance(given, (str, Path)) else given or ():
            read = Path(os.path.realpath(path))
            same = real.exists() and read.exists() and read.samefile(real)  # two mounts of one
            inside = read.relative_to(real).parts if read.is_relative_to(real) else ()
            same = same or read == real
            if same or inside and any(fnmatch(inside[0], name) for name in writes):
                raise BadInput(f"--out {out} would replace --{flag} {path}: give another {what}")
            files.check_text(str(path), f"--{flag} {path!r}:")  # it stands in what is written


def claim(out: str, kind: str, inputs: Mapping[str, Any]) -> None:
    """Make `out`, a result of a kind in KINDS, this process's until `release` or its end.

    Raises `BadInput` if it would overwrite an input or something else than such a result, cannot be
    written, or is another process's. A killed process's claim counts no more, and what it has left
    half-written is removed.
    """
    check_inputs(out, kind, inputs)
    path, writes = Path(out), KINDS[kind].writes
    if path.exists() and (not path.is_dir() if writes else not path.is_file()):
        raise BadInput(f"--out {out}: expected a {'folder' if writes else 'file'}, or nothing")
    if "*" in writes and (path.is_symlink() or os.path.ismount(path)):
        raise BadInput(f"--out {out}: is replaced whole, which a link or mount point cannot be")
    real = Path(os.path.realpath(out))
    made = [folder for folder in (real, *real.parents) if not folder.exists()]
    # Beside the output; a folder can be writable where the one around it is not, as a mount.
    inside = writes and "*" not in writes and real.exists() and not os.access(real.parent, os.W_OK)
    place = real if inside else real.parent
    files.check_writable(place)
    _lock(place / f".{real.name}.lock", out, made)
    files.remove_leftovers(place, real.name)
    _check_kind(path, kind)
    if writes:
        files.check_writable(path)
        for folder in (path, *(path / name for name in writes if (path / name).is_dir())):
            files.remove_leftovers(folder, *writes if folder == path else "*")


def check_claims() -> None:
    """Raise `BadInput` unless the locks are still this process's: a person may have deleted one, or
    moved the folder around it, and another process may be at work."""
    for path, (lock, _) in _held.items():
        if not _is_file(path, lock):
            fault = "was removed or replaced while this process was at work"
            raise BadInput(f"{path}: {fault}; look who writes there, and start again")


def kept_folders(out: Path) -> list[Path]:
    """What runs have made under checkpoints/, epochs/ and steps/; there the oldest first."""
    found = [f for name in FOLDERS for f in sorted((out / name).glob("*"))]
    found = [f for f in found if OWN.fullmatch(f"{f.parent.name}/{f.name}")]
    return [f for f in found if f.is_dir() and not f.is_symlink()]


def release() -> None:
    """Give back all that this process has claimed; a folder made for nothing goes, too."""
    while _held:
        path, (lock, made) = _held.popitem()
        with suppress(OSError):
            if _is_file(path, lock):
                path.unlink()
        for folder in made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
        os.close(lock)


atexit.register(release)


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(path: Path, out: str, made: list[Path]) -> None:
    """Take the lock file, which the system gives free when its owner dies; say whose it is."""
    if path in _held:
        return
    if path.is_symlink() or path.exists() and not path.is_file():
        raise BadInput(f"{path}: expected the lock of --out {out}; move that away")
    me = f"process {os.getpid()} on {socket.gethostname()}"
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except PermissionError:  # another user's
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        owner = os.pread(lock, 500, 0).decode("utf-8", "replace").strip()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = False
        except OSError as error:  # a file system without locks: then its owner's name tells
            taken = error.errno in (errno.EAGAIN, errno.EACCES) or _alive(owner)
        if owner and not re.fullmatch(r"process \d+ on \S+", owner):
            os.close(lock)
            raise BadInput(f"{path}: expected the lock of --out {out}; move that away")
        if taken:
            os.close(lock)
            fault = f"--out {out}: {owner or 'another process'} is at work on it"
            raise BadInput(f"{fault}; wait for its end, or give another")
        if _is_file(path, lock):
            break
        os.close(lock)  # its owner has ended, and removed it, meanwhile
    with suppress(OSError):  # read-only
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{me}\n".encode(), 0)
    _held[path] = lock, made


def _alive(owner: str) -> bool:
    """Whether "process N on HOST" may be at work; nothing is known of other hosts."""
    number, _, host = owner.removeprefix("process ").partition(" on ")
    return bool(host) and (host != socket.gethostname() or Path(f"/proc/{number}").exists())


def _is(kind: Kind, mark: Path) -> bool:
    if not stat.S_ISREG(mark.stat().st_mode):
        return False
    with mark.open(encoding="utf-8-sig", errors="replace") as file:
        if kind.mark:
            return bool(re.match(kind.pattern, file.read(HEAD)))
        line = next((line for line in file if line.strip()), "")
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        return isinstance(record, dict) and all(
            (key.strip("!") in record) != key.startswith("!") for key in kind.keys
        )
    return False


def _check_kind(path: Path, name: str) -> None:
    """Raise `BadInput` if `path` holds something that is no earlier result of this kind."""
    kind, odd = KINDS[name], []
    if not kind.writes:
        if path.exists() and path.stat().st_size and not _is(kind, path):
            odd = ["something else"]
    elif path.exists():
        there = {f.name for f in path.iterdir() if not files.LEFTOVER.fullmatch(f.name)}
        there -= {f".{path.name}.lock", ".DS_Store"}
        found = {n: k for n, k in KINDS.items() if k.mark in there and _is(k, path / k.mark)}
        foreign = [f for f in kept_folders(path) if not _is_own(kind, f)]
        if "*" in kind.writes:
            odd = sorted(there - SELECTION if name in found else there)
        elif kind.mark in there and name not in found:
            odd = [f"a result of kind {next(iter(found), 'unknown')}"]
        else:
            others = [n for n, k in found.items() if n != name and _clash(k, kind)]
            odd = [f"a result of kind {n}" for n in others]
            odd += [] if kind.mark in there else sorted(there & set(kind.never))
            odd += [f"{f.parent.name}/{f.name}" for f in foreign]
    if odd:
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        remedy = "give another, or move that away"
        raise BadInput(f"--out {path}: holds {odd[0]}{more}, and no earlier {name}; {remedy}")


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "model.safetensors", "log.csv"))


def _is_own(kind: Kind, folder: Path) -> bool:
    """Whether a model among those of a run is of a run of this kind, damaged or not."""
    config, names = folder / "config.json", {file.name for file in folder.iterdir()}
    other = config.exists() and '"stage": ' in config.read_text("utf-8", "replace")
    ours = names <= {*RUN, "state.pt", "SHA256SUMS"} and (not other or _is(kind, config))
    return kind.writes == RUN and ours


def _clash(one: Kind, other: Kind) -> bool:
    """Whether two kinds write the same name; names may be patterns."""
    both = [(a, b) for a in one.writes for b in other.writes]
    return any(fnmatch(a, b) or fnmatch(b, a) for a, b in both)
