"""sample.py: what it draws, from which model, in which order, and how it resumes."""

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import sample
from checkpoint import save_model
from data.files import BadInput, read_jsonl, run_command
from data.tokenizer import encode_prompt
from model import GPT
from tests.tiny import LIMITS, Tiny


def constant_model(tiny: Tiny, folder: Path, token: int) -> Path:
    """A checkpoint that always says `token`, whatever stands before it."""
    model = GPT.from_pretrained(tiny.base)
    with torch.no_grad():
        row = model.wte.weight[token]
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(200 * row / row.square().sum())  # its logit is 200
    save_model(folder, model, tiny.tokenizer.read_text(), {"stage": "sft"})
    return folder


def write_candidates(tiny: Tiny, out: Path, *more: str) -> list[dict]:
    argv = ["--data", str(tiny.prompts), "--out", str(out), *LIMITS, *more]
    if "--checkpoints" not in more:
        argv += ["--checkpoints", f"base={tiny.base}"]
    assert sample.main(argv) == 0
    return read_jsonl(out, "candidates")


# ---------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_samples_equal_a_naive_sampler(tiny: Tiny, temperature: float, batch_size: int) -> None:
    """One row at a time, without a cache, in float64, from the same uniform numbers."""
    speaker = sample.load_speaker("base", tiny.base)
    prompts = [speaker.encode("say red" + " red" * n, 8) for n in (5, 0, 3, 1, 4, 2, 0, 6)]
    samples = sample.sample_responses(
        speaker, prompts, 8, temperature=temperature, seed=7, batch_size=batch_size
    )

    generator = torch.Generator().manual_seed(7)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    uniforms = dict(zip(order, torch.rand(len(prompts), 8, generator=generator), strict=True))
    model = GPT.from_pretrained(tiny.base).eval()
    for i, prompt in enumerate(prompts):
        tokens = list(prompt)
        for step in range(8):
            with torch.no_grad():
                logits = (model(torch.tensor([tokens]))[0, -1] @ model.unembedding.T).double()
            if temperature == 0:
                new = int(logits.argmax())
            else:
                cdf = (logits / temperature).softmax(0).cumsum(0)
                new = int((cdf < uniforms[i][step]).sum())
            tokens.append(new)
            if new == tiny.encoding.eot_token:
                break
        response = tokens[len(prompt) :]
        assert samples[i].prompt == prompt
        assert samples[i].tokens == response
        assert samples[i].ended == (response[-1] == tiny.encoding.eot_token)
        assert samples[i].text == tiny.encoding.decode(
            [token for token in response if token != tiny.encoding.eot_token]
        )
    assert {s.ended for s in samples} == {True, False} or temperature == 0


def test_a_downloaded_gpt2_is_found_by_its_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "DOWNLOADS", tmp_path)
    monkeypatch.chdir(tmp_path.parent)  # where no folder is called gpt2
    constant_model(tiny, tmp_path / "gpt2", tiny.encoding.encode_ordinary("a")[0])
    speaker = sample.load_speaker("base", "gpt2")
    (says,) = sample.sample_responses(speaker, [speaker.encode("say red", 3)], 3, temperature=0)
    assert says.text == "aaa"
    argv = [
        "--data",
        str(tiny.prompts),
        "--out",
        str(tmp_path / "candidates.jsonl"),
        *LIMITS,
        "--checkpoints",
        "base=gpt2",
    ]
    assert sample.main(argv) == 0


