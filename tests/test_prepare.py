"""data.real.prepare: hygiene, splits, files, and one clear line for whatever is wrong."""

import itertools
import json
from collections import Counter
from pathlib import Path

from data.commands import run_command
from data.files import read_documents, read_jsonl
from data.hygiene import pii_of
from data.real.prepare import DATA_SETS, SPLITS, main
from data.real.raw import find_files
from data.tokenizer import load_tokenizer

import pytest

from tests.raw_sets import (
    alpaca,
    dolly,
    files_in,
    hh,
    pair,
    put,
    qa,
    ranked,
    tldr,
    tree,
    write_json,
    write_lines,
    write_text,
)

# --- the command --------------------------------------------------------------------------------


def small_folder(folder: Path) -> Path:
    """A flat folder with a few sets under their usual names."""
    counts = [alpaca(f"Count to {n}", "", f"{n}") for n in range(40)]
    mails = [alpaca(f"Whom shall I ask for {n}?", "", f"Ask p{n}@example.com") for n in range(20)]
    write_json(folder / "alpaca_data.json", counts + mails)
    dialogues = [hh(f"\n\nHuman: Count to {n}", " yes", " no") for n in range(30)]
    write_lines(folder / "hh-rlhf.jsonl", *dialogues)
    write_text(folder / "Doyle_Hound_1902.txt", "A hound. " * 100)
    return folder


def read_split(out: Path, split: str) -> dict[str, list[dict]]:
    return {
        kind: read_jsonl(out / split / f"{kind}.jsonl", kind)
        for kind in ("demonstrations", "prompts", "comparisons")
        if (out / split / f"{kind}.jsonl").exists()
    }


def prepare(names: str, folder: Path, out: Path, *more: object) -> int:
    argv = [*names.split(), "--from", folder, "--out", out, "--tokenizer", "none", *more]
    return run_command(lambda: main([str(arg) for arg in argv]))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def test_small_run(tmp_path, capsys):
    folder, out = small_folder(tmp_path / "raw"), tmp_path / "out"
    command = ("alpaca hh-rlhf novels", folder)
    assert prepare(*command, out, "--section_chars", 100) == 0
    printed = capsys.readouterr().out
    assert (out / "account.txt").read_text().strip() in printed
    parts = {split: read_split(out, split) for split in SPLITS}
    # 60 demonstrations are split 48, 6, 6; those with an e-mail leave the training split alone
    with_pii = {s: sum(bool(pii_of(r)) for r in parts[s]["demonstrations"]) for s in SPLITS}
    assert with_pii["train"] == 0 and with_pii["valid"] + with_pii["test"] > 0
    mails = 20 - sum(with_pii.values())
    assert [len(parts[s]["demonstrations"]) for s in SPLITS] == [48 - mails, 6, 6]
    assert f"{mails} demonstrations: personal data in the training split (e-mail" in printed
    # the prompts of hh-rlhf are prompts of alpaca: same user, same split, one prompt
    users = {s: {r["user"] for kind in parts[s].values() for r in kind} for s in SPLITS}
    assert sum(len(u) for u in users.values()) == len(set().union(*users.values()))
    comparisons = [r for s in SPLITS for r in parts[s]["comparisons"]]
    assert len(comparisons) == 30 and {r["data_set"] for r in comparisons} == {"hh-rlhf"}
    prompts = [r["prompt"] for s in SPLITS for r in parts[s]["prompts"]]
    assert len(prompts) == len(set(prompts)) == 60 - mails
    documents = [read_documents(path) for path in out.rglob("pretrain.txt")]
    assert sum(map(len, documents)) == 2, "nine equal sections and a rest"

    again = tmp_path / "again"
    assert prepare(*command, again, "--section_chars", 100) == 0
    assert contents(again) == contents(out), "the same input and seed give the same bytes"
    assert prepare(*command, again, "--section_chars", 100, "--seed", 1) == 0
    assert contents(again) != contents(out)

    assert prepare("hh-rlhf", folder, out) == 0
    assert not list(out.rglob("demonstrations.jsonl")), "no left-over of the earlier run"


