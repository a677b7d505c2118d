"""What a GPU does, as far as a CPU can show it: the sampling step that is captured as a CUDA graph,
gradient checkpointing, and matrices stored in 16 bits."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import kernels.flash_decoding
import kernels.runtime
from generate import KVCache, _Decoder, for_decoding, store_matrices
from model import GPT, GPTConfig, ScalarModel, forward_flops

END = 60


def make_gpt(pdrop: float = 0.0, boost: float = 0.1) -> GPT:
    """Two layers; some responses end."""
    torch.manual_seed(3)
    gpt = GPT(
        GPTConfig(
            vocab_size=61,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            eos_token_id=END,
            initializer_range=0.2,
            resid_pdrop=pdrop,
        )
    )
    with torch.no_grad():
        end = gpt.wte.weight[END]
        gpt.ln_f.bias += boost * 10 * end / end.square().sum()
    return gpt


def make_prompts(rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(END, (rows, 7), generator=generator)
    return prompts, torch.randint(1, 8, (rows,), generator=generator, dtype=torch.int32)


def sample(gpt: GPT, **kwargs) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return gpt.generate(*make_prompts(), 40, generator=generator, **kwargs)


# ------------------------------------------------------------------------------------------------
# The step of sampling


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
    init = _Decoder.__init__

    def capturing(self, *args) -> None:
        init(self, *args)
        self.captures, holder["decoder"] = True, self

    holder: dict[str, _Decoder] = {}

    class Graph:
        def __init__(self) -> None:
            tapes.append(Tape())
            self.tape = tapes[-1]

        def replay(self) -> None:
            self.tape.replay()

    class Capture:
        def __init__(self, graph: Graph):
            self.graph = graph

        def __enter__(self) -> None:
            decoder = holder["decoder"]
            self.state = [
                decoder.tokens,
                decoder.lengths,
                decoder.rows,
                decoder.new,
                decoder.ended,
                *decoder.cache.keys,
                *decoder.cache.values,
            ]
            self.before = [tensor.clone() for tensor in self.state]
            self.graph.tape.__enter__()

        def __exit__(self, *error) -> None:
            self.graph.tape.__exit__(*error)
            for tensor, before in zip(self.state, self.before, strict=True):
                tensor.copy_(before)

    patch.setattr(_Decoder, "__init__", capturing)
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", Capture)
    for module in (kernels.runtime, kernels.flash_decoding):  # a GPU's values are not looked at
        patch.setattr(module, "may_read", lambda tensor: False)
    return tapes


def check_few_batch_sizes() -> None:
    """With static batch sizes, ended rows fill up a batch; every row gets the same tokens."""
    gpt, sizes = make_gpt(), []
    tokens, lengths = sample(gpt)
    original = gpt.h[0].step
    gpt.h[0].step = lambda x, *args: sizes.append(len(x)) or original(x, *args)
    static_tokens, static_lengths = sample(gpt, _static=True)
    assert torch.equal(tokens, static_tokens) and torch.equal(lengths, static_lengths)
    assert len(set(lengths.tolist())) > 10  # rows ended at different steps
    assert set(sizes) == {40, 16, 8} and sorted(sizes, reverse=True) == sizes


def check_captured_step(patch: pytest.MonkeyPatch) -> None:
    """Steps replayed from a tape of the second one at each batch size write the same tokens."""
    gpt = make_gpt()
    tokens, lengths = sample(gpt)
    tapes = with_tapes(patch)
    replayed, replayed_lengths = sample(gpt, _static=True)
    assert len(tapes) == 3  # for 40, 16 and 8 rows
    assert torch.equal(tokens, replayed) and torch.equal(lengths, replayed_lengths)


def test_static_batch_sizes_change_no_token() -> None:
    check_few_batch_sizes()


def test_a_replayed_step_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    check_captured_step(monkeypatch)


def new_tensor_each_step(patch: pytest.MonkeyPatch) -> None:
    """The newest tokens are a new tensor each step: a graph would read the old one for ever."""
    original = _Decoder.write

    def write(self, hidden: Tensor) -> None:
        self.new, self.ended = self.new.clone(), self.ended.clone()
        original(self, hidden)

    patch.setattr(_Decoder, "write", write)


def value_read(patch: pytest.MonkeyPatch) -> None:
    original = _Decoder.advance
    patch.setattr(_Decoder, "advance", lambda self: self.ended.all().item() or original(self))


def graph_outlives_its_buffers(patch: pytest.MonkeyPatch) -> None:
    original = _Decoder.keep

    def keep(self, size: int) -> None:
        graph, steps = self.graph, self.steps_here
        original(self, size)
        self.graph, self.steps_here = graph, steps

    patch.setattr(_Decoder, "keep", keep)


def rows_that_go_on_are_dropped(patch: pytest.MonkeyPatch) -> None:
    original = _Decoder.keep

    def keep(self, size: int) -> None:
        self.ended.logical_not_()
        original(self, size)
        self.ended.logical_not_()

    patch.setattr(_Decoder, "keep", keep)


@pytest.mark.parametrize(
    "bug",
    [new_tensor_each_step, value_read, graph_outlives_its_buffers, rows_that_go_on_are_dropped],
)
def test_planted_bug_in_the_step_is_caught(bug: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_captured_step(monkeypatch)


def test_sampling_in_bfloat16_casts_matrices_once_and_changes_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the model as it is under autocast, which casts its float32 matrices at each use."""
    gpt = make_gpt()
    gpt.requires_grad_(False)  # of which autocast keeps no casts
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = sample(gpt)
        decoding = for_decoding(gpt)
        monkeypatch.setattr(generate, "for_decoding", lambda gpt: gpt)
        uncast, _ = sample(gpt)
    assert torch.equal(tokens, uncast)
    assert decoding.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert gpt.h[0].mlp.c_fc.weight.dtype == torch.float32
    assert for_decoding(gpt) is gpt  # nothing to cast
    assert decoding.wte is gpt.wte and decoding.h[0].ln_1.weight.dtype == torch.float32


