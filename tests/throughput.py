"""Time an SFT step, an RM step and a whole PPO iteration at the sizes of GPT-2; plan memory.

    python -m tests.throughput                            the tiny world's size, on this machine
    python -m tests.throughput --size gpt2 gpt2-xl        on a GPU; writes kernels/results/
    python -m tests.throughput --plan                     memory and operations on paper, no run
    python -m tests.throughput --size gpt2 --rollout_size 256 -- --max_prompt_tokens 1
    python -m tests.throughput --busy                     pretraining beside another program

What is timed is the scripts' own `main` with the flags that `make gpt2 SIZE=...` gives them (tiny:
their defaults), for a few steps. Exchanged are what it reads and what it writes: models are made
with random weights, data are the longest that the flags allow (prompts of PPO from half to full;
no pretraining text, no validation), and a `Run` keeps its clocks and saves nothing. Flags after
"--" go to all three scripts.

A row has the 20th, 50th and 80th percentile of the seconds, the median's tokens a second (of a
rollout and an iteration: sampled tokens), the operations (`forward_flops`) over seconds and the
GPU's peak (mfu; empty where that is neither known nor given, --peak_tflops), the peak of PyTorch's
GPU memory, and the plan.

**Memory on paper** (`memory_plan`), bytes; P parameters, M of them weights and biases of matrices,
V vocabulary, C width, L layers, t tokens of a micro-batch, r places in its rows, b bytes of the
compute dtype:

    weights 4P, gradients 4P, Adam 8P      of each trained network
    casts        b (M + V C)               what autocast makes of the weights, where b is 2
    activations  L (8 + 14 b) C t          two residuals in 4 bytes; two normed inputs, q, k, v,
                                           attention's output, the MLP before and after GELU in b
                 (4 L + 8 + 14 b) C t      with checkpointing: a residual a block, and one block
                 8 + 11 b, and 4 b r / t   in RM, instead of 8 + 14 b: t counts a prompt once for
                                           its responses; q, k, v and the output are kept for r
    head         (b + 8) V C + (b + 4) C t + 2^26     gradients of the unembedding; the workspace
    cache        2 b L C rows length       keys and values of a rollout
    frozen       4P - (4 - b) M            reference, reward model; the start, if it is another

PPO holds policy, value network, average, frozen models and Adam's moments, and beside them the
larger of rollout (bM + cache + a prefill of (8 + 9 b) C a prompt token + 16 V a row) and update
(gradients of both networks, and casts, activations and head of one at a time). A sum of what may
live at once, without fragmentation and the driver's own half gigabyte.

**Beside another program** (`--busy`): tokens a second of the demo's pretraining, the mean over some
seconds of a process of its own, with all cores as threads and with the threads and the environment
that the Makefile gives to a stage that runs alone; on an idle machine, beside a process that keeps
one core busy, and beside one that starts only when the threads are chosen. The cases take turns,
and the median of the rounds is printed, with its ratio to the first case's.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

from data.stages import allowed_cores

import numpy as np
import torch

import train_ppo
import train_rm
import train_sft
from kernels.bench import RESULTS
from kernels.runtime import triton
from model import GPT, GPTConfig, ScalarModel
from run import Run
from tests.makefile import ROOT, dry_run, edit

SHAPES = {
    "tiny": GPTConfig(1024, n_positions=128, n_embd=128, n_layer=3, n_head=4, eos_token_id=1023),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPTConfig(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPTConfig(n_embd=1600, n_layer=48, n_head=25),
}
STAGES = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
MOST_RESPONSES = 9  # K of the paper is 4 to 9
FIELDS = "what size shape dtype repeats p20_s p50_s p80_s tok_per_s tflop_per_s mfu peak_gib "
FIELDS = (FIELDS + "plan_gib note device torch triton").split()
# Operations a second of dense bfloat16 products with float32 sums, from the data sheets; the first
# pattern found in the GPU's name counts. (BOUNDS in kernels/bench.py has what products reach.)
PEAK_FLOPS = {
    r"Laptop": None,  # its name contains that of a faster card
    r"B200": 2250e12,
    r"H200": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4": 121e12,
    r"A10": 125e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--size", nargs="+", choices=SHAPES, default=["tiny"], help="of the models")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to time")
    add("--repeats", type=int, default=5, help="timed steps of each, after one that is not timed")
    add("--rollout_size", type=int, help="responses sampled at once, instead of the size's")
    add("--peak_tflops", type=float, default=0.0, help="of the GPU, for mfu; 0: by its name")
    add("--plan", action="store_true", help="print memory and operations on paper, and stop")
    add("--busy", action="store_true", help="time pretraining, idle and beside another program")
    add("--seconds", type=float, default=6.0, help="of --busy: of each case in each of 3 rounds")
    add("--pretraining", action="store_true", help="time pretraining with these threads alone")
    add("--out", type=Path, help="CSV; on a GPU without it: kernels/results/throughput_<GPU>.csv")
    add("flags", nargs="*", help="after --: flags for the three scripts")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected at least 1")
    return args


@lru_cache
def commands(size: str) -> dict[str, tuple[str, ...]]:
    """The flags that `make gpt2` gives to each script: stage -> words. Paths, and what is read for
    validation or mixed in, are left out."""
    found = {}
    absent = "data val_data pretrain_data demonstrations init reward_model ptx_coef out"
    for line in dry_run("gpt2", SIZE=size):
        name = re.search(r"train_(\w+)\.py.* --out \S*/(sft|rm|ppo_ptx)\b", line)
        if name:
            words = shlex.split(line)
            words = words[words.index(f"train_{name[1]}.py") + 1 :]
            found[name[1]] = edit(words, **dict.fromkeys(absent.split()))
    return found


def argv_of(stage: str, size: str, flags: Sequence[str], rollout_size: int | None) -> list[str]:
    """The command line of a stage's script, to which `flags` are added."""
    argv = ["--data", "none", *(() if size == "tiny" else commands(size)[stage])]
    if stage == "ppo" and rollout_size:
        argv += ["--rollout_size", str(rollout_size)]
    return [*argv, *flags]


