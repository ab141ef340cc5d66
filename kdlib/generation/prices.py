"""What answers cost: the table of `genai-prices`, which needs no network, or the config's own prices.

Tokens before an endpoint has counted them: an estimate is characters / 3.5 (English and code have 3 to 4 to a
token), a bound is UTF-8 bytes (no tokenizer makes more tokens of a text) and what chat templates add.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from kdlib.errors import ConfigError
from kdlib.generation.answers import Usage
from kdlib.generation.config import Asked, GenerationConfig, Prices, Stage
from kdlib.prompts.prompt import Prompt

MILLION = 1e6
CHARACTERS = 3.5  # to a token, for estimates
TEMPLATE, PER_MESSAGE = 64, 16  # tokens at most around a conversation, around a message
JUDGES_WORDS = 200  # tokens around a task and its answer
BATCH = {"processing": "batch"}
USUAL = {
    "openai": ("gpt-4o-mini", "gpt-4.1", "gpt-5-mini", "gpt-5.4-mini", "gpt-6-sol"),
    "anthropic": ("claude-haiku-4-5", "claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"),
    "deepseek": ("deepseek-v4-flash",),
    "google": ("gemini-3.8-flash",),
    "mistral": ("codestral-latest",),
}
Price = Callable[[Usage], float]
"""Tokens → dollars."""


def estimated_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt has."""
    return round(prompt.characters / CHARACTERS) + PER_MESSAGE // 2 * len(prompt.messages)


def most(prompt: Prompt, max_tokens: int) -> Usage:
    """The most tokens that this prompt and its answer can have."""
    return Usage(prompt.bytes + TEMPLATE + PER_MESSAGE * len(prompt.messages), max_tokens)


def price_for(stage: Stage) -> Price | None:
    """What a stage's model takes for tokens; None where that is not known, or it is paid by the hour.

    Raises:
        ConfigError: there is a budget, and no price to keep it by.
    """
    own, local = stage.prices, stage.teacher.local
    if own is not None:
        return None if local else own_price(own, batch=stage.batch)
    price = None if local else table_price(stage.teacher, batch=stage.batch)
    if stage.has_budget and price is None:
        needed = "{hour: …}, of its machine" if local else "{input: …, output: …}, per million tokens"
        why = "a local model has none of its own" if local else "the table of genai-prices has none"
        raise ConfigError(
            f"budget: no price is known for {stage.teacher.model} ({why}); give prices: {needed}, "
            "or leave budget out"
        )
    return price


def own_price(own: Prices, *, batch: bool) -> Price:
    """The config's own prices as a function."""
    share = own.batch if batch else 1.0
    cached = own.input if own.cached is None else own.cached

    def price(usage: Usage) -> float:
        fresh = usage.input - usage.cached
        return share * (fresh * own.input + usage.cached * cached + usage.output * own.output) / MILLION

    return price


def table_price(asked: Asked, *, batch: bool) -> Price | None:
    """Today's price of an endpoint's model; None where the table has no such provider or model."""
    endpoint = asked.endpoint
    where = (
        {"provider_api_url": endpoint.base_url} if endpoint.base_url else {"provider_id": endpoint.provider}
    )
    return _of_table(endpoint.model, batch=batch, **where)


def _of_table(model: str, *, batch: bool, **where: str) -> Price | None:
    try:
        from genai_prices import Usage as Tokens, calc_price
    except ImportError:
        raise ConfigError("prices come from genai-prices; run: pip install 'kdlib[generate]'") from None

    def price(usage: Usage) -> float:
        tokens = {"input_tokens": usage.input, "output_tokens": usage.output}
        tokens |= {"cache_read_tokens": usage.cached, "cache_write_tokens": usage.written}
        counted = Tokens(**{name: count for name, count in tokens.items() if count})
        return float(calc_price(counted, model, price_context=BATCH if batch else None, **where).total_price)

    try:
        price(Usage(1, 1))
    except LookupError:
        return None
    return price


