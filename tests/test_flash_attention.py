"""Causal attention: every implementation against float64, at shapes and values where kernels go
wrong."""

import math

import pytest
import torch

from kernels import attention, flash_attention, runtime, score_mods
from kernels.check import TOLERANCE, compare
from kernels.flash_attention import IMPLS, reference, verify
from kernels.runtime import jit, tl  # noqa: F401 (Triton wants `tl` in the file of a jitted function)
from kernels.score_mods import SCORE_MODS, ScoreMod
from tests.interpreter import (
    count_calls,
    each,
    far_apart,
    gpu_or_cpu,
    gpu_tables,
    ints,
    needs_triton,
    opcheck,
)

DTYPES = [torch.float32, torch.float16]


def random_qkv(*shape, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, device=gpu_or_cpu()) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", each(IMPLS))
def test_matches_float64(impl, dtype):
    verify(impl, dtype, gpu_or_cpu())


@pytest.mark.skipif(not runtime.INTERPRETED, reason="computes in the interpreter")
@pytest.mark.parametrize("row", gpu_tables(flash_attention.TILES, ("interpreter", 8, 128)))
def test_matches_float64_with_the_tiles_of_a_gpu(row, monkeypatch):
    monkeypatch.setitem(flash_attention.TILES, ("interpreter", 8, 128), row)
    verify("triton", torch.float32, gpu_or_cpu())


@pytest.mark.parametrize("name", ["causal", "sliding_window", "alibi", "softcap", "window:7"])
def test_reference_is_the_definition(name):
    """The reference itself, against loops over single numbers that share no code with it."""
    B, H, T, D = 1, 2, 70, 3
    q, k, v = random_qkv(B, H, T, D, dtype=torch.float64)
    out = reference(q, k, v, None, name)
    for h, i in [(0, 0), (1, 1), (0, 65), (1, 69)]:
        weights = {}
        for j in range(i + 1):
            s = sum(float(q[0, h, i, d] * k[0, h, j, d]) for d in range(D)) / math.sqrt(D)
            if name == "alibi":
                s -= (i - j) * (1 / 16 if h == 0 else 1 / 256)  # 2 heads: 2^-4, 2^-8
            if name == "softcap":
                s = 30 * math.tanh(s / 30)
            if i - j < {"sliding_window": 64, "window:7": 7}.get(name, T):
                weights[j] = math.exp(s)
        for d in range(D):
            expected = sum(w * float(v[0, h, j, d]) for j, w in weights.items())
            expected /= sum(weights.values())
            assert float(out[0, h, i, d]) == pytest.approx(expected, rel=1e-12)


@needs_triton
@pytest.mark.parametrize("T, D", [(63, 64), (64, 24), (97, 128)])
def test_odd_sizes(T, D):
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 1, T, D))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    attention(q, k, v, impl="triton").backward(grad)
    reference(*exact, None, "causal").backward(grad.double())
    for name, a, e in zip("qkv", (q, k, v), exact, strict=True):
        compare(f"d{name}", a.grad, e.grad, TOLERANCE[torch.float32])


@pytest.mark.parametrize("impl", each(IMPLS))
def test_rows_past_the_length_are_zero_and_take_no_gradient(impl):
    q, k, v = (x.requires_grad_() for x in random_qkv(3, 1, 40, 16))
    out = attention(q, k, v, ints([40, 7, 0]), impl=impl)
    grad = torch.ones_like(out)
    grad[1, :, 7:] = grad[2] = float("nan")
    out.backward(grad)
    assert not out[1, :, 7:].any() and not out[2].any()
    for x in (q, k, v):
        assert x.grad[0].isfinite().all() and not x.grad[1, :, 7:].any() and not x.grad[2].any()


@pytest.mark.parametrize("impl", each(IMPLS))
def test_output_memory_is_token_major(impl):
    for name in SCORE_MODS:
        out = attention(*random_qkv(2, 3, 20, 16), score_mod=name, impl=impl)
        assert out.transpose(1, 2).is_contiguous(), name


@needs_triton
@pytest.mark.skipif(not runtime.INTERPRETED, reason="float64 runs in the interpreter only")
@pytest.mark.parametrize("name", ["causal", "softcap"])
def test_gradcheck(name):
    inputs = [x.requires_grad_() for x in random_qkv(1, 2, 4, 2, dtype=torch.float64)]
    lengths = ints([3])
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, lengths, score_mod=name, impl="triton"),
        inputs,
        fast_mode=True,
    )


