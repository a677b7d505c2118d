"""
Converters from public human-feedback data sets to the project's records (data/files.py).

    hh-rlhf      Anthropic HH-RLHF: a chosen and a rejected reply       -> comparisons, K = 2
    oasst        OpenAssistant trees: replies ranked by volunteers      -> comparisons, K = 2..9
    qa-feedback  Fine-Grained RLHF: a verdict on each pair of answers   -> comparisons, K = 4
    summarize    Stiennon et al. 2020: two summaries of a post          -> comparisons, K = 2
    alpaca       Stanford Alpaca                                        -> demonstrations
    dolly        Databricks Dolly 15k, or its dolly_hhrlhf form         -> demonstrations
    tldr         Reddit posts with their author's summary               -> demonstrations
    lottery      OpenAssistant first messages                           -> prompts
    novels, shakespeare, wikitext, text                                 -> documents

Choices that hold for all of them:

- A prompt of one turn is its text alone. A dialogue of several is written "Human: ...",
  "Assistant: ..." with blank lines between, and ends in "Assistant:", as the paper's chat prompts.
- "user" is what must not be in two splits. Where a set names no users, each distinct prompt is its
  own user; for dialogues that is the first turn, because later turns repeat the earlier ones.
- "use_case" is one of the paper's ten (Table 1) where the set says so, else "unknown".
- "source" is "labeler" for sets whose prompts were written to make a data set, "customer" for sets
  whose prompts people wrote because they wanted an answer.
- A comparison lists its responses in alphabetical order, so that their order tells nothing about
  their ranks: code that breaks a tie by position must not score above chance.
- A record that the set itself marks as unusable is dropped and counted by reason; a file that does
  not have the set's schema is refused as a whole (`BadInput` with file, line and key).
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import END_OF_TEXT, BadInput, Record, check_blank, check_record
from data.real.raw import clean, get, read_json_array, read_json_lines, read_raw

MAX_RESPONSES = 9  # the paper ranks 4 to 9 outputs a prompt
# The ten labels of the paper's Table 1, for what Databricks asked its writers to do.
DOLLY_USE_CASES = {
    "creative_writing": "generation",
    "open_qa": "open_qa",
    "general_qa": "open_qa",
    "brainstorming": "brainstorming",
    "summarization": "summarization",
    "classification": "classification",
    "closed_qa": "closed_qa",
    "information_extraction": "extract",
}


@dataclass
class Converted:
    """
    What one data set became: records by kind, how many entries were read, and how many of them
    were dropped for which reason. A document is {"text", "user"}; its user is the file, or the
    section itself, that must lie in one split.
    """

    demonstrations: list[Record] = field(default_factory=list)
    prompts: list[Record] = field(default_factory=list)
    comparisons: list[Record] = field(default_factory=list)
    documents: list[Record] = field(default_factory=list)
    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Options:
    """Choices of the person who converts, see `data.real.prepare`."""

    passages: int = 1  # qa-feedback: how many passages stand in the prompt
    passage_chars: int | None = None  # qa-feedback: longest passage, cut after a whole sentence
    section_chars: int = 20_000  # documents: longest section, in characters


# --- building records ---------------------------------------------------------------------------


def entries(
    result: Converted, paths: Sequence[Path], read: Callable = read_json_lines
) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, entry) of all files, counted in `result.num_read`."""
    for path in paths:
        for entry in checked(result, read(path)):
            result.num_read += 1
            yield entry


