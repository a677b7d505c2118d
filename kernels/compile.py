"""Compile every shipped kernel configuration for GPUs that are not here; show what each uses.

    python -m kernels.compile               all kernels: about a minute, then seconds from the cache
    python -m kernels.compile attention     those whose name contains "attention"

No GPU or driver is needed. Every entry of IMPLS that needs Triton runs, forward and backward, on
tensors without memory (device "meta") and its launches are noted instead of run, so each
compilation sees what a launch would: the tile table's sizes, which pointers and strides are
multiples of 16, which arguments are absent.

Targets: sm_80 (its tiles also serve consumer GPUs, so the limit is their 99 KiB of shared memory)
and sm_90 (227 KiB). Columns: registers a thread; spill, bytes of stack a thread;
shared memory of a block; instructions: wgmma (Hopper's matrix units), mma (older ones), cp.async
and TMA (copies that overlap arithmetic); blocks, how many fit a multiprocessor at once.

Exit status 1, with the reason, on a spill in a 16-bit configuration, on shared memory over the
limit, on a 16-bit sm_90 configuration whose products have 64 rows or more and yet use no wgmma, and
on float32 products in less than float32.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

# Interpreted kernels cannot be compiled. Triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch

from kernels import flash_attention, flash_decoding, linear_logprob
from kernels.runtime import Launch, needs_triton, recording, triton
from kernels.score_mods import SCORE_MODS

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}  # bytes a block may have
SHARED_OF_MULTIPROCESSOR = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}
MATRIX_KERNELS = ("attention", "logprobs")  # decoding has no matrix products


class Report(NamedTuple):
    """What one compiled configuration uses; the columns of the table."""

    configuration: str
    target: str
    registers: int
    spill: int
    shared: int
    wgmma: int
    mma: int
    cp_async: int
    tma: int
    blocks: int
    problem: str


# ---- the configurations that ship


def _attention(impl: Callable, dtype: torch.dtype, D: int, score_mod: str) -> None:
    B, H, T = 4, 12, 1000
    qkv = torch.empty(B, T, 3, H, D, dtype=dtype, device="meta", requires_grad=True)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    lengths = torch.empty(B, dtype=torch.int32, device="meta")
    out = impl(q, k, v, lengths, score_mod)
    torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


def _decode_attention(impl: Callable, dtype: torch.dtype, D: int, score_mod: str) -> None:
    for B in (1, 64):  # with splits and without
        q = torch.empty(B, 12, D, dtype=dtype, device="meta")
        cache = torch.empty(B, 12, 1024, D, dtype=dtype, device="meta")
        lengths = torch.empty(B, dtype=torch.int32, device="meta")
        impl(q, cache, cache, lengths, score_mod)


def _logprobs(impl: Callable, dtype: torch.dtype, C: int) -> None:
    N, V = 1000, 50257
    x, w = (torch.empty(n, C, dtype=dtype, device="meta", requires_grad=True) for n in (N, V))
    y = torch.empty(N, dtype=torch.int64, device="meta")
    both = impl(x, w, y, 1.0)
    upstream = [torch.empty_like(out) for out in both]
    for n in (1, 2):  # a gradient of the log-probs alone, and of the entropy, too
        torch.autograd.grad(both[:n], (x, w), upstream[:n], retain_graph=True)


def shipped() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, its arguments, an entry of IMPLS first): every entry that needs Triton with
    every row of its file's tile table, and every score mod at GPT-2's head size.

    80 stands for the head sizes that are padded.
    """
    for operation, impl in _entries("attention", flash_attention.IMPLS):
        yield from _by_score_mod(operation, _attention, impl)
    for operation, impl in _entries("decode_attention", flash_decoding.IMPLS):
        yield from _by_score_mod(operation, _decode_attention, impl)
    for operation, impl in _entries("logprobs", linear_logprob.IMPLS):
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{operation} C=768 {TYPES[dtype]}", _logprobs, (impl, dtype, 768)


def _entries(operation: str, impls: Mapping[str, Callable]) -> Iterator[tuple[str, Callable]]:
    """Of the entries that need Triton: the operation, with the name of any but "triton", and the
    entry."""
    for name, impl in impls.items():
        if needs_triton(impl):
            yield operation if name == "triton" else f"{operation}={name}", impl


def _by_score_mod(operation: str, function: Callable, impl: Callable) -> Iterator[tuple]:
    half, single = torch.bfloat16, torch.float32
    for dtype, D in [(half, 64), (half, 80), (half, 128), (single, 64), (single, 128)]:
        for score_mod in SCORE_MODS if (dtype, D) == (half, 64) else ["causal"]:
            name = f"{operation} D={D} {TYPES[dtype]} {score_mod}"
            yield name, function, (impl, dtype, D, score_mod)


