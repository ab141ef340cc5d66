"""Teacher, untrained student, baseline and distilled student on the same held-out tokens, with intervals."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.config.run import Config
from kdlib.data.batches import Prepared
from kdlib.hardware import peak_memory, precision_of
from kdlib.losses.objective import EVAL_TERMS, row_sums
from kdlib.losses.signals import IGNORED, Signal, kept
from kdlib.metrics.bootstrap import Bootstrap, interval
from kdlib.models.efficiency import Batch, seconds_of
from kdlib.models.loading import device_of, parameters
from kdlib.models.teacher import LiveTeacher
from kdlib.runs.files import write_json
from kdlib.runs.folder import Run
from kdlib.tasks import base as tasks, classification as compare_classes
from kdlib.tasks.classification import measured_on, rule_of, student_in
from kdlib.tasks.question_answering import ChoiceTally

BATCH = 8  # rows per forward pass
METRICS = ("perplexity", "bits_per_byte", "kl_to_teacher", "agreement", "accuracy")


class Comparison:
    """Measures models one after another on the same rows, the teacher first: the others are held against it.

    Between models only the sums of each row are kept, and what the teacher said (its last hidden states).
    """

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device | str = "cpu",
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        """
        Args:
            prepared: its test rows, else its validation rows, and the choices of its questions are what the
                models are measured on.
            device: where the models are measured.
            resamples: of the bootstrap; each draws rows with replacement, the same for every model.
        """
        self.tokenizer, self.device = tokenizer, torch.device(device)
        self.prepared, self.rows = prepared, getattr(prepared, measured_on(prepared))
        every = list(self.rows)
        self.batches = [prepared.collate(every[i : i + BATCH]) for i in range(0, len(every), BATCH)]
        labels = [row for batch in self.batches for row in batch["labels"]]
        texts = tokenizer.batch_decode([row[row != IGNORED] for row in labels], skip_special_tokens=True)
        self.row_bytes = np.array([len(text.encode()) for text in texts], dtype=float)  # of what is predicted
        self.draws = Bootstrap(len(every), resamples, seed).times  # [resamples, rows] times drawn
        self.tally = (
            ChoiceTally(prepared, measured_on(prepared), resamples=resamples, seed=seed)
            if prepared.choices
            else None
        )
        self.said: list[Signal] = []  # by the teacher, batch by batch
        self.sums: dict[str, np.ndarray] = {}  # model -> [rows, measures + 1]
        self.facts: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, list[str]] = {}

    def add(
        self,
        name: str,
        load: Callable[[], PreTrainedModel],
        *,
        prompts: Sequence[Sequence[int]] = (),
        new_tokens: int = 32,
    ) -> None:
        """Load one model and measure it: quality on all rows, speed, memory, size, greedy continuations
        of the prompts.
        """
        with peak_memory(self.device) as peak:
            model = load().to(self.device)
            voice = tasks.voice_of(model, self.prepared)
            self.sums[name] = np.concatenate(
                [self._measure(number, voice) for number in range(len(self.batches))]
            )
            speed = forward_tokens_per_s(model, self.batches[0])
            if self.tally:
                self.tally.add(name, voice)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self.facts[name] = {
            "parameters": parameters(model),
            "size_on_disk_gib": size / 2**30,
            "forward_tokens_per_s": speed,
            "peak_memory_gib": peak.bytes / 2**30,
        }
        self.samples[name] = continuations(model, self.tokenizer, prompts, new_tokens) if prompts else []

    def _measure(self, number: int, voice: LiveTeacher) -> np.ndarray:
        """[rows, measures + 1] sums of one batch."""
        batch = {key: value.to(voice.model.device) for key, value in self.batches[number].items()}
        tokens = kept(batch["labels"])
        signal = voice(batch, tokens)
        if number == len(self.said):  # the first model, the teacher, is heard once
            self.said.append(signal)
        sums = row_sums(
            signal, self.said[number], tokens.targets, tokens.rows, row_count=len(batch["labels"])
        )
        return torch.stack(list(sums.values()), dim=1).cpu().double().numpy()

    def results(self) -> dict[str, Any]:
        """Everything as plain data: per model its figures with 95 % intervals, and every paired
        difference.
        """
        everything = np.ones((1, len(self.row_bytes)))
        found = {name: self._figures(sums, everything) for name, sums in self.sums.items()}
        resampled = {name: self._figures(sums, self.draws) for name, sums in self.sums.items()}
        figures = {name: {m: (found[name][m][0], resampled[name][m]) for m in METRICS} for name in found}
        findings: dict[str, Any] = {}
        if self.tally:
            of_choices, findings = self.tally.figures(), self.tally.findings()
            figures = {name: metrics | of_choices[name] for name, metrics in figures.items()}
        of_mistakes = findings.pop("on_teachers_mistakes", {})
        models = {
            name: {
                **{m: interval(*pair, share_of=self._share_of(name, m)) for m, pair in metrics.items()},
                **self.facts[name],
                **({"on_teachers_mistakes": of_mistakes[name]} if name in of_mistakes else {}),
            }
            for name, metrics in figures.items()
        }
        names = list(self.sums)
        pairs = [(a, b) for i, b in enumerate(names) for a in names[i + 1 :]]
        differences = [
            {
                "model": a,
                "against": b,
                "metric": m,
                **interval(*(x - y for x, y in zip(figures[a][m], figures[b][m], strict=True))),
            }
            for a, b in pairs
            for m in figures[a]
        ]
        return {
            "models": models,
            "differences": differences,
            "rows": len(self.row_bytes),
            "split": measured_on(self.prepared),
            **({"questions": len(self.tally.draws[0]), **findings} if self.tally else {}),
            "tokens": int(next(iter(self.sums.values()))[:, -1].sum()),
            "resamples": len(self.draws),
            "interval": "95 %, paired bootstrap over rows",
            "samples": self.samples,
        }

    def _share_of(self, name: str, metric: str) -> int | None:
        """Of how many questions a figure is the share; None where it is none, or certain as the teacher's
        agreement with itself.
        """
        is_share = metric == "choice_accuracy" or (
            metric == "choice_agreement" and name != next(iter(self.sums))
        )
        return len(self.tally.draws[0]) if self.tally and is_share else None

    def _figures(self, sums: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric for each draw of rows, [draws, rows] times each row is drawn: [draws]."""
        drawn = draws @ sums  # [draws, measures + 1]
        mean = dict(zip(EVAL_TERMS, (drawn[:, :-1] / drawn[:, -1:]).T, strict=True))
        nats, size = drawn[:, list(EVAL_TERMS).index("ce")], draws @ self.row_bytes
        perplexity, bits_per_byte = np.exp(mean.pop("ce")), nats / math.log(2) / size
        return {"perplexity": perplexity, "bits_per_byte": bits_per_byte, **mean}


