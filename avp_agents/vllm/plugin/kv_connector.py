"""Contexts' keys and values between vLLM and a store, by vLLM's KV connector interface.

    Scheduler side                                   Worker side
    knows which request names which context
    keeps a loading request waiting            ->    fetches in the background, writes between two steps
    prefills what could not be loaded          <-    says what could not, and why
    keeps a saved request's blocks             ->    copies them to the host, stores them in the background

A request's prompt is always complete, so whatever is not loaded is computed: because it is not there, is another
model's, is not what the prompt says, or the store is away.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.v1.request import RequestStatus

from avp_agents.errors import ConfigurationError
from avp_agents.store import open_store
from avp_agents.vllm.plugin.kv_blocks import KvBlocks
from avp_agents.vllm.plugin.kv_request import FIELD, KvRequest, PromptStart
from avp_agents.vllm.plugin.kv_worker import KvMove, Mover

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from avp_agents.vllm.served_model import ServedModel

log = logging.getLogger(__name__)

_COMPLETE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass
class Moves(KVConnectorMetadata):
    """What a step's workers are to load and save."""

    loads: list[KvMove] = field(default_factory=list)
    saves: list[KvMove] = field(default_factory=list)


@dataclass
class NotLoaded(KVConnectorWorkerMetadata):
    """Why requests got nothing, by request id."""

    reasons: dict[str, str]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """The reasons of both; one rank's failure is everybody's."""
        assert isinstance(other, NotLoaded)
        return NotLoaded(other.reasons | self.reasons)


@dataclass
class _Asking:
    """A request that the scheduler knows, and what came of what it asked for."""

    asked: KvRequest
    loaded: int = 0
    refused: str | None = None

    def stop(self, request: Request) -> int:
        """Where the load ends: the last position of a prompt is always computed, since its logits are needed."""
        return min(self.asked.positions, request.num_prompt_tokens - 1)


class StoreConnector(KVConnectorBase_V1):
    """Loads and saves for requests that ask for it; see the module.

    Raises:
        ConfigurationError: vLLM keeps keys and values in a way that cannot be moved.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) > 1:
            raise ConfigurationError(
                f"The layers of {vllm_config.model_config.model} do not share one kind of KV-cache, so it cannot be "
                "moved. Serve it without kv_store."
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ConfigurationError("The store connector runs without pipeline parallelism; use tensor parallelism.")
        self._block_size = vllm_config.cache_config.block_size
        self._asking: dict[str, _Asking] = {}
        self._moves = Moves()
        self._mover: Mover | None = None
        self._saved: set[str] = set()
        self._not_loaded: dict[str, tuple[KvMove, str]] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        """No: whoever does not find keys and values computes them."""
        return False

    def on_new_request(self, request: Request) -> None:
        """Note what a request asks for."""
        transfer = request.kv_transfer_params
        if not isinstance(transfer, dict) or FIELD not in transfer:
            return
        try:
            asked = KvRequest.parse(transfer[FIELD])
        except ConfigurationError as error:
            log.warning("A request's %s is left aside: %s", FIELD, error)
            return
        asking = _Asking(asked)
        if asked.load is not None and request.cache_salt != asked.salt:
            asking.refused = "cache_salt is not the salt of the context that is to be loaded"
        self._asking[request.request_id] = asking

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Positions to be loaded, while others run; those that are computed here already are not."""
        asking = self._asking.get(request.request_id)
        if asking is None or asking.asked.load is None or asking.refused is not None:
            return 0, False
        positions = asking.stop(request) - num_computed_tokens
        return (positions, True) if positions > 0 else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Have the workers load into the blocks that a request was given."""
        asking = self._asking.get(request.request_id)
        if asking is None or not num_external_tokens:
            return
        stop = asking.stop(request)
        asking.loaded = num_external_tokens
        move = self._move(request, asking, blocks.get_block_ids()[0], stop - num_external_tokens, stop)
        self._moves.loads.append(move)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What has come up since the last step."""
        moves, self._moves = self._moves, Moves()
        return moves

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Note what was not loaded, so that it is not tried again."""
        said = connector_output.kv_connector_worker_meta
        if isinstance(said, NotLoaded):
            for request_id in said.reasons.keys() & self._asking.keys():
                self._asking[request_id].loaded = 0
                self._asking[request_id].refused = said.reasons[request_id]

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Have a prompt's keys and values saved before its blocks are given away, and say what was done."""
        asking = self._asking.pop(request.request_id, None)
        if asking is None:
            return False, None
        if asking.asked.save is None:
            refused = {} if asking.refused is None else {"error": asking.refused}
            return False, {FIELD: {"loaded": asking.loaded, **refused}}
        if request.status not in _COMPLETE:
            return False, {FIELD: {"error": f"the request ended with status {request.status.name}"}}
        length = request.num_prompt_tokens
        self._moves.saves.append(self._move(request, asking, block_ids, 0, length))
        return True, {FIELD: {"saving": length}}

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the worker's blocks."""
        options = self._kv_transfer_config.kv_connector_extra_config
        store = open_store(options["store"], options.get("namespace", "default")).lower
        model = self._vllm_config.model_config
        served = partial(_served_model, model.model, model.revision)
        self._mover = Mover(store, KvBlocks(self._vllm_config, kv_caches), self._block_size, served)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begin this step's loads."""
        for move in self._step_moves().loads:
            self._running_mover.load(move)

    def wait_for_save(self) -> None:
        """Copy what is to be saved."""
        for move in self._step_moves().saves:
            self._running_mover.save(move)
            self._saved.add(move.request_id)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Which requests need not wait any more."""
        results = KVConnectorTransferResults()
        if self._mover is not None:
            results.finished_recving, self._not_loaded = self._mover.finish_loads()
            results.finished_sending, self._saved = self._saved, set()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that were to be loaded and were not: they are computed."""
        return {
            block
            for move, _ in self._not_loaded.values()
            for block in move.block_ids[move.start // self._block_size : -(-len(move.prompt) // self._block_size)]
        }

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Why not."""
        failed, self._not_loaded = self._not_loaded, {}
        return NotLoaded({request_id: reason for request_id, (_, reason) in failed.items()}) if failed else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs when it is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing to do: a request is saved when it is complete."""

    def shutdown(self) -> None:
        """Finish saving."""
        if self._mover is not None:
            self._mover.close()

    @property
    def _running_mover(self) -> Mover:
        assert self._mover is not None
        return self._mover

    def _step_moves(self) -> Moves:
        return self._connector_metadata if isinstance(self._connector_metadata, Moves) else Moves()

    def _move(self, request: Request, asking: _Asking, block_ids: list[int], start: int, stop: int) -> KvMove:
        ids = request.prompt_token_ids or [0] * request.num_prompt_tokens
        handle_id = asking.asked.handle_id
        assert handle_id is not None
        return KvMove(
            request.request_id,
            handle_id,
            PromptStart.of(ids, request.prompt_is_token_ids, request.prompt_embeds, stop),
            list(block_ids),
            start,
        )


@cache
def _served_model(name: str, revision: str | None) -> ServedModel:
    # the tokenizer's machinery is only needed here
    from avp_agents.vllm.served_model import ModelSettings, ServedModel

    return ServedModel(ModelSettings(name, {"revision": revision} if revision else {}))
