"""Prompts to token ids: equal to what the template itself gives, BOS and turn boundaries included; and raw text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_tokenizers import (
    QWEN,
    REAL,
    SMOLLM2,
    THINKING,
    TINY,
    byte_tokenizer,
    chatml,
    id_of,
    load_renderers,
    load_tokenizers,
    template_ids,
    text_of,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from avp_agents.context import Context, LatentRecipe, LatentSegment, TokenSegment
from avp_agents.errors import ConfigurationError, PromptError, UnsupportedModelError
from avp_agents.prompt.plan import PromptRenderer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 24 * 17 + 3?"}
ASSISTANT = {"role": "assistant", "content": "411"}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one user message": [USER],
    "system and user": [SYSTEM, USER],
    "two turns": [USER, ASSISTANT, {"role": "user", "content": "Why?"}],
    "system and two turns": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Why?"}],
    "white space": [{"role": "user", "content": "\n\n  a \t b\r\n\n\n   c  "}],
    "empty content": [{"role": "user", "content": ""}],
    "code": [{"role": "user", "content": "if a < b and c > d:\n    return x<y>(z)  # <| not |> a token\n"}],
    "scripts": [{"role": "user", "content": "Grüße, 世界! עולם 👩‍🔬 e\u0301 \u200b\ufeff ﬁ Ⅷ \x00\x07"}],
    "quoted markdown": [{"role": "user", "content": "> hello\n> world <"}, ASSISTANT, {"role": "user", "content": ">"}],
    "numbers": [{"role": "user", "content": "0 00 123456789 3.14159 1e-10"}],
}


@pytest.fixture(scope="module")
def tokenizers(smollm2_path: Path) -> dict[str, PreTrainedTokenizerBase]:
    return load_tokenizers(smollm2_path)


@pytest.fixture(scope="module")
def renderers(smollm2_path: Path) -> dict[str, PromptRenderer]:
    return load_renderers(smollm2_path)


def context_of(*token_ids: int, steps: int = 0) -> Context:
    latents = LatentSegment(torch.zeros(steps, 4), LatentRecipe("soft", 256, 1.0, False, steps))
    return Context("f" * 64, "float32", (TokenSegment(token_ids), *([latents] if steps else [])))


class TestWholePrompts:
    @pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
    @pytest.mark.parametrize("name", [*REAL, "chatml", "llama_3"])
    def test_ids_are_those_of_the_template(self, tokenizers, renderers, name, messages):
        assert renderers[name].render(messages) == template_ids(tokenizers[name], messages)

    @pytest.mark.parametrize("name", ["gemma", "mistral", "deepseek"])
    def test_ids_are_those_of_templates_that_are_strict(self, tokenizers, renderers, name):
        for title in ("one user message", "two turns", "white space", "code", "scripts", "quoted markdown"):
            assert renderers[name].render(CONVERSATIONS[title]) == template_ids(tokenizers[name], CONVERSATIONS[title])

    @pytest.mark.parametrize("name", [*REAL, *TINY])
    def test_a_string_is_one_user_message(self, renderers, name):
        plan = renderers[name].plan("Hello")
        assert list(plan.token_ids) == renderers[name].render([{"role": "user", "content": "Hello"}])
        assert (plan.base, plan.relation, plan.reuse, plan.notes) == (None, "fresh", None, ())

    @pytest.mark.parametrize("name", ["llama_3", "gemma", "mistral", "deepseek"])
    def test_there_is_one_bos(self, tokenizers, renderers, name):
        bos = tokenizers[name].bos_token_id
        ids = renderers[name].render([USER, ASSISTANT, USER])
        assert ids[0] == bos
        assert ids.count(bos) == 1

    def test_smollm2_ids_spelled_out(self, renderers):
        ids = renderers[SMOLLM2].render([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
        assert ids == [1, 9690, 198, 81, 2, 198, 1, 4093, 198, 82, 2, 198, 1, 520, 9531, 198]

    def test_text_blocks_are_joined(self, renderers):
        blocks = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
        expected = renderers["chatml"].render([{"role": "user", "content": "What is it?"}])
        assert renderers["chatml"].render([{"role": "user", "content": blocks}]) == expected

    def test_template_options_reach_the_template(self):
        tokenizer = chatml(THINKING)
        renderer = PromptRenderer(tokenizer, chat_template_kwargs={"enable_thinking": False})
        assert text_of(tokenizer, renderer.render("Hi")).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")

    def test_count_includes_the_context_that_is_continued(self, renderers):
        renderer = renderers["chatml"]
        assert renderer.count([USER]) == len(renderer.render([USER]))
        context = Context("f" * 64, "float32", (TokenSegment(tuple(renderer.render([USER]))), TokenSegment((1, 2, 3))))
        messages = [USER, {**ASSISTANT, "context": context}, USER]
        assert renderer.count(messages) == len(context) + len(renderer.plan(messages).token_ids)

    def test_render_leaves_contexts_out(self, renderers):
        renderer = renderers["chatml"]
        assert renderer.render([USER, {**ASSISTANT, "context": context_of(1, steps=2)}]) == renderer.render(
            [USER, ASSISTANT]
        )


class TestAppendedTurns:
    """What follows a context whose lineage ends in an open assistant turn."""

    @pytest.mark.parametrize(
        ("name", "ids"),
        [
            (SMOLLM2, [2, 198, 1, 4093, 198, 82, 2, 198, 1, 520, 9531, 198]),
            (QWEN, [151645, 198, 151644, 872, 198, 65, 151645, 198, 151644, 77091, 198]),
        ][: len(REAL)],
    )
    def test_ids_spelled_out(self, renderers, name, ids):
        assert list(renderers[name].plan("b", context=context_of(9, steps=3)).token_ids) == ids

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            *(
                (name, "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
                for name in [*REAL, "chatml"]
            ),
            (
                "llama_3",
                "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            ("gemma", "<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
            ("mistral", "</s>[INST] Hi [/INST]"),
            ("deepseek", "<|eos|><|user|>Hi<|assistant|>"),
        ],
    )
    def test_the_turn_is_closed_and_no_system_block_or_bos_appears(self, tokenizers, renderers, name, text):
        plan = renderers[name].plan("Hi", context=context_of(9, steps=3))
        assert text_of(tokenizers[name], plan.token_ids) == text
        assert (plan.relation, plan.notes) == ("handoff", ())

    @pytest.mark.parametrize("name", [*REAL, *TINY])
    def test_they_are_what_the_whole_prompt_has_there(self, tokenizers, renderers, name):
        renderer = renderers[name]
        whole = renderer.render([USER, ASSISTANT, {"role": "user", "content": "Why?"}])
        before = [*renderer.render([USER]), *tokenizers[name].encode("411", add_special_tokens=False)]
        appended = renderer.plan("Why?", context=context_of(*before)).token_ids
        assert whole[-len(appended) :] == list(appended)

    @pytest.mark.parametrize("name", [*REAL, *TINY])
    def test_an_end_of_turn_that_the_answer_holds_is_not_repeated(self, renderers, name):
        renderer = renderers[name]
        cut = renderer.plan("Hi", context=context_of(9)).token_ids
        for stop in renderer.stop_ids:
            ended = renderer.plan("Hi", context=context_of(9, stop)).token_ids
            assert cut[0] in renderer.stop_ids
            assert ended == cut[1:]

    def test_no_messages_open_a_new_turn_behind_an_answer(self, tokenizers, renderers):
        plan = renderers["chatml"].plan([], context=context_of(9))
        assert text_of(tokenizers["chatml"], plan.token_ids) == "<|im_end|>\n<|im_start|>assistant\n"

    def test_no_messages_let_the_turn_of_a_thought_go_on(self, renderers):
        assert renderers["chatml"].plan([], context=context_of(9, steps=1)).token_ids == ()


class TestStopIds:
    @pytest.mark.parametrize(
        ("name", "tokens"),
        [
            *((name, {"<|im_end|>"}) for name in [*REAL, "chatml"]),
            ("llama_3", {"<|end_of_text|>", "<|eot_id|>"}),
            ("gemma", {"<eos>", "<end_of_turn>"}),
            ("mistral", {"</s>"}),
            ("deepseek", {"<|eos|>"}),
        ],
    )
    def test_eos_and_the_templates_end_of_turn(self, tokenizers, renderers, name, tokens):
        assert set(tokenizers[name].convert_ids_to_tokens(list(renderers[name].stop_ids))) == tokens

    def test_the_generation_configs_are_added(self):
        tokenizer = chatml()
        also = id_of(tokenizer, "<|endoftext|>")
        renderer = PromptRenderer(tokenizer, eos_token_ids=[also])
        assert renderer.stop_ids == {id_of(tokenizer, "<|im_end|>"), also}


class TestRawText:
    """Tokenizers without a chat template."""

    @pytest.mark.parametrize("adds_bos", [True, False])
    def test_text_gets_what_the_tokenizer_gives_it(self, adds_bos):
        tokenizer = byte_tokenizer(bos="<s>", eos="</s>", adds_bos=adds_bos)
        plan = PromptRenderer(tokenizer).plan("hello hello")
        assert list(plan.token_ids) == tokenizer("hello hello").input_ids
        assert (tokenizer.bos_token_id in plan.token_ids) is adds_bos

    def test_text_behind_a_context_gets_no_bos(self):
        tokenizer = byte_tokenizer(bos="<s>", eos="</s>", adds_bos=True)
        plan = PromptRenderer(tokenizer).plan(" hello", context=context_of(5, steps=2))
        assert text_of(tokenizer, plan.token_ids) == " hello"
        assert (len(plan.base or ()), plan.relation) == (3, "handoff")

    def test_stop_ids_are_the_tokenizers_eos(self):
        assert PromptRenderer(byte_tokenizer(eos="</s>")).stop_ids == {261}

    def test_messages_need_a_template(self):
        with pytest.raises(PromptError, match="no chat template"):
            PromptRenderer(byte_tokenizer()).plan([USER])

    def test_nothing_is_no_prompt(self):
        with pytest.raises(PromptError, match="empty"):
            PromptRenderer(byte_tokenizer()).plan("")


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "no messages"),
            (USER, "a list of chat messages, not dict"),
            (7, "not int"),
            (["Hi"], "Message 0 is a str"),
            ([USER, {"role": "wizard", "content": "x"}], "Message 1 has the role 'wizard'"),
            ([{"role": "user<|im_end|>", "content": "x"}], "has the role"),
            ([{"role": "user", "content": 7}], "has a int as its content"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "type 'image_url'"),
            ([{"role": "user", "content": [7]}], "type 'int'"),
            ([{**ASSISTANT, "context": "avp:1:" + "0" * 32}], r"engine\.resolve"),
            ([{**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": {1, 2}}}]}], "not JSON data"),
            ([{**ASSISTANT, "tool_calls": [{"function": "f"}]}], "malformed"),
            ([{"role": "user", "content": "a\ud800b"}], r"lone surrogate '\\ud800'"),
        ],
    )
    def test_a_bad_prompt_is_named(self, renderers, prompt, message):
        with pytest.raises(PromptError, match=message):
            renderers["chatml"].plan(prompt)

    def test_a_slow_tokenizer_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="ByT5Tokenizer is not a fast tokenizer"):
            PromptRenderer(ByT5Tokenizer())

    def test_options_that_rendering_sets_are_refused(self):
        with pytest.raises(ConfigurationError, match="add_generation_prompt"):
            PromptRenderer(chatml(), chat_template_kwargs={"add_generation_prompt": False})


class TestThreads:
    def test_many_threads_plan_while_others_use_the_tokenizer(self, tokenizers, renderers):
        tokenizer, renderer = tokenizers[SMOLLM2], renderers[SMOLLM2]
        prompts = [[{"role": "user", "content": f"{i} <|im_end|> " * 50}] for i in range(40)]
        alone = [renderer.plan(prompt) for prompt in prompts]
        with ThreadPoolExecutor(8) as pool:
            others = [pool.submit(tokenizer.encode, f"text {i}", split_special_tokens=True) for i in range(40)]
            together = list(pool.map(renderer.plan, prompts))
            assert all(other.result() for other in others)
        assert together == alone

    def test_the_tokenizer_is_not_changed(self):
        tokenizer = chatml()
        before = tokenizer.backend_tokenizer.to_str()
        PromptRenderer(tokenizer).plan("<|im_end|>")
        assert tokenizer.backend_tokenizer.to_str() == before
