"""The benchmark measures what it says: every case computes the same loss, rounds are paired, peaks are a
case's own.
"""

import importlib.util
import json
import sys

import pytest
import torch
import yaml
from conftest import kd_process

from kdlib.benchmarks import figures, heads, large, peers, rounds, settings, steps, study
from kdlib.benchmarks.results import RESULTS, ratio, step_table, target_table, verdict
from kdlib.config.run import load
from kdlib.errors import ConfigError, RunError
from kdlib.models.loading import parameters
from kdlib.runs import folder as runs

CPU = torch.device("cpu")
CACHED = {"ours_from_hidden", "ours_from_top_k", "ours_from_samples"}
OURS = {"ours_kd", "ours_hidden", "ours_routed", "ours_lora", "ours_sft", *CACHED}
SETTING = heads.Setting(chunk=16, top_k=8)
INPUTS = {
    "tokens": 43,
    "hidden": 24,
    "vocabulary": 301,
    "masked": 0.5,
    "dtype": "float32",
    "seed": 0,
    "device": "cpu",
}


def lines(**seconds):
    """Rounds in which each name took these seconds."""
    return [
        {"round": number, "name": name, "wall_s": value, "cpu_s": 2 * value}
        for name, values in seconds.items()
        for number, value in enumerate(values)
    ]


def results():
    memory = [
        ("naive", 40, 1000),
        ("ours", 40, 130),
        ("trl_jsd", 40, 2000),
        ("ours_generalized_jsd", 40, 150),
        ("ours", 320, 132),
    ]
    return {
        "heads": {
            "float32": {
                "tokens": 40,
                "vocabulary": 500,
                "skipped": {},
                "agreement": {"ours": {"loss": 1e-7, "grad_hidden": 1e-6, "grad_head": 1e-6}},
                "rounds": lines(
                    floor=[1.0, 1.2], naive=[2.0, 2.0], ours=[1.1, 1.5], ours_reverse_kl=[2.2, 1.5]
                ),
                "memory": [
                    {"name": name, "tokens": n, "peak_bytes": peak * 10**6, "gradient_bytes": 30 * 10**6}
                    for name, n, peak in memory
                ],
            }
        },
        "steps": {
            "float32": {
                "tokens": 512,
                "skipped": {},
                "flops": {"teacher": 3e9, "student": 5e9},
                "flops_per_s": 1e10,
                "rounds": lines(
                    teacher=[1.0, 1.0], trainer_sft=[3.0, 3.0], ours_kd=[3.6, 3.8], trl_gkd=[5.4, 7.6]
                ),
            }
        },
        "machine": {"processor": "one"},
    }


def test_what_a_config_may_name_is_what_there_is():
    assert set(settings.CASES) == set(peers.CASES)
    assert set(settings.CONTENDERS) == {*steps.TRAINERS, "teacher"}


@pytest.mark.parametrize("name", [name for name in settings.CASES if name != "floor"])
def test_every_case_has_the_value_and_the_gradients_of_float64(name):
    try:
        found = heads.agreement(peers.CASES[name], heads.problem(**INPUTS), SETTING)
    except ImportError as error:
        pytest.skip(str(error))
    assert max(found.values()) < 1e-5, found


def test_the_floor_makes_the_four_products():
    problem = heads.problem(**INPUTS)
    last = heads.floor(peers.CASES["floor"], problem, SETTING)()
    assert torch.allclose(last, (problem.hidden @ problem.head.T @ problem.head)[0, 0], rtol=1e-4)


def test_a_package_that_is_missing_is_skipped_with_what_to_do(monkeypatch):
    for name in ("trl", "trl.experimental.gkd.gkd_trainer"):
        monkeypatch.setitem(sys.modules, name, None)
    prepared, skipped = rounds.prepared(["naive", "trl_jsd"], heads.problem(**INPUTS), SETTING)
    assert set(prepared) == {"naive"}
    assert 'pip install "kdlib[bench]"' in skipped["trl_jsd"]


