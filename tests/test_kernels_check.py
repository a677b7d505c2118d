"""The check of the kernels itself: what a mismatch says, what the guard sees, that no line of a
kernel is left out."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType

import pytest
import torch

from kernels import check, flash_attention, flash_decoding, linear_logprob, runtime, score_mods
from kernels.check import Mismatch, compare, compare_all, first_cause, guarded, run_cases
from kernels.runtime import jit, launch, tl
from tests.interpreter import gpu_or_cpu, needs_triton

ROOT = Path(__file__).resolve().parents[1]
FILES = (flash_attention, flash_decoding, linear_logprob)
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="of the interpreter")


# ---- mismatches


def test_a_mismatch_says_where_and_what() -> None:
    expected = torch.ones(2, 3, 70, 16)
    actual = expected.clone()
    actual[1, 2, 40:50, 5] = 1.25
    actual[1, 2, 44, 5] = -1.0
    with pytest.raises(Mismatch) as error:
        compare("dk", actual, expected, 1e-3)
    assert str(error.value) == (
        "dk: error 2.0e+00 is above 1.0e-03 at [1, 2, 44, 5]: expected 1, found -1; 10 of 6,720 "
        "entries are wrong. A character is 16 x 16 entries, the last index downwards, # if one of "
        "them is wrong:\n"
        "  [1, 2]   ..##."
    )


def test_a_map_has_a_line_for_each_tile_of_columns_if_they_differ() -> None:
    actual = torch.zeros(1100, 40)
    actual[1099, 39] = float("nan")
    with pytest.raises(
        Mismatch, match=r"not finite at \[1099, 39\]: expected 0, found nan"
    ) as error:
        compare("gradient", actual, torch.zeros(1100, 40), 1e-3)
    assert "A character is 32 x 16 entries" in str(error.value)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "." * 35, "." * 35, "." * 34 + "#",
    ]  # fmt: off


def test_all_results_and_all_cases_are_compared_before_it_fails() -> None:
    def one(case: float) -> float:
        a = torch.full((3,), case)
        return compare_all([("a", a, torch.ones(3), 0.1), ("b", a, 2 * torch.ones(3), 0.6)])

    assert run_cases([1.0, 1.05], one) == pytest.approx(0.5)
    with pytest.raises(Mismatch) as error:
        run_cases([1.0, 0.0, 3.0, 1.05], one)
    text = str(error.value)
    assert text.startswith("case 1, a: error 1.0e+00") and "case 2, a: error 2.0e+00" in text
    assert text.count("\nb: error") == 1 and text.endswith("2 of 4 cases fail: 1, 2")
    assert run_cases([0.0, 1.0], one, only=1) == pytest.approx(0.5)


def test_a_case_alone_is_the_same_case() -> None:
    drawn: dict[int, torch.Tensor] = {}

    def draw(case: int) -> float:
        drawn.setdefault(case, torch.randn(3))
        return float((drawn[case] != torch.randn(3)).all())

    run_cases([0, 1, 2], draw)
    first = dict(drawn)
    drawn.clear()
    run_cases([0, 1, 2], draw, only=2)
    assert torch.equal(drawn[2], first[2])


@jit
def broken_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, broken_step(tl.load(x_ptr + i)))


@jit
def broken_step(x):
    return x + no_such_name  # noqa: F821


@needs_triton
@interpreted
def test_an_error_in_a_kernel_is_shown_by_its_first_cause_and_line() -> None:
    x = torch.randn(16)
    with pytest.raises(Exception, match="no_such_name") as error:
        launch(broken_kernel, (1,), x, x.clone(), BLOCK=16)
    text = first_cause(error.value)
    assert len(text.splitlines()) == 2
    assert text.startswith("NameError: name 'no_such_name' is not defined\n")
    line = next(i for i, s in enumerate(Path(__file__).read_text().splitlines(), 1) if "F821" in s)
    assert f"test_kernels_check.py:{line} broken_step: return x + no_such_name" in text


def test_the_command_says_what_is_wrong_and_exits_with_1() -> None:
    code = """
