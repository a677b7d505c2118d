"""Sample from checkpoints: talk to them side by side, or write K responses a prompt to be ranked.

    python sample.py --checkpoints sft=out/sft ppo=out/ppo                       prompts from stdin
    python sample.py --checkpoints sft=out/sft ppo=out/ppo --prompt "what does the fox eat ?"
    python sample.py --data out/data/train/rm_prompts.jsonl --out out/rm_candidates.jsonl \\
        --checkpoints sft=out/sft init=out/init base=out/base --shares 0.7 0.2 0.1 \\
        --num_responses 4 9 --prefix base="good answers :\\n"

The last writes candidates.jsonl: to each prompt K responses, K drawn evenly from the range
(InstructGPT 3.5: K = 4..9), each response from a model drawn by the shares. Which models a prompt
gets depends on --seed and the prompt's line alone. On a CPU the responses do not depend on
--batch_size either, up to rounding; a GPU draws other random numbers for another batch size.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import kernels
from checkpoint import find_model, read_tokenizer
from data.files import (
    BadInput,
    Record,
    check_writable,
    fingerprint,
    read_jsonl,
    remove_leftovers,
    run_command,
    write_atomic,
    write_jsonl,
)
from data.tokenizer import decode_response, encode_prompt
from model import GPT, pad_right

CHUNK = 512  # prompts sampled together; a resumed run repeats at most so many a process


# ------------------------------------------------------------------------------------------------
# Arguments


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoints", nargs="+", required=True, metavar="NAME=FOLDER", help="language models")
    add(
        "--prefix",
        nargs="+",
        default=[],
        metavar="NAME=TEXT",
        help=r"text put before every prompt of that model; \n is a newline",
    )
    add("--prompt", help="answer this one prompt instead of lines from stdin")
    # Candidates for ranking.
    add("--data", help="prompts.jsonl; write candidates to --out instead of talking")
    add("--out", help="candidates.jsonl")
    add(
        "--num_responses",
        type=int,
        nargs="+",
        metavar="K",
        help="responses a prompt, or least and most; 4 9 with --data, else 1",
    )
    add("--shares", type=float, nargs="+", help="share of responses of each checkpoint; even")
    add("--num_prompts", type=int, default=0, help="use only the first so many prompts; 0: all")
    add(
        "--processes",
        type=int,
        default=1,
        help=f"sample --data in parts of {CHUNK} prompts side by side, each process with its share "
        "of the cores and with models of its own; small models use two cores better so",
    )
    add("--resume", action="store_true", help="go on with an interrupted run of the same command")
    # Sampling.
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    add("--max_prompt_tokens", type=int, default=96, help="longer prompts are dropped")
    add("--max_new_tokens", type=int, default=32, help="limit of a response")
    add("--batch_size", type=int, default=256, help="responses sampled at once")
    add("--seed", type=int, default=0, help="of all random draws")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    add("--kernels", type=kernels.implementation, default="auto", help="NAME or OPERATION=NAME")
    args = parser.parse_args(argv)

    args.checkpoints = parse_named(args.checkpoints, "--checkpoints", parser)
    args.prefix = parse_named(args.prefix, "--prefix", parser)
    if unknown := set(args.prefix) - set(args.checkpoints):
        parser.error(f"--prefix {unknown.pop()}: expected a name given in --checkpoints")
    if bool(args.data) != bool(args.out):
        parser.error("--data and --out go together")
    if args.data and args.prompt is not None:
        parser.error("--prompt talks and --data writes candidates: give one of them")
    args.num_responses = args.num_responses or ([4, 9] if args.data else [1])
    low, high = args.num_responses[0], args.num_responses[-1]
    if len(args.num_responses) > 2 or not (2 if args.data else 1) <= low <= high <= 10_000:
        parser.error(
            f"--num_responses {' '.join(map(str, args.num_responses))}: expected one number, or "
            f"the least and the most, from {2 if args.data else 1} to 10000"
        )
    args.shares = args.shares or [1.0] * len(args.checkpoints)
    if len(args.shares) != len(args.checkpoints):
        parser.error(f"--shares: expected {len(args.checkpoints)}, one for each checkpoint")
    if not min(args.shares) >= 0 or not 0 < sum(args.shares) < math.inf:
        parser.error("--shares: expected numbers from 0, not all 0")
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature {args.temperature}: expected 0 or more")
    for name in ("max_prompt_tokens", "max_new_tokens", "batch_size", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    for name in ("num_prompts", "seed"):
        if not 0 <= getattr(args, name) <= 2**32:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 to {2**32}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU; give --device cpu")
    return args


def parse_named(items: list[str], flag: str, parser: argparse.ArgumentParser) -> dict[str, str]:
    """["sft=out/sft", ...] -> {"sft": "out/sft", ...}, in order; no name may come twice."""
    named: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value) or name in named:
            parser.error(f"{flag} {item!r}: expected NAME=VALUE with a name of its own")
        named[name] = value
    return named


# ------------------------------------------------------------------------------------------------
# Models and samples


@dataclass
class Speaker:
    """A language model that answers prompts: weights, tokenizer, and a text before every prompt.

    The prefix is part of what the model sees, not of the prompt that others judge the answer by.
    """

    name: str
    model: GPT
    encoding: tiktoken.Encoding
    prefix: str = ""

    def encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        """Tokens of prefix and prompt; the prefix is left out where the context is too short."""
        tokens = encode_prompt(self.encoding, self.prefix + prompt)
        if len(tokens) + max_new_tokens <= self.model.config.n_positions:
            return tokens
        return encode_prompt(self.encoding, prompt)


@dataclass
class Sample:
    """One response: its text, its tokens (end token included), and whether the end token came."""

    prompt: list[int]  # tokens that the model saw, prefix included
    tokens: list[int]
    text: str
    ended: bool


def load_speaker(
    name: str, folder: str | Path, *, prefix: str = "", device: str = "cpu", impl: str = "auto"
) -> Speaker:
    """Open a checkpoint folder, or a downloaded GPT-2 by its name, for sampling. Raises `BadInput`
    where it is no language model, or has another model's tokenizer."""
    folder = find_model(folder)
    model = GPT.from_pretrained(folder, impl=impl).to(device).eval().requires_grad_(False)
    encoding = read_tokenizer(folder, model)
    return Speaker(name, model, encoding, prefix.replace("\\n", "\n"))


