"""What contexts take, as computed from a model's configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from avp_agents.cli import app
from avp_agents.context import Context, LatentRecipe, LatentSegment, Readout, TokenSegment
from avp_agents.engine.core.latent_step import READOUT_K
from avp_agents.errors import ModelNotFoundError, UnsupportedModelError
from avp_agents.kv_cache import HostKv
from avp_agents.protocol.frame_metadata import SectionKind
from avp_agents.protocol.kv_storage import store_tensor
from avp_agents.sizing import READOUT_TOKENS, ContextSize, ModelSizes
from avp_agents.store import Namespace, ObjectStore

MODEL = ModelSizes("small", layers=3, kv_heads=2, key_dim=8, value_dim=8, hidden=16)
TOKENS, STEPS = 40, 5


def made_context() -> Context:
    """A context of `MODEL`, of random numbers."""
    recipe = LatentRecipe(method="soft", k=256, temperature=1.0, renormalise=False, steps=STEPS)
    lineage = (TokenSegment(tuple(range(TOKENS))), LatentSegment(torch.rand(STEPS, 16).bfloat16(), recipe))
    readout = Readout(torch.rand(16).bfloat16(), torch.arange(READOUT_K), torch.rand(READOUT_K))
    context = Context("ab" * 32, "bfloat16", lineage, readout)
    tensors = [torch.rand(2, TOKENS + STEPS, 8).bfloat16() for _ in range(6)]
    context.attach(kv=HostKv(tuple(zip(tensors[::2], tensors[1::2], strict=True))))
    return context


def test_sizes_are_those_of_a_real_context(tmp_path: Path) -> None:
    context, size = made_context(), ContextSize.of(MODEL, TOKENS, STEPS)
    store = ObjectStore(tmp_path.as_uri(), namespace=Namespace("a", b"k" * 32))
    store.put(context)
    stats = store.stats()

    assert context.kv is not None
    assert size.kv_bytes == context.kv.nbytes
    assert 0 < stats.kv_bytes - size.kv_bytes < 4096, "a file's head comes on top"
    assert 0 < stats.lineage_bytes - size.lineage_bytes < 1024, "records' heads come on top"
    assert READOUT_TOKENS == READOUT_K


def test_int8_is_what_a_frame_takes() -> None:
    kv = made_context().kv
    assert kv is not None
    kinds: tuple[SectionKind, SectionKind] = ("keys", "values")
    stored = sum(
        store_tensor(tensor, kind, 0, compress=False, quantise=True).section.stored_bytes
        for pair in kv.to_host().layers
        for kind, tensor in zip(kinds, pair, strict=True)
    )

    assert ContextSize.of(MODEL, TOKENS, STEPS).kv_int8_bytes == stored


def test_a_link_of_the_break_even_speed_takes_as_long_either_way() -> None:
    size = ContextSize.of(MODEL, 1000, 20)
    prefill = 5000.0

    tied = size.seconds(size.break_even(prefill), prefill)
    faster = size.seconds(2 * size.break_even(prefill), prefill)

    assert tied["kv"] == pytest.approx(tied["replay"])
    assert faster["kv"] < faster["replay"]


def test_configurations_of_other_shapes() -> None:
    grouped = LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    wide = LlamaConfig(num_hidden_layers=4, num_attention_heads=8, hidden_size=64, head_dim=32)

    assert ModelSizes.from_config("a", grouped) == ModelSizes("a", 4, 2, 8, 8, 64)
    assert ModelSizes.from_config("b", wide) == ModelSizes("b", 4, 8, 32, 32, 64)


def test_layers_without_a_kv_cache_are_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["linear_attention", "full_attention"]

    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        ModelSizes.from_config("hybrid", config)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        ModelSizes.of(str(tmp_path))


def test_the_command_prints_json(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=3, num_attention_heads=2, hidden_size=16).save_pretrained(tmp_path)
    command = ["size", "--model", str(tmp_path), "--tokens", "40", "--steps", "5", "--prefill", "100", "--link", "1"]

    printed = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)

    (row,) = printed["contexts"]
    size = ContextSize.of(MODEL, TOKENS, STEPS)
    assert (row["kv_bytes"], row["lineage_bytes"]) == (size.kv_bytes, size.lineage_bytes)
    assert row["contexts_per_gb"]["kv"] == pytest.approx(1e9 / size.kv_bytes)
    assert row["kv_beats_replay_from_bits_per_second"]["kv"] == pytest.approx(size.break_even(100))
    assert set(row["seconds_by_link"]["1 Gbit/s"]) == {"kv", "kv int8", "replay"}


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=3, num_attention_heads=2, hidden_size=16).save_pretrained(tmp_path)

    result = CliRunner().invoke(app, ["size", "--model", str(tmp_path)], env={"COLUMNS": "160"})

    assert result.exit_code == 0
    assert "contexts per GB" in result.stdout
    assert "--measure" in result.stdout, "without a prefill speed, it says how to get the rest"


def test_prefill_is_given_or_measured() -> None:
    result = CliRunner().invoke(app, ["size", "--prefill", "5", "--measure"])

    assert result.exit_code == 1
    assert "not both" in result.stderr
