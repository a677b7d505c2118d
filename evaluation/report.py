"""From what was measured to tables, figures and words. No model is opened here.

The input is the files of `evaluate.py measure`, one for each checkpoint. A `Report` makes a
`Table` of them, from model to metric to `Estimate`, with the win rates against a baseline. METRICS
says what each number is; its words are the report's glossary. PAGE is the report; its sentences
about results are made from the intervals, whichever way they point.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from data import files
from data.files import BadInput, Record, check, write_atomic
from data.label import noise_of
from data.outputs import claim
from data.tiny.grader import Grade, evaluation_utility
from data.tiny.labelers import Labels, Pool, label

import numpy as np

from evaluation import figures

TIE = 0.02  # utilities that differ by less are a tie, which counts one half
GALLERY = 10  # prompts
GALLERY_WIDTH = 106  # characters of a line
LOGS = {"selection": "epoch val_loss score", "log": "step kl score_gain score_gain_ci"}
VALIDATION = "val_gain val_gain_ci val_score val_score_ci val_kl"  # of a PPO run that has any
CELL = re.compile(r"(nan|[+-]?\d{1,20}(\.\d{1,20})?(e[+-]?\d\d)?)?")


@dataclass
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(
    values: Sequence[float], groups: Sequence | None = None, weights: Sequence[float] | None = None
) -> Estimate:
    """The weighted mean sum(w v) / sum(w) and a 95 % percentile bootstrap interval.

    Whole groups (users, whose prompts are alike; prompts, whose pairs share responses) are drawn
    with replacement, 1000 times; without groups each value is its own. The draws depend on the
    number of groups alone, so that the interval of a number is always the same.
    """
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(v) == 0 or w.sum() == 0:
        return Estimate(np.nan, np.nan, np.nan)
    index = np.arange(len(v)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums, totals = np.bincount(index, w * v), np.bincount(index, w)
    counts = resamples(len(sums))
    drawn = counts @ totals
    means = (counts @ sums)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(sums.sum() / totals.sum()), float(low), float(high))


@lru_cache(maxsize=8)
def resamples(num_groups: int, num: int = 1000) -> np.ndarray:
    """How often each group is drawn in each of `num` bootstrap resamples: (num, num_groups)."""
    draws = np.random.default_rng(num_groups).integers(num_groups, size=(num, num_groups))
    flat = (draws + num_groups * np.arange(num)[:, None]).ravel()
    return np.bincount(flat, minlength=num * num_groups).reshape(num, -1).astype(np.float32)


Table = dict[str, dict[str, Estimate]]  # model -> metric -> number
Rows = list[dict[str, float]]  # of a log

# metric | heading | format | what it is. The order is that of the glossary.
_METRICS = """\
win_t1 | win rate, T=1 | .3f | share of prompts on which the model's response beats the \
baseline's, both sampled at temperature 1; a tie counts one half
win_t0 | win rate, greedy | .3f | the same with both at temperature 0
win_training_labelers | training labelers | .3f | win rate at temperature 1 by the noisy \
simulated labelers of the pool that ranked the training data, as noisy as they were there
win_held_out_labelers | held-out labelers | .3f | the same by labelers with other priorities, who \
ranked nothing
utility_t1 | utility, T=1 | .3f | truth-checked evaluation utility, 0..1, temperature 1
utility_t0 | utility, greedy | .3f | the same at temperature 0
helpful | helpful | .3f | share of the task that is done, 0..1
truthful | truthful | .3f | share of stated facts that are true, 0..1; 1 if none is
harmless | harmless | .3f | 1 without rude words, half for one, 0 for more
ended | ended | .3f | 1 if it ended by itself with a full stop, 0..1
end_fraction | end token | .3f | share of responses that end by themselves
response_tokens | length | .1f | tokens of a response, end token included
score | RM score | +.3f | reward model's score, temperature 1, or without an end token the fixed \
low one of PPO (`--missing_eos_score`); demonstrations score 0
score_raw | RM score, raw | +.3f | the reward model's own number, also without an end token; only \
where it differs
kl | KL | .2f | Monte-Carlo KL divergence from the reference, nats a response
pretrain_loss | pretraining loss | .3f | on held-out pretraining text, nats a token
tasks_zero_shot | public tasks, zero-shot | .3f | mean exact match of the public tasks
tasks_few_shot | public tasks, few-shot | .3f | the same with three solved items before
bias_entropy | bias entropy | .3f | bits; 1 is no preference between two pronouns
"""
METRICS: dict[str, tuple[str, str, str]] = {
    name: tuple(rest) for name, *rest in (row.split(" | ") for row in _METRICS.splitlines())
}
WINS = ["win_t1", "win_t0", "win_training_labelers", "win_held_out_labelers"]
QUALITY = ["utility_t1", "utility_t0", "helpful", "truthful", "harmless"]
TASKS = ["tasks_zero_shot", "tasks_few_shot"]
TAX = {"tasks_zero_shot": 1, "pretrain_loss": -1}  # whose differences are shown; 1: higher is good

# The report. A part is left out where a value that it names is empty.
PAGE = """\
# What each step did

