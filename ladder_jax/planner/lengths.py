"""Plans a decode step over requests of mixed lengths: `ladder-jax plan --lengths`.

A file says how many tokens live requests have:

- TOML names a distribution of `ladder-jax bench decode`, with the tokens of its longest
  prompt and output (configs/workloads/sharegpt.toml). A slot then has a request at a
  random step of its output, so long outputs are more frequent than in the traffic.
- JSONL has a line for each live request: a number of tokens.

The batch has evenly spaced quantiles of them: its lengths are the same in every plan.

With rows, attention reads all slots to the compiled length that the longest live
request needs. With pages it reads the pages that hold a live token, by a kernel
(page_kernels.py). Both steps are compiled; the one with pages has requests of the mean
length. Where no kernel fits the model, it is compiled with rows of that length instead.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ladder_jax.bench.workloads import WORKLOADS, make_workload
from ladder_jax.config import ConfigError, require
from ladder_jax.page_kernels import PAGE_SIZES
from ladder_jax.planner import tables
from ladder_jax.planner.plan import Request
from ladder_jax.serve import reads
from ladder_jax.serve.buckets import bucket_sizes, round_up
from ladder_jax.serve.capacity import SHORTEST_LENGTH

FIELDS = {"distribution": str, "prompt": int, "most": int, "seed": int}
SAMPLE = 2000  # requests of a distribution that are drawn


class Mixed(NamedTuple):
    """The lengths of the live requests of a decode step."""

    name: str  # the file
    lengths: np.ndarray  # of the batch's rows, in tokens, ascending
    longest: int  # tokens that a slot must have room for
    most: int  # tokens of the model's longest request

    @property
    def row_length(self) -> int:
        """The compiled length of a step with rows."""
        return _compiled(int(self.lengths.max()), self.most)

    @property
    def page_length(self) -> int:
        """The mean of the lengths in whole pages, and in whole pages itself."""
        size = PAGE_SIZES["xla"]
        mean = reads.in_pages(self.lengths, size) / len(self.lengths)
        return -(-round(mean) // size) * size


def _compiled(length: int, most: int) -> int:
    """The length that an engine compiles for rows with so many tokens."""
    return round_up(bucket_sizes(min(SHORTEST_LENGTH, most), most), length)


def read(path: str, batch: int, most: int) -> Mixed:
    """Reads the file of `--lengths`.

    Args:
      path: ends in .toml or .jsonl.
      batch: rows.
      most: tokens of the model's longest request.
    Raises ConfigError where the file is not accepted.
    """
    require(path.endswith((".toml", ".jsonl")), "lengths", path, "a .toml or .jsonl")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"lengths={path!r} cannot be read: {error}") from None
    of_live = _of_toml(path, text) if path.endswith(".toml") else _of_lines(path, text)
    longest = int(of_live.max())
    if longest > most:
        raise ConfigError(
            f"lengths={path!r} has a request of {longest} tokens, but "
            f"model.max_length={most}"
        )
    shares = (np.arange(batch) + 0.5) / batch
    lengths = np.quantile(of_live, shares, method="inverted_cdf").astype(int)
    return Mixed(path, lengths, longest, most)


def _of_toml(path: str, text: str) -> np.ndarray:
    """The tokens of live requests of a distribution."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"lengths={path!r} is not TOML: {error}") from None
    for name, value in values.items():
        require(name in FIELDS, f"{path}: {name}", value, f"one of {', '.join(FIELDS)}")
        is_right = type(value) is FIELDS[name] and (value or name == "seed")
        require(is_right, f"{path}: {name}", value, f"of type {FIELDS[name].__name__}")
    missing = {"distribution", "prompt", "most"} - values.keys()
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}")
    kind, prompt, most = values["distribution"], values["prompt"], values["most"]
    require(kind in WORKLOADS, "distribution", kind, f"one of {', '.join(WORKLOADS)}")
    for name in ("prompt", "most"):
        require(values[name] >= 1, f"{path}: {name}", values[name], "1 or more")
    requests = make_workload(
        kind,
        requests=SAMPLE,
        prompt=prompt,
        outputs=(1, most),
        length=prompt + most,
        vocabulary=1,
        seed=values.get("seed", 0),
    )
    # A step reads the prompt and the tokens of the output that it does not generate.
    return np.concatenate(
        [len(one.prompt) + np.arange(1, max(one.max_tokens, 2)) for one in requests]
    )


