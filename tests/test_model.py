"""model.py against naive loops, brute force and float64 (against GPT-2 itself: test_checkpoint.py).

The properties that a silent bug would break are `check_...` functions. Each is run on the code as
it is, and again on the bugs that `BUGS` plants, where it must fail.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from model import GPT, GPTConfig, Linear, Packing, ScalarModel, pad_right
from tests.planted import plant, read_bugs

END = 40  # end token of the small models below
BOTH = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def make_gpt(std: float = 0.3, end: float = 0, dtype: str = "float32", **shape) -> GPT:
    """A small random model whose logits are far from uniform, so that mistakes show; `end` is
    added to the end token's."""
    shape = {"vocab_size": 41, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2} | shape
    model = GPT(GPTConfig(**shape, eos_token_id=END), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "ln_" in name and "weight" in name else 0.0, std)
    model.ln_f.bias.data += end * model.wte.weight[END].detach() / model.wte.weight[END].norm() ** 2
    return model


def make_scalar(std: float = 0.3, **options) -> ScalarModel:
    return ScalarModel.from_gpt(make_gpt(std, **options)).eval()


def make_prompts(lengths: tuple[int, ...] = (3, 7, 1, 5, 7, 2)) -> tuple[Tensor, Tensor]:
    return pad_right([torch.randint(END, (length,)).tolist() for length in lengths], END, "cpu")


