"""An output is claimed before the work begins: what it may replace, and whose it is. And what else
ends in one line: a full disk, closed streams, Ctrl-C during imports, pipes, overflowing numbers."""

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from data import outputs
from data.commands import run_command
from data.files import BadInput, read_documents, read_jsonl
from data.outputs import claim
from data.tiny.world import World

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import read_info
from model import GPT
from run import Run
from tests import toy
from tests.crash import Server, contents
from tests.tiny import LIMITS, Tiny

ROOT = Path(__file__).resolve().parents[1]
MODELS = "--reward_model {rm} --checkpoint {base} --name x --data {prompts}"
COMMANDS = {  # without --out
    "sample": "--data {prompts} --checkpoints base={base}",
    "data.label": "--data {candidates} --world {world}",
    "data.label by hand": "--interactive --data {candidates}",
    "evaluate measure": f"measure {MODELS} --pretrain_data {{pretrain}}",
    "evaluate select": "select --run {run} --reward_model {rm} --data {prompts}",
    "evaluate report": "report --measured {measured} --baseline x",
    "evaluate folds": "folds --comparisons {comparisons} --init {base}",
    "evaluate public": "public --data {folder} --checkpoints base={base}",
    "train_sft": "--data {demonstrations} --init {base} --epochs 1",
    "train_rm": "--data {comparisons} --init {base} --epochs 1",
    "train_ppo": "--data {prompts} --init {base} --reward_model {rm} --max_steps 1",
    "data.tiny.make": "",
    "data.real.prepare": "alpaca --from {folder}",
}
OWN = {"report": "# What", "public": "# Public", "train_rm": '"rm"', "train_ppo": '"ppo"'}
OWN["data.real.prepare"] = "^x$"
FILES = list(COMMANDS)[:4]
FOLDERS = list(COMMANDS)[4:]


