"""Platforms, chips and the process's memory, on devices that are only descriptions."""

import ctypes
import json
import os
import platform as machine
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ladder_jax import attention, config
from ladder_jax.hardware import (
    aot,
    chip_sources,
    chips,
    cost,
    malloc,
    memory,
    networks,
    xla_options,
)

# (platform, device_kind, the client's platform_version), as JAX's plugins give them.
DEVICES = {
    "cpu": ("cpu", "cpu", "cpu"),
    "tpu": ("tpu", "TPU v5 lite", "PJRT C API\nTFRT TPU v5 lite"),
    "cuda": ("gpu", "NVIDIA H100 80GB HBM3", "PJRT C API\ncuda 12090"),
    "rocm": ("gpu", "AMD Instinct MI300X", "PJRT C API\nrocm 60300"),
}


def device(platform, device_kind, version=None):
    client = SimpleNamespace(platform_version=version) if version else None
    return SimpleNamespace(platform=platform, device_kind=device_kind, client=client)


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_and_its_mesh_have_the_same_platform(name):
    one = device(*DEVICES[name])
    mesh = SimpleNamespace(devices=np.array([[one, one]]))
    assert chips.platform(one) == chips.platform(mesh) == name


@pytest.mark.parametrize(
    "device_kind, expected",
    [
        ("AMD Instinct MI250", "rocm"),
        ("AMD Radeon Graphics", "rocm"),
        ("gfx942", "rocm"),
        ("NVIDIA A100-SXM4-80GB", "cuda"),
    ],
)
def test_a_gpu_without_a_client_is_told_by_its_kind(device_kind, expected):
    assert chips.platform(device("gpu", device_kind)) == expected


def test_the_version_of_the_client_decides_where_the_kind_says_nothing():
    assert chips.platform(device("gpu", "unnamed", "rocm 60300")) == "rocm"


def test_this_machine_has_a_platform():
    assert chips.platform(jax.devices()[0]) in ("cpu", "tpu", "cuda", "rocm")


@pytest.mark.parametrize("name, kernel", [("cuda", "cudnn"), ("rocm", "xla")])
def test_bfloat16_attention_takes_cudnn_on_nvidia_gpus_alone(name, kernel):
    platform = chips.platform(device(*DEVICES[name]))
    assert attention.kernel_for(platform, config.Model(), 2048) == kernel


def fake_mesh(name, fsdp=1, tensor=1):
    """A mesh with one device of DEVICES, and these sizes."""
    return SimpleNamespace(
        devices=np.array([device(*DEVICES[name])]),
        shape=dict(data=1, fsdp=fsdp, tensor=tensor),
    )


def test_both_kinds_of_gpu_get_the_options_of_gpus():
    for name in chips.GPUS:
        assert xla_options.options(fake_mesh(name)) == xla_options.OPTIONS["gpu"]


def test_gathers_are_merged_where_none_of_them_is_a_reduction():
    """Over the fsdp axis, without a tensor axis; on GPUs, as TPUs have no option."""
    expected = xla_options.OPTIONS["gpu"] | xla_options.OPTIONS["gpu gathers"]
    assert xla_options.options(fake_mesh("cuda", fsdp=8)) == expected
    apart = xla_options.OPTIONS["gpu"] | xla_options.OPTIONS["gpu scatters"]
    assert xla_options.options(fake_mesh("cuda", tensor=8)) == apart
    assert (
        xla_options.options(fake_mesh("cuda", fsdp=8, tensor=2))
        == xla_options.OPTIONS["gpu"]
    )
    assert xla_options.options(fake_mesh("tpu", fsdp=8)) == xla_options.options(
        fake_mesh("tpu")
    )


def test_options_of_a_workload_come_on_top_of_those_of_the_chip_and_platform():
    mesh = fake_mesh("tpu")
    rows = ("tpu", "v5e", "v5e prefill")
    expected = {k: v for row in rows for k, v in xla_options.OPTIONS[row].items()}
    assert xla_options.options(mesh, "prefill") == expected
    assert xla_options.options(mesh) != expected


