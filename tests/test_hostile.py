"""Hostile folders, flags and paths: each is one clear line (`BadInput`, or argparse's) and code 2.

Hostile records are in test_files.py, pickles and crafted checkpoints in test_run.py, archives whose
paths climb out in test_downloads.py.
"""

import argparse
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from data.files import BadInput, check_writable, fingerprint, read_jsonl
from data.tokenizer import load_tokenizer

import pytest
import torch
from safetensors.torch import load_file, save_file

import run
from model import GPT, GPTConfig
from tests.crash import STAGES
from tests.tiny import Tiny

CONFIGS = [  # a key of config.json, and values that it must not have
    ("n_layer", [10**9, -1, 2.0, "2", None, True]),
    ("eos_token_id", [-1, None, "x", 10**6]),
    ("initializer_range", ["x", -1.0, None, []]),
    ("score_mod", [["causal"], None, "nope", {}]),
    ("n_embd", [10**12, 33]),
    ("n_head", [0]),
    ("n_positions", [10**15]),
    ("vocab_size", [True, 10**12]),
    ("resid_pdrop", ["x"]),
    ("layer_norm_epsilon", [0]),
    ("activation_function", ["relu"]),
    ("tie_word_embeddings", [0]),
]


def copy_of(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.base, tmp_path / "model"))


def refused(call: Callable[[], object], words: str = "") -> None:
    with pytest.raises(ValueError) as error:  # BadInput, or a kernel's, which name the value
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "values"), CONFIGS)
def test_a_hostile_config_is_refused(key: str, values: list, tiny: Tiny, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for value in values:
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        refused(lambda: GPT.from_pretrained(folder)(torch.zeros(1, 2, dtype=torch.int64)))


def test_a_shape_that_no_memory_holds_is_refused_before_it_is_made() -> None:
    with pytest.raises(BadInput, match="parameters, over 1e[+]12: .* n_layer 1000000000"):
        GPTConfig(300, n_positions=16, n_embd=16, n_layer=10**9, n_head=2, eos_token_id=299)


TENSORS = [torch.ones(32, dtype=kind) for kind in (torch.int64, torch.bool, torch.complex64)]
TENSORS += [torch.full((32,), float("nan")), torch.full((32,), float("inf")), torch.ones(31)]


@pytest.mark.parametrize("tensor", TENSORS, ids="int64 bool complex nan inf shape".split())
def test_hostile_weights_are_refused(tensor: torch.Tensor, tiny: Tiny, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path)
    weights = load_file(folder / "model.safetensors") | {"ln_f.weight": tensor}
    save_file(weights, folder / "model.safetensors")
    refused(lambda: GPT.from_pretrained(folder), "ln_f.weight")


TOKENIZERS: list[tuple[str, Callable[[dict], object]]] = [
    ("distinct entries", lambda c: c | {"ranks": [*c["ranks"][:-1], c["ranks"][0]]}),
    ("256 bytes", lambda c: c | {"ranks": ["zz", *c["ranks"][1:]]}),
    ("an entry is empty", lambda c: c | {"ranks": [*c["ranks"][:-1], ""]}),
    ("UnicodeEncodeError", lambda c: c | {"ranks": [*c["ranks"], "漢"]}),
    ("no attribute 'encode'", lambda c: c | {"ranks": [1, 2]}),
    ("not iterable", lambda c: c | {"ranks": 5}),
    ("distinct entries", lambda c: c | {"ranks": "abc"}),
    ("distinct entries", lambda c: c | {"ranks": dict.fromkeys(c["ranks"])}),
    ("256 bytes", lambda c: c | {"ranks": []}),
    ("pattern: ", lambda c: c | {"pattern": "("}),
    ("pattern: ", lambda c: c | {"pattern": 5}),
    ("matches nothing", lambda c: c | {"pattern": ""}),
    ("matches nothing", lambda c: c | {"pattern": "a*"}),
    ("name is no text", lambda c: c | {"name": 5}),
    *(
        ("end token", lambda c, end=end: c | {"special_tokens": {"<|endoftext|>": end}})
        for end in (5, -1, 2**40, "5", True, None, 1.5)
    ),
    ("special tokens", lambda c: c | {"special_tokens": ["<|endoftext|>"]}),
    ("special tokens", lambda c: c | {"special_tokens": {}}),
    ("expected a JSON object", lambda c: [c]),
    ("'pattern'", lambda c: {k: v for k, v in c.items() if k != "pattern"}),
]


@pytest.mark.parametrize(("words", "change"), TOKENIZERS, ids=range(len(TOKENIZERS)))
def test_a_hostile_tokenizer_is_refused(
    words: str, change: Callable, tiny: Tiny, tmp_path: Path
) -> None:
    content = change(json.loads(tiny.tokenizer.read_text()))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="make it again") as error:
        load_tokenizer(path)
    assert words in str(error.value) and str(error.value).startswith(str(path))


