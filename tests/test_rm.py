"""train_rm.py: the grouped K-way loss against the naive pairwise one, metrics, bias, learning."""

import argparse
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_rm
from checkpoint import read_info
from data.files import BadInput, read_jsonl, read_log, write_jsonl
from data.tokenizer import encode_prompt, encode_response
from model import GPT, GPTConfig, ScalarModel
from tests.tiny import LIMITS, Tiny
from train_rm import (
    Comparison,
    backward,
    center_on_demonstrations,
    evaluate,
    main,
    rm_loss,
    score_all,
    untied_pairs,
)

RANKINGS = [[2, 1, 3, 3], [1, 1, 2, 5, 4, 2, 1, 9, 9], [2, 1], [1, 2, 3, 4, 5]]


def arguments(*more: str) -> argparse.Namespace:
    return train_rm.get_args(["--device", "cpu", "--batch_size", "4", *more])


def make_scalar_model(**shape: int) -> ScalarModel:
    shape = {"vocab_size": 12, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2} | shape
    model = ScalarModel(GPTConfig(**shape, eos_token_id=11))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_groups(rankings: list[list[int]] = RANKINGS) -> list[Comparison]:
    """Comparisons with random responses of different lengths."""
    groups = []
    for ranks in rankings:
        prompt = torch.randint(11, (3,)).tolist()
        lengths = torch.randint(1, 9, (len(ranks),)).tolist()
        sequences = [prompt + torch.randint(11, (n,)).tolist() + [11] for n in lengths]
        groups.append(Comparison(sequences, untied_pairs(ranks), prompt_tokens=3))
    return groups


def naive_loss(scores: list[Tensor], rankings: list[list[int]]) -> Tensor:
    """Eq. 1 as it reads: one (winner, loser) after the other, the mean for each prompt, summed."""
    total = torch.zeros((), dtype=torch.float64)
    for r, ranks in zip(scores, rankings, strict=True):
        losses = []
        for i, j in itertools.product(range(len(ranks)), repeat=2):
            if ranks[i] < ranks[j]:  # i is the better one
                losses.append(-torch.log(1 / (1 + torch.exp(-(r[i] - r[j])))))
        total = total + sum(losses) / len(losses)
    return total


def split(scores: Tensor, rankings: list[list[int]]) -> list[Tensor]:
    return list(scores.split([len(ranks) for ranks in rankings]))


# ------------------------------------------------------------------------------------------------
# Loss


