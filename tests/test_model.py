"""model.py against an independent GPT-2, naive loops and float64; each check seen to fail on bugs.

The properties that a silent bug would break are written as `check_...` functions. Each is run on
the code as it is, and again on the planted bugs in `BUGS` below, where it must fail.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
import generate
import kernels
import model as model_file
from checkpoint import save_model
from data.files import BadInput
from generate import KVCache
from model import GPT, Block, GPTConfig, Packing, ScalarModel, pad_right
from tests.tiny import Tiny

GPT2_TINY = Path(__file__).parent / "data" / "gpt2_tiny"  # made by tests/data/make_gpt2_tiny.py
END = 40  # end token of the small models below


def make_gpt(std: float = 0.3, end: float = 0, score_mod: str = "causal", **shape: int) -> GPT:
    """A small random model whose logits are far from uniform, so that mistakes show; `end` is
    added to the end token's."""
    shape = {"vocab_size": 41, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2} | shape
    model = GPT(GPTConfig(**shape, eos_token_id=END, score_mod=score_mod)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "ln_" in name and "weight" in name else 0.0, std)
    model.ln_f.bias.data += end * model.wte.weight[END].detach() / model.wte.weight[END].norm() ** 2
    return model


def make_prompts(lengths: tuple[int, ...] = (3, 7, 1, 5, 7, 2)) -> tuple[Tensor, Tensor]:
    prompts = [torch.randint(END, (length,)).tolist() for length in lengths]
    return pad_right(prompts, END, torch.device("cpu"))


