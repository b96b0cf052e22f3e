"""What a request asks of sampling, checked."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from avp_agents.answer.options import GenerateOptions
from avp_agents.engine.core.sampling import DEFAULT_MAX_TOKENS, SamplingParams
from avp_agents.errors import ConfigurationError

MAX_LOGPROBS = 50
MAX_STOP_STRINGS = 16


def sampling_params(
    options: GenerateOptions | Mapping[str, Any], *, vocab_limit: int, eos_token_ids: Iterable[int] = ()
) -> SamplingParams:
    """Check a request's options; None is an option's default. `grammar`, `timeout` and `source` are checked elsewhere.

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
    return SamplingParams(
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
