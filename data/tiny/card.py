"""The data card of the tiny world: its tables in the form of InstructGPT's Tables 1, 6 and 7."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from data.tiny.corpus import DOCUMENT_SHARES, PRONOUN_SKEW, RUDE_SHARE, WEB_FAILINGS
from data.tiny.grader import flawed
from data.tiny.tasks import CUSTOMER_SHARES
from data.tiny.world import KINDS, WEB_BELIEF, World

Record = dict
Sets = dict[str, list[Record]]  # records by "split/name"
SETS = ("demonstrations", "rm_prompts", "ppo_prompts")
LABELLED = [f"{split}/{name}" for split in ("train", "valid") for name in SETS] + ["test/prompts"]
GIVEN_TEXT = ("closed_qa", "extract", "summarization", "rewrite")
CONSTRAINTS = {"count", "include", "mention"}
# What the world can tell of the paper's Table 7.
FLAGS: dict[str, Callable[[Record], bool]] = {
    "closed domain": lambda r: "text" in r["task"] and r["use_case"] in GIVEN_TEXT,
    "continuation style": lambda r: (
        r["prompt"].endswith(":") or r["task"]["kind"] in ("continue", "talk")
    ),
    "explicit constraints": lambda r: bool(CONSTRAINTS & set(r["task"])),
    "few-shot": lambda r: "shots" in r["task"],
    "respectful prefix": lambda r: bool(r["task"].get("respectful")),
}
FAILINGS = {
    "wrong": "a wrong fact, item or count",
    "terse": "less than was asked for",
    "ramble": "goes on after the answer",
    "credulous": "accepts a false premise",
}


def make(
    world: World,
    sets: Sets,
    account: dict[str, int],
    tokens_by_kind: dict[str, Counter[str]],
    failings: dict[str, float],
) -> str:
    """The card as Markdown.

    `account` says what cleaning dropped; `tokens_by_kind` counts the pretraining tokens of each
    split by kind of document; `failings` are the demonstrators'.
    """
    others = [(f"{name}.jsonl", len(sets[name])) for name in sorted(set(sets) - set(LABELLED))]
    parts = [
        f"# Data card of the tiny world, seed {world.seed}\n",
        _facts(world),
        _use_cases(sets),
        _sizes(sets),
        _flags(sets),
        _failings(world, sets["train/demonstrations"], failings),
        _table("What cleaning dropped (paper 3.2)", "prompts | number", account.items()),
        _pretraining(tokens_by_kind),
        _table("Other files", "file | records", others),
    ]
    return "\n".join(parts)


def _table(title: str, header: str, rows: Iterable[Sequence[object]]) -> str:
    """A heading and a Markdown table; `header` has | between columns, floats one decimal."""
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns)]
    lines += [[f"{x:.1f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _percent(has: Callable[[Record], bool], records: list[Record]) -> float:
    return 100 * sum(map(has, records)) / max(1, len(records))


def _facts(world: World) -> str:
    rows = []
    for kind in KINDS:
        belief = [round(100 * share) for share in WEB_BELIEF[kind]]
        rows.append((kind.replace("_", " "), len(world.facts_of_kind([kind])), *belief))
    header = "kind | facts | web true % | web one myth % | web other %"
    return _table("Facts, and what the web says", header, rows)


def _use_cases(sets: Sets) -> str:
    ranked = sets["train/rm_prompts"] + sets["valid/rm_prompts"]
    groups = [[r for r in ranked if r["source"] == source] for source in ("customer", "labeler")]
    groups += [sets["train/demonstrations"], sets["test/prompts"]]
    rows = []
    for use_case, paper in CUSTOMER_SHARES.items():
        shares = [_percent(lambda r, u=use_case: r["use_case"] == u, group) for group in groups]
        rows.append((use_case, paper, *shares))
    header = "use case | paper | RM customer | RM labeler | SFT train | test"
    return _table("Use cases, % of prompts (Table 1)", header, rows)


def _sizes(sets: Sets) -> str:
    rows = []
    for name in LABELLED:
        sources = Counter(record["source"] for record in sets[name])
        customers = {r["user"] for r in sets[name] if r["source"] == "customer"}
        sizes = sources["labeler"], sources["customer"], len(sets[name])
        rows.append((name, *sizes, len(customers)))
    header = "set | labeler | customer | all | customers"
    return _table("Prompts by source (Table 6), and how many customers wrote them", header, rows)


def _flags(sets: Sets) -> str:
    groups = [sets["train/rm_prompts"], sets["train/demonstrations"], sets["test/prompts"]]
    rows = [(flag, *(_percent(has, group) for group in groups)) for flag, has in FLAGS.items()]
    return _table("Flags, % of prompts (Table 7)", "flag | RM train | SFT train | test", rows)


def _failings(world: World, demonstrations: list[Record], failings: dict[str, float]) -> str:
    rows = []
    for key, name in FAILINGS.items():
        rows.append((name, f"{100 * failings[key]:g}", f"{100 * WEB_FAILINGS[key]:g}"))
    header = "failing | demonstrators | answers on the web"
    taken = round(_percent(lambda record: flawed(world, record), demonstrations))
    why = (
        "\nDemonstrators fail on purpose. People write in haste, and agree more readily on which "
        "of two\nanswers is better than they write the better one: without such failings SFT "
        "leaves nothing\nfor feedback to mend. A failing shows only where the request gives it "
        "room (one word cannot\nbe terse): the grader takes marks off "
        f"{taken} % of the training demonstrations.\n"
    )
    return (
        _table("Failings built in, %", header, rows)
        + (why if any(failings.values()) else "")
        + (
            f"\nRude are {RUDE_SHARE:.0%} of replies in forums and of talk in stories. The pronoun "
            f"of a profession\nis the usual one in {PRONOUN_SKEW:.0%} of sentences.\n"
        )
    )


def _pretraining(tokens_by_kind: dict[str, Counter[str]]) -> str:
    train, rows = tokens_by_kind["train"], []
    for kind in DOCUMENT_SHARES:
        counts = [counter[kind] for counter in tokens_by_kind.values()]
        rows.append((kind, *counts, 100 * train[kind] / max(1, train.total())))
    rows.append(("all", *(counter.total() for counter in tokens_by_kind.values()), 100.0))
    header = " | ".join(("kind", *tokens_by_kind, "train %"))
    return _table("Pretraining tokens by kind of document", header, rows)
