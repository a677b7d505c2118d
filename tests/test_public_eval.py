"""public_items.py, public_sets.py, evaluation/public.py: readers of every format, prompts that
fit, measurements against brute force, and the command on random models."""

import csv
import json
import os
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from data.commands import run_command
from data.files import BadInput
from data.real import public_sets
from data.real.public_items import Choice, Completion, Item, Opening, Pair, Truth
from data.real.public_sets import LABELS, PUBLIC_SETS, Condition, choose, load
from data.real.raw import read_rows
from data.real.sources import SOURCES
from data.real.text_metrics import bleu_counts, corpus_bleu
from data.real.toxicity import train_scorer

import numpy as np
import pytest
import torch

import evaluate
from checkpoint import save_model
from evaluation import public as public_eval
from evaluation.public import Asked, estimate_sums, fit_prompts, measure, total_logprobs
from evaluation.report import estimate
from model import GPT, GPTConfig
from sample import Speaker, load_speaker
from tests.raw_sets import tldr, write_json, write_lines, write_text
from tests.test_text_metrics import write_labels
from tests.tiny import Tiny

ARGS = Namespace(batch_size=4, dtype="float32")


def squad(i: int) -> dict:
    answers = [{"text": text, "answer_start": 0} for text in ("red", "is red")]
    first = {"question": f"What is fox {i}?", "id": f"{i}a", "answers": answers}
    second = {"question": "Who is blue?", "id": f"{i}b", "answers": []}
    return {"context": f"Fox {i} is red.", "qas": [first, second]}


def drop(i: int) -> dict:
    none, date = {"number": "", "spans": []}, {"day": "", "month": "May", "year": "1941"}
    spans = [{"number": "", "date": {}, "spans": ["a", "b"]}]
    first = {"question": "How many?", "answer": none | {"number": str(i), "date": {}}}
    second = {"question": "When?", "answer": none | {"date": date}}
    pairs = [first | {"validated_answers": spans}, second]
    return {"passage": f"They won {i} games.", "qa_pairs": pairs}


def quac(i: int) -> dict:
    asked = {
        "What do they do?": ["run", "Foxes run"],
        "Agreed?": ["run", "sleep"],
        "Why?": ["CANNOTANSWER", "run"],
    }
    qas = [
        {"question": q, "orig_answer": {"text": a[0]}, "answers": [{"text": text} for text in a]}
        for q, a in asked.items()
    ]
    paragraph = {"id": f"C{i}", "context": "Foxes run. CANNOTANSWER", "qas": qas}
    return {"title": "Fox", "section_title": "Life", "background": "", "paragraphs": [paragraph]}


def hellaswag(i: int) -> dict:
    first = {"activity_label": "Tea", "ctx_a": f"[header] How to {i} [title] Boil it."}
    endings = ["drink [substeps] it.", "throw it away.", "x.", "y."]
    return first | {"ctx_b": "then you", "endings": endings, "label": i % 2}


def wsc(i: int) -> dict:
    target = {"span1_text": f"Fox {i}", "span2_text": "it", "span2_index": 6}
    return {"text": f"Fox {i} met a dog and it ran .", "label": i % 2 == 0, "target": target}


def winogender(i: int) -> str:
    people, words = ("guest", "someone"), {"male": "he", "female": "she", "neutral": "they"}
    forms = [(who, *form) for who in people for form in words.items()]
    return "".join(
        f"cook.{who}.{i}.{gender}.txt\tThe cook met {who} {i} and {word} ran.\n"
        for who, gender, word in forms
    )


TABLES = {  # file: heading, and a row
    "sst2/dev.tsv": ("sentence\tlabel", 'it \'s "film" {i} . \t{half}'),
    "rte/dev.tsv": (
        "index\tsentence1\tsentence2\tlabel",
        "{i}\tFox {i} runs.\tA fox runs.\t{no}entailment",
    ),
    "cnn_dailymail/test.csv": ("id,article,highlights", '{i},"A fox, {i}, ran.","Fox ran.\nFast."'),
    "truthfulqa/TruthfulQA.csv": (
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source",
        "A,M,Is {i} red?,It is red,It is red; Red.,It is blue; Blue,-",
    ),
    "crows/crows_pairs_anonymized.csv": (
        ",sent_more,sent_less,stereo_antistereo,bias_type",
        '{i},"Foxes, {i}, are sly.","Dogs, {i}, are sly.",stereo,x',
    ),
    "wmt15-fr-en/src.fr": ("<refset><doc>", '<seg id="{i}">Le renard &amp; {i}</seg>'),
    "wmt15-fr-en/ref.en": ("<refset><doc>", '<seg id="{i}">The fox &amp; {i}</seg>'),
}


