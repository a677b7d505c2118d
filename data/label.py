"""Turn candidates into comparisons: labelers rank the K responses to each prompt (paper 3.4, 3.5).

    python -m data.label --data CANDIDATES --world out/data/world.json --out COMPARISONS
    python -m data.label --data CANDIDATES --out COMPARISONS --interactive --labeler NAME

The first form lets simulated labelers of the tiny world rank (data/tiny/labelers.py). It prints the
agreement that their noise was fitted to, and of the first ranking of each prompt the ties and what
a noise-free labeler would score. With --labelers N, each prompt has N records, one after the other,
by different labelers. The second lets you do it, on any candidates: type the numbers of the
responses from best to worst, with = between equals, such as "2 1=3 4". Every ranking is saved at
once; started again with the same files, it goes on where you stopped.
"""

import argparse
import random
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data.files import (
    BadInput,
    check_writable,
    read_jsonl,
    remove_leftovers,
    run_command,
    write_jsonl,
)
from data.tiny.grader import grade
from data.tiny.labelers import OTHER_PROMPT, POOL_SIZE, POOL_WEIGHTS, TARGET_AGREEMENT, Pool, label
from data.tiny.world import World

Record = dict


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rank the responses of a file of candidates.")
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="candidates.jsonl, as sample.py writes them")
    add("--out", required=True, metavar="FILE", help="comparisons.jsonl to write")
    add("--world", metavar="FILE", help="world.json of the tiny world")
    add("--pool", choices=tuple(POOL_WEIGHTS), default="training", help="simulated labelers")
    add(
        "--labelers",
        type=int,
        default=1,
        help="simulated labelers who rank each prompt, a record each",
    )
    add("--seed", type=int, default=0, help="of labelers' noise, or of the order shown")
    add("--interactive", action=argparse.BooleanOptionalAction, default=False, help="you rank")
    add("--labeler", default="person", help="your name in the comparisons")
    args = parser.parse_args(argv)
    if not 1 <= args.labelers <= POOL_SIZE:
        parser.error(f"--labelers {args.labelers}: expected 1 to {POOL_SIZE}")
    if args.interactive and args.labelers > 1:
        parser.error(
            f"--labelers {args.labelers}: with --interactive you are the only one; start "
            "again with another --labeler and --out"
        )
    if not args.interactive and args.world is None:
        parser.error("--world is missing: simulated labelers need world.json; or --interactive")
    return args


def simulate(
    records: list[Record], world: World, pool_name: str, seed: int, labelers: int = 1
) -> list[Record]:
    """Comparisons by simulated labelers, so many of each prompt, one after the other; prints
    agreement, tie rate and ceiling."""
    for number, record in enumerate(records, start=1):
        if "task" not in record:
            raise BadInput(
                f'record {number} of the candidates: key "task" is missing; simulated '
                "labelers rank prompts of the tiny world alone, use --interactive"
            )
    grades = []
    for record in tqdm(records, desc="grading", unit="prompt", disable=None):
        ended = record.get("ended") or [True] * len(record["responses"])
        grades.append(
            [
                grade(world, record, response, end)
                for response, end in zip(record["responses"], ended, strict=True)
            ]
        )
    responses = [record["responses"] for record in records]
    sampled = [
        [name != OTHER_PROMPT for name in record.get("models") or [""] * len(row)]
        for record, row in zip(records, responses, strict=True)
    ]
    pool = Pool.make(pool_name)
    turns = label(grades, responses, pool, seed, labelers, sampled)
    labels = turns[0]
    pairs = sum(len(row) * (len(row) - 1) // 2 for row in grades)
    print(
        f"{len(records)} prompts, {pairs} pairs, pool {pool_name}, noise {labels.noise:.3f}: "
        f"agreement {labels.agreement:.3f} (target {TARGET_AGREEMENT}), ties "
        f"{labels.tie_rate:.3f} of pairs, noise-free ceiling {labels.ceiling:.3f}"
    )
    return [
        record | {"ranks": turn.ranks[i], "labeler": turn.labelers[i]}
        for i, record in enumerate(records)
        for turn in turns
    ]


# ---------------------------------------------------------------------------------- ranking by hand


def parse_ranking(text: str, count: int) -> list[int]:
    """ "2 1=3 4" -> [2, 1, 2, 3]: the rank of each of `count` responses, 1 is best.

    Raises ValueError, with a line that says what is wrong, unless every number stands there once.
    """
    groups = [re.split(r"\s*=\s*", group) for group in re.sub(r"\s*=\s*", "=", text).split()]
    numbers = [number for group in groups for number in group]
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{text!r}: type numbers, best first, with = between equals: 2 1=3 4")
    if sorted(map(int, numbers)) != list(range(1, count + 1)):
        raise ValueError(f"{text!r}: each of 1 to {count} must stand there exactly once")
    ranks = [0] * count
    for rank, group in enumerate(groups, start=1):
        for number in group:
            ranks[int(number) - 1] = rank
    return ranks


def rank_by_hand(records: list[Record], out: Path, labeler: str, seed: int) -> None:
    """Show each prompt with its responses in random order, read the ranking, save it at once."""
    done = read_jsonl(out, "comparisons") if out.exists() else []
    seen = Counter((record["prompt"], tuple(record["responses"])) for record in done)
    left = []
    for record in records:
        key = record["prompt"], tuple(record["responses"])
        seen[key] -= 1  # equal records are ranked as often as they stand there
        if seen[key] < 0:
            left.append(record)
    print(
        f"{len(done)} ranked, {len(left)} to go. Best first, = between equals: 2 1=3 4. "
        "An empty line skips, q stops."
    )
    for record in left:
        count = len(record["responses"])
        order = random.Random(f"{seed} {record['prompt']}").sample(range(count), count)
        print(f"\n{'-' * 72}\n{record['prompt']}\n")
        for shown, index in enumerate(order, start=1):
            print(f"  [{shown}] {record['responses'][index]}")
        shown_ranks = _ask(count)
        if shown_ranks is None:
            break
        if not shown_ranks:
            continue
        ranks = [0] * count
        for index, rank in zip(order, shown_ranks, strict=True):
            ranks[index] = rank
        done.append(record | {"ranks": ranks, "labeler": labeler})
        write_jsonl(out, done, "comparisons")
    print(f"{len(done)} ranked in {out}")


def _ask(count: int) -> list[int] | None:
    """A ranking typed by the person; [] to skip, None to stop."""
    while True:
        try:
            text = input("ranking> ").strip()
        except EOFError:
            return None
        if text == "q":
            return None
        if not text:
            return []
        try:
            return parse_ranking(text, count)
        except ValueError as error:
            print(error)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    records = read_jsonl(args.data, "candidates")
    out = Path(args.out)
    check_writable(out.parent)
    remove_leftovers(out.parent, out.name)
    if args.interactive:
        rank_by_hand(records, out, args.labeler, args.seed)
        return
    world = World.load(args.world)
    comparisons = simulate(records, world, args.pool, args.seed, args.labelers)
    write_jsonl(out, comparisons, "comparisons")


if __name__ == "__main__":
    sys.exit(run_command(main))
