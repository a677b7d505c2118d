"""The memory plan against what models, caches, optimizers and forward passes really hold; and the
timing command at a tiny size."""

import argparse
import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
import train_rm
import train_sft
from checkpoint import GPT2_NAMES
from generate import KVCache, store_matrices
from model import GPT, GPTConfig, Linear, ScalarModel
from tests import throughput
from tests.throughput import SHAPES, STAGES, main, memory_plan, parameters, stage_args

SMALL = GPTConfig(vocab_size=101, n_positions=64, n_embd=64, n_layer=3, n_head=4, eos_token_id=0)
CPU = ["--device", "cpu"]


def meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def size_of(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_shapes_and_parameters_are_gpt2_s(name: str, published: int) -> None:
    model = meta(SHAPES[name])
    matrices = sum(
        p.numel() for m in model.modules() if isinstance(m, Linear) for p in m.parameters()
    )
    assert parameters(SHAPES[name]) == (published, matrices) == (model.num_parameters, matrices)


def planned(stage: str, config: GPTConfig, *flags: str) -> tuple[dict, argparse.Namespace]:
    args = stage_args(stage, "tiny", [*CPU, *flags])
    return memory_plan(stage, config, args), args


def test_what_ppo_holds_is_what_models_and_caches_take() -> None:
    config = SHAPES["gpt2"]
    args = stage_args("ppo", "gpt2", [*CPU, "--rollout_size", "2"])
    plan = memory_plan("ppo", config, args)
    model = meta(config)
    assert plan["policy"] == plan["average"] == plan["value_network"] == size_of(model)
    store_matrices(model, torch.bfloat16)
    assert plan["frozen"] == 2 * size_of(model)
    cache = KVCache(config, 2, 768, torch.empty(1, dtype=torch.bfloat16))
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    # beside the cache: matrices cast once; a prompt token's residual, norm, its cast, and the MLP;
    # logits, probabilities and sums of a step
    C, rows = config.n_embd, 2
    casts = sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16)
    assert plan["rollout"] == held + casts + rows * (512 * C * 26 + 16 * 50257)


def test_optimizers_hold_what_is_planned() -> None:
    model = GPT(SMALL)
    optimizer = throughput.adamw(model, 1e-3)
    model.logprobs(torch.zeros(1, 4, dtype=torch.int64))[0].sum().backward()
    optimizer.step()
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim()
    )
    plan, _ = planned("sft", SMALL)
    assert moments == plan["adam"]
    assert sum(p.grad.nbytes for p in model.parameters()) == plan["gradients"] == plan["weights"]


def test_planned_activations_of_a_reward_model() -> None:
    """2 prompts of 30 tokens with 9 responses of 20 each, prompts computed once."""
    flags = ["--max_prompt_tokens", "30", "--max_new_tokens", "20", "--micro_batch_size", "2"]
    plan, args = planned("rm", SMALL, *flags)
    model = ScalarModel(SMALL)
    groups = []
    for _ in range(2):
        prompt = torch.randint(101, (30,)).tolist()
        sequences = [prompt + torch.randint(101, (20,)).tolist() for _ in range(9)]
        groups.append(train_rm.Comparison(sequences, [(0, 1)], prompt_tokens=30))
    parameters, seen, kept = {p.shape for p in model.parameters()}, {}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape not in parameters and tensor.dtype == torch.float32:  # not the indices
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # alive, so that no two have one address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train_rm.score_all(model, groups, args)
    assert plan["activations"] == pytest.approx(sum(seen.values()), rel=0.15)


