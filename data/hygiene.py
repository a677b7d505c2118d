"""The paper's prompt hygiene as small functions (InstructGPT 3.2, appendix A).

    deduplicate      prompts that share a long common prefix are one prompt
    cap_per_user     at most 200 prompts of one user, so that no user dominates the data
    split_by_user    train, validation and test have no user in common
    drop_pii         records with personal data are dropped, from the training split only

Records are dictionaries as data/files.py describes them; every function returns new lists that
hold the same dictionary objects, in the order given, and changes none of them. Functions that
drop something return `(kept, dropped)`, so that a command can print an account of it.

What the paper leaves open: the length of a "long common prefix", which 200 prompts of a user stay,
and how personal data is found. The choices are stated where they are made. Of personal data, the
paper only says that prompts were "filtered for personally identifiable information". Found here are
e-mail addresses, telephone numbers and IP addresses, which short patterns find with few errors.
Names, street addresses, credit cards and the like are not looked for: to filter for those, use a
tool made for it before this pipeline.
"""

import hashlib
import ipaddress
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

Record = dict
PREFIX_CHARS = 200  # about 50 tokens, near the median length of the paper's RM prompts (Table 9)
USER_LIMIT = 200


def deduplicate(
    records: Iterable[Record], prefix_chars: int | None = PREFIX_CHARS
) -> tuple[list[Record], list[Record]]:
    """Keep the first of the records whose prompts share a long common prefix -> (kept, dropped).

    Two prompts are one when their first `prefix_chars` characters agree; a shorter prompt only
    equals the same prompt. Letter case and runs of white space are not looked at. This is an
    equivalence, so one pass over a set of prefixes finds every duplicate.

    `prefix_chars=None` compares whole prompts. That is right for dialogues, which share their
    beginning with the later turns of the same dialogue, and for prompts that share an
    instruction, such as few-shot prompts.
    """
    if prefix_chars is not None and prefix_chars < 1:
        raise ValueError(f"prefix_chars is {prefix_chars}: give a length of at least 1, or None")
    seen: set[str] = set()
    kept: list[Record] = []
    dropped: list[Record] = []
    for record in records:
        key = " ".join(record["prompt"].split()).casefold()[:prefix_chars]
        (dropped if key in seen else kept).append(record)
        seen.add(key)
    return kept, dropped


def cap_per_user(
    records: Iterable[Record], limit: int = USER_LIMIT, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Keep at most `limit` records of each user -> (kept, dropped).

    Which ones stay is a uniform draw by a keyed hash of the prompt, not the first ones: files are
    often sorted by time or topic, and a hash makes the choice independent of the records' order
    and of every other user. Records of one user with equal prompts rank by their position.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}: a user keeps at least 1 record")
    records = list(records)
    positions: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        positions.setdefault(record["user"], []).append(position)
    keep: set[int] = set()
    for mine in positions.values():
        if len(mine) > limit:
            mine.sort(key=lambda position: (_digest(seed, records[position]["prompt"]), position))
        keep.update(mine[:limit])
    kept = [record for position, record in enumerate(records) if position in keep]
    dropped = [record for position, record in enumerate(records) if position not in keep]
    return kept, dropped


def split_by_user(
    records: Iterable[Record], fractions: dict[str, float], seed: int = 0
) -> dict[str, list[Record]]:
    """Split records so that no user is in two splits -> {split name: records}.

    `fractions` maps names to shares that are positive and sum to 1. Users stand in line in the
    order of a hash of their names, keyed with `seed`; the line is cut where the records so far
    reach the fractions, each cut at most half a user's records away. So neither the order of the
    records nor anything else about a user but the name decides where in the line it stands.

    Raises ValueError on fractions that are not positive or do not sum to 1.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions {fractions} must be positive and sum to 1")
    records = list(records)
    volume = Counter(record["user"] for record in records)
    names, ends = list(fractions), list(accumulate(fractions.values()))
    split_of: dict[str, str] = {}
    before = 0  # records of the users so far
    for user in sorted(volume, key=lambda user: _digest(seed, user)):
        middle = (before + volume[user] / 2) / len(records)
        split_of[user] = names[bisect(ends[:-1], middle)]
        before += volume[user]
    splits: dict[str, list[Record]] = {name: [] for name in names}
    for record in records:
        splits[split_of[record["user"]]].append(record)
    return splits


def _digest(seed: int, text: str) -> bytes:
    """A hash that is the same in every process, unlike Python's own."""
    return hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=16, key=str(seed).encode()
    ).digest()


