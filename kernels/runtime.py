"""Which implementation runs, on a GPU or in Triton's interpreter; checks that the kernels share.

Triton is optional. Without it `jit` returns a kernel as it is, an ordinary function that nobody
calls, and `impl="triton"` is an error. TRITON_INTERPRET=1, set before Triton is imported, runs the
kernels on CPU tensors in Triton's interpreter: slow, but the same program as on a GPU. The
interpreter is right in float32 and float16; its bfloat16 products are wrong, so they are refused.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import OPERATIONS

try:
    import triton
    import triton.language as tl
except ImportError:  # not Linux, or not installed: the torch implementations do everything
    triton = None
    tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def jit(function: Callable) -> Any:
    """`triton.jit` where Triton is installed; the bare function elsewhere.

    An argument named T, N, S or V is a size that may change with every call, so Triton compiles no
    special version of the kernel for a size of 1 or a multiple of 16.
    """
    if triton is None:
        return function
    sizes = {"T", "N", "S", "V"} & set(inspect.signature(function).parameters)
    return triton.jit(function, do_not_specialize=sorted(sizes))


class Launch(NamedTuple):
    """One kernel launch as `recording` keeps it."""

    kernel: Any
    args: tuple
    constants: dict[str, Any]


_recorded: list[Launch] | None = None
_recorded_class = ""


@contextmanager
def recording(gpu: str) -> Iterator[list[Launch]]:
    """Within the block, note launches for a GPU of class `gpu` instead of running them
    (kernels/compile.py)."""
    global _recorded, _recorded_class
    _recorded, _recorded_class = [], gpu
    try:
        yield _recorded
    finally:
        _recorded = None


def fake(operator: Any, host: Callable) -> Callable[[Callable], None]:
    """A decorator: the function tells torch.compile what `operator` returns. While `recording`, the
    operator's `host` function does, so that its launches are noted."""

    def register(function: Callable) -> None:
        def run(*args: Any) -> Any:
            return (function if _recorded is None else host)(*args)

        operator.register_fake(run)

    return register


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), or a note of it while `recording`.

    Raises ValueError where Triton cannot run on the tensors.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, constants))
    elif 0 not in grid:
        _check_triton(f"kernel {kernel.__name__!r}", args[0])
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            kernel[grid](*args, **constants)


def gpu_class(tensor: Tensor) -> str:
    """The row of the tile tables for the device of `tensor`.

    "sm_90" is Hopper and data-centre Blackwell (about 227 KiB of shared memory a block). "sm_80" is
    every other GPU: its tiles fit the 99 KiB of consumer GPUs.
    """
    if _recorded is not None:
        return _recorded_class
    if not tensor.is_cuda:
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(tensor.device)[0] in (9, 10) else "sm_80"


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the device of `tensor`; 8 in the interpreter, so that it splits its grids
    too."""
    if not tensor.is_cuda:
        return 8 if _recorded is None else 132
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def check_tiles(tensor: Tensor) -> None:
    """Raise ValueError for float64, which has tiles in the interpreter alone."""
    if tensor.dtype == torch.float64 and gpu_class(tensor) != "interpreter":
        raise ValueError("Triton has no float64 tiles for a GPU; use float32 or impl='torch'")


def accumulator(dtype: torch.dtype) -> Any:
    """(torch dtype, Triton dtype) of sums over `dtype`: float32, or float64 for float64."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def scaled(*gradients: Tensor | None, over: float = 1.0) -> tuple[Any, ...]:
    """The gradients divided by `over` times their largest finite entry, and that divisor, a tensor
    of one number (so nothing waits for a GPU). In float16, what is computed from them neither
    overflows nor vanishes."""
    sizes = [g.abs().nan_to_num(0.0, 0.0).amax() for g in gradients if g is not None and g.numel()]
    size = torch.stack(sizes).amax() if sizes else torch.ones(())
    size = torch.where(size > 0, size, torch.ones_like(size)) * over
    return *(None if g is None else g / size for g in gradients), size


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b without rounding the product to 16 bits, and that total; `total` is float32, or
    float64 for float64."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a CPU has no 16-bit product with float32 results
        total.addmm_(a.float(), b.float())
    return total


# ---- implementations: the entries of IMPLS


@dataclass(frozen=True)
class Impl:
    """An implementation with what it needs. A plain function in IMPLS is one that needs nothing."""

    function: Callable
    needs_triton: bool = False  # to be refused by name where Triton cannot run

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def needs_triton(impl: Callable) -> bool:
    """Whether an entry of IMPLS launches Triton kernels."""
    return getattr(impl, "needs_triton", False)


def _impls(operation: str) -> Mapping[str, Callable]:
    return import_module(f"kernels.{OPERATIONS[operation]}").IMPLS


