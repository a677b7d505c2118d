"""The ladders: every rung passes the check of the shipped kernels, and their tables are true."""

import subprocess
import sys
import textwrap

import pytest
import torch

from kernels import climb, flash_attention, ladder, ladder_logprob, linear_logprob
from kernels.score_mods import plain
from tests.interpreter import gpu_or_cpu, needs_triton
from tests.test_kernels_planted_bugs import load_patched

RUNGS = [
    pytest.param(module, name, id=f"{module.__name__.split('.')[1]}: {name}")
    for module in (ladder, ladder_logprob)
    for name in module.LADDER
]
BUGS = [
    (ladder, "1 scores in memory", "e / tl.sum(e, 1)[:, None]", "e"),
    (ladder, "2 online softmax", "norm = norm * shrink + tl", "norm = norm + tl"),
    (
        ladder,
        "3 to the diagonal",
        "range(0, q_start + BLOCK, BLOCK)",
        "range(0, q_start + 1, 2 * BLOCK)",
    ),
    (ladder, "4 lengths", "read(V, k_rows, length, T, D)", "read(V, k_rows, T, T, D)"),
    (ladder, "5 backward: dq", "(dp - delta[:, None])", "dp"),
    (ladder, "6 backward: dk, dv", "range(k_start, length, BLOCK)", "range(k_start, T, 2 * BLOCK)"),
    (ladder_logprob, "1 chunks", "y[i : i + CHUNK], temp", "y[: len(x[i : i + CHUNK])], temp"),
    (ladder_logprob, "2 running maximum", "(t + (m - m_new) * s)", "t"),
    (ladder_logprob, "3 stretches", "(shrink * s_i).sum(0)", "s_i.sum(0)"),
]
pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("module, name", RUNGS)
def test_a_rung_passes_the_check(module, name, dtype):
    module.verify(name, dtype, gpu_or_cpu())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("module, name, old, new", BUGS, ids=[bug[1] for bug in BUGS])
def test_a_planted_bug_is_caught(module, name, old, new, tmp_path):
    patched = load_patched(module, old, new, tmp_path)
    with pytest.raises(AssertionError, match="is above|not finite"):
        patched.verify(name, torch.float32, gpu_or_cpu())


def test_the_check_has_every_causal_case_and_leaves_no_entry():
    impls, cases = dict(flash_attention.IMPLS), list(flash_attention.CASES)
    with climb.entered(flash_attention, "mine", None, lambda case: "causal" in case):
        kept = flash_attention.CASES
        assert "mine" in flash_attention.IMPLS
    assert flash_attention.IMPLS == impls and flash_attention.CASES == cases
    assert kept == [case for case in cases if case[5] == "causal"]
    assert any(case[4] for case in kept) and any(case[6] < -100 for case in kept)
    for module in (flash_attention, linear_logprob):
        assert not {*ladder.LADDER, *ladder_logprob.LADDER} & set(module.IMPLS)


@pytest.mark.parametrize("module, name", RUNGS)
def test_a_rung_is_short_and_says_what_it_adds(module, name):
    rung = module.LADDER[name]
    assert 3 <= climb.lines(rung) < 40
    assert all(plain(part).__doc__ for part in rung.parts)
    assert name[0] == "0" or "Adds: " in rung.parts[-1].__doc__


def test_lines_are_counted_without_words():
    assert climb.lines(climb.Rung(None, (ladder.definition,))) == 4  # def and three lines


@pytest.mark.parametrize("module", [ladder, ladder_logprob], ids=lambda module: module.__name__)
def test_the_table_in_the_docstring_is_what_is_counted(module):
    table = climb.table(module, list(module.LADDER))
    assert textwrap.indent(table, "  ", lambda _: True) in module.__doc__


def test_the_counts_by_hand():
    """16 x 16 tiles of scores, each 64 x 64 x 64 multiplications for q k^T and for p v."""
    forward, half, backward = ladder.counts(ladder.LADDER["6 backward: dk, dv"].run)
    assert (forward.tiles, half.tiles) == (16 * 17 // 2, 8 * 9 // 2)
    assert forward.products == forward.tiles * 2 * 64**3 / 1e6
    assert backward.products == forward.tiles * 7 * 64**3 / 1e6  # 3 for dq, 4 for dk and dv
    assert backward.largest < 1024 * 1024 * 2 / 1e6  # nothing is T x T
    forward, _, backward = ladder.counts(ladder.LADDER["0 torch"].run)
    assert forward.products == 2 * 1024**2 * 64 / 1e6 and backward.products == 2 * forward.products
    assert forward.largest == 1024**2 * 4 / 1e6
    forward, backward = ladder_logprob.counts(None)
    assert forward.products == 256 * 8192 * 64 / 1e6 and backward.products == 3 * forward.products


def test_traffic_counts_inputs_and_results_but_no_view():
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    with climb.Traffic() as traffic:
        a.T.T @ b
        torch.empty(1000)
        a[1:].add_(1.0)
    assert traffic.bytes == 4 * (32 + 16 + 8) + 4 * (24 + 24)
    assert traffic.multiplications == 4 * 8 * 2 and traffic.largest == 4000


def test_what_a_rung_refuses():
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match="score_mod 'alibi' is not on the ladder"):
        ladder.LADDER["0 torch"].run(q, q, q, None, "alibi")
    for name in [name for name in ladder.LADDER if name[0] != "0"]:
        run = ladder.LADDER[name].run
        if gpu_or_cpu() == "cpu":
            with pytest.raises(ValueError, match="bfloat16 in Triton's interpreter"):
                run(*(q.bfloat16() for _ in range(3)), None, "causal")
        with pytest.raises(ValueError, match="torch.float64"):
            run(*(q.double() for _ in range(3)), None, "causal")
    for name in ("2 running maximum", "3 stretches"):
        with pytest.raises(ValueError, match="torch.float64"):
            ladder_logprob.LADDER[name].run(
                torch.ones(2, 16).double(), torch.ones(5, 16).double(), torch.arange(2), 1.0
            )


@pytest.mark.parametrize(
    "module, number, name", [("ladder", 3, "3 to the diagonal"), ("ladder_logprob", 0, "0 logits")]
)
def test_the_command_verifies_one_rung_and_prints_its_row(module, number, name):
    command = [sys.executable, "-m", f"kernels.{module}", "--rung", str(number)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second, _, *table = run.stdout.splitlines()
    assert first.startswith(f"{name:18} float32   largest") and "float16" in second
    assert len(table) == 3 and table[2].startswith(name)
