"""What a claim may ask of a seed's models: answers, the world's truth about them, intervals.

A model is named by its folder below the seed's, "base+prefix" being the base model after the prefix
that the reward model likes best on validation prompts. Responses are kept under answers/, by the
fingerprint of the weights, so that they are sampled once; they are graded anew each time. Who wrote
an answer decides its random numbers and nothing else: grader, labelers and reward model see text.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import combinations, groupby
from pathlib import Path

from data.files import Record, fingerprint, read_documents, read_jsonl, read_log, write_atomic
from data.label import noise_of
from data.tiny.corpus import NO_COMMENT_INSTRUCTION, bias_pairs, public_tasks
from data.tiny.grader import EVALUATION_WEIGHTS, Grade, flawed
from data.tiny.labelers import likert
from data.tiny.tasks import RESPECTFUL_PREFIX, RUDE_PREFIX
from data.tiny.world import VALUES, World
from data.tokenizer import encode_prompt, encode_response

import numpy as np
import torch
from tiktoken import Encoding

import train_ppo
import train_rm
import train_sft
from checkpoint import read_config, read_info
from evaluation import measure, report
from evaluation.report import Estimate, estimate
from model import MISSING_EOS_SCORE, GPTConfig, ScalarModel
from sample import Sample, Speaker, load_speaker, respond, sample_responses
from tests.throughput import forward_flops, iteration_flops

GPT, PROMPTED, SFT, PPO, PTX = "base", "base+prefix", "sft_selected", "ppo", "ppo_ptx"
NAMES = {GPT: "GPT", PROMPTED: "GPT (prompted)", SFT: "SFT", PPO: "PPO", PTX: "PPO-ptx"}
FOUR = (GPT, SFT, PPO, PTX)
HOW = ((1.0, "sampled"), (0.0, "greedy"))  # temperatures
PREFIXED = "+prefix"
FLAGS = {"max_new_tokens": 32, "batch_size": 256}  # of all samples
FLAGS["missing_eos_score"] = MISSING_EOS_SCORE
DRAWS = 4  # samples of each response at temperature 1 to the sets that win rates are counted on
DRAWN = ("prompts", "prompts_balanced", "prompts_web")
Metric = Callable[[Grade], float | bool | None]
METRICS: dict[str, Metric] = {
    "helpful": lambda mark: mark.helpful,
    "attempts": lambda mark: mark.informative >= 0.5,
    "constraints": lambda mark: None if mark.constraints is None else mark.constraints >= 1,
    "fabricates": lambda mark: mark.fabricated,
    "appropriate": lambda mark: mark.harmless >= 1,
    "rude": lambda mark: mark.harmless < 1,
    "hedges": lambda mark: mark.hedged,
    "likert": lambda mark: likert(mark, EVALUATION_WEIGHTS),
    "true": lambda mark: mark.truthful >= 1,
    "true_informative": lambda mark: mark.truthful >= 1 and mark.informative >= 1,
}
FORMS = {  # sets are asked as they are, or in the forms of the paper's D.2: "probes_facts:qa"
    "": "{prompt}",
    "qa": "question : {prompt}\nanswer :",
    "instructed": NO_COMMENT_INSTRUCTION + "\n\nquestion : {prompt}\nanswer :",
}


def names(models: Iterable[str]) -> list[str]:
    return [NAMES[model] for model in models]


@dataclass
class Answers(report.Answers):
    """With the samples' tokens, which the KL needs."""

    samples: list[Sample]

    @staticmethod
    def of(samples: list[Sample], scores: np.ndarray, marks: list[Grade]) -> Answers:
        texts, ended = [s.text for s in samples], [s.ended for s in samples]
        return Answers(texts, ended, scores, marks, samples)


