"""Causal attention that never writes its T x T matrix, with a length for every row.

For one row of the batch and one head, with q, k, v (T, D), s = q k^T / sqrt(D) (T, T) and key j
visible to query i if j <= i < length:

    p_ij = exp(s_ij - L_i),  L_i = log sum_j exp(s_ij),  out_i = sum_j p_ij v_j

**Forward** (Dao et al. 2022, FlashAttention). The sum runs over tiles of keys with the running
maximum m, the sum `norm` of exp(s - m) and the unnormalised output acc; when m grows, norm and acc
are scaled by exp(m_old - m_new). The end of the loop gives out = acc / norm and L = m + log norm.
Powers are of 2 (scores times log2 e), as in the hardware's instruction.

**Backward.** From out = p v: dv = p^T dout and dp = dout v^T. The softmax has the Jacobian
dp_ij/ds_ik = p_ij (1[j = k] - p_ik), hence ds_ij = p_ij (dp_ij - delta_i), where delta_i = sum_j
p_ij dp_ij is a sum over the *whole* row, and sum_j p_ij (dout_i . v_j) = dout_i . out_i gives it
without the row. Then dq = ds k / sqrt(D) and dk = ds^T q / sqrt(D), with p recomputed from q, k and
the saved L. One kernel owns query tiles (dq, delta), another key tiles (dk, dv). That takes seven
products where a single pass takes five, but no atomic sums, so runs repeat bit for bit.

Which tiles each program reads, as `--watch` prints it: a row of 300 tokens. Down: programs, each
with a tile of 64 queries (forward, dq) or of 64 keys (dk, dv). Across: tiles of 32 keys, or of 32
queries. A causal program masks only the tiles on its diagonal. One that is past the length of its
row (left, 130) reads nothing and writes zeros. A window (right) moves the other end of the loop.

    forward, 130 tokens   dk dv, 130 tokens     forward, window       dk dv, window
    # # . . . . . . . .   # # # # # . . . . .   # # . . . . . . . .   # # # # . . . . . .
    # # # # . . . . . .   . . # # # . . . . .   # # # # . . . . . .   . . # # # # . . . .
    # # # # # . . . . .   . . . . # . . . . .   . . # # # # . . . .   . . . . # # # # . .
    . . . . . . . . . .   . . . . . . . . . .   . . . . # # # # . .   . . . . . . # # # #
    . . . . . . . . . .   . . . . . . . . . .   . . . . . . # # # #   . . . . . . . . # #

Cost per row and head (2-byte elements, causal): the naive form moves about 8 T^2 bytes of scores
and probabilities beside 8 T D of inputs and output, the fused one only 8 T D + 4 T. Both do 2 T^2 D
operations forward (at D = 64 and T = 1024: 134 million, for 8.4 MB against 0.53 MB). These bytes
are distinct ones: each tile of queries asks for its keys again, 1.45 MB in all with tiles of 128,
mostly from the cache. The backward needs 5 T^2 D operations and does 7 T^2 D here.

Preconditions (checked in `attention`): one floating dtype, last stride 1, any other strides;
Triton: D up to 128 (padded to a power of two inside), float32 / float16 / bfloat16 (float64 in the
interpreter). Softmax and sums are float32.

Run: python -m kernels.flash_attention            verify every implementation, then time it
     python -m kernels.flash_attention --watch    what the kernels read and write (watch.py)
The way here, one idea at a time: kernels/ladder.py.
"""

from __future__ import annotations

import math
import os
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and ("--watch" in sys.argv or not torch.cuda.is_available()):
    # Read when Triton is imported, so before the next line.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels.bench import attention_rows, benchmark
from kernels.check import (
    TOLERANCE,
    compare_all,
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
    scaled,
    tl,
    triton,
)
from kernels.score_mods import SCORE_MODS, ScoreMod, check_fields, check_score_mod, find, reach


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str) -> Tensor:
    """The definition, one row at a time with all its scores at once; autograd gives its
    backward."""
    B, _, T, D = q.shape
    rows = []
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        query, key, value = (x[b : b + 1, :, :n] for x in (q, k, v))  # (1, H, n, D)
        index = torch.arange(n, device=q.device)
        scores = query @ key.transpose(-1, -2) / math.sqrt(D)  # (1, H, n, n)
        scores = find(score_mod).torch_scores(scores, index[:, None], index[None, :])
        rows.append(F.pad(scores.softmax(-1) @ value, (0, 0, 0, T - n)))
    return torch.cat(rows)


