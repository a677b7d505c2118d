"""Downloads against a loopback server that breaks off and serves wrong bytes; local copies."""

import hashlib
import http.server
import io
import json
import os
import random
import re
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.files import BadInput, run_command
from data.real import download as module
from data.real import prepare
from data.real.download import download, fetch
from data.real.sources import SOURCES, RemoteFile, Source, is_weights, print_sources
from data.tokenizer import load_tokenizer

CONTENT = random.Random(0).randbytes(300_000)
LINES = b"".join(b'{"n": %d}\n' % n for n in range(1000))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Does with each request what the next of `behaviours` says; the last one repeats."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/file.bin"
        self.behaviours, self.content, self.ranges = ["ok"], CONTENT, []

    def handle_error(self, *args: object) -> None:  # a client that hung up is no news
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        behaviours, content, asked = self.server.behaviours, self.server.content, "Range"
        behaviour, _, value = (behaviours.pop(0) if behaviours[1:] else behaviours[0]).partition(
            " "
        )
        self.server.ranges.append(self.headers[asked])
        content = {
            "html": b"\xef\xbb\xbf\n<!DOCTYPE html><html>log in</html>",
            "error_page": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "empty": b"",
            "wrong_byte": content[:1000] + b"?" + content[1001:],
            "truncate": content[:-1],  # and Content-Length says so
        }.get(behaviour, content)
        start = 0
        if behaviour == "status":
            return self.send_error(int(value))
        if self.headers[asked] and behaviour != "ignore_range":
            start = int(self.headers[asked].removeprefix("bytes=").removesuffix("-"))
        if start >= len(content) > 0:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if behaviour == "login":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(content[start:][: int(value) if behaviour in ("drop", "stall") else None])
        self.wfile.flush()
        time.sleep(1 if behaviour == "stall" else 0)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE", 0.001)
    with Server() as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


def get(server: Server, folder: Path, checked: bool = True) -> None:
    fetch(
        RemoteFile(server.url, "sub/file.bin", None, sha256(CONTENT) if checked else None), folder
    )


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_done(folder: Path, *more: str) -> None:
    same = (folder / "sub/file.bin").read_bytes() == CONTENT
    assert same  # not the comparison: to print how 300,000 bytes differ takes minutes
    assert files_in(folder) == {"sub/file.bin", *more}


@pytest.mark.parametrize(
    "behaviours",
    [
        ["ok"],
        ["drop 200000", "ok"],
        ["drop 0", "status 503", "status 429", "ok"],
        ["drop 200000", "drop 30000", "ignore_range"],
        ["stall 200000", "ok"],
    ],
)
@pytest.mark.parametrize("checked", [True, False])
def test_broken_connections_are_taken_up_again(server, tmp_path, monkeypatch, behaviours, checked):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    server.behaviours = list(behaviours)
    get(server, tmp_path, checked)
    assert_done(tmp_path, *([] if checked else ["sub/file.bin.sha256"]))
    assert len(server.ranges) == len(behaviours)
    resumed = [int(re.sub(r"\D", "", text)) for text in server.ranges if text]
    assert bool(resumed) == (checked and "200000" in behaviours[0]), "else nothing tells versions"
    assert all(100_000 < start < 300_000 for start in resumed)


def test_a_server_that_keeps_dropping_is_given_up_and_the_next_run_goes_on(server, tmp_path):
    server.behaviours = ["drop 200000", "status 503"]
    with pytest.raises(BadInput, match="answered 503 Service Unavailable; run again"):
        get(server, tmp_path)
    assert files_in(tmp_path) == {"sub/file.bin.part"} and len(server.ranges) == module.ATTEMPTS
    server.behaviours = ["login", "ok"]  # a network that asks to log in leaves the part
    with pytest.raises(BadInput, match="a web page came instead"):
        get(server, tmp_path)
    get(server, tmp_path)
    assert all(server.ranges[1:])
    assert_done(tmp_path)


def test_a_part_that_is_complete_or_wrong(server, tmp_path):
    part = tmp_path / "sub/file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    get(server, tmp_path)
    assert_done(tmp_path)
    for wrong in (b"x" * 100_000, CONTENT + b"too long"):
        (tmp_path / "sub/file.bin").unlink()
        part.write_bytes(wrong)
        with pytest.raises(BadInput, match="hash"):
            get(server, tmp_path)
        assert files_in(tmp_path) == set()
        get(server, tmp_path)
        assert_done(tmp_path)


@pytest.mark.parametrize("checked", [True, False])
def test_wrong_bytes_are_refused_and_not_kept(server, tmp_path, checked):
    for behaviour in ("wrong_byte", "truncate"):
        server.behaviours = [behaviour]
        with pytest.raises(BadInput, match="hash .* expected sha256:.* but got .*; run again"):
            get(server, tmp_path, checked=True)
        assert files_in(tmp_path) == set()
    for behaviour in ("html", "login", "error_page", "pointer", "empty"):
        server.behaviours = [behaviour]
        with pytest.raises(BadInput, match=r"a web page.* came instead of the file; run again"):
            get(server, tmp_path, checked)
        assert files_in(tmp_path) == set()


