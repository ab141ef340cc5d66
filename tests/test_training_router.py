"""A student with experts: its router's auxiliary loss is a term like all others, as transformers makes it."""

import pytest
import torch
from made_experts import KINDS as ALL
from tiny_training import pieces

from kdlib.config.run import parse
from kdlib.diagnostics.parity import parity
from kdlib.errors import ModelError
from kdlib.losses.objective import ledger, row_sums
from kdlib.losses.signals import IGNORED, kept
from kdlib.models.heads import head_form
from kdlib.models.teacher import insides, signal_of
from kdlib.runs.files import StudentFolder
from kdlib.runs.log import terms_in, training_table
from kdlib.training.plan import objective_of
from kdlib.training.run import train

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
KINDS = {kind: made for kind, made in ALL.items() if kind != "olmoe"}  # whose router rounds to float32 more
COEFFICIENT = 0.25
SGD = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 2,
    "logging_steps": 1,
}


def student(kind: str, *, asked: bool = True):
    torch.manual_seed(0)
    model, config, own = KINDS[kind]
    options = {**SIZES, **own, "output_router_logits": asked, "router_aux_loss_coef": COEFFICIENT}
    # grouped products take no float64
    return model(config(**options, experts_implementation="eager")).double()


def batch(rows: int = 3, length: int = 9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def book_of(model, given, raw_config, *, count=None, weights=None):
    tokens, at = kept(given["labels"]), objective_of(parse(raw_config), weights or {"ce": 1.0}, model).at(0)
    ours, _ = insides(at, (), model)
    signal = signal_of(model, given, tokens, vocabulary=300, form=head_form(model), inside=ours)
    return ledger(signal, None, tokens.targets, at=at, count=count or len(tokens.targets)), signal, tokens, at


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_transformers_with_padding(kind, raw_config):
    """Its loss of a batch is CE + coefficient x auxiliary loss, of the tokens that are attended to."""
    model, given = student(kind), batch()
    book, signal, tokens, at = book_of(model, given, raw_config)
    output = model(**given)
    assert at.formula == "loss = 1·CE + 0.25·router_aux"
    torch.testing.assert_close(book.entries["router_aux"].mean, output.aux_loss, check_dtype=False)
    torch.testing.assert_close(book.total, output.loss, rtol=1e-6, atol=0, check_dtype=False)
    parameters = list(model.parameters())
    both = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (book.total, output.loss)]
    for one, other in zip(*both, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    sums = row_sums(signal, None, tokens.targets, tokens.rows, row_count=3, at=at, terms={})
    assert float(sums["router_aux"].sum() / sums["tokens"].sum()) == pytest.approx(output.aux_loss.item())


@pytest.mark.parametrize("kind", KINDS)
def test_without_router_logits_in_its_config_there_is_no_such_term_unless_it_is_weighted(kind, raw_config):
    model, given = student(kind, asked=False), batch()
    assert list(book_of(model, given, raw_config)[0].entries) == ["ce"]
    weighted = book_of(model, given, raw_config, weights={"ce": 1.0, "router_aux": 0.5})[0]
    aux = model(**given, output_router_logits=True).aux_loss
    torch.testing.assert_close(weighted.entries["router_aux"].mean, aux, check_dtype=False)
    off = book_of(student(kind), given, raw_config, weights={"ce": 1.0, "router_aux": 0.0})[0]
    assert list(off.entries) == ["ce"]


def test_over_micro_batches_it_is_the_mean_by_kept_tokens_and_does_not_grow_with_their_number(raw_config):
    model, given = student("mixtral"), batch()
    halves = [{name: values[part] for name, values in given.items()} for part in (slice(0, 1), slice(1, 3))]
    counts = [len(kept(half["labels"]).targets) for half in halves]
    books = [book_of(model, half, raw_config, count=sum(counts))[0] for half in halves]
    found = sum(book.entries["router_aux"].mean for book in books)
    each = [model(**half).aux_loss for half in halves]
    by_hand = (counts[0] * each[0] + counts[1] * each[1]) / sum(counts)
    torch.testing.assert_close(found, by_hand, check_dtype=False)


def test_a_student_without_experts_is_refused_the_term(raw_config):
    made = pieces(parse(raw_config))
    with pytest.raises(ModelError, match="gives no auxiliary loss of a router.*leave it out"):
        book_of(made["student"], batch(), raw_config, weights={"ce": 1.0, "router_aux": 0.5})


def test_a_training_logs_it_and_the_self_test_passes(raw_config, tmp_path):
    settings = {**raw_config["training"], **SGD, "gradient_accumulation_steps": 2}
    config = parse({**raw_config, "training": settings})
    made = {**pieces(config), "student": student("mixtral").float()}
    table = parity(config, **made)
    assert (table["result"] == "pass").all(), table
    run = train(config, StudentFolder(tmp_path), **made)
    logged = training_table(StudentFolder(tmp_path))
    assert terms_in(logged) == ["kd", "ce", "router_aux"]
    assert (logged["router_aux_weight"] == COEFFICIENT).all()
    assert logged["router_aux_loss"].between(1.5, 4).all()  # top 2 of 4: 2 where all are used alike
    assert any("eval_router_aux_loss" in line for line in run.state.log_history)
