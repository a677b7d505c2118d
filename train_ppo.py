"""Step 3: reinforcement learning against the reward model: PPO and PPO-ptx (section 3.5, C.4).

The objective (Eq. 2) is, over responses y to customer prompts x and pretraining text z,

    E[ r(x, y) - kl_coef log(pi(y | x) / pi_ref(y | x)) ]  +  ptx_coef E[ log pi(z) ]

PPO has ptx_coef 0; with ptx_coef > 0 it is PPO-ptx, the model the paper calls InstructGPT. A step
of this script, the paper's iteration, draws prompts, samples responses to each, scores each once,
charges the KL term token by token, and makes a pass of clipped updates over random minibatches.

Four models: the policy pi starts from --init, which the paper calls the RL start (C.3); the
reference pi_ref, frozen, is the start unless --reference names another; the reward model, frozen;
the value network, a copy of the reward model with an optimizer of its own. The result is the
exponential moving average of the policy's weights. Prompts differ in score more than models do, so
watch the gain: the score minus the start's on the same prompts, from the same random numbers.

Every per-token quantity is (B, T) and indexed by the token it is about. For the row
"p0 p1 | r2 r3 end" (two prompt tokens, a response of three with its end token, then padding; the
row's length is 5):

    t            0   1   2      3      4           5
    tokens       p0  p1  r2     r3     end         (end)
    mask         0   0   1      1      1           0
    logprobs     0   0   l2     l3     l4          0   log pi(tokens[t] | tokens[:t]), from t - 1
    values       0   0   V2     V3     V4          0   before tokens[t]: the scalar output at t - 1
    rewards      0   0   -c2    -c3    -c4+score   0   c = kl_coef log(pi / pi_ref)
    advantages   0   0   A2     A3     A4          0   whitened after the returns are taken
    returns      0   0   A2+V2  A3+V3  A4+V4       0   what the value network learns

From the paper: sampling at temperature 1, no discount, clip 0.2, one pass over the minibatches,
constant learning rates after a warm-up from a tenth, an average of the weights, pretraining
gradients added before the same optimizer step, a value network that starts as the reward model.
Where the paper is silent, as in Ziegler et al. 2019 and Stiennon et al. 2020: lambda 0.95,
advantages whitened over response tokens, clipped value loss, no entropy bonus, a fixed low score
for a response without end token. Gradient clip 1 as in GPT-3.
Chosen for the tiny models here: rates, sizes, kl_coef, ptx_coef (of a *mean* token loss; the
paper's 27.8 belongs to another scale), warm-up and average. The help has the paper's values.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import dataclass

from data.commands import run_command
from data.files import BadInput, read_documents, read_jsonl
from data.flags import fraction, natural, nonnegative, number, ratio, whole
from data.tokenizer import decode_response, encode_prompt

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from checkpoint import read_tokenizer
from model import GPT, MISSING_EOS_SCORE, ScalarModel, pad_right
from run import Run, check_context, parse, parser

# ------------------------------------------------------------------------------------------------
# Arguments


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, out="out/ppo", save_every=20)
    add = flags.add_argument
    add("--data", default="out/data/train/ppo_prompts.jsonl", help="prompts.jsonl of customers")
    add("--val_data", help="prompts.jsonl to validate the averaged weights on")
    add("--pretrain_data", help="pretrain.txt; needed with --ptx_coef over 0")
    add("--init", default="out/init", help="checkpoint folder: the policy's start")
    add("--reference", help="checkpoint folder that the KL is measured from; default: --init")
    add("--reward_model", default="out/rm", help="checkpoint folder of train_rm.py")
    # The objective.
    add("--kl_coef", type=nonnegative, default=0.2, help="price of the KL (paper's beta: 0.02)")
    add("--ptx_coef", type=nonnegative, default=0.0, help="0: PPO (paper's gamma: 27.8)")
    add("--ptx_ratio", type=ratio, default=0.125, help="text sequences an episode (paper: 8)")
    add("--ptx_tokens", type=natural, default=128, help="tokens of such a sequence (paper: 2048)")
    add("--ptx_anywhere", type=fraction, default=0.25, help="share cut anywhere (paper: 1)")
    add("--missing_eos_score", type=number, default=MISSING_EOS_SCORE, help="without end token")
    add("--gamma", type=fraction, default=1.0, help="discount (paper: none)")
    add("--lam", type=fraction, default=0.95, help="lambda of GAE (not in the paper)")
    add("--cliprange", type=nonnegative, default=0.2, help="of the policy's ratio (paper: 0.2)")
    add("--cliprange_value", type=nonnegative, default=0.2, help="of the value (Ziegler: 0.2)")
    # Optimisation.
    add("--max_steps", type=natural, default=50, help="iterations (paper: 500)")
    add("--batch_size", type=natural, default=512, help="episodes an iteration (paper: 512)")
    add("--responses_per_prompt", type=natural, default=4, help="episodes a prompt (paper: 1)")
    add("--num_minibatches", type=natural, default=4, help="updates an iteration (paper: 8)")
    add("--micro_batch_size", type=whole, default=8, help="sequences a forward pass; 0: all")
    add("--rollout_size", type=whole, default=0, help="responses sampled at once; 0: all")
    add("--inner_epochs", type=natural, default=1, help="passes over an iteration (paper: 1)")
    add("--lr", type=nonnegative, default=8e-4, help="of the policy (paper: 2.55e-6 to 2.55e-5)")
    add("--value_lr", type=nonnegative, default=7e-4, help="of the value network (paper: 9e-6)")
    add("--warmup_steps", type=whole, default=2, help="iterations from a tenth of lr (paper: 10)")
    add("--grad_clip", type=nonnegative, default=1.0, help="limit of each gradient's norm; 0: none")
    add("--ema", type=fraction, default=0.95, help="decay of the average (paper: 0.992)")
    add("--eval_every", type=whole, default=10, help="steps between validations; 0: at the end")
    add("--keep_every", type=whole, default=0, help="steps between models kept in OUT/steps/")
    add("--print_samples", type=whole, default=2, help="samples shown at each validation")
    args = parse(flags, argv)
    args.reference = args.reference or args.init
    multiple = args.num_minibatches * args.responses_per_prompt
    if args.batch_size % multiple:
        what = f"--num_minibatches times --responses_per_prompt, {multiple}: change one"
        flags.error(f"--batch_size {args.batch_size} is not a multiple of {what}")
    minibatch_size = args.batch_size // args.num_minibatches
    if args.ptx_coef:
        if not args.pretrain_data:
            flags.error("--ptx_coef over 0 needs --pretrain_data")
        if args.ptx_tokens < 2:
            flags.error(f"--ptx_tokens {args.ptx_tokens}: expected at least 2")
        if round(args.ptx_ratio * minibatch_size) < 1:
            flags.error(f"--ptx_ratio {args.ptx_ratio}: gives no sequence to an update; raise it")
    else:
        args.pretrain_data = None
    args.micro_batch_size = args.micro_batch_size or minibatch_size
    return args


# ------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    torch.manual_seed(args.seed)
    policy, reference, reward_model, encoding = load_models(args)
    value_network = copy.deepcopy(reward_model)  # starts as the reward model, then learns
    ema = copy.deepcopy(policy).requires_grad_(False)
    start, reward_model = policy.frozen(), reward_model.frozen()
    reference = start if reference is policy else reference.frozen()
    four_models = policy, reference, reward_model, value_network

    # Data: customers' prompts, and pretraining text.
    max_tokens = args.max_prompt_tokens
    prompts = load_prompts(args.data, encoding, max_tokens)
    val_prompts = load_prompts(args.val_data, encoding, max_tokens) if args.val_data else []
    text = load_text(args.pretrain_data, encoding, args.ptx_tokens) if args.ptx_coef else None
    num_ptx = round(args.ptx_ratio * (args.batch_size // args.num_minibatches))  # an update

    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
    adam = torch.optim.AdamW(policy.parameters(), **options)
    value_adam = torch.optim.AdamW(value_network.parameters(), **options)
    state = {"policy": policy, "value_network": value_network, "ema": ema}
    state |= {"adam": adam, "value_adam": value_adam}
    shows = "score_gain score kl reward entropy response_len policy_loss value_loss ptx_loss "
    shows += "approx_kl clipfrac explained_variance val_gain val_gain_ci val_score val_kl"
    run = Run(args, "ppo", result=ema, tokenizer=args.init, state=state, shows=shows)
    in_validation = reference, reward_model, val_prompts, encoding, args
    of_start = evaluate(start, None, *in_validation) if val_prompts else {}

    for step in run.steps(args.max_steps):
        if step == 1 and of_start:
            run.log_start(of_start)  # row 0 of the log
        rng = np.random.default_rng([args.seed, 1, step])  # of minibatches and pretraining text
        warm_up = learning_rate_factor(step, args.warmup_steps)
        for optimizer, lr in ((adam, args.lr), (value_adam, args.value_lr)):
            for group in optimizer.param_groups:
                group["lr"] = warm_up * lr

        # 1. Rollout: responses to this step's prompts.
        batch = prompts_of_step(prompts, step, args)
        seed = args.seed * 1_000_003 + step
        tokens, prompt_lengths, lengths = sample(policy, batch, seed, args)
        run.lap("rollout_s", int((lengths - prompt_lengths).sum()))

        # 2. Score. Minibatches are drawn first and cut into micro-batches: old log-probs are
        #    computed on the tensors of the update, so in the first one the ratio is exactly 1.
        minibatches = []
        for micro_batches in draw_minibatches(lengths, rng, args):
            minibatches.append([])
            for rows in micro_batches:
                responses = tokens[rows], prompt_lengths[rows], lengths[rows]
                minibatches[-1].append(make_episodes(*responses, *four_models, args))
        episodes = [e for minibatch in minibatches for e in minibatch]
        whiten(episodes)  # after the returns, which keep the scale of the scores
        run.lap("score_s")

        # For the log: the gain over the start, which answers some prompts (an eighth of the
        # episodes, one of each prompt) from the same random numbers.
        R = args.responses_per_prompt
        few = slice(0, (args.batch_size + 7) // 8 * R, R)
        theirs, _, their_lengths = sample(start, batch, seed, args, few)
        how = args.missing_eos_score, args.micro_batch_size
        ours, _, _ = reward_model.response_scores(tokens[few], lengths[few], *how)
        theirs, _, _ = reward_model.response_scores(theirs, their_lengths, *how)
        run.mean({"score_gain": ours - theirs})
        run.lap("gain_s")

        # 3. Update: one optimizer step a minibatch.
        num_updates = args.inner_epochs * len(minibatches)
        for minibatch in args.inner_epochs * minibatches:
            count = sum(e.mask.sum() for e in minibatch)  # response tokens
            for e in minibatch:
                # The policy: old log-probs and advantages stay, its log-probs move.
                logprobs, _ = policy.logprobs(e.tokens, e.lengths, mask=e.mask)
                loss, metrics = policy_loss(logprobs, e, args.cliprange)
                (loss / count).backward()
                # The value network, towards the returns.
                values = values_before(value_network, e.tokens, e.lengths)
                v_loss, num_clipped = value_loss(values, e, args.cliprange_value)
                (v_loss / count).backward()
                run.max({"ratio_max": metrics.pop("ratio_max")})
                metrics |= {"policy_loss": loss, "value_loss": v_loss, "vf_clipfrac": num_clipped}
                run.add(metrics, 1 / (count * num_updates))  # sums -> means a token, then an update
            if text:  # the ptx term: into the policy's same gradients, before the same step (C.4)
                drawn = draw_text(*text, num_ptx, args.ptx_anywhere, rng).to(args.device)
                for sequences in drawn.split(args.micro_batch_size):
                    nll = -policy.logprobs(sequences)[0].sum()
                    ptx_loss = nll / (drawn.numel() - len(drawn))  # a first token has no context
                    (args.ptx_coef * ptx_loss).backward()
                    run.add({"ptx_loss": ptx_loss}, 1 / num_updates)
            # One step of each; the policy's clip acts on the sum of its two gradients.
            limit = args.grad_clip or math.inf
            norm = clip_grad_norm_(policy.parameters(), limit)
            value_norm = clip_grad_norm_(value_network.parameters(), limit)
            run.add({"grad_norm": norm, "value_grad_norm": value_norm}, 1 / num_updates)
            for optimizer in (adam, value_adam):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            update_ema(ema, policy, args.ema)
        run.lap("update_s")

        row = {"episodes": step * args.batch_size, "lr": warm_up * args.lr}
        row |= rollout_metrics(episodes)
        if val_prompts and run.due(args.eval_every):
            run.mean(evaluate(ema, of_start["val_score"], *in_validation))
        if args.keep_every and step % args.keep_every == 0:
            run.keep(f"steps/{step:05}")
        run.log(row)
    return run.finish(reference=args.reference)


# ------------------------------------------------------------------------------------------------
# Models


def load_models(args: argparse.Namespace) -> tuple[GPT, GPT, ScalarModel, tiktoken.Encoding]:
    """The policy's start, the KL's reference (by default the same object), the reward model; and
    their tokenizer.

    No dropout anywhere in RL: it would make old and new log-probs differ.
    """
    options = {"impl": args.kernels, "dtype": args.dtype}
    policy = reference = GPT.from_pretrained(args.init, **options)
    if args.reference != args.init:
        reference = GPT.from_pretrained(args.reference, **options)
    reward_model = ScalarModel.from_pretrained(args.reward_model, **options)
    models = policy, reference, reward_model
    for folder in (args.reference, args.reward_model):
        encoding = read_tokenizer(args.init, *models, same_as=folder)
    check_context(args, *models)
    if args.ptx_coef and args.ptx_tokens > policy.config.n_positions:
        raise BadInput(
            f"--ptx_tokens {args.ptx_tokens} is over the policy's context of "
            f"{policy.config.n_positions}; lower it"
        )
    for trunk in (policy, reference, reward_model.trunk):
        trunk.gradient_checkpointing = args.grad_checkpointing
        trunk.packs = args.responses_per_prompt > 1  # see `Packing`
    return *(model.to(args.device).eval() for model in models), encoding


# ------------------------------------------------------------------------------------------------
# Data


def load_prompts(path: str, encoding: tiktoken.Encoding, max_tokens: int) -> list[list[int]]:
    """Prompts as tokens; drops those of more than `max_tokens`, and says how many."""
    every = [encode_prompt(encoding, record["prompt"]) for record in read_jsonl(path, "prompts")]
    prompts = [prompt for prompt in every if len(prompt) <= max_tokens]
    dropped = len(every) - len(prompts)
    print(f"{path}: {len(prompts)} prompts; dropped {dropped} over {max_tokens} tokens")
    if not prompts:
        raise BadInput(f"{path}: no prompt is within --max_prompt_tokens {max_tokens}")
    return prompts


def load_text(path: str, encoding: tiktoken.Encoding, length: int) -> tuple[Tensor, Tensor]:
    """All sequences of `length` tokens of a text, documents joined by the end token, (M, length);
    and the numbers of those that start a document, (N,).

    In a long document also those every `length` tokens; a sequence runs on into the next document.
    The sequences are views: they take no memory.
    """
    stream: list[int] = []
    starts: list[int] = []
    for document in read_documents(path):
        tokens = [*encoding.encode_ordinary(document), encoding.eot_token]
        starts += range(len(stream), len(stream) + len(tokens), length)
        stream += tokens
    if len(stream) < length:
        raise BadInput(f"{path}: {len(stream)} tokens, fewer than --ptx_tokens {length}")
    sequences = torch.tensor(stream).unfold(0, length, 1)
    return sequences, torch.tensor([start for start in starts if start < len(sequences)])


# ------------------------------------------------------------------------------------------------
# Rollout


def learning_rate_factor(step: int, warmup_steps: int) -> float:
    """Of step 1, 2, ...: from a tenth to 1 over the warm-up, then constant (C.4)."""
    return min(1.0, 0.1 + 0.9 * (step - 1) / warmup_steps) if warmup_steps else 1.0


def prompts_of_step(
    prompts: list[list[int]], step: int, args: argparse.Namespace
) -> list[list[int]]:
    """Prompts of `step` = 1, 2, ...: shuffled passes, a function of (seed, step). Each
    comes --responses_per_prompt times, one after the other."""
    count = args.batch_size // args.responses_per_prompt
    chosen = []
    for place in range((step - 1) * count, step * count):
        epoch, offset = divmod(place, len(prompts))
        if not chosen or offset == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[order[offset]])
    return [prompt for prompt in chosen for _ in range(args.responses_per_prompt)]


def sample(
    model: GPT, prompts: list[list[int]], seed: int, args: argparse.Namespace, rows=slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """A response to each prompt: tokens (B, T), prompt_lengths (B,), and lengths (B,), which count
    prompt, response and end token. Of some `rows` alone, with their share of the random numbers."""
    shape, generator = (len(prompts), args.max_new_tokens), torch.Generator(args.device)
    uniforms = torch.rand(shape, generator=generator.manual_seed(seed), device=args.device)[rows]
    padded, lengths = pad_right(prompts, model.config.eos_token_id, args.device)
    how = {"uniforms": uniforms, "at_once": args.rollout_size}
    tokens, ends = model.generate(padded[rows], lengths[rows], args.max_new_tokens, **how)
    return tokens, lengths[rows], ends


def draw_minibatches(
    lengths: Tensor, rng: np.random.Generator, args: argparse.Namespace
) -> list[tuple[Tensor, ...]]:
    """A step's minibatches, each a tuple of micro-batches: the numbers of their rows.

    A minibatch has random prompts. Within it, those whose rows are of similar length are
    neighbours, so a micro-batch has little padding. The responses to a prompt stay together.
    """
    R = args.responses_per_prompt
    micro_batch_size = max(R, args.micro_batch_size // R * R)
    longest = lengths.view(-1, R).amax(dim=1)  # (prompts,): prompt and its longest response
    order = torch.from_numpy(rng.permutation(len(longest))).to(lengths.device)
    minibatches = []
    for prompts in order.split(args.batch_size // args.num_minibatches // R):
        prompts = prompts[longest[prompts].argsort(stable=True)]
        rows = (prompts[:, None] * R + torch.arange(R, device=lengths.device)).flatten()
        minibatches.append(rows.split(micro_batch_size))
    return minibatches


# ------------------------------------------------------------------------------------------------
# Score


@dataclass
class Episodes:
    """A micro-batch of B responses, and what the update takes as given: (B, T) each, but `lengths`,
    `scores` and `ended`, which are (B,). Responses to a prompt are neighbours."""

    tokens: Tensor
    lengths: Tensor
    mask: Tensor  # response_mask
    logprobs: Tensor  # of the policy that sampled
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    ended: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def make_episodes(
    tokens: Tensor,
    prompt_lengths: Tensor,
    lengths: Tensor,
    policy: GPT,
    reference: GPT,
    reward_model: ScalarModel,
    value_network: ScalarModel,
    args: argparse.Namespace,
) -> Episodes:
    """Score responses and turn the scores into advantages.

    Sampling uses a cache and rounds differently. So the policy's log-probs are recomputed here by
    the forward pass of the update, on the same tensors: the first update's ratio is exactly 1.
    """
    tokens = tokens[:, : int(lengths.max())]
    mask = response_mask(tokens, prompt_lengths, lengths)
    logprobs, entropy = policy.logprobs(tokens, lengths, mask=mask)
    ref_logprobs, _ = reference.logprobs(tokens, lengths, mask=mask)
    scores, _, ended = reward_model.response_scores(tokens, lengths, args.missing_eos_score)
    values = values_before(value_network, tokens, lengths) * mask
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, lengths, args.kl_coef)
    advantages = gae(rewards, values, mask, args.gamma, args.lam)
    fixed = tokens, lengths, mask, logprobs, ref_logprobs, entropy, values, scores, ended
    return Episodes(*fixed, rewards, advantages, returns=advantages + values)


def response_mask(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """1 for response tokens, the first end token included: (B, T) bool."""
    t = torch.arange(tokens.shape[1], device=tokens.device)
    return (t >= prompt_lengths[:, None]) & (t < lengths[:, None])


def values_before(value_network: ScalarModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """V of the state before each token: values[:, t] is the scalar output at t - 1; 0 at t = 0."""
    return F.pad(value_network(tokens, lengths)[:, :-1], (1, 0))


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    lengths: Tensor,
    kl_coef: float,
) -> Tensor:
    """Per-token rewards (Eq. 2): -kl_coef log(pi / pi_ref) of each response token, end token
    included, and the response's score on the last of them. Returns (B, T)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, lengths.long() - 1] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), 0 outside the response:

        delta_t = r_t + gamma V_{t+1} - V_t,     A_t = delta_t + gamma lam A_{t+1}

    with V = A = 0 after a row's last response token: the episode is over there.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(inside, delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(inside, values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages


