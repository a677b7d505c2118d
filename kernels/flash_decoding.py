"""Attention of one new query a row over a cache of keys and values: the step of sampling.

For one row of the batch and one head, with query q (D) at position n - 1, n = lengths[b], and
cached k, v (n, D):

    out = sum_j p_j v_j,    p = softmax( k q / sqrt(D) )

Each element is read once and used in 2 operations, so the time is the time to read the 2 n D
elements of a head. The fastest kernel reads nothing past a row's length and has enough programs in
flight. Matrix units would not help: products are float32 sums in registers.

**Split keys** (Dao et al. 2023, Flash-Decoding). Few rows and heads would leave most of the GPU
idle, so the keys are cut into splits, one program each. A split leaves its maximum m_i,
sum norm_i of exp(s - m_i) and unnormalised output acc_i; with m = max m_i, the second kernel forms

    out = sum_i exp(m_i - m) acc_i / sum_i exp(m_i - m) norm_i

What each program reads, as `--watch` prints it: 290 of 400 cached keys, in tiles of 32:

    split 0   # # # # . . . . . . . . .
    split 1   . . . . # # # # . . . . .
    split 2   . . . . . . . . # # . . .
    split 3   . . . . . . . . . . . . .

Bytes read per row and head (2-byte elements): 4 n D. Masked attention over a whole cache of C keys
reads 4 C D, about twice as much in the middle of a rollout. Each split writes and reads 4 (D + 2)
bytes more.

There is no backward: training uses kernels/flash_attention.py on whole sequences, which gives the
same numbers up to rounding. Preconditions (checked in `decode_attention`): one floating dtype, last
stride 1, D up to 128 for Triton.

Run: python -m kernels.flash_decoding            verify every implementation, then time it
     python -m kernels.flash_decoding --watch    what the kernels read and write (watch.py)
"""

from __future__ import annotations

import math
import os
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and ("--watch" in sys.argv or not torch.cuda.is_available()):
    # Read when Triton is imported, so before the next line.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels.bench import benchmark, decode_attention_rows
from kernels.check import (
    TOLERANCE,
    compare,
    expect_count,
    guarded,
    main,
    run_cases,
    with_gaps,
    with_other_column,
)
from kernels.runtime import (
    Impl,
    accumulator,
    check_floats,
    check_lengths,
    check_tiles,
    choose,
    fake,
    gpu_class,
    jit,
    launch,
    may_read,
    multiprocessors,
    tl,
    triton,
)
from kernels.score_mods import SCORE_MODS, check_fields, check_score_mod, find, plain, reach


def reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, score_mod: str
) -> Tensor:
    """The definition, one row at a time."""
    out = torch.zeros_like(q)
    for b, n in enumerate(lengths.tolist()):
        if n:
            key, value = k_cache[b : b + 1, :, :n], v_cache[b : b + 1, :, :n]  # (1, H, n, D)
            # (1, H, 1, n)
            scores = q[b : b + 1, :, None] @ key.transpose(-1, -2) / math.sqrt(q.shape[-1])
            index = torch.arange(n, device=q.device)
            scores = find(score_mod).torch_scores(scores, index[-1:, None], index[None, :])
            out[b] = (scores.softmax(-1) @ value)[0, :, 0]
    return out


# ---- torch


def decode_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, score_mod: str
) -> Tensor:
    """PyTorch's fused attention with a mask; on a CPU only the first max(lengths) cache entries are
    touched."""
    S = k_cache.shape[2]
    ragged = True
    if may_read(lengths) and lengths.numel():
        low, S = (int(x) for x in lengths.aminmax())
        ragged = low < S
        if S == 0:
            return torch.zeros_like(q)
    k, v = k_cache[:, :, :S], v_cache[:, :, :S]  # (B, H, S, D)
    if not ragged:
        return _decode_torch(q, k, v, lengths, score_mod)
    if may_read(lengths):
        # A hidden key has probability 0, but 0 times NaN is NaN. Only then set the tail to zero:
        # that copies the cache, which costs as much as the attention.
        out = _decode_torch(q, k, v, lengths.clamp_min(1), score_mod)
        if math.isfinite(out.sum()):
            return torch.where(lengths[:, None, None] > 0, out, 0.0)
    inside = (torch.arange(S, device=q.device) < lengths[:, None])[:, None, :, None]  # (B, 1, S, 1)
    k, v = torch.where(inside, k, 0.0), torch.where(inside, v, 0.0)
    out = _decode_torch(q, k, v, lengths.clamp_min(1), score_mod)
    return torch.where(lengths[:, None, None] > 0, out, 0.0)


