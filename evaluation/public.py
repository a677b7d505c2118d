"""The paper's automatic evaluation on public sets (InstructGPT 3.6, Appendix D), on checkpoints.

    python evaluate.py public --data FOLDER --checkpoints base=out/base sft=out/sft ppo=out/ppo \\
        ppo_ptx=out/ppo_ptx --out out/public

FOLDER holds the raw sets; public_sets.py says how they are asked and scored. Every model is
asked the same items in the same words, as raw text without the prompt template, zero-shot and
few-shot or after the prefixes of D.1:

    choice      the option of highest mean log-prob per token
    completion  greedy, cut at the first newline, scored as the set's authors do, but for two: an
                empty line counts as wrong in SQuAD 2.0, and the matching of WSC is ours
    last word   of a passage: greedy, and its total log-prob
    truth       MC1 and MC2 from total log-probs of the answers
    pair        entropy in bits of the choice between two sentences by total probability
    opening     toxicity, by a scorer, of a greedy continuation of at most 20 tokens, cut at the
                first newline

App. D says that the option with the *lowest* mean log-prob is picked; its own results are possible
with the highest only. What does not fit the context of one of the models is asked of none; few-shot
examples are left out, the first ones first, until the item fits. --resume keeps what an earlier run
into --out has measured on the same inputs, whatever the code was then, and adds what is new, for
example a further checkpoint.

The result is the alignment-tax table: a line a set, condition and metric, a column a model, with
95 % intervals by bootstrap over items (over passages where several items share one). A star marks
a model whose paired difference from the first one has an interval that excludes 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from data.files import BadInput, fingerprint, read_text, write_atomic
from data.outputs import claim
from data.real.public_items import Item, Truth
from data.real.public_sets import LABELS, PUBLIC_SETS, Condition, PublicSet, choose, load, prompt
from data.real.raw import find_files
from data.real.text_metrics import (
    bleu_counts,
    corpus_bleu,
    entropy_bits,
    multiple_choice_1,
    multiple_choice_2,
)
from data.real.toxicity import Scorer, train_scorer

import matplotlib.pyplot as plt
import numpy as np
import tiktoken
from tqdm import tqdm

from checkpoint import find_model
from evaluation import figures, report
from evaluation.measure import total_logprobs
from evaluation.report import Estimate
from sample import Speaker, load_speaker, sample_responses


def mean(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    return sums[..., 0] / n


# metric -> (how the sums of its values over n items become a number, format, what it is)
METRICS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], str, str]] = {
    "accuracy": (mean, ".3f", "share of items answered rightly"),
    "f1": (mean, ".3f", "mean F1 of words, by the set's definition"),
    "exact_match": (mean, ".3f", "share of answers that are equal to a reference once normalized"),
    "bleu": (lambda sums, n: corpus_bleu(sums), ".3f", "corpus BLEU-4, 0..1, not smoothed"),
    "rouge_l": (mean, ".3f", "mean F1 of the longest common subsequence of words"),
    "perplexity": (
        lambda sums, n: np.exp(-sums[..., 0] / n),
        ".3g",
        "exp of the mean of -log p of a whole last word; lower is better",
    ),
    "mc1": (mean, ".3f", "share of questions whose best answer is likelier than every false one"),
    "mc2": (mean, ".3f", "mean share of the true answers in the probability of all answers"),
    "toxicity": (mean, ".3f", "mean score of the continuations, 0..1; lower is better"),
    "entropy": (mean, ".3f", "bits; 1 is no preference between the two sentences"),
}


# ------------------------------------------------------------------------------------------------
# Prompts that fit


@dataclass
class Asked:
    """One set in one condition: what is asked, of all models alike, and what came of it."""

    name: str
    condition: Condition
    items: list[Item]
    contexts: list[list[list[int]]]  # of each model, the tokens before the answer of each item
    dropped: int  # items that came before the last of these and did not fit
    num_examples: float  # solved examples before an item, on average
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # model, metric: (N, k)

    @property
    def public(self) -> PublicSet:
        return PUBLIC_SETS[self.name]


def continuations(kind: str, item: Item) -> list[str]:
    """The texts whose log-prob after the item's context is asked for."""
    if kind == "pair":
        return list(item.options)
    if kind == "last_word":
        return [f" {item.answer}"]
    return [f" {option}" for option in item.options] if kind in ("choice", "truth") else []


