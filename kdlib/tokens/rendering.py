"""A program of its own that renders chat templates, within limits; kdlib.tokens.templates asks it.

A template is a program by whoever made the model.  Its sandbox (jinja2's, as transformers sets it up) keeps
it from files and from Python, not from loops within loops, recursion, or texts of gigabytes.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

with contextlib.suppress(ImportError):  # not on Windows, where nothing is limited
    import resource

MEMORY = 2 * 2**30  # bytes that it may take beside what it has
LONGEST = 2_000_000  # characters of a text, and ten times as many as are given
# what a template can raise beside its own errors, by what it adds, looks up, counts, or calls
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
BOUNDS = (MemoryError, RecursionError)


def shown(
    template: str, messages: list[dict[str, Any]], cuts: list[list[Any]], values: dict[str, Any], marks: bool
) -> dict[str, Any]:
    """The conversation's first so many messages, for each cut, as the template has them.

    Args:
        cuts: [how many messages, whether the beginning of an answer follows].
        values: what the template reads beside the messages.
        marks: whether to find what the template marks as the assistant's, in the first of the cuts.

    Returns:
        {"texts", "spans": [[start, end], …]}, or {"error"}, of these messages, or {"bound"}, that it came to.
    """
    most = max(LONGEST, 10 * len(json.dumps([messages, values])))
    texts, spans = [], []
    for number, (count, begins) in enumerate(cuts):
        how = {"chat_template": template, "add_generation_prompt": begins}
        how["return_assistant_tokens_mask"] = marks and not number
        try:
            (text,), found = render_jinja_template(conversations=[messages[:count]], **how, **values)
        except TemplateError as error:
            return {"error": str(error)[:1000]}
        except BOUNDS as error:
            return {"bound": type(error).__name__}
        except FAULTS as error:
            return {"error": f"{type(error).__name__}: {error}"[:1000]}
        if len(text) > most:
            return {"bound": f"it makes {len(text):,} characters of one conversation"}
        texts.append(text)
        spans += found[0] if found and not number else []
    return {"texts": texts, "spans": spans}


def limit(name: str, most: int) -> None:
    """Set a limit of this process, within what it has already."""
    if "resource" in globals():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    limit("CORE", 0)
    if (sizes := Path("/proc/self/statm")).exists():  # Linux; elsewhere addresses cannot be limited
        limit("AS", int(sizes.read_text().split()[0]) * resource.getpagesize() + MEMORY)
    for line in sys.stdin:
        asked, answers = json.loads(line), []
        for each in asked["asked"]:
            limit("CPU", int(time.process_time()) + 1 + asked["seconds"] * (1 + len(each["cuts"]) // 20))
            answers.append(shown(**each))
            if "bound" in answers[-1]:
                break
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
