"""Make tests/data/gpt2_tiny/: a random GPT-2 written and run by the transformers library.

    pip install "transformers==4.57.*" && python tests/data/make_gpt2_tiny.py

config.json and model.safetensors are as transformers lays them out; reference.safetensors holds
tokens (2, 32) and their logits (2, 32, 97). All parameters are drawn with a standard deviation of
0.3, not 0.02, so that a wrong GELU, a missing bias or a wrong order of layers shows in the logits;
they are stored in float16 to be small, and the logits are computed in float32 from those values.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).parent / "gpt2_tiny"


def main() -> None:
    torch.manual_seed(20)
    config = GPT2Config(
        vocab_size=97,
        n_positions=32,
        n_embd=24,
        n_layer=3,
        n_head=4,
        bos_token_id=96,
        eos_token_id=96,
    )
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(mean, 0.3)
    model.half().save_pretrained(FOLDER)
    model.float()
    tokens = torch.randint(97, (2, 32))
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({"tokens": tokens, "logits": logits}, FOLDER / "reference.safetensors")
    (FOLDER / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