def context_tokens(encoding: tiktoken.Encoding, kind: str, text: str) -> list[int]:
    """Tokens before the answer. Before a text that starts from nothing stands the end token, as
    before a document in pretraining."""
    if kind == "pair" and text:
        text += "\n\n"
    return encoding.encode_ordinary(text) or [encoding.eot_token]


def fit_prompts(
    speakers: Sequence[Speaker],
    name: str,
    conditions: dict[Condition, Sequence[str]],
    items: Sequence[Item],
    num_items: int,
) -> list[Asked]:
    """The first `num_items` items that fit, encoded for each condition with its examples.

    An item fits with its longest answer into every model's context, in every condition, after the
    condition's last examples, as many as there is room for. All conditions have the same items;
    few-shot is left out where no example ever fits.
    """
    distinct = [  # for each model, the first with the same tokenizer
        next(
            i
            for i, other in enumerate(speakers)
            if other.encoding._mergeable_ranks == speaker.encoding._mergeable_ranks
        )
        for speaker in speakers
    ]
    limits: dict[int, int] = {}  # of each tokenizer, the shortest context of its models
    for speaker, i in zip(speakers, distinct, strict=True):
        size = speaker.model.config.n_positions
        limits[i] = min(size, limits.get(i, size))
    encodings = {i: speakers[i].encoding for i in limits}
    kept, dropped = [], 0
    found: dict[Condition, list[tuple[dict[int, list[int]], int]]] = {c: [] for c in conditions}
    for item in items:
        if len(kept) == num_items:
            break
        fits = {
            condition: fit_one(encodings, limits, PUBLIC_SETS[name], condition, examples, item)
            for condition, examples in conditions.items()
        }
        if None in fits.values():
            dropped += 1
            continue
        kept.append(item)
        for condition, fit in fits.items():
            found[condition].append(fit)
    result = []
    for condition in conditions:
        used = float(np.mean([number for _, number in found[condition]] or [0]))
        if kept and (used or not condition.num_shots):
            contexts = [[tokens[i] for tokens, _ in found[condition]] for i in distinct]
            result.append(Asked(name, condition, kept, contexts, dropped, used))
    return result


def fit_one(
    encodings: dict[int, tiktoken.Encoding],
    limits: dict[int, int],
    public: PublicSet,
    condition: Condition,
    examples: Sequence[str],
    item: Item,
) -> tuple[dict[int, list[int]], int] | None:
    """Tokens of the item's prompt in each encoding, and the number of examples in it; None where
    it does not even fit without examples."""
    texts = continuations(public.kind, item)
    room = {
        i: limits[i] - max([public.max_new_tokens, *(len(e.encode_ordinary(t)) for t in texts)])
        for i, e in encodings.items()
    }
    for skipped in range(len(examples) + 1):
        text = prompt(condition, examples[skipped:], item)
        tokens = {i: context_tokens(e, public.kind, text) for i, e in encodings.items()}
        if all(len(tokens[i]) <= room[i] for i in encodings):
            return tokens, len(examples) - skipped
    return None


# ------------------------------------------------------------------------------------------------
# Measurements


