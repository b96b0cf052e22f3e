"""How a vLLM with the plugin is started. Needs no vLLM."""

from __future__ import annotations

import json
from typing import Any

import pytest

from avp_agents.errors import ConfigurationError, UnsupportedModelError
from avp_agents.vllm.plugin.options import plugin_arguments, plugin_options

STORE = "redis://10.0.0.5:6379/0"


@pytest.mark.parametrize(
    "asked",
    [
        {"thinks_as": "Qwen2ForCausalLM", "rows": 2000},
        {"kv_store": STORE, "namespace": "acme"},
        {"thinks_as": "Qwen2ForCausalLM", "kv_store": STORE},
    ],
    ids=["latent", "kv", "both"],
)
def test_options_and_arguments_start_the_same_vllm(asked: dict[str, Any]) -> None:
    options, arguments = plugin_options(**asked), plugin_arguments(**asked)

    assert "--enable-prompt-embeds" in arguments
    for name in options.keys() & {"hf_overrides", "kv_transfer_config"}:
        value = arguments[arguments.index("--" + name.replace("_", "-")) + 1]
        assert json.loads(value) == options[name]
    for processor in options.get("logits_processors", ()):
        assert arguments[arguments.index("--logits-processors") + 1] == processor


def test_latent_steps_take_the_place_of_the_model() -> None:
    options = plugin_options(thinks_as="Qwen2ForCausalLM")

    assert options["hf_overrides"] == {"architectures": ["LatentQwen2ForCausalLM"]}
    assert options["enable_prompt_embeds"] is True
    assert options["kv_transfer_config"]["kv_connector"] == "LatentConnector"


def test_a_store_is_moved_to_and_from_beside_latent_steps_or_alone() -> None:
    alone = plugin_options(kv_store=STORE, namespace="acme")["kv_transfer_config"]
    both = plugin_options(thinks_as="LlamaForCausalLM", kv_store=STORE)["kv_transfer_config"]

    assert alone["kv_connector"] == "StoreConnector"
    assert alone["kv_connector_extra_config"] == {"store": STORE, "namespace": "acme"}
    assert both["kv_connector"] == "MultiConnector"
    children = [child["kv_connector"] for child in both["kv_connector_extra_config"]["connectors"]]
    assert children == ["LatentConnector", "StoreConnector"]


def test_what_cannot_be_loaded_is_computed_instead_of_ending_the_request() -> None:
    for architecture in (None, "LlamaForCausalLM"):
        transfer = plugin_options(thinks_as=architecture, kv_store=STORE)["kv_transfer_config"]
        assert transfer["kv_load_failure_policy"] == "recompute"


def test_nothing_is_changed_where_nothing_is_wanted() -> None:
    assert plugin_options() == {}


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM cannot think inside vLLM; LlamaForCausalLM"):
        plugin_options(thinks_as="FalconForCausalLM")
    with pytest.raises(ConfigurationError, match="rows must be more than 1024"):
        plugin_options(thinks_as="LlamaForCausalLM", rows=100)