def test_duplicates_across_sets_and_best_responses(tmp_path):
    """Dialogues that share 200 characters are two prompts, also beside sets where they are not."""
    folder, out = tmp_path / "raw", tmp_path / "out"
    long = "The same beginning of an instruction. " * 8
    write_json(folder / "alpaca_data.json", [alpaca(f"{long}{n}", "", "x") for n in range(3)])
    answers = [dolly(text, "", "y", "open_qa") for text in (f"{long}again", "Something else")]
    write_lines(folder / "databricks-dolly-15k.jsonl", *answers)
    chats = {"a": " best", "b": "", f"Chat. {long}1": " one", f"Chat. {long}2": " two"}
    replies = [hh(f"\n\nHuman: {text}", best, " worst") for text, best in chats.items()]
    write_lines(folder / "hh-rlhf.jsonl", *replies)
    flags = ("--best_as_demonstrations", "--prompts_from", "dolly")
    assert prepare("all", folder, out, *flags, "--fractions", 0.98, 0.01, 0.01) == 0
    part = read_split(out, "train")
    assert [(r["data_set"], r["prompt"], r["response"]) for r in part["demonstrations"]] == [
        ("hh-rlhf", "a", "best"),
        ("hh-rlhf", f"Chat. {long}1", "one"),
        ("hh-rlhf", f"Chat. {long}2", "two"),
        ("alpaca", f"{long}0", "x"),
        ("dolly", "Something else", "y"),
    ]
    assert [r["prompt"] for r in part["prompts"]] == ["Something else"]
    account = (out / "account.txt").read_text()
    assert "2 demonstrations: an earlier one has the same prompt (first 200 characters" in account


def test_a_busy_user_is_cut_to_200(tmp_path):
    folder, out = tmp_path / "raw", tmp_path / "out"
    users = [f"calm {n}" if n >= 250 else "busy" for n in range(300)]
    both = {"a": 0, "b": 1}
    trees = [tree(n, ranked(f"Q {n}?", both, user_id=user)) for n, user in enumerate(users)]
    write_lines(folder / "oasst.trees.jsonl", *trees)
    assert prepare("oasst", folder, out, "--fractions", 0.6, 0.2, 0.2) == 0
    parts = {split: read_split(out, split).get("comparisons", []) for split in SPLITS}
    busy = [sum(r["user"] == "oasst:busy" for r in records) for records in parts.values()]
    assert sorted(busy) == [0, 0, 200] and sum(map(len, parts.values())) == 250
    assert "50 comparisons: their user has more than 200" in (out / "account.txt").read_text()


def test_a_post_keeps_its_pairs_of_summaries(tmp_path):
    """Stiennon et al.: pairs of one post stay, in one split; what is said twice is dropped."""
    folder, out = tmp_path / "raw", tmp_path / "out"
    post = "A long story that is told once more with another end. " * 8

    write_lines(
        folder / "batch3.json",
        pair(post, " a", " b"),
        pair(post, " c", " b"),
        pair(post, " b", " a", 1),  # as the first, said by another worker
        pair(post + "EDIT: thanks", " d", " e"),  # the same post again
        *(pair(f"Story {n}", " f", " g") for n in range(40)),
    )
    write_lines(folder / "tldr_3_filtered" / "train.jsonl", tldr("T", post, " s"))
    test = folder / "tldr_3_filtered" / "test.jsonl"  # is the evaluation's
    write_lines(test, tldr("T", "Held out", " s"))
    assert prepare("summarize tldr", folder, out) == 0
    parts = {split: read_split(out, split) for split in SPLITS}
    mine = {
        split: sorted(r["responses"] for r in part["comparisons"] if "A long" in r["prompt"])
        for split, part in parts.items()
    }
    assert sorted(mine.values()) == [[], [], [["a", "b"], ["b", "c"]]]
    assert sum(len(part["comparisons"]) for part in parts.values()) == 42
    (split,) = (s for s in SPLITS if "demonstrations" in parts[s])
    assert len(parts[split]["demonstrations"]) == 1 and mine[split], "one post, one split"
    account = (out / "account.txt").read_text()
    assert "1 comparisons: an earlier one has the same prompt (first 200 characters" in account
    assert "1 comparisons: an earlier one has the same responses" in account


def test_real_sets_end_to_end(real_data, tmp_path):
    out = tmp_path / "out"
    names = ("oasst", "qa-feedback", "lottery", "dolly", "novels")
    assert main([*names, "--from", str(real_data), "--out", str(out)]) == 0
    parts = {split: read_split(out, split) for split in SPLITS}
    kinds = [(kind, r) for p in parts.values() for kind, records in p.items() for r in records]
    total = Counter((r["data_set"], kind) for kind, r in kinds if kind != "prompts")
    assert total["oasst", "comparisons"] == 211 and total["dolly", "demonstrations"] == 999
    assert total["qa-feedback", "comparisons"] == 372
    for name, kind in total:
        shares = [
            sum(r["data_set"] == name for r in parts[s][kind]) / total[name, kind] for s in SPLITS
        ]
        assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01), (name, kind)
    users = {s: {r["user"] for records in parts[s].values() for r in records} for s in SPLITS}
    assert not any(users[a] & users[b] for a, b in itertools.combinations(SPLITS, 2))
    assert not any(pii_of(r) for records in parts["train"].values() for r in records)
    books = {s: set(read_documents(out / s / "pretrain.txt")) for s in SPLITS}
    assert sum(map(len, books.values())) == 930 and not books["train"] & books["test"]
    assert load_tokenizer(out / "tokenizer.json").encode_ordinary("Hello world") == [15496, 995]