def _of_lines(path: str, text: str) -> np.ndarray:
    """The numbers of a JSONL file."""
    lengths = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = line
        is_length = type(value) is int and value >= 1
        require(is_length, f"{path}, line {number}", value, "tokens, 1 or more")
        lengths.append(value)
    if not lengths:
        raise ConfigError(f"lengths={path!r} has no line")
    return np.array(lengths)


# ---------------------------------------------------------------- the figures


def requests_of(request: Request, mixed: Mixed, has_kernel: bool) -> dict[str, Request]:
    """The two steps to compile: with keys and values in rows, and in pages.

    has_kernel: whether a kernel reads pages of this model on these devices.
    """
    rows = request._replace(context=mixed.row_length, kv_layout="rows", tokens=None)
    pages = rows._replace(context=mixed.page_length)
    if has_kernel:
        alive = int(mixed.lengths.sum())
        pages = rows._replace(kv_layout="pages", tokens=alive)
    return dict(rows=rows, pages=pages)


def compare(mixed: Mixed, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The steps with rows and with pages, ready for JSON.

    Args:
      mixed: the lengths.
      reports: of the steps of `requests_of`, see report.make_report.
    Returns the lengths, and figures for "rows" and "pages": `tokens_read` in a step,
    their `kv_read_bytes` on a device, `kv_share` of these and the weights' bytes, the
    `slots` that fit beside weights and temporaries, without staging (with rows each has
    room for the longest request, with pages for the mean one), and `step_us`.
    """
    rows, before = len(mixed.lengths), reports["rows"]["memory"]
    # Over all rows: each device has some of the heads and, with replicas, of the rows.
    token_bytes = before["kv_bytes"] / reports["rows"]["cache"]["tokens_read"]

    def figures(layout: str) -> dict[str, Any]:
        report = reports[layout]
        memory, tokens = report["memory"], report["cache"]["tokens_read"]
        read_bytes = tokens * token_bytes
        free = memory["capacity_bytes"] - memory["weights_bytes"]
        free -= memory["temporary_bytes"]
        slot = mixed.longest if layout == "rows" else tokens / rows
        return dict(
            tokens_read=tokens,
            kv_read_bytes=round(read_bytes),
            kv_share=read_bytes / (read_bytes + memory["weights_bytes"]),
            slots=max(int(free / (slot * token_bytes)), 0),
            step_us=report["totals"]["step_us"],
        )

    return dict(
        file=mixed.name,
        tokens_alive=int(mixed.lengths.sum()),
        shortest=int(mixed.lengths.min()),
        longest=int(mixed.lengths.max()),
        kernel=reports["pages"]["cache"]["kernel"],
        rows=figures("rows"),
        pages=figures("pages"),
    )


COLUMNS = [
    tables.Column("keys and values in", lambda row: row["layout"], left=True),
    tables.Column("tokens read", tables.number("tokens_read", ",")),
    tables.Column("read/alive", tables.number("read_over_alive", ".2f")),
    tables.Column("MB read", lambda row: f"{row['kv_read_bytes'] / 1e6:,.1f}"),
    tables.Column("of the traffic", tables.number("kv_share", ".1%")),
    tables.Column("slots that fit", tables.number("slots", ",")),
    tables.Column("step us", tables.number("step_us", ",.1f")),
]


def text(mixed: dict[str, Any]) -> str:
    """What `compare` returns as text: a line for rows, a line for pages."""
    rows = [
        mixed[layout]
        | dict(
            layout=layout,
            read_over_alive=mixed[layout]["tokens_read"] / mixed["tokens_alive"],
        )
        for layout in ("rows", "pages")
    ]
    gain = mixed["rows"]["step_us"] / mixed["pages"]["step_us"]
    how = "compiled with rows of the mean length, as no kernel fits"
    if mixed["kernel"]:
        how = (
            f"XLA does not estimate its kernel {mixed['kernel']}, whose time is that "
            "of HBM for the bytes it reads"
        )
    return "\n".join(
        [
            f"{mixed['tokens_alive']:,} live tokens, requests of {mixed['shortest']:,} "
            f"to {mixed['longest']:,} ({mixed['file']}); a device:",
            tables.text_table(COLUMNS, rows),
            f"the step with pages is {gain:.2f}x as fast; {how}",
        ]
    )
