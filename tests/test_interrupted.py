"""Runs that are stopped or changed on the way, beside those of test_resume.py: other settings that
are meant, steps that take long, warnings, bad minibatches, labeling by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_ppo
from checkpoint import read_info
from data.files import BadInput, read_jsonl, read_log, run_command, write_jsonl
from data.tokenizer import encode_prompt
from model import GPT, GPTConfig
from run import Checkpoints
from tests.crash import ROOT, STAGES, Server, contents
from tests.determinism import demo_commands
from tests.determinism import main as determinism
from tests.test_resume import SCRIPTS, assert_same, newest_checkpoint
from tests.tiny import Tiny

# ------------------------------------------------------------------------------------------------
# Other settings that are meant


@pytest.mark.parametrize("stage", STAGES)
def test_changed_settings_that_are_meant_are_said_and_recorded(
    stage: str, server: Server, tiny: Tiny, tmp_path: Path
) -> None:
    """The run goes on with the new ones; killed and resumed after the change, to the same bytes."""
    first = tmp_path / "first"
    args = tiny.args(stage, first, "--save_every", "1")
    moment = 60 if stage == "sft" else 10  # of SFT: after the first epoch
    assert server.run(stage, args, {moment: signal.SIGTERM}).code == 143
    step = int(newest_checkpoint(first).name)
    old = read_info(newest_checkpoint(first))["settings"]
    outs = [Path(shutil.copytree(first, tmp_path / f"out{i}")) for i in (0, 1)]
    more = ["--save_every", "1", "--lr", "0.01"]
    run = server.run(stage, [*tiny.args(stage, outs[0], *more), "--resume_changed"])
    assert run.code == 0
    differ = f"lr was {old['lr']!r}, is 0.01"
    assert run.stderr == f"warning: from step {step} on with other settings: {differ}\n"
    info = read_info(outs[0])
    assert info["settings"] == old | {"lr": 0.01}
    assert info["changes"] == [{"after_step": step, "settings": old}]
    rates = [float(row["lr"]) for row in read_log(outs[0] / "log.csv")]
    assert max(rates[:step]) <= old["lr"] and max(rates[step:]) > max(rates[:step])

    kill = server.run(
        stage, [*tiny.args(stage, outs[1], *more), "--resume_changed"], {12: signal.SIGTERM}
    )
    assert kill.code == 143 and newest_checkpoint(outs[1]).name > f"{step:08d}"
    run = server.run(stage, [*tiny.args(stage, outs[1], *more), "--resume"])
    assert (run.code, run.stderr) == (0, "")
    assert_same(outs[1], outs[0])
    if stage == "sft":  # the epoch of before the change is still this run's
        assert sorted(f.name for f in (outs[1] / "epochs").iterdir()) == ["01", "02"]


def test_without_changes_the_flag_is_resume(
    server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    args = tiny.args("rm", tmp_path / "out")
    assert server.run("rm", args, {60: signal.SIGKILL}).code == -signal.SIGKILL
    run = server.run("rm", [*args, "--resume_changed"])
    assert (run.code, run.stderr) == (0, "")
    assert_same(tmp_path / "out", whole["rm"][0])


def test_another_shape_is_refused_even_if_meant(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    flags = [
        "--pretrain_data",
        str(tiny.pretrain),
        "--tokenizer",
        str(tiny.tokenizer),
        "--out",
        str(out),
        "--n_positions",
        "16",
        "--n_layer",
        "1",
        "--n_head",
        "2",
        "--max_steps",
        "1",
        "--device",
        "cpu",
    ]
    assert SCRIPTS["sft"].main([*flags, "--n_embd", "16"]) == 0
    before = contents(out)
    args = [*flags, "--n_embd", "32", "--resume_changed"]
    assert run_command(lambda: SCRIPTS["sft"].main(args)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}/checkpoints/00000001/state.pt: not the state of such")
    assert contents(out) == before


# ------------------------------------------------------------------------------------------------
# Which checkpoint is this run's


MODEL = GPT(GPTConfig(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=1, eos_token_id=4))


def checkpoint(out: Path, lr: float, step: int, *, resume: bool = True) -> Checkpoints:
    """A run with this --lr goes on, or starts over, and writes a checkpoint."""
    checkpoints = Checkpoints(out, {"lr": lr})
    if resume:
        checkpoints.resume(lambda state: None, changed=True)
    checkpoints.save(step, MODEL, "{}", {}, {})
    return checkpoints


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*"))


def test_a_run_that_went_on_with_other_settings_is_not_undone(tmp_path: Path, capsys) -> None:
    """100 with A, 120 with B: A must not go on at 100 and drop 120; nor after B's return to A."""
    checkpoint(tmp_path, 1.0, 100)
    checkpoint(tmp_path, 2.0, 120)
    with pytest.raises(BadInput, match=r"00000120: --resume with other settings: lr was 2.0, is 1"):
        Checkpoints(tmp_path, {"lr": 1.0}).resume(lambda state: None)
    assert steps_of(tmp_path / "checkpoints") == [100, 120]
    assert Checkpoints(tmp_path, {"lr": 2.0}).resume(lambda state: None) == 120
    capsys.readouterr()
    assert Checkpoints(tmp_path, {"lr": 1.0}).resume(lambda state: None, changed=True) == 120
    assert "from step 120 on with other settings: lr was 2.0" in capsys.readouterr().err
    assert steps_of(tmp_path / "checkpoints") == [100, 120]

    checkpoint(tmp_path, 1.0, 140)
    with pytest.raises(BadInput, match=r"00000140: --resume with other settings: lr was 1.0, is 2"):
        Checkpoints(tmp_path, {"lr": 2.0}).resume(lambda state: None)
    assert steps_of(tmp_path / "checkpoints") == [120, 140]


