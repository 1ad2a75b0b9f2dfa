"""Offline generation: every prompt's output once, whatever is interrupted or wrong."""

import functools
import itertools
import json
import os
from unittest import mock

import helpers
import jax
import numpy as np
import pytest

from ladder_jax import generate, sharding
from ladder_jax.config import ConfigError, Decode, Model
from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.run_folder import Lease
from ladder_jax.serve import offline
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.request import EngineFailed, QueueFull, RequestFailed

pytestmark = pytest.mark.usefixtures("fast_compiler")

MODEL_CONFIG = Model(
    vocab_size=264,
    dim=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    ffn_dim=16,
    max_length=32,
    dtype="float32",
    init_std=0.3,
)


@functools.cache
def weights_and_mesh():
    mesh = helpers.make_mesh()
    return helpers.initial_parameters(MODEL_CONFIG, mesh), mesh


@functools.cache
def make_engine():
    weights, mesh = weights_and_mesh()
    decode_config = Decode(slots=4, steps_per_call=4, fit_shapes=False)
    return Engine(weights, MODEL_CONFIG, mesh, decode_config, ByteTokenizer())


def reference(prompt, **options):
    """The ids that the reference generator makes, up to eos."""
    weights, mesh = weights_and_mesh()
    tokenizer = ByteTokenizer()
    ids = tokenizer.prompt(prompt) if isinstance(prompt, str) else prompt
    options = dict(stop_token_ids=[tokenizer.eos], vocabulary=259) | options
    return list(generate.generate(weights, MODEL_CONFIG, mesh, ids, **options))


write = helpers.write_rows


def run(prompts, out, **defaults):
    defaults = dict(max_tokens=5) | defaults
    return offline.run(make_engine(), prompts, out, defaults, show=False)


def records(out):
    """The output's lines by their index."""
    lines = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    by_index = {line["index"]: line for line in lines}
    assert len(by_index) == len(lines), "a row was written twice"
    return by_index


def test_log_probabilities_and_the_length_of_outputs(tmp_path):
    """The second row's prompt is scored, and nothing is generated."""
    rows = [
        dict(prompt="ab", logprobs=0, prompt_logprobs=0, max_tokens=3),
        dict(prompt="abc", prompt_logprobs=2, max_tokens=0),
        dict(prompt="ab", logprobs=1, max_tokens=2),
        dict(prompt="ab", logit_bias={"257": 1000}, min_tokens=2),
        dict(prompt="ab", logit_bias={"257": 1000}, ignore_eos=True),
        dict(prompt="ab", max_tokens=0),
    ]
    weights, mesh = weights_and_mesh()
    engine = Engine(
        weights, MODEL_CONFIG, mesh, Decode(slots=4, max_logprobs=2), ByteTokenizer()
    )
    prompts, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    summary = offline.run(engine, prompts, out, dict(max_tokens=5), show=False)
    assert summary == (6, 0, 1)
    own, scored, likeliest, longer, whole, refused = (
        records(out)[index] for index in range(6)
    )
    names = {"index", "digest", "text", "tokens", "finish"}
    assert set(own) == names | {"logprobs", "prompt_logprobs"}
    assert len(own["logprobs"]) == 3 and all(x < 0 for x in own["logprobs"])
    first, *values = own["prompt_logprobs"]  # bos, a, b
    assert first is None and len(values) == 2 and all(x < 0 for x in values)
    assert set(scored) == names | {"prompt_logprobs", "prompt_top_logprobs"}
    assert (scored["text"], scored["tokens"], scored["finish"]) == ("", [], "length")
    assert scored["prompt_logprobs"][:3] == pytest.approx(own["prompt_logprobs"])
    first, *tops = scored["prompt_top_logprobs"]
    assert first is None and [len(top) for top in tops] == [2, 2, 2]
    for value, ((_, highest), (_, second)) in zip(scored["prompt_logprobs"][1:], tops):
        assert highest >= second and highest >= value
    assert [len(top) for top in likeliest["top_logprobs"]] == [1, 1]
    # Without a temperature, the likeliest id is the token.
    assert [[id] for id in likeliest["tokens"]] == [
        [id for id, _ in top] for top in likeliest["top_logprobs"]
    ]
    assert len(longer["tokens"]) == 2 and longer["finish"] == "stop"
    assert whole["tokens"] == [257] * 5 and whole["finish"] == "length"
    assert "line 6: max_tokens=0 is not accepted" in refused["error"]