def kept_for_backward(checkpointing: bool, dtype: str, pdrop: float) -> int:
    """Bytes that a forward pass of `SMALL` on 4 rows of 50 keeps, without its parameters and what
    autocast makes of them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**vars(SMALL) | {"resid_pdrop": pdrop})).train()
    model.gradient_checkpointing = checkpointing
    parameters = {p.shape for p in model.parameters()} | {
        (p.T.shape) for p in model.parameters() if p.dim() == 2
    }
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape not in parameters:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # alive, so that no two have one address
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
        model(torch.randint(101, (4, 50)))
    return sum(seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pdrop", [0.0, 0.2])
def test_planned_activations_are_what_a_forward_pass_keeps(dtype: str, pdrop: float) -> None:
    flags = ["--max_prompt_tokens", "30", "--max_new_tokens", "20", "--micro_batch_size", "4"]
    plan, _ = planned("sft", SMALL, *flags, "--dtype", dtype, "--resid_pdrop", str(pdrop))
    kept = kept_for_backward(False, dtype, pdrop)
    assert plan["activations"] == pytest.approx(kept, rel=0.15)


def test_planned_activations_with_checkpointing() -> None:
    flags = ["--max_prompt_tokens", "30", "--max_new_tokens", "20", "--micro_batch_size", "4"]
    args = stage_args("sft", "tiny", [*CPU, *flags, "--resid_pdrop", "0", "--grad_checkpointing"])
    plan = memory_plan("sft", SMALL, args)
    one_block = kept_for_backward(False, "float32", 0.0) / 3
    kept = kept_for_backward(True, "float32", 0.0)
    assert plan["activations"] == pytest.approx(kept + one_block, rel=0.15)


def test_a_plan_by_hand() -> None:
    """C = 10, L = 1, V = 7, 2 rows of 5 tokens, all in float32."""
    config = GPTConfig(vocab_size=7, n_positions=5, n_embd=10, n_layer=1, n_head=1, eos_token_id=0)
    flags = ["--max_prompt_tokens", "3", "--max_new_tokens", "2", "--micro_batch_size", "2"]
    P = 70 + 50 + 3 * 100 + 30 + 100 + 10 + 400 + 40 + 400 + 10 + 4 * 10 + 2 * 10
    assert parameters(config)[0] == P
    plan, _ = planned("ppo", config, *flags, "--batch_size", "8", "--rollout_size", "4")
    activations = 64 * 10 * 10
    head = 12 * 70 + 8 * 10 * 10 + 2**26
    update = 8 * P + activations + head
    rollout = 2 * 4 * 10 * 4 * 5 + 44 * 10 * 4 * 3 + 16 * 7 * 4
    assert plan["update"] == update and plan["rollout"] == rollout
    assert plan["total"] == (3 + 4 + 2) * 4 * P + max(update, rollout)
    rm, _ = planned("rm", config, *flags)
    # 2 prompts of 3 tokens with 9 responses of 2 each: 42 tokens, in rows of 90
    assert rm["total"] == 16 * P + 52 * 10 * 42 + 16 * 10 * 90 + 4 * 70


@pytest.mark.parametrize("stage", STAGES)
def test_124m_fits_12_gb_and_1558m_fits_80_gb(stage: str) -> None:
    """With a tenth to spare, for fragmentation and the driver."""
    for name, limit in (("gpt2", 12e9), ("gpt2-xl", 80e9)):
        args = stage_args(stage, name, CPU)
        assert 1.1 * memory_plan(stage, SHAPES[name], args)["total"] < limit
    # What makes it fit: without these it does not.
    if stage == "ppo":
        for flags in (
            ["--frozen_dtype", "float32", "--rollout_size", "128"],
            ["--no-grad_checkpointing", "--micro_batch_size", "16"],
        ):
            args = stage_args(stage, "gpt2-xl", [*CPU, *flags])
            assert memory_plan(stage, SHAPES["gpt2-xl"], args)["total"] > 80e9


def test_the_plan_is_printed_for_each_preset_and_stage(capsys: pytest.CaptureFixture) -> None:
    assert main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [preset, stage] for preset in ("tiny", *GPT2_NAMES) for stage in STAGES
    ]
    total = memory_plan("ppo", SHAPES["gpt2-xl"], stage_args("ppo", "gpt2-xl", CPU))["total"]
    assert lines[-1].endswith(f"total {total / 2**30:.2f}")


FAST = [
    "--",
    "--device",
    "cpu",
    "--batch_size",
    "8",
    "--max_prompt_tokens",
    "12",
    "--max_new_tokens",
    "6",
    "--peak_tflops",
    "0.5",
]


def test_timings_at_a_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "new" / "throughput.csv"
    assert main(["--repeats", "2", "--out", str(path), *FAST]) == 0
    with open(path, encoding="utf-8") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["sft_step", "rm_step", "rollout", "scoring", "update", "ppo_iteration"]
    for row in rows.values():
        assert 0 < float(row["p20_s"]) <= float(row["p50_s"]) <= float(row["p80_s"])
        assert float(row["mfu"]) == pytest.approx(float(row["tflop_per_s"]) / 0.5, rel=0.01)
        assert row["torch"] == torch.__version__ and row["device"].startswith("CPU")
        assert row["peak_gib"] == row["note"] == "" and float(row["plan_gib"]) > 0
    tokens = {what: float(row["tok_per_s"]) * float(row["p50_s"]) for what, row in rows.items()}
    assert tokens["sft_step"] == pytest.approx(8 * 18, rel=0.01)
    assert tokens["rm_step"] == pytest.approx((4 + 5 + 6 + 7 + 8 + 9 + 4 + 5) * 18, rel=0.01)
    assert tokens["rollout"] <= 8 * 6 * 1.01
    parts = sum(float(rows[what]["p50_s"]) for what in ("rollout", "scoring", "update"))
    assert parts == pytest.approx(float(rows["ppo_iteration"]["p50_s"]), rel=0.5)
    assert capsys.readouterr().out.count("\n") == 7


def test_out_of_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_sft, "backward", full)
    path = tmp_path / "throughput.csv"
    assert main(["--stages", "sft", "--out", str(path), *FAST]) == 0
    with open(path, encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["what"], row["note"], row["p50_s"]) == ("sft", "out of memory", "")


def test_operations_on_paper_are_those_of_the_timed_work() -> None:
    flags = [*CPU, "--batch_size", "8", "--max_prompt_tokens", "12", "--max_new_tokens", "6"]
    for stage in ("sft", "rm"):
        args = stage_args(stage, "tiny", flags)
        _, about = throughput.supervised(stage, SMALL, args)
        assert throughput.operations(stage, SMALL, args) == about[f"{stage}_step"]["flops"]
    args = stage_args("ppo", "tiny", flags)
    once = throughput.forward_flops(SMALL, [18] * 8, 0)
    heads = throughput.forward_flops(SMALL, [], 8 * 6)
    assert throughput.operations("ppo", SMALL, args) == 11 * once + 6 * heads


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
        ("another", None),
    ],
)
def test_peak_by_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert kernels.peak_flops("cuda") == peak
    assert kernels.peak_flops("cpu") is None
