"""tests/claims: gates on planted numbers, the graph of runs, fits, table, figures and page."""

import csv
import inspect
import json
import math
import re
import shutil
import struct
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from data.commands import run_command
from data.files import read_jsonl, write_jsonl
from data.tiny.grader import Grade
from data.tokenizer import encode_prompt, encode_response

import numpy as np
import pytest

import evaluate
import sample
import train_ppo
import train_rm
import train_sft
from evaluation import measure
from evaluation.report import Estimate, labelers_win_scores
from model import GPT, ScalarModel, pad_right
from sample import Sample
from tests.claims import __main__ as command
from tests.claims import pipeline, variants
from tests.claims.lab import Answers, Lab, first_line
from tests.claims.pipeline import Graph, Runner, Seed, Stage, edit, recipes
from tests.claims.sweeps import best_of_n, fit_gao, fitted_peak, gao_curve
from tests.claims.verdict import CLAIMS, TOPICS, Panel, Result, Row, minus, passes, together
from tests.tiny import Tiny

# ------------------------------------------------------------------------------ gates


GATES = """0.51 0.6 above 0.5 True, 0.5 0.6 above 0.5 False, 0.4 0.49 below 0.5 True
0.4 0.5 below 0.5 False, -0.1 0.2 not above 0 True, 0.01 0.2 not above 0 False
-0.2 0.1 not below 0 True, -0.2 -0.1 not below 0 False, -0.09 0.1 within 0.1 True
-0.11 0.0 within 0.1 False, 0.0 0.11 within 0.1 False, 0.0 1.0 None
nan nan above 0 False, nan nan below 0 False, nan nan not above 0 False
nan nan not below 0 False, nan nan within 1 False"""


@pytest.mark.parametrize("case", re.split(r", |\n", GATES))
def test_gates_are_about_the_interval(case: str) -> None:
    low, high, *gate, expected = case.split()
    low, high = float(low), float(high)
    held = passes(Estimate((low + high) / 2, low, high), " ".join(gate))
    assert str(held) == expected


def test_a_claim_holds_if_all_its_gates_do() -> None:
    good, bad = Row("a", Estimate(1, 0.9, 1.1), "above 0"), Row("b", Estimate(0, -1, 1), "above 0")
    told = Row("c", Estimate(0, -1, 1))
    assert Result([good, told], []).holds and not Result([good, bad], []).holds
    kept = json.dumps(Result([good, bad], [Panel("", "y")]).to_json())
    again = Result.from_json(json.loads(kept))
    assert again.rows[1].holds is False and again.panels[0].kind == "bars"


def test_combined_intervals_by_hand() -> None:
    a, b = Estimate(0.6, 0.57, 0.63), Estimate(0.5, 0.46, 0.54)
    d = minus(a, b)
    assert (d.value, d.high - d.value) == (pytest.approx(0.1), pytest.approx(0.05))
    t = together([a, b])
    assert (t.value, t.high - t.value) == (pytest.approx(0.55), pytest.approx(0.025))


# -------------------------------------------------- every claim on planted models, good and equal

RANK = {"base": 0.1, "base+prefix": 0.3, "public_selected": 0.45, "init": 0.6}
RANK |= {"sft_selected": 0.65, "ppo": 0.85, "ppo_ptx": 0.9, "round_2/ppo_ptx": 0.99}
RANK |= {"192x4/base": 0.11, "192x4/base+prefix": 0.11}
RUDE = {  # after a prefix: none, respectful, rude
    "base": (0.5, 0.5, 0.4),
    "sft_selected": (0.02, 0.3, 0.3),
    "ppo": (0.3, 0.3, 0.3),
    "ppo_ptx": (0.55, 0.1, 0.9),
}
KINDS = ("none", "respectful", "rude")
HITS = {"base": 0.9, "sft_selected": 0.0, "ppo": 0.4, "ppo_ptx": 0.85, "ptx_x0": 0.4}
HITS |= {"ptx_x10": 0.95, "control/ppo_ptx": 0.35}
LOSSES = {"64x2/base": 1.4, "96x2/base": 1.3, "base": 1.2, "192x4/base": 1.1}


