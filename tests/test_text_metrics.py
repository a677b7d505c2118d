"""text_metrics.py, toxicity.py: hand-worked items by the official definitions, brute force, and
what is known of OpenAI's released samples."""

import csv
import itertools
import math
from pathlib import Path

from data.files import BadInput
from data.real import toxicity
from data.real.public_items import Completion, released_item
from data.real.public_sets import score_quac, score_squad2, score_wsc
from data.real.text_metrics import (
    CANNOT_ANSWER,
    _best_alignment,
    bleu_counts,
    bleu_tokens,
    corpus_bleu,
    drop_best,
    drop_scores,
    entropy_bits,
    exact_match,
    multiple_choice_1,
    multiple_choice_2,
    quac_f1,
    quac_human_f1,
    quac_references,
    rouge_l,
    word_f1,
)

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),  # case, punctuation and articles do not count
        ("Paris, in France", "Paris France", 0, 0.8),  # P 2/3, R 1
        ("no no no", "no", 0, 0.5),  # a bag: one of three matches,
        ("no no no", "no no", 0, 0.8),  # two of three
        ("London", "Paris", 0, 0),
        ("", "", 1, 1),  # rightly no answer
        ("Paris", "", 0, 0),
        ("", "Paris", 0, 0),
    ],
)
def test_squad(prediction: str, reference: str, exact: float, f1: float) -> None:
    assert exact_match(prediction, reference) == exact
    assert word_f1(prediction, reference) == pytest.approx(f1)


def test_squad_lines() -> None:
    """The phrase asked for is "no answer"; a line without words is not; the best reference
    counts."""
    unanswerable, known = (Completion("", "", r, "") for r in (("",), ("around $9", "$9")))
    assert score_squad2("Not in background.", unanswerable) == {"f1": 1, "exact_match": 1}
    assert score_squad2("not in background", known) == {"f1": 0, "exact_match": 0}
    for line in ("", "...", "The"):
        assert score_squad2(line, unanswerable) == {"f1": 0, "exact_match": 0}
    assert score_squad2("9", known) == {"f1": 1, "exact_match": 1}


def test_quac() -> None:
    assert quac_references(["a fox", CANNOT_ANSWER, CANNOT_ANSWER]) == [CANNOT_ANSWER]
    assert quac_references(["a fox", CANNOT_ANSWER]) == [CANNOT_ANSWER]  # half is enough
    assert quac_references(["a fox", "a dog", CANNOT_ANSWER]) == ["a fox", "a dog"]
    references = ["red fox", "red dog", "blue"]
    # F1 of the first with the three is 1, 1/2, 0; leaving one out: 1/2, 1, 1.
    assert quac_f1("red fox", references) == pytest.approx(2.5 / 3)
    assert quac_human_f1(references) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert quac_f1(CANNOT_ANSWER, references) == 0
    assert quac_f1("red", [CANNOT_ANSWER]) == 0
    assert score_quac("I don't know.", Completion("", "", (CANNOT_ANSWER,), "")) == {"f1": 1}


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        (["5.0"], ["5"], 1, 1),  # numbers are compared as numbers
        (["$1,000"], ["1000"], 1, 1),
        (["5 yards"], ["5"], 0, 0.67),  # P 1/2, R 1
        (["6 yards"], ["5 yards"], 0, 0),  # the number is wrong: nothing counts
        (["yards"], ["5 yards"], 0, 0),
        (["third-quarter"], ["third quarter"], 1, 1),  # hyphens part words
        (["the Jones", "Smith"], ["Smith", "Jones"], 1, 1),  # in any order
        (["Smith", "Jones"], ["John Smith", "Jones"], 0, 0.83),  # (2/3 + 1) / 2
        (["Jones"], ["John Smith", "Jones"], 0, 0.5),  # one of two
        (["Jones", "Jones"], ["Jones"], 0, 0.5),  # said twice is not the same
        (["a b c", "b c"], ["b c", "b"], 0, 0.83),  # greedy in this order would find less
    ],
)
def test_drop(prediction: list[str], reference: list[str], exact: float, f1: float) -> None:
    assert drop_scores(prediction, reference) == (exact, pytest.approx(f1))


def test_drop_reads_a_line_as_a_list_beside_several_spans_only() -> None:
    assert drop_best("Smith, Jones and 1,000", [("Jones", "Smith", "1,000")]) == (1, 1)
    assert drop_best("4 July, 1941", [("4 July 1941",)]) == (1, 1)
    assert drop_best("7", [(" ",), ("8",), ("7",)]) == (1, 1)  # the best; blank ones are skipped
    assert drop_best("", [("8",)]) == (0, 0)


def test_alignment_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (2, 3), (3, 2), (4, 4), (1, 5), (5, 3)):
        scores = rng.random(shape).round(1)
        small, large = sorted(shape)
        wide = scores if shape[0] == small else scores.T
        expected = max(
            sum(wide[i, j] for i, j in enumerate(columns))
            for columns in itertools.permutations(range(large), small)
        )
        assert _best_alignment(scores) == pytest.approx(expected)


