"""Spied runs of the training scripts, and bugs planted in them.

A check is a function that fails on wrong code. It runs on the code as it is and on the code with
each bug planted that it must catch; it takes a `Runner` where it looks into a run of main().
"""

from __future__ import annotations

import copy
import functools
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from data.files import read_log

import pytest
import torch
from torch import Tensor

from tests.tiny import Tiny


@dataclass
class Seen:
    """What a run of main() left behind, and what was seen of its parts on the way."""

    out: Path
    log: list[dict[str, str]] = field(default_factory=list)
    timing: list[dict[str, str]] = field(default_factory=list)
    arguments: dict[str, list[tuple]] = field(default_factory=dict)  # of watched functions
    results: dict[str, list] = field(default_factory=dict)
    gradients: list[list[Tensor]] = field(default_factory=list)  # at each step of an optimizer
    state: dict[str, dict] = field(default_factory=dict)  # of the last checkpoint

    def watch(self, name: str, original: Callable, hook: Callable | None) -> Callable:
        arguments, results = self.arguments.setdefault(name, []), self.results.setdefault(name, [])

        def watched(*args):
            result = original(*args)
            arguments.append(args)
            results.append(hook(result, *args) if hook else result)
            return results[-1]

        return watched


class Runner:
    """Runs a script's main on the smallest world with `flags`, and without the flags `drop`."""

    def __init__(
        self, script: ModuleType, tiny: Tiny, folder: Path, flags: str, drop: str, watched: str
    ):
        self.script, self.tiny, self.folder = script, tiny, folder
        self.flags, self.drop, self.watched, self.count = flags, drop.split(), watched.split(), 0

    def __call__(self, flags: str = "", **hooks: Callable) -> Seen:
        """With more `flags`. `hooks`: name of one of the script's functions -> a function that gets
        its result and its arguments, and gives the result to go on with."""
        self.count += 1
        seen = Seen(self.folder / str(self.count))
        args = self.tiny.args(self.script.__name__.removeprefix("train_"), seen.out)
        for name in self.drop:
            at = args.index(name)
            del args[at : at + 2]
        args += [word.format(**vars(self.tiny)) for word in f"{self.flags} {flags}".split()]
        step = torch.optim.AdamW.step

        def spying_step(adam, *rest):
            parameters = [p for group in adam.param_groups for p in group["params"]]
            seen.gradients.append([p.grad.clone() for p in parameters])
            return step(adam, *rest)

        with pytest.MonkeyPatch.context() as patch:
            for name in {*self.watched, *hooks}:
                original = getattr(self.script, name)
                patch.setattr(self.script, name, seen.watch(name, original, hooks.get(name)))
            patch.setattr(torch.optim.AdamW, "step", spying_step)
            assert self.script.main(args) == 0
        seen.log, seen.timing = read_log(seen.out / "log.csv"), read_log(seen.out / "timing.csv")
        (*_, last) = sorted((seen.out / "checkpoints").iterdir())
        seen.state = torch.load(last / "state.pt", weights_only=True)["state"]
        return seen


def keep_start(result: tuple, args: Any) -> tuple:
    """A hook for make_model: the model as it is before the first step stays beside the result."""
    result[0].start = [copy.deepcopy(result[0])]  # in a list: no part of the model
    return result


def check_step(run: Runner) -> None:
    """Of SFT and the reward model: Adam's first step moves a weight by the learning rate; matrices
    decay by it, vectors do not; gradients are scaled down to the limit of their norm."""
    flags = "--warmup_steps 10 --lr 1e-2"
    free = run(flags, make_model=keep_start)
    decayed, clipped = run(f"{flags} --weight_decay 0.5"), run(f"{flags} --grad_clip 0.01")
    (start,) = free.results["make_model"][0][0].start
    weights = start.state_dict()
    assert (
        abs(max((free.state["model"][k] - w).abs().max() for k, w in weights.items()) - 1e-3) < 1e-5
    )
    for k, w in weights.items():
        decay = decayed.state["model"][k] - free.state["model"][k]
        assert (decay + 1e-3 * 0.5 * w * (w.dim() >= 2)).abs().max() < 1e-6
    norm = float(free.log[0]["grad_norm"])
    assert norm == float(clipped.log[0]["grad_norm"]) > 0.02
    assert close(clipped.gradients[0], [g * 0.01 / norm for g in free.gradients[0]], 1e-3)


def call(check: Callable, run: Runner) -> None:
    check(*([run] if inspect.signature(check).parameters else []))


class Bugs(list):
    """(target, bug, check). A bug gets the original function, then what that would get."""

    def __init__(self, checks: list[Callable]):
        super().__init__()
        self.checks = {check.__name__.removeprefix("check_"): check for check in checks}

    def plant(self, target: str, checks: str, **bugs: Callable) -> Callable:
        """Each of `bugs`, or the function that this decorates, planted in the function `target`,
        must make each of `checks` fail."""
        for name, bug in bugs.items():
            bug = functools.partial(bug)
            bug.__name__ = name
            self += [(target, bug, self.checks[check]) for check in checks.split()]
        return lambda bug: self.plant(target, checks, **{bug.__name__: bug})


def is_caught(check: Callable, target: str, bug: Callable, script: ModuleType, run: Runner) -> None:
    """`target`: a function of the script, or the full name of any other."""
    target = target if "." in target else f"{script.__name__}.{target}"
    path, _, name = target.rpartition(".")
    owner: Any = pkgutil.resolve_name(path)
    original = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **how: bug(original, *args, **how))
        with pytest.raises(AssertionError):
            call(check, run)


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> bool:
    """Whether tensors are equal, each relative to its largest value."""
    return len(a) == len(b) and all(
        x.shape == y.shape and (x - y).abs().max() <= tolerance * y.abs().max().clamp(min=1e-2)
        for x, y in zip(a, b, strict=True)
    )
