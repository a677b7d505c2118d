"""A response, token by token: what `GPT.generate` does.

    hidden = model(prompts, lengths, cache)      the prompts, once; keys and values go to the cache
    repeat:
        logits = hidden @ unembedding^T          (N, V), from the newest token of each row
        token ~ softmax(logits / temperature)    one uniform number a row and step
        hidden = blocks of one token             attends to the cache
    until each row has its end token, or the limit

Once a tenth of the rows have ended, they are dropped from the batch. On a GPU a step is one CUDA
graph, and sizes are powers of two. This file imports no model: functions take one.

Dimensions: B rows of the result, N rows still being written, P prompt tokens, S cache length,
H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
from torch import Tensor


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Tensor,
    prompt_lengths: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    static: bool | None = None,
    uniforms: Tensor | None = None,
    at_once: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sample a response to each prompt: arguments and result as of `GPT.generate`.

    The randomness is one uniform number per row and step, all drawn at the start as
    (B, max_new_tokens): a row's sample depends neither on when other rows end nor on `at_once`.
    With `static` (on a GPU, and in tests) a step's tensors keep their addresses and batch sizes are
    few, so that a step can be one CUDA graph. Raises ValueError if a prompt and its response do not
    fit n_positions, FloatingPointError where the model's numbers overflow.
    """
    device, end = prompts.device, model.config.eos_token_id
    static = device.type == "cuda" if static is None else static
    B, P = prompts.shape
    longest_prompt = int(prompt_lengths.max())
    longest = longest_prompt + max_new_tokens
    if longest > model.config.n_positions:
        raise ValueError(
            f"prompt and max_new_tokens {max_new_tokens} come to {longest} tokens, over "
            f"n_positions {model.config.n_positions}: lower max_prompt_tokens or max_new_tokens"
        )
    tokens = prompts.new_full((B, P + max_new_tokens), end)
    inside = torch.arange(P, device=device) < prompt_lengths[:, None]
    tokens[:, :P] = torch.where(inside, prompts, end)
    lengths = prompt_lengths.long().clone()  # grows with the responses
    if 0 < temperature < 1e-6:
        raise ValueError(f"temperature {temperature}: logits overflow; give 0 or at least 1e-6")
    if max_new_tokens == 0:
        return tokens, lengths.int()
    if uniforms is None:
        uniforms = torch.rand(B, max_new_tokens, generator=generator, device=device)
    if 0 < at_once < B:
        for rows in prompt_lengths.argsort(stable=True).split(at_once):  # of similar length
            given = prompts[rows, : int(prompt_lengths[rows].max())], prompt_lengths[rows]
            how = {"static": static, "uniforms": uniforms[rows]}
            part, ends = generate(model, *given, max_new_tokens, temperature, **how)
            tokens[rows, : part.shape[1]], lengths[rows] = part, ends.long()
        return tokens, lengths.int()

    model = for_decoding(model)
    with model.autocast():
        # Neighbours with the same prompt read it once, and then get a cache each.
        first = differ_from_above(tokens, lengths)
        sources, distinct = first.cumsum(0) - 1, tokens[first, :longest_prompt]
        cache = KVCache(model, len(distinct), longest)
        hidden = model(distinct, lengths[first].int(), cache)
        if len(distinct) < B:
            cache.keep_rows(sources)
        decoder = Decoder(model, tokens, lengths, cache, uniforms, temperature)
        decoder.write(hidden[sources, lengths - 1])
        del hidden
        look_every = 8 if static else 1  # reading `ended` waits for the device
        for step in range(1, max_new_tokens):
            if step % look_every == 0:
                going = int((~decoder.ended).sum())
                if going == 0:
                    break
                decoder.keep(next_size(going, len(decoder.rows), max_new_tokens - step, static))
            decoder.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the graph must not be freed while it runs
    if decoder.overflow:
        raise FloatingPointError("the model's numbers are not finite: its weights are out of range")
    return tokens, decoder.lengths.int()