# --- bad input ----------------------------------------------------------------------------------

TREE = json.dumps(tree("t", ranked("Q", {"a": 0, "b": 1})))
HH = json.dumps(hh("\n\nHuman: q", "a", "b"))
SUMMARIES = pair("p", "a", "b")
RAW_FILES = {  # the name of a file of each set
    "hh-rlhf": "hh-rlhf.jsonl",
    "oasst": "oasst.trees.jsonl",
    "qa-feedback": "dev_feedback.json",
    "alpaca": "alpaca_data.json",
    "dolly": "databricks-dolly-15k.jsonl",
    "lottery": "prompt_lottery.jsonl",
    "summarize": "batch3.json",
    "tldr": "tldr_3_filtered_train.jsonl",
    "shakespeare": "input.txt",
}
BAD_FILES = [  # set, what is in its file, words of the error
    ("hh-rlhf", '{"chosen": "x"}', ":1 'rejected'"),
    ("hh-rlhf", '{"chosen": "x", "rejected": 3}', "'rejected' 3"),
    ("hh-rlhf", "[1]", ":1 object"),
    ("hh-rlhf", HH + "\n{oops", ":2 JSON"),
    ("hh-rlhf", "<!DOCTYPE html><html>", "web page"),
    ("hh-rlhf", "version https://git-lfs.github.com/spec/v1\noid sha", "LFS pointer"),
    ("oasst", '{"message_tree_id": "t", "prompt": {"role": "prompter"}}', ":1 'text'"),
    ("oasst", TREE.replace("assistant", "robot"), ":1 'role' robot"),
    ("oasst", TREE.replace('"rank": 1', '"rank": true'), ":1 'rank' True"),
    ("oasst", TREE.replace("message_tree_id", "id"), ":1 'message_tree_id'"),
    ("qa-feedback", [qa("q", [1, 2, 3, 0, 0, 0])], "record 1 'preference' 3"),
    ("qa-feedback", [qa("q", [1] * 5)], "record 1 'preference'"),
    ("qa-feedback", [qa("q", [1] * 6, ["text"])], "record 1 'passages'"),
    ("qa-feedback", "{}", "JSON array"),
    ("alpaca", '[{"instruction": "x", "input": ""}]', "record 1 'output'"),
    ("dolly", dolly("i", "", "r", "gossip"), ":1 'category' gossip"),
    ("dolly", '{"prompt": "Hi", "response": "x"}', ":1 'prompt' Instruction:"),
    ("lottery", '"good"\n{"text": "bad"}', ":2 string"),
    ("summarize", SUMMARIES | {"choice": 2}, ":1 'choice'"),
    ("summarize", SUMMARIES | {"info": {"post": "p", "title": 5}}, ":1 'title' 5"),
    ("summarize", '{"info": {"post": "p"}, "choice": 0}', ":1 'summaries' missing"),
    ("tldr", '{"title": "t", "summary": "s"}', ":1 'post' missing"),
    ("tldr", '{"subreddit": ["a"], "post": "p", "summary": "s"}', "'subreddit'"),
    ("shakespeare", b"fine\n\xff\xfe", ":2 UTF-8"),
    ("lottery", "\n", "nothing left"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES)
def test_bad_files_exit_2_with_one_line_and_write_nothing(name, content, words, tmp_path, capsys):
    folder, out = tmp_path / "raw", tmp_path / "out"
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    content = content if isinstance(content, bytes) else content.encode()
    put(folder, {RAW_FILES[name]: content})
    assert prepare(name, folder, out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for word in words.replace("'", '"').split():
        assert word in error
    assert RAW_FILES[name] in error or "nothing" in words
    assert not out.exists()


RUN = "a" + " " * 200_000 + "b"  # white space that no tokenizer takes


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("alpaca", [alpaca("x", "", "y"), alpaca(RUN, "", "y")], ": record 2"),
        ("alpaca", [alpaca("x", "", RUN)], ": record 1"),
        ("hh-rlhf", hh("\n\nHuman: q", "a", RUN), ":1"),
        ("oasst", tree("t", ranked("Q", {"a": 0, RUN: 1})), ":1"),
        ("lottery", RUN, ":1"),
        ("shakespeare", RUN.encode(), ""),
    ],
)
def test_a_record_that_is_refused_leaves_the_earlier_data_set(
    name, content, where, tmp_path, capsys
):
    out = tmp_path / "out"
    assert prepare("all", small_folder(tmp_path / "raw"), out) == 0
    before = contents(out)
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    put(tmp_path / "new", {RAW_FILES[name]: content})
    assert prepare(name, tmp_path / "new", out, "--section_chars", 300_000) == 2
    expected = f"{RAW_FILES[name]}{where}: 200000 characters of white space in a row"
    assert expected in capsys.readouterr().err
    assert contents(out) == before


