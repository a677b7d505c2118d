"""--kernels: a new implementation is one function and one line; it is checked and it trains."""

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import kernels
import train_ppo
import train_sft
from kernels import flash_attention, flash_decoding, linear_logprob, runtime
from kernels.runtime import Impl
from tests.interpreter import gpu_or_cpu, needs_triton
from tests.tiny import Tiny

MODULES = {
    "attention": flash_attention,
    "decode_attention": flash_decoding,
    "logprobs": linear_logprob,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Calls of (operation, implementation); "test_only" is an attention that only the test has."""
    count = Counter()

    def register(operation: str, name: str, function) -> None:
        def counted(*args):
            count[operation, name] += 1
            return function(*args)

        monkeypatch.setitem(MODULES[operation].IMPLS, name, counted)

    register("attention", "test_only", flash_attention.reference)
    register("logprobs", "other", linear_logprob.reference)
    for operation, module in MODULES.items():
        register(operation, "torch", module.IMPLS["torch"])
    return count


def used(calls: Counter) -> set:
    return {key for key, number in calls.items() if number}


def test_an_sft_run_trains_with_mine(calls: Counter, tiny: Tiny, tmp_path: Path) -> None:
    more = ("--max_steps", "1", "--kernels", "attention=test_only,logprobs=torch")
    assert train_sft.main(tiny.args("sft", tmp_path / "sft", *more)) == 0
    assert used(calls) == {("attention", "test_only"), ("logprobs", "torch")}


def test_a_ppo_iteration_trains_with_mine(calls: Counter, tiny: Tiny, tmp_path: Path) -> None:
    more = ("--max_steps", "1", "--kernels", "attention=test_only,logprobs=torch")
    assert train_ppo.main(tiny.args("ppo", tmp_path / "ppo", *more)) == 0
    others = {("decode_attention", "torch"), ("logprobs", "torch")}  # "auto" samples
    assert used(calls) == {("attention", "test_only")} | others


@pytest.mark.parametrize("operation", MODULES)
def test_a_wrong_implementation_is_caught(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its file's `verify`, which looks at every entry of IMPLS."""
    module = MODULES[operation]

    def test_only(*args):
        out = module.reference(*args)
        return tuple(x * 1.1 for x in out) if isinstance(out, tuple) else out * 1.1

    monkeypatch.setitem(module.IMPLS, "test_only", test_only)
    with pytest.raises(AssertionError, match=f"{operation} test_only"):
        module.verify("test_only", torch.float32, gpu_or_cpu())


def test_one_name_is_used_where_it_is_and_the_run_says_what_else_runs(
    calls: Counter, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ("--max_steps", "1", "--device", "cpu", "--kernels", "other")
    assert train_sft.main(tiny.args("sft", tmp_path / "sft", *more)) == 0
    assert used(calls) == {("attention", "torch"), ("logprobs", "other")}
    assert (
        "kernels attention=torch,decode_attention=torch,logprobs=other;" in capsys.readouterr().out
    )


@needs_triton
def test_an_entry_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its name: a plain function called triton runs anywhere, and one that needs Triton is
    refused under any name."""
    q, k, v = (torch.randn(1, 1, 4, 16) for _ in range(3))
    impls = {"triton_free": flash_attention.attention_torch}
    impls["mine"] = Impl(flash_attention.attention_triton, needs_triton=True)
    impls["forgot"] = flash_attention.attention_triton
    for name, impl in impls.items():
        monkeypatch.setitem(flash_attention.IMPLS, name, impl)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    assert kernels.attention(q, k, v, impl="triton_free").shape == q.shape
    with pytest.raises(ValueError, match="impl 'mine' got tensors on cpu; move them to CUDA"):
        kernels.attention(q, k, v, impl="mine")
    with pytest.raises(ValueError, match="kernel 'forward_kernel' got tensors on cpu; move them"):
        kernels.attention(q, k, v, impl="forgot")
    if not torch.cuda.is_available():
        monkeypatch.setattr(runtime, "INTERPRETED", True)
        halves = [x.bfloat16() for x in (q, k, v)]
        with pytest.raises(ValueError, match="kernel 'forward_kernel' got bfloat16"):
            kernels.attention(*halves, impl="forgot")


@pytest.mark.parametrize(
    "text",
    ["auto", "torch", "attention=test_only", "logprobs=torch,attention=test_only", "test_only"],
)
def test_what_exists_is_accepted(text: str, calls: Counter) -> None:
    assert kernels.implementation(text) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("tritn", "'tritn' is unknown to attention; choose one of auto, {attention}"),
        (
            "attention=yours",
            "'yours' is unknown to attention; choose one of auto, {attention}",
        ),
        ("logprobs=torch,logprobs=triton", "names logprobs twice; give one"),
        (
            "logprobs=test_only",
            "'test_only' is unknown to logprobs; choose one of auto, {logprobs}",
        ),
        (
            "atention=test_only",
            "unknown operation 'atention'; choose from attention, decode_attention",
        ),
        ("attention=test_only,", "unknown operation ''; choose from attention, decode_attention"),
        ("attention=", "'' is unknown to attention"),
    ],
)
def test_what_does_not_exist_is_named(text: str, message: str, calls: Counter) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kernels.implementation(text)
    known = {operation: ", ".join(module.IMPLS) for operation, module in MODULES.items()}
    assert message.format(**known) in str(error.value)


def test_the_banner_says_what_runs(monkeypatch: pytest.MonkeyPatch, calls: Counter) -> None:
    assert kernels.resolve("auto", "cpu") == kernels.resolve("torch", "cuda") == "torch"
    assert kernels.resolve("attention=torch", "cpu") == "torch"
    monkeypatch.setattr(runtime, "triton", object())
    assert kernels.resolve("auto", "cuda") == "triton"
    fallback = "attention=triton,decode_attention=triton,logprobs=other"
    assert kernels.resolve("other", "cuda") == fallback
    mixed = "attention=test_only,decode_attention=triton,logprobs=torch"
    assert kernels.resolve("logprobs=torch,attention=test_only", "cuda") == mixed
    monkeypatch.setattr(runtime, "triton", None)
    assert kernels.resolve("auto", "cuda") == "torch"


def test_names_are_looked_up_on_first_use() -> None:
    """So `python -m` can choose the interpreter before Triton is imported and load a file once."""
    code = """
import runpy, sys, kernels
assert "torch" not in sys.modules and "triton" not in sys.modules
for file in kernels.OPERATIONS.values():
    runpy.run_module(f"kernels.{file}", run_name="main")
    assert f"kernels.{file}" not in sys.modules, file
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_what_a_run_prints_can_be_given_back() -> None:
    """One operation's name ends with another's."""
    from kernels.runtime import implementation, resolve

    shown = resolve("auto", "cpu")
    both = "attention=torch,decode_attention=torch"
    assert implementation(shown) == shown and implementation(both) == both
    with pytest.raises(argparse.ArgumentTypeError, match="names attention twice"):
        implementation("attention=torch,decode_attention=torch,attention=torch")
