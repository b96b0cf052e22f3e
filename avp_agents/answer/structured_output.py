"""Structured output: answers that are JSON of a given schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from avp_agents.answer.grammar import Grammar
from avp_agents.answer.json_bounds import bounded_schema


def json_grammar(schema: Mapping[str, Any], *, strict: bool = False) -> Grammar:
    """A grammar for answers that are JSON of a schema, within limits (`bounded_schema`).

    Args:
        schema: A JSON schema.
        strict: Refuse keywords that cannot be enforced instead of leaving them out.

    Raises:
        GrammarError: The schema is not JSON data.
    """
    return Grammar.json_schema(bounded_schema(schema), strict=strict)


def json_instruction(schema: Mapping[str, Any]) -> str:
    """A sentence that tells the model what its answer has to look like; the grammar alone would not show it."""
    return f"Answer with JSON that fits this JSON schema:\n{json.dumps(schema, ensure_ascii=False)}"
