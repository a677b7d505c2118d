"""Delta: the backward of attention's softmax, without a second pass over a row of scores.

    out_i = sum_j p_ij v_j,    p_i = softmax(s_i),    dp_ij = dout_i . v_j
    ds_ij = p_ij (dp_ij - delta_i),    delta_i = sum_j p_ij dp_ij

The sum runs over all keys of row i, but only a tile of them is at hand. Exchange the two sums in
it: delta_i = dout_i . (sum_j p_ij v_j), and what stands in the brackets is known. Fill in delta and
ds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.runtime import jit, launch, tl, triton


@jit
def read(X, rows, T, D: tl.constexpr):
    """Rows of X, a (T, D) tensor; zeros from row T on."""
    pointers = X + rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=rows[:, None] < T, other=0.0)


@jit
def d_scores_kernel(P, V, OUT, D_OUT, DS, T, D: tl.constexpr, BLOCK: tl.constexpr):
    """P and DS are (T, T), the others (T, D)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out, d_out = read(OUT, i, T, D), read(D_OUT, i, T, D)  # (BLOCK, D)
    delta = ...  # (BLOCK,)
    for start in range(0, T, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = (i[:, None] < T) & (j[None, :] < T)
        p = tl.load(P + i[:, None] * T + j[None, :], mask=inside, other=0.0)  # (BLOCK, BLOCK)
        dp = tl.dot(d_out, tl.trans(read(V, j, T, D)), input_precision="ieee")
        ds = ...
        tl.store(DS + i[:, None] * T + j[None, :], ds, mask=inside)


def d_scores(p: Tensor, v: Tensor, out: Tensor, d_out: Tensor) -> Tensor:
    T, D = v.shape
    ds = torch.empty_like(p)
    launch(d_scores_kernel, (triton.cdiv(T, 16),), p, v, out, d_out, ds, T, D=D, BLOCK=16)
    return ds


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, found, expected in float64, by autograd)."""
    for T in (1, 16, 40):
        v, d_out = torch.randn(2, T, 16).unbind(0)
        s = torch.randn(T, T, dtype=torch.float64, requires_grad=True)
        p = s.softmax(1)
        out = p @ v.double()
        (expected,) = torch.autograd.grad(out, s, d_out.double())
        yield (
            f"ds of {T} tokens",
            d_scores(p.detach().float(), v, out.detach().float(), d_out),
            expected,
        )
