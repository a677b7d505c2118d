"""Sample from checkpoints: talk to them side by side, or write K responses a prompt to be ranked.

    python sample.py --checkpoints sft=out/sft ppo=out/ppo                       prompts from stdin
    python sample.py --checkpoints sft=out/sft ppo=out/ppo --prompt "what does the fox eat ?"
    python sample.py --checkpoints sft=out/sft --world out/data/world.json --reward_model out/rm
    python sample.py --world out/data/world.json --prompts                       prompts to paste
    python sample.py --data out/data/train/rm_prompts.jsonl --out out/rm_candidates.jsonl \\
        --checkpoints sft=out/sft init=out/init base=out/base --shares 0.7 0.2 0.1 \\
        --num_responses 4 9 --prefix base="good answers :\\n"

--world adds the truth's marks, with what is true instead of what is false; --reward_model a score.

The last command writes candidates.jsonl: K responses to each prompt, K drawn uniformly from the
range (InstructGPT 3.5: K = 4..9), each from a model drawn by the shares. Which models a prompt gets
depends only on --seed and the prompt's line; on a CPU the responses do not depend on --batch_size
either. --part 1/2 and --part 2/2 write half of the prompts each: together, what one run writes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data import commands, files, outputs
from data.commands import run_command
from data.files import BadInput, Record
from data.flags import Named, natural, nonnegative, part, temperature, whole
from data.stages import progress
from data.tiny.marks import Truth, suggestions
from data.tokenizer import decode_response, encode_prompt

import numpy as np
import tiktoken
import torch

from checkpoint import read_tokenizer
from model import GPT, MISSING_EOS_SCORE, ScalarModel, pad_right
from run import Parser, check_context, model_flags

CHUNK = 512  # prompts sampled together, from random numbers of their own
OF_OTHERS = ("ranks", "labeler", "noise")  # of other responses to a prompt
Judge = Callable[["Speaker", str, "Sample"], str]  # a response to a bare prompt -> words about it


# ------------------------------------------------------------------------------------------------
# Arguments and main


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that samples or scores, those of evaluate.py too."""
    model_flags(parser)
    parser.add_argument("--batch_size", type=natural, default=256, help="responses sampled at once")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    shows_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=shows_defaults)
    add, named = parser.add_argument, {"action": Named, "nargs": "+"}
    add("--checkpoints", **named, default={}, metavar="NAME=FOLDER", help="language models")
    add("--prefix", **named, default={}, metavar="NAME=TEXT", help=r"before prompts; \n: newline")
    add("--prompt", help="answer this one prompt instead of lines from stdin")
    add("--world", help="world.json: print the truth's marks beside each answer")
    add("--reward_model", help="checkpoint folder of train_rm.py: print its score beside each")
    add("--prompts", action="store_true", help="print twenty prompts of --world to choose from")
    # Candidates for ranking.
    add("--data", help="prompts.jsonl; write candidates to --out instead of talking")
    add("--out", help="candidates.jsonl")
    many = "responses a prompt, or least and most; 4 9 with --data, else 1"
    add("--num_responses", type=natural, nargs="+", metavar="K", help=many)
    add("--shares", type=nonnegative, nargs="+", help="of each checkpoint; even")
    add("--num_prompts", type=whole, default=0, help="only the first; 0: all")
    add("--part", type=part, default="1/1", help="2/3: the second of three parts of the prompts")
    # Sampling.
    add("--temperature", type=temperature, default=1.0, help="0: the likeliest token")
    sampling_flags(parser)
    args = parser.parse_args(argv)
    if unknown := set(args.prefix) - set(args.checkpoints):
        parser.error(f"--prefix {unknown.pop()}: expected a name given in --checkpoints")
    if bool(args.data) != bool(args.out):
        parser.error("--data and --out go together")
    if args.data and (args.prompt is not None or args.world or args.reward_model):
        parser.error("--data writes candidates: --prompt, --world and --reward_model are for talk")
    if args.prompts and not args.world or not (args.prompts or args.checkpoints):
        parser.error("expected --checkpoints NAME=FOLDER, or --prompts and --world")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is blank; expected some text")
    args.num_responses = args.num_responses or ([4, 9] if args.data else [1])
    low, high = args.num_responses[0], args.num_responses[-1]
    if len(args.num_responses) > 2 or not (2 if args.data else 1) <= low <= high <= 10_000:
        parser.error("--num_responses: expected one number, or least and most; 2 to 10000 to rank")
    args.shares = args.shares or [1.0] * len(args.checkpoints)
    if len(args.shares) != len(args.checkpoints) or not 0 < sum(args.shares or [1]) < math.inf:
        parser.error(f"--shares: expected {len(args.checkpoints)} numbers, not all 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    if args.prompts:
        print(suggestions(args.world))
        return 0
    if args.data:
        outputs.claim(args.out, "candidates", {"data": args.data, "checkpoints": args.checkpoints})
    how = {"device": args.device, "impl": args.kernels, "dtype": args.dtype}
    judges, named, how["same_as"] = open_judges(args), args.checkpoints.items(), args.reward_model
    speakers = [load_speaker(name, f, args.prefix.get(name, ""), **how) for name, f in named]
    check_context(args, *(speaker.model for speaker in speakers))
    if args.data:
        write_candidates(speakers, args)
    elif args.prompt is not None:
        answer(args.prompt, 0, speakers, judges, args)
    else:
        talk(speakers, judges, args)
    return 0


# ------------------------------------------------------------------------------------------------
# Models and samples


@dataclass
class Speaker:
    """A language model that answers prompts: weights, tokenizer, and a text before every prompt."""

    name: str
    model: GPT
    encoding: tiktoken.Encoding
    prefix: str = ""  # seen by the model, not by those who judge its answers

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
    name: str, folder: str | Path, prefix="", device="cpu", impl="auto", dtype="float32", same_as=""
) -> Speaker:
    """Open a checkpoint folder, or a downloaded GPT-2 by its name, for sampling.

    Raises `BadInput` where the folder is no language model, or has another model's tokenizer: one
    that does not fit it, or is not that of the reward model in the folder `same_as`.
    """
    model = GPT.from_pretrained(folder, impl=impl, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)
    encoding = read_tokenizer(folder, model, same_as=same_as)
    return Speaker(name, model, encoding, prefix.replace("\\n", "\n"))


