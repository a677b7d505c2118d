"""evaluation/ measure, select and report: against closed forms, and the commands on tiny models."""

import csv
import json
import math
import os
import random
import shutil
from argparse import Namespace
from pathlib import Path

from data import outputs
from data.commands import run_command
from data.files import BadInput, fingerprint, read_jsonl, write_jsonl
from data.tiny.grader import Grade
from data.tiny.tasks import USE_CASES, make_prompt
from data.tiny.world import World
from data.tokenizer import encode_prompt, encode_response

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import train_ppo
import train_sft
from checkpoint import read_info, save_model
from evaluation import figures, measure, report, select
from evaluation.report import Answers, Estimate, estimate
from model import GPT, ScalarModel, pad_right
from sample import Sample, Speaker, load_speaker, respond
from tests.tiny import LIMITS, Tiny

SAMPLING = {"max_new_tokens": 8, "batch_size": 256, "seed": 0, "missing_eos_score": -4.0}
PROMPTS = ["say red", "which colour is blue ?", "say gold 3 times ( 7 )"]


@pytest.fixture
def base(tiny: Tiny) -> Speaker:
    return load_speaker("base", tiny.base)


@pytest.fixture
def judge(tiny: Tiny) -> ScalarModel:
    return ScalarModel.from_pretrained(tiny.rm).eval()


def constant_speaker(tiny: Tiny, logits: dict[int, float]) -> Speaker:
    """A model with one distribution over the next token in any context: softmax of these logits,
    and of a far lower one for every other token."""
    speaker = load_speaker("constant", tiny.base)
    model = speaker.model
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.zero_()
        model.ln_f.bias[0] = 1.0  # so that a token's logit is the first number of its embedding
        model.wte.weight[:, 0] = -60.0
        for token, logit in logits.items():
            model.wte.weight[token, 0] = logit
    return speaker


def samples_of(speaker: Speaker, texts: list[str], prompts: list[str]) -> list[Sample]:
    return [
        Sample(speaker.encode(prompt, 8), encode_response(speaker.encoding, text), text, True)
        for prompt, text in zip(prompts, texts, strict=True)
    ]


# -------------------------------------------------------------------------- intervals


def test_interval_equals_the_normal_one_for_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=900)
    half = 1.96 * values.std() / math.sqrt(900)
    e = estimate(values)
    assert e.value == pytest.approx(values.mean())
    assert e.high - e.value == pytest.approx(half, rel=0.1)
    assert e.value - e.low == pytest.approx(half, rel=0.1)


def test_interval_is_over_groups():
    """Four copies of every value by one user say no more than one copy."""
    values = np.random.default_rng(1).normal(size=300)
    one, four = estimate(values), np.repeat(values, 4)
    grouped = estimate(four, np.repeat(np.arange(300), 4))
    assert (grouped.low, grouped.high) == pytest.approx((one.low, one.high))
    apart = estimate(four)
    assert (apart.high - apart.low) == pytest.approx((one.high - one.low) / 2, rel=0.1)


def test_weighted_mean_and_its_interval():
    """The mean of a prompt's pairs, weighted by their number, is the mean over all pairs."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 30, size=200)
    right = rng.binomial(sizes, 0.7)
    e = estimate(right / sizes, weights=sizes)
    pairs = np.concatenate([np.arange(n) < r for n, r in zip(sizes, right, strict=True)])
    by_pairs = estimate(pairs, np.repeat(np.arange(200), sizes))
    assert e.value == pytest.approx(right.sum() / sizes.sum())
    assert (e.low, e.high) == pytest.approx((by_pairs.low, by_pairs.high))


def test_nothing_to_measure_is_not_a_number():
    assert math.isnan(estimate([]).value)
    e = estimate([0.25])
    assert (e.value, e.low, e.high) == (0.25, 0.25, 0.25)


def test_win_scores_and_ties():
    ours = np.array([0.50, 0.53, 0.47, 0.90, 0.10, 0.519, 0.481])
    theirs = np.array([0.50, 0.50, 0.50, 0.20, 0.20, 0.500, 0.500])
    assert report.win_scores(ours, theirs).tolist() == [0.5, 1, 0, 1, 0, 0.5, 0.5]
    assert report.win_scores(ours, ours).tolist() == [0.5] * 7
    both = report.win_scores(ours, theirs) + report.win_scores(theirs, ours)
    assert both.tolist() == [1.0] * 7


# ----------------------------------------------------------------- scores and log-probs


def test_reward_is_read_after_the_bare_prompt(tiny, base, judge):
    """And by PPO's rule: without an end token, the fixed score; the raw number beside it."""
    prompted = Speaker("p", base.model, base.encoding, "say gold\n")
    samples = samples_of(prompted, ["red", "blue blue", ""], PROMPTS)
    samples[1].tokens.pop()  # was cut off
    args = Namespace(batch_size=2, missing_eos_score=-6.5)
    scores, raw = measure.reward_scores(judge, prompted, PROMPTS, samples, args)
    for i, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        tokens = torch.tensor([encode_prompt(tiny.encoding, prompt) + sample.tokens])
        read = -1 if i == 1 else -2  # before an end token
        assert raw[i] == pytest.approx(judge(tokens)[0, read].item(), abs=1e-5)
        assert scores[i] == (-6.5 if i == 1 else raw[i])
    assert len(set(raw.round(4))) == 3


