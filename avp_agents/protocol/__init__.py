"""What crosses between processes, hosts and models. `docs/protocol.md` specifies all of it.

    frames      encode_context, encode_hidden_states, encode_text                 -> EncodedFrame (its bytes, in chunks)
                open_frame, read_frame, FrameReader                               -> Frame (its MAC and checksums right)
                decode_context, decode_hidden_states, decode_text                 -> the value again
                inspect_frame                                                     -> FrameReport, no payload loaded
    handshake   `avp_agents.protocol.handshake`: which handoff mode suits two engines
    sessions    `avp_agents.protocol.session`: who agreed on what, and until when
    sdk         `avp_agents.protocol.sdk`: messages of the reference SDK, needs ``avp-agents[interop]`` for zstd

Example:
    >>> frame = encode_context(context, key=namespace.key)
    >>> frame.write(file)
    >>> decode_context(read_frame(path, key=namespace.key)) # on another host
"""

from avp_agents.protocol.frame_decoding import Frame, FrameReader, open_frame, read_frame
from avp_agents.protocol.frame_encoding import EncodedFrame
from avp_agents.protocol.frame_inspection import FrameReport, inspect_frame
from avp_agents.protocol.frame_values import (
    HiddenStates,
    decode_context,
    decode_hidden_states,
    decode_text,
    encode_context,
    encode_hidden_states,
    encode_text,
)
from avp_agents.protocol.limits import Limits

__all__ = [
    "EncodedFrame", "Frame", "FrameReader", "FrameReport", "HiddenStates", "Limits", "decode_context",
    "decode_hidden_states", "decode_text", "encode_context", "encode_hidden_states", "encode_text", "inspect_frame",
    "open_frame", "read_frame",
]  # fmt: skip
