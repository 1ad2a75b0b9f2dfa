"""`ladder-jax generate` and `tokenizer`: the same text on any mesh; mistakes."""

import json
import subprocess

import pytest
from helpers import COMMAND, code_environment

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_generate_writes_the_same_text_on_any_mesh_and_samples_by_the_seed(
    command, whole
):
    status, text, err = command(
        "generate", whole, "--prompt", "abc", "--max-tokens", 20
    )
    assert (status, err) == (0, "") and len(text) == 21 and text.endswith("\n")
    options = ["--prompt", "abc", "--max-tokens", 20, "--tensor", 8]
    assert command("generate", whole / "checkpoints/20", *options) == (0, text, "")
    stopped = ["--prompt", "abc", "--max-tokens", 20, "--stop", text[0]]
    assert command("generate", whole, *stopped) == (0, "\n", "")
    stopped += ["--min-tokens", 20, "--ignore-eos"]
    assert command("generate", whole, *stopped) == (0, text, "")
    sampled = [
        command("generate", whole, "--temperature", 1, "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_wrong_row_of_a_prompts_file_costs_that_row_and_the_exit_status(
    command, whole, tmp_path
):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "abc", "top_k": -1}\n')
    options = ["--prompts-file", prompts, "--out", out, "--max-tokens", 5]
    status, text, _ = command("generate", whole, *options)
    assert (status, text) == (1, f"done: 2 outputs in {out}, 1 of them errors\n")
    rows = {row["index"]: row for row in map(json.loads, out.open())}
    assert len(rows[0]["tokens"]) == 5 and rows[1]["error"].startswith("line 2: top_k")
    prompts.write_text('{"prompt": "abc"}\n')
    options = ["--prompts-file", prompts, "--out", tmp_path / "good.jsonl"]
    assert command("generate", whole, *options, "--max-tokens", 5)[0] == 0


@pytest.mark.parametrize(
    "arguments, message, status",
    [
        (
            "{tmp}",
            "{tmp} holds no checkpoint: a run's folder, its checkpoints folder or the "
            "folder of one step is acc",
            2,
        ),
        ("{tmp}/none", "{tmp}/none does not exist", 2),
        (
            "{out} --step 4",
            "{out}/checkpoints holds no checkpoint of step 4, only [",
            2,
        ),
        (
            "{out} --max-tokens 100",
            "max_tokens=100 is not accepted: it must be from 0 to 63: "
            "model.max_length=64",
            2,
        ),
        (
            "{out} --max-tokens 5 --min-tokens 6",
            "min_tokens=6 is not accepted: it must be an integer from 0 to max_tok",
            2,
        ),
        ("{out} --temperature -1", "temperature=-1.0 is not accepted", 2),
        ("{out} --top-p 0", "top_p=0.0 is not accepted", 2),
        (
            "{out} --tensor 3",
            "model.vocab_size=264 does not divide|"
            "model.heads=8 does not divide by mesh.tensor=3",
            2,
        ),
        ("{out} --tensor 16", "the mesh needs 16 devices, but there are 8", 2),
        (
            "{out} --tensor 0",
            "mesh.tensor=0 is not accepted: it must be greater than 0, or -1",
            2,
        ),
        ("{out} --seed x", "--seed='x' is not accepted: it must be a whole number", 2),
    ],
)
def test_a_mistake_in_generate_is_one_line(
    wrong, whole, tmp_path, arguments, message, status
):
    places = dict(tmp=tmp_path, out=whole)
    line = wrong("generate", *arguments.format(**places).split(), status=status)
    assert line.startswith(tuple(message.format(**places).split("|")))


def test_generate_writes_each_token_at_once_and_its_reader_may_stop_reading(whole):
    child = subprocess.Popen(
        [*COMMAND, "generate", whole, "--prompt", "abc", "--max-tokens", "60"],
        env=code_environment() | {"PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert len(child.stdout.read(1)) == 1
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(timeout=60) in (0, 141)


# ---------------------------------------------------------------- tokenizer


def test_a_tokenizer_is_trained_and_fits_a_run(
    command, wrong, tiny_folder, recipe, tmp_path
):
    path = tmp_path / "small.json"
    out = f"done: 264 tokens in {path}: use it with --data.tokenizer {path}\n"
    options = ["--vocab-size", 264, "--out", path]
    assert command("tokenizer", tiny_folder / "corpus", *options) == (0, out, "")
    assert wrong("tokenizer", tiny_folder / "corpus", "--vocab-size", 9).startswith(
        "vocab_size=9 is not accepted"
    )
    assert wrong("tokenizer", tmp_path / "none").startswith(
        f"data.source='{tmp_path}/none' does not exist"
    )
    assert wrong(
        "tokenizer", tiny_folder / "corpus", "--out", f"{path}/x", status=1
    ).startswith(f"out='{path}/x' cann")
    training = ["train", recipe, "--data.tokenizer", path, "--train.steps", 1]
    status, _, err = command(*training)
    assert (status, err) == (0, "")
    path.write_text(path.read_text().replace("<|pad|>", "<|pat|>"))
    assert wrong(*training, "--resume") == (
        f"data.tokenizer={str(path)!r} has other contents now than in the run to "
        "resume: restore them, or start a new run in another train.out"
    )
