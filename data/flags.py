"""Flags of all commands: numbers that know their range, one line for what is wrong."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any


def _number(kind: type, low: float, high: float, expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    return parse


natural = _number(int, 1, 2**20, f"a whole number from 1 to {2**20}")
whole = _number(int, 0, 2**32, f"a whole number from 0 to {2**32}")
number = _number(float, -1e30, 1e30, "a number")
nonnegative = _number(float, 0, 1e30, "a number from 0")
fraction = _number(float, 0, 1, "a number from 0 to 1")
ratio = _number(float, 0, 1024, "a number from 0 to 1024")


def temperature(text: str) -> float:
    """0, or what logits can be divided by without overflow."""
    if 0 < (value := nonnegative(text)) < 1e-6:
        raise argparse.ArgumentTypeError(f"{text}: expected 0, or a number from 1e-6")
    return value


def part(text: str) -> tuple[int, int]:
    """ "1/2" -> (1, 2)."""
    number, _, parts = text.partition("/")
    numeric = (number + parts).isdecimal() and max(len(number), len(parts)) < 9 and number and parts
    if not (numeric and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: expected 1/2 for the first of two parts")
    return int(number), int(parts)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of all flags; takes no flag as empty."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e3 is a number, too

    def parse_known_args(self, *args, **kwargs) -> tuple[argparse.Namespace, list[str]]:
        known, more = super().parse_known_args(*args, **kwargs)
        for action in self._actions:
            if getattr(known, action.dest, None) == "" != action.default:
                self.error(f"{action.option_strings[0]} is empty: expected a value")
        return known, more

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


class Named(argparse.Action):
    """["sft=out/sft", ...] -> {"sft": "out/sft", ...}, in order; no name may come twice."""

    def __call__(self, parser, args, items, flag=None) -> None:
        named = dict(getattr(args, self.dest) or {})  # the flag may come more than once
        for item in items:
            name, _, value = item.partition("=")
            if not (name and value) or name in named:
                parser.error(f"{flag} {item!r}: expected NAME=VALUE with a name of its own")
            named[name] = value
        setattr(args, self.dest, named)
