"""What contexts of a model take, computed from its configuration; no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avp_agents.errors import ConfigurationError, ModelNotFoundError, UnsupportedModelError
from avp_agents.models import resolve_model

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine

READOUT_TOKENS = 256
"""Most likely next tokens that a readout holds, with their probabilities."""

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention")


@dataclass(frozen=True)
class ModelSizes:
    """What decides a context's size.

    Attributes:
        name: The hub id, or the folder's name.
        layers: Those that store keys and values.
        kv_heads: Heads of keys and values per layer.
        key_dim, value_dim: Width of one head's key and value.
        hidden: Width of an input embedding.
    """

    name: str
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    hidden: int

    @classmethod
    def of(cls, name_or_path: str | None) -> ModelSizes:
        """Of a hub id, a folder, or the default model for None.

        Raises:
            ModelNotFoundError: There is no configuration.
            UnsupportedModelError: Its layers keep something else than keys and values of all positions.
        """
        from transformers import AutoConfig

        folder = resolve_model(name_or_path)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(
                f"The configuration of {folder!r} cannot be read: {str(error).splitlines()[0]} "
                "Name a folder that holds a config.json, or a hub id that can be reached."
            ) from error
        return cls.from_config(
            Path(folder).name if Path(folder).is_dir() else folder, config.get_text_config(decoder=True)
        )

    @classmethod
    def from_config(cls, name: str, config: Any) -> ModelSizes:
        """Of a transformers configuration of a decoder.

        Raises:
            UnsupportedModelError: Its layers keep something else than keys and values of all positions.
        """
        others = set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION)
        heads = getattr(config, "num_attention_heads", None)
        if others or heads is None:
            kinds = ", ".join(sorted(others)) or "no attention heads"
            raise UnsupportedModelError(f"{name} has layers whose state is not a KV-cache ({kinds}).")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        key_dim = value_dim = head_dim
        if getattr(config, "kv_lora_rank", None):
            key_dim, value_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        layers = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
        return cls(name, layers, kv_heads, key_dim, value_dim, config.hidden_size)

    def kv_bytes(self, positions: int, *, int8: bool = False) -> int:
        """Bytes of the keys and values of so many positions: bfloat16, or int8 with float32 scales."""
        channels = self.layers * self.kv_heads * (self.key_dim + self.value_dim)
        return channels * (positions + 4) if int8 else channels * positions * 2

    def lineage_bytes(self, tokens: int, steps: int) -> int:
        """Bytes of token ids, bfloat16 embeddings of latent steps, and the readout after them."""
        readout = 2 * self.hidden + 8 * READOUT_TOKENS if steps else 0
        return 4 * tokens + 2 * steps * self.hidden + readout


@dataclass(frozen=True)
class ContextSize:
    """One context.

    Attributes:
        tokens, steps: Its positions.
        kv_bytes: bfloat16.
        kv_int8_bytes: int8.
        lineage_bytes: Without the few hundred bytes of each record's head.
    """

    tokens: int
    steps: int
    kv_bytes: int
    kv_int8_bytes: int
    lineage_bytes: int

    @classmethod
    def of(cls, model: ModelSizes, tokens: int, steps: int) -> ContextSize:
        """Of `tokens` token positions and `steps` latent ones.

        Raises:
            ConfigurationError: A context has at least one token, and no negative number of steps.
        """
        if tokens < 1 or steps < 0:
            raise ConfigurationError(f"A context has at least 1 token and 0 latent steps, not {tokens} and {steps}.")
        positions = tokens + steps
        return cls(
            tokens,
            steps,
            model.kv_bytes(positions),
            model.kv_bytes(positions, int8=True),
            model.lineage_bytes(tokens, steps),
        )

    def break_even(self, prefill: float, *, int8: bool = False) -> float:
        """Bits per second from which on moving the KV-cache is faster than moving the lineage and prefilling it.

        Args:
            prefill: Positions per second.
            int8: Move it as int8.
        """
        moved = self.kv_int8_bytes if int8 else self.kv_bytes
        return 8 * (moved - self.lineage_bytes) * prefill / (self.tokens + self.steps)

    def seconds(self, bits_per_second: float, prefill: float | None) -> dict[str, float]:
        """How long each way takes on a link: ``kv``, ``kv int8``, and ``replay`` where the prefill's speed is known."""
        taken = {"kv": self.kv_bytes, "kv int8": self.kv_int8_bytes}
        times = {mode: 8 * size / bits_per_second for mode, size in taken.items()}
        if prefill is not None:
            times["replay"] = 8 * self.lineage_bytes / bits_per_second + (self.tokens + self.steps) / prefill
        return times


def measure_prefill(engine: LatentEngine, tokens: int) -> float:
    """Positions per second of one prefill of about `tokens` positions on this machine; the faster of two runs."""
    speeds = []
    for run in range(2):
        # another beginning, so that nothing of the run before is reused
        context = engine.think(f"{run}" + " word" * tokens, steps=1)
        usage = context.usage
        assert usage is not None, "a context that was just made says what it cost"
        speeds.append((usage.prompt_tokens - usage.positions_reused) / usage.prefill_seconds)
    return max(speeds)
