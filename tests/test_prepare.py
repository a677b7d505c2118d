"""Converters of public data sets: exact counts on the real files, edge cases on hand-made ones."""

import gzip
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.convert import (
    Options,
    comparison,
    convert_alpaca,
    convert_dolly,
    convert_hh_rlhf,
    convert_lottery,
    convert_oasst,
    convert_qa_feedback,
    convert_summarize,
    convert_text,
    convert_tldr,
    convert_wikitext,
    cut,
    dialogue_prompt,
    weak_order,
)
from data.files import END_OF_TEXT, BadInput, read_documents, read_jsonl, run_command
from data.hygiene import pii_of
from data.prepare import DATA_SETS, SPLITS, find_files, main
from data.tokenizer import load_tokenizer


def write_lines(path: Path, *values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(value) + "\n" for value in values)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def hh(context: str, chosen: str, rejected: str) -> dict:
    return {"chosen": f"{context}\n\nAssistant:{chosen}",
            "rejected": f"{context}\n\nAssistant:{rejected}"}


def node(role: str, text: str, replies: tuple = (), **keys: object) -> dict:
    return {"role": role, "text": text, "replies": list(replies), "lang": "en", **keys}


def by_rank(record: dict) -> list[tuple[int, str]]:
    return sorted(zip(record["ranks"], record["responses"], strict=True))


def qa(question: str, preference: list[int], passages: list | None = None, **keys: object) -> dict:
    answers = {f"prediction {n}": f"answer {n}" for n in (1, 2, 3, 4)}
    return {"question": question, "passages": passages or [], "preference": preference,
            **answers, **keys}


# --- weak orders --------------------------------------------------------------------------------


def all_weak_orders(k: int) -> dict[tuple[int, ...], list[int]]:
    """Every ranking of k items with ties, by the verdicts it implies."""
    orders = {}
    for ranks in itertools.product(range(1, k + 1), repeat=k):
        if set(ranks) == set(range(1, max(ranks) + 1)):
            verdicts = tuple((a > b) * 2 + (a < b) for a, b in itertools.combinations(ranks, 2))
            orders[verdicts] = list(ranks)
    return orders


