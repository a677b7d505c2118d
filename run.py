"""A run's manners: the flags that every run has, exact resume, signals, logs, clocks.

A script keeps its loop, its models and its optimizers, and tells a `Run` about them:

    run = Run(args, "sft", result=model, tokenizer=path, state={"model": model, "adam": adam})
    for step in run.steps(total):        # from the newest checkpoint on
        ...
        run.add({"loss": loss})          # sums up a column of this step's row
        run.lap("step_s", tokens)        # seconds since the last lap
        run.log({"lr": lr})              # a row of log.csv, a line; stops where it is not finite
    return run.finish()                  # the result, for the next stage

What follows the loop's body on the next turn is "save if due, leave if asked". Every random draw of
step i is a function of the seed and of i, and so is every batch: what `state` lists, the logs and
the step are all there is to save, and a run that was killed and resumed is the uninterrupted run,
on a CPU bit for bit.

    OUT/model.safetensors, config.json, tokenizer.json    the result
    OUT/checkpoints/<step>/   those, state.pt, the logs so far, checksums; the newest two are kept
    OUT/epochs/<n>/, steps/<n>/                           models that `Run.keep` was asked to keep
    OUT/log.csv, timing.csv   one row a step; what a clock says is apart, so that logs of equal runs
                              are equal
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import kernels
from checkpoint import find_model, read_info, save_model
from data import files
from data.files import BadInput, fingerprint, write_atomic

# ------------------------------------------------------------------------------------------------
# Flags


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
positive = _number(float, 1e-30, 1e30, "a number over 0")
fraction = _number(float, 0, 1, "a number from 0 to 1")


def parser(doc: str, *, out: str, save_every: int) -> argparse.ArgumentParser:
    """A parser with the flags that every run has; the script adds the method's."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    flag = argparse.BooleanOptionalAction
    add("--out", default=out, help="folder of the run")
    add("--max_prompt_tokens", type=natural, default=96, help="longer prompts are dropped")
    add("--max_new_tokens", type=natural, default=32, help="limit of a response, in tokens")
    add("--save_every", type=whole, default=save_every, help="steps between checkpoints; 0: last")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--seed", type=whole, default=0, help="of all random draws")
    add(
        "--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="to compute on"
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    add("--grad_checkpointing", action=flag, default=False, help="less memory, more time")
    add("--kernels", type=kernels.implementation, default="auto", help="auto, torch, triton, ...")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, and check what no flag can know by itself; exits with code 2 and one line."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is empty: expected a path")
        if isinstance(value, str) and name not in ("out", "device", "dtype", "kernels"):
            if os.path.realpath(value) == os.path.realpath(args.out):
                parser.error(f"--out {args.out} is --{name}, which it would replace: give another")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU; give --device cpu")
    return args


def check_context(args: argparse.Namespace, *models: nn.Module) -> None:
    """Raise `BadInput` unless the longest prompt and its response fit into every context."""
    context = min(model.config.n_positions for model in models)
    if args.max_prompt_tokens + args.max_new_tokens > context:
        raise BadInput(
            f"--max_prompt_tokens {args.max_prompt_tokens} and --max_new_tokens "
            f"{args.max_new_tokens} come to more than the context of {context}: lower one"
        )


# ------------------------------------------------------------------------------------------------
# The run


