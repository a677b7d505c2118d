"""Data sets that differ from the demo's in one respect, for runs that put a claim to the test.

python -m tests.claims.variants shuffle_labels --data FILE --out FILE
python -m tests.claims.variants shuffle_text --data FILE --out FILE
python -m tests.claims.variants without_group --data FILE --out FILE --group 0
python -m tests.claims.variants first --data FILE --out FILE --count 1500
python -m tests.claims.variants prompts --data FILE --out FILE --count 1000
python -m tests.claims.variants merge --data FILE FILE --out FILE
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from itertools import groupby, islice
from pathlib import Path

from data.commands import run_command
from data.files import (
    BadInput,
    Record,
    read_documents,
    read_jsonl,
    write_documents,
    write_jsonl,
)

NUM_GROUPS = 5  # of labelers, as in the paper's 4.1


def shuffle_labels(comparisons: list[Record], seed: int) -> list[Record]:
    """The same rankings, each dealt at random to the responses of its prompt: labels that say
    nothing, with ties and number of responses as they were."""
    rng = random.Random(f"labels {seed}")
    return [r | {"ranks": rng.sample(r["ranks"], len(r["ranks"]))} for r in comparisons]


def shuffle_text(documents: list[str], seed: int) -> list[str]:
    """The same words in each document, in random order; white space stays where it was."""
    rng = random.Random(f"text {seed}")
    shuffled = []
    for document in documents:
        words = re.findall(r"\S+", document)
        rng.shuffle(words)
        left = iter(words)
        shuffled.append(re.sub(r"\S+", lambda _, left=left: next(left), document))
    return shuffled


def group_of(record: Record) -> int:
    """The labeler's group, 0 to 4, by the number in the name: training_07 is of group 2."""
    number = re.search(r"_(\d+)$", record["labeler"])
    if number is None:
        raise BadInput(f"labeler {record['labeler']!r}: expected a name that ends in a number")
    return int(number[1]) % NUM_GROUPS


def first_rankings(comparisons: list[Record]) -> list[Record]:
    """One labeler's ranking of each prompt: the first of those that stand one after the other."""
    of_prompts = groupby(comparisons, key=lambda record: (record["prompt"], record["responses"]))
    return [next(rankings) for _, rankings in of_prompts]


def first_prompts(comparisons: list[Record], count: int) -> list[Record]:
    """All rankings of the first `count` prompts."""
    of_prompts = groupby(comparisons, key=lambda record: (record["prompt"], record["responses"]))
    return [record for _, rankings in islice(of_prompts, count) for record in rankings]


def make(args: argparse.Namespace) -> None:
    """Read --data, change it, write --out."""
    if args.what == "shuffle_text":
        documents = [d for path in args.data for d in read_documents(path)]
        write_documents(args.out, shuffle_text(documents, args.seed))
        return
    records = [r for path in args.data for r in read_jsonl(path, "comparisons")]
    if args.what == "shuffle_labels":
        records = shuffle_labels(records, args.seed)
    elif args.what == "without_group":
        records = [record for record in records if group_of(record) != args.group]
    elif args.what == "first":
        records = first_rankings(records)[: args.count]
    elif args.what == "prompts":
        records = first_prompts(records, args.count)
    if not records:
        raise BadInput(f"{args.data[0]}: no comparison is left")
    write_jsonl(args.out, records, "comparisons")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    kinds = ("shuffle_labels", "shuffle_text", "without_group", "first", "prompts", "merge")
    add("what", choices=kinds)
    add("--data", nargs="+", required=True, help="comparisons.jsonl, or pretrain.txt")
    add("--out", required=True, help="file to write")
    add("--group", type=int, default=0, help="of labelers, 0 to 4, who are left out")
    add(
        "--count", type=int, default=0, help="of prompts that are kept, by `first` with one ranking"
    )
    add("--seed", type=int, default=0, help="of the shuffling")
    args = parser.parse_args(argv)
    if args.what in ("first", "prompts") and args.count < 1:
        parser.error(f"--count {args.count}: expected at least 1")
    if not 0 <= args.group < NUM_GROUPS:
        parser.error(f"--group {args.group}: expected 0 to {NUM_GROUPS - 1}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    make(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
