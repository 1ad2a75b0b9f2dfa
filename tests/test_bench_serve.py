"""`ladder-jax bench serve` against a server with known delays, in virtual time."""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiohttp")

import fake_openai
import tiny
import virtual_time

from ladder_jax.arguments import parse
from ladder_jax.bench import (
    load_client,
    load_figures,
    load_requests,
    load_run,
    machine,
    serve,
    serve_arguments,
    serve_processes,
    serve_report,
    serve_sweep,
    serve_targets,
    serve_weights,
)
from ladder_jax.bench.latency import Objective
from ladder_jax.bench.workloads import Arrival, arrival_times
from ladder_jax.config import ConfigError, Decode, Model

OBJECTIVE = Objective(ttft=1.0, tpot=0.15)
STREAM = dict(model="fake", stream=True, stream_options=dict(include_usage=True))


@pytest.fixture(autouse=True)
def rare_looks(monkeypatch):
    """Virtual time is slow where it stops often."""
    monkeypatch.setattr(load_run, "WATCH", 0.1)


def serve_load(arrivals, users=0, chat=False, timeout=600.0, **fake):
    """What the client sees of a load, in virtual time."""

    async def load():
        server = fake_openai.Fake(**fake)
        path = "chat/completions" if chat else "completions"
        async with server.serve() as url:
            endpoint = load_client.Endpoint(f"{url}/v1/{path}", STREAM, chat)
            return await load_run.over_http(
                endpoint, arrivals, users=users, timeout=timeout
            )

    return virtual_time.run(load())


def figures_of(run, **options):
    return load_figures.figures([run], OBJECTIVE, **options)


def near(seconds):
    return pytest.approx(seconds, abs=1e-6)


# ---------------------------------------------------------------- latencies


def test_a_requests_times_are_the_servers():
    arrivals = [Arrival(2.0, (1, 2, 3), 4)]
    (one,) = serve_load(arrivals, first=0.5, gap=0.1).outcomes
    assert one.arrival == one.sent == 2.0
    assert one.times == near((2.5, 2.6, 2.7, 2.8)) and one.ended == near(2.8)
    assert (one.prompt_tokens, one.tokens, one.finish) == (3, 4, "length")
    assert one.text == "t0 t1 t2 t3 " and not one.error


def test_all_at_once_wait_for_slots_and_the_figures_are_those_by_hand():
    arrivals = [Arrival(0.0, (1, 2, 3), 5)] * 6  # 0.5 + 4 x 0.1 s, two at a time
    run = serve_load(arrivals, slots=2)
    figures = figures_of(run)
    assert figures["completed"] == figures["requests"] == 6
    assert figures["seconds"] == near(2.7)
    assert figures["requests_per_s"] == near(6 / 2.7)
    assert figures["output_tokens_per_s"] == near(30 / 2.7)
    assert figures["total_tokens_per_s"] == near(48 / 2.7)
    # The last two begin at 2.3 s: then 4 x 5 tokens are there, and the first of theirs.
    assert figures["saturated_tokens_per_s"] == near(22 / 2.3)
    assert figures["ttft_ms"]["p50"] == near(1400)  # 500, 1400 and 2300
    assert figures["e2e_ms"]["p50"] == near(1800)
    for name in ("tpot_ms", "itl_ms"):
        assert figures[name] == {p: near(100) for p in ("p50", "p90", "p99")}
    assert figures["user_tokens_per_s"] == near(10)
    assert figures["goodput"] == near(2 / 6)
    assert figures["wrong_length"] == 0
    assert not figures["client"]["fell_behind"] and not load_figures.warnings(figures)


def test_latencies_count_from_the_scheduled_arrival():
    arrivals = [Arrival(second, (1,), 6) for second in (0.0, 0.25, 0.5)]
    figures = figures_of(serve_load(arrivals, slots=1))  # a second each
    assert figures["ttft_ms"]["p50"] == near(1250)  # 0.5, 1.5 - 0.25, 2.5 - 0.5
    assert figures["e2e_ms"]["p99"] == near(1750 + 0.98 * 750)


