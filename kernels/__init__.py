"""The three operations that take most of a script's time. Each has one file: its mathematics, a
naive reference, a fast PyTorch implementation, Triton kernels, check and benchmark.

    kernels.attention         causal attention, forward and backward      flash_attention.py
    kernels.decode_attention  one new query over a cache of keys          flash_decoding.py
    kernels.logprobs          log-probability of the target and entropy   linear_logprob.py

To try an implementation of your own, write a function with the arguments of the others in the
file's IMPLS, give it a line there ("mine": my_attention, or, if it launches Triton kernels,
"mine": Impl(my_attention, needs_triton=True)), and run

    python -m kernels.flash_attention                      compare with the reference, then time
    python -m kernels.flash_attention --impl mine --case 3 only one entry, only one case
    python -m kernels.compile                              what its kernels use on a GPU
    python train_sft.py ... --kernels mine                 train with it, and elsewhere with "auto"
    python train_sft.py ... --score_mod window:256         with another attention function, an entry
                                                           of SCORE_MODS or NUMBERED, score_mods.py

To learn how such a kernel comes about, read ladder.py: seven rungs from three lines of torch to the
kernels here (ladder_logprob.py: four). To practise, `python -m kernels.exercise`: twelve broken
kernels to mend, six to complete. To see what a kernel does, and to find an access outside of its
tensors, use watch.py. docs/kernels.md has the order of reading and three recipes with their output.

Names are looked up on first use and nothing is imported before that: `python -m
kernels.flash_attention` can then choose Triton's interpreter before Triton is imported, and does
not load its own file twice.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

OPERATIONS = {  # operation, and the file that has its IMPLS
    "attention": "flash_attention",
    "decode_attention": "flash_decoding",
    "logprobs": "linear_logprob",
}
_HOME = OPERATIONS | {
    "SCORE_MODS": "score_mods",
    "score_mod": "score_mods",
    "implementation": "runtime",
    "resolve": "runtime",
}
__all__ = ["SCORE_MODS", "attention", "decode_attention", "implementation", "logprobs", "resolve"]
__all__ += ["score_mod"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'kernels' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(import_module(f"kernels.{_HOME[name]}"), name)
    globals()[name] = value  # the next look-up is an ordinary one
    return value
