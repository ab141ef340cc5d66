"""Teachers behind an address, asked by their SDKs, which try again as `retry-after` says.

What they try is counted here, one by one: each passes the limits, and may have been paid.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from kdlib.errors import ConfigError, TeacherError, nearest, without_keys
from kdlib.generation.config import Endpoint, Limits, Stage
from kdlib.generation.wires import REASON, WIRES, NoReply, Reply, read_or_not
from kdlib.prompts.prompt import Prompt
from kdlib.runs.log import duration

MINUTE = 60.0
PAUSES = 5  # that one prompt waits for, beside the SDK's own retries
TOLD_S = 10.0  # a pause that is worth a line
BUSY = (429, 503, 529)
NO_KEY = "none"  # sent to an address that wants no key


class Spent(BaseException):
    """There is no budget for another try.  No `Exception`: after those the SDKs try again."""


@dataclass
class Tries:
    """One prompt's tries: only one that was sent and not refused may have been paid."""

    lose: Callable[[], bool]  # tells the budget of one that ended without a word; whether another fits
    sent: bool = False
    refused: bool = False

    @property
    def paid(self) -> bool:
        return self.sent and not self.refused

    def begin(self) -> None:
        if self.paid and not self.lose():
            raise Spent
        self.sent = self.refused = False


TRIES: ContextVar[Tries | None] = ContextVar("TRIES", default=None)


