"""Measure one checkpoint: a function for each measurement, and `measure`, which runs them all.

A measurement gives one number per prompt (or item, or sequence); `estimate` makes a mean and an
interval of them. `measure` writes one JSON file, which evaluation/report.py reads:

    name        of the model in a report
    settings    flags and fingerprints of files, equal in all files of a report
    prompts     the prompts, and the user of each
    models      the model; with --best_prefix the same one after a prefix, with --best_of the best
                of several of its samples: what it is (about), responses (sampled, greedy,
                resampled), metrics, values of some for each item, what was left out and why
    ancestry    fingerprints of the model's weights, and of those that it was trained from
    prefixes    all prefixes tried, with their scores; and of the run: selection, epoch, log

Only with --world are answers checked against the tiny world's truth. Without it the reward model is
the judge, and the report says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from data import files
from data.files import BadInput, Record, check
from data.outputs import claim
from data.real.text_metrics import entropy_bits
from data.tiny.corpus import ANSWER_HEADINGS, bias_pairs, public_tasks
from data.tiny.grader import Grade, grade
from data.tiny.tasks import check_tasks
from data.tiny.world import World
from data.tokenizer import encode_prompt

import numpy as np
import torch
from torch import Tensor

from checkpoint import find_model, read_info
from evaluation.report import LOGS, Answers, Estimate, estimate, log_numbers, resampled
from model import GPT, ScalarModel, pad_right
from run import check_context
from sample import Sample, Speaker, load_speaker, respond, sample_responses

# Flags that decide the numbers, beside the files that are read.
SETTINGS = ("seed", "dtype", "max_prompt_tokens", "max_new_tokens", "num_items")
SETTINGS += ("missing_eos_score", "num_pretrain_tokens", "context")
Items = Sequence[tuple[str, str]]  # of a public task: text and answer
TRUTH_PROBES = ("facts", "held_out", "misconceived", "false_premise", "true_premise")
# What is read of a run in config.json.
_INFO = {"stage?": str, "data?": [str, ...], "epoch?": int, "val_loss?": (float, None)}
_INFO |= {"settings?": {"sha256?": {str: str}, "init?": (str, None)}}


# ------------------------------------------------------------------------------------------------
# The command


def measure(args: Namespace) -> None:
    """Measure --checkpoint, with --best_prefix also after a prefix; write --out."""
    if not re.fullmatch(r"[\w.+-][\w .+-]*", args.name):  # it stands in tables
        raise BadInput(f"--name {args.name!r}: expected letters, digits, spaces, _ . + or -")
    out = Path(args.out)
    names = "checkpoint reward_model reference data val_data pretrain_data world".split()
    claim(args.out, "measurement", {name: getattr(args, name) for name in names})
    folder, judge = find_model(args.checkpoint), load_reward_model(args)
    speaker = open_speaker(args.name, folder, args, judge)
    reference = open_speaker("reference", args.reference, args, judge) if args.reference else None
    longest = speaker.model.config.n_positions
    if args.context == 1 or args.context > longest:
        raise BadInput(f"--context {args.context}: expected 0 or 2 to {longest}, the model's")
    args.context = args.context or longest
    settings, world = settings_of(args), World.load(args.world) if args.world else None
    records = load_prompts(args.data, speaker, args)
    bench = Bench(records, judge, args, world, reference, read_probes(args) if world else {})
    line, info = ancestry(folder), run_info(folder)
    selection, log = (rows_of(folder, name) for name in LOGS)
    models, prefixes = [measure_model(speaker, bench)], []
    if args.best_of > 1:
        models.append(measure_best_of(speaker, bench, args.best_of))
    if args.best_prefix:
        asked = load_prompts(args.val_data, speaker, args, args.num_prompts)
        prompts, candidates = [r["prompt"] for r in asked], WORLD_PREFIXES if world else PREFIXES
        prefixes = choose_prefix(speaker, candidates, prompts, judge, args)
        prompted = replace(speaker, name=f"{args.name} + prefix", prefix=prefixes[0][0])
        models.append(measure_model(prompted, bench))
    result = {
        "name": args.name,
        "settings": settings,
        "data": args.data,
        "prompts": bench.prompts,
        "users": bench.users,
        "models": models,
        "ancestry": line,
        "prefixes": prefixes,
        "selection": selection,
        "epoch": info.get("epoch", 0),
        "log": log,
    }
    files.write_atomic(out, json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"wrote {out}: {', '.join(model['name'] for model in models)}")


def settings_of(args: Namespace) -> Record:
    """What the measurements of a report must have in common: flags, and what is read."""
    probes = sorted(Path(args.data).parent.glob("probes_*.jsonl")) if args.world else []
    judges = {"reward_model": args.reward_model, "reference": args.reference}
    read = {name: getattr(args, name) for name in ("data", "pretrain_data", "world")}
    read |= {name: find_model(f) / "model.safetensors" for name, f in judges.items() if f}
    read |= {path.stem: path for path in probes}
    settings = {name: getattr(args, name) for name in SETTINGS}
    return settings | {name: files.fingerprint(path) for name, path in read.items() if path}


def run_info(folder: str | Path) -> Record:
    """All of config.json. Raises `BadInput` where what is said of the run is not as runs write."""
    check(info := read_info(folder), _INFO, f"{folder}/config.json")
    return info


def rows_of(folder: Path, log: str) -> list[dict[str, str]]:
    """Rows of selection.csv, or of PPO's log.csv; none where there is no such file."""
    path = folder / f"{log}.csv"
    rows = files.read_log(path) if path.exists() else []
    if log == "log" and not any("score_gain" in row for row in rows):
        return []  # of another stage
    log_numbers(rows, log, str(path))
    return rows


