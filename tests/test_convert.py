"""Converters of public data sets: exact counts on the real files, edge cases on hand-made ones."""

import gzip
import itertools
import json
import re
from collections import Counter
from pathlib import Path

from data.files import END_OF_TEXT, BadInput
from data.real import convert
from data.real.convert import Converted, comparison, cut, dialogue_prompt, weak_order
from data.real.prepare import DATA_SETS
from data.real.raw import find_files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.raw_sets import (
    alpaca,
    dolly,
    hh,
    node,
    pair,
    qa,
    ranked,
    tldr,
    tree,
    write_json,
    write_lines,
    write_text,
)


def converted(name: str, *paths: Path, **options: int) -> Converted:
    return DATA_SETS[name][0](paths, convert.Options(**options))


def found(name: str, folder: Path) -> list[Path]:
    return find_files(folder, DATA_SETS[name][1])


def by_rank(record: dict) -> list[tuple[int, str]]:
    return sorted(zip(record["ranks"], record["responses"], strict=True))


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
    result = converted("hh-rlhf", path)
    first, second = result.comparisons
    assert first["prompt"] == "Hi there"
    assert by_rank(first) == [(1, "Good day."), (2, "Go away.")]
    assert second["prompt"] == (
        "Human: Hi there\n\nAssistant: Hello!\n\nHuman: Why is the sky blue?\n\nAssistant:"
    )
    assert by_rank(second) == [(1, "Because of scattering."), (2, "")]
    assert first["user"] == second["user"], "one opening: one user, so one split"
    assert result.num_read == 9 and result.dropped == {
        "chosen and rejected replies are the same": 2,
        "the dialogues differ before the last reply": 1,
        "the dialogue does not begin with a human turn": 2,
        "the dialogue does not end with an assistant turn": 1,
        "empty prompt": 1,
    }


def test_hh_counts_on_real_files(real_data):
    files = found("hh-rlhf", real_data)
    records = [json.loads(line) for file in files for line in gzip.open(file, "rt")]
    assert len(records) == 2_312 + 2_354
    sides = [
        [r[k].rpartition("\n\nAssistant:")[0] for k in ("chosen", "rejected")] for r in records
    ]
    assert sum(chosen != rejected for chosen, rejected in sides) == 5 + 9
    result = converted("hh-rlhf", *files)
    assert result.dropped == {
        "the dialogues differ before the last reply": 14,
        "chosen and rejected replies are the same": 2,
    }
    assert len(result.comparisons) == 4_650
    assert any("" in record["responses"] for record in result.comparisons)
    sample = next(r for r in result.comparisons if r["prompt"].startswith("Human:"))
    assert sample["prompt"].endswith("\n\nAssistant:") and "\n\nAssistant: " in sample["prompt"]


# --- OpenAssistant ------------------------------------------------------------------------------


def test_oasst_edge_cases(tmp_path):
    story = ranked("Tell me a story", {"no": 1, "Once upon a time": 0})
    follow_up = ranked("And then?", {"then A": 1, "then B": 0, "then C": 2})
    story["replies"][1]["replies"] = [follow_up, node("prompter", "Stop")]
    deleted = ranked("Q", {"a": 0, "b": 1})
    deleted["replies"][0]["deleted"] = True
    prompts = [
        story,
        ranked("Q", {"a": 0, "b": None}),
        ranked("Q", {"a": None, "b": None}),
        ranked("Q", {"a": 0}),
        {**node("prompter", "Wie?"), "lang": "de"},
        deleted,
        ranked("Q", {str(n): n for n in range(10)}),
        ranked("Q?", {"a": 3, "b": 7}, user_id="u9"),
    ]
    trees = [tree(f"t{n}", prompt) for n, prompt in enumerate(prompts, start=1)]
    result = converted("oasst", write_lines(tmp_path / "oasst_ready.trees.jsonl", *trees))
    story, then, question = result.comparisons
    assert story["prompt"] == "Tell me a story" and story["user"] == "oasst:t1" == then["user"]
    assert by_rank(story) == [(1, "Once upon a time"), (2, "no")]
    assert then["prompt"] == (
        "Human: Tell me a story\n\nAssistant: Once upon a time\n\nHuman: And then?\n\nAssistant:"
    )
    assert by_rank(then) == [(1, "then B"), (2, "then A"), (3, "then C")]
    assert question["user"] == "oasst:u9" and by_rank(question) == [(1, "a"), (2, "b")]
    assert result.dropped == {
        "some replies have no rank": 1,
        "no rank": 1,
        "a single reply": 1,
        "trees that are not in English": 1,
        "more than 9 replies": 1,
        "a reply was deleted or refused by reviewers": 1,
    }


