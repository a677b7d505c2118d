"""Tokenizers: GPT-2's against tiktoken's own, the trained one against naive BPE; the template."""

import json
import random
from collections import Counter
from pathlib import Path

from data.files import BadInput
from data.tokenizer import (
    GPT2_PATTERN,
    decode_response,
    encode_prompt,
    encode_response,
    gpt2_encoding,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = [
    "the fox eats fish .\n\nwhat does the bear eat ?\n\nthe bear eats honey .",
    "the owl lives in the forest . the wolf lives in the cave .",
    "naïve café, 漢字 and 🙂 too; tabs\tand  two spaces",
    "aaaa aaa aa a banana bananas ananas",
]


def naive_bpe(texts: list[str], vocab_size: int) -> list[bytes]:
    """BPE as Sennrich et al. describe it: count all pairs anew before every merge."""
    words = Counter(piece for text in texts for piece in regex.findall(GPT2_PATTERN, text))
    splits = {word: [bytes([b]) for b in word.encode()] for word in words}
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < vocab_size - 1:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, split in splits.items():
            for i in range(len(split) - 1):
                pairs[split[i], split[i + 1]] += words[word]
        if not pairs:
            break
        best = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[0]
        if best[0] + best[1] not in vocabulary:
            vocabulary.append(best[0] + best[1])
        for split in splits.values():
            i = 0
            while i < len(split) - 1:
                if (split[i], split[i + 1]) == best:
                    split[i : i + 2] = [best[0] + best[1]]
                i += 1
    return vocabulary


@pytest.fixture(scope="module")
def tiny_encoding() -> tiktoken.Encoding:
    return train_bpe(TEXTS * 3, 330)


@pytest.mark.parametrize("vocab_size", [257, 280, 320, 5000])
def test_trained_vocabulary_equals_naive_bpe(vocab_size: int) -> None:
    ranks = train_bpe(TEXTS, vocab_size)._mergeable_ranks
    assert sorted(ranks, key=ranks.get) == naive_bpe(TEXTS, vocab_size)


def test_training_stops_when_every_piece_is_one_token() -> None:
    encoding = train_bpe(["aab aab ab"], 5000)
    assert encoding.n_vocab < 300
    assert all(len(encoding.encode_ordinary(piece)) == 1 for piece in ("aab", " aab", " ab"))


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    shuffled = TEXTS * 2
    random.Random(1).shuffle(shuffled)
    assert train_bpe(shuffled, 400)._mergeable_ranks == train_bpe(TEXTS * 2, 400)._mergeable_ranks


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 256.*at least 257"):
        train_bpe(TEXTS, 256)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_survives_the_trained_tokenizer(text: str) -> None:
    encoding = train_bpe(TEXTS, 300)
    text = text.encode("utf-8", "ignore").decode()  # lone surrogates are no text
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert encoding.eot_token not in ids


def test_gpt2_from_local_files_equals_tiktoken(
    real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiktoken reads its own copy of the files, with its own parser, from its cache folder."""
    cache = real_data / "tokenizer" / "tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    theirs = tiktoken.get_encoding("gpt2")
    ours = gpt2_encoding(real_data / "tokenizer" / "gpt2")
    assert ours._mergeable_ranks == theirs._mergeable_ranks
    assert (ours.eot_token, ours.n_vocab) == (50256, 50257)
    for text in [*TEXTS, "don't <|endoftext|>  \n\n\t x", " Ünï  \r\n"]:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_gpt2_files_that_differ_are_refused(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "tokenizer" / "gpt2"
    ids = json.loads((source / "encoder.json").read_text())
    ids["the"], ids["and"] = ids["and"], ids["the"]
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    (tmp_path / "vocab.bpe").write_bytes((source / "vocab.bpe").read_bytes())
    with pytest.raises(BadInput, match="differ"):
        gpt2_encoding(tmp_path)


def gpt2_files(folder: Path, merges: str = "a b\n", **ids: object) -> Path:
    """A vocabulary of GPT-2's form with one merge: 256 bytes, "ab", the end token."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [*map(chr, printable), *map(chr, range(256, 324)), "ab", "<|endoftext|>"]
    content = {token: number for number, token in enumerate(tokens)} | ids
    (folder / "vocab.bpe").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "encoder.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"merges": "a b c\n"}, "vocab.bpe: .*too many"),
        ({"merges": "ab\n"}, "vocab.bpe: .*not enough"),
        ({"merges": "a \u4e2d\n"}, "vocab.bpe: .*\u4e2d"),
        ({"\u4e2d": 258}, "encoder.json: .*\u4e2d"),
        ({"ab": "256"}, "differ"),
        ({"<|endoftext|>": 7}, r"end token 7\) and vocab.bpe \(257 entries"),
        ({"<|endoftext|>": "257"}, "end token '257'"),
    ],
)
def test_damaged_gpt2_files_are_refused(tmp_path: Path, files: dict, words: str) -> None:
    assert gpt2_encoding(gpt2_files(tmp_path)).encode_ordinary("ab") == [256]
    with pytest.raises(BadInput, match=words):
        gpt2_encoding(gpt2_files(tmp_path, **files))


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
@pytest.mark.parametrize("content", [b"\xff", b"[]"])
def test_other_files_than_gpt2s_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (gpt2_files(tmp_path) / name).write_bytes(content)
    with pytest.raises(BadInput, match=name):
        gpt2_encoding(tmp_path)


