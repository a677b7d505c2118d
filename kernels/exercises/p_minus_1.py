"""p - 1 in 16 bits: the gradient of a token's log-prob, for a model that is sure of it.

    dz_v = p_v - 1[v = y],    p_v = exp(z_v - L)

dz goes to a matrix product in float16, so it must be rounded at some point. Where p_y is 0.9999 the
gradient is -0.0001. Fill in dz, a float16 tile, from p (float32), half (p in float16, as a product
would want it) and hit (1 in the target's column, else 0): which of them, and rounded when?
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.runtime import jit, launch, tl, triton


@jit
def d_logits_kernel(Z, L, Y, DZ, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Z and DZ are (N, V); L, the log of each row's sum of exponentials, and Y are (N,)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.arange(0, BLOCK_V)
    inside = (n[:, None] < N) & (v[None, :] < V)
    z = tl.load(Z + n[:, None] * V + v[None, :], mask=inside, other=0.0)
    p = tl.exp(z - tl.load(L + n, mask=n < N, other=0.0)[:, None])
    half = p.to(tl.float16)
    hit = tl.where(v[None, :] == tl.load(Y + n, mask=n < N, other=-1)[:, None], 1.0, 0.0)
    dz = ...
    tl.static_assert(dz.dtype == tl.float16, "dz must be float16")
    tl.store(DZ + n[:, None] * V + v[None, :], dz, mask=inside)


def d_logits(z: Tensor, y: Tensor) -> Tensor:
    (N, V), out = z.shape, torch.empty_like(z, dtype=torch.float16)
    block = triton.next_power_of_2(V)
    tensors = z, z.logsumexp(1), y, out
    launch(d_logits_kernel, (triton.cdiv(N, 16),), *tensors, N, V, BLOCK_N=16, BLOCK_V=block)
    return out


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, found, expected in float64)."""
    for N, V, sure in ((1, 2, 0.0), (20, 50, 0.0), (20, 50, 10.0), (5, 3, 8.0)):
        z, y = torch.randn(N, V), torch.arange(N) % V
        z[torch.arange(N), y] += sure
        expected = z.double().softmax(1)
        expected[torch.arange(N), y] -= 1
        yield f"{N} tokens, target {sure} above the others", d_logits(z, y), expected