def whiten(episodes: list[Episodes]) -> None:
    """Give the advantages of the step's response tokens mean 0 and standard deviation 1."""
    everything = torch.cat([e.advantages[e.mask] for e in episodes])
    mean, std = everything.mean(), everything.std(correction=0)
    for e in episodes:
        e.advantages = (e.advantages - mean) / (std + 1e-8) * e.mask


# ------------------------------------------------------------------------------------------------
# Update


def policy_loss(
    logprobs: Tensor, e: Episodes, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (Schulman et al. 2017), summed over response tokens:

        -min(ratio A, clip(ratio, 1 - cliprange, 1 + cliprange) A),   ratio = pi / pi_old

    and for the log sums over the same tokens, and the largest ratio.
    """
    log_ratio = torch.where(e.mask, logprobs - e.logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = -torch.min(ratio * e.advantages, clipped * e.advantages) * e.mask
    with torch.no_grad():
        metrics = {
            "approx_kl": ((ratio - 1 - log_ratio) * e.mask).sum(),  # k3: KL(old || new), in nats
            "clipfrac": (((ratio - 1).abs() > cliprange) & e.mask).float().sum(),
            "ratio_max": ratio.max(),
        }
    return loss.sum(), metrics


def value_loss(values: Tensor, e: Episodes, cliprange_value: float) -> tuple[Tensor, Tensor]:
    """Half the squared error against the returns, the larger of plain and clipped (Ziegler et al.
    2019), summed over response tokens; and the number of tokens where the clipped one is larger."""
    clipped = e.values + (values - e.values).clamp(-cliprange_value, cliprange_value)
    plain_error, clipped_error = (values - e.returns) ** 2, (clipped - e.returns) ** 2
    loss = 0.5 * (torch.max(plain_error, clipped_error) * e.mask).sum()
    return loss, ((clipped_error > plain_error) & e.mask).float().sum()


def draw_text(
    sequences: Tensor, starts: Tensor, count: int, share: float, rng: np.random.Generator
) -> Tensor:
    """Pretraining sequences (count, ptx_tokens), each with probability `share` cut anywhere.

    The rest start at one of `starts`, the last before a random token: long documents are drawn more
    often. Prompts are at a sequence's start, so PPO changes the model most there, and documents
    must start there too, so that ptx protects those positions. But with these sequences alone the
    model forgets how to continue from the middle of a text.
    """
    anywhere = torch.from_numpy(rng.integers(len(sequences), size=count))
    beginnings = starts[torch.searchsorted(starts, anywhere, right=True) - 1]
    cut_anywhere = torch.from_numpy(rng.random(count) < share)
    return sequences[torch.where(cut_anywhere, anywhere, beginnings)]


@torch.no_grad()
def update_ema(ema: GPT, policy: GPT, decay: float) -> None:
    """ema <- decay ema + (1 - decay) policy."""
    for average, parameter in zip(ema.parameters(), policy.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


# ------------------------------------------------------------------------------------------------
# Evaluation


def rollout_metrics(episodes: list[Episodes]) -> dict[str, float]:
    """Score, KL (nats) and reward a response; entropy (nats) and explained variance over tokens.
    Advantages are whitened by now; before that they were returns - values."""
    scores = torch.cat([e.scores for e in episodes])
    kl = torch.cat([(e.logprobs - e.ref_logprobs).sum(1) for e in episodes])
    reward = torch.cat([e.rewards.sum(1) for e in episodes])
    returns = torch.cat([e.returns[e.mask] for e in episodes])
    unexplained = returns - torch.cat([e.values[e.mask] for e in episodes])
    variance = returns.var(correction=0).clamp(min=1e-8)
    metrics = {
        "score": scores.mean(),
        "score_std": scores.std(correction=0),
        "kl": kl.mean(),
        "reward": reward.mean(),
        "entropy": torch.cat([e.entropy[e.mask] for e in episodes]).mean(),
        "response_len": torch.cat([e.mask.sum(1) for e in episodes]).float().mean(),
        "eos_frac": torch.cat([e.ended for e in episodes]).float().mean(),
        "explained_variance": 1 - unexplained.var(correction=0) / variance,
    }
    return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def evaluate(
    model: GPT,
    start_scores: Tensor | None,
    reference: GPT,
    reward_model: ScalarModel,
    prompts: list[list[int]],
    encoding: tiktoken.Encoding,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """Of a response of `model` to each validation prompt: score, gain over the start's score (None:
    this is the start), log(pi / pi_ref), (N,) each. Prints a few.

    The random numbers are the same each time, so that differences are the model's; each batch of
    prompts has its own.
    """
    scores, kl = [], []
    for first in range(0, len(prompts), args.batch_size):
        part = prompts[first : first + args.batch_size]
        seed = int(np.random.default_rng([args.seed, 2, first]).integers(2**62))
        tokens, prompt_lengths, lengths = sample(model, part, seed, args)
        for rows in torch.arange(len(part)).split(args.micro_batch_size):
            y, n = tokens[rows, : int(lengths[rows].max())], lengths[rows]
            mask = response_mask(y, prompt_lengths[rows], n)
            logprobs, _ = model.logprobs(y, n, mask=mask)
            ref_logprobs, _ = reference.logprobs(y, n, mask=mask)
            kl.append((logprobs - ref_logprobs).sum(1))
            scores.append(reward_model.response_scores(y, n, args.missing_eos_score)[0])
        for row in range(min(len(part), args.print_samples) if first == 0 else 0):
            response = tokens[row, prompt_lengths[row] : lengths[row]].tolist()
            answer = decode_response(encoding, response)
            print(f"    {encoding.decode(part[row]).strip()!r} -> {answer!r}", flush=True)
    scores = torch.cat(scores)
    gains = scores - (scores if start_scores is None else start_scores)
    return {"val_gain": gains, "val_score": scores, "val_kl": torch.cat(kl)}


if __name__ == "__main__":
    sys.exit(run_command(main, "--micro_batch_size"))
