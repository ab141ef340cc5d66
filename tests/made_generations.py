"""Runs of `kd generate` against the made teacher, for several files of tests."""

import json
from dataclasses import dataclass
from pathlib import Path

from kdlib.config.run import parse
from kdlib.generation import run as generation
from kdlib.generation.config import GenerationConfig
from kdlib.runs import folder as runs

KEY = "planted-key-0123456789abcdef"
PRICES = {"input": 3, "output": 15}
LIMITS = {"retries": 2, "timeout": 1.0}


@dataclass
class Generations:
    """Configs for the made teacher, and their runs, all in one folder."""

    folder: Path
    url: str

    @property
    def root(self):
        return self.folder / "runs"

    def config(self, texts, provider="openai", **sections):
        rows = [{"prompt": text, "category": "function", "seed": f"s{n}"} for n, text in enumerate(texts)]
        path = self.folder / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        address = self.url + ("/v1" if provider == "openai" else "")
        endpoint = {"provider": provider, "model": "tiny-teacher", "base_url": address}
        raw = {
            "teacher": {"endpoint": {**endpoint, "key_variable": "MADE_API_KEY"}},
            "prompts": {"from": str(path)},
            "limits": LIMITS,
            "sampling": {"max_tokens": 200},
            "prices": PRICES,
            **sections,
        }
        return parse(raw, kind=GenerationConfig)

    def run(self, config, name="made"):
        return generation.created(self.root, name, config, generation.prompts_of(config))


def asked(run, config, **options):
    with runs.working(run):
        return generation.generate(run, config, **options)


def rows_in(run, name):
    return [json.loads(line) for line in (run.path / f"{name}.jsonl").read_text().splitlines()]


def dollars(made, tokens=PRICES):
    """What the endpoint would bill: whatever it sent whole."""
    bill = 0.0
    for prompt, times in made.paid.items():
        read, written = made.usage(prompt, made.said(prompt, "empty" if "[empty" in prompt else ""))
        bill += times * (read * tokens["input"] + written * tokens["output"]) / 1e6
    return bill
