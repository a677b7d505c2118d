"""The smallest script there can be: a `Run` around one number's loop, done in milliseconds.

What run.py promises is tested with it, once; that the three scripts keep these promises is in
test_resume.py.
"""

from dataclasses import dataclass
from pathlib import Path

from data import outputs
from data.flags import natural, nonnegative

import torch
import torch.nn as nn

from run import Run, parse, parser

STATE = ("model", "ema", "adam")
outputs.KINDS["toy"] = outputs.run_of("toy")


@dataclass
class ToyConfig:
    eos_token_id: int = 0
    n_positions: int = 128


class Toy(nn.Module):
    """One vector. `num_parameters` and `config` are what a `Run` asks a model for."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.num_parameters = ToyConfig(), 3
        self.w = nn.Parameter(torch.zeros(3))


def get_args(argv: list[str] | None = None):
    flags = parser("A toy.", out="out/toy", save_every=2)
    flags.add_argument("--data", default="toy.txt")
    flags.add_argument("--init", default="toy")
    flags.add_argument("--batch_size", type=natural, default=1)
    flags.add_argument("--max_steps", type=natural, default=6)
    flags.add_argument("--keep_every", type=natural, default=3)
    flags.add_argument("--lr", type=nonnegative, default=0.1)
    flags.add_argument("--bad_step", type=natural, default=1000)
    return parse(flags, argv)


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    model, ema = Toy(), Toy()
    adam = torch.optim.AdamW(model.parameters(), lr=args.lr)
    states = dict(zip(STATE, (model, ema, adam), strict=True))
    run = Run(args, "toy", result=ema, tokenizer=args.init, state=states, shows="loss val_loss")
    goal = float(Path(args.data).read_text())
    for step in run.steps(args.max_steps):
        noise = torch.rand(3)  # what dropout is in a model
        model.w.grad = (model.w - goal * noise).detach()
        adam.step()
        ema.w.data.lerp_(model.w.data, 0.5)
        run.add({"loss": (model.w - goal).square().mean()})
        run.lap("step_s", 10)
        row = {"lr": args.lr if step < args.bad_step else float("nan")}
        row["val_loss"] = ema.w.mean().item() if run.due(4) else None
        if run.due(args.keep_every):
            run.keep(f"epochs/{step:02}", epoch=step)
        run.log(row)
    return run.finish(more="more")
