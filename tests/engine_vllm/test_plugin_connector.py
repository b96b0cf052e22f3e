"""The scheduler's side of latent requests: rows, names of KV blocks, answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from plugin_vllm import BLOCK
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from avp_agents.errors import ConfigurationError
from avp_agents.vllm.plugin.connector import Collected, Completed, LatentConnector, latent_rows
from avp_agents.vllm.plugin.options import plugin_options
from avp_agents.vllm.plugin.request import FIELD, ROWS_ARGUMENT, ThoughtRequest

ROWS = 2000
VOCABULARY = 49152


def _config(**extra: Any) -> Any:
    transfer = plugin_options(thinks_as="LlamaForCausalLM", rows=ROWS)["kv_transfer_config"]
    return SimpleNamespace(instance_id="test", kv_transfer_config=KVTransferConfig(**(transfer | extra)))


@pytest.fixture
def connector() -> LatentConnector:
    return LatentConnector(_config(), KVConnectorRole.SCHEDULER, cast("Any", None))


def _request(name: str, prompt: list[int], steps: int | None = None) -> Request:
    init_none_hash(sha256)
    options: dict[str, Any] = {"max_tokens": 8} if steps is None else ThoughtRequest(steps=steps).sampling_options()
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, prompt, SamplingParams(**options), None, block_hasher=hasher)


def _admit(connector: LatentConnector, request: Request) -> list[int]:
    """Bring a request into the batch, as the scheduler does; returns its rows."""
    connector.on_new_request(request)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    connector.update_state_after_alloc(request, cast("Any", None), 0)
    assert request.sampling_params is not None
    return (request.sampling_params.extra_args or {}).get(ROWS_ARGUMENT, [])


def _scheduled(connector: LatentConnector, request: Request, count: int) -> Completed:
    output = SimpleNamespace(num_scheduled_tokens={request.request_id: count})
    metadata = connector.build_connector_meta(cast("Any", output))
    assert isinstance(metadata, Completed)
    return metadata


def test_rows_are_a_requests_own_until_it_ends(connector: LatentConnector) -> None:
    first, second = _request("a", [1, 2], steps=20), _request("b", [1, 2], steps=3)

    rows = _admit(connector, first)
    others = _admit(connector, second)
    assert (len(rows), len(others)) == (21, 4)
    assert not set(rows) & set(others)

    # a preempted request comes through here again
    connector.update_state_after_alloc(first, cast("Any", None), 0)
    assert first.sampling_params is not None
    assert (first.sampling_params.extra_args or {})[ROWS_ARGUMENT] == rows

    connector.request_finished_all_groups(first, ())
    assert set(rows) <= set(_admit(connector, _request("c", [1, 2], steps=30)))


def test_requests_wait_for_rows_and_ordinary_ones_do_not(connector: LatentConnector) -> None:
    first, second = _request("a", [1], steps=1000), _request("b", [1], steps=1000)
    _admit(connector, first)
    connector.on_new_request(second)

    assert connector.get_num_new_matched_tokens(second, 0) == (None, False)
    assert _admit(connector, _request("c", [1])) == []

    connector.request_finished_all_groups(first, ())
    assert len(_admit(connector, second)) == 1001


def test_a_callers_options_are_not_written_to(connector: LatentConnector) -> None:
    params = SamplingParams(**ThoughtRequest(steps=2).sampling_options())
    shared = params.extra_args
    _admit(connector, Request("a", [1], params.clone(), None))
    assert shared is not None
    assert ROWS_ARGUMENT not in shared


def test_blocks_that_hold_latents_have_names_that_nobody_can_guess(connector: LatentConnector) -> None:
    """Rows are given again, so equal ids come to name other latents; blocks of the prompt are shared as ever."""
    prompt = list(range(BLOCK + 100))
    ordinary = _request("plain", prompt)
    latent_ids = [VOCABULARY + row for row in range(40)]
    named: list[list[bytes]] = []
    for name in ("a", "b"):
        request = _request(name, prompt, steps=40)
        _admit(connector, request)
        for token_id in latent_ids:
            request.append_output_token_ids(token_id)
        named.append(list(request.block_hashes))
        connector.request_finished_all_groups(request, ())
    for token_id in latent_ids:
        ordinary.append_output_token_ids(token_id)

    assert [len(names) for names in named] == [2, 2]
    assert named[0][0] == named[1][0] == ordinary.block_hashes[0]
    assert len({named[0][1], named[1][1], ordinary.block_hashes[1]}) == 3


def test_a_thought_is_collected_once_a_position_behind_it_is_fed(connector: LatentConnector) -> None:
    request = _request("a", [1, 2, 3, 4, 5], steps=2)
    rows = _admit(connector, request)

    fed = []
    for computed, count in ((0, 5), (5, 1), (6, 1), (7, 1), (8, 1)):
        request.num_computed_tokens = computed
        fed.append(_scheduled(connector, request, count).thoughts)
        if fed[-1]:
            answer = {"recipe": {}, "tensors": ""}
            collected = Collected({"a": answer, "gone": answer})
            connector.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=collected))

    assert fed == [{}, {}, {}, {"a": (ThoughtRequest(steps=2), rows)}, {}]
    assert connector.request_finished_all_groups(request, ()) == (False, {FIELD: {"recipe": {}, "tensors": ""}})


def test_an_unfinished_thought_says_what_it_would_have_needed(connector: LatentConnector) -> None:
    request = _request("a", [1] * 500, steps=20)
    _admit(connector, request)
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED

    _, answer = connector.request_finished_all_groups(request, ())

    assert answer is not None
    assert "a prompt of 500 positions needs a max_model_len of 523" in answer[FIELD]["error"]


def test_ordinary_requests_get_no_answer(connector: LatentConnector) -> None:
    request = _request("a", [1, 2])
    _admit(connector, request)
    assert connector.request_finished(request, []) == (False, None)


def test_the_connector_must_be_configured_and_may_be_one_of_several() -> None:
    assert latent_rows(_config()) == ROWS
    latent = plugin_options(thinks_as="LlamaForCausalLM")["kv_transfer_config"]
    several = {"connectors": [{"kv_connector": "ExampleConnector"}, latent]}
    assert latent_rows(_config(kv_connector="MultiConnector", kv_connector_extra_config=several)) == 8192
    with pytest.raises(ConfigurationError, match="need the KV connector LatentConnector"):
        latent_rows(_config(kv_connector="ExampleConnector"))
    with pytest.raises(ConfigurationError, match="latent_rows must be a number above 1024, not 10"):
        latent_rows(_config(kv_connector_extra_config={"latent_rows": 10}))