def compare_run(
    run: Run, config: Config, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> dict[str, Any]:
    """Compare the models of a finished run and write its comparison_results.json.

    The students are the final ones, after equally many steps, and not those chosen on these very rows
    (best_model/); where there are test rows, on which nothing was chosen, they are the best.

    Args:
        config: the run's, with the teacher that taught in it.
    """
    if config.task == "sequence-classification":
        results = compare_classes.compare(run, config, tokenizer, prepared)
    else:
        results = _compare_tokens(run, config, tokenizer, prepared)
    write_json(run.path / "comparison_results.json", results)
    return results


def _compare_tokens(
    run: Run, config: Config, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> dict[str, Any]:
    device = device_of(config.wanted_device)
    dtype, _ = precision_of(config.precision, device)
    comparison = Comparison(
        prepared, tokenizer, device=device, resamples=config.compare.resamples, seed=config.seed
    )
    prompts = prompts_of(config, comparison.rows)

    def measure(name: str, load: Callable[[], PreTrainedModel]) -> None:
        print(f"measuring the {name} model …", flush=True)
        comparison.add(name, load, prompts=prompts, new_tokens=config.compare.new_tokens)

    measure("teacher", lambda: tasks.load(config.teacher.model, prepared, dtype))
    untrained = tasks.untrained_student(config, prepared, run.manifest["student_layers"]).to(dtype)
    # so that its memory is its own, not the teacher's that it is cut from
    measure("untrained", lambda: deepcopy(untrained))
    if config.baseline:
        measure("baseline", lambda: tasks.load(student_in(run.baseline, prepared), prepared, dtype))
    measure("distilled", lambda: tasks.load(student_in(run, prepared), prepared, dtype))
    return {
        "task": config.task,
        **comparison.results(),
        "prompts": tokenizer.batch_decode(prompts),
        "rule": rule_of(run.config, prepared),
        "precision": str(dtype).removeprefix("torch."),
    }


@torch.no_grad()
def forward_tokens_per_s(model: PreTrainedModel, batch: Batch, repeats: int = 2) -> float:
    """Tokens per second of a plain forward pass with logits, the best of a few; padding is no token."""
    inputs, seconds = (
        {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")},
        math.inf,
    )
    for _ in range(repeats):
        seconds = min(seconds, seconds_of(lambda: model(**inputs, use_cache=False), model.device))
    return int(inputs["attention_mask"].sum()) / seconds


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> list[str]:
    """Greedy continuations of prompts, each by itself unless all are of one length (so that nothing is
    padded).
    """
    if len(set(map(len, prompts))) > 1:
        return [text for prompt in prompts for text in continuations(model, tokenizer, [prompt], new_tokens)]
    ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def prompts_of(config: Config, rows: Dataset) -> list[list[int]]:
    """What the models are to continue: whole questions, or beginnings of text."""
    if config.task == "question-answering":
        return given_prompts(rows, count=config.compare.continuations)
    return prompts_from(rows, count=config.compare.continuations, length=config.compare.prompt_tokens)


def prompts_from(rows: Dataset, *, count: int, length: int) -> list[list[int]]:
    """The beginnings of `count` rows spread over the validation text, all of one length."""
    fit = [row["input_ids"] for row in rows if len(row["input_ids"]) >= length]
    return [list(fit[i * len(fit) // count][:length]) for i in range(min(count, len(fit)))]


def given_prompts(rows: Dataset, *, count: int) -> list[list[int]]:
    """What is given of `count` rows spread over the validation rows: their questions."""
    taken = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
    return [list(row["input_ids"][: row["prompt_tokens"]]) for row in taken]
