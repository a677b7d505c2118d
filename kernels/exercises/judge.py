"""Check one file of an exercise in Triton's interpreter: a kernel file by its own `verify`, a
puzzle by its `cases`.

    TRITON_INTERPRET=1 python -m kernels.exercises.judge out/exercise_07/flash_attention.py [CASE]

Prints what is wrong: of the failing cases the one whose map says most, then which fail. The exit
code is 0 if nothing is, else 1. kernels/exercise.py runs this as a process of its own: a wrong
kernel may not end, or may end its process.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from kernels.check import TOLERANCE, compare_all, first_cause, guarded
from kernels.exercises.answers import OPERATIONS
from kernels.runtime import triton


def load(path: Path) -> ModuleType:
    """The file as a module. A kernel file takes the place of the one of its name in kernels/."""
    package = "kernels" if path.stem in OPERATIONS else "kernels.exercises"
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge_puzzle(module: ModuleType) -> str:
    """What is wrong, or nothing."""
    torch.manual_seed(0)
    try:
        with guarded():
            results = list(module.cases())
        compare_all((what, a, e, TOLERANCE[a.dtype]) for what, a, e in results)
    except Exception as error:
        return first_cause(error)
    return ""


def judge_kernel(module: ModuleType, only: int | None) -> str:
    """What is wrong in float32, or else in float16, or nothing."""
    numbers = range(len(module.CASES)) if only is None else [only]
    if only is not None and only not in range(len(module.CASES)):
        return f"there is no case {only}; the file has 0 to {len(module.CASES) - 1}"
    for dtype in (torch.float32, torch.float16):
        failed, texts = [], []
        for number in numbers:
            try:
                module.verify("triton", dtype, "cpu", number)
            except Exception as error:
                failed.append(number)
                texts.append(first_cause(error).rsplit("\n", 1)[0])  # without "1 of 1 cases"
        if failed:
            which = ", ".join(map(str, failed))
            told = max(
                texts, key=lambda text: min(text.count("#"), text.count("."))
            )  # a telling map
            return f"{told}\n{str(dtype)[6:]}: {len(failed)} of {len(numbers)} cases fail: {which}"
    return ""


def main(path: str, case: str = "") -> int:
    if triton is None:
        print("the exercises need Triton, which is not installed")
        return 1
    try:
        module = load(Path(path))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        kernel = hasattr(module, "verify")
        text = judge_kernel(module, int(case) if case else None) if kernel else judge_puzzle(module)
    if text:
        print(text)
    return int(bool(text))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
