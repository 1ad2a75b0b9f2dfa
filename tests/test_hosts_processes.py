"""`ladder-jax serve` with two processes, of two emulated devices each."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time

import helpers
import httpx2
import pytest
from helpers import COMMAND, make_requests, tokens_alone

from ladder_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
OPTIONS = (
    *("--slots", 3, "--staging", 2, "--steps-per-call", 4, "--prefill-budget", 16),
    *("--no-fit-shapes", "--no-prompt-logprobs", "--max-logprobs", 2),
    *("--devices", 2, "--distributed", "--processes", 2),
)
LOST_AFTER = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint; the processes of the tests after the first find their programs."""
    folder = tmp_path_factory.mktemp("hosts")
    helpers.write_engine_checkpoint(folder / "run")
    return folder


class Cluster:
    """Two processes, their output and a client."""

    def __init__(self, folder, **late):
        self.folder, self.address = folder, helpers.free_address()
        port = helpers.free_address().rpartition(":")[2]
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.options = [*OPTIONS, "--coordinator", self.address, "--port", port]
        self.options += ["--compile-cache", folder / "programs"]
        self.options += ["--lost-after", LOST_AFTER]
        self.processes, self.files = {}, {}

    def start(self, number, *options):
        words = [*COMMAND, "serve", self.folder / "run", *self.options, *options]
        self.files[number] = [
            open(self.folder / f"{number}.{name}", "w+") for name in ("out", "err")
        ]
        out, err = self.files[number]
        self.processes[number] = subprocess.Popen(
            [*map(str, words), "--process", str(number)],
            env=helpers.code_environment(),
            stdout=out,
            stderr=err,
        )

    def text(self, number):
        """What a process has written to stdout and stderr."""
        parts = []
        for file in self.files[number]:
            file.flush()
            parts.append(open(file.name).read())
        return "\n".join(parts)

    def wait_for(self, number, text, seconds=300):
        end = time.monotonic() + seconds
        while text not in self.text(number):
            for other, process in self.processes.items():
                assert process.poll() is None, self.text(other)
            assert time.monotonic() < end, f"no {text!r} in {self.text(number)}"
            time.sleep(0.05)

    def ready(self):
        self.wait_for(0, "serving run at http")
        return self

    def complete(self, prompt, **body):
        answer = self.http.post(
            "/v1/completions", json=dict(model="run", prompt=prompt) | body
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def seconds_used(self):
        """Processor time of both processes."""
        ticks = 0
        for process in self.processes.values():
            fields = open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def statuses(self, seconds):
        """The exit statuses of both."""
        end = time.monotonic() + seconds
        return [
            self.processes[number].wait(max(end - time.monotonic(), 0.1))
            for number in sorted(self.processes)
        ]


@contextlib.contextmanager
def cluster(folder):
    made = Cluster(folder)
    try:
        yield made
    finally:
        made.http.close()
        for process in made.processes.values():
            process.kill()
            process.wait()
        for file in sum(made.files.values(), []):
            file.close()


def expected_text(prompt, options):
    """The output of one process for one request alone, as text."""
    tokens = tokens_alone(
        prompt, stop_token_ids=TOKENIZER.eos_ids, vocabulary=TOKENIZER.size, **options
    )
    stream = TOKENIZER.stream(after=prompt)
    return "".join(map(stream.push, tokens)) + stream.flush()


def test_two_processes_answer_as_one_and_stop_together(folder):
    drawn = make_requests(9, longest=30)
    requests = [([i % 256 for i in prompt], options) for prompt, options in drawn]
    with cluster(folder) as running:
        # Process 1 is late: process 0 says so.
        running.start(0)
        running.wait_for(0, "waiting for processes 1 of 2 (2 s; gives up after 300 s)")
        running.start(1)
        running.ready()
        assert "process 1 of 2 follows process 0" in running.text(1)
        assert running.http.get("/ready").status_code == 200

        # Requests at the same time have the tokens that they have alone.
        found = {}

        def ask(i):
            prompt, options = requests[i]
            body = dict(options)
            if bias := body.pop("logit_bias", None):
                body["logit_bias"] = {str(token): x for token, x in bias.items()}
            body.setdefault("temperature", 0)
            found[i] = running.complete(prompt, **body)

        threads = [threading.Thread(target=ask, args=[i]) for i in range(9)]
        for thread in threads:
            thread.start()
        # A client that goes away halfway changes nothing for the others.
        body = dict(model="run", prompt=[9], max_tokens=60, stream=True)
        with running.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        for thread in threads:
            thread.join()
        for i, (prompt, options) in enumerate(requests):
            assert found[i]["text"] == expected_text(prompt, options), options
        stop = expected_text(*requests[0])[2:4]
        choice = running.complete(requests[0][0], temperature=0, stop=stop)
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == expected_text(*requests[0])[:2]

        # Without work, neither process uses a processor.
        while re.search(
            r"requests_running [1-9]", metrics := running.http.get("/metrics").text
        ):
            time.sleep(0.1)
        assert re.search(r"compiles_after_ready_total 0\.0", metrics), metrics
        before, start = running.seconds_used(), time.monotonic()
        time.sleep(3)
        used = (running.seconds_used() - before) / (time.monotonic() - start)
        assert used < 0.2
        text = expected_text(*requests[1])
        prompt, options = requests[1]
        assert running.complete(prompt, **options)["text"] == text

        # A signal to any process: what runs is finished, and all end with status 0.
        body = dict(model="run", prompt=[7], max_tokens=60, stream=True, temperature=0)
        body["stop_token_ids"], body["ignore_eos"] = [], True
        with running.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            running.processes[1].send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert running.statuses(60) == [0, 0], running.text(0) + running.text(1)


def test_a_lost_process_ends_the_server_with_its_name(folder):
    with cluster(folder) as running:
        running.start(0)
        running.start(1)
        running.ready()
        pid = running.processes[1].pid
        body = dict(model="run", prompt=[7], max_tokens=62, stream=True)
        with running.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            with contextlib.suppress(httpx2.HTTPError):
                list(lines)
        assert running.processes[0].wait(LOST_AFTER + 25) == 1
        assert time.monotonic() - killed < LOST_AFTER + 20
        last = running.text(0).splitlines()[-1]
        assert re.search(
            rf"ladder-jax serve: .*process 1 of 2 \(.*, pid {pid}\) is lost: it has "
            r"not answered for \d+ s",
            last,
        ), running.text(0)


@pytest.mark.slow
def test_followers_end_with_process_0(folder):
    with cluster(folder) as running:
        running.start(0)
        running.start(1)
        running.ready()
        running.processes[0].kill()
        # The connection to process 0 is closed, or the engine notices first.
        assert running.processes[1].wait(LOST_AFTER + 20) in (1, 75)
        assert "process 0 is lost" in running.text(1).strip().splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_hangs_is_lost_too(folder):
    with cluster(folder) as running:
        running.start(0)
        running.start(1)
        running.ready()
        running.processes[0].send_signal(signal.SIGSTOP)
        assert running.processes[1].wait(LOST_AFTER + 25) == 1
        assert re.search(r"process 0 of 2 \(.*\) is lost", running.text(1))


@pytest.mark.slow
def test_processes_that_differ_say_so_and_none_starts(folder):
    with cluster(folder) as running:
        running.start(0)
        running.start(1, "--slots", 5)
        assert running.statuses(200) == [2, 2]
        for number in (0, 1):
            assert "process 1 has options" in running.text(number)
    with cluster(folder) as running:
        running.start(0)
        running.start(1, "--step", 7)
        assert running.statuses(200) == [2, 2]
        assert "process 1: " in running.text(0)
        assert "holds no checkpoint of step 7" in running.text(0)
        assert "holds no checkpoint of step 7" in running.text(1)
