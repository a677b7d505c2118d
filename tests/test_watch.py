"""The figure that is drawn while models are trained."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from data.commands import run_command

import matplotlib.image
import pytest

from evaluation import watch
from evaluation.watch import Columns, main, panels_of, read_columns
from tests.makefile import ROOT, dry_run

SFT = "step,loss,val_loss\n1,3.5,\n2,3,2.75\n"
PPO = (
    "step,score,val_score,val_score_ci,score_gain,kl,ptx_loss,odd\n"
    "0,,0.5,0.125,,,,1\n1,0.25,,,0.75,0,4,1\n2,0.5,0.5,0.25,1,0.5,3,1\n"
)


def write(out: Path, run: str, text: str) -> Path:
    path = out / run / "log.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Columns]]:
    """What is given to `draw`, each time; nothing is drawn."""
    seen = []
    monkeypatch.setattr(watch, "draw", lambda path, runs: seen.append(runs))
    return seen


def test_panels_are_those_whose_columns_have_a_number(tmp_path: Path) -> None:
    ppo = read_columns(write(tmp_path, "ppo", PPO))
    assert ppo["step"] == [0, 1, 2] and ppo["kl"][1:] == [0, 0.5]
    assert panels_of(ppo) == {
        "loss on pretraining text": ["ptx_loss"],
        "score": ["score", "val_score"],
        "score gained": ["score_gain"],
        "KL to the reference": ["kl"],
    }
    assert panels_of(read_columns(write(tmp_path, "sft", SFT))) == {"loss": ["loss", "val_loss"]}
    early = read_columns(write(tmp_path, "early", SFT[: SFT.index("2,")]))
    assert panels_of(early) == {"loss": ["loss"]}


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", None),  # a log that has just been opened
        ("step,lo", None),
        ("step,loss\n", None),
        ("step,loss\n1,3\n2,2.", [1]),  # half-written last lines
        ("step,loss\n1,3\n2", [1]),
        ("step,loss\n1,3\n2,\n", [1, 2]),
        ("step,loss\n1,3\n2,2,2\n", None),  # not a log of ours, or of two runs
        ("step,loss\n1,three\n", None),
        ("\x00\x00\x00", None),
    ],
)
def test_a_log_in_any_state(text: str, steps: list | None, tmp_path: Path) -> None:
    assert read_columns(write(tmp_path, "sft", text)).get("step") == steps


def test_an_absent_log_has_no_columns(tmp_path: Path) -> None:
    assert read_columns(tmp_path / "log.csv") == {}
    (tmp_path / "log.csv").mkdir()
    assert read_columns(tmp_path / "log.csv") == {}


def test_the_figure_is_there_and_leaves_nothing_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path, "sft", SFT), write(tmp_path, "ppo", PPO), write(tmp_path, "empty", "")
    write(tmp_path, "sft/checkpoints/00000002", SFT)  # the copy of a checkpoint is no run
    assert main(["--out", str(tmp_path), "--once"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/watch.png: steps ppo 2, sft 2\n"
    height, width, _ = matplotlib.image.imread(tmp_path / "watch.png").shape
    assert width > 1.5 * height  # four panels in the row of PPO, two rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "ppo", "sft", "watch.png"]


def test_a_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = drawn(monkeypatch)
    write(tmp_path, "sft", SFT)
    assert main(["--out", str(tmp_path / "sft"), "--once"]) == 0
    assert list(seen[0]) == ["sft"]


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "new")
    assert run_command(lambda: main(["--out", out, "--once"])) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path(out).exists()
    assert main(["--out", out, "--every", "0.1", "--patience", "0.2"]) == 0
    assert capsys.readouterr().out == f"no log in {out} has grown for 0.2 seconds\n"


def test_it_draws_when_a_log_has_changed_and_leaves_with_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Three looks while nothing changes are one line; a run that starts over is drawn again."""
    seen, looks, log = drawn(monkeypatch), [0], write(tmp_path, "sft", SFT)
    result = tmp_path / "sft/model.safetensors"

    def later(path: Path, seconds: int) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time.time() + seconds,) * 2)

    def between(_: float) -> None:
        looks[0] += 1
        if looks[0] == 3:
            log.write_text("step,loss\n1,9\n")
            later(log, 10)
        if looks[0] == 4:
            later(result, 0)
            later(tmp_path / "report/report.md", 5)  # an earlier one, older than the log
        if looks[0] == 6:
            result.unlink()  # the run is at work
            later(tmp_path / "report/report.md", 20)
        if looks[0] == 9:
            later(result, 0)
        assert looks[0] < 12

    monkeypatch.setattr(watch.time, "sleep", between)
    assert main(["--out", str(tmp_path)]) == 0
    assert looks[0] == 9
    assert [runs["sft"]["loss"] for runs in seen] == [[3.5, 3], [9]]
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["2", "1", "done"]


def test_every_moment_of_a_log_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread writes byte by byte, starts over, deletes; each look has whole rows or none."""
    done, path = threading.Event(), write(tmp_path, "sft", "")

    def writer() -> None:
        for _ in range(3):
            with path.open("w", buffering=1) as file:
                for character in SFT:
                    file.write(character)
                    file.flush()
                    time.sleep(0.0005)
            path.unlink()
        done.set()

    thread = threading.Thread(target=writer)
    thread.start()
    found = set()
    while not done.is_set():
        found.add(tuple(read_columns(path).get("step", ())))
        watch.find_logs(tmp_path)
    thread.join()
    assert found <= {(), (1,), (1, 2)}


def test_ctrl_c_ends_it_in_one_line(tmp_path: Path) -> None:
    write(tmp_path, "sft", SFT)
    command = [sys.executable, "-m", "evaluation.watch", "--out", str(tmp_path), "--every", "60"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline().endswith("steps sft 2\n")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "stopped watching\n", "")


def test_make_watch_calls_it() -> None:
    (line,) = (line for line in dry_run("watch", OUT="x") if "evaluation.watch" in line)
    assert line == "nice .venv/bin/python -m evaluation.watch --out x"


@pytest.mark.parametrize("argv", [["--every", "0"], ["--patience", "nan"], ["--every", "x"]])
def test_odd_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
