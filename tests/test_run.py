"""run.py's promises, with a loop of one number (tests/toy.py): resume, kept models, logs, signals.

A check takes the world, a folder, and a planted bug to set at the moment where it would matter:
each is run without one, and must fail with each of its own.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import run as run_file
from checkpoint import read_info
from data import files
from data.files import BadInput, read_log, run_command, write_folder_atomic
from run import Log, Run, check_context, fraction, natural, nonnegative, number, whole
from tests import toy
from tests.crash import Server, bytes_lost, contents, run_dying_at, same_steps


class Killed(BaseException):
    """In place of SIGKILL, where no file is being written."""


class World:
    """A data file, a folder with a tokenizer, an uninterrupted run over them."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "toy.txt"
        (folder / "init").mkdir()
        (folder / "init/tokenizer.json").write_text("{}")
        self.data.write_text("0.5")
        self.whole = folder / "whole"
        assert self.go(self.whole) == 0

    def args(self, out: Path, *more: object) -> list[str]:
        init = self.folder / "init"
        args = ("--out", out, "--data", self.data, "--init", init, "--device", "cpu", *more)
        return [str(arg) for arg in args]

    def go(self, out: Path, *more: object) -> int:
        """Run in this process; the exit code."""
        try:
            return run_command(lambda: toy.main(self.args(out, *more)))
        except SystemExit as leaving:
            return leaving.code

    def dies(self, patch: pytest.MonkeyPatch, out: Path, name: str, step: int, *more) -> None:
        """Run, dying after `Run.<name>` of a step."""
        original = getattr(Run, name)

        def last(self, *args) -> None:
            original(self, *args)
            if self.step == step:
                raise Killed

        with patch.context() as inner, pytest.raises(Killed):
            inner.setattr(Run, name, last)
            toy.main(self.args(out, *more))

    def copy(self, out: Path) -> Path:
        return Path(shutil.copytree(self.whole, out))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("toy"))


def assert_same(out: Path, whole: Path) -> None:
    reference, found = contents(whole), contents(out)
    assert sorted(reference) == sorted(found)
    assert [name for name in reference if reference[name] != found[name]] == []
    assert bytes_lost(reference, found) == 0 and same_steps(out)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def seal(folder: Path) -> None:
    """Checksums that are right, of whatever is in the folder."""
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    sums = [(hashlib.sha256(f.read_bytes()).hexdigest(), f.name) for f in folder.iterdir()]
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for digest, name in sums))


# ------------------------------------------------------------------------------------------------
# Checks, and the bugs that they catch


def resumes_exactly(w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable) -> None:
    """After a death past row 5, the newest checkpoint being of step 4."""
    w.dies(patch, out, "log", 5)
    assert names(out / "checkpoints") == ["00000003", "00000004"]
    assert [row["step"] for row in read_log(out / "log.csv")] == list("12345")
    bug(patch)
    assert w.go(out, "--resume") == 0
    assert_same(out, w.whole)


def cuts_the_log_back(w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable) -> None:
    w.dies(patch, out, "log", 5)
    bug(patch)
    assert w.go(out, "--resume") == 0
    for name in ("log.csv", "timing.csv"):
        assert [row["step"] for row in read_log(out / name)] == list("123456")


def copies_a_kept_model_again(
    w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable
) -> None:
    """Killed between the checkpoint and the copy."""

    def write(folder: Path, content: Callable) -> None:
        if folder.parent.name == "epochs":
            raise Killed
        write_folder_atomic(folder, content)

    with patch.context() as inner, pytest.raises(Killed):
        inner.setattr(files, "write_folder_atomic", write)
        toy.main(w.args(out))
    assert names(out / "checkpoints")[-1] == "00000003" and names(out / "epochs") == []
    bug(patch)
    assert w.go(out, "--resume") == 0
    assert_same(out, w.whole)


