"""Splices: keys and values that were made behind another prefix, moved to where they stand now.

They are moved by the model's own rotary embedding.

A key that was made at position p carries the rotation R(p). Rotations compose, so R(d) takes it to position p + d;
values carry no position. R(d) comes from the model: its rotary module gives cosines and sines, and the function that
its attention applies to queries and keys applies them here. Whether that is exact is tried on every layer: one token
alone, at two positions, must give keys that the rotation takes into one another. What a model multiplies its cosines
and sines with (YaRN's attention factor) is in the key already and is divided out.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from avp_agents.context import SplicedSegment, prefix_of
from avp_agents.engine.core.attention import Layout, Row
from avp_agents.engine.core.forward import Piece
from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.engine.core.model import Forward, LoadedModel
from avp_agents.engine.core.prefill import Move
from avp_agents.engine.core.sequence import Extra, Sequence
from avp_agents.errors import UnsupportedModelError
from avp_agents.lineage import concatenated, shared_positions

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative deviation of a rotated key from one made in place. The models' own angles are float32, whose
rounding at position 4000 alone is 2e-4."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
_PROBE_START, _PROBE_STOP = 3, 4096


@dataclass(frozen=True)
class _Rotary:
    """Where one layer's rotation comes from.

    Attributes:
        module: The rotary module; called with a tensor (for its dtype), positions ``[1, 1]`` and `arguments`.
        arguments: What else it is called with, such as the layer's type.
        apply: The attention's own function: queries, keys, cosines, sines to rotated queries and keys.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def rotate(self, keys: torch.Tensor, by: int) -> torch.Tensor:
        """Keys ``[kv_heads, positions, dim]``, `by` positions forward; computed in float32."""
        at = torch.tensor([[by]], device=keys.device)
        cos, sin = self.module(torch.zeros(1, device=keys.device), at, *self.arguments)
        scale = (cos.square() + sin.square()).sqrt()
        cos, sin = cos / scale, sin / scale
        turned = keys[None, ..., : cos.shape[-1]].float()
        _, turned = self.apply(turned, turned, cos, sin)
        return torch.cat([turned[0].to(keys.dtype), keys[..., cos.shape[-1] :]], dim=-1)


class Splices(Extra):
    """Prefills splices: copies them from where they were made, and moves their keys. On the scheduler's thread only.

    Args:
        loaded: The model.
        pool: Its KV memory.
        copies: Whether a splice may be copied from where it was made. Not where results must be bit-equal: it may have
            been made in other shapes there.
    """

    def __init__(self, loaded: LoadedModel, pool: KvPool, *, copies: bool) -> None:
        self._loaded, self._pool, self._copies = loaded, pool, copies
        self._rotaries: list[_Rotary | None] | None = None
        self._refusal: UnsupportedModelError | None = None

    @override
    def admitting(self, sequence: Sequence) -> None:
        """Find each layer's rotation and try it, when it is needed for the first time.

        Raises:
            UnsupportedModelError: Keys of this model cannot be moved exactly.
        """
        if self._rotaries is None and self._refusal is None:
            try:
                self._rotaries = self._find()
            except UnsupportedModelError as error:
                self._refusal = error
        if self._refusal is not None:
            raise self._refusal

    @override
    def before_round(self, sequence: Sequence) -> None:
        """Fill in splices whose keys and values are still where they were made."""
        while self._copies and _copy_splice(sequence, self._pool):
            # of splices within it, the keys were moved before they were copied
            self._move(sequence, _moves_due(sequence)[-1:])

    @override
    def after_fed(self, sequence: Sequence, piece: Piece) -> None:
        """Rotate the keys of splices that have just been completed."""
        self._move(sequence, _moves_due(sequence))

    def _move(self, sequence: Sequence, moves: tuple[Move, ...]) -> None:
        assert sequence.region is not None
        base = sequence.region.start
        for move in moves:
            assert self._rotaries is not None
            span = slice(base + move.start, base + move.stop)
            for keys, rotary in zip(self._pool.keys, self._rotaries, strict=True):
                if rotary is not None:
                    keys[:, span] = rotary.rotate(keys[:, span], move.by)

    def _find(self) -> list[_Rotary | None]:
        """Per layer its rotation; None where its keys carry no position."""
        self._refuse_length_dependent()
        first, rotaries = self._one_token(_PROBE_START)
        farthest = max(1, min(_PROBE_STOP, self._window()) - _PROBE_START - 1)
        found: list[_Rotary | None] = list(rotaries)
        for by in (1, farthest // 2 + 1, farthest):
            moved, _ = self._one_token(_PROBE_START + by)
            for index, (here, there) in enumerate(zip(first, moved, strict=True)):
                found[index] = self._tried(index, rotaries[index], here, there, by)
        return found

    def _tried(
        self, index: int, rotary: _Rotary | None, here: torch.Tensor, there: torch.Tensor, by: int
    ) -> _Rotary | None:
        """The rotation that takes a layer's key `here` to `there`; None where they are one."""
        tolerance = TOLERANCE[self._loaded.dtype]
        if _deviation(here, there) <= tolerance * 1e-2:
            return None
        if rotary is not None:
            try:
                turned = rotary.rotate(here, by)
            except Exception:  # model code that is not called as it is here does not rotate as it does here
                turned = here
            if _deviation(turned, there) <= tolerance:
                return rotary
        raise UnsupportedModelError(
            f"{self._name}: keys of layer {index} are not moved {by} positions by a rotary embedding (learned or other "
            "positions), so contexts cannot be spliced. Use strategy='replay'."
        )

    def _one_token(self, position: int) -> tuple[list[torch.Tensor], list[_Rotary | None]]:
        """Each layer's key ``[kv_heads, 1, dim]`` of one token that is alone at `position`, and what rotated it."""
        model, device = self._loaded.model, self._loaded.device
        layers = [_KeyRecorder() for _ in self._pool.shapes]
        at = torch.tensor([position], device=device)
        layout = Layout(slots=torch.zeros_like(at), rows=(Row(0, 1, 0, 1),))
        with _Watch(model) as watch:
            Forward(model)(self._loaded.vocabulary.rows(0, 1), at, None, Cache(layers=list(layers)), layout)
        return [layer.key for layer in layers], [watch.rotary(index) for index in range(len(layers))]

    def _refuse_length_dependent(self) -> None:
        parameters = getattr(self._loaded.model.config.get_text_config(), "rope_parameters", None) or {}
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        for kind in {rope.get("rope_type") for rope in (parameters, *nested)} & set(LENGTH_DEPENDENT):
            raise UnsupportedModelError(
                f"{self._name}: its rotary embedding depends on the sequence's length (rope_type {kind!r}), so keys "
                "cannot be moved exactly and contexts cannot be spliced. Use strategy='replay'."
            )

    def _window(self) -> int:
        config = self._loaded.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 0) or 64)

    @property
    def _name(self) -> str:
        return type(self._loaded.model).__name__