{num_models} models answer {num_prompts} held-out prompts of {num_users} users \
({first[data]}), in at most {first[settings][max_new_tokens]} tokens. Intervals are 95 %, by \
bootstrap over users (over facts, items or sequences where no user asks).

{about}
---
## Where {shown} and {baseline} differ

{gallery}
---
{agreement}
---
## Preference against {baseline}

![Win rates by model](win_rates.png)

{wins}

A win is a response that {judge} puts above the one of {baseline} to the same prompt; a tie counts \
one half; ± is half the width of the 95 % interval. The resampled row is the baseline against \
itself with other random numbers and should be at one half. A gain at temperature 1 that is absent \
from the greedy column is mostly sharpening: the model draws its own best answers more often, \
without having better ones.
---
**{best_of}** is what sampling alone buys with the same judge: nothing is trained; the reward \
model chooses one of several responses of the same model.
---
{findings}
---
## Quality of the responses

{quality}
---
The prompted base model is the base model with a text before every prompt: of {num_prefixes} texts \
the one with the best reward-model score on validation prompts (paper 3.5, footnote 6).

{prefixes}
---
## Truthfulness

Share of answers (temperature 1) to closed questions that state nothing false, and of those that \
besides answer the question. A model that says nothing checkable is true and not informative, so \
only the second table ranks models. Facts are ordinary, held out of all feedback, or misconceived \
on the web; premises are those of "why does ... ?" questions.

True:

{true}

True and informative:

{informative}
---
## Toxicity and bias

Share of continuations of forum openings (temperature 1) that hold a rude word, by the request \
before the opening (none, for respect, for rudeness); and the entropy of the choice between \
sentences that differ in a pronoun, 1 bit being no preference.

{toxicity}
---
## Alignment tax

![Public tasks and pretraining loss]({tax_figure})
---
Exact match on tasks that only the pretraining text contains (greedy), and the loss on held-out \
pretraining text. A task that the base model cannot do measures nothing.

{tasks}
---
{loss}
---
Differences, paired by item and by sequence, with 95 % intervals: each model minus the one that it \
was trained from, then minus the first of that line, the pretrained one.

{differences}

{payers}
---
## Epochs of supervised fine-tuning

![Validation loss, reward-model score and utility by epoch](sft_epochs.png)

The baseline is epoch {epoch}, the last whose reward-model score on validation prompts is within a \
standard error of the best. {lowest_loss}
---
## Reinforcement learning

![Gain over the start, and KL, of the PPO runs](ppo.png)

The gain is the score minus that of the start, the model before the first update, on the same \
prompts and from the same random numbers. Faint: the rollouts, with a running mean of five \
iterations; points: the averaged weights on validation prompts, with 95 % intervals. KL is to the \
reference.

{runs}
---
## Samples

{samples}
---
## What the numbers are

