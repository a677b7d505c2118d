"""Which runs the claims need, and how they come about: a graph of stages, two cores at a time.

A seed's folder OUT/seed_<s> is that of `make demo SEED=<s> OUT=OUT/seed_<s>`; a demo that is there
is not run again. Every other run is a stage of the demo with one thing changed: its command is the
one that the Makefile has (`recipes` asks `make --dry-run`), with other flags (`edit`). So the
demo's settings stand in the Makefile and in the scripts' defaults alone.

A stage is done when its output is there and its stamp, OUT/stages/<name>.json, has this command and
these inputs. A stage that was interrupted is called with --resume, where its script knows it.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from data.files import BadInput, fingerprint, write_atomic

import train_ppo
from tests.makefile import ROOT, clean_environment, dry_run, edit

CORES = 2
# Width and layers of the smaller policies, 4 heads; and their cost by that of the demo's.
SIZES = {"64x2": (64, 2, 0.35), "96x2": (96, 2, 0.5)}
LARGE = {"192x4": (192, 4, 2.4)}  # a base model more than ten times the smallest policy
LARGE_LR = 2e-3  # the demo's, times the ratio of the widths
PTX_FACTORS = (0, 0.1, 3, 10)  # times the demo's --ptx_coef
KL_FACTORS = (0.1, 10, 100)  # times the demo's --kl_coef
# Where feedback pays (`headroom`), beside the demo's own point of each. How often demonstrators are
# wrong, terse, rambling, credulous; tokens of pretraining text; prompts that are ranked.
FAILINGS = {
    "careful": (0.05, 0.07, 0.04, 0.12),
    "moderate": (0.15, 0.20, 0.12, 0.35),
}
TOKENS = (1_000_000, 2_000_000)
RANKED = (1000, 3000)
OVEROPT_STEPS, OVEROPT_KEEP = 60, 6
PAIRS_PROMPTS = 1500  # prompts of both arms of the contrast of 3.5
ROUND_PROMPTS = 2500  # prompts ranked anew in the second round
RESUMABLE = ("train_sft.py", "train_rm.py", "train_ppo.py")
# --fast: flags of each script that make a run of seconds; the numbers then mean nothing.
FAST = {
    "data.tiny.make": "--pretrain_tokens 20000 --heldout_tokens 3000 --train_demonstrations 64 "
    "--valid_demonstrations 24 --train_rm_prompts 60 --valid_rm_prompts 30 --train_ppo_prompts 60 "
    "--valid_ppo_prompts 24 --test_prompts 24 --balanced_prompts 2",
    "train_sft.py": "--max_steps 8 --batch_size 8",
    "train_rm.py": "--max_steps 3 --batch_size 6",
    "train_ppo.py": "--max_steps 3 --batch_size 16 --num_minibatches 4 --ptx_ratio 0.5 "
    "--eval_every 2",
    "evaluate.py": "--num_prompts 6 --select_every 9",
    "sample.py": "--num_prompts 40 --num_responses 4",
}


@dataclass(frozen=True)
class Stage:
    """One command, the file that it makes, and the stages whose files it reads."""

    name: str
    command: tuple[str, ...]
    output: Path
    after: tuple[str, ...] = ()
    minutes: float = 1.0  # expected core-minutes
    cores: int = 1
    reads: tuple[Path, ...] = ()  # further inputs whose change makes it run again


# ------------------------------------------------------------------------------------------------
# Commands


@lru_cache(maxsize=8)
def recipes(folder: Path, seed: int) -> dict[str, tuple[str, ...]]:
    """The Makefile's command for each file of a demo in `folder`: file below it -> command."""
    found = {}
    for line in dry_run("demo", SEED=seed, OUT=folder):
        words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if "--out" in words:
            made = Path(words[words.index("--out") + 1]).relative_to(folder).as_posix()
            found[made] = (sys.executable, *words[1:])
        elif words[:1] == ["cat"] and ">" in words:  # parts, one after the other
            found[Path(words[-1]).relative_to(folder).as_posix()] = ("bash", "-c", line)
    return found


