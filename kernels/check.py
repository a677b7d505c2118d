"""What the checks of all kernel files share: cases run to the end, mismatches that say where, and a
guard over the memory that interpreted kernels touch.

    python -m kernels.flash_attention                      every implementation, every case
    python -m kernels.flash_attention --impl mine --case 3

A mismatch names the worst entry, what was expected and found, and draws which tiles are wrong:

    dk: error 9.8e-01 is above 2.0e-05 at [0, 1, 64, 3]: expected 0.31, found -0.2; 576 of 4,480
    entries are wrong. A character is 16 x 16 entries, the last index downwards, # if one of them
    is wrong:
      [0, 1]  ....###..          <- row 0, head 1; tokens from left to right
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import runtime
from kernels.runtime import needs_triton, triton
from kernels.watch import Watch, own, root, watching

# Largest error, relative to the largest entry, that rounding explains: inputs are exact in float64,
# sums are float32 (or wider), and 16-bit results, probabilities and their gradients are rounded a
# few times.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Mismatch(AssertionError):
    """A result that is not what it should be; its text says where and by how much."""


# ---- one result


def compare(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest error of `actual` relative to the largest entry of `expected`.

    Raises Mismatch naming `what` and the worst entry, with a map, if it is above `tolerance`, or if
    a shape differs or a number is not finite.
    """
    if actual.shape != expected.shape:
        raise Mismatch(f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    a, e = actual.detach().double(), expected.detach().double()
    error = (a - e).abs()
    if bool(e.any()):
        error = error / e.abs().max().clamp_min(1e-30)
    wrong = ~(error <= tolerance)  # a NaN is wrong
    if not bool(wrong.any()):
        return float(error.max())
    # argmax takes the first of equals: NaN and infinity count as the same
    worst = error.nan_to_num(float("inf"), float("inf")).flatten().argmax()
    at = [int(i) for i in torch.unravel_index(worst, error.shape)]
    size = float(error[tuple(at)])
    finite = bool(a[tuple(at)].isfinite())
    raise Mismatch(
        f"{what}: {f'error {size:.1e} is above {tolerance:.1e}' if finite else 'not finite'} at "
        f"{at}: expected {float(e[tuple(at)]):.6g}, found {float(a[tuple(at)]):.6g}; "
        f"{int(wrong.sum()):,} of {wrong.numel():,} entries are wrong. {tile_map(wrong)}"
    )


def compare_all(results: Iterable[tuple[str, Tensor, Tensor, float]]) -> float:
    """`compare` for each; raises one Mismatch with the text of all that fail."""
    worst, texts = 0.0, []
    for result in results:
        try:
            worst = max(worst, compare(*result))
        except Mismatch as error:
            texts.append(str(error))
    if texts:
        raise Mismatch("\n".join(texts))
    return worst


def tile_map(wrong: Tensor) -> str:
    """Where a tensor of booleans is true, tile by tile: the second last dimension from left to
    right, the last one from top to bottom (one line if all its tiles agree), each other index by
    itself."""
    wrong = wrong.cpu() if wrong.dim() > 1 else wrong.cpu()[:, None]
    rows = -(-wrong.shape[-2] // 1024) * 16  # at most 64 characters a line
    size = f"{rows} x 16 entries"
    lines = [f"A character is {size}, the last index downwards, # if one of them is wrong:"]
    places = [at for at in product(*map(range, wrong.shape[:-2])) if bool(wrong[at].any())]
    for at in places[:6]:
        tiles = F.max_pool2d(wrong[at][None].float(), (rows, 16), ceil_mode=True)[0].T.tolist()
        drawn = ["".join(".#"[int(tile)] for tile in line) for line in tiles]
        for i, line in enumerate(drawn if len(set(drawn)) > 1 else drawn[:1]):
            lines.append(f"  {str(list(at)) if i == 0 and at else '':8} {line}")
    if len(places) > 6:
        lines.append(f"  and {len(places) - 6} more")
    return "\n".join(lines)


# ---- all cases


def run_cases(cases: Sequence, check: Callable[[Any], float], only: int | None = None) -> float:
    """The largest of check(case) over the cases, or of one; each starts from its own random state.

    All run before one Mismatch is raised, with the text of each that fails.
    """
    worst, failed, texts = 0.0, [], []
    numbers = range(len(cases)) if only is None else [only]
    for number in numbers:
        torch.manual_seed(number)
        try:
            worst = max(worst, check(cases[number]))
        except Exception as error:
            failed.append(number)
            texts.append(f"case {number}, {first_cause(error)}")
    if failed:
        if texts[2:]:  # two are enough to see what is wrong
            texts[2:] = [f"and {len(texts) - 2} cases more; --case N shows one"]
        summary = f"{len(failed)} of {len(numbers)} cases fail: {', '.join(map(str, failed))}"
        raise Mismatch("\n".join([*texts, summary]))
    return worst


def first_cause(error: BaseException) -> str:
    """A mismatch's text; of any other error the one that it began with, and the line of a kernel or
    of its caller that raised it."""
    error = root(error)
    if isinstance(error, Mismatch):
        return str(error)
    text = f"{type(error).__name__}: {str(error)[:300]}"  # some have whole tensors in it
    for place in own(traceback.extract_tb(error.__traceback__))[-1:]:
        text += f"\n  {Path(place.filename).name}:{place.lineno} {place.name}: {place.line}"
    return text


def verify_all(
    impls: Mapping[str, Callable] | Iterable[str],
    verify: Callable[..., float],
    *,
    case: int | None = None,
) -> None:
    """Run `verify(impl, dtype, device)` for each implementation and print its largest error, or
    what is wrong; at the end, exit with code 1 if anything was."""
    device, wrong = "cuda" if torch.cuda.is_available() else "cpu", []
    needs = impls if isinstance(impls, Mapping) else {}
    for impl in impls:
        if needs_triton(needs.get(impl, impl)) and triton is None:
            print(f"{impl:16} skipped: Triton is not installed")
            continue
        # Triton's interpreter is wrong in bfloat16.
        for dtype in [torch.float32, torch.bfloat16 if device == "cuda" else torch.float16]:
            head = f"{impl:16} {str(dtype)[6:]:9}"
            try:
                error = verify(impl, dtype, device, **({} if case is None else {"case": case}))
                print(f"{head} largest relative error {error:.1e}", flush=True)
            except Exception as error:
                print(f"{head} is wrong\n{first_cause(error)}\n", flush=True)
                wrong.append(f"{impl} in {str(dtype)[6:]}")
    if wrong:
        sys.exit(f"Wrong: {', '.join(wrong)}.")
    print("All implementations match the reference.")


def main(
    impls: Mapping[str, Callable],
    verify: Callable[..., float],
    cases: Sequence,
    watch: Callable[[], str],
) -> None:
    """The command of a kernel file: `verify_all` with its flags, or what `watch` prints."""
    parser = argparse.ArgumentParser(description="compare with the reference, then time")
    parser.add_argument("--impl", choices=[*impls], help="one implementation; default: all")
    parser.add_argument("--case", type=int, choices=range(len(cases)), help="one of CASES")
    parser.add_argument("--watch", action="store_true", help="print which tiles a kernel visits")
    args = parser.parse_args()
    if args.watch:
        print(watch())
        sys.exit()
    verify_all({k: v for k, v in impls.items() if args.impl in (None, k)}, verify, case=args.case)
    if args.impl or args.case is not None:
        sys.exit()


# ---- what interpreted kernels touch


@contextmanager
def guarded() -> Iterator[Watch]:
    """`watching`, with more errors: ValueError for a product in less than float32, and
    FloatingPointError for 1 / 0, inf - inf and their like, also in a number that is not used. New
    tensors hold NaN, so that what a kernel forgets to write is seen.

    Without Triton's interpreter nothing is watched: the result stays empty.
    """
    if not runtime.INTERPRETED:
        yield Watch()
        return
    from triton.runtime.interpreter import np  # of which the interpreter's numbers are

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # then empty tensors hold NaN
    try:
        with np.errstate(divide="raise", invalid="raise"), watching(_check_product) as watch:
            yield watch
    finally:
        torch.use_deterministic_algorithms(before)


def _check_product(a: Any, b: Any, total: Any, precision: Any) -> None:
    if a.data.dtype.itemsize >= 4 and "IEEE" not in str(precision):
        raise ValueError(f"a float32 product has precision {precision}; give 'ieee'")
    if total.data.dtype.itemsize < 4:
        raise ValueError("a product is summed in 16 bits; give out_dtype=ACC")


def expect_count(what: str, found: int, expected: int) -> None:
    """Raise Mismatch unless as much was done as is needed: visiting a tile in which nothing is
    visible costs time and changes no number."""
    if found != expected:
        why = "a tile is visited in vain" if found > expected else "a tile is left out"
        raise Mismatch(f"{what}: {found:,}, expected {expected:,}: {why}; the results are right")


@contextmanager
def changed(variables: dict[str, Any], **values: Any) -> Iterator[None]:
    """Let variables of a module have other values within the block."""
    before = {name: variables[name] for name in values}
    variables.update(values)
    try:
        yield
    finally:
        variables.update(before)


# ---- tensors of awkward layout


def with_gaps(x: Tensor, gap: int = 3) -> Tensor:
    """`x` as a view with `gap` NaN between its rows, and with an odd offset."""
    memory = torch.full((*x.shape[:-1], x.shape[-1] + gap), float("nan"), dtype=x.dtype)
    memory[..., 1 : 1 + x.shape[-1]] = x.cpu()
    return memory.to(x.device)[..., 1 : 1 + x.shape[-1]]


def with_other_column(x: Tensor) -> Tensor:
    """An index tensor (N,) as the second column of a table whose first one is x + 1."""
    return torch.stack((x + 1, x), 1)[:, 1]