def test_a_deep_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[" * 200_000)
    refused(lambda: load_tokenizer(tmp_path / "t.json"), "nested too deeply")


def test_pipes_and_symlink_loops_are_refused(tmp_path: Path) -> None:
    """A pipe would be waited for without end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for read in (lambda p: read_jsonl(p, "prompts"), fingerprint):
        refused(lambda read=read: read(tmp_path / "pipe"), "pipe or a device")
        refused(lambda read=read: read(tmp_path / "a"), "cannot be read")
    refused(lambda: check_writable(tmp_path / "a"), "cannot be written")


def flags_of(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    """The flags of one of the three scripts that take a number."""
    taken = []

    def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
        taken.extend(parser._actions)
        return run.parse(parser, argv)

    monkeypatch.setattr(script, "parse", parse)
    with pytest.raises(SystemExit):
        script.get_args(["--lr", "nan"])
    return [action for action in taken if isinstance(action.default, int | float) and action.type]


@pytest.mark.parametrize("stage", STAGES)
def test_no_number_of_a_script_is_without_sense(
    stage: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    """Not a number, endless, below all sense, too large; with any other flag as it should be."""
    script = importlib.import_module(f"train_{stage}")
    flags = flags_of(script, monkeypatch)
    assert len(flags) > 12
    for flag in flags:
        for value in ("nan", "inf", "-1e31", "1e31", "x"):
            name = flag.option_strings[0]
            with pytest.raises(SystemExit) as error:
                script.get_args(tiny.args(stage, tmp_path / "out", f"{name}={value}"))
            said = capsys.readouterr().err.splitlines()[-1]
            assert error.value.code == 2 and f"argument {name}: {value}: expected a" in said


FLAGS = {  # of one script, or of * for each that trains
    "*": "--lr=-1 --grad_clip=-1 --seed=-1 --save_every=-1 --batch_size=0 --max_new_tokens=0 "
    "--micro_batch_size=-1 --batch_size=1000000000 --max_prompt_tokens=2.5 --out= --init=",
    "train_sft": "--epochs=0 --n_positions=1 --initializer_range=-1 --resid_pdrop=2",
    "train_rm": "--epochs=0 --warmup_steps=-1",
    "train_ppo": "--kl_coef=-1 --ptx_coef=-1 --gamma=2 --lam=-1 --ema=1.5 --cliprange=-0.2",
    "sample": "--temperature=nan --temperature=inf --seed=-1 --num_prompts=-3 --shares=inf "
    "--part=3/2 --num_responses=1000000000 --device=tpu",
    "evaluate": "--seed=-1 --num_prompts=-1 --num_items=0 --device=tpu",
}
COMMANDS = {f"train_{stage}": stage for stage in STAGES} | {"sample": "sample"}
COMMANDS["evaluate"] = "measure"
CASES = [
    (script, *word.split("="))
    for script in COMMANDS
    for word in f"{FLAGS['*'] if 'train' in script else ''} {FLAGS[script]}".split()
]


@pytest.mark.parametrize(("script", "flag", "value"), CASES)
def test_a_flag_without_sense_is_refused(
    script: str, flag: str, value: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    args = tiny.args(COMMANDS[script], tmp_path / "out", flag, value)
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script).get_args(args)
    said = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and flag in said and "unrecognized" not in said
