"""The exercises: each fails as it is handed out and passes with its solution, and no work of a
learner is lost."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import exercise
from kernels.check import Mismatch
from kernels.exercises import judge
from kernels.exercises.answers import BUGS, KERNELS, PUZZLES, TASKS, Bug
from tests.interpreter import needs_triton

ROOT = KERNELS.parent
# the first thing that one might write for the last line of a puzzle
TEMPTING = {
    "row_softmax": "p = e / tl.max(e, 0)",
    "running_maximum": "s = s + tl.sum(tl.exp(x - m_new), 0)",
    "diagonal_mask": "visible = k[None, :] <= q[:, None]",
    "delta": "ds = p * dp - delta[:, None]",
    "merging_splits": "out = tl.sum(weight[:, None] * acc, 0) / tl.sum(norm, 0)",
    "p_minus_1": "dz = half - hit.to(tl.float16)",
}


def numbered(tasks) -> list:
    return [pytest.param(TASKS.index(t) + 1, t, id=f"{TASKS.index(t) + 1} {t.name}") for t in tasks]


@pytest.mark.parametrize("number, bug", numbered(BUGS))
def test_a_broken_copy_is_the_kernel_but_for_one_place(
    number: int, bug: Bug, capsys: pytest.CaptureFixture
) -> None:
    """(That its check catches the one and not the other: test_kernels_planted_bugs.py.)"""
    original = (KERNELS / bug.file).read_text(encoding="utf-8")
    assert original.count(bug.old) == 1 and bug.new != bug.old
    assert bug.solution() == original != bug.task()
    assert exercise.main([str(number), "--solve"]) == 0
    diff = capsys.readouterr().out.splitlines()
    assert [line for line in diff if bug.old in line and line[0] == "+"]
    assert sum(line[0] == "-" for line in diff) == 2 == sum(line[0] == "+" for line in diff)


@needs_triton
@pytest.mark.parametrize("number, bug", numbered([BUGS[0], BUGS[3], BUGS[7]]))
def test_an_exercise_begins_with_what_fails(
    number: int, bug: Bug, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [str(number), "--out", str(tmp_path), "--case", str(bug.case)]
    assert exercise.main(argv) == 0
    said = capsys.readouterr().out
    assert "#" in said and "float32: 1 of 1 cases fail" in said
    assert f"The file to mend: {tmp_path / bug.file}" in said
    assert f"{number} --out {tmp_path} --check" in said
    assert (tmp_path / bug.file).read_text(encoding="utf-8") == bug.task()


@needs_triton
def test_a_mended_kernel_passes_its_whole_check(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["5", "--out", str(tmp_path)]
    assert exercise.main(argv) == 0
    path = tmp_path / "flash_decoding.py"
    mended = path.read_text().replace(
        "minimum(begin + keys, length - 1)", "minimum(length, begin + keys)"
    )
    path.write_text(mended)
    assert exercise.main([*argv, "--check"]) == 0
    assert "Exercise 5 is solved" in capsys.readouterr().out


@needs_triton
@pytest.mark.parametrize("number, puzzle", numbered(PUZZLES))
def test_a_puzzle_has_holes_and_passes_with_its_lines_alone(
    number, puzzle, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [str(number), "--out", str(tmp_path)]
    assert exercise.main(argv) == 0
    assert capsys.readouterr().out.count("= ...") == len(puzzle.lines)
    path = tmp_path / puzzle.file
    path.write_text(puzzle.solution())
    assert judge.judge_puzzle(judge.load(path)) == ""
    tempting = puzzle.solution().replace(puzzle.lines[-1], TEMPTING[puzzle.name])
    assert tempting != puzzle.solution()
    path.write_text(tempting)
    torch.manual_seed(0)
    assert "is above" in judge.judge_puzzle(judge.load(path))


@needs_triton
def test_a_puzzle_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["13", "--out", str(tmp_path)]
    exercise.main(argv)
    path = tmp_path / "row_softmax.py"
    text = path.read_text().replace("e = ...", "e = tl.exp(x)").replace("p = ...", "p = e")
    path.write_text(text)
    assert exercise.main([*argv, "--check"]) == 1
    assert "#" in capsys.readouterr().out
    path.write_text(PUZZLES[0].solution())
    assert exercise.main([*argv, "--check"]) == 0
    assert "Exercise 13 is solved" in capsys.readouterr().out
    path.write_text(text.replace("tl.exp(x)", "tl.exp(x"))
    assert exercise.main([*argv, "--check"]) == 1
    assert f"{path}:25: '(' was never closed" in capsys.readouterr().out


def test_a_changed_file_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["14", "--out", str(tmp_path)]
    path = tmp_path / "running_maximum.py"
    assert exercise.main(argv) == 0 == exercise.main(argv)
    path.write_text(path.read_text() + "# mine\n")
    capsys.readouterr()
    assert exercise.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "holds changes of yours" in said.err and not said.out
    assert path.read_text().endswith("# mine\n")
    assert exercise.main([*argv, "--again"]) == 0
    assert path.read_text() == PUZZLES[1].task()


def test_the_list_and_the_hints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert exercise.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TASKS) + 1 == 19
    for number, (line, task) in enumerate(zip(lines, TASKS, strict=False), 1):
        assert line.split()[0] == str(number) and line.endswith(task.title) and len(line) < 90
    exercise.main(["14", "--out", str(tmp_path)])
    capsys.readouterr()
    assert exercise.main(["14", "--out", str(tmp_path), "--hint"]) == 0
    assert "measured from m" in capsys.readouterr().out


@needs_triton
def test_the_hint_of_a_bug_has_a_map(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "flash_attention.py").write_text(BUGS[7].task())
    assert exercise.main(["8", "--out", str(tmp_path), "--hint"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(BUGS[7].hint) and " dq: error " in said and "#############" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0", "there is no exercise '0'; expected 1 to 18"),
        ("99", "there is no exercise '99'"),
        ("seven", "there is no exercise 'seven'"),
        ("--check", "which exercise? give its number"),
        ("3 --check --out {0}/none", "flash_decoding.py is not there; begin with python -m"),
        ("3 --hint --out {0}/none", "flash_decoding.py is not there"),
        ("3 --out {0}/file", "/file/flash_decoding.py: "),
        ("13 --case 3", "--case 3: a puzzle has no numbered cases"),
        ("3 --check --hint", "not allowed with argument --check"),
        ("3 --nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments_are_one_line(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "kernels.exercise", *words.format(tmp_path).split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("raise SystemExit(3)", "ended with code 3"),
        ("import os; os.kill(os.getpid(), 11)", "ended with code -11"),
        ("1 / 0", "ZeroDivisionError"),
        ("while True: pass", "It takes over 8 seconds"),
    ],
)
def test_a_file_that_does_not_even_run(
    change: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exercise, "TIME_LIMIT", 8)
    (tmp_path / "flash_decoding.py").write_text(change + "\n")
    assert exercise.main(["1", "--out", str(tmp_path), "--check"]) == 1
    assert message in capsys.readouterr().out


@needs_triton
def test_a_case_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert exercise.main(["1", "--out", str(tmp_path), "--case", "99"]) == 0
    assert "there is no case 99; the file has 0 to 1" in capsys.readouterr().out


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("number, bug", numbered(BUGS))
def test_the_telling_case_is_one_of_those_that_fail(number, bug, tmp_path: Path) -> None:
    path = tmp_path / bug.file
    path.write_text(bug.task())
    text = exercise.wrong(bug, path, bug.task())
    assert str(bug.case) in text.splitlines()[-1].split(": ")[-1].split(", ")
    path.write_text(bug.solution())
    assert exercise.wrong(bug, path, bug.solution()) == ""


def test_a_mismatch_is_what_a_puzzle_raises() -> None:
    """judge.py shows the text of any error; the check's own must be among them."""

    class Fake:
        @staticmethod
        def cases():
            yield "what", torch.ones(3), torch.zeros(3).double()

    with pytest.raises(Mismatch):
        judge.compare_all([("what", torch.ones(3), torch.zeros(3), 1e-3)])
    assert "what: error 1.0e+00 is above" in judge.judge_puzzle(Fake)
