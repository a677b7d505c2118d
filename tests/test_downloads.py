"""Downloads against a loopback server that breaks off and serves wrong bytes; local copies."""

import hashlib
import http.server
import io
import random
import re
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from data.commands import run_command
from data.files import BadInput
from data.real import download as module
from data.real import prepare
from data.real.download import REMEDY, download, fetch
from data.real.sources import SOURCES, RemoteFile, Source, is_weights

import pooch
import pytest

from tests.raw_sets import files_in, put

CONTENT, LINES = random.Random(0).randbytes(300_000), b'{"n": 1}\n' * 1000
BROKEN = ["drop 200000, drop 30000, ignore_range", "stall 200000, ok", "drop 200000, ok"]
SHA256 = hashlib.sha256(CONTENT).hexdigest()


BODIES = {
    "html": b"\xef\xbb\xbf\n<!DOCTYPE html><html>log in</html>",
    "error_page": b"<?xml version='1.0'?><Error></Error>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "empty": b"",
    "wrong_byte": CONTENT[:1000] + b"?" + CONTENT[1001:],
    "truncate": CONTENT[:-1],  # and Content-Length says so
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Does with each request what the next of its server's behaviours says; the last repeats."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        todo, asked = self.server.behaviours, self.headers["Range"]
        behaviour, _, value = (todo.pop(0) if todo[1:] else todo[0]).partition(" ")
        self.server.ranges.append(asked)
        content = BODIES.get(behaviour, self.server.content)
        start = int(asked[6:-1]) if asked and behaviour != "ignore_range" else 0
        if behaviour == "reason":
            return self.send_error(404, "Gone\x1b[2J")
        if behaviour == "status" or start >= len(content) > 0:
            return self.send_error(int(value or 416))
        self.send_response(206 if start else 200)
        length = {"odd_length": "abc", "long_length": "9" * 5000, "endless": ""}
        self.send_header("Content-Length", length.get(behaviour, str(len(content) - start)))
        self.send_header("Content-Type", "text/html" if behaviour == "login" else "x/y")
        self.end_headers()
        if behaviour == "drip":
            for i in range(start, len(content), 1024):
                self.wfile.write(content[i : i + 1024])
                time.sleep(0.1)
        self.wfile.write(content[start:][: int(value or 1 << 30)])
        time.sleep(1 if behaviour == "stall" else 0)
        for _ in range(50 if behaviour == "endless" else 0):
            self.wfile.write(bytes(1 << 17))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    monkeypatch.setattr(module, "PAUSE", 0.001)
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.handle_error = lambda *args: None  # a client that hung up is no news
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/file.bin"
        httpd.behaviours, httpd.content, httpd.ranges = ["ok"], CONTENT, []
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


def get(server, folder: Path, checked: bool = True) -> None:
    fetch(RemoteFile(server.url, "sub/file.bin", None, SHA256 if checked else None), folder)


def assert_done(folder: Path, *more: str) -> None:
    same = (folder / "sub/file.bin").read_bytes() == CONTENT
    assert same  # not the comparison: to print how 300,000 bytes differ takes minutes
    assert files_in(folder) == {"sub/file.bin", *more}


@pytest.mark.parametrize("behaviours", ["ok", "drop 1, status 503, status 429, ok", *BROKEN])
@pytest.mark.parametrize("checked", [True, False])
def test_broken_connections_are_taken_up_again(server, tmp_path, behaviours, checked):
    server.behaviours = behaviours.split(", ")
    get(server, tmp_path, checked)
    assert_done(tmp_path, *([] if checked else ["sub/file.bin.sha256"]))
    assert len(server.ranges) == len(behaviours.split(", "))
    resumed = [int(text[6:-1]) for text in server.ranges if text]
    assert bool(resumed) == (checked and behaviours in BROKEN), "else versions could be joined"
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
    for part in (b"x" * 100_000, CONTENT + b"too long"):
        with pytest.raises(BadInput, match="hash"):
            get(server, put(tmp_path, {"sub/file.bin.part": part}))
        assert files_in(tmp_path) == set()
    get(server, put(tmp_path, {"sub/file.bin.part": CONTENT}))
    assert_done(tmp_path)


@pytest.mark.parametrize("behaviour", [*BODIES, "login"])
@pytest.mark.parametrize("checked", [True, False])
def test_wrong_bytes_are_refused_and_not_kept(server, tmp_path, behaviour, checked):
    server.behaviours, message = [behaviour], "a web page.* came instead of the file; run again"
    if behaviour in ("wrong_byte", "truncate"):
        checked, message = True, "hash .* expected sha256:.* but got .*; run again"
    with pytest.raises(BadInput, match=message):
        get(server, tmp_path, checked)
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("behaviour", ["odd_length", "long_length"])
def test_a_length_that_is_no_number_is_not_known(server, tmp_path, behaviour):
    server.behaviours = [behaviour]
    get(server, tmp_path)
    assert_done(tmp_path)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("endless", r"over 1,378,576 bytes; expected about 300,000; run again"),
        ("reason", r"answered 404 Gone\\x1b\[2J; run again"),
        ("drip", r"the connection failed \(Timeout\); run again"),
    ],
)
def test_a_hostile_server_is_given_up_with_one_line(
    server, tmp_path, monkeypatch, behaviour, words
):
    monkeypatch.setattr(module, "SLOWEST", 0.05)
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    server.behaviours = [behaviour]
    with pytest.raises(BadInput, match=words) as error:
        fetch(RemoteFile(server.url, "sub/file.bin", len(CONTENT), SHA256), tmp_path)
    assert str(error.value).isprintable()
    assert files_in(tmp_path) == ({"sub/file.bin.part"} if behaviour == "drip" else set())