def test_users_send_when_their_last_request_has_ended():
    arrivals = [Arrival(99.0, (1,), 6)] * 8
    run = serve_load(arrivals, users=2)  # 4 slots, a second each
    assert [one.arrival for one in run.outcomes] == near([0, 0, 1, 1, 2, 2, 3, 3])
    figures = figures_of(run)
    assert figures["seconds"] == near(4)
    assert figures["ttft_ms"]["p99"] == near(500)


def test_tokens_that_come_together_have_no_time_between():
    run = serve_load([Arrival(0.0, (1,), 9)], burst=4, gap=0.4)
    figures = figures_of(run)
    assert figures["tpot_ms"]["p50"] == near(100)
    assert sorted(load_figures.latencies_of(run.outcomes).itl) == near(
        [0.0] * 6 + [0.4] * 2
    )
    assert figures["tokens_per_event"] == 1


def test_a_chats_role_is_no_token_and_an_empty_text_is_one():
    arrivals = [Arrival(0.0, "hello", 3)]
    (one,) = serve_load(arrivals, chat=True).outcomes
    assert one.times == near((0.5, 0.6, 0.7)) and one.text == "t0 t1 t2 "
    (one,) = serve_load(arrivals, text="").outcomes
    assert one.times == near((0.5, 0.6, 0.7)) and one.tokens == 3


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fault, kind",
    [
        ("500", "500"),
        ("cut", "ended early"),
        ("error", "error in the stream"),
        ("reset", "connection lost"),
        ("junk", "not an OpenAI stream"),
        ("slow", "timeout"),
    ],
)
def test_a_request_that_fails_counts_by_its_kind_and_the_others_go_on(fault, kind):
    arrivals = [Arrival(0.0, (number,), 5) for number in (12, 13, 14)]
    run = serve_load(arrivals, fault=fault, timeout=9.0)
    assert [one.error for one in run.outcomes] == ["", kind, ""]
    figures = figures_of(run)
    assert figures["errors"] == {kind: 1} and figures["completed"] == 2
    assert figures["output_tokens"] == 10 and figures["goodput"] == near(2 / 3)


def test_a_full_server_rejects_and_the_client_does_not_try_again():
    run = serve_load([Arrival(0.0, (1,), 5)] * 9, slots=2, queue=3)
    figures = figures_of(run)
    assert figures["errors"] == {"429": 4}
    assert figures["completed"] == 5 and figures["goodput"] == near(2 / 9)


def test_the_capacity_of_a_server_that_completes_nothing_is_not_made_up():
    run = serve_load([Arrival(0.0, (13,), 5)], fault="500")
    target = serve_targets.Target("broken", lambda arrivals, users: run, None)
    arguments = serve.Arguments(urls=("broken=http://x",), warmup=0)
    loads = [load_requests.read_load("50%")]
    with pytest.raises(ConfigError, match="loads='50%' is not accepted: no server"):
        serve_sweep.sweep(arguments, loads, [target])


def test_the_capacity_of_a_server_that_takes_all_requests_at_once_is_that_of_the_run():
    """All have their first token at 0.5 s, and no other: a rate that says nothing."""

    def serve_all(arrivals, users):
        return serve_load(arrivals, slots=8, first=0.5, gap=0.1)

    target = serve_targets.Target("wide", serve_all, None)
    arguments = serve.Arguments(
        urls=("wide=http://x",), warmup=0, requests=4, output_tokens=(21,)
    )
    loads = [load_requests.read_load("50%")]
    saturated, half = serve_sweep.sweep(arguments, loads, [target])
    assert saturated.values["seconds"] == near(2.5)
    assert half.values["rate"] == near(0.5 * 4 / 2.5)


def test_an_api_key_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert serve_processes.key_headers() == {}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert serve_processes.key_headers() == {"Authorization": "Bearer secret"}


def test_no_server_is_an_error_of_each_request():
    url = f"http://127.0.0.1:{serve_processes.free_port()}/v1/completions"
    endpoint = load_client.Endpoint(url, STREAM)
    load = load_run.over_http(endpoint, [Arrival(0.0, (1,), 5)] * 2)
    figures = figures_of(virtual_time.run(load))
    assert figures["errors"] == {"no connection": 2}
    assert figures["ttft_ms"] == {"p50": None, "p90": None, "p99": None}
    assert figures["user_tokens_per_s"] is None


