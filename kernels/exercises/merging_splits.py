"""Merging splits: attention of one query whose keys were cut into parts, a program each.

Part i left its largest score m_i and two sums over its own keys, norm_i = sum_j exp(s_j - m_i) and
acc_i = sum_j exp(s_j - m_i) v_j. With m the largest of all m_i,

    out = sum_i exp(m_i - m) acc_i / sum_i exp(m_i - m) norm_i

An empty part has m_i = -1e30 and zeros. Fill in weight (a number a part) and out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.runtime import jit, launch, tl, triton


@jit
def merge_kernel(M, NORM, ACC, OUT, parts, D: tl.constexpr, BLOCK: tl.constexpr):
    """M and NORM are (rows, parts), ACC is (rows, parts, D), OUT is (rows, D)."""
    row, i, d = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, D)
    at = row * parts + i
    m = tl.load(M + at, mask=i < parts, other=-1e30)
    norm = tl.load(NORM + at, mask=i < parts, other=0.0)
    acc = tl.load(ACC + at[:, None] * D + d[None, :], mask=i[:, None] < parts, other=0.0)
    weight = ...  # (BLOCK,)
    out = ...  # (D,)
    tl.store(OUT + row * D + d, out)


def merge(m: Tensor, norm: Tensor, acc: Tensor) -> Tensor:
    rows, parts, D = acc.shape
    out, block = acc.new_empty(rows, D), triton.next_power_of_2(parts)
    launch(merge_kernel, (rows,), m, norm, acc, out, parts, D=D, BLOCK=block)
    return out


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, found, expected in float64)."""
    for rows, sizes, level in ((1, (7,), 0), (3, (9, 20, 4), 0), (2, (5, 0, 9, 30, 1), -300)):
        s = torch.randn(rows, sum(sizes)) * 4 + level
        v = torch.randn(rows, sum(sizes), 16)
        m, norm, acc = s.new_full((rows, len(sizes)), -1e30), [], []
        for i, (part, value) in enumerate(zip(s.split(sizes, 1), v.split(sizes, 1), strict=True)):
            if sizes[i]:
                m[:, i] = part.amax(1)
            e = (part - m[:, i : i + 1]).exp()
            norm.append(e.sum(1))
            acc.append((e[:, :, None] * value).sum(1))
        expected = (s.double().softmax(1)[:, :, None] * v.double()).sum(1)
        found = merge(m, torch.stack(norm, 1), torch.stack(acc, 1))
        yield f"{rows} rows, parts of {sizes} at {level}", found, expected
