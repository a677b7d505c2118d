"""train_ppo.py: every quantity of PPO and PPO-ptx against hand-worked examples and brute force.

Each `check_...` runs on the code as it is and, where it must fail, on the planted bugs of `BUGS`:
the ones that users of other implementations report. Some checks call the script's functions; those
that take a `run` look into iterations of `train_ppo.main` on the smallest world.
"""

import argparse
import copy
import functools
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from data.files import BadInput, read_jsonl, read_log, write_documents
from data.tokenizer import encode_prompt

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

import train_ppo
from checkpoint import read_info, save_model
from model import GPT, GPTConfig, Packing, ScalarModel
from tests.runs import Bugs, Runner, call, close, is_caught
from tests.tiny import Tiny
from train_ppo import Episodes

END = 11
PROMPTS = [[1, 2], [3], [4, 5, 6, 7], [8, 9], [1], [2, 3, 4], [5, 6], [7, 8, 9]]


def arguments(flags: str = "") -> argparse.Namespace:
    base = "--device cpu --batch_size 8 --num_minibatches 2 --max_new_tokens 6 "
    base += "--responses_per_prompt 1 --ptx_ratio 0.5 --lr 6e-4 --warmup_steps 10 --ema 0.992"
    return train_ppo.get_args(f"{base} {flags}".split())


def make_models() -> tuple[GPT, GPT, ScalarModel, ScalarModel]:
    """Policy, a reference that differs from it, reward model, value network; all random."""
    shape = GPTConfig(12, n_positions=16, n_embd=32, n_layer=2, n_head=2, eos_token_id=END)
    models = GPT(shape), GPT(shape), ScalarModel(shape), ScalarModel(shape)
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.eval()
    models[1].requires_grad_(False)
    end = models[0].wte.weight[END].detach()
    models[0].ln_f.bias.data += end / end.dot(end)  # so that about half the responses end
    return models


def rollout(models: tuple, args: argparse.Namespace) -> list[tuple[Episodes, list[int]]]:
    """The sampling and scoring of one iteration, as in main(); with lengths of prompts."""
    tokens, prompt_lengths, lengths = train_ppo.sample(models[0], PROMPTS, 3, args)
    minibatches = train_ppo.draw_minibatches(lengths, np.random.default_rng(0), args)
    result = []
    for rows in (rows for minibatch in minibatches for rows in minibatch):
        own = tokens[rows], prompt_lengths[rows], lengths[rows]
        result.append((train_ppo.make_episodes(*own, *models, args), own[1].tolist()))
    return result


def make_episodes(mask: Tensor, **given: Tensor) -> Episodes:
    """Episodes with these tensors, zeros elsewhere."""
    zeros = {each.name: torch.zeros(mask.shape) for each in fields(Episodes)}
    return Episodes(**(zeros | {"mask": mask.bool()} | given))


# The example of the hand-worked checks: two rows, prompts of 2 and 1, responses of 3 and 2 tokens.
TOKENS = torch.tensor([[1, 2, 5, 6, END, END], [3, 7, 8, END, END, END]])
PROMPT_LENGTHS = torch.tensor([2, 1], dtype=torch.int32)
LENGTHS = torch.tensor([5, 3], dtype=torch.int32)
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Runner:
    """An iteration of one update, gradients unclipped, without pretraining text."""
    flags = "--max_steps 1 --num_minibatches 1 --warmup_steps 0 --grad_clip 0 --ptx_coef 0"
    watched = "sample make_episodes draw_text"
    return Runner(train_ppo, tiny, tmp_path, f"{flags} --eval_every 0", "--val_data", watched)


def policy_of(run: Runner, state: dict | None = None) -> GPT:
    """As it was at the start, or as in a state."""
    policy = GPT.from_pretrained(run.tiny.base).eval()
    policy.load_state_dict(state or policy.state_dict())
    return policy


def old_policy_elsewhere(e: Episodes, *_: Any) -> Episodes:
    """Episodes as of another policy and other values, on both sides of the clip."""
    e.logprobs = e.logprobs + 0.4 * torch.sin(7.0 * e.tokens) * e.mask
    e.values = e.values + 0.4 * torch.sin(9.0 * e.tokens) * e.mask
    return e


# ------------------------------------------------------------------------------------------------
# Rollout and score


def check_response_mask() -> None:
    assert torch.equal(train_ppo.response_mask(TOKENS, PROMPT_LENGTHS, LENGTHS), MASK)


def check_first_ratio(run: Runner) -> None:
    """The ratio of the first update is 1, not nearly 1; that of the second is not."""
    for flags in (
        "",
        "--micro_batch_size 1",
        "--micro_batch_size 3 --responses_per_prompt 2",
        "--dtype bfloat16 --grad_checkpointing --micro_batch_size 5 --responses_per_prompt 4",
        "--rollout_size 3 --micro_batch_size 2 --grad_checkpointing",
    ):
        (row,) = run(flags).log
        assert float(row["ratio_max"]) == 1.0, flags
        assert float(row["approx_kl"]) == float(row["clipfrac"]) == 0.0
    seen = run("--inner_epochs 2 --lr 1e-2")
    (row,) = seen.log
    assert len(seen.gradients) == 4  # of two networks, two passes
    assert float(row["ratio_max"]) > 1.0 and float(row["approx_kl"]) > 0


