"""Downloads against a loopback server that drops, truncates, stalls, and serves wrong bytes."""

import hashlib
import http.server
import io
import random
import re
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data import downloads, prepare, sources
from data.downloads import download, fetch
from data.files import BadInput, run_command
from data.sources import RemoteFile, Source

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
                content = b"<!DOCTYPE html><html>please log in</html>"
            elif behaviour == "wrong_byte":
                content = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
            elif behaviour == "truncate":
                content = content[:int(value)]  # and Content-Length says so
            condition = self.headers["If-Range"]
            if self.headers["Range"] and behaviour != "ignore_range" and (
                    condition is None or condition == state.etag):
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                sent_from = start + 7 if behaviour == "wrong_range" else start
                self.send_response(206)
                self.send_header("Content-Range",
                                 f"bytes {sent_from}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            if behaviour == "chunked_drop":
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(len(content) - start))
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            body = content[start:]
            if behaviour == "chunked_drop":
                body = b"%x\r\n" % len(body) + body[:int(value)]
            elif behaviour in ("drop", "stall", "ignore_range") and value:
                body = body[:int(value)]
            self.wfile.write(body)
            self.wfile.flush()
            if behaviour == "stall":
                time.sleep(1)
            if behaviour == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                           b"\1\0\0\0\0\0\0\0")
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
    fetch(RemoteFile(server.url, "sub/file.bin", None, sha256), folder,
          **{"pause": 0.001, "timeout": 5.0, "attempts": 3, **options})


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


DONE = {"sub/file.bin", "SHA256SUMS"}
HALF = {"sub/file.bin.part", "sub/file.bin.part.version"}


def assert_done(folder: Path, content: bytes = CONTENT) -> None:
    assert (folder / "sub/file.bin").read_bytes() == content
    assert files_in(folder) == DONE
    digest = hashlib.sha256(content).hexdigest()
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  sub/file.bin\n"


@pytest.mark.parametrize("behaviours, ranges", [
    (["ok"], [None]),
    (["drop 100000", "ok"], [None, "bytes=100000-"]),
    (["drop 1", "drop 2", "drop 3", "drop 4", "ok"],  # 3 attempts a byte: progress counts anew
     [None, "bytes=1-", "bytes=3-", "bytes=6-", "bytes=10-"]),
    (["drop 0", "status 503", "ok"], [None, None, None]),
    (["drop 100000", "ignore_range"], [None, "bytes=100000-"]),
    (["drop 100000", "wrong_range", "ok"], [None, "bytes=100000-", None]),
    (["chunked_drop 100000", "ok"], [None, "bytes=100000-"]),
    (["drop 300000", "ok"], [None]),
    (["stall 100000", "ok"], [None, "bytes=100000-"]),
])
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
    server.behaviours = ["html"]
    for sha256 in (SHA256, None):
        with pytest.raises(BadInput, match="a web page came instead"):
            get(server, tmp_path, sha256)
        assert files_in(tmp_path) == set()
    server.behaviours = ["ok"]
    get(server, tmp_path)
    assert_done(tmp_path)


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


def test_the_command_fetches_then_finds(server, tmp_path, monkeypatch, capsys):
    server.content = b'"Why is the sky blue?"\n"What is rain?"\n'
    file = RemoteFile(server.url, "prompt_lottery.jsonl")
    monkeypatch.setitem(sources.SOURCES, "lottery", Source((file,), "Apache-2.0", "prompts"))
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path / "downloads")
    assert prepare.main(["--download", "lottery"]) == 0
    assert prepare.main(["lottery", "--from", str(tmp_path / "downloads"), "--tokenizer", "none",
                         "--out", str(tmp_path / "out")]) == 0
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
    # every data set that can be prepared can be fetched, and is found where it is fetched to
    for name, data_set in prepare.DATA_SETS.items():
        if name != "text":
            for file in sources.SOURCES[name].files:
                assert re.search(data_set.files, f"{name}/{file.path}"), file.path


def test_known_checksums_are_those_of_the_real_files(real_data):
    known = {file.sha256 for source in sources.SOURCES.values() for file in source.files} - {None}
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in real_data.rglob("*")
             if path.is_file()}
    # 27 novels, 2 of the tokenizer, 2 of hh-rlhf, 2 of wikitext, 3 of winogender, and one each of
    # the lottery, Shakespeare, CrowS-Pairs and LAMBADA
    assert len(known & found) == 27 + 2 + 2 + 2 + 3 + 4
