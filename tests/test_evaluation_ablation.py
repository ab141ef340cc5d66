"""Ways to ask a teacher with experts: which runs are held against each other, by seed, and what is said."""

import pytest
from made_runs import RAW, made_run
from test_routing_use import moe

from kdlib.evaluation import ablation
from kdlib.evaluation.ablation import PLAIN
from kdlib.models.teacher import LiveTeacher

AWARE = {"student_aware": {"learning_rate": 1e-3, "balance": 0.01, "anchor": 0.1}}
NAMED = "student-aware router (SAR): learning rate 0.001, balance 0.01, anchor 0.1"


def made(root, name, kl, experts="topk", seed=0, **changes):
    raw = {**RAW, **changes, "seed": seed, "teacher": {**RAW["teacher"], "experts": experts}}
    return made_run(root, name, raw, kl=kl, data={"fingerprint": "same"})


@pytest.fixture
def plain(tmp_path):
    """Of three ways with three seeds each, the first."""
    for seed in range(3):
        made(tmp_path, f"plain{seed}", 1.0 + seed / 10, seed=seed)
        made(tmp_path, f"all{seed}", 1.1 + seed / 10 + 0.01 * (seed == 1), "all", seed)
        made(tmp_path, f"aware{seed}", 0.9 + seed / 10 - 0.01 * (seed == 1), AWARE, seed)
    return ablation.Run(tmp_path / "plain0")


def cost(experts):
    return 1e9 * (1 if experts == "topk" else 2 if experts == "all" else 5)


def test_differences_are_paired_by_seed(plain):
    table = ablation.ablation_table(plain, cost)
    assert table.index[0] == PLAIN
    assert set(table.index[1:]) == {"all experts", NAMED}
    row = table.loc[NAMED]
    # seeds lie 0.1 apart, and their differences 0.01 at most
    assert (row["n"], row["pairs"], row["better_in"]) == (3, 3, 3)
    assert row["difference"] == pytest.approx(-0.31 / 3)
    half = 4.302653 * 0.01 / 3  # Student's, of -0.1, -0.11 and -0.1
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(
        (-0.31 / 3 - half, -0.31 / 3 + half)
    )
    assert row["ratio"] == pytest.approx((1.0 - 0.31 / 3 + 0.1) / 1.1)
    assert (row["gflops"], row["steps"], row["same_rows"]) == (5.0, 6, True)
    said = ablation.message(table)
    assert "Student-aware router" in said
    assert "better; the goal, 0.97 or less, is reached" in said
    assert "All experts: 1.094 of plain top-k's KL, worse" in said
    figure = ablation.ablation_figure(table)
    assert figure.get_suptitle().startswith(
        "Student-aware router (SAR) is nearest to the teacher, at 0.906 of plain top-k's KL, beyond chance,"
    )
    read = ablation.shown(table)
    assert read.loc[NAMED, "− top-k's KL"].endswith("better in 3 of 3")
    assert read.loc[PLAIN, "− top-k's KL"] == ""


def test_one_seed_has_no_interval_and_nothing_is_told_from_it(tmp_path):
    run = made(tmp_path, "plain", 1.0)
    made(tmp_path, "aware", 0.9, AWARE)
    table = ablation.ablation_table(run, cost)
    assert "open; the goal, 0.97 or less, is reached" in ablation.message(table)
    assert ablation.shown(table).loc[NAMED, "− top-k's KL"] == "-0.100 (one seed)"
    assert "which may be chance" in ablation.ablation_figure(table).get_suptitle()


def test_where_no_other_way_is_nearer_the_picture_says_so(tmp_path):
    run = made(tmp_path, "plain", 1.0)
    made(tmp_path, "all", 1.2, "all")
    title = ablation.ablation_figure(ablation.ablation_table(run, cost)).get_suptitle()
    assert title.startswith("Plain top-k is nearest to the teacher; next is all experts, at 1.200 of its KL")


def test_only_runs_that_differ_in_how_the_teacher_is_asked_are_held_against_each_other(plain, tmp_path):
    routed = {"hidden": 0.1, "kd": 0.7, "ce": 0.3}
    made(tmp_path, "hidden", 1.0, loss={"temperature": 2.0, "weights": routed})
    made(tmp_path, "z_alone", 1.0, seed=1, baseline=None)  # changes no student: a newer one of that seed
    for number, other in enumerate(
        ({"loss": {**RAW["loss"], "temperature": 3.0}}, {"data": {**RAW["data"], "max_length": 8}})
    ):
        made(tmp_path, f"other{number}", 5.0, "all", **other)
    made(tmp_path, "weights", 5.0, loss={"temperature": 2.0, "weights": {"kd": 0.5, "ce": 0.5}})
    raw = {**RAW, "teacher": {**RAW["teacher"], "experts": {"augment": 2}}}
    made_run(tmp_path, "failed", raw, state="failed")
    made_run(tmp_path, "not_compared", raw, kl=None)
    found = ablation.variants(plain)
    assert set(found) == {PLAIN, "all experts", NAMED, f"{PLAIN}; hidden by a fixed map: even"}
    assert {seed: run.name for seed, run in found[PLAIN].items()} == {0: "plain0", 1: "z_alone", 2: "plain2"}


def test_without_plain_top_k_or_experts_there_is_nothing_to_hold_against(tmp_path, raw_config):
    run = made(tmp_path, "all", 1.0, "all")
    made(tmp_path, "aware", 0.9, AWARE)
    assert ablation.ablation_table(run, cost).empty
    table, said = ablation.of_run(run, LiveTeacher(moe(), 300), moe)
    assert table.empty
    assert "no finished runs beside this one ask its teacher plainly" in said
    assert ablation.of_run(run, None, moe)[1] == "the teacher has no experts, so it is asked in one way alone"


def test_figure_and_table_lie_beside_each_other(plain):
    table, said = ablation.of_run(plain, LiveTeacher(moe(), 300), moe)
    assert {"ablation.png", "ablation.csv"} == {path.name for path in (plain.path / "experts").iterdir()}
    assert table.loc[NAMED, "gflops"] > 3 * table.loc["all experts", "gflops"]
    assert said == ablation.message(table)
