"""What the engine asks of vLLM, whether it runs in this process or behind HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from avp_agents.engine.core.sampling import Sampled
from avp_agents.vllm.lineage_prompt import LineagePrompt
from avp_agents.vllm.plugin.kv_request import KvRequest


@dataclass(frozen=True)
class Facts:
    """How vLLM was set up.

    Attributes:
        window: Positions that a request may have.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        thinks: Whether it may run latent steps; of a server that is known only when it does.
    """

    window: int
    dtype: str
    thinks: bool


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode.

    Attributes:
        sampling: Sampling parameters under the names that vLLM gives them, in process and over HTTP.
        logprobs: Return log-probabilities of each token and of so many most likely ones; None for none.
        structured: What the answer may be, as vLLM's structured outputs take it; None for anything.
        transfer: vLLM's ``kv_transfer_params``, by which the plugin is spoken to; None for none.
        wants_transfer: The plugin's answer is needed; over HTTP, a stream does not bring it.
        salt: vLLM's ``cache_salt``; None for none.
    """

    sampling: dict[str, Any]
    logprobs: int | None = None
    structured: dict[str, Any] | None = None
    transfer: dict[str, Any] | None = None
    wants_transfer: bool = False
    salt: str | None = None

    def moving(self, kv: KvRequest) -> DecodingOptions:
        """The same, with keys and values loaded or saved."""
        return replace(self, transfer=(self.transfer or {}) | kv.transfer_params(), salt=kv.salt)


@dataclass(frozen=True)
class Step:
    """What came from vLLM at once.

    Attributes:
        tokens: In order; perhaps none.
        cached: Positions of the prompt that were in the prefix cache; None where nothing was said about it.
        finished: vLLM has ended the answer.
        transfer: ``kv_transfer_params`` of the answer, with its end.
    """

    tokens: tuple[Sampled, ...] = ()
    cached: int | None = None
    finished: bool = False
    transfer: Mapping[str, Any] | None = None


class Backend(Protocol):
    """vLLM. All coroutines run on one event loop."""

    async def start(self) -> Facts:
        """Load the model, or ask the server what it runs.

        Raises:
            AvpError: That is not possible.
        """
        ...

    def decode(self, prompt: LineagePrompt, decoding: DecodingOptions) -> AsyncGenerator[Step, None]:
        """Prefill a prompt and decode; leaving the generator aborts the request in vLLM.

        Raises:
            AvpError: vLLM refused or failed.
        """
        ...

    async def close(self) -> None:
        """Stop what `start` has started."""
        ...
