"""run.py's promises, with a loop of one number (tests/toy.py): resume, kept models, logs, signals.

Each check is run as it is, and must fail with each of the bugs planted for it.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data import files, outputs
from data.commands import run_command
from data.files import BadInput, read_log, write_folder_atomic
from data.flags import fraction, natural, nonnegative, number, whole

import pytest
import torch

import run as run_file
from checkpoint import read_info
from run import Log, Run, check_context
from tests import toy
from tests.crash import Server, bytes_lost, contents, run_dying_at, same_steps

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Killed(BaseException):
    """In place of SIGKILL, where no file is being written."""


FULL = "the disk is full; free some space, and repeat the command"


class World:
    """A data file, a tokenizer, an uninterrupted run over them; `out`, a place for another."""

    def __init__(self, folder: Path):
        self.data, self.init, self.whole = (folder / name for name in ("toy.txt", "init", "whole"))
        self.init.mkdir()
        (self.init / "tokenizer.json").write_text("{}")
        self.data.write_text("0.5")
        self.out = self.whole
        assert self.go() == 0

    def args(self, *more: object) -> list[str]:
        args = ("--out", self.out, "--data", self.data, "--init", self.init, "--device", "cpu")
        return [str(arg) for arg in (*args, *more)]

    def go(self, *more: object) -> int:
        """Run in this process; the exit code."""
        try:
            return run_command(lambda: toy.main(self.args(*more)))
        except SystemExit as leaving:
            return leaving.code

    def dies(self, name: str, step: int, *more: object) -> None:
        """Run, dying after `Run.<name>` of a step."""
        original = getattr(Run, name)

        def last(run: Run, *args) -> None:
            original(run, *args)
            if run.step == step:
                raise Killed

        with self.patch.context() as patch, pytest.raises(Killed):
            patch.setattr(Run, name, last)
            toy.main(self.args(*more))
        outputs.release()

    def copy(self) -> Path:
        shutil.rmtree(self.out, ignore_errors=True)
        return Path(shutil.copytree(self.whole, self.out))

    def bug(self) -> None:
        """Where a planted bug is set: only then would it matter."""
        self.planted(self.patch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def w(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made.out, made.patch, made.planted = tmp_path / "out", monkeypatch, lambda patch: None
    return made


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


def resumes_exactly(w: World) -> None:
    """After a death past row 5, the newest checkpoint being of step 4."""
    w.dies("log", 5)
    assert names(w.out / "checkpoints") == ["00000003", "00000004"]
    assert [row["step"] for row in read_log(w.out / "log.csv")] == list("12345")
    w.bug()
    assert w.go("--resume") == 0
    assert_same(w.out, w.whole)


def copies_a_kept_model_again(w: World) -> None:
    """Killed between the checkpoint and the copy."""

    def write(folder: Path, content: Callable) -> None:
        if folder.parent.name == "epochs":
            raise Killed
        write_folder_atomic(folder, content)

    with w.patch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "write_folder_atomic", write)
        toy.main(w.args())
    assert names(w.out / "checkpoints")[-1] == "00000003" and names(w.out / "epochs") == []
    w.bug()
    assert w.go("--resume") == 0
    assert_same(w.out, w.whole)


def drops_kept_models_of_later_steps(w: World) -> None:
    """And those that are damaged, or of other settings."""
    epochs = w.copy() / "epochs"
    (w.out / "checkpoints/00000006/state.pt").write_bytes(b"")
    shutil.copytree(epochs / "03", epochs / "01")
    (epochs / "01/config.json").write_text("{}")
    other = Path(shutil.copytree(epochs / "03", w.out / "steps/00001"))
    info = read_info(other)
    info["settings"]["lr"] = 7
    (other / "config.json").write_text(json.dumps(info))
    seal(other)
    w.bug()
    w.dies("lap", 5, "--resume")
    assert (names(epochs), names(w.out / "steps")) == (["03"], [])


def passes_over_damage(w: World) -> None:
    w.bug()
    for damage in (
        lambda f: (f / "state.pt").write_bytes((f / "state.pt").read_bytes()[:-1]),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "config.json").write_text("{}"),
        lambda f: (f / "SHA256SUMS").unlink(),
        lambda f: (f / "log.csv").write_text(""),
    ):
        damage(w.copy() / "checkpoints/00000006")
        assert w.go("--resume") == 0
        assert_same(w.out, w.whole)


def refuses_other_settings(w: World) -> None:
    w.copy()
    w.bug()
    for more in ("--lr=0.2", "--seed=1", "--max_steps=5", "--dtype=bfloat16"):
        assert w.go("--resume", more) == 2
    assert_same(w.out, w.whole)


def refuses_another_input(w: World) -> None:
    """Under the same name: the data, or the model it starts from."""
    w.bug()
    assert w.go() == 0
    before = contents(w.out)
    for path in (w.data, w.init / "tokenizer.json"):
        text = path.read_text()
        path.write_text(f"{text} ")
        try:
            assert w.go("--resume") == 2
        finally:
            path.write_text(text)
    assert contents(w.out) == before


def leaves_an_earlier_result(w: World) -> None:
    """Until the first checkpoint; then nothing of it is left."""
    w.copy()
    w.bug()
    w.dies("log", 1, "--seed", 1)
    assert contents(w.out) == contents(w.whole)
    w.dies("_save", 2, "--seed", 1)
    assert not (w.out / "model.safetensors").exists() and len(read_log(w.out / "log.csv")) == 2
    assert (names(w.out / "checkpoints"), names(w.out / "epochs")) == (["00000002"], [])


def stops_where_not_finite(w: World) -> None:
    """With code 1, before the save; what was there stays."""
    w.bug()
    assert w.go("--bad_step", 4) == 1
    assert names(w.out / "checkpoints") == ["00000002", "00000003"]
    assert len(read_log(w.out / "log.csv")) == 3 and not (w.out / "model.safetensors").exists()


def keeps_two_checkpoints(w: World) -> None:
    w.bug()
    w.dies("_save", 4)
    assert names(w.out / "checkpoints") == ["00000003", "00000004"]
    assert w.go("--resume") == 0
    assert names(w.out / "checkpoints") == ["00000004", "00000006"]


def leaves_what_a_user_put_there(w: World) -> None:
    """At the start, at a resume and at the end."""
    users = ["best", "0000003", "000000003", "0000000x", "notes.txt/00000001"]
    users = [f"checkpoints/{name}/file" for name in users] + ["epochs/notes/x", "steps/last/x"]
    users += ["checkpoints/00000099", "mine.txt"]  # a file, whatever its name
    for user in users:
        (w.out / user).parent.mkdir(parents=True, exist_ok=True)
        (w.out / user).write_text("mine")
    w.bug()
    w.dies("log", 5)
    assert w.go("--resume") == 0 and w.go("--seed", 1) == 0
    assert [user for user in users if not (w.out / user).is_file()] == []


def restore_without(name: str) -> Callable[[Run], Path | None]:
    """`Run._restore` that leaves out one name of the state."""
    original = Run._restore

    def restore(run: Run) -> Path | None:
        whole = run.state
        run.state = {key: each for key, each in whole.items() if key != name}
        newest = original(run)
        run.state = whole
        return newest

    return restore


LOG, TIDY = Log.__init__, Run._tidy
BUGS = {f"{name} not restored": (Run, "_restore", restore_without(name)) for name in toy.STATE} | {
    "not seeded by the step": (torch, "manual_seed", lambda seed: torch.default_generator),
    "log not cut back": (Log, "__init__", lambda log, path, *_: LOG(log, path, path.parent)),
    "earlier log overwritten": (Log, "__init__", lambda log, *args: LOG(log, *args) or log.keep()),
    "earlier result stays": (Path, "unlink", lambda path, missing_ok=False: None),
    "kept only by save": (Run, "_tidy", lambda r: TIDY(r) if hasattr(r, "step") else None),
    "checksums not looked at": (files, "folder_is_intact", lambda folder: True),
    "settings not compared": (Run, "_differences", lambda run, folder: ""),
    "inputs not read": (run_file, "_fingerprints", lambda args: {}),
    "any step is past": (run_file, "read_info", lambda folder: read_info(folder) | {"step": 0}),
    "nothing deleted": (shutil, "rmtree", lambda *args, **kwargs: None),
    "all deleted": (run_file, "kept_folders", lambda r: sorted((r / "checkpoints").iterdir())),
    "nothing is infinite": (math, "isfinite", lambda value: True),
}
CHECKS = {  # and the bugs that each catches
    resumes_exactly: [*list(BUGS)[:3], "not seeded by the step", "log not cut back"],
    copies_a_kept_model_again: ["kept only by save"],
    drops_kept_models_of_later_steps: ["any step is past", "settings not compared"],
    passes_over_damage: ["checksums not looked at"],
    refuses_other_settings: ["settings not compared"],
    refuses_another_input: ["inputs not read"],
    leaves_an_earlier_result: [
        "earlier log overwritten",
        "earlier result stays",
        "nothing deleted",
    ],
    stops_where_not_finite: ["nothing is infinite"],
    keeps_two_checkpoints: ["nothing deleted"],
    leaves_what_a_user_put_there: ["all deleted"],
}
PLANTED = [(check, bug) for check, bugs in CHECKS.items() for bug in bugs]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_run(check: Callable, w: World) -> None:
    check(w)


@pytest.mark.parametrize(("check", "bug"), PLANTED, ids=[f"{c.__name__}-{b}" for c, b in PLANTED])
def test_a_planted_bug_is_caught(check: Callable, bug: str, w: World) -> None:
    w.planted = lambda patch: patch.setattr(*BUGS[bug])
    with pytest.raises((AssertionError, OSError)):
        check(w)


# ------------------------------------------------------------------------------------------------
# Killed at any point


def test_a_run_is_a_function_of_its_arguments(w: World) -> None:
    for more in ([], ["--resume"]):  # and a run that is done stays as it is
        assert w.go(*more) == 0
        assert_same(w.out, w.whole)
    assert w.go("--seed", 1) == 0
    assert bytes_lost(contents(w.whole), contents(w.out)) > 100


def test_dying_at_any_file_operation_loses_nothing(
    w: World, server: Server, tmp_path: Path
) -> None:
    """Over an earlier run of other settings, whose files must all be gone at the end."""
    assert w.go("--seed", 9, "--max_steps", 9) == 0
    earlier = shutil.copytree(w.out, tmp_path / "earlier")
    operations = server.run("toy", w.args()).operations
    for count in sorted(random.sample(range(1, operations + 1), 8)):
        shutil.rmtree(w.out)
        shutil.copytree(earlier, w.out)
        run_dying_at(server, "toy", w.args(), count)
        assert_same(w.out, w.whole)


def test_a_file_that_torch_cannot_write_is_one_line(tmp_path: Path) -> None:
    """Its writer raises no OSError. The limit is that of one process, for all its files."""
    code = (
        "import resource, signal, torch; from pathlib import Path;"
        "from checkpoint import save_state; from data.commands import run_command;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "model = torch.nn.Linear(200, 200); resource.setrlimit(resource.RLIMIT_FSIZE, (5e4, 5e4));"
        f"path = Path({str(tmp_path)!r}) / 'state.pt';"
        "raise SystemExit(run_command(lambda: save_state(path, 1, {'model': model})))"
    ).replace("5e4", "50000")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stderr == f"error: {tmp_path}/state.pt: {FULL}\n"


def test_a_full_disk_stops_a_run_and_loses_nothing(w: World, server: Server) -> None:
    run = server.run("toy", w.args(), dict.fromkeys(range(50, 9999), "full"))
    assert run.code == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: ") and run.stderr.endswith(FULL + "\n")
    assert server.run("toy", w.args("--resume")).code == 0
    assert_same(w.out, w.whole)


@pytest.mark.parametrize(("damaged", "start"), [(1, 4), (2, 0)])
def test_damage_is_said(damaged: int, start: int, w: World, capsys) -> None:
    """And without an intact checkpoint a run starts over."""
    folders = sorted((w.copy() / "checkpoints").iterdir(), reverse=True)[:damaged]
    for folder in folders:
        (folder / "state.pt").write_bytes(b"")
    assert w.go("--resume") == 0
    said = capsys.readouterr()
    lines = [f"warning: {folder} is damaged; trying the one before\n" for folder in folders]
    assert said.err == "".join(lines) and f"from {start}\n" in said.out
    assert_same(w.out, w.whole)


class Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("state", [Evil(), {"step": Evil()}, {"step": 2}, [1, 2], None])
def test_a_crafted_state_is_refused_and_not_executed(
    state: object, w: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A pickle in place of a checkpoint's state, with checksums that are right."""
    w.patch.chdir(tmp_path)
    folder = w.copy() / "checkpoints/00000006"
    torch.save(state, folder / "state.pt")
    seal(folder)
    assert w.go("--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}/state.pt: not the state of such a run")
    assert error.count("\n") == 1 and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../stolen", "epochs/../../stolen", "{tmp}/stolen", 5, None])
