"""Fields inside records, world.json, config.json, logs and measured files: one line for each that
is not as it should be, before any work is done. Whole files and flat keys are in test_files.py."""

import json
import random
import shutil
from ast import literal_eval
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from data import label
from data.commands import run_command
from data.files import BadInput, read_jsonl, write_jsonl
from data.real import prepare
from data.tiny.answers import answer
from data.tiny.grader import _RULES, false_claims, grade
from data.tiny.tasks import NEEDS, USE_CASES, check_tasks, make_prompt, respectfully
from data.tiny.world import World

import pytest

import evaluate
import sample
from evaluation import folds, measure, select
from tests.tiny import LIMITS, Tiny

FACT = {"kind": "fact", "subject": "fox", "attribute": "food"}
ODD = (None, True, 5, -1, 0, 1.5, 10**400, "", "x", "(", [], ["x"], [5], {}, {"a": []})
WHO = {"user": "u", "source": "customer", "use_case": "other"}
LOG = "step,kl,score_gain,score_gain_ci"


@pytest.fixture
def refused(capfd: pytest.CaptureFixture) -> Callable[..., None]:
    """Runs a command, which must end with code 2 and a line that holds these words."""

    def run(main: Callable, argv: list, *words: Any) -> None:
        capfd.readouterr()
        try:
            code = run_command(lambda: main([str(word) for word in argv]))
        except SystemExit as stopped:  # of argparse
            code = stopped.code
        said = capfd.readouterr().err
        assert code == 2 and all(str(word) in said.splitlines()[-1] for word in words), said

    return run


@pytest.fixture(scope="module")
def measured(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of two models, measured without a world."""
    made = [tmp_path_factory.mktemp("measured") / f"{name}.json" for name in ("a", "b")]
    for path in made:
        argv = tiny.args("measure", path, "--name", path.stem, "--pretrain_data", tiny.pretrain)
        assert evaluate.main(argv) == 0
    return made


@pytest.fixture
def w(tiny: Tiny, measured: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All files that the commands below read. No command may begin to sample."""
    World.make(0).save(tmp_path / "world.json")
    records = [{"prompt": f"what {i} ?", "task": FACT, "prefix": "rude"} | WHO for i in range(2)]
    said = {"responses": ["a", "b"], "ended": [True] * 2, "models": ["m"] * 2}
    write_jsonl(tmp_path / "candidates.jsonl", [r | said for r in records], "candidates")
    (tmp_path / "test").mkdir()
    for name in ("prompts", *(f"probes_{name}" for name in (*measure.TRUTH_PROBES, "toxicity"))):
        write_jsonl(tmp_path / f"test/{name}.jsonl", records, "prompts")
    shutil.copytree(tiny.base, tmp_path / "run/epochs/01")
    (tmp_path / "run/model.safetensors").touch()  # it is done
    for path in measured:
        shutil.copy(path, tmp_path)
    for module in (measure, select, sample):
        monkeypatch.setattr(module, "respond", lambda *args: pytest.fail("has begun"))
    return tmp_path


def command(name: str, w: Path, tiny: Tiny) -> tuple[Callable, list]:
    world = ["--world", w / "world.json"]
    made = ["--data", w / "candidates.jsonl", *world, "--out", w / "o.jsonl"]
    judge = ["--reward_model", tiny.rm, "--data", w / "test/prompts.jsonl", *world, *LIMITS]
    one = ["measure", "--name", "a", "--checkpoint", w / "run/epochs/01", *judge, "--out", w / "o"]
    both = ["--measured", w / "a.json", w / "b.json", "--baseline", "a", "--out", w / "report"]
    ranked = ["--comparisons", tiny.comparisons, "--init", tiny.base, "--out", w / "folds", *LIMITS]
    models = ["--checkpoints", f"a={tiny.base}"]
    return {
        "folds": (evaluate.main, ["folds", *ranked]),
        "public": (evaluate.main, ["public", "--data", w, *models, "--out", w / "o"]),
        "prepare": (prepare.main, ["alpaca"]),
        "label": (label.main, made),
        "sample": (sample.main, [*models, "--prompt", "x", *world, *LIMITS]),
        "measure": (evaluate.main, one),
        "select": (evaluate.main, ["select", "--run", w / "run", *judge, "--out", w / "chosen"]),
        "report": (evaluate.main, ["report", *both]),
    }[name]


# What is changed, in the last record, and a key that is gone (...); each is named in the message.
FIELDS = """
label | candidates.jsonl: task=5; task.kind=...; task.kind="nope"; task.kind=[]; task.subject=...
label | candidates.jsonl: task.attribute=5; task.attribute="job"; task.subject="unicorn"
sample measure select | test/prompts.jsonl: task=5; task.kind=[]; task.subject=...; task.attribute=1
measure | test/probes_facts.jsonl: task={"kind": "bye"}; task.attribute=...
measure | test/probes_toxicity.jsonl: prefix=5; prefix=...; prefix="a|b"; task=...
label sample measure select | world.json: facts=[]; facts={}; facts.3.value=5; facts.3.kind="x"
label sample measure select | world.json: facts.0=5; facts.0.myth=...; facts.0.subject="bear"
label sample measure select | world.json: seed="x"; seed=...; dictionary.fox=5; dictionary=[]
measure select | run/epochs/01/config.json: data=5; data=[1]; settings=5; settings={"sha256": 5}
measure select | run/epochs/01/config.json: settings={"init": 5}; settings={"sha256": {"a": 5}}
measure select | run/epochs/01/config.json: stage=[]; epoch="x"; val_loss="x"; val_loss=True
report | b.json: models.0.metrics=...; models.0.metrics.score=[1, 2]; models.0.metrics.score.1="2"
report | b.json: models.0.sampled.texts=["x"]; models.0.sampled.ended.0=1; models.0.greedy=...
report | b.json: models.0.sampled.scores=[]; models.0.sampled.marks=[]; models.0.about=5
report | b.json: models.0.values=5; models=[]; users=[]; prompts=[]; prompts.0=5; ancestry=[]
report | b.json: prefixes=[["x", 1]]; settings=5; settings.seed=...; epoch="x"; log=[5]"""
ROWS = [row.replace(" | ", ": ").split(": ", 2) for row in FIELDS.strip().splitlines()]
CASES = [(names, file, change) for names, file, more in ROWS for change in more.split("; ")]


@pytest.mark.parametrize(("names", "file", "change"), CASES)
def test_a_nested_field_is_checked(names, file, change, w: Path, tiny: Tiny, refused) -> None:
    key, value = change.split("=", 1)
    key = [int(part) if part.isdecimal() else part for part in key.split(".")]
    path, value, where = w / file, literal_eval(value), "record 2: " * file.endswith("l")
    text = path.read_text()
    read = [json.loads(part) for part in (text.splitlines() if where else [text])]
    inner = reduce(lambda c, part: c[part], key[:-1], read[-1])
    inner[key[-1]] = value
    if value is ...:
        del inner[key[-1]]
    path.write_text("".join(json.dumps(each) + "\n" for each in read))
    named = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)[1:]
    for name in names.split():
        refused(*command(name, w, tiny), path, f'{where}key "{named}')


