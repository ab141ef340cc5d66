"""A mixture of experts made of a dense model: it says the same, is a plain folder, asks all its experts."""

import random

import pytest
import torch
from conftest import sentences, tiny_model, tiny_tokenizer
from tiny_architectures import tiny
from transformers import AutoModelForCausalLM

from kdlib.errors import ConfigError, DataError, ModelError
from kdlib.models.loading import load_model, load_tokenizer
from kdlib.routing.experts import routers_of, watched
from kdlib.routing.upcycle import calibrate, upcycled
from kdlib.workbench.cli_checks import experts

IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def dense(tmp_path):
    folder = tmp_path / "dense"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(sentences(50)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("count", "top_k"), [(4, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_before_it_is_trained_it_gives_the_dense_models_logits_whoever_is_asked(kind, count, top_k):
    model = tiny(kind)
    made = upcycled(model, count, top_k)
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
        for router in routers_of(made).values():
            router.weight.normal_(generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_the_command_writes_a_plain_folder_with_tokenizer_and_says_how_large_it_is(dense, tmp_path, capsys):
    folder = tmp_path / "experts"
    experts(str(dense), str(folder), count=4, top_k=2)
    said = capsys.readouterr().out
    made, source = load_model(str(folder)), load_model(str(dense))
    mlp = 4 * 3 * 32 * 48  # of all four layers
    total = sum(each.numel() for each in source.parameters()) + 3 * mlp + 4 * 4 * 32
    assert made.num_parameters() == total
    assert f"{total / 1e6:.1f}M parameters" in said
    assert f"meets {(total - 2 * mlp) / 1e6:.1f}M: 2 of 4 experts in each of 4 layers" in said
    assert isinstance(made, type(AutoModelForCausalLM.from_pretrained(folder)))
    assert (made.config.model_type, made.config.output_router_logits) == ("mixtral", True)
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(dense)).get_vocab()
    assert {*folder.glob("*.safetensors")}
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, source(IDS).logits, rtol=0, atol=1e-5)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_the_seed_alone_decides_the_routers():
    same, again, other = (upcycled(tiny_model(), 4, 2, seed=seed) for seed in (1, 1, 2))
    pairs = [[router.weight for router in routers_of(each).values()] for each in (same, again, other)]
    assert all(map(torch.equal, pairs[0], pairs[1]))
    assert not any(map(torch.equal, pairs[0], pairs[2]))


def test_random_routers_ask_every_expert_of_tokens_that_differ():
    made = upcycled(tiny_model(), 4, 2)
    with torch.no_grad(), watched(made) as given:
        made(torch.arange(60).view(1, 60))
    for weights in given.values():
        assert ((weights > 0).sum(0) > 0).all()
        assert weights.std(0).min() > 0.01


def test_calibrated_routers_part_the_tokens_of_a_text_and_leave_what_is_said(dense, tmp_path):
    kinds = [range(20, 40), range(200, 240)]
    draw = random.Random(0)
    rows = torch.tensor([draw.choices(kinds[n % 2], k=24) for n in range(16)])
    model = load_model(str(dense))
    made, plain = upcycled(model, 4, 2), upcycled(model, 4, 2)
    calibrate(made, rows)
    apart = {}
    for name, each in (("random", plain), ("calibrated", made)):
        with torch.no_grad(), watched(each) as given:
            torch.testing.assert_close(each(rows).logits, model(rows).logits, rtol=0, atol=1e-5)
        use = torch.stack([weights.view(16, 24, 4).mean(1) for weights in given.values()])
        apart[name] = float((use[:, ::2].mean(1) - use[:, 1::2].mean(1)).abs().sum(-1).mean() / 2)
    assert apart["calibrated"] > 1.5 * apart["random"]
    again = upcycled(model, 4, 2)
    calibrate(again, rows)
    assert all(map(torch.equal, again.parameters(), made.parameters()))


def test_the_command_calibrates_on_a_source(dense, tmp_path):
    for name, texts in (("text", sentences(60) + [" ".join(sentences(12))] * 3), ("short", sentences(4))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    folder = tmp_path / "experts"
    with pytest.raises(DataError, match="no document has 128 tokens, as calibrating routers needs"):
        experts(str(dense), str(folder), text=str(tmp_path / "short.jsonl"))
    experts(str(dense), str(folder), text=str(tmp_path / "text.jsonl"))
    rows = [router.weight for router in routers_of(load_model(str(folder))).values()]
    assert all(row.isfinite().all() and row.std() > 0 for row in rows)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("qwen2", {}, "found a qwen2 model, and experts are made of a Llama or Mistral one"),
        ("gpt2", {}, "found a gpt2 model"),
        ("llama", {"attention_bias": True}, "the model has attention_bias, and a Mixtral has none"),
        ("llama", {"mlp_bias": True}, "the model has mlp_bias"),
    ],
)
def test_a_model_whose_layers_are_no_mixtrals_is_refused_by_name(tmp_path, kind, settings, said):
    tiny(kind, **settings).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=said) as caught:
        experts(str(tmp_path / "other"), str(tmp_path / "made"))
    assert str(caught.value).startswith(f"{tmp_path / 'other'}: ")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (4, 5), (4, 0)])
def test_too_few_experts_are_refused(count, top_k):
    with pytest.raises(ModelError, match=f"found {count} experts, of which each token asks {top_k}; needed"):
        upcycled(tiny_model(), count, top_k)


def test_what_is_there_already_is_kept(dense):
    with pytest.raises(ConfigError, match="is there already, and would be lost"):
        experts(str(dense), str(dense))
