"""What is sent and how it is read: OpenAI's and Anthropic's wire forms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdlib.generation.config import Endpoint, Sampling
from kdlib.generation.rows import Prompt, Usage

FINISHED = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "content_filter": "refusal"}
"""The endpoints' words for how an answer ended, as ours."""


@dataclass(frozen=True)
class Reply:
    """What an endpoint sent, as far as it can be read."""

    text: str
    finish: str
    usage: Usage | None
    model: str


class NoReply(Exception):
    """Why there is none, in words; what was sent may have been paid."""


class OpenAIWire:
    """Chat completions: OpenAI's own, and those of vLLM, `transformers serve` and many others."""

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


WIRES: dict[str, Any] = {"openai": OpenAIWire, "anthropic": AnthropicWire}