@pytest.fixture(scope="module")
def paths(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the tiny files, and others that commands read."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path_factory.mktemp("copy") / "tiny"))
    made = {name: folder / Path(p).name for name, p in vars(tiny).items() if name != "encoding"}
    made |= {"folder": folder, "run": folder / "sft"}
    (folder / "sft").mkdir()
    (folder / "sft/model.safetensors").touch()
    for epoch in ("01", "02"):
        shutil.copytree(tiny.base, folder / "sft/epochs" / epoch)
    records = read_jsonl(tiny.prompts, "prompts")[:3]
    answers = {"responses": ["a", "b"], "ended": [True, True], "models": ["m", "m"]}
    for name, more in (("candidates", answers), ("ranked", answers | {"ranks": [1, 2]})):
        task = {"labeler": "me", "task": {"kind": "opening"}}
        rows = [record | more | task for record in records]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    World.make(0).save(folder / "world.json")
    (folder / "measured.json").write_text('{"name": "x", "settings": {}}')
    made |= {"candidates": folder / "candidates", "ranked": folder / "ranked"}
    made |= {"world": folder / "world.json", "measured": folder / "measured.json"}
    return made


def call(command: str, paths: dict[str, Path], *more: object) -> tuple[int, str]:
    """Exit code and last line on stderr of a command, in this process."""
    module = importlib.import_module(command.split()[0])
    limits = [] if "." in command or "report" in command else LIMITS
    argv = [word.format(**paths) for word in COMMANDS[command].split()] + [*map(str, more)]
    argv += limits
    try:
        return run_command(lambda: module.main(argv))
    except SystemExit as leaving:
        return leaving.code


def refused(command, paths, out, capsys, *words: str) -> None:
    """One line, code 2, and no file is touched."""
    before = contents(paths["folder"])
    capsys.readouterr()
    assert call(command, paths, "--out", out) == 2, (command, out)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "--out" in said[0], said
    assert all(word in said[0] for word in words), said
    assert contents(paths["folder"]) == before


# ------------------------------------------------------------------------------------------------
# What --out may replace


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_without_a_name_is_refused(command, paths, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("", " ", ".", "..", "x/.."):
        refused(command, paths, out, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", FILES)
def test_a_file_replaces_no_folder_input_device_or_other_result(command, paths, capsys) -> None:
    folder = paths["folder"]
    inputs = [word for word in ("data", "world") if f"--{word}" in COMMANDS[command]]
    (folder / "link").unlink(missing_ok=True)
    (folder / "link").symlink_to(COMMANDS[command].split("--data {")[1].split("}")[0])
    own = {"sample": "candidates", "data.label by hand": "ranked"}.get(command)
    others = ("demonstrations", "pretrain", "tokenizer", "candidates", "ranked", "comparisons")
    for out in ("base", "new/", "pipe", "/dev/null", "base/model.safetensors"):
        if out == "pipe" and not (folder / "pipe").exists():
            os.mkfifo(folder / "pipe")
        out = f"{folder}/{out}" if out == "new/" else folder / out
        refused(command, paths, out, capsys)
        (folder / "pipe").unlink(missing_ok=True)
    for name in {*others} - {own, "comparisons" if own == "ranked" else ""}:
        refused(command, paths, paths[name], capsys)
    for name in inputs:
        word = COMMANDS[command].split(f"--{name} {{")[1].split("}")[0]
        refused(command, paths, paths[word], capsys, f"would replace --{name} {paths[word]}")


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_replaces_no_file_input_or_other_result(command, paths, capsys) -> None:
    """Of another kind: a model of another stage, a world, a report, a data set."""
    refused(command, paths, paths["pretrain"], capsys, "expected a folder")
    refused(command, paths, paths["run"] / "epochs/01", capsys)
    of = command.split()[-1]
    for mark, text in (
        ("world.json", '{"seed": 1}'),
        ("account.txt", "x"),
        ("selection.csv", "epoch,score\n"),
        ("report.md", "# What each step did\n"),
        ("report.md", "# Public sets\n"),
        ("report.md", "mine\n"),
        ("config.json", '{"stage": "rm"}'),
        ("config.json", '{"stage": "ppo"}'),
        ("config.json", '{"n_embd": 5}'),
    ):
        out = paths["folder"] / "other"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name in ("model.safetensors", "tokenizer.json", "log.csv", "folds.md", mark):
            (out / name).write_text(text if name == mark else "mine")
        (out / "train").mkdir()
        harmless = of in ("report", "public") and "n_embd" in text  # writes none of its files
        if not harmless and (of, mark) != ("data.tiny.make", "world.json"):
            if not re.search(OWN.get(of, "^$"), text):
                refused(command, paths, out, capsys, "and no earlier")
    shutil.rmtree(out)


@pytest.mark.parametrize("stage", ("sft", "rm", "ppo"))
def test_a_stage_replaces_its_own_result(stage, paths, tmp_path) -> None:
    inputs = {"data": paths["prompts"], "init": None, "more": [paths["base"], "elsewhere"]}
    out = tmp_path / "out"
    for _ in range(2):
        claim(str(out), stage, inputs)
        (out / "config.json").write_text(json.dumps({"n_embd": 1, "stage": stage}, indent=2))
        (out / "notes.txt").write_text("mine")
    outputs.release()
    assert {f.name for f in out.iterdir()} == {"config.json", "notes.txt"}


# ------------------------------------------------------------------------------------------------
# Whose it is


HOLD = """
import sys, time
from data.outputs import claim
claim(sys.argv[1], sys.argv[2], {})
print("has it", flush=True)
time.sleep(60)
"""


def holder(out: Path, kind: str) -> subprocess.Popen:
    """Another process at work on an output."""
    command = [sys.executable, "-c", HOLD, str(out), kind]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    return process


@pytest.mark.parametrize(("kind", "name"), [("sft", "run"), ("candidates", "c.jsonl")])
def test_a_second_process_is_told_who_is_at_work(kind, name, tmp_path) -> None:
    out = tmp_path / name
    first = holder(out, kind)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    try:
        for way in (out, link / name):
            with pytest.raises(BadInput, match=f"process {first.pid} on .* is at work on it; wait"):
                claim(str(way), kind, {})
    finally:
        first.kill()  # it cannot give back what it has
        first.wait()
    claim(str(out), kind, {})
    outputs.release()
    assert not list(tmp_path.rglob("*lock"))


def test_two_trainings_into_one_folder(server: Server, tiny: Tiny, tmp_path: Path, capsys) -> None:
    first = holder(tmp_path / "run", "sft")
    try:
        run = server.run("sft", tiny.args("sft", tmp_path / "run"))
    finally:
        first.kill()
        first.wait()
    assert run.code == 2 and f"process {first.pid} on " in run.stderr
    assert server.run("sft", tiny.args("sft", tmp_path / "run")).code == 0
    assert not (tmp_path / "run/.lock").exists()


# ------------------------------------------------------------------------------------------------
# An accidental start


@pytest.mark.parametrize("finished", (True, False))
def test_ctrl_c_before_the_first_checkpoint_keeps_an_earlier_run(
    finished: bool, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "toy.txt").write_text("1")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda: toy.main(["--out", "out"])) == 0
    if not finished:
        Path("out/model.safetensors").unlink()
    before, lap = contents(Path("out")), Run.lap

    def during(self, *args) -> None:
        lap(self, *args)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
        patch.setattr(Run, "lap", during)
        run_command(lambda: toy.main(["--out", "out", "--lr", "0.2"]))
    assert leaving.value.code == 130 and contents(Path("out")) == before
    assert capsys.readouterr().err == (
        "stopped by a signal after step 1; nothing is saved: the earlier result in --out stays\n"
    )


# ------------------------------------------------------------------------------------------------
# Full disks


def train(tiny: Tiny, out: Path, **how: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "train_sft.py", *tiny.args("sft", out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **how)


def test_a_limit_of_file_size_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))  # noqa: E731
    run = train(tiny, tmp_path / "out", preexec_fn=limit)
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith(f"error: {tmp_path}/out/") and "full" in run.stderr
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob(".lock")]


