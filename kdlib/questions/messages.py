"""Conversations in the forms in which people keep them, as one: what a chat template reads.

What stands beside a message's role and content is kept for the template, or refused, by its name.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from kdlib.errors import shown
from kdlib.questions.choices import joined, text_of
from kdlib.questions.forms import Form
from kdlib.tokens.answers import Fault, Talk

ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool", "function")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"observation": "tool", "function_response": "tool", "function_call": "assistant"},
}  # a name that somebody uses → what a template calls it
LEARNED = ("weight", "train", "loss")  # of a message: whether it is learned (OpenAI; axolotl; ms-swift)
Message = dict[Any, Any]


def talk_in(form: Form, row: Mapping[str, Any], ignored: Collection[str]) -> tuple[Talk | None, str, str]:
    """A row of messages, or of prompt and response: as a conversation, what it asks, its last answer.

    The conversation is None where a text answers a text, and nothing stands beside them.

    Args:
        ignored: keys of messages that are not looked at.
    """
    columns = {ours: theirs[0] for ours, theirs in form.columns.items()}
    if "messages" in columns:
        messages = _messages(row[columns["messages"]], columns["messages"], ignored)
    else:
        prompt, response = row[columns["prompt"]], columns["response"]
        if len(form.columns["prompt"]) == 1 and isinstance(prompt, list):
            messages = _messages(prompt, columns["prompt"], ignored)
        else:
            messages = [{"role": "user", "content": joined(row, form.columns["prompt"])}]
        messages = _answered(messages, row[response], response, ignored)
    given = {ours: row[theirs] for ours, theirs in columns.items() if row[theirs] not in (None, "", [])}
    messages = _after(given.get("history"), messages)
    messages = _under(given.get("system"), messages)
    values = {**_options(given.get("chat_template_kwargs")), **_tools(given.get("tools"))}
    roles = [each["role"] for each in messages]
    said = [each.pop(LEARNED, True) for each in messages]
    learned = tuple(each for role, each in zip(roles, said, strict=True) if role == "assistant")
    if not any(learned) or roles[0] == "assistant":
        raise Fault(
            f"the roles are {', '.join(roles)}; needed is a beginning by someone else, and an answer of the "
            "assistant's that is to be learned"
        )
    first, last = roles.index("assistant"), len(roles) - 1 - roles[::-1].index("assistant")
    asked = "\n".join(each.get("content") or "" for each in messages[:first])
    talk = Talk(json.dumps(messages), learned, json.dumps(values))
    is_plain = "prompt" in columns and roles == ["user", "assistant"] and not values
    is_plain = is_plain and all(each.keys() == {"role", "content"} for each in messages)
    return None if is_plain else talk, asked, messages[last].get("content") or ""


def _messages(value: Any, column: str, ignored: Collection[str]) -> list[Message]:
    value = _read(value, column)
    if not isinstance(value, list) or not value:
        raise Fault(f"{column} = {shown(value)}; needed is a list of {{role, content}}")
    return [_message(each, f"message {number}", ignored) for number, each in enumerate(value)]


def _message(given: Any, what: str, ignored: Collection[str]) -> Message:
    """One as a template reads it: {"role", "content", …}, and {LEARNED: False} where it is not to be."""
    if not isinstance(given, Mapping):
        raise Fault(f"{what} = {shown(given)}; needed is {{role, content}}")
    message = {key: each for key, each in given.items() if each is not None and key not in ignored}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in message and ours in message:
            raise Fault(f"{what} has {theirs!r} and {ours!r}; needed is one of them")
        if theirs in message:
            message[ours] = message.pop(theirs)
    name = message.pop("role", None)
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise Fault(f"{what} = {shown(given)}; needed is {{role, content}} with a role of {', '.join(ROLES)}")
    role, content = ROLES[name.lower()], message.pop("content", None)
    if name.lower() == "function_call":
        content, message["function_call"] = None, _read(content, f"the call in {what}")
    calls = _calls(message, what)
    is_silent = calls and (content is None or content == "" or content == [])
    made: Message = {"role": role} if is_silent else {"role": role, "content": _content(content, what)}
    if not _is_learned(message, role, what):
        made[LEARNED] = False
    return {**made, **({"tool_calls": calls} if calls else {}), **message}


def _content(value: Any, what: str) -> str:
    """A text; of a list of parts the texts, a line each."""
    if not isinstance(value, list):
        return text_of(value, f"the content of {what}")
    texts = []
    for part in value:
        there = _whole(part) if isinstance(part, Mapping) else {}
        if there.get("type", "text") != "text" or not there.keys() <= {"type", "text"}:
            kind = there.get("type") or shown(part)
            raise Fault(f"{what} has a part of the type {kind}; kdlib reads texts: leave it out")
        texts.append(text_of(there.get("text"), f"a part of {what}"))
    return "\n".join(texts)


def _calls(message: Message, what: str) -> list[Any]:
    """The tools that a message calls, each {type, function: {name, arguments}}, arguments as a mapping."""
    calls = _read(message.pop("tool_calls", None) or [], f"tool_calls of {what}")
    calls = calls if isinstance(calls, list) else [calls]
    if (one := message.pop("function_call", None)) is not None:
        calls = [*calls, *(one if isinstance(one, list) else [one])]
    made = []
    for call in calls:
        call = _whole(call)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Fault(f"{what} calls {shown(call)}; needed is {{function: {{name, arguments}}}}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _read(arguments, f"the arguments in {what}") if arguments.strip() else {}
        rest = {key: each for key, each in call.items() if key in ("id", "type")}
        made.append({"type": "function", **rest, "function": {**function, "arguments": arguments}})
    return made


def _is_learned(message: Message, role: str, what: str) -> bool:
    """What a message says of itself; the assistant's are learned where they say nothing."""
    said = {key: message.pop(key) for key in LEARNED if key in message}
    for key, value in said.items():
        if value not in (0, 1):
            raise Fault(f"{key} of {what} is {shown(value)}; needed is 0 or 1, false or true")
        if value and role != "assistant":
            raise Fault(f"{key} of {what}, the {role}'s, is {value}; the assistant's alone are learned")
    return all(said.values())


