"""No key gets into a file or an output: refused where settings come from, left out of what others said."""

import json
import sys

import pandas as pd
import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell
from made_log import stands

from kdlib.config import run as configs
from kdlib.config.run import parse
from kdlib.errors import ConfigError, refuse_keys, without_keys
from kdlib.reports import html
from kdlib.runs import folder as runs
from kdlib.runs.files import without_keys_in
from kdlib.workbench import cli, runner

KEY = "planted-0123456789"
HEX = "0123456789abcdef0123456789abcdef01234567"
MIXED = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5kM7nP9rS2tU4w"  # 49 letters and digits
KEYS = [
    f"hf_{MIXED[:34]}",
    f"sk-{MIXED[:48]}",
    f"sk-proj-{MIXED[:20]}_{MIXED[:20]}-{MIXED[:20]}",
    f"sk-ant-api03-{MIXED[:20]}_{MIXED[:19]}-AA",
    f"ghp_{MIXED[:36]}",
    f"github_pat_{MIXED[:22]}_{MIXED}",
    f"glpat-{MIXED[:20]}",
    f"AIza{MIXED[:35]}",
    "xoxb-123456789012-1234567890123-AbCdEfGhIjKl",
    "AKIAIOSFODNN7ABCDEFG",
    f"wandb_v1_{MIXED}",
    f"eyJhbGciOiJIUzI1NiJ9.eyJ{MIXED[:20]}.{MIXED[:30]}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{MIXED}\n",
    f"https://user:{MIXED[:20]}@hub.example/model",
    f"https://{MIXED[:30]}@hub.example/model",
    f"WANDB_API_KEY={HEX}",
    f"hf_token: {MIXED[:16]}",
    f"https://hub.example/model?token={MIXED[:16]}",
    f"Authorization: Bearer {MIXED[:24]}",
    f'{{"aws_secret_access_key": "{MIXED[:40]}"}}',
]
PLAIN = [
    "sk-wikipedia-20231101-clean",
    "user/sk-project-wikipedia-articles-20231101",
    "quickstart sk-ip task-12345 hf_hub hf_transfer mask-rcnn-resnet50-fpn-v2-large",
    f"models--a--b/snapshots/{HEX}",
    f"a/b@{HEX}",
    f"revision: {HEX}",
    f"commit={HEX}",
    f'{{"model.safetensors": "{HEX}aaaaaaaaaaaaaaaaaaaaaaaa"}}',
    f"sha256:{HEX * 2}"[:71],
    "xoxo-gossip-girl-scripts-dataset-v2 glm-4-9b-chat hf://datasets/user/name@main",
    "glove-wiki-gigaword-300-embeddings glue-sst2-distilbert-base-uncased-finetuned",
    "hf-internal-testing/tiny-random-gpt2 hf_internal_testing_tiny_random_llama_for_causal_lm",
    "model.layers.0.self_attn.k_proj.weight",
    "distilbert-base-uncased-finetuned-sst-2-english",
    "https://hub.example/a/b?token=1&download=true",
    "git@github.com:someone/something.git ssh://git@github.com/someone/something",
    "https://user:$TOKEN@hub.example, https://<user>:<password>@hub.example",
    "pad_token: <|endoftext|>, tokens: 123456789012, tokenizer=bert-base-uncased-2018",
    "hf_token: $HF_TOKEN_OF_TEAM1",
    "the password: see the handbook",
]


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", KEY)


@pytest.mark.parametrize("text", KEYS)
def test_a_key_is_known_by_its_form_and_not_repeated(text):
    for found in (text, f"a: 'b {text}'", {"a": {"b": [0, text]}}, {text: {}}):
        with pytest.raises(ConfigError, match="holds what looks like a key, ") as caught:
            refuse_keys(found)
        assert text[-10:] not in str(caught.value)
    clean = without_keys(f"before {text} after")
    assert "left out" in clean
    assert text[-12:].strip(' "\n}') not in clean.replace("hub.example/model", "")
    assert without_keys(clean) == clean


@pytest.mark.parametrize("text", PLAIN)
def test_names_of_models_and_data_digests_and_commits_are_no_keys(text):
    refuse_keys(text)
    refuse_keys({"data": {"source": text}})
    assert without_keys(text) == text


