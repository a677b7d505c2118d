"""Step 3: reinforcement learning against the reward model with PPO, and PPO-ptx (InstructGPT 3.5).

The objective (Eq. 2) is, over responses y to customer prompts x and pretraining text z,

    E[ r(x, y) - kl_coef log(pi(y | x) / pi_ref(y | x)) ]  +  ptx_coef E[ log pi(z) ]

PPO has ptx_coef 0; with ptx_coef > 0 it is PPO-ptx, the model the paper calls InstructGPT. An
iteration draws prompts, samples a response to each (or several, --responses_per_prompt), scores it
once, charges the KL term token by token, and makes one pass of clipped policy-gradient updates over
random minibatches.

Four models: the policy pi; the reference pi_ref, a frozen copy of its start; the reward model,
frozen; the value network, a copy of the reward model with an optimizer of its own. The C.3 model,
the "RL start", `init` (of --init and out/init) and the reference are one and the same weights. The
result is the exponential moving average of the policy's weights.

Every per-token quantity is (B, T) and indexed by the token it is about. For the row
"p0 p1 | r2 r3 end" (two prompt tokens, a response of three with its end token, then padding):

    t                 0     1     2      3      4      5
    tokens            p0    p1    r2     r3     end    (end)
    response_mask     0     0     1      1      1      0
    logprobs[t]       0     .     log pi(tokens[t] | tokens[:t]): from the hidden state at t - 1
    values[t]         0     .     V before token t: the scalar output at t - 1
    rewards[t]        0     0     -kl    -kl    -kl + score   0       kl = kl_coef * log-ratio[t]
    advantages[t]     0     0     A(2)   A(3)   A(4)   0

From the paper: sampling at temperature 1, no discount, clip 0.2, one inner epoch over 8
minibatches, constant learning rates after a warm-up of 10 iterations from a tenth, EMA 0.992,
pretraining gradients times ptx_coef accumulated before the same optimizer step, value network from
the reward model. The paper is silent on, and the parents decide: lambda 0.95, advantages whitened
over response tokens, clipped value loss (Ziegler et al. 2019), gradient clip 1, no entropy bonus, a
fixed low score where the end token is missing (here --missing_eos_score). The miniature's own:
kl_coef, ptx_coef with a *mean* token cross-entropy (the paper's 27.8 belongs to another scale of
loss and batch), learning rates, sizes; the paper's values are in the help.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from checkpoint import check_tokenizer, find_model
from data.files import BadInput, fingerprint, read_documents, read_jsonl, run_command, write_atomic
from data.tokenizer import decode_response, encode_prompt, load_tokenizer
from generate import store_matrices
from model import GPT, ScalarModel, forward_flops, pad_right
from run import Checkpoints, Log

LOG = ["step", "episodes", "lr", "score", "score_std", "kl", "kl_coef", "reward", "entropy"]
LOG += ["response_len", "eos_frac", "policy_loss", "value_loss", "ptx_loss", "approx_kl"]
LOG += ["clipfrac", "vf_clipfrac", "ratio_max", "explained_variance", "grad_norm"]
LOG += ["value_grad_norm", "check_agreement", "val_score", "val_kl"]
TIMING = ["step", "rollout_s", "score_s", "update_s", "step_s", "tok_per_s", "mfu", "mem_gib"]
# --preset: GPT-2's sizes on one GPU. Batch, minibatches, kl_coef and the value network's rate are
# the paper's, the policy's rates within what it tried (C.4, E.9); none is tuned. Held are policy
# and value network in float32 with gradients and Adam's two moments, their average, and two frozen
# models in bfloat16: about 40 bytes a parameter. More in `python -m tests.throughput`.
GPT2 = {
    "device": "cuda",
    "dtype": "bfloat16",
    "frozen_dtype": "bfloat16",
    "kl_coef": 0.02,
    "batch_size": 512,
    "max_steps": 500,
    "value_lr": 9e-6,
    "ptx_ratio": 1.0,
    "ptx_tokens": 512,
    "max_prompt_tokens": 512,
    "max_new_tokens": 256,
    "eval_every": 50,
    "save_every": 100,
}
PRESETS = {
    "gpt2": GPT2 | {"lr": 1.5e-5, "micro_batch_size": 8, "rollout_size": 128},
    "gpt2-medium": GPT2 | {"lr": 1e-5, "micro_batch_size": 4, "rollout_size": 64},
    "gpt2-large": GPT2
    | {"lr": 8e-6, "micro_batch_size": 16, "rollout_size": 64, "grad_checkpointing": True},
    "gpt2-xl": GPT2
    | {"lr": 5e-6, "micro_batch_size": 8, "rollout_size": 64, "grad_checkpointing": True},
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
    add("--data", default="out/data/train/ppo_prompts.jsonl", help="prompts.jsonl of customers")
    add("--val_data", help="prompts.jsonl for val_score and val_kl of the averaged weights")
    add("--pretrain_data", help="pretrain.txt; needed with --ptx_coef over 0")
    add("--init", default="out/init", help="checkpoint folder: the policy's start and reference")
    add("--reward_model", default="out/rm", help="checkpoint folder of train_rm.py")
    add("--check_model", help="a second reward model, only to be compared with the first")
    add("--out", default="out/ppo", help="folder of the run")
    # The objective.
    add("--kl_coef", type=float, default=0.2, help="beta of Eq. 2 (paper: 0.02)")
    add("--ptx_coef", type=float, default=0.0, help="gamma of Eq. 2; 0: PPO (paper: 27.8)")
    add("--ptx_ratio", type=float, default=0.5, help="pretraining sequences an episode (paper: 8)")
    add("--ptx_tokens", type=int, default=128, help="tokens a pretraining sequence (paper: 2048)")
    add(
        "--ptx_anywhere",
        type=float,
        default=0.25,
        help="share of these cut anywhere; others start at documents (paper: 1)",
    )
    add("--missing_eos_score", type=float, default=-4.0, help="score of a response without end")
    add("--gamma", type=float, default=1.0, help="discount (paper: none)")
    add("--lam", type=float, default=0.95, help="lambda of GAE (not in the paper)")
    add("--cliprange", type=float, default=0.2, help="of the policy's ratio (paper: 0.2)")
    add("--cliprange_value", type=float, default=0.2, help="of the value (Ziegler: 0.2)")
    add("--entropy_coef", type=float, default=0.0, help="entropy bonus (paper: none)")
    add("--temperature", type=float, default=1.0, help="of sampling and log-probs (paper: 1)")
    # Optimisation.
    add("--epochs", type=int, default=2, help="passes over the prompts, where --max_steps is 0")
    add("--max_steps", type=int, default=60, help="iterations; 0: by --epochs (paper: 500)")
    add("--batch_size", type=int, default=128, help="episodes an iteration (paper: 512)")
    add(
        "--responses_per_prompt",
        type=int,
        default=1,
        help="episodes of a prompt, in one minibatch (paper: 1)",
    )
    add("--num_minibatches", type=int, default=8, help="updates an iteration (paper: 8)")
    add("--micro_batch_size", type=int, default=8, help="sequences a forward pass; 0: a minibatch")
    add("--rollout_size", type=int, default=0, help="responses sampled at once; 0: all")
    add("--inner_epochs", type=int, default=1, help="passes over an iteration's batch (paper: 1)")
    add("--lr", type=float, default=6e-4, help="of the policy (paper tried 2.55e-6 to 2.55e-5)")
    add("--value_lr", type=float, default=5e-4, help="of the value network (paper: 9e-6)")
    add("--warmup_steps", type=int, default=10, help="iterations from a tenth of lr (paper: 10)")
    add("--grad_clip", type=float, default=1.0, help="limit of each gradient's norm; 0: none")
    add("--ema", type=float, default=0.992, help="decay of the average, per update (paper: .992)")
    # Warnings.
    add("--kl_limit", type=float, default=10.0, help="warn when kl is over it, in nats")
    add("--agreement_limit", type=float, default=0.5, help="warn when check_agreement is under it")
    # Running.
    add("--max_prompt_tokens", type=int, default=96, help="a longer one is dropped (paper: 1000)")
    add("--max_new_tokens", type=int, default=32, help="limit of a response (paper: 1000)")
    add("--eval_every", type=int, default=20, help="iterations between validations; 0: at the end")
    add("--save_every", type=int, default=20, help="iterations between checkpoints; 0: at the end")
    add(
        "--keep_every",
        type=int,
        default=0,
        help="keep the averaged model of every so many iterations under OUT/steps/; 0: none",
    )
    add("--print_samples", type=int, default=2, help="samples shown at each validation")
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
        "--frozen_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of reference and reward model; bfloat16 only with --dtype bfloat16",
    )
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
    at_least_one += ["num_minibatches", "responses_per_prompt", "inner_epochs", "ptx_tokens"]
    at_least_zero = ["max_steps", "micro_batch_size", "warmup_steps", "save_every", "eval_every"]
    at_least_zero += ["seed", "stop_seconds", "lr", "value_lr", "grad_clip", "kl_coef", "ptx_coef"]
    at_least_zero += ["cliprange", "cliprange_value", "entropy_coef", "print_samples"]
    at_least_zero += ["rollout_size", "keep_every"]
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
    for name in ("data", "init", "reward_model", "out"):
        if not getattr(args, name):
            parser.error(f"--{name} is empty: expected a path")
    if args.frozen_dtype == "bfloat16" and args.dtype != "bfloat16":
        parser.error("--frozen_dtype bfloat16 needs --dtype bfloat16; give --frozen_dtype float32")
    for name in ("init", "reward_model", "check_model"):
        folder = getattr(args, name)
        if folder and os.path.realpath(args.out) == os.path.realpath(folder):
            parser.error(f"--out {args.out} is --{name}, which it would replace: give another")
    if args.ptx_coef and not args.pretrain_data:
        parser.error("--ptx_coef over 0 needs --pretrain_data")
    if args.ptx_coef and args.ptx_tokens < 2:
        parser.error(f"--ptx_tokens {args.ptx_tokens}: expected at least 2")
    if args.ptx_coef and round(args.ptx_ratio * args.batch_size / args.num_minibatches) < 1:
        parser.error(
            f"--ptx_ratio {args.ptx_ratio}: leaves no pretraining sequence for an update; raise it"
        )
    if args.batch_size % args.num_minibatches:
        parser.error(
            f"--batch_size {args.batch_size} is not a multiple of --num_minibatches "
            f"{args.num_minibatches}: change either"
        )
    for name in ("gamma", "lam", "ema", "ptx_anywhere"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 to 1")
    if args.temperature <= 0:
        parser.error(f"--temperature {args.temperature}: expected over 0")
    args.minibatch_size = args.batch_size // args.num_minibatches
    sizes = {
        "--batch_size / --num_minibatches": args.minibatch_size,
        "--micro_batch_size": args.micro_batch_size,
        "--rollout_size": args.rollout_size,
    }
    for what, size in sizes.items():
        if size % args.responses_per_prompt:
            parser.error(
                f"--responses_per_prompt {args.responses_per_prompt} does not divide {what}, "
                f"{size}: change either"
            )
    return args


# ------------------------------------------------------------------------------------------------
# Data


def load_prompts(
    path: str, encoding, args: argparse.Namespace
) -> tuple[list[list[int]], list[int]]:
    """Prompts as tokens, and the record, from 1, of each. Says what was dropped."""
    prompts, records, dropped = [], [], 0
    for number, record in enumerate(read_jsonl(path, "prompts"), start=1):
        prompt = encode_prompt(encoding, record["prompt"])
        if len(prompt) > args.max_prompt_tokens:
            dropped += 1
            continue
        prompts.append(prompt)
        records.append(number)
    print(f"{path}: {len(prompts)} prompts; dropped {dropped} over {args.max_prompt_tokens} tokens")
    if not prompts:
        raise BadInput(f"{path}: no prompt is within --max_prompt_tokens {args.max_prompt_tokens}")
    return prompts, records


def load_pretraining(path: str, encoding, length: int) -> tuple[Tensor, Tensor]:
    """Documents joined by the end token, (M,) int64, and where sequences of it may start, (N,).

    Starts are where a document does, and in a long one every `length` tokens; a sequence runs on
    into what follows. `draw_pretraining` draws among the starts.
    """
    stream: list[int] = []
    starts: list[int] = []
    for document in read_documents(path):
        tokens = [*encoding.encode_ordinary(document), encoding.eot_token]
        starts += range(len(stream), len(stream) + len(tokens), length)
        stream += tokens
    if len(stream) < length:
        raise BadInput(f"{path}: {len(stream)} tokens, fewer than --ptx_tokens {length}")
    return torch.tensor(stream), torch.tensor([s for s in starts if s + length <= len(stream)])


def draw_pretraining(
    stream: Tensor,
    starts: Tensor,
    count: int,
    number: int,
    args: argparse.Namespace,
    rng: np.random.Generator,
) -> Tensor:
    """Pretraining sequences (count, ptx_tokens), a share `ptx_anywhere` of them cut anywhere.

    `number` = 0, 1, ... is the update's place in the run: what an update's share leaves of a whole
    sequence is carried over to the next,

        round(ptx_anywhere count (number + 1)) - round(ptx_anywhere count number)  cut anywhere.

    Each of the others is the one that starts at, or last before, a random token: documents count by
    their length. A prompt stands at a sequence's start, and what the model does there PPO changes
    most, so that is where beginnings are needed; but with them alone, how to go on from the middle
    of a text is lost.
    """
    length = args.ptx_tokens
    places = torch.from_numpy(rng.integers(int(starts[-1]) + 1, size=count))
    first = starts[torch.searchsorted(starts, places, right=True) - 1]
    share = args.ptx_anywhere * count
    anywhere = round(share * (number + 1)) - round(share * number)
    first = torch.where(torch.arange(count) < anywhere, places, first)
    return stream[first[:, None] + torch.arange(length)]


def prompts_of_step(num_prompts: int, step: int, args: argparse.Namespace) -> list[int]:
    """Indices of iteration `step` = 1, 2, ...: shuffled passes, a function of (seed, step)."""
    count = args.batch_size // args.responses_per_prompt
    first = (step - 1) * count
    chosen = []
    for place in range(first, first + count):
        epoch, offset = divmod(place, num_prompts)
        if not chosen or offset == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(num_prompts)
        chosen.append(int(order[offset]))
    return chosen


# ------------------------------------------------------------------------------------------------
# Rollout: sample, score, and compute advantages


@dataclass
class Minibatch:
    """Episodes of an update: (B, T); lengths, prompt_lengths, both scores and ended are (B,)."""

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    response_mask: Tensor
    logprobs: Tensor  # of the policy that sampled
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    check_scores: Tensor | None  # of --check_model
    ended: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def response_mask_of(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """1 for response tokens, the first end token included: (B, T) bool."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return (places >= prompt_lengths[:, None]) & (places < lengths[:, None])