@dataclass
class Gate:
    """What each try passes: the limits per minute, and a pause that the endpoint has asked of all."""

    limits: Limits
    largest: int  # tokens of the largest request
    until: float = 0.0
    _buckets: list[tuple[Any, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (requests := self.limits.requests_per_minute) is not None:
            self._buckets.append((self._bucket(1, MINUTE / requests), False))
        if (tokens := self.limits.tokens_per_minute) is not None:
            largest = min(self.largest, tokens)
            self._buckets.append((self._bucket(largest, MINUTE * largest / tokens), True))

    @staticmethod
    def _bucket(size: float, seconds: float) -> Any:
        """No larger than one request: a bucket of a minute's lets two minutes' through in the first one."""
        from aiolimiter import AsyncLimiter

        return AsyncLimiter(size, seconds)

    async def passed(self, tokens: int) -> None:
        loop = asyncio.get_running_loop()
        while (left := self.until - loop.time()) > 0:
            await asyncio.sleep(left)
        for bucket, of_tokens in self._buckets:
            await bucket.acquire(min(tokens, bucket.max_rate) if of_tokens else 1)

    @property
    def is_shut(self) -> bool:
        return self.until > asyncio.get_running_loop().time()

    def pause(self, seconds: float) -> None:
        if seconds >= TOLD_S and not self.is_shut:
            print(f"the endpoint asks for a pause of {duration(seconds)}", flush=True)
        self.until = max(self.until, asyncio.get_running_loop().time() + seconds)


class Teacher:
    """A teacher that is asked over the network."""

    def __init__(self, stage: Stage, *, largest: int = 1):
        assert stage.teacher.endpoint is not None
        self.endpoint, self.sampling = stage.teacher.endpoint, stage.sampling
        self.wire = WIRES[self.endpoint.provider]
        self.gate = Gate(stage.limits, largest)
        self.sdk, self.client = _client(self.endpoint, stage.limits, self._before, self._after)
        self.tokens: ContextVar[int] = ContextVar("tokens", default=0)

    async def check(self) -> None:
        """Raise a TeacherError where nobody is there, the key is wrong, or no such model; nothing is paid.

        An address that lists no models, and a model that is a folder there, are told by the first request.
        """
        name = self.endpoint.model
        try:
            known = [model.id async for model in self.client.with_options(max_retries=1).models.list()]
        except (self.sdk.NotFoundError, self.sdk.InternalServerError):
            return
        except (self.sdk.APIError, ValueError, AttributeError, TypeError) as error:
            raise self._cannot(error) from None
        if known and name not in known and not name.startswith(("/", ".", "~")):
            few = ", ".join(sorted(known)[:8]) + ", …" * (len(known) > 8)
            raise TeacherError(f"{self._where}: no model {name!r}{nearest(name, known)}; it has {few}")

    async def reply(self, prompt: Prompt, tokens: int, tries: Tries) -> Reply:
        """The answer to a prompt of at most so many tokens, both ways.

        Raises:
            NoReply: there is none; it says whether one may have been paid.
            TeacherError: nor would there be one to any other prompt.
            Spent: another try has no budget.
        """
        TRIES.set(tries)
        self.tokens.set(tokens)
        body = self.wire.body(self.endpoint, self.sampling, prompt)
        try:
            raw = await self._sent(body)
            found = read_or_not(self.wire, json.loads(raw.http_response.text))
        except self.sdk.APIStatusError as error:
            if _is_final(error):
                raise self._cannot(error) from None
            raise NoReply(_said(error)) from None
        except self.sdk.APIError as error:
            raise NoReply(_said(error), paid=tries.paid) from None
        except ValueError as error:
            raise NoReply(f"the answer is no JSON: {error}"[:REASON], paid=True) from None
        if isinstance(found, NoReply):
            raise found
        return found

    async def _sent(self, body: Mapping[str, Any]) -> Any:
        """What the SDK brings; asked again where its patience ends before a pause that all were asked for."""
        for _ in range(PAUSES):
            try:
                return await self.wire.send(self.client, body)
            except self.sdk.RateLimitError as error:
                if _is_final(error) or not self.gate.is_shut:
                    raise
        return await self.wire.send(self.client, body)

    async def submit(self, name: str, prompts: Mapping[str, Prompt]) -> str:
        """Send prompts by key to the Batch API; returns the batch's id, by which it is read later.

        Raises:
            TeacherError: it is refused, or there is no such API.
        """
        bodies = {key: self.wire.body(self.endpoint, self.sampling, each) for key, each in prompts.items()}
        with self._explained():
            return await self.wire.submit(self.client, name, bodies)

    async def sought(self, name: str, count: int, since: float) -> str | None:
        """The id of a batch whose sending a kill has cut short, if it was sent; raises as `submit`."""
        with self._explained():
            return await self.wire.sought(self.client, name, count, since)

    async def results(self, batch: str) -> dict[str, Reply | NoReply] | None:
        """What a batch has brought, by key; None while it goes on; raises as `submit`."""
        with self._explained():
            if not await self.wire.has_ended(self.client, batch):
                return None
            return await self.wire.results(self.client, batch)

    async def close(self) -> None:
        await self.client.close()

    @property
    def _where(self) -> str:
        return self.endpoint.base_url or self.endpoint.provider

    def _cannot(self, error: Exception) -> TeacherError:
        return TeacherError(f"{self._where}: {_said(error)}; {_advice(self.endpoint, error)}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """The SDK's errors as TeacherErrors."""
        try:
            yield
        except (self.sdk.APIError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._cannot(error) from None

    async def _before(self, request: Any) -> None:
        """Before each try of the SDK's."""
        if tries := TRIES.get():
            tries.begin()
            await self.gate.passed(self.tokens.get())
            request.extensions["trace"] = _notes_sent(tries)

    async def _after(self, response: Any) -> None:
        """After the head of each answer."""
        if tries := TRIES.get():
            tries.refused = response.status_code >= 400
        if response.status_code in BUSY:
            wait = response.headers.get("retry-after", "")
            self.gate.pause(float(wait) if wait.replace(".", "", 1).isdigit() else 0.0)


def _notes_sent(tries: Tries) -> Callable[[str, Any], Any]:
    """What httpx calls at each stage of a try."""

    async def note(stage: str, about: Any) -> None:
        tries.sent |= stage.endswith("send_request_headers.complete")

    return note


def _client(endpoint: Endpoint, limits: Limits, before: Any, after: Any) -> tuple[Any, Any]:
    """The SDK and its client.

    Raises:
        ConfigError: the SDK is not installed.
        TeacherError: the environment holds no key.
    """
    try:
        if endpoint.provider == "openai":
            import openai as sdk

            make: Any = sdk.AsyncOpenAI
        else:
            import anthropic as sdk

            make = sdk.AsyncAnthropic
    except ImportError:
        raise ConfigError(
            f"{endpoint.provider} is not installed; run: pip install 'kdlib[generate]'"
        ) from None
    key = os.environ.get(endpoint.key_name, "").strip() if endpoint.key_name else NO_KEY
    if not key:
        do = f"export {endpoint.key_name}=…, or name another variable in teacher.endpoint.key_variable"
        raise TeacherError(f"no key: the environment has no {endpoint.key_name}; {do}")
    http = sdk.DefaultAsyncHttpxClient(event_hooks={"request": [before], "response": [after]})
    own: Any = {"base_url": endpoint.base_url} if endpoint.base_url else {}
    return sdk, make(api_key=key, http_client=http, timeout=limits.timeout, max_retries=limits.retries, **own)


def _said(error: Exception) -> str:
    """What an SDK's error says, in one line without keys."""
    status = getattr(error, "status_code", None)
    cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
    words = " ".join(str(getattr(error, "message", error)).split())
    return without_keys(f"{f'status {status}: ' if status else ''}{words}{cause}")[:REASON]


def _is_final(error: Any) -> bool:
    """Whether every other prompt would fare alike: no access, no money, no such model."""
    code = str(getattr(error, "code", "")) + str(getattr(error, "body", ""))
    return error.status_code in (401, 402, 404) or "insufficient_quota" in code


def _advice(endpoint: Endpoint, error: Exception) -> str:
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return (
            f"look at the key in ${endpoint.key_name}"
            if endpoint.key_name
            else "name teacher.endpoint.key_variable"
        )
    if status in (402, 429):
        return "the account can pay for nothing more"
    if status is None:
        return "is it running there? teacher.endpoint.base_url has its address"
    return "look at teacher.endpoint"
