"""Check the claims of the paper's results in the tiny world.

    python -m tests.claims --out out/claims                  headline claims on three seeds, the
                                                             others, with their runs, on one
    python -m tests.claims --out out/claims --seeds 3        everything on three seeds
    python -m tests.claims --out out/claims --only toxicity bias --plan

Runs what is missing, measures, and writes claims.csv, a figure for each claim, and report.md. What
is done is kept: an interrupted command, given again, goes on. --fast takes sizes of seconds, to try
the machinery; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from data.commands import run_command
from data.files import BadInput, check_writable, write_atomic
from data.flags import Parser

from evaluation.report import as_markdown, csv_text
from tests.claims import claims, figures, pipeline, sweeps
from tests.claims.lab import Lab
from tests.claims.verdict import CLAIMS, TOPICS, Claim, Result, together, triple

assert claims and sweeps  # importing them fills CLAIMS
HEADLINE_SEEDS, SWEEP_SEEDS = 3, 1
COLUMNS = "claim paper_figure paper_value seed value ci_low ci_high gate holds".split()
# Whose change makes the claims be measured again.
CODE = "tests/claims/claims.py tests/claims/sweeps.py tests/claims/lab.py tests/claims/verdict.py "
CODE += "evaluation/measure.py evaluation/report.py data/tiny/grader.py data/tiny/labelers.py "
CODE += "data/real/text_metrics.py"
Results = dict[str, dict[int, Result]]  # claim -> seed -> what was measured


# ------------------------------------------------------------------------------------------------
# Runs and measurements


def seeds_of(claim: Claim, args: argparse.Namespace) -> range:
    many = args.seeds or (HEADLINE_SEEDS if claim.headline else SWEEP_SEEDS)
    return range(args.first_seed, args.first_seed + many)


def build(args: argparse.Namespace) -> tuple[pipeline.Graph, list[str]]:
    """All stages, and the names of those that measure the claims asked for."""
    graph = pipeline.Graph(Path(args.out), args.fast)
    chosen = [CLAIMS[name] for name in args.only] if args.only else list(CLAIMS.values())
    swept = {s for c in chosen if not c.headline for s in seeds_of(c, args)}
    for seed in sorted({s for c in chosen for s in seeds_of(c, args)}):
        runs = pipeline.Seed(graph, seed)
        if seed in swept:
            runs.sweeps()
    wanted, code = [], tuple(pipeline.ROOT / file for file in CODE.split())
    for claim in chosen:
        for seed in seeds_of(claim, args):
            command = [sys.executable, "-m", "tests.claims", "--out", args.out]
            command += ["--measure", claim.name, "--seed", str(seed)]
            command += ["--fast"] if args.fast else []
            makers = dict.fromkeys(graph.maker(seed, need) for need in ("demo", *claim.needs))
            name, output = f"seed_{seed}/measure/{claim.name}", result_file(args, claim.name, seed)
            stage = pipeline.Stage(name, tuple(command), output, tuple(makers), 0.7, reads=code)
            wanted.append(graph.add(stage))
    return graph, wanted


def result_file(args: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(args.out) / f"seed_{seed}" / "results" / f"{name}.json"


def measure(args: argparse.Namespace) -> None:
    """One claim on one seed, into its result file."""
    lab = Lab(Path(args.out) / f"seed_{args.seed}", args.seed, args.fast)
    result = CLAIMS[args.measure].measure(lab)
    result.commit = current_commit()
    for row in result.rows:
        e = row.value
        print(f"{row.name}: {e.value:.3f} [{e.low:.3f}, {e.high:.3f}] {row.gate} {row.holds}")
    text = json.dumps(result.to_json(), indent=1)
    write_atomic(result_file(args, args.measure, args.seed), text + "\n")


def read_results(args: argparse.Namespace) -> Results:
    """What has been measured, in the order of the claims."""
    results: Results = {}
    for claim in CLAIMS.values():
        for seed in seeds_of(claim, args):
            path = result_file(args, claim.name, seed)
            if path.exists():
                content = json.loads(path.read_text(encoding="utf-8"))
                results.setdefault(claim.name, {})[seed] = Result.from_json(content)
    return results


# ------------------------------------------------------------------------------------------------
# Table and page


def table(results: Results) -> list[dict]:
    """claims.csv: one line for each number of each claim and seed."""
    lines = []
    for name, of_seeds in results.items():
        for seed, result in of_seeds.items():
            for row in result.rows:
                first = f"{name}: {row.name}", CLAIMS[name].figure, row.paper, seed
                holds = "" if row.holds is None else row.holds
                line = (*first, *triple(row.value), row.gate, holds)
                lines.append(dict(zip(COLUMNS, line, strict=True)))
    return lines


def page(results: Results, setting: list[str]) -> str:
    """report.md: what was done, the verdicts in one table, then each claim with its figure."""
    lines = ["# The claims of the paper's results, in the tiny world", *setting]
    lines += [measured_at(results), "## Verdicts"]
    words = (
        "A claim holds on a seed if all its gates do. Gates are about 95 % intervals, and stand "
        "in the claim's text, which was written before the runs; so does what would refute it. "
        "Controls hold when they refute what they should."
    )
    rows = [["claim", "paper", "holds", "gates passed", "gates that fail"]]
    ordered = [n for topic in TOPICS for n in results if CLAIMS[n].topic == topic]
    for name in ordered:
        of_seeds = results[name]
        held = f"{sum(result.holds for result in of_seeds.values())} of {len(of_seeds)}"
        first = f"[{name}](#{name})", CLAIMS[name].figure
        rows.append([*first, held, gates_passed(of_seeds), failing(of_seeds)])
    known = notes()
    lines += [words, to_the_left(rows), topics_held(results), known[""]]
    for topic, title in TOPICS.items():
        mine = [name for name in results if CLAIMS[name].topic == topic]
        lines += [f"## {title}"] if mine else []
        for name in mine:
            lines += section(CLAIMS[name], results[name], known.get(name, ""))
    return "\n\n".join(lines) + "\n"


def notes() -> dict[str, str]:
    """Claim -> what a person had to say about its result: the sections of notes.md; "": of all."""
    text = Path(__file__).with_name("notes.md").read_text(encoding="utf-8")
    opening, *parts = re.split(r"^## (\w+)\n", text, flags=re.M)
    of_all = {"": opening.partition("\n")[2].strip()}  # without the title
    return of_all | {k: v.strip() for k, v in zip(parts[::2], parts[1::2], strict=True)}


def measured_at(results: Results) -> str:
    """At which commits the page's results were measured: not all need be of the last run."""
    commits = Counter(r.commit for of_seeds in results.values() for r in of_seeds.values())
    parts = [f"{count} at commit {commit}" for commit, count in commits.items() if commit]
    if commits[""]:
        parts.append(f"{commits['']} by earlier runs, which recorded no commit")
    return f"Results, claims times seeds: {', '.join(parts)}."


