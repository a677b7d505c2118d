"""A diagonal mask: causal attention in which a query sees itself and the W - 1 keys before it.

    out_i = sum_j p_ij v_j,    p_i = softmax over the visible j of  q_i . k_j / sqrt(D)
    query i sees key j if  i - W < j <= i

A program has a tile of queries, and all keys in one tile. Index tiles broadcast as tensors do:
q[:, None] goes down, k[None, :] across. Fill in visible, a (BLOCK, KEYS) tile of booleans.
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
def window_kernel(
    Q, K, V, OUT, T, W, scale, D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr
):
    """All are (T, D)."""
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # indices of queries and of keys
    k = tl.arange(0, KEYS)
    s = tl.dot(read(Q, q, T, D), tl.trans(read(K, k, T, D)), input_precision="ieee") * scale
    visible = ...
    s = tl.where(visible, s, -1e30)
    e = tl.where(visible, tl.exp(s - tl.max(s, 1)[:, None]), 0.0)
    out = tl.dot(e, read(V, k, T, D), input_precision="ieee") / tl.sum(e, 1)[:, None]
    tl.store(OUT + q[:, None] * D + tl.arange(0, D)[None, :], out, mask=q[:, None] < T)


def window_attention(q: Tensor, k: Tensor, v: Tensor, W: int) -> Tensor:
    (T, D), out = q.shape, torch.empty_like(q)
    keys = max(16, triton.next_power_of_2(2 * T))
    grid = (triton.cdiv(T, 16),)
    launch(window_kernel, grid, q, k, v, out, T, W, D**-0.5, D=D, BLOCK=16, KEYS=keys)
    return out


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, found, expected in float64)."""
    for T, W in ((1, 1), (16, 16), (70, 1), (70, 20), (70, 200)):
        q, k, v = torch.randn(3, T, 16).unbind(0)
        i = torch.arange(T)
        hidden = (i[None] > i[:, None]) | (i[None] <= i[:, None] - W)
        s = (q.double() @ k.double().T / 4).masked_fill(hidden, float("-inf"))
        yield f"{T} tokens, window {W}", window_attention(q, k, v, W), s.softmax(1) @ v.double()
