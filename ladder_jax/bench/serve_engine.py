"""The engine without HTTP, as `ladder-jax bench serve --engine` measures it.

    python -m ladder_jax.bench.serve_engine '{"checkpoint": "runs/x", "decode": {...}}'

It reads loads from stdin, a line of JSON each, and writes a line of results: for each
request its arrival, the times of its tokens in seconds after the start, and its text.
The main thread takes the engine's steps, and nothing else runs in the process.
"""

import dataclasses
import json
import sys
import time
from typing import Any

from ladder_jax.bench import contest
from ladder_jax.bench.workloads import Arrival
from ladder_jax.config import Decode, from_dict


def serve_loads(checkpoint: str, options: Decode) -> None:
    """Serves loads until stdin ends."""
    from ladder_jax.bench.decode_runs import serve
    from ladder_jax.loading import load
    from ladder_jax.serve.engine import Engine

    loaded = load(checkpoint)
    options = dataclasses.replace(options, queue_size=10**6)  # all may wait
    engine = Engine(
        loaded.model, loaded.config.model, loaded.mesh, options, loaded.tokenizer
    )
    engine.warm_up()
    contest.send(dict(model=checkpoint, vocabulary=loaded.tokenizer.size))
    for line in sys.stdin:
        work = json.loads(line)
        arrivals = [
            Arrival(seconds, tuple(prompt), most)
            for seconds, prompt, most in work["arrivals"]
        ]
        start = time.perf_counter()
        requests, seconds = serve(
            engine, arrivals, work["users"], stop_token_ids=(), temperature=0.0
        )
        contest.send(
            dict(
                seconds=seconds,
                requests=[
                    dict(
                        arrival=request.submitted - start,
                        times=[moment - start for moment in request.times],
                        text=request.text,
                        finish=request.finish,
                    )
                    for request in requests
                ],
            )
        )


def main(arguments: dict[str, Any]) -> None:
    """Reserves stdout for results, and serves."""
    contest.quiet()
    serve_loads(arguments["checkpoint"], from_dict(arguments["decode"], Decode))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
