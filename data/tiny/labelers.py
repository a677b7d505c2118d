"""Simulated labelers of the tiny world: noisy views of the grader's marks, and tastes of their own.

A labeler scores each response of a prompt

    score = round_to_grid( w . marks + t . traits + noise ),   noise ~ N(0, sigma^2)

where the marks are helpful, truthful * informative, harmless and ended (grader.py), and the traits
are what is neither right nor wrong about an answer: how much it says, a courteous opening, and
caution, which states no fact of the world. The labeler ranks by score; equal scores are ties, which
the paper encouraged (Fig. 12).

                weights w of                          tastes t for
    pool        helpful  truthful  harmless  ended    detail  opener  caution
    training      1.0      0.7       0.8      0.4       0.1     0.1     0.0    help first, detail
    held_out      0.7      1.2       1.2      0.2      -0.4    -0.1     0.2    truth first, brevity
Weights are divided by their sum. Each labeler has the pool's weights times log-normal factors, and
the pool's tastes plus normal deviations (WEIGHT_SPREAD, TASTE_SPREAD). So without any noise two
labelers agree on 83 to 90 % of the pairs that neither ties if they are of one pool, and on about
77 % if they are not. Evaluation has other weights (grader.EVALUATION_WEIGHTS), no tastes, no noise.

The noise is fitted so that two labelers agree on 73 % of the pairs that neither ties, as
InstructGPT's did (72.6 +- 1.5 %, 3.4), unless it is given: the Makefile fits it once, on the
training comparisons, and the same people rank everything else with it. A prompt is ranked by one
labeler, or by several, each with noise of their own.
"""

from dataclasses import dataclass

from data.tiny.grader import Grade
from data.tiny.tasks import OPENERS
from data.tiny.world import claims, normalise

import numpy as np

POOL_WEIGHTS = {"training": (1.0, 0.7, 0.8, 0.4), "held_out": (0.7, 1.2, 1.2, 0.2)}
POOL_TASTES = {"training": (0.1, 0.1, 0.0), "held_out": (-0.4, -0.1, 0.2)}
POOL_SIZE = 20
WEIGHT_SPREAD = 0.25  # standard deviation of the logarithm of a labeler's weights
TASTE_SPREAD = 0.35  # standard deviation of a labeler's tastes
TARGET_AGREEMENT = 0.73
GRID = 12  # scores are whole twelfths, so that near equals tie
MAX_NOISE = 4.0


@dataclass(frozen=True)
class Pool:
    """The labelers of one pool: `weights` (labelers, 4), each row sums to 1, and `tastes`
    (labelers, 3)."""

    name: str
    weights: np.ndarray
    tastes: np.ndarray

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
        deviations = rng.standard_normal((POOL_SIZE, 3))
        deviations -= deviations.mean(axis=0)  # the mean taste is the pool's
        tastes = np.asarray(POOL_TASTES[name]) + TASTE_SPREAD * deviations
        return cls(name, weights / weights.sum(axis=1, keepdims=True), tastes)

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


