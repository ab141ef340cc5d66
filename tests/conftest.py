"""A tiny teacher with a tokenizer of its own, as local folders of the form that a hub gives."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny models gain nothing from threads, and lose much where others compute beside them
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from browser import CHROMIUM, QUIET, answers, asked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdlib.runs.folder import project_root
from kdlib.runs.processes import PARENT

WORDS = [
    "the",
    "a",
    "student",
    "teacher",
    "learns",
    "says",
    "what",
    "it",
    "sees",
    "when",
    "words",
    "come",
    "back",
    "again",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(6, 30))) + f" {i}." for i in range(count)]


def tiny_tokenizer(texts: list[str], size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tiny_model(vocabulary: int = 300, layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def kd_process(*words: object, module: str = "kdlib", **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        text=True,
        cwd=project_root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every worker begins with its part of the long ones, those that share what took long in one part: at the
    end no one waits.

    A worker gets a stretch of the list, and one that has nothing left takes tests from the end of another's.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long: dict[object, list[pytest.Item]] = {}
    short = []
    for item in items:
        if item.get_closest_marker("together"):
            long.setdefault(item.path, []).append(item)
        elif item.get_closest_marker("slow"):
            long[item] = [item]
        else:
            short.append(item)
    parts, ends = list(long.values()), [len(short) * worker // workers for worker in range(workers + 1)]
    items[:] = [
        item
        for worker in range(workers)
        for item in [*chain(*parts[worker::workers]), *short[ends[worker] : ends[worker + 1]]]
    ]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """The tiny teacher: 4 layers, tied embeddings, a head padded from its tokenizer's 300 rows to 320."""
    folder = tmp_path_factory.mktemp("tiny-teacher")
    tokenizer = tiny_tokenizer(sentences(200))
    tiny_model(vocabulary=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copied_teacher(teacher_folder, tmp_path) -> Path:
    """The tiny teacher's files, to be changed."""
    return shutil.copytree(teacher_folder, tmp_path / "copied-teacher")


def narrow_student(teacher_folder: Path, folder: Path) -> str:
    """A student of its own, written to the folder: smaller hidden size, other head counts, an untied head."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            eos_token_id=0,
            bos_token_id=0,
            initializer_range=0.3,
        )
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(teacher_folder).save_pretrained(folder)
    return str(folder)


def other_tokens(folder: Path, size: int = 280) -> str:
    """A student of its own with other tokens than the tiny teacher's, written to the folder."""
    tiny_model(size, layers=2, seed=5).save_pretrained(folder)
    tiny_tokenizer(sentences(200, seed=9), size).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def predictions():
    """Of a tiny teacher, student and baseline, on 40 tokens."""
    from made_predictions import predictions  # which needs what stands here

    return predictions()


@pytest.fixture
def facts():
    """The same as explorers.json has them."""
    from made_predictions import facts

    return facts()


@pytest.fixture
def endpoint(monkeypatch):
    """A teacher's endpoint on loopback; the environment has a key for it."""
    from made_generations import KEY
    from made_teacher import made_teacher

    monkeypatch.setenv("MADE_API_KEY", KEY)
    with made_teacher() as made:
        yield made


@pytest.fixture
def generations(tmp_path, endpoint):
    """Configs and runs of `kd generate` with that endpoint."""
    from made_generations import Generations

    return Generations(tmp_path, endpoint.url)


@pytest.fixture
def narrow(teacher_folder, tmp_path) -> str:
    return narrow_student(teacher_folder, tmp_path / "narrow")


@pytest.fixture
def raw_config(teacher_folder, tmp_path) -> dict:
    return tiny_experiment(teacher_folder, tmp_path)


def tiny_experiment(teacher_folder: Path, folder: Path) -> dict:
    """A complete tiny experiment as plain data, its text in the folder: 12 steps, seconds on a CPU."""
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "{line}"}}\n' for line in sentences(120, seed=1)))
    return {
        "teacher": {"model": str(teacher_folder)},
        "student": {"from": "teacher", "layers": 2},
        "data": {"source": str(text), "packing": True, "max_length": 16, "max_eval_rows": 10},
        "loss": {"temperature": 2.0, "weights": {"kd": 0.7, "ce": 0.3}},
        "baseline": {"weights": {"ce": 1.0}},
        "precision": "float32",
        "training": {
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "save_total_limit": 2,
            "use_cpu": True,
        },
        "compare": {"resamples": 100, "continuations": 2, "prompt_tokens": 6, "new_tokens": 4},
    }


@pytest.fixture
def config_file(raw_config, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    return path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
    yield browser
    browser.close()
    playwright.stop()


@pytest.fixture
def project(raw_config, tmp_path) -> Path:
    """A project folder of one's own: our notebooks, a tiny config by the name that they start with."""
    folder = tmp_path / "project"
    shutil.copytree(
        project_root() / "notebooks",
        folder / "notebooks",
        ignore=shutil.ignore_patterns(".ipynb_checkpoints"),
    )
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(raw_config))
    return folder


@pytest.fixture
def theme() -> str:
    """JupyterLab's; a test may parametrize it."""
    return "JupyterLab Light"


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    """JupyterLab on all that this process's tests write; gives its address and its folder of settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = tmp_path_factory.mktemp("settings") / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    words = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=t"]
    environment = {name: value for name, value in os.environ.items() if name != PARENT}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyter",
            "lab",
            *words,
            f"--ServerApp.root_dir={tmp_path_factory.getbasetemp()}",
        ],
        env={**environment, "JUPYTERLAB_SETTINGS_DIR": str(settings.parent.parent)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not answers(port):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}", settings
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=30)


@pytest.fixture
def lab(jupyter, project, theme, tmp_path_factory):
    """JupyterLab on that project; gives its address there.  No kernel outlives the test."""
    address, settings = jupyter
    (settings / "themes.jupyterlab-settings").write_text(f'{{"theme": "{theme}"}}')
    yield f"{address}/lab/tree/{project.relative_to(tmp_path_factory.getbasetemp())}"
    for session in asked(f"{address}/api/sessions"):
        asked(f"{address}/api/sessions/{session['id']}", "DELETE")