{glossary}
---
Left out: {left_out}
"""


# ------------------------------------------------------------------------------------------------
# The command: what was measured, and who wins


def write_report(args: argparse.Namespace) -> None:
    """Compare the files of --measured with --baseline; write tables, figures, report.md last."""
    out = Path(args.out)
    claim(args.out, "report", {"measured": args.measured, "comparisons": args.comparisons})
    noise = noise_of(args.comparisons) if args.comparisons else None
    report = Report(read_measured(args.measured), args.baseline, noise)
    page = fill(PAGE, report.words())  # whatever is wrong is found before anything is replaced
    rows = [
        {"model": model, "metric": metric, "value": e.value, "ci_low": e.low, "ci_high": e.high}
        for model, row in (report.table | report.differences()).items()
        for metric, e in row.items()
    ]
    (out / "report.md").unlink(missing_ok=True)  # it comes last: with it, all is of one report
    report.draw(out)
    write_atomic(out / "table.csv", csv_text(rows))
    write_atomic(out / "table.txt", terminal_table(report.table))
    gallery = report.gallery()
    write_atomic(out / "gallery.txt", "\n\n".join(filter(None, gallery)) + "\n")
    write_atomic(out / "gallery.md", fenced(*gallery) + "\n")
    write_atomic(out / "report.md", page)
    print(f"\n{terminal_table(report.table)}\nwrote {out}/report.md")


@dataclass
class Answers:
    """One model's responses to the prompts of a report, and what is known about each."""

    texts: list[str]
    ended: list[bool]
    scores: np.ndarray  # of the reward model, and the fixed one where the end token is missing
    marks: list[Grade] | None  # by the world's truth, where there is a world

    @cached_property
    def utility(self) -> np.ndarray:
        """The truth-checked evaluation utility of each, 0..1: (N,)."""
        return np.array([evaluation_utility(mark) for mark in self.marks])

    def to_json(self) -> Record:
        marks = self.marks and [astuple(mark) for mark in self.marks]
        scores = np.asarray(self.scores).tolist()
        return {"texts": self.texts, "ended": self.ended, "scores": scores, "marks": marks}

    @staticmethod
    def from_json(said: Record) -> Answers:
        marks = said["marks"] and [Grade(*mark) for mark in said["marks"]]
        return Answers(said["texts"], said["ended"], np.array(said["scores"]), marks)


def read_measured(paths: Sequence[str]) -> list[Record]:
    """The files of `evaluate.py measure`, cells of logs as numbers. Raises `BadInput` where one is
    none, or was measured with other flags, prompts or inputs than the first."""
    measured: list[Record] = []
    for path in paths:
        Path(path).stat()  # raises where there is none
        file = files.parse_json(files.read_text(path), path)
        check_measured(file, f"{path}: expected a file that `evaluate.py measure` wrote")
        file |= {log: log_numbers(file[log], log, f"{path}: {log}.csv") for log in LOGS}
        measured.append(file | {"path": path})
        both = (file, measured[0])
        ours, theirs = ({**f["settings"], **{k: f[k] for k in ("prompts", "users")}} for f in both)
        differ = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        if differ:
            shown = (f"{k} {ours.get(k)!r}, not {theirs.get(k)!r}" for k in differ[:3])
            lists = [f"other {key}" for key in ("prompts", "users") if key in differ]
            what = ", ".join(lists or shown)
            raise BadInput(f"{path}: measured otherwise than {paths[0]} ({what}): measure it again")
        values = measured[0]["models"][0]["values"].items()
        check(file["models"][0]["values"], {k: [float] * len(v) for k, v in values}, path, "values")
    return measured


def check_measured(file: Any, where: str) -> None:
    """Raise `BadInput` unless what a report reads of a file is as `evaluate.py measure` writes."""
    settings = {"seed": int, "max_new_tokens": int}
    check(file, {"settings": settings, "prompts": [str, str, ...]}, where)
    N, mark = len(file["prompts"]), [*[float] * 5, (float, None), (bool, None), bool]
    said = {"texts": [str] * N, "ended": [bool] * N, "scores": [float] * N}
    said |= {"marks": [mark] * N if "world" in file["settings"] else None}
    model = {"name": str, "about": str, "metrics": {str: [float] * 3}, "left_out": [str, ...]}
    model |= {"sampled": said, "greedy?": said, "resampled?": said}
    first = model | {"greedy": said, "values": {str: [float, ...]}}
    shape = {"name": str, "data": str, "users": [str] * N, "models": [first, model, ...]}
    shape |= {"prefixes": [[str, float, float], ...], "ancestry": [str, str, ...], "epoch": int}
    check(file, shape | dict.fromkeys(LOGS, [{str: str}, ...]), where)


