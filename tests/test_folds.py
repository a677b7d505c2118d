"""folds.py: cross-validation of reward models on comparisons, and the judges beside them."""

import csv
from pathlib import Path

from data.files import BadInput, read_jsonl, write_jsonl

import numpy as np
import pytest
import torch

import evaluate
from evaluation import folds
from model import ScalarModel
from tests.tiny import LIMITS, Tiny


def test_pairs_and_right_ones_by_hand():
    pairs = folds.pairs_of([2, 1, 2, 3])
    assert {tuple(pair) for pair in pairs} == {(1, 0), (1, 2), (0, 3), (1, 3), (2, 3)}
    scores = np.array([0.5, 2.0, 3.0, 0.5])
    right = {(1, 0): 1, (1, 2): 0, (0, 3): 0.5, (1, 3): 1, (2, 3): 1}
    assert folds.rightly(scores, pairs) == sum(right.values())
    assert folds.pairs_of([1, 1, 1]).shape == (0, 2)


def test_features_by_hand():
    features = folds.features_of("the red fox", "The fox, he said:\nred fox.", 9)
    words = {"the", "fox,", "he", "said:", "red", "fox."}
    assert features == [9, pytest.approx(np.log(10)), 2, 2 / len(words), 3]
    assert folds.features_of("x", "", 0) == [0, 0, 1, 0, 0]


def test_logistic_regression_in_closed_form():
    """One feature that is 1 for a pairs and -1 for b pairs: sigmoid(b*) = a / (a + b)."""
    x = np.array([[1.0]] * 30 + [[-1.0]] * 10)
    got = folds.fit_logistic(x, np.ones(40), ridge=1e-12)
    assert got[0] == pytest.approx(np.log(3), abs=1e-8)


def test_logistic_regression_is_a_maximum_even_where_classes_separate():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(300, 4)) * 5 + [3, 0, 0, 0], rng.uniform(0.1, 2, 300)
    x[:, 0] = np.abs(x[:, 0])  # separable by the first feature
    b = torch.tensor(folds.fit_logistic(x, weights, ridge=0.5), requires_grad=True)
    margins = torch.tensor(x) @ b
    loss = (torch.tensor(weights) * torch.nn.functional.softplus(-margins)).sum()
    scaled = b * torch.tensor(x.std(axis=0))
    (loss + 0.25 * scaled @ scaled).backward()
    assert b.grad.abs().max() < 1e-6


def test_logistic_regression_does_not_care_about_units():
    x = np.random.default_rng(0).normal(size=(50, 3)) + 0.3
    units = np.array([1.0, 1000.0, 1e-3])
    b, in_units = (folds.fit_logistic(m, np.ones(50)) for m in (x, x * units))
    assert in_units * units == pytest.approx(b, rel=1e-6)


def test_no_prompt_is_in_two_folds():
    records = [{"prompt": f"p{i % 23}"} for i in range(100)]
    fold, prompt = folds.deal(records, 5, seed=0)
    for number in range(23):
        mine = {record["prompt"] for record, n in zip(records, prompt, strict=True) if n == number}
        assert len(mine) == 1 and len(set(fold[prompt == number])) == 1
    sizes = [len(set(prompt[fold == f])) for f in range(5)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]
    assert (folds.deal(records, 5, seed=1)[0] != fold).any()
    with pytest.raises(BadInput, match="only 23 distinct prompts"):
        folds.deal(records, 24, seed=0)


def longer_is_better(folder: Path) -> list[Path]:
    """Two data sets: labelers of "long" prefer longer responses, those of "short" shorter ones."""
    paths = [folder / "long.jsonl", folder / "short.jsonl"]
    for path, ranks in zip(paths, ([1, 3, 2], [3, 1, 2]), strict=True):
        said = ["red"[: 1 + k] + " a" * k for k in (2, 0, 1)]
        known = {"user": "u", "source": "customer", "use_case": "other", "labeler": "l"}
        known |= {"responses": said, "ranks": ranks, "data_set": path.stem}
        records = [{"prompt": f"say {path.stem} {i}"} | known for i in range(12)]
        write_jsonl(path, records, "comparisons")
    return paths


