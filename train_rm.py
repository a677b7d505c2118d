"""Step 2: the reward model, trained on rankings of K = 4..9 responses (section 3.5, C.2).

A labeler ranks K responses to a prompt. Each of the up to C(K, 2) pairs that is not a tie says that
a winner w was preferred to a loser l. With a score r for every response, the loss of a prompt is
the mean over its pairs (Eq. 1), and the loss of a batch the mean over its prompts:

    loss = - 1 / #pairs  sum_{(w, l)} log sigmoid(r_w - r_l)

All pairs of a prompt are one batch element with one forward pass per response, K passes and not
C(K, 2), and each response enters one update an epoch:

    responses    A   B   C   D         ranks  1  2  2  4
    scores (B,)  r_A r_B r_C r_D       one row each; their common prompt is computed once
    pairs        A>B A>C A>D B>D C>D   B and C are a tie: no pair

Consecutive records with the same responses (several labelers) form one element with all their
pairs. The model is the SFT model with the unembedding replaced by a linear head; a response's score
is read at its last token, before the end token. At the end the head's bias is shifted so that
demonstrations score 0 on average.

From the paper: one epoch, cosine to 10 % of the peak, no dropout, ties dropped, the final shift.
The paper leaves open whether the divisor counts ties (here it does not). With `--shuffle_pairs`
each pair is a batch element, so a response returns in up to K - 1 updates for each labeler; the
paper found that this overfits within one epoch. `make demo` has three labelers rank each prompt and
takes two epochs. Learning rate and batch size are the miniature's; the paper's are in the help.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, groupby
from pathlib import Path

from data.commands import run_command
from data.files import BadInput, read_jsonl, write_atomic
from data.flags import natural, nonnegative, whole
from data.tokenizer import encode_prompt, encode_response

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from checkpoint import read_tokenizer
from model import GPT, ScalarModel, pad_right
from run import Run, check_context, parse, parser

# ------------------------------------------------------------------------------------------------
# Arguments


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, out="out/rm", save_every=200)
    add = flags.add_argument
    add("--data", default="out/data/train/comparisons.jsonl", help="comparisons.jsonl")
    add("--val_data", help="comparisons.jsonl on held-out prompts")
    add("--held_out_data", help="comparisons.jsonl of labelers who gave no training data")
    add("--demonstrations", help="demonstrations.jsonl that are to score 0 on average")
    add("--init", default="out/sft", help="checkpoint folder of the SFT model")
    # Optimisation.
    add("--epochs", type=natural, default=2, help="passes over --data (paper: 1)")
    add("--max_steps", type=whole, default=0, help="stop after this many steps; 0: by --epochs")
    add("--batch_size", type=natural, default=16, help="prompts a step (paper: 64)")
    add("--micro_batch_size", type=whole, default=0, help="prompts a forward pass; 0: all")
    add("--shuffle_pairs", action="store_true", help="a batch element is a pair (paper: overfits)")
    add("--lr", type=nonnegative, default=1e-3, help="peak (paper: 9e-6 for 6B)")
    add("--warmup_steps", type=whole, default=0, help="linear warm-up (not in the paper)")
    add("--weight_decay", type=nonnegative, default=0.0, help="decoupled, on matrices")
    add("--grad_clip", type=nonnegative, default=1.0, help="limit of the gradient's norm; 0: none")
    add("--eval_every", type=whole, default=200, help="steps between validations; 0: at the end")
    args = parse(flags, argv)
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    return args


# ------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    torch.manual_seed(args.seed)
    model, encoding = make_model(args)

    # Data: an element is a prompt with its K responses.
    check_context(args, model)
    elements = load_comparisons(args.data, encoding, args)
    val_elements, held_out, demonstrations = [], [], []
    if args.val_data:
        val_elements = load_comparisons(args.val_data, encoding, args)
    if args.held_out_data:
        held_out = load_comparisons(args.held_out_data, encoding, args)
    if args.demonstrations:
        demonstrations = load_demonstrations(args.demonstrations, encoding, args)
    if args.shuffle_pairs:
        elements = one_by_one(elements)
    lengths = np.array([max(map(len, element.sequences)) for element in elements])

    @lru_cache(maxsize=1)
    def batches_of(epoch: int) -> list[np.ndarray]:
        return epoch_batches(lengths, args.batch_size, args.seed, epoch)

    steps_per_epoch = len(batches_of(0))
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    run = Run(
        args,
        "rm",
        result=model,
        tokenizer=args.init,
        state={"model": model, "adam": adam},
        shows="epoch lr loss accuracy margin val_loss val_accuracy",
        print_every=50,
    )

    validation: dict[str, float] = {}
    for step in run.steps(total_steps):
        epoch, place = divmod(step - 1, steps_per_epoch)
        batch = [elements[i] for i in batches_of(epoch)[place]]
        lr = learning_rate(step, total_steps, args)
        for group in adam.param_groups:
            group["lr"] = lr

        # Gradients of the mean over the batch's prompts.
        num_pairs = sum(len(element.pairs) for element in batch)
        for first in range(0, len(batch), args.micro_batch_size):
            micro_batch = batch[first : first + args.micro_batch_size]
            loss, chosen, rejected = rm_loss(score_all(model, micro_batch), micro_batch)
            (loss / len(batch)).backward()
            margin = chosen - rejected
            metrics = {
                "accuracy": correctness(margin).sum(),
                "margin": margin.sum(),
                "chosen_score": chosen.sum(),
                "rejected_score": rejected.sum(),
            }
            run.add({"loss": loss}, 1 / len(batch))
            run.add(metrics, 1 / num_pairs)
        norm = clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        adam.step()
        adam.zero_grad(set_to_none=True)
        num_tokens = sum(len(tokens) for element in batch for tokens in element.sequences)
        run.lap("step_s", num_tokens)

        row = {"epoch": epoch + 1, "lr": lr, "grad_norm": norm.item(), "tokens": num_tokens}
        if val_elements:
            validation = evaluate(model, val_elements, args) if run.due(args.eval_every) else {}
            row["val_loss"] = validation.get("loss")
            row["val_accuracy"] = validation.get("accuracy")
        run.log(row)

    report = {}
    if val_elements:  # a resume after the last step has not validated
        report["val"] = validation or evaluate(model, val_elements, args)
    if held_out:
        report["held_out"] = evaluate(model, held_out, args)
    for name, result in report.items():
        print(f"{name}: " + " | ".join(f"{k} {v:.4g}" for k, v in result.items()))
    if demonstrations:  # they score 0 from here on; margins of pairs stay
        shift = center_on_demonstrations(model, demonstrations)
        print(f"shifted by {shift:+.3f}: {args.demonstrations} scores 0 on average")
    write_atomic(Path(args.out) / "metrics.json", json.dumps(report, indent=2) + "\n")
    return run.finish(metrics=report)


# ------------------------------------------------------------------------------------------------
# Model


def make_model(args: argparse.Namespace) -> tuple[ScalarModel, tiktoken.Encoding]:
    """The SFT model under a fresh scalar head, without dropout; and the tokenizer."""
    sft = GPT.from_pretrained(args.init, impl=args.kernels, dtype=args.dtype)
    model = ScalarModel.from_gpt(sft)
    model.trunk.gradient_checkpointing = args.grad_checkpointing
    model.trunk.packs = True  # K rows share a prompt
    return model.to(args.device).train(), read_tokenizer(args.init, model)


# ------------------------------------------------------------------------------------------------
# Data


@dataclass
class Comparison:
    """One batch element: K responses to a prompt, and the pairs (winner, loser) among them."""

    sequences: list[list[int]]  # prompt and response tokens, K of them
    pairs: list[tuple[int, int]]


def load_comparisons(
    path: str, encoding: tiktoken.Encoding, args: argparse.Namespace
) -> list[Comparison]:
    """Rankings as tokens and pairs without ties. Says what was dropped or cut.

    Consecutive records with equal prompt and responses (several labelers) become one element with
    all their pairs. If labelers disagree on a pair, it appears in both orders.
    """
    elements, too_long, all_tied, cut, ties = [], 0, 0, 0, 0

    def same_responses(record: dict) -> tuple:
        return record["prompt"], record["responses"], record.get("ended")

    for (text, responses, ended), rankings in groupby(
        read_jsonl(path, "comparisons"), key=same_responses
    ):
        prompt = encode_prompt(encoding, text)
        if len(prompt) > args.max_prompt_tokens:
            too_long += 1
            continue
        sequences = []
        for response, end in zip(responses, ended or [True] * len(responses), strict=True):
            response = encode_response(encoding, response, ended=end)
            cut += len(response) > args.max_new_tokens
            sequences.append(prompt + response[: args.max_new_tokens])
        untied = [untied_pairs(view["ranks"]) for view in rankings]
        pairs = [pair for view in untied for pair in view]
        ties += len(untied) * math.comb(len(sequences), 2) - len(pairs)
        all_tied += not pairs
        if pairs:
            elements.append(Comparison(sequences, pairs))
    print(
        f"{path}: {len(elements)} prompts, {sum(len(e.pairs) for e in elements)} pairs and {ties} "
        f"ties; dropped {too_long} with a prompt over {args.max_prompt_tokens} tokens and "
        f"{all_tied} with ties only, cut {cut} responses over {args.max_new_tokens}"
    )
    if not elements:
        raise BadInput(f"{path}: no prompt with a pair that is not tied is left")
    return elements


def untied_pairs(ranks: list[int]) -> list[tuple[int, int]]:
    """(winner, loser) for every two responses of different rank; rank 1 is best."""
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i, j in combinations(range(len(ranks)), 2)
        if ranks[i] != ranks[j]
    ]


def load_demonstrations(
    path: str, encoding: tiktoken.Encoding, args: argparse.Namespace
) -> list[list[int]]:
    """Demonstrations as tokens, the shortest first; dropped and cut as in SFT."""
    sequences = []
    for record in read_jsonl(path, "demonstrations"):
        prompt = encode_prompt(encoding, record["prompt"])
        response = encode_response(encoding, record["response"])
        if len(prompt) <= args.max_prompt_tokens:
            sequences.append(prompt + response[: args.max_new_tokens])
    if not sequences:
        raise BadInput(f"{path}: no prompt is within --max_prompt_tokens {args.max_prompt_tokens}")
    return sorted(sequences, key=len)


def one_by_one(elements: list[Comparison]) -> list[Comparison]:
    """Every pair as a batch element of its own; 3.5 found that this overfits within one epoch."""
    return [
        Comparison([element.sequences[i] for i in pair], [(0, 1)])
        for element in elements
        for pair in element.pairs
    ]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """A shuffled pass over the data: indices of each batch, a function of (seed, epoch) alone.

    Neighbourhoods of 8 batches are sorted by length before they are cut, so that little padding is
    computed; the batches are then shuffled again, so that their order says nothing about length.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pools = np.split(order, range(8 * batch_size, len(order), 8 * batch_size))
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