def log_numbers(rows: list[dict[str, str]], log: str, where: str) -> Rows:
    """The cells of a log as numbers, an empty one NaN. Raises `BadInput`, naming line and column,
    where a column is missing or a cell holds something else."""
    validated = any("val_gain" in row for row in rows)
    needed = [*LOGS[log].split(), *VALIDATION.split() * validated]
    for line, row in enumerate(rows, start=2):
        for name, cell in (dict.fromkeys([*needed, *rows[0]], "no such column") | row).items():
            if not CELL.fullmatch(cell):
                raise BadInput(f"{where}:{line}: {name}: expected a number, found {cell!r}")
    return [{name: float(cell or "nan") for name, cell in row.items()} for row in rows]


def win_scores(ours: np.ndarray, theirs: np.ndarray, tie: float = TIE) -> np.ndarray:
    """1 where ours is higher, 0 where theirs is, one half where they differ by less than `tie`."""
    gap = np.asarray(ours) - np.asarray(theirs)
    return np.where(np.abs(gap) < tie, 0.5, (gap > 0).astype(float))


def wins_of(ours: Answers, theirs: Answers) -> np.ndarray:
    """Win scores by the world's truth; without a world by the reward model, equal is a tie."""
    if ours.marks is None:
        return win_scores(ours.scores, theirs.scores, tie=1e-6)
    return win_scores(ours.utility, theirs.utility)


def labelers_win_scores(
    answers: dict[str, Answers],
    baseline: str,
    pool: str,
    seed: int,
    noise: float,
    rankings: int = 1,
) -> tuple[dict[str, np.ndarray], Labels]:
    """Win scores against the baseline by simulated labelers, who rank all models' responses to a
    prompt together, as in the paper: model -> (N,), the mean over so many rankings of each prompt
    by different labelers; and the labels of the first."""
    models = list(answers)
    marks = [list(row) for row in zip(*(a.marks for a in answers.values()), strict=True)]
    texts = [list(row) for row in zip(*(a.texts for a in answers.values()), strict=True)]
    turns, wins = label(marks, texts, Pool.make(pool), seed, rankings, noise=noise), []
    for labels in turns:
        ranks = -np.array(labels.ranks, dtype=float)  # (N, models), higher is better
        base = ranks[:, [models.index(baseline)]]
        wins.append(win_scores(ranks, base, tie=0.5))
    return dict(zip(models, np.mean(wins, axis=0).T, strict=True)), turns[0]


def resampled(baseline: str) -> str:
    """Name of the row that compares the baseline with itself."""
    return f"{baseline} (resampled)"


