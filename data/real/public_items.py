"""
Items of public evaluation sets, and how they are read from what the sets' authors publish.

An item is a query that ends where the answer begins, and what is right. Every reader takes the
paths of a set's files (public_sets.py finds them) and yields items; what is not as expected is
a `BadInput` that names file and row. The queries' wording follows InstructGPT's Appendix D.
"""

import csv
import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import BadInput, check, check_blank
from data.real.raw import clean, get, parse, read_json_array, read_json_lines, read_raw, read_rows
from data.real.text_metrics import CANNOT_ANSWER, normalize_answer, quac_human_f1, quac_references

# ------------------------------------------------------------------------------------------ items


@dataclass(frozen=True)
class Item:
    """A query that ends where the answer begins; items of a group share a passage."""

    query: str
    group: str


@dataclass(frozen=True)
class Choice(Item):
    """One of the options continues the query; `label` is the right one's index."""

    options: tuple[str, ...]
    label: int

    @property
    def answer(self) -> str:
        return self.options[self.label]


@dataclass(frozen=True)
class Truth(Item):
    """Answers to a question. MC1 asks for `best` among `wrong`, MC2 for the mass on `true`."""

    options: tuple[str, ...]
    best: int
    wrong: tuple[int, ...]  # the false answers of MC1
    true: tuple[int, ...]
    false: tuple[int, ...]
    answer = ""


@dataclass(frozen=True)
class Completion(Item):
    """A text to write. `references` are what the set's metric takes; `answer` is one as text, and
    "" where the item cannot be an example."""

    references: tuple[Any, ...]
    answer: str


@dataclass(frozen=True)
class Pair(Item):
    """Two sentences of which neither should be likelier; the query is empty."""

    options: tuple[str, str]
    answer = ""


@dataclass(frozen=True)
class Opening(Item):
    """The beginning of a sentence, with its own toxicity, 0..1 or None."""

    toxicity: float | None
    answer = ""


def check_item(item: Item, name: str) -> None:
    """Raise `BadInput`, beginning with the group, for a blank option or first reference (in squad2
    it says that there is no answer), and for white space that a tokenizer cannot take."""
    first = getattr(item, "references", ())[: name != "squad2"]
    texts = [*getattr(item, "options", ()), *(r[0] if isinstance(r, tuple) else r for r in first)]
    if not all(map(str.strip, texts)):
        raise BadInput(f"{item.group}: a blank option or reference; expected text")
    for text in (item.query, item.answer, *texts):
        check_blank(text, item.group)


# ---------------------------------------------------------------------------------------- readers


def _tsv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    return read_rows(path, "\t", quoting=csv.QUOTE_NONE)


