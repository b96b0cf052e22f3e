"""From logits to tokens: options, their limits, and one draw per row and step.

    SamplingParams.from_options(options)     what one request asked for, checked
    RowSampler(params, prompt_ids)           one request's state: its random stream, the ids it has seen
    sample(logits, requests)                 one token for every row of a batch

A row's token depends on its logits, its options and its own random stream only, never on the rest of the batch.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from avp_agents.answer.grammar import Constraint
from avp_agents.answer.options import GenerateOptions
from avp_agents.errors import ConfigurationError, EngineError, NumericalError

DEFAULT_MAX_TOKENS = 512
MAX_LOGPROBS = 50
MAX_STOP_STRINGS = 16

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing float32 logits by them would overflow."""


@dataclass(frozen=True)
class SamplingParams:
    """What one request asked for, checked by `from_options`; see `GenerateOptions` for the meaning of each field.

    Attributes:
        max_tokens: Most tokens to decode; None leaves it to `token_budget`.
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

    @classmethod
    def from_options(
        cls, options: GenerateOptions | Mapping[str, Any], *, vocab_limit: int, eos_token_ids: Iterable[int] = ()
    ) -> SamplingParams:
        """Check a request's options; None is an option's default. Others check `grammar`, `timeout` and `source`.

        Args:
            options: As given to `generate`.
            vocab_limit: Number of ids the tokenizer knows; ids from there on are padding rows of the head.
            eos_token_ids: The model's own end-of-sequence ids.

        Raises:
            ConfigurationError: An option is unknown or out of its range.
        """
        known = GenerateOptions.__annotations__
        if unknown := sorted(set(options) - set(known)):
            raise ConfigurationError(f"Unknown option {unknown[0]!r}; known options: {', '.join(known)}.")
        given = {name: value for name, value in options.items() if value is not None}
        max_tokens = _integer("max_tokens", given["max_tokens"], low=1) if "max_tokens" in given else None
        most = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        min_tokens = _integer("min_tokens", given.get("min_tokens", 0), low=0, high=most, high_name="max_tokens")
        stop_token_ids = set(eos_token_ids) | _stop_token_ids(given.get("stop_token_ids", ()), vocab_limit)
        if min_tokens and stop_token_ids.issuperset(range(vocab_limit)):
            raise ConfigurationError("min_tokens needs at least one token that is not in stop_token_ids.")
        return cls(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=_real("temperature", given.get("temperature", 0.0), "[0, inf)"),
            top_p=_real("top_p", given.get("top_p", 1.0), "(0, 1]"),
            top_k=_integer("top_k", given.get("top_k", 0), low=0),
            min_p=_real("min_p", given.get("min_p", 0.0), "[0, 1)"),
            repetition_penalty=_real("repetition_penalty", given.get("repetition_penalty", 1.0), "(0, inf)"),
            seed=_integer("seed", given["seed"]) if "seed" in given else secrets.randbits(63),
            logprobs=_integer("logprobs", given["logprobs"], low=0, high=MAX_LOGPROBS) if "logprobs" in given else None,
            stop=_stop_strings(given.get("stop", ())),
            stop_token_ids=tuple(sorted(stop_token_ids)),
        )

    def token_budget(self, room: int) -> int:
        """Tokens to decode where the window leaves `room` positions: what was asked for, or the default within it."""
        return min(DEFAULT_MAX_TOKENS, room) if self.max_tokens is None else self.max_tokens

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < _GREEDY_BELOW


def _integer(
    name: str, value: Any, *, low: int | None = None, high: int | None = None, high_name: str | None = None
) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigurationError(f"{name} must be an integer, not {value!r}.")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        upper = "" if high is None else f" and at most {high}" + (f" ({high_name})" if high_name else "")
        raise ConfigurationError(f"{name} must be at least {low}{upper}, not {number}.")
    return number


def _real(name: str, value: Any, interval: str) -> float:
    """`value` as a float within `interval`, written as mathematicians do: ``"(0, 1]"``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigurationError(f"{name} must be a number in {interval}, not {value!r}.")
    number = float(value)
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ConfigurationError(f"{name} must be in {interval}, not {value}.")
    return number


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise ConfigurationError(f"stop must be a non-empty string or a list of such, not {value!r}.")
    if len(strings) > MAX_STOP_STRINGS:
        raise ConfigurationError(f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(strings)}.")
    return tuple(dict.fromkeys(strings))


def _stop_token_ids(value: Any, vocab_limit: int) -> set[int]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigurationError(f"stop_token_ids must be a list of token ids, not {value!r}.")
    return {_integer("each of stop_token_ids", token_id, low=0, high=vocab_limit - 1) for token_id in value}


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

    Args:
        params: The request's options.
        prompt_ids: All ids of context and prompt, for the repetition penalty. Latent positions have none.
        constraint: What the answer may be, if not just anything.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int] = (), constraint: Constraint | None = None
    ) -> None:
        self.params = params
        self.constraint = constraint
        self.generated = 0
        self._random = random.Random(params.seed)
        self._penalised = params.repetition_penalty != 1.0
        self._seen = set(prompt_ids) if self._penalised else set()
        self._new = sorted(self._seen)
        self._seen_index: Tensor | None = None

    def takes(self, most_likely: int) -> bool:
        """Whether the next token is simply the most likely one, no option in the way."""
        if not self.params.greedy or self._penalised or self._stops_masked:
            return False
        return self.constraint is None or self.constraint.allows(most_likely)

    @property
    def _stops_masked(self) -> bool:
        return self.generated < self.params.min_tokens and bool(self.params.stop_token_ids)

    def settled(self, token_id: int) -> int:
        """The token to take where `token_id` was drawn; a constraint may have to bring the answer to its end."""
        return token_id if self.constraint is None else self.constraint.settled(token_id)

    @property
    def was_cut(self) -> bool:
        """Whether the constraint brought the answer to its end because `max_tokens` would not have sufficed."""
        return self.constraint is not None and self.constraint.was_cut

    def accept(self, token_id: int) -> None:
        """Note a token as generated."""
        self.generated += 1
        if self.constraint is not None:
            self.constraint.accept(token_id)
        if self._penalised and token_id not in self._seen:
            self._seen.add(token_id)
            self._new.append(token_id)

    def scores(self, row: Tensor) -> Tensor:
        """The logits after repetition penalty, constraint and `min_tokens`.

        `min_tokens` gives way where the constraint allows nothing but the end.

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
        if self.constraint is not None:
            allowed = torch.from_numpy(self.constraint.mask(len(scores))).to(scores.device)
            scores = scores.masked_fill(~allowed, -math.inf)
        if self._stops_masked:
            stops = [t for t in self.params.stop_token_ids if t < len(scores)]
            going_on = scores.index_fill(0, torch.tensor(stops, device=scores.device), -math.inf)
            if self.constraint is None or bool((going_on > -math.inf).any()):
                return going_on
        return scores

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
            EngineError: The constraint cannot be followed any further.
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
        +Inf, or nothing but -Inf, or where the options drive them there; an `EngineError` where a constraint cannot be
        followed.
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
