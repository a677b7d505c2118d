"""
Prepare real data: convert public data sets, clean them as the paper does, and split by user.

    python -m data.real.prepare alpaca oasst qa-feedback novels --from FOLDER --out out/real/data
    python -m data.real.prepare all --from FOLDER          # every set whose files lie under FOLDER
    python -m data.real.prepare --download hh-rlhf gpt2    # fetch first, into data/downloads

Written under --out, in the formats of data/files.py:

    {train,valid,test}/demonstrations.jsonl, prompts.jsonl, comparisons.jsonl, pretrain.txt
    tokenizer.json     GPT-2's byte-pair encoding
    account.txt        what was read, dropped and why, and kept; the same is printed

Every record carries "data_set", so that results can be stated per set. The steps are those of
InstructGPT 3.2 and appendix A, see data/hygiene.py: duplicates, 200 records a user, splits by user,
personal data out of the training split. What a set became and the choices made are in
data/real/convert.py. All input is read and checked before anything is written.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from data.commands import run_command
from data.files import BadInput, Record, write_atomic, write_documents, write_jsonl
from data.flags import Parser, whole
from data.hygiene import (
    PREFIX_CHARS,
    USER_LIMIT,
    cap_per_user,
    deduplicate,
    drop_pii,
    pii_of,
    split_by_user,
)
from data.outputs import claim
from data.real import convert
from data.real.raw import find_files
from data.real.sources import SOURCES, print_sources
from data.tokenizer import gpt2_encoding, save_tokenizer

import tiktoken

SPLITS = ("train", "valid", "test")
KINDS = ("demonstrations", "prompts", "comparisons", "documents")
DOWNLOADS = Path(__file__).parents[1] / "downloads"
Sets = dict[str, dict[str, list[Record]]]  # data set (or split) -> kind -> records

# Converter, and a regular expression that is searched in paths (see data.real.raw.find_files).
DATA_SETS = {
    "hh-rlhf": (
        convert.convert_hh_rlhf,
        r"(?:(?:harmless-base|helpful-base|helpful-online|helpful-rejection-sampled)[/_.-]"
        r"(?:train|test)|hh[-_]rlhf[^/]*)\.jsonl(?:\.gz)?$",
    ),
    "oasst": (convert.convert_oasst, r"(?:oasst[^/]*trees|en_100_tree)\.jsonl(?:\.gz)?$"),
    "qa-feedback": (convert.convert_qa_feedback, r"(?:train|dev)_feedback[^/]*\.json$"),
    "summarize": (convert.convert_summarize, r"(?:^|/)(?:batch|cnndm)\d+\.json$"),
    "alpaca": (convert.convert_alpaca, r"alpaca_(?:data|\d+)[^/]*\.json$"),
    "dolly": (
        convert.convert_dolly,
        r"databricks-dolly-15k\.jsonl$|dolly_hhrlhf[^/]*\.jsonl$",
    ),
    # without test.jsonl, on which evaluate.py may measure
    "tldr": (convert.convert_tldr, r"tldr_3_filtered[/_](?:train|valid)\.jsonl$"),
    "lottery": (convert.convert_lottery, r"prompt_lottery[^/]*\.jsonl$"),
    "novels": (
        convert.convert_text,
        r"english_novels/[^/]+\.txt$|(?:^|/)[A-Z][a-z]+_[A-Z][a-z]+_1[6-9]\d\d\.txt$",
    ),
    "shakespeare": (
        convert.convert_text,
        r"shakespeare/input\.txt$|shakespeare[^/]*\.txt$|^input\.txt$",
    ),
    "wikitext": (
        convert.convert_wikitext,
        r"wikitext[^/]*/(?:wiki\.)?(?:train|valid|test)\.(?:txt|tokens|raw)$",
    ),
    "text": (convert.convert_text, r"\.txt$"),
}
# Prompts are duplicates where their first 200 characters agree; in these sets only whole prompts
# are, since dialogues, and passages before a question, share their beginning by nature.
WHOLE_PROMPTS = ("hh-rlhf", "oasst", "qa-feedback")
# In these a prompt has several comparisons by design, of which each pair of responses stays once.
MANY_PAIRS = ("summarize",)

# flag, type, default, help
FLAGS = [
    ("--out", str, "out/real/data", "folder that is written"),
    ("--seed", whole, 0, "of the splits and of the draw from busy users"),
    ("--tokenizer", str, None, "folder of vocab.bpe and encoder.json, else searched; or none"),
    ("--passages", whole, 1, "qa-feedback: passages in the prompt, 0 to 4, of some 280 tokens"),
    ("--passage_chars", whole, 0, "qa-feedback: cut a passage after whole sentences; 0: do not"),
    ("--section_chars", whole, 20_000, "documents: longest section that a text is cut into"),
]


def get_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m data.real.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    text = f"sets to convert: {', '.join(DATA_SETS)}; or all (every set found but text)"
    add("names", nargs="*", metavar="NAME", help=text)
    text = "where the raw files lie, at any depth (default data/downloads); with --download: copies"
    add("--from", dest="folder", type=Path, metavar="FOLDER", help=text)
    for flag, kind, default, text in FLAGS:
        shown = "" if default is None else f" (default {default})"
        add(flag, type=kind, default=default, help=text + shown)
    text = "shares of train, valid and test, by whole users (default 0.8 0.1 0.1)"
    add("--fractions", type=float, nargs=3, default=(0.8, 0.1, 0.1), metavar="F", help=text)
    text = "also write the best response of each comparison, if it is one, as a demonstration"
    add("--best_as_demonstrations", action="store_true", help=text)
    text = "sets whose prompts go to prompts.jsonl (default: all that are prepared)"
    add("--prompts_from", nargs="+", metavar="NAME", help=text)
    text = "fetch these into data/downloads instead; list: show all, or the addresses of NAME"
    add("--download", nargs="+", metavar="NAME", help=text)
    args = parser.parse_args(argv)
    if bool(args.names) == bool(args.download):
        parser.error("give names of data sets to convert, or --download NAME, and not both")
    for name in [*args.names, *(args.prompts_from or ())]:
        if name not in DATA_SETS and name != "all":
            parser.error(f"unknown data set {name!r}; known are {', '.join(DATA_SETS)}")
    for name in args.download or ():
        if name not in SOURCES and name != "list":
            parser.error(f"unknown source {name!r}; known are {', '.join(SOURCES)}")
    for flag, least, most in (("passages", 0, 4), ("section_chars", 100, 2**32)):
        if not least <= getattr(args, flag) <= most:
            parser.error(f"--{flag} is {getattr(args, flag)}; expected {least} to {most}")
    args.fractions = dict(zip(SPLITS, args.fractions, strict=True))
    shares = args.fractions.values()  # NaN is greater than nothing, and not less
    if not (min(shares) > 0 and abs(sum(shares) - 1) <= 1e-6):
        parser.error(f"--fractions {args.fractions}: expected positive shares that sum to 1")
    return args


# --- reading ------------------------------------------------------------------------------------


class Account:
    """Lines that say what was read, dropped and kept; printed and written to account.txt."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def drop(self, number: int, reason: str) -> None:
        if number:
            self.add(f"    - {number:>7,} {reason}")