@pytest.mark.parametrize("kib", (16, 60, 150, 200, 320, 520, 700, 900, 1000))
def test_a_full_disk_is_one_line_and_loses_nothing(
    kib: int, tiny: Tiny, tmp_path: Path, server: Server, whole
) -> None:
    """A real one: a file system in memory, of so many KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        run = server.run("sft", tiny.args("sft", tmp_path / "out"))
        assert run.code == 1 and run.stderr.count("\n") == 1, run.stderr
        assert run.stderr.startswith(f"error: {tmp_path}/out/")
        assert run.stderr.endswith("the disk is full; free some space, and repeat the command\n")
        assert not list(tmp_path.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
        assert server.run("sft", tiny.args("sft", tmp_path / "out", "--resume")).code == 0
        assert contents(tmp_path / "out") == contents(whole["sft"][0])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ------------------------------------------------------------------------------------------------
# Streams and signals of a process


@pytest.mark.parametrize("command", ("train_sft.py", "sample.py", "evaluate.py", "-m data.label"))
@pytest.mark.parametrize("library", ("numpy", "torch/lib"))
def test_ctrl_c_during_imports_is_quiet(command: str, library: str) -> None:
    command = [sys.executable, *command.split(), "--data", "nothing"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    maps = Path(f"/proc/{process.pid}/maps")
    while maps.exists() and process.poll() is None and library not in maps.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.count("\n") <= 1 and "Traceback" not in said, said
    assert process.returncode in (-signal.SIGINT, 130, 2)  # 2: it had imported all, and looked


@pytest.mark.parametrize("closed", ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"))
def test_closed_streams_do_not_matter(closed: str, tiny: Tiny, tmp_path: Path) -> None:
    argv = tiny.args("sample", tmp_path / "out")
    command = f'exec "$@" {closed}'
    code = subprocess.run(
        ["bash", "-c", command, "-", sys.executable, "sample.py", *argv], cwd=ROOT
    ).returncode
    assert code == 0
    assert len(read_jsonl(tmp_path / "out/candidates.jsonl", "candidates")) == 20


def test_ranking_without_stdin_ends(paths, tmp_path) -> None:
    argv = ["--interactive", "--data", paths["candidates"], "--out", tmp_path / "r"]
    command = ["bash", "-c", 'exec "$@" <&-', "-", sys.executable, "-m", "data.label", *argv]
    run = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "0 ranked" in run.stdout and not run.stderr


def test_what_stdout_cannot_hold_is_escaped() -> None:
    code = "from data.commands import run_command; run_command(lambda: print('ä漢'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.stdout == "\\xe4\\u6f22\n" and not run.stderr


# ------------------------------------------------------------------------------------------------
# Readers and numbers


def one_line(call, words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "tokenizer.json"))
def test_a_pipe_in_a_model_is_not_waited_for(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for script, argv in (
        ("sample", ["--checkpoints", f"a={folder}", "--prompt", "x", *LIMITS]),
        ("train_sft", tiny.args("sft", tmp_path / "out", "--init", str(folder))),
    ):
        main = importlib.import_module(script).main
        one_line(lambda main=main, argv=argv: main(argv), f"{folder}/{name}: is a pipe")


def test_long_white_space_is_refused_with_its_place(tmp_path: Path, tiny: Tiny) -> None:
    """tiktoken's pattern engine overflows its stack on it."""
    record = read_jsonl(tiny.prompts, "prompts")[0]
    long = f"a{' ' * 1_000_000}b"
    rows = [record, record | {"prompt": long}]
    (tmp_path / "p").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_line(lambda: read_jsonl(tmp_path / "p", "prompts"), "p:2: 1000000 characters of white")
    (tmp_path / "d").write_text(f"x\n<|endoftext|>\n{long}\n")
    one_line(lambda: read_documents(tmp_path / "d"), "d: document 2: 1000000 characters of white")