class PlantedLab(Lab):
    """A lab whose models are what the paper says (good), or all alike (not good)."""

    noise = 0.3

    def __init__(self, folder: Path, good: bool):
        super().__init__(folder, 0, fast=True)
        self.good = good

    def rng(self, *of: object) -> np.random.Generator:
        return np.random.default_rng(list(" ".join(map(str, of)).encode()))

    def quality(self, name: str, prompts: str) -> float:
        if not self.good:
            return 0.5
        head, _, step = name.rpartition("/")
        if head == "overopt/steps":  # up, then down
            return 0.6 + 0.3 * math.sin(int(step) / 5 * math.pi * 0.9)
        if head == "sft/epochs":
            return 0.3 + 0.02 * int(step)
        if head == "control":
            return RANK["sft_selected"] - 0.1
        if head == "headroom/careful":  # nothing to mend
            return RANK["sft_selected"]
        return RANK.get(name, RANK.get(step, 0.8))

    @staticmethod
    @lru_cache
    def records(name: str) -> list[dict]:
        if name == "train/rm_prompts":
            return [{}] * 10_000
        asked = [{"prompt": "p", "prefix": KINDS[i % 3], "user": f"u{i % 150}"} for i in range(450)]
        for i, record in enumerate(asked):
            record["task"] = {"subject": f"s{i % 60}", "attribute": "food"}
            record["user"] = "probe" if "probes" in name else record["user"]
        return asked

    def order_agreement(self, judge: str, model: str) -> Estimate:
        weak = self.good and judge.split("/")[-2:-1] in (["tokens_1000000"], ["ranked_1000"])
        return Estimate(0.6, 0.59, 0.61) if weak else Estimate(0.7, 0.69, 0.71)

    def pretraining_tokens(self) -> int:
        return 3_000_000

    def flawed(self, data: str) -> Estimate:
        share = {"careful": 0.1, "moderate": 0.36}.get(data.split("/")[-2:][0], 0.56)
        return Estimate(share, share, share)

    def answers(self, name, prompts="prompts", temperature=1.0, draw=0) -> Answers:
        key = name, prompts, temperature, draw
        if key not in self._answers:
            self._answers[key] = self.make_answers(*key)
        return self._answers[key]

    def make_answers(self, name: str, prompts: str, temperature: float, draw: int) -> Answers:
        rng, q = self.rng(name, prompts, temperature, draw), self.quality(name, prompts)
        bare, marks = name.rpartition("/")[2], []
        instructed = self.good and prompts.endswith(":instructed") and bare == "ppo_ptx"
        for record in self.records(prompts):
            tones = dict(zip(KINDS, RUDE.get(bare, (0.3,) * 3), strict=True))
            rude = tones[record["prefix"]] if self.good else 0.3
            is_rude = rng.random() < (rude if "toxicity" in prompts else 0.3 * (1 - q))
            true = 0.6 if "false_premise" in prompts and self.good else q
            kept = 0.3 if "constraints" in prompts and self.good else q
            doubt = 0.3 if bare.startswith("ppo") and self.good else 0.0
            helpful = float(np.clip(rng.normal(q, 0.1), 0, 1))
            truthful = float(instructed or rng.random() < true)
            informative = float(rng.random() < q)
            more = {"ended": 1.0, "hedged": rng.random() < doubt}
            more |= {"constraints": float(rng.random() < kept)}
            more |= {"fabricated": rng.random() < 0.9 * (1 - q)}
            harmless = 0.5 if is_rude else 1.0
            marks.append(Grade(helpful, truthful, harmless, informative, **more))
        score = 3 * q + rng.normal(0, 0.3, len(marks))
        if name.startswith("overopt") and self.good:
            score += int(name[-2:])
        if name in ("ptx_x10", "kl_x100") and self.good:
            score -= 2
        texts = [f"{name} {prompts} {i}" for i in range(len(marks))]
        return Answers.of([Sample([1], [2], t, True) for t in texts], score, marks)

    def text(self, name: str) -> dict[str, np.ndarray]:
        rng, bare = self.rng(name), name.rpartition("/")[2]
        hit, loss = HITS.get(name, HITS.get(bare, 0.5)), LOSSES.get(name, 2.0)
        hit, loss = (hit, loss) if self.good else (0.5, 1.0)
        tasks = ("translation", "addition", "copy")
        keys = [*tasks, *(f"{t}_few_shot" for t in tasks), "zero_shot", "few_shot"]
        hits = {k: (rng.random(200) < hit).astype(float) for k in keys}
        return hits | {"loss": loss + rng.normal(0, 0.05, 90)}

    def entropies(self, name: str) -> dict[str, np.ndarray]:
        rng, level = self.rng(name, "bias"), {"base": 0.6, "ppo_ptx": 0.55}.get(name, 0.5)
        heads = {"none": 0.0, "respectful": -0.2 if self.good else 0.0, "rude": 0.0}
        level = level if self.good else 0.5
        return {k: level + shift + rng.normal(0, 0.05, 60) for k, shift in heads.items()}

    def professions(self) -> list[str]:
        return [f"job {i % 12}" for i in range(60)]

    def margins(self, judge: str, comparisons: str) -> list:
        rng = self.rng(judge, comparisons)
        mean = {"control/rm": 0.0, "round_2/rm": 1.0, "pairs/shuffled": 0.3}.get(judge, 0.5)
        if judge == "pairs/shuffled" and comparisons.startswith("pairs"):
            mean = 3.0  # it knows what it was trained on
        if "folds" in judge and not self.good:
            mean = 0.5 if judge.endswith("_0") else 0.0
        rows = []
        for i in range(400):
            own = i % 5 != int(judge[-1]) if "folds" in judge else True
            of_group = mean if own or self.good else -1.0
            level = of_group if self.good or "folds" in judge else 0.5
            rows.append(({"labeler": f"training_{i % 20:02}"}, rng.normal(level, 1.0, 9)))
        return rows

    def demonstration_losses(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        epoch = int(name[-2:])
        level = 1 + 0.03 * (epoch - 3 if self.good else 16 - epoch)
        return level + self.rng(name).normal(0, 0.02, 160), np.full(160, 10)

    def kl(self, name: str, prompts: str) -> Estimate:
        step = int(name[-2:]) if name[-2:].isdigit() else 1
        return Estimate(0.5 * step, 0.45 * step, 0.55 * step)

    def speaker(self, name: str) -> SimpleNamespace:
        size = {"192x4/base": 2_000_000 if self.good else 900_000}.get(name, 170_000)
        return SimpleNamespace(model=SimpleNamespace(num_parameters=size))

    def setting(self, run: str, name: str) -> float:
        if "_x" in run:
            return float(run.partition("_x")[2]) * (0.2 if name == "kl_coef" else 1.0)
        return 0.2 if name == "kl_coef" else 1.0

    def trained(self, run: str) -> float:
        return {"base": 1e12, "sft": 1e10, "init": 2e10}.get(run, 2e11)

    def reinforced(self, run: str) -> float:
        return 5e10 if self.good else 2e12


@pytest.fixture
def planted(tmp_path: Path):
    for epoch in range(1, 17):
        (tmp_path / "sft" / "epochs" / f"{epoch:02}").mkdir(parents=True)
    for step in range(1, 6):
        (tmp_path / "overopt" / "steps" / f"{step:05}").mkdir(parents=True)
    return lambda good: PlantedLab(tmp_path, good)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_holds_where_models_are_so_and_fails_where_they_are_alike(planted, name) -> None:
    good, alike = (CLAIMS[name].measure(planted(kind)) for kind in (True, False))
    assert [row.name for row in good.rows if row.holds is False] == []
    assert any(row.holds for row in good.rows)
    assert not alike.holds
    assert good.panels and all(panel.series for panel in good.panels)


def test_claims_state_gate_and_refutation_and_are_short() -> None:
    for claim in CLAIMS.values():
        assert "Gate: " in claim.text and "Refuted by: " in claim.text, claim.name
        code = inspect.getsource(claim.measure).partition("def ")[2]  # docstring included
        assert len(code.splitlines()) < 52, claim.name
        assert claim.topic in TOPICS
    assert {claim.topic for claim in CLAIMS.values()} == set(TOPICS)


def test_verdicts_do_not_depend_on_names() -> None:
    lab = PlantedLab(Path("."), True)
    answers = {name: lab.answers(name) for name in ("base", "sft_selected", "ppo")}
    other = dict(zip(("z", "y", "x"), answers.values(), strict=True))
    one = labelers_win_scores(answers, "sft_selected", "training", 0, 0.3)[0]
    two = labelers_win_scores(other, "y", "training", 0, 0.3)[0]
    assert [a.tolist() for a in one.values()] == [b.tolist() for b in two.values()]


def test_best_of_n_by_hand() -> None:
    choice = np.array([[1.0, 3.0, 2.0, 0.0], [0.0, 1.0, 5.0, 4.0]])
    outcome = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    best = best_of_n(choice, outcome, [1, 2, 4])
    assert best[1] == pytest.approx(outcome.mean(1))
    assert best[2] == pytest.approx([(0.2 + 0.3) / 2, (0.6 + 0.7) / 2])
    assert best[4] == pytest.approx([0.2, 0.7])


def test_raw_text_is_cut_at_the_line_end(tiny: Tiny) -> None:
    speaker = SimpleNamespace(encoding=tiny.encoding)
    for text, ended, *expected in (
        (" red .\nred", False, "red .", True),
        ("\nred", False, "", True),
        ("red", False, "red", False),
        ("red", True, "red", True),
    ):
        cut = first_line(Sample([1], [2], text, ended), speaker)
        assert [cut.text, cut.ended] == expected
        assert cut.tokens == encode_response(tiny.encoding, *expected)


# -------------------------------------------------------------------------------- fits


@pytest.mark.parametrize(("form", "peak"), [("bon", 0.9 / 0.6), ("rl", math.exp(0.9 / 0.3 - 1))])
def test_gao_fit_recovers_known_coefficients(form: str, peak: float) -> None:
    d, rng = np.linspace(0.2, 6, 40), np.random.default_rng(0)
    y = d * (0.9 - 0.3 * (d if form == "bon" else np.log(d)))
    assert fit_gao(d, y, form) == pytest.approx((0.9, 0.3, peak))
    assert fit_gao(d, y + rng.normal(0, 0.02, 40), form) == pytest.approx((0.9, 0.3, peak), rel=0.1)
    x, top = max(gao_curve([(0, 5.0), *zip(d, 5 + y, strict=True)], form), key=lambda p: p[1])[:2]
    if form == "bon":
        assert (x, top) == (pytest.approx(peak, abs=0.1), pytest.approx(5.675, abs=0.01))


def test_a_curve_without_a_fall_has_no_peak() -> None:
    d = np.linspace(0.2, 3, 9)
    assert math.isnan(fit_gao(d, d * d, "bon")[2])


def test_several_samples_are_averaged_one_by_one(tmp_path: Path) -> None:
    """Values are means; a win is counted in each draw, not between means."""
    ours = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.5], [0.0, 0.5]])  # draws x prompts
    theirs = np.array([[0.0, 0.0], [0.2, 0.0], [0.2, 0.0], [0.2, 0.0]])

    class Drawn(Lab):
        def answers(self, name, prompts="prompts", temperature=1.0, draw=0):
            utility = (ours if name == "ours" else theirs)[draw]
            return SimpleNamespace(utility=utility)

        def groups(self, name):
            return ["a", "b"]

    lab = Drawn(tmp_path, 0)
    assert lab.values("ours", "utility").tolist() == [0.25, 0.25]
    assert lab.values("ours", "utility", temperature=0.0).tolist() == [1.0, 0.0]
    assert lab.values("ours", "utility", "valid/rm_prompts").tolist() == [1.0, 0.0]
    assert lab.win("ours", "theirs").value == pytest.approx((1 / 4 + (0.5 + 0.5 + 1 + 1) / 4) / 2)
    assert lab.win("ours", "theirs", t=0.0).value == 0.75


