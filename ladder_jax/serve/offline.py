"""Offline generation: a file of prompts becomes a file of outputs, and can be resumed.

Input: a JSON object a line, with `prompt` (text, or a list of ids) or `messages` (a
conversation, for the tokenizer's chat template), and any option of `Engine.submit`
(max_tokens, seed, stop, ...). A row without a `seed` gets one of its own, so that equal
prompts get different samples, see `row_seed`.

Output: a JSON object a line, in the order in which requests finish:

    index      number of the input line, from 0
    digest     of the row's prompt and options, and of the model
    text, tokens, finish
    logprobs, prompt_logprobs
               if the row asks for them: of each token, null for a prompt's first one
    top_logprobs, prompt_top_logprobs
               if it asks for alternatives: of each token, pairs (id, log-probability)
    or error   why the row has no output; an error does not end the run

If the output file exists, a run adds the rows that the file lacks. It refuses a file
that holds anything but outputs of the same model for the same prompts and options, and
a file that another process writes.

Several processes with one model (`ladder-jax generate --distributed`) all take the same
steps; process 0 alone reads and writes the output file.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ladder_jax import sampling
from ladder_jax.addresses import local_path
from ladder_jax.config import ConfigError
from ladder_jax.data.chat import ChatEncoder
from ladder_jax.data.jsonl import read_jsonl
from ladder_jax.hardware import group as groups
from ladder_jax.interrupts import check_interrupted
from ladder_jax.model import Transformer
from ladder_jax.run_folder import Lease
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.request import EngineFailed, QueueFull, Request, RequestFailed


@dataclass(frozen=True)
class Row:
    """One line of the input."""

    index: int  # the number of the line, from 0
    digest: str  # a hash of prompt, options and model: 16 hexadecimal digits
    options: dict[str, Any]  # of Engine.submit; `messages` may stand for `prompt`
    error: str | None  # why the line is not a request, or None

    @property
    def line(self) -> int:
        """The number of the line, from 1, as editors count."""
        return self.index + 1

    def record(self, values: Mapping[str, Any]) -> str:
        """Returns the output line with these values."""
        fields = dict(index=self.index, digest=self.digest) | dict(values)
        return json.dumps(fields, ensure_ascii=False) + "\n"

    def record_start(self) -> bytes:
        """Returns the beginning of this row's output line."""
        start = json.dumps(dict(index=self.index, digest=self.digest))
        return start.removesuffix("}").encode()


class Summary(NamedTuple):
    """Numbers of rows of a run."""

    generated: int  # written by this run, errors included
    before: int  # in the output file before this run
    failed: int  # written by this run as errors


def row_seed(seed: int, index: int) -> int:
    """Returns the seed of row `index`, a hash: from 0 to 2 ** 32 - 1.

    It depends on the run's seed and the row's index alone, not on the other rows.
    """
    return int.from_bytes(_sha256(f"{seed} {index}".encode())[:4], "big")


def digest_of(model: Transformer) -> str:
    """Returns a hash of 64 values of each parameter, the same on every mesh."""

    def places_of(leaf: jax.Array) -> np.ndarray:
        return np.linspace(0, leaf.size - 1, 64).astype(int)

    @jax.jit
    def values(model: Transformer) -> list[jax.Array]:
        return [
            leaf[np.unravel_index(places_of(leaf), leaf.shape)]
            for leaf in jax.tree.leaves(model)
        ]

    arrays = [np.asarray(array, np.float32) for array in values(model)]
    return _sha256(b"".join(array.tobytes() for array in arrays)).hex()


def read_rows(
    path: str | Path, defaults: Mapping[str, Any], model_digest: str = ""
) -> list[Row]:
    """Reads the input. A line that is not a request becomes a Row with an error.

    Args:
      path: the prompts file. Blank lines are skipped, but counted.
      defaults: options for rows that do not give them. Its `seed` (default 0) is the
        run's seed, see `row_seed`.
      model_digest: becomes part of the rows' digests.
    Raises ConfigError if the file cannot be read or a default is not accepted.
    """
    sampling.make_params(
        **{
            name: value
            for name, value in defaults.items()
            if name in sampling.PARAMETERS
        }
    )
    try:
        with open(path, "rb") as file:
            return [
                _row(number - 1, value, defaults, model_digest)
                for number, value in read_jsonl(file)
            ]
    except OSError as error:
        raise ConfigError(
            f"prompts-file={str(path)!r} cannot be read: {error.strerror}"
        ) from None


