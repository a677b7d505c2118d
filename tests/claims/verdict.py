"""What a claim is and returns: rows with an interval, a gate and a verdict; panels to be drawn.

A gate is words about the row's 95 % interval [low, high], written down beside the claim before any
run counts:

    above x      low > x                not above x   low <= x
    below x      high < x               not below x   high >= x
    within x     -x <= low and high <= x

A row without a gate is told, and judged by nothing. A number that could not be had passes no gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from evaluation.report import Estimate
from tests.claims.lab import Lab

GATES: dict[str, Callable[[Estimate, float], bool]] = {
    "above": lambda e, x: e.low > x,
    "below": lambda e, x: e.high < x,
    "not above": lambda e, x: e.low <= x,
    "not below": lambda e, x: e.high >= x,
    "within": lambda e, x: -x <= e.low and e.high <= x,
}


def passes(e: Estimate, gate: str) -> bool | None:
    """Whether the interval passes the gate; None without one."""
    if not gate:
        return None
    words, _, number = gate.rpartition(" ")
    return GATES[words](e, float(number))


@dataclass
class Row:
    """One number of a claim: what it is, its interval, the paper's, its gate."""

    name: str
    value: Estimate
    gate: str = ""
    paper: str = ""

    @property
    def holds(self) -> bool | None:
        return passes(self.value, self.gate)


@dataclass
class Panel:
    """What one pair of axes shows, as numbers.

    kind "bars": `groups` along x, and in `series` for each label a (value, low, high) per group.
    kind "lines": in `series` for each label its (x, value, low, high) points. `levels` are
    horizontal lines. Nothing here knows how it is drawn.
    """

    title: str
    ylabel: str
    kind: str = "bars"
    groups: list[str] = field(default_factory=list)
    series: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    xlabel: str = ""
    xscale: str = "linear"
    marks: bool = True  # False: a smooth curve


@dataclass
class Result:
    """A claim measured on one seed."""

    rows: list[Row]
    panels: list[Panel]
    commit: str = ""  # at which it was measured; empty: not recorded

    @property
    def holds(self) -> bool:
        return all(row.holds is not False for row in self.rows)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict) -> Result:
        rows = [Row(**(r | {"value": Estimate(**r["value"])})) for r in content["rows"]]
        panels = [Panel(**panel) for panel in content["panels"]]
        return cls(rows, panels, content.get("commit", ""))


def triple(e: Estimate) -> tuple[float, float, float]:
    return e.value, e.low, e.high


def chart(
    ylabel: str,
    groups: Iterable[str],
    series: dict[str, list[Estimate]],
    level: float | None = None,
    title: str = "",
) -> Panel:
    """A panel of bars: for each label of `series` one in each group; a dashed line at `level`."""
    bars = {label: [triple(e) for e in estimates] for label, estimates in series.items()}
    levels = {} if level is None else {"": level}
    return Panel(title, ylabel, groups=list(groups), series=bars, levels=levels)


def exact(value: float) -> Estimate:
    """A number that was counted, not sampled."""
    return Estimate(value, value, value)


def minus(a: Estimate, b: Estimate) -> Estimate:
    """The difference of two estimates from different samples: half widths add in squares."""
    return _combined(a.value - b.value, [a, b], [1.0, 1.0])


def together(estimates: list[Estimate]) -> Estimate:
    """The mean of independent estimates, such as those of seeds."""
    n = len(estimates)
    return _combined(sum(e.value for e in estimates) / n, estimates, [1 / n] * n)


def _combined(value: float, parts: list[Estimate], weights: list[float]) -> Estimate:
    half = [w * (e.high - e.low) / 2 for w, e in zip(weights, parts, strict=True)]
    width = math.sqrt(sum(h * h for h in half))
    return Estimate(value, value - width, value + width)


# ------------------------------------------------------------------------------------------------
# The register of claims


@dataclass(frozen=True)
class Claim:
    """A claim: its function, the row of the list that it belongs to, its figure, what it needs."""

    name: str
    measure: Callable[[Lab], Result]
    topic: str
    figure: str
    needs: tuple[str, ...]  # models or files beside the demo's; none: a headline claim

    @property
    def headline(self) -> bool:
        return not self.needs

    @property
    def text(self) -> str:
        return self.measure.__doc__ or ""


CLAIMS: dict[str, Claim] = {}
TOPICS = {
    "preference": "Preference by model and size",
    "headroom": "When feedback pays",
    "labelers": "Held-out labelers",
    "quality": "Quality and metadata",
    "truth": "Truthfulness",
    "harm": "Toxicity and bias",
    "tax": "Alignment tax",
    "epochs": "SFT over epochs",
    "pairs": "One batch element per prompt",
    "overoptimisation": "Over-optimisation",
    "rounds": "Rounds of feedback",
    "generalisation": "Generalisation and simple mistakes",
    "cost": "Cost",
    "controls": "Controls, which must refute",
}


def claim(topic: str, figure: str, needs: Sequence[str] = ()) -> Callable:
    """Register a claim."""

    def register(measure: Callable[[Lab], Result]) -> Callable[[Lab], Result]:
        name = measure.__name__
        CLAIMS[name] = Claim(name, measure, topic, figure, tuple(needs))
        return measure

    return register
