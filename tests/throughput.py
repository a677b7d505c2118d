"""Time an SFT step, an RM step and a whole PPO iteration with the scripts' presets; plan memory.

    python -m tests.throughput                              the tiny world's sizes, on this machine
    python -m tests.throughput --preset gpt2 gpt2-xl        on a GPU; writes kernels/results/
    python -m tests.throughput --plan                       memory and operations on paper, no run
    python -m tests.throughput --preset gpt2 --rollout_size 256 -- --max_prompt_tokens 1

The models have random weights of the preset's shape; data, batches and lengths are those that the
preset allows at most: every sequence is full (prompts of PPO from half to full). What is timed is
the scripts' own functions with the scripts' own arguments; flags after "--" go to all three.

A row has the 20th, 50th and 80th percentile of the seconds, the median's tokens a second (of a
rollout and an iteration: sampled tokens), the operations (`model.forward_flops`) over seconds and
peak (mfu; empty where the GPU's peak is not known), the peak of PyTorch's GPU memory, and the plan.

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
    frozen       4P, or 4P - 2M            reference and reward model

PPO holds policy, value network, average, frozen models and Adam's moments, and beside them the
larger of rollout (bM + cache + a prefill of (8 + 9 b) C a prompt token + 16 V a row) and update
(gradients of both networks, and casts, activations and head of one at a time). A sum of what may
live at once, without fragmentation and the driver's own half gigabyte.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
import train_ppo
import train_rm
import train_sft
from generate import store_matrices
from kernels.bench import RESULTS
from kernels.runtime import triton
from model import GPT, GPTConfig, ScalarModel, forward_flops

SHAPES = {
    "tiny": GPTConfig(
        vocab_size=1024, n_positions=128, n_embd=128, n_layer=3, n_head=4, eos_token_id=1023
    ),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPTConfig(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPTConfig(n_embd=1600, n_layer=48, n_head=25),
}
STAGES = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
MOST_RESPONSES = 9  # K of the paper is 4 to 9
FIELDS = ["what", "preset", "shape", "dtype", "repeats", "p20_s", "p50_s", "p80_s", "tok_per_s"]
FIELDS += ["tflop_per_s", "mfu", "peak_gib", "plan_gib", "note", "device", "torch", "triton"]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", nargs="+", choices=SHAPES, default=["tiny"], help="sizes; tiny: defaults")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to time")
    add("--repeats", type=int, default=5, help="timed runs of each, after one that is not timed")
    add("--rollout_size", type=int, help="responses sampled at once, instead of the preset's")
    add("--plan", action="store_true", help="print memory and operations on paper, and stop")
    add("--out", type=Path, help="CSV; on a GPU without it: kernels/results/throughput_<GPU>.csv")
    add("flags", nargs="*", help="after --: flags for the three scripts")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected at least 1")
    return args


def stage_args(
    stage: str, preset: str, flags: list[str], rollout_size: int | None = None
) -> argparse.Namespace:
    """The arguments that the script of a stage would run with."""
    argv = ["--data", "none"] + (["--preset", preset] if preset != "tiny" else [])
    if stage == "ppo" and rollout_size:
        argv += ["--rollout_size", str(rollout_size)]
    return STAGES[stage].get_args(argv + flags)


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
    if stage == "ppo":
        rows = args.micro_batch_size or args.minibatch_size
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
        "frozen": 2 * (4 * P - 2 * M if args.frozen_dtype == "bfloat16" else 4 * P),
    }
    rollout = (b * M if b == 2 else 0) + cache + prefill
    return held | {
        "rollout": rollout,
        "update": update,
        "total": sum(held.values()) + max(rollout, update),
    }


def operations(stage: str, config: GPTConfig, args: argparse.Namespace) -> float:
    """Of a step, or of an iteration without pretraining data, with all sequences full; a prompt has
    K = 4..9 responses in turn."""
    longest = args.max_prompt_tokens + args.max_new_tokens
    if stage == "sft":
        tokens = args.batch_size * (longest - 1)  # at most: every token counted
        return 3 * forward_flops(config, [longest] * args.batch_size, tokens)
    if stage == "rm":
        rows = sum(responses_of(i) for i in range(args.batch_size))
        repeated = (rows - args.batch_size) * args.max_prompt_tokens
        return 3 * forward_flops(config, [longest] * rows, 0, repeated)
    with torch.device("meta"):
        models: dict = {"policy": GPT(config), "reference": GPT(config)}
        models |= {"reward_model": ScalarModel(config), "value_network": ScalarModel(config)}
    new = args.batch_size * args.max_new_tokens
    return train_ppo.iteration_flops(models, [longest] * args.batch_size, new, 0, args)


def responses_of(prompt: int) -> int:
    """4, 5, ..., 9, 4, ..."""
    return 4 + prompt % (MOST_RESPONSES - 3)


def print_plans(flags: list[str]) -> None:
    """A line for each preset and stage: petaflop of a step or iteration, GiB by item."""
    for preset, config in SHAPES.items():
        for stage in STAGES:
            args = stage_args(stage, preset, ["--device", "cpu", *flags])  # on paper: no GPU needed
            plan = memory_plan(stage, config, args)
            items = "  ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.items())
            work = operations(stage, config, args) / 1e15
            print(f"{preset:12} {stage:4} petaflop {work:.3g}  GiB: {items}")


# ------------------------------------------------------------------------------------------------
# Work of each stage: functions that do it once and return the seconds of its parts


def wait(device: str) -> float:
    """The clock, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def new_model(kind: type, config: GPTConfig, args: argparse.Namespace, pdrop: float = 0.0) -> Any:
    with torch.device(args.device):
        config = GPTConfig(**vars(config) | {"resid_pdrop": pdrop})
        model = kind(config, impl=args.kernels)
    trunk = model if kind is GPT else model.trunk
    trunk.gradient_checkpointing = args.grad_checkpointing
    return model


