"""Engines on the same weights agree on which model that is, though one of them never loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from avp_agents import LatentEngine
from avp_agents.errors import ModelNotFoundError
from avp_agents.fingerprint import model_fingerprint
from avp_agents.vllm.served_model import ModelSettings, ServedModel


def test_the_fingerprint_is_that_of_the_latent_engine(smollm2_path: Path, latent_engine: LatentEngine) -> None:
    assert ServedModel(ModelSettings(str(smollm2_path))).fingerprint == latent_engine.fingerprint


@pytest.mark.parametrize(("tied", "shard_size"), [(True, "50GB"), (False, "100KB")], ids=["tied", "untied-in-shards"])
def test_tied_and_untied_heads_in_one_file_or_several(
    tmp_path: Path, served_model: ServedModel, tied: bool, shard_size: str
) -> None:
    tokenizer = served_model.tokenizer
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "qwen2", **shape, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=tied, layer_types=None
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    tokenizer.save_pretrained(tmp_path)

    served = ServedModel(ModelSettings(str(tmp_path)))

    assert served.fingerprint == model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer)
    rows = served.embeddings_of((7, 3), torch.float32)
    assert torch.equal(rows, model.get_input_embeddings().weight[[7, 3]])


def test_without_weights_the_fingerprint_has_to_be_given(tmp_path: Path, smollm2_path: Path) -> None:
    AutoTokenizer.from_pretrained(smollm2_path).save_pretrained(tmp_path)
    AutoConfig.from_pretrained(smollm2_path).save_pretrained(tmp_path)

    with pytest.raises(ModelNotFoundError, match="fingerprint="):
        ServedModel(ModelSettings(str(tmp_path))).fingerprint  # noqa: B018
    assert ServedModel(ModelSettings(str(tmp_path), {}, "cd" * 32)).fingerprint == "cd" * 32