def test_rounds_are_interleaved_and_their_order_rotates_after_a_warm_up():
    called = []
    measured = list(
        rounds.interleaved(
            {name: lambda name=name: called.append(name) for name in "abc"}, rounds=3, device=CPU
        )
    )
    assert "".join(called) == "abc" + "abc" + "bca" + "cab"
    assert [(line["round"], line["name"]) for line in measured[:4]] == [
        (0, "a"),
        (0, "b"),
        (0, "c"),
        (1, "b"),
    ]


def test_ratios_are_formed_within_a_round():
    found = ratio(lines(a=[1.0, 8.0, 3.0], b=[2.0, 4.0, 3.0]), "a", "b", "wall_s")
    assert found == {"value": 1.0, "low": 0.5, "high": 2.0}
    assert ratio(lines(a=[3.0], b=[1.0], c=[2.0]), "a", ("b", "c"), "wall_s")["value"] == 1.0
    assert ratio(lines(a=[1.0]), "a", "missing", "wall_s") is None


def test_the_naive_way_needs_more_memory_than_ours_in_processes_of_their_own():
    sizes = {**INPUTS, "tokens": 256, "vocabulary": 20000}
    naive, ours = (rounds.memory(name, SETTING, **sizes)["peak_bytes"] for name in ("naive", "ours_eager"))
    assert ours < 0.6 * naive


def test_a_process_that_fails_to_measure_says_why():
    with pytest.raises(RunError, match=r"(?s)memory of ours ended with status 1:.*hidden"):
        rounds.memory("ours", SETTING, **{**INPUTS, "hidden": -1})


def test_whole_steps_are_timed_in_every_trainer_that_is_there(teacher_folder):
    options = {
        "teacher": str(teacher_folder),
        "student_layers": 2,
        "batch": 2,
        "length": 12,
        "rounds": 1,
        "warmup": 1,
        "steps": 1,
    }
    made = steps.pair(settings.StepsConfig(**options), precision="float32", device=CPU, seed=0)
    weights, measured, skipped = made.student.get_input_embeddings().weight.clone(), {}, {}
    for name in settings.CONTENDERS:
        try:
            measured[name] = steps.measured(name, made)
        except ImportError as error:
            skipped[name] = str(error)
    timed = {name: line["wall_s"] for name, line in measured.items()}
    assert {name for name, line in measured.items() if "ledger_s" in line} == OURS
    assert 0 < measured["ours_kd"]["ledger_s"] < timed["ours_kd"]
    assert set(timed) | set(skipped) == set(settings.CONTENDERS)
    assert {*OURS, "teacher", "trainer_sft"} <= set(timed)
    assert min(timed.values()) > 0
    assert torch.equal(made.student.get_input_embeddings().weight, weights)  # each trained a copy


def test_contenders_run_in_processes_of_their_own_and_those_that_are_not_there_are_told(teacher_folder):
    names, missing = ["trl_gkd", "teacher"], importlib.util.find_spec("trl") is None
    options = settings.StepsConfig(
        teacher=str(teacher_folder),
        student_layers=2,
        batch=1,
        length=4,
        rounds=1,
        warmup=1,
        steps=1,
        contenders=names,
    )
    skipped = {}
    lines = list(steps.rounds(options, skipped, precision="float32", seed=0, device="cpu"))
    assert [line["name"] for line in lines] == names[missing:]
    assert [(name, "kdlib[bench]" in why) for name, why in skipped.items()] == [("trl_gkd", True)] * missing
    assert min(line["wall_s"] for line in lines) > 0


def test_the_flops_of_a_step_are_those_counted_by_hand(teacher_folder):
    made = steps.pair(
        settings.StepsConfig(teacher=str(teacher_folder), student_layers=2, batch=2, length=10),
        precision="float32",
        device=CPU,
        seed=0,
    )
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48  # query, key and value, output, three of the MLP
    found = steps.flops(made)
    assert found["teacher, forward"] == 4 * (2 * 20 * layer + 4 * 32 * 2 * 10 * 10 / 2)
    assert found["student's head, forward and backward"] == 3 * 2 * 18 * 320 * 32


