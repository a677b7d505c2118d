"""What the Makefile asks before a stage, and what a stage says while it is at work.

    python data/stages.py half                     threads of a stage beside which another one runs
    python data/stages.py free                     of one that runs alone: the cores that are free
    python data/stages.py start RUN OUT FILE GOAL  the line of the stage that makes FILE for GOAL
    python data/stages.py resume FILE NEEDED       --resume, where FILE's training run can go on

The line says which stage this is, of those that this `make` has to run, and how long the rest will
take: "stage 8 of 17, reward model: about 5 min left". These commands need the standard library
alone, so that each takes a moment.

The threads of a program wait for each other after every matrix product. With one of them on a core
that another program uses, all wait for it, and two threads are many times slower than one.
"""

from __future__ import annotations

import csv
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# ------------------------------------------------------------------------------------------------
# Threads


def allowed_cores() -> set[int]:
    """Numbers of the cores that this process may run on; where they are not known, as many."""
    affinity = getattr(os, "sched_getaffinity", None)
    return set(affinity(0)) if affinity else set(range(os.cpu_count() or 1))


def quota(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that a container may use: its quota over its period; or infinity."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            limit, period = " ".join((group / name).read_text() for name in names).split()
            if limit.isdecimal():  # else "max" or -1
                return int(limit) / int(period)
        except (OSError, ValueError):
            pass
    return float("inf")


def busy_and_all(stat: str, cores: Iterable[int]) -> dict[int, tuple[int, int]]:
    """From the text of /proc/stat: core -> clock ticks since the start, those of work and all."""
    ticks = {}
    for core in cores:
        if found := re.search(rf"^cpu{core} (.*)$", stat, re.M):
            counts = [int(word) for word in found[1].split()[:8]]  # the rest is among the users'
            ticks[core] = sum(counts) - sum(counts[3:5]), sum(counts)  # without idle and iowait
    return ticks


def free_cores(seconds: float = 0.5, stat: Path = Path("/proc/stat")) -> int:
    """Cores that no other program uses, of those that are allowed; at least 1.

    Linux counts the clock ticks of each core: over some time, the idle shares of all are added and
    rounded. Elsewhere all cores count as free.
    """
    cores = allowed_cores()
    free = float(len(cores))
    if stat.exists():
        before = busy_and_all(stat.read_text(), cores)
        time.sleep(seconds)
        for core, (busy, total) in busy_and_all(stat.read_text(), cores).items():
            busy_before, total_before = before.get(core, (0, 0))
            free -= (busy - busy_before) / max(1, total - total_before)
    return max(1, int(min(free, quota()) + 0.5))


def threads(alone: bool) -> int:
    """Of a stage; OMP_NUM_THREADS, where it is a whole number, is the choice or, of a half, the
    limit."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    limit = int(given) if given.isdecimal() and len(given) < 5 else 0
    if alone:
        return limit or free_cores()
    half = max(1, int(min(len(allowed_cores()), quota())) // 2)
    return min(half, limit or half)


# ------------------------------------------------------------------------------------------------
# How much of the demo is left


class Stage(NamedTuple):
    title: str
    seconds: float  # on two idle cores with AVX-512
    alone: bool = False  # it waits for all before it, and all after it wait for it


# By what they make, below OUT, in the order in which make starts them. Ranking takes two seconds
# and has no line.
STAGES = {
    "data/card.md": Stage("tiny world", 8, alone=True),
    "base": Stage("base model", 140, alone=True),
    "sft": Stage("SFT", 60),
    "init": Stage("model that PPO starts from", 88),
    "data/train/candidates_1.jsonl": Stage("samples to rank, part 1", 38),
    "data/train/candidates_2.jsonl": Stage("samples to rank, part 2", 38),
    "data/valid/candidates.jsonl": Stage("samples to rank, validation", 5),
    "rm": Stage("reward model", 90, alone=True),
    "ppo_ptx": Stage("PPO-ptx", 170),
    "report/base.json": Stage("measuring base", 18),
    "sft_selected": Stage("choice of the SFT epoch", 5),
    "report/init.json": Stage("measuring the start", 12),
    "ppo": Stage("PPO", 150),
    "report/sft.json": Stage("measuring SFT", 14),
    "report/ppo.json": Stage("measuring PPO", 9),
    "report/ppo_ptx.json": Stage("measuring PPO-ptx", 12, alone=True),
    "report/report.md": Stage("report", 4, alone=True),
}
STEADY = 30  # seconds at the planned speed that are counted before the first stage's


def schedule(todo: Sequence[str], stages: dict[str, Stage] = STAGES) -> dict[str, float]:
    """Planned second at which each stage starts, two at a time; under "" when the last one ends."""
    starts, ends = {}, [0.0, 0.0]
    for name, stage in stages.items():
        if name not in todo:
            continue
        if stage.alone:
            ends = [max(ends)] * 2
        first = ends.index(min(ends))
        starts[name] = ends[first]
        ends[first] += stage.seconds
        if stage.alone:
            ends = [max(ends)] * 2
    return starts | {"": max(ends)}


def seconds_left(planned: float, total: float, elapsed: float) -> float:
    """What is left for a stage that starts `elapsed` seconds after the first one, where `planned`
    of `total` were planned: the planned rest times how slow this machine was so far,

        (total - planned) (elapsed + STEADY) / (planned + STEADY)

    STEADY keeps the first seconds, which say little, from deciding.
    """
    return (total - planned) * (elapsed + STEADY) / (planned + STEADY)


def in_words(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(10, round(seconds, -1)):.0f} s"


def left_to_make(out: str, goals: Sequence[str]) -> list[str]:
    """The stages that `make GOALS` would run, by what they make."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--no-print-directory", f"OUT={out}", *goals]
    command += [f"PYTHON={sys.executable}", "begun=", "resume="]  # any seed; no checkpoint is read
    said = subprocess.run(command, env=clean, capture_output=True, text=True).stdout
    made = re.findall(rf"stages\.py start \S+ {re.escape(out)} (\S+)", said)
    return [name for name in STAGES if name in {name_of(out, path) for path in made}]


