"""Hands the events that a device call emitted to the requests that they belong to."""

from typing import Any, NamedTuple

import numpy as np

from ladder_jax import decode
from ladder_jax.serve.counters import Counters
from ladder_jax.serve.request import Request, Token
from ladder_jax.serve.tracker import Record, Tracker


class Emitted(NamedTuple):
    """One event of a request."""

    token: int
    flag: int  # decode.TOKEN, LENGTH or STOP
    at: tuple[int, int]  # where in Events [K, W]


def hand_out(events: Any, tracker: Tracker, counters: Counters) -> None:
    """Gives every request its events, in the order of the iterations.

    events: decode.Events [K, W], NumPy arrays.
    """
    requests, tokens = events.request.tolist(), events.token.tolist()
    flags = events.flag.tolist()
    by_request: dict[int, list[Emitted]] = {}
    for i, j in np.argwhere(events.flag).tolist():
        emitted = Emitted(tokens[i][j], flags[i][j], (i, j))
        by_request.setdefault(requests[i][j], []).append(emitted)
    for number, own in by_request.items():
        counters.tokens += len(own)
        if record := tracker.get(number):
            counters.finished += hand_to(record, own, events, tracker)


def hand_to(record: Record, own: list[Emitted], events: Any, tracker: Tracker) -> bool:
    """Gives one request its own events, up to its end; returns whether they end it."""
    request = record.request
    device_ended = own[-1].flag != decode.TOKEN
    if request.finish:  # it is cancelled, or a stop string has ended it
        if device_ended:
            tracker.finish(record, device_knows=True)
        return False
    output: list[Token] = []
    finish: str | None = None
    error: Exception | None = None
    for emitted in own:
        try:
            finish = read_event(request, emitted, events, output)
        except Exception as raised:  # of this request alone, as by its tokenizer
            finish, error = "error", raised
        if finish:
            break
    ended = request.put(output, finish, error)
    if finish:
        tracker.finish(record, device_knows=device_ended)
    return ended


def read_event(
    request: Request, emitted: Emitted, events: Any, output: list[Token]
) -> str | None:
    """Appends what an event means for the client; returns how it ends the request."""
    finish = {decode.STOP: "stop", decode.LENGTH: "length"}.get(emitted.flag)
    is_stop_id = emitted.flag == decode.STOP
    text = ""
    if request.stopper:
        if not is_stop_id:
            text, stopped = request.stopper.push(emitted.token)
            finish = "stop" if stopped else finish
        if finish:
            text += request.stopper.flush()
    if is_stop_id:
        if text:
            output.append(Token(None, text))
        return finish
    if request.logprobs is None:
        output.append(Token(emitted.token, text))
        return finish
    at = emitted.at
    top = list(zip(events.top_ids[at].tolist(), events.top_logprobs[at].tolist()))
    logprob = float(events.logprob[at])
    output.append(Token(emitted.token, text, logprob, tuple(top[: request.logprobs])))
    return finish