def shared_prompts(
    prompt_lengths: Tensor, args: argparse.Namespace
) -> tuple[Tensor, Tensor] | None:
    """What the rows of a micro-batch have in common, as `prefixes` of `GPT.forward`: (source row,
    number of tokens shared with it), (B,) each. Every --responses_per_prompt rows have one prompt:
    the first of them shares nothing, the others their prompt with the first."""
    if args.responses_per_prompt == 1:
        return None
    rows = torch.arange(len(prompt_lengths), device=prompt_lengths.device)
    first = rows // args.responses_per_prompt * args.responses_per_prompt
    return first, torch.where(rows == first, 0, prompt_lengths)


def values_before(
    value_network: ScalarModel,
    tokens: Tensor,
    lengths: Tensor,
    prefixes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """V of the state before each token: values[:, t] is the scalar output at t - 1; 0 at t = 0."""
    longest = int(lengths.max())  # of these rows: the rest is padding
    outputs = value_network(tokens[:, :longest], lengths, prefixes)
    return F.pad(outputs[:, :-1], (1, tokens.shape[1] - longest))


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    lengths: Tensor,
    kl_coef: float,
) -> Tensor:
    """Per-token rewards (Eq. 2): -kl_coef log(pi / pi_ref) of each response token, end token
    included, and the response's score on the last of them. Returns (B, T)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, lengths.long() - 1] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), 0 outside the response:

        delta_t = r_t + gamma V_{t+1} - V_t,     A_t = delta_t + gamma lam A_{t+1}

    with V = A = 0 after a row's last response token: the episode is over there.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(inside, delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(inside, values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages


def whiten(minibatches: list[Minibatch]) -> None:
    """Give the advantages of the iteration's response tokens mean 0 and standard deviation 1."""
    everything = torch.cat([mb.advantages[mb.response_mask] for mb in minibatches])
    mean, std = everything.mean(), everything.std(correction=0)
    for mb in minibatches:
        mb.advantages = (mb.advantages - mean) / (std + 1e-8) * mb.response_mask