def name_of(out: str, path: str) -> str:
    """ "out/rm/model.safetensors" -> "rm"; a name of STAGES."""
    return path.removeprefix(f"{out}/").removesuffix("/model.safetensors")


class Busy(Exception):
    """Two programs would write the same files."""


def is_make(process: str) -> bool:
    """Whether a process with this number is a `make` at work; on Linux, else never."""
    try:
        return process.isdecimal() and "make" in Path(f"/proc/{process}/comm").read_text()
    except OSError:
        return False


def start(run: str, out: str, path: str, goals: Sequence[str]) -> str:
    """The line of a stage that starts, "" for one that has none.

    OUT/timing.csv has a row for each stage that this `make` runs, with the clock at its start. RUN
    tells it from others: the second of its start, a full stop, its process. Of two stages that
    start at once, one waits for the other here. Raises `Busy` while another `make` is at work.
    """
    name, now = name_of(out, path), time.time()
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out, "timing.csv"), "a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        every = list(csv.DictReader(file))
        for other in {row.get("run") or "" for row in every} - {run}:
            if is_make(process := other.partition(".")[2]):
                at_work = f"another make (process {process}) is at work in it"
                raise Busy(f"OUT={out}: {at_work}; wait for its end, or give another OUT")
        rows = [row for row in every if row.get("run") == run]
        rows = rows or [{"run": run, "stage": s, "clock": ""} for s in left_to_make(out, goals)]
        mine = [row for row in rows if row["stage"] == name]
        if not mine:
            return ""
        mine[0]["clock"] = f"{now:.1f}"
        file.truncate(0)
        writer = csv.DictWriter(file, ["run", "stage", "clock"])
        writer.writeheader()
        writer.writerows(rows)
    clocks = {row["stage"]: float(row["clock"]) for row in rows if row["clock"]}
    plan = schedule([row["stage"] for row in rows])
    planned = max(plan[begun] for begun in clocks)  # one may start later than the plan has it
    left = seconds_left(planned, plan[""], now - min(clocks.values()))
    title = STAGES[name].title
    return f"stage {len(clocks)} of {len(rows)}, {title}: about {in_words(left)} left"


# ------------------------------------------------------------------------------------------------
# A stage that was stopped, and one that is at work


def can_resume(path: str, needed: Iterable[str]) -> bool:
    """Whether the run that makes `path` has checkpoints, all newer than all files in `needed`.
    An older one is of a run before a change, whose result would be written again."""
    saved = Path(path).parent.glob(f"checkpoints/{'[0-9]' * 8}/state.pt")
    oldest = min((file.stat().st_mtime_ns for file in saved), default=0)
    return all(os.path.exists(file) and os.stat(file).st_mtime_ns < oldest for file in needed)


def progress(items: Sequence[Any], name: str, unit: str) -> Iterator[Any]:
    """The items, with a bar on a terminal. Under make, where two stages share it, and where there
    is no terminal: whole lines instead, after each quarter, five seconds apart at least."""
    if sys.stderr.isatty() and "MAKELEVEL" not in os.environ:
        from tqdm import tqdm

        yield from tqdm(items, desc=name, unit=unit)
        return
    said, total = time.monotonic(), len(items)
    for done, item in enumerate(items, start=1):
        yield item
        quarter = 4 * (done - 1) // total < 4 * done // total < 4
        if quarter and time.monotonic() - said >= 5:
            said = time.monotonic()
            print(f"{name}: {done} of {total} {unit}s", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    command, *rest = argv or [""]
    if command in ("half", "free"):
        print(threads(alone=command == "free"))
    elif command == "start" and len(rest) >= 3:
        try:
            line = start(*rest[:3], rest[3:])
        except Busy as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (OSError, ValueError, KeyError, csv.Error):  # for want of a line no stage fails
            line = ""
        if line:
            print(line, flush=True)
    elif command == "resume" and len(rest) >= 2:
        print("--resume" if can_resume(rest[0], rest[1:]) else "")
    else:
        forms = "start RUN OUT FILE [GOAL ...], or resume FILE NEEDED ..."
        print(f"error: expected half, free, {forms}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
