"""What one call of a chat model asks for: the model's fields, and what the call itself overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from avp_agents.context import LatentMethod
from avp_agents.engine.base import GenerateOptions, ThinkOptions
from avp_agents.errors import ConfigurationError
from avp_langgraph.handoffs import OnMissing

Mode = Literal["text", "latent"]

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
    timeout: float | None
    on_missing: OnMissing
    avp_context: object = field(default=None)

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

    def generate_options(self, source: str) -> GenerateOptions:
        """For `Engine.generate` and `Engine.stream`."""
        options: dict[str, Any] = {
            name: value for name in GenerateOptions.__annotations__ if (value := getattr(self, name, None)) is not None
        }
        return GenerateOptions(**options, source=source)

    def think_options(self, source: str) -> ThinkOptions:
        """For `Engine.think`."""
        options = {"method": self.latent_method, "k": self.latent_k, "timeout": self.timeout}
        return ThinkOptions(**{name: value for name, value in options.items() if value is not None}, source=source)