def _row(index: int, value: Any, defaults: Mapping[str, Any], model_digest: str) -> Row:
    """Returns the Row of a line. value: its JSON value, or the error of reading it."""
    error = None
    if isinstance(value, ValueError):
        error = str(value)
    elif not isinstance(value, dict):
        error = "it is not a JSON object"
    elif "messages" in value:
        if "prompt" in value:
            error = "it has both prompt and messages"
    elif "prompt" not in value:
        error = "it has no prompt"
    elif not _is_prompt(value["prompt"]):
        error = "its prompt is not accepted: it must be text, or a list of ids"
    seed = row_seed(int(defaults.get("seed", 0)), index)
    options: dict[str, Any] = {**defaults, "seed": seed}
    if isinstance(value, dict):
        options |= value
    content = options if error is None else [error, repr(value)]
    text = json.dumps(content, sort_keys=True, default=repr) + model_digest
    digest = _sha256(text.encode())
    return Row(index, digest.hex()[:16], options, error)


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def prepare_out(out: str | Path, prompts: str | Path, rows: list[Row]) -> set[int]:
    """Prepares the output file for new lines. Returns the indices of the rows in it.

    It removes from the file: a last line that is incomplete because a run was killed;
    error records of rows that changed since; error records of a failed device. All
    other content stays.

    Raises ConfigError, before it changes anything, if the file is the prompts file or
    holds anything else than outputs for these rows.
    """
    out, prompts = Path(out), Path(prompts)
    if not out.exists():
        return set()
    if prompts.exists() and out.samefile(prompts):
        raise _refusal(out, "it is the prompts file")
    if not out.is_file():
        raise _refusal(out, "it is not a file")
    content = out.read_bytes()
    *lines, cut_line = content.split(b"\n")
    rows_by_index = {row.index: row for row in rows}
    lines_to_keep: list[bytes] = []
    indices: set[int] = set()
    for number, line in enumerate(lines, 1):
        record = _parse_record(line)
        if record is None:
            raise _refusal(out, f"its line {number} is no output of this command")
        row = rows_by_index.get(record["index"])
        is_same = row is not None and row.digest == record["digest"]
        if "error" in record and (not is_same or record.get("retry")):
            continue
        if not is_same:
            raise _refusal(
                out,
                f"its line {number} is the output for another prompt or other options "
                f"than line {record['index'] + 1} of the prompts file has, or of "
                "another model",
            )
        lines_to_keep.append(line)
        indices.add(record["index"])
    if cut_line and not any(_begins_record(cut_line, row) for row in rows):
        raise _refusal(out, "its last line is no output of this command")
    new_content = b"".join(line + b"\n" for line in lines_to_keep)
    if new_content != content:
        _replace(out, new_content)
    return indices


