"""Simulated labelers of the tiny world: noisy, weighted views of the grader's marks.

A labeler scores each response of a prompt

    score = round_to_grid( utility(grade; w_labeler) + noise ),   noise ~ N(0, sigma^2)

where `utility` is the weighted mean of helpful, truthful * informative, harmless and ended
(grader.py), and ranks by score; equal scores are ties, which the paper encouraged (Fig. 12).

    pool        helpful  truthful  harmless  ended
    training      1.0      0.7       0.8      0.4    helpfulness first, as in the paper's labeling
    held_out      0.7      1.2       1.2      0.2    other people, with other priorities
    evaluation    0.8      1.0       0.9      0.2    noise-free; `grader.evaluation_utility`

Each labeler of a pool has the pool's weights times log-normal factors with a spread of 0.25. The
noise is the only free number: it is fitted so that two labelers of the pool agree on 73 % of the
pairs that neither ties, as InstructGPT's did (72.6 +- 1.5 %, 3.4). A prompt is ranked by one of
them, or by several, each with noise of their own.
"""

from dataclasses import dataclass

import numpy as np

from data.tiny.grader import Grade

POOL_WEIGHTS = {"training": (1.0, 0.7, 0.8, 0.4), "held_out": (0.7, 1.2, 1.2, 0.2)}
POOL_SIZE = 20
WEIGHT_SPREAD = 0.25  # standard deviation of the logarithm of a labeler's weights
TARGET_AGREEMENT = 0.73
GRID = 12  # scores are whole twelfths, so that near equals tie
MAX_NOISE = 4.0


@dataclass(frozen=True)
class Pool:
    """The labelers of one pool: `weights` (labelers, 4), each row sums to 1, and their names."""

    name: str
    weights: np.ndarray

    @classmethod
    def make(cls, name: str) -> "Pool":
        """The pool of this name. Its people are always the same, whatever they are asked to label.

        Raises:
            ValueError: there is no such pool.
        """
        if name not in POOL_WEIGHTS:
            raise ValueError(f"pool {name!r}: expected one of {', '.join(POOL_WEIGHTS)}")
        rng = np.random.default_rng([list(POOL_WEIGHTS).index(name), POOL_SIZE])
        spread = np.exp(WEIGHT_SPREAD * rng.standard_normal((POOL_SIZE, 4)))
        weights = np.asarray(POOL_WEIGHTS[name]) * spread
        return cls(name, weights / weights.sum(axis=1, keepdims=True))

    def rng(self, *seed: int) -> np.random.Generator:
        """Random numbers of this pool alone: its people's moods are not those of another pool's."""
        return np.random.default_rng([*seed, list(POOL_WEIGHTS).index(self.name)])

    @property
    def mean_weights(self) -> np.ndarray:
        """The pool's weights without personal differences, (4,), summing to 1."""
        weights = np.asarray(POOL_WEIGHTS[self.name])
        return weights / weights.sum()

    def labeler(self, index: int) -> str:
        """Name of a labeler, as it stands in comparisons."""
        return f"{self.name}_{index:02}"


def parts_of(grade: Grade) -> tuple[float, float, float, float]:
    """What utility weighs, in the order of the weights; see `data.tiny.grader.utility`."""
    return grade.helpful, grade.truthful * grade.informative, grade.harmless, grade.ended


@dataclass(frozen=True)
class _Pairs:
    """All pairs of responses to one prompt, over many prompts, as indices into flat arrays."""

    first: np.ndarray  # (pairs,)
    second: np.ndarray

    @classmethod
    def of(cls, sizes: list[int]) -> "_Pairs":
        first, second, start = [], [], 0
        for size in sizes:
            i, j = np.triu_indices(size, 1)
            first.append(start + i)
            second.append(start + j)
            start += size
        return cls(np.concatenate(first), np.concatenate(second))

    def order(self, scores: np.ndarray) -> np.ndarray:
        """+1 where the first response scores higher, -1 where the second does, 0 for a tie."""
        return np.sign(scores[self.first] - scores[self.second])


def agreement(order: np.ndarray, other: np.ndarray) -> float:
    """Share of the pairs on which two orders agree, of those that neither ties; NaN if none."""
    decided = (order != 0) & (other != 0)
    return float((order == other)[decided].mean()) if decided.any() else float("nan")