def sample_responses(
    speaker: Speaker, prompts: list, max_new_tokens: int, temperature=1.0, seed=0, batch_size=256
) -> list[Sample]:
    """One response to each prompt (token lists), in the order of the prompts.

    Batches are of prompts of similar length, so that little padding is computed. One stream of
    random numbers runs through all batches, so that on a CPU the batch size does not matter.
    """
    model, end = speaker.model, speaker.model.config.eos_token_id
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    options = {"temperature": temperature, "generator": generator}
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    samples: dict[int, Sample] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # Equal prompts are neighbours: what they have in common is computed once.
        padded, lengths = pad_right([prompts[i] for i in rows], end, device)
        tokens, lengths = model.generate(padded, lengths, max_new_tokens, **options)
        for i, row, length in zip(rows, tokens.tolist(), lengths.tolist(), strict=True):
            said = row[len(prompts[i]) : length]
            text = decode_response(speaker.encoding, said)
            samples[i] = Sample(prompts[i], said, text, ended=said[-1:] == [end])
    return [samples[i] for i in range(len(prompts))]


def respond(
    speaker: Speaker, prompts: list[str], args: argparse.Namespace, temperature=1.0, seed=None
) -> list[Sample]:
    """One response to each prompt, through the template, after the speaker's prefix, as the flags
    say; --seed unless another is given."""
    encoded = [speaker.encode(prompt, args.max_new_tokens) for prompt in prompts]
    how = {"temperature": temperature, "batch_size": args.batch_size}
    seed = args.seed if seed is None else seed
    return sample_responses(speaker, encoded, args.max_new_tokens, seed=seed, **how)


# ------------------------------------------------------------------------------------------------
# Candidates


