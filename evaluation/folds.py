"""Reward-model accuracy on human comparisons, by cross-validation over prompts (paper 4.1, E.2).

    python evaluate.py folds --folds 5 --comparisons FILE ... --init out/sft --out out/folds \\
        --rm_flags "--lr 3e-4 --batch_size 8"

Prompts are dealt into folds. For each fold, train_rm.py trains on the others, and the reward model
scores the pairs of this one: is the preferred response higher? Two judges that cannot read are
measured beside it: "the longer response wins", and a logistic regression on differences of a few
simple features, fitted on the same training folds. A reward model that does not beat them has
learned only form. Accuracy is given for each data set (key "data_set", else the file's name), over
all pairs that the labeler did not tie; an equal score counts one half.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from data import files
from data.files import BadInput, Record, check
from data.outputs import claim
from data.stages import progress
from data.tokenizer import encode_prompt, encode_response, load_tokenizer

import numpy as np
import tiktoken
import torch

from checkpoint import read_info
from evaluation.report import as_markdown, as_text, csv_text, estimate
from model import ScalarModel, pad_right

ROOT = Path(__file__).parents[1]
READ_FLAGS = f"import sys; sys.path[0], sys.argv[0] = {str(ROOT)!r}, 'train_rm.py'; "
READ_FLAGS += "import train_rm; train_rm.get_args()"
JUDGES = {"reward_model": "reward model", "longer": "longer wins", "features": "simple features"}
FEATURES = ("tokens", "log tokens", "lines", "overlap with the prompt", "punctuation marks")


def pairs_of(ranks: list[int]) -> np.ndarray:
    """(winner, loser) for every two responses of different rank, rank 1 being best: (pairs, 2)."""
    return np.argwhere(np.array(ranks)[:, None] < np.array(ranks))


def rightly(scores: np.ndarray, pairs: np.ndarray) -> float:
    """How many of the pairs the scores order as the labeler did; equal scores count one half."""
    gap = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    return float((gap > 0).sum() + 0.5 * (gap == 0).sum())


# ------------------------------------------------------------------------------------------------
# The judges that cannot read


def features_of(prompt: str, response: str, num_tokens: int) -> list[float]:
    """The numbers in FEATURES; overlap is the share of the response's distinct words that the
    prompt holds."""
    words, asked = set(response.lower().split()), set(prompt.lower().split())
    return [
        num_tokens,
        float(np.log1p(num_tokens)),
        response.count("\n") + 1,
        len(words & asked) / max(1, len(words)),
        sum(character in ".,;:!?()\"'-" for character in response),
    ]


def fit_logistic(x: np.ndarray, weights: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Newton's method for b that maximises sum_i w_i log sigmoid(x_i b) - ridge |b s|^2 / 2.

    x (N, F) are features of the winner minus those of the loser, so there is no intercept: swapping
    the two must negate the margin. s is their standard deviation, so that the ridge does not care
    about units. Steps are halved until the objective does not fall. Returns b, (F,).
    """
    scale = np.maximum(x.std(axis=0), 1e-9)
    x = x / scale

    def objective(b: np.ndarray) -> float:
        return float(-(weights * np.logaddexp(0, -x @ b)).sum() - 0.5 * ridge * b @ b)

    b = np.zeros(x.shape[1])
    for _ in range(100):
        p = 0.5 * (1 + np.tanh(x @ b / 2))  # sigmoid that cannot overflow
        gradient = x.T @ (weights * (1 - p)) - ridge * b
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(b))
        step = np.linalg.solve(hessian, gradient)
        while objective(b + step) < objective(b) and np.abs(step).max() > 1e-12:
            step = step / 2
        b = b + step
        if np.abs(step).max() < 1e-9:
            break
    return b / scale


# ------------------------------------------------------------------------------------------------
# One fold


