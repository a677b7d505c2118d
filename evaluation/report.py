"""From what was measured to tables, figures and words. No model is needed here, and none is known.

The input is the files of `evaluate.py measure`, one for each checkpoint. `compare` makes a `Table`
of them, from model to metric to `Estimate`, with the win rates against a baseline; `write` makes
the rest of it. METRICS says what each number is; its words are the report's glossary. Sentences
about results are made from the intervals, whichever way they point.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from data.files import (
    BadInput,
    Record,
    check_writable,
    parse_json,
    remove_leftovers,
    write_atomic,
)
from data.tiny.grader import Grade, evaluation_utility
from data.tiny.labelers import Labels, Pool, label

plt.switch_backend("agg")  # figures are files; no display is needed
TIE = 0.02  # utilities that differ by less are a tie, which counts one half
KEYS = {"name", "settings", "data", "prompts", "users", "models", "prefixes"}
KEYS |= {"selection", "epoch", "log"}


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

# metric | heading | format | what it is. The order is that of table.csv.
_METRICS = """\
win_t1 | win rate, T=1 | .3f | share of prompts on which the model's response beats the \
baseline's, both sampled at temperature 1; a tie counts one half
win_t0 | win rate, greedy | .3f | the same with both at temperature 0
win_training_labelers | training labelers | .3f | win rate at temperature 1 by the noisy \
simulated labelers of the pool that ranked the training data
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
score | RM score | +.3f | reward model's score, temperature 1; demonstrations score 0
kl | KL | .2f | Monte-Carlo KL divergence from the reference, nats a response
pretrain_loss | pretraining loss | .3f | on held-out pretraining text, nats a token
tasks_zero_shot | public tasks, zero-shot | .3f | mean exact match of the public tasks
tasks_few_shot | public tasks, few-shot | .3f | the same with three solved items before
bias_entropy | bias entropy | .3f | bits; 1 is no preference between two pronouns
"""
METRICS: dict[str, tuple[str, str, str]] = {
    name: (heading, form, what)
    for name, heading, form, what in (row.split(" | ") for row in _METRICS.splitlines())
}
WINS = ["win_t1", "win_t0", "win_training_labelers", "win_held_out_labelers"]
QUALITY = ["utility_t1", "utility_t0", "helpful", "truthful", "harmless"]
# Families of metrics: how their names begin and end, which the heading leaves out.
PROBE, TOXICITY, TASK = "probe_", "toxicity_", "task_"
TRUE, TRUE_INFORMATIVE = "_true", "_true_informative"
# Okabe and Ito's colours, which colour-blind readers can tell apart; grey for the base model.
PALETTE = ("#999999", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#000000")
_STYLE = {"figure.dpi": 130, "savefig.bbox": "tight", "font.size": 10, "axes.titlesize": 11}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
plt.rcParams.update(_STYLE)


def colours(models: list[str]) -> dict[str, str]:
    """One colour a model, the same in all figures of a report."""
    return {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(models)}


# ------------------------------------------------------------------------------------------------
# The command: what was measured, and who wins


def write_report(args: argparse.Namespace) -> None:
    """Compare the files of --measured with --baseline; write everything into --out."""
    out = Path(args.out)
    check_writable(out)
    remove_leftovers(out)
    report = compare(read_measured(args.measured), args.baseline)
    write(out, report)
    print(f"\n{terminal_table(report.table)}\nwrote {out}/report.md")


@dataclass
class Answers:
    """One model's responses to the prompts of a report, and what is known about each."""

    texts: list[str]
    ended: list[bool]
    scores: np.ndarray  # of the reward model
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
    """The files of `evaluate.py measure`. Raises `BadInput` where one is none, or was measured with
    other flags, prompts or inputs than the first."""
    files: list[Record] = []
    for path in paths:
        file = parse_json(Path(path).read_text(encoding="utf-8"), path)
        if not isinstance(file, dict) or KEYS - file.keys():
            raise BadInput(f"{path}: expected a file that `evaluate.py measure` wrote")
        files.append(file)
        ours, theirs = ({**f["settings"], "prompts": f["prompts"]} for f in (file, files[0]))
        differ = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        if differ:
            shown = (f"{k} {ours.get(k)!r}, not {theirs.get(k)!r}" for k in differ[:3])
            what = "other prompts" if differ == ["prompts"] else ", ".join(shown)
            raise BadInput(f"{path}: measured otherwise than {paths[0]} ({what}): measure it again")
    return files


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
    answers: dict[str, Answers], baseline: str, pool: str, seed: int, rankings: int = 1
) -> tuple[dict[str, np.ndarray], Labels]:
    """Win scores against the baseline by simulated labelers, who rank all models' responses to a
    prompt together, as in the paper: model -> (N,), the mean over so many rankings of each prompt
    by different labelers; and the labels of the first."""
    models = list(answers)
    marks = [list(row) for row in zip(*(a.marks for a in answers.values()), strict=True)]
    texts = [list(row) for row in zip(*(a.texts for a in answers.values()), strict=True)]
    turns, wins = label(marks, texts, Pool.make(pool), seed, rankings), []
    for labels in turns:
        ranks = -np.array(labels.ranks, dtype=float)  # (N, models), higher is better
        base = ranks[:, [models.index(baseline)]]
        wins.append(win_scores(ranks, base, tie=0.5))
    return dict(zip(models, np.mean(wins, axis=0).T, strict=True)), turns[0]