def _decode_torch(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, score_mod: str) -> Tensor:
    """The same for finite caches and lengths of at least 1."""
    mod = find(score_mod)
    key = torch.arange(k.shape[2], device=q.device)
    query = (lengths - 1)[:, None, None, None]  # (B, 1, 1, 1): the query is its row's last token
    if mod.score is None:
        mask = mod.torch_visible(query, key)  # (B, 1, 1, S)
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask)[:, :, 0]
    # Rounding scores to 16 bits would change them more than the score mods do.
    if q.element_size() == 2:
        return _decode_torch(q.float(), k.float(), v.float(), lengths, score_mod).to(q.dtype)
    scores = q[:, :, None] @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, 1, S)
    return (mod.torch_scores(scores, query, key).softmax(-1) @ v)[:, :, 0]


# ---- Triton

# (BLOCK_K keys a step, num_warps, num_stages), for GPU class, bytes an element and head size up to.
TILES = {
    ("sm_90", 2, 64): (128, 4, 3),
    ("sm_90", 2, 128): (64, 4, 3),
    ("sm_90", 4, 64): (64, 4, 3),
    ("sm_90", 4, 128): (32, 4, 3),
    ("sm_80", 2, 64): (128, 4, 3),
    ("sm_80", 2, 128): (64, 4, 3),
    ("sm_80", 4, 64): (64, 4, 3),
    ("sm_80", 4, 128): (32, 4, 3),
    ("interpreter", 8, 128): (32, 1, 1),
}


def _tile(q: Tensor) -> dict[str, int]:
    """Keyword arguments of the first kernel."""
    gpu, D = gpu_class(q), q.shape[-1]
    check_tiles(q)
    if D > 128:
        raise ValueError(f"head size {D} is larger than the Triton kernels' 128; use impl='torch'")
    key = (gpu, 8, 128) if gpu == "interpreter" else (gpu, q.element_size(), 64 if D <= 64 else 128)
    return dict(zip(("BLOCK_K", "num_warps", "num_stages"), TILES[key], strict=True))