class Report:
    """Models that were measured alike, compared with one of them, the baseline."""

    def __init__(self, measured: list[Record], baseline: str, noise: float | None = None):
        """`noise` is that of the simulated labelers; without it they do not judge. Raises
        `BadInput` where there is no such baseline, or nothing to compare it with."""
        self.measured, self.baseline, self.noise = measured, baseline, noise
        self.again = resampled(baseline)
        self.models = [model for file in measured for model in file["models"]]
        names = [model["name"] for model in self.models]
        whole = [model["name"] for model in self.models if "greedy" in model]
        if len({*names, self.again}) <= len(names) or baseline not in whole:
            expected = f"one of {', '.join(whole)}, all different"
            for name in dict.fromkeys(n for n in names if names.count(n) > 1):
                of = [f["path"] for f in measured for m in f["models"] if m["name"] == name]
                expected += f"; {name} is in {' and '.join(of)}"
            raise BadInput(f"--baseline {baseline}: expected {expected}")
        self.sampled, self.greedy = {}, {}
        for model in self.models:
            self.sampled[model["name"]] = Answers.from_json(model["sampled"])
            if "greedy" in model:
                self.greedy[model["name"]] = Answers.from_json(model["greedy"])
            if model["name"] == baseline and "resampled" in model:
                self.sampled[self.again] = Answers.from_json(model["resampled"])
        if len(self.sampled) < 2:
            raise BadInput(f"--measured: nothing to compare {baseline} with; give further files")
        others = [name for name in self.greedy if name != baseline]
        self.shown = others[-1] if others else ""  # in the gallery
        self.chosen = next(f for f in measured if baseline in [m["name"] for m in f["models"]])
        self.judge = "the world's truth" if self.sampled[baseline].marks else "the reward model"
        self.table, self.agreement = self.compare()

    def compare(self) -> tuple[Table, list[str]]:
        """Win rates against the baseline, beside what was measured; and how well the simulated
        labelers agree, a sentence for each pool."""
        users, seed = self.measured[0]["users"], self.measured[0]["settings"]["seed"]
        table: Table = {name: {} for name in self.sampled}
        others, agreement = [name for name in table if name != self.baseline], []
        for how, answers in (("t1", self.sampled), ("t0", self.greedy)):
            for name in others:
                if name in answers:
                    wins = wins_of(answers[name], answers[self.baseline])
                    table[name][f"win_{how}"] = estimate(wins, users)
        asked = self.sampled[self.baseline].marks and self.noise is not None
        for pool in ("training", "held_out") if asked else ():
            wins, labels = labelers_win_scores(self.sampled, self.baseline, pool, seed, self.noise)
            for name in others:
                table[name][f"win_{pool}_labelers"] = estimate(wins[name], users)
            who, share = pool.replace("_", "-"), f"{labels.agreement:.1%}"
            agreement.append(
                f"The {who} labelers agree with one another on {share} of the pairs of these "
                "models' responses."
            )
        for model in self.models:
            table[model["name"]] |= {k: Estimate(*e) for k, e in model["metrics"].items()}
        return table, agreement

    def differences(self) -> Table:
        """What each model has in public tasks and pretraining loss more than the nearest measured
        model that it was trained from, then more than the first of that line; pairs of items and
        of sequences are drawn."""
        by_weights = {file["ancestry"][0]: file for file in reversed(self.measured)}
        near, far = [], []
        for file in self.measured:
            line = [by_weights[w] for w in file["ancestry"][1:] if w in by_weights]
            near += [(file, before) for before in line[:1]]
            far += [(file, first) for first in line[1:][-1:]]
        table: Table = {}
        for ours, theirs in near + far:
            a, b = (file["models"][0]["values"] for file in (ours, theirs))
            gaps = {metric: np.subtract(a[metric], b[metric]) for metric in TAX if metric in a}
            name = f"{ours['name']} minus {theirs['name']}"
            table[name] = {f"{metric}_difference": estimate(gap) for metric, gap in gaps.items()}
        return table

    def gallery(self) -> tuple[str, str]:
        """A sentence on who wins, greedy, the baseline or the last model given; and a text block of
        the first prompts on which they differ; if these are all wins, the first loss follows, and
        the other way round."""
        if not self.shown:
            return "", ""
        prompts, pair = self.measured[0]["prompts"], (self.baseline, self.shown)
        answers = [self.greedy[name] for name in pair]
        wins = wins_of(answers[1], answers[0])
        count = {kind: int((wins == kind).sum()) for kind in (1.0, 0.0, 0.5)}
        differ = np.flatnonzero(wins != 0.5)
        kept, lacking = list(differ[:GALLERY]), ""
        for kind, verb in ((1.0, "wins"), (0.0, "loses")):
            if count[kind] and kind not in wins[kept]:
                kept.append(np.flatnonzero(wins == kind)[0])
                lacking = f", and then the first that {self.shown} {verb}, as none of these is one"
        by_scores = answers[0].marks is None
        margin = "in reward-model score" if by_scores else f"by {TIE} or more"
        before = "reward-model score"
        if not by_scores:
            before = "utility, and in brackets how helpful, truthful and harmless it is"
        words = (
            f"Of {len(prompts)} prompts, {self.shown} wins {count[1.0]}, loses {count[0.0]} and "
            f"ties {count[0.5]} against {self.baseline}, with greedy answers and {self.judge} as "
            "the judge"
        )
        if kept:
            number = min(GALLERY, len(differ))
            words += f"; here are the first {number} of the file on which the two differ {margin}"
            words += f"{lacking}. Before each answer stands its {before}"
        lines = [line for i in kept for line in gallery_lines(prompts[i], pair, answers, i)]
        return "\n".join(textwrap.wrap(f"{words}.", GALLERY_WIDTH)), "\n".join(lines).rstrip()

    def draw(self, out: Path) -> None:
        """The figures that there are numbers for."""
        colour = figures.colours([model for model in self.table if model != self.again])
        colour |= {self.again: "#dddddd"}
        others = [model for model in self.table if model != self.baseline]
        wins = self.bars(WINS[:2], others)
        figures.win_rates(out / "win_rates.png", wins, self.baseline, colour)
        if rows := self.chosen["selection"]:
            line, epoch = colour[self.baseline], self.chosen["epoch"]
            figures.sft_epochs(out / "sft_epochs.png", rows, epoch, line)
        if logs := {file["name"]: file["log"] for file in self.measured if file["log"]}:
            figures.ppo(out / "ppo.png", logs, colour)
        if models := [model for model, row in self.table.items() if "pretrain_loss" in row]:
            tax = self.bars([*TASKS, "pretrain_loss"], models)
            figures.alignment_tax(out / "alignment_tax.png", tax, colour)

    def bars(self, metrics: list[str], models: list[str]) -> dict[str, figures.Bars]:
        """Of each metric that one of the models has: heading -> model -> number."""
        there = [m for m in metrics if any(m in self.table[model] for model in models)]
        return {heading(m): {model: self.table[model].get(m) for model in models} for m in there}

    def words(self) -> dict[str, Any]:
        """What PAGE names."""
        table, first = self.table, self.measured[0]
        prefixes = next((file["prefixes"] for file in self.measured if file["prefixes"]), [])
        tried = [["prefix", "RM score", "RM score, raw"]]
        tried += [[f"`{text!r}`", *(f"{score:+.3f}" for score in both)] for text, *both in prefixes]
        if all(score == raw for _, score, raw in prefixes):
            tried = [row[:2] for row in tried]
        quality = [*QUALITY, "ended", "score", "score_raw", "kl", "response_tokens", "end_fraction"]
        used = [m for m in METRICS if any(m in row for row in table.values())]
        rude, tasks = family(table, "toxicity_.*"), family(table, "task_.*")
        loss = show(table, ["pretrain_loss"], True)
        left_out = [line for model in self.models for line in model["left_out"]]
        if self.sampled[self.baseline].marks and self.noise is None:
            left_out.append("Simulated labelers judge only with --comparisons.")
        if self.noise is not None and not self.sampled[self.baseline].marks:
            left_out.append("Simulated labelers judge only in a world: --comparisons has no use.")
        best_of = [model["name"] for model in self.models if "best_of" in model]
        differences = self.differences()
        return {
            "first": first,
            "num_models": len(self.models),
            "num_prompts": len(first["prompts"]),
            "num_users": len(set(first["users"])),
            "about": listed(f"**{model['name']}**: {model['about']}" for model in self.models),
            "shown": self.shown,
            "gallery": fenced(*self.gallery()),
            "agreement": "\n\n".join(self.agreement),
            "baseline": self.baseline,
            "judge": self.judge,
            "wins": show(table, WINS, True),
            "best_of": ", ".join(best_of),
            "findings": listed(findings(table, self.baseline, self.judge)),
            "quality": show(table, quality),
            "num_prefixes": len(prefixes),
            "prefixes": as_markdown(tried) if prefixes else "",
            "true": show(table, family(table, "probe_.*_true")),
            "informative": show(table, family(table, "probe_.*_true_informative"), True),
            "toxicity": show(table, [*rude, "bias_entropy"], True) if rude else "",
            "tax_figure": "alignment_tax.png" if loss else "",
            "tasks": show(table, [*tasks, *TASKS]) if tasks and loss else "",
            "loss": loss,
            "differences": as_markdown(difference_rows(differences)) if differences else "",
            "payers": listed(payers(differences)),
            "epoch": self.chosen["epoch"],
            "lowest_loss": lowest_loss(self.chosen["selection"]),
            "runs": listed(course(f["name"], f["log"]) for f in self.measured if f["log"]),
            "samples": samples_text(first["prompts"], self.sampled),
            "glossary": listed(f"`{m}` ({METRICS[m][0]}): {METRICS[m][2]}" for m in used),
            "left_out": " ".join(dict.fromkeys(left_out)),
        }


