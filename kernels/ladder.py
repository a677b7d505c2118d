"""Attention in seven rungs, from three lines of torch to the design of the shipped kernels.

Each rung is a whole implementation of causal attention, forward and backward, that adds one idea to
the rung before it. `diff` two neighbours and the idea is what remains.

    out_i = sum_j p_ij v_j,    p_ij = exp(s_ij - L_i),    L_i = log sum_j exp(s_ij),
    s_ij = q_i . k_j / sqrt(D),    j <= i < length

Counted by kernels/watch.py for one row of T = 1024 tokens (full, then with a length of 512), one
head of size D = 64, float16. Tiles: how many 64 x 64 tiles of scores are computed. MB: requested by
loads and stores; a torch operation counts its inputs and its result once. Products: millions of
multiplications in matrix products. Largest: MB of the largest tensor that is made on the way.

                           |        1024, forward          |     512      |      1024, backward
  rung               lines |tiles      MB products largest |tiles      MB |      MB products largest
  0 torch                4 |    -   52.17    134.2    4.19 |    -   53.24 |   52.04    268.4    4.19
  1 scores in memory    39 |  256   23.20    134.2    4.19 |  256   24.27 |  104.20    402.7    4.19
  2 online softmax      25 |  256    4.46    134.2    0.13 |  256    5.53 |  104.20    402.7    4.19
  3 to the diagonal     26 |  136    2.49     71.3    0.13 |  136    3.56 |  104.20    402.7    4.19
  4 lengths             31 |  136    2.49     71.3    0.13 |   36    0.79 |  104.20    402.7    4.19
  5 backward: dq        32 |  136    2.49     71.3    0.13 |   36    0.79 |  103.56    442.5    4.19
  6 backward: dk, dv    29 |  136    2.49     71.3    0.13 |   36    0.79 |    9.13    249.6    0.26
  shipped                  |  136    2.49     71.3    0.13 |   36    0.79 |    7.29    249.6    0.13

Rungs 1 to 4 have no backward of their own: theirs is that of rung 0, with the scores in memory. The
backward of a rung that has one reads q, k and v again and computes the scores again, which costs
products and saves memory: everything of size T x T is gone. The last row is flash_attention.py,
which has the tiles of the interpreter here (64 x 32; a GPU's 128 x 64 asks for 1.45 MB, not 2.49),
and beyond the ladder: any strides, any head size without a copy, score mods, powers of 2, separate
loops for tiles that need no mask, programs in the order of their length, torch.compile, and
gradients scaled in float16, so that none overflows or vanishes (1.71 MB of its backward).

Words of Triton, each explained where it is first used: program, tile, stride, constexpr, mask
(`read`), dot (`scores_kernel`). In kernels, capitals point to tensors in memory or are sizes; small
letters are tiles in registers. Grid: the programs of a launch; (query tiles, heads) in most rungs.

Run: python -m kernels.ladder             verify every rung, print the table (on a GPU: and times)
     python -m kernels.ladder --rung 3    one rung
The rungs of the log-probabilities are in ladder_logprob.py. No rung is an entry of IMPLS: a script
should offer what one would train with.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    # Read when Triton is imported, so before the next line.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import flash_attention
from kernels.climb import Count, Rung, check_type, climb, count, entered, forward_and_backward
from kernels.runtime import jit, launch, tl, triton

BLOCK = 64  # rows of a tile of queries and of a tile of keys

# ---- rung 0


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: all T x T scores, their softmax, the weighted sum of the values.

        p = softmax(q k^T / sqrt(D) + mask),    out = p v

    Four passes over T x T numbers in memory (write s, mask it, softmax, read p), half of which are
    masked away, while inputs and output have only T x D. Autograd keeps p for the backward.
    """
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    s = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    return s.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype) @ v


# ---- what all Triton rungs share: reading and writing a tile