def naive_logprobs(model: GPT, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """In float64, of one row (T,): log-probs and entropies of its tokens, 0 at t = 0."""
    logits = (model(tokens[None])[0] @ model.wte.weight.T).double() / temperature
    logp = logits[:-1].log_softmax(-1)  # (T - 1, V)
    chosen = logp.gather(1, tokens[1:, None]).squeeze(1)
    return F.pad(chosen, (1, 0)), F.pad(-(logp.exp() * logp).sum(-1), (1, 0))


# ------------------------------------------------------------------------------------------------
# The network


def check_gpt2_parity() -> None:
    """Logits equal those that the transformers library computed, to 1e-4."""
    reference = load_file(GPT2_TINY / "reference.safetensors")
    model = GPT.from_pretrained(GPT2_TINY).eval()
    with torch.no_grad():
        logits = model(reference["tokens"]) @ model.unembedding.T
    assert reference["logits"].std() > 1  # an error of 1e-4 is small beside that
    assert (logits - reference["logits"]).abs().max() < 1e-4


def check_cached_forward(score_mod: str = "causal") -> None:
    """Token by token over a cache gives the hidden states of one full forward, ragged rows too."""
    model = make_gpt(score_mod=score_mod, n_positions=96)
    tokens, lengths = torch.randint(END, (3, 80)), torch.tensor([74, 2, 61], dtype=torch.int32)
    with torch.no_grad():
        cache = KVCache(model.config, 3, 80, model.unembedding)
        model(tokens[:, :74], lengths, cache)
        for step in range(6):
            positions = lengths.long() + step
            new = tokens[torch.arange(3), positions]
            x = model.wte(new) + model.wpe(positions)
            for block in model.h:
                x = block.step(x, positions, cache)
            full = model(tokens)[torch.arange(3), positions]
            assert (model.ln_f(x) - full).abs().max() < 1e-4


def check_greedy() -> None:
    """Temperature 0 equals growing each row alone, without cache, by the likeliest token."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = make_gpt()
        prompts, lengths = make_prompts()
        tokens, new_lengths = model.generate(prompts, lengths, 12, temperature=0)
        assert len(set(new_lengths.tolist())) > 2  # rows end at different times
        for row, length in enumerate(lengths.tolist()):
            grown = prompts[row, :length]
            for _ in range(12):
                with torch.no_grad():
                    logits = model(grown[None])[0, -1] @ model.unembedding.T
                grown = torch.cat([grown, logits.argmax()[None]])
                if grown[-1] == END:
                    break
            assert tokens[row].tolist() == grown.tolist() + [END] * (19 - len(grown))
            assert new_lengths[row] == len(grown)


def check_sampling_distribution() -> None:
    """First sampled tokens follow softmax(logits / temperature): chi-square on 6 tokens."""
    model = make_gpt(std=0.15, vocab_size=41)
    model.wte.weight.data[6:] = 0  # only 0..5, and all the others together, are told apart
    prompt = torch.tensor([[3, 1, 4]])
    logits = (model(prompt)[0, -1] @ model.unembedding.T).detach().double()
    for temperature in (1.0, 0.5):
        tokens, _ = model.generate(
            prompt.expand(20_000, -1), torch.full((20_000,), 3), 1, temperature=temperature
        )
        p = (logits / temperature).softmax(-1)
        expected = 20_000 * torch.cat([p[:6], p[6:].sum()[None]])
        observed = tokens[:, 3].clamp(max=6).bincount(minlength=7).double()
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert expected.min() > 20
        assert chi_square < 38.3  # 6 degrees of freedom: one run in a million is above


def check_rows_are_independent() -> None:
    """A row's sample is the same whatever the other rows are and whenever they end."""
    model = make_gpt(end=4)
    prompts, lengths = make_prompts((3, 7, 1, 5, 7, 2, 4, 4))
    generator = torch.Generator()
    tokens, ends = model.generate(prompts, lengths, 10, generator=generator.manual_seed(5))
    assert len(set((ends - lengths).tolist())) > 3  # rows end at different times
    other, other_lengths = prompts.clone(), lengths.clone()
    other[::2], other_lengths[::2] = torch.randint(END, other[::2].shape), 2
    again, _ = model.generate(other, other_lengths, 10, generator=generator.manual_seed(5))
    assert torch.equal(tokens[1::2], again[1::2])
    assert not torch.equal(tokens[::2], again[::2])
    alone, _ = model.generate(prompts[:2], lengths[:2], 10, generator=generator.manual_seed(5))
    assert torch.equal(tokens[:2], alone)


def check_padding() -> None:
    """What stands behind a row's end, and how much of it, changes nothing."""
    model, scalar = make_gpt(), ScalarModel.from_gpt(make_gpt()).eval()
    tokens, lengths = make_prompts((9, 4, 12, 1))
    outside = torch.arange(12) >= lengths[:, None]
    for other in (torch.randint(41, (4, 12)), torch.full((4, 12), END), torch.zeros(4, 12).long()):
        changed = torch.where(outside, other, tokens)
        for mask in (None, ~outside):
            for ours, theirs in zip(
                model.logprobs(tokens, lengths, mask=mask),
                model.logprobs(changed, lengths, mask=mask),
                strict=True,
            ):
                assert torch.equal(ours, theirs)
                assert not ours[outside].any()
        assert torch.equal(scalar.scores(tokens, lengths), scalar.scores(changed, lengths))
        sampled = model.generate(tokens, lengths, 6, generator=torch.Generator().manual_seed(1))
        resampled = model.generate(changed, lengths, 6, generator=torch.Generator().manual_seed(1))
        assert torch.equal(sampled[0], resampled[0])
    wide = F.pad(tokens, (0, 10), value=3)  # no row reaches the new columns
    resampled = model.generate(wide, lengths, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(F.pad(sampled[0], (0, 10), value=END), resampled[0])


def check_batch_composition() -> None:
    """A row alone and the same row among longer ones: equal to 1e-5."""
    model, scalar = make_gpt(std=0.1), ScalarModel.from_gpt(make_gpt(std=0.1)).eval()
    tokens, lengths = make_prompts((9, 4, 20, 1, 20))
    together, _ = model.logprobs(tokens, lengths)
    scores = scalar.scores(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model.logprobs(tokens[row : row + 1, :length])
        assert (alone[0] - together[row, :length]).abs().max() < 1e-5
        score = scalar.scores(tokens[row : row + 1, :length], lengths[row : row + 1])
        assert (score - scores[row]).abs().max() < 1e-5


def check_logprobs() -> None:
    """Log-probs and entropies equal log softmax in float64, with and without mask, lengths, T."""
    model = make_gpt()
    tokens, lengths = make_prompts((9, 4, 12, 1))
    mask = torch.rand(4, 12) < 0.5
    for temperature in (1.0, 0.7):
        whole = model.logprobs(tokens, temperature=temperature)
        inside = model.logprobs(tokens, lengths, temperature=temperature)
        masked = model.logprobs(tokens, lengths, mask=mask, temperature=temperature)
        for row, length in enumerate(lengths.tolist()):
            expected = naive_logprobs(model, tokens[row], temperature)
            for k in range(2):  # log-probs, entropy
                assert whole[k].dtype == torch.float32
                assert (whole[k][row] - expected[k]).abs().max() < 1e-5
                assert (inside[k][row, :length] - expected[k][:length]).abs().max() < 1e-5
                assert not inside[k][row, length:].any()
                reached = mask[row] & (torch.arange(12) < length)
                assert (masked[k][row] - expected[k] * mask[row])[reached].abs().sum() < 1e-4
                assert not masked[k][row][~mask[row]].any()


def check_logprob_gradients() -> None:
    """Gradients of masked log-probs and entropies equal autograd's through log softmax."""
    model = make_gpt()
    tokens, lengths = make_prompts((9, 4, 12))
    weights = torch.randn(2, 3, 12) * (torch.arange(12) < lengths[:, None])
    pair = model.logprobs(tokens, lengths, mask=weights[0] != 0)
    sum((w * x).sum() for w, x in zip(weights, pair, strict=True)).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in range(3):
        pair = naive_logprobs(model, tokens[row])
        sum((w[row] * x).sum() for w, x in zip(weights, pair, strict=True)).backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (ours[name] - parameter.grad).abs().max() < 2e-5 * scale, name


def check_scores() -> None:
    """A score is the scalar at the row's last token, before an end token; each position's scalar is
    causal."""
    scalar = ScalarModel.from_gpt(make_gpt()).eval()
    tokens, lengths = make_prompts((9, 4, 12, 1, 6))
    tokens[torch.arange(4), lengths[:4].long() - 1] = END  # then padding, which holds END as well
    tokens[4, 5] = END - 1  # cut before its end
    tokens[2, 3] = END  # as in a text before this one
    outputs, scores = scalar(tokens, lengths), scalar.scores(tokens, lengths)
    assert outputs.shape == (5, 12) and outputs.dtype == scores.dtype == torch.float32
    for row, length in enumerate(lengths.tolist()):
        hidden = scalar.trunk(tokens[row : row + 1, :length])[0]
        expected = hidden @ scalar.score.weight[0] + scalar.score.bias
        assert (outputs[row, :length] - expected).abs().max() < 1e-5
        read = (7, 2, 10, 0, 5)[row]  # row 3 is the end token alone
        assert (scores[row] - expected[read]).abs() < 1e-5


def test_rows_that_are_all_empty() -> None:
    """On a CPU nothing is left to compute: finite hidden states, log-probs of 0, no gradient."""
    model, lengths = make_gpt(), torch.zeros(2, dtype=torch.int32)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    assert model(tokens, lengths).shape == (2, 4, model.config.n_embd)
    assert model(tokens, lengths).isfinite().all()
    logprobs, entropy = model.logprobs(tokens, lengths)
    assert not logprobs.any() and not entropy.any()
    logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_prefixes_without_lengths_are_refused() -> None:
    tokens, _, prefixes = shared_prompts()
    with pytest.raises(ValueError, match="prefixes without lengths: give the rows' lengths"):
        make_gpt()(tokens, prefixes=prefixes)


def shared_prompts() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Rows 0 to 2 begin with the same 5 tokens, rows 3 and 4 with the same 2; row 5 is alone. Row 1
    has nothing else. Returns tokens, lengths and prefixes."""
    tokens, lengths = make_prompts((9, 5, 12, 4, 7, 3))
    tokens[1:3, :5], tokens[4, :2] = tokens[0, :5], tokens[3, :2]
    source, shared = torch.tensor([0, 0, 0, 3, 3, 5]), torch.tensor([0, 5, 5, 0, 2, 0])
    return tokens, lengths, (source, shared)


def check_shared_prefixes() -> None:
    """Scores, and their gradients, are those of rows computed one by one; what rows have in common
    and padding go through the MLP not once more than needed."""
    scalar = ScalarModel.from_gpt(make_gpt()).eval()
    tokens, lengths, prefixes = shared_prompts()
    computed = []
    scalar.trunk.h[0].mlp.register_forward_hook(lambda _, args, out: computed.append(out.shape[0]))
    scores = scalar.scores(tokens, lengths, prefixes=prefixes)
    assert computed == [9 + 0 + 7 + 4 + 5 + 3]
    weights = torch.randn(6)
    (weights * scores).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in scalar.named_parameters()}
    scalar.zero_grad()
    for row, length in enumerate(lengths.tolist()):
        alone = scalar(tokens[row : row + 1, :length])[0, -1]  # without lengths: nothing is packed
        assert (scores[row] - alone).abs() < 1e-5
        (weights[row] * alone).backward()
    for name, parameter in scalar.named_parameters():
        scale = parameter.grad.abs().max()
        assert (ours[name] - parameter.grad).abs().max() < 2e-5 * scale, name


def check_ended_rows_are_free() -> None:
    """Rows that ended leave the batch: at most a tenth of the rows passed on are idle."""
    model, batches = make_gpt(end=2), []
    original = model.h[0].step

    def counting(x: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        batches.append(len(x))
        return original(x, positions, cache)

    model.h[0].step = counting
    prompts, lengths = make_prompts((3,) * 200)
    _, new_lengths = model.generate(prompts, lengths, 20)
    written = (new_lengths - lengths).tolist()
    alive = [sum(n > step + 1 for n in written) for step in range(19)]
    assert alive[-1] < 140  # the test has something to see
    for step, rows in enumerate(batches):
        assert rows <= alive[step] / 0.9 + 1


def check_initialisation() -> None:
    """GPT-2's: std 0.02, by 1/sqrt(2 layers) into the residual stream; norms 1, biases 0."""
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(vocab_size=500, n_positions=64, n_embd=64, n_layer=8, n_head=4, eos_token_id=0)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            n = parameter.numel()
            assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(2 * n), name  # 5 sigma
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name
        else:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name


CHECKS = [
    check_gpt2_parity,
    check_cached_forward,
    check_greedy,
    check_sampling_distribution,
    check_rows_are_independent,
    check_padding,
    check_batch_composition,
    check_logprobs,
    check_logprob_gradients,
    check_scores,
    check_shared_prefixes,
    check_ended_rows_are_free,
    check_initialisation,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_property(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("score_mod", [m for m in kernels.SCORE_MODS if m != "causal"])
def test_every_attention_function_decodes_as_it_trains(score_mod: str) -> None:
    check_cached_forward(score_mod)


# ------------------------------------------------------------------------------------------------
# Planted bugs: each must make its check fail


def exact_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        model_file.F, "gelu", lambda x, approximate: 0.5 * x * (1 + torch.erf(x / 2**0.5))
    )


def large_epsilon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GPTConfig, "layer_norm_epsilon", 1e-3)  # the stored config says 1e-5
    original = checkpoint.read_config

    def read(folder: Path, kind: type):
        config = original(folder, kind)
        config.layer_norm_epsilon = 1e-3
        return config

    patch.setattr(checkpoint, "read_config", read)


def post_norm(patch: pytest.MonkeyPatch) -> None:
    def forward(self, x, *rows):
        x = self.ln_1(x + self.attn(x, *rows))
        return self.ln_2(x + self.mlp(x))

    patch.setattr(Block, "forward", forward)


def heads_mixed_up(patch: pytest.MonkeyPatch) -> None:
    original = kernels.attention

    def attention(q, k, v, *args, **kwargs):
        return original(q, k.flip(1), v, *args, **kwargs)

    patch.setattr(kernels, "attention", attention)


def not_causal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        kernels, "attention", lambda q, k, v, *_, **__: F.scaled_dot_product_attention(q, k, v)
    )


def decode_misses_the_new_key(patch: pytest.MonkeyPatch) -> None:
    original = kernels.decode_attention
    patch.setattr(
        kernels,
        "decode_attention",
        lambda q, k, v, lengths, **kwargs: original(q, k, v, (lengths - 1).clamp(min=1), **kwargs),
    )


def decode_ignores_score_mod(patch: pytest.MonkeyPatch) -> None:
    original = kernels.decode_attention
    patch.setattr(
        kernels,
        "decode_attention",
        lambda q, k, v, lengths, **kwargs: original(q, k, v, lengths, impl="torch"),
    )


def cache_keeps_the_wrong_rows(patch: pytest.MonkeyPatch) -> None:
    original = KVCache.keep_rows
    patch.setattr(KVCache, "keep_rows", lambda self, rows: original(self, rows.flip(0)))


def wrong_argmax(patch: pytest.MonkeyPatch) -> None:
    original = generate._sample
    patch.setattr(generate, "_sample", lambda logits, u, t: original(-logits, u, t))


def temperature_ignored(patch: pytest.MonkeyPatch) -> None:
    original = generate._sample
    patch.setattr(generate, "_sample", lambda logits, u, t: original(logits, u, 1.0))


def shared_uniforms(patch: pytest.MonkeyPatch) -> None:
    original = generate._sample
    patch.setattr(generate, "_sample", lambda logits, u, t: original(logits, u[:1].expand_as(u), t))


def uniforms_drawn_as_needed(patch: pytest.MonkeyPatch) -> None:
    """Each step draws for the rows still there, so a row's numbers depend on who has ended."""
    stream = torch.Generator()
    original, first = generate._sample, torch.rand

    def rand(*shape, generator, device):
        stream.manual_seed(5)
        return first(*shape)

    patch.setattr(model_file.torch, "rand", rand)
    patch.setattr(
        generate,
        "_sample",
        lambda logits, u, t: original(logits, first(len(logits), generator=stream), t),
    )


def mask_from_token_ids(patch: pytest.MonkeyPatch) -> None:
    """Lengths found by looking for padding ids: wrong when the tail holds other ids."""
    original = ScalarModel.scores
    patch.setattr(
        ScalarModel,
        "scores",
        lambda self, tokens, lengths: original(
            self, tokens, (tokens != END).sum(1).clamp(min=1).int()
        ),
    )


def last_column(patch: pytest.MonkeyPatch) -> None:
    """Scores read in the last column, as with left padding."""
    patch.setattr(ScalarModel, "scores", lambda self, tokens, lengths: self(tokens)[:, -1])


def prompt_tail_survives(patch: pytest.MonkeyPatch) -> None:
    original = GPT.generate

    def generate(self, prompts, lengths, n, **kwargs):
        tokens, new_lengths = original(self, prompts, lengths, n, **kwargs)
        places = torch.arange(prompts.shape[1])
        old = tokens[:, : len(places)]
        old.copy_(torch.where(places >= new_lengths[:, None], prompts, old))
        return tokens, new_lengths

    patch.setattr(GPT, "generate", generate)


def prefix_of_the_row_before(patch: pytest.MonkeyPatch) -> None:
    """The row before is taken for the one that a row shares its prefix with."""
    original = Packing.make

    def make(shape, lengths, prefixes=None):
        if prefixes is not None:
            before = (torch.arange(shape[0]) - 1).clamp(min=0)
            prefixes = torch.where(prefixes[1] > 0, before, prefixes[0]), prefixes[1]
        return original(shape, lengths, prefixes)

    patch.setattr(Packing, "make", make)


def prefix_one_token_long(patch: pytest.MonkeyPatch) -> None:
    original = Packing.make

    def make(shape, lengths, prefixes=None):
        if prefixes is not None:
            prefixes = prefixes[0], prefixes[1] + (prefixes[1] > 0).long()
        return original(shape, lengths, prefixes)

    patch.setattr(Packing, "make", make)


def padding_is_computed(patch: pytest.MonkeyPatch) -> None:
    original = Packing.make
    patch.setattr(
        Packing,
        "make",
        lambda shape, lengths, prefixes=None: original(
            shape, torch.full_like(lengths, shape[1]), prefixes
        ),
    )


def no_gradient_to_shared_tokens(patch: pytest.MonkeyPatch) -> None:
    """Only the row that a prefix stands in sends gradients into it."""
    original = Packing.to_rows

    def to_rows(self, x):
        rows, first = original(self, x), torch.zeros(self.index.numel(), dtype=torch.bool)
        first[self.places] = True
        return torch.where(first.view(*self.index.shape, 1), rows, rows.detach())

    patch.setattr(Packing, "to_rows", to_rows)


def left_padded_positions(patch: pytest.MonkeyPatch) -> None:
    """Positions counted from the batch's width instead of from each row's start."""
    original = GPT.forward

    def forward(self, tokens, *rows, **more):
        shift = 1 if tokens.shape[1] > 12 else 0
        weight = self.wpe.weight.data
        self.wpe.weight.data = weight.roll(shift, 0)
        try:
            return original(self, tokens, *rows, **more)
        finally:
            self.wpe.weight.data = weight

    patch.setattr(GPT, "forward", forward)


def shifted_targets(patch: pytest.MonkeyPatch) -> None:
    original = kernels.logprobs
    patch.setattr(
        kernels,
        "logprobs",
        lambda h, w, targets, **kwargs: original(h, w, targets.roll(1), **kwargs),
    )


def logprobs_without_temperature(patch: pytest.MonkeyPatch) -> None:
    original = kernels.logprobs
    patch.setattr(
        kernels,
        "logprobs",
        lambda h, w, targets, temperature, **kwargs: original(h, w, targets, **kwargs),
    )


def entropy_in_bits(patch: pytest.MonkeyPatch) -> None:
    original = kernels.logprobs

    def logprobs(*args, **kwargs):
        logp, entropy = original(*args, **kwargs)
        return logp, entropy / math.log(2)

    patch.setattr(kernels, "logprobs", logprobs)


def unembedding_detached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GPT, "unembedding", property(lambda self: self.wte.weight.detach()))


def rows_never_leave(patch: pytest.MonkeyPatch) -> None:
    """Ended rows stay in the batch to the end, as fixed-length sampling has it."""
    patch.setattr(generate, "_next_size", lambda going, size, steps_left, static: size)


def no_residual_scaling(patch: pytest.MonkeyPatch) -> None:
    original = GPT._initialise

    def initialise(self):
        original(self)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                torch.nn.init.normal_(parameter, std=0.02)

    patch.setattr(GPT, "_initialise", initialise)


BUGS = [
    (exact_gelu, check_gpt2_parity),
    (large_epsilon, check_gpt2_parity),
    (post_norm, check_gpt2_parity),
    (heads_mixed_up, check_gpt2_parity),
    (not_causal, check_gpt2_parity),
    (not_causal, check_cached_forward),
    (heads_mixed_up, check_cached_forward),
    (decode_misses_the_new_key, check_cached_forward),
    (decode_misses_the_new_key, check_greedy),
    (cache_keeps_the_wrong_rows, check_greedy),
    (wrong_argmax, check_greedy),
    (temperature_ignored, check_sampling_distribution),
    (shared_uniforms, check_sampling_distribution),
    (uniforms_drawn_as_needed, check_rows_are_independent),
    (cache_keeps_the_wrong_rows, check_rows_are_independent),
    (mask_from_token_ids, check_padding),
    (last_column, check_padding),
    (prompt_tail_survives, check_padding),
    (left_padded_positions, check_batch_composition),
    (last_column, check_batch_composition),
    (shifted_targets, check_logprobs),
    (logprobs_without_temperature, check_logprobs),
    (entropy_in_bits, check_logprobs),
    (unembedding_detached, check_logprob_gradients),
    (entropy_in_bits, check_logprob_gradients),
    (last_column, check_scores),
    (prefix_of_the_row_before, check_shared_prefixes),
    (prefix_one_token_long, check_shared_prefixes),
    (padding_is_computed, check_shared_prefixes),
    (no_gradient_to_shared_tokens, check_shared_prefixes),
    (mask_from_token_ids, check_scores),
    (rows_never_leave, check_ended_rows_are_free),
    (no_residual_scaling, check_initialisation),
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


def test_a_decoder_that_ignores_the_attention_function_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode_ignores_score_mod(monkeypatch)
    with pytest.raises(AssertionError):
        check_cached_forward("alibi")


# ------------------------------------------------------------------------------------------------
# bfloat16


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_logprobs_keep_float32_logits(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast the head's inputs are rounded to bfloat16, its products and sums are not."""
    model, given = make_gpt(n_embd=64), []
    original = kernels.logprobs

    def spy(hidden: Tensor, weight: Tensor, targets: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        given.append((hidden.double(), weight.double(), targets))
        return original(hidden, weight, targets, **kwargs)

    monkeypatch.setattr(kernels, "logprobs", spy)
    tokens, lengths = make_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = model.logprobs(tokens, lengths, temperature=temperature)
    logprobs.sum().backward()
    ((hidden, weight, targets),) = given
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    inside = (torch.arange(7) < lengths[:, None])[:, 1:]
    assert (logprobs[:, 1:][inside] - logp.gather(1, targets[:, None])[:, 0]).abs().max() < 1e-4
    assert (entropy[:, 1:][inside] + (logp.exp() * logp).sum(-1)).abs().max() < 1e-4
    assert model.wte.weight.grad.isfinite().all()


def test_bfloat16_sampling_uses_float32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two logits whose difference bfloat16 rounds away are still told apart."""
    model, seen = make_gpt(n_embd=64), []
    original = generate._sample

    def spy(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
        seen.append(logits)
        return original(logits, uniforms, temperature)

    monkeypatch.setattr(generate, "_sample", spy)
    prompts, lengths = make_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = model.generate(prompts, lengths, 4)
    assert len(seen) == 4 and tokens.shape == (6, 11)
    for logits in seen:
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


def test_bfloat16_scores_come_from_a_float32_head() -> None:
    scalar = ScalarModel.from_gpt(make_gpt(n_embd=64)).eval()
    tokens, lengths = make_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, scores = scalar(tokens, lengths), scalar.scores(tokens, lengths)
    for x in (outputs, scores):
        assert x.dtype == torch.float32
        assert not torch.equal(x, x.bfloat16().float())
    assert (scores - scalar.scores(tokens, lengths)).abs().max() < 0.2  # of a spread of about 8


# ------------------------------------------------------------------------------------------------
# Arguments that cannot be served


def test_sequences_over_the_context_are_refused() -> None:
    model = make_gpt(n_positions=8)
    with pytest.raises(ValueError, match="sequence of 9 tokens, over n_positions 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    prompts, lengths = make_prompts((3, 5))
    model.generate(prompts, lengths, 3)  # 8 fit
    with pytest.raises(ValueError, match="come to 9 tokens, over n_positions 8"):
        model.generate(prompts, lengths, 4)


def test_repeats_are_the_prompts_written_out() -> None:
    """The same responses as with each prompt given several times, and one prefill a prompt."""
    model = make_gpt(end=2).double()
    prompts, lengths = make_prompts()
    repeats = torch.tensor([2, 1, 0, 5, 1, 3])
    sources = torch.arange(len(prompts)).repeat_interleave(repeats)
    for temperature in (0.0, 1.0):
        results, prefilled = [], []
        hook = model.register_forward_pre_hook(lambda _, args: prefilled.append(len(args[0])))  # noqa: B023
        for given in ((prompts[sources], lengths[sources], None), (prompts, lengths, repeats)):
            random = torch.Generator().manual_seed(5)
            results.append(
                model.generate(
                    given[0],
                    given[1],
                    9,
                    temperature=temperature,
                    generator=random,
                    repeats=given[2],
                )
            )
        hook.remove()
        assert prefilled == [12, 6]
        (tokens, ends), (other_tokens, other_ends) = results
        assert torch.equal(tokens, other_tokens) and torch.equal(ends, other_ends)
        assert temperature == 0 or not torch.equal(tokens[3], tokens[4])  # own randomness each


def test_generate_without_room_returns_the_prompts() -> None:
    model = make_gpt()
    prompts, lengths = make_prompts()
    tokens, new_lengths = model.generate(prompts, lengths, 0)
    assert torch.equal(tokens, prompts) and torch.equal(new_lengths, lengths)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd 30 is not a multiple of n_head 4"),
        ({"n_layer": 0}, "n_layer is 0; expected a whole number from 1"),
        ({"n_positions": "128"}, "n_positions is '128'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"resid_pdrop": 1.0}, "resid_pdrop is 1.0"),
        ({"eos_token_id": 50257}, "eos_token_id 50257 is not below vocab_size 50257"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
    ],
)
def test_impossible_shapes_are_refused(shape: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        GPTConfig(**shape)


# ------------------------------------------------------------------------------------------------
# Folders: GPT-2's and ours


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """A copy of the stored GPT-2, to be changed."""
    return Path(shutil.copytree(GPT2_TINY, tmp_path / "gpt2"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def logits_of(folder: Path) -> Tensor:
    model = GPT.from_pretrained(folder)
    tokens = load_file(GPT2_TINY / "reference.safetensors")["tokens"]
    with torch.no_grad():
        return model(tokens) @ model.unembedding.T


def test_key_layouts_of_the_hub_are_read(gpt2_folder: Path) -> None:
    """With or without "transformer.", with mask buffers, with the tied output matrix."""
    expected = logits_of(gpt2_folder)

    def without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        assert not set(bare) & set(weights)
        for layer in range(3):
            bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return bare

    edit_weights(gpt2_folder, without_prefix)
    assert torch.equal(logits_of(gpt2_folder), expected)
    edit_weights(gpt2_folder, lambda w: w | {"lm_head.weight": w["wte.weight"].clone()})
    assert torch.equal(logits_of(gpt2_folder), expected)


def without(name: str) -> Callable[[dict], dict]:
    return lambda weights: {k: v for k, v in weights.items() if k != f"transformer.{name}"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "expected a JSON object, found list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff{}"), "config.json: cannot be read"),
        (lambda f: edit_config(f, n_layer=None), 'key "n_layer" is missing'),
        (lambda f: edit_config(f, n_layer="3"), "n_layer is '3'"),
        (lambda f: edit_config(f, eos_token_id=[96]), "config.json: "),
        (lambda f: edit_config(f, activation_function="relu"), "expected 'gelu_new', found 'relu'"),
        (lambda f: edit_config(f, scale_attn_weights=False), "scale_attn_weights"),
        (lambda f: edit_config(f, tie_word_embeddings=False), "tie_word_embeddings"),
        (lambda f: edit_config(f, scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx"),
        (lambda f: edit_config(f, n_layer=2), "does not fit config.json"),
        (lambda f: edit_config(f, n_layer=10**9), "n_layer 1000000000, .* parameters, over 1e"),
        (lambda f: edit_config(f, n_embd=48), "does not fit config.json"),
        (lambda f: edit_config(f, n_positions=10**18), "parameters, over 1e"),
        (lambda f: edit_config(f, n_positions=33), "wpe.weight is"),
        (lambda f: edit_config(f, layer_norm_epsilon="small"), "layer_norm_epsilon is 'small'"),
        (
            lambda f: edit_weights(
                f, lambda w: w | {"transformer.h.1.attn.c_attn.weight": torch.ones(72, 24)}
            ),
            r"another shape: h\.1\.attn\.c_attn\.weight is \(72, 24\), expected \(24, 72\)",
        ),
        (lambda f: edit_weights(f, without("ln_f.bias")), "another shape: ln_f.bias"),
        (lambda f: edit_weights(f, lambda w: w | {"extra": torch.ones(1)}), "another shape: extra"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04K\x01."), "not a readable"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "not a readable"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a readable"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (GPT2_TINY / "model.safetensors").read_bytes()[:-100]
            ),
            "not a readable",
        ),
    ],
)
def test_unusable_folders_are_named(
    spoil: Callable[[Path], None], message: str, gpt2_folder: Path
) -> None:
    spoil(gpt2_folder)
    with pytest.raises(BadInput, match=message) as error:
        GPT.from_pretrained(gpt2_folder)
    assert str(gpt2_folder) in str(error.value) and "\n" not in str(error.value)


def test_names_of_gpt2_point_to_the_download_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "DOWNLOADS", tmp_path)
    with pytest.raises(BadInput, match=r"gpt2-large: no such folder.*--download gpt2-large"):
        GPT.from_pretrained("gpt2-large")
    (tmp_path / "gpt2-large").mkdir()
    (tmp_path / "gpt2-large" / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"gpt2-large: holds no weights.*--download gpt2-large"):
        GPT.from_pretrained("gpt2-large")
    shutil.rmtree(tmp_path / "gpt2-large")
    shutil.copytree(GPT2_TINY, tmp_path / "gpt2-large")
    assert GPT.from_pretrained("gpt2-large").config.n_embd == 24


def test_a_checkpoint_of_the_wrong_stage_is_named(tiny: Tiny) -> None:
    with pytest.raises(BadInput, match=r"scalar model \(stage rm\), expected a language model"):
        GPT.from_pretrained(tiny.rm)
    with pytest.raises(BadInput, match=r"language model \(stage base\), expected a reward model"):
        ScalarModel.from_pretrained(tiny.base)


@pytest.mark.parametrize("kind", ["gpt", "scalar"])
def test_saved_and_loaded_is_bitwise_the_same(kind: str, tmp_path: Path) -> None:
    model = make_gpt()
    if kind == "scalar":
        model = ScalarModel.from_gpt(model)
        model.score.bias.data.fill_(0.37)
    info = {"stage": "test", "data": ["a.jsonl"]}
    save_model(tmp_path / "new", model, '{"any": "text"}', info)
    loaded = type(model).from_pretrained(tmp_path / "new", resid_pdrop=0.25)
    assert loaded.config.resid_pdrop == 0.25
    loaded.config.resid_pdrop = model.config.resid_pdrop
    assert loaded.config == model.config
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert checkpoint.read_info(tmp_path / "new")["data"] == ["a.jsonl"]
    assert (tmp_path / "new/tokenizer.json").read_text() == '{"any": "text"}'
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert len(modes) == 1  # one umask for all: who may read the shape may read the weights


def test_a_scalar_model_is_a_copy_with_a_fresh_head() -> None:
    gpt = make_gpt(n_embd=64)
    scalar = ScalarModel.from_gpt(gpt, resid_pdrop=0.1)
    for ours, theirs in zip(scalar.trunk.parameters(), gpt.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    assert (scalar.config.resid_pdrop, gpt.config.resid_pdrop) == (0.1, 0.0)
    assert scalar.score.bias.item() == 0
    stds = torch.stack([ScalarModel.from_gpt(gpt).score.weight.std() for _ in range(40)])
    assert abs(stds.mean() * math.sqrt(65) - 1) < 0.1


def test_our_checkpoint_opens_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = make_gpt()
    save_model(tmp_path, model, "{}", {"stage": "sft", "settings": {"lr": 1e-3}})
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(41, (2, 24))
    with torch.no_grad():
        difference = model(tokens) @ model.unembedding.T - theirs(tokens).logits
    assert difference.abs().max() < 1e-4


def test_pad_right() -> None:
    tokens, lengths = pad_right([[5, 6], [], [7, 8, 9]], 1, torch.device("cpu"))
    assert tokens.tolist() == [[5, 6, 1], [1, 1, 1], [7, 8, 9]]
    assert lengths.tolist() == [2, 0, 3]
    assert (tokens.dtype, lengths.dtype) == (torch.int64, torch.int32)