def resampled(baseline: str) -> str:
    """Name of the row that compares the baseline with itself."""
    return f"{baseline} (resampled)"


@dataclass
class Report:
    """Everything that a report shows."""

    table: Table
    baseline: str
    judge: str  # who decides a win, in words
    setting: list[str]  # what was measured on what, one sentence each
    prefixes: list[tuple[str, float]]  # candidate prefix and its score, the chosen one first
    selection: Rows  # selection.csv of the baseline, if it has one
    chosen_epoch: int
    logs: dict[str, Rows]  # PPO run -> its log
    samples: list[tuple[str, dict[str, str]]]  # prompt, and each model's response
    left_out: list[str]  # what could not be measured, and why


def compare(files: list[Record], baseline: str) -> Report:
    """Win rates against the baseline, beside what was measured. Raises `BadInput` where there is no
    such model, or nothing to compare it with."""
    first, models = files[0], [model for file in files for model in file["models"]]
    names, again = [model["name"] for model in models], resampled(baseline)
    if len({*names, again}) <= len(names) or baseline not in names:
        raise BadInput(f"--baseline {baseline}: expected one of {', '.join(names)}, all different")
    sampled: dict[str, Answers] = {}
    for model in models:
        sampled[model["name"]] = Answers.from_json(model["sampled"])
        if model["name"] == baseline and "resampled" in model:
            sampled[again] = Answers.from_json(model["resampled"])
    if len(sampled) < 2:
        raise BadInput(f"--measured: nothing to compare {baseline} with; give further files")
    greedy = {model["name"]: Answers.from_json(model["greedy"]) for model in models}

    def mean(values: np.ndarray) -> Estimate:
        return estimate(values, first["users"])

    table: Table = {name: {} for name in sampled}
    for name in table.keys() - {baseline}:
        table[name]["win_t1"] = mean(wins_of(sampled[name], sampled[baseline]))
        if name != again:
            table[name]["win_t0"] = mean(wins_of(greedy[name], greedy[baseline]))
    setting, world = describe(first, models), sampled[baseline].marks is not None
    for pool in ("training", "held_out") if world else ():
        wins, labels = labelers_win_scores(sampled, baseline, pool, first["settings"]["seed"])
        for name in table.keys() - {baseline}:
            table[name][f"win_{pool}_labelers"] = mean(wins[name])
        setting.append(
            f"The {pool.replace('_', '-')} labelers agree with one another on "
            f"{labels.agreement:.1%} of the pairs of these models' responses."
        )
    for model in models:
        table[model["name"]] |= {metric: Estimate(*e) for metric, e in model["metrics"].items()}
    chosen = next(f for f in files if baseline in [model["name"] for model in f["models"]])
    return Report(
        table=table,
        baseline=baseline,
        judge="the world's truth" if world else "the reward model",
        setting=setting,
        prefixes=next((file["prefixes"] for file in files if file["prefixes"]), []),
        selection=as_numbers(chosen["selection"]),
        chosen_epoch=chosen["epoch"],
        logs={file["name"]: as_numbers(file["log"]) for file in files if file["log"]},
        samples=some_samples(first["prompts"], sampled),
        left_out=list(dict.fromkeys(line for model in models for line in model["left_out"])),
    )