def differ_from_above(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Which rows are not the row above once more: (B, T), (B,) -> (B,) bool, the first always."""
    first = torch.ones_like(lengths, dtype=torch.bool)
    first[1:] = (tokens[1:] != tokens[:-1]).any(1) | (lengths[1:] != lengths[:-1])
    return first


def for_decoding(gpt: nn.Module) -> nn.Module:
    """The model with its blocks' matrices in the dtype of their products: cast once, not each
    step. All else is shared with `gpt`; if there is nothing to cast, it is `gpt` itself."""
    stored = gpt.h[0].attn.c_attn.weight.dtype
    if gpt.dtype == "float32" or stored == getattr(torch, gpt.dtype):
        return gpt
    model = copy.copy(gpt)
    model._modules = dict(gpt._modules)
    model.h = nn.ModuleList(gpt.cast(copy.deepcopy(block)) for block in gpt.h)
    return model


class KVCache:
    """Keys and values of every layer for the tokens seen so far, (B, H, S, D) each."""

    def __init__(self, model: nn.Module, batch: int, size: int):
        config, weight = model.config, model.h[0].attn.c_attn.weight
        shape = (batch, config.n_head, size, config.n_embd // config.n_head)
        self.keys = [weight.new_empty(shape) for _ in range(config.n_layer)]
        self.values = [weight.new_empty(shape) for _ in range(config.n_layer)]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all but the given batch rows; one that is given twice is there twice."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):  # one at a time: the old one is freed
                tensors[layer] = tensor[rows]


class Decoder:
    """The N rows still being written, of B: the tensors of a step, and the step.

    Nothing in `step` reads a value on the host or makes a tensor that the next step needs: it works
    on the buffers below, in place. So on a GPU the first step at a batch size runs as it is, which
    also warms up all kernels. The second is captured as a CUDA graph. Later ones launch that graph:
    one call each, instead of about fifteen a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        lengths: Tensor,
        cache: KVCache,
        uniforms: Tensor,
        temperature: float,
    ):
        self.model, self.cache, self.temperature = model, cache, temperature
        self.tokens, self.lengths, self.uniforms = tokens, lengths, uniforms  # of all B rows
        self.start = lengths.clone()  # (B,) prompt lengths
        self.rows = torch.arange(len(tokens), device=tokens.device)  # (N,) which are written
        self.new = torch.empty_like(self.rows)  # (N,) their newest tokens
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)  # (N,)
        self.overflow = torch.zeros((), dtype=torch.bool, device=tokens.device)  # anywhere so far
        self.weight = model.unembedding.float()  # float32 logits: 16-bit ones are off by 0.1 nats
        self.captures = tokens.is_cuda
        self.steps_here = 0  # at this batch size
        self.graph: torch.cuda.CUDAGraph | None = None

    def write(self, hidden: Tensor) -> None:
        """Choose a token for each row from its last hidden state (N, C), and append it."""
        ends = self.lengths[self.rows]
        with torch.autocast(self.weight.device.type, enabled=False):
            logits = hidden.float() @ self.weight.T
        self.overflow.logical_or_(~hidden.isfinite().all())
        uniforms = self.uniforms[self.rows, ends - self.start[self.rows]]
        end = self.model.config.eos_token_id
        self.new.copy_(sample(logits, uniforms, self.temperature))
        self.new.masked_fill_(self.ended, end)
        # A row that ended but is still here writes the end token past its end, over one.
        self.tokens[self.rows, ends] = self.new
        self.lengths[self.rows] = ends + (~self.ended).long()
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
        """Continue with `size` rows: those that have not ended, filled up with some that have."""
        if size == len(self.rows):
            return
        self.graph, self.steps_here = None, 0  # the buffers move
        kept = self.ended.int().argsort(stable=True)[:size]
        self.cache.keep_rows(kept)
        self.rows, self.new, self.ended = self.rows[kept], self.new[kept], self.ended[kept]


def next_size(going: int, size: int, steps_left: int, static: bool) -> int:
    """The next batch size, if `going` of `size` rows have not ended.

    Copying the cache of fewer rows pays once a tenth has ended. With CUDA graphs a new size also
    costs a step without graph and a capture: sizes are powers of two from 8, and change only if a
    quarter of the rows goes and 16 steps are left.
    """
    if not static:
        return going if going < 0.9 * size else size
    smaller = max(8, 1 << (going - 1).bit_length())
    return smaller if smaller <= 0.75 * size and steps_left >= 16 else size


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Invert the distribution function: logits (N, V) float32, uniforms (N,) -> tokens (N,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cdf = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    point = uniforms[:, None] * cdf[:, -1:]  # rounding may leave the sum a little off 1
    return torch.searchsorted(cdf, point, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