def load_speakers(args: argparse.Namespace) -> list[Speaker]:
    """The models of --checkpoints, in order."""
    return [
        load_speaker(
            name, folder, prefix=args.prefix.get(name, ""), device=args.device, impl=args.kernels
        )
        for name, folder in args.checkpoints.items()
    ]


def check_context(speaker: Speaker, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise `BadInput` unless the longest prompt and response fit into the model's context."""
    context = speaker.model.config.n_positions
    if max_prompt_tokens + max_new_tokens > context:
        raise BadInput(
            f"--max_prompt_tokens {max_prompt_tokens} and --max_new_tokens {max_new_tokens} come "
            f"to more than the context of {speaker.name}, {context}: lower one"
        )


def sample_responses(
    speaker: Speaker,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float32",
    bar: tqdm | None = None,
) -> list[Sample]:
    """One response to each prompt (token lists), in the order of the prompts.

    Batches are of prompts of similar length, so that little padding is computed. One stream of
    random numbers runs through all batches, so that on a CPU the batch size does not matter.
    """
    model, encoding = speaker.model, speaker.encoding
    model.dtype = dtype
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    samples: dict[int, Sample] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # Equal prompts are neighbours, and mostly computed once.
        padded, prompt_lengths = pad_right(
            [prompts[i] for i in rows], model.config.eos_token_id, device
        )
        tokens, lengths = model.generate(
            padded, prompt_lengths, max_new_tokens, temperature=temperature, generator=generator
        )
        for i, row, length in zip(rows, tokens.tolist(), lengths.tolist(), strict=True):
            response = row[len(prompts[i]) : length]
            ended = response[-1:] == [model.config.eos_token_id]
            text = decode_response(encoding, response)
            samples[i] = Sample(prompts[i], response, text, ended)
        if bar is not None:
            bar.update(len(rows))
    return [samples[i] for i in range(len(prompts))]


# ------------------------------------------------------------------------------------------------
# Candidates


def plan(index: int, num_models: int, args: argparse.Namespace) -> np.ndarray:
    """Which model writes each of the K responses to prompt `index`: (K,), from (seed, index)."""
    rng = np.random.default_rng([args.seed, index])
    num = int(rng.integers(args.num_responses[0], args.num_responses[-1] + 1))
    return rng.choice(num_models, size=num, p=np.array(args.shares) / sum(args.shares))


def sample_chunk(
    chunk: list[tuple[int, Record]],
    speakers: list[Speaker],
    args: argparse.Namespace,
    bar: tqdm | None = None,
) -> list[Record]:
    """Candidates for (index, prompt record) pairs, drawn from (seed, first index, model)."""
    plans = {index: plan(index, len(speakers), args) for index, _ in chunk}
    responses: dict[int, list[Sample | None]] = {i: [None] * len(p) for i, p in plans.items()}
    for number, speaker in enumerate(speakers):
        places = [(i, k) for i, p in plans.items() for k in range(len(p)) if p[k] == number]
        encoded = {
            index: speaker.encode(record["prompt"], args.max_new_tokens) for index, record in chunk
        }
        draw = np.random.default_rng([args.seed, chunk[0][0], number, 1])
        samples = sample_responses(
            speaker,
            [encoded[i] for i, _ in places],
            args.max_new_tokens,
            temperature=args.temperature,
            seed=int(draw.integers(2**62)),
            batch_size=args.batch_size,
            dtype=args.dtype,
            bar=bar,
        )
        for (i, k), sample in zip(places, samples, strict=True):
            responses[i][k] = sample
    return [
        record
        | {
            "responses": [sample.text for sample in responses[index]],
            "ended": [sample.ended for sample in responses[index]],
            "models": [speakers[number].name for number in plans[index]],
        }
        for index, record in chunk
    ]


def sample_chunks(
    chunks: list[list[tuple[int, Record]]],
    speakers: list[Speaker],
    args: argparse.Namespace,
    bar: tqdm,
) -> Iterator[list[Record]]:
    """`sample_chunk` of each, in order. What is drawn does not depend on --processes."""
    if args.processes == 1 or len(chunks) < 2:
        yield from (sample_chunk(chunk, speakers, args, bar) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # not fork: torch has threads
    given = args, max(1, torch.get_num_threads() // args.processes)
    with ProcessPoolExecutor(args.processes, context, _start_worker, given) as pool:
        try:
            for records in pool.map(_sample_in_worker, chunks):
                bar.update(sum(len(record["responses"]) for record in records))
                yield records
        except BaseException:  # Ctrl-C, an error in one of them: nobody waits for the others
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_worker: tuple[list[Speaker], argparse.Namespace]  # in a process of `sample_chunks`


def _start_worker(args: argparse.Namespace, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    _worker = load_speakers(args), args
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()  # a parent that is killed tells nobody
    os._exit(1)


def _sample_in_worker(chunk: list[tuple[int, Record]]) -> list[Record]:
    return sample_chunk(chunk, *_worker)


def write_candidates(speakers: list[Speaker], args: argparse.Namespace) -> None:
    """Sample K responses to each prompt of --data and write them to --out.

    Finished chunks lie in a file beside --out until the whole is written at once.
    """
    out = Path(args.out)
    check_writable(out.parent)
    remove_leftovers(out.parent, out.name)
    remove_leftovers(out.parent, f".{out.name}.partial")
    records = read_jsonl(args.data, "prompts")
    records = records[: args.num_prompts or None]
    prompts = [
        (index, record)
        for index, record in enumerate(records)
        if max(len(encode_prompt(speaker.encoding, record["prompt"])) for speaker in speakers)
        <= args.max_prompt_tokens
    ]
    dropped = len(records) - len(prompts)
    if not prompts:
        raise BadInput(
            f"{args.data}: no prompt is within --max_prompt_tokens {args.max_prompt_tokens}"
        )

    # What decides the responses: a part that another command left is not gone on with.
    left_out = ("out", "resume", "batch_size", "processes")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    settings["data_sha256"] = fingerprint(args.data)
    settings["weights_sha256"] = [
        fingerprint(find_model(folder) / "model.safetensors")
        for folder in args.checkpoints.values()
    ]
    partial = out.with_name(f".{out.name}.partial")
    header = json.dumps(settings) + "\n"
    done = read_partial(partial, header) if args.resume else []
    if not done:
        write_atomic(partial, header)
    total = sum(len(plan(index, len(speakers), args)) for index, _ in prompts)
    finished = sum(len(record["responses"]) for record in done)
    with (
        tqdm(total=total, initial=finished, unit="response", desc=out.name) as bar,
        partial.open("a", encoding="utf-8") as stream,
    ):
        starts = range(len(done), len(prompts), CHUNK)
        chunks = [prompts[start : start + CHUNK] for start in starts]
        for chunk in sample_chunks(chunks, speakers, args, bar):
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in chunk)
            stream.flush()
            done += chunk
    write_jsonl(out, done, "candidates")
    partial.unlink()
    ended = sum(sum(record["ended"]) for record in done)
    print(
        f"wrote {out}: {total} responses to {len(done)} prompts, {ended / total:.1%} ended; "
        f"dropped {dropped} prompts over {args.max_prompt_tokens} tokens"
    )


def read_partial(partial: Path, header: str) -> list[Record]:
    """Whole chunks of an interrupted run with these settings; the file is cut back to them."""
    try:
        first, *lines = partial.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError):
        return []
    if first != header:
        raise BadInput(
            f"{partial}: --resume with other settings than the interrupted run; give the old "
            "ones, or start over without --resume"
        )
    whole = [line for line in lines if line.endswith("\n")]
    whole = whole[: len(whole) // CHUNK * CHUNK]
    write_atomic(partial, header + "".join(whole))
    return [json.loads(line) for line in whole]


# ------------------------------------------------------------------------------------------------
# Talk


def answer(prompt: str, turn: int, speakers: list[Speaker], args: argparse.Namespace) -> None:
    """Print the responses of every model to one prompt."""
    width = max(len(speaker.name) for speaker in speakers)
    num = args.num_responses[-1]
    for speaker in speakers:
        length = len(encode_prompt(speaker.encoding, prompt))
        if length > args.max_prompt_tokens:
            raise BadInput(
                f"the prompt has {length} tokens for {speaker.name}, over "
                f"--max_prompt_tokens {args.max_prompt_tokens}: shorten it"
            )
        tokens = speaker.encode(prompt, args.max_new_tokens)
        samples = sample_responses(
            speaker,
            [tokens] * num,
            args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed * 1_000_003 + turn,
            batch_size=args.batch_size,
            dtype=args.dtype,
        )
        for sample in samples:
            text = sample.text.strip("\n").replace("\n", "\n" + " " * (width + 3))
            print(f"{speaker.name:>{width}} | {text}{'' if sample.ended else ' ... (cut)'}")
    print(flush=True)


def talk(speakers: list[Speaker], args: argparse.Namespace) -> None:
    """Answer the lines of stdin, one prompt each, until its end."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("one prompt a line; end with Ctrl-D")
    turn = 0
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if not line.strip():
            continue
        if not interactive:
            print(f"> {line}")
        try:
            answer(line, turn, speakers, args)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        turn += 1


# ------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    speakers = load_speakers(args)
    for speaker in speakers:
        check_context(speaker, args.max_prompt_tokens, args.max_new_tokens)
    if args.data:
        write_candidates(speakers, args)
    elif args.prompt is not None:
        if not args.prompt.strip():
            raise BadInput("--prompt is blank; expected some text")
        answer(args.prompt, 0, speakers, args)
    else:
        talk(speakers, args)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
