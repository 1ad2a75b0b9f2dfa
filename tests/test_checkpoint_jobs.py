"""Several jobs and one folder of checkpoints: two at once, killed ones, one job of two
processes.
"""

import shutil
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import pytest
from checkpoint_states import META, abstract, assert_same, data, make_state

from ladder_jax import checkpoint
from ladder_jax.checkpoint import load_model
from ladder_jax.run_folder import Lease
from ladder_jax.saving import Checkpoints


def test_checkpoints_of_another_job_stop_the_run_and_stay(tmp_path):
    with Checkpoints(tmp_path, 1) as run:
        run.save(2, make_state(2), data(), META)
        run.wait()
        for step in "15":  # as if another job had written them
            shutil.copytree(tmp_path / "2", tmp_path / step)
        with pytest.raises(OSError, match=r"steps \[1, 5\], which another job wrote"):
            run.save(3, make_state(3), data(), META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "5"]


def test_surplus_checkpoints_of_another_job_are_not_removed(tmp_path):
    with Checkpoints(tmp_path, 1) as run:
        run.save(2, make_state(2), data(), META)
        run.wait()
        shutil.copytree(tmp_path / "2", tmp_path / "another")
        run.save(3, make_state(3), data(), META)
        (tmp_path / "another").rename(tmp_path / "1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


ZOMBIE = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from ladder_jax.saving import Checkpoints
from ladder_jax.run_folder import Lease

state = {"model": {"w": jnp.zeros(4)}}
folder = sys.argv[1] + "/checkpoints"
with Lease(sys.argv[1]) as lease, Checkpoints(folder, 2, lease) as run:
    run.save(1, state, None, {})
    run.wait()
    print("saved", flush=True)
    # Meanwhile another job takes this one for dead, and takes its place.
    sys.stdin.readline()
    run.save(2, state, None, {})
"""


def test_a_job_that_was_taken_for_dead_leaves_its_successors_checkpoints(tmp_path):
    """The first of two jobs hangs, the second resumes, then the first wakes up."""
    first = subprocess.Popen(
        [sys.executable, "-c", ZOMBIE, tmp_path],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=helpers.code_environment(),
    )
    assert first.stdout.readline() == "saved\n"
    (tmp_path / "lease.json").unlink()  # as after STALE_S seconds without a heartbeat
    state = {"model": {"w": jnp.ones(4)}}
    with (
        Lease(tmp_path) as lease,
        Checkpoints(tmp_path / "checkpoints", 2, lease) as run,
    ):
        assert run.restore(abstract(state))[0] == 1
        for step in (2, 3, 4):
            run.save(step, state, None, {})
        run.wait()
        _, err = first.communicate("go on\n", timeout=100)
        assert first.returncode == 1
        assert "took this job for dead: this job stops without another write" in err
        run.save(5, state, None, {})
    assert checkpoint.saved_steps(tmp_path / "checkpoints") == [4, 5]
    for step in (4, 5):
        assert_same(load_model(tmp_path, state["model"], step), state["model"])


# ---------------------------------------------------------------- killed jobs


RUN = """
import os, random, signal, sys, time

folder, seed = sys.argv[1], int(sys.argv[2])

def train(ready):
    # Imported after the fork: the threads that they start would not survive it.
    import grain, jax, jax.numpy as jnp, numpy as np
    from ladder_jax.saving import Checkpoints
    jax.config.update("jax_platforms", "cpu")
    position = iter(grain.MapDataset.range(1 << 20).to_iter_dataset())
    zeros = lambda: {"model": {str(i): jnp.zeros((200, 500)) for i in range(8)}}
    step, shape = 0, jax.eval_shape(zeros)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape), shape)
    add_one = lambda state: jax.tree.map(lambda x: x + 1, state)
    update = jax.jit(add_one, donate_argnums=0)
    with Checkpoints(folder, keep=2) as run:
        if run.steps():
            step, state, meta = run.restore(shape, position)
            arrays = map(np.asarray, jax.tree.leaves(state))
            assert all(np.all(x == step) for x in arrays), "arrays of several steps"
            next_index = position.get_state()["next_index"]
            assert meta["step"] == step == next_index, "parts of several steps"
            assert step == run.steps()[-1], "the newest was not good"
        os.write(ready, step.to_bytes(4, "little"))
        while True:
            state, step = update(state), step + 1
            next(position)
            run.save(step, state, position, {"step": step})

