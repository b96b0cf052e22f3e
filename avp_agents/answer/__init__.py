"""Tools and structured output for any framework: what a model may call, and what it called.

calling = ToolCalling([ToolSpec("add", "Adds two numbers.", schema)], choice="any")
parser = calling.parser(engine.tool_format)
for chunk in engine.stream(messages, **calling.options(engine.tool_format)):
    for delta in parser.feed(chunk.text):
        ...                                        # TextDelta or CallDelta
for delta in parser.finish():
    ...
parser.text, parser.calls, parser.invalid_calls
"""

from avp_agents.answer.json_bounds import MAX_ARRAY_ITEMS, MAX_STRING_LENGTH, bounded_schema
from avp_agents.answer.structured_output import json_grammar, json_instruction
from avp_agents.answer.tool_calls import CallDelta, Delta, InvalidToolCall, TextDelta, ToolCall, ToolCallParser
from avp_agents.answer.tool_choice import MAX_CALLS, Choice, ToolCalling
from avp_agents.answer.tool_specification import ToolSpec

__all__ = [
    "MAX_ARRAY_ITEMS",
    "MAX_CALLS",
    "MAX_STRING_LENGTH",
    "CallDelta",
    "Choice",
    "Delta",
    "InvalidToolCall",
    "TextDelta",
    "ToolCall",
    "ToolCallParser",
    "ToolCalling",
    "ToolSpec",
    "bounded_schema",
    "json_grammar",
    "json_instruction",
]
