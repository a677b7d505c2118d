"""Claims that need runs beside the demo's: sizes, sweeps, folds, rounds, controls.

As in claims.py: one function each, its gate and what refutes it in its docstring, written before
the runs. The runs are those of pipeline.py; each differs from the demo's in what it varies alone.
"""

from __future__ import annotations

import numpy as np

from evaluation.report import Estimate, estimate, resamples
from tests.claims.lab import FOUR, GPT, HOW, NAMES, PPO, PROMPTED, PTX, SFT, Lab, accuracy, right
from tests.claims.pipeline import (
    FAILINGS,
    KL_FACTORS,
    LARGE,
    PTX_FACTORS,
    RANKED,
    SIZES,
    TOKENS,
)
from tests.claims.variants import group_of
from tests.claims.verdict import Panel, Result, Row, chart, claim, exact, minus, triple

# ------------------------------------------------------------------------------------------------
# Preference


def of_size(size: str, model: str) -> str:
    """A model of another size; "128x3" is the demo's."""
    return model if size == "128x3" else f"{size}/{model}"


SMALL = [f"{size}/{model}" for size in SIZES for model in FOUR]
BIG = next(iter(LARGE)) + "/base"


@claim("preference", "Fig. 1, sizes", SMALL)
def preference_by_size(lab: Lab) -> Result:
    """At each size, models trained with feedback are preferred to SFT, and SFT to GPT-3.

    Three policy sizes, one reward model for all (that of the largest policy, as in the paper). The
    figure has one baseline, the largest SFT model; gates compare models of one size. Each SFT epoch
    and prefix is chosen on validation users.
    Gate: at both smaller sizes PPO-ptx above one half against SFT of its size, sampled, and SFT of
    the size above one half against its prompted GPT.
    Refuted by: an interval that reaches one half.
    """
    sizes, rows = [*SIZES, "128x3"], []
    for size in sizes:
        for a, b in ((PTX, SFT), (PPO, SFT), (SFT, PROMPTED)):
            gate = "above 0.5" if size in SIZES and a != PPO else ""
            win = lab.win(of_size(size, a), of_size(size, b))
            rows.append(Row(f"{size}: {NAMES[a]} against {NAMES[b]}", win, gate))

    def win(model: str) -> Estimate:
        return exact(0.5) if model == SFT else lab.win(model, SFT)

    series = {name: [win(of_size(size, model)) for size in sizes] for model, name in NAMES.items()}
    return Result(rows, [chart("win rate against SFT 128x3", sizes, series, 0.5)])


@claim("preference", "abstract", [*SMALL, BIG])
def small_beats_large(lab: Lab) -> Result:
    """A small aligned model is preferred to a base model more than ten times (paper: 100) larger.

    Gate: the smallest PPO-ptx above one half against the largest base model, sampled and greedy,
    and against it with its best prefix, sampled; and the size ratio above ten. The SFT rows stand
    beside: where SFT alone passes, feedback deserves no credit for it.
    Refuted by: an interval that reaches one half.
    """
    small = next(iter(SIZES))
    large, least = (lab.speaker(m).model.num_parameters for m in (BIG, f"{small}/base"))
    ratio = exact(large / least)
    rows = [Row("parameters, largest base over smallest policy", ratio, "above 10", "135")]
    rivals = {BIG: f"base {BIG[:5]}", BIG + "+prefix": f"prompted base {BIG[:5]}"}
    series: dict[str, list[Estimate]] = {}
    for model in (SFT, PTX):
        ours = f"{NAMES[model]} {small}"
        for rival, name in rivals.items():
            for t, how in HOW:
                win = lab.win(f"{small}/{model}", rival, t=t)
                gate = "above 0.5" if model == PTX and (t or rival == BIG) else ""
                rows.append(Row(f"{ours} against {name}, {how}", win, gate))
        series[ours] = [lab.win(f"{small}/{model}", rival) for rival in rivals]
    groups = [f"against {name}" for name in rivals.values()]
    return Result(rows, [chart("win rate, sampled", groups, series, 0.5)])


BASES = [f"{size}/base" for size in (*SIZES, *LARGE)]


