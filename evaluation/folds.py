"""Reward-model accuracy on human comparisons, by cross-validation over prompts (paper 4.1, E.2).

    python evaluate.py --folds 5 --comparisons FILE ... --init out/sft --out out/folds \\
        --rm_flags "--lr 3e-4 --batch_size 8"

Prompts are dealt into folds. For each fold, train_rm.py trains on the others and is asked about
the pairs of this one: did it score the preferred response higher? Beside it stand two judges that
cannot read: the longer response wins, and a logistic regression on the differences of a few simple
features, fitted on the same training folds. A reward model that is not above them has learned
nothing but form. Accuracy is stated for each data set (key "data_set", else the file's name), over
all pairs that the labeler did not tie, an equal score counting one half.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from data.files import (
    BadInput,
    Record,
    fingerprint,
    read_jsonl,
    read_log,
    write_atomic,
    write_jsonl,
)
from data.tokenizer import encode_prompt, encode_response, load_tokenizer
from evaluation.report import as_markdown, as_text, csv_text, estimate
from model import ScalarModel, pad_right

JUDGES = ("reward_model", "longer", "features")
COLUMNS = ["data_set", "prompt", "pairs", *JUDGES]  # of results.csv: pairs judged rightly by each
FEATURES = ("tokens", "log tokens", "lines", "overlap with the prompt", "punctuation marks")


def pairs_of(ranks: list[int]) -> np.ndarray:
    """(winner, loser) for every two responses of different rank, rank 1 being best: (pairs, 2)."""
    pairs = [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i, j in combinations(range(len(ranks)), 2)
        if ranks[i] != ranks[j]
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


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


def load_comparisons(
    paths: list[str], encoding: tiktoken.Encoding, args: argparse.Namespace
) -> list[Record]:
    """Comparisons with at least one untied pair and a prompt within --max_prompt_tokens, each with
    a "data_set". Says what was dropped."""
    kept, too_long, tied = [], 0, 0
    for path in paths:
        for record in read_jsonl(path, "comparisons"):
            if len(encode_prompt(encoding, record["prompt"])) > args.max_prompt_tokens:
                too_long += 1
            elif not len(pairs_of(record["ranks"])):
                tied += 1
            else:
                kept.append({"data_set": Path(path).stem} | record)
    print(
        f"{len(kept)} comparisons; dropped {too_long} with a prompt over {args.max_prompt_tokens} "
        f"tokens and {tied} with ties only",
        flush=True,
    )
    return kept


def deal(records: list[Record], num_folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The fold and the prompt's number of each record, (N,) each; a prompt is in one fold only."""
    numbers = {p: i for i, p in enumerate(dict.fromkeys(record["prompt"] for record in records))}
    if len(numbers) < num_folds:
        raise BadInput(f"--folds {num_folds}: only {len(numbers)} distinct prompts are left")
    fold_of = np.random.default_rng(seed).permutation(len(numbers)) % num_folds
    prompts = np.array([numbers[record["prompt"]] for record in records])
    return fold_of[prompts], prompts