@needs_triton
def test_repeated_runs_are_bitwise_equal():
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 1, 100, 16))
    runs = []
    for _ in range(2):
        # Poison what the allocator may hand out next.
        torch.empty(2, 100, 1, 16).fill_(float("nan"))
        out = attention(q, k, v, ints([100, 50]), impl="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check_offsets_do_not_wrap(module):
    """Rows, heads or tokens 1.2e9 elements apart: the third begins beyond 2^31 elements, where a
    32-bit product is negative."""
    memory = far_apart(rows=3, stride=1_200_000_000, columns=16)  # (1, 1, 3, 16), and moved
    for x in (memory[None, None], memory[None, :, None], memory[:, None, None]):
        _check_far(module, x)


def _check_far(module, x):
    compact = x.clone().contiguous()
    expected = reference(*[compact.double()] * 3, None, "causal")
    out, lse = module.triton_forward(x, x, x, None, "causal")
    compare("out", out, expected, TOLERANCE[torch.float16])
    grads = module.triton_backward(compact, x, x, x, out, lse, None, "causal")
    near = module.triton_backward(compact, *[compact] * 3, out, lse, None, "causal")
    for name, a, b in zip(("dq", "dk", "dv"), grads, near, strict=True):
        compare(name, a, b, 0.0)


@needs_triton
@pytest.mark.parametrize("size", [6e4, 1e-6])
def test_float16_gradients_neither_overflow_nor_vanish(size):
    """dout v^T is over 65504 at first; dq is what a gradient of order 1 gives, times its size."""
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 1, 40, 64, dtype=torch.float16))
    grad = torch.randn_like(q).clamp(-1, 1)
    out = attention(q, k, v, ints([37]), impl="triton")
    grad[:, :, 37:] = float("nan")
    small = [x.float() for x in torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scaled = (grad * size).half()
    reference(*exact, ints([37]), "causal").backward(scaled.double().nan_to_num())
    found = torch.autograd.grad(out, (q, k, v), scaled)
    assert all(x.abs().max() > 0.3 for x in small)
    for name, a, e in zip("qkv", found, exact, strict=True):
        # results are float16, too: near 0 in steps of 6e-8, above 65504 infinite
        steps = 6e-8 / float(e.grad.abs().max())
        e.grad.clamp_(-65504, 65504)
        compare(f"d{name}", a.clamp(-65504, 65504), e.grad, TOLERANCE[torch.float16] + steps)


@needs_triton
@pytest.mark.skipif(not runtime.INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("name", ["causal", "sliding_window"])
def test_visits_exactly_the_tiles_that_hold_a_visible_pair(name, monkeypatch):
    """So time follows real tokens: nothing above the diagonal, past the length or before the
    window."""
    T, lengths = 300, [300, 130, 0]
    q, k, v = (x.requires_grad_() for x in random_qkv(3, 1, T, 16))
    forward, d_query, d_key_value = flash_attention._tiles(q)
    index = torch.arange(T)
    window = 64 if name == "sliding_window" else T
    visible = (index <= index[:, None]) & (index > index[:, None] - window)

    def tiles(size):
        rows, columns, count = size["BLOCK_Q"], size["BLOCK_K"], 0
        for n in lengths:
            for i in range(0, n, rows):
                for j in range(0, n, columns):
                    count += bool(visible[i : min(i + rows, n), j : min(j + columns, n)].any())
        return count

    dots = count_calls(monkeypatch, "create_dot")
    out = attention(q, k, v, ints(lengths), score_mod=name, impl="triton")
    assert len(dots) == 2 * tiles(forward)
    dots.clear()
    out.sum().backward()
    assert len(dots) == 3 * tiles(d_query) + 4 * tiles(d_key_value)


@needs_triton
def test_operators_pass_opcheck_and_torch_compile():
    operators, lengths = torch.ops.kernels, ints([20, 5])
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 1, 20, 16))
    opcheck(operators.attention, [(q, k, v), lengths, "alibi"])
    with torch.no_grad():
        out, lse = operators.attention(q, k, v, lengths, "alibi")
        opcheck(operators.attention_backward, [(out, q, k, v, out, lse), lengths, "alibi"])

    def double(*x):
        return attention(*x, impl="triton") * 2

    pairs = []
    for function in (double, torch.compile(double, backend="aot_eager", fullgraph=True)):
        out = function(q, k, v)
        pairs.append((out, *torch.autograd.grad(out.sum(), k)))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


# ---- variants are one function and one entry


@jit
def _chunk_first_key(q):
    return q // 48 * 48


@jit
def _chunk_last_query(k):
    return k // 48 * 48 + 47


