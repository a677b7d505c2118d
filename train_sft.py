"""Step 1: supervised fine-tuning on demonstrations (InstructGPT 3.5, C.1); and pretraining.

SFT minimises the mean negative log-likelihood of the demonstrated responses, end token included:

    loss = - sum_{t in response} log p(token_t | tokens before t) / number of response tokens

The prompt's tokens are context and not in the loss. Three uses of one script:

    python train_sft.py --pretrain_data FILE --tokenizer FILE ...  pretraining: every token counts
    python train_sft.py --init out/base --data FILE ...            SFT
    python train_sft.py --init out/base --data FILE --pretrain_data FILE --pretrain_fraction 0.1
                                         the model that PPO starts from (C.3): SFT with a share of
                                         pretraining data, loss = 0.9 SFT + 0.1 pretraining

From the paper: 16 epochs, cosine to 10 % of the peak, no warm-up, residual dropout 0.2, Adam
(0.9, 0.95), a checkpoint per epoch of which the reward model later chooses one. Not in the paper:
the prompt mask, gradient clipping at 1 (GPT-3's), batches of similar length. The learning rate and
batch size are the miniature's; the paper's are in the help.

Names: B batch, T tokens. `tokens` (B, T) is right-padded, `loss_mask` (B, T) marks counted tokens.
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
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import kernels
from checkpoint import check_tokenizer, find_model
from data.files import BadInput, fingerprint, read_documents, read_jsonl, run_command, write_atomic
from data.tokenizer import encode_prompt, encode_response, load_tokenizer
from model import GPT, GPTConfig, forward_flops, pad_right
from run import Checkpoints, Log

LOG = ["step", "epoch", "lr", "loss", "pretrain_loss", "grad_norm", "tokens"]
LOG += ["val_loss", "val_pretrain_loss"]
TIMING = ["step", "step_s", "tok_per_s", "mfu", "mem_gib"]
# --preset: GPT-2's sizes on one GPU. Batch and the largest size's rate are the paper's for 1.3B
# (C.1); smaller models take larger rates; none is tuned. Memory: `python -m tests.throughput`.
GPT2 = {
    "device": "cuda",
    "dtype": "bfloat16",
    "epochs": 3,
    "batch_size": 32,
    "save_every": 1000,
    "max_prompt_tokens": 512,
    "max_new_tokens": 256,
    "short_fraction": 0.0,
}
PRESETS = {
    "gpt2": GPT2 | {"init": "gpt2", "lr": 5e-5, "micro_batch_size": 8},
    "gpt2-medium": GPT2 | {"init": "gpt2-medium", "lr": 3e-5, "micro_batch_size": 8},
    "gpt2-large": GPT2
    | {"init": "gpt2-large", "lr": 2e-5, "micro_batch_size": 16, "grad_checkpointing": True},
    "gpt2-xl": GPT2
    | {"init": "gpt2-xl", "lr": 9.65e-6, "micro_batch_size": 16, "grad_checkpointing": True},
}
Example = tuple[list[int], int]  # tokens, and how many of them, at the start, are not in the loss


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
    add("--data", help="demonstrations.jsonl; absent with --pretrain_data: pretraining")
    add("--val_data", help="demonstrations.jsonl for the validation loss")
    add("--pretrain_data", help="pretrain.txt; with --data it is mixed in")
    add("--val_pretrain_data", help="pretrain.txt for the validation loss on pretraining text")
    add(
        "--pretrain_fraction",
        type=float,
        default=0.1,
        help="share and weight of mixed-in pretraining text (paper: 0.1)",
    )
    add("--init", help="checkpoint folder to start from; without it, a new model")
    add("--tokenizer", default="out/data/tokenizer.json", help="for a new model")
    add("--out", default="out/sft", help="folder of the run")
    # The new model, when there is no --init.
    add("--n_layer", type=int, default=3, help="layers")
    add("--n_head", type=int, default=4, help="attention heads")
    add("--n_embd", type=int, default=128, help="width")
    add("--n_positions", type=int, default=128, help="context, tokens (paper: 2048)")
    add("--score_mod", default="causal", help="attention function of a new model")
    add("--initializer_range", type=float, default=0.08, help="std of new weights (GPT-2: 0.02)")
    add(
        "--sinusoidal_start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="learned positions of a new model start as sinusoids (GPT-2: noise)",
    )
    add("--short_tokens", type=int, default=64, help="sequence length early in pretraining")
    add("--short_fraction", type=float, default=0.8, help="of the pretraining text; 0: all long")
    # Optimisation.
    add(
        "--epochs",
        type=int,
        default=16,
        help="passes over --data, or --pretrain_data without it (paper: 16)",
    )
    add("--max_steps", type=int, default=0, help="stop after this many steps; 0: after --epochs")
    add(
        "--batch_size",
        type=int,
        default=32,
        help="sequences a step; of short ones, as many tokens (paper: 32; 175B: 8)",
    )
    add("--micro_batch_size", type=int, default=0, help="sequences a forward pass; 0: --batch_size")
    add("--lr", type=float, default=2e-3, help="peak (paper: 9.65e-6 for 1.3B and 6B)")
    add("--warmup_steps", type=int, default=0, help="linear warm-up (paper: none in SFT)")
    add("--weight_decay", type=float, default=0.0, help="decoupled, on matrices")
    add("--grad_clip", type=float, default=1.0, help="limit of the gradient's norm; 0: none")
    add("--resid_pdrop", type=float, default=0.2, help="residual dropout (paper: 0.2)")
    # Running.
    add("--max_prompt_tokens", type=int, default=96, help="a longer one is dropped (paper: 1000)")
    add("--max_new_tokens", type=int, default=32, help="longer responses are cut (paper: 1000)")
    add("--save_every", type=int, default=200, help="steps between checkpoints; 0: by epoch")
    add(
        "--epoch_checkpoints",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep each epoch's model under OUT/epochs/, for evaluate.py --select",
    )
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
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile each block",
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
    at_least_zero = ["max_steps", "micro_batch_size", "warmup_steps", "save_every"]
    at_least_zero += ["seed", "stop_seconds", "lr", "weight_decay", "grad_clip"]
    at_least_zero += ["initializer_range"]
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
    if not args.out:
        parser.error("--out is empty: expected a path")
    if args.init and os.path.realpath(args.out) == os.path.realpath(args.init):
        parser.error(f"--out {args.out} is --init, which it would replace: give another folder")
    if not (args.data or args.pretrain_data):
        parser.error("give --data, --pretrain_data or both")
    if not 0 <= args.short_fraction <= 1 or args.short_tokens < 2:
        parser.error("--short_fraction: expected 0 to 1, and --short_tokens at least 2")
    if args.n_positions < 2:
        parser.error(f"--n_positions {args.n_positions}: expected at least 2")
    if not 0 < args.pretrain_fraction < 1:
        parser.error(f"--pretrain_fraction {args.pretrain_fraction}: expected between 0 and 1")
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    return args


# ------------------------------------------------------------------------------------------------
# Data


def load_demonstrations(
    path: str, encoding, args: argparse.Namespace
) -> tuple[list[Example], list[int]]:
    """Demonstrations as tokens: prompt, response, end token; and the record, from 1, of each.

    Says what was dropped or cut.
    """
    examples, records, too_long, cut = [], [], 0, 0
    for number, record in enumerate(read_jsonl(path, "demonstrations"), start=1):
        prompt = encode_prompt(encoding, record["prompt"])
        response = encode_response(encoding, record["response"])
        too_long += len(prompt) > args.max_prompt_tokens
        if len(prompt) <= args.max_prompt_tokens:
            cut += len(response) > args.max_new_tokens
            examples.append((prompt + response[: args.max_new_tokens], len(prompt)))
            records.append(number)
    print(
        f"{path}: {len(examples)} demonstrations; dropped {too_long} with a prompt over "
        f"{args.max_prompt_tokens} tokens, cut {cut} responses over {args.max_new_tokens}"
    )
    if not examples:
        raise BadInput(f"{path}: no prompt is within --max_prompt_tokens {args.max_prompt_tokens}")
    return examples, records


def load_pretraining(
    path: str,
    encoding,
    length: int,
    short_tokens: int = 64,
    short_fraction: float = 0.0,
    at_documents: bool = False,
) -> list[Example]:
    """Documents joined by the end token and cut into sequences of `length` tokens, all counted.

    The first `short_fraction` of the text is cut into sequences of `short_tokens` instead. With
    `at_documents`, sequences overlap: one starts at each document, and in a long one every `length`
    tokens, so that a sequence's start, where a prompt stands in other data, is no middle.
    """
    stream: list[int] = []
    starts: list[tuple[int, int]] = []
    for document in read_documents(path):
        tokens = [*encoding.encode_ordinary(document), encoding.eot_token]
        if at_documents:
            starts += [(len(stream) + i, length) for i in range(0, len(tokens), length)]
        stream += tokens
    if at_documents:
        starts = [(start, size) for start, size in starts if start + size <= len(stream)]
    else:
        turn = int(len(stream) * short_fraction)
        starts = [(i, short_tokens) for i in range(0, turn - short_tokens + 1, short_tokens)]
        starts += [(i, length) for i in range(turn, len(stream) - length + 1, length)]
    if not starts:
        raise BadInput(f"{path}: {len(stream)} tokens, fewer than the context of {length}")
    print(f"{path}: {len(stream):,} tokens in {len(starts):,} sequences of up to {length}")
    return [(stream[start : start + size], 1) for start, size in starts]  # token 0 has no context


def pretraining_batches(
    lengths: np.ndarray, args: argparse.Namespace, epoch: int
) -> list[np.ndarray]:
    """A pass over pretraining sequences, the short ones first; batches of equally many tokens.

    Heads that look back learn where from one position at a time. On short sequences there are
    fewer positions to learn, and copying is learned several times sooner.
    """
    batches = []
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        size = args.batch_size * int(lengths.max()) // int(length)
        order = epoch_batches(lengths[chosen], size, args.seed, epoch)
        batches += [chosen[indices] for indices in order]
    return batches


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


def collate(examples: list[Example], end: int, device: torch.device) -> tuple[Tensor, ...]:
    """-> tokens (B, T) int64, lengths (B,) int32, loss_mask (B, T) bool."""
    tokens, lengths = pad_right([tokens for tokens, _ in examples], end, device)
    skipped = torch.tensor([skip for _, skip in examples], device=device)
    places = torch.arange(tokens.shape[1], device=device)
    return tokens, lengths, (places >= skipped[:, None]) & (places < lengths[:, None])


# ------------------------------------------------------------------------------------------------
# Loss


def sft_loss(model: GPT, tokens: Tensor, lengths: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over the counted tokens of -log p(token | tokens before it), in nats."""
    logprobs, _ = model.logprobs(tokens, lengths, mask=loss_mask)
    return -logprobs.sum()