# ---- torch


def attention_torch(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str
) -> Tensor:
    """PyTorch's own fused attention where the score is unchanged; scores in memory otherwise.

    A causal query inside its row sees no key past the row's end, so `lengths` changes only the
    tail.
    """
    T = q.shape[2]
    if lengths is None or (may_read(q) and bool((lengths == T).all())):
        return _laid_out(_attention_torch(q, k, v, score_mod))
    inside = (torch.arange(T, device=q.device) < lengths[:, None])[:, None, :, None]  # (B, 1, T, 1)
    # A hidden key has probability 0, but 0 times NaN is NaN: values past the end must be finite.
    # Where reading is free, checking the sums is cheaper than copying.
    if not may_read(q) or not math.isfinite(q.detach().sum() + k.detach().sum() + v.detach().sum()):
        q, k, v = (torch.where(inside, x, 0.0) for x in (q, k, v))
    return _laid_out(torch.where(inside, _attention_torch(q, k, v, score_mod), 0.0))


def _laid_out(out: Tensor) -> Tensor:
    """The same (B, H, T, D) with its memory laid out (B, T, H, D). Free after PyTorch's fused
    attention, which has that layout."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _attention_torch(q: Tensor, k: Tensor, v: Tensor, score_mod: str) -> Tensor:
    mod = find(score_mod)
    if mod.score is None and mod.first_key is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    index = torch.arange(q.shape[2], device=q.device)
    if mod.score is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mod.torch_visible(index[:, None], index)
        )
    # Rounding scores to 16 bits would change them more than the score mods do.
    if q.element_size() == 2:
        return _attention_torch(q.float(), k.float(), v.float(), score_mod).to(q.dtype)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    p = mod.torch_scores(scores, index[:, None], index).softmax(-1)
    return p @ v


# ---- Triton: tile sizes

# One tile is (BLOCK_Q, BLOCK_K, num_warps, num_stages), for GPU class, bytes an element and head
# size up to. The table alone decides: no run stops to tune, and no result depends on an earlier
# tuning. `python -m kernels.compile` shows what each tile uses.
TILES = {
    #                     forward           dq                dk, dv
    ("sm_90", 2, 64): ((128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("sm_90", 2, 128): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_90", 4, 64): ((32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
    ("sm_90", 4, 128): ((32, 16, 4, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
    ("sm_80", 2, 64): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_80", 2, 128): ((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    ("sm_80", 4, 64): ((32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
    ("sm_80", 4, 128): ((32, 16, 4, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
    # small, and of unequal sides, so that tests at small T see many tiles
    ("interpreter", 8, 128): ((64, 32, 1, 1), (64, 32, 1, 1), (32, 64, 1, 1)),
}


def _tiles(q: Tensor) -> tuple[dict[str, int], ...]:
    """Keyword arguments of the three kernels: block sizes, num_warps and num_stages."""
    gpu, D = gpu_class(q), q.shape[-1]
    check_tiles(q)
    if D > 128:
        raise ValueError(f"head size {D} is larger than the Triton kernels' 128; use impl='torch'")
    size = 8 if gpu == "interpreter" else q.element_size()
    row = TILES[gpu, size, 64 if D <= 64 and gpu != "interpreter" else 128]
    return tuple(
        dict(zip(("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages"), tile, strict=True))
        for tile in row
    )


# ---- Triton: a helper for each step, then the three kernels


@jit
def _load(base, rows, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `rows` of a (*, D) matrix as a (rows, BLOCK_D) tile; zeros beyond column D and, MASKED,
    from row `limit`.

    Offsets are 64-bit: 32-bit products wrap silently.
    """
    d = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None].to(tl.int64) * stride + d[None, :]
    if MASKED:
        if D == BLOCK_D:
            tile = tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
        else:
            tile = tl.load(pointers, mask=(rows[:, None] < limit) & (d[None, :] < D), other=0.0)
    else:
        if D == BLOCK_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=d[None, :] < D, other=0.0)
    return tile


