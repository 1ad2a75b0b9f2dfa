"""The page in headless Chromium: what it shows, and who can use it.

`make test-tools` installs Chromium on Debian and Ubuntu; without one, these tests skip.
"""

import itertools
import json
import re
import time

import helpers
import pytest
import served
from axe_playwright_python.sync_playwright import Axe
from page_server import Source, application, executable, serving
from playwright.sync_api import expect, sync_playwright

from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.serve.scheduler import plan_step

pytestmark = pytest.mark.skipif(
    executable() is None, reason="there is no Chromium: `make test-tools` installs it"
)
expect.set_options(timeout=30_000)  # the machine may have other things to do
WIDE, PHONE = dict(width=1280, height=800), dict(width=390, height=844)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable(), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def server(source):
    with serving(application(source)) as port:
        yield port


@pytest.fixture
def opened(browser, server):
    """Opens the page; fails if the browser reports an error."""
    errors = []

    def open_page(viewport=WIDE, **options):
        page = browser.new_page(viewport=viewport, **options)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: m.type == "error" and errors.append(m.text))
        page.goto(f"http://127.0.0.1:{server}/")
        expect(page.locator("#connection")).to_have_text("ready")
        pages.append(page)
        return page

    pages = []
    yield open_page
    for page in pages:
        page.close()
    assert not [error for error in errors if "the server responded with" not in error]


def table(page):
    """The rows of the table of slots: [number, request, tokens]."""
    texts = page.locator("#rows tr").all_inner_texts()
    return [[cell for cell in re.split(r"\s*\t\s*", text) if cell] for text in texts]


def test_the_table_shows_the_slots(opened, source):
    slots = [None, dict(request=12, prompt_tokens=30, tokens=20, max_tokens=70)]
    source.changed = dict(slots=slots, waiting=3, staged=1)
    page = opened()
    expect(page.locator("#summary")).to_have_text(
        "1 of 2 slots decode a request; 1 staged on the device, 3 waiting."
    )
    assert table(page) == [["0", "free"], ["1", "12", "30 + 20 of 70"]]
    page.wait_for_timeout(400)  # the bars move for 0.2 s
    widths = (
        page.locator("#rows tr")
        .nth(1)
        .locator(".bar span")
        .evaluate_all(
            "all => all.map(one => one.clientWidth / one.parentElement.clientWidth)"
        )
    )
    assert widths == pytest.approx([0.3, 0.2, 0.5], abs=0.03)
    source.changed = dict(slots=[None, None])
    expect(page.locator("#rows")).not_to_contain_text("12")
    assert table(page) == [["0", "free"], ["1", "free"]]


def test_the_picture_shows_the_last_seconds(opened, source):
    """A request's colour where its slot was taken; the lower, the fewer tokens."""
    clock = itertools.count(1000)
    slot = dict(request=1, prompt_tokens=0, tokens=50, max_tokens=100)

    def state():
        now = next(clock)
        busy = 1010 <= now < 1020
        return dict(time=now, slots=[slot if busy else None, None])

    page = opened(reduced_motion="no-preference")
    pixels = page.evaluate(
        """async (states) => {
            const { History } = await import("./static/history.js");
            const { draw } = await import("./static/picture.js");
            const history = new History();
            for (const state of states) history.add(state);
            draw(history);
            const canvas = document.getElementById("history");
            const image = canvas.getContext("2d");
            const at = (x, y) => [...image.getImageData(
                x * canvas.width, y * canvas.height, 1, 1).data].join();
            return {
                before: at(0.2, 0.4), low: at(0.5, 0.4), high: at(0.5, 0.1),
                after: at(0.9, 0.4), other: at(0.5, 0.75),
            };
        }""",
        [{**source(), **state()} for _ in range(31)],
    )
    empty = pixels["before"]
    assert pixels["after"] == pixels["other"] == empty
    assert len({empty, pixels["low"], pixels["high"]}) == 3


@pytest.mark.parametrize("slots", [1, 24, 25, 300])
def test_the_rows_of_picture_and_table_are_level(opened, source, slots):
    source.slots = slots
    page = opened()
    expect(page.locator("#rows tr")).to_have_count(slots)
    page.wait_for_timeout(300)
    boxes = [page.locator(name).bounding_box() for name in ("#history", "#rows")]
    for side in ("y", "height"):
        assert boxes[0][side] == pytest.approx(boxes[1][side], abs=1)


def test_states_of_the_server_are_told(opened, source):
    page = opened()
    source.changed = dict(status="draining", detail="it finishes its requests")
    text = "draining: it finishes its requests"
    expect(page.locator("#connection")).to_have_text(text)
    page.wait_for_timeout(2500)  # the stream has ended, and the page has asked again
    expect(page.locator("#connection")).to_have_text(text)
    source.changed = {}
    expect(page.locator("#connection")).to_have_text("ready")


