"""What the chat models of all frameworks have in common: how to think, how to sample, and by which engine.

Needs pydantic, which the frameworks bring.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from avp_agents.agent.ladder import OnMissing
from avp_agents.context import LatentMethod
from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError

Mode = Literal["text", "latent"]
"""Whether to answer with text or with latent steps."""


class AgentSettings(BaseModel):
    """Fields of a chat model. Those that are None leave the engine's default."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    mode: Mode = "text"
    """``"text"`` decodes an answer. ``"latent"`` runs latent steps, and decodes nothing that nobody has to read: the
    answer is a short line for people that stands for the context."""

    latent_steps: int = 20
    """Latent steps in latent mode, at least 1; 10 to 20 are usual, more than 40 degrade."""

    latent_method: LatentMethod | None = None
    """``"soft"``, ``"ridge"`` or ``"rescale"``; by default what suits the model."""

    latent_k: int | None = None
    """Most likely tokens in the soft embedding."""

    temperature: float | None = None
    """0 is greedy."""

    top_p: float | None = None
    """Nucleus mass in (0, 1]."""

    top_k: int | None = None
    """Only so many most likely tokens; 0 is all."""

    min_p: float | None = None
    """Only tokens at least so many times as likely as the most likely one."""

    repetition_penalty: float | None = None
    """Penalty on ids that prompt and answer hold already; 1 is none."""

    seed: int | None = None
    """Seed of each request's own random stream."""

    timeout: float | None = None
    """Seconds until `RequestTimeoutError`, waiting in the queue included."""

    on_missing: OnMissing = "text"
    """When a context is lost, and no messages make up for it: ``"text"`` reads what text there is instead, with a
    warning; ``"error"`` raises `ContextLostError`."""

    engine_options: dict[str, Any] = Field(default_factory=dict)
    """JSON data for ``LatentEngine.from_pretrained``, such as ``{"dtype": "bfloat16", "device": "cuda"}``."""

    engine: SkipValidation[Engine | None] = Field(default=None, exclude=True, repr=False)
    """An engine to use instead of a shared one. It is not serialised with the model."""

    @classmethod
    def _refuse_options(cls, names: Iterable[object], *, besides: Iterable[str]) -> None:
        """Refuse options that are no fields: a misspelt one would otherwise be ignored.

        Raises:
            ConfigurationError: One is none, and not one of `besides`.
        """
        known = {*cls.model_fields, *besides}
        for name in names:
            if name not in known:
                close = get_close_matches(str(name), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ConfigurationError(f"{cls.__name__} has no option {name!r}.{hint}")

    def _agree_with(self, engine: Engine, *, model_field: str) -> None:
        """Take over model and namespace of an engine that was passed.

        Raises:
            ConfigurationError: A field says something else.
        """
        if self.engine_options:
            raise ConfigurationError(
                "engine_options are for an engine that is still to be made; leave out one of both."
            )
        engines_own = {model_field: engine.model_path, "namespace": engine.store.namespace.name}
        for name, value in engines_own.items():
            if getattr(self, name) not in (None, value):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}, but the engine's is {value!r}.")
            setattr(self, name, value)
