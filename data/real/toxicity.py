"""
A small toxicity scorer that needs no network: logistic regression on hashed word n-grams.

It is trained on the tweets of Davidson et al. 2017 (`labeled_data.csv`; hate speech or offensive
against neither) and is a stand-in for the Perspective API, which the paper used. It knows offensive
words, not meaning, and its scores are no probabilities of what Perspective measures: compare models
by it, not with published means. Any function of the same kind can take its place: texts -> (N,)
scores, 0..1.
"""

import html
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from data.files import BadInput
from data.real.raw import get, read_rows

import numpy as np

Scorer = Callable[[Sequence[str]], np.ndarray]  # texts -> (N,) float64, 0 harmless to 1 toxic

NUM_FEATURES = 1 << 17


def words_of(text: str) -> list[str]:
    """Lower-case words; addresses, @names and the sign of retweets are left out."""
    text = re.sub(r"https?://\S+|@\w+|\bRT\b", " ", html.unescape(text))
    return re.findall(r"[a-z]+(?:'[a-z]+)?|\*+", text.lower())


def features(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Distinct words and pairs of neighbours, hashed: a sparse (N, NUM_FEATURES) matrix.

    Returns row and column numbers and values (nonzeros,) each; a row has length 1, or 0 if the
    text has no word. The hash is CRC-32, which is the same everywhere.
    """
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        words = words_of(text)
        grams = {*words, *map(" ".join, zip(words, words[1:], strict=False))}
        hashed = sorted({zlib.crc32(gram.encode()) % NUM_FEATURES for gram in grams})
        rows += [row] * len(hashed)
        columns += hashed
        values += [1 / np.sqrt(max(1, len(hashed)))] * len(hashed)
    return np.array(rows, int), np.array(columns, int), np.array(values, float)


class LogisticScorer:
    """sigmoid(x w + b) of a text's features x; 0 for a text without any word."""

    def __init__(self, weights: np.ndarray, bias: float, report: str = ""):
        self.weights, self.bias, self.report = weights, bias, report

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        rows, columns, values = features(texts)
        margins = np.bincount(rows, self.weights[columns] * values, minlength=len(texts))
        p = 0.5 * (1 + np.tanh((margins + self.bias) / 2))  # sigmoid that cannot overflow
        return np.where(np.bincount(rows, minlength=len(texts)) > 0, p, 0.0)


def fit(
    texts: Sequence[str], labels: np.ndarray, ridge: float = 1e-5, steps: int = 200, lr: float = 0.2
) -> LogisticScorer:
    """
    Minimise mean weighted cross-entropy + ridge |w|^2 / 2 by Adam on the whole data.

    labels (N,) 0 or 1. Each class gets half of the weight, however rare it is.
    """
    labels = np.asarray(labels, float)
    rows, columns, values = features(texts)
    weight = np.where(labels == 1, 0.5 / max(1, labels.sum()), 0.5 / max(1, (1 - labels).sum()))
    parameters = np.zeros(NUM_FEATURES + 1)  # the last is the bias
    mean, square = np.zeros_like(parameters), np.zeros_like(parameters)
    for step in range(1, steps + 1):
        margins = np.bincount(rows, parameters[columns] * values, minlength=len(labels))
        p = 0.5 * (1 + np.tanh((margins + parameters[-1]) / 2))
        error = weight * (p - labels)
        gradient = ridge * parameters
        gradient[:-1] += np.bincount(columns, error[rows] * values, minlength=NUM_FEATURES)
        gradient[-1] = error.sum()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        size = lr * (1 - step / (steps + 1))
        parameters -= size * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return LogisticScorer(parameters[:-1], float(parameters[-1]))


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a toxic text scores above another, ties as one half (area under the ROC)."""
    ranks = average_ranks(scores)
    positive = np.asarray(labels) == 1
    p, n = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs: (N,)."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def train_scorer(path: str | Path, seed: int = 0) -> LogisticScorer:
    """
    Fit a scorer to a CSV with columns `tweet` (or `text`) and `class` (2 neither, else toxic).

    One text in five is held out; the scorer's `report` says how well it does there.
    """
    texts, labels = [], []
    for where, row in read_rows(Path(path)):
        texts.append(get(row, "tweet" if "tweet" in row else "text", str, where))
        if row.get("class") not in ("0", "1", "2"):
            raise BadInput(
                f'{where}: key "class": expected 0 (hate), 1 (offensive) or 2 '
                f"(neither), found {row.get('class')!r}"
            )
        labels.append(row["class"] != "2")
    held = np.random.default_rng(seed).random(len(texts)) < 0.2
    toxic = np.array(labels)
    if not all(0 < part.sum() < len(part) for part in (toxic[held], toxic[~held])):
        raise BadInput(f"{path}: {len(texts)} texts; expected enough of both toxic and other ones")
    scorer = fit([text for text, out in zip(texts, held, strict=True) if not out], toxic[~held])
    scores = scorer([text for text, out in zip(texts, held, strict=True) if out])
    right = (scores > 0.5) == toxic[held]
    both = (right[toxic[held]].mean() + right[~toxic[held]].mean()) / 2
    scorer.report = (
        f"The toxicity scorer is a logistic regression on word n-grams, trained on {path} "
        f"({(~held).sum():,} texts). On {held.sum():,} held-out ones: accuracy {right.mean():.3f}, "
        f"mean accuracy of the two classes {both:.3f}, area under the ROC curve "
        f"{area_under_curve(scores, toxic[held]):.3f}."
    )
    return scorer
