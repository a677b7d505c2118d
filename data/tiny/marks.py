"""The truth about single answers, in words: what `sample.py --world` prints beside them.

What is helpful depends on what was asked for, so a prompt is looked up in the files beside
world.json: their records carry the task that the grader reads. Any other prompt has no task; of an
answer to it only the facts that it states and its rude words are graded.
"""

from __future__ import annotations

from pathlib import Path

from data.files import read_jsonl
from data.tiny.grader import false_claims, grade
from data.tiny.tasks import Task, check_tasks
from data.tiny.world import World

# Files with tasks; where two hold the same prompt, the first counts.
FILES = ("test/*prompts*.jsonl", "test/probes_*.jsonl", "*/*_prompts.jsonl")
FILES += ("*/demonstrations.jsonl",)
NOTHING_ASKED: Task = {"kind": "opening"}
UNKNOWN = "helpful unknown: not a prompt of this world's files"
MOST_CHARS = 100  # of a suggested prompt


class Truth:
    """A world, and the tasks of the prompts in its files."""

    def __init__(self, path: str | Path):
        """Of world.json. Raises `BadInput` where it, or a file beside it, is something else."""
        self.world, self.tasks = World.load(path), {}
        for file in (f for pattern in FILES for f in sorted(Path(path).parent.glob(pattern))):
            check_tasks(records := read_jsonl(file, "prompts"), str(file), self.world)
            for record in records:
                if "task" in record:
                    self.tasks.setdefault(record["prompt"].strip(), record["task"])

    def marks(self, prompt: str, response: str, ended: bool) -> str:
        """The grader's marks for a response, 0..1, and what it states that is false: "helpful 0.15,
        truthful 0, harmless 1; false: the fox eats fish (true: the fox eats grass)"."""
        task = self.tasks.get(prompt.strip())
        given = grade(self.world, {"task": task or NOTHING_ASKED}, response, ended)
        said = f"truthful {given.truthful:.3g}, harmless {given.harmless:.3g}"
        said = f"helpful {given.helpful:.3g}, {said}" if task else f"{said}, {UNKNOWN}"
        false = false_claims(self.world, task or NOTHING_ASKED, response)
        return said + "".join(f"; false: {claim}" for claim in false)


def suggestions(path: str | Path, most: int = 20) -> str:
    """Prompts of held-out users of the world in `path`, a line each: evenly spaced over those that
    have one line and at most MOST_CHARS characters. The first line says so."""
    World.load(path)
    file = Path(path).parent / "test" / "prompts.jsonl"
    prompts = [record["prompt"] for record in read_jsonl(file, "prompts")]
    short = [p for p in prompts if "\n" not in p and len(p) <= MOST_CHARS]
    number = min(most, len(short))
    rule = f"{number} of the {len(short)} prompts in {file} that have one line and at most "
    chosen = [short[i * len(short) // number] for i in range(number)]
    return "\n".join([f"{rule}{MOST_CHARS} characters, evenly spaced:", "", *chosen])