def check_kl_before_first_update(run: Runner) -> None:
    """Policy and reference are one model before the first update: every log-ratio is 0."""
    for flags in ("", "--dtype bfloat16 --micro_batch_size 3"):
        seen = run(f"{flags} --max_steps 2 --lr 1e-2")
        assert [float(row["kl"]) == 0 for row in seen.log] == [True, False]
        for e in seen.results["make_episodes"][: len(seen.results["make_episodes"]) // 2]:
            assert torch.equal(e.logprobs, e.ref_logprobs) and (e.logprobs[e.mask] < 0).all()


def check_logprobs_of_the_rollout() -> None:
    """Log-probs and entropies are those of the distribution that was sampled from."""
    args, models = arguments(), make_models()
    for e, prompt_lengths in rollout(models, args):
        for model, logprobs in ((models[0], e.logprobs), (models[1], e.ref_logprobs)):
            for row, length in enumerate(e.lengths.tolist()):
                hidden = model(e.tokens[row : row + 1, :length])[0]
                logp = (hidden @ model.wte.weight.T).double().log_softmax(-1)
                for t in range(e.tokens.shape[1]):
                    inside = prompt_lengths[row] <= t < length
                    expected = logp[t - 1, e.tokens[row, t]] if inside else 0.0
                    assert abs(logprobs[row, t] - expected) < 1e-5
                    if inside and model is models[0]:
                        entropy = -(logp[t - 1].exp() * logp[t - 1]).sum()
                        assert abs(e.entropy[row, t] - entropy) < 1e-5


def check_values() -> None:
    """values[:, t] is the scalar output at t - 1: the value of the state before token t."""
    *_, network = models = make_models()
    values = train_ppo.values_before(network, TOKENS, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        assert values[row, 0] == 0
        for t in range(1, length):
            expected = network(TOKENS[row : row + 1, :t])[0, -1]  # sees tokens before t only
            assert abs(values[row, t] - expected) < 1e-5
    for e, _ in rollout(models, arguments()):
        before = train_ppo.values_before(network, e.tokens, e.lengths)
        assert torch.equal(e.values, before * e.mask)


def check_scores() -> None:
    """The reward model's number before the end token; the fixed score where the end is missing."""
    models = make_models()
    episodes = [e for e, _ in rollout(models, arguments("--missing_eos_score -7.5"))]
    assert 0 < torch.cat([e.ended for e in episodes]).sum() < 8
    for e in episodes:
        for row, length in enumerate(e.lengths.tolist()):
            tokens = e.tokens[row, :length]
            assert e.ended[row] == (tokens[-1] == END) and END not in tokens[:-1].tolist()
            if tokens[-1] == END:  # also where it is the last token that was allowed
                assert abs(e.scores[row] - models[2](tokens[None])[0, -2]) < 1e-5
            else:
                assert e.mask[row].sum() == 6 and e.scores[row] == -7.5


def check_rewards() -> None:
    """Hand-worked: KL on every response token, end token included; the score on the last one."""
    logprobs = torch.tensor([[0, 0, -1.0, -2.0, -0.5, 9], [0, -1.0, -3.0, 9, 9, 9]])
    ref_logprobs = torch.tensor([[0, 0, -1.5, -1.0, -0.5, 7], [0, -3.0, -2.0, 7, 7, 7]])
    scores = torch.tensor([2.0, -1.0])
    rewards = train_ppo.shape_rewards(scores, logprobs, ref_logprobs, MASK, LENGTHS, 0.1)
    expected = [[0, 0, -0.05, 0.1, 0 + 2.0, 0], [0, -0.2, 0.1 - 1.0, 0, 0, 0]]
    assert torch.allclose(rewards, torch.tensor(expected))
    assert torch.equal(scores, torch.tensor([2.0, -1.0]))  # untouched


def check_gae() -> None:
    """Against the definition, A_t = sum over l of (gamma lam)^l delta_{t + l}, on ragged rows."""
    first, last = torch.tensor([2, 1, 4, 11, 3]), torch.tensor([12, 2, 9, 12, 3])
    mask = train_ppo.response_mask(torch.zeros(5, 12), first, last)
    rewards, values = (torch.randn(5, 12, dtype=torch.float64) * mask for _ in range(2))
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)):
        advantages = train_ppo.gae(rewards, values, mask, gamma, lam)
        for row in range(5):
            places = mask[row].nonzero()[:, 0].tolist()
            for t in range(12):
                expected = 0.0
                for s in [s for s in places if s >= t] if t in places else []:
                    bootstrap = values[row, s + 1] if s + 1 in places else 0.0
                    delta = rewards[row, s] + gamma * bootstrap - values[row, s]
                    expected += (gamma * lam) ** (s - t) * delta
                assert abs(advantages[row, t] - expected) < 1e-12


def check_gae_limits() -> None:
    """lam 1, gamma 1: return to go minus value; and by hand with lam 1/2."""
    rewards = torch.tensor([[0, 0, 1.0, 2.0, 4.0, 0]])
    values = torch.tensor([[5.0, 5.0, 3.0, 1.0, 2.0, 8.0]])  # 5 and 8 are not the response's
    gae = train_ppo.gae
    assert gae(rewards, values, MASK[:1], 1.0, 1.0).tolist() == [[0, 0, 4.0, 5.0, 2.0, 0]]
    # deltas: 1 + 1 - 3 = -1, 2 + 2 - 1 = 3, 4 - 2 = 2; A = 2, 3 + 1 = 4, -1 + 2 = 1
    assert gae(rewards, values, MASK[:1], 1.0, 0.5).tolist() == [[0, 0, 1.0, 4.0, 2.0, 0]]


def check_whitening() -> None:
    """Mean 0 and standard deviation 1 over the response tokens of all minibatches, 0 elsewhere."""
    junk = torch.where(MASK, 0.0, 1e6)
    first = make_episodes(MASK, advantages=torch.randn(2, 6) + 3 + junk)
    junk = torch.where(MASK, 1e6, 0.0)
    second = make_episodes(~MASK, advantages=5 * torch.randn(2, 6) + junk)
    before = torch.cat([first.advantages[MASK], second.advantages[~MASK]]).double()
    train_ppo.whiten([first, second])
    after = torch.cat([first.advantages[MASK], second.advantages[~MASK]]).double()
    assert abs(after.mean()) < 1e-6
    assert abs((after**2).mean() - 1) < 1e-5
    expected = (before - before.mean()) / ((before - before.mean()) ** 2).mean().sqrt()
    assert (after - expected).abs().max() < 1e-5
    assert not first.advantages[~MASK].any() and not second.advantages[MASK].any()


def check_rollout_metrics() -> None:
    """Means over responses, or over response tokens, of a hand-worked example."""
    e = make_episodes(
        MASK,
        logprobs=MASK * -1.0,
        ref_logprobs=MASK * torch.tensor([[-1.5], [-0.8]]),
        scores=torch.tensor([1.0, 4.0]),
        rewards=MASK * torch.tensor([[0.3], [2.0]]),
        entropy=MASK * torch.tensor([[1.0], [2.0]]),
        ended=torch.tensor([True, False]),
        returns=MASK * torch.tensor([[1.0], [2.0]]),
        values=MASK * torch.tensor([[0.5], [2.0]]),
    )
    expected = {
        "score": 2.5,
        "score_std": 1.5,
        "kl": (3 * 0.5 - 2 * 0.2) / 2,
        "reward": (0.9 + 4) / 2,
        "entropy": (3 * 1 + 2 * 2) / 5,
        "response_len": 2.5,
        "eos_frac": 0.5,
        # returns 1, 1, 1, 2, 2: variance 0.24; errors .5, .5, .5, 0, 0: variance 0.06
        "explained_variance": 1 - 0.06 / 0.24,
    }
    assert train_ppo.rollout_metrics([e]) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------
# Losses


def check_policy_loss() -> None:
    """Hand-worked: value and gradient for each side of the clip and each sign of the advantage."""
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1, 1.0]])
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 3.0, -1.0]])
    e = make_episodes(torch.ones(1, 6), logprobs=torch.full((1, 6), -2.0), advantages=advantages)
    new = (ratios.log() - 2).requires_grad_()
    loss, metrics = train_ppo.policy_loss(new, e, 0.2)
    # The smaller of ratio A and clipped ratio A: 2.4, -3, 1, -1.6, 3.3, -1
    assert abs(loss.item() + (2.4 - 3 + 1 - 1.6 + 3.3 - 1)) < 1e-5
    loss.backward()
    # d/d log ratio = -ratio A where the plain term is the smaller one, else 0
    expected = torch.tensor([[0.0, 3.0, -1.0, 0.0, -3.3, 1.0]])
    assert (new.grad - expected).abs().max() < 1e-5
    assert metrics["clipfrac"] == 4 and abs(metrics["ratio_max"] - 1.5) < 1e-6


def check_kl_estimator() -> None:
    """Two tokens with known probabilities: the mean of approx_kl over samples of the old policy is
    KL(old || new), and not the other direction. 9 and 1 of 10 samples are the exact shares."""
    old, new = torch.tensor([0.9, 0.1]), torch.tensor([0.4, 0.6])
    tokens = torch.tensor([[0] * 9 + [1]])
    e = make_episodes(torch.ones(1, 10), logprobs=old.log()[tokens])
    _, metrics = train_ppo.policy_loss(new.log()[tokens], e, 0.2)
    kl_old_new = (old * (old / new).log()).sum()
    kl_new_old = (new * (new / old).log()).sum()
    assert abs(kl_old_new - kl_new_old) > 0.1
    assert abs(metrics["approx_kl"] / 10 - kl_old_new) < 1e-6


