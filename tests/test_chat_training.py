"""Fine-tuning on chat: the loss of packed rows, a run that learns its answers, and the
commands that talk to it."""

import dataclasses
import io
import json
import sys

import chat_templates
import helpers
import jax
import numpy as np
import pytest
import tiny

from ladder_jax import chat, cli, train_programs, training
from ladder_jax.config import ConfigError, Decode
from ladder_jax.data import corpus, tokenizer
from ladder_jax.data.batches import held_out_batches
from ladder_jax.loading import load

pytestmark = pytest.mark.usefixtures("fast_compiler")

BYTES = tokenizer.ByteTokenizer()
ANSWERS = ["red", "blue", "a cat", "ten"]


def conversations():
    """20 of two turns; each question is in the training side in some of them."""
    return [
        [
            dict(role="user", content=f"q{i % 4}?"),
            dict(role="assistant", content=ANSWERS[i % 4]),
            dict(role="user", content=f"and {i}?"),
            dict(role="assistant", content="no"),
        ]
        for i in range(20)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    lines = [json.dumps(dict(messages=m)) + "\n" for m in conversations()]
    (folder / "chat.jsonl").write_text("".join(lines))
    return folder


def make(folder, out, **fields):
    own = dict(
        data_source=str(folder / "chat.jsonl"),
        model_max_length=128,
        train_out=str(folder / out),
        train_seq_len=96,
        train_grad_accum_steps=2,
        train_eval_every=40,
        train_save_every=40,
        train_sample_tokens=0,
        train_steps=80,
        optimizer_learning_rate=1e-2,
        optimizer_weight_decay=0.0,
    )
    return tiny.make(folder, **own | fields)


@pytest.fixture(scope="module")
def run(folder):
    return folder / "run", training.train(make(folder, "run"))


def test_the_loss_of_packed_rows_is_that_of_each_conversation_alone(folder):
    cfg = make(folder, "none")
    side = corpus.prepare(cfg.data, BYTES).train
    parameters = helpers.random_parameters(cfg.model, helpers.make_mesh())
    mesh = helpers.make_mesh()
    evaluation = train_programs.make_evaluation(cfg, mesh)
    place = lambda batch: training.to_devices(mesh, batch)
    both = dataclasses.replace(corpus.prepare(cfg.data, BYTES), held_out=side)
    packed = [
        evaluation(parameters, place(b))
        for b in held_out_batches(both, batch=4, length=160)
    ]
    alone = []
    for start, size in zip(side.starts_D, side.targets_D):
        ids = side.ids[start : start + size + 1].astype(np.int32)
        room = (0, 160 - size)
        row = dict(
            tokens=np.pad(ids[:-1], room),
            targets=np.pad(ids[1:], room),
            segments=np.pad(np.ones(size, np.int32), room),
            positions=np.pad(np.arange(size, dtype=np.int32), room),
            weights=np.pad(side.counted[start + 1 :][:size].astype(np.float32), room),
        )
        batch = {k: np.stack([v] + [0 * v] * 3) for k, v in row.items()}
        alone.append(evaluation(parameters, place(batch)))
    sums = [np.sum(jax.device_get(values), axis=0) for values in (packed, alone)]
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)
    assert sums[0][1] == side.tokens and len(packed) * 4 < len(alone)


def test_a_run_on_a_mesh_learns_the_answers_and_stops_after_them(run, folder):
    out, summary = run
    losses = [row["loss"] for row in tiny.rows(out) if "loss" in row]
    assert losses[-1] < 0.1 * losses[0]
    assert summary["held_out_loss"] < 1
    loaded = load(out)
    for i, answer in enumerate(ANSWERS):
        assert "".join(loaded.chat(f"q{i}?", max_tokens=12)) == answer
    messages = conversations()[2][:3]
    assert "".join(loaded.chat(messages, max_tokens=12)) == "no"


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_numbers(folder):
    fields = dict(
        optimizer_lr_schedule="constant", optimizer_warmup_steps=0, train_save_every=4
    )
    training.train(make(folder, "one", train_steps=8, **fields))
    training.train(make(folder, "half", train_steps=4, **fields))
    training.train(make(folder, "half", train_steps=8, **fields), resume=True)
    whole, resumed = tiny.rows(folder / "one"), tiny.rows(folder / "half")
    assert [row for row in resumed if "loss" in row] == [
        row for row in whole if "loss" in row
    ]
    assert resumed[-1] == whole[-1]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(data_train_on="last"), "data.train_on was 'assistant' in the run"),
        (dict(data_format="chat"), "data.format was 'auto' in the run"),
    ],
)
def test_a_resumed_run_keeps_what_counts(run, folder, fields, message):
    with pytest.raises(ConfigError, match=message):
        training.train(make(folder, "run", **fields), resume=True)