class _Watch:
    """Notes, during a forward pass, which rotary module's output reaches which layer's attention."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: list[tuple[Any, nn.Module, tuple[Any, ...]]] = []
        self._received: dict[int, tuple[nn.Module, Any]] = {}
        self._hooks = []
        for module in model.modules():
            if "RotaryEmbedding" in type(module).__name__:
                self._hooks.append(module.register_forward_hook(self._note_output, with_kwargs=True))
            elif isinstance(getattr(module, "layer_idx", None), int):
                self._hooks.append(module.register_forward_pre_hook(self._note_received, with_kwargs=True))

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def rotary(self, layer: int) -> _Rotary | None:
        """What rotates the keys of a layer, if a rotary module does."""
        attention, embeddings = self._received.get(layer, (None, None))
        if attention is None:
            return None
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        source = next((found for found in self._outputs if found[0] is embeddings), None)
        if apply is None or source is None:
            return None
        return _Rotary(source[1], source[2], apply)

    def _note_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        self._outputs.append((output, module, tuple(given.values())[2:]))

    def _note_received(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        embeddings = kwargs.get("position_embeddings")
        if embeddings is not None:
            self._received[module.layer_idx] = (module, embeddings)  # pyright: ignore[reportArgumentType]


class _KeyRecorder(CacheLayerMixin):
    """Keeps the one key that a layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.key = torch.empty(0)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        self.key = key_states[0]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _moves_due(sequence: Sequence) -> tuple[Move, ...]:
    """What is to be moved, the newest position being in."""
    return next((run.moves for run in sequence.runs if run.stop == sequence.length), ())


def _next_splice(sequence: Sequence) -> SplicedSegment | None:
    """The splice that is to be prefilled next, if it is one, and not the last thing to be prefilled."""
    start = 0
    for segment in sequence.lineage:
        if start == sequence.length and isinstance(segment, SplicedSegment):
            return segment if start + len(segment) < sequence.total else None
        start += len(segment)
    return None


def _copy_splice(sequence: Sequence, pool: KvPool) -> bool:
    """Copy the keys and values of the sequence's next splice from where they were made, as far as they are there.

    Returns:
        Whether any were. Once the splice is complete its keys are yet to be moved.
    """
    splice = _next_splice(sequence)
    if splice is None:
        return False
    branch = concatenated(prefix_of(sequence.lineage, splice.prefix), splice.segments)
    most = splice.prefix + len(splice)
    # the keys of a splice within this one were moved already: it is copied whole or not at all
    least = most if any(isinstance(part, SplicedSegment) for part in splice.segments) else splice.prefix + 1
    source, found = 0, 0
    for view in pool.views():
        context, region = view.context(), view.region
        if context is None or region is None or view.owner is not sequence.request.owner:
            continue
        matched = min(view.length, most, shared_positions(concatenated(context.lineage), branch))
        if matched > found:
            source, found = region.start + splice.prefix, matched
    if found < least:
        return False
    assert sequence.region is not None
    copied = found - splice.prefix
    pool.copy(source, sequence.region.start + sequence.length, copied)
    sequence.started.reused += copied
    sequence.fed(copied)
    return True


def _deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-9))
