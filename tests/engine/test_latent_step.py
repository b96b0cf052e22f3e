"""The latent step f(h): three formulas, their options, and what stops them; on tiny models, by the reference."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import ROUNDING, Reference, fed_latents, relative_deviation
from tiny_models import MAX_POSITIONS, TinyModels

from avp_agents import LatentEngine, LatentSegment
from avp_agents.answer.options import ThinkOptions
from avp_agents.errors import ConfigurationError, ContextWindowError, NumericalError

PROMPT = "What is the sum of 24 and 17? Think before you answer."
STEPS = 5


@pytest.fixture(scope="module")
def engines(tiny: TinyModels, open_module_engine: Callable[..., LatentEngine]) -> Callable[[str], LatentEngine]:
    opened: dict[str, LatentEngine] = {}

    def engine(name: str) -> LatentEngine:
        if name not in opened:
            opened[name] = open_module_engine(tiny.path(name))
        return opened[name]

    return engine


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"k": 256, "temperature": 1.0, "renormalise": False},
        {"k": 4, "temperature": 1.0, "renormalise": False},
        {"k": 1, "temperature": 1.0, "renormalise": False},
        {"k": None, "temperature": 1.0, "renormalise": False},
        {"k": 32, "temperature": 0.3, "renormalise": False},
        {"k": 32, "temperature": 1.0, "renormalise": True},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_soft_is_the_expected_input_embedding(
    name: str,
    options: dict[str, Any],
    engines: Callable[[str], LatentEngine],
    tiny_reference: Callable[[str], Reference],
) -> None:
    """f(h) = Σ p_v E_v over the k likeliest tokens; E_v with the model's own scale, p with its own soft cap."""
    context = engines(name).think(PROMPT, steps=STEPS, method="soft", **options)

    reference = tiny_reference(name)
    expected = reference.think(reference.render(PROMPT), STEPS, method="soft", **options)
    assert relative_deviation(fed_latents(context), expected.embeddings) < ROUNDING