def test_a_cut_that_leaves_the_mark_between_documents_is_refused_before_writing(tmp_path, capsys):
    folder, out = tmp_path / "raw", tmp_path / "out"
    write_text(folder / "input.txt", "word " * 20 + "<|endoftext|>\n" + "word " * 20)
    assert prepare("shakespeare", folder, out) == 0
    before = contents(out)
    assert prepare("shakespeare", folder, out, "--section_chars", 100) == 2
    assert "input.txt: a cut leaves <|endoftext|> alone on its line" in capsys.readouterr().err
    assert contents(out) == before


def test_half_a_surrogate_pair_is_dropped(tmp_path):
    """Wherever it stands: in a text, or in the name of a user."""
    users = ranked("Q \ud800?", {"a": 0, "b": 1}, user_id="u\udfff")
    write_lines(tmp_path / "raw/oasst.trees.jsonl", tree(1, users))
    assert prepare("oasst", tmp_path / "raw", tmp_path / "out") == 0
    (record,) = (r for s in SPLITS for r in read_split(tmp_path / "out", s).get("comparisons", ()))
    assert (record["prompt"], record["user"]) == ("Q ?", "oasst:u")


def test_a_gzip_file_that_unpacks_to_too_much_is_refused(tmp_path, capsys):
    path = write_text(tmp_path / "helpful-base" / "test.jsonl.gz", "\n" * 3_000_000)
    assert prepare("hh-rlhf", tmp_path, tmp_path / "out") == 2
    most = 100 * path.stat().st_size + 2**20
    assert f"test.jsonl.gz: unpacks to over {most:,} bytes" in capsys.readouterr().err


def test_damaged_gzip_names_the_file(tmp_path, capsys):
    chats = [hh(f"\n\nHuman: q{n}", "a", "b") for n in range(100)]
    path = write_lines(tmp_path / "helpful-base" / "test.jsonl.gz", *chats)
    whole = path.read_bytes()
    for damaged in (whole[:-40], b"not gzip at all", whole[:60] + b"x" * 60):
        path.write_bytes(damaged)
        assert prepare("hh-rlhf", tmp_path, tmp_path / "out") == 2
        assert "test.jsonl.gz: damaged gzip file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("alpaca --from RAW/absent", "no such folder"),
        ("dolly --from RAW", "no file of dolly, such as databricks-dolly-15k.jsonl"),
        ("alpaca --from RAW", "vocab.bpe"),
        ("alpaca --from RAW --tokenizer RAW", "vocab.bpe"),
        ("nonsense --from RAW", "unknown data set 'nonsense'; known are"),
        ("--download nonsense", "unknown source 'nonsense'; known are"),
        ("", "--download"),
        ("alpaca --download dolly", "not both"),
        ("alpaca --from RAW --fractions 0.9 0.2 0.1", "sum to 1"),
        ("alpaca --from RAW --passages -1", "--passages: -1"),
        ("alpaca --from RAW --passages 5", "--passages is 5; expected 0 to 4"),
        ("alpaca --from RAW --seed -1", "--seed: -1: expected a whole number"),
        ("alpaca --from RAW --prompts_from all", "--prompts_from all: expected sets that are"),
        (
            "alpaca --from RAW --prompts_from oasst",
            "oasst: expected sets that are prepared: alpaca",
        ),
        ("alpaca --from RAW --section_chars 3", "--section_chars is 3"),
        ("alpaca --prompts_from x", "unknown data set 'x'"),
    ],
)
def test_bad_arguments_exit_2(argv, words, tmp_path, capsys):
    raw = str(small_folder(tmp_path / "raw"))
    try:
        given = [*argv.replace("RAW", raw).split(), "--out", str(tmp_path / "out")]
        code = run_command(lambda: main(given))
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_found_in_any_layout(tmp_path):
    names = """
        a/helpful-base/train.jsonl.gz b/helpful-base_test.jsonl c/hh_rlhf.jsonl c/test.jsonl
        d/alpaca_data.json d/alpaca_eval_gpt4.annotations.json e/x.jsonl
        helpful-online/test.jsonl helpful-online/test.jsonl.gz
    """
    put(tmp_path, dict.fromkeys(names.split(), b""))

    def found(name: str, folder: Path = tmp_path) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in find_files(folder, DATA_SETS[name][1])]

    assert found("hh-rlhf") == [
        "a/helpful-base/train.jsonl.gz",
        "b/helpful-base_test.jsonl",
        "c/hh_rlhf.jsonl",
        "helpful-online/test.jsonl",
    ]
    assert found("alpaca") == ["d/alpaca_data.json"]
    assert found("hh-rlhf", tmp_path / "helpful-online") == ["helpful-online/test.jsonl"]
