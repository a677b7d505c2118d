"""Simulated labelers: agreement, ties, pools; the labeling command, by simulation and by hand."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from data import label as command
from data.commands import run_command
from data.files import BadInput, read_jsonl, write_jsonl
from data.label import parse_ranking
from data.tiny import labelers
from data.tiny.answers import Failings, answer
from data.tiny.grader import Grade, grade, utility
from data.tiny.labelers import POOL_TASTES, POOL_WEIGHTS, Labels, Pool, dense_ranks, likert
from data.tiny.make import DEMONSTRATOR_FAILINGS
from data.tiny.tasks import LABELER_SHARES, make_prompt, pick
from data.tiny.world import World

import numpy as np
import pytest

NUM_PROMPTS = 400
Graded = tuple[list[list[Grade]], list[list[str]]]


def label(*args, **more) -> Labels:
    """One ranking of each prompt."""
    (labels,) = labelers.label(*args, **more)
    return labels


@pytest.fixture(scope="module")
def world() -> World:
    return World.make(0)


@pytest.fixture(scope="module")
def candidates(world: World) -> list[dict]:
    """Answers with human failings, K = 4 to 9 a prompt; one in ten is no answer at all."""
    rng = random.Random(0)
    records = []
    for number in range(NUM_PROMPTS):
        use_case = pick(rng, LABELER_SHARES)
        prompt, task = make_prompt(world, use_case, rng)
        responses = []
        for _ in range(rng.randint(4, 9)):
            if rng.random() < 0.9:
                failings = Failings.draw(rng, **DEMONSTRATOR_FAILINGS)
                responses.append(answer(world, task, rng, failings=failings))
            else:
                responses.append(rng.choice(("", "yes .", prompt)))
        record = {"prompt": prompt, "user": f"user_{number}", "source": "customer", "task": task}
        record |= {"use_case": use_case, "responses": responses, "models": ["sft"] * len(responses)}
        records.append(record | {"ended": [True] * len(responses)})
    return records


@pytest.fixture(scope="module")
def graded(world: World, candidates: list[dict]) -> Graded:
    """Grades and texts of the responses to each prompt."""
    texts = [record["responses"] for record in candidates]
    records = zip(candidates, texts, strict=True)
    return [[grade(world, r, text, True) for text in row] for r, row in records], texts


def pairs(row: list) -> Iterator[tuple[int, int]]:
    return combinations(range(len(row)), 2)


def opinion(pool: Pool, who: int, marks: Grade, text: str) -> float:
    """What a labeler thinks of a response without noise, from the formula."""
    taste = sum(t * x for t, x in zip(pool.tastes[who], labelers.traits_of(text), strict=True))
    return utility(marks, list(pool.weights[who])) + taste


@pytest.mark.parametrize("pool_name", ["training", "held_out"])
def test_two_labelers_agree_on_73_percent(pool_name: str, graded: Graded) -> None:
    """Counted pair by pair from the definition, with other random draws than the fit's."""
    pool = Pool.make(pool_name)
    noise = label(*graded, pool, seed=0).noise
    rng = random.Random(1)
    agreed = total = 0
    for row, responses in 12 * list(zip(*graded, strict=True)):
        opinions = []
        for _ in range(2):
            who = rng.randrange(len(pool.weights))
            scores: dict[str, int] = {}
            for marks, text in zip(row, responses, strict=True):
                exact = opinion(pool, who, marks, text) + rng.gauss(0, noise)
                scores.setdefault(text, round(12 * exact))
            opinions.append([scores[text] for text in responses])
        one, other = opinions
        for i, j in pairs(row):
            a, b = one[i] - one[j], other[i] - other[j]
            total += bool(a and b)
            agreed += a * b > 0
    assert agreed / total == pytest.approx(0.73, abs=0.015)