def test_the_page_connects_again(browser, source):
    app = application(source)
    with serving(app) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        expect(page.locator("#connection")).to_have_text("ready")
    expect(page.locator("#connection")).to_contain_text("connecting again")
    with serving(application(source), port):
        expect(page.locator("#connection")).to_have_text("ready")
        page.close()


def test_a_server_that_starts_has_no_slots_yet(opened, browser, server, source):
    starting = dict(status="starting", detail="compiled 3 of 20 programs", model="tiny")
    source.state = starting
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server}/")
    expect(page.locator("#connection")).to_have_text(
        "starting: compiled 3 of 20 programs"
    )
    source.state = None
    expect(page.locator("#connection")).to_have_text("ready")
    expect(page.locator("#rows tr")).to_have_count(8)
    page.close()


def test_pause_stops_the_picture_and_nothing_else(opened):
    page = opened()
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Pause")).to_have_attribute(
        "aria-pressed", "true"
    )
    before = table(page)
    page.wait_for_timeout(700)
    assert table(page) == before
    page.get_by_role("button", name="Pause").click()
    assert table(page) != before


def test_reduced_motion_draws_once_a_second(opened):
    def changes(page):
        return page.evaluate(
            """() => new Promise((resolve) => {
                let changes = 0;
                const observer = new MutationObserver(() => changes++);
                const rows = document.getElementById("rows");
                observer.observe(rows, { subtree: true, childList: true });
                setTimeout(() => resolve(changes), 2500);
            })"""
        )

    assert changes(opened(reduced_motion="reduce")) <= 3
    assert changes(opened(reduced_motion="no-preference")) >= 8


def test_a_hidden_page_asks_for_nothing(opened, source):
    page = opened()
    page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", { get: () => true });
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    time.sleep(0.5)
    taken = source.taken
    time.sleep(0.6)
    assert source.taken == taken


def test_names_of_the_server_are_text(opened, source):
    evil = "<img src=x onerror=\"document.title='evil'\">"
    source.changed = dict(model=evil, detail=evil, status="ready")
    source.changed = dict(model=evil)
    page = opened()
    expect(page.locator("#model")).to_have_text(evil)
    assert page.title() == "ladder_jax" and page.locator("img").count() == 0


