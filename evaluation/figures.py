"""The figures of a report, drawn from its numbers; equal numbers give equal files.

`bars` are {model: number with its interval, or None}; `colour` is {model: colour}, the same in all
figures of a report.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.files import write_atomic

import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:
    from evaluation.report import Estimate, Rows

    Bars = dict[str, Estimate | None]

# Okabe and Ito's colours, which colour-blind readers can tell apart; grey for the base model.
PALETTE = ("#999999", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#000000")
_STYLE = {"figure.dpi": 130, "savefig.bbox": "tight", "font.size": 10, "axes.titlesize": 11}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
_ABOVE = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 8}
_ABOVE |= {"bbox": {"facecolor": "white", "linewidth": 0, "pad": 0.3}}  # the number above a bar
plt.switch_backend("agg")  # figures are files; no display is needed
plt.rcParams.update(_STYLE)


def colours(models: Sequence[str]) -> dict[str, str]:
    """One colour a model, in the order of PALETTE."""
    return {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(models)}


def draw_bars(axes, groups, colour, styles=({},), width=0.7, filled=1.0, numbers=True) -> None:
    """For each of the groups {name: bars} a bar a model, with its interval and its number above.

    A model's bars stand side by side on `width`, of which they fill the share `filled`. Several
    groups take the styles in turn and are named in the legend.
    """
    each, models = width / len(groups), list(next(iter(groups.values())))
    for i, (label, bars) in enumerate(groups.items()):
        shift, style = (i - (len(groups) - 1) / 2) * each, styles[i % len(styles)]
        for x, (model, e) in enumerate(bars.items()):
            if e is None or math.isnan(e.value):
                continue
            error = [[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]]
            look = {"color": colour[model], "capsize": 3, "error_kw": {"linewidth": 1}, **style}
            axes.bar(x + shift, e.value, each * filled, yerr=error, **look)
            if numbers:
                axes.annotate(f"{e.value:.2f}", (x + shift, e.high), **_ABOVE)
        if len(groups) > 1:  # a grey twin for the legend: the colours belong to the models
            axes.bar([0], [0], color="#bbbbbb", label=label, **style)
    names = [re.sub(r"( \+|,) | (?=\()", r"\1\n", model) for model in models]
    axes.set_xticks(range(len(models)), [name.replace("_", "-") for name in names])


def highest(groups: dict[str, Bars]) -> float:
    """The upper end of the highest interval."""
    return max(e.high for bars in groups.values() for e in bars.values() if e)


def save_figure(figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    write_atomic(path, drawn.getvalue())
    plt.close(figure)


def win_rates(path: Path, wins: dict[str, Bars], baseline: str, colour: dict[str, str]) -> None:
    """Figure 1 of the paper in miniature: how often each model beats the baseline."""
    num_models = len(next(iter(wins.values())))
    figure, axes = plt.subplots(figsize=(1.6 + 1.25 * num_models, 3.6))
    styles = ({}, {"alpha": 0.55, "hatch": "//", "edgecolor": "white"})
    draw_bars(axes, wins, colour, styles, width=0.8, filled=0.94)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel(f"win rate against {baseline}")
    axes.set_ylim(0, min(1.12, max(0.7, highest(wins) + 0.14)))
    axes.set_xlim(-0.6, num_models - 0.4)
    if len(wins) > 1:
        axes.legend(loc="upper left", fontsize=9)
    save_figure(figure, path)


def alignment_tax(path: Path, groups: dict[str, Bars], colour: dict[str, str]) -> None:
    """Public tasks and, in the last panel, pretraining loss by model."""
    *_, loss = groups
    size = (1.2 + 0.85 * len(groups[loss])) * len(groups), 3.2
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False)
    for panel, (title, bars) in zip(axes[0], groups.items(), strict=True):
        draw_bars(panel, {title: bars}, colour)
        panel.set_title(title)
        panel.tick_params(axis="x", labelsize=9)
        unit = "nats a token (lower is better)" if title == loss else "exact match, mean of tasks"
        panel.set_ylim(0, 1.12 * highest({title: bars}) if title == loss else 1.08)
        panel.set_ylabel(unit)
    figure.tight_layout(w_pad=2)
    save_figure(figure, path)


def sft_epochs(path: Path, rows: Rows, chosen: int, colour: str) -> None:
    """SFT over epochs (C.1): validation loss and reward-model score; and utility where known."""
    panels = 2 if "utility" in rows[0] else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 3.2), squeeze=False)
    left = axes[0][0]
    right = left.twinx()
    right.spines["right"].set_visible(True)

    def draw(panel, column: str, line: str, colour: str) -> None:
        x, y = zip(*((row["epoch"], row[column]) for row in rows), strict=True)
        panel.plot(x, y, line, color=colour, markersize=4)

    draw(left, "val_loss", "o-", "black")
    draw(right, "score", "s--", "#D55E00")
    left.set_ylabel("● validation loss, nats a token")
    right.set_ylabel("■ reward-model score", color="#D55E00")
    right.tick_params(axis="y", colors="#D55E00")
    left.set_title("loss and reward-model score")
    if panels == 2:
        draw(axes[0][1], "utility", "o-", colour)
        axes[0][1].set_ylabel("utility, 0..1")
        axes[0][1].set_title("truth-checked utility, T=1")
    for panel in axes[0]:
        panel.axvline(chosen, color="#999999", linewidth=1, linestyle=":")
        panel.set_xlabel(f"epoch (dotted: chosen, {chosen})")
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout(w_pad=2.5)
    save_figure(figure, path)


def ppo(path: Path, logs: dict[str, Rows], colour: dict[str, str]) -> None:
    """PPO runs: gain over the start and KL by iteration, and gain against the square root of the
    KL. Rollouts are faint, with the gain's running mean; validations are points with intervals."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.3))
    for run, rows in logs.items():
        for name, look in (("score", {"alpha": 0.35}), ("val", {"label": run.replace("_", "-")})):
            known = [row for row in rows if not math.isnan(row.get(f"{name}_gain", math.nan))]
            step, gain, half = (
                np.array([row[column] for row in known])
                for column in ("step", f"{name}_gain", f"{name}_gain_ci")
            )
            kl = np.array([row["kl" if name == "score" else "val_kl"] for row in known])
            root, look = np.sqrt(np.maximum(0.0, kl)), {"color": colour[run], **look}
            if name == "score":
                window = np.ones(min(5, len(gain)))
                mean = np.convolve(gain, window, "same") / np.convolve(1 + 0 * gain, window, "same")
                axes[0].plot(step, gain, linewidth=0.8, **look)
                axes[0].plot(step, mean, linewidth=2, **look)
                axes[1].plot(step, kl, linewidth=1, **look)
                axes[2].plot(root, gain, ".", **look)
            else:
                bars = {"capsize": 3, "elinewidth": 1, "fmt": "o-", "markersize": 4, **look}
                axes[0].errorbar(step, gain, half, **bars)
                axes[1].plot(step, kl, "o-", markersize=4, **look)
                axes[2].errorbar(root, gain, half, **bars)
    gain, kl = "score: gain over the start", "KL to the reference, nats"
    labels = [("iteration", gain), ("iteration", kl), ("square root of the KL", gain)]
    for panel, (x, y) in zip(axes, labels, strict=True):
        panel.set_xlabel(x)
        panel.set_ylabel(y)
    for panel in axes[::2]:
        panel.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axes[0].legend(fontsize=9)
    axes[1].set_title("points: averaged weights on validation prompts; faint: the rollouts")
    figure.tight_layout(w_pad=2)
    save_figure(figure, path)
