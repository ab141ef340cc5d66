import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import sentences, tiny_model, tiny_tokenizer
from datasets import Dataset

from kdlib.config.run import parse
from kdlib.data.batches import Prepared, collate
from kdlib.evaluation.compare import Candidate, measured
from kdlib.metrics.bootstrap import Bootstrap
from kdlib.models.student import shallower
from kdlib.tasks.base import task_of
from kdlib.tasks.language_modeling import TokenComparison, continuations


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(sentences(200))


@pytest.fixture(scope="module")
def rows(tokenizer):
    return Dataset.from_dict({"input_ids": tokenizer(sentences(30, seed=3))["input_ids"]})


def prepared(rows, tokenizer) -> Prepared:
    return Prepared(rows, rows, {}, partial(collate, pad_id=tokenizer.pad_token_id), len(tokenizer))


@pytest.fixture(scope="module")
def results(rows, tokenizer):
    teacher = tiny_model().eval()
    made, loads = (
        prepared(rows, tokenizer),
        {
            "teacher": lambda: teacher,
            "twin": lambda: tiny_model().eval(),
            "distilled": lambda: shallower(teacher, [0, 3]),
        },
    )
    candidates = {name: Candidate(load) for name, load in loads.items()}
    return measured(TokenComparison(made, tokenizer, resamples=400), made, candidates, "distilled")


def test_the_figures_are_those_of_plain_torch(results, rows, tokenizer):
    student, teacher = shallower(tiny_model(), [0, 3]), tiny_model().eval()
    nats = kl = agree = tokens = size = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        s, t = (
            student(input_ids=ids).logits[0, :-1].log_softmax(-1),
            teacher(input_ids=ids).logits[0, :-1].log_softmax(-1),
        )
        nats -= s[range(len(s)), ids[0, 1:]].sum().item()
        kl += (t.exp() * (t - s)).sum().item()
        agree += (s.argmax(-1) == t.argmax(-1)).sum().item()
        tokens += len(s)
        size += len(tokenizer.decode(ids[0, 1:]).encode())
    found = {
        name: results["models"]["distilled"][name]["value"]
        for name in ("perplexity", "bits_per_byte", "kl_to_teacher", "agreement")
    }
    expected = {
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size,
        "kl_to_teacher": kl / tokens,
        "agreement": agree / tokens,
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert results["tokens"] == tokens


def test_a_twin_of_the_teacher_differs_by_nothing(results):
    twin = results["models"]["twin"]
    assert twin["kl_to_teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert twin["agreement"]["value"] == 1
    for entry in results["differences"]:
        if (entry["model"], entry["against"]) == ("twin", "teacher"):
            assert (entry["value"], entry["low"], entry["high"]) == pytest.approx((0, 0, 0), abs=1e-5)


def test_a_paired_interval_holds_its_value_and_is_narrower_than_the_unpaired(results):
    for entry in results["differences"]:
        assert entry["low"] - 1e-9 <= entry["value"] <= entry["high"] + 1e-9
    paired = next(
        d
        for d in results["differences"]
        if (d["model"], d["against"], d["metric"]) == ("distilled", "teacher", "perplexity")
    )
    widths = [results["models"][m]["perplexity"] for m in ("distilled", "teacher")]
    assert paired["high"] - paired["low"] < sum(w["high"] - w["low"] for w in widths)


def test_the_interval_covers_as_it_says(tokenizer):
    """Rows drawn again and again from one population: the 95 % interval holds the population's mean about
    that often.
    """
    generator, covered = np.random.default_rng(0), 0
    made = prepared(Dataset.from_dict({"input_ids": [[1, 2, 3]] * 60}), tokenizer)
    comparison, draws = TokenComparison(made, tokenizer), Bootstrap(60, 300).times
    for _ in range(200):
        sums = np.stack([generator.normal(2.0, 1.0, 60)] * 4 + [np.ones(60)], axis=1)
        low, high = np.percentile(comparison._figures(sums, draws)["agreement"], [2.5, 97.5])
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_facts_are_measured(results):
    facts = results["models"]["distilled"]
    assert facts["parameters"] < results["models"]["teacher"]["parameters"]
    assert facts["size_on_disk_gib"] == pytest.approx(facts["parameters"] * 4 / 2**30)
    assert facts["forward_tokens_per_s"] > 0


def test_continuations_are_greedy(tokenizer):
    model = tiny_model().eval()
    prompts = [[1, 2, 3], [4, 5, 6]]
    texts = continuations(model, tokenizer, prompts, 3)
    ids = list(prompts[0])
    for _ in range(3):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    assert texts[0] == tokenizer.decode(ids[3:], skip_special_tokens=True)


def test_prompts_have_one_length_and_come_from_all_over(rows, raw_config):
    def prompts(length):
        config = parse(raw_config | {"compare": {"continuations": 3, "prompt_tokens": length}})
        return task_of(config).prompts(config, rows)

    assert [len(prompt) for prompt in prompts(6)] == [6, 6, 6]
    assert len({tuple(prompt) for prompt in prompts(6)}) == 3
    assert prompts(10_000) == []
