"""Loading a Hugging Face model so that the engine can run it: placement, checks, and the one forward call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.utils.quantization_config import GgufConfig

from avp_agents.engine.core import attention
from avp_agents.engine.core.attention import Layout, Row
from avp_agents.engine.core.kv_pool import LayerShape
from avp_agents.engine.core.latent_step import Vocabulary
from avp_agents.engine.core.model import Forward, LoadedModel
from avp_agents.engine.loading.packed_linear import can_pack, pack_linears
from avp_agents.errors import AvpError, ConfigurationError, ModelNotFoundError, UnsupportedModelError
from avp_agents.fingerprint import model_fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKED_ROWS = 8


@dataclass(frozen=True)
class TokenizerFiles:
    """What is known of a model before its weights are needed.

    Attributes:
        tokenizer: Its tokenizer.
        window: Positions the model supports.
        eos_ids: Ids that end a sequence, as the model's generation config says.
    """

    tokenizer: PreTrainedTokenizerBase
    window: int
    eos_ids: frozenset[int]


def load_model(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    device: str | None,
    dtype: str | None,
    adapters: Sequence[str],
    options: Mapping[str, Any],
    *,
    pack: bool,
) -> LoadedModel:
    """Load, check and prepare a decoder-only model.

    Args:
        name_or_path: Hub name or folder.
        tokenizer: Its tokenizer.
        device: Where to run; by default an accelerator if there is one. Not together with ``device_map``.
        dtype: By default what the checkpoint says, float32 where the CPU has no fast bfloat16.
        adapters: LoRA adapters (folders or hub names), attached in order.
        options: Passed to transformers: revision, token, local_files_only, device_map, quantization_config, ...
        pack: Lay the weights out for the CPU's matrix kernels, where it has them.

    Raises:
        ModelNotFoundError: Neither folder nor hub has it.
        UnsupportedModelError: The architecture cannot be represented exactly.
    """
    if options.get("trust_remote_code"):
        raise ConfigurationError("trust_remote_code is off: the engine runs only model code that transformers ships.")
    device_map = options.get("device_map")
    if device is not None and device_map is not None:
        raise ConfigurationError("Give device or device_map, not both.")
    target = torch.device(device) if device is not None else _default_device()
    try:
        config = AutoConfig.from_pretrained(name_or_path, **_hub_options(options))
        _refuse(config, name_or_path)
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=_choose_dtype(dtype, config, target),
            attn_implementation="eager",
            **_with_plain_gguf_weights(options),
        )
    except AvpError:
        raise
    except (OSError, ValueError) as error:
        raise _explain(error, name_or_path) from error
    for adapter in adapters:
        model.load_adapter(adapter)
    if device_map is None and not getattr(model, "is_quantized", False):
        torch.nn.Module.to(model, target)
    return prepare(model.eval(), tokenizer, pack=pack)


def load_tokenizer(name_or_path: str, options: Mapping[str, Any]) -> TokenizerFiles:
    """Everything but the weights.

    Raises:
        ModelNotFoundError: Neither folder nor hub has it.
        UnsupportedModelError: The configuration does not say how many positions the model supports.
    """
    hub = _hub_options(options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
        config = AutoConfig.from_pretrained(name_or_path, **hub)
    except (OSError, ValueError) as error:
        raise _explain(error, name_or_path) from error
    return TokenizerFiles(tokenizer, window(config, name_or_path), eos_ids(_declared_eos(name_or_path, hub), tokenizer))


def prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, pack: bool) -> LoadedModel:
    """Fingerprint a placed model, pack its weights where that pays, and see what its layers store.

    Raises:
        UnsupportedModelError: The architecture cannot be represented exactly.
    """
    model.requires_grad_(False)
    _use_pooled_attention(model)
    fingerprint = model_fingerprint(model, tokenizer)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = embedding.weight
    assert isinstance(table, torch.Tensor)
    head_weight = head.weight if type(head) is nn.Linear else None
    vocabulary = Vocabulary(
        embed=embedding,
        head=head_weight,
        size=min(len(tokenizer), table.shape[0]),
        tied=head_weight is not None and head_weight.data_ptr() == table.data_ptr(),
        device=table.device,
    )
    if pack and can_pack(table.device, model.dtype):
        pack_linears(model, PACKED_ROWS)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        dtype=model.dtype,
        device=table.device,
        shapes=_layer_shapes(model, vocabulary),
        vocabulary=vocabulary,
        weight_bytes=weight_bytes,
    )


class _RecordingLayer(CacheLayerMixin):
    """Notes the shapes that a layer would store."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[LayerShape] = []
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        heads, _, dim = key_states.shape[1:]
        shape = LayerShape(heads, dim, value_states.shape[-1], key_states.device, key_states.dtype)
        self.shapes.append(shape)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