def test_a_tensor_that_stands_twice_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"] = weights["ln_f.weight"] + 1
    save_file(weights, folder / "model.safetensors")
    one_line(lambda: GPT.from_pretrained(folder), "ln_f.weight twice")


def test_numbers_that_overflow_are_no_empty_responses(tiny: Tiny) -> None:
    model = GPT.from_pretrained(tiny.base)
    prompts, lengths = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 2])
    one_line(lambda: model.generate(prompts, lengths, 4, temperature=1e-38), "temperature 1e-38")
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight *= 1e38
    with pytest.raises(FloatingPointError, match="not finite"):
        model.generate(prompts, lengths, 4)
    command = ["sample", "--checkpoints", f"a={tiny.base}", "--prompt", "x"]
    with pytest.raises(SystemExit):
        importlib.import_module("sample").main([*command[1:], "--temperature", "1e-38"])


@pytest.mark.parametrize("change", ({"data": 5}, {"settings": [1]}, {"initializer_range": 10**400}))
def test_a_config_of_other_types_is_refused(change: dict, tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(read_info(folder) | change)
    finally:
        sys.set_int_max_str_digits(4300)
    (folder / "config.json").write_text(text)
    key = next(iter(change))
    one_line(lambda: GPT.from_pretrained(folder), key)


# ------------------------------------------------------------------------------------------------
# A run's folder


@pytest.mark.parametrize("name", ("config.json", "tokenizer.json", "model.safetensors"))
def test_a_resume_with_another_start_is_refused(name: str, tiny, tmp_path, server: Server) -> None:
    """Also where only config.json differs, a number of which changes every later step."""
    base = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    args = tiny.args("sft", tmp_path / "out", "--init", str(base))
    assert server.run("sft", args, {60: signal.SIGKILL}).code == -signal.SIGKILL
    assert list((tmp_path / "out/checkpoints").glob("0*"))
    path = base / name
    if name == "config.json":
        path.write_text(path.read_text().replace("1e-05", "1e-04"))
    elif name == "tokenizer.json":
        path.write_text(path.read_text() + " ")
    else:
        weights = load_file(path)
        save_file(weights | {"ln_f.bias": weights["ln_f.bias"] + 1e-3}, path)
    run = server.run("sft", [*args, "--resume"])
    assert run.code == 2 and run.stderr.count("\n") == 1
    assert f"{path} was '" in run.stderr and run.stderr.count(" was ") == 1


def test_folders_of_a_person_beside_checkpoints_stay(tiny, tmp_path, server: Server) -> None:
    out = tmp_path / "out"
    assert server.run("sft", tiny.args("sft", out)).code == 0
    own = [out / name for name in ("checkpoints/2026-best", "epochs/01_best", "steps/x")]
    for folder in own:
        shutil.copytree(tiny.base, folder)
    packed = out / "checkpoints/00000004.tar.gz"
    packed.write_text("mine")
    before = [contents(folder) for folder in own]
    assert server.run("sft", tiny.args("sft", out, "--seed", "4")).code == 0
    assert [contents(folder) for folder in own] == before and packed.read_text() == "mine"


def test_shapes_of_an_optimizer_are_not_trusted(tiny, tmp_path, server: Server) -> None:
    """With checksums made anew; Adam would read past the end of a tensor."""
    out = tmp_path / "out"
    args = tiny.args("sft", out)
    assert server.run("sft", args, {60: signal.SIGKILL}).code == -signal.SIGKILL
    newest = sorted((out / "checkpoints").glob("0*"))[-1]
    saved = torch.load(newest / "state.pt", weights_only=True)
    moments = next(iter(saved["state"]["adam"]["state"].values()))
    moments["exp_avg"] = moments["exp_avg"].flatten()[:1]
    torch.save(saved, newest / "state.pt")
    digest = hashlib.sha256((newest / "state.pt").read_bytes()).hexdigest()
    sums = newest / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith("state.pt")]
    sums.write_text("\n".join([*lines, f"{digest}  state.pt"]) + "\n")
    run = server.run("sft", [*args, "--resume"])
    assert run.code == 2 and "not the state of such a run (ValueError)" in run.stderr


