"""Words are tested too: what README and docs/ name exists, and their tables equal code and tree."""

import ast
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from data.real.sources import SOURCES

import pytest
import torch

import evaluate
from checkpoint import GPT2_NAMES
from kernels import OPERATIONS, check, flash_attention, linear_logprob, score_mods
from tests.makefile import clean_environment, dry_run
from tests.tiny import Tiny

ROOT = Path(__file__).resolve().parents[1]
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
SCRIPTS = ("train_sft", "train_rm", "train_ppo")
PROGRAMS = (*SCRIPTS, "sample", "evaluate", "data.label", "data.tiny.make", "data.real.prepare")
PROGRAMS += (
    "evaluation.watch",
    "tests.crash",
    "tests.determinism",
    "tests.throughput",
    "tests.claims.__main__",
    "tests.mutants",
    "kernels.exercise",
)
MADE = {"$(R)/data/account.txt": "data/real/prepare", "$(R)/public/report.md": "evaluation/public"}
STIFF = (
    r"stands? (at|far|for|beside)|(is|are) what|so many|of like|like norms|go(es)? on|mended"
    r"|that breaks|asked are|lacks?|eloquent|exchange the name|given win|clear of|interrupted twice"
)


def commands(start: str) -> dict[str, bool]:
    """Commands of all pages -> whether written in full: in a code block, not in a sentence."""
    parts = re.split(r"^```\w*\n(.*?)^```", "\n".join(PAGES.values()), flags=re.M | re.S)
    inline = re.findall(r"`([^`]+)`", "".join(parts[::2]))
    lines = "".join(parts[1::2]).replace("\\\n", " ").splitlines()
    assert len(lines) > 60  # a fence that is misread pairs all later ones wrongly
    found = {code: code in lines for code in inline + lines if code.startswith(start)}
    return {" ".join(re.sub(" +#.*", "", code).split()): whole for code, whole in found.items()}


def cells(text: str, column: int) -> list[str]:
    """Code words of one column of a table, of the rows that begin with a code word."""
    rows = [line.split("|")[column] for line in text.splitlines() if line.startswith("| `")]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def section(text: str, title: str) -> str:
    """The text below a heading of the second level."""
    return re.split(r"^## .*\n", text.split(f"\n## {title}\n")[1], flags=re.M)[0]


def program(words: list[str]) -> tuple[ModuleType, list[str]]:
    """Module and arguments of `FILE.py ...` or `-m MODULE ...`, what follows `python`."""
    first = 2 if words[0] == "-m" else 1
    name = words[first - 1].removesuffix(".py")
    spec = importlib.util.find_spec(name)
    assert spec, f"there is no {name}"
    name += ".__main__" if spec.submodule_search_locations else ""
    with patch.dict(os.environ):  # kernels.compile turns the interpreter off
        return importlib.import_module(name), words[first:]


@lru_cache
def flags_of(name: str, *command: str) -> set[str]:
    """Flags that the --help of a program lists; of `evaluate` alone: those of all its commands."""
    if name == "evaluate" and not command:
        return set().union(*(flags_of(name, each) for each in evaluate.COMMANDS))
    shown, argv = io.StringIO(), [name, *command, "--help"]
    if name.removeprefix("kernels.") in OPERATIONS.values():
        main = partial(check.main, {}, None, [], None)
    else:
        main = importlib.import_module(name).main
    with redirect_stdout(shown), patch.object(sys, "argv", argv), pytest.raises(SystemExit):
        main()
    return set(re.findall(r"^  (?:-h, )?--(\w+)", shown.getvalue(), flags=re.M))


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--(?:no-)?([a-z]\w*)(?![\w-])", text))


def check_command(words: list[str], whole: bool = True) -> None:
    """Its file is there, its flags are spelt in full, and if it is whole its arguments parse."""
    module, args = program(words)
    if named := flags_in(" ".join(word for word in args if " " not in word)):
        command = args[:1] if module.__name__ == "evaluate" else []
        assert named <= flags_of(module.__name__, *command)
    if whole and hasattr(module, "get_args"):
        module.get_args(args)


