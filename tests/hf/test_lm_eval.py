"""lm-eval's model ladder_jax gives what its Hugging Face backend gives, one by one."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
import tiny_llama
import torch
from helpers import ROOT, code_environment
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ladder_jax import cli, config, load_hf
from ladder_jax.config import ConfigError
from ladder_jax.data.tokenizer import HuggingFace
from ladder_jax.evaluation import perplexity
from ladder_jax.evaluation.harness import LadderLM

TASKS = str(ROOT / "configs" / "eval")
LONG = "one two three, the cat sat on the mat in 東京. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_hf(folder)


def backend(folder, **options):
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, **options)


@pytest.fixture(scope="module")
def theirs(folder):
    return backend(folder)


def instances(kind, arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = [
    ("The cat sat", " on the mat"),
    ("The cat sat ", "on the mat"),  # the space moves to the continuation
    ("The cat sat \n ", " on"),
    ("", "The cat"),
    ("", "<|bos|>The cat"),
    ("<|bos|>The cat", " sat"),
    ("The <|eos|> cat", " sat<|eos|>"),
    ("naïve café", " in 東京 🙂"),
    ("The cat s", "at"),
    (LONG, " three"),  # loses its first ids
    (LONG, LONG[:60]),
    (LONG * 3, " sat"),
    *((LONG[:40], text) for text in ("a", " b", " the cat", " the cat sat", "🙂")),
    *(("One two", " " + text) for text in "abcdefghijklmnopqrstuvwxyz"),
    ("<|eos|>", " x"),
]


@pytest.mark.parametrize(
    "options",
    [{}, dict(add_bos_token=False), dict(add_bos_token=True), dict(max_length=20)],
    ids=str,
)
def test_loglikelihood(folder, loaded, options):
    pairs = PAIRS if "max_length" not in options else PAIRS[:10]
    options = dict(max_length=64) | options
    ours, theirs = LadderLM(loaded, **options), backend(folder, **options)
    for text in [*(pair[0] for pair in pairs), LONG]:
        assert ours.tok_encode(text) == theirs.tok_encode(text), text
    # Where the two become one token, nothing is left to score, and theirs fails.
    pairs = [pair for pair in pairs if not pair[0] or theirs._encode_pair(*pair)[1]]
    assert len(pairs) >= 9
    requests = instances("loglikelihood", pairs)
    got = ours.loglikelihood(requests, disable_tqdm=True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for pair, (log_prob, greedy), other in zip(pairs, got, expected):
        assert log_prob == pytest.approx(other[0], abs=2e-4), pair
        assert greedy == other[1], pair


def test_is_greedy_is_exact(loaded, theirs):
    """Continuations that are what the model generates, and what it nearly does."""
    ours = LadderLM(loaded)
    pairs = []
    for start in ("The cat", "One", "café in", "東京 was closed, and the"):
        tokens = list(loaded.generate(start, max_tokens=6))
        for count in (1, 2, 6):
            text = "".join(tokens[:count])
            pairs += [(start, text), (start, text + "x"), (start, text[:-1] + "~")]
    requests = instances("loglikelihood", [pair for pair in pairs if pair[1]])
    got = ours.loglikelihood(requests, disable_tqdm=True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in got} == {True, False}


@pytest.mark.parametrize(
    "options", [{}, dict(max_length=48), dict(max_length=16, prefix_token_id=5)]
)
def test_loglikelihood_rolling(folder, loaded, options):
    texts = ["x", "The cat sat.", LONG, LONG * 2 + "end", ""]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    got = LadderLM(loaded, **options).loglikelihood_rolling(requests, disable_tqdm=True)
    expected = backend(folder, **options).loglikelihood_rolling(requests, True)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


GENERATE = [
    ("The cat sat", dict(until=[])),
    ("The cat sat on", dict(until=["t", "\n"], max_gen_toks=20)),
    ("One two", dict(until="e", max_gen_toks=30, do_sample=False)),
    ("naïve café ", dict(until=["<|eos|>", "<|pad|>"], max_gen_toks=12)),
    (LONG, dict(until=["zzz"], max_gen_toks=10, temperature=0.0)),
    ("東京", dict(max_gen_toks=1)),
    ("<|bos|>The", dict(until=["cat"], max_new_tokens=8)),
    ("x", dict(until=["th", "he", "a"], max_gen_toks=40)),
]


def test_generate_until(folder, loaded):
    ours = LadderLM(loaded)
    ours_requests, expected = [], []
    theirs = backend(folder)
    for context, options in GENERATE:
        options.setdefault(
            "max_gen_toks" if "max_new_tokens" not in options else "x", 9
        )
        options.pop("x", None)
        ours_requests += instances("generate_until", [(context, dict(options))])
        one = instances("generate_until", [(context, dict(options))])
        expected += theirs.generate_until(one, disable_tqdm=True)
    got = ours.generate_until(ours_requests, disable_tqdm=True)
    assert got == expected
    assert any(got) and len(set(got)) > 4
    # Again, on the engine that is there already.
    assert ours.generate_until(ours_requests[:3], disable_tqdm=True) == expected[:3]
    assert ours.generate_until([]) == []


def test_a_continuation_that_is_part_of_the_contexts_last_token(loaded):
    """Their last token is one token together: nothing is left to score."""
    request = instances("loglikelihood", [("na", "ïve")])
    assert LadderLM(loaded).loglikelihood(request, disable_tqdm=True) == [(0.0, True)]


def test_sampling_has_a_seed_for_each_request(loaded):
    options = dict(do_sample=True, temperature=1.0, top_p=0.9, max_gen_toks=12)
    requests = instances("generate_until", [("The cat", options)] * 4)
    first = LadderLM(loaded).generate_until(requests, disable_tqdm=True)
    assert len(set(first)) > 1
    assert LadderLM(loaded).generate_until(requests, disable_tqdm=True) == first
    other = LadderLM(loaded, seed=1).generate_until(requests, disable_tqdm=True)
    assert other != first


MISTAKES = {
    "num_beams=4 is not accepted": dict(num_beams=4),
    "max_gen_toks=256 is not accepted": dict(max_gen_toks=256),
    "max_gen_toks=0 is not accepted": dict(max_gen_toks=0),
    "top_p": dict(do_sample=True, temperature=1.0, top_p=3.0, max_gen_toks=4),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_generation_options_that_are_not_accepted(loaded, message):
    requests = instances("generate_until", [("x", MISTAKES[message])])
    with pytest.raises(ConfigError, match=message):
        LadderLM(loaded).generate_until(requests, disable_tqdm=True)


def test_mistakes_of_the_model(loaded):
    with pytest.raises(ConfigError, match="model_args: pretrained is not accepted"):
        LadderLM(loaded, pretrained="x")
    with pytest.raises(ConfigError, match="max_length=257 is not accepted"):
        LadderLM(loaded, max_length=257)
    with pytest.raises(ConfigError, match="a continuation has"):
        request = instances("loglikelihood", [("a", LONG)])
        LadderLM(loaded, max_length=8).loglikelihood(request, disable_tqdm=True)
    plain = loaded._replace(tokenizer=tiny.tokenizer.ByteTokenizer())
    with pytest.raises(ConfigError, match="no chat template"):
        LadderLM(plain).chat_template(True)


def test_chat_template(loaded, theirs):
    ours = LadderLM(loaded)
    chat = [
        dict(role="system", content="Be brief."),
        dict(role="user", content="Hi <there>\n"),
    ]
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    chat.append(dict(role="assistant", content="Well"))
    expected = theirs.apply_chat_template(chat, add_generation_prompt=False)
    assert ours.apply_chat_template(chat, add_generation_prompt=False) == expected
    assert ours.tokenizer_name == LadderLM(loaded).tokenizer_name
    refusing = with_template(loaded, "{{ raise_exception('no such role') }}")
    with pytest.raises(ConfigError, match="cannot be applied: no such role"):
        refusing.apply_chat_template(chat[1:])
    only_users = with_template(
        loaded,
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('x') }}{% endif %}{{ m.content }}{% endfor %}",
    )
    assert only_users.apply_chat_template(chat[:2]) == chat[1]["content"]


def with_template(loaded, template):
    """The model with another chat template."""
    old = loaded.tokenizer
    special = old.special._replace(chat_template=template)
    tokenizer = HuggingFace(old._json, special)
    return LadderLM(loaded._replace(tokenizer=tokenizer))


# ---------------------------------------------------------------- tasks

OWN_TASKS = {
    "rolling": dict(
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[
            dict(metric=name) for name in ("word_perplexity", "bits_per_byte")
        ],
    ),
    "write": dict(
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        generation_kwargs=dict(until=["\n", "c"], max_gen_toks=8, do_sample=False),
        metric_list=[dict(metric="exact_match")],
        num_fewshot=0,
    ),
}


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """A folder with a rolling task and a generating task."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        dict(text=f"{text} number {i}", answer="one")
        for i, text in enumerate([tiny_llama.TEXT, LONG, "short"] * 2)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict(test=str(folder / "rows.jsonl"))
    for name, fields in OWN_TASKS.items():
        task = dict(
            task=name,
            dataset_path="json",
            dataset_kwargs=dict(data_files=files),
            test_split="test",
            **fields,
        )
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return str(folder)


