"""The default model: fetched once, from the first source that can, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from avp_agents.errors import ModelNotFoundError
from avp_agents.models import default_model, default_model_status, embedded, resolve_model
from avp_agents.models.manifest import MANIFEST_NAME
from avp_agents.models.source import SourceFailedError


class FakeSource:
    """Puts two files there, or fails, and counts how often it was asked."""

    def __init__(self, name: str, *, failure: BaseException | None = None) -> None:
        self.name = name
        self.failure = failure
        self.asked = 0

    def __str__(self) -> str:
        return self.name

    def fetch_into(self, folder: Path, console: Console | None) -> None:
        self.asked += 1
        (folder / "config.json").write_text("{}")
        if self.failure is not None:
            raise self.failure
        (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the default model in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AVP_DEFAULT_MODEL", raising=False)
    return tmp_path / "avp-agents" / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    """The only source there is."""
    source = FakeSource("the source")
    monkeypatch.setattr(embedded, "SOURCES", [source])
    return source


class TestFetching:
    def test_once_per_user(self, cache: Path, source: FakeSource) -> None:
        assert default_model() == default_model() == cache
        assert source.asked == 1
        assert (cache / "model.safetensors").read_bytes() == b"weights"
        assert json.loads((cache / MANIFEST_NAME).read_text())["source"] == "the source"

    def test_from_the_next_source_if_one_fails(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        failing, working = FakeSource("one", failure=SourceFailedError("no answer")), FakeSource("two")
        monkeypatch.setattr(embedded, "SOURCES", [failing, working])

        assert default_model() == cache
        assert default_model_status().detail.endswith("from two")

    def test_if_none_can_the_error_says_what_each_answered(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        failing = [FakeSource(name, failure=SourceFailedError(f"{name} is down")) for name in ("hub", "index")]
        monkeypatch.setattr(embedded, "SOURCES", failing)

        with pytest.raises(ModelNotFoundError, match=r"hub is down.*index is down.*--model") as raised:
            default_model()
        assert "AVP_DEFAULT_MODEL" in str(raised.value)
        assert not cache.exists()

    def test_nothing_is_left_of_an_interrupted_one(self, cache: Path, source: FakeSource) -> None:
        source.failure = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            default_model()
        assert [path.name for path in cache.parent.iterdir() if path.is_dir()] == []

        source.failure = None
        assert default_model() == cache

    def test_what_a_killed_process_left_is_cleared_away(self, cache: Path, source: FakeSource) -> None:
        left_over = cache.parent / f".{cache.name}.partial-x1"
        left_over.mkdir(parents=True)
        (left_over / "model.safetensors").write_bytes(b"half")

        default_model()
        assert not left_over.exists()

    def test_again_where_a_file_is_damaged(self, cache: Path, source: FakeSource) -> None:
        default_model()
        (cache / "model.safetensors").write_bytes(b"torn")

        assert default_model_status().detail == "model.safetensors has 4 bytes instead of 7"
        default_model()
        assert source.asked == 2
        assert (cache / "model.safetensors").read_bytes() == b"weights"

    def test_a_cache_that_cannot_be_written_is_named(
        self, tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

        with pytest.raises(ModelNotFoundError, match=r"cannot be kept in .*file/avp-agents"):
            default_model()

    def test_processes_at_the_same_time_agree(self, cache: Path, tmp_path: Path) -> None:
        script = tmp_path / "fetch.py"
        script.write_text(
            "import sys, time, uuid\n"
            "from pathlib import Path\n"
            "from avp_agents.models import default_model, embedded\n"
            "class Slow:\n"
            "    def fetch_into(self, folder, console):\n"
            "        (Path(sys.argv[1]) / uuid.uuid4().hex).touch()\n"
            "        (folder / 'config.json').write_text('{')\n"
            "        time.sleep(1)\n"
            "        (folder / 'config.json').write_text('{}')\n"
            "embedded.SOURCES = [Slow()]\n"
            "print((default_model() / 'config.json').read_text())\n"
        )
        fetches = tmp_path / "fetches"
        fetches.mkdir()
        command = [sys.executable, str(script), str(fetches)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]

        assert [process.communicate(timeout=60)[0] for process in running] == ["{}\n"] * 4
        assert len(list(fetches.iterdir())) == 1


class TestStatus:
    def test_nothing_is_fetched(self, cache: Path, source: FakeSource) -> None:
        status = default_model_status()
        assert (status.model, status.ready, status.detail) == (str(cache), False, "not fetched yet")
        assert source.asked == 0

    def test_sizes_are_compared_and_checksums_on_demand(self, cache: Path, source: FakeSource) -> None:
        default_model()
        (cache / "model.safetensors").write_bytes(b"Weights")

        assert default_model_status().ready
        assert "model.safetensors has SHA-256" in default_model_status(verify=True).detail

    @pytest.mark.parametrize("content", ["", "[]", '{"format": 0}', '{"format": 1, "source": "x", "files": [1]}'])
    def test_an_unreadable_manifest_is_damage(self, cache: Path, source: FakeSource, content: str) -> None:
        default_model()
        (cache / MANIFEST_NAME).write_text(content)

        assert default_model_status().detail == "its manifest is missing or of another release"


class TestEnvironmentVariable:
    def test_it_names_a_folder_to_use_instead(
        self, cache: Path, source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "config.json").write_text("{}")
        monkeypatch.setenv("AVP_DEFAULT_MODEL", str(tmp_path))

        assert default_model() == tmp_path
        assert resolve_model(None) == str(tmp_path)
        assert default_model_status().ready
        assert source.asked == 0

    def test_it_names_a_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AVP_DEFAULT_MODEL", "someone/tiny")
        monkeypatch.setattr(embedded, "download_any", lambda repository: tmp_path / repository)

        assert default_model() == tmp_path / "someone/tiny"

    def test_one_that_is_nowhere_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(repository: str) -> Path:
            raise SourceFailedError("404")

        monkeypatch.setenv("AVP_DEFAULT_MODEL", "someone/nothing")
        monkeypatch.setattr(embedded, "download_any", refuse)

        with pytest.raises(ModelNotFoundError, match=r"AVP_DEFAULT_MODEL=someone/nothing.*404"):
            default_model()


class TestResolveModel:
    @pytest.mark.usefixtures("source")
    def test_no_name_is_the_default_model(self, cache: Path) -> None:
        assert resolve_model(None) == str(cache)

    def test_a_folder_is_a_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "model").mkdir()

        assert resolve_model(tmp_path) == str(tmp_path)
        assert resolve_model("~/model") == str(tmp_path / "model")

    def test_a_hub_id_is_left_to_the_hub(self) -> None:
        assert resolve_model("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"

    @pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no-such-model", " "])
    def test_a_folder_that_is_not_there_is_refused(self, name: str) -> None:
        with pytest.raises(ModelNotFoundError, match="Name a folder that holds a model, or a hub id"):
            resolve_model(name)


class TestSmolLM2:
    """The real one, whichever source served it."""

    def test_its_control_tokens_are_those_of_the_original(self, smollm2_path: Path) -> None:
        generation = GenerationConfig.from_pretrained(smollm2_path)
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path)

        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
        assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")

    def test_its_chat_template_is_that_of_the_original(self, smollm2_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
        messages = [{"role": "user", "content": "Hi"}]

        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_its_tokenizer_splits_digits(self, smollm2_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path)

        assert tokenizer.tokenize("in  1234") == ["in", "ĠĠ", "1", "2", "3", "4"]

    def test_its_weights_are_plain_bfloat16(self, smollm2_path: Path) -> None:
        config = AutoConfig.from_pretrained(smollm2_path)

        assert str(config.dtype) == "torch.bfloat16"
        assert not hasattr(config, "quantization_config")
        assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, avp_agents.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
