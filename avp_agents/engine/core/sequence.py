"""One request on its way through the scheduler: what it feeds the model next, and what it makes of the outputs.

Sequence          prefills a lineage that is partly in the pool already; some are done then
├── Thinking      ... then runs latent steps     (`take_latents`, for all rows of a round at once)
└── Decoding      ... then decodes tokens        (`take_tokens`, likewise)
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from typing_extensions import override

from avp_agents.context import Context, LatentRecipe, LatentSegment, Readout, Segment, TokenSegment
from avp_agents.engine.core.forward import Inputs, Piece, PieceOutput
from avp_agents.engine.core.kv_pool import Owner, Region
from avp_agents.engine.core.latent_step import LatentStep
from avp_agents.engine.core.prefill import next_inputs, prefill_runs
from avp_agents.engine.core.sampling import RowSampler, Sampled, sample
from avp_agents.errors import AvpError, NumericalError
from avp_agents.kv_cache import HostKv


class Extra:
    """What a sequence needs besides (`avp_agents.engine.extras`). Does nothing by itself."""

    def admitting(self, sequence: Sequence) -> None:
        """Before the sequence gets its region; an `AvpError` refuses it."""

    def before_round(self, sequence: Sequence) -> None:
        """Before the pieces of a round are chosen."""

    def after_fed(self, sequence: Sequence, piece: Piece) -> None:
        """A piece was run; its positions are in the pool."""


@dataclass(eq=False)
class Request:
    """What a caller submitted.

    Attributes:
        owner: The caller's store, as far as the pool knows it.
        base: The context the prompt goes on top of, if any.
        prompt_ids: New ids behind the base.
        prefix: A context whose KV-cache may serve as far as it agrees; where there is a base, it extends that.
        host_kv: KV-cache of `host_context` that a store had, if it is not in the pool.
        host_context: `prefix` or `base`; None without `host_kv`.
        source: Admission is fair between sources.
        deadline: `time.monotonic()` at which the request times out.
        extras: What its sequence needs besides.
    """

    owner: Owner
    base: Context | None = None
    prompt_ids: tuple[int, ...] = ()
    prefix: Context | None = None
    host_kv: HostKv | None = None
    host_context: Context | None = None
    source: str = ""
    deadline: float | None = None
    extras: tuple[Extra, ...] = ()
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    @property
    def lineage(self) -> tuple[Segment, ...]:
        """Base and prompt."""
        base = self.base.lineage if self.base is not None else ()
        return (*base, TokenSegment(self.prompt_ids)) if self.prompt_ids else base


@dataclass
class Start:
    """How a sequence got its start in the pool.

    Attributes:
        reused: Positions whose keys and values were there.
        start: The first position to feed; the last one is fed for its hidden state even where its keys are there.
        bytes_moved: Bytes uploaded from the host.
        seconds: Time for finding, copying and uploading.
    """

    reused: int = 0
    start: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0


class Sequence(ABC):
    """A request with its place in the KV pool.

    Attributes:
        region: Its positions in the pool, once admitted.
        length: Positions whose keys and values are in the pool.
        total: Positions of the lineage to prefill.
        capacity: Most positions it can come to need.
        runs: What is prefilled, in order.
        started: How it got its start.
        admitted, prefilled: `time.monotonic()` when it was.
    """

    def __init__(self, request: Request, more: int) -> None:
        self.request = request
        self.lineage = request.lineage
        self.total = sum(len(segment) for segment in self.lineage)
        self.runs = prefill_runs(self.lineage)
        self.capacity = self.total + more
        self.region: Region | None = None
        self.length = 0
        self.started = Start()
        self.admitted = self.prefilled = request.submitted

    def admit(self, region: Region, started: Start) -> None:
        """Start in `region`, whose first ``started.start`` positions are this lineage's."""
        self.region, self.started = region, started
        self.length = started.start
        self.admitted = time.monotonic()

    @property
    def prefilling(self) -> bool:
        """Whether positions of the lineage are still to be fed."""
        return self.length < self.total

    def next_piece(self, budget: int) -> Piece:
        """What to feed next: at most `budget` positions of the lineage, or one step."""
        assert self.region is not None
        if self.prefilling:
            inputs, frame = next_inputs(self.runs, self.length, budget)
        else:
            inputs, frame = (self.step_input(),), None
        stop = self.length + sum(len(part) for part in inputs)
        wants_logits = stop >= self.total and self.wants_logits()
        return Piece(inputs, self.region.start, self.length, wants_logits, frame)

    def fed(self, count: int) -> None:
        """Note that `count` positions more are in the pool."""
        assert self.region is not None
        if self.prefilling and self.length + count >= self.total:
            self.prefilled = time.monotonic()
        self.length += count
        self.region.written = self.length

    def step_input(self) -> Inputs:
        """The one position after the prefill: a token id or a latent embedding ``[1, hidden]``."""
        raise AssertionError("a sequence without steps ends with its prefill")

    def wants_logits(self) -> bool:
        """Whether the coming position's logits are needed."""
        return False

    @abstractmethod
    def result(self) -> Context:
        """The context that keeps the region; called once, after the last step."""

    @abstractmethod
    def ended(self, error: AvpError | None) -> None:
        """Tell the caller: why there is no result, or that it is complete, with its KV-cache attached."""


