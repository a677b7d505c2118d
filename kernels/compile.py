"""Compile every shipped kernel configuration for GPUs that are not here; show what each uses.

    python -m kernels.compile               all kernels: about a minute, then seconds from the cache
    python -m kernels.compile attention     those whose name contains "attention"

No GPU or driver is needed. The host code of each kernel runs on tensors without memory (device
"meta") and its launches are noted instead of run, so each compilation sees what a launch would: the
tile table's sizes, which pointers and strides are multiples of 16, which arguments are absent.

Targets: sm_80 (its tiles also serve consumer GPUs, so the limit is their 99 KiB of shared memory)
and sm_90 (227 KiB). Columns: registers a thread; spill, bytes of stack a thread;
shared memory of a block; instructions: wgmma (Hopper's matrix units), mma (older ones), cp.async
and TMA (copies that overlap arithmetic); blocks, how many fit a multiprocessor at once.

Exit status 1, with the reason, on a spill in a 16-bit configuration, on shared memory over the
limit, and on a 16-bit sm_90 configuration whose products have 64 rows or more and yet use no wgmma.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

# Interpreted kernels cannot be compiled. Triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch

from kernels import flash_attention, flash_decoding, linear_logprob
from kernels.runtime import Launch, recording, triton
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


def _attention(dtype: torch.dtype, D: int, score_mod: str) -> None:
    B, H, T = 4, 12, 1000
    qkv = torch.empty(B, T, 3, H, D, dtype=dtype, device="meta")
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    lengths = torch.empty(B, dtype=torch.int32, device="meta")
    out, lse = flash_attention.triton_forward(q, k, v, lengths, score_mod)
    flash_attention.triton_backward(out, q, k, v, out, lse, lengths, score_mod)


def _decode_attention(dtype: torch.dtype, D: int, score_mod: str) -> None:
    for B in (1, 64):  # with splits and without
        q = torch.empty(B, 12, D, dtype=dtype, device="meta")
        cache = torch.empty(B, 12, 1024, D, dtype=dtype, device="meta")
        lengths = torch.empty(B, dtype=torch.int32, device="meta")
        flash_decoding.triton_decode(q, cache, cache, lengths, score_mod)


def _logprobs(dtype: torch.dtype, C: int) -> None:
    N, V = 1000, 50257
    x, w = (torch.empty(rows, C, dtype=dtype, device="meta") for rows in (N, V))
    y = torch.empty(N, dtype=torch.int64, device="meta")
    logp, entropy, lse = linear_logprob.triton_forward(x, w, y, 1.0)
    for upstream in ((logp, None), (logp, entropy)):
        linear_logprob.triton_backward(*upstream, x, w, y, entropy, lse, 1.0)


def shipped() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, host function, arguments): every row of every tile table, and every score mod at
    GPT-2's head size.

    80 stands for the head sizes that are padded.
    """
    half, single = torch.bfloat16, torch.float32
    for dtype, D in [(half, 64), (half, 80), (half, 128), (single, 64), (single, 128)]:
        for score_mod in SCORE_MODS if (dtype, D) == (torch.bfloat16, 64) else ["causal"]:
            name = f"D={D} {TYPES[dtype]} {score_mod}"
            yield f"attention {name}", _attention, (dtype, D, score_mod)
            yield f"decode_attention {name}", _decode_attention, (dtype, D, score_mod)
    for dtype in (torch.bfloat16, torch.float32):
        yield f"logprobs C=768 {TYPES[dtype]}", _logprobs, (dtype, 768)


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
        f"{name} {function.removesuffix('_kernel')} {tile} w{options['num_warps']}",
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
    return report._replace(problem=find_problem(report, "16" in name.split()[2], matrix))


def find_problem(report: Report, half: bool, matrix: bool) -> str:
    """Why a configuration must not ship, or nothing. half: 16-bit; matrix: products of 64 rows or
    more."""
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
    name, host, arguments = case
    with recording(target) as launches:
        host(*arguments)
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
    print(f"{bad} configurations must not ship" if bad else "every configuration can ship")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