# ------------------------------------------------------------------------------------------------
# Loss


def learning_rate(step: int, total_steps: int, args: argparse.Namespace) -> float:
    """Of step 1, 2, ...: linear warm-up, then a cosine from the peak to 10 % of it (C.2)."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    progress = (step - 1 - args.warmup_steps) / max(1, total_steps - 1 - args.warmup_steps)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def score_all(model: ScalarModel, elements: list[Comparison]) -> Tensor:
    """One forward pass for each response: scores (B,) of all responses of `elements`, in order."""
    sequences = [tokens for element in elements for tokens in element.sequences]
    device = model.score.weight.device
    return model.scores(*pad_right(sequences, model.config.eos_token_id, device))


def rm_loss(scores: Tensor, elements: list[Comparison]) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over prompts of the mean over its pairs of -log sigmoid(r_w - r_l) (Eq. 1).

    scores (B,): those of all responses of `elements`, in order. Returns the sum, and the scores of
    the winner and of the loser of every pair, (#pairs,) each.
    """
    winners, losers, weights, first = [], [], [], 0
    for element in elements:
        winners += [first + winner for winner, _ in element.pairs]
        losers += [first + loser for _, loser in element.pairs]
        weights += [1 / len(element.pairs)] * len(element.pairs)
        first += len(element.sequences)
    chosen, rejected = scores[winners], scores[losers]
    loss = -(scores.new_tensor(weights) * F.logsigmoid(chosen - rejected)).sum()
    return loss, chosen, rejected