def test_ppo_and_evaluation_score_alike(tiny, base, judge):
    """The same responses get the same numbers from an iteration of PPO and from a report."""
    records = read_jsonl(tiny.prompts, "prompts")
    prompts, args = [record["prompt"] for record in records], Namespace(**SAMPLING)
    samples = respond(base, prompts, args)
    scores, raw = measure.reward_scores(judge, base, prompts, samples, args)
    start = [encode_prompt(tiny.encoding, prompt) for prompt in prompts]
    whole = [prompt + sample.tokens for prompt, sample in zip(start, samples, strict=True)]
    tokens, lengths = pad_right(whole, tiny.encoding.eot_token, "cpu")
    prompt_lengths = torch.tensor([len(prompt) for prompt in start])
    flags = train_ppo.get_args(["--device", "cpu"])
    four = base.model, base.model, judge, judge
    e = train_ppo.make_episodes(tokens, prompt_lengths, lengths, *four, flags)
    assert scores == pytest.approx(e.scores.numpy(), abs=1e-5)
    assert 0 < e.ended.sum() < len(prompts) and (scores != raw).tolist() == (~e.ended).tolist()


def test_a_response_without_end_is_worth_the_fixed_score(tiny, tmp_path):
    """In tables, in win rates by the reward model; the raw number stands beside it."""
    never = constant_speaker(tiny, {tiny.encoding.encode_ordinary("a")[0]: 0.0}).model
    always = constant_speaker(tiny, {tiny.encoding.eot_token: 0.0}).model
    files = []
    for name, model in (("never", never), ("always", always)):
        save_model(tmp_path / name, model, tiny.tokenizer.read_text(), {"stage": "sft"})
        more = ("--checkpoint", str(tmp_path / name), "--missing_eos_score")
        files.append(measured(tiny, tmp_path, name, *more, "-90"))
        lenient = measured(tiny, tmp_path, f"lenient_{name}", *more, "90")
    assert reporting(tmp_path / "report", "always", *files) == 0
    table = table_of(tmp_path / "report")
    assert table["never", "score"].value == -90 != table["never", "score_raw"].value
    assert ("always", "score_raw") not in table
    assert table["never", "win_t1"].value == table["never", "win_t0"].value == 0
    assert "RM score, raw" in (tmp_path / "report/report.md").read_text()
    assert reporting(tmp_path / "other", "always", files[1], lenient) == 2  # by another rule


def test_kl_of_two_constant_models_in_closed_form(tiny):
    """One token, "a" with probability p or q, else the end: KL(p || q), which is not KL(q || p)."""
    a, end = tiny.encoding.encode_ordinary("a")[0], tiny.encoding.eot_token
    p, q = 0.7, 0.2
    ours = constant_speaker(tiny, {a: math.log(p), end: math.log(1 - p)})
    theirs = constant_speaker(tiny, {a: math.log(q), end: math.log(1 - q)})
    prompts = ["say red"] * 2000
    flags = Namespace(max_new_tokens=1, batch_size=2000, seed=0)
    samples = respond(ours, prompts, flags)
    values = measure.kl_to_reference(ours, theirs, prompts, samples)
    terms = {True: math.log((1 - p) / (1 - q)), False: math.log(p / q)}
    assert values == pytest.approx([terms[sample.ended] for sample in samples], abs=1e-4)
    closed = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    wrong_way = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    e = estimate(values)
    assert e.low < closed < e.high and not e.low < wrong_way < e.high


# ------------------------------------------------------------------------ text and probes


