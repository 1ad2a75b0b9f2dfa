"""A run whose train.out is in an object store: what it writes, and goes on from."""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import threading
import time

import fake_gcs
import fake_s3
import pytest
import s3fs
import tiny
from helpers import (
    COMMAND,
    code_environment,
    free_address,
    run_together,
    write_files,
)
from train_runs import assert_golden, assert_same_run, at_step

import ladder_jax
from ladder_jax import checkpoint, mirror, run_folder, storage, training
from ladder_jax.config import ConfigError, Train

ADDRESS = "s3://bucket/runs/one"
INSIDE = "bucket/runs/one/"


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """A store that s3fs finds."""
    values = dict(
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_MAX_ATTEMPTS="1",
        AWS_EC2_METADATA_DISABLED="true",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    with fake_s3.FakeS3() as server:
        for name, value in (values | dict(AWS_ENDPOINT_URL=server.endpoint)).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.02))
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        monkeypatch.setattr(mirror, "INTERVAL_S", 0.05)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server


# Its files, and their sizes: what stands for a checkpoint here.
CHECKPOINT = {
    "model/d/a": 3,
    "model/b": 1,
    "meta/data.json": 1,
    "meta/commit_success.txt": 1,
}


def options(folder, **fields):
    return Train(out=ADDRESS, work_dir=str(folder), **fields)


def in_store(s3):
    """The files at ADDRESS."""
    names = (name for name in s3.objects if name.startswith(INSIDE))
    return {name.removeprefix(INSIDE): s3.objects[name] for name in names}


def on_disk(folder):
    """The files of a run's folder that belong in the store."""
    names = mirror._files(folder)
    return {name: (folder / name).read_bytes() for name in names}


def cut_in_half(s3, step, name):
    """Damages the objects of a checkpoint that have `name` in theirs."""
    for key in [key for key in s3.objects if f"/{step}/" in key and name in key]:
        s3.objects[key] = s3.objects[key][: len(s3.objects[key]) // 2]


def write_step(folder, step, text="x"):
    """It appears at once, as Orbax's does."""
    part = folder / "checkpoints" / f".{step}.part"
    for name, content in CHECKPOINT.items():
        path = part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text * content)
    part.rename(part.with_name(str(step)))


def wait_until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def begun(s3, tmp_path, monkeypatch):
    """Returns a function that starts the copy of an empty run, or of its folder."""
    said, open_ones = [], []
    # What stands for a checkpoint is not damaged.
    monkeypatch.setattr(checkpoint, "has_meta", lambda _: True)

    def begin(folder="here", resume=False, **fields):
        of_run = mirror.of_run(options(tmp_path / folder, **fields), True)
        copy = of_run.__enter__()
        copy.folder.mkdir(parents=True, exist_ok=True)
        copy.begin(resume, said.append)
        open_ones.append(copy)
        copy.said = said
        copy.of_run, copy.close = of_run, lambda: of_run.__exit__(None, None, None)
        return copy

    yield begin
    for copy in open_ones:
        copy._ended.set()
        copy._thread.join()
        copy._thread = None  # the generator of `of_run` ends, and copies nothing
        with contextlib.suppress(StopIteration, OSError):
            copy.of_run.__exit__(None, None, None)


# ---------------------------------------------------------------- whole runs


def test_a_run_in_a_store_is_the_run_on_disk(
    s3, whole, tiny_folder, tmp_path, fast_compiler
):
    """It stops on one machine, goes on on another, and again on the first."""
    out = dict(train_out=ADDRESS, train_work_dir=str(tmp_path / "a"))
    config = tiny.make(tiny_folder, **out)
    with at_step(6, lambda _: signal.raise_signal(signal.SIGTERM)):
        summary = training.train(config)
    assert summary["stopped"] == "SIGTERM" and summary["step"] == 7
    assert 7 in mirror._steps(in_store(s3)) and "lease.json" not in in_store(s3)
    with pytest.raises(ConfigError, match="already holds a run, at step 7: continue"):
        training.train(config)

    there = tiny.make(tiny_folder, **out | dict(train_work_dir=str(tmp_path / "b")))
    with at_step(3, lambda _: signal.raise_signal(signal.SIGTERM)):
        assert training.train(there, resume=True)["step"] == 11
    summary = training.train(config, resume=True)
    folder = mirror.work_folder(config.train)
    assert summary["step"] == 20 and summary["out"] == ADDRESS
    assert_golden(folder, range(1, 21))
    assert_same_run(folder, whole)
    stored, own = in_store(s3), on_disk(folder)
    assert own.items() <= stored.items()
    assert checkpoint.read_meta(folder)["config"]["train"]["out"] == ADDRESS
    loaded = ladder_jax.load(ADDRESS)
    assert loaded.config == ladder_jax.load(folder).config