def traits_of(response: str) -> tuple[float, float, float]:
    """What tastes are about, 0..1 each: detail, 1 from twenty words on; a courteous opening;
    caution, 1 if no fact of the world is stated, be it in doubt, a story or a greeting.

    gladly . the fox eats grass . -> (.25, 1, 0): five words
    that is hard to say . -> (.25, 0, 1)
    """
    text = normalise(response)
    words = sum(word.isalnum() for word in text.split())
    return min(1.0, words / 20), float(text.startswith(OPENERS)), float(not claims(text))


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
    traits: np.ndarray  # (responses, 3) what tastes are about
    sizes: list[int]  # responses per prompt
    twin: np.ndarray  # (responses,) index of the first response to the prompt with the same text
    pairs: _Pairs

    @classmethod
    def of(cls, grades: list[list[Grade]], responses: list[list[str]]) -> "_Marked":
        parts = np.array([parts_of(grade) for row in grades for grade in row], dtype=np.float64)
        traits = np.array([traits_of(text) for row in responses for text in row], dtype=np.float64)
        sizes = [len(row) for row in grades]
        twin: list[int] = []
        for row in responses:
            start = len(twin)
            twin += [start + row.index(text) for text in row]
        return cls(parts, traits, sizes, np.array(twin), _Pairs.of(sizes))

    def draw(self, pool: Pool, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """A labeler for each prompt -> ids (prompts,), opinions and unit noise (responses,)."""
        ids = rng.integers(POOL_SIZE, size=len(self.sizes))
        return ids, self.opinions(pool, ids), self.noise(rng)

    def opinions(self, pool: Pool, ids: np.ndarray) -> np.ndarray:
        """What the labelers of the prompts, ids (prompts,), think of the responses."""
        who = np.repeat(ids, self.sizes)
        return (self.parts * pool.weights[who]).sum(1) + (self.traits * pool.tastes[who]).sum(1)

    def of_pool(self, pool: Pool) -> np.ndarray:
        """What the pool thinks of the responses without personal differences: (responses,)."""
        return self.parts @ pool.mean_weights + self.traits @ np.asarray(POOL_TASTES[pool.name])

    def noise(self, rng: np.random.Generator) -> np.ndarray:
        """Unit noise (responses,), equal for equal texts: nobody prefers one of two equals."""
        return rng.standard_normal(len(self.parts))[self.twin]


def _rounded(scores: np.ndarray) -> np.ndarray:
    return np.round(scores * GRID)


class Agreement:
    """How often two labelers of a pool agree about these responses, as a function of their noise.

    The random draws are held fixed, so that agreement falls with the noise but for rounding.
    `counted` (pairs,) bool says which pairs count; default: all.
    """

    def __init__(
        self, marked: _Marked, pool: Pool, seed: int, counted: np.ndarray | None = None
    ) -> None:
        rng, self.marked, self.draws = pool.rng(seed, 1), marked, []
        for _ in range(max(1, -(-40_000 // len(marked.pairs.first)))):  # few prompts: more opinions
            self.draws.append([marked.draw(pool, rng)[1:] for _ in range(2)])
        self.counted = np.ones(len(marked.pairs.first), bool) if counted is None else counted

    def at(self, noise: float) -> float:
        """Share of the pairs on which they agree, of those that neither ties; NaN if none."""

        def order(opinions: np.ndarray, unit: np.ndarray) -> np.ndarray:
            return self.marked.pairs.order(_rounded(opinions + noise * unit))[self.counted]

        orders = [[order(*draw) for draw in two] for two in self.draws]
        one, other = (np.concatenate(half) for half in zip(*orders, strict=True))
        return agreement(one, other)

    def fit(self) -> float:
        """The noise at which they agree at `TARGET_AGREEMENT`, by bisection. With few pairs, or
        responses that are all alike, that may be out of reach; then the nearest noise."""
        low, high = 0.0, MAX_NOISE
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle) > TARGET_AGREEMENT else (low, middle)
        return high


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
    """Accuracy of the pool's noise-free opinion, without personal differences, on the untied pairs;
    where it is indifferent it counts half. A reward model that knows the pool cannot expect to do
    better."""


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
    noise: float | None = None,
) -> list[Labels]:
    """Let labelers of the pool rank the responses of each prompt: so many rankings, each of other
    people for every prompt.

    grades[i] are the grades of prompt i's responses. Where no `noise` is given, it is fitted.
    `sampled` says which responses were sampled for their prompt: agreement is that on pairs
    of such, because others are so easy to tell apart that noisier labelers would agree as often.
    """
    marked = _Marked.of(grades, responses)
    counted = None
    if sampled is not None:
        own = np.array([s for row in sampled for s in row], bool)
        counted = own[marked.pairs.first] & own[marked.pairs.second]
        counted = counted if counted.any() else None
    agreement_of = Agreement(marked, pool, seed, counted)
    noise = agreement_of.fit() if noise is None else noise
    agreed = agreement_of.at(noise)
    # Rounded to 1e-9, so that equal marks compare equal whatever the order of summation.
    truth = marked.pairs.order(np.round(marked.of_pool(pool), 9))
    rng, made = pool.rng(seed, 2), []
    first = rng.integers(POOL_SIZE, size=len(marked.sizes))
    for turn in range(rankings):
        ids = (first + turn) % POOL_SIZE
        scores = _rounded(marked.opinions(pool, ids) + noise * marked.noise(rng))
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