# ---------------------------------------------------------------------------------- personal data
# Patterns demand the punctuation that people write: a run of digits alone is a quantity, a year
# or an identifier far more often than a telephone number.

EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]+@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}\b"
)
IP = (
    re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)"),
    re.compile(r"(?<![\w:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){3,7}(?![\w:])"),
)
NUMBERED_TEXT = re.compile(r"(?:version|release|firmware|section|chapter|clause|v)\.?\s*$", re.I)
PHONES = (
    # North America: 212-555-0123, 212.555.0123, (212) 555-0123, 1-212-555-0123, 1 (212) 555 0123
    re.compile(
        r"(?<![\w.+-])(?:1[ .-])?"
        r"(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]|[2-9]\d\d([.-])[2-9]\d\d\1)"
        r"\d{4}(?![\w-]|\.\d)"
    ),
    # any country, as +CC and groups: +44 20 7946 0958, +1 (212) 555-0123, +4915112345678
    re.compile(r"(?<![\w+])\+[1-9](?:[ .-]?\(?\d\)?){8,14}(?![\w-]|\.\d)"),
    # with the trunk prefix 0, in groups: 020 7946 0958, 0171 555 1234, (020) 7946 0958
    re.compile(r"(?<![\w.+,-])\(?0\d{2,4}\)?[ -]\d{3,4}[ -]\d{3,4}(?![\w-]|[.,]\d)"),
    # any grouping of 7 to 11 digits, if the text says that it is a telephone number
    re.compile(
        r"\b(?:phone|telephone|tel|mobile|fax|call|dial|whatsapp)"
        r"(?: (?:me|us|him|her|them|number|no\.?))?(?: (?:at|on|is|was))?\W{1,3}"
        r"(?:\d[ .-]?){6,10}\d(?![\w-]|[.,]\d)",
        re.I,
    ),
)


def find_pii(text: str) -> list[str]:
    """The kinds of personal data in `text`, sorted, each once; empty when there is none.

    Kinds: "e-mail", "phone", "IP address" (public ones; no version and section numbers). Returns
    kinds, not the matches, so that an account of what was dropped repeats no personal data.
    """
    found = set()
    if "@" in text and EMAIL.search(text):
        found.add("e-mail")
    if any(character.isdigit() for character in text):
        if any(_is_public_address(match) for ip in IP for match in ip.finditer(text)):
            found.add("IP address")
        if any(pattern.search(text) for pattern in PHONES):
            found.add("phone")
    return sorted(found)


def pii_of(record: Record) -> list[str]:
    """The kinds of personal data in all text of a record: prompt, response, responses."""
    texts = [record.get("prompt", ""), record.get("response", ""), *record.get("responses", ())]
    return sorted({kind for text in texts for kind in find_pii(text)})


def drop_pii(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Drop the records with personal data in prompt or responses -> (kept, dropped).

    The paper filters prompts of the training split (3.2). Responses are searched too, because a
    model learns them as well. `pii_of` tells what was found in a dropped record.
    """
    kept: list[Record] = []
    dropped: list[Record] = []
    for record in records:
        (dropped if pii_of(record) else kept).append(record)
    return kept, dropped


def _is_public_address(match: re.Match[str]) -> bool:
    """Whether a match of IP is an address that could identify somebody."""
    if NUMBERED_TEXT.search(match.string, max(0, match.start() - 12), match.start()):
        return False
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return address.is_global and not address.is_multicast
