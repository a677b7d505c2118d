"""The choice of the SFT epoch (InstructGPT C.1): by the reward model's score of its samples.

The paper chose SFT models "based on the RM score on the validation set", although validation loss
turns up after one epoch; selection.csv has the curves. Among the epochs whose score is within one
standard error of the best, the last is taken, see `last_of_the_best`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from data import files
from data.files import BadInput
from data.outputs import claim
from data.stages import progress
from data.tiny.grader import evaluation_utility
from data.tiny.world import World

import numpy as np

from evaluation import measure
from evaluation.measure import grades, load_prompts, load_reward_model, open_speaker, reward_scores
from evaluation.report import csv_text
from sample import respond


def select(args: argparse.Namespace) -> None:
    """Copy the epoch checkpoint that the reward model chooses to --out, replacing it."""
    out = Path(args.out)
    names = ("run", "reward_model", "data", "world")
    inputs = {name: getattr(args, name) for name in names}
    claim(args.out, "selection", inputs)
    if not Path(args.run, "model.safetensors").exists():
        raise BadInput(f"{args.run}: has no result yet; select when its training is done")
    epochs = [f for f in Path(args.run, "epochs").glob("*") if f.name.isdecimal()]
    folders = sorted(epochs, key=lambda folder: int(folder.name))
    if not folders:
        expected = "the run folder of an SFT run with --epoch_checkpoints"
        raise BadInput(f"{args.run}/epochs: no epoch checkpoints; expected {expected}")
    kept = [f for f in folders[:-1] if int(f.name) % args.select_every == 0] + folders[-1:]
    infos = [measure.run_info(folder) for folder in kept]
    judge = load_reward_model(args)
    world = World.load(args.world) if args.world else None
    first = open_speaker("first", kept[0], args, judge)
    records = load_prompts(args.data, first, args, limit=args.num_prompts)
    prompts = [record["prompt"] for record in records]
    rows, every, raws = [], [], []
    for folder, info in zip(progress(kept, out.name, "epoch"), infos, strict=True):
        speaker = open_speaker(folder.name, folder, args, judge)
        samples = respond(speaker, prompts, args)
        scores, raw = reward_scores(judge, speaker, prompts, samples, args)
        row = {"epoch": int(folder.name), "val_loss": info.get("val_loss"), "score": scores.mean()}
        if world:
            marks = grades(world, records, samples)
            row["utility"] = np.mean([evaluation_utility(mark) for mark in marks])
        rows.append(row)
        every.append(scores)
        raws.append(raw)
    if not np.array_equal(every, raws):  # some responses did not end
        rows = [row | {"score_raw": raw.mean()} for row, raw in zip(rows, raws, strict=True)]
    best = last_of_the_best(np.array(every))

    def write(aside: Path) -> None:
        for name in ("model.safetensors", "tokenizer.json"):
            shutil.copyfile(kept[best] / name, aside / name)
        info = infos[best] | {"selected_from": str(args.run), "selected_by": "score"}
        (aside / "config.json").write_text(json.dumps(info, indent=2) + "\n")
        (aside / "selection.csv").write_text(csv_text(rows))

    claim(args.out, "selection", inputs)  # still nobody's but an earlier selection's
    files.write_folder_atomic(out, write)
    for i, row in enumerate(rows):
        shown = " | ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None)
        print(shown + (" | chosen" if i == best else ""))
    print(f"wrote {out}: epoch {rows[best]['epoch']}, by reward-model score")


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