def test_a_crafted_place_of_a_kept_model_is_not_written(
    name: object, w: World, tmp_path: Path
) -> None:
    name = name.replace("{tmp}", str(tmp_path)) if isinstance(name, str) else name
    folder = w.copy() / "checkpoints/00000006"
    (folder / "config.json").write_text(json.dumps(read_info(folder) | {"kept_as": name}))
    seal(folder)
    assert w.go("--resume") == 0
    assert names(tmp_path) == ["out"] and names(w.out / "epochs") == ["03", "06"]


MEMORY = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
MEMORY += [RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_too_little_memory_at_a_resume_is_no_damaged_state(error, w: World, capsys) -> None:
    def load(*_, **__) -> None:
        raise error

    w.copy()
    w.patch.setattr(torch, "load", load)
    assert w.go("--resume") == 1
    assert capsys.readouterr().err == "error: out of memory; lower --batch_size\n"


# ------------------------------------------------------------------------------------------------
# Other settings, other runs


def test_the_difference_is_said(w: World, capsys: pytest.CaptureFixture) -> None:
    newest = w.copy() / "checkpoints/00000006"
    assert w.go("--resume", "--lr", 0.25, "--max_steps", 9) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {newest}: --resume with other settings: ")
    assert "lr was 0.1, is 0.25" in error and "max_steps was 6, is 9" in error
    assert error.count(" was ") == 2 and error.count("\n") == 1


def test_where_a_run_is_and_how_often_it_saves_may_change(w: World, tmp_path: Path) -> None:
    w.dies("log", 3, "--save_every", 1)
    w.out = w.out.rename(tmp_path / "moved")
    assert w.go("--save_every", 5, "--resume") == 0
    for name in ("model.safetensors", "log.csv", "epochs/06/model.safetensors"):
        assert (w.out / name).read_bytes() == (w.whole / name).read_bytes()


@pytest.mark.parametrize(("mine", "other"), [(0, 1), (1, 0)])
def test_of_two_runs_that_are_there_the_one_asked_for_goes_on(
    mine: int, other: int, w: World, tmp_path: Path
) -> None:
    """A run was killed at its first checkpoint, before the earlier run's were gone."""
    for seed in (mine, other):
        w.out = tmp_path / f"seed {seed}"
        w.dies("_save", 2 if seed else 4, "--seed", seed)
    shutil.copytree(w.out, tmp_path / "both")
    shutil.copytree(tmp_path / f"seed {mine}", tmp_path / "both", dirs_exist_ok=True)
    for name, more in (("both", ["--resume"]), ("whole", [])):
        w.out = tmp_path / name
        assert w.go("--seed", mine, *more) == 0
    assert_same(tmp_path / "both", tmp_path / "whole")


def test_what_a_result_says_of_its_run(w: World) -> None:
    info = read_info(w.whole)
    assert (info["stage"], info["data"], info["more"]) == ("toy", [str(w.data)], "more")
    assert info["settings"]["lr"] == 0.1 and "resume" not in info["settings"]
    read = [w.data, w.init / "tokenizer.json"]
    assert info["settings"]["sha256"] == {str(path): files.fingerprint(path) for path in read}
    kept = read_info(w.whole / "epochs/03")
    assert (kept["step"], kept["epoch"], kept["kept_as"]) == (3, 3, "epochs/03")
    assert names(w.whole / "epochs/03") == ["SHA256SUMS", *sorted(run_file.MODEL)]


# ------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_leaves(
    sent: signal.Signals, code: int, w: World, capsys: pytest.CaptureFixture
) -> None:
    """Also without --save_every: the checkpoint is of that very step."""
    lap, handlers = Run.lap, [signal.getsignal(each) for each in SIGNALS]

    def during(self, *args) -> None:
        lap(self, *args)
        if self.step == 2:
            os.kill(os.getpid(), sent)

    with w.patch.context() as patch:
        patch.setattr(Run, "lap", during)
        assert w.go("--save_every", 0) == code
    assert capsys.readouterr().err == "stopped by a signal after step 2; --resume goes on\n"
    assert [row["step"] for row in read_log(w.out / "log.csv")] == ["1", "2"]
    assert names(w.out / "checkpoints") == ["00000002"]
    assert not (w.out / "model.safetensors").exists()
    for each, handler in zip(SIGNALS, handlers, strict=True):
        assert signal.getsignal(each) == signal.SIG_DFL  # a second one would have left at once
        signal.signal(each, handler)
    assert w.go("--resume") == 0
    assert_same(w.out, w.whole)
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_leaves_at_once_without_damage(
    second: signal.Signals, w: World, server: Server
) -> None:
    run = server.run("toy", w.args(), {30: signal.SIGINT, 31: second})
    assert run.code == -second
    assert server.run("toy", w.args("--resume")).code == 0
    assert_same(w.out, w.whole)


