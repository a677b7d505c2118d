"""Curves of what is being trained, drawn again every few seconds from the logs: OUT/watch.png.

    python -m evaluation.watch --out out             until the report is there, or Ctrl-C
    python -m evaluation.watch --out out --once      as it is

A row for each run that has a log.csv, in OUT itself or in a folder of it, and a panel for each of
PANELS whose columns the log has. `make watch` calls it beside `make demo`. It reads and never
writes a log, so it can start and stop at any time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from data.commands import run_command
from data.files import BadInput, check_writable, read_log
from data.flags import Parser

Columns = dict[str, list[float]]  # of a log: column -> a value a row, NaN where the cell is empty

# Title, and the columns drawn into the panel. A column COLUMN_ci beside one that is drawn is the
# half-width of its 95 % interval. A log with other columns only has no panel.
PANELS = (
    ("loss", ("loss", "val_loss")),
    ("loss on pretraining text", ("pretrain_loss", "ptx_loss", "val_pretrain_loss")),
    ("accuracy", ("accuracy", "val_accuracy")),
    ("score", ("score", "val_score")),
    ("score gained", ("score_gain", "val_gain")),
    ("KL to the reference", ("kl", "val_kl")),
)
TRAINING = {"color": "#56B4E9", "linewidth": 1, "markersize": 3}
VALIDATION = {"color": "black", "linewidth": 1, "markersize": 3}
MOST_RUNS = 12  # the newest


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    shape = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=shape)
    add = parser.add_argument
    add("--out", default="out", help="folder of a run, or of several")
    add("--every", type=float, default=10, help="seconds between two looks at the logs")
    add("--patience", type=float, default=600, help="leave when no log has grown for so many")
    add("--once", action="store_true", help="draw and leave")
    args = parser.parse_args(argv)
    for name in ("every", "patience"):
        if not 0.1 <= getattr(args, name) <= 1e9:
            parser.error(f"--{name} {getattr(args, name)}: expected 0.1 to 1e9 seconds")
    return args


# ------------------------------------------------------------------------------------------------
# Logs


def changed_at(path: Path) -> float:
    """Seconds; 0 where the file is absent."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def find_logs(out: Path) -> dict[str, Path]:
    """Run -> its log.csv, of the runs that were at work last; sorted by name."""
    found = {path.parent.name: path for path in out.glob("*/log.csv")}
    if (out / "log.csv").exists():
        found[out.resolve().name] = out / "log.csv"
    newest = sorted(found, key=lambda name: changed_at(found[name]))[-MOST_RUNS:]
    return {name: found[name] for name in sorted(newest)}


def read_columns(path: Path) -> Columns:
    """The whole rows that the log has at this moment; {} where it is absent or has none. What a
    figure cannot hold is left out as NaN."""

    def number(name: str, cell: str) -> float:
        value = float(cell or "nan")
        drawable = abs(value) < 1e30 and (value >= 0 or not name.endswith("_ci"))
        return value if drawable else math.nan

    try:
        rows = read_log(path)
        return {name: [number(name, row[name]) for row in rows] for name in (rows or [{}])[0]}
    except (BadInput, ValueError):  # caught in the middle of a start: there is a next look
        return {}


def panels_of(log: Columns) -> dict[str, list[str]]:
    """Title -> columns, of PANELS whose columns have a number in this log."""
    has = {name for name, values in log.items() if not all(map(math.isnan, values))}
    panels = {title: [name for name in names if name in has] for title, names in PANELS}
    return {title: names for title, names in panels.items() if names}


def finished(out: Path, logs: dict[str, Path], since: float) -> bool:
    """Whether every run has its result, and a report of them was written `since` then."""
    report = changed_at(out / "report" / "report.md")
    ended = all((path.parent / "model.safetensors").exists() for path in logs.values())
    return bool(logs) and ended and report > max(since, *map(changed_at, logs.values()))


# ------------------------------------------------------------------------------------------------
# Figure


def draw(path: Path, runs: dict[str, Columns]) -> None:
    """A row a run, a panel a title; validation has points, and lies over the curve of training."""
    import matplotlib.pyplot as plt  # here, where Ctrl-C is caught: it takes a second

    from evaluation.figures import save_figure

    rows = {name: panels for name, log in runs.items() if (panels := panels_of(log))}
    width, height = max(map(len, rows.values())), len(rows)
    figure, axes = plt.subplots(height, width, figsize=(3.6 * width, 2.3 * height), squeeze=False)
    for row, (run, panels) in zip(axes, rows.items(), strict=True):
        log = runs[run]
        steps = log.get("step") or [*range(1, 1 + len(next(iter(log.values()))))]
        for panel in row[len(panels) :]:
            panel.set_visible(False)
        for panel, (title, names) in zip(row, panels.items(), strict=False):
            for name in names:
                errors = log.get(f"{name}_ci", [math.nan] * len(steps))
                cells = zip(steps, log[name], errors, strict=True)
                x, y, error = zip(*(c for c in cells if not math.isnan(c[1])), strict=True)
                look = VALIDATION if name.startswith("val_") else TRAINING
                panel.plot(
                    x,
                    y,
                    label=name,
                    marker="o" if look is VALIDATION or len(x) == 1 else "",
                    **look,
                )
                if f"{name}_ci" in log:
                    panel.errorbar(x, y, error, color=look["color"], fmt="none", linewidth=1)
            shown = run.encode("ascii", "backslashreplace").decode()
            panel.set_title(f"{shown}: {title}".replace("$", r"\$"))  # no formula
            panel.legend(fontsize=7)
            panel.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    save_figure(figure, path)


def look(out: Path, logs: dict[str, Path]) -> str:
    """Draw the logs; the line that says what was drawn, "" where there is nothing to draw."""
    runs = {name: log for name, path in logs.items() if panels_of(log := read_columns(path))}
    if not runs:
        return ""
    draw(out / "watch.png", runs)
    last = [f"{name} {log['step'][-1]:g}" for name, log in runs.items() if log.get("step")]
    return f"{out / 'watch.png'}: steps {', '.join(last)}"


# ------------------------------------------------------------------------------------------------
# Watching


def watch(args: argparse.Namespace) -> None:
    """Look, draw where a log has changed, wait; until all is done."""
    out, since, grown, seen = Path(args.out), time.time(), time.monotonic(), None
    if out.exists():  # else a demo is about to make it
        check_writable(out)
    if args.once:
        line = look(out, find_logs(out))
        if not line:
            raise BadInput(f"{out}: no run here has a row in its log.csv; train one first")
        print(line)
        return
    while True:
        logs = find_logs(out)
        state = {name: (changed_at(path), path) for name, path in logs.items()}
        if state != seen:
            seen, grown = state, time.monotonic()
            if line := look(out, logs):
                print(line, flush=True)
        if finished(out, logs, since):
            print(f"all runs in {out} are done")
            return
        if time.monotonic() - grown > args.patience:
            print(f"no log in {out} has grown for {args.patience:g} seconds")
            return
        time.sleep(args.every)


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    try:
        watch(args)
    except KeyboardInterrupt:
        print("stopped watching")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
