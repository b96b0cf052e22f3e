"""Tokenizers for the prompt tests: real ones, and small ones with the templates of well-known model families."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from avp_agents.prompt.plan import PromptRenderer

MODEL_FOLDER = Path(os.environ.get("AVP_TEST_MODELS", Path.home() / ".cache" / "avp-test-models"))
SMOLLM2, QWEN = "smollm2-135m", "qwen2.5-coder-0.5b"
REAL = [SMOLLM2, *([QWEN] if (MODEL_FOLDER / QWEN).is_dir() else [])]
"""SmolLM2 always; Qwen2.5-Coder where its folder is on this machine."""

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a default.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Any role, at any place; a default system block; tool calls are dropped (SmolLM2)."""

CHATML_WITH_TOOLS = """\
{% if messages[0].role != 'system' %}<|im_start|>system
You are a default.<|im_end|>
{% endif %}{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.tool_calls %}<|im_start|>assistant
{% if message.content %}{{ message.content + '\n' }}{% endif %}{% for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Tool calls and results have a form of their own (Qwen2.5)."""

LLAMA_3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""BOS at the start, an end-of-turn token beside the tokenizer's EOS, trimmed contents."""

GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}"
    "{{ message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""No system role, strict alternation."""

MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, roles must alternate user/assistant') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
"""Strict alternation; no generation prompt: a user message opens the assistant's turn."""

HOISTING = (
    "{{ bos_token }}{% for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'user' %}{{ '<|user|>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '<|assistant|>' + message.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""System messages from anywhere go to the front; tool messages are dropped (DeepSeek)."""

THINKING = (
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' and '</think>' in content and not loop.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Thoughts are cut from earlier answers; an option writes an empty thought (Qwen3)."""

QWEN_3 = """\
{% set ns = namespace(last=0) %}{% for message in messages %}{% if message.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role == 'assistant' %}{% set reasoning = message.reasoning_content or '' %}<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or reasoning) %}{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}\
{% endif %}{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
"""Reasoning is rendered behind the last user message only, so that a tool loop keeps it (Qwen3)."""

R_1 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Every new turn begins with reasoning, which earlier turns do not show (DeepSeek-R1)."""

PLAIN = (
    "{% for message in messages %}{{ message.role | upper + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""No control tokens at all."""

USER_TURNS_ONLY = (
    "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content }}{% endfor %}"
)
"""Control tokens around user messages, none behind answers."""


def byte_tokenizer(
    template: str | None = None,
    *,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    bos: str | None = None,
    eos: str | None = None,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (one id per byte, and a few merges) with the given template and tokens.

    Args:
        template: The chat template; None for a base model.
        special: Added tokens flagged special; `bos` and `eos` are special anyway.
        added: Added tokens not flagged special.
        bos: The BOS token.
        eos: The EOS token.
        adds_bos: Whether the tokenizer puts BOS before raw text.
    """
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
    vocabulary = {piece: id_ for id_, piece in enumerate([*pieces, *(left + right for left, right in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    flagged = dict.fromkeys([*filter(None, (bos, eos)), *special])
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in flagged])
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    if adds_bos:
        token = (str(bos), backend.token_to_id(str(bos)))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[token])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    """ChatML tokens; the tool and thought markers are not flagged special, as in Qwen's tokenizers."""
    return byte_tokenizer(
        template,
        special=["<|im_start|>", "<|endoftext|>"],
        added=["<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>"],
        eos="<|im_end|>",
    )


def llama_3() -> PreTrainedTokenizerFast:
    """Llama 3's tokens and template."""
    return byte_tokenizer(
        LLAMA_3,
        special=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        adds_bos=True,
    )


def gemma() -> PreTrainedTokenizerFast:
    """Gemma's tokens and template; white space and HTML tags are ordinary added tokens."""
    return byte_tokenizer(
        GEMMA,
        special=["<start_of_turn>", "<end_of_turn>"],
        added=["\n\n", "  "],
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
    )


def mistral() -> PreTrainedTokenizerFast:
    """Mistral's tokens and template."""
    return byte_tokenizer(MISTRAL, special=["[INST]", "[/INST]"], bos="<s>", eos="</s>", adds_bos=True)


def deepseek() -> PreTrainedTokenizerFast:
    """DeepSeek's way with system messages."""
    return byte_tokenizer(HOISTING, special=["<|user|>", "<|assistant|>"], bos="<|bos|>", eos="<|eos|>", adds_bos=True)


TINY = {"chatml": chatml, "llama_3": llama_3, "gemma": gemma, "mistral": mistral, "deepseek": deepseek}


@cache
def load_tokenizers(smollm2: Path) -> dict[str, PreTrainedTokenizerBase]:
    """All tokenizers, real and tiny, by name."""
    folders = {SMOLLM2: smollm2, QWEN: MODEL_FOLDER / QWEN}
    real = {name: AutoTokenizer.from_pretrained(folders[name]) for name in REAL}
    return real | {name: make() for name, make in TINY.items()}


@cache
def load_renderers(smollm2: Path) -> dict[str, PromptRenderer]:
    """A renderer for each tokenizer."""
    return {name: PromptRenderer(tokenizer) for name, tokenizer in load_tokenizers(smollm2).items()}


def template_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers makes of the messages."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return [int(str(id_)) for id_ in ids]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The ids as text, special tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token."""
    return tokenizer.get_vocab()[token]