rng = random.Random(seed)
newest, unfinished_saves = 0, 0
for n in range(8):
    out, ready = os.pipe()
    if not (child := os.fork()):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # The background jobs of a shell ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            train(ready)
        except KeyboardInterrupt:
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(ready)
    resumed = int.from_bytes(os.read(out, 4), "little")
    assert resumed >= newest, "a checkpoint was lost"
    partial = lambda: [f for f in os.listdir(folder) if "tmp" in f]
    latest = lambda: max((int(f) for f in os.listdir(folder) if f.isdigit()), default=0)
    # Every second kill comes in the middle of a save, the others some time after one.
    while not partial() if n % 2 else latest() <= resumed:
        assert not any(died := os.waitpid(child, os.WNOHANG)), f"died by itself: {died}"
        time.sleep(1e-4)
    time.sleep(0 if n % 2 else rng.uniform(0, 0.25))
    newest = latest()
    unfinished_saves += bool(partial())
    kill = signal.SIGKILL
    number = rng.choice([kill, kill, signal.SIGTERM, signal.SIGINT])
    os.kill(child, number)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(1)
        # Python drops an interrupt that comes while a destructor runs.
        os.kill(child, number)
    status = os.waitstatus_to_exitcode(ended[1])
    assert status in (-number, 0), status
print(newest, unfinished_saves)
"""


def test_killed_at_any_moment(tmp_path):
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-X", "faulthandler", "-c", RUN, folder, "0"]
    ended = subprocess.run(
        command,
        timeout=400,
        capture_output=True,
        text=True,
        env=helpers.code_environment(),
    )
    assert ended.returncode == 0, ended.stderr
    newest, unfinished_saves = map(int, ended.stdout.split())
    # How many there are depends on the machine's speed.
    assert newest >= 4 and unfinished_saves >= 2
    unfinished = folder / "999.orbax-checkpoint-tmp"
    unfinished.mkdir(exist_ok=True)
    shape = jax.eval_shape(lambda: {str(i): jnp.zeros((200, 500)) for i in range(8)})
    leaves = jax.tree.leaves(load_model(tmp_path, shape))
    values = {float(x) for leaf in leaves for x in (leaf.min(), leaf.max())}
    assert len(values) == 1, "arrays of several steps"
    assert unfinished.exists(), "a reader removed a folder"
    with Checkpoints(folder, 2) as run:
        run.restore({"model": shape})
        assert len(run.steps()) in (2, 3)  # 3: killed before the oldest was removed
    assert sorted(int(f.name) for f in folder.iterdir()) == run.steps()


# ---------------------------------------------------------------- two processes

PROCESS = """
import sys
import grain, jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from ladder_jax.saving import Checkpoints

folder, address, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, n)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
full = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
by_rows, by_columns = (NamedSharding(mesh, P(*axes)) for axes in (["x"], [None, "x"]))
w = jax.make_array_from_callback(full.shape, by_rows, lambda index: full[index])
columns = jax.ShapeDtypeStruct(full.shape, full.dtype, sharding=by_columns)
data = lambda: iter(grain.MapDataset.range(100)[n::2].to_iter_dataset())
with Checkpoints(folder, 2) as run:
    position = data()
    for step in range(1, 4):
        for _ in range(step):   # all processes are at the same position
            next(position)
        run.save(step, {"model": {"w": w}}, position, {})
    run.wait()
    if n == 0:
        open(f"{folder}/3/meta/data.json", "w").write("garbage")
    multihost_utils.sync_global_devices("damaged")
    resumed = data()
    step, state, _ = run.restore({"model": {"w": columns}}, resumed)
    assert step == 2 and run.steps() == [2, 3]
    for part in state["model"]["w"].addressable_shards:
        assert np.array_equal(part.data, full[part.index])
    assert next(resumed) == n + 2 * 3
    run.save(3, state, resumed, {})
print("ok")
"""


@pytest.mark.slow
def test_two_processes_save_together_and_take_the_same_good_checkpoint(tmp_path):
    address = helpers.free_address()
    command = [sys.executable, "-c", PROCESS, tmp_path, address]
    ended = helpers.run_together(
        [[*command, number] for number in range(2)], helpers.code_environment(2)
    )
    for out, err, status in ended:
        assert status == 0 and out.endswith("ok\n"), err
        assert err.count("3 is damaged") == 1
