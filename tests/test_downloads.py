"""Downloads against a loopback server that drops, truncates, stalls, and serves wrong bytes."""

import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data.files import BadInput, run_command
from data.real import downloads, prepare, sources
from data.real.downloads import download, fetch
from data.real.sources import RemoteFile, Source
from data.tokenizer import load_tokenizer

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the loopback server does with each request in turn; the last behaviour repeats."""

    url: str = ""
    behaviours: list[str] = field(default_factory=lambda: ["ok"])
    content: bytes = CONTENT
    etag: str | None = '"v1"'
    ranges: list[str | None] = field(default_factory=list)  # Range header of each request


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            state.ranges.append(self.headers["Range"])
            behaviour, _, value = state.behaviours[0].partition(" ")
            if len(state.behaviours) > 1:
                state.behaviours.pop(0)
            if behaviour == "status":
                self.send_error(int(value))
                return
            content, start = state.content, 0
            if behaviour == "html":
                content = b"\xef\xbb\xbf\n<!DOCTYPE html><html>please log in</html>"
            elif behaviour == "login":
                content = b"please log in"
            elif behaviour == "error_page":
                content = b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>"
            elif behaviour == "wrong_byte":
                content = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
            elif behaviour == "truncate":
                content = content[: int(value)]  # and Content-Length says so
            condition = self.headers["If-Range"]
            if (
                self.headers["Range"]
                and behaviour not in ("ignore_range", "login")
                and (condition is None or condition == state.etag)
            ):
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                sent_from = start + 7 if behaviour == "wrong_range" else start
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {sent_from}-{len(content) - 1}/{len(content)}"
                )
            else:
                self.send_response(200)
            if behaviour == "chunked_drop":
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(len(content) - start))
            if state.etag:
                self.send_header("ETag", state.etag)
            if behaviour == "login":
                self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            body = content[start:]
            if behaviour == "chunked_drop":
                body = b"%x\r\n" % len(body) + body[: int(value)]
            elif behaviour in ("drop", "stall", "hang", "ignore_range") and value:
                body = body[: int(value)]
            self.wfile.write(body)
            self.wfile.flush()
            if behaviour in ("stall", "hang"):
                time.sleep(1 if behaviour == "stall" else 5)
            if behaviour == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True

    class QuietServer(http.server.ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:  # a client that hung up is no news
            pass

    httpd = QuietServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{httpd.server_port}/file.bin"
    yield state
    httpd.shutdown()
    httpd.server_close()


def get(server: Server, folder: Path, sha256: str | None = SHA256, **options: float) -> None:
    fetch(
        RemoteFile(server.url, "sub/file.bin", None, sha256),
        folder,
        **{"pause": 0.001, "timeout": 5.0, "attempts": 3, **options},
    )


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


DONE = {"sub/file.bin", "SHA256SUMS"}
HALF = {"sub/file.bin.part", "sub/file.bin.part.version"}


def assert_done(folder: Path, content: bytes = CONTENT) -> None:
    same = (folder / "sub/file.bin").read_bytes() == content
    assert same  # not the comparison: to print how 300,000 bytes differ takes minutes
    assert files_in(folder) == DONE
    digest = hashlib.sha256(content).hexdigest()
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  sub/file.bin\n"


@pytest.mark.parametrize(
    "behaviours, ranges",
    [
        (["ok"], [None]),
        (["drop 100000", "ok"], [None, "bytes=100000-"]),
        (
            [
                "drop 1",
                "drop 2",
                "drop 3",
                "drop 4",
                "ok",
            ],  # 3 attempts a byte: progress counts anew
            [None, "bytes=1-", "bytes=3-", "bytes=6-", "bytes=10-"],
        ),
        (["drop 0", "status 503", "ok"], [None, None, None]),
        (["status 500", "status 502", "ok"], [None, None, None]),
        (["drop 100000", "ignore_range"], [None, "bytes=100000-"]),
        (["drop 100000", "wrong_range", "ok"], [None, "bytes=100000-", None]),
        (["chunked_drop 100000", "ok"], [None, "bytes=100000-"]),
        (["drop 300000", "ok"], [None]),
        (["stall 100000", "ok"], [None, "bytes=100000-"]),
    ],
)
@pytest.mark.parametrize("sha256", [SHA256, None])
def test_broken_connections_are_taken_up_again(server, tmp_path, behaviours, ranges, sha256):
    server.behaviours = list(behaviours)
    get(server, tmp_path, sha256, timeout=0.3)
    assert_done(tmp_path)
    assert server.ranges == ranges


def test_a_server_that_keeps_dropping_is_given_up_and_the_next_run_goes_on(server, tmp_path):
    server.behaviours = ["drop 100000", "status 503"]
    with pytest.raises(BadInput, match="503.* 3 times, with 100,000 bytes received; run again"):
        get(server, tmp_path)
    assert files_in(tmp_path) == HALF and len(server.ranges) == 4
    server.behaviours = ["ok"]
    get(server, tmp_path)
    assert server.ranges[-1] == "bytes=100000-"
    assert_done(tmp_path)


def test_dropping_at_the_same_place_without_ranges_ends(server, tmp_path):
    server.behaviours = ["ignore_range 100000"]
    with pytest.raises(BadInput, match="closed early"):
        get(server, tmp_path)
    assert len(server.ranges) == 4, "one that brought bytes and three that brought no more"


def test_a_part_of_another_version_is_not_joined(server, tmp_path):
    other = bytes(reversed(CONTENT))
    server.behaviours = ["drop 100000", "status 404"]
    with pytest.raises(BadInput, match="404"):
        get(server, tmp_path, sha256=None)
    server.behaviours, server.content, server.etag = ["ok"], other, '"v2"'
    get(server, tmp_path, sha256=None)
    assert server.ranges[-1] == "bytes=100000-", "asked with If-Range, answered in full"
    assert_done(tmp_path, other)


def test_without_validator_and_checksum_nothing_is_resumed(server, tmp_path):
    server.etag = None
    server.behaviours = ["drop 100000", "ok"]
    get(server, tmp_path, sha256=None)
    assert server.ranges == [None, None]
    assert_done(tmp_path)


def test_a_complete_part_needs_no_byte_more(server, tmp_path):
    part = tmp_path / "sub/file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    get(server, tmp_path)
    assert_done(tmp_path)
    part.write_bytes(CONTENT + b"too long")
    (tmp_path / "sub/file.bin").unlink()
    get(server, tmp_path)
    assert_done(tmp_path)


def test_wrong_bytes_are_refused_and_not_kept(server, tmp_path):
    for behaviour in ("wrong_byte", "truncate 299999", "truncate 0"):
        server.behaviours = [behaviour]
        with pytest.raises(BadInput, match="checksum .* nothing was kept: run again"):
            get(server, tmp_path)
        assert files_in(tmp_path) == set()
    for behaviour, words in (
        ("html", "a web page came instead"),
        ("login", "a web page came instead"),
        ("error_page", "an error message came instead"),
    ):
        server.behaviours = [behaviour]
        for sha256 in (SHA256, None):
            with pytest.raises(BadInput, match=words):
                get(server, tmp_path, sha256)
            assert files_in(tmp_path) == set()
    server.behaviours = ["ok"]
    get(server, tmp_path)
    assert_done(tmp_path)


def test_a_web_page_leaves_what_was_received_before(server, tmp_path):
    """A network that asks to log in answers any request with a page and 200."""
    server.behaviours = ["drop 100000", "login", "ok"]
    with pytest.raises(BadInput, match="web page"):
        get(server, tmp_path)
    assert files_in(tmp_path) == HALF
    get(server, tmp_path)
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-"]
    assert_done(tmp_path)


def test_a_killed_download_goes_on(server, tmp_path):
    server.behaviours = ["hang 100000", "ok"]
    code = (
        "from pathlib import Path; from data.real.downloads import fetch; "
        "from data.real.sources import RemoteFile; "
        f"fetch(RemoteFile({server.url!r}, 'sub/file.bin'), Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    part = tmp_path / "sub/file.bin.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 50_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    size = part.stat().st_size
    assert 50_000 < size <= 100_000 and files_in(tmp_path) == HALF
    get(server, tmp_path, sha256=None)
    assert server.ranges == [None, f"bytes={size}-"]
    assert_done(tmp_path)


def zip_of(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tensors_of(content: bytes) -> bytes:
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "wte.weight": {
                "dtype": "U8",
                "shape": [len(content)],
                "data_offsets": [0, len(content)],
            },
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + content


LINES = b"".join(b'{"n": %d}\n' % n for n in range(1000))
FORMS = {
    "a.jsonl.gz": gzip.compress(LINES),
    "a.tgz": gzip.compress(CONTENT[:5000]),
    "a.zip": zip_of(dev=LINES),
    "a.json": json.dumps(list(range(1000))).encode(),
    "lines.json": LINES,
    "a.jsonl": LINES,
    "a.safetensors": tensors_of(CONTENT[:5000]),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_first_download_must_have_its_form(server, tmp_path, name):
    """Cut short by a server that says the short length, with no checksum known: form tells."""
    content = FORMS[name]
    for spoilt in (content[:-5], content[: len(content) // 2 + 3], b"", b"Bad gateway"):
        server.content = spoilt
        with pytest.raises(BadInput, match="cut short or damaged.*nothing was kept") as error:
            fetch(RemoteFile(server.url, name), tmp_path)
        assert "\n" not in str(error.value) and files_in(tmp_path) == set()
    server.content = content
    fetch(RemoteFile(server.url, name), tmp_path)
    assert files_in(tmp_path) == {name, "SHA256SUMS"}


def test_a_wrong_byte_inside_a_compressed_file_is_noticed_without_checksum(server, tmp_path):
    for name in ("a.jsonl.gz", "a.zip"):
        content = bytearray(FORMS[name])
        content[len(content) // 2] ^= 1
        server.content = bytes(content)
        with pytest.raises(BadInput, match="damaged"):
            fetch(RemoteFile(server.url, name), tmp_path)
    assert files_in(tmp_path) == set()


def test_a_wrong_byte_before_the_break_is_noticed(server, tmp_path):
    part = tmp_path / "sub/file.bin.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 100_000)
    with pytest.raises(BadInput, match="checksum"):
        get(server, tmp_path)
    get(server, tmp_path)
    assert_done(tmp_path)


def test_the_first_download_is_recorded_and_later_ones_must_equal_it(server, tmp_path):
    get(server, tmp_path, sha256=None)
    assert_done(tmp_path)
    (tmp_path / "sub/file.bin").unlink()
    server.content, server.etag = CONTENT[::-1], '"v2"'
    with pytest.raises(BadInput, match="recorded at the first download, in SHA256SUMS"):
        get(server, tmp_path, sha256=None)
    assert files_in(tmp_path) == {"SHA256SUMS"}
    server.content = CONTENT
    get(server, tmp_path, sha256=None)
    assert_done(tmp_path)


def test_a_file_that_is_there_is_checked_and_not_fetched(server, tmp_path):
    get(server, tmp_path)
    get(server, tmp_path)
    assert len(server.ranges) == 1
    (tmp_path / "sub/file.bin").write_bytes(b"edited")
    with pytest.raises(BadInput, match=r"sub/file.bin: checksum .* remove it and run again"):
        get(server, tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusals_are_not_retried(server, tmp_path, status):
    server.behaviours = [f"status {status}"]
    with pytest.raises(BadInput, match=f"the server answered {status}.*--from"):
        get(server, tmp_path)
    assert len(server.ranges) == 1 and files_in(tmp_path) == set()


def test_no_network_is_one_clear_line(tmp_path, monkeypatch, capsys):
    def no_dns(*args: object, **keys: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_dns)
    file = RemoteFile("http://data.invalid/file.bin", "file.bin")
    monkeypatch.setitem(sources.SOURCES, "toy", Source((file,), "none", "nothing"))
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path)
    assert run_command(lambda: prepare.main(["--download", "toy"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot reach data.invalid" in error and "--from" in error
    assert not list(tmp_path.rglob("*.bin*"))


def test_a_closed_port_is_given_up(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
    with pytest.raises(BadInput, match="refused.*3 times"):
        fetch(RemoteFile(url, "x"), tmp_path, attempts=3, pause=0.001)


def test_a_full_disk_is_told_before_and_during(server, tmp_path, monkeypatch, capsys):
    part = tmp_path / "toy/sub/file.bin.part"
    part.parent.mkdir(parents=True)
    file = RemoteFile(server.url, "sub/file.bin", None, SHA256)
    monkeypatch.setitem(sources.SOURCES, "toy", Source((file,), "none", "nothing"))
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path)
    part.symlink_to("/dev/full")  # every write fails with ENOSPC
    assert run_command(lambda: prepare.main(["--download", "toy"])) == 1
    assert capsys.readouterr().err == f"error: {part}: the disk is full\n"
    part.unlink()
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    assert run_command(lambda: prepare.main(["--download", "toy"])) == 2
    assert "1,000 bytes free and 300,000 more are to come" in capsys.readouterr().err
    assert not (tmp_path / "toy/sub/file.bin").exists()


def test_members_of_archives_are_unpacked(server, tmp_path):
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("folder/dev.tsv", "from zip")
    with tarfile.open(fileobj=tarred, mode="w:gz") as archive:
        member = tarfile.TarInfo("folder/dev.tsv")
        member.size = 8
        archive.addfile(member, io.BytesIO(b"from tar"))
    for name, content in (("zip", zipped), ("tar", tarred)):
        server.content = content.getvalue()
        for member, ok in (("folder/dev.tsv", True), ("folder/absent.tsv", False)):
            file = RemoteFile(server.url, f"x.{name}", unpack=((member, f"{ok}.tsv"),))
            if ok:
                fetch(file, tmp_path / name)
                assert (tmp_path / name / "True.tsv").read_text() == f"from {name}"
            else:
                with pytest.raises(BadInput, match="absent.tsv"):
                    fetch(file, tmp_path / name)
        assert files_in(tmp_path / name) == {f"x.{name}", "True.tsv", "SHA256SUMS"}


def test_no_path_climbs_out_of_an_archive(server, tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, kind, target in (
            ("../evil.txt", tarfile.REGTYPE, ""),
            ("dev.tsv", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.tsv", tarfile.LNKTYPE, "../evil.txt"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    server.content = stream.getvalue()
    folder = tmp_path / "downloads"
    for member in ("dev.tsv", "hard.tsv"):
        with pytest.raises(BadInput, match="not a plain file"):
            fetch(RemoteFile(server.url, "x.tgz", unpack=((member, "out.tsv"),)), folder)
    server.content = zip_of(**{"../evil.txt": b"evil", "dev.tsv": b"good"})
    fetch(RemoteFile(server.url, "x.zip", unpack=(("dev.tsv", "out.tsv"),)), folder)
    assert files_in(tmp_path) == {
        f"downloads/{name}" for name in ("x.tgz", "x.zip", "out.tsv", "SHA256SUMS")
    }
    for source in sources.SOURCES.values():  # the table's own paths stay inside too
        for file in source.files:
            for path in (file.path, *(path for _, path in file.unpack)):
                assert not Path(path).is_absolute() and ".." not in Path(path).parts


def test_a_disk_that_fills_up_while_unpacking_or_copying(server, tmp_path, monkeypatch, capsys):
    file = RemoteFile(server.url, "x.zip", unpack=(("dev.tsv", "dev.tsv"),))
    monkeypatch.setitem(sources.SOURCES, "toy", Source((file,), "none", "nothing"))
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path / "downloads")
    server.content = zip_of(**{"dev.tsv": LINES})
    copies = ["--from", str(tmp_path / "copies")]
    for command, name in (
        (["--download", "toy"], "dev.tsv.part"),
        (["--download", "toy", *copies], "x.zip.copy"),
    ):
        full = tmp_path / "downloads" / "toy" / name
        full.parent.mkdir(parents=True, exist_ok=True)
        full.symlink_to("/dev/full")
        assert run_command(lambda command=command: prepare.main(command)) == 1
        assert capsys.readouterr().err == f"error: {full}: the disk is full\n"
        assert not full.is_symlink() and not (full.parent / "dev.tsv").exists()
        assert run_command(lambda command=command: prepare.main(command)) == 0, "a rerun goes on"
        assert (full.parent / "dev.tsv").read_bytes() == LINES
        (tmp_path / "copies").mkdir(exist_ok=True)
        (full.parent / "x.zip").rename(tmp_path / "copies" / "x.zip")
        (full.parent / "dev.tsv").unlink()


# --- local copies -------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose server is nowhere: two files, one with a checksum, and an archive."""
    files = (
        RemoteFile("http://data.invalid/a", "base/train.bin", None, SHA256),
        RemoteFile("http://data.invalid/b", "test.jsonl"),
        RemoteFile("http://data.invalid/c", "x.zip", unpack=(("in/dev.tsv", "dev.tsv"),)),
    )
    monkeypatch.setitem(
        sources.SOURCES,
        "toy-set",
        Source(files, "none", "nothing", stand_in=r"toy_sample[^/]*\.jsonl$"),
    )


