"""What the Makefile asks before a stage: threads, and the line of the demo's stages."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from data import stages
from data.stages import STAGES, Stage

import pytest

from tests.makefile import ROOT, clean_environment, dry_run

# ------------------------------------------------------------------------------------------------
# Threads

#                user nice system idle iowait irq softirq steal guest guest_nice
BEFORE = """cpu  1000 0 0 1000 0 0 0 0 0 0
cpu0 100 10 20 500 50 1 2 3 0 0
cpu1 900 0 0 100 0 0 0 0 0 0
cpu10 7 7 7 7 7 7 7 7 7 7
intr 1 2 3
"""
# Of 50 ticks, core 0 has 5 + 2 + 1 + 1 + 1 = 10 of work; core 1 has 25 of 50; core 10 has none.
AFTER = """cpu  2000 0 0 2000 0 0 0 0 0 0
cpu0 105 12 21 535 55 1 3 4 0 0
cpu1 925 0 0 125 0 0 0 0 25 0
cpu10 7 7 7 57 7 7 7 7 7 7
intr 1 2 3
"""


def test_ticks_of_work_and_all_by_hand() -> None:
    assert stages.busy_and_all(BEFORE, [0, 1, 2]) == {0: (136, 686), 1: (900, 1000)}
    assert stages.busy_and_all(AFTER, [0, 1, 2]) == {0: (146, 736), 1: (925, 1050)}


@pytest.mark.parametrize(
    ("cores", "quota", "free"),
    [
        ({0}, 9, 1),  # 0.8
        ({1}, 9, 1),  # 0.5: at least 1
        ({0, 1}, 9, 1),  # 0.8 + 0.5 = 1.3
        ({0, 10}, 9, 2),  # 0.8 + 1
        ({0, 1, 10}, 9, 2),  # 2.3
        ({0, 10}, 1.2, 1),  # what a container may use
        ({0, 10}, 0.2, 1),
    ],
)
def test_the_idle_shares_of_the_allowed_cores_are_added(
    cores: set, quota: float, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    stat.write_text(BEFORE)
    monkeypatch.setattr(stages, "allowed_cores", lambda: cores)
    monkeypatch.setattr(stages, "quota", lambda: quota)
    monkeypatch.setattr(time, "sleep", lambda seconds: stat.write_text(AFTER))
    assert stages.free_cores(0.5, stat) == free


def test_without_proc_stat_all_cores_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "allowed_cores", lambda: {0, 3, 5})
    monkeypatch.setattr(stages, "quota", lambda: float("inf"))
    assert stages.free_cores(0.5, tmp_path / "absent") == 3


def test_the_quota_of_a_container(tmp_path: Path) -> None:
    assert stages.quota(tmp_path) == float("inf")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert stages.quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert stages.quota(tmp_path) == 4
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert stages.quota(tmp_path) == float("inf")


@pytest.mark.parametrize(
    ("given", "half", "alone"),
    [("", 4, 5), ("2", 2, 2), ("16", 4, 16), ("0", 4, 5), ("4,2", 4, 5)],
)
def test_threads_that_the_user_gives_are_kept(
    given: str, half: int, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(stages, "allowed_cores", lambda: set(range(9)))
    monkeypatch.setattr(stages, "free_cores", lambda: 5)
    assert (stages.threads(alone=False), stages.threads(alone=True)) == (half, alone)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux alone counts clock ticks")
def test_the_command_answers_within_a_moment() -> None:
    """Of its own time, not of what a busy machine makes of it; and it loads no package."""
    here = clean_environment(OMP_NUM_THREADS="")
    command = [sys.executable, "-X", "importtime", "data/stages.py", "free"]
    before = os.times()
    run = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=True)
    used = os.times()
    assert 1 <= int(run.stdout) <= (os.cpu_count() or 1)
    spent = used.children_user + used.children_system
    assert spent - before.children_user - before.children_system < 0.2
    assert not re.search(r"\b(torch|numpy|tqdm)\b", run.stderr)


# ------------------------------------------------------------------------------------------------
# The line


WORKED = {
    "a": Stage("A", 10, alone=True),
    "b": Stage("B", 30),
    "c": Stage("C", 50),
    "d": Stage("D", 30),
    "e": Stage("E", 20, alone=True),
}


def test_two_stages_at_a_time_by_hand() -> None:
    """a 0-10 alone; b 10-40 beside c 10-60; d after b 40-70; e alone 70-90."""
    every = stages.schedule("abcde", WORKED)
    assert every == {"a": 0, "b": 10, "c": 10, "d": 40, "e": 70, "": 90}
    # Of two side by side the longer counts: c 0-50 beside d 0-30, then e.
    assert stages.schedule("cde", WORKED) == {"c": 0, "d": 0, "e": 50, "": 70}
    assert stages.schedule("", WORKED) == {"": 0}


def test_seconds_left_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 of 240 planned seconds took 150, and 30 more count at the planned speed: twice as long."""
    assert stages.seconds_left(60, 240, 150) == (240 - 60) * 2
    assert stages.seconds_left(0, 240, 0) == 240
    monkeypatch.setattr(stages, "STEADY", 0)
    assert stages.seconds_left(100, 240, 50) == 70


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "10 s"), (44, "40 s"), (89, "90 s"), (91, "2 min"), (358, "6 min"), (4000, "67 min")],
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert stages.in_words(seconds) == words


