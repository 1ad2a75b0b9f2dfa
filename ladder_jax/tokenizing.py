"""The command `tokenize`: tokenises a corpus before a run, lists and removes caches."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ladder_jax.arguments import FLAT
from ladder_jax.config import Config, ConfigError, require
from ladder_jax.data import corpus, token_cache
from ladder_jax.data import tokenizer as tokenizers
from ladder_jax.data.token_cache import Entry

Say = Callable[[str], None]


@dataclass(frozen=True)
class Arguments:
    """Tokenises the corpus of a recipe, so that a run finds the tokens. It takes the
    options of train. To share the work, start the same command on several hosts that
    see the same data.token_cache; stopped, it goes on where it was."""

    config: Config = field(default_factory=Config, metadata=FLAT)
    workers: int | None = None
    """Processes that tokenise on this host. None: one for each core."""
    list: bool = False
    """List the token caches in data.token_cache. Needs no recipe."""
    remove: tuple[str, ...] = ()
    """Remove token caches: names that --list shows, or their first letters; old (of
    older versions), unfinished, or all. No run may read them. Needs no recipe."""


def run(arguments: Arguments) -> str:
    """Does what the arguments say. Returns the last line.

    Raises ConfigError on a mistake; RuntimeError, one line, where a worker dies.
    """
    config = arguments.config
    root = Path(config.data.token_cache).expanduser()
    if arguments.list:
        return table(root)
    if arguments.remove:
        return remove(root, arguments.remove)
    workers = arguments.workers
    require(workers is None or workers >= 1, "workers", workers, "1 or more")
    start = time.monotonic()
    say = lambda text: print(text, file=sys.stderr, flush=True)
    made = corpus.prepare(config.data, _tokenizer(config), workers, say)
    seconds = time.monotonic() - start
    return f"{made.report}\ndone: {seconds:.1f} s, tokens in {root}"


def _tokenizer(config: Config) -> tokenizers.Tokenizer:
    """The tokenizer that a run of `config` would have."""
    if not config.train.init_from:
        return tokenizers.load(config.data.tokenizer)
    from ladder_jax import initial, mirror  # they import JAX

    out = mirror.work_folder(config.train)
    return initial.resolve(config, out, saved=False).tokenizer


def table(root: Path) -> str:
    """The caches in a folder, a line each, and their size together."""
    entries = token_cache.entries(root)
    lines = [
        f"{entry.name}  {entry.size / 1e6:10,.1f} MB  "
        f"{time.strftime('%Y-%m-%d', time.localtime(entry.time))}  {_state(entry)}"
        for entry in entries
    ]
    total = sum(entry.size for entry in entries) / 1e6
    return "\n".join(
        [*lines, f"{len(entries)} token caches, {total:,.1f} MB in {root}"]
    )


def _state(entry: Entry) -> str:
    if entry.is_old:
        return "of an older version, not used"
    if entry.documents is None:
        return "unfinished"
    return f"{entry.documents:,} documents of {entry.source}"


def remove(root: Path, names: Sequence[str]) -> str:
    """Removes caches; see `Arguments.remove`. Raises ConfigError on an unknown name."""
    entries = token_cache.entries(root)
    chosen: dict[str, Entry] = {}
    for name in names:
        kinds = {
            "all": entries,
            "old": [entry for entry in entries if entry.is_old],
            "unfinished": [e for e in entries if e.documents is None and not e.is_old],
        }
        short = name.removeprefix(token_cache.PREFIX)
        found = kinds.get(name)
        if found is None:
            found = [e for e in entries if short and e.name.startswith(short)]
            if len(found) != 1:
                raise ConfigError(
                    f"remove={name!r} is not accepted: it is the name of "
                    f"{len(found)} token caches in {root}; it must be one that --list "
                    "shows, old, unfinished or all"
                )
        chosen |= {entry.name: entry for entry in found}
    for entry in chosen.values():
        # First by its name: a cache is never complete without some of its shards.
        folder = root / f"{token_cache.PREFIX}{entry.name}"
        aside = folder.with_name(f"{folder.name}.removed-{os.getpid()}")
        folder.rename(aside)
        shutil.rmtree(aside)
    size = sum(entry.size for entry in chosen.values()) / 1e6
    return f"done: removed {len(chosen)} token caches, {size:,.1f} MB, from {root}"
