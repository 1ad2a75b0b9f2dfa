"""Launch scripts: bash parses them, and ladder-jax parses the commands they start."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ladder_jax import cli
from ladder_jax.config import from_recipe
from ladder_jax.hardware import xla_options

ROOT = Path(__file__).resolve().parent.parent
GIVEN = [
    "configs/scratch_1b.py",
    "--train.out",
    "runs/two words",
    "--data.source",
    "data/*.parquet",
]
# Prints its arguments, and ends with the status in <its name>.status.
PROGRAM = """\
#!/bin/sh
printf '%s\\n' "$@"
echo "XLA_FLAGS $XLA_FLAGS"
exit "$(cat "$0.status" 2>/dev/null || echo 0)"
"""
# gcloud: runs a command on one worker, which is this machine; tells the states in the
# file `states`, one a call; writes its other arguments to the file `calls`.
GCLOUD = """\
#!/bin/bash
cd "$WORKER"
case "$*" in
*"uv venv"*) echo setup >>calls ;;
*"tpu-vm ssh"*) bash -c "${@: -1}" ;;
*"queued-resources describe"*) head -n 1 states; sed -i 1d states ;;
*) echo "$@" >>calls ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a script of launch/. `programs` are replaced: they print their arguments."""

    def run(script, *arguments, programs, check=True, **variables):
        for name in programs:
            (tmp_path / name).write_text(PROGRAM)
            (tmp_path / name).chmod(0o755)
        return subprocess.run(
            ["bash", ROOT / "launch" / script, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables},
            check=check,
        )

    return run


def parsed(arguments):
    """What `ladder-jax` makes of `arguments`, from the word train on."""
    command, recipe, *rest = arguments[arguments.index("train") :]
    assert command == "train"
    return cli.parse(
        cli.TrainArguments,
        rest,
        "train",
        cli.TrainArguments(from_recipe(str(ROOT / recipe))),
    )


def check(arguments):
    assert arguments.hosts.distributed and arguments.resume
    assert (arguments.config.train.out, arguments.config.data.source) == (
        "runs/two words",
        "data/*.parquet",
    )


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
)
def test_bash_parses_every_script(script):
    assert (
        subprocess.run(
            ["bash", "-n", ROOT / "launch" / script], capture_output=True
        ).stderr
        == b""
    )
    assert os.access(ROOT / "launch" / script, os.X_OK)


def test_slurm_starts_the_command_with_its_arguments(launch):
    lines = launch(
        "slurm.sh",
        *GIVEN,
        programs=["srun"],
        XLA_FLAGS="--xla_gpu_autotune_level=0",
        SLURM_CPUS_PER_TASK="7",
    ).stdout.splitlines()
    check(parsed(lines[:-1]))
    assert {"--label", "--cpus-per-task=7", "--gpu-bind=none"} < set(lines)
    assert not any("container" in line for line in lines)
    assert lines[-1] == "XLA_FLAGS --xla_gpu_autotune_level=0"  # the user's, unchanged


def test_slurm_runs_the_command_in_a_container(launch):
    lines = launch(
        "slurm.sh",
        *GIVEN,
        programs=["srun"],
        CONTAINER="registry#image:tag",
        MOUNTS="/data:/data",
    ).stdout.splitlines()
    check(parsed(lines[:-1]))
    assert lines[lines.index("train") - 1] == "ladder-jax"
    assert "--container-image=registry#image:tag" in lines
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in lines
    assert f"--container-workdir={ROOT}" in lines


@pytest.mark.parametrize(
    "status, restarts, requeued",
    [
        *[(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True)],
        *[(130, 0, True), (137, 3, True), (143, 99, True), (75, 100, False)],
    ],
)
def test_a_slurm_job_goes_back_to_the_queue(
    launch, tmp_path, status, restarts, requeued
):
    (tmp_path / "srun.status").write_text(str(status))
    done = launch(
        "slurm.sh",
        *GIVEN,
        programs=["srun", "scontrol"],
        check=False,
        SLURM_JOB_ID="123",
        SLURM_RESTART_COUNT=str(restarts),
    )
    assert done.returncode == status
    assert ("requeue\n123\n" in done.stdout) == requeued
    assert ("giving up" in done.stderr) == (restarts == 100)


def test_a_slurm_job_that_is_cancelled_does_not_come_back(launch, tmp_path):
    """scancel sends SIGTERM to this script, too."""
    (tmp_path / "srun").write_text("#!/bin/sh\nkill -TERM $PPID; exit 143\n")
    (tmp_path / "srun").chmod(0o755)
    options = dict(programs=["scontrol"], check=False, SLURM_JOB_ID="123")
    done = launch("slurm.sh", *GIVEN, **options)
    assert done.returncode == 143 and "requeue" not in done.stdout


def test_the_program_sets_the_options_that_overlap_needs_on_gpus():
    """So that a launch script does not have to."""
    options = xla_options.options_of("gpu", "h100", None)
    assert options["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert options["xla_gpu_all_reduce_combine_threshold_bytes"] == 0


SLICE = dict(TPU="name", ZONE="zone", SHARED="/mnt/shared")


def test_tpu_pod_starts_the_command_on_every_host(launch):
    lines = launch(
        "tpu_pod.sh", *GIVEN, programs=["gcloud"], **SLICE
    ).stdout.splitlines()
    words = shlex.split("\n".join(lines[lines.index("--command") + 1 :]))
    check(parsed(words[: words.index("</dev/null")]))
    assert lines[lines.index("--worker") + 1] == "all"
    assert "name" in lines and "zone" in lines
    for task, words in (
        ("log", "tail -n 50 -F ladder_jax/train.log"),
        ("stop", "pkill -TERM"),
        ("setup", "uv venv"),
    ):
        done = launch("tpu_pod.sh", task, programs=["gcloud", "git"], **SLICE)
        assert words in done.stdout


@pytest.fixture
def worker(tmp_path):
    """A worker's home with a ladder-jax that notes its arguments and then ends."""
    home = tmp_path / "home"
    for path in (home / "ladder_jax/launch", home / "ladder_jax/.venv/bin"):
        path.mkdir(parents=True)
    (home / "ladder_jax/launch/again.sh").symlink_to(ROOT / "launch/again.sh")
    program = home / "ladder_jax/.venv/bin/ladder-jax"
    program.write_text('#!/bin/bash\necho "$@"; exit $(cat ../status)\n')
    program.chmod(0o755)
    (home / "status").write_text("0")
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    return home


