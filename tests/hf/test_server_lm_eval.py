"""lm-eval's OpenAI back end, unmodified, gives through the server what the model gives
without it.
"""

import pytest
import served
import tiny_llama
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from ladder_jax import config, load_hf
from ladder_jax.evaluation.harness import LadderLM
from ladder_jax.serve.engine import Engine

PAIRS = [
    ("The cat sat", " on the mat"),
    ("The cat sat ", "on the mat"),
    ("<|bos|>The cat", " sat"),
    ("naïve café", " in 東京 🙂"),
    ("The cat s", "at"),
    *(("One two", " " + text) for text in "abcdef"),
    *(("The cat sat on", text) for text in ("a", " b", " the cat", " the cat sat")),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    # Without padding of the vocabulary: the harness counts it, and the engine does not.
    folder = tmp_path_factory.mktemp("llama")
    return load_hf(tiny_llama.save(folder, vocab_size=311))


@pytest.fixture(scope="module")
def server(loaded):
    options = config.Decode(
        slots=2,
        staging=1,
        max_length=64,
        max_logprobs=1,
        prefill_budget=16,
        fit_shapes=False,
    )
    engine = Engine(
        loaded.model, loaded.config.model, loaded.mesh, options, loaded.tokenizer
    )
    with served.serve(engine) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="tiny",
        num_concurrent=3,
        max_length=64,
        batch_size=2,
    )


def instances(kind, arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_scores(client, loaded):
    ours = LadderLM(loaded, max_length=64, add_bos_token=False)
    starts = ("The cat", "One", "東京 was closed, and the")
    greedy = [(s, "".join(list(loaded.generate(s, max_tokens=4)))) for s in starts]
    pairs = [*PAIRS, *(pair for pair in greedy if pair[1])]
    for text in [*(pair[0] for pair in pairs)]:
        assert client.tok_encode(text) == ours.tok_encode(text)
    requests = instances("loglikelihood", pairs)
    got = client.loglikelihood(requests, disable_tqdm=True)
    expected = ours.loglikelihood(requests, disable_tqdm=True)
    for pair, (logprob, is_greedy), other in zip(pairs, got, expected):
        assert logprob == pytest.approx(other[0], abs=2e-4), pair
        assert is_greedy == other[1], pair
    assert {is_greedy for _, is_greedy in got} == {True, False}


def test_outputs(client, loaded):
    ours = LadderLM(loaded, max_length=64, add_bos_token=False)
    arguments = [
        (text, dict(until=["the", "\n\n"], max_gen_toks=12, do_sample=False))
        for text in ("The cat", "One two", "naïve café")
    ]
    requests = instances("generate_until", arguments)
    got = client.generate_until(requests, disable_tqdm=True)
    assert got == ours.generate_until(requests, disable_tqdm=True)
