"""kernels/watch.py: an access outside is an error; indices, counts and pictures are true."""

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kernels import flash_attention, flash_decoding, linear_logprob, watch
from kernels.check import guarded
from kernels.runtime import jit, launch, tl
from kernels.watch import OutOfBounds, locate, watching
from tests.interpreter import needs_triton
from tests.test_kernels_planted_bugs import load_patched

MODULES = (flash_attention, flash_decoding, linear_logprob)
CASES = {
    "flash_attention": lambda: watch.attention_case(flash_attention.attention),
    "flash_decoding": lambda: watch.decoding_case(flash_decoding.decode_attention),
    "linear_logprob": lambda: watch.logprobs_case(linear_logprob.logprobs),
}
pytestmark = needs_triton


@jit
def inner(pointer, BLOCK: tl.constexpr):
    return tl.load(pointer + tl.arange(0, BLOCK))  # no mask


@jit
def planted_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, inner(x_ptr + tl.program_id(1) * BLOCK, BLOCK), mask=i < n)


@jit
def copy_kernel(x_ptr, y_ptr, start, n, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0))


def attend(T: int, D: int, *lengths: int) -> watch.Watch:
    q, k, v = (torch.randn(1, 1, T, D).half() for _ in range(3))
    lengths = torch.tensor(lengths, dtype=torch.int32) if lengths else None
    with watching() as seen, torch.no_grad():
        flash_attention.attention(q, k, v, lengths, impl="triton")
    return seen


# ------------------------------------------------------------------------------------------------
# Outside


def test_an_unmasked_load_names_kernel_program_tensor_index_and_line():
    x, y = torch.zeros(3, 20)[1], torch.zeros(20)
    with pytest.raises(OutOfBounds) as caught, watching():
        launch(planted_kernel, (1, 2), x, y, 20, BLOCK=16)
    lines = Path(__file__).read_text().splitlines()
    load = 1 + next(i for i, line in enumerate(lines) if "# no mask" in line)
    call = 1 + next(i for i, line in enumerate(lines) if "inner(x_ptr" in line)
    assert str(caught.value) == (
        "planted_kernel, program (0, 1, 0): load of x_ptr[20], outside its shape (20,), as 12 of "
        f"16 addresses (test_kernels_watch.py:{load}, called from test_kernels_watch.py:{call})"
    )


@pytest.mark.parametrize(
    "x, start, message",
    [
        (torch.zeros(1).expand(20), 0, r"load of x_ptr\[1\]"),  # elements at stride 0: one address
        (torch.zeros(40)[::2], 0, r"load of x_ptr\[1\]"),  # between two elements
        (torch.zeros(60)[20:40], -3, r"load of x_ptr\[-3\]"),
        (torch.zeros(20), 8, r"store of y_ptr\[20\]"),  # the load is masked
    ],
)
def test_what_is_outside(x, start, message):
    with pytest.raises(OutOfBounds, match=message), watching():
        launch(copy_kernel, (1,), x, torch.zeros(60)[20:40], start, 20, BLOCK=16)


def test_an_address_in_another_argument_is_outside():
    memory = torch.zeros(32)
    with pytest.raises(OutOfBounds, match=r"x_ptr\[16\], outside its shape \(16,\)"), watching():
        launch(copy_kernel, (1,), memory[:16], memory[16:], 16, 32, BLOCK=16)


def test_booleans_are_checked_although_their_pointers_are_cast():
    x, y = torch.ones(16).bool(), torch.zeros(16).bool()
    with watching() as seen:
        launch(copy_kernel, (1,), x, y, 0, 16, BLOCK=16)
    assert y.all() and [v.tensor for v in seen.visits] == ["x_ptr", "y_ptr"]
    with pytest.raises(OutOfBounds, match=r"load of x_ptr\[16\]"), watching():
        launch(copy_kernel, (1,), x, y, 0, 20, BLOCK=32)


def test_a_shipped_kernel_without_its_mask_is_an_error_instead_of_a_crash(tmp_path):
    patched = load_patched(flash_attention, "D, BLOCK_D, DIAGONAL)", "D, BLOCK_D, False)", tmp_path)
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    with pytest.raises(OutOfBounds) as caught, watching():
        patched.attention(q, k, v, impl="triton")
    assert "forward_kernel, program (0, 0, 0): load of k_ptr[0, 0, 20, 0], outside" in str(
        caught.value
    )


# ------------------------------------------------------------------------------------------------
# Inside


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5),
        torch.zeros(3, 7)[:, :5],
        torch.zeros(4, 3, 5).permute(2, 0, 1)[1:, :, ::2],
        torch.zeros(2, 1, 3).expand(2, 4, 3),
        torch.zeros(1).expand(6),
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.zeros(1, 1, 6)[..., 2:4],
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)
def test_indices_of_strided_tensors(x):
    """Against a table of all elements."""
    table = {}
    for index in itertools.product(*map(range, x.shape)):
        offset = sum(i * s for i, s in zip(index, x.stride(), strict=True))
        table.setdefault(offset, index)  # of an expanded dimension, its index 0
    offsets = torch.arange(-5, 80)
    index, inside = locate(x, offsets)
    for n, offset in enumerate(offsets.tolist()):
        assert bool(inside[n]) == (offset in table), offset
        if offset in table:
            assert tuple(int(i[n]) for i in index) == table[offset]


