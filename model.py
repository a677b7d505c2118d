"""GPT-2, its scalar-headed twin, sampling, and checkpoints: everything the three stages share.

    GPT           tokens -> hidden states; log-probs of given tokens; sampling with a KV cache
    ScalarModel   the same trunk with one number per position: reward model and value network
    Checkpoints   what a run needs to go on after being killed, and what it hands to the next stage

Dimensions: B batch, T tokens, C width, H heads, D = C / H head size, V vocabulary, S cache length.

Sequences are right-padded and masks come from lengths, never from token ids. A causal model never
looks to the right, so what stands behind a row's end cannot reach the row: training needs no
attention mask, positions are a plain 0..T-1, and there is no pad token (any id may fill the tail).

The architecture is GPT-2's (Radford et al. 2019), as GPT-3 and InstructGPT use it: pre-norm blocks,
learned positions, tanh GELU, output embedding tied to the input embedding. GPT-3 alternates dense
and banded attention layers (Brown et al. 2020, 2.1; the band is not published); here all are dense.
Parameter names and layout are GPT-2's, so its weights load here and ours load elsewhere.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from data import files
from data.files import BadInput

MAX_PARAMETERS = 10**12  # a config that asks for more is a mistake: 4 TB of weights
DOWNLOADS = Path(__file__).parent / "data" / "downloads"
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_FIXED: dict[str, tuple] = {  # what a config.json may say elsewhere, and here must not
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh GELU
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}


@dataclass
class GPTConfig:
    """Shape of a GPT; the field names are those of GPT-2's config.json."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    resid_pdrop: float = 0.0  # dropout on each residual branch and on the embeddings, in training
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02  # standard deviation of initial weights
    eos_token_id: int = 50256
    score_mod: str = "causal"  # a key of kernels.flash_attention.SCORE_MODS

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BadInput(f"{name} is {value!r}; expected a whole number from 1")
        if self.n_embd % self.n_head:
            raise BadInput(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; change either"
            )
        if not 0 <= self.resid_pdrop < 1:
            raise BadInput(f"resid_pdrop is {self.resid_pdrop}; expected 0 or more, below 1")
        epsilon = self.layer_norm_epsilon
        if type(epsilon) is not float or not 0 < epsilon < 1:
            raise BadInput(f"layer_norm_epsilon is {epsilon!r}; expected a number like 1e-5")
        std = self.initializer_range
        if type(std) not in (float, int) or not 0 <= std < math.inf:
            raise BadInput(f"initializer_range is {std!r}; expected a number from 0")
        if not isinstance(self.score_mod, str):
            raise BadInput(f"score_mod is {self.score_mod!r}; expected a name")
        size = self.n_embd * (self.vocab_size + self.n_positions + 12 * self.n_layer * self.n_embd)
        if size > MAX_PARAMETERS:
            raise BadInput(
                f"n_layer {self.n_layer}, n_embd {self.n_embd}, n_positions {self.n_positions} and "
                f"vocab_size {self.vocab_size} come to {size:.0e} parameters, over "
                f"{MAX_PARAMETERS:.0e}: lower one"
            )
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise BadInput(
                f"eos_token_id {self.eos_token_id} is not below vocab_size {self.vocab_size}"
            )