# ------------------------------------------------------------------------------------------------
# Tables


def heading(metric: str) -> str:
    """The metric's column heading; of a family of metrics, what tells its members apart."""
    if metric in METRICS:
        return METRICS[metric][0]
    own = re.sub(r"^(probe|toxicity|task)_|_true(_informative)?$", "", metric)
    return own.replace("_", " ")


def cell(metric: str, e: Estimate | None, interval: bool = False) -> str:
    """A number as a table shows it, with half the width of its interval if asked for."""
    if e is None or math.isnan(e.value):
        return ""
    form = METRICS[metric][1] if metric in METRICS else ".3f"
    half = f" ±{(e.high - e.low) / 2:{form.lstrip('+')}}" if interval else ""
    return format(e.value, form) + half


def grid(table: Table, metrics: list[str], interval: bool = False) -> list[list[str]]:
    """Heading row and one row a model; columns and rows without any number are left out."""
    metrics = [m for m in metrics if any(m in row for row in table.values())]
    rows = [["model", *map(heading, metrics)]]
    for model, row in table.items():
        if any(m in row for m in metrics):
            rows.append([model, *(cell(m, row.get(m), interval) for m in metrics)])
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def as_text(rows: list[list[str]]) -> str:
    """The table for a terminal: first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def terminal_table(table: Table) -> str:
    """The numbers that matter most, in blocks that fit a terminal."""
    blocks = [
        grid(table, WINS, True),
        grid(table, [*QUALITY, "end_fraction", "score", "score_raw", "kl"]),
        grid(table, ["pretrain_loss", *TASKS], True),
    ]
    return "\n\n".join(as_text(block) for block in blocks if len(block) > 1) + "\n"


def csv_text(rows: list[dict]) -> str:
    """Rows of equal keys as CSV, floats with 6 significant digits, None as an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------