@pytest.mark.parametrize("name", ["/d/", "meta/data.json", "_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_in_a_store_and_the_one_before_it(
    s3, whole, tiny_folder, tmp_path, fast_compiler, name, caplog
):
    """On another machine, as a run on disk: test_damaged_checkpoint.py."""
    out = dict(train_out=ADDRESS, train_work_dir=str(tmp_path / "a"))
    with at_step(6, lambda _: signal.raise_signal(signal.SIGTERM)):
        training.train(tiny.make(tiny_folder, **out))
    *_, older, newest = sorted(mirror._steps(in_store(s3)))
    cut_in_half(s3, newest, name)
    caplog.clear()
    config = tiny.make(tiny_folder, **out | dict(train_work_dir=str(tmp_path / "b")))
    assert training.train(config, resume=True)["step"] == 20
    folder = mirror.work_folder(config.train)
    lines = (folder / "run.json").read_text()
    assert f'"step": {older}' in lines, lines
    assert f"/{newest} is damaged: " in caplog.text
    assert "; taking the one before it" in caplog.text
    assert_golden(folder, range(1, 21))
    assert_same_run(folder, whole)


def test_two_processes_have_one_copy(s3, tmp_path):
    """Process 0 copies; on another machine both go on with what it copied: the newest
    checkpoint, and the one before it where that is damaged."""
    tiny.write_corpus(tmp_path / "corpus")
    path = tiny.recipe(tmp_path, train_out=ADDRESS, train_steps=4)

    def train(work, steps, *words):
        common = [*COMMAND, "train", path, "--train.work-dir", tmp_path / work]
        common += ["--train.steps", steps, "--devices", 4, "--distributed"]
        common += ["--coordinator", free_address(), "--processes", 2, *words]
        commands = [[*common, "--process", i] for i in range(2)]
        ended = run_together(commands, code_environment())
        assert [status for *_, status in ended] == [0, 0], ended
        return [out for out, *_ in ended]

    train("a", 4)
    assert mirror._steps(in_store(s3)) == {3, 4} and "lease.json" not in in_store(s3)
    first, second = train("b", 6, "--resume")
    assert f"files of {ADDRESS}, at step 4" in first and "resumed at step 4" in first
    assert ADDRESS not in second and f"files of {ADDRESS}, at step 3" not in first
    assert 6 in mirror._steps(in_store(s3))
    cut_in_half(s3, max(mirror._steps(in_store(s3))), "/d/")
    first, _ = train("c", 7, "--resume")
    assert f"files of {ADDRESS}, at step 4" in first and "resumed at step 4" in first


def test_no_other_process_copies(s3, tmp_path):
    for case, leads in ((options(tmp_path), False), (Train(out=str(tmp_path)), True)):
        with mirror.of_run(case, leads) as copy:
            assert copy is None
    assert mirror.work_folder(Train(out="a/b")).as_posix() == "a/b"
    one, other = options(tmp_path), options(tmp_path, steps=3)
    assert mirror.work_folder(one) == mirror.work_folder(other)
    slash = dataclasses.replace(one, out=ADDRESS + "/")
    assert mirror.work_folder(slash) == mirror.work_folder(one)


# ---------------------------------------------------------------- what is copied


def test_a_checkpoint_is_seen_once_it_is_whole(s3, begun, monkeypatch):
    """Its meta comes last and goes first; files that did not change are not sent."""
    puts, states = [], []
    put, delete = fake_s3._Handler.do_PUT, fake_s3._Handler.do_DELETE

    def watched_put(self):
        puts.append(self.name.removeprefix(INSIDE))
        put(self)
        states.append(sorted(in_store(s3)))

    def watched_delete(self):
        delete(self)
        states.append(sorted(in_store(s3)))

    monkeypatch.setattr(fake_s3._Handler, "do_PUT", watched_put)
    monkeypatch.setattr(fake_s3._Handler, "do_DELETE", watched_delete)
    copy = begun(keep_checkpoints=1)
    write_step(copy.folder, 2)
    write_files(copy.folder, {"metrics.jsonl": "1\n", ".hidden": "", "lease.json": ""})
    wait_until(lambda: "metrics.jsonl" in in_store(s3))
    write_step(copy.folder, 4, "y")
    for path in sorted((copy.folder / "checkpoints/2").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (copy.folder / "checkpoints/2").rmdir()
    with (copy.folder / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    copy.close()
    assert in_store(s3) == on_disk(copy.folder)
    sent = [name for name in puts if name != "lease.json"]
    assert len(sent) == 2 * len(CHECKPOINT) + 2 and sent.count("metrics.jsonl") == 2
    for state in states:
        for step in (2, 4):
            start = f"checkpoints/{step}/"
            names = {n.removeprefix(start) for n in state if n.startswith(start)}
            assert "meta/data.json" not in names or names == set(CHECKPOINT)


def test_a_checkpoint_that_vanishes_while_it_is_copied(s3, begun, monkeypatch):
    """Orbax removes an old one at any moment: the store never shows a part of it."""
    put = s3fs.S3FileSystem._put_file

    async def remove_first(self, path, target, **more):
        place = copy.folder / "checkpoints/2"
        if path.endswith("model/d/a") and place.exists():
            os.rename(place, copy.folder / "removed.orbax-x")
        return await put(self, path, target, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", remove_first)
    copy = begun(keep_checkpoints=1)
    write_step(copy.folder, 2)
    wait_until(lambda: not (copy.folder / "checkpoints/2").exists())
    write_step(copy.folder, 3)
    wait_until(lambda: mirror._steps(in_store(s3)))
    assert mirror._steps(in_store(s3)) == {3}


def test_the_store_keeps_as_many_checkpoints_as_the_run(s3, begun):
    """Also those of another machine, which this folder never had."""
    first = begun("a", keep_checkpoints=2)
    for step in (1, 2):
        write_step(first.folder, step)
    write_files(first.folder, {"metrics.jsonl": "1\n"})
    first.close()
    second = begun("b", resume=True, keep_checkpoints=2)
    assert mirror._steps(on_disk(second.folder)) == {2}
    assert (second.folder / "metrics.jsonl").read_text() == "1\n"
    write_step(second.folder, 3)
    second.close()
    assert mirror._steps(in_store(s3)) == {2, 3}
    assert not any(name.startswith("checkpoints/1/") for name in in_store(s3))
    # The first machine has 1 and 2, and takes 3 from the store.
    third = begun("a", resume=True, keep_checkpoints=2)
    assert mirror._steps(on_disk(third.folder)) == {1, 2, 3}
    third.close()
    assert {2, 3} <= mirror._steps(in_store(s3))


def test_a_killed_process_copied_not_all(s3, begun):
    """The same machine goes on with its own folder, and the store gets the rest."""
    copy = begun()
    write_step(copy.folder, 1)
    wait_until(lambda: mirror._steps(in_store(s3)) == {1})
    copy._ended.set()  # as if it were gone, its lease not given back
    copy._thread.join()
    write_step(copy.folder, 2)
    lease = json.loads(in_store(s3)["lease.json"]) | dict(pid=2**22 + 1)
    s3.objects[INSIDE + "lease.json"] = json.dumps(lease).encode()
    after = begun(resume=True)
    assert not [line for line in after.said if line.startswith("copying")]
    after.close()
    assert in_store(s3) == on_disk(copy.folder)


# ---------------------------------------------------------------- one job at a time


def holder(s3, **fields):
    """Puts the lease of another job into the store."""
    own = run_folder.own_process() | dict(beat=1) | fields
    s3.objects[INSIDE + "lease.json"] = json.dumps(own).encode()


def test_another_process_of_this_machine_holds_the_address(s3, begun):
    holder(s3)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* writes there"):
        begun()
    assert list(in_store(s3)) == ["lease.json"]


def test_another_machine_holds_the_address_while_its_number_grows(
    s3, begun, monkeypatch
):
    monkeypatch.setattr(mirror, "STALE_S", 0.6)
    other = dict(machine="another", host="elsewhere", pid=7)
    holder(s3, **other)
    ended = threading.Event()

    def grow():
        for beat in itertools.count():
            if ended.wait(0.1):
                return
            holder(s3, **other, beat=beat)

    thread = threading.Thread(target=grow)
    thread.start()
    with pytest.raises(ConfigError, match="process 7 on elsewhere writes there"):
        begun()
    ended.set()
    thread.join()
    holder(s3, **other)  # which does not grow any more
    copy = begun()
    copy.check()
    assert json.loads(in_store(s3)["lease.json"])["pid"] == os.getpid()


def test_a_job_whose_lease_was_taken_stops(s3, begun):
    copy = begun()
    write_step(copy.folder, 1)
    wait_until(lambda: mirror._steps(in_store(s3)) == {1})
    holder(s3, host="elsewhere", pid=7)
    wait_until(lambda: copy._lease.lost)
    write_step(copy.folder, 2)
    for act in (copy.check, copy.close):
        with pytest.raises(OSError, match="is now written to by process 7 on elsewh"):
            act()
    assert mirror._steps(in_store(s3)) == {1}


def test_a_lease_that_was_taken_since_the_last_renewal(s3, begun, monkeypatch):
    """The last copy looks once more."""
    monkeypatch.setattr(mirror, "INTERVAL_S", 60.0)
    copy = begun()
    write_step(copy.folder, 1)
    holder(s3, host="elsewhere", pid=7)
    with pytest.raises(OSError, match="is now written to by process 7 on elsewhere"):
        copy.close()
    assert list(in_store(s3)) == ["lease.json"]


def test_a_start_that_fails_gives_the_lease_back(s3, begun, tmp_path, monkeypatch):
    first = begun("a")
    write_step(first.folder, 1)
    first.close()

    async def gone(self, *_, **__):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", gone)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match="cannot be read: gone"):
        with mirror.of_run(options(tmp_path / "b"), True) as copy:
            copy.folder.mkdir(parents=True)
            copy.begin(True, lambda line: None)
    assert "lease.json" not in in_store(s3)


# ---------------------------------------------------------------- stores that fail


@pytest.mark.parametrize("trouble", ["fails", "refuses"])
def test_a_store_that_fails_for_a_while_gets_all_later(s3, begun, trouble):
    copy = begun()
    s3.trouble = trouble
    write_step(copy.folder, 1)
    wait_until(lambda: copy.failed is not None)
    copy.check()  # the run goes on
    s3.trouble = ""
    wait_until(lambda: copy.failed is None)
    copy.close()
    assert in_store(s3) == on_disk(copy.folder)
    text = "\n".join(copy.said)
    assert text.count("the run goes on, in ") == 1
    assert text.count(f"{ADDRESS} takes files again") == 1


def test_a_store_that_goes_on_failing_ends_the_run_in_one_line(
    s3, begun, monkeypatch, caplog
):
    copy = begun()
    s3.trouble = "fails"
    write_step(copy.folder, 1)
    wait_until(lambda: copy.failed is not None)
    monkeypatch.setattr(mirror, "MOST_FAILING_S", 0.0)
    for act in (copy.check, copy.close):
        with pytest.raises(OSError) as caught:
            act()
        text = str(caught.value)
        assert text.startswith(f"train.out='{ADDRESS}' cannot be written: ")
        assert f"the run's files are in {copy.folder}: give the same" in text
        assert "\n" not in text
    assert mirror._steps(on_disk(copy.folder)) == {1}


def test_the_error_of_the_run_is_the_one_that_is_raised(s3, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(FloatingPointError, match="the run's own"):
        with mirror.of_run(options(tmp_path), True) as copy:
            copy.folder.mkdir(parents=True)
            copy.begin(False, lambda line: None)
            s3.trouble = "fails"
            write_step(copy.folder, 1)
            raise FloatingPointError("the run's own")
    assert "cannot be written" in caplog.text


def test_an_address_that_cannot_be_written_to_is_refused_at_once(
    s3, begun, monkeypatch
):
    async def forbidden(self, path, *_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", forbidden)
    with pytest.raises(ConfigError, match="it cannot be written to .Access Denied"):
        begun()


def test_a_slow_store_does_not_slow_the_run(s3, begun):
    copy = begun()
    s3.trouble = "slow"
    write_step(copy.folder, 1)
    start = time.monotonic()
    copy.check()
    assert time.monotonic() - start < 0.5
    s3.trouble = ""
    copy.close()
    assert mirror._steps(in_store(s3)) == {1}


# ---------------------------------------------------------------- gs://


def test_gs(monkeypatch, tmp_path):
    """The same by gcsfs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with fake_gcs.connected(monkeypatch) as server:
        fields = Train(out="gs://bucket/run", work_dir=str(tmp_path / "a"))
        with mirror.of_run(fields, True) as copy:
            copy.folder.mkdir(parents=True)
            copy.begin(False, lambda line: None)
            write_step(copy.folder, 1)
            write_files(copy.folder, {"metrics.jsonl": "1\n"})
        own = on_disk(copy.folder)
        assert {
            k.removeprefix("bucket/run/"): v for k, v in server.objects.items()
        } == (own)
        again = dataclasses.replace(fields, work_dir=str(tmp_path / "b"))
        with mirror.of_run(again, True) as copy:
            copy.folder.mkdir(parents=True)
            copy.begin(True, lambda line: None)
            assert on_disk(copy.folder) == own
