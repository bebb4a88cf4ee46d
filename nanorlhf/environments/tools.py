"""Tools as an environment: functions that a model calls in <tool_call> tags, as Qwen's and Hermes' templates ask."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from transformers.utils.chat_template_utils import get_json_schema

from nanorlhf.errors import UsageError
from nanorlhf.system.user_code import from_file, is_file_spec

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class ToolCalls:
    """Answers calls until a message has none; what an episode is worth is left to the rewards."""

    role = "tool"
    functions: ClassVar[dict[str, Callable[..., Any]]]

    def reset(self, **_: Any) -> None:
        """Nothing to prepare: functions know what they know."""

    def step(self, completion: str) -> tuple[str, float, bool]:
        calls = CALL.findall(completion)
        return "\n".join(map(self.result, calls)), 0.0, not calls

    def result(self, call: str) -> str:
        """The result of a function, or what is wrong with the call, for the model to read."""
        try:
            asked = json.loads(call)
            return str(self.functions[asked["name"]](**asked.get("arguments", {})))
        except Exception as error:  # noqa: BLE001  the model may ask for anything, and a tool may raise anything
            return f"error: {type(error).__name__}: {error}"


def tool_environment(tools: Sequence[Any]) -> tuple[type[ToolCalls], list[dict[str, Any]]]:
    """The environment of these functions, or of `path/to/file.py:function`, and how a template describes them."""
    for tool in tools:
        if isinstance(tool, str) and not is_file_spec(tool):
            raise UsageError(f"tools={tool!r}: say path/to/file.py:function")
    functions = [from_file(tool) if isinstance(tool, str) else tool for tool in tools]
    named = {function.__name__: function for function in functions}
    try:
        schemas = [get_json_schema(function) for function in functions]
    except Exception as error:  # of a dozen kinds, each about a missing hint or docstring
        raise UsageError(f"tools need type hints and a docstring with Args: {error}") from error
    return cast(type[ToolCalls], type("Tools", (ToolCalls,), {"functions": named})), schemas