def backward(model: GPT, examples: list[Example], weight: float, args: argparse.Namespace) -> float:
    """Add weight x (mean loss per counted token of `examples`) to the gradients; return the mean.

    The divisor is the whole batch's count, so micro-batches of any size give the same gradient.
    """
    end, device = model.config.eos_token_id, torch.device(args.device)
    counted = sum(len(tokens) - skipped for tokens, skipped in examples)
    total = torch.zeros((), dtype=torch.float64, device=device)  # read once, for the GPU's sake
    for start in range(0, len(examples), args.micro_batch_size):
        batch = collate(examples[start : start + args.micro_batch_size], end, device)
        with autocast(args):
            loss = sft_loss(model, *batch) / counted
        (weight * loss).backward()
        total += loss.detach()
    return total.item()


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 computation on float32 weights, or plain float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def learning_rate(step: int, total_steps: int, args: argparse.Namespace) -> float:
    """Of step 1, 2, ...: linear warm-up, then a cosine from the peak to 10 % of it (C.1)."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    progress = (step - 1 - args.warmup_steps) / max(1, total_steps - 1 - args.warmup_steps)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


# ------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model: GPT, examples: list[Example], args: argparse.Namespace) -> float | None:
    """Mean loss per counted token, in nats, without dropout; None without examples."""
    if not examples:
        return None
    model.eval()
    examples = sorted(examples, key=lambda example: len(example[0]))
    end, device = model.config.eos_token_id, torch.device(args.device)
    total = 0.0
    for start in range(0, len(examples), 4 * args.micro_batch_size):
        batch = collate(examples[start : start + 4 * args.micro_batch_size], end, device)
        with autocast(args):
            total += sft_loss(model, *batch).item()
    model.train()
    return total / sum(len(tokens) - skipped for tokens, skipped in examples)


# ------------------------------------------------------------------------------------------------
# Guards


def stop_not_finite(out: Path, step: int, values: dict[str, float], records: list[int]) -> int:
    """Say that a step's numbers are not finite, keep its records for a look; the exit code.

    `bad_batch.json` names the step, the values, and the batch's records of --data, from 1 (in
    pretraining: its sequences of text).
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

    # Model: a checkpoint, or a new one that fits the tokenizer.
    init = find_model(args.init) if args.init else None
    tokenizer_path = init / "tokenizer.json" if init else Path(args.tokenizer)
    encoding = load_tokenizer(tokenizer_path)
    if args.init:
        model = GPT.from_pretrained(args.init, impl=args.kernels, resid_pdrop=args.resid_pdrop)
    else:
        config = GPTConfig(
            vocab_size=encoding.n_vocab,
            n_positions=args.n_positions,
            n_embd=args.n_embd,
            n_layer=args.n_layer,
            n_head=args.n_head,
            resid_pdrop=args.resid_pdrop,
            eos_token_id=encoding.eot_token,
            score_mod=args.score_mod,
            initializer_range=args.initializer_range,
        )
        model = GPT(config, impl=args.kernels)
        if args.sinusoidal_start:
            model.start_from_sinusoids()
    check_tokenizer(model.config, encoding, tokenizer_path)
    model.to(device).train()
    model.gradient_checkpointing = args.grad_checkpointing
    if args.compile:
        for block in model.h:
            block.compile(dynamic=True)  # of all lengths at once
    context = model.config.n_positions
    if args.data and args.max_prompt_tokens + args.max_new_tokens > context:
        raise BadInput(
            f"--max_prompt_tokens {args.max_prompt_tokens} and --max_new_tokens "
            f"{args.max_new_tokens} come to more than the context of {context}: lower one"
        )

    # Data: the examples of an epoch, and pretraining sequences to mix in.
    mixing = bool(args.data and args.pretrain_data)
    pretraining = []
    if args.pretrain_data:
        pretraining = load_pretraining(
            args.pretrain_data,
            encoding,
            context,
            min(args.short_tokens, context),
            args.short_fraction,
            at_documents=mixing,
        )
    examples, records = pretraining, list(range(1, len(pretraining) + 1))
    if args.data:
        examples, records = load_demonstrations(args.data, encoding, args)
    val_examples: list[Example] = []
    if args.val_data:
        val_examples, _ = load_demonstrations(args.val_data, encoding, args)
    val_pretraining = (
        load_pretraining(args.val_pretrain_data, encoding, context)  # cut anywhere
        if args.val_pretrain_data
        else []
    )
    lengths = np.array([len(tokens) for tokens, _ in examples])
    # A fraction f of the data is pretraining: f / (1 - f) sequences for each demonstration.
    ratio = args.pretrain_fraction / (1 - args.pretrain_fraction)
    num_mixed = max(1, round(args.batch_size * ratio))
    # They are drawn in proportion to the part of a document that each begins with, so that short
    # documents do not come too often: by a random place in all these parts, one after the other.
    end = model.config.eos_token_id
    parts = [[*tokens, end].index(end) + 1 for tokens, _ in pretraining] if mixing else [1]
    parts_end = np.cumsum(parts)

    def batches_of(epoch: int) -> list[np.ndarray]:
        if args.data:
            return epoch_batches(lengths, args.batch_size, args.seed, epoch)
        return pretraining_batches(lengths, args, epoch)

    steps_per_epoch = len(batches_of(0))
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
        args.pretrain_data,
        args.val_data,
        args.val_pretrain_data,
        tokenizer_path,
        init and init / "model.safetensors",
    )
    settings["sha256"] = {str(path): fingerprint(path) for path in read if path}
    stage = "sft" if args.data else "base"
    info = {"stage": stage, "data": [p for p in (args.data, args.pretrain_data) if p]}
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
        f"{total_steps} steps of batch size {args.batch_size}, from step {step}"
    )
    peak_flops = args.peak_tflops * 1e12 or kernels.peak_flops(args.device)
    batches, batches_epoch = [], -1
    while step < total_steps:
        started = time.perf_counter()
        epoch = step // steps_per_epoch
        if epoch != batches_epoch:
            batches, batches_epoch = batches_of(epoch), epoch
        chosen = batches[step % steps_per_epoch]
        batch = [examples[i] for i in chosen]
        step += 1
        # Dropout and the pretraining draw of a step depend on (seed, step) alone: see Checkpoints.
        torch.manual_seed(args.seed * 1_000_003 + step)
        lr = learning_rate(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Gradients: demonstrations, then the mixed-in pretraining data, into the same buffers.
        optimizer.zero_grad(set_to_none=True)
        loss = backward(model, batch, 1 - args.pretrain_fraction if mixing else 1.0, args)
        pretrain_loss, mixed = None, []
        if mixing:
            rng = np.random.default_rng([args.seed, 1, step])
            draw = np.searchsorted(parts_end, rng.integers(parts_end[-1], size=num_mixed), "right")
            mixed = [pretraining[i] for i in draw]
            pretrain_loss = backward(model, mixed, args.pretrain_fraction, args)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), args.grad_clip or math.inf
        ).item()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            values = {"loss": loss, "grad_norm": grad_norm}
            values |= {"pretrain_loss": pretrain_loss} if mixing else {}
            return stop_not_finite(out, step, values, [records[i] for i in chosen])
        optimizer.step()
        seconds = time.perf_counter() - started

        # Validate and keep the model at the end of each epoch; report; save.
        epoch_ends = step % steps_per_epoch == 0 or step == total_steps
        row = {
            "step": step,
            "epoch": epoch + 1,
            "lr": lr,
            "loss": loss,
            "pretrain_loss": pretrain_loss,
            "grad_norm": grad_norm,
            "tokens": sum(len(tokens) for tokens, _ in batch),
            "val_loss": evaluate(model, val_examples, args) if epoch_ends else None,
            "val_pretrain_loss": evaluate(model, val_pretraining, args) if epoch_ends else None,
        }
        log.write(row)
        kib = 2**10 if sys.platform == "darwin" else 1  # macOS counts in bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 / kib
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        flops = 3 * forward_flops(
            model.config,
            [len(tokens) for tokens, _ in batch + mixed],
            sum(len(tokens) - skipped for tokens, skipped in batch + mixed),
        )
        clocks = {
            "step": step,
            "step_s": seconds,
            "tok_per_s": row["tokens"] / seconds,
            "mfu": flops / seconds / peak_flops if peak_flops else None,
            "mem_gib": memory,
        }
        timing.write(clocks)
        if epoch_ends or step % 50 == 0:
            shown = [f"{out.name} {step:05d}/{total_steps}", f"epoch {epoch + 1}", f"lr {lr:.2e}"]
            shown += [f"{k} {v:.3f}" for k, v in row.items() if "loss" in k and v is not None]
            shown += [f"tok_per_s {clocks['tok_per_s']:,.0f}", f"mem_gib {memory:.1f}"]
            shown += [f"mfu {clocks['mfu']:.3f}"] if peak_flops else []
            print(" | ".join(shown), flush=True)
        leave = bool(stop)
        if leave:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the step has ended in time
        if leave or epoch_ends or (args.save_every and step % args.save_every == 0):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            kept = epoch_ends and args.epoch_checkpoints and args.data
            extra = {"epoch": epoch + 1, "val_loss": row["val_loss"]} if kept else {}
            checkpoints.save(step, model, tokenizer_json, info | extra, state, (log, timing))
        if leave and step < total_steps:
            print(f"stopped by a signal after step {step}; --resume goes on", file=sys.stderr)
            return 128 + stop[0]

    checkpoints.finish(model, tokenizer_json, info)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "--micro_batch_size"))