def test_a_tokenizer_of_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Too many entries, or another end token."""
    for name, change in (("vocab", {"vocab_size": 99}), ("end", {"eos_token_id": 7})):
        old = GPT.from_pretrained(tiny.base).config
        config = replace(old, **({"eos_token_id": 7} | change))
        save_model(tmp_path / name, GPT(config), tiny.tokenizer.read_text(), {"stage": "sft"})
        with pytest.raises(BadInput, match="do not fit a model") as error:
            sample.load_speaker("base", tmp_path / name)
        assert f"{name}/tokenizer.json" in str(error.value)


def test_prefix_stands_before_the_prompt_where_it_fits(tiny: Tiny) -> None:
    speaker = sample.load_speaker("base", tiny.base, prefix="say\\nred ")
    assert speaker.encode("blue", 8) == encode_prompt(tiny.encoding, "say\nred blue")
    room = 48 - len(encode_prompt(tiny.encoding, "say\nred blue"))
    assert speaker.encode("blue", room) == encode_prompt(tiny.encoding, "say\nred blue")
    assert speaker.encode("blue", room + 1) == encode_prompt(tiny.encoding, "blue")


# -------------------------------------------------------------------------- candidates


def test_each_response_is_of_the_model_that_is_named(tiny: Tiny, tmp_path: Path) -> None:
    a, b = tiny.encoding.encode_ordinary("ab")
    says = {"a": a, "b": b, "nothing": tiny.encoding.eot_token}
    folders = {name: constant_model(tiny, tmp_path / name, token) for name, token in says.items()}
    records = write_candidates(
        tiny,
        tmp_path / "candidates.jsonl",
        "--num_responses",
        "4",
        "9",
        "--checkpoints",
        *(f"{name}={folder}" for name, folder in folders.items()),
    )
    prompts = read_jsonl(tiny.prompts, "prompts")
    assert [record["prompt"] for record in records] == [p["prompt"] for p in prompts]
    spoken = {name: tiny.encoding.decode([token] * 8) for name, token in says.items()}
    spoken["nothing"] = ""
    for record in records:
        assert 4 <= len(record["responses"]) == len(record["models"]) <= 9
        for text, name, ended in zip(
            record["responses"], record["models"], record["ended"], strict=True
        ):
            assert text == spoken[name]
            assert ended == (name == "nothing")
    assert {name for record in records for name in record["models"]} == set(says)
    assert {len(record["models"]) for record in records} >= {4, 6, 9}


def test_shares_and_number_of_responses() -> None:
    args = sample.get_args(
        [
            "--checkpoints",
            "a=a",
            "b=b",
            "c=c",
            "--shares",
            "7",
            "2",
            "1",
            "--data",
            "x",
            "--out",
            "y",
            "--num_responses",
            "4",
            "9",
        ]
    )
    plans = [sample.plan(i, 3, args) for i in range(4000)]
    sizes = np.bincount([len(p) for p in plans], minlength=10)
    assert sizes[:4].sum() == 0 and len(sizes) == 10
    assert np.abs(sizes[4:] / 4000 - 1 / 6).max() < 4 * np.sqrt(1 / 6 * 5 / 6 / 4000)
    drawn = np.bincount(np.concatenate(plans), minlength=3)
    expected = np.array([0.7, 0.2, 0.1])
    error = 4 * np.sqrt(expected * (1 - expected) / drawn.sum())
    assert (np.abs(drawn / drawn.sum() - expected) < error).all()


def test_keys_of_the_prompt_are_kept_and_the_seed_decides(tiny: Tiny, tmp_path: Path) -> None:
    prompts = [
        p | {"task": {"kind": "x", "n": i}}
        for i, p in enumerate(read_jsonl(tiny.prompts, "prompts"))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts))

    def run(name: str, *more: str) -> list[dict]:
        argv = [
            "--data",
            str(path),
            "--out",
            str(tmp_path / name),
            *LIMITS,
            "--checkpoints",
            f"a={tiny.base}",
            f"b={tiny.base}",
            "--num_responses",
            "2",
            "4",
        ]
        assert sample.main([*argv, *more]) == 0
        return read_jsonl(tmp_path / name, "candidates")

    first = run("1")
    assert [{k: r[k] for k in prompts[0]} for r in first] == prompts
    assert run("2", "--batch_size", "5") == first
    assert run("3", "--seed", "1") != first
    texts = [text for record in first for text in record["responses"]]
    assert len(set(texts)) > len(texts) / 2  # the draws are not all the same


def test_too_long_prompts_are_dropped_with_a_count(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts = read_jsonl(tiny.prompts, "prompts")[:3]
    prompts[1]["prompt"] = "red " * 60
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    argv = ["--data", str(path), "--out", str(tmp_path / "out.jsonl"), *LIMITS]
    sample.main([*argv, "--checkpoints", f"base={tiny.base}"])
    records = read_jsonl(tmp_path / "out.jsonl", "candidates")
    assert [r["prompt"] for r in records] == [prompts[0]["prompt"], prompts[2]["prompt"]]
    assert "dropped 1 prompts over 36 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_resumes_exactly(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    monkeypatch.setattr(sample, "CHUNK", 6)
    whole = write_candidates(tiny, tmp_path / "whole.jsonl")
    real, calls = sample.sample_chunk, []

    def killed(*args) -> list[dict]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sample, "sample_chunk", killed)
    with pytest.raises(KeyboardInterrupt):
        write_candidates(tiny, out)
    assert not out.exists()
    partial = tmp_path / ".out.jsonl.partial"
    if torn:  # killed in the middle of a write
        lines = partial.read_text().splitlines(keepends=True)
        partial.write_text("".join([*lines, lines[1], '{"prompt": "say r']))
    calls.clear()
    monkeypatch.setattr(sample, "sample_chunk", lambda *a: calls.append(1) or real(*a))
    with pytest.raises(BadInput, match="other settings"):
        write_candidates(tiny, out, "--resume", "--seed", "3")
    assert write_candidates(tiny, out, "--resume") == whole
    assert len(calls) == 2  # of four chunks
    assert not partial.exists()


def test_processes_change_no_byte(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "CHUNK", 6)
    write_candidates(tiny, tmp_path / "one.jsonl")
    write_candidates(tiny, tmp_path / "two.jsonl", "--processes", "2")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_processes_end_with_a_parent_that_is_killed(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    lines = (json.dumps(read_jsonl(tiny.prompts, "prompts")[0]) + "\n") * 4000
    (tmp_path / "prompts.jsonl").write_text(lines)
    argv = [
        "--data",
        str(tmp_path / "prompts.jsonl"),
        "--out",
        str(out),
        *LIMITS,
        "--checkpoints",
        f"base={tiny.base}",
        "--processes",
        "2",
        "--num_responses",
        "400",
    ]
    parent = subprocess.Popen(
        [sys.executable, "sample.py", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def children() -> set[int]:
        found = set()
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, rest = status.read_text().split(" ", 1)
                if int(rest.rsplit(") ", 1)[1].split()[1]) == parent.pid:
                    found.add(int(pid))
        return found

    def is_alive(pid: int) -> bool:
        try:  # where nobody reaps it, what has ended stays there as a zombie
            return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
        except OSError:
            return False

    def wait_until(happens: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not happens():
            assert time.monotonic() < end
            time.sleep(0.1)

    wait_until(lambda: len(children()) >= 2)
    time.sleep(2)  # they are at work, or still importing
    left = children()
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(is_alive, left)))


def test_chunks_draw_different_numbers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "CHUNK", 4)
    path = tmp_path / "prompts.jsonl"
    path.write_text((json.dumps(read_jsonl(tiny.prompts, "prompts")[0]) + "\n") * 8)
    argv = ["--data", str(path), "--out", str(tmp_path / "c"), "--num_responses", "3", *LIMITS]
    sample.main([*argv, "--checkpoints", f"base={tiny.base}"])
    responses = [record["responses"] for record in read_jsonl(tmp_path / "c", "candidates")]
    assert responses[:4] != responses[4:]


# -------------------------------------------------------------------- talk and bad input


def test_one_prompt_side_by_side(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loud = constant_model(tiny, tmp_path / "loud", tiny.encoding.encode_ordinary("a")[0])
    end = constant_model(tiny, tmp_path / "end", tiny.encoding.eot_token)
    argv = ["--checkpoints", f"loud={loud}", f"q={end}", "--prompt", "hello", *LIMITS]
    assert sample.main([*argv, "--num_responses", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["loud | aaaaaaaa ... (cut)"] * 2 + ["   q | "] * 2 + [""]


def test_prompts_from_stdin_until_its_end(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("say red\n\n" + "red " * 60 + "\nsay blue\n"))
    assert sample.main(["--checkpoints", f"base={tiny.base}", *LIMITS]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("base |") == 2
    assert "over --max_prompt_tokens 36" in captured.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--checkpoints", "rm={tiny.rm}", "--prompt", "x"], "expected a language model"),
        (["--checkpoints", "a={tiny.folder}/none", "--prompt", "x"], "no such file"),
        (["--checkpoints", "a={tiny.base}", "--prompt", " "], "--prompt is blank"),
        (
            ["--checkpoints", "a={tiny.base}", "--prompt", "x", "--max_new_tokens", "40"],
            "more than the context of a, 48",
        ),
        (
            ["--checkpoints", "a={tiny.base}", "--data", "{tiny.pretrain}", "--out", "{tmp}/c"],
            "pretrain.txt:1",
        ),
        (
            [
                "--checkpoints",
                "a={tiny.base}",
                "--data",
                "{tiny.prompts}",
                "--out",
                "{tiny.prompts}/no/c",
            ],
            "cannot be written",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], words: str
) -> None:
    argv = [arg.format(tiny=tiny, tmp=tmp_path) for arg in argv]
    assert run_command(lambda: sample.main([*LIMITS, *argv])) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        ["--checkpoints", "a"],
        ["--checkpoints", "a=x", "a=y"],
        ["--checkpoints", "a=x", "--prefix", "b=text"],
        ["--checkpoints", "a=x", "--data", "prompts.jsonl"],
        ["--checkpoints", "a=x", "--data", "d", "--out", "o", "--num_responses", "1"],
        ["--checkpoints", "a=x", "--data", "d", "--out", "o", "--num_responses", "9", "4"],
        ["--checkpoints", "a=x", "--data", "d", "--out", "o", "--prompt", "p"],
        ["--checkpoints", "a=x", "--shares", "0.5", "0.5"],
        ["--checkpoints", "a=x", "--shares", "0"],
        ["--checkpoints", "a=x", "--temperature", "-1"],
        ["--checkpoints", "a=x", "--batch_size", "0"],
    ],
)
def test_bad_arguments_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sample.get_args(argv)
    assert stopped.value.code == 2