def check_padding_is_not_in_the_losses() -> None:
    """Junk outside the response changes neither loss nor metric and gets no gradient."""

    def losses(junk: float) -> list:
        outside = torch.where(MASK, 0.0, junk)
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randn, 2, 6, generator=generator)
        names = ("logprobs", "advantages", "values", "returns")
        e = make_episodes(MASK, **{name: draw() * MASK + outside for name in names})
        new = (draw() * MASK - 2 * outside).requires_grad_()
        values = (draw() * MASK + 3 * outside).requires_grad_()
        loss, metrics = train_ppo.policy_loss(new, e, 0.2)
        error, clipped = train_ppo.value_loss(values, e, 0.2)
        (loss + error).backward()
        assert not new.grad[~MASK].any() and not values.grad[~MASK].any()
        return [v.item() for v in (loss, error, clipped, *metrics.values())]

    assert losses(0.0) == losses(3.0) == losses(500.0)


def check_value_loss() -> None:
    """Hand-worked: half the larger of plain and clipped squared error."""
    returns = torch.tensor([[2.0, 0.0, 2.0, 1.3]])
    e = make_episodes(torch.ones(1, 4), values=torch.ones(1, 4), returns=returns)
    values = torch.tensor([[1.1, 1.5, 1.5, 1.4]]).requires_grad_()
    # old + clip: 1.1, 1.2, 1.2, 1.2; plain errors .9 1.5 .5 .1; clipped errors .9 1.2 .8 .1
    loss, clipped = train_ppo.value_loss(values, e, 0.2)
    assert abs(loss.item() - 0.5 * (0.81 + 2.25 + 0.64 + 0.01)) < 1e-5
    loss.backward()
    assert (values.grad[0, :3] - torch.tensor([-0.9, 1.5, 0.0])).abs().max() < 1e-5
    assert clipped == 1  # moved further than the range, towards the return


# ------------------------------------------------------------------------------------------------
# The update, in main()


def check_micro_batches(run: Runner) -> None:
    """Gradients and metrics of an update are means over its tokens, whatever the micro-batches."""
    flags = "--ptx_coef 0.5 --micro_batch_size"
    whole, *others = (run(f"{flags} {n}", make_episodes=old_policy_elsewhere) for n in (8, 3, 1))
    assert float(whole.log[0]["clipfrac"]) > 0.2
    for other in others:
        for name, value in whole.log[0].items():
            change = abs(float(value) - float(other.log[0][name]))
            assert change <= 2e-6 * max(1, abs(float(value))), name
        for a, b in zip(other.gradients, whole.gradients, strict=True):
            assert close(a, b)


def check_ptx_gradient(run: Runner) -> None:
    """What the policy's step gets is PPO's gradient plus ptx_coef times autograd's of the mean
    token cross-entropy; the value network's step notices nothing."""
    hook = {"make_episodes": old_policy_elsewhere}
    without = run("--micro_batch_size 2", **hook)
    mixed = run("--micro_batch_size 2 --ptx_coef 2.5", **hook)
    ((sequences,), policy) = mixed.results["draw_text"], policy_of(run)
    logits = (policy(sequences)[:, :-1] @ policy.wte.weight.T).double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
    (2.5 * expected).backward()
    assert sequences.shape == (4, 12)  # --ptx_ratio of the episodes
    assert abs(float(mixed.log[0]["ptx_loss"]) - expected.item()) < 1e-5  # without coefficient
    total = [a + p.grad for a, p in zip(without.gradients[0], policy.parameters(), strict=True)]
    assert close(mixed.gradients[0], total)
    assert all(map(torch.equal, mixed.gradients[1], without.gradients[1]))
    assert all(grad.abs().max() > 1e-4 for grad in without.gradients[0])


def check_sign(run: Runner) -> None:
    """A step makes a token with a positive advantage likelier, with a negative one less so."""
    for sign in (1.0, -1.0):
        for place in (0, -1):  # the first token of a response, and its last

            def one_token(_: None, episodes: list[Episodes], sign=sign, place=place) -> None:
                for e in episodes:
                    e.advantages = torch.zeros_like(e.values)
                t = episodes[0].mask[2].nonzero()[place]
                episodes[0].advantages[2, t] = sign

            seen = run("--lr 1e-3", whiten=one_token)
            e = seen.results["make_episodes"][0]
            policy = policy_of(run, seen.state["policy"])
            after, _ = policy.logprobs(e.tokens, e.lengths, mask=e.mask)
            change = ((after - e.logprobs) * e.advantages).sum()
            assert change > 1e-4


def check_value_step(run: Runner) -> None:
    """A step moves the values of the response's states towards their returns."""
    seen = run("--value_lr 1e-3")
    network = ScalarModel.from_pretrained(run.tiny.rm)  # the value network's start
    errors = []
    for state in (network.state_dict(), seen.state["value_network"]):
        network.load_state_dict(state)
        values = [
            train_ppo.values_before(network, e.tokens, e.lengths)
            for e in seen.results["make_episodes"]
        ]
        pairs = zip(values, seen.results["make_episodes"], strict=True)
        errors.append(sum((((v - e.returns) ** 2) * e.mask).sum().item() for v, e in pairs))
    assert errors[1] < errors[0]


def check_learning_rates(run: Runner) -> None:
    """Adam's first step moves a weight by its learning rate, in the warm-up by a tenth of it."""
    seen = run("--warmup_steps 10 --lr 1e-3 --value_lr 3e-3")
    start = {"policy": policy_of(run), "value_network": ScalarModel.from_pretrained(run.tiny.rm)}
    for (name, network), lr in zip(start.items(), (1e-4, 3e-4), strict=True):
        moved = [(p - seen.state[name][k]).abs().max() for k, p in network.state_dict().items()]
        assert abs(max(moved) / lr - 1) < 0.01
    assert float(seen.log[0]["lr"]) == 1e-4


def check_gradient_clip(run: Runner) -> None:
    """Each network's gradient alone is scaled down to the limit; the log has the norm before."""
    free, clipped = run("--ptx_coef 1"), run("--ptx_coef 1 --grad_clip 0.01")
    for i, column in enumerate(("grad_norm", "value_grad_norm")):
        norm = float(free.log[0][column])
        assert norm > 0.02 and abs(norm - float(clipped.log[0][column])) < 1e-6
        assert close(clipped.gradients[i], [g * 0.01 / norm for g in free.gradients[i]], 1e-3)


def check_gradients_are_gone(run: Runner) -> None:
    """Of both networks, before the next update and the next rollout: their 8 bytes a parameter are
    what the cache of keys and values gets."""
    held = []

    def look(result: Any, network: nn.Module, *_: Any) -> Any:
        held.append(any(p.grad is not None for p in network.parameters()))
        return result

    seen = run("--max_steps 2", sample=look)
    assert held == [False] * 4  # the policy's, and the start's
    rollouts = [args for args in seen.arguments["sample"] if len(args) == 4]
    assert len({seed for _, _, seed, _ in rollouts}) == 2  # one for each rollout


