"""An OpenAI-compatible server with known delays, for tests of its clients."""

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass

from aiohttp import web


@dataclass
class Fake:
    """A server with slots: a request waits for one, then `first` seconds for its first
    token, and `gap` seconds before each other write of `burst` tokens.

    fault: what goes wrong with requests whose prompt has 13 first: "" nothing, "500",
    "cut" the stream ends early, "error" it has an error, "reset", "junk", "slow".
    """

    slots: int = 4
    queue: int = 1000
    first: float = 0.5
    gap: float = 0.1
    burst: int = 1
    fault: str = ""
    text: str = "t{} "

    def __post_init__(self):
        self.bodies, self.waiting, self.free = [], 0, None

    async def complete(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.free = self.free or asyncio.Semaphore(self.slots)
        if self.waiting >= self.queue and self.free.locked():
            return web.json_response({"error": {"message": "full"}}, status=429)
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        fault = self.fault if prompt[0] == 13 else ""
        if fault == "500":
            return web.json_response({"error": {"message": "no"}}, status=500)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self.waiting += 1
        async with self.free:
            self.waiting -= 1
            await response.prepare(request)
            await self.stream(request, response, body, prompt, chat, fault)
        return response

    async def stream(self, request, response, body, prompt, chat, fault):
        async def write(*events):
            lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            await response.write(lines.encode())

        def event(number):
            text = self.text.format(number)
            choice = {"delta": {"content": text}} if chat else {"text": text}
            return {"choices": [choice | {"index": 0, "finish_reason": None}]}

        if chat:
            delta = {"role": "assistant", "content": ""}
            await write({"choices": [{"delta": delta, "finish_reason": None}]})
        most, sent = body["max_tokens"], 0
        while sent < most:
            await asyncio.sleep(self.gap if sent else self.first)
            if fault == "slow":
                await asyncio.sleep(1000)
            burst = min(self.burst if sent else 1, most - sent)
            await write(*(event(sent + i) for i in range(burst)))
            sent += burst
            if fault == "reset" and sent >= 2:
                request.transport.abort()
                return
            if fault == "cut" and sent >= 2:
                return
            if fault == "error" and sent >= 2:
                await write({"error": {"message": "broken"}})
                return
            if fault == "junk" and sent >= 2:
                await response.write(b"data: {nonsense\n\n")
        last = {"delta": {}} if chat else {"text": ""}
        await write({"choices": [last | {"finish_reason": "length"}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": sent}
        if body.get("stream_options", {}).get("include_usage"):
            await write({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")

    async def models(self, _):
        return web.json_response({"data": [{"id": "fake"}]})

    @contextlib.asynccontextmanager
    async def serve(self, port=0):
        """Serves inside; yields the base URL."""
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        port = runner.addresses[0][1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            await runner.cleanup()


async def main(port, *fields):
    """python fake_openai.py PORT first=0.2 gap=0.01"""
    values = dict(field.split("=") for field in fields)
    fake = Fake(**{name: json.loads(value) for name, value in values.items()})
    async with fake.serve(int(port)):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