def drops_kept_models_of_later_steps(
    w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable
) -> None:
    """And those that are damaged, or of other settings."""
    w.copy(out)
    (out / "checkpoints/00000006/state.pt").write_bytes(b"")
    shutil.copytree(out / "epochs/03", out / "epochs/01")
    (out / "epochs/01/config.json").write_text("{}")
    other = Path(shutil.copytree(out / "epochs/03", out / "steps/00001"))
    info = read_info(other)
    info["settings"]["lr"] = 7
    (other / "config.json").write_text(json.dumps(info))
    seal(other)
    bug(patch)
    w.dies(patch, out, "lap", 5, "--resume")
    assert (names(out / "epochs"), names(out / "steps")) == (["03"], [])


def passes_over_damage(w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable) -> None:
    bug(patch)
    for damage in (
        lambda f: (f / "state.pt").write_bytes((f / "state.pt").read_bytes()[:-1]),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "config.json").write_text("{}"),
        lambda f: (f / "SHA256SUMS").unlink(),
        lambda f: (f / "log.csv").write_text(""),
    ):
        shutil.rmtree(out, ignore_errors=True)
        w.copy(out)
        damage(out / "checkpoints/00000006")
        assert w.go(out, "--resume") == 0
        assert_same(out, w.whole)


def refuses_other_settings(w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable) -> None:
    w.copy(out)
    bug(patch)
    for more in (("--lr", 0.2), ("--seed", 1), ("--max_steps", 5), ("--dtype", "bfloat16")):
        assert w.go(out, "--resume", *more) == 2
    assert_same(out, w.whole)


def refuses_another_input(w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable) -> None:
    """Under the same name: the data, or the model it starts from."""
    bug(patch)
    assert w.go(out) == 0
    before = contents(out)
    for path in (w.data, w.folder / "init/tokenizer.json"):
        text = path.read_text()
        path.write_text(f"{text} ")
        try:
            assert w.go(out, "--resume") == 2
        finally:
            path.write_text(text)
    assert contents(out) == before


def leaves_an_earlier_result(w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable) -> None:
    """Until the first checkpoint; then nothing of it is left."""
    w.copy(out)
    bug(patch)
    w.dies(patch, out, "log", 1, "--seed", 1)
    assert contents(out) == contents(w.whole)
    w.dies(patch, out, "_save", 2, "--seed", 1)
    assert not (out / "model.safetensors").exists() and len(read_log(out / "log.csv")) == 2
    assert (names(out / "checkpoints"), names(out / "epochs")) == (["00000002"], [])


def stops_where_not_finite(w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable) -> None:
    """With code 1, before the save; what was there stays."""
    bug(patch)
    assert w.go(out, "--bad_step", 4) == 1
    assert names(out / "checkpoints") == ["00000002", "00000003"]
    assert len(read_log(out / "log.csv")) == 3 and not (out / "model.safetensors").exists()


def keeps_two_checkpoints(w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable) -> None:
    bug(patch)
    w.dies(patch, out, "_save", 4)
    assert names(out / "checkpoints") == ["00000003", "00000004"]
    assert w.go(out, "--resume") == 0
    assert names(out / "checkpoints") == ["00000004", "00000006"]


def leaves_what_a_user_put_there(
    w: World, out: Path, patch: pytest.MonkeyPatch, bug: Callable
) -> None:
    """At the start, at a resume and at the end."""
    users = ["best", "0000003", "000000003", "0000000x", "notes.txt/00000001"]
    users = [f"checkpoints/{name}/file" for name in users] + ["epochs/notes/x", "steps/last/x"]
    users += ["checkpoints/00000099", "mine.txt"]  # a file, whatever its name
    for user in users:
        (out / user).parent.mkdir(parents=True, exist_ok=True)
        (out / user).write_text("mine")
    bug(patch)
    w.dies(patch, out, "log", 5)
    assert w.go(out, "--resume") == 0 and w.go(out, "--seed", 1) == 0
    assert [user for user in users if not (out / user).is_file()] == []


