"""Every shipped kernel configuration compiles ahead of time for GPUs that are not here, within
their limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreter import needs_triton

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """A process of its own: this one interprets kernels, and interpreted kernels cannot be
    compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@needs_triton
def test_every_entry_that_needs_triton_is_compiled():
    code = """
from kernels import compile as c, flash_attention as fa
fa.IMPLS["mine"] = fa.Impl(fa.IMPLS["triton"].function, needs_triton=True)
cases = [case for case in c.shipped() if case[0] == "attention=mine D=64 bf16 causal"]
print([report.configuration for case in cases for report in c._compile_case(case, "sm_90")])
"""
    result = run_python("-c", code)
    for kernel in ("forward 128x64 w4", "d_query 128x64 w8", "d_key_value 64x128 w8"):
        name = f"'attention=mine D=64 bf16 causal {kernel}'"
        assert name in result.stdout, result.stdout + result.stderr


@needs_triton
def test_every_configuration_can_ship():
    result = run_python("-m", "kernels.compile")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if " sm_" in line]
    names = {(row[0], row[1], row[2], row[3]) for row in rows}
    for mod in ("causal", "sliding_window", "alibi", "softcap"):
        assert {
            ("attention", "D=64", "bf16", mod),
            ("decode_attention", "D=64", "bf16", mod),
        } <= names
    for target in ("sm_80", "sm_90"):
        kernels = {
            (row[0], word) for row in rows if target in row for word in row if word.islower()
        }
        for kernel in ("forward", "d_query", "d_key_value"):
            assert ("attention", kernel) in kernels
        assert ("logprobs", "d_logits") in kernels and ("decode_attention", "split") in kernels


PLANT = """
import torch
from kernels import compile as c, flash_attention as fa, linear_logprob as ll
fa.TILES["sm_90", 2, 64] = {attention}
ll.TILES["sm_90", 2] = {logprobs}
bf16, attention, logprobs = torch.bfloat16, fa.IMPLS["triton"], ll.IMPLS["triton"]
for case in [("attention D=64 bf16 causal", c._attention, (attention, bf16, 64, "causal")),
             ("logprobs C=768 bf16", c._logprobs, (logprobs, bf16, 768))]:
    if case[0].startswith("{kernel}"):
        for report in c._compile_case(case, "sm_90"):
            print(report.configuration, "->", report.problem)
"""
GOOD_ATTENTION = ((128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2))
GOOD_LOGPROBS = ((128, 128, 64, 8, 3), (128, 128, 64, 8, 3))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, attention, logprobs, problem",
    [
        ("attention", ((128, 128, 1, 2), *GOOD_ATTENTION[1:]), GOOD_LOGPROBS, "spills"),
        ("logprobs", GOOD_ATTENTION, ((128, 256, 64, 8, 6), (64, 64, 64, 4, 2)), "shared memory"),
    ],
)
def test_a_configuration_that_cannot_ship_is_named(kernel, attention, logprobs, problem):
    code = PLANT.format(kernel=kernel, attention=attention, logprobs=logprobs)
    result = run_python("-c", code)
    assert problem in result.stdout, result.stdout + result.stderr


def test_rules(monkeypatch):
    # Importing it sets "0".
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    from kernels.compile import Report, find_problem

    good = Report("", "sm_90", 128, 0, 1000, 8, 0, 4, 0, 2, "")
    assert find_problem(good, half=True, matrix=True) == ""
    assert "spills 8 bytes" in find_problem(good._replace(spill=8), half=True, matrix=True)
    assert find_problem(good._replace(spill=8), half=False, matrix=True) == ""
    assert "shared memory" in find_problem(good._replace(shared=300_000), half=False, matrix=False)
    assert "tf32" in find_problem(good, half=False, matrix=True, tf32=True)
    small = good._replace(target="sm_80", shared=150_000)  # fits an A100, not a consumer GPU
    assert "shared memory" in find_problem(small, half=True, matrix=True)
    assert "wgmma" in find_problem(good._replace(wgmma=0), half=True, matrix=True)
    assert find_problem(good._replace(wgmma=0), half=True, matrix=False) == ""
    assert find_problem(good._replace(wgmma=0, target="sm_80"), half=True, matrix=True) == ""
