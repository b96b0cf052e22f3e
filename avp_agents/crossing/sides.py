"""How a context of one model becomes one of another: the sending and the receiving side, for one model.

`Crossing.express` says what a context holds in bytes and text (a `Thought`, which also crosses a wire);
`Crossing.project` makes a context of this model out of such a thought: the text that the source read, read again, and
behind it, in an open assistant turn, the source's thought as input embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from platformdirs import user_cache_path

from avp_agents.context import Context, LatentRecipe, LatentSegment, TokenSegment
from avp_agents.crossing.checks import check_fingerprint, check_kv, check_lineage
from avp_agents.crossing.projector import Projection, Projector, express
from avp_agents.crossing.thought import ByteDistribution, SpokenMessage, Thought
from avp_agents.crossing.token_bytes import TokenBytes, read_token_bytes
from avp_agents.crossing.transcript import TranscriptReader
from avp_agents.crossing.vocabulary import SharedVocabulary, cached_shared_vocabulary
from avp_agents.errors import ConfigurationError, FingerprintMismatchError
from avp_agents.kv_cache import HostKv
from avp_agents.prompt.plan import PromptRenderer
from avp_agents.protocol.handshake import Hello
from avp_agents.usage import HandoffMode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reread = bool | Literal["all"]
"""Which text of the source's travels: True is what users and tools said and what the source answered last, ``"all"``
also system prompts and earlier answers, False is none."""

MIN_MASS = 0.5
_T = TypeVar("_T")


@dataclass(frozen=True)
class Choice:
    """What a model takes of a thought.

    Attributes:
        thought: What is left of it.
        mode: ``"projection"`` with vectors, ``"reread"`` with text alone, ``"text"`` where nothing is left: the source
            has to say it in words.
        reason: Why, in a few words.
    """

    thought: Thought
    mode: HandoffMode
    reason: str


@dataclass(frozen=True)
class Side:
    """One model, as far as contexts that come and go concern it.

    Attributes:
        fingerprint: The model's.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        tokenizer: Its tokenizer.
        renderer: Its prompts.
        vocabulary_size: Ids that stand for tokens.
        embed: Ids ``[...]`` to input embeddings ``[..., hidden]``, the architecture's scale included.
        mean_norm: Computes the mean norm of those embeddings over the vocabulary.
        device: Where they are.
        hidden: Their width.
        check_kv: Raises `ConfigurationError` for a KV-cache whose shapes or dtype are not the model's.
    """

    fingerprint: str
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    vocabulary_size: int
    embed: Callable[[torch.Tensor], torch.Tensor]
    mean_norm: Callable[[], float]
    device: torch.device
    hidden: int
    check_kv: Callable[[HostKv], None]


class Crossing:
    """The way out of one model and into it. Thread-safe once made.

    Args:
        model_path: The model's name.
        load: Tells of the model, which it loads where it has to; called at the first use.
        project_vectors: Whether a thought may enter as a vector.
    """

    def __init__(self, model_path: str, load: Callable[[], Side], *, project_vectors: bool) -> None:
        self.model_path = model_path
        self._load, self._project_vectors = load, project_vectors
        self._loaded: Side | None = None

    @property
    def _side(self) -> Side:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self._side.fingerprint

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return self._side.dtype

    def check_model(self, context: Context) -> None:
        """Refuse a context of another model or dtype.

        Raises:
            FingerprintMismatchError: It is one.
        """
        check_fingerprint(context, self.fingerprint, self.model_path)
        if context.dtype != self.dtype:
            raise FingerprintMismatchError(
                f"The context was made in {context.dtype}, this engine runs {self.dtype}; give both one dtype."
            )

    def accept(self, context: Context) -> Context:
        """A context that came from outside of this process, once it was checked.

        Raises:
            FingerprintMismatchError: It belongs to another model or dtype.
            IntegrityError: It holds values that this model cannot have made.
        """
        self.check_model(context)
        side = self._side
        check_lineage(context, tokens=side.vocabulary_size, hidden=side.hidden, dtype=side.dtype)
        check_kv(context, side.check_kv)
        return context

    @property
    def has_template(self) -> bool:
        """Whether prompts may be messages."""
        return bool(self._side.tokenizer.chat_template)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """What the model's tokens stand for."""
        return read_token_bytes(self._side.tokenizer, self._side.vocabulary_size)

    def hello(self, *, prefill_rate: float | None = None) -> Hello:
        """What this side is, for a handshake.

        Args:
            prefill_rate: Positions per second, where that was measured.
        """
        sketch = self.token_bytes.sketch
        return Hello(self.fingerprint, self.dtype, sketch, prefill_rate=prefill_rate, model=self._shown_name)

    @property
    def _shown_name(self) -> str:
        """The model's name for others; of a folder its last part."""
        return Path(self.model_path).name if Path(self.model_path).is_absolute() else self.model_path

    def shared_vocabulary(self, source: Crossing) -> SharedVocabulary:
        """The tokens of `source` that this model has too; kept in the user's cache folder."""
        fingerprints = source.fingerprint, self.fingerprint
        folder = user_cache_path("avp-agents") / "shared-vocabulary"
        return cached_shared_vocabulary(folder, fingerprints, lambda: source.token_bytes, lambda: self.token_bytes)

    def express(self, contexts: Context | Sequence[Context], *, reread: Reread = True) -> Thought:
        """What contexts of this model say to another one.

        Args:
            contexts: One, or several: their readouts become a vector each, oldest first; the last one's text travels.
            reread: Which text travels.

        Returns:
            A distribution per context with a readout (those that end in latent steps), and the text.

        Raises:
            ConfigurationError: There is none.
            FingerprintMismatchError: One is another model's.
        """
        given = [contexts] if isinstance(contexts, Context) else list(contexts)
        if not given:
            raise ConfigurationError("There is no context to express; pass at least one.")
        if any(context.fingerprint != self.fingerprint for context in given):
            raise FingerprintMismatchError(f"Only contexts of {self.model_path} itself can be expressed by it.")
        distributions = tuple(self._distribution(context) for context in given if context.readout is not None)
        messages = _chosen(self._transcript.read(given[-1]), reread)
        return Thought(self.fingerprint, given[-1].recipe_id, distributions, messages)

    def choose(self, thought: Thought) -> Choice:
        """What of a thought this model takes, as its engine is set (``project_vectors``).

        A vector enters only where at least half of the source's probability is on tokens that this model has.

        Raises:
            ProjectionError: The vocabularies share no token of a distribution.
        """
        text = replace(thought, distributions=())
        mode: HandoffMode = "reread" if thought.messages else "text"
        if not self._project_vectors:
            return Choice(text, mode, "its text is read again, without a vector")
        if not thought.distributions:
            return Choice(text, mode, "it has no latent steps to make a vector of")
        mass = min(self.embeddings_of(thought).mass)
        if mass < MIN_MASS:
            return Choice(text, mode, f"only {mass:.0%} of what it was about to say is in this vocabulary")
        return Choice(thought, "projection", f"{mass:.0%} of what it was about to say is in this vocabulary")

    def project(self, thought: Thought) -> Context:
        """A context of this model that holds all of another one's thought. It has no KV-cache yet.

        Raises:
            ProjectionError: The vocabularies share no token of a distribution.
        """
        side = self._side
        opening = TokenSegment(self._opening(thought.messages))
        if not thought.distributions:
            return Context(side.fingerprint, side.dtype, (opening,))
        projection = self.embeddings_of(thought)
        count = len(projection.embeddings)
        recipe = LatentRecipe(method="projection", k=None, temperature=1.0, renormalise=True, steps=count)
        latents = LatentSegment(
            projection.embeddings.to(getattr(torch, side.dtype)).cpu(), recipe, origin=thought.origin
        )
        return Context(side.fingerprint, side.dtype, (opening, latents))

    def read(self, thought: Thought) -> Context:
        """A context of this model that has read a thought's text, and nothing of its vectors.

        It ends with the last message's turn, so that the next prompt goes on as in one conversation with these
        messages; where the template does not say where a turn ends, it ends in an open assistant turn.
        """
        side = self._side
        ids, stop_ids = self._opening(thought.messages), side.renderer.stop_ids
        end = next((place for place in range(len(ids), 0, -1) if ids[place - 1] in stop_ids), len(ids))
        return Context(side.fingerprint, side.dtype, (TokenSegment(ids[:end]),))

    def embeddings_of(self, thought: Thought) -> Projection:
        """The thought's distributions as input embeddings of this model.

        Raises:
            ProjectionError: The vocabularies share no token of one of them.
        """
        return _on_own_thread(lambda: self._projector(thought.distributions))

    @cached_property
    def _projector(self) -> Projector:
        side = self._side
        return Projector(self.token_bytes, side.embed, side.mean_norm(), side.device)

    @cached_property
    def _transcript(self) -> TranscriptReader:
        tokenizer, renderer = self._side.tokenizer, self._side.renderer
        render = renderer.render if self.has_template else None
        return TranscriptReader(tokenizer, render, renderer.control_ids)

    def _distribution(self, context: Context) -> ByteDistribution:
        readout = context.readout
        assert readout is not None
        return express(self.token_bytes, readout.token_ids.tolist(), readout.probabilities.tolist())

    def _opening(self, messages: Sequence[SpokenMessage]) -> tuple[int, ...]:
        """What stands before the vectors: the messages and an open assistant turn.

        It is never empty. Attention heads rest on a sequence's first position, so that must not be a vector.
        """
        tokenizer, renderer = self._side.tokenizer, self._side.renderer
        if self.has_template:
            chat = [message.to_chat() for message in messages]
            return tuple(renderer.render(chat or [{"role": "user", "content": ""}]))
        if text := "\n\n".join(message.content for message in messages):
            return tuple(renderer.render(text))
        sink = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return (sink if isinstance(sink, int) else 0,)


def _chosen(messages: tuple[SpokenMessage, ...], reread: Reread) -> tuple[SpokenMessage, ...]:
    """The messages that travel."""
    if reread == "all":
        return messages
    if not reread:
        return ()
    last = len(messages) - 1
    answered = messages and messages[-1].role == "assistant"
    return tuple(m for i, m in enumerate(messages) if m.role in ("user", "tool") or (answered and i == last))


@torch.inference_mode()
def _call(work: Callable[[], _T]) -> _T:
    return work()


def _on_own_thread(work: Callable[[], _T]) -> _T:
    """Run torch on a thread that ends with it: a caller's thread would keep a pool of workers of its own."""
    with ThreadPoolExecutor(1) as once:
        return once.submit(_call, work).result()
