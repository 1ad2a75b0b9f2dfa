"""Tokenising as a job: the same cache whoever writes it, and after any interruption."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import code_environment, write_files
from workers import Workers

from ladder_jax.config import ConfigError, Data
from ladder_jax.data import (
    file_digests,
    formats,
    token_cache,
    token_units,
    tokenizer,
)
from ladder_jax.data.corpus import documents, prepare
from ladder_jax.data.formats import Part, Tally

TOK = tokenizer.ByteTokenizer()
UNIT = 3000  # bytes


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(token_units, "SMALLEST", UNIT)


def write_source(folder):
    """Text, compressed and not, and JSON Lines of several units, some rows broken."""
    numbers = random.Random(0)
    text = lambda: "".join(numbers.choices("abc é\n", k=numbers.randint(1, 400)))
    rows = [json.dumps(dict(text=text()), ensure_ascii=False) for _ in range(80)]
    rows[7], rows[40] = "{broken", json.dumps(dict(other="x"))
    lines = "\r\n".join(rows).encode()
    files = {f"{i:02}.txt": text() for i in range(30)}
    files |= {"m.jsonl": lines, "n.jsonl.gz": gzip.compress(lines), "z.txt": "end"}
    return write_files(folder, files | {"empty.txt": "", "zero.bin": b"\0" * 9000})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "in")


def data(source, cache, **fields):
    own = dict(source=str(source), token_cache=str(cache), held_out_fraction=0.3)
    return Data(**own | fields)


def contents(cache):
    """Every file of the only cache in a folder, by its name."""
    (folder,) = cache.glob("tokens-*")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The contents of the cache that one process writes."""
    cache = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_units, "SMALLEST", UNIT)
        corpus = prepare(data(source, cache), TOK, workers=1)
    found = contents(cache)
    assert len(found) > 20 and not [name for name in found if "claim" in name]
    return corpus, found


def texts(side):
    return [
        bytes(side.ids[start + 1 : start + targets].astype(np.uint8)).decode()
        for start, targets in zip(side.starts_D, side.targets_D)
    ]


def test_shards_have_the_documents_of_the_source_in_order(source, alone):
    corpus, _ = alone
    for held_out, side in ((False, corpus.train), (True, corpus.held_out)):
        expected = list(documents(data(source, "unused"), held_out))
        assert texts(side) == expected and len(expected) > 20
    for part in ("2 rows that are not JSON", "2 rows without", "1 files that are not"):
        assert part in corpus.report
    # One shard of all of it has the same ids and digest.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_units, "SMALLEST", 1 << 30)
        patch.setattr(token_cache, "FORMAT", -1)
        whole = prepare(data(source, source.parent / "whole"), TOK)
    np.testing.assert_array_equal(whole.train.ids, corpus.train.ids)
    assert whole.digest == corpus.digest and whole.report == corpus.report


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_cache(source, alone, tmp_path, workers):
    corpus = prepare(data(source, tmp_path), TOK, workers=workers)
    assert contents(tmp_path) == alone[1] and corpus.report == alone[0].report


HOST = """
import sys
from ladder_jax.config import Data
from ladder_jax.data import corpus, token_shard, token_units, tokenizer
source, cache, unit, workers, slow = sys.argv[1:]
token_units.SMALLEST = int(unit)
data = Data(source=source, token_cache=cache, held_out_fraction=0.3)
write = token_shard.write
def slow_write(*arguments):
    import time
    time.sleep(float(slow))
    write(*arguments)
    print("wrote", flush=True)
token_shard.write = slow_write
print(corpus.prepare(data, tokenizer.ByteTokenizer(), int(workers)).digest)
"""