@jit
def read(X, rows, end, T, D: tl.constexpr):
    """Rows of this program's head of X, a (heads, T, D) tensor: a (rows, D) tile; 0 from `end` on.

    A *program* is one of the many copies of a kernel that run at once. tl.program_id tells them
    apart: here axis 0 is the tile and axis 1 the head. A *tile* is a block of numbers in the
    program's registers; its sides are powers of 2. A tile is loaded from a tile of addresses, which
    broadcasting makes: X + row * stride + column, where the *stride* of a dimension is the number
    of elements from one index to the next (D for rows, 1 for columns, T D for heads).

    *constexpr* arguments are known when the kernel is compiled, as the sides of tiles must be.
    A *mask* says which elements are loaded. The others get `other`, and their addresses are not
    touched: without it, the last tile would read what lies behind the tensor.
    """
    row = tl.program_id(1).to(tl.int64) * T + rows  # 64 bits: 32 overflow at 2^31 elements
    return tl.load(
        X + row[:, None] * D + tl.arange(0, D)[None, :], mask=rows[:, None] < end, other=0.0
    )


@jit
def write(X, rows, T, tile, D: tl.constexpr):
    """The opposite of `read`, in the type of X."""
    row = tl.program_id(1).to(tl.int64) * T + rows
    pointers = X + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(pointers, tile.to(X.dtype.element_ty), mask=rows[:, None] < T)