@pytest.mark.parametrize("name, chip", chips.CHIPS.items())
def test_a_row_of_the_table_is_known_by_its_own_names_and_complete(name, chip):
    for part in chip.device_kinds:
        assert chips.kind_of(device("gpu", f"Maker {part.upper()} 80GB")) == name
    assert 1e12 < chip.peak_flops < 1e16, "FLOP/s"
    if chip.modelled:
        assert 1e11 < chip.hbm_bandwidth < 1e14, "bytes/s"
        assert 1e9 < chip.hbm_bytes < 1e12, "bytes"
        assert 1e9 < chip.link_bandwidth < 1e12, "bytes/s"
        assert 0 < chip.hop_latency_s < 1e-4, "seconds"
        assert chip.is_tpu == (chip.clock_hz > 0), "XLA:TPU counts cycles"
        assert chip.is_tpu == (chip.internode_bandwidth == 0)
    else:
        assert not chip.target_sides, "the planner needs the cost model"


@pytest.mark.parametrize("name", ["v4:2x2x2", "l4:1x8", "h100-pcie:1x8", "h100:8"])
def test_chips_without_a_compiler_are_no_targets(name):
    with pytest.raises(config.ConfigError, match=f"target='{name}' is not accepted"):
        aot.parse(name)


@pytest.mark.parametrize(
    "name, message",
    [
        ("mi300x:1x8", "XLA compiles for AMD's GPUs only where ROCm is installed"),
        ("h100:1x16", "NVLink connects at most 8 GPUs of a h100; .* such as h100:2x8"),
        ("gb200:1x80", "NVLink connects at most 72 GPUs of a gb200"),
    ],
)
def test_machines_that_do_not_exist_or_cannot_be_planned_say_why(name, message):
    with pytest.raises(config.ConfigError, match=message):
        aot.parse(name)


def test_every_number_of_the_model_has_a_source():
    """Fields that are 0, "" or () have no number."""
    labels = {label: 0 for label in chip_sources.LABELS}
    for kind, chip in chips.CHIPS.items():
        if not chip.modelled:
            continue
        sources = chip_sources.sources_of(kind)
        not_costs = {"device_kinds", "target_sides", "torus_min_side", "in_order"}
        not_costs |= {"doubles_row", "tied_rows"}
        default = chips.Chip(("",), 0.0)
        for field in set(chips.Chip._fields) - not_costs:
            if getattr(chip, field) != getattr(default, field):
                assert sources[field].label in labels, (kind, field)
                labels[sources[field].label] += 1
    assert not labels.pop("measured") and all(labels.values())


# ---------------------------------------------------------------- networks


def test_another_network_changes_the_costs_and_says_where_they_come_from(tmp_path):
    target = aot.parse("h100:1x8")
    assert networks.with_network(target, "nvlink") is target
    seconds = lambda one, size: (
        cost.Network(one.chip, [0] * 8)
        .collective("all-reduce", [list(range(8))], size)
        .seconds
    )
    slow = networks.with_network(target, "no-nvlink")
    assert seconds(slow, 16384) == pytest.approx(62e-6, rel=0.02)  # published, batch 1
    assert slow.sources["link_bandwidth"].label == "modelled"
    assert slow.sources["peak_flops"] == target.sources["peak_flops"]
    pcie = networks.with_network(target, "pcie")
    assert seconds(pcie, 2**24) > 3 * seconds(slow, 2**24)
    symmetric = networks.with_network(target, "symmetric")
    for size in (2**14, 2**20, 2**22):
        assert seconds(symmetric, size) < 0.75 * seconds(target, size)
    path = tmp_path / "measured.json"
    rows = [dict(bytes=2**20, us=40.0), dict(bytes=2**10, us=20.0)]
    path.write_text(json.dumps(rows))
    measured = networks.with_network(target, str(path))
    assert seconds(measured, 1) == seconds(measured, 2**10) == pytest.approx(20e-6)
    assert seconds(measured, (2**20 + 2**10) / 2) == pytest.approx(30e-6)
    assert seconds(measured, 2**20) == pytest.approx(40e-6)
    assert seconds(measured, 2**21 - 2**10) == pytest.approx(60e-6)
    assert measured.sources["all_reduce_points"].label == "measured"


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "cannot be read"),
        ("{}", "must be a list"),
        ("[]", "must be a list"),
        ("[3]", "has the row 3"),
        ('[{"bytes": 0, "us": 1}]', "has the row"),
        ('[{"bytes": 1, "us": "1"}]', "has the row"),
        ('[{"bytes": 1, "us": NaN}]', "has the row"),
    ],
)
def test_a_mistake_in_a_file_of_all_reduces_is_one_line(tmp_path, text, message):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match=message):
        networks.with_network(aot.parse("h100:1x8"), str(path))


