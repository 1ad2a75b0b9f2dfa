"""The API by the official client: every option, streamed and not, and the engine's own
tokens.
"""

import asyncio
import random

import pytest
import served
from served import LENGTH

from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.server import protocol

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine()) as running:
        yield running


# ---------------------------------------------------------------- the expected output


def expected(server, prompt, end_ids, **options):
    """(tokens with text and log-probabilities, finish) of the engine itself."""
    request = server.engine.submit(prompt, stop_token_ids=end_ids, **options)
    tokens = list(request)
    return tokens, request.finish, request


def as_text(token, previous):
    data = TOKENIZER.token_bytes(token, previous)
    if data is None:
        return TOKENIZER.special.names[{256: "bos", 257: "eos", 258: "pad"}[token]]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def join_completion(events):
    """The response that the events of a stream add up to."""
    choices = {}
    for event in events:
        for part in event["choices"]:
            index = part["index"]
            choice = choices.setdefault(
                index, dict(index=index, text="", logprobs=None, finish_reason=None)
            )
            choice["text"] += part["text"]
            assert choice["finish_reason"] is None, "an event after the last one"
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                before = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                choice["logprobs"] = {
                    name: before[name] + part["logprobs"][name] for name in before
                }
    return [choices[index] for index in sorted(choices)]


def join_chat(events):
    """The choices that the events of a stream of answers add up to."""
    choices = {}
    for event in events:
        for part in event["choices"]:
            index = part["index"]
            if index not in choices:
                assert part["delta"]["role"] == "assistant"
                choices[index] = dict(
                    index=index,
                    message=dict(role="assistant", content="", refusal=None),
                    logprobs=None,
                    finish_reason=None,
                )
            choice = choices[index]
            choice["message"]["content"] += part["delta"].get("content") or ""
            assert choice["finish_reason"] is None, "an event after the last one"
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                before = choice["logprobs"] or dict(content=[], refusal=None)
                before["content"] = before["content"] + part["logprobs"]["content"]
                choice["logprobs"] = before
    return [choices[index] for index in sorted(choices)]


# ---------------------------------------------------------------- completions