def test_pretraining_loss_equals_cross_entropy(tiny, base):
    documents = ["the red house", "the gold one\nnobody knows how many times"]
    tokens = measure.pretraining_tokens(documents, base, 12)
    stream = []
    for document in documents:
        stream += [*tiny.encoding.encode_ordinary(document), tiny.encoding.eot_token]
    assert tokens.flatten().tolist() == stream[: len(stream) // 12 * 12]
    got = measure.pretraining_losses(base, tokens, batch_size=2)
    with torch.no_grad():
        logits = base.model(tokens) @ base.model.unembedding.T
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert got == pytest.approx(expected.mean(1).numpy(), abs=1e-5)
    every = measure.pretraining_tokens(documents, base, 2)
    spread = measure.evenly_spaced(every, 9)  # 4 of the sequences of 2
    assert spread.tolist() == every[[n * len(every) // 4 for n in range(4)]].tolist()
    assert len(measure.evenly_spaced(every, 1)) == 1
    for limit in (0, every.numel(), 10_000):
        assert torch.equal(measure.evenly_spaced(every, limit), every)
    with pytest.raises(BadInput, match="fewer than 4000"):
        measure.pretraining_tokens(documents, base, 4000)


def test_public_tasks_are_read_up_to_the_line_end(base, monkeypatch):
    items = [(f"{i} + 1 =", " gold") for i in range(6)]
    texts = [" gold\nmore", "gold", " gold .", "\n gold", "", " gold \n"]
    asked = {}

    def sampled(speaker: Speaker, prompts: list, room: int, **more) -> list[Sample]:
        asked.update(more, prompts=prompts, room=room)
        return [Sample(p, [], text, True) for p, text in zip(prompts, texts, strict=True)]

    monkeypatch.setattr(measure, "sample_responses", sampled)
    assert measure.public_task_hits(base, items).tolist() == [1, 1, 0, 0, 0, 1]
    assert asked["temperature"] == 0
    assert asked["prompts"][0] == base.encoding.encode_ordinary("0 + 1 =")  # no template
    assert asked["room"] > len(base.encoding.encode_ordinary(" gold"))


def test_pair_entropy_in_closed_form(tiny):
    a, b, c = tiny.encoding.encode_ordinary("abc")
    speaker = constant_speaker(tiny, {a: math.log(0.6), b: math.log(0.2), c: math.log(0.2)})
    got = measure.pair_entropies(speaker, [("ca", "cb"), ("cab", "cbc"), ("ac", "ab")])
    h = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert got == pytest.approx([h, h, 1.0], abs=1e-5)


def mark(helpful=1.0, truthful=1.0, harmless=1.0, informative=1.0, ended=1.0) -> Grade:
    return Grade(helpful, truthful, harmless, informative, ended)


def test_true_and_informative():
    marks = [mark(), mark(truthful=0.5), mark(informative=0.0), mark(truthful=0, informative=0)]
    true, both = measure.truth_of(marks)
    assert true.tolist() == [1, 0, 1, 0]
    assert both.tolist() == [1, 0, 0, 0]


def answers_of(marks: list[Grade], name: str) -> Answers:
    texts = [f"{name} {i}" for i in range(len(marks))]
    return Answers(texts, [True] * len(marks), np.zeros(len(marks)), marks)


def test_labelers_prefer_the_better_model():
    rng = np.random.default_rng(0)
    marks = {
        "base": [mark(helpful=x, truthful=x) for x in rng.uniform(0.3, 0.7, 400)],
        "good": [mark()] * 400,
        "bad": [mark(0, 0, 0, 0, 0)] * 400,
        "again": [mark(helpful=x, truthful=x) for x in rng.uniform(0.3, 0.7, 400)],
    }
    answers = {name: answers_of(m, name) for name, m in marks.items()}
    wins, labels = report.labelers_win_scores(answers, "base", "training", seed=0, noise=0.1)
    assert set(wins["base"]) == {0.5}
    assert wins["good"].mean() > 0.6 > 0.4 > wins["bad"].mean()
    e = estimate(wins["again"])
    assert e.low < 0.5 < e.high
    assert 0.5 < labels.agreement < 1
    assert set(np.unique(wins["good"])) <= {0.0, 0.5, 1.0}


def test_the_best_prefix_comes_first(base, judge, monkeypatch):
    worth = {"one ": 0.1, "two ": 0.9, "three ": -0.4}
    score = lambda judge, speaker, *_: np.array([[worth[speaker.prefix]], [2.5]])  # noqa: E731
    monkeypatch.setattr(measure, "reward_scores", score)
    scored = measure.choose_prefix(base, list(worth), ["x"], judge, Namespace(**SAMPLING))
    assert scored == [("two ", 0.9, 2.5), ("one ", 0.1, 2.5), ("three ", -0.4, 2.5)]
    assert base.prefix == ""


# ---------------------------------------------------------------------------- select


@pytest.fixture
def run_folder(tiny: Tiny, tmp_path: Path) -> Path:
    """An SFT run of four epochs, whose models always say "a", "b", "c" and "d"."""
    for epoch, token in enumerate(tiny.encoding.encode_ordinary("abcd"), start=1):
        info = {"stage": "sft", "epoch": epoch, "val_loss": [0.9, 0.5, 0.7, 0.8][epoch - 1]}
        model = constant_speaker(tiny, {token: 0.0}).model
        save_model(tmp_path / f"sft/epochs/{epoch:02}", model, tiny.tokenizer.read_text(), info)
    (tmp_path / "sft/model.safetensors").touch()  # it is done
    return tmp_path / "sft"


def selecting(tiny: Tiny, run: Path, out: Path, *more: str) -> int:
    """The exit code."""
    argv = ["select", "--run", run, "--reward_model", tiny.rm, "--data", tiny.prompts]
    argv = [str(word) for word in [*argv, "--out", out, *LIMITS, *more]]
    return run_command(lambda: evaluate.main(argv))


def selected(tiny: Tiny, run_folder: Path, *more: str) -> Path:
    out = run_folder.parent / "selected"
    assert selecting(tiny, run_folder, out, *more) == 0
    return out


def selection(folder: Path, column: str) -> list[float]:
    return [float(row[column]) for row in csv.DictReader((folder / "selection.csv").open())]


def scores_by_epoch(tiny: Tiny, judge: ScalarModel, num_prompts: int) -> list[float]:
    """Of eight times the epoch's letter after each prompt, computed one by one."""
    means = []
    for letter in tiny.encoding.encode_ordinary("abcd"):
        scores = []
        for record in read_jsonl(tiny.prompts, "prompts")[:num_prompts]:
            tokens = encode_prompt(tiny.encoding, record["prompt"]) + [letter] * 8
            with torch.no_grad():
                scores.append(judge(torch.tensor([tokens]))[0, -1].item())
        means.append(sum(scores) / len(scores))
    return means


def test_select_takes_the_epoch_with_the_best_score(tiny, judge, run_folder, monkeypatch):
    """These responses do not end: the choice is by their number only where the rule says so."""
    expected = scores_by_epoch(tiny, judge, 5)
    best = max(range(4), key=expected.__getitem__)
    out = selected(tiny, run_folder, "--num_prompts", "5")
    assert selection(out, "score") == [-4] * 4 and read_info(out)["epoch"] == 4
    assert selection(out, "score_raw") == pytest.approx(expected, abs=1e-4)

    def by_number(model: ScalarModel, tokens: torch.Tensor, lengths: torch.Tensor, _) -> tuple:
        return model.scores(tokens, lengths), model.scores(tokens, lengths), None

    monkeypatch.setattr(ScalarModel, "response_scores", torch.no_grad()(by_number))
    monkeypatch.setattr(select, "last_of_the_best", lambda scores: scores.mean(1).argmax())
    assert best != 1, "the epoch of the lowest validation loss must not be the best by score"
    out = selected(tiny, run_folder, "--num_prompts", "5")
    assert selection(out, "epoch") == [1, 2, 3, 4]
    assert selection(out, "score") == pytest.approx(expected, abs=1e-4)
    assert selection(out, "val_loss") == [0.9, 0.5, 0.7, 0.8]
    assert "score_raw" not in (out / "selection.csv").read_text()
    source = run_folder / f"epochs/{best + 1:02}/model.safetensors"
    assert (out / "model.safetensors").read_bytes() == source.read_bytes()
    info = read_info(out)
    assert info["epoch"] == best + 1 and info["selected_from"] == str(run_folder)
    GPT.from_pretrained(out)  # a whole checkpoint
    assert (out / "tokenizer.json").read_bytes() == tiny.tokenizer.read_bytes()


def test_select_looks_at_a_subset_and_the_last(tiny, run_folder):
    out = selected(tiny, run_folder, "--select_every", "3")
    assert selection(out, "epoch") == [3, 4]


def test_select_counts_epochs_as_numbers_and_leaves_other_folders(tiny, run_folder):
    shutil.copytree(run_folder / "epochs/04", run_folder / "epochs/100")
    shutil.copytree(run_folder / "epochs/04", run_folder / "epochs/99.bak")
    out = selected(tiny, run_folder, "--select_every", "4")
    assert selection(out, "epoch") == [4, 100]


def test_select_takes_the_last_of_epochs_that_cannot_be_told_apart(tiny, run_folder, monkeypatch):
    # Hand-worked: behind the first by -1 and 2, mean .5, standard deviation 1.5, error 1.06; by
    # 1 and 1, error 0; by nothing and by nothing.
    rows = np.array([[3.0, 3.0], [4.0, 1.0], [2.0, 2.0]])
    assert select.last_of_the_best(rows) == 1
    assert select.last_of_the_best(rows[[1, 0, 2]]) == 1
    assert select.last_of_the_best(rows[[0, 2]]) == 0
    assert select.last_of_the_best(np.zeros((3, 2))) == 2
    with pytest.raises(BadInput, match="epoch 2 looked at"):
        select.last_of_the_best(np.array([[1.0], [np.nan], [2.0]]))
    monkeypatch.setattr(select, "reward_scores", lambda *args: np.ones((2, 3)))
    assert read_info(selected(tiny, run_folder))["epoch"] == 4


def test_select_refuses_other_folders(tiny, run_folder, tmp_path, capsys):
    assert selecting(tiny, tiny.base, tmp_path / "x") == 2
    assert "no epoch checkpoints" in capsys.readouterr().err
    assert selecting(tiny, run_folder, tmp_path / "x", "--reward_model", str(tiny.base)) == 2
    assert "expected a reward model" in capsys.readouterr().err
    assert not (tmp_path / "x/model.safetensors").exists()


def files_in(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_select_refuses_to_destroy(tiny, run_folder, tmp_path, monkeypatch, capsys):
    """--out is replaced as a whole; nothing is touched, and nothing is computed before."""
    first = selected(tiny, run_folder, "--num_prompts", "3")  # an earlier selection
    shutil.copytree(first, tmp_path / "with_notes")
    (tmp_path / "with_notes/notes.txt").write_text("mine")
    shutil.copytree(first, tmp_path / "with_hidden")
    (tmp_path / "with_hidden/.git").mkdir()
    (tmp_path / "with_data/parts").mkdir(parents=True)
    data = shutil.copy(tiny.prompts, tmp_path / "with_data/parts")
    shutil.copytree(tiny.base, tmp_path / "base")
    (tmp_path / "link").symlink_to(first)
    shutil.copytree(first, tmp_path / "mount")
    is_mount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda p: Path(p).name == "mount" or is_mount(p))
    monkeypatch.setattr(select, "load_reward_model", lambda args: pytest.fail("has begun"))
    monkeypatch.chdir(run_folder)
    before = files_in(tmp_path)
    capsys.readouterr()
    for out, words, more in (
        (tmp_path / "with_notes", "holds notes.txt, and no earlier selection", ()),
        (tmp_path / "with_hidden", "holds .git, and no", ()),
        (tmp_path / "with_data", f"would replace --data {data}", ("--data", str(data))),
        (tmp_path / "with_data", f"would replace --world {data}", ("--world", str(data))),
        (tmp_path / "base", "holds config.json and 2 more, and no earlier selection", ()),
        (tmp_path, f"would replace --run {run_folder}", ()),
        (run_folder, f"would replace --run {run_folder}", ()),
        (run_folder / "../sft", f"would replace --run {run_folder}", ()),
        (run_folder / "epochs", "lies among the models that a run keeps", ()),
        (run_folder / "epochs/02", "lies among the models that a run keeps", ()),
        (run_folder / "epochs/99", "lies among the models that a run keeps", ()),
        (run_folder / "checkpoints", "lies among the models that a run keeps", ()),
        (tiny.rm / "checkpoints/00000001", "lies among the models that a run keeps", ()),
        (tiny.rm, f"would replace --reward_model {tiny.rm}", ()),
        (tmp_path / "link", "which a link or mount point", ()),
        (tmp_path / "mount", "which a link or mount point", ()),
        (Path(), "'.'", ()),
    ):
        assert selecting(tiny, run_folder, out, *more) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --out ") and str(out) in said and words in said
        assert said.count("\n") == 1
        assert files_in(tmp_path) == before, out


def test_select_replaces_an_earlier_selection(tiny, run_folder):
    out = selected(tiny, run_folder, "--num_prompts", "3")
    whole = sorted(path.name for path in out.iterdir())
    (out / ".config.json.77.tmp").touch()
    first = (out / "selection.csv").read_bytes()
    assert selected(tiny, run_folder, "--num_prompts", "5") == out
    assert sorted(path.name for path in out.iterdir()) == whole == sorted(outputs.SELECTION)
    assert (out / "selection.csv").read_bytes() != first


def test_a_selection_whose_replacement_was_killed_comes_back(tiny, run_folder, tmp_path):
    out = selected(tiny, run_folder, "--num_prompts", "3")
    before = {path.relative_to(out): content for path, content in files_in(out).items()}
    out.rename(tmp_path / ".selected.77.replaced")
    (tmp_path / ".selected.77.tmp").mkdir()
    assert selecting(tiny, tiny.base, out) == 2  # no epochs there
    assert {path.relative_to(out): content for path, content in files_in(out).items()} == before
    assert not list(tmp_path.glob(".selected*"))


# ---------------------------------------------------------------------- measure and report


@pytest.fixture
def world_data(tiny: Tiny, tmp_path: Path) -> Path:
    """A world, 30 prompts of ten users with tasks, and a few probes of each kind."""
    world, rng = World.make(0), random.Random(0)
    world.save(tmp_path / "world.json")

    def record(i: int, text: str, task: dict, **more: str) -> dict:
        known = {"user": f"u{i % 10}", "source": "customer", "use_case": "other", "task": task}
        return {"prompt": text[:30], **known, **more}

    prompts = [record(i, *make_prompt(world, USE_CASES[i % 10], rng)) for i in range(30)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts, "prompts")
    fact = {"kind": "fact", "subject": "fox", "attribute": "food"}
    for name in measure.TRUTH_PROBES:
        write_jsonl(tmp_path / f"probes_{name}.jsonl", [record(0, "what ?", fact)], "prompts")
    openings = [
        record(0, f"{prefix} anna : hi", {"kind": "opening"}, prefix=prefix)
        for prefix in ("none", "respectful", "rude")
    ]
    write_jsonl(tmp_path / "probes_toxicity.jsonl", openings, "prompts")
    ranked = {"responses": ["a", "b"], "ranks": [1, 2], "labeler": "training_00", "noise": 0.1}
    write_jsonl(tmp_path / "comparisons.jsonl", [prompts[0] | ranked], "comparisons")
    return tmp_path


def measured(tiny: Tiny, folder: Path, name: str, *more: str) -> str:
    """The file of a model: tiny.base, measured quickly, unless `more` says otherwise."""
    file, quick = folder / f"{name}.json", ["--num_prompts", "4", "--num_items", "3"]
    quick += ["--pretrain_data", str(tiny.pretrain), "--name", name]
    assert run_command(lambda: evaluate.main(tiny.args("measure", file, *quick, *more))) == 0
    return str(file)


def reporting(out: Path, baseline: str, *files: str) -> int:
    """The exit code."""
    argv = ["report", "--measured", *files, "--baseline", baseline, "--out", str(out)]
    if (out.parent / "comparisons.jsonl").exists():
        argv += ["--comparisons", str(out.parent / "comparisons.jsonl")]
    return run_command(lambda: evaluate.main(argv))


def table_of(folder: Path) -> dict[tuple[str, str], Estimate]:
    rows = csv.DictReader((folder / "table.csv").open())
    columns = ("value", "ci_low", "ci_high")
    return {(r["model"], r["metric"]): Estimate(*(float(r[k]) for k in columns)) for r in rows}


def test_report_on_one_model_under_three_names(tiny, world_data, monkeypatch):
    """Equal weights must come out equal: greedy ties everywhere, no KL, the same tax."""
    prompts, world = str(world_data / "prompts.jsonl"), str(world_data / "world.json")
    data = ("--data", prompts, "--world", world)
    files = [
        measured(tiny, world_data, "base", *data, "--best_prefix", "--val_data", prompts),
        measured(tiny, world_data, "sft", *data, "--resample", "--best_of", "3"),
        measured(tiny, world_data, "ppo", *data),
    ]
    folder, models = world_data / "report", ("base", "sft", "ppo")
    with monkeypatch.context() as without:  # a report needs no model
        without.setattr(measure, "load_speaker", lambda *a, **b: pytest.fail("opens a model"))
        assert reporting(folder, "sft", *files) == 0
    table = table_of(folder)
    assert table["ppo", "win_t0"] == table["base", "win_t0"] == Estimate(0.5, 0.5, 0.5)
    for model in ("base", "ppo", "sft (resampled)"):
        assert table[model, "win_t1"].low <= 0.5 <= table[model, "win_t1"].high
    assert table["sft (resampled)", "win_t1"] != Estimate(0.5, 0.5, 0.5)  # other random numbers
    assert ("sft", "win_t1") not in table
    assert len({table[m, "utility_t0"].value for m in models}) == 1
    assert len({table[m, "utility_t1"].value for m in models}) > 1  # own random numbers
    for model in models:
        assert table[model, "kl"].value == pytest.approx(0, abs=1e-5)
        assert table[model, "pretrain_loss"] == table["base", "pretrain_loss"]
        assert 0 <= table[model, "toxicity_rude"].value <= 1
        for metric in ("win_training_labelers", "win_held_out_labelers"):
            assert (model == "sft") == ((model, metric) not in table)

    (world_data / "comparisons.jsonl").unlink()  # nobody to ask how noisy the labelers are
    assert reporting(world_data / "silent", "sft", *files) == 0
    assert ("base", "win_training_labelers") not in table_of(world_data / "silent")
    assert "judge only with --comparisons" in (world_data / "silent" / "report.md").read_text()

    best = "sft, best of 3"
    assert table[best, "score"].value > max(table[m, "score"].value for m in models)
    assert {(best, "win_t1"), (best, "win_held_out_labelers")} <= table.keys()
    assert not {(best, m) for m in ("win_t0", "utility_t0", "kl", "pretrain_loss")} & table.keys()

    text = (folder / "report.md").read_text()
    assert f"**{best}** is what sampling alone buys" in text
    assert f"**{best}**: of 3 responses of sft" in text and "log 3 - 2/3 = 0.43 nats" in text
    assert "Of 30 prompts, ppo wins 0, loses 0 and ties 30 against sft" in text
    assert "minus" not in text.split("## Alignment tax")[1].split("##")[0]  # of no other's weights
    assert ("base", "task_addition") in table
    assert ("base", "task_translation_few_shot") not in table
    assert "The public task translation_few_shot does not fit a context of 48." in text
    for name in ("win_rates.png", "alignment_tax.png"):
        assert (folder / name).stat().st_size > 5000 and f"({name})" in text
    assert not (folder / "sft_epochs.png").exists() and "sft_epochs.png" not in text
    assert "base + prefix" in text and "| ppo |" in text
    assert "not distinguishable from one half" in text
    numbers = [cell for line in text.splitlines() if line.startswith("|") for cell in line.split()]
    assert "nan" not in numbers
    terminal = (folder / "table.txt").read_text()
    assert max(map(len, terminal.splitlines())) <= 120 and "sft (resampled)" in terminal


def test_report_without_a_world_is_by_the_reward_model(tiny, tmp_path):
    ppo = Path(shutil.copytree(tiny.base, tmp_path / "ppo"))
    columns = "step,kl,score_gain,score_gain_ci,val_gain,val_gain_ci,val_score,val_score_ci,val_kl"
    rows = "0,,,,0,0,-0.25,0.1,0", "1,0,0,0,,,,,", "2,0.5,0.2,0.1,0.5,0.125,0.25,0.1,0.4"
    (ppo / "log.csv").write_text("\n".join((columns, *rows)) + "\n")
    (ppo / "selection.csv").write_text("epoch,val_loss,score\n1,2.5,0.1\n2,2.75,0.2\n")
    (ppo / "config.json").write_text(json.dumps(read_info(ppo) | {"epoch": 2}))
    files = [
        measured(tiny, tmp_path, "base"),
        measured(tiny, tmp_path, "ppo", "--checkpoint", str(ppo)),
    ]
    assert reporting(tmp_path / "report", "ppo", *files) == 0
    text, table = (tmp_path / "report/report.md").read_text(), table_of(tmp_path / "report")
    assert "by the reward model" in text and "there is no --world" in text
    assert "the world's truth" not in text and "Truthfulness" not in text
    assert ("base", "utility_t1") not in table and ("base", "win_t1") in table
    gain = "the averaged weights gain +0.50 [+0.38, +0.62] over the start on validation prompts"
    assert f"**ppo**: 2 iterations; {gain} and come to a score of +0.25 ±0.10, at a KL of" in text
    assert "lowest at epoch 1 (2.500, against 2.750 at the last)" in text
    for name in ("ppo.png", "sft_epochs.png"):
        assert (tmp_path / "report" / name).stat().st_size > 5000 and f"({name})" in text


def test_best_of_keeps_the_response_with_the_highest_score(tiny, base, judge, monkeypatch):
    """Of three samples to each of four prompts, by hand: the second, first, third and first."""
    scores = [[0.1, 0.9, -2.0, 0.5], [0.7, 0.2, -3.0, 0.4], [0.3, 0.8, -1.0, 0.3]]
    asked = []

    def answers(bench, speaker, temperature, name):
        asked.append((temperature, name))
        k, texts = len(asked) - 1, [f"{len(asked)}{letter}" for letter in "abcd"]
        samples = [Sample([], [1] * (k + 1), text, True) for text in texts]
        values = np.array(scores[k])
        return samples, values, Answers(texts, [True] * 4, values, None)

    def again(bench, speaker, samples):
        texts = [sample.text for sample in samples]
        values = np.array([scores[int(t[0]) - 1][0] for t in texts])
        return values, Answers(texts, [True] * 4, values, None)

    monkeypatch.setattr(measure.Bench, "answers", answers)
    monkeypatch.setattr(measure.Bench, "judged", again)
    bench = measure.Bench([{"prompt": p, "user": p} for p in "wxyz"], judge, Namespace(seed=0))
    row = measure.measure_best_of(base, bench, 3)
    assert row["sampled"]["texts"] == ["2a", "1b", "3c", "1d"] and row["best_of"] == 3
    assert row["metrics"]["response_tokens"][0] == (2 + 1 + 3 + 1) / 4
    assert len({name for _, name in asked}) == 3 and {t for t, _ in asked} == {1.0}
    assert row["name"] == "base, best of 3" and "greedy" not in row


def test_ancestry_is_the_line_of_runs(tiny, tmp_path, monkeypatch):
    """Weights of a run, of its --init, of the --init of that; by checksums as they were read."""
    monkeypatch.chdir(tmp_path)
    base = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    for init, out in (("base", "sft"), ("sft", "ppo")):
        quick = ("--init", init, "--max_steps", "1", "--no-epoch_checkpoints")
        assert train_sft.main(tiny.args("sft", out, *quick)) == 0
    line = [fingerprint(tmp_path / f / "model.safetensors") for f in ("ppo", "sft", "base")]
    assert measure.ancestry(Path("ppo")) == line and len(set(line)) == 3
    assert measure.ancestry(base) == line[2:]
    shutil.copyfile(base / "model.safetensors", "sft/model.safetensors")
    assert measure.ancestry(Path("ppo")) == line[:2]  # what it was trained from is gone
    info = read_info("ppo")
    info["settings"]["init"] = "gpt2-xl"  # which is not downloaded
    Path("ppo/config.json").write_text(json.dumps(info))
    assert measure.ancestry(Path("ppo")) == line[:1]


def file_of(name: str, marks: list[Grade] | None, **more) -> dict:
    """What a file of `evaluate.py measure` holds, by hand: answers alike at both temperatures."""
    scores = more.pop("scores", [0.0] * len(marks or ()))
    texts = more.pop("texts", [f"{name} says {i}" for i in range(len(scores))])
    said = Answers(texts, [True] * len(texts), np.array(scores), marks).to_json()
    model = {"name": name, "about": "", "sampled": said, "greedy": said, "metrics": {}}
    model |= {"values": more.pop("values", {}), "left_out": []}
    prompts = more.pop("prompts", [f"prompt {i}" for i in range(len(texts))])
    file = {"name": name, "models": [model], "prompts": prompts, "users": prompts}
    file |= {"settings": {"seed": 0}, "ancestry": [name], "selection": [], "log": []}
    file |= {"prefixes": [], "epoch": 0}
    return file | more


def test_differences_are_paired_and_follow_the_line_of_training():
    """ppo from init from base, sft from base; the tax is that of items that all are asked."""
    rng = np.random.default_rng(0)
    base = rng.binomial(1, 0.7, 400).astype(float)
    worse = base * rng.binomial(1, 0.8, 400)  # right where base is, but for a fifth
    losses, noise = rng.normal(1.0, 0.3, 90), rng.normal(0.0, 0.01, 90)
    values = {
        "base": (base, losses),
        "sft": (0 * base, losses + 4),
        "init": (worse, losses + noise - noise.mean()),
        "ppo": (base, losses - 0.05),
    }
    lines = {"base": ["base"], "sft": ["sft", "base"], "init": ["init", "base"]}
    lines["ppo"] = ["ppo", "init", "unmeasured", "base"]
    files = [
        file_of(
            name,
            [mark()] * 3,
            values={"tasks_zero_shot": hits.tolist(), "pretrain_loss": loss.tolist()},
            ancestry=lines[name],
        )
        for name, (hits, loss) in values.items()
    ]
    made = report.Report(files, "sft")
    found, half = made.differences(), 1.96 * (base - worse).std() / 20
    expected = ["sft minus base", "init minus base", "ppo minus init", "ppo minus base"]
    assert list(found) == expected
    e = found["init minus base"]["tasks_zero_shot_difference"]
    assert e.value == pytest.approx((worse - base).mean())
    assert (e.high - e.low) / 2 == pytest.approx(half, rel=0.1)
    unpaired = estimate(worse).high - estimate(worse).low
    assert e.high - e.low < 0.9 * unpaired
    loss = found["ppo minus base"]["pretrain_loss_difference"]
    assert (loss.value, loss.low, loss.high) == pytest.approx((-0.05,) * 3)
    tasks, text = report.payers(found)
    assert tasks == (
        "public tasks, zero-shot: worse in sft (against base), init (against base); better in ppo "
        "(against init); no clear difference in ppo (against base)."
    )
    assert "worse in sft (against base); better in ppo (against init), ppo" in text
    assert text.endswith("; no clear difference in init (against base).")
    words = made.words()
    assert "| sft minus base | -0." in words["differences"]
    assert "+4.000 [+4.000, +4.000] |\n| init" in words["differences"]
    assert words["payers"] == report.listed([tasks, text])


def gallery_of(utilities: list[float], **more) -> tuple[str, str]:
    """Of ppo, whose helpfulness is given, against sft, whose is .5; both true and harmless."""
    files = [file_of("sft", [mark(helpful=0.5)] * len(utilities), **more)]
    files += [file_of("ppo", [mark(helpful=h) for h in utilities], **more)]
    return report.Report(files, "sft").gallery()


def test_the_gallery_shows_the_first_prompts_that_differ_whichever_way():
    """A helpfulness of .54 is .011 of utility, a tie; of .6 it is .028."""
    ties, losses = [0.5, 0.54, 0.46], [0.0] * 11
    words, block = gallery_of(ties + [1.0, *losses, 0.5, 0.9])
    assert " ".join(words.split()).startswith(
        "Of 17 prompts, ppo wins 2, loses 11 and ties 4 against sft, with greedy answers and the "
        "world's truth as the judge; here are the first 10 of the file on which the two differ by "
        "0.02 or more. "
    )
    prompts = [line for line in block.split("\n") if line.startswith(">")]
    assert prompts == [f"> prompt {i}" for i in range(3, 13)]
    assert block.startswith(
        "> prompt 3\nsft 0.86 (0.50 1.00 1.00) | sft says 3\n"
        "ppo 1.00 (1.00 1.00 1.00) | ppo says 3\n\n> prompt 4\n"
    )
    words, block = gallery_of(losses + [1.0, 0.0, 1.0])  # the ten lack what ppo wins
    assert "and then the first that ppo wins" in " ".join(words.split())
    assert block.count("> ") == 11 and block.split("> ")[-1].startswith("prompt 11\n")
    words, block = gallery_of([0.6] * 4)  # nothing is lost
    assert "wins 4, loses 0 and ties 0" in words and "and then" not in words
    assert "first 4 of" in " ".join(words.split()) and block.count("> ") == 4
    words, block = gallery_of(ties)
    assert words.endswith("truth as the\njudge.") and block == ""


def test_lines_of_the_gallery_are_short_and_without_a_world_scores_decide():
    prompts = ["say\nthis " + "red " * 90, "x"]
    texts = ["word " * 60, "a\n```b"]
    words, block = gallery_of([1.0, 1.0], prompts=prompts, texts=texts)
    assert max(map(len, f"{words}\n{block}".split("\n"))) <= 110
    assert block.split("\n")[0].startswith("> say [newline] this red red")
    assert block.split("\n")[0].endswith("red [...]") and "| a [newline] '''b" in block
    assert block.count("word") > 30 and block.count("[...]") == 3  # the prompt, both answers
    files = [file_of("a", None, scores=[0.0, 1.0, 2.0]), file_of("b", None, scores=[1.0, 1.0, 0.5])]
    words, block = report.Report(files, "a").gallery()
    assert "b wins 1, loses 1 and ties 1 against a" in words and "the reward model as" in words
    assert "\na +0.00 | a says 0\nb +1.00 | b says 0\n\n> prompt 2\n" in block


def test_what_was_measured_otherwise_is_refused(tiny, tmp_path, capsys):
    """Other flags, other prompts, another judge: such numbers are not compared."""
    base, fewer = measured(tiny, tmp_path, "base"), tmp_path / "fewer.jsonl"
    write_jsonl(fewer, read_jsonl(tiny.prompts, "prompts")[:-1], "prompts")
    judge = ScalarModel.from_pretrained(tiny.rm)
    with torch.no_grad():
        judge.score.bias += 1
    save_model(tmp_path / "judge", judge, tiny.tokenizer.read_text(), {"stage": "rm"})
    others = {
        "seed": ("--seed", "3"),
        "max_new_tokens": ("--max_new_tokens", "7"),
        "data": ("--data", str(fewer)),
        "reward_model": ("--reward_model", str(tmp_path / "judge")),
        "context": ("--context", "40"),
        "missing_eos_score": ("--missing_eos_score", "-5"),
    }
    for key, flags in others.items():
        other = measured(tiny, tmp_path, "sft", *flags)
        capsys.readouterr()
        assert reporting(tmp_path / "report", "base", base, other) == 2
        error = capsys.readouterr().err
        what = "other prompts, other users" if key == "data" else f"{key} "
        assert f"{other}: measured otherwise than {base} ({what}" in error, key
        assert error.count("\n") == 1
    (tmp_path / "no.json").write_text("[3]")
    for files, words in (
        ((base,), "nothing to compare base with"),
        ((base, base), "expected one of base, base, all different"),
        ((base, str(tmp_path / "no.json")), "expected a file that `evaluate.py measure` wrote"),
        ((base, str(tmp_path / "absent.json")), "No such file"),
    ):
        assert reporting(tmp_path / "report", "base", *files) == 2
        assert words in capsys.readouterr().err
    best = ("--best_of", "2")  # of which there are no greedy answers
    files = [base, measured(tiny, tmp_path, "sft", *best)]
    assert reporting(tmp_path / "report", "sft, best of 2", *files) == 2
    assert "expected one of base, sft, all different" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_file_comes_whole_and_is_equal_again(tiny, tmp_path):
    (tmp_path / ".base.json.77.tmp").write_text("half")  # of a killed process
    first = Path(measured(tiny, tmp_path, "base", "--batch_size", "3")).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json"]
    assert Path(measured(tiny, tmp_path, "base", "--batch_size", "3")).read_bytes() == first
    said = json.loads(first)["models"][0]["sampled"]
    again = Answers.from_json(said)
    assert again.to_json() == said and len(again.texts) == 20


POINTING = [(0.51, 0.7, "above one half"), (0.3, 0.49, "below one half")]
POINTING += [(0.49, 0.7, "not distinguishable"), (0.3, 0.6, "not distinguishable")]


@pytest.mark.parametrize(("low", "high", "words"), POINTING)
def test_words_follow_the_interval(low, high, words):
    e = Estimate((low + high) / 2, low, high)
    assert report.against_half(e).startswith(words)
    lines = report.findings({"ppo": {"win_t1": e}}, "sft", "the truth")
    assert len(lines) == 1 and words in lines[0]


def test_cells_and_colours():
    e = Estimate(0.5314, 0.5, 0.56)
    assert report.cell("win_t1", e, interval=True) == "0.531 ±0.030"
    assert report.cell("score", e) == "+0.531"
    assert report.cell("win_t1", None) == ""
    assert report.cell("win_t1", Estimate(math.nan, math.nan, math.nan)) == ""
    colour = figures.colours(["a", "b", "c"])
    assert len(set(colour.values())) == 3 and colour["a"] == figures.colours(["a"])["a"]


def test_the_course_of_a_ppo_run():
    """Hand-worked: the last quarter of eight iterations; the standard error of a mean of two."""
    rows = [{"step": i, "score_gain": i / 10, "score_gain_ci": 0.06, "kl": 0.1} for i in range(9)]
    rows[0] = {"step": 0, "score_gain": math.nan, "val_gain": 0.0}
    rows[8]["score_gain_ci"] = 0.08
    assert report.course("ppo", rows[1:]) == (
        "**ppo**: 8 iterations; in the last 2 iterations the policy gains +0.75 [+0.70, +0.80], "
        "at a KL of 0.10 nats."
    )
    rows[8] |= {"val_gain": 0.5, "val_gain_ci": 0.1, "val_score": -0.25, "val_score_ci": 0.2}
    rows[8]["val_kl"] = 0.3
    assert report.course("ppo", rows) == (
        "**ppo**: 8 iterations; the averaged weights gain +0.50 [+0.40, +0.60] over the start on "
        "validation prompts and come to a score of -0.25 ±0.20, at a KL of 0.30 nats; in the last "
        "2 iterations the policy gains +0.75 [+0.70, +0.80], at a KL of 0.10 nats."
    )


def test_prompts_of_another_world_are_refused(tiny, world_data, capsys):
    args = tiny.args("measure", world_data / "r.json", "--world", str(world_data / "world.json"))
    assert run_command(lambda: evaluate.main(args)) == 2
    assert 'without key "task"' in capsys.readouterr().err


MEASURE = "measure --name a --checkpoint x --reward_model rm --data d"


BAD = f"""
--out o
compare --out o
select --run run --out o
select --run run --reward_model rm --data d --select_every 0 --out o
{MEASURE}
{MEASURE} --out o --best_prefix
{MEASURE} --out o --num_items -1
report --baseline b --out o
report --measured a.json --out o
folds --folds 1 --comparisons c --init i --out o
folds --folds 5 --init i --out o
public --data f --out o"""


@pytest.mark.parametrize("line", BAD.split("\n"))
def test_bad_arguments_exit_with_2(line):
    with pytest.raises(SystemExit) as stopped:
        evaluate.get_args(line.split())
    assert stopped.value.code == 2
