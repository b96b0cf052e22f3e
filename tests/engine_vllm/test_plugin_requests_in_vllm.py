"""What a vLLM that can think takes, and what it refuses: where a request arrives, and when it is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugin_vllm import FAMILIES, build_tokenizer, greedy, save_tiny_model, think, thinking_vllm, tokens
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.inputs import TokensPrompt

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.context import LatentSegment
from avp_agents.errors import ConfigurationError, EngineError
from avp_agents.vllm.plugin.models import _refuse
from avp_agents.vllm.plugin.options import plugin_options
from avp_agents.vllm.plugin.request import LOGITS_PROCESSOR, ThoughtRequest, read_thought
from avp_agents.vllm.plugin.sampling import LatentSampling

PROMPT = "the quick brown fox jumps over the lazy dog"
ROWS = 1100


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), FAMILIES["llama"])


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[LatentEngine]:
    store = MemoryStore(namespace=Namespace("plugin-tests", b"k" * 32))
    with LatentEngine.from_pretrained(str(tiny), dtype="float32", device="cpu", store=store) as engine:
        yield engine


@pytest.fixture(scope="module")
def llm(tiny: Path, engine: LatentEngine) -> Iterator[LLM]:
    with thinking_vllm(
        tiny, kv_transfer_config=plugin_options(thinks_as="LlamaForCausalLM", rows=ROWS)["kv_transfer_config"]
    ) as llm:
        yield llm


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 4, "method": "ridge"},
        {"steps": 4, "method": "rescale"},
        {"steps": 4, "k": None, "temperature": 0.5},
        {"steps": 4, "k": 7, "renormalise": True},
        {"steps": 5, "stop_cosine": 0.2},
        {"steps": 5, "stop_cosine": 0.9},
        {"steps": 5, "stop_entropy": 5.0},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_to_the_latent_engine(
    options: dict[str, Any], llm: LLM, engine: LatentEngine
) -> None:
    context = engine.think(PROMPT, **options)
    ids = context.token_ids()

    thought = think(llm, [ids], ThoughtRequest(**options))[0]

    assert len(thought.embeddings) == context.latent_steps
    assert context.readout is not None
    torch.testing.assert_close(thought.readout.hidden, context.readout.hidden, atol=1e-3, rtol=1e-3)
    if context.latent_steps:
        latent = context.lineage[-1]
        assert isinstance(latent, LatentSegment)
        assert thought.recipe == latent.recipe
        torch.testing.assert_close(thought.embeddings, latent.embeddings, atol=1e-4, rtol=1e-4)


def test_different_options_share_a_batch(llm: LLM) -> None:
    prompt = TokensPrompt(prompt_token_ids=build_tokenizer().encode(PROMPT))
    asked = [
        ThoughtRequest(steps=2, method="soft"),
        ThoughtRequest(steps=5, method="ridge"),
        ThoughtRequest(steps=3, method="soft", k=7),
        ThoughtRequest(steps=4, method="rescale"),
    ]
    params = [SamplingParams(**request.sampling_options()) for request in asked]

    outputs = llm.generate([prompt] * len(asked), params, use_tqdm=False)

    for request, output in zip(asked, outputs, strict=True):
        thought = read_thought(output.kv_transfer_params)
        assert (len(thought.embeddings), thought.recipe.method) == (request.steps, request.method)
        alone = think(llm, [prompt["prompt_token_ids"]], request)[0]
        torch.testing.assert_close(thought.embeddings, alone.embeddings, atol=1e-4, rtol=1e-4)


def test_requests_wait_for_rows(llm: LLM) -> None:
    """Three requests of 450 rows, and room for two of them."""
    prompt = build_tokenizer().encode(PROMPT)

    thoughts = think(llm, [prompt] * 3, ThoughtRequest(steps=449))

    assert [len(thought.embeddings) for thought in thoughts] == [449] * 3


def test_a_thought_that_meets_the_window_says_so(llm: LLM) -> None:
    prompt = build_tokenizer().encode(PROMPT) * 20
    with pytest.raises(EngineError, match=rf"a prompt of {len(prompt)} positions needs a max_model_len of"):
        think(llm, [prompt], ThoughtRequest(steps=512 - len(prompt)))


def test_aborted_thoughts_give_their_rows_back(llm: LLM) -> None:
    prompt = TokensPrompt(prompt_token_ids=build_tokenizer().encode(PROMPT))
    for number in range(4):
        llm.llm_engine.add_request(f"r{number}", prompt, SamplingParams(**ThoughtRequest(steps=450).sampling_options()))
        for _ in range(3):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([f"r{number}"])

    assert len(think(llm, [prompt["prompt_token_ids"]], ThoughtRequest(steps=450))[0].embeddings) == 450
    assert tokens(llm.generate(prompt, greedy(4), use_tqdm=False)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_args": {"avp_latent_rows": [1, 2]}}, "set by the scheduler only"),
        ({"extra_args": {"kv_transfer_params": {"avp_latent": {"steps": -1}}}}, "between 0 and 1024"),
        ({"max_tokens": 9}, "needs max_tokens=23, not 9"),
        ({"n": 2, "temperature": 1.0}, "drop n"),
        ({"logprobs": 0}, "drop logprobs"),
        ({"logit_bias": {3: 1.0}}, "drop logit_bias"),
        ({"allowed_token_ids": [3], "min_tokens": 2}, "drop allowed_token_ids, min_tokens"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    options = ThoughtRequest(steps=20).sampling_options()
    with pytest.raises(ConfigurationError, match=message):
        LatentSampling.validate_params(SamplingParams(**(options | changes)))


def test_ordinary_requests_and_latent_ones_pass() -> None:
    LatentSampling.validate_params(SamplingParams(n=2, logprobs=3, extra_args={"kv_transfer_params": {}}))
    LatentSampling.validate_params(SamplingParams(**ThoughtRequest(steps=20).sampling_options()))


def _config(**changes: Any) -> Any:
    """As much of a vLLM's configuration as is looked at."""
    settings: dict[str, Any] = {
        "enable_prompt_embeds": True,
        "logits_processors": [LOGITS_PROCESSOR],
        "skip_tokenizer_init": False,
        "runner_type": "generate",
        "pipeline_parallel_size": 1,
        "use_v2_model_runner": False,
        "speculative_config": None,
        "lora_config": None,
    }
    found = SimpleNamespace(**(settings | changes))
    transfer = KVTransferConfig(**plugin_options(thinks_as="LlamaForCausalLM")["kv_transfer_config"])
    return SimpleNamespace(model_config=found, parallel_config=found, kv_transfer_config=transfer, **vars(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_prompt_embeds": False}, "enable_prompt_embeds is off"),
        ({"logits_processors": None}, "the logits processor .* is missing"),
        ({"use_v2_model_runner": True}, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object(), "runner_type": "pooling"}, "LoRA .*; it is a pooling model"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init"),
    ],
)
def test_what_excludes_latent_steps_is_refused_at_load(changes: dict[str, Any], message: str) -> None:
    _refuse(_config())
    with pytest.raises(ConfigurationError, match=message):
        _refuse(_config(**changes))
