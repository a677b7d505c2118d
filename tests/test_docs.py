"""Words are tested too: README commands exist, its tables equal the code and the tree."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVALUATION = sorted((ROOT / "evaluation").glob("[a-z]*.py"))
SCRIPTS = ("train_sft", "train_rm", "train_ppo")


def section(title: str) -> str:
    """The README's text below a heading, up to the next of the same level."""
    return re.split(r"^## ", README, flags=re.M)[
        [part.split("\n")[0] for part in re.split(r"^## ", README, flags=re.M)].index(title)
    ]


def cells(text: str, column: int) -> list[str]:
    """Code words of one column of a section's table."""
    rows = [line.split("|")[column] for line in text.splitlines() if line.startswith("| `")]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def test_the_glossary_has_the_columns_of_the_logs_and_no_other() -> None:
    logged = set()
    for name in SCRIPTS:
        module = importlib.import_module(name)
        logged |= set(module.LOG) | set(module.TIMING)
    assert set(cells(section("The numbers in the logs"), 1)) == logged


def test_the_file_table_is_the_tree() -> None:
    named = {name.strip("/").split("/")[0] for name in cells(section("What is where"), 1)}
    ignored = {"README.md", ".git", ".gitignore", ".venv", "out"}
    kept = {path.name for path in ROOT.iterdir()} - ignored
    kept = {name for name in kept if not name.endswith("cache") and name not in ("__pycache__",)}
    kept -= {".hypothesis"}
    assert named == kept


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", README, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_modules_run_in_the_readme_exist() -> None:
    for module in set(re.findall(r"python -m ([\w.]+)", README)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module


def commands() -> list[str]:
    """Python commands of the README's code blocks, each on one line."""
    blocks = "".join(re.findall(r"^```\n(.*?)^```", README, flags=re.M | re.S))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_readme_parse(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    name = words.pop(0)
    name = words.pop(0) if name == "-m" else name.removesuffix(".py")
    module = importlib.import_module(name)
    if name in SCRIPTS and not torch.cuda.is_available():
        words += ["--device", "cpu"]  # which a preset would not choose
    args = module.get_args(words)
    named = {word[2:].removeprefix("no-") for word in words if word.startswith("--")}
    assert named <= set(vars(args)) | {"from"}  # spelt in full


def test_the_way_on_one_gpu_is_complete() -> None:
    """Whatever under out/ a command reads is what a command before it wrote."""
    shown = section("One GPU")
    lines = "".join(re.findall(r"^```\n(.*?)^```", shown, flags=re.M | re.S))
    written: set[str] = set()
    for line in lines.replace("\\\n", " ").splitlines():
        out = re.findall(r"(?:--out |> )(out/\S+)", line)
        for path in re.findall(r"out/[\w./]+", line):
            known = any(path == w or path.startswith(w + "/") for w in written)
            assert path in out or known, f"{path} in: {line}"
        written |= set(out)
    for script in ("train_sft", "train_rm", "train_ppo", "sample", "evaluate", "data.label"):
        assert script in lines


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_that_docstrings_name_exist(name: str) -> None:
    module = importlib.import_module(name)
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    defined = set(re.findall(r'add\(\s*"--(\w+)"', source))
    named = set(re.findall(r"--(\w+)", module.__doc__ or "")) | set(
        re.findall(rf"`--(\w+)`(?= to `{name})", README)
    )
    assert named <= defined


def test_every_flag_is_read() -> None:
    for name in SCRIPTS:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for flag in re.findall(r'add\(\s*"--(\w+)"', source):
            assert f"args.{flag}" in source or f'"{flag}"' in source.replace(
                f'add("--{flag}"', ""
            ), f"{name}.py never reads --{flag}"


def test_makefile_flags_exist() -> None:
    """A flag that the Makefile gives to a script is one that the script defines."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    for script in ("train_sft", "train_rm", "train_ppo", "sample", "evaluate"):
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        if script == "evaluate":  # it shares the flags of sampling
            source += (ROOT / "sample.py").read_text(encoding="utf-8")
        defined = set(re.findall(r'add\(\s*"--(?:no-)?(\w+)"', source))
        for line in re.findall(rf"{script}\.py (?:\w+ )?(--.*)$", makefile, flags=re.M):
            line = line.split('"')[0]
            for flag in re.findall(r"--(?:no-)?(\w+)", line):
                assert flag in defined, f"{script}.py has no --{flag}"


def test_stages_side_by_side_have_half_of_the_cores_each() -> None:
    """And those that run alone all: two stages with all cores mostly wait for each other."""
    dry = subprocess.run(
        ["make", "--dry-run", "--always-make", "--no-print-directory", "OUT=x", "demo"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        check=True,
    )
    halves = {}
    for line in dry.stdout.replace("\\\n", " ").splitlines():
        if out := re.search(r"\.py .*--out x/(\S+)", line):
            halves[out[1]] = line.startswith("OMP_NUM_THREADS=")
    assert halves == {
        "base": False,
        "sft": True,
        "init": True,
        "data/train/candidates_1.jsonl": True,
        "data/train/candidates_2.jsonl": True,
        "data/valid/candidates.jsonl": True,
        "rm": False,
        "sft_selected": True,
        "ppo": True,
        "ppo_ptx": True,
        "report/base.json": True,
        "report/sft.json": True,
        "report/ppo.json": True,
        "report/ppo_ptx.json": True,
        "report": False,
    }


@pytest.mark.parametrize("out", ["my out", "out ", "my\tout"])
def test_make_refuses_a_folder_with_white_space(out: str, tmp_path: Path) -> None:
    """`make clean` would remove others: of "my out" the folders "my" and "out"."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("my", "out", out):
        (tmp_path / name).mkdir()
    run = subprocess.run(
        ["make", "clean", f"OUT={out}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))},
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and f'OUT="{out}" has white space; give' in run.stderr
    assert all((tmp_path / name).is_dir() for name in ("my", "out", out))


def rules() -> dict[str, tuple[set[str], str]]:
    """Target -> (what it depends on, its recipe), of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^(\S+): (.*)\n((?:\t.*\n?)*)", makefile, flags=re.M)
    return {target: (set(needs.split()), recipe) for target, needs, recipe in found}


def test_what_reads_raw_data_asks_for_the_folder() -> None:
    readers = {k: recipe for k, (_, recipe) in rules().items() if "$(DATA)" in recipe}
    assert {"$(R)/data/account.txt", "$(R)/public/report.md"} == set(readers)
    for target, recipe in readers.items():
        assert recipe.startswith('\t@test -n "$(DATA)" ||'), target


def imports_of(script: str) -> set[str]:
    """The files of this project that a file imports, and itself."""
    imported = {f"{script}.py"}
    for node in ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")).body:
        names = [alias.name for alias in getattr(node, "names", ())]
        if isinstance(node, ast.ImportFrom):
            packages = ("data", "data.real", "evaluation")
            inside = node.module in packages
            names = [f"{node.module}.{n}" for n in names] if inside else [node.module]
        imported |= {f"{name.replace('.', '/')}.py" for name in names}
    return {path for path in imported if (ROOT / path).is_file()}


@pytest.mark.parametrize(
    ("target", "script"),
    [
        ("$(R)/data/account.txt", "data/real/prepare"),
        ("$(R)/public/report.md", "evaluation/public"),
    ],
)
def test_the_makefile_knows_what_a_command_is_made_of(target: str, script: str) -> None:
    """A command on real data runs again where a file that it imports has changed."""
    mine = imports_of(script)
    assert len(mine) > 4 and mine <= rules()[target][0]


def test_what_decides_a_measurement_makes_the_demo_measure_again() -> None:
    """Beside the files of which the models and the data are made, and so made again."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    measuring = set(re.search(r"^measuring := (.*)", makefile, flags=re.M)[1].split())
    before = {"model.py", "checkpoint.py", *(f"data/{n}.py" for n in ("files", "tokenizer"))}
    mine = imports_of("evaluation/measure") - before - {"data/tiny/world.py"}
    assert len(mine) > 4 and mine <= measuring
    for measured in ("$(measured)", "$(real_measured)"):
        assert "$(measuring)" in rules()[measured][0]


def test_the_sources_in_the_readme_are_those_of_the_table() -> None:
    from data.real.sources import SOURCES

    named = cells(section("On real data"), 1)
    assert sorted(named) == sorted(SOURCES)


def test_flags_of_evaluate_are_read() -> None:
    """By it, or by the files that its commands are in."""
    names = ("evaluate", "sample", *(f"evaluation/{path.stem}" for path in EVALUATION))
    source = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in names)
    flags = re.findall(r'add\(\s*"--(\w+)"', source)
    assert {"sets", "shots", "toxicity_labels", "toxicity_scorer", "best_prefix"} <= set(flags)
    for flag in flags:
        read = f"args.{flag}" in source or f'"{flag}"' in source
        assert read, f"nobody reads --{flag}"
