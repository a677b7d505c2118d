"""GPT-2 and its scalar-headed twin: the architecture that the three stages share.

    GPT           tokens -> hidden states; log-probs of given tokens; responses (generate.py)
    ScalarModel   the same trunk with one number per position: reward model and value network

Dimensions: B batch, T tokens, C width, H heads, D = C / H head size, V vocabulary, N listed tokens.

Sequences are right-padded and masks come from lengths, never from token ids. A causal model never
looks to the right, so tokens past a row's end cannot affect it: training needs no attention mask,
positions are a plain 0..T-1, and there is no pad token (any id may fill the tail).

The architecture is GPT-2's (Radford et al. 2019), as GPT-3 and InstructGPT use it: pre-norm blocks,
learned positions, tanh GELU, output embedding tied to the input embedding. GPT-3 alternates dense
and banded attention layers (Brown et al. 2020, 2.1; the band is not published); here all are dense.
Parameter names and layout are GPT-2's, so its weights load here and ours load elsewhere.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import generate
import kernels
from checkpoint import check_config, find_model, load_model

MISSING_EOS_SCORE = -4.0  # of a response without an end token, see `ScalarModel.response_scores`


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
    score_mod: str = "causal"  # the attention function, see kernels/score_mods.py

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


class Attention(nn.Module):
    """Multi-head causal attention: y = softmax(q k^T / sqrt(D)) v for each head, then a projection
    of the heads side by side. `kernels.attention` does the first, or another `score_mod`."""

    def __init__(self, config: GPTConfig, layer: int, impl: str):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.how = {"score_mod": config.score_mod, "impl": impl}
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, lengths=None, packing=None, cache=None) -> Tensor:
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
        y = kernels.attention(q, k, v, lengths, **self.how)
        y = y.transpose(1, 2).reshape(B, T, C)  # the kernel lays y out as (B, T, H, D): no copy
        if packing:
            y = packing.to_list(y)
        return self.dropout(self.c_proj(y))

    def step(self, x: Tensor, positions: Tensor, cache: generate.KVCache) -> Tensor:
        """One new token a row: (B, C) at `positions` (B,) -> (B, C), its key and value cached."""
        B, C = x.shape
        q, k, v = self.c_attn(x).view(B, 3, self.n_head, C // self.n_head).unbind(1)  # (B, H, D)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        rows = torch.arange(B, device=x.device)
        keys[rows, :, positions] = k
        values[rows, :, positions] = v
        y = kernels.decode_attention(q, keys, values, (positions + 1).int(), **self.how)
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

    def forward(self, x: Tensor, lengths=None, packing=None, cache=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), lengths, packing, cache)
        return x + self.mlp(self.ln_2(x))

    def step(self, x: Tensor, positions: Tensor, cache: generate.KVCache) -> Tensor:
        x = x + self.attn.step(self.ln_1(x), positions, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Embeddings, blocks, a last layer norm: tokens -> hidden states; `logprobs` adds the head.

    `impl` chooses the kernels: "auto" (Triton on CUDA, torch elsewhere), a name of one of their
    implementations, or "attention=name,logprobs=name". `dtype` is that of matrix products:
    "bfloat16" is autocast on float32 weights, whose sums and log-probs stay in float32.

    `packs`: use `Packing` on a GPU too. It saves the work on repeated beginnings and costs one wait
    for the GPU per forward pass; on a CPU it is always used.
    `gradient_checkpointing`: keep only each block's input for the backward pass, which computes the
    block again. At 16 bits, activations take about a ninth of the memory, and training a third more
    time. Gradients are the same, dropout included.
    """

    def __init__(self, config: GPTConfig, impl: str = "auto", dtype: str = "float32"):
        super().__init__()
        self.config, self.impl, self.dtype = config, impl, dtype
        self.packs = self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.h = nn.ModuleList(Block(config, layer, impl) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal of std `initializer_range`; projections onto the residual stream times
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
        before" is then one rotation for all t, not T lessons: small models learn to copy sooner.
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

    def autocast(self) -> torch.autocast:
        """The context in which matrix products have this model's `dtype`."""
        device = self.wte.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, cache=None) -> Tensor:
        """Final hidden states: tokens (B, T) int64 -> (B, T, C), after the last layer norm.

        `lengths` (B,) int32 spares work past each row's end (hidden states there are finite but
        meaningless) and on beginnings that neighbouring rows share (see `Packing`). A `cache`
        (generate.py) is filled. Raises ValueError if T is over n_positions.
        """
        T = tokens.shape[1]
        if T > self.config.n_positions:
            raise ValueError(
                f"sequence of {T} tokens, over n_positions {self.config.n_positions}: "
                "shorten it or use a model with a longer context"
            )
        packing = None
        if lengths is not None and (self.packs or not tokens.is_cuda):
            dropout = self.training and self.config.resid_pdrop > 0  # differs from row to row
            packing = Packing.make(tokens, lengths, share=not dropout)
        with self.autocast():
            x = self.wte(tokens) + self.wpe.weight[:T]
            x = self.dropout(packing.to_list(x) if packing else x)
            recompute = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
            for block in self.h:
                if recompute:
                    x = checkpoint(block, x, lengths, packing, use_reentrant=False)
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
    ) -> tuple[Tensor, Tensor]:
        """Log-prob of each token given those before it, and the entropy of that choice, in nats.

            logprobs[:, t] = log softmax(hidden[:, t-1] unembedding^T / temperature)[tokens[:, t]]

        tokens (B, T) int64, mask (B, T) bool -> both (B, T) float32, 0 at t = 0. The head runs on
        masked positions only (without a mask: on those within `lengths`); elsewhere both are 0.
        """
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
            if lengths is not None:
                mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        chosen = mask[:, 1:]
        hidden = self(tokens, lengths)[:, :-1][chosen]  # position t - 1 predicts token t
        weight = self.unembedding
        if self.dtype == "bfloat16":  # the kernel's inputs; its sums are float32
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        with torch.autocast(weight.device.type, enabled=False):
            both = kernels.logprobs(
                hidden, weight, tokens[:, 1:][chosen], temperature=temperature, impl=self.impl
            )
        zeros = torch.zeros(chosen.shape, device=tokens.device)
        logprobs, entropy = (zeros.masked_scatter(chosen, values.float()) for values in both)
        return F.pad(logprobs, (1, 0)), F.pad(entropy, (1, 0))

    def generate(
        self,
        prompts: Tensor,
        prompt_lengths: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        uniforms: Tensor | None = None,
        at_once: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """A response to each prompt, until the end token or the limit: see generate.py.

        prompts (B, P) int64 right-padded, prompt_lengths (B,) int32 -> tokens
        (B, P + max_new_tokens) int64 and lengths (B,) int32. Each row is its prompt, then its
        response without a gap, the tail filled with the end token; a length counts prompt, response
        and end token. Temperature 0 takes the likeliest token. The random numbers, `uniforms`
        (B, max_new_tokens) from 0 to 1, come from the generator unless given. `at_once`: so many
        rows at a time, those with prompts of similar length together; 0: all.
        """
        how = {"uniforms": uniforms, "at_once": at_once}
        return generate.generate(
            self, prompts, prompt_lengths, max_new_tokens, temperature, generator, **how
        )

    def cast(self, module: nn.Module) -> nn.Module:
        """Store a module's matrices in `dtype`: half the memory at 16 bits, and bit for bit the
        same results, because autocast would round them at each use."""
        for each in module.modules():
            if isinstance(each, Linear):
                each.to(getattr(torch, self.dtype))
        return module

    def frozen(self) -> GPT:
        """A copy for forward passes alone, its matrices stored in `dtype` (see `cast`)."""
        return self.cast(copy.deepcopy(self)).requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, **options) -> GPT:
        """Load a folder with config.json and model.safetensors: GPT-2's or one of this project's.

        "gpt2", "gpt2-medium", "gpt2-large" and "gpt2-xl" are looked up under data/downloads/.
        Options: impl, dtype, resid_pdrop (dropout is set by the caller, not by the file) and
        score_mod (None: the file's). Raises `BadInput` if the folder is not a language model.
        """
        return load_model(cls, GPTConfig, find_model(name_or_dir), **options)


