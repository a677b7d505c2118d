"""data/files.py: what is refused and how it is said, atomic writes, round trips over any input."""

import errno
import json
import os
import signal
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data import commands, files
from data.files import END_OF_TEXT, BadInput, read_documents, read_jsonl, write_jsonl
from data.tokenizer import encode_prompt, encode_response

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PROMPT = {"prompt": "say red", "user": "u1", "source": "customer", "use_case": "other"}
EXAMPLES = {
    "prompts": PROMPT,
    "demonstrations": PROMPT | {"response": "red", "source": "labeler"},
    "candidates": PROMPT | {"responses": ["red", ""], "ended": [True, False], "models": ["a", "b"]},
    "comparisons": PROMPT | {"responses": ["red", "", "blue"], "ranks": [1, 2, 1], "labeler": "l"},
}
fixture_check = [HealthCheck.function_scoped_fixture]
any_example = settings(suppress_health_check=fixture_check, deadline=None, max_examples=60)


def write_lines(path: Path, *lines: dict | str | bytes) -> Path:
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((t if isinstance(t, bytes) else t.encode()) + b"\n" for t in texts))
    return path


# ----------------------------------------------------------------------- Records


@pytest.mark.parametrize("kind", files.KINDS)
def test_a_good_record_is_read_as_it_was_written(kind, tmp_path):
    records = [
        EXAMPLES[kind] | {"prompt": 'say "red"\n\tnow é 漢 \u2028 \x00', "task": {"a": [1, None]}},
        EXAMPLES[kind] | {"score": -1.5e-7, "": True},  # unknown keys are kept
    ]
    path = tmp_path / "deep" / "new" / "file.jsonl"
    write_jsonl(path, records, kind)
    assert read_jsonl(path, kind) == records
    assert path.read_bytes().count(b"\n") == 2  # one record a line, whatever it holds


@pytest.mark.parametrize("kind", ["prompts", "demonstrations"])
def test_unknown_keys_may_have_the_names_of_other_kinds(kind):
    files.check_record(
        EXAMPLES[kind] | {"responses": 5, "ranks": "none", "ended": []}, kind, "here"
    )


CHANGES = [
    ("prompts", {"prompt": None}, 'key "prompt": expected a string that is not blank, found null'),
    ("prompts", {"prompt": " \n"}, 'key "prompt": expected a string that is not blank, found " '),
    ("prompts", {"user": ""}, 'key "user": expected a string that is not blank'),
    ("prompts", {"source": "web"}, 'key "source": expected "labeler" or "customer", found "web"'),
    ("prompts", {"source": []}, 'key "source": expected "labeler" or "customer"'),
    ("prompts", {"use_case": 1}, 'key "use_case": expected a string, found 1'),
    ("demonstrations", {"response": ""}, 'key "response": expected a string that is not blank'),
    ("candidates", {"responses": "red"}, 'key "responses": expected a list of strings'),
    ("candidates", {"responses": ["a", 1]}, 'key "responses": expected a list of strings'),
    ("candidates", {"responses": ["a"]}, 'key "responses": expected at least 2, found 1'),
    ("candidates", {"ended": [True]}, 'key "ended": expected one entry for each of the 2'),
    ("candidates", {"ended": [1, 0]}, 'key "ended": expected a list of true and false'),
    ("candidates", {"models": ["a"] * 3}, 'key "models": expected one entry for each of the 2'),
    ("comparisons", {"ranks": [1, 2]}, 'key "ranks": expected one entry for each of the 3'),
    ("comparisons", {"ranks": ["1", "2", "3"]}, 'key "ranks": expected a list of whole numbers'),
    ("comparisons", {"ranks": [True, 2, 3]}, 'key "ranks": expected a list of whole numbers'),
    ("comparisons", {"ranks": [1.0, 2, 3]}, 'key "ranks": expected a list of whole numbers'),
    ("comparisons", {"ranks": [0, 1, 2]}, 'key "ranks": expected a list of whole numbers'),
    ("comparisons", {"ranks": None}, 'key "ranks": expected a list of whole numbers'),
    ("comparisons", {"ended": [True]}, 'key "ended": expected one entry for each of the 3'),
    ("comparisons", {"labeler": 7}, 'key "labeler": expected a string that is not blank'),
]