def describe(file: Record, models: list[Record]) -> list[str]:
    """What was measured, on what: the opening of the report."""
    return [
        f"{len(models)} models answer {len(file['prompts'])} held-out prompts of "
        f"{len(set(file['users']))} users ({file['data']}), in at most "
        f"{file['settings']['max_new_tokens']} tokens. "
        "Intervals are 95 %, by bootstrap over users (over facts, items or sequences where no "
        "user asks).",
        "\n".join(f"- **{model['name']}**: {model['about']}" for model in models),
    ]


def some_samples(prompts: list[str], answers: dict[str, Answers], num: int = 6) -> list:
    """Prompts spread over the file, and what each model said."""

    def shown(said: Answers, i: int) -> str:
        return said.texts[i].strip() + ("" if said.ended[i] else " ... (cut)")

    chosen = range(0, len(prompts), max(1, len(prompts) // num))[:num]
    return [(prompts[i], {name: shown(a, i) for name, a in answers.items()}) for i in chosen]


def as_numbers(rows: list[dict[str, str]]) -> Rows:
    """Cells as floats, empty ones as NaN."""
    return [{k: float(v) if v else math.nan for k, v in row.items()} for row in rows]


# ------------------------------------------------------------------------------------------------
# Tables


def heading(metric: str) -> str:
    """The metric's column heading."""
    if metric in METRICS:
        return METRICS[metric][0]
    for start in (PROBE, TOXICITY, TASK):
        metric = metric.removeprefix(start)
    return metric.removesuffix(TRUE_INFORMATIVE).removesuffix(TRUE).replace("_", " ")


def cell(metric: str, estimate: Estimate | None, interval: bool = False) -> str:
    """A number as a table shows it, with half the width of its interval if asked for."""
    if estimate is None or math.isnan(estimate.value):
        return ""
    form = METRICS[metric][1] if metric in METRICS else ".3f"
    shown = format(estimate.value, form)
    if interval:
        shown += f" ±{(estimate.high - estimate.low) / 2:{form.lstrip('+')}}"
    return shown


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
        grid(table, [*QUALITY, "end_fraction", "score", "kl"]),
        grid(table, ["pretrain_loss", "tasks_zero_shot", "tasks_few_shot"], True),
    ]
    return "\n\n".join(as_text(block) for block in blocks if len(block) > 1) + "\n"


def as_csv(table: Table) -> str:
    """table.csv, long form: model, metric, value, ci_low, ci_high."""
    return csv_text(
        [
            {"model": model, "metric": metric, "value": e.value, "ci_low": e.low, "ci_high": e.high}
            for model, row in table.items()
            for metric, e in row.items()
        ]
    )


def csv_text(rows: list[dict]) -> str:
    """Rows of equal keys as CSV, floats with 6 significant digits, None as an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------
# Figures

Bars = list[tuple[str, Estimate | None, str]]  # model, number, colour


def bars_of(table: Table, metric: str, models: list[str], colour: dict[str, str]) -> Bars:
    return [(model, table[model].get(metric), colour[model]) for model in models]


def draw_bars(axes, bars: Bars, shift=0.0, width=0.7, label=None, numbers=True, **style) -> None:
    """A bar for each model with its interval and, with `numbers`, the number above."""
    text = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    text["bbox"] = {"facecolor": "white", "linewidth": 0, "pad": 0.3}
    more = {"capsize": 3, "error_kw": {"linewidth": 1}, **style}
    for x, (_, e, colour) in enumerate(bars):
        if e is None or math.isnan(e.value):
            continue
        error = [[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]]
        axes.bar(x + shift, e.value, width, color=colour, yerr=error, **more)
        if numbers:
            axes.annotate(f"{e.value:.2f}", (x + shift, e.high), **text)
    names = [model.replace(" + ", " +\n").replace(" (", "\n(") for model, _, _ in bars]
    axes.set_xticks(range(len(bars)), [name.replace("_", "-") for name in names])
    if label is not None:  # a grey twin for the legend: the colours belong to the models
        axes.bar([0], [0], color="#bbbbbb", label=label, **style)


def win_rate_figure(
    path: Path, table: Table, baseline: str, metrics: list[str], colour: dict[str, str]
) -> None:
    """Figure 1 of the paper in miniature: how often each model beats the baseline."""
    models = [m for m in table if m != baseline and any(k in table[m] for k in metrics)]
    figure, axes = plt.subplots(figsize=(1.6 + 1.25 * len(models), 3.6))
    width = 0.8 / len(metrics)
    styles = ({}, {"alpha": 0.55, "hatch": "//", "edgecolor": "white"})
    for i, metric in enumerate(metrics):
        shift, shown = (i - (len(metrics) - 1) / 2) * width, len(metrics) > 1
        bars, words = bars_of(table, metric, models, colour), heading(metric) if shown else None
        draw_bars(axes, bars, shift, width * 0.94, words, **styles[i % 2])
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel(f"win rate against {baseline}")
    highest = max(table[m][k].high for m in models for k in metrics if k in table[m])
    axes.set_ylim(0, min(1.12, max(0.7, highest + 0.14)))
    axes.set_xlim(-0.6, len(models) - 0.4)
    if len(metrics) > 1:
        axes.legend(loc="upper left", fontsize=9)
    save_figure(figure, path)


def epochs_figure(path: Path, rows: Rows, chosen: int, colour: str) -> None:
    """SFT over epochs (C.1): validation loss and reward-model score; and utility where known."""
    panels = 2 if "utility" in rows[0] else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 3.2), squeeze=False)
    epochs = [row["epoch"] for row in rows]
    left = axes[0][0]
    right = left.twinx()
    right.spines["right"].set_visible(True)
    left.plot(epochs, [row["val_loss"] for row in rows], "o-", color="black", markersize=4)
    right.plot(epochs, [row["score"] for row in rows], "s--", color="#D55E00", markersize=4)
    left.set_ylabel("● validation loss, nats a token")
    right.set_ylabel("■ reward-model score", color="#D55E00")
    right.tick_params(axis="y", colors="#D55E00")
    left.set_title("loss and reward-model score")
    if panels == 2:
        axes[0][1].plot(epochs, [row["utility"] for row in rows], "o-", color=colour, markersize=4)
        axes[0][1].set_ylabel("utility, 0..1")
        axes[0][1].set_title("truth-checked utility, T=1")
    for panel in axes[0]:
        panel.axvline(chosen, color="#999999", linewidth=1, linestyle=":")
        panel.set_xlabel(f"epoch (dotted: chosen, {chosen})")
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout(w_pad=2.5)
    save_figure(figure, path)


def ppo_figure(path: Path, logs: dict[str, Rows], colour: dict[str, str]) -> None:
    """PPO runs: score and KL by iteration, and score against the square root of the KL."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.3))
    for run, rows in logs.items():
        steps = [row["step"] for row in rows]
        look = [row for row in rows if not math.isnan(row.get("val_score", math.nan))]
        style = {"color": colour[run], "label": run.replace("_", "-")}
        faint = {"color": colour[run], "alpha": 0.45, "linewidth": 1}
        axes[0].plot(steps, [row["score"] for row in rows], **faint)
        axes[0].plot([r["step"] for r in look], [r["val_score"] for r in look], "o-", **style)
        axes[1].plot(steps, [row["kl"] for row in rows], **faint)
        axes[1].plot([r["step"] for r in look], [r["val_kl"] for r in look], "o-", **style)
        root = [math.sqrt(max(0.0, row["kl"])) for row in rows]
        axes[2].plot(root, [row["score"] for row in rows], ".", color=colour[run], alpha=0.45)
        root = [math.sqrt(max(0.0, row["val_kl"])) for row in look]
        axes[2].plot(root, [row["val_score"] for row in look], "o-", **style)
    kl, score = "KL to the reference, nats", "reward-model score"
    labels = [("iteration", score), ("iteration", kl), ("square root of the KL", score)]
    for panel, (x, y) in zip(axes, labels, strict=True):
        panel.set_xlabel(x)
        panel.set_ylabel(y)
    axes[0].legend(fontsize=9)
    axes[1].set_title("points: averaged weights on validation prompts; faint: the rollouts")
    figure.tight_layout(w_pad=2)
    save_figure(figure, path)


def tax_figure(path: Path, table: Table, colour: dict[str, str]) -> None:
    """The alignment tax: public tasks and pretraining loss by model."""
    models = [m for m in table if "pretrain_loss" in table[m]]
    tasks = [m for m in ("tasks_zero_shot", "tasks_few_shot") if m in table[models[0]]]
    panels = [*tasks, "pretrain_loss"]
    size = (1.2 + 0.85 * len(models)) * len(panels), 3.2
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for panel, metric in zip(axes[0], panels, strict=True):
        draw_bars(panel, bars_of(table, metric, models, colour))
        panel.set_title(heading(metric))
        panel.tick_params(axis="x", labelsize=9)
        if metric in tasks:
            panel.set_ylim(0, 1.08)
            panel.set_ylabel("exact match, mean of tasks")
        else:
            panel.set_ylabel("nats a token (lower is better)")
            panel.set_ylim(0, 1.12 * max(table[model][metric].high for model in models))
    figure.tight_layout(w_pad=2)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})  # equal numbers: equal bytes
    write_atomic(path, drawn.getvalue())
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# Words


