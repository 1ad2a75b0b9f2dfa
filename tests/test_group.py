"""The processes of a run agree, wait, stop and end together: real processes."""

import json
import os
import re
import signal
import time

import pytest
import tiny
from workers import Workers, who

from ladder_jax.hardware.differences import difference, verdict
from ladder_jax.stop_signal import StopSignal

AGREE = """
import unittest.mock
from ladder_jax import agreement, config, identity, stop_signal
sys.path.insert(0, os.environ["TESTS"])
import tiny

agreement.FILE_PATIENCE = 1.0
problems = []

def start(resume=False, **fields):
    mesh = dict(mesh_data=1, mesh_fsdp=count, mesh_tensor=1)
    try:
        agreement.start(group, tiny.make(folder, **mesh | fields), resume)
        problems.append("")
    except ConfigError as error:
        problems.append(str(error))

with group, stop_signal.StopSignal(group) as stop:
    start(optimizer_learning_rate=3e-4 if number else 3e-3)
    start(train_seed=number // 2, train_log_every=1 + number // 2)
    start(resume=number == 1)
    with unittest.mock.patch.object(identity, "source_digest", lambda: f"v{number}"):
        start()
    os.environ["XLA_FLAGS"] = f"--xla_dump_to=/{number} --xla_a={number == 0}"
    start()
    os.environ["XLA_FLAGS"] = f"--xla_dump_to=/{number}"
    written = [x for x in ("run", "cache") if (folder / x).exists()]

    # HOME is another folder in each process.
    start(data_source="~/only-on-0")
    start(data_source="/none")
    start(train_out="~/run")
    start(data_token_cache="~/cache")
    start()
    written += [x for x in ("run", "cache") if (folder / x).exists()]

    # Process 0 works, and the others wait.
    def work():
        if number == 0:
            time.sleep(1.5)
            (folder / "work").write_text("")
        assert (folder / "work").exists()
        return number

    assert group.first("the work", work) == number
    text = group.from_first("a text", lambda: "of 0" if number == 0 else 1)

    # Steps that take longer in some processes.
    group.wait_for_all("steps")
    stop.started()
    group.wait_for_all("first steps")
    mark("stepping")
    step = 0
    while (stopped := stop.requested(step)) is None and step < 100_000:
        time.sleep(0.001 * (1 + 3 * number))
        step += 1
print(json.dumps([problems, written, text, step, stopped]))
"""


def test_processes_agree_wait_and_stop_together(tmp_path):
    tiny.write_corpus(tmp_path / "corpus")
    tiny.write_corpus(tmp_path / "home0" / "only-on-0")
    variables = dict(HOME=str(tmp_path / "home{}"), TESTS=os.path.dirname(__file__))
    with Workers(tmp_path, AGREE, 3, **variables) as workers:
        workers.wait_for_marks("stepping")
        workers.processes[1].send_signal(signal.SIGTERM)
        assert workers.statuses(120) == [0, 0, 0], [workers.text(n) for n in range(3)]
        found = [json.loads(workers.text(n, "out")) for n in range(3)]
        said, names = workers.text(2), [who(workers, n) for n in range(3)]
        warned = workers.text(0)
    # All end after the same step, and with the same lines.
    assert found[0] == found[1] == found[2]
    problems, written, text, step, stopped = found[0]
    same = "give all processes the same"
    home = str(tmp_path / "home1")
    assert problems == [
        f"optimizer.learning_rate is 0.003 in process 0 and 0.0003 in processes 1, 2 "
        f"of 3: {same}",
        f"train.seed is 0 in processes 0, 1 and 1 in process 2 of 3; train.log_every "
        f"differs too: {same}",
        f"--resume is False in processes 0, 2 and True in process 1 of 3: {same}",
        f"the code of ladder_jax is v0 in process 0 and v1 in process 1 and v2 in "
        f"process 2 of 3: {same}",
        f"XLA_FLAGS is --xla_a=True in process 0 and --xla_a=False in processes 1, 2 "
        f"of 3: {same}",
        f"{names[1]}: data.source='~/only-on-0' does not exist: it must be 'builtin', "
        "or a folder, file or glob of text, JSON Lines or Parquet files (and 1 more)",
        "data.source='/none' does not exist: it must be 'builtin', or a folder, file "
        "or glob of text, JSON Lines or Parquet files",
        f"{names[1]}: train.out='{home}/run' is not the folder that process 0 has: it "
        "must be on a file system that all hosts share (and 1 more)",
        "",
        "",
    ]
    assert written == [] and text == "of 0"
    assert f"data.token_cache='{home}/cache' is not the folder that process" in warned
    assert "waiting for process 0: the work (1 s; gives up after 100 s)" in said
    assert 0 < step < 100_000 and stopped == signal.SIGTERM


def test_a_line_about_differences_names_fields_values_and_processes():
    same = dict(a="1", b="2")
    assert difference([same] * 4) == ""
    other = [same, same, same | dict(b="3"), same | dict(a="x" * 200, b="3")]
    end = "of 4: give all processes the same"
    assert difference(other[:3] + [other[2]]) == (
        f"b is 2 in processes 0, 1 and 3 in processes 2, 3 {end}"
    )
    assert difference(other) == (
        f"a is 1 in processes 0-2 and {'x' * 117}... in process 3 of 4; b differs too: "
        "give all processes the same"
    )
    assert difference([same, dict(a="1")]).startswith("b is 2 in process 0 and missing")
    bad = dict(who="host7, pid 3", problem="no disk")
    good = dict(who="host8, pid 4", values=same)
    assert verdict([good, good]) == ""
    assert verdict([bad, bad]) == "no disk"
    assert verdict([good, bad]) == "process 1 of 2 (host7, pid 3): no disk"
    assert verdict([bad, good, bad]).endswith("no disk (and 1 more)")


