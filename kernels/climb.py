"""What the ladders share: a rung is verified by the check of the shipped kernels, counted by
kernels/watch.py, timed where there is a GPU.

A ladder is a module with LADDER (name -> Rung), GROUPS (title of a group of columns -> the first
letters of the columns), and functions `verify(name, dtype, device)`, `counts(run)` (a Count for
each group), `times(name)`. Its docstring has the table, which a test compares with `table`.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.bench import time_ms
from kernels.runtime import INTERPRETED, triton
from kernels.watch import watching


class Rung(NamedTuple):
    """An implementation, and the functions that are new in it."""

    run: Callable
    parts: tuple[Any, ...]


def check_type(x: Tensor) -> None:
    """Raise ValueError unless there is Triton and a rung is right for x's dtype where it runs."""
    if triton is None:
        raise ValueError("a rung got no Triton: it is not installed; rungs in torch run without")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"a rung got {x.dtype}; expected float32, float16 or bfloat16")
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise ValueError(
            "a rung got bfloat16 in Triton's interpreter, whose bfloat16 products are wrong; use "
            "float32 or float16 there"
        )


@contextmanager
def entered(module: Any, name: str, run: Callable, keep: Callable) -> Iterator[None]:
    """Inside, `run` is an implementation of the operation in `module`, whose verify has only the
    cases that `keep` accepts."""
    cases = module.CASES
    module.IMPLS[name], module.CASES = run, [case for case in cases if keep(case)]
    try:
        yield
    finally:
        module.CASES = cases
        del module.IMPLS[name]


class Traffic(TorchDispatchMode):
    """Bytes and multiplications of torch operations, and the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.multiplications = self.largest = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if op.is_view or op.namespace == "kernels":
            return result
        self.largest = max([self.largest, *(x.numel() * x.element_size() for x in results)])
        name = op._schema.name.removeprefix("aten::")
        if "empty" not in name:  # memory that nobody has written yet
            moved = results + [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in moved)
        if name.rstrip("_") in ("mm", "bmm", "addmm"):
            self.multiplications += result.numel() * args[-2].shape[-1]
        return result


class Count(NamedTuple):
    """One column group of the table: MB, million products, MB of the largest tensor; tiles."""

    mb: float
    products: float
    largest: float
    tiles: int


def count(work: Callable[[], Any], tensors: tuple[str, ...], sizes: dict[int, int]) -> Count:
    """What `work` does, in Triton and in torch. `tiles`: how many tiles its programs load of the
    tensor that has one of the names `tensors`; see Watch.tiles."""
    with watching() as watch, Traffic() as traffic:
        work()
    tiles = 0
    for kernel, name in watch.shapes:
        if name in tensors:
            tiles += sum(map(len, watch.tiles(kernel, "load", name, sizes).values()))
    products = traffic.multiplications + watch.multiplications.total()
    return Count(
        watch.megabytes() + traffic.bytes / 1e6, products / 1e6, traffic.largest / 1e6, tiles
    )


def lines(rung: Rung) -> int:
    """Lines of code of a rung's own functions: not blank, no comment, no docstring."""
    total = 0
    for part in rung.parts:
        part = getattr(part, "fn", part)  # the Python function under `jit`
        code = inspect.getsource(part).replace(part.__doc__, "")
        kept = (line.strip() for line in code.splitlines())
        total += sum(bool(line) and line != '""""""' and line[0] != "#" for line in kept)
    return total


def row(name: str, size: str, groups: list[Count | str], columns: Iterable[str]) -> str:
    """A line of the table; `columns` says what each group shows, by first letters."""
    width = {"t": (5, 0), "m": (8, 2), "p": (9, 1), "l": (8, 2)}  # and digits after the point
    cells = []
    for group, letters in zip(groups, columns, strict=True):
        if isinstance(group, str):
            cells.append(group.center(sum(width[x][0] for x in letters)))
        else:
            value = dict(zip("mplt", group, strict=True))
            texts = [(f"{value[x]:.{width[x][1]}f}" if value[x] else "-", x) for x in letters]
            cells.append("".join(text.rjust(width[x][0]) for text, x in texts))
    return f"{name:18}{size:>6} |" + " |".join(cells).rstrip()


def table(ladder: Any, names: list[str]) -> str:
    """The counts of these rungs, and of the shipped kernels if all are asked for."""
    columns = ladder.GROUPS.values()
    below = [
        "".join(
            {"t": "tiles", "m": "      MB", "p": " products", "l": " largest"}[x] for x in letters
        )
        for letters in columns
    ]
    out = [row("", "", list(ladder.GROUPS), columns), row("rung", "lines", below, columns)]
    for name in names:
        rung = ladder.LADDER[name]
        out.append(row(name, str(lines(rung)), ladder.counts(rung.run), columns))
    if len(names) == len(ladder.LADDER):
        out.append(row("shipped", "", ladder.counts(None), columns))
    return "\n".join(out)


def forward_and_backward(run: Callable, inputs: tuple, *d_out: Tensor) -> str:
    """Medians of the two directions, as text."""
    with torch.no_grad():
        forward = time_ms(run, [inputs])[1]
    out = run(*inputs)
    out = (out,) if isinstance(out, Tensor) else out
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    backward = time_ms(lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True), [()])[1]
    return f" |{forward:9.3f}{backward:9.3f}"


def climb(ladder: Any, description: str) -> None:
    """`main` of a ladder: verify its rungs, print the table. On a GPU the counts, which need the
    interpreter, come from the docstring, and times stand beside them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rung", type=int, choices=range(len(ladder.LADDER)), help="only this one")
    number = parser.parse_args().rung
    names = [name for i, name in enumerate(ladder.LADDER) if number in (None, i)]
    if triton is None:
        sys.exit("the ladder needs Triton, which is not installed")
    device = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
    for name in names:
        for dtype in (torch.float32, torch.float16 if device == "cpu" else torch.bfloat16):
            torch.manual_seed(0)
            error = ladder.verify(name, dtype, device)
            print(f"{name:18} {str(dtype)[6:]:9} largest relative error {error:.1e}", flush=True)
    if device == "cpu":
        print(f"\n{table(ladder, names)}")
        return
    print("\n(on the right: milliseconds on this GPU, forward and backward)")
    for line in ladder.__doc__.splitlines():
        if " |" in line:
            known = [name for name in (*names, "shipped") if line.strip().startswith(name)]
            print(line + (ladder.times(known[0]) if known else ""), flush=True)