# ------------------------------------------------------------------------------------------------
# Arithmetic, logs


def a_run(w: World, **how: object) -> Run:
    return Run(toy.get_args(w.args()), "toy", toy.Toy(), w.init, {}, **how)


def test_sums_maxima_and_laps(w: World, capsys: pytest.CaptureFixture) -> None:
    clock = iter([0.0, 2.0, 5.0, 10.0, 14.0, 15.0])
    w.patch.setattr(run_file.time, "perf_counter", lambda: next(clock))
    run = a_run(w, shows="loss val_loss absent", print_every=2)
    for step in run.steps(2):
        run.add({"loss": torch.tensor(1.0), "n": 3}, 0.25)
        run.add({"loss": 2 * step}, torch.tensor(0.5))
        for value in (1.0, 3.0, 2.0):
            run.max({"largest": value})
        run.lap("a_s", 10)
        run.lap("b_s")
        run.log({"lr": 0.5, "val_loss": None})
    log = read_log(w.out / "log.csv")
    assert list(log[0]) == ["step", "lr", "val_loss", "loss", "n", "largest"]
    assert list(log[1].values()) == ["2", "0.5", "", "2.25", "0.75", "3"]
    assert log[0]["loss"] == "1.25"
    timing = read_log(w.out / "timing.csv")
    assert list(timing[0]) == ["step", "step_s", "a_s", "b_s", "tok_per_s", "mem_gib"]
    assert list(timing[0].values())[:5] == ["1", "5", "2", "3", "5"]
    assert list(timing[1].values())[:5] == ["2", "5", "4", "1", "2.5"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "00002/2" in line]
    assert len(lines) == 1 and "00002/2 | loss 2.25 | a_s 4 | b_s 1 | tok_per_s 2.5" in lines[0]


