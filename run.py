"""A run's manners: checkpoints, exact resume, logs. It owns no loop, no model and no optimizer.

Checkpoints   what a run needs to go on after being killed, and what it hands to the next stage
Log           log.csv and timing.csv: one flushed row a step
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from checkpoint import read_info, save_model
from data import files
from data.files import BadInput, read_log, write_atomic


def _interned(value: Any) -> Any:
    """The same nested dicts and lists, equal keys being one object. Pickle writes each object once
    and then refers to it, so only then are the files of equal states equal."""
    if isinstance(value, dict):
        return {sys.intern(k) if isinstance(k, str) else k: _interned(v) for k, v in value.items()}
    return [_interned(v) for v in value] if isinstance(value, list) else value


class Checkpoints:
    """The folder of one run: what it needs to go on (`checkpoints/<step>/`) and its result.

    Every random draw of step i in the three scripts is a function of the seed and of i, and so is
    every batch. So weights, optimizer states, logs and the step are all there is to save, and a
    resumed run is the uninterrupted run, on a CPU bit for bit. An earlier result in the same folder
    stays until the first checkpoint of the new run.

    config.json of a checkpoint and of the result has "settings", and where a resume changed them
    "changes": a list of {"after_step", "settings"}, the settings up to and with that step.
    """

    KEEP = 2

    def __init__(self, out: str | Path, settings: dict[str, Any]):
        """`settings`: everything that decides the run's numbers; a resume refuses other ones."""
        self.out, self.folder, self.settings = Path(out), Path(out) / "checkpoints", settings
        self.resumed_from: Path | None = None
        self.changes: list[dict[str, Any]] = []
        self._fresh = True  # no checkpoint of this run is there yet
        files.check_writable(self.out)
        for folder in (self.out, self.folder, self.out / "epochs"):
            files.remove_leftovers(folder)

    def resume(self, restore: Callable[[dict[str, Any]], None], changed: bool = False) -> int:
        """Give the state of the newest intact checkpoint to `restore`; return its step, else 0.

        A damaged checkpoint (checksums) is passed over with a warning. Raises `BadInput` if all
        that is left is of a run with other settings, or if this run has gone on with other ones
        after its newest checkpoint with these; unless `changed`, which goes on with the newest,
        says what differs and records it.
        """
        intact = []
        for folder in sorted(self.folder.glob("[0-9]*"), reverse=True):
            if files.folder_is_intact(folder):
                intact.append(folder)
            elif not intact:
                print(f"warning: {folder} is damaged; trying the one before", file=sys.stderr)
        # A run killed while it replaced an earlier run's checkpoints may leave both.
        mine = [folder for folder in intact if not self._differences(folder)]
        newer = intact[: intact.index(mine[0])] if mine else intact
        went_on = any(self._was_mine(folder) for folder in newer)
        if intact and not changed and (went_on or not mine):
            raise BadInput(
                f"{intact[0]}: --resume with other settings: {self._differences(intact[0])}; give "
                "the old ones, start over without --resume, or give --resume_changed to go on with "
                "the new ones"
            )
        for folder in (intact if changed else mine)[:1]:
            try:
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                restore(state)
                step = int(state["step"])
                self._record_changes(folder, step)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # crafted or of another version; weights_only runs nothing
                if isinstance(error, RuntimeError) and "can't allocate" in str(error):
                    raise  # a CPU's memory
                raise BadInput(
                    f"{folder}/state.pt: not the state of such a run ({type(error).__name__}); "
                    "start over without --resume"
                ) from error
            self._fresh, self.resumed_from = False, folder
            # What `save` would have removed next, had the process not been killed.
            older = sorted(f for f in intact if f.name < folder.name and self._is_mine(f))
            for superseded in set(self.folder.glob("[0-9]*")) - {*older[1 - self.KEEP :], folder}:
                shutil.rmtree(superseded)
            for epoch in (self.out / "epochs").glob("[0-9]*"):
                if not files.folder_is_intact(epoch) or not self._is_mine(epoch):
                    shutil.rmtree(epoch)  # of an earlier run, see above
            self._drop_steps(step)
            self._keep_epoch(folder)
            return step
        return 0

    def _record_changes(self, folder: Path, step: int) -> None:
        """Go on with a checkpoint's history of settings; say what differs from the last ones."""
        info = read_info(folder)
        self.changes = info.get("changes", [])
        if differ := self._differences(folder):
            print(f"warning: from step {step} on with other settings: {differ}", file=sys.stderr)
            self.changes.append({"after_step": step, "settings": info.get("settings")})

    def _is_mine(self, folder: Path) -> bool:
        """Whether a folder's settings are this run's, now or before a change."""
        before = [change["settings"] for change in self.changes]
        return not self._differences(folder) or read_info(folder).get("settings") in before

    def _was_mine(self, folder: Path) -> bool:
        """Whether a folder's run had this run's settings before it went on with others."""
        changes = read_info(folder).get("changes")
        changes = changes if isinstance(changes, list) else []
        before = [c.get("settings") for c in changes if isinstance(c, dict)]
        return any(isinstance(s, dict) and not self._differing(s) for s in before)

    def _recorded(self) -> dict[str, Any]:
        """What config.json says of the settings."""
        return {"settings": self.settings} | ({"changes": self.changes} if self.changes else {})

    def _differences(self, folder: Path) -> str:
        """In what the settings of a checkpoint differ from this run's; empty if in nothing."""
        before = read_info(folder).get("settings")
        if not isinstance(before, dict):
            return "none are recorded"
        return ", ".join(
            f"{k} was {before.get(k)!r}, is {self.settings[k]!r}" for k in self._differing(before)
        )

    def _differing(self, before: dict[str, Any]) -> list[str]:
        return [k for k in self.settings if before.get(k) != self.settings[k]]

    def save(
        self,
        step: int,
        model: nn.Module,
        tokenizer_json: str,
        info: dict[str, Any],
        state: dict[str, Any],
        logs: tuple[Log, ...] = (),
    ) -> None:
        """Write `checkpoints/<step>/` whole, then drop all but the newest `KEEP` of this run.

        Where `info` has an "epoch", the model is also kept as `epochs/<epoch>/`.
        """

        def write(aside: Path) -> None:
            save_model(aside, model, tokenizer_json, info | self._recorded())
            torch.save(_interned(state | {"step": step}), aside / "state.pt")
            for log in logs:
                log.copy_to(aside)

        name = f"{step:08d}"
        files.write_folder_atomic(self.folder / name, write)
        # Newer ones are damaged; those beside the first of a new run are an earlier run's.
        folders = sorted(self.folder.glob("[0-9]*"))
        mine = [f for f in folders if f.name == name or f.name < name and not self._fresh]
        for superseded in set(folders) - set(mine[-self.KEEP :]):
            shutil.rmtree(superseded)
        if self._fresh:
            (self.out / "model.safetensors").unlink(missing_ok=True)
            (self.out / "bad_batch.json").unlink(missing_ok=True)
            shutil.rmtree(self.out / "epochs", ignore_errors=True)
            self._drop_steps(step)
            self._fresh = False
        for log in logs:
            log.keep()
        self._keep_epoch(self.folder / name)

    def keep_step(
        self, step: int, model: nn.Module, tokenizer_json: str, info: dict[str, Any]
    ) -> None:
        """Keep the model of a step as `steps/<step>/`, whatever becomes of the checkpoints."""
        folder = self.out / "steps" / f"{step:05}"
        save_model(folder, model, tokenizer_json, info | self._recorded())

    def _drop_steps(self, step: int) -> None:
        """Drop the models under `steps/` that are an earlier run's or of later than `step`."""
        for folder in (self.out / "steps").glob("[0-9]*"):
            mine = (folder / "model.safetensors").exists() and (
                self._is_mine(folder)
                # Kept by an older version, which recorded no settings and dropped all at a start.
                or (not self._fresh and "settings" not in read_info(folder))
            )
            if not mine or not folder.name.isdigit() or int(folder.name) > step:
                shutil.rmtree(folder)

    def _keep_epoch(self, checkpoint: Path) -> None:
        """Copy a checkpoint's model to `epochs/`; again after a resume: the copy may be missing."""
        epoch = read_info(checkpoint).get("epoch")
        folder = self.out / "epochs" / f"{epoch:02}" if type(epoch) is int else None
        if folder and not files.folder_is_intact(folder):

            def write(aside: Path) -> None:
                for name in ("config.json", "tokenizer.json", "model.safetensors"):
                    shutil.copy(checkpoint / name, aside)

            files.write_folder_atomic(folder, write)

    def finish(self, model: nn.Module, tokenizer_json: str, info: dict[str, Any]) -> None:
        """Write the run's result, which the next stage reads, beside `checkpoints/`."""
        save_model(self.out, model, tokenizer_json, info | self._recorded())


