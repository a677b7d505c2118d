"""What a kernel reads and writes: every access checked, traced and counted in Triton's interpreter.

    with watching() as watch:
        attention(q, k, v, impl="triton")
    print(watch.table())      for each tensor of each kernel: times, MB requested, distinct MB

Inside the block an access outside the tensor that the kernel was given raises OutOfBounds, which
names kernel, program, tensor, index and line. (On a GPU it reads a neighbour's memory or ends the
process.) A pointer belongs to the argument it was computed from, so an address that lies by chance
in another argument is outside too. Elements of a tensor must not overlap, except by stride 0. Any
other error of a kernel is raised as it began, without the interpreter's own around it. Blocks may
be nested: each sees all that happens in it. The verify of each kernel file is such a block
(check.py: guarded).

MB are 10^6 bytes. *Requested* counts an element every time a program asks for it, and masked
elements never: the traffic between a GPU's multiprocessors and its second-level cache. *Distinct*
counts it once a launch: the traffic to memory if the cache held everything else.

`python -m kernels.flash_attention --watch` (likewise flash_decoding, linear_logprob) prints what
the functions at the end of this file return: pictures and the table of a small case.

Replaced in triton.runtime.interpreter, and restored on exit (read and run with Triton 3.6 and 3.7):
InterpreterBuilder.create_masked_load and create_masked_store, where all loads and stores end (not
atomic operations: no kernel here has any), and create_dot; GridExecutor.__call__ and
_init_args_hst, which run a launch and see its tensors; _implicit_cvt, which makes the pointers.
"""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kernels.runtime import INTERPRETED, triton

Sizes = Mapping[int, int]  # axis of a tensor -> elements a tile


class OutOfBounds(IndexError):
    """A kernel's access outside of its tensor."""


class Visit(NamedTuple):
    """A load or store of one program: smallest and largest index in each dimension, size."""

    kernel: str
    program: tuple[int, int, int]
    kind: str
    tensor: str
    first: tuple[int, ...]
    last: tuple[int, ...]
    bytes: int