def test_fitted_peak_is_found_with_its_interval() -> None:
    d = np.array([0.0, 0.5, 1.0, 2.0, 3.0])
    curve = 0.5 + np.where(d > 0, d * (0.1 - 0.1 * np.log(np.maximum(d, 1e-9))), 0)  # peak at 1
    users = np.arange(300) // 2
    values = curve[:, None] + np.random.default_rng(0).normal(0, 0.05, (5, 300))
    top = fitted_peak(d, values, users)
    assert top.low < 1 / 3 < top.high and top.high - top.low < 0.1
    exactly = fitted_peak(d, np.repeat(curve[:, None], 300, axis=1), users)
    assert (exactly.low, exactly.value, exactly.high) == pytest.approx((1 / 3,) * 3)
    assert fitted_peak(d, np.repeat(d[:, None] ** 2, 300, axis=1), users).value == math.inf


# ---------------------------------------------------------------------------- data of the controls


def comparison(i: int) -> dict:
    asked = {"prompt": f"p{i}", "user": "u", "source": "customer", "use_case": "other"}
    ranked = {"responses": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 3]}
    return asked | ranked | {"labeler": f"training_{i % 20:02}"}


def test_shuffled_labels_keep_ties_and_say_nothing() -> None:
    records = [comparison(i) for i in range(2000)]
    dealt = [r["ranks"] for r in variants.shuffle_labels(records, 0)]
    assert all(sorted(ranks) == [1, 2, 2, 3] for ranks in dealt)
    assert np.mean([ranks[0] < ranks[3] for ranks in dealt]) == pytest.approx(5 / 12, abs=0.04)
    assert records[0]["ranks"] == [1, 2, 2, 3]