class Log:
    """A CSV file with a fixed header and one flushed row a step; a wrong key is an error.

    Where the log of an earlier run stands, it stays until `keep()`, and the new one is written
    beside it as `.<name>.new`: a run that dies before its first checkpoint destroys nothing. A
    checkpoint holds a copy; `resume_from`, such a checkpoint's folder, puts it back, which also
    cuts off the rows of later steps.
    """

    def __init__(self, path: Path | str, columns: list[str], resume_from: Path | None = None):
        self.path, self.columns = Path(path), columns
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.new")
        if resume_from:
            read_log(resume_from / self.path.name, columns)  # the header may have changed since
            write_atomic(self.path, (resume_from / self.path.name).read_bytes())
            aside.unlink(missing_ok=True)
        self._aside = aside if self.path.exists() and not resume_from else self.path
        self._file = self._aside.open("a" if resume_from else "w", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        if not resume_from:
            self._writer.writeheader()
        self._file.flush()

    def write(self, row: dict[str, float | int | None]) -> None:
        """Append one row; None is an empty cell, floats keep 9 digits (float32 is exact)."""
        if set(row) != set(self.columns):
            odd = sorted(set(row) ^ set(self.columns))
            raise ValueError(f"{self.path}: the row and the header differ in {odd}")
        self._writer.writerow({key: _cell(row[key]) for key in self.columns})
        self._file.flush()

    def copy_to(self, folder: Path) -> None:
        """Copy the log so far into a checkpoint that is being written."""
        shutil.copyfile(self._aside, folder / self.path.name)

    def keep(self) -> None:
        """Move the new log to its final name, over the log of an earlier run."""
        if self._aside != self.path:
            os.replace(self._aside, self.path)
            self._aside = self.path

    def close(self) -> None:
        self._file.close()


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, (int, str)) else f"{value:.9g}"