def locate(names: Sequence[str], folder: Path) -> dict[str, list[Path]]:
    """Find the files of every named set; raises `BadInput` if a set has none."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; name one with --from, or use --download NAME")
    found: dict[str, list[Path]] = {}
    for name in DATA_SETS if "all" in names else names:
        files = find_files(folder, DATA_SETS[name][1])
        if files and not (name == "text" and "all" in names):
            found[name] = files
        elif "all" not in names:
            example = SOURCES[name].files[0].path if name in SOURCES else "a file *.txt"
            raise BadInput(
                f"{folder}: holds no file of {name}, such as {example}; fetch it with --download, "
                "or name another folder with --from"
            )
    if not found:
        raise BadInput(f"{folder}: holds no file of any known data set")
    return found


def load_encoding(choice: str | None, folder: Path) -> tiktoken.Encoding | None:
    """Read GPT-2's encoding from the folder chosen, or from the first one under `folder`."""
    if choice == "none":
        return None
    found = [path for root in (folder, DOWNLOADS) for path in sorted(root.rglob("vocab.bpe"))]
    for place in [Path(choice)] if choice else [path.parent for path in found]:
        if (place / "vocab.bpe").is_file() and (place / "encoder.json").is_file():
            return gpt2_encoding(place)
    raise BadInput(
        f"{choice or folder}: holds no vocab.bpe with encoder.json; name their folder with "
        "--tokenizer, fetch them with --download gpt2-bpe, or give --tokenizer none"
    )


