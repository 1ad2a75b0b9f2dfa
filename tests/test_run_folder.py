"""The lease on a run's folder: between processes, after crashes, across hosts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import tiny

from ladder_jax import run_folder
from ladder_jax.config import ConfigError
from ladder_jax.run_folder import FILE, Lease

HOLD = """
import sys
from ladder_jax.run_folder import Lease

with Lease(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(folder):
    """Another process, which holds the lease until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == "held\n"
    return process


def write(folder, holder, age_s=0.0):
    """A lease of another job, whose last heartbeat is `age_s` seconds old."""
    (folder / FILE).write_text(json.dumps(holder))
    beat = time.time() - age_s
    os.utime(folder / FILE, (beat, beat))


ELSEWHERE = dict(host="node7", machine="node7 boot", pid=42, started="1", token="other")


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    first = hold(tmp_path)
    try:
        with pytest.raises(ConfigError, match=f"process {first.pid} on .* there") as e:
            Lease(tmp_path).__enter__()
        assert "\n" not in str(e.value) and f"remove {tmp_path / FILE}" in str(e.value)
    finally:
        first.communicate("end\n")
    with Lease(tmp_path) as lease:
        lease.check()
    assert not list(tmp_path.iterdir())


def test_the_lease_of_a_killed_process_is_taken_at_once(tmp_path):
    first = hold(tmp_path)
    first.kill()  # not waited for: it is a zombie, which does not run
    while "Z" not in Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    with Lease(tmp_path) as lease:
        lease.check()
    first.communicate()


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path):
    with Lease(tmp_path):
        holder = json.loads((tmp_path / FILE).read_text())
    write(tmp_path, holder | dict(started="1", token="other"))
    with Lease(tmp_path) as lease:
        lease.check()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with Lease(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        Lease(tmp_path).__enter__()


@pytest.mark.parametrize("content", [json.dumps(ELSEWHERE), "", "[]"])
def test_an_old_heartbeat_of_another_host_blocks_no_job(tmp_path, content):
    write(tmp_path, ELSEWHERE)
    (tmp_path / FILE).write_text(content)
    os.utime(tmp_path / FILE, (0, 0))
    with Lease(tmp_path) as lease:
        lease.check()


def test_a_heartbeat_of_another_host_is_waited_for(tmp_path, monkeypatch, caplog):
    """A holder that beats is seen within moments; one that does not loses its lease."""
    write(tmp_path, ELSEWHERE)
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        assert naps.count(seconds) < 10, "it should see the heartbeat"
        os.utime(tmp_path / FILE)

    monkeypatch.setattr(run_folder.time, "sleep", sleep)
    with pytest.raises(ConfigError, match="process 42 on node7 writes there"):
        Lease(tmp_path).__enter__()
    assert "waiting up to 120 s" in caplog.records[0].getMessage()

    older = lambda _: write(tmp_path, ELSEWHERE, age_s=run_folder.STALE_S + 1)
    monkeypatch.setattr(run_folder.time, "sleep", older)
    write(tmp_path, ELSEWHERE)
    with Lease(tmp_path) as lease:
        lease.check()


def test_a_job_that_lost_its_lease_stops_and_leaves_the_others(tmp_path):
    with Lease(tmp_path) as lease:
        write(tmp_path, ELSEWHERE)
        with pytest.raises(OSError, match="now written to by process 42 on node7"):
            lease.check()
    assert json.loads((tmp_path / FILE).read_text()) == ELSEWHERE
    (tmp_path / FILE).unlink()
    with Lease(tmp_path) as lease:
        (tmp_path / FILE).unlink()
        with pytest.raises(OSError, match="was removed while this job ran"):
            lease.check()


def test_the_heartbeat_is_the_files_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_S", 0.01)
    with Lease(tmp_path):
        os.utime(tmp_path / FILE, (0, 0))
        for _ in range(1000):
            if (tmp_path / FILE).stat().st_mtime > 0:
                break
            time.sleep(0.01)
        else:
            pytest.fail("no heartbeat")


RACE = """
import sys
from ladder_jax import run_folder
from ladder_jax.config import ConfigError

sys.stdin.readline()
try:
    with run_folder.Lease(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except ConfigError:
    print("refused", flush=True)
"""


def test_of_several_jobs_that_find_a_stale_lease_one_takes_it(tmp_path):
    write(tmp_path, ELSEWHERE, age_s=1e6)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.stdout.readline().strip() for process in processes]
    for process in processes:
        process.communicate("end\n")
    assert sorted(answers) == ["held", "refused", "refused", "refused"]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_second_training_job_is_refused_in_one_line(tmp_path, resume):
    """Two processes: one holds the run's folder, the other is `ladder-jax train`."""
    tiny.write_corpus(tmp_path / "corpus")
    recipe = tiny.recipe(tmp_path)
    first = hold(tmp_path / "run")
    ended = subprocess.run(
        [*helpers.COMMAND, "train", recipe, *resume],
        capture_output=True,
        text=True,
        env=helpers.code_environment(devices=8),
    )
    first.communicate("end\n")
    assert ended.returncode == 2, ended.stderr
    [line] = [line for line in ended.stderr.splitlines() if "train.out=" in line]
    assert f"process {first.pid} on" in line and "writes there" in line
    assert not list((tmp_path / "run").iterdir())
