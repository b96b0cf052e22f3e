"""vLLM in this process: AsyncLLM, whose core runs in processes of its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from avp_agents.engine.core.sampling import Sampled
from avp_agents.engine.requests import MAX_LOGPROBS
from avp_agents.errors import ConfigurationError, EngineBusyError, EngineError, UnsupportedModelError
from avp_agents.vllm.backend import DecodingOptions, Facts, Step
from avp_agents.vllm.lineage_prompt import LineagePrompt
from avp_agents.vllm.plugin.options import plugin_options
from avp_agents.vllm.served_model import ServedModel

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

SHUTDOWN_SECONDS = 10.0

_OWN = {
    "enable_prompt_embeds": True,
    "structured_outputs_config": {"backend": "guidance"},
    "max_logprobs": MAX_LOGPROBS,
    "skip_tokenizer_init": False,
}
"""What the engine needs to be so."""


class InProcess:
    """Implements `Backend` with an engine of vLLM's own in this process.

    Args:
        model: What to run.
        dtype: In what; None is vLLM's choice.
        latent_steps: Load the plugin for latent steps.
        kv_store: URL and namespace of a store that vLLM itself loads from and saves to, if any.
        options: vLLM's engine arguments, such as ``tensor_parallel_size`` or ``max_model_len``.

    Raises:
        ConfigurationError: An option is one that the engine sets itself.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        dtype: str | None,
        latent_steps: bool,
        kv_store: tuple[str, str] | None,
        options: Mapping[str, Any],
    ) -> None:
        if taken := sorted(_OWN.keys() & options.keys()):
            raise ConfigurationError(f"VllmEngine sets {', '.join(taken)} itself; leave it out.")
        self._model, self._name = model, model.settings.name
        self._latent_steps, self._kv_store = latent_steps, kv_store
        self._options = {**options, **({"dtype": dtype} if dtype is not None else {})}
        self._engine: AsyncLLM | None = None

    async def start(self) -> Facts:
        """Load the model.

        Raises:
            ConfigurationError: vLLM is not installed, or does not know an option, or refuses it.
            UnsupportedModelError: The model is no decoder, or cannot think in vLLM and is to.
            EngineError: Loading failed.
        """
        # this process has threads, so a fork of it may hang
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        if self._latent_steps:
            # the plugin works in vLLM's first model runner
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        AsyncEngineArgs, AsyncLLM = _vllm()
        plugin = self._plugin_options()
        if taken := sorted(plugin.keys() & self._options.keys()):
            raise ConfigurationError(f"latent_steps and kv_store set {', '.join(taken)} themselves; leave it out.")
        from vllm.exceptions import VLLMClientError

        try:
            config = AsyncEngineArgs(model=self._name, **_OWN | plugin | self._options).create_engine_config()
        except (TypeError, ValueError, VLLMClientError) as error:
            raise ConfigurationError(f"vLLM refuses to run {self._name}: {error}") from error
        model = config.model_config
        if self._latent_steps and config.use_v2_model_runner:
            raise ConfigurationError("Latent steps need vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0.")
        if model.is_encoder_decoder:
            raise UnsupportedModelError(f"{self._name} is an encoder-decoder model; contexts need a decoder-only one.")
        try:
            self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise EngineError(f"vLLM could not load {self._name}: {error} Its log says more.") from error
        dtype = str(model.dtype).removeprefix("torch.")
        return Facts(int(model.max_model_len), dtype, thinks=self._latent_steps)

    async def decode(self, prompt: LineagePrompt, decoding: DecodingOptions) -> AsyncGenerator[Step, None]:
        """See `Backend.decode`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        assert self._engine is not None
        with _translated():
            structured = StructuredOutputsParams(**decoding.structured) if decoding.structured is not None else None
            params = SamplingParams(
                **decoding.sampling,
                logprobs=decoding.logprobs,
                structured_outputs=structured,
                extra_args=None if decoding.transfer is None else {"kv_transfer_params": decoding.transfer},
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            (rendered,) = await self._engine.renderer.render_cmpl_async([self._prompt(prompt, decoding.salt)])
            async with aclosing(self._engine.generate(rendered, params, secrets.token_hex(16))) as outputs:
                async for output in outputs:
                    tokens = _tokens(output.outputs[0], decoding.logprobs)
                    yield Step(tokens, output.num_cached_tokens, output.finished, output.kv_transfer_params)

    async def close(self) -> None:
        """Stop vLLM's processes."""
        if self._engine is not None:
            # on the loop: nothing else runs here any more, and vLLM would report its own end as a failure
            self._engine.shutdown(SHUTDOWN_SECONDS)
            self._engine = None

    def _plugin_options(self) -> dict[str, Any]:
        architecture = next(iter(self._model.config.architectures or []), "")
        url, namespace = self._kv_store or (None, "default")
        thinks_as = architecture if self._latent_steps else None
        return plugin_options(thinks_as=thinks_as, kv_store=url, namespace=namespace)

    def _prompt(self, prompt: LineagePrompt, salt: str | None) -> Any:
        from vllm.inputs import EmbedsPrompt, TokensPrompt

        salted: Any = {} if salt is None else {"cache_salt": salt}
        if prompt.is_text:
            return TokensPrompt(prompt_token_ids=prompt.token_ids(), **salted)
        assert self._engine is not None
        dtype = self._engine.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        return EmbedsPrompt(
            prompt_embeds=prompt.embeddings(dtype),
            prompt_token_ids=prompt.token_ids(),
            prompt_is_token_ids=prompt.is_token(),
            **salted,
        )


def _tokens(output: CompletionOutput, count: int | None) -> tuple[Sampled, ...]:
    entries = output.logprobs if count is not None else None
    if count is None or entries is None:
        return tuple(Sampled(token) for token in output.token_ids)
    return tuple(
        _with_logprobs(token, entry or {}, count) for token, entry in zip(output.token_ids, entries, strict=True)
    )


def _with_logprobs(token: int, entry: Mapping[int, Logprob], count: int) -> Sampled:
    ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
    top = tuple((id_, found.logprob) for id_, found in ranked if (found.rank or 0) <= count)
    return Sampled(token, entry[token].logprob, top)


@contextmanager
def _translated() -> Iterator[None]:
    """vLLM's errors as ours."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMServerError

    try:
        yield
    except GracefulHTTPError as error:
        raise EngineBusyError(f"vLLM takes no more requests: {error}. Try again later.") from error
    except VLLMServerError as error:
        message = f"vLLM failed: {error} Its log says why; if its core has ended, make a new engine."
        raise EngineError(message) from error
    except (VLLMClientError, ValueError) as error:
        raise ConfigurationError(f"vLLM refused the request: {error}") from error


def _vllm() -> tuple[Any, Any]:
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "VllmEngine needs vLLM, in an environment of its own. Install it with: pip install 'avp-agents[vllm]'. To "
            "use a server that runs elsewhere: VllmEngine.from_server(url)."
        ) from error
    return AsyncEngineArgs, AsyncLLM