def read_set(
    name: str, files: Sequence[Path], args: argparse.Namespace, account: Account
) -> dict[str, list[Record]]:
    """Convert one set into records by kind, each marked with the set's name."""
    options = convert.Options(args.passages, args.passage_chars or None, args.section_chars)
    result = DATA_SETS[name][0](files, options)
    plural = "s" if len(files) > 1 else ""
    account.add(f"{name}: {result.num_read:,} read from {len(files)} file{plural}")
    for reason, number in result.dropped.most_common():
        account.drop(number, reason)
    if args.best_as_demonstrations:
        result.demonstrations += filter(None, map(best_response, result.comparisons))
    return {
        kind: [{**record, "data_set": name} for record in getattr(result, kind)] for kind in KINDS
    }


def best_response(record: Record) -> Record | None:
    """Make the best response of a comparison a demonstration; None if it is tied or empty."""
    response = record["responses"][record["ranks"].index(1)]
    if record["ranks"].count(1) > 1 or not response.strip():
        return None
    keep = {key: record[key] for key in ("prompt", "user", "source", "use_case")}
    return {**keep, "response": response}


# --- hygiene ------------------------------------------------------------------------------------


def clean_set(
    name: str, kinds: dict[str, list[Record]], earlier: Sets, seed: int, account: Account
) -> dict[str, list[Record]]:
    """
    Drop duplicates, also of the sets before this one, and what a user has too much of.

    A prompt may stand once in each kind: demonstrations and comparisons of one prompt are no
    duplicates of each other. Documents are compared whole and have no limit.
    """
    cleaned = {}
    for kind, records in kinds.items():
        before = [record for other in earlier.values() for record in other[kind]]
        key = "text" if kind == "documents" else "prompt"
        prefix = None if kind == "documents" or name in WHOLE_PROMPTS else PREFIX_CHARS
        many = kind == "comparisons" and name in MANY_PAIRS
        kept = unique([*before, *records], lambda record, key=key: record[key], prefix)
        if many:  # a prompt that is not itself a duplicate keeps all of its pairs
            prompts = {record["prompt"] for record in kept}
            kept = [record for record in records if record["prompt"] in prompts]
        else:
            mine = set(map(id, records))
            kept = [record for record in kept if id(record) in mine]
        shared = "whole text" if prefix is None else f"first {prefix} characters"
        reason = f"{kind}: an earlier one has the same {key} ({shared} compared)"
        account.drop(len(records) - len(kept), reason)
        if many:
            distinct = unique(kept, pair_key, None)
            account.drop(
                len(kept) - len(distinct), f"{kind}: an earlier one has the same responses"
            )
            kept = distinct
        if kind != "documents":
            kept, dropped = cap_per_user(kept, USER_LIMIT, seed)
            account.drop(len(dropped), f"{kind}: their user has more than {USER_LIMIT}")
        cleaned[kind] = kept
    return cleaned


def unique(
    records: Sequence[Record], text: Callable[[Record], str], prefix: int | None
) -> list[Record]:
    """The first of the records whose `text` is the same, as prompts are compared."""
    keyed = [{"prompt": text(record), "record": record} for record in records]
    return [item["record"] for item in deduplicate(keyed, prefix)[0]]


def pair_key(record: Record) -> str:
    """A text that two comparisons share if prompt and responses are the same."""
    return json.dumps([record["prompt"], *sorted(record["responses"])])


def place_users(sets: Sets, fractions: dict[str, float], seed: int) -> dict[str, str]:
    """
    Assign every user to a split -> {user: split}.

    Set by set, so that each set has the fractions; a user of an earlier set keeps its split, so
    that a prompt which two sets hold is not trained on in one and tested on in the other.
    """
    split_of: dict[str, str] = {}
    for kinds in sets.values():
        mine = [record for records in kinds.values() for record in records]
        fresh = [record for record in mine if record["user"] not in split_of]
        for split, records in split_by_user(fresh, fractions, seed).items():
            split_of.update((record["user"], split) for record in records)
    return split_of


def collect_prompts(parts: Sets, names: Iterable[str]) -> None:
    """Replace each split's prompts by all distinct prompts of the named sets, once overall."""
    names, seen, keys = set(names), set(), ("prompt", "user", "source", "use_case", "data_set")
    for part in parts.values():
        prompts = []
        for kind in ("prompts", "demonstrations", "comparisons"):
            for record in part[kind]:
                text = " ".join(record["prompt"].split()).casefold()
                if record["data_set"] in names and text not in seen:
                    seen.add(text)
                    prompts.append({key: record[key] for key in keys})
        part["prompts"] = prompts


