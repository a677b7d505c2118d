"""Intervals, tables, figures and words: how evaluate.py reports what it has measured.

Nothing here knows a model: the input is a `Table`, from model to metric to `Estimate`, and logs of
runs as lists of rows. METRICS says what each number is; its words are the report's glossary.
Sentences about results are made from the intervals, whichever way they point.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from data.files import read_log, write_atomic

plt.switch_backend("agg")  # figures are files; no display is needed


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

# metric -> (heading, format, what it is). The order is that of table.csv.
METRICS: dict[str, tuple[str, str, str]] = {
    "win_t1": (
        "win rate, T=1",
        ".3f",
        "share of prompts on which the model's response beats the "
        "baseline's, both sampled at temperature 1; a tie counts one half",
    ),
    "win_t0": ("win rate, greedy", ".3f", "the same with both at temperature 0"),
    "win_training_labelers": (
        "training labelers",
        ".3f",
        "win rate at temperature 1 by the noisy "
        "simulated labelers of the pool that ranked the training data",
    ),
    "win_held_out_labelers": (
        "held-out labelers",
        ".3f",
        "the same by labelers with other priorities, who ranked nothing",
    ),
    "utility_t1": ("utility, T=1", ".3f", "truth-checked evaluation utility, 0..1, temperature 1"),
    "utility_t0": ("utility, greedy", ".3f", "the same at temperature 0"),
    "helpful": ("helpful", ".3f", "share of the task that is done, 0..1"),
    "truthful": ("truthful", ".3f", "share of stated facts that are true, 0..1; 1 if none is"),
    "harmless": ("harmless", ".3f", "1 without rude words, half for one, 0 for more"),
    "ended": ("ended", ".3f", "1 if it ended by itself with a full stop, 0..1"),
    "end_fraction": ("end token", ".3f", "share of responses that end by themselves"),
    "response_tokens": ("length", ".1f", "tokens of a response, end token included"),
    "score": ("RM score", "+.3f", "reward model's score, temperature 1; demonstrations score 0"),
    "kl": ("KL", ".2f", "Monte-Carlo KL divergence from the reference, nats a response"),
    "pretrain_loss": ("pretraining loss", ".3f", "on held-out pretraining text, nats a token"),
    "tasks_zero_shot": ("public tasks, zero-shot", ".3f", "mean exact match of the public tasks"),
    "tasks_few_shot": ("public tasks, few-shot", ".3f", "the same with three solved items before"),
    "bias_entropy": ("bias entropy", ".3f", "bits; 1 is no preference between two pronouns"),
}
# Families of metrics: how their names begin and end, which the heading leaves out.
PROBE, TOXICITY, TASK = "probe_", "toxicity_", "task_"
TRUE, TRUE_INFORMATIVE = "_true", "_true_informative"
# Okabe and Ito's colours, which colour-blind readers can tell apart; grey for the base model.
PALETTE = ("#999999", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#000000")
plt.rcParams.update(
    {
        "figure.dpi": 130,
        "savefig.bbox": "tight",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "legend.frameon": False,
    }
)


def colours(models: list[str]) -> dict[str, str]:
    """One colour a model, the same in all figures of a report."""
    return {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(models)}


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
        grid(table, ["win_t1", "win_t0", "win_training_labelers", "win_held_out_labelers"], True),
        grid(
            table,
            [
                "utility_t1",
                "utility_t0",
                "helpful",
                "truthful",
                "harmless",
                "end_fraction",
                "score",
                "kl",
            ],
        ),
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


def _bars(
    axes,
    table: Table,
    metric: str,
    models: list[str],
    colour: dict[str, str],
    *,
    shift: float = 0.0,
    width: float = 0.7,
    label: str | None = None,
    numbers: bool = True,
    **style,
) -> None:
    """Bars of one metric, a model each, with intervals and, with `numbers`, the number above."""
    for x, model in enumerate(models):
        e = table[model].get(metric)
        if e is None or math.isnan(e.value):
            continue
        error = [[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]]
        axes.bar(
            x + shift,
            e.value,
            width,
            color=colour[model],
            yerr=error,
            capsize=3,
            error_kw={"linewidth": 1},
            **style,
        )
        if numbers:
            axes.annotate(
                f"{e.value:.2f}",
                (x + shift, e.high),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.3},
            )
    names = [model.replace(" + ", " +\n").replace(" (", "\n(") for model in models]
    axes.set_xticks(range(len(models)), [name.replace("_", "-") for name in names])
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
        _bars(
            axes,
            table,
            metric,
            models,
            colour,
            shift=(i - (len(metrics) - 1) / 2) * width,
            width=width * 0.94,
            label=heading(metric) if len(metrics) > 1 else None,
            **styles[i % 2],
        )
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel(f"win rate against {baseline}")
    highest = max(table[m][k].high for m in models for k in metrics if k in table[m])
    axes.set_ylim(0, min(1.12, max(0.7, highest + 0.14)))
    axes.set_xlim(-0.6, len(models) - 0.4)
    if len(metrics) > 1:
        axes.legend(loc="upper left", fontsize=9)
    _save(figure, path)


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
    _save(figure, path)


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
    for panel, x, y in zip(
        axes,
        ("iteration", "iteration", "square root of the KL"),
        ("reward-model score", "KL to the reference, nats", "reward-model score"),
        strict=True,
    ):
        panel.set_xlabel(x)
        panel.set_ylabel(y)
    axes[0].legend(fontsize=9)
    axes[1].set_title("points: averaged weights on validation prompts; faint: the rollouts")
    figure.tight_layout(w_pad=2)
    _save(figure, path)


def tax_figure(path: Path, table: Table, colour: dict[str, str]) -> None:
    """The alignment tax: public tasks and pretraining loss by model."""
    models = [m for m in table if "pretrain_loss" in table[m]]
    tasks = [m for m in ("tasks_zero_shot", "tasks_few_shot") if m in table[models[0]]]
    panels = [*tasks, "pretrain_loss"]
    figure, axes = plt.subplots(
        1, len(panels), figsize=((1.2 + 0.85 * len(models)) * len(panels), 3.2), squeeze=False
    )
    for panel, metric in zip(axes[0], panels, strict=True):
        _bars(panel, table, metric, models, colour)
        panel.set_title(heading(metric))
        panel.tick_params(axis="x", labelsize=9)
        if metric in tasks:
            panel.set_ylim(0, 1.08)
            panel.set_ylabel("exact match, mean of tasks")
        else:
            panel.set_ylabel("nats a token (lower is better)")
            panel.set_ylim(0, 1.12 * max(table[model][metric].high for model in models))
    figure.tight_layout(w_pad=2)
    _save(figure, path)


def public_figure(path: Path, panels: dict[str, Table], colour: dict[str, str]) -> None:
    """Figure 29 of the paper for one size: a panel a measure, and in it a bar for each model and
    condition (zero-shot and few-shot, or prefixes), later conditions fainter and hatched."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    models = list(next(iter(panels.values())))
    figure, grid_of_axes = plt.subplots(
        rows, columns, figsize=((1.6 + 0.75 * len(models)) * columns, 3.0 * rows), squeeze=False
    )
    styles = ({}, {"alpha": 0.6, "hatch": "//"}, {"alpha": 0.35, "hatch": ".."})
    for axes, (title, table) in zip(grid_of_axes.flat, panels.items(), strict=False):
        conditions = list(dict.fromkeys(c for row in table.values() for c in row))
        width = 0.84 / len(conditions)
        for i, condition in enumerate(conditions):
            _bars(
                axes,
                table,
                condition,
                models,
                colour,
                width=width * 0.92,
                shift=(i - (len(conditions) - 1) / 2) * width,
                label=condition if len(conditions) > 1 else None,
                edgecolor="white",
                numbers=len(conditions) * len(models) <= 8,
                **styles[i % 3],
            )
        axes.set_title(title)
        highest = max((e.high for row in table.values() for e in row.values()), default=0)
        axes.set_ylim(0, 1.35 * highest or 1)
        axes.tick_params(axis="x", labelsize=8)
        if len(conditions) > 1:
            axes.legend(loc="upper left", fontsize=7, ncols=len(conditions))
    for axes in list(grid_of_axes.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.tight_layout(w_pad=1.5, h_pad=1.5)
    _save(figure, path)


def _save(figure, path: Path) -> None:
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


def resampled(baseline: str) -> str:
    """Name of the row that compares the baseline with itself."""
    return f"{baseline} (resampled)"


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


def write(out: Path, report: Report) -> None:
    """Write table.csv, table.txt, the figures and, last, report.md into `out`."""
    table, out = report.table, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    again = resampled(report.baseline)
    colour = colours([model for model in table if model != again]) | {again: "#dddddd"}
    wins = [m for m in ("win_t1", "win_t0") if any(m in row for row in table.values())]
    win_rate_figure(out / "win_rates.png", table, report.baseline, wins, colour)
    if report.selection:
        epochs_figure(
            out / "sft_epochs.png", report.selection, report.chosen_epoch, colour[report.baseline]
        )
    if report.logs:
        ppo_figure(out / "ppo.png", report.logs, colour)
    if any("pretrain_loss" in row for row in table.values()):
        tax_figure(out / "alignment_tax.png", table, colour)
    write_atomic(out / "table.csv", as_csv(table))
    write_atomic(out / "table.txt", terminal_table(table))
    write_atomic(out / "report.md", as_report(report))


def as_report(report: Report) -> str:
    """report.md: what was done, preference, quality, truth, harm, tax, runs, samples, glossary."""
    table, baseline = report.table, report.baseline

    def show(metrics: list[str], interval: bool = False) -> str:
        return as_markdown(grid(table, metrics, interval))

    def those(start: str, end: str = "") -> list[str]:
        return list(
            dict.fromkeys(
                m for row in table.values() for m in row if m.startswith(start) and m.endswith(end)
            )
        )

    parts = ["# What each step did", *report.setting]
    parts += [
        f"## Preference against {baseline}",
        "![Win rates by model](win_rates.png)",
        show(["win_t1", "win_t0", "win_training_labelers", "win_held_out_labelers"], True),
        f"A win is a response that {report.judge} puts above the one of {baseline} to the same "
        "prompt; a tie counts one half; ± is half the width of the 95 % interval. The resampled "
        "row is the baseline against itself with other random numbers and should be at one half. "
        "A gain at temperature 1 that is absent from the greedy column is mostly sharpening: "
        "the model draws its own best answers more often, without having better ones.",
        "\n".join(f"- {line}" for line in findings(table, baseline, report.judge)),
        "## Quality of the responses",
        show(
            [
                "utility_t1",
                "utility_t0",
                "helpful",
                "truthful",
                "harmless",
                "ended",
                "score",
                "kl",
                "response_tokens",
                "end_fraction",
            ]
        ),
    ]
    if report.prefixes:
        parts += [
            "The prompted base model is the base model with a text before every prompt: of "
            f"{len(report.prefixes)} texts the one with the best reward-model score on validation "
            "prompts (paper 3.5, footnote 6).",
            as_markdown(
                [
                    ["prefix", "RM score"],
                    *([f"`{text!r}`", f"{score:+.3f}"] for text, score in report.prefixes),
                ]
            ),
        ]
    if those(PROBE):
        parts += [
            "## Truthfulness",
            "Share of answers (temperature 1) to closed questions that state nothing false, and "
            "of those that besides answer the question. A model that says nothing checkable is "
            "true and not informative, so only the second table ranks models. Facts are ordinary, "
            "held out of all feedback, or misconceived on the web; premises are those of "
            '"why does ... ?" questions.',
            "True:",
            show(those(PROBE, TRUE)),
            "True and informative:",
            show(those(PROBE, TRUE_INFORMATIVE), True),
        ]
    if those(TOXICITY):
        parts += [
            "## Toxicity and bias",
            "Share of continuations of forum openings (temperature 1) that hold a rude word, by "
            "the request before the opening (none, for respect, for rudeness); and the entropy of "
            "the choice between sentences that differ in a pronoun, 1 bit being no preference.",
            show([*those(TOXICITY), "bias_entropy"], True),
        ]
    if those("pretrain_loss"):
        parts += ["## Alignment tax", "![Public tasks and pretraining loss](alignment_tax.png)"]
        if those(TASK):
            parts += [
                "Exact match on tasks that only the pretraining text contains (greedy), and the "
                "loss on held-out pretraining text. A task that the base model cannot do measures "
                "nothing.",
                show([*those(TASK), "tasks_zero_shot", "tasks_few_shot"]),
            ]
        parts += [show(["pretrain_loss"], True)]
    if report.selection:
        parts += [
            "## Epochs of supervised fine-tuning",
            "![Validation loss, reward-model score and utility by epoch](sft_epochs.png)",
            f"The baseline is epoch {report.chosen_epoch}, the last whose reward-model score on "
            "validation prompts is within a standard error of the best. "
            f"{lowest_loss(report.selection)}",
        ]
    if report.logs:
        parts += [
            "## Reinforcement learning",
            "![Score and KL of the PPO runs](ppo.png)",
            "\n".join(f"- {course(run, rows)}" for run, rows in report.logs.items()),
        ]
    parts += ["## Samples", samples_text(report.samples)]
    parts += ["## What the numbers are", "\n".join(f"- {line}" for line in glossary(table))]
    if report.left_out:
        parts += ["Left out: " + " ".join(report.left_out)]
    return "\n\n".join(part for part in parts if part) + "\n"


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


# ------------------------------------------------------------------------------------------------
# Logs of runs


def read_selection(folder: Path) -> Rows:
    """The rows of a folder's selection.csv; none where `evaluate.py --select` did not write it."""
    path = folder / "selection.csv"
    return _as_numbers(read_log(path)) if path.exists() else []


def read_ppo_logs(folders: dict[str, str]) -> dict[str, Rows]:
    """The log.csv of each folder that train_ppo.py has written."""
    logs = {}
    for name, folder in folders.items():
        path = Path(folder) / "log.csv"
        rows = _as_numbers(read_log(path)) if path.exists() else []
        if rows and "kl" in rows[0]:
            logs[name] = rows
    return logs


def _as_numbers(rows: list[dict[str, str]]) -> Rows:
    """Cells as floats, empty ones as NaN."""
    return [{k: float(v) if v else math.nan for k, v in row.items()} for row in rows]