@claim("preference", "1", [*BASES, f"{next(iter(SIZES))}/ppo_ptx"])
def size_alone(lab: Lab) -> Result:
    """Making language models bigger does not make them better at following a user's intent.

    Gate: the loss on held-out web text falls with every step in size of the base model; and what
    the largest base model gains over the smallest in truth-checked utility is less than a quarter
    of what alignment gains at the smallest size.
    Refuted by: a loss that does not fall, or a base model whose answers improve with size by more.
    """
    sizes = [*SIZES, "128x3", *LARGE]
    base = [of_size(size, GPT) for size in sizes]
    losses = [lab.text(model)["loss"] for model in base]
    rows = [
        Row(f"loss, {b} minus {a}", estimate(y - x), "below 0")
        for a, b, x, y in zip(sizes, sizes[1:], losses, losses[1:], strict=False)
    ]
    small, large = (lab.values(m, "utility") for m in (base[0], base[-1]))
    aligned = lab.values(of_size(sizes[0], PTX), "utility")
    bigger, better = large - small, aligned - small
    for name, gap, gate in (
        (f"utility, base {sizes[-1]} minus base {sizes[0]}", bigger, ""),
        (f"utility, PPO-ptx {sizes[0]} minus base {sizes[0]}", better, ""),
        ("the first minus a quarter of the second", bigger - 0.25 * better, "below 0"),
    ):
        rows.append(Row(name, lab.average(gap), gate))
    loss = {"base": [estimate(loss) for loss in losses]}
    wins = {"base": [lab.win(m, SFT) for m in base]}
    panels = [chart("loss, nats a token", sizes, loss, title="language modelling")]
    panels += [chart("win rate against SFT 128x3", sizes, wins, 0.5, "following instructions")]
    return Result(rows, panels)


@claim("preference", "Fig. 5, FLAN and T0", ["public_selected"])
def public_tasks_baseline(lab: Lab) -> Result:
    """Tuning on public tasks in instruction form is not what users ask for: it falls behind SFT.

    The model is the base model tuned on data/train/public_demonstrations.jsonl (translation,
    addition, copying, classification), its epoch chosen by the reward model as the paper did.
    Gate: PPO-ptx above one half against it; it is below one half against SFT; and its Likert score
    is above that of GPT.
    Refuted by: public tasks that do as well as demonstrations of what users ask.
    """
    public, rows = "public_selected", []
    for t, how in HOW:
        ours, theirs = lab.win(PTX, public, t=t), lab.win(public, SFT, t=t)
        rows += [
            Row(f"PPO-ptx against public tasks, {how}", ours, "above 0.5", "0.78 ±0.04"),
            Row(f"public tasks against SFT, {how}", theirs, "below 0.5", "0.298 ±0.02"),
        ]
    rows.append(Row("Likert, public tasks minus GPT", lab.gap(public, GPT, "likert"), "above 0"))
    order = (GPT, PROMPTED, public, SFT, PPO, PTX)
    groups = ["GPT", "GPT\n(prompted)", "public\ntasks", "SFT", "PPO", "PPO-ptx"]
    series = {"likert": [lab.mean(model, "likert") for model in order]}
    return Result(rows, [chart("Likert, 1 to 7", groups, series)])


# ------------------------------------------------------------------------------------------------
# When feedback pays


def gain_points(lab: Lab, folders: dict[float, str]) -> dict[str, list[tuple[float, Estimate]]]:
    """Over x: PPO-ptx's win rates against the SFT of its own folder ("" is the demo's), and how
    often the reward model orders that SFT's samples as the truth does."""
    points: dict[str, list[tuple[float, Estimate]]] = {
        name: [] for name in (*dict(HOW).values(), ORDER)
    }
    for x, folder in sorted(folders.items()):
        policy, judge = (f"{folder}{name}" for name in (PTX, "rm"))
        own = f"{folder}{SFT}" if not folder.startswith("headroom/ranked") else SFT
        for t, how in HOW:
            points[how].append((x, lab.win(policy, own, t=t)))
        points[ORDER].append((x, lab.order_agreement(judge, own)))
    return points


ORDER = "pairs that the reward model orders rightly"
HEADROOM = [f"headroom/{name}/" for name in FAILINGS]
HEADROOM += [f"headroom/tokens_{tokens}/" for tokens in TOKENS]
HEADROOM += [f"headroom/ranked_{count}/" for count in RANKED]
OWN = ["ppo_ptx", "rm", "sft_selected"]