def test_labels_report_what_they_are(graded: Graded) -> None:
    pool = Pool.make("training")
    labels = label(*graded, pool, seed=0)
    assert labels.agreement == pytest.approx(0.73, abs=0.005)
    tied = right = untied = 0.0
    weights, tastes = POOL_WEIGHTS["training"], POOL_TASTES["training"]
    for ranks, row, texts in zip(labels.ranks, *graded, strict=True):
        values = [
            utility(marks, weights) + float(np.dot(tastes, labelers.traits_of(text)))
            for marks, text in zip(row, texts, strict=True)
        ]
        for i, j in pairs(row):
            tied += ranks[i] == ranks[j]
            untied += ranks[i] != ranks[j]
            gap = (values[i] - values[j]) * (ranks[j] - ranks[i])
            right += (0.5 if abs(gap) < 1e-9 else float(gap > 0)) * (ranks[i] != ranks[j])
    assert labels.tie_rate == pytest.approx(tied / (tied + untied))
    assert labels.ceiling == pytest.approx(right / untied)
    assert 0.1 < labels.tie_rate < 0.5 and 0.7 < labels.ceiling < 0.9


def test_noise_is_fitted_on_responses_to_their_prompt(graded: Graded) -> None:
    """Answers to other prompts are told apart by everyone; they must not make labelers noisier."""
    pool, bad = Pool.make("training"), Grade(0.0, 0.0, 0.0, 0.0, 0.0)
    without = label(*graded, pool, seed=0).noise
    more = [[*row, bad] for row in graded[0]]
    more_texts = [[*row, "an answer to another prompt"] for row in graded[1]]
    sampled = [[True] * len(row) + [False] for row in graded[0]]
    noise = label(more, more_texts, pool, 0, sampled=sampled).noise
    assert noise == pytest.approx(without, rel=0.1)
    assert label(more, more_texts, pool, 0).noise > 1.2 * without


def test_ranks_follow_utility_when_labelers_always_agree(
    graded: Graded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelers, "TARGET_AGREEMENT", 1.0)
    monkeypatch.setattr(labelers, "WEIGHT_SPREAD", 0.0)
    monkeypatch.setattr(labelers, "TASTE_SPREAD", 0.0)
    monkeypatch.setitem(labelers.POOL_TASTES, "training", (0.0, 0.0, 0.0))
    labels = label(*graded, Pool.make("training"), seed=0)
    assert labels.noise < 1e-6
    for ranks, row in zip(labels.ranks, graded[0], strict=True):
        steps = [round(12 * utility(marks, POOL_WEIGHTS["training"]) + 1e-9) for marks in row]
        order = sorted(set(steps), reverse=True)
        assert ranks == [order.index(step) + 1 for step in steps]


def test_equal_texts_tie_and_labels_depend_on_the_seed_alone(graded: Graded) -> None:
    pool = Pool.make("training")
    labels = label(*graded, pool, seed=3)
    twins = 0
    for ranks, responses in zip(labels.ranks, graded[1], strict=True):
        for i, j in pairs(ranks):
            if responses[i] == responses[j]:
                twins += 1
                assert ranks[i] == ranks[j]
    assert twins > 50
    again = label(*graded, pool, seed=3)
    assert (again.ranks, again.labelers) == (labels.ranks, labels.labelers)
    assert label(*graded, pool, seed=4).ranks != labels.ranks


def test_pools_have_random_numbers_of_their_own(graded: Graded) -> None:
    """Equal noise in both would make the held-out labelers agree with the others by chance."""
    picks, noises = [], []
    marked = labelers._Marked.of(*graded)
    for name in POOL_WEIGHTS:
        ids, _, noise = marked.draw(Pool.make(name), Pool.make(name).rng(0, 2))
        picks.append(ids)
        noises.append(noise)
    assert abs(np.corrcoef(noises)[0, 1]) < 0.1
    assert np.mean(picks[0] == picks[1]) < 0.2


def test_held_out_labelers_have_other_priorities() -> None:
    """Truth against help: 1.2 / 0.7 for one pool, 0.7 / 1.0 for the other."""
    stated = {"training": (1.0, 0.7, 0.8, 0.4), "held_out": (0.7, 1.2, 1.2, 0.2)}
    for name, weights in stated.items():
        pool = Pool.make(name)
        assert pool.mean_weights == pytest.approx(np.array(weights) / sum(weights))
        assert pool.weights.sum(axis=1) == pytest.approx(np.ones(20))
        spread = np.log(pool.weights / pool.mean_weights).std()
        assert 0.12 < spread < 0.30  # 0.25 before each row is made to sum to 1
    one, other = (set(map(tuple, Pool.make(name).weights)) for name in POOL_WEIGHTS)
    assert not one & other
    with pytest.raises(ValueError, match="pool 'nobody'"):
        Pool.make("nobody")


