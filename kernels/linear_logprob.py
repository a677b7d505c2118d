"""Log-probability of the target and entropy from hidden states, without an (N, V) matrix.

For token n with hidden state x (C), unembedding w (V, C), temperature tau and target y:

    z_v = x . w_v / tau,   L = log sum_v exp(z_v),   p_v = exp(z_v - L)
    logprob = z_y - L,     entropy = - sum_v p_v log p_v = L - sum_v p_v z_v

**Forward** (one fused kernel). A program owns a tile of tokens and a stretch of the vocabulary. It
walks the stretch a tile of logits at a time. The tile lives in registers, in float32; only four
numbers a token are kept:

    m = max z    s = sum exp(z - m)    t = sum (z - m) exp(z - m)    z_y, if y is in the stretch

When m grows by g, with a = exp(-g):  t <- a (t - g s),  s <- a s.  A second kernel merges the
stretches by the same rule and ends with logprob = z_y - m - log s and entropy = log s - t / s.

**Backward.** dp/dz gives, with upstream gradients g and h of logprob and entropy,

    dz_v = ( g (1[v = y] - p_v) - h p_v (log p_v + entropy) ) / tau,    dx = dz w,    dw = dz^T x

The backward takes a stretch of the vocabulary at a time. A kernel recomputes the logits from x, w
and the saved L and writes dz, in the inputs' dtype, into one fixed workspace; its products with w
and x are ordinary matrix products. dx adds up in float32 over the stretches; each stretch's rows of
dw are written once, so dw needs no float32 copy.

The forward's programs, as `--watch` prints them: 40 tokens in tiles of 32, and the part of w that
each reads, of a vocabulary of 5000 in tiles of 512:

    token tile 0, stretch 0   # # # # . . . . . .
    token tile 0, stretch 1   . . . . # # # # . .
    token tile 0, stretch 2   . . . . . . . . # #
    token tile 1, stretch 0   # # # # . . . . . .
    token tile 1, stretch 1   . . . . # # # # . .
    token tile 1, stretch 2   . . . . . . . . # #

Why not fuse the backward as well? dx of one tile of tokens is 128 x C float32, 393 KB at C = 768,
more than a multiprocessor holds. A fused kernel must share sums through atomics, or recompute the
logits twice, for dx and for dw (8 N V C operations). The workspace costs 6 N V C operations and
three passes over 2-byte logits through the cache.

Operations: 2 N V C forward, 6 N V C backward. Memory at N = 8192, V = 50257, 2-byte inputs: eager
float32 logits take 1.65 GB, and log_softmax, entropy and their gradients hold several copies. Here
it is 16 bytes a token and stretch forward (3.3 MB) and WORKSPACE_BYTES backward. Logits are never
rounded to 16 bits: GPT-2's are around -100, where rounding alone costs 0.1 nats.

IMPLS has two designs: "triton" is the above; "torch" makes the float32 logits of a chunk of tokens
with the library's matrix product and reduces them from memory.

Preconditions (checked in `logprobs`): one floating dtype, last stride 1, int64 targets.

Run: python -m kernels.linear_logprob            verify every implementation, then time it
     python -m kernels.linear_logprob --watch    what the kernels read and write (watch.py)
The way here, one idea at a time: kernels/ladder_logprob.py.
"""

from __future__ import annotations

import math
import os
import sys
from functools import partial

import torch
from torch import Tensor

if __name__ == "__main__" and ("--watch" in sys.argv or not torch.cuda.is_available()):
    # Read when Triton is imported, so before the next line.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import check
