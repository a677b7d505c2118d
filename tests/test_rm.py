"""train_rm.py: the grouped K-way loss against the naive pairwise one, metrics, bias, learning."""

import argparse
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from data.files import BadInput, read_jsonl, read_log, write_jsonl
from data.tokenizer import encode_prompt, encode_response

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import train_rm
from checkpoint import read_info
from model import GPT, MLP, ScalarModel
from tests import runs as planted
from tests.runs import Bugs, Runner, call, close, is_caught, keep_start
from tests.tiny import Tiny
from train_rm import Comparison

RANKINGS = [[2, 1, 3, 3], [1, 1, 2, 5, 4, 2, 1, 9, 9], [2, 1], [1, 2, 3, 4, 5]]


def arguments(flags: str = "") -> argparse.Namespace:
    return train_rm.get_args(f"--device cpu --batch_size 4 {flags}".split())


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Runner:
    """One step on five prompts, gradients unclipped."""
    flags = "--max_steps 1 --batch_size 5 --grad_clip 0"
    return Runner(train_rm, tiny, tmp_path, flags, "--val_data --demonstrations", "score_all")


def make_elements(rankings: list[list[int]] = RANKINGS) -> list[Comparison]:
    """Comparisons with random responses of different lengths."""
    elements = []
    for ranks in rankings:
        prompt = torch.randint(11, (3,)).tolist()
        lengths = torch.randint(1, 9, (len(ranks),)).tolist()
        sequences = [prompt + torch.randint(11, (n,)).tolist() + [11] for n in lengths]
        elements.append(Comparison(sequences, train_rm.untied_pairs(ranks)))
    return elements


def naive_loss(scores: list[Tensor], pairs: list[list[tuple[int, int]]]) -> Tensor:
    """Eq. 1 as it reads: one (winner, loser) after the other, the mean for each prompt, summed."""
    total = torch.zeros((), dtype=torch.float64)
    for r, of_prompt in zip(scores, pairs, strict=True):
        losses = [-torch.log(1 / (1 + torch.exp(-(r[i] - r[j])))) for i, j in of_prompt]
        total = total + sum(losses) / len(losses)
    return total


def parameters_of(model: ScalarModel) -> list[Tensor]:
    """In the order in which the optimizer has them: matrices, then vectors."""
    return sorted(model.parameters(), key=lambda parameter: parameter.dim() < 2)


# ------------------------------------------------------------------------------------------------
# Loss


