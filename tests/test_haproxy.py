"""launch/haproxy.cfg: which requests go to another replica, and which do not.

The replicas here are small HTTP servers that do what a test says.
"""

import contextlib
import http.client
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import balancer as balancers
import pytest

pytestmark = pytest.mark.skipif(
    balancers.executable() is None,
    reason="there is no haproxy: `make test-tools` installs it",
)
PATH = "/v1/completions"


class Replica:
    """A server at a port; `act` answers requests, and `seen` has their ids."""

    def __init__(self, port):
        self.port, self.seen, self.ready = port, [], True
        self.act = Replica.answer
        self._server = None
        self.start()

    def start(self):
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if self.path == "/ready":
                    return self.reply(200 if replica.ready else 503)
                self.do_POST()

            def do_POST(self):
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                replica.seen.append(self.headers["X-Request-Id"])
                replica.act(self)

            def reply(self, status, body=b"{}", **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()

    def stop(self):
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    # What a replica can do with a request.

    @staticmethod
    def answer(handler):
        handler.reply(200, handler.body)

    @staticmethod
    def refuse(handler):
        handler.reply(503, b'{"error": "draining"}')

    @staticmethod
    def die(handler):
        handler.close_connection = True  # without an answer

    @staticmethod
    def break_off(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nhello\r\n")
        handler.close_connection = True

    @staticmethod
    def stream(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for text in (b"data: 1\n\n", b"data: 2\n\n"):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            time.sleep(0.4)
        handler.wfile.write(b"0\r\n\r\n")


@pytest.fixture(scope="module")
def all_parts(tmp_path_factory):
    replicas = [Replica(port) for port in balancers.free_ports(2)]
    ports = [replica.port for replica in replicas]
    with balancers.balancing(tmp_path_factory.mktemp("haproxy"), ports) as balancer:
        yield balancer, *replicas
    for replica in replicas:
        replica.stop()


@pytest.fixture
def parts(all_parts):
    """(balancer, replica one, replica two), both ready and in use."""
    balancer, *replicas = all_parts
    for replica in replicas:
        replica.act, replica.ready = Replica.answer, True
        replica.seen.clear()
        if replica._server is None:
            replica.start()
    balancer.wait(one="UP", two="UP")
    return balancer, *replicas


def send(balancer, body=b"{}", id=None, path=PATH, method="POST"):
    """Returns (status, headers, body); body None: the answer broke off."""
    connection = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=20)
    with contextlib.closing(connection):
        headers = {"X-Request-Id": id} if id else {}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        try:
            return response.status, response.headers, response.read()
        except (http.client.IncompleteRead, ConnectionError):
            return response.status, response.headers, None


def test_a_request_that_a_dead_replica_refused_goes_to_the_other(parts):
    balancer, one, two = parts
    one.stop()  # HAProxy does not know it yet
    for i in range(4):
        status, headers, _ = send(balancer, id=f"id-{i}")
        assert (status, headers["X-Replica"]) == (200, "two")
    assert two.seen == [f"id-{i}" for i in range(4)]


@pytest.mark.parametrize("size", [2, 100_000])
def test_a_request_that_a_replica_answered_with_503_goes_to_the_other(parts, size):
    balancer, one, two = parts
    one.act = Replica.refuse
    body = b"x" * size
    for i in range(4):
        status, headers, answer = send(balancer, body, f"id-{i}")
        assert (status, headers["X-Replica"], answer) == (200, "two", body)
    assert one.seen, "the test did not reach the replica that refuses"
    assert two.seen == [f"id-{i}" for i in range(4)]


def test_a_request_too_large_to_be_kept_gets_the_503(parts):
    balancer, one, two = parts
    one.act = two.act = Replica.refuse
    status, _, body = send(balancer, b"x" * 300_000)
    assert (status, body) == (503, b'{"error": "draining"}')
    assert len(one.seen + two.seen) == 1


@pytest.mark.parametrize("fate", [Replica.die, Replica.break_off])
def test_a_request_that_a_replica_may_have_worked_on_is_sent_once(parts, fate):
    balancer, one, two = parts
    one.act = two.act = fate
    status, _, body = send(balancer, id="id")
    assert one.seen + two.seen == ["id"]
    if fate is Replica.die:
        assert status == 502
        assert json.loads(body)["error"]["code"] == "replica_failed"
    else:
        assert (status, body) == (200, None)


def test_without_a_ready_replica_the_answer_is_503_in_the_form_of_the_api(parts):
    balancer, one, two = parts
    one.ready = two.ready = False
    balancer.wait(one="DOWN", two="DOWN")
    status, headers, body = send(balancer)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "unavailable"
    assert send(balancer, path="/ready", method="GET")[0] == 503
    one.ready = True
    balancer.wait(one="UP")
    assert send(balancer, path="/ready", method="GET")[0] == 200


def test_a_replica_that_is_not_ready_gets_nothing_new_and_finishes(parts):
    """As it does between SIGTERM and its end."""
    balancer, one, two = parts
    one.act = two.act = Replica.stream
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(send(balancer))) for _ in "ab"
    ]
    for number, thread in enumerate(threads, start=1):  # each counts for the next one
        thread.start()
        while len(one.seen + two.seen) < number:
            time.sleep(0.01)
    assert len(one.seen) == 1, "leastconn gives each replica one"
    one.ready = False
    for thread in threads:
        thread.join()
    assert [body for *_, body in results] == [b"data: 1\n\ndata: 2\n\n"] * 2
    balancer.wait(one="DOWN")
    one.act = two.act = Replica.answer
    for _ in range(4):
        assert send(balancer)[1]["X-Replica"] == "two"


def test_every_event_of_a_stream_passes_at_once(parts):
    balancer, one, two = parts
    one.act = two.act = Replica.stream
    connection = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", PATH, b"{}")
        response = connection.getresponse()
        times = []
        for _ in "12":
            assert response.readline().startswith(b"data: ")
            times.append(time.monotonic())
            response.readline()
    assert times[1] - times[0] > 0.2


def test_ids_are_kept_or_made_and_metrics_are_not_passed_on(parts):
    balancer, one, two = parts
    send(balancer, id="mine")
    send(balancer)
    send(balancer)
    seen = one.seen + two.seen
    assert "mine" in seen and len(set(seen)) == 3 and None not in seen
    assert send(balancer, path="/metrics", method="GET")[0] == 404
    assert len(one.seen + two.seen) == 3