def refusal(prompts, out, **defaults):
    """The message with which a run is refused; checks that `out` is as before."""
    before = out.read_bytes()
    with pytest.raises(ConfigError) as error:
        run(prompts, out, **defaults)
    assert out.read_bytes() == before, "a refused run changed the file"
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------ resuming


def test_outputs_of_another_model_are_not_kept(tmp_path):
    rows = [dict(prompt=[1, 2]), dict(prompt=[3, 4])]
    prompts, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    weights, _ = weights_and_mesh()
    other = jax.tree.map(lambda x: x * 1.001, weights)
    engine, defaults = make_engine(), dict(max_tokens=2)
    one = offline.run(engine, prompts, out, defaults, show=False, model=weights)
    again = offline.run(engine, prompts, out, defaults, show=False, model=weights)
    assert (one, again) == ((2, 0, 0), (0, 2, 0))
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="or of another model; choose a new file"):
        offline.run(engine, prompts, out, defaults, show=False, model=other)
    assert out.read_bytes() == before


def test_the_digest_of_a_model_is_the_same_on_another_mesh():
    weights, _ = weights_and_mesh()
    specs = sharding.parameter_specs(weights)
    shardings = sharding.named_shardings(helpers.make_mesh(tensor=2), specs)
    sharded = jax.device_put(weights, shardings)
    assert offline.digest_of(sharded) == offline.digest_of(weights)