def stage_args(
    stage: str, size: str, flags: Sequence[str] = (), rollout_size: int | None = None
) -> argparse.Namespace:
    """The arguments that the script of a stage runs with."""
    return STAGES[stage].get_args(argv_of(stage, size, flags, rollout_size))


# ------------------------------------------------------------------------------------------------
# Operations on paper


def forward_flops(
    config: GPTConfig, lengths: Sequence[float], predicted: float, repeated: float = 0
) -> float:
    """Operations of a forward pass over rows of these lengths, by the usual count: a product of
    (n, a) and (a, b) has 2 n a b, attention is counted without its causal half left out.

        sum_rows (24 L C^2 n + 4 L C n^2)  -  24 L C^2 repeated  +  2 V C predicted

    `predicted` is how many positions go through the unembedding, `repeated` how many tokens through
    attention alone, because another row has them as well (see `Packing`). Training has three times
    as many (a backward pass twice the forward's): with all positions predicted, 6 N + 12 L C T a
    token, N = 12 L C^2 + V C (Chowdhery et al. 2022, B). Recomputation is not counted.
    """
    L, C = config.n_layer, config.n_embd
    trunk = sum(24 * L * C**2 * n + 4 * L * C * n**2 for n in lengths)
    return trunk - 24 * L * C**2 * repeated + 2.0 * config.vocab_size * C * predicted