def not_restored(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def bug(patch: pytest.MonkeyPatch) -> None:
        restore = Run._restore

        def without(self) -> None:
            whole = self.state
            self.state = {key: each for key, each in whole.items() if key != name}
            restore(self)
            self.state = whole

        patch.setattr(Run, "_restore", without)

    bug.__name__ = f"{name}_not_restored"
    return bug


def not_seeded_by_the_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "manual_seed", lambda seed: torch.default_generator)


def log_not_cut_back(patch: pytest.MonkeyPatch) -> None:
    init = Log.__init__

    def append(self, path: Path, checkpoint: Path | None = None) -> None:
        rows = path.read_bytes()
        init(self, path, checkpoint)
        path.write_bytes(rows)

    patch.setattr(Log, "__init__", append)


def earlier_log_overwritten(patch: pytest.MonkeyPatch) -> None:
    init = Log.__init__

    def over(self, path: Path, checkpoint: Path | None = None) -> None:
        path.unlink(missing_ok=True)
        init(self, path, checkpoint)

    patch.setattr(Log, "__init__", over)


def earlier_result_not_removed(patch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def spare(self, *args, **kwargs) -> None:
        if self.name != "model.safetensors":
            unlink(self, *args, **kwargs)

    patch.setattr(Path, "unlink", spare)


def kept_only_by_save(patch: pytest.MonkeyPatch) -> None:
    tidy = Run._tidy
    patch.setattr(Run, "_tidy", lambda self: tidy(self) if hasattr(self, "step") else None)


def checksums_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "folder_is_intact", lambda folder: True)


def settings_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_differences", lambda self, folder: "")


def inputs_not_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_file, "_fingerprints", lambda args: {})


def any_step_is_past(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_file, "read_info", lambda folder: read_info(folder) | {"step": 0})


def nothing_deleted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)


def all_deleted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_folders", lambda self: sorted((self.out / "checkpoints").iterdir()))


def nothing_is_infinite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(math, "isfinite", lambda value: True)


CHECKS: dict[Callable, list[Callable]] = {
    resumes_exactly: [*map(not_restored, toy.STATE), not_seeded_by_the_step, log_not_cut_back],
    cuts_the_log_back: [log_not_cut_back],
    copies_a_kept_model_again: [kept_only_by_save],
    drops_kept_models_of_later_steps: [any_step_is_past, settings_not_compared, kept_only_by_save],
    passes_over_damage: [checksums_not_looked_at],
    refuses_other_settings: [settings_not_compared],
    refuses_another_input: [inputs_not_read],
    leaves_an_earlier_result: [
        earlier_log_overwritten,
        earlier_result_not_removed,
        nothing_deleted,
    ],
    stops_where_not_finite: [nothing_is_infinite],
    keeps_two_checkpoints: [nothing_deleted],
    leaves_what_a_user_put_there: [all_deleted],
}
PLANTED = [(check, bug) for check, bugs in CHECKS.items() for bug in bugs]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_run(check: Callable, world: World, tmp_path: Path, monkeypatch) -> None:
    check(world, tmp_path / "out", monkeypatch, lambda patch: None)


@pytest.mark.parametrize(("check", "bug"), PLANTED, ids=lambda each: each.__name__)
def test_a_planted_bug_is_caught(
    check: Callable, bug: Callable, world: World, tmp_path: Path, monkeypatch
) -> None:
    with pytest.raises((AssertionError, OSError)):
        check(world, tmp_path / "out", monkeypatch, bug)


# ------------------------------------------------------------------------------------------------
# Killed at any point


def test_a_run_is_a_function_of_its_arguments(world: World, tmp_path: Path) -> None:
    assert world.go(tmp_path / "again") == world.go(tmp_path / "other", "--seed", 1) == 0
    assert_same(tmp_path / "again", world.whole)
    assert bytes_lost(contents(world.whole), contents(tmp_path / "other")) > 100
    assert world.go(tmp_path / "again", "--resume") == 0  # a run that is done
    assert_same(tmp_path / "again", world.whole)