@jit
def _store(base, rows, stride, limit, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the tile's rows below `limit` and columns below D in the type that `base` points to."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None].to(tl.int64) * stride + d[None, :]
    tl.store(
        pointers, tile.to(base.dtype.element_ty), mask=(rows[:, None] < limit) & (d[None, :] < D)
    )


@jit
def _length(lengths, b, T):
    """Tokens in row b: all T without `lengths`."""
    if lengths is None:
        length = T
    else:
        length = tl.minimum(tl.load(lengths + b), T)
    return length


@jit
def _seen(q, k, FIRST_KEY: tl.constexpr, DIAGONAL: tl.constexpr):
    """The key index that functions of score mods get: k, moved to one that the query sees."""
    if DIAGONAL:
        k = tl.minimum(k, q)
    if FIRST_KEY is not None:
        k = tl.maximum(k, FIRST_KEY(q))
    return k


@jit
def _scores(
    dots,
    q,
    k,
    head,
    H,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Scores in units of log 2 from dot products; q, k are index tiles; hidden keys get minus
    infinity."""
    if SCORE is None:
        s = dots * (SCALE * 1.4426950408889634)  # log2 e
    else:
        seen = _seen(q, k, FIRST_KEY, DIAGONAL)
        s = SCORE(dots * SCALE, q, seen, head, H) * 1.4426950408889634
    if FIRST_KEY is not None:
        s = tl.where((k <= q) & (k >= FIRST_KEY(q)), s, float("-inf"))
    elif DIAGONAL:
        s = tl.where(k <= q, s, float("-inf"))
    return s


@jit
def _first(q_start, FIRST_KEY: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the key loop of queries from q_start on begins, a multiple of BLOCK_K."""
    begin = q_start * 0
    if FIRST_KEY is not None:
        begin = tl.maximum(FIRST_KEY(q_start), 0) // BLOCK_K * BLOCK_K
    return begin


@jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    lengths,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    out_b,
    out_h,
    out_t,
    H,
    T,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out and L (base 2) of one query tile. x_b, x_h, x_t are strides; lse is (B, H, T)."""
    tl.static_assert(BLOCK_Q % BLOCK_K == 0, "the diagonal must begin at a tile of keys")
    # The longest rows first: no stragglers.
    q_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    length = _length(lengths, b, T)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h

    rows = q_start + tl.arange(0, BLOCK_Q)
    query = _load(q_ptr + b * q_b + h * q_h, rows, q_t, length, D, BLOCK_D, True)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    # Lower than any score, but finite: with minus infinity, m - m_new would be inf - inf where no
    # key was visible yet.
    m = tl.full((BLOCK_Q,), -1e30, ACC)
    norm = tl.zeros((BLOCK_Q,), ACC)
    # Full tiles end where the diagonal begins; a query tile past the length has none.
    full_end = tl.where(q_start < length, q_start, 0)
    for DIAGONAL in tl.static_range(2):  # the tiles left of the diagonal, then those on it
        if DIAGONAL:
            begin, end = q_start, tl.minimum(q_start + BLOCK_Q, length)
        else:
            begin, end = _first(q_start, FIRST_KEY, BLOCK_K), full_end
        for start in range(begin, end, BLOCK_K):
            k_rows = start + tl.arange(0, BLOCK_K)
            key = _load(k_ptr, k_rows, k_t, length, D, BLOCK_D, DIAGONAL)  # (BLOCK_K, BLOCK_D)
            # (BLOCK_Q, BLOCK_K)
            dots = tl.dot(query, tl.trans(key), input_precision="ieee", out_dtype=ACC)
            q, k = rows[:, None], k_rows[None, :]
            s = _scores(dots, q, k, h, H, SCALE, SCORE, FIRST_KEY, DIAGONAL)
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            norm = norm * shrink + tl.sum(p, 1)
            value = _load(v_ptr, k_rows, v_t, length, D, BLOCK_D, DIAGONAL)
            p = p.to(value.dtype)
            acc = tl.dot(p, value, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
            m = m_new

    alive = (rows < length) & (norm > 0.0)
    out = tl.where(alive[:, None], acc / tl.where(alive, norm, 1.0)[:, None], 0.0)
    _store(out_ptr + b * out_b + h * out_h, rows, out_t, T, out, D, BLOCK_D)
    # Plus infinity makes every p of the backward 0 in a row that saw nothing.
    lse = tl.where(alive, m + tl.log2(tl.where(alive, norm, 1.0)), float("inf"))
    tl.store(lse_ptr + (b * H + h) * T + rows, lse, mask=rows < T)


@jit
def _d_scores(
    p,
    dp,
    delta,
    dots,
    q,
    k,
    head,
    H,
    SCALE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Gradient of the scores s from that of the probabilities, dp."""
    ds = p * (dp - delta)
    if DERIVATIVE is not None:
        seen = _seen(q, k, FIRST_KEY, DIAGONAL)
        ds = ds * DERIVATIVE(dots * SCALE, q, seen, head, H)
    return ds


@jit
def d_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    d_out_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    lengths,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    out_b,
    out_h,
    out_t,
    d_out_b,
    d_out_h,
    d_out_t,
    dq_b,
    dq_h,
    dq_t,
    H,
    T,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq of one query tile, and its delta = rowsum(dout out), which the next kernel reads."""
    tl.static_assert(BLOCK_Q % BLOCK_K == 0, "the diagonal must begin at a tile of keys")
    q_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    length = _length(lengths, b, T)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h

    rows = q_start + tl.arange(0, BLOCK_Q)
    query = _load(q_ptr + b * q_b + h * q_h, rows, q_t, length, D, BLOCK_D, True)
    out = _load(out_ptr + b * out_b + h * out_h, rows, out_t, length, D, BLOCK_D, True)
    d_out = _load(d_out_ptr + b * d_out_b + h * d_out_h, rows, d_out_t, length, D, BLOCK_D, True)
    delta = tl.sum(out.to(ACC) * d_out.to(ACC), 1)
    per_row = (b * H + h) * T + rows
    tl.store(delta_ptr + per_row, delta, mask=rows < T)
    lse = tl.load(lse_ptr + per_row, mask=rows < length, other=float("inf"))

    dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    for DIAGONAL in tl.static_range(2):  # the tiles left of the diagonal, then those on it
        if DIAGONAL:
            begin, end = q_start, tl.minimum(q_start + BLOCK_Q, length)
        else:
            begin, end = _first(q_start, FIRST_KEY, BLOCK_K), tl.where(q_start < length, q_start, 0)
        for start in range(begin, end, BLOCK_K):
            k_rows = start + tl.arange(0, BLOCK_K)
            key = _load(k_ptr, k_rows, k_t, length, D, BLOCK_D, DIAGONAL)  # (BLOCK_K, BLOCK_D)
            value = _load(v_ptr, k_rows, v_t, length, D, BLOCK_D, DIAGONAL)
            # (BLOCK_Q, BLOCK_K)
            dots = tl.dot(query, tl.trans(key), input_precision="ieee", out_dtype=ACC)
            q, k = rows[:, None], k_rows[None, :]
            s = _scores(dots, q, k, h, H, SCALE, SCORE, FIRST_KEY, DIAGONAL)
            p = tl.exp2(s - lse[:, None])
            dp = tl.dot(d_out, tl.trans(value), input_precision="ieee", out_dtype=ACC)
            d = delta[:, None]
            ds = _d_scores(p, dp, d, dots, q, k, h, H, SCALE, DERIVATIVE, FIRST_KEY, DIAGONAL)
            dq = tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee", out_dtype=ACC)
    _store(dq_ptr + b * dq_b + h * dq_h, rows, dq_t, T, dq * SCALE, D, BLOCK_D)


@jit
def d_key_value_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    lengths,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    d_out_b,
    d_out_h,
    d_out_t,
    dk_b,
    dk_h,
    dk_t,
    dv_b,
    dv_h,
    dv_t,
    H,
    T,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    LAST_QUERY: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dk and dv of one key tile, from the queries on its diagonal and then those below."""
    tl.static_assert(BLOCK_K % BLOCK_Q == 0, "the diagonal must end at a tile of queries")
    k_start = tl.program_id(0) * BLOCK_K
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    length = _length(lengths, b, T)
    q_ptr += b * q_b + h * q_h
    d_out_ptr += b * d_out_b + h * d_out_h
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T

    rows = k_start + tl.arange(0, BLOCK_K)
    key = _load(k_ptr + b * k_b + h * k_h, rows, k_t, length, D, BLOCK_D, True)
    value = _load(v_ptr + b * v_b + h * v_h, rows, v_t, length, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    last = length
    if LAST_QUERY is not None:
        last = tl.minimum(length, LAST_QUERY(k_start + BLOCK_K - 1) + 1)
    full = k_start + BLOCK_K  # from here on every query sees the whole key tile
    for FULL in tl.static_range(2):  # the tiles on the diagonal, then those below it
        if FULL:
            begin, end = full, last
        else:
            begin, end = k_start, tl.minimum(full, last)
        for start in range(begin, end, BLOCK_Q):
            q_rows = start + tl.arange(0, BLOCK_Q)
            query = _load(q_ptr, q_rows, q_t, length, D, BLOCK_D, True)  # (BLOCK_Q, BLOCK_D)
            d_out = _load(d_out_ptr, q_rows, d_out_t, length, D, BLOCK_D, True)
            lse = tl.load(lse_ptr + q_rows, mask=q_rows < length, other=float("inf"))
            delta = tl.load(delta_ptr + q_rows, mask=q_rows < length, other=0.0)
            # (BLOCK_K, BLOCK_Q): tiles are transposed, keys down, so p^T comes for free
            dots = tl.dot(key, tl.trans(query), input_precision="ieee", out_dtype=ACC)
            q, k = q_rows[None, :], rows[:, None]
            s = _scores(dots, q, k, h, H, SCALE, SCORE, FIRST_KEY, FULL == 0)
            p = tl.exp2(s - lse[None, :])
            dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee", out_dtype=ACC)
            dp = tl.dot(value, tl.trans(d_out), input_precision="ieee", out_dtype=ACC)
            d = delta[None, :]
            ds = _d_scores(p, dp, d, dots, q, k, h, H, SCALE, DERIVATIVE, FIRST_KEY, FULL == 0)
            dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee", out_dtype=ACC)
    _store(dk_ptr + b * dk_b + h * dk_h, rows, dk_t, T, dk * SCALE, D, BLOCK_D)
    _store(dv_ptr + b * dv_b + h * dv_h, rows, dv_t, T, dv, D, BLOCK_D)


# ---- Triton: launches


def _token_major(q: Tensor) -> Tensor:
    """An empty (B, H, T, D) tensor whose memory is (B, T, H, D)."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, head and token of each (B, H, T, D) tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants(q: Tensor, mod: ScoreMod) -> dict[str, Any]:
    """Arguments of all three kernels that are compiled into them."""
    D = q.shape[-1]
    sizes = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D))}
    functions = {"SCORE": mod.score, "FIRST_KEY": mod.first_key}
    return {"SCALE": 1 / math.sqrt(D), "ACC": accumulator(q.dtype)[1]} | functions | sizes


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str
) -> tuple[Tensor, Tensor]:
    """out (B, H, T, D) and L (B, H, T), in units of log 2."""
    B, H, T, _ = q.shape
    out, lse = _token_major(q), q.new_empty(B, H, T, dtype=accumulator(q.dtype)[0])
    tile = _tiles(q)[0]
    grid = triton.cdiv(T, tile["BLOCK_Q"]), B * H
    tensors, strides = (q, k, v, out, lse, lengths), _strides(q, k, v, out)
    constants = _constants(q, find(score_mod))
    launch(forward_kernel, grid, *tensors, *strides, H, T, **constants, **tile)
    return out, lse


def triton_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    score_mod: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the gradient of `out`, which may have any strides."""
    B, H, T, _ = q.shape
    mod = find(score_mod)
    size = None
    if q.dtype == torch.float16:  # dout v^T, rounded, must neither overflow nor vanish
        d_out, size = scaled(d_out)
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    dq, dk, dv, delta = _token_major(q), _token_major(q), _token_major(q), torch.empty_like(lse)
    _, query_tile, key_tile = _tiles(q)
    constants = _constants(q, mod) | {"DERIVATIVE": mod.derivative}

    # dq first, because it writes delta
    grid = triton.cdiv(T, query_tile["BLOCK_Q"]), B * H
    tensors = q, k, v, out, d_out, dq, lse, delta, lengths
    strides = _strides(q, k, v, out, d_out, dq)
    launch(d_query_kernel, grid, *tensors, *strides, H, T, **constants, **query_tile)

    grid = triton.cdiv(T, key_tile["BLOCK_K"]), B * H
    tensors = q, k, v, d_out, dk, dv, lse, delta, lengths
    strides = _strides(q, k, v, d_out, dk, dv)
    constants |= {"LAST_QUERY": mod.last_query}
    launch(d_key_value_kernel, grid, *tensors, *strides, H, T, **constants, **key_tile)
    return (dq, dk, dv) if size is None else (dq.mul_(size), dk.mul_(size), dv.mul_(size))


# ---- torch.compile sees two opaque operators: what they return (fake) and how they differentiate

_forward_op = torch.library.custom_op(
    "kernels::attention",
    triton_forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? lengths, str score_mod) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "kernels::attention_backward",
    triton_backward,
    mutates_args=(),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? lengths,"
    " str score_mod) -> (Tensor, Tensor, Tensor)",
)


@fake(_forward_op, triton_forward)
def _(q, k, v, lengths, score_mod):
    return _token_major(q), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype)[0])


