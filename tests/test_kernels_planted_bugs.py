"""The kernel checks can fail: each mistake below, planted into a copy of a kernel's source, is
caught by the check named.

The mistakes are those found in published kernels: a softmax gradient summed per tile instead of per
row, a running maximum that starts at 0, a last tile without a mask, an upstream gradient read as if
it were contiguous, p - 1 in 16 bits, 32-bit offsets. Twelve of them are also exercises, and stand
in kernels/exercises/answers.py. (tests/mutants.py makes more, by machine.)
"""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from kernels import flash_attention, flash_decoding, linear_logprob, runtime
from kernels.exercises import answers
from tests import mutants, test_flash_attention, test_flash_decoding, test_linear_logprob
from tests.interpreter import gpu_or_cpu, needs_triton


def verify(module: ModuleType) -> None:
    for case in range(len(module.CASES)):  # stop at the first that fails
        module.verify("triton", torch.float32, gpu_or_cpu(), case)


def verify_half(module: ModuleType) -> None:
    module.verify("triton", torch.float16, gpu_or_cpu())


class Bug(NamedTuple):
    """`old` in a kernel's source replaced by `new`, and the check that must fail."""

    name: str
    old: str
    new: str
    check: Callable[[ModuleType], None] = verify


def exercises(module: ModuleType) -> list[Bug]:
    """Those of one kernel file that kernels/exercise.py hands out."""
    kernel = module.__name__.split(".")[1]
    return [Bug(b.name, b.old, b.new) for b in answers.BUGS if b.kernel == kernel]


INT64 = ".to(tl.int64) * "
SWAPPED = "SCALE, seen, q, head, H)\n    r"
FAR = test_flash_attention.check_offsets_do_not_wrap
FAR_CACHE = test_flash_decoding.check_offsets_do_not_wrap
ALWAYS = "alive[:, None], vocab[:, None] > -1"
ATTENTION = [
    *exercises(flash_attention),
    Bug("maximum starts at 0", "tl.full((BLOCK_Q,), -1e30, ACC)", "tl.zeros((BLOCK_Q,), ACC)"),
    Bug("diagonal tile unmasked", "    elif DIAGONAL:\n", "    elif False:\n"),
    Bug("keys read with the values' stride", "(k_ptr, k_rows, k_t,", "(k_ptr, k_rows, v_t,"),
    Bug("length ignored", "length = tl.minimum(tl.load(lengths + b), T)", "length = T"),
    Bug("no derivative of the score", "    if DERIVATIVE is not None:\n", "    if False:\n"),
    Bug("derivative gets q and k exchanged", "SCALE, q, seen, head, H)\n    r", SWAPPED),
    Bug("derivative of head 0", "SCALE, q, seen, head, H)\n    r", "SCALE, q, seen, 0, H)\n    r"),
    Bug("window's last query left out", "QUERY(k_start + BLOCK_K - 1) + 1", "QUERY(k_start + 63)"),
    Bug("hidden pairs reach the score", "        k = tl.minimum(k, q)\n", "        k = k + 0\n"),
    Bug("keys before the window reach the score", "k = tl.maximum(k, FIRST_KEY(q))", "k = k + 0"),
    Bug("lengths taken as contiguous", "lengths = lengths.contiguous()", "lengths = lengths"),
    Bug("float32 products in tf32", 'precision="ieee"', 'precision="tf32"'),
    Bug(
        "a tile past the diagonal", "tl.minimum(q_start + BLOCK_Q, l", "tl.minimum(q_start + 200, l"
    ),
    Bug("a tile past the window", "BLOCK_K - 1) + 1)", "BLOCK_K - 1) + 99)"),
    Bug("a tile before the window", "tl.maximum(FIRST_KEY(q_start), 0)", "(0 * q_start)"),
    Bug(
        "32-bit batch offsets", "(tl.program_id(1) // H).to(tl.int64)", "tl.program_id(1) // H", FAR
    ),
    Bug(
        "32-bit offsets",
        f"rows[:, None]{INT64}stride",
        "rows[:, None] * stride",
        test_flash_attention.check_offsets_do_not_wrap,
    ),
]
LOGPROB = [
    *exercises(linear_logprob),
    Bug("maximum starts at 0", "tl.full((BLOCK_N,), LOWEST, ACC)", "tl.zeros((BLOCK_N,), ACC)"),
    Bug(
        "target off by one",
        "sum(tl.where(vocab[None, :] == y",
        "sum(tl.where(vocab[None, :] == 1 + y",
    ),
    Bug("upstream gradient taken as contiguous", "tokens.to(tl.int64) * g_n", "tokens"),
    Bug("entropy's gradient without the entropy", "logp * LN2 + entropy[:, None]", "logp * LN2"),
    Bug("target 0 ignored", "asked = y >= 0\n    z", "asked = y > 0\n    z"),
    Bug("weight rows read past the last", "alive[:, None], vocab[:, None] < V", ALWAYS),
    Bug("float32 products in tf32", 'precision="ieee"', 'precision="tf32"'),
    Bug("targets taken as contiguous", "targets = targets.contiguous()", "targets = targets"),
    Bug("last workspace alone", "add_product(d_hidden, p", "add_product(d_hidden.zero_(), p"),
    Bug(
        "gradient of the first rows alone", "out=d_weight[begin:end]", "out=d_weight[: end - begin]"
    ),
    Bug("one stretch too far", "minimum(begin + STRETCH, V)", "minimum(begin + STRETCH, V + 500)"),
    Bug(
        "sums over workspaces in 16 bits",
        "d_hidden = torch.zeros_like(x, dtype=sum_dtype)",
        "d_hidden = torch.zeros_like(x)",
        test_linear_logprob.check_sums_are_float32,
    ),
    Bug(
        "upstream gradients in float16 as they are",
        "scaled(g_chosen, g_entropy, over=1 / temperature)",
        "g_chosen, g_entropy, 1.0",
        verify_half,
    ),
    Bug("ignored tokens take a gradient", "asked = y >= 0\n    z", "asked = y >= -1000\n    z"),
    Bug(
        "p - 1 in 16 bits",
        "p = tl.exp2(logp)",
        "p = tl.exp2(logp).to(tl.float16).to(tl.float32)",
        test_linear_logprob.check_confident_targets,
    ),
    Bug(
        "every stretch begins at 0",
        "vocab = begin + column",
        "vocab = column",
        test_linear_logprob.check_stretches,
    ),
    Bug(
        "32-bit offsets",
        f"tokens[:, None]{INT64}x_n",
        "tokens[:, None] * x_n",
        test_linear_logprob.check_offsets_do_not_wrap,
    ),
]
DECODING = [
    *exercises(flash_decoding),
    Bug("maximum starts at 0", "m = tl.full((1,), -1e30, ACC)", "m = tl.zeros((1,), ACC)"),
    Bug("last tile unmasked", "visible = rows < end", "visible = rows > -1"),
    Bug("reads past the length", "(rows[:, None] < end) & (d", "(rows[:, None] < S) & (d"),
    Bug("number of heads off by one", "length - 1), h, H)", "length - 1), h, H + 1)"),
    Bug("query off by one", "SCORE(s, length - 1,", "SCORE(s, length,"),
    Bug("hidden pairs reach the score", "tl.where(visible, rows, length - 1)", "rows"),
    Bug("lengths taken as contiguous", "lengths = lengths.contiguous()", "lengths = lengths"),
    Bug("32-bit batch offsets", "(row // H).to(tl.int64)", "row // H", FAR_CACHE),
    Bug("window off by one", "(rows >= FIRST_KEY(length - 1))", "(rows >= FIRST_KEY(length))"),
    Bug(
        "32-bit offsets",
        "rows[:, None].to(tl.int64)",
        "rows[:, None]",
        test_flash_decoding.check_offsets_do_not_wrap,
    ),
]
MODULES = ((flash_attention, ATTENTION), (linear_logprob, LOGPROB), (flash_decoding, DECODING))
BUGS = [
    pytest.param(module, bug, id=f"{module.__name__.split('.')[1]}: {bug.name}")
    for module, bugs in MODULES
    for bug in bugs
]
CHECKS = [
    pytest.param(module, check, id=f"{module.__name__.split('.')[1]}: {check.__name__}")
    for module, bugs in MODULES
    for check in dict.fromkeys(bug.check for bug in bugs)
]


