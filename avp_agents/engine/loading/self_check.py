"""A check at load: the model on the KV pool computes what the same model computes without it."""

from __future__ import annotations

import torch

from avp_agents.engine.core.attention import IMPLEMENTATION, Layout, PoolCache, Row
from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.engine.core.model import Forward, LoadedModel, decoder_of, last_hidden
from avp_agents.errors import UnsupportedModelError

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.2}
"""Largest relative deviation of last hidden states, in float32 of every position, in half precision of the median one:
there single positions of a sound model differ by 0.4 between two of transformers' own attentions. A wrong mask or
position gives errors of the order of 1 at most positions."""
_LONG, _SHORT, _CUT = 13, 6, 9


@torch.inference_mode()
def verify_exactness(loaded: LoadedModel, pool: KvPool) -> None:
    """Run two ragged rows, one of them in two chunks, on the pool and without it, and compare.

    Raises:
        UnsupportedModelError: They differ by more than rounding.
    """
    if pool.positions < _LONG + _SHORT:
        return
    ids = torch.randint(0, loaded.vocabulary.size, (_LONG + _SHORT,), generator=torch.Generator().manual_seed(0))
    ids = ids.to(loaded.device)
    try:
        pooled = _pooled(loaded, pool, loaded.vocabulary.embed(ids))
        plain = _plain(loaded, ids)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(loaded.model).__name__} does not run on the KV pool: {type(error).__name__}: {error}"
        ) from error
    deviations = (pooled - plain).norm(dim=-1) / plain.norm(dim=-1)
    deviation = float(deviations.max() if loaded.dtype is torch.float32 else deviations.median())
    if not deviation <= TOLERANCE[loaded.dtype]:
        raise UnsupportedModelError(
            f"{type(loaded.model).__name__} on the KV pool deviates by {deviation:.2g} (relative) from the model "
            "without it; the engine would not represent it exactly."
        )


def _pooled(loaded: LoadedModel, pool: KvPool, embeddings: torch.Tensor) -> torch.Tensor:
    """Hidden states ``[19, hidden]`` float32: first 9 of 13 and 6 of 6 positions together, then the remaining 4."""
    forward, cache = Forward(loaded.model), PoolCache(pool)
    first = torch.cat([torch.arange(_CUT), torch.arange(_SHORT)])
    second = torch.arange(_CUT, _LONG)
    inputs = torch.cat([embeddings[:_CUT], embeddings[_LONG:]])
    hidden = [
        _pass(forward, cache, inputs, first, (Row(0, _CUT, 0, _CUT), Row(_CUT, _SHORT, _LONG, _SHORT))),
        _pass(forward, cache, embeddings[_CUT:_LONG], second, (Row(0, _LONG - _CUT, 0, _LONG),)),
    ]
    return torch.cat([hidden[0][:_CUT], hidden[1], hidden[0][_CUT:]])


def _pass(
    forward: Forward, cache: PoolCache, inputs: torch.Tensor, positions: torch.Tensor, rows: tuple[Row, ...]
) -> torch.Tensor:
    bases = torch.cat([torch.full((row.count,), row.base) for row in rows])
    layout = Layout(slots=(bases + positions).to(inputs.device), rows=rows)
    return forward(inputs, positions.to(inputs.device), None, cache, layout)[0].float()


def _plain(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """The same positions from their ids, each row alone, without cache, by transformers' own eager attention."""
    model = loaded.model
    decoder = decoder_of(model)
    model.set_attn_implementation("eager")
    try:
        rows = (ids[:_LONG], ids[_LONG:])
        hidden = [last_hidden(decoder(input_ids=row[None], use_cache=False))[0].float() for row in rows]
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    return torch.cat(hidden)