class Watch:
    """What happened inside `watching`."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self.requested: Counter[tuple] = Counter()  # (kernel, kind, tensor) -> bytes
        self.distinct: Counter[tuple] = Counter()
        self.shapes: dict[tuple, torch.Size] = {}  # (kernel, tensor) -> shape in its last launch
        self.dots: Counter[str] = Counter()  # kernel -> calls of tl.dot
        self.multiplications: Counter[str] = Counter()  # kernel -> M N K of each (M, K) x (K, N)

    def megabytes(self) -> float:
        """MB requested by all loads and stores."""
        return self.requested.total() / 1e6

    def tiles(self, kernel: str, kind: str, tensor: str, sizes: Sizes) -> dict[tuple, set[tuple]]:
        """Program -> the tiles, one number for each axis of `sizes`, that it loads or stores."""
        found = defaultdict(set)
        for visit in self.visits:
            if (visit.kernel, visit.kind, visit.tensor) == (kernel, kind, tensor):
                spans = [
                    range(visit.first[a] // n, visit.last[a] // n + 1) for a, n in sizes.items()
                ]
                found[visit.program] |= set(product(*spans))
        return dict(found)

    def picture(
        self, kernel: str, rows: tuple[str, Sizes], columns: tuple[str, int, int], label: str = ""
    ) -> str:
        """A line for each tile of `rows` (tensor, sizes) that a program stores, "#" where that
        program loads a tile of `columns` (tensor, axis, size). `label` formats the row's numbers.
        """
        owned = self.tiles(kernel, "store", *rows)
        tensor, axis, size = columns
        loaded = self.tiles(kernel, "load", tensor, {axis: size})
        count = triton.cdiv(self.shapes[kernel, tensor][axis], size)
        lines = []
        for program, tiles in sorted(owned.items(), key=lambda item: min(item[1])):
            marks = ["#" if (i,) in loaded.get(program, ()) else "." for i in range(count)]
            lines.append(label.format(*min(tiles)) + " ".join(marks))
        return "\n".join(lines)

    def table(self) -> str:
        """Times, MB requested and distinct MB of each tensor of each kernel."""
        times = Counter((v.kernel, v.kind, v.tensor) for v in self.visits)
        lines = [
            f"{'kernel':20} {'access':6} {'tensor':12} {'times':>6} {'MB':>9} {'distinct MB':>12}"
        ]
        for key, number in times.items():
            head = "{:20} {:6} {:12}".format(*key)
            requested, distinct = self.requested[key] / 1e6, self.distinct[key] / 1e6
            lines.append(f"{head} {number:6} {requested:9.5f} {distinct:12.5f}")
        for kernel, number in self.dots.items():
            lines.append(
                f"{kernel:20} tl.dot {number:19} of {self.multiplications[kernel]:,} products"
            )
        return "\n".join(lines)


def locate(x: Tensor, offset: Tensor) -> tuple[list[Tensor], Tensor]:
    """The index of each `offset`, counted in elements from x's first, and whether it is one of x.

    Outside, the index is where x would go on: (65, 0) after the end of 65 rows, (3, 80) beside row
    3 of 80 columns.
    """
    index, rest = [torch.zeros_like(offset) for _ in range(x.dim())], offset
    order = [d for d in range(x.dim()) if x.shape[d] > 1 and x.stride(d) > 0]
    for d in sorted(order, key=lambda d: -x.stride(d)):
        index[d] = rest.div(x.stride(d), rounding_mode="floor")
        rest = rest - index[d] * x.stride(d)
    inside = rest == 0  # else between two elements
    for d, n in enumerate(x.shape):
        inside &= (index[d] >= 0) & (index[d] < n)
    if x.dim():
        index[min(order, key=x.stride, default=-1)] += rest
    return index, inside


def root(error: BaseException) -> BaseException:
    """What an error began with: Triton's interpreter wraps it once for every call."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def own(frames: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Of some frames those of kernels and their callers: no library's, none of the checks."""
    checks = [str(Path(__file__).with_name(name)) for name in ("watch.py", "check.py")]
    return [f for f in frames if "site-packages" not in f.filename and f.filename not in checks]


def _line(kernel: str) -> str:
    """File and line of the access that is being run, and the call of it in the kernel."""
    frames = own(traceback.extract_stack())[::-1]
    end = next(i for i, frame in enumerate(frames, 1) if frame.name == kernel)
    return ", called from ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:end])


@contextmanager
def watching(on_dot: Callable[..., None] = lambda *_: None) -> Iterator[Watch]:
    """Check, trace and count what interpreted kernels do inside the block; see the top.

    `on_dot` is called before each tl.dot with the interpreter's a, b, the tile that is added to
    and the input precision. Raises ValueError where Triton's interpreter is off.
    """
    if not INTERPRETED:
        raise ValueError(
            "watching() needs Triton's interpreter; install Triton and set TRITON_INTERPRET=1 "
            "before Python starts"
        )
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    call, to_host, convert = executor.__call__, executor._init_args_hst, interpreter._implicit_cvt
    watch, kernel, tensors, touched = Watch(), "", {}, defaultdict(list)

    def located(x: Tensor, addresses: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        offset = (addresses - x.data_ptr()).div(x.element_size(), rounding_mode="floor")
        return offset, *locate(x, offset)

    def check(kind: str, program: tuple, pointers: Any, mask: Any) -> None:
        addresses = torch.from_numpy(pointers.data[mask.data].astype("int64"))
        if not addresses.numel():
            return
        where = f"{kernel}, program {program}: {kind}"
        x = getattr(pointers.dtype, "tensor", None)
        if x is None:  # a pointer that was cast, as to booleans: judged by its first address
            x = next((t for t in tensors.values() if located(t, addresses[:1])[2]), None)
        if x is None:
            raise OutOfBounds(f"{where} of an address in no argument ({_line(kernel)})")
        name = next(n for n, t in tensors.items() if t is x)
        offset, index, inside = located(x, addresses)
        if not inside.all():
            bad = int(inside.logical_not().nonzero()[0, 0])
            raise OutOfBounds(
                f"{where} of {name}{[int(i[bad]) for i in index]}, outside its shape "
                f"{tuple(x.shape)}, as {int((~inside).sum())} of {len(inside)} addresses "
                f"({_line(kernel)})"
            )
        first, last = (tuple(int(f(i)) for i in index) for f in (torch.min, torch.max))
        size = x.element_size() * len(inside)
        watch.visits.append(Visit(kernel, program, kind, name, first, last, size))
        watch.requested[kernel, kind, name] += size
        touched[kernel, kind, name].append(offset)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("load", self.grid_idx, pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("store", self.grid_idx, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        on_dot(a, b, d, precision)
        watch.dots[kernel] += 1
        watch.multiplications[kernel] += a.data.size * b.data.shape[-1]
        return dot(self, a, b, d, precision, *rest)

    def watched_convert(argument: Any) -> Any:
        result = convert(argument)
        if isinstance(argument, Tensor):
            result.handle.dtype.tensor = argument  # pointer arithmetic keeps this type object
        return result

    def watched_to_host(self: Any, args: tuple, constants: dict) -> tuple[list, dict]:
        nonlocal kernel, tensors
        host = to_host(self, args, constants)
        given = dict(zip(self.arg_names, host[0], strict=False)) | host[1]
        kernel = self.fn.__name__
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        watch.shapes |= {(kernel, name): x.shape for name, x in tensors.items()}
        return host

    def watched_call(self: Any, *args: Any, **constants: Any) -> None:
        try:
            with _disable_current_modes():  # copies by the interpreter are no work of ours
                call(self, *args, **constants)
        except Exception as error:
            raise root(error) from None
        finally:
            with _disable_current_modes():
                for key, offsets in touched.items():
                    elements = torch.cat(offsets).unique().numel()
                    watch.distinct[key] += elements * tensors[key[2]].element_size()
            touched.clear()

    with ExitStack() as restore:
        for owner, name, new in (
            (builder, "create_masked_load", watched_load),
            (builder, "create_masked_store", watched_store),
            (builder, "create_dot", watched_dot),
            (executor, "__call__", watched_call),
            (executor, "_init_args_hst", watched_to_host),
            (interpreter, "_implicit_cvt", watched_convert),
        ):
            restore.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        yield watch


# ---- the small cases of --watch; each takes its file's public function, as in kernels/bench.py


def beside(*blocks: tuple[str, str]) -> str:
    """(title, picture) blocks side by side."""
    columns = [[title, *picture.splitlines()] for title, picture in blocks]
    columns = [[line.ljust(max(map(len, column))) for line in column] for column in columns]
    return "\n".join("   ".join(row).rstrip() for row in zip(*columns, strict=True))


def attention_case(attention: Callable) -> str:
    """Causal attention of a row of 130 of 300 tokens, and a sliding window over 300."""
    blocks, tables = [], []
    cases = ("causal", 130, "130 tokens"), ("sliding_window", 300, "window")
    for score_mod, length, what in cases:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 1, 300, 16).half().requires_grad_() for _ in range(3))
        lengths = torch.tensor([length], dtype=torch.int32)
        with watching() as watch:
            out = attention(q, k, v, lengths, score_mod=score_mod, impl="triton")
            out.backward(torch.ones_like(out))
        forward = watch.picture("forward_kernel", ("out_ptr", {2: 64}), ("k_ptr", 2, 32))
        backward = watch.picture("d_key_value_kernel", ("dk_ptr", {2: 64}), ("q_ptr", 2, 32))
        blocks += [(f"forward, {what}", forward), (f"dk dv, {what}", backward)]
        tables.append(f"{score_mod}, {length} of 300 tokens, D = 16, float16\n{watch.table()}")
    return "\n\n".join([beside(*blocks), *tables])


def decoding_case(decode_attention: Callable) -> str:
    """A query at the end of 290 of 400 cached keys."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape).half() for shape in ((1, 1, 16), *[(1, 1, 400, 16)] * 2))
    with watching() as watch:
        decode_attention(q, k, v, torch.tensor([290], dtype=torch.int32), impl="triton")
    picture = watch.picture("split_kernel", ("m_ptr", {1: 1}), ("k_ptr", 2, 32), "split {}   ")
    return f"{picture}\n\n290 of 400 keys, D = 16, float16\n{watch.table()}"


def logprobs_case(logprobs: Callable) -> str:
    """40 tokens, a vocabulary of 5000, forward and backward."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16).half().requires_grad_() for n in (40, 5000))
    with watching() as watch:
        logprob, entropy = logprobs(hidden, weight, torch.arange(40), impl="triton")
        (logprob + entropy).sum().backward()
    rows = "m_ptr", {1: 32, 0: 1}
    label = "token tile {}, stretch {}   "
    picture = watch.picture("forward_kernel", rows, ("w_ptr", 0, 512), label)
    return f"{picture}\n\n40 tokens, 5000 words, C = 16, float16\n{watch.table()}"
