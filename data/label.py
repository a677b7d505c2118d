"""Turn candidates into comparisons: labelers rank the K responses to each prompt (paper 3.4, 3.5).

    python -m data.label --data CANDIDATES --world out/data/world.json --out COMPARISONS
    python -m data.label --data CANDIDATES --out COMPARISONS --interactive --labeler NAME

The first form lets simulated labelers of the tiny world rank (data/tiny/labelers.py). Their noise
is fitted to 73 % agreement and written beside each ranking; with --noise_of FILE it is that of
comparisons that were labelled before. The command prints how often two labelers agree and, for each
prompt's first ranking, the share of ties and the accuracy of a noise-free labeler. With --labelers
N, each prompt has N records, one after the other, by different labelers.

In the second form you rank, on any candidates: type the numbers of the responses from best to
worst, with = between equals, such as "2 1=3 4". Every ranking is saved at once; started again with
the same files, it goes on where you stopped.

With --off_topic N, in either form, N responses of each prompt are first exchanged for ones that
were sampled for other prompts.
"""

import argparse
import random
import re
import sys
from collections import Counter
from pathlib import Path

from data.commands import printable, run_command
from data.files import BadInput, read_jsonl, write_jsonl
from data.flags import Parser, whole
from data.outputs import claim
from data.stages import progress
from data.tiny.grader import grade
from data.tiny.labelers import MAX_NOISE, POOL_SIZE, POOL_WEIGHTS, TARGET_AGREEMENT, Pool, label
from data.tiny.tasks import check_tasks
from data.tiny.world import World

import numpy as np

Record = dict
OTHER_PROMPT = "other prompt"  # under "models": this response was sampled for another prompt


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    shows_defaults = argparse.ArgumentDefaultsHelpFormatter
    what = "Rank the responses of a file of candidates."
    parser = Parser(description=what, formatter_class=shows_defaults)
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="candidates.jsonl, as sample.py writes them")
    add("--out", required=True, metavar="FILE", help="comparisons.jsonl to write")
    add("--world", metavar="FILE", help="world.json of the tiny world")
    add("--pool", choices=tuple(POOL_WEIGHTS), default="training", help="simulated labelers")
    add("--noise_of", metavar="FILE", help="comparisons.jsonl whose labelers' noise these have too")
    add("--labelers", type=int, default=1, help="how many of them rank each prompt, a record each")
    add("--off_topic", type=whole, default=0, help="responses to take from other prompts")
    add("--seed", type=whole, default=0, help="of all random draws")
    add("--interactive", action=argparse.BooleanOptionalAction, default=False, help="you rank")
    add("--labeler", default="person", help="your name in the comparisons")
    args = parser.parse_args(argv)
    if not args.labeler.strip() or not args.labeler.isprintable():
        parser.error(f"--labeler {args.labeler!a}: expected a name in printable characters")
    if not 1 <= args.labelers <= POOL_SIZE:
        parser.error(f"--labelers {args.labelers}: expected 1 to {POOL_SIZE}")
    if args.interactive and args.labelers > 1:
        one = "expected 1 with --interactive; the next person gives another --labeler and --out"
        parser.error(f"--labelers {args.labelers}: {one}")
    if not args.interactive and args.world is None:
        parser.error("--world is missing: simulated labelers need world.json; or --interactive")
    return args


def with_off_topic(records: list[Record], count: int, seed: int) -> list[Record]:
    """Exchange `count` responses of each prompt for ones that were sampled for other prompts.

    Every second one comes from the same use case, where there is another prompt of it. Samples are
    nearly always on topic, and a reward model that sees no others does not learn to read the
    prompt: it scores a good answer to another question as high as the right one. Such a response
    bears the name "other prompt" in "models". One response of a prompt stays its own.
    """
    by_use_case: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        by_use_case.setdefault(record["use_case"], []).append(index)
    exchanged = []
    for index, record in enumerate(records):
        rng = np.random.default_rng([seed, index, 2])
        record = record | {key: list(record[key]) for key in ("responses", "ended", "models")}
        places = rng.permutation(len(record["responses"]))[:-1]
        for turn, place in enumerate(places[:count]):
            alike = [other for other in by_use_case[record["use_case"]] if other != index]
            same = alike and (index + turn) % 2
            others = alike if same else [other for other in range(len(records)) if other != index]
            if not others:
                break
            other = records[others[int(rng.integers(len(others)))]]
            taken = int(rng.integers(len(other["responses"])))
            record["responses"][place] = other["responses"][taken]
            record["ended"][place] = other["ended"][taken]
            record["models"][place] = OTHER_PROMPT
        exchanged.append(record)
    return exchanged


