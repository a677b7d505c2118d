"""Models' folders. GPT-2's, as the hub lays them out: they compute what GPT-2 written in numpy and
the transformers library compute. This project's, out and in again. What is wrong with a folder."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from data.files import BadInput

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
from checkpoint import save_model
from model import GPT, ScalarModel
from tests.planted import plant, read_bugs
from tests.test_model import make_gpt, make_scalar
from tests.tiny import Tiny

# ------------------------------------------------------------------------------------------------
# GPT-2's four sizes against numpy

# name -> layers, heads, width of the published model. The folders below have a twelfth of the
# layers and a quarter of the width: heads of 16 channels where GPT-2 has 64.
SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
VOCABULARY, CONTEXT = 61, 24
# Keys of the published config.json; GPTConfig does not know most of them.
PUBLISHED = f"""{{
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": {VOCABULARY - 1}, "embd_pdrop": 0.1, "eos_token_id": {VOCABULARY - 1},
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": {CONTEXT}, "n_positions": {CONTEXT}, "resid_pdrop": 0.1, "vocab_size": {VOCABULARY},
    "task_specific_params": {{"text-generation": {{"do_sample": true, "max_length": 50}}}}
}}"""


def write_folder(folder: Path, size: str, prefix: str = "", dtype: type = np.float32) -> dict:
    """A random model as the hub lays GPT-2 out, with masks and, beside prefixed names, the tied
    output matrix; returns its tensors."""
    layers, heads, width = SIZES[size][0] // 12, SIZES[size][1], SIZES[size][2] // 4
    rng = np.random.default_rng(len(size))
    shapes = {"wte.weight": (VOCABULARY, width), "wpe.weight": (CONTEXT, width)}
    linears = [("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4)]
    for layer in range(layers):
        for name, rows, columns in [*linears, ("mlp.c_proj", 4, 1)]:
            shapes[f"h.{layer}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"h.{layer}.{name}.bias"] = (columns * width,)
    for norm in ["ln_f", *(f"h.{layer}.ln_{k}" for layer in range(layers) for k in (1, 2))]:
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    tensors = {}
    for name, shape in shapes.items():
        mean = float("ln_" in name and name.endswith("weight"))
        tensors[name] = mean + rng.standard_normal(shape) * 2 / math.sqrt(shape[0])
    mask = np.tril(np.ones((1, 1, CONTEXT, CONTEXT)))
    for layer in range(layers):
        tensors |= {f"h.{layer}.attn.bias": mask, f"h.{layer}.attn.masked_bias": np.array(-1e4)}
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    folder.mkdir(parents=True)
    config = json.loads(PUBLISHED) | {"n_embd": width, "n_head": heads, "n_layer": layers}
    (folder / "config.json").write_text(json.dumps(config))
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    named |= {"lm_head.weight": tensors["wte.weight"]} if prefix else {}
    save_numpy(named, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def numpy_gpt2(tensors: dict, heads: int, tokens: np.ndarray) -> np.ndarray:
    """Logits (T, V) of tokens (T,) in float64, head by head, after Radford et al. 2019."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    size = x.shape[1] // heads
    future = np.triu(np.ones((len(tokens), len(tokens)), bool), 1)
    for n in range(sum(name.endswith("ln_1.bias") for name in w)):
        q, k, v = np.split(linear(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn"), 3, axis=-1)
        mixed = []
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            scores = np.where(future, -np.inf, q[:, mine] @ k[:, mine].T / math.sqrt(size))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[:, mine])
        x = x + linear(np.concatenate(mixed, axis=-1), f"h.{n}.attn.c_proj")
        h = linear(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{n}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("size", SIZES)
def test_a_random_folder_of_each_size_equals_numpy(size, prefix, tmp_path, monkeypatch) -> None:
    """Found by its name under data/downloads, as the download command lays it."""
    monkeypatch.setattr(checkpoint, "DOWNLOADS", tmp_path)
    dtype = np.float16 if (size, prefix) == ("gpt2-medium", "transformer.") else np.float32
    tensors = write_folder(tmp_path / size, size, prefix, dtype)
    model = GPT.from_pretrained(size).eval()
    layers, heads, width = SIZES[size]
    assert (model.config.n_layer, model.config.n_head) == (layers // 12, heads)
    assert model.config.n_embd == width // 4 and model.config.resid_pdrop == 0
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=CONTEXT)
    expected = numpy_gpt2(tensors, heads, tokens)
    logits = logits_of(model, torch.from_numpy(tokens)[None])[0].numpy()
    assert expected.std() > 0.5, "an error of 1e-4 is small beside that"
    assert np.abs(logits - expected).max() < 1e-4


def test_names_agree_with_the_download_table() -> None:
    from data.real import prepare, sources

    assert prepare.DOWNLOADS == checkpoint.DOWNLOADS
    for name in checkpoint.GPT2_NAMES:
        paths = {file.path for file in sources.SOURCES[name].files}
        assert paths == {"config.json", "model.safetensors"}
    assert set(SIZES) == set(checkpoint.GPT2_NAMES)


# ------------------------------------------------------------------------------------------------
# A small GPT-2 written and run by the transformers library (tests/data/make_gpt2_tiny.py)

GPT2_TINY = Path(__file__).parent / "data" / "gpt2_tiny"
BUGS = """
exact gelu: model.MLP.forward; check_gpt2_parity
    - approximate="tanh"
    + approximate="none"
large epsilon: model.load_model; check_gpt2_parity
    - config.resid_pdrop = resid_pdrop
    + config.layer_norm_epsilon = 1e-3
norm behind the branch: model.Block.forward; check_gpt2_parity
    - x + self.attn(self.ln_1(x), lengths, packing, cache)
    + self.ln_1(x + self.attn(x, lengths, packing, cache))
heads mixed up: model.Attention.forward; check_gpt2_parity
    - kernels.attention(q, k, v,
    + kernels.attention(q, k.flip(1), v,
not causal: model.Attention.forward; check_gpt2_parity
    - kernels.attention(q, k, v, lengths, **self.how)
    + F.scaled_dot_product_attention(q, k, v)
"""


@torch.no_grad()
def logits_of(model: GPT, tokens: Tensor) -> Tensor:
    return model(tokens) @ model.unembedding.T


def check_gpt2_parity() -> None:
    """Logits equal those that the transformers library computed, to 1e-4."""
    reference = load_file(GPT2_TINY / "reference.safetensors")
    logits = logits_of(GPT.from_pretrained(GPT2_TINY).eval(), reference["tokens"])
    assert reference["logits"].std() > 1  # an error of 1e-4 is small beside that
    assert (logits - reference["logits"]).abs().max() < 1e-4


def test_gpt2_parity() -> None:
    check_gpt2_parity()


@pytest.mark.parametrize("where, old, new, check", read_bugs(BUGS))
def test_planted_bug_is_caught(where, old, new, check, monkeypatch) -> None:
    plant(monkeypatch, where, old, new)
    with pytest.raises(AssertionError):
        globals()[check]()


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """A copy of the stored GPT-2, to be changed."""
    return Path(shutil.copytree(GPT2_TINY, tmp_path / "gpt2"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        GPT.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": None}, 'key "n_layer": expected a whole number, found null'),
        ({"n_layer": "3"}, '"n_layer": expected a whole number, found "3"'),
        ({"n_layer": 0}, "expected numbers from 1: .* n_layer 0"),
        ({"vocab_size": True}, '"vocab_size": expected a whole number'),
        ({"n_head": 5}, "n_embd 24 is not a multiple of 5 heads"),
        ({"resid_pdrop": 1.0}, "resid_pdrop is 1.0"),
        ({"eos_token_id": 97}, "eos_token_id 97 is not below vocab_size 97"),
        ({"eos_token_id": [96]}, "config.json: "),
        ({"activation_function": "relu"}, "expected 'gelu_new', found 'relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
        ({"n_layer": 2}, "not fit config.json; holds 3 layers, expected n_layer 2$"),
        ({"n_layer": 10**9}, "parameters, over 1e.* n_layer 1000000000"),
        ({"n_embd": 48}, r"not fit config.json; .* wte.weight is \(97, 24\), expected \(97, 48\)"),
        ({"n_positions": 10**18}, "parameters, over 1e"),
        ({"n_positions": 33}, "wpe.weight is"),
        ({"layer_norm_epsilon": "1e-5"}, '"layer_norm_epsilon": expected a number'),
    ],
)
def test_unusable_configs_are_named(changes: dict, message: str, gpt2_folder: Path) -> None:
    path = gpt2_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(gpt2_folder, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", b"{", "config.json: not JSON"),
        ("config.json", b"[1]", "expected a JSON object, found list"),
        ("config.json", b"\xff{}", "config.json:1: not UTF-8"),
        ("model.safetensors", None, "model.safetensors: no such file"),
        ("model.safetensors", b"\x80\x04K\x01.", "not a readable"),
        ("model.safetensors", b"\xff" * 64, "not a readable"),
        ("model.safetensors", b"", "not a readable"),
        ("model.safetensors", (GPT2_TINY / "model.safetensors").read_bytes()[:-100], "a readable"),
    ],
    ids=lambda value: None if isinstance(value, bytes) and len(value) > 9 else value,
)
def test_unreadable_files_are_named(name, content, message, gpt2_folder) -> None:
    (gpt2_folder / name).unlink()
    if content is not None:
        (gpt2_folder / name).write_bytes(content)
    refused(gpt2_folder, message)


MATRIX = "h.1.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (MATRIX, torch.ones(72, 24), rf"shape: {MATRIX} is \(72, 24\), expected \(24, 72\)"),
        ("ln_f.bias", None, "another shape: ln_f.bias"),
        ("extra", torch.ones(1), "another shape: extra"),
        ("ln_f.bias", torch.ones(24).long(), "ln_f.bias is torch.int64 or holds"),
        ("ln_f.bias", torch.full((24,), math.nan), "ln_f.bias is torch.float32 or holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_named(name, tensor, message, gpt2_folder) -> None:
    path = gpt2_folder / "model.safetensors"
    weights = load_file(path) | {f"transformer.{name}": tensor}
    save_file({name: t for name, t in weights.items() if t is not None}, path)
    refused(gpt2_folder, message)


def test_names_of_gpt2_point_to_the_download_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "DOWNLOADS", tmp_path)
    with pytest.raises(BadInput, match=r"gpt2-large: no such folder.*--download gpt2-large"):
        GPT.from_pretrained("gpt2-large")
    (tmp_path / "gpt2-large").mkdir()
    (tmp_path / "gpt2-large" / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"gpt2-large: holds no weights.*--download gpt2-large"):
        GPT.from_pretrained("gpt2-large")
    shutil.copytree(GPT2_TINY, tmp_path / "gpt2-large", dirs_exist_ok=True)
    assert GPT.from_pretrained("gpt2-large").config.n_embd == 24


# ------------------------------------------------------------------------------------------------
# Our own folders


@pytest.mark.parametrize("make", [make_gpt, make_scalar])
def test_saved_and_loaded_is_bitwise_the_same(make: Callable, tmp_path: Path) -> None:
    model, folder = make(), tmp_path / "new"
    if make is make_scalar:
        model.score.bias.data.fill_(0.37)
    save_model(folder, model, '{"any": "text"}', {"stage": "test", "data": ["a.jsonl"]})
    loaded = type(model).from_pretrained(folder, resid_pdrop=0.25, dtype="bfloat16", impl="torch")
    trunk = getattr(loaded, "trunk", loaded)
    assert (trunk.dtype, trunk.impl, trunk.dropout.p) == ("bfloat16", "torch", 0.25)
    assert loaded.config.resid_pdrop == 0.25
    loaded.config.resid_pdrop = model.config.resid_pdrop
    assert loaded.config == model.config
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    assert checkpoint.read_info(folder)["data"] == ["a.jsonl"]
    assert (folder / "tokenizer.json").read_text() == '{"any": "text"}'
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1  # one umask for all: who may read the shape may read the weights


def test_a_folder_with_keys_of_older_runs_opens(tmp_path: Path) -> None:
    model = make_gpt()
    settings = {"preset": "gpt2", "frozen_dtype": "bfloat16", "kl_limit": 1.5, "epochs": 4}
    info = {"stage": "ppo", "data": ["a.jsonl"], "settings": settings}
    more = {"changes": [{"step": 3, "lr": [1e-5, 2e-5]}], "epoch": 1, "dtype": "bfloat16"}
    save_model(tmp_path, model, "{}", info | more)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.dtype == "float32"
    assert torch.equal(loaded.wte.weight, model.wte.weight)


def test_a_checkpoint_of_the_wrong_stage_is_named(tiny: Tiny) -> None:
    with pytest.raises(BadInput, match=r"reward model \(stage rm\), expected a language model"):
        GPT.from_pretrained(tiny.rm)
    with pytest.raises(BadInput, match=r"language model \(stage base\), expected a reward model"):
        ScalarModel.from_pretrained(tiny.base)


def test_our_checkpoint_opens_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = make_gpt()
    save_model(tmp_path, model, "{}", {"stage": "sft", "settings": {"lr": 1e-3}})
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(41, (2, 24))
    with torch.no_grad():
        assert (logits_of(model, tokens) - theirs(tokens).logits).abs().max() < 1e-4