@lru_cache
def names(impl: str) -> dict[str, str]:
    """Operation -> name of its implementation.

    `impl` is one name for all operations, or "operation=name,operation=name", where an operation
    that is not named gets "auto". Raises ValueError for an operation that there is not.
    """
    if "=" not in impl:
        return dict.fromkeys(OPERATIONS, impl)
    chosen = dict.fromkeys(OPERATIONS, "auto")
    parts = [part.partition("=") for part in impl.split(",")]
    for operation, _, name in parts:
        if operation not in OPERATIONS:
            raise ValueError(
                f"impl {impl!r} has an unknown operation {operation!r}; choose from "
                f"{', '.join(OPERATIONS)}, as in attention=triton,logprobs=torch"
            )
        if [each for each, *_ in parts].count(operation) > 1:
            raise ValueError(f"impl {impl!r} names {operation} twice; give one")
        chosen[operation] = name
    return chosen


def implementation(text: str) -> str:
    """An argparse type: `text` itself, if the operations have the implementations it names: one
    name is enough if one of them has it; the others fall back to "auto", see `resolve`.

    Raises argparse.ArgumentTypeError naming the unknown word and the known ones.
    """
    try:
        for operation in OPERATIONS if text != "auto" else ():
            _named(text, operation, _impls(operation))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def resolve(impl: str, device: str) -> str:
    """`impl` as it will run on a kind of device: "auto" is "triton" on "cuda" where Triton is
    installed, "torch" elsewhere. One name, or "operation=name,..." where operations differ."""
    auto = "triton" if device == "cuda" and triton is not None else "torch"
    chosen = dict.fromkeys(OPERATIONS, "auto")
    if impl != "auto":
        chosen = {each: _named(impl, each, _impls(each)) for each in OPERATIONS}
    chosen = {key: auto if name == "auto" else name for key, name in chosen.items()}
    if len(set(chosen.values())) == 1:
        return chosen["attention"]
    return ",".join(f"{operation}={name}" for operation, name in chosen.items())


def choose(impl: str, operation: str, impls: Mapping[str, Callable], tensor: Tensor) -> Callable:
    """The entry of `impls`, the implementations of `operation`, that `impl` names (see `names`);
    "auto" is Triton on CUDA and torch elsewhere, and so is a name that other operations alone have.

    Raises ValueError for a name that no operation has, for one that is not in `impls` and given as
    "operation=name", and for an entry that needs Triton where it cannot run on `tensor`.
    """
    name = _named(impl, operation, impls)
    if name == "auto":
        name = resolve(name, tensor.device.type)
    if needs_triton(impls[name]):
        _check_triton(f"impl {name!r}", tensor)
    return impls[name]


def _named(impl: str, operation: str, impls: Mapping[str, Callable]) -> str:
    """The name in `impls` that `impl` means for `operation`, or "auto"."""
    name = names(impl)[operation]
    if name == "auto" or name in impls:
        return name
    others = [other for other in OPERATIONS if other != operation]
    if "=" not in impl and any(name in _impls(other) for other in others):
        return "auto"
    raise ValueError(
        f"impl {name!r} is unknown to {operation}; choose one of auto, {', '.join(impls)}"
    )


def _check_triton(what: str, tensor: Tensor) -> None:
    if triton is None:
        raise ValueError(
            f"{what} needs Triton, which is not installed; install it or use impl='torch'"
        )
    if not INTERPRETED and not tensor.is_cuda:
        raise ValueError(
            f"{what} got tensors on {tensor.device}; move them to CUDA, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter, "
            "or use impl='torch'"
        )
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        raise ValueError(
            f"{what} got bfloat16 in Triton's interpreter, whose bfloat16 products "
            "are wrong; use float32 or float16 there"
        )


# ---- checks


def may_read(tensor: Tensor) -> bool:
    """Whether reading a value is free: it is not on CUDA, where it waits for the GPU, nor while
    torch.compile traces."""
    return not tensor.is_cuda and not torch.compiler.is_compiling()


def check_floats(**tensors: Tensor) -> None:
    """Check that all are floating point, on one device, of one dtype, with last stride 1.

    Raises ValueError naming the argument, what it is and the remedy.
    """
    first_name, first = next(iter(tensors.items()))
    if first.dtype not in FLOATS:
        raise ValueError(
            f"{first_name} has dtype {first.dtype}; expected one of {', '.join(map(str, FLOATS))}"
        )
    for name, x in tensors.items():
        if x.dtype != first.dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype} but {first_name} has {first.dtype}; convert one"
            )
        if x.device != first.device:
            raise ValueError(
                f"{name} is on {x.device} but {first_name} is on {first.device}; move one of them"
            )
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name} has last stride {x.stride(-1)}; expected 1: call .contiguous() on it"
            )


def check_lengths(lengths: Tensor, rows: int, longest: int, device: torch.device) -> None:
    """Check `lengths`: (rows,) int32 on `device`; where reading is free, also 0 <= value <=
    longest."""
    if lengths.shape != (rows,):
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}; expected ({rows},), one length a row"
        )
    if lengths.dtype != torch.int32:
        raise ValueError(
            f"lengths has dtype {lengths.dtype}; expected torch.int32: call .int() on it"
        )
    if lengths.device != device:
        raise ValueError(
            f"lengths is on {lengths.device}; expected {device}, where the other tensors are"
        )
    if rows and may_read(lengths):
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > longest:
            raise ValueError(f"lengths has value {low if low < 0 else high}; expected 0..{longest}")
