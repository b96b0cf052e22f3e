"""What takes the place of sampling in the rows of latent requests."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from avp_agents.context import LatentRecipe
from avp_agents.errors import ConfigurationError
from avp_agents.vllm.plugin.memory import memory_of
from avp_agents.vllm.plugin.request import FIELD, ROWS_ARGUMENT, ThoughtRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

_NEUTRAL = {
    "n": 1, "allowed_token_ids": None, "bad_words": [], "logit_bias": None, "min_tokens": 0, "structured_outputs": None,
    "logprobs": None, "prompt_logprobs": None,
}  # fmt: skip
"""Options of which a latent request may give no other value: there is no token that they could speak of."""


def thought_request(params: SamplingParams) -> ThoughtRequest | None:
    """The thought that a request asks for; None where it is an ordinary one.

    Raises:
        ConfigurationError: It asks for something that is malformed.
    """
    transfer = (params.extra_args or {}).get("kv_transfer_params")
    return ThoughtRequest.parse(transfer[FIELD]) if isinstance(transfer, dict) and FIELD in transfer else None


@dataclass
class _Row:
    """A latent request in the batch.

    Attributes:
        recipe: How it steps.
        every_step: Whether every step is read out, or the last one.
        rows: Its rows in the latent memory, one more than it has steps.
        output_ids: vLLM's list of what was sampled so far; it grows.
    """

    recipe: LatentRecipe
    every_step: bool
    rows: list[int]
    output_ids: list[int]


class LatentSampling(LogitsProcessor):
    """Writes f(h) of latent rows into the latent memory, and has the sampler choose the id that names it.

    A prompt that is prefilled in chunks, or again after a preemption, passes here with hidden states of other
    positions. What they leave in a row is overwritten before the row's id is accepted, and with that before it is fed.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse malformed latent requests where they arrive.

        Raises:
            ConfigurationError: An option is unknown, out of range, or contradicts another one.
        """
        if ROWS_ARGUMENT in (sampling_params.extra_args or {}):
            raise ConfigurationError(f"{ROWS_ARGUMENT} is set by the scheduler only.")
        asked = thought_request(sampling_params)
        if asked is None:
            return
        given = sampling_params.max_tokens
        if given != asked.max_tokens:
            raise ConfigurationError(
                f"A thought of {asked.steps} steps needs max_tokens={asked.max_tokens}, not {given}; a server lowers "
                "it where the prompt leaves no room for so many positions."
            )
        other = [name for name, value in _NEUTRAL.items() if getattr(sampling_params, name) not in (None, value)]
        if other:
            raise ConfigurationError(f"A latent request samples nothing; drop {', '.join(other)}.")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._instance = vllm_config.instance_id
        self._device = device
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """No: greedy requests are latent ones too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests into, within and out of the batch."""
        process_dict_updates(self._rows, batch_update, self._new_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Step all latent rows of logits ``[n, vocabulary]``.

        Returns:
            The logits, widened to the ids that were chosen, if there are latent rows.
        """
        if not self._rows:
            return logits
        memory = memory_of(self._instance)
        hidden = memory.last_hidden
        assert hidden is not None
        assert len(hidden) == len(logits)
        groups: dict[LatentRecipe, list[tuple[int, int]]] = defaultdict(list)
        readouts: list[tuple[int, int]] = []
        chosen: list[tuple[int, int]] = []
        for index, row in self._rows.items():
            step, last = len(row.output_ids), len(row.rows) - 1
            target = row.rows[min(step, last)]
            chosen.append((index, memory.vocabulary_size + target))
            if step <= last:
                groups[row.recipe].append((index, target))
                if row.every_step or step == last:
                    readouts.append((index, target))
        for recipe, pairs in groups.items():
            where, rows = self._split(pairs)
            memory.write(rows, hidden[where], logits[where], recipe)
        if readouts:
            where, rows = self._split(readouts)
            memory.write_readout(rows, logits[where])
        return self._choose(logits, chosen)

    def _choose(self, logits: torch.Tensor, chosen: list[tuple[int, int]]) -> torch.Tensor:
        """Widen the logits so that rows ``chosen[i][0]`` have one possible id, ``chosen[i][1]``."""
        width = 1 + max(token_id for _, token_id in chosen)
        widened = logits.new_full((len(logits), width), float("-inf"))
        widened[:, : logits.shape[1]] = logits
        where, ids = self._split(chosen)
        widened[where] = float("-inf")
        widened[where, ids] = 0.0
        return widened

    def _split(self, pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.tensor(pairs).to(self._device, non_blocking=True)
        return both[:, 0], both[:, 1]

    def _new_row(self, params: SamplingParams, _prompt_ids: list[int] | None, output_ids: list[int]) -> _Row | None:
        asked = thought_request(params)
        if asked is None:
            return None
        assert params.extra_args is not None
        memory = memory_of(self._instance)
        recipe = memory.step.recipe(
            asked.steps,
            method=asked.method,
            k=asked.k,
            temperature=asked.temperature,
            renormalise=asked.renormalise,
            stop_cosine=asked.stop_cosine,
            stop_entropy=asked.stop_entropy,
        )
        memory.step.prepare(recipe)
        return _Row(recipe, asked.stops_early, params.extra_args[ROWS_ARGUMENT], output_ids)
