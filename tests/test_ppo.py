"""train_ppo.py: every quantity of PPO and PPO-ptx against hand-worked examples and brute force.

As in test_model.py, each `check_...` runs on the code as it is and, where it must fail, on the
planted bugs of `BUGS`: the ones that users of other implementations report.
"""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

import train_ppo
from checkpoint import read_info
from data.files import BadInput, read_log, write_documents
from model import GPT, GPTConfig, ScalarModel
from tests.tiny import Tiny
from train_ppo import (
    Minibatch,
    gae,
    learning_rate_factor,
    main,
    policy_loss,
    prompts_of_step,
    ptx_backward,
    response_mask_of,
    rollout_metrics,
    shape_rewards,
    update_ema,
    value_loss,
    values_before,
)

END = 11
PROMPTS = [[1, 2], [3], [4, 5, 6, 7], [8, 9], [1], [2, 3, 4], [5, 6], [7, 8, 9]]


def arguments(*more: object) -> argparse.Namespace:
    args = ["--device", "cpu", "--batch_size", 8, "--num_minibatches", 2, "--max_new_tokens", 6]
    return train_ppo.get_args([str(arg) for arg in (*args, *more)])


def make_models(pdrop: float = 0.0) -> dict[str, nn.Module]:
    """Policy, a reference that differs from it, reward model, value network; all random."""
    shape = GPTConfig(
        vocab_size=12,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=pdrop,
        eos_token_id=END,
    )
    models = {
        "policy": GPT(shape),
        "reference": GPT(shape),
        "reward_model": ScalarModel(shape),
        "value_network": ScalarModel(shape),
    }
    for model in models.values():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.eval()
    end = models["policy"].wte.weight[END].detach()
    models["policy"].ln_f.bias.data += end / end.dot(end)  # so that about half the responses end
    return models


def rollout(models: dict[str, nn.Module], args: argparse.Namespace) -> list[Minibatch]:
    """The sampling and scoring of one iteration, as in main()."""
    tokens, prompt_lengths, lengths = train_ppo.sample(
        models["policy"], PROMPTS, 3, args, args.temperature
    )
    order = torch.randperm(8).split(args.minibatch_size)
    return [
        train_ppo.score(tokens[rows], lengths[rows], prompt_lengths[rows], models, args)
        for rows in order
    ]


def optimizers_of(models: dict[str, nn.Module], lr: float) -> dict[str, torch.optim.Optimizer]:
    return {
        name: torch.optim.SGD(models[name].parameters(), lr=lr)
        for name in ("policy", "value_network")
    }


def make_minibatch(mask: Tensor, **given: Tensor) -> Minibatch:
    """A minibatch with these tensors, zeros elsewhere."""
    zeros = {name: torch.zeros(mask.shape) for name in Minibatch.__annotations__}
    zeros |= {"response_mask": mask.bool(), "check_scores": None}
    return Minibatch(**(zeros | given))


# The example of the hand-worked checks: two rows, prompts of 2 and 1, responses of 3 and 2 tokens.
TOKENS = torch.tensor([[1, 2, 5, 6, END, END], [3, 7, 8, END, END, END]])
PROMPT_LENGTHS = torch.tensor([2, 1], dtype=torch.int32)
LENGTHS = torch.tensor([5, 3], dtype=torch.int32)
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()


# ------------------------------------------------------------------------------------------------
# Rollout


def check_response_mask() -> None:
    assert torch.equal(response_mask_of(TOKENS, PROMPT_LENGTHS, LENGTHS), MASK)


def check_first_ratio() -> None:
    """After a real rollout the ratio of the first update is 1, not nearly 1."""
    for micro, temperature in ((0, 1.0), (1, 0.7), (3, 1.3)):
        args = arguments("--micro_batch_size", micro, "--temperature", temperature)
        models = make_models(pdrop=0.1)
        (mb, _) = rollout(models, args)
        assert mb.logprobs[mb.response_mask].max() < 0
        metrics = train_ppo.update(mb, models, optimizers_of(models, 0.1), None, args)
        assert metrics["ratio_max"] == 1.0
        assert metrics["approx_kl"] == metrics["clipfrac"] == 0.0
        again = train_ppo.update(mb, models, optimizers_of(models, 0.1), None, args)
        assert again["ratio_max"] > 1.0 and again["approx_kl"] > 0


def check_kl_before_first_update() -> None:
    """Policy and reference are one model before the first update: every log-ratio is 0."""
    args = arguments("--temperature", 0.8)
    models = make_models(pdrop=0.1)
    models["reference"] = copy.deepcopy(models["policy"])
    minibatches = rollout(models, args)
    for mb in minibatches:
        assert torch.equal(mb.logprobs, mb.ref_logprobs)
        assert (mb.logprobs[mb.response_mask] < 0).all()
    assert rollout_metrics(minibatches)["kl"] == 0.0


def check_logprobs_of_the_rollout() -> None:
    """Log-probs and entropies are those of the distribution that was sampled from."""
    args, models = arguments("--temperature", 0.7), make_models()
    for mb in rollout(models, args):
        for name, logprobs in (("policy", mb.logprobs), ("reference", mb.ref_logprobs)):
            model = models[name]
            for row, length in enumerate(mb.lengths.tolist()):
                hidden = model(mb.tokens[row : row + 1, :length])[0]
                logp = (hidden @ model.wte.weight.T / 0.7).double().log_softmax(-1)
                for t in range(mb.tokens.shape[1]):
                    inside = mb.prompt_lengths[row] <= t < length
                    expected = logp[t - 1, mb.tokens[row, t]] if inside else 0.0
                    assert abs(logprobs[row, t] - expected) < 1e-5