def check_second_update(run: Runner) -> None:
    """It has the gradients of its own minibatch alone, with advantages whitened over both; the log
    has means over both."""
    flags = "--num_minibatches 2 --lr 0 --value_lr 0 --cliprange 0.1 --cliprange_value 0.3"
    seen, policy = run(flags, make_episodes=old_policy_elsewhere), policy_of(run)
    network, e = ScalarModel.from_pretrained(run.tiny.rm), seen.results["make_episodes"]
    advantages = torch.cat([each.advantages[each.mask] for each in e])
    assert abs(advantages.mean()) < 1e-6 and abs(advantages.std(correction=0) - 1) < 1e-5
    means = []
    for i, each in enumerate(e):
        logprobs, _ = policy.logprobs(each.tokens, each.lengths, mask=each.mask)
        values = train_ppo.values_before(network, each.tokens, each.lengths)
        losses = train_ppo.policy_loss(logprobs, each, 0.1), train_ppo.value_loss(values, each, 0.3)
        for k, ((loss, _), model) in enumerate(zip(losses, (policy, network), strict=True)):
            means.append(loss / each.mask.sum())
            gradients = torch.autograd.grad(means[-1], [*model.parameters()])
            assert close(seen.gradients[2 * i + k], gradients)
    for k, column in enumerate(("policy_loss", "value_loss")):
        assert abs(float(seen.log[0][column]) - (means[k] + means[2 + k]) / 2) < 1e-5


def check_ema() -> None:
    """After n updates: decay^n w_0 + (1 - decay) sum over i of decay^(n - i) w_i."""
    policy, decay = make_models()[0], 0.9
    ema, expected = copy.deepcopy(policy), [p.detach().double() for p in policy.parameters()]
    for _ in range(5):
        for parameter in policy.parameters():
            parameter.data += torch.randn(parameter.shape)
        train_ppo.update_ema(ema, policy, decay)
        pairs = zip(expected, policy.parameters(), strict=True)
        expected = [decay * e + (1 - decay) * p.double() for e, p in pairs]
    for a, b in zip(ema.parameters(), expected, strict=True):
        assert (a - b).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------
# Schedules and draws


def check_warmup() -> None:
    """From a tenth over ten iterations to 1, then constant; off, constant from the first."""
    factors = [train_ppo.learning_rate_factor(step, 10) for step in (1, 2, 6, 10, 11, 12, 1000)]
    assert factors == pytest.approx([0.1, 0.19, 0.55, 0.91, 1, 1, 1], abs=1e-12)
    assert {train_ppo.learning_rate_factor(step, 0) for step in (1, 2, 9)} == {1.0}


def check_prompts() -> None:
    """Each pass shows every prompt once, in an order of its own, whatever the batch size; the
    prompts of a step depend on the step alone."""
    for num_prompts, batch_size in ((20, 8), (21, 8), (5, 8), (8, 8)):
        args, prompts = arguments(f"--batch_size {batch_size}"), [[i] for i in range(num_prompts)]
        steps = [train_ppo.prompts_of_step(prompts, step, args) for step in range(1, 22)]
        shown = [i for step in steps for (i,) in step]
        passes = [shown[i : i + num_prompts] for i in range(0, len(shown), num_prompts)]
        whole = [p for p in passes if len(p) == num_prompts]
        assert all(sorted(p) == list(range(num_prompts)) for p in whole)
        assert len({tuple(p) for p in whole}) == len(whole) > 5 or num_prompts == 5
        assert train_ppo.prompts_of_step(prompts, 9, args) == steps[8]
    other = train_ppo.prompts_of_step(prompts, 1, arguments("--seed 1"))
    assert other != train_ppo.prompts_of_step(prompts, 1, arguments())


def check_prompts_of_several_responses() -> None:
    args, prompts = arguments("--responses_per_prompt 2"), [[i] for i in range(12)]
    steps = [train_ppo.prompts_of_step(prompts, step, args) for step in (1, 2, 3)]
    assert all(len(step) == 8 and step[::2] == step[1::2] for step in steps)
    assert sorted(sum((step[::2] for step in steps), [])) == prompts


def check_shared_prompts(run: Runner) -> None:
    """With several responses a prompt, its tokens go through the models once for all of them, and
    every number of the rollout, every metric and every gradient is what it is row by row."""
    flags, make = "--responses_per_prompt 2 --micro_batch_size 4", Packing.make
    together = run(flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packing, "make", lambda tokens, n, share: make(tokens, n, share=False))
        apart = run(flags)
    tokens, prompt_lengths, _ = together.results["sample"][0]
    assert torch.equal(prompt_lengths[::2], prompt_lengths[1::2])
    assert torch.equal(tokens[::2, :4], tokens[1::2, :4])
    assert not torch.equal(tokens[::2], tokens[1::2])
    for one, other in zip(
        together.results["make_episodes"], apart.results["make_episodes"], strict=True
    ):
        for each in fields(Episodes):
            a, b = getattr(one, each.name).float(), getattr(other, each.name).float()
            assert a.shape == b.shape and (a - b).abs().max() < 1e-5, each.name
    assert float(together.log[0]["ratio_max"]) == 1.0
    for a, b in zip(together.gradients, apart.gradients, strict=True):
        assert close(a, b)


def check_minibatches() -> None:
    """Each row once; the responses to a prompt in one minibatch, in an order by length, so that
    micro-batches hold little padding; which prompts meet is random."""
    args = arguments("--batch_size 48 --num_minibatches 4 --responses_per_prompt 3")
    args.micro_batch_size = 5
    lengths = torch.randint(3, 40, (48,))
    longest = lengths.view(-1, 3).amax(1)

    def draw(seed: int) -> list[tuple[Tensor, ...]]:
        return train_ppo.draw_minibatches(lengths, np.random.default_rng(seed), args)

    minibatches = draw(0)
    assert [[len(rows) for rows in m] for m in minibatches] == [[3] * 4] * 4  # whole prompts
    rows = torch.cat([torch.cat(m) for m in minibatches])
    assert rows.sort().values.tolist() == list(range(48))
    prompts = rows.view(4, 4, 3) // 3
    assert (prompts == prompts[:, :, :1]).all()
    assert (longest[prompts[:, :, 0]].diff(dim=1) >= 0).all()
    assert not torch.equal(rows, torch.cat([torch.cat(m) for m in draw(1)]))


def check_text_is_drawn_by_length() -> None:
    """A start as often as there is text up to the next: else short documents would be too many;
    and the share that is cut anywhere begins at any place as often as at another."""
    sequences, starts = torch.arange(100).unfold(0, 4, 1), torch.tensor([0, 10, 14, 44, 74])
    by_length = np.array([10, 4, 30, 30, 23]) / 97  # of 97 sequences
    for share in (0, 0.25):
        rng = np.random.default_rng(0)
        drawn = train_ppo.draw_text(sequences, starts, 30_000, share, rng)
        assert drawn.shape == (30_000, 4) and (drawn.diff(dim=1) == 1).all()
        found = drawn[:, 0].bincount(minlength=97).double().numpy() / 30_000
        expected = np.full(97, share / 97)
        expected[starts.numpy()] += (1 - share) * by_length
        assert np.abs(found - expected).max() < 0.01
        assert abs(found[np.setdiff1d(np.arange(97), starts)].sum() - share * 92 / 97) < 0.01


