"""LangChain's standard unit tests on AvpChatModel; no weights are loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from langchain_core.load import load
from langchain_tests.unit_tests import ChatModelUnitTests

from avp_agents.models.embedded import ENVIRONMENT_VARIABLE
from avp_langgraph import AvpChatModel
from avp_langgraph.profile import model_profile


class TestAvpChatModelUnit(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _allow_loading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """LangChain's loader knows the classes of its own partners; all others are mapped by the application."""
        path = tuple(AvpChatModel.lc_id())
        mapped = partial(load, additional_import_mappings={path: path})
        monkeypatch.setattr("langchain_tests.unit_tests.chat_models.load", mapped)

    @property
    def chat_model_class(self) -> type[AvpChatModel]:
        return AvpChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        """A model that is not named is the one that the environment names."""
        named = {ENVIRONMENT_VARIABLE: "organisation/model"}
        return named, {}, {"profile": model_profile("organisation/model", None)}
