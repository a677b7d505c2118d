"""Whose an output is: every command claims its --out before it works.

    claim(args.out, "sft", {"init": "out/base", "data": "out/data/train/demonstrations.jsonl"})

It is refused with one line, and nothing is touched, where the command would overwrite what it
reads, or anything but an earlier result of the same kind, and where another process is at work.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from data import files
from data.files import BadInput

RUN = ("checkpoints", "epochs", "steps", "model.safetensors", "config.json", "tokenizer.json")
RUN += ("log.csv", "timing.csv")
PAGE = ("*.md", "*.csv", "*.txt", "*.png", "parts", "samples.jsonl")
DATA = ("train", "valid", "test", "tokenizer.json")
OWN = r"checkpoints/[0-9]{8}|(epochs|steps)/[0-9]+"  # a run's models; others there are the user's
HEAD = 2**16  # bytes of a file that tell what it is


class Kind(NamedTuple):
    """One kind of result, and how it is known: by the beginning of the output or of its `mark`."""

    mark: str  # a file in the output; "": the output is itself a file
    words: str  # a pattern
    writes: tuple[str, ...] = ()  # names in the output; "*": it is replaced as a whole
    after: tuple[str, ...] = ()  # those of them that are never there without the mark


def run_of(stage: str) -> Kind:
    return Kind("config.json", rf'(?s).*"stage": "{stage}"', RUN, ("model.safetensors",))


KINDS = {
    "candidates": Kind("", r'\{(?!.*"ranks": ).*"responses": .*"models": '),
    "simulated comparisons": Kind("", r'\{.*"ranks": .*"noise": '),
    "comparisons by hand": Kind("", r'\{(?!.*"noise": ).*"ranks": '),
    "measurement": Kind("", r'\{"name": .*"settings": '),
    "selection": Kind("selection.csv", "epoch,", ("*",), ("*",)),
    **{stage: run_of(stage) for stage in ("base", "sft", "rm", "ppo")},
    "report": Kind("report.md", "# What each step did", PAGE),
    "report on public sets": Kind("report.md", "# Public sets", PAGE),
    "folds": Kind("folds.md", "# Reward models", ("fold_*", "folds.*")),
    "tiny world": Kind("world.json", r"\{", (*DATA, "world.json", "card.md"), DATA),
    "data set": Kind("account.txt", "", (*DATA, "account.txt"), ("model.safetensors",)),
}
SELECTION = {"config.json", "model.safetensors", "tokenizer.json", "selection.csv", "SHA256SUMS"}

_held: dict[Path, tuple[Any, bool]] = {}  # this process's locks: file, was its folder made for it


def check_inputs(out: str, kind: str, inputs: Mapping[str, Any]) -> None:
    """Raise `BadInput` where the result would overwrite an input: path, paths or name -> path."""
    real, writes = Path(os.path.realpath(out)), KINDS[kind].writes
    what = "folder" if writes else "file"
    if not out.strip() or not Path(out).name.strip(".") or out.endswith("/") > bool(writes):
        raise BadInput(f"--out {out!r}: expected the name of a {what}")
    if re.search(rf"/({OWN})(/|$)|/(checkpoints|epochs|steps)$", str(real)):
        raise BadInput(f"--out {out}: lies among the models that a run keeps; give another {what}")
    for name, given in inputs.items():
        given = given.values() if isinstance(given, Mapping) else given
        for path in [given] if isinstance(given, (str, Path)) else given or ():
            read = Path(os.path.realpath(path))
            first = read.relative_to(real).parts[:1] if read.is_relative_to(real) else None
            if first == () or first and any(fnmatch(first[0], pattern) for pattern in writes):
                raise BadInput(f"--out {out} would replace --{name} {path}: give another {what}")


def claim(out: str, kind: str, inputs: Mapping[str, Any]) -> None:
    """Make `out`, a result of a kind in KINDS, this process's until `release` or its end.

    Raises `BadInput` if it would overwrite an input or something else than such a result, cannot be
    written, or is another process's. A killed process's claim counts no more, and what it has left
    half-written is removed.
    """
    check_inputs(out, kind, inputs)
    path, writes = Path(out), KINDS[kind].writes
    whole = not writes or "*" in writes
    if path.exists() and (not path.is_dir() if writes else not path.is_file()):
        raise BadInput(f"--out {out}: expected a {'folder' if writes else 'file'}, or nothing")
    if "*" in writes and (path.is_symlink() or os.path.ismount(path)):
        raise BadInput(
            f"--out {out}: is replaced as a whole, which a link or mount point cannot be"
        )
    folder = path.parent if whole else path
    made = not folder.exists()
    files.check_writable(folder)
    _lock(folder / (f".{path.name}.lock" if whole else ".lock"), out, made)
    files.remove_leftovers(folder, path.name if whole else "")
    _check_kind(path, kind)


def release() -> None:
    """Give back all that this process has claimed; a folder made for nothing goes, too."""
    while _held:
        path, (file, made) = _held.popitem()
        with suppress(OSError):
            path.unlink()
            if made:
                path.parent.rmdir()  # not of one with something in it
        file.close()


atexit.register(release)


def _lock(path: Path, out: str, made: bool) -> None:
    """Take the lock file, which the system gives free when its owner dies; say whose it is."""
    path = path.resolve()
    if path in _held:
        return
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                owner = file.read(200).strip() or "another process"
                file.close()
                fault = f"--out {out}: {owner} is at work on it"
                raise BadInput(f"{fault}; wait for its end, or give another") from None
            # Some file systems have no locks; then the name of the owner is all there is.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # its owner has ended, and removed it, meanwhile
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file, made


def _is(kind: Kind, mark: Path) -> bool:
    with mark.open("rb") as file:
        return bool(re.match(kind.words, file.read(HEAD).decode("utf-8", "replace").lstrip("﻿")))


def _check_kind(path: Path, name: str) -> None:
    """Raise `BadInput` if `path` holds something that is no earlier result of this kind."""
    kind, odd = KINDS[name], []
    if not kind.writes:
        if path.exists() and path.stat().st_size and not _is(kind, path):
            odd = ["something else"]
    else:
        there = {f.name for f in path.iterdir()} if path.exists() else set()
        there = {f for f in there if f != ".lock" and not files.LEFTOVER.fullmatch(f)}
        marked = {n: k for n, k in KINDS.items() if k.writes and k.mark in there}
        found = {n: k.writes for n, k in marked.items() if _is(k, path / k.mark)}
        if "*" in kind.writes:
            odd = sorted(there - SELECTION if name in found else there)
        elif kind.mark in there and name not in found:
            odd = [f"a result of kind {next(iter(found), 'unknown')}"]
        else:
            odd = [f"a result of kind {n}" for n in found if n != name and _clash(found[n], kind)]
            odd += [] if kind.mark in there else sorted(there & set(kind.after))
    if odd:
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        remedy = "give another, or move that away"
        raise BadInput(f"--out {path}: holds {odd[0]}{more}, and no earlier {name}; {remedy}")


def _clash(names: tuple[str, ...], kind: Kind) -> bool:
    """Whether one of the names, or patterns of names, is also written by a kind."""
    return any(fnmatch(a, b) or fnmatch(b, a) for a in names for b in kind.writes)