def split_sets(sets: Sets, args: argparse.Namespace, account: Account) -> Sets:
    """Split by user and drop personal data from the training split -> {split: {kind: records}}."""
    split_of = place_users(sets, args.fractions, args.seed)
    parts: Sets = {split: {kind: [] for kind in KINDS} for split in SPLITS}
    account.add("")
    for name, kinds in sets.items():
        account.add(f"{name}: split by user")
        for kind, records in kinds.items():
            mine = {split: [r for r in records if split_of[r["user"]] == split] for split in SPLITS}
            if kind != "documents":
                mine["train"], dropped = drop_pii(mine["train"])
                found = Counter(kind for record in dropped for kind in pii_of(record))
                listed = ", ".join(f"{what} {number}" for what, number in found.most_common())
                reason = f"{kind}: personal data in the training split ({listed})"
                account.drop(len(dropped), reason)
            if records:
                sizes = ", ".join(f"{len(mine[split]):,} {split}" for split in SPLITS)
                total = sum(len(part) for part in mine.values())
                account.add(f"    = {total:>7,} {kind}: {sizes}{describe(mine, kind)}")
            for split in SPLITS:
                parts[split][kind] += mine[split]
    return parts


def describe(mine: dict[str, list[Record]], kind: str) -> str:
    """Say how many responses comparisons have and how many of their pairs are tied."""
    if kind != "comparisons":
        return ""
    ranks = [record["ranks"] for records in mine.values() for record in records]
    k_counts = ", ".join(f"K={k} {n:,}" for k, n in sorted(Counter(map(len, ranks)).items()))
    pairs = sum(len(r) * (len(r) - 1) // 2 for r in ranks)
    ties = sum(n * (n - 1) // 2 for r in ranks for n in Counter(r).values())
    return f"; {k_counts}; {pairs:,} pairs, {ties:,} of them tied"


# --- main ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args(argv)
    if args.download and "list" in args.download:
        print_sources([name for name in args.download if name != "list"])
        return 0
    if args.download:
        from data.real.download import download  # only here: conversion needs no network code

        download(args.download, DOWNLOADS, args.folder)
        return 0
    args.folder = args.folder or DOWNLOADS
    claim(args.out, "data set", {"from": args.folder})
    args.out = Path(args.out)
    files = locate(args.names, args.folder)
    if odd := set(args.prompts_from or ()) - set(files):
        expected = f"expected sets that are prepared: {', '.join(files)}"
        raise BadInput(f"--prompts_from {min(odd)}: {expected}")
    encoding = load_encoding(args.tokenizer, args.folder)
    account = Account()
    sets: Sets = {}
    for name, paths in files.items():
        kinds = read_set(name, paths, args, account)
        sets[name] = clean_set(name, kinds, sets, args.seed, account)
    parts = split_sets(sets, args, account)
    collect_prompts(parts, args.prompts_from or sets)
    sizes = ", ".join(f"{len(parts[split]['prompts']):,} {split}" for split in SPLITS)
    origins = sorted({record["data_set"] for part in parts.values() for record in part["prompts"]})
    if origins:
        account.add(f"prompts.jsonl: distinct prompts of {', '.join(origins)}: {sizes}")
    if not any(records for part in parts.values() for records in part.values()):
        raise BadInput(f"{args.folder}: nothing is left of {', '.join(sets)}; see what was dropped")

    # From here on nothing is refused: convert.checked has seen every record.
    (args.out / "account.txt").unlink(missing_ok=True)  # it comes last: with it, all is whole
    for split, part in parts.items():
        for kind, records in part.items():
            is_text = kind == "documents"
            path = args.out / split / ("pretrain.txt" if is_text else f"{kind}.jsonl")
            if not records:
                path.unlink(missing_ok=True)  # of an earlier run, on other sets
            elif is_text:
                write_documents(path, (record["text"] for record in records))
            else:
                write_jsonl(path, records, kind)
    if encoding is not None:
        save_tokenizer(encoding, args.out / "tokenizer.json")
    write_atomic(args.out / "account.txt", "\n".join(account.lines) + "\n")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