def test_what_is_measured_before_the_first_step_is_row_0(w: World, capsys) -> None:
    """Hand-worked: mean and 1.96 standard errors; then the columns of the first row are known."""
    clock = iter([0.0, 1.0, 9.0, 12.0, 20.0, 21.0, 22.0, 23.0])
    w.patch.setattr(run_file.time, "perf_counter", lambda: next(clock))
    run, half = a_run(w, shows="val_score"), 1.96 * math.sqrt(2 / 3) / math.sqrt(3)
    for step in run.steps(2):
        if step == 1:
            run.lap("a_s")
            run.log_start({"val_score": torch.tensor([1.0, 2.0, 3.0])})
        run.lap("a_s")  # from the end of row 0 on
        run.mean({"gain": torch.tensor([4.0, 4.0])})
        if step == 2:
            run.mean({"val_score": torch.tensor([5.0])})
        run.log({"lr": 0.5})
    rows = read_log(w.out / "log.csv")
    assert list(rows[0]) == ["step", "lr", "gain", "gain_ci", "val_score", "val_score_ci"]
    assert list(rows[0].values())[:5] == ["0", "", "", "", "2"]
    assert float(rows[0]["val_score_ci"]) == pytest.approx(half)
    assert list(rows[1].values()) == ["1", "0.5", "4", "0", "", ""]
    assert list(rows[2].values()) == ["2", "0.5", "4", "0", "5", "0"]
    assert [row["a_s"] for row in read_log(w.out / "timing.csv")] == ["3", "1"]
    assert "\nout 00000/2 | val_score 2\n" in capsys.readouterr().out
    run = a_run(w)
    with pytest.raises(SystemExit):
        for _ in run.steps(2):
            run.log_start({"val_score": torch.tensor([math.inf, 0])})
            run.log({})