def check_values() -> None:
    """values[:, t] is the scalar output at t - 1: the value of the state before token t."""
    network = make_models()["value_network"]
    values = values_before(network, TOKENS, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        assert values[row, 0] == 0
        for t in range(1, length):
            expected = network(TOKENS[row : row + 1, :t])[0, -1]  # sees tokens before t only
            assert abs(values[row, t] - expected) < 1e-5
    args, models = arguments(), make_models()
    for mb in rollout(models, args):
        before = values_before(models["value_network"], mb.tokens, mb.lengths)
        assert torch.equal(mb.values, before * mb.response_mask)


def check_scores() -> None:
    """The reward model's number before the end token; the fixed score where the end is missing."""
    args, models = arguments("--missing_eos_score", -7.5), make_models()
    minibatches = rollout(models, args)
    ended = torch.cat([mb.ended for mb in minibatches])
    assert 0 < ended.sum() < 8
    for mb in minibatches:
        for row, length in enumerate(mb.lengths.tolist()):
            tokens = mb.tokens[row, :length]
            assert mb.ended[row] == (tokens[-1] == END)
            assert (END in tokens[:-1].tolist()) is False
            if tokens[-1] == END:  # also where it is the last token that was allowed
                expected = models["reward_model"](tokens[None])[0, -2]
                assert abs(mb.scores[row] - expected) < 1e-5
            else:
                assert length == mb.prompt_lengths[row] + 6 and mb.scores[row] == -7.5


def check_rewards() -> None:
    """Hand-worked: KL on every response token, end token included; the score on the last one."""
    logprobs = torch.tensor([[0, 0, -1.0, -2.0, -0.5, 9], [0, -1.0, -3.0, 9, 9, 9]])
    ref_logprobs = torch.tensor([[0, 0, -1.5, -1.0, -0.5, 7], [0, -3.0, -2.0, 7, 7, 7]])
    scores = torch.tensor([2.0, -1.0])
    rewards = shape_rewards(scores, logprobs, ref_logprobs, MASK, LENGTHS, 0.1)
    expected = [[0, 0, -0.05, 0.1, 0 + 2.0, 0], [0, -0.2, 0.1 - 1.0, 0, 0, 0]]
    assert torch.allclose(rewards, torch.tensor(expected))
    assert torch.equal(scores, torch.tensor([2.0, -1.0]))  # untouched


def check_gae() -> None:
    """Against the definition, A_t = sum over l of (gamma lam)^l delta_{t + l}, on ragged rows."""
    mask = response_mask_of(
        torch.zeros(5, 12), torch.tensor([2, 1, 4, 11, 3]), torch.tensor([12, 2, 9, 12, 3])
    )
    rewards = torch.randn(5, 12, dtype=torch.float64) * mask
    values = torch.randn(5, 12, dtype=torch.float64) * mask
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)):
        advantages = gae(rewards, values, mask, gamma, lam)
        for row in range(5):
            places = mask[row].nonzero()[:, 0].tolist()
            for t in range(12):
                expected = 0.0
                for s in places if t in places else []:
                    if s >= t:
                        bootstrap = values[row, s + 1] if s + 1 in places else 0.0
                        delta = rewards[row, s] + gamma * bootstrap - values[row, s]
                        expected += (gamma * lam) ** (s - t) * delta
                assert abs(advantages[row, t] - expected) < 1e-12


def check_gae_limits() -> None:
    """lam 1, gamma 1: return to go minus value; and by hand with lam 1/2."""
    rewards = torch.tensor([[0, 0, 1.0, 2.0, 4.0, 0]])
    values = torch.tensor([[5.0, 5.0, 3.0, 1.0, 2.0, 8.0]])  # 5 and 8 are not the response's
    assert gae(rewards, values, MASK[:1], 1.0, 1.0).tolist() == [[0, 0, 4.0, 5.0, 2.0, 0]]
    # deltas: 1 + 1 - 3 = -1, 2 + 2 - 1 = 3, 4 - 2 = 2; A = 2, 3 + 1 = 4, -1 + 2 = 1
    assert gae(rewards, values, MASK[:1], 1.0, 0.5).tolist() == [[0, 0, 1.0, 4.0, 2.0, 0]]


def check_whitening() -> None:
    """Mean 0 and standard deviation 1 over the response tokens of all minibatches, 0 elsewhere."""
    junk = torch.where(MASK, 0.0, 1e6)
    first = make_minibatch(MASK, advantages=torch.randn(2, 6) + 3 + junk)
    second = make_minibatch(~MASK, advantages=5 * torch.randn(2, 6) + torch.where(MASK, 1e6, 0.0))
    before = torch.cat([first.advantages[MASK], second.advantages[~MASK]]).double()
    train_ppo.whiten([first, second])
    after = torch.cat([first.advantages[MASK], second.advantages[~MASK]]).double()
    assert abs(after.mean()) < 1e-6
    assert abs((after**2).mean() - 1) < 1e-5
    expected = (before - before.mean()) / ((before - before.mean()) ** 2).mean().sqrt()
    assert (after - expected).abs().max() < 1e-5
    assert not first.advantages[~MASK].any() and not second.advantages[MASK].any()


def check_rollout_metrics() -> None:
    """Means over responses, or over response tokens, of a hand-worked minibatch."""
    mb = make_minibatch(
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
    metrics = rollout_metrics([mb])
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
    assert metrics.pop("check_agreement") is None  # without --check_model
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert abs(metrics[name] - value) < 1e-5, name


def check_agreement_of_reward_models() -> None:
    """A correlation over all minibatches; responses without end have no own score to compare."""
    scores, check = torch.tensor([1.0, 2.0, 4.0, -4.0]), torch.tensor([3.0, 3.5, 9.0, 70.0])
    ended = torch.tensor([True, True, True, False])
    minibatches = [
        make_minibatch(MASK, scores=scores[rows], check_scores=check[rows], ended=ended[rows])
        for rows in (slice(0, 2), slice(2, 4))
    ]
    expected = np.corrcoef(scores[:3], check[:3])[0, 1]
    assert abs(rollout_metrics(minibatches)["check_agreement"] - expected) < 1e-6
    ended = torch.tensor([True, False])
    alone = [make_minibatch(MASK, scores=scores[:2], check_scores=check[:2], ended=ended)]
    assert rollout_metrics(alone)["check_agreement"] is None


# ------------------------------------------------------------------------------------------------
# Loss and update


def check_policy_loss() -> None:
    """Hand-worked: value and gradient for each side of the clip and each sign of the advantage."""
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1, 1.0]])
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 3.0, -1.0]])
    mb = make_minibatch(torch.ones(1, 6), logprobs=torch.full((1, 6), -2.0), advantages=advantages)
    new = (ratios.log() - 2).requires_grad_()
    loss, metrics = policy_loss(new, mb, slice(0, 1), 0.2)
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
    mb = make_minibatch(torch.ones(1, 10), logprobs=old.log()[tokens])
    _, metrics = policy_loss(new.log()[tokens], mb, slice(0, 1), 0.2)
    kl_old_new = (old * (old / new).log()).sum()
    kl_new_old = (new * (new / old).log()).sum()
    assert abs(kl_old_new - kl_new_old) > 0.1
    assert abs(metrics["approx_kl"] / 10 - kl_old_new) < 1e-6