def check_sampling_in_parts(run: Runner) -> None:
    """--rollout_size changes no response; nor does it that only some rows are asked for."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(50, (n,), generator=generator).tolist() for n in (9, 2, 5, 5, 7, 1, 3)]
    policy = policy_of(run)

    def sampled(size: int, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        args = arguments(f"--max_new_tokens 8 --rollout_size {size}")
        return train_ppo.sample(policy, prompts, 3, args, rows)

    whole, some = sampled(0), slice(0, 6, 2)
    for size in (0, 1, 3):
        assert all(map(torch.equal, sampled(size), whole))
        assert all(map(torch.equal, sampled(size, some), (each[some] for each in whole)))
    tokens, prompt_lengths, lengths = whole
    assert len(set(lengths.tolist())) > 1
    for row, prompt in enumerate(prompts):
        assert tokens[row, : len(prompt)].tolist() == prompt and prompt_lengths[row] == len(prompt)


def check_score_gain(run: Runner) -> None:
    """Exactly 0 before the first update. Then by hand: the policy's first response to each of the
    first prompts, and what the start says there from the same random numbers, one by one."""
    flags = "--responses_per_prompt 2 --batch_size 32 --num_minibatches 2 --micro_batch_size 3"
    for more in ("--lr 1e-2", "--dtype bfloat16 --rollout_size 5 --missing_eos_score -7"):
        seen = run(f"{flags} --max_steps 2 --warmup_steps 0 {more}")
        assert seen.log[0]["score_gain"] == seen.log[0]["score_gain_ci"] == "0"
    seen = run(f"{flags} --max_steps 2 --lr 1e-2 --missing_eos_score -7")
    start, judge = policy_of(run), ScalarModel.from_pretrained(run.tiny.rm)
    rollouts = zip(seen.arguments["sample"], seen.results["sample"], strict=True)
    *_, ((_, prompts, seed, _), (ours, _, ours_end)), _ = rollouts
    uniforms = torch.rand(32, 8, generator=torch.Generator().manual_seed(seed))
    gains = []
    for row in (0, 2, 4, 6):  # 32 / 8 responses, one of each prompt
        given = torch.tensor([prompts[row]]), torch.tensor([len(prompts[row])], dtype=torch.int32)
        theirs, end = start.generate(*given, 8, uniforms=uniforms[row : row + 1])
        scores = [
            judge(y[None])[0, -2].item() if y[-1] == run.tiny.encoding.eot_token else -7.0
            for y in (ours[row, : ours_end[row]], theirs[0, : end[0]])
        ]
        gains.append(scores[0] - scores[1])
    assert np.std(gains) > 0.01
    assert abs(float(seen.log[1]["score_gain"]) - np.mean(gains)) < 1e-5
    assert abs(float(seen.log[1]["score_gain_ci"]) - 1.96 * np.std(gains) / 2) < 1e-5


def check_validation(run: Runner) -> None:
    """Row 0 is the start's; scores, gains over the start's and KL are those of the responses that
    were drawn, each computed alone; the same random numbers for both."""
    flags = "--max_steps 2 --eval_every 1 --lr 1e-2 --ema 0 --micro_batch_size 3"
    seen = run(f"{flags} --missing_eos_score -7 --val_data {run.tiny.prompts}")
    first, _, second = seen.log
    assert (first["step"], first["score"], first["episodes"]) == ("0", "", "")
    drawn = zip(seen.arguments["sample"], seen.results["sample"], strict=True)
    looks = [found for found in drawn if found[0][2] > 10**9]  # by their seeds
    start, judge = policy_of(run), ScalarModel.from_pretrained(run.tiny.rm)
    batches = len(looks) // 3
    scores, kl = [], []
    for (_, prompts, _, _), (tokens, _, lengths) in [*looks[:batches], *looks[-batches:]]:
        model = start if len(scores) < 20 else policy_of(run, seen.state["ema"])
        for prompt, y, length in zip(prompts, tokens, lengths, strict=True):
            y, n = y[None, :length], len(prompt)
            ended = y[0, -1] == run.tiny.encoding.eot_token
            scores.append(judge(y)[0, -2].item() if ended else -7.0)
            both = [each.logprobs(y)[0][0, n:].sum().item() for each in (model, start)]
            kl.append(both[0] - both[1])
    scores, kl = np.reshape(scores, (2, 20)), np.reshape(kl, (2, 20))
    for row, i in ((first, 0), (second, 1)):
        columns = {"val_score": scores[i], "val_gain": scores[i] - scores[0], "val_kl": kl[i]}
        for name, values in columns.items():
            assert abs(float(row[name]) - values.mean()) < 1e-5, name
            assert abs(float(row[f"{name}_ci"]) - 1.96 * values.std() / 20**0.5) < 1e-5
    assert first["val_gain"] == first["val_gain_ci"] == first["val_kl"] == "0"
    assert abs(float(second["val_kl"])) > 0.01 and float(second["val_gain_ci"]) > 0.01
    assert [len(args[1]) for args, _ in looks[:batches]] == [8, 8, 4]


def check_reference(run: Runner) -> None:
    """--reference: the KL is measured from it, the gain from the start, which is still --init."""
    other = GPT.from_pretrained(run.tiny.base)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    folder, tokenizer = run.folder / "other", run.tiny.tokenizer.read_text()
    save_model(folder, other, tokenizer, {"stage": "base"})
    seen = run(f"--reference {folder} --val_data {run.tiny.prompts}")
    plain = run(f"--reference {run.tiny.base} --val_data {run.tiny.prompts}")
    kl, policy = [], policy_of(run)
    for e in seen.results["make_episodes"]:
        pi, ref = (each.logprobs(e.tokens, e.lengths, mask=e.mask)[0] for each in (policy, other))
        assert close([e.ref_logprobs], [ref])
        kl += (pi - ref).sum(1).tolist()
    assert abs(float(seen.log[1]["kl"]) - np.mean(kl)) < 1e-4 < abs(np.mean(kl))
    for column in ("score_gain", "val_gain", "val_score"):
        assert seen.log[0][column] == plain.log[0][column]
    assert seen.log[1]["score_gain"] == "0" and float(seen.log[0]["val_kl"]) != 0
    assert plain.log[1]["kl"] == plain.log[0]["val_kl"] == "0"
    assert read_info(seen.out)["reference"] == str(folder)


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check: Callable, run: Runner) -> None:
    call(check, run)


# ------------------------------------------------------------------------------------------------
# Planted bugs: each must make its checks fail. A bug gets the original function `f`, then what the
# function would get.

BUGS = Bugs(CHECKS)
plant = BUGS.plant
plant(
    "response_mask",
    "response_mask logprobs_of_the_rollout",
    with_one_more=lambda f, y, p, n: f(y, p, n + 1),
    without_end=lambda f, y, p, n: f(y, p, n - 1),
    with_last_prompt_token=lambda f, y, p, n: f(y, p - 1, n),
)


def in_update() -> bool:
    return torch.is_grad_enabled()


@plant("load_models", "first_ratio kl_before_first_update")
def dropout_in_rl(f: Callable, args: argparse.Namespace) -> tuple:
    policy, *others = f(args)
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return policy.train(), *others


@plant("model.GPT.logprobs", "first_ratio")
def seven_digits(f: Callable, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """Another kernel, an inference engine: nearly right, and not the training forward."""
    logprobs, entropy = f(*args, **how)
    return logprobs * (1 if in_update() else 1 + 3e-7), entropy


@plant("model.GPT.logprobs", "first_ratio logprobs_of_the_rollout")
def other_temperature(f: Callable, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
    return f(*args, **how) if in_update() else f(*args, **how, temperature=0.7)


@plant("model.GPT.logprobs", "kl_before_first_update")
def other_reference(f: Callable, gpt: GPT, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
    return f(gpt, *args, **how, temperature=1.0 if gpt.wte.weight.requires_grad else 0.7)


@plant("model.GPT.frozen", "kl_before_first_update")
def rounded_embeddings(f: Callable, model: GPT) -> GPT:
    """In the reference, whose embeddings autocast does not round."""
    frozen = f(model)
    frozen.wte.weight.data = frozen.wte.weight.data.to(getattr(torch, model.dtype)).float()
    return frozen


def sharing(f: Callable, tokens: Tensor, n: Tensor, share: bool, *, row: int, longer: int) -> Any:
    """Repeated beginnings are looked up in the row above, or in the first one; or are too long."""
    packing = f(tokens, n, share)
    same = (tokens[1:] == tokens[:-1]).cumprod(1).bool()
    if longer:
        same = nn.functional.pad(same, (1, 0), value=True)[:, :-1] & same[:, :1]
    for i in range(1, len(tokens) if share else 0):
        above = packing.index[i - 1 if row else 0]
        packing.index[i] = torch.where(same[i - 1], above, packing.index[i])
    return packing


plant(
    "model.Packing.make",
    "shared_prompts",
    one_token_too_long=functools.partial(sharing, row=1, longer=1),
    of_the_first_row=functools.partial(sharing, row=0, longer=0),
)


@plant("model.ScalarModel.response_scores", "scores score_gain validation")
def missing_end_ignored(f: Callable, model: ScalarModel, *args: Any) -> tuple:
    _, raw, ended = f(model, *args)
    return raw, raw, ended


plant(
    "sample",
    "score_gain",
    the_start_answers_from_numbers_of_its_own=lambda f, model, prompts, seed, args, *rows: f(
        model, prompts, seed + len(rows), args, *rows
    ),
    the_start_takes_the_first_numbers=lambda f, model, prompts, seed, args, *rows: f(
        model, prompts[rows[0]] if rows else prompts, seed, args
    ),
)


@plant("evaluate", "validation")
def gain_over_nothing(f: Callable, model: GPT, start_scores: Tensor | None, *args: Any) -> dict:
    return f(model, start_scores if start_scores is None else 0 * start_scores, *args)


@plant("load_models", "reference")
def reference_ignored(f: Callable, args: argparse.Namespace) -> tuple:
    policy, _, *others = f(args)
    return policy, policy, *others


@plant("load_models", "reference")
def start_is_the_reference(f: Callable, args: argparse.Namespace) -> tuple:
    _, reference, *others = f(args)
    return copy.deepcopy(reference), reference, *others


def v_past_the_end(f: Callable, rewards: Tensor, v: Tensor, mask: Tensor, *how: float) -> Tensor:
    """It is 0.1 there, not 0."""
    last = mask & ~nn.functional.pad(mask[:, 1:], (0, 1), value=False)
    return f(rewards + 0.1 * last, v, mask, *how)


plant("values_before", "values", values_after=lambda f, network, y, n: network(y, n))
plant(
    "shape_rewards",
    "rewards",
    score_past_the_end=lambda f, s, a, b, mask, n, kl: f(s, a, b, mask, (n + 1).clamp(max=6), kl),
    score_in_the_last_column=lambda f, s, a, b, mask, n, kl: f(s, a, b, mask, 0 * n + 6, kl),
    kl_not_on_the_end_token=lambda f, s, a, b, mask, n, kl: f(
        s, a, b, mask & (torch.arange(6) < n[:, None] - 1), n, kl
    ),
    kl_without_mask=lambda f, s, a, b, mask, n, kl: f(s, a, b, mask | True, n, kl),
    kl_rewarded=lambda f, s, a, b, mask, n, kl: f(s, a, b, mask, n, -kl),
)
plant(
    "gae",
    "gae gae_limits",
    gae_without_mask=lambda f, r, v, mask, gamma, lam: f(r, v, mask | True, gamma, lam),
    gae_without_lambda=lambda f, r, v, mask, gamma, lam: f(r, v, mask, gamma, 1.0),
    gae_bootstraps_past_the_end=v_past_the_end,
)


@plant("whiten", "whitening")
def whiten_with_padding(f: Callable, episodes: list[Episodes]) -> None:
    everything = torch.cat([e.advantages.flatten() for e in episodes])
    for e in episodes:
        e.advantages = (e.advantages - everything.mean()) / everything.std(correction=0)


@plant("whiten", "whitening")
def with_sample_variance(f: Callable, episodes: list[Episodes]) -> None:
    f(episodes)
    n = sum(e.mask.sum() for e in episodes)
    for e in episodes:
        e.advantages = e.advantages * ((n - 1) / n).sqrt()


@plant("rollout_metrics", "rollout_metrics")
def entropy_over_padding(f: Callable, episodes: list[Episodes]) -> dict[str, float]:
    return f(episodes) | {"entropy": torch.cat([e.entropy.flatten() for e in episodes]).mean()}


plant("whiten", "whitening", whiten_each_minibatch=lambda f, episodes: [f([e]) for e in episodes])


def surrogate(formula: Callable) -> Callable:
    """Another loss, of ratio times advantage and clipped ratio times advantage."""

    def loss(f: Callable, logprobs: Tensor, e: Episodes, clip: float) -> tuple[Tensor, dict]:
        ratio = torch.where(e.mask, logprobs - e.logprobs, 0.0).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        result = formula(ratio * e.advantages, clipped * e.advantages)
        return (result * e.mask).sum(), f(logprobs, e, clip)[1]

    return loss


def approx_kl(formula: Callable) -> Callable:
    def loss(f: Callable, logprobs: Tensor, e: Episodes, clip: float) -> tuple[Tensor, dict]:
        result, metrics = f(logprobs, e, clip)
        return result, metrics | {"approx_kl": formula((logprobs - e.logprobs) * e.mask).sum()}

    return loss


@plant("policy_loss", "micro_batches")
def mean_of_means(f: Callable, logprobs: Tensor, e: Episodes, clip: float) -> tuple[Tensor, dict]:
    loss, metrics = f(logprobs, e, clip)
    return 10 * loss / e.mask.sum(), metrics


@plant("value_loss", "value_loss")
def smaller_error(f: Callable, values: Tensor, e: Episodes, clip: float) -> tuple[Tensor, Tensor]:
    clipped = e.values + (values - e.values).clamp(-clip, clip)
    smaller = torch.min((values - e.returns) ** 2, (clipped - e.returns) ** 2)
    return 0.5 * (smaller * e.mask).sum(), f(values, e, clip)[1]


wrong_sign = surrogate(lambda plain, clipped: torch.min(plain, clipped))
plant("policy_loss", "policy_loss sign", loss_of_wrong_sign=wrong_sign)
plant(
    "policy_loss",
    "policy_loss",
    loss_with_the_larger_term=surrogate(lambda plain, clipped: -torch.max(plain, clipped)),
    loss_clipped_always=surrogate(lambda plain, clipped: -clipped),
    loss_never_clipped=surrogate(lambda plain, clipped: -plain),
)
plant(
    "policy_loss",
    "kl_estimator",
    k3_reversed=approx_kl(lambda x: (-x).exp() - 1 + x),
    k2=approx_kl(lambda x: 0.5 * x**2),
)
plant(
    "policy_loss",
    "padding_is_not_in_the_losses",
    loss_without_mask=lambda f, new, e, clip: f(new, replace(e, mask=e.mask | True), clip),
)
plant(
    "value_loss", "value_loss", value_loss_without_clip=lambda f, values, e, clip: f(values, e, 1e9)
)
plant(
    "value_loss",
    "value_step",
    sign_lost_on_the_way_to_the_returns=lambda f, values, e, clip: f(
        values, replace(e, returns=2 * e.values - e.returns), clip
    ),
)


def of_text(factor: float, before: Callable = id) -> Callable:
    """The gradient of pretraining text times `factor`; `before(policy)` is called before. Its are
    the only log-probs that an update computes without a mask."""

    def logprobs(f: Callable, gpt: GPT, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
        result, entropy = f(gpt, *args, **how)
        if in_update() and not how:
            before(gpt)
            result = result.detach() + factor * (result - result.detach())
        return result, entropy

    return logprobs


plant(
    "model.GPT.logprobs",
    "ptx_gradient",
    ptx_sum_of_tokens=of_text(4 * 11),
    ptx_counts_the_first_token=of_text(11 / 12),
    ptx_without_coefficient=of_text(1 / 2.5),
    ptx_not_in_the_step=of_text(0.0),
    ptx_replaces_ppo=of_text(1.0, lambda policy: policy.zero_grad()),
)


@plant("torch.optim.AdamW.step", "sign value_step")
def ascent(f: Callable, adam: torch.optim.Optimizer, *args: Any) -> None:
    for parameter in (p for group in adam.param_groups for p in group["params"]):
        parameter.grad.neg_()
    f(adam, *args)


@plant("torch.optim.AdamW.step", "learning_rates")
def one_rate_for_both(f: Callable, adam: torch.optim.Optimizer, *args: Any) -> None:
    adam.param_groups[0]["lr"] = 1e-4
    f(adam, *args)


plant("learning_rate_factor", "learning_rates", no_warmup=lambda f, step, warmup_steps: 1.0)
plant(
    "learning_rate_factor",
    "warmup",
    warmup_from_zero=lambda f, step, warmup_steps: min(1.0, step / max(1, warmup_steps)),
)
plant(
    "torch.optim.Optimizer.zero_grad",
    "gradients_are_gone",
    gradients_stay=lambda f, adam, set_to_none: None,
    gradients_are_zeros=lambda f, adam, set_to_none: f(adam, set_to_none=False),
)
plant("torch.optim.Optimizer.zero_grad", "second_update", stay=lambda f, adam, set_to_none: None)
plant("whiten", "second_update", no_whitening=lambda f, episodes: None)
plant("clip_grad_norm_", "gradient_clip", no_clip=lambda f, p, limit: f(p, float("inf")))
plant("update_ema", "ema", ema_swapped=lambda f, ema, policy, decay: f(ema, policy, 1 - decay))


@plant("prompts_of_step", "prompts")
def with_replacement(f: Callable, prompts: list, step: int, args: argparse.Namespace) -> list:
    rng = np.random.default_rng([args.seed, step])
    return [prompts[i] for i in rng.integers(len(prompts), size=args.batch_size)]


@plant("prompts_of_step", "prompts")
def in_one_order(f: Callable, prompts: list, step: int, args: argparse.Namespace) -> list:
    places = range((step - 1) * args.batch_size, step * args.batch_size)
    return [prompts[place % len(prompts)] for place in places]


@plant("draw_minibatches", "minibatches")
def responses_apart(f: Callable, lengths: Tensor, rng: Any, args: argparse.Namespace) -> list:
    minibatches = torch.from_numpy(rng.permutation(len(lengths))).split(12)
    return [m[lengths[m].argsort()].split(args.micro_batch_size) for m in minibatches]


@plant("draw_text", "text_is_drawn_by_length")
def documents_alike(
    f: Callable, sequences: Tensor, starts: Tensor, count: int, *how: Any
) -> Tensor:
    """Short ones are drawn as often as long ones."""
    evenly = torch.arange(len(starts))
    drawn = f(torch.arange(len(starts))[:, None], evenly, count, *how)[:, 0]
    return sequences[starts[drawn]]


@plant("generate.generate", "sampling_in_parts")
def the_same_in_every_part(f: Callable, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """Every part draws the same random numbers."""
    how["uniforms"] = torch.rand(how["uniforms"].shape, generator=torch.Generator().manual_seed(3))
    return f(*args, **how)


plant(
    "draw_minibatches",
    "minibatches",
    not_sorted=lambda f, lengths, rng, args: f(0 * lengths, rng, args),
    the_same_each_time=lambda f, lengths, rng, args: f(lengths, np.random.default_rng(0), args),
    some_rows_twice=lambda f, *args: [(a, a, *rest) for a, _, *rest in f(*args)],
)
plant(
    "torch.Tensor.argsort",
    "sampling_in_parts",
    parts_put_back_elsewhere=lambda f, tensor, stable: f(tensor, stable=stable).flip(0),
)


@pytest.mark.parametrize(("target", "bug", "check"), BUGS, ids=lambda x: getattr(x, "__name__", x))
def test_planted_bug_is_caught(target: str, bug: Callable, check: Callable, run: Runner) -> None:
    is_caught(check, target, bug, train_ppo, run)


# ------------------------------------------------------------------------------------------------
# Whole runs


COLUMNS = """step episodes lr score score_std kl reward entropy response_len eos_frac
    explained_variance ratio_max approx_kl clipfrac policy_loss value_loss vf_clipfrac grad_norm
    value_grad_norm score_gain score_gain_ci""".split()
VALIDATION = {f"val_{name}{end}" for name in ("score", "gain", "kl") for end in ("", "_ci")}


def test_a_task_with_a_known_optimum_is_learned(run: Runner, monkeypatch) -> None:
    """Half of the tokens that no prompt has score a point, a missing end -2: the best of 8 tokens
    score 7."""

    def count(model: ScalarModel, tokens: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        return (good[tokens] & inside).sum(1).float()

    encoding, prompts = run.tiny.encoding, read_jsonl(run.tiny.prompts, "prompts")
    good = torch.arange(encoding.n_vocab) % 2 == 1
    good[encoding.eot_token] = False
    good[[t for prompt in prompts for t in encode_prompt(encoding, prompt["prompt"])]] = False

    flags = "--batch_size 32 --num_minibatches 4 --micro_batch_size 0 --kl_coef 0.01 --lr 2e-3"
    flags += " --value_lr 3e-3 --missing_eos_score -2 --max_steps 50 --save_every 0"
    monkeypatch.setattr(ScalarModel, "scores", count)
    log = run(flags).log
    scores, gains = ([float(row[name]) for row in log] for name in ("score", "score_gain"))
    assert scores[0] < 1 and sum(scores[-5:]) / 5 > 4
    assert gains[0] == 0 and abs(sum(gains[-5:]) - sum(scores[-5:]) + 5 * scores[0]) < 5


def test_the_log_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    """Before the first update KL is 0; with one minibatch the first ratio is 1 in the log too."""
    flags = "--num_minibatches 1 --lr 1e-2"
    assert train_ppo.main(tiny.args("ppo", tmp_path, *flags.split())) == 0
    start, *rows = read_log(tmp_path / "log.csv")
    assert set(start) == {*COLUMNS, "ptx_loss", *VALIDATION}
    assert {name for name, value in start.items() if value} == {"step", *VALIDATION}
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["episodes"] for row in rows] == ["8", "16", "24", "32"]
    assert float(rows[0]["kl"]) == 0 == float(rows[0]["approx_kl"])
    assert float(rows[0]["ratio_max"]) == 1
    assert abs(float(rows[3]["kl"])) > 0.01
    assert float(rows[0]["lr"]) == 1e-3 and float(rows[1]["lr"]) == 1.9e-3
    assert [bool(row["val_score"]) for row in rows] == [False, True, False, True]
    for row in rows:
        total = float(row["score"]) - 0.2 * float(row["kl"])
        assert abs(float(row["reward"]) - total) < 1e-4  # what is optimised, Eq. 2
        assert float(row["ptx_loss"]) > 1 and 0 <= float(row["eos_frac"]) <= 1
    assert float(rows[3]["ptx_loss"]) < float(rows[0]["ptx_loss"])
    for row, clock in zip(rows, read_log(tmp_path / "timing.csv"), strict=True):
        names = ("rollout_s", "score_s", "gain_s", "update_s")
        seconds = [float(clock[name]) for name in names]
        assert float(clock["step_s"]) == pytest.approx(sum(seconds), rel=0.01)
        new = 8 * float(row["response_len"])
        assert float(clock["tok_per_s"]) * seconds[0] == pytest.approx(new, rel=0.01)
    info = read_info(tmp_path)
    assert (info["stage"], info["data"]) == ("ppo", [str(tiny.prompts), str(tiny.pretrain)])
    assert info["reference"] == str(tiny.base)


def test_the_result_is_the_average_of_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    """Decay 0: the last policy. Decay 1: the model that the run began with."""
    policies = []
    for decay in ("0", "1"):
        out = tmp_path / decay
        assert train_ppo.main(tiny.args("ppo", out, "--ema", decay, "--lr", "1e-2")) == 0
        state = torch.load(out / "checkpoints/00000004/state.pt", weights_only=True)["state"]
        policies.append(state["policy"])
    start = GPT.from_pretrained(tiny.base).state_dict()
    results = [GPT.from_pretrained(tmp_path / decay).state_dict() for decay in ("0", "1")]
    validated = [row["val_kl"] for row in read_log(tmp_path / "1/log.csv") if row["val_kl"]]
    assert [float(kl) for kl in validated] == [0, 0, 0]  # of the average
    for name, last in policies[0].items():
        assert torch.equal(last, policies[1][name])  # the average has no influence on the run
        assert torch.equal(last, results[0][name]) and torch.equal(start[name], results[1][name])
        assert not torch.equal(last, start[name])


def test_a_resumed_run_gains_over_the_same_start(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 3, the newest checkpoint being of step 2; the start is logged once."""
    whole, out, evaluate = tmp_path / "whole", tmp_path / "out", train_ppo.evaluate
    assert train_ppo.main(tiny.args("ppo", whole)) == 0
    asked = []

    def look(model: GPT, start_scores: Tensor | None, *args: Any) -> dict:
        asked.append(None if start_scores is None else start_scores.tolist())
        return evaluate(model, start_scores, *args)

    monkeypatch.setattr(train_ppo, "evaluate", look)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        steps, prompts_of_step = iter([1, 2]), train_ppo.prompts_of_step
        at_most_two = lambda *args: prompts_of_step(*args) if next(steps, 0) else killed()  # noqa: E731
        patch.setattr(train_ppo, "prompts_of_step", at_most_two)
        train_ppo.main(tiny.args("ppo", out))
    assert asked[0] is None and len(asked) == 2  # of the start, and after step 2
    assert train_ppo.main([*tiny.args("ppo", out), "--resume"]) == 0
    assert asked[2] is None and len(asked) == 4  # of the start, and after step 4
    assert asked[3] == asked[1] != [0.0] * 20
    assert (out / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


def killed() -> None:
    raise KeyboardInterrupt


def test_ptx_coef_0_is_ppo_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    args = tiny.args("ppo", tmp_path / "ppo", "--ptx_coef", "0")
    at = args.index("--pretrain_data")
    assert train_ppo.main([*args[:at], *args[at + 2 :]]) == 0
    assert train_ppo.main(tiny.args("ppo", tmp_path / "zero", "--ptx_coef", "0")) == 0
    assert train_ppo.main(tiny.args("ppo", tmp_path / "ptx")) == 0
    for file in ("model.safetensors", "log.csv"):
        zero, ppo, ptx = ((tmp_path / name / file).read_bytes() for name in ("zero", "ppo", "ptx"))
        assert zero == ppo != ptx
    # The first rollout has nothing to do with pretraining text: same prompts, same responses.
    first = [read_log(tmp_path / name / "log.csv")[0] for name in ("ppo", "ptx")]
    for column in ("score", "entropy", "response_len", "explained_variance"):
        assert first[0][column] == first[1][column]


def test_16_bit_copies_and_checkpointing_change_no_number(run: Runner) -> None:
    """With bfloat16 the matrices of the frozen models are stored so, those in training are not."""
    flags, dtypes = "--dtype bfloat16 --ptx_coef 1 --max_steps 2", []

    def look(e: Episodes, *args: Any) -> Episodes:
        dtypes.extend(
            next(p.dtype for n, p in m.named_parameters() if "c_fc" in n) for m in args[3:7]
        )
        return e

    small = run(f"{flags} --grad_checkpointing", make_episodes=look)
    full, half = torch.float32, torch.bfloat16
    assert dtypes[:4] == [full, half, half, full]  # policy, reference, reward model, values
    with pytest.MonkeyPatch.context() as patch:
        for kind in (GPT, ScalarModel):
            patch.setattr(kind, "frozen", lambda self: copy.deepcopy(self).requires_grad_(False))
        assert small.log == run(flags).log


def test_an_iteration_of_equal_returns_is_no_failure(run: Runner) -> None:
    """One episode, cut at once: nothing to whiten, no variance to explain, and still numbers."""
    seen = run("--batch_size 1 --max_new_tokens 1 --max_steps 2 --ptx_coef 1 --ptx_ratio 1")
    assert set(seen.log[0]) == {*COLUMNS, "ptx_loss"}  # that all are finite is main's own check


def test_a_value_that_is_not_finite_stops_a_run_unsaved(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    count, original = [], train_ppo.value_loss

    def poisoned(values: Tensor, e: Episodes, clip: float) -> tuple[Tensor, Tensor]:
        count.append(1)  # one micro-batch a minibatch, two minibatches an iteration
        error, clipped = original(values, e, clip)
        return error * (float("nan") if len(count) == 5 else 1.0), clipped

    monkeypatch.setattr(train_ppo, "value_loss", poisoned)
    with pytest.raises(SystemExit) as stopped:
        train_ppo.main(tiny.args("ppo", tmp_path, "--save_every", "1"))
    assert stopped.value.code == 1
    assert "step 3: not finite: value_loss nan" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["00000001", "00000002"]
    assert not (tmp_path / "model.safetensors").exists()


def test_text_starts_at_documents(tiny: Tiny, tmp_path: Path) -> None:
    """One start at each document's, one every 4 tokens in a longer one, none past the end."""
    documents, path = ["red is a colour", "blue", "the house is white"], str(tmp_path / "p.txt")
    write_documents(path, documents)
    stream, expected = [], []
    for document in documents:
        tokens = [*tiny.encoding.encode_ordinary(document), tiny.encoding.eot_token]
        expected += range(len(stream), len(stream) + len(tokens), 4)
        stream += tokens
    sequences, starts = train_ppo.load_text(path, tiny.encoding, 4)
    assert sequences.tolist() == [stream[i : i + 4] for i in range(len(stream) - 3)]
    assert starts.tolist() == [start for start in expected if start + 4 <= len(stream)]
    with pytest.raises(BadInput, match=f"{len(stream)} tokens, fewer than --ptx_tokens 100"):
        train_ppo.load_text(path, tiny.encoding, 100)