def test_the_lines_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages are left; another run counts from one again; others have no line."""
    out, clock = str(tmp_path / "o"), [1000.0]
    todo = ["rm", "ppo_ptx", "report/report.md"]
    planned = [STAGES[name].seconds for name in todo]
    monkeypatch.setattr(stages, "left_to_make", lambda *_: todo)
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def line(run: str, path: str) -> str:
        return stages.start(run, out, f"{out}/{path}", [])

    first = line("1", "rm/model.safetensors")
    assert first == f"stage 1 of 3, reward model: about {stages.in_words(sum(planned))} left"
    assert line("1", "data/valid/comparisons.jsonl") == ""
    clock[0] += 2 * planned[0] + stages.STEADY  # half as fast as planned
    left = 2 * (planned[1] + planned[2])
    second = line("1", "ppo_ptx/model.safetensors")
    assert second == f"stage 2 of 3, PPO-ptx: about {stages.in_words(left)} left"
    clock[0] += 1
    third = line("1", "report/report.md")
    assert third == "stage 3 of 3, report: about 10 s left"
    again = line("1", "rm/model.safetensors")  # late: no more is left than before
    assert again == "stage 3 of 3, reward model: about 10 s left"
    assert line("2", "report/report.md").startswith("stage 1 of 3, report: about ")
    assert stages.start("3", out, f"{out}/base/model.safetensors", []) == ""


@pytest.mark.parametrize("there", ["a file", "bytes"])
def test_a_line_that_cannot_be_said_stops_no_stage(
    there: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "o"
    if there == "bytes":
        out.mkdir()
    (out if there == "a file" else out / "timing.csv").write_bytes(b"run,stage\n\xff\n")
    assert stages.main(["start", "1", str(out), f"{out}/rm/model.safetensors"]) == 0
    assert stages.main(["start"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


def test_the_makefile_announces_the_stages_of_the_table() -> None:
    """Each just before its command, with its name; what is up to date is not among them."""
    lines = dry_run("demo", OUT="x")
    named = []
    for line, then in zip(lines, lines[1:], strict=False):
        if found := re.search(r"data/stages\.py start [\d.]+ x (\S+)", line):
            named.append(stages.name_of("x", found[1]))
            made = re.search(r" --out x/(\S+)", then)[1]
            assert named[-1] == {"data": "data/card.md", "report": "report/report.md"}.get(
                made, made
            )
    assert sorted(named) == sorted(STAGES)
    announced = "stages.py start"
    assert announced not in " ".join(dry_run("real", DATA="d") + dry_run("gpt2", OUT="x"))


def test_what_make_has_left_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where all is there but the reward model and what comes after it."""
    makefile = "\n".join(
        f"o/{name}: {needs}\n\t@python3 data/stages.py start 7 o o/{name} demo\n\ttouch $@"
        for name, needs in {
            "rm/model.safetensors": "o/sft/model.safetensors",
            "sft/model.safetensors": "o/base/model.safetensors",
            "ppo/model.safetensors": "o/rm/model.safetensors",
            "base/model.safetensors": "",
        }.items()
    )
    (tmp_path / "Makefile").write_text(f"demo: o/ppo/model.safetensors\n{makefile}\n")
    for name in ("base", "sft"):
        (tmp_path / "o" / name).mkdir(parents=True)
        (tmp_path / "o" / name / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAKEFLAGS", "--always-make")  # what an outer make hands down
    assert stages.left_to_make("o", []) == ["rm", "ppo"]
    assert stages.left_to_make("o", ["o/rm/model.safetensors"]) == ["rm"]
    assert stages.left_to_make("o", ["nothing"]) == []


# ------------------------------------------------------------------------------------------------
# Lines of two stages


def test_progress_without_a_terminal_is_whole_lines(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each quarter but the last, and not sooner than five seconds after the one before."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for item in stages.progress(range(8), "x", "chunk"):
        clock[0] += 4 if item < 4 else 2
    said = capsys.readouterr().err
    assert said == "x: 2 of 8 chunks\nx: 4 of 8 chunks\n"  # at 8 s and 16 s; the next is at 20 s
    assert list(stages.progress([], "x", "chunk")) == []


def test_a_bar_only_where_no_other_stage_shares_the_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for level, bar in ((None, True), ("1", False)):
        monkeypatch.delenv("MAKELEVEL", raising=False)
        if level:
            monkeypatch.setenv("MAKELEVEL", level)
        assert list(stages.progress("abc", "x", "chunk")) == ["a", "b", "c"]
        assert ("\r" in capsys.readouterr().err) == bar


WRITES = """
import sys, torch
from pathlib import Path
from data import stages
from tests import toy
stages.time.monotonic = iter(range(0, 1000, 6)).__next__
[None for _ in stages.progress(range(4), "bar", "chunk")]
toy.main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="a pipe with packets is Linux's")
def test_each_line_is_one_write(tmp_path: Path) -> None:
    """A pipe with packets keeps writes apart: each must be lines, whole ones."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "toy.txt").write_text("0.5")
    args = ["--out", tmp_path / "run", "--data", tmp_path / "toy.txt", "--init", tmp_path]
    reads, writes = os.pipe2(os.O_DIRECT)
    environment = clean_environment(MAKELEVEL="1", PYTHONUNBUFFERED="")  # the Makefile's
    subprocess.run(
        [sys.executable, "-c", WRITES, *map(str, args), "--device", "cpu"],
        cwd=ROOT,
        env=environment,
        stdout=writes,
        stderr=writes,
        check=True,
    )
    os.close(writes)
    packets = []
    while packet := os.read(reads, 1 << 16):
        packets.append(packet.decode())
    os.close(reads)
    steps = [packet for packet in packets if packet.startswith("run 0")]
    assert len(steps) == 6 and "bar: 2 of 4 chunks\n" in packets
    assert all(packet.endswith("\n") and "\r" not in packet for packet in packets)


def test_a_second_make_in_one_folder_is_refused(tmp_path: Path) -> None:
    """Its first stage is, before anything is made; one that was killed counts no more."""
    (tmp_path / "Makefile").write_text("all:\n\t@echo begun; sleep 60\n")
    make = subprocess.Popen(["make", "-C", tmp_path], stdout=subprocess.PIPE, text=True)
    while "begun" not in make.stdout.readline():
        pass
    out = tmp_path / "out"
    out.mkdir()
    rows = f"run,stage,clock\n1.{make.pid},base,5.0\n"
    (out / "timing.csv").write_text(rows)
    card = f"{out}/data/card.md"
    command = [sys.executable, "data/stages.py", "start", "2.77", str(out), card, "demo"]
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    try:
        run = subprocess.run(command, **how)
        assert run.returncode == 2 and f"another make (process {make.pid})" in run.stderr
        assert run.stderr.count("\n") == 1 and (out / "timing.csv").read_text() == rows
    finally:
        make.kill()
        make.wait()
    assert subprocess.run(command, **how).returncode == 0
