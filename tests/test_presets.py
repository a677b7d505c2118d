"""Presets and what they switch on, on a CPU: which flags they set, and that bfloat16 copies,
checkpointing and sampling in parts change what they should change, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train_ppo
import train_rm
import train_sft
from checkpoint import GPT2_NAMES
from data.files import read_log, run_command
from generate import store_matrices
from model import GPT, ScalarModel, forward_flops
from tests.tiny import Tiny

SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
CPU = ["--data", "none", "--device", "cpu"]


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("size", GPT2_NAMES)
def test_a_preset_sets_what_its_table_says(stage: str, size: str) -> None:
    script = SCRIPTS[stage]
    plain, args = (vars(script.get_args(CPU + more)) for more in ([], ["--preset", size]))
    preset = script.PRESETS[size]
    assert set(preset) <= set(plain)  # no misspelt flag
    for name, value in args.items():
        given = {"device": "cpu", "preset": size, "data": "none"}
        if name != "minibatch_size":
            assert value == given.get(name, preset.get(name, plain[name])), name
    assert args["dtype"] == "bfloat16" and preset["device"] == "cuda"
    assert {"lr", "batch_size", "micro_batch_size", "max_prompt_tokens"} <= set(preset)
    assert args["max_prompt_tokens"] + args["max_new_tokens"] <= 1024
    if stage == "sft":
        assert args["init"] == size
    if stage == "ppo":
        assert args["frozen_dtype"] == "bfloat16" and args["ptx_tokens"] <= 1024


@pytest.mark.parametrize("stage", SCRIPTS)
def test_flags_win_over_a_preset(stage: str) -> None:
    flags = ["--lr", "0.5", "--dtype", "float32", "--no-grad_checkpointing", "--init", "elsewhere"]
    flags += ["--frozen_dtype", "float32"] if stage == "ppo" else []
    for argv in (["--preset", "gpt2-xl", *flags], [*flags, "--preset=gpt2-xl"]):
        args = SCRIPTS[stage].get_args(CPU + argv)
        assert (args.lr, args.dtype, args.grad_checkpointing) == (0.5, "float32", False)
        assert args.init == "elsewhere" and args.batch_size == SCRIPTS[stage].GPT2["batch_size"]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_paper_s_values_where_it_has_them(stage: str) -> None:
    args = SCRIPTS[stage].get_args([*CPU, "--preset", "gpt2-xl"])
    if stage == "sft":
        assert (args.lr, args.batch_size) == (9.65e-6, 32)
    elif stage == "rm":
        assert (args.lr, args.batch_size, args.epochs) == (9e-6, 64, 1)
    else:
        assert (args.batch_size, args.minibatch_size, args.inner_epochs) == (512, 64, 1)
        assert (args.value_lr, args.kl_coef, args.ema, args.max_steps) == (9e-6, 0.02, 0.992, 500)
        assert all(2.55e-6 <= p["lr"] <= 2.55e-5 for p in train_ppo.PRESETS.values())


@pytest.mark.parametrize("stage", SCRIPTS)
def test_help_shows_a_preset(stage: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        SCRIPTS[stage].get_args(["--preset", "gpt2-xl", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default: {SCRIPTS[stage].PRESETS['gpt2-xl']['lr']})" in shown
    assert "{gpt2,gpt2-medium,gpt2-large,gpt2-xl}" in shown


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "gpt3"], "invalid choice"),
        (["--preset"], "expected one argument"),
        (["--preset", "gpt2"], "give --device cpu"),
    ],
)
def test_bad_presets(stage: str, argv: list, words: str, capsys: pytest.CaptureFixture) -> None:
    if "give" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[stage].get_args(["--data", "none", *argv])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_frozen_bfloat16_needs_bfloat16_computation(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_ppo.get_args([*CPU, "--frozen_dtype", "bfloat16"])
    assert "--frozen_dtype float32" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Runs


def preset_args(tiny: Tiny, stage: str, out: Path, *more: str) -> list[str]:
    """A preset on the smallest world: what does not fit it is given."""
    argv = ["--preset", "gpt2-xl", *more]
    argv = ["--max_steps", "2", *argv]
    if stage == "ppo":
        argv = ["--rollout_size", "3", "--micro_batch_size", "2", *argv]
    return tiny.args(stage, out, *argv)


def rows_of(out: Path, module) -> tuple[list[dict], list[dict]]:
    return read_log(out / "log.csv", module.LOG), read_log(out / "timing.csv", module.TIMING)


def run(tiny: Tiny, stage: str, out: Path, *more: str) -> tuple[list[dict], list[dict]]:
    assert SCRIPTS[stage].main(preset_args(tiny, stage, out, *more)) == 0
    return rows_of(out, SCRIPTS[stage])


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_checkpointing_and_micro_batches_of_a_preset_change_no_byte(
    stage: str, tiny: Tiny, tmp_path: Path
) -> None:
    again, clocks = run(tiny, stage, tmp_path / "again", "--peak_tflops", "0.001")
    plain, no_peak = run(tiny, stage, tmp_path / "plain", "--no-grad_checkpointing")
    assert again == plain
    settings = json.loads((tmp_path / "again" / "config.json").read_text())["settings"]
    assert settings["lr"] == SCRIPTS[stage].PRESETS["gpt2-xl"]["lr"]
    assert settings["grad_checkpointing"] is True and "preset" not in settings
    weights = [tmp_path / name / "model.safetensors" for name in ("again", "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # mfu: 0 < mfu, as many operations as tokens allow; empty where no peak is known
    config = GPT.from_pretrained(tiny.base).config
    for row, clock in zip(again, clocks, strict=True):
        flops = float(clock["mfu"]) * float(clock["step_s"]) * 1e9
        tokens = int(float(row["tokens"]))
        # A prompt of the reward model's is computed once for its responses, of which there are few.
        once = tokens if stage == "sft" else tokens // 9
        least = 3 * forward_flops(config, [1] * once, 0)
        assert least <= flops <= 3 * forward_flops(config, [44] * (tokens // 20 + 12), tokens)
    if not torch.cuda.is_available():
        assert {clock["mfu"] for clock in no_peak} == {""}


def test_a_preset_starts_from_downloaded_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`--preset gpt2` finds data/downloads/gpt2; without it, the error says how to get it."""
    monkeypatch.setattr(checkpoint, "DOWNLOADS", tmp_path / "downloads")
    argv = [
        "--preset",
        "gpt2",
        "--data",
        str(tiny.demonstrations),
        "--device",
        "cpu",
        "--max_prompt_tokens",
        "36",
        "--max_new_tokens",
        "8",
        "--max_steps",
        "1",
        "--out",
        str(tmp_path / "sft"),
    ]
    assert run_command(lambda: train_sft.main(argv)) == 2
    assert "data.real.prepare --download gpt2`" in capsys.readouterr().err
    shutil.copytree(tiny.base, tmp_path / "downloads" / "gpt2")
    assert train_sft.main(argv) == 0
    row = read_log(tmp_path / "sft" / "log.csv", train_sft.LOG)[0]
    assert float(row["lr"]) == train_sft.PRESETS["gpt2"]["lr"]