# Words


def fill(page: str, values: dict[str, Any]) -> str:
    """The page with these values; a part that names an empty one is left out."""
    parts = page.removesuffix("\n").split("\n---\n")
    named = [re.findall(r"{(\w+)}", part) for part in parts]
    kept = [p for p, names in zip(parts, named, strict=True) if "" not in map(values.get, names)]
    return "\n\n".join(part.format(**values) for part in kept) + "\n"


def listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def show(table: Table, metrics: list[str], interval: bool = False) -> str:
    """These numbers as a table; nothing where there are none."""
    rows = grid(table, metrics, interval)
    return as_markdown(rows) if len(rows) > 1 else ""


def family(table: Table, pattern: str) -> list[str]:
    """The metrics that are called so."""
    every = dict.fromkeys(metric for row in table.values() for metric in row)
    return [metric for metric in every if re.fullmatch(pattern, metric)]


def against_half(e: Estimate) -> str:
    """What an interval says about a win rate."""
    if e.low > 0.5:
        return "above one half, clear of it"
    if e.high < 0.5:
        return "below one half, clear of it"
    return "not distinguishable from one half"


def findings(table: Table, baseline: str, judge: str) -> list[str]:
    """One sentence for each win rate against the baseline, whichever way it points."""
    return [
        f"**{model}** against {baseline}, {how}: win rate {e.value:.3f} "
        f"[{e.low:.3f}, {e.high:.3f}] by {judge}, {against_half(e)}."
        for model, row in table.items()
        for metric, how in (("win_t1", "sampled at temperature 1"), ("win_t0", "greedy"))
        if (e := row.get(metric)) and model != resampled(baseline)
    ]


def difference_rows(differences: Table) -> list[list[str]]:
    """Rows of a table of differences, with their intervals."""
    shown = [m for m in TAX if any(f"{m}_difference" in row for row in differences.values())]
    rows = [["", *map(heading, shown)]]
    for name, row in differences.items():
        found = (row.get(f"{metric}_difference") for metric in shown)
        cells = (e and f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for e in found)
        rows.append([name, *(text or "" for text in cells)])
    return rows


def payers(differences: Table) -> list[str]:
    """Who pays the alignment tax: a sentence for each measure, by the intervals of differences."""
    said = []
    for metric, sign in TAX.items():
        worse, better, neither = [], [], []
        for name, row in differences.items():
            if e := row.get(f"{metric}_difference"):
                low, high = sorted((sign * e.low, sign * e.high))
                verdict = worse if high < 0 else better if low > 0 else neither
                verdict.append(name.replace(" minus ", " (against ") + ")")
        found = {"worse in": worse, "better in": better, "no clear difference in": neither}
        parts = [f"{what} {', '.join(names)}" for what, names in found.items() if names]
        said += [f"{heading(metric)}: {'; '.join(parts)}."] if parts else []
    return said


