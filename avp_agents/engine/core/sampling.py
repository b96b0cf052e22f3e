"""From logits to tokens: one draw per row and step.

    SamplingParams                           what one request asked for
    RowSampler(params, prompt_ids)           one request's state: its random stream, the ids it has seen
    sample(logits, requests)                 one token for every row of a batch

A row's token depends on its logits, its options and its own random stream only, never on the rest of the batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avp_agents.errors import EngineError, NumericalError

DEFAULT_MAX_TOKENS = 512
_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing float32 logits by them would overflow."""


@dataclass(frozen=True)
class SamplingParams:
    """What one request asked for, with the meaning that `GenerateOptions` gives each field.

    Attributes:
        max_tokens: Most tokens to decode; None is what the window leaves, up to a default.
        seed: The request's seed; drawn from the system's randomness where none was given.
        stop: Strings that end the answer.
        stop_token_ids: Ids that end the answer, the model's end-of-sequence ids included; ascending.
    """

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    logprobs: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]

    def token_budget(self, room: int) -> int:
        """Tokens to decode where the window leaves `room` positions: what was asked for, or the default within it."""
        return min(DEFAULT_MAX_TOKENS, room) if self.max_tokens is None else self.max_tokens

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < _GREEDY_BELOW


@dataclass(frozen=True)
class Sampled:
    """One drawn token.

    Attributes:
        token_id: The token.
        logprob: Its log-probability under the model's own distribution, where asked for.
        top: The most likely ids with their log-probabilities, most likely first, as many as were asked for.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class RowSampler:
    """One request's sampling state: its options, its own random stream, and the ids it has seen.

    What constrains answers is a subclass: it masks scores, and may take another token than the one drawn.

    Attributes:
        masks: Whether `masked` may rule out tokens.
        was_cut: Whether the answer was brought to its end because `max_tokens` would not have sufficed.

    Args:
        params: The request's options.
        prompt_ids: All ids of context and prompt, for the repetition penalty. Latent positions have none.
    """

    masks = was_cut = False

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = ()) -> None:
        self.params = params
        self.generated = 0
        self._random = random.Random(params.seed)
        self._penalised = params.repetition_penalty != 1.0
        self._seen = set(prompt_ids) if self._penalised else set()
        self._new = sorted(self._seen)
        self._seen_index: Tensor | None = None

    def takes(self, most_likely: int) -> bool:
        """Whether the next token is simply the most likely one, no option in the way."""
        return self.params.greedy and not self._penalised and not self._stops_masked

    @property
    def _stops_masked(self) -> bool:
        return self.generated < self.params.min_tokens and bool(self.params.stop_token_ids)

    def settled(self, token_id: int) -> int:
        """The token to take where `token_id` was drawn."""
        return token_id

    def masked(self, scores: Tensor) -> Tensor:
        """Scores ``[vocab]`` float32, those of tokens that may not come next at -inf."""
        return scores

    def accept(self, token_id: int) -> None:
        """Note a token as generated."""
        self.generated += 1
        if self._penalised and token_id not in self._seen:
            self._seen.add(token_id)
            self._new.append(token_id)

    def scores(self, row: Tensor) -> Tensor:
        """The logits after repetition penalty, mask and `min_tokens`.

        `min_tokens` gives way where the mask allows nothing but the end.

        Args:
            row: ``[vocab]``, any floating dtype; not changed.

        Returns:
            ``[vocab]`` float32.
        """
        scores = row.float()
        if self._penalised:
            penalty, seen = self.params.repetition_penalty, self._seen_ids(scores)
            before = scores[seen]
            scores = scores.index_copy(0, seen, torch.where(before < 0, before * penalty, before / penalty))
        scores = self.masked(scores)
        if not self._stops_masked:
            return scores
        stops = [t for t in self.params.stop_token_ids if t < len(scores)]
        going_on = scores.index_fill(0, torch.tensor(stops, device=scores.device), -math.inf)
        return scores if self.masks and not bool((going_on > -math.inf).any()) else going_on

    def distribution(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """What the next token is drawn from: scores, then temperature, top_k, top_p and min_p, in this order.

        The order and the borders are those of transformers' logits processors.

        Args:
            row: ``[vocab]``, any floating dtype; not changed.

        Returns:
            The kept token ids, ``[n]`` int64, ascending; and their weights, ``[n]`` float32, not normalised.
        """
        params, scores = self.params, self.scores(row) / self.params.temperature
        token_ids = torch.arange(len(scores), device=scores.device)
        if 0 < params.top_k < len(scores):
            token_ids = (scores >= scores.topk(params.top_k).values[-1]).nonzero()[:, 0]
            scores = scores[token_ids]
        weights = scores.softmax(dim=-1)
        if params.top_p < 1:
            nucleus = _nucleus(weights, params.top_p)
            token_ids, weights = token_ids[nucleus], weights[nucleus]
        if params.min_p > 0:
            likely = weights >= params.min_p * weights.max()
            token_ids, weights = token_ids[likely], weights[likely]
        return token_ids, weights

    def draw(self, row: Tensor) -> int:
        """The next token of a row, ``[vocab]``; takes one number of the random stream unless greedy.

        Raises:
            NumericalError: The options are so extreme that the scaled logits are no longer finite.
            EngineError: What constrains the answer cannot be followed any further.
        """
        if self.params.greedy:
            return int(self.scores(row).max(dim=-1).indices)
        token_ids, weights = self.distribution(row)
        # On the CPU and in id order, so that the same numbers meet the same tokens on every device.
        cumulative = weights.cpu().cumsum(dim=-1, dtype=torch.float64)
        total = float(cumulative[-1])
        if not math.isfinite(total):
            raise NumericalError(
                f"temperature {self.params.temperature} and repetition_penalty {self.params.repetition_penalty} "
                "drive the logits to Inf; choose values nearer to 1."
            )
        point = min(self._random.random() * total, math.nextafter(total, 0.0))
        return int(token_ids[int(torch.searchsorted(cumulative, point, right=True))])

    def _seen_ids(self, scores: Tensor) -> Tensor:
        """``[n]`` int64: the ids of prompt and answer that `scores` has; only what is new is moved to the device."""
        if self._new or self._seen_index is None:
            new = torch.tensor([t for t in self._new if t < len(scores)], dtype=torch.int64, device=scores.device)
            self._seen_index = new if self._seen_index is None else torch.cat((self._seen_index, new))
            self._new.clear()
        return self._seen_index


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Positions, ascending, of the smallest set of most likely entries that holds more than `top_p` of the mass."""
    # All entries lighter than this together weigh less than 1 - top_p, so they need not be sorted.
    heavy = (weights >= (1 - top_p) / len(weights)).nonzero()[:, 0]
    ordered, order = weights[heavy].sort(descending=True, stable=True)
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    rest = (weights.sum(dtype=torch.float64) - before).float()
    kept = rest > 1 - top_p
    kept[0] = True
    return heavy[order[kept]].sort().values


