"""LangChain's standard integration tests on AvpChatModel with the default model's weights."""

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


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[LatentEngine]:
    store = MemoryStore(namespace=Namespace("standard-tests", b"k" * 32))
    options = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": 256 * 2**20}
    with LatentEngine.from_pretrained(str(smollm2_path), store=store, **options) as engine:
        yield engine


class TestAvpChatModelIntegration(ChatModelIntegrationTests):
    _engine: LatentEngine

    @pytest.fixture(autouse=True)
    def _with_engine(self, engine: LatentEngine) -> None:
        self._engine = engine

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
        return {"engine": self._engine, "max_tokens": 16}

    @property
    def model_override_value(self) -> str:
        return OTHER_MODEL

    @property
    def has_tool_choice(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> dict[Literal["invoke", "stream"], list[Detail]]:
        details: list[Detail] = ["cache_read_input", "reasoning_output"]
        return {"invoke": details, "stream": details}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The second turn of a conversation: it reuses the first one's positions."""
        model = AvpChatModel(**self.chat_model_params)
        answer = _answer(model, [QUESTION, model.invoke([QUESTION]), HumanMessage("And four?")], stream=stream)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata.get("input_token_details", {}).get("cache_read", 0) > 0
        return answer

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        """Latent steps count as reasoning."""
        model = AvpChatModel(**self.chat_model_params, mode="latent", latent_steps=4)
        return _answer(model, [QUESTION], stream=stream)


def _answer(model: AvpChatModel, messages: list[Any], *, stream: bool) -> AIMessage:
    if not stream:
        return model.invoke(messages)
    whole: AIMessageChunk | None = None
    for piece in model.stream(messages):
        whole = piece if whole is None else whole + piece
    assert whole is not None
    return whole