def put(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


TOY = {"base/train.bin": CONTENT, "test.jsonl": LINES, "x.zip": zip_of(**{"in/dev.tsv": b"a\tb"})}
TAKEN = {"base/train.bin", "test.jsonl", "x.zip", "dev.tsv", "SHA256SUMS"}


@pytest.mark.parametrize(
    "layout",
    [
        lambda path: f"toy-set/{path}",
        lambda path: path,
        lambda path: f"deep/er/toy_set/{path}",
        lambda path: path.replace("/", "_"),
        lambda path: f"sets/toy-set_{path.replace('/', '_')}",
    ],
    ids=["downloads", "as_published", "deeper", "flat", "flat_with_name"],
)
def test_local_copies_are_taken_in_any_layout(tmp_path, toy, layout):
    copies = put(tmp_path / "copies", **{layout(path): content for path, content in TOY.items()})
    put(copies, **{"other/test.jsonl": b'{"not": "of this source"}\n'})
    for _ in range(2):  # the second time all is there
        assert download(["toy-set"], tmp_path / "out", copies) == 0
        assert files_in(tmp_path / "out" / "toy-set") == TAKEN
    for path, content in TOY.items():
        same = (tmp_path / "out" / "toy-set" / path).read_bytes() == content
        assert same, path
    assert (tmp_path / "out" / "toy-set" / "dev.tsv").read_bytes() == b"a\tb"
    assert files_in(copies) == {*map(layout, TOY), "other/test.jsonl"}, "copies are left alone"


def test_what_stands_in_for_published_files(tmp_path, toy, capsys):
    copies = put(
        tmp_path / "copies",
        **{"my/toy_sample_10.jsonl": LINES, "toy-set/dev.tsv": b"x", "pattern.txt": b"y"},
    )
    assert download(["toy-set"], tmp_path / "out", copies, {"toy-set": r"pattern\.txt$"}) == 0
    assert files_in(tmp_path / "out" / "toy-set") == {
        "toy_sample_10.jsonl",
        "dev.tsv",
        "pattern.txt",
        "SHA256SUMS",
    }
    printed = capsys.readouterr().out
    assert "toy_sample_10.jsonl: stands in" in printed
    assert "not there: base/train.bin, test.jsonl\n" in printed, "x.zip's member is there"


def test_bad_copies_are_refused_and_not_kept(tmp_path, toy):
    for files, words in (
        ({"base/train.bin": CONTENT[:-1]}, "train.bin: checksum .*another version, or damaged"),
        ({"toy-set/test.jsonl": LINES[:-3]}, "test.jsonl: line 1000 is not JSON"),
        ({"toy-set/test.jsonl": b"<html>"}, "test.jsonl: a web page"),
        ({"toy-set/x.zip": TOY["x.zip"][:-9]}, "x.zip: damaged zip"),
        ({"unrelated/test.jsonl": LINES}, "holds no file of toy-set, such as toy-set/base"),
    ):
        copies = put(tmp_path / f"copies {words[:9]}{len(files)}{len(words)}", **files)
        with pytest.raises(BadInput, match=words) as error:
            download(["toy-set"], tmp_path / "out", copies)
        assert "\n" not in str(error.value) and files_in(tmp_path / "out") == set()
    with pytest.raises(BadInput, match="no such folder"):
        download(["toy-set"], tmp_path / "out", tmp_path / "absent")


def small_bpe() -> dict[str, bytes]:
    """vocab.bpe and encoder.json of GPT-2's byte alphabet, one merge and the end token."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    entries = [*letters, "ab", "<|endoftext|>"]
    return {
        "vocab.bpe": b"#version: 0.2\na b\n",
        "encoder.json": json.dumps({text: n for n, text in enumerate(entries)}).encode(),
    }


def test_downloaded_weights_are_a_checkpoint(tmp_path, monkeypatch):
    """--download gpt2 brings what --init gpt2 reads: config, weights and a tokenizer.json."""
    bpe = small_bpe()
    monkeypatch.setitem(
        sources.SOURCES,
        "gpt2-bpe",
        Source(
            tuple(RemoteFile(f"http://data.invalid/{name}", name) for name in bpe),
            "MIT",
            "tokenizer",
        ),
    )
    monkeypatch.setitem(
        sources.SOURCES,
        "gpt2",
        Source(
            tuple(
                RemoteFile(f"http://data.invalid/{name}", name)
                for name in ("config.json", "model.safetensors")
            ),
            "MIT",
            "weights",
            needs=("gpt2-bpe",),
        ),
    )
    files = {"gpt2/config.json": b"{}", "gpt2/model.safetensors": FORMS["a.safetensors"]}
    copies = put(tmp_path / "copies", **files, **{f"gpt2-bpe/{n}": c for n, c in bpe.items()})
    assert download(["gpt2"], tmp_path / "out", copies) == 0
    assert files_in(tmp_path / "out" / "gpt2") == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "SHA256SUMS",
    }
    encoding = load_tokenizer(tmp_path / "out" / "gpt2" / "tokenizer.json")
    assert encoding.encode_ordinary("abba") == [256, 65, 64] and encoding.eot_token == 257
    copies = put(tmp_path / "weights alone", **files)
    assert download(["gpt2"], tmp_path / "out", copies) == 0, "the encoding is there already"
    for name in model_names():
        assert sources.SOURCES[name].needs == ("gpt2-bpe",)


def model_names() -> list[str]:
    return ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


def test_real_copies_are_taken(real_data, tmp_path):
    taken = {
        "gpt2-bpe": {"vocab.bpe", "encoder.json"},
        "lambada": {"lambada_test.jsonl"},
        "hh-rlhf": {"harmless-base/test.jsonl.gz", "helpful-base/test.jsonl.gz"},
        "oasst": {"en_100_tree.jsonl"},
        "alpaca": {"alpaca_4000.json"},
        "dolly": {"dolly_hhrlhf_train_small.jsonl"},
        "qa-feedback": {"dev_feedback_400.json"},
        "lottery": {"prompt_lottery_en_250_text.jsonl"},
        "shakespeare": {"tinyshakespeare/input.txt"},
        "wikitext": {"wikitext-2/valid.txt", "wikitext-2/test.txt"},
        "truthfulqa": {"TruthfulQA.csv"},
        "crows-pairs": {"crows_pairs_anonymized.csv"},
        "winogender": {"all_sentences.tsv", "templates.tsv", "occupations-stats.tsv"},
        "realtoxicityprompts": {"toxic_1000.jsonl", "nontoxic_1000.jsonl"},
        "hellaswag": {"hellaswag_val_800.jsonl"},
        "sst2": {"sst2_validation.jsonl"},
        "rte": {"rte_validation.jsonl"},
    }
    patterns = {name: data_set.files for name, data_set in prepare.DATA_SETS.items()}
    assert download(list(taken), tmp_path, real_data, patterns) == 0
    for name, files in taken.items():
        assert files_in(tmp_path / name) == files | {"SHA256SUMS"}, name


# --- the command --------------------------------------------------------------------------------


def test_the_command_fetches_then_finds(server, tmp_path, monkeypatch, capsys):
    server.content = b'"Why is the sky blue?"\n"What is rain?"\n'
    file = RemoteFile(server.url, "prompt_lottery.jsonl")
    monkeypatch.setitem(sources.SOURCES, "lottery", Source((file,), "Apache-2.0", "prompts"))
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path / "downloads")
    assert prepare.main(["--download", "lottery"]) == 0
    assert (
        prepare.main(
            [
                "lottery",
                "--from",
                str(tmp_path / "downloads"),
                "--tokenizer",
                "none",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert "2 prompts: " in capsys.readouterr().out
    with pytest.raises(BadInput, match="unknown source 'nonsense'"):
        download(["lottery", "nonsense"], tmp_path)


def test_the_table_of_sources(capsys):
    assert download(["list"], Path("unused")) == 0
    printed = capsys.readouterr().out
    for name, source in sources.SOURCES.items():
        assert name in printed and source.licence and source.becomes
        paths = [file.path for file in source.files]
        assert len(set(paths)) == len(paths)
        for file in source.files:
            assert file.url.startswith("https://") and not Path(file.path).is_absolute()
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    assert download(["list", "wsc"], Path("unused")) == 0
    printed = capsys.readouterr().out
    for words in (
        "wsc/WSC.zip: 32,751 bytes, SHA-256 2ed6dfa9",
        "https://dl.fbaipublicfiles.com",
        "WSC/val.jsonl is unpacked as val.jsonl",
    ):
        assert words in printed
    with pytest.raises(BadInput, match="unknown source 'x'"):
        download(["list", "x"], Path("unused"))
    # what the paper trains and evaluates on is there
    assert {
        *model_names(),
        "gpt2-bpe",
        "hh-rlhf",
        "summarize",
        "tldr",
        "oasst",
        "dolly",
        "novels",
        "truthfulqa",
        "realtoxicityprompts",
        "winogender",
        "crows-pairs",
        "hellaswag",
        "sst2",
        "rte",
        "wsc",
        "squad2",
        "drop",
        "quac",
        "wmt15-fr-en",
        "cnn-dailymail",
        "lambada",
    } <= set(sources.SOURCES)
    # every data set that can be prepared can be fetched, and is found where it is fetched to
    for name, data_set in prepare.DATA_SETS.items():
        if name != "text":
            for file in sources.SOURCES[name].files:
                held_out = file.path == "tldr_3_filtered/test.jsonl"  # the evaluation's
                found = re.search(data_set.files, f"{name}/{file.path}")
                assert bool(found) != held_out, file.path


def test_known_checksums_are_those_of_the_real_files(real_data):
    known = {file.sha256 for source in sources.SOURCES.values() for file in source.files} - {None}
    found = {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in real_data.rglob("*")
        if path.is_file()
    }
    # 27 novels, 2 of the tokenizer, 2 of hh-rlhf, 2 of wikitext, 3 of winogender, and one each of
    # the lottery, Shakespeare, CrowS-Pairs, LAMBADA and the toxicity labels
    assert len(known & found) == 27 + 2 + 2 + 2 + 3 + 5
