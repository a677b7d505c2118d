"""What every run needs: common flags, exact resume, signals, logs, clocks.

A script keeps its loop, its models and its optimizers, and tells a `Run` about them:

    run = Run(args, "sft", result=model, tokenizer=path, state={"model": model, "adam": adam})
    for step in run.steps(total):        # from the newest checkpoint on
        ...
        run.add({"loss": loss})          # sums up a column of this step's row
        run.lap("step_s", tokens)        # seconds since the last lap
        run.log({"lr": lr})              # a row of log.csv, a line; stops where it is not finite
    return run.finish()                  # the result, for the next stage

After the loop's body, `steps` saves if a save is due and leaves if a signal came. Every random draw
of step i is a function of the seed and of i, and so is every batch. So `state`, the logs and the
step are all there is to save, and a run that was killed and resumed equals the uninterrupted run,
on a CPU bit for bit.

    OUT/model.safetensors, config.json, tokenizer.json    the result
    OUT/checkpoints/<step>/   those, state.pt, the logs so far, checksums; the newest two are kept
    OUT/epochs/<n>/, steps/<n>/                           models that `Run.keep` was asked to keep
    OUT/log.csv, timing.csv   one row a step; clocks apart, so that logs of equal runs are equal
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import files, flags, outputs
from data.files import BadInput, Log
from data.flags import natural, whole
from data.outputs import MODEL, kept_folders

import torch

import kernels
from checkpoint import find_model, load_state, read_info, save_model, save_state

# ------------------------------------------------------------------------------------------------
# Flags


class Parser(flags.Parser):
    """Refuses a GPU that is not there."""

    def parse_args(self, *argv) -> argparse.Namespace:
        args = super().parse_args(*argv)
        if vars(args).get("device") == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: there is no CUDA GPU; give --device cpu")
        return args


def parser(doc: str, *, out: str, save_every: int) -> argparse.ArgumentParser:
    """A parser with the flags that every run has; the script adds the method's."""
    title, shape = doc.split("\n")[0], argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=title, formatter_class=shape)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--out", default=out, help="folder of the run")
    add("--save_every", type=whole, default=save_every, help="steps between checkpoints; 0: last")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--tensorboard", metavar="FOLDER", help="where TensorBoard finds the logs, run by run")
    add("--grad_checkpointing", action=flag, default=False, help="less memory, more time")
    model_flags(parser)
    return parser


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that opens models."""
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--max_prompt_tokens", type=natural, default=96, help="longer prompts are dropped")
    add("--max_new_tokens", type=natural, default=32, help="limit of a response, in tokens")
    add("--seed", type=whole, default=0, help="of all random draws")
    add("--device", choices=("cpu", "cuda"), default=device, help="to compute on")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    add("--kernels", type=kernels.implementation, default="auto", help="NAME or attention=NAME,...")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, and check what no flag can know by itself; exits with code 2 and one line."""
    args = parser.parse_args(argv)
    try:
        outputs.check_inputs(args.out, "base", _inputs(args))
    except BadInput as error:
        parser.error(str(error))
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        parser.error("--tensorboard: the package tensorboard is missing: pip install tensorboard")
    return args