def test_a_run_that_ends_while_the_checksum_is_computed_loses_nothing(
    server, tmp_path, monkeypatch
):
    def killed(path: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pooch, "file_hash", killed)
        get(server, tmp_path)
    assert files_in(tmp_path) == {"sub/file.bin.part"}
    get(server, tmp_path)
    assert_done(tmp_path)
    assert server.ranges == [None, "bytes=300000-"]


def test_one_download_at_a_time(toy, tmp_path):
    copies = put(tmp_path / "copies", {"train.bin": CONTENT, "test.jsonl": LINES})
    with module.sole(tmp_path / "out/toy"):
        with pytest.raises(BadInput, match="out/toy: another download is at work; wait"):
            download(["toy"], tmp_path / "out", copies)
        assert files_in(tmp_path / "out") == set()
    download(["toy"], tmp_path / "out", copies)


def test_a_damaged_record_of_a_checksum(server, tmp_path):
    """An empty one is none; another is named by the line that says what does not match."""
    put(tmp_path, {"sub/file.bin.sha256": b"zzz\n"})
    with pytest.raises(BadInput, match="sha256:zzz but got .*without .*file.bin.sha256 a new"):
        get(server, tmp_path, checked=False)
    put(tmp_path, {"sub/file.bin.sha256": b"\xff"})
    with pytest.raises(BadInput, match="file.bin.sha256:1: not UTF-8"):
        get(server, tmp_path, checked=False)
    put(tmp_path, {"sub/file.bin.sha256": b"\n"})
    get(server, tmp_path, checked=False)
    assert_done(tmp_path, "sub/file.bin.sha256")
    assert (tmp_path / "sub/file.bin.sha256").read_text() == f"{SHA256}  file.bin\n"


def test_a_file_that_is_there_and_a_checksum_that_was_recorded(server, tmp_path):
    for _ in range(2):
        get(server, tmp_path, checked=False)
        assert_done(tmp_path, "sub/file.bin.sha256")
    record = (tmp_path / "sub/file.bin.sha256").read_text()
    assert record == f"{SHA256}  file.bin\n" and len(server.ranges) == 1
    put(tmp_path, {"sub/file.bin": b"edited"})  # so that it is fetched again
    server.content = CONTENT[::-1]
    with pytest.raises(BadInput, match="hash .*without .*file.bin.sha256 a new version is acc"):
        get(server, tmp_path, checked=False)
    server.content = CONTENT
    get(server, tmp_path, checked=False)
    assert_done(tmp_path, "sub/file.bin.sha256")