def test_forty_hexadecimal_digits_are_a_key_unless_their_name_says_what_else_they_are():
    for found in ({"note": HEX}, f"training.project={HEX}", {"grid": {"training.project": ["a", HEX]}}):
        with pytest.raises(ConfigError, match="a key, 0123…"):
            refuse_keys(found)
    refuse_keys({"grid": {"teacher.revision": [HEX, HEX]}, "data_sha": HEX})
    files = json.dumps({"model.safetensors": HEX, "config.json": HEX})
    assert without_keys(files) == files  # what is written has digests under any name


@pytest.mark.parametrize(
    "name", ["HF_TOKEN_READ", "OPENAI_APIKEY", "DB_PASSWORD_2", "GITHUB_PAT", "aws_secret"]
)
def test_a_variable_holds_a_key_by_its_name(monkeypatch, name):
    monkeypatch.setenv(name, 'some "odd" väl&e\n')
    with pytest.raises(ConfigError, match=f"the value of \\${name};"):
        refuse_keys({"note": 'is some "odd" väl&e here'})
    for form in ('some "odd" väl&e', json.dumps('some "odd" väl&e'), "some &quot;odd&quot; väl&amp;e"):
        assert without_keys(f"<{form}>").strip('<">') == f"${name}"


def test_a_short_value_and_another_variables_may_stand_anywhere(monkeypatch):
    values = {
        "SHORT_TOKEN": "quickstart",
        "NAME": "a-value-that-is-long",
        "TOKENIZERS_X": "another-long-value",
    }
    values |= {"HF_TOKEN_PATH": "/home/someone/token", "GPG_TTY": "/dev/pts/0000000"}
    values["SSH_PRIVATE_KEY"] = __file__
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    refuse_keys(" ".join(values.values()))


# where settings come from


@pytest.mark.parametrize(
    "origin", [{}, {"command": f"kd run x.yaml -o training.project={KEY}"}], ids=["config", "command"]
)
def test_a_run_with_a_key_in_its_settings_is_refused_and_nothing_is_written(raw_config, tmp_path, origin):
    changes = {} if origin else {"training.project": KEY}
    with pytest.raises(ConfigError, match=r"holds the value of \$SOME_API_KEY; .*: leave it out") as caught:
        runs.create(tmp_path / "runs", "first", parse(raw_config, changes), **origin)
    assert KEY not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_notebook_gets_no_key_as_parameter(raw_config, tmp_path):
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    with pytest.raises(ConfigError, match="the value of"):
        runner.run_notebooks(run, {"note": KEY}, None, None)
    assert run.status["state"] == "created"