@pytest.mark.parametrize("k", [4, 256, None])
def test_rows_without_a_token_never_count(
    k: int | None, engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """Padding rows of the head would win every softmax here; they take no part in steps, readout or answer."""
    engine, reference = engines("padded"), tiny_reference("padded")
    context = engine.think(PROMPT, steps=STEPS, k=k, renormalise=True)
    answer = engine.generate(PROMPT, max_tokens=16)

    prompt = reference.render(PROMPT)
    expected = reference.think(prompt, STEPS, k=k, renormalise=True)
    assert relative_deviation(fed_latents(context), expected.embeddings) < ROUNDING
    assert context.readout is not None
    assert int(context.readout.token_ids.max()) < reference.vocabulary
    assert answer.token_ids == reference.generate(prompt, 16).token_ids


@pytest.mark.parametrize("name", ["rotated", "llama-untied"])
def test_ridge_solves_the_map_from_output_to_input_space(
    name: str, engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """f(h) = hA with A solved in float64, at the mean norm of an input embedding."""
    context = engines(name).think(PROMPT, steps=STEPS, method="ridge")

    reference = tiny_reference(name)
    expected = reference.think(reference.render(PROMPT), STEPS, method="ridge")
    found = fed_latents(context)
    assert relative_deviation(found, expected.embeddings) < ROUNDING
    torch.testing.assert_close(found.norm(dim=-1), torch.full((STEPS,), mean_norm(reference)), rtol=1e-4, atol=0)


def test_rescaling_alone_does_not_reach_input_space(
    engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """The control of the ridge test. Where the head is the input table rotated, A is the rotation back:

    a row of the head becomes the input embedding of its token under ridge, and something unrelated under rescaling.
    """
    reference = tiny_reference("rotated")
    head, table = reference.model.get_output_embeddings().weight.detach(), reference.input_table
    ridged = torch.stack([reference.ridge(row) for row in head])
    rescaled = torch.stack([reference.rescaled(row) for row in head])
    assert torch.cosine_similarity(ridged, table).min() > 0.999
    assert torch.cosine_similarity(rescaled, table).abs().mean() < 0.5

    engine = engines("rotated")
    ridge = fed_latents(engine.think(PROMPT, steps=1, method="ridge"))
    identity = fed_latents(engine.think(PROMPT, steps=1, method="rescale"))
    assert torch.cosine_similarity(ridge, identity).abs().max() < 0.5


def test_rescale_is_the_hidden_state_at_an_embedding_s_norm(
    engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """f(h) = h · mean|E| / |h|."""
    context = engines("gemma3").think(PROMPT, steps=STEPS, method="rescale")

    reference = tiny_reference("gemma3")
    expected = reference.think(reference.render(PROMPT), STEPS, method="rescale")
    assert relative_deviation(fed_latents(context), expected.embeddings) < ROUNDING


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "soft"), ("gpt2", "soft"), ("twin", "soft"), ("llama-untied", "ridge")]
)
def test_the_default_method_suits_the_model(name: str, method: str, engines: Callable[[str], LatentEngine]) -> None:
    """Soft where head and input embeddings are tied, or as good as tied ("twin"); ridge where they are not."""
    segment = engines(name).think(PROMPT, steps=1).lineage[-1]

    assert isinstance(segment, LatentSegment)
    assert segment.recipe.method == method
    assert segment.recipe.renormalise == (method == "ridge")


def test_options_are_part_of_what_a_context_is(engines: Callable[[str], LatentEngine]) -> None:
    """Another method, k, temperature, norm, number of steps or stopping rule is another context; equal ones are one."""
    engine = engines("llama")
    variants: list[ThinkOptions] = [
        {}, {"k": 4}, {"k": None}, {"temperature": 0.5}, {"renormalise": True}, {"method": "ridge"},
        {"method": "rescale"}, {"stop_cosine": 1.0}, {"stop_entropy": 0.0},
    ]  # fmt: skip

    ids = [engine.think(PROMPT, steps=2, **options).recipe_id for options in variants]
    ids.append(engine.think(PROMPT, steps=3).recipe_id)

    assert len(set(ids)) == len(variants) + 1
    assert engine.think(PROMPT, steps=2).recipe_id == ids[0]


def test_the_readout_is_what_the_model_was_about_to_say(
    engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """After the last step: h_N, which was not fed, and the 256 likeliest next tokens of the whole distribution."""
    context = engines("gemma2").think(PROMPT, steps=STEPS)

    reference = tiny_reference("gemma2")
    prompt = reference.render(PROMPT)
    thought = reference.think(prompt, STEPS)
    logits = reference.last([*prompt, *thought.embeddings])[0]
    top = logits[: reference.vocabulary].softmax(-1).topk(256)
    readout = context.readout
    assert readout is not None
    assert relative_deviation(readout.hidden, thought.hidden) < ROUNDING
    assert readout.probabilities.dtype is torch.float32
    torch.testing.assert_close(readout.probabilities, top.values, rtol=1e-3, atol=1e-6)
    assert readout.token_ids[:5].tolist() == top.indices[:5].tolist()


def test_no_steps_is_a_prefill(
    engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """With 0 steps the context is the prompt, ready to be generated on."""
    context = engines("llama").think(PROMPT, steps=0)

    assert context.token_ids() == tuple(tiny_reference("llama").render(PROMPT))
    assert context.latent_steps == 0
    assert context.kv_len == len(context)


def test_stopping_by_entropy(
    engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """Steps end as soon as the next token's entropy falls below `stop_entropy`; steps made until then are the same."""
    engine, reference = engines("llama"), tiny_reference("llama")
    prompt = reference.render(PROMPT)
    fed = reference.think(prompt, 12).embeddings
    entropies = [entropy(reference.last([*prompt, *fed[:steps]])[0]) for steps in range(1, 12)]
    limit = sorted(entropies)[1] + 1e-3
    expected = next(steps for steps, nats in enumerate(entropies, start=1) if nats < limit)

    context = engine.think(PROMPT, steps=12, stop_entropy=limit)

    assert context.latent_steps == expected
    assert relative_deviation(fed_latents(context), fed[:expected]) < ROUNDING


def test_stopping_by_convergence(
    engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """Steps end as soon as consecutive hidden states are more alike than `stop_cosine`."""
    engine, reference = engines("llama"), tiny_reference("llama")
    prompt = reference.render(PROMPT)
    fed = reference.think(prompt, 12).embeddings
    hidden = torch.stack([reference.last([*prompt, *fed[:steps]])[1] for steps in range(12)])
    cosines = torch.cosine_similarity(hidden[1:], hidden[:-1]).tolist()
    limit = sorted(cosines)[-2] - 1e-3
    expected = next(steps for steps, cosine in enumerate(cosines, start=1) if cosine > limit)

    context = engine.think(PROMPT, steps=12, stop_cosine=limit)

    assert context.latent_steps == expected


async def test_infinity_ends_a_request_and_no_other(
    engines: Callable[[str], LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """A sequence whose numbers overflow ends with `NumericalError`; those in the same batch go on, exactly."""
    engine, reference = engines("broken"), tiny_reference("broken")

    bad_thought, bad_answer, good = await asyncio.gather(
        engine.athink("Z Z Z", steps=STEPS, method="soft", k=4),
        engine.agenerate("Z Z Z", max_tokens=16),
        engine.agenerate("Why?", max_tokens=16),
        return_exceptions=True,
    )

    assert isinstance(bad_thought, NumericalError)
    assert isinstance(bad_answer, NumericalError)
    assert not isinstance(good, BaseException)
    assert good.token_ids == reference.generate(reference.render("Why?"), 16).token_ids


def test_many_steps_warn(engines: Callable[[str], LatentEngine]) -> None:
    """Beyond 40 steps quality falls; the caller is told."""
    with pytest.warns(UserWarning, match="40"):
        engines("llama").think("Why?", steps=41)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1}, {"k": 0}, {"k": -3}, {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")},
        {"temperature": float("inf")}, {"method": "average"}, {"stop_cosine": 1.5}, {"stop_entropy": -0.1},
        {"patience": 3},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any], engines: Callable[[str], LatentEngine]) -> None:
    """Nothing is clipped or ignored."""
    with pytest.raises(ConfigurationError):
        engines("llama").think("Why?", **options)


@pytest.mark.filterwarnings("ignore:.*latent steps:UserWarning")
def test_more_steps_than_the_window_holds_are_refused_before_they_start(
    engines: Callable[[str], LatentEngine],
) -> None:
    """The error names the numbers."""
    engine = engines("llama")
    with pytest.raises(ContextWindowError) as refusal:
        engine.think("Why?", steps=MAX_POSITIONS)

    assert refusal.value.window == MAX_POSITIONS
    assert refusal.value.requested == MAX_POSITIONS
    assert refusal.value.prompt == engine.count_tokens("Why?")


def mean_norm(reference: Reference) -> float:
    return float(reference.input_table.norm(dim=-1).mean())


def entropy(logits: torch.Tensor) -> float:
    logp = logits.double().log_softmax(-1)
    return float(-(logp.exp() * logp).sum())
