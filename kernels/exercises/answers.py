"""SPOILERS: what is wrong in each exercise, and what fills the holes of each puzzle.

Read by kernels/exercise.py and by the tests: the bugs are among those that
tests/test_kernels_planted_bugs.py plants, and the check of each kernel must catch them. From easy
to hard.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).resolve().parents[1]
OPERATIONS = {
    "flash_decoding": "decoding",
    "flash_attention": "attention",
    "linear_logprob": "log-probs",
}


class Bug(NamedTuple):
    """`old`, which stands once in a kernel file, replaced by `new`."""

    kernel: str
    name: str
    old: str
    new: str
    title: str  # what one sees, not what is wrong
    hint: str
    case: int  # of the file's CASES: its map shows most

    @property
    def operation(self) -> str:
        return OPERATIONS[self.kernel]

    @property
    def file(self) -> str:
        return f"{self.kernel}.py"

    def solution(self) -> str:
        return (KERNELS / self.file).read_text(encoding="utf-8")

    def task(self) -> str:
        return self.solution().replace(self.old, self.new)


class Puzzle(NamedTuple):
    """A file of this folder with holes (`...`), and the lines that belong there."""

    name: str
    lines: tuple[str, ...]
    title: str
    hint: str
    operation: str = "puzzle"

    @property
    def file(self) -> str:
        return f"{self.name}.py"

    def task(self) -> str:
        return (Path(__file__).parent / self.file).read_text(encoding="utf-8")

    def solution(self) -> str:
        text = self.task()
        for line in self.lines:
            hole = line.split(" = ")[0] + " = ..."
            assert text.count(f"    {hole}") == 1, hole
            text = text.replace(f"    {hole}", f"    {line}")
        return text


BUGS = (
    Bug(
        "flash_decoding",
        "no scale",
        ", 1) * SCALE",
        ", 1)",
        "the softmax is too sharp",
        "In split_kernel a score is q . k, but the definition divides it by something.",
        4,
    ),
    Bug(
        "flash_attention",
        "mask off by one",
        "s = tl.where(k <= q, s,",
        "s = tl.where(k < q, s,",
        "a row of one token gets the output 0",
        "Which keys does query 0 see, and what do the masks of _scores leave it?",
        2,
    ),
    Bug(
        "flash_decoding",
        "values read with the keys' stride",
        "v_ptr + offsets * v_s",
        "v_ptr + offsets * k_s",
        "not one result is a number",
        "Keys and values lie differently in memory: follow each stride of split_kernel from its "
        "argument to its load.",
        6,
    ),
    Bug(
        "linear_logprob",
        "last tile unmasked",
        "z = tl.where(vocab[None, :] < V, z, LOWEST)",
        "z = z + 0.0",
        "every log-prob is too low, unless the vocabulary fills its last tile",
        "The last tile of forward_kernel is wider than what is left of the vocabulary: what is z "
        "there, and what does it add to the sum?",
        0,
    ),
    Bug(
        "flash_decoding",
        "mask off by one",
        "minimum(begin + keys, length)",
        "minimum(begin + keys, length - 1)",
        "the newest token has no say",
        "A row of length n has the keys 0 to n - 1; does split_kernel reach all of them?",
        0,
    ),
    Bug(
        "linear_logprob",
        "no temperature in the backward",
        "dz * inverse_temperature",
        "dz",
        "both gradients have the wrong size, and the outputs are right",
        "The logit is x . w / tau; which factor does that put into dz, at the end of "
        "d_logits_kernel?",
        2,
    ),
    Bug(
        "flash_attention",
        "output not rescaled",
        "acc * shrink[:, None]",
        "acc",
        "queries of the first tile are right, later ones are not",
        "When a later tile has a larger maximum, forward_kernel must rewrite two sums in terms of "
        "it; does it do so with both?",
        5,
    ),
    Bug(
        "flash_attention",
        "no scale in the backward",
        "dq * SCALE",
        "dq",
        "one gradient has the wrong size",
        "s = SCALE q . k, so ds / dq = SCALE k: look at what d_query_kernel stores.",
        5,
    ),
    Bug(
        "flash_decoding",
        "splits not reweighted",
        "weight = tl.exp2(m - tl.max(m, 0))",
        "weight = tl.exp2(m * 0.0)",
        "short caches are right, long ones are not",
        "Each split measured its sums from a maximum of its own; combine_kernel must bring them to "
        "a common one.",
        2,
    ),
    Bug(
        "flash_attention",
        "gradient's row sum per tile",
        "p * (dp - delta)",
        "p * (dp - tl.sum(p * dp, 1)[:, None])",
        "dv is right, dq in the first tile of keys alone, dk nowhere",
        "delta in _d_scores is a sum over the whole row of scores; over what does it run here?",
        5,
    ),
    Bug(
        "linear_logprob",
        "weighted sum not shifted",
        "tl.exp2(a) * (t + a * s)",
        "tl.exp2(a) * t",
        "log-probs are right, the entropy is not",
        "t = sum (z - m) exp(z - m) holds m twice; what becomes of both when _merge changes m?",
        2,
    ),
    Bug(
        "flash_attention",
        "window's gradient cut short",
        "QUERY(k_start + BLOCK_K - 1) + 1",
        "QUERY(k_start)",
        "dk and dv are wrong under a sliding window, all else is right",
        "d_key_value_kernel walks over the queries that see its key tile: which key of the tile "
        "has the last of them, and is the end of a range inside it?",
        7,
    ),
)
PUZZLES = (
    Puzzle(
        "row_softmax",
        ("e = tl.exp(x - tl.max(x, 0))", "p = e / tl.sum(e, 0)"),
        "softmax of a row that fits into one tile",
        """Subtract the row's maximum before exp; the padding then adds exp(-inf) = 0 to the sum.

    column   0  1  2 .. N-1 | N .. BLOCK-1
    x        x  x  x ..  x  | -inf .. -inf
    e        e  e  e ..  e  |   0  ..  0""",
    ),
    Puzzle(
        "running_maximum",
        (
            "m_new = tl.maximum(m, tl.max(x, 0))",
            "s = s * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), 0)",
        ),
        "log of a sum of exponentials, tile after tile",
        """What s has summed so far was measured from m; multiply it by exp(m - m_new) first.

    tile         0        1        2
    maximum      3        9        5
    m            3   ->   9   ->   9
    s times           exp(3-9)   exp(0)""",
    ),
    Puzzle(
        "diagonal_mask",
        ("visible = (k[None, :] <= q[:, None]) & (k[None, :] > q[:, None] - W)",),
        "causal attention in a window: which keys a query sees",
        """Make a (BLOCK, KEYS) tile of booleans: queries down as q[:, None], keys across.

    W = 3      k 0 1 2 3 4 5
    q 0          # . . . . .
    q 1          # # . . . .
    q 2          # # # . . .
    q 3          . # # # . .""",
    ),
    Puzzle(
        "delta",
        ("delta = tl.sum(out * d_out, 1)", "ds = p * (dp - delta[:, None])"),
        "backward of attention's softmax",
        """Put out_i = sum_j p_ij v_j into rowsum(out * d_out): what is left is sum_j p_ij dp_ij.

    out, d_out   (queries, D)     sum over D gives delta, a number a query
    p, dp        (queries, keys)  a tile at a time; delta serves all tiles of the row""",
    ),
    Puzzle(
        "merging_splits",
        (
            "weight = tl.exp(m - tl.max(m, 0))",
            "out = tl.sum(weight[:, None] * acc, 0) / tl.sum(weight * norm, 0)",
        ),
        "one output from the parts of split keys",
        """Bring every split to the largest maximum, then divide by the sum only once.

    split        0            1            2 (empty)
    m            7            9            -1e30
    weight   exp(7-9)     exp(9-9)           0""",
    ),
    Puzzle(
        "p_minus_1",
        ("dz = (p - hit).to(tl.float16)",),
        "the gradient of a confident token, in 16 bits",
        """Near 1 a float16 has steps of 0.0005; near 0 its steps are finer: subtract, then round.

    p                  0.99990
    p in float16       1.0        minus 1:   0.0
    p - 1             -0.00010    rounded:  -0.00010""",
    ),
)
TASKS: tuple[Bug | Puzzle, ...] = (*BUGS, *PUZZLES)
