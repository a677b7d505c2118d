"""What `make` refuses, and what it does with an OUT that was begun before: with other settings, by
a stage that was stopped. Stages are stand-ins, in a folder with a copy of the Makefile."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from data import stages
from data.real import prepare
from data.tiny import make as tiny_world

import pytest

from tests.determinism import SMALL
from tests.makefile import ROOT, clean_environment
from tests.raw_sets import alpaca, write_json

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

# Instead of .venv/bin/python: what the Makefile asks is answered; a world is its card alone.
INTERPRETER = f"""#!/usr/bin/env bash
case "$1 $2" in
  *.py\\ *) exec {sys.executable} "$@" ;;
  "-m data.tiny.make") [ -z "$FAILS" ] && mkdir -p "$4" && echo "$@" > "$4/card.md" ;;
esac
"""
# Five steps with a checkpoint after each; STOP ends it after that step.
TRAINING = """
import os, signal, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
saved = sorted(out.glob("checkpoints/*"))
done = int(saved[-1].name) if "--resume" in sys.argv else 0
for step in range(done + 1, 6):
    folder = out / f"checkpoints/{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.pt").write_text("")
    (out / "model.safetensors").unlink(missing_ok=True)
    print("step", step, flush=True)
    if os.environ.get("STOP") == f"{step} SIGINT":
        sys.exit(130)
    if os.environ.get("STOP") == f"{step} SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
