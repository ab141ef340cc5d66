"""Harder variants of prompts, by the teacher: Evol-Instruct for code, https://arxiv.org/abs/2306.08568.

A round is asked like any other prompts, through the same log and budget: `asked` makes what is asked of each,
and `evolved` what the answer is.
"""

import random
import re
from dataclasses import replace

from kdlib.config.sections import read_beside
from kdlib.prompts.prompt import Prompt

TABLE = read_beside(__file__)
EVOLVED = "+evolved"  # behind the name of the template
SHORTEST = 20  # characters of a task
ECHO = re.compile(r"given task|new task|increase the difficulty|the following method", re.IGNORECASE)


def asked(prompt: Prompt, draw: int) -> Prompt:
    """What asks for a harder variant of a prompt; its method is drawn by the number and the text."""
    task = prompt.messages[-1][1]
    method = random.Random(f"{draw}/{task}").choice([*TABLE["methods"]])
    text = TABLE["ask"].format(method=TABLE["methods"][method], task=task).strip()
    return Prompt((("user", text),), prompt.category, f"evolve/{method}", prompt.seed)


def evolved(prompt: Prompt, answer: str, finish: str = "stop") -> Prompt | None:
    """The harder variant of a prompt that an answer gives, or None where it gives none.

    It gives none where it is cut off, refused, too short, the same as before, or repeats what was asked.
    The prompt's tests are not the variant's, and are left out.
    """
    text, task = answer.strip(), prompt.messages[-1][1]
    is_echo = ECHO.search(text) and not ECHO.search(task)
    if finish in ("length", "refusal") or len(text) < SHORTEST or text == task.strip() or is_echo:
        return None
    messages = (*prompt.messages[:-1], ("user", text))
    return replace(prompt, messages=messages, template=f"{prompt.template}{EVOLVED}", tests="")
