"""attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime import check_floats, check_lengths, choose
from kernels.score_mods import SCORE_MODS, check_score_mod


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str) -> Tensor:
    """The definition, one row at a time with all its scores at once; autograd gives its backward."""
    B, _, T, D = q.shape
    rows = []
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        query, key, value = q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n]  # (1, H, n, D)
        index = torch.arange(n, device=q.device)
        scores = query @ key.transpose(-1, -2) / math.sqrt(D)  # (1, H, n, n)
        scores = SCORE_MODS[score_mod].torch_scores(scores, index[:, None], index[None, :])
        rows.append(F.pad(scores.softmax(-1) @ value, (0, 0, 0, T - n)))
    return torch.cat(rows)


# ---- torch


def attention_torch(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str) -> Tensor:
    """PyTorch's own fused attention where the score is unchanged; scores in memory otherwise.

    A causal query inside its row sees no key past the row's end, so `lengths` changes nothing but the tail.
    """
    T = q.shape[2]
    if lengths is None or (not q.is_cuda and int(lengths.min()) == T):
        return _attention_torch(q, k, v, score_mod)
    inside = (torch.arange(T, device=q.device) < lengths[:, None])[:, None, :, None]  # (B, 1, T, 1)
    # A hidden key has probability 0, but 0 times NaN is NaN: what lies past the end must be finite. On a CPU that
    # is read off the sums, which is cheaper than copying; on CUDA reading would wait for the GPU.
    if q.is_cuda or not math.isfinite(q.detach().sum() + k.detach().sum() + v.detach().sum()):
        q, k, v = (torch.where(inside, x, 0.0) for x in (q, k, v))
    return torch.where(inside, _attention_torch(q, k, v, score_mod), 0.0)


def _attention_torch(q: Tensor, k: Tensor, v: Tensor, score_mod: str) -> Tensor:
    mod = SCORE_MODS[score_mod]
    if mod.score is None and mod.first_key is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    index = torch.arange(q.shape[2], device=q.device)
    if mod.score is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mod.torch_visible(index[:, None], index))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # (B, H, T, T)
    p = mod.torch_scores(scores, index[:, None], index).softmax(-1)
    return p.to(v.dtype) @ v


IMPLS = {"torch": attention_torch}


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

    q, k, v    (B, H, T, D), one floating dtype, last stride 1; T is at least 1, D 16..128 and a multiple of 8 for
               Triton
    lengths    (B,) int32, tokens in each right-padded row; None: all T. Rows t >= lengths[b] of the result are 0
               and give and take no gradient; whatever lies there, NaN included, does not matter
    score_mod  an entry of SCORE_MODS: "causal", or one that changes scores or hides more keys
    impl       an entry of IMPLS, or "auto": Triton on CUDA, torch elsewhere

    Returns (B, H, T, D) in the inputs' dtype, differentiable in q, k and v; its memory is laid out (B, T, H, D), so
    that `.transpose(1, 2).flatten(2)` is a view.
    Raises ValueError naming the argument, its value and the remedy.
    """
    _check(q, k, v, lengths, score_mod)
    return choose(impl, IMPLS, q)(q, k, v, lengths, score_mod)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, score_mod: str) -> None:
    check_score_mod(score_mod)
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, H, T, D)")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)} but q has {tuple(q.shape)}; expected the same")
    check_floats(q=q, k=k, v=v)
    if lengths is not None:
        check_lengths(lengths, q.shape[0], q.shape[2], q.device)
