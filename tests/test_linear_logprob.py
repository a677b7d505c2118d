"""Log-probability of the target and entropy: every implementation against float64 and other
libraries' definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from kernels import linear_logprob, logprobs, runtime
from kernels.check import TOLERANCE, compare
from kernels.linear_logprob import IGNORE, IMPLS, reference, verify
from tests.interpreter import each, far_apart, gpu_or_cpu, gpu_tables, needs_triton, opcheck


def random_case(N, V, C, dtype=torch.float32):
    device = gpu_or_cpu()
    hidden, weight = torch.randn(N, C, device=device), torch.randn(V, C, device=device) * 0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (N,), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", each(IMPLS))
def test_matches_float64(impl, dtype):
    verify(impl, dtype, gpu_or_cpu())


@pytest.mark.skipif(not runtime.INTERPRETED, reason="computes in the interpreter")
@pytest.mark.parametrize("row", gpu_tables(linear_logprob.TILES, ("interpreter", 8)))
def test_matches_float64_with_the_tiles_of_a_gpu(row, monkeypatch):
    monkeypatch.setitem(linear_logprob.TILES, ("interpreter", 8), row)
    verify("triton", torch.float32, gpu_or_cpu())


def test_reference_is_the_definition():
    """The reference itself, against cross_entropy and torch.distributions."""
    hidden, weight, targets = random_case(9, 31, 4, torch.float64)
    targets[3] = IGNORE
    chosen, entropy = reference(hidden, weight, targets, 0.7)
    logits = hidden @ weight.T / 0.7
    torch.testing.assert_close(chosen, -F.cross_entropy(logits, targets, reduction="none"))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    expected[3] = 0.0
    torch.testing.assert_close(entropy, expected)


@pytest.mark.parametrize("impl", each(IMPLS))
def test_vocabulary_of_gpt2(impl):
    """V = 50257 is a multiple of nothing; the last entry is in the last, partial tile."""
    hidden, weight, targets = random_case(3, 50257, 16)
    targets[1] = 50256
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    out = logprobs(*inputs, targets, impl=impl)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact, targets, 1.0)
    torch.autograd.backward(out, [torch.ones_like(x) for x in out])
    torch.autograd.backward(expected, [torch.ones_like(x) for x in expected])
    for name, a, e in zip(("logprobs", "entropy"), out, expected, strict=True):
        compare(name, a.detach(), e.detach(), 1e-6)
    for name, a, e in zip(("hidden", "weight"), inputs, exact, strict=True):
        compare(f"gradient of {name}", a.grad, e.grad, TOLERANCE[torch.float32])


def check_confident_targets(module, impl="triton"):
    """Targets with p about 0.99 in 16-bit inputs: the gradient p - 1 vanishes if p is rounded to 16
    bits."""
    N, V, C = 8, 12, 16
    targets = torch.randint(V, (N,))
    weight = torch.randn(V, C)
    # Logit 6.5, the others 0.
    hidden = 6.5 * F.one_hot(targets, V).float() @ torch.linalg.pinv(weight).T
    hidden, weight, targets = (x.to(gpu_or_cpu()) for x in (hidden.half(), weight.half(), targets))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    chosen, _ = reference(*exact, targets, 1.0)
    assert (chosen.exp() > 0.97).all() and (chosen.exp() < 0.995).all()
    chosen.sum().backward()
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    module.logprobs(*inputs, targets, impl=impl)[0].sum().backward()
    # Each by itself: a row with a large gradient must not hide one with a small.
    for row in range(N):
        compare(f"gradient of hidden row {row}", inputs[0].grad[row], exact[0].grad[row], 4e-3)


def test_confident_targets():
    check_confident_targets(linear_logprob, "torch")


def check_stretches(module, impl="triton"):
    """A backward that needs several workspaces, and a forward of several stretches."""
    hidden, weight, targets = random_case(4, 2600, 16)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    before, module.WORKSPACE_BYTES = module.WORKSPACE_BYTES, 1
    try:
        for (out, _), source in (
            (module.logprobs(*inputs, targets, impl=impl), inputs),
            (reference(*exact, targets, 1.0), exact),
        ):
            torch.autograd.grad(out.sum(), source, retain_graph=True)
            out.sum().backward()
    finally:
        module.WORKSPACE_BYTES = before
    for name, a, e in zip(("hidden", "weight"), inputs, exact, strict=True):
        compare(f"gradient of {name}", a.grad, e.grad, TOLERANCE[torch.float32])


def check_sums_are_float32(module, impl="triton"):
    """60 workspaces, of which each adds the same 8.5 sixteen-bit steps: sums in 16 bits drift."""
    hidden, weight = torch.zeros(1, 16), torch.zeros(60 * 512, 16)
    weight[:, 0], weight[5, 0] = 1.0, 4.0
    hidden, weight = (x.half().to(gpu_or_cpu()).requires_grad_() for x in (hidden, weight))
    targets = torch.tensor([5], device=hidden.device)
    before, module.WORKSPACE_BYTES = module.WORKSPACE_BYTES, 1
    try:
        module.logprobs(hidden, weight, targets, impl=impl)[0].sum().backward()
    finally:
        module.WORKSPACE_BYTES = before
    compare("gradient of hidden", hidden.grad[:, 0], torch.full((1,), 3.0 - 3 / (60 * 512)), 4e-3)


@needs_triton
@pytest.mark.parametrize("size, x, w", [(1e5, 0.1, 0.1), (1e-7, 3000.0, 3e-4)])
def test_float16_gradients_neither_overflow_nor_vanish(size, x, w):
    """Upstream gradients that float16 does not have, where the results are numbers that it has."""
    hidden, weight, targets = random_case(20, 100, 16)
    inputs = [t.half().requires_grad_() for t in (hidden * x, weight * w)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    for source, function in ((inputs, logprobs), (exact, reference)):
        how = {"impl": "triton"} if function is logprobs else {"temperature": 1.0}
        (function(*source, targets, **how)[0].sum() * size).backward()
    compare("gradient of weight", inputs[1].grad, exact[1].grad, TOLERANCE[torch.float16])
    if size > 1:
        compare("gradient of hidden", inputs[0].grad, exact[0].grad, TOLERANCE[torch.float16])


def test_sums_are_float32():
    check_sums_are_float32(linear_logprob, "torch")


@pytest.mark.parametrize("impl", each(IMPLS))
def test_gradcheck(impl):
    if runtime.needs_triton(IMPLS[impl]) and not runtime.INTERPRETED:
        pytest.skip("float64 runs in the interpreter only")
    hidden, weight, _ = random_case(4, 7, 3, torch.float64)
    targets = torch.tensor([2, 6, IGNORE, 0], device=hidden.device)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda h, w: logprobs(h, w, targets, temperature=0.7, impl=impl), inputs, fast_mode=True
    )


def largest_allocation(function) -> int:
    """Bytes of the largest piece of memory that a call asks torch for, also within an operator of
    its own."""
    cuda = gpu_or_cpu() == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=True) as log:
        function()
    events = log.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("impl", each(IMPLS))
def test_never_holds_all_logits(impl, monkeypatch):
    N, V = 400, 2000
    hidden, weight, targets = random_case(N, V, 8)
    hidden.requires_grad_()
    weight.requires_grad_()

    def call(function, **how):
        chosen, entropy = function(hidden, weight, targets, **how)
        (chosen.sum() + entropy.sum()).backward()

    monkeypatch.setattr(linear_logprob, "WORKSPACE_BYTES", N * 512 * 4)
    assert largest_allocation(lambda: call(logprobs, impl=impl)) < 4 * N * V / 2
    # what does hold them is seen, also within an operator
    assert largest_allocation(lambda: call(reference, temperature=1.0)) >= 4 * N * V
    if impl == "triton":
        monkeypatch.setattr(linear_logprob, "WORKSPACE_BYTES", 2**40)
        assert largest_allocation(lambda: call(logprobs, impl=impl)) >= 4 * N * V


@pytest.mark.parametrize("impl", each(IMPLS))
def test_result_does_not_depend_on_the_other_tokens(impl):
    """Tile sizes are fixed, so a token's numbers are the same in every batch, to the bit in
    Triton."""
    hidden, weight, targets = random_case(70, 300, 16)
    many = logprobs(hidden, weight, targets, impl=impl)
    few = logprobs(hidden[:5], weight, targets[:5], impl=impl)
    for a, b in zip(many, few, strict=True):
        torch.testing.assert_close(a[:5], b, rtol=0, atol=0 if impl == "triton" else 1e-5)


@pytest.mark.parametrize("impl", each(IMPLS))
def test_no_tokens_and_only_ignored_tokens(impl):
    for targets in (torch.empty(0, dtype=torch.int64), torch.full((3,), IGNORE)):
        hidden, weight, _ = random_case(len(targets), 20, 8)
        hidden.requires_grad_()
        weight.requires_grad_()
        chosen, entropy = logprobs(hidden, weight, targets.to(hidden.device), impl=impl)
        (chosen.sum() + entropy.sum()).backward()
        assert chosen.shape == targets.shape and not chosen.any() and not entropy.any()
        assert not hidden.grad.any() and not weight.grad.any()


@needs_triton
def test_repeated_runs_are_bitwise_equal():
    hidden, weight, targets = random_case(50, 700, 16)
    hidden.requires_grad_()
    weight.requires_grad_()
    runs = []
    for _ in range(2):
        torch.empty(50, 512).fill_(float("nan"))  # poison what the allocator may hand out next
        out = logprobs(hidden, weight, targets, impl="triton")
        runs.append((*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check_offsets_do_not_wrap(module):
    """Rows 1.2e9 elements apart: the third begins beyond 2^31 elements, where a 32-bit product is
    negative.

    64 x 1024 tokens x 50257 logits are also beyond it.
    """
    x = far_apart(rows=3, stride=1_200_000_000, columns=16)
    targets = torch.tensor([1, 2, 0], device=x.device)
    compact = x.clone().contiguous()
    near = module.triton_forward(compact, compact, targets, 1.0)
    far = module.triton_forward(x, x, targets, 1.0)
    for name, a, b in zip(("logprobs", "entropy", "lse"), far, near, strict=True):
        compare(name, a, b, 0.0)


@needs_triton
def test_operators_pass_opcheck_and_torch_compile():
    operators = torch.ops.kernels
    hidden, weight, targets = random_case(5, 20, 16)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    opcheck(operators.logprobs, [inputs, targets, 0.9])
    with torch.no_grad():
        chosen, entropy, lse = operators.logprobs(*inputs, targets, 0.9)
        upstream = chosen, entropy, *inputs, targets, entropy, lse
        opcheck(operators.logprobs_backward, [upstream, 0.9])

    def plain(*x):
        return logprobs(*x, impl="triton")[0]

    pairs = []
    for function in (plain, torch.compile(plain, backend="aot_eager", fullgraph=True)):
        out = function(hidden, weight, targets)
        pairs.append((out, *torch.autograd.grad(out.sum(), weight)))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_errors_name_argument_value_and_remedy():
    x, w, y = random_case(4, 20, 8)
    good = {"hidden": x, "weight": w, "targets": y}
    wrong = [
        ({"hidden": x[None]}, r"hidden has shape \(1, 4, 8\); expected \(N, C\): use .flatten"),
        ({"weight": w[:, :5]}, r"weight has shape \(20, 5\); expected \(V, 8\)"),
        ({"weight": w.double()}, "weight has dtype torch.float64 but hidden has torch.float32"),
        ({"weight": w.T.contiguous().T}, "weight has last stride 20; expected 1"),
        ({"targets": y[:3]}, r"targets has shape \(3,\); expected \(4,\)"),
        ({"targets": y.int()}, "targets has dtype torch.int32; expected torch.int64: call .long"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        (
            {"impl": "cuda"},
            "impl 'cuda' is unknown to logprobs; choose one of auto, .*torch.*triton",
        ),
    ]
    if not torch.cuda.is_available():  # on a GPU reading the values would wait for it
        wrong.append(({"targets": y + 20}, r"targets has value \d+; expected 0..19, or -100"))
        wrong.append(({"targets": y * 0 - 1}, "targets has value -1; expected 0..19"))
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            logprobs(**good | changes)
    doubles = [tensor.double().cpu() for tensor in (x, w)]
    with runtime.recording("sm_90"), pytest.raises(ValueError, match="Triton has no float64 tiles"):
        linear_logprob.triton_forward(*doubles, y.cpu(), 1.0)


@pytest.mark.parametrize("impl", each(IMPLS))
def test_targets_of_any_stride(impl):
    """A column of a table, and one target for all."""
    hidden, weight, targets = random_case(6, 40, 8)
    table = torch.stack((targets, targets.flip(0)), 1)
    for strided in (table[:, 1], targets[:1].expand(6), table.flatten()[1::2]):
        expected = reference(hidden.double(), weight.double(), strided, 1.0)
        for a, e in zip(logprobs(hidden, weight, strided, impl=impl), expected, strict=True):
            compare("output", a, e, 1e-5)
