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
                    d score / d s, finite; None: 1
    torch_score     `score` on torch tensors; None: `score` itself

q and k are indices that count from the row's first token. first_key and last_query bound the
kernels' loops, so they must not decrease. Every query must see a key: itself, for example. `score`
and `derivative` never meet a hidden pair: k is at most q and at least first_key(q), so q - k is
never negative, and 0 on the diagonal. What each function may use:

    first_key, last_query   operators only (+ - * // and comparisons): they also get plain integers
    score                   operators only, or tl functions (tl.exp2) with a torch_score beside it;
                            tl.sqrt and the like want a float: (q - k).to(tl.float32)
    derivative              operators and tl functions
    torch_score             torch functions

To add one: write its functions below, add the entry, and run `python -m kernels.flash_attention`
and `python -m kernels.flash_decoding`. Both check every entry against the reference; so do the
tests. One with a number in its name, such as window:256, is an entry of NUMBERED, a function from
the number to a ScoreMod.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.runtime import jit, tl, triton


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
        index tensors.

        Raises ValueError if `score` cannot be called on tensors and there is no `torch_score`.
        """
        if self.score is not None:
            head = torch.arange(s.shape[1], device=s.device).view(-1, 1, 1)
            seen = torch.minimum(k, q)
            if self.first_key is not None:
                seen = torch.maximum(seen, plain(self.first_key)(q))
            try:
                s = (self.torch_score or plain(self.score))(s, q, seen, head, s.shape[1])
            except Exception:
                if self.torch_score is not None:
                    raise
                name = plain(self.score).__name__
                raise ValueError(
                    f"score {name!r} does not take torch tensors; give torch_score beside it"
                ) from None
        return s.masked_fill(~self.torch_visible(q, k), float("-inf"))


def plain(function: Any) -> Callable:
    """The Python function under `jit`, which takes torch tensors as well."""
    return getattr(function, "fn", function)


def with_number(function: Callable, number: float) -> Any:
    """`function` with `number` as its last parameter, jitted: Triton compiles source text and keeps
    what it compiled by that text, so the number must stand in it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    parameter = tree.body[0].args.args.pop().arg
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == parameter:
            node.id = f"({number!r})"
    source, file = ast.unparse(tree) + "\n", f"<{function.__name__} {number!r}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file  # Triton reads it here
    made: dict = {}
    exec(compile(source, file, "exec"), function.__globals__, made)
    return jit(made[function.__name__])


# ---- sliding window: a query sees itself and the size - 1 keys before it


def window_first_key(q, size):
    return q - (size - 1)


def window_last_query(k, size):
    return k + (size - 1)


def window(size: float) -> ScoreMod:
    if type(size) is not int or size < 1:
        raise ValueError("expected a whole number from 1, as in window:256")
    bounds = with_number(window_first_key, size), with_number(window_last_query, size)
    return ScoreMod(*bounds)


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
    "sliding_window": window(64),
    "alibi": ScoreMod(score=alibi, torch_score=alibi_torch),
    "softcap": ScoreMod(score=softcap, derivative=softcap_derivative, torch_score=softcap_torch),
}
NUMBERED: dict[str, Callable[[float], ScoreMod]] = {"window": window}


# ---- for checks alone: it depends on everything that a mod may depend on, and on nothing linearly


@jit
def probe_score(s, q, k, head, num_heads):
    near = (2.0 + head) / (num_heads * (1.0 + 0.1 * (q - k)) * (70.0 - (q - k)))
    return s * near * (30.0 + 0.1 * k) + 3.0 * k / (q + 1.0)


@jit
def probe_derivative(s, q, k, head, num_heads):
    near = (2.0 + head) / (num_heads * (1.0 + 0.1 * (q - k)) * (70.0 - (q - k)))
    return near * (30.0 + 0.1 * k)


# 66 keys, with which the last query of a key tile begins a tile of queries
PROBES = {"probe": window(66)._replace(score=probe_score, derivative=probe_derivative)}


# ---- by name

_found: dict[str, ScoreMod] = {}


def find(name: str) -> ScoreMod:
    """The attention function of a name: an entry of SCORE_MODS, or NAME:NUMBER of NUMBERED.

    Raises ValueError naming the known ones.
    """
    mod = SCORE_MODS.get(name) or PROBES.get(name) or _found.get(name)
    if mod is None:
        head, _, number = name.partition(":")
        if head not in NUMBERED:
            known = ", ".join([*SCORE_MODS, *(f"{each}:NUMBER" for each in NUMBERED)])
            raise ValueError(
                f"score_mod {name!r} is unknown; choose one of {known}, or add an entry"
            )
        try:
            mod = _found[name] = NUMBERED[head](_number(number))
        except ValueError as error:
            raise ValueError(f"score_mod {name!r}: {error}") from None
    return mod


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"expected a number after the colon, found {text!r}") from None


def check_score_mod(name: str) -> None:
    """Raise ValueError unless `find` knows the name."""
    find(name)


def score_mod(text: str) -> str:
    """An argparse type: `text` itself, if it names an attention function."""
    try:
        find(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def reach(name: str) -> int:
    """Queries that see the first key, 0 for all: the width of a window."""
    last = find(name).last_query
    return 0 if last is None else plain(last)(0) + 1


def check_fields(name: str, tokens: int = 1024) -> None:
    """Raise AssertionError unless the fields of a mod agree, over all pairs of so many tokens, or
    of twice its window: bounds do not decrease, last_query is the inverse of first_key, every query
    sees a key, and no score of a visible pair is NaN."""
    mod = find(name)
    n = min(max(tokens, 2 * reach(name)), 2**20)
    i = torch.arange(n)
    first = i * 0 if mod.first_key is None else plain(mod.first_key)(i).clamp_min(0)
    last = i * 0 + n - 1 if mod.last_query is None else plain(mod.last_query)(i).clamp_max(n - 1)
    for what, bound in (("first_key", first), ("last_query", last)):
        assert bool((bound.diff() >= 0).all()), f"{name}: {what} decreases"
    blind = first > i
    exact = torch.searchsorted(first, i, right=True) - 1  # first rises: the last that is at most k
    for k in (last != exact).nonzero()[:1, 0].tolist():
        assert bool(blind.any()), (
            f"{name}: last_query({k}) is {int(last[k])}, but by first_key it is {int(exact[k])}"
        )
    scores = mod.torch_scores(torch.zeros(1, 2, 128, 128), i[:128, None], i[:128])
    for head, q, k in scores.isnan()[0].nonzero()[:1].tolist():
        raise AssertionError(f"{name}: the score of query {q} and key {k}, head {head}, is NaN")
    blind[:128] |= (scores == float("-inf")).all(-1).any(1)[0]
    for q in blind.nonzero()[:1, 0].tolist():
        raise AssertionError(f"{name}: query {q} sees no key; let it see itself, for example")
    for field in ("first_key", "last_query", "score", "derivative"):
        function = getattr(mod, field)
        bare = triton is not None and function is not None and not hasattr(function, "fn")
        assert not bare, f"{name}: {field} is no Triton function; put @jit above it"