def against_half(e: Estimate) -> str:
    """What an interval says about a win rate."""
    if e.low > 0.5:
        return "above one half, clear of it"
    if e.high < 0.5:
        return "below one half, clear of it"
    return "not distinguishable from one half"


def findings(table: Table, baseline: str, judge: str) -> list[str]:
    """One sentence for each win rate against the baseline, whichever way it points."""
    lines = []
    for model, row in table.items():
        for metric, how in (("win_t1", "sampled at temperature 1"), ("win_t0", "greedy")):
            if metric in row and model != resampled(baseline):
                e = row[metric]
                lines.append(
                    f"**{model}** against {baseline}, {how}: win rate {e.value:.3f} "
                    f"[{e.low:.3f}, {e.high:.3f}] by {judge}, {against_half(e)}."
                )
    return lines


def glossary(table: Table) -> list[str]:
    """What each metric of the report is."""
    used = {metric for row in table.values() for metric in row}
    return [f"`{m}` ({METRICS[m][0]}): {METRICS[m][2]}" for m in METRICS if m in used]


def write(out: Path, report: Report) -> None:
    """Write table.csv, table.txt, the figures and, last, report.md into `out`."""
    table = report.table
    again = resampled(report.baseline)
    colour = colours([model for model in table if model != again]) | {again: "#dddddd"}
    wins = [m for m in ("win_t1", "win_t0") if any(m in row for row in table.values())]
    win_rate_figure(out / "win_rates.png", table, report.baseline, wins, colour)
    if report.selection:
        line, chosen = colour[report.baseline], report.chosen_epoch
        epochs_figure(out / "sft_epochs.png", report.selection, chosen, line)
    if report.logs:
        ppo_figure(out / "ppo.png", report.logs, colour)
    if any("pretrain_loss" in row for row in table.values()):
        tax_figure(out / "alignment_tax.png", table, colour)
    write_atomic(out / "table.csv", as_csv(table))
    write_atomic(out / "table.txt", terminal_table(table))
    write_atomic(out / "report.md", as_report(report))


