"""What the standard tests share: the model that can choose a tool by itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def qwen_path() -> Path:
    """The folder of Qwen2.5-Coder-0.5B-Instruct."""
    folder = os.environ.get("AVP_TEST_QWEN", "")
    if not folder or not (Path(folder) / "config.json").is_file():
        pytest.skip(
            "the model has to choose a tool by itself: set AVP_TEST_QWEN to a folder with Qwen2.5-Coder-0.5B-Instruct "
            "(hf download Qwen/Qwen2.5-Coder-0.5B-Instruct --local-dir FOLDER)"
        )
    return Path(folder)