def test_other_networks_are_of_gpus():
    for target, name, message in (
        ("v5e:2x4", "pcie", "a TPU's network is that of its slice"),
        ("h100:1x8", "infiniband", "must be one of nvlink, no-nvlink, pcie, symmetric"),
        ("h100:1x8", "missing.json", "cannot be read"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            networks.with_network(aot.parse(target), name)


# ---------------------------------------------------------------- malloc

IS_GLIBC = machine.libc_ver()[0] == "glibc"
# Frees 64 MiB many times. Prints the result of keep_freed_memory and the page faults.
FAULTS = """
import ctypes, resource, sys
from ladder_jax.hardware import malloc

result = malloc.keep_freed_memory() if sys.argv[1] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def touch():
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(result, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    """(what keep_freed_memory returned, page faults) of a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    result, count = ended.stdout.split()
    return result, int(count)


@pytest.mark.skipif(not IS_GLIBC, reason="the settings are glibc's")
def test_freed_memory_is_kept_and_not_faulted_in_again():
    result, with_settings = faults("keep")
    _, without = faults("default")
    assert result == "True"
    assert with_settings < without / 10, (
        f"{with_settings} page faults with the settings, {without} without"
    )


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Prints how many KiB of 64 MiB that malloc gives are in huge pages.
HUGE = """
import numpy as np
from ladder_jax.hardware import malloc

assert malloc.keep_freed_memory() and malloc.use_huge_pages()
array = np.ones(64 << 20, np.uint8)
rows = open("/proc/self/smaps_rollup").read().splitlines()
print(next(row for row in rows if row.startswith("AnonHugePages")).split()[1])
"""


@pytest.mark.skipif(
    not (IS_GLIBC and HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text()),
    reason="Linux gives no huge pages here",
)
def test_large_arrays_are_in_huge_pages():
    ended = subprocess.run(
        [sys.executable, "-c", HUGE],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert int(ended.stdout) >= 2 << 10  # as many as Linux can find; one at least


def test_no_room_is_asked_for_where_memory_may_not_be_overcommitted(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "2\n")
    assert malloc.use_huge_pages() is False


@pytest.mark.parametrize("platforms, expected", [("cpu", True), ("tpu,cpu", False)])
def test_the_users_platforms_decide_where_jax_computes(
    monkeypatch, platforms, expected
):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert malloc.computes_here() == expected


def test_an_installed_accelerator_is_where_jax_computes(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, expected in (("jax_plugins.xla_rocm", False), ("other", True)):
        monkeypatch.setattr(
            malloc, "installed", lambda module, name=name: module == name
        )
        assert malloc.computes_here() == expected


def test_memory_is_left_alone_on_accelerators_and_without_mallopt(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert malloc.keep_freed_memory() is False
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: SimpleNamespace())
    assert malloc.keep_freed_memory() is False


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", True),
        ("MALLOC_ARENA_MAX", "2", True),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", True),
        ("GLIBC_TUNABLES", "glibc.pthread.rseq=0", False),
        ("MALLOC", "1", False),
    ],
)
def test_a_user_who_sets_malloc_keeps_that_setting(monkeypatch, name, value, expected):
    assert malloc.set_by_user({name: value}) is expected
    if expected:
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        monkeypatch.setenv(name, value)
        assert malloc.keep_freed_memory() is False


# Runs a program, each time on its last result, and never waits for it. Prints what
# run_programs_in_turn returned, the bytes of the program's temporaries, and the bytes
# by which malloc's memory in use has grown soon after a call: the most of 12 calls.
IN_TURN = """
import ctypes, time
from ladder_jax.hardware import malloc

malloc.keep_freed_memory()
result = malloc.run_programs_in_turn()
import jax
import jax.numpy as jnp

class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks used".split()
    ] + [("free", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2

@jax.jit
def run(x):
    row = x * jnp.arange(4000.0)
    matrix = jnp.cos(row[:, None] * row)
    return jnp.tanh(matrix @ row @ row)

x = jnp.float32(0.1)
compiled = run.lower(x).compile()
before = mallinfo2().used
grown = 0
for _ in range(12):
    x = compiled(x)
    time.sleep(0.01)  # a program that still runs has its temporaries by then
    grown = max(grown, mallinfo2().used - before)
print(result, compiled.memory_analysis().temp_size_in_bytes, grown)
"""


def test_only_devices_of_this_process_are_asked_for_their_memory():
    """JAX raises for another one's."""

    class Device(SimpleNamespace):
        platform = "tpu"

        def memory_stats(self):
            assert self.process_index == jax.process_index(), "not addressable"
            return self.stats

    def mesh(*devices):
        all_devices = np.array([Device(process_index=i, stats=s) for i, s in devices])
        return SimpleNamespace(devices=all_devices)

    full = dict(bytes_limit=100, bytes_in_use=90)
    half = dict(bytes_limit=100, bytes_in_use=50)
    assert memory.device_memory(mesh((0, half), (0, full), (1, None))) == 10
    assert memory.device_memory(mesh((0, None), (0, {}), (1, None))) is None
    assert memory.device_memory(mesh((1, None))) is None


def test_no_other_module_asks_for_the_memory_of_devices():
    """A loop over all devices of a mesh fails on the first one of another host."""
    sources = {
        path: path.read_text() for path in (Path(config.__file__).parent).rglob("*.py")
    }
    asking = {path.name for path, text in sources.items() if "memory_stats()" in text}
    assert asking == {"memory.py", "train.py"}  # bench/train.py has one process


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 has mallinfo2"
)
def test_a_program_has_freed_its_temporaries_when_the_next_one_may_start():
    ended = subprocess.run(
        [sys.executable, "-c", IN_TURN],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    result, temporaries, grown = ended.stdout.split()
    assert result == "True" and int(temporaries) > 60e6
    assert int(grown) < 0.1 * int(temporaries)


# Trains from Python. Prints whether JAX had started when training set that programs run
# in turn (nothing if it did not), and whether they do.
FROM_PYTHON = """
import sys
import jax
from jax._src.xla_bridge import backends_are_initialized
import ladder_jax
from ladder_jax import training, train_programs
from ladder_jax.hardware import malloc

class Prepared(Exception):
    pass

def prepare(*_):
    raise Prepared

def run_programs_in_turn(function=malloc.run_programs_in_turn):
    print(backends_are_initialized(), end=" ")
    return function()

training.prepare = prepare
train_programs.LONG_STEP = float(sys.argv[1])
malloc.run_programs_in_turn = run_programs_in_turn
try:
    ladder_jax.train(ladder_jax.Config())
except Prepared:
    print(not jax.config.read("jax_cpu_enable_async_dispatch"))
"""


@pytest.mark.parametrize("long, printed", [(0, "False True"), (1e30, "False")])
def test_training_from_python_runs_long_steps_in_turn(long, printed):
    ended = subprocess.run(
        [sys.executable, "-c", FROM_PYTHON, str(long)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert ended.stdout.strip() == printed, ended.stderr


def test_accelerators_keep_their_own_order_of_programs(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert malloc.run_programs_in_turn() is False


def test_a_module_of_no_package_is_not_installed():
    assert malloc.installed("json.decoder")
    assert not malloc.installed("no_such_package.module")