def check_padding_is_not_in_the_losses() -> None:
    """Junk outside the response changes neither loss nor metric and gets no gradient."""

    def losses(junk: float) -> list:
        outside = torch.where(MASK, 0.0, junk)
        generator = torch.Generator().manual_seed(0)
        given = {
            name: torch.randn(2, 6, generator=generator) * MASK + outside
            for name in ("logprobs", "advantages", "values", "returns")
        }
        mb = make_minibatch(MASK, **given)
        new = (torch.randn(2, 6, generator=generator) * MASK - 2 * outside).requires_grad_()
        values = (torch.randn(2, 6, generator=generator) * MASK + 3 * outside).requires_grad_()
        loss, metrics = policy_loss(new, mb, slice(0, 2), 0.2)
        vf_loss, clipped = value_loss(values, mb, slice(0, 2), 0.2)
        (loss + vf_loss).backward()
        assert not new.grad[~MASK].any() and not values.grad[~MASK].any()
        return [loss.item(), vf_loss.item(), clipped.item(), *(float(v) for v in metrics.values())]

    assert losses(0.0) == losses(3.0) == losses(500.0)


def check_value_loss() -> None:
    """Hand-worked: half the larger of plain and clipped squared error."""
    mb = make_minibatch(
        torch.ones(1, 4),
        values=torch.tensor([[1.0, 1.0, 1.0, 1.0]]),
        returns=torch.tensor([[2.0, 0.0, 2.0, 1.3]]),
    )
    values = torch.tensor([[1.1, 1.5, 1.5, 1.4]]).requires_grad_()
    # old + clip: 1.1, 1.2, 1.2, 1.2; plain errors .9 1.5 .5 .1; clipped errors .9 1.2 .8 .1
    loss, clipped = value_loss(values, mb, slice(0, 1), 0.2)
    assert abs(loss.item() - 0.5 * (0.81 + 2.25 + 0.64 + 0.01)) < 1e-5
    loss.backward()
    assert (values.grad[0, :3] - torch.tensor([-0.9, 1.5, 0.0])).abs().max() < 1e-5
    assert clipped == 1  # moved further than the range, towards the return


def update_gradients(micro: int, ptx: Tensor | None, coef: float = 0.5) -> tuple[dict, list]:
    torch.manual_seed(0)
    args = arguments(
        "--micro_batch_size",
        micro,
        "--grad_clip",
        0,
        "--entropy_coef",
        0.01,
        "--ptx_coef",
        coef,
        "--pretrain_data",
        "x",
    )
    models = make_models()
    mb = rollout(models, args)[1]
    mb.logprobs = mb.logprobs + 0.3 * torch.randn(mb.logprobs.shape) * mb.response_mask
    metrics = train_ppo.update(mb, models, optimizers_of(models, 0.0), ptx, args)
    parameters = [*models["policy"].parameters(), *models["value_network"].parameters()]
    return metrics, [parameter.grad for parameter in parameters]


def check_micro_batches() -> None:
    """Gradients and metrics of an update are means over its tokens, whatever the micro-batches."""
    ptx = torch.randint(11, (5, 9))
    metrics, grads = update_gradients(4, ptx)
    for micro in (3, 1):
        other_metrics, other = update_gradients(micro, ptx)
        for name, value in metrics.items():
            assert abs(value - other_metrics[name]) < 1e-5 * max(1, abs(value)), name
        for a, b in zip(grads, other, strict=True):
            assert (a - b).abs().max() < 1e-5 * a.abs().max().clamp(min=1e-2)


def check_ptx_gradient() -> None:
    """The pretraining gradient is ptx_coef times autograd's of the mean token cross-entropy."""
    sequences = torch.randint(11, (5, 9))
    policy = make_models()["policy"]
    args = arguments("--micro_batch_size", 2, "--ptx_coef", 27.8, "--pretrain_data", "x")
    loss = ptx_backward(policy, sequences, args)
    ours = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    logits = (policy(sequences)[:, :-1] @ policy.wte.weight.T).double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
    (27.8 * expected).backward()
    assert abs(loss - expected.item()) < 1e-5  # reported without the coefficient
    for a, b in zip(ours, policy.parameters(), strict=True):
        assert (a - b.grad).abs().max() < 1e-5 * b.grad.abs().max().clamp(min=1e-2)


def check_ptx_adds_to_ppo() -> None:
    """The gradient of PPO-ptx is PPO's plus the pretraining gradient, in the policy alone."""
    ptx = torch.randint(11, (5, 9))
    _, without = update_gradients(4, None)
    _, mixed = update_gradients(4, ptx)
    torch.manual_seed(0)
    policy = make_models()["policy"]
    ptx_backward(policy, ptx, arguments("--ptx_coef", 0.5, "--pretrain_data", "x"))
    for i, parameter in enumerate(policy.parameters()):
        assert parameter.grad.abs().max() > 1e-4
        scale = mixed[i].abs().max().clamp(min=1e-2)
        assert (mixed[i] - without[i] - parameter.grad).abs().max() < 1e-5 * scale
    for a, b in zip(without[i + 1 :], mixed[i + 1 :], strict=True):  # the value network's
        assert torch.equal(a, b)


def check_sign() -> None:
    """A step makes a token with a positive advantage likelier, with a negative one less so."""
    for sign in (1.0, -1.0):
        for row, t in ((0, 2), (0, 4), (1, 1)):
            models, args = make_models(), arguments()
            policy = models["policy"]
            old = policy.logprobs(TOKENS, LENGTHS)[0].detach()
            advantages = torch.zeros(2, 6)
            advantages[row, t] = sign
            mb = make_minibatch(
                MASK, tokens=TOKENS, lengths=LENGTHS, logprobs=old * MASK, advantages=advantages
            )
            train_ppo.update(mb, models, optimizers_of(models, 0.01), None, args)
            change = (policy.logprobs(TOKENS, LENGTHS)[0] - old)[row, t]
            assert change * sign > 1e-4


def check_value_step() -> None:
    """A step moves the values of the response's states towards their returns."""
    models, args = make_models(), arguments()
    mb = rollout(models, args)[0]

    def error() -> float:
        values = values_before(models["value_network"], mb.tokens, mb.lengths)
        return (((values - mb.returns) ** 2) * mb.response_mask).sum().item()

    before = error()
    train_ppo.update(mb, models, optimizers_of(models, 0.01), None, args)
    assert error() < before


