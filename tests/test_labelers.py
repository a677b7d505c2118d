"""Simulated labelers: agreement, ties, pools; the labeling command, by simulation and by hand."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import label as command
from data.files import BadInput, read_jsonl, run_command, write_jsonl
from data.label import parse_ranking
from data.tiny import labelers
from data.tiny.answers import Failings, answer
from data.tiny.grader import Grade, grade, utility
from data.tiny.labelers import POOL_WEIGHTS, Labels, Pool, dense_ranks, likert, metadata
from data.tiny.tasks import LABELER_SHARES, make_prompt, pick
from data.tiny.world import World

NUM_PROMPTS = 400


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
        responses = [
            answer(world, task, rng, failings=Failings.draw(rng, 0.2, 0.2, 0.2, 0.4))
            if rng.random() < 0.9
            else rng.choice(("", "yes .", prompt))
            for _ in range(rng.randint(4, 9))
        ]
        records.append(
            {
                "prompt": prompt,
                "user": f"user_{number}",
                "source": "customer",
                "use_case": use_case,
                "task": task,
                "responses": responses,
                "ended": [True] * len(responses),
                "models": ["sft"] * len(responses),
            }
        )
    return records


@pytest.fixture(scope="module")
def grades(world: World, candidates: list[dict]) -> list[list[Grade]]:
    return [
        [grade(world, record, text, True) for text in record["responses"]] for record in candidates
    ]


def texts(candidates: list[dict]) -> list[list[str]]:
    return [record["responses"] for record in candidates]


@pytest.mark.parametrize("pool_name", ["training", "held_out"])
def test_two_labelers_agree_on_73_percent(
    pool_name: str, candidates: list[dict], grades: list[list[Grade]]
) -> None:
    """Counted pair by pair from the definition, with other random draws than the fit's."""
    pool = Pool.make(pool_name)
    noise = label(grades, texts(candidates), pool, seed=0).noise
    rng = random.Random(1)
    agreed = total = 0
    for _ in range(12):
        for row, responses in zip(grades, texts(candidates), strict=True):
            opinions = []
            for _ in range(2):
                weights = pool.weights[rng.randrange(len(pool.weights))]
                scores: dict[str, int] = {}
                for marks, text in zip(row, responses, strict=True):
                    exact = utility(marks, list(weights)) + rng.gauss(0, noise)
                    scores.setdefault(text, round(12 * exact))
                opinions.append([scores[text] for text in responses])
            one, other = opinions
            for i in range(len(row)):
                for j in range(i):
                    a, b = one[i] - one[j], other[i] - other[j]
                    if a and b:
                        total += 1
                        agreed += (a > 0) == (b > 0)
    assert agreed / total == pytest.approx(0.73, abs=0.015)


def test_labels_report_what_they_are(candidates: list[dict], grades: list[list[Grade]]) -> None:
    pool = Pool.make("training")
    labels = label(grades, texts(candidates), pool, seed=0)
    assert labels.agreement == pytest.approx(0.73, abs=0.005)
    tied = right = untied = 0.0
    weights = POOL_WEIGHTS["training"]
    for ranks, row in zip(labels.ranks, grades, strict=True):
        values = [utility(marks, weights) for marks in row]
        for i in range(len(row)):
            for j in range(i):
                tied += ranks[i] == ranks[j]
                if ranks[i] != ranks[j]:
                    untied += 1
                    gap = (values[i] - values[j]) * (ranks[j] - ranks[i])
                    right += 0.5 if abs(gap) < 1e-9 else float(gap > 0)
    assert labels.tie_rate == pytest.approx(tied / (tied + untied))
    assert labels.ceiling == pytest.approx(right / untied)
    assert 0.1 < labels.tie_rate < 0.5 and 0.7 < labels.ceiling < 0.9


def test_noise_is_fitted_on_responses_to_their_prompt(
    candidates: list[dict], grades: list[list[Grade]]
) -> None:
    """Answers to other prompts are told apart by everyone; they must not make labelers noisier."""
    pool, bad = Pool.make("training"), Grade(0.0, 0.0, 0.0, 0.0, 0.0)
    without = label(grades, texts(candidates), pool, seed=0).noise
    more = [[*row, bad] for row in grades]
    more_texts = [[*row, "an answer to another prompt"] for row in texts(candidates)]
    sampled = [[True] * len(row) + [False] for row in grades]
    noise = label(more, more_texts, pool, 0, sampled=sampled).noise
    assert noise == pytest.approx(without, rel=0.1)
    assert label(more, more_texts, pool, 0).noise > 1.2 * without


