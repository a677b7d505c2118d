"""Wrong kernels made mechanically from the sources, and how many of them `verify` notices.

    python -m tests.mutants                    50 mutants, about five minutes on two cores
    python -m tests.mutants --count 200 --seed 1 --kernel linear_logprob

A mutant is one kernel file with one change in a jitted function or in the host code of its launch:

    operator      + for -, + for *, * for //, | for &, <= for <, maximum for minimum, and back
    bound         one more or one less: an end of a loop, the right side of a comparison, what
                  minimum or maximum get
    mask          a load, a store or a choice of numbers without its mask, or without half of it
    stride        a stride or an offset of one tensor for that of another
    accumulator   a sum or a product in float16

Each is imported in a process of its own and checked by the file's `verify` in Triton's interpreter,
float32 and then float16, nothing else. It is caught if that fails, ends the process, or takes over
TIME_LIMIT. A change that alters no result, as one for all inputs can see by reading, is no wrong
kernel: such mutants are listed below with the reason and are not counted.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("flash_attention", "flash_decoding", "linear_logprob")
KINDS = ("operator", "bound", "mask", "stride", "accumulator")
TIME_LIMIT = 150  # seconds a mutant
OPERATORS = {"+": "-", "-": "+", "*": "+", "//": "*", "&": "|"}
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!="}
NAMES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.BitAnd: "&"}
NAMES |= {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "=="}
# function, and what its changed line says -> why no result changes
ZERO = "0 is the same in float16, and the first sum or product is float32"
SHIFT = "any m of about the largest score serves: it shifts norm and acc alike"
UNUSED = "only where the number is not used"
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "split_kernel",
        "out = tl.where(norm > 0.0, acc / tl.where(((norm) >= (0.0)), norm, 1.0), 0.0)",
    ): UNUSED,
    (
        "forward_kernel",
        'lse = tl.where(((alive) | True), m + tl.log2(tl.where(alive, norm, 1.0)), float("inf"))',
    ): "every query that is read has seen a key",
    ("forward_kernel", "acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float16)"): ZERO,
    ("combine_kernel", "target = tl.zeros((BLOCK_N,), tl.float16)"): ZERO,
    ("forward_kernel", "m_new = tl.maximum((m + 1), tl.max(s, 1))"): SHIFT,
    ("split_kernel", "m_new = tl.maximum((m + 1), tl.max(s, 0))"): SHIFT,
    ("forward_kernel", "s = tl.zeros((BLOCK_N,), tl.float16)"): ZERO,
    (
        "split_kernel",
        "begin = tl.maximum(begin, "
        "tl.maximum(FIRST_KEY(length - 1), (0 - 1)) // BLOCK_K * BLOCK_K)",
    ): "begin is at least 0",
    (
        "_first",
        "begin = tl.maximum(FIRST_KEY(q_start), (0 - 1)) // BLOCK_K * BLOCK_K",
    ): "-1 // BLOCK_K is 0: Triton's division truncates",
    ("combine_kernel", "s = tl.zeros((BLOCK_N,), tl.float16)"): ZERO,
    ("d_logits_kernel", "dz = tl.zeros((BLOCK_N, BLOCK_V), tl.float16)"): ZERO,
    (
        "_first",
        "begin = tl.maximum(FIRST_KEY(q_start), (0 + 1)) // BLOCK_K * BLOCK_K",
    ): "1 // BLOCK_K is 0, too",
    (
        "triton_backward",
        "width = min(max(width, 512), ((triton.cdiv(V, 16)) + (16)))"
        "  # rows stay aligned to 16 elements",
    ): "the width of the workspace decides the time alone",
    ("split_kernel", "acc = tl.zeros((BLOCK_D,), tl.float16)"): ZERO,
    ("split_kernel", "norm = tl.zeros((1,), tl.float16)"): ZERO,
}

CHECK = """
import sys, torch
from kernels import {kernel} as module
for dtype in (torch.float32, torch.float16):
    try:
        for case in range(len(module.CASES)):
            module.verify("triton", dtype, "cpu", case)
    except Exception as error:
        from kernels.check import first_cause
        sys.exit(first_cause(error))