def run(tiny: Tiny, paths: list[Path], out: Path, *more: str) -> dict[tuple[str, str], list[float]]:
    argv = ["folds", "--folds", "3", "--comparisons", *paths, "--init", tiny.base, "--out", out]
    assert evaluate.main([str(word) for word in (*argv, *LIMITS, *more)]) == 0
    columns = ("accuracy", "ci_low", "ci_high")
    rows = csv.DictReader((out / "folds.csv").open())
    return {(row["data_set"], row["judge"]): [float(row[k]) for k in columns] for row in rows}


def test_accuracy_by_data_set(tiny, tmp_path, monkeypatch):
    """With a reward model that scores the number of tokens, as a stand-in for training."""
    trained = []

    class Length(ScalarModel):
        def scores(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return lengths.float()

    def train(folder: Path, data: Path, args) -> ScalarModel:
        trained.append({record["prompt"] for record in read_jsonl(data, "comparisons")})
        return Length(ScalarModel.from_pretrained(tiny.rm).config)

    monkeypatch.setattr(folds, "train_reward_model", train)
    paths = longer_is_better(tmp_path)
    table = run(tiny, paths, tmp_path / "out")
    assert table["long", "reward_model"] == table["long", "longer"] == [1, 1, 1]
    assert table["short", "longer"] == [0, 0, 0]
    assert table["all", "longer"][0] == 0.5 and table["all", "difference"][0] == 0
    text = (tmp_path / "out/folds.md").read_text()
    assert "| long | 12 | 36 | 1.000 [1.000, 1.000] |" in text and "| all | 24 | 72 |" in text

    # Every prompt is judged once, by a model that has not seen it.
    assert len(trained) == 3 and all(len(prompts) == 16 for prompts in trained)
    for prompt in (r["prompt"] for path in paths for r in read_jsonl(path, "comparisons")):
        assert sum(prompt not in prompts for prompts in trained) == 1


def test_simple_features_learn_what_labelers_prefer(tiny, tmp_path, monkeypatch):
    model = ScalarModel.from_pretrained(tiny.rm)
    monkeypatch.setattr(folds, "train_reward_model", lambda *args: model)
    for path, longer in zip(longer_is_better(tmp_path), (1.0, 0.0), strict=True):
        table = run(tiny, [path], tmp_path / path.stem)
        assert table[path.stem, "features"][0] == 1.0
        assert table[path.stem, "longer"][0] == longer


def test_train_rm_is_run_on_the_other_folds(tiny, tmp_path):
    """The real thing: one step a fold, in processes of their own; --resume among the flags keeps
    the models that are trained."""
    paths, flags = longer_is_better(tmp_path)[:1], "--max_steps 1 --batch_size 4"
    more = ("--folds", "2", "--device", "cpu", "--rm_flags")
    table = run(tiny, paths, tmp_path / "out", *more, flags)
    assert 0 <= table["long", "reward_model"][0] <= 1
    models = [tmp_path / f"out/fold_{fold}/rm/log.csv" for fold in (0, 1)]
    before = [model.read_bytes() for model in models]
    models[1].parent.joinpath("model.safetensors").unlink()
    assert run(tiny, paths, tmp_path / "out", *more, f"{flags} --resume") == table
    assert [model.read_bytes() for model in models] == before


def test_a_failed_training_stops_with_its_code(tiny, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(tiny, longer_is_better(tmp_path), tmp_path / "out", "--rm_flags", "--lr x")
    assert stopped.value.code == 2
    assert not (tmp_path / "out/folds.csv").exists()


def test_comparisons_without_a_pair_are_bad_input(tiny, tmp_path, capsys):
    records = read_jsonl(tiny.comparisons, "comparisons")
    tied = [record | {"ranks": [1] * len(record["ranks"])} for record in records]
    write_jsonl(tmp_path / "tied.jsonl", tied, "comparisons")
    with pytest.raises(BadInput, match="only 0 distinct prompts"):
        run(tiny, [tmp_path / "tied.jsonl"], tmp_path / "out")
    assert "11 with ties only" in capsys.readouterr().out
