"""Keys and values are read from vLLM's blocks as they were written there, however a backend lays them out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: see docs/vllm.md")

from avp_agents.errors import ConfigurationError, UnsupportedModelError
from avp_agents.kv_cache import HostKv
from avp_agents.vllm.plugin import kv_blocks
from avp_agents.vllm.plugin.kv_blocks import KvBlocks

BLOCKS, HEADS, BLOCK, DIM, LAYERS = 6, 3, 16, 8, 2

Write = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def _side_by_side(layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: Any) -> None:
    """A position's key, and its value behind it, as on a GPU."""
    view = cache.transpose(1, 2)
    view[slots // BLOCK, slots % BLOCK] = torch.cat((keys, values), dim=-1)


def _in_planes(layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: Any) -> None:
    """All keys of a block, dimension by dimension, and all values behind them, as on a CPU."""
    planes = cache.view(BLOCKS, HEADS, 2, DIM, BLOCK)
    planes[slots // BLOCK, :, 0, :, slots % BLOCK] = keys
    planes[slots // BLOCK, :, 1, :, slots % BLOCK] = values


def _rounded(layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: Any) -> None:
    _side_by_side(layer, (keys / 16).round(), values, cache, slots)


def _blocks(write: Write, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[KvBlocks, list[torch.Tensor]]:
    module = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=write))
    names = [f"model.layers.{index}.self_attn.attn" for index in range(LAYERS)]
    caches = {name: torch.zeros(BLOCKS, HEADS, BLOCK, 2 * DIM, dtype=changes.get("kept_in", dtype)) for name in names}
    model = SimpleNamespace(
        model="tiny",
        dtype=dtype,
        get_total_num_kv_heads=lambda: changes.get("heads", HEADS),
        get_num_kv_heads=lambda parallel: HEADS,
        get_head_size=lambda: DIM,
    )
    context = SimpleNamespace(static_forward_context=dict.fromkeys(names, module))
    config = SimpleNamespace(model_config=model, compilation_config=context, parallel_config=None)
    return KvBlocks(cast("Any", config), caches), list(caches.values())


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_blocks, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(kv_blocks, "get_tensor_model_parallel_world_size", lambda: 1)


def _kv(length: int, dtype: torch.dtype = torch.float32) -> HostKv:
    generator = torch.Generator().manual_seed(length)
    layers = torch.randn(LAYERS, 2, HEADS, length, DIM, generator=generator).to(dtype)
    return HostKv(tuple((keys, values) for keys, values in layers))


def _assert_equal(one: HostKv | None, other: HostKv) -> None:
    assert one is not None
    for pair, other_pair in zip(one.layers, other.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other_pair, strict=True))


@pytest.mark.parametrize("write", [_side_by_side, _in_planes], ids=["side by side", "in planes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_was_written_is_read(write: Write, dtype: torch.dtype) -> None:
    blocks, caches = _blocks(write, dtype)
    kv = _kv(41, dtype)

    blocks.write(kv, [4, 1, 3], 0, 41, BLOCK)

    _assert_equal(blocks.read([4, 1, 3], 41, BLOCK), kv)
    assert all(not cache[[2, 5]].any() for cache in caches)


def test_a_scheduler_may_count_in_larger_blocks() -> None:
    blocks, _ = _blocks(_in_planes)
    kv = _kv(40)

    blocks.write(kv, [2, 1], 0, 40, 2 * BLOCK)

    _assert_equal(blocks.read([2, 1], 40, 2 * BLOCK), kv)
    _assert_equal(blocks.read([4, 5, 2], 40, BLOCK), kv)


def test_what_was_there_before_stays() -> None:
    blocks, _ = _blocks(_side_by_side)
    first, whole = _kv(20), _kv(30)
    blocks.write(first, [1, 2], 0, 20, BLOCK)

    blocks.write(whole, [1, 2], 16, 30, BLOCK)

    _assert_equal(blocks.read([1, 2], 16, BLOCK), first.to_host(0, 16))
    held = blocks.read([1, 2], 30, BLOCK)
    assert held is not None
    _assert_equal(held.to_host(16, 30), whole.to_host(16, 30))


def test_each_rank_holds_its_own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_blocks, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(kv_blocks, "get_tensor_model_parallel_rank", lambda: 1)
    blocks, caches = _blocks(_side_by_side, heads=2 * HEADS)
    generator = torch.Generator().manual_seed(0)
    layers = torch.randn(LAYERS, 2, 2 * HEADS, 5, DIM, generator=generator)

    blocks.write(HostKv(tuple((keys, values) for keys, values in layers)), [3], 0, 5, BLOCK)

    assert torch.equal(caches[1][3, :, :5, :DIM], layers[1, 0, HEADS:])


def test_keys_of_another_shape_are_refused() -> None:
    blocks, _ = _blocks(_side_by_side)

    blocks.check(_kv(4))
    for kv in (_kv(4, torch.bfloat16), HostKv(_kv(4).layers[:1])):
        with pytest.raises(ConfigurationError, match="this model's are"):
            blocks.check(kv)


def test_a_cache_that_is_not_in_the_models_dtype_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--kv-cache-dtype auto"):
        _blocks(_side_by_side, kept_in=torch.float16)


def test_a_backend_that_changes_what_it_keeps_is_refused() -> None:
    blocks, _ = _blocks(_rounded)

    with pytest.raises(UnsupportedModelError, match="as they are"):
        blocks.read([1], 4, BLOCK)