def check_ema() -> None:
    """After n updates: decay^n w_0 + (1 - decay) sum over i of decay^(n - i) w_i."""
    policy, decay = make_models()["policy"], 0.9
    ema, expected = copy.deepcopy(policy), [p.detach().double() for p in policy.parameters()]
    for _ in range(5):
        for parameter in policy.parameters():
            parameter.data += torch.randn(parameter.shape)
        update_ema(ema, policy, decay)
        expected = [
            decay * e + (1 - decay) * p.double()
            for e, p in zip(expected, policy.parameters(), strict=True)
        ]
    for a, b in zip(ema.parameters(), expected, strict=True):
        assert (a - b).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------
# Schedules


def check_warmup() -> None:
    """From a tenth over ten iterations to 1, then constant; off, constant from the first."""
    args = arguments("--warmup_steps", 10)
    factors = [learning_rate_factor(step, args) for step in (1, 2, 6, 10, 11, 12, 1000)]
    for factor, expected in zip(factors, (0.1, 0.19, 0.55, 0.91, 1, 1, 1), strict=True):
        assert abs(factor - expected) < 1e-12
    assert {learning_rate_factor(s, arguments("--warmup_steps", 0)) for s in (1, 2, 9)} == {1.0}


def check_prompts() -> None:
    """Each pass shows every prompt once, in an order of its own, whatever the batch size; the
    prompts of a step depend on the step alone."""
    for num_prompts, batch_size in ((20, 8), (21, 8), (5, 8), (8, 8)):
        args = arguments("--batch_size", batch_size)
        steps = [prompts_of_step(num_prompts, step, args) for step in range(1, 22)]
        shown = [i for step in steps for i in step]
        passes = [shown[i : i + num_prompts] for i in range(0, len(shown), num_prompts)]
        whole = [p for p in passes if len(p) == num_prompts]
        assert all(sorted(p) == list(range(num_prompts)) for p in whole)
        assert len({tuple(p) for p in whole}) == len(whole) > 5 or num_prompts == 5
        assert prompts_of_step(num_prompts, 9, args) == steps[8]
    other = arguments("--seed", 1)
    assert prompts_of_step(20, 1, other) != prompts_of_step(20, 1, arguments())


def check_shared_prompts() -> None:
    """With several responses a prompt, its tokens go through the models once for all of them, and
    every number of the rollout, every metric and every gradient is what it is row by row."""
    together = arguments("--responses_per_prompt", 2, "--micro_batch_size", 4, "--grad_clip", 0)
    apart = arguments("--micro_batch_size", 4, "--grad_clip", 0)
    torch.manual_seed(1)
    models = make_models()
    tokens, prompt_lengths, lengths = train_ppo.sample(models["policy"], PROMPTS[:4], 3, together)
    assert prompt_lengths.tolist() == [len(p) for p in PROMPTS[:4] for _ in range(2)]
    for row, length in enumerate(prompt_lengths.tolist()):
        assert tokens[row, :length].tolist() == PROMPTS[row // 2]
    assert any(not torch.equal(tokens[row], tokens[row + 1]) for row in range(0, 8, 2))
    minibatches = [
        train_ppo.score(tokens, lengths, prompt_lengths, models, args) for args in (together, apart)
    ]
    for name in Minibatch.__annotations__:
        one, other = (getattr(mb, name) for mb in minibatches)
        assert one is other is None or (one.float() - other.float()).abs().max() < 1e-5, name
    results = []
    for mb, args in zip(minibatches, (together, apart), strict=True):
        fresh = copy.deepcopy(models)
        metrics = train_ppo.update(mb, fresh, optimizers_of(fresh, 0.0), None, args)
        grads = [p.grad for n in ("policy", "value_network") for p in fresh[n].parameters()]
        results.append((metrics, grads))
    assert results[0][0]["ratio_max"] == 1.0
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a - b).abs().max() < 1e-5 * a.abs().max().clamp(min=1e-2)


def check_prompts_of_several_responses() -> None:
    args = arguments("--responses_per_prompt", 2)
    steps = [prompts_of_step(12, step, args) for step in (1, 2, 3)]
    assert [len(step) for step in steps] == [4, 4, 4]
    assert sorted(steps[0] + steps[1] + steps[2]) == list(range(12))


CHECKS = [
    check_shared_prompts,
    check_prompts_of_several_responses,
    check_response_mask,
    check_first_ratio,
    check_kl_before_first_update,
    check_logprobs_of_the_rollout,
    check_values,
    check_scores,
    check_rewards,
    check_gae,
    check_gae_limits,
    check_whitening,
    check_rollout_metrics,
    check_agreement_of_reward_models,
    check_policy_loss,
    check_kl_estimator,
    check_padding_is_not_in_the_losses,
    check_value_loss,
    check_micro_batches,
    check_ptx_gradient,
    check_ptx_adds_to_ppo,
    check_sign,
    check_value_step,
    check_ema,
    check_warmup,
    check_prompts,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check: Callable[[], None]) -> None:
    check()


# ------------------------------------------------------------------------------------------------
# Planted bugs: each must make its check fail. `plant` replaces a function, in this file too.


def plant(patch: pytest.MonkeyPatch, name: str, make: Callable) -> None:
    planted = make(getattr(train_ppo, name))
    patch.setattr(train_ppo, name, planted)
    if name in globals():
        patch.setitem(globals(), name, planted)


def mask_with_one_more(original: Callable) -> Callable:
    return lambda tokens, prompt_lengths, lengths: original(tokens, prompt_lengths, lengths + 1)


def mask_without_end(original: Callable) -> Callable:
    return lambda tokens, prompt_lengths, lengths: original(tokens, prompt_lengths, lengths - 1)


def mask_with_last_prompt_token(original: Callable) -> Callable:
    return lambda tokens, prompt_lengths, lengths: original(tokens, prompt_lengths - 1, lengths)


def dropout_in_rl(original: Callable) -> Callable:
    def logprobs(model, *rest):
        model.train()
        result = original(model, *rest)
        model.eval()
        return result

    return logprobs


def old_logprobs_in_float64(original: Callable) -> Callable:
    """Another kernel, an inference engine: right to seven digits, and not the training forward."""

    def logprobs(model, *rest):
        old, entropy = original(model, *rest)
        return old * (1 + 3e-7), entropy

    return logprobs


def without_temperature(original: Callable) -> Callable:
    def logprobs(model, *rest):
        *rows, args = rest
        args = argparse.Namespace(**vars(args) | {"temperature": 1.0})
        return original(model, *rows, args)

    return logprobs


