"""Labeling by hand that is killed; the command that runs everything twice; validation in PPO."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from data.files import read_jsonl, write_jsonl

import pytest
import torch

import train_ppo
from checkpoint import read_info
from tests.crash import ROOT
from tests.determinism import demo_commands
from tests.determinism import main as determinism
from tests.tiny import Tiny


def test_validation_batches_have_random_numbers_of_their_own(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times one prompt in batches of five: the same draws would give five answers twice."""
    record = read_jsonl(tiny.prompts, "prompts")[0]
    write_jsonl(tmp_path / "v.jsonl", [record] * 10, "prompts")
    drawn, original = [], train_ppo.sample

    def sample(*args):
        tokens, *lengths = original(*args)
        drawn.append(tokens)
        return tokens, *lengths

    monkeypatch.setattr(train_ppo, "sample", sample)
    more = [
        "--batch_size",
        "5",
        "--num_minibatches",
        "1",
        "--responses_per_prompt",
        "1",
        "--max_steps",
        "1",
    ]
    args = tiny.args("ppo", tmp_path / "out", *more, "--val_data", str(tmp_path / "v.jsonl"))
    assert train_ppo.main(args) == 0
    first, second, _, _, one, other = drawn  # validation, the rollout twice, validation
    assert one.shape == other.shape and not torch.equal(one, other)
    assert first.shape == second.shape and not torch.equal(first, second)
    assert read_info(tmp_path / "out")["data"] == [str(tiny.prompts), str(tiny.pretrain)]


# ------------------------------------------------------------------------------------------------
# Labeling by hand


def test_a_killed_labeling_session_loses_no_ranking(tiny: Tiny, tmp_path: Path) -> None:
    """Also where the file has the same candidates twice: they are asked for twice."""
    data, out = tmp_path / "candidates.jsonl", tmp_path / "out.jsonl"
    records = [
        r | {"models": ["m"] * len(r["responses"])}
        for r in read_jsonl(tiny.comparisons, "comparisons")[:2]
    ]
    write_jsonl(data, [records[0], records[0], records[1]], "candidates")
    command = [sys.executable, "-m", "data.label", "--interactive", "--data", data, "--out", out]
    answer = " ".join(str(1 + i) for i in range(4)) + "\n"
    for number in (1, 2):
        session = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        session.stdin.write(answer.encode())
        session.stdin.flush()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            out.exists() and len(read_jsonl(out, "comparisons")) == number
        ):
            time.sleep(0.02)
        session.kill()
        session.wait()
        session.stdin.close()
        done = read_jsonl(out, "comparisons")
        assert [r["prompt"] for r in done] == [records[0]["prompt"]] * number
    (tmp_path / ".out.jsonl.123.tmp").write_text("half")
    last = subprocess.run(command, cwd=ROOT, input=b"1=2 3 4 5\n", capture_output=True, check=True)
    assert b"2 ranked, 1 to go" in last.stdout
    assert len(read_jsonl(out, "comparisons")) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["candidates.jsonl", "out.jsonl"]


# ------------------------------------------------------------------------------------------------
# The command that runs everything twice


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_small_demo_has_every_stage_of_the_makefile() -> None:
    commands = demo_commands(Path("o"), 3)
    (cat,) = [argv for name, argv in commands if name == "cat"]
    parts = [f"o/data/train/candidates_{i}.jsonl" for i in (1, 2)]
    assert cat == [*parts, ">", "o/data/train/candidates.jsonl"]
    commands = [command for command in commands if command[0] != "cat"]
    made = [(name, argv[argv.index("--out") + 1]) for name, argv in commands]
    folders = ("base", "sft", "init", "rm", "ppo", "ppo_ptx", "sft_selected", "report", "data")
    assert {out for _, out in made} >= {f"o/{folder}" for folder in folders}
    assert len(commands) == 20 and made[0][0] == "tiny_world"
    assert made[-1] == ("evaluate", "o/report")
    order = [out for _, out in made]
    for first, then in (
        ("base", "sft"),
        ("base", "init"),
        ("sft", "rm"),
        ("rm", "ppo"),
        ("init", "ppo_ptx"),
        ("ppo_ptx", "report/ppo_ptx.json"),
    ):
        assert order.index(f"o/{first}") < order.index(f"o/{then}")
    assert all("3" == argv[argv.index("--seed") + 1] for _, argv in commands[:-1])


def test_two_folders_are_compared_by_every_byte_but_clocks(
    tmp_path: Path, whole: dict, capsys: pytest.CaptureFixture
) -> None:
    one, other = whole["rm"][0], Path(shutil.copytree(whole["rm"][0], tmp_path / "other"))
    (other / "timing.csv").write_text("step\n")
    assert determinism([str(one), str(other)]) == 0
    assert "2 folders" in (said := capsys.readouterr().out) and "all equal" in said
    (other / "extra").write_text("")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    (other / "log.csv").unlink()
    assert determinism([str(one), str(other)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["differs: extra", "differs: log.csv", "differs: model.safetensors"]
    assert said[3].endswith("3 files differ")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_small_demo_is_the_same_twice() -> None:
    assert determinism([]) == 0