# ---- one compilation


def specialize(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict, dict[str, Any]]:
    """What Triton's launcher derives from the arguments: (signature, constants, attributes,
    options).

    None and an integer 1 become constants; multiples of 16 are marked, for pointers in bytes.
    """
    kernel, named = launch.kernel, dict(launch.constants)
    named.update(zip(kernel.arg_names, launch.args, strict=False))
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, named.pop(parameter.name)
        aligned = False
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    # What is left are options: num_warps, num_stages.
    return (signature, constants, attributes, named)


def compile_launch(name: str, launch: Launch, target: str) -> Report:
    """Compile one noted launch for `target` and read its resources from the binary."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", int(target[3:]), 32), options=options
    )
    registers, spill = binary_resources(compiled.asm["cubin"])
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED_OF_MULTIPROCESSOR[target] // (shared + 1024)
    ptx = compiled.asm["ptx"]
    sizes = {k: v for k, v in constants.items() if k.startswith("BLOCK") and k != "BLOCK_D"}
    tile = "x".join(str(v) for v in sizes.values())
    function = launch.kernel.fn.__name__
    report = Report(
        f"{name} {function.removesuffix('_kernel')} {tile} w{compiled.metadata.num_warps}",
        target,
        registers,
        spill,
        shared,
        ptx.count("wgmma.mma_async"),
        ptx.count("mma.sync"),
        ptx.count("cp.async.c"),
        ptx.count("cp.async.bulk.tensor"),
        min(by_registers, by_shared, 32),
        "",
    )
    rows = min([v for k, v in sizes.items() if k in ("BLOCK_Q", "BLOCK_N")], default=0)
    if "d_key_value" in function:
        rows = sizes["BLOCK_K"]
    matrix = name.startswith(MATRIX_KERNELS) and rows >= 64 and "combine" not in function
    half = "16" in name.split()[2]
    return report._replace(problem=find_problem(report, half, matrix, ".tf32" in ptx))


def find_problem(report: Report, half: bool, matrix: bool, tf32: bool = False) -> str:
    """Why a configuration must not ship, or nothing. half: 16-bit; matrix: products of 64 rows or
    more; tf32: products of float32 rounded to 10 bits."""
    if tf32:
        return "rounds float32 products to tf32"
    if half and report.spill:
        return f"spills {report.spill} bytes a thread"
    if report.shared > SHARED_LIMIT[report.target]:
        return f"needs {report.shared} bytes of shared memory, limit {SHARED_LIMIT[report.target]}"
    if half and matrix and report.target == "sm_90" and not report.wgmma:
        return "does not use wgmma"
    return ""


def binary_resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, stack bytes a thread) of a compiled kernel, by NVIDIA's cuobjdump from
    Triton's wheel.

    These kernels have no local arrays and call nothing, so the stack holds spilled registers alone.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def _compile_case(case: tuple[str, Callable, tuple], target: str) -> list[Report]:
    name, function, arguments = case
    with recording(target) as launches:
        function(*arguments)
    different = {str(specialize(x)) + x.kernel.fn.__name__: x for x in launches}
    return [compile_launch(name, x, target) for x in different.values()]


# ---- the command


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 1 if a configuration must not ship."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "name", nargs="?", default="", help="compile those whose name contains this"
    )
    args = parser.parse_args(argv)
    if triton is None:
        print("kernels.compile needs Triton, which is not installed", file=sys.stderr)
        return 1
    cases = [case for case in shipped() if args.name in case[0]]
    jobs = [(case, target) for case in cases for target in SHARED_LIMIT]
    if not jobs:
        print(f"no configuration has {args.name!r} in its name", file=sys.stderr)
        return 2
    print(f"{'configuration':62} {'target':6} " + " ".join(f"{x:>9}" for x in Report._fields[2:-1]))
    bad = 0
    with ProcessPoolExecutor(max_workers=min(len(os.sched_getaffinity(0)), 8)) as pool:
        for reports in pool.map(_compile_case, *zip(*jobs, strict=True)):
            for r in reports:
                numbers = " ".join(f"{x:9}" for x in r[2:-1])
                print(f"{r.configuration:62} {r.target:6} {numbers} {r.problem}")
                bad += bool(r.problem)
    print(f"must not ship: {bad}" if bad else "every configuration can ship")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
