"""Object stores: what is read from one, what is refused, and stores that fail."""

import json
import socket
import threading
from pathlib import Path

import chex
import fake_gcs
import fake_s3
import numpy as np
import pytest
import s3fs
import tiny
from helpers import write_rows

import ladder_jax
from ladder_jax import checkpoint, files, inspection, storage
from ladder_jax.addresses import is_address, local_path
from ladder_jax.config import ConfigError, Data
from ladder_jax.data import corpus
from ladder_jax.data.tokenizer import ByteTokenizer, load
from ladder_jax.preparation import prepare

# ---------------------------------------------------------------- paths, addresses


@pytest.mark.parametrize(
    "value, is_one",
    [
        *[("s3://b/x", True), ("gs://b", True), ("GS://b", True), ("hf://a/b", True)],
        *[("file:///x", False), ("/a/b", False), ("a:b", False), ("builtin", False)],
        *[("x/s3://b", False), ("", False)],
    ],
)
def test_what_an_address_is(value, is_one):
    assert is_address(value) == is_one


def test_a_file_address_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for value, path in [
        ("file:///a/b", "/a/b"),
        ("file://localhost/a", "/a"),
        ("~/a", "/home/me/a"),
        ("a/b", "a/b"),
    ]:
        assert str(local_path(value, "field")) == path


def written(folder):
    """What is below a folder: names alone."""
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "field", ["train.work_dir", "data.token_cache", "data.tokenizer"]
)
@pytest.mark.parametrize("address", ["gs://bucket/folder", "s3://bucket/folder"])
def test_a_run_writes_to_no_address(tiny_folder, tmp_path, monkeypatch, field, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        config = tiny.make(tiny_folder, **{field.replace(".", "_"): address})
        prepare(config, False, print)
    text = str(caught.value)
    assert text.startswith(f"{field}={address!r} is not accepted: it must be a ")
    assert "\n" not in text and written(tmp_path) == []


def test_no_output_becomes_a_folder_named_gs(tmp_path, monkeypatch):
    from ladder_jax.cli import run
    from ladder_jax.convert.folder import absolute
    from ladder_jax.serve import offline

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="^file='gs://b/x' is not accepted"):
        files.write_text("gs://b/x", "")
    with pytest.raises(ConfigError, match="^out='gs://b/x' is not accepted"):
        absolute("gs://b/x")
    with pytest.raises(ConfigError, match="^out='gs://b/x' is not accepted"):
        offline.run(None, "prompts.jsonl", "gs://b/x", {})
    with pytest.raises(ConfigError, match="^prompts-file='gs://b/x' is not accepted"):
        offline.run(None, "gs://b/x", "out.jsonl", {})
    assert run(["tokenizer", "builtin", "--out", "gs://b/tokenizer.json"]) == 2
    assert written(tmp_path) == []


# ---------------------------------------------------------------- a store


@pytest.fixture
def server():
    with fake_s3.FakeS3() as own:
        yield own


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """A store that the libraries find, without objects."""
    connect(server.endpoint, monkeypatch, tmp_path)
    return server


def connect(endpoint, monkeypatch, tmp_path):
    for name, value in dict(
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=endpoint,
        AWS_MAX_ATTEMPTS="1",
        AWS_EC2_METADATA_DISABLED="true",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.02))
    s3fs.S3FileSystem.clear_instance_cache()


def put(folder, s3, name):
    """Puts the files of a folder into a store, below bucket/NAME."""
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"bucket/{name}/{path.relative_to(folder)}"
            s3.objects[key] = path.read_bytes()


TEXTS = [f"Document {i} says {'word ' * (i % 7)}." for i in range(40)]


@pytest.fixture
def source(s3, tmp_path):
    """The same documents in a folder and at s3://bucket/text."""
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    write_rows(folder / "a.jsonl", [dict(text=text) for text in TEXTS[:20]])
    write_rows(folder / "deep" / "b.jsonl", [dict(text=text) for text in TEXTS[20:]])
    put(folder, s3, "text")
    return folder


def data(source, tmp_path, name="tokens"):
    return Data(str(source), held_out_fraction=0.2, token_cache=str(tmp_path / name))