class Run:
    """One run into --out. It owns no loop, no model and no optimizer."""

    KEEP = 2  # checkpoints
    FREE = ("out", "resume", "save_every", "keep_every", "print_samples")  # decide no number

    def __init__(
        self,
        args: argparse.Namespace,
        stage: str,
        *,
        result: nn.Module,
        tokenizer: str | Path,
        state: dict[str, Any],
        shows: str = "",
        print_every: int = 1,
    ):
        """`result`: the model that is handed on. `tokenizer`: its file, or a model's folder.
        `state`: name -> model or optimizer, all that a resume restores. `shows`: the columns that
        are printed, every `print_every` steps and where a validation is.

        Without --resume the run starts over; an earlier result in --out stays until the first
        checkpoint. With it, raises `BadInput` if the settings, or a file read, are other ones.
        """
        self.args, self.out, self.result, self.state = args, Path(args.out), result, state
        self.shows, self.print_every = shows.split(), print_every
        tokenizer = find_model(tokenizer)
        path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        self.tokenizer_json = path.read_text(encoding="utf-8")
        settings = {k: v for k, v in vars(args).items() if k not in self.FREE}
        data = [getattr(args, name, None) for name in ("data", "pretrain_data")]
        self.info = {
            "stage": stage,
            "data": [path for path in data if path],
            "settings": settings | {"sha256": _fingerprints(args)},
        }
        self.done, self.fresh, self.resumed_from = 0, True, None
        files.check_writable(self.out)
        for folder in (self.out, self.out / "checkpoints", self.out / "epochs", self.out / "steps"):
            files.remove_leftovers(folder)
        if args.resume:
            self._restore()
        self.log_file = Log(self.out / "log.csv", self.resumed_from)
        self.timing_file = Log(self.out / "timing.csv", self.resumed_from)

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left, up to `total`; saves and leaves between them.

        Each begins with torch's random numbers seeded by (seed, step). Ctrl-C and SIGTERM finish
        the step, save and leave with code 130 or 143; a second one leaves at once.
        """
        self.total, stopped = total, []

        def on_signal(number: int, _) -> None:
            stopped.append(number)
            for either in (signal.SIGINT, signal.SIGTERM):
                signal.signal(either, signal.SIG_DFL)

        for either in (signal.SIGINT, signal.SIGTERM):
            signal.signal(either, on_signal)
        print(
            f"{self.out.name}: {self.result.num_parameters:,} parameters, {self.args.device}, "
            f"{self.args.dtype}, kernels {kernels.resolve(self.args.kernels, self.args.device)}; "
            f"{total} steps of {self.args.batch_size}, from {self.done}",
            flush=True,
        )
        for step in range(self.done + 1, total + 1):
            self.step, self.sums, self.kept = step, {}, None
            self.clocks, self.last_lap = {"step": step}, time.perf_counter()
            torch.manual_seed(self.args.seed * 1_000_003 + step)
            yield step
            if stopped or self.kept or self.due(self.args.save_every):
                self._save()
            if stopped and step < total:
                print(f"stopped by a signal after step {step}; --resume goes on", file=sys.stderr)
                raise SystemExit(128 + stopped[0])

    def due(self, every: int) -> bool:
        """Whether this step is one of every so many (0: none), or the last."""
        return self.step == self.total or (every > 0 and self.step % every == 0)

    def add(self, values: dict[str, Any], share: float | torch.Tensor = 1.0) -> None:
        """Add `share` of each value to its column of this step's row."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double() * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def max(self, values: dict[str, Any]) -> None:
        """Raise a column of this step's row to the value, where that is larger."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double()
            self.sums[name] = torch.maximum(self.sums.get(name, value), value)

    def lap(self, name: str, tokens: int | None = None) -> None:
        """Seconds since the last lap, a column of timing.csv; with `tokens`, also their rate."""
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.clocks[name] = now - self.last_lap
        self.last_lap = now
        if tokens is not None:
            self.clocks["tok_per_s"] = tokens / self.clocks[name]

    def log(self, row: dict[str, float | int | None]) -> None:
        """Write `row` and what was added to log.csv and the laps to timing.csv; print if due.

        The first row sets the columns: later ones have the same, None for an empty cell. A value
        that is not finite ends the run with code 1, before anything of this step is saved.
        """
        row = {"step": self.step} | row | {name: v.item() for name, v in self.sums.items()}
        bad = [f"{k} {v}" for k, v in row.items() if v is not None and not math.isfinite(v)]
        if bad:
            print(
                f"error: step {self.step}: not finite: {', '.join(bad)}; checkpoints are kept; "
                "start over with a lower learning rate",
                file=sys.stderr,
            )
            raise SystemExit(1)
        self.log_file.write(row)
        seconds = sum(v for k, v in self.clocks.items() if k.endswith("_s") and k != "tok_per_s")
        self.clocks = {"step_s": seconds} | self.clocks | {"mem_gib": self._memory()}
        self.timing_file.write(self.clocks)
        validated = any(v is not None for k, v in row.items() if k.startswith("val_"))
        if validated or self.due(self.print_every):
            shown = [f"{k} {row[k]:.4g}" for k in self.shows if row.get(k) is not None]
            shown += [
                f"{k} {v:,.3g}" for k, v in self.clocks.items() if k not in ("step", "step_s")
            ]
            print(
                f"{self.out.name} {self.step:05d}/{self.total} | " + " | ".join(shown), flush=True
            )

    def keep(self, name: str, **info: Any) -> None:
        """After this step, keep `result` as OUT/<name>/ whatever becomes of the checkpoints."""
        self.kept = {"kept_as": name} | info

    def finish(self, **info: Any) -> int:
        """Write the result, which the next stage reads; the exit code of a run that is done."""
        save_model(self.out, self.result, self.tokenizer_json, self.info | info)
        print(f"wrote {self.out}")
        return 0

    def _memory(self) -> float:
        """The most memory that was held so far, in GiB: of the GPU, or of this process."""
        if self.args.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    # --------------------------------------------------------------------------------------------
    # Checkpoints

    def _save(self) -> None:
        """Write checkpoints/<step>/ whole; drop all but the newest `KEEP` of this run."""
        info = self.info | {"step": self.step} | (self.kept or {})

        def write(aside: Path) -> None:
            save_model(aside, self.result, self.tokenizer_json, info)
            state = {name: each.state_dict() for name, each in self.state.items()}
            torch.save(_interned({"step": self.step, "state": state}), aside / "state.pt")
            for log in (self.log_file, self.timing_file):
                log.copy_to(aside)

        folder = self.out / "checkpoints" / f"{self.step:08d}"
        files.write_folder_atomic(folder, write)
        if self.fresh:  # all else in the folder is an earlier run's
            (self.out / "model.safetensors").unlink(missing_ok=True)
            for name in ("epochs", "steps"):
                shutil.rmtree(self.out / name, ignore_errors=True)
        # Newer ones are damaged; those beside the first of a run are an earlier run's.
        older = [] if self.fresh else [f for f in self._checkpoints() if f.name < folder.name]
        self._drop_checkpoints({folder, *older[1 - self.KEEP :]})
        self.fresh = False
        for log in (self.log_file, self.timing_file):
            log.keep()
        self._copy_kept(folder)

    def _copy_kept(self, checkpoint: Path) -> None:
        """Copy a checkpoint's model to where `keep` asked for it, unless it is there."""
        name = read_info(checkpoint).get("kept_as")
        if isinstance(name, str) and not files.folder_is_intact(self.out / name):

            def write(aside: Path) -> None:
                for file in ("config.json", "tokenizer.json", "model.safetensors"):
                    shutil.copy(checkpoint / file, aside)

            files.write_folder_atomic(self.out / name, write)

    def _checkpoints(self) -> list[Path]:
        """Folders of checkpoints, oldest first."""
        folders = (self.out / "checkpoints").glob("*")
        return sorted(f for f in folders if re.fullmatch(r"\d{8}", f.name) and f.is_dir())

    def _drop_checkpoints(self, but: set[Path]) -> None:
        for folder in set(self._checkpoints()) - but:
            shutil.rmtree(folder)

    def _restore(self) -> None:
        """Load the newest intact checkpoint, if any, and drop what later steps left."""
        intact = []
        for folder in reversed(self._checkpoints()):
            if files.folder_is_intact(folder):
                intact.append(folder)
            elif not intact:
                print(f"warning: {folder} is damaged; trying the one before", file=sys.stderr)
        # A run killed while it replaced an earlier run's checkpoints may leave both.
        mine = [folder for folder in intact if not self._differences(folder)]
        if not mine:
            if intact:
                raise BadInput(
                    f"{intact[0]}: --resume with other settings: {self._differences(intact[0])}; "
                    "give the old ones, or start over without --resume"
                )
            return
        folder = mine[0]
        try:
            saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            for name, each in self.state.items():
                each.load_state_dict(saved["state"][name])
            self.done = int(saved["step"])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # crafted or of another version; weights_only runs nothing
            if isinstance(error, RuntimeError) and "can't allocate" in str(error):
                raise  # a CPU's memory
            raise BadInput(
                f"{folder}/state.pt: not the state of such a run ({type(error).__name__}); "
                "start over without --resume"
            ) from error
        self.fresh, self.resumed_from = False, folder
        self._drop_checkpoints({folder, *mine[1 : self.KEEP]})
        for kept in (*(self.out / "epochs").glob("*"), *(self.out / "steps").glob("*")):
            if kept.name.isdigit() and kept.is_dir() and not self._is_past(kept):
                shutil.rmtree(kept)
        self._copy_kept(folder)

    def _is_past(self, kept: Path) -> bool:
        """Whether a model under epochs/ or steps/ is whole, this run's, and not of a later step."""
        if not files.folder_is_intact(kept) or self._differences(kept):
            return False
        return read_info(kept).get("step", math.inf) <= self.done

    def _differences(self, folder: Path) -> str:
        """In what the settings of a checkpoint differ from this run's; empty if in nothing."""
        before, now = read_info(folder).get("settings"), self.info["settings"]
        if not isinstance(before, dict):
            return "none are recorded"
        differ = [k for k in {**now, **before} if before.get(k) != now.get(k)]
        return ", ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in differ)


