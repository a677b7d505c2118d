"""Errors and times: what the check and the benchmark of every kernel file share.

A benchmark row is one implementation on one shape: the 20th, 50th and 80th percentile of the time,
the rate, the rate as a fraction of what the GPU can do, and the peak of the memory it takes beside
its inputs. Rows go to kernels/results/<kernel>_<GPU>.csv with hardware and versions, and to a
figure beside it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.runtime import triton

# Largest error, relative to the largest entry, that rounding explains: inputs are exact in float64,
# sums are float32 (or wider), and 16-bit results, probabilities and their gradients are rounded a
# few times.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Dense 16-bit matrix products (operations a second) and memory copies (bytes a second), measured
# on a GPU of that name; one that is not listed gets no fraction of the bound.
BOUNDS = {"H200": (790e12, 4.3e12)}
RESULTS = Path(__file__).parent / "results"


def compare(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest error of `actual` relative to the largest entry of `expected`.

    Raises AssertionError naming `what` if it is above `tolerance`, or if a shape differs or a
    number is not finite.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return 0.0
    assert bool(actual.isfinite().all()), f"{what}: not finite"
    error = (
        actual.double() - expected.double()
    ).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    if not bool(expected.any()):
        error = actual.abs().max()
    assert error <= tolerance, f"{what}: error {error:.1e} is above {tolerance:.1e}"
    return float(error)


def verify_all(impls: Iterable[str], verify: Callable[[str, torch.dtype, str], float]) -> None:
    """Run `verify(impl, dtype, device)` for each implementation and print its largest error; a
    mismatch raises."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for impl in impls:
        if impl.startswith("triton") and triton is None:
            print(f"{impl:16} skipped: Triton is not installed")
            continue
        # Triton's interpreter is wrong in bfloat16, PyTorch's CPU kernels are not worth checking in
        # float16
        for dtype in [torch.float32, torch.bfloat16 if device == "cuda" else torch.float16]:
            torch.manual_seed(0)
            error = verify(impl, dtype, device)
            print(f"{impl:16} {str(dtype)[6:]:9} largest relative error {error:.1e}")
    print("All implementations match the reference.")


def bounds() -> tuple[float, float] | None:
    """(operations, bytes) a second of the GPU at hand, if it is listed."""
    name = torch.cuda.get_device_name()
    return next((value for key, value in BOUNDS.items() if key in name), None)


def time_ms(
    function: Callable[..., Any], inputs: list[tuple], seconds: float = 0.3
) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile in milliseconds of function(*inputs[i]), measured by CUDA
    events.

    `inputs` are equal work on different memory, used in turn, so that no call finds its data in the
    cache.
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
    return tuple(
        torch.tensor(times, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8]).double())
        .tolist()
    )


def copies(make: Callable[[], tuple], byte_count: int) -> list[tuple]:
    """Enough independent inputs to exceed a 60 MB cache twice, at least 2 and at most 16."""
    return [make() for _ in range(min(16, max(2, 120_000_000 // max(byte_count, 1))))]


def measure(
    function: Callable[..., Any], inputs: list[tuple], operations: float, byte_count: float
) -> dict[str, Any]:
    """One benchmark row: times, rates, fraction of the bound (the larger of the two times at
    BOUNDS), peak memory.

    An implementation that runs out of memory gets an empty row, because that is a result.
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


FIELDS = [
    "kernel",
    "impl",
    "direction",
    "shape",
    "dtype",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "tflop_per_s",
    "gb_per_s",
]
FIELDS += ["fraction", "peak_mib", "note", "gpu", "torch", "triton"]


def benchmark(kernel: str, rows: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Print the rows as they come, write them to the results folder with a figure; without a GPU,
    say so and stop."""
    if not torch.cuda.is_available():
        print(f"No CUDA GPU: nothing was timed. On one, run: python -m kernels.{kernel}")
        return
    gpu = torch.cuda.get_device_name()
    about = {
        "kernel": kernel,
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", ""),
    }
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
            print(f"{row['shape']:34} {row['direction']:8} {row['impl']:14}", end=" ")
            print(
                " ".join(f"{name} {row[name]}" for name in FIELDS[5:-3] if name in row), flush=True
            )
    print(f"wrote {path}")
    draw(path.with_suffix(".png"), done)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A panel for each direction: median time of every implementation over the shapes, log
    scale."""
    from matplotlib.figure import Figure  # only here: the kernels run without it

    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure = Figure(figsize=(8, 4 * len(directions)), layout="constrained")
    for axes, direction in zip(
        figure.subplots(len(directions), squeeze=False)[:, 0], directions, strict=True
    ):
        here = [row for row in rows if row["direction"] == direction and "p50_ms" in row]
        shapes = list(dict.fromkeys(row["shape"] for row in here))
        for impl in dict.fromkeys(row["impl"] for row in here):
            points = [
                (shapes.index(r["shape"]), float(r["p50_ms"])) for r in here if r["impl"] == impl
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=impl)
        axes.set(
            title=f"{direction} on {rows[0]['gpu']}", ylabel="milliseconds (median)", yscale="log"
        )
        axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
        axes.legend()
    figure.savefig(path)
    print(f"wrote {path}")
