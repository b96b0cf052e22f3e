"""The scheduler's side of moving keys and values: who waits for what, and what becomes of what was not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: see docs/vllm.md")

from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from avp_agents.errors import ConfigurationError
from avp_agents.vllm.plugin.kv_connector import Moves, NotLoaded, StoreConnector
from avp_agents.vllm.plugin.kv_request import FIELD, KvRequest
from avp_agents.vllm.plugin.options import plugin_options

HANDLE = "avp:1:" + "a" * 32
BLOCK = 16


def _config(**parallel: Any) -> Any:
    transfer = plugin_options(kv_store="redis://nowhere")["kv_transfer_config"]
    return SimpleNamespace(
        kv_transfer_config=KVTransferConfig(**transfer),
        parallel_config=SimpleNamespace(pipeline_parallel_size=parallel.get("stages", 1)),
        cache_config=SimpleNamespace(block_size=BLOCK),
        model_config=SimpleNamespace(model="tiny"),
    )


def _open(groups: int = 1, **parallel: Any) -> StoreConnector:
    caches = SimpleNamespace(kv_cache_groups=[None] * groups)
    return StoreConnector(_config(**parallel), KVConnectorRole.SCHEDULER, cast("Any", caches))


@pytest.fixture
def connector() -> StoreConnector:
    return _open()


def _request(transfer: Any, *, salt: str | None = None, length: int = 100) -> Request:
    params = SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": transfer})
    return Request("a", list(range(length)), params, None, cache_salt=salt)


def _loading(positions: int = 80, length: int = 100) -> Request:
    asked = KvRequest(load=HANDLE, positions=positions)
    return _request(asked.transfer_params(), salt=asked.salt, length=length)


def _allocated(connector: StoreConnector, request: Request, loaded: int) -> None:
    count = -(-request.num_prompt_tokens // BLOCK)
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 1 + count)),))
    connector.update_state_after_alloc(request, cast("Any", blocks), loaded)


def _moves(connector: StoreConnector) -> Moves:
    moves = connector.build_connector_meta(cast("Any", None))
    assert isinstance(moves, Moves)
    return moves


def test_a_request_waits_for_what_is_not_here_yet(connector: StoreConnector) -> None:
    request = _loading()
    connector.on_new_request(request)

    assert connector.get_num_new_matched_tokens(request, 32) == (48, True)
    _allocated(connector, request, 48)

    (move,) = _moves(connector).loads
    assert (move.handle_id, move.start, len(move.prompt)) == (HANDLE, 32, 80)
    assert move.prompt.token_ids == list(range(80))
    assert not _moves(connector).loads
    assert connector.request_finished(request, []) == (False, {FIELD: {"loaded": 48}})


def test_the_last_position_is_computed(connector: StoreConnector) -> None:
    request = _loading(positions=100)
    connector.on_new_request(request)

    assert connector.get_num_new_matched_tokens(request, 0) == (99, True)


def test_what_is_computed_here_is_not_loaded(connector: StoreConnector) -> None:
    request = _loading()
    connector.on_new_request(request)

    assert connector.get_num_new_matched_tokens(request, 80) == (0, False)
    assert connector.get_num_new_matched_tokens(request, 96) == (0, False)


def test_what_could_not_be_loaded_is_not_tried_again(connector: StoreConnector) -> None:
    request = _loading()
    connector.on_new_request(request)
    connector.get_num_new_matched_tokens(request, 0)
    _allocated(connector, request, 80)

    reasons = NotLoaded({"a": "the store is away"}).aggregate(NotLoaded({"another": "it is gone"}))
    connector.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=reasons))

    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    assert connector.request_finished(request, [])[1] == {FIELD: {"loaded": 0, "error": "the store is away"}}


@pytest.mark.parametrize("salt", [None, "", "f" * 64], ids=["none", "empty", "another's"])
def test_nothing_is_loaded_without_the_contexts_salt(connector: StoreConnector, salt: str | None) -> None:
    """What was loaded is in vLLM's prefix cache, where others with the same ids would find it."""
    request = _request(KvRequest(load=HANDLE, positions=80).transfer_params(), salt=salt)
    connector.on_new_request(request)

    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    _, answer = connector.request_finished(request, [])
    assert answer is not None
    assert "cache_salt" in answer[FIELD]["error"]


def test_a_prompt_is_saved_when_it_is_complete(connector: StoreConnector) -> None:
    request = _request(KvRequest(save=HANDLE).transfer_params(), length=40)
    connector.on_new_request(request)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED

    assert connector.request_finished(request, [3, 5, 7]) == (True, {FIELD: {"saving": 40}})

    (move,) = _moves(connector).saves
    assert (move.handle_id, len(move.prompt), move.block_ids) == (HANDLE, 40, [3, 5, 7])


def test_a_request_that_was_given_up_saves_nothing(connector: StoreConnector) -> None:
    request = _request(KvRequest(save=HANDLE).transfer_params())
    connector.on_new_request(request)
    request.status = RequestStatus.FINISHED_ABORTED

    keeps_blocks, answer = connector.request_finished(request, [1])

    assert not keeps_blocks
    assert answer is not None
    assert "FINISHED_ABORTED" in answer[FIELD]["error"]
    assert not _moves(connector).saves


@pytest.mark.parametrize("transfer", [None, {}, {FIELD: "/etc/passwd"}, {"another": 1}])
def test_other_requests_are_left_alone(connector: StoreConnector, transfer: Any) -> None:
    request = _request(transfer)
    connector.on_new_request(request)

    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    assert connector.request_finished(request, [1]) == (False, None)


def test_what_cannot_be_moved_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="do not share one kind of KV-cache"):
        _open(groups=2)
    with pytest.raises(ConfigurationError, match="tensor parallelism"):
        _open(stages=2)