def test_template(tiny_encoding: tiktoken.Encoding) -> None:
    prompt = encode_prompt(tiny_encoding, "what does the fox eat ? \n")
    assert tiny_encoding.decode(prompt) == "what does the fox eat ?\n\n"
    response = encode_response(tiny_encoding, "fish .")
    assert response == [*tiny_encoding.encode_ordinary("fish ."), tiny_encoding.eot_token]
    assert encode_response(tiny_encoding, "fish .", ended=False) == response[:-1]
    assert encode_response(tiny_encoding, "") == [tiny_encoding.eot_token]


def test_end_token_in_text_is_ordinary_text(tiny_encoding: tiktoken.Encoding) -> None:
    text = "a <|endoftext|> b"
    assert tiny_encoding.eot_token not in encode_prompt(tiny_encoding, text)
    assert encode_response(tiny_encoding, text).count(tiny_encoding.eot_token) == 1
    assert decode_response(tiny_encoding, encode_response(tiny_encoding, text)) == text


def test_decoding_stops_at_the_first_end_token(tiny_encoding: tiktoken.Encoding) -> None:
    end = tiny_encoding.eot_token
    fish, honey = tiny_encoding.encode_ordinary("fish"), tiny_encoding.encode_ordinary("honey")
    assert decode_response(tiny_encoding, [*fish, end, *honey, end]) == "fish"
    assert decode_response(tiny_encoding, [end]) == ""
    assert decode_response(tiny_encoding, fish) == "fish"
    assert decode_response(tiny_encoding, [0xFF]) == "\ufffd"


def test_blank_line_has_the_same_tokens_in_a_page_and_after_a_prompt(
    tiny_encoding: tiktoken.Encoding,
) -> None:
    """Otherwise a base model would never have seen what a prompt ends with."""
    page = tiny_encoding.encode_ordinary("what does the fox eat ?\n\nthe fox eats fish .")
    prompt = encode_prompt(tiny_encoding, "what does the fox eat ?")
    assert page[: len(prompt)] == prompt


def test_tokenizer_survives_its_file(tmp_path: Path, tiny_encoding: tiktoken.Encoding) -> None:
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tiny_encoding, path)
    loaded = load_tokenizer(path)
    assert loaded._mergeable_ranks == tiny_encoding._mergeable_ranks
    assert (loaded.name, loaded.eot_token, loaded.n_vocab) == ("tiny", 329, 330)
    for text in TEXTS:
        assert loaded.encode_ordinary(text) == tiny_encoding.encode_ordinary(text)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BadInput, match="no such file"):
        load_tokenizer(path)
    whole = {"name": "x", "pattern": "a", "special_tokens": {}, "ranks": ["a"]}
    twice = whole | {"special_tokens": {"<|endoftext|>": 2}, "ranks": ["a", "a"]}
    no_byte = whole | {"special_tokens": {"<|endoftext|>": 1}, "ranks": ["\u0100"]}
    for content in ("", "[]", "{}", *map(json.dumps, (whole, twice, no_byte))):
        path.write_text(content)
        with pytest.raises(BadInput, match="tokenizer.json"):
            load_tokenizer(path)