@claim(
    "headroom",
    "premise",
    [f"{f}{m}" for f in HEADROOM for m in OWN if "ranked" not in f or m != "sft_selected"],
)
def headroom(lab: Lab) -> Result:
    """Feedback pays where demonstrations have flaws that a judge sees, and the judge can see them.

    PPO-ptx against SFT of its own pipeline, with one thing changed: the rates at which
    demonstrators fail (x: the share of demonstrations that the grader takes marks off), the tokens
    of pretraining text (x), or the number of prompts ranked (x). Beside them, how often the reward
    model orders two samples of SFT as the truth does.
    Gate: the win rate at the most flawed demonstrations minus at the least, sampled and greedy,
    above 0; the order agreement at the most pretraining text minus at the least, and at the most
    ranked prompts minus at the fewest, above 0.
    Refuted by: a gain that does not depend on what there is to mend, or a judge that does not
    depend on what it has learned.
    """
    shares = {f"headroom/{name}/": lab.flawed(f"headroom/{name}/data") for name in FAILINGS}
    flaws = {round(e.value, 2): at for at, e in (shares | {"": lab.flawed("data")}).items()}
    tokens = {t / 1e6: f"headroom/tokens_{t}/" for t in TOKENS}
    ranked = {float(count): f"headroom/ranked_{count}/" for count in RANKED}
    tokens[round(lab.pretraining_tokens() / 1e6, 2)] = ""
    ranked[float(len(lab.records("train/rm_prompts")))] = ""
    rows, panels = [], []
    for title, folders, gated in (
        ("share of flawed demonstrations", flaws, [how for _, how in HOW]),
        ("pretraining tokens, millions", tokens, [ORDER]),
        ("prompts ranked", ranked, [ORDER]),
    ):
        points = gain_points(lab, folders)
        for name, line in points.items():
            gap = minus(line[-1][1], line[0][1])
            gate = "above 0" if name in gated else ""
            least, most = line[0][0], line[-1][0]
            rows.append(Row(f"{title}, {most:g} minus {least:g}: {name}", gap, gate))
            told = f"{title}: {name}"
            rows += [Row(f"{told}, at {x:g}", e) for x, e in line]
        series = {name: [(x, *triple(e)) for x, e in line] for name, line in points.items()}
        panel = Panel("", "win rate, share of pairs", "lines", series=series, levels={"": 0.5})
        panel.xlabel = title
        panel.xscale = "linear" if folders is flaws else "log"
        panels.append(panel)
    return Result(rows, panels)


# ------------------------------------------------------------------------------------------------
# Labelers


@claim("labelers", "4.1, E.2", [f"folds/rm_{k}" for k in range(5)])
def reward_model_folds(lab: Lab) -> Result:
    """A reward model predicts labelers it was not trained on nearly as well as its own.

    The training labelers in five groups; five reward models, each trained without one group. On
    validation comparisons, each pair is judged by the model that did not know its labeler's group
    and by the four that did.
    Gate: accuracy on held-out groups above one half, and less than 0.05 below that on own groups,
    interval included.
    Refuted by: a reward model that has learned its labelers rather than the task.
    """
    path, held = "data/valid/comparisons.jsonl", {}
    judged = [lab.margins(f"folds/rm_{group}", path) for group in range(5)]
    for group, rows in enumerate(judged):
        held |= {i: row for i, row in enumerate(rows) if group_of(row[0]) == group}
    own = {i: [rows[i] for rows in judged if rows[i] is not held[i]] for i in held}
    n = [len(margin) for _, margin in held.values()]
    mine = np.array([np.mean(right(rows)) for rows in own.values()])
    a, b = estimate(mine, weights=n), accuracy(list(held.values()))
    gap = estimate(mine - right(held.values()), weights=n)
    rows = [
        Row("accuracy, own groups", a, "", "0.724 ±0.004"),
        Row("accuracy, held-out group", b, "above 0.5", "0.696 ±0.009"),
        Row("own minus held-out", gap, "below 0.05", "0.028"),
    ]
    groups, series = ["own groups", "held-out group"], {"reward models": [a, b]}
    return Result(rows, [chart("accuracy on pairs", groups, series, 0.5)])