def test_due_is_every_so_often_and_at_the_end(w: World) -> None:
    run = a_run(w)
    due = {every: [] for every in (0, 1, 3)}
    for step in run.steps(7):
        for every, steps in due.items():
            steps += [step] * run.due(every)
        run.log({})
    assert due == {0: [7], 1: [1, 2, 3, 4, 5, 6, 7], 3: [3, 6, 7]}


def test_a_validation_is_printed_wherever_it_is(w: World, capsys: pytest.CaptureFixture) -> None:
    run = a_run(w, shows="val_loss", print_every=100)
    for step in run.steps(5):
        run.log({"val_loss": 0.5 if step == 3 else None})
    said = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if "/5" in line]
    assert said == ["out 00003/5", "out 00005/5"]


def test_the_first_row_of_a_log_sets_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = Log(path)
    log.write({"step": 1, "loss": 0.1234567890123, "val_loss": None})
    log.write({"val_loss": 3, "loss": 2, "step": 10**10})
    assert path.read_text() == "step,loss,val_loss\n1,0.123456789,\n10000000000,2,3\n"
    log.write({"step": 3, "loss": 0.5})
    with pytest.raises(ValueError, match=r"the header has no columns \['more'\]"):
        log.write({"step": 4, "loss": 1, "val_loss": 1, "more": 1})
    assert path.read_text().endswith("\n3,0.5,\n")
    with path.open("a") as stream:
        stream.write("2,0.4")  # torn
    assert [row["step"] for row in read_log(path)] == ["1", "10000000000", "3"]


