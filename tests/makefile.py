"""The Makefile's commands without running them: `make --dry-run`, and the same with other flags."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def dry_run(target: str, **variables: object) -> list[str]:
    """The commands that `make` would run for a target of which nothing is there, one a line.
    Nothing is resumed or refused for what happens to lie in OUT."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
    command += ["begun=", "resume="]
    command += [f"{name}={value}" for name, value in variables.items()]
    how = {"cwd": ROOT, "env": clean_environment(), "capture_output": True, "text": True}
    return subprocess.run(command, check=True, **how).stdout.replace("\\\n", " ").splitlines()


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what an outer make hands down."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))} | more


def edit(command: Iterable[str], **flags: object) -> tuple[str, ...]:
    """The command with other flags: a list or a string of words, True for a flag without a value,
    None to take the flag away."""
    words = list(command)
    for name, value in flags.items():
        if (flag := f"--{name}") in words:
            start = end = words.index(flag)
            end += 1
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            del words[start:end]
        if value is not None:
            more = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += [flag, *map(str, more)]
    return tuple(words)
