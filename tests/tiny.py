"""The smallest world in which every script runs: made in a second, nothing in it is trained.

Records are hand-made sentences about six colours; the models are random. It serves tests of
mechanics (files, resume, exit codes); what the methods achieve is not to be seen here.
"""

from dataclasses import dataclass
from pathlib import Path

from data.files import write_documents, write_jsonl
from data.tokenizer import save_tokenizer, train_bpe

import tiktoken
import torch

from checkpoint import save_model
from model import GPT, GPTConfig, ScalarModel

COLOURS = ("red", "blue", "green", "white", "black", "gold")
LIMITS = ["--max_prompt_tokens", "36", "--max_new_tokens", "8"]  # that the models' context allows
TRAINS = "--out {out} --save_every 2 --max_prompt_tokens 36 --max_new_tokens 8 --device cpu"
INPUTS = "--data {prompts} --max_prompt_tokens 36 --max_new_tokens 8 --device cpu"
# A quick run of train_<stage>.py, of sample.py, of `evaluate.py measure`.
ARGS = {
    "sft": "--init {base} --data {demonstrations} --batch_size 4 --pretrain_data {pretrain} "
    "--pretrain_fraction 0.2 --val_data {demonstrations} --epochs 2 " + TRAINS,
    "rm": "--init {base} --data {comparisons} --batch_size 3 --demonstrations {demonstrations} "
    "--val_data {comparisons} --epochs 2 --eval_every 2 " + TRAINS,
    "ppo": "--init {base} --reward_model {rm} --data {prompts} --val_data {prompts} "
    "--pretrain_data {pretrain} --ptx_coef 1 --ptx_tokens 12 --batch_size 8 --num_minibatches 2 "
    "--responses_per_prompt 1 --ptx_ratio 0.5 --lr 6e-4 --value_lr 5e-4 --warmup_steps 10 "
    "--ema 0.992 --max_steps 4 --eval_every 2 " + TRAINS,
    "sample": "--out {out}/candidates.jsonl --num_responses 2 3 "
    "--checkpoints base={base} again={base} " + INPUTS,
    "measure": "measure --name base --checkpoint {base} --out {out} --reward_model {rm} "
    "--reference {base} --pretrain_data {pretrain} " + INPUTS,
}


@dataclass(frozen=True)
class Tiny:
    """Paths of the files, and the tokenizer."""

    folder: Path
    encoding: tiktoken.Encoding
    tokenizer: Path
    demonstrations: Path
    prompts: Path
    comparisons: Path
    pretrain: Path
    base: Path  # language model: base, SFT and start of PPO alike
    rm: Path  # reward model

    def args(self, stage: str, out: Path | str, *more: str) -> list[str]:
        """Arguments for a quick run into `out`: of train_<stage>.py for a few steps, of sample.py
        for a file of candidates in it, of `evaluate.py measure` for the file `out`."""
        words = [word.format(out=out, **vars(self)) for word in ARGS[stage].split()]
        return [*words, *map(str, more)]


def make_tiny(folder: Path) -> Tiny:
    """Write everything into `folder`; equal files every time."""

    def record(i: int) -> dict:
        colour = COLOURS[i % len(COLOURS)]
        prompt = f"say {colour} {1 + i % 3} times" if i % 2 else f"which colour is {colour} ?"
        whose = {"user": f"u{i % 5}", "source": "customer", "use_case": "other"}
        return {"prompt": f"{prompt} ( {i} )"} | whose

    def comparison(i: int) -> dict:
        K = 4 + i % 2
        responses = [f"{COLOURS[(i + k) % 6]} {COLOURS[k]}" for k in range(K)]
        ranks = [1] * K if i == 3 else [1 + (i + 2 * k) % 4 for k in range(K)]
        given = {"responses": responses, "ranks": ranks, "labeler": f"l{i % 3}"}
        return record(i) | given | {"ended": [k != 1 for k in range(K)]}

    demonstrations = [
        record(i) | {"response": " ".join([COLOURS[i % 6]] * (1 + i % 3)), "source": "labeler"}
        for i in range(14)
    ]
    documents = [
        f"the {COLOURS[i % 6]} house stands beside the {COLOURS[(2 * i + 1) % 6]} one .\n"
        f"nobody knows how many times {i} people said {COLOURS[(i + 3) % 6]} ."
        for i in range(24)
    ]
    names = "tokenizer.json demonstrations.jsonl prompts.jsonl comparisons.jsonl pretrain.txt"
    encoding = train_bpe([*documents, *(d["prompt"] for d in demonstrations)], 300)
    tiny = Tiny(folder, encoding, *(folder / name for name in f"{names} base rm".split()))
    save_tokenizer(tiny.encoding, tiny.tokenizer)
    write_jsonl(tiny.demonstrations, demonstrations, "demonstrations")
    write_jsonl(tiny.prompts, [record(i) for i in range(20)], "prompts")
    write_jsonl(tiny.comparisons, [comparison(i) for i in range(11)], "comparisons")
    write_documents(tiny.pretrain, documents)

    state = torch.get_rng_state()
    torch.manual_seed(0)
    end = encoding.eot_token
    config = GPTConfig(encoding.n_vocab, 48, n_embd=32, n_layer=2, n_head=2, eos_token_id=end)
    tokenizer_json = tiny.tokenizer.read_text(encoding="utf-8")
    gpt = GPT(config)
    with torch.no_grad():  # raises the end token's logit by 3.5, so that some responses end
        row = gpt.wte.weight[end]
        gpt.ln_f.bias += 3.5 * row / row.square().sum()
    save_model(tiny.base, gpt, tokenizer_json, {"stage": "base", "data": []})
    save_model(tiny.rm, ScalarModel.from_gpt(gpt), tokenizer_json, {"stage": "rm", "data": []})
    torch.set_rng_state(state)
    return tiny
