"""A compile cache makes starts fast, and a bad folder or entry costs one line."""

import json
import os
import shutil
import subprocess
import sys
import time
import types

import helpers
import jax
import jax.numpy as jnp
import pytest

from ladder_jax.hardware import compile_cache
from ladder_jax.hardware.compilations import Compilations

SCRIPT = """
import sys
import jax, jax.numpy as jnp
from ladder_jax.hardware import compile_cache
from ladder_jax.hardware.compilations import Compilations
if "--limit" in sys.argv:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    compile_cache.LEAST_FREE = 0
cache = compile_cache.use(sys.argv[1])
count = Compilations()
value = 0.0
for size in (3, 4, 5):
    x = jnp.arange(size * size, dtype=jnp.float32).reshape(size, size) / 9
    terms = 60 if size == 5 else 2
    f = jax.jit(lambda x: sum(jnp.sin(x * i) @ x.T for i in range(terms)))
    value += float(f(x).sum())
print(f"{value:.3f} {count.total} {count.from_cache}")
print(cache.line)
print(cache.keep())
"""


@pytest.fixture(autouse=True)
def own_settings():
    with helpers.own_compile_cache():
        yield


def run(folder, *options):
    """(value, compiled or loaded, loaded), the line and the problems of a process."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, *options],
        env=helpers.code_environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr and "Warning" not in ended.stderr
    numbers, line, problem = ended.stdout.splitlines()
    value, *counts = numbers.split()
    return float(value), *map(int, counts), line, problem


def test_the_second_start_compiles_nothing_and_damage_costs_no_more_than_time(tmp_path):
    value, total, loaded, line, problem = run(tmp_path)
    assert total > 3 and loaded == 0 and problem == "None"
    (folder,) = tmp_path.iterdir()
    assert line == f"compile cache: 0 programs in {folder}"
    assert folder.name.startswith(f"jax{jax.__version__}-jaxlib")
    assert folder.stat().st_mode & 0o777 == 0o700

    again = run(tmp_path)
    assert again[:3] == (value, total, total)
    assert again[3] == f"compile cache: {loaded + total} programs in {folder}"

    # Entries are cut off, filled with zeros, changed in one bit, and more.
    entries = sorted(folder.glob("*-cache"))
    damages = [
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: b"",
    ]
    for i, file in enumerate(entries[:-1]):
        file.write_bytes(damages[i % 4](file.read_bytes()))
    kept = entries[-1].read_bytes()
    damaged = run(tmp_path)
    assert damaged[:3] == (value, total, 1) and damaged[4] == "None"
    assert entries[-1].read_bytes() == kept
    assert run(tmp_path)[:3] == (value, total, total)

    # An entry that another process is still writing: JAX cannot read it, and says so
    # in a warning, which becomes a part of one line.
    (folder / compile_cache.MANIFEST).write_text("{garbage")
    entries[0].write_bytes(b"half")
    torn = run(tmp_path)
    assert torn[:3] == (value, total, total - 1)
    assert f"the compile cache {folder} had 1 errors" in torn[4]

    # A folder, and a pipe that nobody writes to, in the place of entries.
    for file in entries[:2]:
        file.unlink()
    entries[0].mkdir()
    os.mkfifo(entries[1])
    assert run(tmp_path)[:3] == (value, total, total - 2)


def test_a_disk_that_fills_up_costs_one_line(tmp_path):
    value, total, loaded, _, problem = run(tmp_path, "--limit")
    assert loaded == 0
    assert "errors, which cost time" in problem and "File too large" in problem
    (folder,) = tmp_path.iterdir()
    # Nothing is in the manifest: half an entry is removed when it is old.
    assert not (folder / compile_cache.MANIFEST).exists()
    for file in folder.glob("*-cache"):
        os.utime(file, (1, 1))
    after = run(tmp_path)
    assert after[:3] == (value, total, 0) and after[4] == "None"


@pytest.fixture
def used(tmp_path):
    """The line about a folder that cannot be used."""

    def use(folder, *parts):
        cache = compile_cache.use(str(folder))
        assert cache.folder is None and cache.keep() is None
        assert "\n" not in cache.line and cache.line.startswith("no compile cache: ")
        assert not jax.config.jax_compilation_cache_dir
        for part in parts:
            assert part in cache.line, cache.line

    return use


def test_bad_folders_cost_one_line(used, tmp_path, monkeypatch):
    used("gs://bucket/x", "a folder of this machine's file system")
    (tmp_path / "file").write_text("x")
    used(tmp_path / "file", "Not a directory")
    used("/proc/nothing", "/proc/nothing")
    used("/dev/full/x", "/dev/full")
    used(str(tmp_path / ("x" * 300)), "File name too long")
    folder = tmp_path / "open" / compile_cache.versions()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    used(tmp_path / "open", "can be written by every user")
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        folder.chmod(0o700)
        os.chown(folder, 54321, -1)
        used(tmp_path / "open", "belongs to another user (54321)")
    with monkeypatch.context() as patch:
        full = types.SimpleNamespace(free=10 << 20)
        patch.setattr(shutil, "disk_usage", lambda _: full)
        used(tmp_path / "full", "only 10 MiB of the disk are free")
    with monkeypatch.context() as patch:
        patch.setenv("HOME", "/proc/none")
        patch.delenv("XDG_CACHE_HOME", raising=False)
        cache = compile_cache.use()
        assert cache.folder is None and "/proc/none" in cache.line
    # A folder of a dead file server.
    monkeypatch.setattr(compile_cache, "TEST_SECONDS", 0.2)
    monkeypatch.setattr(compile_cache, "_test", lambda _: time.sleep(30))
    start = time.monotonic()
    used(tmp_path / "dead", "did not answer within 0.2 s")
    assert time.monotonic() - start < 25


def test_the_users_own_settings_stay_unless_no_cache_is_asked_for(tmp_path):
    """The line is true in a process whose user has given JAX a folder."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compile_cache.reset()
    cache = compile_cache.use()
    assert cache.folder is None and str(tmp_path) in cache.line
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    jax.jit(lambda x: x * 3 + 1)(2.0)
    stored = sorted(tmp_path.glob("*-cache"))
    assert stored
    remote = "no compile cache: gs://bucket: it must be a folder of this"
    for folder, line, program in (
        ("none", "no compile cache, as asked for", jnp.sin),
        ("gs://bucket", remote, jnp.cos),
    ):
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compile_cache.reset()
        assert compile_cache.use(folder).line.startswith(line)
        jax.jit(program)(2.0)
        assert sorted(tmp_path.glob("*-cache")) == stored