def test_an_earlier_run_that_was_being_replaced_is_dropped(tmp_path: Path, monkeypatch) -> None:
    """Killed after its first checkpoint, before the earlier run's newer ones were gone."""
    for step in (100, 120):
        earlier = checkpoint(tmp_path, 1.0 + step, step)
    earlier.keep_step(5, MODEL, "{}", {})
    remove = shutil.rmtree

    def killed(path, *args, **kwargs) -> None:
        if Path(path).name == "00000100":
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint(tmp_path, 2.0, 20, resume=False)
    assert {20, 100} <= set(steps_of(tmp_path / "checkpoints"))  # 120 is removed in any order
    assert Checkpoints(tmp_path, {"lr": 2.0}).resume(lambda state: None) == 20
    assert steps_of(tmp_path / "checkpoints") == [20] and steps_of(tmp_path / "steps") == []


def test_kept_steps_stay_until_the_first_checkpoint(tmp_path: Path) -> None:
    """Then an earlier run's go and this run's stay; at a resume, those after the checkpoint go."""
    earlier = checkpoint(tmp_path, 1.0, 30)
    for step in (5, 10, 30):
        earlier.keep_step(step, MODEL, "{}", {})
    run = Checkpoints(tmp_path, {"lr": 2.0})
    run.keep_step(10, MODEL, "{}", {})
    run.keep_step(20, MODEL, "{}", {})
    assert steps_of(tmp_path / "steps") == [5, 10, 20, 30]
    run.save(20, MODEL, "{}", {}, {})
    run.keep_step(40, MODEL, "{}", {})
    assert steps_of(tmp_path / "steps") == [10, 20, 40]
    Checkpoints(tmp_path, {"lr": 2.0}).resume(lambda state: None)
    assert steps_of(tmp_path / "steps") == [10, 20]


