"""JSON to an HTTP service and back: a reply, or an error that says whether another try can help."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from reward.errors import NotRetryable, RewardError, TryAgain, one_line

LARGEST_REPLY = 8 * 2**20
LONGEST_RETRY_AFTER_S = 300.0
PASSING = {408, 425, 429}
"""What will pass by itself, beside 500 and above."""


class Service:
    """One URL. `blame` names the settings to look at when the service refuses with a given status."""

    def __init__(self, url: str, key: str | None, connections: int, blame: Callable[[int], str]) -> None:
        self._url = url
        self._shown_url = url.partition("?")[0]
        self._key = key
        self._connections = connections
        self._blame = blame
        self._client: httpx.AsyncClient | None = None

    def open(self) -> None:
        """Make the client where there is none."""
        if self._client is None:
            authorization = {"Authorization": f"Bearer {self._key}"} if self._key is not None else {}
            self._client = httpx.AsyncClient(
                headers={"Content-Type": "application/json", **authorization},
                timeout=None,  # the caller limits the whole exchange; httpx limits only its parts
                follow_redirects=False,  # would take the key and the texts to another place
                limits=httpx.Limits(max_connections=self._connections),
            )

    async def post(self, body: Mapping[str, Any]) -> Any:
        """The JSON that the service returned. Raises TryAgain, or NotRetryable where another try cannot help."""
        if self._client is None:
            raise RuntimeError("call open() before post()")
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise NotRetryable(f"it cannot be sent as JSON: {one_line(error)}") from error
        try:
            async with self._client.stream("POST", self._url, content=content) as response:
                raw = await _read(response)
        except httpx.RequestError as error:
            raise TryAgain(f"{one_line(error)} at {self._shown_url}") from error
        if not response.is_success:
            raise self._refusal(response, raw)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise TryAgain(f"its reply is not JSON: {self._shown(raw)}") from error

    async def close(self) -> None:
        """End all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _refusal(self, response: httpx.Response, raw: bytes) -> Exception:
        status = response.status_code
        said = f"HTTP {status} {response.reason_phrase}".strip()
        if status in PASSING or status >= 500:
            after_s = retry_after(response.headers.get("retry-after", ""), time.time())
            if after_s <= LONGEST_RETRY_AFTER_S:
                return TryAgain(f"{said}: {self._shown(raw)}", after_s)
            return NotRetryable(f"{said}, which asks to wait {after_s:.0f} s: {self._shown(raw)}")
        if response.is_redirect:
            return NotRetryable(f"{said} to '{response.headers['location'][:100]}'; {self._blame(404)}")
        return NotRetryable(f"{said}; {self._blame(status)}: {self._shown(raw)}")

    def _shown(self, raw: bytes) -> str:
        """The beginning of a reply on one line, without the key."""
        text = " ".join(raw.decode(errors="replace").split())
        if self._key is not None:
            text = text.replace(self._key, "***")
        return repr(text[:150])


class Pace:
    """Lets callers pass one by one, evenly spaced, and all wait after a service asked for it."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next = -math.inf
        self._line = asyncio.Lock()

    async def turn(self) -> None:
        """Returns when it is the caller's turn; who came first goes first. A caller who gives up takes no turn."""
        async with self._line:
            while (wait := self._next - _now()) > 0:  # noqa: ASYNC110 - a hold may come while it waits
                await asyncio.sleep(wait)
            self._next = _now() + self._interval_s

    def hold(self, seconds: float) -> None:
        """Nobody passes for so long."""
        self._next = max(self._next, _now() + seconds)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _read(response: httpx.Response) -> bytes:
    raw = bytearray()
    async for part in response.aiter_bytes():
        raw += part
        if len(raw) > LARGEST_REPLY:
            raise TryAgain(f"its reply has more than {LARGEST_REPLY // 2**20} MiB")
    return bytes(raw)


def retry_after(value: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; 0 for none and for nonsense."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            seconds = 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def check_url(url: str, field: str) -> None:
    """Raises RewardError where nothing can be sent to it."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise RewardError(f"{field} is no URL: {one_line(error)}") from error
    if parsed.userinfo:
        raise RewardError(f"{field} holds a user name or password; send a key by api_key_env instead")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise RewardError(f"{field} '{url}' must begin with http:// or https:// and a host")
    if parsed.port is not None and parsed.port > 65535:
        raise RewardError(f"{field} '{url}' has a port above 65535")
    if parsed.fragment:
        raise RewardError(f"{field} '{url}' has a '#'; give the address without it")


def read_key(variable: str | None, field: str) -> str | None:
    """The key in an environment variable. Raises RewardError, which never shows the key, where there is none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RewardError(f"{field}: the environment variable '{variable}' is not set; export it where workers start")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise RewardError(f"{field}: what the environment variable '{variable}' holds cannot be a key")
    return key
