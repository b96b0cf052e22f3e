"""Stand-ins for vLLM: a backend that says what it is told to, and a server that does so over HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from avp_agents.engine.core.sampling import Sampled
from avp_agents.vllm.backend import DecodingOptions, Facts, Step
from avp_agents.vllm.lineage_prompt import LineagePrompt

WINDOW = 2048


class FakeBackend:
    """Decodes given tokens, one a step, and notes what it was asked.

    Attributes:
        says: The tokens.
        cached: What it claims to have had in its prefix cache.
        asked: Prompts and options, in order.
        left: Requests whose generator was left before it ended.
    """

    def __init__(self, says: Sequence[int] = (), *, cached: int | None = 0, dtype: str = "float32") -> None:
        self.says, self.cached, self.dtype = list(says), cached, dtype
        self.asked: list[tuple[LineagePrompt, DecodingOptions]] = []
        self.left = 0
        self.closed = False

    async def start(self) -> Facts:
        return Facts(WINDOW, self.dtype, thinks=False)

    async def decode(self, prompt: LineagePrompt, decoding: DecodingOptions) -> AsyncGenerator[Step, None]:
        self.asked.append((prompt, decoding))
        most = decoding.sampling["max_tokens"]
        says = self.says[:most]
        ended = False
        try:
            for index, token in enumerate(says):
                await asyncio.sleep(0)
                ends = index + 1 == most or token in decoding.sampling.get("stop_token_ids", ())
                yield Step((Sampled(token, -0.5, ((token, -0.5),)),), None, ends)
                if ends:
                    break
            else:
                await asyncio.sleep(3600)  # a model that has nothing to say, and takes its time
            yield Step(cached=self.cached)
            ended = True
        finally:
            self.left += not ended

    async def close(self) -> None:
        self.closed = True


class FakeServer:
    """What `serve` runs.

    Attributes:
        status: With which it answers requests for text.
        answers: The JSON of its events, or of its one answer where it is not to be 200.
        bodies: What was asked, in order: path and body.
    """

    def __init__(self) -> None:
        self.status = 200
        self.answers: list[dict[str, Any]] = []
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.url = ""
        self.root = ""


@contextmanager
def serve(root: str) -> Iterator[FakeServer]:
    """A server on a free port that says it runs the checkpoint in `root`."""
    fake = FakeServer()
    fake.root = root

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            model = {"id": "the-model", "root": fake.root, "max_model_len": WINDOW}
            self._send(200, json.dumps({"data": [model]}), "application/json")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            fake.bodies.append((self.path, body))
            if fake.status != 200:
                self._send(fake.status, json.dumps(fake.answers[0]), "application/json")
            elif body["stream"]:
                events = "".join(f"data: {json.dumps(answer)}\n\n" for answer in fake.answers)
                self._send(200, events + "data: [DONE]\n\n", "text/event-stream")
            else:
                self._send(200, json.dumps(fake.answers[0]), "application/json")

        def _send(self, status: int, text: str, kind: str) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