@pytest.mark.parametrize(("kind", "change", "message"), CHANGES)
def test_a_bad_value_is_named_with_file_line_and_key(kind, change, message, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", EXAMPLES[kind], "", EXAMPLES[kind] | change)
    with pytest.raises(BadInput) as error:
        read_jsonl(path, kind)
    assert str(error.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(error.value)
    old = tmp_path / "old.jsonl"
    old.write_text("the old file")
    with pytest.raises(BadInput, match="old.jsonl: record 2: key "):
        write_jsonl(old, [EXAMPLES[kind], EXAMPLES[kind] | change], kind)
    assert old.read_text() == "the old file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.jsonl", "x.jsonl"]


@pytest.mark.parametrize("kind", files.KINDS)
def test_a_missing_key_is_named(kind, tmp_path):
    for key in EXAMPLES[kind]:
        record = {k: v for k, v in EXAMPLES[kind].items() if k != key}
        path = write_lines(tmp_path / "x.jsonl", record)
        with pytest.raises(BadInput, match=f'x.jsonl:1: key "{key}" is missing'):
            read_jsonl(path, kind)


good = json.dumps(PROMPT)
LINES = [
    ("{", "not JSON"),
    (good + good, "not JSON"),
    (good[:-1], "not JSON"),
    ("[1, 2]", "expected a JSON object, found list"),
    ("null", "expected a JSON object, found NoneType"),
    (good[:-1] + ', "score": NaN}', "NaN is not JSON"),
    (good[:-1] + ', "score": -Infinity}', "-Infinity is not JSON"),
    (good[:-1] + ', "score": 1e999}', "number 1e999 is out of range"),
    (good[:-1] + ', "score": ' + "9" * 5000 + "}", "limit"),
    (good[:-1] + ', "user": "u2"}', 'key "user" stands twice'),
    (good[:-1] + ', "task": {"a": 1, "a": 2}}', 'key "a" stands twice'),
    (good[:-1] + ', "deep": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested too deeply"),
    ('{"prompt": ' + "[" * 900 + "]" * 900 + good[20:], 'key "prompt": expected a string'),
    (good.replace("say", "s\x00ay"), "holds a NUL byte"),
    (good.replace("say", "s\tay"), "not JSON"),
    (good.replace("say", "\\ud800"), "half a surrogate pair"),
    (good[:-1] + ', "extra": ["\\uDFFF"]}', "half a surrogate pair"),
    (b"\xff\xfe" + good.encode(), "not UTF-8 text (byte"),
    (good.encode("utf-16"), "not UTF-8 text"),
    (good.replace("say", "é").encode("latin-1"), "not UTF-8 text"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=range(len(LINES)))
def test_a_malformed_line_is_named(line, message, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", PROMPT, line, PROMPT)
    with pytest.raises(BadInput) as error:
        read_jsonl(path, "prompts")
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 300


def test_a_line_of_100_mb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    path = write_lines(tmp_path / "x.jsonl", PROMPT, PROMPT | {"prompt": "a" * 1000})
    with pytest.raises(BadInput, match=r"x.jsonl:2: line of \d+ characters, over 1000"):
        read_jsonl(path, "prompts")


def test_windows_files_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good.encode() + b"\r\n\r\n" + good.encode() + b"\r\n")
    assert read_jsonl(path, "prompts") == [PROMPT, PROMPT]
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n<|endoftext|>\r\nthree\r\n")
    assert read_documents(path) == ["one\ntwo", "three"]


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(content, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="holds no records; expected prompts"):
        read_jsonl(path, "prompts")
    with pytest.raises(BadInput, match="holds no documents"):
        read_documents(path)


@pytest.mark.parametrize(
    "read", [lambda p: read_jsonl(p, "prompts"), read_documents, files.fingerprint]
)
def test_a_file_that_cannot_be_read_is_named(read, tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path, tmp_path / "x" / "y"):
        with pytest.raises(BadInput, match=str(path)):
            read(path)


def test_what_is_not_json_is_not_written(tmp_path):
    path = tmp_path / "x.jsonl"
    loop: dict = {}
    loop["self"] = loop
    for value in (float("nan"), float("inf"), "\ud800", {1, 2}, b"bytes", loop):
        with pytest.raises(BadInput, match="x.jsonl: record 1: "):
            write_jsonl(path, [PROMPT | {"extra": value}], "prompts")
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------- Any input at all


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of examples need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
lines_of_text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r <|>"))
filled = text.filter(lambda s: s.strip())
floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | text | floats,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
sources = st.sampled_from(["labeler", "customer"])
prompt_records = st.fixed_dictionaries(
    {"prompt": filled, "user": filled, "source": sources, "use_case": text}
)
extras = st.dictionaries(text.map("x{}".format), json_values, max_size=2)


@st.composite
def ranked_records(draw: st.DrawFn, kind: str) -> dict:
    K = draw(st.integers(2, 5))

    def of(values: st.SearchStrategy) -> list:
        return draw(st.lists(values, min_size=K, max_size=K))

    record = draw(prompt_records) | {"responses": of(text)}
    optional = {"ended": of(st.booleans()), "models": of(text)}
    if kind == "candidates":
        return record | optional
    chosen = draw(st.sets(st.sampled_from(sorted(optional))))
    ranked = {"ranks": of(st.integers(1, 9)), "labeler": draw(filled)}
    return record | ranked | {key: optional[key] for key in chosen}


RECORDS = {
    "prompts": prompt_records,
    "demonstrations": st.builds(lambda a, b: a | {"response": b}, prompt_records, filled),
    "candidates": ranked_records("candidates"),
    "comparisons": ranked_records("comparisons"),
}


@pytest.mark.parametrize("kind", files.KINDS)
@any_example
@given(data=st.data())
@pytest.mark.usefixtures("no_fsync")
def test_what_was_written_is_read_back(kind, data, tmp_path):
    record = st.builds(lambda a, b: b | a, RECORDS[kind], extras)
    records = data.draw(st.lists(record, min_size=1, max_size=4))
    write_jsonl(tmp_path / "x.jsonl", records, kind)
    assert read_jsonl(tmp_path / "x.jsonl", kind) == records


@any_example
@given(st.lists(lines_of_text, min_size=1))
@pytest.mark.usefixtures("no_fsync")
def test_documents_are_read_back_equal(tmp_path, documents):
    """Up to line ends, newlines around a document, blank documents and a byte-order mark."""
    files.write_documents(tmp_path / "x.txt", documents)
    first, *rest = documents
    joined = [
        f"{d}\n".replace("\r\n", "\n").strip("\n")  # also where "\r" ends a document
        for d in (first.removeprefix("\ufeff"), *rest)
    ]
    expected = [document for document in joined if document.strip()]
    if expected:
        assert read_documents(tmp_path / "x.txt") == expected
    else:
        with pytest.raises(BadInput, match="holds no documents"):
            read_documents(tmp_path / "x.txt")


ODD = rb'{ } " \ud800 NaN 1e999 [[[[ , :'.split() + [b"\n", b"\r\n", b"\n\n", b"\x00", b"\xff"]
ALMOST = [*(json.dumps(record).encode() for record in EXAMPLES.values()), *ODD, b"\xef\xbb\xbf"]


@settings(any_example, max_examples=300)
@given(
    st.binary(max_size=60) | st.lists(st.sampled_from(ALMOST), max_size=8).map(b"".join),
    st.sampled_from(sorted(files.KINDS)),
)
def test_any_bytes_give_records_or_one_clear_error(tmp_path, raw, kind):
    path = tmp_path / "x.jsonl"
    path.write_bytes(raw)
    for read in (lambda: read_jsonl(path, kind), lambda: read_documents(path)):
        try:
            assert read()
        except BadInput as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


@given(st.text(string.printable, max_size=40))
def test_any_text_parses_as_the_standard_parser_has_it(line):
    try:
        value = files.parse_json(line, "here")
    except BadInput:
        return  # stricter than the standard parser
    assert value == json.loads(line)


# --------------------------------------------------------- The end token in text


def test_a_literal_end_token_is_text(tiny, tmp_path):
    record = PROMPT | {"prompt": f"say {END_OF_TEXT} red", "response": f"{END_OF_TEXT}\nblue"}
    write_jsonl(tmp_path / "x.jsonl", [record], "demonstrations")
    (read,) = read_jsonl(tmp_path / "x.jsonl", "demonstrations")
    assert read == record
    end = tiny.encoding.eot_token
    assert end not in encode_prompt(tiny.encoding, read["prompt"])
    ids = encode_response(tiny.encoding, read["response"])
    assert ids.index(end) == len(ids) - 1
    assert tiny.encoding.decode(ids[:-1]) == record["response"]


def test_a_literal_end_token_inside_a_line_does_not_split_a_document(tmp_path):
    documents = [f"one {END_OF_TEXT} two", f"{END_OF_TEXT}three", "four"]
    files.write_documents(tmp_path / "x.txt", documents)
    assert read_documents(tmp_path / "x.txt") == documents
    for document in (END_OF_TEXT, f"a\n {END_OF_TEXT} \nb", f"a\r\n{END_OF_TEXT}\r\nb"):
        with pytest.raises(BadInput, match="document 2 has a line that holds only"):
            files.write_documents(tmp_path / "y.txt", ["first", document])
    with pytest.raises(BadInput, match="document 1 holds half a surrogate pair"):
        files.write_documents(tmp_path / "y.txt", ["\ud800"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


# ----------------------------------------------------------------------- Writing


@pytest.mark.parametrize("broken", ["replace", "fsync", "open"])
def test_a_failed_write_leaves_the_old_file(broken, tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    files.write_atomic(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new and longer")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_at_no_moment_is_a_file_half_written(tmp_path, monkeypatch):
    path, seen = tmp_path / "x.bin", []
    files.write_atomic(path, b"old")
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        seen.append((path.read_bytes(), Path(source).read_bytes(), Path(source).parent))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    files.write_atomic(path, b"new" * 1000)
    assert seen == [(b"old", b"new" * 1000, tmp_path)]  # aside on the same file system
    assert path.read_bytes() == b"new" * 1000


def test_a_folder_is_written_whole_with_checksums(tmp_path):
    folder = tmp_path / "checkpoints" / "7"

    def write(aside: Path) -> None:
        assert not folder.exists() and not any(aside.iterdir())
        (aside / "a").write_bytes(b"abc")
        (aside / "b").write_bytes(b"")

    files.write_folder_atomic(folder, write)
    assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "a", "b"]
    # FIPS 180-2, appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (folder / "SHA256SUMS").read_text().startswith(f"{digest}  a\n")
    assert files.folder_is_intact(folder)
    assert files.fingerprint(folder / "a") == digest[:16]

    def fail(aside: Path) -> None:
        (aside / "a").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_folder_atomic(folder, fail)
    assert files.folder_is_intact(folder) and (folder / "a").read_bytes() == b"abc"
    assert [p.name for p in folder.parent.iterdir()] == ["7"]


def write_letter(letter: str) -> Callable[[Path], object]:
    return lambda aside: (aside / "a").write_text(letter)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "f"
    files.write_folder_atomic(folder, write_letter("x"))
    (folder / "notes").write_text("mine")

    def busy(original: Callable) -> Callable:
        def rename(source: Path, target: Path) -> None:
            if folder in (Path(source), Path(target)):  # as if it were a mount point
                raise OSError(errno.EBUSY, "Device or resource busy", str(source))
            original(source, target)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, busy(getattr(os, name)))
    assert commands.run_command(lambda: files.write_folder_atomic(folder, write_letter("y"))) == 2
    assert capsys.readouterr().err == f"error: {folder}: Device or resource busy\n"
    assert (folder / "a").read_text() == "x" and (folder / "notes").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_folder_comes_back_when_the_new_one_cannot_take_its_place(error, tmp_path, monkeypatch):
    folder, original = tmp_path / "f", os.replace
    files.write_folder_atomic(folder, write_letter("x"))

    def replace(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            raise error
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(type(error)):
        files.write_folder_atomic(folder, write_letter("y"))
    assert files.folder_is_intact(folder) and (folder / "a").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_is_the_old_one_or_the_new_one_wherever_its_writer_is_killed(tmp_path):
    """Killed before each operation on files in turn. What is next is the clearing away that every
    command begins with, or a process of the same number."""
    folder = tmp_path / "f"
    code = (
        "import sys; from data.files import write_folder_atomic; from tests.crash import FileHook; "
        "sys.addaudithook(FileHook({'at': {int(sys.argv[2]): int(sys.argv[3])}})); "
        "write_folder_atomic(sys.argv[1], lambda aside: (aside / 'a').write_text('y'))"
    )
    found = []
    for number in range(1, 30):
        files.write_folder_atomic(folder, write_letter("x"))
        argv = [sys.executable, "-c", code, str(folder), str(number), str(int(signal.SIGKILL))]
        died = subprocess.run(argv, cwd=Path(files.__file__).parents[1]).returncode
        if number % 2:
            for path in tmp_path.glob(".f.*"):
                path.rename(tmp_path / f".f.{os.getpid()}{path.suffix}")
            with pytest.raises(ZeroDivisionError):
                files.write_folder_atomic(folder, lambda aside: 1 / 0)
        else:
            files.remove_leftovers(tmp_path, "f")
        assert files.folder_is_intact(folder), number
        found.append((folder / "a").read_text())
        assert [p.name for p in tmp_path.iterdir()] == ["f"]
        if died == 0:
            break
    # At least: folder, file, sums, two renames; then two files and the folder go.
    assert died == 0 and len(found) > 8
    assert found == sorted(found) and set(found) == {"x", "y"}


DAMAGES = [("a", b"abd"), ("a", b"ab"), ("a", None), ("SHA256SUMS", None), ("SHA256SUMS", b"")]
DAMAGES += [("SHA256SUMS", b"\xff\xfe  a"), ("SHA256SUMS", b"one two three")]


@pytest.mark.parametrize(("name", "content"), DAMAGES)
def test_a_damaged_folder_is_noticed(name, content, tmp_path):
    files.write_folder_atomic(tmp_path / "f", lambda aside: (aside / "a").write_bytes(b"abc"))
    assert files.folder_is_intact(tmp_path / "f")
    (tmp_path / "f" / name).unlink()
    if content is not None:
        (tmp_path / "f" / name).write_bytes(content)
    assert not files.folder_is_intact(tmp_path / "f")


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path):
    kept = ["a.tmp", ".a.tmp", ".hidden", "model.safetensors", ".log.csv.new", "..tmp"]
    for name in [*kept, ".model.safetensors.123.tmp"]:
        (tmp_path / name).write_text("")
    (tmp_path / ".00000004.77.tmp" / "inner").mkdir(parents=True)
    for name in (".gone.77.replaced", ".there.77.replaced", "there", ".empty.77.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "empty").mkdir()
    files.remove_leftovers(tmp_path, "other")
    assert len(list(tmp_path.iterdir())) == len(kept) + 7
    files.remove_leftovers(tmp_path, "*")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "empty", "gone", "there"])
    assert (tmp_path / "gone/.gone.77.replaced").exists() and (tmp_path / "there/there").exists()
    assert (tmp_path / "empty/.empty.77.replaced").exists()
    files.remove_leftovers(tmp_path / "absent", "*")


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


LINE = raising(None).__code__.co_firstlineno + 1


OUT_OF_MEMORY = "error: out of memory; lower --batch_size"
FAILURES = [
    (BadInput("x.jsonl:3: bad\nvery bad"), 2, "error: x.jsonl:3: bad very bad"),
    (ValueError("q has shape"), 2, f"error: q has shape (test_files.py:{LINE})"),
    (FileNotFoundError(2, "No such file", "a/b"), 2, "error: a/b: No such file"),
    (PermissionError(13, "Permission denied", "a/b"), 2, "error: a/b: Permission denied"),
    (
        OSError(28, "No space left on device", "a/b"),
        1,
        "error: a/b: the disk is full; free some space, and repeat the command",
    ),
    (MemoryError(), 1, OUT_OF_MEMORY),
    (RuntimeError("CUDA out of memory. Tried"), 1, OUT_OF_MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, OUT_OF_MEMORY),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("error", "code", "line"), FAILURES)
def test_failures_become_one_line_and_an_exit_code(error, code, line, capsys):
    assert commands.run_command(raising(error)) == code
    assert capsys.readouterr().err == line + "\n"


def test_success_and_bugs_pass_through():
    assert commands.run_command(lambda: None) == 0
    assert commands.run_command(lambda: 7) == 7
    with pytest.raises(RuntimeError, match="a bug"):  # a bug keeps its traceback
        commands.run_command(raising(RuntimeError("a bug")))
    with pytest.raises(SystemExit):  # argparse has printed its own line
        commands.run_command(lambda: sys.exit(2))


# ------------------------------ Planted bugs: each must make the named test fail


def replaced_in_place(path: Path | str, content: str | bytes) -> None:
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def lenient_parser(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON ({error})") from None


def test_planted_bugs_are_caught(tmp_path, monkeypatch):
    caught = (AssertionError, pytest.fail.Exception)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", replaced_in_place)
        with pytest.raises(caught):
            test_at_no_moment_is_a_file_half_written(tmp_path, patch)
    (tmp_path / "x.bin").unlink()
    missed = []
    for number, (line, message) in enumerate(LINES):
        with monkeypatch.context() as patch:
            patch.setattr(files, "parse_json", lenient_parser)
            try:
                test_a_malformed_line_is_named(line, message, tmp_path)
            except (*caught, RecursionError, ValueError):
                missed.append(number)
    assert missed == [5, 6, 7, 9, 10, 11]  # NaN, Infinity, 1e999, twice, twice, depth
    with monkeypatch.context() as patch:
        patch.setattr(files, "check_record", lambda *_: None)
        for kind, change, message in CHANGES:
            with pytest.raises(caught):
                test_a_bad_value_is_named_with_file_line_and_key(kind, change, message, tmp_path)