def reference_without_temperature(original: Callable) -> Callable:
    calls = []

    def logprobs(model, *rest):
        *rows, args = rest
        calls.append(model)
        if len(calls) % 2 == 0:  # policy, then reference
            args = argparse.Namespace(**vars(args) | {"temperature": 1.0})
        return original(model, *rows, args)

    return logprobs


def values_after(original: Callable) -> Callable:
    return lambda network, tokens, lengths, prefixes=None: network(tokens, lengths, prefixes)


def score_past_the_end(original: Callable) -> Callable:
    def rewards(scores, logprobs, ref_logprobs, mask, lengths, kl_coef):
        later = (lengths + 1).clamp(max=logprobs.shape[1])
        return original(scores, logprobs, ref_logprobs, mask, later, kl_coef)

    return rewards


def score_in_the_last_column(original: Callable) -> Callable:
    def rewards(scores, logprobs, ref_logprobs, mask, lengths, kl_coef):
        last = torch.full_like(lengths, logprobs.shape[1])
        return original(scores, logprobs, ref_logprobs, mask, last, kl_coef)

    return rewards


def kl_not_on_the_end_token(original: Callable) -> Callable:
    def rewards(scores, logprobs, ref_logprobs, mask, lengths, kl_coef):
        places = torch.arange(logprobs.shape[1])
        mask = mask & (places < lengths[:, None] - 1)
        return original(scores, logprobs, ref_logprobs, mask, lengths, kl_coef)

    return rewards


def kl_without_mask(original: Callable) -> Callable:
    return lambda scores, logprobs, ref_logprobs, mask, lengths, kl_coef: original(
        scores, logprobs, ref_logprobs, torch.ones_like(mask), lengths, kl_coef
    )


def kl_rewarded(original: Callable) -> Callable:
    return lambda scores, logprobs, ref_logprobs, mask, lengths, kl_coef: original(
        scores, logprobs, ref_logprobs, mask, lengths, -kl_coef
    )


def gae_without_mask(original: Callable) -> Callable:
    return lambda rewards, values, mask, gamma, lam: original(
        rewards, values, torch.ones_like(mask), gamma, lam
    )


def gae_bootstraps_past_the_end(original: Callable) -> Callable:
    def advantages(rewards, values, mask, gamma, lam):
        result = torch.zeros_like(rewards)
        advantage = torch.zeros_like(rewards[:, 0])
        following = torch.nn.functional.pad(values[:, 1:], (0, 1), value=0.5)
        for t in reversed(range(rewards.shape[1])):
            following_t = torch.where(mask[:, t], following[:, t], 0)
            delta = rewards[:, t] + gamma * following_t - values[:, t]
            last = mask[:, t] & ~(mask[:, t + 1] if t + 1 < mask.shape[1] else mask[:, t] & False)
            delta = delta + torch.where(last, 0.1, 0.0)  # V after the end is not 0
            advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0.0)
            result[:, t] = advantage
        return result

    return advantages


def gae_without_lambda(original: Callable) -> Callable:
    return lambda rewards, values, mask, gamma, lam: original(rewards, values, mask, gamma, 1.0)


def whiten_with_padding(original: Callable) -> Callable:
    def whiten(minibatches):
        everything = torch.cat([mb.advantages.flatten() for mb in minibatches])
        for mb in minibatches:
            mb.advantages = (mb.advantages - everything.mean()) / everything.std(correction=0)

    return whiten


def whiten_each_minibatch(original: Callable) -> Callable:
    return lambda minibatches: [original([mb]) for mb in minibatches]


def whiten_with_sample_variance(original: Callable) -> Callable:
    def whiten(minibatches):
        original(minibatches)
        n = sum(mb.response_mask.sum() for mb in minibatches)
        for mb in minibatches:
            mb.advantages = mb.advantages * ((n - 1) / n).sqrt()

    return whiten


def metrics_over_padding(original: Callable) -> Callable:
    def metrics(minibatches):
        result = original(minibatches)
        result["entropy"] = torch.cat([mb.entropy.flatten() for mb in minibatches]).mean().item()
        return result

    return metrics


def change_loss(formula: Callable) -> Callable:
    """Replace the surrogate; `formula` maps ratio, advantage and clip range to the loss."""

    def make(original: Callable) -> Callable:
        def loss(new_logprobs, mb, rows, cliprange):
            _, metrics = original(new_logprobs, mb, rows, cliprange)
            mask = mb.response_mask[rows]
            ratio = torch.where(mask, new_logprobs - mb.logprobs[rows], 0.0).exp()
            return (formula(ratio, mb.advantages[rows], cliprange) * mask).sum(), metrics

        return loss

    make.__name__ = formula.__name__
    return make


