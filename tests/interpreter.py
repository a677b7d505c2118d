"""Helpers of the kernel tests: where they run, what the interpreter did, and memory with enormous
strides."""

import mmap
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import runtime

needs_triton = pytest.mark.skipif(runtime.triton is None, reason="Triton is not installed")
_NO_RESERVE = 0x4000  # Linux MAP_NORESERVE: address space that gets memory when it is written


def each(impls: Mapping[str, Callable]) -> list:
    """Parameters: every implementation, those that need Triton skipped where it is missing."""
    return [
        pytest.param(name, marks=needs_triton if runtime.needs_triton(impl) else ())
        for name, impl in impls.items()
    ]


def gpu_tables(tiles: dict, interpreter: tuple) -> list:
    """Parameters: the different rows of a tile table for GPUs, those of 16 bits on sm_90 by
    default, the others as slow tests."""
    rows = {row: key for key, row in reversed(tiles.items()) if key != interpreter}
    slow = {row: () if key[:2] == ("sm_90", 2) else pytest.mark.slow for row, key in rows.items()}
    return [
        pytest.param(row, marks=(needs_triton, *([slow[row]] if slow[row] else [])), id=f"{row}")
        for row in rows
        if row != tiles[interpreter]
    ]


def gpu_or_cpu() -> str:
    """Kernels run on the GPU if there is one, else in Triton's interpreter."""
    return "cpu" if runtime.INTERPRETED or not torch.cuda.is_available() else "cuda"


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=gpu_or_cpu())


def count_calls(monkeypatch: pytest.MonkeyPatch, operation: str) -> list[tuple]:
    """A list that gets the arguments of every call of one operation of the interpreter, such as
    "create_dot"."""
    from triton.runtime.interpreter import interpreter_builder

    calls: list[tuple] = []
    original = getattr(interpreter_builder, operation)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(interpreter_builder, operation, counted)
    return calls


def far_apart(rows: int, stride: int, columns: int) -> Tensor:
    """Random float16 (rows, columns) whose rows lie `stride` elements apart; only the pages they
    touch are real.

    2^31 elements before the first are there as well: an offset that wraps reads zeros instead of
    ending the process.
    """
    before = 2**31
    elements = before + (rows - 1) * stride + columns
    if gpu_or_cpu() == "cuda":
        memory = torch.empty(elements, dtype=torch.float16, device="cuda")
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)
    x = memory.as_strided((rows, columns), (stride, 1), before)
    x.copy_(torch.randn(rows, columns))
    return x


def opcheck(operator: Any, arguments: list) -> None:
    """torch.library.opcheck with the first element, a sequence of tensors, spread out."""
    torch.library.opcheck(operator, (*arguments[0], *arguments[1:]))