def test_what_the_check_lets_pass_can_be_graded() -> None:
    """Real tasks pass; with a key gone, or an odd value, they are refused or graded as others."""
    world, rng, kinds, bad = World.make(0), random.Random(0), set(), 0
    for i in range(300):
        task = respectfully(make_prompt(world, USE_CASES[i % 10], rng))[1]
        check_tasks([{"task": task}, {}], "f", world)
        kinds.add(task["kind"])
        for key in NEEDS[task["kind"]]:
            with pytest.raises(BadInput, match=f'record 1: key "task.{key}" is missing'):
                check_tasks([{"task": {k: v for k, v in task.items() if k != key}}], "f", world)
        said = ["the fox eats fish . yes . one day anna met the fox .", answer(world, task, rng)]
        for changed in (task | {key: odd} for key in [*task, "attribute"] for odd in ODD):
            try:
                check_tasks([{"task": changed}], "f", world)
            except BadInput:
                bad += 1
                continue
            for text in said:
                grade(world, {"task": changed}, text, True)
                false_claims(world, changed, text)
    assert set(NEEDS) == set(_RULES) and len(kinds) > 15 and bad > 5000


CSV = [  # in log.csv or selection.csv, and what is said of it
    (f"{LOG}\n1,0,0,0\n2,0,0\n", "log.csv:3: 3 cells; expected 4"),
    (f"{LOG}\n1,0,0,0\n2,0,abc,0\n", "log.csv:3: score_gain: expected a number, found 'abc'"),
    (f"{LOG}\n1,inf,0,0\n", "log.csv:2: kl: expected a number, found 'inf'"),
    ("step,score_gain\n1,0\n", "log.csv:2: kl: expected a number, found 'no such column'"),
    (f"{LOG},val_gain\n1,0,0,0,1\n", "log.csv:2: val_gain_ci: "),
    (f"{LOG}\n\udcff\n", "log.csv:2: not UTF-8"),
    ("epoch,val_loss\n1,2\n", "selection.csv:2: score: "),
    ("epoch,val_loss,score\n1,2,x\n", "selection.csv:2: score: "),
]


@pytest.mark.parametrize(("text", "words"), CSV)
def test_a_log_is_checked(text: str, words: str, w: Path, tiny: Tiny, refused: Callable) -> None:
    path = w / "run/epochs/01" / words.split(":")[0]
    path.write_bytes(text.encode(errors="surrogateescape"))
    refused(*command("measure", w, tiny), path.parent, words)