class Linear(nn.Module):
    """y = x weight + bias with weight (in, out): the transpose of nn.Linear, as GPT-2 stores it."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], y.shape[-1])


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that matrix products with `weight` have: autocast's where that is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which products keep the dtype of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def store_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights and biases of the `Linear` layers in `dtype`, half the memory at 16 bits.

    Under autocast to `dtype` results stay the same bit for bit: there products cast them at each
    use. Embeddings, layer norms and a scalar head, which autocast leaves alone, stay as they are.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(dtype)


def forward_flops(
    config: GPTConfig, lengths: Sequence[float], predicted: float, repeated: float = 0
) -> float:
    """Operations of a forward pass over rows of these lengths, by the usual count: a product of
    (n, a) and (a, b) has 2 n a b, attention is counted without its causal half left out.

        sum_rows (24 L C^2 n + 4 L C n^2)  -  24 L C^2 repeated  +  2 V C predicted

    `predicted` is how many positions go through the unembedding, `repeated` how many tokens through
    attention alone, because another row has them as well (see `Packing`). Training has three times
    as many (a backward pass twice the forward's): with all positions predicted, 6 N + 12 L C T a
    token, N = 12 L C^2 + V C (Chowdhery et al. 2022, B). Recomputation is not counted.
    """
    L, C = config.n_layer, config.n_embd
    trunk = sum(24 * L * C**2 * n + 4 * L * C * n**2 for n in lengths)
    return trunk - 24 * L * C**2 * repeated + 2.0 * config.vocab_size * C * predicted


class KVCache:
    """Keys and values of every layer for the tokens seen so far, (B, H, S, D) each."""

    def __init__(self, config: GPTConfig, batch: int, size: int, weight: Tensor):
        shape = (batch, config.n_head, size, config.n_embd // config.n_head)
        kind = {"dtype": compute_dtype(weight), "device": weight.device}
        self.keys = [torch.empty(shape, **kind) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, **kind) for _ in range(config.n_layer)]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all but the given batch rows; one that is given twice is there twice."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):  # one at a time: the old one is freed
                tensors[layer] = tensor[rows]


@dataclass
class Packing:
    """Right-padded rows (B, T) as a list of N tokens: padding is left out, and so are repetitions.

    All but attention treats tokens one by one, and does so on (N, C). Attention needs rows:
    `index` (B, T) is the number of the token at each place (of padding: any), and `places` (N,) the
    place in B * T at which each token is found.
    """

    index: Tensor
    places: Tensor

    @classmethod
    def make(
        cls, shape: tuple[int, int], lengths: Tensor, prefixes: tuple[Tensor, Tensor] | None = None
    ) -> Packing:
        """Of rows with these `lengths`. `prefixes` = (source, shared), (B,) each: the first
        shared[b] tokens of row b are those of row source[b], a row that shares nothing."""
        B, T = shape
        columns = torch.arange(T, device=lengths.device)
        listed = columns < lengths[:, None]
        if prefixes is not None:
            source, shared = prefixes
            repeated = columns < shared[:, None]
            listed &= ~repeated
        index = (listed.flatten().cumsum(0) - 1).clamp_min(0).view(B, T)
        if prefixes is not None:
            index = torch.where(repeated, index[source], index)
        return cls(index, listed.flatten().nonzero().squeeze(1))

    def to_rows(self, x: Tensor) -> Tensor:
        """(N, C) -> (B, T, C)."""
        if len(x) == 0:  # all rows are empty: padding needs a token to point at
            x = torch.cat((x, x.new_zeros(1, x.shape[-1])))
        return x.index_select(0, self.index.flatten()).view(*self.index.shape, -1)

    def to_list(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (N, C)."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.places)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, impl: str):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.score_mod, self.impl = config.score_mod, impl
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, lengths: Tensor | None, packing: Packing | None, cache: KVCache | None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), or packed (N, C) -> (N, C); fills the first T places of the cache
        if one is given."""
        qkv = self.c_attn(x)
        if packing:
            qkv = packing.to_rows(qkv)
        B, T, C = *qkv.shape[:2], x.shape[-1]
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D), a view
        if cache is not None:
            cache.keys[self.layer][:, :, :T] = k
            cache.values[self.layer][:, :, :T] = v
        y = kernels.attention(q, k, v, lengths, score_mod=self.score_mod, impl=self.impl)
        y = y.transpose(1, 2).reshape(B, T, C)  # the kernel lays y out as (B, T, H, D): no copy
        if packing:
            y = packing.to_list(y)
        return self.dropout(self.c_proj(y))

    def step(self, x: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """One new token a row: (B, C) at `positions` (B,) -> (B, C), its key and value cached."""
        B, C = x.shape
        q, k, v = self.c_attn(x).view(B, 3, self.n_head, C // self.n_head).unbind(1)  # (B, H, D)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        rows = torch.arange(B, device=x.device)
        keys[rows, :, positions] = k
        values[rows, :, positions] = v
        y = kernels.decode_attention(
            q, keys, values, (positions + 1).int(), score_mod=self.score_mod, impl=self.impl
        )
        return self.c_proj(y.reshape(B, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2's GELU is the tanh approximation; the exact one moves logits by up to 5e-4.
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, impl: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer, impl)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, lengths: Tensor | None, packing: Packing | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), lengths, packing, cache)
        return x + self.mlp(self.ln_2(x))

    def step(self, x: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        x = x + self.attn.step(self.ln_1(x), positions, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2. `impl` chooses the kernels: "auto" (Triton on CUDA, torch elsewhere), or either.

    With `gradient_checkpointing` set, a forward pass that is to be differentiated keeps only each
    block's input, and the backward pass computes the block again: about a ninth of the memory for
    activations at 16 bits, a third more time. Gradients are the same, dropout included.
    """

    def __init__(self, config: GPTConfig, impl: str = "auto"):
        super().__init__()
        self.config, self.impl = config, impl
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.h = nn.ModuleList(Block(config, layer, impl) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal of std `initializer_range`; projections onto the residual stream by
        1/sqrt(2 n_layer), so that its variance does not grow with depth (two branches a layer)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    @torch.no_grad()
    def start_from_sinusoids(self) -> None:
        """Let the learned positions start as sinusoids of the same standard deviation:

            wpe[t, 2i] = sqrt(2) std sin(w_i t),  wpe[t, 2i+1] = sqrt(2) std cos(w_i t)

        with frequencies w_i from 1 to 1 / n_positions (after Vaswani et al. 2017, 3.5). "The token
        before" is then one rotation for all t, not T lessons: small models copy much sooner.
        """
        T, C = self.wpe.weight.shape
        frequencies = T ** -torch.linspace(0, 1, (C + 1) // 2)
        angles = torch.arange(T)[:, None] * frequencies
        waves = torch.stack((angles.sin(), angles.cos()), dim=2).view(T, -1)[:, :C]
        self.wpe.weight.copy_(waves * math.sqrt(2) * self.config.initializer_range)

    @property
    def unembedding(self) -> Tensor:
        """(V, C): the output matrix, tied to the token embedding."""
        return self.wte.weight

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        cache: KVCache | None = None,
        prefixes: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states: tokens (B, T) int64 -> (B, T, C), after the last layer norm.

        `lengths` (B,) int32 spares work past each row's end (hidden states there are finite but
        meaningless). `prefixes` (see `Packing.make`) spares work on what rows have in common: the
        first shared[b] tokens of row b, equal to those of row source[b], go through all but
        attention once. Raises ValueError if T is over n_positions, or if `prefixes` come without
        `lengths`.
        """
        T = tokens.shape[1]
        if T > self.config.n_positions:
            raise ValueError(
                f"sequence of {T} tokens, over n_positions {self.config.n_positions}: "
                "shorten it or use a model with a longer context"
            )
        if prefixes is not None and lengths is None:
            raise ValueError("prefixes without lengths: give the rows' lengths as well")
        # The number of tokens decides shapes, and a GPU would have to be waited for to know it: so
        # there rows stay padded, and the kernels skip what is past their ends. With `prefixes` a
        # GPU packs as well: what is spared is worth the one wait of a forward pass.
        packing = None
        if prefixes is not None or (lengths is not None and not tokens.is_cuda):
            packing = Packing.make(tokens.shape, lengths, prefixes)
        x = self.wte(tokens) + self.wpe.weight[:T]
        x = self.dropout(packing.to_list(x) if packing else x)
        again = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for block in self.h:
            if again:
                x = checkpoint(block, x, lengths, packing, None, use_reentrant=False)
            else:
                x = block(x, lengths, packing, cache)
        x = self.ln_f(x)
        return packing.to_rows(x) if packing else x

    def logprobs(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        prefixes: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-prob of each token given those before it, and the entropy of that choice, in nats.

            logprobs[:, t] = log softmax(hidden[:, t-1] unembedding^T / temperature)[tokens[:, t]]

        tokens (B, T) int64, mask (B, T) bool -> both (B, T) float32, 0 at t = 0. The head runs on
        masked positions only (without a mask: on those within `lengths`); elsewhere both are 0.
        `prefixes`: see `forward`.
        """
        if mask is None and lengths is not None:
            mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        hidden = self(tokens, lengths, prefixes=prefixes)[:, :-1]  # position t - 1 predicts token t
        chosen = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        chosen = chosen[:, 1:]
        hidden, weight = hidden[chosen], self.unembedding
        dtype = compute_dtype(weight)
        with without_autocast(weight):  # its inputs may have 16 bits, its sums may not
            logprobs, entropy = kernels.logprobs(
                hidden.to(dtype), weight.to(dtype), tokens[:, 1:][chosen],
                temperature=temperature, impl=self.impl,
            )  # fmt: skip
        return _unmask(logprobs, chosen), _unmask(entropy, chosen)

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor,
        prompt_lengths: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        repeats: Tensor | None = None,
        _static: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample a response to each prompt, with a KV cache, until the end token or the limit.

        prompts (B, P) int64 right-padded, prompt_lengths (B,) int32 -> tokens
        (B, P + max_new_tokens) int64 and lengths (B,) int32. With `repeats` (B,) int64, prompt b
        gets repeats[b] responses, one after the other, and goes through the model once for all of
        them; B is then their sum in the result. Each row is its prompt, then its response without a
        gap, the tail filled with the end token; a length counts prompt, response and end token.
        Temperature 0 takes the likeliest token. The randomness is one uniform number
        per row and step, all drawn at the start: what a row gets does not depend on when other rows
        end. Rows that ended leave the batch, a tenth of it or more at a time, and then cost
        nothing. On a GPU (or with the private `_static`, for tests) a step's tensors stay where
        they are and batch sizes are few, so that a step is one CUDA graph: see `_Decoder`.
        """
        device, end = prompts.device, self.config.eos_token_id
        _static = device.type == "cuda" if _static is None else _static
        sources = torch.arange(len(prompts), device=device)  # row of the result -> its prompt
        if repeats is not None:
            sources = sources.repeat_interleave(repeats)
        B, P = len(sources), prompts.shape[1]
        longest_prompt = int(prompt_lengths.max())
        longest = longest_prompt + max_new_tokens
        if longest > self.config.n_positions:
            raise ValueError(
                f"prompt and max_new_tokens {max_new_tokens} come to {longest} tokens, over "
                f"n_positions {self.config.n_positions}: lower max_prompt_tokens or max_new_tokens"
            )
        inside = torch.arange(P, device=device) < prompt_lengths[:, None]
        prompts = torch.where(inside, prompts, end)
        tokens = prompts.new_full((B, P + max_new_tokens), end)
        tokens[:, :P] = prompts[sources]
        lengths = prompt_lengths[sources].to(torch.int64)
        if max_new_tokens == 0:
            return tokens, lengths.int()
        uniforms = torch.rand(B, max_new_tokens, generator=generator, device=device)

        model = self._for_decoding()
        cache = KVCache(self.config, len(prompts), longest, model.h[0].attn.c_attn.weight)
        hidden = model(prompts[:, :longest_prompt], prompt_lengths.int(), cache)
        if repeats is not None:
            cache.keep_rows(sources)
        decoder = _Decoder(model, tokens, lengths, cache, uniforms, temperature)
        decoder.write(hidden[sources, lengths - 1])
        del hidden
        # A look at `ended` waits for the device, so on a GPU it is rationed.
        look_every = 8 if _static else 1
        for step in range(1, max_new_tokens):
            if step % look_every == 0:
                going = int((~decoder.ended).sum())
                if going == 0:
                    break
                left = max_new_tokens - step
                decoder.keep(_next_size(going, len(decoder.rows), left, _static))
            decoder.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the graph must not go while it runs
        return tokens, lengths.int()

    def _for_decoding(self) -> GPT:
        """This model with its matrices in the dtype of their products: cast once, not each step."""
        weight = self.h[0].attn.c_attn.weight
        if compute_dtype(weight) == weight.dtype:
            return self
        model = copy.copy(self)  # shares all parameters but the blocks'
        model._modules = dict(self._modules)
        blocks = nn.ModuleList()
        for block in self.h:
            blocks.append(copy.deepcopy(block))
            store_matrices(blocks[-1], compute_dtype(weight))
        model.h = blocks
        return model

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, *, impl: str = "auto", resid_pdrop: float = 0.0
    ) -> GPT:
        """Load a folder with config.json and model.safetensors: GPT-2's or one of this project's.

        "gpt2", "gpt2-medium", "gpt2-large" and "gpt2-xl" are looked up under data/downloads/. Keys
        may begin with "transformer."; mask buffers and a tied lm_head are ignored. Dropout is set
        by the caller, not by the file. Raises `BadInput` where the folder is not a language model.
        """
        folder = find_model(name_or_dir)
        config, _ = read_config(folder)
        weights = _read_weights(folder)
        if "score.weight" in weights:
            raise BadInput(
                f"{folder}: holds a scalar model (stage {read_info(folder).get('stage', '?')}), "
                "expected a language model: give a checkpoint of train_sft.py or train_ppo.py"
            )
        config.resid_pdrop = resid_pdrop
        return _make(cls, config, weights, folder, impl)


class _Decoder:
    """Rows being written, N of the B of a result: the tensors of a step, and the step.

    Nothing in `step` reads a value on the host or makes a tensor that the next step needs: it works
    on the buffers below, in place. So on a GPU the first step at a batch size runs as it is, which
    also warms up all kernels; the second is captured as a CUDA graph, and later ones are launches
    of that graph, one call each instead of some fifteen a layer.
    """

    def __init__(
        self, model: GPT, tokens: Tensor, lengths: Tensor, cache: KVCache, uniforms: Tensor,
        temperature: float,
    ):  # fmt: skip
        self.model, self.cache, self.temperature = model, cache, temperature
        self.tokens, self.lengths, self.uniforms = tokens, lengths, uniforms  # of all B rows
        self.start = lengths.clone()  # (B,) prompt lengths
        self.rows = torch.arange(len(tokens), device=tokens.device)  # (N,) which are written
        self.new = torch.empty_like(self.rows)  # (N,) their newest tokens
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)  # (N,)
        self.weight = model.unembedding.float()  # float32 logits: 16-bit ones are off by 0.1 nats
        self.captures = tokens.is_cuda
        self.steps_here = 0  # at this batch size
        self.graph: torch.cuda.CUDAGraph | None = None

    def write(self, hidden: Tensor) -> None:
        """Choose a token for each row from its last hidden state (N, C), and append it."""
        places = self.lengths[self.rows]
        with without_autocast(self.weight):
            logits = hidden.float() @ self.weight.T
        uniforms = self.uniforms[self.rows, places - self.start[self.rows]]
        end = self.model.config.eos_token_id
        self.new.copy_(_sample(logits, uniforms, self.temperature))
        self.new.masked_fill_(self.ended, end)
        # A row that ended but is still here writes the end token behind its end, where one stands.
        self.tokens[self.rows, places] = self.new
        self.lengths[self.rows] = places + (~self.ended).long()
        self.ended.logical_or_(self.new == end)

    def advance(self) -> None:
        """Run the newest tokens through the model, and write the next ones."""
        positions = self.lengths[self.rows] - 1
        x = self.model.wte(self.new) + self.model.wpe(positions)
        for block in self.model.h:
            x = block.step(x, positions, self.cache)
        self.write(self.model.ln_f(x))

    def step(self) -> None:
        """`advance`, on a GPU as a CUDA graph from the second step at a batch size on."""
        self.steps_here += 1
        if not self.captures or self.steps_here == 1:
            self.advance()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, runs nothing
                self.advance()
        self.graph.replay()

    def keep(self, size: int) -> None:
        """Go on with `size` rows: those that have not ended, filled up with some that have."""
        if size == len(self.rows):
            return
        self.graph, self.steps_here = None, 0  # the buffers move
        kept = self.ended.int().argsort(stable=True)[:size]
        self.cache.keep_rows(kept)
        self.rows, self.new, self.ended = self.rows[kept], self.new[kept], self.ended[kept]


def _next_size(going: int, size: int, steps_left: int, static: bool) -> int:
    """The batch size to go on with, where `going` of `size` rows have not ended.

    Copying the cache of fewer rows pays when a tenth has ended. With CUDA graphs a new size also
    costs a step without graph and a capture: sizes are powers of two from 8, and the step is made
    for a quarter of the rows and 16 steps.
    """
    if not static:
        return going if going < 0.9 * size else size
    smaller = max(8, 1 << (going - 1).bit_length())
    return smaller if smaller <= 0.75 * size and steps_left >= 16 else size


def _sample(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Invert the distribution function: logits (N, V) float32, uniforms (N,) -> tokens (N,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cdf = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    point = uniforms[:, None] * cdf[:, -1:]  # rounding may leave the sum a little off 1
    return torch.searchsorted(cdf, point, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def _unmask(values: Tensor, chosen: Tensor) -> Tensor:
    """Values at the chosen places of (B, T-1), as (B, T) float32 with 0 at t = 0 and elsewhere."""
    full = values.new_zeros(chosen.shape, dtype=torch.float32)
    full = full.masked_scatter(chosen, values.float())
    return F.pad(full, (1, 0))


class ScalarModel(nn.Module):
    """A GPT whose unembedding is replaced by a linear head to one number (InstructGPT 3.5, C).

    As the reward model, the number at a response's last token, before the end token, is the score
    of the response. As the value network, the number at position t - 1 is the value of the state
    before token t. The reward model's shift, by which demonstrations score 0 on average, lives in
    the head's bias, so a value network that starts from a reward model inherits it.
    """

    def __init__(self, config: GPTConfig, impl: str = "auto"):
        super().__init__()
        self.trunk = GPT(config, impl)
        self.score = nn.Linear(config.n_embd, 1)
        self._initialise_head()

    def _initialise_head(self) -> None:
        """Stiennon et al. 2020, B.1: std 1/sqrt(C + 1), zero bias, so first scores are O(1)."""
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(self.score.in_features + 1))
        nn.init.zeros_(self.score.bias)

    @property
    def config(self) -> GPTConfig:
        return self.trunk.config

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None,
        prefixes: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """One number per position: tokens (B, T) int64 -> (B, T) float32; see `GPT.forward`."""
        return self._head(self.trunk(tokens, lengths, prefixes=prefixes))

    def scores(
        self, tokens: Tensor, lengths: Tensor, prefixes: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """One number per row: (B, T), (B,) -> (B,) float32. With `prefixes`, see `GPT.forward`,
        what rows have in common is computed once.

        It is read at the row's last token or, where that is the end token, at the one before it. In
        pretraining the end token stands between documents: there the trunk has learned to leave
        behind what came before, which is what is to be judged. (A row that is the end token alone
        is read there.)
        """
        hidden = self.trunk(tokens, lengths, prefixes=prefixes)
        rows = torch.arange(len(tokens), device=tokens.device)
        last = lengths.long() - 1
        ended = tokens[rows, last] == self.config.eos_token_id
        return self._head(hidden[rows, (last - ended.long()).clamp_min(0)])

    def _head(self, hidden: Tensor) -> Tensor:
        with without_autocast(hidden):  # 16 bits would round a score of 4 to steps of 0.03
            return self.score(hidden.float()).squeeze(-1)

    @classmethod
    def from_gpt(cls, gpt: GPT, *, impl: str = "auto", resid_pdrop: float = 0.0) -> ScalarModel:
        """A copy of a language model's trunk under a fresh head."""
        config = GPTConfig(**asdict(gpt.config) | {"resid_pdrop": resid_pdrop})
        model = cls(config, impl)
        model.trunk.load_state_dict(gpt.state_dict())
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, impl: str = "auto", resid_pdrop: float = 0.0
    ) -> ScalarModel:
        """Load a checkpoint of train_rm.py. Raises `BadInput` where it is a language model."""
        folder = Path(folder)
        config, _ = read_config(folder)
        weights = _read_weights(folder)
        if "score.weight" not in weights:
            raise BadInput(
                f"{folder}: holds a language model (stage {read_info(folder).get('stage', '?')}), "
                "expected a reward model: give a checkpoint of train_rm.py"
            )
        config.resid_pdrop = resid_pdrop
        return _make(cls, config, weights, folder, impl)


def pad_right(sequences: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> tokens (B, T) int64, right-padded with `fill`, and lengths (B,) int32."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32)
    tokens = torch.full((len(sequences), int(lengths.max())), fill)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return tokens.to(device), lengths.to(device)


# ------------------------------------------------------------------------------------------------
# Reading and writing model folders


def find_model(name_or_dir: str | Path) -> Path:
    """The folder of a model: a path as it is, a name of GPT-2 under data/downloads/."""
    if str(name_or_dir) in GPT2_NAMES and not Path(name_or_dir).is_dir():
        folder = DOWNLOADS / str(name_or_dir)
        absent = not folder.is_dir()
        if absent or not (folder / "model.safetensors").exists():  # a download that did not end
            raise BadInput(
                f"{folder}: {'no such folder' if absent else 'holds no weights'}; get them with "
                f"`python -m data.prepare --download {name_or_dir}`"
            )
        return folder
    return Path(name_or_dir)


def read_info(folder: str | Path) -> dict[str, Any]:
    """All of a folder's config.json: the model's shape, and stage, data and settings of its run."""
    path = Path(folder) / "config.json"
    try:
        info = files.parse_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise BadInput(
            f"{path}: no such file; expected a checkpoint folder with config.json and "
            "model.safetensors (has the stage before finished?)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    if not isinstance(info, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(info).__name__}")
    return info


def read_config(folder: str | Path) -> tuple[GPTConfig, dict[str, Any]]:
    """The model's shape from a folder's config.json, and the whole of that file."""
    info = read_info(folder)
    path = Path(folder) / "config.json"
    for key, needed in GPT2_FIXED.items():
        if info.get(key, needed[0]) not in needed:
            raise BadInput(f'{path}: key "{key}": expected {needed[0]!r}, found {info[key]!r}')
    names = {field.name for field in fields(GPTConfig)}
    values = {"n_positions": info.get("n_ctx")} | {k: v for k, v in info.items() if k in names}
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if values.get(name) is None:
            raise BadInput(f'{path}: key "{name}" is missing; expected a GPT-2 config')
    values.setdefault("eos_token_id", values["vocab_size"] - 1)
    try:
        return GPTConfig(**values), info
    except (BadInput, TypeError) as error:
        raise BadInput(f"{path}: {error}") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors under this project's names."""
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; expected weights beside config.json") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error})") from None
    weights = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight":
            weights[name] = tensor
    return weights


def _make(
    kind: type[GPT | ScalarModel], config: GPTConfig, weights: dict[str, Tensor], folder: Path,
    impl: str,
) -> Any:  # fmt: skip
    """A GPT or ScalarModel of that shape, with those weights in float32."""
    path = folder / "model.safetensors"
    # Read off the embeddings first: a config may ask for a model that no memory holds.
    outer = {"wte.weight": (config.vocab_size, config.n_embd),
             "wpe.weight": (config.n_positions, config.n_embd)}  # fmt: skip
    for name, shape in outer.items():
        if name in weights and weights[name].shape != shape:
            raise BadInput(
                f"{path}: does not fit config.json; {name} is {tuple(weights[name].shape)}, "
                f"expected {shape}"
            )
    num_layers = sum(name.endswith(".ln_1.weight") for name in weights)
    if num_layers != config.n_layer:
        raise BadInput(
            f"{path}: does not fit config.json; holds {num_layers} layers, expected n_layer "
            f"{config.n_layer}"
        )
    with torch.device("meta"):
        model = kind(config, impl)
    if kind is ScalarModel:
        weights = {
            name if name.startswith("score.") else f"trunk.{name}": tensor
            for name, tensor in weights.items()
        }
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
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
    weights = {name: tensor.float() for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True)


def check_tokenizer(config: GPTConfig, encoding: Any, path: str | Path) -> None:
    """Raise `BadInput` unless the tokenizer's ids are the model's and so is its end token."""
    if encoding.n_vocab > config.vocab_size or encoding.eot_token != config.eos_token_id:
        raise BadInput(
            f"{path}: {encoding.n_vocab} entries with end token {encoding.eot_token} do not fit a "
            f"model with vocab_size {config.vocab_size} and eos_token_id {config.eos_token_id}; "
            "give the tokenizer that the model was trained with"
        )


def save_model(
    folder: str | Path, model: GPT | ScalarModel, tokenizer_json: str, info: dict[str, Any]
) -> None:
    """Write config.json, tokenizer.json and, last, model.safetensors, each atomically.

    `info` (stage, data, settings) goes into config.json beside the shape, under keys of its own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = asdict(model.config) | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel" if isinstance(model, GPT) else "ScalarModel"],
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
    # In a folder aside, because safetensors writes to a file of its own making first, which a
    # killed process would leave behind; and it makes that file private.
    aside = folder / f".model.safetensors.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", aside / "model.safetensors")
        files.flush_to_disk(aside / "model.safetensors")
        os.replace(aside / "model.safetensors", folder / "model.safetensors")
        files.flush_to_disk(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _interned(value: Any) -> Any:
    """The same nested dicts and lists, equal keys being one object. Pickle writes each object once
    and then refers to it, so only then are the files of equal states equal."""
    if isinstance(value, dict):
        return {sys.intern(k) if isinstance(k, str) else k: _interned(v) for k, v in value.items()}
    return [_interned(v) for v in value] if isinstance(value, list) else value


class Checkpoints:
    """The folder of one run: what it needs to go on (`checkpoints/<step>/`) and its result.

    Every random draw of step i in the three scripts is a function of the seed and of i, and so is
    every batch. So weights, optimizer states, logs and the step are all there is to save, and a
    resumed run is the uninterrupted run, on a CPU bit for bit. An earlier result in the same folder
    stays until the first checkpoint of the new run.

    config.json of a checkpoint and of the result has "settings", and where a resume changed them
    "changes": a list of {"after_step", "settings"}, the settings up to and with that step.
    """

    KEEP = 2

    def __init__(self, out: str | Path, settings: dict[str, Any]):
        """`settings`: everything that decides the run's numbers; a resume refuses other ones."""
        self.out, self.folder, self.settings = Path(out), Path(out) / "checkpoints", settings
        self.resumed_from: Path | None = None
        self.changes: list[dict[str, Any]] = []
        self._fresh = True  # no checkpoint of this run is there yet
        files.check_writable(self.out)
        for folder in (self.out, self.folder, self.out / "epochs"):
            files.remove_leftovers(folder)

    def resume(self, restore: Callable[[dict[str, Any]], None], changed: bool = False) -> int:
        """Give the state of the newest intact checkpoint to `restore`; return its step, else 0.

        A damaged checkpoint (checksums) is passed over with a warning. Raises `BadInput` if all
        that is left is of a run with other settings, or if this run has gone on with other ones
        after its newest checkpoint with these; unless `changed`, which goes on with the newest,
        says what differs and records it.
        """
        intact = []
        for folder in sorted(self.folder.glob("[0-9]*"), reverse=True):
            if files.folder_is_intact(folder):
                intact.append(folder)
            elif not intact:
                print(f"warning: {folder} is damaged; trying the one before", file=sys.stderr)
        # A run killed while it replaced an earlier run's checkpoints may leave both.
        mine = [folder for folder in intact if not self._differences(folder)]
        newer = intact[: intact.index(mine[0])] if mine else intact
        went_on = any(self._was_mine(folder) for folder in newer)
        if intact and not changed and (went_on or not mine):
            raise BadInput(
                f"{intact[0]}: --resume with other settings: {self._differences(intact[0])}; give "
                "the old ones, start over without --resume, or give --resume_changed to go on with "
                "the new ones"
            )
        for folder in (intact if changed else mine)[:1]:
            try:
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                restore(state)
                step = int(state["step"])
                self._record_changes(folder, step)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # crafted or of another version; weights_only runs nothing
                if isinstance(error, RuntimeError) and "can't allocate" in str(error):
                    raise  # a CPU's memory
                raise BadInput(
                    f"{folder}/state.pt: not the state of such a run ({type(error).__name__}); "
                    "start over without --resume"
                ) from error
            self._fresh, self.resumed_from = False, folder
            # What `save` would have removed next, had the process not been killed.
            older = sorted(f for f in intact if f.name < folder.name and self._is_mine(f))
            for superseded in set(self.folder.glob("[0-9]*")) - {*older[1 - self.KEEP :], folder}:
                shutil.rmtree(superseded)
            for epoch in (self.out / "epochs").glob("[0-9]*"):
                if not files.folder_is_intact(epoch) or not self._is_mine(epoch):
                    shutil.rmtree(epoch)  # of an earlier run, see above
            self._drop_steps(step)
            self._keep_epoch(folder)
            return step
        return 0

    def _record_changes(self, folder: Path, step: int) -> None:
        """Go on with a checkpoint's history of settings; say what differs from the last ones."""
        info = read_info(folder)
        self.changes = info.get("changes", [])
        if differ := self._differences(folder):
            print(f"warning: from step {step} on with other settings: {differ}", file=sys.stderr)
            self.changes.append({"after_step": step, "settings": info.get("settings")})

    def _is_mine(self, folder: Path) -> bool:
        """Whether a folder's settings are this run's, now or before a change."""
        before = [change["settings"] for change in self.changes]
        return not self._differences(folder) or read_info(folder).get("settings") in before

    def _was_mine(self, folder: Path) -> bool:
        """Whether a folder's run had this run's settings before it went on with others."""
        changes = read_info(folder).get("changes")
        changes = changes if isinstance(changes, list) else []
        before = [c.get("settings") for c in changes if isinstance(c, dict)]
        return any(isinstance(s, dict) and not self._differing(s) for s in before)

    def _recorded(self) -> dict[str, Any]:
        """What config.json says of the settings."""
        return {"settings": self.settings} | ({"changes": self.changes} if self.changes else {})

    def _differences(self, folder: Path) -> str:
        """In what the settings of a checkpoint differ from this run's; empty if in nothing."""
        before = read_info(folder).get("settings")
        if not isinstance(before, dict):
            return "none are recorded"
        return ", ".join(
            f"{k} was {before.get(k)!r}, is {self.settings[k]!r}" for k in self._differing(before)
        )

    def _differing(self, before: dict[str, Any]) -> list[str]:
        return [k for k in self.settings if before.get(k) != self.settings[k]]

    def save(
        self,
        step: int,
        model: GPT | ScalarModel,
        tokenizer_json: str,
        info: dict[str, Any],
        state: dict[str, Any],
        logs: tuple[files.Log, ...] = (),
    ) -> None:
        """Write `checkpoints/<step>/` whole, then drop all but the newest `KEEP` of this run.

        Where `info` has an "epoch", the model is also kept as `epochs/<epoch>/`.
        """

        def write(aside: Path) -> None:
            save_model(aside, model, tokenizer_json, info | self._recorded())
            torch.save(_interned(state | {"step": step}), aside / "state.pt")
            for log in logs:
                log.copy_to(aside)

        name = f"{step:08d}"
        files.write_folder_atomic(self.folder / name, write)
        # Newer ones are damaged; those beside the first of a new run are an earlier run's.
        folders = sorted(self.folder.glob("[0-9]*"))
        mine = [f for f in folders if f.name == name or f.name < name and not self._fresh]
        for superseded in set(folders) - set(mine[-self.KEEP :]):
            shutil.rmtree(superseded)
        if self._fresh:
            (self.out / "model.safetensors").unlink(missing_ok=True)
            (self.out / "bad_batch.json").unlink(missing_ok=True)
            shutil.rmtree(self.out / "epochs", ignore_errors=True)
            self._drop_steps(step)
            self._fresh = False
        for log in logs:
            log.keep()
        self._keep_epoch(self.folder / name)

    def keep_step(
        self, step: int, model: GPT | ScalarModel, tokenizer_json: str, info: dict[str, Any]
    ) -> None:
        """Keep the model of a step as `steps/<step>/`, whatever becomes of the checkpoints."""
        folder = self.out / "steps" / f"{step:05}"
        save_model(folder, model, tokenizer_json, info | self._recorded())

    def _drop_steps(self, step: int) -> None:
        """Drop the models under `steps/` that are an earlier run's or of later than `step`."""
        for folder in (self.out / "steps").glob("[0-9]*"):
            mine = (folder / "model.safetensors").exists() and (
                self._is_mine(folder)
                # Kept by an older version, which recorded no settings and dropped all at a start.
                or (not self._fresh and "settings" not in read_info(folder))
            )
            if not mine or not folder.name.isdigit() or int(folder.name) > step:
                shutil.rmtree(folder)

    def _keep_epoch(self, checkpoint: Path) -> None:
        """Copy a checkpoint's model to `epochs/`; again after a resume: the copy may be missing."""
        epoch = read_info(checkpoint).get("epoch")
        folder = self.out / "epochs" / f"{epoch:02}" if type(epoch) is int else None
        if folder and not files.folder_is_intact(folder):

            def write(aside: Path) -> None:
                for name in ("config.json", "tokenizer.json", "model.safetensors"):
                    shutil.copy(checkpoint / name, aside)

            files.write_folder_atomic(folder, write)

    def finish(
        self, model: GPT | ScalarModel, tokenizer_json: str, info: dict[str, Any]
    ) -> None:
        """Write the run's result, which the next stage reads, beside `checkpoints/`."""
        save_model(self.out, model, tokenizer_json, info | self._recorded())
