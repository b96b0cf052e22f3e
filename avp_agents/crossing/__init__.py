"""A context of another model or another process becomes one of a model here.

    sides         what a model tells others of its contexts, and how it takes theirs
    take_in       what is offered becomes a context: handshake, fetching, checks; what came, and why that way
    checks        whether a model can have made what came
    thought       what a context says to another model, on a wire
    projector     a thought as input embeddings, without trained parameters
    vocabulary    which tokens of two models stand for the same bytes (`token_bytes`)
    transcript    the messages that a context was made from, read back
    payloads      what travels to another process

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