def naive_logprobs(model: GPT, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """In float64, of one row (T,): log-probs and entropies (2, T) of its tokens, 0 at t = 0."""
    logits = (model(tokens[None])[0] @ model.wte.weight.T).double() / temperature
    logp = logits[:-1].log_softmax(-1)  # (T - 1, V)
    chosen = logp.gather(1, tokens[1:, None]).squeeze(1)
    return F.pad(torch.stack((chosen, -(logp.exp() * logp).sum(-1))), (1, 0))


def same_gradients(model: torch.nn.Module, ours: Tensor, expected: Tensor) -> None:
    """The gradients of two numbers, each computed in its own way, are equal."""
    one, other = (torch.autograd.grad(loss, [*model.parameters()]) for loss in (ours, expected))
    for (name, _), a, b in zip(model.named_parameters(), one, other, strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max(), name


# ------------------------------------------------------------------------------------------------
# Padding, and beginnings in common


def check_padding() -> None:
    """What stands behind a row's end changes nothing, and has log-prob and entropy 0."""
    model, scalar = make_gpt(), make_scalar()
    tokens, lengths = make_prompts((9, 4, 12, 1))
    outside = torch.arange(12) >= lengths[:, None]
    for other in (torch.randint(41, (4, 12)), torch.full((4, 12), END), torch.zeros(4, 12).long()):
        changed = torch.where(outside, other, tokens)
        for mask in (None, ~outside):
            ours = torch.stack(model.logprobs(tokens, lengths, mask=mask))
            assert torch.equal(ours, torch.stack(model.logprobs(changed, lengths, mask=mask)))
            assert not ours[:, outside].any()
        assert torch.equal(scalar.scores(tokens, lengths), scalar.scores(changed, lengths))


def check_response_scores() -> None:
    """By hand: the model's own number where a row's last token is the end token, else the fixed
    one; whatever stands behind the row's end, and however many rows are computed at once."""
    scalar = make_scalar()
    tokens, lengths = make_prompts((9, 4, 12, 2, 6))
    rows, outside = torch.arange(5), torch.arange(12) >= lengths[:, None]
    tokens = torch.where(tokens == END, 0, tokens)
    tokens[outside] = END
    tokens[rows[:3], lengths[:3].long() - 1] = END
    tokens[4, 2] = END  # as in a text before this one
    own = [scalar(tokens[row : row + 1])[0, place].item() for row, place in enumerate((7, 2, 10))]
    own += [scalar(tokens[row : row + 1])[0, place].item() for row, place in ((3, 1), (4, 5))]
    expected = torch.tensor([[*own[:3], -2.5, -2.5], own])
    for at_once in (0, 1, 2, 5, 9):
        *found, ended = scalar.response_scores(tokens, lengths, -2.5, at_once)
        assert (torch.stack(found) - expected).abs().max() < 1e-5
        assert ended.tolist() == [True, True, True, False, False]
    assert not found[0].requires_grad


def check_batch_composition() -> None:
    """A row alone and the same row among longer ones: equal to 1e-5."""
    model, scalar = make_gpt(std=0.1), make_scalar(std=0.1)
    tokens, lengths = make_prompts((9, 4, 20, 1, 20))
    together, _ = model.logprobs(tokens, lengths)
    scores = scalar.scores(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model.logprobs(tokens[row : row + 1, :length])
        assert (alone[0] - together[row, :length]).abs().max() < 1e-5
        score = scalar.scores(tokens[row : row + 1, :length], lengths[row : row + 1])
        assert (score - scores[row]).abs().max() < 1e-5


def test_rows_that_are_all_empty() -> None:
    """Nothing is left to compute: finite hidden states, log-probs of 0, no gradient."""
    model, lengths = make_gpt(), torch.zeros(2, dtype=torch.int32)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    assert model(tokens, lengths).shape == (2, 4, model.config.n_embd)
    assert model(tokens, lengths).isfinite().all()
    logprobs, entropy = model.logprobs(tokens, lengths)
    assert not logprobs.any() and not entropy.any()
    logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def check_packing() -> None:
    """Against its definition, on random rows of few different tokens: many begin alike, some are
    equal or empty. What is in the padding must not matter: it is often equal as well."""
    seen = torch.zeros(5)
    for case in range(400):
        B, T, V = (int(torch.randint(1, high, ())) for high in (6, 7, 4))
        tokens, lengths = torch.randint(V, (B, T)), torch.randint(T + 1, (B,)) * (case % 50 > 0)
        rows = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        inside = [(b, t) for b in range(B) for t in range(len(rows[b]))]
        above = [[], *rows]  # a place is repeated if the row above has all up to there
        repeated = [(b, t) for b, t in inside if rows[b][: t + 1] == above[b][: t + 1]]
        for share in (True, False):
            packing = Packing.make(tokens, lengths.int(), share)
            listed = [(int(place) // T, int(place) % T) for place in packing.flat]
            assert listed == [place for place in inside if not (share and place in repeated)]
            assert packing.index.min() >= 0 and packing.index.max() <= max(len(listed) - 1, 0)
            for b, t in inside:
                row, column = listed[packing.index[b, t]]
                assert column == t and rows[row][: t + 1] == rows[b][: t + 1]
                assert (row == b) == ((b, t) in listed)
        thrice = any((b + 1, t) in repeated for b, t in repeated)
        equal = any(row == other != [] for row, other in zip(rows, above[:-1], strict=True))
        seen += torch.tensor([len(repeated) > 0, thrice, equal, [] in rows, not inside])
    assert seen.min() >= 8  # of each kind


def check_shared_beginnings() -> None:
    """Scores and log-probs, and their gradients, are those of rows computed one by one; what rows
    have in common and padding go through the MLP not once more than needed."""
    scalar, computed = make_scalar(), []
    tokens, lengths = make_prompts((9, 5, 12, 4, 7, 3))
    tokens[:, 0] = torch.tensor([1, 1, 1, 2, 2, 3])
    tokens[1:3, :5], tokens[4, :4] = tokens[0, :5], tokens[3, :4]  # 0 to 2, 3 and 4 begin alike
    tokens[4, 2] += 1  # and have the next token but one in common
    scalar.trunk.h[0].mlp.register_forward_hook(lambda _, args, out: computed.append(out.shape[0]))
    scores = scalar.scores(tokens, lengths)
    logprobs = torch.stack(scalar.trunk.logprobs(tokens, lengths))
    assert computed == [9 + 0 + 7 + 4 + 5 + 3] * 2
    weights, more = torch.randn(6), torch.randn(2, 6, 12)
    expected = 0
    for row, length in enumerate(lengths.tolist()):
        alone = scalar(tokens[row : row + 1, :length])[0, -1]  # without lengths nothing is packed
        assert (scores[row] - alone).abs() < 1e-5
        naive = naive_logprobs(scalar.trunk, tokens[row, :length])
        assert (logprobs[:, row, :length] - naive).abs().max() < 1e-5
        expected += weights[row] * alone + (more[:, row, :length] * naive).sum()
    same_gradients(scalar, (weights * scores).sum() + (more * logprobs).sum(), expected)


def check_dropout_of_equal_rows() -> None:
    """With dropout each row has its own; without it equal rows are computed once, in training
    too."""
    tokens, lengths = torch.tensor([[5, 6, 7]] * 2), torch.tensor([3, 3], dtype=torch.int32)
    computed = []
    for model in (make_gpt(), make_gpt(resid_pdrop=0.2)):
        model.h[0].mlp.register_forward_hook(lambda _, args, out: computed.append(len(out)))
        one, other = model(tokens, lengths)
        assert torch.equal(one, other)
        one, other = model.train()(tokens, lengths)
        assert torch.equal(one, other) == (model.config.resid_pdrop == 0)
    assert computed == [3, 3, 3, 6]


# ------------------------------------------------------------------------------------------------
# Log-probs and scores


def check_logprobs() -> None:
    """Log-probs and entropies equal log softmax in float64, with and without mask, lengths, T."""
    model = make_gpt()
    tokens, lengths = make_prompts((9, 4, 12, 1))
    mask = torch.rand(4, 12) < 0.5
    for temperature in (1.0, 0.7):
        whole = torch.stack(model.logprobs(tokens, temperature=temperature))
        inside = torch.stack(model.logprobs(tokens, lengths, temperature=temperature))
        masked = torch.stack(model.logprobs(tokens, lengths, mask=mask, temperature=temperature))
        assert whole.dtype == torch.float32
        assert not masked[:, ~mask].any()
        for row, length in enumerate(lengths.tolist()):
            expected = naive_logprobs(model, tokens[row], temperature)
            assert (whole[:, row] - expected).abs().max() < 1e-5
            assert (inside[:, row, :length] - expected[:, :length]).abs().max() < 1e-5
            assert not inside[:, row, length:].any()
            assert (masked[:, row] - expected * mask[row])[:, :length].abs().max() < 1e-5


def check_logprob_gradients() -> None:
    """Gradients of masked log-probs and entropies equal autograd's through log softmax."""
    model = make_gpt()
    tokens, lengths = make_prompts((9, 4, 12))
    weights = torch.randn(2, 3, 12) * (torch.arange(12) < lengths[:, None])
    pair = torch.stack(model.logprobs(tokens, lengths, mask=weights[0] != 0))
    naive = torch.stack([naive_logprobs(model, row) for row in tokens], dim=1)
    same_gradients(model, (weights * pair).sum(), (weights * naive).sum())


def check_scores() -> None:
    """A score is the scalar at the row's last token, before an end token; each position's scalar is
    causal."""
    scalar = make_scalar()
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


def test_a_scalar_model_is_a_copy_with_a_fresh_head() -> None:
    gpt = make_gpt(n_embd=64)
    scalar = ScalarModel.from_gpt(gpt, resid_pdrop=0.1)
    for ours, theirs in zip(scalar.trunk.parameters(), gpt.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    assert (scalar.config.resid_pdrop, gpt.config.resid_pdrop) == (0.1, 0.0)
    assert scalar.score.bias.item() == 0
    stds = torch.stack([ScalarModel.from_gpt(gpt).score.weight.std() for _ in range(40)])
    assert abs(stds.mean() * math.sqrt(65) - 1) < 0.1


# ------------------------------------------------------------------------------------------------
# Initial weights, arguments


def check_initialisation() -> None:
    """GPT-2's: std 0.02, by 1/sqrt(2 layers) into the residual stream; norms 1, biases 0."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(500, n_positions=64, n_embd=64, n_layer=8, n_head=4, eos_token_id=0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            n = parameter.numel()
            assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(2 * n), name  # 5 sigma
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name
        else:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name


def check_sinusoids() -> None:
    """wpe[t, 2i] and wpe[t, 2i+1] are sqrt(2) std times sine and cosine of w_i t."""
    model = make_gpt(n_positions=50, n_embd=6)
    model.start_from_sinusoids()
    for t in range(50):
        for i, frequency in enumerate((1, 50**-0.5, 1 / 50)):
            wave = [math.sin(frequency * t), math.cos(frequency * t)]
            expected = math.sqrt(2) * 0.02 * torch.tensor(wave)
            assert (model.wpe.weight[t, 2 * i : 2 * i + 2] - expected).abs().max() < 1e-6


def test_sequences_over_the_context_are_refused() -> None:
    model = make_gpt(n_positions=8)
    model(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequence of 9 tokens, over n_positions 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_pad_right() -> None:
    tokens, lengths = pad_right([[5, 6], [], [7, 8, 9]], 1, "cpu")
    assert tokens.tolist() == [[5, 6, 1], [1, 1, 1], [7, 8, 9]]
    assert lengths.tolist() == [2, 0, 3]
    assert (tokens.dtype, lengths.dtype) == (torch.int64, torch.int32)


# ------------------------------------------------------------------------------------------------
# The checks, and planted bugs that each must catch


BUGS = """
the fixed score for all: model.ScalarModel.response_scores; check_response_scores
    - torch.where(ended, own, missing_eos_score)
    + torch.full_like(own, missing_eos_score)
the end anywhere: model.ScalarModel.response_scores; check_response_scores
    - last == self.config.eos_token_id
    + (tokens == self.config.eos_token_id).any(1)
the last column's token: model.ScalarModel.response_scores; check_response_scores
    - lengths[:, None].long() - 1
    + torch.full_like(lengths[:, None].long(), tokens.shape[1] - 1)
score's place from token ids: model.ScalarModel.scores; check_padding, check_scores
    - last = lengths.long() - 1
    + last = (tokens != self.config.eos_token_id).sum(1).clamp(min=1) - 1
last column: model.ScalarModel.scores; check_padding, check_batch_composition, check_scores
    - last = lengths.long() - 1
    + last = torch.full_like(rows, tokens.shape[1] - 1)
positions as in left padding: model.GPT.forward; check_batch_composition
    - self.wpe.weight[:T]
    + self.wpe.weight[-T:]
alike behind a difference: model.Packing.make; check_packing, check_shared_beginnings
    - same.cumprod(1).bool()
    + same
beginnings one token long: model.Packing.make; check_packing, check_shared_beginnings
    - same.cumprod(1).bool()
    + (same.cumprod(1) | F.pad(same.cumprod(1), (1, -1))).bool()
the row above alone: model.Packing.make; check_packing, check_shared_beginnings
    - torch.where(listed, number, -1).cummax(0).values
    + torch.where(listed, number, number.roll(1, 0))
the first row: model.Packing.make; check_packing, check_shared_beginnings
    - cummax
    + cummin
padding taken as alike: model.Packing.make; check_packing
    - & inside[1:] & inside[:-1]
    + & inside[1:]
padding computed: model.Packing.make; check_packing, check_shared_beginnings
    - torch.arange(T, device=tokens.device) < lengths[:, None]
    + torch.ones_like(tokens, dtype=torch.bool)
always shared: model.Packing.make; check_packing, check_dropout_of_equal_rows
    - if share:
    + if True:
no gradient to shared tokens: model.Packing.to_rows; check_shared_beginnings
    - x.index_select(0, self.index.flatten())
    + x.detach()[self.index.flatten()].index_copy(0, self.flat, x)
shared in spite of dropout: model.GPT.forward; check_dropout_of_equal_rows
    - share=not dropout
    + share=True
never shared in training: model.GPT.forward; check_dropout_of_equal_rows
    - self.training and self.config.resid_pdrop > 0
    + self.training
targets shifted: model.GPT.logprobs; check_logprobs
    - tokens[:, 1:][chosen]
    + tokens[:, :-1][chosen]
no temperature: model.GPT.logprobs; check_logprobs
    - temperature=temperature
    + temperature=1.0
entropy in bits: model.GPT.logprobs; check_logprobs, check_logprob_gradients
    - F.pad(entropy, (1, 0))
    + F.pad(entropy / math.log(2), (1, 0))
unembedding detached: model.GPT.logprobs; check_logprob_gradients
    - self.unembedding
    + self.unembedding.detach()
no residual scaling: model.GPT._initialise; check_initialisation
    - std=std / math.sqrt(2 * self.config.n_layer)
    + std=std
sinusoids of another size: model.GPT.start_from_sinusoids; check_sinusoids
    - waves * math.sqrt(2)
    + waves
"""


@pytest.mark.parametrize("check", [name for name in globals() if name.startswith("check_")])
def test_property(check: str) -> None:
    globals()[check]()


@pytest.mark.parametrize("where, old, new, check", read_bugs(BUGS))
def test_planted_bug_is_caught(where, old, new, check, monkeypatch) -> None:
    plant(monkeypatch, where, old, new)
    with pytest.raises(AssertionError):
        globals()[check]()


# ------------------------------------------------------------------------------------------------
# bfloat16, frozen copies, gradient checkpointing


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_logprobs_keep_float32_logits(temperature, monkeypatch) -> None:
    """The head's inputs are rounded to bfloat16, its products and sums are not."""
    model, given = make_gpt(n_embd=64, dtype="bfloat16"), []
    original = kernels.logprobs
    monkeypatch.setattr(kernels, "logprobs", lambda *a, **k: given.append(a) or original(*a, **k))
    tokens, lengths = make_prompts()
    logprobs, entropy = model.logprobs(tokens, lengths, temperature=temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    ((hidden, weight, targets),) = given
    assert hidden.dtype == weight.dtype == torch.bfloat16
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    inside = (torch.arange(7) < lengths[:, None])[:, 1:]
    assert (logprobs[:, 1:][inside] - logp.gather(1, targets[:, None])[:, 0]).abs().max() < 1e-4
    assert (entropy[:, 1:][inside] + (logp.exp() * logp).sum(-1)).abs().max() < 1e-4
    assert model.wte.weight.grad.isfinite().all() and model.wte.weight.grad.any()


def test_bfloat16_scores_come_from_a_float32_head() -> None:
    scalar = make_scalar(n_embd=64, dtype="bfloat16")
    tokens, lengths = make_prompts()
    outputs, scores = scalar(tokens, lengths), scalar.scores(tokens, lengths)
    for x in (outputs, scores):
        assert x.dtype == torch.float32
        assert not torch.equal(x, x.bfloat16().float())
    scalar.trunk.dtype = "float32"
    difference = (scores - scalar.scores(tokens, lengths)).abs().max()
    assert 0 < difference < 0.2  # of a spread of about 8


def results(model: GPT | ScalarModel) -> list[Tensor]:
    torch.manual_seed(1)
    tokens, lengths = make_prompts((3, 20, 1, 5, 24, 2))
    if isinstance(model, GPT):
        return [*model.logprobs(tokens, lengths), model(tokens)]
    return [model.scores(tokens, lengths), model(tokens)]


@BOTH
@pytest.mark.parametrize("make", [make_gpt, make_scalar])
def test_a_frozen_copy_changes_no_number(make: Callable, dtype: str) -> None:
    """Its matrices alone are stored in the dtype of their products, to which autocast rounds those
    of the model at each use; embeddings, norms and the scalar head are not."""
    model = make(dtype=dtype).train()
    frozen = model.frozen()
    for ours, theirs in zip(results(model), results(frozen), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad and not theirs.requires_grad
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    for module in frozen.modules():
        stored = getattr(torch, dtype) if isinstance(module, Linear) else torch.float32
        assert all(p.dtype == stored for p in module.parameters(recurse=False))


@pytest.mark.parametrize("part", ["wte", "wpe", "h.0.ln_1", "ln_f"])
def test_more_in_bfloat16_would_change_numbers(part: str) -> None:
    """The reason why `frozen` leaves it alone; and proof that the test above can fail."""
    model = make_gpt(dtype="bfloat16")
    expected = results(model)
    model.get_submodule(part).to(torch.bfloat16).to(torch.float32)
    assert not any(torch.equal(a, b) for a, b in zip(results(model), expected, strict=True))


@BOTH
def test_gradient_checkpointing_changes_no_gradient(dtype: str) -> None:
    gradients = []
    model = make_gpt(dtype=dtype, resid_pdrop=0.3).train()
    for model.gradient_checkpointing in (False, True):
        logprobs, entropy, _ = results(model)  # of the same dropout
        loss = logprobs.sum() + 0.1 * entropy.sum()
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b) and a.any()


def saved_elements(gpt: GPT) -> int:
    """Elements that a forward pass keeps for its backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    kept: list[Tensor] = []  # not freed, so that no address is used again
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gpt(torch.randint(END, (4, 20)))
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in kept)}
    return sum(size for address, size in storages.items() if address not in own) // 4


def test_gradient_checkpointing_keeps_each_blocks_input_alone() -> None:
    gpt = make_gpt()
    plain = saved_elements(gpt)
    gpt.gradient_checkpointing = True
    again = saved_elements(gpt)
    one = 4 * 20 * 32  # (B, T, C)
    assert again <= 4.5 * one < 20 * one < plain  # two blocks' inputs, the last layer norm, means