@fake(_backward_op, triton_backward)
def _(d_out, q, k, v, out, lse, lengths, score_mod):
    return _token_major(q), _token_major(q), _token_major(q)


def _save(ctx, inputs, output) -> None:
    q, k, v, lengths, score_mod = inputs
    ctx.save_for_backward(q, k, v, *output, lengths)
    ctx.score_mod = score_mod


def _backward(ctx, d_out: Tensor, d_lse: Tensor | None):
    q, k, v, out, lse, lengths = ctx.saved_tensors
    return *_backward_op(d_out, q, k, v, out, lse, lengths, ctx.score_mod), None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str
) -> Tensor:
    """The kernels above."""
    return _forward_op(q, k, v, lengths, score_mod)[0]


IMPLS = {"torch": attention_torch, "triton": Impl(attention_triton, needs_triton=True)}


# ---- the public function


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    score_mod: str = "causal",
    impl: str = "auto",
) -> Tensor:
    """Causal attention, softmax(q k^T / sqrt(D)) v over the keys at or before each query.

    q, k, v    (B, H, T, D), one floating dtype, last stride 1; D up to 128 for Triton. Other
               strides are free, 0 among them: one head of keys may serve all
    lengths    (B,) int32, tokens in each right-padded row; None: all T. Rows t >= lengths[b] of the
               result are 0 and pass no gradient; input values there do not matter, not even NaN
    score_mod  an entry of SCORE_MODS: "causal", or one that changes scores or hides more keys; or
               one with a number, such as "window:256"
    impl       "auto": Triton on CUDA, torch elsewhere; an entry of IMPLS; "operation=entry"

    Returns (B, H, T, D) in the inputs' dtype, differentiable in q, k and v; its memory is laid out
    (B, T, H, D), so that `.transpose(1, 2).flatten(2)` is a view. Raises ValueError naming the
    argument, its value and the remedy.
    """
    _check(q, k, v, lengths, score_mod)
    if lengths is not None:
        lengths = lengths.contiguous()  # kernels read it without a stride
    return choose(impl, "attention", IMPLS, q)(q, k, v, lengths, score_mod)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str) -> None:
    check_score_mod(score_mod)
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, H, T, D)")
    if q.shape[-1] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected a head size of at least 1")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but q has {tuple(q.shape)}; expected the same"
            )
    check_floats(q=q, k=k, v=v)
    if lengths is not None:
        check_lengths(lengths, q.shape[0], q.shape[2], q.device)