@pytest.mark.parametrize(("command", "whole"), commands("python ").items())
def test_python_commands_parse(command: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flash_attention, linear_logprob):  # which pages tell their reader to write
        monkeypatch.setitem(module.IMPLS, "mine", module.IMPLS["torch"])
    monkeypatch.setitem(score_mods.SCORE_MODS, "distance", score_mods.SCORE_MODS["alibi"])
    check_command(shlex.split(command)[1:], whole)


@pytest.mark.parametrize("command", commands("make "))
def test_make_commands_exist_and_what_they_run_parses(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as `make gpt2` expects
    words = [word for word in shlex.split(command)[1:] if not word.startswith("-")]
    (target,) = (word for word in words if "=" not in word)
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    for line in dry_run(target, **variables):
        if found := re.search(r"bin/python ((?:\w+\.py|-m (?:data|tests|evaluation)\b).*)", line):
            check_command(shlex.split(found[1]))


def test_flags_that_pages_name_exist() -> None:
    defined = set().union(*(flags_of(name) for name in (*PROGRAMS, "kernels.flash_attention")))
    for name, text in PAGES.items():
        assert flags_in(text) <= defined, name


@pytest.mark.parametrize("name", PROGRAMS)
def test_flags_that_a_docstring_names_exist(name: str) -> None:
    words = re.sub(r" -- .*", "", importlib.import_module(name).__doc__)  # passed on to others
    assert flags_in(words) <= flags_of(name)


@pytest.mark.parametrize("name", PROGRAMS[:5])
def test_every_flag_is_read(name: str) -> None:
    paths = [ROOT / f"{name}.py", ROOT / "run.py"]
    if name == "evaluate":
        paths += [ROOT / "sample.py", *(ROOT / "evaluation").glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)
    for flag in flags_of(name) - {"help"}:
        assert f"args.{flag}" in source or f'"{flag}"' in source, f"nobody reads --{flag}"


def test_the_metrics_page_has_the_columns_of_the_logs(tiny: Tiny, tmp_path: Path) -> None:
    logged, text = set(), ["--val_pretrain_data", str(tiny.pretrain)]
    for name in SCRIPTS:
        stage, out = name.removeprefix("train_"), tmp_path / name
        args = tiny.args(stage, out, "--max_steps", "2", *(text if stage == "sft" else []))
        assert importlib.import_module(name).main(args) == 0
        for log in ("log.csv", "timing.csv"):
            logged |= set((out / log).read_text().split("\n")[0].split(","))
    assert {"pretrain_loss", "val_pretrain_loss", "val_accuracy", "ptx_loss", "val_kl"} <= logged
    assert set(cells(PAGES["metrics.md"], 1)) == logged


def test_the_file_table_is_the_tree() -> None:
    named = {name.strip("/").split("/")[0] for name in cells(section(README, "What is where"), 1)}
    others = {"README.md", ".git", ".gitignore", ".venv", "out", "__pycache__", ".hypothesis"}
    kept = {path.name for path in ROOT.iterdir()} - others
    assert named == {name for name in kept if not name.endswith("cache")}


def test_what_to_change_is_there() -> None:
    """Each row names a file, a function or class of it, and other words of that file."""
    rows = section(README, "Change one thing").splitlines()
    places = [line.split("|")[2] for line in rows if line.startswith("| ")][1:]
    assert len(places) == 10
    for place in places:
        where, *words = re.findall(r"`([^`]+)`", place)
        path, name = where.split(": ")
        source = (ROOT / path).read_text(encoding="utf-8")
        body = ast.parse(source).body
        defined = {d.name for d in body if isinstance(d, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, where
        assert all(re.search(rf"\b{word}\b", source) for word in words), place


def test_the_reading_order_counts_lines() -> None:
    order = section(README, "Learn: the reading order")
    for path, count in re.findall(r"^\|[^|]*\|[^|`]*`([\w/.]+)`[^|]*\| (\d+) \|", order, re.M):
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 0.05 * lines, f"{path} has {lines} lines"


def test_the_sources_and_sizes_are_those_of_the_code() -> None:
    assert sorted(cells(section(PAGES["real_data.md"], "Downloads"), 1)) == sorted(SOURCES)
    sizes = cells(section(PAGES["one_gpu.md"], "Memory and work on paper"), 1)
    assert sizes == list(GPT2_NAMES)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8").lower(), flags=re.M)
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PATHS, ids=lambda path: path.name)
def test_links_and_figures_of_a_page_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page.name]):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("https://"):
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    assert page == PATHS[0] or f"](docs/{page.name})" in README  # README leads to every page