# Options of the client, and the same ones of the engine.
COMPLETIONS = {
    "greedy": (dict(temperature=0), dict()),
    "logprobs": (dict(temperature=0, logprobs=3), dict(logprobs=3)),
    "logprobs of the tokens alone": (dict(temperature=0, logprobs=0), dict(logprobs=0)),
    "seed": (dict(seed=11, logprobs=2), dict(temperature=1.0, seed=11, logprobs=2)),
    "a seed of 64 bits": (
        dict(seed=2**40 + 5, temperature=1),
        dict(temperature=1.0, seed=5),
    ),
    "top_p": (dict(seed=1, top_p=0.7), dict(temperature=1.0, seed=1, top_p=0.7)),
    "stop": (
        dict(temperature=0, stop=["\x02", "p"], logprobs=1),
        dict(stop=["\x02", "p"], logprobs=1),
    ),
    "bias": (
        dict(temperature=0, logit_bias={"65": 20.0, "66": 18}),
        dict(logit_bias={65: 20.0, 66: 18.0}),
    ),
    "penalties": (
        dict(temperature=0, presence_penalty=1.5, frequency_penalty=-0.5),
        dict(presence_penalty=1.5, frequency_penalty=-0.5),
    ),
    "extra": (
        dict(
            seed=3,
            extra_body=dict(
                top_k=7, min_p=0.05, repetition_penalty=1.3, priority=5, ignore_eos=True
            ),
        ),
        dict(
            temperature=1.0,
            seed=3,
            top_k=7,
            min_p=0.05,
            repetition_penalty=1.3,
            priority=5,
            end_ids=(),
        ),
    ),
    "stop ids": (
        dict(temperature=0, extra_body=dict(stop_token_ids=[2, 112])),
        dict(end_ids=(257, 2, 112)),
    ),
    "all tokens": (
        dict(temperature=1.0, seed=4, extra_body=dict(top_k=-1)),
        dict(temperature=1.0, seed=4),
    ),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_completion_streamed_or_not_is_the_engines_own(server, name):
    given, own = COMPLETIONS[name]
    prompt = "a prompt: " + name
    own = dict(own)
    end_ids = own.pop("end_ids", (TOKENIZER.eos,))
    tokens, finish, request = expected(
        server, TOKENIZER.prompt(prompt), end_ids, max_tokens=30, **own
    )
    common = dict(model="tiny", prompt=prompt, max_tokens=30, **given)
    whole = server.openai.completions.create(**common)
    [choice] = whole.choices
    assert choice.text == request.text
    assert choice.finish_reason == finish
    assert whole.usage.prompt_tokens == 1 + len(prompt)
    assert whole.usage.completion_tokens == len(request.tokens)
    assert whole.usage.total_tokens == 1 + len(prompt) + len(request.tokens)
    assert (whole.object, whole.model) == ("text_completion", "tiny")
    if given.get("logprobs") is None:
        assert choice.logprobs is None
    else:
        check_logprobs(choice.logprobs, tokens, own["logprobs"])
    stream = server.openai.completions.create(
        **common, stream=True, stream_options=dict(include_usage=True)
    )
    *events, last = [event.to_dict() for event in stream]
    assert join_completion(events) == whole.to_dict()["choices"]
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == [] and last["usage"] == whole.usage.to_dict()
    for event in (*events, last):
        assert event["id"] == events[0]["id"].strip() and event["model"] == "tiny"
        protocol.Completion.model_validate(event)
    protocol.Completion.model_validate(whole.to_dict())


def check_logprobs(logprobs, tokens, count):
    """The log-probabilities are those of the engine, token by token."""
    ids = [token for token in tokens if token.id is not None]
    assert len(logprobs.tokens) == len(ids)
    offset, offsets = 0, []
    for token in tokens:
        if token.id is not None:
            offsets.append(offset)
        offset += len(token.text)
    assert logprobs.text_offset == offsets
    previous = None
    for i, token in enumerate(ids):
        assert logprobs.tokens[i] == as_text(token.id, previous)
        assert logprobs.token_logprobs[i] == pytest.approx(token.logprob, abs=1e-6)
        top = dict(logprobs.top_logprobs[i])
        expected_top = {as_text(id, previous): lp for id, lp in token.top[:count]}
        expected_top.setdefault(as_text(token.id, previous), token.logprob)
        assert top == pytest.approx(expected_top, abs=1e-6)
        previous = token.id


def test_several_prompts_and_outputs_come_in_order(server):
    prompts = ["one", "and two"]
    for kind in (prompts, [TOKENIZER.prompt(prompt) for prompt in prompts]):
        common = dict(
            model="tiny", prompt=kind, max_tokens=12, n=2, seed=5, temperature=1
        )
        whole = server.openai.completions.create(**common, logprobs=1)
        texts = [
            expected(
                server,
                TOKENIZER.prompt(prompt),
                (TOKENIZER.eos,),
                max_tokens=12,
                temperature=1.0,
                seed=5 + i,
            )[2].text
            for prompt in prompts
            for i in range(2)
        ]
        assert [choice.text for choice in whole.choices] == texts
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert whole.usage.prompt_tokens == 4 + 8  # a prompt counts once
        stream = server.openai.completions.create(**common, logprobs=1, stream=True)
        joined = join_completion([event.to_dict() for event in stream])
        assert joined == whole.to_dict()["choices"]


def test_ids_get_no_begin_token(server):
    for ids in ([104, 105], [256, 104, 105]):
        whole = server.openai.completions.create(
            model="tiny", prompt=ids, max_tokens=5, temperature=0
        )
        request = expected(server, ids, (TOKENIZER.eos,), max_tokens=5)[2]
        assert whole.usage.prompt_tokens == len(ids)
        assert whole.choices[0].text == request.text


def test_best_of_returns_the_likeliest_outputs(server):
    prompt = "the best"
    requests = [
        expected(
            server,
            TOKENIZER.prompt(prompt),
            (TOKENIZER.eos,),
            max_tokens=10,
            temperature=1.0,
            seed=20 + i,
            logprobs=0,
        )[:3:2]
        for i in range(5)
    ]
    means = [
        sum(t.logprob for t in tokens if t.id is not None) / max(len(r.tokens), 1)
        for tokens, r in requests
    ]
    order = sorted(range(5), key=lambda i: -means[i])[:2]
    whole = server.openai.completions.create(
        model="tiny", prompt=prompt, max_tokens=10, n=2, best_of=5, seed=20
    )
    assert [c.text for c in whole.choices] == [requests[i][1].text for i in order]
    assert [c.index for c in whole.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in whole.choices)
    counted = sum(len(request.tokens) for _, request in requests)
    assert whole.usage.completion_tokens == counted


def completion(server, **body):
    """The response as a dict; the same as a stream gives."""
    whole = server.post("/v1/completions", body)
    assert whole.status_code == 200, whole.text
    events = server.events("/v1/completions", body | dict(stream=True))
    assert join_completion(events) == whole.json()["choices"]
    return whole.json()


@pytest.mark.parametrize("max_tokens", [0, 1, 9])
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_echo_scores_the_prompt(server, kind, max_tokens):
    """What lm-eval sends; prompts are prefilled in one piece or in several."""
    for length in (2, 15, 16, 17, 33, 100):
        text = ("a wörd and then some more of it; " * 4)[:length]
        ids = TOKENIZER.prompt(text)
        request = server.engine.submit(
            ids,
            max_tokens=max_tokens,
            logprobs=2,
            prompt_logprobs=2,
            stop_token_ids=() if max_tokens == 1 else (257,),
        ).result()
        body = dict(prompt=ids if kind == "ids" else text, echo=True, logprobs=2)
        [choice] = completion(server, **body, max_tokens=max_tokens, temperature=0)[
            "choices"
        ]
        assert choice["text"] == text + request.text
        written = choice["logprobs"]
        sequence = [*ids, *request.tokens]
        texts = [as_text(token, None) for token in sequence]
        assert written["tokens"] == texts
        scores = [score and score[0] for score in request.prompt_logprobs]
        assert scores[0] is None and len(scores) == len(ids)
        assert written["token_logprobs"][: len(ids)] == pytest.approx(scores, abs=1e-6)
        for token, score, top in zip(
            ids[1:], request.prompt_logprobs[1:], written["top_logprobs"][1:]
        ):
            best = {as_text(id, None): logprob for id, logprob in score[1]}
            assert top == pytest.approx(
                {as_text(token, None): score[0]} | best, abs=1e-6
            )
        # lm-eval compares these two numbers: they must be the same one.
        greedy = [
            t for t, s in zip(ids[1:], request.prompt_logprobs[1:]) if t == s[1][0][0]
        ]
        equal = sum(
            one == max(top.values())
            for one, top in zip(
                written["token_logprobs"][1 : len(ids)],
                written["top_logprobs"][1 : len(ids)],
            )
        )
        assert equal == len(greedy)
        offsets = [
            len(TOKENIZER.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))
        ]
        assert written["text_offset"][: len(ids)] == offsets


