"""Small raw files in the schemas of the public data sets, for tests of what reads them."""

import gzip
import json
from pathlib import Path


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def write_text(path: Path, text: str) -> Path:
    put(
        path.parent,
        {path.name: gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()},
    )
    return path


def write_lines(path: Path, *values: object) -> Path:
    return write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def write_json(path: Path, value: object) -> Path:
    return write_text(path, json.dumps(value))


def hh(context: str, chosen: str, rejected: str) -> dict:
    both = {"chosen": chosen, "rejected": rejected}
    return {key: f"{context}\n\nAssistant:{reply}" for key, reply in both.items()}


def node(role: str, text: str, replies: tuple = (), **keys: object) -> dict:
    return {"role": role, "text": text, "replies": list(replies), "lang": "en", **keys}


def ranked(text: str, ranks: dict[str, int | None], **keys: object) -> dict:
    """A prompter's message with replies of these ranks."""
    replies = [node("assistant", reply, rank=rank) for reply, rank in ranks.items()]
    return node("prompter", text, replies, **keys)


def tree(name: object, prompt: dict) -> dict:
    return {"message_tree_id": str(name), "prompt": prompt}


def qa(question: str, preference: list[int], passages: list | None = None) -> dict:
    answers = {f"prediction {n}": f"answer {n}" for n in (1, 2, 3, 4)}
    return {"question": question, "passages": passages or [], "preference": preference, **answers}


def alpaca(instruction: str, given: str, output: str) -> dict:
    return {"instruction": instruction, "input": given, "output": output}


def dolly(instruction: str, context: str, response: str, category: str) -> dict:
    keys = ("instruction", "context", "response", "category")
    return dict(zip(keys, (instruction, context, response, category), strict=True))


def tldr(title: str, post: str, summary: str) -> dict:
    return {"subreddit": "advice", "title": title, "post": post, "summary": summary}


def pair(post: str, first: str, second: str, choice: int = 0, **keys: object) -> dict:
    """A comparison of two summaries."""
    info = {"post": post, "title": "Help", "subreddit": "r/advice"}
    return {
        "info": info,
        "summaries": [{"text": first}, {"text": second}],
        "choice": choice,
        **keys,
    }