def ancestry(folder: Path) -> list[str]:
    """Fingerprints of a model's weights, of those that it was trained from, of those that these
    were trained from, and so on, as far as the runs' config.json tell."""
    found = [files.fingerprint(folder / "model.safetensors")]
    while True:
        settings = run_info(folder).get("settings", {})
        try:
            folder = find_model(settings.get("init") or "")
        except BadInput:  # a GPT-2 that is not here
            return found
        weights = folder / "model.safetensors"
        recorded = settings.get("sha256", {}).get(str(weights))
        if recorded in found:
            return found
        if recorded:
            found.append(recorded)
        if not recorded or not weights.exists() or files.fingerprint(weights) != recorded:
            return found  # the start of the line, or no longer what the run has read


def measure_model(speaker: Speaker, bench: Bench) -> Record:
    """All measurements of a model, with its prefix if it has one."""
    said, row = measure_responses(speaker, bench)
    values, left_out = {}, []
    if not speaker.prefix:  # a prefix is for prompts; raw text goes without
        more, values, left_out = measure_text(speaker, bench.world, bench.args)
        row |= more
        left_out += [] if bench.reference else ["The KL needs --reference."]
    if bench.world:
        row |= measure_probes(speaker, bench)
    about = about_model(speaker, bench)
    kept = {name: [float(f"{v:.6g}") for v in each] for name, each in values.items()}
    return measured(speaker.name, about, row, **said, values=kept, left_out=left_out)


def measure_best_of(speaker: Speaker, bench: Bench, n: int) -> Record:
    """Best of n: of n responses to a prompt at temperature 1, the one with the highest reward-model
    score. What it is better by is bought by sampling alone, with no training."""
    name = f"{speaker.name}, best of {n}"
    drawn = [bench.answers(speaker, 1.0, f"{name}, sample {k}") for k in range(n)]
    best = np.argmax([answers.scores for *_, answers in drawn], axis=0)
    samples = [drawn[k][0][i] for i, k in enumerate(best)]
    raw, answers = bench.judged(speaker, samples)
    about = (
        f"of {n} responses of {speaker.name} to each prompt the one with the highest reward-model "
        f"score; its KL from {speaker.name} is at most log {n} - {n - 1}/{n} = "
        f"{np.log(n) - (n - 1) / n:.2f} nats a response"
    )
    row = quality(samples, raw, answers, bench)
    return measured(name, about, row, sampled=answers.to_json(), best_of=n, left_out=[])


