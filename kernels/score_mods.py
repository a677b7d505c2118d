"""Attention functions: which keys a query sees, and how a score changes before the softmax.

    out[q] = sum over k of softmax_k( score(q . k / sqrt(D)) ) v[k],    k in first_key(q) .. q

An attention function is an entry of SCORE_MODS. Its fields are functions, compiled into the
forward, the backward and the decoding kernel; the torch implementations call the same functions.

    first_key(q)    the first key that query q sees (below 0 counts as 0); None: all, plain causal
    last_query(k)   the last query that sees key k, inverse of first_key; None: the last of the row
    score(s, q, k, head, num_heads)
                    a new score from s = q . k / sqrt(D), float32, natural units; minus infinity
                    hides a key; None: s
    derivative(s, q, k, head, num_heads)
                    d score / d s, finite everywhere; None: 1
    torch_score     `score` on torch tensors; None: `score` itself

q and k are indices that count from the row's first token. first_key and last_query bound the
kernels' loops, so they must not decrease. What each function may use:

    first_key, last_query   operators only (+ - * // and comparisons): they also get plain integers
    score                   operators only, or tl functions (tl.exp2) with a torch_score beside it
    derivative              operators and tl functions
    torch_score             torch functions

To add one: write its functions below, add the entry, and run `python -m kernels.flash_attention`
and `python -m kernels.flash_decoding`. Both check every entry against the reference; so do the
tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.runtime import jit, tl


class ScoreMod(NamedTuple):
    """One attention function; see the top of this file for the fields."""

    first_key: Any = None
    last_query: Any = None
    score: Any = None
    derivative: Any = None
    torch_score: Callable | None = None

    def torch_visible(self, q: Tensor, k: Tensor) -> Tensor:
        """Boolean mask, broadcast from query indices q and key indices k: does the query see the
        key?"""
        visible = k <= q
        return visible if self.first_key is None else visible & (k >= plain(self.first_key)(q))

    def torch_scores(self, s: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Apply `score` to s (B, H, ..., keys); hidden keys are set to minus infinity. q, k are
        index tensors."""
        if self.score is not None:
            head = torch.arange(s.shape[1], device=s.device).view(-1, 1, 1)
            s = (self.torch_score or plain(self.score))(s, q, k, head, s.shape[1])
        return s.masked_fill(~self.torch_visible(q, k), float("-inf"))


def plain(function: Any) -> Callable:
    """The Python function under `jit`, which takes torch tensors as well."""
    return getattr(function, "fn", function)


# ---- sliding window: a query sees itself and the 63 keys before it


@jit
def window_first_key(q):
    return q - 63


@jit
def window_last_query(k):
    return k + 63


# ---- ALiBi (Press et al. 2022): a penalty of 2^(-8 (head + 1) / num_heads) a token of distance


@jit
def alibi(s, q, k, head, num_heads):
    return s - tl.exp2(-8.0 * (head + 1) / num_heads) * (q - k)


def alibi_torch(s: Tensor, q: Tensor, k: Tensor, head: Tensor, num_heads: int) -> Tensor:
    return s - torch.exp2(-8.0 * (head + 1) / num_heads) * (q - k)


# ---- soft-capping (Gemma 2): scores stay within -30..30


@jit
def softcap(s, q, k, head, num_heads):
    return 30.0 * (2.0 * tl.sigmoid(s / 15.0) - 1.0)  # 30 tanh(s / 30); Triton has no tanh


@jit
def softcap_derivative(s, q, k, head, num_heads):
    p = tl.sigmoid(s / 15.0)
    return 4.0 * p * (1.0 - p)  # 1 - tanh(s / 30)^2


def softcap_torch(s: Tensor, q: Tensor, k: Tensor, head: Tensor, num_heads: int) -> Tensor:
    return 30.0 * torch.tanh(s / 30.0)


SCORE_MODS = {
    "causal": ScoreMod(),
    "sliding_window": ScoreMod(first_key=window_first_key, last_query=window_last_query),
    "alibi": ScoreMod(score=alibi, torch_score=alibi_torch),
    "softcap": ScoreMod(score=softcap, derivative=softcap_derivative, torch_score=softcap_torch),
}


def check_score_mod(name: str) -> None:
    """Raise ValueError unless `name` is an entry of SCORE_MODS."""
    if name not in SCORE_MODS:
        raise ValueError(
            f"score_mod {name!r} is unknown; choose one of {', '.join(SCORE_MODS)}, or add an entry"
        )