def test_a_source_at_an_address_is_the_same_corpus(source, s3, tmp_path, capsys):
    for address, path in [
        ("s3://bucket/text", source),
        ("s3://bucket/text/", source),
        ("s3://bucket/text/*.jsonl", source / "*.jsonl"),
        ("s3://bucket/text/**/*.jsonl", source / "**/*.jsonl"),
        ("s3://bucket/text/a.jsonl", source / "a.jsonl"),
        (f"file://{source}", source),
    ]:
        remote, local = (
            corpus.prepare(data(place, tmp_path, name), ByteTokenizer())
            for place, name in ((address, "remote"), (path, "local"))
        )
        assert remote.digest == local.digest
        assert np.array_equal(remote.train.ids, local.train.ids)
        texts = [list(corpus.documents(data(p, tmp_path))) for p in (address, path)]
        assert texts[0] == texts[1]
    assert "copying 2 files, 0.00 GB, of s3://bucket/text" in capsys.readouterr().out


def test_only_what_changed_is_copied_again(source, s3, tmp_path, capsys):
    def texts():
        return sorted(corpus.documents(data("s3://bucket/text", tmp_path)))

    before = texts()
    assert "copying 2 files" in capsys.readouterr().out
    assert texts() == before and "copying" not in capsys.readouterr().out
    # Of the same size, and with a name that was there before.
    changed = (source / "a.jsonl").read_text().replace("Document", "document")
    s3.objects["bucket/text/a.jsonl"] = changed.encode()
    del s3.objects["bucket/text/deep/b.jsonl"]
    after = texts()
    assert "copying 1 files" in capsys.readouterr().out
    assert after and {text.split()[0] for text in after} == {"document"}


def test_a_folder_without_files_and_a_scheme_without_package(s3, tmp_path):
    with pytest.raises(ConfigError, match="^data.source='s3://bucket/none' is not"):
        corpus.prepare(data("s3://bucket/none", tmp_path), ByteTokenizer())
    with pytest.raises(ConfigError, match=r"storage\]'$"):
        corpus.prepare(data("nostore://bucket/none", tmp_path), ByteTokenizer())


def test_a_copy_that_the_disk_has_no_space_for(source, tmp_path, monkeypatch):
    usage = storage.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="GB to copy, and .* has 0.0 GB free"):
        corpus.prepare(data("s3://bucket/text", tmp_path), ByteTokenizer())


def test_a_checkpoint_at_an_address_is_the_same_model(s3, tmp_path):
    tiny.write_run(tmp_path / "run")
    put(tmp_path / "run", s3, "runs/one")
    expected = ladder_jax.load(tmp_path / "run")
    loaded = ladder_jax.load("s3://bucket/runs/one")
    chex.assert_trees_all_equal(loaded.model, expected.model)
    for address in (
        "s3://bucket/runs/one",
        "s3://bucket/runs/one/checkpoints/",
        "s3://bucket/runs/one/checkpoints/10",
    ):
        assert inspection.inspect(address)["step"] == 10
    where, _ = checkpoint.find("s3://bucket/runs/one", step=2)
    assert where.name == "2" and where.is_relative_to(storage.cache_folder())
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3, only \[2, 10\]"):
        checkpoint.find("s3://bucket/runs/one", step=3)
    with pytest.raises(ConfigError, match="holds no checkpoint: the address of"):
        checkpoint.find("s3://bucket/runs/one/checkpoints/10/model")


