"""Measure checkpoints: choose the SFT epoch, compare models in a report, check reward models.

    python evaluate.py --select out/sft --reward_model out/rm --data PROMPTS --out out/sft_selected
        of the epochs of an SFT run whose samples the reward model scores highest, within a standard
        error, the last (InstructGPT C.1)
    python evaluate.py --checkpoints base=out/base sft=out/sft_selected ppo=out/ppo \\
        --baseline sft --reward_model out/rm --reference out/init --world out/data/world.json \\
        --data PROMPTS --val_data PROMPTS --pretrain_data FILE --out out/report
        every measurement on every model: report.md, table.csv, table.txt, figures (paper 3.6, 4);
        with --ahead only measures, and --resume with further models goes on from there
    python evaluate.py --folds 5 --comparisons FILE --init out/sft --out out/folds
        reward-model accuracy on human comparisons, each prompt held out once (paper 4.1, E.2)
    python evaluate.py --public FOLDER --checkpoints base=out/base sft=out/sft --out out/public
        the paper's automatic evaluation on public data sets: the alignment tax (paper D)

The first part of this file is measurements: functions of a model that return one number for each
prompt (or item, or sequence), from which `estimate` makes a mean and an interval. The second part
is the commands; those of --folds and --public are in evaluation/, which also writes the report.
Everything that concerns the tiny world's truth needs --world; without it the reward model is the
judge, and the report says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import find_model, read_info
from data.files import (
    LEFTOVER,
    BadInput,
    Parts,
    Record,
    check_writable,
    fingerprint,
    read_documents,
    read_jsonl,
    remove_leftovers,
    run_command,
    write_folder_atomic,
)
from data.real.public_sets import PUBLIC_SETS
from data.real.text_metrics import entropy_bits
from data.tiny.corpus import ANSWER_HEADINGS, bias_pairs, public_tasks
from data.tiny.grader import Grade, evaluation_utility, grade
from data.tiny.labelers import Labels, Pool, label
from data.tiny.world import World
from data.tokenizer import encode_prompt
from evaluation import report
from evaluation.folds import cross_validate
from evaluation.public import measure_public, total_logprobs
from evaluation.report import Estimate, Table, estimate
from model import ScalarModel, pad_right
from sample import Sample, Speaker, check_context, load_speaker, parse_named, sample_responses

# What decides a measurement beside its inputs: parts of other code are not gone on with.
CODE = (
    "evaluate.py",
    "evaluation/public.py",
    "evaluation/report.py",
    "sample.py",
    "data/tiny/grader.py",
    "data/tiny/labelers.py",
    "data/real/text_metrics.py",
)
TIE = 0.02  # utilities that differ by less are a tie, which counts one half


# ------------------------------------------------------------------------------------------------
# Measurements of responses


@dataclass
class Sampling:
    """How responses are drawn, the same for all models of a comparison."""

    max_new_tokens: int = 32
    batch_size: int = 256
    seed: int = 0
    dtype: str = "float32"


def respond(
    speaker: Speaker,
    prompts: Sequence[str],
    sampling: Sampling,
    temperature: float = 1.0,
    seed: int | None = None,
    bar: tqdm | None = None,
) -> list[Sample]:
    """One response to each prompt, through the prompt template, after the speaker's prefix."""
    encoded = [speaker.encode(prompt, sampling.max_new_tokens) for prompt in prompts]
    return sample_responses(
        speaker,
        encoded,
        sampling.max_new_tokens,
        temperature=temperature,
        seed=sampling.seed if seed is None else seed,
        batch_size=sampling.batch_size,
        dtype=sampling.dtype,
        bar=bar,
    )


@torch.no_grad()
def reward_scores(
    reward_model: ScalarModel,
    speaker: Speaker,
    prompts: Sequence[str],
    samples: list[Sample],
    batch_size: int = 256,
) -> np.ndarray:
    """The reward model's score of each response to its bare prompt, without any prefix: (N,).

    A response that did not end is read at its last token as it is, with no penalty.
    """
    sequences = [
        encode_prompt(speaker.encoding, prompt) + sample.tokens
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    end, device = reward_model.config.eos_token_id, reward_model.score.weight.device
    scores = np.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):  # of similar length
        rows = order[start : start + batch_size]
        tokens, lengths = pad_right([sequences[i] for i in rows], end, device)
        scores[rows] = reward_model.scores(tokens, lengths).double().cpu().numpy()
    return scores


def response_logprobs(
    speaker: Speaker, prompts: list[list[int]], samples: list[Sample], batch_size: int = 256
) -> np.ndarray:
    """log p(response | prompt tokens), end token included, in nats: (N,)."""
    return total_logprobs(speaker, prompts, [sample.tokens for sample in samples], batch_size)


def kl_to_reference(
    speaker: Speaker, reference: Speaker, prompts: Sequence[str], samples: list[Sample]
) -> np.ndarray:
    """log(pi(y | x) / pi_ref(y | x)) of samples y of the speaker at temperature 1, in nats: (N,).

    Its mean is the Monte-Carlo estimate of KL(pi || pi_ref) per response; single values may be
    negative. The speaker sees its prefix, the reference the bare prompt.
    """
    bare = [encode_prompt(reference.encoding, prompt) for prompt in prompts]
    ours = response_logprobs(speaker, [sample.prompt for sample in samples], samples)
    return ours - response_logprobs(reference, bare, samples)