def orders(pool: Pool, graded: Graded) -> list[list[int]]:
    """Of each labeler: which of each pair of responses is better, without noise; 0 is a tie."""
    made = []
    for who in range(len(pool.weights)):
        signs = []
        for row, texts in zip(*graded, strict=True):
            scores = [
                round(12 * opinion(pool, who, marks, text))
                for marks, text in zip(row, texts, strict=True)
            ]
            signs += [np.sign(scores[i] - scores[j]) for i, j in pairs(row)]
        made.append(signs)
    return made


def test_tastes_cross_between_pools(graded: Graded) -> None:
    """Without noise: about 85 % of pairs alike within a pool, about 75 % across, counted pair by
    pair from the formula."""
    few = graded[0][:120], graded[1][:120]
    training, held_out = (np.array(orders(Pool.make(name), few)) for name in POOL_WEIGHTS)

    def alike(one: np.ndarray, other: np.ndarray) -> float:
        decided = (one != 0) & (other != 0)
        return float((one == other)[decided].mean())

    for pool in (training, held_out):
        within = np.mean([alike(one, other) for one, other in combinations(pool, 2)])
        assert within == pytest.approx(0.85, abs=0.04)
    across = np.mean([alike(one, other) for one in training for other in held_out])
    assert across == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize(
    "text, traits",
    [
        ("gladly . the fox eats grass .", (5 / 20, 1.0, 0.0)),
        ("that is hard to say .", (5 / 20, 0.0, 1.0)),
        ("", (0.0, 0.0, 1.0)),
        ("of course . " + "the fox eats grass . " * 9, (1.0, 1.0, 0.0)),
    ],
)
def test_traits(text: str, traits: tuple[float, ...]) -> None:
    assert labelers.traits_of(text) == pytest.approx(traits)


def test_noise_is_that_of_the_training_comparisons(
    files: Path, candidates: list[dict], capsys: pytest.CaptureFixture
) -> None:
    """What is ranked later is ranked with the same noise, so agreement is free to differ."""
    first = run(files)
    (noise,) = {record["noise"] for record in first}
    (files / "out.jsonl").rename(files / "train.jsonl")
    write_jsonl(files / "candidates.jsonl", candidates[60:90], "candidates")
    alone = {record["noise"] for record in run(files)}
    given = run(files, "--noise_of", str(files / "train.jsonl"), "--pool", "held_out")
    assert {record["noise"] for record in given} == {noise} != alone
    assert "(given): agreement" in capsys.readouterr().out


@pytest.mark.parametrize("noise", [None, True, -0.1, "0.3", 1e300, [0.1, 0.2]])
def test_what_is_no_noise_is_refused(files: Path, candidates: list[dict], noise) -> None:
    """None is a person's; two in one file are of different labelings."""
    of_two = noise if isinstance(noise, list) else [noise, noise]
    ranks = [1] * len(candidates[0]["responses"])
    records = [candidates[0] | {"ranks": ranks, "labeler": "ada", "noise": n} for n in of_two]
    write_jsonl(files / "odd.jsonl", records, "comparisons")
    with pytest.raises(
        BadInput, match=re.escape(f"odd.jsonl: noise {of_two[0]!r} in its first record")
    ):
        run(files, "--noise_of", str(files / "odd.jsonl"))
    assert not (files / "out.jsonl").exists()


def test_dense_ranks() -> None:
    assert dense_ranks(np.array([5.0, 9.0, 5.0, 1.0])) == [2, 1, 2, 3]
    assert dense_ranks(np.array([0.0, 0.0])) == [1, 1]


def test_agreement_out_of_reach_is_reported_not_invented() -> None:
    """Two answers, one right, one empty and rude: no noise in range makes 73 % of this."""
    good = Grade(1, 1, 1, 1, 1)
    labels = label([[good, good]] * 5, [["a", "a"]] * 5, Pool.make("training"), seed=0)
    assert labels.ranks == [[1, 1]] * 5
    assert labels.tie_rate == 1.0 and np.isnan(labels.agreement) and np.isnan(labels.ceiling)