@change_loss
def loss_of_wrong_sign(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    return torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


@change_loss
def loss_with_the_larger_term(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    return -torch.max(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


@change_loss
def loss_clipped_always(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    return -ratio.clamp(1 - clip, 1 + clip) * advantages


@change_loss
def loss_never_clipped(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    return -ratio * advantages


def change_approx_kl(formula: Callable) -> Callable:
    def make(original: Callable) -> Callable:
        def loss(new_logprobs, mb, rows, cliprange):
            result, metrics = original(new_logprobs, mb, rows, cliprange)
            log_ratio = (new_logprobs - mb.logprobs[rows]) * mb.response_mask[rows]
            return result, metrics | {"approx_kl": formula(log_ratio).sum()}

        return loss

    make.__name__ = formula.__name__
    return make


@change_approx_kl
def k3_reversed(log_ratio: Tensor) -> Tensor:
    return (-log_ratio).exp() - 1 + log_ratio


@change_approx_kl
def k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio**2


def loss_without_mask(original: Callable) -> Callable:
    def loss(new_logprobs, mb, rows, cliprange):
        everywhere = torch.ones_like(mb.response_mask)
        return original(new_logprobs, replace(mb, response_mask=everywhere), rows, cliprange)

    return loss


def value_loss_without_clip(original: Callable) -> Callable:
    return lambda values, mb, rows, clip: original(values, mb, rows, 1e9)


def value_loss_with_the_smaller_error(original: Callable) -> Callable:
    def loss(values, mb, rows, clip):
        old, returns, mask = mb.values[rows], mb.returns[rows], mb.response_mask[rows]
        clipped = old + (values - old).clamp(-clip, clip)
        smaller = torch.min((values - returns) ** 2, (clipped - returns) ** 2)
        return 0.5 * (smaller * mask).sum(), original(values, mb, rows, clip)[1]

    return loss


def values_away_from_returns(original: Callable) -> Callable:
    """A sign lost on the way to the value target."""
    return lambda values, mb, rows, clip: original(
        values, replace(mb, returns=mb.values - mb.advantages), rows, clip
    )


def ptx_sum_of_tokens(original: Callable) -> Callable:
    def backward(policy, sequences, args):
        scaled = args.ptx_coef * (sequences.numel() - len(sequences))
        return original(policy, sequences, argparse.Namespace(**vars(args) | {"ptx_coef": scaled}))

    return backward


def ptx_counts_the_first_token(original: Callable) -> Callable:
    def backward(policy, sequences, args):
        share = (sequences.shape[1] - 1) / sequences.shape[1]
        args = argparse.Namespace(**vars(args) | {"ptx_coef": args.ptx_coef * share})
        return original(policy, sequences, args)

    return backward


def ptx_without_coefficient(original: Callable) -> Callable:
    return lambda policy, sequences, args: original(
        policy, sequences, argparse.Namespace(**vars(args) | {"ptx_coef": 1.0})
    )


def ptx_replaces_ppo(original: Callable) -> Callable:
    def backward(policy, sequences, args):
        policy.zero_grad()
        return original(policy, sequences, args)

    return backward


def ema_swapped(original: Callable) -> Callable:
    return lambda ema, policy, decay: original(ema, policy, 1 - decay)


def warmup_from_zero(original: Callable) -> Callable:
    return lambda step, args: min(1.0, step / max(1, args.warmup_steps))


def prompts_with_replacement(original: Callable) -> Callable:
    import numpy as np

    return lambda n, step, args: (
        np.random.default_rng([args.seed, step]).integers(n, size=args.batch_size).tolist()
    )


def prompts_in_one_order(original: Callable) -> Callable:
    return lambda n, step, args: [
        place % n for place in range((step - 1) * args.batch_size, step * args.batch_size)
    ]


def mean_of_micro_batch_means(original: Callable) -> Callable:
    def loss(new_logprobs, mb, rows, cliprange):
        result, metrics = original(new_logprobs, mb, rows, cliprange)
        share = mb.response_mask[rows].sum() * len(mb.tokens) / len(new_logprobs)
        return result * mb.response_mask.sum() / share, metrics

    return loss


def prefixes_one_token_too_long(original: Callable) -> Callable:
    def shared(prompt_lengths, args):
        prefixes = original(prompt_lengths, args)
        return prefixes and (prefixes[0], prefixes[1] + (prefixes[1] > 0))

    return shared


def prefixes_of_the_first_row(original: Callable) -> Callable:
    def shared(prompt_lengths, args):
        prefixes = original(prompt_lengths, args)
        return prefixes and (torch.zeros_like(prefixes[0]), prefixes[1])

    return shared


BUGS = [
    ("shared_prompts", prefixes_one_token_too_long, check_shared_prompts),
    ("shared_prompts", prefixes_of_the_first_row, check_shared_prompts),
    ("response_mask_of", mask_with_one_more, check_response_mask),
    ("response_mask_of", mask_without_end, check_response_mask),
    ("response_mask_of", mask_with_last_prompt_token, check_response_mask),
    ("response_mask_of", mask_with_last_prompt_token, check_logprobs_of_the_rollout),
    ("response_mask_of", mask_without_end, check_logprobs_of_the_rollout),
    ("policy_logprobs", dropout_in_rl, check_first_ratio),
    ("policy_logprobs", old_logprobs_in_float64, check_first_ratio),
    ("policy_logprobs", without_temperature, check_first_ratio),
    ("policy_logprobs", without_temperature, check_logprobs_of_the_rollout),
    ("policy_logprobs", dropout_in_rl, check_kl_before_first_update),
    ("policy_logprobs", reference_without_temperature, check_kl_before_first_update),
    ("values_before", values_after, check_values),
    ("shape_rewards", score_past_the_end, check_rewards),
    ("shape_rewards", score_in_the_last_column, check_rewards),
    ("shape_rewards", kl_not_on_the_end_token, check_rewards),
    ("shape_rewards", kl_without_mask, check_rewards),
    ("shape_rewards", kl_rewarded, check_rewards),
    ("gae", gae_without_mask, check_gae),
    ("gae", gae_without_mask, check_gae_limits),
    ("gae", gae_bootstraps_past_the_end, check_gae),
    ("gae", gae_without_lambda, check_gae),
    ("gae", gae_without_lambda, check_gae_limits),
    ("whiten", whiten_with_padding, check_whitening),
    ("whiten", whiten_each_minibatch, check_whitening),
    ("whiten", whiten_with_sample_variance, check_whitening),
    ("rollout_metrics", metrics_over_padding, check_rollout_metrics),
    ("policy_loss", loss_of_wrong_sign, check_policy_loss),
    ("policy_loss", loss_of_wrong_sign, check_sign),
    ("policy_loss", loss_with_the_larger_term, check_policy_loss),
    ("policy_loss", loss_clipped_always, check_policy_loss),
    ("policy_loss", loss_never_clipped, check_policy_loss),
    ("policy_loss", k3_reversed, check_kl_estimator),
    ("policy_loss", k2, check_kl_estimator),
    ("policy_loss", loss_without_mask, check_padding_is_not_in_the_losses),
    ("policy_loss", mean_of_micro_batch_means, check_micro_batches),
    ("value_loss", value_loss_without_clip, check_value_loss),
    ("value_loss", value_loss_with_the_smaller_error, check_value_loss),
    ("value_loss", values_away_from_returns, check_value_step),
    ("ptx_backward", ptx_sum_of_tokens, check_ptx_gradient),
    ("ptx_backward", ptx_counts_the_first_token, check_ptx_gradient),
    ("ptx_backward", ptx_without_coefficient, check_ptx_gradient),
    ("ptx_backward", ptx_replaces_ppo, check_ptx_adds_to_ppo),
    ("update_ema", ema_swapped, check_ema),
    ("learning_rate_factor", warmup_from_zero, check_warmup),
    ("prompts_of_step", prompts_with_replacement, check_prompts),
    ("prompts_of_step", prompts_in_one_order, check_prompts),
]


@pytest.mark.parametrize(
    ("name", "bug", "check"), BUGS, ids=lambda item: getattr(item, "__name__", "")
)
def test_planted_bug_is_caught(
    name: str, bug: Callable, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, name, bug)
    with pytest.raises(AssertionError):
        check()


def test_scores_that_ignore_the_missing_end_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_ppo.torch, "where", lambda mask, scores, other: scores)
    with pytest.raises(AssertionError):
        check_scores()


# ------------------------------------------------------------------------------------------------
# Runs


class CountsThrees(nn.Module):
    """A reward with a known optimum: one for each token 3 of the response."""

    def scores(self, tokens: Tensor, lengths: Tensor, prefixes: None = None) -> Tensor:
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        return ((tokens == 3) & inside).sum(1).float()


def test_a_task_with_a_known_optimum_is_learned() -> None:
    """Prompts hold no 3 and an unended response scores -2, so the best of 6 tokens scores 5."""
    args = arguments(
        "--batch_size", 32, "--num_minibatches", 4, "--kl_coef", 0.01, "--missing_eos_score", -2
    )
    models = make_models()
    models["reward_model"] = CountsThrees()
    optimizers = {
        name: torch.optim.Adam(models[name].parameters(), lr=3e-3)
        for name in ("policy", "value_network")
    }
    prompts = [[2, 4], [5], [6, 7, 8], [9]] * 8
    scores = []
    for step in range(60):
        tokens, prompt_lengths, lengths = train_ppo.sample(models["policy"], prompts, step, args)
        minibatches = [
            train_ppo.score(tokens[rows], lengths[rows], prompt_lengths[rows], models, args)
            for rows in torch.randperm(32).split(8)
        ]
        train_ppo.whiten(minibatches)
        for mb in minibatches:
            train_ppo.update(mb, models, optimizers, None, args)
        scores.append(rollout_metrics(minibatches)["score"])
    assert scores[0] < 0.5
    assert sum(scores[-5:]) / 5 > 3.5


def test_the_log_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    """Before the first update KL is 0; with one minibatch the first ratio is 1 in the log too."""
    out = tmp_path / "ppo"
    assert main(tiny.args("ppo", out, "--num_minibatches", "1", "--lr", "1e-2")) == 0
    rows = read_log(out / "log.csv", train_ppo.LOG)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["episodes"] for row in rows] == ["8", "16", "24", "32"]
    assert [float(row["kl"]) for row in rows][0] == 0 == float(rows[0]["approx_kl"])
    assert float(rows[0]["ratio_max"]) == 1
    assert abs(float(rows[3]["kl"])) > 0.01
    assert float(rows[0]["lr"]) == 1e-3 and float(rows[1]["lr"]) == 1.9e-3
    assert [bool(row["val_score"]) for row in rows] == [False, True, False, True]
    for row in rows:
        total = float(row["score"]) - float(row["kl_coef"]) * float(row["kl"])
        assert abs(float(row["reward"]) - total) < 1e-4  # what is optimised, Eq. 2
        assert float(row["ptx_loss"]) > 1 and 0 <= float(row["eos_frac"]) <= 1
    assert float(rows[3]["ptx_loss"]) < float(rows[0]["ptx_loss"])
    info = read_info(out)
    assert (info["stage"], info["data"]) == ("ppo", [str(tiny.prompts), str(tiny.pretrain)])
    assert info["reference"] == str(tiny.base)


def test_the_result_is_the_average_of_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    """Decay 0: the last policy. Decay 1: the model that the run began with."""
    results = {}
    for decay in ("0", "1"):
        assert main(tiny.args("ppo", tmp_path / decay, "--ema", decay, "--lr", "1e-2")) == 0
        state = torch.load(tmp_path / decay / "checkpoints/00000004/state.pt", weights_only=True)
        results[decay] = state["policy"]
    for a, b in zip(results["0"].values(), results["1"].values(), strict=True):
        assert torch.equal(a, b)  # the average has no influence on the run
    for name, parameter in GPT.from_pretrained(tmp_path / "0").named_parameters():
        assert torch.equal(parameter, results["0"][name])
    start = dict(GPT.from_pretrained(tiny.base).named_parameters())
    for name, parameter in GPT.from_pretrained(tmp_path / "1").named_parameters():
        assert torch.equal(parameter, start[name])
        assert not torch.equal(parameter, results["1"][name])


def test_ptx_coef_0_is_ppo_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    runs = {"zero": ("--ptx_coef", "0"), "ptx": ()}
    for name, more in runs.items():
        assert main(tiny.args("ppo", tmp_path / name, *more)) == 0
    args = tiny.args("ppo", tmp_path / "ppo", "--ptx_coef", "0")
    at = args.index("--pretrain_data")
    del args[at : at + 2]
    assert main(args) == 0
    for file in ("model.safetensors", "log.csv"):
        zero, ppo, ptx = ((tmp_path / name / file).read_bytes() for name in ("zero", "ppo", "ptx"))
        assert zero == ppo != ptx
    # The first rollout has nothing to do with pretraining text: same prompts, same responses.
    first = [read_log(tmp_path / name / "log.csv")[0] for name in ("ppo", "ptx")]
    for column in ("score", "entropy", "response_len", "explained_variance"):
        assert first[0][column] == first[1][column]


@pytest.mark.parametrize("more", [("--dtype", "bfloat16"), ("--micro_batch_size", "3")])
def test_the_first_log_row_also_otherwise(tiny: Tiny, tmp_path: Path, more: tuple) -> None:
    args = tiny.args("ppo", tmp_path / "ppo", "--num_minibatches", "1", "--max_steps", "2", *more)
    assert main(args) == 0
    first, second = read_log(tmp_path / "ppo/log.csv")
    assert float(first["kl"]) == float(first["approx_kl"]) == 0 and float(first["ratio_max"]) == 1
    assert math.isfinite(float(second["score"]))


def test_an_iteration_of_equal_returns_is_no_failure(tiny: Tiny, tmp_path: Path) -> None:
    """One episode, cut at once: nothing to whiten, no variance to explain, and still numbers."""
    args = tiny.args(
        "ppo",
        tmp_path / "ppo",
        "--batch_size",
        "1",
        "--num_minibatches",
        "1",
        "--max_new_tokens",
        "1",
        "--max_steps",
        "2",
        "--ptx_ratio",
        "1",
    )
    assert main(args) == 0
    for row in read_log(tmp_path / "ppo/log.csv"):
        assert all(math.isfinite(float(value)) for value in row.values() if value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kl_limit", "-1000"], "is over --kl_limit -1000"),
        (["--check_model", "RM", "--agreement_limit", "2"], "under --agreement_limit 2"),
        (["--max_new_tokens", "1"], "within --max_new_tokens 1, so all score --missing_eos_score"),
        (["--check_model", "RM"], ""),
    ],
)
def test_what_looks_wrong_is_warned_about_once(
    more: list[str], message: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Three iterations, one warning that names its flag; none where the limits are kept."""
    more = [str(tiny.rm) if word == "RM" else word for word in more]
    assert main(tiny.args("ppo", tmp_path / "ppo", "--max_steps", "3", *more)) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == bool(message)
    assert all(line.startswith("warning: iteration 1: ") and message in line for line in warnings)
    agreement = [row["check_agreement"] for row in read_log(tmp_path / "ppo/log.csv")]
    if "--check_model" in more:  # with itself
        assert all(abs(float(value) - 1) < 1e-5 for value in agreement)
    else:
        assert not any(agreement)


def test_pretraining_sequences_start_at_documents(tiny: Tiny, tmp_path: Path) -> None:
    """One at each document's start, one every 4 tokens in a longer one, none past the end."""
    documents = ["red is a colour", "blue", "the house is white"]
    write_documents(tmp_path / "p.txt", documents)
    stream, starts = train_ppo.load_pretraining(str(tmp_path / "p.txt"), tiny.encoding, 4)
    end, begin, expected = tiny.encoding.eot_token, 0, []
    for document in documents:
        tokens = [*tiny.encoding.encode_ordinary(document), end]
        assert stream[begin : begin + len(tokens)].tolist() == tokens
        expected += range(begin, begin + len(tokens), 4)
        begin += len(tokens)
    assert len(stream) == begin
    assert starts.tolist() == [start for start in expected if start + 4 <= begin]
    with pytest.raises(BadInput, match=f"{begin} tokens, fewer than --ptx_tokens 100"):
        train_ppo.load_pretraining(str(tmp_path / "p.txt"), tiny.encoding, 100)


def test_pretraining_is_drawn_by_length() -> None:
    """A start as often as there is text up to the next: else short documents would be too many;
    and the share that is cut anywhere begins at any place as often as at another."""
    stream, starts = torch.arange(100), torch.tensor([0, 10, 14, 44, 74])
    rng = np.random.default_rng(0)
    flags = ["--batch_size", "8", "--ptx_tokens", "4", "--ptx_anywhere"]
    drawn = train_ppo.draw_pretraining(
        stream, starts, 30_000, 0, train_ppo.get_args([*flags, "0"]), rng
    )
    assert drawn.shape == (30_000, 4) and (drawn.diff(dim=1) == 1).all()
    shares = [(drawn[:, 0] == start).float().mean().item() for start in starts]
    # Places are drawn up to the last start, which stands for itself alone.
    by_length = np.array([10, 4, 30, 30, 1]) / 75
    assert np.abs(np.array(shares) - by_length).max() < 0.01

    drawn = train_ppo.draw_pretraining(
        stream, starts, 30_000, 0, train_ppo.get_args([*flags, "0.25"]), rng
    )
    assert drawn.shape == (30_000, 4) and (drawn.diff(dim=1) == 1).all()
    shares = drawn[:, 0].bincount(minlength=75).double().numpy() / 30_000
    expected = np.full(75, 0.25 / 75)
    expected[starts.numpy()] += 0.75 * by_length
    assert np.abs(shares - expected).max() < 0.01
    assert abs(shares[np.setdiff1d(np.arange(75), starts)].sum() - 0.25 * 70 / 75) < 0.01


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(2, 0.25, [0, 1, 1, 0] * 2), (8, 0.25, [2] * 8), (1, 1.0, [1] * 8), (3, 0.0, [0] * 8)],
)
def test_the_share_cut_anywhere_is_carried_over(
    count: int, share: float, expected: list[int]
) -> None:
    """Two sequences an update, a quarter anywhere: one in every second update, not none at all."""
    stream, starts = torch.arange(100_000), torch.tensor([0, 99_000])  # a middle is seldom a start
    args = train_ppo.get_args(["--ptx_tokens", "4", "--ptx_anywhere", str(share)])
    rng, found = np.random.default_rng(0), []
    for number in range(8):
        drawn = train_ppo.draw_pretraining(stream, starts, count, number, args, rng)
        found.append(int((~torch.isin(drawn[:, 0], starts)).sum()))
    assert found == expected


def test_updates_are_numbered_over_the_whole_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over a resume: 2 iterations of 2 minibatches and 2 inner epochs, then a third."""
    numbers, original = [], train_ppo.draw_pretraining

    def look(stream, starts, count, number, *rest):
        numbers.append(number)
        return original(stream, starts, count, number, *rest)

    monkeypatch.setattr(train_ppo, "draw_pretraining", look)
    args = tiny.args("ppo", tmp_path, "--inner_epochs", "2")
    assert train_ppo.main([*args, "--max_steps", "2"]) == 0
    more = ["--max_steps", "3", "--resume_changed", "--print_samples", "0"]
    assert train_ppo.main([*args, *more]) == 0
    assert numbers == list(range(12))


def test_what_only_prints_or_warns_may_change_at_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    args = tiny.args("ppo", tmp_path, "--max_steps", "1")
    assert train_ppo.main(args) == 0
    flags = ["--print_samples", "0", "--kl_limit", "3", "--agreement_limit", "0.1"]
    assert train_ppo.main([*args, *flags, "--resume"]) == 0


def test_rows_of_a_minibatch_are_sorted_by_length(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that micro-batches hold little padding; each row still stands with its own lengths."""
    seen = []

    def look(tokens, lengths, prompt_lengths, *rest):
        end = tiny.encoding.eot_token
        for row, length, first in zip(tokens, lengths, prompt_lengths, strict=True):
            assert 0 < first < length and end not in row[first : length - 1].tolist()
            assert (row[length:] == end).all()
        seen.append(lengths.tolist())
        return original(tokens, lengths, prompt_lengths, *rest)

    original = train_ppo.score
    monkeypatch.setattr(train_ppo, "score", look)
    assert main(tiny.args("ppo", tmp_path / "ppo", "--max_steps", "2", "--eval_every", "0")) == 0
    rollouts = seen[:2] + seen[2:4]
    assert all(lengths == sorted(lengths) for lengths in rollouts)
    assert any(len(set(lengths)) > 1 for lengths in rollouts)