@claim("pairs", "3.5, C.2", ["pairs/grouped", "pairs/shuffled"])
def shuffled_pairs(lab: Lab) -> Result:
    """Pairs shuffled one by one make the reward model overfit; all of a prompt's at once do not.

    Two reward models on the same 1,500 prompts, one pass, about as many pairs a step: all pairs of
    a prompt as one batch element, or each pair by itself, so that a response comes back in up to
    K - 1 updates. The loss is the pair loss, mean over a prompt's pairs, after training; a training
    prompt's has an easy pair or more, with another prompt's response, in both arms alike.
    Gate: validation loss of shuffled minus grouped above 0; and so is what the validation loss
    exceeds the training loss by, shuffled minus grouped.
    Refuted by: an interval that reaches 0.
    """
    loss, told = {}, []
    files = {"training": "pairs/first.jsonl", "validation": "data/valid/comparisons.jsonl"}
    arms = ("grouped", "shuffled")
    for arm in arms:
        for split, file in files.items():
            judged = lab.margins(f"pairs/{arm}", file)
            loss[arm, split] = np.array([np.logaddexp(0, -m).mean() for _, m in judged])
            told.append(Row(f"accuracy, {arm} pairs, {split}", accuracy(judged)))
    excess = {split: estimate(loss["shuffled", split] - loss["grouped", split]) for split in files}
    gap = minus(excess["validation"], excess["training"])
    rows = [
        Row("validation loss, shuffled minus grouped", excess["validation"], "above 0"),
        Row("validation minus training loss, shuffled minus grouped", gap, "above 0"),
    ]
    series = {split: [estimate(loss[arm, split]) for arm in arms] for split in files}
    panel = chart("pair loss after one pass", arms, series)
    panel.levels = {"chance": float(np.log(2))}
    return Result(rows + told, [panel])


# ------------------------------------------------------------------------------------------------
# Alignment tax


PTX_RUNS = [f"ptx_x{factor:g}" for factor in PTX_FACTORS]
KL_RUNS = [f"kl_x{factor:g}" for factor in KL_FACTORS]


def by_setting(lab: Lab, models: list[str], flag: str) -> dict[float, str]:
    """The runs by their value of a flag, in order."""
    return dict(sorted((float(lab.setting(model, flag)), model) for model in models))


def sweep_panels(lab: Lab, runs: dict[float, str], flag: str) -> list[Panel]:
    """Public tasks and pretraining loss, and validation score, over a coefficient (Fig. 33, 34)."""
    text, base = {x: lab.text(model) for x, model in runs.items()}, lab.text(GPT)
    shots = {"zero-shot": "zero_shot", "few-shot": "few_shot"}
    points = {
        name: [(x, *triple(estimate(text[x][key]))) for x in runs]
        for name, key in (*shots.items(), ("loss", "loss"))
    }
    level = {f"GPT, {name}": float(base[key].mean()) for name, key in shots.items()}
    score = [(x, *triple(lab.mean(m, "score", "valid/ppo_prompts"))) for x, m in runs.items()]
    tasks = Panel("public tasks", "exact match", levels=level)
    tasks.series = {name: points[name] for name in shots}
    loss = Panel("pretraining text", "loss, nats a token", series={"loss": points["loss"]})
    loss.levels = {"GPT": float(base["loss"].mean())}
    scores = Panel("validation prompts", "reward-model score", series={"score": score})
    for panel in (tasks, loss, scores):
        panel.kind, panel.xlabel, panel.xscale = "lines", flag, "log"
    return [tasks, loss, scores]


@claim("tax", "Fig. 33", PTX_RUNS)
def ptx_coefficient(lab: Lab) -> Result:
    """A large enough pretraining coefficient undoes the regressions; the reward falls with it.

    The demo's PPO-ptx with another --ptx_coef and nothing else changed. Part of the gain is plain
    further pretraining: the run reads pretraining text of about a fifth of what there was.
    Gate: public tasks zero-shot at the largest coefficient minus at 0 above 0, and minus 0.9 GPT
    above 0; the reward-model score on validation prompts at the largest minus at 0 below 0.
    Refuted by: tasks that stay lost, or a reward that does not fall.
    """
    runs = by_setting(lab, [*PTX_RUNS, PTX], "ptx_coef")
    high, low = max(runs), min(runs)
    text = {m: lab.text(m) for m in (runs[high], runs[low], GPT)}
    most, least, base = (each["zero_shot"] for each in text.values())
    score = lab.gap(runs[high], runs[low], "score", "valid/ppo_prompts")
    loss = estimate(text[runs[high]]["loss"] - text[GPT]["loss"])
    kept, name = estimate(most - 0.9 * base), f"zero-shot, coefficient {high:g} minus"
    rows = [
        Row(f"{name} {low:g}", estimate(most - least), "above 0"),
        Row(f"{name} 0.9 GPT", kept, "above 0"),
        Row(f"score, coefficient {high:g} minus {low:g}", score, "below 0"),
        Row("pretraining loss, the largest minus GPT", loss),
    ]
    return Result(rows, sweep_panels(lab, runs, "ptx_coef"))


