"""train_sft.py: what is in the loss, how examples are drawn, the schedule, and that it learns."""

import argparse
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from data.commands import run_command
from data.files import BadInput, read_log, write_documents, write_jsonl
from data.tokenizer import encode_prompt, encode_response

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import checkpoint
import train_sft
from checkpoint import read_info
from model import GPT, GPTConfig
from tests import runs as planted
from tests.runs import Bugs, Runner, Seen, call, close, is_caught
from tests.tiny import Tiny

END = 9
# Two rows: prompt (7, 3) with response (5, 1, END), prompt (2,) with response (END,).
EXAMPLES = [([7, 3, 5, 1, END], 2), ([2, END], 1), ([4, 4, 4, 8, 6, END], 3), ([1, 0, 2], 1)]
MIXED = "--pretrain_data {pretrain} --pretrain_fraction 0.2"


def arguments(flags: str = "") -> argparse.Namespace:
    return train_sft.get_args(f"--data x --device cpu {flags}".split())


def make_gpt(pdrop: float = 0.0) -> GPT:
    model = GPT(GPTConfig(10, 16, 16, n_layer=2, n_head=2, resid_pdrop=pdrop, eos_token_id=END))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Runner:
    """One step on demonstrations alone, without dropout, gradients unclipped."""
    flags = "--max_steps 1 --batch_size 7 --resid_pdrop 0 --grad_clip 0 --no-epoch_checkpoints"
    return Runner(train_sft, tiny, tmp_path, flags, "--val_data --pretrain_data", "collate")


def examples_of(seen: Seen) -> list[train_sft.Example]:
    return [example for examples, _ in seen.arguments["collate"] for example in examples]


def reference_loss(model: GPT, examples: list[train_sft.Example]) -> Tensor:
    """Token by token in float64: mean of -log p of every token after the first `skipped`."""
    losses = []
    for tokens, skipped in examples:
        for t in range(skipped, len(tokens)):
            logits = model(torch.tensor([tokens[:t]]))[0, -1] @ model.wte.weight.T
            losses.append(-logits.double().log_softmax(-1)[tokens[t]])
    return torch.stack(losses).mean()


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    """In the order in which the optimizer has the parameters: matrices, then vectors."""
    parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)
    return list(torch.autograd.grad(loss, parameters))


# ------------------------------------------------------------------------------------------------
# Loss


def check_mask() -> None:
    """Hand-worked: response tokens and the end token count, prompt and padding do not."""
    tokens, lengths, mask = train_sft.collate(EXAMPLES[:2], make_gpt())
    assert tokens.tolist() == [[7, 3, 5, 1, END], [2, END, END, END, END]]
    assert lengths.tolist() == [5, 2]
    assert mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]


def check_loss(run: Runner) -> None:
    """The loss of a step and its gradient equal a loop over tokens in float64."""
    seen, model = run("--max_steps 2 --lr 0"), GPT.from_pretrained(run.tiny.base)
    examples = examples_of(seen)
    assert len(examples) == 14 and len({skipped for _, skipped in examples}) > 1
    for step, batch in enumerate((examples[:7], examples[7:])):
        expected = reference_loss(model, batch)
        assert abs(float(seen.log[step]["loss"]) - expected.item()) < 1e-5
        assert close(seen.gradients[step], gradients(model, expected))


def check_prompt_is_context_only() -> None:
    """The prompt acts on the loss only as context: its own prediction is not trained."""
    model = make_gpt()
    batch = train_sft.collate([([7, 3, 5], 2)], model)
    loss = train_sft.sft_loss(model, *batch)
    logits = (model(batch[0])[0] @ model.unembedding.T).double().log_softmax(-1)
    assert abs(loss.item() + logits[1, 5].item()) < 1e-5  # -log p(5 | 7, 3) and nothing else


def check_micro_batches(run: Runner) -> None:
    """Micro-batches of any size give the same losses and gradient."""
    whole, *others = (run(f"{MIXED} --micro_batch_size {size}") for size in (0, 3, 1))
    for other in others:
        for name, value in whole.log[0].items():
            assert abs(float(value) - float(other.log[0][name])) < 1e-6 * max(1, float(value)), name
        assert close(other.gradients[0], whole.gradients[0])