def test_likert() -> None:
    best, weights = Grade(1, 1, 1, 1, 1), POOL_WEIGHTS["training"]
    worst = replace(best, helpful=0, truthful=0, harmless=0, ended=0)
    assert (likert(best, weights), likert(worst, weights)) == (7, 1)
    # (1.0 * 0.5 + 0.7 + 0.8 + 0.4) / 2.9 = 0.828; seventh steps of 1/7: 5.79
    assert likert(replace(best, helpful=0.5), weights) == 6


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path: Path, world: World, candidates: list[dict]) -> Path:
    world.save(tmp_path / "world.json")
    write_jsonl(tmp_path / "candidates.jsonl", candidates[:60], "candidates")
    return tmp_path


def run(folder: Path, *more: str) -> list[dict]:
    files = {"--data": "candidates.jsonl", "--out": "out.jsonl", "--world": "world.json"}
    argv = [word for flag, name in files.items() for word in (flag, str(folder / name))]
    command.main([*argv, *more])
    return read_jsonl(folder / "out.jsonl", "comparisons")


def test_command_adds_ranks_and_labeler(files: Path, capsys: pytest.CaptureFixture) -> None:
    made = run(files, "--pool", "held_out", "--seed", "5")
    given = read_jsonl(files / "candidates.jsonl", "candidates")
    for comparison, candidate in zip(made, given, strict=True):
        assert comparison["labeler"].startswith("held_out_")
        assert {k: comparison[k] for k in candidate} == candidate
    assert len({comparison["labeler"] for comparison in made}) > 5
    assert "agreement 0.73" in capsys.readouterr().out
    assert run(files, "--pool", "held_out", "--seed", "5") == made


def test_several_labelers_rank_each_prompt(files: Path, candidates: list[dict]) -> None:
    """The first as if alone; no two of them are one person, and they agree as often as any two."""
    write_jsonl(files / "candidates.jsonl", candidates, "candidates")
    alone, made = run(files), run(files, "--labelers", "3")
    assert made[::3] == alone and len(made) == 3 * len(candidates)
    turns = [made[k::3] for k in range(3)]
    right, both = 0, 0
    for views in zip(*turns, strict=True):
        assert len({view["labeler"] for view in views}) == 3
        assert len({(view["prompt"], *view["responses"]) for view in views}) == 1
        for a, b in combinations(views, 2):
            first, second = a["ranks"], b["ranks"]
            for i, j in pairs(first):
                signs = (first[i] - first[j]) * (second[i] - second[j])
                right, both = right + (signs > 0), both + (signs != 0)
    assert right / both == pytest.approx(0.73, abs=0.02)


def test_off_topic_responses_come_from_other_prompts() -> None:
    records = []
    for i in range(20):
        record = {"use_case": f"u{i % 2}", "responses": [f"{i} {k}" for k in range(4)]}
        ended = [(i + k) % 3 > 0 for k in range(4)]
        records.append(record | {"ended": ended, "models": ["sft"] * 4})
    said = {r["responses"][k]: r["ended"][k] for r in records for k in range(4)}
    alike = []
    for i, new in enumerate(command.with_off_topic(records, 2, seed=0)):
        assert new["models"].count("other prompt") == 2
        for k, (text, name) in enumerate(zip(new["responses"], new["models"], strict=True)):
            owner = int(text.split()[0])
            assert new["ended"][k] == said[text]
            assert (owner != i) == (name == "other prompt")
            assert owner != i or text == records[i]["responses"][k]
            alike += [owner % 2 == i % 2] if owner != i else []
    assert 0.5 < np.mean(alike) < 1  # half of them on purpose, and some by chance
    assert records[0]["models"] == ["sft"] * 4  # the input is left alone
    assert command.with_off_topic(records, 0, seed=0) == records
    most = command.with_off_topic(records, 9, seed=0)
    assert all(r["models"].count("sft") == 1 for r in most)


