"""Tokenizers and the one prompt template.

Two byte-level BPE vocabularies share one interface, tiktoken's `Encoding`: GPT-2's, read from its
published files `vocab.bpe` and `encoder.json`, and the tiny world's, trained here on the world's
own text. Each has exactly one special token, `<|endoftext|>`, which separates documents and ends
responses; it is only ever appended as an id. Text is always encoded as ordinary text, so a literal
"<|endoftext|>" inside a record never becomes the end token.

The template is as bare as InstructGPT's, whose models read plain text without chat markup:

    prompt, blank line, response, end token

Prompt and response are encoded apart and concatenated as token lists. Encoding the joined text
could merge bytes across the boundary, and the response's tokens would then depend on the prompt.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from data.files import END_OF_TEXT, BadInput, check_blank, read_json, read_text, write_atomic

import regex  # a dependency of tiktoken; the standard `re` has no \p{L}
import tiktoken

# How GPT-2 cuts text into pieces before any merge: contractions, words and numbers with their
# leading space, punctuation, runs of white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ---------------------------------------------------------------------------- the prompt template


def encode_prompt(encoding: tiktoken.Encoding, prompt: str) -> list[int]:
    """Token ids of a prompt: its text without trailing white space, then a blank line."""
    check_blank(prompt, "a prompt")
    return encoding.encode_ordinary(prompt.rstrip() + "\n\n")


def encode_response(encoding: tiktoken.Encoding, response: str, ended: bool = True) -> list[int]:
    """Token ids of a response, with the end token if the response `ended` by itself."""
    ids = encoding.encode_ordinary(response)
    return ids + [encoding.eot_token] if ended else ids


def decode_response(encoding: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """Text of a sampled response, cut at the first end token.

    Bytes that are not valid UTF-8, which a sampler may produce, become U+FFFD.
    """
    ids = [int(i) for i in ids]
    if encoding.eot_token in ids:
        ids = ids[: ids.index(encoding.eot_token)]
    return encoding.decode(ids)


# -------------------------------------------------------------------------- building an Encoding


def gpt2_encoding(folder: str | Path) -> tiktoken.Encoding:
    """GPT-2's tokenizer from a local `vocab.bpe` (merges) and `encoder.json` (ids).

    The merge list fixes every rank: 256 bytes first, in GPT-2's order, then one entry a merge;
    `encoder.json` must say the same, and names the end token's id (50256).

    Raises:
        BadInput: the two files do not describe one vocabulary.
    """
    folder = Path(folder)
    # Both files write bytes as printable characters: printable Latin-1 stands for itself, the
    # other 68 bytes for the characters from U+0100 on. The printable ones also come first in rank.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}

    def to_bytes(token: str) -> bytes:
        return bytes(byte_of[character] for character in token)

    ranks = {bytes([b]): rank for rank, b in enumerate(printable + others)}
    path = folder / "vocab.bpe"
    merges, ids = read_text(path).split("\n")[1:], read_json(folder / "encoder.json")
    try:
        for line in filter(None, merges):  # line 1, the version, is left out
            left, right = line.split()
            ranks[to_bytes(left) + to_bytes(right)] = len(ranks)
        path, end_id = folder / "encoder.json", ids.pop(END_OF_TEXT, None)
        same = {to_bytes(token): i for token, i in ids.items()} == ranks
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path}: {error!r}; expected GPT-2's file, download it again") from None
    if not same or type(end_id) is not int or not len(ranks) <= end_id < 2**31:
        raise BadInput(
            f"{folder}: encoder.json (end token {end_id!r}) and vocab.bpe ({len(ranks)} entries) "
            "differ; both must come from one release of GPT-2. Download the two files again."
        )
    return _encoding("gpt2", GPT2_PATTERN, ranks, end_id)


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Byte-level BPE with `vocab_size` entries: 256 bytes, merges, and the end token.

    Byte-pair encoding (Sennrich et al. 2016) over the pieces that GPT-2's pattern cuts: start from
    single bytes and repeatedly join the adjacent pair that occurs most often. Pieces are counted
    once, so a step costs time only in the distinct pieces that hold the joined pair. Ties go to
    the pair that sorts first, so equal texts give equal vocabularies. Training stops early when
    every distinct piece has become one token; the vocabulary is then smaller than asked for.

    Raises:
        ValueError: `vocab_size` is below 257.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size {vocab_size}: expected at least 257, the 256 bytes and the end token"
        )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(GPT2_PATTERN, text))
    pieces = [[bytes([b]) for b in piece.encode("utf-8")] for piece in counts]
    weights = list(counts.values())

    pair_counts: Counter[tuple[bytes, bytes]] = Counter()
    pieces_with: dict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for index, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:], strict=False):
            pair_counts[pair] += weights[index]
            pieces_with[pair].add(index)

    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size - 1 and pair_counts:
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        # Two different pairs can spell the same bytes; the entry then exists already.
        ranks.setdefault(best[0] + best[1], len(ranks))
        for index in pieces_with.pop(best):
            piece, weight = pieces[index], weights[index]
            for pair in zip(piece, piece[1:], strict=False):
                pair_counts[pair] -= weight
                if pair_counts[pair] == 0:
                    del pair_counts[pair]
            piece = pieces[index] = _join(piece, best)
            for pair in zip(piece, piece[1:], strict=False):
                pair_counts[pair] += weight
                pieces_with[pair].add(index)
    return _encoding("tiny", GPT2_PATTERN, ranks, len(ranks))


def _join(piece: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """The piece with every non-overlapping occurrence of `pair`, from the left, made one token."""
    joined, i = [], 0
    while i < len(piece):
        if i + 1 < len(piece) and (piece[i], piece[i + 1]) == pair:
            joined.append(piece[i] + piece[i + 1])
            i += 2
        else:
            joined.append(piece[i])
            i += 1
    return joined


def _encoding(name: str, pattern: str, ranks: dict[bytes, int], end_id: int) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_id}
    )


# ----------------------------------------------------------------------------------- tokenizer.json


def save_tokenizer(encoding: tiktoken.Encoding, path: str | Path) -> None:
    """Write an Encoding as JSON: name, pattern, special tokens, and every entry in rank order.

    An entry's bytes are written as the characters U+0000 to U+00FF, so that " the" reads " the".
    """
    ranks = encoding._mergeable_ranks  # tiktoken offers no public view of them
    entries = [token.decode("latin-1") for token in sorted(ranks, key=ranks.get)]
    content = {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "ranks": entries,
    }
    write_atomic(path, json.dumps(content, indent=0) + "\n")


def load_tokenizer(path: str | Path) -> tiktoken.Encoding:
    """The Encoding that `save_tokenizer` wrote.

    Raises:
        BadInput: the file is not such a file, or does not hold exactly the one special token.
    """
    remedy = "expected a tokenizer.json written by this project; make it again"
    try:
        content = read_json(path)
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(content["ranks"])}
        special, pattern, name = content["special_tokens"], content["pattern"], content["name"]
    except BadInput as error:
        raise BadInput(f"{error}; {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: {error!r}; {remedy}") from error
    if (
        not isinstance(special, dict)
        or list(special) != [END_OF_TEXT]
        or not isinstance(content["ranks"], list)
        or len(ranks) != len(content["ranks"])
    ):
        raise BadInput(f"{path}: special tokens {special}, {len(ranks)} distinct entries; {remedy}")
    # What tiktoken would answer with a panic, now or when such a text comes.
    end = special[END_OF_TEXT]
    if type(end) is not int or not len(ranks) <= end < 2**31:
        raise BadInput(f"{path}: end token {end!r}, expected an id from {len(ranks)}; {remedy}")
    if b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
        raise BadInput(f"{path}: an entry is empty or one of the 256 bytes has none; {remedy}")
    try:
        if not isinstance(name, str) or regex.match(pattern, "") is not None:
            raise BadInput(
                f"{path}: the pattern matches nothing at all, or the name is no text; {remedy}"
            )
        encoding = _encoding(name, pattern, ranks, end)
        if encoding.decode(encoding.encode_ordinary("a b\n 1!")) != "a b\n 1!":
            raise BadInput(f"{path}: the pattern drops text; {remedy}")
        return encoding
    except (TypeError, regex.error, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: pattern: {error}; {remedy}") from None