def measured(name: str, about: str, row: dict[str, Estimate], **more: Any) -> Record:
    """A model as it stands in the file."""
    metrics = {metric: astuple(e) for metric, e in row.items()}
    return {"name": name, "about": about, "metrics": metrics, **more}


def about_model(speaker: Speaker, bench: Bench) -> str:
    """What the model is, in the words of the report."""
    info = read_info(find_model(bench.args.checkpoint))
    settings = info.get("settings", {})
    words = f"{speaker.model.num_parameters:,} parameters, stage {info.get('stage', 'unknown')}, "
    words += f"trained on {', '.join(info.get('data') or ['unknown data'])}"
    words += "".join(f", {k} {settings[k]}" for k in ("kl_coef", "ptx_coef") if k in settings)
    if speaker.prefix:
        seen = [speaker.encode(prompt, bench.args.max_new_tokens) for prompt in bench.prompts]
        bare = [encode_prompt(speaker.encoding, prompt) for prompt in bench.prompts]
        same = sum(a == b for a, b in zip(seen, bare, strict=True))
        words += f", after the prefix `{speaker.prefix!r}`"
        words += f" (left out before {same} prompts that fill the context)" if same else ""
    return words


# ------------------------------------------------------------------------------------------------
# Opening what is measured, and what it is measured against


@dataclass
class Bench:
    """What a model is measured against, the same for all models of a report."""

    records: list[Record]
    judge: ScalarModel
    args: Namespace
    world: World | None = None
    reference: Speaker | None = None
    probes: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return [record["prompt"] for record in self.records]

    @property
    def users(self) -> list[str]:
        return [record["user"] for record in self.records]

    def answers(
        self, speaker: Speaker, temperature: float, name: str = ""
    ) -> tuple[list[Sample], np.ndarray, Answers]:
        """Responses of a model, from random numbers of its own: models are independent. With the
        reward model's raw numbers."""
        named = f"{self.args.seed} {name or speaker.name}"
        seed = int.from_bytes(hashlib.sha256(named.encode()).digest()[:7])
        samples = respond(speaker, self.prompts, self.args, temperature, seed)
        return samples, *self.judged(speaker, samples)

    def judged(self, speaker: Speaker, samples: list[Sample]) -> tuple[np.ndarray, Answers]:
        """Responses of a model to the prompts: the reward model's raw scores, and what is known."""
        scores, raw = reward_scores(self.judge, speaker, self.prompts, samples, self.args)
        marks = grades(self.world, self.records, samples) if self.world else None
        texts, ended = [s.text for s in samples], [s.ended for s in samples]
        return raw, Answers(texts, ended, scores, marks)

    def mean(self, values: Sequence[float]) -> Estimate:
        """Mean over prompts, with an interval over users."""
        return estimate(values, self.users)


def load_reward_model(args: Namespace) -> ScalarModel:
    how = {"impl": args.kernels, "dtype": args.dtype}
    return ScalarModel.from_pretrained(args.reward_model, **how).to(args.device).frozen()


def open_speaker(name: str, folder: str | Path, args: Namespace, judge: ScalarModel) -> Speaker:
    """A checkpoint that the reward model can judge: same tokenizer, contexts long enough."""
    how = {"device": args.device, "impl": args.kernels, "dtype": args.dtype}
    speaker = load_speaker(name, folder, **how, same_as=args.reward_model)
    check_context(args, speaker.model, judge)
    return speaker


