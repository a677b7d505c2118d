"""A model with the Triton kernels learns and samples like one with PyTorch's."""

import pytest
import torch

from model import GPT, GPTConfig
from tests.interpreter import gpu_or_cpu, needs_triton

SHAPE = {"vocab_size": 50, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2}


def make_model(impl: str, **changes) -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(**SHAPE, eos_token_id=49, **changes), impl=impl).to(gpu_or_cpu())


def losses(impl: str, score_mod: str) -> list[float]:
    model = make_model(impl, score_mod=score_mod)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(50, (4, 20), generator=torch.Generator().manual_seed(2)).to(gpu_or_cpu())
    lengths = torch.tensor([20, 11, 1, 17], dtype=torch.int32, device=tokens.device)
    inside = torch.arange(20, device=tokens.device) < lengths[:, None]
    out = []
    for _ in range(4):
        logprobs, entropy = model.logprobs(tokens, lengths)
        loss = -(logprobs * inside).sum() / inside.sum() - 0.01 * (entropy * inside).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


@needs_triton
@pytest.mark.parametrize("score_mod", ["causal", "alibi"])
def test_training_follows_torch(score_mod):
    expected = losses("torch", score_mod)
    assert expected[-1] < expected[0] - 0.1
    assert losses("triton", score_mod) == pytest.approx(expected, abs=1e-4)


@needs_triton
def test_score_mods_change_the_model():
    assert abs(losses("torch", "causal")[0] - losses("torch", "alibi")[0]) > 1e-5


@needs_triton
@pytest.mark.parametrize("score_mod", ["causal", "softcap"])
def test_sampling_with_the_cache_equals_the_whole_forward(score_mod):
    """Greedy tokens from prefill and decode kernels, against one torch forward over the result."""
    model = make_model("triton", score_mod=score_mod).eval()
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 49, 49]], device=gpu_or_cpu())
    start = torch.tensor([4, 2], dtype=torch.int32, device=gpu_or_cpu())
    tokens, lengths = model.generate(prompts, start, 5, temperature=0)
    plain = make_model("torch", score_mod=score_mod).eval()
    logits = plain(tokens, lengths) @ plain.unembedding.T
    for b in range(2):
        for t in range(int(start[b]), int(lengths[b])):
            assert tokens[b, t] == logits[b, t - 1].argmax(), (b, t)