def test_bleu_by_hand() -> None:
    counts = bleu_counts("the cat sat on the mat", ["the cat sat on a mat"])
    assert counts == [5, 6, 3, 5, 2, 4, 1, 3, 6, 6]  # "the" is clipped at one
    assert corpus_bleu(np.array(counts)) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 / 3) ** 0.25)
    short = np.array(bleu_counts("a b c d e", ["a b c d e f g"]))
    assert corpus_bleu(short) == pytest.approx(math.exp(1 - 7 / 5))  # brevity alone
    assert corpus_bleu(np.array(bleu_counts("a b c", ["a b c"]))) == 0  # has no 4-gram
    assert corpus_bleu(np.array(bleu_counts("", ["a b c"]))) == 0
    # Lengths 2 and 4 are as near to 3: the shorter counts. An n-gram counts as in one reference.
    assert bleu_counts("a a b", ["a b", "a a a c"])[-2:] == [3, 2]
    assert bleu_counts("a a b", ["a b", "a c a c"])[0] == 3
    assert bleu_counts("a a a", ["a b", "a c"])[0] == 1
    # The corpus is not the mean of its sentences: counts are summed.
    assert corpus_bleu(np.stack([counts, short]).sum(axis=0)) == pytest.approx(
        (10 / 11 * 7 / 9 * 5 / 7 * 3 / 5) ** 0.25 * math.exp(1 - 13 / 11)
    )


def test_bleu_tokens() -> None:
    text = 'It\'s 3,000.5 miles, "far" (1990-s); &amp; A/B.'
    expected = 'It\'s 3,000.5 miles , " far " ( 1990 - s ) ; & A / B .'
    assert bleu_tokens(text) == expected.split(" ")


def test_rouge_l() -> None:
    # Lin's example: of four words each, three in common order.
    assert rouge_l("police kill the gunman", "Police killed the gunman.") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("a b", "a x y b z") == pytest.approx(2 * 2 / 7)
    assert rouge_l("", "a") == 0


def test_truthfulqa_and_entropy() -> None:
    true, false = np.log([0.2, 0.1]), np.log([0.1])
    assert multiple_choice_2(true, false) == pytest.approx(0.75)
    assert multiple_choice_2(true - 2000, false - 2000) == pytest.approx(0.75)  # no underflow
    assert multiple_choice_1(-3.0, [-4.0, -5.0]) == 1
    assert multiple_choice_1(-3.0, [-4.0, -2.0]) == 0
    assert multiple_choice_1(-3.0, [-3.0]) == 0
    bits = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert entropy_bits(np.log([0.9, 0.1]) - 900) == pytest.approx(bits)
    assert entropy_bits([-7.0, -7.0]) == pytest.approx(1)
    assert entropy_bits([0.0, -5000.0]) == 0


def test_wsc_is_a_containment_check_of_words() -> None:
    def accuracy(line: str, label: bool, noun: str = "the tall man") -> float:
        return score_wsc(line, Completion("", "", ((noun, label),), ""))["accuracy"]

    assert accuracy("The tall man.", True) == accuracy("man", True) == 1
    assert accuracy("the tall man with a hat", True) == accuracy("the boy", False) == 1
    assert accuracy("the boy", True) == accuracy("tall man", False) == 0
    assert accuracy("", True) == accuracy("", False) == 0
    assert accuracy("he", True, "the teacher") == accuracy("mantle", True, "man") == 0
    assert accuracy("the man", False, "the old man") == accuracy("tall, old man", True) == 0
    assert accuracy("a man", True, "the man of old") == accuracy("me", False, "some men") == 1


# ---------------------------------------------------------------------------------------- toxicity


def write_labels(path: Path, num: int = 200) -> Path:
    """Tweets that are toxic where they hold one of two made-up slurs."""
    rng = np.random.default_rng(1)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["", "count", "class", "tweet"])
        for i in range(num):
            kind = int(rng.integers(3))
            words = list(rng.choice(["sun", "rain", "tree", "walk", "tea", "you"], 4))
            words += [["zork"], ["blarg"], []][kind]
            writer.writerow([i, 3, kind, f"RT @u{i}: " + " ".join(rng.permutation(words))])
    return path


def test_the_scorer_learns_which_words_are_toxic(tmp_path: Path) -> None:
    scorer = toxicity.train_scorer(write_labels(tmp_path / "labels.csv"))
    scores = scorer(["You ZORK!", "a blarg tree", "sun rain tree you", ""])
    assert (scores[:2] > 0.9).all() and 0 < scores[2] < 0.5 and scores[3] == 0
    assert "accuracy 1.000" in scorer.report
    assert scorer(["zork"]) == scorer(["https://x.y/z @me zork"])  # addresses do not count
    text = (tmp_path / "labels.csv").read_text().replace(",2,", ",x,", 1)
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(BadInput, match=r'row \d+: key "class"'):
        toxicity.train_scorer(tmp_path / "bad.csv")


def test_area_under_the_curve_is_the_share_of_pairs() -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.integers(5, size=40) / 4, rng.integers(2, size=40)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert toxicity.area_under_curve(scores, labels) == pytest.approx(np.mean(pairs))


def test_the_means_of_openais_samples(real_data: Path) -> None:
    """PPO pays the alignment tax on SQuAD 2.0 and PPO-ptx does not (paper 4.2)."""
    path = real_data / "eval" / "instructgpt_samples" / "squadv2_samples.csv"
    if not path.is_file():
        pytest.skip("no released samples")
    f1: dict[str, list[float]] = {}
    for row in csv.DictReader(path.open(encoding="utf-8", newline="")):
        if row["prompt_type"] == "fewshot":
            scores = score_squad2(row["sample"], released_item(row, "row", is_drop=False))
            f1.setdefault(row["model_type"], []).append(scores["f1"])
    gpt, ppo, ppo_ptx = (np.mean(f1[f"{m}-175b"]) for m in ("gpt", "ppo-noptx", "ppo-ptx"))
    assert ppo + 0.1 < ppo_ptx < gpt + 0.02
