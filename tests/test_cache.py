"""A teacher asked once: what its cache says is what it says, whatever happens while it is written."""

import errno
import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace

import pyarrow
import pytest
import torch
from conftest import sentences, tiny_experiment, tiny_model, tiny_tokenizer
from tiny_training import comparable, pieces

from kdlib.cache import making
from kdlib.cache.parts import Recipe
from kdlib.cache.rows import as_arrays, asked_in, keys_of, packed, unpacked
from kdlib.cache.shards import Shards
from kdlib.cache.teacher import CachedTeacher
from kdlib.config.run import parse
from kdlib.errors import ConfigError, RunError
from kdlib.evaluation import caching
from kdlib.losses.objective import Objective, ledger
from kdlib.losses.signals import DenseSignal, LinearSignal
from kdlib.runs.files import StudentFolder
from kdlib.schedulers import constant
from kdlib.training.run import train

SIZES = {"vocabulary": 40, "hidden_size": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cache")
    tiny_tokenizer(sentences(200)).save_pretrained(home / "teacher")
    tiny_model(vocabulary=320).save_pretrained(home / "teacher")
    return home


def config_of(home, cache=None, **changes):
    raw = tiny_experiment(home / "teacher", home) | {"baseline": None}
    loss = {**raw["loss"], **changes.pop("loss", {})}
    teacher = {**raw["teacher"], **({"cache": cache} if cache else {})}
    return parse({**raw, "teacher": teacher, "loss": loss, **changes})


def trained(home, name, config, root=None):
    """The log of a training; without its model where the teacher is on the disk."""
    made = pieces(config)
    live = made["teacher"]
    made["teacher"] = caching.in_training(config, made["prepared"], root or home, lambda: live)
    if config.teacher.cache:
        live.model = None  # asked for, it would fail
    train(config, StudentFolder(home / name), **made)
    return comparable(home / name)


def figures(log, name):
    return [line[name] for line in log if name in line]


def filled(home, config, root, load=None):
    """The cache of a config's training rows, and the rows."""
    made = pieces(config)
    wanted = caching.plan(config, made["prepared"], root)
    caching.make(config, made["prepared"], wanted, load or (lambda: made["teacher"]))
    return making.opened(wanted, wanted.taught), made


def stored(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(making, "SHARD", 3000)


@pytest.mark.parametrize(
    ("name", "loss", "within"),
    [
        ("hidden", {}, 1e-3),
        ("top_k", {"top_k": 32}, 1e-3),
        ("curriculum", {"top_k": 32, "temperature": {"steps": {0: 3.0, 0.5: 1.5}}}, 1e-3),
        ("features", {"weights": {"kd": 0.7, "ce": 0.3, "hidden": 0.5, "relational": 0.2}}, 1e-3),
        ("samples", {"samples": 64}, 0.03),
        ("compiled", {"top_k": 32, "compile": True}, 1e-3),
        ("compiled_samples", {"samples": 64, "compile": True}, 0.03),
    ],
)
def test_a_training_from_the_cache_is_that_of_the_live_teacher(home, name, loss, within):
    live = trained(home, f"{name}_live", config_of(home, loss=loss))
    cached = trained(home, f"{name}_cached", config_of(home, True, loss=loss))
    for figure in ("eval/kl_to_teacher", "eval/loss", "eval/perplexity"):
        assert len(figures(live, figure)) == 3
        assert figures(cached, figure) == pytest.approx(figures(live, figure), rel=within), figure


def teacher_and_student(vocabulary=40, tokens=50, scale=4.0):
    torch.manual_seed(0)
    hidden, head = (
        torch.randn(tokens, 8, dtype=torch.float64),
        torch.randn(vocabulary, 8, dtype=torch.float64),
    )
    teacher = LinearSignal(hidden, head * scale / 3)
    logits = torch.randn(tokens, vocabulary, dtype=torch.float64, requires_grad=True)
    return teacher, logits, torch.randint(vocabulary, (tokens,))


def gradient(teacher, logits, targets, **objective):
    at = Objective({"kd": constant(0.7), "ce": constant(0.3)}, **objective).at(0.0)
    book = ledger(DenseSignal(logits), teacher, targets, at=at, count=len(targets))
    (found,) = torch.autograd.grad(book.total, logits)
    return book.total.item(), found


@pytest.mark.parametrize("options", [{}, {"renormalise": True}, {"divergence": "reverse_kl"}, {"top_k": 5}])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_from_the_disk_has_the_live_gradient_at_each_kept_temperature(options, temperature):
    teacher, logits, targets = teacher_and_student()
    recipe = Recipe("top_k", **SIZES, count=8, temperatures=(1.0, 4.0))
    kept = recipe.said(recipe.taken(teacher, seed=0), [len(targets)], None)
    how = {"top_k": 8, "temperature": constant(temperature), **options}
    live, cached = (gradient(each, logits, targets, **how) for each in (teacher, kept))
    assert cached[0] == pytest.approx(live[0], rel=2e-3)
    assert (cached[1] - live[1]).abs().max() < 2e-3 * live[1].abs().max()


def test_samples_from_the_disk_are_unbiased_in_value_and_gradient():
    teacher, logits, targets = teacher_and_student(tokens=6)
    recipe = Recipe("samples", **SIZES, count=12, temperatures=(2.0,))
    full = gradient(teacher, logits, targets, temperature=constant(2.0))
    found = []
    for seed in range(400):
        said = recipe.said(recipe.taken(teacher, seed), [len(targets)], None)
        found.append(gradient(said, logits, targets, samples=12, temperature=constant(2.0)))
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    draws = torch.stack([each for _, each in found])
    is_drawn = (teacher.logits() / 2.0).softmax(-1) > 0.002  # so often that the mean has a normal error
    apart = ((draws.mean(0) - full[1]) / (draws.std(0) / len(draws) ** 0.5))[is_drawn]
    assert len(apart) > 100
    assert apart.square().mean() < 1.5  # in standard errors: about 1
    assert apart.abs().max() < 4.5
    assert abs(values.mean() - full[0]) < 3 * values.std() / len(values) ** 0.5


def test_what_was_not_kept_is_refused_with_the_change_that_would_do():
    teacher, logits, targets = teacher_and_student()
    recipe = Recipe("top_k", **SIZES, count=8, temperatures=(2.0,))
    kept = recipe.said(recipe.taken(teacher, seed=0), [len(targets)], None)
    for how, said in (
        ({"top_k": 9}, "more than the top_k"),
        ({}, "more than the top_k"),
        ({"top_k": 8, "temperature": constant(3.0)}, "asked at T = 3.*kept at 2"),
    ):
        with pytest.raises(ConfigError, match=f"{said}.*cache: hidden"):
            gradient(kept, logits, targets, **how)


@pytest.mark.parametrize(
    ("cache", "changes", "said"),
    [
        ("top_k", {}, "loss.top_k looks at, which is null"),
        ("samples", {}, "loss.samples looks at, which is null"),
        (True, {"loss": {"top_k": 8, "weights": {"kd": 1.0, "reverse_kl": 0.5}}}, "reverse_kl looks at all"),
        (True, {"loss": {"samples": 8, "divergence": "reverse_kl"}}, "samples serve forward_kl alone"),
        (
            True,
            {"loss": {"weights": {"kd": 1.0, "attention": 0.5}}},
            "loss.weights.attention looks at is not",
        ),
        ("topk", {}, "teacher.cache.form: found 'topk'"),
    ],
)
def test_a_config_that_no_cache_can_serve_is_refused(home, cache, changes, said):
    with pytest.raises(ConfigError, match=said):
        config_of(home, cache, **changes)


def test_a_schedule_of_too_many_temperatures_is_refused_before_anybody_is_asked(home, tmp_path):
    config = config_of(home, True, loss={"top_k": 8, "temperature": {"linear": [4, 1]}})
    with pytest.raises(ConfigError, match="takes 12 values in 12 steps.*cache: hidden"):
        filled(home, config, tmp_path)


def test_keys_are_a_rows_own_content_however_it_is_batched(home):
    prepared = pieces(
        config_of(home, data={**tiny_experiment(home / "teacher", home)["data"], "packing": False})
    )
    rows = [prepared["prepared"].train[i] for i in range(6)]
    collate = prepared["prepared"].collate

    def keys(some):
        batch = collate(some)
        return [key for _, key, _ in keys_of(batch, asked_in(batch))]

    assert keys(rows) == [key for row in rows for key in keys([row])] == keys(rows[::-1])[::-1]
    changed = {**rows[0], "prompt_tokens": 3}
    assert keys([changed]) != keys(rows[:1])


def test_numbers_come_back_as_they_were():
    for array in (torch.randn(5, 3).half().numpy(), torch.randint(9**5, (4, 7)).int().numpy()):
        found = unpacked(packed(array), array.dtype.str, array.shape)
        assert found.dtype == array.dtype
        assert (found == array).all()


def test_so_few_bytes_lie_on_the_disk_for_each_token(tmp_path):
    """Of a vocabulary of 49,152, from a distribution as peaked as a language model's."""
    torch.manual_seed(0)
    size, tokens = 49152, 256
    head = torch.randn(size, 64)
    teacher = LinearSignal(torch.randn(tokens, 64) * 0.8, head)
    for recipe, most in (
        (Recipe("samples", size, 64, count=12, temperatures=(2.0,)), 40),
        (Recipe("top_k", size, 64, count=32, temperatures=(1.0, 2.0)), 130),
        (Recipe("hidden", size, 64), 2 * 64 + 8),
    ):
        arrays = as_arrays(recipe.taken(teacher, seed=0), size)
        folder = tmp_path / recipe.form
        folder.mkdir()
        about = {name: (each.dtype.str, each.shape[1:]) for name, each in arrays.items()}
        (folder / "cache.json").write_text(json.dumps({"arrays": about}))
        shards = Shards(folder)
        shards.add([(bytes(16), arrays)])
        shards.look_again()
        assert shards.bytes / tokens < most + 8, recipe.form  # names and schema: 2 kB here, nothing in 256 MB
        assert shards.notes[0]["bytes"] / tokens < most + 6


def killed_after(seconds, deed):
    if (pid := os.fork()) == 0:
        try:
            deed()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.slow
def test_fifty_kills_leave_the_bytes_of_an_undisturbed_one(home, tmp_path, small_shards):
    config = config_of(home, True, loss={"samples": 8})
    whole, made = filled(home, config, tmp_path / "whole")
    wanted = caching.plan(config, made["prepared"], tmp_path / "killed")
    folder, chance, kills = wanted.folder(wanted.taught), random.Random(0), 0
    assert len(whole.shards.notes) > 8

    def deed():
        caching.make(config, made["prepared"], wanted, lambda: made["teacher"])

    while kills < 50:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        for _ in range(chance.randint(1, 4)):
            killed_after(chance.uniform(0.0, 0.4), deed)
            kills += 1
        deed()
        assert {n: b for n, b in stored(folder).items() if not n.endswith(".tmp")} == stored(
            whole.shards.folder
        )


def test_two_ranks_make_what_one_does(home, tmp_path, small_shards, monkeypatch):
    config = config_of(home, True, loss={"top_k": 8})
    whole, made = filled(home, config, tmp_path / "one")
    wanted = caching.plan(config, made["prepared"], tmp_path / "two")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        making.fill(
            wanted, wanted.taught, made["prepared"].train, made["prepared"].collate,
            lambda: made["teacher"], batch=4,
        )  # fmt: skip
    assert stored(wanted.folder(wanted.taught)) == stored(whole.shards.folder)


def test_a_flipped_byte_is_found_and_named_and_mended(home, tmp_path, small_shards):
    cache, made = filled(home, config_of(home, True, loss={"top_k": 8}), tmp_path)
    path = sorted(cache.shards.folder.glob("*.arrow"))[3]
    content = path.read_bytes()
    keys = [key for group in making.planned(made["prepared"].train, made["prepared"].collate, cache.recipe,
                                            batch=8, reads="") for _, key in group]  # fmt: skip
    found = 0
    for place in range(len(content) // 4, len(content) - 700, len(content) // 9):
        path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        with pytest.raises(RunError, match=f"damaged are {path.name}"):
            Shards(path.parent).check()
        again, lost = Shards(path.parent), [b""]
        with suppress(RunError):
            lost = [key for key in keys if again.read(key) is None]
        found += bool(lost)
    assert found > 3  # of 9, in a row's own bytes; the others are Arrow's padding
    path.unlink()
    with pytest.raises(RunError, match=rf"{path.name}: found 0 bytes.*kd cache"):
        Shards(path.parent).has(keys[0])
    path.with_suffix(".json").unlink()
    caching.make(config_of(home, True, loss={"top_k": 8}), made["prepared"],
                 caching.plan(config_of(home, True, loss={"top_k": 8}), made["prepared"], tmp_path),
                 lambda: made["teacher"])  # fmt: skip
    assert path.read_bytes() == content


def test_a_full_disk_says_so_and_goes_on_later(home, tmp_path, small_shards, monkeypatch):
    config = config_of(home, True, loss={"top_k": 8})
    honest, left = pyarrow.OSFile, [3]

    def refusing(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(*arguments)

    monkeypatch.setattr(pyarrow, "OSFile", refusing)
    with pytest.raises(RunError, match="cannot write .*No space left on device; free some space"):
        filled(home, config, tmp_path)
    monkeypatch.setattr(pyarrow, "OSFile", honest)
    cache, made = filled(home, config, tmp_path)
    assert len(cache.shards.notes) > 3
    assert filled(home, config, tmp_path, lambda: pytest.fail("all is there"))


def test_more_data_are_completed_and_another_teacher_is_another_cache(home, tmp_path):
    config = config_of(home, True, loss={"top_k": 8})
    before, made = filled(home, config, tmp_path)
    some = replace(made["prepared"], train=made["prepared"].train.select(range(20)))
    wanted = caching.plan(config, some, tmp_path / "some")
    caching.make(config, some, wanted, lambda: made["teacher"])
    assert len(making.opened(wanted, wanted.taught).shards) == 20
    caching.make(config, made["prepared"], wanted, lambda: made["teacher"])
    after = making.opened(wanted, wanted.taught).shards
    assert len(after) == len(before.shards)
    for file, change in (("tokenizer.json", None), ("config.json", None)):
        other = tmp_path / file
        shutil.copytree(home / "teacher", other)
        (other / file).write_text((other / file).read_text() + "\n")
        assert making.weights_of(str(other)) != making.weights_of(str(home / "teacher")), change
    moved = tmp_path / "elsewhere"
    shutil.copytree(home / "teacher", moved)
    assert making.weights_of(str(moved)) == making.weights_of(str(home / "teacher"))


def test_a_cache_made_otherwise_in_its_place_is_refused_with_what_differs(home, tmp_path):
    config = config_of(home, True, loss={"top_k": 8})
    cache, made = filled(home, config, tmp_path)
    about = cache.shards.folder / "cache.json"
    about.write_text(about.read_text().replace('"count": 8', '"count": 9'))
    wanted = caching.plan(config, made["prepared"], tmp_path)
    with pytest.raises(RunError, match="made otherwise: count: found 9, needs 8; delete it"):
        making.opened(wanted, wanted.taught)


def test_rows_that_were_never_asked_about_are_told_at_the_step_that_needs_them(home, tmp_path):
    cache, made = filled(home, config_of(home, True), tmp_path)
    teacher = CachedTeacher(cache, cache, made["prepared"].vocabulary, None)
    rows = [{"input_ids": [1, 2, 3, 4]}]
    batch = teacher.collated(made["prepared"].collate, teaches=True)(rows)
    with pytest.raises(RunError, match="some rows are not there.*kd cache"):
        teacher(batch, asked_in(batch), teaches=True)