def write_candidates(speakers: list[Speaker], args: argparse.Namespace) -> None:
    """Sample K responses to each prompt of --data and write them to --out, all at once."""
    out, limit = Path(args.out), args.max_prompt_tokens
    records = files.read_jsonl(args.data, "prompts")[: args.num_prompts or None]
    records = [{k: v for k, v in record.items() if k not in OF_OTHERS} for record in records]

    def fits(prompt: str) -> bool:
        return all(len(encode_prompt(s.encoding, prompt)) <= limit for s in speakers)

    prompts = [(i, record) for i, record in enumerate(records) if fits(record["prompt"])]
    if not prompts:
        raise BadInput(f"{args.data}: no prompt is within --max_prompt_tokens {limit}")
    starts, (part, parts) = range(0, len(prompts), CHUNK), args.part
    mine = starts[(part - 1) * len(starts) // parts : part * len(starts) // parts]
    done: list[Record] = []
    for start in progress(mine, out.name, "chunk"):
        done += sample_chunk(prompts[start : start + CHUNK], speakers, args)
    files.write_jsonl(out, done, "candidates")
    ended = [end for record in done for end in record["ended"]]
    print(f"dropped {len(records) - len(prompts)} prompts over {limit} tokens")
    print(f"wrote {out}: {len(ended)} responses to {len(done)} prompts, {sum(ended)} ended")


def sample_chunk(
    chunk: list[tuple[int, Record]], speakers: list[Speaker], args: argparse.Namespace
) -> list[Record]:
    """Candidates for (index, prompt record) pairs, drawn from (seed, first index, model)."""
    done = []
    for index, record in chunk:
        models = plan(index, len(speakers), args)
        names, K = [speakers[number].name for number in models], len(models)
        done.append(record | {"responses": [""] * K, "ended": [False] * K, "models": names})
    for number, speaker in enumerate(speakers):
        mine = [(r, k) for r in done for k, name in enumerate(r["models"]) if name == speaker.name]
        seed = np.random.default_rng([args.seed, chunk[0][0], number, 1]).integers(2**62)
        prompts = [record["prompt"] for record, _ in mine]
        samples = respond(speaker, prompts, args, args.temperature, int(seed))
        for (record, k), sample in zip(mine, samples, strict=True):
            record["responses"][k], record["ended"][k] = sample.text, sample.ended
    return done


def plan(index: int, num_models: int, args: argparse.Namespace) -> np.ndarray:
    """Which model writes each of the K responses to prompt `index`: (K,), from (seed, index)."""
    rng = np.random.default_rng([args.seed, index])
    num = int(rng.integers(args.num_responses[0], args.num_responses[-1] + 1))
    return rng.choice(num_models, size=num, p=np.array(args.shares) / sum(args.shares))


# ------------------------------------------------------------------------------------------------
# Talk


def open_judges(args: argparse.Namespace) -> list[Judge]:
    """What tells good answers from bad ones: a reward model, the tiny world's truth, or neither."""
    judges: list[Judge] = []
    if args.reward_model:
        how = {"impl": args.kernels, "dtype": args.dtype}
        model = ScalarModel.from_pretrained(args.reward_model, **how).to(args.device).frozen()
        check_context(args, model)

        def score(speaker: Speaker, prompt: str, sample: Sample) -> str:
            tokens = encode_prompt(speaker.encoding, prompt) + sample.tokens
            row = pad_right([tokens], 0, args.device)
            by_rule, raw, _ = model.response_scores(*row, MISSING_EOS_SCORE)
            cut = "" if sample.ended else f" (no end; the reward model says {raw.item():+.2f})"
            return f"score {by_rule.item():+.2f}{cut}"

        judges.append(score)
    if args.world:
        truth = Truth(args.world)
        judges.append(lambda _, prompt, sample: truth.marks(prompt, sample.text, sample.ended))
    return judges


def answer(
    prompt: str, turn: int, speakers: list[Speaker], judges: list[Judge], args: argparse.Namespace
) -> None:
    """Print the responses of every model to one prompt, below each what the judges say."""
    width, limit = max(len(speaker.name) for speaker in speakers), args.max_prompt_tokens
    indent = " " * (width + 3)
    for speaker in speakers:
        if (length := len(encode_prompt(speaker.encoding, prompt))) > limit:
            over = f"over --max_prompt_tokens {limit}: shorten it"
            raise BadInput(f"the prompt has {length} tokens for {speaker.name}, {over}")
        prompts, seed = [prompt] * args.num_responses[-1], args.seed * 1_000_003 + turn
        for sample in respond(speaker, prompts, args, args.temperature, seed):
            text = commands.printable(sample.text.strip("\n")).replace("\n", "\n" + indent)
            print(f"{speaker.name:>{width}} | {text}{'' if sample.ended else ' ... (cut)'}")
            if judges:
                print(f"{indent}({', '.join(say(speaker, prompt, sample) for say in judges)})")
    print(flush=True)


def talk(speakers: list[Speaker], judges: list[Judge], args: argparse.Namespace) -> None:
    """Answer the lines of stdin, one prompt each, until its end."""
    interactive = sys.stdin.isatty()
    if interactive:
        hint = f"; for some to paste: --prompts --world {args.world}" if args.world else ""
        print(f"one prompt a line; end with Ctrl-D{hint}")
    lines = iter(lambda: input("> " if interactive else ""), None)
    with suppress(EOFError):  # of input, at the end
        for turn, line in enumerate(filter(str.strip, lines)):
            if not interactive:
                print(f"> {commands.printable(line)}")
            try:
                answer(line, turn, speakers, judges, args)
            except BadInput as error:
                print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
