"""
The paper's prompt hygiene as small functions (InstructGPT 3.2, appendix A).

    deduplicate      prompts that share a long common prefix are one prompt
    cap_per_user     at most 200 prompts of one user, so that no user dominates the data
    split_by_user    train, validation and test have no user in common
    drop_pii         records with personal data are dropped, from the training split only

Records are dictionaries as data/files.py describes them; every function returns new lists that
hold the same dictionary objects, in the order given, and changes none of them. Functions that
drop something return `(kept, dropped)`, so that a command can print an account of it.

What the paper leaves open: the length of a "long common prefix", which 200 prompts of a user
stay, and how personal data is found. The choices are stated where they are made.
"""

import hashlib
import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Iterator

Record = dict
PREFIX_CHARS = 200  # about 50 tokens, near the median length of the paper's RM prompts (Table 9)
USER_LIMIT = 200


def deduplicate(
    records: Iterable[Record], prefix_chars: int | None = PREFIX_CHARS
) -> tuple[list[Record], list[Record]]:
    """
    Keep the first of the records whose prompts share a long common prefix -> (kept, dropped).

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
    """
    Keep at most `limit` records of each user -> (kept, dropped).

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
    """
    Split records so that no user is in two splits -> {split name: records}.

    `fractions` maps names to shares that are positive and sum to 1. Users are placed one by one,
    largest first and equals in an order drawn from `seed`, into the split that is then fullest
    to the smallest degree, (records + half the user's) / target (Sainte-Lague's rule: splits get
    users of every size in proportion). Then single users move for as long as a move brings the
    sizes nearer to their targets. The outcome depends on the seed and the users' record counts,
    not on the order of the records.

    Raises ValueError on fractions that are not positive or do not sum to 1.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions {fractions} must be positive and sum to 1")
    records = list(records)
    volume = Counter(record["user"] for record in records)
    target = {split: share * len(records) for split, share in fractions.items()}
    size = dict.fromkeys(fractions, 0)
    users = sorted(volume, key=lambda user: (-volume[user], _digest(seed, user)))
    split_of: dict[str, str] = {}
    for user in users:
        split = min(fractions, key=lambda name: (size[name] + volume[user] / 2) / target[name])
        split_of[user] = split
        size[split] += volume[user]

    def gain(user: str, split: str) -> float:
        """By how much the total deviation from the targets falls when `user` moves to `split`."""

        def deviation(name: str, change: int) -> float:
            return abs(size[name] + change - target[name])

        old, n = split_of[user], volume[user]
        return deviation(old, 0) + deviation(split, 0) - deviation(old, -n) - deviation(split, n)

    moved = True
    while moved:  # ends: the total deviation falls with every move and takes finitely many values
        moved = False
        for user in reversed(users):  # smallest first: the finest corrections
            split = max(fractions, key=lambda name: gain(user, name))
            if split != split_of[user] and gain(user, split) > 1e-9:
                size[split_of[user]] -= volume[user]
                size[split] += volume[user]
                split_of[user] = split
                moved = True
    splits: dict[str, list[Record]] = {name: [] for name in fractions}
    for record in records:
        splits[split_of[record["user"]]].append(record)
    return splits


def _digest(seed: int, text: str) -> bytes:
    """Return a hash that is the same in every process, unlike Python's own."""
    return hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=16, key=str(seed).encode()
    ).digest()


# --- personal data ------------------------------------------------------------------------------
# Patterns demand the punctuation that people write: a run of digits alone is a quantity, a year
# or an identifier far more often than a telephone number. What such rules cannot find, above all
# names, is not claimed to be found.

EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]+@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}\b"
)
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
IPV6 = re.compile(r"(?<![\w:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){3,7}(?![\w:])")
NUMBERED_TEXT = re.compile(r"(?:version|release|firmware|section|chapter|clause|v)\.?\s*$", re.I)
CARD = re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
SSN = re.compile(r"(?<![\w-])(\d{3})-(\d{2})-(\d{4})(?![\w-])")
SSN_NAMED = re.compile(
    r"\b(?:SSN|social security (?:number|no\.?|#))\W{0,3}(?:is\W{1,3})?"
    r"(\d{3})[ -]?(\d{2})[ -]?(\d{4})(?![\w-])",
    re.I,
)
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
STREET = re.compile(
    r"(?<![\w.,/:-])(?P<number>\d{1,5}[A-Za-z]?),? (?:[NSEW]\.? )?"
    r"(?:[A-Z][a-z']+\.? |\d+(?:st|nd|rd|th) ){1,3}"
    r"(?:Street|Avenue|Road|Boulevard|Lane|Drive|Crescent|Terrace|St|Ave|Rd|Blvd|Ln)\b"
    r"(?=\.?(?: ?[,;)\n]|\s*$)|\.\s)"
)
LOCAL_NETWORKS = tuple(
    ipaddress.ip_network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
    )
)
# Issuers by leading digits and length, ISO/IEC 7812: one random number in ten passes Luhn's test,
# so the test alone would call many long identifiers credit cards.
CARD_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:2[2-9]|[3-6]\d|7[01])\d{13}|2720\d{12}|3[47]\d{13}|"
    r"3(?:0[0-5]|[68]\d)\d{11}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
)


def find_pii(text: str) -> list[str]:
    """
    Return the kinds of personal data in `text`, sorted, each once; empty when there is none.

    Kinds: "credit card" (issuer's prefix, length and Luhn's check digit), "e-mail",
    "IP address" (not private or local ones, nor version and section numbers), "phone",
    "social security number" (United States, in ranges that are issued), "street address"
    (number, capitalised name and kind of street, as a phrase of its own). Returns kinds, not the
    matches, so that an account of what was dropped repeats no personal data.
    """
    found = set()
    if "@" in text and EMAIL.search(text):
        found.add("e-mail")
    if not any(character.isdigit() for character in text):
        return sorted(found)
    if any(_is_public_address(match) for match in _chain(text, IPV4, IPV6)):
        found.add("IP address")
    if any(_is_card(match[0]) for match in CARD.finditer(text)):
        found.add("credit card")
    if any(_is_ssn(*match.groups()) for match in _chain(text, SSN, SSN_NAMED)):
        found.add("social security number")
    if any(pattern.search(text) for pattern in PHONES):
        found.add("phone")
    if any(not _is_year(match["number"]) for match in STREET.finditer(text)):
        found.add("street address")
    return sorted(found)


def pii_of(record: Record) -> list[str]:
    """Return the kinds of personal data in all text of a record: prompt, response, responses."""
    texts = [record.get("prompt", ""), record.get("response", ""), *record.get("responses", ())]
    return sorted({kind for text in texts for kind in find_pii(text)})


def drop_pii(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """
    Drop the records with personal data in prompt or responses -> (kept, dropped).

    The paper filters prompts of the training split (3.2). Responses are searched too, because a
    model learns them as well. `pii_of` tells what was found in a dropped record.
    """
    kept: list[Record] = []
    dropped: list[Record] = []
    for record in records:
        (dropped if pii_of(record) else kept).append(record)
    return kept, dropped


def _chain(text: str, *patterns: re.Pattern[str]) -> Iterator[re.Match[str]]:
    for pattern in patterns:
        yield from pattern.finditer(text)


def _is_public_address(match: re.Match[str]) -> bool:
    """Whether a match of IPV4 or IPV6 is an address that could identify somebody."""
    if NUMBERED_TEXT.search(match.string, max(0, match.start() - 12), match.start()):
        return False
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 6:
        return address.is_global or address in ipaddress.ip_network("2001:db8::/32")
    return not any(address in network for network in LOCAL_NETWORKS)


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    if not CARD_ISSUERS.fullmatch(digits):
        return False
    total = 0
    for place, digit in enumerate(reversed(digits)):  # Luhn: double every second from the right
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def _is_ssn(area: str, group: str, serial: str) -> bool:
    """Whether the three parts lie in ranges that the Social Security Administration issues."""
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _is_year(number: str) -> bool:
    """Whether a house number reads as a year: "the crash of 1929, Wall Street" has no address."""
    return number.isdigit() and 1500 <= int(number) <= 2099
