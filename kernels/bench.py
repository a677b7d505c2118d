"""What the benchmark of every kernel file shares, and what the benchmarks time.

A benchmark row is one implementation on one shape: the 20th, 50th and 80th percentile of the time,
the rate, the rate as a fraction of what the GPU can do, and the peak of the memory it takes beside
its inputs. Rows go to kernels/results/<kernel>_<GPU>.csv with hardware and versions, and to a
figure beside it.

The functions at the end yield those rows. Each takes its file's public function and IMPLS as
arguments, so that no kernel file is imported twice.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime import triton

# GPU -> operations a second of dense 16-bit matrix products and bytes a second of memory copies,
# both measured. A GPU that is not listed gets no fraction of the bound.
BOUNDS = {"H200": (790e12, 4.3e12)}
RESULTS = Path(__file__).parent / "results"


# ---- times


def bounds() -> tuple[float, float] | None:
    """(operations, bytes) a second of the GPU at hand, if it is listed."""
    name = torch.cuda.get_device_name()
    return next((value for key, value in BOUNDS.items() if key in name), None)


def time_ms(
    function: Callable[..., Any], inputs: list[tuple], seconds: float = 0.3
) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile in milliseconds of function(*inputs[i]), measured by CUDA
    events.

    `inputs` are the same work on different memory. Calls take them in turn, so that none finds its
    data in the cache.
    """
    for item in inputs[:3]:
        function(*item)
    times: list[float] = []
    while sum(times) < 1000 * seconds and len(times) < 500 or len(times) < 10:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(*inputs[len(times) % len(inputs)])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(torch.tensor(times, dtype=torch.float64).quantile(shares).tolist())