def test_the_command_has_one_clear_line(server, tmp_path, monkeypatch, capsys):
    """For a refusal, which will not pass by waiting, no network, and a full disk."""
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path)
    part, closed = tmp_path / "toy/file.bin.part", "http://127.0.0.1:1/file.bin"
    server.behaviours = ["status 404", "ok"]
    for code, url, expected in (
        (2, server.url, f"error: {server.url}: the server answered 404 Not Found; {REMEDY}\n"),
        (2, closed, f"error: {closed}: the connection failed (ConnectionError); {REMEDY}\n"),
        (
            1,
            server.url,
            f"error: {part}: the disk is full; free some space, and repeat the command\n",
        ),
        (0, server.url, ""),
    ):
        file = RemoteFile(url, "file.bin", None, SHA256)
        monkeypatch.setitem(SOURCES, "toy", Source("none", "nothing", [file]))
        if code == 1:
            part.symlink_to("/dev/full")  # every write fails with ENOSPC
        assert run_command(lambda: prepare.main(["--download", "toy"])) == code
        assert capsys.readouterr().err == expected
        part.unlink(missing_ok=True)
    assert files_in(tmp_path) == {"toy/file.bin"}


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_members_of_archives_are_unpacked_and_nothing_climbs_out(server, tmp_path, name):
    good = put(tmp_path / "raw", {"dev.tsv": LINES}) / "dev.tsv"
    (tmp_path / "raw/link").symlink_to("/etc/passwd")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.write(good, "in/dev.tsv")
        zipped.write(good, "../evil.txt")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tarred:
        tarred.add(good.parent, "in")
        tarred.add(good, "../evil.txt")
    server.content, folder = (tmp_path / name).read_bytes(), tmp_path / "deep" / "er"
    fetch(RemoteFile(server.url, name, unpack=(("in/dev.tsv", "dev.tsv"),)), folder)
    assert (folder / "dev.tsv").read_bytes() == LINES
    assert files_in(tmp_path / "deep") == {f"er/{n}" for n in (name, "dev.tsv", f"{name}.sha256")}
    for absent in ("in/absent.tsv", "in/link", "in"):
        with pytest.raises(BadInput, match=f"{name}: {absent}: .*; remove the archive"):
            module.unpack(folder / name, absent, folder / "more.tsv")
    before = files_in(folder)
    (folder / name).write_bytes(server.content[:100])
    with pytest.raises(BadInput, match="remove the archive"):
        module.unpack(folder / name, "in/dev.tsv", folder / "dev.tsv")
    assert files_in(folder) == before and (folder / "dev.tsv").read_bytes() == LINES


def zip_of(content: bytes, flag: int = 0, method: int = 0, mode: int = 0) -> bytes:
    """A zip file with one member, "m"; its headers say what they are told to."""
    info, file = zipfile.ZipInfo("m"), io.BytesIO()
    info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(info, content)
    raw = bytearray(file.getvalue())
    for start, place in ((0, 6), (raw.rfind(b"PK\1\2"), 8)):  # local header, central directory
        raw[start + place] |= flag
        raw[start + place + 2] += method
    return bytes(raw)


