"""Log-probabilities of targets in four rungs, from all logits in memory to none.

As in ladder.py (begin there), each rung is a whole implementation that adds one idea. For a token
with hidden state x (C), unembedding w (V, C), temperature tau and target y:

    z_v = x . w_v / tau,   L = log sum_v exp(z_v),   p_v = exp(z_v - L)
    logprob = z_y - L,     entropy = - sum_v p_v log p_v

Counted for N = 256 tokens of C = 64, V = 8192, float32; the columns are those of ladder.py.
Tiles are 32 tokens x 512 entries of the vocabulary.

                           |           forward             |         backward
  rung               lines |tiles      MB products largest |      MB products largest
  0 logits               3 |    -  102.97    134.2    8.39 |  214.18    268.4    8.39
  1 chunks               6 |    -  117.66    134.2    1.05 |  373.51    402.7    2.10
  2 running maximum     34 |  128   17.97    134.2    0.07 |  415.78    402.7    2.10
  3 stretches           35 |  128   18.11    134.2    0.07 |  415.78    402.7    2.10
  shipped                  |  128   17.87    134.2    0.02 |   47.75    402.7    8.39

Rungs 2 and 3 have no backward of their own: theirs goes by chunks, as that of rung 1. The shipped
one (linear_logprob.py) has a kernel for dz, the gradient of the logits, a stretch of the vocabulary
at a time, and library products for dw and dx; its largest tensor is dz, bounded on real sizes.

Run: python -m kernels.ladder_logprob             verify every rung, print the table
     python -m kernels.ladder_logprob --rung 2    one rung
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__" and not torch.cuda.is_available():
    # Read when Triton is imported, so before the next line.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import linear_logprob
from kernels.climb import Count, Rung, check_type, climb, count, entered, forward_and_backward
from kernels.runtime import jit, launch, tl, triton

CHUNK = 32  # tokens whose logits are held at a time
STRETCH = 2048  # entries of the vocabulary that one program walks
TILE = {"BLOCK_N": 32, "BLOCK_V": 512}  # tokens and logits of a tile
GPU_TILE = {"BLOCK_N": 64, "BLOCK_V": 64}  # as a multiprocessor has room for

# ---- rung 0


def logits(x: Tensor, w: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition: all N x V logits, their log-softmax, the target's entry and the entropy.

        log p = log_softmax(x w^T / tau),   logprob = log p_y,   entropy = - sum_v p_v log p_v

    For two numbers a token, V are made, several times over. GPT-2's V is 50257, and 8192 tokens
    have 1.6 GB of float32 logits.
    """
    logp = (x @ w.T / temperature).log_softmax(-1)
    return logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


# ---- rung 1


def chunks(x: Tensor, w: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens do not depend on each other: take some at a time, and forget their logits.

    Autograd would keep the logits of every chunk for the backward. `checkpoint` keeps the inputs
    instead and computes the chunk again. Adds: a loop. Saves: memory, N x V becomes CHUNK x V;
    costs a third product with w. What is moved stays the same.
    """
    parts = [
        checkpoint(logits, x[i : i + CHUNK], w, y[i : i + CHUNK], temperature, use_reentrant=False)
        for i in range(0, max(len(x), 1), CHUNK)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# ---- rung 2


@jit
def logit_tile(X, W, tokens, vocab, N, V, C):
    """x w^T of a tile, (tokens, vocab), in float32 registers, 64 columns at a time."""
    z = tl.zeros((tokens.shape[0], vocab.shape[0]), tl.float32)
    tokens, vocab = tokens[:, None].to(tl.int64), vocab[:, None].to(tl.int64)
    for start in range(0, C, 64):
        c = start + tl.arange(0, 64)[None, :]
        x = tl.load(X + tokens * C + c, mask=tokens < N, other=0.0)
        w = tl.load(W + vocab * C + c, mask=vocab < V, other=0.0)
        z = tl.dot(x, tl.trans(w), z, input_precision="ieee")
    return z


@jit
def maximum_kernel(X, W, Y, OUT, N, V, C, scale, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """log p_y and the entropy of a tile of tokens, over the whole vocabulary."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(Y + tokens, mask=tokens < N, other=-1)
    m = tl.full((BLOCK_N,), -1e30, tl.float32)
    s, t = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    target = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, V, BLOCK_V):
        vocab = begin + tl.arange(0, BLOCK_V)
        z = logit_tile(X, W, tokens, vocab, N, V, C) * scale
        target += tl.sum(tl.where(vocab[None, :] == y[:, None], z, 0.0), 1)
        z = tl.where(vocab[None, :] < V, z, -1e30)
        m_new = tl.maximum(m, tl.max(z, 1))
        z -= m_new[:, None]
        shrink = tl.exp(m - m_new)
        t = shrink * (t + (m - m_new) * s) + tl.sum(z * tl.exp(z), 1)
        s = shrink * s + tl.sum(tl.exp(z), 1)
        m = m_new
    tl.store(OUT + tokens, target - m - tl.log(s), mask=tokens < N)
    tl.store(OUT + N + tokens, tl.log(s) - t / s, mask=tokens < N)


