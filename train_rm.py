"""Step 2: the reward model, trained on rankings of K = 4..9 responses (InstructGPT 3.5, C.2).

The model is the SFT model with the unembedding replaced by a linear head; a response's score r is
read at its last token, before the end token. A labeler's ranking of K responses gives up to C(K, 2)
pairs, winner w and loser l, and the loss of one prompt is the mean over its pairs (Eq. 1):

    loss = - 1 / #pairs  sum_{(w, l)} log sigmoid(r_w - r_l),   averaged over the batch's prompts

All pairs of a prompt are one batch element with one forward pass per response: K passes, not
C(K, 2), and each response enters one update an epoch (shuffled pairs overfit within one, 3.5).
Tied pairs are dropped, and the mean is over the pairs that are left (the paper leaves open whether
the divisor counts ties). Where several labelers ranked the same responses, records one after the
other, the pairs of all of them are that batch element. `--shuffle_pairs` is the contrast: each pair
a batch element of its own, so a response comes back in up to K - 1 updates for each labeler. The
paper's one epoch is the default, with a cosine to 10 % of the peak and no dropout; `make demo` has
three labelers rank each prompt and takes two. At the end the head's bias is shifted so that
demonstrations score 0 on average. The learning rate and batch size are the miniature's; the paper's
are in the help.

Names: B rows (all responses of a batch of prompts), T tokens, K responses a prompt. `tokens` (B, T)
is right-padded, `scores` (B,).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from checkpoint import check_tokenizer, find_model
from data.files import BadInput, fingerprint, read_jsonl, run_command, write_atomic
from data.tokenizer import encode_prompt, encode_response, load_tokenizer
from model import GPT, ScalarModel, forward_flops, pad_right
from run import Checkpoints, Log

LOG = ["step", "epoch", "lr", "loss", "accuracy", "margin", "chosen_score", "rejected_score"]
LOG += ["grad_norm", "tokens", "val_loss", "val_accuracy"]
TIMING = ["step", "step_s", "tok_per_s", "mfu", "mem_gib"]
# --preset: GPT-2's sizes on one GPU. Batch and the largest size's rate are the paper's (C.2);
# smaller models take larger rates; none is tuned. Memory: `python -m tests.throughput`.
GPT2 = {
    "device": "cuda",
    "dtype": "bfloat16",
    "batch_size": 64,
    "save_every": 1000,
    "max_prompt_tokens": 512,
    "max_new_tokens": 256,
}
PRESETS = {
    "gpt2": GPT2 | {"lr": 3e-5, "micro_batch_size": 2},
    "gpt2-medium": GPT2 | {"lr": 2e-5, "micro_batch_size": 2},
    "gpt2-large": GPT2 | {"lr": 1.5e-5, "micro_batch_size": 4, "grad_checkpointing": True},
    "gpt2-xl": GPT2 | {"lr": 9e-6, "micro_batch_size": 4, "grad_checkpointing": True},
}


# ------------------------------------------------------------------------------------------------
# Arguments


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="settings for a GPT-2 on one GPU; flags given win")
    add("--data", default="out/data/train/comparisons.jsonl", help="comparisons.jsonl")
    add("--val_data", help="comparisons.jsonl on held-out prompts")
    add("--held_out_data", help="comparisons.jsonl of labelers who gave no training data")
    add("--demonstrations", help="demonstrations.jsonl that are to score 0 on average")
    add("--init", default="out/sft", help="checkpoint folder of the SFT model")
    add("--out", default="out/rm", help="folder of the run")
    # Optimisation.
    add(
        "--epochs",
        type=int,
        default=1,
        help="passes over --data (paper: 1, more overfits; demo: 2)",
    )
    add("--max_steps", type=int, default=0, help="stop after this many steps; 0: after --epochs")
    add("--batch_size", type=int, default=16, help="prompts a step, all responses each (paper: 64)")
    add("--micro_batch_size", type=int, default=0, help="prompts a backward pass; 0: all")
    add(
        "--shuffle_pairs",
        action="store_true",
        help="each pair by itself, in any order; --batch_size then counts pairs (paper: overfits)",
    )
    add("--lr", type=float, default=1e-3, help="peak (paper: 9e-6 for 6B)")
    add("--warmup_steps", type=int, default=0, help="linear warm-up (not in the paper)")
    add("--weight_decay", type=float, default=0.0, help="decoupled, on matrices")
    add("--grad_clip", type=float, default=1.0, help="limit of the gradient's norm; 0: none")
    # Running.
    add("--max_prompt_tokens", type=int, default=96, help="a longer one is dropped (paper: 1000)")
    add("--max_new_tokens", type=int, default=32, help="longer responses are cut (paper: 1000)")
    add("--eval_every", type=int, default=200, help="steps between validations; 0: at the end only")
    add("--save_every", type=int, default=200, help="steps between checkpoints; 0: at the end only")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--resume_changed", action="store_true", help="--resume although settings have changed")
    add(
        "--stop_seconds",
        type=float,
        default=10.0,
        help="after Ctrl-C or SIGTERM, do not wait longer for a step",
    )
    add("--seed", type=int, default=0, help="of all random draws")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    add(
        "--grad_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute blocks again in the backward pass: less memory",
    )
    add("--peak_tflops", type=float, default=0.0, help="of the GPU, for mfu; 0: by its name")
    add("--kernels", type=kernels.implementation, default="auto", help="NAME or OPERATION=NAME")
    # A preset changes the defaults, so that flags win over it and --help shows it.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    parser.set_defaults(**PRESETS.get(first.parse_known_args(argv)[0].preset, {}))
    args = parser.parse_args(argv)

    at_least_one = ["epochs", "batch_size", "max_prompt_tokens", "max_new_tokens"]
    at_least_zero = ["max_steps", "micro_batch_size", "warmup_steps", "save_every", "eval_every"]
    at_least_zero += ["seed", "stop_seconds", "lr", "weight_decay", "grad_clip"]
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name} {value}: expected a finite number")
    for limit, names in ((1, at_least_one), (0, at_least_zero)):
        for name in names:
            if getattr(args, name) < limit:
                parser.error(f"--{name} {getattr(args, name)}: expected at least {limit}")
    for limit, name in ((2**20, "batch_size"), (2**32, "seed")):
        if getattr(args, name) > limit:
            parser.error(f"--{name} {getattr(args, name)}: expected at most {limit}")
    if args.stop_seconds == 0:
        parser.error("--stop_seconds 0: expected over 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU; give --device cpu")
    for name in ("data", "init", "out"):
        if not getattr(args, name):
            parser.error(f"--{name} is empty: expected a path")
    if os.path.realpath(args.out) == os.path.realpath(args.init):
        parser.error(f"--out {args.out} is --init, which it would replace: give another folder")
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    return args


# ------------------------------------------------------------------------------------------------
# Data


@dataclass
class Comparison:
    """One batch element: K responses to a prompt, and the pairs (winner, loser) among them."""

    sequences: list[list[int]]  # prompt and response tokens, K of them
    pairs: list[tuple[int, int]]
    prompt_tokens: int = 0  # how many of them, at the start, all K have in common
    record: int = 0  # its number in the file, from 1


def load_comparisons(path: str, encoding, args: argparse.Namespace) -> list[Comparison]:
    """Rankings as tokens and pairs without ties. Says what was dropped or cut.

    Records one after the other with equal prompt and responses are several labelers' views of the
    same, and become one element with the pairs of all; where they disagree, a pair stands there
    both ways round.
    """
    comparisons, too_long, all_tied, cut, ties, pairs = [], 0, 0, 0, 0, 0

    def ranked(item: tuple[int, dict]) -> tuple:
        return item[1]["prompt"], item[1]["responses"], item[1].get("ended")

    records = enumerate(read_jsonl(path, "comparisons"), start=1)
    for (text, responses, ended), group in groupby(records, key=ranked):
        numbers, views = zip(*group, strict=True)
        prompt = encode_prompt(encoding, text)
        if len(prompt) > args.max_prompt_tokens:
            too_long += 1
            continue
        sequences = []
        for response, end in zip(responses, ended or [True] * len(responses), strict=True):
            response = encode_response(encoding, response, ended=end)
            cut += len(response) > args.max_new_tokens
            sequences.append(prompt + response[: args.max_new_tokens])
        untied = [pair for view in views for pair in untied_pairs(view["ranks"])]
        ties += len(views) * math.comb(len(sequences), 2) - len(untied)
        pairs += len(untied)
        all_tied += not untied
        if untied:
            comparisons.append(Comparison(sequences, untied, len(prompt), numbers[0]))
    print(
        f"{path}: {len(comparisons)} prompts, {pairs} pairs and {ties} ties; dropped {too_long} "
        f"with a prompt over {args.max_prompt_tokens} tokens and {all_tied} with ties only, cut "
        f"{cut} responses over {args.max_new_tokens}"
    )
    if not comparisons:
        raise BadInput(f"{path}: no prompt with a pair that is not tied is left")
    return comparisons


def untied_pairs(ranks: list[int]) -> list[tuple[int, int]]:
    """(winner, loser) for every two responses of different rank; rank 1 is best."""
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i, j in combinations(range(len(ranks)), 2)
        if ranks[i] != ranks[j]
    ]


def one_by_one(groups: list[Comparison]) -> list[Comparison]:
    """Every pair as a batch element of its own: what 3.5 found to overfit within one epoch."""
    return [
        replace(group, sequences=[group.sequences[i] for i in pair], pairs=[(0, 1)])
        for group in groups
        for pair in group.pairs
    ]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """A shuffled pass over the data: indices of each batch, a function of (seed, epoch) alone.

    Neighbourhoods of 8 batches are sorted by length before they are cut, so that little padding is
    computed; the batches are then shuffled again, so that length says nothing about when.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = 8 * batch_size
    order = np.concatenate(
        [
            part[np.argsort(lengths[part], kind="stable")]
            for part in np.split(order, range(pool, len(order), pool))
        ]
    )
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