WIDE = {
    "first_key": score_mods.with_number(score_mods.window_first_key, 128),
    "last_query": score_mods.with_number(score_mods.window_last_query, 128),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last_query": 88}, r"wide: last_query\(0\) is 87, but by first_key it is 127"),
        ({"last_query": 108}, "wide: last_query.0. is 107, but by first_key it is 127"),
        ({"last_query": 127}, "wide: last_query.0. is 126, but by first_key it is 127"),
        ({"last_query": None}, "wide: last_query.0. is 1023, but by first_key it is 127"),
        ({"first_key": None}, "wide: last_query.0. is 127, but by first_key it is 1023"),
    ],
)
def test_bounds_that_do_not_agree_are_caught(changes, message, monkeypatch):
    """Also where the window is wider than a case, or the rest within a tile."""
    for field, size in changes.items():
        function = getattr(score_mods, f"window_{field}")
        changes = {field: size and score_mods.with_number(function, size)}
    monkeypatch.setitem(SCORE_MODS, "wide", ScoreMod(**WIDE))
    score_mods.check_fields("wide")
    monkeypatch.setitem(SCORE_MODS, "wide", ScoreMod(**WIDE | changes))
    with pytest.raises(AssertionError, match=message):
        verify("torch", torch.float32, gpu_or_cpu())


def _minus_infinity(s, q, k, head, num_heads):
    return s / (q - k > 0)  # infinite at q = k, which is not hidden


def _strictly(s, q, k, head, num_heads):
    return torch.where(k < q, s, float("-inf"))


def _next(q):
    return q + 1


def _forward_and_back(q):
    return q // 4 * 8 - q


@pytest.mark.parametrize(
    ("mod", "message"),
    [
        (ScoreMod(score=_strictly, torch_score=_strictly), "odd: query 0 sees no key"),
        (ScoreMod(first_key=_next), "odd: query 0 sees no key"),
        (ScoreMod(first_key=_forward_and_back), "odd: first_key decreases"),
        (ScoreMod(score=_minus_infinity), "odd: the score of query 0 and key 0, head 0, is NaN"),
    ],
)
def test_a_mod_that_is_no_attention_is_caught(mod, message, monkeypatch):
    monkeypatch.setitem(SCORE_MODS, "odd", mod)
    with pytest.raises(AssertionError, match=message):
        score_mods.check_fields("odd")


@jit
def _distance(s, q, k, head, num_heads):
    return s - 0.1 * tl.sqrt((q - k).to(tl.float32))


def _distance_torch(s, q, k, head, num_heads):
    assert (k <= q).all()
    return s - 0.1 * (q - k).sqrt()


@needs_triton
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_score_may_stand_under_a_root(monkeypatch):
    """No pair that it gets is hidden."""
    mod = ScoreMod(score=_distance, torch_score=_distance_torch)
    monkeypatch.setitem(SCORE_MODS, "distance", mod)
    monkeypatch.setattr(flash_attention, "CASES", [(1, 2, 140, 16, [133], "distance", 0.0)])
    for impl in ("torch", "triton"):
        verify(impl, torch.float32, gpu_or_cpu())


@needs_triton
def test_a_score_of_tl_functions_wants_a_twin(monkeypatch):
    monkeypatch.setitem(SCORE_MODS, "distance", ScoreMod(score=_distance))
    with pytest.raises(ValueError, match="'_distance' does not take torch tensors; give torch_sc"):
        attention(*random_qkv(1, 1, 8, 16), score_mod="distance", impl="torch")


@pytest.mark.parametrize("impl", each(IMPLS))
def test_a_score_mod_with_a_number(impl):
    """Each number is a function of its own; a window over the whole row is causal."""
    q, k, v = random_qkv(1, 2, 100, 16)
    index = torch.arange(100, device=q.device)
    for size in (1, 10, 64, 100):
        out = attention(q, k, v, score_mod=f"window:{size}", impl=impl)
        visible = (index <= index[:, None]) & (index > index[:, None] - size)
        s = (q @ k.mT / 4).masked_fill(~visible, float("-inf"))
        torch.testing.assert_close(out, s.softmax(-1) @ v, rtol=1e-5, atol=1e-5)
    same = attention(q, k, v, score_mod="window:64", impl=impl)
    assert torch.equal(same, attention(q, k, v, score_mod="sliding_window", impl=impl))