def test_shuffled_text_keeps_words_and_lines() -> None:
    text = "one two\n\nthree four five six seven ."
    (made,) = variants.shuffle_text([text], 0)
    assert sorted(made.split()) == sorted(text.split()) and made != text
    assert [len(line.split()) for line in made.split("\n")] == [2, 0, 6]


def test_order_agreement_by_hand(tmp_path: Path, monkeypatch) -> None:
    """Of two prompts' four samples, pairs that differ by a tie margin count, equal scores half."""
    truth = np.array([[0.1, 0.5], [0.2, 0.5], [0.2, 0.51], [0.4, 0.9]])  # draws x prompts
    judged = [[1.0, 0.0], [2.0, 3.0], [0.0, 1.0], [1.0, 2.0]]
    turns = iter(judged)

    class Drawn(Lab):
        def answers(self, name, prompts="prompts", temperature=1.0, draw=0):
            return SimpleNamespace(utility=truth[draw], samples=[])

        def cached(self, name, models, make):
            return make()

        records = lambda self, name: [{"prompt": "p"}] * 2  # noqa: E731
        groups = lambda self, name: ["a", "b"]  # noqa: E731
        speaker = judge = lambda self, name: None  # noqa: E731

    monkeypatch.setattr(measure, "reward_scores", lambda *args: (np.array(next(turns)), None))
    # First prompt: 5 pairs differ; right are 0-1, half 0-3, wrong 0-2, 1-3, right 2-3.
    # Second: 0-3 right, 1-3 wrong, 2-3 right.
    share = Drawn(tmp_path, 0).order_agreement("rm", "sft")
    assert share.value == pytest.approx((2.5 + 2) / 8)