"""


class Mutant(NamedTuple):
    kernel: str
    kind: str
    function: str
    line: int
    old: str  # the changed line, and what it says in the mutant
    new: str
    source: str  # of the whole file

    @property
    def reason(self) -> str | None:
        """Why it is equivalent, or None."""
        return EQUIVALENT.get((self.function, self.new))


# ---- making them


def changes(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr, str]]:
    """(kind, expression, what to write in its place) for all places of a function."""
    strides = [a.arg for a in function.args.args if a.annotation is None and is_stride(a.arg)]
    for node in ast.walk(function):
        text = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if isinstance(node, ast.BinOp) and type(node.op) in NAMES:
            left, right = ast.unparse(node.left), ast.unparse(node.right)
            other = OPERATORS[NAMES[type(node.op)]]
            yield "operator", node, f"(({left}) {other} ({right}))"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in NAMES:
            left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
            sign = NAMES[type(node.ops[0])]
            yield "operator", node, f"(({left}) {COMPARISONS[sign]} ({right}))"
            if isinstance(node.comparators[0], ast.Name):
                for step in ("+ 1", "- 1"):
                    yield "bound", node.comparators[0], f"({right} {step})"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("tl.minimum", "tl.maximum"):
                other = "tl.maximum" if name == "tl.minimum" else "tl.minimum"
                yield "operator", node.func, other
            if name in ("tl.minimum", "tl.maximum", "range"):
                for argument in node.args[: 2 if name == "range" else None]:
                    for step in ("+ 1", "- 1"):
                        yield "bound", argument, f"({ast.unparse(argument)} {step})"
            if name in ("tl.load", "tl.store"):
                for keyword in node.keywords:
                    if keyword.arg == "mask":
                        yield from weaker(keyword.value)
            if name == "tl.where":
                yield from weaker(node.args[0])
            if name in ("tl.zeros", "tl.full") and ast.unparse(node.args[-1]) == "ACC":
                yield "accumulator", node.args[-1], "tl.float16"
            for keyword in node.keywords:
                if keyword.arg == "out_dtype":
                    yield "accumulator", keyword.value, "tl.float16"
            if isinstance(node.func, ast.Attribute) and text.endswith(".to(ACC)"):
                yield "accumulator", node.args[0], "tl.float16"
        elif isinstance(node, ast.Name) and node.id in strides:
            for other in strides:
                if other != node.id:
                    yield "stride", node, other


def weaker(mask: ast.expr) -> Iterator[tuple[str, ast.expr, str]]:
    """A mask that is always true, and, of one with two parts, each part alone."""
    always = ast.unparse(mask)
    yield "mask", mask, f"(({always}) | True)"
    if isinstance(mask, ast.BinOp) and isinstance(mask.op, ast.BitAnd):
        for part in (mask.left, mask.right):
            yield "mask", mask, f"({ast.unparse(part)} & (({always}) | True))"


def is_stride(name: str) -> bool:
    """q_t, d_out_b, x_n: a tensor and a dimension."""
    return len(name) > 2 and name[-2] == "_" and name[-1] in "bhtsnv"


def mutants_of(kernel: str) -> list[Mutant]:
    """Every mutant of a kernel file, equivalent ones included, each changed file once."""
    source = (ROOT / "kernels" / f"{kernel}.py").read_text(encoding="utf-8")
    lines, found = source.splitlines(), {}
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        jitted = any(ast.unparse(d) == "jit" for d in function.decorator_list)
        if not jitted and not function.name.startswith("triton_"):
            continue
        for kind, node, text in changes(function):
            if node.lineno != node.end_lineno:
                continue  # the line it is shown by must hold all of it
            line = lines[node.lineno - 1]
            new = line[: node.col_offset] + text + line[node.end_col_offset :]
            changed = "\n".join([*lines[: node.lineno - 1], new, *lines[node.lineno :]]) + "\n"
            at = kernel, kind, function.name, node.lineno
            found[changed] = Mutant(*at, line.strip(), new.strip(), changed)
    return list(found.values())


def draw(kernels: list[str], count: int, seed: int) -> list[Mutant]:
    """`count` wrong mutants and, beside them, the equivalent ones that were drawn before them:
    kernel files and kinds take turns."""
    rng, pools = random.Random(seed), {}
    for kernel in kernels:
        for mutant in mutants_of(kernel):
            pools.setdefault((mutant.kind, kernel), []).append(mutant)
    for pool in pools.values():
        rng.shuffle(pool)
    drawn, wrong = [], 0
    while wrong < count and any(pools.values()):
        for turn in [(kind, kernel) for kind in KINDS for kernel in kernels]:
            if wrong < count and pools.get(turn):
                drawn.append(pools[turn].pop())
                wrong += drawn[-1].reason is None
    return drawn


# ---- checking them


def verdict(mutant: Mutant) -> str:
    """What `verify` says of a mutant; nothing if it passes."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "kernels", Path(folder, "kernels"))
        Path(folder, "kernels", f"{mutant.kernel}.py").write_text(mutant.source, encoding="utf-8")
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", CHECK.format(kernel=mutant.kernel)]
        how = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        try:
            run = subprocess.run(command, timeout=TIME_LIMIT, **how)
        except subprocess.TimeoutExpired:
            return f"over {TIME_LIMIT} seconds"
    if run.returncode == 0:
        return ""
    text = run.stderr.strip().splitlines()
    return text[0] if text and run.returncode == 1 else f"the process ended: {run.returncode}"


def main(argv: list[str] | None = None) -> int:
    """Print a row a mutant and the rate; exit with 1 if more than 4 % of the wrong ones pass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="wrong mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--kernel", choices=KERNELS, help="one file; default: all")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    drawn = draw([args.kernel] if args.kernel else [*KERNELS], args.count, args.seed)
    caught, total = Counter(), Counter()
    with ThreadPoolExecutor(args.processes) as pool:
        for mutant, said in zip(drawn, pool.map(verdict, drawn), strict=True):
            if mutant.reason is None:
                total[mutant.kind] += 1
                caught[mutant.kind] += bool(said)
            word = "caught" if said else "SURVIVES" if mutant.reason is None else "equivalent"
            print(f"{word:10} {mutant.kind:11} {mutant.kernel}:{mutant.line} {mutant.function}")
            print(f"           - {mutant.old}\n           + {mutant.new}")
            print(f"           {(said or mutant.reason or 'nothing')[:150]}", flush=True)
    for kind in total:
        print(f"{kind:11} {caught[kind]} of {total[kind]} caught")
    print(
        f"all         {caught.total()} of {total.total()} caught; "
        f"{sum(m.reason is not None for m in drawn)} equivalent"
    )
    return int(caught.total() < 0.96 * total.total())


if __name__ == "__main__":
    sys.exit(main())
