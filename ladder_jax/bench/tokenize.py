"""Measures how fast a corpus becomes tokens: `ladder-jax bench tokenize`.

The corpus is Python's documentation, again and again, as JSON Lines. "a core" is MB of
files a second of processor time, all processes together. Peak memory is that of the
largest worker. A second start opens the cache; a start after `touch` hashes every file
again and finds the same cache.
"""

import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladder_jax.bench import machine
from ladder_jax.config import Data, require
from ladder_jax.data import corpus, file_digests, token_cache
from ladder_jax.data import tokenizer as tokenizers
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.planner.tables import Column, text_table

FILES = 8


@dataclass(frozen=True)
class Arguments:
    """Measures tokenising: MB/s, MB/s a core, peak memory, the second start."""

    megabytes: int = 100
    """The size of the corpus."""
    vocab_size: int = 8192
    """Of the BPE tokenizer that is trained on a part of it, beside bytes."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of processes, in turn. 1: no process of its own, but threads of the
    tokenizers library."""


def run(arguments: Arguments) -> None:
    """Prints the machine and a table."""
    megabytes = arguments.megabytes
    require(megabytes >= 1, "megabytes", megabytes, "1 or more")
    texts = list(corpus.documents(Data()))
    bpe = tokenizers.train(texts, arguments.vocab_size)
    print(f"{machine.cpu_name()}, {token_cache.cores()} cores", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        write(source, texts, megabytes)
        for name, tokenizer in (("bytes", tokenizers.ByteTokenizer()), ("BPE", bpe)):
            for workers in arguments.workers:
                cache = Path(folder, f"{name}-{workers}")
                rows.append(measure(source, cache, name, tokenizer, workers))
    print(text_table(COLUMNS, rows))


def write(folder: Path, texts: list[str], megabytes: int) -> None:
    """Writes files of together about so many MB; no document occurs twice."""
    folder.mkdir()
    for number in range(FILES):
        with open(folder / f"{number}.jsonl", "w", encoding="utf-8") as file:
            for line in _lines(texts, number):
                file.write(line)
                if file.tell() >= megabytes * 1e6 / FILES:
                    break


def _lines(texts: list[str], number: int) -> Iterator[str]:
    count = 0
    while True:
        for text in texts:
            count += 1
            yield json.dumps(dict(text=f"{number}.{count}\n{text}")) + "\n"


def measure(
    source: Path, cache: Path, name: str, tokenizer: Tokenizer, workers: int
) -> dict[str, Any]:
    """The row of the table of one tokenizer and number of workers."""
    data = Data(source=str(source), token_cache=str(cache))
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e6
    time.sleep(file_digests.FRESH_S)  # digests of newer files are not stored

    def start() -> float:
        begin = time.monotonic()
        token_cache.open_cache(data, tokenizer, workers)
        return time.monotonic() - begin

    used = _processor_s()
    first_s = start()
    used = _processor_s() - used
    second_s = start()
    for path in source.iterdir():
        path.touch()
    who = resource.RUSAGE_SELF if workers == 1 else resource.RUSAGE_CHILDREN
    return dict(
        tokenizer=name,
        workers=workers,
        rate=size / first_s,
        core_rate=size / used,
        memory=resource.getrusage(who).ru_maxrss * 1024 / 1e6,
        second_s=second_s,
        touched_s=start(),
    )


def _processor_s() -> float:
    """Seconds of processor time of this process and of those that it waited for."""
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


COLUMNS = [
    Column("tokenizer", lambda row: row["tokenizer"], left=True),
    Column("workers", lambda row: str(row["workers"])),
    Column("MB/s", lambda row: f"{row['rate']:.2f}"),
    Column("a core", lambda row: f"{row['core_rate']:.2f}"),
    Column("peak MB", lambda row: f"{row['memory']:.0f}"),
    Column("second start s", lambda row: f"{row['second_s']:.2f}"),
    Column("after touch s", lambda row: f"{row['touched_s']:.2f}"),
]
