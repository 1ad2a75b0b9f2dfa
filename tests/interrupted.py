"""Runs a command again and again, with a Ctrl-C at given times: a script for tests.

    python interrupted.py FOLDER MOMENTS WORD...

Every run is a fork of this process, which has imported the command line and not
started JAX. A moment is a share of the time that a whole run takes, from the call of
`main`. The whole group of processes gets SIGINT, as from a terminal. FOLDER is the
current folder of the runs, empty at the start of each.

It prints JSON: {status, out, err, files} of the whole run and of each of the others.
`files` are those in FOLDER afterwards, with their texts.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from ladder_jax import cli


def start(words, folder, log):
    """In a fork: runs the command. Returns the process id."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        os.read(reader, 1)  # until it is in a group of its own
        os.close(reader)
        return child
    os.setpgid(0, 0)
    # A test may run in the background, where Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    sys.argv = ["ladder-jax", *words]
    os.write(writer, b"x")
    cli.main()


def finish(child, folder, log):
    _, status = os.waitpid(child, 0)
    texts = {
        name: Path(f"{log}.{name}").read_text(errors="replace")
        for name in ("out", "err")
    }
    files = {
        str(path.relative_to(folder)): path.read_text(errors="replace")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return dict(status=os.waitstatus_to_exitcode(status), **texts, files=files)


def main():
    folder, moments, words = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    log = f"{folder}.log"
    began = time.monotonic()
    results = [finish(start(words, folder, log), folder, log)]
    seconds = time.monotonic() - began
    for moment in moments:
        child = start(words, folder, log)
        time.sleep(float(moment) * seconds)
        try:
            os.killpg(child, signal.SIGINT)
        except ProcessLookupError:
            pass
        results.append(finish(child, folder, log))
    sys.__stdout__.write(json.dumps(results))


if __name__ == "__main__":
    main()
