"""GPT-2 and its scalar-headed twin: the architecture that the three stages share.

    GPT           tokens -> hidden states; log-probs of given tokens; sampling with a KV cache
    ScalarModel   the same trunk with one number per position: reward model and value network

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

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from checkpoint import check_config, find_model, load_model
from generate import KVCache, compute_dtype, generate, without_autocast


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
        check_config(self)


class Linear(nn.Module):
    """y = x weight + bias with weight (in, out): the transpose of nn.Linear, as GPT-2 stores it."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], y.shape[-1])


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
                hidden.to(dtype),
                weight.to(dtype),
                tokens[:, 1:][chosen],
                temperature=temperature,
                impl=self.impl,
            )
        return _unmask(logprobs, chosen), _unmask(entropy, chosen)

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
        return generate(
            self,
            prompts,
            prompt_lengths,
            max_new_tokens,
            temperature=temperature,
            generator=generator,
            repeats=repeats,
            static=_static,
        )

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
        return load_model(cls, GPTConfig, folder, impl=impl, resid_pdrop=resid_pdrop)


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
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        prefixes: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
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
        return load_model(cls, GPTConfig, Path(folder), impl=impl, resid_pdrop=resid_pdrop)


def pad_right(sequences: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> tokens (B, T) int64, right-padded with `fill`, and lengths (B,) int32."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32)
    tokens = torch.full((len(sequences), int(lengths.max())), fill)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return tokens.to(device), lengths.to(device)


# ------------------------------------------------------------------------------------------------
# Reading and writing model folders
