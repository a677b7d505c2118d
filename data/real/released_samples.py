"""
Scores of the samples that OpenAI released with the InstructGPT paper.

    python -m data.real.released_samples FOLDER

FOLDER holds the CSV files of github.com/openai/following-instructions-human-feedback, in
automatic-eval-samples/: for 100 inputs of each set the outputs of twelve models. Toxicity
(Perspective) and truth (judge models) are given there and only averaged here; F1, exact match and
BLEU of the other sets are computed with the metrics that measure our own models.
"""

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.files import BadInput, run_command
from data.real.public_items import Completion, released_item
from data.real.public_sets import score_drop, score_squad2
from data.real.raw import find_files, get, read_text
from data.real.text_metrics import bleu_counts, corpus_bleu

Rows = list[tuple[str, dict[str, str]]]  # where it stands, and the row
Means = dict[tuple[str, str], dict[str, float]]  # (model, prompt type) -> score -> mean


def _number(row: dict[str, str], key: str, where: str) -> float:
    try:
        return float(get(row, key, str, where))
    except ValueError:
        raise BadInput(f'{where}: key "{key}": expected a number, found {row[key]!r}') from None


def toxicity(rows: Rows) -> dict[str, float]:
    return {"toxicity": float(np.mean([_number(row, "toxicity", where) for where, row in rows]))}


def truth(rows: Rows) -> dict[str, float]:
    """Shares of answers that the judges hold true, and both true and informative (above 0.5)."""
    true, info = (
        np.array([_number(row, key, where) > 0.5 for where, row in rows])
        for key in ("true", "info")
    )
    return {"true": float(true.mean()), "true_informative": float((true & info).mean())}


def _mean_scores(
    score: Callable[[str, Completion], dict[str, float]], rows: Rows, is_drop: bool
) -> dict[str, float]:
    scores = [
        score(get(row, "sample", str, where), released_item(row, where, is_drop))
        for where, row in rows
    ]
    return {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}


def squad2(rows: Rows) -> dict[str, float]:
    return _mean_scores(score_squad2, rows, is_drop=False)


def drop(rows: Rows) -> dict[str, float]:
    return _mean_scores(score_drop, rows, is_drop=True)


def fr_en(rows: Rows) -> dict[str, float]:
    counts = [
        bleu_counts(get(row, "sample", str, where), released_item(row, where, False).references)
        for where, row in rows
    ]
    return {"bleu": float(corpus_bleu(np.sum(counts, axis=0)))}


FILES: dict[str, Callable[[Rows], dict[str, float]]] = {
    "real_toxicity_samples.csv": toxicity,
    "truthful_qa_samples.csv": truth,
    "squadv2_samples.csv": squad2,
    "drop_samples.csv": drop,
    "fr_to_en_samples.csv": fr_en,
}


def means(path: Path) -> Means:
    """Mean scores of one of the released files for each model and prompt type, in its order."""
    csv.field_size_limit(1 << 27)
    groups: dict[tuple[str, str], list] = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path))), start=1):
        where = f"{path}: row {number}"
        key = get(row, "model_type", str, where), get(row, "prompt_type", str, where)
        groups.setdefault(key, []).append((where, row))
    if not groups:
        raise BadInput(f"{path}: no rows; expected samples")
    return {key: FILES[path.name](rows) for key, rows in groups.items()}


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if len(args) != 1:
        raise BadInput("usage: python -m data.real.released_samples FOLDER")
    found = [path for path in find_files(Path(args[0]), r"_samples\.csv$") if path.name in FILES]
    if not found:
        raise BadInput(f"{args[0]}: none of {', '.join(FILES)} there")
    for path in found:
        table = means(path)
        models, prompts = (list(dict.fromkeys(key[i] for key in table)) for i in (0, 1))
        for score in next(iter(table.values())):
            print(f"{path.name}: {score}")
            print(f"{'':16}" + "".join(f"{name:>20}" for name in prompts))
            for model in models:
                cells = (table.get((model, name), {}).get(score, np.nan) for name in prompts)
                print(f"{model:16}" + "".join(f"{value:20.4f}" for value in cells))
            print()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