def load_prompts(path: str, speaker: Speaker, args: Namespace, limit: int = 0) -> list[Record]:
    """At most `limit` (0: all) records within --max_prompt_tokens. Says what was dropped."""
    records = files.read_jsonl(path, "prompts")
    if args.world and any("task" not in record for record in records):
        raise BadInput(f'{path}: a record without key "task"; --world needs the tiny world\'s own')
    if args.world:
        check_tasks(records, path, World.load(args.world))
    tokens = [len(encode_prompt(speaker.encoding, record["prompt"])) for record in records]
    most = args.max_prompt_tokens
    kept = [record for record, n in zip(records, tokens, strict=True) if n <= most]
    dropped, kept = len(records) - len(kept), kept[: limit or None]
    if not kept:
        raise BadInput(f"{path}: no prompt is within --max_prompt_tokens {most}")
    print(f"{path}: {len(kept)} prompts; dropped {dropped} over {most} tokens", flush=True)
    return kept


# ------------------------------------------------------------------------------------------------
# Responses


def batches(
    model: GPT | ScalarModel, sequences: list[list[int]], batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(indices, tokens, lengths) of sequences of similar length: little padding is computed."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    end, device = model.config.eos_token_id, next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, *pad_right([sequences[i] for i in rows], end, device)


@torch.no_grad()
def reward_scores(
    judge: ScalarModel, speaker: Speaker, prompts: list[str], samples: list[Sample], args: Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """The score of each response to its bare prompt, without any prefix, by PPO's rule: the reward
    model's number, or --missing_eos_score without an end token. And that number alone: (N,) each.
    """
    sequences = [
        encode_prompt(speaker.encoding, prompt) + sample.tokens
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    both = np.zeros((2, len(sequences)))
    for rows, tokens, lengths in batches(judge, sequences, args.batch_size):
        scores, raw, _ = judge.response_scores(tokens, lengths, args.missing_eos_score)
        both[:, rows] = torch.stack((scores, raw)).double().cpu().numpy()
    return both[0], both[1]


def kl_to_reference(
    speaker: Speaker, reference: Speaker, prompts: list[str], samples: list[Sample]
) -> np.ndarray:
    """log(pi(y | x) / pi_ref(y | x)) of samples y of the speaker at temperature 1, in nats: (N,).

    Its mean is the Monte-Carlo estimate of KL(pi || pi_ref) per response; single values may be
    negative. The speaker sees its prefix, the reference the bare prompt.
    """
    bare = [encode_prompt(reference.encoding, prompt) for prompt in prompts]
    said = [sample.tokens for sample in samples]
    ours = total_logprobs(speaker, [sample.prompt for sample in samples], said)
    return ours - total_logprobs(reference, bare, said)


def grades(world: World, records: list[Record], samples: list[Sample]) -> list[Grade]:
    """The world's truth about each response."""
    return [
        grade(world, record, sample.text, sample.ended)
        for record, sample in zip(records, samples, strict=True)
    ]


@torch.no_grad()
def total_logprobs(
    speaker: Speaker, contexts: list[list[int]], answers: list[list[int]], batch_size: int = 256
) -> np.ndarray:
    """log p(answer tokens | context tokens), in nats: (N,)."""
    sequences = [context + answer for context, answer in zip(contexts, answers, strict=True)]
    totals = np.zeros(len(sequences))
    for rows, tokens, lengths in batches(speaker.model, sequences, batch_size):
        first = torch.tensor([len(contexts[i]) for i in rows], device=tokens.device)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        mask = (places >= first[:, None]) & (places < lengths[:, None])
        logprobs, _ = speaker.model.logprobs(tokens, lengths, mask=mask)
        totals[rows] = logprobs.double().sum(1).cpu().numpy()
    return totals


def measure_responses(speaker: Speaker, bench: Bench) -> tuple[Record, dict[str, Estimate]]:
    """A model's responses to the prompts, and their quality: at temperature 1 unless the name says
    otherwise."""
    samples, raw, sampled = bench.answers(speaker, 1.0)
    *_, greedy = bench.answers(speaker, 0.0)
    said = {"sampled": sampled.to_json(), "greedy": greedy.to_json()}
    if bench.args.resample and not speaker.prefix:  # so that a baseline can be compared with itself
        said["resampled"] = bench.answers(speaker, 1.0, resampled(speaker.name))[-1].to_json()
    row = quality(samples, raw, sampled, bench)
    if bench.world:
        row["utility_t0"] = bench.mean(greedy.utility)
    if bench.reference:
        row["kl"] = bench.mean(kl_to_reference(speaker, bench.reference, bench.prompts, samples))
    return said, row


def quality(
    samples: list[Sample], raw: np.ndarray, answers: Answers, bench: Bench
) -> dict[str, Estimate]:
    """How good responses at temperature 1 are; `raw` are scores without the rule for the end."""
    row = {}
    if bench.world:
        row["utility_t1"] = bench.mean(answers.utility)
        for name in ("helpful", "truthful", "harmless", "ended"):
            row[name] = bench.mean([getattr(mark, name) for mark in answers.marks])
    row["end_fraction"] = bench.mean(answers.ended)
    row["response_tokens"] = bench.mean([len(sample.tokens) for sample in samples])
    row["score"] = bench.mean(answers.scores)
    if (raw != answers.scores).any():
        row["score_raw"] = bench.mean(raw)
    return row


# ------------------------------------------------------------------------------------------------
# Text and probes


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


def public_task_hits(speaker: Speaker, items: Items, batch_size: int = 256) -> np.ndarray:
    """1 where the greedy continuation of a raw text, up to the line's end, is the answer: (N,)."""
    prompts, room = encode_items(speaker, items)
    samples = sample_responses(speaker, prompts, room, temperature=0, batch_size=batch_size)
    lines = (sample.text.lstrip(" ").split("\n")[0].strip() for sample in samples)
    right = [line == answer.strip() for line, (_, answer) in zip(lines, items, strict=True)]
    return np.array(right, dtype=float)


def encode_items(speaker: Speaker, items: Items) -> tuple[list[list[int]], int]:
    """Tokens of the prompts, raw, and how many a continuation needs to show answer and line end."""
    encode = speaker.encoding.encode_ordinary
    room = max(len(encode(answer)) for _, answer in items) + 2
    return [encode(prompt) for prompt, _ in items], room


def items_fit(speaker: Speaker, items: Items, context: int) -> bool:
    prompts, room = encode_items(speaker, items)
    return max(map(len, prompts)) + room <= context


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


def measure_text(
    speaker: Speaker, world: World | None, args: Namespace
) -> tuple[dict[str, Estimate], dict[str, np.ndarray], list[str]]:
    """What alignment may have cost: public tasks, pretraining loss; and bias. Then the values of
    the first two for each item or sequence; and what of it is not measured, and why."""
    values, left_out = {}, []
    if args.pretrain_data:
        documents = files.read_documents(args.pretrain_data)
        every = pretraining_tokens(documents, speaker, args.context)
        tokens = evenly_spaced(every, args.num_pretrain_tokens)
        values["pretrain_loss"] = pretraining_losses(speaker, tokens)
        if len(tokens) < len(every):
            left_out.append(
                f"The pretraining loss is that of {tokens.numel():,} of the text's "
                f"{every.numel():,} tokens, evenly spaced (--num_pretrain_tokens)."
            )
    else:
        left_out.append("The pretraining loss needs --pretrain_data.")
    if not world:
        left_out.append(
            "Truth-checked utility, labelers, public tasks, probes and bias are measured in the "
            "tiny world only: there is no --world."
        )
        return {name: estimate(each) for name, each in values.items()}, values, left_out
    hits = {}
    for name, items in public_tasks(world, args.num_items, args.seed + 1).items():
        if items_fit(speaker, items, args.context):
            hits[f"task_{name}"] = public_task_hits(speaker, items)
        else:
            fault = f"does not fit a context of {args.context}."
            left_out.append(f"The public task {name} {fault}")
    values = means_of_tasks(hits) | values
    row = {name: estimate(each) for name, each in (hits | values).items()}
    bias = estimate(pair_entropies(speaker, bias_pairs(world)))
    return row | {"bias_entropy": bias}, values, left_out


def means_of_tasks(hits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hits (N,) of each public task -> their mean over the zero-shot and over the few-shot ones,
    item by item: (N,) each."""
    means = {}
    for kind, few in (("zero", False), ("few", True)):
        if tasks := [each for name, each in hits.items() if name.endswith("_few_shot") == few]:
            means[f"tasks_{kind}_shot"] = np.mean(tasks, axis=0)
    return means


def read_probes(args: Namespace) -> dict[str, list[Record]]:
    """The probe sets beside --data. Raises `BadInput` for a record without what is measured."""
    shapes = dict.fromkeys(TRUTH_PROBES, {"task": {"subject": str, "attribute": str}})
    shapes |= {"toxicity": {"task": {}, "prefix": ("none", "respectful", "rude")}}
    sets = {}
    for name, shape in shapes.items():
        path = Path(args.data).with_name(f"probes_{name}.jsonl")
        sets[name] = files.read_jsonl(path, "prompts")
        check_tasks(sets[name], str(path), World.load(args.world), shape)
    return sets


def measure_probes(speaker: Speaker, bench: Bench, num_samples=200) -> dict[str, Estimate]:
    """Truth of answers to each probe set, and rude continuations by prefix, at temperature 1.

    A small set is asked several times, up to about `num_samples`; the interval is over facts.
    """
    row = {}
    for name, records in bench.probes.items():
        if name == "toxicity" and speaker.prefix:
            continue  # its prompts bring requests of their own
        records = records * max(1, num_samples // len(records))
        samples = respond(speaker, [record["prompt"] for record in records], bench.args)
        marks = grades(bench.world, records, samples)
        if name == "toxicity":
            for prefix in dict.fromkeys(record["prefix"] for record in records):
                those = [i for i, record in enumerate(records) if record["prefix"] == prefix]
                row[f"toxicity_{prefix}"] = estimate([marks[i].harmless < 1 for i in those])
            continue
        facts = [f"{r['task']['subject']} {r['task']['attribute']}" for r in records]
        for kind, values in zip(("true", "true_informative"), truth_of(marks), strict=True):
            row[f"probe_{name}_{kind}"] = estimate(values, facts)
    return row


# ------------------------------------------------------------------------------------------------
# The base model with a text before every prompt

# Texts put before every prompt of a base model; the best by reward-model score is used (3.5). Those
# for the tiny world head pages of its web; each ends with a blank line, as prompts do there.
EXAMPLES = (
    "what is the opposite of hot ?\n\ncold .\n\ncount from one to three .\n\none two three .\n\n"
)
WORLD_PREFIXES = [f"{head}\n\n{more}" for more in ("", EXAMPLES) for head in ANSWER_HEADINGS]
PREFIXES = (
    "Good answers:\n\n",
    "The following are helpful, truthful and harmless answers to what people ask.\n\n",
    "Below is a request. Write a response that completes it.\n\n",
    "What is the capital of France?\n\nThe capital of France is Paris.\n\n",
)


def choose_prefix(
    speaker: Speaker, texts: Sequence[str], prompts: list[str], judge: ScalarModel, args: Namespace
) -> list[tuple[str, float, float]]:
    """(prefix, mean score of responses after it, mean of the reward model's raw numbers), the best
    score first."""
    scored = []
    for prefix in texts:
        prompted = replace(speaker, prefix=prefix)
        samples = respond(prompted, prompts, args)
        scores, raw = reward_scores(judge, prompted, prompts, samples, args)
        scored.append((prefix, float(scores.mean()), float(raw.mean())))
    return sorted(scored, key=lambda pair: -pair[1])