from kernels.bench import benchmark, logprobs_rows
from kernels.runtime import (
    Impl,
    accumulator,
    add_product,
    check_floats,
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

IGNORE = -100  # the target of a token that does not count: both outputs 0, no gradient


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The definition, with all (N, V) logits at once; autograd gives its backward."""
    keep = targets != IGNORE
    logp = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)  # (N, V)
    chosen = logp.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return chosen.where(keep, 0.0), entropy.where(keep, 0.0)


# ---- torch


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time.

    On a CPU, 2^18 logits (1 MiB) stay in the second-level cache between the four passes over them;
    fewer than 128 rows would read the weight too often. On a GPU, 2^26 logits (256 MiB) keep the
    matrix units busy and bound the memory.
    """
    return max(128, (2**26 if device.type == "cuda" else 2**18) // vocabulary)


def _logits(x: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """x weight^T / temperature, accumulated and returned in float32 (float64 for float64)."""
    if x.dtype in (torch.float32, torch.float64):
        z = x @ weight.T
    else:  # tensor cores, with sums in float32: 16-bit sums would cost 0.02 to 0.1 nats
        z = torch.mm(x, weight.T, out_dtype=torch.float32)
    return z if temperature == 1.0 else z.div_(temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    """Chunks of tokens, forward and backward; nothing of size (N, V) outlives its chunk.

    Saves only the log-sum-exp and the entropy of each token; the backward recomputes the logits.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the unused output's gradient stays None instead of zeros
        N = hidden.shape[0]
        out_dtype = torch.promote_types(hidden.dtype, torch.float32)
        chosen, entropy, lse = hidden.new_empty(3, N, dtype=out_dtype).unbind(0)
        step = _chunk_rows(weight.shape[0], hidden.device)
        for i in range(0, N, step):
            rows = slice(i, i + step)
            z = _logits(hidden[rows], weight, temperature)  # (n, V)
            p = torch.softmax(z, -1)
            # the largest probability is 1 / sum(exp(z - max)), so this is max + log of that sum
            lse[rows] = z.amax(-1) - p.amax(-1).log()
            chosen[rows] = z.gather(1, targets[rows, None])[:, 0] - lse[rows]
            entropy[rows] = lse[rows] - torch.linalg.vecdot(p, z)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        return chosen, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_chosen: Tensor | None, g_entropy: Tensor | None):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        if g_chosen is None and g_entropy is None:
            return None, None, None, None
        size = None
        if hidden.dtype == torch.float16:  # dz must neither overflow nor vanish
            g_chosen, g_entropy, size = scaled(g_chosen, g_entropy, over=1 / ctx.temperature)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if want_weight else None
        step = _chunk_rows(weight.shape[0], hidden.device)
        for i in range(0, hidden.shape[0], step):
            rows = slice(i, i + step)
            x = hidden[rows]
            logp = _logits(x, weight, ctx.temperature).sub_(lse[rows, None])  # (n, V)
            g = None if g_chosen is None else g_chosen[rows, None] / ctx.temperature
            if g_entropy is None:
                dz = logp.exp_().mul_(-g)  # g (1[v = y] - p), the first term below
            else:
                # d entropy / dz = -p (log p + entropy)
                dz = logp.exp()
                slope = logp.add_(entropy[rows, None]).mul_(
                    -g_entropy[rows, None] / ctx.temperature
                )
                dz.mul_(slope if g is None else slope.sub_(g))
            if g is not None:
                dz.scatter_add_(1, targets[rows, None], g)
            dz = dz.to(hidden.dtype)
            if want_hidden:
                torch.mm(dz, weight, out=d_hidden[rows])
            if want_weight:
                add_product(d_weight, dz.T, x)
        for gradient in (d_hidden, d_weight):
            if size is not None and gradient is not None:
                gradient.mul_(size)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def logprobs_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Chunked matrix products and softmax; see _ChunkedLogprobs."""
    keep = targets != IGNORE
    if hidden.dtype in (torch.float16, torch.bfloat16) and not hidden.is_cuda:
        # A CPU has no 16-bit product with float32 results.
        hidden, weight = hidden.float(), weight.float()
    if not may_read(keep):  # all rows are computed, the ignored ones from zeros
        x = torch.where(keep[:, None], hidden, 0.0)
        chosen, entropy = _ChunkedLogprobs.apply(x, weight, targets.clamp_min(0), temperature)
        return chosen.where(keep, 0.0), entropy.where(keep, 0.0)
    if keep.all():
        return _ChunkedLogprobs.apply(hidden, weight, targets, temperature)
    rows = keep.nonzero()[:, 0]
    kept = _ChunkedLogprobs.apply(hidden[rows], weight, targets[rows], temperature)
    chosen, entropy = (x.new_zeros(len(keep)).index_copy(0, rows, x) for x in kept)
    return chosen, entropy


# ---- Triton: tile sizes

# (BLOCK_N tokens, BLOCK_V logits, BLOCK_C of the product's inner loop, num_warps, num_stages), for
# GPU class and bytes an element. Nothing is tuned at run time; `python -m kernels.compile` shows
# what each tile uses.
TILES = {
    #                  forward                dz
    ("sm_90", 2): ((128, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
    ("sm_90", 4): ((64, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
    ("sm_80", 2): ((128, 128, 32, 8, 3), (128, 128, 32, 8, 3)),
    ("sm_80", 4): ((64, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
    ("interpreter", 8): ((32, 512, 64, 1, 1), (32, 512, 64, 1, 1)),
}
# The vocabulary a forward program walks. It does not depend on N: a token's result is the same in
# every batch.
STRETCH = 2048
# dz of all tokens and one stretch of the backward. About the size of a large GPU's second-level
# cache.
WORKSPACE_BYTES = 2**26


def _tiles(hidden: Tensor) -> tuple[dict[str, int], ...]:
    """Keyword arguments of the two tiled kernels: block sizes, num_warps and num_stages."""
    gpu = gpu_class(hidden)
    check_tiles(hidden)
    names = ("BLOCK_N", "BLOCK_V", "BLOCK_C", "num_warps", "num_stages")
    row = TILES[gpu, 8 if gpu == "interpreter" else hidden.element_size()]
    return tuple(dict(zip(names, tile, strict=True)) for tile in row)


# ---- Triton: kernels


@jit
def _logit_tile(
    x_ptr,
    w_ptr,
    x_n,
    w_v,
    tokens,
    alive,
    vocab,
    V,
    scale,
    ACC: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x w^T `scale` for a tile: (tokens, vocab). Tokens that are not alive are read as zeros."""
    # 64-bit offsets: token 42732 of a (N, 50257) matrix is already past 2^31
    x_rows = x_ptr + tokens[:, None].to(tl.int64) * x_n
    w_rows = w_ptr + vocab[:, None].to(tl.int64) * w_v
    z = tl.zeros((tokens.shape[0], vocab.shape[0]), ACC)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x_mask, w_mask = alive[:, None], vocab[:, None] < V
        if C % BLOCK_C != 0:
            x_mask, w_mask = x_mask & (c[None, :] < C), w_mask & (c[None, :] < C)
        x = tl.load(x_rows + c[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_rows + c[None, :], mask=w_mask, other=0.0)
        z = tl.dot(x, tl.trans(w), z, input_precision="ieee", out_dtype=ACC)
    return z * scale


@jit
def _merge(m, s, t, m_other, s_other, t_other):
    """The running (max, sum, weighted sum) of two sets of logits together, in powers of 2."""
    m_new = tl.maximum(m, m_other)
    a, b = m - m_new, m_other - m_new  # at most 0
    t = tl.exp2(a) * (t + a * s) + tl.exp2(b) * (t_other + b * s_other)
    s = tl.exp2(a) * s + tl.exp2(b) * s_other
    return m_new, s, t


@jit
def forward_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    m_ptr,
    s_ptr,
    t_ptr,
    target_ptr,
    x_n,
    w_v,
    N,
    V,
    scale,
    ACC: tl.constexpr,
    C: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """m, s, t and the target's logit of a tile of tokens over one stretch; `scale` is log2 e /
    temperature.

    These four are (stretches, N). Programs of one stretch are neighbours, so that its part of w
    stays in the cache.
    """
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(y_ptr + tokens, mask=tokens < N, other=-1)
    begin = tl.program_id(1) * STRETCH
    # Lower than any logit, but finite: minus infinity would give inf - inf, and starting at 0 would
    # lose logits that are all far below 0.
    LOWEST: tl.constexpr = -1e30
    m = tl.full((BLOCK_N,), LOWEST, ACC)
    s = tl.zeros((BLOCK_N,), ACC)
    t = tl.zeros((BLOCK_N,), ACC)
    target = tl.zeros((BLOCK_N,), ACC)
    for start in range(begin, tl.minimum(begin + STRETCH, V), BLOCK_V):
        vocab = start + tl.arange(0, BLOCK_V)
        z = _logit_tile(x_ptr, w_ptr, x_n, w_v, tokens, y >= 0, vocab, V, scale, ACC, C, BLOCK_C)
        target += tl.sum(tl.where(vocab[None, :] == y[:, None], z, 0.0), 1)
        z = tl.where(vocab[None, :] < V, z, LOWEST)
        m_tile = tl.max(z, 1)
        z -= m_tile[:, None]
        e = tl.exp2(z)
        m, s, t = _merge(m, s, t, m_tile, tl.sum(e, 1), tl.sum(z * e, 1))
    out = tl.program_id(1).to(tl.int64) * N + tokens
    tl.store(m_ptr + out, m, mask=tokens < N)
    tl.store(s_ptr + out, s, mask=tokens < N)
    tl.store(t_ptr + out, t, mask=tokens < N)
    tl.store(target_ptr + out, target, mask=tokens < N)


@jit
def combine_kernel(
    m_ptr,
    s_ptr,
    t_ptr,
    target_ptr,
    y_ptr,
    logprob_ptr,
    entropy_ptr,
    lse_ptr,
    N,
    stretches,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the stretches of a tile of tokens. Outputs are in nats; lse stays in units of log 2."""
    LN2: tl.constexpr = 0.6931471805599453
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = tokens < N
    m = tl.full((BLOCK_N,), -1e30, ACC)
    s = tl.zeros((BLOCK_N,), ACC)
    t = tl.zeros((BLOCK_N,), ACC)
    target = tl.zeros((BLOCK_N,), ACC)
    here = tokens.to(tl.int64)
    for _ in range(0, stretches):
        m_other = tl.load(m_ptr + here, mask=keep, other=0.0)
        s_other = tl.load(s_ptr + here, mask=keep, other=1.0)
        t_other = tl.load(t_ptr + here, mask=keep, other=0.0)
        m, s, t = _merge(m, s, t, m_other, s_other, t_other)
        target += tl.load(target_ptr + here, mask=keep, other=0.0)
        here += N
    asked = tl.load(y_ptr + tokens, mask=keep, other=-1) >= 0
    log_s = tl.log2(s)
    tl.store(logprob_ptr + tokens, tl.where(asked, (target - m - log_s) * LN2, 0.0), mask=keep)
    tl.store(entropy_ptr + tokens, tl.where(asked, (log_s - t / s) * LN2, 0.0), mask=keep)
    tl.store(lse_ptr + tokens, m + log_s, mask=keep)


@jit
def d_logits_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    lse_ptr,
    entropy_ptr,
    g_ptr,
    h_ptr,
    dz_ptr,
    x_n,
    w_v,
    g_n,
    h_n,
    dz_n,
    N,
    V,
    begin,
    scale,
    inverse_temperature,
    ACC: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz of a tile: tokens x vocabulary begin + tile. g_ptr or h_ptr is None where that output has
    no gradient."""
    LN2: tl.constexpr = 0.6931471805599453
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    vocab = begin + column
    y = tl.load(y_ptr + tokens, mask=tokens < N, other=-1)
    asked = y >= 0
    z = _logit_tile(x_ptr, w_ptr, x_n, w_v, tokens, asked, vocab, V, scale, ACC, C, BLOCK_C)
    lse = tl.load(lse_ptr + tokens, mask=asked, other=0.0)
    # In units of log 2; the bound also keeps columns past V finite.
    logp = tl.minimum(z - lse[:, None], 0.0)
    p = tl.exp2(logp)
    dz = tl.zeros((BLOCK_N, BLOCK_V), ACC)
    if g_ptr is not None:
        # p - 1 in float32: in 16 bits it would vanish where p is near 1
        g = tl.load(g_ptr + tokens.to(tl.int64) * g_n, mask=asked, other=0.0).to(ACC)
        dz = g[:, None] * (tl.where(vocab[None, :] == y[:, None], 1.0, 0.0) - p)
    if h_ptr is not None:
        h = tl.load(h_ptr + tokens.to(tl.int64) * h_n, mask=asked, other=0.0).to(ACC)
        entropy = tl.load(entropy_ptr + tokens, mask=asked, other=0.0)
        dz -= h[:, None] * p * (logp * LN2 + entropy[:, None])
    dz = tl.where(asked[:, None], dz * inverse_temperature, 0.0)
    out = dz_ptr + tokens[:, None].to(tl.int64) * dz_n + column[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=(tokens[:, None] < N) & (vocab[None, :] < V))


# ---- Triton: launches


def triton_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy (nats) and L (units of log 2), each (N,)."""
    (N, C), V = hidden.shape, weight.shape[0]
    sum_dtype, acc = accumulator(hidden.dtype)
    stretches = triton.cdiv(V, STRETCH)
    partial = hidden.new_empty(4, stretches, N, dtype=sum_dtype).unbind(0)
    chosen, entropy, lse = (hidden.new_empty(N, dtype=sum_dtype) for _ in range(3))
    tile = _tiles(hidden)[0]
    grid = triton.cdiv(N, tile["BLOCK_N"]), stretches
    tensors, strides = (hidden, weight, targets, *partial), (hidden.stride(0), weight.stride(0))
    constants = {"ACC": acc, "C": C, "STRETCH": STRETCH} | tile
    scale = math.log2(math.e) / temperature
    launch(forward_kernel, grid, *tensors, *strides, N, V, scale, **constants)

    grid = (triton.cdiv(N, 128),)
    tensors = *partial, targets, chosen, entropy, lse
    launch(combine_kernel, grid, *tensors, N, stretches, ACC=acc, BLOCK_N=128, num_warps=4)
    return chosen, entropy, lse


def triton_backward(
    g_chosen: Tensor | None,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, in their dtypes; the upstream ones may have any stride, or be
    None."""
    (N, C), V = hidden.shape, weight.shape[0]
    sum_dtype, acc = accumulator(hidden.dtype)
    tile = _tiles(hidden)[1]
    # An ignored row may hold NaN, and dz = 0 times NaN is NaN in the product for dw.
    x = torch.where((targets != IGNORE)[:, None], hidden, 0.0)
    size = None
    if hidden.dtype == torch.float16:  # dz must neither overflow nor vanish
        g_chosen, g_entropy, size = scaled(g_chosen, g_entropy, over=1 / temperature)
    d_hidden = torch.zeros_like(x, dtype=sum_dtype)
    d_weight = torch.empty_like(weight)
    width = WORKSPACE_BYTES // (max(N, 1) * hidden.element_size()) // 512 * 512
    width = min(max(width, 512), triton.cdiv(V, 16) * 16)  # rows stay aligned to 16 elements
    dz = hidden.new_empty(N, width)
    tensors = x, weight, targets, lse, entropy, g_chosen, g_entropy, dz
    g_n, h_n = (0 if g is None else g.stride(0) for g in (g_chosen, g_entropy))
    strides = x.stride(0), weight.stride(0), g_n, h_n, width
    scales = math.log2(math.e) / temperature, 1 / temperature
    constants = {"ACC": acc, "C": C} | tile
    for begin in range(0, V, width):
        end = min(begin + width, V)
        grid = triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(end - begin, tile["BLOCK_V"])
        launch(d_logits_kernel, grid, *tensors, *strides, N, end, begin, *scales, **constants)
        part = dz[:, : end - begin]
        add_product(d_hidden, part, weight[begin:end])
        if size is None:
            torch.mm(part.T, x, out=d_weight[begin:end])
        else:
            rows = x.new_zeros(end - begin, C, dtype=sum_dtype)
            d_weight[begin:end] = add_product(rows, part.T, x) * size
    return (d_hidden if size is None else d_hidden * size).to(hidden.dtype), d_weight


# ---- torch.compile sees two opaque operators: what they return (fake) and how they differentiate

_forward_op = torch.library.custom_op(
    "kernels::logprobs",
    triton_forward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, float temperature)"
    " -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "kernels::logprobs_backward",
    triton_backward,
    mutates_args=(),
    schema="(Tensor? g_chosen, Tensor? g_entropy, Tensor hidden, Tensor weight, Tensor targets,"
    " Tensor entropy, Tensor lse, float temperature) -> (Tensor, Tensor)",
)


@fake(_forward_op, triton_forward)
def _(hidden, weight, targets, temperature):
    return tuple(
        hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden.dtype)[0]) for _ in range(3)
    )


@fake(_backward_op, triton_backward)
def _(g_chosen, g_entropy, hidden, weight, *_):
    return torch.empty_like(hidden), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    hidden, weight, targets, temperature = inputs
    _, entropy, lse = output
    # The unused output's gradient stays None: half the work of the kernel.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, entropy, lse)
    ctx.temperature = temperature


def _backward(ctx, g_chosen: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None):
    if g_chosen is None and g_entropy is None:
        return None, None, None, None
    return *_backward_op(g_chosen, g_entropy, *ctx.saved_tensors, ctx.temperature), None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def logprobs_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The kernels above."""
    return _forward_op(hidden, weight, targets, temperature)[:2]


IMPLS = {"torch": logprobs_torch, "triton": Impl(logprobs_triton, needs_triton=True)}


# ---- the public function


def logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature)[target] and that distribution's entropy, in nats,
    for N tokens.

    hidden       (N, C) floating point, last stride 1
    weight       (V, C) of the same dtype: the unembedding
    targets      (N,) int64 in 0..V-1, or -100: both outputs 0, no gradient, and `hidden` there does
                 not matter, not even NaN
    temperature  > 0
    impl         "auto": Triton on CUDA, torch elsewhere; an entry of IMPLS; "operation=entry"

    Returns logprobs (N,) and entropy (N,), float32 (float64 for float64). Both are differentiable
    in hidden and weight; logits are accumulated in float32 and never held for all tokens; gradients
    have the inputs' dtypes. Raises ValueError naming the argument, its value and the remedy.
    """
    _check(hidden, weight, targets, temperature)
    targets = targets.contiguous()  # kernels read it without a stride
    return choose(impl, "logprobs", IMPLS, hidden)(hidden, weight, targets, float(temperature))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; expected (N, C): use .flatten(0, -2)"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (V, {hidden.shape[1]}), V at least 1"
        )
    check_floats(hidden=hidden, weight=weight)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected ({hidden.shape[0]},)")
    if targets.dtype != torch.int64:
        raise ValueError(
            f"targets has dtype {targets.dtype}; expected torch.int64: call .long() on it"
        )
    if targets.device != hidden.device:
        raise ValueError(
            f"targets is on {targets.device} but hidden is on {hidden.device}; move one of them"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    if targets.numel() and may_read(targets):
        bad = (targets >= weight.shape[0]) | ((targets < 0) & (targets != IGNORE))
        if bad.any():
            value = targets[bad][0].item()
            raise ValueError(
                f"targets has value {value}; expected 0..{weight.shape[0] - 1}, or {IGNORE}"
            )


# ---- check and benchmark

# (N, V, C, temperature, level of the logits, which outputs have a gradient, and of what size). The
# last has tiles of tokens, and sizes V and C that are multiples of every tile's.
CASES = [
    (1, 17, 16, 1e4, 0.0, "both x 1e-2"),  # dz is 1e-6, then 1e5: not for float16 as it is
    (7, 64, 16, 1e-4, 0.0, "logprobs x 10"),
    (33, 1003, 65, 0.7, -35.0, "both"),
    (40, 1003, 16, 1.0, -110.0, "logprobs"),
    (5, 5121, 48, 1.5, 0.0, "entropy"),  # the last tile has one logit
    (130, 2560, 128, 1.0, 0.0, "both"),
]


def make_case(
    N: int, V: int, C: int, temperature: float, level: float, dtype: torch.dtype, device: str
) -> tuple:
    """hidden, weight, targets, the two upstream gradients; every fifth token is ignored and NaN.

    `level` is the mean of the logits, such as GPT-2's: a maximum that starts at 0 loses all of
    them. All are strided, with NaN between the rows; the target is often the first entry or the
    last, in the last and partial tile. Inputs grow with the temperature, and logits do not.
    """
    unit = math.sqrt(temperature)
    hidden, weight = torch.randn(N, C) * unit, torch.randn(V, C) * unit * 0.5
    hidden[:, 0], weight[:, 0] = 8.0 * unit, level * unit / 8.0
    targets = torch.where(torch.rand(N) < 0.3, V - 1, torch.randint(V, (N,)))
    targets[1::4] = 0
    targets[4::5] = IGNORE
    hidden[4::5] = float("nan")
    grads = torch.randn(N, 3)[:, 0], torch.randn(1).expand(N)
    return (
        *(check.with_gaps(x.to(device, dtype), gap) for x, gap in ((hidden, 3), (weight, 4))),
        check.with_other_column(targets).to(device),
        *(x.to(device) for x in grads),
    )


def verify(impl: str, dtype: torch.dtype, device: str, case: int | None = None) -> float:
    """Compare outputs and gradients with the reference in float64, on one of CASES or on all, with
    the smallest workspace. Returns the largest error; raises what is wrong."""
    with check.changed(globals(), WORKSPACE_BYTES=1):
        return check.run_cases(CASES, partial(_check_case, impl, dtype, device), case)


def _check_case(impl: str, dtype: torch.dtype, device: str, case: tuple) -> float:
    *shape, temperature, level, outputs = case
    hidden, weight, targets, *grads = make_case(*shape, temperature, level, dtype, device)
    outputs, _, times = outputs.partition(" x ")
    grads = [g * float(times) for g in grads] if times else grads  # strided ones stay so
    chosen = {"logprobs": slice(0, 1), "entropy": slice(1, 2), "both": slice(0, 2)}[outputs]
    inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
    with check.guarded() as seen:
        out = logprobs(*inputs, targets, temperature=temperature, impl=impl)
        if [tuple(x.shape) for x in out] != [tuple(targets.shape)] * 2:
            found = [tuple(x.shape) for x in out][:3]
            raise check.Mismatch(f"expected log-probs and entropies, (N,) each; found {found}")
        torch.autograd.backward(out[chosen], [g.to(out[0].dtype) for g in grads[chosen]])
    exact = [x.detach().double().nan_to_num().requires_grad_() for x in (hidden, weight)]
    expected = reference(*exact, targets, temperature)
    torch.autograd.backward(expected[chosen], [g.double() for g in grads[chosen]])
    # Outputs are float32 whatever the inputs are; what is left is the rounding of the logits. The
    # column of weight that sets the level multiplies the rounding of dz.
    rounding, tolerance = max(1e-5, abs(level) * 2e-7), check.TOLERANCE[dtype] * (1 - level / 16)
    what = f"logprobs {impl} {case}:"
    names = "logprobs", "entropy", "gradient of hidden", "gradient of weight"
    names = [f"{what} {name}" for name in names]
    found, wanted = (*out, *(x.grad for x in inputs)), (*expected, *(x.grad for x in exact))
    limits = rounding, rounding, tolerance, tolerance
    worst = check.compare_all(zip(names, found, wanted, limits, strict=True))
    if impl == "triton" and seen.visits:  # no tile is visited in vain
        N, V, C = map(triton.cdiv, shape, [*_tiles(hidden)[0].values()][:3])
        check.expect_count(f"{what} products", seen.dots["forward_kernel"], N * V * C)
    return worst


if __name__ == "__main__":
    from kernels.watch import logprobs_case  # only here: nothing else needs it

    check.main(IMPLS, verify, CASES, watch=lambda: logprobs_case(logprobs))
    benchmark("linear_logprob", partial(logprobs_rows, logprobs, IMPLS))
