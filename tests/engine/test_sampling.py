"""Options are checked, the kept tokens are transformers', and a draw depends on its own row and seed only."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from avp_agents.answer.options import GenerateOptions
from avp_agents.engine.core.sampling import RowSampler, Sampled, SamplingParams, sample
from avp_agents.engine.requests import sampling_params
from avp_agents.errors import ConfigurationError, NumericalError

VOCAB = 1000
EOS = (2, 7)
PROMPT = (5, 5, 9, 400)


def make_params(**options: Any) -> SamplingParams:
    return sampling_params(options, vocab_limit=VOCAB, eos_token_ids=EOS)


def make_logits(rows: int = 1, *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, VOCAB, generator=generator)).to(dtype)


def draw(logits: Tensor, *requests: RowSampler, vocab_limit: int | None = None) -> list[int]:
    """One token for every row, all of which must be finite."""
    results = sample(logits, requests, vocab_limit=vocab_limit)
    assert all(isinstance(result, Sampled) for result in results), results
    return [result.token_id for result in results if isinstance(result, Sampled)]


class TestOptions:
    def test_without_any_it_is_greedy_and_unlimited(self) -> None:
        params = make_params()
        assert params.greedy
        assert (params.max_tokens, params.min_tokens, params.logprobs) == (None, 0, None)
        assert (params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (1.0, 0, 0.0, 1.0)
        assert (params.stop, params.stop_token_ids) == ((), EOS)

    def test_none_is_the_default(self) -> None:
        options = dict.fromkeys(GenerateOptions.__annotations__)
        params = make_params(**options)
        assert params == make_params(seed=params.seed)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -0.1}, r"temperature must be in \[0, inf\), not -0.1"),
            ({"temperature": math.inf}, r"temperature must be in \[0, inf\), not inf"),
            ({"temperature": math.nan}, r"temperature must be in \[0, inf\), not nan"),
            ({"temperature": "hot"}, r"temperature must be a number in \[0, inf\), not 'hot'"),
            ({"temperature": True}, "temperature must be a number"),
            ({"top_p": 0}, r"top_p must be in \(0, 1\], not 0"),
            ({"top_p": 1.01}, r"top_p must be in \(0, 1\]"),
            ({"top_k": -1}, "top_k must be at least 0, not -1"),
            ({"top_k": 1.5}, "top_k must be an integer, not 1.5"),
            ({"min_p": 1}, r"min_p must be in \[0, 1\), not 1"),
            ({"min_p": -0.1}, r"min_p must be in \[0, 1\)"),
            ({"repetition_penalty": 0}, r"repetition_penalty must be in \(0, inf\), not 0"),
            ({"repetition_penalty": math.inf}, r"repetition_penalty must be in \(0, inf\)"),
            ({"logprobs": 51}, "logprobs must be at least 0 and at most 50, not 51"),
            ({"logprobs": -1}, "logprobs must be at least 0"),
            ({"logprobs": True}, "logprobs must be an integer, not True"),
            ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
            ({"min_tokens": -1}, "min_tokens must be at least 0"),
            ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens must be at least 0 and at most 4 \(max_tokens\), not 5"),
            ({"min_tokens": 513}, r"min_tokens must be at least 0 and at most 512 \(max_tokens\)"),
            ({"min_tokens": 1, "stop_token_ids": range(VOCAB)}, "min_tokens needs at least one token that is not in"),
            ({"seed": "x"}, "seed must be an integer, not 'x'"),
            ({"stop": ""}, "stop must be a non-empty string or a list of such, not ''"),
            ({"stop": ["a", ""]}, "stop must be a non-empty string or a list of such"),
            ({"stop": 5}, "stop must be a non-empty string or a list of such, not 5"),
            ({"stop": [str(i) for i in range(17)]}, "stop takes at most 16 strings, not 17"),
            ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, not 5"),
            ({"stop_token_ids": [VOCAB]}, "each of stop_token_ids must be at least 0 and at most 999, not 1000"),
            ({"temprature": 1}, "Unknown option 'temprature'; known options: max_tokens, .*temperature, "),
        ],
    )
    def test_what_is_out_of_range_is_refused_with_the_range(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            make_params(**options)

    def test_stops(self) -> None:
        params = make_params(stop="END", stop_token_ids=[30, 3, 30])
        assert (params.stop, params.stop_token_ids) == (("END",), (2, 3, 7, 30))
        assert make_params(stop=["b", "a", "b"]).stop == ("b", "a")

    def test_a_seed_is_drawn_and_recorded_where_none_is_given(self) -> None:
        assert make_params(seed=-3).seed == -3
        assert make_params().seed != make_params().seed

    def test_the_budget_is_what_was_asked_for_or_the_default_within_the_window(self) -> None:
        assert make_params().token_budget(4000) == 512
        assert make_params().token_budget(100) == 100
        assert make_params(max_tokens=700).token_budget(100) == 700


SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5 * VOCAB},
    {"top_p": 0.9},
    {"top_p": 0.001},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 0.999},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"min_tokens": 1},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1, "min_tokens": 1},
]


class TestAgainstTransformers:
    """The same tokens stay, with the same probabilities, as after transformers' own logits processors."""

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    def test_distribution(self, options: dict[str, Any], temperature: float) -> None:
        logits = make_logits()
        before = logits.clone()
        request = RowSampler(make_params(temperature=temperature, **options), PROMPT)

        token_ids, weights = request.distribution(logits[0])

        expected = reference_probabilities(logits, PROMPT, temperature=temperature, **options)
        assert token_ids[weights > 0].tolist() == expected.nonzero()[:, 0].tolist()
        torch.testing.assert_close(weights / weights.sum(), expected[token_ids], rtol=1e-5, atol=0)
        assert torch.equal(logits, before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    def test_half_precision(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        """Here logits can be equal; which of two equal ones is the last in a nucleus is nobody's promise."""
        logits = make_logits(dtype=dtype)
        request = RowSampler(make_params(temperature=1.0, **options), PROMPT)

        _, weights = request.distribution(logits[0])

        expected = reference_probabilities(logits, PROMPT, temperature=1.0, **options)
        kept = (weights[weights > 0] / weights.sum()).sort().values
        torch.testing.assert_close(kept, expected[expected > 0].sort().values, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("options", [{"top_k": 3}, {"top_k": 5}, {"min_p": 0.5}], ids=str)
    def test_ties_stay_together(self, options: dict[str, Any]) -> None:
        logits = torch.full((1, VOCAB), -5.0)
        logits[0, [3, 30, 300, 600]] = 1.0
        request = RowSampler(make_params(temperature=1.0, **options))
        expected = reference_probabilities(logits, (), temperature=1.0, **options)
        assert request.distribution(logits[0])[0].tolist() == expected.nonzero()[:, 0].tolist()

    @pytest.mark.parametrize("top_p", [0.5, 0.75, 0.875])
    def test_a_nucleus_that_ends_exactly_at_top_p(self, top_p: float) -> None:
        logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
        request = RowSampler(make_params(temperature=1.0, top_p=top_p))
        kept = request.distribution(logits[0])[0]
        assert len(kept) == reference_probabilities(logits, (), temperature=1.0, top_p=top_p).count_nonzero()

    def test_the_penalty_follows_the_answer(self) -> None:
        logits = make_logits(8)
        request = RowSampler(make_params(repetition_penalty=1.5), PROMPT)
        seen = list(PROMPT)
        for row in logits:
            expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.LongTensor([seen]), row[None])[0]
            assert torch.equal(request.scores(row), expected)
            seen += draw(row[None], request)
            assert seen[-1] == expected.argmax()

    def test_greedy_follows_penalty_and_min_tokens(self) -> None:
        logits = torch.zeros(1, VOCAB)
        logits[0, [EOS[0], 5, 40]] = torch.tensor([9.0, 8.0, 7.0])
        request = RowSampler(make_params(min_tokens=2, repetition_penalty=1.1), (5,))
        assert [draw(logits, request)[0] for _ in range(3)] == [5, 5, EOS[0]]


def reference_probabilities(
    logits: Tensor,
    prompt: tuple[int, ...],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    min_tokens: int = 0,
) -> Tensor:
    """What `model.generate` would sample from, ``[vocab]`` float32: its processors in its order."""
    steps = LogitsProcessorList()
    if repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if min_tokens:
        steps.append(MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, list(EOS)))
    steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        steps.append(TopPLogitsWarper(top_p))
    if min_p:
        steps.append(MinPLogitsWarper(min_p))
    ids = torch.tensor([prompt], dtype=torch.long)
    return torch.as_tensor(steps(ids, logits.float())).softmax(dim=-1)[0]  # pyright: ignore[reportArgumentType]


class TestDraw:
    @given(st.data())
    @settings(deadline=None, max_examples=50)
    def test_it_does_not_depend_on_the_company(self, data: st.DataObject) -> None:
        """Eight requests of all kinds: in one batch, in any order, and each alone, with the same tokens."""
        kinds = st.sampled_from([{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "logprobs": 3}, *MIXED])
        options = [{**data.draw(kinds), "seed": seed} for seed in range(8)]
        order = data.draw(st.permutations(range(8)))
        steps = [make_logits(8, seed=step, dtype=torch.bfloat16) for step in range(3)]

        together = [RowSampler(make_params(**o), PROMPT) for o in options]
        shuffled = [RowSampler(make_params(**options[i]), PROMPT) for i in order]
        alone = [RowSampler(make_params(**o), PROMPT) for o in options]
        for logits in steps:
            expected = sample(logits, together)
            assert sample(logits[list(order)], shuffled) == [expected[i] for i in order]
            assert [sample(logits[i : i + 1], [request])[0] for i, request in enumerate(alone)] == expected

    def test_it_follows_the_distribution(self) -> None:
        logits = torch.full((1, VOCAB), -math.inf)
        logits[0, [10, 20, 30]] = torch.tensor([0.5, 0.3, 0.2]).log()
        request = RowSampler(make_params(temperature=1.0, seed=0))
        counts = Counter(draw(logits, request)[0] for _ in range(2000))
        assert set(counts) == {10, 20, 30}
        assert counts[10] / 2000 == pytest.approx(0.5, abs=0.04)
        assert counts[20] / 2000 == pytest.approx(0.3, abs=0.04)

    def test_the_seed_decides(self) -> None:
        rows = [row[None] for row in make_logits(20)]

        def answer(seed: int) -> list[int]:
            request = RowSampler(make_params(temperature=1.0, seed=seed))
            return [draw(row, request)[0] for row in rows]

        assert answer(1) == answer(1)
        assert answer(1) != answer(2)

    def test_the_random_stream_is_the_same_on_every_machine(self) -> None:
        """The numbers are Mersenne Twister's, met by the kept tokens in id order."""
        logits = torch.zeros(1, VOCAB)
        request = RowSampler(make_params(temperature=1.0, seed=0))
        assert [draw(logits, request)[0] for _ in range(4)] == [844, 757, 420, 258]

    def test_padding_rows_of_the_vocabulary_are_never_drawn(self) -> None:
        logits = torch.zeros(3, VOCAB)
        logits[:, 900:] = 50.0
        options = [{}, {"temperature": 1.0, "seed": 0}, {"repetition_penalty": 1.2}]
        for _ in range(20):
            requests = [RowSampler(make_params(logprobs=2, **o), [950]) for o in options]
            for result in sample(logits, requests, vocab_limit=900):
                assert isinstance(result, Sampled)
                assert result.token_id < 900
                assert result.logprob == pytest.approx(-math.log(900))

    def test_stops_are_masked_for_min_tokens(self) -> None:
        logits = torch.zeros(1, VOCAB)
        logits[0, [*EOS, 55]] = 30.0
        request = RowSampler(make_params(temperature=1.0, seed=0, min_tokens=10, stop_token_ids=[55]))
        tokens = [draw(logits, request)[0] for _ in range(11)]
        assert not {*EOS, 55} & set(tokens[:10])
        assert tokens[10] in {*EOS, 55}

    def test_a_tiny_temperature_is_greedy(self) -> None:
        logits = make_logits(spread=100)
        request = RowSampler(make_params(temperature=1e-300))
        assert draw(logits, request) == logits.argmax(dim=-1).tolist()

    def test_the_first_of_equal_logits_is_taken(self) -> None:
        assert draw(torch.ones(1, VOCAB, dtype=torch.bfloat16), RowSampler(make_params())) == [0]


MIXED = [
    {"repetition_penalty": 1.2},
    {"min_tokens": 2, "logprobs": 1},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
]


class TestNumericalErrors:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.1}], ids=str)
    def test_the_other_rows_go_on(self, options: dict[str, Any], value: float) -> None:
        logits = make_logits(3)
        logits[1, 77] = value
        broken, fine, also_fine = (RowSampler(make_params(**options)) for _ in range(3))

        first, second, third = sample(logits, [fine, broken, also_fine])

        assert isinstance(second, NumericalError)
        assert "NaN or Inf" in str(second)
        assert isinstance(first, Sampled)
        assert isinstance(third, Sampled)
        assert (fine.generated, broken.generated) == (1, 0)

    def test_nothing_but_minus_infinity(self) -> None:
        (result,) = sample(torch.full((1, VOCAB), -math.inf), [RowSampler(make_params())])
        assert isinstance(result, NumericalError)

    def test_options_that_overflow_are_named(self) -> None:
        request = RowSampler(make_params(temperature=1.0, repetition_penalty=1e-44), range(VOCAB))
        (result,) = sample(make_logits(), [request])
        assert isinstance(result, NumericalError)
        assert "repetition_penalty 1e-44" in str(result)


