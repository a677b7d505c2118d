"""--tensorboard: the columns of the logs as scalars; tests/toy.py is the run."""

import importlib.util
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from data.files import read_log

import pytest

from run import Run
from tests import toy

Scalars = dict[str, dict[int, float]]  # column -> step -> value


class Writer:
    """In place of torch.utils.tensorboard.SummaryWriter: keeps what it is told."""

    made: list["Writer"] = []

    def __init__(self, log_dir: Path, purge_step: int | None = None):
        self.folder, self.purge_step = Path(log_dir), purge_step
        self.scalars: Scalars = {}
        self.lost = 0  # scalars that are not yet on disk
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert step not in self.scalars.setdefault(name, {})
        self.scalars[name][step] = value
        self.lost += 1

    def flush(self) -> None:
        self.lost = 0


@pytest.fixture
def args(tmp_path: Path) -> list[str]:
    (tmp_path / "toy.txt").write_text("0.5")
    (tmp_path / "tokenizer.json").write_text("{}")
    board = ["--tensorboard", str(tmp_path / "board"), "--out", str(tmp_path / "run")]
    return [*board, "--data", str(tmp_path / "toy.txt"), "--init", str(tmp_path), "--device=cpu"]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    package, of_torch = ModuleType("tensorboard"), ModuleType("torch.utils.tensorboard")
    package.__spec__ = ModuleSpec("tensorboard", None)
    of_torch.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", of_torch)
    monkeypatch.setattr(Writer, "made", [])
    return Writer


def cells_of(out: Path, after: int = 0) -> Scalars:
    """The numbers of log.csv and timing.csv, of the steps after that one."""
    cells: Scalars = {}
    for name in ("log.csv", "timing.csv"):
        for row in read_log(out / name):
            step = int(row.pop("step"))
            for column, cell in row.items():
                if cell and step > after:
                    cells.setdefault(column, {})[step] = float(cell)
    return cells


def assert_same(found: Scalars, cells: Scalars) -> None:
    assert found.keys() == cells.keys() and {"loss", "val_loss", "step_s", "mem_gib"} <= set(cells)
    for name in cells:
        assert found[name] == pytest.approx(cells[name], rel=1e-6), name


def test_the_scalars_are_the_cells_of_the_logs(stub: type[Writer], args: list[str]) -> None:
    assert toy.main(args) == 0
    (writer,) = stub.made
    out = Path(args[3])
    assert writer.folder == Path(args[1], "run") and writer.lost == 0
    assert_same(writer.scalars, cells_of(out))
    assert set(writer.scalars["val_loss"]) == {4, 6}  # empty cells are not written
    assert not writer.purge_step  # all that an earlier run wrote, from step 0 on
    assert toy.main([*args, "--max_steps=2"]) == 0 and stub.made[-1].purge_step == 0


def die_after_row_5(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log = Run.log

    def dying(run: Run, row: dict) -> None:
        log(run, row)
        if run.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", dying)
        toy.main(args)


def test_a_resume_cuts_what_came_after_the_checkpoint(
    stub: type[Writer], args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies after row 5, the newest checkpoint being of step 4."""
    die_after_row_5(args, monkeypatch)
    assert set(stub.made[0].scalars["loss"]) == {1, 2, 3, 4, 5} and stub.made[0].lost == 0
    assert toy.main([*args, "--resume"]) == 0
    assert stub.made[1].purge_step == 5
    assert_same(stub.made[1].scalars, cells_of(Path(args[3]), after=4))


def test_it_decides_no_number(stub: type[Writer], args: list[str]) -> None:
    """A run that goes on with it, or without it, is the same run, and reads no such file."""
    assert toy.main(args) == 0
    log = Path(args[3], "log.csv").read_bytes()
    assert toy.main([*args[2:], "--resume"]) == 0
    assert toy.main([*args[2:]]) == 0 and Path(args[3], "log.csv").read_bytes() == log
    assert toy.main([*args, "--resume"]) == 0 and len(stub.made) == 2
    assert toy.main([*args, "--tensorboard", args[3]]) == 0  # it is no input that --out replaces


def test_without_the_package_one_line_says_so(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "tensorboard" else find(n)
    )
    with pytest.raises(SystemExit) as stopped:
        toy.main(args)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "the package tensorboard is missing: pip install tensorboard" in said
    assert not Path(args[3]).exists() and not Path(args[1]).exists()


def test_tensorboard_reads_the_same_numbers(
    args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the package: over a run that died after row 5, resumed from step 4."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    die_after_row_5([*args, "--seed=1"], monkeypatch)  # of which nothing may be left
    die_after_row_5(args, monkeypatch)
    assert toy.main([*args, "--resume"]) == 0
    board = EventAccumulator(str(Path(args[1], "run")))
    board.Reload()
    found = {
        name: {event.step: event.value for event in board.Scalars(name)}
        for name in board.Tags()["scalars"]
    }
    cells = cells_of(Path(args[3]))
    assert_same({k: v for k, v in found.items() if k in cells}, cells)
    assert found.keys() == cells.keys() and not any(map(math.isnan, found["loss"].values()))