def _refusal(out: Path, reason: str) -> ConfigError:
    """Returns the error for an output file that is not accepted."""
    return ConfigError(f"out={str(out)!r} is not accepted: {reason}; choose a new file")


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """Returns an output line as a dict, or None if this command did not write it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not ("text" in record or "error" in record):
        return None
    is_record = type(record.get("index")) is int and type(record.get("digest")) is str
    return record if is_record else None


def _begins_record(cut_line: bytes, row: Row) -> bool:
    """Whether `cut_line` is the beginning of the row's output line."""
    start = row.record_start()
    return cut_line.startswith(start) or start.startswith(cut_line)


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file's content at once: a crash leaves the old or the new one."""
    path = path.resolve()
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(new, "xb") as file:
            file.write(content)
        shutil.copymode(path, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def run(
    engine: Engine,
    prompts: str | Path,
    out: str | Path,
    defaults: Mapping[str, Any],
    show: bool = True,
    model: Transformer | None = None,
) -> Summary:
    """Generates outputs for all rows of `prompts` that the file `out` lacks.

    Args:
      engine: decodes the requests; this function takes its steps. As nobody waits for
        single tokens, `decode.burst_ms` of 0 suits it.
      prompts: the input file.
      out: the output file; it and its folder are created if needed.
      defaults: options of `Engine.submit` for rows that do not give them; `seed` is
        the seed of the run, see `row_seed`.
      show: whether to show a progress bar on stderr.
      model: the engine's model. With it, the outputs of another model are refused.
    Raises ConfigError, before anything is generated or written, if a file or a default
    is not accepted. A row that is not accepted becomes an error record.
    """
    out = local_path(out, "out")
    prompts = local_path(prompts, "prompts-file")
    with groups.of_this_run() as group:
        rows = read_rows(prompts, defaults, "" if model is None else digest_of(model))
        if group is None:
            with Lease(out.parent, "out", output=out):
                indices = prepare_out(out, prompts, rows)
                return _add_missing(engine, rows, out, indices, show)
        with contextlib.ExitStack() as stack, groups.telling(group):
            digests = " ".join(row.digest for row in rows)
            values = dict(prompts=_sha256(digests.encode()).hex()[:12])
            group.together("prompts", lambda: values, dict)
            indices = _indices_for_all(group, stack, out, prompts, rows)
            # All compute all rows, since each has a part of the model; one writes.
            leads = group.number == 0
            target = out if leads else Path(os.devnull)
            return _add_missing(engine, rows, target, indices, show and leads)


def _indices_for_all(
    group: groups.Group,
    stack: contextlib.ExitStack,
    out: Path,
    prompts: str | Path,
    rows: list[Row],
) -> set[int]:
    """The rows that the output file has, as process 0 sees it, in all processes.

    Process 0 also takes the lease on the file, until `stack` ends.
    """
    found: list[int] = []

    def prepare() -> None:
        if group.number == 0:
            lease = stack.enter_context(Lease(out.parent, "out", output=out))
            group.at_end.append(lease.__exit__)
            found.extend(prepare_out(out, prompts, rows))

    group.together("out", prepare)
    return set(json.loads(group.from_first("rows", lambda: json.dumps(found))))


def _add_missing(
    engine: Engine, rows: list[Row], out: Path, indices_in_out: set[int], show: bool
) -> Summary:
    """Appends the outputs of the rows that the output file lacks, as they finish."""
    missing = [row for row in rows if row.index not in indices_in_out]
    generated = failed = 0
    before = len(indices_in_out)
    bar = tqdm(total=len(rows), initial=before, unit="prompt", disable=not show)
    # UTF-8 cannot encode half of a surrogate pair. backslashreplace writes it as JSON
    # does: "\udc80".
    file = open(out, "a", encoding="utf-8", errors="backslashreplace", newline="\n")
    with file, bar, contextlib.closing(_generate(engine, missing)) as outputs:
        for row, values in outputs:
            file.write(row.record(values))
            file.flush()
            generated += 1
            failed += "error" in values
            bar.set_postfix_str(f"{engine.counters.tokens} tokens", refresh=False)
            bar.update()
    return Summary(generated, before, failed)


def _generate(
    engine: Engine, rows: list[Row]
) -> Generator[tuple[Row, dict[str, Any]], None, None]:
    """Yields (row, the values of its output line) as requests finish."""
    waiting = deque(rows)
    running: list[tuple[Row, Request]] = []
    slots = engine.options.slots or 1
    most_running = max(1, min(engine.options.queue_size, 4 * slots))
    submit_options = _chat_prompts(engine)
    try:
        while waiting or running:
            while waiting and len(running) < most_running:
                row = waiting[0]
                if row.error is not None:
                    yield waiting.popleft(), _error_values(row, row.error)
                    continue
                try:
                    request = engine.submit(**submit_options(row.options))
                except QueueFull:  # another client filled the queue
                    break
                except EngineFailed:  # the next run generates the other rows
                    raise
                except Exception as error:  # the other rows are still generated
                    check_interrupted(error)
                    yield waiting.popleft(), _error_values(row, error)
                    continue
                running.append((waiting.popleft(), request))
            if running or waiting:
                engine.step()
            finished = [(row, request) for row, request in running if request.finish]
            running = [(row, request) for row, request in running if not request.finish]
            for row, request in finished:
                yield row, _output_values(row, request)
    finally:
        for _, request in running:
            request.cancel()


def _chat_prompts(engine: Engine) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns a function that replaces `messages` among the options of a row.

    The prompt and the ids that end an answer are those of the tokenizer's template.
    """

    @functools.cache
    def encoder() -> ChatEncoder:
        if engine.tokenizer is None:
            raise ConfigError("messages need a tokenizer, and this engine has none")
        return ChatEncoder(engine.tokenizer)

    def replace(options: dict[str, Any]) -> dict[str, Any]:
        if "messages" not in options:
            return options
        others = {name: v for name, v in options.items() if name != "messages"}
        if others.get("stop_token_ids") is None and not others.get("ignore_eos"):
            end_ids = encoder().end_ids[: engine.options.max_stop_ids]
            others["stop_token_ids"] = list(end_ids)
        return others | dict(prompt=encoder().prompt(options["messages"]))

    return replace


def _output_values(row: Row, request: Request) -> dict[str, Any]:
    """Returns the values of a finished request's output line."""
    try:
        tokens = list(request)
    except RequestFailed as error:
        return _error_values(row, error) | dict(retry=True)
    values: dict[str, Any] = dict(
        text=request.text, tokens=request.tokens, finish=request.finish
    )
    submission = request.submission
    if submission.logprobs is not None:
        tokens = [token for token in tokens if token.id is not None]
        values["logprobs"] = [token.logprob for token in tokens]
        if submission.logprobs:
            values["top_logprobs"] = [token.top for token in tokens]
    if submission.prompt_logprobs is not None:
        entries = request.prompt_logprobs
        values["prompt_logprobs"] = [entry and entry[0] for entry in entries]
        if submission.prompt_logprobs:
            values["prompt_top_logprobs"] = [entry and entry[1] for entry in entries]
    return values


def _error_values(row: Row, error: Exception | str) -> dict[str, Any]:
    """Returns the values of the output line of a row that failed."""
    message = " ".join(str(error).split()) or type(error).__name__
    return dict(error=f"line {row.line}: {message}")