def test_dying_at_any_file_operation_loses_nothing(
    world: World, server: Server, tmp_path: Path
) -> None:
    """Over an earlier run of other settings, whose files must all be gone at the end."""
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    assert world.go(earlier, "--seed", 9, "--max_steps", 9) == 0
    shutil.copytree(earlier, out)
    operations = server.run("toy", world.args(out)).operations
    for number_ in sorted(random.sample(range(1, operations + 1), 8)):
        shutil.rmtree(out)
        shutil.copytree(earlier, out)
        run_dying_at(server, "toy", world.args(out), number_)
        assert_same(out, world.whole)


def test_a_full_disk_stops_a_run_and_loses_nothing(
    world: World, server: Server, tmp_path: Path
) -> None:
    args = world.args(tmp_path / "out")
    run = server.run("toy", args, dict.fromkeys(range(50, 9999), "full"))
    assert run.code == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: ") and run.stderr.endswith("the disk is full\n")
    assert server.run("toy", [*args, "--resume"]).code == 0
    assert_same(tmp_path / "out", world.whole)


def test_damage_is_said_and_without_an_intact_checkpoint_it_starts_over(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = world.copy(tmp_path / "out")
    for number_, folder in enumerate(sorted((out / "checkpoints").iterdir(), reverse=True), 1):
        (folder / "state.pt").write_bytes(b"")
        assert world.go(out, "--resume") == 0
        said = capsys.readouterr()
        assert said.err.count(f"warning: {folder} is damaged; trying the one before\n") == 1
        assert f"from {0 if number_ == 2 else 4}\n" in said.out
        assert_same(out, world.whole)
        for other in sorted((out / "checkpoints").iterdir())[1:]:
            (other / "state.pt").write_bytes(b"")


class Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("state", [Evil(), {"step": Evil()}, {"step": 2}, [1, 2], None], ids=str)
def test_a_crafted_state_is_refused_and_not_executed(
    state: object, world: World, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    """A pickle in place of a checkpoint's state, with checksums that are right."""
    monkeypatch.chdir(tmp_path)
    folder = world.copy(tmp_path / "out") / "checkpoints/00000006"
    torch.save(state, folder / "state.pt")
    seal(folder)
    assert world.go(tmp_path / "out", "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}/state.pt: not the state of such a run")
    assert error.count("\n") == 1 and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../../stolen", "/tmp/stolen", "epochs/../../stolen", 5, None])
def test_a_crafted_place_of_a_kept_model_is_not_written(
    name: object, world: World, tmp_path: Path
) -> None:
    folder = world.copy(tmp_path / "in/out") / "checkpoints/00000006"
    (folder / "config.json").write_text(json.dumps(read_info(folder) | {"kept_as": name}))
    seal(folder)
    assert world.go(tmp_path / "in/out", "--resume") == 0
    assert [path for path in (*tmp_path.rglob("stolen"), *Path("/tmp").glob("stolen"))] == []
    assert names(tmp_path / "in/out/epochs") == ["03", "06"]


MEMORY = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
MEMORY += [RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_too_little_memory_at_a_resume_is_no_damaged_state(
    error: Exception, world: World, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    def load(*_, **__) -> None:
        raise error

    out = world.copy(tmp_path / "out")
    monkeypatch.setattr(torch, "load", load)
    assert world.go(out, "--resume") == 1
    assert capsys.readouterr().err == "error: out of memory; lower --batch_size\n"


# ------------------------------------------------------------------------------------------------
# Other settings, other runs


def test_the_difference_is_said(world: World, tmp_path: Path, capsys) -> None:
    out = world.copy(tmp_path / "out")
    assert world.go(out, "--resume", "--lr", 0.25, "--max_steps", 9) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}/checkpoints/00000006: --resume with other settings: ")
    assert "lr was 0.1, is 0.25" in error and "max_steps was 6, is 9" in error
    assert error.count(" was ") == 2 and error.count("\n") == 1
    assert_same(out, world.whole)


def test_where_a_run_is_and_how_often_it_saves_may_change(
    world: World, tmp_path: Path, monkeypatch
) -> None:
    world.dies(monkeypatch, tmp_path / "out", "log", 3, "--save_every", 1)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert world.go(moved, "--save_every", 5, "--resume") == 0
    for name in ("model.safetensors", "log.csv", "epochs/06/model.safetensors"):
        assert (moved / name).read_bytes() == (world.whole / name).read_bytes()


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)], ids=str)
def test_of_two_runs_that_are_there_the_one_asked_for_goes_on(
    seeds: tuple[int, int], world: World, tmp_path: Path, monkeypatch
) -> None:
    """A run was killed at its first checkpoint, before the earlier run's were gone."""
    mine, other = (tmp_path / f"seed {seed}" for seed in seeds)
    for seed, out in zip(seeds, (mine, other), strict=True):
        steps = 2 if seed else 4
        world.dies(monkeypatch, out, "_save", steps, "--seed", seed)
    shutil.copytree(other, mine, dirs_exist_ok=True)
    assert world.go(mine, "--seed", seeds[0], "--resume") == 0
    assert world.go(tmp_path / "whole", "--seed", seeds[0]) == 0
    assert_same(mine, tmp_path / "whole")


