"""Tiny classifiers with tokenizers of their own, as local folders of the form that a hub gives, and rows
of three classes.
"""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from conftest import tiny_tokenizer
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from kdlib.data.batches import Prepared, collate_classes
from kdlib.metrics.classification import class_figures
from kdlib.models.loading import load_tokenizer

LABELS = ("tools", "animals", "weather")
WORDS = {
    "tools": ["hammer", "saw", "drill", "nail", "file"],
    "animals": ["dog", "cat", "cow", "fish", "owl"],
    "weather": ["rain", "snow", "wind", "sun", "fog"],
}
COMMON = ["the", "a", "is", "was", "here", "and", "not", "very", "old", "new"]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": (
        LlamaForSequenceClassification,
        lambda **options: LlamaConfig(num_key_value_heads=2, **SMALL, **options),
    ),
    "qwen2": (
        Qwen2ForSequenceClassification,
        lambda **options: Qwen2Config(num_key_value_heads=2, **SMALL, **options),
    ),
    "gpt2": (
        GPT2ForSequenceClassification,
        lambda **options: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **options),
    ),
    "bert": (BertForSequenceClassification, lambda **options: BertConfig(**SMALL, **options)),
}


def texts(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Texts of different lengths that a few words give away, and their classes' numbers."""
    generator, found = random.Random(seed), []
    for number in range(count):
        words = generator.choices(COMMON, k=generator.randint(2, 12))
        label = generator.randrange(len(LABELS))
        words[generator.randrange(len(words))] = generator.choice(WORDS[LABELS[label]])
        found.append((f"{' '.join(words)} {number}", label))
    return found


def tokenizer_of(size: int) -> PreTrainedTokenizerBase:
    """One of at most so many tokens: another size reads otherwise."""
    return tiny_tokenizer([text for text, _ in texts(300, seed=9)], size)


def classifier(
    folder: Path,
    kind: str = "llama",
    *,
    labels: Sequence[str] | None = LABELS,
    tokens: int = 300,
    seed: int = 0,
    pad: int | None = 0,
) -> str:
    """A classifier with random weights, saved with its tokenizer; its outputs in the order of `labels`,
    unnamed where None.
    """
    torch.manual_seed(seed)
    tokenizer, (model, config) = tokenizer_of(tokens), KINDS[kind]
    names = (
        {}
        if labels is None
        else {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    )
    options = names or {"num_labels": len(LABELS)}
    made = model(
        config(vocab_size=len(tokenizer), pad_token_id=pad, eos_token_id=0, bos_token_id=0, **options)
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def permuted(source: str, folder: Path, order: Sequence[int]) -> str:
    """The same classifier with its outputs, and their names, in another order."""
    model = AutoModelForSequenceClassification.from_pretrained(source)
    names = [model.config.id2label[number] for number in order]
    with torch.no_grad():
        model.score.weight.copy_(model.score.weight[list(order)].clone())
    model.config.id2label, model.config.label2id = (
        dict(enumerate(names)),
        {name: i for i, name in enumerate(names)},
    )
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return str(folder)


def source(folder: Path, count: int = 240, seed: int = 3) -> str:
    """Texts with their classes by name, as JSON lines."""
    file = folder / "texts.jsonl"
    file.write_text(
        "".join(
            json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in texts(count, seed)
        )
    )
    return str(file)


def taught(folder: Path, kind: str = "bert", *, steps: int = 60, **options) -> str:
    """A classifier that has learned these texts."""
    place = classifier(folder, kind, **options)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(place), load_tokenizer(place)
    rows = [
        {"input_ids": tokenizer(text)["input_ids"], "label": model.config.label2id[LABELS[label]]}
        for text, label in texts(320, 4)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = collate_classes(
            [rows[(32 * step + i) % len(rows)] for i in range(32)], pad_id=0, teacher_pad_id=0
        )
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    return place


def prepared_rows(
    student: str, teacher: str | None = None, *, count: int = 48, held_out: int = 24
) -> Prepared:
    """Rows for a student, and for a teacher that reads otherwise where one is named, made by hand."""
    ours, theirs = load_tokenizer(student), teacher and load_tokenizer(teacher)

    def rows(seed: int, number: int) -> Dataset:
        found = []
        for text, label in texts(number, seed):
            row = {"input_ids": ours(text)["input_ids"], "label": label}
            found.append(row | ({"teacher_input_ids": theirs(text)["input_ids"]} if theirs else {}))
        return Dataset.from_list(found)

    pads = {
        "pad_id": ours.pad_token_id,
        "teacher_pad_id": theirs.pad_token_id if theirs else ours.pad_token_id,
    }
    made = partial(collate_classes, **pads)
    held = rows(2, held_out)
    return Prepared(rows(1, count), held, {}, made, len(LABELS), LABELS, figures=class_figures)


def classification(teacher: str, student: str, **training) -> dict:
    """A complete tiny classification as plain data; its rows are made by hand, so its source is not read."""
    return {
        "task": "sequence-classification",
        "teacher": {"model": teacher},
        "student": {"from": student},
        "data": {"source": "made-by-hand.jsonl", "max_length": 32},
        "loss": {"temperature": 2.0, "weights": {"kd": 0.7, "ce": 0.3}},
        "precision": "float32",
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
            **training,
        },
    }
