"""What `python -m kernels.<file>` times on a GPU: shapes, baselines, and operations and bytes of
each.

Each function takes the file's public function and its IMPLS (so that no kernel file is imported
twice) and yields the rows that kernels/measure.py prints and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.measure import copies, measure

Rows = Iterator[dict[str, Any]]


def attention_rows(attention: Callable, impls: Mapping[str, Callable]) -> Rows:
    """Causal, GPT-2's heads, 16384 tokens a batch; then rows half full, where SDPA needs a mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def pinned(backend: SDPBackend) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    def masked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        index = torch.arange(q.shape[2], device=q.device)
        visible = (index <= index[:, None]) & (index < lengths[:, None, None, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    dense = {
        "sdpa flash": pinned(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": pinned(SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": pinned(SDPBackend.EFFICIENT_ATTENTION),
    }
    own = {name: partial(attention, impl=name) for name in impls}
    for D, T in [(64, t) for t in (128, 256, 512, 1024, 2048, 4096)] + [(128, 1024), (80, 1024)]:
        H, B = 12, 16384 // T
        for half_full in (False, True):
            functions = own | ({"sdpa mask": masked} if half_full else dense)
            # triangle of T queries, or of T / 2 for rows that are half full on average (lengths T/4
            # and 3T/4)
            pairs = B * H * (T * T / 2 if not half_full else (9 + 1) / 16 / 2 * T * T / 2)
            tokens = B * H * T * (0.5 if half_full else 1.0)

            def make(
                B: int = B, H: int = H, T: int = T, D: int = D, half_full: bool = half_full
            ) -> tuple:
                qkv = torch.randn(
                    B, T, 3, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True
                )
                lengths = torch.tensor(
                    [T // 4, 3 * T // 4], dtype=torch.int32, device="cuda"
                ).repeat(B // 2)
                return *(
                    qkv[:, :, i].transpose(1, 2) for i in range(3)
                ), lengths if half_full else None

            inputs = copies(make, 6 * B * H * T * D)
            shape = f"B={B} H={H} T={T} D={D}" + (" half full" if half_full else "")
            for name, function in functions.items():
                about = {"impl": name, "shape": shape, "dtype": "bfloat16"}
                try:
                    with torch.no_grad():
                        row = measure(function, inputs, 4 * pairs * D, 8 * tokens * D)
                    yield about | {"direction": "forward"} | row
                    outs = [(function(*x), *x[:3]) for x in inputs]
                    backward = partial(_backward_only, torch.randn_like(outs[0][0]))
                    yield (
                        about
                        | {"direction": "backward"}
                        | measure(backward, outs, 10 * pairs * D, 16 * tokens * D)
                    )
                except RuntimeError as error:  # a backend that does not take this shape
                    yield about | {"direction": "forward", "note": str(error).splitlines()[0][:80]}


def _backward_only(grad: Tensor, out: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(out, inputs, grad, retain_graph=True)


def logprobs_rows(logprobs: Callable, impls: Mapping[str, Callable]) -> Rows:
    """GPT-2's four widths and vocabulary; eager and compiled log-softmax beside this file's
    entries."""

    def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _log_softmax(hidden.float() @ weight.float().T, targets)

    def eager_half(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # Fast products, but the logits are rounded.
        return _log_softmax((hidden @ weight.T).float(), targets)

    functions = {name: partial(logprobs, impl=name) for name in impls}
    functions |= {
        "eager": eager,
        "eager bf16": eager_half,
        "compiled": torch.compile(eager_half, dynamic=False),
    }
    V = 50257
    for C, N in [(768, n) for n in (2048, 8192, 32768, 65536)] + [
        (c, 8192) for c in (1024, 1280, 1600)
    ]:

        def make(C: int = C, N: int = N) -> tuple:
            options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
            weight = (torch.randn(V, C, device="cuda") * 0.05).bfloat16().requires_grad_()
            return torch.randn(N, C, **options), weight, torch.randint(V, (N,), device="cuda")

        inputs = copies(make, 2 * (N + V) * C)
        for name, function in functions.items():
            about = {"impl": name, "shape": f"N={N} V={V} C={C}", "dtype": "bfloat16"}
            with torch.no_grad():
                row = measure(function, inputs, 2.0 * N * V * C, 2.0 * (N + V) * C)
            yield about | {"direction": "forward"} | row
            both = partial(_forward_backward, function)
            row = measure(both, inputs, 8.0 * N * V * C, 4.0 * (N + V) * C)
            yield about | {"direction": "both"} | row


def _log_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _forward_backward(function: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    chosen, entropy = function(hidden, weight, targets)
    torch.autograd.grad(chosen.sum() + 0.01 * entropy.sum(), (hidden, weight))


def decode_attention_rows(decode_attention: Callable, impls: Mapping[str, Callable]) -> Rows:
    """GPT-2's widths over a cache that is full, and half full on average (lengths S/4 and 3S/4)."""

    def sdpa_mask(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        visible = (torch.arange(k.shape[2], device=q.device) < lengths[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=visible)

    functions = {name: partial(decode_attention, impl=name) for name in impls} | {
        "sdpa mask": sdpa_mask
    }
    small = [(12, 1, 1024), (12, 64, 512), (12, 256, 512), (12, 256, 1024)]  # heads, rows, cache
    for H, B, S in small + [(16, 128, 1024), (20, 128, 1024), (25, 64, 1024)]:
        for half_full in (False, True):

            def make(B: int = B, H: int = H, S: int = S, half_full: bool = half_full) -> tuple:
                options = {"device": "cuda", "dtype": torch.bfloat16}
                lengths = torch.full((B,), S, dtype=torch.int32, device="cuda")
                if half_full:
                    lengths[::2], lengths[1::2] = S // 4, 3 * S // 4
                return (
                    torch.randn(B, H, 64, **options),
                    *(torch.randn(B, H, S, 64, **options) for _ in "kv"),
                    lengths,
                )

            inputs = copies(make, 4 * B * H * S * 64)
            keys = float(inputs[0][3].sum()) * H
            shape = f"B={B} H={H} S={S} D=64" + (" half full" if half_full else "")
            for name, function in functions.items():
                row = measure(function, inputs, 4 * keys * 64, 4 * keys * 64)
                yield {
                    "impl": name,
                    "shape": shape,
                    "dtype": "bfloat16",
                    "direction": "forward",
                } | row
