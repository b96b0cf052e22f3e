"""What LangChain calls a model's profile: how much it can read, and of what. Loads neither weights nor tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from langchain_core.language_models.model_profile import ModelProfile

from avp_agents.models.embedded import default_model_status


def model_profile(name: str, window: int | None) -> ModelProfile:
    """The profile of a local text model.

    Args:
        name: Its name, for people.
        window: Positions it supports; None where that is not known yet.
    """
    profile = ModelProfile(
        name=name, open_weights=True, text_inputs=True, text_outputs=True, image_inputs=False, audio_inputs=False,
        video_inputs=False, pdf_inputs=False, image_outputs=False, audio_outputs=False, video_outputs=False,
        tool_calling=True, tool_choice=True, structured_output=True,
    )  # fmt: skip
    if window is not None:
        profile["max_input_tokens"] = profile["max_output_tokens"] = window
    return profile


def declared_window(model: str | None, revision: str | None = None) -> int | None:
    """Positions that a model's configuration promises, if the configuration is on this machine. Fetches nothing.

    Args:
        model: A folder or a hub id; None is the default model.
        revision: The hub id's revision.
    """
    path = _configuration(default_model_status().model if model is None else model, revision)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads the model says so
        return None
    return _window(config) if isinstance(config, dict) else None


def _configuration(model: str, revision: str | None) -> Path | None:
    inside = Path(model).expanduser() / "config.json"
    if inside.is_file():
        return inside
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # neither a folder nor a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _window(config: Mapping[str, Any]) -> int | None:
    """As `avp_agents.engine.loading.load.window` of the same configuration."""
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(rope, dict) and "longrope" in (rope.get("rope_type"), rope.get("type")):
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        positions = min(positions, original) if positions and original else positions
    return positions if isinstance(positions, int) else None
