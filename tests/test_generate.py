"""generate.py against growing each row alone, and first principles; and, as far as a CPU can show
it, the step that a GPU captures as a CUDA graph. `check_...` and `BUGS` as in test_model.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import kernels.flash_decoding
import kernels.runtime
from generate import Decoder, KVCache, for_decoding
from tests.planted import plant, read_bugs
from tests.test_model import END, make_gpt, make_prompts


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_results(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@torch.no_grad()
def check_cached_forward() -> None:
    """Token by token over a cache gives the hidden states of one full forward, ragged rows too,
    with every attention function."""
    for score_mod in kernels.SCORE_MODS:
        model = make_gpt(score_mod=score_mod, n_positions=96)
        tokens, lengths = torch.randint(END, (3, 80)), torch.tensor([74, 2, 61], dtype=torch.int32)
        cache = KVCache(model, 3, 80)
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
                logits = model(grown[None])[0, -1] @ model.unembedding.T
                grown = torch.cat([grown, logits.argmax()[None]])
                if grown[-1] == END:
                    break
            assert tokens[row].tolist() == grown.tolist() + [END] * (19 - len(grown))
            assert new_lengths[row] == len(grown)


def check_sampling_distribution() -> None:
    """First sampled tokens follow softmax(logits / temperature): chi-square on 6 tokens."""
    model = make_gpt(std=0.15)
    model.wte.weight.data[6:] = 0  # only 0..5, and all the others together, are told apart
    prompt, n = torch.tensor([[3, 1, 4]]), 20_000
    logits = (model(prompt)[0, -1] @ model.unembedding.T).detach().double()
    for temperature in (1.0, 0.5):
        prompts, lengths = prompt.expand(n, -1), torch.full((n,), 3)
        tokens, _ = model.generate(prompts, lengths, 1, temperature=temperature)
        p = (logits / temperature).softmax(-1)
        expected = n * torch.cat([p[:6], p[6:].sum()[None]])
        observed = tokens[:, 3].clamp(max=6).bincount(minlength=7).double()
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert expected.min() > 20
        assert chi_square < 38.3  # 6 degrees of freedom: one run in a million is above


def check_rows_are_independent() -> None:
    """A row's sample is the same whatever the other rows are and whenever they end."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = make_gpt(end=2)
        prompts, lengths = make_prompts((3, 7, 1, 5, 7, 2, 4, 4))
        tokens, ends = model.generate(prompts, lengths, 10, generator=seeded())
        assert len(set((ends - lengths).tolist())) > 2  # rows end at different times
        other, other_lengths = prompts.clone(), lengths.clone()
        other[::2], other_lengths[::2] = torch.randint(END, other[::2].shape), 2
        again, _ = model.generate(other, other_lengths, 10, generator=seeded())
        assert torch.equal(tokens[1::2], again[1::2])
        assert not torch.equal(tokens[::2], again[::2])
        alone, _ = model.generate(prompts[:2], lengths[:2], 10, generator=seeded())
        assert torch.equal(tokens[:2], alone)


def check_given_random_numbers() -> None:
    """A row's sample follows from its prompt and its own uniform numbers, which the generator draws
    row by row unless they are given: any rows alone, and any number of rows at a time."""
    torch.manual_seed(1)
    model = make_gpt(end=2)
    prompts, lengths = make_prompts((3, 7, 1, 5, 7, 2, 4, 4))
    whole = model.generate(prompts, lengths, 10, generator=seeded())
    uniforms = torch.rand(8, 10, generator=seeded())
    for rows in (torch.arange(8), torch.tensor([6, 1, 3])):
        for at_once in (0, 1, 3):
            how = {"uniforms": uniforms[rows], "at_once": at_once}
            same_results(
                model.generate(prompts[rows], lengths[rows], 10, **how),
                (whole[0][rows], whole[1][rows]),
            )


def check_padding() -> None:
    """What stands behind a prompt's end, and how much of it, changes nothing."""
    model = make_gpt()
    prompts, lengths = make_prompts((9, 4, 12, 1))
    tokens, _ = model.generate(prompts, lengths, 6, generator=seeded())
    outside = torch.arange(12) >= lengths[:, None]
    for other in (torch.randint(41, (4, 12)), torch.full((4, 12), END), torch.zeros(4, 12).long()):
        changed = torch.where(outside, other, prompts)
        again, _ = model.generate(changed, lengths, 6, generator=seeded())
        assert torch.equal(tokens, again)
    wide = F.pad(prompts, (0, 10), value=3)  # no row reaches the new columns
    again, _ = model.generate(wide, lengths, 6, generator=seeded())
    assert torch.equal(F.pad(tokens, (0, 10), value=END), again)


@contextmanager
def steps_noted() -> Iterator[list[int]]:
    """The number of rows of each step within the block."""
    sizes: list[int] = []
    advance = Decoder.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "advance", lambda d: sizes.append(len(d.rows)) or advance(d))
        yield sizes


