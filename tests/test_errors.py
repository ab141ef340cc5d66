"""No key gets into a run's files by way of its settings."""

import pytest

from kdlib.config.run import parse
from kdlib.errors import ConfigError, refuse_keys
from kdlib.runs import folder as runs
from kdlib.workbench import runner

KEY = "planted-0123456789"


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", KEY)


@pytest.mark.parametrize(
    "origin", [{}, {"command": f"kd run x.yaml -o training.run_name={KEY}"}], ids=["config", "command"]
)
def test_a_run_with_a_key_in_its_settings_is_refused_and_nothing_is_written(raw_config, tmp_path, origin):
    config = parse(raw_config, {} if origin else {"training.run_name": KEY})
    with pytest.raises(ConfigError, match=r"holds the value of \$SOME_API_KEY; .*: leave it out") as caught:
        runs.create(tmp_path / "runs", "first", config, **origin)
    assert KEY not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_notebook_gets_no_key_as_parameter(raw_config, tmp_path):
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    with pytest.raises(ConfigError, match="the value of"):
        runner.run_notebooks(run, {"note": KEY}, None, None)
    assert run.status["state"] == "created"


@pytest.mark.parametrize("text", ["hf_" + "a" * 34, "x: sk-" + "b" * 30, "ghp_" + "C" * 36])
def test_a_key_is_known_by_its_form_and_not_repeated(text):
    with pytest.raises(ConfigError, match="what looks like a key, ") as caught:
        refuse_keys(text)
    assert text[-10:] not in str(caught.value)


def test_a_short_value_and_another_variables_may_stand_anywhere(monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "quickstart")
    monkeypatch.setenv("NAME", "a-value-that-is-long")
    refuse_keys("quickstart a-value-that-is-long sk-ip task-12345 hf_hub")


def test_the_hubs_token_is_not_a_setting(raw_config):
    with pytest.raises(ConfigError, match="hub_token: not set here: a config is kept and shown"):
        parse(raw_config, ["training.hub_token=x"])