def write_sets(folder: Path) -> Path:
    """A few items of every set, each in its authors' format and under its authors' name."""
    n = range(8)
    for file, (heading, row) in TABLES.items():
        rows = [row.format(i=i, half=i % 2, no="not_" * (i % 2)) for i in n]
        write_text(folder / file, "\n".join([heading, *rows]) + "\n")
    lambada = "The dog saw the fox {} times, but nobody else saw the fox"
    toxic = [{"text": f"Fox {i} is", "toxicity": i / 10 if i else None} for i in n]
    for file, records in {
        "hellaswag/hellaswag_val.jsonl": map(hellaswag, n),
        "wsc/val.jsonl": map(wsc, n),
        "lambada/lambada_test.jsonl": ({"text": lambada.format(i)} for i in n),
        "tldr/tldr_3_filtered/test.jsonl": (
            tldr("Fox", f"I saw {i} foxes.", " Saw\nfoxes. ") for i in n
        ),
        "realtoxicityprompts/prompts.jsonl": ({"prompt": prompt} for prompt in toxic),
    }.items():
        write_lines(folder / file, *records)
    articles = [{"title": "Fox", "paragraphs": [*map(squad, n)]}]
    write_json(folder / "squad2/dev-v2.0.json", {"version": "v2.0", "data": articles})
    write_json(folder / "drop/drop_dataset_dev.json", {f"p{i}": drop(i) for i in n})
    write_json(folder / "quac/val_v0.2.json", {"data": [*map(quac, n)]})
    schemas = "sentid\tsentence\n" + "".join(map(winogender, n))
    write_text(folder / "winogender/all_sentences.tsv", schemas)
    write_labels(folder / "labeled_data.csv")
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def models(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random models of different weights and contexts, long enough for any prompt here."""
    folder, text = tmp_path_factory.mktemp("models"), tiny.tokenizer.read_text(encoding="utf-8")
    for name, context in (("base", 700), ("sft", 640)):
        torch.manual_seed(context)
        size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": context}
        vocabulary, end = tiny.encoding.n_vocab, tiny.encoding.eot_token
        config = GPTConfig(vocab_size=vocabulary, eos_token_id=end, **size)
        save_model(folder / name, GPT(config), text, {"stage": name, "data": []})
    return {name: folder / name for name in ("base", "sft")}


@pytest.fixture
def speaker(models: dict[str, Path]) -> Speaker:
    return load_speaker("base", models["base"])


# ------------------------------------------------------------------------------------------ readers


def first(name: str, raw: Path) -> Item:
    items, paths = load(name, raw)
    assert paths and len(items) >= 8
    return items[0]


def test_readers_of_choices(raw: Path) -> None:
    item = first("hellaswag", raw)
    assert item.query == "Tea: How to 0. Boil it. Then you"
    assert item.options[:2] == ("drink it.", "throw it away.") and item.label == 0
    item = load("sst2", raw)[0][1]
    assert (item.query, item.answer) == ('Text: it \'s "film" 1 .\nLabel:', "positive")
    assert [item.answer for item in load("rte", raw)[0][:2]] == ["Yes", "No"]


def test_readers_of_completions(raw: Path, tmp_path: Path) -> None:
    item = first("wsc", raw)
    assert "dog and *it* ran ." in item.query and item.references == (("Fox 0", True),)
    assert load("wsc", raw)[0][1].answer == ""  # not the referent: no example
    item = first("lambada", raw)
    assert item.query.endswith("saw the") and item.answer == "fox"
    one, two = load("squad2", raw)[0][:2]
    assert one.references == ("red", "is red") and two.references == ("",)
    assert one.query == "Title: Fox\n\nBackground: Fox 0 is red.\n\nQ: What is fox 0?\n\nA:"
    assert two.query == f"{one.query} red\n\nQ: Who is blue?\n\nA:"
    assert two.answer == "Not in background." and one.group == two.group
    one, two = load("drop", raw)[0][:2]
    assert one.references == (("0",), ("a", "b")) and two.references == (("May 1941",),)
    assert one.query == "Passage: They won 0 games.\nQuestion: How many?\nAnswer:"
    one, two = load("quac", raw)[0][:2]  # the question without agreement is not asked
    assert one.references == ("run", "Foxes run") and two.references == ("CANNOTANSWER",)
    assert "PARAGRAPH: Foxes run.\n\n" in two.query and "Agreed?\n\nA: run" in two.query
    assert two.answer == "I don't know."
    english, query = "The fox & 0", "French: Le renard & 0\nEnglish:"
    group = f"{raw}/wmt15-fr-en/ref.en: line 1"
    assert first("fr_en", raw) == Completion(query, group, (english,), english)
    assert first("tldr", raw).references == ("Saw foxes.",)
    assert first("tldr", raw).query == "Fox\n\nI saw 0 foxes.\n\nTL;DR:"
    assert first("cnn_dm", raw).query == "A fox, 0, ran.\n\nTL;DR:"
    assert first("cnn_dm", raw).answer == "Fox ran. Fast."
    for side, text in (("source", "A fox.\nA dog .\n"), ("target", "Fox.\nDog.\n")):
        write_text(tmp_path / "cnn-dailymail" / f"test.{side}", text)
    item = load("cnn_dm", tmp_path)[0][1]
    assert (item.query, item.references) == ("A dog .\n\nTL;DR:", ("Dog.",))
    write_text(tmp_path / "cnn-dailymail/test.target", "Fox.\n")
    with pytest.raises(BadInput, match="1 lines, expected 2"):
        load("cnn_dm", tmp_path)


def test_readers_of_the_rest(raw: Path, tmp_path: Path) -> None:
    item = first("truthfulqa", raw)
    assert item.options == ("It is red.", "It is blue.", "Blue.", "Red.")
    assert (item.best, item.wrong, item.true, item.false) == (0, (1, 2), (0, 3), (1, 2))
    second = {"Yes.": 1, "Surely.": 1, "No.": 0, "Never.": 0}
    task = {"question": "Is it?", "mc1_targets": {"No.": 0, "Yes.": 1}, "mc2_targets": second}
    write_json(tmp_path / "mc_task.json", [task])
    item = load("truthfulqa", tmp_path)[0][0]
    assert item.options == ("Yes.", "No.", "Surely.", "Never.") and item.query == "Q: Is it?\nA:"
    assert (item.best, item.wrong, item.true, item.false) == (0, (1,), (0, 2), (1, 3))
    item = first("winogender", raw)
    assert item.options == ("The cook met guest 0 and he ran.", "The cook met guest 0 and she ran.")
    assert len(load("winogender", raw)[0]) == 8
    assert first("crows_pairs", raw).options[1] == "Dogs, 0, are sly."
    assert first("realtoxicityprompts", raw).toxicity is None


RTP, LABELS_FILE = "realtoxicityprompts", "labeled_data.csv"
RUN = "a" + " " * 200_000 + "b"  # white space that no tokenizer takes


def tasks(first: dict) -> str:
    task = {"question": "Q?", "mc1_targets": first, "mc2_targets": {"a": 1, "b": 0}}
    return json.dumps([task])


def answers(best: str) -> str:
    return f"Question,Best Answer,Correct Answers,Incorrect Answers\nQ?,{best},Yes,No\n"


def choices(*options: str | None) -> str:
    return json.dumps({"query": "q", "choices": options, "gold": 0})


def winogender_of(sentence: str) -> str:
    rows = (f"cook.guest.1.{gender}.txt\t{sentence}\n" for gender in ("male", "female"))
    return "sentid\tsentence\n" + "".join(rows)


def opening(toxicity: object) -> str:
    return json.dumps({"prompt": {"text": "a", "toxicity": toxicity}})


@pytest.mark.parametrize(
    ("name", "path", "text", "message"),
    [
        ("hellaswag", "hellaswag_val.jsonl", '{"query": "a", "choices": ["b"], "gold": 3}', "3"),
        ("rte", "rte/dev.tsv", "sentence1\tsentence2\tlabel\na\tb\tmaybe\n", "label"),
        ("wsc", "wsc/val.jsonl", '{"text": "a", "target": {}, "label": true}', "span1_text"),
        ("squad2", "dev-v2.0.json", '{"data": [{"paragraphs": []}]}', "title"),
        ("lambada", "lambada_test.jsonl", '{"text": "word"}', "several words"),
        (
            "truthfulqa",
            "mc_task.json",
            '[{"mc1_targets": {"a": 0}, "mc2_targets": {}}]',
            "one true",
        ),
        ("squad2", "dev-v2.0.json", '{"data": []}', "no items"),
        ("squad2", "dev-v2.0.json", "5", "expected an object, found 5"),
        ("squad2", "dev-v2.0.json", '{"data": [{"title": "t", "paragraphs": 5}]}', r"data\[0\]"),
        (
            "quac",
            "val_v0.2.json",
            '{"data": [{"title": "t", "paragraphs": [5]}]}',
            r"paragraphs\[0",
        ),
        ("drop", "drop_dataset_dev.json", "[]", "expected an object"),
        (
            "drop",
            "drop_dataset_dev.json",
            '{"a": {"passage": "x", "qa_pairs": [5]}}',
            r"qa_pairs\[0",
        ),
        ("truthfulqa", "mc_task.json", "5", "JSON array"),
        ("truthfulqa", "mc_task.json", "[[1]]", "record 1: expected an object"),
        (
            "truthfulqa",
            "mc_task.json",
            tasks({"a": "1", "b": 0}),
            'mc1_targets.a": expected 0 or 1',
        ),
        ("truthfulqa", "mc_task.json", tasks({"": 1, "b": 0}), "record 1: a blank option"),
        ("truthfulqa", "mc_task.json", tasks({"b": 1, "c": 0}), "record 1: .*best one that is"),
        ("truthfulqa", "TruthfulQA.csv", answers("No"), "row 1: .*best one that is true"),
        ("truthfulqa", "TruthfulQA.csv", answers(" "), "row 1: .*best one that is true"),
        ("truthfulqa", "TruthfulQA.csv", answers("Yes").replace("\n", "\r"), "row 1: new-line"),
        ("hellaswag", "hellaswag_val.jsonl", "5", ":1: expected an object"),
        (
            "hellaswag",
            "hellaswag_val.jsonl",
            choices("a", None),
            r'choices\[1\]": expected a string',
        ),
        ("hellaswag", "hellaswag_val.jsonl", choices("a", " "), ":1: a blank option"),
        ("hellaswag", "hellaswag_val.jsonl", choices("a", RUN), "200000 characters of white space"),
        ("tldr", "tldr_3_filtered/test.jsonl", "5", ":1: expected an object"),
        ("tldr", "tldr_3_filtered/test.jsonl", '{"post": "x", "summary": " "}', ":1: a blank"),
        ("wsc", "wsc/val.jsonl", json.dumps(wsc(0)).replace("Fox 0", " "), ":1: a blank"),
        (
            "crows_pairs",
            "crows_pairs_anonymized.csv",
            "sent_more,sent_less\n,a\n",
            "row 1: a blank",
        ),
        ("winogender", "all_sentences.tsv", winogender_of(" "), "cook: a blank option"),
        ("realtoxicityprompts", f"{RTP}/prompts.jsonl", opening(1.5), "1.5, expected 0 to 1"),
        ("realtoxicityprompts", f"{RTP}/prompts.jsonl", opening(True), "expected a number or null"),
    ],
)
def test_readers_refuse(tmp_path: Path, name: str, path: str, text: str, message: str) -> None:
    write_text(tmp_path / path, text)
    with pytest.raises(BadInput, match=message) as error:
        load(name, tmp_path)
    assert Path(path).name in str(error.value) and "\n" not in str(error.value)


def test_blank_references_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "src.fr", "un\ndeux\n")
    write_text(tmp_path / "ref.en", "one\n \n")
    with pytest.raises(BadInput, match="ref.en: line 2: a blank option or reference"):
        load("fr_en", tmp_path)


def test_a_field_over_the_limit_names_its_row(tmp_path: Path, monkeypatch) -> None:
    before, limit = csv.field_size_limit(), csv.field_size_limit
    monkeypatch.setattr(csv, "field_size_limit", lambda size: limit(20))
    path = write_text(tmp_path / LABELS_FILE, f"class,tweet\n1,x\n1,{'x' * 30}\n")
    for reader in (lambda path: list(read_rows(path)), train_scorer):
        with pytest.raises(BadInput, match=f"{LABELS_FILE}: row 2: field larger than"):
            reader(path)
    limit(before)


def test_every_source_is_found_where_it_is_fetched_to() -> None:
    """The final names of a download match the pattern of the set that it is."""
    others = {"crows_pairs": "crows-pairs", "fr_en": "wmt15-fr-en", "cnn_dm": "cnn-dailymail"}
    for name, public in PUBLIC_SETS.items():
        source = others.get(name, name)
        names = [[path for _, path in f.unpack] or [f.path] for f in SOURCES[source].files]
        paths = [f"{source}/{path}" for part in names for path in part]
        patterns = [pattern for pattern, _ in public.files]
        assert any(re.search(p, path) for p in patterns for path in paths), (name, paths)
    sides = {path for _, path in SOURCES["wmt15-fr-en"].files[0].unpack}
    assert sides == {"src.fr", "ref.en"}  # the reader takes the second from beside the first
    (labels,) = SOURCES["toxicity-labels"].files
    assert re.search(LABELS, f"toxicity-labels/{labels.path}")
    evaluation = {k for k, source in SOURCES.items() if source.becomes.startswith("evaluation")}
    assert evaluation <= {others.get(name, name) for name in PUBLIC_SETS} | {"toxicity-labels"}


def test_sets_at_hand_are_read(real_data: Path) -> None:
    """The shared samples, whose sizes their README states."""
    sizes = {"hellaswag": 800, "sst2": 872, "rte": 277, "lambada": 5153, "truthfulqa": 817}
    sizes |= {"winogender": 120, "crows_pairs": 1508, "realtoxicityprompts": 2000}
    sizes |= {"squad2": 100, "drop": 100, "fr_en": 100}
    for name, size in sizes.items():
        items, paths = load(name, real_data)
        assert len(items) == size or not paths, name


def test_examples_come_from_groups_that_are_not_asked_about(raw: Path) -> None:
    items, _ = load("squad2", raw)
    asked, examples = choose(items, 2, seed=3)
    assert len(asked) == 2 * 6 and len(examples) == 2
    for example in examples:
        assert example.endswith("Who is blue?\n\nA: Not in background.")
        background = example.split("\n\n")[1]
        assert not any(background in item.query for item in asked)
    assert (asked, examples) == choose(items, 2, seed=3) != choose(items, 2, seed=4)
    assert len(choose(items, 15, seed=3)[1]) == 2  # at most a quarter


def test_openings_are_drawn_evenly_over_toxicity() -> None:
    items = [Opening(f"{i}", f"{i}", 0.05 if i < 90 else 0.95) for i in range(100)]
    items += [Opening("x", "x", None)]
    scores = [item.toxicity for item in choose(items, 0, seed=0)[0]]
    assert sorted(scores[:20]) == [0.05] * 10 + [0.95] * 10 and scores[-1] is None


# ------------------------------------------------------------------------------- prompts and models


def test_items_that_do_not_fit_are_dropped_and_examples_left_out(
    models: dict[str, Path], tiny: Tiny
) -> None:
    speakers = [load_speaker(name, folder) for name, folder in models.items()]
    encode = tiny.encoding.encode_ordinary
    short, long = (Choice("red " * n, f"{n}", ("blue", "gold gold gold"), 0) for n in (3, 900))
    examples = [f"example {i} " + "green " * 40 for i in range(9)]
    few, zero = Condition("few-shot", "Say it.", 9), Condition("zero-shot", "Say it.")
    zero_shot, few_shot = fit_prompts(
        speakers, "hellaswag", {zero: (), few: examples}, [long, short, long, short], 2
    )
    assert zero_shot.items == few_shot.items == [short, short] and few_shot.dropped == 2

    # The shorter of the two contexts, 640, and the longest answer decide.
    def length(k: int) -> int:
        text = "\n\n".join(["Say it.", *examples[9 - k :], short.query])
        return len(encode(text)) + len(encode(" gold gold gold"))

    fitting = max(k for k in range(10) if length(k) <= 640)
    assert 0 < fitting < 9 and few_shot.num_examples == fitting
    text = tiny.encoding.decode(few_shot.contexts[1][0])
    assert text.startswith(f"Say it.\n\nexample {9 - fitting} ")
    assert text.endswith("\n\nred red red ")
    assert few_shot.contexts[0] == few_shot.contexts[1]
    # Few-shot that never has an example is zero-shot under another name.
    only = fit_prompts(speakers, "hellaswag", {zero: (), few: ["red " * 900]}, [short], 1)
    assert [asked.condition for asked in only] == [zero]
    assert fit_prompts(speakers, "hellaswag", {zero: ()}, [long], 1) == []


def brute_force_logprobs(speaker: Speaker, context: list[int], answer: list[int]) -> list[float]:
    """log p of each answer token, one forward pass a token."""
    result = []
    for i, token in enumerate(answer):
        tokens = torch.tensor([context + answer[:i]])
        logits = speaker.model(tokens)[0, -1].double() @ speaker.model.unembedding.double().T
        result.append(float(logits.log_softmax(-1)[token]))
    return result


def asked_of(speaker: Speaker, name: str, items: list[Item], condition: Condition) -> Asked:
    (asked,) = fit_prompts([speaker], name, {condition: ()}, items, len(items))
    assert asked.items == items
    return asked


def test_the_option_of_highest_mean_logprob_is_picked(speaker: Speaker) -> None:
    colours = ["red", "gold gold", "white black white black", "nobody knows"]
    items = [
        Choice(f"say {a} {b}", "g", tuple(np.roll(colours, i)), i // 4)
        for i, (a, b) in enumerate((a, b) for a in colours for b in colours)
    ]
    asked = asked_of(speaker, "hellaswag", items, Condition("zero-shot", "Go on."))
    values, _ = measure(speaker, asked, asked.contexts[0], None, ARGS)
    encode, means, totals = speaker.encoding.encode_ordinary, [], []
    for item in items:
        context = encode(f"Go on.\n\n{item.query}")
        parts = [brute_force_logprobs(speaker, context, encode(" " + o)) for o in item.options]
        means.append(int(np.argmax([np.mean(p) for p in parts])) == item.label)
        totals.append(int(np.argmax([np.sum(p) for p in parts])) == item.label)
    assert values["accuracy"].tolist() == [float(right) for right in means]
    assert means != totals and 0 < sum(means) < len(means)  # the test can tell them apart


def test_truth_pairs_and_last_words_by_brute_force(speaker: Speaker) -> None:
    encode = speaker.encoding.encode_ordinary

    def total(context: list[int], text: str) -> float:
        return sum(brute_force_logprobs(speaker, context, encode(text)))

    truth = Truth("Q: red ?\nA:", "g", ("red", "gold", "blue", "white"), 0, (1,), (0, 2), (1, 3))
    asked = asked_of(speaker, "truthfulqa", [truth], Condition("QA"))
    values, _ = measure(speaker, asked, asked.contexts[0], None, ARGS)
    p = np.exp([total(encode(truth.query), f" {o}") for o in truth.options])
    assert values["mc1"].tolist() == [float(p[0] > p[1])]
    assert values["mc2"] == pytest.approx((p[0] + p[2]) / p.sum(), rel=1e-5)

    pair = Pair("", "g", ("he ran", "she ran away"))
    for condition, context in (
        (Condition("basic"), [speaker.encoding.eot_token]),
        (Condition("biased", "Be rude:"), encode("Be rude:\n\n")),
    ):
        asked = asked_of(speaker, "winogender", [pair], condition)
        assert asked.contexts == [[context]]
        values, _ = measure(speaker, asked, asked.contexts[0], None, ARGS)
        p = np.exp([total(context, text) for text in pair.options])
        p /= p.sum()
        assert values["entropy"] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-4)

    word = Completion("nobody knows the", "g", ("fox",), "fox")
    asked = asked_of(speaker, "lambada", [word], Condition("zero-shot"))
    values, _ = measure(speaker, asked, asked.contexts[0], None, ARGS)
    assert values["perplexity"] == pytest.approx(total(encode(word.query), " fox"), rel=1e-5)


def test_lines_are_cut_at_the_first_newline(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy decoding, asked for once; the words of LAMBADA are compared without punctuation."""
    texts = [" fox, she\nfox", "\nfox", " foxes", "fox"]

    def sampled(speaker, prompts, room, *, temperature, batch_size):
        assert temperature == 0 and room == 8
        return [Namespace(text=text) for text in texts]

    monkeypatch.setattr(public_eval, "sample_responses", sampled)
    items = [Completion(f"{i}", "g", ("fox.",), "fox.") for i in range(4)]
    asked = asked_of(speaker, "lambada", items, Condition("zero-shot"))
    values, lines = measure(speaker, asked, asked.contexts[0], None, ARGS)
    assert lines == ["fox, she", "", "foxes", "fox"]
    assert values["accuracy"].tolist() == [1, 0, 0, 1]


def test_batches_do_not_matter(speaker: Speaker) -> None:
    rng = np.random.default_rng(0)
    contexts, answers = (
        [rng.integers(256, size=n).tolist() for n in rng.integers(1, 9, 12)] for _ in range(2)
    )
    found = total_logprobs(speaker, contexts, answers, batch_size=5)
    expected = [
        sum(brute_force_logprobs(speaker, *pair)) for pair in zip(contexts, answers, strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-5)


def test_intervals_over_groups() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.random(60), rng.integers(12, size=60).astype(str)
    one, other = estimate_sums(values[:, None], groups, public_eval.mean), estimate(values, groups)
    for key in ("value", "low", "high"):
        assert getattr(one, key) == pytest.approx(getattr(other, key), rel=1e-6)
    counts = np.array([bleu_counts(line, ["a b c d e f"]) for line in ("a b c d", "a b c d e x")])
    bleu = estimate_sums(counts, ["1", "2"], public_eval.METRICS["bleu"][0])
    assert bleu.value == pytest.approx(corpus_bleu(counts.sum(axis=0)))
    assert bleu.low == pytest.approx(corpus_bleu(counts).min())
    assert bleu.high == pytest.approx(corpus_bleu(counts).max())


# -------------------------------------------------------------------------------------- the command


def run(raw: Path, models: dict[str, Path], out: Path, *more: str) -> int:
    argv = ["public", "--data", str(raw), "--out", str(out), "--device", "cpu"]
    argv += [
        "--num_items",
        "3",
        "--checkpoints",
        *(f"{n}={folder}" for n, folder in models.items()),
    ]
    return run_command(lambda: evaluate.main([*argv, *more]))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_further_checkpoint_is_added(
    raw: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, calls = ("--sets", "rte", "wsc"), []
    assert run(raw, {"base": models["base"]}, tmp_path / "out", *sets) == 0
    monkeypatch.setattr(
        public_eval, "measure", lambda s, *rest: calls.append(s.name) or measure(s, *rest)
    )
    assert run(raw, models, tmp_path / "out", *sets, "--resume") == 0
    assert set(calls) == {"sft"}  # the base model's part was kept
    resumed = (tmp_path / "out/table.csv").read_bytes()
    assert run(raw, models, tmp_path / "out", *sets) == 0
    assert set(calls) == {"base", "sft"} and (tmp_path / "out/table.csv").read_bytes() == resumed


def test_what_was_measured_otherwise_is_measured_again(
    raw: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume keeps a part only while settings and files are those it was made with."""
    calls, only = [], {"base": models["base"]}
    monkeypatch.setattr(
        public_eval, "measure", lambda s, *rest: calls.append(s.name) or measure(s, *rest)
    )

    def measured(*more: str) -> int:
        calls.clear()
        flags = ("--sets", "wsc", "--shots", "0", "--resume", *more)
        assert run(raw, only, tmp_path / "out", *flags) == 0
        return len(calls)

    assert (measured(), measured()) == (1, 0)
    assert (measured("--kernels", "torch"), measured("--kernels", "torch")) == (1, 0)
    longer = replace(PUBLIC_SETS["wsc"], max_new_tokens=13)
    monkeypatch.setitem(public_eval.PUBLIC_SETS, "wsc", longer)
    assert (measured(), measured()) == (1, 0)


def edited(values: dict, lines: list) -> list:
    return [{key: [1 - v for v in each] for key, each in values.items()}, lines]


@pytest.mark.parametrize("damage", ["cut", "empty", "edited", "nan", "swapped", "fifo", "old"])
def test_a_damaged_part_is_measured_again(
    raw: Path,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    damage: str,
) -> None:
    flags = ("--sets", "wsc", "rte", "--shots", "0")
    assert run(raw, {"base": models["base"]}, tmp_path / "out", *flags) == 0
    table = (tmp_path / "out/table.csv").read_bytes()
    part, other = sorted((tmp_path / "out/parts").iterdir())
    whole, theirs = part.read_text(), other.read_text()
    content, seal = whole.splitlines()
    (name,) = json.loads(content)[0]
    damaged = {
        "cut": whole[:20],
        "empty": "",
        "edited": f"{json.dumps(edited(*json.loads(content)))}\n{seal}\n",
        "nan": f"{json.dumps([{name: [float('nan')] * 3}, []])}\n{seal}\n",
        "swapped": theirs,
        "old": f"{content}\n",
    }
    if damage == "fifo":
        part.unlink()
        os.mkfifo(part)
    else:
        part.write_text(damaged[damage])
    capsys.readouterr()
    assert run(raw, {"base": models["base"]}, tmp_path / "out", *flags, "--resume") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and f"{part.name}: changed or damaged; measured" in warnings[0]
    assert (tmp_path / "out/table.csv").read_bytes() == table and part.read_text() == whole


def test_a_set_that_is_named_twice_counts_once(
    raw: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    assert run(raw, {"base": models["base"]}, tmp_path / "out", "--sets", "lambada", "lambada") == 0
    assert {row["items"] for row in read(tmp_path / "out/table.csv")} == {"3"}
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a|b", " ", "=1", "../x"])
def test_names_that_cannot_stand_in_a_table_are_refused(
    raw: Path,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    name: str,
) -> None:
    try:
        code = run(raw, {name: models["base"]}, tmp_path / "out")
    except SystemExit as stop:  # of the flag's own check
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and "--checkpoints" in error and error.count("\n") == 1
    assert error.strip().isprintable() and not (tmp_path / "out").exists()


def test_the_command_measures_every_set(
    raw: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(raw, models, tmp_path / "out") == 0
    rows = read(tmp_path / "out/table.csv")
    assert {row["set"] for row in rows} == set(PUBLIC_SETS)
    assert {row["model"] for row in rows} == {"base", "sft"}
    for name, public in PUBLIC_SETS.items():
        mine = [row for row in rows if row["set"] == name]
        assert {row["condition"] for row in mine} == {c.name for c in public.conditions}, name
        assert {row["items"] for row in mine} == {"3"}
    for row in rows:
        low, value, high = (float(row[key]) for key in ("ci_low", "value", "ci_high"))
        assert low - 1e-6 <= value <= high + 1e-6
        if row["metric"] != "perplexity":
            assert 0 <= low and high <= 1 + 1e-6
        if row["model"] == "base":
            assert float(row["difference"]) == 0
    by_key = {(r["set"], r["condition"], r["metric"], r["model"]): float(r["value"]) for r in rows}
    for row in rows:
        key = row["set"], row["condition"], row["metric"]
        expected = by_key[*key, "sft"] - by_key[*key, "base"]
        if row["model"] == "sft":
            assert float(row["difference"]) == pytest.approx(expected, rel=1e-3, abs=1e-5)

    text = (tmp_path / "out/report.md").read_text()
    assert "held-out ones: accuracy" in text
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size for name in ("tasks", "safety"))
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").open()]
    assert {s["model"] for s in samples} == {"base", "sft"}
    assert all("\n" not in s["line"] for s in samples)
    assert "ppo" not in text and "Not measured" not in text
    assert "hellaswag" in capsys.readouterr().out


def bad_scorer(texts: list[str]) -> np.ndarray:
    return np.full(len(texts), 25.0)


def failing_scorer(texts: list[str]) -> np.ndarray:
    raise KeyError("x")


def leaving_scorer(texts: list[str]) -> np.ndarray:
    raise SystemExit(3)


def ragged_scorer(texts: list[str]) -> list:
    return [[1], [1, 2]]


def constant_scorer(texts: list[str]) -> np.ndarray:
    return np.full(len(texts), 0.25)


def test_another_scorer_and_sets_that_are_missing(
    raw: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    only = write_sets(tmp_path / "raw") / "realtoxicityprompts"
    scorer = ("--toxicity_scorer", "tests.test_public_eval:constant_scorer")
    assert run(only, models, tmp_path / "out", *scorer) == 0
    rows = read(tmp_path / "out/table.csv")
    assert {row["value"] for row in rows} == {"0.25"} and len(rows) == 3 * 2
    assert "Not measured: hellaswag (no file)" in (tmp_path / "out/report.md").read_text()
    assert run(only, models, tmp_path / "none") == 2  # no labels there: nothing is left
    assert "realtoxicityprompts (no scorer" in capsys.readouterr().err
    assert run(only, models, tmp_path / "none", "--toxicity_scorer", "nowhere:f") == 2
    assert "MODULE:FUNCTION" in capsys.readouterr().err
    bad = ("--toxicity_scorer", "tests.test_public_eval:bad_scorer")
    assert run(only, models, tmp_path / "none", *bad) == 2
    assert "from 25 to 25; expected (3,) from 0 to 1" in capsys.readouterr().err
    for name, words in (("failing", "KeyError: 'x'"), ("leaving", "3"), ("ragged", "ValueError")):
        bad = ("--toxicity_scorer", f"tests.test_public_eval:{name}_scorer")
        assert run(only, models, tmp_path / "none", *bad) == 2
        assert "error: the toxicity scorer gave " in (error := capsys.readouterr().err)
        assert f"{words}" in error and "expected (3,) from 0 to 1" in error
    assert run(tmp_path / "nothing", models, tmp_path / "none") == 2
    assert "no such folder" in capsys.readouterr().err
    assert run(raw, models, tmp_path / "zero", "--sets", "rte", "--shots", "0") == 0
    assert {row["condition"] for row in read(tmp_path / "zero/table.csv")} == {"zero-shot"}


def test_bad_arguments(capsys: pytest.CaptureFixture) -> None:
    for line, message in (
        ("--data x --out o", "--checkpoints"),
        ("--data x --checkpoints a=b a=c --out o", "--checkpoints 'a=c'"),
        ("--data x --checkpoints a=b --out o --shots -1", "--shots"),
        ("--data x --checkpoints a=b --out o --sets mnli", "mnli"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.get_args(["public", *line.split()])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_listing_shows_a_prompt_of_each_set(raw: Path, capsys: pytest.CaptureFixture) -> None:
    assert public_sets.main([str(raw)]) == 0
    shown = capsys.readouterr().out
    assert all(f"=== {name}: " in shown for name in PUBLIC_SETS) and "English:|" in shown
    with pytest.raises(BadInput, match="usage"):
        public_sets.main([])