def copies(make: Callable[[], tuple], byte_count: int) -> list[tuple]:
    """Enough independent inputs to exceed a 60 MB cache twice, at least 2 and at most 16."""
    return [make() for _ in range(min(16, max(2, 120_000_000 // max(byte_count, 1))))]


def measure(
    function: Callable[..., Any], inputs: list[tuple], operations: float, byte_count: float
) -> dict[str, Any]:
    """One benchmark row: times, rates, fraction of the bound (the larger of the two times at
    BOUNDS), peak memory.

    Running out of memory is a result too: a row with a note and no numbers.
    """
    try:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*inputs[0])
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        low, middle, high = time_ms(function, inputs)
    except torch.cuda.OutOfMemoryError:
        return {"note": "out of memory"}
    row = {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "peak_mib": peak / 2**20}
    row |= {"tflop_per_s": operations / middle / 1e9, "gb_per_s": byte_count / middle / 1e6}
    if (limit := bounds()) is not None:
        row["fraction"] = max(operations / limit[0], byte_count / limit[1]) / (middle / 1e3)
    return {k: f"{v:.4g}" for k, v in row.items()}


FIELDS = ["kernel", "impl", "direction", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms"]
FIELDS += ["tflop_per_s", "gb_per_s", "fraction", "peak_mib", "note", "gpu", "torch", "triton"]


def benchmark(kernel: str, rows: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Print the rows as they come, write them to the results folder with a figure; without a GPU,
    say so and stop."""
    if not torch.cuda.is_available():
        print(f"No CUDA GPU: nothing was timed. On one, run: python -m kernels.{kernel}")
        return
    gpu = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": getattr(triton, "__version__", "")}
    about = {"kernel": kernel, "gpu": gpu} | versions
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{kernel}_{gpu.replace(' ', '_')}.csv"
    done = []
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        for row in rows():
            done.append(about | row)
            writer.writerow(done[-1])
            file.flush()
            numbers = " ".join(f"{name} {row[name]}" for name in FIELDS[5:-3] if name in row)
            what = f"{row['shape']:34} {row['direction']:8} {row['impl']:14}"
            print(what, numbers, flush=True)
    print(f"wrote {path}")
    draw(path.with_suffix(".png"), done)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A panel for each direction: median time of every implementation over the shapes, log
    scale."""
    from matplotlib.figure import Figure  # only here: the kernels run without it

    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure = Figure(figsize=(8, 4 * len(directions)), layout="constrained")
    panels = figure.subplots(len(directions), squeeze=False)[:, 0]
    for axes, direction in zip(panels, directions, strict=True):
        here = [row for row in rows if row["direction"] == direction and "p50_ms" in row]
        shapes = list(dict.fromkeys(row["shape"] for row in here))
        for impl in dict.fromkeys(row["impl"] for row in here):
            mine = [row for row in here if row["impl"] == impl]
            x = [shapes.index(row["shape"]) for row in mine]
            axes.plot(x, [float(row["p50_ms"]) for row in mine], marker="o", label=impl)
        axes.set(ylabel="milliseconds (median)", yscale="log")
        axes.set_title(f"{direction} on {rows[0]['gpu']}")
        axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
        axes.legend()
    figure.savefig(path)
    print(f"wrote {path}")


# ---- what is timed: shapes, baselines, operations and bytes of each

Rows = Iterator[dict[str, Any]]
GPU_HALF = {"device": "cuda", "dtype": torch.bfloat16}
GPU_INDEX = {"device": "cuda", "dtype": torch.int32}


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
            # The triangle of T queries; half full on average (lengths T/4 and 3T/4), that of T/4
            # or 3T/4 queries.
            pairs = B * H * (T * T / 2 if not half_full else (9 + 1) / 16 / 2 * T * T / 2)
            tokens = B * H * T * (0.5 if half_full else 1.0)
            inputs = copies(partial(_qkv, B, H, T, D, half_full), 6 * B * H * T * D)
            shape = f"B={B} H={H} T={T} D={D}" + (" half full" if half_full else "")
            for name, function in functions.items():
                about = {"impl": name, "shape": shape, "dtype": "bfloat16"}
                try:
                    with torch.no_grad():
                        row = measure(function, inputs, 4 * pairs * D, 8 * tokens * D)
                    yield about | {"direction": "forward"} | row
                    outs = [(function(*x), *x[:3]) for x in inputs]
                    backward = partial(_backward_only, torch.randn_like(outs[0][0]))
                    row = measure(backward, outs, 10 * pairs * D, 16 * tokens * D)
                    yield about | {"direction": "backward"} | row
                except RuntimeError as error:  # a backend that does not take this shape
                    yield about | {"direction": "forward", "note": str(error).splitlines()[0][:80]}


def _qkv(B: int, H: int, T: int, D: int, half_full: bool) -> tuple:
    qkv = torch.randn(B, T, 3, H, D, **GPU_HALF, requires_grad=True)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    lengths = torch.tensor([T // 4, 3 * T // 4], **GPU_INDEX).repeat(B // 2)
    return q, k, v, lengths if half_full else None


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
    compiled = torch.compile(eager_half, dynamic=False)
    functions |= {"eager": eager, "eager bf16": eager_half, "compiled": compiled}
    V = 50257
    small = [(768, 2048), (768, 8192), (768, 32768), (768, 65536)]  # C, N
    for C, N in small + [(1024, 8192), (1280, 8192), (1600, 8192)]:
        inputs = copies(partial(_hidden_weight_targets, N, V, C), 2 * (N + V) * C)
        for name, function in functions.items():
            about = {"impl": name, "shape": f"N={N} V={V} C={C}", "dtype": "bfloat16"}
            with torch.no_grad():
                row = measure(function, inputs, 2.0 * N * V * C, 2.0 * (N + V) * C)
            yield about | {"direction": "forward"} | row
            both = partial(_forward_backward, function)
            row = measure(both, inputs, 8.0 * N * V * C, 4.0 * (N + V) * C)
            yield about | {"direction": "both"} | row


def _hidden_weight_targets(N: int, V: int, C: int) -> tuple:
    hidden = torch.randn(N, C, **GPU_HALF, requires_grad=True)
    weight = (torch.randn(V, C, device="cuda") * 0.05).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(V, (N,), device="cuda")


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

    functions = {name: partial(decode_attention, impl=name) for name in impls}
    functions["sdpa mask"] = sdpa_mask
    small = [(12, 1, 1024), (12, 64, 512), (12, 256, 512), (12, 256, 1024)]  # heads, rows, cache
    for H, B, S in small + [(16, 128, 1024), (20, 128, 1024), (25, 64, 1024)]:
        for half_full in (False, True):
            inputs = copies(partial(_query_cache, B, H, S, half_full), 4 * B * H * S * 64)
            keys = float(inputs[0][3].sum()) * H
            shape = f"B={B} H={H} S={S} D=64" + (" half full" if half_full else "")
            about = {"shape": shape, "dtype": "bfloat16", "direction": "forward"}
            for name, function in functions.items():
                row = measure(function, inputs, 4 * keys * 64, 4 * keys * 64)
                yield {"impl": name} | about | row


def _query_cache(B: int, H: int, S: int, half_full: bool) -> tuple:
    q, k, v = (torch.randn(shape, **GPU_HALF) for shape in [(B, H, 64), *2 * [(B, H, S, 64)]])
    lengths = torch.full((B,), S, **GPU_INDEX)
    if half_full:
        lengths[::2], lengths[1::2] = S // 4, 3 * S // 4
    return q, k, v, lengths
