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

from data.files import END_OF_TEXT, BadInput
from data.real.convert import (
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
from data.real.prepare import DATA_SETS
from data.real.raw import find_files
from tests.raw_sets import hh, node, qa, write_json, write_lines


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
    result = convert_hh_rlhf([path], Options())
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
    files = find_files(real_data, DATA_SETS["hh-rlhf"].files)
    records = [json.loads(line) for file in files for line in gzip.open(file, "rt")]
    assert len(records) == 2_312 + 2_354
    differ = sum(
        r["chosen"][: r["chosen"].rindex("\n\nAssistant:")]
        != r["rejected"][: r["rejected"].rindex("\n\nAssistant:")]
        for r in records
    )
    assert differ == 5 + 9
    result = convert_hh_rlhf(files, Options())
    assert result.dropped == {
        "the dialogues differ before the last reply": 14,
        "chosen and rejected replies are the same": 2,
    }
    assert len(result.comparisons) == 4_650
    assert sum("" in record["responses"] for record in result.comparisons) > 0
    sample = next(r for r in result.comparisons if r["prompt"].startswith("Human:"))
    assert sample["prompt"].endswith("\n\nAssistant:") and "\n\nAssistant: " in sample["prompt"]


# --- OpenAssistant ------------------------------------------------------------------------------


def test_oasst_edge_cases(tmp_path):
    follow_up = node(
        "prompter",
        "And then?",
        [
            node("assistant", "then A", rank=1),
            node("assistant", "then B", rank=0),
            node("assistant", "then C", rank=2),
        ],
    )
    tree = {
        "message_tree_id": "t1",
        "prompt": node(
            "prompter",
            "Tell me a story",
            [
                node("assistant", "no", rank=1),
                node(
                    "assistant",
                    "Once upon a time",
                    [follow_up, node("prompter", "Stop", [])],
                    rank=0,
                ),
            ],
        ),
    }
    partial = {
        "message_tree_id": "t2",
        "prompt": node(
            "prompter", "Q", [node("assistant", "a", rank=0), node("assistant", "b", rank=None)]
        ),
    }
    unranked = {
        "message_tree_id": "t3",
        "prompt": node("prompter", "Q", [node("assistant", "a"), node("assistant", "b")]),
    }
    single = {
        "message_tree_id": "t4",
        "prompt": node("prompter", "Q", [node("assistant", "a", rank=0)]),
    }
    german = {"message_tree_id": "t5", "prompt": {**node("prompter", "Wie?"), "lang": "de"}}
    deleted = {
        "message_tree_id": "t6",
        "prompt": node(
            "prompter",
            "Q",
            [node("assistant", "a", rank=0, deleted=True), node("assistant", "b", rank=1)],
        ),
    }
    many = {
        "message_tree_id": "t7",
        "prompt": node("prompter", "Q", [node("assistant", str(n), rank=n) for n in range(10)]),
    }
    named = {
        "message_tree_id": "t8",
        "prompt": node(
            "prompter",
            "Q?",
            [node("assistant", "a", rank=3), node("assistant", "b", rank=7)],
            user_id="u9",
        ),
    }
    path = write_lines(
        tmp_path / "oasst_ready.trees.jsonl",
        tree,
        partial,
        unranked,
        single,
        german,
        deleted,
        many,
        named,
    )
    result = convert_oasst([path], Options())
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
    path = write_json(
        tmp_path / "train_feedback.json",
        [
            qa("why? ", [1, 1, 1, 0, 1, 1], passages),
            qa("loop?", [1, 2, 0, 1, 0, 0]),
            qa("tied?", [0] * 6),
        ],
    )
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
        if len(set(texts)) < 4:
            continue
        for (a, b), verdict in zip(
            itertools.combinations(texts, 2), item["preference"], strict=True
        ):
            assert (rank[a] > rank[b]) * 2 + (rank[a] < rank[b]) == verdict


def test_the_order_of_responses_tells_nothing_about_their_ranks():
    record = comparison({"prompt": "p"}, ["b", "c", "a"], [1, 2, 3], "someone")
    assert record == {
        "prompt": "p",
        "responses": ["a", "b", "c"],
        "ranks": [3, 1, 2],
        "labeler": "someone",
    }


# --- Stiennon et al. ----------------------------------------------------------------------------


def test_summarize_and_tldr(tmp_path):
    info = {"id": "t3_1", "post": "Long story. ", "title": "Help", "subreddit": "r/advice"}
    summaries = [{"text": " short", "policy": "sup"}, {"text": "shorter", "policy": "ref"}]
    path = write_lines(
        tmp_path / "batch3.json",
        {"info": info, "summaries": summaries, "choice": 1, "worker": "w1"},
        {"info": {"article": "News.", "title": "N"}, "summaries": summaries, "choice": 0},
        {"info": info, "summaries": [summaries[0]] * 2, "choice": 0, "worker": "w1"},
    )
    result = convert_summarize([path], Options())
    assert result.dropped == {"the two summaries are the same": 1}
    first, second = result.comparisons
    assert first["prompt"] == "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: Long story.\n\nTL;DR:"
    assert by_rank(first) == [(1, "shorter"), (2, "short")]
    assert first["labeler"] == "summarize:w1" and first["use_case"] == "summarization"
    assert second["prompt"] == "TITLE: N\n\nPOST: News.\n\nTL;DR:"
    assert by_rank(second) == [(1, "short"), (2, "shorter")]

    path = write_lines(
        tmp_path / "tldr_3_filtered" / "train.jsonl",
        {"subreddit": "advice", "title": "Help", "post": "Long story.", "summary": " short"},
        {"subreddit": "advice", "title": "Help", "post": "Story", "summary": ""},
    )
    result = convert_tldr([path], Options())
    (record,) = result.demonstrations
    assert (record["prompt"], record["response"]) == (first["prompt"], "short")
    assert record["user"] == first["user"], "a post is in one split for both of its uses"
    assert result.dropped == {"empty response": 1}


# --- demonstrations and prompts -----------------------------------------------------------------


def test_alpaca_edge_cases(tmp_path):
    def item(instruction: str, given: str, output: str) -> dict:
        return {"instruction": instruction, "input": given, "output": output}

    path = write_json(
        tmp_path / "alpaca_data.json",
        [
            item("Sort these", "3 1 2", " 1 2 3"),
            item("Greet", "<noinput>", "Hello"),
            item("Wave", "No input needed.", "o/"),
            item("Say no", "", "No"),
            item("Draw", "", "<noinput>\n<output image>"),
            item("Draw", "", "<nooutput>"),
            item("Tell", "", "End.\n11. Instruction: Sing\n11. Input:\n"),
            item("Silence", "", " "),
            item("", "", "what?"),
            item("Bad \ud800 text", "", "a\x00b"),
        ],
    )
    result = convert_alpaca([path], Options())
    pairs = [(r["prompt"], r["response"]) for r in result.demonstrations]
    assert pairs == [
        ("Sort these\n\n3 1 2", "1 2 3"),
        ("Greet", "Hello"),
        ("Wave", "o/"),
        ("Say no", "No"),
        ("Bad  text", "ab"),
    ]
    assert result.dropped == {
        "a placeholder instead of a response": 2,
        "empty response": 1,
        "empty prompt": 1,
        "response runs on into another instruction": 1,
    }
    assert len({r["user"] for r in result.demonstrations}) == 5


def test_dolly_takes_both_schemas(tmp_path):
    original = write_lines(
        tmp_path / "databricks-dolly-15k.jsonl",
        {
            "instruction": "Who?",
            "context": "A text,[1][23][page needed] see x[1]=2 or [4].",
            "response": "He",
            "category": "closed_qa",
        },
        {
            "instruction": "Write",
            "context": "",
            "response": "A poem",
            "category": "creative_writing",
        },
        {"instruction": "Nothing", "context": "", "response": "", "category": "open_qa"},
    )
    result = convert_dolly([original], Options())
    assert [(r["prompt"], r["response"], r["use_case"]) for r in result.demonstrations] == [
        ("Who?\n\nA text, see x[1]=2 or [4].", "He", "closed_qa"),
        ("Write", "A poem", "generation"),
    ]
    assert result.dropped == {"empty response": 1}
    template = (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\n{}\n\n### Response:\n"
    )
    sample = write_lines(
        tmp_path / "dolly_hhrlhf_train_small.jsonl",
        {"prompt": template.format("what is\n\nKubernetes?"), "response": "A"},
    )
    (record,) = convert_dolly([sample], Options()).demonstrations
    assert (record["prompt"], record["use_case"]) == ("what is\n\nKubernetes?", "unknown")


def test_demonstrations_and_prompts_on_real_files(real_data):
    def found(name: str) -> list[Path]:
        return find_files(real_data, DATA_SETS[name].files)

    alpaca = convert_alpaca(found("alpaca"), Options())
    assert alpaca.num_read == 4_000 == len(alpaca.demonstrations) + alpaca.dropped.total()
    assert alpaca.dropped == {
        "a placeholder instead of a response": 7,
        "empty response": 1,
        "response runs on into another instruction": 3,
    }
    assert not any(
        "noinput" in r["prompt"].lower() or "noinput" in r["response"].lower()
        for r in alpaca.demonstrations
    )
    dolly = convert_dolly(found("dolly"), Options())
    assert len(dolly.demonstrations) == 1_000 and not dolly.dropped
    assert len({r["prompt"] for r in dolly.demonstrations}) == 999
    assert not any("###" in r["prompt"] for r in dolly.demonstrations)
    raw = [json.loads(line)["prompt"] for line in found("dolly")[0].read_text().splitlines()]
    assert sum(",[1]" in p or ".[1]" in p for p in raw) > 50, "footnotes of Wikipedia"
    assert not any(",[1]" in r["prompt"] or ".[1]" in r["prompt"] for r in dolly.demonstrations)
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


def test_one_turn_is_its_text_alone():
    assert dialogue_prompt([("Human", " hi ")]) == "hi"


def test_bad_input_is_a_value_error():
    with pytest.raises(BadInput):
        convert_lottery([Path("absent.jsonl")], Options())
