"""Latent steps inside vLLM: an out-of-tree model plugin.

A latent request decodes like any other, in one batch with everybody's tokens, but no token is chosen. Three parts share
the `LatentMemory`, a table of embeddings on the device:

- `sampling.LatentSampling`, a logits processor, maps the last hidden state to the next input embedding f(h), writes it
  into a row of the table and lets the sampler "choose" an id beyond the vocabulary that names the row;
- `models`, subclasses of vLLM's models, look such ids up in the table instead of the embedding matrix. What a position
  holds follows from its id alone, so chunked prefill, preemption (the ids of a request that is prefilled again name
  what was fed before) and any order of rows in the batch are right by construction. Lookup and f run outside the
  forward pass, which is vLLM's own, so CUDA graphs are captured and played back as ever;
- `connector.LatentConnector` hands out rows, keeps latent blocks out of the shared prefix cache, and returns the latent
  embeddings with the request's output.

It works in vLLM's first model runner (``VLLM_USE_V2_MODEL_RUNNER=0`` on a GPU), alone or with tensor parallelism. What
it cannot run with is refused when the model is loaded.

Another connector, on its own or beside that one, moves keys and values between vLLM and a store: `kv_connector`, whose
worker's side is `kv_worker`, over `kv_blocks`.

`request` and `kv_request` are the caller's side: parameters that make a request a latent one or have it load or save,
and how the answer is read. `options` starts a vLLM with all of this. These need no vLLM.
"""

from avp_agents.vllm.plugin.kv_request import CONNECTOR as STORE_CONNECTOR
from avp_agents.vllm.plugin.request import ARCHITECTURES, CONNECTOR

_PLUGIN = "avp_agents.vllm.plugin"
_CONNECTORS = {CONNECTOR: f"{_PLUGIN}.connector", STORE_CONNECTOR: f"{_PLUGIN}.kv_connector"}


def register() -> None:
    """Make the latent models and the connectors known to vLLM; the entry point in ``vllm.general_plugins``.

    vLLM calls it in each of its processes. Nothing changes for models that are served without `plugin_options`.
    """
    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for latent in ARCHITECTURES.values():
        if latent not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(latent, f"{_PLUGIN}.models:{latent}")
    for connector, module in _CONNECTORS.items():
        try:
            KVConnectorFactory.get_connector_class_by_name(connector)
        except ValueError:
            KVConnectorFactory.register_connector(connector, module, connector)
