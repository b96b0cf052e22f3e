"""A model's checkpoint, looked at without running it: its fingerprint, and rows of its embedding table.

The weights stay in their files. Each parameter of the (unallocated) transformers model becomes a view into the file
that holds it, so that computing a fingerprint reads the few pages that it samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from avp_agents.errors import ModelNotFoundError
from avp_agents.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def checkpoint_model(name: str, hub: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint, its parameters mapped from their files. It is good for looking at, not for running.

    Args:
        name: Hub name or folder.
        hub: Where files come from: ``revision``, ``token``, ``local_files_only``, ``cache_dir``.

    Raises:
        ModelNotFoundError: Neither folder nor hub has the weights.
    """
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if not _map_parameters(model, _mapped_tensors(name, hub)):
            # a checkpoint that transformers converts as it loads: its parameters are not those in the files
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **hub)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"The weights of {name!r} cannot be read here, and they are needed to tell which model this is: "
            f"{str(error).splitlines()[0]} Give a folder or hub name that has them, or the fingerprint that an engine "
            "with these weights reports (fingerprint=)."
        ) from error
    return model


def checkpoint_fingerprint(name: str, hub: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of the engine that runs these weights; see `avp_agents.fingerprint`.

    Raises:
        As `checkpoint_model`.
    """
    return model_fingerprint(checkpoint_model(name, hub), tokenizer)


def _mapped_tensors(name: str, hub: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint, by name; none of them is read yet."""
    index = _file(name, _INDEX, hub)
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index is not None else [_WEIGHTS]
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        if (file := _file(name, shard, hub)) is not None:
            with safe_open(str(file), framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a mapping)
    return tensors


def _file(name: str, filename: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a checkpoint; None where it has none of that name."""
    if Path(name).is_dir():
        file = Path(name) / filename
        return file if file.exists() else None
    try:
        return Path(hf_hub_download(name, filename, **hub))
    except EntryNotFoundError:
        return None


def _map_parameters(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Point each parameter to its tensor; whether all of them have one."""
    for name, parameter in list(model.named_parameters(remove_duplicate=True)):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != parameter.shape:
            return False
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    return True