def check_ended_rows_are_free() -> None:
    """Rows that ended leave the batch: at most a tenth of the rows passed on are idle."""
    model = make_gpt(end=2)
    prompts, lengths = make_prompts((3,) * 200)
    with steps_noted() as sizes:
        _, new_lengths = model.generate(prompts, lengths, 20)
    written = (new_lengths - lengths).tolist()
    alive = [sum(n > step + 1 for n in written) for step in range(19)]
    assert alive[-1] < 140  # the test has something to see
    for step, rows in enumerate(sizes):
        assert rows <= alive[step] / 0.9 + 1


def check_repeated_prompts() -> None:
    """A prompt given several times in a row is read once; each copy has its own randomness."""
    model, read = make_gpt(end=2).double(), []
    model.h[0].mlp.register_forward_hook(lambda _, args, out: read.append(out.shape[:-1]))
    prompts, lengths = make_prompts((3, 7, 1, 5))
    copies = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    given = prompts[copies], lengths[copies], 9
    for temperature in (0.0, 1.0):
        results = []
        for share in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not share:
                    plant(patch, "model.GPT.forward", "share=not dropout", "share=False")
                    patch.setattr(
                        generate, "differ_from_above", lambda _, n: torch.ones_like(n) > 0
                    )
                results.append(model.generate(*given, temperature=temperature, generator=seeded()))
            assert read[0] == ((3 + 7 + 1 + 5,) if share else (2 * 3 + 7 + 3 * 1 + 5,))
            read.clear()
        same_results(*results)
        tokens, _ = results[0]
        assert torch.equal(tokens[3], tokens[4]) == (temperature == 0)


# ------------------------------------------------------------------------------------------------
# The step on a GPU


class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: the operations of a step, each with the very tensors it ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read in the step"
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            result = func(*args, **kwargs)
            pairs = ((out, result),) if isinstance(out, Tensor) else zip(out, result, strict=True)
            for place, value in pairs:  # results land where they did, as in a graph
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def with_tapes(patch: pytest.MonkeyPatch) -> list[Tape]:
    """Let the decoder capture, on tapes; like capture on a GPU, recording runs nothing."""
    tapes: list[Tape] = []
    decoders: list[Decoder] = []
    init = Decoder.__init__

    def capturing(self, *args) -> None:
        init(self, *args)
        self.captures = True
        decoders.append(self)

    @contextmanager
    def capture(tape: Tape) -> Iterator[None]:
        tapes.append(tape)
        (d,) = decoders
        state = [d.tokens, d.lengths, d.rows, d.new, d.ended, *d.cache.keys, *d.cache.values]
        before = [tensor.clone() for tensor in state]
        with tape:
            yield
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)

    patch.setattr(Decoder, "__init__", capturing)
    patch.setattr(torch.cuda, "CUDAGraph", Tape)
    patch.setattr(torch.cuda, "graph", capture)
    for module in (kernels.runtime, kernels.flash_decoding):  # a GPU's values are not looked at
        patch.setattr(module, "may_read", lambda tensor: False)
    return tapes


def sample_forty(static: bool = False, dtype: str = "float32") -> tuple[Tensor, Tensor]:
    """Responses of up to 40 tokens that end at different steps."""
    torch.manual_seed(0)
    model = make_gpt(end=3, n_positions=64, dtype=dtype)
    prompts = make_prompts((3, 7, 1, 5, 7, 2, 4, 6) * 5)
    tokens, lengths = generate.generate(model, *prompts, 40, 1.0, seeded(), static)
    assert len(set(lengths.tolist())) > 10
    return tokens, lengths


def check_few_batch_sizes() -> None:
    """With static batch sizes, ended rows fill up a batch; every row gets the same tokens."""
    expected = sample_forty()
    with steps_noted() as sizes:
        same_results(sample_forty(static=True), expected)
    assert set(sizes) == {40, 16, 8} and sorted(sizes, reverse=True) == sizes


def check_captured_step() -> None:
    """Steps replayed from a tape of the second one at each batch size write the same tokens."""
    expected = sample_forty()
    with pytest.MonkeyPatch.context() as patch:
        tapes = with_tapes(patch)
        same_results(sample_forty(static=True), expected)
    assert len(tapes) == 3  # for 40, 16 and 8 rows


# ------------------------------------------------------------------------------------------------
# The checks, and planted bugs that each must catch