def check_pairs() -> None:
    """Hand-worked: rank 1 wins, ties are no pair, C(K, 2) pairs without ties."""
    assert untied_pairs([2, 1]) == [(1, 0)]
    assert untied_pairs([1, 1]) == []
    assert sorted(untied_pairs([2, 1, 3, 3])) == [(0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    for K in range(4, 10):
        assert len(untied_pairs(list(range(K, 0, -1)))) == math.comb(K, 2)


def check_loss() -> None:
    """The grouped loss and its gradient equal the naive double loop over pairs in float64."""
    groups = make_groups()
    scores = (3 * torch.randn(20, dtype=torch.float64)).requires_grad_()
    loss, chosen, rejected = rm_loss(scores, groups)
    expected = naive_loss(split(scores, RANKINGS), RANKINGS)
    assert abs(loss - expected) < 1e-10
    ours, theirs = (torch.autograd.grad(x, scores)[0] for x in (loss, expected))
    assert (ours - theirs).abs().max() < 1e-10
    assert len(chosen) == len(rejected) == sum(len(group.pairs) for group in groups)
    assert torch.autograd.gradcheck(lambda s: rm_loss(s, groups)[0], scores)


def check_equal_scores() -> None:
    """Where all scores are equal each prompt's loss is log 2, however many pairs it has."""
    loss, _, _ = rm_loss(torch.full((20,), 1.3, dtype=torch.float64), make_groups())
    assert abs(loss - len(RANKINGS) * math.log(2)) < 1e-12


def check_ties() -> None:
    """A pair of equal rank adds nothing: its members' scores may differ as they like."""
    ranks = [1, 2, 2]
    scores = torch.tensor([0.5, 1.5, 1.5], dtype=torch.float64)
    loss, chosen, rejected = rm_loss(scores, make_groups([ranks]))
    assert chosen.tolist() == [0.5, 0.5] and rejected.tolist() == [1.5, 1.5]
    assert abs(loss - math.log(1 + math.e)) < 1e-12  # the mean over the two pairs that are left


def check_direction() -> None:
    """The loss falls as the winner's margin grows, and a large one stays finite."""
    groups = make_groups([[2, 1]])
    losses = [rm_loss(torch.tensor([0.0, m]), groups)[0].item() for m in (-200, -2, 0, 2, 200)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == 200 and 0 <= losses[-1] < 1e-6
    assert all(map(math.isfinite, losses))


def check_shift() -> None:
    """The loss does not notice a shift of all scores."""
    groups, scores = make_groups(), torch.randn(20, dtype=torch.float64)
    assert abs(rm_loss(scores, groups)[0] - rm_loss(scores + 5, groups)[0]) < 1e-12


def check_one_forward_per_response() -> None:
    """K rows for K responses, not C(K, 2) pairs of them; and none twice."""
    model, groups, rows = make_scalar_model(), make_groups(), []
    original = model.trunk.forward
    model.trunk.forward = lambda tokens, *args, **more: (
        rows.extend(tokens),
        original(tokens, *args, **more),
    )[1]
    backward(model, groups, arguments("--micro_batch_size", "3"))
    assert len(rows) == sum(map(len, RANKINGS)) == 20


def check_prompts_are_computed_once() -> None:
    """The MLPs see a prompt's tokens once for its K responses, and no padding."""
    model, groups, computed = make_scalar_model(), make_groups(), []
    model.trunk.h[0].mlp.register_forward_hook(lambda _, args, out: computed.append(out.shape[0]))
    backward(model, groups, arguments())
    responses = sum(len(sequence) - 3 for group in groups for sequence in group.sequences)
    assert computed == [responses + 3 * len(groups)]


def check_micro_batches() -> None:
    """Loss, metrics and gradient are those of the whole batch, whatever the micro-batches; the
    loss is the naive one of scores made one response at a time."""
    model, groups, results = make_scalar_model(), make_groups(), []
    for size in (4, 3, 1):
        model.zero_grad()
        metrics = backward(model, groups, arguments("--micro_batch_size", str(size)))
        results.append((metrics, [p.grad.clone() for p in model.parameters()]))
    end = model.config.eos_token_id
    scores = [
        torch.cat([model(torch.tensor([s]))[0, -1 - (s[-1] == end)][None] for s in g.sequences])
        for g in groups
    ]
    expected = naive_loss([s.double() for s in scores], RANKINGS) / len(groups)
    for metrics, grads in results:
        assert abs(metrics["loss"] - expected) < 1e-5
        for name, value in metrics.items():
            assert abs(value - results[0][0][name]) < 1e-5, name
        for a, b in zip(grads, results[0][1], strict=True):
            assert (a - b).abs().max() < 1e-5


CHECKS = [
    check_pairs,
    check_loss,
    check_equal_scores,
    check_ties,
    check_direction,
    check_shift,
    check_one_forward_per_response,
    check_prompts_are_computed_once,
    check_micro_batches,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check: Callable[[], None]) -> None:
    check()


# ------------------------------------------------------------------------------------------------
# Planted bugs: each must make its check fail


def highest_rank_wins(patch: pytest.MonkeyPatch) -> None:
    original = train_rm.untied_pairs
    patch.setitem(globals(), "untied_pairs", lambda ranks: [(j, i) for i, j in original(ranks)])


def ties_are_pairs(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(
        globals(),
        "untied_pairs",
        lambda ranks: [
            (i, j) if ranks[i] <= ranks[j] else (j, i)
            for i, j in itertools.combinations(range(len(ranks)), 2)
        ],
    )


def replace_loss(patch: pytest.MonkeyPatch, loss_of: Callable) -> None:
    """Plant another loss; `loss_of` maps margins, a weight for each pair and the groups to it."""
    original = train_rm.rm_loss

    def planted(scores, groups):
        _, chosen, rejected = original(scores, groups)
        weights = [1 / len(g.pairs) for g in groups for _ in g.pairs]
        return loss_of(chosen - rejected, scores.new_tensor(weights), groups), chosen, rejected

    patch.setattr(train_rm, "rm_loss", planted)
    patch.setitem(globals(), "rm_loss", planted)


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x)


def all_pairs_weigh_the_same(patch: pytest.MonkeyPatch) -> None:
    """A prompt with K = 9 weighs 36 times one with K = 2."""
    replace_loss(patch, lambda margin, w, groups: -log_sigmoid(margin).mean() * len(groups))


def divided_twice(patch: pytest.MonkeyPatch) -> None:
    replace_loss(patch, lambda margin, w, groups: -(w * w * log_sigmoid(margin)).sum())


def divisor_counts_ties(patch: pytest.MonkeyPatch) -> None:
    replace_loss(
        patch,
        lambda margin, w, groups: (
            -sum(
                log_sigmoid(m).sum() / math.comb(len(g.sequences), 2)
                for m, g in zip(margin.split([len(g.pairs) for g in groups]), groups, strict=True)
            )
        ),
    )


def log_of_sigmoid(patch: pytest.MonkeyPatch) -> None:
    """Overflows for a pair that is far wrong."""
    replace_loss(patch, lambda margin, w, groups: -(w * torch.log(torch.sigmoid(margin))).sum())


def hinge(patch: pytest.MonkeyPatch) -> None:
    replace_loss(patch, lambda margin, w, groups: (w * (1 - margin).clamp(min=0)).sum())


def loser_minus_winner(patch: pytest.MonkeyPatch) -> None:
    replace_loss(patch, lambda margin, w, groups: -(w * log_sigmoid(-margin)).sum())


def groups_run_into_each_other(patch: pytest.MonkeyPatch) -> None:
    original = train_rm.rm_loss
    planted = lambda scores, groups: original(scores.roll(1), groups)  # noqa: E731
    patch.setattr(train_rm, "rm_loss", planted)
    patch.setitem(globals(), "rm_loss", planted)


def one_forward_per_pair(patch: pytest.MonkeyPatch) -> None:
    def score_pairs(model, groups, args):
        for group in groups:
            for pair in group.pairs:
                model.scores(*train_rm.pad_right([group.sequences[i] for i in pair], 11, "cpu"))
        return score_all(model, groups, args)

    patch.setattr(train_rm, "score_all", score_pairs)


def mean_of_micro_batch_means(patch: pytest.MonkeyPatch) -> None:
    original = train_rm.rm_loss

    def planted(scores, groups):
        loss, chosen, rejected = original(scores, groups)
        return loss / len(groups) * 3, chosen, rejected

    patch.setattr(train_rm, "rm_loss", planted)


def a_prompt_for_each_response(patch: pytest.MonkeyPatch) -> None:
    original = ScalarModel.scores
    patch.setattr(
        ScalarModel,
        "scores",
        lambda self, tokens, lengths, prefixes: original(self, tokens, lengths),
    )


def scored_at_the_last_column(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        ScalarModel, "scores", lambda self, tokens, lengths, prefixes: self(tokens)[:, -1]
    )


BUGS = [
    (highest_rank_wins, check_pairs),
    (highest_rank_wins, check_loss),
    (ties_are_pairs, check_pairs),
    (ties_are_pairs, check_loss),
    (ties_are_pairs, check_ties),
    (all_pairs_weigh_the_same, check_loss),
    (divided_twice, check_loss),
    (divided_twice, check_equal_scores),
    (divisor_counts_ties, check_loss),
    (divisor_counts_ties, check_ties),
    (divisor_counts_ties, check_equal_scores),
    (log_of_sigmoid, check_direction),
    (hinge, check_direction),
    (hinge, check_equal_scores),
    (loser_minus_winner, check_direction),
    (loser_minus_winner, check_loss),
    (groups_run_into_each_other, check_loss),
    (one_forward_per_pair, check_one_forward_per_response),
    (mean_of_micro_batch_means, check_micro_batches),
    (a_prompt_for_each_response, check_prompts_are_computed_once),
    (scored_at_the_last_column, check_micro_batches),
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


def comparison(prompt: str, responses: list[str], ranks: list[int], **more: object) -> dict:
    return {
        "prompt": prompt,
        "user": "u",
        "source": "customer",
        "use_case": "other",
        "labeler": "l",
        "responses": responses,
        "ranks": ranks,
    } | more


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
    args = arguments("--max_prompt_tokens", "40", "--max_new_tokens", "9")
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
    path, args = str(tmp_path / "c.jsonl"), arguments()
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
    made = train_rm.load_comparisons(path, tiny.encoding, args)
    assert [c.pairs for c in made] == [
        [(0, 1), (1, 0), (0, 1)],
        [(1, 0)],
        [(0, 1)],
        [(0, 1)],
        [(1, 0)],
    ]
    assert [c.record for c in made] == [1, 5, 6, 7, 8]
    assert "5 prompts, 7 pairs and 2 ties; dropped 0 " in capsys.readouterr().out
    # r = (0.3, -0.1): two labelers prefer the first, one the second.
    loss, *_ = train_rm.rm_loss(torch.tensor([0.3, -0.1]), made[:1])
    assert loss.item() == pytest.approx((2 * 0.513015 + 0.913015) / 3, abs=1e-5)


# ------------------------------------------------------------------------------------------------
# Evaluation


class FixedScores:
    """Stands in for a model: a sequence's score is its one token divided by 100."""

    config = argparse.Namespace(eos_token_id=0)

    def scores(self, tokens: Tensor, lengths: Tensor, prefixes: object) -> Tensor:
        return tokens[:, 0] / 100

    def eval(self) -> None: ...

    def train(self) -> None: ...


def test_accuracy_margin_and_calibration_of_a_hand_worked_example() -> None:
    """Margins 2.0, 2.0, -2.0, 0.2 and 0: sigmoid(|margin|) is 0.881 (bin 0.85-0.9) three times, of
    which 2 of 3 are right; 0.550 (bin 0.5-0.55 ends below it) once, right; 0.5 once, a half."""

    def pair(winner: float, loser: float) -> Comparison:
        return Comparison([[round(100 * loser)], [round(100 * winner)]], [(1, 0)])

    groups = [pair(3, 1), pair(2, 0), pair(0, 2), pair(0.25, 0), pair(1, 1)]
    result = evaluate(FixedScores(), groups, arguments())
    p2, p25 = (1 / (1 + math.exp(-m)) for m in (2, 0.25))
    assert (result["prompts"], result["pairs"]) == (5, 5)
    assert abs(result["accuracy"] - (2 + 1 + 0.5) / 5) < 1e-9
    assert abs(result["margin"] - (2 + 2 - 2 + 0.25) / 5) < 1e-6
    bins = 3 / 5 * abs(2 / 3 - p2) + 1 / 5 * abs(1 - p25) + 1 / 5 * abs(0.5 - 0.5)
    assert abs(result["calibration_error"] - bins) < 1e-6
    losses = [-math.log(p) for p in (p2, p2, 1 - p2, p25, 0.5)]
    assert abs(result["loss"] - sum(losses) / 5) < 1e-6
    assert evaluate(FixedScores(), [], arguments()) is None


def test_calibrated_probabilities_have_no_calibration_error() -> None:
    """20,000 pairs whose winner was drawn with probability sigmoid(margin)."""
    margins = 3 * torch.rand(20_000)
    wins = torch.rand(20_000) < torch.sigmoid(margins)
    groups = [
        Comparison([[0], [round(100 * m)]], [(1, 0) if win else (0, 1)])
        for m, win in zip(margins.tolist(), wins.tolist(), strict=True)
    ]
    result = evaluate(FixedScores(), groups, arguments("--micro_batch_size", "5000"))
    assert result["calibration_error"] < 0.02
    assert abs(result["accuracy"] - torch.sigmoid(margins).mean()) < 0.02
    for group in groups:  # scores that claim more than they know
        group.sequences[1][0] *= 4
    assert evaluate(FixedScores(), groups, arguments())["calibration_error"] > 0.1


def test_centering_moves_demonstrations_to_zero_and_keeps_margins(tiny: Tiny) -> None:
    model, groups = make_scalar_model(vocab_size=300, n_positions=48), make_groups()
    model.trunk.config.eos_token_id = tiny.encoding.eot_token
    args = arguments("--demonstrations", str(tiny.demonstrations), *LIMITS)
    before = score_all(model, groups, args)
    head, trunk = model.score.weight.clone(), model.trunk.wte.weight.clone()
    shift = center_on_demonstrations(model, tiny.encoding, args)
    after = score_all(model, groups, args)
    assert abs(shift) > 0.01
    assert (before - after - shift).abs().max() < 1e-5
    assert torch.equal(head, model.score.weight) and torch.equal(trunk, model.trunk.wte.weight)
    scores, cut = [], 0
    for record in read_jsonl(tiny.demonstrations, "demonstrations"):
        prompt = encode_prompt(tiny.encoding, record["prompt"])
        response = encode_response(tiny.encoding, record["response"])
        cut += len(response) > 8
        tokens = prompt + response[:8]
        tokens = tokens[:-1] if tokens[-1] == tiny.encoding.eot_token else tokens
        scores.append(model(torch.tensor([tokens]))[0, -1].item())
    assert 0 < cut < len(scores) == 14
    assert abs(sum(scores) / len(scores)) < 1e-5


def test_an_accuracy_of_exactly_zero_is_shown(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_rm, "evaluate", lambda *_: {"loss": 2.0, "accuracy": 0.0})
    assert main(tiny.args("rm", tmp_path, "--max_steps", "1")) == 0
    assert "| val_loss 2.000 | val_accuracy 0.000 |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Runs


def test_an_easy_preference_is_learned(tiny: Tiny, tmp_path: Path) -> None:
    """More times "red" is better: accuracy on prompts that were not trained on is near 1."""
    words = ["blue", "green", "white", "gold"]

    def records(first: int, last: int) -> list[dict]:
        result = []
        for i in range(first, last):
            reds = [(i * (k + 3) + k) % 3 for k in range(4)]
            responses = [
                " ".join(["red"] * r + [words[(i + k) % 4]] * (2 - r)) for k, r in enumerate(reds)
            ]
            result.append(
                comparison(f"say {words[i % 4]} ( {i} )", responses, [3 - r for r in reds])
            )
        return result

    write_jsonl(tmp_path / "train.jsonl", records(0, 192), "comparisons")
    write_jsonl(tmp_path / "valid.jsonl", records(200, 230), "comparisons")
    out = tmp_path / "rm"
    args = [
        "--init",
        tiny.base,
        "--data",
        tmp_path / "train.jsonl",
        "--val_data",
        tmp_path / "valid.jsonl",
        "--demonstrations",
        tiny.demonstrations,
        "--out",
        out,
        "--batch_size",
        4,
        "--lr",
        5e-3,
        "--eval_every",
        12,
        "--device",
        "cpu",
        *LIMITS,
    ]
    assert main([str(arg) for arg in args]) == 0
    rows = read_log(out / "log.csv", train_rm.LOG)
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


def test_the_trunk_is_the_sft_models(tiny: Tiny, tmp_path: Path) -> None:
    """With a learning rate of 0 the result is the SFT model under a fresh head."""
    args = tiny.args("rm", tmp_path / "rm", "--lr", "0", "--max_steps", "1")
    assert main(args) == 0
    trunk = ScalarModel.from_pretrained(tmp_path / "rm").trunk
    for a, b in zip(trunk.parameters(), GPT.from_pretrained(tiny.base).parameters(), strict=True):
        assert torch.equal(a, b)
