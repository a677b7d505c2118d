"""Kill processes at random moments, resume them until done, and compare bit for bit.

    python -m tests.crash                  30 runs of the three training stages, each killed until
                                           it is done
    python -m tests.crash --runs 300 --stages sft ppo
    python -m tests.crash --every_write    die before each single file operation of a run, in turn

A run is killed with SIGKILL, which no process can catch, resumed, killed again, until it is done;
then every file that it left is compared with those of a run that was never interrupted. Clocks are
exempt: timing.csv, and its checksum. Printed are, for each stage, the kills survived, and the bytes
lost: those of the uninterrupted run's files that are missing or differ. Exit code 1 if any differ.

--every_write starts each run over an earlier run of other settings, whose files must all go. The
moment is chosen by an audit hook that Python calls before it opens a file for writing, renames,
removes or makes one. What it does not see is safetensors writing, into a folder
that is thrown away.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "rm", "ppo")


# ------------------------------------------------------------------------------------------------
# The process that is killed: forked from a server that has imported torch once


def serve() -> None:
    """Read requests from stdin, a JSON line each, and run each in a forked child; print the
    child's process number, and its exit status when it ends."""
    import data.label
    import data.tiny.make
    from data.commands import run_command

    import torch._dynamo  # noqa: F401  optimizers import it at first use, which takes seconds

    import evaluate
    import sample
    import train_ppo
    import train_rm
    import train_sft
    from tests import toy

    mains = {
        "sft": train_sft.main,
        "rm": train_rm.main,
        "ppo": train_ppo.main,
        "sample": sample.main,
        "evaluate": evaluate.main,
        "label": data.label.main,
        "tiny_world": data.tiny.make.main,
        "toy": toy.main,
    }
    sample.CHUNK = 4  # prompts: several chunks of the few that there are
    finished: list[int] = []
    for line in sys.stdin:
        while finished:
            os.waitpid(finished.pop(), 0)
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                hook = FileHook(request)
                sys.addaudithook(hook)
                code = run_command(lambda request=request: mains[request["stage"]](request["argv"]))
                hook.done = True
                Path(request["stderr"] + ".count").write_text(str(hook.count))
            except SystemExit as leaving:
                code = leaving.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)
        # Its number stays taken until waitpid, so that a late kill cannot hit another process.
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        print(ended.si_status * (1 if ended.si_code == os.CLD_EXITED else -1), flush=True)
        finished.append(child)


class FileHook:
    """Counts the operations that change files, and does something just before the given ones:
    `at` maps their numbers, from 1, to the number of a signal or to "full" (no space left)."""

    def __init__(self, request: dict):
        self.count, self.done = 0, False
        self.at = {int(number): what for number, what in request["at"].items()}

    def __call__(self, event: str, args: tuple) -> None:
        if self.done or not self.changes_a_file(event, args):
            return
        self.count += 1
        what = self.at.get(self.count)
        if what == "full":
            raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        if what is not None:
            os.kill(os.getpid(), what)

    @staticmethod
    def changes_a_file(event: str, args: tuple) -> bool:
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return bool(writes) and isinstance(args[0], str) and "__pycache__" not in args[0]
        return event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Server:
    """Starts processes within milliseconds."""

    def __init__(self, folder: Path):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.stderr = folder / "stderr"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash", "--serve"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, stage: str, argv: list[str], at: dict[int, int | str] | None = None) -> Run:
        request = {
            "stage": stage,
            "argv": argv,
            "at": at or {},
            "stderr": str(self.stderr),
        }
        self.process.stdin.write((json.dumps(request) + "\n").encode())
        self.process.stdin.flush()
        return Run(self)

    def run(self, stage: str, argv: list[str], at: dict[int, int | str] | None = None) -> Run:
        """Start and wait; the result's `code` is negative for a signal."""
        run = self.start(stage, argv, at)
        run.wait()
        return run

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Run:
    """One training process."""

    def __init__(self, server: Server):
        self.server = server
        self.pid = int(server.process.stdout.readline())
        self.code: int | None = None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end, at most so long; True if it has come."""
        stdout = self.server.process.stdout
        if self.code is None and select.select([stdout], [], [], seconds)[0]:
            self.code = int(stdout.readline())
        return self.code is not None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    @property
    def stderr(self) -> str:
        return self.server.stderr.read_text()

    @property
    def operations(self) -> int:
        """Operations on files that a run which was not killed has made."""
        return int(Path(f"{self.server.stderr}.count").read_text())


# ------------------------------------------------------------------------------------------------
# Comparing


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, hidden ones too, without its clocks."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for name in list(files):
        if name.endswith("timing.csv"):
            del files[name]
        elif name.endswith("SHA256SUMS"):
            lines = files[name].splitlines(keepends=True)
            files[name] = b"".join(line for line in lines if not line.endswith(b"timing.csv\n"))
    return files


def bytes_lost(reference: dict[str, bytes], found: dict[str, bytes]) -> int:
    """Bytes of the reference's files that are missing or differ; a file too many counts as one."""
    lost = sum(name not in reference for name in found)
    for name, content in reference.items():
        other = found.get(name, b"")
        lost += sum(a != b for a, b in zip(content, other, strict=False))
        lost += abs(len(content) - len(other))
    return lost