def test_visits_name_the_argument_even_where_tensors_share_memory():
    q, k, v = torch.randn(2, 70, 3, 4, 16).permute(2, 0, 3, 1, 4)  # (B, H, T, D), interleaved
    for given in ((q, k, v), (q, q, q)):
        with watching() as seen:
            flash_attention.attention(*given, impl="triton")
        for name in ("q_ptr", "k_ptr", "v_ptr"):
            mine = [visit for visit in seen.visits if visit.tensor == name]
            assert {visit.first[:2] for visit in mine} == {*itertools.product(range(2), range(4))}
            assert {visit.last[2:] for visit in mine} <= {(31, 15), (63, 15), (69, 15)}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_verify_is_clean(module):
    with watching() as seen:
        module.verify("triton", torch.float32, "cpu")
    assert {v.kind for v in seen.visits} == {"load", "store"}


# ------------------------------------------------------------------------------------------------
# Counts


def test_a_causal_case_by_hand():
    """300 tokens, tiles of 64 queries and 32 keys: query tiles see 2, 4, 6, 8 and 10 key tiles, of
    which the last, keys 288 to 319, has 12 of 32 rows."""
    seen = attend(300, 16)
    tiles = seen.tiles("forward_kernel", "load", "k_ptr", {2: 32})
    assert sorted(map(len, tiles.values())) == [2, 4, 6, 8, 10]
    keys = [v for v in seen.visits if v.tensor == "k_ptr"]
    assert len(keys) == 30 and sum(v.bytes for v in keys) == (29 * 32 + 12) * 16 * 2
    assert seen.distinct["forward_kernel", "load", "k_ptr"] == 300 * 16 * 2
    assert seen.dots == {"forward_kernel": 2 * 30}  # q k^T and p v
    assert seen.multiplications == {"forward_kernel": 2 * 30 * 64 * 32 * 16}
    ragged = attend(300, 16, 130)
    assert sum(map(len, ragged.tiles("forward_kernel", "load", "k_ptr", {2: 32}).values())) == 11


@pytest.mark.parametrize(
    "tile, megabytes", [((16, 16), 8.79), ((32, 32), 4.59), ((64, 64), 2.49), ((128, 64), 1.45)]
)
def test_megabytes_by_tile(tile, megabytes, monkeypatch):
    monkeypatch.setitem(flash_attention.TILES, ("interpreter", 8, 128), ((*tile, 1, 1),) * 3)
    T, D, n = 1024, 64, tile[0]
    keys = sum(min(start + n, T) for start in range(0, T, n))  # that the query tiles read
    closed_form = 2 * 2 * keys * D + 2 * 2 * T * D + 4 * T  # k and v; q and out; L
    seen = attend(T, D)
    assert seen.megabytes() == pytest.approx(closed_form / 1e6)
    assert round(seen.megabytes(), 2) == megabytes
    assert sum(seen.distinct.values()) == 8 * T * D + 4 * T  # as flash_attention.py says


# ------------------------------------------------------------------------------------------------
# The context, and what is printed


def test_what_was_replaced_is_restored_also_after_an_error():
    from triton.runtime import interpreter

    owners = interpreter, interpreter.InterpreterBuilder, interpreter.GridExecutor
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(OutOfBounds):
        with watching():
            assert [dict(vars(owner)) for owner in owners] != before
            launch(copy_kernel, (1,), torch.zeros(3), torch.zeros(20), 0, 20, BLOCK=16)
    assert [dict(vars(owner)) for owner in owners] == before


def test_a_guard_within_sees_the_same_and_leaves_nothing_behind():
    from triton.runtime import interpreter

    x, y = torch.ones(16), torch.zeros(16)
    with watching() as outer:
        for _ in range(2):
            with guarded() as inner:
                launch(copy_kernel, (1,), x, y, 0, 16, BLOCK=16)
    assert outer.visits == 2 * inner.visits and len(inner.visits) == 2
    assert outer.requested == inner.requested + inner.requested
    with pytest.raises(OutOfBounds, match=r"load of x_ptr\[16\]"), watching(), guarded():
        launch(copy_kernel, (1,), x, y, 0, 17, BLOCK=32)
    assert not any("create" in name for name in vars(interpreter.interpreter_builder))


def test_it_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(watch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"), watching():
        pass


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_picture_in_a_docstring_is_what_watch_prints(module):
    picture = CASES[module.__name__.split(".")[1]]().split("\n\n")[0]
    assert textwrap.indent(picture, "    ") in module.__doc__


def test_the_command_prints_picture_and_table():
    command = [sys.executable, "-m", "kernels.flash_decoding", "--watch"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == CASES["flash_decoding"]() + "\n"
    assert "split_kernel         load   k_ptr            10   0.00928      0.00928" in run.stdout