class ScalarModel(nn.Module):
    """A GPT whose unembedding is replaced by a linear head to one number (the paper's 3.5 and C).

    As the reward model, the number at a response's last token, before the end token, is the score
    of the response. As the value network, the number at position t - 1 is the value of the state
    before token t. The reward model's shift, by which demonstrations score 0 on average, lives in
    the head's bias, so a value network that starts from a reward model inherits it.
    """

    def __init__(self, config: GPTConfig, impl: str = "auto", dtype: str = "float32"):
        super().__init__()
        self.trunk = GPT(config, impl, dtype)
        self.score = nn.Linear(config.n_embd, 1)
        # Stiennon et al. 2020, B.1: std 1/sqrt(C + 1), zero bias, so first scores are O(1).
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1))
        nn.init.zeros_(self.score.bias)

    @property
    def config(self) -> GPTConfig:
        return self.trunk.config

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One number per position: tokens (B, T) int64 -> (B, T) float32; see `GPT.forward`."""
        return self._head(self.trunk(tokens, lengths))

    def scores(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """One number per row, the score of its response: (B, T), (B,) -> (B,) float32.

        It is read at the row's last token or, if that is the end token, at the one before it. In
        pretraining the end token separates documents: there the trunk has learned to forget the
        text, and the text is what we score. (A row of the end token alone is read there.)
        """
        hidden = self.trunk(tokens, lengths)
        rows = torch.arange(len(tokens), device=tokens.device)
        last = lengths.long() - 1
        ended = tokens[rows, last] == self.config.eos_token_id
        return self._head(hidden[rows, (last - ended.long()).clamp_min(0)])

    @torch.no_grad()
    def response_scores(
        self, tokens: Tensor, lengths: Tensor, missing_eos_score: float, at_once: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a response is worth, in PPO and in evaluation: the model's number, or without an end
        token `missing_eos_score`. Returns that, the model's number, and whether the response ended:
        (B,) each. Computed on `at_once` rows at a time (0: all)."""
        size = at_once or len(tokens)
        parts = zip(tokens.split(size), lengths.split(size), strict=True)
        own = torch.cat([self.scores(y[:, : int(n.max())], n) for y, n in parts])
        last = tokens.gather(1, lengths[:, None].long() - 1).squeeze(1)
        ended = last == self.config.eos_token_id
        return torch.where(ended, own, missing_eos_score), own, ended

    def _head(self, hidden: Tensor) -> Tensor:
        # Always in float32: 16 bits would round a score of 4 to steps of 0.03.
        return self.score(hidden.float()).squeeze(-1)

    def frozen(self) -> ScalarModel:
        """A copy for forward passes alone, see `GPT.frozen`; the head stays in float32."""
        return self.trunk.cast(copy.deepcopy(self)).requires_grad_(False).eval()

    @classmethod
    def from_gpt(cls, gpt: GPT, *, resid_pdrop: float = 0.0) -> ScalarModel:
        """A copy of a language model's trunk under a fresh head."""
        config = GPTConfig(**asdict(gpt.config) | {"resid_pdrop": resid_pdrop})
        model = cls(config, gpt.impl, gpt.dtype)
        model.trunk.load_state_dict(gpt.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> ScalarModel:
        """Load a checkpoint of train_rm.py, with the options of `GPT.from_pretrained`. Raises
        `BadInput` if it is a language model."""
        return load_model(cls, GPTConfig, Path(folder), **options)


@dataclass
class Packing:
    """Right-padded rows (B, T) as a list of N tokens, without padding and without repetitions.

    All layers but attention treat tokens one by one, on (N, C); attention needs rows. If a row
    begins with the same tokens as the row above it, as responses to one prompt do, the common
    beginning is listed once: a causal model computes the same for both.
    """

    index: Tensor  # (B, T): the number, in the list, of the token at each place (of padding: any)
    flat: Tensor  # (N,): the position in (B * T,) of each listed token

    @classmethod
    def make(cls, tokens: Tensor, lengths: Tensor, share: bool = True) -> Packing:
        """Of `tokens` (B, T) with `lengths` (B,). Without `share`, repetitions are listed too."""
        B, T = tokens.shape
        inside = torch.arange(T, device=tokens.device) < lengths[:, None]
        listed = inside.clone()
        if share:
            same = (tokens[1:] == tokens[:-1]) & inside[1:] & inside[:-1]
            listed[1:] &= ~same.cumprod(1).bool()  # a beginning ends at the first difference
        number = (listed.flatten().cumsum(0) - 1).view(B, T)
        # A repeated token is the last one listed above it, which has the largest number.
        index = torch.where(listed, number, -1).cummax(0).values.clamp_min(0)
        return cls(index, listed.flatten().nonzero().squeeze(1))

    def to_rows(self, x: Tensor) -> Tensor:
        """(N, C) -> (B, T, C)."""
        if len(x) == 0:  # all rows are empty: padding needs a token to point at
            x = torch.cat((x, x.new_zeros(1, x.shape[-1])))
        return x.index_select(0, self.index.flatten()).view(*self.index.shape, -1)

    def to_list(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (N, C)."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.flat)


def pad_right(sequences: list[list[int]], fill: int, device: str) -> tuple[Tensor, Tensor]:
    """Token lists -> tokens (B, T) int64, right-padded with `fill`, and lengths (B,) int32."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32)
    tokens = torch.full((len(sequences), int(lengths.max())), fill)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return tokens.to(device), lengths.to(device)
