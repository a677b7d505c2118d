"""A model's folder, in and out: find it, read it, check it, fill a model from it, write it whole.

    config.json        shape under GPT-2's names; stage, data and settings of the run beside them
    model.safetensors  weights under GPT-2's names, in float32
    tokenizer.json     see data/tokenizer.py
    state.pt           in a run's checkpoints: models and optimizers as they are in training

Nothing here imports a model class: functions take the class, or a model, from their caller. A
faulty folder raises `BadInput`, which names the file, the value and what was expected.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data import files
from data.files import BadInput
from data.tokenizer import load_tokenizer

import safetensors.torch
import tiktoken
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_PARAMETERS = 10**12  # a config that asks for more is a mistake: 4 TB of weights
DOWNLOADS = Path(__file__).parent / "data" / "downloads"
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_FIXED: dict[str, tuple] = {  # the values of GPT-2, the only ones that are supported
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh GELU
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


# ------------------------------------------------------------------------------------------------
# Reading


def find_model(name_or_dir: str | Path) -> Path:
    """The folder of a model: a path as it is, a name of GPT-2 under data/downloads/.

    Raises `BadInput`, with the command that downloads it, if a GPT-2 is not there.
    """
    if str(name_or_dir) in GPT2_NAMES and not Path(name_or_dir).is_dir():
        folder = DOWNLOADS / str(name_or_dir)
        absent = not folder.is_dir()
        if absent or not (folder / "model.safetensors").exists():  # an unfinished download
            raise BadInput(
                f"{folder}: {'no such folder' if absent else 'holds no weights'}; get them with "
                f"`python -m data.real.prepare --download {name_or_dir}`"
            )
        return folder
    return Path(name_or_dir)


def read_info(folder: str | Path) -> dict[str, Any]:
    """All of a folder's config.json: the model's shape, and stage, data and settings of its run."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise BadInput(
            f"{path}: no such file; expected a checkpoint folder with config.json and "
            "model.safetensors (has the stage before finished?)"
        )
    info = files.read_json(path)
    files.check(info, {"data?": [str, ...], "settings?": {}}, str(path))
    return info


def read_config(folder: str | Path, config_class: type) -> Any:
    """The model's shape from a folder's config.json, as a `config_class` (model.GPTConfig)."""
    info = read_info(folder)
    path = Path(folder) / "config.json"
    for key, needed in GPT2_FIXED.items():
        if info.get(key, needed[0]) not in needed:
            raise BadInput(f'{path}: key "{key}": expected {needed[0]!r}, found {info[key]!r}')
    names = {field.name for field in fields(config_class)}
    values = {"n_positions": info.get("n_ctx")} | {k: v for k, v in info.items() if k in names}
    files.check(values, dict.fromkeys(SIZES, int), str(path))
    values.setdefault("eos_token_id", values["vocab_size"] - 1)
    try:
        return config_class(**values)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def check_config(config: Any) -> None:
    """Raise `BadInput` unless a GPTConfig describes a model that can be built."""
    kinds = dict.fromkeys((*SIZES, "eos_token_id"), int) | {"score_mod": str}
    kinds |= dict.fromkeys("resid_pdrop layer_norm_epsilon initializer_range".split(), float)
    files.check({name: getattr(config, name) for name in kinds}, kinds, "shape of the model")
    C, vocabulary, std = config.n_embd, config.vocab_size, config.initializer_range
    epsilon, end = config.layer_norm_epsilon, config.eos_token_id
    size = C * (vocabulary + config.n_positions + 12 * config.n_layer * C)
    sizes = ", ".join(f"{name} {getattr(config, name)}" for name in SIZES)
    for holds, problem in (
        (min(getattr(config, name) for name in SIZES) > 0, f"expected numbers from 1: {sizes}"),
        (C % max(1, config.n_head) == 0, f"n_embd {C} is not a multiple of {config.n_head} heads"),
        (0 <= config.resid_pdrop < 1, f"resid_pdrop is {config.resid_pdrop}; expected 0 to 1"),
        (0 < epsilon < 1, f"layer_norm_epsilon is {epsilon}; expected 0 to 1"),
        (0 <= std < 1e6, f"initializer_range is {std}; expected a number from 0"),
        (size <= MAX_PARAMETERS, f"{size:.0e} parameters, over {MAX_PARAMETERS:.0e}: {sizes}"),
        (0 <= end < vocabulary, f"eos_token_id {end} is not below vocab_size {vocabulary}"),
    ):
        if not holds:
            raise BadInput(f"{problem}; change it")


def load_model(
    kind: type, config_class: type, folder: Path, *, resid_pdrop: float = 0.0, **options: Any
) -> Any:
    """A `kind(config, **options)` of the folder's shape (and `score_mod`), its weights in float32.

    Keys may begin with "transformer."; mask buffers and a tied lm_head are ignored. Raises
    `BadInput` if the folder holds another kind of model, or weights that do not fit config.json.
    """
    config = read_config(folder, config_class)
    config.resid_pdrop = resid_pdrop
    config.score_mod = options.pop("score_mod", None) or config.score_mod
    weights, path = _read_weights(folder), folder / "model.safetensors"
    num_layers = sum(name.endswith(".ln_1.weight") for name in weights)
    if num_layers != config.n_layer:  # first: a config may ask for a billion layers
        raise BadInput(
            f"{path}: does not fit config.json; holds {num_layers} layers, expected n_layer "
            f"{config.n_layer}"
        )
    with torch.device("meta"):  # shapes without memory
        model = kind(config, **options)
    kinds = {False: ("language model", "train_sft.py or train_ppo.py")}
    kinds[True] = ("reward model", "train_rm.py")
    found, wanted = (kinds["score.weight" in names] for names in (weights, model.state_dict()))
    if found != wanted:
        stage = f"holds a {found[0]} (stage {read_info(folder).get('stage', '?')})"
        hint = f"expected a {wanted[0]}: give a checkpoint of {wanted[1]}"
        raise BadInput(f"{folder}: {stage}, {hint}")
    fill(model, weights, path)
    return model.requires_grad_(True)


def fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Give a model the weights read from `path`; raise `BadInput` unless they fit exactly."""
    own_names = {name.removeprefix("trunk."): name for name in model.state_dict()}
    expected = {name.removeprefix("trunk."): t.shape for name, t in model.state_dict().items()}
    odd = sorted(set(expected) ^ set(weights))
    odd += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if odd:
        raise BadInput(
            f"{path}: does not fit config.json; missing, unexpected or of another shape: "
            f"{', '.join(odd[:4])}{' ...' if len(odd) > 4 else ''}"
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise BadInput(
                f"{path}: {name} is {tensor.dtype} or holds NaN or infinity; expected finite floats"
            )
    state = {own_names[name]: tensor.float() for name, tensor in weights.items()}
    model.load_state_dict(state, assign=True)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors under this project's names."""
    path = folder / "model.safetensors"
    files.refuse_special(path)
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; expected weights beside config.json") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error})") from None
    weights = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        if name in weights:
            raise BadInput(f"{path}: holds {name} twice, with and without transformer.")
        weights[name] = tensor
    return weights


def read_tokenizer(
    path: str | Path, *models: nn.Module, same_as: str | Path | None = None
) -> tiktoken.Encoding:
    """The tokenizer of a file or of a model's folder.

    Raises `BadInput` unless it fits every model given, in the number of ids and in the end token,
    and unless it is that of the folder `same_as`, byte for byte.
    """
    path, other = find_model(path), same_as and find_model(same_as) / "tokenizer.json"
    path = path / "tokenizer.json" if path.is_dir() else path
    encoding = load_tokenizer(path)
    for config in (model.config for model in models):
        if encoding.n_vocab > config.vocab_size or encoding.eot_token != config.eos_token_id:
            raise BadInput(
                f"{path}: {encoding.n_vocab} entries with end token {encoding.eot_token} do not "
                f"fit a model with vocab_size {config.vocab_size} and eos_token_id "
                f"{config.eos_token_id}; give the tokenizer that the model was trained with"
            )
    if other and other.read_bytes() != path.read_bytes():
        raise BadInput(
            f"{other} differs from {path}: the models of a run must share a tokenizer; give "
            "models that grew from one base model"
        )
    return encoding


# ------------------------------------------------------------------------------------------------
# Writing


def save_model(
    folder: str | Path, model: nn.Module, tokenizer_json: str, info: dict[str, Any]
) -> None:
    """Write config.json, tokenizer.json and, last, model.safetensors, each atomically.

    `info` (stage, data, settings) goes into config.json beside the shape, under keys of its own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    is_gpt = type(model).__name__ == "GPT"
    shape = asdict(model.config) | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel" if is_gpt else type(model).__name__],
        "activation_function": "gelu_new",
        "bos_token_id": model.config.eos_token_id,
        "tie_word_embeddings": True,
    }
    files.write_atomic(folder / "config.json", json.dumps(shape | info, indent=2) + "\n")
    files.write_atomic(folder / "tokenizer.json", tokenizer_json)
    weights = {
        name.removeprefix("trunk."): tensor.detach().float().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    content = safetensors.torch.save(weights, metadata={"format": "pt"})
    files.write_atomic(folder / "model.safetensors", content)


# ------------------------------------------------------------------------------------------------
# The state of a run


def save_state(path: Path, step: int, objects: dict[str, Any]) -> None:
    """Write the states of models and optimizers after a step; equal states are equal files."""
    states = {name: each.state_dict() for name, each in objects.items()}
    try:
        torch.save(files.interned({"step": step, "state": states}), path)
    except RuntimeError as error:  # what torch's writer makes of a write that failed
        if "inline_container" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "the disk is full", str(path)) from None


def load_state(path: Path, objects: dict[str, Any]) -> int:
    """Give models and optimizers the states that `save_state` wrote; returns the step.

    Raises `BadInput` for any other file, and runs nothing that is in it.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, each in objects.items():
            each.load_state_dict(saved["state"][name])
            own = getattr(each, "state", {}).items()  # of an optimizer, which trusts the shapes
            if any(t.shape not in (p.shape, ()) for p, kept in own for t in kept.values()):
                raise ValueError("shapes")
        return int(saved["step"])
    except Exception as error:  # a crafted pickle can raise anything
        too_large = isinstance(error, RuntimeError) and "memory" in str(error)
        if too_large or isinstance(error, MemoryError):
            raise
        raise BadInput(
            f"{path}: not the state of such a run ({type(error).__name__}); start over without "
            "--resume"
        ) from error
