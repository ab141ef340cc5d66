import gc
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import other_tokens, sentences, tiny_experiment, tiny_model, tiny_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kdlib.config.run import parse
from kdlib.data.batches import Prepared, collate
from kdlib.data.text import bytes_of_tokens
from kdlib.evaluation.compare import Candidate, measured
from kdlib.models.loading import load_model
from kdlib.reports.run import render_comparison
from kdlib.students.depth import shallower
from kdlib.students.student import tokenizer_of
from kdlib.tasks.base import asked, prepare, task_of
from kdlib.tasks.rows import spread
from kdlib.tasks.token_comparison import COLUMNS, TokenComparison, continuations


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
        size += len(tokenizer.decode(ids[0]).encode()) - len(tokenizer.decode(ids[0, :1]).encode())
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


def compared(rows, tokenizer, resamples=400, **loads):
    made, loads = prepared(rows, tokenizer), {"teacher": lambda: tiny_model().eval(), **loads}
    candidates = {name: Candidate(load) for name, load in loads.items()}
    return measured(TokenComparison(made, tokenizer, resamples=resamples), made, candidates, [*loads][-1])


def test_documents_are_resampled_and_each_token_counts_for_its_own(rows, tokenizer):
    """Ten documents of three blocks each, the middle one of which begins with the end of the first."""
    ids = [row["input_ids"][:12] for row in rows]
    whole = Dataset.from_dict({"input_ids": ids, "documents": [[0, n // 3] for n in range(30)]})
    shared = [
        [0, n // 3 * 2, 5, n // 3 * 2 + 1] if n % 3 == 1 else [0, n // 3 * 2 + n % 3 // 2] for n in range(30)
    ]
    packed = Dataset.from_dict({"input_ids": ids, "documents": shared})
    blocks, documents, halves = (
        compared(each, tokenizer) for each in (whole.remove_columns("documents"), whole, packed)
    )
    assert [each["units"] for each in (blocks, documents, halves)] == [30, 10, 20]
    assert documents["interval"] == (
        "95 %, paired bootstrap over 10 documents, which are few: below 20 it is rough"
    )
    for found in (documents, halves):
        facts, others = found["models"]["teacher"], blocks["models"]["teacher"]
        for name in ("perplexity", "bits_per_byte"):
            assert facts[name]["value"] == pytest.approx(others[name]["value"])
        assert found["tokens"] == blocks["tokens"]
    comparison = TokenComparison(prepared(packed, tokenizer), tokenizer)
    comparison.beside_teacher("teacher", asked(tiny_model(), comparison.prepared))
    # of the blocks 0, 1, 2 the second's tokens 1 to 4 are the first's; a row's first is not predicted
    assert comparison.sums["teacher"][:2, COLUMNS.index("tokens")].tolist() == [11 + 4, 7 + 11]


def test_each_source_of_a_mix_has_the_figures_of_its_own_rows(rows, tokenizer, tmp_path):
    of = [int(n % 3 == 0) for n in range(len(rows))]
    mix = [{"source": name, "weight": 1.0, "share": 0.5} for name in ("a.jsonl", "b.jsonl")]
    made = replace(prepared(rows.add_column("source", of), tokenizer), notes={"mix": mix})
    loads = {"teacher": lambda: tiny_model().eval(), "distilled": lambda: shallower(tiny_model(), [0, 3])}
    candidates = {name: Candidate(load) for name, load in loads.items()}
    results = measured(TokenComparison(made, tokenizer, resamples=400), made, candidates, "distilled")
    for number, part in enumerate(results["mix"]):
        its = rows.select([n for n, source in enumerate(of) if source == number])
        alone = compared(its, tokenizer, distilled=loads["distilled"])
        assert part["units"] == len(its)
        for name, facts in part["models"].items():
            for measure, figures in facts.items():
                assert figures == pytest.approx(alone["models"][name][measure], rel=1e-5, abs=1e-9)
    results |= {"task": "causal-lm", "precision": "float32", "sources": {}}
    page = render_comparison(results, tmp_path).read_text()
    assert "By source" in page
    told = "b.jsonl: 50.0% of the training rows (weight 1); 10 units held out"
    assert page.count(f'<th rowspan="2" valign="top">{told}</th>') == 1  # beside both its models


def test_blocks_that_are_alike_within_a_document_make_no_narrower_interval(rows, tokenizer):
    """Each block three times over: three times as many blocks, and as sure as before."""
    ids = [row["input_ids"][:12] for row in rows]
    once = Dataset.from_dict({"input_ids": ids, "documents": [[0, n] for n in range(30)]})
    thrice = Dataset.from_dict({"input_ids": ids * 3, "documents": [[0, n] for n in range(30)] * 3})
    widths = []
    for each in (once, thrice):
        facts = compared(each, tokenizer)["models"]["teacher"]["perplexity"]
        widths.append(facts["high"] - facts["low"])
    assert widths[0] == pytest.approx(widths[1])


def test_one_text_has_blocks_as_units_and_says_that_they_are_not_independent(rows, tokenizer):
    one = Dataset.from_dict({"input_ids": rows["input_ids"][:], "documents": [[0, 7]] * 30})
    found = compared(one, tokenizer)
    assert found["units"] == 30
    assert "30 blocks of one text, as if independent: rather too narrow" in found["interval"]


def test_one_block_has_no_interval_but_all_that_can_be_and_still_a_page(rows, tokenizer, tmp_path):
    found = compared(rows.select([0]), tokenizer, distilled=lambda: shallower(tiny_model(), [0, 3]))
    facts = found["models"]["distilled"]
    assert (facts["agreement"]["low"], facts["agreement"]["high"]) == (0, 1)
    assert (facts["perplexity"]["low"], facts["perplexity"]["high"]) == (1, math.inf)
    assert all(each["low"] <= 0 <= each["high"] for each in found["differences"])
    render_comparison({**found, "task": "causal-lm", "rule": "here", "sources": {}}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "of which no interval can be told" in page
    assert "Few units were measured" in page


def test_of_the_teacher_no_more_is_kept_than_one_batch(rows, tokenizer):
    made = prepared(rows, tokenizer)
    comparison, teacher = TokenComparison(made, tokenizer), asked(tiny_model(), made)
    of_before = tensors_alive()
    known = {id(tensor) for tensor in of_before}
    comparison.add("teacher", teacher, made)
    comparison.beside_teacher("teacher", teacher)
    kept = [each for each in tensors_alive() if id(each) not in known]
    wide = [each for each in kept if each.ndim == 2 and each.shape[-1] in (32, 300)]
    one_batch = 8 * max(len(row["input_ids"]) for row in rows) * 32 * 4
    assert sum(each.numel() * each.element_size() for each in wide) <= one_batch


def tensors_alive() -> list:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is torch.Tensor]


@pytest.mark.parametrize("length", [7, 10, 16, 33])
def test_bytes_of_a_character_that_a_block_divides_are_counted_once(tokenizer, length):
    text = "蒸馏让小模型向大模型学习。Naïve café: 模型越小，越要好老师。" * 20
    ids = np.array(tokenizer(text)["input_ids"])
    assert len(ids) > 2 * len(text)  # a character is made of several tokens
    assert bytes_of_tokens(ids, tokenizer).sum() == len(text.encode())
    made = Dataset.from_dict({"input_ids": [ids[n : n + length] for n in range(0, len(ids) - 1, length)]})
    comparison = TokenComparison(prepared(made, tokenizer), tokenizer)
    predicted = np.concatenate([np.array(row["input_ids"][1:]) for row in made])
    first = sum(bytes_of_tokens(np.array([row["input_ids"][0]]), tokenizer).sum() for row in made)
    comparison.beside_teacher("teacher", asked(tiny_model(), comparison.prepared))
    found = comparison.sums["teacher"][:, COLUMNS.index("bytes")].sum()
    assert found == bytes_of_tokens(predicted, tokenizer).sum()
    assert found + first == bytes_of_tokens(ids[: sum(map(len, made["input_ids"]))], tokenizer).sum()


def test_bytes_of_tokens_that_are_written_out_are_bytes():
    """As vocabularies by SentencePiece have them: a space before a word, and bytes as <0xE8>."""
    words = ["<unk>", "▁a", "▁stone", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    made = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    ids = tokenizer.convert_tokens_to_ids(["▁a", "▁stone", "s", "<0xE8>", "<0x92>", "<0xB8>", "<unk>"])
    assert bytes_of_tokens(np.array(ids), tokenizer).tolist() == [2, 6, 1, 1, 1, 1, 0]


def test_facts_are_measured(results):
    facts = results["models"]["distilled"]
    assert facts["parameters"] < results["models"]["teacher"]["parameters"]
    assert facts["size_on_disk_gib"] == pytest.approx(facts["parameters"] * 4 / 2**30)
    speed = facts["forward_tokens_per_s"]
    assert 0 < speed["low"] <= speed["value"] <= speed["high"]


def test_continuations_are_greedy(tokenizer):
    model = tiny_model().eval()
    prompts = [[1, 2, 3], [4, 5, 6]]
    texts = continuations(model, tokenizer, prompts, 3)
    ids = list(prompts[0])
    for _ in range(3):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    assert texts[0] == tokenizer.decode(ids[3:], skip_special_tokens=True)


def test_prompts_have_one_length_and_come_from_all_over(rows, raw_config):
    def prompts(length, count=3):
        config = parse(raw_config | {"compare": {"continuations": count, "prompt_tokens": length}})
        return task_of(config).prompts(config, rows)

    assert [len(prompt) for prompt in prompts(6)] == [6, 6, 6]
    assert len({tuple(prompt) for prompt in prompts(6)}) == 3
    assert prompts(10_000) == [ids[: -(-len(ids) // 2)] for ids in spread(rows["input_ids"], 3)]
    assert prompts(6, count=0) == []


def test_prompts_of_several_lengths_are_continued_one_by_one(tokenizer):
    model, prompts = tiny_model().eval(), [[1], [4, 5, 6]]
    alone = [continuations(model, tokenizer, [prompt], 3)[0] for prompt in prompts]
    assert continuations(model, tokenizer, prompts, 3) == alone


def test_models_of_two_tokenizers_are_measured_on_the_same_bytes(teacher_folder, tmp_path):
    """By hand, row by row: the nats of each model's tokens over the bytes of the spans."""
    raw = tiny_experiment(teacher_folder, tmp_path)
    raw |= {"student": {"from": other_tokens(tmp_path / "student")}, "loss": {"weights": {"span_kl": 1.0}}}
    raw["data"] |= {"packing": False, "max_length": 40}
    config = parse(raw)
    tokenizer = tokenizer_of(config)
    made = prepare(config, tokenizer)
    models = {
        name: load_model(str(raw[name][key])) for name, key in (("teacher", "model"), ("student", "from"))
    }
    candidates = {name: Candidate(lambda model=model: model) for name, model in models.items()}
    comparison = task_of(config).comparison(config, made, tokenizer, resamples=100)
    found = measured(comparison, made, candidates, "student")["models"]
    size, nats = 0, dict.fromkeys(models, 0.0)
    for row in made.measured:
        ids = {"student": row["input_ids"], "teacher": row["teacher_input_ids"]}
        ends = np.array(row["spans"]).reshape(-1, 2)
        firsts = np.vstack([[0, 0], ends[:-1]])
        learned = (firsts > 0).all(1) & (ends > firsts).all(1)
        for side, (name, tokens) in enumerate(ids.items()):
            said = (
                models[name](input_ids=torch.tensor([tokens]))
                .logits[0, :, : [280, 300][side]]
                .log_softmax(-1)
            )
            spans = zip(firsts[learned, side], ends[learned, side], strict=True)
            places = [n for start, end in spans for n in range(start, end)]
            nats[name] -= sum(float(said[n - 1, tokens[n]]) for n in places)
            size += bytes_of_tokens(np.array(tokens)[places], tokenizer).sum() if name == "student" else 0
    for name in models:
        by_hand = nats[name] / math.log(2) / size
        assert found[name]["bits_per_byte"]["value"] == pytest.approx(by_hand, rel=1e-5)
    assert "perplexity" not in found["teacher"]
    assert found["teacher"]["agreement"]["value"] == 1
    assert len(comparison.samples["teacher"]) == config.compare.continuations