def _fingerprints(args: argparse.Namespace) -> dict[str, str]:
    """Path -> checksum of every file, or every file of a model's folder, that a flag names."""
    read = {}
    for name, value in vars(args).items():
        if isinstance(value, str) and name != "out":
            path = find_model(value) if name in ("init", "reward_model") else Path(value)
            names = ("config.json", "tokenizer.json", "model.safetensors")
            paths = [path / name for name in names] if path.is_dir() else [path]
            read |= {str(path): fingerprint(path) for path in paths if path.is_file()}
    return read


def _interned(value: Any) -> Any:
    """The same nested dicts and lists, equal keys being one object. Pickle writes each object once
    and then refers to it, so only then are the files of equal states equal."""
    if isinstance(value, dict):
        return {sys.intern(k) if isinstance(k, str) else k: _interned(v) for k, v in value.items()}
    return [_interned(v) for v in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------
# Logs


class Log:
    """A CSV file with one flushed row a step; the first row sets the columns.

    Where the log of an earlier run stands, it stays until `keep()`, and the new one is written
    beside it as `.<name>.new`: a run that dies before its first checkpoint destroys nothing. A
    checkpoint holds a copy; `resume_from`, such a checkpoint's folder, puts it back, which also
    cuts off the rows of later steps.
    """

    def __init__(self, path: Path, resume_from: Path | None = None):
        self.path, self.columns = path, None
        aside = path.with_name(f".{path.name}.new")
        if resume_from:
            write_atomic(path, (resume_from / path.name).read_bytes())
            self.columns = path.read_text().split("\n", 1)[0].split(",")
            aside.unlink(missing_ok=True)
        self._aside = aside if path.exists() and not resume_from else path
        self._file = self._aside.open("a" if resume_from else "w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def write(self, row: dict[str, float | int | None]) -> None:
        """Append one row; None is an empty cell, floats keep 9 digits (float32 is exact)."""
        if self.columns is None:
            self.columns = list(row)
            self._writer.writerow(self.columns)
        if set(row) != set(self.columns):
            odd = sorted(set(row) ^ set(self.columns))
            raise ValueError(f"{self.path}: the row and the header differ in {odd}")
        self._writer.writerow([_cell(row[name]) for name in self.columns])
        self._file.flush()

    def copy_to(self, folder: Path) -> None:
        """Copy the log so far into a checkpoint that is being written."""
        shutil.copyfile(self._aside, folder / self.path.name)

    def keep(self) -> None:
        """Move the new log to its final name, over the log of an earlier run."""
        if self._aside != self.path:
            os.replace(self._aside, self.path)
            self._aside = self.path


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, (int, str)) else f"{value:.9g}"
