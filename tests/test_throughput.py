"""Operations and memory on paper against what models, caches, optimizers and forward passes really
do and hold; the settings of `make gpt2`; the timing command at a tiny size."""

import csv
import math
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from data.real import prepare

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import sample
import train_rm
import train_sft
from checkpoint import GPT2_NAMES
from generate import KVCache
from model import GPT, GPTConfig, Linear, ScalarModel
from tests import throughput
from tests.makefile import ROOT, dry_run
from tests.throughput import SHAPES, STAGES, forward_flops, main, memory_plan, stage_args

SMALL = GPTConfig(vocab_size=101, n_positions=64, n_embd=64, n_layer=3, n_head=4, eos_token_id=0)
CPU = ["--device", "cpu"]
LIMITS = "--max_prompt_tokens 30 --max_new_tokens 20 --micro_batch_size".split()


def size_of(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def planned(stage: str, config: GPTConfig, *flags: str) -> dict:
    return memory_plan(stage, config, stage_args(stage, "tiny", [*CPU, *flags]))


# ---- operations


def test_operations_of_a_forward_pass_equal_those_counted_one_by_one() -> None:
    """Against PyTorch's own counter of a model that multiplies all of attention's square."""
    gpt = GPT(SMALL)
    math_backend = sdpa_kernel(SDPBackend.MATH)  # its products are counted
    with math_backend, FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = gpt(torch.randint(1, 101, (3, 20)))
        hidden.reshape(-1, 64) @ gpt.unembedding.T
    counted = counter.get_total_flops()
    assert forward_flops(SMALL, [20] * 3, 60) == pytest.approx(counted, rel=1e-6)
    L, C, V, T = 3, 64, 101, 20
    per_token = 6 * (12 * L * C * C + V * C) + 12 * L * C * T
    assert 3 * forward_flops(SMALL, [T], T) == T * per_token
    apart = forward_flops(SMALL, [5], 0) + forward_flops(SMALL, [7], 0)
    assert math.isclose(forward_flops(SMALL, [5, 7], 0), apart)


def test_operations_of_an_iteration_by_hand() -> None:
    """Policy: sampling, scoring, 3 for the update; value network: scoring and 3; two frozen. Of
    pretraining sequences one an update."""
    flags = "--ptx_coef 1 --pretrain_data x --ptx_tokens 10 --ptx_ratio 1 --num_minibatches 5"
    flags += " --responses_per_prompt 1"
    args = stage_args("ppo", "tiny", [*CPU, *flags.split(), "--batch_size", "5"])
    L, C, V = 3, 64, 101
    trunk = 24 * L * C * C * (12 + 20) + 4 * L * C * (12**2 + 20**2)
    head = 2 * V * C * 7
    text = 24 * L * C * C * 10 + 4 * L * C * 100 + 2 * V * C * 9
    flops = throughput.iteration_flops(SMALL, SMALL, [12, 20], 7, args)
    assert flops["rollout"] == trunk + head and flops["scoring"] == 4 * trunk + 2 * head
    assert flops["update"] == 6 * trunk + 3 * head + 3 * 5 * text
    # Of four responses to a prompt, three have its tokens in attention only.
    args.ptx_coef, args.responses_per_prompt = 0.0, 4
    shared = throughput.iteration_flops(SMALL, SMALL, [12, 20], 7, args)
    spared = 24 * L * C * C * (12 + 20 - 7) * 3 / 4
    assert sum(shared.values()) == 11 * (trunk - spared) + 6 * head


def test_operations_of_a_step() -> None:
    flags = [*CPU, *"--batch_size 8 --max_prompt_tokens 12 --max_new_tokens 6".split()]
    alone = ["--responses_per_prompt", "1"]
    more = {"sft": [], "rm": [], "ppo": alone}
    args = {stage: stage_args(stage, "tiny", [*flags, *more[stage]]) for stage in STAGES}
    sft = throughput.work("sft", SMALL, args["sft"])["sft_step"]
    assert sft["flops"] == 3 * forward_flops(SMALL, [18] * 8, 8 * 17)
    rm, K = throughput.work("rm", SMALL, args["rm"])["rm_step"], (4, 5, 6, 7, 8, 9, 4, 5)
    once = forward_flops(SMALL, [12] * 8, 0) + sum(K) * forward_flops(SMALL, [6], 0)
    attended = 4 * 3 * 64 * (sum(K) * (18**2 - 6**2) - 8 * 12**2)
    assert rm["flops"] == 3 * (once + attended) and rm["tokens"] == sum(K) * 18
    ppo = throughput.work("ppo", SMALL, args["ppo"])
    whole = 11 * forward_flops(SMALL, [18] * 8, 0) + 6 * forward_flops(SMALL, [], 8 * 6)
    assert ppo["ppo_iteration"]["flops"] == whole
    half = throughput.work("ppo", SMALL, args["ppo"], [12, 6] * 4, 3)["rollout"]
    assert half["flops"] == forward_flops(SMALL, [15, 9] * 4, 24) and half["tokens"] == 24


PEAKS = "H100 80GB HBM3 989, H100 PCIe 756, H200 989, A100-SXM4-80GB 312, A10 125, L40S 362, "
PEAKS += "GeForce RTX 4090 165, GeForce RTX 4090 Laptop GPU -, H20 -, another -"


@pytest.mark.parametrize("row", PEAKS.split(", "))
def test_peak_by_name(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, peak = row.rsplit(" ", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"NVIDIA {name}")
    assert throughput.peak_flops("cuda") == (None if peak == "-" else float(peak) * 1e12)
    assert throughput.peak_flops("cpu") is None


# ---- memory


@pytest.mark.parametrize("name", GPT2_NAMES)
def test_shapes_and_parameters_are_gpt2_s(name: str) -> None:
    sizes = (124_439_808, 354_823_168, 774_030_080, 1_557_611_200)
    published = dict(zip(GPT2_NAMES, sizes, strict=True))[name]
    with torch.device("meta"):
        model = GPT(SHAPES[name])
    linear = [m for m in model.modules() if isinstance(m, Linear)]
    matrices = sum(p.numel() for m in linear for p in m.parameters())
    counted = throughput.parameters(SHAPES[name])
    assert counted == (published, matrices) == (model.num_parameters, matrices)


def test_what_ppo_holds_is_what_models_and_caches_take() -> None:
    config = SHAPES["gpt2"]
    plan = memory_plan("ppo", config, stage_args("ppo", "gpt2", CPU, rollout_size=2))
    with torch.device("meta"):
        model = GPT(config, dtype="bfloat16")
        frozen = model.frozen()
        cache = KVCache(frozen, 2, 768)
    assert plan["policy"] == plan["average"] == plan["value_network"] == size_of(model)
    assert plan["frozen"] == 2 * size_of(frozen)
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    # beside the cache: matrices cast once; a prompt token's residual, norm, its cast, and the MLP;
    # logits, probabilities and sums of a step
    C, rows = config.n_embd, 2
    casts = sum(p.nbytes for p in frozen.parameters() if p.dtype == torch.bfloat16)
    assert plan["rollout"] == held + casts + rows * (512 * C * 26 + 16 * 50257)


def test_optimizers_hold_what_is_planned() -> None:
    model = GPT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.logprobs(torch.zeros(1, 4, dtype=torch.int64))[0].sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    plan = planned("sft", SMALL)
    assert sum(value.nbytes for value in states if value.dim()) == plan["adam"]
    assert sum(p.grad.nbytes for p in model.parameters()) == plan["gradients"] == plan["weights"]


def kept_for_backward(model: GPT | ScalarModel, forward) -> int:
    """Bytes that a forward pass keeps, without parameters, what autocast makes of them, indices."""
    shapes = {p.shape for p in model.parameters()}
    shapes |= {p.T.shape for p in model.parameters() if p.dim() == 2}
    seen, kept = {}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape not in shapes and tensor.dtype != torch.int64:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # alive, so that no two have one address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def test_planned_activations_of_a_reward_model() -> None:
    """2 prompts of 30 tokens with 9 responses of 20 each, prompts computed once."""
    model, elements = ScalarModel(SMALL), []
    for _ in range(2):
        prompt = torch.randint(1, 101, (30,)).tolist()
        sequences = [prompt + torch.randint(1, 101, (20,)).tolist() for _ in range(9)]
        elements.append(train_rm.Comparison(sequences, [(0, 1)]))
    kept = kept_for_backward(model, lambda: train_rm.score_all(model, elements))
    assert planned("rm", SMALL, *LIMITS, "2")["activations"] == pytest.approx(kept, rel=0.15)


def kept_by_gpt(checkpointing: bool, dtype: str, pdrop: float) -> int:
    """Bytes that a forward pass of `SMALL` on 4 rows of 50 keeps."""
    model = GPT(GPTConfig(**vars(SMALL) | {"resid_pdrop": pdrop}), dtype=dtype).train()
    model.gradient_checkpointing = checkpointing
    return kept_for_backward(model, lambda: model(torch.randint(101, (4, 50))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pdrop", [0.0, 0.2])
def test_planned_activations_are_what_a_forward_pass_keeps(dtype: str, pdrop: float) -> None:
    plan = planned("sft", SMALL, *LIMITS, "4", "--dtype", dtype, "--resid_pdrop", str(pdrop))
    assert plan["activations"] == pytest.approx(kept_by_gpt(False, dtype, pdrop), rel=0.15)


def test_planned_activations_with_checkpointing() -> None:
    plan = planned("sft", SMALL, *LIMITS, "4", "--resid_pdrop", "0", "--grad_checkpointing")
    one_block = kept_by_gpt(False, "float32", 0.0) / 3
    kept = kept_by_gpt(True, "float32", 0.0)
    assert plan["activations"] == pytest.approx(kept + one_block, rel=0.15)


def test_a_plan_by_hand() -> None:
    """C = 10, L = 1, V = 7, 2 rows of 5 tokens, all in float32."""
    config = GPTConfig(vocab_size=7, n_positions=5, n_embd=10, n_layer=1, n_head=1, eos_token_id=0)
    flags = "--max_prompt_tokens 3 --max_new_tokens 2 --micro_batch_size 2".split()
    P = 70 + 50 + 3 * 100 + 30 + 100 + 10 + 400 + 40 + 400 + 10 + 4 * 10 + 2 * 10
    assert throughput.parameters(config)[0] == P
    plan = planned(
        "ppo", config, *flags, *"--batch_size 8 --num_minibatches 2 --rollout_size 4".split()
    )
    update = 8 * P + 64 * 10 * 10 + (12 * 70 + 8 * 10 * 10 + 2**26)  # activations, head
    rollout = 2 * 4 * 10 * 4 * 5 + 44 * 10 * 4 * 3 + 16 * 7 * 4
    assert plan["update"] == update and plan["rollout"] == rollout
    assert plan["total"] == (3 + 4 + 2) * 4 * P + max(update, rollout)
    # 2 prompts of 3 tokens with 9 responses of 2 each: 42 tokens, in rows of 90
    total = planned("rm", config, *flags)["total"]
    assert total == 16 * P + 52 * 10 * 42 + 16 * 10 * 90 + 4 * 70


@pytest.mark.parametrize("stage", STAGES)
def test_124m_fits_12_gb_and_1558m_fits_80_gb(stage: str) -> None:
    """With a tenth to spare, for fragmentation and the driver."""

    def total(size: str, *flags: str) -> int:
        args = stage_args(stage, size, [*CPU, *flags])
        return memory_plan(stage, SHAPES[size], args)["total"]

    assert 1.1 * total("gpt2") < 12e9 and 1.1 * total("gpt2-xl") < 80e9
    if stage == "ppo":  # What makes it fit: without these it does not.
        assert total("gpt2-xl", "--dtype", "float32", "--rollout_size", "128") > 80e9
        assert total("gpt2-xl", "--no-grad_checkpointing", "--micro_batch_size", "16") > 80e9


def test_the_plan_is_printed_for_each_size_and_stage(capsys: pytest.CaptureFixture) -> None:
    assert main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = ("tiny", *GPT2_NAMES)
    assert [line.split()[:2] for line in lines] == [[s, stage] for s in sizes for stage in STAGES]
    total = memory_plan("ppo", SHAPES["gpt2-xl"], stage_args("ppo", "gpt2-xl", CPU))["total"]
    assert lines[-1].endswith(f"total {total / 2**30:.2f}")


# ---- the settings of `make gpt2`


MODULES = {f"train_{stage}.py": script for stage, script in STAGES.items()}
MODULES |= {"sample.py": sample, "evaluate.py": evaluate, "data.real.prepare": prepare}


def gpt2_commands(target: str = "gpt2", **variables: str) -> list[tuple[str, list[str]]]:
    """(script, its arguments on a CPU) of the commands of `make gpt2`, in order."""
    found = []
    for line in dry_run(target, OUT="o", **variables):
        words = ["cpu" if word == "cuda" else word for word in shlex.split(line)]
        names = [word for word in words if word in MODULES]
        found += [(name, words[words.index(name) + 1 :]) for name in names]
    return found


@pytest.mark.parametrize("size", GPT2_NAMES)
def test_the_scripts_accept_every_command_of_make_gpt2(size: str) -> None:
    """And whatever a command reads of the run's folder is what a command before it wrote."""
    every = gpt2_commands(SIZE=size)
    written = [f"o/{size}/data/{split}/prompts_200.jsonl" for split in ("valid", "test")]
    for name, argv in every:
        MODULES[name].get_args(argv)
        out = argv[argv.index("--out") + 1] if "--out" in argv else ""
        for word in argv:
            path = word.partition("=")[2] or word
            if path.startswith("o/") and path != out:
                assert any(path == w or path.startswith(w + "/") for w in written), path
        written.append(out)
    names = [name for name, _ in every]
    assert names == ["data.real.prepare"] * 2 + ["train_sft.py"] * 2 + [
        *("train_rm.py", "evaluate.py", "train_ppo.py"),
        *["evaluate.py"] * 4,
    ]
    name, argv = gpt2_commands(f"o/{size}/candidates.jsonl", SIZE=size)[-1]
    assert name == "sample.py" and sample.get_args(argv).num_prompts == 500


def test_variables_of_make_gpt2() -> None:
    plain = gpt2_commands()
    assert plain == gpt2_commands(SIZE="gpt2") and "--from" not in plain[0][1]
    assert gpt2_commands(DATA="d")[0][1][-2:] == ["--from", "d"]
    resumed = [name for name, argv in gpt2_commands(resume="--resume") if "--resume" in argv]
    assert resumed == ["train_sft.py", "train_sft.py", "train_rm.py", "train_ppo.py"]
    other = dict(gpt2_commands(COMPARISONS="mine.jsonl"))["train_rm.py"]
    assert train_rm.get_args(other).data == "mine.jsonl"
    for size in ("gpt3", "gpt2 gpt2-xl", "", "py"):
        with pytest.raises(subprocess.CalledProcessError) as error:
            gpt2_commands(SIZE=size)
        assert f'SIZE="{size}": expected one of gpt2 gpt2-medium' in error.value.stderr


@pytest.mark.parametrize("size", GPT2_NAMES)
def test_settings_of_a_size(size: str) -> None:
    sft, rm, ppo = (stage_args(stage, size, CPU) for stage in STAGES)
    for args in (sft, rm, ppo):
        assert args.dtype == "bfloat16" and args.max_prompt_tokens + args.max_new_tokens == 768
        assert args.grad_checkpointing == (size in ("gpt2-large", "gpt2-xl"))
        assert args.batch_size % args.micro_batch_size == 0
    # The paper's values where it has them.
    assert (sft.batch_size, rm.batch_size, rm.epochs) == (32, 64, 1)
    assert (ppo.batch_size, ppo.num_minibatches, ppo.inner_epochs, ppo.max_steps) == (
        512,
        8,
        1,
        500,
    )
    assert (ppo.value_lr, ppo.kl_coef, ppo.ema) == (9e-6, 0.02, 0.992)
    assert 2.55e-6 <= ppo.lr <= 2.55e-5
    if size == "gpt2-xl":
        assert (sft.lr, rm.lr) == (9.65e-6, 9e-6)


# ---- the command


FAST = "-- --device cpu --batch_size 16 --max_prompt_tokens 12 --max_new_tokens 6".split()


def timings(path: Path, *argv: str) -> dict[str, dict[str, str]]:
    assert main(["--out", str(path), *argv, *FAST]) == 0
    with open(path, encoding="utf-8") as file:
        return {row["what"]: row for row in csv.DictReader(file)}


def test_timings_at_a_tiny_size(tmp_path: Path) -> None:
    rows = timings(tmp_path / "new" / "t.csv", "--repeats", "2", "--peak_tflops", "0.5")
    assert list(rows) == ["sft_step", "rm_step", "rollout", "scoring", "update", "ppo_iteration"]
    for row in rows.values():
        assert 0 < float(row["p20_s"]) <= float(row["p50_s"]) <= float(row["p80_s"])
        assert float(row["mfu"]) == pytest.approx(float(row["tflop_per_s"]) / 0.5, rel=0.01)
        assert row["torch"] == torch.__version__ and row["device"].startswith("CPU")
        assert row["peak_gib"] == row["note"] == "" and float(row["plan_gib"]) > 0
    tokens = {what: float(row["tok_per_s"]) * float(row["p50_s"]) for what, row in rows.items()}
    assert tokens["sft_step"] == pytest.approx(16 * 18, rel=0.01)
    assert tokens["rm_step"] == pytest.approx(100 * 18, rel=0.01)  # 4 to 9, and again
    assert tokens["rollout"] <= 16 * 6 * 1.01
    parts = sum(float(rows[what]["p50_s"]) for what in ("rollout", "scoring", "update"))
    assert parts == pytest.approx(float(rows["ppo_iteration"]["p50_s"]), rel=0.5)


def test_the_timed_steps_see_full_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many steps as asked for and one more, each a whole batch, and nothing is left on disk."""
    seen, loss = [], train_sft.sft_loss

    def spying(model: GPT, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        seen.append((tokens.shape, lengths.tolist(), int(mask.sum())))
        return loss(model, tokens, lengths, mask)

    monkeypatch.setattr(train_sft, "sft_loss", spying)
    monkeypatch.chdir(tmp_path)
    timings(Path("t.csv"), "--stages", "sft", "--repeats", "3")
    assert seen == [((16, 18), [18] * 16, 16 * 17)] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_out_of_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_sft, "sft_loss", full)
    (row,) = timings(tmp_path / "t.csv", "--stages", "sft").values()
    assert (row["what"], row["note"], row["p50_s"]) == ("sft", "out of memory", "")


def test_odd_arguments_are_refused() -> None:
    for argv in (["--repeats", "0"], ["--size", "gpt3"], ["--", "--lr"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2


# ---- beside another program


def test_pretraining_is_timed_with_the_command_of_the_demo() -> None:
    """Batches of 8 times 128 tokens, in sequences of 64."""
    assert throughput.pretraining_rate(0.01) > 0
    (first, *_) = throughput.Clocks.rows
    assert first["tok_per_s"] * first["step_s"] == pytest.approx(8 * 128)


def test_threads_and_environment_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Makefile's are asked for while the other program runs, or before it starts."""
    said: list = []

    @contextmanager
    def another_program(there: bool) -> Iterator[None]:
        said.append(("there", there))
        yield
        said.append("gone")

    def run(command: list[str], env: dict[str, str], **_) -> SimpleNamespace:
        assert not command[1].startswith("data") or "OMP_NUM_THREADS" not in env
        given = env.get("OMP_NUM_THREADS"), env.get("GOMP_SPINCOUNT")
        said.append((Path(command[1]).stem, *given))
        return SimpleNamespace(stdout=b"1\n" if "free" in command else b"words\n123.5\n")

    monkeypatch.setattr(throughput, "another_program", another_program)
    monkeypatch.setattr(throughput, "allowed_cores", lambda: {0, 1})
    monkeypatch.setattr(throughput.subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert throughput.one_case(False, False, True, 1.0) == (2, 123.5)
    plain = [("there", False), "gone", ("there", True), ("-m", "2", None), "gone"]
    assert said == plain
    said.clear()
    assert throughput.one_case(True, True, True, 1.0) == (1, 123.5)
    asked = [("there", True), ("stages", None, None), "gone"]
    assert said == [*asked, ("there", True), ("-m", "1", "30000"), "gone"]
    (makefile,) = {line for line in (ROOT / "Makefile").read_text().splitlines() if "GOMP" in line}
    assert makefile == "export GOMP_SPINCOUNT ?= 30000"


def test_cases_take_turns_and_have_their_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rates = iter([100, 110, 5, 50, 20, 300, 90, 6, 60, 30, 120, 140, 4, 70, 25])
    monkeypatch.setattr(throughput, "one_case", lambda *_: (2, next(rates)))
    assert main(["--busy"]) == 0
    *rounds, a, b, c, d, e = capsys.readouterr().out.splitlines()
    assert len(rounds) == 15 and rounds[5].startswith("round 2: idle, all cores: 2 threads, 300 ")
    medians = [line.split("tokens/s")[0].split()[-1] for line in (a, b, c, d, e)]
    assert medians == ["120", "110", "5", "60", "25"]
    assert [line.split()[-1] for line in (a, b, c, d, e)] == [
        "1.00",
        "0.92",
        "0.04",
        "0.50",
        "0.21",
    ]
