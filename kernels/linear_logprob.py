"""log-probs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.runtime import check_floats, choose

IGNORE = -100  # a target that asks for nothing: both outputs 0, no gradient


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, with all (N, V) logits at once; autograd gives its backward."""
    keep = targets != IGNORE
    logp = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)  # (N, V)
    chosen = logp.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return chosen.where(keep, 0.0), entropy.where(keep, 0.0)


# ---- torch


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time.

    On a CPU 2^18 logits (1 MiB) stay in the second-level cache between the four passes over them; fewer than 128
    rows would read the weight too often. On a GPU 2^26 logits (256 MiB) fill the matrix units and bound the memory.
    """
    return max(128, (2**26 if device.type == "cuda" else 2**18) // vocabulary)


def _logits(x: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """x weight^T / temperature, accumulated and returned in float32 (float64 for float64)."""
    if x.dtype in (torch.float32, torch.float64):
        z = x @ weight.T
    else:  # tensor cores, but the sums are not rounded to 16 bits: that would cost 0.02 to 0.1 nats
        z = torch.mm(x, weight.T, out_dtype=torch.float32)
    return z if temperature == 1.0 else z.div_(temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    """Chunks of tokens, forward and backward; nothing of size (N, V) outlives its chunk.

    Saves only the log-sum-exp and the entropy of each token; the backward makes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
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
                slope = logp.add_(entropy[rows, None]).mul_(-g_entropy[rows, None] / ctx.temperature)
                dz.mul_(slope if g is None else slope.sub_(g))
            if g is not None:
                dz.scatter_add_(1, targets[rows, None], g)
            dz = dz.to(hidden.dtype)
            if want_hidden:
                torch.mm(dz, weight, out=d_hidden[rows])
            if want_weight:
                _add_product(d_weight, dz.T, x)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total is float32 or wider even if a and b are 16-bit."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


def logprobs_torch(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Chunked matrix products and softmax; see _ChunkedLogprobs."""
    keep = targets != IGNORE
    if hidden.dtype in (torch.float16, torch.bfloat16) and not hidden.is_cuda:
        hidden, weight = hidden.float(), weight.float()  # a CPU has no 16-bit product with float32 results
    if hidden.is_cuda:  # reading `keep` would wait for the GPU: all rows are computed, the ignored ones from zeros
        x = torch.where(keep[:, None], hidden, 0.0)
        chosen, entropy = _ChunkedLogprobs.apply(x, weight, targets.clamp_min(0), temperature)
        return chosen.where(keep, 0.0), entropy.where(keep, 0.0)
    if keep.all():
        return _ChunkedLogprobs.apply(hidden, weight, targets, temperature)
    rows = keep.nonzero()[:, 0]
    kept = _ChunkedLogprobs.apply(hidden[rows], weight, targets[rows], temperature)
    chosen, entropy = (x.new_zeros(len(keep)).index_copy(0, rows, x) for x in kept)
    return chosen, entropy


IMPLS = {"torch": logprobs_torch}


# ---- the public function


def logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature)[target] and that distribution's entropy, in nats, for N tokens.

    hidden       (N, C) floating point, last stride 1
    weight       (V, C) of the same dtype: the unembedding
    targets      (N,) int64 in 0..V-1, or -100: both outputs 0, no gradient
    temperature  > 0
    impl         an entry of IMPLS, or "auto": Triton on CUDA, torch elsewhere

    Returns logprobs (N,) and entropy (N,), float32 (float64 for float64). Both are differentiable in hidden and
    weight; logits are accumulated in float32 and never held for all tokens; gradients have the inputs' dtypes.
    Raises ValueError naming the argument, its value and the remedy.
    """
    _check(hidden, weight, targets, temperature)
    return choose(impl, IMPLS, hidden)(hidden, weight, targets, float(temperature))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected (N, C): use .flatten(0, -2)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (V, {hidden.shape[1]}), V at least 1")
    check_floats(hidden=hidden, weight=weight)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected ({hidden.shape[0]},)")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}; expected torch.int64: call .long() on it")
    if targets.device != hidden.device:
        raise ValueError(f"targets is on {targets.device} but hidden is on {hidden.device}; move one of them")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    if targets.numel() and not targets.is_cuda:  # on CUDA reading a value would wait for the GPU
        bad = (targets >= weight.shape[0]) | ((targets < 0) & (targets != IGNORE))
        if bad.any():
            value = targets[bad][0].item()
            raise ValueError(f"targets has value {value}; expected 0..{weight.shape[0] - 1}, or {IGNORE} to ignore")