def _table_or_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .tsv or .csv table, or records of JSON Lines."""
    readers = {".tsv": _tsv, ".csv": read_rows}
    return readers.get(path.suffix, read_json_lines)(path)


def hellaswag(paths: list[Path]) -> Iterator[Item]:
    """Original records, whose WikiHow mark-up is removed, or records of query, choices, gold."""

    def plain(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ").strip()

    for where, record in read_json_lines(paths[0]):
        check(record, {"choices?": [str, ...], "endings?": [str, ...]}, where)
        if "choices" in record:
            query, endings = get(record, "query", str, where), record["choices"]
            label = str(record.get("gold"))
        else:
            second = get(record, "ctx_b", str, where, default="")
            query = f"{get(record, 'activity_label', str, where)}: " + plain(
                f"{get(record, 'ctx_a', str, where)} {second[:1].upper() + second[1:]}"
            )
            endings = [plain(text) for text in get(record, "endings", list, where)]
            label = str(record.get("label"))
        if label not in map(str, range(len(endings))):
            raise BadInput(f"{where}: right ending {label}, expected 0 to {len(endings) - 1}")
        yield Choice(query, where, tuple(endings), int(label))


def _label(row: dict[str, Any], names: Sequence[str], where: str) -> int:
    """A label that is a number or one of the names."""
    value = str(row.get("label"))
    value = str(names.index(value)) if value in names else value
    if value not in {str(i) for i in range(len(names))}:
        known = f"expected one of {', '.join(names)} or its number"
        raise BadInput(f'{where}: key "label": {known}, found {value!r}')
    return int(value)


def sst2(paths: list[Path]) -> Iterator[Item]:
    for where, row in _table_or_lines(paths[0]):
        text = clean(get(row, "sentence", str, where))
        label = _label(row, ("negative", "positive"), where)
        yield Choice(f"Text: {text}\nLabel:", where, ("negative", "positive"), label)


def rte(paths: list[Path]) -> Iterator[Item]:
    for where, row in _table_or_lines(paths[0]):
        premise, claim = (clean(get(row, f"sentence{n}", str, where)) for n in (1, 2))
        label = _label(row, ("entailment", "not_entailment"), where)
        query = f"Passage: {premise}\nQuestion: Does it follow that: {claim} Yes or No?\nAnswer:"
        yield Choice(query, where, ("Yes", "No"), label)


def wsc(paths: list[Path]) -> Iterator[Item]:
    """SuperGLUE's JSON Lines: `span1_text` is a noun, `span2_text` a pronoun that may refer to it.

    The reference is (noun, whether it is the referent).
    """
    for where, record in read_json_lines(paths[0]):
        target = get(record, "target", dict, where)
        noun, pronoun = (get(target, f"span{n}_text", str, where) for n in (1, 2))
        words = get(record, "text", str, where).split(" ")
        place, label = get(target, "span2_index", int, where), record.get("label")
        if not isinstance(label, bool) or not 0 <= place < len(words):
            raise BadInput(f"{where}: expected label true or false and span2_index of a word")
        words[place] = f"*{words[place]}*"
        query = (
            f"Passage: {' '.join(words)}\nQuestion: In the passage above, what does the "
            f'pronoun "*{pronoun}*" refer to?\nAnswer:'
        )
        yield Completion(query, where, ((noun, label),), noun if label else "")


def lambada(paths: list[Path]) -> Iterator[Item]:
    for where, record in read_json_lines(paths[0]):
        text = get(record, "text", str, where).rstrip()
        query, space, word = text.rpartition(" ")
        if not query.strip():
            raise BadInput(f'{where}: key "text": expected several words')
        yield Completion(query, where, (word,), word)


def _dialogue(
    head: str, group: str, turns: list[tuple[str, tuple[str, ...], str]]
) -> Iterator[Item]:
    """Items of one passage: each query shows the earlier questions with their answers, as in the
    released samples."""
    for question, references, answer in turns:
        query = f"{head}\n\nQ: {question}\n\nA:"
        if references:
            yield Completion(query, group, references, answer)
        head = f"{query} {answer}"


NOT_IN_BACKGROUND = "Not in background."


def squad2(paths: list[Path]) -> Iterator[Item]:
    """dev-v2.0.json. The reference of a question without an answer is ""."""
    file = parse(read_raw(paths[0]), str(paths[0]))
    paragraph = {"context": str, "qas": [{"question": str, "answers": [{"text": str}, ...]}, ...]}
    check(file, {"data": [{"title": str, "paragraphs": [paragraph, ...]}, ...]}, str(paths[0]))
    for article in file["data"]:
        title = article["title"]
        for number, paragraph in enumerate(article["paragraphs"], start=1):
            group, turns = f"{paths[0]}: {title}, paragraph {number}", []
            for qa in paragraph["qas"]:
                texts = [a["text"] for a in qa["answers"] if normalize_answer(a["text"])]
                answer = texts[0] if texts else NOT_IN_BACKGROUND
                turns.append((clean(qa["question"]), tuple(texts or [""]), answer))
            background = clean(paragraph["context"])
            yield from _dialogue(f"Title: {title}\n\nBackground: {background}", group, turns)


I_DO_NOT_KNOW = "I don't know."


def quac(paths: list[Path]) -> Iterator[Item]:
    """val_v0.2.json. Questions on whose answer people agree too little are not asked, as
    officially (`quac_human_f1` below 0.4), but shown before later ones."""
    file = parse(read_raw(paths[0]), str(paths[0]))
    qa = {"question": str, "answers": [{"text": str}, ...], "orig_answer": {"text": str}}
    paragraph = {"id?": str, "context": str, "qas": [qa, ...]}
    section = {"title": str, "section_title?": (str, None), "paragraphs": [paragraph, ...]}
    check(file, {"data": [section, ...]}, str(paths[0]))
    for section in file["data"]:
        title = f"{section['title']}, {section.get('section_title') or ''}".rstrip(", ")
        for paragraph in section["paragraphs"]:
            group, turns = f"{paths[0]}: {paragraph.get('id', title)}", []
            for qa in paragraph["qas"]:
                references = tuple(quac_references([a["text"] for a in qa["answers"]]))
                agreed = quac_human_f1(references) >= 0.4
                first = qa["orig_answer"]["text"]
                answer = I_DO_NOT_KNOW if first == CANNOT_ANSWER else first
                turns.append((clean(qa["question"]), references if agreed else (), answer))
            text = clean(paragraph["context"].removesuffix(CANNOT_ANSWER))
            yield from _dialogue(f"TITLE: {title}\n\nPARAGRAPH: {text}", group, turns)


def drop_spans(answer: dict[str, Any]) -> tuple[str, ...]:
    """The spans of an answer of DROP: its number, else its spans, else its date."""
    if number := (answer.get("number") or "").strip():
        return (number,)
    if spans := answer.get("spans"):
        return tuple(spans)
    date = answer.get("date") or {}
    return (" ".join(date.get(key, "") for key in ("day", "month", "year")).strip(),)


def drop(paths: list[Path]) -> Iterator[Item]:
    """drop_dataset_dev.json. A reference is a tuple of spans; all annotators' count."""
    passages = parse(read_raw(paths[0]), str(paths[0]))
    answer = {"number?": (str, None), "spans?": ([str, ...], None), "date?": ({str: str}, None)}
    qa = {"question": str, "answer": answer, "validated_answers?": ([answer, ...], None)}
    check(passages, {str: {"passage": str, "qa_pairs": [qa, ...]}}, str(paths[0]))
    for name, about in passages.items():
        passage = clean(about["passage"])
        for qa in about["qa_pairs"]:
            answers = [qa["answer"], *(qa.get("validated_answers") or ())]
            references = tuple(map(drop_spans, answers))
            query = f"Passage: {passage}\nQuestion: {clean(qa['question'])}\nAnswer:"
            yield Completion(query, f"{paths[0]}: {name}", references, ", ".join(references[0]))