def check_pairs() -> None:
    """Hand-worked: rank 1 wins, ties are no pair, C(K, 2) pairs without ties."""
    untied_pairs = train_rm.untied_pairs
    assert untied_pairs([2, 1]) == [(1, 0)]
    assert untied_pairs([1, 1]) == []
    assert sorted(untied_pairs([2, 1, 3, 3])) == [(0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    for K in range(4, 10):
        assert len(untied_pairs(list(range(K, 0, -1)))) == math.comb(K, 2)


def check_loss() -> None:
    """The grouped loss and its gradient equal the naive double loop over pairs in float64."""
    elements = make_elements()
    scores = (3 * torch.randn(20, dtype=torch.float64)).requires_grad_()
    loss, chosen, rejected = train_rm.rm_loss(scores, elements)
    pairs = [
        [(i, j) for i, j in itertools.product(range(len(r)), repeat=2) if r[i] < r[j]]
        for r in RANKINGS
    ]
    expected = naive_loss(list(scores.split([len(ranks) for ranks in RANKINGS])), pairs)
    assert abs(loss - expected) < 1e-10
    ours, theirs = (torch.autograd.grad(x, scores)[0] for x in (loss, expected))
    assert (ours - theirs).abs().max() < 1e-10
    assert len(chosen) == len(rejected) == sum(len(element.pairs) for element in elements)
    assert torch.autograd.gradcheck(lambda s: train_rm.rm_loss(s, elements)[0], scores)


def check_equal_scores() -> None:
    """Where all scores are equal each prompt's loss is log 2, however many pairs it has."""
    loss, _, _ = train_rm.rm_loss(torch.full((20,), 1.3, dtype=torch.float64), make_elements())
    assert abs(loss - len(RANKINGS) * math.log(2)) < 1e-12


def check_ties() -> None:
    """A pair of equal rank adds nothing: its members' scores may differ as they like."""
    scores = torch.tensor([0.5, 1.5, 1.5], dtype=torch.float64)
    loss, chosen, rejected = train_rm.rm_loss(scores, make_elements([[1, 2, 2]]))
    assert chosen.tolist() == [0.5, 0.5] and rejected.tolist() == [1.5, 1.5]
    assert abs(loss - math.log(1 + math.e)) < 1e-12  # the mean over the two pairs that are left


def check_direction() -> None:
    """The loss falls as the winner's margin grows, and a large one stays finite."""
    elements, scores = make_elements([[2, 1]]), torch.tensor([-200.0, -2.0, 0.0, 2.0, 200.0])
    losses = [train_rm.rm_loss(torch.stack((0 * s, s)), elements)[0].item() for s in scores]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == 200 and 0 <= losses[-1] < 1e-6
    assert all(map(math.isfinite, losses))


def check_shift() -> None:
    """The loss does not notice a shift of all scores."""
    elements, scores = make_elements(), torch.randn(20, dtype=torch.float64)
    loss, shifted = (train_rm.rm_loss(s, elements)[0] for s in (scores, scores + 5))
    assert abs(loss - shifted) < 1e-12


def check_one_forward_per_response(run: Runner) -> None:
    """K rows for K responses, not C(K, 2) pairs of them, and none twice; the MLPs see once what a
    row has in common with the one above it, as a prompt is, and no padding."""
    rows, computed, forward, mlp = [], [], GPT.forward, MLP.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", lambda *args: (rows.extend(args[1]), forward(*args))[1])
        patch.setattr(MLP, "forward", lambda m, x: (computed.append(len(x)), mlp(m, x))[1])
        seen = run("--micro_batch_size 2")
    sequences, expected = [], 0
    for _, elements in seen.arguments["score_all"]:
        part = [sequence for element in elements for sequence in element.sequences]
        repeated = sum(len(os.path.commonprefix(two)) for two in itertools.pairwise(part))
        expected += sum(map(len, part)) - repeated
        sequences += part
    assert len(rows) == len(sequences) == 24
    assert sum(computed) == 2 * expected < sum(map(len, sequences))  # of 2 layers


def check_micro_batches(run: Runner) -> None:
    """Loss, metrics and gradient are those of the whole batch, whatever the micro-batches; the
    loss is the naive one of scores made one response at a time."""
    flags = "--max_steps 2 --lr 0 --micro_batch_size"
    whole, *others = (run(f"{flags} {n}", make_model=keep_start) for n in (0, 3, 1))
    for other in others:
        for name, value in whole.log[1].items():
            change = abs(float(value) - float(other.log[1][name]))
            assert change < 1e-6 * max(1, abs(float(value))), name
        assert close(other.gradients[1], whole.gradients[1])
    (model,), end = whole.results["make_model"][0][0].start, run.tiny.encoding.eot_token
    for step, (_, elements) in enumerate(whole.arguments["score_all"]):
        last = [
            [model(torch.tensor([s]))[0, -1 - (s[-1] == end)] for s in e.sequences]
            for e in elements
        ]
        scores, pairs = [torch.stack(r).double() for r in last], [e.pairs for e in elements]
        expected = {"loss": naive_loss(scores, pairs) / len(elements)}
        gradients = torch.autograd.grad(expected["loss"], parameters_of(model))
        assert close(whole.gradients[step], gradients)
        both = [
            (r[i].item(), r[j].item()) for r, two in zip(scores, pairs, strict=True) for i, j in two
        ]
        chosen, rejected = torch.tensor(both).T
        expected |= {"accuracy": (chosen > rejected).double().mean()}  # no scores are equal
        expected |= {"chosen_score": chosen.mean(), "rejected_score": rejected.mean()}
        for name, value in expected.items():
            assert abs(float(whole.log[step][name]) - value) < 1e-5, name


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
Loss = tuple[Tensor, Tensor, Tensor]


def loss_of(formula: Callable) -> Callable:
    """Another loss, of margins, a weight for each pair, and the elements."""

    def loss(f: Callable, scores: Tensor, elements: list[Comparison]) -> Loss:
        _, chosen, rejected = f(scores, elements)
        weights = scores.new_tensor([1 / len(e.pairs) for e in elements for _ in e.pairs])
        return formula(chosen - rejected, weights, elements), chosen, rejected

    return loss


def divisor_counts_ties(margins: Tensor, weights: Tensor, elements: list[Comparison]) -> Tensor:
    parts = margins.split([len(element.pairs) for element in elements])
    counts = [math.comb(len(element.sequences), 2) for element in elements]
    return -sum(logsigmoid(m).sum() / n for m, n in zip(parts, counts, strict=True))


@plant("score_all", "one_forward_per_response")
def one_forward_per_pair(f: Callable, model: ScalarModel, elements: list[Comparison]) -> Tensor:
    for element in elements:
        for pair in element.pairs:
            f(model, [Comparison([element.sequences[i] for i in pair], [])])
    return f(model, elements)


@plant("rm_loss", "micro_batches")
def mean_of_means(f: Callable, scores: Tensor, elements: list[Comparison]) -> Loss:
    loss, chosen, rejected = f(scores, elements)
    return 3 * loss / len(elements), chosen, rejected


plant(
    "untied_pairs", "pairs loss", highest_rank_wins=lambda f, ranks: [(j, i) for i, j in f(ranks)]
)
plant(
    "untied_pairs",
    "pairs loss ties",
    ties_are_pairs=lambda f, ranks: f([rank + i / 100 for i, rank in enumerate(ranks)]),
)
plant(
    "rm_loss",
    "loss",  # A prompt with K = 9 weighs 36 times one with K = 2.
    all_pairs_weigh_the_same=loss_of(lambda m, w, elements: -logsigmoid(m).mean() * len(elements)),
    groups_run_into_each_other=lambda f, scores, elements: f(scores.roll(1), elements),
)
plant(
    "rm_loss",
    "loss equal_scores",
    divided_twice=loss_of(lambda m, w, _: -(w * w * logsigmoid(m)).sum()),
)
plant("rm_loss", "loss ties equal_scores", divisor_counts_ties=loss_of(divisor_counts_ties))
plant(
    "rm_loss",
    "direction",  # Overflows for a pair that is far wrong.
    log_of_sigmoid=loss_of(lambda m, w, _: -(w * torch.log(torch.sigmoid(m))).sum()),
)
plant(
    "rm_loss",
    "direction equal_scores",
    hinge=loss_of(lambda m, w, _: (w * (1 - m).clamp(min=0)).sum()),
)
plant(
    "rm_loss",
    "direction loss",
    loser_minus_winner=loss_of(lambda m, w, _: -(w * logsigmoid(-m)).sum()),
)
plant(
    "model.Packing.make",
    "one_forward_per_response",
    a_prompt_for_each_response=lambda f, tokens, lengths, share: f(tokens, lengths, share=False),
)
plant(
    "model.ScalarModel.scores",
    "micro_batches",
    scored_at_the_last_column=lambda f, model, tokens, lengths: model(tokens)[:, -1],
)


@pytest.mark.parametrize(("target", "bug", "check"), BUGS, ids=lambda x: getattr(x, "__name__", x))
def test_planted_bug_is_caught(target: str, bug: Callable, check: Callable, run: Runner) -> None:
    is_caught(check, target, bug, train_rm, run)


# ------------------------------------------------------------------------------------------------
# Data


def comparison(prompt: str, responses: list[str], ranks: list[int], **more: object) -> dict:
    whose = {"user": "u", "source": "customer", "use_case": "other", "labeler": "l"}
    return {"prompt": prompt, "responses": responses, "ranks": ranks} | whose | more


def test_comparisons_are_tokens_and_pairs_with_counts(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, enc = str(tmp_path / "c.jsonl"), tiny.encoding
    records = [
        comparison("say red", ["red", "", "blue blue"], [1, 2, 2], ended=[True, True, False]),
        comparison("red " * 50, ["a", "b"], [1, 2]),
        comparison("say blue", ["a", "b", "c"], [1, 1, 1]),
        comparison("say blue", ["green " * 30, "b"], [2, 1]),
    ]
    write_jsonl(path, records, "comparisons")
    args = arguments("--max_prompt_tokens 40 --max_new_tokens 9")
    first, last = train_rm.load_comparisons(path, enc, args)
    prompt = encode_prompt(enc, "say red")
    assert first.sequences == [
        prompt + encode_response(enc, "red"),
        prompt + [enc.eot_token],  # an empty response, ended at once, is legal
        prompt + encode_response(enc, "blue blue", ended=False),
    ]
    assert sorted(first.pairs) == [(0, 1), (0, 2)] and last.pairs == [(1, 0)]
    assert len(last.sequences[0]) == len(encode_prompt(enc, "say blue")) + 9
    said = capsys.readouterr().out
    assert "2 prompts, 3 pairs and 4 ties" in said
    assert "dropped 1 with a prompt over 40 tokens and 1 with ties only, cut 1 responses" in said
    write_jsonl(path, records[1:3], "comparisons")
    with pytest.raises(BadInput, match="no prompt with a pair that is not tied is left"):
        train_rm.load_comparisons(path, enc, args)


def test_rankings_of_the_same_responses_are_one_batch_element(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The pair loss is then the mean over all labelers' pairs; other responses stay apart."""
    path = str(tmp_path / "c.jsonl")
    records = [
        comparison("say red", ["red", "blue"], [1, 2]),
        comparison("say red", ["red", "blue"], [2, 1]),
        comparison("say red", ["red", "blue"], [1, 1]),
        comparison("say red", ["red", "blue"], [1, 2]),
        comparison("say red", ["red", "green"], [2, 1]),
        comparison("say blue", ["red", "green"], [1, 2]),
        comparison("say red", ["red", "blue"], [1, 2]),
        comparison("say all", ["red", "blue"], [1, 1]),
        comparison("say all", ["red", "blue"], [2, 1]),
    ]
    write_jsonl(path, records, "comparisons")
    made = train_rm.load_comparisons(path, tiny.encoding, arguments())
    pairs = [[(0, 1), (1, 0), (0, 1)], [(1, 0)], [(0, 1)], [(0, 1)], [(1, 0)]]
    assert [element.pairs for element in made] == pairs
    assert "5 prompts, 7 pairs and 2 ties; dropped 0 " in capsys.readouterr().out
    # r = (0.3, -0.1): two labelers prefer the first, one the second.
    loss, *_ = train_rm.rm_loss(torch.tensor([0.3, -0.1]), made[:1])
    assert loss.item() == pytest.approx((2 * 0.513015 + 0.913015) / 3, abs=1e-5)
    # --shuffle_pairs: each pair on its own, the winner first.
    alone, sequences = train_rm.one_by_one(made[:1]), made[0].sequences
    assert [element.sequences for element in alone] == [sequences, sequences[::-1], sequences]
    assert {tuple(element.pairs) for element in alone} == {((0, 1),)}


# ------------------------------------------------------------------------------------------------
# Evaluation


class FixedScores:
    """Stands in for a model: a sequence's score is its one token divided by 100."""

    config = argparse.Namespace(eos_token_id=0)
    score = torch.nn.Linear(1, 1)  # says on which device the model is

    def scores(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return tokens[:, 0] / 100


def test_accuracy_margin_and_calibration_of_a_hand_worked_example() -> None:
    """Margins 2.0, 2.0, -2.0, 0.25 and 0: sigmoid(|margin|) is 0.881 (bin 0.85-0.9) three times, of
    which 2 of 3 are right; 0.562 (bin 0.55-0.6) once, right; 0.5 once, a half."""
    margins = [(3, 1), (2, 0), (0, 2), (0.25, 0), (1, 1)]
    elements = [Comparison([[int(100 * b)], [int(100 * a)]], [(1, 0)]) for a, b in margins]
    result = train_rm.evaluate(FixedScores(), elements, arguments())
    p2, p25 = (1 / (1 + math.exp(-m)) for m in (2, 0.25))
    losses = [-math.log(p) for p in (p2, p2, 1 - p2, p25, 0.5)]
    bins = 3 / 5 * abs(2 / 3 - p2) + 1 / 5 * abs(1 - p25) + 1 / 5 * abs(0.5 - 0.5)
    expected = {
        "loss": sum(losses) / 5,
        "accuracy": (2 + 1 + 0.5) / 5,
        "margin": (2 + 2 - 2 + 0.25) / 5,
        "calibration_error": bins,
        "prompts": 5,
        "pairs": 5,
    }
    assert result == pytest.approx(expected, abs=1e-6)


def test_calibrated_probabilities_have_no_calibration_error() -> None:
    """20,000 pairs whose winner was drawn with probability sigmoid(margin)."""
    margins = 3 * torch.rand(20_000)
    wins = torch.rand(20_000) < torch.sigmoid(margins)
    elements = [
        Comparison([[0], [round(100 * m)]], [(1, 0) if win else (0, 1)])
        for m, win in zip(margins.tolist(), wins.tolist(), strict=True)
    ]
    args = arguments("--micro_batch_size 5000")
    result = train_rm.evaluate(FixedScores(), elements, args)
    assert result["calibration_error"] < 0.02
    assert abs(result["accuracy"] - torch.sigmoid(margins).mean()) < 0.02
    for element in elements:  # scores that claim more than they know
        element.sequences[1][0] *= 4
    assert train_rm.evaluate(FixedScores(), elements, args)["calibration_error"] > 0.1


def test_centering_moves_demonstrations_to_zero_and_keeps_margins(tiny: Tiny) -> None:
    model, encoding = ScalarModel.from_pretrained(tiny.rm), tiny.encoding
    args, elements = arguments("--max_prompt_tokens 36 --max_new_tokens 8"), make_elements()
    demonstrations = train_rm.load_demonstrations(str(tiny.demonstrations), encoding, args)
    before = train_rm.score_all(model, elements)
    head, trunk = model.score.weight.clone(), model.trunk.wte.weight.clone()
    shift = train_rm.center_on_demonstrations(model, demonstrations)
    after = train_rm.score_all(model, elements)
    assert abs(shift) > 0.01
    assert (after - before - shift).abs().max() < 1e-5
    assert torch.equal(head, model.score.weight) and torch.equal(trunk, model.trunk.wte.weight)
    scores, cut = [], 0
    for record in read_jsonl(tiny.demonstrations, "demonstrations"):
        response = encode_response(encoding, record["response"])
        cut += len(response) > 8
        tokens = encode_prompt(encoding, record["prompt"]) + response[:8]
        tokens = tokens[:-1] if tokens[-1] == encoding.eot_token else tokens
        scores.append(model(torch.tensor([tokens]))[0, -1].item())
    assert 0 < cut < len(scores) == 14
    assert abs(sum(scores) / len(scores)) < 1e-5


def test_an_accuracy_of_exactly_zero_is_shown(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_rm, "evaluate", lambda *_: {"loss": 2.0, "accuracy": 0.0})
    assert train_rm.main(tiny.args("rm", tmp_path, "--max_steps", "1")) == 0
    assert "| val_loss 2 | val_accuracy 0 |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Runs


def test_an_easy_preference_is_learned(tiny: Tiny, tmp_path: Path) -> None:
    """More times "red" is better: accuracy on prompts that were not trained on is near 1."""
    words = ["blue", "green", "white", "gold"]

    def record(i: int) -> dict:
        reds = [(i * (k + 3) + k) % 3 for k in range(4)]
        rest = [[words[(i + k) % 4]] * (2 - r) for k, r in enumerate(reds)]
        responses = [" ".join(["red"] * r + other) for r, other in zip(reds, rest, strict=True)]
        return comparison(f"say {words[i % 4]} ( {i} )", responses, [3 - r for r in reds])

    train, valid, out = (tmp_path / name for name in ("train.jsonl", "valid.jsonl", "rm"))
    write_jsonl(train, map(record, range(192)), "comparisons")
    write_jsonl(valid, map(record, range(200, 230)), "comparisons")
    flags = "--batch_size 4 --lr 5e-3 --epochs 1 --eval_every 12 --save_every 0"
    paths = ["--data", str(train), "--val_data", str(valid)]
    assert train_rm.main(tiny.args("rm", out, *paths, *flags.split())) == 0
    rows = read_log(out / "log.csv")
    columns = "step epoch lr grad_norm tokens val_loss val_accuracy loss accuracy margin"
    assert list(rows[0]) == f"{columns} chosen_score rejected_score".split()
    assert [row["step"] for row in rows if row["val_loss"]] == ["12", "24", rows[-1]["step"]]
    assert {row["epoch"] for row in rows} == {"1"}
    report = json.loads((out / "metrics.json").read_text())["val"]
    assert report["accuracy"] > 0.95
    assert f"{report['accuracy']:.9g}" == rows[-1]["val_accuracy"]
    assert abs(float(rows[0]["loss"]) - math.log(2)) < 0.3
    info = read_info(out)
    assert (info["stage"], info["metrics"]["val"]) == ("rm", report)
    model = ScalarModel.from_pretrained(out)
    # Centring happened after the last step: the checkpoint of the run is not shifted yet.
    (last,) = (ScalarModel.from_pretrained(f) for f in (out / "checkpoints").iterdir())
    assert torch.equal(model.score.weight, last.score.weight)
    assert not torch.equal(model.score.bias, last.score.bias)


def test_the_trunk_is_the_sft_models(run: Runner) -> None:
    """With a learning rate of 0 the result is the SFT model under a fresh head."""
    trunk = ScalarModel.from_pretrained(run("--lr 0").out).trunk
    sft = GPT.from_pretrained(run.tiny.base)
    assert all(map(torch.equal, trunk.parameters(), sft.parameters()))


def test_checkpointing_changes_no_byte(run: Runner) -> None:
    flags = "--max_steps 3 --dtype bfloat16"
    again, plain = run(f"{flags} --grad_checkpointing"), run(flags)
    assert again.log == plain.log and float(plain.log[0]["loss"]) > 0.1
    files = [seen.out / "model.safetensors" for seen in (again, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()