(out / "model.safetensors").write_text("")
"""
BASE = "o/base/model.safetensors"


def make(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    how = {"cwd": cwd, "capture_output": True, "text": True}
    return subprocess.run(["make", *words], env=clean_environment(**environment), **how)


def says_in_one_line(run: subprocess.CompletedProcess, *words: str) -> bool:
    alone = run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    return alone and all(word in run.stderr for word in words)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile and what it asks, with stand-ins for the interpreter and the scripts."""
    for name in ("Makefile", "data/stages.py", "requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(INTERPRETER)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    for name in ("model", "run", "data/hygiene", "data/tokenizer", "data/files"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "train_sft.py").write_text(TRAINING)
    (tmp_path / ".venv/ready").write_text("")
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return tmp_path


# ------------------------------------------------------------------------------------------------
# Variables


@pytest.mark.parametrize("variable", ["OUT", "DATA", "COMPARISONS", "SEED"])
@pytest.mark.parametrize(
    "value", ["a b", "a\tb", "-a", *(f"a{c}b" for c in ":%#;'\"`\\*?()&|<>!~=[{$")]
)
def test_a_name_that_make_or_the_shell_would_read_otherwise(variable: str, value: str) -> None:
    run = make("--dry-run", "clean", f"{variable}={value}")
    expected = {"SEED": "expected a whole number", "COMPARISONS": "expected the name of a file"}
    reason = expected.get(variable, "expected the name of a folder")
    assert says_in_one_line(run, f'{variable}="{value}"', reason)


@pytest.mark.parametrize(
    "words",
    ["SEED=", "SEED=one", "SEED=1.5", "SEED=01", "SIZE=gpt2-x%", "SIZE=%", "OUT="],
)
def test_other_values_that_are_refused(words: str) -> None:
    assert says_in_one_line(make("--dry-run", "demo", words), words.replace("=", '="') + '"')


def test_names_that_are_taken_as_they_are() -> None:
    words = ["OUT=/a-b/ü_1.2,3+4@5", "DATA=../raw", "SEED=4294967296"]
    assert make("--dry-run", "clean", *words).stdout == 'rm -rf -- "/a-b/ü_1.2,3+4@5"\n'


@pytest.mark.parametrize("goal", ["demo", "real", "gpt2", "test", "lint", "watch", "claims"])
def test_no_python_is_one_line(goal: str, tmp_path: Path) -> None:
    for name in ("bash", "make", "cat", "sed", "date"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for run in (make(goal, "PYTHON=nope"), make(goal, PATH=str(tmp_path))):
        assert says_in_one_line(run, "PYTHON=", "expected a Python 3")
    assert make("--dry-run", "clean", "PYTHON=nope").returncode == 0


# ------------------------------------------------------------------------------------------------
# An OUT that was begun with other settings


@pytest.mark.parametrize("older", [False, True])
def test_another_seed_in_one_out_is_refused(older: bool, project: Path) -> None:
    """By the settings, which a stage writes and no dry run, or by the world of an older demo."""
    assert make("--dry-run", "SEED=3", "OUT=o", BASE, cwd=project).returncode == 0
    assert not (project / "o").exists()
    assert make("SEED=3", "OUT=o", BASE, cwd=project).returncode == 0
    assert (project / "o/settings").read_text() == "SEED=3\n"
    if older:
        (project / "o/settings").unlink()
        (project / "o/data/world.json").write_text('{\n "seed": 3,\n "facts": []\n}\n')
    for goals in ([], ["demo"], [BASE], ["o/report/report.md"]):
        again = make("SEED=1", "OUT=o", *goals, cwd=project)
        named = "demo" if goals in ([], ["demo"]) else goals[0]
        remedy = f'give another OUT, as in "make {named} SEED=1 OUT=o/1", or "make clean OUT=o" '
        assert says_in_one_line(again, "o was begun with SEED=3, not SEED=1: ", remedy)
    for words in (["SEED=3", BASE], ["watch"], ["lint"], ["clean"], [".venv/ready"], ["claims"]):
        assert "begun" not in make("--dry-run", "OUT=o", *words, cwd=project).stderr


def test_a_stage_that_fails_binds_nothing(project: Path) -> None:
    """Else a mistyped DATA, say, would have to be kept."""
    assert make("SEED=4", "OUT=o", BASE, cwd=project, FAILS="yes").returncode == 2
    assert not (project / "o/settings").exists()
    assert make("SEED=3", "OUT=o", BASE, cwd=project).returncode == 0
    assert (project / "o/settings").read_text() == "SEED=3\n"


@pytest.mark.parametrize(
    ("folder", "words", "refused"),
    [
        ("real", "real DATA=a SEED=1", "SEED=0, not SEED=1"),
        ("real", "real DATA=b", "DATA=a, not DATA=b"),
        ("real", "o/real/rm/model.safetensors DATA=b", "DATA=a, not DATA=b"),
        ("real", "public DATA=b SEED=1", "SEED=0, not SEED=1"),
        ("real", "real", ""),
        ("real", "public DATA=b", ""),
        ("real", "gpt2 DATA=b SEED=1", ""),
        ("real", "clean SEED=1", ""),
        ("real/public", "public DATA=b", "DATA=a, not DATA=b"),
        ("real/public", "real DATA=b", ""),
        ("gpt2-xl", "gpt2 SIZE=gpt2-xl SEED=1", "SEED=0, not SEED=1"),
        ("gpt2-xl", "gpt2 SIZE=gpt2 SEED=1", ""),
        ("gpt2/rm", "gpt2", "COMPARISONS=a, not COMPARISONS=o/gpt2/data/train/comparisons"),
        ("gpt2/rm", "gpt2 COMPARISONS=a", ""),
        ("gpt2/rm", "o/gpt2/candidates.jsonl", ""),
    ],
)
def test_the_settings_of_each_pipeline(
    folder: str, words: str, refused: str, project: Path
) -> None:
    (project / "o" / folder).mkdir(parents=True)
    (project / "o" / folder / "settings").write_text("SEED=0\nDATA=a\nCOMPARISONS=a\n")
    run = make("--dry-run", "OUT=o", *words.split(), cwd=project)
    if refused:
        assert says_in_one_line(run, f"o/{folder} was begun with {refused}", "delete o/")
    else:
        assert "begun" not in run.stderr


@pytest.mark.parametrize(
    ("goal", "settings"),
    [
        ("real DATA=d", {"real": "SEED=0 DATA=d"}),
        ("public DATA=d", {"real": "SEED=0 DATA=d", "real/public": "DATA=d"}),
        ("gpt2 COMPARISONS=c", {"gpt2": "SEED=0", "gpt2/rm": "COMPARISONS=c"}),
    ],
)
def test_each_pipeline_writes_its_settings(goal: str, settings: dict, tmp_path: Path) -> None:
    said = make("--dry-run", "--always-make", f"OUT={tmp_path}", *goal.split()).stdout
    lines = [line for line in said.splitlines() if "settings" in line]
    for line, name in zip(lines, settings, strict=True):
        (tmp_path / name).mkdir(parents=True)
        subprocess.run(["bash", "-c", line], check=True)
    found = {name: (tmp_path / name / "settings").read_text().split() for name in settings}
    assert {name: " ".join(words) for name, words in found.items()} == settings


# ------------------------------------------------------------------------------------------------
# Stages that were stopped


@pytest.mark.parametrize("stop", ["3 SIGINT", "3 SIGKILL"])
@pytest.mark.parametrize(
    ("changed", "first"),
    [("", 4), ("train_sft.py", 1), ("o/data/card.md", 1), ("Makefile", 1), ("run.py", 1)],
)
def test_the_next_make_goes_on(stop: str, changed: str, first: int, project: Path) -> None:
    """From the newest checkpoint, unless what the stage is made from has changed since."""
    stopped = make(BASE, "OUT=o", cwd=project, STOP=stop)
    assert stopped.returncode == 2 and "step 3" in stopped.stdout
    assert not (project / BASE).exists()
    if changed:
        os.utime(project / changed)
    again = make(BASE, "OUT=o", cwd=project)
    steps = [line for line in again.stdout.splitlines() if line.startswith("step")]
    assert steps == [f"step {step}" for step in range(first, 6)]
    assert f"'{BASE}' is up to date" in make(BASE, "OUT=o", cwd=project).stdout
    os.utime(project / "train_sft.py")  # its checkpoints have all five steps
    assert "step 1" in make(BASE, "OUT=o", cwd=project).stdout


def test_all_checkpoints_must_be_newer(tmp_path: Path) -> None:
    """The one with the highest number may be an earlier run's; other names are no checkpoints."""
    path, needed = tmp_path / "model.safetensors", tmp_path / "script.py"
    needed.write_text("")
    assert not stages.can_resume(str(path), [str(needed)])
    for name, clock in {"00000004": 30, "00000008": 40, "2026-best": 10, "000000012": 10}.items():
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        state = tmp_path / "checkpoints" / name / "state.pt"
        state.write_text("")
        os.utime(state, (clock, clock))
    assert not stages.can_resume(str(path), [str(needed), "absent"])
    for clock, expected in ((20, True), (30, False), (35, False), (50, False)):
        os.utime(needed, (clock, clock))
        assert stages.can_resume(str(path), [str(needed)]) == expected


@pytest.mark.parametrize("target", ["demo", "real", "gpt2"])
def test_every_training_run_of_make_can_go_on(target: str) -> None:
    run = make("--dry-run", "--always-make", target, "OUT=x", "DATA=d", "resume=--resume")
    lines = run.stdout.replace("\\\n", " ").splitlines()
    trains = [line for line in lines if "python train_" in line]
    assert len(trains) >= 4 and all(line.count(" --resume ") == 1 for line in trains)
    assert sum(" --resume " in line for line in lines) == len(trains)


# ------------------------------------------------------------------------------------------------
# Data sets that are made again


def test_a_world_that_is_half_written_has_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "card.md").write_text("of another world")
    killed(tiny_world, "write_documents", tmp_path / "card.md", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tiny_world.main(["--out", str(tmp_path), *SMALL["tiny_world"].split()])


def test_a_set_that_is_half_written_has_no_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [alpaca(f"question {n}", "", "answer") for n in range(30)]
    write_json(tmp_path / "raw/alpaca_data.json", records)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/account.txt").write_text("of other data")
    killed(prepare, "write_jsonl", tmp_path / "out/account.txt", monkeypatch)
    flags = ["--from", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--tokenizer", "none"]
    with pytest.raises(KeyboardInterrupt):
        prepare.main(["alpaca", *flags])


def killed(module, name: str, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first file that the module writes with `name`; the mark must be gone before it."""

    def write(*_) -> None:
        assert not mark.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, write)
