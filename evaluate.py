"""Measure checkpoints: choose the SFT epoch, compare models in a report, check reward models.

    python evaluate.py select --run out/sft --reward_model out/rm --data PROMPTS \\
        --out out/sft_selected
        choose an SFT epoch: the last one whose samples score within one standard error of the best
        by the reward model (InstructGPT C.1)
    python evaluate.py measure --name sft --checkpoint out/sft_selected --reward_model out/rm \\
        --reference out/init --world out/data/world.json --data PROMPTS --pretrain_data FILE \\
        --out out/report/sft.json
        run all measurements on one checkpoint and write one file
    python evaluate.py report --measured out/report/base.json out/report/sft.json --baseline sft \\
        --out out/report
        turn those files into report.md, table.csv, table.txt and figures (paper 3.6, 4)
    python evaluate.py folds --folds 5 --comparisons FILE --init out/sft --out out/folds
        reward-model accuracy on human comparisons, each prompt held out once (paper 4.1, E.2)
    python evaluate.py public --data FOLDER --checkpoints base=out/base sft=out/sft --out out/public
        the paper's automatic evaluation on public data sets: the alignment tax (paper D)

What each command does stands in evaluation/, in the file of its name.
"""

from __future__ import annotations

import argparse
import sys

from data.commands import run_command
from data.flags import Named, natural, number, whole
from data.real.public_sets import PUBLIC_SETS

from evaluation.folds import cross_validate
from evaluation.measure import measure
from evaluation.public import measure_public
from evaluation.report import write_report
from evaluation.select import select
from model import MISSING_EOS_SCORE
from run import Parser
from sample import sampling_flags


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for define in (select_flags, measure_flags, report_flags, folds_flags, public_flags):
        name = define.__name__.removesuffix("_flags")
        shape = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(name, help=define.__doc__, formatter_class=shape)
        define(command)
        command.add_argument("--out", required=True, help="file (measure) or folder to write")
    args = parser.parse_args(argv)
    if args.command == "measure" and args.best_prefix and not args.val_data:
        parser.error("--best_prefix needs --val_data, on which it is chosen")
    if args.command == "folds" and args.folds < 2:
        parser.error(f"--folds {args.folds}: expected at least 2")
    return args


def select_flags(parser: argparse.ArgumentParser) -> None:
    """choose the epoch of an SFT run by reward-model score"""
    add = parser.add_argument
    add("--run", required=True, help="run folder of train_sft.py, with epochs/")
    add("--select_every", type=natural, default=1, help="of so many epochs one, and the last")
    judge_flags(parser)


def measure_flags(parser: argparse.ArgumentParser) -> None:
    """measure one checkpoint for a report"""
    add = parser.add_argument
    add("--name", required=True, help="of the model in the report")
    add("--checkpoint", required=True, metavar="FOLDER", help="language model")
    add("--resample", action="store_true", help="for the baseline: sample twice, to compare these")
    add("--best_of", type=natural, default=1, help="also the best of so many samples, by the judge")
    add("--best_prefix", action="store_true", help="also after the best of some texts (3.5)")
    add("--val_data", help="prompts.jsonl on which --best_prefix chooses")
    add("--reference", help="checkpoint folder that the KL is measured from")
    add("--pretrain_data", help="pretrain.txt for the held-out pretraining loss")
    tokens = {"type": whole, "default": 200_000}
    add("--num_pretrain_tokens", **tokens, help="tokens of it, evenly spaced; 0: all")
    add("--num_items", type=natural, default=200, help="items of each public task")
    add("--context", type=whole, default=0, help="tokens of a text; 0: the model's")
    judge_flags(parser)


def judge_flags(parser: argparse.ArgumentParser) -> None:
    """What judges the responses, and to which prompts they are."""
    add = parser.add_argument
    add("--reward_model", required=True, help="checkpoint folder of train_rm.py")
    add("--world", help="world.json: check the truth of responses")
    add("--data", required=True, help="prompts.jsonl; `measure` takes the probes beside it too")
    add("--num_prompts", type=whole, default=100, help="used for choices; 0: all")
    low = {"type": number, "default": MISSING_EOS_SCORE}
    add("--missing_eos_score", **low, help="of a response without an end token, as in PPO")
    sampling_flags(parser)


def report_flags(parser: argparse.ArgumentParser) -> None:
    """compare what was measured: tables, figures, words"""
    add = parser.add_argument
    add("--measured", nargs="+", required=True, metavar="FILE", help="of `measure`, in order")
    add("--comparisons", metavar="FILE", help="simulated ones: their labelers judge, as noisy")
    add("--baseline", required=True, help="name of the model that the others are compared with")


def folds_flags(parser: argparse.ArgumentParser) -> None:
    """validate reward models on human comparisons"""
    add = parser.add_argument
    add("--folds", type=natural, default=5, help="how many, at least 2")
    add("--comparisons", nargs="+", required=True, metavar="FILE", help="comparisons.jsonl")
    add("--init", required=True, help="checkpoint folder that each reward model starts from")
    add("--rm_flags", default="", help='further flags for train_rm.py, as one string: "--lr 3e-4"')
    sampling_flags(parser)


def public_flags(parser: argparse.ArgumentParser) -> None:
    """measure checkpoints on public evaluation sets"""
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="raw public sets")
    models = {"nargs": "+", "action": Named, "metavar": "NAME=FOLDER"}
    add("--checkpoints", required=True, **models, help="models, in order")
    add("--sets", nargs="+", choices=tuple(PUBLIC_SETS), metavar="NAME", help="only these")
    add("--num_items", type=natural, default=200, help="items of each set")
    add("--shots", type=whole, default=15, help="few-shot examples, at most; 0: none")
    labels = "labeled_data.csv to train a toxicity scorer on; by default one under --data"
    add("--toxicity_labels", metavar="FILE", help=labels)
    scorer = "instead of it, a Python function: list of texts -> scores, 0..1"
    add("--toxicity_scorer", metavar="MODULE:FUNCTION", help=scorer)
    add("--resume", action="store_true", help="keep what an earlier run into --out has measured")
    sampling_flags(parser)


COMMANDS = {
    "select": select,
    "measure": measure,
    "report": write_report,
    "folds": cross_validate,
    "public": measure_public,
}


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    COMMANDS[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