@pytest.mark.parametrize("name", ["/d/", "meta/data.json"])
def test_a_damaged_checkpoint_at_an_address_and_the_one_before_it(
    s3, tmp_path, name, caplog
):
    tiny.write_run(tmp_path / "run")
    put(tmp_path / "run", s3, "runs/one")
    ladder_jax.load("s3://bucket/runs/one")
    assert len(list(storage.cache_folder().iterdir())) == 1  # step 10 alone is copied
    for key in [key for key in s3.objects if "/10/" in key and name in key]:
        s3.objects[key] = s3.objects[key][: len(s3.objects[key]) // 2]
    loaded = ladder_jax.load("s3://bucket/runs/one")
    expected = ladder_jax.load(tmp_path / "run", step=2)
    chex.assert_trees_all_equal(loaded.model, expected.model)
    assert "10 is damaged: " in caplog.text and "the one before it" in caplog.text
    with pytest.raises(ValueError, match="10 is damaged: ") as error:
        ladder_jax.load("s3://bucket/runs/one", step=10)
    assert "\n" not in str(error.value)


def test_a_copy_that_lost_bytes_is_copied_again(s3, tmp_path):
    tiny.write_run(tmp_path / "run")
    put(tmp_path / "run", s3, "runs/one")
    where, meta = checkpoint.find("s3://bucket/runs/one")
    (where / "meta" / "data.json").write_text("{")
    assert checkpoint.find("s3://bucket/runs/one") == (where, meta)


def test_a_source_and_a_checkpoint_at_gs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [dict(text=text) for text in TEXTS])
    tiny.write_run(tmp_path / "run")
    with fake_gcs.connected(monkeypatch) as server:
        for place, name in ((folder, "text"), (tmp_path / "run", "runs/one")):
            for path in place.rglob("*"):
                if path.is_file():
                    key = f"bucket/{name}/{path.relative_to(place)}"
                    server.write(key, path.read_bytes())
        texts = list(corpus.documents(data("gs://bucket/text", tmp_path)))
        assert texts == list(corpus.documents(data(folder, tmp_path)))
        loaded = ladder_jax.load("gs://bucket/runs/one")
    expected = ladder_jax.load(tmp_path / "run")
    chex.assert_trees_all_equal(loaded.model, expected.model)


# ---------------------------------------------------------------- stores that fail


class Proxy(threading.Thread):
    """Passes connections to a server; not the first `refused` of them, which it closes,
    or never answers (`paused`).
    """

    def __init__(self, endpoint, refused, paused=False):
        super().__init__(daemon=True)
        host, port = endpoint.removeprefix("http://").split(":")
        self.target, self.refused, self.paused = (host, int(port)), refused, paused
        self.seen, self.kept = 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self):
        while True:
            client, _ = self.listener.accept()
            self.seen += 1
            if self.seen <= self.refused:
                if self.paused:
                    self.kept.append(client)
                else:
                    client.close()
                continue
            server = socket.create_connection(self.target)
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self.copy, args=ends, daemon=True).start()

    @staticmethod
    def copy(source, sink):
        try:
            while block := source.recv(65536):
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.mark.parametrize("paused", [False, True])
def test_a_store_that_fails_for_a_while_is_tried_again(
    source, server, tmp_path, monkeypatch, capsys, paused
):
    # As tries of s3fs itself are within one of ours.
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 1)
    proxy = Proxy(server.endpoint, refused=3, paused=paused)
    connect(proxy.endpoint, monkeypatch, tmp_path)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,) * 50)
    texts = list(corpus.documents(data("s3://bucket/text", tmp_path)))
    assert texts == list(corpus.documents(data(source, tmp_path)))
    assert proxy.seen > 3
    assert "trying again in 0 s" in capsys.readouterr().out


def test_a_store_that_goes_on_failing_ends_in_one_line(source, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    connect(endpoint, monkeypatch, tmp_path)
    with pytest.raises(OSError, match=r"cannot be read: .* \(3 tries\)") as caught:
        corpus.prepare(data("s3://bucket/text", tmp_path), ByteTokenizer())
    assert str(caught.value).startswith("data.source='s3://bucket/text'")
    assert "\n" not in str(caught.value)


def test_a_copy_that_breaks_off_goes_on(source, s3, tmp_path, monkeypatch):
    """What was complete is not copied again, and no file is half there."""
    get_file, failing = s3fs.S3FileSystem._get_file, True

    async def flaky(self, path, local, **options):
        if failing and path.endswith("b.jsonl"):
            Path(local).write_text("half")
            raise ConnectionResetError("gone")
        return await get_file(self, path, local, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", flaky)
    s3fs.S3FileSystem.clear_instance_cache()
    address, lines = "s3://bucket/text", []
    with pytest.raises(OSError, match="gone"):
        storage.fetch_source(address, "data.source", tmp_path / "copy", lines.append)
    assert [path.name for path in (tmp_path / "copy").rglob("*.jsonl")] == ["a.jsonl"]
    failing = False
    lines.clear()
    copied = storage.fetch_source(address, "f", tmp_path / "copy", lines.append)
    assert ["copying 1 files" in line for line in lines] == [True]
    rows = (tmp_path / copied / "deep/b.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"] for row in rows] == TEXTS[20:]


def test_a_tokenizer_is_not_at_an_address():
    with pytest.raises(ConfigError, match="^data.tokenizer='s3://b/x' is not accepted"):
        load("s3://b/x")