# ------------------------------------------------------------------------------------------------
# Loss


def rm_loss(scores: Tensor, groups: list[Comparison]) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over prompts of the mean over its pairs of -log sigmoid(r_w - r_l) (Eq. 1).

    scores (B,): those of all responses of `groups`, in order. Returns the sum, and the scores of
    the winner and of the loser of every pair, (#pairs,) each.
    """
    winners, losers, weights, first = [], [], [], 0
    for group in groups:
        winners += [first + winner for winner, _ in group.pairs]
        losers += [first + loser for _, loser in group.pairs]
        weights += [1 / len(group.pairs)] * len(group.pairs)
        first += len(group.sequences)
    chosen, rejected = scores[winners], scores[losers]
    loss = -(scores.new_tensor(weights) * F.logsigmoid(chosen - rejected)).sum()
    return loss, chosen, rejected


def score_all(model: ScalarModel, groups: list[Comparison], args: argparse.Namespace) -> Tensor:
    """One forward pass for each response: scores (B,) of all responses of `groups`, in order.

    The tokens of a prompt are computed once for its K responses.
    """
    sequences = [sequence for group in groups for sequence in group.sequences]
    end, device = model.config.eos_token_id, torch.device(args.device)
    source: list[int] = []  # of each row, the first of its group, which all others share with
    shared: list[int] = []
    for group in groups:
        source += [len(source)] * len(group.sequences)
        shared += [0] + [group.prompt_tokens] * (len(group.sequences) - 1)
    prefixes = torch.tensor(source, device=device), torch.tensor(shared, device=device)
    with autocast(args):
        return model.scores(*pad_right(sequences, end, device), prefixes)


def backward(
    model: ScalarModel, groups: list[Comparison], args: argparse.Namespace
) -> dict[str, float]:
    """Add the gradient of the mean loss over the batch's prompts; return the batch's metrics.

    The divisor is the whole batch's count, so micro-batches of any size give the same gradient.
    """
    total, all_chosen, all_rejected = 0.0, [], []
    for start in range(0, len(groups), args.micro_batch_size):
        part = groups[start : start + args.micro_batch_size]
        loss, chosen, rejected = rm_loss(score_all(model, part, args), part)
        loss = loss / len(groups)
        loss.backward()
        total += loss.item()
        all_chosen.append(chosen.detach())
        all_rejected.append(rejected.detach())
    chosen, rejected = torch.cat(all_chosen), torch.cat(all_rejected)
    return {
        "loss": total,
        "accuracy": correctness(chosen - rejected).mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "chosen_score": chosen.mean().item(),
        "rejected_score": rejected.mean().item(),
    }


def correctness(margins: Tensor) -> Tensor:
    """Of pairs with these margins r_w - r_l: 1 where the winner scores higher, 1/2 if equal."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 computation on float32 weights, or plain float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def learning_rate(step: int, total_steps: int, args: argparse.Namespace) -> float:
    """Of step 1, 2, ...: linear warm-up, then a cosine from the peak to 10 % of it (C.2)."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    progress = (step - 1 - args.warmup_steps) / max(1, total_steps - 1 - args.warmup_steps)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


# ------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    model: ScalarModel, groups: list[Comparison], args: argparse.Namespace
) -> dict[str, float] | None:
    """Loss and, over all pairs, accuracy, margin and calibration; None without comparisons.

    Accuracy is the share of pairs whose winner scores higher, equal scores counting one half.
    calibration_error is the expected calibration error over ten bins of the predicted probability
    p = sigmoid(|margin|): sum over bins of share x |accuracy - mean p|.
    """
    if not groups:
        return None
    model.eval()
    total, margins = 0.0, []
    groups = sorted(groups, key=lambda group: max(map(len, group.sequences)))
    for start in range(0, len(groups), 4 * args.micro_batch_size):
        part = groups[start : start + 4 * args.micro_batch_size]
        loss, chosen, rejected = rm_loss(score_all(model, part, args), part)
        total += loss.item()
        margins.append(chosen - rejected)
    model.train()
    margin = torch.cat(margins).double()
    correct = correctness(margin)
    predicted = torch.sigmoid(margin.abs())
    error = 0.0
    for bin_start in np.arange(0.5, 1.0, 0.05):
        inside = (predicted >= bin_start) & (predicted < bin_start + 0.05 + (bin_start > 0.94))
        if inside.any():
            gap = correct[inside].mean() - predicted[inside].mean()
            error += inside.double().mean().item() * abs(gap.item())
    return {
        "loss": total / len(groups),
        "accuracy": correct.mean().item(),
        "margin": margin.mean().item(),
        "calibration_error": error,
        "prompts": len(groups),
        "pairs": len(margin),
    }


@torch.no_grad()
def center_on_demonstrations(model: ScalarModel, encoding, args: argparse.Namespace) -> float:
    """Shift the head's bias so that demonstrations score 0 on average (3.5); return the shift.

    Those with a prompt over --max_prompt_tokens are left out, responses are cut, as in SFT.
    """
    sequences = []
    for record in read_jsonl(args.demonstrations, "demonstrations"):
        prompt = encode_prompt(encoding, record["prompt"])
        response = encode_response(encoding, record["response"])
        if len(prompt) <= args.max_prompt_tokens:
            sequences.append(prompt + response[: args.max_new_tokens])
    if not sequences:
        raise BadInput(
            f"{args.demonstrations}: no prompt is within --max_prompt_tokens "
            f"{args.max_prompt_tokens}"
        )
    sequences.sort(key=len)
    model.eval()
    scores = []
    for start in range(0, len(sequences), 64):
        batch = Comparison(sequences[start : start + 64], [])
        scores.append(score_all(model, [batch], args))
    shift = torch.cat(scores).mean()
    model.score.bias -= shift
    return shift.item()


# ------------------------------------------------------------------------------------------------
# Guards


def stop_not_finite(out: Path, step: int, values: dict[str, float], records: list[int]) -> int:
    """Say that a step's numbers are not finite, keep its records for a look; the exit code.

    `bad_batch.json` names the step, the values, and the batch's records of --data, from 1.
    """
    seen = {name: str(value) for name, value in values.items()}  # JSON has no nan
    bad_batch = {"step": step, "values": seen, "records": sorted(records)}
    write_atomic(out / "bad_batch.json", json.dumps(bad_batch) + "\n")
    shown = ", ".join(f"{name} {value}" for name, value in seen.items())
    print(
        f"error: step {step}: not finite: {shown}; its records are in {out}/bad_batch.json; the "
        "checkpoints are kept; start over with a lower --lr",
        file=sys.stderr,
    )
    return 1


# ------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    out, device = Path(args.out), torch.device(args.device)
    torch.manual_seed(args.seed)

    # Model: the SFT model under a fresh scalar head, without dropout.
    init = find_model(args.init)
    tokenizer_path = init / "tokenizer.json"
    encoding = load_tokenizer(tokenizer_path)
    sft = GPT.from_pretrained(args.init, impl=args.kernels)
    model = ScalarModel.from_gpt(sft, impl=args.kernels)
    check_tokenizer(model.config, encoding, tokenizer_path)
    model.to(device).train()
    model.trunk.gradient_checkpointing = args.grad_checkpointing
    context = model.config.n_positions
    if args.max_prompt_tokens + args.max_new_tokens > context:
        raise BadInput(
            f"--max_prompt_tokens {args.max_prompt_tokens} and --max_new_tokens "
            f"{args.max_new_tokens} come to more than the context of {context}: lower one"
        )

    # Data: one element is a prompt with its K responses.
    groups = load_comparisons(args.data, encoding, args)
    val_groups = load_comparisons(args.val_data, encoding, args) if args.val_data else []
    held_out = load_comparisons(args.held_out_data, encoding, args) if args.held_out_data else []
    if args.demonstrations:
        read_jsonl(args.demonstrations, "demonstrations")  # bad input shows before the work
    groups = one_by_one(groups) if args.shuffle_pairs else groups
    lengths = np.array([max(map(len, group.sequences)) for group in groups])

    steps_per_epoch = math.ceil(len(groups) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )

    # What decides the run's numbers, for an exact resume; then the newest checkpoint, if any.
    left_out = ("out", "resume", "resume_changed", "save_every", "stop_seconds", "preset")
    left_out += ("peak_tflops",)
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    read = (
        args.data,
        args.val_data,
        args.held_out_data,
        args.demonstrations,
        tokenizer_path,
        init / "model.safetensors",
    )
    settings["sha256"] = {str(path): fingerprint(path) for path in read if path}
    info = {"stage": "rm", "data": [args.data]}
    tokenizer_json = tokenizer_path.read_text(encoding="utf-8")
    checkpoints = Checkpoints(out, settings)

    def restore(state: dict) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    stop: list[int] = []  # Ctrl-C and SIGTERM: finish the step, save, leave; a second one kills

    def on_signal(number: int, _) -> None:
        stop.append(number)
        for either in (signal.SIGINT, signal.SIGTERM):
            signal.signal(either, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, args.stop_seconds)

    def on_alarm(*_) -> None:
        print(
            "stopped by a signal in a long step; --resume goes on at the last checkpoint",
            file=sys.stderr,
        )
        raise SystemExit(128 + stop[0])

    signal.signal(signal.SIGALRM, on_alarm)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    resuming = args.resume or args.resume_changed
    step = checkpoints.resume(restore, args.resume_changed) if resuming else 0
    log = Log(out / "log.csv", LOG, checkpoints.resumed_from)
    timing = Log(out / "timing.csv", TIMING, checkpoints.resumed_from)
    print(
        f"{out.name}: {model.num_parameters:,} parameters, {args.device}, {args.dtype}, "
        f"kernels {kernels.resolve(args.kernels, args.device)}; "
        f"{total_steps} steps of {args.batch_size} {'pairs' if args.shuffle_pairs else 'prompts'}, "
        f"from step {step}"
    )
    peak_flops = args.peak_tflops * 1e12 or kernels.peak_flops(args.device)
    batches, batches_epoch, val = [], -1, None
    while step < total_steps:
        started = time.perf_counter()
        epoch = step // steps_per_epoch
        if epoch != batches_epoch:
            batches = epoch_batches(lengths, args.batch_size, args.seed, epoch)
            batches_epoch = epoch
        batch = [groups[i] for i in batches[step % steps_per_epoch]]
        step += 1
        lr = learning_rate(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        optimizer.zero_grad(set_to_none=True)
        metrics = backward(model, batch, args)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), args.grad_clip or math.inf
        ).item()
        if not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm):
            values = {"loss": metrics["loss"], "grad_norm": grad_norm}
            return stop_not_finite(out, step, values, [group.record for group in batch])
        optimizer.step()
        seconds = time.perf_counter() - started

        # Validate; report; save.
        last = step == total_steps
        looks = last or (args.eval_every and step % args.eval_every == 0)
        val = evaluate(model, val_groups, args) if looks else None
        row = metrics | {
            "step": step,
            "epoch": epoch + 1,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": sum(len(s) for group in batch for s in group.sequences),
            "val_loss": val and val["loss"],
            "val_accuracy": val and val["accuracy"],
        }
        log.write(row)
        kib = 2**10 if sys.platform == "darwin" else 1  # macOS counts in bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 / kib
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        flops = 3 * forward_flops(
            model.config,
            [len(s) for group in batch for s in group.sequences],
            predicted=0,
            repeated=sum((len(g.sequences) - 1) * g.prompt_tokens for g in batch),
        )
        clocks = {
            "step": step,
            "step_s": seconds,
            "tok_per_s": row["tokens"] / seconds,
            "mfu": flops / seconds / peak_flops if peak_flops else None,
            "mem_gib": memory,
        }
        timing.write(clocks)
        if looks or step % 50 == 0:
            shown = [f"{out.name} {step:05d}/{total_steps}", f"lr {lr:.2e}"]
            shown += [f"{k} {row[k]:.3f}" for k in ("loss", "accuracy", "margin")]
            measured = [k for k in ("val_loss", "val_accuracy") if row[k] is not None]
            shown += [f"{k} {row[k]:.3f}" for k in measured]
            shown += [f"tok_per_s {clocks['tok_per_s']:,.0f}", f"mem_gib {memory:.1f}"]
            shown += [f"mfu {clocks['mfu']:.3f}"] if peak_flops else []
            print(" | ".join(shown), flush=True)
        leave = bool(stop)
        if leave:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the step has ended in time
        if leave or last or (args.save_every and step % args.save_every == 0):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(step, model, tokenizer_json, info, state, (log, timing))
        if leave and not last:
            print(f"stopped by a signal after step {step}; --resume goes on", file=sys.stderr)
            return 128 + stop[0]

    # A run that was killed after its last step has not this process's validation.
    report = {
        "val": val or evaluate(model, val_groups, args),
        "held_out": evaluate(model, held_out, args),
    }
    report = {name: result for name, result in report.items() if result}
    for name, result in report.items():
        print(f"{name}: " + " | ".join(f"{k} {v:.4g}" for k, v in result.items()))
    # Demonstrations score 0 from here on; pairs do not notice.
    if args.demonstrations:
        shift = center_on_demonstrations(model, encoding, args)
        print(f"shifted by {-shift:+.3f}: {args.demonstrations} scores 0 on average")
    write_atomic(out / "metrics.json", json.dumps(report, indent=2) + "\n")
    checkpoints.finish(model, tokenizer_json, info | {"metrics": report})
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "--micro_batch_size"))
