"""A teacher in this process: prompts in batches, padded on the left; torch is loaded where it is used."""

import time
from collections.abc import Sequence
from typing import Any

from kdlib.generation.answers import Usage
from kdlib.generation.config import Local, Stage
from kdlib.generation.wires import NoReply, Reply
from kdlib.prompts.prompt import Prompt
from kdlib.tokens.templates import Refused, written

HOUR = 3600.0


def check(local: Local) -> None:
    """Raise a ModelError where there is no such model, or not that device; no weights are read."""
    from kdlib.models.loading import device_of, load_config

    device_of(local.device)
    load_config(local.model)


class LocalTeacher:
    """A causal language model with its sampling.

    Attributes:
        last_cost, next_cost: dollars of the last batch's time, and what the next one may take.
    """

    def __init__(self, stage: Stage):
        from kdlib.hardware import precision_of
        from kdlib.models.loading import device_of, load_model, load_tokenizer, positions_of
        from kdlib.models.saved import drawing

        local = stage.teacher.local
        assert local is not None
        device = device_of(local.device)
        self.name, self.seed, self.sampling = local.model, stage.seed, stage.sampling
        self.batch_size = local.batch_size
        self.model: Any = load_model(local.model, precision_of(local.precision, device)[0]).to(device)
        self.tokenizer: Any = load_tokenizer(local.model)
        self.positions = positions_of(self.model.config)
        how = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        how |= {"new_tokens": self.sampling.max_tokens, "stop": self.sampling.stop}
        self.drawing = drawing(self.model, self.tokenizer, **how)
        self.drawing["generation_config"].update(**self.sampling.extra)
        self.dollars = (stage.prices.hour or 0.0) / HOUR if stage.prices else 0.0  # a second
        self.last_cost = self.next_cost = 0.0

    def replies(self, prompts: Sequence[Prompt], number: int) -> list[Reply | NoReply]:
        """The answers to a batch, drawn by the seed and the batch's number alone."""
        began = time.monotonic()
        written = [self._written(prompt) for prompt in prompts]
        fit = [ids for ids in written if isinstance(ids, list)]
        said = iter(self._generated(fit, number) if fit else [])
        found = [ids if isinstance(ids, NoReply) else next(said) for ids in written]
        self.last_cost = self.dollars * (time.monotonic() - began)
        self.next_cost = max(self.next_cost, self.last_cost)
        return found

    def _written(self, prompt: Prompt) -> list[int] | NoReply:
        """A prompt's tokens, in the model's chat template where it has one."""
        try:
            if self.tokenizer.chat_template:
                text = written(self.tokenizer, prompt.as_sent(), begins=True)
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                ids = self.tokenizer("\n\n".join(text for _, text in prompt.messages))["input_ids"]
        except Refused as error:
            return NoReply(f"the model's chat template does not take these messages: {error}")
        room = None if self.positions is None else self.positions - self.sampling.max_tokens
        if room is not None and len(ids) > room:
            found = f"the prompt has {len(ids)} tokens"
            return NoReply(f"{found}, and the model {self.positions} positions, {room} beside an answer's")
        return ids

    def _generated(self, rows: Sequence[list[int]], number: int) -> list[Reply]:
        import torch

        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(self.seed * 1_000_003 + number)
            output = self.model.generate(input_ids=ids, attention_mask=mask, **self.drawing)
        return [self._reply(row, drawn) for row, drawn in zip(rows, output[:, width:].tolist(), strict=True)]

    def _reply(self, row: Sequence[int], drawn: list[int]) -> Reply:
        ends = self.drawing["generation_config"].eos_token_id or ()
        length = next((n for n, token in enumerate(drawn) if token in ends), None)
        text = self.tokenizer.decode(drawn[:length], skip_special_tokens=True)
        stopped = length is not None or any(text.endswith(stop) for stop in self.sampling.stop)
        for stop in self.sampling.stop:
            text = text.removesuffix(stop)
        count = len(drawn) if length is None else length + 1
        return Reply(text, "stop" if stopped else "length", Usage(len(row), count), self.name)