def test_ranks_follow_utility_when_labelers_always_agree(
    candidates: list[dict], grades: list[list[Grade]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelers, "TARGET_AGREEMENT", 1.0)
    monkeypatch.setattr(labelers, "WEIGHT_SPREAD", 0.0)
    labels = label(grades, texts(candidates), Pool.make("training"), seed=0)
    assert labels.noise < 1e-6
    for ranks, row in zip(labels.ranks, grades, strict=True):
        steps = [round(12 * utility(marks, POOL_WEIGHTS["training"]) + 1e-9) for marks in row]
        order = sorted(set(steps), reverse=True)
        assert ranks == [order.index(step) + 1 for step in steps]


def test_equal_texts_tie_and_labels_depend_on_the_seed_alone(
    candidates: list[dict], grades: list[list[Grade]]
) -> None:
    pool = Pool.make("training")
    labels = label(grades, texts(candidates), pool, seed=3)
    twins = 0
    for ranks, responses in zip(labels.ranks, texts(candidates), strict=True):
        for i in range(len(ranks)):
            for j in range(i):
                if responses[i] == responses[j]:
                    twins += 1
                    assert ranks[i] == ranks[j]
    assert twins > 50
    again = label(grades, texts(candidates), pool, seed=3)
    assert (again.ranks, again.labelers) == (labels.ranks, labels.labelers)
    assert label(grades, texts(candidates), pool, seed=4).ranks != labels.ranks


def test_pools_have_random_numbers_of_their_own(
    candidates: list[dict], grades: list[list[Grade]]
) -> None:
    """Equal noise in both would make the held-out labelers agree with the others by chance."""
    picks, noises = [], []
    marked = labelers._Marked.of(grades, texts(candidates))
    for name in POOL_WEIGHTS:
        ids, _, noise = marked.draw(Pool.make(name), Pool.make(name).rng(0, 2))
        picks.append(ids)
        noises.append(noise)
    assert abs(np.corrcoef(noises)[0, 1]) < 0.1
    assert np.mean(picks[0] == picks[1]) < 0.2


def test_held_out_labelers_have_other_priorities() -> None:
    """Truth against help: 1.2 / 0.7 for one pool, 0.7 / 1.0 for the other."""
    for name, (helpful, truthful, harmless, ended) in {
        "training": (1.0, 0.7, 0.8, 0.4),
        "held_out": (0.7, 1.2, 1.2, 0.2),
    }.items():
        pool = Pool.make(name)
        total = helpful + truthful + harmless + ended
        assert pool.mean_weights == pytest.approx(
            np.array([helpful, truthful, harmless, ended]) / total
        )
        assert pool.weights.sum(axis=1) == pytest.approx(np.ones(20))
        spread = np.log(pool.weights / pool.mean_weights).std()
        assert 0.12 < spread < 0.30  # 0.25 before each row is made to sum to 1
    assert not set(map(tuple, Pool.make("training").weights)) & set(
        map(tuple, Pool.make("held_out").weights)
    )
    with pytest.raises(ValueError, match="pool 'nobody'"):
        Pool.make("nobody")


def test_dense_ranks() -> None:
    assert dense_ranks(np.array([5.0, 9.0, 5.0, 1.0])) == [2, 1, 2, 3]
    assert dense_ranks(np.array([0.0, 0.0])) == [1, 1]


def test_agreement_out_of_reach_is_reported_not_invented() -> None:
    """Two answers, one right, one empty and rude: no noise in range makes 73 % of this."""
    good = Grade(1, 1, 1, 1, 1)
    labels = label([[good, good]] * 5, [["a", "a"]] * 5, Pool.make("training"), seed=0)
    assert labels.ranks == [[1, 1]] * 5
    assert labels.tie_rate == 1.0 and np.isnan(labels.agreement) and np.isnan(labels.ceiling)


def test_likert_and_metadata() -> None:
    best, weights = Grade(1, 1, 1, 1, 1), POOL_WEIGHTS["training"]
    worst = replace(best, helpful=0, truthful=0, harmless=0, ended=0)
    assert (likert(best, weights), likert(worst, weights)) == (7, 1)
    # (1.0 * 0.5 + 0.7 + 0.8 + 0.4) / 2.9 = 0.828; seventh steps of 1/7: 5.79
    assert likert(replace(best, helpful=0.5), weights) == 6
    assert metadata(replace(best, constraints=0.5, fabricated=True, harmless=0.5)) == {
        "fails_task": False,
        "inappropriate": True,
        "satisfies_constraint": False,
        "hallucination": True,
        "hedges": False,
    }
    assert metadata(replace(best, informative=0.0))["fails_task"] is True
    assert metadata(best)["satisfies_constraint"] is None


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path: Path, world: World, candidates: list[dict]) -> Path:
    world.save(tmp_path / "world.json")
    write_jsonl(tmp_path / "candidates.jsonl", candidates[:60], "candidates")
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "--data",
        str(folder / "candidates.jsonl"),
        "--out",
        str(folder / "out.jsonl"),
        "--world",
        str(folder / "world.json"),
        *more,
    ]