def correctness(margins: Tensor) -> Tensor:
    """Of pairs with these margins r_w - r_l: 1 where the winner scores higher, 1/2 if equal."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


@torch.no_grad()
def evaluate(
    model: ScalarModel, elements: list[Comparison], args: argparse.Namespace
) -> dict[str, float]:
    """Loss and, over all pairs, accuracy, margin and calibration.

    Accuracy is the share of pairs whose winner scores higher, equal scores counting one half.
    calibration_error is the expected calibration error over ten bins of the predicted probability
    p = sigmoid(|margin|): sum over bins of share x |accuracy - mean p|.
    """
    total, margins, size = 0.0, [], 4 * args.micro_batch_size
    elements = sorted(elements, key=lambda element: max(map(len, element.sequences)))
    for first in range(0, len(elements), size):
        part = elements[first : first + size]
        loss, chosen, rejected = rm_loss(score_all(model, part), part)
        total += loss.item()
        margins.append(chosen - rejected)
    margin = torch.cat(margins).double()
    correct, predicted = correctness(margin), torch.sigmoid(margin.abs())
    bins = ((predicted - 0.5) / 0.05).long().clamp(max=9)
    error = sum(abs((correct - predicted)[bins == b].sum().item()) / len(margin) for b in range(10))
    return {
        "loss": total / len(elements),
        "accuracy": correct.mean().item(),
        "margin": margin.mean().item(),
        "calibration_error": error,
        "prompts": len(elements),
        "pairs": len(margin),
    }


@torch.no_grad()
def center_on_demonstrations(model: ScalarModel, demonstrations: list[list[int]]) -> float:
    """Shift the head's bias so that demonstrations score 0 on average (3.5); return the shift."""
    end, device = model.config.eos_token_id, model.score.weight.device
    batches = [demonstrations[i : i + 64] for i in range(0, len(demonstrations), 64)]
    shift = -torch.cat([model.scores(*pad_right(b, end, device)) for b in batches]).mean()
    model.score.bias += shift
    return shift.item()


if __name__ == "__main__":
    sys.exit(run_command(main, "--micro_batch_size"))