Ended = tuple[Sequence, AvpError | None]
"""A sequence that has come to its end, and why it has no result, if it has none."""


class Thinking(Sequence):
    """Runs latent steps: each last hidden state, mapped to the input space, is the next input.

    Attributes:
        latents: The embeddings fed so far, each ``[hidden]``.
        readout: What the model was about to say, once the steps are run.
    """

    def __init__(self, request: Request, recipe: LatentRecipe, *, looks_at_logits: bool) -> None:
        super().__init__(request, more=recipe.steps)
        self.recipe = recipe
        self._looks_at_logits = looks_at_logits
        self.latents: list[torch.Tensor] = []
        self.readout: Readout | None = None
        self._last_hidden: torch.Tensor | None = None

    @override
    def step_input(self) -> Inputs:
        return self.latents[-1][None]

    def wants_logits(self) -> bool:
        """Where f or a stopping rule needs them, and at the end for the readout."""
        return self._looks_at_logits or len(self.latents) >= self.recipe.steps

    def take(self, latent: torch.Tensor, hidden: torch.Tensor) -> None:
        """Note f(h) as the next input, and h."""
        self.latents.append(latent)
        self._last_hidden = hidden

    def latent_lineage(self) -> tuple[Segment, ...]:
        """The lineage with the steps behind it."""
        if not self.latents:
            return self.lineage
        return (*self.lineage, LatentSegment(torch.stack(self.latents).cpu(), self.recipe))

    def is_done(self, output: PieceOutput, latent_step: LatentStep) -> bool:
        """Whether all steps were run, or a stopping rule holds."""
        recipe = self.recipe
        if len(self.latents) >= recipe.steps:
            return True
        if recipe.stop_cosine is not None and self._last_hidden is not None:
            pair = (output.hidden.float(), self._last_hidden.float())
            if float(torch.cosine_similarity(*pair, dim=0)) > recipe.stop_cosine:
                return True
        if recipe.stop_entropy is None or output.logits is None:
            return False
        return float(latent_step.entropy(output.logits[None])) < recipe.stop_entropy

    def read_out(self, output: PieceOutput, latent_step: LatentStep) -> None:
        """Keep the next-token distribution; a run that settled early without logits has none."""
        if output.logits is not None:
            ids, probabilities = latent_step.readout(output.logits[None])
            self.readout = Readout(output.hidden.cpu().clone(), ids[0].cpu().clone(), probabilities[0].cpu().clone())


class Decoding(Sequence):
    """Decodes tokens until one of them ends the answer.

    Attributes:
        ids: The tokens so far.
    """

    def __init__(self, request: Request, most: int, sampler: RowSampler) -> None:
        super().__init__(request, more=most)
        self.sampler = sampler
        self.ids: list[int] = []

    @override
    def step_input(self) -> Inputs:
        return (self.ids[-1],)

    @override
    def wants_logits(self) -> bool:
        return True

    @abstractmethod
    def accept(self, sampled: Sampled) -> bool:
        """Take a token that was just added to `ids`; returns whether it ends the answer."""

    def keep_only(self, ids: Seq[int]) -> None:
        """Forget keys and values of ids that a stop string cut away; `ids` are what stays."""
        assert self.region is not None
        same = next((i for i, (a, b) in enumerate(zip(ids, self.ids, strict=False)) if a != b), len(ids))
        self.length = min(self.length, self.total + same)
        self.region.written = self.length


def take_tokens(rows: Seq[tuple[Decoding, PieceOutput]], *, vocab_limit: int) -> Iterator[Ended]:
    """Draw a token for every row; yields those that ended."""
    if not rows:
        return
    logits = torch.stack([output.logits for _, output in rows if output.logits is not None])
    drawn = sample(logits, [sequence.sampler for sequence, _ in rows], vocab_limit=vocab_limit)
    for (sequence, _), result in zip(rows, drawn, strict=True):
        if not isinstance(result, Sampled):
            yield sequence, result
            continue
        sequence.ids.append(result.token_id)
        if sequence.accept(result):
            yield sequence, None


def take_latents(rows: Seq[tuple[Thinking, PieceOutput]], latent_step: LatentStep) -> Iterator[Ended]:
    """Run f for every row, those of one recipe together; yields those that ended."""
    healthy = torch.isfinite(torch.stack([output.hidden for _, output in rows])).all(dim=-1).tolist() if rows else []
    stepping: dict[LatentRecipe, list[tuple[Thinking, PieceOutput]]] = {}
    for (sequence, output), fine in zip(rows, healthy, strict=True):
        if not fine:
            step = len(sequence.latents)
            yield sequence, NumericalError(f"NaN or Inf at latent step {step}; try dtype='float32'.")
        elif sequence.is_done(output, latent_step):
            sequence.read_out(output, latent_step)
            yield sequence, None
        else:
            stepping.setdefault(sequence.recipe, []).append((sequence, output))
    for recipe, together in stepping.items():
        hidden = torch.stack([output.hidden for _, output in together])
        wanted = [output.logits for _, output in together if output.logits is not None]
        logits = torch.stack(wanted) if len(wanted) == len(together) else None
        for (sequence, output), latent in zip(together, latent_step(hidden, logits, recipe), strict=True):
            sequence.take(latent, output.hidden)