def sample(
    logits: Tensor, requests: Sequence[RowSampler], *, vocab_limit: int | None = None
) -> list[Sampled | EngineError]:
    """Draw one token for every row, and note it in the row's `RowSampler`.

    Args:
        logits: ``[rows, vocab]``, any floating dtype, any device.
        requests: One per row.
        vocab_limit: Ids from here on (padding rows of the head) are never drawn and carry no probability.

    Returns:
        One entry per row; a `NumericalError` (returned, so that the other rows go on) where the logits hold NaN or
        +Inf, or nothing but -Inf, or where the options drive them there; an `EngineError` where what constrains
        an answer cannot be followed.
    """
    rows = logits[:, :vocab_limit]
    best = _finite_argmax(rows)
    return [
        _sample_row(row, request, most_likely) for row, request, most_likely in zip(rows, requests, best, strict=True)
    ]


def _finite_argmax(rows: Tensor) -> list[int]:
    """The most likely id of each row; -1 where the row's maximum is not finite (NaN counts as the maximum)."""
    # max, not argmax: on a CPU torch's bfloat16 argmax takes four times as long.
    values, indices = rows.max(dim=-1)
    return torch.where(values.isfinite(), indices, -1).tolist()


def _sample_row(row: Tensor, request: RowSampler, most_likely: int) -> Sampled | EngineError:
    if most_likely < 0:
        return NumericalError(
            f"The model's logits hold NaN or Inf after {request.generated} tokens; try dtype='float32', "
            "or fewer latent steps."
        )
    try:
        token_id = request.settled(most_likely if request.takes(most_likely) else request.draw(row))
        request.accept(token_id)
    except EngineError as error:
        return error
    count = request.params.logprobs
    return Sampled(token_id) if count is None else _with_logprobs(row, token_id, count)


def _with_logprobs(row: Tensor, token_id: int, count: int) -> Sampled:
    logprobs = row.float().log_softmax(dim=-1)
    values, token_ids = logprobs.topk(min(count, len(logprobs)))
    top = tuple(zip(token_ids.tolist(), values.tolist(), strict=True))
    return Sampled(token_id, float(logprobs[token_id]), top)
