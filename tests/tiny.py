"""The smallest world in which every script runs: made in a second, nothing in it is trained.

Records are hand-made sentences about six colours; the models are random. It serves tests of
mechanics (files, resume, exit codes); what the methods achieve is not to be seen here.
"""

from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from checkpoint import save_model
from data.files import write_documents, write_jsonl
from data.tokenizer import save_tokenizer, train_bpe
from model import GPT, GPTConfig, ScalarModel

COLOURS = ("red", "blue", "green", "white", "black", "gold")
LIMITS = ["--max_prompt_tokens", "36", "--max_new_tokens", "8"]  # that the models' context allows


@dataclass(frozen=True)
class Tiny:
    """Paths of the files; `models` maps a stage to its checkpoint folder."""

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
        by_stage = {
            "sft": [
                "--init",
                self.base,
                "--data",
                self.demonstrations,
                "--batch_size",
                "4",
                "--pretrain_data",
                self.pretrain,
                "--pretrain_fraction",
                "0.2",
                "--val_data",
                self.demonstrations,
                "--epochs",
                "2",
            ],
            "rm": [
                "--init",
                self.base,
                "--data",
                self.comparisons,
                "--batch_size",
                "3",
                "--demonstrations",
                self.demonstrations,
                "--val_data",
                self.comparisons,
                "--epochs",
                "2",
                "--eval_every",
                "2",
            ],
            "ppo": [
                "--init",
                self.base,
                "--reward_model",
                self.rm,
                "--data",
                self.prompts,
                "--val_data",
                self.prompts,
                "--pretrain_data",
                self.pretrain,
                "--ptx_coef",
                "1",
                "--ptx_tokens",
                "12",
                "--batch_size",
                "8",
                "--num_minibatches",
                "2",
                "--max_steps",
                "4",
                "--eval_every",
                "2",
            ],
        }
        inputs = ["--data", self.prompts, *LIMITS, "--device", "cpu"]
        if stage == "sample":
            speakers = [f"base={self.base}", f"again={self.base}"]
            args = ["--out", Path(out) / "candidates.jsonl", "--num_responses", "2", "3"]
            return [str(arg) for arg in (*args, "--checkpoints", *speakers, *inputs, *more)]
        if stage == "measure":
            args = ["measure", "--name", "base", "--checkpoint", self.base, "--out", out]
            args += ["--reward_model", self.rm, "--reference", self.base]
            return [str(arg) for arg in (*args, *inputs, *more)]
        args = by_stage[stage] + ["--out", out, "--save_every", "2", *LIMITS, "--device", "cpu"]
        return [str(arg) for arg in (*args, *more)]


def make_tiny(folder: Path) -> Tiny:
    """Write everything into `folder`; equal files every time."""

    def record(i: int) -> dict:
        colour = COLOURS[i % len(COLOURS)]
        prompt = f"say {colour} {1 + i % 3} times" if i % 2 else f"which colour is {colour} ?"
        return {
            "prompt": f"{prompt} ( {i} )",
            "user": f"u{i % 5}",
            "source": "customer",
            "use_case": "other",
        }

    demonstrations = [
        record(i) | {"response": " ".join([COLOURS[i % 6]] * (1 + i % 3)), "source": "labeler"}
        for i in range(14)
    ]
    comparisons = []
    for i in range(11):
        K = 4 + i % 2
        responses = [f"{COLOURS[(i + k) % 6]} {COLOURS[k]}" for k in range(K)]
        ranks = [1] * K if i == 3 else [1 + (i + 2 * k) % 4 for k in range(K)]
        comparisons.append(
            record(i)
            | {
                "responses": responses,
                "ranks": ranks,
                "labeler": f"l{i % 3}",
                "ended": [k != 1 for k in range(K)],
            }
        )
    documents = [
        f"the {COLOURS[i % 6]} house stands beside the {COLOURS[(2 * i + 1) % 6]} one .\n"
        f"nobody knows how many times {i} people said {COLOURS[(i + 3) % 6]} ."
        for i in range(24)
    ]
    tiny = Tiny(
        folder,
        train_bpe([*documents, *(d["prompt"] for d in demonstrations)], 300),
        *(
            folder / name
            for name in (
                "tokenizer.json",
                "demonstrations.jsonl",
                "prompts.jsonl",
                "comparisons.jsonl",
                "pretrain.txt",
                "base",
                "rm",
            )
        ),
    )
    save_tokenizer(tiny.encoding, tiny.tokenizer)
    write_jsonl(tiny.demonstrations, demonstrations, "demonstrations")
    write_jsonl(tiny.prompts, [record(i) for i in range(20)], "prompts")
    write_jsonl(tiny.comparisons, comparisons, "comparisons")
    write_documents(tiny.pretrain, documents)

    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=tiny.encoding.n_vocab,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=2,
        eos_token_id=tiny.encoding.eot_token,
    )
    tokenizer_json = tiny.tokenizer.read_text(encoding="utf-8")
    gpt = GPT(config)
    with torch.no_grad():  # raises the end token's logit by 3.5, so that some responses end
        end = gpt.wte.weight[config.eos_token_id]
        gpt.ln_f.bias += 3.5 * end / end.square().sum()
    save_model(tiny.base, gpt, tokenizer_json, {"stage": "base", "data": []})
    save_model(tiny.rm, ScalarModel.from_gpt(gpt), tokenizer_json, {"stage": "rm", "data": []})
    torch.set_rng_state(state)
    return tiny