def _inputs(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> file, folder or name of a model, of all that a run reads."""
    no_input = ("out", "tensorboard", "device", "dtype", "kernels", "score_mod")
    flags = vars(args).items()
    return {name: value for name, value in flags if isinstance(value, str) and name not in no_input}


def _fingerprints(args: argparse.Namespace) -> dict[str, str]:
    """Path -> checksum of every file that a run reads."""
    models = [find_model(value) for value in _inputs(args).values()]
    paths = [path / name for path in models for name in ("", *MODEL)]
    return {str(path): files.fingerprint(path) for path in paths if path.is_file()}


def check_context(args: argparse.Namespace, *models: torch.nn.Module) -> None:
    """Raise `BadInput` unless the longest prompt and its response fit into every context."""
    context = min(model.config.n_positions for model in models)
    prompt, response = args.max_prompt_tokens, args.max_new_tokens
    if prompt + response > context:
        both = f"--max_prompt_tokens {prompt} and --max_new_tokens {response}"
        raise BadInput(f"{both} come to more than the context of {context}: lower one")


# ------------------------------------------------------------------------------------------------
# The run


@dataclass
class Run:
    """One run into --out. It owns no loop, no model and no optimizer.

    Without --resume the run starts over; an earlier result in --out stays until the first
    checkpoint that is due. With it, raises `BadInput` if settings, or a file read, are other ones.
    """

    args: argparse.Namespace
    stage: str
    result: torch.nn.Module  # the model that is handed on
    tokenizer: str | Path  # its file, or a model's folder
    state: dict[str, Any]  # name -> model or optimizer: all that a resume restores
    shows: str = ""  # columns that are printed, where a validation is and
    print_every: int = 1  # every so many steps

    KEEP = 2  # checkpoints
    FREE = "out tensorboard resume save_every keep_every print_samples".split()  # decide no number

    def __post_init__(self):
        args, self.out = self.args, Path(self.args.out)
        path = find_model(self.tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        self.tokenizer_json = path.read_text(encoding="utf-8")
        data = [getattr(args, name, None) for name in ("data", "pretrain_data")]
        settings = {name: value for name, value in vars(args).items() if name not in self.FREE}
        settings |= {name: os.path.normpath(path) for name, path in _inputs(args).items()}
        settings["sha256"] = _fingerprints(args)
        self.info = {"stage": self.stage, "data": [p for p in data if p], "settings": settings}
        outputs.claim(args.out, self.stage, _inputs(args))
        self.start_row = {}
        self.done, self.saved, self.models = 0, [], set()  # step, checkpoints, models that are kept
        newest = self._restore() if args.resume else None
        # What an earlier run has left stays until a step at which this one saves anyway.
        weights = self.out / "model.safetensors"
        self.earlier = not newest and bool(weights.exists() or kept_folders(self.out))
        if board := args.tensorboard and Path(args.tensorboard, self.out.name):
            of_torch = importlib.import_module("torch.utils.tensorboard")  # purge: later steps
            board = of_torch.SummaryWriter(board, purge_step=self.done and self.done + 1)
        self.logs = [Log(self.out / name, newest, board) for name in ("log.csv", "timing.csv")]

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left, up to `total`; saves and leaves between them.

        Each begins with torch's random numbers seeded by (seed, step). Ctrl-C and SIGTERM finish
        the step, save and leave with code 130 or 143; a second one leaves at once. Before the first
        checkpoint that is due, they do not save over an earlier result.
        """
        args, self.total, stopped = self.args, total, []
        signals = (signal.SIGINT, signal.SIGTERM)

        def on_signal(number: int, _) -> None:
            stopped.append(number)
            for either in signals:
                signal.signal(either, signal.SIG_DFL)

        handlers = [signal.signal(either, on_signal) for either in signals]
        how = f"{args.device}, {args.dtype}, kernels {kernels.resolve(args.kernels, args.device)}"
        size = f"{self.result.num_parameters:,} parameters"
        goal = f"{total} steps of {args.batch_size}, from {self.done}"
        print(f"{self.out.name}: {size}, {how}; {goal}", flush=True)
        for step in range(self.done + 1, total + 1):
            self.step, self.sums, self.kept = step, {}, {}
            self.clocks, self.rates, self.last_lap = {}, {}, time.perf_counter()
            torch.manual_seed(args.seed * 1_000_003 + step)
            yield step
            if self.kept or self.due(args.save_every) or stopped and not self.earlier:
                self._save()
            if stopped and step < total:
                kept = "nothing is saved: the earlier result in --out stays"
                kept = kept if self.earlier else "--resume goes on"
                print(f"stopped by a signal after step {step}; {kept}", file=sys.stderr)
                raise SystemExit(128 + stopped[0])
        for either, handler in zip(signals, handlers, strict=True):
            signal.signal(either, handler or signal.SIG_DFL)  # None: not set from Python

    def due(self, every: int) -> bool:
        """Whether `every` divides this step (0: never), or this step is the last."""
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

    def mean(self, values: dict[str, torch.Tensor]) -> None:
        """For each tensor of independent numbers a column with their mean, and one, NAME_ci, with
        half of its 95 % interval, 1.96 standard errors."""
        for name, each in values.items():
            error = each.double().std(correction=0) / math.sqrt(len(each))
            self.add({name: each.double().mean(), f"{name}_ci": 1.96 * error})

    def lap(self, name: str, tokens: int | None = None) -> None:
        """Seconds since the last lap, a column of timing.csv; with `tokens`, also their rate."""
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.clocks[name], self.last_lap = now - self.last_lap, now
        if tokens is not None:
            self.rates["tok_per_s"] = tokens / max(self.clocks[name], 1e-9)

    def log_start(self, values: dict[str, torch.Tensor]) -> None:
        """The `mean` of what is measured before step 1: row 0 of log.csv, written with row 1."""
        self.mean(values)
        row, self.sums = {name: value.item() for name, value in self.sums.items()}, {}
        shown = [f"{k} {v:.4g}" for k, v in row.items() if k in self.shows.split()]
        print(" | ".join([f"{self.out.name} {0:05d}/{self.total}", *shown]), flush=True)
        self.start_row, self.last_lap = {"step": 0} | row, time.perf_counter()

    def log(self, row: dict[str, float | int | None]) -> None:
        """Write `row` and what was added to log.csv and the laps to timing.csv; print if due.

        The first row sets the columns; one that is None or missing is an empty cell. A value that
        is not finite ends the run with code 1, before anything of this step is saved.
        """
        if twice := row.keys() & self.sums.keys():
            raise ValueError(f"columns {sorted(twice)} are in the row and were added: rename one")
        row = {"step": self.step} | row | {name: v.item() for name, v in self.sums.items()}
        every = [*self.start_row.items(), *row.items()]
        bad = [f"{k} {v}" for k, v in every if v is not None and not math.isfinite(v)]
        if bad:
            print(f"error: step {self.step}: not finite: {', '.join(bad)}", end="", file=sys.stderr)
            print("; checkpoints are kept; start over with a lower learning rate", file=sys.stderr)
            raise SystemExit(1)
        step = {"step": self.step, "step_s": sum(self.clocks.values())}
        clocks = self.clocks | self.rates | {"mem_gib": self._memory()}
        if self.start_row:
            self.logs[0].write(dict.fromkeys(row) | self.start_row)
            self.start_row = {}
        for log, values in zip(self.logs, (row, step | clocks), strict=True):
            log.write(values)
        shown = {k: row[k] for k in self.shows.split() if row.get(k) is not None}
        if self.due(self.print_every) or any(k.startswith("val_") for k in shown):
            parts = [f"{self.out.name} {self.step:05d}/{self.total}"]
            parts += [f"{k} {v:.4g}" for k, v in shown.items()]
            parts += [f"{k} {v:,.3g}" for k, v in clocks.items() if k != "step_s"]
            print(" | ".join(parts), flush=True)

    def keep(self, name: str, **info: Any) -> None:
        """After this step, keep `result` as OUT/<name>/ whatever becomes of the checkpoints."""
        self.kept = {"kept_as": name} | info

    def finish(self, **info: Any) -> int:
        """Write the result, which the next stage reads; the exit code of a run that is done."""
        outputs.check_claims()
        save_model(self.out, self.result, self.tokenizer_json, self.info | info)
        outputs.release()
        print(f"wrote {self.out}")
        return 0

    def _memory(self) -> float:
        """The most memory that was held so far, in GiB: of the GPU, or of this process."""
        if self.args.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def _save(self) -> None:
        """Write checkpoints/<step>/ whole; drop older ones and what an earlier run left."""

        def write(aside: Path) -> None:
            info = self.info | {"step": self.step} | self.kept
            save_model(aside, self.result, self.tokenizer_json, info)
            save_state(aside / "state.pt", self.step, self.state)
            for log in self.logs:
                (aside / log.path.name).write_text("".join(log.lines))

        outputs.check_claims()
        folder = self.out / "checkpoints" / f"{self.step:08d}"
        files.write_folder_atomic(folder, write)
        (self.out / "model.safetensors").unlink(missing_ok=True)
        self.saved, self.earlier = [*self.saved, folder][-self.KEEP :], False
        for log in self.logs:
            log.keep()
        self._tidy()

    def _tidy(self) -> None:
        """Delete what is not this run's; copy the newest checkpoint's model if it is to be kept."""
        for folder in set(kept_folders(self.out)) - self.models - set(self.saved):
            shutil.rmtree(folder)
        name = str(read_info(self.saved[-1]).get("kept_as"))
        kept = self.out / name
        if outputs.OWN.fullmatch(name) and kept not in self.models:
            sources = [self.saved[-1] / file for file in MODEL]
            files.write_folder_atomic(kept, lambda aside: [shutil.copy(s, aside) for s in sources])
            self.models.add(kept)

    def _restore(self) -> Path | None:
        """Load the newest intact checkpoint, if any; drop what later steps and other runs left."""
        intact = [f for f in kept_folders(self.out) if files.folder_is_intact(f)]
        checkpoints = [f for f in kept_folders(self.out) if f.parent.name == "checkpoints"]
        while checkpoints and checkpoints[-1] not in intact:
            damaged = checkpoints.pop()
            print(f"warning: {damaged} is damaged; trying the one before", file=sys.stderr)
        if not checkpoints:
            return None
        # A run killed while it replaced an earlier run's checkpoints may leave both.
        mine = [f for f in intact if not self._differences(f)]
        self.saved = [f for f in mine if f in checkpoints][-self.KEEP :]
        if not self.saved:
            other = f"{checkpoints[-1]}: --resume with other settings"
            remedy = "give the old ones, or start over without --resume"
            raise BadInput(f"{other}: {self._differences(checkpoints[-1])}; {remedy}")
        newest = self.saved[-1]
        self.done = load_state(newest / "state.pt", self.state)
        if self.done != int(newest.name):
            raise BadInput(f"{newest}: its state is of step {self.done}; start over")
        kept = set(mine) - set(checkpoints)
        self.models = {f for f in kept if read_info(f).get("step", math.inf) <= self.done}
        self._tidy()
        return newest

    def _differences(self, folder: Path) -> str:
        """In what the settings of a checkpoint differ from this run's; empty if in nothing."""
        before, now = read_info(folder).get("settings"), self.info["settings"]
        if not isinstance(before, dict):
            return "none are recorded"
        names, real = _inputs(self.args), os.path.realpath
        try:  # files by their real paths, from wherever they are named
            before, now = (
                {k: real(v) if k in names and v else v for k, v in each.items() if k != "sha256"}
                | {real(path): digest for path, digest in each["sha256"].items()}
                for each in (before, now)
            )
        except (KeyError, TypeError, AttributeError):
            return "no checksums are recorded"
        differ = [k for k in {**now, **before} if before.get(k) != now.get(k)]
        return ", ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in differ)
