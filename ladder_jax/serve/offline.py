"""Offline batch generation: a file of prompts becomes a file of outputs, and goes on where it was interrupted.

Input, a JSON object a line: `prompt` (text, or a list of ids) and any option of `Engine.submit` (max_tokens, seed,
stop, ...). Output, a JSON object a line, as requests finish: `index` (of the input line, from 0), `text`, `tokens`,
`finish`, or `error`; with logprobs asked for, `logprobs`.
"""

import json
import os
from pathlib import Path

from tqdm import tqdm

from ladder_jax.config import ConfigError
from ladder_jax.serve.request import RequestFailed


def read_prompts(path):
    """The input's rows, dicts. Raises ConfigError that names the line that is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompts-file={str(path)!r} cannot be read: {error}"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"prompts-file={str(path)!r}, line {number}: {error}"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), (str, list)):
            raise ConfigError(
                f"prompts-file={str(path)!r}, line {number} is not accepted: it must be an object with a "
                "prompt, text or a list of ids"
            )
        rows.append(row)
    return rows


def finished(path):
    """Indices of the output that is there already; a last line that was cut short is removed from the file."""
    path = Path(path)
    if not path.exists():
        return set()
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    try:
        done = {json.loads(line)["index"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"out={str(path)!r} is not accepted: it holds something else than output of this command; "
            "choose a new file"
        ) from None
    if rest:
        os.truncate(path, len(whole) + bool(whole))
    return done


def run(engine, prompts, out, defaults, show=True):
    """Generates for every row of the file `prompts` that the file `out` does not hold yet.

    Args:
      defaults: options of `Engine.submit` for rows that do not give them.
      show: a progress bar on stderr.
    Returns (rows generated now, rows there were already, rows that failed).
    """
    rows, failed = read_prompts(prompts), 0
    done = finished(out)
    todo = iter([(i, row) for i, row in enumerate(rows) if i not in done])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    running, most = {}, max(1, min(engine.options.queue_size, 4 * engine.options.slots))
    with (
        open(out, "a", encoding="utf-8") as file,
        tqdm(
            total=len(rows), initial=len(done), unit="prompt", disable=not show
        ) as bar,
    ):

        def write(index, **values):
            nonlocal failed
            failed += "error" in values
            file.write(
                json.dumps(dict(index=index, **values), ensure_ascii=False) + "\n"
            )
            file.flush()
            bar.update()

        more = True
        while running or more:
            while more and len(running) < most:
                index, row = next(todo, (None, None))
                if row is None:
                    more = False
                    break
                try:
                    running[index] = engine.submit(**defaults | row)
                except (ConfigError, TypeError) as error:
                    write(index, error=str(error))
            if running:
                engine.step()
            for index in [i for i, request in running.items() if request.finish]:
                request = running.pop(index)
                try:
                    tokens = list(request)
                except RequestFailed as error:
                    write(index, error=str(error))
                    continue
                logprobs = [
                    token.logprob for token in tokens if token.logprob is not None
                ]
                write(
                    index,
                    text=request.text,
                    tokens=request.tokens,
                    finish=request.finish,
                    **dict(logprobs=logprobs) if logprobs else {},
                )
            bar.set_postfix_str(f"{engine.counters.tokens} tokens", refresh=False)
    return len(rows) - len(done), len(done), failed