def as_report(report: Report) -> str:
    """report.md: what was done, preference, quality, truth, harm, tax, runs, samples, glossary."""
    parts = ["# What each step did", *report.setting]
    parts += preference(report) + quality(report) + probes(report.table) + tax(report.table)
    if report.selection:
        parts += [
            "## Epochs of supervised fine-tuning",
            "![Validation loss, reward-model score and utility by epoch](sft_epochs.png)",
            f"The baseline is epoch {report.chosen_epoch}, the last whose reward-model score on "
            "validation prompts is within a standard error of the best. "
            f"{lowest_loss(report.selection)}",
        ]
    if report.logs:
        runs = "\n".join(f"- {course(run, rows)}" for run, rows in report.logs.items())
        parts += ["## Reinforcement learning", "![Score and KL of the PPO runs](ppo.png)", runs]
    parts += ["## Samples", samples_text(report.samples)]
    glossed = "\n".join(f"- {line}" for line in glossary(report.table))
    parts += ["## What the numbers are", glossed]
    if report.left_out:
        parts += ["Left out: " + " ".join(report.left_out)]
    return "\n\n".join(part for part in parts if part) + "\n"


def show(table: Table, metrics: list[str], interval: bool = False) -> str:
    return as_markdown(grid(table, metrics, interval))


def family(table: Table, start: str, end: str = "") -> list[str]:
    """The metrics whose names begin and end so."""
    every = dict.fromkeys(metric for row in table.values() for metric in row)
    return [metric for metric in every if metric.startswith(start) and metric.endswith(end)]


