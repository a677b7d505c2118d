"""sample.py: what it draws, from which model, in which order, and in which parts."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

from data.commands import run_command
from data.files import BadInput, read_jsonl, write_jsonl
from data.tiny.world import World
from data.tokenizer import encode_prompt, save_tokenizer, train_bpe

import numpy as np
import pytest
import torch

import checkpoint
import sample
from checkpoint import save_model
from model import GPT, ScalarModel
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
def test_samples_equal_a_naive_sampler(tiny, temperature, batch_size):
    """One row at a time, without a cache, in float64, from the same uniform numbers."""
    speaker = sample.load_speaker("base", tiny.base)
    prompts = [speaker.encode("say red" + " red" * n, 8) for n in (5, 0, 3, 1, 4, 2, 0, 6)]
    flags = {"temperature": temperature, "seed": 7, "batch_size": batch_size}
    samples = sample.sample_responses(speaker, prompts, 8, **flags)

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
        said = [token for token in response if token != tiny.encoding.eot_token]
        assert samples[i].text == tiny.encoding.decode(said)
    assert {s.ended for s in samples} == {True, False} or temperature == 0


def test_a_downloaded_gpt2_is_found_by_its_name(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "DOWNLOADS", tmp_path)
    monkeypatch.chdir(tmp_path.parent)  # where no folder is called gpt2
    constant_model(tiny, tmp_path / "gpt2", tiny.encoding.encode_ordinary("a")[0])
    speaker = sample.load_speaker("base", "gpt2")
    (says,) = sample.sample_responses(speaker, [speaker.encode("say red", 3)], 3, temperature=0)
    assert says.text == "aaa"
    assert write_candidates(tiny, tmp_path / "candidates.jsonl", "--checkpoints", "base=gpt2")


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    """Too many entries, or another end token."""
    for name, change in (("vocab", {"vocab_size": 99}), ("end", {"eos_token_id": 7})):
        old = GPT.from_pretrained(tiny.base).config
        config = replace(old, **({"eos_token_id": 7} | change))
        save_model(tmp_path / name, GPT(config), tiny.tokenizer.read_text(), {"stage": "sft"})
        with pytest.raises(BadInput, match="do not fit a model") as error:
            sample.load_speaker("base", tmp_path / name)
        assert f"{name}/tokenizer.json" in str(error.value)


def test_prefix_stands_before_the_prompt_where_it_fits(tiny):
    speaker = sample.load_speaker("base", tiny.base, prefix="say\\nred ")
    assert speaker.encode("blue", 8) == encode_prompt(tiny.encoding, "say\nred blue")
    room = 48 - len(encode_prompt(tiny.encoding, "say\nred blue"))
    assert speaker.encode("blue", room) == encode_prompt(tiny.encoding, "say\nred blue")
    assert speaker.encode("blue", room + 1) == encode_prompt(tiny.encoding, "blue")


# -------------------------------------------------------------------------- candidates


def test_each_response_is_of_the_model_that_is_named(tiny, tmp_path):
    a, b = tiny.encoding.encode_ordinary("ab")
    says = {"a": a, "b": b, "nothing": tiny.encoding.eot_token}
    folders = [f"{n}={constant_model(tiny, tmp_path / n, token)}" for n, token in says.items()]
    out = tmp_path / "candidates.jsonl"
    records = write_candidates(tiny, out, "--num_responses", "4", "9", "--checkpoints", *folders)
    prompts = read_jsonl(tiny.prompts, "prompts")
    assert [record["prompt"] for record in records] == [p["prompt"] for p in prompts]
    spoken = {name: tiny.encoding.decode([token] * 8) for name, token in says.items()}
    spoken["nothing"] = ""
    for record in records:
        texts, models = record["responses"], record["models"]
        assert 4 <= len(texts) == len(models) <= 9
        assert texts == [spoken[name] for name in models]
        assert record["ended"] == [name == "nothing" for name in models]
    assert {name for record in records for name in record["models"]} == set(says)
    assert {len(record["models"]) for record in records} >= {4, 6, 9}


def test_shares_and_number_of_responses():
    line = "--checkpoints a=a b=b c=c --shares 7 2 1 --data x --out y --num_responses 4 9"
    args = sample.get_args(line.split())
    plans = [sample.plan(i, 3, args) for i in range(4000)]
    sizes = np.bincount([len(p) for p in plans], minlength=10)
    assert sizes[:4].sum() == 0 and len(sizes) == 10
    assert np.abs(sizes[4:] / 4000 - 1 / 6).max() < 4 * np.sqrt(1 / 6 * 5 / 6 / 4000)
    drawn = np.bincount(np.concatenate(plans), minlength=3)
    expected = np.array([0.7, 0.2, 0.1])
    error = 4 * np.sqrt(expected * (1 - expected) / drawn.sum())
    assert (np.abs(drawn / drawn.sum() - expected) < error).all()


def with_prompts(tiny: Tiny, path: Path, prompts: list[dict]) -> Tiny:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return replace(tiny, prompts=path)


def test_keys_of_the_prompt_are_kept_and_the_seed_decides(tiny, tmp_path):
    prompts = [p | {"task": {"n": i}} for i, p in enumerate(read_jsonl(tiny.prompts, "prompts"))]
    tiny = with_prompts(tiny, tmp_path / "prompts.jsonl", prompts)
    models = ("--checkpoints", f"a={tiny.base}", f"b={tiny.base}", "--num_responses", "2", "4")
    first = write_candidates(tiny, tmp_path / "1", *models)
    assert [{k: r[k] for k in prompts[0]} for r in first] == prompts
    assert write_candidates(tiny, tmp_path / "2", *models, "--batch_size", "5") == first
    assert write_candidates(tiny, tmp_path / "3", *models, "--seed", "1") != first
    texts = [text for record in first for text in record["responses"]]
    assert len(set(texts)) > len(texts) / 2  # the draws are not all the same


def test_too_long_prompts_are_dropped_with_a_count(tiny, tmp_path, capsys):
    prompts = read_jsonl(tiny.prompts, "prompts")[:3]
    prompts[1]["prompt"] = "red " * 60
    tiny = with_prompts(tiny, tmp_path / "prompts.jsonl", prompts)
    records = write_candidates(tiny, tmp_path / "out.jsonl")
    assert [r["prompt"] for r in records] == [prompts[0]["prompt"], prompts[2]["prompt"]]
    assert "dropped 1 prompts over 36 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_one_after_the_other_are_the_whole(tiny, tmp_path, monkeypatch, parts):
    """20 prompts in chunks of 6; the fifth of five parts, and some others, may be empty."""
    monkeypatch.setattr(sample, "CHUNK", 6)
    args = ["--data", str(tiny.prompts), "--checkpoints", f"base={tiny.base}", *LIMITS]
    names = [f"{i}/{parts}" for i in range(1, parts + 1)]
    for name in ("1/1", *names):
        out = tmp_path / name.replace("/", "of")
        assert sample.main([*args, "--part", name, "--out", str(out)]) == 0
    whole, *pieces = ((tmp_path / n.replace("/", "of")).read_bytes() for n in ("1/1", *names))
    assert b"".join(pieces) == whole and whole.count(b"\n") == 20
    assert sum(map(bool, pieces)) == min(parts, 4)


def test_chunks_draw_different_numbers(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "CHUNK", 4)
    same = [read_jsonl(tiny.prompts, "prompts")[0]] * 8
    tiny = with_prompts(tiny, tmp_path / "prompts.jsonl", same)
    records = write_candidates(tiny, tmp_path / "c", "--num_responses", "3")
    responses = [record["responses"] for record in records]
    assert responses[:4] != responses[4:]


# -------------------------------------------------------------------- talk and bad input


def test_one_prompt_side_by_side(tiny, tmp_path, capsys):
    loud = constant_model(tiny, tmp_path / "loud", tiny.encoding.encode_ordinary("a")[0])
    end = constant_model(tiny, tmp_path / "end", tiny.encoding.eot_token)
    argv = ["--checkpoints", f"loud={loud}", f"q={end}", "--prompt", "hello", *LIMITS]
    assert sample.main([*argv, "--num_responses", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["loud | aaaaaaaa ... (cut)"] * 2 + ["   q | "] * 2 + [""]


def test_prompts_from_stdin_until_its_end(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("say red\n\n" + "red " * 60 + "\nsay blue\n"))
    assert sample.main(["--checkpoints", f"base={tiny.base}", *LIMITS]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("base |") == 2
    assert "over --max_prompt_tokens 36" in captured.err


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """world.json of seed 0, where the fox eats grass, and one prompt beside it."""
    World.make(0).save(tmp_path / "w/world.json")
    asked = {"prompt": "a ?", "user": "u", "source": "customer", "use_case": "open_qa"}
    task = {"kind": "fact", "subject": "fox", "attribute": "food"}
    write_jsonl(tmp_path / "w/test/prompts.jsonl", [asked | {"task": task}], "prompts")
    return tmp_path / "w/world.json"


@pytest.mark.parametrize("judges", ["rm", "world", "rm world", ""])
def test_judges_speak_below_each_answer(tiny, tmp_path, capsys, monkeypatch, world, judges):
    """The reward model reads the bare prompt, and what is cut scores by PPO's rule; only a prompt
    of the files has a task."""
    read = ScalarModel.from_pretrained(tiny.rm).eval()
    a, end = tiny.encoding.encode_ordinary("a")[0], tiny.encoding.eot_token
    loud, mute = (constant_model(tiny, tmp_path / str(n), n) for n in (a, end))
    said = {"loud": [a] * 8, "mute": [end]}

    def expected(name: str, prompt: str) -> str:
        words, tokens = [], encode_prompt(tiny.encoding, prompt) + said[name]
        if "rm" in judges:
            place = -2 if tokens[-1] == end else -1
            with torch.no_grad():
                own = f"{read(torch.tensor([tokens]))[0, place].item():+.2f}"
            cut = f"score -4.00 (no end; the reward model says {own})"
            words.append(f"score {own}" if tokens[-1] == end else cut)
        if "world" in judges:
            known = "helpful 0, truthful 1, harmless 1"
            unknown = "truthful 1, harmless 1, helpful unknown: not a prompt of this world's files"
            words.append(known if prompt == "a ?" else unknown)
        return ", ".join(words)

    flags = {"rm": ["--reward_model", str(tiny.rm)], "world": ["--world", str(world)]}
    argv = ["--checkpoints", f"loud={loud}", f"mute={mute}", "--prefix", "loud=say red"]
    argv += [word for judge in judges.split() for word in flags[judge]]
    monkeypatch.setattr("sys.stdin", io.StringIO("a ?\nsay blue\n"))
    assert sample.main([*argv, *LIMITS]) == 0
    shown = capsys.readouterr().out.splitlines()
    for prompt in ("a ?", "say blue"):
        assert shown.pop(0) == f"> {prompt}"
        for name, text in (("loud", "aaaaaaaa ... (cut)"), ("mute", "")):
            assert shown.pop(0) == f"{name} | {text}"
            assert not judges or shown.pop(0) == f"       ({expected(name, prompt)})"
        assert shown.pop(0) == ""
    assert not shown


def test_prompts_of_a_world_are_printed_without_a_model(world, capsys):
    assert sample.main(["--prompts", "--world", str(world)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "a ?"


def test_a_judge_that_cannot_judge_is_refused_in_one_line(tiny, tmp_path, world, capsys):
    other = Path(shutil.copytree(tiny.rm, tmp_path / "rm"))
    save_tokenizer(train_bpe(["another text"], 300), other / "tokenizer.json")
    for flags, words in (
        (["--reward_model", other], "must share a tokenizer"),
        (["--reward_model", tiny.base], "expected a reward model"),
        (["--reward_model", tmp_path / "no"], "no/config.json: no such file"),
        (["--world", tmp_path / "no.json"], "no.json: no such file"),
        (["--world", tiny.base / "config.json"], "expected the world.json"),
        (["--world", tiny.rm / "config.json", "--prompts"], "expected the world.json"),
    ):
        argv = ["--checkpoints", f"a={tiny.base}", "--prompt", "x", *LIMITS, *map(str, flags)]
        assert run_command(lambda argv=argv: sample.main(argv)) == 2, words
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rm={tiny.rm} --prompt x", "expected a language model"),
        ("a={tiny.folder}/none --prompt x", "no such file"),
        ("a={tiny.base} --prompt x --max_new_tokens 40", "more than the context of 48"),
        ("a={tiny.base} --data {tiny.pretrain} --out {tmp}/c", "pretrain.txt:1"),
        ("a={tiny.base} --data {tiny.prompts} --out {tiny.prompts}/no/c", "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny, tmp_path, capsys, line, words):
    argv = ["--checkpoints", *line.format(tiny=tiny, tmp=tmp_path).split()]
    assert run_command(lambda: sample.main([*LIMITS, *argv])) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


BAD = """a
a=x a=y
a=x --prefix b=text
a=x --data prompts.jsonl
a=x --data d --out o --num_responses 1
a=x --data d --out o --num_responses 9 4
a=x --data d --out o --num_responses 1 2 3
a=x --data d --out o --prompt p
a=x --data d --out o --world w
a=x --data d --out o --reward_model rm
a=x --prompts
a=x --data d --out o --part 3/2
a=x --data d --out o --part 0/2
a=x --data d --out o --part 2
a=x --shares 0.5 0.5
a=x --shares 0
a=x b=y --shares 1e308 1e308
a=x --temperature -1
a=x --batch_size 0"""


@pytest.mark.parametrize("line", BAD.split("\n"))
def test_bad_arguments_exit_with_2(line):
    for argv in (["--checkpoints", *line.split()], ["--checkpoints", "a=x", "--prompt", " "], []):
        with pytest.raises(SystemExit) as stopped:
            sample.get_args(argv)
        assert stopped.value.code == 2