@torch.inference_mode()
def _layer_shapes(model: PreTrainedModel, vocabulary: Vocabulary) -> tuple[LayerShape, ...]:
    """What every layer stores, seen by running one position.

    Raises:
        UnsupportedModelError: Some layer keeps a state that is not one key and one value per position.
    """
    layers = [_RecordingLayer() for _ in range(model.config.get_text_config().num_hidden_layers)]
    position = torch.zeros(1, dtype=torch.int64, device=vocabulary.device)
    layout = Layout(slots=position, rows=(Row(0, 1, 0, 1),))
    try:
        Forward(model)(vocabulary.rows(0, 1), position, None, Cache(layers=list(layers)), layout)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on the engine's KV pool ({type(error).__name__}: {error})."
        ) from error
    wrong = [index for index, layer in enumerate(layers) if len(layer.shapes) != 1]
    if wrong:
        raise UnsupportedModelError(
            f"{type(model).__name__}: layers {wrong} keep something other than one key and one value per position "
            "(a recurrent state, or another layer's cache); the engine would not represent it exactly."
        )
    return tuple(layer.shapes[0] for layer in layers)


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(accelerator.type) if accelerator is not None else torch.device("cpu")


def _choose_dtype(dtype: str | torch.dtype | None, config: Any, device: torch.device) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigurationError(f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if dtype is not None:
        return dtype
    saved = getattr(config, "dtype", None) or torch.float32
    if device.type == "cpu" and saved is not torch.float32:
        return torch.bfloat16 if can_pack(device, torch.bfloat16) else torch.float32
    return saved


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that concern where files come from."""
    names = ("revision", "token", "local_files_only", "cache_dir", "gguf_file")
    return {name: options[name] for name in names if name in options}


def _with_plain_gguf_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """Packed GGUF weights are several times slower per step than the same weights dequantised at load."""
    if "gguf_file" in options and "quantization_config" not in options:
        return {**options, "quantization_config": GgufConfig(dequantize=True)}
    return dict(options)


def _use_pooled_attention(model: PreTrainedModel) -> None:
    attention.register()
    try:
        model.set_attn_implementation(attention.IMPLEMENTATION)
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no exchangeable attention, so it cannot run on the engine's KV pool."
        ) from error


def _refuse(config: Any, name: str) -> None:
    """What the configuration alone rules out."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; the engine runs decoder-only models.")
    if config.get_text_config().to_dict().get("hidden_size_per_layer_input"):
        raise UnsupportedModelError(
            f"{name} looks up an embedding of the token in every layer, and a latent position has no token."
        )


def _explain(error: Exception, name: str) -> AvpError:
    if "Unrecognized configuration class" in str(error):
        return UnsupportedModelError(f"{name} is not a causal language model: {str(error).splitlines()[0]}")
    return ModelNotFoundError(
        f"Cannot load {name!r}: {str(error).splitlines()[0]} Check the name, the folder or the network."
    )


def window(config: Any, name: str) -> int:
    """Positions a model supports.

    Raises:
        UnsupportedModelError: Its configuration does not say.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is None:
        raise UnsupportedModelError(f"{name}: the configuration does not say how many positions the model supports.")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # beyond this length all rotations change, so keys that are in a cache already would no longer fit
        positions = min(positions, rope.get("original_max_position_embeddings") or positions)
    return int(positions)


def eos_ids(declared: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a sequence: as declared by a generation config, else the tokenizer's own."""
    declared = tokenizer.eos_token_id if declared is None else declared
    ids = declared if isinstance(declared, list | tuple) else [declared]
    return frozenset(int(i) for i in ids if i is not None)


def _declared_eos(name: str, hub: Mapping[str, Any]) -> Any:
    files = {key: value for key, value in hub.items() if key != "gguf_file"}
    try:
        return GenerationConfig.from_pretrained(name, **files).eos_token_id
    except OSError:
        return None