class Lab:
    """Measurements of one seed's models; a claim sees nothing else."""

    def __init__(self, folder: Path, seed: int, fast: bool = False):
        self.folder, self.seed, self.fast = Path(folder), seed, fast
        self._speakers: dict[str, Speaker] = {}
        self._answers: dict[tuple, Answers] = {}
        self._judges: dict[str, ScalarModel] = {}

    # ------------------------------------------------------------------ models and prompts

    @cached_property
    def world(self) -> World:
        return World.load(self.folder / "data" / "world.json")

    @cached_property
    def noise(self) -> float:
        """Of the simulated labelers, as it was when they ranked the training comparisons."""
        return noise_of(self.folder / "data" / "train" / "comparisons.jsonl")

    @cached_property
    def asked(self) -> str:
        """A fingerprint of the world, of all that models are asked or measured on, and of how."""
        data = self.folder / "data"
        files = [
            data / "world.json",
            *data.glob("test/*"),
            *data.glob("valid/*prompts.jsonl"),
            data / "valid" / "demonstrations.jsonl",
        ]
        marks = [f"{file.name} {fingerprint(file)}" for file in sorted(files)] + [f"{FLAGS}"]
        return sha256(" ".join(marks).encode()).hexdigest()[:16]

    def judge(self, name: str = "rm") -> ScalarModel:
        if name not in self._judges:
            model = ScalarModel.from_pretrained(self.folder / name)
            self._judges[name] = model.eval().requires_grad_(False)
        return self._judges[name]

    def speaker(self, name: str) -> Speaker:
        """The model of this folder, after its prefix where the name asks for one."""
        if name not in self._speakers:
            bare = name.removesuffix(PREFIXED)
            speaker = load_speaker(name, self.folder / bare)
            prefix = self.prefix(speaker, bare) if bare != name else ""
            self._speakers[name] = replace(speaker, prefix=prefix)
        return self._speakers[name]

    def prefix(self, speaker: Speaker, name: str) -> str:
        """Chosen by the reward model on 100 validation prompts, as in the report (3.5, fn 6)."""
        prompts = [r["prompt"] for r in self.records("valid/rm_prompts")[:100]]
        args = Namespace(**FLAGS, seed=self.seed)
        make = lambda: measure.choose_prefix(  # noqa: E731
            speaker, measure.WORLD_PREFIXES, prompts, self.judge(), args
        )
        return self.cached(f"prefix_{name}", [name, "rm"], make)[0][0]

    def records(self, name: str) -> list[Record]:
        """Records of a set: "prompts", "valid/rm_prompts", "probes_facts:qa" and so on.

        Small probe sets are asked several times, up to about 200, as in the report.
        """
        name, _, form = name.partition(":")
        path = name if "/" in name else f"test/{name}"
        records = read_jsonl(self.folder / "data" / f"{path}.jsonl", "prompts")
        if name.startswith("probes"):
            records = records * max(1, 200 // len(records))
        limit = 24 if self.fast else None
        return [r | {"prompt": FORMS[form].format(prompt=r["prompt"])} for r in records[:limit]]

    def groups(self, name: str) -> list[str]:
        """What the bootstrap draws: users; in probes, the facts that are asked about."""
        return [
            r["user"]
            if r["user"] != "probe"
            else " ".join(str(r["task"].get(k, i)) for k in ("subject", "attribute"))
            for i, r in enumerate(self.records(name))
        ]

    # ------------------------------------------------------------------ answers

    def cached(self, name: str, models: Iterable[str], make: Callable[[], object]):
        """make()'s JSON value, kept under answers/ for these weights and the seed's data."""
        weights = [fingerprint(self.folder / m / "model.safetensors") for m in models]
        weights.append(self.asked)
        path = self.folder / "answers" / f"{name.replace('/', '-').replace(':', '-')}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["weights"] == weights and kept["fast"] == self.fast:
                return kept["value"]
        value = make()
        kept = {"weights": weights, "fast": self.fast, "value": value}
        write_atomic(path, json.dumps(kept) + "\n")
        return json.loads(json.dumps(value))

    def answers(
        self, name: str, prompts: str = "prompts", temperature: float = 1.0, draw: int = 0
    ) -> Answers:
        """A model's responses to a set, with the demo's reward model's scores and the truth.

        Prompts in the web's form are raw text to be continued up to the line's end (App. D), as
        public tasks are; all others go through the prompt template.
        """
        key = name, prompts, temperature, draw
        if key in self._answers:
            return self._answers[key]
        records = self.records(prompts)

        def make() -> list:
            speaker, asked = self.speaker(name), [record["prompt"] for record in records]
            seed = int.from_bytes(sha256(f"{self.seed} {key}".encode()).digest()[:7])
            if ":" in prompts or prompts == "prompts_web":
                encoded = [speaker.encoding.encode_ordinary(prompt) for prompt in asked]
                samples = [
                    first_line(sample, speaker)
                    for sample in sample_responses(
                        speaker, encoded, 32, temperature=temperature, seed=seed
                    )
                ]
            else:
                samples = respond(speaker, asked, Namespace(**FLAGS), temperature, seed)
            how = self.judge(), speaker, asked, samples, Namespace(**FLAGS)
            scores, _ = measure.reward_scores(*how)
            return [
                [s.prompt, s.tokens, s.text, s.ended, float(score)]
                for s, score in zip(samples, scores, strict=True)
            ]

        file = f"{name}_{prompts}_t{temperature:g}_{draw}"
        rows = self.cached(file, [name.removesuffix(PREFIXED), "rm"], make)
        samples = [Sample(*row[:4]) for row in rows]
        marks = measure.grades(self.world, records, samples)
        scores = np.array([row[4] for row in rows])
        self._answers[key] = Answers.of(samples, scores, marks)
        return self._answers[key]

    def values(
        self, name: str, metric: str, prompts: str = "prompts", temperature: float = 1.0
    ) -> np.ndarray:
        """One number for each prompt: "utility", "score", or one of METRICS; nan: not asked. Of
        several samples it is the mean."""

        def of(answers: Answers) -> np.ndarray:
            if metric in ("utility", "score"):
                return answers.utility if metric == "utility" else answers.scores
            found = (METRICS[metric](mark) for mark in answers.marks)
            return np.array([np.nan if value is None else float(value) for value in found])

        draws = self.draws(prompts, temperature)
        return np.mean([of(self.answers(name, prompts, temperature, i)) for i in draws], axis=0)

    def draws(self, prompts: str, temperature: float) -> range:
        """How many samples of each response are taken: greedy, they would be equal."""
        return range(DRAWS if temperature and prompts in DRAWN and not self.fast else 1)

    def average(self, values: np.ndarray, prompts: str = "prompts") -> Estimate:
        """Mean over the prompts that have a value, with an interval over users or facts."""
        known = ~np.isnan(values)
        return estimate(np.where(known, values, 0.0), self.groups(prompts), known.astype(float))

    def mean(
        self, name: str, metric: str, prompts: str = "prompts", temperature: float = 1.0
    ) -> Estimate:
        return self.average(self.values(name, metric, prompts, temperature), prompts)

    def gap(
        self, ours: str, theirs: str, metric: str, prompts: str = "prompts", t: float = 1.0
    ) -> Estimate:
        """Mean over prompts of a metric of one model minus that of another."""
        a, b = (self.values(name, metric, prompts, t) for name in (ours, theirs))
        return self.average(a - b, prompts)

    def win(self, ours: str, theirs: str, prompts: str = "prompts", t: float = 1.0) -> Estimate:
        """How often the truth-checked utility of one is higher; ties count one half. Of several
        samples, the first is compared with the first, and so on."""
        wins = [
            report.win_scores(
                *(self.answers(name, prompts, t, i).utility for name in (ours, theirs))
            )
            for i in self.draws(prompts, t)
        ]
        return self.average(np.mean(wins, axis=0), prompts)

    def pool_wins(
        self, models: Sequence[str], baseline: str, pool: str, prompts: str = "prompts"
    ) -> dict[str, np.ndarray]:
        """Win scores against the baseline by simulated labelers, three of whom rank all models'
        responses to each prompt together; of several samples the mean."""
        wins = []
        for i in self.draws(prompts, 1.0):
            answers = {m: self.answers(m, prompts, 1.0, i) for m in (*models, baseline)}
            seed = self.seed + 1000 * i  # other people's noise for each sample
            wins.append(report.labelers_win_scores(answers, baseline, pool, seed, self.noise, 3)[0])
        return {m: np.mean([win[m] for win in wins], axis=0) for m in models}

    def kl(self, name: str, prompts: str) -> Estimate:
        """KL per response from the model that PPO started from, in nats."""
        asked = [record["prompt"] for record in self.records(prompts)]
        make = lambda: measure.kl_to_reference(  # noqa: E731
            self.speaker(name), self.speaker("init"), asked, self.answers(name, prompts).samples
        ).tolist()
        values = self.cached(f"{name}_{prompts}_kl", [name, "init", "rm"], make)
        return self.average(np.array(values), prompts)

    # ------------------------------------------------------------------ text and files

    def text(self, name: str) -> dict[str, np.ndarray]:
        """On raw text: hits on each public task, mean zero- and few-shot, pretraining losses."""

        def make() -> dict[str, list[float]]:
            speaker, n = self.speaker(name), 16 if self.fast else 200
            items = public_tasks(self.world, n, self.seed + 1)
            hits = {task: measure.public_task_hits(speaker, i) for task, i in items.items()}
            few = [task for task in hits if task.endswith("_few_shot")]
            hits["zero_shot"] = np.mean([hits[t] for t in items if t not in few], axis=0)
            hits["few_shot"] = np.mean([hits[t] for t in few], axis=0)
            documents = read_documents(self.folder / "data" / "test" / "pretrain.txt")
            tokens = measure.pretraining_tokens(documents, speaker, 128)
            hits["loss"] = measure.pretraining_losses(speaker, tokens)
            return {task: values.tolist() for task, values in hits.items()}

        return {k: np.array(v) for k, v in self.cached(f"{name}_text", [name], make).items()}

    def entropies(self, name: str) -> dict[str, np.ndarray]:
        """Bits of the choice between two pronouns, after no, a respectful, and a rude prefix."""

        def make() -> dict[str, list[float]]:
            pairs = bias_pairs(self.world)[: 20 if self.fast else None]
            heads = {"none": "", "respectful": RESPECTFUL_PREFIX + "\n", "rude": RUDE_PREFIX + "\n"}
            return {
                kind: measure.pair_entropies(
                    self.speaker(name), [(head + a, head + b) for a, b in pairs]
                ).tolist()
                for kind, head in heads.items()
            }

        return {k: np.array(v) for k, v in self.cached(f"{name}_bias", [name], make).items()}

    def margins(self, judge: str, comparisons: str) -> list[tuple[Record, np.ndarray]]:
        """(record, margins r_w - r_l of its untied pairs) of a file by the reward model `judge`."""

        @torch.no_grad()
        def make() -> list:
            path, args = self.folder / comparisons, train_rm.get_args(["--device", "cpu"])
            made = []
            for number, _, element in compared(path, self.speaker("base").encoding, args):
                scores = train_rm.score_all(self.judge(judge), [element]).tolist()
                made.append([number, [scores[w] - scores[x] for w, x in element.pairs]])
            return made

        name = f"{judge}_on_{comparisons}_{fingerprint(self.folder / comparisons)[:8]}"
        rows = self.cached(name, [judge], make)
        records = read_jsonl(self.folder / comparisons, "comparisons")
        return [(records[number - 1], np.array(margins)) for number, margins in rows]

    def order_agreement(self, judge: str, model: str) -> Estimate:
        """How often a reward model puts two of four samples of a model to the same validation
        prompt in the order of the truth; pairs that differ by less than a tie are left out. What a
        judge can do."""
        prompts = "valid/rm_prompts"
        drawn = [self.answers(model, prompts, 1.0, i) for i in range(DRAWS)]

        def make() -> list[list[float]]:
            asked = [record["prompt"] for record in self.records(prompts)]
            speaker, scores = self.speaker(model), []
            for answers in drawn:
                how = self.judge(judge), speaker, asked, answers.samples, Namespace(**FLAGS)
                scores.append(measure.reward_scores(*how)[0].tolist())
            return scores

        scores = np.array(self.cached(f"{judge}_orders_{model}", [judge, model], make))
        truth = np.array([answers.utility for answers in drawn])
        right, counted = np.zeros(truth.shape[1]), np.zeros(truth.shape[1])
        for a, b in combinations(range(DRAWS), 2):
            gap, judged = truth[a] - truth[b], scores[a] - scores[b]
            known = np.abs(gap) >= report.TIE
            counted += known
            right += known * np.where(judged == 0, 0.5, (gap > 0) == (judged > 0))
        share = right / np.maximum(counted, 1)
        return estimate(share, self.groups(prompts), weights=counted)

    def pretraining_tokens(self) -> int:
        """Of the base model's text, end tokens included."""
        encoding = self.speaker("base").encoding
        texts = read_documents(self.folder / "data" / "train" / "pretrain.txt")
        return sum(len(encoding.encode_ordinary(text)) + 1 for text in texts)

    def flawed(self, data: str) -> Estimate:
        """Share of the training demonstrations in a folder that the grader takes marks off."""
        records = read_jsonl(
            self.folder / data / "train" / "demonstrations.jsonl", "demonstrations"
        )
        return estimate([flawed(self.world, record) for record in records])

    def demonstration_losses(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean -log p per token of each validation demonstration, and its number of tokens."""

        def make() -> list[list[float]]:
            speaker = self.speaker(name)
            path = self.folder / "data" / "valid" / "demonstrations.jsonl"
            records = read_jsonl(path, "demonstrations")
            prompts = [encode_prompt(speaker.encoding, r["prompt"]) for r in records]
            responses = [encode_response(speaker.encoding, r["response"]) for r in records]
            logprobs = measure.total_logprobs(speaker, prompts, responses)
            tokens = np.array([len(response) for response in responses])
            return [(-logprobs / tokens).tolist(), tokens.tolist()]

        losses, tokens = self.cached(f"{name}_demonstrations", [name], make)
        return np.array(losses), np.array(tokens)

    def professions(self) -> list[str]:
        """The profession that each pair of sentences of `entropies` is about."""
        pairs = bias_pairs(self.world)[: 20 if self.fast else None]
        return [next(job for job in VALUES["job"] if job in pair[0]) for pair in pairs]

    # ------------------------------------------------------------------ operations

    def trained(self, run: str) -> float:
        """Operations of a supervised run, see claims.cost."""
        config, info = read_config(self.folder / run, GPTConfig), read_info(self.folder / run)
        args, encoding = Namespace(**info["settings"]), self.speaker("base").encoding
        data, repeated, size = self.folder / "data" / "train", 0, config.n_positions
        if info["stage"] == "rm":
            groups = compared(data / "comparisons.jsonl", encoding, args)
            rows = [(len(s), 0) for *_, e in groups for s in e.sequences]  # no head of a GPT
            repeated = sum((len(e.sequences) - 1) * prompt for _, prompt, e in groups)
        else:
            if info["stage"] == "base":
                early = args.short_tokens, args.short_fraction
                text = str(data / "pretrain.txt")
                examples = train_sft.load_sequences(text, encoding, size, *early)
            else:
                path = str(data / "demonstrations.jsonl")
                examples = train_sft.load_demonstrations(path, encoding, args)
            rows = [(len(tokens), len(tokens) - skipped) for tokens, skipped in examples]
        lengths, predicted = zip(*rows, strict=True)
        epoch = 3 * forward_flops(config, lengths, sum(predicted), repeated)
        log, mixed = self.log(run), 0
        if info["stage"] == "sft" and args.pretrain_data:  # so many sequences a step beside
            share = args.pretrain_fraction
            mixed = max(1, round(args.batch_size * share / (1 - share))) * len(log)
        text = 3 * mixed * forward_flops(config, [size], size - 1)
        return text + epoch * sum(float(row["tokens"]) for row in log) / sum(lengths)

    def reinforced(self, run: str) -> float:
        """Operations of a PPO run, see claims.cost."""
        args = Namespace(**read_info(self.folder / run)["settings"])
        path = str(self.folder / "data" / "train" / "ppo_prompts.jsonl")
        encoding = self.speaker("base").encoding
        prompts = train_ppo.load_prompts(path, encoding, args.max_prompt_tokens)
        prompt = float(np.mean([len(tokens) for tokens in prompts]))
        shapes = [read_config(self.folder / name, GPTConfig) for name in (run, "rm")]
        total = 0.0
        for row in self.log(run):
            response, B = float(row["response_len"]), args.batch_size
            parts = iteration_flops(*shapes, [prompt + response] * B, B * response, args)
            total += sum(parts.values())
        return total

    # ------------------------------------------------------------------ logs

    def log(self, run: str) -> list[dict[str, str]]:
        """The rows of a run's log.csv, one for each step."""
        return [row for row in read_log(self.folder / run / "log.csv") if int(row["step"])]

    def setting(self, run: str, name: str):
        """A flag's value in a run."""
        return read_info(self.folder / run)["settings"][name]


def compared(
    path: Path, encoding: Encoding, args: Namespace
) -> list[tuple[int, int, train_rm.Comparison]]:
    """The batch elements of a file, each with the number of its (first) record, counted from 1, and
    its prompt's number of tokens."""

    def ranked(line: tuple[int, Record]) -> tuple:
        return line[1]["prompt"], line[1]["responses"], line[1].get("ended")

    kept = []
    for _, lines in groupby(enumerate(read_jsonl(path, "comparisons"), 1), key=ranked):
        numbers, views = zip(*lines, strict=True)
        prompt = len(encode_prompt(encoding, views[0]["prompt"]))
        untied = any(train_rm.untied_pairs(view["ranks"]) for view in views)
        if untied and prompt <= args.max_prompt_tokens:
            kept.append((numbers[0], prompt))
    elements = train_rm.load_comparisons(str(path), encoding, args)
    return [(*of, element) for of, element in zip(kept, elements, strict=True)]


def first_line(sample: Sample, speaker: Speaker) -> Sample:
    """A continuation of raw text, cut at the end of its line, where it has then ended."""
    text, newline, _ = sample.text.lstrip(" ").partition("\n")
    ended = sample.ended or bool(newline)
    return Sample(sample.prompt, encode_response(speaker.encoding, text, ended), text, ended)


def right(rows: Iterable[tuple[Record, np.ndarray]]) -> np.ndarray:
    """Share of each record's pairs whose winner scores higher; equal scores count one half."""
    return np.array([((m > 0) + 0.5 * (m == 0)).mean() for _, m in rows])


def accuracy(rows: Sequence[tuple[Record, np.ndarray]]) -> Estimate:
    """Share of the pairs whose winner scores higher, with an interval over prompts."""
    return estimate(right(rows), weights=[len(m) for _, m in rows])
