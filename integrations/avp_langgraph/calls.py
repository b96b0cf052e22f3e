"""What one call of a chat model asks for: the model's fields, and what the call itself overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from avp_agents.agent.ladder import OnMissing
from avp_agents.agent.settings import Mode, generate_options, think_options
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.context import LatentMethod
from avp_agents.errors import ConfigurationError
from avp_langgraph.tool_calling import Constraints

# What LangChain passes along that asks nothing of a local model: `stream` chose the method that was called.
_IGNORED = frozenset({"stream"})


@dataclass(frozen=True)
class Call:
    """One call's options. Where one is None, the engine's default holds.

    Attributes:
        model: Name or folder of the model; None is the default model.
        mode: Whether to answer with text or with latent steps.
        latent_steps, latent_method, latent_k: How to think.
        temperature, ..., timeout: The engine's options of the same names.
        on_missing: What to do about a context that is lost.
        avp_context: The handle of a context to answer on.
        tools, tool_choice, parallel_tool_calls, response_format: See `Constraints`.
    """

    model: str | None
    mode: Mode
    latent_steps: int
    latent_method: LatentMethod | None
    latent_k: int | None
    temperature: float | None
    max_tokens: int | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    logprobs: int | None
    stop: Sequence[str] | None
    chat_template_kwargs: Mapping[str, Any] | None
    timeout: float | None
    on_missing: OnMissing
    avp_context: object = field(default=None)
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigurationError(f"mode must be 'text' or 'latent', not {self.mode!r}.")
        if self.on_missing not in get_args(OnMissing):
            raise ConfigurationError(f"on_missing must be 'text' or 'error', not {self.on_missing!r}.")
        if self.latent_steps < 1:
            raise ConfigurationError(f"latent_steps must be at least 1, not {self.latent_steps}.")

    def overridden(self, stop: Sequence[str] | None, options: Mapping[str, Any]) -> Call:
        """The call with the options that it was made with.

        Raises:
            ConfigurationError: An option is unknown, or out of range.
        """
        given = {name: value for name, value in options.items() if name not in _IGNORED}
        known = {option.name for option in fields(Call)}
        if unknown := sorted(given.keys() - known):
            raise ConfigurationError(f"Unknown option {unknown[0]!r}; a call knows {', '.join(sorted(known))}.")
        if stop is not None:
            given["stop"] = stop
        return replace(self, **given)

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
