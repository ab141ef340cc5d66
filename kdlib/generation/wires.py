"""What is sent and how it is read: OpenAI's and Anthropic's wire forms."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdlib.generation.answers import Usage
from kdlib.generation.config import Endpoint, Sampling
from kdlib.prompts.prompt import Prompt

FINISHED = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "content_filter": "refusal"}
"""The endpoints' words for how an answer ended, as ours."""
UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)
REASON = 300  # characters that are kept of what an endpoint says is wrong
CLOCKS_DIFFER_S = 120.0


@dataclass(frozen=True)
class Reply:
    """What an endpoint sent, as far as it can be read."""

    text: str
    finish: str
    usage: Usage | None
    model: str


class NoReply(Exception):
    """Why there is none, in words, and whether one may have been paid."""

    def __init__(self, reason: str, *, paid: bool = False):
        super().__init__(reason)
        self.paid = paid


class OpenAIWire:
    """Chat completions: OpenAI's own, and those of vLLM, `transformers serve` and many others."""

    ended = ("completed", "failed", "expired", "cancelled")

    @staticmethod
    def body(endpoint: Endpoint, sampling: Sampling, prompt: Prompt) -> dict[str, Any]:
        # OpenAI's reasoning models refuse `max_tokens`, which is all that older servers know
        limit = "max_tokens" if endpoint.base_url else "max_completion_tokens"
        plain = {"temperature": sampling.temperature, "top_p": sampling.top_p, "stop": sampling.stop or None}
        return {
            "model": endpoint.model,
            "messages": prompt.as_sent(),
            limit: sampling.max_tokens,
            **{name: value for name, value in plain.items() if value is not None},
            **sampling.extra,
        }

    @staticmethod
    async def send(client: Any, body: Mapping[str, Any]) -> Any:
        shown = {name: body[name] for name in ("model", "messages")}
        rest = {name: value for name, value in body.items() if name not in shown}
        return await client.chat.completions.with_raw_response.create(**shown, extra_body=rest)

    @staticmethod
    def read(answer: Mapping[str, Any]) -> Reply:
        choice, usage = answer["choices"][0], answer.get("usage")
        refusal, text = choice["message"].get("refusal"), choice["message"].get("content") or ""
        finish = "refusal" if refusal else str(choice.get("finish_reason"))
        tokens = None
        if usage:
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            tokens = Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)
        return Reply(
            text or refusal or "", FINISHED.get(finish, finish), tokens, str(answer.get("model", ""))
        )

    @staticmethod
    async def submit(client: Any, name: str, bodies: Mapping[str, Mapping[str, Any]]) -> str:
        """Send a batch of bodies by key; returns its id."""
        about = {"method": "POST", "url": "/v1/chat/completions"}
        lines = [json.dumps({"custom_id": key, **about, "body": body}) for key, body in bodies.items()]
        content = ("prompts.jsonl", "\n".join(lines).encode())
        file = await client.files.create(file=content, purpose="batch")
        options = {"endpoint": about["url"], "completion_window": "24h", "metadata": {"kdlib": name}}
        return (await client.batches.create(input_file_id=file.id, **options)).id

    @staticmethod
    async def sought(client: Any, name: str, count: int, since: float) -> str | None:
        """The id of a batch that was sent by this name, if it was."""
        async for batch in client.batches.list(limit=100):
            if (batch.metadata or {}).get("kdlib") == name:
                return batch.id
            if batch.created_at < since - CLOCKS_DIFFER_S:
                return None
        return None

    @classmethod
    async def has_ended(cls, client: Any, batch: str) -> bool:
        return (await client.batches.retrieve(batch)).status in cls.ended

    @staticmethod
    async def results(client: Any, batch: str) -> dict[str, Reply | NoReply]:
        """What each key of an ended batch got, as far as it got anything."""
        found, made = {}, await client.batches.retrieve(batch)
        for file in filter(None, (made.output_file_id, made.error_file_id)):
            text = (await client.files.content(file)).text
            for entry in map(json.loads, filter(None, text.split("\n"))):
                response = entry.get("response") or {}
                if response.get("status_code") == 200:
                    found[entry["custom_id"]] = read_or_not(OpenAIWire, response["body"])
                else:
                    why = entry.get("error") or response.get("body") or "no answer"
                    found[entry["custom_id"]] = NoReply(f"refused in the batch: {why}"[:REASON])
        return found


class AnthropicWire:
    """Anthropic's messages."""

    @staticmethod
    def body(endpoint: Endpoint, sampling: Sampling, prompt: Prompt) -> dict[str, Any]:
        system = "\n\n".join(content for role, content in prompt.messages if role == "system")
        plain = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        plain |= {"stop_sequences": sampling.stop or None, "system": system or None}
        return {
            "model": endpoint.model,
            "messages": [each for each in prompt.as_sent() if each["role"] != "system"],
            "max_tokens": sampling.max_tokens,
            **{name: value for name, value in plain.items() if value is not None},
            **sampling.extra,
        }

    @staticmethod
    async def send(client: Any, body: Mapping[str, Any]) -> Any:
        shown = {name: body[name] for name in ("model", "messages", "max_tokens")}
        rest = {name: value for name, value in body.items() if name not in shown}
        return await client.messages.with_raw_response.create(**shown, extra_body=rest)

    @staticmethod
    def read(answer: Mapping[str, Any]) -> Reply:
        text = "".join(part["text"] for part in answer["content"] if part["type"] == "text")
        finish, usage, tokens = str(answer.get("stop_reason")), answer.get("usage"), None
        if usage:
            cached = usage.get("cache_read_input_tokens") or 0
            written = usage.get("cache_creation_input_tokens") or 0
            tokens = Usage(usage["input_tokens"] + cached + written, usage["output_tokens"], cached, written)
        return Reply(text, FINISHED.get(finish, finish), tokens, str(answer.get("model", "")))

    @staticmethod
    async def submit(client: Any, name: str, bodies: Mapping[str, Mapping[str, Any]]) -> str:
        requests = [{"custom_id": key, "params": body} for key, body in bodies.items()]
        return (await client.messages.batches.create(requests=requests)).id

    @staticmethod
    async def sought(client: Any, name: str, count: int, since: float) -> str | None:
        """Anthropic's batches have no name: the first one since then with as many requests."""
        found = None
        async for batch in client.messages.batches.list(limit=100):
            if batch.created_at.timestamp() < since - CLOCKS_DIFFER_S:
                break
            if sum(batch.request_counts.model_dump().values()) == count:
                found = batch.id
        return found

    @staticmethod
    async def has_ended(client: Any, batch: str) -> bool:
        return (await client.messages.batches.retrieve(batch)).processing_status == "ended"

    @staticmethod
    async def results(client: Any, batch: str) -> dict[str, Reply | NoReply]:
        found: dict[str, Reply | NoReply] = {}
        async for entry in await client.messages.batches.results(batch):
            result = entry.result.model_dump()
            if result["type"] == "succeeded":
                found[entry.custom_id] = read_or_not(AnthropicWire, result["message"])
            else:
                found[entry.custom_id] = NoReply(f"refused in the batch: {result}"[:REASON])
        return found


def read_or_not(wire: Any, answer: Mapping[str, Any]) -> Reply | NoReply:
    """An answer as its wire form reads it; a NoReply that says so where it cannot be read, and was paid."""
    try:
        return wire.read(answer)
    except UNREADABLE as error:
        return NoReply(f"the answer cannot be read: {type(error).__name__}: {error}"[:REASON], paid=True)


WIRES: dict[str, Any] = {"openai": OpenAIWire, "anthropic": AnthropicWire}