def test_comparisons_give_their_prompts_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Ranks of other responses do not go along."""
    argv = tiny.args("sample", tmp_path, "--data", str(tiny.comparisons))
    assert importlib.import_module("sample").main(argv) == 0
    made = read_jsonl(tmp_path / "candidates.jsonl", "candidates")
    assert made and not any({"ranks", "labeler", "noise"} & record.keys() for record in made)


def test_a_resume_may_name_its_files_otherwise(tiny, tmp_path, server: Server, whole) -> None:
    args = tiny.args("sft", tmp_path / "out")
    assert server.run("sft", args, {60: signal.SIGKILL}).code == -signal.SIGKILL
    other = [os.path.relpath(a, ROOT) if a.startswith(str(tiny.folder)) else a for a in args]
    assert other != args and server.run("sft", [*other, "--resume"]).code == 0
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    assert weights == (whole["sft"][0] / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------
# Claims that a second attempt to break them found wanting


def of_stage(folder: Path, stage: str, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"stage": stage}, indent=2))
    (folder / name).touch()
    return folder


@pytest.mark.parametrize(("stage", "name"), [("sft", "state.pt"), ("rm", "pytorch_model.bin")])
def test_an_interrupted_run_of_another_stage_stays(stage: str, name: str, tmp_path: Path) -> None:
    """It has checkpoints and no result yet; or they are another program's."""
    out = of_stage(tmp_path / "run/checkpoints/00000008", stage, name).parents[1]
    for kind in ("rm", "report", "selection"):
        with pytest.raises(BadInput, match="holds checkpoints.*, and no earlier"):
            claim(str(out), kind, {})
    if name == "state.pt":
        claim(str(out), stage, {})


@pytest.mark.parametrize("way", ("link", "file", "folder", "pipe", "bytes"))
def test_a_lock_that_is_something_else_stays(way: str, tmp_path: Path) -> None:
    lock, mine = tmp_path / ".run.lock", tmp_path / "mine"
    mine.write_text("mine")
    {
        "link": lambda: lock.symlink_to(mine),
        "file": lambda: lock.write_text("mine"),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
        "bytes": lambda: lock.write_bytes(b"\xff\xfe"),
    }[way]()
    one_line(lambda: claim(str(tmp_path / "run"), "sft", {}), f"{lock}: expected the lock of")
    outputs.release()
    assert os.path.lexists(lock) and mine.read_text() == "mine"


def test_without_locks_of_the_system_the_owners_name_counts(tmp_path, monkeypatch) -> None:
    def no_flock(*_) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(outputs.fcntl, "flock", no_flock)
    lock = tmp_path / ".run.lock"
    for owner, alive in (
        (f"process {os.getppid()} on {socket.gethostname()}", True),
        ("process 5 on elsewhere", True),
        (f"process 99999999 on {socket.gethostname()}", False),
    ):
        lock.write_text(owner + "\n")
        if alive:
            one_line(lambda: claim(str(tmp_path / "run"), "sft", {}), "is at work on it")
        else:
            claim(str(tmp_path / "run"), "sft", {})