def test_the_first_checksum_is_recorded_and_later_ones_must_equal_it(server, tmp_path):
    get(server, tmp_path, checked=False)
    record = (tmp_path / "sub/file.bin.sha256").read_text()
    assert record == f"{sha256(CONTENT)}  file.bin\n"
    (tmp_path / "sub/file.bin").unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(BadInput, match="hash"):
        get(server, tmp_path, checked=False)
    assert files_in(tmp_path) == {"sub/file.bin.sha256"}


def test_a_file_that_is_there_is_checked_and_fetched_only_if_it_was_changed(server, tmp_path):
    get(server, tmp_path)
    get(server, tmp_path)
    assert len(server.ranges) == 1
    (tmp_path / "sub/file.bin").write_bytes(b"edited")
    get(server, tmp_path)
    assert_done(tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusals_are_not_retried(server, tmp_path, status):
    server.behaviours = [f"status {status}"]
    with pytest.raises(BadInput, match=f"the server answered {status}.*--from"):
        get(server, tmp_path)
    assert len(server.ranges) == 1 and files_in(tmp_path) == set()


def test_no_network_and_a_full_disk_are_one_clear_line(server, tmp_path, monkeypatch, capsys):
    def command(url: str) -> str:
        file = RemoteFile(url, "file.bin", None, sha256(CONTENT))
        monkeypatch.setitem(SOURCES, "toy", Source("none", "nothing", [file]))
        monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path)
        code = run_command(lambda: prepare.main(["--download", "toy"]))
        return f"{code} {capsys.readouterr().err}"

    closed = "http://127.0.0.1:1/file.bin"
    problem = f"{closed}: the connection failed (ConnectionError)"
    assert command(closed) == f"2 error: {problem}; {module.REMEDY}\n"
    part = tmp_path / "toy/file.bin.part"
    part.symlink_to("/dev/full")  # every write fails with ENOSPC
    assert command(server.url) == f"1 error: {part}: the disk is full\n"


def zip_of(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tar_of(*members: tuple[str, bytes, str]) -> bytes:
    """A tar file; a member that has a target is a link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content, target in members:
            member = tarfile.TarInfo(name)
            member.size, member.linkname = len(content), target
            member.type = tarfile.SYMTYPE if target else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def test_members_of_archives_are_unpacked_and_nothing_climbs_out(server, tmp_path):
    folder, evil = tmp_path / "downloads", "../evil.txt"
    zipped = zip_of(**{"in/dev.tsv": LINES, evil: b"evil"})
    tarred = tar_of(("in/dev.tsv", LINES, ""), (evil, b"evil", ""), ("in/x", b"", "/etc/passwd"))
    for name, content in (("a.zip", zipped), ("a.tgz", tarred)):
        server.content = content
        fetch(RemoteFile(server.url, name, unpack=(("in/dev.tsv", f"{name}.tsv"),)), folder)
        assert (folder / f"{name}.tsv").read_bytes() == LINES
        for absent in ("in/absent.tsv", "in/x"):
            with pytest.raises(BadInput, match=f"{name}: {absent}: .*; remove the archive"):
                fetch(RemoteFile(server.url, name, unpack=((absent, "x"),)), folder)
    names = {
        f"downloads/{name}{end}" for name in ("a.zip", "a.tgz") for end in ("", ".tsv", ".sha256")
    }
    assert files_in(tmp_path) == names
    paths = [file.path for source in SOURCES.values() for file in source.files]
    paths += [path for s in SOURCES.values() for f in s.files for _, path in f.unpack]
    assert not any(Path(path).is_absolute() or ".." in Path(path).parts for path in paths)
    (folder / "a.zip").write_bytes(zipped[:-9])
    with pytest.raises(BadInput, match="remove the archive"):
        module.unpack(folder / "a.zip", "in/dev.tsv")


# --- local copies -------------------------------------------------------------------------------

TOY = {"base/train.bin": CONTENT, "test.jsonl": LINES, "x.zip": zip_of(**{"in/dev.tsv": b"a\tb"})}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose server is nowhere: two files, one with a checksum, and an archive."""
    url = "http://data.invalid/"
    files = [
        RemoteFile(url, "base/train.bin", None, sha256(CONTENT)),
        RemoteFile(url, "test.jsonl"),
        RemoteFile(url, "x.zip", None, sha256(TOY["x.zip"]), (("in/dev.tsv", "dev.tsv"),)),
    ]
    monkeypatch.setitem(SOURCES, "toy", Source("none", "nothing", files))


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("layout", ["toy/{}", "{}"])
def test_local_copies_are_taken_by_name_and_checksum(tmp_path, toy, layout, capsys):
    files = {layout.format(path): content for path, content in TOY.items()}
    copies, out = put(tmp_path / "copies", files), tmp_path / "out"
    for _ in range(2):  # the second time all is there
        download(["toy"], out, copies)
        names = {*TOY, "dev.tsv", "test.jsonl.sha256"}
        assert files_in(out) == {f"toy/{name}" for name in names}
    assert (out / "toy/dev.tsv").read_bytes() == b"a\tb" and files_in(copies) == {*files}
    elsewhere = {"a/train.bin": b"other", "deep/er/train.bin": CONTENT, "deep/test.jsonl": LINES}
    download(["toy"], tmp_path / "again", put(tmp_path / "elsewhere", elsewhere))
    assert files_in(tmp_path / "again") == {"toy/base/train.bin"}
    assert "not there: test.jsonl, x.zip\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"base/train.bin": CONTENT[:-1]}, "copies/base/train.bin: .*hash"),
        ({"toy/test.jsonl": b"<html>"}, "copies/toy/test.jsonl: a web page"),
        ({"unrelated/test.jsonl": LINES}, "holds no file of toy, such as toy/base/train.bin"),
    ],
)
def test_bad_copies_are_refused_and_not_kept(tmp_path, toy, files, words):
    with pytest.raises(BadInput, match=words) as error:
        download(["toy"], tmp_path / "out", put(tmp_path / "copies", files))
    assert "\n" not in str(error.value) and files_in(tmp_path / "out") == set()