def load_patched(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module from its source with `old` replaced by `new`, under operator names of its own."""
    source = inspect.getsource(module)
    assert old in source, f"{module.__name__} no longer contains {old!r}: update the planted bug"
    # A file, because Triton reads kernels' sources.
    path = folder / f"patched_{module.__name__.split('.')[1]}.py"
    path.write_text(source.replace(old, new).replace('"kernels::', '"patched::'), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    patched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patched)
    return patched


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # planted infinities
@pytest.mark.parametrize("module, bug", BUGS)
def test_planted_bug_is_caught(module, bug, tmp_path):
    patched = load_patched(module, bug.old, bug.new, tmp_path)
    with pytest.raises(Exception) as caught:
        bug.check(patched)
    # a wrong number or address, not an error of the test itself
    words = ("is above", "not finite", "outside its shape", "give 'ieee'", "divide by zero")
    words += ("visited in vain", "is left out")
    assert any(word in str(caught.value) for word in words), caught.value


@needs_triton
@pytest.mark.parametrize("module, check", CHECKS)
def test_an_unpatched_copy_passes(module, check, tmp_path):
    """What catches the bugs is the bug: the same loading without one passes every check."""
    check(load_patched(module, "IMPLS = ", "IMPLS = ", tmp_path))


# ---- and by machine: tests/mutants.py


def test_what_is_listed_as_equivalent_is_a_mutant() -> None:
    made = {(m.function, m.new) for kernel in mutants.KERNELS for m in mutants.mutants_of(kernel)}
    assert set(mutants.EQUIVALENT) <= made
    drawn = mutants.draw([*mutants.KERNELS], 50, 0)
    assert sum(m.reason is None for m in drawn) == 50
    assert {(m.kind, m.kernel) for m in drawn} >= {
        (kind, kernel) for kind in mutants.KINDS for kernel in mutants.KERNELS
    }


@needs_triton
@pytest.mark.skipif(not runtime.INTERPRETED, reason="the guard is the interpreter's")
def test_a_mutant_is_caught_and_the_file_itself_is_not() -> None:
    """In a process of its own, as each of the fifty."""
    made = mutants.mutants_of("flash_decoding")
    mutant = next(m for m in made if m.new.startswith("m_new = tl.minimum"))
    assert "invalid value" in mutants.verdict(mutant)
    source = Path(flash_decoding.__file__).read_text(encoding="utf-8")
    assert mutants.verdict(mutant._replace(source=source)) == ""


@needs_triton
@pytest.mark.slow
def test_of_fifty_mutants_48_are_caught() -> None:
    assert mutants.main([]) == 0
