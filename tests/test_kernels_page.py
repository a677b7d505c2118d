"""docs/kernels.md: what it points to is there, and its recipes work as they are written."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from checkpoint import save_model
from model import GPT, GPTConfig, ScalarModel
from tests.interpreter import needs_triton
from tests.tiny import Tiny

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


class Recipe(NamedTuple):
    """A section of the page: code, the name below which it goes, commands and what they print."""

    file: str
    below: str
    code: str
    commands: list[str]
    printed: list[str]


def recipe(letter: str) -> Recipe:
    text = re.search(rf"^### {letter}\. .*?(?=^##)", PAGE, flags=re.M | re.S)[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    assert [kind for kind, _ in blocks] == ["python", "", "text"]
    code, commands, printed = (block for _, block in blocks)
    file, below = re.match(r"# (\S+), below (\w+)\n", code).groups()
    lines = commands.replace("\\\n", " ").splitlines()
    return Recipe(file, below, code.split("\n", 1)[1], lines, printed.splitlines())


def insert(path: Path, below: str, code: str) -> None:
    """Put `code` below the assignment to the module's variable `below`."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    (end,) = (
        node.end_lineno
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == below
    )
    path.write_text("".join([*lines[:end], f"\n\n{code}", *lines[end:]]), encoding="utf-8")


def line_like(line: str) -> re.Pattern:
    """The same line with other numbers; of a model's answer, any."""
    if line.startswith("base | "):
        return re.compile("base [|].*")
    pattern = re.sub(r"\d[\d,.e+-]*|nan", r"(\\d[\\d,.e+-]*|nan)", re.sub(r" +", " ", line))
    return re.compile(re.sub(r"(?<!\\)\|(?= )", r"\\|", pattern).replace(" ", " +"))


@pytest.fixture(scope="module")
def copy(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository beside a world and models where a demo leaves them."""
    folder = tmp_path_factory.mktemp("repository")
    for path in ("kernels", "data"):
        what = shutil.ignore_patterns("__pycache__", "downloads")
        shutil.copytree(ROOT / path, folder / path, ignore=what)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    train = folder / "out" / "data" / "train"
    train.mkdir(parents=True)
    shutil.copy(tiny.demonstrations, train)
    shutil.copy(tiny.prompts, train / "ppo_prompts.jsonl")
    torch.manual_seed(0)
    end = tiny.encoding.eot_token
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "eos_token_id": end}
    gpt = GPT(GPTConfig(tiny.encoding.n_vocab, 160, **shape))
    tokenizer = tiny.tokenizer.read_text(encoding="utf-8")
    models = {"base": gpt, "init": gpt, "rm": ScalarModel.from_gpt(gpt)}
    for name, model in models.items():
        save_model(folder / "out" / name, model, tokenizer, {"stage": name, "data": []})
    return folder


@needs_triton
@pytest.mark.parametrize("letter", [pytest.param("A", marks=pytest.mark.slow), "B", "C"])
def test_a_recipe_works_as_it_is_written(letter: str, copy: Path) -> None:
    page = recipe(letter)
    path = copy / page.file
    before = path.read_bytes()
    insert(path, page.below, page.code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    said = ""
    try:
        for command in page.commands:
            words = shlex.split(command)
            while "=" in words[0]:
                name, value = words.pop(0).split("=")
                environment[name] = value
            assert words[0] == "python"
            how = {"cwd": copy, "env": environment, "capture_output": True, "text": True}
            run = subprocess.run([sys.executable, *words[1:]], **how)
            assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
            said += run.stdout + run.stderr
    finally:
        path.write_bytes(before)
    for line in page.printed:
        assert line_like(line).search(said), f"nothing like\n{line}\nin\n{said}"


def test_what_a_line_is_like() -> None:
    like = line_like("mine             float32   largest relative error 9.0e-06")
    assert like.search("mine   float32 largest relative error 1.2e-05\n")
    assert not like.search("mine   float16 is wrong")
    like = line_like("x 00020/20 | epoch 1 | loss 1.147")
    assert like.search("x 00002/2 | epoch 1 | loss nan") and not like.search("x 00002/2 epoch 1")


def test_the_ten_words_have_their_lines() -> None:
    """Each row: a link to the file, a function in it, and code of that function."""
    rows = [
        line.split(" | ") for line in PAGE.splitlines() if "](../kernels/" in line and "|" in line
    ]
    assert len(rows) == 10
    for word, _, place in rows:
        file, function, code = re.match(
            r"\[\S+\]\(\.\./(\S+)\): `(\w+)`, `(.*)` \|$", place
        ).groups()
        text = (ROOT / file).read_text(encoding="utf-8")
        lines = text.splitlines()
        (node,) = (n for n in ast.parse(text).body if getattr(n, "name", "") == function)
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        assert code in "\n".join(lines[first - 1 : node.end_lineno]), (word, code)


def test_the_order_of_reading_and_the_number_of_exercises() -> None:
    from kernels.exercises.answers import BUGS, PUZZLES

    assert (len(BUGS), len(PUZZLES)) == (12, 6) and "18 exercises: twelve broken" in PAGE
    order = re.findall(r"^\d\. \[kernels/(\w+)\.py\]", PAGE, flags=re.M)
    assert order == ["ladder", "flash_decoding", "flash_attention", "linear_logprob"]