@torch.no_grad()
def sample(
    policy: GPT,
    prompts: list[list[int]],
    seed: int,
    args: argparse.Namespace,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """--responses_per_prompt R responses to each prompt, B in all, those to a prompt in a row:
    tokens (B, T), prompt_lengths (B,), lengths (B,).

    With --rollout_size, so many at a time, those with prompts of like length together.
    """
    device, end = torch.device(args.device), policy.config.eos_token_id
    R = args.responses_per_prompt
    generator = torch.Generator(device).manual_seed(seed)
    padded, prompt_lengths = pad_right(prompts, end, device)
    tokens = F.pad(padded, (0, args.max_new_tokens), value=end).repeat_interleave(R, dim=0)
    lengths = torch.empty(len(tokens), dtype=torch.int32, device=device)
    order = torch.arange(len(prompts), device=device)
    if args.rollout_size:
        order = prompt_lengths.argsort(stable=True)
    for places in order.split(args.rollout_size // R or len(prompts)):
        rows = rows_of_prompts(places, R)
        width = int(prompt_lengths[places].max())
        with autocast(args):
            part, lengths[rows] = policy.generate(
                padded[places, :width],
                prompt_lengths[places],
                args.max_new_tokens,
                temperature=temperature,
                generator=generator,
                repeats=torch.full_like(places, R) if R > 1 else None,
            )
        tokens[rows, : part.shape[1]] = part
    return tokens, prompt_lengths.repeat_interleave(R), lengths


def rows_of_prompts(places: Tensor, R: int) -> Tensor:
    """Of the prompts at places c, d, ... of a batch, the rows c R, ..., c R + R - 1, d R, ..."""
    return (places[:, None] * R + torch.arange(R, device=places.device)).flatten()


def draw_minibatches(
    lengths: Tensor, rng: np.random.Generator, args: argparse.Namespace
) -> list[tuple[Tensor, Tensor]]:
    """An iteration's minibatches: of each, the places of its prompts in the batch, and their rows.

    Which prompts are in one is random; there those with responses of like length (the longest of a
    prompt's counts) stand together, so that little padding is attended to.
    """
    R = args.responses_per_prompt
    longest = lengths.view(-1, R).amax(dim=1)
    order = torch.from_numpy(rng.permutation(len(longest))).to(lengths.device)
    drawn = []
    for places in order.split(args.minibatch_size // R):
        places = places[longest[places].argsort(stable=True)]
        drawn.append((places, rows_of_prompts(places, R)))
    return drawn


@torch.no_grad()
def score(
    tokens: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
    models: dict[str, torch.nn.Module],
    args: argparse.Namespace,
) -> Minibatch:
    """Everything about a minibatch that is fixed while the policy is updated.

    The log-probs of the policy are recomputed here by the forward pass that training uses, on the
    very tensors of the minibatch: so the ratio of the first update is exactly 1.
    """
    tokens = tokens[:, : int(lengths.max())]
    mask = response_mask_of(tokens, prompt_lengths, lengths)
    micros = micro_batches(len(tokens), args)
    shared = [shared_prompts(prompt_lengths[rows], args) for rows in micros]
    parts = [
        (tokens[rows, : int(lengths[rows].max())], lengths[rows], prefixes)
        for rows, prefixes in zip(micros, shared, strict=True)
    ]
    with autocast(args):
        given = tokens, lengths, prompt_lengths, mask
        logprobs, entropy = policy_logprobs(models["policy"], *given, args)
        ref_logprobs, _ = policy_logprobs(models["reference"], *given, args)
        scores = torch.cat([models["reward_model"].scores(*part) for part in parts])
        check_scores = None
        if "check_model" in models:
            check_scores = torch.cat([models["check_model"].scores(*part) for part in parts])
        values = [
            values_before(models["value_network"], tokens[rows], lengths[rows], prefixes)
            for rows, prefixes in zip(micros, shared, strict=True)
        ]
        values = torch.cat(values) * mask
    last = tokens.gather(1, lengths[:, None].long() - 1).squeeze(1)
    ended = last == models["policy"].config.eos_token_id
    scores = torch.where(ended, scores, args.missing_eos_score)
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, lengths, args.kl_coef)
    advantages = gae(rewards, values, mask, args.gamma, args.lam)
    return Minibatch(
        tokens,
        lengths,
        prompt_lengths,
        mask,
        logprobs,
        ref_logprobs,
        entropy,
        values,
        scores,
        check_scores,
        ended,
        rewards,
        advantages,
        returns=advantages + values,
    )


def policy_logprobs(
    model: GPT,
    tokens: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
    mask: Tensor,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens, micro-batch by micro-batch: (B, T) each.

    The same cut into micro-batches as in the update, or the first ratio would not be exactly 1.
    """
    parts = [
        response_logprobs(
            model, tokens[rows], lengths[rows], prompt_lengths[rows], mask[rows], args
        )
        for rows in micro_batches(len(tokens), args)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def response_logprobs(
    model: GPT,
    tokens: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
    mask: Tensor,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the masked tokens of one micro-batch: (B, T) each."""
    longest = int(lengths.max())  # of these rows: the rest is padding
    logprobs, entropy = model.logprobs(
        tokens[:, :longest],
        lengths,
        mask=mask[:, :longest],
        temperature=args.temperature,
        prefixes=shared_prompts(prompt_lengths, args),
    )
    padding = (0, tokens.shape[1] - longest)
    return F.pad(logprobs, padding), F.pad(entropy, padding)


def micro_batches(num_rows: int, args: argparse.Namespace) -> list[slice]:
    size = args.micro_batch_size or args.minibatch_size
    return [slice(start, start + size) for start in range(0, num_rows, size)]


# ------------------------------------------------------------------------------------------------
# Loss


def policy_loss(
    new_logprobs: Tensor, mb: Minibatch, rows: slice, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (Schulman et al. 2017), summed over response tokens:

        -min(ratio A, clip(ratio, 1 - cliprange, 1 + cliprange) A),   ratio = pi_new / pi_old

    and sums over the same tokens of what the log reports.
    """
    mask, advantages = mb.response_mask[rows], mb.advantages[rows]
    log_ratio = torch.where(mask, new_logprobs - mb.logprobs[rows], 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = -torch.min(ratio * advantages, clipped * advantages) * mask
    with torch.no_grad():
        metrics = {
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(),  # k3: KL(old || new), in nats
            "clipfrac": (((ratio - 1).abs() > cliprange) & mask).float().sum(),
            "ratio_max": ratio.max(),
        }
    return loss.sum(), metrics


def value_loss(
    values: Tensor, mb: Minibatch, rows: slice, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error against the returns, the larger of plain and clipped (Ziegler et al.
    2019), summed over response tokens; and the number of tokens where the clipped one is larger."""
    mask, old, returns = mb.response_mask[rows], mb.values[rows], mb.returns[rows]
    clipped = old + (values - old).clamp(-cliprange_value, cliprange_value)
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * (torch.max(plain_error, clipped_error) * mask).sum()
    return loss, ((clipped_error > plain_error) & mask).float().sum()


def ptx_backward(policy: GPT, sequences: Tensor, args: argparse.Namespace) -> float:
    """Add ptx_coef x (mean of -log p per pretraining token) to the gradients; return the mean."""
    total, counted = 0.0, sequences.numel() - len(sequences)  # a first token has no context
    for rows in micro_batches(len(sequences), args):
        with autocast(args):
            logprobs, _ = policy.logprobs(sequences[rows])
        loss = -logprobs.sum() / counted
        (args.ptx_coef * loss).backward()
        total += loss.item()
    return total


def update(
    mb: Minibatch,
    models: dict[str, torch.nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    ptx_sequences: Tensor | None,
    args: argparse.Namespace,
) -> dict[str, float]:
    """One optimizer step of policy and value network on a minibatch; returns its metrics.

    Losses are means over the minibatch's response tokens, whatever the micro-batches.
    """
    policy, value_network = models["policy"], models["value_network"]
    counted = mb.response_mask.sum()
    sums: dict[str, float] = dict.fromkeys(
        ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "vf_clipfrac"), 0.0
    )
    ratio_max = 0.0
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    for rows in micro_batches(len(mb.tokens), args):
        tokens, lengths, prompt_lengths = mb.tokens[rows], mb.lengths[rows], mb.prompt_lengths[rows]
        with autocast(args):
            new_logprobs, entropy = response_logprobs(
                policy, tokens, lengths, prompt_lengths, mb.response_mask[rows], args
            )
        loss, metrics = policy_loss(new_logprobs, mb, rows, args.cliprange)
        total = loss - args.entropy_coef * entropy.sum() if args.entropy_coef else loss
        (total / counted).backward()

        with autocast(args):
            prefixes = shared_prompts(prompt_lengths, args)
            values = values_before(value_network, tokens, lengths, prefixes)
        vf_loss, vf_clipped = value_loss(values, mb, rows, args.cliprange_value)
        (vf_loss / counted).backward()

        ratio_max = max(ratio_max, metrics.pop("ratio_max").item())
        metrics |= {"policy_loss": loss, "value_loss": vf_loss, "vf_clipfrac": vf_clipped}
        for name, value in (metrics | {"entropy": entropy.sum()}).items():
            sums[name] += value.item() / counted.item()
    # C.4: pretraining gradients go into the same buffers, before the same optimizer step.
    ptx_loss = ptx_backward(policy, ptx_sequences, args) if ptx_sequences is not None else None
    norms = {
        name: torch.nn.utils.clip_grad_norm_(
            models[name].parameters(), args.grad_clip or math.inf
        ).item()
        for name in optimizers
    }
    if all(math.isfinite(norm) for norm in norms.values()):
        for optimizer in optimizers.values():
            optimizer.step()
    return sums | {
        "ratio_max": ratio_max,
        "ptx_loss": ptx_loss,
        "grad_norm": norms["policy"],
        "value_grad_norm": norms["value_network"],
    }


@torch.no_grad()
def update_ema(ema: GPT, policy: GPT, decay: float) -> None:
    """ema <- decay ema + (1 - decay) policy."""
    for average, parameter in zip(ema.parameters(), policy.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 computation on float32 weights, or plain float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def learning_rate_factor(step: int, args: argparse.Namespace) -> float:
    """Of iteration 1, 2, ...: from a tenth to 1 over the warm-up, then constant (C.4)."""
    return min(1.0, 0.1 + 0.9 * (step - 1) / args.warmup_steps) if args.warmup_steps else 1.0


# ------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    policy: GPT,
    prompts: list[list[int]],
    models: dict[str, torch.nn.Module],
    encoding,
    args: argparse.Namespace,
) -> dict[str, float] | None:
    """Mean score and KL to the reference of `policy` on validation prompts, and a few samples.

    The same random numbers each time, so that differences are the policy's; other ones for each
    batch of prompts.
    """
    if not prompts:
        return None
    args = argparse.Namespace(**vars(args) | {"responses_per_prompt": 1})
    scores, kls, shown = [], [], []
    for start in range(0, len(prompts), args.batch_size):
        part = prompts[start : start + args.batch_size]
        seed = int(np.random.default_rng([args.seed, 2, start]).integers(2**62))
        tokens, prompt_lengths, lengths = sample(policy, part, seed, args, args.temperature)
        mb = score(tokens, lengths, prompt_lengths, models | {"policy": policy}, args)
        scores.append(mb.scores)
        kls.append((mb.logprobs - mb.ref_logprobs).sum(1))
        for row in range(min(len(part), args.print_samples - len(shown))):
            length, first = int(lengths[row]), int(prompt_lengths[row])
            prompt = encoding.decode(part[row]).strip()
            response = decode_response(encoding, tokens[row, first:length].tolist())
            shown.append(
                f"    score {mb.scores[row]:+.2f} | kl {kls[-1][row]:.2f} | {prompt!r} -> "
                f"{response!r}{'' if mb.ended[row] else ' (cut)'}"
            )
    print("\n".join(shown), flush=True)
    return {"val_score": torch.cat(scores).mean().item(), "val_kl": torch.cat(kls).mean().item()}


def iteration_flops(
    models: dict[str, torch.nn.Module],
    lengths: list[int],
    new_tokens: int,
    num_ptx: int,
    args: argparse.Namespace,
) -> float:
    """Operations of an iteration: each row once through every model in scoring, once more through
    the policy in sampling, and three times (forward and backward) through what is trained, in each
    inner epoch; and the pretraining sequences. The language models' heads see response tokens; of
    the prompts' tokens all but one in --responses_per_prompt go through attention only."""
    trained = 3 * args.inner_epochs
    times = {"policy": 2 + trained, "value_network": 1 + trained}
    repeated = (sum(lengths) - new_tokens) * (1 - 1 / args.responses_per_prompt)
    flops = 0.0
    for name, model in models.items():
        predicted = new_tokens if isinstance(model, GPT) else 0
        flops += times.get(name, 1) * forward_flops(model.config, lengths, predicted, repeated)
    ptx = forward_flops(models["policy"].config, [args.ptx_tokens], args.ptx_tokens - 1)
    return flops + 3 * num_ptx * ptx


def rollout_metrics(minibatches: list[Minibatch]) -> dict[str, float]:
    """What the iteration's episodes were like; KL and reward in nats and score units a response."""
    scores = torch.cat([mb.scores for mb in minibatches])
    kl = torch.cat([(mb.logprobs - mb.ref_logprobs).sum(1) for mb in minibatches])
    reward = torch.cat([mb.rewards.sum(1) for mb in minibatches])
    returns = torch.cat([mb.returns[mb.response_mask] for mb in minibatches])
    values = torch.cat([mb.values[mb.response_mask] for mb in minibatches])
    entropy = torch.cat([mb.entropy[mb.response_mask] for mb in minibatches])
    lengths = torch.cat([mb.response_mask.sum(1) for mb in minibatches])
    unexplained = (returns - values).var(correction=0)
    agreement = None
    if minibatches[0].check_scores is not None:
        check_scores = torch.cat([mb.check_scores for mb in minibatches])
        ended = torch.cat([mb.ended for mb in minibatches])
        if ended.sum() > 1:
            both = torch.stack((scores, check_scores))[:, ended]
            if both.std(dim=1).min() != 0:
                agreement = torch.corrcoef(both)[0, 1].item()
    return {
        "score": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
        "kl": kl.mean().item(),
        "reward": reward.mean().item(),
        "entropy": entropy.mean().item(),
        "response_len": lengths.float().mean().item(),
        "eos_frac": torch.cat([mb.ended for mb in minibatches]).float().mean().item(),
        "explained_variance": (1 - unexplained / returns.var(correction=0).clamp(min=1e-8)).item(),
        "check_agreement": agreement,
    }


# ------------------------------------------------------------------------------------------------
# Guards


def not_finite(metrics: dict[str, float | None]) -> dict[str, float]:
    """Those of the metrics that are NaN or infinite."""
    return {k: v for k, v in metrics.items() if v is not None and not math.isfinite(v)}


def first_not_finite(
    minibatches: list[Minibatch], updates: list[dict[str, float]]
) -> tuple[str, int, dict[str, float]]:
    """Where a number first is not finite: "rollout" or "update", the minibatch's place, the values.

    Advantages are whitened over all minibatches, so that one bad score spoils them all: the scores,
    log-probs and values of each minibatch are looked at before any update is blamed.
    """
    for place, mb in enumerate(minibatches):
        if bad := not_finite(rollout_metrics([mb])):
            return "rollout", place, bad
    for number, metrics in enumerate(updates):
        if bad := not_finite(metrics):
            return "update", number % len(minibatches), bad
    return "rollout", 0, not_finite(rollout_metrics(minibatches))  # their means alone overflow


def stop_not_finite(
    out: Path, step: int, phase: str, place: int, values: dict[str, float], records: list[int]
) -> int:
    """Say that a minibatch's numbers are not finite, keep its records for a look; the exit code.

    `bad_batch.json` names the iteration, whether the numbers are of its rollout or of an update,
    the minibatch, from 1, the values, and the minibatch's records of --data, from 1.
    """
    seen = {name: str(value) for name, value in values.items()}  # JSON has no nan
    bad_batch = {"step": step, "phase": phase, "minibatch": place + 1, "values": seen}
    bad_batch["records"] = sorted(records)
    write_atomic(out / "bad_batch.json", json.dumps(bad_batch) + "\n")
    shown = ", ".join(f"{name} {value}" for name, value in seen.items())
    print(
        f"error: iteration {step}: not finite: {shown} ({phase}, minibatch {place + 1}); its "
        f"records are in {out}/bad_batch.json; "
        "checkpoints are kept; start over with a lower --lr or --value_lr",
        file=sys.stderr,
    )
    return 1


def warn(step: int, row: dict[str, float], warned: set[str], args: argparse.Namespace) -> set[str]:
    """Warn about an iteration that looks wrong, of each kind once; the kinds seen now."""
    agreement = row["check_agreement"]
    seen = {}
    if row["kl"] > args.kl_limit:
        seen["kl"] = (
            f"KL {row['kl']:.1f} nats a response is over --kl_limit {args.kl_limit:g}: the policy "
            "is far from where its reward model was trained; raise --kl_coef or stop earlier"
        )
    if agreement is not None and agreement < args.agreement_limit:
        seen["agreement"] = (
            f"the two reward models' scores correlate by {agreement:.2f}, under --agreement_limit "
            f"{args.agreement_limit:g}: what is learned may be the first one's mistakes; raise "
            "--kl_coef or stop earlier"
        )
    if row["eos_frac"] == 0:
        seen["eos"] = (
            f"no response ended within --max_new_tokens {args.max_new_tokens}, so all score "
            f"--missing_eos_score {args.missing_eos_score:g}: raise --max_new_tokens, or give an "
            "--init that ends its responses"
        )
    for kind, message in seen.items():
        if kind not in warned:
            print(f"warning: iteration {step}: {message}", file=sys.stderr)
    return set(seen)


# ------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    out, device = Path(args.out), torch.device(args.device)
    torch.manual_seed(args.seed)

    # Models. No dropout anywhere in RL: it would make old and new log-probs differ.
    init = find_model(args.init)
    tokenizer_path = init / "tokenizer.json"
    encoding = load_tokenizer(tokenizer_path)
    policy = GPT.from_pretrained(args.init, impl=args.kernels).to(device)
    check_tokenizer(policy.config, encoding, tokenizer_path)
    models: dict[str, torch.nn.Module] = {"policy": policy, "reference": copy.deepcopy(policy)}
    context = policy.config.n_positions
    if args.ptx_coef and args.ptx_tokens > context:
        raise BadInput(f"--ptx_tokens {args.ptx_tokens} is over the policy's context of {context}")
    for name, folder in (("reward_model", args.reward_model), ("check_model", args.check_model)):
        if not folder:
            continue
        scalar = ScalarModel.from_pretrained(folder, impl=args.kernels).to(device)
        own_tokenizer = Path(folder) / "tokenizer.json"
        check_tokenizer(scalar.config, encoding, own_tokenizer)
        if own_tokenizer.read_bytes() != tokenizer_path.read_bytes():
            raise BadInput(
                f"{own_tokenizer} differs from {tokenizer_path}: policy and reward model must "
                "share a tokenizer; give models that grew from one base model"
            )
        models[name] = scalar
        context = min(context, scalar.config.n_positions)
    models["value_network"] = copy.deepcopy(models["reward_model"])
    ema = copy.deepcopy(policy)
    for model in (*models.values(), ema):
        model.eval()
    for name in ("reference", "reward_model", "check_model"):
        if name in models:
            models[name].requires_grad_(False)
            if args.frozen_dtype == "bfloat16":  # as autocast would cast them: KL starts at 0
                store_matrices(models[name], torch.bfloat16)
    for trunk in (policy, models["value_network"].trunk):
        trunk.gradient_checkpointing = args.grad_checkpointing
    ema.requires_grad_(False)
    if args.max_prompt_tokens + args.max_new_tokens > context:
        raise BadInput(
            f"--max_prompt_tokens {args.max_prompt_tokens} and --max_new_tokens "
            f"{args.max_new_tokens} come to more than the context of {context}: lower one"
        )

    # Data.
    prompts, records = load_prompts(args.data, encoding, args)
    val_prompts: list[list[int]] = []
    if args.val_data:
        val_prompts, _ = load_prompts(args.val_data, encoding, args)
    stream, starts = None, torch.empty(0)
    if args.ptx_coef:
        stream, starts = load_pretraining(args.pretrain_data, encoding, args.ptx_tokens)
    num_ptx = round(args.ptx_ratio * args.minibatch_size)  # sequences an update

    episodes = args.epochs * len(prompts) * args.responses_per_prompt
    total_steps = args.max_steps or max(1, episodes // args.batch_size)
    adam = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "policy": torch.optim.AdamW(policy.parameters(), lr=args.lr, **adam),
        "value_network": torch.optim.AdamW(
            models["value_network"].parameters(), lr=args.value_lr, **adam
        ),
    }
    peak = {"policy": args.lr, "value_network": args.value_lr}

    # What decides the run's numbers, for an exact resume; then the newest checkpoint, if any.
    left_out = ("out", "resume", "resume_changed", "save_every", "stop_seconds", "minibatch_size")
    left_out += ("keep_every", "preset", "peak_tflops")
    left_out += ("print_samples", "kl_limit", "agreement_limit")  # print or warn
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    read = (
        args.data,
        args.pretrain_data,
        args.val_data,
        tokenizer_path,
        init / "model.safetensors",
        Path(args.reward_model, "model.safetensors"),
        args.check_model and Path(args.check_model, "model.safetensors"),
    )
    settings["sha256"] = {str(path): fingerprint(path) for path in read if path}
    data = [args.data, *([args.pretrain_data] if args.ptx_coef else [])]
    info = {"stage": "ppo", "data": data, "reference": args.init}
    tokenizer_json = tokenizer_path.read_text(encoding="utf-8")
    checkpoints = Checkpoints(out, settings)

    warned: set[str] = set()  # kinds of warnings that were given

    def restore(state: dict) -> None:
        warned.update(state.get("warned", ()))
        policy.load_state_dict(state["policy"])
        models["value_network"].load_state_dict(state["value_network"])
        ema.load_state_dict(state["ema"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])

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
        f"{out.name}: policy {policy.num_parameters:,} and reward model "
        f"{models['reward_model'].num_parameters:,} parameters, {args.device}, {args.dtype}, "
        f"kernels {kernels.resolve(args.kernels, args.device)}; "
        f"{total_steps} iterations of {args.batch_size} episodes, from {step}"
    )
    peak_flops = args.peak_tflops * 1e12 or kernels.peak_flops(args.device)
    while step < total_steps:
        started = time.perf_counter()
        step += 1
        rng = np.random.default_rng([args.seed, 1, step])  # all draws of a step: see Checkpoints
        factor = learning_rate_factor(step, args)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * peak[name]

        # Rollout.
        chosen = prompts_of_step(len(prompts), step, args)
        batch = [prompts[i] for i in chosen]
        seed = args.seed * 1_000_003 + step
        tokens, prompt_lengths, lengths = sample(policy, batch, seed, args, args.temperature)
        sampled = time.perf_counter()

        # Score: minibatches are drawn first, and everything is computed on their tensors.
        minibatches, prompts_of = [], []
        for places, rows in draw_minibatches(lengths, rng, args):
            prompts_of.append(places.tolist())
            part = tokens[rows], lengths[rows], prompt_lengths[rows]
            minibatches.append(score(*part, models, args))
        whiten(minibatches)
        scored = time.perf_counter()

        # Update.
        row = rollout_metrics(minibatches)
        updates, bad = [], not_finite(row)
        for mb in (mb for _ in range(args.inner_epochs) for mb in minibatches):
            if bad:
                break
            ptx_sequences = None
            if stream is not None:
                number = (step - 1) * args.inner_epochs * args.num_minibatches + len(updates)
                ptx_sequences = draw_pretraining(stream, starts, num_ptx, number, args, rng)
                ptx_sequences = ptx_sequences.to(device)
            updates.append(update(mb, models, optimizers, ptx_sequences, args))
            update_ema(ema, policy, args.ema)
            bad = not_finite(updates[-1])
        if bad:
            phase, place, bad = first_not_finite(minibatches, updates)
            bad_records = [records[chosen[i]] for i in prompts_of[place]]
            return stop_not_finite(out, step, phase, place, bad, bad_records)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)  # the next rollout needs the memory
        finished = time.perf_counter()

        # Means over all updates of the iteration; maximum for the ratio.
        for name in updates[0]:
            values = [metrics[name] for metrics in updates]
            if name == "entropy":
                continue  # the rollout's is logged
            row[name] = None if None in values else sum(values) / len(values)
        row["ratio_max"] = max(metrics["ratio_max"] for metrics in updates)
        warned |= warn(step, row, warned, args)
        last = step == total_steps
        looks = last or (args.eval_every and step % args.eval_every == 0)
        val = evaluate(ema, val_prompts, models, encoding, args) if looks else None
        row |= {
            "step": step,
            "episodes": step * args.batch_size,
            "lr": factor * args.lr,
            "kl_coef": args.kl_coef,
            "val_score": val and val["val_score"],
            "val_kl": val and val["val_kl"],
        }
        log.write(row)
        kib = 2**10 if sys.platform == "darwin" else 1  # macOS counts in bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 / kib
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        new_tokens = int((lengths - prompt_lengths).sum())
        num_ptx_now = num_ptx * len(updates) if stream is not None else 0
        flops = iteration_flops(models, lengths.tolist(), new_tokens, num_ptx_now, args)
        clocks = {
            "step": step,
            "rollout_s": sampled - started,
            "score_s": scored - sampled,
            "update_s": finished - scored,
            "step_s": finished - started,
            "tok_per_s": new_tokens / (sampled - started),
            "mfu": flops / (finished - started) / peak_flops if peak_flops else None,
            "mem_gib": memory,
        }
        timing.write(clocks)
        shown = ["score", "kl", "reward", "response_len", "policy_loss", "value_loss", "ptx_loss"]
        shown += ["approx_kl", "clipfrac", "explained_variance", "val_score", "val_kl"]
        print(
            f"{out.name} {step:04d}/{total_steps} | "
            + " | ".join(f"{k} {row[k]:+.3f}" for k in shown if row[k] is not None)
            + f" | rollout_s {sampled - started:.2f} | score_s {scored - sampled:.2f}"
            + f" | update_s {finished - scored:.2f} | tok_per_s {clocks['tok_per_s']:,.0f}"
            + f" | mem_gib {memory:.1f}"
            + (f" | mfu {clocks['mfu']:.3f}" if peak_flops else ""),
            flush=True,
        )
        if args.keep_every and step % args.keep_every == 0:
            checkpoints.keep_step(step, ema, tokenizer_json, info)
        leave = bool(stop)
        if leave:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the step has ended in time
        if leave or last or (args.save_every and step % args.save_every == 0):
            state = {
                "policy": policy.state_dict(),
                "value_network": models["value_network"].state_dict(),
                "ema": ema.state_dict(),
                "optimizers": {name: opt.state_dict() for name, opt in optimizers.items()},
                "warned": sorted(warned),
            }
            checkpoints.save(step, ema, tokenizer_json, info, state, (log, timing))
        if leave and not last:
            print(f"stopped by a signal after iteration {step}; --resume goes on", file=sys.stderr)
            return 128 + stop[0]

    checkpoints.finish(ema, tokenizer_json, info)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "--micro_batch_size"))