def test_targets_say_what_was_measured_and_whether_it_is_met():
    table = target_table(results()).set_index("target")
    assert table.loc["KD + CE, float32: time ÷ naive", "measured"] == pytest.approx(0.65)
    assert table.loc["KD + CE, float32: peak memory ÷ naive", ["measured", "met"]].tolist() == [0.13, "yes"]
    assert table.loc["JSD(0.5), float32: peak memory ÷ TRL", "met"] == "yes"
    assert table.loc[
        "peak memory above inputs and gradients with more tokens: change", "measured"
    ] == pytest.approx(0.02)
    assert table.loc[
        "KD step, float32: time ÷ (teacher's forward pass + Trainer's SFT step)", "measured"
    ] == pytest.approx(0.925)
    assert table.loc["KD step, float32: tokens per s ÷ TRL's GKDTrainer", "measured"] == pytest.approx(1.75)
    assert table.loc["KD + CE, bfloat16: time ÷ TRL's forward KL", "met"] == "not measured"
    books = "KD step, float32: ledger and guard, share of the step, a log every 10 steps"
    assert table.loc[books, "met"] == "not measured"  # results of before it was
    later = results()
    later["steps"]["float32"]["rounds"] = [
        line | {"ledger_s": line["wall_s"] / 200} for line in later["steps"]["float32"]["rounds"]
    ]
    assert target_table(later).set_index("target").loc[books, ["measured", "met"]].tolist() == [
        pytest.approx(0.005),
        "yes",
    ]
    assert "targets that were measured are met (float32: 40 tokens" in verdict(results())


def test_utilisation_counts_a_contenders_own_products():
    table = step_table(results(), "float32")
    assert table["MFU"].tolist()[:4] == pytest.approx(
        [0.3, 0.5 / 3, (0.8 / 3.6 + 0.8 / 3.8) / 2, (0.8 / 5.4 + 0.8 / 7.6) / 2]
    )
    assert table["s per step"].iloc[-1] == 0.8


def test_a_report_of_a_benchmark_has_its_verdict_figures_and_tables(tmp_path):
    run = runs.create(tmp_path, "measured", load("configs/benchmark.yaml", kind=settings.BenchmarkConfig))
    runs.write_json(run.path / RESULTS, results())
    page = figures.render(run, tmp_path / "reports").read_text()
    assert verdict(results()) in page
    assert "python -m kdlib.benchmarks runs/measured/config.yaml" in page
    made = {path.name for path in (tmp_path / "reports" / "measured").glob("*/*")}
    assert {
        "time_float32.png",
        "time_float32.csv",
        "memory_float32.png",
        "steps_float32.csv",
        "targets.csv",
    } <= made


def test_a_study_of_before_that_also_drew_the_dashboard_opens_and_is_reported(tmp_path):
    run = runs.create(tmp_path, "old", load("configs/benchmark.yaml", kind=settings.BenchmarkConfig))
    with (run.path / "config.yaml").open("a") as file:
        file.write("dashboard: {steps: 100000, rounds: 3}\n")
    runs.write_json(run.path / RESULTS, {**results(), "dashboard": {"steps": 1000, "rounds": []}})
    assert study.Study(run).results["heads"].keys() == {"float32"}
    assert verdict(results()) in figures.render(run, tmp_path / "reports").read_text()