BUGS = """
parts take the first numbers: generate.generate; check_given_random_numbers
    - "uniforms": uniforms[rows]
    + "uniforms": uniforms[: len(rows)]
parts are put back elsewhere: generate.generate; check_given_random_numbers
    - tokens[rows, : part.shape[1]], lengths[rows] = part, ends.long()
    + tokens[rows.flip(0), : part.shape[1]], lengths[rows] = part, ends.long()
not causal: model.Attention.forward; check_cached_forward
    - kernels.attention(q, k, v, lengths, **self.how)
    + F.scaled_dot_product_attention(q, k, v)
heads mixed up: model.Attention.forward; check_cached_forward
    - kernels.attention(q, k, v,
    + kernels.attention(q, k.flip(1), v,
new key missed: model.Attention.step; check_cached_forward, check_greedy
    - (positions + 1).int()
    + positions.clamp(min=1).int()
attention function ignored: model.Attention.step; check_cached_forward
    - **self.how
    + score_mod="causal"
wrong rows kept: generate.KVCache.keep_rows; check_greedy, check_rows_are_independent
    - tensor[rows]
    + tensor[rows.flip(0)]
least likely token: generate.sample; check_greedy
    - logits.argmax
    + logits.argmin
temperature ignored: generate.sample; check_sampling_distribution
    - (logits / temperature)
    + logits
one number for all rows: generate.sample; check_sampling_distribution
    - uniforms[:, None]
    + uniforms[:1, None]
numbers for the rows still there: generate.Decoder.write; check_rows_are_independent
    - self.uniforms[self.rows,
    + self.uniforms[torch.arange(len(self.rows)),
prompt's tail survives: generate.generate; check_padding
    - torch.where(inside, prompts, end)
    + prompts
rows never leave: generate.next_size; check_ended_rows_are_free
    - return going if going < 0.9 * size else size
    + return size
one randomness a prompt: generate.generate; check_repeated_prompts
    - uniforms = torch.rand(B, max_new_tokens, generator=generator, device=device)
    + uniforms = torch.rand(1, max_new_tokens, generator=generator).expand(B, -1)
new tensors each step: generate.Decoder.write; check_captured_step
    - self.new.copy_(sample(logits, uniforms, self.temperature))
    + self.new = sample(logits, uniforms, self.temperature)
value read: generate.Decoder.advance; check_captured_step
    - self.lengths[self.rows] - 1
    + self.lengths[self.rows] - (1 if self.ended.all() else 1)
graph outlives its buffers: generate.Decoder.keep; check_captured_step
    - self.graph, self.steps_here = None, 0
    + pass
rows that go on are dropped: generate.Decoder.keep; check_few_batch_sizes, check_captured_step
    - self.ended.int().argsort
    + (~self.ended).int().argsort
"""


@pytest.mark.parametrize("check", [name for name in globals() if name.startswith("check_")])
def test_property(check: str) -> None:
    globals()[check]()


@pytest.mark.parametrize("where, old, new, check", read_bugs(BUGS))
def test_planted_bug_is_caught(where, old, new, check, monkeypatch) -> None:
    plant(monkeypatch, where, old, new)
    with pytest.raises((AssertionError, IndexError, FloatingPointError)):
        globals()[check]()


# ------------------------------------------------------------------------------------------------
# bfloat16, arguments


def test_bfloat16_sampling_uses_float32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two logits whose difference bfloat16 rounds away are still told apart."""
    model, seen = make_gpt(n_embd=64, dtype="bfloat16"), []
    original = generate.sample
    monkeypatch.setattr(generate, "sample", lambda *a: seen.append(a[0]) or original(*a))
    tokens, _ = model.generate(*make_prompts(), 4)
    assert len(seen) == 4 and tokens.shape == (6, 11)
    for logits in seen:
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


def test_sampling_in_bfloat16_casts_matrices_once_and_changes_no_token(monkeypatch) -> None:
    """Against the model as it is under autocast, which casts its float32 matrices at each use."""
    tokens = sample_forty(dtype="bfloat16")
    gpt = make_gpt(dtype="bfloat16")
    decoding = for_decoding(gpt)
    assert decoding.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert gpt.h[0].mlp.c_fc.weight.dtype == torch.float32
    assert decoding.wte is gpt.wte and decoding.h[0].ln_1.weight.dtype == torch.float32
    for nothing_to_cast in (make_gpt(), gpt.frozen()):
        assert for_decoding(nothing_to_cast) is nothing_to_cast
    monkeypatch.setattr(generate, "for_decoding", lambda gpt: gpt.requires_grad_(False))
    monkeypatch.setattr(generate, "KVCache", lambda gpt, *sizes: KVCache(decoding, *sizes))
    same_results(sample_forty(dtype="bfloat16"), tokens)


def test_the_context_is_the_limit() -> None:
    model = make_gpt(n_positions=8)
    prompts, lengths = make_prompts((3, 5))
    model.generate(prompts, lengths, 3)  # 8 fit
    with pytest.raises(ValueError, match="come to 9 tokens, over n_positions 8"):
        model.generate(prompts, lengths, 4)
    tokens, new_lengths = model.generate(prompts, lengths, 0)
    assert torch.equal(tokens, prompts) and torch.equal(new_lengths, lengths)