def test_downloaded_weights_are_a_checkpoint(tmp_path, monkeypatch):
    """--download gpt2 brings what --init gpt2 reads: config, weights and a tokenizer.json."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    ids = {text: n for n, text in enumerate([*letters, "ab", "<|endoftext|>"])}
    bpe = {"vocab.bpe": b"#version: 0.2\na b\n", "encoder.json": json.dumps(ids).encode()}
    weights = {"config.json": b"{}", "model.safetensors": b"1234"}
    copies = tmp_path / "copies"
    for name, files in (("gpt2-bpe", bpe), ("gpt2", weights)):
        put(copies / name, files)
        remote = [RemoteFile("http://data.invalid/", file) for file in files]
        monkeypatch.setitem(SOURCES, name, Source("MIT", SOURCES[name].becomes, remote))
    download(["gpt2"], tmp_path / "out", copies)
    assert {*weights, "tokenizer.json"} < files_in(tmp_path / "out/gpt2")
    encoding = load_tokenizer(tmp_path / "out/gpt2/tokenizer.json")
    assert encoding.encode_ordinary("abba") == [256, 65, 64] and encoding.eot_token == 257
    os.rename(copies / "gpt2-bpe", tmp_path / "away")
    download(["gpt2"], tmp_path / "out", copies)  # the encoding is there already


# --- the command and the table ------------------------------------------------------------------


def test_the_command_fetches_then_finds(server, tmp_path, monkeypatch, capsys):
    server.content = b'"Why is the sky blue?"\n"What is rain?"\n'
    source = Source("Apache-2.0", "prompts", [RemoteFile(server.url, "prompt_lottery.jsonl")])
    monkeypatch.setitem(SOURCES, "lottery", source)
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path / "downloads")
    assert prepare.main(["--download", "lottery"]) == 0
    assert prepare.main(["lottery", "--tokenizer", "none", "--out", str(tmp_path / "out")]) == 0
    assert "2 prompts: " in capsys.readouterr().out
    assert prepare.main(["--download", "list", "wsc"]) == 0
    printed = capsys.readouterr().out
    assert "wsc/WSC.zip: 32,751 bytes, SHA-256 2ed6dfa9" in printed
    assert "https://dl.fbaipublicfiles.com" in printed and "unpacked as val.jsonl" in printed


def test_the_table_of_sources(capsys):
    print_sources()
    printed = capsys.readouterr().out
    for name, source in SOURCES.items():
        assert name in printed and source.licence and source.becomes and source.files
        assert len({file.path for file in source.files}) == len(source.files)
        for file in source.files:
            assert re.fullmatch(r"https://[^{}\s]+/" + re.escape(file.path), file.url)
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    assert [n for n in SOURCES if is_weights(n)] == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    # every data set that can be prepared can be fetched, and is found where it is fetched to
    for name, (_, pattern) in prepare.DATA_SETS.items():
        for file in SOURCES[name].files if name != "text" else ():
            held_out = file.path == "tldr_3_filtered/test.jsonl"  # the evaluation's
            assert bool(re.search(pattern, f"{name}/{file.path}")) != held_out, file.path


def test_known_checksums_are_those_of_the_real_files(real_data, tmp_path):
    known = {file.sha256 for source in SOURCES.values() for file in source.files} - {None}
    found = {sha256(path.read_bytes()) for path in real_data.rglob("*") if path.is_file()}
    # 27 novels, 2 of the tokenizer, 2 of hh-rlhf, 2 of wikitext, 3 of winogender, and one each of
    # the lottery, Shakespeare, CrowS-Pairs, LAMBADA and the toxicity labels
    assert len(known & found) == 27 + 2 + 2 + 2 + 3 + 5
    download(["novels", "gpt2-bpe", "wikitext", "winogender", "lambada"], tmp_path, real_data)
    assert len(files_in(tmp_path)) == 27 + 2 + 2 + 3 + 1
