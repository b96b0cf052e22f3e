"""Whom the reference SDK believes to talk to: its hello, and its hashes of models and tokenizers.

The SDK's model hash is one of the configuration, path and library version included; it does not see weights. It is
written for the SDK's sake and never trusted here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from avp_agents.errors import ForeignMessageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SDK_VERSION = "0.6.2"


def model_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, as ``config.to_dict()`` has it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tokenizer_hash(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 of a vocabulary, as ``tokenizer.get_vocab()`` has it."""
    pairs = [list(pair) for pair in sorted(vocabulary.items())]
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class SdkIdentity:
    """A model, as the SDK describes it.

    Attributes:
        model_family: The architecture's ``model_type``.
        model_id: Name or path it was loaded from.
        model_hash: See `model_hash`.
        hidden_dim, num_layers, num_kv_heads, head_dim: Of the architecture.
        tokenizer_hash: See `tokenizer_hash`; empty where unknown.
    """

    model_family: str = ""
    model_id: str = ""
    model_hash: str = ""
    hidden_dim: int = 0
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    tokenizer_hash: str = ""

    @classmethod
    def from_config(cls, config: PretrainedConfig, vocabulary: Mapping[str, int] | None = None) -> Self:
        """The identity of a model that the SDK's format can carry.

        Raises:
            ForeignMessageError: It has sliding windows, or layers without keys and values, which the format has no
                place for; or it is a composite of several models.
        """
        described = config.to_dict()
        if config.get_text_config() is not config:
            raise ForeignMessageError("The SDK does not describe composite models; send frames instead.")
        if not _all_layers_are_full(described):
            raise ForeignMessageError(
                f"Some layers of {described.get('model_type')} see a sliding window, or have no keys and values; the "
                "SDK's format has no place for that. Send frames instead."
            )
        heads = _first(described, "num_attention_heads", "n_head")
        hidden = _first(described, "hidden_size", "n_embd")
        return cls(
            model_family=described.get("model_type") or "",
            model_id=getattr(config, "_name_or_path", "") or "",
            model_hash=model_hash(described),
            hidden_dim=hidden,
            num_layers=_first(described, "num_hidden_layers", "n_layer"),
            num_kv_heads=_first(described, "num_key_value_heads") or heads,
            head_dim=_first(described, "head_dim") or (hidden // heads if heads else 0),
            tokenizer_hash=tokenizer_hash(vocabulary) if vocabulary else "",
        )


@dataclass(frozen=True)
class SdkHello:
    """What the SDK's two sides tell each other first.

    Attributes:
        agent_id: The sender's name.
        version: The SDK's version that the sender speaks.
        capabilities: What the sender offers; the SDK leaves it empty.
        identity: The sender's model, None where it has none.
    """

    agent_id: str
    version: str = SDK_VERSION
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    identity: SdkIdentity | None = None

    def to_json(self) -> dict[str, Any]:
        """The hello as JSON data."""
        hello = {"agent_id": self.agent_id, "avp_version": self.version, "capabilities": dict(self.capabilities)}
        if self.identity is not None:
            described = asdict(self.identity)
            if not self.identity.tokenizer_hash:
                del described["tokenizer_hash"]
            hello["identity"] = described
        return hello

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read a hello, which is untrusted input; what is missing has its default.

        Raises:
            ForeignMessageError: It is no map, or a field has another type.
        """
        given = _map(data, "hello")
        identity = given.get("identity")
        return cls(
            agent_id=_typed(given, "agent_id", ""),
            version=_typed(given, "avp_version", ""),
            capabilities=_typed(given, "capabilities", {}),
            identity=None if identity is None else _identity(_map(identity, "identity")),
        )


def _identity(given: Mapping[str, Any]) -> SdkIdentity:
    return SdkIdentity(**{entry.name: _typed(given, entry.name, entry.default) for entry in fields(SdkIdentity)})


def _all_layers_are_full(config: Mapping[str, Any]) -> bool:
    kinds = config.get("layer_types")
    if kinds:
        return set(kinds) == {"full_attention"}
    return not config.get("sliding_window") or config.get("use_sliding_window") is False


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _map(data: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ForeignMessageError(f"An SDK {what} is a JSON object, not {type(data).__name__}.")
    return data


def _typed(given: Mapping[str, Any], name: str, default: Any) -> Any:
    value = given.get(name, default)
    if type(value) is not type(default) or (isinstance(value, int) and value < 0):
        raise ForeignMessageError(f"{name} of an SDK hello is a {type(default).__name__}, not {str(value)[:40]!r}.")
    return value
