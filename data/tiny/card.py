"""The data card of the tiny world: its tables in the form of InstructGPT's Tables 1 and 6 to 11."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tiktoken

from data.tiny.corpus import DOCUMENT_SHARES, PRONOUN_SKEW, RUDE_SHARE, WEB_FAILINGS
from data.tiny.tasks import CUSTOMER_SHARES, USE_CASES
from data.tiny.world import KINDS, WEB_BELIEF, World
from data.tokenizer import encode_prompt, encode_response

Record = dict
SETS = ("demonstrations", "rm_prompts", "ppo_prompts")
SPLITS = ("train", "valid")
TITLES = {"demonstrations": "SFT", "rm_prompts": "RM", "ppo_prompts": "PPO"}
# What the world can tell of the paper's Table 7.
FLAGS: dict[str, Callable[[Record], bool]] = {
    "closed domain": lambda record: (
        "text" in record["task"]
        and record["use_case"] in ("closed_qa", "extract", "summarization", "rewrite")
    ),
    "continuation style": lambda record: (
        record["prompt"].endswith(":") or record["task"]["kind"] in ("continue", "talk")
    ),
    "explicit constraints": lambda record: any(
        key in record["task"] for key in ("count", "include", "mention")
    ),
    "few-shot": lambda record: "shots" in record["task"],
    "respectful prefix": lambda record: bool(record["task"].get("respectful")),
}


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with one decimal."""
    lines = [header, ["---"] * len(header)]
    lines += [[f"{x:.1f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _percent(part: int, whole: int) -> float:
    return 100 * part / max(1, whole)


def make(
    world: World,
    encoding: tiktoken.Encoding,
    sets: dict[str, list[Record]],
    account: dict[str, int],
    tokens_by_kind: dict[str, Counter[str]],
    failings: dict[str, float],
) -> str:
    """The card as Markdown.

    sets are the records by "split/name"; account says what cleaning dropped; tokens_by_kind counts
    the pretraining tokens of each split by kind of document; failings are the demonstrators'.
    """
    labelled = {
        name: records
        for name, records in sets.items()
        if name.partition("/")[2] in SETS or name == "test/prompts"
    }
    lengths = {
        name: np.array([len(encode_prompt(encoding, r["prompt"])) for r in records])
        for name, records in labelled.items()
    }
    parts = [
        f"# Data card of the tiny world, seed {world.seed}\n",
        _facts(world),
        _use_cases(sets),
        _sizes(labelled),
        _flags(sets),
        _per_customer(labelled),
        _lengths(lengths),
        _lengths_by_use_case(labelled, lengths),
        _lengths_by_source(encoding, sets),
        _failings(failings),
        "## What cleaning dropped (paper 3.2)\n\n" + _table(("prompts", "number"), account.items()),
        _pretraining(tokens_by_kind),
        "## Other files\n\n"
        + _table(
            ("file", "records"),
            (
                (f"{name}.jsonl", len(records))
                for name, records in sorted(sets.items())
                if name not in labelled
            ),
        ),
    ]
    return "\n".join(parts)


def _facts(world: World) -> str:
    rows = [
        (
            kind.replace("_", " "),
            len(world.facts_of_kind([kind])),
            *(round(100 * share) for share in WEB_BELIEF[kind]),
        )
        for kind in KINDS
    ]
    return "## Facts, and what the web says\n\n" + _table(
        ("kind", "facts", "web true %", "web one myth %", "web other %"), rows
    )


def _use_cases(sets: dict[str, list[Record]]) -> str:
    rows = []
    groups = [
        [r for split in SPLITS for r in sets[f"{split}/rm_prompts"] if r["source"] == "customer"],
        [r for split in SPLITS for r in sets[f"{split}/rm_prompts"] if r["source"] == "labeler"],
        sets["train/demonstrations"],
        sets["test/prompts"],
    ]
    for use_case in USE_CASES:
        counts = [sum(r["use_case"] == use_case for r in group) for group in groups]
        rows.append(
            (
                use_case,
                CUSTOMER_SHARES[use_case],
                *(_percent(n, len(g)) for n, g in zip(counts, groups, strict=True)),
            )
        )
    header = ("use case", "paper", "RM customer", "RM labeler", "SFT train", "test")
    return "## Use cases, % of prompts (Table 1)\n\n" + _table(header, rows)


def _sizes(labelled: dict[str, list[Record]]) -> str:
    rows = []
    for name, records in labelled.items():
        sources = Counter(record["source"] for record in records)
        rows.append((name, sources["labeler"], sources["customer"], len(records)))
    header = ("set", "labeler", "customer", "all")
    return "## Prompts by source (Table 6)\n\n" + _table(header, rows)


def _flags(sets: dict[str, list[Record]]) -> str:
    groups = [sets["train/rm_prompts"], sets["train/demonstrations"], sets["test/prompts"]]
    rows = [
        (flag, *(_percent(sum(map(has, group)), len(group)) for group in groups))
        for flag, has in FLAGS.items()
    ]
    return "## Flags, % of prompts (Table 7)\n\n" + _table(
        ("flag", "RM train", "SFT train", "test"), rows
    )


def _per_customer(labelled: dict[str, list[Record]]) -> str:
    rows = []
    for name, records in labelled.items():
        users = Counter(r["user"] for r in records if r["source"] == "customer")
        rows.append(
            (
                name,
                len(users),
                f"{users.total() / max(1, len(users)):.2f}",
                max(users.values(), default=0),
            )
        )
    return "## Prompts per customer (Table 8)\n\n" + _table(
        ("set", "customers", "mean", "max"), rows
    )


def _lengths(lengths: dict[str, np.ndarray]) -> str:
    rows = [
        (
            name,
            float(n.mean()),
            float(n.std()),
            *(int(x) for x in np.percentile(n, (25, 50, 75, 100), method="lower")),
        )
        for name, n in lengths.items()
    ]
    return "## Prompt tokens (Table 9)\n\n" + _table(
        ("set", "mean", "std", "25 %", "50 %", "75 %", "max"), rows
    )


def _lengths_by_use_case(labelled: dict[str, list[Record]], lengths: dict[str, np.ndarray]) -> str:
    tokens: dict[str, list[int]] = {use_case: [] for use_case in USE_CASES}
    for name, records in labelled.items():
        for record, n in zip(records, lengths[name], strict=True):
            tokens[record["use_case"]].append(n)
    rows = [
        (use_case, float(np.mean(n)), float(np.median(n))) for use_case, n in tokens.items() if n
    ]
    return "## Prompt tokens by use case (Table 10)\n\n" + _table(
        ("use case", "mean", "median"), rows
    )


def _lengths_by_source(encoding: tiktoken.Encoding, sets: dict[str, list[Record]]) -> str:
    rows = []
    records = [r for split in SPLITS for r in sets[f"{split}/demonstrations"]]
    for source in ("labeler", "customer"):
        mine = [record for record in records if record["source"] == source]
        if not mine:
            continue
        prompts = [len(encode_prompt(encoding, record["prompt"])) for record in mine]
        responses = [len(encode_response(encoding, record["response"])) for record in mine]
        rows.append(
            (
                source,
                len(mine),
                float(np.mean(prompts)),
                float(np.mean(responses)),
                float(np.median(responses)),
                max(responses),
            )
        )
    header = ("prompt by", "number", "prompt mean", "demonstration mean", "median", "max")
    return "## Tokens of demonstrations by source (Table 11)\n\n" + _table(header, rows)


def _failings(failings: dict[str, float]) -> str:
    names = {
        "wrong": "a wrong fact, item or count",
        "terse": "less than was asked for",
        "ramble": "goes on after the answer",
        "credulous": "accepts a false premise",
    }
    rows = [
        (names[key], round(100 * failings[key]), round(100 * WEB_FAILINGS[key])) for key in names
    ]
    return (
        "## Failings built in, %\n\n"
        + _table(("failing", "demonstrators", "answers on the web"), rows)
        + f"\nRude are {RUDE_SHARE:.0%} of replies in forums and of talk in stories. The pronoun "
        f"of a profession\nis the usual one in {PRONOUN_SKEW:.0%} of sentences.\n"
    )


def _pretraining(tokens_by_kind: dict[str, Counter[str]]) -> str:
    rows = []
    for kind in DOCUMENT_SHARES:
        counts = [counter[kind] for counter in tokens_by_kind.values()]
        share = _percent(tokens_by_kind["train"][kind], tokens_by_kind["train"].total())
        rows.append((kind, *counts, share))
    rows.append(("all", *(counter.total() for counter in tokens_by_kind.values()), 100.0))
    return "## Pretraining tokens by kind of document\n\n" + _table(
        ("kind", *tokens_by_kind, "train %"), rows
    )