def test_a_log_replaces_what_was_there_when_it_is_kept(tmp_path: Path) -> None:
    """At once where a checkpoint holds its beginning."""
    path, checkpoint = tmp_path / "log.csv", tmp_path / "2"
    checkpoint.mkdir()
    for place in (path, checkpoint / "log.csv"):
        place.write_text("step\n1\n2\n")
    log = Log(path)
    log.write({"step": 7})
    assert path.read_text() == "step\n1\n2\n"
    log.keep()
    log.write({"step": 8})
    assert path.read_text() == "step\n7\n8\n"
    log = Log(path, checkpoint)
    assert path.read_text() == "step\n1\n2\n"
    log.write({"step": 3})
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
    (["--out", ""], "--out is empty: expected a value"),
    (["--data", ""], "--data is empty: expected a value"),
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
    more: list[str], message: str, w: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    w.patch.setattr(torch.cuda, "is_available", lambda: False)
    assert w.go(*(word.replace("{tmp}", str(tmp_path)) for word in more)) == 2
    assert message.replace("{tmp}", str(tmp_path)) in capsys.readouterr().err.splitlines()[-1]
    assert not w.out.exists()


def test_inputs_beside_the_run_are_taken(w: World, tmp_path: Path) -> None:
    """Also data in --out itself, and names that begin alike."""
    for w.out in (tmp_path, tmp_path / "out"):
        for path in (tmp_path / "d.txt", "/checkpoints/x", "/epochs/x", tmp_path / "out2"):
            assert toy.get_args(w.args("--data", path)).data == str(path)


def test_the_longest_prompt_and_response_must_fit_every_model(w: World) -> None:
    args, models = toy.get_args(w.args()), [toy.Toy(), toy.Toy()]
    check_context(args, *models)  # 96 + 32
    models[1].config.n_positions = 127
    message = (
        "^--max_prompt_tokens 96 and --max_new_tokens 32 come to more than .* of 127: lower one"
    )
    with pytest.raises(BadInput, match=message):
        check_context(args, *models)
