"""The reference SDK's messages, version 1 (``avp`` 0.3 to 0.6): read, written, and made into contexts.

    decode_message, encode_message      header, metadata, checksum, zstd         <-> SdkMessage
    kv_of, kv_message                   keys and values                          <-> HostKv
    hidden_states_of, hidden_message    hidden states                            <-> tensor [n, hidden]
    adopt_context, context_message      a context of an engine's                 <-> SdkMessage
    SdkIdentity, SdkHello               whom the SDK believes to talk to, and its hashes

Nothing in such a message is authenticated: read it only from senders you trust. What one side cannot represent exactly
(sliding windows, batches, layers of different shapes) is refused. zstd needs ``avp-agents[interop]``.
"""

from avp_agents.protocol.sdk.contexts import adopt_context, context_message
from avp_agents.protocol.sdk.identity import SdkHello, SdkIdentity, model_hash, tokenizer_hash
from avp_agents.protocol.sdk.message import SdkMessage, decode_message, encode_message
from avp_agents.protocol.sdk.tensors import hidden_message, hidden_states_of, kv_message, kv_of

__all__ = [
    "SdkHello", "SdkIdentity", "SdkMessage", "adopt_context", "context_message", "decode_message", "encode_message",
    "hidden_message", "hidden_states_of", "kv_message", "kv_of", "model_hash", "tokenizer_hash",
]  # fmt: skip
