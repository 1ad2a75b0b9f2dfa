"""The paths beside completions and chat: models, tokenisation, health, the page."""

import openai
import pytest
import served
from served import LENGTH

from ladder_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
MESSAGES = [dict(role="user", content="Who are you?")]
# What the default template of a tokenizer without one makes of them.
PROMPT = "### user\nWho are you?\n\n### assistant\n"


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine()) as running:
        yield running


def test_the_models_are_one(server):
    [card] = server.openai.models.list().data
    assert card.id == "tiny" and card.object == "model"
    assert card.model_dump()["max_model_len"] == LENGTH
    assert server.openai.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.models.retrieve("some/other")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.completions.create(model="other", prompt="x")
    assert error.value.param == "model"
    assert server.post("/v1/completions", dict(prompt="x")).status_code == 200


def test_tokenize_and_detokenize(server):
    text = "a wörd <|eos|>"
    answer = server.post("/tokenize", dict(prompt=text, return_token_strs=True)).json()
    assert answer["tokens"] == TOKENIZER.prompt(text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == LENGTH
    assert answer["token_strs"][:2] == ["<|bos|>", "a"]
    plain = server.post("/tokenize", dict(prompt=text, add_special_tokens=False))
    assert plain.json()["tokens"] == TOKENIZER.encode(text)
    back = server.post("/detokenize", dict(tokens=plain.json()["tokens"]))
    assert back.json() == dict(prompt=text)
    chat = server.post("/tokenize", dict(messages=MESSAGES)).json()
    assert chat["tokens"] == TOKENIZER.prompt(PROMPT)
    info = server.http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|eos|>" and "### " in info["chat_template"]


def test_health_ready_metrics_and_state(server):
    assert server.http.get("/health").json() == dict(status="ready", detail=None)
    assert server.http.get("/ready").status_code == 200
    assert server.http.head("/ready").status_code == 200
    before = server.http.get("/metrics").text
    whole = server.openai.completions.create(
        model="tiny", prompt="count", max_tokens=7, extra_body=dict(ignore_eos=True)
    )
    assert whole.usage.completion_tokens == 7
    after = server.http.get("/metrics").text

    def value(text, name):
        [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[-1])

    grown = {
        "ladder_jax_prompt_tokens_total": 6,
        "ladder_jax_generation_tokens_total": 7,
        'ladder_jax_requests_total{finish="length"}': 1,
        "ladder_jax_time_to_first_token_seconds_count": 1,
        "ladder_jax_time_per_output_token_seconds_count": 1,
        "ladder_jax_e2e_request_latency_seconds_count": 1,
        "ladder_jax_request_queue_time_seconds_count": 1,
    }
    for name, by in grown.items():
        assert value(after, name) - value(before, name) == by, name
    for name in ("requests_running", "requests_waiting", "slot_occupancy"):
        assert value(after, f"ladder_jax_{name}") == 0
    assert value(after, "ladder_jax_compiles_after_ready_total") == 0
    state = server.http.get("/state").json()
    assert state["status"] == "ready" and state["slots"] == [None] * 4
    assert state["latencies"]["first_token"]["p50"] > 0


def test_the_page_and_the_openapi_document_are_there(server):
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    document = server.http.get("/openapi.json").json()
    assert "CompletionRequest" in document["components"]["schemas"]
    references = str(document)
    for name in document["components"]["schemas"]:
        assert f"#/components/schemas/{name}" in references, name
