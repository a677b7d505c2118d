"""Exercises: twelve broken kernels to mend, and six small kernels with missing lines.

    python -m kernels.exercise               the list, from easy to hard
    python -m kernels.exercise 7             write the file of exercise 7, show what fails
    python -m kernels.exercise 7 --check     check that file after your change
    python -m kernels.exercise 7 --hint      one sentence and a picture
    python -m kernels.exercise 7 --solve     the change as a diff

The file lies in out/exercise_07 (or in --out); edit only it. Exercises 1 to 12 are copies of a
kernel file with one wrong line, which you find by reading: the docstring has the mathematics, the
map shows which tiles are wrong. 13 to 18 are short kernels with `...` for one or two lines; the
docstring has the formula. Results are checked against float64, in Triton's interpreter, in a
process of its own, for at most TIME_LIMIT seconds. Any right solution passes that visits no tile in
vain. What you had better not look at yet: the file of the same name in kernels/, and
kernels/exercises/answers.py.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from kernels.exercises.answers import TASKS, Bug, Puzzle

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 150  # seconds a check


class Changed(Exception):
    """A file that the learner has changed."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m kernels.exercise", description=__doc__.split("\n")[0])
    parser.add_argument("number", nargs="?", help="of the exercise; without one: the list")
    parser.add_argument("--out", type=Path, help="folder; default: out/exercise_NUMBER")
    parser.add_argument("--case", type=int, help="check only this one of the file's CASES")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="check your file")
    what.add_argument("--hint", action="store_true", help="one sentence and a picture")
    what.add_argument("--solve", action="store_true", help="show the change")
    what.add_argument("--again", action="store_true", help="write the file anew, over your changes")
    args = parser.parse_args(argv)
    if args.number is None:
        if args.out or args.case is not None or any(vars(args)[w] for w in WORDS):
            parser.error("which exercise? give its number, as in: python -m kernels.exercise 7")
    elif args.number not in map(str, range(1, len(TASKS) + 1)):
        parser.error(f"there is no exercise {args.number!r}; expected 1 to {len(TASKS)}")
    else:
        args.number = int(args.number)
        if args.case is not None and isinstance(TASKS[args.number - 1], Puzzle):
            parser.error(f"--case {args.case}: a puzzle has no numbered cases")
        args.out = args.out or Path("out", f"exercise_{args.number:02}")
    return args


WORDS = ("check", "hint", "solve", "again")


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    if args.number is None:
        for number, task in enumerate(TASKS, 1):
            print(f"{number:3}  {task.operation:10} {task.title}")
        print("Begin one with: python -m kernels.exercise 1")
        return 0
    task = TASKS[args.number - 1]
    path = args.out / task.file
    try:
        if args.check or args.hint:
            text = path.read_text(encoding="utf-8")
        elif args.solve:
            text = ""
        else:
            text = begin(task, path, args.again)
    except FileNotFoundError:
        print(f"error: {path} is not there; begin with {command(args)}", file=sys.stderr)
        return 2
    except Changed:
        words = f"{path} holds changes of yours; --check checks it, --again writes it anew"
        print(f"error: {words}", file=sys.stderr)
        return 2
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2
    if args.solve:
        print(solution(task, path), end="")
        return 0
    if args.hint:
        print(task.hint)
        if isinstance(task, Bug):
            print(
                wrong(task, path, text, task.case)
                or f"Case {task.case} is right now; --check for the others."
            )
        return 0

    found = wrong(task, path, text, args.case)
    if args.check:
        solved = f"Exercise {args.number} is solved: {path} passes its check."
        one = f"Case {args.case} is right; without --case all are checked."
        print(found or (solved if args.case is None else one))
        return int(bool(found))
    print(f"Exercise {args.number}, {task.operation}: {task.title}.\n\n{found}\n")
    print(f"The file to {'fill in' if isinstance(task, Puzzle) else 'mend'}: {path}")
    for word, what in (("check", "after your change"), ("hint", ""), ("solve", "")):
        print(f"    {command(args)} --{word:5}  {what}".rstrip())
    return 0


def command(args: argparse.Namespace) -> str:
    default = args.out == Path("out", f"exercise_{args.number:02}")
    return f"python -m kernels.exercise {args.number}" + ("" if default else f" --out {args.out}")


def begin(task: Bug | Puzzle, path: Path, again: bool) -> str:
    """Write the file of an exercise; returns its text. Raises Changed instead of writing over a
    file that was changed, unless `again`."""
    text = task.task()
    if path.exists() and not again and path.read_text(encoding="utf-8") != text:
        raise Changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


def solution(task: Bug | Puzzle, path: Path) -> str:
    """The change that makes the exercise's file right."""
    before, after = (text.splitlines(True) for text in (task.task(), task.solution()))
    return "".join(difflib.unified_diff(before, after, str(path), "solution"))


def wrong(task: Bug | Puzzle, path: Path, text: str, case: int | None = None) -> str:
    """What is wrong with a file, or nothing."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError as error:
        return f"{path}:{error.lineno}: {error.msg}"
    if isinstance(task, Puzzle):
        holes = [n.lineno for n in nodes if isinstance(n, ast.Constant) and n.value is ...]
        if holes:
            lines = [f"  line {n}: {text.splitlines()[n - 1].strip()}" for n in sorted(holes)]
            return "\n".join(["Still missing:", *lines])
    arguments = [str(path.resolve()), *([] if case is None else [str(case)])]
    judge = [sys.executable, "-W", "ignore", "-m", "kernels.exercises.judge", *arguments]
    how = {"cwd": ROOT, "env": os.environ | {"TRITON_INTERPRET": "1"}}
    try:
        run = subprocess.run(judge, capture_output=True, text=True, timeout=TIME_LIMIT, **how)
    except subprocess.TimeoutExpired:
        return f"It takes over {TIME_LIMIT} seconds: does a loop end?"
    if run.returncode == 0:
        return ""
    if run.returncode == 1 and run.stdout:
        return run.stdout.strip()
    return f"Its process ended with code {run.returncode}. {run.stderr.strip()[-500:]}".strip()


if __name__ == "__main__":
    sys.exit(main())
