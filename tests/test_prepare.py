"""data.real.prepare: hygiene, splits, files, and one clear line for whatever is wrong."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from data.files import read_documents, read_jsonl, run_command
from data.hygiene import pii_of
from data.real.prepare import DATA_SETS, SPLITS, main
from data.real.raw import find_files
from data.tokenizer import load_tokenizer
from tests.raw_sets import hh, node, qa, write_json, write_lines

# --- the command --------------------------------------------------------------------------------


def small_folder(folder: Path) -> Path:
    """A flat folder with a few sets under their usual names."""
    write_json(
        folder / "alpaca_data.json",
        [{"instruction": f"Count to {n}", "input": "", "output": f"{n}"} for n in range(40)]
        + [
            {
                "instruction": f"Whom shall I ask for {n}?",
                "input": "",
                "output": f"Ask person{n}@example.com",
            }
            for n in range(20)
        ],
    )
    write_lines(
        folder / "hh-rlhf.jsonl",
        *(hh(f"\n\nHuman: Count to {n}", " yes", " no") for n in range(30)),
    )
    (folder / "Doyle_Hound_1902.txt").write_text("A hound. " * 100)
    return folder


def read_split(out: Path, split: str) -> dict[str, list[dict]]:
    return {
        kind: read_jsonl(out / split / f"{kind}.jsonl", kind)
        for kind in ("demonstrations", "prompts", "comparisons")
        if (out / split / f"{kind}.jsonl").exists()
    }


def prepare(*argv: object) -> int:
    return run_command(lambda: main([str(arg) for arg in argv]))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_small_run(tmp_path, capsys):
    folder, out = small_folder(tmp_path / "raw"), tmp_path / "out"
    command = ["alpaca", "hh-rlhf", "novels", "--from", folder, "--tokenizer", "none"]
    assert prepare(*command, "--section_chars", 100, "--out", out) == 0
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
    assert (
        sum(
            len(read_documents(out / s / "pretrain.txt"))
            for s in SPLITS
            if (out / s / "pretrain.txt").exists()
        )
        == 2
    )  # nine equal sections and a rest

    again = tmp_path / "again"
    assert prepare(*command, "--section_chars", 100, "--out", again) == 0
    assert contents(again) == contents(out), "the same input and seed give the same bytes"
    assert prepare(*command, "--section_chars", 100, "--out", again, "--seed", 1) == 0
    assert contents(again) != contents(out)

    assert prepare("hh-rlhf", "--from", folder, "--tokenizer", "none", "--out", out) == 0
    assert not list(out.rglob("demonstrations.jsonl")), "no left-over of the earlier run"


def test_duplicates_across_sets_and_best_responses(tmp_path):
    folder, out = tmp_path / "raw", tmp_path / "out"
    long = "The same beginning of an instruction. " * 8
    write_json(
        folder / "alpaca_data.json",
        [{"instruction": f"{long}{n}", "input": "", "output": "x"} for n in range(3)],
    )
    write_lines(
        folder / "databricks-dolly-15k.jsonl",
        *(
            {"instruction": text, "context": "", "response": "y", "category": "open_qa"}
            for text in (f"{long}again", "Something else")
        ),
    )
    write_lines(
        folder / "hh-rlhf.jsonl",
        hh("\n\nHuman: a", " best", " worst"),
        hh("\n\nHuman: b", "", " worst"),
    )
    assert (
        prepare(
            "all",
            "--from",
            folder,
            "--out",
            out,
            "--tokenizer",
            "none",
            "--best_as_demonstrations",
            "--prompts_from",
            "dolly",
            "--fractions",
            0.98,
            0.01,
            0.01,
        )
        == 0
    )
    part = read_split(out, "train")
    assert [(r["data_set"], r["prompt"], r["response"]) for r in part["demonstrations"]] == [
        ("hh-rlhf", "a", "best"),
        ("alpaca", f"{long}0", "x"),
        ("dolly", "Something else", "y"),
    ]
    assert [r["prompt"] for r in part["prompts"]] == ["Something else"]
    account = (out / "account.txt").read_text()
    assert "2 demonstrations: an earlier one has the same prompt (first 200 characters" in account


def test_a_busy_user_is_cut_to_200(tmp_path):
    folder, out = tmp_path / "raw", tmp_path / "out"
    write_lines(
        folder / "oasst.trees.jsonl",
        *(
            {
                "message_tree_id": str(n),
                "prompt": node(
                    "prompter",
                    f"Question {n}?",
                    [node("assistant", "a", rank=0), node("assistant", "b", rank=1)],
                    user_id="busy" if n < 250 else f"calm {n}",
                ),
            }
            for n in range(300)
        ),
    )
    assert (
        prepare(
            "oasst",
            "--from",
            folder,
            "--out",
            out,
            "--tokenizer",
            "none",
            "--fractions",
            0.6,
            0.2,
            0.2,
        )
        == 0
    )
    parts = {split: read_split(out, split)["comparisons"] for split in SPLITS}
    busy = [sum(r["user"] == "oasst:busy" for r in records) for records in parts.values()]
    assert sorted(busy) == [0, 0, 200] and sum(map(len, parts.values())) == 250
    assert "50 comparisons: their user has more than 200" in (out / "account.txt").read_text()


def test_a_post_keeps_its_pairs_of_summaries(tmp_path):
    """Stiennon et al.: pairs of one post stay, in one split; what is said twice is dropped."""
    folder, out = tmp_path / "raw", tmp_path / "out"
    post = "A long story that is told once more with another end. " * 8

    def pair(text: str, first: str, second: str, choice: int = 0) -> dict:
        return {
            "info": {"post": text, "title": "T", "subreddit": "advice"},
            "choice": choice,
            "summaries": [{"text": first}, {"text": second}],
            "worker": "w",
        }

    write_lines(
        folder / "batch3.json",
        pair(post, " a", " b"),
        pair(post, " c", " b"),
        pair(post, " b", " a", 1),  # as the first, said by another worker
        pair(post + "EDIT: thanks", " d", " e"),  # the same post again
        *(pair(f"Story {n}", " f", " g") for n in range(40)),
    )
    write_lines(
        folder / "tldr_3_filtered" / "train.jsonl",
        {"subreddit": "advice", "title": "T", "post": post, "summary": " s"},
    )
    write_lines(
        folder / "tldr_3_filtered" / "test.jsonl",  # is the evaluation's
        {"subreddit": "advice", "title": "T", "post": "Held out", "summary": " s"},
    )
    assert prepare("summarize", "tldr", "--from", folder, "--out", out, "--tokenizer", "none") == 0
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
    assert (
        prepare(
            "oasst", "qa-feedback", "lottery", "dolly", "novels", "--from", real_data, "--out", out
        )
        == 0
    )
    parts = {split: read_split(out, split) for split in SPLITS}
    total = Counter(
        (r["data_set"], kind)
        for part in parts.values()
        for kind, records in part.items()
        for r in records
        if kind != "prompts"
    )
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

GOOD_TREE = {
    "message_tree_id": "t",
    "prompt": node(
        "prompter", "Q", [node("assistant", "a", rank=0), node("assistant", "b", rank=1)]
    ),
}
BAD_FILES = {
    "hh_missing_key": ("hh-rlhf", "hh.jsonl", '{"chosen": "x"}', [":1", '"rejected"']),
    "hh_wrong_type": ("hh-rlhf", "hh.jsonl", '{"chosen": "x", "rejected": 3}', ['"rejected"', "3"]),
    "hh_not_an_object": ("hh-rlhf", "hh.jsonl", "[1]", [":1", "object"]),
    "second_line": (
        "hh-rlhf",
        "hh.jsonl",
        json.dumps(hh("\n\nHuman: q", "a", "b")) + "\n{oops",
        [":2", "not JSON"],
    ),
    "web_page": ("hh-rlhf", "hh.jsonl", "<!DOCTYPE html><html>", ["a web page"]),
    "lfs_pointer": (
        "hh-rlhf",
        "hh.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid sha",
        ["Git LFS pointer"],
    ),
    "oasst_no_text": (
        "oasst",
        "oasst.trees.jsonl",
        '{"message_tree_id": "t", "prompt": {"role": "prompter"}}',
        [":1", '"text"'],
    ),
    "oasst_role": (
        "oasst",
        "oasst.trees.jsonl",
        json.dumps(GOOD_TREE).replace("assistant", "robot"),
        [":1", '"role"', "robot"],
    ),
    "oasst_rank": (
        "oasst",
        "oasst.trees.jsonl",
        json.dumps(GOOD_TREE).replace('"rank": 1', '"rank": true'),
        [":1", '"rank"', "True"],
    ),
    "oasst_no_tree_id": (
        "oasst",
        "oasst.trees.jsonl",
        json.dumps(GOOD_TREE).replace("message_tree_id", "id"),
        [":1", '"message_tree_id"'],
    ),
    "qa_verdicts": (
        "qa-feedback",
        "dev_feedback.json",
        json.dumps([qa("q", [1, 2, 3, 0, 0, 0])]),
        ["record 1", '"preference"', "3"],
    ),
    "qa_five_verdicts": (
        "qa-feedback",
        "dev_feedback.json",
        json.dumps([qa("q", [1] * 5)]),
        ["record 1", '"preference"'],
    ),
    "qa_passages": (
        "qa-feedback",
        "dev_feedback.json",
        json.dumps([qa("q", [1] * 6, ["text"])]),
        ["record 1", '"passages"'],
    ),
    "qa_no_array": ("qa-feedback", "dev_feedback.json", "{}", ["expected a JSON array"]),
    "alpaca_key": (
        "alpaca",
        "alpaca_data.json",
        '[{"instruction": "x", "input": ""}]',
        ["record 1", '"output"'],
    ),
    "dolly_category": (
        "dolly",
        "databricks-dolly-15k.jsonl",
        json.dumps({"instruction": "i", "context": "", "response": "r", "category": "gossip"}),
        [":1", '"category"', "gossip"],
    ),
    "dolly_template": (
        "dolly",
        "dolly_hhrlhf.jsonl",
        '{"prompt": "Hi", "response": "x"}',
        [":1", '"prompt"', "### Instruction:"],
    ),
    "lottery_object": (
        "lottery",
        "prompt_lottery.jsonl",
        '"good"\n{"text": "bad"}',
        [":2", "string"],
    ),
    "summarize_choice": (
        "summarize",
        "batch3.json",
        json.dumps(
            {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}
        ),
        [":1", '"choice"'],
    ),
    "summarize_title": (
        "summarize",
        "batch3.json",
        json.dumps(
            {
                "info": {"post": "p", "title": 5},
                "summaries": [{"text": "a"}, {"text": "b"}],
                "choice": 0,
            }
        ),
        [":1", '"title"', "5"],
    ),
    "summarize_no_summaries": (
        "summarize",
        "batch3.json",
        '{"info": {"post": "p"}, "choice": 0}',
        [":1", '"summaries"', "missing"],
    ),
    "tldr_post": (
        "tldr",
        "tldr_3_filtered_train.jsonl",
        '{"title": "t", "summary": "s"}',
        [":1", '"post"', "missing"],
    ),
    "tldr_subreddit": (
        "tldr",
        "tldr_3_filtered_train.jsonl",
        '{"subreddit": ["a"], "post": "p", "summary": "s"}',
        ['"subreddit"'],
    ),
    "not_utf8": ("shakespeare", "input.txt", b"fine\n\xff\xfe", [":2", "UTF-8"]),
    "empty": ("lottery", "prompt_lottery.jsonl", "\n", ["nothing is left"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_exit_2_with_one_line_and_write_nothing(case, tmp_path, capsys):
    name, file, text, words = BAD_FILES[case]
    folder, out = tmp_path / "raw", tmp_path / "out"
    path = folder / file.replace("hh.", "hh-rlhf.")
    folder.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert prepare(name, "--from", folder, "--out", out, "--tokenizer", "none") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for word in words + ([path.name] if case != "empty" else []):
        assert word in error
    assert not out.exists()


def test_damaged_gzip_names_the_file(tmp_path, capsys):
    path = write_lines(
        tmp_path / "helpful-base" / "test.jsonl.gz",
        *(hh(f"\n\nHuman: q{n}", "a", "b") for n in range(100)),
    )
    whole = path.read_bytes()
    for damaged in (whole[:-40], b"not gzip at all", whole[:60] + b"x" * 60):
        path.write_bytes(damaged)
        assert (
            prepare("hh-rlhf", "--from", tmp_path, "--tokenizer", "none", "--out", tmp_path / "out")
            == 2
        )
        assert "test.jsonl.gz: damaged gzip file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["alpaca", "--from", "{raw}/absent"], ["no such folder"]),
        (["dolly", "--from", "{raw}"], ["no file of dolly", "databricks-dolly-15k.jsonl"]),
        (["alpaca", "--from", "{raw}"], ["vocab.bpe", "--tokenizer none"]),
        (["alpaca", "--from", "{raw}", "--tokenizer", "{raw}"], ["vocab.bpe"]),
        (["nonsense", "--from", "{raw}"], ["nonsense", "known are"]),
        ([], ["--download"]),
        (["alpaca", "--download", "dolly"], ["not both"]),
        (["alpaca", "--from", "{raw}", "--fractions", "0.9", "0.2", "0.1"], ["sum to 1"]),
        (["alpaca", "--from", "{raw}", "--passages", "-1"], ["--passages is -1"]),
        (["alpaca", "--from", "{raw}", "--section_chars", "3"], ["--section_chars is 3"]),
        (["alpaca", "--prompts_from", "x"], ["unknown data set 'x'"]),
    ],
)
def test_bad_arguments_exit_2(argv, words, tmp_path, capsys):
    small_folder(tmp_path / "raw")
    argv = [arg.format(raw=tmp_path / "raw") for arg in argv]
    try:
        code = prepare(*argv, "--out", tmp_path / "out")
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_files_are_found_in_any_layout(tmp_path):
    for file in (
        "a/helpful-base/train.jsonl.gz",
        "b/helpful-base_test.jsonl",
        "c/hh_rlhf.jsonl",
        "c/test.jsonl",
        "d/alpaca_data.json",
        "d/alpaca_eval_gpt4.annotations.json",
        "e/x.jsonl",
        "helpful-online/test.jsonl",
        "helpful-online/test.jsonl.gz",
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).touch()

    def found(name: str, folder: Path = tmp_path) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in find_files(folder, DATA_SETS[name].files)]

    assert found("hh-rlhf") == [
        "a/helpful-base/train.jsonl.gz",
        "b/helpful-base_test.jsonl",
        "c/hh_rlhf.jsonl",
        "helpful-online/test.jsonl",
    ]
    assert found("alpaca") == ["d/alpaca_data.json"]
    assert found("hh-rlhf", tmp_path / "helpful-online") == ["helpful-online/test.jsonl"]