def test_outputs_that_are_too_short_or_other_ones_are_counted():
    arrivals = [Arrival(0.0, (1,), 3), Arrival(0.0, (2,), 3)]
    run = serve_load(arrivals)
    short = run._replace(
        outcomes=[dataclasses.replace(run.outcomes[0], tokens=2), run.outcomes[1]]
    )
    references = {
        load_requests.question_of(arrivals[0]): "t0 t1 t2 ",
        load_requests.question_of(arrivals[1]): "something else",
    }
    figures = figures_of(short, references=references)
    assert (figures["wrong_length"], figures["wrong_text"]) == (1, 1)
    tokens, text = load_figures.warnings(figures)
    assert tokens.startswith("1 of 2 outputs do not have the tokens that they should")
    assert text.startswith("1 of 2 outputs do not have the text that they should")
    assert "wrong_length" not in figures_of(short, all_tokens=False)


@pytest.mark.parametrize("size", range(1, 12))
def test_events_are_the_same_however_the_network_cuts_the_bytes(size):
    stream = 'data: {"a": "é"}\r\n\r\n: comment\n\ndata: one\ndata: two\n\nid: 3\n\n'
    data = (stream + "data:[DONE]\n\ndata: cut").encode()
    chunks = [
        (float(start), data[start : start + size])
        for start in range(0, len(data), size)
    ]
    events = list(load_client.events(chunks))
    assert [text for _, text in events] == ['{"a": "é"}', "one\ntwo", "[DONE]"]
    ends = [data.index(b"\r\n\r\n") + 3, data.index(b"two\n\n") + 4, len(data) - 10]
    for (seconds, _), end in zip(events, ends):
        assert seconds <= end < seconds + size


# ---------------------------------------------------------------- the client itself


def test_a_client_that_falls_behind_says_so():
    async def load():
        loop = asyncio.get_running_loop()

        async def send(arrival):
            begin = loop.time()
            if arrival.prompt == (0,):  # the client is busy for 3 s
                loop._selector.now += 3.0
            data = b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\n'
            done = b"data: [DONE]\n\n"
            return load_client.Exchange(
                begin, loop.time(), 200, [(loop.time(), data + done)], ""
            )

        arrivals = [Arrival(second, (i,), 1) for i, second in enumerate((1, 2, 3, 9))]
        return await load_run.run_load(send, arrivals)

    run = virtual_time.run(load())
    assert [one.sent for one in run.outcomes] == near([1, 4, 4, 9])
    assert [one.arrival for one in run.outcomes] == near([1, 2, 3, 9])
    client = figures_of(run)["client"]
    assert client["lag_ms"]["p50"] == near(500) and client["fell_behind"]
    assert max(run.delays) > 2.9
    (text,) = load_figures.warnings(figures_of(run))
    assert text.startswith("the client fell behind (p99: requests 1970 ms late")


def test_a_busy_client_and_busy_neighbours_are_named():
    figures = figures_of(serve_load([Arrival(0.0, (1,), 3)]))
    figures["client"] |= dict(fell_behind=True, busy=0.97)
    figures["others_busy"] = 0.4
    client, others = load_figures.warnings(figures)
    assert "busy 97% of the time" in client
    assert others == "servers that were not measured took 40% of a processor meanwhile"


# ---------------------------------------------------------------- requests

SHAPE = load_requests.Shape("uniform", (3, 9), (5,), 100, "ids", 50, None, None, 0)


def test_questions_are_the_same_for_the_same_seed_and_stream_alone():
    asked = load_requests.questions(SHAPE, 40)
    assert asked == load_requests.questions(SHAPE, 40)
    assert asked != load_requests.questions(SHAPE, 40, stream=1)
    assert asked != load_requests.questions(SHAPE._replace(seed=1), 40)
    assert {len(one.prompt) for one in asked} == set(range(3, 10))
    assert {one.max_tokens for one in asked} == {5}
    assert max(token for one in asked for token in one.prompt) == 49


