"""Small raw files in the schemas of the public data sets, for tests of the converters."""

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
    return {
        "chosen": f"{context}\n\nAssistant:{chosen}",
        "rejected": f"{context}\n\nAssistant:{rejected}",
    }


def node(role: str, text: str, replies: tuple = (), **keys: object) -> dict:
    return {"role": role, "text": text, "replies": list(replies), "lang": "en", **keys}


def qa(question: str, preference: list[int], passages: list | None = None, **keys: object) -> dict:
    answers = {f"prediction {n}": f"answer {n}" for n in (1, 2, 3, 4)}
    return {
        "question": question,
        "passages": passages or [],
        "preference": preference,
        **answers,
        **keys,
    }
