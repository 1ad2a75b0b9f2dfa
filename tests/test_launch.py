"""Launch scripts: bash parses them, and ladder-jax parses the commands they start."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

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


@pytest.fixture
def launch(tmp_path):
    """Runs a script of launch/. `programs` are replaced: they print their arguments."""

    def run(script, *arguments, programs, check=True, **variables):
        for name in programs:
            (tmp_path / name).write_text(
                '#!/bin/sh\nprintf \'%s\\n\' "$@"\necho "XLA_FLAGS $XLA_FLAGS"\n'
            )
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
    assert arguments.distributed and arguments.resume
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
        "slurm.sh", *GIVEN, programs=["srun"], XLA_FLAGS="--xla_gpu_autotune_level=0"
    ).stdout.splitlines()
    check(parsed(lines[:-1]))
    assert lines[-1] == "XLA_FLAGS --xla_gpu_autotune_level=0"  # the user's, unchanged


def test_the_program_sets_the_options_that_overlap_needs_on_gpus():
    """So that a launch script does not have to."""
    options = xla_options.options_of("gpu", "h100", None)
    assert options["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert options["xla_gpu_all_reduce_combine_threshold_bytes"] == 0


def test_tpu_pod_starts_the_command_on_every_host(launch):
    slice = dict(TPU="name", ZONE="zone", SHARED="/mnt/shared")
    lines = launch(
        "tpu_pod.sh", *GIVEN, programs=["gcloud"], **slice
    ).stdout.splitlines()
    words = shlex.split("\n".join(lines[lines.index("--command") + 1 :]))
    check(parsed(words[: words.index("</dev/null")]))
    assert (
        lines[lines.index("--worker") + 1] == "all"
        and "name" in lines
        and "zone" in lines
    )
    for task, words in (
        ("log", "tail -n 50 -f ladder_jax/train.log"),
        ("stop", "pkill -TERM"),
        ("setup", "uv venv"),
    ):
        assert (
            words
            in launch("tpu_pod.sh", task, programs=["gcloud", "git"], **slice).stdout
        )


@pytest.mark.parametrize(
    "script, arguments, variables, message",
    [
        ("slurm.sh", [], {}, "a recipe, such as configs/scratch_1b.py"),
        (
            "tpu_pod.sh",
            [],
            dict(TPU="name", ZONE="zone", SHARED="/mnt"),
            "setup, log, stop or a recipe",
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