def _answered(asked: list[Message], value: Any, column: str, ignored: Collection[str]) -> list[Message]:
    """What is asked, and its answer: a text, a message, or messages, which may begin with what is asked."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return [*asked, {"role": "assistant", "content": text_of(value, column)}]
    answer = _messages(value, column, ignored)
    if answer[: len(asked)] == asked:
        return answer
    if answer[0]["role"] != "assistant":
        raise Fault(f"{column} begins with the {answer[0]['role']}'s word, which is not what is asked")
    return [*asked, *answer]


def _after(history: Any, messages: list[Message]) -> list[Message]:
    """Earlier questions and answers, [[question, answer], …], before the messages."""
    before, history = [], _read(history or [], "history")
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f"history has {shown(pair)}; needed are pairs, [question, answer]")
        both = zip(("user", "assistant"), pair, strict=True)
        before += [{"role": r, "content": text_of(text, f"history {number}")} for r, text in both]
    return [*before, *messages]


def _under(system: Any, messages: list[Message]) -> list[Message]:
    """The messages after the system's word, which may stand in a column of its own."""
    if system is None:
        return messages
    first = {"role": "system", "content": text_of(system, "the system's word")}
    if messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0].get("content", "").strip() != first["content"].strip():
        raise Fault(f"the system's word is {shown(system)} in a column, and another in the messages")
    return messages


def _tools(value: Any) -> dict[str, Any]:
    tools = _whole(_read(value or [], "tools"))
    if not isinstance(tools, list) or not all(isinstance(each, Mapping) for each in tools):
        raise Fault(f"tools = {shown(tools)}; needed is a list of {{type: function, function: {{name, …}}}}")
    made = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return {"tools": made} if made else {}


def _options(value: Any) -> dict[str, Any]:
    options = _whole(_read(value or {}, "chat_template_kwargs"))
    if not isinstance(options, Mapping):
        raise Fault(f"chat_template_kwargs = {shown(options)}; needed is a mapping")
    return dict(options)


def _read(value: Any, what: str) -> Any:
    """What is written as JSON, where it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Fault(f"{what} is the text {shown(value)}, and no JSON: {error}") from None


def _whole(value: Any) -> Any:
    """Without the keys that a table fills with nothing, as all its rows have the same."""
    if isinstance(value, Mapping):
        return {key: _whole(each) for key, each in value.items() if each is not None}
    return [*map(_whole, value)] if isinstance(value, list) else value