@dataclass(frozen=True)
class _Marked:
    """All responses, prompt after prompt, as arrays."""

    parts: np.ndarray  # (responses, 4) what utility weighs
    sizes: list[int]  # responses per prompt
    twin: np.ndarray  # (responses,) index of the first response to the prompt with the same text
    pairs: _Pairs

    @classmethod
    def of(cls, grades: list[list[Grade]], responses: list[list[str]]) -> "_Marked":
        parts = np.array([parts_of(grade) for row in grades for grade in row], dtype=np.float64)
        sizes = [len(row) for row in grades]
        twin: list[int] = []
        for row in responses:
            start = len(twin)
            twin += [start + row.index(text) for text in row]
        return cls(parts, sizes, np.array(twin), _Pairs.of(sizes))

    def draw(self, pool: Pool, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """A labeler for each prompt -> ids (prompts,), utilities and unit noise (responses,)."""
        ids = rng.integers(POOL_SIZE, size=len(self.sizes))
        return ids, self.utilities(pool, ids), self.noise(rng)

    def utilities(self, pool: Pool, ids: np.ndarray) -> np.ndarray:
        """What the labelers of the prompts, ids (prompts,), think of the responses."""
        return (self.parts * pool.weights[np.repeat(ids, self.sizes)]).sum(axis=1)

    def noise(self, rng: np.random.Generator) -> np.ndarray:
        """Unit noise (responses,), equal for equal texts: nobody prefers one of two equals."""
        return rng.standard_normal(len(self.parts))[self.twin]


def _rounded(scores: np.ndarray) -> np.ndarray:
    return np.round(scores * GRID)


def fit_noise(
    marked: _Marked, pool: Pool, seed: int, counted: np.ndarray | None = None
) -> tuple[float, float]:
    """Noise (standard deviation) at which two labelers agree at `TARGET_AGREEMENT`; and how much.

    `counted` (pairs,) bool says which pairs agreement is measured on; default: on all.

    Bisection with the random draws held fixed, so that agreement falls with the noise but for
    rounding. With few pairs, or responses that are all alike, the target may be out of reach; the
    nearest noise is returned with the agreement that it gives.
    """
    rng = pool.rng(seed, 1)
    draws = []
    for _ in range(max(1, -(-40_000 // len(marked.pairs.first)))):  # few prompts: more opinions
        draws.append([marked.draw(pool, rng)[1:] for _ in range(2)])

    counted = np.ones(len(marked.pairs.first), bool) if counted is None else counted

    def order(utilities: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return marked.pairs.order(_rounded(utilities + noise))[counted]

    def agreement_at(noise: float) -> float:
        orders = [[order(u, noise * z) for u, z in two] for two in draws]
        one, other = (np.concatenate(half) for half in zip(*orders, strict=True))
        return agreement(one, other)

    low, high = 0.0, MAX_NOISE
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if agreement_at(middle) > TARGET_AGREEMENT else (low, middle)
    return high, agreement_at(high)


@dataclass(frozen=True)
class Labels:
    """Ranks per prompt (1 is best, equal is a tie), who gave them, and how noisy they are."""

    ranks: list[list[int]]
    labelers: list[str]
    noise: float
    agreement: float
    """Of two labelers of the pool, on the pairs that neither ties, of responses to their prompt."""
    tie_rate: float
    """Share of all pairs that the labeler tied."""
    ceiling: float
    """Accuracy of the noise-free utility, with the pool's weights, on the untied pairs; where it is
    indifferent it counts half. A reward model that knows the pool cannot expect to do better."""


def dense_ranks(scores: np.ndarray) -> list[int]:
    """1 for the highest score, equal ranks for equal scores, no gaps."""
    return [int(rank) + 1 for rank in np.unique(-scores, return_inverse=True)[1]]


def label(
    grades: list[list[Grade]],
    responses: list[list[str]],
    pool: Pool,
    seed: int,
    rankings: int = 1,
    sampled: list[list[bool]] | None = None,
) -> list[Labels]:
    """Let labelers of the pool rank the responses of each prompt: so many rankings, each of other
    people for every prompt.

    grades[i] are the grades of prompt i's responses. Of the texts only their equality matters.
    `sampled` says which responses were sampled for their prompt: the noise is fitted on pairs of
    such, because others are so easy to tell apart that noisier labelers would agree as often.
    """
    marked = _Marked.of(grades, responses)
    counted = None
    if sampled is not None:
        own = np.array([s for row in sampled for s in row], bool)
        counted = own[marked.pairs.first] & own[marked.pairs.second]
        counted = counted if counted.any() else None
    noise, agreed = fit_noise(marked, pool, seed, counted)
    # Rounded to 1e-9, so that equal marks compare equal whatever the order of summation.
    truth = marked.pairs.order(np.round(marked.parts @ pool.mean_weights, 9))
    rng, made = pool.rng(seed, 2), []
    first = rng.integers(POOL_SIZE, size=len(marked.sizes))
    for turn in range(rankings):
        ids = (first + turn) % POOL_SIZE
        scores = _rounded(marked.utilities(pool, ids) + noise * marked.noise(rng))
        order = marked.pairs.order(scores)
        decided = order != 0
        right = np.where(truth == 0, 0.5, truth == order)[decided]
        labels = Labels(
            ranks=[dense_ranks(row) for row in np.split(scores, np.cumsum(marked.sizes)[:-1])],
            labelers=[pool.labeler(i) for i in ids],
            noise=noise,
            agreement=agreed,
            tie_rate=1 - float(decided.mean()),
            ceiling=float(right.mean()) if len(right) else float("nan"),
        )
        made.append(labels)
    return made


def likert(grade: Grade, weights: tuple[float, ...] | np.ndarray) -> int:
    """Overall quality, 1 to 7, as on the paper's labeling page: utility in seven equal steps."""
    weights = np.asarray(weights) / np.sum(weights)
    return 1 + min(6, int(7 * float(np.dot(weights, parts_of(grade)))))