@claim("tax", "Fig. 34", KL_RUNS)
def kl_coefficient(lab: Lab) -> Result:
    """A larger KL coefficient does not undo the regressions, even at a hundred times the default.

    The demo's PPO (no pretraining data) with another --kl_coef. The KL is from the model that PPO
    starts from; the paper's figure has it from the pretrained model.
    Gate: public tasks zero-shot, the best of all coefficients minus PPO-ptx below 0; the reward-
    model score on validation prompts at a hundred times minus at the demo's below 0.
    Refuted by: a coefficient at which the tasks are as good as with pretraining gradients.
    """
    demo, runs = float(lab.setting(PPO, "kl_coef")), by_setting(lab, [*KL_RUNS, PPO], "kl_coef")
    tasks = {m: lab.text(m)["zero_shot"] for m in (*runs.values(), PTX)}
    best = max(runs, key=lambda coef: tasks[runs[coef]].mean())
    most, prompts = max(runs), "valid/ppo_prompts"
    gap = estimate(tasks[runs[best]] - tasks[PTX])
    score = lab.gap(runs[most], PPO, "score", prompts)
    rows = [
        Row(f"zero-shot, coefficient {best:g} (the best) minus PPO-ptx", gap, "below 0"),
        Row(f"score, coefficient {most:g} minus {demo:g}", score, "below 0"),
        Row(f"KL at coefficient {most:g}, nats", lab.kl(runs[most], prompts)),
        Row(f"KL at coefficient {demo:g}, nats", lab.kl(PPO, prompts)),
    ]
    return Result(rows, sweep_panels(lab, runs, "kl_coef"))


# ------------------------------------------------------------------------------------------------
# Over-optimisation and rounds


def fit_gao(d: np.ndarray, y: np.ndarray, form: str) -> tuple[float, float, float]:
    """Least squares for y = d (a - b d) ("bon") or d (a - b log d) ("rl"), with y(0) = 0.

    d is the square root of the KL, over 0. Returns a, b and the place of the peak, a / 2b or
    exp(a / b - 1) (Gao et al. 2022); nan where b is not positive and the curve has none.
    """
    second = d * d if form == "bon" else d * np.log(d)
    a, b = np.linalg.lstsq(np.stack([d, -second], axis=1), y, rcond=None)[0]
    if b <= 0:
        return float(a), float(b), float("nan")
    return float(a), float(b), float(a / (2 * b) if form == "bon" else np.exp(a / b - 1))


