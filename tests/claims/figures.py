"""A figure for each claim, from the panels of its results: nothing here measures anything.

Several seeds are drawn as their mean, intervals combined as of independent estimates; where runs of
seeds do not share their points along x, each seed's lines are drawn.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

from evaluation.figures import PALETTE
from evaluation.report import Estimate
from tests.claims.lab import NAMES
from tests.claims.verdict import Panel, together, triple

COLOURS = dict(zip(NAMES.values(), PALETTE, strict=False))
OTHERS = ("#4d4d4d", "#b8b8b8", "#CC79A7", "#D55E00", "#8c6d31", "#7570b3")  # not of a model
WIDTH = 8.3  # inches: at 100 dots an inch the width of a README page


def draw(path: Path, results: list[list[Panel]]) -> None:
    """One figure of a claim: `results` are the panels of each seed."""
    panels = [pooled(list(of_seeds)) for of_seeds in zip(*results, strict=True)]
    columns = 1 if len(panels) == 1 else 3 if len(panels) == 3 else 2
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, 3.1 * rows), squeeze=False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        (bars if panel.kind == "bars" else lines)(axes, panel, small=columns == 3)
    labels = {}
    for axes in grid.flat[: len(panels)]:
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if len(labels) > 1:
        how = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "fontsize": 9}
        figure.legend(labels.values(), labels.keys(), ncols=min(5, len(labels)), **how)
    figure.tight_layout(w_pad=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})  # equal numbers, equal bytes
    plt.close(figure)


def pooled(panels: list[Panel]) -> Panel:
    """One panel of all seeds."""
    first = panels[0]
    if len(panels) == 1:
        return first
    if first.kind == "lines" and any(xs(p) != xs(first) for p in panels):
        series = {
            f"{label}, seed {i}": points
            for i, panel in enumerate(panels)
            for label, points in panel.series.items()
        }
        return replace(first, series=series)
    series = {}
    for label, points in first.series.items():
        lead = len(points[0]) - 3  # an x before the three numbers, or not
        series[label] = []
        for i, point in enumerate(points):
            mean = together([Estimate(*p.series[label][i][lead:]) for p in panels])
            series[label].append((*point[:lead], *triple(mean)))
    levels = {k: sum(p.levels[k] for p in panels) / len(panels) for k in first.levels}
    return replace(first, series=series, levels=levels)


def xs(panel: Panel) -> dict[str, list[float]]:
    return {label: [point[0] for point in points] for label, points in panel.series.items()}


def bars(axes, panel: Panel, small: bool) -> None:
    """Groups of bars with intervals, and the number above where there is room for it."""
    width = 0.8 / len(panel.series)
    count = len(panel.series) * len(panel.groups)
    single = len(panel.series) == 1
    for i, (label, points) in enumerate(panel.series.items()):
        for x, (value, low, high) in enumerate(points):
            if math.isnan(value):
                continue
            place = x + (i - (len(panel.series) - 1) / 2) * width
            colour = COLOURS.get(label, OTHERS[i % len(OTHERS)])
            if single:
                colour = COLOURS.get(panel.groups[x].replace("\n", " "), "#bbbbbb")
            error = [[max(0, value - low)], [max(0, high - value)]]
            how = {"yerr": error, "capsize": 2, "error_kw": {"linewidth": 1}}
            name = label if x == 0 else None
            axes.bar(place, value, 0.94 * width, color=colour, label=name, **how)
            if count <= (8 if small else 20):
                text = f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
                how = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
                axes.annotate(text, (place, max(high, value)), fontsize=7.5, **how)
    names = [g.replace(" (", "\n(") for g in panel.groups]
    axes.set_xticks(range(len(names)), names, fontsize=8 if small else 9)
    if small and len(names) > 3:
        plt.setp(axes.get_xticklabels(), rotation=30, ha="right")
    axes.margins(y=0.14)
    finish(axes, panel)


def lines(axes, panel: Panel, small: bool) -> None:
    """Points with intervals, joined; a fitted curve as a dashed line in its points' colour."""
    labels = [label for label in panel.series if not label.startswith("fit ")]
    for label, points in panel.series.items():
        x, y, low, high = zip(*points, strict=True)
        of = label.removeprefix("fit ")
        colour = COLOURS.get(of, OTHERS[labels.index(of) % len(OTHERS)])
        if of != label:
            axes.plot(x, y, "--", color=colour, linewidth=1.2, label="fitted curve")
            continue
        error = [[max(0, b - a) for a, b in zip(low, y, strict=True)]]
        error += [[max(0, b - a) for a, b in zip(y, high, strict=True)]]
        how = {"fmt": "o-", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8, "capsize": 2}
        axes.errorbar(x, y, error, color=colour, label=label, **how)
    if panel.xscale == "log":  # with a place for 0
        known = [p[0] for points in panel.series.values() for p in points if p[0] > 0]
        axes.set_xscale("symlog", linthresh=min(known))
        ticks = sorted({p[0] for points in panel.series.values() for p in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
    finish(axes, panel)


def finish(axes, panel: Panel) -> None:
    for i, (name, level) in enumerate(panel.levels.items()):
        how = {"linewidth": 0.8, "linestyle": ("--", ":")[i % 2]}
        axes.axhline(level, color="black", label=name or None, **how)
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylabel(panel.ylabel, fontsize=9)
    axes.set_xlabel(panel.xlabel, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
