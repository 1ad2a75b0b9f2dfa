"""Runs a command again and again, and kills it in the middle: a script for tests.

    python killed.py FOLDER OUT POINTS WORD...

Every run is a fork of this process, which has imported everything and not started JAX.
A point is a number of an operation on files below FOLDER (an open for writing, a
rename, a removal, ...), before which the run kills itself; or it has a decimal point:
then it is a share of the time that a whole run takes, and this process kills it. After
each kill the command runs again, to its end. OUT then becomes OUT.<number>.

It prints JSON: the operations of a whole run, and for each point whether it was killed,
whether OUT was there, and the number of operations of the run after it.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from ladder_jax import cli
from ladder_jax.convert import command  # noqa: F401  what commands import

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def is_operation(event, arguments, folder):
    is_write = event == "open" and arguments[2] and arguments[2] & WRITES
    paths = [str(x) for x in arguments if isinstance(x, str | os.PathLike)]
    return (is_write or event in EVENTS) and any(x.startswith(folder) for x in paths)


def run(words, folder, kill_before=None):
    """In a fork: runs the command. Returns (process id, pipe with the operations)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    operations = []

    def hook(event, arguments):
        if is_operation(event, arguments, folder):
            if len(operations) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            operations.append([event, *map(str, arguments[:2])])

    sys.addaudithook(hook)
    sys.stdout = open(os.devnull, "w")
    status = cli.run(words)
    with os.fdopen(writer, "w") as pipe:
        json.dump(operations, pipe)
    os._exit(status)


def finish(child, reader):
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), text


def whole_run(words, folder):
    status, text = finish(*run(words, folder))
    assert status == 0, status
    return json.loads(text)


def main():
    folder, out, points = sys.argv[1:4]
    words = sys.argv[4:]
    start = time.monotonic()
    operations = whole_run(words, folder)
    seconds = time.monotonic() - start
    shutil.rmtree(out)
    results = []
    for number, point in enumerate(points.split(",")):
        if "." in point:
            child, reader = run(words, folder)
            time.sleep(float(point) * seconds)
            os.kill(child, signal.SIGKILL)
        else:
            child, reader = run(words, folder, int(point) % len(operations))
        status, _ = finish(child, reader)
        was_there = os.path.exists(out)
        again = 0 if was_there else len(whole_run(words, folder))
        os.rename(out, f"{out}.{number}")
        was_killed = status == -signal.SIGKILL
        results.append(dict(killed=was_killed, there=was_there, again=again))
        assert status in (0, -signal.SIGKILL), status
    left = sorted(path.name for path in Path(out).parent.iterdir())
    print(json.dumps(dict(operations=operations, results=results, left=left)))


if __name__ == "__main__":
    main()