def checked(result: Converted, read: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the entries; raise `BadInput` that names the one which has become a bad record."""
    kinds = ("demonstrations", "prompts", "comparisons")
    for where, entry in read:
        before = {kind: len(getattr(result, kind)) for kind in kinds}
        yield where, entry
        for kind, number in before.items():
            for record in getattr(result, kind)[number:]:
                check_record(record, kind, where)


def own_user(text: str) -> str:
    """Return the user of a prompt in a set without users: a digest of the prompt's text."""
    return "prompt:" + hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()[:16]


def prompt_record(prompt: str, user: str, source: str, use_case: str = "unknown") -> Record:
    return {"prompt": prompt, "user": user, "source": source, "use_case": use_case}


def dialogue_prompt(turns: Sequence[tuple[str, str]]) -> str:
    """Write (role, text) turns as one prompt; one turn is its text alone."""
    if len(turns) == 1:
        return clean(turns[0][1])
    return "\n\n".join(f"{role}: {clean(text)}" for role, text in turns) + "\n\nAssistant:"


def comparison(base: Record, texts: Sequence[str], ranks: Sequence[int], labeler: str) -> Record:
    """Build a comparison, responses in alphabetical order; `base` is the record of its prompt."""
    ranked = sorted(zip(texts, ranks, strict=True))
    responses, ranks = ([pair[i] for pair in ranked] for i in (0, 1))
    return {**base, "responses": responses, "ranks": ranks, "labeler": labeler}


# --- comparisons --------------------------------------------------------------------------------


def convert_hh_rlhf(paths: Sequence[Path], options: Options) -> Converted:
    """
    Anthropic HH-RLHF (Bai et al. 2022): JSON Lines with `chosen` and `rejected`, whole dialogues.

    The two dialogues must agree up to the last assistant turn, which is what was compared. An
    empty reply against one that is not stays: to say nothing can be the better or worse answer.
    """
    result, marker = Converted(), "\n\nAssistant:"
    for where, record in entries(result, paths):
        sides = [get(record, key, str, where) for key in ("chosen", "rejected")]
        contexts, _, ends = zip(*(side.rpartition(marker) for side in sides), strict=True)
        replies = [clean(end) for end in ends]
        pieces = re.split(r"\n\n(Human|Assistant):", contexts[0])
        turns = list(zip(pieces[1::2], pieces[2::2], strict=True))
        if contexts[0] != contexts[1]:
            result.dropped["the dialogues differ before the last reply"] += 1
        elif not turns or pieces[0].strip() or turns[0][0] != "Human":
            result.dropped["the dialogue does not begin with a human turn"] += 1
        elif any("\n\nHuman:" in end for end in ends):
            result.dropped["the dialogue does not end with an assistant turn"] += 1
        elif replies[0] == replies[1]:
            result.dropped["chosen and rejected replies are the same"] += 1
        elif not (prompt := dialogue_prompt(turns)):
            result.dropped["empty prompt"] += 1
        else:
            base = prompt_record(prompt, own_user(turns[0][1]), "labeler")
            result.comparisons.append(comparison(base, replies, [1, 2], "hh-rlhf"))
    return result


def convert_oasst(paths: Sequence[Path], options: Options) -> Converted:
    """
    OpenAssistant message trees: JSON Lines, one tree a line, replies ranked from 0, the best.

    A comparison is a prompter message whose two or more replies all have a rank; its prompt is
    the path from the root. English only, like the paper's data (over 96 %). Trees are made by
    many people; the user is the root's writer, or the tree where no writer is named, so that a
    tree lies in one split as a whole.
    """
    result = Converted()

    def visit(message: Any, path: tuple[tuple[str, str], ...], user: str, where: str) -> None:
        role = get(message, "role", str, where)
        if role not in ("prompter", "assistant"):
            raise BadInput(f'{where}: key "role": {role!r}, expected "prompter" or "assistant"')
        speaker = "Human" if role == "prompter" else "Assistant"
        path += ((speaker, get(message, "text", str, where)),)
        replies = get(message, "replies", list, where, default=[])
        if role == "prompter" and replies:
            result.num_read += 1
            add(prompt_record(dialogue_prompt(path), user, "customer"), replies, where)
        for reply in replies:
            visit(reply, path, user, where)

    def add(base: Record, replies: list[Any], where: str) -> None:
        ranks = [get(reply, "rank", int, where, default=-1) for reply in replies]
        texts = [clean(get(reply, "text", str, where)) for reply in replies]
        if len(replies) < 2:
            result.dropped["a single reply"] += 1
        elif -1 in ranks:
            result.dropped["no rank" if set(ranks) == {-1} else "some replies have no rank"] += 1
        elif any(reply.get("deleted") or reply.get("review_result") is False for reply in replies):
            result.dropped["a reply was deleted or refused by reviewers"] += 1
        elif len(set(ranks)) == 1:
            result.dropped["all replies tied"] += 1
        elif len(replies) > MAX_RESPONSES:
            result.dropped[f"more than {MAX_RESPONSES} replies"] += 1
        elif not base["prompt"]:
            result.dropped["empty prompt"] += 1
        else:
            result.comparisons.append(comparison(base, texts, dense(ranks), "oasst"))

    for path in paths:
        for where, tree in checked(result, read_json_lines(path)):
            root = get(tree, "prompt", dict, where)
            if get(root, "lang", str, where, default="en") != "en":
                result.dropped["trees that are not in English"] += 1
                result.num_read += 1
                continue
            user = root.get("user_id") or get(tree, "message_tree_id", str, where)
            visit(root, (), f"oasst:{user}", where)
    return result


def dense(scores: Sequence[int]) -> list[int]:
    """Turn scores, lowest best, into ranks 1, 2, ... without gaps; equal scores tie."""
    levels = sorted(set(scores))
    return [levels.index(score) + 1 for score in scores]


def weak_order(verdicts: Sequence[int], k: int) -> list[int] | None:
    """
    Turn verdicts on all pairs of `k` items into ranks, or None if no ranking fits them all.

    `verdicts` are in the order (1,2), (1,3), ..., (k-1,k): 1 first better, 2 second better, 0
    equal. In a weak order a higher class has strictly more points, 2 a win and 1 a tie, so the
    points give the only candidate, which is then checked against every verdict.
    """
    points = [0] * k
    pairs = list(itertools.combinations(range(k), 2))
    for (i, j), verdict in zip(pairs, verdicts, strict=True):
        points[i] += (1, 2, 0)[verdict]
        points[j] += (1, 0, 2)[verdict]
    ranks = dense([-p for p in points])
    implied = [0 if ranks[i] == ranks[j] else 1 if ranks[i] < ranks[j] else 2 for i, j in pairs]
    return ranks if implied == list(verdicts) else None


def convert_qa_feedback(paths: Sequence[Path], options: Options) -> Converted:
    """
    QA-Feedback (Wu et al. 2023): JSON array with four answers and a verdict on each pair.

    The prompt is the first `options.passages` passages and the question. Verdicts that contradict
    each other, such as A > B > C > A or A = B = C > A, fit no ranking and are dropped.
    """
    result = Converted()
    for where, record in entries(result, paths, read_json_array):
        question = clean(get(record, "question", str, where))
        verdicts = get(record, "preference", list, where)
        if len(verdicts) != 6 or any(verdict not in (0, 1, 2) for verdict in verdicts):
            raise BadInput(f'{where}: key "preference": {verdicts}, expected six of 0, 1, 2')
        answers = [clean(get(record, f"prediction {n}", str, where)) for n in (1, 2, 3, 4)]
        passages = get(record, "passages", list, where)[: options.passages]
        passages = [passage_text(passage, options.passage_chars, where) for passage in passages]
        prompt = "\n\n".join([*passages, f"Question: {question}" if passages else question])
        ranks = weak_order(verdicts, 4)
        if not question:
            result.dropped["empty prompt"] += 1
        elif ranks is None:
            result.dropped["verdicts that fit no ranking"] += 1
        elif len(set(ranks)) == 1:
            result.dropped["all answers tied"] += 1
        else:
            use_case = "closed_qa" if passages else "open_qa"
            base = prompt_record(prompt, own_user(question), "customer", use_case)
            result.comparisons.append(comparison(base, answers, ranks, "qa-feedback"))
    return result


def passage_text(passage: Any, max_chars: int | None, where: str) -> str:
    """
    Write [title, sentence, ...] as "title: text", in at most `max_chars` characters of whole
    sentences, but at least one. The first sentence may repeat the title; that is taken off.
    """
    if not isinstance(passage, list) or not all(isinstance(part, str) for part in passage):
        raise BadInput(f'{where}: key "passages": expected lists of strings')
    title, *sentences = (clean(part) for part in passage or [""])
    text, repeated = f"{title}:", f"{title}\n\n"
    for number, sentence in enumerate(sentences):
        longer = f"{text} {sentence.removeprefix(repeated)}"
        if number > 0 and max_chars is not None and len(longer) > max_chars:
            break
        text = longer
    return text


def convert_summarize(paths: Sequence[Path], options: Options) -> Converted:
    """
    Comparisons of summaries (Stiennon et al. 2020): JSON Lines, `info`, `summaries`, `choice`.

    A post has many pairs of summaries, each its own record. The user is the post, so that its pairs
    are in one split, also with its demonstration in tldr; the labeler is `worker`.
    """
    result = Converted()
    for where, record in entries(result, paths):
        info = get(record, "info", dict, where)
        summaries = get(record, "summaries", list, where)
        texts = [clean(get(summary, "text", str, where)) for summary in summaries]
        choice = get(record, "choice", int, where)
        if len(texts) != 2 or choice not in (0, 1):
            raise BadInput(
                f'{where}: expected two "summaries" and a "choice" of 0 or 1, '
                f"found {len(texts)} and {choice}"
            )
        posts = [get(info, key, str, where, default="") for key in ("post", "article")]
        post = clean(posts[0] or posts[1])
        if not post:
            result.dropped["empty post"] += 1
        elif texts[0] == texts[1]:
            result.dropped["the two summaries are the same"] += 1
        else:
            base = summary_prompt(post, info, where)
            labeler = f"summarize:{get(record, 'worker', str, where, default='unknown')}"
            ranks = [1, 2] if choice == 0 else [2, 1]
            result.comparisons.append(comparison(base, texts, ranks, labeler))
    return result


def summary_prompt(post: str, info: Record, where: str) -> Record:
    """Build the prompt of Stiennon et al. (appendix B): subreddit, title, post, "TL;DR:"."""
    title = clean(get(info, "title", str, where, default=""))
    subreddit = clean(get(info, "subreddit", str, where, default="")).removeprefix("r/")
    head = [f"SUBREDDIT: r/{subreddit}"] if subreddit else []
    head += [f"TITLE: {title}"] if title else []
    prompt = "\n\n".join([*head, f"POST: {post}", "TL;DR:"])
    return prompt_record(prompt, own_user(post), "customer", "summarization")


# --- demonstrations and prompts -----------------------------------------------------------------


def _add_demonstration(result: Converted, base: Record, response: str) -> None:
    response = clean(response)
    if not base["prompt"]:
        result.dropped["empty prompt"] += 1
    elif not response:
        result.dropped["empty response"] += 1
    else:
        first = {"prompt": base["prompt"], "response": response}
        result.demonstrations.append(first | base)


def convert_alpaca(paths: Sequence[Path], options: Options) -> Converted:
    """
    Stanford Alpaca: JSON array of `instruction`, `input`, `output`.

    Instruction and input are joined by a blank line. The set was written by a language model:
    "<noinput>", "No input needed." and the like are no input; an output that is such a
    placeholder, or runs on into the next numbered instruction, is dropped.
    """
    no_input = re.compile(r"\W*no ?input(?: (?:needed|required|necessary|provided))?\W*", re.I)
    no_output = re.compile(r"\W*no ?(?:in|out)put\W*|<no ?(?:in|out)put.*", re.I | re.DOTALL)
    result, keys = Converted(), ("instruction", "input", "output")
    for where, record in entries(result, paths, read_json_array):
        instruction, given, output = (clean(get(record, key, str, where)) for key in keys)
        if no_output.fullmatch(output):
            result.dropped["a placeholder instead of a response"] += 1
        elif re.search(r"\n\d+\. Instruction:", output):
            result.dropped["response runs on into another instruction"] += 1
        else:
            given = "" if no_input.fullmatch(given) else given
            prompt = clean(f"{instruction}\n\n{given}")
            base = prompt_record(prompt, own_user(prompt), "labeler")
            _add_demonstration(result, base, output)
    return result


def convert_dolly(paths: Sequence[Path], options: Options) -> Converted:
    """
    Databricks Dolly: JSON Lines of `instruction`, `context`, `response`, `category`.

    Also takes the dolly_hhrlhf form, `prompt` and `response`, whose prompts carry Alpaca's
    template and no category: the template is taken off again, so that no prompt has one. Reference
    texts are from Wikipedia; its marks of footnotes, such as [42], are taken out of prompts, as the
    set's authors advise.
    """
    result = Converted()
    footnotes = re.compile(
        r"(?<=[^\s\[])\[\d{1,3}\](?:\[(?:\d{1,3}|[a-z]|[a-z -]+(?:needed|\?))\])*"
        r"(?=[\s.,;:)\"'’”A-Z]|$)"
    )
    template = re.compile(
        r"Below is an instruction.*?### Instruction:\n(.*)\n\n### Response:\n?", re.DOTALL
    )
    for where, record in entries(result, paths):
        response = get(record, "response", str, where)
        if "prompt" in record:
            match = template.fullmatch(get(record, "prompt", str, where))
            if not match:
                raise BadInput(
                    f'{where}: key "prompt": expected text between "### Instruction:" and '
                    '"### Response:"'
                )
            prompt, use_case = match[1].replace("\n\n### Input:\n", "\n\n"), "unknown"
        else:
            context = get(record, "context", str, where, default="")
            prompt = f"{get(record, 'instruction', str, where)}\n\n{context}"
            category = get(record, "category", str, where)
            if category not in DOLLY_USE_CASES:
                known = ", ".join(DOLLY_USE_CASES)
                raise BadInput(f'{where}: key "category": {category!r}, expected one of {known}')
            use_case = DOLLY_USE_CASES[category]
        prompt = clean(footnotes.sub("", prompt))
        base = prompt_record(prompt, own_user(prompt), "labeler", use_case)
        _add_demonstration(result, base, response)
    return result


def convert_tldr(paths: Sequence[Path], options: Options) -> Converted:
    """
    TL;DR posts with the summary their author wrote: JSON Lines, `subreddit`, `title`, `post`,
    `summary`. Their test.jsonl is left to the evaluation.
    """
    result = Converted()
    for where, record in entries(result, paths):
        post, summary = (get(record, key, str, where) for key in ("post", "summary"))
        base = summary_prompt(clean(post), record, where)
        base["prompt"] = base["prompt"] if clean(post) else ""
        _add_demonstration(result, base, summary)
    return result


def convert_lottery(paths: Sequence[Path], options: Options) -> Converted:
    """OpenAssistant's prompt lottery: JSON Lines whose lines are strings, not objects."""
    result = Converted()
    for where, value in entries(result, paths):
        if not isinstance(value, str):
            raise BadInput(f"{where}: expected a JSON string, found {type(value).__name__}")
        if prompt := clean(value):
            result.prompts.append(prompt_record(prompt, own_user(prompt), "customer"))
        else:
            result.dropped["empty prompt"] += 1
    return result


# --- documents ----------------------------------------------------------------------------------

MANY_FILES = 10  # from here on a file goes to one split as a whole


def convert_text(paths: Sequence[Path], options: Options) -> Converted:
    """
    Plain text, one document a file, cut into sections of at most `options.section_chars`.

    With ten files or more, all sections of a file go to one split, so that validation text comes
    from other books than training text. With fewer, sections are split one by one.
    """
    result = Converted()
    for path in paths:
        _add_document(result, read_raw(path), path, len(paths) >= MANY_FILES, options)
    return result


def convert_wikitext(paths: Sequence[Path], options: Options) -> Converted:
    """WikiText: one document an article, which begins with a line " = Title = "."""
    result = Converted()
    for path in paths:
        for article in re.split(r"(?m)^(?= = [^=\n]+ = $)", read_raw(path)):
            _add_document(result, article, path, False, options)
    return result


def _add_document(
    result: Converted, text: str, path: Path, whole_file: bool, options: Options
) -> None:
    result.num_read += 1
    lines = (line.rstrip() for line in text.split("\n") if line.strip() != END_OF_TEXT)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    if not text.strip():
        result.dropped["empty document"] += 1
    for section in cut(text, options.section_chars):
        check_blank(section, str(path))
        if END_OF_TEXT in map(str.strip, section.split("\n")):
            remedy = "give another --section_chars"
            raise BadInput(f"{path}: a cut leaves {END_OF_TEXT} alone on its line; {remedy}")
        user = f"file:{path.name}" if whole_file else own_user(section)
        result.documents.append({"text": section, "user": user})


def cut(text: str, limit: int) -> list[str]:
    """
    Cut text into sections of at most `limit` characters: at the last paragraph end in the second
    half of the allowed length, else line end, else space, else anywhere.
    """
    sections = []
    while len(text) > limit:
        for separator in ("\n\n", "\n", " "):
            end = text.rfind(separator, limit // 2, limit)
            if end > 0:
                break
        else:
            end = limit
        sections.append(text[:end])
        text = text[end:].lstrip("\n ")
    return [section for section in [*sections, text] if section.strip()]