def _line_pairs(
    path: Path, other: Path, lines: Callable[[Path], list[str]]
) -> Iterator[tuple[str, str]]:
    """The lines of two files, of which those of equal number belong together."""
    ours, theirs = lines(path), lines(other)
    if len(ours) != len(theirs):
        raise BadInput(f"{other}: {len(theirs)} lines, expected {len(ours)} as in {path.name}")
    return zip(map(clean, ours), map(clean, theirs), strict=True)


def _lines(path: Path) -> list[str]:
    return read_raw(path).removesuffix("\n").split("\n")


def fr_en(paths: list[Path]) -> Iterator[Item]:
    """src.fr and ref.en beside it: <seg> elements of SGML, or one sentence a line."""

    def sentences(path: Path) -> list[str]:
        text = read_raw(path)
        if "<seg" not in text:
            return _lines(path)
        return [html.unescape(s) for s in re.findall(r"<seg[^>]*>(.*?)</seg>", text, flags=re.S)]

    pairs = _line_pairs(paths[0], paths[0].with_name("ref.en"), sentences)
    for number, (french, english) in enumerate(pairs, start=1):
        where = f"{paths[0].with_name('ref.en')}: line {number}"
        yield Completion(f"French: {french}\nEnglish:", where, (english,), english)


def _summary(text: str, summary: str, group: str) -> Completion:
    summary = " ".join(clean(summary).split())
    return Completion(f"{clean(text)}\n\nTL;DR:", group, (summary,), summary)


def articles(paths: list[Path]) -> Iterator[Item]:
    """CNN/DailyMail: test.source and test.target beside it, one article or summary a line."""
    pairs = _line_pairs(paths[0], paths[0].with_suffix(".target"), _lines)
    for number, (text, summary) in enumerate(pairs, start=1):
        yield _summary(text, summary, f"{paths[0].with_suffix('.target')}: line {number}")


def summaries(paths: list[Path]) -> Iterator[Item]:
    """CNN/DailyMail (`article`, `highlights`) or TL;DR (`title`, `post`, `summary`)."""
    for where, record in _table_or_lines(paths[0]):
        check(record, {}, where)
        if "article" in record:
            text, summary = (get(record, key, str, where) for key in ("article", "highlights"))
        else:
            title = get(record, "title", str, where, default="")
            text = f"{title}\n\n{clean(get(record, 'post', str, where))}"
            summary = get(record, "summary", str, where)
        yield _summary(text, summary, where)


def released_item(row: dict[str, str], where: str, is_drop: bool) -> Completion:
    """A row of OpenAI's samples, whose `ref_text` has the references with | between.

    Several spans of DROP are joined with " and " there, and cannot be parted safely: each
    alternative counts as one span.
    """
    context = get(row, "context", str, where)
    texts = [text for text in get(row, "ref_text", str, where).split("|") if text.strip()]
    if not texts:
        raise BadInput(f'{where}: key "ref_text": expected a reference')
    references = tuple("" if text == NOT_IN_BACKGROUND else text for text in texts)
    if is_drop:
        references = tuple((text,) for text in texts)
    passage = context.split("\nQ: ")[0].split("\nQuestion: ")[0]
    return Completion(context, passage, references, texts[0])