def test_a_claim_that_was_taken_away_is_noticed(tmp_path: Path) -> None:
    claim(str(tmp_path / "run"), "sft", {})
    (tmp_path / ".run.lock").unlink()
    one_line(outputs.check_claims, "was removed or replaced")
    (tmp_path / ".run.lock").write_text("process 1 on another\n")
    outputs.release()
    assert (tmp_path / ".run.lock").exists()  # the next owner's


def test_select_and_training_see_each_other(tmp_path: Path) -> None:
    for kinds in (("selection", "sft"), ("sft", "selection")):
        first = holder(tmp_path / "out", kinds[0])
        try:
            one_line(lambda k=kinds[1]: claim(str(tmp_path / "out"), k, {}), "is at work on it")
        finally:
            first.kill()
            first.wait()


def test_what_others_are_about_to_write_stays(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    alive, ours = (tmp_path / f"report/.{n}.77.tmp" for n in ("c.json", "table.csv"))
    alive.touch()
    ours.touch()
    claim(str(tmp_path / "report"), "report", {})
    assert alive.exists() and not ours.exists()


def test_two_mounts_of_one_folder_are_one(paths, tmp_path: Path) -> None:
    mount = ["mount", "--bind", str(paths["base"]), str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(BadInput, match="would replace --init"):
            claim(str(tmp_path), "sft", {"init": paths["base"]})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("text", ('\n{"ranks":[1,2],"x":1}\n', '{"ranks": [1], "a": "%s"}', ""))
def test_rankings_however_they_are_written_go_on(text: str, tmp_path: Path) -> None:
    """Blank lines first, without spaces, a long first record, none yet."""
    (tmp_path / "r").write_text(text.replace("%s", "x" * 200_000))
    claim(str(tmp_path / "r"), "comparisons by hand", {})


def test_a_ranking_that_an_editor_changed_is_not_undone(paths, tmp_path, monkeypatch) -> None:
    label, out = importlib.import_module("data.label"), tmp_path / "r"

    def typed(_: str) -> str:
        if out.exists():
            out.write_text(out.read_text().replace('"ranks": [1, 2]', '"ranks": [2, 1]') + "\n")
        return "1 2"

    monkeypatch.setattr("builtins.input", typed)
    argv = ["--interactive", "--data", str(paths["candidates"]), "--out", str(out)]
    one_line(lambda: label.main(argv), "was changed by another program")
    assert out.read_text().count("\n\n") == 1  # the editor's


def test_sigterm_ends_a_command_and_what_it_started(paths, tmp_path: Path) -> None:
    """`folds` runs train_rm.py; no process is left at work."""
    flags = f"folds --folds 2 --comparisons {paths['comparisons']} --init {paths['base']}"
    command = [sys.executable, "evaluate.py", *flags.split(), "--out", str(tmp_path / "f"), *LIMITS]
    process = subprocess.Popen(
        [*command, "--rm_flags", "--epochs 4000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    while b"steps of" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.stdout.read()  # until no process has it open
    assert process.wait() == 143 and not list(tmp_path.rglob(".f.lock"))


def test_an_unfinished_run_is_not_selected_from(paths, tmp_path, capsys) -> None:
    """Its last epochs are still to come."""
    run = Path(shutil.copytree(paths["run"], tmp_path / "sft"))
    (run / "model.safetensors").unlink()
    more = ("--run", run, "--out", tmp_path / "out")
    assert call("evaluate select", paths, *more) == 2
    assert f"{run}: has no result yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


HUGE = {
    "train_sft": "--warmup_steps=1" + 400 * "0",
    "train_ppo": f"--rollout_size=1{31 * '0'} --ptx_ratio=1e300 --missing_eos_score=1e39",
    "evaluate measure": f"--num_items=1{31 * '0'}",
}


@pytest.mark.parametrize("command", HUGE)
def test_numbers_beyond_the_machine_are_named(command, paths, tmp_path, capsys) -> None:
    for flag in HUGE[command].split():
        assert call(command, paths, "--out", tmp_path / "out", flag) == 2
        said = capsys.readouterr().err
        assert flag.split("=")[0] in said and said.count("\n") == 1