def adamw(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def supervised(stage: str, config: GPTConfig, args: argparse.Namespace) -> tuple[Callable, dict]:
    """A step of train_sft.py or train_rm.py on full sequences; and tokens and operations of it."""
    rng = np.random.default_rng(0)
    longest = args.max_prompt_tokens + args.max_new_tokens

    def sequence(length: int = longest) -> list[int]:
        return rng.integers(config.vocab_size, size=length).tolist()

    if stage == "sft":
        model = new_model(GPT, config, args, args.resid_pdrop).train()
        if args.compile:
            for block in model.h:
                block.compile(dynamic=True)
        batch: list = [(sequence(), 1) for _ in range(args.batch_size)]
        count, predicted, repeated = args.batch_size, args.batch_size * (longest - 1), 0
    else:
        model = new_model(ScalarModel, config, args).train()
        batch = []
        for i in range(args.batch_size):
            prompt = sequence(args.max_prompt_tokens)
            sequences = [prompt + sequence(args.max_new_tokens) for _ in range(responses_of(i))]
            pairs = train_rm.untied_pairs(list(range(len(sequences))))
            batch.append(train_rm.Comparison(sequences, pairs, len(prompt)))
        count, predicted = sum(len(group.sequences) for group in batch), 0
        repeated = (count - len(batch)) * args.max_prompt_tokens
    optimizer = adamw(model, args.lr)

    def run() -> dict[str, float]:
        started = wait(args.device)
        optimizer.zero_grad(set_to_none=True)
        if stage == "sft":
            train_sft.backward(model, batch, 1.0, args)
        else:
            train_rm.backward(model, batch, args)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        return {f"{stage}_step": wait(args.device) - started}

    flops = 3 * forward_flops(config, [longest] * count, predicted, repeated)
    about = {"tokens": count * longest, "flops": flops, "shape": f"B={count} T={longest}"}
    return run, {f"{stage}_step": about}


def reinforcement(config: GPTConfig, args: argparse.Namespace) -> tuple[Callable, dict]:
    """An iteration of train_ppo.py without pretraining data; what it did is filled in by it."""
    rng = np.random.default_rng(0)
    models = {name: new_model(GPT, config, args) for name in ("policy", "reference")}
    models["reference"].load_state_dict(models["policy"].state_dict())
    models |= {
        name: new_model(ScalarModel, config, args) for name in ("reward_model", "value_network")
    }
    ema = new_model(GPT, config, args).requires_grad_(False)
    for name, model in models.items():
        model.eval()
        if name in ("reference", "reward_model"):
            model.requires_grad_(False)
            if args.frozen_dtype == "bfloat16":
                store_matrices(model, torch.bfloat16)
    optimizers = {
        "policy": adamw(models["policy"], args.lr),
        "value_network": adamw(models["value_network"], args.value_lr),
    }
    sizes = rng.integers(
        -(-args.max_prompt_tokens // 2),
        args.max_prompt_tokens + 1,
        size=args.batch_size // args.responses_per_prompt,
    )
    prompts = [rng.integers(config.vocab_size - 1, size=size).tolist() for size in sizes]
    about: dict[str, dict] = {}

    def run() -> dict[str, float]:
        started = wait(args.device)
        tokens, prompt_lengths, lengths = train_ppo.sample(models["policy"], prompts, 0, args)
        sampled = wait(args.device)
        minibatches = []
        for _, rows in train_ppo.draw_minibatches(lengths, rng, args):
            part = tokens[rows], lengths[rows], prompt_lengths[rows]
            minibatches.append(train_ppo.score(*part, models, args))
        train_ppo.whiten(minibatches)
        scored = wait(args.device)
        for mb in minibatches:
            train_ppo.update(mb, models, optimizers, None, args)
            train_ppo.update_ema(ema, models["policy"], args.ema)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        finished = wait(args.device)
        new = int((lengths - prompt_lengths).sum())
        rows = lengths.tolist()
        shape = f"B={len(rows)} T={sum(rows) / len(rows):.0f} new={new / len(rows):.0f}"
        repeated = float(prompt_lengths.sum()) * (1 - 1 / args.responses_per_prompt)
        once, heads = forward_flops(config, rows, 0, repeated), forward_flops(config, [], new)
        for what, flops in (
            ("rollout", once + heads),
            ("scoring", 4 * once + 2 * heads),
            ("update", 6 * once + 3 * heads),
            ("ppo_iteration", train_ppo.iteration_flops(models, rows, new, 0, args)),
        ):
            about[what] = {"tokens": new, "flops": flops, "shape": shape}
        return {
            "rollout": sampled - started,
            "scoring": scored - sampled,
            "update": finished - scored,
            "ppo_iteration": finished - started,
        }

    return run, about


# ------------------------------------------------------------------------------------------------
# Measuring


def measure(
    stage: str, preset: str, args: argparse.Namespace, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rows of a stage; a single one with a note where the GPU's memory does not suffice."""
    config = SHAPES[preset]
    base = {
        "preset": preset,
        "dtype": args.dtype,
        "repeats": repeats,
        "plan_gib": memory_plan(stage, config, args)["total"] / 2**30,
    }
    torch.manual_seed(0)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        if stage == "ppo":
            run, about = reinforcement(config, args)
        else:
            run, about = supervised(stage, config, args)
        run()  # compiles kernels, allocates moments
        seconds = [run() for _ in range(repeats)]
    except torch.OutOfMemoryError:
        yield base | {"what": stage, "note": "out of memory"}
        return
    if args.device == "cuda":
        base["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    peak = args.peak_tflops * 1e12 or kernels.peak_flops(args.device)
    for what in seconds[0]:
        low, middle, high = np.quantile([times[what] for times in seconds], [0.2, 0.5, 0.8])
        rate = about[what]["flops"] / middle
        yield (
            base
            | {
                "what": what,
                "shape": about[what]["shape"],
                "p20_s": low,
                "p50_s": middle,
                "p80_s": high,
                "tok_per_s": about[what]["tokens"] / middle,
                "tflop_per_s": rate / 1e12,
            }
            | ({"mfu": rate / peak} if peak else {})
        )


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    if args.plan:
        print_plans(args.flags)
        return 0
    runs = [
        (stage, preset, stage_args(stage, preset, args.flags, args.rollout_size))
        for preset in args.preset
        for stage in args.stages
    ]
    on_gpu = runs[0][2].device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    about = {
        "device": device,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", ""),
    }
    if args.out is None and on_gpu:
        args.out = RESULTS / f"throughput_{device.replace(' ', '_')}.csv"
    rows = []
    for run in runs:
        for row in measure(*run, args.repeats):
            row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            rows.append(about | row)
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