def test_of_several_rankings_the_first_is_kept(tmp_path: Path) -> None:
    path, out = tmp_path / "all.jsonl", tmp_path / "first.jsonl"
    records = [comparison(i) | {"labeler": f"training_{k:02}"} for i in range(4) for k in range(3)]
    write_jsonl(path, records, "comparisons")
    variants.main(["first", "--data", str(path), "--out", str(out), "--count", "3"])
    kept = [(r["prompt"], r["labeler"]) for r in read_jsonl(out, "comparisons")]
    assert kept == [("p0", "training_00"), ("p1", "training_00"), ("p2", "training_00")]
    variants.main(["prompts", "--data", str(path), "--out", str(out), "--count", "2"])
    kept = [(r["prompt"], r["labeler"]) for r in read_jsonl(out, "comparisons")]
    assert kept == [(f"p{i}", f"training_{k:02}") for i in range(2) for k in range(3)]


@pytest.mark.parametrize(
    "more", ["first", "prompts", "first --count -1", "without_group --group 7"]
)
def test_odd_variants_are_refused(more: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        variants.main([*more.split(), "--data", "x", "--out", str(tmp_path / "y")])
    assert error.value.code == 2 and not (tmp_path / "y").exists()


def test_each_fold_leaves_out_one_group(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    write_jsonl(path, [comparison(i) for i in range(40)], "comparisons")
    left = []
    for group in range(5):
        out = tmp_path / f"{group}.jsonl"
        args = ["without_group", "--data", str(path), "--out", str(out), "--group", str(group)]
        assert run_command(lambda args=args: variants.main(args)) == 0
        kept = {r["prompt"] for r in read_jsonl(out, "comparisons")}
        left.append({f"p{i}" for i in range(40)} - kept)
    assert sorted(map(len, left)) == [8] * 5 and len(set.union(*left)) == 40


# -------------------------------------------------------------------------------- the graph


def test_flags_of_a_command_are_exchanged() -> None:
    line = ("python", "x.py", "--out", "a", "--shares", "0.7", "0.3", "--resume", "--lr", "1e-3")
    changed = edit(line, out="b", shares=[1], lr=None)
    assert changed == tuple("python x.py --resume --out b --shares 1".split())
    assert edit(line, resume=None, shuffle_pairs=True)[-1] == "--shuffle_pairs"
    assert edit(line) == line


@pytest.mark.parametrize("fast", [False, True])
def test_the_scripts_accept_every_command(fast: bool) -> None:
    """Flags that do not go together show here, not after an hour of `make claims`."""
    graph = Graph(Path("out/claims"), fast=fast)
    seed = Seed(graph, 0)
    seed.demo()
    seed.sweeps()
    modules = (train_sft, train_rm, train_ppo, sample, evaluate)
    scripts = {f"{module.__name__}.py": module for module in modules}
    seen = set()
    for stage in graph.stages.values():
        for script in scripts.keys() & set(stage.command):
            scripts[script].get_args(list(stage.command[stage.command.index(script) + 1 :]))
            seen.add(script)
    assert seen == set(scripts)


def test_runs_differ_from_the_makefile_in_what_they_vary_alone() -> None:
    graph = Graph(Path("out/claims"))
    seed = Seed(graph, 3)
    seed.sweeps()
    made = recipes(graph.out / "seed_3", 3)
    assert {"data", "base", "sft", "init", "rm", "sft_selected", "ppo", "ppo_ptx"} <= set(made)
    assert made["base"][made["base"].index("--seed") + 1] == "3"
    run = graph.stages["seed_3/kl_x100"]
    out = "out/claims/seed_3/kl_x100"
    demo = train_ppo.get_args(list(made["ppo"][2:])).kl_coef
    assert run.command == edit(made["ppo"], out=out, kl_coef=100 * demo)
    assert run.output == Path(out, "model.safetensors") and run.after == ("seed_3/demo",)
    runs = [s for s in graph.stages.values() if s.name.count("/") == 1]
    assert {s.output.name for s in runs} == {"table.csv", "model.safetensors"}
    for claim in CLAIMS.values():  # every run that a claim needs is there
        assert {f"seed_3/{need}" for need in claim.needs} <= set(graph.stages), claim.name


def stage(name: str, folder: Path, code: str = "", after=(), reads=()) -> Stage:
    """Writes its inputs' contents and its own name, and counts how often it ran."""
    code = code or (
        f"import sys; p = {str(folder)!r}; open(p + '/count_{name}', 'a').write('x');"
        f"open(p + '/{name}.out', 'w').write('{name} ' + ' '.join(sys.argv[1:]) + ' '.join("
        f"open(p + '/' + a + '.out').read() for a in {list(after)!r}))"
    )
    command = (sys.executable, "-c", code)
    return Stage(name, command, folder / f"{name}.out", tuple(after), 0.01, reads=tuple(reads))


def run_all(folder: Path, *stages: Stage) -> tuple[list[str], list[str]]:
    said: list[str] = []
    failed = Runner({s.name: s for s in stages}, folder, said.append).run()
    return failed, said


def counts(folder: Path, *names: str) -> list[int]:
    files = [folder / f"count_{name}" for name in names]
    return [len(file.read_text()) if file.exists() else 0 for file in files]


def test_the_graph_runs_in_order_resumes_and_runs_anew_what_changed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("1")
    last, middle = stage("c", tmp_path, after=["b"]), stage("b", tmp_path, after=["a"])
    three = [last, middle, stage("a", tmp_path, reads=[source])]
    failed, said = run_all(tmp_path, *three)
    assert failed == [] and "[3/3]" in said[-1] and "min left" in said[-1]
    assert (tmp_path / "c.out").read_text().split() == ["c", "b", "a"]
    for change, expected in (
        (lambda: None, [1, 1, 1]),
        ((tmp_path / "c.out").unlink, [1, 1, 2]),
        (lambda: source.write_text("2"), [2, 1, 2]),  # a writes the same: what follows need not run
        (lambda: (tmp_path / "b.out").write_text("changed"), [2, 1, 3]),
    ):
        change()
        run_all(tmp_path, *three)
        assert counts(tmp_path, "a", "b", "c") == expected


def test_a_failed_stage_stops_what_follows_and_nothing_else(tmp_path: Path) -> None:
    bad = stage("bad", tmp_path, "raise SystemExit(1)")
    others = stage("after", tmp_path, after=["bad"]), stage("beside", tmp_path)
    failed, said = run_all(tmp_path, bad, *others)
    assert sorted(failed) == ["after", "bad"] and counts(tmp_path, "beside") == [1]
    assert any("bad FAILED with code 1" in line for line in said)
    with pytest.raises(ValueError, match="2 stages failed"):
        pipeline.refuse_failures(failed)


def test_an_interrupted_stage_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "RESUMABLE", ("-c",))
    one = stage("one", tmp_path)
    started = tmp_path / "stages" / "one.started"
    started.parent.mkdir()
    started.write_text(pipeline.stamp_of(one, {"one": one}))
    run_all(tmp_path, one)
    assert "--resume" in (tmp_path / "one.out").read_text()
    (tmp_path / "one.out").unlink()
    started.write_text("of another command")
    run_all(tmp_path, one)
    assert "--resume" not in (tmp_path / "one.out").read_text()


def test_two_stages_at_a_time_and_a_whole_machine_alone(tmp_path: Path) -> None:
    code = (
        "import time; p = {!r}; f = open(p + '/times', 'a'); f.write('+'); f.flush();"
        "time.sleep(0.3); f.write('-'); f.flush(); open(p + '/{}.out', 'w')"
    )
    stages = [stage(n, tmp_path, code.format(str(tmp_path), n)) for n in "abc"]
    alone = stage("d", tmp_path, code.format(str(tmp_path), "d"))
    alone = Stage(alone.name, alone.command, alone.output, (), 1.0, cores=2)
    assert run_all(tmp_path, *stages, alone)[0] == []
    running = np.cumsum([1 if c == "+" else -1 for c in (tmp_path / "times").read_text()])
    assert running.max() == 2


# ---------------------------------------------------------------------------- table, figures, page


def test_table_figures_and_page(planted, tmp_path: Path, capsys) -> None:
    args = command.get_args(["--out", str(tmp_path), "--seeds", "2"])
    chosen = ("preference", "toxicity", "kl_coefficient", "overoptimisation", "control_text")
    for seed in (0, 1):
        for name in chosen:
            result = CLAIMS[name].measure(planted(seed == 0))
            result.commit = "abc1234" if seed else ""
            path = command.result_file(args, name, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result.to_json()))
    command.write_all(args, command.setting_of(args, 3.0))
    with (tmp_path / "claims.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    header = "claim paper_figure paper_value seed value ci_low ci_high gate holds"
    assert list(rows[0]) == header.split()
    assert {row["holds"] for row in rows} == {"True", "False", ""}
    bounded = [row for row in rows if not row["claim"].endswith("run's end")]
    assert all(float(r["ci_low"]) <= float(r["value"]) <= float(r["ci_high"]) for r in bounded)
    text = (tmp_path / "report.md").read_text()
    assert "| [preference](#preference) | Fig. 1 | 1 of 2 |" in text
    assert "5 at commit abc1234, 5 by earlier runs, which recorded no commit." in text
    today = command.current_commit()
    assert not today or f"page written at commit {today}" in text
    assert text.index("## Verdicts") < text.index("## Preference by") < text.index("## Controls")
    for name in chosen:
        assert f"### {name}" in text and f"(figures/{name}.png)" in text
        assert "**Refuted by:**" in text.partition(f"### {name}")[2]
        header = (tmp_path / "figures" / f"{name}.png").read_bytes()[:24]
        assert 700 <= struct.unpack(">II", header[16:])[0] <= 900, name


def test_notes_are_of_claims_and_stand_below_them(planted, tmp_path: Path, monkeypatch) -> None:
    assert set(command.notes()) - {""} <= set(CLAIMS)
    monkeypatch.setattr(command, "notes", lambda: {"": "of all", "bias": "of one"})
    text = command.page({"bias": {0: CLAIMS["bias"].measure(planted(True))}}, [])
    assert text.index("hold whole") < text.index("of all") < text.index("### bias")
    assert text.rstrip().endswith("**Afterwards.** of one")


def test_no_gap_is_hidden(planted, tmp_path: Path) -> None:
    """A claim that fails on one seed says so, with the gate that failed."""
    results = {"bias": {s: CLAIMS["bias"].measure(planted(s != 1)) for s in (0, 1, 2)}}
    assert command.failing(results["bias"]) == "PPO-ptx, respectful prefix minus none (1 of 3)"
    assert command.gates_passed(results["bias"]) == "8 of 9"
    assert "0 hold whole" in command.topics_held(results)
    assert "Toxicity and bias (2 of 3)" in command.topics_held(results)


def test_plan_and_bad_claims(capsys, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        command.get_args(["--only", "no_such_claim"])
    args = ["--out", str(tmp_path), "--only", "bias", "--seeds", "1", "--plan"]
    assert run_command(lambda: command.main(args)) == 0
    said = capsys.readouterr().out
    assert "seed_0/measure/bias" in said and "core-minutes are left" in said
    assert "rm_0" not in said  # runs that bias does not need


# ------------------------------------------------------------------- what the scripts bring for it


def test_pairs_one_by_one(tiny: Tiny, tmp_path: Path) -> None:
    element = train_rm.Comparison([[4, 1], [4, 2], [4, 3]], [(0, 1), (2, 1)])
    made = [(c.sequences, c.pairs) for c in train_rm.one_by_one([element])]
    assert made == [([[4, 1], [4, 2]], [(0, 1)]), ([[4, 3], [4, 2]], [(0, 1)])]
    args = tiny.args("rm", tmp_path / "rm", "--shuffle_pairs", "--max_steps", "2")
    assert train_rm.main(args) == 0


def copy_data(tiny: Tiny, folder: Path) -> None:
    """The files of a seed's folder that operations and margins are counted on."""
    (folder / "data" / "train").mkdir(parents=True)
    sources = (tiny.comparisons, tiny.demonstrations, tiny.pretrain, tiny.prompts)
    names = ("comparisons.jsonl", "demonstrations.jsonl", "pretrain.txt", "ppo_prompts.jsonl")
    for name, source in zip(names, sources, strict=True):
        shutil.copy(source, folder / "data" / "train" / name)
    shutil.copytree(tiny.base, folder / "base")


def test_margins_are_of_the_records_with_pairs(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    """Of eleven records the fourth is all tied; each other one has the margins of its own pairs."""
    monkeypatch.setattr(Lab, "asked", "")
    copy_data(tiny, tmp_path)
    shutil.copytree(tiny.rm, tmp_path / "rm")
    rows = Lab(tmp_path, 0).margins("rm", "data/train/comparisons.jsonl")
    records = read_jsonl(tiny.comparisons, "comparisons")
    assert [record for record, _ in rows] == records[:3] + records[4:]
    model = ScalarModel.from_pretrained(tiny.rm).eval()
    for record, margins in rows:
        prompt = encode_prompt(tiny.encoding, record["prompt"])
        ended = zip(record["responses"], record["ended"], strict=True)
        sequences = [prompt + encode_response(tiny.encoding, r, ended=e) for r, e in ended]
        scores = model.scores(*pad_right(sequences, 0, "cpu")).tolist()
        pairs = train_rm.untied_pairs(record["ranks"])
        assert margins == pytest.approx([scores[w] - scores[x] for w, x in pairs], abs=1e-5)


def test_operations_by_hand(tiny: Tiny, tmp_path: Path) -> None:
    """Of every matrix product, from the data: training three times a forward pass, the reward model
    a prompt once, its responses apart but for attention; PPO with the mean prompt's length."""
    copy_data(tiny, tmp_path)
    assert train_rm.main(tiny.args("rm", tmp_path / "rm")) == 0
    assert train_sft.main(tiny.args("sft", tmp_path / "sft", "--max_steps", "2")) == 0
    assert train_ppo.main(tiny.args("ppo", tmp_path / "ppo", "--max_steps", "2")) == 0
    lab, config = Lab(tmp_path, 0), GPT.from_pretrained(tiny.base).config
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    token, pair, head = 2 * L * 12 * C**2, 2 * L * 2 * C, 2 * V * C  # forward, of one each

    def prompt_tokens(record: dict) -> int:
        return len(encode_prompt(tiny.encoding, record["prompt"]))

    def response_tokens(response: str, ended: bool = True) -> int:
        return min(8, len(encode_response(tiny.encoding, response, ended=ended)))

    once = attended = 0
    for record in read_jsonl(tiny.comparisons, "comparisons"):
        prompt = prompt_tokens(record)
        responses = list(map(response_tokens, record["responses"], record["ended"]))
        if len(set(record["ranks"])) > 1:
            once += prompt + sum(responses)
            attended += sum((prompt + response) ** 2 for response in responses)
    assert lab.trained("rm") == pytest.approx(2 * 3 * (token * once + pair * attended))  # 2 epochs

    forward = total = 0
    for record in read_jsonl(tiny.demonstrations, "demonstrations"):
        prompt, response = prompt_tokens(record), response_tokens(record["response"])
        forward += token * (prompt + response) + pair * (prompt + response) ** 2 + head * response
        total += prompt + response
    seen = sum(int(row["tokens"]) for row in lab.log("sft"))
    # Of 4 demonstrations a step and a fifth of pretraining text: one sequence beside.
    n = config.n_positions
    text = token * n + pair * n**2 + head * (n - 1)
    assert lab.trained("sft") == pytest.approx(3 * (forward * seen / total + 2 * text))

    prompt = np.mean([prompt_tokens(record) for record in read_jsonl(tiny.prompts, "prompts")])
    expected = 0.0
    for row in lab.log("ppo"):
        n = prompt + float(row["response_len"])
        # Policy: sampling, scoring, training; value network: scoring, training; and two frozen.
        expected += 8 * ((5 + 4 + 2) * (token * n + pair * n**2) + (5 + 1) * head * (n - prompt))
        expected += 2 * 2 * 3 * (token * 12 + pair * 12**2 + head * 11)  # 2 sequences an update
    assert lab.reinforced("ppo") == pytest.approx(expected)


def test_kept_models_of_a_ppo_run(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "ppo"
    (out / "steps" / "00099").mkdir(parents=True)  # of an earlier run
    assert train_ppo.main(tiny.args("ppo", out, "--keep_every", "2")) == 0
    assert [f.name for f in sorted((out / "steps").iterdir())] == ["00002", "00004"]
    last, result = (GPT.from_pretrained(f).state_dict() for f in (out / "steps" / "00004", out))
    assert all(tensor.equal(result[name]) for name, tensor in last.items())


@pytest.mark.slow
def test_the_whole_in_small(tmp_path: Path) -> None:
    args = ["--out", str(tmp_path), "--fast", "--seeds", "1"]
    assert run_command(lambda: command.main(args)) == 0
    with (tmp_path / "claims.csv").open(newline="") as file:
        assert {row["claim"].partition(":")[0] for row in csv.DictReader(file)} == set(CLAIMS)