class TestLogprobs:
    def test_they_are_the_models_own_whatever_is_sampled(self) -> None:
        logits = make_logits(3, dtype=torch.bfloat16)
        options = [{}, {"temperature": 5.0, "top_k": 3}, {"repetition_penalty": 2.0}]
        requests = [RowSampler(make_params(logprobs=4, **o), range(VOCAB)) for o in options]
        expected = logits.float().log_softmax(dim=-1)
        for row, result in zip(expected, sample(logits, requests), strict=True):
            assert isinstance(result, Sampled)
            assert result.logprob == row[result.token_id]
            top = row.topk(4)
            assert result.top == tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def test_zero_gives_the_chosen_tokens_only(self) -> None:
        (result,) = sample(make_logits(), [RowSampler(make_params(logprobs=0))])
        assert isinstance(result, Sampled)
        assert result.logprob is not None
        assert result.top == ()

    def test_not_asked_for_they_are_not_computed(self) -> None:
        (result,) = sample(make_logits(), [RowSampler(make_params())])
        assert isinstance(result, Sampled)
        assert (result.logprob, result.top) == (None, ())


class _MadeInFloat32(TorchDispatchMode):
    """Records whether any operation makes a float32 tensor as wide as the vocabulary."""

    wide = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.dtype is torch.float32 and tensor.numel() >= VOCAB:
                self.wide = True
        return made


@pytest.mark.parametrize(("options", "wide"), [({}, False), ({"temperature": 1.0}, True)])
def test_greedy_rows_need_no_float32_copy_of_the_logits(options: dict[str, Any], wide: bool) -> None:
    requests = [RowSampler(make_params(**options)) for _ in range(8)]
    logits = make_logits(8, dtype=torch.bfloat16)
    with _MadeInFloat32() as made:
        sample(logits, requests)
    assert made.wide is wide
