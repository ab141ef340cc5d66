"""Which experts speak: shares by hand, kept tokens alone, kinds of text beyond chance, figures with it."""

import json
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import other_tokens
from test_training_router import KINDS, SIZES

from kdlib.config.run import parse
from kdlib.data.kinds import CODE, PROSE, is_code, kinds_of
from kdlib.errors import RunError
from kdlib.evaluation.ablation import reason, teacher_flops
from kdlib.losses.signals import kept
from kdlib.metrics.loads import Counted, told_apart
from kdlib.models.teacher import LiveTeacher
from kdlib.routing import use
from kdlib.routing.experts import AllExperts, routers_of
from kdlib.routing.figures import expert_figures, save
from kdlib.routing.student_aware import StudentAware
from kdlib.routing.tables import expert_tables, routing_table
from kdlib.sources.built_in import python_docs
from kdlib.students.student import tokenizer_of
from kdlib.tasks import base as tasks

KINDS_OF_TEXT = ["student", "teacher"]  # tokens of the tiny tokenizer


def moe(kind="qwen3_moe", vocabulary=300, **settings):
    torch.manual_seed(0)
    model, config, own = KINDS[kind]
    return model(config(**{**SIZES, **own, "vocab_size": vocabulary, "initializer_range": 0.5, **settings}))


def prepared_of(raw_config, **data):
    config = parse({**raw_config, "data": {**raw_config["data"], **data}})
    tokenizer = tokenizer_of(config)
    return tasks.prepare(config, tokenizer), tokenizer


def asked(model, prepared):
    return LiveTeacher(model, prepared.teacher_vocabulary, "", None, prepared.vocabularies)