@pytest.mark.parametrize(
    "text",
    [f"a: [{KEY}", f"a: 1 # {KEY}", f"loss: {{temperature: {KEY}}}", f"{KEY}: 1", f"data: {KEY}", KEY],
    ids=["broken", "comment", "value", "name", "section", "no mapping"],
)
def test_no_error_repeats_a_key_of_a_config(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x.yaml.* holds the value of \$SOME_API_KEY") as caught:
        configs.load(tmp_path / "x.yaml")
    assert KEY not in str(caught.value)


@pytest.fixture
def kd(tmp_path, monkeypatch, capsys):
    """Runs `kd …` in an empty folder: (exit status, all it said)."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kd", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code, said.out + said.err

    return run


IN_COMMANDS = [
    ["run", "tiny.yaml", "-o", f"training.project={KEYS[0]}"],
    ["run", "tiny.yaml", "-o", KEYS[0]],
    ["run", "tiny.yaml", "-p", f"note={HEX}"],
    ["run", "tiny.yaml", "--name", KEYS[0]],
    ["sweep", "sweep.yaml", "-o", f"loss.temperature={KEYS[0]}"],
    ["sweep", "sweep.yaml", "-o", f"{KEYS[0]}=1"],
    ["sweep", "sweep.yaml", "--dry-run", "-o", f"note={HEX}"],
    ["doctor", "tiny.yaml", "--fix", "--output", "mended.yaml", "-o", f"data.text={KEYS[0]}"],
    ["compare", "--teacher", f"https://me:{KEYS[0]}@hub.example/x", "--student", "b", "--data", "c"],
    ["import", "theirs.json", "--teacher", KEYS[0]],
    [KEYS[0]],
]


@pytest.mark.parametrize("words", IN_COMMANDS, ids=" ".join)
def test_a_command_with_a_key_writes_and_repeats_nothing(kd, config_file, tmp_path, words):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": "tiny.yaml", "grid": {"seed": [0, 1]}}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, said = kd(*words)
    assert (status, "the command holds what looks like a key" in said) == (1, True), said
    assert KEYS[0][-10:] not in said
    assert HEX[-10:] not in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


IN_FILES = {
    "grid": {"base": "tiny.yaml", "grid": {"training.project": ["a", KEYS[0]]}},
    "unknown": {"base": "tiny.yaml", "grid": {KEYS[0]: [1, 2]}},
    "shared": {"base": "tiny.yaml", "grid": {"seed": [1]}, "overrides": {"data.text": KEYS[0]}},
    "drawn": {
        "base": "tiny.yaml",
        "random": {"trials": 2, "from": {"data.text": {"choice": ["a", KEYS[0]]}}},
    },
    "list": {"base": "tiny.yaml", "list": [{"training.project": HEX}]},
    "base": {"base": "keyed.yaml", "grid": {"seed": [0, 1]}},
}


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "dry"])
@pytest.mark.parametrize("sweep", IN_FILES.values(), ids=IN_FILES)
def test_a_sweep_with_a_key_writes_and_lists_nothing(kd, raw_config, config_file, tmp_path, sweep, words):
    keyed = {**raw_config, "training": {**raw_config["training"], "project": KEYS[0]}}
    (tmp_path / "keyed.yaml").write_text(yaml.safe_dump(keyed))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    status, said = kd("sweep", "sweep.yaml", *words)
    assert (status, "holds what looks like a key" in said) == (1, True), said
    assert KEYS[0][-10:] not in said
    assert HEX[-10:] not in said
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize("where", ["comment", "value"])
def test_the_doctor_copies_no_key(kd, config_file, tmp_path, where):
    line = f"# {KEYS[0]}\n" if where == "comment" else f"seed: {KEYS[0]}\n"
    config_file.write_text(line + config_file.read_text())
    status, said = kd("doctor", "tiny.yaml", "--fix", "--output", "mended.yaml")
    assert (status, "holds what looks like a key" in said, KEYS[0] in said) == (2, True, False), said
    assert not (tmp_path / "mended.yaml").exists()


@pytest.mark.parametrize(
    "theirs", [{"hf_token": KEYS[0]}, {"wandb_api_key": HEX}, {"api_key": "abc123def456ghi"}]
)
def test_another_projects_settings_are_not_taken_over_with_a_key(kd, tmp_path, theirs):
    (tmp_path / "theirs.json").write_text(json.dumps({**theirs, "temperature": 2}))
    status, said = kd("import", "theirs.json", "--output", "ours.yaml")
    assert (status, "theirs.json holds what looks like a key" in said) == (1, True), said
    assert not (tmp_path / "ours.yaml").exists()


def test_the_hubs_token_is_not_a_setting(raw_config):
    with pytest.raises(ConfigError, match="hub_token: not set here: a config is kept and shown"):
        parse(raw_config, ["training.hub_token=x"])


# what others said


def test_what_a_run_leaves_holds_no_key_that_another_package_repeated(raw_config, tmp_path, monkeypatch):
    run, said = runs.create(tmp_path / "runs", "first", parse(raw_config)), f"401 for {KEY}, {KEYS[0]}"
    stands(run, "failed", said)
    run.add_to_manifest(note={said: said})
    (run.path / "log.txt").write_text(said)
    without_keys_in(run.path / "log.txt")
    html.write(tmp_path / "report", f"<p>{said}</p>", {}, {"rows": pd.DataFrame({said: [said]})})
    texts = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(texts) >= 6
    assert not [path for path, text in texts.items() if KEY in text or KEYS[0] in text]
    assert run.status["message"] == "401 for $SOME_API_KEY, hf_a…(key left out)"


def test_an_error_is_printed_without_a_key(kd, monkeypatch, tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)

    def fail(*given):
        raise ConfigError(f"the hub said: {KEY} is wrong")

    monkeypatch.setattr(cli.runs, "open_run", fail)
    assert kd("clean", "x") == (1, "kd: the hub said: $SOME_API_KEY is wrong\n")


def test_a_picture_is_left_as_it_is():
    picture = f"data:image/png;base64,{KEYS[9]}/{KEYS[7]}+{KEYS[0].replace('_', 'A')}=="
    assert without_keys(f'<img src="{picture}">') == f'<img src="{picture}">'


def test_a_notebook_shows_the_message_alone(capsys):
    InteractiveShell().run_cell("from kdlib.errors import RunError\nraise RunError('found a, needs b; do c')")
    assert capsys.readouterr().out.strip() == "RunError: found a, needs b; do c"