def simulate(
    records: list[Record],
    world: World,
    pool_name: str,
    seed: int,
    labelers: int = 1,
    noise: float | None = None,
) -> list[Record]:
    """Comparisons by simulated labelers, so many of each prompt, one after the other; prints
    agreement, tie rate and ceiling. The noise is fitted where it is not given."""
    grades, sampled = [], []
    for record in progress(records, f"grading, {pool_name} pool", "prompt"):
        answers = zip(record["responses"], record["ended"], strict=True)
        grades.append([grade(world, record, response, ended) for response, ended in answers])
        sampled.append([name != OTHER_PROMPT for name in record["models"]])
    responses = [record["responses"] for record in records]
    pool = Pool.make(pool_name)
    turns = label(grades, responses, pool, seed, labelers, sampled, noise)
    labels = turns[0]
    pairs = sum(len(row) * (len(row) - 1) // 2 for row in grades)
    print(
        f"{len(records)} prompts, {pairs} pairs, pool {pool_name}, noise {labels.noise:.3f} "
        f"{f'(fitted to agreement {TARGET_AGREEMENT})' if noise is None else '(given)'}: "
        f"agreement {labels.agreement:.3f}, ties "
        f"{labels.tie_rate:.3f} of pairs, noise-free ceiling {labels.ceiling:.3f}"
    )
    ranked = []
    for i, record in enumerate(records):
        people = [{"ranks": t.ranks[i], "labeler": t.labelers[i], "noise": t.noise} for t in turns]
        ranked += [record | ranking for ranking in people]
    return ranked


def noise_of(path: str | Path) -> float:
    """The noise of the simulated labelers who made these comparisons."""
    noises = [record.get("noise") for record in read_jsonl(path, "comparisons")]
    noise = noises[0]
    known = isinstance(noise, (int, float)) and not isinstance(noise, bool)
    if not (known and 0 <= noise <= MAX_NOISE and all(each == noise for each in noises)):
        expected = f"expected one number from 0 to {MAX_NOISE:g} in all, as simulated labelers have"
        raise BadInput(f"{path}: noise {noise!r} in its first record: {expected}")
    return noise


# ---------------------------------------------------------------------------------- ranking by hand


def parse_ranking(text: str, count: int) -> list[int]:
    """ "2 1=3 4" -> [2, 1, 2, 3]: the rank of each of `count` responses, 1 is best.

    Raises ValueError, with a line that says what is wrong, unless every number stands there once.
    """
    groups = [re.split(r"\s*=\s*", group) for group in re.sub(r"\s*=\s*", "=", text).split()]
    numbers = [number for group in groups for number in group]
    if not all(number.isdecimal() and len(number) < 9 for number in numbers):
        raise ValueError(f"{text!r}: type numbers, best first, with = between equals: 2 1=3 4")
    if sorted(map(int, numbers)) != list(range(1, count + 1)):
        raise ValueError(f"{text!r}: each of 1 to {count} must stand there exactly once")
    ranks = [0] * count
    for rank, group in enumerate(groups, start=1):
        for number in group:
            ranks[int(number) - 1] = rank
    return ranks


def rank_by_hand(records: list[Record], out: Path, labeler: str, seed: int) -> None:
    """Show each prompt with its responses in random order, read the ranking, save it at once. A
    file may hold rankings of several labelers: what others ranked is still to go for this one."""
    written = last_change(out)
    done = read_jsonl(out, "comparisons") if out.exists() and out.stat().st_size else []
    mine = [record for record in done if record["labeler"] == labeler]
    for name, number in Counter(r["labeler"] for r in done if r["labeler"] != labeler).items():
        print(f"{number} ranked by {printable(name)} in {out}; you are {labeler}")
    seen = Counter((record["prompt"], tuple(record["responses"])) for record in mine)
    left = []
    for record in records:
        key = record["prompt"], tuple(record["responses"])
        seen[key] -= 1  # equal records are ranked as often as they stand there
        if seen[key] < 0:
            left.append(record)
    print(
        f"{len(mine)} ranked, {len(left)} to go. Best first, = between equals: 2 1=3 4. "
        "An empty line skips, q stops."
    )
    if other := (+seen).total():  # found by no record
        print(f"{other} of the ranked are of other responses than --data, --off_topic, --seed give")
    for record in left:
        count = len(record["responses"])
        order = random.Random(f"{seed} {record['prompt']}").sample(range(count), count)
        print(f"\n{'-' * 72}\n{printable(record['prompt'])}\n")
        for number, index in enumerate(order, start=1):
            print(f"  [{number}] {printable(record['responses'][index])}")
        typed = _ask(count)
        if typed is None:
            break
        if not typed:
            continue
        ranks = [0] * count
        for index, rank in zip(order, typed, strict=True):
            ranks[index] = rank
        done.append(record | {"ranks": ranks, "labeler": labeler})
        done[-1].pop("noise", None)  # of simulated labelers
        if last_change(out) != written:
            raise BadInput(f"{out}: was changed by another program; start again to go on with it")
        write_jsonl(out, done, "comparisons")
        written = last_change(out)
    print(f"{len(done)} ranked in {out}")


def last_change(path: Path) -> tuple[int, int] | None:
    """Time and size of a file, None where there is none."""
    return ((s := path.stat()).st_mtime_ns, s.st_size) if path.exists() else None


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
    kind, out = "comparisons by hand" if args.interactive else "simulated comparisons", args.out
    claim(out, kind, {name: getattr(args, name) for name in ("data", "world", "noise_of")})
    out, records = Path(out), read_jsonl(args.data, "candidates")
    records = with_off_topic(records, args.off_topic, args.seed)
    if args.interactive:
        rank_by_hand(records, out, args.labeler, args.seed)
        return
    if missing := [i for i, record in enumerate(records, start=1) if "task" not in record]:
        remedy = "simulated labelers rank prompts of the tiny world alone, use --interactive"
        raise BadInput(f'{args.data}: record {missing[0]}: key "task" is missing; {remedy}')
    world = World.load(args.world)
    check_tasks(records, args.data, world)
    noise = None if args.noise_of is None else noise_of(args.noise_of)
    comparisons = simulate(records, world, args.pool, args.seed, args.labelers, noise)
    write_jsonl(out, comparisons, "comparisons")


if __name__ == "__main__":
    sys.exit(run_command(main))