def test_lengths_of_chats_texts_and_repeated_requests():
    chats = load_requests.questions(SHAPE._replace(lengths="sharegpt"), 500)
    assert max(max(len(one.prompt), one.max_tokens) for one in chats) == 50
    assert len({one.max_tokens for one in chats}) > 20
    words = load_requests.questions(SHAPE._replace(prompts="text"), 3)[0].prompt
    assert 3 <= len(words.split()) <= 9 and words.islower()
    few = load_requests.questions(SHAPE._replace(distinct=4), 10, stream=7)
    assert len(set(few)) == 4 and few[:4] == few[4:8]


def test_a_file_gives_prompts_and_lengths(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        dict(prompt="a b", max_tokens=7),
        dict(prompt=[1, 2]),
        dict(prompt_tokens=4),
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    shape = SHAPE._replace(file=str(path))
    text, ids, count, again = load_requests.questions(shape, 4)
    assert text == again == ("a b", 7) and ids == ((1, 2), 5)
    assert len(count.prompt) == 4 and count.max_tokens == 5


@pytest.mark.parametrize(
    "row",
    ["{", "[]", '{"prompt": 3}', '{"prompt": []}', '{"max_tokens": 3}']
    + ['{"prompt": "a", "max_tokens": 0}', '{"prompt_tokens": true}'],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + row)
    with pytest.raises(ConfigError, match="line 2: a row must be a JSON object"):
        load_requests.questions(SHAPE._replace(file=str(path)), 4)


def test_gaps_are_as_regular_as_their_distribution_says():
    rng = np.random.default_rng(0)
    spread = {}
    for kind, burstiness in [("constant", 1), ("poisson", 9), ("gamma", 4)]:
        times = arrival_times(kind, 4000, 0.5, rng, burstiness)
        gaps = np.diff(times)
        assert times[0] == 0 and gaps.mean() == pytest.approx(0.5, rel=0.1)
        spread[kind] = gaps.var() / gaps.mean() ** 2
    assert spread["constant"] == pytest.approx(0, abs=1e-9)
    assert spread["poisson"] == pytest.approx(1, rel=0.15)
    assert spread["gamma"] == pytest.approx(4, rel=0.15)


def test_a_loads_last_request_comes_when_its_rate_says():
    asked = load_requests.questions(SHAPE, 21)
    for kind in load_requests.ARRIVALS:
        load = load_requests.read_load("4")
        arrivals = load_requests.schedule(asked, load, kind, 4.0, seed=3)
        assert arrivals[0].seconds == 0 and arrivals[-1].seconds == near(5.0)
        assert [load_requests.question_of(one) for one in arrivals] == asked
    for name in ("saturated", "users:3"):
        load = load_requests.read_load(name)
        arrivals = load_requests.schedule(asked, load, "poisson", 4.0, seed=3)
        assert {one.seconds for one in arrivals} == {0.0}


@pytest.mark.parametrize(
    "text", ["", "fast", "-1", "0", "0%", "inf", "users:0", "users:"]
)
def test_what_is_no_load_is_named(text):
    with pytest.raises(ConfigError, match="loads=.*must be saturated, requests a sec"):
        load_requests.read_load(text)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "no server is named: give --urls, --commands, --checkpoint or --size"),
        ("--urls localhost:1", "urls='localhost:1' is not accepted"),
        ("--urls a=http://x a=http://y", "urls='a=http://y' is not accepted"),
        ("--size huge", "size='huge' is not accepted: it must be one of tiny"),
        ("--size tiny --checkpoint x", "size='tiny' is not accepted: it must be left"),
        ("--urls a=http://x --engine", "engine=True is not accepted"),
        ("--urls a=http://x --check", "check=True is not accepted"),
        ("--size tiny --engine --prompts text", "prompts='text' is not accepted"),
        ("--size tiny --output-tokens 9 3", "output_tokens=\\(9, 3\\) is not accepted"),
        ("--size tiny --extra-body [1]", "extra_body='\\[1\\]' is not accepted"),
        ("--size tiny --loads", "loads=\\(\\) is not accepted"),
        ("--commands a={where}", "may have the placeholders {dtype}, {cache}, {port}"),
    ],
)
def test_one_line_for_every_mistake(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        arguments = parse(serve.Arguments, words.split(), "bench serve")
        serve_arguments.check(arguments)
        serve_targets.given(arguments)
        serve_targets.to_start(arguments, tmp_path)


def test_our_server_gets_the_engines_options():
    arguments = serve.Arguments(
        size="tiny",
        serve_options="--api-keys keys.txt",
        decode=Decode(slots=4, fit_shapes=False, kv_memory="1GiB"),
    )
    words = serve_targets.our_command(arguments).split()
    assert words[:6] == "{python} -m ladder_jax serve {checkpoint} --port".split()
    assert words[7:9] == ["--slots", "4"] and words[-2:] == ["--api-keys", "keys.txt"]
    options = parse(serve.Arguments, ["--size", "tiny", *words[7:-2]], "bench serve")
    assert options.decode == arguments.decode


FAKE = f"{sys.executable} {Path(fake_openai.__file__)} {{port}}"


@pytest.fixture
def no_machine(monkeypatch):
    """The machine's rate of products, which takes a while, is not measured."""
    made_up = machine.Machine("a CPU", 2, {"jax": dict.fromkeys(machine.DTYPES, 1.0)})
    monkeypatch.setattr(machine, "measure", lambda: made_up)


def test_two_servers_take_turns_and_their_figures_are_written(
    tmp_path, capsys, no_machine
):
    pytest.importorskip("matplotlib")
    arguments = serve.Arguments(
        commands=(
            f"fast={FAKE} slots=4 first=0.02 gap=0.01",
            f"slow={FAKE} slots=2 first=0.02 gap=0.02",
        ),
        loads=("90%", "users:2", "saturated"),
        requests=6,
        rounds=2,
        warmup=2,
        output_tokens=(8,),
        distinct=3,
        check=True,
        json=str(tmp_path / "rows.json"),
        plots=str(tmp_path),
    )
    results = serve.run(arguments)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == results["rows"]
    assert written["arguments"]["requests"] == 6 and written["machine"]["cores"] == 2
    rows = {(row["load"], row["server"]): row for row in results["rows"]}
    loads, names = ("saturated", "90%", "users:2"), ("fast", "slow")
    assert list(rows) == [(load, name) for load in loads for name in names]
    for row in rows.values():
        assert row["completed"] == row["requests"] == 12 and not row["errors"]
        assert row["wrong_length"] == row["wrong_text"] == 0
        gap = 10 if row["server"] == "fast" else 20
        assert gap <= row["tpot_ms"]["p50"] < 3 * gap
        assert row["memory_bytes"] > 1e6 and 0 <= row["busy"] < 2
    slow = rows["saturated", "slow"]
    saturated = slow["saturated_tokens_per_s"] / 8
    capacity = max(saturated, slow["requests_per_s"])
    assert rows["90%", "fast"]["rate"] == pytest.approx(0.9 * capacity)
    assert rows["users:2", "fast"]["rate"] is None
    printed = capsys.readouterr()
    assert "load       server   done  requests/s  tokens/s" in printed.out
    assert printed.err.count("saturated, slow") == 2
    stems = "latency_90_percent", "latency_saturated", "latency_users_2", "pareto_serve"
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == list(stems)


def test_startup_is_measured_cold_and_warm(tmp_path, capsys, no_machine):
    compiles = f"echo program > {{cache}}/program && {FAKE}"
    command = f"fake=sh -c '{compiles}'"
    results = serve.run(serve.Arguments(commands=(command,), startup=1))
    cold, warm = results["startup"]
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    assert cold["cache_bytes"] == warm["cache_bytes"] == 8
    for row in (cold, warm):
        assert 0.1 < row["port_s"][0] <= row["ready_s"][0] < 60
    assert "server  start  port open s  ready s  cache MB" in capsys.readouterr().out


def test_a_server_that_ends_says_why(tmp_path, no_machine):
    command = f'broken={sys.executable} -c "exit(chr(110) + chr(111))" {{port}}'
    with pytest.raises(ConfigError, match="broken ended with status 1 .*: no$"):
        serve.run(serve.Arguments(commands=(command,)))
    with pytest.raises(ConfigError, match="broken ended with status 1 .*: no$"):
        serve.run(serve.Arguments(commands=(command,), startup=1))


# ---------------------------------------------------------------- our engine


def test_the_engine_alone_serves_the_same_requests(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    tiny.write_run(tmp_path / "run")
    decode = Decode(slots=2, staging=2, max_length=32, unroll_layers=False)
    decode = dataclasses.replace(decode, fit_shapes=False, prefill_budget=8)
    arguments = serve.Arguments(
        checkpoint=str(tmp_path / "run"),
        engine=True,
        decode=decode,
        requests=4,
        prompt_tokens=(2, 8),
        output_tokens=(4, 9),
        warmup=0,
    )
    loads = serve_arguments.check(
        dataclasses.replace(arguments, loads=("users:2", "5"))
    )
    with serve_targets.engine_target(arguments, arguments.checkpoint) as target:
        rows = serve_sweep.sweep(arguments, loads, [target])
    for row in rows:
        assert row.values["completed"] == 4 and row.values["wrong_length"] == 0
        assert row.values["output_tokens_per_s"] > 0
    assert rows[1].values["seconds"] > 3 / 5
    assert target.process.poll() is not None


def test_what_http_costs_is_our_server_over_its_engine():
    def row(server, rate, ttft):
        latency = {"p50": ttft}
        return dict(
            load="saturated",
            server=server,
            output_tokens_per_s=rate,
            completed=1,
            ttft_ms=latency,
            tpot_ms={"p50": None},
        )

    rows = [row(serve_targets.OURS, 95.0, 12.5), row(serve_targets.ENGINE, 100.0, 10.0)]
    assert serve.http_costs(rows) == [
        "saturated: over HTTP 95.0% of the engine's tokens/s, TTFT p50 +2.50 ms"
    ]
    assert serve.http_costs(rows[:1]) == []


def test_random_weights_are_the_same_for_both_and_every_id_has_a_text(tmp_path):
    import jax

    import ladder_jax

    sizes = dict(dim=32, layers=1, heads=2, kv_heads=2, head_dim=16, ffn_dim=48)
    model_config = Model(
        vocab_size=300, **sizes, max_length=64, dtype="float32", residual="standard"
    )
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    serve_weights.write(model_config, ours, theirs)
    loaded, imported = ladder_jax.load(ours), ladder_jax.load_hf(theirs)
    assert json.loads((theirs / "config.json").read_text())["model_type"] == "llama"
    assert loaded.tokenizer.size == imported.tokenizer.size == 300
    for mine, other in zip(
        jax.tree.leaves(loaded.model), jax.tree.leaves(imported.model)
    ):
        assert (np.asarray(mine) == np.asarray(other)).all()
    texts = [loaded.tokenizer.decode([token]) for token in range(256, 299)]
    assert len(set(texts)) == 43 and all(text.startswith(" w") for text in texts)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("añ b")) == "añ b"


# ---------------------------------------------------------------- documents


def test_results_become_tables_of_markdown(capsys, tmp_path):
    run = serve_load([Arrival(0.0, (1,), 3)])
    row = dict(load="saturated", server="fake") | figures_of(run)
    gflops = {"jax": {"float32": 280.4}}
    path = tmp_path / "small_float32.json"
    path.write_text(json.dumps(dict(rows=[row], machine=dict(gflops=gflops))))
    serve_report.main([str(path)])
    title, _, head, line, cells, _, note, _ = capsys.readouterr().out.split("\n")[:8]
    assert title == "**small_float32**"
    assert head.startswith("| load | server | done |") and line.startswith("| --- |")
    assert cells.startswith("| saturated | fake | 1/1 | 1.43 | 4 | 2 | 500/500 |")
    assert note == "Matrix products in the same run, GFLOP/s: jax float32 280."