def check_kl_starts_at_zero(log: list[dict]) -> None:
    assert float(log[0]["kl"]) == 0.0
    assert float(log[1]["kl"]) != 0.0  # there was an update


@pytest.fixture(scope="module")
def ppo(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run with the preset: its logs, and what was seen of its models on the way."""
    seen: dict = {"gradients": [], "flops": []}
    with pytest.MonkeyPatch.context() as patch:
        sample, score, flops = train_ppo.sample, train_ppo.score, train_ppo.iteration_flops

        def spying_sample(policy: GPT, *args):
            seen["gradients"].append(any(p.grad is not None for p in policy.parameters()))
            return sample(policy, *args)

        def spying_score(tokens, lengths, prompt_lengths, models, args):
            seen["matrices"] = {
                name: {p.dtype for n, p in model.named_parameters() if "c_fc" in n}
                for name, model in models.items()
            }
            return score(tokens, lengths, prompt_lengths, models, args)

        def spying_flops(*args):
            seen["flops"].append(flops(*args))
            return seen["flops"][-1]

        patch.setattr(train_ppo, "iteration_flops", spying_flops)
        patch.setattr(train_ppo, "sample", spying_sample)
        patch.setattr(train_ppo, "score", spying_score)
        out = tmp_path_factory.mktemp("preset") / "ppo"
        seen["log"], seen["timing"] = run(tiny, "ppo", out, "--peak_tflops", "1")
    return seen


def test_kl_is_exactly_zero_at_first_with_frozen_models_in_bfloat16(ppo: dict) -> None:
    check_kl_starts_at_zero(ppo["log"])


def embeddings_too(model: torch.nn.Module, dtype: torch.dtype) -> None:
    store_matrices(model, dtype)
    trunk = model.trunk if isinstance(model, ScalarModel) else model
    trunk.wte.weight.data = trunk.wte.weight.data.to(dtype).float()


def test_rounded_embeddings_are_caught(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_ppo, "store_matrices", embeddings_too)
    log, _ = run(tiny, "ppo", tmp_path / "ppo")
    with pytest.raises(AssertionError):
        check_kl_starts_at_zero(log)


def test_frozen_dtype_and_checkpointing_change_no_number(
    ppo: dict, tiny: Tiny, tmp_path: Path
) -> None:
    half, full = {torch.bfloat16}, {torch.float32}
    assert ppo["matrices"] == {
        "policy": full,
        "reference": half,
        "reward_model": half,
        "value_network": full,
    }
    plain, _ = run(
        tiny, "ppo", tmp_path / "plain", "--frozen_dtype", "float32", "--no-grad_checkpointing"
    )
    assert ppo["log"] == plain


def test_gradients_are_gone_before_the_next_rollout(ppo: dict) -> None:
    """Their 8 bytes a parameter are what the cache of keys and values gets."""
    assert len(ppo["gradients"]) >= 2 and not any(ppo["gradients"])


def test_timing_of_an_iteration(ppo: dict, tiny: Tiny) -> None:
    assert len(ppo["timing"]) == 2
    config = GPT.from_pretrained(tiny.base).config
    for log, row, counted in zip(ppo["log"], ppo["timing"], ppo["flops"], strict=True):
        new = round(8 * float(log["response_len"]))
        assert float(row["tok_per_s"]) * float(row["rollout_s"]) == pytest.approx(new, rel=0.01)
        flops = float(row["mfu"]) * float(row["step_s"]) * 1e12
        least = 11 * forward_flops(config, [1] * new, 0)  # 11 passes in all; prompts are more
        most = 11 * forward_flops(config, [44] * 8, new) + 3 * forward_flops(config, [12] * 8, 96)
        assert least < counted < most
        assert flops == pytest.approx(counted, rel=1e-3)
        parts = sum(float(row[name]) for name in ("rollout_s", "score_s", "update_s"))
        assert parts == pytest.approx(float(row["step_s"]), rel=0.01)
        assert 0 < float(row["mfu"]) < 1 and float(row["tok_per_s"]) > 0


def sampled(tiny: Tiny, size: int, prompts: list[list[int]]) -> tuple[torch.Tensor, ...]:
    flags = ["--max_new_tokens", "8", "--rollout_size", str(size)]
    args = train_ppo.get_args([*CPU, *flags])
    return train_ppo.sample(GPT.from_pretrained(tiny.base).eval(), prompts, 3, args)


def check_sampling_in_parts(tiny: Tiny) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(50, (n,), generator=generator).tolist() for n in (9, 2, 5, 5, 7, 1, 3)]
    ordered = sorted(prompts, key=len)
    whole, parts = sampled(tiny, 0, ordered), sampled(tiny, 3, ordered)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)
    assert len(set(whole[2].tolist())) > 1
    # In another order of prompts, each row has its own prompt and its response.
    tokens, prompt_lengths, lengths = sampled(tiny, 3, prompts)
    order = sorted(range(7), key=lambda i: len(prompts[i]))
    for place, row in enumerate(order):
        n = int(lengths[row])
        assert tokens[row, : len(prompts[row])].tolist() == prompts[row]
        assert int(prompt_lengths[row]) == len(prompts[row])
        assert n == int(whole[2][place]) and torch.equal(tokens[row, :n], whole[0][place, :n])


def test_sampling_in_parts_changes_no_response(tiny: Tiny) -> None:
    check_sampling_in_parts(tiny)


def parts_in_the_given_order(patch: pytest.MonkeyPatch) -> None:
    """Results put back where the part stood, not where its rows belong."""
    original = torch.Tensor.argsort
    patch.setattr(torch.Tensor, "argsort", lambda self, **kwargs: original(self, **kwargs).flip(0))


def generator_anew(patch: pytest.MonkeyPatch) -> None:
    """Every part draws the same random numbers."""
    original = GPT.generate

    def generate(self, *args, generator: torch.Generator, **kwargs):
        return original(self, *args, generator=generator.manual_seed(3), **kwargs)

    patch.setattr(GPT, "generate", generate)


@pytest.mark.parametrize("bug", [parts_in_the_given_order, generator_anew])
def test_planted_bug_in_sampling_is_caught(
    bug: Callable, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_sampling_in_parts(tiny)


def test_operations_of_an_iteration_by_hand(tiny: Tiny) -> None:
    """Policy: sampling, scoring, 3 for the update; value network: scoring and 3; two frozen."""
    args = train_ppo.get_args([*CPU, "--ptx_tokens", "10"])
    gpt, scalar = GPT.from_pretrained(tiny.base), ScalarModel.from_pretrained(tiny.rm)
    models = {"policy": gpt, "reference": gpt, "reward_model": scalar, "value_network": scalar}
    L, C, V = gpt.config.n_layer, gpt.config.n_embd, gpt.config.vocab_size
    trunk = 24 * L * C * C * (12 + 20) + 4 * L * C * (12**2 + 20**2)
    head = 2 * V * C * 7
    ptx = 3 * 5 * (24 * L * C * C * 10 + 4 * L * C * 100 + 2 * V * C * 9)
    expected = (5 + 1 + 1 + 4) * trunk + (5 + 1) * head + ptx
    assert train_ppo.iteration_flops(models, [12, 20], 7, 5, args) == pytest.approx(expected)


@pytest.mark.slow
def test_compiled_blocks_train_alike(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--compile with the tracing of a GPU's compiler, but without its code generation."""
    original, compiled_modules = torch.nn.Module.compile, []

    def traced(self, **kwargs) -> None:
        compiled_modules.append(self)
        original(self, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    flags = ["--dtype", "float32", "--resid_pdrop", "0"]
    compiled, _ = run(tiny, "sft", tmp_path / "compiled", "--compile", *flags)
    plain, _ = run(tiny, "sft", tmp_path / "plain", *flags)
    assert len(compiled_modules) == 2  # the blocks
    for a, b in zip(compiled, plain, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    names = [set(load_file(tmp_path / n / "model.safetensors")) for n in ("compiled", "plain")]
    assert names[0] == names[1]