def forecast(prompts: Sequence[Prompt], max_tokens: int, teacher: str, price: Price | None) -> pd.DataFrame:
    """A row a model: dollars for these prompts where every answer is as long as it may be, and half as long.

    Beside the config's teacher stand USUAL models, one by one and by their Batch API.
    """
    mean = math.ceil(sum(map(estimated_tokens, prompts)) / len(prompts))

    def total(price: Price | None, output: int) -> float | None:
        return None if price is None else len(prompts) * price(Usage(mean, output))

    rows = [(f"{teacher} (this config)", price, None)]
    for provider, models in USUAL.items():
        for model in models:
            plain, batch = (_of_table(model, batch=batch, provider_id=provider) for batch in (False, True))
            is_cheaper = plain and batch and batch(Usage(1, 1)) < plain(Usage(1, 1))
            rows.append((model, plain, batch if is_cheaper else None))
    return pd.DataFrame(
        {
            "model": name,
            "at most": total(plain, max_tokens),
            "answers half as long": total(plain, max_tokens // 2),
            "at most, by batch": total(batch, max_tokens),
        }
        for name, plain, batch in rows
    ).set_index("model")


def as_text(config: GenerationConfig, prompts: Sequence[Prompt]) -> str:
    """What `kd generate --dry-run` prints: prompts by category, tokens, and dollars for usual models."""
    most_each, rounds = config.sampling.max_tokens, config.prompts.evolve
    requests = [*prompts] * (1 + 2 * rounds)  # a round asks for as many variants, and then those
    tokens = sum(map(estimated_tokens, requests))
    counts = Counter(prompt.category for prompt in prompts)
    table = forecast(requests, most_each, config.teacher.model, price_for(config.stage))
    if config.judging:
        table = pd.concat([_judging(config.judging, [*prompts] * (1 + rounds), most_each), table])
    shown = table.map(lambda usd: "–" if pd.isna(usd) else f"${usd:,.2f}")
    by_category = ", ".join(f"{count} {name}" for name, count in counts.items())
    harder = (
        f"; with {rounds} round{'s' * (rounds > 1)} of harder variants at most {len(requests)} requests"
        if rounds
        else ""
    )
    lines = [
        f"{len(prompts)} prompts: {by_category}{harder}",
        f"about {tokens:,} tokens of prompts (characters / {CHARACTERS:g}); answers at most "
        f"{len(requests) * most_each:,} ({most_each:,} each); reasoning counts as answer",
        shown.to_string(),
        f"budget: ${config.budget.usd:g}, never passed" if config.budget else "budget: none",
        "nothing was asked; –: no price known, or none by batch; prices of genai-prices, before tax",
    ]
    return "\n\n".join(lines)


def _judging(stage: Stage, prompts: Sequence[Prompt], longest: int) -> pd.DataFrame:
    """What a judge takes who is asked about every answer, as a row of `forecast`."""
    price, mean = price_for(stage), math.ceil(sum(map(estimated_tokens, prompts)) / len(prompts))

    def total(answer: int) -> float | None:
        usage = Usage(mean + answer + JUDGES_WORDS, stage.sampling.max_tokens)
        return None if price is None else len(prompts) * price(usage)

    row = {"at most": total(longest), "answers half as long": total(longest // 2)}
    return pd.DataFrame(row, index=[f"{stage.teacher.model} (judge)"])


@dataclass
class Budget:
    """Dollars: what was spent, and what is held for requests under way, each at the most it can cost."""

    usd: float | None
    spent: float = 0.0
    held: float = 0.0
    under_way: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def fits(self, dollars: float) -> bool:
        return self.usd is None or self.spent + self.held + dollars <= self.usd

    async def reserve(self, dollars: float) -> bool:
        """Hold so much for a request, when those under way leave room; False where there will be none."""
        while not self.fits(dollars):
            if not self.under_way:
                return False
            self.changed.clear()
            await self.changed.wait()
        self.held += dollars
        self.under_way += 1
        return True

    def settle(self, reserved: float, dollars: float) -> None:
        """A request has ended, and cost so much."""
        self.spent += dollars
        self.held -= reserved
        self.under_way -= 1
        self.changed.set()

    def lose(self, dollars: float) -> bool:
        """A try ended without a word and may have been paid; whether there is room for what is held still."""
        self.spent += dollars
        return self.fits(0.0)
