"""A real HTTP server for tests, on a port of its own, that can be slow, fail, cut its replies and answer nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: Any
    at: float
    """Time of its arrival on the event loop's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Close the connection after so many bytes of the whole reply."""
    hang_after: int | None = None
    """Send no more than so many bytes of it, and keep the connection."""


Handler = Callable[[Request], Reply | Awaitable[Reply]]


def as_json(value: Any, **fields: Any) -> Reply:
    return Reply(body=json.dumps(value).encode(), **fields)


class HttpService:
    """Answers every POST by `handler`, which may be exchanged."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.url = ""
        self._at_once = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve_one(reader, writer):
                pass
        except ConnectionError:
            pass  # the client has given up
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its reply; False where the connection ends."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return False
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        request = Request(path=head[0].split()[1], headers=headers, body=body, at=asyncio.get_running_loop().time())
        self.requests.append(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            made = self.handler(request)
            reply = made if isinstance(made, Reply) else await made
        finally:
            self._at_once -= 1
        lines = [f"HTTP/1.1 {reply.status} Said", f"Content-Length: {len(reply.body)}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        raw = "\r\n".join([*lines, "", ""]).encode() + reply.body
        writer.write(raw[: reply.cut_after][: reply.hang_after])
        await writer.drain()
        if reply.hang_after is not None:
            await asyncio.Event().wait()
        return reply.cut_after is None


@contextlib.asynccontextmanager
async def http_service(handler: Handler) -> AsyncIterator[HttpService]:
    """A running service; ends with the block, whatever it still does."""
    service = HttpService(handler)
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await service.serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the block has ended
        finally:
            connections.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield service
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections)