def fitted_peak(d: np.ndarray, values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Where the curve fitted to the means of `values` (models, N) over d (models,) has its peak, as
    a share of the last d; the first model is the start, d = 0. Bootstrap over groups."""
    index = np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(index, row) for row in values], axis=1)
    counts = np.concatenate([np.ones((1, len(sums))), resamples(len(sums))])
    means = counts @ sums / (counts @ np.bincount(index))[:, None]
    tops = np.array([fit_gao(d[1:], mean[1:] - mean[0], "rl")[2] for mean in means]) / d.max()
    tops = np.where(np.isnan(tops), np.inf, tops)
    low, high = np.quantile(tops[1:], [0.025, 0.975], method="nearest")
    return Estimate(float(tops[0]), float(low), float(high))


def gao_curve(points: list[tuple[float, ...]], form: str) -> list[tuple[float, ...]]:
    """The fitted curve through (d, y, ...) points, the first of them at d = 0."""
    start, d = points[0][1], np.array([p[0] for p in points[1:]])
    a, b, _ = fit_gao(d, np.array([p[1] for p in points[1:]]) - start, form)
    x = np.linspace(0.02, 1, 60) * max(d)
    y = start + x * (a - b * (x if form == "bon" else np.log(x)))
    return [(float(u), float(v), float(v), float(v)) for u, v in zip(x, y, strict=True)]


def best_of_n(choice: np.ndarray, outcome: np.ndarray, sizes: list[int]) -> dict[int, np.ndarray]:
    """Outcome of the response of highest choice among n: n -> (N,), from (N, max n) each.

    The samples of a prompt are cut into groups of n, and the groups' outcomes averaged.
    """
    result = {}
    for n in sizes:
        groups = choice.shape[1] // n
        c = choice[:, : groups * n].reshape(len(choice), groups, n)
        o = outcome[:, : groups * n].reshape(c.shape)
        best = c.argmax(axis=2, keepdims=True)
        result[n] = np.take_along_axis(o, best, axis=2).squeeze(2).mean(axis=1)
    return result


def best_of_n_points(lab: Lab, prompts: str, largest: int) -> dict[str, list]:
    """(sqrt KL, value, low, high) of the best of n samples of PPO's start by reward model."""
    drawn = [lab.answers("init", prompts, draw=i) for i in range(largest)]
    scores, truth = (np.stack([getattr(a, k) for a in drawn], 1) for k in ("scores", "utility"))
    sizes = [2**i for i in range(int(np.log2(largest)) + 1)]
    points: dict[str, list] = {}
    for metric, outcome in (("score", scores), ("utility", truth)):
        for n, values in best_of_n(scores, outcome, sizes).items():
            d = float(np.sqrt(np.log(n) - (n - 1) / n))
            points.setdefault(metric, []).append((d, *triple(lab.average(values, prompts))))
    return points


@claim("overoptimisation", "Stiennon Fig. 5, Gao", ["overopt"])
def overoptimisation(lab: Lab) -> Result:
    """Optimised further, the reward model's score goes on rising while true quality falls.

    PPO without KL penalty, its averaged model every few iterations; and the best of n samples of
    its start by reward model, KL log n - (n - 1) / n. Validation users. Curves: Gao's forms.
    Gate: from start to end of the run the score rises, interval above 0; the truth-checked utility
    at the end minus at its peak below 0, the peak being chosen on one half of the users and
    measured on the other; and the fitted curve of the truth has its peak within the run (interval
    by fitting again to resampled users; a curve without a peak has it at infinity).
    Refuted by: a utility that still rises at the end.
    """
    prompts = "valid/ppo_prompts"
    folders = sorted((lab.folder / "overopt" / "steps").glob("[0-9]*"))
    models = ["init", *(f"overopt/steps/{folder.name}" for folder in folders)]
    root = [0.0, *(max(lab.kl(m, prompts).value, 1e-4) ** 0.5 for m in models[1:])]
    truth = {m: lab.values(m, "utility", prompts) for m in models}
    users = np.array(lab.groups(prompts))
    half = np.isin(users, np.unique(users)[::2])
    peak = max(models, key=lambda m: truth[m][half].mean())
    fall = lab.average(np.where(half, np.nan, truth[models[-1]] - truth[peak]), prompts)
    top = fitted_peak(np.array(root), np.stack(list(truth.values())), users)
    rows = [
        Row("score, end minus start", lab.gap(models[-1], "init", "score", prompts), "above 0"),
        Row("utility, end minus peak", fall, "below 0"),
        Row("fitted peak of utility, sqrt(KL), over the run's end", top, "below 1"),
        Row("KL at the end, nats", lab.kl(models[-1], prompts)),
    ]
    bon, panels = best_of_n_points(lab, prompts, 4 if lab.fast else 32), []
    for metric, title in (("utility", "true quality"), ("score", "what is optimised")):
        means = [triple(lab.mean(m, metric, prompts)) for m in models]
        points = [(d, *mean) for d, mean in zip(root, means, strict=True)]
        panel = Panel(title, metric, "lines", xlabel="square root of the KL, nats")
        panel.series = {"PPO": points, "best of n": bon[metric]}
        panel.series |= {"fit PPO": gao_curve(points, "rl")}
        panel.series |= {"fit best of n": gao_curve(bon[metric], "bon")}
        panels.append(panel)
    return Result(rows, panels)


@claim("rounds", "3.1", ["round_2/ppo_ptx", "round_2/valid.jsonl"])
def second_round(lab: Lab) -> Result:
    """Steps 2 and 3 can be iterated: rank the newest policy, retrain the reward model, PPO again.

    Round 2: responses of PPO-ptx and SFT to 2,500 customers' prompts are ranked, a reward model is
    trained on these and the old comparisons, and PPO-ptx runs again from the same start. What more
    prompts alone would have done is not controlled for.
    Gate: utility on test users, round 2 minus round 1, above 0 sampled and greedy; accuracy on
    comparisons between PPO-ptx's responses to validation prompts, new reward model minus old,
    above 0.
    Refuted by: intervals that reach 0.
    """
    again = "round_2/ppo_ptx"
    rows, told = [], []
    for t, how in HOW:
        gap = lab.gap(again, PTX, "utility", t=t)
        rows.append(Row(f"utility, round 2 minus round 1, {how}", gap, "above 0"))
        told.append(Row(f"round 2 against SFT, {how}", lab.win(again, SFT, t=t)))
    old, new = (lab.margins(rm, "round_2/valid.jsonl") for rm in ("rm", "round_2/rm"))
    gain = estimate(right(new) - right(old), weights=[len(m) for _, m in old])
    name = "accuracy on the newest policy"
    rows += [*told, Row(f"{name}, new reward model minus old", gain, "above 0")]
    rows.append(Row(f"{name}, old", accuracy(old)))
    models = {"start": "init", "round 1": PTX, "round 2": again}
    series = {
        how: [lab.mean(m, "utility", temperature=t) for m in models.values()] for t, how in HOW
    }
    return Result(rows, [chart("utility, test users", models, series)])


# ------------------------------------------------------------------------------------------------
# Controls: these must refute


@claim("controls", "of Fig. 1", ["control/rm", "control/ppo"])
def control_labels(lab: Lab) -> Result:
    """Control: with labels dealt at random there must be no gain.

    The demo's PPO against a reward model trained on the same rankings, each dealt at random to the
    responses of its prompt.
    Gate: that reward model's accuracy on validation pairs is not above one half; PPO trained on it
    fails the gate of `preference` against SFT, sampled and greedy; and PPO trained on real labels
    is above it in utility.
    Refuted by: a gain without information, which would mean that the claim measures something else.
    """
    control, path = "control/ppo", "data/valid/comparisons.jsonl"
    told, real = (accuracy(lab.margins(rm, path)) for rm in ("control/rm", "rm"))
    rows = [Row("accuracy of the reward model", told, "not above 0.5")]
    rows.append(Row("accuracy with real labels", real))
    for t, how in HOW:
        name = f"PPO on shuffled labels against SFT, {how}"
        rows.append(Row(name, lab.win(control, SFT, t=t), "not above 0.5"))
    gap = lab.gap(PPO, control, "utility")
    rows.append(Row("utility, real minus shuffled labels", gap, "above 0"))
    runs = {"real labels": PPO, "shuffled labels": control}
    series = {name: [lab.win(m, SFT, t=t) for t, _ in HOW] for name, m in runs.items()}
    groups = [how for _, how in HOW]
    return Result(rows, [chart("win rate of PPO against SFT", groups, series, 0.5)])


@claim("controls", "of Fig. 29", ["control/ppo_ptx", "ptx_x0"])
def control_text(lab: Lab) -> Result:
    """Control: with the words of the pretraining text shuffled, ptx must not repair the tax.

    The demo's PPO-ptx on the same documents with their words in random order, beside the same run
    without ptx.
    Gate: public tasks, zero- and few-shot, minus those without ptx not above 0; and PPO-ptx on real
    text above it.
    Refuted by: a repair by text that teaches nothing, which would mean that ptx is only a brake.
    """
    names = ["GPT", "without ptx", "PPO-ptx", "ptx on\nshuffled text"]
    text = {m: lab.text(m) for m in (GPT, "ptx_x0", PTX, "control/ppo_ptx")}
    rows, series = [], {}
    for shots in ("zero_shot", "few_shot"):
        name = shots.replace("_", "-")
        _, without, real, shuffled = (each[shots] for each in text.values())
        gain, gap = estimate(shuffled - without), estimate(real - shuffled)
        rows.append(Row(f"{name}: ptx on shuffled text minus without ptx", gain, "not above 0"))
        rows.append(Row(f"{name}: PPO-ptx minus ptx on shuffled text", gap, "above 0"))
        series[name] = [estimate(each[shots]) for each in text.values()]
    return Result(rows, [chart("public tasks, exact match", names, series)])