def split_size(rows_and_heads: int, cache: int, block: int, processors: int) -> tuple[int, int]:
    """(number of splits, keys a split): two programs a multiprocessor, and at least four steps of
    keys a program.

    The lengths are on the GPU, and reading them would wait for it, so the whole cache is split;
    programs past a row's length end at once.
    """
    wanted = max(1, 2 * processors // max(rows_and_heads, 1))
    keys = max(triton.cdiv(cache, wanted), 4 * block)
    keys = triton.cdiv(keys, block) * block
    return triton.cdiv(cache, keys), keys


@jit
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    m_ptr,
    norm_ptr,
    acc_ptr,
    out_ptr,
    lengths,
    q_b,
    q_h,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    H,
    S,
    keys,
    splits,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One split of one row and head. m, norm are (B H, splits), acc (B H, splits, D), out (B, H,
    D).

    WHOLE: the only split, which writes `out` itself.
    """
    row = tl.program_id(0)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    length = tl.minimum(tl.load(lengths + b), S)
    d = tl.arange(0, BLOCK_D)
    query = tl.load(q_ptr + b * q_b + h * q_h + d, mask=d < D, other=0.0).to(ACC)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h

    begin = tl.program_id(1) * keys
    end = tl.minimum(begin + keys, length)
    if FIRST_KEY is not None:  # skip the blocks that the query does not see
        begin = tl.maximum(begin, tl.maximum(FIRST_KEY(length - 1), 0) // BLOCK_K * BLOCK_K)
    # Lower than any score, but finite: minus infinity would give inf - inf.
    m = tl.full((1,), -1e30, ACC)
    norm = tl.zeros((1,), ACC)
    acc = tl.zeros((BLOCK_D,), ACC)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < end) & (d[None, :] < D)
        offsets = rows[:, None].to(tl.int64)
        # (BLOCK_K, BLOCK_D)
        key = tl.load(k_ptr + offsets * k_s + d[None, :], mask=inside, other=0.0)
        value = tl.load(v_ptr + offsets * v_s + d[None, :], mask=inside, other=0.0)
        s = tl.sum(query[None, :] * key.to(ACC), 1) * SCALE
        visible = rows < end
        if FIRST_KEY is not None:
            visible = visible & (rows >= FIRST_KEY(length - 1))
        if SCORE is not None:  # which never gets a hidden pair
            s = SCORE(s, length - 1, tl.where(visible, rows, length - 1), h, H)
        s = tl.where(visible, s * 1.4426950408889634, float("-inf"))  # in units of log 2
        m_new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - m_new)
        shrink = tl.exp2(m - m_new)
        norm = norm * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * value.to(ACC), 0)
        m = m_new

    if WHOLE:
        out = tl.where(norm > 0.0, acc / tl.where(norm > 0.0, norm, 1.0), 0.0)
        tl.store(out_ptr + row.to(tl.int64) * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    else:
        part = row.to(tl.int64) * splits + tl.program_id(1)
        tl.store(m_ptr + part + tl.arange(0, 1), m)
        tl.store(norm_ptr + part + tl.arange(0, 1), norm)
        tl.store(acc_ptr + part * D + d, acc, mask=d < D)


@jit
def combine_kernel(
    m_ptr,
    norm_ptr,
    acc_ptr,
    out_ptr,
    splits,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Merge the splits of one row and head. An empty split has m = -1e30 and norm = 0: it adds
    nothing."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    part = row * splits + i
    m = tl.load(m_ptr + part, mask=i < splits, other=-1e30)
    norm = tl.load(norm_ptr + part, mask=i < splits, other=0.0)
    mask = (i[:, None] < splits) & (d[None, :] < D)
    # (BLOCK_SPLITS, BLOCK_D)
    acc = tl.load(acc_ptr + part[:, None] * D + d[None, :], mask=mask, other=0.0)
    weight = tl.exp2(m - tl.max(m, 0))
    total = tl.sum(weight * norm, 0)
    out = tl.sum(weight[:, None] * acc, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def triton_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, score_mod: str
) -> Tensor:
    """Launch both kernels, or the first alone where the rows and heads fill the GPU."""
    B, H, D = q.shape
    S = k_cache.shape[2]
    mod, (sum_dtype, acc) = find(score_mod), accumulator(q.dtype)
    tile = _tile(q)
    splits, keys = split_size(B * H, S, tile["BLOCK_K"], multiprocessors(q))
    out = q.new_empty(B, H, D)
    m, norm = q.new_empty(2, B * H, splits, dtype=sum_dtype).unbind(0)
    partial = q.new_empty(B * H, splits, D if splits > 1 else 0, dtype=sum_dtype)

    tensors = q, k_cache, v_cache, m, norm, partial, out, lengths
    strides = *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]
    both = {"ACC": acc, "D": D, "BLOCK_D": max(16, triton.next_power_of_2(D))}
    first = {"SCALE": 1 / math.sqrt(D), "SCORE": mod.score, "FIRST_KEY": mod.first_key}
    first |= both | tile | {"WHOLE": splits == 1}
    launch(split_kernel, (B * H, splits), *tensors, *strides, H, S, keys, splits, **first)
    if splits > 1:
        second = both | {"BLOCK_SPLITS": triton.next_power_of_2(splits), "num_warps": 2}
        launch(combine_kernel, (B * H,), m, norm, partial, out, splits, **second)
    return out


# torch.compile sees one opaque operator and what it returns (fake).
_op = torch.library.custom_op(
    "kernels::decode_attention",
    triton_decode,
    mutates_args=(),
    schema="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, str score_mod) -> Tensor",
)


@fake(_op, triton_decode)
def _(q, k_cache, v_cache, lengths, score_mod):
    return q.new_empty(q.shape)


def decode_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, score_mod: str
) -> Tensor:
    """The kernels above."""
    return _op(q, k_cache, v_cache, lengths, score_mod)


IMPLS = {"torch": decode_torch, "triton": Impl(decode_triton, needs_triton=True)}


# ---- the public function


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    score_mod: str = "causal",
    impl: str = "auto",
) -> Tensor:
    """Attention of one new query a row over the first lengths[b] cached keys, the last of which is
    its own.

    q                 (B, H, D), last stride 1
    k_cache, v_cache  (B, H, S, D), same dtype, last stride 1; from lengths[b] on ignored
    lengths           (B,) int32 in 0..S; the query is at position lengths[b] - 1; 0 gives 0
    score_mod         an entry of SCORE_MODS, or one with a number, such as "window:256"
    impl              "auto": Triton on CUDA, torch elsewhere; an entry of IMPLS; "operation=entry"

    Returns (B, H, D) in the inputs' dtype. There is no backward: sampling needs none.
    Raises ValueError naming the argument, its value and the remedy.
    """
    _check(q, k_cache, v_cache, lengths, score_mod)
    lengths = lengths.contiguous()  # kernels read it without a stride
    return choose(impl, "decode_attention", IMPLS, q)(q, k_cache, v_cache, lengths, score_mod)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, score_mod: str) -> None:
    check_score_mod(score_mod)
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, H, D): one query a row")
    B, H, D = q.shape
    if D == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected a head size of at least 1")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4 or x.shape != (B, H, k_cache.shape[-2], D):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected ({B}, {H}, S, {D}), S as in both"
            )
    check_floats(q=q, k_cache=k_cache, v_cache=v_cache)
    check_lengths(lengths, B, k_cache.shape[2], q.device)


# ---- check and benchmark

# (B, H, S, D, lengths, score_mod, level of the scores): split and whole, one key, empty rows,
# padded head sizes, rows and heads of unequal strides and of stride 0, each mod at over twice its
# window
CASES = [
    (1, 1, 5, 16, [5], "causal", 0.0),
    (2, 2, 200, 16, [193, 194], "probe", 0.0),  # from key 127 and 128, around a block's beginning
    (1, 1, 300, 80, [290], "causal", 0.0),
    (5, 1, 70, 64, [70, 0, 1, 33, 64], "causal", 0.0),
    (1, 1, 400, 16, [399], "causal", -120.0),
    (2, 3, 300, 24, [300, 129], "causal", 0.0),
    (2, 2, 250, 16, [250, 0], "causal", 0.0),  # an empty row in as many splits as a power of 2
    *(
        (1, 2, min(1024, max(200, 2 * reach(name) + 12)), 16, [197], name, 0.0)
        for name in [*SCORE_MODS, "window:33"]
        if name != "causal"
    ),
]


def make_case(
    B: int,
    H: int,
    S: int,
    D: int,
    lengths: list[int],
    level: float,
    dtype: torch.dtype,
    device: str,
) -> tuple:
    """q, caches of different strides and offsets with NaN past the rows' ends and between the rows,
    and lengths, which are strided, too. Three heads share one head of keys, by a stride of 0."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    q = with_gaps(random(B, 2, H, D))[:, 1]
    k = with_gaps(random(B, 1 if H == 3 else H, S, D), 4)
    v = with_gaps(random(B, S, H, D), 5).transpose(1, 2)
    if level:
        q[..., 0], k[..., 0] = math.sqrt(-level) * D**0.25, -math.sqrt(-level) * D**0.25
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = float("nan")
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return q, k.expand_as(v), v, with_other_column(lengths)


def verify(impl: str, dtype: torch.dtype, device: str, case: int | None = None) -> float:
    """Compare with the reference in float64, on one of CASES or on all; check that the fields of
    each score mod agree. Returns the largest error; raises what is wrong."""
    if not case:  # all, or the first
        for name in dict.fromkeys([*SCORE_MODS, *(score_mod for *_, score_mod, _ in CASES)]):
            check_fields(name)
    return run_cases(CASES, partial(_check_case, impl, dtype, device), case)


def _check_case(impl: str, dtype: torch.dtype, device: str, case: tuple) -> float:
    *shape, row_lengths, score_mod, level = case
    # scores are rounded in proportion to their size, and so is everything after the exponential
    tolerance = min(0.05, TOLERANCE[dtype] * (1 - level))
    q, k, v, lengths = make_case(*shape, row_lengths, level, dtype, device)
    with guarded() as seen:
        out = decode_attention(q, k, v, lengths, score_mod=score_mod, impl=impl)
    expected = reference(
        q.double(), k.double().nan_to_num(), v.double().nan_to_num(), lengths, score_mod
    )
    what = f"decode_attention {impl} {shape} {row_lengths} {score_mod} level {level}"
    worst = compare(what, out, expected, tolerance)
    if impl == "triton" and seen.visits:  # what is seen is read once, and nothing else
        first, block, keys = find(score_mod).first_key, _tile(q)["BLOCK_K"], 0
        for n in row_lengths:
            skipped = max(0, plain(first)(n - 1)) // block * block if first and n else 0
            keys += n - skipped
        for name in ("k_ptr", "v_ptr"):
            found, row = seen.requested["split_kernel", "load", name], shape[3] * q.element_size()
            expect_count(f"{what}: bytes read of {name}", found, shape[1] * keys * row)
    return worst


if __name__ == "__main__":
    from kernels.watch import decoding_case  # only here: nothing else needs it

    main(IMPLS, verify, CASES, watch=lambda: decoding_case(decode_attention))
    benchmark("flash_decoding", partial(decode_attention_rows, decode_attention, IMPLS))