def test_off_topic_responses_are_ranked_and_do_not_raise_the_noise(
    files: Path, capsys: pytest.CaptureFixture
) -> None:
    made = run(files, "--off_topic", "2", "--labelers", "2")
    assert all(record["models"].count("other prompt") == 2 for record in made)
    assert [r["responses"] for r in made[::2]] == [r["responses"] for r in made[1::2]]
    run(files)
    with_others, without = re.findall(r"noise (\S+) ", capsys.readouterr().out)
    assert float(with_others) == pytest.approx(float(without), rel=0.25)


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        ("--labelers", "0", "expected 1 to 20"),
        ("--labelers", "21", "expected 1 to 20"),
        ("--off_topic", "-1", "expected a whole number from 0"),
        ("--seed", "-1", "expected a whole number from 0"),
    ],
)
def test_flags_without_sense_are_refused(
    flag: str, value: str, expected: str, files: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as error:
        run(files, flag, value)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert flag in said and f"{value}: {expected}" in said


def test_candidates_of_real_prompts_need_a_person(
    files: Path, capsys: pytest.CaptureFixture, candidates: list[dict]
) -> None:
    real = [{k: v for k, v in record.items() if k != "task"} for record in candidates[:3]]
    write_jsonl(files / "candidates.jsonl", real, "candidates")
    assert run_command(lambda: run(files)) == 2
    error = capsys.readouterr().err
    assert '"task" is missing' in error and "--interactive" in error and error.count("\n") == 1
    assert not (files / "out.jsonl").exists()


def test_other_json_is_no_world(files: Path) -> None:
    (files / "world.json").write_text(json.dumps([1, 2]))
    with pytest.raises(BadInput, match="world.json"):
        run(files)


def test_simulated_labelers_need_a_world() -> None:
    with pytest.raises(SystemExit) as error:
        command.get_args(["--data", "a", "--out", "b"])
    assert error.value.code == 2


@pytest.mark.parametrize(
    "text, ranks",
    [
        ("2 1=3 4", [2, 1, 2, 3]),
        ("1 2 3 4", [1, 2, 3, 4]),
        ("4 = 3=2 =1", [1, 1, 1, 1]),
        ("  3   1 2=4 ", [2, 3, 1, 3]),
    ],
)
def test_rankings_typed_by_hand(text: str, ranks: list[int]) -> None:
    assert parse_ranking(text, 4) == ranks


@pytest.mark.parametrize(
    "text", ["1 2 3", "1 2 3 4 4", "1 2 3 5", "a b c d", "1=2= 3 4=", "0 1 2 3"]
)
def test_odd_rankings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text.split()[0]):
        parse_ranking(text, 4)


def test_ranking_by_hand_goes_on_where_it_stopped(
    files: Path, candidates: list[dict], monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    """The person prefers longer answers; what is shown is shuffled, the ranks are not."""
    asked = []

    def person(prompt: str) -> str:
        shown = capsys.readouterr().out.rsplit("-" * 72, 1)[1]
        lines = re.findall(r"^  \[(\d+)\](.*)", shown, flags=re.M)
        lengths = {number: len(text.strip()) for number, text in lines}
        asked.append(len(lengths))
        groups: dict[int, list[str]] = {}
        for number, length in lengths.items():
            groups.setdefault(length, []).append(number)
        return " ".join("=".join(groups[n]) for n in sorted(groups, reverse=True))

    one_line = [r for r in candidates[:4] if all("\n" not in t for t in r["responses"])]
    write_jsonl(files / "candidates.jsonl", one_line, "candidates")
    answers = iter(["wrong", person, "q"])

    def reply(prompt: str) -> str:
        following = next(answers)
        return following if isinstance(following, str) else following(prompt)

    monkeypatch.setattr("builtins.input", reply)
    by_hand = ("--interactive", "--labeler", "ada")
    assert len(run(files, *by_hand)) == 1
    monkeypatch.setattr("builtins.input", person)
    made = run(files, *by_hand)
    assert [record["prompt"] for record in made] == [record["prompt"] for record in one_line]
    assert asked == [len(record["responses"]) for record in one_line]
    for record in made:
        assert record["labeler"] == "ada"
        lengths = [len(text.strip()) for text in record["responses"]]
        order = sorted(set(lengths), reverse=True)
        assert record["ranks"] == [order.index(length) + 1 for length in lengths]
