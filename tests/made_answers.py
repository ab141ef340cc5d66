"""What a comparison of classifiers leaves, made without models."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdlib.metrics.classification import Answers
from kdlib.metrics.paired import results_of, worst_rows

CLASSES = (
    "Company",
    "Educational institution",
    "Artist",
    "Athlete",
    "Office holder",
    "Mean of transportation",
    "Building",
    # DBpedia's fourteen
    "Natural place",
    "Village",
    "Animal",
    "Plant",
    "Album",
    "Film",
    "Written work",
)
COSTS = {
    "parameters": 10**6,
    "size_on_disk_gib": 0.004,
    "latency_ms": {"value": 2.5, "low": 2.4, "high": 2.9},
    "throughput_rows_per_s": {"value": 1234.0, "low": 1200.0, "high": 1240.0},
    "peak_memory_gib": 0.2,
}


def leaning(labels: np.ndarray, classes: int, *, seed: int, skill: float) -> Answers:
    """Answers of a model that leans to the right class."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), classes)) + skill * np.eye(classes)[labels]
    probabilities = np.exp(1.5 * logits)
    return Answers(probabilities / probabilities.sum(axis=1, keepdims=True), labels)


def results(
    count: int = 400, classes: Sequence[str] = CLASSES, text: str = "a text", resamples: int = 100
) -> dict[str, Any]:
    """Teacher, untrained student, baseline and distilled student as classifiers."""
    labels = np.random.default_rng(0).integers(len(classes), size=count)
    skills = {"teacher": 4.0, "untrained": 0.0, "baseline": 2.8, "distilled": 3.3}
    models = {
        name: leaning(labels, len(classes), seed=seed, skill=skill)
        for seed, (name, skill) in enumerate(skills.items())
    }
    found = results_of(models, classes, resamples=resamples)
    shown = {name: answers for name, answers in models.items() if name != "untrained"}
    return {
        **found,
        "task": "sequence-classification",
        "student": "distilled",
        "split": "test",
        "rule": "best_model/ of each student",
        "models": {name: {**facts, **COSTS} for name, facts in found["models"].items()},
        "batch_rows": 32,
        "precision": "float32",
        "worst": worst_rows(shown, "distilled", [f"{text} {i}" for i in range(count)], [classes] * count),
    }