def start(source, cache, workers=1, slow=0.0, **options):
    words = [source, cache, UNIT, workers, slow]
    return subprocess.Popen(
        [sys.executable, "-c", HOST, *map(str, words)],
        env=code_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_hosts_share_the_work(source, alone, tmp_path):
    hosts = [start(source, tmp_path, slow=0.05) for _ in range(3)]
    outputs = [host.communicate(timeout=100) for host in hosts]
    assert [host.returncode for host in hosts] == [0] * 3, outputs
    assert {out.split()[-1] for out, _ in outputs} == {alone[0].digest}
    assert contents(tmp_path) == alone[1]
    shards = sum(name.endswith("ids.bin") for name in alone[1])
    assert sum(out.count("wrote") for out, _ in outputs) == shards


TRAIN = """
from ladder_jax.config import Data
from ladder_jax.data import token_cache, token_shard, token_units, tokenizer
from ladder_jax.preparation import prepare_corpus

token_units.SMALLEST = int(os.environ["UNIT"])
token_cache.cores = lambda: count  # each process tokenises without a worker
data = Data(os.environ["SOURCE"], token_cache=str(folder), held_out_fraction=0.3)
write, wrote = token_shard.write, 0

def slow_write(*arguments):
    global wrote
    time.sleep(0.05)
    write(*arguments)
    wrote += 1

token_shard.write = slow_write
with group, groups.telling(group):
    assert group.on_this_host() == count
    print(prepare_corpus(data, tokenizer.ByteTokenizer()).digest, wrote)
"""


def test_the_processes_of_a_run_share_the_work(source, alone, tmp_path):
    values = dict(SOURCE=str(source), UNIT=str(UNIT))
    with Workers(tmp_path, TRAIN, 2, **values) as workers:
        assert workers.statuses(100) == [0, 0], workers.text(0) + workers.text(1)
        digests, wrote = zip(*(workers.text(n, "out").split() for n in range(2)))
    assert set(digests) == {alone[0].digest}
    shards = sum(name.endswith("ids.bin") for name in alone[1])
    assert sum(map(int, wrote)) == shards and "0" not in wrote


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_it_goes_on(source, alone, tmp_path, workers):
    """Each process is killed at a random time after it finished some shards."""
    pick, kills, kept = random.Random(workers), 4, 0
    shards = lambda: len(list(tmp_path.glob("tokens-*/??????/about.json")))
    while True:
        process = start(source, tmp_path, workers, slow=0.03)
        due = kept + pick.randint(1, 4)
        while process.poll() is None and (not kills or shards() < due):
            time.sleep(0.001)
        time.sleep(pick.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert shards() >= kept
        kept = shards()
        if process.returncode == 0:
            break
        kills -= 1
        assert process.returncode == -signal.SIGKILL and kills >= 0
    assert contents(tmp_path) == alone[1] and kills < 4


def children(pid):
    text = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(word) for word in text.stdout.split()]


def test_a_worker_that_dies_ends_the_job_in_one_line(
    source, alone, tmp_path, monkeypatch
):
    started = token_cache.Worker.__init__
    seen = []

    def init(worker, job):
        started(worker, job)
        seen.append(worker._process)
        os.kill(worker._process.pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache.Worker, "__init__", init)
        with pytest.raises(
            RuntimeError, match="killed by SIGKILL .* fewer --workers"
        ) as e:
            prepare(data(source, tmp_path), TOK, workers=2)
    assert "\n" not in str(e.value) and "finished shards are kept" in str(e.value)
    assert [process.poll() for process in seen] == [-9, -9]  # none is left
    prepare(data(source, tmp_path), TOK, workers=2)
    assert contents(tmp_path) == alone[1]


def test_workers_end_with_their_parent(source, tmp_path):
    write_files(tmp_path / "in", {f"{i}.txt": "x" * 2_000_000 for i in range(40)})
    process = start(tmp_path / "in", tmp_path / "cache", workers=2)
    while len(workers := children(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}/cmdline") for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_import_no_jax():
    code = "import sys, ladder_jax.data.token_worker\n"
    code += "print([m for m in ('jax', 'flax', 'grain', 'orbax') if m in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=code_environment(),
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "[]\n", ended


# ---------------------------------------------------------------- by contents


class Refusing(tokenizer.ByteTokenizer):
    def encode_batch(self, texts):
        raise AssertionError("tokenised again")


def test_touch_move_and_rename_keep_the_cache(source, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    cache = tmp_path / "cache"
    before = prepare(data(folder, cache), TOK, workers=1)
    for path in folder.iterdir():
        path.touch()
    assert prepare(data(folder, cache), Refusing()).digest == before.digest
    folder = folder.rename(tmp_path / "elsewhere")
    assert prepare(data(folder, cache), Refusing()).digest == before.digest
    (folder / "z.txt").rename(folder / "zz.txt")
    assert prepare(data(folder, cache), Refusing()).digest == before.digest
    # Another order, another content of the same size and time, another kind.
    (folder / "zz.txt").rename(folder / "00a.txt")
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare(data(folder, cache), Refusing(), workers=1)
    (folder / "00a.txt").rename(folder / "z.jsonl")
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare(data(folder, cache), Refusing(), workers=1)


def test_an_unchanged_file_is_hashed_once(source, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    old = time.time_ns() - 10**12
    for path in folder.iterdir():
        os.utime(path, ns=(old, old))
    files = sorted(folder.iterdir())
    first = file_digests.digests(files, tmp_path)
    hashed, digest = [], file_digests._digest
    monkeypatch.setattr(
        file_digests, "_digest", lambda path: hashed.append(path) or digest(path)
    )
    assert file_digests.digests(files, tmp_path) == first and hashed == []
    files[3].write_bytes(files[3].read_bytes()[::-1])  # of the same size
    # A line that two hosts wrote at the same place does not count.
    with open(tmp_path / file_digests.NAME, "a") as file:
        file.write('["x", 1\n[]\n5\n')
    second = file_digests.digests(files, tmp_path)
    assert hashed == [files[3]] and second[3].digest != first[3].digest
    # It has just changed, and may change again at the same time: it is not stored.
    assert file_digests.digests(files, tmp_path) == second
    assert hashed == [files[3]] * 2


def test_a_file_that_changes_meanwhile_ends_the_job(source, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    plan = token_units.plan

    def late(files, divide):
        units = plan(files, divide)
        (folder / "05.txt").write_text("another text")
        return units

    monkeypatch.setattr(token_units, "plan", late)
    for workers in (1, 2):
        (folder / "05.txt").write_text(f"text {workers}")
        with pytest.raises(RuntimeError, match="05.txt was changed while it was tok"):
            prepare(data(folder, tmp_path / "cache"), TOK, workers=workers)


def test_a_damaged_shard_is_written_again_alone(source, alone, tmp_path):
    prepare(data(source, tmp_path), TOK, workers=1)
    (folder,) = tmp_path.glob("tokens-*")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("ids.bin")}
    (folder / "000003/ids.bin").write_bytes(b"damage")
    shutil.rmtree(folder / "000005")
    corpus = prepare(data(source, tmp_path), TOK, workers=1)
    assert "has been mended: " in corpus.report and "000003/ids.bin" in corpus.report
    assert contents(tmp_path) == alone[1]
    changed = {p.parent.name for p, t in times.items() if p.stat().st_mtime_ns != t}
    assert changed == {"000003", "000005"}


def test_an_address_is_no_folder_for_a_cache():
    for address in ("gs://bucket/cache", "s3://bucket"):
        message = "data.token_cache='.*' is not accepted: it must be a folder"
        with pytest.raises(ConfigError, match=message) as error:
            Data(token_cache=address)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- parts of files


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"", b"\n\n"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_parts_of_json_lines_have_its_rows_in_order(tmp_path, end, count):
    rows = [json.dumps(dict(text="x" * (i * i % 23))).encode() for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(rows) + end)
    read = lambda part: list(formats.read_file(part, "text", Tally()))
    parts = [read(Part(path, i, count)) for i in range(count)]
    assert sum(parts, []) == read(Part(path)) == [json.loads(r)["text"] for r in rows]
    assert formats.most_parts(path) is None


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_of_parquet_have_its_rows_in_order(tmp_path, count):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    values = [f"text {i}" if i % 9 else None for i in range(100)]
    parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=17)
    assert formats.most_parts(path) == 6
    tally, whole = Tally(), Tally()
    parts = [
        list(formats.read_file(Part(path, i, count), "text", tally))
        for i in range(count)
    ]
    assert sum(parts, []) == list(formats.read_file(Part(path), "text", whole))
    assert tally.left_out == whole.left_out and sum(tally.left_out.values()) == 12


def test_units_cover_every_file_once_in_order(source):
    files = [(path, path.stat().st_size, 0) for path in sorted(source.iterdir())]
    units = token_units.plan(files)
    parts = [file.part for unit in units for file in unit]
    assert [p.path for p in parts if p.index == 0] == [path for path, *_ in files]
    counts = {part.path.name: part.count for part in parts}
    assert counts["m.jsonl"] > 3 and counts["n.jsonl.gz"] == counts["zero.bin"] == 1
    for part, after in zip(parts, [*parts[1:], None]):
        if part.index + 1 < part.count:
            assert after == Part(part.path, part.index + 1, part.count)
    assert all(token_units.size_of(unit) <= UNIT or len(unit) == 1 for unit in units)
    assert sum(map(token_units.size_of, units)) == sum(size for _, size, _ in files)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [0, 5], [5, 0, 5], [0, 9 << 20, 0]])
def test_files_of_any_size_are_in_one_unit(tmp_path, sizes):
    files = [(tmp_path / f"{n}.txt", size, 0) for n, size in enumerate(sizes)]
    units = token_units.plan(files, divide=False)
    assert [file.part.path for unit in units for file in unit] == [f[0] for f in files]


def test_slices_over_several_shards(tmp_path):
    values, paths = np.arange(20, dtype=np.uint16), []
    stops = [3, 4, 11, 20]
    for start, stop in zip([0, *stops], stops):
        paths.append(tmp_path / f"{start}.bin")
        values[start:stop].tofile(paths[-1])
    joined = token_cache.Joined(paths, np.diff([0, *stops]), values.dtype)
    assert len(joined) == 20
    for start in range(21):
        for stop in range(21):
            np.testing.assert_array_equal(joined[start:stop], values[start:stop])
    np.testing.assert_array_equal(np.asarray(joined), values)
    assert joined[5:5].dtype == values.dtype
    assert len(token_cache.Joined([], [], values.dtype)[:]) == 0