def test_the_readme_is_short_and_pages_are_in_plain_words() -> None:
    assert len(README.splitlines()) <= 200
    for name, text in PAGES.items():
        found = re.search(rf"\b({STIFF})\b", text, flags=re.I)
        assert not found, f"{name}: {found[0]!r}"


def test_no_placeholder_is_left() -> None:
    assert not [found for text in PAGES.values() for found in re.findall(r"@@\w+@@", text)]


def test_stages_side_by_side_have_half_of_the_cores_each() -> None:
    """And those that run alone what is free: two stages with all cores mostly wait for each other.
    The world and the report are made by one thread."""
    threads = {}
    for line in dry_run("demo", OUT="x"):
        if out := re.search(r"\.py .*--out x/(\S+)", line):
            given = re.match(r"OMP_NUM_THREADS=(\d+|\"\$\(.*stages\.py free\)\") ", line)
            threads[out[1]] = "free" if given and "free" in given[1] else given and "half"
    alone = {"base", "rm"}
    both = {"sft", "init", "sft_selected", "ppo", "ppo_ptx", "data/valid/candidates.jsonl"}
    both |= {f"data/train/candidates_{part}.jsonl" for part in (1, 2)}
    both |= {f"report/{model}.json" for model in ("base", "sft", "init", "ppo", "ppo_ptx")}
    assert threads == {"report": None} | dict.fromkeys(alone, "free") | dict.fromkeys(both, "half")


@pytest.mark.parametrize("out", ["my out", "out ", "my\tout"])
def test_make_refuses_a_folder_with_white_space(out: str, tmp_path: Path) -> None:
    """`make clean` would remove others: of "my out" the folders "my" and "out"."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("my", "out", out):
        (tmp_path / name).mkdir()
    how = {"cwd": tmp_path, "env": clean_environment(), "capture_output": True, "text": True}
    run = subprocess.run(["make", "clean", f"OUT={out}"], **how)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and f'OUT="{out}" is empty or has white' in run.stderr
    assert all((tmp_path / name).is_dir() for name in ("my", "out", out))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("clean OUT=data", "holds files of the repository"),
        ("clean demo", "give it alone"),
        ("demo OUT=", "is empty"),
    ],
)
def test_make_clean_deletes_no_source_and_races_with_nothing(words: str, reason: str) -> None:
    how = {"cwd": ROOT, "env": clean_environment(), "capture_output": True, "text": True}
    run = subprocess.run(["make", "--dry-run", *words.split()], **how)
    assert run.returncode == 2 and reason in run.stderr and "rm -rf" not in run.stdout


def rules() -> dict[str, tuple[set[str], str]]:
    """Target -> (what it depends on, its recipe), of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^(\S+): (.*)\n((?:\t.*\n?)*)", makefile, flags=re.M)
    return {target: (set(needs.split()), recipe) for target, needs, recipe in found}


@pytest.mark.parametrize(("target", "script"), MADE.items())
def test_the_makefile_knows_what_a_command_is_made_of(target: str, script: str) -> None:
    """A command on real data asks for the folder, and runs again where an import has changed."""
    imported = {f"{script}.py"}
    for node in ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")).body:
        names = [alias.name for alias in getattr(node, "names", ())]
        if isinstance(node, ast.ImportFrom):
            inside = node.module in ("data", "data.real", "evaluation")
            names = [f"{node.module}.{n}" for n in names] if inside else [node.module]
        imported |= {f"{name.replace('.', '/')}.py" for name in names}
    no_content = {
        "data/flags.py",
        "data/outputs.py",
        "data/commands.py",
    }  # decides what they read, or where to
    mine = {path for path in imported if (ROOT / path).is_file()} - no_content
    needs, recipe = rules()[target]
    assert len(mine) > 4 and mine <= needs
    assert recipe.startswith('\t@test -n "$(DATA)" ||')
    assert {name for name, (_, recipe) in rules().items() if "$(DATA)" in recipe} == set(MADE)