def test_a_bad_benchmark_is_refused_with_all_faults(teacher_folder):
    changes = {
        "heads.float32.cases": ["our"],
        "heads.chunks": 3,
        "device": "cuda",
        "steps.teacher": str(teacher_folder),
    }
    with pytest.raises(
        ConfigError,
        match=r"(?s)2 faults.*no 'our'; did you mean 'ours'.*chunks: unknown key; did you mean 'chunk'",
    ):
        load("configs/benchmark.yaml", changes, kind=settings.BenchmarkConfig)
    with pytest.raises(ConfigError, match="steps.student_layers is 10, but the teacher has 4"):
        study.preflight(
            load(
                "configs/benchmark.yaml",
                {"steps.teacher": str(teacher_folder)},
                kind=settings.BenchmarkConfig,
            )
        )


@pytest.mark.slow
def test_the_benchmark_notebook_runs_through_and_leaves_a_report(teacher_folder, tmp_path):
    folders = ("--runs", tmp_path / "runs", "--reports", tmp_path / "reports")
    settings = (
        f"steps.teacher={teacher_folder}",
        "steps.student_layers=2",
        "heads.bfloat16=null",
        "heads.memory=[ours_eager]",  # what is compiled is compiled for seconds, in each process
        "steps.contenders=[teacher]",
        "heads.float32.cases=[floor,naive,ours_eager]",
    )
    overrides = [word for setting in settings for word in ("-o", setting)]
    process = kd_process("--smoke", "--name", "tiny", *overrides, *folders, module="kdlib.benchmarks")
    out, said = process.communicate(timeout=800)
    assert process.returncode == 0, said
    assert out.strip().splitlines()[-1].startswith("report: ")
    run = runs.Run(tmp_path / "runs" / "tiny")
    assert run.status["state"] == "done"
    found = json.loads((run.path / "benchmark_results.json").read_text())
    assert set(found) == {"machine", "heads", "steps"}
    assert (run.path / "figures" / "time_float32.png").exists()
    assert yaml.safe_load((run.path / "config.yaml").read_text())["heads"]["vocabulary"] == 500
    assert (tmp_path / "reports" / "tiny" / "report.html").exists()


def test_the_share_of_a_cards_products_is_of_what_its_maker_states():
    assert large.share_of("NVIDIA H100 80GB HBM3", 494.5e12) == pytest.approx(0.5)
    assert large.share_of("NVIDIA A100-SXM4-80GB", 156e12) == pytest.approx(0.5)
    assert large.share_of("CPU", 1e12) is None


def test_a_step_of_the_large_shapes_costs_two_for_each_weight_of_the_teacher_and_six_of_the_student(tmp_path):
    large.saved(tmp_path, tiny=False)
    options = {"teacher": "", "student_layers": 1, "batch": 1, "length": 1024, "steps": 1, "warmup": 1}
    made = large.pair(tmp_path, settings.StepsConfig(**options), torch.device("meta"))
    weights = {name: parameters(model) for name, model in (("7b", made.teacher), ("1b", made.student))}
    assert weights["7b"] == pytest.approx(7.3e9, rel=0.01)
    assert weights["1b"] == pytest.approx(1.485e9, rel=0.01)
    embeddings = 100_352 * 4096, 100_352 * 2048
    products = 2 * (weights["7b"] - embeddings[0]) + 6 * (weights["1b"] - embeddings[1])
    attention = 2 * 1024 * (4096 * 32 + 3 * 2048 * 16)
    assert sum(steps.flops(made).values()) / 1024 == pytest.approx(products + attention, rel=0.01)


@pytest.mark.slow
def test_the_large_benchmark_runs_on_tiny_models():
    found = large.measure(batch=2, length=16, steps=1, tiny=True, device=CPU)
    assert found.tokens_per_s > 0
    assert found.peak_gib is None
    assert 0 < found.forecast_gib < 0.1


@pytest.mark.gpu
def test_seven_into_one_billion_fill_the_gpu_as_forecast():
    found = large.measure(batch=4, length=1024, steps=4, tiny=False, device=torch.device("cuda"))
    assert found.peak_gib == pytest.approx(found.forecast_gib, rel=0.1)
    assert found.mfu is None or found.mfu >= 0.45