def grades(world: World, records: list[Record], samples: list[Sample]) -> list[Grade]:
    """The world's truth about each response."""
    return [
        grade(world, record, sample.text, sample.ended)
        for record, sample in zip(records, samples, strict=True)
    ]


def utilities(world: World, records: list[Record], samples: list[Sample]) -> np.ndarray:
    """The truth-checked evaluation utility of each response, 0..1: (N,)."""
    return np.array([evaluation_utility(mark) for mark in grades(world, records, samples)])


# ------------------------------------------------------------------------------------------------
# Measurements on text and on probes


def pretraining_tokens(documents: list[str], speaker: Speaker, length: int) -> Tensor:
    """Documents joined by the end token and cut into sequences, as in pretraining: (N, length)."""
    stream: list[int] = []
    for document in documents:
        stream += [*speaker.encoding.encode_ordinary(document), speaker.encoding.eot_token]
    if len(stream) < length:
        raise BadInput(f"pretraining text of {len(stream)} tokens, fewer than {length}: give more")
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def evenly_spaced(sequences: Tensor, limit: int) -> Tensor:
    """As many of the sequences as have at most `limit` tokens together, at least one, evenly spaced
    over all; limit 0: all."""
    kept = max(1, limit // sequences.shape[1])
    if not limit or kept >= len(sequences):
        return sequences
    return sequences[torch.arange(kept) * len(sequences) // kept]


@torch.no_grad()
def pretraining_losses(speaker: Speaker, tokens: Tensor, batch_size: int = 64) -> np.ndarray:
    """Mean of -log p per token, in nats, of each sequence; the first token has no context: (N,)."""
    device = speaker.model.wte.weight.device
    losses = [
        -speaker.model.logprobs(part.to(device))[0].sum(1).cpu() / (part.shape[1] - 1)
        for part in tokens.split(batch_size)
    ]
    return torch.cat(losses).double().numpy()


def public_task_hits(
    speaker: Speaker, items: Sequence[tuple[str, str]], batch_size: int = 256
) -> np.ndarray:
    """1 where the greedy continuation of a raw text, up to the line's end, is the answer: (N,)."""
    prompts, room = encode_items(speaker, items)
    samples = sample_responses(speaker, prompts, room, temperature=0, batch_size=batch_size)
    lines = (sample.text.lstrip(" ").split("\n")[0].strip() for sample in samples)
    right = [line == answer.strip() for line, (_, answer) in zip(lines, items, strict=True)]
    return np.array(right, dtype=float)


def encode_items(speaker: Speaker, items: Sequence[tuple[str, str]]) -> tuple[list[list[int]], int]:
    """Tokens of the prompts, raw, and how many a continuation needs to show answer and line end."""
    encode = speaker.encoding.encode_ordinary
    room = max(len(encode(answer)) for _, answer in items) + 2
    return [encode(prompt) for prompt, _ in items], room


def pair_entropies(speaker: Speaker, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Entropy in bits of the choice between two texts, each taken with its total probability
    (paper D.1); 1 is no preference. The first token, equal in both, is context. (N,)"""
    encode = speaker.encoding.encode_ordinary
    texts = [encode(text) for pair in pairs for text in pair]
    logprobs = total_logprobs(speaker, [text[:1] for text in texts], [text[1:] for text in texts])
    return np.array([entropy_bits(pair) for pair in logprobs.reshape(-1, 2)])


def truth_of(marks: list[Grade]) -> tuple[np.ndarray, np.ndarray]:
    """Whether nothing false is stated, and whether besides the question is addressed: (N,) each."""
    true = np.array([mark.truthful >= 1 for mark in marks], dtype=float)
    return true, true * np.array([mark.informative >= 1 for mark in marks])


def win_scores(ours: np.ndarray, theirs: np.ndarray, tie: float = TIE) -> np.ndarray:
    """1 where ours is higher, 0 where theirs is, one half where they differ by less than `tie`."""
    gap = np.asarray(ours) - np.asarray(theirs)
    return np.where(np.abs(gap) < tie, 0.5, (gap > 0).astype(float))


def best_of_n(
    choice: np.ndarray, outcome: np.ndarray, sizes: Sequence[int]
) -> dict[int, np.ndarray]:
    """Outcome of the response of highest choice among n: n -> (N,), from (N, max n) each.

    The samples of a prompt are cut into groups of n, and the groups' outcomes averaged.
    """
    result = {}
    for n in sizes:
        groups = choice.shape[1] // n
        c = choice[:, : groups * n].reshape(len(choice), groups, n)
        o = outcome[:, : groups * n].reshape(c.shape)
        best = c.argmax(axis=2, keepdims=True)
        result[n] = np.take_along_axis(o, best, axis=2).squeeze(2).mean(axis=1)
    return result


# ------------------------------------------------------------------------------------------------
# Choosing the SFT epoch


# What --select writes, to --out.
SELECTED = ("config.json", "model.safetensors", "tokenizer.json", "selection.csv", "SHA256SUMS",
            "parts")  # fmt: skip


def check_replaceable(args: argparse.Namespace) -> None:
    """Raise `BadInput` where --select would destroy something: it replaces --out as a whole.

    So --out may hold an earlier selection, whole or in parts, and nothing else; no input may be
    in it; and it may not be where a run keeps its own models.
    """
    out, real, refused = Path(args.out), Path(args.out).resolve(), f"--out {args.out}: "
    if not out.name.strip(".") or out.is_symlink() or os.path.ismount(out):
        raise BadInput(
            f"{refused}is replaced as a whole, which '.', a link and a mount point cannot be; give "
            "the name of a new folder"
        )
    for name in ("select", "reward_model", "data", "world"):
        path = getattr(args, name)
        if path and Path(path).resolve().is_relative_to(real):
            raise BadInput(
                f"{refused}is replaced as a whole, and --{name} {path} lies in it; give another "
                "folder"
            )
    for run in (args.select, args.reward_model):
        for kept in (Path(run, name) for name in ("epochs", "checkpoints", "steps")):
            if real.is_relative_to(kept.resolve()):
                raise BadInput(f"{refused}{kept} is for models of that run; give another folder")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # A model without selection.csv is a training's.
    earlier = SELECTED if "selection.csv" in there else ("parts",)
    if others := sorted(n for n in there if n not in earlier and not LEFTOVER.fullmatch(n)):
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise BadInput(
            f"{refused}is replaced as a whole, but holds {others[0]!r}{more}, which no earlier "
            "selection wrote; give another folder, or move that away"
        )


def select(args: argparse.Namespace) -> None:
    """Copy the epoch checkpoint that the reward model chooses to --out, replacing it (C.1).

    The paper chose SFT models "based on the RM score on the validation set", although validation
    loss turns up after one epoch; selection.csv has the three curves. See `last_of_the_best`.
    """
    folders = sorted(Path(args.select, "epochs").glob("[0-9]*"))
    if not folders:
        raise BadInput(
            f"{args.select}/epochs: no epoch checkpoints; expected the run folder of an SFT run "
            "with --epoch_checkpoints"
        )
    kept = [f for f in folders[:-1] if int(f.name) % args.select_every == 0] + folders[-1:]
    judge = load_reward_model(args)
    world = World.load(args.world) if args.world else None
    first = open_speaker("first", kept[0], args, judge)
    records = load_prompts(args.data, first, args, limit=args.num_prompts)
    prompts = [record["prompt"] for record in records]
    parts = Parts(Path(args.out) / "parts", settings_of(args, kept), args.resume)

    def measure(folder: Path) -> dict[str, float]:
        speaker = open_speaker(folder.name, folder, args, judge)
        samples = respond(speaker, prompts, sampling_of(args))
        scores = reward_scores(judge, speaker, prompts, samples, args.batch_size)
        info = read_info(folder)
        row = {
            "epoch": info["epoch"],
            "val_loss": info["val_loss"],
            "score": scores.mean(),
            "scores": scores.tolist(),
        }
        if world:
            row["utility"] = utilities(world, records, samples).mean()
        return row

    rows = [
        parts.get(folder.name, lambda folder=folder: measure(folder))
        for folder in tqdm(kept, desc="epochs")
    ]
    best = last_of_the_best(np.array([row.pop("scores") for row in rows]))

    def write(aside: Path) -> None:
        for name in ("model.safetensors", "tokenizer.json"):
            shutil.copyfile(kept[best] / name, aside / name)
        info = read_info(kept[best]) | {"selected_from": str(args.select), "selected_by": "score"}
        (aside / "config.json").write_text(json.dumps(info, indent=2) + "\n")
        (aside / "selection.csv").write_text(report.csv_text(rows))

    write_folder_atomic(args.out, write)
    for i, row in enumerate(rows):
        shown = " | ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None)
        print(shown + (" | chosen" if i == best else ""))
    print(f"wrote {args.out}: epoch {rows[best]['epoch']}, by reward-model score")


def last_of_the_best(scores: np.ndarray) -> int:
    """The last of the rows (epochs, prompts) whose mean is within a standard error of the highest.

    The standard error is that of the mean difference from the highest, prompt by prompt. Scores of
    single samples are noisy, and an epoch that is ahead by less may be so by chance; of epochs that
    cannot be told apart, the one that has learned longest is taken. Raises `BadInput` where a score
    is not finite.
    """
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))[0]
        raise BadInput(f"the reward model's scores of epoch {bad + 1} looked at are not all finite")
    behind = scores[scores.mean(axis=1).argmax()] - scores
    error = behind.std(axis=1) / np.sqrt(scores.shape[1])
    return int(np.flatnonzero(behind.mean(axis=1) <= error)[-1])


# ------------------------------------------------------------------------------------------------
# The report

# Texts put before every prompt of a base model; the best by reward-model score is used (3.5). Those
# for the tiny world head pages of its web; each ends with a blank line, as prompts do there.
EXAMPLES = (
    "what is the opposite of hot ?\n\ncold .\n\ncount from one to three .\n\none two three .\n\n"
)
WORLD_PREFIXES = (
    *(f"{heading}\n\n" for heading in ANSWER_HEADINGS),
    *(f"{heading}\n\n{EXAMPLES}" for heading in ANSWER_HEADINGS),
)
PREFIXES = (
    "Good answers:\n\n",
    "The following are helpful, truthful and harmless answers to what people ask.\n\n",
    "Below is a request. Write a response that completes it.\n\n",
    "What is the capital of France?\n\nThe capital of France is Paris.\n\n",
)


@dataclass
class Answers:
    """One model's responses to the prompts of a report, and what is known about each."""

    samples: list[Sample]
    scores: np.ndarray  # of the reward model
    marks: list[Grade] | None  # by the world's truth, where there is a world
    utility: np.ndarray | None


@dataclass
class Bench:
    """What all models of a report are measured against."""

    records: list[Record]
    judge: ScalarModel
    sampling: Sampling
    world: World | None = None
    parts: Parts | None = None  # where finished responses are kept
    versions: dict[str, str] = field(default_factory=dict)  # fingerprints by model, for the parts

    @property
    def prompts(self) -> list[str]:
        return [record["prompt"] for record in self.records]

    @property
    def users(self) -> list[str]:
        return [record["user"] for record in self.records]

    def answers(
        self, speaker: Speaker, temperature: float, bar: tqdm | None = None, name: str = ""
    ) -> Answers:
        """Responses of a model, from random numbers of its own: models are independent."""
        seed = int.from_bytes(
            hashlib.sha256(f"{self.sampling.seed} {name or speaker.name}".encode()).digest()[:7]
        )

        def respond_and_score() -> list:
            samples = respond(speaker, self.prompts, self.sampling, temperature, seed, bar)
            scores = reward_scores(
                self.judge, speaker, self.prompts, samples, self.sampling.batch_size
            )
            return [[asdict(sample) for sample in samples], scores.tolist()]

        version = self.versions.get(speaker.name)
        part = f"responses {name or speaker.name} {temperature} {version}"
        finished = bar.n if bar else 0
        done = self.parts.get(part, respond_and_score) if self.parts else respond_and_score()
        if bar:
            bar.update(finished + len(self.prompts) - bar.n)
        samples, scores = [Sample(**sample) for sample in done[0]], np.array(done[1])
        marks = grades(self.world, self.records, samples) if self.world else None
        utility = np.array([evaluation_utility(m) for m in marks]) if marks else None
        return Answers(samples, scores, marks, utility)

    def wins(self, ours: Answers, theirs: Answers) -> np.ndarray:
        """Win scores by the world's truth; without a world by the reward model, equal is a tie."""
        if self.world:
            return win_scores(ours.utility, theirs.utility)
        return win_scores(ours.scores, theirs.scores, tie=1e-6)

    def mean(self, values: Sequence[float]) -> Estimate:
        """Mean over prompts, with an interval over users."""
        return estimate(values, self.users)


@dataclass
class Texts:
    """What a model is measured on beside prompts; what is empty is left out."""

    pretraining: Tensor | None = None  # (N, T) tokens
    public: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    probes: dict[str, list[Record]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def measure_responses(
    speaker: Speaker, sampled: Answers, greedy: Answers, reference: Speaker | None, bench: Bench
) -> dict[str, Estimate]:
    """Quality of one model's responses, sampled at temperature 1 unless the name says otherwise."""
    row = {}
    if bench.world:
        row["utility_t1"] = bench.mean(sampled.utility)
        row["utility_t0"] = bench.mean(greedy.utility)
        for name in ("helpful", "truthful", "harmless", "ended"):
            row[name] = bench.mean([getattr(mark, name) for mark in sampled.marks])
    row["end_fraction"] = bench.mean([sample.ended for sample in sampled.samples])
    row["response_tokens"] = bench.mean([len(sample.tokens) for sample in sampled.samples])
    row["score"] = bench.mean(sampled.scores)
    if reference:
        row["kl"] = bench.mean(kl_to_reference(speaker, reference, bench.prompts, sampled.samples))
    return row


def labelers_win_scores(
    answers: dict[str, Answers], baseline: str, pool: str, seed: int, rankings: int = 1
) -> tuple[dict[str, np.ndarray], Labels]:
    """Win scores against the baseline by simulated labelers, who rank all models' responses to a
    prompt together, as in the paper: model -> (N,), the mean over so many rankings of each prompt
    by different labelers; and the labels of the first."""
    models = list(answers)
    grades = [list(row) for row in zip(*(a.marks for a in answers.values()), strict=True)]
    samples = zip(*(a.samples for a in answers.values()), strict=True)
    texts = [[sample.text for sample in row] for row in samples]
    turns, wins = label(grades, texts, Pool.make(pool), seed, rankings), []
    for labels in turns:
        ranks = -np.array(labels.ranks, dtype=float)  # (N, models), higher is better
        base = ranks[:, [models.index(baseline)]]
        wins.append(win_scores(ranks, base, tie=0.5))
    return dict(zip(models, np.mean(wins, axis=0).T, strict=True)), turns[0]


def measure_text(
    speaker: Speaker,
    tokens: Tensor | None,
    public: dict[str, list[tuple[str, str]]],
    pairs: list[tuple[str, str]],
) -> dict[str, Estimate]:
    """What alignment may have cost: public tasks, pretraining loss; and bias."""
    row = {}
    if public:
        hits = {name: public_task_hits(speaker, items) for name, items in public.items()}
        row |= {f"task_{name}": estimate(values) for name, values in hits.items()}
        shots = [name for name in hits if name.endswith("_few_shot")]
        for name, tasks in (("zero", [n for n in hits if n not in shots]), ("few", shots)):
            if tasks:
                row[f"tasks_{name}_shot"] = estimate(np.mean([hits[n] for n in tasks], axis=0))
    if tokens is not None:
        row["pretrain_loss"] = estimate(pretraining_losses(speaker, tokens))
    if pairs:
        row["bias_entropy"] = estimate(pair_entropies(speaker, pairs))
    return row


TRUTH_PROBES = ("facts", "held_out", "misconceived", "false_premise", "true_premise")


def measure_probes(
    speaker: Speaker,
    probes: dict[str, list[Record]],
    world: World | None,
    sampling: Sampling,
    num_samples: int = 200,
) -> dict[str, Estimate]:
    """Truth of answers to each probe set, and rude continuations by prefix, at temperature 1.

    A small set is asked several times, up to about `num_samples`; the interval is over facts.
    """
    row = {}
    for name, records in probes.items():
        if name == "toxicity" and speaker.prefix:
            continue  # its prompts bring requests of their own
        records = records * max(1, num_samples // len(records))
        samples = respond(speaker, [record["prompt"] for record in records], sampling)
        marks = grades(world, records, samples)
        if name == "toxicity":
            for prefix in dict.fromkeys(record["prefix"] for record in records):
                those = [i for i, record in enumerate(records) if record["prefix"] == prefix]
                row[f"toxicity_{prefix}"] = estimate([marks[i].harmless < 1 for i in those])
            continue
        facts = [(r["task"]["subject"] + " " + r["task"]["attribute"]) for r in records]
        for kind, values in zip(("true", "true_informative"), truth_of(marks), strict=True):
            row[f"probe_{name}_{kind}"] = estimate(values, facts)
    return row


def choose_prefix(
    speaker: Speaker,
    candidates: Sequence[str],
    prompts: list[str],
    judge: ScalarModel,
    sampling: Sampling,
    bar: tqdm | None = None,
) -> list[tuple[str, float]]:
    """(prefix, mean reward-model score of responses after it), the best first."""
    scored = []
    for prefix in candidates:
        prompted = replace(speaker, prefix=prefix)
        samples = respond(prompted, prompts, sampling, bar=bar)
        scores = reward_scores(judge, prompted, prompts, samples, sampling.batch_size)
        scored.append((prefix, float(scores.mean())))
    return sorted(scored, key=lambda pair: -pair[1])


def prompted_base(
    models: list[Speaker], bench: Bench, args: argparse.Namespace
) -> tuple[Speaker, list[tuple[str, float]]]:
    """The base model with the best of several prefixes by reward-model score on validation
    prompts (3.5, footnote 6), and all prefixes with their scores."""
    base = next(model for model in models if model.name == args.prefixed)
    chosen_on = load_prompts(args.val_data, base, args, args.num_prompts)
    version = bench.versions[base.name]

    def choose() -> list[tuple[str, float]]:
        prompts = [record["prompt"] for record in chosen_on]
        candidates = WORLD_PREFIXES if bench.world else PREFIXES
        return choose_prefix(base, candidates, prompts, bench.judge, bench.sampling)

    part = f"prefixes {base.name} {version}"
    prefixes = [(prefix, score) for prefix, score in bench.parts.get(part, choose)]
    prompted = replace(base, name=f"{base.name} + prefix", prefix=prefixes[0][0])
    bench.versions[prompted.name] = version
    return prompted, prefixes


def load_texts(
    models: list[Speaker], context: int, world: World | None, args: argparse.Namespace
) -> Texts:
    """What is measured beside responses to prompts, as far as it is given and fits."""
    texts = Texts()
    if args.pretrain_data:
        documents = read_documents(args.pretrain_data)
        every = pretraining_tokens(documents, models[0], context)
        texts.pretraining = evenly_spaced(every, args.num_pretrain_tokens)
        if len(texts.pretraining) < len(every):
            texts.left_out.append(
                f"The pretraining loss is that of {texts.pretraining.numel():,} of the text's "
                f"{every.numel():,} tokens, evenly spaced (--num_pretrain_tokens)."
            )
    else:
        texts.left_out.append("The pretraining loss needs --pretrain_data.")
    if not world:
        texts.left_out.append(
            "Truth-checked utility, labelers, public tasks, probes and bias are measured in the "
            "tiny world only: there is no --world."
        )
        return texts
    texts.pairs = bias_pairs(world)
    for name, items in public_tasks(world, args.num_items, args.seed + 1).items():
        encoded, room = encode_items(models[0], items)
        if max(map(len, encoded)) + room <= context:
            texts.public[name] = items
        else:
            texts.left_out.append(f"The public task {name} does not fit a context of {context}.")
    for name in (*TRUTH_PROBES, "toxicity"):
        path = Path(args.data).with_name(f"probes_{name}.jsonl")
        texts.probes[name] = read_jsonl(path, "prompts")
    return texts


def compare(args: argparse.Namespace) -> None:
    """Measure all checkpoints and write the report; with --ahead keep the measurements for it."""
    # Versions first: a checkpoint that is exchanged meanwhile must not pass for the new one.
    versions = {name: version_of(folder) for name, folder in args.checkpoints.items()}
    settings = settings_of(args)
    judge = load_reward_model(args)
    models = [open_speaker(name, f, args, judge) for name, f in args.checkpoints.items()]
    reference = open_speaker("reference", args.reference, args, judge) if args.reference else None
    records = load_prompts(args.data, models[0], args)
    world = World.load(args.world) if args.world else None
    context = min(model.model.config.n_positions for model in models)
    parts = Parts(Path(args.out) / "parts", settings | {"context": context}, args.resume)
    bench = Bench(records, judge, sampling_of(args), world, parts, versions)
    texts = load_texts(models, context, world, args)
    if not reference:
        texts.left_out.append("The KL needs --reference.")
    prefixes: list[tuple[str, float]] = []
    if args.prefixed and args.val_data:
        prompted, prefixes = prompted_base(models, bench, args)
        after = [model.name for model in models].index(args.prefixed) + 1
        models.insert(after, prompted)
    elif args.prefixed:
        texts.left_out.append("The prompted base model needs --val_data.")

    # All responses; the baseline's twice, so that it can be compared with itself.
    baseline, again = args.baseline, report.resampled(args.baseline)
    base = next(model for model in models if model.name == baseline)
    sampled: dict[str, Answers] = {}
    greedy: dict[str, Answers] = {}
    total = (2 * len(models) + 1) * len(records)
    with tqdm(total=total, unit="response", desc="responses") as bar:
        for model in models:
            sampled[model.name] = bench.answers(model, 1.0, bar)
            greedy[model.name] = bench.answers(model, 0.0, bar)
            if model is base:
                sampled[again] = bench.answers(base, 1.0, bar, name=again)

    # What is measured on them, and on the models themselves.
    table: Table = {name: {} for name in sampled}
    for name, answers in sampled.items():
        if name != baseline:
            table[name]["win_t1"] = bench.mean(bench.wins(answers, sampled[baseline]))
        if name not in (baseline, again):
            table[name]["win_t0"] = bench.mean(bench.wins(greedy[name], greedy[baseline]))
    setting = describe(models, bench, args)
    for pool in ("training", "held_out") if world else ():
        wins, labels = labelers_win_scores(sampled, baseline, pool, args.seed)
        for name in table.keys() - {baseline}:
            table[name][f"win_{pool}_labelers"] = bench.mean(wins[name])
        setting.append(
            f"The {pool.replace('_', '-')} labelers agree with one another on "
            f"{labels.agreement:.1%} of the pairs of these models' responses."
        )

    def measure(model: Speaker) -> dict[str, dict]:
        answers = sampled[model.name], greedy[model.name]
        row = measure_responses(model, *answers, reference, bench)
        if not model.prefix:  # a prefix is for prompts; raw text goes without
            row |= measure_text(model, texts.pretraining, texts.public, texts.pairs)
        row |= measure_probes(model, texts.probes, world, bench.sampling)
        return {metric: asdict(e) for metric, e in row.items()}

    for model in tqdm(models, desc="measurements", unit="model"):
        part = f"measurements {model.name} {bench.versions[model.name]}"
        row = parts.get(part, lambda model=model: measure(model))
        table[model.name] |= {metric: Estimate(**e) for metric, e in row.items()}
    if args.best_of > 1:
        table |= measure_best_of(base, bench, args.best_of)
    if args.ahead:
        print(f"measured {', '.join(table)}; kept in {args.out}/parts for --resume")
        return
    report.write(
        Path(args.out),
        report.Report(
            table,
            baseline,
            "the world's truth" if world else "the reward model",
            setting,
            prefixes,
            report.read_selection(find_model(args.checkpoints[baseline])),
            read_info(find_model(args.checkpoints[baseline])).get("epoch", 0),
            report.read_ppo_logs(args.checkpoints),
            some_samples(bench, sampled),
            texts.left_out,
        ),
    )
    parts.remove()
    print("\n" + report.terminal_table(table))
    print(f"wrote {args.out}/report.md")


def measure_best_of(speaker: Speaker, bench: Bench, largest: int) -> Table:
    """The best of n samples by the reward model, and with a world by the truth (an oracle)."""
    drawn = [
        bench.answers(speaker, 1.0, name=f"{speaker.name} best of {i}")
        for i in tqdm(range(largest), desc=f"best of {largest}")
    ]
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= largest]
    scores = np.stack([answers.scores for answers in drawn], axis=1)
    outcomes = {"score": scores}
    if bench.world:
        outcomes["utility_t1"] = np.stack([answers.utility for answers in drawn], axis=1)
    table: Table = {}
    for judge, choice in outcomes.items():
        by = "reward model" if judge == "score" else "truth"
        for metric, outcome in outcomes.items():
            for n, values in best_of_n(choice, outcome, sizes).items():
                row = table.setdefault(f"{speaker.name}, best of {n} by {by}", {})
                row[metric] = bench.mean(values)
    return table


def describe(models: list[Speaker], bench: Bench, args: argparse.Namespace) -> list[str]:
    """What was measured, on what: the opening of the report."""
    lines = []
    for model in models:
        folder = args.checkpoints.get(model.name) or args.checkpoints[args.prefixed]
        info = read_info(find_model(folder))
        trained = ", ".join(info.get("data") or ["unknown data"])
        line = f"- **{model.name}**: {model.model.num_parameters:,} parameters, stage "
        line += f"{info.get('stage', 'unknown')}, trained on {trained}"
        settings = info.get("settings", {})
        line += "".join(f", {k} {settings[k]}" for k in ("kl_coef", "ptx_coef") if k in settings)
        if model.prefix:
            encoded = [model.encode(prompt, args.max_new_tokens) for prompt in bench.prompts]
            bare = sum(
                e == encode_prompt(model.encoding, p)
                for e, p in zip(encoded, bench.prompts, strict=True)
            )
            line += f", after the prefix `{model.prefix!r}`"
            line += f" (left out before {bare} prompts that fill the context)" if bare else ""
        lines.append(line)
    return [
        f"{len(models)} models answer {len(bench.prompts)} held-out prompts of "
        f"{len(set(bench.users))} users ({args.data}), in at most {args.max_new_tokens} tokens. "
        "Intervals are 95 %, by bootstrap over users (over facts, items or sequences where no "
        "user asks).",
        "\n".join(lines),
    ]


def some_samples(bench: Bench, answers: dict[str, Answers], num: int = 6) -> list:
    """Prompts spread over the file, and what each model said."""
    chosen = range(0, len(bench.prompts), max(1, len(bench.prompts) // num))[:num]
    return [
        (
            bench.prompts[i],
            {
                name: a.samples[i].text.strip() + ("" if a.samples[i].ended else " ... (cut)")
                for name, a in answers.items()
            },
        )
        for i in chosen
    ]


# ------------------------------------------------------------------------------------------------
# Opening what the commands need


def settings_of(args: argparse.Namespace, folders: Sequence[Path] = ()) -> Record:
    """What decides the parts of a report or a selection, for --resume. `folders`: checkpoints that
    all parts depend on, beside the judge and the reference. Parts of single models name them."""
    left_out = ("out", "resume", "ahead", "checkpoints", "prefixed")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    home = Path(__file__).parent
    settings["code"] = {name: fingerprint(home / name) for name in CODE}
    settings["versions"] = {
        str(folder): version_of(folder)
        for folder in (*folders, args.reward_model, args.reference)
        if folder
    }
    read = [Path(p) for p in (args.data, args.val_data, args.pretrain_data, args.world) if p]
    read += sorted(Path(args.data).parent.glob("probes_*.jsonl")) if args.world else []
    return settings | {"sha256": {str(path): fingerprint(path) for path in read}}


def version_of(folder: str | Path) -> str:
    """Fingerprints of a checkpoint folder's files."""
    names = ("model.safetensors", "config.json", "tokenizer.json")
    return " ".join(fingerprint(find_model(folder) / name) for name in names)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.max_new_tokens, args.batch_size, args.seed, args.dtype)


def load_reward_model(args: argparse.Namespace) -> ScalarModel:
    model = ScalarModel.from_pretrained(args.reward_model, impl=args.kernels)
    return model.to(args.device).eval().requires_grad_(False)


def open_speaker(
    name: str, folder: str | Path, args: argparse.Namespace, judge: ScalarModel, prefix: str = ""
) -> Speaker:
    """A checkpoint that the reward model can judge: same tokenizer, contexts long enough."""
    speaker = load_speaker(name, folder, prefix=prefix, device=args.device, impl=args.kernels)
    theirs, ours = Path(args.reward_model) / "tokenizer.json", find_model(folder) / "tokenizer.json"
    if theirs.read_bytes() != ours.read_bytes():
        raise BadInput(f"{ours} differs from {theirs}: they must share a tokenizer")
    check_context(speaker, args.max_prompt_tokens, args.max_new_tokens)
    if args.max_prompt_tokens + args.max_new_tokens > judge.config.n_positions:
        raise BadInput(
            f"--max_prompt_tokens and --max_new_tokens come to more than the context of "
            f"{args.reward_model}, {judge.config.n_positions}: lower one"
        )
    return speaker


def load_prompts(
    path: str, speaker: Speaker, args: argparse.Namespace, limit: int = 0
) -> list[Record]:
    """At most `limit` (0: all) records within --max_prompt_tokens. Says what was dropped."""
    records = read_jsonl(path, "prompts")
    if args.world and any("task" not in record for record in records):
        raise BadInput(f'{path}: a record without key "task"; --world needs the tiny world\'s own')
    kept = [
        record
        for record in records
        if len(encode_prompt(speaker.encoding, record["prompt"])) <= args.max_prompt_tokens
    ]
    dropped, kept = len(records) - len(kept), kept[: limit or None]
    if not kept:
        raise BadInput(f"{path}: no prompt is within --max_prompt_tokens {args.max_prompt_tokens}")
    print(
        f"{path}: {len(kept)} prompts; dropped {dropped} over {args.max_prompt_tokens} tokens",
        flush=True,
    )
    return kept


# ------------------------------------------------------------------------------------------------
# Arguments and main


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    # One of four commands: --select, --checkpoints, --folds, --public with --checkpoints.
    add(
        "--select",
        metavar="RUN",
        help="run folder of train_sft.py: the last epoch within a standard error of the best",
    )
    add("--checkpoints", nargs="+", metavar="NAME=FOLDER", help="models of a report, in order")
    add("--folds", type=int, default=0, help="validate reward models in so many folds")
    add("--public", metavar="FOLDER", help="raw public sets to measure --checkpoints on")
    add("--out", required=True, help="folder to write")
    # What measures.
    add("--reward_model", help="checkpoint folder of train_rm.py")
    add("--world", help="world.json: check the truth of responses")
    add("--data", help="prompts.jsonl to sample on; in a report, its folder also has the probes")
    add("--num_prompts", type=int, default=100, help="validation prompts used for choices; 0: all")
    add("--select_every", type=int, default=1, help="look at every so many epochs and the last")
    # The report.
    add("--baseline", help="name of the model that the others are compared with; the first")
    add("--reference", help="checkpoint folder that the KL is measured from")
    add("--prefixed", default="base", help="name of the model shown with a prefix as well")
    add("--val_data", help="prompts.jsonl on which the prefix is chosen")
    add("--pretrain_data", help="pretrain.txt for the held-out pretraining loss")
    add(
        "--num_pretrain_tokens",
        type=int,
        default=200_000,
        help="tokens of it, evenly spaced; 0: all",
    )
    add("--num_items", type=int, default=200, help="items of each public task or set")
    add(
        "--ahead",
        action="store_true",
        help="write no report: keep what is measured, for --resume with further --checkpoints",
    )
    add("--best_of", type=int, default=0, help="best of n samples of the baseline; 0: left out")
    # Public sets; also --num_items.
    add(
        "--sets",
        nargs="+",
        choices=tuple(PUBLIC_SETS),
        metavar="NAME",
        help=f"only these, of {', '.join(PUBLIC_SETS)}",
    )
    add("--shots", type=int, default=15, help="few-shot examples, at most; 0: zero-shot only")
    add(
        "--toxicity_labels",
        metavar="FILE",
        help="labeled_data.csv to train a toxicity scorer on; by default one under --public",
    )
    add(
        "--toxicity_scorer",
        metavar="MODULE:FUNCTION",
        help="instead of it, a Python function: list of texts -> scores, 0..1",
    )
    # Folds.
    add("--comparisons", nargs="+", metavar="FILE", help="comparisons.jsonl, one or several")
    add("--init", help="checkpoint folder that each fold's reward model starts from")
    add("--rm_flags", default="", help='further flags for train_rm.py, as one string: "--lr 3e-4"')
    add("--resume", action="store_true", help="keep what an interrupted run has finished")
    # Sampling.
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
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the sampling; also of log-probs on public sets",
    )
    add("--kernels", choices=("auto", "torch", "triton"), default="auto", help="implementation")
    args = parser.parse_args(argv)

    if bool(args.select) + bool(args.checkpoints) + bool(args.folds) != 1:
        parser.error("give one of --select, --checkpoints and --folds")
    if args.folds and (args.folds < 2 or not (args.comparisons and args.init)):
        parser.error("--folds needs at least 2, --comparisons and --init")
    if args.ahead and (args.public or not args.checkpoints):
        parser.error("--ahead is for a report: give --checkpoints, without --public")
    if args.public and not args.checkpoints:
        parser.error("--public needs --checkpoints")
    if args.shots < 0:
        parser.error(f"--shots {args.shots}: expected 0 or more")
    if not (args.folds or args.public) and not (args.reward_model and args.data):
        parser.error("--select and --checkpoints need --reward_model and --data")
    for name in ("max_prompt_tokens", "max_new_tokens", "batch_size", "select_every", "num_items"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    for name in ("num_prompts", "num_pretrain_tokens", "best_of", "seed"):
        if not 0 <= getattr(args, name) <= 2**32:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 to {2**32}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU; give --device cpu")
    if args.checkpoints:
        args.checkpoints = parse_named(args.checkpoints, "--checkpoints", parser)
        args.baseline = args.baseline or next(iter(args.checkpoints))
        if args.baseline not in args.checkpoints:
            parser.error(f"--baseline {args.baseline}: expected a name given in --checkpoints")
        if args.prefixed not in args.checkpoints:
            args.prefixed = None
        taken = {f"{args.prefixed} + prefix", report.resampled(args.baseline)}
        if not args.public and (twice := taken & set(args.checkpoints)):
            parser.error(f"--checkpoints {min(twice)}=...: the report has a row of that name")
    return args


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    remove_leftovers(Path(args.out).parent, Path(args.out).name)  # may put an earlier --out back
    if args.select:
        check_replaceable(args)
    check_writable(args.out)
    remove_leftovers(args.out)
    if args.select:
        select(args)
    elif args.folds:
        cross_validate(args)
    elif args.public:
        measure_public(args)
    else:
        compare(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