def test_a_file_has_one_writer(tmp_path):
    rows = [dict(prompt=[1, 2])]
    prompts, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with Lease(tmp_path, "out", output=out):
        with pytest.raises(ConfigError, match="out.jsonl. is not accepted: process"):
            run(prompts, out)
        assert not out.exists()
        assert run(prompts, tmp_path / "other.jsonl") == (1, 0, 0)
    assert run(prompts, out) == (1, 0, 0)
    names = {"in.jsonl", "out.jsonl", "other.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    rows = [dict(prompt=[i + 1, 2], seed=i, temperature=1.0) for i in range(9)]
    rows.append(dict(prompt=[1], max_tokens=0))
    prompts, out = write(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    assert run(prompts, out) == (10, 0, 1)
    first = records(out)
    for i in range(9):
        options = dict(seed=i, temperature=1.0, max_tokens=5)
        assert first[i]["tokens"] == reference([i + 1, 2], **options)
        assert first[i]["finish"] == "length"
    assert first[9]["error"].startswith("line 10: max_tokens=0 is not accepted")
    lines = out.read_text().splitlines()
    # A process that is killed leaves a part of the line that it was writing.
    for length in (1, 10, 40, len(lines[4]) - 1, len(lines[4])):
        out.write_text("\n".join([*lines[:4], lines[4][:length]]))
        assert run(prompts, out) == (6, 4, sum("error" in line for line in lines[4:]))
        assert records(out) == first
    assert run(prompts, out) == (0, 10, 0)


def test_a_wrong_row_that_was_mended_is_answered_by_the_next_run(tmp_path):
    out, prompts = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    assert run(write(prompts, [dict(prompt="a"), dict(prompt=5)]), out) == (2, 0, 1)
    answer = records(out)[0]
    assert run(write(prompts, [dict(prompt="a"), dict(prompt="b")]), out) == (1, 1, 0)
    assert records(out)[0] == answer
    assert records(out)[1]["tokens"] == reference("b", max_tokens=5)


class FailingRequest:
    """A request that the engine could not finish."""

    finish, text, tokens = "error", "", []

    def __iter__(self):
        raise RequestFailed("request 1 failed: out of memory")

    def cancel(self):
        pass


class FailingEngine:
    """An engine whose device fails all requests."""

    def __init__(self, engine):
        self.options, self.counters = engine.options, engine.counters

    def submit(self, **options):
        return FailingRequest()

    def step(self):
        return True


def test_a_row_that_failed_on_the_device_is_tried_again(tmp_path):
    prompts = write(tmp_path / "in.jsonl", [dict(prompt="a")] * 2)
    out, defaults = tmp_path / "out.jsonl", dict(max_tokens=5)
    engine = FailingEngine(make_engine())
    assert offline.run(engine, prompts, out, defaults, show=False) == (2, 0, 2)
    assert records(out)[1]["error"] == "line 2: request 1 failed: out of memory"
    assert run(prompts, out) == (2, 0, 0)
    assert records(out)[1]["tokens"] == reference("a", max_tokens=5)


def test_rows_of_an_engine_that_ends_are_left_for_the_next_run(tmp_path, monkeypatch):
    """Every device call fails: the engine ends with half of the rows not submitted."""
    weights, mesh = weights_and_mesh()
    options = Decode(slots=1, queue_size=1, fit_shapes=False)
    engine = Engine(weights, MODEL_CONFIG, mesh, options, ByteTokenizer())
    lost = mock.Mock(side_effect=RuntimeError("device lost"))
    monkeypatch.setattr(engine.programs, "run_prefill", lost)
    prompts = write(tmp_path / "in.jsonl", [dict(prompt="a")] * 9)
    out = tmp_path / "out.jsonl"
    with pytest.raises(EngineFailed, match="the engine has ended .*: device lost"):
        offline.run(engine, prompts, out, dict(max_tokens=5), show=False)
    assert len(records(out)) < 9
    assert all("device lost" in record["error"] for record in records(out).values())
    assert run(prompts, out) == (9, 0, 0)


class BusyEngine:
    """An engine whose queue is full of others' requests at every second try."""

    def __init__(self, engine):
        self.engine, self.options = engine, engine.options
        self.counters, self.step = engine.counters, engine.step
        self.tries = 0

    def submit(self, **options):
        self.tries += 1
        if self.tries % 2:
            raise QueueFull("1 requests wait already")
        return self.engine.submit(**options)


def test_a_row_waits_while_the_queue_is_full(tmp_path):
    prompts = write(tmp_path / "in.jsonl", [dict(prompt="a")] * 3)
    out, engine = tmp_path / "out.jsonl", BusyEngine(make_engine())
    summary = offline.run(engine, prompts, out, dict(max_tokens=2), show=False)
    assert summary == (3, 0, 0) and engine.tries == 6


def test_requests_of_an_interrupted_run_are_cancelled(tmp_path, monkeypatch):
    prompts = write(tmp_path / "in.jsonl", [dict(prompt="a")] * 3)
    engine, submitted = make_engine(), []
    submit = engine.submit

    def remember(**options):
        submitted.append(submit(**options))
        return submitted[-1]

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", remember)
        patch.setattr(engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(prompts, tmp_path / "out.jsonl")
    assert [request.finish for request in submitted] == ["cancelled"] * 3
    assert run(prompts, tmp_path / "out.jsonl") == (3, 0, 0)


# ------------------------------------- files that another program or run wrote


@pytest.mark.parametrize(
    "content",
    [
        "my notes\n",
        "my notes",
        "{",
        '{"index": 0}',
        '{"index": 0}\n',
        '{"index": 0, "text": "old format"}\n',
        '{"index": 0, "digest": "0123456789abcdef", "te',
        '{"index": "0", "digest": "0123456789abcdef", "text": ""}\n',
        "[]\n",
        "\n",
        "\x00",
        "[" * 10**5 + "\n",
    ],
)
def test_a_file_that_this_command_did_not_write_stays_as_it_is(tmp_path, content):
    prompts, out = write(tmp_path / "in.jsonl", [dict(prompt=[1])]), tmp_path / "out"
    if content == "{":
        content = "{my notes"  # "{" alone could be a record that was cut off
    out.write_text(content)
    message = refusal(prompts, out)
    assert message.startswith(f"out={str(out)!r} is not accepted: its l")
    assert message.endswith("; choose a new file")


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("link", ["", "./in.jsonl", "symlink", "hard link"])
def test_the_prompts_file_is_never_the_output_file(tmp_path, monkeypatch, link, end):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": [1]}' + end)
    out = tmp_path / "link"
    if link == "symlink":
        out.symlink_to(prompts)
    elif link == "hard link":
        out.hardlink_to(prompts)
    else:
        out = type(out)(link or prompts)
    assert "it is the prompts file" in refusal(prompts, out)


def test_an_output_that_is_no_file_is_refused(tmp_path):
    prompts = write(tmp_path / "in.jsonl", [dict(prompt=[1])])
    with pytest.raises(ConfigError, match="it is not a file"):
        run(prompts, tmp_path)
    with pytest.raises(ConfigError, match="it is not a file"):
        run(prompts, os.devnull)


@pytest.mark.parametrize(
    "rows, defaults",
    [
        ([dict(prompt=[1]), dict(prompt=[3])], {}),
        ([dict(prompt=[2]), dict(prompt=[1])], {}),
        ([dict(prompt=[1])], {}),
        ([dict(prompt=[1]), dict(prompt=[2], max_tokens=4)], {}),
        ([dict(prompt=[1]), dict(prompt=[2])], dict(max_tokens=4)),
        ([dict(prompt=[1]), dict(prompt=[2])], dict(temperature=0.5)),
        ([dict(prompt=[1]), dict(prompt=[2])], dict(seed=1)),
    ],
)
def test_answers_to_other_prompts_or_options_are_refused(tmp_path, rows, defaults):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    run(write(prompts, [dict(prompt=[1]), dict(prompt=[2])]), out)
    message = refusal(write(prompts, rows), out, **defaults)
    assert "is the output for another prompt or other options than line" in message


def test_rows_that_were_added_at_the_end_are_answered(tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert run(write(prompts, [dict(prompt=[1])]), out) == (1, 0, 0)
    assert run(write(prompts, [dict(prompt=[1]), dict(prompt=[2])]), out) == (1, 1, 0)


# ---------------------------------------------------------------- wrong rows


@pytest.mark.parametrize(
    "line, message",
    [
        ("nonsense", "it is not JSON: "),
        ("[1]", "it is not a JSON object"),
        ("null", "it is not a JSON object"),
        ("{}", "it has no prompt"),
        ('{"prompt": 5}', "its prompt is not accepted"),
        ('{"prompt": ["a", "b"]}', "its prompt is not accepted"),
        ('{"prompt": [true]}', "its prompt is not accepted"),
        ('{"prompt": [1.5]}', "its prompt is not accepted"),
        ('{"prompt": [300]}', "prompt=[300] is not accepted"),
        ('{"prompt": [1e400]}', "its prompt is not accepted"),
        ('{"prompt": [100000000000000000000]}', ""),
        ('{"prompt": []}', "prompt=[] is not accepted"),
        ('{"prompt": "a", "top_k": Infinity}', "top_k=inf is not accepted"),
        ('{"prompt": "a", "top_k": NaN}', "top_k=nan is not accepted"),
        ('{"prompt": "a", "temperature": null}', "temperature=None is not accepted"),
        ('{"prompt": "a", "max_tokens": "5"}', "max_tokens="),
        ('{"prompt": "a", "stop": 5}', ""),
        ('{"prompt": "a", "stop_token_ids": ["x"]}', ""),
        ('{"prompt": "a", "warmth": 1}', "warmth is not a sampling parameter"),
        ('{"prompt": "a", "": 1}', ""),
        ('{"prompt": "a", "self": 1}', ""),
        ('{"prompt": "a", "x": ' + "[" * 10**5 + "}", "it is not JSON: "),
        ('{"prompt": "a", "x": ' + "[" * 900 + "]" * 900 + "}", ""),
        (b'{"prompt": "\xff"}', "it is not UTF-8 at byte 12"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_row_gets_an_error_and_the_others_are_answered(tmp_path, line, message):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    good = b'{"prompt": "ab"}\n'
    prompts.write_bytes(good + b"\n" + line + b"\n" + good)
    assert run(prompts, out) == (3, 0, 1)
    rows = records(out)
    assert sorted(rows) == [0, 2, 3], "blank lines are counted and skipped"
    assert rows[2]["error"].startswith(f"line 3: {message}")
    for index in (0, 3):
        assert rows[index]["tokens"] == reference("ab", max_tokens=5)
    assert run(prompts, out) == (0, 3, 0)


@pytest.mark.parametrize(
    "defaults, message",
    [
        (dict(temperature=-1.0), "temperature=-1.0 is not accepted"),
        (dict(seed=-1), "seed=-1 is not accepted"),
        (dict(seed="x"), "seed='x' is not accepted"),
    ],
)
def test_wrong_defaults_are_refused_before_anything_is_written(
    tmp_path, defaults, message
):
    prompts, out = write(tmp_path / "in.jsonl", [dict(prompt=[1])]), tmp_path / "out"
    with pytest.raises(ConfigError) as error:
        run(prompts, out, **defaults)
    assert str(error.value).startswith(message)
    assert not out.exists()


def test_a_prompts_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="prompts-file=.* cannot be read: No such"):
        run(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# --------------------------------------------------------------------- lines


def test_a_line_ends_at_a_newline_alone(tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["one\u2028two", "a\x85b", "c\x0bd\x1ce", "xy", "last"]
    lines = [json.dumps(dict(prompt=text), ensure_ascii=False) for text in texts]
    lines[3] += "\r"
    prompts.write_bytes("\n".join(lines).encode())
    assert run(prompts, out, max_tokens=3) == (5, 0, 0)
    for index, text in enumerate(texts):
        expected = reference(text, max_tokens=3)
        assert records(out)[index]["tokens"] == expected, text


def test_a_prompt_with_a_lone_surrogate_is_answered(tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a\\ud800"}\n{"prompt": "b", "\\ud800": 1}\n')
    assert run(prompts, out) == (2, 0, 1)
    assert "\ud800" in records(out)[1]["error"], "the error names the option"
    assert run(prompts, out) == (0, 2, 0)


# --------------------------------------------------------------------- seeds


def test_equal_prompts_get_samples_that_are_equal_as_often_as_independent_ones(
    tmp_path,
):
    """The pairs of rows with equal tokens, against the model's probabilities."""
    count = 300
    rows = [dict(prompt=[7, 8, 9])] * count
    prompts, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    run(prompts, out, max_tokens=1, temperature=1.0, stop_token_ids=[])
    tokens = [records(out)[index]["tokens"][0] for index in range(count)]
    equal = sum(a == b for a, b in itertools.combinations(tokens, 2))
    weights, mesh = weights_and_mesh()
    logits, _ = generate.make_forward(MODEL_CONFIG, mesh)(
        weights,
        np.array([[7, 8, 9]]),
        np.arange(3)[None],
        generate.empty_cache(MODEL_CONFIG, mesh, 1, 3),
    )
    p = np.asarray(jax.nn.softmax(logits[0, -1, :259]))
    pairs = count * (count - 1) / 2
    same = (p**2).sum()
    variance = pairs * (same - same**2) + pairs * 2 * (count - 2) * (
        (p**3).sum() - same**2
    )
    assert abs(equal - pairs * same) < 5 * variance**0.5, (equal, pairs * same)


def test_the_seeds_of_rows_are_reproducible_and_of_their_own(tmp_path):
    rows = [dict(prompt="ab")] * 6 + [dict(prompt="ab", seed=3)] * 2
    prompts = write(tmp_path / "in.jsonl", rows)
    outputs = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        out = tmp_path / name
        run(prompts, out, temperature=1.0, seed=seed)
        outputs[name] = [records(out)[i]["tokens"] for i in range(8)]
    assert outputs["first"] == outputs["again"]
    assert len({tuple(tokens) for tokens in outputs["first"][:6]}) == 6
    assert outputs["first"][6] == outputs["first"][7] == outputs["other"][6]
    assert outputs["first"][:6] != outputs["other"][:6]
    seed = offline.row_seed(0, 2)
    expected = reference("ab", max_tokens=5, temperature=1.0, seed=seed)
    assert outputs["first"][2] == expected


def test_row_seeds_are_spread_over_all_seeds():
    seeds = {offline.row_seed(run, row) for run in range(100) for row in range(1000)}
    # Of 100,000 independent draws from 2 ** 32, one pair is equal on average.
    assert len(seeds) > 100_000 - 10
    assert 0 <= min(seeds) < 2**20 and 2**32 - 2**20 < max(seeds) < 2**32