@torch.no_grad()
def judge(
    train: list[Record],
    test: list[tuple[int, Record]],
    model: ScalarModel,
    encoding: tiktoken.Encoding,
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """For each test record and its prompt's number, a row of COLUMNS.

    The reward model reads responses cut to --max_new_tokens, as in training; the judges that
    cannot read know their whole length.
    """

    def responses_of(record: Record) -> list[list[int]]:
        ended = record.get("ended", [True] * len(record["responses"]))
        return [
            encode_response(encoding, response, ended=end)
            for response, end in zip(record["responses"], ended, strict=True)
        ]

    def table_of(record: Record) -> np.ndarray:
        tokens = map(len, responses_of(record))
        return np.array(
            [
                features_of(record["prompt"], r, n)
                for r, n in zip(record["responses"], tokens, strict=True)
            ]
        )

    differences, weights = [], []
    for record in train:
        table, pairs = table_of(record), pairs_of(record["ranks"])
        differences.append(table[pairs[:, 0]] - table[pairs[:, 1]])
        weights.append(np.full(len(pairs), 1 / len(pairs)))
    coefficients = fit_logistic(np.concatenate(differences), np.concatenate(weights))

    rows = []
    end, device = model.config.eos_token_id, model.score.weight.device
    for number, record in test:
        prompt = encode_prompt(encoding, record["prompt"])
        responses, pairs = responses_of(record), pairs_of(record["ranks"])
        sequences = [prompt + response[: args.max_new_tokens] for response in responses]
        scores = model.scores(*pad_right(sequences, end, device))
        lengths = np.array([len(response) for response in responses])
        rows.append(
            {
                "data_set": record["data_set"],
                "prompt": number,
                "pairs": len(pairs),
                "reward_model": rightly(scores.double().cpu().numpy(), pairs),
                "longer": rightly(lengths, pairs),
                "features": rightly(table_of(record) @ coefficients, pairs),
            }
        )
    return rows


def train_reward_model(folder: Path, data: Path, args: argparse.Namespace) -> ScalarModel:
    """Run train_rm.py on `data`, going on where an interrupted run stopped."""
    command = [sys.executable, str(Path(__file__).parents[1] / "train_rm.py")]
    command += ["--data", str(data), "--init", args.init, "--out", str(folder), "--resume"]
    for name in ("seed", "device", "kernels", "max_prompt_tokens", "max_new_tokens"):
        command += [f"--{name}", str(getattr(args, name))]
    command += shlex.split(args.rm_flags)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    model = ScalarModel.from_pretrained(folder, impl=args.kernels)
    return model.to(args.device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# All folds


def cross_validate(args: argparse.Namespace) -> None:
    """Every fold, then folds.csv and folds.md: accuracy with a 95 % interval over prompts."""
    out = Path(args.out)
    encoding = load_tokenizer(Path(args.init) / "tokenizer.json")
    records = load_comparisons(args.comparisons, encoding, args)
    folds, prompts = deal(records, args.folds, args.seed)
    settings = {
        k: getattr(args, k)
        for k in (
            "folds",
            "comparisons",
            "init",
            "rm_flags",
            "seed",
            "max_prompt_tokens",
            "max_new_tokens",
        )
    }
    settings["data_sha256"] = [fingerprint(path) for path in args.comparisons]
    settings["init_sha256"] = fingerprint(Path(args.init) / "model.safetensors")
    header = json.dumps(settings, indent=2) + "\n"

    rows: list[dict] = []
    for fold in tqdm(range(args.folds), desc="folds"):
        folder = out / f"fold_{fold}"
        done, said = folder / "results.csv", folder / "settings.json"
        same = said.exists() and said.read_text(encoding="utf-8") == header
        if not (args.resume and same):
            shutil.rmtree(folder, ignore_errors=True)
        write_atomic(said, header)
        if not done.exists():
            inside = np.flatnonzero(folds == fold)
            train = [record for record, f in zip(records, folds, strict=True) if f != fold]
            write_jsonl(folder / "train.jsonl", train, "comparisons")
            model = train_reward_model(folder / "rm", folder / "train.jsonl", args)
            test = [(int(prompts[i]), records[i]) for i in inside]
            fresh = judge(train, test, model, encoding, args)
            write_atomic(done, csv_text(fresh))
        rows += read_log(done, COLUMNS)
    write_results(out, rows, args.folds)


def write_results(out: Path, rows: list[dict], num_folds: int) -> None:
    """folds.csv, folds.md, and the table on the terminal."""
    results, shown = (
        [],
        [
            [
                "data set",
                "prompts",
                "pairs",
                "reward model",
                "longer wins",
                "simple features",
                "reward model - longer",
            ]
        ],
    )
    names = sorted({row["data_set"] for row in rows})
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        mine = [row for row in rows if name in (row["data_set"], "all")]
        pairs = np.array([float(row["pairs"]) for row in mine])
        asked = [row["prompt"] for row in mine]
        right = {j: np.array([float(row[j]) for row in mine]) / pairs for j in JUDGES}
        right["difference"] = right["reward_model"] - right["longer"]
        cells = []
        for judge_name, values in right.items():
            e = estimate(values, asked, pairs)
            results.append(
                {
                    "data_set": name,
                    "judge": judge_name,
                    "accuracy": e.value,
                    "ci_low": e.low,
                    "ci_high": e.high,
                    "prompts": len(set(asked)),
                    "pairs": int(pairs.sum()),
                }
            )
            sign = "+" if judge_name == "difference" else ""
            cells.append(f"{e.value:{sign}.3f} [{e.low:{sign}.3f}, {e.high:{sign}.3f}]")
        shown.append([name, str(len(set(asked))), str(int(pairs.sum())), *cells])
    write_atomic(out / "folds.csv", csv_text(results))
    words = (
        f"Share of human preferences that each judge reproduces, {num_folds} folds by prompt: "
        "every pair is judged by a model that was not trained on its prompt. 95 % intervals by "
        "bootstrap over prompts. Chance is 0.5."
    )
    write_atomic(
        out / "folds.md",
        f"# Reward models on human comparisons\n\n{words}\n\n{as_markdown(shown)}\n",
    )
    print("\n" + as_text(shown) + f"\nwrote {out}/folds.md")