def to_the_left(rows: list[list[str]]) -> str:
    """A Markdown table of words."""
    return as_markdown(rows).replace("---:|", "---|")


def gates_passed(of_seeds: dict[int, Result]) -> str:
    """How many gates hold, over all seeds."""
    gated = [row.holds for r in of_seeds.values() for row in r.rows if row.holds is not None]
    return f"{sum(gated)} of {len(gated)}"


def failing(of_seeds: dict[int, Result]) -> str:
    """The gated rows that fail on some seed, with on how many."""
    first = next(iter(of_seeds.values()))
    shown = []
    for i, row in enumerate(first.rows):
        failed = sum(result.rows[i].holds is False for result in of_seeds.values())
        count = f" ({failed} of {len(of_seeds)})" if len(of_seeds) > 1 else ""
        shown += [row.name + count] if failed else []
    return "; ".join(shown)


def topics_held(results: Results) -> str:
    """How many of the list's rows hold on every seed they were measured on."""
    count = {topic: [] for topic in TOPICS if topic != "controls"}
    for name, of_seeds in results.items():
        if CLAIMS[name].topic in count:
            count[CLAIMS[name].topic] += [result.holds for result in of_seeds.values()]
    known = {topic: held for topic, held in count.items() if held}
    good = [TOPICS[topic] for topic, held in known.items() if all(held)]
    part = [f"{TOPICS[t]} ({sum(h)} of {len(h)})" for t, h in known.items() if not all(h)]
    said = f"Of {len(known)} rows measured, {len(good)} hold whole, every claim on every seed"
    said += f": {', '.join(good)}." if good else "."
    if part:
        said += f" In part, claims times seeds that hold: {', '.join(part)}."
    return said