def test_a_run_that_stops_before_its_first_checkpoint_drops_no_kept_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "steps" / "00099" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"an earlier run's")

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ppo, "sample", interrupted)
    assert run_command(lambda: train_ppo.main(tiny.args("ppo", tmp_path))) == 130
    assert kept.exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_at_a_resume_is_no_damaged_state(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint(tmp_path, 1.0, 100)

    def restore(_) -> None:
        raise error

    assert run_command(lambda: Checkpoints(tmp_path, {"lr": 1.0}).resume(restore)) == 1
    assert capsys.readouterr().err == "error: out of memory; lower --batch_size\n"


# ------------------------------------------------------------------------------------------------
# Signals, warnings


@pytest.mark.parametrize("stage", STAGES)
def test_a_long_step_is_left_at_the_last_checkpoint(
    stage: str, server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    """--stop_seconds after the signal, which comes while the logs are opened: before step 1."""
    args = tiny.args(stage, tmp_path / "out", "--stop_seconds", "0.00001")
    run = server.run(stage, args, {5: signal.SIGTERM})
    assert run.code == 143
    assert run.stderr == (
        "stopped by a signal in a long step; --resume goes on at the last checkpoint\n"
    )
    assert not list((tmp_path / "out/checkpoints").glob("*"))
    run = server.run(stage, [*tiny.args(stage, tmp_path / "out"), "--resume"])
    assert (run.code, run.stderr) == (0, "")
    assert_same(tmp_path / "out", whole[stage][0])


def test_a_step_that_ends_in_time_is_saved(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is over when the step is: saving may take longer than --stop_seconds."""
    save, loss = Checkpoints.save, SCRIPTS["sft"].backward

    def interrupted(*args) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)

    def slow(*args) -> None:
        time.sleep(1.0)
        save(*args)

    monkeypatch.setattr(SCRIPTS["sft"], "backward", interrupted)
    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr(signal, "SIG_DFL", signal.SIG_IGN)  # the second backward's signal
    args = tiny.args("sft", tmp_path / "out", "--stop_seconds", "0.9")
    assert SCRIPTS["sft"].main(args) == 130
    assert newest_checkpoint(tmp_path / "out").name == "00000001"


def test_a_warning_is_not_repeated_after_a_resume(
    server: Server, tiny: Tiny, tmp_path: Path
) -> None:
    args = tiny.args("ppo", tmp_path / "out", "--save_every", "1", "--kl_limit", "-1000")
    run = server.run("ppo", args, {10: signal.SIGTERM})
    assert run.code == 143 and run.stderr.count("is over --kl_limit -1000") == 1
    run = server.run("ppo", [*args, "--resume"])
    assert (run.code, run.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------
# Which minibatch was not finite


@pytest.mark.parametrize("responses", [1, 2])
@pytest.mark.parametrize("poisoned", ["scores", "values", "value_loss"])
def test_a_bad_minibatch_is_named_with_its_records(
    poisoned: str,
    responses: int,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The second of four: of its scores, of its values, and in its update."""
    rows, updates = [], []

    def score(tokens, lengths, prompt_lengths, *rest):
        mb = original_score(tokens, lengths, prompt_lengths, *rest)
        rows.append([t[:n].tolist() for t, n in zip(tokens, prompt_lengths, strict=True)])
        if len(rows) == 2 and poisoned != "value_loss":
            getattr(mb, poisoned)[0] = float("nan")
            mb.returns = mb.advantages + mb.values
            mb.advantages = mb.advantages + mb.scores[:, None] + mb.values
        return mb

    def update(mb, *rest):
        updates.append(original_update(mb, *rest))
        if len(updates) == 2 and poisoned == "value_loss":
            updates[-1]["value_loss"] = float("inf")
        return updates[-1]

    original_score, original_update = train_ppo.score, train_ppo.update
    monkeypatch.setattr(train_ppo, "score", score)
    monkeypatch.setattr(train_ppo, "update", update)
    args = tiny.args(
        "ppo", tmp_path / "out", "--num_minibatches", "4", "--responses_per_prompt", str(responses)
    )
    assert run_command(lambda: train_ppo.main(args)) == 1
    bad = json.loads((tmp_path / "out/bad_batch.json").read_text())
    phase = "update" if poisoned == "value_loss" else "rollout"
    assert (bad["step"], bad["phase"], bad["minibatch"]) == (1, phase, 2)
    expected = {"scores": "score", "values": "explained_variance", "value_loss": "value_loss"}
    assert expected[poisoned] in bad["values"]
    assert len(updates) == (2 if phase == "update" else 0)  # nothing is trained on bad numbers
    prompts = [
        encode_prompt(tiny.encoding, record["prompt"])
        for record in read_jsonl(tiny.prompts, "prompts")
    ]
    assert rows[1] == [prompt for prompt in rows[1][::responses] for _ in range(responses)]
    assert bad["records"] == sorted(1 + prompts.index(prompt) for prompt in rows[1][::responses])
    error = capsys.readouterr().err
    assert f"({phase}, minibatch 2)" in error and error.count("\n") == 1


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
    args = tiny.args(
        "ppo",
        tmp_path / "out",
        "--val_data",
        str(tmp_path / "v.jsonl"),
        "--batch_size",
        "5",
        "--num_minibatches",
        "1",
        "--max_steps",
        "1",
    )
    assert train_ppo.main(args) == 0
    _, one, other = drawn  # the rollout, then validation
    assert one.shape == other.shape and not torch.equal(one, other)
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
    command = [
        sys.executable,
        "-m",
        "data.label",
        "--data",
        str(data),
        "--out",
        str(out),
        "--interactive",
    ]
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
    assert len(commands) == 19 and made[0][0] == "tiny_world"
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