def check_mix_weights(run: Runner) -> None:
    """With fraction f, f of the sequences are pretraining text, in its full context, and the loss
    is (1 - f) of the mean over demonstrated tokens plus f of the mean over the text's."""
    seen, model = run(MIXED), GPT.from_pretrained(run.tiny.base)
    examples = examples_of(seen)
    assert len(examples) == 7 + 2 and {(len(y), n) for y, n in examples[7:]} == {(48, 1)}
    loss, mixed = reference_loss(model, examples[:7]), reference_loss(model, examples[7:])
    assert abs(float(seen.log[0]["loss"]) - loss.item()) < 1e-5
    assert abs(float(seen.log[0]["pretrain_loss"]) - mixed.item()) < 1e-5
    assert close(seen.gradients[0], gradients(model, 0.8 * loss + 0.2 * mixed))


# ------------------------------------------------------------------------------------------------
# Schedule and batches


def check_schedule() -> None:
    """A cosine from the peak at step 1 to a tenth at the last; with warm-up, linear before it."""
    args = arguments("--lr 2.0")
    rates = [train_sft.learning_rate(step, 101, args) for step in range(1, 102)]
    assert rates[0] == 2.0 and abs(rates[-1] - 0.2) < 1e-12
    assert abs(rates[50] - 1.1) < 1e-12  # half-way between them
    assert abs(rates[25] - (1.1 + 0.9 * math.cos(math.pi / 4))) < 1e-12
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    warm = arguments("--lr 2.0 --warmup_steps 4")
    rates = [train_sft.learning_rate(step, 11, warm) for step in range(1, 12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert abs(rates[7] - 1.1) < 1e-12 and abs(rates[-1] - 0.2) < 1e-12
    assert train_sft.learning_rate(1, 1, args) == 2.0


def check_epochs() -> None:
    """An epoch visits each example once, in batches of similar length, in an order of its own."""
    lengths = np.random.default_rng(0).integers(1, 100, size=1003)

    def batches_of(seed: int, epoch: int) -> list[np.ndarray]:
        return train_sft.epoch_batches(lengths, 16, seed, epoch)

    batches = batches_of(1, 0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    assert [len(batch) for batch in batches].count(16) == len(batches) - 1 == 62
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    random_spread = np.mean([np.ptp(lengths[i : i + 16]) for i in range(0, 1000, 16)])
    assert spread < 0.35 * random_spread  # little is padded
    order = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.35  # long ones are not last
    assert all(np.array_equal(a, b) for a, b in zip(batches, batches_of(1, 0), strict=True))
    for other in (batches_of(2, 0), batches_of(1, 1)):
        assert not np.array_equal(np.concatenate(batches), np.concatenate(other))


def check_pretraining_batches() -> None:
    """Short sequences first, each sequence once, batches of equally many tokens."""
    lengths = np.array([24] * 21 + [6] * 40)
    batches = train_sft.pretraining_batches(lengths, 4, 0, 0)
    assert [set(lengths[batch].tolist()) for batch in batches] == [{6}] * 3 + [{24}] * 6
    assert sorted(int(lengths[batch].sum()) for batch in batches) == [24, 48] + [96] * 7
    assert sorted(np.concatenate(batches).tolist()) == list(range(61))


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]
CHECKS.append(planted.check_step)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check: Callable, run: Runner) -> None:
    call(check, run)


# ------------------------------------------------------------------------------------------------
# Planted bugs: each must make its checks fail

BUGS = Bugs(CHECKS)
plant = BUGS.plant
plant("learning_rate", "step", constant=lambda f, step, total, args: args.lr)
plant("clip_grad_norm_", "step", no_clip=lambda f, p, limit: f(p, math.inf))
plant("torch.optim.Optimizer.zero_grad", "loss", gradients_stay=lambda f, adam, set_to_none: None)


@plant("collate", "mask loss")
def padding_in_the_loss(f: Callable, examples: list, model: GPT) -> tuple[Tensor, Tensor, Tensor]:
    tokens, lengths, mask = f(examples, model)
    return tokens, lengths, mask | (torch.arange(tokens.shape[1]) >= lengths[:, None])


@plant("collate", "mask loss")
def end_token_not_in_the_loss(f: Callable, examples: list, model: GPT) -> tuple:
    tokens, lengths, mask = f(examples, model)
    return tokens, lengths, mask & (tokens != model.config.eos_token_id)


@plant("sft_loss", "mix_weights")
def weight_ignored(
    f: Callable, model: GPT, tokens: Tensor, lengths: Tensor, mask: Tensor
) -> Tensor:
    """The gradients of demonstrations and of text, which has no prompt, count half each."""
    loss, factor = f(model, tokens, lengths, mask), 0.5 / (0.2 if mask[:, 1:].all() else 0.8)
    return loss.detach() + factor * (loss - loss.detach())


@plant("epoch_batches", "epochs")
def drawn_with_replacement(f: Callable, lengths: np.ndarray, size: int, *seeds: int) -> list:
    order = np.random.default_rng(seeds).integers(len(lengths), size=len(lengths))
    return np.split(np.sort(order), range(size, len(order), size))


plant(
    "collate",
    "mask loss prompt_is_context_only",
    prompt_in_the_loss=lambda f, examples, model: f([(y, 1) for y, _ in examples], model),
)
plant(
    "sft_loss",
    "micro_batches",
    mean_of_means=lambda f, model, y, n, mask: 10 * f(model, y, n, mask) / mask.sum(),
)
plant(
    "sft_loss",
    "mix_weights loss",
    gradient_of_the_sum=lambda f, model, *batch: 10 * f(model, *batch),
)
plant(
    "learning_rate",
    "schedule",
    cosine_to_zero=lambda f, step, total, args: (f(step, total, args) - 0.1 * args.lr) / 0.9,
    linear=lambda f, step, n, args: args.lr * (1 - 0.9 * (step - 1) / max(1, n - 1)),
    from_step_0=lambda f, step, total, args: f(step + 1, total, args),
)
plant(
    "epoch_batches",
    "epochs",
    sorted_by_length=lambda f, n, size, *_: np.split(np.argsort(n), range(size, len(n), size)),
    same_order_each_epoch=lambda f, lengths, size, seed, epoch: f(lengths, size, seed, 0),
    not_bucketed=lambda f, lengths, *rest: f(0 * lengths, *rest),
)
plant(
    "pretraining_batches",
    "pretraining_batches",
    long_ones_first=lambda f, lengths, *rest: f(lengths, *rest)[::-1],
    as_many_sequences=lambda f, lengths, *rest: [
        part for batch in f(lengths, *rest) for part in np.split(batch, range(4, len(batch), 4))
    ],
)


@pytest.mark.parametrize(("target", "bug", "check"), BUGS, ids=lambda x: getattr(x, "__name__", x))
def test_planted_bug_is_caught(target: str, bug: Callable, check: Callable, run: Runner) -> None:
    is_caught(check, target, bug, train_sft, run)


# ------------------------------------------------------------------------------------------------
# Data


def demonstration(prompt: str, response: str) -> dict:
    whose = {"user": "u", "source": "labeler", "use_case": "other"}
    return {"prompt": prompt, "response": response} | whose


def test_a_demonstration_is_prompt_response_end(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    write_jsonl(path, [demonstration("say red 1 times ", "red red")], "demonstrations")
    ((tokens, skipped),) = train_sft.load_demonstrations(str(path), tiny.encoding, arguments())
    assert tiny.encoding.decode(tokens) == "say red 1 times\n\nred red<|endoftext|>"
    assert tiny.encoding.decode(tokens[:skipped]) == "say red 1 times\n\n"


def test_long_prompts_are_dropped_and_long_responses_cut_with_a_count(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, sizes = str(tmp_path / "d.jsonl"), [(1, 1), (50, 1), (2, 30), (60, 30)]
    records = [demonstration("red " * words, "blue " * answers) for words, answers in sizes]
    write_jsonl(path, records, "demonstrations")
    prompt = encode_prompt(tiny.encoding, records[2]["prompt"])
    response = encode_response(tiny.encoding, records[2]["response"])
    args = arguments(f"--max_prompt_tokens {len(prompt)} --max_new_tokens 20")
    examples = train_sft.load_demonstrations(path, tiny.encoding, args)
    assert len(examples) == 2
    assert examples[1] == (prompt + response[:20], len(prompt))  # exactly at the limit: kept
    said = capsys.readouterr().out
    assert f"2 demonstrations; dropped 2 with a prompt over {len(prompt)} tokens" in said
    assert "cut 1 responses over 20" in said
    with pytest.raises(BadInput, match="no prompt is within --max_prompt_tokens 1"):
        train_sft.load_demonstrations(path, tiny.encoding, arguments("--max_prompt_tokens 1"))


def test_pretraining_sequences_are_the_stream_of_documents(tiny: Tiny, tmp_path: Path) -> None:
    path, encoding = str(tmp_path / "p.txt"), tiny.encoding
    documents = ["red is <|endoftext|> a colour", "blue", "the house"]
    write_documents(path, documents)
    sizes = [len(encoding.encode_ordinary(document)) + 1 for document in documents]
    stream = [t for d in documents for t in [*encoding.encode_ordinary(d), encoding.eot_token]]
    assert stream.count(encoding.eot_token) == 3  # the literal end token in a text is text
    examples = train_sft.load_sequences(path, encoding, 7)
    assert [t for tokens, _ in examples for t in tokens] == stream[: len(stream) // 7 * 7]
    assert {(len(tokens), skipped) for tokens, skipped in examples} == {(7, 1)}
    short = train_sft.load_sequences(path, encoding, 7, short_tokens=3, short_fraction=0.5)
    turn = len(stream) // 2
    assert [len(y) for y, _ in short] == [3] * (turn // 3) + [7] * ((len(stream) - turn) // 7)
    # To be mixed in: a sequence at each document's start, and every 7 tokens in a longer one.
    starts = [sum(sizes[:i]) + j for i, size in enumerate(sizes) for j in range(0, size, 7)]
    own = [min(7, size - j) for size in sizes for j in range(0, size, 7)]
    kept = [start for start in starts if start + 7 <= len(stream)]
    assert len(kept) < len(starts)  # the text ends before the last does
    mixed, ends = train_sft.load_beginnings(path, encoding, 7)
    assert [tokens for tokens, _ in mixed] == [stream[i : i + 7] for i in kept]
    assert np.diff(ends, prepend=0).tolist() == own[: len(kept)]  # drawn by length
    for load in (train_sft.load_sequences, train_sft.load_beginnings):
        with pytest.raises(BadInput, match=f"{len(stream)} tokens, fewer than the context of 100"):
            load(path, encoding, 100)


# ------------------------------------------------------------------------------------------------
# Runs


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    model = make_gpt(pdrop=0.5).train()
    batch = train_sft.collate(EXAMPLES, model)
    assert train_sft.sft_loss(model, *batch) != train_sft.sft_loss(model, *batch)
    plain = make_gpt()
    plain.load_state_dict(model.state_dict())
    expected = reference_loss(plain, EXAMPLES).item()
    assert abs(train_sft.evaluate(model, EXAMPLES, arguments()) - expected) < 1e-5
    assert model.training  # and on it goes


def test_a_few_steps_lower_the_loss(tiny: Tiny, tmp_path: Path) -> None:
    out, flags = tmp_path / "sft", "--epochs 15 --lr 5e-3 --resid_pdrop 0"
    assert train_sft.main(tiny.args("sft", out, *flags.split())) == 0
    rows = read_log(out / "log.csv")
    columns = "step epoch lr grad_norm tokens val_loss loss pretrain_loss"
    assert list(rows[0]) == columns.split()
    assert [int(row["step"]) for row in rows] == list(range(1, 61))  # 14 examples in fours
    args = arguments(flags)
    for row in rows:
        rate = train_sft.learning_rate(int(row["step"]), 60, args)
        assert float(row["lr"]) == pytest.approx(rate) and int(row["epoch"]) == -(
            -int(row["step"]) // 4
        )
    validated = [row for row in rows if row["val_loss"]]
    assert [int(row["step"]) for row in validated] == list(range(4, 61, 4))
    assert float(rows[0]["loss"]) > 5  # about log 300
    assert float(validated[-1]["val_loss"]) < 2.0
    assert float(rows[-1]["pretrain_loss"]) < 5
    info = read_info(out)
    assert (info["stage"], info["data"]) == ("sft", [str(tiny.demonstrations), str(tiny.pretrain)])
    assert sorted(p.name for p in (out / "epochs").iterdir()) == [f"{e:02}" for e in range(1, 16)]
    last = GPT.from_pretrained(out / "epochs/15")
    assert all(map(torch.equal, last.parameters(), GPT.from_pretrained(out).parameters()))
    assert read_info(out / "epochs/03")["epoch"] == 3
    assert f"{read_info(out / 'epochs/03')['val_loss']:.9g}" == validated[2]["val_loss"]


def test_pretraining_starts_from_a_new_model(tiny: Tiny, tmp_path: Path) -> None:
    flags = (
        "--n_layer 1 --n_head 2 --n_embd 32 --n_positions 24 --epochs 6 --batch_size 8 --lr 1e-2 "
        "--resid_pdrop 0 --device cpu --weight_decay 0.1 --pretrain_data {0} "
        "--val_pretrain_data {0} --tokenizer {1} --out {2}"
    )
    paths, out = (tiny.pretrain, tiny.tokenizer, tmp_path / "base"), tmp_path / "base"
    assert train_sft.main([word.format(*paths) for word in flags.split()]) == 0
    rows = read_log(out / "log.csv")
    assert float(rows[-1]["val_pretrain_loss"]) < float(rows[0]["loss"]) - 1.5
    assert not {"pretrain_loss", "val_loss"} & set(rows[0])
    assert read_info(out)["stage"] == "base"
    config = GPT.from_pretrained(out).config
    assert (config.n_layer, config.n_embd, config.n_positions) == (1, 32, 24)
    assert config.vocab_size == tiny.encoding.n_vocab
    assert config.eos_token_id == tiny.encoding.eot_token
    assert not (out / "epochs").exists()


def test_a_run_starts_from_downloaded_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`--init gpt2` finds data/downloads/gpt2; without it, the error says how to get it."""
    monkeypatch.setattr(checkpoint, "DOWNLOADS", tmp_path / "downloads")
    args = tiny.args("sft", tmp_path / "sft", "--init", "gpt2", "--max_steps", "1")
    assert run_command(lambda: train_sft.main(args)) == 2
    assert "data.real.prepare --download gpt2`" in capsys.readouterr().err
    shutil.copytree(tiny.base, tmp_path / "downloads" / "gpt2")
    assert train_sft.main(args) == 0


def test_checkpointing_changes_no_byte(run: Runner) -> None:
    """Of a run in bfloat16 with dropout."""
    flags = f"{MIXED} --max_steps 3 --resid_pdrop 0.2 --dtype bfloat16"
    again, plain = run(f"{flags} --grad_checkpointing"), run(flags)
    assert again.log == plain.log and float(plain.log[0]["loss"]) > 5
    files = [seen.out / "model.safetensors" for seen in (again, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bfloat16_training_follows_float32(run: Runner) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        rows = run(f"{MIXED} --max_steps 8 --dtype {dtype}").log
        losses.append(torch.tensor([float(row["loss"]) for row in rows]))
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.02


@pytest.mark.slow
def test_compiled_blocks_train_alike(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile with the tracing of a GPU's compiler, but without its code generation."""
    original, compiled_modules = torch.nn.Module.compile, []

    def traced(self, **kwargs) -> None:
        compiled_modules.append(self)
        original(self, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    compiled, plain = run("--max_steps 2 --compile"), run("--max_steps 2")
    assert len(compiled_modules) == 2  # the blocks
    for a, b in zip(compiled.log, plain.log, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    names = [set(load_file(seen.out / "model.safetensors")) for seen in (compiled, plain)]
    assert names[0] == names[1]


# ------------------------------------------------------------------------------------------------
# The attention function


def test_score_mod_of_a_new_model_of_init_and_of_neither(tiny: Tiny, tmp_path: Path) -> None:
    """Given, it is the model's, in training and in config.json; else that of --init stays."""

    def trained(name: str, *more: str) -> tuple[dict, float]:
        out = tmp_path / name
        flags = ("--max_steps", "1", "--resid_pdrop", "0", "--no-epoch_checkpoints", *more)
        assert train_sft.main(tiny.args("sft", out, *flags)) == 0
        return read_info(out), float(read_log(out / "log.csv")[0]["loss"])

    info, causal = trained("causal")
    assert info["score_mod"] == "causal" and info["settings"]["score_mod"] is None
    info, narrow = trained("narrow", "--score_mod", "window:2")
    assert info["score_mod"] == info["settings"]["score_mod"] == "window:2"
    assert abs(narrow - causal) > 1e-6
    assert trained("wide", "--score_mod", "window:48")[1] == pytest.approx(causal, abs=1e-5)
    kept, loss = trained("kept", "--init", str(tmp_path / "narrow"))
    assert kept["score_mod"] == "window:2" and kept["settings"]["score_mod"] is None
    model = GPT.from_pretrained(tmp_path / "kept")
    assert all(block.attn.how["score_mod"] == "window:2" for block in model.h)
    changed, other = trained("changed", "--init", str(tmp_path / "narrow"), "--score_mod", "causal")
    assert changed["score_mod"] == "causal" and abs(other - loss) > 1e-6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "score_mod 'nope' is unknown; choose one of causal, "),
        ("window", "score_mod 'window': expected a number after the colon, found ''"),
        ("window:-3", "score_mod 'window:-3': expected a whole number from 1, as in window:256"),
    ],
)
def test_a_bad_score_mod_is_one_line(
    name: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as error:
        arguments(f"--score_mod {name}")
    said = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and f"error: argument --score_mod: {message}" in said
