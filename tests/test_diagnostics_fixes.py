"""Changes put into a YAML text: what is not touched stays as it is written, byte for byte."""

import pytest
import yaml

from kdlib.diagnostics import findings
from kdlib.diagnostics.findings import Finding
from kdlib.diagnostics.fixes import rewritten
from kdlib.errors import ConfigError
from kdlib.runs.folder import project_root

QUICKSTART = (project_root() / "configs" / "quickstart.yaml").read_text()
FOUR = """# four spaces, and room inside the brackets
loss:
    weights: { kd: 0.7,   ce: 0.3 }     # as ever
    temperature:    200  # hot
    curriculum:
        - until: 0.3     # first
          weights: {}
        - until: 1.0
teacher:  {model: 'quoted',}

# the end
"""
FLAT = """loss:
  curriculum:
  - {until: 0.3}
  # between
  - until: 1.0
    weights: {hidden: 0.5}
  weights:
    kd: 1e-4   # the last, and then

# another section's comment
training:
  subset: null
  empty:
  flag: yes
"""


@pytest.mark.parametrize(
    ("text", "changes", "lines"),
    [
        (QUICKSTART, {"training.warmup_steps": 0.2}, 1),
        (QUICKSTART, {"loss.weights.kd": 0.5, "teacher.model": "another"}, 2),
        (QUICKSTART, {"loss.temperature": 2, "training.optim": "sgd"}, 2),
        (QUICKSTART, {"data.subset": None}, 0),
        (QUICKSTART, {}, 0),
        (FOUR, {"loss.temperature": 2}, 1),
        (FOUR, {"loss.weights.hidden": 0.1}, 1),
        (FOUR, {"loss.curriculum.0.weights.hidden": 0, "loss.curriculum.1.weights.kd": 1}, 2),
        (FLAT, {"loss.curriculum.0.weights.hidden": 0}, 1),
        (FLAT, {"loss.weights.ce": 0.3, "training.empty": 3}, 2),
        (FLAT, {"training.activation_checkpointing_kwargs.use_reentrant": False, "seed": 3}, 2),
    ],
)
def test_only_the_lines_that_change_are_written_anew(text, changes, lines):
    after = rewritten(text, changes)
    before, now = text.splitlines(), after.splitlines()
    assert len([line for line in now if line not in before]) == lines
    assert [line for line in now if line in before] == [line for line in before if line in now]
    assert len([line for line in before if line not in now]) <= lines
    assert all(comment in after for comment in [line.split("#")[1] for line in before if "#" in line])
    assert yaml.safe_load(after) == _changed(yaml.safe_load(text), changes)


def _changed(raw, changes):
    """The same by plain dictionaries and lists."""
    for path, value in changes.items():
        *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        section = raw
        for key in way:
            section = section[key] if isinstance(key, int) else section.setdefault(key, {})
        section[last] = value
    return raw


def test_a_new_key_does_not_come_between_a_comment_and_its_section():
    after = rewritten(FLAT, {"loss.features": {"layers": "even"}, "training.optim": "sgd"})
    assert after.replace("  features:\n    layers: even\n", "").replace("  optim: sgd\n", "") == FLAT
    assert after.index("features:") < after.index("  weights:\n    kd")


def test_the_second_of_two_equal_keys_is_not_lost():
    with pytest.raises(ConfigError, match=r"cannot be changed in place: .*\n(.*\n)*found duplicate key"):
        rewritten("seed: 1\nseed: 2\n", {"seed": 3})


def test_findings_are_ordered_and_counted():
    some = [
        Finding(severity, f"a.{severity}", "what", "why", "fix")
        for severity in ("note", "warning", "critical", "warning")
    ]
    ordered = findings.ordered([*some, Finding("warning", "b", "what", "why", "fix", {"b": 1})])
    assert [each.severity for each in ordered] == ["critical", "warning", "warning", "note"]
    assert findings.text(ordered).startswith("1 critical, 2 warnings, 1 note")
    assert "--fix  b: 1" in findings.text(ordered)
    assert findings.text([]) == "no findings"
    assert findings.as_data(ordered)[2]["change"] == {"b": 1}


@pytest.mark.parametrize(
    ("severities", "usual", "strict"),
    [([], 0, 0), (["note"], 0, 0), (["note", "warning"], 0, 1), (["warning", "critical"], 2, 2)],
)
def test_the_exit_status_goes_by_the_gravest(severities, usual, strict):
    some = [Finding(severity, "a", "what", "why", "fix") for severity in severities]
    assert (findings.exit_status(some), findings.exit_status(some, strict=True)) == (usual, strict)