@needs_triton
def test_a_new_score_mod_is_one_entry(monkeypatch):
    """Attention within chunks of 48 tokens: also rows whose first visited tile hides every key from
    them."""
    chunked = ScoreMod(first_key=_chunk_first_key, last_query=_chunk_last_query)
    monkeypatch.setitem(SCORE_MODS, "chunked", chunked)
    monkeypatch.setattr(flash_attention, "CASES", [(1, 1, 140, 16, [133], "chunked", 0.0)])
    assert verify("triton", torch.float32, gpu_or_cpu()) == pytest.approx(0, abs=1e-5)
    q, k, v = random_qkv(1, 1, 96, 16)
    chunks = [attention(*(x[:, :, i : i + 48] for x in (q, k, v))) for i in (0, 48)]
    joined = torch.cat(chunks, dim=2)
    torch.testing.assert_close(attention(q, k, v, score_mod="chunked", impl="triton"), joined)


# ---- refusals


def test_errors_name_argument_value_and_remedy(monkeypatch):
    q, k, v = random_qkv(2, 2, 8, 16)
    good = {"q": q, "k": k, "v": v, "lengths": ints([8, 8])}
    longs = good["lengths"].long()
    mods = "choose one of causal, .*sliding_window.*window:NUMBER, or add an entry"
    wrong = [
        ({"q": q[0]}, r"q has shape \(2, 8, 16\); expected \(B, H, T, D\)"),
        ({"k": k[:, :, :4]}, r"k has shape \(2, 2, 4, 16\) but q has"),
        ({"v": v[:1]}, r"v has shape \(1, 2, 8, 16\) but q has"),
        ({"k": k.double()}, "k has dtype torch.float64 but q has torch.float32; convert"),
        ({"q": q.int(), "k": k.int(), "v": v.int()}, "q has dtype torch.int32; expected one of"),
        ({"v": v.mT.contiguous().mT}, r"v has last stride 8; expected 1: call .contiguous\(\)"),
        ({"lengths": longs}, r"lengths has dtype torch.int64; expected torch.int32: call .int\(\)"),
        ({"lengths": ints([8])}, r"lengths has shape \(1,\); expected \(2,\)"),
        ({"score_mod": "causual"}, f"score_mod 'causual' is unknown; {mods}"),
        (
            {"score_mod": "window"},
            "score_mod 'window': expected a number after the colon, found ''",
        ),
        ({"score_mod": "window:x"}, "score_mod 'window:x': expected a number after the colon"),
        ({"score_mod": "window:0"}, "score_mod 'window:0': expected a whole number from 1, as in"),
        ({"score_mod": "window:2.5"}, "score_mod 'window:2.5': expected a whole number from 1"),
        ({"score_mod": "doors:3"}, f"score_mod 'doors:3' is unknown; {mods}"),
        ({x: good[x][..., :0] for x in "qkv"}, r"q has shape \(2, 2, 8, 0\); expected a head size"),
        ({"k": k[..., :1].expand_as(k)}, "k has last stride 0; expected 1: call .contiguous"),
        ({"impl": "tritn"}, "impl 'tritn' is unknown to attention; choose one of auto, .*torch"),
    ]
    if not torch.cuda.is_available():  # on a GPU reading the values would wait for it
        wrong.append(({"lengths": ints([9, 8])}, r"lengths has value 9; expected 0..8"))
        wrong.append(({"lengths": ints([1, -1])}, r"lengths has value -1; expected 0..8"))
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            attention(**good | changes)
    monkeypatch.setattr(runtime, "triton", None)
    with pytest.raises(ValueError, match="not installed; install it or use impl='torch'"):
        attention(q, k, v, impl="triton")


@needs_triton
def test_errors_of_the_triton_implementation(monkeypatch):
    if runtime.INTERPRETED:
        with pytest.raises(ValueError, match="bfloat16 in Triton's interpreter"):
            attention(*random_qkv(1, 1, 4, 16, dtype=torch.bfloat16), impl="triton")
    with pytest.raises(ValueError, match="head size 160 is larger than the Triton kernels' 128"):
        attention(*random_qkv(1, 1, 4, 160), impl="triton")
    doubles = [x.cpu() for x in random_qkv(1, 1, 4, 16, dtype=torch.float64)]
    with runtime.recording("sm_90"), pytest.raises(ValueError, match="Triton has no float64 tiles"):
        flash_attention.triton_forward(*doubles, None, "causal")
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(ValueError, match="on cpu; move them to CUDA, or set TRITON_INTERPRET=1"):
        attention(*(x.cpu() for x in random_qkv(1, 1, 4, 16)), impl="triton")


def test_plain_functions_serve_both_languages():
    """Bounds are operators alone, so the torch implementations call what the kernels compile."""
    first, last = (score_mods.plain(SCORE_MODS["sliding_window"][i]) for i in (0, 1))
    assert all(first(last(k)) == k for k in range(300))
    index = torch.arange(300)
    assert torch.equal(first(last(index)), index)
