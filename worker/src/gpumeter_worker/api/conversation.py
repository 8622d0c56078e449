"""Reads a conversation: messages, the tools that may be called, and the calls and results that happened already.

Pure. Owns what a message may hold, and brings it into the form that chat templates read: the arguments of a call as an
object, a text as one string. Does not know whether the model's template takes tools; the tokenizer does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumeter_worker.api.errors import bad_parameter
from gpumeter_worker.api.fields import boolean, text

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOOLS = 128
_FIELDS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}
FIELDS = frozenset({"messages", "tools", "tool_choice", "parallel_tool_calls"})
"""The fields of a request that are read here."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template is given. `tools` is empty where none may be called."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]

    @property
    def speaks_of_tools(self) -> bool:
        """Whether a template must know tools to write this down."""
        return bool(self.tools) or any(one["role"] == "tool" or "tool_calls" in one for one in self.messages)


def read_conversation(values: Mapping[str, Any]) -> Conversation:
    """Raises Refused."""
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_parameter("messages", "messages must be a list of at least one message", "missing_required_parameter")
    return Conversation([_message(one, f"messages[{index}]") for index, one in enumerate(messages)], _tools(values))


def _message(message: object, at: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad_parameter(at, f"{at} must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_parameter(f"{at}.role", f"{at}.role must be one of {', '.join(ROLES)}")
    own = {"role", "content", "name"} | _FIELDS.get(role, set())
    if odd := sorted(name for name, value in message.items() if name not in own and value not in (None, [])):
        raise bad_parameter(
            f"{at}.{odd[0]:.64}", f"{odd[0]:.64} in a message is not supported", "unsupported_parameter"
        )
    read: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if calls := _calls(message.get("tool_calls"), f"{at}.tool_calls"):
        read["tool_calls"] = calls
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}.content[{index}]") for index, part in enumerate(content))
    if content is None and calls:
        content = ""  # templates concatenate it
    if not isinstance(content, str):
        raise bad_parameter(f"{at}.content", f"{at}.content must be a text")
    read["content"] = text(content, f"{at}.content")
    for name in ("name", "tool_call_id"):
        if (value := message.get(name)) is not None:
            if not isinstance(value, str):
                raise bad_parameter(f"{at}.{name}", f"{at}.{name} must be a text")
            read[name] = text(value, f"{at}.{name}")
    return read


def _part(part: object, at: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise bad_parameter(at, f"{at} must be a part of type text; other kinds are not supported", "unsupported_value")
    found: str = part["text"]
    return found


def _calls(calls: object, at: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise bad_parameter(at, f"{at} must be a list of calls")
    return [_call(call, f"{at}[{index}]") for index, call in enumerate(calls)]


def _call(call: object, at: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(function, dict):
        raise bad_parameter(at, f"{at} must be a call of a function: id, type and function")
    name, arguments, number = function.get("name"), function.get("arguments"), call.get("id")
    if not isinstance(name, str) or not name:
        raise bad_parameter(f"{at}.function.name", f"{at}.function.name must name the function")
    if not isinstance(number, str | None):
        raise bad_parameter(f"{at}.id", f"{at}.id must be a text")
    if isinstance(arguments, str):  # as OpenAI writes them; templates want the object
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise bad_parameter(
            f"{at}.function.arguments", f"{at}.function.arguments must be a JSON object, written as a text"
        )
    read = {"type": "function", "function": {"name": text(name, f"{at}.function.name"), "arguments": arguments}}
    return read if number is None else {"id": text(number, f"{at}.id"), **read}


def _tools(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = values.get("tools")
    if tools is None:
        tools = []
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise bad_parameter("tools", f"tools must be a list of at most {MAX_TOOLS} functions")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if (
            not isinstance(function, dict)
            or tool.get("type") != "function"
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            at = f"tools[{index}]"
            raise bad_parameter(at, f"{at} must be of type function, with a function that has a name")
    choice = values.get("tool_choice")
    if choice is not None and choice not in ("none", "auto"):
        raise bad_parameter(
            "tool_choice",
            'tool_choice must be "none" or "auto"; that a model calls a certain tool, or any, cannot be enforced here',
            "unsupported_value",
        )
    if values.get("parallel_tool_calls") is not None and not boolean(values, "parallel_tool_calls") and tools:
        raise bad_parameter(
            "parallel_tool_calls",
            "how many tools a model calls cannot be enforced here; leave parallel_tool_calls out",
            "unsupported_value",
        )
    return [] if choice == "none" else tools