def test_echo_without_logprobs(server):
    prompt = "some text"
    for max_tokens in (0, 5):
        body = dict(prompt=prompt, max_tokens=max_tokens, temperature=0)
        answer = completion(server, **body, echo=True)
        [choice] = answer["choices"]
        assert choice["logprobs"] is None
        if max_tokens:
            assert (
                choice["text"]
                == prompt + completion(server, **body)["choices"][0]["text"]
            )
        else:
            assert choice["text"] == prompt
            assert choice["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 0


def test_one_token_of_a_scored_prompt_is_shown_even_if_it_ends_the_output(server):
    """lm-eval leaves out the last token of the response."""
    bias = {str(TOKENIZER.eos): 100}
    body = dict(prompt="abc", max_tokens=1, echo=True, logprobs=1, temperature=0)
    [choice] = completion(server, **body, logit_bias=bias)["choices"]
    assert choice["logprobs"]["tokens"] == ["<|bos|>", "a", "b", "c", "<|eos|>"]
    assert choice["text"] == "abc" and choice["finish_reason"] == "stop"


def test_min_tokens_keeps_the_end_away(server):
    bias = {str(TOKENIZER.eos): 100}
    body = dict(prompt="abc", max_tokens=9, temperature=0, logit_bias=bias)
    assert completion(server, **body)["usage"]["completion_tokens"] == 0
    answer = completion(server, **body, min_tokens=4)
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "stop"
    answer = completion(server, **body, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 9


def test_a_prompt_that_ends_inside_a_character_does_not_leak(server):
    """The output has the character if it completes it, and nothing of the prompt."""
    start, rest = "wörd".encode()[:2], "wörd".encode()[2]
    for next_id, text in ((rest, "ö"), (ord("x"), "x")):
        body = dict(prompt=[256, *start], max_tokens=1, temperature=0)
        answer = completion(server, **body, logit_bias={str(next_id): 100})
        assert answer["choices"][0]["text"] == text


def test_without_a_seed_ten_requests_differ(server):
    """The defaults sample: neither top_k nor a constant seed makes them greedy."""
    texts = {
        server.openai.completions.create(model="tiny", prompt="x").choices[0].text
        for _ in range(10)
    }
    assert len(texts) > 5


def test_sixteen_tokens_are_the_default(server):
    whole = server.openai.completions.create(
        model="tiny", prompt="x", extra_body=dict(ignore_eos=True)
    )
    assert whole.usage.completion_tokens == 16


def test_random_bodies_stream_as_they_do_at_once(server):
    numbers = random.Random(0)
    for _ in range(10):
        body = dict(
            prompt=[numbers.randrange(259) for _ in range(numbers.randrange(1, 60))],
            max_tokens=numbers.randrange(1, 40),
            seed=numbers.randrange(2**32),
            temperature=numbers.choice([0, 0.5, 1, 2]),
            logprobs=numbers.choice([None, 0, 3]),
            n=numbers.choice([1, 2]),
            stop=numbers.choice([None, "a", ["bc", "\x02"]]),
        )
        whole = server.post("/v1/completions", body).json()
        events = server.events("/v1/completions", body | dict(stream=True))
        assert join_completion(events) == whole["choices"]


# ---------------------------------------------------------------- chat

CHATS = {
    "greedy": dict(temperature=0, max_tokens=20),
    "the newer name": dict(temperature=0, max_completion_tokens=9),
    "logprobs": dict(temperature=0, max_tokens=20, logprobs=True, top_logprobs=3),
    "no alternatives": dict(temperature=0, max_tokens=20, logprobs=True),
    "several": dict(seed=9, n=3, max_tokens=15, logprobs=True, top_logprobs=1),
    "to the end": dict(seed=2, extra_body=dict(ignore_eos=True)),
    "stop": dict(temperature=0, stop="d", max_tokens=20, logprobs=True),
}
MESSAGES = [
    dict(role="system", content="Be brief."),
    dict(role="user", content=[dict(type="text", text="Who are you?")]),
]
# What the default template of a tokenizer without one makes of them.
PROMPT = "### system\nBe brief.\n\n### user\nWho are you?\n\n### assistant\n"


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_streamed_or_not_is_the_engines_own(server, name):
    given = CHATS[name]
    ids = TOKENIZER.prompt(PROMPT)
    extra = given.get("extra_body", {})
    names = ("temperature", "seed", "stop", "max_tokens")
    own = {name: given[name] for name in names if name in given}
    most = given.get(
        "max_completion_tokens", given.get("max_tokens", LENGTH - len(ids))
    )
    own = dict(temperature=1.0) | own | dict(max_tokens=most)
    if given.get("logprobs"):
        own["logprobs"] = given.get("top_logprobs", 0)
    end_ids = () if extra.get("ignore_eos") else (TOKENIZER.eos,)
    common = dict(model="tiny", messages=MESSAGES, **given)
    whole = server.openai.chat.completions.create(**common)
    assert len(whole.choices) == given.get("n", 1)
    for i, choice in enumerate(whole.choices):
        seed = {} if "seed" not in given else dict(seed=given["seed"] + i)
        tokens, finish, request = expected(server, ids, end_ids, **own | seed)
        assert choice.index == i and choice.message.role == "assistant"
        assert choice.message.content == request.text
        assert choice.finish_reason == finish
        if "logprobs" in given:
            check_chat_logprobs(choice.logprobs.content, tokens)
        else:
            assert choice.logprobs is None
    assert whole.usage.prompt_tokens == len(ids)
    stream = server.openai.chat.completions.create(
        **common, stream=True, stream_options=dict(include_usage=True)
    )
    *events, last = [event.to_dict() for event in stream]
    assert join_chat(events) == whole.to_dict()["choices"]
    assert last["choices"] == [] and last["usage"] == whole.usage.to_dict()
    for event in (*events, last):
        protocol.ChatChunk.model_validate(event)
    protocol.ChatCompletion.model_validate(whole.to_dict())


def check_chat_logprobs(content, tokens):
    tokens = [token for token in tokens if token.id is not None]
    assert len(content) == len(tokens)
    previous = None
    for entry, token in zip(content, tokens):
        pairs = [(entry, (token.id, token.logprob))]
        pairs += list(zip(entry.top_logprobs, token.top, strict=True))
        for written, (id, logprob) in pairs:
            assert written.token == as_text(id, previous)
            assert written.logprob == pytest.approx(logprob, abs=1e-6)
            data = TOKENIZER.token_bytes(id, previous)
            assert data is None or bytes(written.bytes) == data
        previous = token.id


def test_a_stream_of_the_async_client_has_every_request_of_many(server):
    prompts = [f"prompt {i}" for i in range(12)]

    async def one(client, prompt):
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True
        )
        return "".join([event.choices[0].text async for event in stream])

    async def run():
        async with server.async_openai() as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    texts = asyncio.run(run())
    for prompt, text in zip(prompts, texts):
        ids = TOKENIZER.prompt(prompt)
        request = expected(server, ids, (TOKENIZER.eos,), max_tokens=20)[2]
        assert text == request.text


def same(one, other):
    """Whether they are equal: log-probabilities depend a little on what runs beside."""
    if isinstance(one, dict) and isinstance(other, dict):
        # The likeliest tokens of a completion are in the order of their numbers.
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    is_float = isinstance(one, float) and isinstance(other, float)
    return one == (pytest.approx(other, abs=1e-4) if is_float else other)


def test_the_async_client_gets_what_the_sync_one_gets(server):
    """Every endpoint and option, all at once, as a whole and as a stream."""
    asked = [
        ("completions", dict(prompt=[PROMPT, "b"], max_tokens=12) | given)
        for given, _ in COMPLETIONS.values()
    ]
    asked += [("chat", dict(messages=MESSAGES) | given) for given in CHATS.values()]
    asked.append(
        ("completions", dict(prompt="x", best_of=3, n=2, seed=1, max_tokens=4))
    )
    scored = dict(prompt="a b", echo=True, logprobs=2, max_tokens=0)
    asked.append(("completions", scored))

    def endpoint(client, name):
        return client.chat.completions if name == "chat" else client.completions

    def choices(answer):
        return [choice.model_dump() for choice in answer.choices]

    whole = [
        choices(endpoint(server.openai, name).create(model="tiny", **options))
        for name, options in asked
    ]

    async def ask(client, name, options):
        answer = await endpoint(client, name).create(model="tiny", **options)
        if "best_of" in options:  # is not streamed
            return choices(answer), True
        usage = dict(stream=True, stream_options=dict(include_usage=True))
        stream = await endpoint(client, name).create(model="tiny", **options, **usage)
        events = [event.model_dump(exclude_unset=True) async for event in stream]
        assert events[-1]["usage"] == answer.usage.model_dump(exclude_unset=True)
        join = join_chat if name == "chat" else join_completion
        plain = [choice.model_dump(exclude_unset=True) for choice in answer.choices]
        return choices(answer), same(plain, join(events))

    async def run():
        async with server.async_openai() as client:
            assert [card.id for card in (await client.models.list()).data] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            return await asyncio.gather(*(ask(client, *one) for one in asked))

    for (name, options), expected_choices, (got, streamed) in zip(
        asked, whole, asyncio.run(run())
    ):
        assert same(got, expected_choices), (name, options)
        assert streamed, (name, options)


def test_a_higher_priority_leaves_the_queue_first(server):
    """More requests than there is room for on the device: the last one is not last."""
    finished = []

    async def one(client, number, priority):
        await client.completions.create(
            model="tiny",
            prompt=f"{number}",
            max_tokens=40,
            temperature=0,
            extra_body=dict(priority=priority, ignore_eos=True),
        )
        finished.append(number)

    async def run():
        async with server.async_openai() as client:
            with server.engine._stepping:  # nothing leaves the queue yet
                tasks = [
                    asyncio.ensure_future(one(client, number, int(number == 11)))
                    for number in range(12)
                ]
                while server.engine.waiting < 12:
                    await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)

    asyncio.run(run())
    assert finished.index(11) < 4
