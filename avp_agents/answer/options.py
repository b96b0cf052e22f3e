"""What a caller may ask of an answer or a thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from avp_agents.context import LatentMethod

if TYPE_CHECKING:
    from avp_agents.answer.grammar import Grammar
    from avp_agents.answer.tool_format import ToolDefinition


class GenerateOptions(TypedDict, total=False):
    """Options of `generate` and `stream`.

    Attributes:
        max_tokens: Most tokens to decode. Default 512, or what the window leaves if that is less.
        min_tokens: End-of-sequence and stops are ignored for so many tokens. Default 0.
        temperature: 0 (the default) is greedy.
        top_p: Nucleus mass in (0, 1]. Default 1.
        top_k: Only so many most likely tokens; 0 (the default) is all.
        min_p: Only tokens at least `min_p` times as likely as the most likely. Default 0.
        repetition_penalty: CTRL's penalty on all ids of prompt and answer; 1 (the default) is none.
        seed: Seed of this request's own random stream; independent of what else is in the batch.
        logprobs: Return the log-probability of each token and of the so many most likely ones.
        stop: Strings that end the answer; cut from it, also across token boundaries.
        stop_token_ids: Ids that end the answer, beside the model's own end-of-sequence ids.
        skip_special_tokens: Leave special tokens out of the text. Default True; tool calls may be marked with them.
        tools: Tools that the model is shown, as chat templates take them. `grammar` lets it call them.
        grammar: What the answer may be; it ends where the grammar ends. Needs ``avp-agents[tools]``.
        chat_template_kwargs: Options of the chat template for this request, over the engine's own; for example
            ``{"enable_thinking": False}``.
        timeout: Seconds until `RequestTimeoutError`, waiting in the queue included.
        source: Who asks; admission is fair between sources.
    """

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    logprobs: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    skip_special_tokens: bool
    tools: Sequence[ToolDefinition]
    grammar: Grammar | None
    chat_template_kwargs: Mapping[str, Any] | None
    timeout: float | None
    source: str


class ThinkOptions(TypedDict, total=False):
    """Options of `think`.

    Attributes:
        method: ``"soft"``, ``"ridge"`` or ``"rescale"``; by default what suits the model (soft where the head is tied
            to the input embeddings, else ridge).
        k: Most likely tokens in the soft embedding; None is the whole vocabulary. Default 256.
        temperature: Softmax temperature of the soft embedding. Default 1.
        renormalise: Rescale each latent embedding to the mean norm of the input embeddings. Default: yes for ridge
            and rescale, no for soft.
        stop_cosine: Stop when consecutive hidden states are more alike than this.
        stop_entropy: Stop when the entropy (nats) of the next token falls below this.
        tools: Tools that the model is shown, as in `GenerateOptions`.
        chat_template_kwargs: Options of the chat template for this request, over the engine's own.
        timeout: Seconds until `RequestTimeoutError`, waiting in the queue included.
        source: Who asks; admission is fair between sources.
    """

    method: LatentMethod | None
    k: int | None
    temperature: float
    renormalise: bool | None
    stop_cosine: float | None
    stop_entropy: float | None
    tools: Sequence[ToolDefinition]
    chat_template_kwargs: Mapping[str, Any] | None
    timeout: float | None
    source: str
