"""What one call of a chat model asks for: the model's fields, and what the call itself overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from avp_agents.agent.ladder import OnMissing
from avp_agents.agent.settings import AgentSettings, Mode, generate_options, think_options
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.errors import ConfigurationError
from avp_langgraph.tool_calling import Constraints

# What LangChain passes along that asks nothing of a local model: `stream` chose the method that was called.
_IGNORED = frozenset({"stream"})


class Call(AgentSettings):
    """One call's options.

    Attributes:
        model: Name or folder of the model; None is the default model.
        max_tokens, logprobs, stop, chat_template_kwargs: The engine's options of the same names.
        avp_context: The handle of a context to answer on.
        tools, tool_choice, parallel_tool_calls, response_format: See `Constraints`.
    """

    model: str | None
    max_tokens: int | None
    logprobs: int | None
    stop: Sequence[str] | None
    chat_template_kwargs: Mapping[str, Any] | None
    avp_context: object = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    response_format: Mapping[str, Any] | None = None

    def overridden(self, stop: Sequence[str] | None, options: Mapping[str, Any]) -> Call:
        """The call with the options that it was made with.

        Raises:
            ConfigurationError: An option is unknown, or out of range.
        """
        given = {name: value for name, value in options.items() if name not in _IGNORED}
        known = Call.model_fields.keys() - {"engine", "engine_options"}
        if unknown := sorted(given.keys() - known):
            raise ConfigurationError(f"Unknown option {unknown[0]!r}; a call knows {', '.join(sorted(known))}.")
        call = self.model_copy(update=given | ({} if stop is None else {"stop": stop}))
        if call.mode not in get_args(Mode):
            raise ConfigurationError(f"mode must be 'text' or 'latent', not {call.mode!r}.")
        if call.on_missing not in get_args(OnMissing):
            raise ConfigurationError(f"on_missing must be 'text' or 'error', not {call.on_missing!r}.")
        if call.latent_steps < 1:
            raise ConfigurationError(f"latent_steps must be at least 1, not {call.latent_steps}.")
        return call

    @property
    def constraints(self) -> Constraints:
        """What the answer may be.

        Raises:
            ConfigurationError: The tools, the choice or the format are malformed.
        """
        return Constraints(self.tools, self.tool_choice, self.parallel_tool_calls, self.response_format)

    def generate_options(self, source: str) -> GenerateOptions:
        """For `Engine.generate` and `Engine.stream`; without what `constraints` adds."""
        return generate_options(vars(self), source)

    def think_options(self, source: str) -> ThinkOptions:
        """For `Engine.think`."""
        return think_options(vars(self), source, self.constraints.definitions)
