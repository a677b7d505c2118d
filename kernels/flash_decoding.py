"""decode."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.runtime import check_floats, check_lengths, choose
from kernels.score_mods import SCORE_MODS, check_score_mod


def reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, score_mod: str) -> Tensor:
    """The definition, one row at a time."""
    out = torch.zeros_like(q)
    for b, n in enumerate(lengths.tolist()):
        if n:
            key, value = k_cache[b : b + 1, :, :n], v_cache[b : b + 1, :, :n]  # (1, H, n, D)
            scores = q[b : b + 1, :, None] @ key.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (1, H, 1, n)
            index = torch.arange(n, device=q.device)
            scores = SCORE_MODS[score_mod].torch_scores(scores, index[-1:, None], index[None, :])
            out[b] = (scores.softmax(-1) @ value)[0, :, 0]
    return out


# ---- torch


def decode_torch(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, score_mod: str) -> Tensor:
    """Two batched products; on a CPU only the first max(lengths) entries of the cache are touched."""
    B, H, S, D = k_cache.shape
    mod = SCORE_MODS[score_mod]
    if not q.is_cuda and B:
        low, S = (int(x) for x in lengths.aminmax())
        if S == 0:
            return torch.zeros_like(q)
        k_cache, v_cache = k_cache[:, :, :S], v_cache[:, :, :S]
    index = torch.arange(S, device=q.device)
    length = lengths[:, None, None, None]
    scores = (q[:, :, None] * (1 / math.sqrt(D))) @ k_cache.transpose(-1, -2)  # (B, H, 1, S)
    ragged = q.is_cuda or low < S
    if ragged or mod != SCORE_MODS["causal"]:
        # the query is its row's last token; a row without keys is given all of them here and zeroed below
        scores = mod.torch_scores(scores.float(), torch.where(length > 0, length, S) - 1, index)
    p = scores.softmax(-1).to(q.dtype)
    out = (p @ v_cache)[:, :, 0]
    if ragged:
        inside = index < length  # (B, 1, 1, S)
        if q.is_cuda or not math.isfinite(out.sum()):
            # a hidden value has probability 0, but 0 times NaN is NaN: the tail is read as zeros
            out = (p @ torch.where(inside.transpose(-1, -2), v_cache, 0.0))[:, :, 0]
        out = torch.where(length[..., 0] > 0, out, 0.0)
    return out


IMPLS = {"torch": decode_torch}


# ---- the public function


@torch.no_grad()
def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, score_mod: str = "causal", impl: str = "auto"
) -> Tensor:
    """Attention of one new query a row over the first lengths[b] cached keys, the last of which is its own.

    q                 (B, H, D), last stride 1
    k_cache, v_cache  (B, H, S, D), same dtype, last stride 1; entries at or past lengths[b] do not matter
    lengths           (B,) int32 in 0..S; the query stands at position lengths[b] - 1; length 0 gives 0
    score_mod         an entry of SCORE_MODS
    impl              an entry of IMPLS, or "auto": Triton on CUDA, torch elsewhere

    Returns (B, H, D) in the inputs' dtype. There is no backward: sampling needs none.
    Raises ValueError naming the argument, its value and the remedy.
    """
    _check(q, k_cache, v_cache, lengths, score_mod)
    return choose(impl, IMPLS, q)(q, k_cache, v_cache, lengths, score_mod)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, score_mod: str) -> None:
    check_score_mod(score_mod)
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, H, D): one query a row")
    B, H, D = q.shape
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4 or x.shape != (B, H, k_cache.shape[-2], D):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({B}, {H}, S, {D}), the same S in both")
    check_floats(q=q, k_cache=k_cache, v_cache=v_cache)
    check_lengths(lengths, B, k_cache.shape[2], q.device)