def test_a_report_of_odd_files(w: Path, tiny: Tiny, refused: Callable) -> None:
    ranked = {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2], "labeler": "l", "noise": 0.1}
    write_jsonl(w / "c.jsonl", [ranked | WHO], "comparisons")
    main, argv = command("report", w, tiny)
    main([str(word) for word in [*argv, "--comparisons", w / "c.jsonl"]])
    assert "only in a world: --comparisons has no use" in (w / "report/report.md").read_text()
    refused(main, [*argv, "--baseline", "c"], "--baseline c: expected one of a, b")
    write_jsonl(w / "c.jsonl", [ranked | WHO, ranked | WHO | {"noise": [1]}], "comparisons")
    refused(main, [*argv, "--comparisons", w / "c.jsonl"], "c.jsonl: noise 0.1 in its first")
    whole = (w / "b.json").read_text()
    log = '"log": [{"step": "1", "kl": "abc"}]'
    for content, words in (
        (b"\xff", "b.json:1: not UTF-8"),
        ("{", "b.json: not JSON"),
        (whole.replace('"name": "b"', '"name": "a"'), f"a is in {w}/a.json and {w}/b.json"),
        (whole.replace('{"pretrain_loss": [', '{"pretrain_loss": [1, '), 'key "values.pretrain_l'),
        (whole.replace('"settings": {', '"settings": {"world": 5, '), 'sampled.marks": expected a'),
        (whole.replace('"log": []', log), "b.json: log.csv:2: kl: expected a number, found 'abc'"),
    ):
        (w / "b.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        refused(main, argv, words)


def test_labelers_share_a_file(w: Path, monkeypatch, capsys) -> None:
    """B is told what A ranked and ranks it too; one's own rankings of other responses are named."""
    first, second = read_jsonl(w / "candidates.jsonl", "candidates")
    first["responses"][0] = "\x1b[2K\r\x9b\u202eb\ta\nc\x07 \u00fc"
    write_jsonl(w / "candidates.jsonl", [first, second], "candidates")
    monkeypatch.setattr("builtins.input", lambda _: "2 1")

    def ranking(name: str) -> str:
        argv = f"--data {w}/candidates.jsonl --out {w}/o.jsonl --interactive --labeler {name}"
        label.main(argv.split())
        return capsys.readouterr().out

    assert "] \\x1b[2K\\r\\x9b\\u202eb\ta\nc\\x07 \u00fc\n" in ranking("A")
    assert "2 ranked by A in " in (said := ranking("B")) and "0 ranked, 2 to go" in said
    assert "2 ranked by B" in (said := ranking("A")) and "2 ranked, 0 to go" in said
    assert len(read_jsonl(w / "o.jsonl", "comparisons")) == 4 and "other responses" not in said
    second["responses"] = ["x", "y"]
    write_jsonl(w / "candidates.jsonl", [first, second], "candidates")
    assert "2 ranked, 1 to go" in (said := ranking("A")) and "1 of the ranked are of other" in said


FLAGS = [("folds", f"--rm_flags={f}", "--rm_flags") for f in ("--out X", "--data=x", "--lr '3")]
FLAGS += [("folds", "--rm_flags=--seed 1", "--seed is set by `folds`")]
FLAGS += [("folds", "--rm_flags=--nope", "train_rm.py: error: unrecognized arguments: --nope")]
FLAGS += [("public", f"--toxicity_scorer={s}", "MODULE:FUNCTION") for s in ("../x:y", "math:pi")]
FLAGS += [("measure", f"--name={name}", "--name") for name in ("a|b", "a\nb", "", " ", "a,b")]
FLAGS += [("label", f"--labeler={name}", "--labeler") for name in ("  ", "\udc80", "a\x1b")]
for shares in ("nan 0.5 0.5", "0.5 nan 0.5"):
    FLAGS.append(("prepare", f"--fractions {shares}", "positive shares that sum"))


@pytest.mark.parametrize(("name", "flag", "words"), FLAGS)
def test_odd_flags(name, flag, words, w: Path, tiny: Tiny, refused, monkeypatch) -> None:
    monkeypatch.setattr(folds, "load_tokenizer", lambda path: pytest.fail("has begun"))
    main, argv = command(name, w, tiny)
    refused(main, [*argv, *(flag.split() if name == "prepare" else [flag])], words)
    assert not (w / "folds").exists()


def test_records_of_another_world_are_refused(tmp_path: Path) -> None:
    """Its facts are others."""
    own, other = World.make(0), World.make(1)
    records = [{"task": {"kind": "thanks"}, "world": 0}]
    check_tasks(records, "f", own)
    with pytest.raises(BadInput, match='f: record 1: key "world": expected 1, found 0'):
        check_tasks(records, "f", other)