FAIL = """
with group, groups.telling(group):
    group.at_end.append(lambda: mark("ended"))
    group.wait_for_all("start")
    if number == 1:
        raise OSError("No space\\n left")
    time.sleep(1000)  # as in a collective, which waits for process 1
"""


def test_an_error_in_one_process_ends_all_with_its_line(tmp_path):
    with Workers(tmp_path, FAIL, 3) as workers:
        start = time.monotonic()
        # An uncaught error of Python is status 1 too.
        assert workers.statuses(60) == [1, 1, 1]
        assert time.monotonic() - start < 60
        line = f"test: {who(workers, 1)} failed: No space left"
        assert workers.last(0) == workers.last(2) == line
        assert "OSError: No space" in workers.text(1)
        assert all((tmp_path / f"ended.{n}").exists() for n in range(3))


WAIT = """
if os.environ.get("STARTING"):  # before the first step, when Python may stand still
    group.watch.starting, group.watch.start_patience = True, 1000
with group, groups.telling(group):
    group.wait_for_all("start")
    mark("started")
    time.sleep(1000)
"""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("starting", ["", "1"])
def test_a_killed_process_is_named_and_the_others_may_be_started_again(
    tmp_path, victim, starting
):
    with Workers(tmp_path, WAIT, 3, STARTING=starting) as workers:
        workers.wait_for_marks("started")
        workers.processes[victim].kill()
        expected = [75, 75, 75]
        expected[victim] = -signal.SIGKILL
        assert workers.statuses(60) == expected
        for number in {0, 1, 2} - {victim}:
            last = workers.last(number)
            if victim:
                name = who(workers, 1)
                assert last == f"test: {name} is lost: its connection was closed"
            else:
                assert last.startswith("test: process 0 of 3 ") and "is lost" in last
                assert "terminate called" not in workers.text(number)


def test_a_process_that_stands_still_is_lost_and_ends_when_it_goes_on(tmp_path):
    with Workers(tmp_path, WAIT, 2) as workers:
        workers.wait_for_marks("started")
        time.sleep(1.5)
        workers.processes[1].send_signal(signal.SIGSTOP)
        assert workers.processes[0].wait(60) == 75
        line = rf"test: {re.escape(who(workers, 1))} is lost: it has not answered for"
        assert re.fullmatch(rf"{line} \d+ s", workers.last(0))
        workers.processes[1].send_signal(signal.SIGCONT)
        assert workers.statuses(60) == [75, 75]
        assert "process 0 of 2" in workers.last(1) and "lost" in workers.last(1)


STUCK = """
from ladder_jax import stop_signal

def a_collective():
    time.sleep(1000)

with group, groups.telling(group), groups.watchdog(group, 2.0 + number) as watchdog:
    group.wait_for_all("start")
    time.sleep(3)  # a compilation: no step has begun
    watchdog.step(1)
    watchdog.step(2)
    a_collective()
"""


def test_a_step_that_does_not_end_shows_the_stacks_and_ends_all(tmp_path):
    with Workers(tmp_path, STUCK, 2) as workers:
        assert workers.statuses(60) == [75, 75]
        for number in range(2):
            assert "in a_collective" in workers.text(number)
            assert workers.last(number) == (
                f"test: {who(workers, 0)}: step 3 has not ended for 2 s "
                "(--step-timeout); the stacks of the threads are above"
            )


EARLY = """
from ladder_jax import stop_signal

with group, groups.telling(group), stop_signal.StopSignal(group):
    group.wait_for_all("start")
    mark("started")
    group.first("the tokens", lambda: time.sleep(1000))
"""


def test_a_signal_before_the_first_step_ends_all_at_once(tmp_path):
    with Workers(tmp_path, EARLY, 2) as workers:
        workers.wait_for_marks("started")
        workers.processes[1].send_signal(signal.SIGTERM)
        assert workers.statuses(60) == [143, 143]
        for number in range(2):
            last = workers.last(number)
            assert last == "test: stopped by SIGTERM before the first step"


COMPILING = """
import hashlib
from ladder_jax import stop_signal

stop_signal.START_GRACE = 0.5
with stop_signal.StopSignal():
    print("started", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # C code, as a compilation
"""


def test_a_signal_stops_one_process_that_compiles(tmp_path):
    """Python runs no handler in its main thread meanwhile."""
    with Workers(tmp_path, COMPILING, 1, arguments=[]) as workers:
        workers.wait_for(lambda: "started" in workers.text(0, "out"))
        workers.processes[0].send_signal(signal.SIGTERM)
        assert workers.statuses(60) == [143]
        assert workers.last(0) == "stopped by SIGTERM before the first step"


def test_a_signal_that_the_main_thread_sees_lets_it_end_by_itself(monkeypatch):
    monkeypatch.setattr("ladder_jax.stop_signal.START_GRACE", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(0) == signal.SIGTERM
    time.sleep(0.5)  # nothing ends this process
    assert signal.getsignal(signal.SIGTERM) == before
    with StopSignal() as stop:
        stop.started()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # a long step
        assert stop.requested(7) == signal.SIGTERM
