"""Decode attention: every implementation against float64, and against the last row of training's
attention."""

import pytest
import torch

from kernels import attention, decode_attention, flash_decoding, runtime
from kernels.check import compare
from kernels.flash_decoding import IMPLS, split_size, verify
from kernels.score_mods import SCORE_MODS
from tests.interpreter import (
    count_calls,
    each,
    far_apart,
    gpu_or_cpu,
    gpu_tables,
    ints,
    needs_triton,
    opcheck,
)


def random_case(B, H, S, D):
    shapes = (B, H, D), (B, H, S, D), (B, H, S, D)
    return [torch.randn(shape, device=gpu_or_cpu()) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", each(IMPLS))
def test_matches_float64(impl, dtype):
    verify(impl, dtype, gpu_or_cpu())


@pytest.mark.skipif(not runtime.INTERPRETED, reason="computes in the interpreter")
@pytest.mark.parametrize("row", gpu_tables(flash_decoding.TILES, ("interpreter", 8, 128)))
def test_matches_float64_with_the_tiles_of_a_gpu(row, monkeypatch):
    monkeypatch.setitem(flash_decoding.TILES, ("interpreter", 8, 128), row)
    verify("triton", torch.float32, gpu_or_cpu())


@pytest.mark.parametrize("name", [*SCORE_MODS, "window:9", "probe"])
@pytest.mark.parametrize("impl", each(IMPLS))
def test_equals_the_last_row_of_attention(impl, name):
    """Sampling and training see the same distribution; attention's own reference shares no code
    with this one's."""
    q, k, v = (torch.randn(2, 2, 100, 16, device=gpu_or_cpu()) for _ in range(3))
    lengths = ints([100, 71])
    whole = attention(q, k, v, lengths, score_mod=name, impl="torch")
    last = lengths.long() - 1
    rows = torch.arange(2, device=q.device)
    out = decode_attention(q[rows, :, last], k, v, lengths, score_mod=name, impl=impl)
    torch.testing.assert_close(out, whole[rows, :, last], atol=1e-5, rtol=1e-5)


@needs_triton
def test_splits_cover_the_cache_once():
    for rows in (1, 12, 264, 3072):
        for cache in (1, 31, 128, 1000, 4096, 100_000):
            splits, keys = split_size(rows, cache, 32, 132)
            assert (splits - 1) * keys < cache <= splits * keys and keys % 32 == 0
            assert splits == 1 or keys >= 128
    assert split_size(1, 4096, 32, 132)[0] > 16 and split_size(768, 4096, 32, 132)[0] == 1


@needs_triton
@pytest.mark.skipif(not runtime.INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("B, S", [(4, 200), (1, 700)])
def test_reads_nothing_past_a_length(B, S, monkeypatch):
    H, D = 2, 16
    q, k, v = random_case(B, H, S, D)
    lengths = [S, 0, 1, 77][-B:] if B > 1 else [333]
    loads = count_calls(monkeypatch, "create_masked_load")
    decode_attention(q, k, v, ints(lengths), impl="triton")
    masks = [mask.data for _, mask, *_ in loads]
    read = sum(int(mask.sum()) for mask in masks if mask.ndim == 2 and mask.shape[0] == 32)
    assert read == 2 * H * sum(lengths) * D  # every key and value inside a length, once


def check_offsets_do_not_wrap(module):
    """Cache entries, heads or rows 1.2e9 elements apart: the third begins beyond 2^31, where a
    32-bit product is negative."""
    memory = far_apart(rows=3, stride=1_200_000_000, columns=16)
    for cache in (memory[None, None], memory[None, :, None], memory[:, None, None]):
        B, H, S, D = cache.shape
        q = torch.randn(B, H, D, device=cache.device).half()
        compact = cache.clone().contiguous()
        lengths = ints([S] * B)
        far = module.triton_decode(q, cache, cache, lengths, "causal")
        compare("out", far, module.triton_decode(q, compact, compact, lengths, "causal"), 0.0)


@needs_triton
def test_operator_passes_opcheck_and_torch_compile():
    q, k, v = random_case(2, 1, 40, 16)
    lengths = ints([40, 3])
    opcheck(torch.ops.kernels.decode_attention, [(q, k, v, lengths), "causal"])

    def plain(*x):
        return decode_attention(*x, impl="triton")

    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, lengths), plain(q, k, v, lengths))


def test_result_does_not_depend_on_the_other_rows():
    q, k, v = random_case(4, 2, 90, 16)
    lengths = ints([90, 20, 1, 55])
    together = decode_attention(q, k, v, lengths)
    for b in range(4):
        alone = decode_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], lengths[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], atol=1e-6, rtol=1e-6)


def test_errors_name_argument_value_and_remedy():
    q, k, v = random_case(2, 2, 8, 16)
    good = {"q": q, "k_cache": k, "v_cache": v, "lengths": ints([8, 3])}
    longs = good["lengths"].long()
    wrong = [
        (
            {"q": q[:, :, None]},
            r"q has shape \(2, 2, 1, 16\); expected \(B, H, D\): one query a row",
        ),
        ({"k_cache": k[:, :1]}, r"k_cache has shape \(2, 1, 8, 16\); expected \(2, 2, S, 16\)"),
        ({"v_cache": v[:, :, :7]}, r"v_cache has shape \(2, 2, 7, 16\); expected"),
        ({"k_cache": k.half()}, "k_cache has dtype torch.float16 but q has torch.float32; convert"),
        ({"v_cache": v.mT.contiguous().mT}, "v_cache has last stride 8; expected 1"),
        ({"lengths": longs}, "lengths has dtype torch.int64; expected torch.int32: call .int"),
        ({"lengths": ints([8, 3])[None]}, r"lengths has shape \(1, 2\); expected \(2,\)"),
        ({"score_mod": "none"}, "score_mod 'none' is unknown"),
        ({"q": q[..., :0]}, r"q has shape \(2, 2, 0\); expected a head size of at least 1"),
    ]
    if not torch.cuda.is_available():  # on a GPU reading the values would wait for it
        wrong.append(({"lengths": ints([9, 1])}, "lengths has value 9; expected 0..8"))
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            decode_attention(**good | changes)


@needs_triton
def test_float64_on_a_gpu_is_refused():
    q, k, v = (x.double().cpu() for x in random_case(2, 2, 8, 16))
    with runtime.recording("sm_90"), pytest.raises(ValueError, match="Triton has no float64 tiles"):
        flash_decoding.triton_decode(q, k, v, ints([8, 3]).cpu(), "causal")