import sys, torch
sys.argv[1:] = ["--impl", "torch", "--case", "2"]
from kernels import check, flash_decoding as fd
fd.IMPLS["torch"] = lambda *args: fd.reference(*args) * 1.1
check.main(fd.IMPLS, fd.verify, fd.CASES, watch=str)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "torch            float32   is wrong\ncase 2, decode_attention torch" in run.stdout
    assert "1 of 1 cases fail: 2" in run.stdout
    assert run.stderr == "Wrong: torch in float32, torch in float16.\n"


# ---- the guard


@jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < 16)


@needs_triton
@interpreted
def test_the_guard_sees_each_address_outside() -> None:
    memory = torch.randn(48)
    x, out = memory[16:32], torch.empty(16)
    with guarded() as seen:
        launch(copy_kernel, (1,), x, out, 16, BLOCK=32)
    assert torch.equal(x, out) and seen.requested["copy_kernel", "load", "x_ptr"] == 64
    message = r"copy_kernel, program \(0, 0, 0\): load of x_ptr\[16\], outside its shape \(16,\)"
    with guarded(), pytest.raises(Exception, match=message):
        launch(copy_kernel, (1,), x, out, 17, BLOCK=32)
    with guarded(), pytest.raises(Exception, match=r"store of out_ptr\[15\], outside"):
        launch(copy_kernel, (1,), x, out[:15], 16, BLOCK=32)
    with guarded():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# ---- every line runs


def statements(file: Path) -> dict[int, range]:
    """First line -> lines, of each statement within a jitted function, docstrings left out. The
    lines of a compound statement are those of its head."""
    found = {}
    for function in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        if "jit" not in [ast.unparse(decorator) for decorator in function.decorator_list]:
            continue
        for node in ast.walk(function):
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, ast.stmt) and node is not function and not text:
                inner = getattr(node, "body", None)
                end = inner[0].lineno - 1 if inner else node.end_lineno
                found[node.lineno] = range(node.lineno, end + 1)
    return found


def lines_run(files: list[str], call: Callable[[], object]) -> set[tuple[str, int]]:
    """(file, line) that Python runs during a call. The interpreter compiles a kernel from its
    syntax tree under the file's name and with the source's line numbers, so these are its lines."""
    seen = set()

    def local(frame: FrameType, event: str, _: object) -> Callable:
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename in files else None)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen


def not_run(module: ModuleType, seen: set[tuple[str, int]]) -> list[str]:
    source = Path(module.__file__).read_text(encoding="utf-8").splitlines()
    return [
        f"{line}: {source[line - 1]}"
        for line, lines in statements(Path(module.__file__)).items()
        if not any((module.__file__, each) in seen for each in lines)
    ]


@needs_triton
@interpreted
@pytest.mark.parametrize("module", FILES, ids=lambda module: module.__name__)
def test_verify_runs_every_line_of_every_kernel(module: ModuleType) -> None:
    files = [module.__file__, score_mods.__file__]
    seen = lines_run(files, lambda: module.verify("triton", torch.float32, gpu_or_cpu()))
    assert len(statements(Path(module.__file__))) > 40 and not_run(module, seen) == []
    if module is flash_attention:
        assert not_run(score_mods, seen) == []


@needs_triton
@interpreted
def test_a_line_that_is_not_run_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_decoding, "CASES", flash_decoding.CASES[:1])  # one split
    verify = flash_decoding.verify
    seen = lines_run(
        [flash_decoding.__file__], lambda: verify("triton", torch.float32, gpu_or_cpu())
    )
    assert any(
        "weight = tl.exp2(m - tl.max(m, 0))" in line for line in not_run(flash_decoding, seen)
    )


def test_changed_variables_come_back() -> None:
    variables = {"a": 1, "b": 2}
    with pytest.raises(KeyError), check.changed(variables, a=3):
        assert variables == {"a": 3, "b": 2}
        raise KeyError
    assert variables == {"a": 1, "b": 2}


@needs_triton
def test_a_mod_without_jit_is_named(monkeypatch) -> None:
    """The interpreter would run it; a GPU's compiler would not."""

    def score(s, q, k, head, num_heads):
        return s

    monkeypatch.setitem(score_mods.SCORE_MODS, "bare", score_mods.ScoreMod(score=score))
    with pytest.raises(AssertionError, match="bare: score is no Triton function; put @jit above"):
        score_mods.check_fields("bare")