def lowest_loss(selection: Rows) -> str:
    """Where validation loss alone would have stopped; nothing where no epoch was selected."""
    known = [row for row in selection if not math.isnan(row["val_loss"])]
    if not known:
        return "The run has no validation loss." if selection else ""
    lowest, last = min(known, key=lambda row: row["val_loss"]), known[-1]["val_loss"]
    where = (
        f"epoch {lowest['epoch']:.0f} ({lowest['val_loss']:.3f}, against {last:.3f} at the last)"
    )
    return f"The validation loss is lowest at {where}."


def course(run: str, rows: Rows) -> str:
    """A PPO run in one sentence: what was gained over the start, by the averaged weights on
    validation prompts and by the policy in the last quarter of the rollouts."""
    steps = [row for row in rows if row["step"]] or rows  # without row 0, the start's
    late = steps[-max(1, len(steps) // 4) :]
    line = f"**{run}**: {len(steps)} iterations; "
    if looks := [row for row in rows if not math.isnan(row.get("val_gain", math.nan))]:
        end = looks[-1]
        line += f"the averaged weights gain {with_ends(end['val_gain'], end['val_gain_ci'])} over "
        line += f"the start on validation prompts and come to a score of {end['val_score']:+.2f} "
        line += f"±{end['val_score_ci']:.2f}, at a KL of {end['val_kl']:.2f} nats; "
    gain = np.mean([row["score_gain"] for row in late])
    half = math.sqrt(sum(row["score_gain_ci"] ** 2 for row in late)) / len(late)
    line += f"in the last {len(late)} iterations the policy gains {with_ends(gain, half)}, at a KL "
    return f"{line}of {np.mean([row['kl'] for row in late]):.2f} nats."


def with_ends(value: float, half: float) -> str:
    """A difference and its interval, of this half width."""
    return f"{value:+.2f} [{value - half:+.2f}, {value + half:+.2f}]"


def gallery_lines(
    prompt: str, names: Sequence[str], answers: Sequence[Answers], i: int
) -> list[str]:
    """Prompt i, cut to a line, and each model's answer to it, cut to two."""

    def wrapped(text: str, lines: int, before: str, width: int = 0) -> list[str]:
        text = text.strip().replace("\n", " [newline] ").replace("```", "'''")
        how = {"max_lines": lines, "placeholder": " [...]", "subsequent_indent": " " * width}
        return textwrap.wrap(before + text, GALLERY_WIDTH, **how)

    lines = wrapped(prompt, 1, "> ")
    for name, said in zip(names, answers, strict=True):
        number = f"{said.scores[i]:+.2f}"
        if said.marks:
            mark = said.marks[i]
            marks = f"{mark.helpful:.2f} {mark.truthful:.2f} {mark.harmless:.2f}"
            number = f"{said.utility[i]:.2f} ({marks})"
        before = f"{name:>{max(map(len, names))}} {number} | "
        cut = "" if said.ended[i] else " ... (cut)"
        lines += wrapped(said.texts[i].strip() + cut, 2, before, len(before))
    return [*lines, ""]


def fenced(words: str, block: str) -> str:
    """Words and below them a block of literal text, if there is one, in Markdown."""
    return words + (f"\n\n```text\n{block}\n```" if block else "")


def samples_text(prompts: list[str], answers: dict[str, Answers], num: int = 6) -> str:
    """Prompts spread over the file and every model's response, as a block of literal text."""
    lines, width = [], max(map(len, answers))
    for i in range(0, len(prompts), max(1, len(prompts) // num))[:num]:
        lines.append("> " + prompts[i].replace("\n", "\n> "))
        for model, said in answers.items():
            text = said.texts[i].strip() + ("" if said.ended[i] else " ... (cut)")
            lines.append(f"{model:>{width}} | " + text.replace("\n", "\n" + " " * (width + 3)))
        lines.append("")
    return "```text\n" + "\n".join(lines).replace("```", "'''") + "```"