def section(claim: Claim, of_seeds: dict[int, Result], note: str) -> list[str]:
    """A claim's text, figure and numbers, and the note on them."""
    text = "\n".join(line.strip() for line in claim.text.strip().splitlines())
    summary, _, rest = text.partition("\n\n")
    for word in ("Gate:", "Refuted by:"):
        rest = rest.replace(word, f"\n**{word}**")
    seeds = list(of_seeds)
    heads = ["what", "paper", *(f"seed {s}" for s in seeds)]
    heads += ["together"] if len(seeds) > 1 else []
    rows = [[*heads, "gate", "holds"]]
    for i, row in enumerate(of_seeds[seeds[0]].rows):
        mine = [of_seeds[s].rows[i] for s in seeds]
        values = [shown(r.value) for r in mine]
        values += [shown(together([r.value for r in mine]))] if len(seeds) > 1 else []
        held = [r.holds for r in mine]
        verdict = "" if held[0] is None else ", ".join("yes" if h else "**no**" for h in held)
        rows.append([row.name, row.paper, *values, row.gate, verdict])
    parts = [f"### {claim.name}", f"{summary} ({claim.figure})", rest.strip()]
    parts += [f"![{claim.name}](figures/{claim.name}.png)", to_the_left(rows)]
    return parts + ([f"**Afterwards.** {note}"] if note else [])


def shown(e) -> str:
    if e.low == e.high:
        return f"{e.value:.3g}"
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def write_all(args: argparse.Namespace, setting: list[str]) -> None:
    """claims.csv, figures, report.md of everything measured so far."""
    results, out = read_results(args), Path(args.out)
    if not results:
        raise BadInput(f"{out}: nothing has been measured yet")
    for name, of_seeds in results.items():
        figures.draw(out / "figures" / f"{name}.png", [r.panels for r in of_seeds.values()])
    write_atomic(out / "claims.csv", csv_text(table(results)))
    write_atomic(out / "report.md", page(results, setting))
    print(f"wrote {out}/report.md, {out}/claims.csv")


def current_commit() -> str:
    """Of the working tree, with "-dirty" where it has changes; empty where git knows none."""
    ask = ["git", "describe", "--always", "--dirty"]
    asked = subprocess.run(ask, cwd=pipeline.ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def setting_of(args: argparse.Namespace, minutes: float) -> list[str]:
    """Command, commit of the page, machine, time: the opening of the page."""
    model = "unknown processor"
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(": ")[2] if names else platform.machine()
    lines = [
        f"`python -m tests.claims {' '.join(sys.argv[1:])}`, page written at commit "
        f"{current_commit() or '?'}, {os.cpu_count()} cores ({model}), {minutes:.0f} minutes for "
        "what was not there before. Headline claims need the demo's models; the others have runs "
        "of their own on fewer seeds."
    ]
    if args.fast:
        lines.append("**Sizes of seconds (--fast): the numbers mean nothing.**")
    return lines


# ------------------------------------------------------------------------------------------------
# Arguments and main


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    what = __doc__.split("\n")[0]
    parser = Parser(prog="python -m tests.claims", description=what)
    add = parser.add_argument
    add("--out", default="out/claims", help="folder of all runs and results")
    default = f"{HEADLINE_SEEDS} of claims about the demo's models, {SWEEP_SEEDS} of the others"
    add("--seeds", type=int, default=0, help=f"seeds of every claim; default: {default}")
    add("--first_seed", type=int, default=0, help="seeds are this one and those that follow")
    add("--only", nargs="+", metavar="CLAIM", help="these claims and the runs that they need")
    add("--fast", action="store_true", help="sizes of seconds, to try the machinery")
    add("--plan", action="store_true", help="show the stages and their expected minutes, and stop")
    add("--report", action="store_true", help="only write table, figures and page anew")
    add("--measure", help=argparse.SUPPRESS)  # one claim on --seed: what a stage calls
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in [*(args.only or []), *([args.measure] if args.measure else [])]:
        if name not in CLAIMS:
            parser.error(f"--only {name}: expected some of {', '.join(CLAIMS)}")
    for name, most in (("seeds", 100), ("first_seed", 2**31)):
        if not 0 <= getattr(args, name) <= most:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 to {most}")
    return args


def main(argv: list[str] | None = None) -> None:
    args, began = get_args(argv), time.monotonic()
    check_writable(args.out)
    if args.measure:
        return measure(args)
    graph, wanted = build(args)
    stages = graph.needed(wanted)
    runner = pipeline.Runner(stages, Path(args.out), lambda line: print(line, flush=True))
    if args.plan:
        print(pipeline.plan(stages, runner.is_done))
        return None
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the children are to stop, too
        signal.signal(number, signal.default_int_handler)
    failed = [] if args.report else runner.run()
    write_all(args, setting_of(args, (time.monotonic() - began) / 60))
    return pipeline.refuse_failures(failed)


if __name__ == "__main__":
    sys.exit(run_command(main))
