"""
How a short text is compared with its references, as the authors of each data set define it.

    SQuAD 2.0   exact match and F1 of words (evaluate-v2.0.py of Rajpurkar et al. 2018)
    QuAC        F1 of words, leaving one reference out (scorer.py of Choi et al. 2018)
    DROP        exact match and F1 of bags with numbers (drop_eval.py of Dua et al. 2019)
    WMT         corpus BLEU-4 (Papineni et al. 2002) on the tokens of mteval-v13a
    CNN/DM      ROUGE-L (Lin 2004): F1 of the longest common subsequence of words
    TruthfulQA  MC1 and MC2 (Lin et al. 2022)

Scores are 0..1. Predictions and references are plain text; a question without an answer has the
reference "" in SQuAD and CANNOTANSWER in QuAC, and so has the prediction that there is none.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

PUNCTUATION = set(string.punctuation)
CANNOT_ANSWER = "CANNOTANSWER"


def best(score: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The prediction's score against the reference that suits it best."""
    return max(score(prediction, reference) for reference in references)


# ------------------------------------------------------------------------------ SQuAD and QuAC


def normalize_answer(text: str) -> str:
    """Lower-case, without ASCII punctuation, without a, an, the, with single spaces."""
    text = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if the two are equal once normalized (SQuAD's compute_exact)."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def word_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of normalized words; where one bag is empty, 1 if both are (SQuAD 2.0)."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))  # = 2PR / (P + R)


def quac_references(answers: Sequence[str]) -> list[str]:
    """Only CANNOTANSWER where at least half of the answers are it, else the others."""
    spans = [answer for answer in answers if answer != CANNOT_ANSWER]
    return spans if len(spans) > len(answers) - len(spans) else [CANNOT_ANSWER]


def quac_human_f1(references: Sequence[str]) -> float:
    """Mean over references of the best F1 among the others; QuAC skips questions below 0.4."""
    if len(references) == 1:
        return 1.0
    scores = [
        best(word_f1, reference, [*references[:i], *references[i + 1 :]])
        for i, reference in enumerate(references)
    ]
    return float(np.mean(scores))


def quac_f1(prediction: str, references: Sequence[str]) -> float:
    """
    Mean, over the ways to leave one reference out, of the best F1 with those that are left.

    A person can be compared with the other people's answers only, so neither may a model have all.
    `references` come from `quac_references`.
    """

    def score(reference: str) -> float:
        if CANNOT_ANSWER in (prediction, reference):
            return float(prediction == reference)
        return word_f1(prediction, reference)

    scores = [score(reference) for reference in references]
    if len(scores) == 1:
        return scores[0]
    return float(np.mean([max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))]))


# ----------------------------------------------------------------------------------------- DROP


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _drop_normalize(text: str) -> str:
    """
    Normalize word by word, words being cut at spaces and hyphens.

    Numbers become floats ("5" and "5.0" are one); what is not a number loses its punctuation, and
    may be a number then ("1,000"; "$5").
    """
    words = []
    for word in re.split(" |-", text.lower()):
        if not _is_number(word):
            word = "".join(character for character in word if character not in PUNCTUATION)
        if _is_number(word):
            word = str(float(word))
        words.append(" ".join(re.sub(r"\b(a|an|the)\b", " ", word).split()))
    return " ".join(word for word in words if word)


def _bag_f1(predicted: set[str], expected: set[str]) -> float:
    """F1 of two sets of words, 0 if the reference has numbers and none of them is predicted."""
    numbers = {word for word in expected if _is_number(word)}
    if numbers and not numbers & predicted:
        return 0.0
    shared = len(predicted & expected)
    precision = shared / len(predicted) if predicted else 1.0
    recall = shared / len(expected) if expected else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _best_alignment(scores: np.ndarray) -> float:
    """
    The largest sum of scores with no row and no column used twice.

    By dynamic programming over the subsets of the shorter side, of which there are few: answers
    have few spans. scores (rows, columns), each 0..1.
    """
    scores = scores if scores.shape[0] <= scores.shape[1] else scores.T
    sums = {0: 0.0}  # set of rows that are taken, as bits -> largest sum so far
    for column in scores.T:
        grown = dict(sums)
        for taken, total in sums.items():
            for row, score in enumerate(column):
                if not taken >> row & 1:
                    both = taken | 1 << row
                    grown[both] = max(grown.get(both, 0.0), total + score)
        sums = grown
    return max(sums.values())