def test_oasst_counts_on_real_file(real_data):
    result = converted("oasst", *found("oasst", real_data))
    sizes = Counter(len(record["responses"]) for record in result.comparisons)
    assert sizes == {2: 57, 3: 116, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    assert len(result.comparisons) == 211
    assert sum(k * (k - 1) // 2 * n for k, n in sizes.items()) == 751
    for record in result.comparisons:
        assert sorted(record["ranks"]) == list(range(1, len(record["ranks"]) + 1))


# --- QA-Feedback --------------------------------------------------------------------------------


def test_qa_feedback_edge_cases(tmp_path):
    passages = [["Sky", "Sky\n\nThe sky is up.", "It is blue."], ["Sea", "The sea is down."]]
    verdicts = {"why? ": [1, 1, 1, 0, 1, 1], "loop?": [1, 2, 0, 1, 0, 0], "tied?": [0] * 6}
    records = [qa(text, found, passages) for text, found in verdicts.items()]
    path = write_json(tmp_path / "train_feedback.json", records)
    result = converted("qa-feedback", path)
    (record,) = result.comparisons
    assert record["prompt"] == "Sky: The sky is up. It is blue.\n\nQuestion: why?"
    assert by_rank(record) == [(1, "answer 1"), (2, "answer 2"), (2, "answer 3"), (3, "answer 4")]
    assert result.dropped == {"verdicts that fit no ranking": 1, "all answers tied": 1}

    def prompt(**options: int) -> str:
        return converted("qa-feedback", path, **options).comparisons[0]["prompt"]

    assert prompt(passages=0) == "why?"
    assert prompt(passages=9).endswith("It is blue.\n\nSea: The sea is down.\n\nQuestion: why?")
    assert prompt(passage_chars=20) == "Sky: The sky is up.\n\nQuestion: why?"
    assert prompt(passage_chars=1) == "Sky: The sky is up.\n\nQuestion: why?", "one sentence stays"


def test_qa_feedback_counts_on_real_file(real_data):
    files = found("qa-feedback", real_data)
    raw = json.loads(files[0].read_text())
    verdicts = [tuple(item["preference"]) for item in raw]
    assert len(raw) == 400 and sum(map(len, verdicts)) == 2_400
    assert sum(v.count(0) for v in verdicts) == 296
    orders = all_weak_orders(4)
    fitting = [v for v in verdicts if v in orders and any(v)]
    assert sum(0 not in v for v in verdicts) == sum(0 not in v for v in fitting) == 250
    result = converted("qa-feedback", *files)
    assert len(result.comparisons) == len(fitting) == 372
    assert result.dropped == {
        "verdicts that fit no ranking": sum(v not in orders for v in verdicts),
        "all answers tied": verdicts.count((0,) * 6),
    }
    ties = sum(a == b for r in result.comparisons for a, b in itertools.combinations(r["ranks"], 2))
    assert ties == sum(v.count(0) for v in fitting)
    # each human verdict that was kept holds between the same two texts
    answers = {item["question"].strip(): item for item in raw}
    for record in result.comparisons:
        item = answers[record["prompt"].removeprefix("Question: ").split("Question: ")[-1]]
        rank = {text: r for r, text in zip(record["ranks"], record["responses"], strict=True)}
        texts = [item[f"prediction {n}"].strip() for n in (1, 2, 3, 4)]
        pairs = itertools.combinations(texts, 2)
        for (a, b), verdict in zip(pairs, item["preference"], strict=True):
            assert len(rank) < 4 or (rank[a] > rank[b]) * 2 + (rank[a] < rank[b]) == verdict


def test_the_order_of_responses_tells_nothing_about_their_ranks():
    record = comparison({"prompt": "p"}, ["b", "c", "a"], [1, 2, 3], "someone")
    expected = {"responses": ["a", "b", "c"], "ranks": [3, 1, 2], "labeler": "someone"}
    assert record == {"prompt": "p"} | expected


# --- Stiennon et al. ----------------------------------------------------------------------------


def test_summarize_and_tldr(tmp_path):
    news = {"info": {"article": "News.", "title": "N"}}
    path = write_lines(
        tmp_path / "batch3.json",
        pair("Long story. ", " short", "shorter", 1, worker="w1"),
        pair("", " short", "shorter") | news,
        pair("Long story. ", " short", " short"),
        pair(" ", "a", "b"),
    )
    result = converted("summarize", path)
    assert result.dropped == {"the two summaries are the same": 1, "empty post": 1}
    first, second = result.comparisons
    assert first["prompt"] == "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: Long story.\n\nTL;DR:"
    assert by_rank(first) == [(1, "shorter"), (2, "short")]
    assert first["labeler"] == "summarize:w1" and first["use_case"] == "summarization"
    assert second["prompt"] == "TITLE: N\n\nPOST: News.\n\nTL;DR:"
    assert by_rank(second) == [(1, "short"), (2, "shorter")]

    posts = [tldr("Help", "Long story.", " short"), tldr("Help", "Story", ""), tldr("", " ", "s")]
    result = converted("tldr", write_lines(tmp_path / "tldr_3_filtered" / "train.jsonl", *posts))
    (record,) = result.demonstrations
    assert (record["prompt"], record["response"]) == (first["prompt"], "short")
    assert record["user"] == first["user"], "a post is in one split for both of its uses"
    assert result.dropped == {"empty response": 1, "empty prompt": 1}


# --- demonstrations and prompts -----------------------------------------------------------------


def test_alpaca_edge_cases(tmp_path):
    items = [
        alpaca("Sort these", "3 1 2", " 1 2 3"),
        alpaca("Greet", "<noinput>", "Hello"),
        alpaca("Wave", "No input needed.", "o/"),
        alpaca("Say no", "", "No"),
        alpaca("Draw", "", "<noinput>\n<output image>"),
        alpaca("Draw", "", "<nooutput>"),
        alpaca("Tell", "", "End.\n11. Instruction: Sing\n11. Input:\n"),
        alpaca("Silence", "", " "),
        alpaca("", "", "what?"),
        alpaca("Bad \ud800 text", "", "a\x00b"),
    ]
    result = converted("alpaca", write_json(tmp_path / "alpaca_data.json", items))
    pairs = {r["prompt"]: r["response"] for r in result.demonstrations}
    plain = {"Greet": "Hello", "Wave": "o/", "Say no": "No", "Bad  text": "ab"}
    assert pairs == {"Sort these\n\n3 1 2": "1 2 3"} | plain
    assert result.dropped == {
        "a placeholder instead of a response": 2,
        "empty response": 1,
        "empty prompt": 1,
        "response runs on into another instruction": 1,
    }
    assert len({r["user"] for r in result.demonstrations}) == 5


def test_dolly_takes_both_schemas(tmp_path):
    noted = "A text,[1][23][page needed] see x[1]=2 or [4]."
    original = write_lines(
        tmp_path / "databricks-dolly-15k.jsonl",
        dolly("Who?", noted, "He", "closed_qa"),
        dolly("Write", "", "A poem", "creative_writing"),
        dolly("Nothing", "", "", "open_qa"),
    )
    result = converted("dolly", original)
    assert [(r["prompt"], r["response"], r["use_case"]) for r in result.demonstrations] == [
        ("Who?\n\nA text, see x[1]=2 or [4].", "He", "closed_qa"),
        ("Write", "A poem", "generation"),
    ]
    assert result.dropped == {"empty response": 1}
    template = (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\n{}\n\n### Response:\n"
    )
    sample = {"prompt": template.format("what is\n\nKubernetes?"), "response": "A"}
    path = write_lines(tmp_path / "dolly_hhrlhf_train_small.jsonl", sample)
    (record,) = converted("dolly", path).demonstrations
    assert (record["prompt"], record["use_case"]) == ("what is\n\nKubernetes?", "unknown")


def test_demonstrations_and_prompts_on_real_files(real_data):
    result = converted("alpaca", *found("alpaca", real_data))
    assert result.num_read == 4_000 == len(result.demonstrations) + result.dropped.total()
    assert result.dropped == {
        "a placeholder instead of a response": 7,
        "empty response": 1,
        "response runs on into another instruction": 3,
    }
    texts = [f"{r['prompt']} {r['response']}".lower() for r in result.demonstrations]
    assert not any("noinput" in text for text in texts)
    files = found("dolly", real_data)
    result = converted("dolly", *files)
    prompts = [r["prompt"] for r in result.demonstrations]
    assert len(prompts) == 1_000 == len(set(prompts)) + 1 and not result.dropped
    assert not any("###" in prompt for prompt in prompts)
    raw = [json.loads(line)["prompt"] for line in files[0].read_text().splitlines()]
    assert sum(",[1]" in p or ".[1]" in p for p in raw) > 50, "footnotes of Wikipedia"
    assert not any(",[1]" in p or ".[1]" in p for p in prompts)
    assert len(converted("lottery", *found("lottery", real_data)).prompts) == 250


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
    text = f"\ufeffTitle\r\n\r\n\r\n\r\nText  \r\n{END_OF_TEXT}\r\nmore"
    (document,) = converted("text", write_text(tmp_path / "book.txt", text)).documents
    assert document["text"] == "Title\n\nText\nmore"


def test_wikitext_is_one_document_an_article(tmp_path):
    text = " \r\n = One = \r\n\r\n text \r\n = = Part = = \r\n more\r\n = Two = \r\n x"
    result = converted("wikitext", write_text(tmp_path / "wiki.test.tokens", text))
    articles = [document["text"] for document in result.documents]
    assert articles == [" = One =\n\n text\n = = Part = =\n more", " = Two =\n x"]


def test_documents_on_real_files(real_data):
    novels = found("novels", real_data)
    documents = converted("novels", *novels).documents
    names = {f"file:{path.name}" for path in novels}
    assert {document["user"] for document in documents} == names and len(names) == 27
    assert max(len(document["text"]) for document in documents) <= 20_000
    assert not any("\r" in d["text"] or "\ufeff" in d["text"] for d in documents)
    kept = "".join(d["text"] for d in documents if d["user"] == f"file:{novels[0].name}")
    raw = novels[0].read_text(encoding="utf-8-sig")
    assert "".join(kept.split()) == "".join(raw.split()), "every character but white space"
    articles = converted("wikitext", *found("wikitext", real_data)).documents
    headed = sum(d["text"].startswith(" = ") for d in articles)
    assert headed == 62 + 60  # grep -c '^ = [^=]*[^=] = $'


def test_one_turn_is_its_text_alone():
    assert dialogue_prompt([("Human", " hi ")]) == "hi"


def test_bad_input_is_a_value_error():
    with pytest.raises(BadInput):
        converted("lottery", Path("absent.jsonl"))
