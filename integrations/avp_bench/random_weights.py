"""An engine of any shape with random weights, so that a model can be timed where no checkpoint is."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from avp_agents.engine.latent_engine import LatentEngine
from avp_agents.errors import ModelNotFoundError
from avp_agents.models import resolve_model
from avp_agents.store import MemoryStore


def random_engine(config_name: str, dtype: torch.dtype, device: str | None, capture_steps: bool | None) -> LatentEngine:
    """Build a model from its configuration alone, directly on its device.

    Args:
        config_name: Folder, ``config.json`` or hub name of a configuration.
        dtype: Of the weights.
        device: By default an accelerator if there is one.
        capture_steps: As `LatentEngine.from_pretrained` has it.

    Raises:
        ModelNotFoundError: There is no such configuration.
    """
    try:
        config = AutoConfig.from_pretrained(config_name)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"No configuration {config_name!r}: {str(error).splitlines()[0]}") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    target = torch.device(device or (accelerator.type if accelerator is not None else "cpu"))
    with target:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # the text does not matter here, only that ids exist: the default model's tokenizer has a chat template
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(None))
    return LatentEngine.from_model(model, tokenizer, store=MemoryStore(), capture_steps=capture_steps)