@pytest.fixture
def looked(raw_config):
    prepared, tokenizer = prepared_of(raw_config)
    return use.look(asked(moe(), prepared), prepared, tokenizer, resamples=200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_that_finds_all_alike_asks_its_first_experts_half_and_half(kind, raw_config):
    prepared, tokenizer = prepared_of(raw_config)
    model = moe(kind, norm_topk_prob=False)
    for router in routers_of(model).values():
        torch.nn.init.zeros_(router.weight)
    found = use.look(asked(model, prepared), prepared, tokenizer)
    (routing,) = found["routings"].values()
    # torch's top-k takes some two of equals, the same for every token
    assert np.sort(routing["load"], axis=1).tolist() == [[0, 0, 0.5, 0.5]] * 2
    assert routing["entropy"] == pytest.approx([np.log(2)] * 2, abs=1e-6)
    assert (routing["coverage"], routing["max_load"]) == (0.5, pytest.approx(2.0))
    assert (found["experts"], found["asked"], len(found["layers"])) == (4, 2, 2)
    json.dumps(found, allow_nan=False)


def test_padding_and_the_last_token_of_a_row_do_not_count(raw_config, monkeypatch):
    prepared, tokenizer = prepared_of(raw_config, packing=False)
    teacher = asked(moe(), prepared)
    found = use.look(teacher, prepared, tokenizer)
    monkeypatch.setattr(use, "BATCH", 1)  # no padding
    alone = use.look(teacher, prepared, tokenizer)
    rows = [prepared.collate([row])["labels"] for row in prepared.measured]
    assert found["tokens"] == alone["tokens"] == sum(len(kept(labels).targets) for labels in rows)
    for name in ("load", "entropy"):
        both = [each["routings"][use.ORIGINAL][name] for each in (found, alone)]
        np.testing.assert_allclose(*both, atol=1e-5)


def test_a_given_prompt_does_not_count(raw_config):
    prepared, tokenizer = prepared_of(raw_config)
    teacher, rows = asked(moe(), prepared), prepared.measured
    given = rows.add_column("prompt_tokens", [10] * len(rows))
    units, kinds = 2 * [[np.zeros(16, int) for _ in range(len(rows))]]
    whole, part = (use.counted(teacher, prepared, each, units, kinds, 1) for each in (rows, given))
    assert (whole.tokens.sum(), part.tokens.sum()) == (15 * len(rows), 6 * len(rows))
    assert part.loads()[0].sum(-1) == pytest.approx(np.ones(2))


def test_shares_add_up_however_a_router_scales_its_weights(raw_config):
    prepared, tokenizer = prepared_of(raw_config)
    found = use.look(asked(moe(norm_topk_prob=False), prepared), prepared, tokenizer)
    again = use.look(asked(moe(norm_topk_prob=True), prepared), prepared, tokenizer)
    first, other = (each["routings"][use.ORIGINAL]["load"][0] for each in (found, again))
    assert sum(first) == pytest.approx(1, abs=1e-5)
    assert first == pytest.approx(other, abs=1e-4)  # of the first layer, whose input is the same
    for weights in found["text"]["weights"][use.ORIGINAL]:
        assert sum(weights) == pytest.approx(1, abs=1e-5)
        assert sum(weight > 0 for weight in weights) == 2


def test_a_teacher_that_reads_other_tokens_is_counted_on_its_own(raw_config, tmp_path):
    raw_config["student"] = {"from": other_tokens(tmp_path / "other")}
    raw_config["loss"]["weights"] = {"span_kl": 0.7, "ce": 0.3}
    prepared, tokenizer = prepared_of(raw_config)
    model = moe(vocabulary=320)
    teacher = tasks.teacher_of(model, prepared)
    found = use.look(teacher, prepared, tokenizer)
    batch = prepared.collate(list(prepared.measured))
    assert found["tokens"] == int(batch["spans"]["teacher_sizes"].sum())
    assert len(found["text"]["tokens"]) == len(found["text"]["weights"][use.ORIGINAL])


def test_a_dense_teacher_has_nothing_to_show(raw_config):
    prepared, tokenizer = prepared_of(raw_config)
    teacher = tasks.load_teacher(parse(raw_config), prepared)
    assert use.look(teacher, prepared, tokenizer) == {}
    assert expert_figures({}) == expert_tables({}) == {}
    assert len(routing_table({})) == 0


def made(apart, units=40, tokens=30, seed=0):
    """Of units with two kinds, whose experts' shares are so far apart; one layer, four experts."""
    generator = np.random.default_rng(seed)
    rates = np.array([[0.25 + apart, 0.25 - apart, 0.25, 0.25], [0.25 - apart, 0.25 + apart, 0.25, 0.25]])
    shares = np.array([[generator.multinomial(tokens, rate) for rate in rates] for _ in range(units)])
    counts = np.full((units, 2), tokens)
    return Counted(shares[:, :, None].astype(float), np.zeros((units, 2, 1)), counts, shares.sum((0, 1)))


def test_kinds_that_ask_other_experts_are_told_from_chance():
    (pair,) = told_apart(made(0.15), ["a", "b"], resamples=500, seed=0)["apart"]
    assert pair["low"] <= 0.3 <= pair["high"]
    assert 0 < pair["chance"] < pair["low"]
    (pair,) = told_apart(made(0.0), ["a", "b"], resamples=500, seed=0)["apart"]
    assert 0 < pair["value"] < 1.3 * pair["chance"]  # above 0, as by chance


def test_a_kind_of_which_there_is_nothing_is_not_compared():
    found = made(0.1)
    found.tokens[:, 1] = 0
    assert told_apart(found, ["a", "b"], resamples=100, seed=0) == {}


def test_lines_of_code_are_told_from_prose():
    code = [">>> total", "    return self.items[key]", 'x = {"a": 1}', "for i in range(10):"]
    prose = [
        "The quick brown fox (it is said) jumps over the lazy dog.",
        "",
        "   * an item of a list",
        "Notes:",
    ]
    assert all(map(is_code, code))
    assert not any(map(is_code, prose))


def test_tokens_are_of_the_kind_of_the_line_that_they_begin_in(raw_config):
    prepared, tokenizer = prepared_of(raw_config)
    text = "the student learns\nx = f(a)[0]\nwhat it sees"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    rows = prepared.measured.from_dict({"input_ids": [ids]})
    (kinds,), names, _ = kinds_of(rows, prepared, tokenizer)
    said = {kind: tokenizer.decode([i for i, k in zip(ids, kinds, strict=True) if names[k] == kind])
            for kind in (CODE, PROSE)}  # fmt: skip
    assert said[CODE].strip() == "x = f(a)[0]"
    assert said[PROSE].startswith("the student learns\n")
    grouped = rows.from_dict({"input_ids": [ids, ids[:3]], "group": ["b", "a"]})
    kinds, names, how = kinds_of(grouped, prepared, tokenizer)
    assert (names, how, [each.tolist() for each in kinds]) == (["a", "b"], "group", [[1] * len(ids), [0] * 3])


def test_a_column_of_the_source_says_of_which_kind_a_document_is(raw_config, tmp_path):
    lines = [
        {"text": f"the {kind} {i} {'learns again ' * 9}", "kind": kind}
        for i in range(20)
        for kind in KINDS_OF_TEXT
    ]
    (tmp_path / "kinds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    raw_config["data"] |= {"source": str(tmp_path / "kinds.jsonl"), "validation": 0.4}
    for packing in (True, False):
        config = parse({**raw_config, "data": {**raw_config["data"], "packing": packing}})
        tokenizer = tokenizer_of(config)
        prepared = tasks.prepare(config, tokenizer)
        kinds, names, how = kinds_of(prepared.measured, prepared, tokenizer, config)
        assert (names, how) == (KINDS_OF_TEXT, "the kind of each document")
        seen = 0
        for row, found in zip(prepared.measured["input_ids"], kinds, strict=True):
            for token, kind in zip(row, found, strict=True):
                if (said := tokenizer.decode([token]).strip()) in KINDS_OF_TEXT:
                    assert said == names[kind]
                    seen += 1
        assert seen >= 3


def test_the_reference_of_python_has_both_kinds():
    lines = [line for text in python_docs()["text"] for line in text.split("\n") if line.strip()]
    assert 0.1 < np.mean([is_code(line) for line in lines]) < 0.4


def test_figures_have_titles_with_the_finding_and_a_table_each(looked, tmp_path):
    other = {**looked["routings"][use.ORIGINAL], "load": [[0.25] * 4] * 2}
    both = {**looked, "routings": {**looked["routings"], "student-aware": other}}
    weights = both["text"]["weights"]
    both["text"]["weights"] = {**weights, "student-aware": weights[use.ORIGINAL]}
    both["kinds"] = told_apart(made(0.1), ["code", "prose"], resamples=100, seed=0)
    figures, tables = expert_figures(both), expert_tables(both)
    assert list(figures) == list(tables)
    assert len(figures) == 4
    titles = {name: figure.get_suptitle() for name, figure in figures.items()}
    load = np.array(looked["routings"][use.ORIGINAL]["load"])
    assert f"{4 * load.max():.2g} times an even load" in titles["experts_by_layer"]
    assert titles["experts_by_kind"].startswith("Code and prose ask other experts:")
    moved = 100 * np.abs(load - 0.25).sum(1).mean() / 2
    assert f"{moved:.3g} % of the load moved" in titles["experts_moved"]
    assert "speaks most on this text" in titles["experts_by_token"]
    save(tmp_path / "experts", both)
    assert {path.suffix for path in (tmp_path / "experts").iterdir()} == {".png", ".csv"}
    assert list(routing_table(both).index) == [use.ORIGINAL, "student-aware"]


def test_how_far_another_routing_moves_the_teacher_is_the_kl_between_the_two(raw_config):
    prepared, tokenizer = prepared_of(raw_config)
    model = moe()
    asking = {use.ORIGINAL: nullcontext, "all experts": AllExperts(model).asked}
    found = use.look(asked(model, prepared), prepared, tokenizer, asking, resamples=100)
    rows = prepared.measured.select(range(0, len(prepared.measured), -(-len(prepared.measured) // use.BATCH)))
    batch = prepared.collate([*rows])
    logs, tokens = [], kept(batch["labels"])
    for count in (2, 4):
        for router in routers_of(model).values():
            router.top_k = count
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logs.append(tokens.select(logits)[:, : prepared.vocabulary].log_softmax(-1))
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert found["routings"]["all experts"]["moved_by"] == pytest.approx(expected.item(), rel=1e-4)
    assert expected > 1e-3
    assert "moved_by" not in found["routings"][use.ORIGINAL]
    assert reason(found, 3.72).endswith("(KL) from itself, and plain top-k's student 3.72")
    assert reason({}, 3.72) == ""


def test_figures_and_tables_load_no_torch():
    code = "import sys, kdlib.routing.figures; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("experts", ["topk", "all", {"augment": 2}])
def test_the_routing_in_which_it_taught_stands_beside_its_own(raw_config, tmp_path, experts):
    prepared, tokenizer = prepared_of(raw_config)
    teacher = asked(moe(), prepared)
    found = use.look(teacher, prepared, tokenizer, use.asking_of(teacher, experts, tmp_path))
    own, *others = found["routings"].values()
    assert own == use.look(teacher, prepared, tokenizer)["routings"][use.ORIGINAL]
    if experts == "all":
        (every,) = found["text"]["weights"]["all experts"][:1]
        assert min(every) > 0
    assert [sum(layer) for each in others for layer in each["load"]] == pytest.approx(
        [1] * 2 * len(others), abs=1e-5
    )
    assert len(others) == (experts != "topk")


def test_a_router_that_learned_is_shown_and_the_teacher_stays_as_it_was(raw_config, tmp_path):
    prepared, tokenizer = prepared_of(raw_config)
    model, settings = moe(), {"learning_rate": 0.1, "balance": 0.0, "anchor": 0.0}
    before = {name: each.clone() for name, each in model.state_dict().items()}
    teacher, experts = asked(model, prepared), {"student_aware": settings}
    with pytest.raises(RunError, match=r"found no router.safetensors"):
        use.asking_of(teacher, experts, tmp_path)
    learned = StudentAware(model, **settings)
    for weight in learned.weights.values():
        weight += 1.0 + torch.arange(4.0)[:, None]
    learned.save(tmp_path, whole=False)
    found = use.look(teacher, prepared, tokenizer, use.asking_of(teacher, experts, tmp_path))
    assert list(found["routings"]) == ["original", "all experts", "student-aware"]
    own, every, trained = found["routings"].values()
    assert own == use.look(teacher, prepared, tokenizer)["routings"][use.ORIGINAL]
    assert not np.allclose(every["load"], trained["load"], atol=0.01)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    moved = np.abs(np.array(every["load"]) - trained["load"]).sum(1).mean() * 50
    title = expert_figures(found)["experts_moved"].get_suptitle()
    assert title.startswith(f"From all experts to student-aware {moved:.3g} % of the load moved")


def test_what_a_teacher_costs_for_each_token_is_counted_by_hand():
    teacher, student = moe(tie_word_embeddings=False), moe()
    hidden, inner, experts, layers, rows = 16, 24, 4, 2, 300
    each = 3 * hidden * inner  # gate, up and down
    embedding = rows * hidden
    whole = sum(weight.numel() for weight in teacher.parameters()) - embedding  # which is looked up
    top, every = (2 * (whole - layers * idle * each) for idle in (experts - 2, 0))
    assert teacher_flops(teacher, "topk", student) == top
    assert teacher_flops(teacher, "all", student) == every
    assert teacher_flops(teacher, {"augment": 3}, student) == 3 * top
    own = 2 * (sum(weight.numel() for weight in student.parameters()) - embedding)
    assert teacher_flops(teacher, {"student_aware": {}}, student) == 3 * every + own
    tied = moe(tie_word_embeddings=True)
    assert teacher_flops(tied, "topk", student) == top  # its head is the embedding, and multiplies