def load_comparisons(paths: list[str], encoding: tiktoken.Encoding, limit: int) -> list[Record]:
    """Comparisons with at least one untied pair and a prompt within the limit, each with a
    "data_set". Says what was dropped."""
    kept, too_long, tied = [], 0, 0
    for path in paths:
        for record in files.read_jsonl(path, "comparisons"):
            if len(encode_prompt(encoding, record["prompt"])) > limit:
                too_long += 1
            elif not len(pairs_of(record["ranks"])):
                tied += 1
            else:
                kept.append({"data_set": Path(path).stem} | record)
                check(kept[-1], {"data_set": str}, f"{path}: prompt {record['prompt'][:40]!r}")
    dropped = f"{too_long} with a prompt over {limit} tokens and {tied} with ties only"
    print(f"{len(kept)} comparisons; dropped {dropped}", flush=True)
    return kept


def deal(records: list[Record], num_folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The fold and the prompt's number of each record, (N,) each; a prompt is in one fold only."""
    numbers = {p: i for i, p in enumerate(dict.fromkeys(record["prompt"] for record in records))}
    if len(numbers) < num_folds:
        raise BadInput(f"--folds {num_folds}: only {len(numbers)} distinct prompts are left")
    fold_of = np.random.default_rng(seed).permutation(len(numbers)) % num_folds
    prompts = np.array([numbers[record["prompt"]] for record in records])
    return fold_of[prompts], prompts


@dataclass
class Read:
    """What the judges know of one comparison."""

    pairs: np.ndarray  # (winner, loser), (P, 2)
    sequences: list[list[int]]  # prompt and response, cut as in training
    lengths: np.ndarray  # of the whole responses, in tokens
    features: np.ndarray  # (K, F)


def read(record: Record, encoding: tiktoken.Encoding, max_new_tokens: int) -> Read:
    """The reward model reads responses cut to `max_new_tokens`; the judges that cannot read know
    their whole length."""
    prompt, texts = encode_prompt(encoding, record["prompt"]), record["responses"]
    ends = record.get("ended", [True] * len(texts))
    said = [encode_response(encoding, t, ended=e) for t, e in zip(texts, ends, strict=True)]
    lengths = [len(tokens) for tokens in said]
    rows = [features_of(record["prompt"], t, n) for t, n in zip(texts, lengths, strict=True)]
    cut = [prompt + tokens[:max_new_tokens] for tokens in said]
    return Read(pairs_of(record["ranks"]), cut, np.array(lengths), np.array(rows))


def fit_features(train: list[Read]) -> np.ndarray:
    """Coefficients of the logistic regression; each comparison weighs the same."""
    gaps = [r.features[r.pairs[:, 0]] - r.features[r.pairs[:, 1]] for r in train]
    weights = [np.full(len(r.pairs), 1 / len(r.pairs)) for r in train]
    return fit_logistic(np.concatenate(gaps), np.concatenate(weights))


@torch.no_grad()
def judge(one: Read, model: ScalarModel, coefficients: np.ndarray) -> dict[str, float]:
    """How many of the pairs each of JUDGES orders as the labeler did."""
    device = model.score.weight.device
    scores = model.scores(*pad_right(one.sequences, model.config.eos_token_id, device))
    return {
        "reward_model": rightly(scores.double().cpu().numpy(), one.pairs),
        "longer": rightly(one.lengths, one.pairs),
        "features": rightly(one.features @ coefficients, one.pairs),
    }


def rm_flags(folder: Path, data: Path, args: Namespace) -> list[str]:
    """Flags of train_rm.py. Raises `BadInput` where --rm_flags has one of those set here."""
    names = "init seed device dtype kernels max_prompt_tokens max_new_tokens".split()
    own = {"data": data, "out": folder} | {name: getattr(args, name) for name in names}
    try:
        more = shlex.split(args.rm_flags)
    except ValueError as error:
        raise BadInput(f"--rm_flags {args.rm_flags!r}: {error}") from None
    if twice := {word.split("=")[0] for word in more} & {f"--{name}" for name in own}:
        raise BadInput(f"--rm_flags {args.rm_flags!r}: {min(twice)} is set by `folds` itself")
    return [*(f"--{name}={value}" for name, value in own.items()), *more]


def run_python(*command: str) -> None:
    """Exits with the code of a command that fails."""
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def train_reward_model(folder: Path, data: Path, args: Namespace) -> ScalarModel:
    """Run train_rm.py on `data` with --rm_flags. Exits with its code where it fails."""
    run_python(str(ROOT / "train_rm.py"), *rm_flags(folder, data, args))
    how = {"impl": args.kernels, "dtype": args.dtype}
    return ScalarModel.from_pretrained(folder, **how).to(args.device).frozen()


# ------------------------------------------------------------------------------------------------
# All folds


def cross_validate(args: Namespace) -> None:
    """Every fold, then folds.csv and folds.md: accuracy with a 95 % interval over prompts."""
    out = Path(args.out)
    if flags := args.rm_flags and rm_flags(out / "rm", out / "train.jsonl", args):
        run_python("-c", READ_FLAGS, *flags)  # refused, if at all, before any work
    claim(args.out, "folds", {"init": args.init, "comparisons": args.comparisons})
    read_info(args.init)  # says which stage is missing
    encoding = load_tokenizer(Path(args.init) / "tokenizer.json")
    records = load_comparisons(args.comparisons, encoding, args.max_prompt_tokens)
    folds, prompts = deal(records, args.folds, args.seed)
    reads = [read(record, encoding, args.max_new_tokens) for record in records]
    rows: list[dict] = []
    for fold in progress(range(args.folds), out.name, "fold"):
        folder, outside = out / f"fold_{fold}", np.flatnonzero(folds != fold)
        train = folder / "train.jsonl"
        files.write_jsonl(train, [records[i] for i in outside], "comparisons")
        model = train_reward_model(folder / "rm", train, args)
        coefficients = fit_features([reads[i] for i in outside])
        for i in np.flatnonzero(folds == fold):
            row = {"data_set": records[i]["data_set"], "prompt": prompts[i]}
            row["pairs"] = len(reads[i].pairs)
            rows.append(row | judge(reads[i], model, coefficients))
    write_results(out, rows, args.folds)


def write_results(out: Path, rows: list[dict], num_folds: int) -> None:
    """folds.csv, folds.md, and the table on the terminal."""
    results = []
    shown = [["data set", "prompts", "pairs", *JUDGES.values(), "reward model - longer"]]
    names = sorted({row["data_set"] for row in rows})
    for name in [*names, "all"] if len(names) > 1 else names:
        mine = [row for row in rows if name in (row["data_set"], "all")]
        pairs, prompts = (np.array([row[key] for row in mine]) for key in ("pairs", "prompt"))
        right = {key: np.array([row[key] for row in mine]) / pairs for key in JUDGES}
        right["difference"] = right["reward_model"] - right["longer"]
        size = {"prompts": len(set(prompts)), "pairs": int(pairs.sum())}
        shown.append([name, *map(str, size.values())])
        for key, values in right.items():
            e, sign = estimate(values, prompts, pairs), "+" if key == "difference" else ""
            accuracy = {"accuracy": e.value, "ci_low": e.low, "ci_high": e.high}
            results.append({"data_set": name, "judge": key} | accuracy | size)
            shown[-1].append(f"{e.value:{sign}.3f} [{e.low:{sign}.3f}, {e.high:{sign}.3f}]")
    files.write_atomic(out / "folds.csv", csv_text(results))
    words = (
        f"Share of human preferences that each judge reproduces, {num_folds} folds by prompt: "
        "every pair is judged by a model that was not trained on its prompt. 95 % intervals by "
        "bootstrap over prompts. Chance is 0.5."
    )
    page = f"# Reward models on human comparisons\n\n{words}\n\n{as_markdown(shown)}\n"
    files.write_atomic(out / "folds.md", page)
    print("\n" + as_text(shown) + f"\nwrote {out}/folds.md")