def test_a_run_is_a_tokenizer_for_another_run(run):
    again = tokenizer.load(str(run[0]))
    assert again.to_json() == BYTES.to_json()


def test_the_command_answers_a_question(run, capsys):
    words = ["generate", str(run[0]), "--max-tokens", "12", "--chat"]
    assert cli.run([*words, "q1?"]) == 0
    assert capsys.readouterr().out == "blue\n"


def test_the_command_talks_line_by_line(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("q2?\n\nand 6?"))
    words = ["generate", str(run[0]), "--max-tokens", "12", "--chat"]
    assert cli.run(words) == 0
    assert capsys.readouterr().out == "a cat\nno\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "x", "--chat", "y"], "prompt='x' is not accepted"),
        (["--prompts-file", "x", "--chat"], "prompts-file='x' is not accepted"),
        (["--system", "x"], "system='x' is not accepted"),
    ],
)
def test_the_command_takes_one_kind_of_prompt(run, capsys, words, message):
    assert cli.run(["generate", str(run[0]), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_system_message_and_earlier_turns_are_in_the_prompt():
    seen = []

    class Fake:
        def chat(self, messages, **options):
            seen.append((list(messages), options))
            yield "an "
            yield f"answer {len(seen)}"

    out = io.StringIO()
    chat.converse(Fake(), ["q", " ", "r"], dict(top_k=1), system="be", out=out)
    assert out.getvalue() == "an answer 1\nan answer 2\n"
    roles = [message["role"] for message in seen[1][0]]
    assert roles == ["system", "user", "assistant", "user"]
    assert seen[1][0][2]["content"] == "an answer 1" and seen[1][1] == dict(top_k=1)


def test_rows_of_a_prompts_file_may_hold_messages(run, tmp_path):
    from ladder_jax.serve import offline
    from ladder_jax.serve.engine import Engine

    loaded = load(run[0])
    options = Decode(slots=4, steps_per_call=4, fit_shapes=False)
    parts = loaded.model, loaded.config.model, loaded.mesh, options
    engine = Engine(*parts, loaded.tokenizer)
    rows = [
        dict(messages=conversations()[3][:1]),
        dict(messages=[dict(role="pirate", content="x")]),
        dict(messages=conversations()[0][:1], prompt="x"),
        dict(messages=[]),
        dict(messages=conversations()[1][:3], max_tokens=5),
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = offline.run(
        engine, path, tmp_path / "out", dict(max_tokens=12), show=False
    )
    assert tuple(summary) == (5, 0, 3)
    lines = (tmp_path / "out").read_text().splitlines()
    outputs = {row["index"]: row for row in map(json.loads, lines)}
    assert outputs[0]["text"] == "ten" and outputs[0]["finish"] == "stop"
    assert outputs[4]["text"] == "no"
    assert "line 2: messages=" in outputs[1]["error"]
    assert outputs[2]["error"] == "line 3: it has both prompt and messages"
    assert "rows without messages" in outputs[3]["error"]
    bare = Engine(*parts, None)
    submit = offline._chat_prompts(bare)
    with pytest.raises(ConfigError, match="this engine has none"):
        submit(dict(messages=conversations()[0]))


def test_a_shared_template_travels_with_a_checkpoint():
    tok = chat_templates.make(chat_templates.CHATML)
    again = tokenizer.from_json(tok.to_json())
    assert again.chat_template == chat_templates.CHATML
