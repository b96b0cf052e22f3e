"""What scheduler and workers tell each other about latent requests, carried by vLLM's KV connector interface.

    Scheduler side                                   Worker side
    hands out rows of the latent memory
    tells workers which thought is complete    ->    collects its tensors
    returns them with the request's output     <-    sends them with the step's output
    takes the rows back

It moves no keys or values; `kv_connector` does, and the two run side by side under vLLM's ``MultiConnector``.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_utils import BlockHash

from avp_agents.errors import ConfigurationError
from avp_agents.vllm.plugin.memory import memory_of
from avp_agents.vllm.plugin.request import (
    CONNECTOR,
    DEFAULT_ROWS,
    EXTRA_POSITIONS,
    FIELD,
    MAX_STEPS,
    ROWS_ARGUMENT,
    ThoughtRequest,
)

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

BlockHasher = Callable[["Request"], list[BlockHash]]


@dataclass
class Completed(KVConnectorMetadata):
    """Thoughts whose last step was run before this one: request id to request and rows."""

    thoughts: dict[str, tuple[ThoughtRequest, list[int]]] = field(default_factory=dict)


@dataclass
class Collected(KVConnectorWorkerMetadata):
    """Answers by request id, as `request.read_thought` reads them."""

    answers: dict[str, dict[str, Any]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """All answers of both; where both have one it is the same, since ranks compute the same."""
        assert isinstance(other, Collected)
        return Collected(other.answers | self.answers)


@dataclass
class _Thinking:
    """A latent request that the scheduler knows."""

    request: Request
    asked: ThoughtRequest
    rows: list[int] | None = None
    answer: dict[str, Any] | None = None

    def is_complete_before(self, scheduled: int) -> bool:
        """Whether a step of so many positions feeds one behind the thought: then all of it was computed before."""
        return self.request.num_computed_tokens + scheduled > self.request.num_prompt_tokens + self.asked.steps


class LatentConnector(KVConnectorBase_V1, SupportsHMA):
    """Rows and answers of latent requests; see the module."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._instance = vllm_config.instance_id
        self._thinking: dict[str, _Thinking] = {}
        self._free = list(range(latent_rows(vllm_config)))

    @property
    def requires_kv_delivery(self) -> bool:
        """No: there is no KV to deliver."""
        return False

    def on_new_request(self, request: Request) -> None:
        """Keep watch of a latent request, and its blocks out of the shared prefix cache."""
        transfer = request.kv_transfer_params
        if not isinstance(transfer, dict) or FIELD not in transfer:
            return
        self._thinking[request.request_id] = _Thinking(request, ThoughtRequest.parse(transfer[FIELD]))
        hasher = request._block_hasher
        if hasher is not None:
            request._block_hasher = _private(hasher)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """None, which is "ask again later", while there are not enough rows for a latent request; otherwise 0."""
        thinking = self._thinking.get(request.request_id)
        if thinking is not None and thinking.rows is None and len(self._free) <= thinking.asked.steps:
            return None, False
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Give a latent request its rows; it keeps them through preemptions."""
        thinking = self._thinking.get(request.request_id)
        if thinking is None or thinking.rows is not None:
            return
        thinking.rows = [self._free.pop() for _ in range(thinking.asked.steps + 1)]
        params = request.sampling_params
        assert params is not None
        # the dictionary may be shared with other requests, the parameters are this one's
        params.extra_args = {**(params.extra_args or {}), ROWS_ARGUMENT: thinking.rows}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Which thoughts are to be collected in the coming step."""
        completed = Completed()
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            thinking = self._thinking.get(request_id)
            if thinking is not None and thinking.answer is None and thinking.is_complete_before(count):
                assert thinking.rows is not None
                completed.thoughts[request_id] = thinking.asked, thinking.rows
        return completed

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the answers that the workers collected."""
        collected = connector_output.kv_connector_worker_meta
        if isinstance(collected, Collected):
            for request_id, answer in collected.answers.items():
                if request_id in self._thinking:
                    self._thinking[request_id].answer = answer

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return a latent request's answer, and take its rows back."""
        thinking = self._thinking.pop(request.request_id, None)
        if thinking is None:
            return False, None
        self._free.extend(thinking.rows or ())
        return False, {FIELD: thinking.answer or {"error": _why_unfinished(thinking)}}

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The same, where another connector beside this one knows no more than one group of KV blocks."""
        return self.request_finished_all_groups(request, (block_ids,))

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Collect the thoughts that are complete; the first rank speaks for all."""
        metadata = self._connector_metadata
        if not isinstance(metadata, Completed) or not metadata.thoughts or get_tensor_model_parallel_rank() > 0:
            return None
        memory = memory_of(self._instance)
        answers = {}
        for request_id, (asked, rows) in metadata.thoughts.items():
            tensors = memory.collect(rows, asked.stops_early)
            recipe = memory.step.recipe(**asdict(asked))
            answers[request_id] = {"recipe": asdict(recipe), "tensors": base64.b64encode(save(tensors)).decode()}
        return Collected(answers)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing to save."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""


def latent_rows(config: VllmConfig) -> int:
    """Rows of the latent memory that a vLLM is configured for.

    Raises:
        ConfigurationError: The latent connector is not configured, or has too few rows.
    """
    transfer = config.kv_transfer_config
    extra = _connector_options(transfer) if transfer is not None else None
    if extra is None:
        raise ConfigurationError(f"Latent steps need the KV connector {CONNECTOR}; see plugin_options().")
    rows = extra.get("latent_rows", DEFAULT_ROWS)
    if type(rows) is not int or rows <= MAX_STEPS:
        raise ConfigurationError(f"latent_rows must be a number above {MAX_STEPS}, not {rows!r}.")
    return rows


def _connector_options(transfer: KVTransferConfig) -> dict[str, Any] | None:
    """The extra configuration of the latent connector, which may be one of several."""
    if transfer.kv_connector == CONNECTOR:
        return transfer.kv_connector_extra_config
    for child in transfer.kv_connector_extra_config.get("connectors", ()):
        if child.get("kv_connector") == CONNECTOR:
            return child.get("kv_connector_extra_config", {})
    return None


def _private(hasher: BlockHasher) -> BlockHasher:
    """Name blocks that hold latents at random: no other request can ask for them, this one finds them again.

    The blocks of the prompt were named before, so they are shared as ever. The ids in the others name rows that will
    hold other latents later, and must never be looked up by those ids.
    """

    def name_at_random(request: Request) -> list[BlockHash]:
        return [BlockHash(secrets.token_bytes(len(digest))) for digest in hasher(request)]

    return name_at_random


def _why_unfinished(thinking: _Thinking) -> str:
    request = thinking.request
    needed = request.num_prompt_tokens + thinking.asked.steps + EXTRA_POSITIONS
    return (
        f"it ended with status {request.status.name} after {request.num_output_tokens} of {thinking.asked.max_tokens} "
        f"decode steps; a prompt of {request.num_prompt_tokens} positions needs a max_model_len of {needed}."
    )