def in_small(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command with the flags of --fast."""
    flags = re.findall(r"--(\w+) (\S+)", FAST.get(script_of(command), ""))
    if "--keep_every" in command:
        flags.append(("keep_every", "1"))
    return edit(command, **dict(flags))


def output_of(file: Path) -> Path:
    """What a stage leaves: a data file itself, a world's card, or the weights in a run's folder."""
    if file.suffix in (".jsonl", ".txt"):
        return file
    return file / ("card.md" if file.name == "data" else "model.safetensors")


def script_of(command: Iterable[str]) -> str:
    """ "train_ppo.py", or "data.label" for a module."""
    words = list(command)
    return words[2] if words[1] == "-m" else words[1]


# ------------------------------------------------------------------------------------------------
# The graph


@dataclass
class Graph:
    """All stages of a run of the claims; `model` finds the stage that makes a seed's model."""

    out: Path
    fast: bool = False
    stages: dict[str, Stage] = field(default_factory=dict)

    def add(self, stage: Stage) -> str:
        self.stages[stage.name] = stage
        return stage.name

    def maker(self, seed: int, model: str) -> str:
        """Name of the stage that makes `model` of this seed: its own, or the demo's."""
        own = f"seed_{seed}/{model}"
        return own if own in self.stages else f"seed_{seed}/demo"

    def needed(self, names: Iterable[str]) -> dict[str, Stage]:
        """These stages and all that they come after, in an order that respects it."""
        chosen: dict[str, Stage] = {}

        def visit(name: str) -> None:
            if name not in chosen:
                for before in self.stages[name].after:
                    visit(before)
                chosen[name] = self.stages[name]

        for name in names:
            visit(name)
        return chosen


class Seed:
    """Adds the runs of one seed to a graph."""

    def __init__(self, graph: Graph, seed: int):
        self.graph, self.seed = graph, seed
        self.folder = graph.out / f"seed_{seed}"
        self.recipes = recipes(self.folder, seed)
        self.demo()

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def run(self, name: str, like: str, after: str, minutes: float, **flags: object) -> str:
        """A stage of the demo with other flags, into a folder or file of its own."""
        command = edit(self.recipes[like], out=self.path(name), **flags)
        return self.command(name, command, after, minutes)

    def command(self, name: str, command: tuple[str, ...], after: str, minutes: float) -> str:
        """A stage that runs after the stages which make the models or files in `after`."""
        script = script_of(command)
        if self.graph.fast:
            command = in_small(command)
        source = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
        before = dict.fromkeys(self.graph.maker(self.seed, a) for a in after.split())
        name, output = f"seed_{self.seed}/{name}", output_of(self.path(name))
        stage = Stage(name, command, output, tuple(before), minutes, reads=(source,))
        return self.graph.add(stage)

    def demo(self) -> None:
        """`make demo`; with --fast its stages one by one, in small, under the name of the last."""
        name = f"seed_{self.seed}/demo"
        if not self.graph.fast:
            command = ("make", "demo", f"SEED={self.seed}", f"OUT={self.folder}")
            last = self.path("report", "table.csv")
            folders = ("*.py", "data/**/*.py", "evaluation/*.py")
            sources = sorted([ROOT / "Makefile", *(f for g in folders for f in ROOT.glob(g))])
            self.graph.add(Stage(name, command, last, (), 22.0, CORES, tuple(sources)))
            return
        before: tuple[str, ...] = ()
        for made, recipe in self.recipes.items():
            if made.startswith("report"):
                continue
            command, file = edit(in_small(recipe), keep_every=None), self.path(made)
            before = (
                self.graph.add(Stage(f"{name}/{made}", command, output_of(file), before, 0.1)),
            )
        last = self.path("ppo_ptx", "model.safetensors")
        self.graph.add(Stage(name, (sys.executable, "-c", "pass"), last, before, 0.0))

    # What follows is for the sweeps, beside the demo's own runs.

    def sizes(self) -> None:
        """Smaller policies, whole pipelines but for the reward model, and a larger base model."""
        for size, (width, layers, cost) in (SIZES | LARGE).items():
            base, sft, init = (f"{size}/{name}" for name in ("base", "sft", "init"))
            shape: dict[str, float] = {"n_embd": width, "n_layer": layers}
            if size in LARGE:  # the demo's rate is too high for it
                shape["lr"] = LARGE_LR
            self.run(base, "base", "demo", 4.0 * cost, **shape)
            if size in LARGE:
                continue
            self.run(sft, "sft", base, 2.2 * cost, init=self.path(base))
            self.run(f"{size}/sft_selected", "sft_selected", sft, 0.4, run=self.path(sft))
            self.run(init, "init", base, 2.0 * cost, init=self.path(base))
            for like in ("ppo", "ppo_ptx"):
                self.run(f"{size}/{like}", like, init, 3.0 * cost + 0.8, init=self.path(init))

    def headroom(self) -> None:
        """The demo's steps up to PPO-ptx with more or fewer failings in the demonstrations, more or
        less pretraining text, fewer ranked prompts."""
        for name, rates in FAILINGS.items():
            folder = f"headroom/{name}"
            self.run(f"{folder}/data", "data", "demo", 0.3, failings=rates)
            self.from_sft(folder, "base", f"{folder}/data", f"{folder}/data")
        for tokens in TOKENS:
            folder = f"headroom/tokens_{tokens}"
            self.run(f"{folder}/data", "data", "demo", 0.3, pretrain_tokens=tokens)
            text = self.path(folder, "data", "train", "pretrain.txt")
            minutes = tokens / 1e6
            self.run(f"{folder}/base", "base", f"{folder}/data", minutes, pretrain_data=text)
            self.from_sft(folder, f"{folder}/base", f"{folder}/data", f"{folder}/base")
        for count in RANKED:
            folder = f"headroom/ranked_{count}"
            data = self.variant(f"{folder}/comparisons.jsonl", "prompts", count=count)
            self.rm(f"{folder}/rm", data, 2.5 * count / 10_000 + 0.2)
            judge = self.path(folder, "rm")
            self.run(f"{folder}/ppo_ptx", "ppo_ptx", f"{folder}/rm", 3.5, reward_model=judge)

    def from_sft(self, folder: str, base: str, data: str, after: str) -> None:
        """Everything that the demo does from SFT to PPO-ptx, with another base model or data."""
        at = self.path
        shown = {"init": at(base), "data": at(data, "train", "demonstrations.jsonl")}
        shown["val_data"] = at(data, "valid", "demonstrations.jsonl")
        self.run(f"{folder}/sft", "sft", after, 1.2, **shown)
        mixed = {"pretrain_data": at(data, "train", "pretrain.txt")}
        self.run(f"{folder}/init", "init", after, 1.4, **shown, **mixed)
        models = [f"sft={at(folder, 'sft')}", f"base={at(base)}"]
        asked = {"checkpoints": models, "part": None, "data": at(data, "train", "rm_prompts.jsonl")}
        made = f"{folder}/candidates.jsonl"
        self.run(made, "data/train/candidates_1.jsonl", f"{folder}/sft", 1.3, **asked)
        ranked, like = f"{folder}/comparisons.jsonl", "data/train/comparisons.jsonl"
        self.run(ranked, like, made, 0.3, data=at(made))
        shift = at(data, "train", "demonstrations.jsonl")
        self.rm(f"{folder}/rm", ranked, 2.7, init=at(folder, "sft"), demonstrations=shift)
        judge = {"reward_model": at(folder, "rm")}
        chosen = {"run": at(folder, "sft"), **judge}
        self.run(f"{folder}/sft_selected", "sft_selected", f"{folder}/rm", 0.6, **chosen)
        start = {"init": at(folder, "init"), **judge, **mixed}
        self.run(f"{folder}/ppo_ptx", "ppo_ptx", f"{folder}/rm {folder}/init", 3.5, **start)

    def public(self) -> None:
        """A model tuned on public tasks as instructions, chosen by reward model as SFT is."""
        data = self.path("data", "train", "public_demonstrations.jsonl")
        self.run("public", "sft", "demo", 1.2, data=data)
        self.run("public_selected", "sft_selected", "public", 0.6, run=self.path("public"))

    def coefficients(self) -> None:
        """The sweeps of E.6 and E.7; one flag differs from the demo's PPO-ptx or PPO."""
        ppo, ptx = (train_ppo.get_args(list(self.recipes[run][2:])) for run in ("ppo", "ppo_ptx"))
        for factor in PTX_FACTORS:
            coefficient = factor * ptx.ptx_coef
            self.run(f"ptx_x{factor:g}", "ppo_ptx", "demo", 3.5, ptx_coef=coefficient)
        for factor in KL_FACTORS:
            self.run(f"kl_x{factor:g}", "ppo", "demo", 2.2, kl_coef=factor * ppo.kl_coef)

    def overoptimised(self) -> None:
        """PPO without KL penalty, its averaged model kept along the way."""
        how = {"kl_coef": 0.0, "max_steps": OVEROPT_STEPS, "keep_every": OVEROPT_KEEP}
        self.run("overopt", "ppo", "demo", 3.3, **how)

    def reward_models(self) -> None:
        """Five folds over labeler groups (4.1), and pairs one by one against grouped (3.5)."""
        for group in range(5):
            data = self.variant(f"folds/{group}.jsonl", "without_group", group=group)
            self.rm(f"folds/rm_{group}", data, 4.0)
        data = self.variant("pairs/first.jsonl", "first", count=PAIRS_PROMPTS)
        self.rm("pairs/grouped", data, 1.0, epochs=1)
        # About as many pairs a step as the demo's 16 prompts have, hence about as many steps.
        self.rm("pairs/shuffled", data, 5.0, epochs=1, shuffle_pairs=True, batch_size=240)

    def variant(self, name: str, what: str, after: str = "demo", data: str = "", **more) -> str:
        """A data set of variants.py; the training comparisons unless `data` says otherwise."""
        sources = [self.path(file) for file in (data or "data/train/comparisons.jsonl").split()]
        command = (sys.executable, "-m", "tests.claims.variants", what)
        command = edit(command, data=sources, out=self.path(name), seed=self.seed, **more)
        self.command(name, command, after, 0.2)
        return name

    def rm(self, name: str, data: str, minutes: float, **flags: object) -> None:
        flags = {"data": self.path(data), "val_data": None, "held_out_data": None} | flags
        self.run(name, "rm", data, minutes, **flags)

    def second_round(self) -> None:
        """Comparisons of PPO-ptx's responses, a reward model on old and new ones, PPO-ptx again."""
        policy, sft = f"new={self.path('ppo_ptx')}", f"sft={self.path('sft_selected')}"
        for split, source, models, shares, num in (
            ("train", "train/ppo_prompts", [policy, sft], [0.7, 0.3], ROUND_PROMPTS),
            ("valid", "valid/rm_prompts", [policy], [0.7], 0),
        ):
            made = f"round_2/{split}_candidates.jsonl"
            flags = {"num_prompts": num, "data": self.path("data", f"{source}.jsonl")}
            flags |= {"checkpoints": models, "shares": shares, "part": None}
            self.run(made, "data/train/candidates_1.jsonl", "demo", 1.0, **flags)
            like = f"data/{split}/comparisons.jsonl"
            self.run(f"round_2/{split}.jsonl", like, made, 0.3, data=self.path(made))
        both = "data/train/comparisons.jsonl round_2/train.jsonl"
        data = self.variant("round_2/comparisons.jsonl", "merge", "round_2/train.jsonl", both)
        self.rm("round_2/rm", data, 6.5)
        judge = self.path("round_2", "rm")
        self.run("round_2/ppo_ptx", "ppo_ptx", "round_2/rm", 3.5, reward_model=judge)

    def controls(self) -> None:
        """Runs that must refute: a reward model of shuffled labels, ptx on shuffled text."""
        data = self.variant("control/labels.jsonl", "shuffle_labels")
        self.rm("control/rm", data, 4.5)
        self.run("control/ppo", "ppo", "control/rm", 2.2, reward_model=self.path("control", "rm"))
        text = self.variant("control/text.txt", "shuffle_text", data="data/train/pretrain.txt")
        self.run("control/ppo_ptx", "ppo_ptx", text, 3.5, pretrain_data=self.path(text))

    def sweeps(self) -> None:
        self.sizes()
        self.headroom()
        self.public()
        self.coefficients()
        self.overoptimised()
        self.reward_models()
        self.second_round()
        self.controls()


# ------------------------------------------------------------------------------------------------
# Running it


def stamp_of(stage: Stage, stages: dict[str, Stage]) -> str:
    """What a stage's output depends on: its command and the contents of its inputs."""
    inputs = [stages[name].output for name in stage.after] + list(stage.reads)
    sha256 = {str(path): fingerprint(path) for path in inputs if path.exists()}
    return json.dumps({"command": stage.command, "sha256": sha256}, indent=1) + "\n"


class Runner:
    """Runs stages as subprocesses, as many at a time as there are cores, and says how far it is."""

    def __init__(self, stages: dict[str, Stage], out: Path, say: Callable[[str], None] = print):
        self.stages, self.out, self.say = stages, out, say
        self.done: set[str] = set()
        self.failed: list[str] = []
        self.running: dict[str, tuple[subprocess.Popen, float, str]] = {}
        self.spent = self.expected = 0.0  # core-minutes of what this call has run
        self.began = self.shown = time.monotonic()

    def file(self, stage: Stage, kind: str) -> Path:
        return self.out / "stages" / f"{stage.name}{kind}"

    def is_done(self, stage: Stage) -> bool:
        stamp = self.file(stage, ".json")
        if not (stage.output.exists() and stamp.exists()):
            return False
        return stamp.read_text(encoding="utf-8") == stamp_of(stage, self.stages)

    def run(self) -> list[str]:
        """Run everything that is not done; the names of the stages that failed.

        Stages after a failed one are left out. Stopped by Ctrl-C, it first lets its children save
        and stop: they have sessions of their own, so that each gets one signal, from here.
        """
        waiting = dict(self.stages)
        try:
            while waiting or self.running:
                self.collect()
                for name in list(waiting):
                    stage = waiting[name]
                    if any(a not in self.stages or a in self.failed for a in stage.after):
                        self.failed.append(name)
                        del waiting[name]
                    elif all(a in self.done for a in stage.after):
                        if self.is_done(stage):
                            self.done.add(name)
                            del waiting[name]
                        elif stage.cores <= CORES - self.busy():
                            self.start(stage)
                            del waiting[name]
                self.progress()
                time.sleep(0.05)
        finally:
            for process, _, _ in self.running.values():
                process.terminate()
            for process, _, _ in self.running.values():
                process.wait()
        return self.failed

    def busy(self) -> int:
        return sum(self.stages[name].cores for name in self.running)

    def start(self, stage: Stage) -> None:
        stamp, started = stamp_of(stage, self.stages), self.file(stage, ".started")
        command = list(stage.command)
        goes_on = started.exists() and started.read_text(encoding="utf-8") == stamp
        if goes_on and script_of(command) in RESUMABLE:
            command.append("--resume")
        write_atomic(started, stamp)
        threads = {"OMP_NUM_THREADS": "1"} if stage.cores == 1 else {}
        with self.file(stage, ".log").open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            how = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT}
            how["env"] = clean_environment(TQDM_MININTERVAL="30", **threads)
            process = subprocess.Popen(command, **how, start_new_session=True)
        self.running[stage.name] = process, time.monotonic(), stamp

    def collect(self) -> None:
        for name, (process, began, stamp) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            stage, minutes = self.stages[name], (time.monotonic() - began) / 60
            del self.running[name]
            if code == 0 and stage.output.exists():
                write_atomic(self.file(stage, ".json"), stamp)
                self.done.add(name)
                self.spent += minutes * stage.cores
                self.expected += stage.minutes
            else:
                self.failed.append(name)
                self.say(f"{name} FAILED with code {code}: see {self.file(stage, '.log')}")
            if code in (0, 1, 2):  # done, or refused: nothing to go on with
                self.file(stage, ".started").unlink()
            self.progress(f"{name} {'done' if code == 0 else 'failed'} in {minutes:.1f} min")

    def progress(self, event: str = "", every: float = 60.0) -> None:
        """A line for the whole, at each event and every minute."""
        now = time.monotonic()
        if not event and now - self.shown < every:
            return
        self.shown = now
        left = 0.0
        for name, stage in self.stages.items():
            if name not in self.done and name not in self.failed:
                began = self.running[name][1] if name in self.running else now
                ran = (now - began) / 60 * stage.cores
                left += max(stage.minutes - ran, 0.1 * stage.minutes)
        pace = self.spent / self.expected if self.expected > 1 else 1.0
        running = ", ".join(self.running) or "nothing"
        self.say(
            f"[{len(self.done)}/{len(self.stages)}] elapsed {(now - self.began) / 60:.1f} min, "
            f"about {pace * left / CORES:.0f} min left | {event or 'running'} | now: {running}"
        )


def plan(stages: dict[str, Stage], done: Callable[[Stage], bool]) -> str:
    """The stages with their expected minutes, and the sum."""
    lines, left = ["core-min  stage"], 0.0
    for stage in stages.values():
        known = done(stage)
        left += 0 if known else stage.minutes
        lines.append(f"{stage.minutes:8.1f}  {stage.name}{'  (done)' if known else ''}")
    lines.append(
        f"{len(stages)} stages; about {left:.0f} core-minutes are left, that is "
        f"{left / CORES:.0f} minutes on {CORES} idle cores"
    )
    return "\n".join(lines)


def refuse_failures(failed: list[str]) -> None:
    if failed:
        raise BadInput(
            f"{len(failed)} stages failed or were left out: {', '.join(failed[:6])}; see the logs "
            "named above; what is done is kept, start again to go on"
        )
