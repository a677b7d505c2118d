"""A running maximum: log of a sum of exponentials of a row that is longer than a tile.

    L = log sum_j exp(x_j)

Tile after tile, m is the largest x so far and s the sum of exp(x - m) so far:

    m' = max(m, max_j x_j),    s' = s exp(m - m') + sum_j exp(x_j - m'),    in the end L = m + log s

Both sums run over the tile's x. Fill in m_new (m') and s (s').
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.runtime import jit, launch, tl


@jit
def log_sum_exp_kernel(X, OUT, N, BLOCK: tl.constexpr):
    """X is (rows, N), OUT is (rows,)."""
    row = tl.program_id(0)
    m, s = -1e30, 0.0  # lower than any x, but finite: exp(-inf + inf) is not a number
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * N + column, mask=column < N, other=float("-inf"))
        m_new = ...
        s = ...
        m = m_new
    tl.store(OUT + row, m + tl.log(s))


def log_sum_exp(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0])
    launch(log_sum_exp_kernel, out.shape, x, out, x.shape[1], BLOCK=16)
    return out


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, found, expected in float64)."""
    for rows, N, level in ((1, 1, 0), (3, 16, 0), (5, 70, 0), (4, 100, 200), (4, 100, -200)):
        x = torch.randn(rows, N) * 5 + level
        yield f"{rows} x {N} at {level}", log_sum_exp(x), x.double().logsumexp(1)
    x = torch.arange(64.0)[None] * 4  # every tile has a larger maximum than the one before
    yield "rising", log_sum_exp(x), x.double().logsumexp(1)
