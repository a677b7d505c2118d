"""Bugs planted into the code, to see that a check catches them."""

from __future__ import annotations  # also holds for what `plant` compiles

import inspect
import pkgutil
import sys
import textwrap

import pytest


def plant(patch: pytest.MonkeyPatch, where: str, old: str, new: str) -> None:
    """Let the function `where` ("module.Class.name") be what its source says, with `old` as `new`.

    Raises LookupError unless `old` stands in that source once.
    """
    function = inspect.unwrap(pkgutil.resolve_name(where))
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise LookupError(f"{where} no longer has {old!r} once: update the planted bug")
    made: dict = {}
    exec(source.replace(old, new), vars(sys.modules[function.__module__]), made)
    patch.setattr(where, made[function.__name__])


def read_bugs(table: str) -> list:
    """Parameters (where, old, new, check) of a test, from a table of three lines a bug:

    its name: the function; the checks that must catch it, one test each
        - a piece of that function's source
        + what stands there instead
    """
    lines = table.strip().splitlines()
    bugs = []
    for head, old, new in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name, where, checks = head.replace(";", ":").split(": ")
        for check in checks.split(", "):
            values = (where, old.strip()[2:], new.strip()[2:], check)
            bugs.append(pytest.param(*values, id=f"{name}-{check}"))
    return bugs
