"""Predictions of tiny models on a held-out text, and an evil text that nobody should trust."""

from functools import cache, partial
from html.parser import HTMLParser

import numpy as np
from conftest import sentences, tiny_model, tiny_tokenizer
from datasets import Dataset

from kdlib.config.run import parse
from kdlib.data.batches import Prepared, collate
from kdlib.evaluation import predictions as evaluation
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.softening import (
    Predictions,
)
from kdlib.students.depth import shallower
from kdlib.tasks.language_modeling import LanguageModeling

EVIL = [
    "<script>alert(1)</script>",
    "$x^2$",
    "\x07",
    "]]>",
    "</style>",
    '"onmouseover="alert(2)',
    "\u202e",
    "&amp;",
    "a\nb",
]


def softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@cache
def tokenizer():
    return tiny_tokenizer(sentences(200))


@cache
def rows():
    return [{"input_ids": ids} for ids in tokenizer()(sentences(6, seed=3))["input_ids"]]


@cache
def models():
    teacher, baseline = tiny_model().eval(), tiny_model(seed=5).eval()
    return {"teacher": teacher, "distilled": shallower(teacher, [0, 3]), "baseline": baseline}


@cache
def predictions() -> Predictions:
    """Of a teacher, a student and a baseline, on 40 tokens."""
    gathered = partial(collate, pad_id=tokenizer().pad_token_id)
    made = Prepared(Dataset.from_list(rows()), Dataset.from_list(rows()), {}, gathered, len(tokenizer()))
    loads = {name: lambda m=model: LiveTeacher(m, len(tokenizer())) for name, model in models().items()}
    return evaluation.look(loads, LanguageModeling().sample(made, tokenizer(), tokens=40), "token")


@cache
def facts():
    """As explorers.json has them."""
    raw = {
        "teacher": {"model": "x"},
        "student": {"from": "teacher", "layers": 2},
        "data": {"source": "x"},
        "training": {},
        "loss": {"weights": {"kd": 1.0}, "temperature": 2.5, "top_k": 16},
    }
    return evaluation.summary(predictions(), parse(raw))


class Page(HTMLParser):
    """Its tags, its attributes, and what stands in `code` and `pre`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.code, self.depth = [], [], "", 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        self.depth += tag in ("code", "pre")

    def handle_endtag(self, tag):
        self.depth -= tag in ("code", "pre")

    def handle_data(self, data):
        self.code += data * bool(self.depth)


def evil_facts():
    """Three tokens for each evil text: as a token, as a candidate, and before one."""
    count = len(EVIL)
    top = [[[text, 0.5], ["b", 0.25]] for text in EVIL]
    said = {"ce": [1.0 + n for n in range(count)], "top": top}
    against = {"kl": [0.1 * n for n in range(count)], "agrees": [n % 2 == 0 for n in range(count)]}
    return {
        **{name: facts()[name] for name in ("softening", "temperature", "top_k")},
        "tokens": [{"text": text, "before": text} for text in EVIL],
        "teacher": said,
        "students": {"distilled": said | against},
    }
