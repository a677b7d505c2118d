"""The shape of the house, read off the source: who may import whom, how much of a training loop is
method and how much machinery, how long the files are, and that ruff has formatted them."""

import ast
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_sft", "train_rm", "train_ppo")
# From the ground up: a part imports only what stands below it.
FLOORS = "kernels data, checkpoint generate, model, run, train_sft train_rm train_ppo sample"
FLOORS = [floor.split() for floor in f"{FLOORS}, evaluation, evaluate".split(",")]
LEVEL = {part: level for level, floor in enumerate(FLOORS) for part in floor}
MAY_IMPORT = {  # beside the standard library; with data comes its tokenizer, tiktoken
    "kernels": "torch triton matplotlib",  # matplotlib: the figure of bench.py alone
    "data": "numpy tiktoken regex tqdm pooch requests",
    "checkpoint": "torch numpy safetensors tiktoken data",
    "generate": "torch kernels",
    "model": "torch kernels generate checkpoint",
    "run": "torch numpy kernels checkpoint data",
    **dict.fromkeys(SCRIPTS, "torch numpy tiktoken kernels checkpoint model run data"),
    "sample": "torch numpy tiktoken tqdm kernels checkpoint model run data",
    "evaluation": "torch numpy tiktoken tqdm matplotlib kernels checkpoint model run sample data",
    "evaluate": "torch numpy tqdm kernels checkpoint model run sample data evaluation",
}
MACHINERY = ("run.lap", "run.log", "run.add", "run.max", "run.mean", "run.keep", "run.due")
BUDGETS = [
    ("model", 380),
    ("generate", 210),
    ("checkpoint", 230),
    ("run", 300),
    ("train_sft", 320),
    ("train_rm", 310),
    ("train_ppo", 470),
    ("sample", 260),
    ("evaluate", 140),
]


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# Imports


def files_of(part: str) -> list[Path]:
    return (
        [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else [*ROOT.glob(f"{part}/**/*.py")]
    )


def imported(tree: ast.AST, inside_functions: bool) -> set[str]:
    """Dotted names that a file imports; what stands under TYPE_CHECKING never runs."""
    names, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return names


def check_imports(part: str, text: str) -> None:
    roots = {name.split(".")[0] for name in imported(ast.parse(text), True)}
    others = roots - {part} - set(sys.stdlib_module_names)
    assert others <= set(MAY_IMPORT[part].split()), f"{part}: {sorted(others)}"
    above = {name for name in others & set(LEVEL) if LEVEL[name] >= LEVEL[part]}
    assert not above, f"{part} imports {above}, which stands above or beside it"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_what_stands_below_it(part: str) -> None:
    for file in files_of(part):
        check_imports(part, file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("generate", "from model import GPT"),
        ("train_sft", "def f():\n    import train_rm"),
        ("data", "import torch"),
        ("run", "from model import GPT"),
        ("model", "import matplotlib"),
    ],
)
def test_an_arrow_upwards_is_caught(part: str, line: str) -> None:
    with pytest.raises(AssertionError):
        check_imports(part, line)


def test_no_circle() -> None:
    """Also inside the packages. (graphlib raises CycleError.)"""
    names = {}
    for file in (file for part in MAY_IMPORT for file in files_of(part)):
        dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        names[dotted.removesuffix(".__init__")] = file
    graph = {
        n: imported(ast.parse(f.read_text()), False) & set(names) - {n} for n, f in names.items()
    }
    assert len([*TopologicalSorter(graph).static_order()]) == len(names) > 20


# ------------------------------------------------------------------------------------------------
# Training scripts


def loop_lines(text: str) -> tuple[list[str], list[str]]:
    """Lines of code of the loop over `run.steps`: of the method, and of machinery."""
    (loop,) = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.For) and ast.unparse(node.iter).startswith("run.steps(")
    )
    method, machinery = [], []
    for line in text.splitlines()[loop.body[0].lineno - 1 : loop.end_lineno]:
        line = line.strip()
        if line and not line.startswith("#"):
            of_row = line.startswith(("row ", "row["))
            told = of_row or any(name in line for name in MACHINERY)
            (machinery if told else method).append(line)
    return method, machinery


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loop_is_the_method(script: str) -> None:
    method, machinery = loop_lines(source(script))
    share = len(method) / len(method + machinery)
    print(f"{script}: {len(method)} lines of method, {len(machinery)} of machinery, {share:.2f}")
    assert share >= 0.7 and machinery


@pytest.mark.parametrize("script", SCRIPTS)
def test_few_functions_take_all_arguments(script: str) -> None:
    found = [
        node.name
        for node in ast.walk(ast.parse(source(script)))
        if isinstance(node, ast.FunctionDef) and node.name not in ("main", "get_args")
        if "args" in [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
    ]
    print(f"{script}: {len(found)} take args: {', '.join(found)}")
    assert len(found) <= 6


def code_lines(text: str) -> set[str]:
    """Stripped lines without blank ones, comments and docstrings."""
    lines = [line.strip() for line in text.splitlines()]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return {line for line in lines if line and not line.startswith("#")}


def test_the_scripts_repeat_little_word_for_word() -> None:
    common = set.intersection(*(code_lines(source(script)) for script in SCRIPTS))
    print(f"{len(common)} lines stand in all three")
    assert len(common) <= 60


# ------------------------------------------------------------------------------------------------
# Lengths and format


@pytest.mark.parametrize(("name", "budget"), BUDGETS)
def test_a_file_keeps_near_its_budget(name: str, budget: int) -> None:
    lines = len(source(name).splitlines())
    print(f"{name}.py: {lines} lines, budget {budget}")
    assert lines <= 1.25 * budget


def test_no_line_is_kept_from_the_formatter() -> None:
    mark = "# fmt: " + "skip"
    found = [str(f) for f in ROOT.glob("**/*.py") if "venv" not in str(f) and mark in f.read_text()]
    assert not found


def test_ruff_has_formatted_everything() -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if not ruff:
        pytest.skip("no ruff")
    run = subprocess.run([ruff, "format", "--check", "."], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