def test_tasks_example_by_example(loaded, theirs, own_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    names = ["docs_sentence", "docs_last_word", "minimal_pairs", "rolling", "write"]
    manager = TaskManager(include_path=[TASKS, own_tasks], include_defaults=False)
    results = [
        simple_evaluate(
            model, tasks=names, limit=6, task_manager=manager, bootstrap_iters=0
        )
        for model in (LadderLM(loaded), theirs)
    ]
    ours, others = ([r["samples"][name] for name in names] for r in results)
    for name, own_rows, other_rows in zip(names, ours, others):
        assert len(own_rows) == len(other_rows) == 6
        for own, other in zip(own_rows, other_rows):
            assert own["arguments"] == other["arguments"]
            compare(own["filtered_resps"], other["filtered_resps"], name)
        scores, other_scores = (r["results"][name] for r in results)
        for key, value in scores.items():
            if isinstance(value, float):
                assert value == pytest.approx(other_scores[key], rel=1e-4), (name, key)


def compare(ours, theirs, name):
    """Responses: texts, numbers, or (log-probability, is greedy)."""
    for own, other in zip(ours, theirs, strict=True):
        if isinstance(own, str):
            assert own == other
        else:
            own, other = np.ravel(own), np.ravel(other)
            assert float(own[0]) == pytest.approx(float(other[0]), abs=1e-3), name
            assert list(own[1:]) == list(other[1:])


@pytest.fixture(scope="module")
def checkpoint(loaded, tmp_path_factory):
    """A checkpoint of the same weights, without a chat template, for commands."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = json.loads(loaded.tokenizer.to_json()) | dict(chat_template=None)
    meta = dict(
        config=config.to_dict(loaded.config),
        tensor=1,
        tokenizer=json.dumps(tokenizer),
    )
    with tiny.Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, dict(model=loaded.model), None, meta)
    return folder


def test_command(checkpoint, capsys):
    words = ["eval", str(checkpoint), "--include-path", TASKS, "--limit", "5"]
    assert cli.run([*words, "--tasks", "minimal_pairs,docs_last_word", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values["results"]) == {"minimal_pairs", "docs_last_word"}
    assert values["n-samples"]["minimal_pairs"]["effective"] == 5
    sharded = [*words, "--tasks", "minimal_pairs", "--mesh.tensor", "4"]
    assert cli.run(sharded) == 0
    assert "|minimal_pairs|" in capsys.readouterr().out.replace(" ", "")
    mistakes = {
        "minimal_pair": "perhaps minimal_pairs",
        "minimal_pairs --limit 1.5": "limit=1.5 is not accepted",
        "minimal_pairs --num-fewshot -1": "num_fewshot=-1 is not accepted",
        "minimal_pairs --apply-chat-template": "no chat template",
        "minimal_pairs --include-path /nowhere": "include_path='/nowhere'",
    }
    for mistake, message in mistakes.items():
        assert cli.run([*words, "--tasks", *mistake.split()]) == 2, mistake
        out, error = capsys.readouterr()
        assert message in error and error.count("\n") == 1 and not out


def test_the_command_of_the_harness(checkpoint, tmp_path):
    command = [sys.executable, "-m", "ladder_jax.evaluation.harness", "run"]
    command += ["--model", "ladder_jax", "--model_args", f"path={checkpoint}"]
    command += ["--tasks", "minimal_pairs", "--include_path", TASKS, "--limit", "3"]
    command += ["--output_path", str(tmp_path / "out.json"), "--batch_size", "4"]
    done = subprocess.run(
        command,
        env=code_environment() | dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "minimal_pairs" in done.stdout
    assert list(tmp_path.rglob("*.json"))


def test_the_registry_has_the_model():
    assert get_model("ladder_jax") is LadderLM


# ---------------------------------------------------------------- perplexity


@pytest.mark.parametrize("mesh", [dict(data=1), dict(data=2, tensor=4)])
def test_perplexity_equals_the_loss_of_transformers(folder, theirs, mesh):
    loaded = load_hf(folder, mesh=config.Mesh(**mesh))
    texts = [tiny_llama.TEXT, "One two", "café 🙂"]
    for bos in (True, False):
        documents = list(perplexity.encode(texts, loaded.tokenizer, bos=bos))
        losses = perplexity.score(loaded, documents, context=64, stride=9)
        for document, loss in zip(documents, losses):
            ids = torch.tensor(document.ids[None].astype(np.int64))
            with torch.no_grad():
                mean = theirs.model(input_ids=ids, labels=ids).loss
            assert loss / (len(document.ids) - 1) == pytest.approx(float(mean), 1e-5)
    assert jax.tree.leaves(loaded.model)


def test_perplexity_of_long_texts_equals_the_harness(loaded, theirs):
    """With a stride of the whole context, the windows are the harness's."""
    ours = LadderLM(loaded, add_bos_token=False, max_length=64)
    documents = list(perplexity.encode([LONG], loaded.tokenizer))
    losses = perplexity.score(loaded, documents, context=64, stride=64)
    request = instances("loglikelihood_rolling", [(LONG,)])
    expected = ours.loglikelihood_rolling(request, disable_tqdm=True)
    np.testing.assert_allclose(-losses, expected, rtol=1e-6)
