"""Step 1: supervised fine-tuning on demonstrations (section 3.5, C.1); and pretraining.

SFT minimises the mean negative log-likelihood of the demonstrated responses, end token included:

    loss = - sum_{t in response} log p(token_t | tokens before t) / number of response tokens

The prompt's tokens are context and not in the loss:

    t           0    1    2    3    4    5        all are (B, T), right-padded
    tokens      p0   p1   r2   r3   end  (end)    prompt, response, end token, padding
    loss_mask   0    0    1    1    1    0        log p of these, from the hidden state at t - 1

Three uses of one script:

    python train_sft.py --pretrain_data FILE --tokenizer FILE ...  pretraining: all tokens count
    python train_sft.py --init out/base --data FILE ...            SFT
    python train_sft.py --init out/base --data FILE --pretrain_data FILE --pretrain_fraction 0.1
                                         the model that PPO starts from (C.3): SFT with a share of
                                         pretraining data, loss = 0.9 SFT + 0.1 pretraining

From the paper: 16 epochs, cosine to 10 % of the peak, no warm-up, residual dropout 0.2, Adam
(0.9, 0.95), a model kept per epoch, of which the reward model later chooses one. Not in the paper:
the prompt mask, gradient clipping at 1 (GPT-3's), batches of similar length. The learning rate is
chosen for the tiny models here; the paper's is in the help.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import lru_cache

from data.commands import run_command
from data.files import BadInput, read_documents, read_jsonl
from data.flags import fraction, natural, nonnegative, whole
from data.tokenizer import encode_prompt, encode_response

import numpy as np
import tiktoken
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from checkpoint import read_tokenizer
from kernels import score_mod
from model import GPT, GPTConfig, pad_right
from run import Run, check_context, parse, parser

Example = tuple[list[int], int]  # tokens, and how many of them, at the start, are not in the loss


# ------------------------------------------------------------------------------------------------
# Arguments


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, out="out/sft", save_every=200)
    add, flag = flags.add_argument, argparse.BooleanOptionalAction
    add("--data", help="demonstrations.jsonl; absent with --pretrain_data: pretraining")
    add("--val_data", help="demonstrations.jsonl for the validation loss")
    add("--pretrain_data", help="pretrain.txt; with --data it is mixed in")
    add("--val_pretrain_data", help="pretrain.txt for the validation loss on pretraining text")
    add("--pretrain_fraction", type=fraction, default=0.1, help="share mixed in (paper: 0.1)")
    add("--init", help="checkpoint folder to start from; without it, a new model")
    add("--score_mod", type=score_mod, help="attention, as window:64; default: --init's, or causal")
    # A new model, where there is no --init.
    add("--tokenizer", default="out/data/tokenizer.json", help="of a new model")
    add("--n_layer", type=natural, default=3, help="layers")
    add("--n_head", type=natural, default=4, help="attention heads")
    add("--n_embd", type=natural, default=128, help="width")
    add("--n_positions", type=natural, default=128, help="context, tokens (paper: 2048)")
    add("--initializer_range", type=nonnegative, default=0.08, help="std of weights (GPT-2: 0.02)")
    add("--sinusoidal_start", action=flag, default=True, help="of positions (GPT-2: noise)")
    add("--short_tokens", type=natural, default=64, help="sequence length early in pretraining")
    add("--short_fraction", type=fraction, default=0.8, help="of the pretraining text")
    # Optimisation.
    add("--epochs", type=natural, default=16, help="passes over the data (paper: 16)")
    add("--max_steps", type=whole, default=0, help="stop after this many steps; 0: by --epochs")
    add("--batch_size", type=natural, default=32, help="sequences a step (paper: 32; 175B: 8)")
    add("--micro_batch_size", type=whole, default=0, help="sequences a forward pass; 0: all")
    add("--lr", type=nonnegative, default=1.5e-3, help="peak (paper: 9.65e-6 for 1.3B and 6B)")
    add("--warmup_steps", type=whole, default=0, help="linear warm-up (paper: none in SFT)")
    add("--weight_decay", type=nonnegative, default=0.0, help="decoupled, on matrices")
    add("--grad_clip", type=nonnegative, default=1.0, help="limit of the gradient's norm; 0: none")
    add("--resid_pdrop", type=fraction, default=0.2, help="residual dropout (paper: 0.2)")
    add("--epoch_checkpoints", action=flag, default=True, help="keep each epoch under OUT/epochs/")
    add("--compile", action=flag, default=False, help="torch.compile each block")
    args = parse(flags, argv)
    if not (args.data or args.pretrain_data):
        flags.error("give --data, --pretrain_data or both")
    if args.data and args.pretrain_data and not 0 < args.pretrain_fraction < 1:
        flags.error(f"--pretrain_fraction {args.pretrain_fraction}: expected between 0 and 1")
    if args.resid_pdrop == 1:
        flags.error("--resid_pdrop 1: expected 0 to below 1")
    if args.short_tokens < 2 or args.n_positions < 2:
        flags.error("--short_tokens and --n_positions: expected at least 2")
    args.tokenizer = None if args.init else args.tokenizer
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    return args


# ------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    torch.manual_seed(args.seed)
    model, encoding = make_model(args)
    context = model.config.n_positions

    # Data: the examples of an epoch, and pretraining text to mix in.
    mixing = bool(args.data and args.pretrain_data)
    if args.data or args.val_data:
        check_context(args, model)
    if args.data:
        examples = load_demonstrations(args.data, encoding, args)
    if mixing:
        text, ends = load_beginnings(args.pretrain_data, encoding, context)
        ratio = args.pretrain_fraction / (1 - args.pretrain_fraction)
        num_mixed = max(1, round(args.batch_size * ratio))  # sequences a step
    elif args.pretrain_data:
        examples = load_sequences(
            args.pretrain_data, encoding, context, args.short_tokens, args.short_fraction
        )
    val_examples, val_text = [], []
    if args.val_data:
        val_examples = load_demonstrations(args.val_data, encoding, args)
    if args.val_pretrain_data:
        val_text = load_sequences(args.val_pretrain_data, encoding, context)
    lengths = np.array([len(tokens) for tokens, _ in examples])

    @lru_cache(maxsize=1)
    def batches_of(epoch: int) -> list[np.ndarray]:
        make = epoch_batches if args.data else pretraining_batches
        return make(lengths, args.batch_size, args.seed, epoch)

    steps_per_epoch = len(batches_of(0))
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    run = Run(
        args,
        "sft" if args.data else "base",
        result=model,
        tokenizer=args.init or args.tokenizer,
        state={"model": model, "adam": adam},
        shows="epoch lr loss pretrain_loss val_loss val_pretrain_loss",
        print_every=50,
    )

    for step in run.steps(total_steps):
        epoch, place = divmod(step - 1, steps_per_epoch)
        batch = [examples[i] for i in batches_of(epoch)[place]]
        lr = learning_rate(step, total_steps, args)
        for group in adam.param_groups:
            group["lr"] = lr

        # Gradients: demonstrations, then the mixed-in pretraining text, into the same buffers.
        weighted = {"loss": (batch, 1.0)}
        if mixing:
            rng = np.random.default_rng([args.seed, 1, step])
            drawn = np.searchsorted(ends, rng.integers(ends[-1], size=num_mixed), "right")
            mixed = [text[i] for i in drawn]
            weighted = {
                "loss": (batch, 1 - args.pretrain_fraction),
                "pretrain_loss": (mixed, args.pretrain_fraction),
            }
        for name, (chosen, weight) in weighted.items():
            num_counted = sum(len(tokens) - skipped for tokens, skipped in chosen)
            for first in range(0, len(chosen), args.micro_batch_size):
                micro_batch = collate(chosen[first : first + args.micro_batch_size], model)
                loss = sft_loss(model, *micro_batch) / num_counted
                (weight * loss).backward()
                run.add({name: loss})
        norm = clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        adam.step()
        adam.zero_grad(set_to_none=True)
        num_tokens = sum(len(tokens) for tokens, _ in batch)
        run.lap("step_s", num_tokens)

        # At the end of each epoch: validate, and keep the model.
        row = {"epoch": epoch + 1, "lr": lr, "grad_norm": norm.item(), "tokens": num_tokens}
        last = place + 1 == steps_per_epoch or step == total_steps
        if val_examples:
            row["val_loss"] = evaluate(model, val_examples, args) if last else None
        if val_text:
            row["val_pretrain_loss"] = evaluate(model, val_text, args) if last else None
        if last and args.data and args.epoch_checkpoints:
            run.keep(f"epochs/{epoch + 1:02}", epoch=epoch + 1, val_loss=row.get("val_loss"))
        run.log(row)
    return run.finish()


# ------------------------------------------------------------------------------------------------
# Model


def make_model(args: argparse.Namespace) -> tuple[GPT, tiktoken.Encoding]:
    """The checkpoint of --init, or a new model that fits the tokenizer; and the tokenizer."""
    options = {"impl": args.kernels, "dtype": args.dtype}
    if args.init:
        changes = {"resid_pdrop": args.resid_pdrop, "score_mod": args.score_mod}
        model = GPT.from_pretrained(args.init, **changes, **options)
        encoding = read_tokenizer(args.init, model)
    else:
        encoding = read_tokenizer(args.tokenizer)
        shape = {key: getattr(args, key) for key in ("n_positions", "n_embd", "n_layer", "n_head")}
        config = GPTConfig(
            vocab_size=encoding.n_vocab,
            eos_token_id=encoding.eot_token,
            resid_pdrop=args.resid_pdrop,
            initializer_range=args.initializer_range,
            score_mod=args.score_mod or "causal",
            **shape,
        )
        model = GPT(config, **options)
        if args.sinusoidal_start:
            model.start_from_sinusoids()
    model.gradient_checkpointing = args.grad_checkpointing
    if args.compile:
        for block in model.h:
            block.compile(dynamic=True)  # of all lengths at once
    return model.to(args.device).train(), encoding


# ------------------------------------------------------------------------------------------------
# Data


def load_demonstrations(
    path: str, encoding: tiktoken.Encoding, args: argparse.Namespace
) -> list[Example]:
    """Demonstrations as tokens: prompt, response, end token (unless cut). Says what was dropped."""
    examples, too_long, cut = [], 0, 0
    for record in read_jsonl(path, "demonstrations"):
        prompt = encode_prompt(encoding, record["prompt"])
        response = encode_response(encoding, record["response"])
        if len(prompt) > args.max_prompt_tokens:
            too_long += 1
            continue
        cut += len(response) > args.max_new_tokens
        examples.append((prompt + response[: args.max_new_tokens], len(prompt)))
    print(
        f"{path}: {len(examples)} demonstrations; dropped {too_long} with a prompt over "
        f"{args.max_prompt_tokens} tokens, cut {cut} responses over {args.max_new_tokens}"
    )
    if not examples:
        raise BadInput(f"{path}: no prompt is within --max_prompt_tokens {args.max_prompt_tokens}")
    return examples


def load_beginnings(
    path: str, encoding: tiktoken.Encoding, length: int
) -> tuple[list[Example], np.ndarray]:
    """Sequences that start where a document does, in a long one also every `length` tokens, and run
    on into the next: prompts, too, are at a sequence's start. And the running sum of the tokens
    that each has of its own document: a sequence is drawn with a probability in proportion to
    them, so short documents are not drawn too often."""
    stream: list[int] = []
    starts: list[tuple[int, int]] = []  # and how many tokens of the document are in the sequence
    for document in read_documents(path):
        tokens = [*encoding.encode_ordinary(document), encoding.eot_token]
        for i in range(0, len(tokens), length):
            starts.append((len(stream) + i, min(length, len(tokens) - i)))
        stream += tokens
    kept = [(first, own) for first, own in starts if first + length <= len(stream)]
    if not kept:
        raise BadInput(f"{path}: {len(stream)} tokens, fewer than the context of {length}")
    return [(stream[i : i + length], 1) for i, _ in kept], np.cumsum([own for _, own in kept])


def load_sequences(
    path: str,
    encoding: tiktoken.Encoding,
    length: int,
    short_tokens: int = 0,
    short_fraction: float = 0.0,
) -> list[Example]:
    """Documents joined by the end token and cut into sequences of `length` tokens. All tokens count
    but the first, which has no context.

    The first `short_fraction` of the text is cut into sequences of `short_tokens` instead.
    """
    stream: list[int] = []
    for document in read_documents(path):
        stream += [*encoding.encode_ordinary(document), encoding.eot_token]
    short, turn = min(short_tokens, length), int(len(stream) * short_fraction)
    cuts = [(i, i + short) for i in range(0, turn - short + 1, short)] if turn else []
    cuts += [(i, i + length) for i in range(turn, len(stream) - length + 1, length)]
    if not cuts:
        raise BadInput(f"{path}: {len(stream)} tokens, fewer than the context of {length}")
    print(f"{path}: {len(stream):,} tokens in {len(cuts):,} sequences of up to {length}")
    return [(stream[first:last], 1) for first, last in cuts]


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


def pretraining_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """A pass over pretraining sequences, the short ones first; batches of equally many tokens.

    Attention heads learn where to look back one position at a time. Short sequences have fewer
    positions to learn, and copying is learned several times sooner.
    """
    batches = []
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        size = batch_size * int(lengths.max()) // int(length)
        batches += [chosen[rows] for rows in epoch_batches(lengths[chosen], size, seed, epoch)]
    return batches


# ------------------------------------------------------------------------------------------------
# Loss


def learning_rate(step: int, total_steps: int, args: argparse.Namespace) -> float:
    """Of step 1, 2, ...: linear warm-up, then a cosine from the peak to 10 % of it (C.1)."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    progress = (step - 1 - args.warmup_steps) / max(1, total_steps - 1 - args.warmup_steps)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def collate(examples: list[Example], model: GPT) -> tuple[Tensor, Tensor, Tensor]:
    """-> tokens (B, T) int64, lengths (B,) int32, loss_mask (B, T) bool."""
    device = model.unembedding.device
    tokens, lengths = pad_right([e[0] for e in examples], model.config.eos_token_id, device)
    skipped = torch.tensor([skip for _, skip in examples], device=device)
    t = torch.arange(tokens.shape[1], device=device)
    return tokens, lengths, (t >= skipped[:, None]) & (t < lengths[:, None])


def sft_loss(model: GPT, tokens: Tensor, lengths: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over the counted tokens of -log p(token | tokens before it), in nats."""
    logprobs, _ = model.logprobs(tokens, lengths, mask=loss_mask)
    return -logprobs.sum()


@torch.no_grad()
def evaluate(model: GPT, examples: list[Example], args: argparse.Namespace) -> float:
    """Mean loss per counted token, in nats, without dropout."""
    model.eval()
    examples = sorted(examples, key=lambda example: len(example[0]))
    total, size = 0.0, 4 * args.micro_batch_size
    for first in range(0, len(examples), size):
        total += sft_loss(model, *collate(examples[first : first + size], model)).item()
    model.train()
    return total / sum(len(tokens) - skipped for tokens, skipped in examples)


if __name__ == "__main__":
    sys.exit(run_command(main, "--micro_batch_size"))
