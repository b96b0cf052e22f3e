"""The caller's side of latent requests: how to ask for a thought, and read it.

    asked = ThoughtRequest(steps=20)
    params = SamplingParams(**asked.sampling_options())           # the prompt is any vLLM prompt
    thought = read_thought(output.kv_transfer_params)             # the finished RequestOutput's

Over HTTP the same options are fields of the request's body (`ThoughtRequest.http_body`), and the answer's
``kv_transfer_params`` field holds the thought.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

from avp_agents.context import LatentMethod, LatentRecipe, Readout
from avp_agents.errors import ConfigurationError, EngineError, NumericalError

if TYPE_CHECKING:
    import torch

FIELD = "avp_latent"
"""The key of ``kv_transfer_params`` under which request and answer stand."""
ROWS_ARGUMENT = "avp_latent_rows"
"""The key of a request's extra arguments under which the scheduler tells the workers its rows; never a caller's."""
CONNECTOR = "LatentConnector"
LOGITS_PROCESSOR = "avp_agents.vllm.plugin.sampling:LatentSampling"
ARCHITECTURES = {
    f"{family}ForCausalLM": f"Latent{family}ForCausalLM"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")
}
"""Architectures that can think inside vLLM, and the plugin's names for them."""
MAX_STEPS = 1024
DEFAULT_ROWS = 8192
EXTRA_POSITIONS = 3
"""Positions a latent request takes beyond prompt and steps: its answer is on its way while they are decoded."""


@dataclass(frozen=True)
class ThoughtRequest:
    """A thought to ask for; the options are those of `LatentRecipe`, None is the model's default.

    Raises:
        ConfigurationError: An option is unknown or out of range.
    """

    steps: int
    method: LatentMethod | None = None
    k: int | None = 256
    temperature: float = 1.0
    renormalise: bool | None = None
    stop_cosine: float | None = None
    stop_entropy: float | None = None

    def __post_init__(self) -> None:
        if type(self.steps) is not int or not 0 <= self.steps <= MAX_STEPS:
            raise ConfigurationError(f"A thought inside vLLM has between 0 and {MAX_STEPS} steps, not {self.steps!r}.")
        if self.method is not None and self.method not in get_args(LatentMethod):
            raise ConfigurationError(f"Unknown latent method {self.method!r}; choose 'soft', 'ridge' or 'rescale'.")
        if self.k is not None and (type(self.k) is not int or self.k < 1):
            raise ConfigurationError(f"k must be at least 1, or None for the whole vocabulary, not {self.k!r}.")
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise ConfigurationError(f"The latent temperature must be positive and finite, not {self.temperature!r}.")
        if self.renormalise is not None and type(self.renormalise) is not bool:
            raise ConfigurationError(f"renormalise is true, false or None, not {self.renormalise!r}.")
        if self.stop_cosine is not None and not (_is_number(self.stop_cosine) and -1 <= self.stop_cosine <= 1):
            raise ConfigurationError(f"stop_cosine lies between -1 and 1, not {self.stop_cosine!r}.")
        if self.stop_entropy is not None and not (_is_number(self.stop_entropy) and self.stop_entropy >= 0):
            raise ConfigurationError(f"stop_entropy is at least 0 nats, not {self.stop_entropy!r}.")

    @classmethod
    def parse(cls, options: Any) -> ThoughtRequest:
        """What a request's `FIELD` says.

        Raises:
            ConfigurationError: It is malformed.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(options, Mapping) or not {"steps"} <= options.keys() <= known:
            raise ConfigurationError(f"{FIELD} is an object with 'steps' and some of {', '.join(sorted(known))}.")
        return cls(**options)

    @property
    def stops_early(self) -> bool:
        """Whether a stopping rule is to be looked at."""
        return self.stop_cosine is not None or self.stop_entropy is not None

    @property
    def max_tokens(self) -> int:
        """Decode steps the request takes."""
        return self.steps + EXTRA_POSITIONS

    def sampling_options(self) -> dict[str, Any]:
        """Keyword arguments of ``SamplingParams``."""
        return {
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
            "detokenize": False,
            "extra_args": {"kv_transfer_params": self._transfer_params()},
        }

    def http_body(self) -> dict[str, Any]:
        """Fields of a completion or chat request's body."""
        return {"temperature": 0.0, "max_tokens": self.max_tokens, "kv_transfer_params": self._transfer_params()}

    def _transfer_params(self) -> dict[str, Any]:
        return {FIELD: asdict(self)}


@dataclass(frozen=True)
class ReturnedThought:
    """What came of a latent request.

    Attributes:
        embeddings: ``[n, hidden]``, the embeddings that were fed back, in the model's dtype; n is less than the steps
            asked for where a stopping rule held.
        recipe: How they were made, the model's defaults filled in.
        readout: What the model was about to say behind the last of them.
    """

    embeddings: torch.Tensor
    recipe: LatentRecipe
    readout: Readout


def read_thought(transfer_params: Mapping[str, Any] | None) -> ReturnedThought:
    """The thought in a finished latent request's ``kv_transfer_params``.

    Raises:
        NumericalError: NaN or Inf came out of the model.
        EngineError: There is no thought; the message says why.
    """
    answer = (transfer_params or {}).get(FIELD)
    if answer is None:
        raise EngineError("vLLM answered without a thought; start it with plugin_options(thinks_as=...).")
    if "tensors" not in answer:
        raise EngineError(f"vLLM did not finish the thought: {answer['error']}")
    from safetensors.torch import load

    tensors = load(base64.b64decode(answer["tensors"], validate=True))
    recipe = LatentRecipe(**answer["recipe"])
    embeddings, hidden = tensors["embeddings"], tensors["hidden"]
    steps = len(embeddings)
    if len(hidden) == steps + 1:
        steps = next((step for step in range(steps) if _has_settled(step, tensors, recipe)), steps)
        hidden = hidden[: steps + 1]
    embeddings = embeddings[:steps]
    finite = embeddings.isfinite().all(dim=-1)
    if not finite.all() or not hidden.isfinite().all():
        step = int((~finite).nonzero()[0]) if not finite.all() else steps
        raise NumericalError(f"NaN or Inf at latent step {step}; try dtype='float32'.")
    last = len(hidden) - 1
    readout = Readout(hidden[last].clone(), tensors["token_ids"][last].long(), tensors["probabilities"][last].clone())
    return ReturnedThought(embeddings.clone(), recipe, readout)


def _has_settled(step: int, tensors: Mapping[str, torch.Tensor], recipe: LatentRecipe) -> bool:
    """Whether a stopping rule holds before this step, as in `LatentEngine`."""
    import torch

    hidden = tensors["hidden"].float()
    if not hidden[step].isfinite().all():
        return False
    if recipe.stop_cosine is not None and step > 0:
        cosine = torch.cosine_similarity(hidden[step], hidden[step - 1], dim=0)
        if float(cosine) > recipe.stop_cosine:
            return True
    return recipe.stop_entropy is not None and float(tensors["entropy"][step]) < recipe.stop_entropy


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
