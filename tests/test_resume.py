"""Runs that are interrupted, and runs that cannot begin: the three scripts, from the outside.

The short version of `python -m tests.crash`: real processes die before chosen file operations, are
resumed, and must leave what an uninterrupted run leaves, bit for bit.
"""

import hashlib
import importlib
import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import model as model_file
from data.files import fingerprint, read_log, run_command
from data.tokenizer import save_tokenizer, train_bpe
from run import Checkpoints
from tests.crash import STAGES, Server, bytes_lost, contents, run_dying_at, run_killed, same_steps
from tests.tiny import Tiny

SCRIPTS = {stage: importlib.import_module(f"train_{stage}") for stage in STAGES}


def assert_same(out: Path, whole: Path) -> None:
    reference, found = contents(whole), contents(out)
    assert sorted(reference) == sorted(found)
    differ = [name for name, content in reference.items() if content != found[name]]
    assert not differ and bytes_lost(reference, found) == 0
    assert same_steps(out)


# ------------------------------------------------------------------------------------------------
# Killed and resumed


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_a_function_of_its_arguments(
    stage: str, server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    assert server.run(stage, tiny.args(stage, tmp_path / "again")).code == 0
    assert_same(tmp_path / "again", whole[stage][0])
    assert server.run(stage, tiny.args(stage, tmp_path / "other", "--seed", "1")).code == 0
    assert bytes_lost(contents(whole[stage][0]), contents(tmp_path / "other")) > 1000


@pytest.mark.parametrize("stage", STAGES)
def test_dying_at_a_file_operation_loses_nothing(
    stage: str, server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    """Also over an earlier run of other settings, whose files must all be gone at the end."""
    reference, _ = whole[stage]
    earlier, over = tmp_path / "earlier", tmp_path / "over"
    assert server.run(stage, tiny.args(stage, earlier, "--seed", "9")).code == 0
    shutil.copytree(earlier, over)
    operations = server.run(stage, tiny.args(stage, over)).operations
    for number in sorted(random.Random(stage).sample(range(1, operations + 1), 7)):
        out = tmp_path / f"dies-at-{number}"
        shutil.copytree(earlier, out)
        run_dying_at(server, stage, tiny.args(stage, out), number)
        assert_same(out, reference)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_until_done(
    stage: str, server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    moments = random.Random(stage)
    delays = iter(lambda: moments.uniform(0, 0.4), None)
    run_killed(server, stage, tiny.args(stage, tmp_path / "out"), delays, most=5)
    assert_same(tmp_path / "out", whole[stage][0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_saves_and_says_so(
    stage: str,
    number: signal.Signals,
    code: int,
    server: Server,
    tiny: Tiny,
    whole: dict,
    tmp_path: Path,
) -> None:
    """In the middle of a run without --save_every: the checkpoint is of that very step."""
    out = tmp_path / "out"
    args = tiny.args(stage, out, "--save_every", "0")
    run = server.run(stage, args, {5: number})  # while the logs are opened
    assert run.code == code
    name = "iteration" if stage == "ppo" else "step"
    assert run.stderr == f"stopped by a signal after {name} 1; --resume goes on\n"
    assert [row["step"] for row in read_log(out / "log.csv")] == ["1"]
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["00000001"]
    assert not (out / "model.safetensors").exists()
    assert server.run(stage, [*tiny.args(stage, out), "--resume"]).code == 0
    assert_same(out, whole[stage][0])


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_without_damage(
    second: signal.Signals, server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    args = tiny.args("sft", tmp_path / "out")
    run = server.run("sft", args, {25: signal.SIGINT, 26: second})
    assert run.code == -second
    assert server.run("sft", [*args, "--resume"]).code == 0
    assert_same(tmp_path / "out", whole["sft"][0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_stops_a_run_and_loses_nothing(
    stage: str, server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    out, operations = tmp_path / "out", whole[stage][1]
    args = tiny.args(stage, out)
    run = server.run(stage, args, dict.fromkeys(range(operations // 2, 9999), "full"))
    assert run.code == 1
    assert run.stderr.startswith("error: ") and run.stderr.endswith("the disk is full\n")
    assert run.stderr.count("\n") == 1
    assert server.run(stage, [*args, "--resume"]).code == 0
    assert_same(out, whole[stage][0])


def newest_checkpoint(out: Path) -> Path:
    return max((out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "state.pt").write_bytes((f / "state.pt").read_bytes()[:-1]),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "config.json").write_text("{}"),
        lambda f: (f / "SHA256SUMS").unlink(),
        lambda f: (f / "log.csv").write_text(""),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable, server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole["rm"][0], tmp_path / "out"))
    damaged = newest_checkpoint(out)
    damage(damaged)
    run = server.run("rm", [*tiny.args("rm", out), "--resume"])
    assert run.code == 0
    assert run.stderr == f"warning: {damaged} is damaged; trying the one before\n"
    assert_same(out, whole["rm"][0])


def test_a_run_without_an_intact_checkpoint_starts_over(
    server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole["ppo"][0], tmp_path / "out"))
    for folder in (out / "checkpoints").iterdir():
        (folder / "state.pt").write_bytes(b"")
    run = server.run("ppo", [*tiny.args("ppo", out), "--resume"])
    assert run.code == 0 and run.stderr.count("is damaged") == 2
    assert_same(out, whole["ppo"][0])


class Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("state", [Evil(), {"step": Evil()}, {"step": 2}, [1, 2], None])
def test_a_crafted_state_is_refused_and_not_executed(
    state: object,
    tiny: Tiny,
    whole: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A pickle in place of a checkpoint, with checksums that are right."""
    monkeypatch.chdir(tmp_path)
    out = Path(shutil.copytree(whole["rm"][0], tmp_path / "out"))
    folder = newest_checkpoint(out)
    torch.save(state, folder / "state.pt")
    write_checksums(folder)
    args = [*tiny.args("rm", out), "--resume"]
    assert run_command(lambda: SCRIPTS["rm"].main(args)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}/state.pt: not the state of such a run")
    assert error.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def write_checksums(folder: Path) -> None:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in folder.iterdir()
        if path.name != "SHA256SUMS"
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


# ------------------------------------------------------------------------------------------------
# Other settings, earlier results


OTHER = {
    "sft": [("lr", 0.25), ("pretrain_fraction", 0.5), ("max_steps", 3), ("dtype", "bfloat16")],
    "rm": [("lr", 0.25), ("epochs", 1), ("grad_clip", 0.0)],
    "ppo": [("kl_coef", 0.5), ("ptx_coef", 0.0), ("seed", 4), ("num_minibatches", 4)],
}


@pytest.mark.parametrize("stage", STAGES)
def test_other_settings_are_refused_with_the_list(
    stage: str, tiny: Tiny, whole: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = Path(shutil.copytree(whole[stage][0], tmp_path / "out"))
    before = contents(out)
    recorded = json.loads((out / "config.json").read_text())["settings"]
    args = [*tiny.args(stage, out), "--resume"]
    for name, value in OTHER[stage]:
        args += [f"--{name}", str(value)]
    assert run_command(lambda: SCRIPTS[stage].main(args)) == 2
    error = capsys.readouterr().err
    assert f"{newest_checkpoint(out)}: --resume with other settings: " in error
    for name, value in OTHER[stage]:
        assert f"{name} was {recorded[name]!r}, is {value!r}" in error
    assert error.count("\n") == 1 and error.count(" was ") == len(OTHER[stage])
    assert contents(out) == before


@pytest.mark.parametrize("stage", STAGES)
def test_other_data_under_the_same_name_is_refused(
    stage: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = {"sft": tiny.demonstrations, "rm": tiny.comparisons, "ppo": tiny.prompts}[stage]
    copy = Path(shutil.copy(data, tmp_path / "data.jsonl"))
    args = tiny.args(stage, tmp_path / "out", "--data", str(copy), "--max_steps", "2")
    assert SCRIPTS[stage].main(args) == 0
    assert SCRIPTS[stage].main([*args, "--resume"]) == 0
    lines = copy.read_text().splitlines()
    copy.write_text("\n".join(lines[1:] + lines[:1]) + "\n")
    capsys.readouterr()
    assert run_command(lambda: SCRIPTS[stage].main([*args, "--resume"])) == 2
    error = capsys.readouterr().err
    assert "other settings: sha256 was" in error and fingerprint(copy) in error


def test_where_checkpoints_go_and_how_often_may_change(
    server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    run = server.run("ppo", tiny.args("ppo", first, "--save_every", "1"), {40: signal.SIGTERM})
    assert run.code == 143
    moved = first.rename(tmp_path / "moved")
    assert server.run("ppo", [*tiny.args("ppo", moved), "--resume"]).code == 0
    for name in ("model.safetensors", "log.csv"):  # which checkpoints are kept may differ
        assert (moved / name).read_bytes() == (whole["ppo"][0] / name).read_bytes()


def test_several_responses_a_prompt_resume_exactly(
    server: Server, tiny: Tiny, tmp_path: Path
) -> None:
    """With prompts in parts and validation, which has one response a prompt."""
    more = [
        "--responses_per_prompt",
        "2",
        "--rollout_size",
        "4",
        "--save_every",
        "1",
        "--val_data",
        str(tiny.prompts),
    ]
    assert server.run("ppo", tiny.args("ppo", tmp_path / "whole", *more)).code == 0
    args = tiny.args("ppo", tmp_path / "out", *more)
    assert server.run("ppo", args, {40: signal.SIGTERM}).code == 143
    assert server.run("ppo", [*args, "--resume"]).code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("stage", STAGES)
def test_an_earlier_result_stays_until_the_first_checkpoint(
    stage: str, server: Server, tiny: Tiny, whole: dict, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole[stage][0], tmp_path / "out"))
    before = contents(out)
    run = server.run(stage, tiny.args(stage, out, "--seed", "5"), {8: signal.SIGKILL})
    assert run.code == -signal.SIGKILL
    after = contents(out)
    assert ".log.csv.new" in after  # the new run had begun
    assert {name: after.get(name) for name in before} == before
    assert server.run(stage, [*tiny.args(stage, out), "--resume"]).code == 0
    assert_same(out, whole[stage][0])


# ------------------------------------------------------------------------------------------------
# Planted bugs: a harness that sees no difference would see none here either


def dropout_not_seeded_by_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "manual_seed", lambda seed: torch.default_generator)


def optimizer_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)


def average_not_restored(patch: pytest.MonkeyPatch) -> None:
    original, calls = model_file.GPT.load_state_dict, []

    def load(self, *args, **kwargs):
        calls.append(self)
        if not kwargs and len(calls) % 2 == 0:  # policy, then average
            return None
        return original(self, *args, **kwargs)

    patch.setattr(model_file.GPT, "load_state_dict", load)


def log_not_cut_back(patch: pytest.MonkeyPatch) -> None:
    module = sys.modules["run"]
    original = module.read_log

    def read(path, columns=None):
        rows = original(path, columns)
        log = path.parents[2] / "log.csv"
        (path.parent / "log.csv").write_bytes(log.read_bytes())
        return rows

    patch.setattr(module, "read_log", read)


def epoch_kept_only_by_save(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Checkpoints, "_keep_epoch", lambda self, checkpoint: None)


@pytest.mark.parametrize(
    ("stage", "bug"),
    [
        ("sft", dropout_not_seeded_by_step),
        ("sft", optimizer_not_restored),
        ("rm", optimizer_not_restored),
        ("ppo", optimizer_not_restored),
        ("ppo", average_not_restored),
        ("rm", log_not_cut_back),
        ("sft", epoch_kept_only_by_save),
    ],
)
def test_planted_bug_is_caught(
    stage: str,
    bug: Callable,
    server: Server,
    tiny: Tiny,
    whole: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, reference = tmp_path / "out", whole[stage][0]
    run = server.run(stage, tiny.args(stage, out), {whole[stage][1] * 2 // 3: signal.SIGKILL})
    assert run.code == -signal.SIGKILL
    if bug is epoch_kept_only_by_save:
        shutil.rmtree(out / "epochs", ignore_errors=True)
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    assert SCRIPTS[stage].main([*tiny.args(stage, copy), "--resume"]) == 0
    if bug is not epoch_kept_only_by_save:
        assert_same(copy, reference)  # resumed in this process: the bug alone is to blame below
    bug(monkeypatch)
    assert SCRIPTS[stage].main([*tiny.args(stage, out), "--resume"]) == 0
    with pytest.raises(AssertionError):
        assert_same(out, reference)


# ------------------------------------------------------------------------------------------------
# Runs that cannot begin: exit 2, one line, nothing overwritten


def flag_of(stage: str) -> str:
    return {"sft": "demonstrations", "rm": "comparisons", "ppo": "prompts"}[stage]


def edited(tiny: Tiny, tmp_path: Path, kind: str, edit: Callable[[dict], dict]) -> str:
    """A copy of a file of records whose third is changed."""
    records = [json.loads(line) for line in getattr(tiny, kind).read_text().splitlines()]
    records[2] = edit(records[2])
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def malformed(tiny: Tiny, tmp_path: Path, kind: str) -> str:
    lines = getattr(tiny, kind).read_text().splitlines()
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]) + "\n")
    return str(path)


def other_tokenizer(tiny: Tiny, tmp_path: Path) -> str:
    folder = Path(shutil.copytree(tiny.rm, tmp_path / "rm"))
    save_tokenizer(train_bpe(["other words altogether"], 300), folder / "tokenizer.json")
    return str(folder)


def pickled(tiny: Tiny, tmp_path: Path) -> str:
    folder = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    torch.save({"wte.weight": torch.zeros(2)}, folder / "model.safetensors")
    return str(folder)


def small_vocabulary(tiny: Tiny, tmp_path: Path) -> str:
    folder = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    save_tokenizer(train_bpe(["a b c d e f g h i"], 257), folder / "tokenizer.json")
    return str(folder)


# stage, what is given, and what the line on stderr says
BAD_INPUT = [
    *(
        (
            stage,
            lambda t, p, s=stage: ["--data", malformed(t, p, flag_of(s))],
            r"{tmp}/.*\.jsonl:3: not JSON",
        )
        for stage in STAGES
    ),
    *(
        (stage, lambda t, p: ["--data", f"{p}/absent.jsonl"], "{tmp}/absent.jsonl: no such file")
        for stage in STAGES
    ),
    *(
        (stage, lambda t, p: ["--init", f"{p}/absent"], "{tmp}/absent/.*[Nn]o such file")
        for stage in STAGES
    ),
    *(
        (
            stage,
            lambda t, p: ["--out", f"{t.tokenizer}/below/a/file"],
            "tokenizer.json/below/a/file: cannot be written",
        )
        for stage in STAGES
    ),
    *((stage, lambda t, p: ["--init", str(t.rm)], "expected a language model") for stage in STAGES),
    *(
        (stage, lambda t, p: ["--init", pickled(t, p)], "not a readable safetensors file")
        for stage in STAGES
    ),
    *(
        (
            stage,
            lambda t, p: ["--init", small_vocabulary(t, p)],
            "do not fit a model with vocab_size",
        )
        for stage in STAGES
    ),
    *(
        (
            stage,
            lambda t, p: ["--max_new_tokens", "13"],
            "--max_prompt_tokens 36 and --max_new_tokens 13 come to more than the context of 48",
        )
        for stage in STAGES
    ),
    *(
        (stage, lambda t, p: ["--kernels", "triton", "--dtype", "bfloat16"], "impl 'triton' ")
        for stage in STAGES
    ),
    *(
        (
            stage,
            lambda t, p: ["--max_prompt_tokens", "2"],
            "no prompt (is within|with a pair that is not tied is left)",
        )
        for stage in STAGES
    ),
    (
        "sft",
        lambda t, p: ["--data", edited(t, p, "demonstrations", lambda r: r | {"response": ""})],
        'demonstrations.jsonl:3: key "response": expected a string that is not blank',
    ),
    (
        "rm",
        lambda t, p: [
            "--demonstrations",
            edited(t, p, "demonstrations", lambda r: r | {"response": " "}),
        ],
        'demonstrations.jsonl:3: key "response": expected a string that is not blank',
    ),
    (
        "rm",
        lambda t, p: [
            "--data",
            edited(t, p, "comparisons", lambda r: r | {"responses": r["responses"][:1]}),
        ],
        'key "responses": expected at least 2, found 1',
    ),
    (
        "rm",
        lambda t, p: [
            "--data",
            edited(t, p, "comparisons", lambda r: r | {"ranks": r["ranks"][1:]}),
        ],
        'key "ranks": expected one entry for each of the',
    ),
    (
        "rm",
        lambda t, p: [
            "--data",
            edited(t, p, "comparisons", lambda r: r | {"ranks": [str(x) for x in r["ranks"]]}),
        ],
        'key "ranks": expected a list of whole numbers',
    ),
    ("ppo", lambda t, p: ["--reward_model", str(t.base)], "expected a reward model"),
    ("ppo", lambda t, p: ["--reward_model", other_tokenizer(t, p)], "must share a tokenizer"),
    ("ppo", lambda t, p: ["--ptx_tokens", "99999"], "is over the policy.s context of 48"),
    ("sft", lambda t, p: ["--pretrain_data", f"{p}/absent.txt"], "{tmp}/absent.txt: no such file"),
]


@pytest.mark.parametrize(
    ("stage", "more", "message"), BAD_INPUT, ids=[f"{case[0]}-{case[2]}" for case in BAD_INPUT]
)
def test_bad_input_exits_with_2_and_one_line(
    stage: str,
    more: Callable,
    message: str,
    tiny: Tiny,
    whole: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = Path(shutil.copytree(whole[stage][0], tmp_path / "out"))
    before = contents(out)
    args = [*tiny.args(stage, out), *more(tiny, tmp_path)]
    assert run_command(lambda: SCRIPTS[stage].main(args)) == 2
    error = capsys.readouterr().err
    assert re.search(message.replace("{tmp}", re.escape(str(tmp_path))), error), error
    assert error.startswith("error: ") and error.count("\n") == 1
    after = {name: content for name, content in contents(out).items() if ".csv.new" not in name}
    assert after == before  # at most an empty log was begun beside the old one


BAD_ARGUMENTS = [
    *(
        (stage, [flag, value], f"{flag} {value}: expected at least")
        for stage in STAGES
        for flag, value in (
            ("--batch_size", "0"),
            ("--epochs", "0"),
            ("--max_new_tokens", "0"),
            ("--micro_batch_size", "-1"),
            ("--save_every", "-1"),
        )
    ),
    *((stage, ["--device", "tpu"], "argument --device: invalid choice") for stage in STAGES),
    *((stage, ["--lr", "fast"], "argument --lr: invalid float value") for stage in STAGES),
    *((stage, ["--prese", "gpt2"], "unrecognized arguments: --prese gpt2") for stage in STAGES),
    ("sft", ["--pretrain_fraction", "1"], "--pretrain_fraction 1.0: expected between 0 and 1"),
    ("ppo", ["--num_minibatches", "3"], "--batch_size 8 is not a multiple of --num_minibatches 3"),
    ("ppo", ["--temperature", "0"], "--temperature 0.0: expected over 0"),
    ("ppo", ["--pretrain_data", ""], "--ptx_coef over 0 needs --pretrain_data"),
    ("ppo", ["--ptx_tokens", "1"], "--ptx_tokens 1: expected at least 2"),
    ("ppo", ["--ptx_ratio", "0.1"], "--ptx_ratio 0.1: leaves no pretraining sequence"),
    ("ppo", ["--ptx_ratio", "-1"], "--ptx_ratio -1.0: leaves no pretraining sequence"),
]


@pytest.mark.parametrize(("stage", "more", "message"), BAD_ARGUMENTS)
def test_bad_arguments_exit_with_2(
    stage: str,
    more: list[str],
    message: str,
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        SCRIPTS[stage].main([*tiny.args(stage, tmp_path / "out"), *more])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_into_its_own_input_is_refused(
    stage: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for flag in ["--init"] + ["--reward_model", "--check_model"] * (stage == "ppo"):
        with pytest.raises(SystemExit):
            SCRIPTS[stage].main(tiny.args(stage, tmp_path / "x", flag, f"{tmp_path}/y/../x"))
        assert f"is {flag}, which it would replace" in capsys.readouterr().err


def test_a_missing_gpu_is_named(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for stage in STAGES:
        with pytest.raises(SystemExit):
            SCRIPTS[stage].main(tiny.args(stage, tmp_path / "x", "--device", "cuda"))
        assert "--device cuda: there is no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_no_longer_finite_stops(
    stage: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Exit 1 with the step, its records in a file; the last good checkpoint stays, no result."""
    flags = ["--lr", "1e30", "--save_every", "1", "--grad_clip", "0"]
    args = tiny.args(stage, tmp_path / "out", *flags)
    assert run_command(lambda: SCRIPTS[stage].main(args)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoints are kept; start over with a lower --lr" in error
    assert not (tmp_path / "out/model.safetensors").exists()
    bad = json.loads((tmp_path / "out/bad_batch.json").read_text())
    assert f"step {bad['step']}: not finite" in error.replace("iteration", "step")
    assert any(value in ("nan", "inf") for value in bad["values"].values())
    size = {"sft": 4, "rm": 3, "ppo": 4}[stage]  # of PPO: a minibatch
    file = {"sft": tiny.demonstrations, "rm": tiny.comparisons, "ppo": tiny.prompts}[stage]
    known = range(1, 1 + len(file.read_text().splitlines()))
    assert len(bad["records"]) == size and set(bad["records"]) <= set(known)