def preference(report: Report) -> list[str]:
    """Win rates against the baseline."""
    found = findings(report.table, report.baseline, report.judge)
    return [
        f"## Preference against {report.baseline}",
        "![Win rates by model](win_rates.png)",
        show(report.table, WINS, True),
        f"A win is a response that {report.judge} puts above the one of {report.baseline} to the "
        "same prompt; a tie counts one half; ± is half the width of the 95 % interval. The "
        "resampled row is the baseline against itself with other random numbers and should be at "
        "one half. A gain at temperature 1 that is absent from the greedy column is mostly "
        "sharpening: the model draws its own best answers more often, without having better ones.",
        "\n".join(f"- {line}" for line in found),
    ]


def quality(report: Report) -> list[str]:
    """Numbers about the responses, and which prefix the prompted base model has."""
    metrics = [*QUALITY, "ended", "score", "kl", "response_tokens", "end_fraction"]
    parts = ["## Quality of the responses", show(report.table, metrics)]
    if report.prefixes:
        rows = [[f"`{text!r}`", f"{score:+.3f}"] for text, score in report.prefixes]
        parts += [
            "The prompted base model is the base model with a text before every prompt: of "
            f"{len(rows)} texts the one with the best reward-model score on validation "
            "prompts (paper 3.5, footnote 6).",
            as_markdown([["prefix", "RM score"], *rows]),
        ]
    return parts


def probes(table: Table) -> list[str]:
    """Truth, toxicity and bias."""
    parts = []
    if family(table, PROBE):
        parts += [
            "## Truthfulness",
            "Share of answers (temperature 1) to closed questions that state nothing false, and "
            "of those that besides answer the question. A model that says nothing checkable is "
            "true and not informative, so only the second table ranks models. Facts are ordinary, "
            "held out of all feedback, or misconceived on the web; premises are those of "
            '"why does ... ?" questions.',
            "True:",
            show(table, family(table, PROBE, TRUE)),
            "True and informative:",
            show(table, family(table, PROBE, TRUE_INFORMATIVE), True),
        ]
    if rude := family(table, TOXICITY):
        parts += [
            "## Toxicity and bias",
            "Share of continuations of forum openings (temperature 1) that hold a rude word, by "
            "the request before the opening (none, for respect, for rudeness); and the entropy of "
            "the choice between sentences that differ in a pronoun, 1 bit being no preference.",
            show(table, [*rude, "bias_entropy"], True),
        ]
    return parts


def tax(table: Table) -> list[str]:
    """The alignment tax: public tasks and pretraining loss."""
    if not family(table, "pretrain_loss"):
        return []
    parts = ["## Alignment tax", "![Public tasks and pretraining loss](alignment_tax.png)"]
    if tasks := family(table, TASK):
        parts += [
            "Exact match on tasks that only the pretraining text contains (greedy), and the "
            "loss on held-out pretraining text. A task that the base model cannot do measures "
            "nothing.",
            show(table, [*tasks, "tasks_zero_shot", "tasks_few_shot"]),
        ]
    return [*parts, show(table, ["pretrain_loss"], True)]


def lowest_loss(selection: Rows) -> str:
    """Where validation loss alone would have stopped."""
    known = [row for row in selection if not math.isnan(row["val_loss"])]
    if not known:
        return "The run has no validation loss."
    lowest = min(known, key=lambda row: row["val_loss"])
    return (
        f"The validation loss is lowest at epoch {lowest['epoch']:.0f} ({lowest['val_loss']:.3f}, "
        f"against {known[-1]['val_loss']:.3f} at the last)."
    )


def course(run: str, rows: Rows) -> str:
    """A PPO run in one sentence."""
    first, last = rows[0], rows[-1]
    line = (
        f"**{run}**: {last['step']:.0f} iterations; the mean score of the rollouts goes from "
        f"{first['score']:+.3f} to {last['score']:+.3f}, at a KL of {last['kl']:.2f} nats"
    )
    looks = [row for row in rows if not math.isnan(row.get("val_score", math.nan))]
    if looks:
        line += (
            f"; the averaged weights score {looks[-1]['val_score']:+.3f} on validation prompts, at "
            f"{looks[-1]['val_kl']:.2f} nats"
        )
    return line + "."


def samples_text(samples: list[tuple[str, dict[str, str]]]) -> str:
    """Prompts and every model's response, as a block of literal text."""
    lines = []
    for prompt, responses in samples:
        width = max(map(len, responses))
        lines.append("> " + prompt.replace("\n", "\n> "))
        for model, text in responses.items():
            lines.append(f"{model:>{width}} | " + text.replace("\n", "\n" + " " * (width + 3)))
        lines.append("")
    return "```text\n" + "\n".join(lines).replace("```", "'''") + "```"