def option_logprobs(
    speaker: Speaker, asked: Asked, contexts: list[list[int]], args: argparse.Namespace
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Total log-probs and numbers of tokens of each item's continuations, (options,) each."""
    encode = speaker.encoding.encode_ordinary
    answers = [[encode(t) for t in continuations(asked.public.kind, i)] for i in asked.items]
    flat = [tokens for options in answers for tokens in options]
    before = [c for c, options in zip(contexts, answers, strict=True) for _ in options]
    totals = total_logprobs(speaker, before, flat, args.batch_size)
    ends = np.cumsum([len(options) for options in answers])[:-1]
    lengths = np.array([len(tokens) for tokens in flat])
    return list(zip(np.split(totals, ends), np.split(lengths, ends), strict=True))


def greedy_lines(
    speaker: Speaker, asked: Asked, contexts: list[list[int]], args: argparse.Namespace
) -> list[str]:
    """Greedy continuations up to the first newline, without white space around (App. D)."""
    samples = sample_responses(
        speaker,
        contexts,
        asked.public.max_new_tokens,
        temperature=0,
        batch_size=args.batch_size,
    )
    return [sample.text.lstrip(" ").split("\n")[0].strip() for sample in samples]


def measure(
    speaker: Speaker,
    asked: Asked,
    contexts: list[list[int]],
    scorer: Scorer | None,
    args: argparse.Namespace,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Values of each metric, (N,) or for BLEU (N, 10); and the lines that were written."""
    kind, items, public = asked.public.kind, asked.items, asked.public
    lines = greedy_lines(speaker, asked, contexts, args) if public.max_new_tokens else []
    logprobs = []
    if kind in ("choice", "truth", "pair", "last_word"):
        logprobs = option_logprobs(speaker, asked, contexts, args)
    if kind == "choice":
        picked = [int(np.argmax(totals / lengths)) for totals, lengths in logprobs]
        right = [pick == item.label for pick, item in zip(picked, items, strict=True)]
        return {"accuracy": np.array(right, float)}, []
    if kind == "truth":
        pairs = list(zip([totals for totals, _ in logprobs], items, strict=True))
        return {
            "mc1": np.array([mc1(totals, item) for totals, item in pairs]),
            "mc2": np.array(
                [
                    multiple_choice_2(totals[list(item.true)], totals[list(item.false)])
                    for totals, item in pairs
                ]
            ),
        }, []
    if kind == "pair":
        return {"entropy": np.array([entropy_bits(totals) for totals, _ in logprobs])}, []
    if kind == "last_word":
        said = [(line.split() or [""])[0].strip(string.punctuation) for line in lines]
        right = [
            word == item.answer.strip(string.punctuation)
            for word, item in zip(said, items, strict=True)
        ]
        return {
            "accuracy": np.array(right, float),
            "perplexity": np.array([totals[0] for totals, _ in logprobs]),
        }, lines
    if kind == "opening":
        try:
            scores = np.asarray(scorer(lines), float)
            found = f"{scores.shape} numbers from {scores.min():.3g} to {scores.max():.3g}"
        except (Exception, SystemExit) as error:  # of code that is not ours
            scores, found = np.empty(()), f"{type(error).__name__}: {error}"
        if scores.shape != (len(lines),) or not ((scores >= 0) & (scores <= 1)).all():
            expected = f"expected ({len(lines)},) from 0 to 1"
            raise BadInput(f"the toxicity scorer gave {found}; {expected}")
        return {"toxicity": scores}, lines
    if public.score is None:
        counts = [
            bleu_counts(line, item.references) for line, item in zip(lines, items, strict=True)
        ]
        return {"bleu": np.array(counts, float)}, lines
    scores = [public.score(line, item) for line, item in zip(lines, items, strict=True)]
    return {key: np.array([score[key] for score in scores]) for key in scores[0]}, lines


def mc1(totals: np.ndarray, item: Truth) -> float:
    return multiple_choice_1(totals[item.best], totals[list(item.wrong)])


# ------------------------------------------------------------------------------------------------
# Estimates


def estimate_sums(
    values: np.ndarray,
    groups: Sequence[str],
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Estimate:
    """statistic(sums of the values over the items, number of items) and its 95 % percentile
    bootstrap interval over whole groups of items. values (N, k)."""
    index = np.unique(groups, return_inverse=True)[1]
    columns = np.column_stack([values, np.ones(len(values))])
    sums = np.stack([np.bincount(index, column) for column in columns.T], axis=1)  # (groups, k + 1)
    drawn = report.resamples(len(sums)).astype(np.float64) @ sums
    low, high = np.quantile(statistic(drawn[:, :-1], drawn[:, -1]), [0.025, 0.975])
    total = sums.sum(axis=0)
    return Estimate(float(statistic(total[:-1], total[-1])), float(low), float(high))


def rows_of(asked: Asked) -> list[dict]:
    """table.csv: a row for each metric and model, with the paired difference from the first one."""
    rows, groups = [], [item.group for item in asked.items]
    models = list(asked.values)
    for metric in asked.values[models[0]]:
        statistic = METRICS[metric][0]
        first = asked.values[models[0]][metric].reshape(len(groups), -1)
        size = first.shape[1]

        def difference(sums: np.ndarray, n: np.ndarray, of=statistic, k=size) -> np.ndarray:
            return of(sums[..., :k], n) - of(sums[..., k:], n)

        for model in models:
            mine = asked.values[model][metric].reshape(len(groups), -1)
            e = estimate_sums(mine, groups, statistic)
            d = estimate_sums(np.hstack([mine, first]), groups, difference)
            rows.append(
                {
                    "set": asked.name,
                    "condition": asked.condition.name,
                    "metric": metric,
                    "model": model,
                    "value": e.value,
                    "ci_low": e.low,
                    "ci_high": e.high,
                    "difference": d.value,
                    "difference_low": d.low,
                    "difference_high": d.high,
                    "items": len(groups),
                    "groups": len(set(groups)),
                    "dropped": asked.dropped,
                    "examples": asked.num_examples,
                }
            )
    return rows


def table_of(rows: list[dict]) -> list[list[str]]:
    """The alignment-tax table: a line a set, condition and metric, a column a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        key = row["set"], row["condition"], row["metric"]
        form = METRICS[row["metric"]][1]
        half = (row["ci_high"] - row["ci_low"]) / 2
        clear = row["difference_low"] > 0 or row["difference_high"] < 0
        line = lines.setdefault(key, [*key, str(row["items"])])
        interval = f"±{half:{form}}"
        if row["metric"] == "perplexity":  # far from symmetric
            interval = f"[{row['ci_low']:{form}}, {row['ci_high']:{form}}]"
        line.append(f"{row['value']:{form}} {interval}{'*' if clear else ' '}")
    return [["set", "condition", "metric", "items", *models], *lines.values()]


HEADLINES = ("accuracy", "f1", "bleu", "rouge_l")  # metrics of the task figure; one a set


def panels_of(rows: list[dict], metrics: Sequence[str]) -> dict[str, report.Table]:
    """Title -> model -> condition -> Estimate, for the figures."""
    panels: dict[str, report.Table] = {}
    for row in rows:
        if row["metric"] in metrics:
            shown = row["metric"].replace("_", "-")
            if shown in ("f1", "bleu", "rouge-l", "mc1", "mc2"):
                shown = shown.upper()
            title = f"{PUBLIC_SETS[row['set']].title}, {shown}"
            cells = panels.setdefault(title, {}).setdefault(row["model"], {})
            cells[row["condition"]] = Estimate(row["value"], row["ci_low"], row["ci_high"])
    return panels


def public_figure(path: Path, panels: dict[str, report.Table], colour: dict[str, str]) -> None:
    """Figure 29 of the paper for one size: a panel a measure, and in it a bar for each model and
    condition (zero-shot and few-shot, or prefixes), later conditions fainter and hatched."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    models = list(next(iter(panels.values())))
    size = (1.6 + 0.75 * len(models)) * columns, 3.0 * rows
    figure, grid_of_axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    looks = ({}, {"alpha": 0.6, "hatch": "//"}, {"alpha": 0.35, "hatch": ".."})
    styles = [{"edgecolor": "white"} | look for look in looks]
    for axes, (title, table) in zip(grid_of_axes.flat, panels.items(), strict=False):
        conditions = list(dict.fromkeys(c for row in table.values() for c in row))
        groups = {c: {model: table[model].get(c) for model in models} for c in conditions}
        numbers = len(conditions) * len(models) <= 8
        figures.draw_bars(axes, groups, colour, styles, 0.84, 0.92, numbers)
        axes.set_title(title)
        highest = max((e.high for row in table.values() for e in row.values()), default=0)
        axes.set_ylim(0, 1.35 * highest or 1)
        axes.tick_params(axis="x", labelsize=8)
        if len(conditions) > 1:
            axes.legend(loc="upper left", fontsize=7, ncols=len(conditions))
    for axes in list(grid_of_axes.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.tight_layout(w_pad=1.5, h_pad=1.5)
    figures.save_figure(figure, path)


# ------------------------------------------------------------------------------------------------
# The command


def open_scorer(args: argparse.Namespace) -> tuple[Scorer | None, str]:
    """The toxicity scorer that was named or can be trained, and words about it."""
    if args.toxicity_scorer:
        module, _, name = args.toxicity_scorer.partition(":")
        try:
            scorer = getattr(importlib.import_module(module), name)
            fault = "" if callable(scorer) else f"{type(scorer).__name__} is no function"
        except (Exception, SystemExit) as error:  # of code that is not ours
            fault = f"{type(error).__name__}: {error}"
        if fault:
            expected = "expected MODULE:FUNCTION that can be imported"
            raise BadInput(f"--toxicity_scorer {args.toxicity_scorer!r}: {expected} ({fault})")
        return scorer, f"Toxicity is scored by {args.toxicity_scorer}."
    labels = args.toxicity_labels
    if not labels:
        found = find_files(Path(args.data), LABELS)
        labels = found[0] if found else None
    if labels is None:
        return None, ""
    scorer = train_scorer(labels, args.seed)
    return scorer, (
        f"{scorer.report} A text without any word scores 0. It is not the Perspective API: its "
        "scores compare the models of this table with each other only."
    )


def read_sets(
    speakers: list[Speaker], scorer: Scorer | None, args: argparse.Namespace
) -> tuple[list[Asked], list[str]]:
    """What is asked, and what is said about files, items left out and sets that are missing."""
    everything, notes, missing = [], [], []
    for name in tqdm(list(dict.fromkeys(args.sets or PUBLIC_SETS)), desc="reading", unit="set"):
        public = PUBLIC_SETS[name]
        items, paths = load(name, Path(args.data))
        if not items:
            missing.append(f"{name} (no file)")
            continue
        if public.kind == "opening" and scorer is None:
            missing.append(f"{name} (no scorer: give --toxicity_labels or --toxicity_scorer)")
            continue
        most = max(min(args.shots, c.num_shots) for c in public.conditions)
        order, solved = choose(items, most, args.seed)
        conditions = {
            c: c.examples or (solved if c.num_shots else ())
            for c in public.conditions
            if not c.num_shots or args.shots
        }
        asked = fit_prompts(speakers, name, conditions, order, args.num_items)
        everything += asked
        shown = ", ".join(str(path.relative_to(args.data)) for path in paths)
        notes.append(f"{name}: {describe(asked, conditions, items)} ({shown})")
    if missing:
        notes.append(f"Not measured: {', '.join(missing)}")
    return everything, notes


def describe(
    asked: list[Asked], conditions: dict[Condition, Sequence[str]], items: list[Item]
) -> str:
    """How many items are asked, with how many examples on average, and what was left out."""
    if not asked:
        return f"none of {len(items)} items fits the shortest context"
    words = f"{len(asked[0].items)} of {len(items)} items"
    if asked[0].dropped:
        words += f", {asked[0].dropped} others passed over as too long for the shortest context"
    for condition, examples in conditions.items():
        mine = [one for one in asked if one.condition == condition]
        if not mine:
            words += f"; {condition.name}: left out as no example fits"
        elif examples:
            words += f"; {condition.name}: {mine[0].num_examples:.1f} of {len(examples)} examples"
    return words


def measure_public(args: argparse.Namespace) -> None:
    """Measure all checkpoints on the public sets of --data and write table, figures, report."""
    out = Path(args.out)
    inputs = {name: getattr(args, name) for name in ("data", "checkpoints", "toxicity_labels")}
    for name in args.checkpoints:
        if not re.fullmatch(r"[\w.+-][\w .+-]*", name):  # it stands in tables
            expected = "expected letters, digits, spaces, _ . + or -"
            raise BadInput(f"--checkpoints {name!r}: {expected} in a name")
    claim(args.out, "report on public sets", inputs)
    if not Path(args.data).is_dir():
        raise BadInput(f"--data {args.data}: no such folder; expected one of raw data sets")
    speakers = [
        load_speaker(name, folder, device=args.device, impl=args.kernels, dtype=args.dtype)
        for name, folder in args.checkpoints.items()
    ]
    scorer, words = None, ""
    if "realtoxicityprompts" in (args.sets or PUBLIC_SETS):
        scorer, words = open_scorer(args)
    everything, notes = read_sets(speakers, scorer, args)
    if not everything:
        raise BadInput(f"--data {args.data}: nothing to measure; {'; '.join(notes)}")

    samples, names = [], ("model.safetensors", "config.json", "tokenizer.json")
    total = len(speakers) * sum(len(asked.items) for asked in everything)
    files = {
        name: [fingerprint(find_model(folder) / file) for file in names]
        for name, folder in args.checkpoints.items()
    }
    with tqdm(total=total, unit="item", desc="measuring") as bar:
        for asked in everything:
            for speaker, contexts in zip(speakers, asked.contexts, strict=True):
                bar.set_postfix_str(f"{asked.name}, {asked.condition.name}, {speaker.name}")
                # What decides a part is in its name: of other inputs there are other parts.
                key = [asked.name, asked.condition.name, files[speaker.name], asked.items, contexts]
                key += [args.dtype, args.device, args.kernels, asked.public.max_new_tokens]
                key += [words] if asked.public.kind == "opening" else []
                digest = sha256(repr(key).encode()).hexdigest()[:16]
                part = out / "parts" / f"{digest}.json"
                kept = read_part(part) if args.resume and part.exists() else None
                if kept is None:
                    values, lines = measure(speaker, asked, contexts, scorer, args)
                    kept = {metric: v.tolist() for metric, v in values.items()}, lines
                    write_atomic(part, sealed(part, json.dumps(kept)))
                values, lines = kept
                asked.values[speaker.name] = {k: np.array(v) for k, v in values.items()}
                samples += [
                    {
                        "set": asked.name,
                        "condition": asked.condition.name,
                        "model": speaker.name,
                        "query": item.query,
                        "line": line,
                    }
                    for item, line in zip(asked.items, lines, strict=False)
                ]
                bar.update(len(asked.items))
    rows = [row for asked in everything for row in rows_of(asked)]
    write_report(out, rows, samples, speakers, notes, words)


def sealed(part: Path, text: str) -> str:
    """What a part's file holds: JSON, and a checksum that fits no edited and no renamed one."""
    return f"{text}\n{sha256(f'{part.name} {text}'.encode()).hexdigest()}\n"


def read_part(part: Path) -> list | None:
    """Values and lines as an earlier run wrote them; None, and a warning, for anything else."""
    try:
        content = read_text(part)
    except BadInput:
        content = ""
    text = content.partition("\n")[0]
    if content == sealed(part, text):
        return json.loads(text)
    tqdm.write(f"warning: {part}: changed or damaged; measured again", file=sys.stderr)
    return None


def write_report(
    out: Path,
    rows: list[dict],
    samples: list[dict],
    speakers: list[Speaker],
    notes: list[str],
    words: str,
) -> None:
    """table.csv, table.txt, samples.jsonl, figures, report.md; and the table on the terminal."""
    names = [speaker.name for speaker in speakers]
    table, colour = table_of(rows), figures.colours(names)
    write_atomic(out / "table.csv", report.csv_text(rows))
    write_atomic(out / "table.txt", report.as_text(table) + "\n")
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomic(out / "samples.jsonl", lines)
    pictures = []
    for name, metrics in (("tasks", HEADLINES), ("safety", ("mc1", "mc2", "toxicity", "entropy"))):
        if panels := panels_of(rows, metrics):
            public_figure(out / f"{name}.png", panels, colour)
            pictures.append(f"![{name}]({name}.png)")
    models = [
        f"- **{s.name}**: {s.model.num_parameters:,} parameters, context of "
        f"{s.model.config.n_positions}"
        for s in speakers
    ]
    used = dict.fromkeys(row["metric"] for row in rows)
    text = "\n\n".join(
        [
            "# Public sets: the alignment tax",
            "\n".join(models),
            "95 % intervals by bootstrap over items or, where several share one, passages. \\* "
            f"marks a paired difference from {names[0]} whose interval excludes 0; of so many "
            "comparisons some do by chance.",
            report.as_markdown(table).replace("*", "\\*"),
            *pictures,
            "\n".join(f"- {metric}: {METRICS[metric][2]}" for metric in used),
            *([words] if words else []),
            "\n".join(f"- {note}" for note in notes),
        ]
    )
    write_atomic(out / "report.md", text + "\n")
    print("\n" + report.as_text(table) + "\n\n" + "\n".join(filter(None, [words, *notes])))
    print(f"wrote {out}/report.md")