def iteration_flops(
    policy: GPTConfig,
    judge: GPTConfig,
    lengths: Sequence[float],
    new_tokens: float,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Operations of a PPO iteration, by part; rows have these lengths, of which `new_tokens` are
    responses in all; `judge` is the shape of reward model and value network.

    Each row goes once through the policy in sampling, once through every model in scoring, and
    three times (forward and backward) through what is trained, in each inner epoch; so do the
    pretraining sequences. The language models' heads see response tokens; of the prompts' tokens
    all but one in --responses_per_prompt go through attention only.
    """
    repeated = (sum(lengths) - new_tokens) * (1 - 1 / args.responses_per_prompt)
    language = forward_flops(policy, lengths, new_tokens, repeated)
    scalar = forward_flops(judge, lengths, 0, repeated)
    trained = 3 * args.inner_epochs
    updates = args.num_minibatches * args.inner_epochs
    sequences = round(args.ptx_ratio * args.batch_size / args.num_minibatches)
    text = forward_flops(policy, [args.ptx_tokens], args.ptx_tokens - 1) if args.ptx_coef else 0
    return {
        "rollout": language,
        "scoring": 2 * (language + scalar),
        "update": trained * (language + scalar) + 3 * updates * sequences * text,
    }


def responses_of(prompt: int) -> int:
    """4, 5, ..., 9, 4, ..."""
    return 4 + prompt % (MOST_RESPONSES - 3)


def work(
    stage: str,
    config: GPTConfig,
    args: argparse.Namespace,
    prompts: Sequence[int] = (),
    response: float = 0,
) -> dict[str, dict[str, Any]]:
    """What is done in each timed part of a step: its tokens, operations, and shape in words.

    All sequences are full. In PPO, prompts have the lengths given, and responses `response` tokens;
    without them, these too are full.
    """
    B, longest = args.batch_size, args.max_prompt_tokens + args.max_new_tokens
    if stage == "ppo":
        response = response or args.max_new_tokens
        rows = [n + response for n in prompts] or [longest] * B
        flops = iteration_flops(config, config, rows, B * response, args)
        flops["ppo_iteration"] = sum(flops.values())
        shape = f"B={B} T={sum(rows) / B:.0f} new={response:.0f}"
        return {k: {"tokens": B * response, "flops": f, "shape": shape} for k, f in flops.items()}
    rows, predicted, repeated = B, B * (longest - 1), 0  # at most: every token counted
    if stage == "rm":
        rows = sum(responses_of(i) for i in range(B))
        predicted, repeated = 0, (rows - B) * args.max_prompt_tokens
    flops = 3 * forward_flops(config, [longest] * rows, predicted, repeated)
    about = {"tokens": rows * longest, "flops": flops, "shape": f"B={rows} T={longest}"}
    return {f"{stage}_step": about}


def peak_flops(device: str) -> float | None:
    """Operations a second of the GPU by its data sheet; None on a CPU and for a GPU that is not in
    the table."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


# ------------------------------------------------------------------------------------------------
# Memory on paper


def parameters(config: GPTConfig) -> tuple[int, int]:
    """All parameters of a GPT, and those of its matrices and their biases."""
    L, C = config.n_layer, config.n_embd
    matrices = L * (12 * C**2 + 9 * C)
    return (config.vocab_size + config.n_positions) * C + matrices + L * 4 * C + 2 * C, matrices


def memory_plan(stage: str, config: GPTConfig, args: argparse.Namespace) -> dict[str, int]:
    """Bytes by item, and their "total", of a run with the longest sequences that `args` allow."""
    P, M = parameters(config)
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    b = 2 if args.dtype == "bfloat16" else 4
    longest = args.max_prompt_tokens + args.max_new_tokens
    rows = args.micro_batch_size * (MOST_RESPONSES if stage == "rm" else 1)
    t = rows * longest
    block = (8 + 14 * b) * C * t
    if stage == "rm":
        t = args.micro_batch_size * (args.max_prompt_tokens + MOST_RESPONSES * args.max_new_tokens)
        block = (8 + 11 * b) * C * t + 4 * b * C * rows * longest
    plan = {
        "weights": 4 * P,
        "gradients": 4 * P,
        "adam": 8 * P,
        "casts": b * (M + V * C) if b == 2 else 0,
        "activations": 4 * L * C * t + block if args.grad_checkpointing else L * block,
        "head": (b + 8) * V * C + (b + 4) * C * t + 2**26,
    }
    if stage == "sft" and args.resid_pdrop:
        plan["activations"] += 2 * C * t * (1 if args.grad_checkpointing else L)  # masks, 1 byte
    if stage == "rm":
        plan["head"] = 4 * V * C  # no unembedding; the token embedding's gradient
        plan["casts"] = b * M if b == 2 else 0
    if stage != "ppo":
        return plan | {"total": sum(plan.values())}
    size = args.rollout_size or args.batch_size
    update = 2 * plan["gradients"] + plan["casts"] + plan["activations"] + plan["head"]
    cache = 2 * b * L * C * size * longest
    prefill = (8 + 9 * b) * C * size * args.max_prompt_tokens + 16 * V * size
    held = {
        "policy": 4 * P,
        "value_network": 4 * P,
        "average": 4 * P,
        "adam": 2 * plan["adam"],
        "frozen": (2 + (args.reference != args.init)) * (4 * P - (4 - b) * M),
    }
    rollout = (b * M if b == 2 else 0) + cache + prefill
    total = sum(held.values()) + max(rollout, update)
    return held | {"rollout": rollout, "update": update, "total": total}


def print_plans(flags: list[str]) -> None:
    """A line for each size and stage: petaflop of a step or iteration, GiB by item."""
    for size, config in SHAPES.items():
        for stage in STAGES:
            args = stage_args(stage, size, ["--device", "cpu", *flags])  # on paper: no GPU needed
            plan = memory_plan(stage, config, args)
            items = "  ".join(f"{name} {bytes_ / 2**30:.2f}" for name, bytes_ in plan.items())
            flops = list(work(stage, config, args).values())[-1]["flops"]
            print(f"{size:12} {stage:4} petaflop {flops / 1e15:.3g}  GiB: {items}")


# ------------------------------------------------------------------------------------------------
# What the scripts get instead of files


class Clocks(Run):
    """A run that reads and writes no file; the clocks of its steps are in `rows`."""

    rows: list[dict[str, float]]

    def __init__(self, args: argparse.Namespace, stage: str, *, result: torch.nn.Module, **_: Any):
        self.args, self.out, self.result, self.done = args, Path(args.out), result, 0
        Clocks.rows = []

    def log(self, row: dict[str, Any]) -> None:
        step_s = sum(self.clocks.values())
        self.rows.append({"step_s": step_s} | self.clocks | self.rates)

    def finish(self, **info: Any) -> int:
        return 0

    def _save(self) -> None:
        pass


def new_model(
    kind: type, config: GPTConfig, args: argparse.Namespace, packs: bool = False
) -> GPT | ScalarModel:
    with torch.device(args.device):
        model = kind(config, args.kernels, args.dtype)
    trunk = model if kind is GPT else model.trunk
    trunk.gradient_checkpointing, trunk.packs = args.grad_checkpointing, packs
    return model


def stand_ins(stage: str, config: GPTConfig, prompts: list[list[int]]) -> dict[str, Any]:
    """The functions of a script that read files, and others that make up what they return."""
    rng = np.random.default_rng(0)

    def sequence(length: int) -> list[int]:
        return rng.integers(config.vocab_size - 1, size=length).tolist()  # without the end token

    def demonstrations(path: str, encoding: None, args: argparse.Namespace) -> list:
        longest = args.max_prompt_tokens + args.max_new_tokens
        return [(sequence(longest), 1) for _ in range(args.batch_size)]

    def comparisons(path: str, encoding: None, args: argparse.Namespace) -> list:
        elements = []
        for i in range(args.batch_size):
            prompt, K = sequence(args.max_prompt_tokens), responses_of(i)
            responses = [prompt + sequence(args.max_new_tokens) for _ in range(K)]
            pairs = train_rm.untied_pairs(list(range(K)))
            elements.append(train_rm.Comparison(responses, pairs))
        return elements

    def sft_model(args: argparse.Namespace) -> tuple:
        shape = GPTConfig(**vars(config) | {"resid_pdrop": args.resid_pdrop})
        model = new_model(GPT, shape, args).train()
        if args.compile:
            for block in model.h:
                block.compile(dynamic=True)
        return model, None

    def rm_model(args: argparse.Namespace) -> tuple:
        return new_model(ScalarModel, config, args, packs=True).train(), None

    def ppo_models(args: argparse.Namespace) -> tuple:
        packs = args.responses_per_prompt > 1
        models = [new_model(kind, config, args, packs).eval() for kind in (GPT, ScalarModel)]
        return models[0], *models, None

    return {
        "sft": {"make_model": sft_model, "load_demonstrations": demonstrations},
        "rm": {"make_model": rm_model, "load_comparisons": comparisons},
        "ppo": {"load_models": ppo_models, "load_prompts": lambda *_: prompts},
    }[stage]


# ------------------------------------------------------------------------------------------------
# Measuring


def timed(
    stage: str, config: GPTConfig, argv: list[str], repeats: int
) -> tuple[list[dict[str, float]], dict[str, dict[str, Any]]]:
    """Seconds of each part of `repeats` steps, and what was done in the parts."""
    script = STAGES[stage]
    args = script.get_args(argv)
    prompts: list[list[int]] = []
    if stage == "ppo":
        rng, longest = np.random.default_rng(0), args.max_prompt_tokens
        count = args.batch_size // args.responses_per_prompt  # all of them in each iteration
        sizes = rng.integers(-(-longest // 2), longest + 1, size=count)
        prompts = [rng.integers(config.vocab_size - 1, size=size).tolist() for size in sizes]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(script, Run=Clocks, **stand_ins(stage, config, prompts)),
    ):
        more = ["--out", f"{folder}/{stage}", "--max_steps", str(repeats + 1)]
        assert script.main([*argv, *more]) == 0
    clocks = Clocks.rows[1:]  # the first step compiles kernels and allocates moments
    if stage != "ppo":
        about = work(stage, config, args)
        return [{f"{stage}_step": c["step_s"]} for c in clocks], about
    names = {"rollout_s": "rollout", "score_s": "scoring", "update_s": "update"}
    seconds = [{names[k]: c[k] for k in names} for c in clocks]
    new = np.mean([c["tok_per_s"] * c["rollout_s"] for c in clocks]) / args.batch_size
    lengths = [len(prompt) for prompt in prompts for _ in range(args.responses_per_prompt)]
    about = work(stage, config, args, lengths, float(new))
    return [s | {"ppo_iteration": sum(s.values())} for s in seconds], about


def measure(
    stage: str, size: str, argv: list[str], repeats: int, peak: float | None
) -> Iterator[dict[str, Any]]:
    """Rows of a stage; a single one with a note where the GPU's memory does not suffice."""
    config, args = SHAPES[size], STAGES[stage].get_args(argv)
    plan = memory_plan(stage, config, args)["total"] / 2**30
    base = {"size": size, "dtype": args.dtype, "repeats": repeats, "plan_gib": plan}
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds, about = timed(stage, config, argv, repeats)
    except torch.OutOfMemoryError:
        yield base | {"what": stage, "note": "out of memory"}
        return
    if args.device == "cuda":
        base["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    peak = peak or peak_flops(args.device)
    for what, did in about.items():
        low, middle, high = np.quantile([times[what] for times in seconds], [0.2, 0.5, 0.8])
        row = {"what": what, "shape": did["shape"], "p20_s": low, "p50_s": middle, "p80_s": high}
        rate = did["flops"] / middle
        row |= {"tok_per_s": did["tokens"] / middle, "tflop_per_s": rate / 1e12}
        yield base | row | ({"mfu": rate / peak} if peak else {})


# ------------------------------------------------------------------------------------------------
# Beside another program


class Stop(Exception):
    """The time of a run is over."""


def pretraining_rate(seconds: float) -> float:
    """Tokens a second of the demo's command for the base model, on random text of the tiny world's
    size, from the fourth step on for so long, in this process."""
    (line,) = (line for line in dry_run("demo", OUT="x") if "--out x/base " in line)
    words = shlex.split(line)
    argv = edit(words[words.index("train_sft.py") + 1 :], val_pretrain_data=None)
    rng = np.random.default_rng(0)

    def sequences(path: str, encoding: None, length: int, short: int, share: float) -> list:
        """Short ones for more steps than are timed, and a batch of full ones."""
        size, lengths = SHAPES["tiny"].vocab_size - 1, [short] * 8000 + [length] * 16
        return [(rng.integers(size, size=n).tolist(), 1) for n in lengths]

    class Timed(Clocks):
        def log(self, row: dict[str, Any]) -> None:
            super().log(row)
            if sum(clocks["step_s"] for clocks in self.rows[3:]) >= seconds:
                raise Stop

    stand_in = stand_ins("sft", SHAPES["tiny"], []) | {"load_sequences": sequences}
    more = ["--max_steps", "1000000", "--device", "cpu"]
    with mock.patch.multiple(train_sft, Run=Timed, **stand_in):
        try:
            train_sft.main([*argv, *more])
        except Stop:
            pass
    rows = Clocks.rows[3:]
    return sum(c["tok_per_s"] * c["step_s"] for c in rows) / sum(c["step_s"] for c in rows)


def spin_count() -> str:
    """GOMP_SPINCOUNT of the stages: as given, else the Makefile's."""
    found = re.search(r"GOMP_SPINCOUNT \?= (\d+)", (ROOT / "Makefile").read_text())
    return os.environ.get("GOMP_SPINCOUNT", found[1])


@contextmanager
def another_program(there: bool) -> Iterator[None]:
    """A process that keeps one core busy."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if there else None
    time.sleep(0.5 if there else 0)
    try:
        yield
    finally:
        if busy:
            busy.kill()
            busy.wait()


def one_case(guarded: bool, before: bool, after: bool, seconds: float) -> tuple[int, float]:
    """(threads, tokens a second): another program runs before the threads are chosen, or after."""
    given = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    threads = len(allowed_cores())
    with another_program(before):
        if guarded:
            how = [sys.executable, "data/stages.py", "free"]
            said = subprocess.run(how, cwd=ROOT, env=given, check=True, capture_output=True)
            threads, given["GOMP_SPINCOUNT"] = int(said.stdout), spin_count()
    given["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "tests.throughput", "--pretraining", "--seconds", str(seconds)]
    with another_program(after):
        said = subprocess.run(command, cwd=ROOT, env=given, check=True, capture_output=True)
    return threads, float(said.stdout.split()[-1])


# What is printed, then: guarded, another program before and after the choice of the threads.
CASES = {
    "idle, all cores": (False, False, False),
    "idle, the Makefile's threads": (True, False, False),
    "one core busy, all cores": (False, True, True),
    "one core busy, the Makefile's threads": (True, True, True),
    "one core busy later, the Makefile's threads": (True, False, True),
}


def print_busy(seconds: float, rounds: int = 3) -> None:
    """Threads and tokens a second of each of CASES, round by round; then the medians."""
    found: dict[str, list[tuple[int, float]]] = {case: [] for case in CASES}
    for turn in range(rounds):
        for case, how in CASES.items():
            threads, rate = one_case(*how, seconds)
            found[case].append((threads, rate))
            print(f"round {turn + 1}: {case}: {threads} threads, {rate:,.0f} tokens/s", flush=True)
    first = np.median([rate for _, rate in found["idle, all cores"]])
    for case, results in found.items():
        threads = "/".join(str(threads) for threads, _ in results)
        rate = np.median([rate for _, rate in results])
        ratio = f"ratio {rate / first:.2f}"
        print(f"{case:44} threads {threads:6} {rate:8,.0f} tokens/s, {ratio}")


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    if args.pretraining:
        print(pretraining_rate(args.seconds))
        return 0
    if args.busy:
        print_busy(args.seconds)
        return 0
    if args.plan:
        print_plans(args.flags)
        return 0
    runs = [(stage, size) for size in args.size for stage in args.stages]
    on_gpu = stage_args(*runs[0], args.flags).device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "triton": getattr(triton, "__version__", "")}
    if args.out is None and on_gpu:
        args.out = RESULTS / f"throughput_{device.replace(' ', '_')}.csv"
    rows = []
    for stage, size in runs:
        words = argv_of(stage, size, args.flags, args.rollout_size)
        for row in measure(stage, size, words, args.repeats, args.peak_tflops * 1e12):
            row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            rows.append({"device": device} | versions | row)
            print("  ".join(f"{k} {row[k]}" for k in FIELDS if k in row), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