def padded(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors whose last dimension is a power of 2, at least 16 (as tl.dot wants); the
    added zeros change no product."""
    D = tensors[0].shape[-1]
    more = max(16, triton.next_power_of_2(D)) - D
    return [(F.pad(x, (0, more)) if more else x).contiguous() for x in tensors]


def start(kernel: Any, D: int, q: Tensor, *tensors: Tensor, key_tiles: bool = False) -> None:
    """Launch one program a tile of queries (and a tile of keys, if `key_tiles`) of every head.

    `D` is the head size before padding, for the scale of the scores.
    """
    B, H, T, padded_D = q.shape
    block = 32 if q.is_cuda and q.dtype == torch.float32 else BLOCK  # what registers have room for
    tiles = triton.cdiv(T, block)
    grid = tiles, B * H, tiles if key_tiles else 1
    launch(kernel, grid, q, *tensors, T, D**-0.5, D=padded_D, BLOCK=block, num_stages=1)


# ---- rung 1


@jit
def scores_kernel(Q, K, S, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of the scores; program (i, head, j) has query tile i and key tile j.

    A *dot* is the matrix product of two tiles, done by the matrix units, with sums in float32.
    "ieee" keeps float32 inputs whole; the default would round them to 10 bits (tf32).
    """
    q_rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k_rows = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    q, k = read(Q, q_rows, T, T, D), read(K, k_rows, T, T, D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK, BLOCK)
    s = tl.where(k_rows[None, :] <= q_rows[:, None], s, float("-inf"))
    row = tl.program_id(1).to(tl.int64) * T + q_rows
    inside = (q_rows[:, None] < T) & (k_rows[None, :] < T)
    tl.store(S + row[:, None] * T + k_rows[None, :], s, mask=inside)


@jit
def softmax_kernel(S, T, BLOCK_T: tl.constexpr):
    """Softmax of four rows, in place: a tile holds whole rows."""
    rows, k = tl.program_id(0) * 4 + tl.arange(0, 4), tl.arange(0, BLOCK_T)
    pointers = S + (tl.program_id(1).to(tl.int64) * T + rows[:, None]) * T + k[None, :]
    inside = (rows[:, None] < T) & (k[None, :] < T)
    s = tl.load(pointers, mask=inside, other=-1e30)
    e = tl.exp(s - tl.max(s, 1)[:, None])  # at most 1: exp of a score of 100 would overflow
    tl.store(pointers, e / tl.sum(e, 1)[:, None], mask=inside)


@jit
def values_kernel(V, P, OUT, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """out = p v for one tile of queries, a tile of keys at a time."""
    q_rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64) * T + q_rows
    acc = tl.zeros((BLOCK, D), tl.float32)
    for begin in range(0, T, BLOCK):
        k_rows = begin + tl.arange(0, BLOCK)
        inside = (q_rows[:, None] < T) & (k_rows[None, :] < T)
        p = tl.load(P + row[:, None] * T + k_rows[None, :], mask=inside, other=0.0)
        v = read(V, k_rows, T, T, D)
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    write(OUT, q_rows, T, acc, D)


def scores_in_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition again, as three kernels: the first Triton, no new mathematics.

    Adds: tiles. Saves: the masking is done where the scores are made, so s is written once, read
    and written by the softmax, read for the output. The T x T matrix is still there.
    """
    D, T = q.shape[-1], q.shape[2]
    q, k, v = padded(q, k, v)
    s, out = q.new_empty(*q.shape[:3], T, dtype=torch.float32), torch.empty_like(q)
    start(scores_kernel, D, q, k, s, key_tiles=True)
    grid = triton.cdiv(T, 4), q.shape[0] * q.shape[1]
    launch(softmax_kernel, grid, s, T, BLOCK_T=triton.next_power_of_2(T))
    start(values_kernel, D, v, s, out)
    return out[..., :D]


# ---- rung 2


@jit
def online_kernel(Q, K, V, OUT, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of queries over all keys; m, norm and acc are all that is kept of earlier tiles."""
    q_rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = read(Q, q_rows, T, T, D)
    m = tl.full((BLOCK,), -1e30, tl.float32)  # finite: -inf would give inf - inf below
    norm = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    for begin in range(0, T, BLOCK):
        k_rows = begin + tl.arange(0, BLOCK)
        k, v = read(K, k_rows, T, T, D), read(V, k_rows, T, T, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(k_rows[None, :] <= q_rows[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - m_new[:, None])
        shrink = tl.exp(m - m_new)
        norm = norm * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    write(OUT, q_rows, T, acc / norm[:, None], D)


def online_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax needs its row's maximum and sum, but not the row: both can be kept up to date.

        m' = max(m, max_j s_j),   norm' = e^(m - m') norm + sum_j e^(s_j - m'),
        acc' = e^(m - m') acc + sum_j e^(s_j - m') v_j,   and at the end out = acc / norm

    Adds: the running maximum. Saves: the scores never leave the registers, so nothing of size T x T
    is written. What is left is k and v, read once for every tile of queries.
    """
    D = q.shape[-1]
    q, k, v = padded(q, k, v)
    out = torch.empty_like(q)
    start(online_kernel, D, q, k, v, out)
    return out[..., :D]


# ---- rung 3


@jit
def diagonal_kernel(Q, K, V, OUT, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rung 2's, but the loop ends with the tile on the diagonal."""
    q_start = tl.program_id(0) * BLOCK
    q_rows = q_start + tl.arange(0, BLOCK)
    q = read(Q, q_rows, T, T, D)
    m = tl.full((BLOCK,), -1e30, tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    for begin in range(0, q_start + BLOCK, BLOCK):
        k_rows = begin + tl.arange(0, BLOCK)
        k, v = read(K, k_rows, T, T, D), read(V, k_rows, T, T, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(k_rows[None, :] <= q_rows[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - m_new[:, None])
        shrink = tl.exp(m - m_new)
        norm = norm * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    write(OUT, q_rows, T, acc / norm[:, None], D)


def stop_at_the_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A tile of keys behind its queries has no visible pair, so nobody need read it.

    Of n x n tiles, n (n + 1) / 2 remain: at n = 16, 136 of 256. Adds: one word, the end of a loop.
    Saves: nearly half of the products and of the reads of k and v.
    """
    D = q.shape[-1]
    q, k, v = padded(q, k, v)
    out = torch.empty_like(q)
    start(diagonal_kernel, D, q, k, v, out)
    return out[..., :D]


# ---- rung 4


@jit
def lengths_kernel(Q, K, V, OUT, LSE, N, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rung 3's up to the row's length N[head]; also L = m + log norm, for rungs 5 and 6."""
    q_start = tl.program_id(0) * BLOCK
    q_rows = q_start + tl.arange(0, BLOCK)
    length = tl.load(N + tl.program_id(1))
    q = read(Q, q_rows, length, T, D)
    m = tl.full((BLOCK,), -1e30, tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    for begin in range(0, tl.where(q_start < length, q_start + BLOCK, 0), BLOCK):
        k_rows = begin + tl.arange(0, BLOCK)
        k, v = read(K, k_rows, length, T, D), read(V, k_rows, length, T, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(k_rows[None, :] <= q_rows[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - m_new[:, None])
        shrink = tl.exp(m - m_new)
        norm = norm * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    alive = q_rows < length
    norm = tl.where(alive, norm, 1.0)
    write(OUT, q_rows, T, tl.where(alive[:, None], acc / norm[:, None], 0.0), D)
    lse = tl.where(alive, m + tl.log(norm), float("inf"))  # exp(s - inf) = 0: no gradient
    tl.store(LSE + tl.program_id(1) * T + q_rows, lse, mask=q_rows < T)


def ragged_rows(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """A batch of rows of different lengths is padded on the right; each program ends at its row's
    end.

    Adds: the length, in the loop's end and in the masks. (The rungs before set what lies past the
    end to zero in a copy, as 0 x NaN is NaN, and compute all of it.) Saves: a row half full costs a
    quarter. Returns out and L (B, H, T).
    """
    (B, H, T, D), n = q.shape, lengths
    q, k, v = padded(q, k, v)
    out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    start(lengths_kernel, D, q, k, v, out, lse, each_head(n, q))
    return out[..., :D], lse


def each_head(lengths: Tensor | None, q: Tensor) -> Tensor:
    """The length of each of B x H heads."""
    B, H, T, _ = q.shape
    if lengths is None:
        return torch.full((B * H,), T, dtype=torch.int32, device=q.device)
    return lengths.repeat_interleave(H)


# ---- rung 5


@jit
def p_and_ds(q, k, v, d_out, lse, delta, q_rows, k_rows, scale):
    """p and the gradient of the scores, for a tile of queries (down) and of keys (across)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s = tl.where(k_rows[None, :] <= q_rows[:, None], s, float("-inf"))
    p = tl.exp(s - lse[:, None])
    dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
    return p.to(q.dtype), (p * (dp - delta[:, None])).to(q.dtype)


@jit
def d_query_kernel(
    Q, K, V, D_OUT, LSE, DELTA, DQ, N, T, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    """dq of one tile of queries: the loop of rung 4, with the gradient in place of the output."""
    q_start = tl.program_id(0) * BLOCK
    q_rows = q_start + tl.arange(0, BLOCK)
    length = tl.load(N + tl.program_id(1))
    q, d_out = read(Q, q_rows, length, T, D), read(D_OUT, q_rows, length, T, D)
    per_row = tl.program_id(1) * T + q_rows
    lse = tl.load(LSE + per_row, mask=q_rows < length, other=float("inf"))
    delta = tl.load(DELTA + per_row, mask=q_rows < length, other=0.0)
    dq = tl.zeros((BLOCK, D), tl.float32)
    for begin in range(0, tl.where(q_start < length, q_start + BLOCK, 0), BLOCK):
        k_rows = begin + tl.arange(0, BLOCK)
        k, v = read(K, k_rows, length, T, D), read(V, k_rows, length, T, D)
        _, ds = p_and_ds(q, k, v, d_out, lse, delta, q_rows, k_rows, scale)
        dq += tl.dot(ds, k, input_precision="ieee")
    write(DQ, q_rows, T, dq * scale, D)


def d_query(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Tensor | None) -> Tensor:
    """The backward need not keep p: from q, k and L it is computed again, a tile at a time.

        dp = d_out v^T,   ds_ij = p_ij (dp_ij - delta_i),   dq = ds k / sqrt(D)

    delta_i = sum_j p_ij dp_ij is a sum over the whole row, of which a program sees one tile at a
    time. But it is also d_out_i . out_i, known before the loop. Adds: recomputing. Saves: the
    T x T matrices behind dq. Those behind dk and dv are still rung 0's, so the table waits for the
    next rung.
    """
    D, (out, lse, lengths) = q.shape[-1], saved
    delta = (d_out.float() * out.float()).sum(-1)
    q, k, v, d_out = padded(q, k, v, d_out)
    dq = torch.empty_like(q)
    start(d_query_kernel, D, q, k, v, d_out, lse, delta, dq, each_head(lengths, q))
    return dq[..., :D]


# ---- rung 6


@jit
def d_key_value_kernel(
    Q, K, V, D_OUT, LSE, DELTA, DK, DV, N, T, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    """dk and dv of one tile of keys, from the queries at and below the diagonal."""
    k_start = tl.program_id(0) * BLOCK
    k_rows = k_start + tl.arange(0, BLOCK)
    length = tl.load(N + tl.program_id(1))
    k, v = read(K, k_rows, length, T, D), read(V, k_rows, length, T, D)
    dk, dv = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    for begin in range(k_start, length, BLOCK):
        q_rows = begin + tl.arange(0, BLOCK)
        q, d_out = read(Q, q_rows, length, T, D), read(D_OUT, q_rows, length, T, D)
        per_row = tl.program_id(1) * T + q_rows
        lse = tl.load(LSE + per_row, mask=q_rows < length, other=float("inf"))
        delta = tl.load(DELTA + per_row, mask=q_rows < length, other=0.0)
        p, ds = p_and_ds(q, k, v, d_out, lse, delta, q_rows, k_rows, scale)
        dv += tl.dot(tl.trans(p), d_out, input_precision="ieee")
        dk += tl.dot(tl.trans(ds), q, input_precision="ieee")
    write(DK, k_rows, T, dk * scale, D)
    write(DV, k_rows, T, dv, D)


def d_key_value(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dk and dv sum over queries, where dq sums over keys: so here a program owns a tile of keys.

        dv = p^T d_out,    dk = ds^T q / sqrt(D)

    If the programs of rung 5 added to dk and dv as well, many would write to one place, by atomic
    operations in an order that changes from run to run. Adds: a second kernel, by columns. It
    computes s and dp once more: 7 products a tile instead of 5. Saves: the last T x T matrix.
    """
    D, (out, lse, lengths) = q.shape[-1], saved
    delta = (d_out.float() * out.float()).sum(-1)
    q, k, v, d_out = padded(q, k, v, d_out)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    start(d_key_value_kernel, D, q, k, v, d_out, lse, delta, dk, dv, each_head(lengths, q))
    return dk[..., :D], dv[..., :D]


# ---- the rungs as implementations of the operation: (q, k, v, lengths, score_mod) -> out


def cut(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, run: Callable) -> Tensor:
    """`run(q, k, v)`, which knows of no lengths: rows are zero from their length on, before and
    after. A causal query inside its row sees no key past the end."""
    if lengths is None:
        return run(q, k, v)
    inside = (torch.arange(q.shape[2], device=q.device) < lengths[:, None])[:, None, :, None]
    q, k, v = (torch.where(inside, x, 0.0) for x in (q, k, v))
    return torch.where(inside, run(q, k, v), 0.0)


def gradients_of_the_definition(
    d_out: Tensor, inputs: tuple[Tensor, ...], lengths: Tensor | None, wanted: slice
) -> tuple[Tensor, ...]:
    """dq, dk and dv, or a slice of these, by autograd through rung 0."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(cut(*inputs, lengths, definition), inputs[wanted], d_out)


class _Attention(torch.autograd.Function):
    """Rung `number` of 1 to 6: a forward from Triton, and what there is of a backward."""

    @staticmethod
    def forward(
        ctx, number: int, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None
    ) -> Tensor:
        ctx.number, lse = number, None
        if number < 4:
            out = (scores_in_memory, online_softmax, stop_at_the_diagonal)[number - 1](q, k, v)
        else:
            out, lse = ragged_rows(q, k, v, lengths)
        ctx.save_for_backward(q, k, v, out, lse, lengths)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse, lengths = ctx.saved_tensors
        by_definition = partial(gradients_of_the_definition, d_out, inputs, lengths)
        if ctx.number < 5:
            dq, dk, dv = by_definition(slice(3))
        else:
            dq = d_query(d_out, *inputs, out, lse, lengths)
            if ctx.number < 6:
                dk, dv = by_definition(slice(1, 3))
            else:
                dk, dv = d_key_value(d_out, *inputs, out, lse, lengths)
        return None, dq, dk, dv, None


def attention_rung(
    number: int, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str
) -> Tensor:
    """The operation by one rung. Raises ValueError for a score mod other than "causal"."""
    if score_mod != "causal":
        raise ValueError(f"score_mod {score_mod!r} is not on the ladder; use 'causal'")
    if number == 0:
        return cut(q, k, v, lengths, definition)
    check_type(q)
    if number < 4:
        return cut(q, k, v, lengths, lambda *qkv: _Attention.apply(number, *qkv, None))
    return _Attention.apply(number, q, k, v, lengths)


_PARTS = {
    "0 torch": (definition,),
    "1 scores in memory": (scores_kernel, softmax_kernel, values_kernel, scores_in_memory),
    "2 online softmax": (online_kernel, online_softmax),
    "3 to the diagonal": (diagonal_kernel, stop_at_the_diagonal),
    "4 lengths": (lengths_kernel, ragged_rows),
    "5 backward: dq": (p_and_ds, d_query_kernel, d_query),
    "6 backward: dk, dv": (d_key_value_kernel, d_key_value),
}
LADDER = {
    name: Rung(partial(attention_rung, number), parts)
    for number, (name, parts) in enumerate(_PARTS.items())
}


# ---- what kernels/climb.py verifies, counts and times


def verify(name: str, dtype: torch.dtype, device: str) -> float:
    """The check of the shipped implementations, its causal cases; the largest error."""
    with entered(flash_attention, name, LADDER[name].run, lambda case: "causal" in case):
        return flash_attention.verify(name, dtype, device)


def counts(run: Callable | None) -> list[Count]:
    """Forward, forward of a row half full, backward; `run` None: of the shipped kernels, called
    directly, as their operators are closed to `Traffic`."""

    def inputs(length: int | None) -> tuple:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 1, 1024, 64).half().requires_grad_(bool(run)) for _ in range(3))
        lengths = None if length is None else torch.tensor([length], dtype=torch.int32)
        return q, k, v, lengths, "causal"

    counted = partial(count, tensors=("K", "k_ptr"), sizes={0: 1, 1: 1, 2: BLOCK})
    outs = []

    def forward(*given: Any) -> None:
        outs.append((run or flash_attention.triton_forward)(*given))

    full, half = (counted(partial(forward, *inputs(length))) for length in (None, 512))
    d_out = torch.randn(1, 1, 1024, 64).half()
    if run:
        return [full, half, counted(lambda: outs[0].backward(d_out))]
    *qkv, lengths, score_mod = inputs(None)
    arguments = d_out, *qkv, *outs[0], lengths, score_mod
    return [full, half, counted(partial(flash_attention.triton_backward, *arguments))]


GROUPS = {"1024, forward": "tmpl", "512": "tm", "1024, backward": "mpl"}


def times(name: str) -> str:
    """Milliseconds of forward and backward on the GPU: 4 rows of 1024 tokens, 12 heads of 64."""
    run = LADDER[name].run if name in LADDER else flash_attention.attention_triton
    shape = {"size": (4, 12, 1024, 64), "device": "cuda", "dtype": torch.bfloat16}
    q, k, v, d_out = (torch.randn(**shape).requires_grad_(i < 3) for i in range(4))
    return forward_and_backward(run, (q, k, v, None, "causal"), d_out)


if __name__ == "__main__":
    climb(sys.modules[__name__], "Attention in seven rungs.")