def test_what_a_result_says_of_its_run(world: World) -> None:
    info = read_info(world.whole)
    assert (info["stage"], info["data"], info["more"]) == ("toy", [str(world.data)], "more")
    assert info["settings"]["lr"] == 0.1 and "resume" not in info["settings"]
    read = [world.data, world.folder / "init/tokenizer.json"]
    assert info["settings"]["sha256"] == {str(path): files.fingerprint(path) for path in read}
    kept = read_info(world.whole / "epochs/03")
    assert (kept["step"], kept["epoch"], kept["kept_as"]) == (3, 3, "epochs/03")
    assert names(world.whole / "epochs/03") == ["SHA256SUMS", *sorted(run_file.MODEL)]


# ------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(("signals", "code"), [("INT", 130), ("TERM", 143)])
def test_a_signal_finishes_the_step_saves_and_leaves(
    signals: str, code: int, world: World, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Also without --save_every: the checkpoint is of that very step."""
    lap, number_ = Run.lap, getattr(signal, f"SIG{signals}")

    def during(self, *args) -> None:
        lap(self, *args)
        if self.step == 2:
            os.kill(os.getpid(), number_)

    out, handlers = tmp_path / "out", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "lap", during)
        assert world.go(out, "--save_every", 0) == code
    assert capsys.readouterr().err == "stopped by a signal after step 2; --resume goes on\n"
    assert [row["step"] for row in read_log(out / "log.csv")] == ["1", "2"]
    assert names(out / "checkpoints") == ["00000002"] and not (out / "model.safetensors").exists()
    for number_, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        assert signal.getsignal(number_) == signal.SIG_DFL  # a second one would have left at once
        signal.signal(number_, handler)
    assert world.go(out, "--resume") == 0
    assert_same(out, world.whole)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_without_damage(
    second: signal.Signals, world: World, server: Server, tmp_path: Path
) -> None:
    args = world.args(tmp_path / "out")
    run = server.run("toy", args, {30: signal.SIGINT, 31: second})
    assert run.code == -second
    assert server.run("toy", [*args, "--resume"]).code == 0
    assert_same(tmp_path / "out", world.whole)


# ------------------------------------------------------------------------------------------------
# Arithmetic, logs


def a_run(out: Path, world: World, *more: object, **how: object) -> Run:
    args = toy.get_args(world.args(out, *more))
    return Run(args, "toy", toy.Toy(), args.init, {}, **how)


def test_sums_maxima_and_laps(world: World, tmp_path: Path, monkeypatch, capsys) -> None:
    clock = iter([0.0, 2.0, 5.0, 10.0, 14.0, 15.0])
    monkeypatch.setattr(run_file.time, "perf_counter", lambda: next(clock))
    run = a_run(tmp_path, world, shows="loss val_loss absent", print_every=2)
    for step in run.steps(2):
        run.add({"loss": torch.tensor(1.0), "n": 3}, 0.25)
        run.add({"loss": 2 * step}, torch.tensor(0.5))
        for value in (1.0, 3.0, 2.0):
            run.max({"largest": value})
        run.lap("a_s", 10)
        run.lap("b_s")
        run.log({"lr": 0.5, "val_loss": None})
    log = read_log(tmp_path / "log.csv")
    assert list(log[0]) == ["step", "lr", "val_loss", "loss", "n", "largest"]
    assert list(log[1].values()) == ["2", "0.5", "", "2.25", "0.75", "3"]
    assert log[0]["loss"] == "1.25"
    timing = read_log(tmp_path / "timing.csv")
    assert list(timing[0]) == ["step", "step_s", "a_s", "b_s", "tok_per_s", "mem_gib"]
    assert list(timing[0].values())[:5] == ["1", "5", "2", "3", "5"]
    assert list(timing[1].values())[:5] == ["2", "5", "4", "1", "2.5"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "00002/2" in line]
    assert len(lines) == 1 and "00002/2 | loss 2.25 | a_s 4 | b_s 1 | tok_per_s 2.5" in lines[0]


def test_due_is_every_so_often_and_at_the_end(world: World, tmp_path: Path) -> None:
    run = a_run(tmp_path, world)
    due = {every: [] for every in (0, 1, 3)}
    for step in run.steps(7):
        for every, steps in due.items():
            steps += [step] * run.due(every)
        run.log({})
    assert due == {0: [7], 1: [1, 2, 3, 4, 5, 6, 7], 3: [3, 6, 7]}


def test_a_validation_is_printed_wherever_it_is(world: World, tmp_path: Path, capsys) -> None:
    run = a_run(tmp_path, world, shows="val_loss", print_every=100)
    for step in run.steps(5):
        run.log({"val_loss": 0.5 if step == 3 else None})
    said = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if "/5" in line]
    assert said == [f"{tmp_path.name} 00003/5", f"{tmp_path.name} 00005/5"]


def test_the_first_row_of_a_log_sets_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = Log(path)
    log.write({"step": 1, "loss": 0.1234567890123, "val_loss": None})
    log.write({"val_loss": 3, "loss": 2, "step": 10**10})
    assert path.read_text() == "step,loss,val_loss\n1,0.123456789,\n10000000000,2,3\n"
    for row in ({"step": 2, "loss": 0.5}, {"step": 2, "loss": 1, "val_loss": 1, "more": 1}):
        with pytest.raises(ValueError, match="the row and the header differ in"):
            log.write(row)
    with path.open("a") as stream:
        stream.write("2,0.4")  # torn
    assert [row["step"] for row in read_log(path)] == ["1", "10000000000"]
    with pytest.raises(BadInput, match="header 'step,loss,val_loss', expected 'step'"):
        read_log(path, ["step"])


def test_an_earlier_log_stays_until_the_new_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step\n1\n2\n3\n")
    log = Log(path)
    log.write({"step": 1})
    assert path.read_text() == "step\n1\n2\n3\n"
    for step, text in ((2, "step\n1\n"), (3, "step\n1\n2\n")):
        log.keep()
        assert path.read_text() == text
        log.write({"step": step})
    assert names(tmp_path) == ["log.csv"]


@pytest.mark.parametrize("found", ["step\n1\n2\n3\n", "step\n1\n2\n3\n4", "step\n7\n8\n", None])
def test_a_resumed_log_is_the_checkpoints(found: str | None, tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "log.csv", tmp_path / "2"
    checkpoint.mkdir()
    (checkpoint / "log.csv").write_text("step\n1\n2\n")
    if found:
        path.write_text(found)
    log = Log(path, checkpoint)
    log.write({"step": 3})
    log.keep()
    assert path.read_text() == "step\n1\n2\n3\n"


# ------------------------------------------------------------------------------------------------
# Flags


TYPES = [  # what is taken as which value; what is refused
    (natural, {"1": 1, "1048576": 2**20}, "0 -1 1048577 1.5 1e3 nan"),
    (whole, {"0": 0, "4294967296": 2**32}, "-1 4294967297 1.0 inf"),
    (number, {"-4": -4.0, "1e30": 1e30}, "1e31 -1e31"),
    (nonnegative, {"0": 0.0, "2e-3": 0.002}, "-1e-9 1e31"),
    (fraction, {"0": 0.0, "1": 1.0, ".5": 0.5}, "-0.1 1.0001"),
]


@pytest.mark.parametrize(("kind", "good", "bad"), TYPES, ids=range(len(TYPES)))
def test_a_type_of_flag_takes_what_it_says(kind: Callable, good: dict, bad: str) -> None:
    assert {text: kind(text) for text in good} == good
    assert all(type(kind(text)) is type(value) for text, value in good.items())
    for text in [*bad.split(), "", "many", "nan", "-nan", "inf", "-inf", "1e999", "9" * 5000]:
        with pytest.raises(argparse.ArgumentTypeError, match="expected a (whole )?number"):
            kind(text)


REFUSED = [
    (["--lr", "-1"], "argument --lr: -1: expected a number from 0"),
    (["--batch_size", "0"], "--batch_size: 0: expected a whole number from 1 to 1048576"),
    (["--out", ""], "--out is empty: expected a path"),
    (["--data", ""], "--data is empty: expected a path"),
    (["--init", "{tmp}/y/../out"], "--out {tmp}/out would replace --init {tmp}/y/../out: give"),
    (["--data", "{tmp}/out"], "--out {tmp}/out would replace --data"),
    (["--init", "{tmp}/out/epochs/03"], "would replace --init"),
    (["--init", "{tmp}/out/checkpoints/00000006"], "would replace --init"),
    (["--device", "cuda"], "--device cuda: there is no CUDA GPU; give --device cpu"),
    (["--device", "tpu"], "argument --device: invalid choice"),
    (["--kernels", "fast"], "argument --kernels: "),
    (["--max_step", "3"], "unrecognized arguments: --max_step 3"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_arguments_that_are_refused(
    more: list[str], message: str, world: World, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more = [word.replace("{tmp}", str(tmp_path)) for word in more]
    assert world.go(tmp_path / "out", *more) == 2
    assert message.replace("{tmp}", str(tmp_path)) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_inputs_beside_the_run_are_taken(world: World, tmp_path: Path) -> None:
    """Also data in --out itself, and names that begin alike."""
    for out in (tmp_path, tmp_path / "out", world.folder / "ini"):
        (tmp_path / "d.txt").write_text("0.5")
        for path in (tmp_path / "d.txt", "/checkpoints/x", "/epochs/x", tmp_path / "out2"):
            assert toy.get_args(world.args(out, "--data", path)).data == str(path)


def test_the_longest_prompt_and_response_must_fit_every_model(world: World) -> None:
    args = toy.get_args(world.args(Path("x")))
    models = toy.Toy(), toy.Toy()
    check_context(args, *models)  # 96 + 32
    models[1].config.n_positions = 127
    with pytest.raises(BadInput) as error:
        check_context(args, *models)
    assert str(error.value) == (
        "--max_prompt_tokens 96 and --max_new_tokens 32 come to more than the context of 127: "
        "lower one"
    )
