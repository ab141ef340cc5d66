"""What answers cost, by the table and by hand; a budget that holds what is under way.

Run: pytest tests/test_generation_prices.py
"""

import asyncio

import pytest

from kdlib.config.run import parse
from kdlib.errors import ConfigError
from kdlib.generation.answers import Usage
from kdlib.generation.config import GenerationConfig
from kdlib.generation.prices import USUAL, Budget, as_text, estimated_tokens, forecast, most, price_for
from kdlib.prompts.prompt import Prompt

MILLION = 1_000_000


def config(model="gpt-4o-mini", provider="openai", **sections):
    endpoint = {"provider": provider, "model": model, **sections.pop("endpoint", {})}
    raw = {"teacher": {"endpoint": endpoint}, "prompts": {"from": "x.jsonl"}, **sections}
    return parse(raw, kind=GenerationConfig)


def price_of(made):
    return price_for(made.stage)


def prompt(text="write a function that adds"):
    return Prompt((("user", text),), "function")


@pytest.mark.parametrize(
    ("model", "provider", "usage", "by_hand", "by_batch"),
    [  # dollars per million tokens, as the providers list them
        ("gpt-4o-mini", "openai", Usage(1234, 567), 1234 * 0.15 + 567 * 0.60, 1234 * 0.075 + 567 * 0.30),
        (  # OpenAI's batches know no cached tokens
            *("gpt-4o-mini", "openai", Usage(1234, 567, cached=1024)),
            210 * 0.15 + 1024 * 0.075 + 567 * 0.60,
            1234 * 0.075 + 567 * 0.30,
        ),
        ("gpt-4.1", "openai", Usage(9999, 1), 9999 * 2.00 + 1 * 8.00, 9999 * 1.00 + 1 * 4.00),
        (  # Anthropic's do
            *("claude-haiku-4-5", "anthropic", Usage(2000, 3000, cached=500, written=400)),
            1100 * 1.00 + 500 * 0.10 + 400 * 1.25 + 3000 * 5.00,
            1100 * 0.50 + 500 * 0.05 + 400 * 0.625 + 3000 * 2.50,
        ),
    ],
)
def test_three_models_cost_what_their_price_lists_say(model, provider, usage, by_hand, by_batch):
    assert price_of(config(model, provider))(usage) == pytest.approx(by_hand / MILLION, abs=1e-9)
    batch = price_of(config(model, provider, batch=True))
    assert batch(usage) == pytest.approx(by_batch / MILLION, abs=1e-9)


def test_own_prices_win_over_the_tables():
    own = {"input": 1, "cached": 0.1, "output": 10, "batch": 0.25}
    usage = Usage(1_000, 100, cached=400)
    by_hand = (600 * 1 + 400 * 0.1 + 100 * 10) / MILLION
    assert price_of(config(prices=own))(usage) == pytest.approx(by_hand)
    assert price_of(config(prices=own, batch=True))(usage) == pytest.approx(by_hand / 4)
    assert price_of(config(prices={"input": 1, "output": 10}))(usage) == pytest.approx(2_000 / MILLION)


def test_an_address_has_the_price_of_its_provider_or_none():
    there = {"base_url": "https://api.deepseek.com/v1"}
    assert price_of(config("deepseek-chat", endpoint=there))(Usage(MILLION, 0)) > 0
    here = {"base_url": "http://localhost:8000/v1"}
    assert price_of(config(endpoint=here)) is None  # gpt-4o-mini by name, and nobody's bill
    with pytest.raises(ConfigError, match="no price is known for gpt-4o-mini"):
        price_of(config(endpoint=here, budget={"usd": 1}))


def test_the_bound_on_tokens_holds_for_every_text():
    for text in ("x", "def f(x):\n    return x" * 20, "Ünïcödé 🙂" * 9, "\x00\x01"):
        bound = most(prompt(text), 10)
        assert bound.input >= len(text.encode()) > 0
        assert bound.output == 10
        assert estimated_tokens(prompt(text)) <= bound.input


def test_a_dry_run_shows_a_dozen_models_side_by_side():
    prompts = [prompt("a" * 350)] * 1000
    table = forecast(prompts, 500, "gpt-4o-mini", price_of(config()))
    names = [name for models in USUAL.values() for name in models]
    assert list(table.index) == ["gpt-4o-mini (this config)", *names]
    assert len(names) >= 12
    assert table["at most"].notna().all()
    by_hand = (1000 * 108 * 0.15 + 1000 * 500 * 0.60) / MILLION
    assert table.loc["gpt-4o-mini", "at most"] == pytest.approx(by_hand)
    assert table.loc["gpt-4o-mini", "at most, by batch"] == pytest.approx(by_hand / 2)
    assert table.loc["gpt-4o-mini", "answers half as long"] == pytest.approx(by_hand - 0.15)
    said = as_text(config(sampling={"max_tokens": 500}), prompts)
    assert "about 108,000 tokens of prompts (characters / 3.5); answers at most 500,000 (500 each)" in said
    assert "$0.32" in said


def test_a_dry_run_counts_harder_variants_and_the_judge():
    prompts = [prompt("a" * 350)] * 10  # 108 tokens each
    judge = {"teacher": {"endpoint": {"model": "gpt-4.1"}}, "sampling": {"max_tokens": 50}}
    seeds = {"seeds": "stdlib", "count": 10, "evolve": 1}
    said = as_text(config(prompts=seeds, judge=judge, sampling={"max_tokens": 500}), prompts)
    assert "with 1 round of harder variants at most 30 requests" in said
    judged = 20 * ((108 + 500 + 200) * 2.00 + 50 * 8.00) / MILLION
    assert f"${judged:,.2f}" in next(line for line in said.splitlines() if "gpt-4.1 (judge)" in line)


def test_a_budget_holds_what_is_under_way_and_waits_for_it():
    async def play():
        budget, order = Budget(1.0), []
        assert await budget.reserve(0.6)

        async def second():
            order.append(await budget.reserve(0.6))

        waiting = asyncio.create_task(second())
        await asyncio.sleep(0)
        assert order == []
        budget.settle(0.6, 0.3)
        await waiting
        assert order == [True]
        budget.settle(0.6, 0.5)
        assert not await budget.reserve(0.6)
        assert await budget.reserve(0.2)
        assert budget.lose(0.2) is False  # 0.8 + 0.2 lost + 0.2 held
        budget.settle(0.2, 0.0)
        return budget.spent

    assert asyncio.run(play()) == pytest.approx(1.0)


def test_without_a_budget_there_is_always_room():
    assert asyncio.run(Budget(None, spent=1e9).reserve(1e9))