def test_cache_rows_are_kept_in_order() -> None:
    cache = KVCache(
        GPTConfig(vocab_size=5, n_embd=4, n_layer=2, n_head=2, eos_token_id=0), 3, 2, torch.empty(1)
    )
    for tensors in (cache.keys, cache.values):
        for tensor in tensors:
            tensor.copy_(torch.arange(3.0)[:, None, None, None].expand_as(tensor))
    cache.keep_rows(torch.tensor([2, 2, 0]))
    for tensor in (*cache.keys, *cache.values):
        assert tensor[:, 0, 0, 0].tolist() == [2, 2, 0]


# ------------------------------------------------------------------------------------------------
# Training


def gradients(gpt: GPT, checkpointing: bool, autocast: bool) -> list[Tensor]:
    gpt = copy.deepcopy(gpt).train()
    gpt.gradient_checkpointing = checkpointing
    tokens, lengths = make_prompts(6)
    torch.manual_seed(11)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs, entropy = gpt.logprobs(tokens, lengths)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    return [parameter.grad for parameter in gpt.parameters()]


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_gradient(autocast: bool) -> None:
    gpt = make_gpt(pdrop=0.3)
    plain, again = (gradients(gpt, checkpointing, autocast) for checkpointing in (False, True))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def saved_elements(gpt: GPT) -> int:
    """Elements that a forward pass keeps for its backward, parameters left out."""
    seen: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gpt(torch.randint(END, (4, 30)))
    return sum(seen.values()) // 4


def test_gradient_checkpointing_keeps_each_blocks_input_alone() -> None:
    gpt = make_gpt()
    plain = saved_elements(gpt)
    gpt.gradient_checkpointing = True
    again = saved_elements(gpt)
    one = 4 * 30 * 32  # (B, T, C)
    assert again <= 4.5 * one < 20 * one < plain  # two blocks' inputs, the last layer norm, means


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_matrices_stored_in_bfloat16_change_no_number_under_autocast(kind: str) -> None:
    gpt = make_gpt()
    gpt = gpt if kind == "language" else ScalarModel.from_gpt(gpt)
    stored = copy.deepcopy(gpt)
    store_matrices(stored, torch.bfloat16)
    tokens, lengths = make_prompts()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        if kind == "language":
            a, b = gpt.logprobs(tokens, lengths), stored.logprobs(tokens, lengths)
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        else:
            assert torch.equal(gpt.scores(tokens, lengths), stored.scores(tokens, lengths))
    small = [p for p in stored.parameters() if p.dtype == torch.bfloat16]
    L, C = 2, 32
    assert sum(p.numel() for p in small) == L * (12 * C * C + 9 * C)


def test_embeddings_in_bfloat16_would_change_numbers() -> None:
    """The reason why `store_matrices` leaves them alone; and proof that the test above can fail."""
    gpt = make_gpt()
    stored = copy.deepcopy(gpt)
    stored.wte.to(torch.bfloat16).to(torch.float32)
    tokens, lengths = make_prompts()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        a, b = gpt.logprobs(tokens, lengths), stored.logprobs(tokens, lengths)
    assert not torch.equal(a[0], b[0])


def test_operations_of_a_forward_pass_equal_those_counted_one_by_one() -> None:
    """Against PyTorch's own counter of a model that multiplies all of attention's square."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    gpt = make_gpt()
    tokens = torch.randint(END, (3, 20))
    math_backend = sdpa_kernel(SDPBackend.MATH)  # its products are counted
    with math_backend, FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = gpt(tokens)
        hidden.reshape(-1, 32) @ gpt.unembedding.T
    counted = counter.get_total_flops()
    assert forward_flops(gpt.config, [20] * 3, 60) == pytest.approx(counted, rel=1e-6)
    L, C, V, T = 2, 32, 61, 20
    per_token = 6 * (12 * L * C * C + V * C) + 12 * L * C * T
    assert 3 * forward_flops(gpt.config, [T], T) == T * per_token
    apart = forward_flops(gpt.config, [5], 0) + forward_flops(gpt.config, [7], 0)
    assert math.isclose(forward_flops(gpt.config, [5, 7], 0), apart)
