"""Eight emulated devices for every test, and runs that several test files share."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# All of these are set before JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "32")  # as `distributed.emulate(8)` sets it
# XLA compiles a program once for all tests of this process and for the processes that
# they start. pytest-xdist's workers do not share it: a file that one of them has not
# written to its end would be a warning of another.
COMPILED = tempfile.mkdtemp(prefix="ladder_jax_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure() -> None:
    shutil.rmtree(COMPILED, ignore_errors=True)


# The kernel gives a process 65,530 memory maps, or what this file says; XLA's CPU
# programs take several each.
LIMIT = Path("/proc/sys/vm/max_map_count")
MOST_MAPS = (int(LIMIT.read_text()) if LIMIT.exists() else 65_530) // 3


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """JAX reads XLA_FLAGS once: now, before a test sets others for its processes."""
    import jax

    jax.devices()


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """After a file, JAX forgets the compiled programs if they are many.

    At the kernel's limit, XLA aborts the process. The engine that files share goes with
    its programs: it would compile them while it serves the next file.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        import jax
        import served

        jax.clear_caches()
        served.SHARED.clear()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with the corpus of tiny.py, and the cache of its tokens."""
    import tiny

    path = tmp_path_factory.mktemp("tiny")
    tiny.write_corpus(path / "corpus")
    return path


@pytest.fixture(scope="module")
def fast_compiler():
    """For `pytestmark`: helpers.fast_compilation in a whole file."""
    import helpers

    with helpers.fast_compilation():
        yield


@pytest.fixture(scope="session")
def whole(tiny_folder):
    """The folder of a run of 20 steps that nothing interrupted.

    Runs that continue it bit for bit are compiled with helpers.FAST, too.
    """
    import helpers
    import tiny
    from train_runs import watched

    from ladder_jax import training

    out = tiny_folder / "whole"
    with helpers.fast_compilation(), watched():
        done = training.train(
            tiny.make(
                tiny_folder,
                train_out=str(out),
                train_tensorboard=True,
                train_profile_steps=2,
            )
        )
    assert (done["step"], done["stopped"], done["parameters"]) == (20, None, 37_536)
    return out


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """The path of a recipe file whose run is tmp_path/run."""
    import tiny

    path = tiny.recipe(tiny_folder, train_out=str(tmp_path / "run"))
    return path.rename(tmp_path / "tiny.py")


@pytest.fixture
def command(monkeypatch, capfd):
    """command(*words) -> (status, stdout, stderr) of ladder-jax, in this process."""
    from ladder_jax import cli

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["ladder-jax", *map(str, words)])
        # The command's --devices changes both variables.
        monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        received = signal.getsignal(signal.SIGINT)
        try:
            status = cli.main() or 0
        except SystemExit as stopped:
            status = stopped.code or 0
        finally:
            signal.signal(signal.SIGINT, received)  # `main` is the end of a process
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def wrong(command):
    """wrong(*words, status=2): the one line that ladder-jax prints for wrong words."""
    from ladder_jax import cli

    def call(*words, status=2):
        actual_status, out, err = command(*words)
        assert (actual_status, out) == (status, ""), err
        assert err.endswith("\n") and err.count("\n") == 1, err
        start = "ladder-jax: "
        if words[0] in cli.COMMANDS:
            start = f"ladder-jax {words[0]}: "
        assert err.startswith(start)
        return err[len(start) : -1]

    return call


@pytest.fixture
def plan_on_cpu(monkeypatch, capsys):
    """plan_on_cpu(*arguments): what `ladder-jax plan` prints for a slice of v5e.

    XLA:CPU stands in for XLA's TPU compiler, which is not installed everywhere. So
    nothing is asynchronous; times are those of the TPU's links.
    """
    import jax

    from ladder_jax import cli
    from ladder_jax.hardware import aot
    from ladder_jax.hardware.chips import CHIPS
    from ladder_jax.hardware.cost import Network
    from ladder_jax.residual import choose

    coordinates = [(x, y, 0) for y in range(4) for x in range(2)]

    def network_of(devices, all_reduce=None, chip=None):
        return Network(chip or CHIPS["v5e"], coordinates)

    monkeypatch.setattr(choose, "network_of", network_of)
    monkeypatch.setattr(aot.Target, "devices", lambda self: jax.devices())
    monkeypatch.setattr(aot.Target, "options", lambda self, workload, merging: {})

    def plan(*arguments, status=0):
        target = ["--target", "v5e:2x4", "--tensor", "4", "--batch", "8"]
        assert cli.plan(["configs/demo.py", *target, *arguments]) == status
        return capsys.readouterr().out

    choose.auto_reduction.cache_clear()
    yield plan
    choose.auto_reduction.cache_clear()