def drop_scores(prediction: Sequence[str], reference: Sequence[str]) -> tuple[float, float]:
    """
    Exact match and F1 of the spans of an answer against one reference's.

    Spans are aligned one to one so that the sum of F1 is largest; it is divided by the number of
    spans of the longer answer and rounded to two digits, as the official script does.
    """
    predicted = [_drop_normalize(span) for span in prediction]
    expected = [_drop_normalize(span) for span in reference]
    same = set(predicted) == set(expected) and len(predicted) == len(expected)
    scores = np.array(
        [[_bag_f1(set(p.split()), set(e.split())) for p in predicted] for e in expected]
    )
    f1 = _best_alignment(scores) / max(len(predicted), len(expected))
    return float(same), round(f1, 2)


def drop_best(prediction: str, references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """
    The best exact match and the best F1 of a line of text over the references.

    The official script takes spans. A line is one span; beside a reference of several spans it is
    read as a list, parted at commas and "and". References without any text are skipped.
    """
    parts = [part.strip() for part in re.split(r",(?!\d)|\band\b", prediction) if part.strip()]
    pairs = [
        drop_scores(parts[:12] if len(reference) > 1 and parts else [prediction], reference)
        for reference in references
        if reference and reference[0].strip()
    ]
    exact, f1 = zip(*pairs, strict=True) if pairs else ((0.0,), (0.0,))
    return max(exact), max(f1)


# ---------------------------------------------------------------------------------------- BLEU


def bleu_tokens(text: str) -> list[str]:
    """Tokens of mteval-v13a, NIST's script, for text without SGML; case counts."""
    text = f" {text.replace('-' + chr(10), '').replace(chr(10), ' ')} "
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", text)  # signs stand alone,
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)  # full stop and comma not within numbers,
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)  # hyphens after digits
    return text.split()


def bleu_counts(prediction: str, references: Sequence[str]) -> list[int]:
    """
    What a sentence adds to corpus BLEU: (matches, n-grams) for n = 1..4, length, reference length.

    Matches are clipped at the most that one reference has; the reference length is the nearest to
    the prediction's, the shorter of two.
    """
    tokens, expected = bleu_tokens(prediction), [bleu_tokens(reference) for reference in references]
    counts = []
    for n in range(1, 5):
        ours = _ngrams(tokens, n)
        theirs: Counter = Counter()
        for reference in expected:
            theirs |= _ngrams(reference, n)
        counts += [(ours & theirs).total(), ours.total()]
    nearest = min((len(r) for r in expected), key=lambda size: (abs(size - len(tokens)), size))
    return [*counts, len(tokens), nearest]


def _ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def corpus_bleu(counts: np.ndarray) -> np.ndarray:
    """
    BLEU from summed counts: (..., 10) -> (...,).

        exp(min(0, 1 - r / c) + sum_n log(matches_n / ngrams_n) / 4)

    0 where an order has no match: nothing is smoothed.
    """
    counts = np.asarray(counts, dtype=np.float64)
    matches, totals = counts[..., 0:8:2], counts[..., 1:8:2]
    length, reference = counts[..., 8], counts[..., 9]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.log(matches / totals).mean(axis=-1)
        bleu = np.exp(np.minimum(0, 1 - reference / length) + precision)
    return np.where((matches > 0).all(axis=-1), bleu, 0.0)


# --------------------------------------------------------------------------------- ROUGE, MC1, MC2


def rouge_l(prediction: str, reference: str) -> float:
    """
    F1 of the longest common subsequence of lower-case words (letters and digits), unstemmed.

    P = LCS / words of the prediction, R = LCS / words of the reference, F1 = 2PR / (P + R).
    """
    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    if not ours or not theirs:
        return 0.0
    row = [0] * (len(theirs) + 1)  # LCS of the words of `ours` so far and of each beginning
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, start=1):
            longest = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], longest
    return 2 * row[-1] / (len(ours) + len(theirs))


def multiple_choice_1(best_answer: float, false: Sequence[float]) -> float:
    """1 if the best answer's total log-prob is above that of every false one."""
    return float(best_answer > max(false))


def multiple_choice_2(true: Sequence[float], false: Sequence[float]) -> float:
    """Probability of the true answers over that of all, from total log-probs in nats."""
    top = max(*true, *false)  # so that no exponential is over 1, and one is 1
    p_true, p_false = (np.exp(np.subtract(values, top)).sum() for values in (true, false))
    return float(p_true / (p_true + p_false))


def entropy_bits(logprobs: Sequence[float]) -> float:
    """Entropy in bits of P_i proportional to exp(logprob_i); 1 is no preference among two (D.1)."""
    p = np.exp(np.subtract(logprobs, np.max(logprobs)))
    p = p / p.sum()
    return float(-(p * np.log2(np.clip(p, 1e-300, 1))).sum())
