"""Folders laid out as GPT-2's four sizes load, and compute what GPT-2 written in numpy computes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import checkpoint
from checkpoint import find_model
from data.files import BadInput
from model import GPT

# name -> layers, heads, width of the published model. The folders below have a twelfth of the
# layers and a quarter of the width: heads of 16 channels where GPT-2 has 64.
SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
VOCABULARY, CONTEXT = 61, 24


def write_folder(folder: Path, size: str, prefix: str, dtype: type = np.float32) -> dict:
    """A random model as the hub lays GPT-2 out, masks included; returns its tensors."""
    layers, heads, width = SIZES[size][0] // 12, SIZES[size][1], SIZES[size][2] // 4
    rng = np.random.default_rng(len(size))

    def random(*shape: int, mean: float = 0.0) -> np.ndarray:
        return (mean + rng.standard_normal(shape) * 2 / math.sqrt(shape[0])).astype(dtype)

    tensors = {
        "wte.weight": random(VOCABULARY, width),
        "wpe.weight": random(CONTEXT, width),
        "ln_f.weight": random(width, mean=1),
        "ln_f.bias": random(width),
    }
    for n in range(layers):
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            tensors[f"h.{n}.{name}.weight"] = random(rows, columns)
            tensors[f"h.{n}.{name}.bias"] = random(columns)
        for name in ("ln_1", "ln_2"):
            tensors[f"h.{n}.{name}.weight"] = random(width, mean=1)
            tensors[f"h.{n}.{name}.bias"] = random(width)
        tensors[f"h.{n}.attn.bias"] = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), dtype))
    folder.mkdir(parents=True)
    # The keys of the published config.json; GPTConfig does not know most of them.
    (folder / "config.json").write_text(
        json.dumps(
            {
                "activation_function": "gelu_new",
                "architectures": ["GPT2LMHeadModel"],
                "attn_pdrop": 0.1,
                "bos_token_id": VOCABULARY - 1,
                "embd_pdrop": 0.1,
                "eos_token_id": VOCABULARY - 1,
                "initializer_range": 0.02,
                "layer_norm_epsilon": 1e-05,
                "model_type": "gpt2",
                "n_ctx": CONTEXT,
                "n_embd": width,
                "n_head": heads,
                "n_layer": layers,
                "n_positions": CONTEXT,
                "resid_pdrop": 0.1,
                "vocab_size": VOCABULARY,
                "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            }
        )
    )
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
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
def test_a_random_folder_of_each_size_equals_numpy(
    size: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with torch.no_grad():
        logits = (model(torch.from_numpy(tokens)[None])[0] @ model.unembedding.T).numpy()
    assert expected.std() > 0.5, "an error of 1e-4 is small beside that"
    assert np.abs(logits - expected).max() < 1e-4


def test_names_agree_with_the_download_table() -> None:
    from data.real import prepare, sources

    assert prepare.DOWNLOADS == checkpoint.DOWNLOADS
    for name in checkpoint.GPT2_NAMES:
        paths = {file.path for file in sources.SOURCES[name].files}
        assert paths == {"config.json", "model.safetensors"}
    assert set(SIZES) == set(checkpoint.GPT2_NAMES)


def test_weights_of_another_size_are_one_clear_line(tmp_path: Path) -> None:
    write_folder(tmp_path / "gpt2", "gpt2", "")
    write_folder(tmp_path / "gpt2-xl", "gpt2-xl", "")
    (tmp_path / "gpt2-xl" / "model.safetensors").rename(tmp_path / "gpt2" / "model.safetensors")
    with pytest.raises(BadInput, match=r"wte.weight is \(61, 400\), expected \(61, 192\)") as error:
        GPT.from_pretrained(find_model(tmp_path / "gpt2"))
    assert "\n" not in str(error.value)
