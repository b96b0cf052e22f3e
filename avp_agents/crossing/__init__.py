"""Projection: what one model can take of another model's thought, without trained parameters.

>>> thought = source.crossing.express(context)          # bytes and text; thought.encode() for a wire
>>> projected = target.crossing.project(thought)        # a context of the target
>>> target.generate("And so?", context=projected)
"""

from avp_agents.crossing.projector import Projection, Projector, express
from avp_agents.crossing.thought import ByteDistribution, SpokenMessage, Thought
from avp_agents.crossing.token_bytes import TokenBytes, read_token_bytes
from avp_agents.crossing.transcript import TranscriptReader
from avp_agents.crossing.vocabulary import SharedVocabulary, cached_shared_vocabulary, shared_vocabulary

__all__ = [
    "ByteDistribution", "Projection", "Projector", "SharedVocabulary", "SpokenMessage", "Thought", "TokenBytes",
    "TranscriptReader", "cached_shared_vocabulary", "express", "read_token_bytes", "shared_vocabulary",
]  # fmt: skip