def same_steps(out: Path) -> bool:
    """timing.csv, where there is one, has a row for each row of log.csv but row 0."""
    logs = [out / name for name in ("log.csv", "timing.csv") if (out / "timing.csv").exists()]
    steps = [[line.split(",")[0] for line in log.read_text().splitlines()] for log in logs]
    steps = [[step for step in each if step != "0"] for each in steps]
    return steps[:1] == steps[1:]


# ------------------------------------------------------------------------------------------------
# Killing


def run_killed(
    server: Server, stage: str, args: list[str], delays: Iterator[float], most: int = 1000
) -> int:
    """Run to the end, killed after each of the delays in seconds; returns the number of kills."""
    kills, more = 0, []
    while True:
        run = server.start(stage, args + more)
        if run.wait(next(delays) if kills < most else None):
            if run.code != 0:
                raise RuntimeError(f"{stage} ended with code {run.code}: {run.stderr}")
            return kills
        run.kill()
        torn = torn_logs(Path(args[args.index("--out") + 1]))
        if torn:
            raise RuntimeError(f"{stage}: after a kill {torn}")
        if run.code == 0:  # it had just ended
            return kills
        kills += 1
        more = ["--resume"]


def torn_logs(out: Path) -> str:
    """What is wrong with log.csv right after a kill: its rows must be steps 0, 1, 2, ... in order
    (0 is optional), of as many cells as the header has; a last line without its end is left to a
    resume to cut off."""
    path = out / "log.csv"
    header, *lines = (path.read_text() if path.exists() else "").split("\n")
    first = 0 if lines and lines[0].startswith("0,") else 1
    for number, line in enumerate(lines[:-1], start=first):
        if line.count(",") != header.count(",") or line.split(",")[0] != str(number):
            return f"row {number} of {path} is {line!r}"
    return ""


def run_dying_at(server: Server, stage: str, args: list[str], number: int) -> None:
    """Die before file operation `number`, then resume to the end, as a person would."""
    run = server.run(stage, args, {number: signal.SIGKILL})
    if run.code == 0:  # there was no such operation
        return
    run = server.run(stage, [*args, "--resume"])
    if run.code == 2 and "other settings" in run.stderr:  # no checkpoint yet: the earlier run's
        run = server.run(stage, args)
    if run.code != 0:
        raise RuntimeError(f"{stage}, operation {number}: code {run.code}: {run.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=30, help="runs, over all stages")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--every_write", action="store_true", help="die at each file operation")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0

    from tests.tiny import make_tiny

    random.seed(args.seed)
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny, server = make_tiny(folder / "tiny"), Server(folder)
        print("stage   runs  kills  identical  bytes lost  seconds")
        for stage in args.stages:
            # The first run waits for the server to import torch, the second one is timed.
            server.run(stage, tiny.args(stage, folder / "earlier", "--seed", "9"))
            started = time.perf_counter()
            server.run(stage, tiny.args(stage, folder / "whole"))
            duration = time.perf_counter() - started
            reference = contents(folder / "whole")
            runs = -(-args.runs // len(args.stages))
            kills = identical = lost = 0
            if args.every_write:  # over an earlier run: its files are removed, which are more
                shutil.copytree(folder / "earlier", folder / "over")
                kills = runs = server.run(stage, tiny.args(stage, folder / "over")).operations
            for number in range(1, runs + 1):
                out = folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                if args.every_write:
                    shutil.copytree(folder / "earlier", out)
                    run_dying_at(server, stage, tiny.args(stage, out), number)
                else:
                    delays = iter(lambda limit=duration: random.uniform(0, limit), None)
                    kills += run_killed(server, stage, tiny.args(stage, out), delays)
                missing = bytes_lost(reference, contents(out))
                identical += missing == 0 and same_steps(out)
                lost += missing
            failed |= identical < runs
            seconds = time.perf_counter() - started
            print(
                f"{stage:6}  {runs:4}  {kills:5}  {identical:9}  {lost:10}  {seconds:7.0f}",
                flush=True,
            )
            for path in ("whole", "earlier", "over", "out"):
                shutil.rmtree(folder / path, ignore_errors=True)
        server.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