# ---- check and benchmark

# (B, H, T, D, lengths, score_mod, level of the scores): one token; tiles that end early; padded
# head sizes; rows and heads of unequal strides, and of stride 0; ragged and empty rows; scores so
# low that a running maximum which starts at 0 loses them; each mod at over twice its window
CASES = [
    (1, 1, 1, 16, None, "causal", 0.0),
    (2, 2, 160, 16, [160, 144], "probe", 0.0),
    (2, 1, 65, 16, [65, 20], "causal", 0.0),
    (1, 1, 65, 16, None, "causal", -120.0),
    (3, 1, 129, 80, [129, 0, 63], "causal", 0.0),
    (1, 1, 200, 64, None, "causal", 0.0),
    (2, 3, 70, 24, [70, 33], "causal", 0.0),
    *(
        (1, 2, min(1024, max(140, 2 * reach(name) + 12)), 16, [133], name, 0.0)
        for name in [*SCORE_MODS, "window:33"]
        if name != "causal"
    ),
]


def make_case(
    B: int,
    H: int,
    T: int,
    D: int,
    lengths: list[int] | None,
    level: float,
    dtype: torch.dtype,
    device: str,
) -> tuple:
    """q, k, v and the output's gradient, all of different strides and offsets, and lengths, which
    are strided, too; NaN lies past the rows' ends and between the rows.

    Three heads share one head of keys and values, by a stride of 0, and their gradient is one
    number, as that of a sum.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    heads = 1 if H == 3 else H
    q = with_gaps(random(B, T, H, D)).transpose(1, 2)
    k = with_gaps(random(B, heads, T, D), 4)
    v = with_gaps(random(T, B, heads, D), 5).permute(1, 2, 0, 3)
    grad = with_gaps(random(B, H, T, D), 6)
    if H == 1:
        grad = random(H, B, D, T).permute(1, 0, 3, 2)  # last stride is not 1
    if level:
        q[..., 0], k[..., 0] = math.sqrt(-level) * D**0.25, -math.sqrt(-level) * D**0.25
    if lengths is not None:
        for x in (q, k, v, grad):
            for b, n in enumerate(lengths):
                x[b, :, n:] = float("nan")
        lengths = with_other_column(torch.tensor(lengths, dtype=torch.int32, device=device))
    if H == 3:
        k, v, grad = k.expand_as(q), v.expand_as(q), random(1).expand_as(q)
    return q, k, v, grad, lengths


def verify(impl: str, dtype: torch.dtype, device: str, case: int | None = None) -> float:
    """Compare output and gradients with the reference in float64, on one of CASES or on all; check
    that the fields of each score mod agree. Returns the largest error; raises what is wrong."""
    if not case:  # all, or the first
        for name in dict.fromkeys([*SCORE_MODS, *(score_mod for *_, score_mod, _ in CASES)]):
            check_fields(name)
    return run_cases(CASES, partial(_check_case, impl, dtype, device), case)


def _check_case(impl: str, dtype: torch.dtype, device: str, case: tuple) -> float:
    *shape, row_lengths, score_mod, level = case
    q, k, v, grad, lengths = make_case(*shape, row_lengths, level, dtype, device)
    # scores are rounded in proportion to their size, and so is everything after the exponential
    tolerance = min(0.05, TOLERANCE[dtype] * (1 - level))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with guarded() as seen:
        out = attention(*inputs, lengths, score_mod=score_mod, impl=impl)
        out.backward(grad)
    exact = [x.detach().double().nan_to_num().requires_grad_() for x in (q, k, v)]
    expected = reference(*exact, lengths, score_mod)
    expected.backward(grad.double().nan_to_num())
    what = f"attention {impl} {shape} {row_lengths} {score_mod} level {level}"
    worst = compare_all(
        (f"{what}: {name}", a, e, tolerance)
        for name, a, e in zip(
            ("out", "dq", "dk", "dv"),
            (out, *(x.grad for x in inputs)),
            (expected, *(x.grad for x in exact)),
            strict=True,
        )
    )
    if impl == "triton" and seen.visits:  # no tile is visited in vain
        products = zip(("forward", "d_query", "d_key_value"), (2, 3, 4), _tiles(q), strict=True)
        for kernel, each, tile in products:
            tiles = shape[1] * visible_tiles(shape[2], row_lengths, score_mod, tile)
            found = seen.dots[f"{kernel}_kernel"]
            expect_count(f"{what}: products of {kernel}", found, each * tiles)
    return worst


def visible_tiles(T: int, lengths: list[int] | None, score_mod: str, tile: dict[str, int]) -> int:
    """Tiles, over all rows and one head, in which at least one query sees a key."""
    index, total = torch.arange(T), 0
    visible = find(score_mod).torch_visible(index[:, None], index)
    for n in [T] if lengths is None else lengths:
        if n:
            size = tile["BLOCK_Q"], tile["BLOCK_K"]
            total += int(F.max_pool2d(visible[None, :n, :n].float(), size, ceil_mode=True).sum())
    return total


if __name__ == "__main__":
    from kernels.watch import attention_case  # only here: nothing else needs it

    main(IMPLS, verify, CASES, watch=lambda: attention_case(attention))
    benchmark("flash_attention", partial(attention_rows, attention, IMPLS))
