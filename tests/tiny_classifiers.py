"""Tiny classifiers of four classes with tokenizers of their own, and rows for them."""

import json
from pathlib import Path

import torch
from conftest import sentences, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

LABELS = ("music", "politics", "science", "sport")
SIGNS = {"music": "again", "politics": "says", "science": "sees", "sport": "back"}


def rows(count: int = 160) -> list[dict[str, str]]:
    """Texts, and the class whose word was put at their beginning."""
    texts = sentences(count, seed=7)
    return [
        {"text": f"{SIGNS[LABELS[i % 4]]} {text}", "label": LABELS[i % 4]} for i, text in enumerate(texts)
    ]


def rows_file(folder: Path, count: int = 160) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def bert(folder: Path, *, labels=LABELS, layers: int = 2, seed: int = 0, size: int = 300) -> Path:
    """An encoder, with a tokenizer of so many tokens."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.4,
        **_names(labels),
    )
    return _saved(BertForSequenceClassification(config), folder, size)


def llama(folder: Path, *, labels=LABELS, layers: int = 2, seed: int = 0, size: int = 280) -> Path:
    """A decoder, likewise."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
        initializer_range=0.4,
        **_names(labels),
    )
    return _saved(LlamaForSequenceClassification(config), folder, size)


def _names(labels) -> dict:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _saved(model, folder: Path, size: int) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(sentences(200), size).save_pretrained(folder)
    return folder


def raw_config(teacher: Path, student: Path, source: Path) -> dict:
    """A complete tiny experiment as plain data."""
    return {
        "task": "sequence-classification",
        "teacher": {"model": str(teacher)},
        "student": {"from": str(student)},
        "data": {"source": str(source), "validation": 0.25, "test": 0.25, "max_length": 24},
        "loss": {"temperature": 2.0, "weights": {"kd": 0.7, "ce": 0.3}},
        "baseline": {"weights": {"ce": 1.0}},
        "precision": "float32",
        "training": {
            "max_steps": 12,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "use_cpu": True,
        },
        "compare": {"resamples": 100},
    }
