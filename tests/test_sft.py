"""train_sft.py: what is in the loss, how examples are drawn, the schedule, and that it learns."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import train_sft
from checkpoint import read_info
from data.files import BadInput, read_log, write_documents, write_jsonl
from data.tokenizer import encode_prompt, encode_response
from model import GPT, GPTConfig
from tests.tiny import Tiny
from train_sft import backward, collate, epoch_batches, evaluate, learning_rate, main, sft_loss

END = 9
# Two rows: prompt (7, 3) with response (5, 1, END), prompt (2,) with response (END,).
EXAMPLES = [([7, 3, 5, 1, END], 2), ([2, END], 1), ([4, 4, 4, 8, 6, END], 3), ([1, 0, 2], 1)]


def arguments(*more: str) -> argparse.Namespace:
    return train_sft.get_args(["--data", "x", "--device", "cpu", *more])


def make_gpt(pdrop: float = 0.0) -> GPT:
    config = GPTConfig(
        vocab_size=10,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=pdrop,
        eos_token_id=END,
    )
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def reference_loss(model: GPT, examples: list[tuple[list[int], int]]) -> Tensor:
    """Token by token in float64: mean of -log p of every token after the first `skipped`."""
    losses = []
    for tokens, skipped in examples:
        for t in range(skipped, len(tokens)):
            logits = model(torch.tensor([tokens[:t]]))[0, -1] @ model.wte.weight.T
            losses.append(-logits.double().log_softmax(-1)[tokens[t]])
    return torch.stack(losses).mean()


def gradients(model: GPT) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


# ------------------------------------------------------------------------------------------------
# Loss


def check_mask() -> None:
    """Hand-worked: response tokens and the end token count, prompt and padding do not."""
    tokens, lengths, mask = collate(EXAMPLES[:2], END, torch.device("cpu"))
    assert tokens.tolist() == [[7, 3, 5, 1, END], [2, END, END, END, END]]
    assert lengths.tolist() == [5, 2]
    assert mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]


def check_loss() -> None:
    """The loss and its gradient equal a loop over tokens in float64."""
    model = make_gpt()
    loss = backward(model, EXAMPLES, 1.0, arguments("--batch_size", "4"))
    ours = gradients(model)
    model.zero_grad()
    expected = reference_loss(model, EXAMPLES)
    expected.backward()
    assert abs(loss - expected.item()) < 1e-5
    for a, b in zip(ours, gradients(model), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp(min=1e-3)


def check_prompt_is_context_only() -> None:
    """The prompt acts on the loss only as context: its own prediction is not trained."""
    model = make_gpt()
    tokens, lengths, mask = collate([([7, 3, 5], 2)], END, torch.device("cpu"))
    loss = sft_loss(model, tokens, lengths, mask)
    logits = (model(tokens)[0] @ model.unembedding.T).double().log_softmax(-1)
    assert abs(loss.item() + logits[1, 5].item()) < 1e-5  # -log p(5 | 7, 3) and nothing else


def check_micro_batches() -> None:
    """Micro-batches of any size give the same loss and gradient."""
    model, results = make_gpt(), []
    for size in (4, 3, 1):
        model.zero_grad()
        args = arguments("--batch_size", "4", "--micro_batch_size", str(size))
        results.append((backward(model, EXAMPLES, 0.7, args), gradients(model)))
    for loss, grads in results[1:]:
        assert abs(loss - results[0][0]) < 1e-6
        for a, b in zip(grads, results[0][1], strict=True):
            assert (a - b).abs().max() < 1e-6


def check_mix_weights() -> None:
    """backward(weight f) after backward(weight 1 - f) is the gradient of (1 - f) a + f b."""
    model, args = make_gpt(), arguments()
    backward(model, EXAMPLES[:2], 0.9, args)
    backward(model, EXAMPLES[2:], 0.1, args)
    ours = gradients(model)
    model.zero_grad()
    mean, mixed = reference_loss(model, EXAMPLES[:2]), reference_loss(model, EXAMPLES[2:])
    (0.9 * mean + 0.1 * mixed).backward()
    for a, b in zip(ours, gradients(model), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp(min=1e-3)


# ------------------------------------------------------------------------------------------------
# Schedule and batches


def check_schedule() -> None:
    """A cosine from the peak at step 1 to a tenth at the last; with warm-up, linear before it."""
    args = arguments("--lr", "2.0")
    rates = [learning_rate(step, 101, args) for step in range(1, 102)]
    assert rates[0] == 2.0 and abs(rates[-1] - 0.2) < 1e-12
    assert abs(rates[50] - 1.1) < 1e-12  # half-way between them
    assert abs(rates[25] - (1.1 + 0.9 * math.cos(math.pi / 4))) < 1e-12
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    args = arguments("--lr", "2.0", "--warmup_steps", "4")
    rates = [learning_rate(step, 11, args) for step in range(1, 12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert abs(rates[7] - 1.1) < 1e-12 and abs(rates[-1] - 0.2) < 1e-12
    assert learning_rate(1, 1, arguments("--lr", "2.0")) == 2.0


def check_epochs() -> None:
    """An epoch visits each example once, in batches of similar length, in an order of its own."""
    lengths = np.random.default_rng(0).integers(1, 100, size=1003)
    batches = epoch_batches(lengths, 16, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    assert [len(batch) for batch in batches].count(16) == len(batches) - 1 == 62
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    random_spread = np.mean([np.ptp(lengths[i : i + 16]) for i in range(0, 1000, 16)])
    assert spread < 0.35 * random_spread  # little is padded
    order = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.35  # long ones are not last
    again = epoch_batches(lengths, 16, seed=1, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    for seed, epoch in ((2, 0), (1, 1)):
        other = epoch_batches(lengths, 16, seed=seed, epoch=epoch)
        assert not np.array_equal(np.concatenate(batches), np.concatenate(other))


CHECKS = [
    check_mask,
    check_loss,
    check_prompt_is_context_only,
    check_micro_batches,
    check_mix_weights,
    check_schedule,
    check_epochs,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check: Callable[[], None]) -> None:
    check()


# ------------------------------------------------------------------------------------------------
# Planted bugs: each must make its check fail


def prompt_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    original = train_sft.collate

    def collate_all(examples, end, device):
        return original([(tokens, 1) for tokens, _ in examples], end, device)

    patch.setattr(train_sft, "collate", collate_all)
    patch.setitem(globals(), "collate", collate_all)


def padding_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    original = train_sft.collate

    def collate_all(examples, end, device):
        tokens, lengths, mask = original(examples, end, device)
        return tokens, lengths, mask | (torch.arange(tokens.shape[1]) >= lengths[:, None])

    patch.setattr(train_sft, "collate", collate_all)
    patch.setitem(globals(), "collate", collate_all)


def end_token_not_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    original = train_sft.collate

    def collate_all(examples, end, device):
        tokens, lengths, mask = original(examples, end, device)
        return tokens, lengths, mask & (tokens != end)

    patch.setattr(train_sft, "collate", collate_all)
    patch.setitem(globals(), "collate", collate_all)


def mean_of_micro_batch_means(patch: pytest.MonkeyPatch) -> None:
    def backward_of_means(model, examples, weight, args):
        total, size = 0.0, args.micro_batch_size
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        for part in parts:
            batch = collate(part, END, torch.device("cpu"))
            loss = sft_loss(model, *batch) / batch[2].sum() / len(parts)
            (weight * loss).backward()
            total += loss.item()
        return total

    patch.setitem(globals(), "backward", backward_of_means)


def weight_ignored(patch: pytest.MonkeyPatch) -> None:
    original = train_sft.backward
    patch.setitem(
        globals(),
        "backward",
        lambda model, examples, weight, args: original(model, examples, 0.5, args),
    )


def gradient_of_the_sum(patch: pytest.MonkeyPatch) -> None:
    original = train_sft.backward
    patch.setitem(
        globals(),
        "backward",
        lambda model, examples, weight, args: original(model, examples, weight * 10, args),
    )


def cosine_to_zero(patch: pytest.MonkeyPatch) -> None:
    def rate(step, total, args):
        return args.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / max(1, total - 1)))

    patch.setitem(globals(), "learning_rate", rate)


def linear_schedule(patch: pytest.MonkeyPatch) -> None:
    def rate(step, total, args):
        return args.lr * (1 - 0.9 * (step - 1) / max(1, total - 1))

    patch.setitem(globals(), "learning_rate", rate)


def schedule_from_step_0(patch: pytest.MonkeyPatch) -> None:
    original = train_sft.learning_rate
    patch.setitem(
        globals(), "learning_rate", lambda step, total, args: original(step + 1, total, args)
    )


def drawn_with_replacement(patch: pytest.MonkeyPatch) -> None:
    def batches(lengths, batch_size, seed, epoch):
        rng = np.random.default_rng([seed, epoch])
        order = np.sort(rng.integers(len(lengths), size=len(lengths)))
        return np.split(order, range(batch_size, len(order), batch_size))

    patch.setitem(globals(), "epoch_batches", batches)


def sorted_by_length(patch: pytest.MonkeyPatch) -> None:
    def batches(lengths, batch_size, seed, epoch):
        return np.split(np.argsort(lengths), range(batch_size, len(lengths), batch_size))

    patch.setitem(globals(), "epoch_batches", batches)


def same_order_each_epoch(patch: pytest.MonkeyPatch) -> None:
    original = train_sft.epoch_batches
    patch.setitem(
        globals(),
        "epoch_batches",
        lambda lengths, batch_size, seed, epoch: original(lengths, batch_size, seed, 0),
    )


def not_bucketed(patch: pytest.MonkeyPatch) -> None:
    original = train_sft.epoch_batches
    patch.setitem(
        globals(),
        "epoch_batches",
        lambda lengths, batch_size, seed, epoch: original(
            np.zeros_like(lengths), batch_size, seed, epoch
        ),
    )


BUGS = [
    (prompt_in_the_loss, check_mask),
    (prompt_in_the_loss, check_loss),
    (prompt_in_the_loss, check_prompt_is_context_only),
    (padding_in_the_loss, check_mask),
    (padding_in_the_loss, check_loss),
    (end_token_not_in_the_loss, check_loss),
    (mean_of_micro_batch_means, check_micro_batches),
    (weight_ignored, check_mix_weights),
    (gradient_of_the_sum, check_mix_weights),
    (gradient_of_the_sum, check_loss),
    (cosine_to_zero, check_schedule),
    (linear_schedule, check_schedule),
    (schedule_from_step_0, check_schedule),
    (drawn_with_replacement, check_epochs),
    (sorted_by_length, check_epochs),
    (same_order_each_epoch, check_epochs),
    (not_bucketed, check_epochs),
]


@pytest.mark.parametrize(
    ("bug", "check"), BUGS, ids=lambda item: item.__name__.removeprefix("check_")
)
def test_planted_bug_is_caught(
    bug: Callable, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# ------------------------------------------------------------------------------------------------
# Data


def test_a_demonstration_is_prompt_response_end(tiny: Tiny, tmp_path: Path) -> None:
    record = {
        "prompt": "say red 1 times ",
        "response": "red red",
        "user": "u",
        "source": "labeler",
        "use_case": "other",
    }
    write_jsonl(tmp_path / "d.jsonl", [record], "demonstrations")
    [(tokens, skipped)], numbers = train_sft.load_demonstrations(
        str(tmp_path / "d.jsonl"), tiny.encoding, arguments()
    )
    assert numbers == [1]
    assert tiny.encoding.decode(tokens) == "say red 1 times\n\nred red<|endoftext|>"
    assert tiny.encoding.decode(tokens[:skipped]) == "say red 1 times\n\n"


def test_long_prompts_are_dropped_and_long_responses_cut_with_a_count(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def record(words: int, answers: int) -> dict:
        return {
            "prompt": "red " * words,
            "response": "blue " * answers,
            "user": "u",
            "source": "labeler",
            "use_case": "other",
        }

    path = str(tmp_path / "d.jsonl")
    records = [record(1, 1), record(50, 1), record(2, 30), record(60, 30)]
    write_jsonl(path, records, "demonstrations")
    prompt = encode_prompt(tiny.encoding, records[2]["prompt"])
    response = encode_response(tiny.encoding, records[2]["response"])
    args = arguments("--max_prompt_tokens", str(len(prompt)), "--max_new_tokens", "20")
    examples, numbers = train_sft.load_demonstrations(path, tiny.encoding, args)
    assert len(examples) == 2 and numbers == [1, 3]
    assert examples[1] == (prompt + response[:20], len(prompt))  # exactly at the limit: kept
    said = capsys.readouterr().out
    assert f"2 demonstrations; dropped 2 with a prompt over {len(prompt)} tokens" in said
    assert "cut 1 responses over 20" in said
    args = arguments("--max_prompt_tokens", "1")
    with pytest.raises(BadInput, match="no prompt is within --max_prompt_tokens 1"):
        train_sft.load_demonstrations(path, tiny.encoding, args)


def test_pretraining_sequences_are_the_stream_of_documents(tiny: Tiny, tmp_path: Path) -> None:
    path = str(tmp_path / "p.txt")
    documents = ["red is <|endoftext|> a colour", "blue", "the house"]
    write_documents(path, documents)
    end = tiny.encoding.eot_token
    stream = [t for d in documents for t in [*tiny.encoding.encode_ordinary(d), end]]
    assert stream.count(end) == 3  # the literal end token in a text is text
    examples = train_sft.load_pretraining(path, tiny.encoding, 7)
    assert [t for tokens, _ in examples for t in tokens] == stream[: len(stream) // 7 * 7]
    assert {len(tokens) for tokens, _ in examples} == {7}
    assert {skipped for _, skipped in examples} == {1}
    # To be mixed in: a sequence at each document's start, and every 7 tokens in a longer one.
    begin, expected = 0, []
    for document in documents:
        size = len(tiny.encoding.encode_ordinary(document)) + 1
        expected += [stream[i : i + 7] for i in range(begin, begin + size, 7)]
        begin += size
    mixed = train_sft.load_pretraining(path, tiny.encoding, 7, at_documents=True)
    assert len(expected[-1]) < 7  # the text ends before it does
    assert [tokens for tokens, _ in mixed] == [tokens for tokens in expected if len(tokens) == 7]
    with pytest.raises(BadInput, match=f"{len(stream)} tokens, fewer than the context of 100"):
        train_sft.load_pretraining(path, tiny.encoding, 100)


# ------------------------------------------------------------------------------------------------
# Runs


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    model, args = make_gpt(pdrop=0.5).train(), arguments()
    first, second = (backward(model, EXAMPLES, 1.0, args) for _ in range(2))
    assert first != second
    plain = make_gpt()
    plain.load_state_dict(model.state_dict())
    expected = reference_loss(plain, EXAMPLES).item()
    assert abs(evaluate(model, EXAMPLES, args) - expected) < 1e-5
    assert model.training  # and on it goes
    assert evaluate(model, [], args) is None


def test_a_few_steps_lower_the_loss(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "sft"
    args = tiny.args("sft", out, "--epochs", "15", "--lr", "5e-3", "--resid_pdrop", "0")
    assert main(args) == 0
    rows = read_log(out / "log.csv", train_sft.LOG)
    assert [int(row["step"]) for row in rows] == list(range(1, 61))  # 14 examples in fours
    validated = [row for row in rows if row["val_loss"]]
    assert [int(row["step"]) for row in validated] == list(range(4, 61, 4))
    assert float(rows[0]["loss"]) > 5  # about log 300
    assert float(validated[-1]["val_loss"]) < 2.0
    assert float(rows[-1]["pretrain_loss"]) < 5
    info = read_info(out)
    assert (info["stage"], info["data"]) == ("sft", [str(tiny.demonstrations), str(tiny.pretrain)])
    assert sorted(p.name for p in (out / "epochs").iterdir()) == [f"{e:02}" for e in range(1, 16)]
    last = GPT.from_pretrained(out / "epochs/15")
    for a, b in zip(last.parameters(), GPT.from_pretrained(out).parameters(), strict=True):
        assert torch.equal(a, b)
    assert read_info(out / "epochs/03")["epoch"] == 3
    assert f"{read_info(out / 'epochs/03')['val_loss']:.9g}" == validated[2]["val_loss"]


def test_pretraining_starts_from_a_new_model(tiny: Tiny, tmp_path: Path) -> None:
    args = [
        "--pretrain_data",
        tiny.pretrain,
        "--val_pretrain_data",
        tiny.pretrain,
        "--tokenizer",
        tiny.tokenizer,
        "--out",
        tmp_path / "base",
        "--n_layer",
        1,
        "--n_head",
        2,
        "--n_embd",
        32,
        "--n_positions",
        24,
        "--epochs",
        6,
        "--batch_size",
        8,
        "--lr",
        1e-2,
        "--resid_pdrop",
        0,
        "--device",
        "cpu",
        "--weight_decay",
        0.1,
    ]
    assert main([str(arg) for arg in args]) == 0
    rows = read_log(tmp_path / "base/log.csv", train_sft.LOG)
    assert float(rows[-1]["val_pretrain_loss"]) < float(rows[0]["loss"]) - 1.5
    assert all(row["pretrain_loss"] == row["val_loss"] == "" for row in rows)
    assert read_info(tmp_path / "base")["stage"] == "base"
    model = GPT.from_pretrained(tmp_path / "base")
    assert (model.config.n_layer, model.config.n_embd, model.config.n_positions) == (1, 32, 24)
    assert model.config.vocab_size == tiny.encoding.n_vocab
    assert model.config.eos_token_id == tiny.encoding.eot_token
    assert not (tmp_path / "base/epochs").exists()


def test_bfloat16_training_follows_float32(tiny: Tiny, tmp_path: Path) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        args = tiny.args("sft", tmp_path / dtype, "--dtype", dtype, "--resid_pdrop", "0")
        assert main(args) == 0
        rows = read_log(tmp_path / dtype / "log.csv")
        losses.append(torch.tensor([float(row["loss"]) for row in rows]))
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.02