def test_command_adds_ranks_and_labeler(files: Path, capsys: pytest.CaptureFixture) -> None:
    command.main(arguments(files, "--pool", "held_out", "--seed", "5"))
    made = read_jsonl(files / "out.jsonl", "comparisons")
    given = read_jsonl(files / "candidates.jsonl", "candidates")
    for comparison, candidate in zip(made, given, strict=True):
        assert comparison["labeler"].startswith("held_out_")
        assert {k: comparison[k] for k in candidate} == candidate
    assert len({comparison["labeler"] for comparison in made}) > 5
    assert "agreement 0.73" in capsys.readouterr().out
    before = (files / "out.jsonl").read_bytes()
    command.main(arguments(files, "--pool", "held_out", "--seed", "5"))
    assert (files / "out.jsonl").read_bytes() == before


def test_several_labelers_rank_each_prompt(
    files: Path, candidates: list[dict], grades: list[list[Grade]]
) -> None:
    """The first as if alone; no two of them are one person, and they agree as often as any two."""
    write_jsonl(files / "candidates.jsonl", candidates, "candidates")
    command.main(arguments(files))
    alone = read_jsonl(files / "out.jsonl", "comparisons")
    command.main(arguments(files, "--labelers", "3"))
    made = read_jsonl(files / "out.jsonl", "comparisons")
    assert made[::3] == alone and len(made) == 3 * len(candidates)
    turns = [made[k::3] for k in range(3)]
    right, both = 0, 0
    for views in zip(*turns, strict=True):
        assert len({view["labeler"] for view in views}) == 3
        assert len({(view["prompt"], *view["responses"]) for view in views}) == 1
        for a, b in ((0, 1), (0, 2), (1, 2)):
            first, second = views[a]["ranks"], views[b]["ranks"]
            for i in range(len(first)):
                for j in range(i):
                    signs = (first[i] - first[j]) * (second[i] - second[j])
                    right, both = right + (signs > 0), both + (signs != 0)
    assert right / both == pytest.approx(0.73, abs=0.02)


@pytest.mark.parametrize("number", ["0", "21", "-1"])
def test_a_number_of_labelers_that_the_pool_has(
    number: str, files: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(arguments(files, "--labelers", number))
    assert error.value.code == 2
    assert f"--labelers {number}: expected 1 to 20" in capsys.readouterr().err


def test_candidates_of_real_prompts_need_a_person(
    files: Path, capsys: pytest.CaptureFixture, candidates: list[dict]
) -> None:
    real = [{k: v for k, v in record.items() if k != "task"} for record in candidates[:3]]
    write_jsonl(files / "candidates.jsonl", real, "candidates")
    assert run_command(lambda: command.main(arguments(files))) == 2
    error = capsys.readouterr().err
    assert '"task" is missing' in error and "--interactive" in error and error.count("\n") == 1
    assert not (files / "out.jsonl").exists()


def test_other_json_is_no_world(files: Path) -> None:
    (files / "world.json").write_text(json.dumps([1, 2]))
    with pytest.raises(BadInput, match="world.json"):
        command.main(arguments(files))


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
    files: Path,
    candidates: list[dict],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The person prefers longer answers; what is shown is shuffled, the ranks are not."""
    write_jsonl(files / "candidates.jsonl", candidates[:4], "candidates")
    asked = []

    def person(prompt: str) -> str:
        shown = capsys.readouterr().out.rsplit("-" * 72, 1)[1]
        lengths = {}
        for line in shown.splitlines():
            if line.startswith("  ["):
                number, text = line.strip()[1:].split("]", 1)
                lengths[number] = len(text.strip())
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
    command.main(arguments(files, "--interactive", "--labeler", "ada"))
    assert len(read_jsonl(files / "out.jsonl", "comparisons")) == 1
    monkeypatch.setattr("builtins.input", person)
    command.main(arguments(files, "--interactive", "--labeler", "ada"))
    made = read_jsonl(files / "out.jsonl", "comparisons")
    assert [record["prompt"] for record in made] == [record["prompt"] for record in one_line]
    assert asked == [len(record["responses"]) for record in one_line]
    for record in made:
        assert record["labeler"] == "ada"
        lengths = [len(text.strip()) for text in record["responses"]]
        order = sorted(set(lengths), reverse=True)
        assert record["ranks"] == [order.index(length) + 1 for length in lengths]
