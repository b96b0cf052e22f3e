"""LangChain's standard integration tests on AvpChatModel with real weights.

They run on the default model. Where the model has to choose a tool by itself, which 135M parameters do not, they run on
Qwen2.5-Coder-0.5B.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_langgraph import AvpChatModel, close_engines

QUESTION = HumanMessage("How many legs do three spiders have?")
OTHER_MODEL = "the-other-model"
Detail = Literal["audio_input", "audio_output", "reasoning_output", "cache_read_input", "cache_creation_input"]


# Text is cut short, JSON is brought to its end; calls end by themselves.
TEXT_TOKENS, JSON_TOKENS, CALL_TOKENS = 12, 24, 56


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[LatentEngine]:
    with _open(smollm2_path) as engine:
        yield engine


@pytest.fixture(scope="module")
def qwen(qwen_path: Path) -> Iterator[LatentEngine]:
    with _open(qwen_path) as engine:
        yield engine


def _open(path: Path) -> LatentEngine:
    store = MemoryStore(namespace=Namespace("standard-tests", b"k" * 32))
    options = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": 256 * 2**20}
    return LatentEngine.from_pretrained(str(path), store=store, **options)


class TestAvpChatModelIntegration(ChatModelIntegrationTests):
    _engine: LatentEngine
    _max_tokens: int

    @pytest.fixture(autouse=True)
    def _with_engine(self, request: pytest.FixtureRequest) -> None:
        name = request.node.name
        self._engine = request.getfixturevalue("qwen" if "agent_loop" in name else "smollm2")
        is_json = "structured_output" in name or "json" in name
        calls = any(word in name for word in ("call", "choice", "agent", "runnables"))
        self._max_tokens = JSON_TOKENS if is_json else CALL_TOKENS if calls else TEXT_TOKENS

    @pytest.fixture(autouse=True)
    def _with_other_model(self, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """The model that calls name instead: the same weights in another folder."""
        (tmp_path / OTHER_MODEL).symlink_to(smollm2_path, target_is_directory=True)
        monkeypatch.chdir(tmp_path)
        yield
        close_engines()

    @property
    def chat_model_class(self) -> type[AvpChatModel]:
        return AvpChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self._engine, "max_tokens": self._max_tokens}

    @property
    def model_override_value(self) -> str:
        return OTHER_MODEL

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[Literal["invoke", "stream"], list[Detail]]:
        details: list[Detail] = ["cache_read_input", "reasoning_output"]
        return {"invoke": details, "stream": details}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The second turn of a conversation: it reuses the first one's positions."""
        model = AvpChatModel(**self.chat_model_params)
        answer = answer_of(model, [QUESTION, model.invoke([QUESTION]), HumanMessage("And four?")], stream=stream)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata.get("input_token_details", {}).get("cache_read", 0) > 0
        return answer

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        """Latent steps count as reasoning."""
        model = AvpChatModel(**self.chat_model_params, mode="latent", latent_steps=4)
        return answer_of(model, [QUESTION], stream=stream)


def answer_of(model: AvpChatModel, messages: list[Any], *, stream: bool) -> AIMessage:
    if not stream:
        return model.invoke(messages)
    whole: AIMessageChunk | None = None
    for piece in model.stream(messages):
        whole = piece if whole is None else whole + piece
    assert whole is not None
    return whole