def test_tpu_pod_keeps_a_run_through_a_preemption(launch, worker):
    states = ["SUSPENDED", "WAITING_FOR_RESOURCES", *["ACTIVE"] * 9]
    (worker / "states").write_text("\n".join(states) + "\n")
    options = SLICE | dict(WORKER=str(worker), PAUSE="1", TYPE="v6e-16", RUNTIME="r")
    done = launch(
        "tpu_pod.sh",
        *("keep", *GIVEN),
        programs=["git"],
        OPTIONS="--spot --labels a=b",
        **options | dict(SHARED=str(worker)),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the run ended with status 0" in done.stdout
    calls = (worker / "calls").read_text().splitlines()
    deleted, created, copied, last = calls
    assert "queued-resources delete name" in deleted and "--force" in deleted
    assert "queued-resources create name" in created and "v6e-16" in created
    assert created.endswith("--spot --labels a=b")
    assert "tpu-vm scp" in copied and last == "setup"
    log = (worker / "ladder_jax/train.log").read_text()
    assert log == (
        "train configs/scratch_1b.py --train.out runs/two words --data.source "
        "data/*.parquet --distributed --resume\n"
    )


def test_tpu_pod_keep_ends_with_the_status_of_the_run(launch, worker):
    (worker / "status").write_text("2")
    (worker / "states").write_text("ACTIVE\n" * 9)
    options = SLICE | dict(WORKER=str(worker), PAUSE="1")
    done = launch("tpu_pod.sh", *("keep", *GIVEN), programs=[], check=False, **options)
    assert done.returncode == 2
    assert "the run ended with status 2" in done.stdout
    assert not (worker / "calls").exists()


@pytest.mark.parametrize(
    "script, arguments, variables, message",
    [
        ("slurm.sh", [], {}, "a recipe, such as configs/scratch_1b.py"),
        (
            "tpu_pod.sh",
            [],
            dict(TPU="name", ZONE="zone", SHARED="/mnt"),
            "create, setup, log, stop, keep or a recipe",
        ),
        (
            "tpu_pod.sh",
            GIVEN,
            dict(TPU="name", ZONE="zone"),
            "SHARED: a folder that every worker has mounted",
        ),
    ],
)
def test_a_script_says_what_is_missing(launch, script, arguments, variables, message):
    done = launch(
        script, *arguments, programs=["srun", "gcloud"], check=False, **variables
    )
    assert (
        done.returncode
        and message in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_sky_starts_the_command_on_every_machine(tmp_path):
    """The commands of `run`, with the variables that SkyPilot sets."""
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["envs"]["RECIPE"] == "configs/scratch_1b.py"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/local.sh").write_text(
        '#!/bin/sh\necho "$NODES $NODE $COORDINATOR"; printf "%s\\n" "$@"\n'
    )
    (tmp_path / "launch/local.sh").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", task["run"].replace("/shared", str(tmp_path / "shared"))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "8",
            **task["envs"],
        },
        check=True,
    )
    place, count, dashes, _, *words = done.stdout.splitlines()
    assert place == "2 1 10.0.0.1:8476" and (count, dashes) == ("8", "--")
    arguments = parsed([*words, "--distributed"])
    assert arguments.resume and arguments.hosts.distributed
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"data", "runs"}