def running_maximum(x: Tensor, w: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """L and the entropy need four numbers a token, which a walk over the vocabulary can update:

        m = max z,   s = sum e^(z - m),   t = sum (z - m) e^(z - m),   z_y
        logprob = z_y - m - log s,   entropy = log s - t / s

    When m grows by g, with a = e^(-g): t becomes a (t - g s), and s becomes a s. Adds: the running
    maximum, as in attention. Saves: no logit is ever written. But there are only as many programs
    as tiles of tokens, too few for a GPU, and each reads all of w.
    """
    out = x.new_empty(2, len(x), dtype=torch.float32)
    run(maximum_kernel, (), x, w, y, out, temperature)
    return out[0], out[1]


def run(kernel: Any, more: tuple, x: Tensor, w: Tensor, y: Tensor, out: Tensor, tau: float) -> None:
    """Launch a program for every tile of tokens, and for every stretch if `more` has its size."""
    tile = GPU_TILE if x.is_cuda else TILE
    (N, C), V = x.shape, len(w)
    grid = triton.cdiv(N, tile["BLOCK_N"]), *(triton.cdiv(V, n) for n in more)
    x, w = (F.pad(a, (0, -C % 64)).contiguous() if C % 64 else a.contiguous() for a in (x, w))
    sizes = N, V, x.shape[1], 1 / tau
    launch(kernel, grid, x, w, y.contiguous(), out, *sizes, *more, **tile, num_stages=1)


# ---- rung 3


@jit
def stretch_kernel(
    X, W, Y, OUT, N, V, C, scale, stretch, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    """m, s, t and z_y of a tile of tokens over one stretch: OUT is (4, stretches, N)."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(Y + tokens, mask=tokens < N, other=-1)
    m = tl.full((BLOCK_N,), -1e30, tl.float32)
    s, t = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    target = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.program_id(1) * stretch
    for begin in range(first, tl.minimum(first + stretch, V), BLOCK_V):
        vocab = begin + tl.arange(0, BLOCK_V)
        z = logit_tile(X, W, tokens, vocab, N, V, C) * scale
        target += tl.sum(tl.where(vocab[None, :] == y[:, None], z, 0.0), 1)
        z = tl.where(vocab[None, :] < V, z, -1e30)
        m_new = tl.maximum(m, tl.max(z, 1))
        z -= m_new[:, None]
        shrink = tl.exp(m - m_new)
        t = shrink * (t + (m - m_new) * s) + tl.sum(z * tl.exp(z), 1)
        s = shrink * s + tl.sum(tl.exp(z), 1)
        m = m_new
    size = tl.num_programs(1) * N
    out = OUT + tl.program_id(1) * N + tokens
    tl.store(out, m, mask=tokens < N)
    tl.store(out + size, s, mask=tokens < N)
    tl.store(out + 2 * size, t, mask=tokens < N)
    tl.store(out + 3 * size, target, mask=tokens < N)


def stretches(x: Tensor, w: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Two sets of logits merge by the rule by which one grows, so programs can share a vocabulary.

        m = max_i m_i,   s = sum_i e^(m_i - m) s_i,   t = sum_i e^(m_i - m) (t_i + (m_i - m) s_i)

    Adds: an axis of the grid. Saves: time on a GPU, which gets V / STRETCH times as many programs;
    programs of one stretch run side by side, so its rows of w stay in the cache.
    """
    parts = x.new_empty(4, triton.cdiv(len(w), STRETCH), len(x), dtype=torch.float32)
    run(stretch_kernel, (STRETCH,), x, w, y, parts, temperature)
    m_i, s_i, t_i, target = parts
    m = m_i.amax(0)
    shrink = (m_i - m).exp()
    s, t = (shrink * s_i).sum(0), (shrink * (t_i + (m_i - m) * s_i)).sum(0)
    return target.sum(0) - m - s.log(), s.log() - t / s


# ---- the rungs as implementations of the operation


class _Logprobs(torch.autograd.Function):
    """A forward in Triton; a backward by chunks, like that of rung 1."""

    @staticmethod
    def forward(
        ctx, number: int, x: Tensor, w: Tensor, y: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w, y)
        ctx.temperature = temperature
        return (running_maximum, stretches)[number - 2](x, w, y, temperature)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, w, y = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(w, dtype=torch.float32)
        w = w.detach().float().requires_grad_()
        for i in range(0, len(x), CHUNK):
            rows = slice(i, i + CHUNK)
            with torch.enable_grad():
                some = x[rows].detach().float().requires_grad_()
                out = logits(some, w, y[rows], ctx.temperature)
            dx[rows], more = torch.autograd.grad(out, (some, w), [g[rows] for g in d_out])
            dw += more
        return None, dx, dw.to(x.dtype), None, None


def logprobs_rung(
    number: int, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The operation by one rung; ignored tokens are computed from zeros, and set to 0."""
    asked = targets != linear_logprob.IGNORE
    x, y = torch.where(asked[:, None], hidden, 0.0), targets.clamp_min(0)
    if number < 2:  # float32 from here: rounding logits of -100 to 16 bits costs 0.05 nats
        out = (logits, chunks)[number](x.float(), weight.float(), y, temperature)
    else:
        check_type(x)
        out = _Logprobs.apply(number, x, weight, y, temperature)
    return out[0].where(asked, 0.0), out[1].where(asked, 0.0)


_PARTS = {
    "0 logits": (logits,),
    "1 chunks": (chunks,),
    "2 running maximum": (logit_tile, maximum_kernel, running_maximum),
    "3 stretches": (stretch_kernel, stretches),
}
LADDER = {
    name: Rung(partial(logprobs_rung, number), parts)
    for number, (name, parts) in enumerate(_PARTS.items())
}


def verify(name: str, dtype: torch.dtype, device: str) -> float:
    """The check of the shipped implementations; the largest error."""
    with entered(linear_logprob, name, LADDER[name].run, lambda case: True):
        return linear_logprob.verify(name, dtype, device)


def counts(run: Any) -> list[Count]:
    """Forward and backward of both outputs; `run` None: of the shipped kernels, called directly."""
    torch.manual_seed(0)
    x, w = (torch.randn(n, 64, requires_grad=run is not None) for n in (256, 8192))
    y, d_out = torch.randint(8192, (256,)), torch.randn(2, 256).unbind(0)
    counted = partial(count, tensors=("W", "w_ptr"), sizes={0: TILE["BLOCK_V"]})
    outs, run_forward = [], run or linear_logprob.triton_forward
    forward = counted(lambda: outs.append(run_forward(x, w, y, 1.0)))
    if run:
        return [forward, counted(lambda: torch.autograd.backward(outs[0], d_out))]
    arguments = *d_out, x, w, y, *outs[0][1:], 1.0
    return [forward, counted(partial(linear_logprob.triton_backward, *arguments))]


GROUPS = {"forward": "tmpl", "backward": "mpl"}


def times(name: str) -> str:
    """Milliseconds of forward and backward on the GPU: 2048 tokens, GPT-2's C and V."""
    run = LADDER[name].run if name in LADDER else linear_logprob.logprobs_triton
    about = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    x, w = torch.randn(2048, 768, **about), torch.randn(50257, 768, **about)
    y, d_out = torch.randint(50257, (2048,), device="cuda"), torch.randn(2, 2048, device="cuda")
    return forward_and_backward(run, (x, w, y, 1.0), *d_out.unbind(0))


if __name__ == "__main__":
    climb(sys.modules[__name__], "Log-probabilities in four rungs.")
