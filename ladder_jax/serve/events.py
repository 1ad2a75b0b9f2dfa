"""Appends the results of a device call to the output of their requests."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ladder_jax import decode_state
from ladder_jax.decode_scores import Scores
from ladder_jax.serve.counters import Counters
from ladder_jax.serve.packing import Piece
from ladder_jax.serve.request import Request, Token
from ladder_jax.serve.tracker import Record, Tracker


class RequestEvent(NamedTuple):
    """One event of a request."""

    token: int
    flag: int  # decode_state.TOKEN, LENGTH, STOP or PREEMPTED
    position: tuple[int, int]  # in the arrays [K, W] of decode_state.Events


def deliver_scores(
    scores: Scores,
    pieces: Sequence[Piece],
    records: Sequence[Record],
    counters: Counters,
) -> None:
    """Delivers the scores [P, T] of pieces of prompts, NumPy arrays.

    It ends a request without output when its prompt is complete.
    """
    for i, (piece, record) in enumerate(zip(pieces, records)):
        request = record.request
        has_next = len(request.prompt) - 1 - piece.start
        count = min(piece.length, has_next)
        alternatives = request.submission.prompt_logprobs
        logprobs = scores.logprob[i, :count].tolist()
        top_ids = scores.top_ids[i, :count, :alternatives].tolist()
        top_logprobs = scores.top_logprobs[i, :count, :alternatives].tolist()
        tops = [tuple(zip(*top)) for top in zip(top_ids, top_logprobs)]
        if record.is_scored:
            request.put_prompt_logprobs(list(zip(logprobs, tops)))
        if piece.last and not request.max_tokens:
            counters.finished += request.put(finish="length")


def deliver_events(events: Any, tracker: Tracker, counters: Counters) -> list[Record]:
    """Delivers all events to their requests, in the order of the iterations.

    events: decode_state.Events [K, W], NumPy arrays.
    Returns the requests that the device has preempted and that are not done.
    """
    preempted = []
    requests, tokens = events.request.tolist(), events.token.tolist()
    flags = events.flag.tolist()
    by_request: dict[int, list[RequestEvent]] = {}
    for i, j in np.argwhere(events.flag != decode_state.IDLE).tolist():
        event = RequestEvent(tokens[i][j], flags[i][j], (i, j))
        by_request.setdefault(requests[i][j], []).append(event)
    for number, request_events in by_request.items():
        is_preempted = request_events[-1].flag == decode_state.PREEMPTED
        counters.tokens += len(request_events) - is_preempted
        if record := tracker.get(number):
            ended = deliver_to_request(record, request_events, events, tracker)
            counters.finished += ended
            if is_preempted and not record.request.finish:
                preempted.append(record)
    return preempted


def deliver_to_request(
    record: Record,
    request_events: list[RequestEvent],
    events: Any,
    tracker: Tracker,
) -> bool:
    """Delivers one request's events, up to its end. Returns whether they end it."""
    request = record.request
    device_ended = request_events[-1].flag != decode_state.TOKEN
    if request.finish:  # the client cancelled it, or a stop string ended it
        if device_ended:
            tracker.finish(record, device_ended=True)
        return False
    output: list[Token] = []
    finish: str | None = None
    error: Exception | None = None
    for event in request_events:
        if event.flag == decode_state.PREEMPTED:
            break
        try:
            finish = append_output(request, event, events, output)
        except Exception as exception:  # the tokenizer's: it ends this request alone
            finish, error = "error", exception
        if finish:
            break
    ended = request.put(output, finish, error)
    if finish:
        tracker.finish(record, device_ended=device_ended)
    return ended


def append_output(
    request: Request, event: RequestEvent, events: Any, output: list[Token]
) -> str | None:
    """Appends the token and the text of an event to `output`.

    Returns Request.finish if the event ends the request, else None.
    """
    finish = {decode_state.STOP: "stop", decode_state.LENGTH: "length"}.get(event.flag)
    is_stop_id = event.flag == decode_state.STOP
    text = ""
    if request.text_filter:
        if not is_stop_id:
            text, is_stopped = request.text_filter.push(event.token)
            finish = "stop" if is_stopped else finish
        if finish:
            text += request.text_filter.flush()
    if is_stop_id:
        if text:
            output.append(Token(None, text))
        return finish
    if request.logprobs is None:
        output.append(Token(event.token, text))
        return finish
    ids = events.top_ids[event.position].tolist()[: request.logprobs]
    logprobs = events.top_logprobs[event.position].tolist()[: request.logprobs]
    logprob = float(events.logprob[event.position])
    output.append(Token(event.token, text, logprob, tuple(zip(ids, logprobs))))
    return finish