def released(paths: list[Path]) -> Iterator[Item]:
    """The distinct contexts of a CSV of OpenAI's samples."""
    seen = set()
    for where, row in read_rows(paths[0]):
        item = released_item(row, where, is_drop="drop" in paths[0].name)
        if item.query not in seen:
            seen.add(item.query)
            yield item


def truthfulqa(paths: list[Path]) -> Iterator[Item]:
    """mc_task.json, or TruthfulQA.csv, from whose lists of answers the tasks are made.

    In the CSV, MC1 sets the best answer against all incorrect ones, MC2 all correct against all
    incorrect; answers end with a full stop, as in the authors' code.
    """

    def question(text: str) -> str:
        return f"Q: {clean(text)}\nA:"

    def indices(options: list[str], answers: list[str]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(options.index(answer) for answer in answers))

    def item(
        query: str, where: str, top: str, wrong: list[str], true: list[str], false: list[str]
    ) -> Item:
        options = list(dict.fromkeys([top, *wrong, *true, *false]))
        if not (wrong and true and false) or top in (*wrong, *false, "."):
            raise BadInput(f"{where}: expected true and false answers, and a best one that is true")
        groups = (indices(options, texts) for texts in (wrong, true, false))
        return Truth(query, where, tuple(options), options.index(top), *groups)

    if paths[0].suffix == ".json":
        for where, record in read_json_array(paths[0]):
            check(record, dict.fromkeys(("mc1_targets", "mc2_targets"), {str: (0, 1)}), where)
            first, second = record["mc1_targets"], record["mc2_targets"]
            top = [text for text, right in first.items() if right]
            if len(top) != 1:
                raise BadInput(f'{where}: key "mc1_targets": expected one true answer')
            wrong = [text for text, right in first.items() if not right]
            true = [text for text, right in second.items() if right]
            false = [text for text, right in second.items() if not right]
            query = question(get(record, "question", str, where))
            yield item(query, where, top[0], wrong, true, false)
        return

    def answers(text: str) -> list[str]:
        parts = [part.strip() for part in text.split(";") if part.strip()]
        return [part if part.endswith(".") else f"{part}." for part in parts]

    for where, row in read_rows(paths[0]):
        texts = [get(row, f"{kind} Answers", str, where) for kind in ("Correct", "Incorrect")]
        true, false = map(answers, texts)
        top = clean(get(row, "Best Answer", str, where)).removesuffix(".") + "."
        yield item(question(get(row, "Question", str, where)), where, top, false, true, false)


def winogender(paths: list[Path]) -> Iterator[Item]:
    """all_sentences.tsv: the male and the female form of each of the 120 templates whose second
    person is a named participant."""
    forms: dict[str, dict[str, str]] = {}
    for where, row in _tsv(paths[0]):
        parts = get(row, "sentid", str, where).split(".")
        if len(parts) != 5:
            form = "occupation.participant.answer.gender.txt"
            raise BadInput(f'{where}: key "sentid": {parts}, expected {form}')
        if parts[1] != "someone":
            forms.setdefault(".".join(parts[:3]), {})[parts[3]] = get(row, "sentence", str, where)
    for name, sentences in forms.items():
        if not {"male", "female"} <= sentences.keys():
            raise BadInput(f"{paths[0]}: {name}: expected a male and a female form")
        group = f"{paths[0]}: {name.split('.')[0]}"
        yield Pair("", group, (sentences["male"], sentences["female"]))


def crows_pairs(paths: list[Path]) -> Iterator[Item]:
    for where, row in read_rows(paths[0]):
        more, less = (clean(get(row, f"sent_{kind}", str, where)) for kind in ("more", "less"))
        yield Pair("", where, (more, less))


def realtoxicityprompts(paths: list[Path]) -> Iterator[Item]:
    for path in paths:
        for where, record in read_json_lines(path):
            check(record, {"prompt": {"text": str, "toxicity?": (float, None)}}, where)
            score = record["prompt"].get("toxicity")
            if not 0 <= (score or 0) <= 1:
                raise BadInput(f'{where}: key "toxicity": {score}, expected 0 to 1, or null')
            yield Opening(clean(record["prompt"]["text"]), where, score)
