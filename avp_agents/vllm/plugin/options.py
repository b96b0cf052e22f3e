"""How to start a vLLM with the plugin: engine arguments, and the same as a server's command line.

    options = plugin_options(thinks_as="LlamaForCausalLM", kv_store="redis://10.0.0.5:6379/0")

Needs no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from avp_agents.errors import ConfigurationError, UnsupportedModelError
from avp_agents.vllm.plugin.kv_request import CONNECTOR as STORE_CONNECTOR
from avp_agents.vllm.plugin.request import ARCHITECTURES, CONNECTOR, DEFAULT_ROWS, LOGITS_PROCESSOR, MAX_STEPS

_FLAGS = {
    "hf_overrides": "--hf-overrides",
    "logits_processors": "--logits-processors",
    "kv_transfer_config": "--kv-transfer-config",
}


def plugin_options(
    *,
    thinks_as: str | None = None,
    rows: int = DEFAULT_ROWS,
    kv_store: str | None = None,
    namespace: str = "default",
) -> dict[str, Any]:
    """Keyword arguments of ``LLM`` or ``AsyncEngineArgs``.

    Args:
        thinks_as: For latent steps: what the model's configuration calls its architecture, for example
            ``"Qwen2ForCausalLM"``. None is without.
        rows: Latent embeddings that can be alive at once; a request of n steps holds n + 1. Requests beyond wait.
        kv_store: For loading and saving keys and values: the store's URL, as `avp_agents.store.open_store` takes it.
            None is without.
        namespace: The store's tenant.

    Raises:
        UnsupportedModelError: The plugin has no latent version of this architecture.
        ConfigurationError: There are too few rows.
    """
    options: dict[str, Any] = {}
    connectors: list[dict[str, Any]] = []
    if thinks_as is not None:
        options |= _thinking(thinks_as)
        connectors.append(_connector(CONNECTOR, latent_rows=_checked(rows)))
    if kv_store is not None:
        connectors.append(_connector(STORE_CONNECTOR, store=kv_store, namespace=namespace))
    if connectors:
        one = connectors[0] if len(connectors) == 1 else _connector("MultiConnector", connectors=connectors)
        # a context that cannot be loaded is prefilled; vLLM's default ends the request
        options["kv_transfer_config"] = {**one, "kv_load_failure_policy": "recompute"}
    return options


def plugin_arguments(
    *,
    thinks_as: str | None = None,
    rows: int = DEFAULT_ROWS,
    kv_store: str | None = None,
    namespace: str = "default",
) -> list[str]:
    """`plugin_options` as command-line arguments of vLLM's server.

    Raises:
        UnsupportedModelError, ConfigurationError: As for `plugin_options`.
    """
    options = plugin_options(thinks_as=thinks_as, rows=rows, kv_store=kv_store, namespace=namespace)
    arguments = ["--enable-prompt-embeds"]
    for name, flag in _FLAGS.items():
        if name in options:
            value = options[name]
            arguments += [flag, *([json.dumps(value)] if isinstance(value, Mapping) else value)]
    return arguments


def _thinking(architecture: str) -> dict[str, Any]:
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{architecture} cannot think inside vLLM; {', '.join(ARCHITECTURES)} can. Think with a LatentEngine."
        )
    return {
        "hf_overrides": {"architectures": [ARCHITECTURES[architecture]]},
        "enable_prompt_embeds": True,
        "logits_processors": [LOGITS_PROCESSOR],
    }


def _checked(rows: int) -> int:
    if rows <= MAX_STEPS:
        raise ConfigurationError(f"rows must be more than {MAX_STEPS}, the steps one request may ask for, not {rows}.")
    return rows


def _connector(name: str, **options: Any) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": options}