def tar_of(kind: bytes, link: str = "") -> bytes:
    info, file = tarfile.TarInfo("m"), io.BytesIO()
    info.type, info.linkname = kind, link
    with tarfile.open(fileobj=file, mode="w:gz") as tarred:
        tarred.addfile(info)
    return file.getvalue()


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (zip_of(b"x", flag=1), "encrypted"),
        (zip_of(b"x", method=90), "compression method"),
        (zip_of(b"/etc/passwd", mode=0o120777), "a regular file"),
        (zip_of(bytes(3_000_000)), "at most 1,350,876 bytes"),
        (tar_of(tarfile.FIFOTYPE), "a regular file"),
        (tar_of(tarfile.CHRTYPE), "a regular file"),
        (tar_of(tarfile.DIRTYPE), "a regular file"),
        (tar_of(tarfile.SYMTYPE, "m"), "a regular file"),
        (tar_of(tarfile.LNKTYPE, "m"), "a regular file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a tar file's bytes hold the time
)
def test_members_that_are_no_files_are_refused_and_no_checksum_is_recorded(
    server, tmp_path, archive, words
):
    """Else the right archive would be refused ever after."""
    file, server.content = RemoteFile(server.url, "a", unpack=(("m", "out"),)), archive
    with pytest.raises(BadInput, match=f"a: m: .*{words}.*; remove the archive") as error:
        fetch(file, tmp_path)
    assert files_in(tmp_path) == {"a"} and "\n" not in str(error.value)
    (tmp_path / "a").unlink()
    server.content = zip_of(b"good")
    fetch(file, tmp_path)
    assert (tmp_path / "out").read_bytes() == b"good"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose server is nowhere: a file with a checksum, and one without."""
    files = [RemoteFile("x", "base/train.bin", None, SHA256), RemoteFile("x", "test.jsonl")]
    monkeypatch.setitem(SOURCES, "toy", Source("none", "nothing", files))


@pytest.mark.parametrize("layout", ["toy/{}", "{}"])
def test_local_copies_are_taken_by_name_and_checksum(tmp_path, toy, layout, capsys):
    files = {layout.format("base/train.bin"): CONTENT, layout.format("test.jsonl"): LINES}
    names = {"base/train.bin", "test.jsonl", "test.jsonl.sha256"}
    for _ in range(2):  # the second time all is there
        download(["toy"], tmp_path / "out", put(tmp_path / "copies", files))
        assert files_in(tmp_path / "out/toy") == names
    elsewhere = {"a/train.bin": b"other", "deep/er/train.bin": CONTENT, "deep/test.jsonl": LINES}
    download(["toy"], tmp_path / "again", put(tmp_path / "elsewhere", elsewhere))
    assert files_in(tmp_path / "again") == {"toy/base/train.bin"}
    assert "not there: test.jsonl\n" in capsys.readouterr().out


def test_bad_copies_are_refused_and_not_kept(tmp_path, toy):
    for name, content, words in (
        ("base/train.bin", CONTENT[:-1], "1/base/train.bin: .*hash"),
        ("toy/test.jsonl", b"<html>", "2/toy/test.jsonl: a web page"),
        ("unrelated/test.jsonl", LINES, "3: holds no file of toy, such as toy/base/train.bin"),
    ):
        with pytest.raises(BadInput, match=words) as error:
            download(["toy"], tmp_path / "out", put(tmp_path / words[0], {name: content}))
        assert "\n" not in str(error.value) and files_in(tmp_path / "out") == set()


def test_downloaded_weights_are_a_checkpoint(tmp_path, monkeypatch):
    """--download gpt2 brings what --init gpt2 reads: config, weights and a tokenizer.json."""
    monkeypatch.setattr(module, "gpt2_encoding", lambda folder: (folder / "vocab.bpe").read_text())
    monkeypatch.setattr(module, "save_tokenizer", lambda text, path: path.write_text(text))
    for name, files in (("gpt2-bpe", {"vocab.bpe"}), ("gpt2", {"config.json", "weights"})):
        copies = put(tmp_path / "copies", {f"{name}/{file}": b"a b" for file in files})
        remote = [RemoteFile("nowhere", file) for file in files]
        monkeypatch.setitem(SOURCES, name, Source("MIT", SOURCES[name].becomes, remote))
    download(["gpt2"], tmp_path / "out", copies)
    (copies / "gpt2-bpe").rename(tmp_path / "away")
    download(["gpt2"], tmp_path / "out", copies)  # the encoding is there already
    assert (tmp_path / "out/gpt2/tokenizer.json").read_text() == "a b"


def test_the_table_of_sources(capsys):
    assert prepare.main(["--download", "list"]) == prepare.main(["--download", "list", "wsc"]) == 0
    printed = capsys.readouterr().out
    assert "wsc/WSC.zip: 32,751 bytes, SHA-256 2ed6dfa9" in printed
    for name, source in SOURCES.items():
        assert name in printed and source.licence and source.becomes and source.files
        for file in source.files:
            for path in (file.path, *(path for _, path in file.unpack)):
                assert not Path(path).is_absolute() and ".." not in Path(path).parts
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
    found = {pooch.file_hash(str(real_data / path)) for path in files_in(real_data)}
    assert len(known & found) == 27 + 2 + 2 + 2 + 3 + 5  # novels, four sets, five of one file
    download(["novels", "gpt2-bpe", "wikitext", "winogender", "lambada"], tmp_path, real_data)
    assert len(files_in(tmp_path)) == 27 + 2 + 2 + 3 + 1
