"""Run the whole pipeline twice with one seed and compare every file byte for byte.

    python -m tests.determinism                    the Makefile's demo, made small, twice
    python -m tests.determinism --runs 3 --seed 5
    python -m tests.determinism FOLDER FOLDER      two results of `make demo`, as they are

The commands are those of `make --dry-run demo`, in its order, with sizes cut to seconds: tiny
world, base, SFT, the start of PPO, samples, labels, reward model, choice of the epoch, PPO, PPO-ptx
and report. Clocks are exempt: timing.csv, and its checksum. All else counts: data, weights,
optimizer states, logs, samples, tables, figures, the report. Files record the paths that they were
made from, so two demos are equal only if both were made with the same OUT (in two clones, say).
Exit code 1 if a file differs, or is missing on one side.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.crash import ROOT, Server, contents

# Flags that are added to the Makefile's, by the script and, where they differ, by its --out.
SMALL = {
    "tiny_world": "--pretrain_tokens 30000 --heldout_tokens 3000 --train_demonstrations 40 "
    "--valid_demonstrations 10 --train_rm_prompts 24 --valid_rm_prompts 10 --train_ppo_prompts 20 "
    "--valid_ppo_prompts 10 --test_prompts 16 --balanced_prompts 2",
    "sft": "--epochs 2 --save_every 3",
    "base": "--max_steps 6 --n_layer 2 --n_embd 32 --n_head 2",
    "rm": "--batch_size 4 --eval_every 2 --save_every 2",
    "select": "--num_prompts 4",
    "measure": "--num_prompts 4 --num_items 4",
    "ppo": "--max_steps 3 --batch_size 16 --num_minibatches 4 --ptx_ratio 0.5 --eval_every 2 "
    "--save_every 2",
}
NAMES = {
    "data.tiny.make": "tiny_world",
    "train_sft.py": "sft",
    "sample.py": "sample",
    "data.label": "label",
    "train_rm.py": "rm",
    "train_ppo.py": "ppo",
    "evaluate.py": "evaluate",
}


def demo_commands(out: Path, seed: int) -> list[tuple[str, list[str]]]:
    """(script, arguments) of every stage of `make demo`, made small, in an order that works."""
    make = [
        "make",
        "--dry-run",
        "--always-make",
        "--jobs=1",
        "demo",
        f"OUT={out}",
        f"SEED={seed}",
        f"PYTHON={sys.executable}",
    ]
    printed = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    commands = []
    for line in printed.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not word.startswith("OMP_")]
        if words[:1] == ["cat"] and ">" in words:
            commands.append(("cat", words[1:]))
        script = words[2:3] if words[1:2] == ["-m"] else words[1:2]
        if not words[:1] or not words[0].endswith("python") or script[0] not in NAMES:
            continue
        name = NAMES[script[0]]
        argv = words[words.index(script[0]) + 1 :]
        made_by = Path(argv[argv.index("--out") + 1]).name
        small = SMALL.get(argv[0] if name == "evaluate" else name, "")
        small += " " + SMALL["base"] if made_by == "base" else ""
        commands.append((name, argv + small.split()))
    return commands


def run_demo(server: Server, out: Path, seed: int) -> None:
    """All stages, one after the other. Raises RuntimeError where one fails."""
    for name, argv in demo_commands(out, seed):
        if name == "cat":
            *parts, _, made = argv
            Path(made).write_bytes(b"".join(Path(part).read_bytes() for part in parts))
            continue
        run = server.run(name, argv)
        if run.code != 0:
            raise RuntimeError(f"{name} {shlex.join(argv)}: code {run.code}: {run.stderr}")


def differences(one: Path, other: Path) -> list[str]:
    """Names of the files that are not byte for byte the same in both folders."""
    a, b = contents(one), contents(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="two results to compare")
    parser.add_argument("--runs", type=int, default=2, help="of the small demo")
    parser.add_argument("--seed", type=int, default=0, help="of the small demo")
    args = parser.parse_args(argv)
    if len(args.folders) not in (0, 2) or args.runs < 2:
        parser.error("give two folders or none, and at least 2 --runs")
    for folder in args.folders:
        if not Path(folder).is_dir():
            parser.error(f"{folder}: no such folder")

    with tempfile.TemporaryDirectory() as name:
        folders = [Path(folder) for folder in args.folders]
        if not folders:
            server = Server(Path(name))
            for number in range(args.runs):
                started = time.perf_counter()
                # Always the same OUT, which files record.
                run_demo(server, Path(name) / "out", args.seed)
                folders.append(shutil.move(Path(name) / "out", Path(name) / f"run {number + 1}"))
                print(f"run {number + 1}: {time.perf_counter() - started:.0f} s", flush=True)
            server.close()
        differ = sorted({path for other in folders[1:] for path in differences(folders[0], other)})
        sizes = [len(content) for content in contents(folders[0]).values()]
        for path in differ:
            print(f"differs: {path}")
        print(
            f"{len(folders)} folders, {len(sizes)} files, {sum(sizes):,} bytes: "
            f"{f'{len(differ)} files differ' if differ else 'all equal'}"
        )
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