def test_old_and_surplus_entries_are_removed(tmp_path, monkeypatch):
    folder = tmp_path / compile_cache.versions()
    folder.mkdir(mode=0o700)
    for number, size in enumerate((50, 60, 70)):
        file = folder / f"p{number}-cache"
        file.write_bytes(bytes([number]) * size)
        os.utime(file, (10**9 + number, 10**9 + number))
    compile_cache._update_manifest(folder, 0)
    young = folder / "young-cache"
    young.write_bytes(b"x" * 5)
    old = folder / "old-cache"
    old.write_bytes(b"x")
    os.utime(old, (1, 1))
    unused, recent = tmp_path / "jax0.1-x", tmp_path / "jax0.2-x"
    for other in (unused, recent):
        other.mkdir()
        (other / "a-cache").write_bytes(b"x")
        (other / compile_cache.MANIFEST).write_text("{}")
    os.utime(unused / compile_cache.MANIFEST, (1, 1))
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 140)
    cache = compile_cache.use(str(tmp_path))
    assert sorted(file.name for file in folder.glob("*-cache")) == [
        "p1-cache",
        "p2-cache",
        "young-cache",
    ]
    assert cache.line.startswith("compile cache: 3 programs in ")
    assert not unused.exists() and (recent / "a-cache").exists()
    assert cache.keep() is None
    names = json.loads((folder / compile_cache.MANIFEST).read_text())
    assert sorted(names) == ["p1-cache", "p2-cache", "young-cache"]


def test_compilations_are_counted_whoever_compiles():
    count = Compilations()
    jax.jit(lambda x: x * 3 - 1)(jax.numpy.ones(7)).block_until_ready()
    assert count.total >= 1 and count.seconds > 0
    before = count.total
    jax.jit(lambda x: x * 5 - 1).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
    assert count.total == before + 1
    assert Compilations().total == 0