@pytest.mark.parametrize("k, number", [(2, 3), (3, 13), (4, 75)])  # ordered Bell numbers
def test_weak_order_equals_search_over_every_ranking(k, number):
    orders = all_weak_orders(k)
    assert len(orders) == number
    for verdicts in itertools.product((0, 1, 2), repeat=k * (k - 1) // 2):
        assert weak_order(verdicts, k) == orders.get(verdicts), verdicts


# --- HH-RLHF ------------------------------------------------------------------------------------


def test_hh_edge_cases(tmp_path):
    context = "\n\nHuman: Hi there"
    longer = context + "\n\nAssistant: Hello!\n\nHuman: Why is the sky blue? "
    path = write_lines(
        tmp_path / "harmless-base" / "train.jsonl.gz",
        hh(context, " Good day.", " Go away. "),
        hh(longer, " Because of scattering.", ""),
        hh(context, " Same.", " Same."),
        hh(context, "", " "),
        {"chosen": f"{context}!\n\nAssistant: a", "rejected": f"{context}\n\nAssistant: b"},
        hh("\n\nAssistant: I speak first", " a", " b"),
        hh(context, " a\n\nHuman: bye", " b"),
        {"chosen": "no turns", "rejected": "at all"},
        hh("\n\nHuman:  ", " a", " b"),
    )
    result = convert_hh_rlhf([path], Options())
    first, second = result.comparisons
    assert first["prompt"] == "Hi there"
    assert by_rank(first) == [(1, "Good day."), (2, "Go away.")]
    assert second["prompt"] == (
        "Human: Hi there\n\nAssistant: Hello!\n\nHuman: Why is the sky blue?\n\nAssistant:")
    assert by_rank(second) == [(1, "Because of scattering."), (2, "")]
    assert first["user"] == second["user"], "one opening: one user, so one split"
    assert result.num_read == 9 and result.dropped == {
        "chosen and rejected replies are the same": 2,
        "the dialogues differ before the last reply": 1,
        "the dialogue does not begin with a human turn": 2,
        "the dialogue does not end with an assistant turn": 1,
        "empty prompt": 1}


def test_hh_counts_on_real_files(real_data):
    files = find_files(real_data, DATA_SETS["hh-rlhf"].files)
    records = [json.loads(line) for file in files for line in gzip.open(file, "rt")]
    assert len(records) == 2_312 + 2_354
    differ = sum(r["chosen"][:r["chosen"].rindex("\n\nAssistant:")]
                 != r["rejected"][:r["rejected"].rindex("\n\nAssistant:")] for r in records)
    assert differ == 5 + 9
    result = convert_hh_rlhf(files, Options())
    assert result.dropped == {"the dialogues differ before the last reply": 14,
                              "chosen and rejected replies are the same": 2}
    assert len(result.comparisons) == 4_650
    assert sum("" in record["responses"] for record in result.comparisons) > 0
    sample = next(r for r in result.comparisons if r["prompt"].startswith("Human:"))
    assert sample["prompt"].endswith("\n\nAssistant:") and "\n\nAssistant: " in sample["prompt"]


# --- OpenAssistant ------------------------------------------------------------------------------


def test_oasst_edge_cases(tmp_path):
    follow_up = node("prompter", "And then?", [
        node("assistant", "then A", rank=1), node("assistant", "then B", rank=0),
        node("assistant", "then C", rank=2)])
    tree = {"message_tree_id": "t1", "prompt": node("prompter", "Tell me a story", [
        node("assistant", "no", rank=1),
        node("assistant", "Once upon a time", [follow_up, node("prompter", "Stop", [])], rank=0)])}
    partial = {"message_tree_id": "t2", "prompt": node("prompter", "Q", [
        node("assistant", "a", rank=0), node("assistant", "b", rank=None)])}
    unranked = {"message_tree_id": "t3", "prompt": node("prompter", "Q", [
        node("assistant", "a"), node("assistant", "b")])}
    single = {"message_tree_id": "t4", "prompt": node("prompter", "Q", [
        node("assistant", "a", rank=0)])}
    german = {"message_tree_id": "t5", "prompt": {**node("prompter", "Wie?"), "lang": "de"}}
    deleted = {"message_tree_id": "t6", "prompt": node("prompter", "Q", [
        node("assistant", "a", rank=0, deleted=True), node("assistant", "b", rank=1)])}
    many = {"message_tree_id": "t7", "prompt": node("prompter", "Q", [
        node("assistant", str(n), rank=n) for n in range(10)])}
    named = {"message_tree_id": "t8", "prompt": node("prompter", "Q?", [
        node("assistant", "a", rank=3), node("assistant", "b", rank=7)], user_id="u9")}
    path = write_lines(tmp_path / "oasst_ready.trees.jsonl",
                       tree, partial, unranked, single, german, deleted, many, named)
    result = convert_oasst([path], Options())
    story, then, question = result.comparisons
    assert story["prompt"] == "Tell me a story" and story["user"] == "oasst:t1" == then["user"]
    assert by_rank(story) == [(1, "Once upon a time"), (2, "no")]
    assert then["prompt"] == ("Human: Tell me a story\n\nAssistant: Once upon a time\n\n"
                              "Human: And then?\n\nAssistant:")
    assert by_rank(then) == [(1, "then B"), (2, "then A"), (3, "then C")]
    assert question["user"] == "oasst:u9" and by_rank(question) == [(1, "a"), (2, "b")]
    assert result.dropped == {
        "some replies have no rank": 1, "no rank": 1, "a single reply": 1,
        "trees that are not in English": 1, "more than 9 replies": 1,
        "a reply was deleted or refused by reviewers": 1}


def test_oasst_counts_on_real_file(real_data):
    result = convert_oasst(find_files(real_data, DATA_SETS["oasst"].files), Options())
    sizes = Counter(len(record["responses"]) for record in result.comparisons)
    assert sizes == {2: 57, 3: 116, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    assert len(result.comparisons) == 211
    assert sum(k * (k - 1) // 2 * n for k, n in sizes.items()) == 751
    for record in result.comparisons:
        assert sorted(record["ranks"]) == list(range(1, len(record["ranks"]) + 1))


# --- QA-Feedback --------------------------------------------------------------------------------


def test_qa_feedback_edge_cases(tmp_path):
    passages = [["Sky", "Sky\n\nThe sky is up.", "It is blue."], ["Sea", "The sea is down."]]
    path = write_json(tmp_path / "train_feedback.json", [
        qa("why? ", [1, 1, 1, 0, 1, 1], passages),
        qa("loop?", [1, 2, 0, 1, 0, 0]),
        qa("tied?", [0] * 6),
    ])
    result = convert_qa_feedback([path], Options())
    (record,) = result.comparisons
    assert record["prompt"] == "Sky: The sky is up. It is blue.\n\nQuestion: why?"
    assert by_rank(record) == [(1, "answer 1"), (2, "answer 2"), (2, "answer 3"), (3, "answer 4")]
    assert result.dropped == {"verdicts that fit no ranking": 1, "all answers tied": 1}

    def prompt(**options: int) -> str:
        return convert_qa_feedback([path], Options(**options)).comparisons[0]["prompt"]

    assert prompt(passages=0) == "why?"
    assert prompt(passages=9).endswith("It is blue.\n\nSea: The sea is down.\n\nQuestion: why?")
    assert prompt(passage_chars=20) == "Sky: The sky is up.\n\nQuestion: why?"
    assert prompt(passage_chars=1) == "Sky: The sky is up.\n\nQuestion: why?", "one sentence stays"


def test_qa_feedback_counts_on_real_file(real_data):
    files = find_files(real_data, DATA_SETS["qa-feedback"].files)
    raw = json.loads(files[0].read_text())
    verdicts = [tuple(item["preference"]) for item in raw]
    assert len(raw) == 400 and sum(map(len, verdicts)) == 2_400
    assert sum(v.count(0) for v in verdicts) == 296
    orders = all_weak_orders(4)
    fitting = [v for v in verdicts if v in orders and any(v)]
    assert sum(0 not in v for v in verdicts) == sum(0 not in v for v in fitting) == 250
    result = convert_qa_feedback(files, Options())
    assert len(result.comparisons) == len(fitting) == 372
    assert result.dropped == {
        "verdicts that fit no ranking": sum(v not in orders for v in verdicts),
        "all answers tied": verdicts.count((0,) * 6)}
    ties = sum(a == b for r in result.comparisons
               for a, b in itertools.combinations(r["ranks"], 2))
    assert ties == sum(v.count(0) for v in fitting)
    # each human verdict that was kept holds between the same two texts
    answers = {item["question"].strip(): item for item in raw}
    for record in result.comparisons:
        item = answers[record["prompt"].removeprefix("Question: ").split("Question: ")[-1]]
        rank = {text: r for r, text in zip(record["ranks"], record["responses"], strict=True)}
        texts = [item[f"prediction {n}"].strip() for n in (1, 2, 3, 4)]
        if len(set(texts)) < 4:
            continue
        for (a, b), verdict in zip(itertools.combinations(texts, 2), item["preference"],
                                   strict=True):
            assert (rank[a] > rank[b]) * 2 + (rank[a] < rank[b]) == verdict


def test_the_order_of_responses_tells_nothing_about_their_ranks():
    record = comparison({"prompt": "p"}, ["b", "c", "a"], [1, 2, 3], "someone")
    assert record == {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2],
                      "labeler": "someone"}


# --- Stiennon et al. ----------------------------------------------------------------------------


def test_summarize_and_tldr(tmp_path):
    info = {"id": "t3_1", "post": "Long story. ", "title": "Help", "subreddit": "r/advice"}
    summaries = [{"text": " short", "policy": "sup"}, {"text": "shorter", "policy": "ref"}]
    path = write_lines(
        tmp_path / "batch3.json",
        {"info": info, "summaries": summaries, "choice": 1, "worker": "w1"},
        {"info": {"article": "News.", "title": "N"}, "summaries": summaries, "choice": 0},
        {"info": info, "summaries": [summaries[0]] * 2, "choice": 0, "worker": "w1"})
    result = convert_summarize([path], Options())
    assert result.dropped == {"the two summaries are the same": 1}
    first, second = result.comparisons
    assert first["prompt"] == "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: Long story.\n\nTL;DR:"
    assert by_rank(first) == [(1, "shorter"), (2, "short")]
    assert first["labeler"] == "summarize:w1" and first["use_case"] == "summarization"
    assert second["prompt"] == "TITLE: N\n\nPOST: News.\n\nTL;DR:"
    assert by_rank(second) == [(1, "short"), (2, "shorter")]

    path = write_lines(tmp_path / "tldr_3_filtered" / "train.jsonl",
                       {"subreddit": "advice", "title": "Help", "post": "Long story.",
                        "summary": " short"},
                       {"subreddit": "advice", "title": "Help", "post": "Story", "summary": ""})
    result = convert_tldr([path], Options())
    (record,) = result.demonstrations
    assert (record["prompt"], record["response"]) == (first["prompt"], "short")
    assert record["user"] == first["user"], "a post is in one split for both of its uses"
    assert result.dropped == {"empty response": 1}


# --- demonstrations and prompts -----------------------------------------------------------------


def test_alpaca_edge_cases(tmp_path):
    def item(instruction: str, given: str, output: str) -> dict:
        return {"instruction": instruction, "input": given, "output": output}

    path = write_json(tmp_path / "alpaca_data.json", [
        item("Sort these", "3 1 2", " 1 2 3"), item("Greet", "<noinput>", "Hello"),
        item("Wave", "No input needed.", "o/"), item("Say no", "", "No"),
        item("Draw", "", "<noinput>\n<output image>"), item("Draw", "", "<nooutput>"),
        item("Tell", "", "End.\n11. Instruction: Sing\n11. Input:\n"),
        item("Silence", "", " "), item("", "", "what?"), item("Bad \ud800 text", "", "a\x00b"),
    ])
    result = convert_alpaca([path], Options())
    pairs = [(r["prompt"], r["response"]) for r in result.demonstrations]
    assert pairs == [("Sort these\n\n3 1 2", "1 2 3"), ("Greet", "Hello"), ("Wave", "o/"),
                     ("Say no", "No"), ("Bad  text", "ab")]
    assert result.dropped == {
        "a placeholder instead of a response": 2, "empty response": 1, "empty prompt": 1,
        "response runs on into another instruction": 1}
    assert len({r["user"] for r in result.demonstrations}) == 5


def test_dolly_takes_both_schemas(tmp_path):
    original = write_lines(
        tmp_path / "databricks-dolly-15k.jsonl",
        {"instruction": "Who?", "context": "A text.", "response": "He", "category": "closed_qa"},
        {"instruction": "Write", "context": "", "response": "A poem",
         "category": "creative_writing"},
        {"instruction": "Nothing", "context": "", "response": "", "category": "open_qa"})
    result = convert_dolly([original], Options())
    assert [(r["prompt"], r["response"], r["use_case"]) for r in result.demonstrations] == [
        ("Who?\n\nA text.", "He", "closed_qa"), ("Write", "A poem", "generation")]
    assert result.dropped == {"empty response": 1}
    template = ("Below is an instruction that describes a task. Write a response that appropriately"
                " completes the request.\n\n### Instruction:\n{}\n\n### Response:\n")
    sample = write_lines(tmp_path / "dolly_hhrlhf_train_small.jsonl",
                         {"prompt": template.format("what is\n\nKubernetes?"), "response": "A"})
    (record,) = convert_dolly([sample], Options()).demonstrations
    assert (record["prompt"], record["use_case"]) == ("what is\n\nKubernetes?", "unknown")


def test_demonstrations_and_prompts_on_real_files(real_data):
    def found(name: str) -> list[Path]:
        return find_files(real_data, DATA_SETS[name].files)

    alpaca = convert_alpaca(found("alpaca"), Options())
    assert alpaca.num_read == 4_000 == len(alpaca.demonstrations) + alpaca.dropped.total()
    assert alpaca.dropped == {"a placeholder instead of a response": 7, "empty response": 1,
                              "response runs on into another instruction": 3}
    assert not any("noinput" in r["prompt"].lower() or "noinput" in r["response"].lower()
                   for r in alpaca.demonstrations)
    dolly = convert_dolly(found("dolly"), Options())
    assert len(dolly.demonstrations) == 1_000 and not dolly.dropped
    assert len({r["prompt"] for r in dolly.demonstrations}) == 999
    assert not any("###" in r["prompt"] for r in dolly.demonstrations)
    assert len(convert_lottery(found("lottery"), Options()).prompts) == 250


# --- documents ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text("ab \n", max_size=300), st.integers(4, 60))
def test_cut_loses_only_white_space_at_the_cuts(text, limit):
    sections = cut(text, limit)
    assert all(0 < len(section) <= limit for section in sections)
    assert re.sub(r"\s", "", "".join(sections)) == re.sub(r"\s", "", text)
    if len(text) <= limit:
        assert sections == ([text] if text.strip() else [])


def test_cut_prefers_paragraphs_then_lines_then_words():
    assert cut("one two\nthree\n\nfour five", 20) == ["one two\nthree", "four five"]
    assert cut("one two three\nfour five", 20) == ["one two three", "four five"]
    assert cut("one two three four five", 20) == ["one two three four", "five"]
    assert cut("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_text_is_freed_of_bom_crlf_and_end_of_text_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(f"\ufeffTitle\r\n\r\n\r\n\r\nText  \r\n{END_OF_TEXT}\r\nmore".encode())
    (document,) = convert_text([path], Options()).documents
    assert document["text"] == "Title\n\nText\nmore"


def test_wikitext_is_one_document_an_article(tmp_path):
    path = tmp_path / "wiki.test.tokens"
    path.write_bytes(b" \r\n = One = \r\n\r\n text \r\n = = Part = = \r\n more\r\n = Two = \r\n x")
    documents = [d["text"] for d in convert_wikitext([path], Options()).documents]
    assert documents == [" = One =\n\n text\n = = Part = =\n more", " = Two =\n x"]


def test_documents_on_real_files(real_data):
    novels = find_files(real_data, DATA_SETS["novels"].files)
    assert len(novels) == 27
    documents = convert_text(novels, Options()).documents
    assert {document["user"] for document in documents} == {f"file:{p.name}" for p in novels}
    assert max(len(document["text"]) for document in documents) <= 20_000
    assert not any("\r" in d["text"] or "\ufeff" in d["text"] for d in documents)
    kept = "".join(d["text"] for d in documents if d["user"] == f"file:{novels[0].name}")
    raw = novels[0].read_text(encoding="utf-8-sig")
    assert "".join(kept.split()) == "".join(raw.split()), "every character but white space"
    articles = convert_wikitext(find_files(real_data, DATA_SETS["wikitext"].files), Options())
    headed = sum(d["text"].startswith(" = ") for d in articles.documents)
    assert headed == 62 + 60  # grep -c '^ = [^=]*[^=] = $'


# --- the command --------------------------------------------------------------------------------


def small_folder(folder: Path) -> Path:
    """A flat folder with a few sets under their usual names."""
    write_json(folder / "alpaca_data.json", [
        {"instruction": f"Count to {n}", "input": "", "output": f"{n}"} for n in range(40)] + [
        {"instruction": f"Whom shall I ask for {n}?", "input": "",
         "output": f"Ask person{n}@example.com"} for n in range(20)])
    write_lines(folder / "hh-rlhf.jsonl", *(
        hh(f"\n\nHuman: Count to {n}", " yes", " no") for n in range(30)))
    (folder / "Doyle_Hound_1902.txt").write_text("A hound. " * 100)
    return folder


def read_split(out: Path, split: str) -> dict[str, list[dict]]:
    return {kind: read_jsonl(out / split / f"{kind}.jsonl", kind)
            for kind in ("demonstrations", "prompts", "comparisons")
            if (out / split / f"{kind}.jsonl").exists()}


def prepare(*argv: object) -> int:
    return run_command(lambda: main([str(arg) for arg in argv]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


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
    assert sum(len(read_documents(out / s / "pretrain.txt")) for s in SPLITS
               if (out / s / "pretrain.txt").exists()) == 2  # nine equal sections and a rest

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
    write_json(folder / "alpaca_data.json", [
        {"instruction": f"{long}{n}", "input": "", "output": "x"} for n in range(3)])
    write_lines(folder / "databricks-dolly-15k.jsonl", *(
        {"instruction": text, "context": "", "response": "y", "category": "open_qa"}
        for text in (f"{long}again", "Something else")))
    write_lines(folder / "hh-rlhf.jsonl", hh("\n\nHuman: a", " best", " worst"),
                hh("\n\nHuman: b", "", " worst"))
    assert prepare("all", "--from", folder, "--out", out, "--tokenizer", "none",
                   "--best_as_demonstrations", "--prompts_from", "dolly",
                   "--fractions", 0.98, 0.01, 0.01) == 0
    part = read_split(out, "train")
    assert [(r["data_set"], r["prompt"], r["response"]) for r in part["demonstrations"]] == [
        ("hh-rlhf", "a", "best"), ("alpaca", f"{long}0", "x"), ("dolly", "Something else", "y")]
    assert [r["prompt"] for r in part["prompts"]] == ["Something else"]
    account = (out / "account.txt").read_text()
    assert "2 demonstrations: an earlier one has the same prompt (first 200 characters" in account


def test_a_busy_user_is_cut_to_200(tmp_path):
    folder, out = tmp_path / "raw", tmp_path / "out"
    write_lines(folder / "oasst.trees.jsonl", *(
        {"message_tree_id": str(n), "prompt": node("prompter", f"Question {n}?", [
            node("assistant", "a", rank=0), node("assistant", "b", rank=1)],
            user_id="busy" if n < 250 else f"calm {n}")} for n in range(300)))
    assert prepare("oasst", "--from", folder, "--out", out, "--tokenizer", "none",
                   "--fractions", 0.6, 0.2, 0.2) == 0
    parts = {split: read_split(out, split)["comparisons"] for split in SPLITS}
    busy = [sum(r["user"] == "oasst:busy" for r in records) for records in parts.values()]
    assert sorted(busy) == [0, 0, 200] and sum(map(len, parts.values())) == 250
    assert "50 comparisons: their user has more than 200" in (out / "account.txt").read_text()


def test_real_sets_from_the_shared_layout(real_data, tmp_path):
    out = tmp_path / "out"
    assert prepare("oasst", "qa-feedback", "lottery", "dolly", "novels", "--from", real_data,
                   "--out", out) == 0
    parts = {split: read_split(out, split) for split in SPLITS}
    total = Counter((r["data_set"], kind) for part in parts.values()
                    for kind, records in part.items() for r in records if kind != "prompts")
    assert total["oasst", "comparisons"] == 211 and total["dolly", "demonstrations"] == 999
    assert total["qa-feedback", "comparisons"] == 370  # 372 less 2 with a street address in train
    for name, kind in total:
        shares = [sum(r["data_set"] == name for r in parts[s][kind]) / total[name, kind]
                  for s in SPLITS]
        assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01), (name, kind)
    users = {s: {r["user"] for records in parts[s].values() for r in records} for s in SPLITS}
    assert not any(users[a] & users[b] for a, b in itertools.combinations(SPLITS, 2))
    assert not any(pii_of(r) for records in parts["train"].values() for r in records)
    books = {s: set(read_documents(out / s / "pretrain.txt")) for s in SPLITS}
    assert sum(map(len, books.values())) == 930 and not books["train"] & books["test"]
    assert load_tokenizer(out / "tokenizer.json").encode_ordinary("Hello world") == [15496, 995]


# --- bad input ----------------------------------------------------------------------------------

GOOD_TREE = {"message_tree_id": "t", "prompt": node("prompter", "Q", [
    node("assistant", "a", rank=0), node("assistant", "b", rank=1)])}
BAD_FILES = {
    "hh_missing_key": ("hh-rlhf", "hh.jsonl", '{"chosen": "x"}', [":1", '"rejected"']),
    "hh_wrong_type": ("hh-rlhf", "hh.jsonl", '{"chosen": "x", "rejected": 3}', ['"rejected"', "3"]),
    "hh_not_an_object": ("hh-rlhf", "hh.jsonl", "[1]", [":1", "object"]),
    "second_line": ("hh-rlhf", "hh.jsonl", json.dumps(hh("\n\nHuman: q", "a", "b")) + "\n{oops",
                    [":2", "not JSON"]),
    "web_page": ("hh-rlhf", "hh.jsonl", "<!DOCTYPE html><html>", ["a web page"]),
    "lfs_pointer": ("hh-rlhf", "hh.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha",
                    ["Git LFS pointer"]),
    "oasst_no_text": ("oasst", "oasst.trees.jsonl",
                      '{"message_tree_id": "t", "prompt": {"role": "prompter"}}', [":1", '"text"']),
    "oasst_role": ("oasst", "oasst.trees.jsonl", json.dumps(GOOD_TREE).replace(
        "assistant", "robot"), [":1", '"role"', "robot"]),
    "oasst_rank": ("oasst", "oasst.trees.jsonl", json.dumps(GOOD_TREE).replace(
        '"rank": 1', '"rank": true'), [":1", '"rank"', "True"]),
    "oasst_no_tree_id": ("oasst", "oasst.trees.jsonl", json.dumps(GOOD_TREE).replace(
        "message_tree_id", "id"), [":1", '"message_tree_id"']),
    "qa_verdicts": ("qa-feedback", "dev_feedback.json", json.dumps([qa("q", [1, 2, 3, 0, 0, 0])]),
                    ["record 1", '"preference"', "3"]),
    "qa_five_verdicts": ("qa-feedback", "dev_feedback.json", json.dumps([qa("q", [1] * 5)]),
                         ["record 1", '"preference"']),
    "qa_passages": ("qa-feedback", "dev_feedback.json", json.dumps([qa("q", [1] * 6, ["text"])]),
                    ["record 1", '"passages"']),
    "qa_no_array": ("qa-feedback", "dev_feedback.json", "{}", ["expected a JSON array"]),
    "alpaca_key": ("alpaca", "alpaca_data.json", '[{"instruction": "x", "input": ""}]',
                   ["record 1", '"output"']),
    "dolly_category": ("dolly", "databricks-dolly-15k.jsonl", json.dumps(
        {"instruction": "i", "context": "", "response": "r", "category": "gossip"}),
        [":1", '"category"', "gossip"]),
    "dolly_template": ("dolly", "dolly_hhrlhf.jsonl", '{"prompt": "Hi", "response": "x"}',
                       [":1", '"prompt"', "### Instruction:"]),
    "lottery_object": ("lottery", "prompt_lottery.jsonl", '"good"\n{"text": "bad"}',
                       [":2", "string"]),
    "summarize_choice": ("summarize", "batch3.json", json.dumps(
        {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}),
        [":1", '"choice"']),
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
    path = write_lines(tmp_path / "helpful-base" / "test.jsonl.gz", *(
        hh(f"\n\nHuman: q{n}", "a", "b") for n in range(100)))
    whole = path.read_bytes()
    for damaged in (whole[:-40], b"not gzip at all", whole[:60] + b"x" * 60):
        path.write_bytes(damaged)
        assert prepare("hh-rlhf", "--from", tmp_path, "--tokenizer", "none",
                       "--out", tmp_path / "out") == 2
        assert "test.jsonl.gz: damaged gzip file" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
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
])
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
    for file in ("a/helpful-base/train.jsonl.gz", "b/helpful-base_test.jsonl", "c/hh_rlhf.jsonl",
                 "c/test.jsonl", "d/alpaca_data.json", "d/alpaca_eval_gpt4.annotations.json",
                 "e/x.jsonl", "helpful-online/test.jsonl", "helpful-online/test.jsonl.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).touch()

    def found(name: str, folder: Path = tmp_path) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in find_files(folder, DATA_SETS[name].files)]

    assert found("hh-rlhf") == ["a/helpful-base/train.jsonl.gz", "b/helpful-base_test.jsonl",
                                "c/hh_rlhf.jsonl", "helpful-online/test.jsonl"]
    assert found("alpaca") == ["d/alpaca_data.json"]
    assert found("hh-rlhf", tmp_path / "helpful-online") == ["helpful-online/test.jsonl"]


def test_one_turn_is_its_text_alone():
    assert dialogue_prompt([("Human", " hi ")]) == "hi"


def test_bad_input_is_a_value_error():
    with pytest.raises(BadInput):
        convert_lottery([Path("absent.jsonl")], Options())