def test_the_browser_runs_no_inline_script(browser, server):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server}/")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'evil'";
            document.body.append(script);
        }"""
    )
    assert page.title() == "ladder_jax"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(opened, scheme, viewport):
    """Labels, roles, contrast, reading order: the rules of axe-core."""
    page = opened(viewport, color_scheme=scheme)
    expect(page.locator("#latencies dd")).to_have_count(4)
    found = Axe().run(page)
    assert not found.violations_count, found.generate_report()


def test_it_fits_the_narrowest_screen(opened):
    page = opened(dict(width=320, height=600))
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 320


def test_the_keyboard_reaches_everything_in_order(opened):
    page = opened()
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || 'link'"))
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) != "none", f"{reached[-1]} shows no focus"
    names = ["link", "pause", "link", "prompt", "max-tokens", "temperature", "key"]
    assert reached == [*names, "send", "answer"]


def test_events_are_read_however_the_bytes_are_split(opened):
    """Every split of a stream in two, and byte by byte."""
    page = opened()
    stream = (
        ': comment\ndata: {"a": "é😀"}\n\ndata:two\r\ndata: lines\r\n\r\nid: 1\r\n\r\n'
    )
    found = page.evaluate(
        """async (text) => {
            const { events } = await import("./static/sse.js");
            const bytes = new TextEncoder().encode(text);
            const read = async (pieces) => {
                const body = new ReadableStream({
                    start(controller) {
                        for (const piece of pieces) controller.enqueue(piece);
                        controller.close();
                    },
                });
                const found = [];
                for await (const data of events(new Response(body))) found.push(data);
                return JSON.stringify(found);
            };
            const results = [await read([...bytes].map((b) => new Uint8Array([b])))];
            for (let i = 0; i <= bytes.length; i++)
                results.push(await read([bytes.slice(0, i), bytes.slice(i)]));
            return [...new Set(results)].map((text) => JSON.parse(text));
        }""",
        stream,
    )
    assert found == [['{"a": "é😀"}', "two\nlines"]]


# ---------------------------------------------------------------- the form


def stream(*chunks, done=True):
    """The body of a stream of completions."""
    events = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * done
    return "".join(f"data: {event}\n\n" for event in events)


def chunk(text="", finish=None, **fields):
    return dict(choices=[dict(text=text, finish_reason=finish)], **fields)


@pytest.fixture
def form(opened):
    """The page with an API that answers as told; returns (page, answer, requests)."""

    def open_form(**answer):
        page = opened()
        requests = []

        def fulfil(route):
            requests.append(route.request)
            route.fulfill(**answer)

        page.route("**/v1/**", fulfil)
        page.get_by_label("a text to continue").check()
        page.get_by_label("Prompt", exact=True).fill("Once")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        return page, requests

    return open_form


def test_the_form_sends_what_it_says(form):
    body = stream(
        chunk("two "),
        chunk("words", "length"),
        dict(choices=[], usage={"completion_tokens": 5}),
    )
    page, requests = form(body=body, content_type="text/event-stream")
    assert requests[0].post_data_json == dict(
        model="tiny",
        prompt="Once",
        max_tokens=128,
        temperature=0.7,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert requests[0].url.endswith("/v1/completions")
    expect(page.locator("#answer")).to_have_text("two words")
    expect(page.locator("#measured")).to_contain_text("5 tokens, ended by length")
    page.get_by_label("a message to answer").check()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert requests[-1].url.endswith("/v1/chat/completions")
    sent = requests[-1].post_data_json
    assert sent["messages"] == [dict(role="user", content="Once")]
    assert "prompt" not in sent
    assert requests[-1].headers["authorization"] == "Bearer secret"


def test_an_answer_is_text_whatever_is_in_it(form):
    evil = "<img src=x onerror=\"document.title='evil'\"><b>bold</b>\n  &amp;"
    page, _ = form(body=stream(chunk(evil, "stop")), content_type="text/event-stream")
    assert page.locator("#answer").evaluate("node => node.textContent") == evil
    assert page.title() == "ladder_jax"
    assert page.locator("#answer *").count() == 0


@pytest.mark.parametrize(
    "answer, text",
    [
        (
            dict(status=429, json=dict(error=dict(message="try again in 3 s"))),
            "429 Too Many Requests: try again in 3 s",
        ),
        (dict(status=502, body="<html>"), "502 Bad Gateway"),
        (dict(body=stream(chunk("half"), done=False)), "the answer broke off"),
        (
            dict(body=stream(chunk("half"), dict(error=dict(message="no device")))),
            "no device",
        ),
    ],
    ids=["refused", "no-json", "broken", "failed"],
)
def test_an_error_is_told(form, opened, answer, text):
    page, _ = form(**answer)
    expect(page.get_by_role("alert")).to_contain_text(text)
    if "body" in answer and "half" in answer["body"]:
        expect(page.locator("#answer")).to_have_text("half")  # it stays


def test_nothing_is_sent_without_a_prompt(opened):
    page = opened()
    page.route("**/v1/**", lambda route: pytest.fail("a request was sent"))
    page.get_by_role("button", name="Send").click()
    assert page.get_by_label("Prompt", exact=True).evaluate(
        "node => !node.validity.valid"
    )
    page.get_by_label("Prompt", exact=True).fill("x")
    page.get_by_label("Most tokens").fill("0")
    page.get_by_role("button", name="Send").click()
    assert page.get_by_label("Most tokens").evaluate("node => !node.validity.valid")


# ---------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def real():
    """A server with a model of random weights, and three slots.

    Each step waits a little: a person could not see the tokens of so small a model.
    """

    def plan_slowly(load, limits):
        time.sleep(0.005)
        return plan_step(load, limits)

    engine = helpers.make_engine(
        helpers.small_model(vocab_size=264, max_length=512),
        max_length=512,
        tokenizer=ByteTokenizer(),
        scheduler=plan_slowly,
    )
    engine.submit("Compile what a request needs", max_tokens=8).result()
    with served.serve(engine) as server:
        yield server


def test_the_page_shows_a_request_from_start_to_end(browser, real):
    """The request takes a slot, its tokens stream, and they are the engine's own."""
    expected = real.engine.submit("Once upon a time", max_tokens=400).result()
    page = browser.new_page()
    page.goto(real.url)
    expect(page.locator("#connection")).to_have_text("ready")
    expect(page.locator("#rows tr")).to_have_count(3)
    page.get_by_label("a text to continue").check()
    page.get_by_label("Prompt", exact=True).fill("Once upon a time")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("400")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#summary")).to_contain_text("1 of 3 slots")
    expect(page.locator("#rows")).to_contain_text(f"{len(expected.prompt)} + ")
    lengths = set()
    while page.get_by_role("button", name="Send").is_disabled():
        lengths.add(page.locator("#answer").evaluate("node => node.textContent.length"))
    assert len(lengths) > 3, "the text did not come bit by bit"
    expect(page.locator("#measured")).to_contain_text("ended by")
    shown = page.locator("#answer").evaluate("node => node.textContent")
    assert shown == expected.text
    expect(page.locator("#summary")).to_contain_text("0 of 3 slots")
    expect(page.locator("#latencies dd").nth(1)).to_contain_text("s ·")
    page.close()


def test_stop_frees_the_slot(browser, real):
    page = browser.new_page()
    page.goto(real.url)
    page.get_by_label("Prompt", exact=True).fill("Once")
    page.get_by_label("Most tokens").fill("400")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#measured")).to_have_text("stopped")
    real.wait_idle()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.get_by_role("alert")).to_be_empty()
    page.close()
