# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Inside a latent step
#
# A latent step feeds the model its own last hidden state, mapped to an input embedding. Nobody can read that. But one
# can look: what was the model about to *say* at each step, how sure was it, and does the next agent look back at the
# steps?
#
# From a clone of the repository: `pip install -e . matplotlib`.

# %%
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from avp_agents import LatentEngine, MemoryStore
from avp_agents.context import LatentSegment, TokenSegment, leaves

MODEL = None  # SmolLM2-135M-Instruct; any other model that transformers loads will do
STEPS = 20
TOKENS = 48
QUESTION = "A shop sells pens at 3 dollars each. How much do 14 pens cost?"

# %%
engine = LatentEngine.from_pretrained(MODEL, dtype="float32", store=MemoryStore())
thought = engine.think(f"Work out which quantities matter and how they relate. {QUESTION}", steps=STEPS)
answer = engine.generate(f"Answer step by step. {QUESTION}", context=thought, max_tokens=TOKENS)
print(answer.text)

# %% [markdown]
# ## The lineage is all there is
#
# A context is a list of token ids and latent embeddings. So plain transformers can compute everything again, in one
# forward pass: token ids become embeddings, latent embeddings are put between them.

# %%
tokenizer = AutoTokenizer.from_pretrained(engine.model_path)
model = AutoModelForCausalLM.from_pretrained(engine.model_path, dtype=torch.float32, attn_implementation="eager").eval()
embed = model.get_input_embeddings()
spans, parts, start = [], [], 0
for segment in leaves(answer.context.lineage):
    if isinstance(segment, TokenSegment):
        parts.append(embed(torch.tensor(segment.token_ids)))
    else:
        parts.append(segment.embeddings.float())
    spans.append((type(segment), start, start + len(segment)))
    start += len(segment)
with torch.inference_mode():
    inputs = torch.cat(parts)[None]
    out = model(inputs_embeds=inputs, output_hidden_states=True, output_attentions=True)
print([(kind.__name__, stop - first) for kind, first, stop in spans])

# %% [markdown]
# The two agree: what the engine noted as the likeliest next token after the last step is what transformers says
# there.

# %%
first, stop = next((first, stop) for kind, first, stop in spans if kind is LatentSegment)
assert thought.readout is not None
for likeliest in (thought.readout.token_ids[0], out.logits[0, stop - 1].argmax()):
    print(repr(tokenizer.decode([int(likeliest)])))

# %% [markdown]
# ## What the steps say
#
# At every latent position the model has a distribution over next tokens. Step 0 is the end of the prompt. The next
# embedding is the mean of token embeddings under that distribution (in models whose head is tied to them), so a sure
# step is nearly an ordinary token, and an unsure one is a blend that no token stands for.
#
# SmolLM2 drifts to single letters: so small a model has little to hand over. Look at a larger one beside it.

# %%
probabilities = out.logits[0, first - 1 : stop].softmax(-1)
for step, row in enumerate(probabilities):
    top = row.topk(4)
    said = ", ".join(f"{tokenizer.decode([int(i)])!r} {p:.2f}" for p, i in zip(top.values, top.indices, strict=True))
    print(f"{step:3d}  {said}")

# %% [markdown]
# ## How sure, and how large
#
# Entropy in nats: 0 is certain, a uniform choice among 10 tokens is 2.3. Norms tell whether the embeddings stay where
# the model's own input embeddings are; blends are shorter than the tokens they are made of.

# %%
entropy = torch.special.entr(probabilities).sum(-1)
norms = inputs[0, first:stop].norm(dim=-1)
typical = embed.weight.norm(dim=-1).mean()
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.plot(range(len(entropy)), entropy, "o-", color="#e4934a")
left.set(xlabel="latent step", ylabel="entropy, nats", title="how sure", xticks=range(0, STEPS + 1, 5))
right.plot(range(1, len(norms) + 1), norms, "o-", color="#4a7fb5", label="latent embedding")
right.axhline(float(typical), color="#9aa8b8", linestyle="--", label="mean of the vocabulary")
right.set(xlabel="latent step", ylabel="norm", title="how large", ylim=(0, None), xticks=range(0, STEPS + 1, 5))
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Does the next agent look at them?
#
# For every token of the answer, the attention of all heads is summed by what it goes to. The first position is a
# resting place of many heads ("sink") and is shown apart. The last column is the share that the latent positions
# would get if attention were spread evenly.

# %%
answer_first = start - len(answer.token_ids)
groups = {
    "sink": slice(0, 1),
    "prompt": slice(1, first),
    "latent": slice(first, stop),
    "question": slice(stop, answer_first),
    "answer": slice(answer_first, start),
}
answering = [layer[0, :, answer_first:start] for layer in out.attentions]  # each [heads, answer, positions]
shares = torch.tensor([[float(layer[..., where].sum(-1).mean()) for where in groups.values()] for layer in answering])
for (name, where), share in zip(groups.items(), shares.mean(0), strict=True):
    even = (where.stop - where.start) / start
    print(f"{name:10s} {float(share):6.1%}   evenly {even:6.1%}")

# %% [markdown]
# Layer by layer: which layers read the thought, if any? The orange band is the attention to it.

# %%
colours = {"sink": "#dde3ea", "prompt": "#9aa8b8", "latent": "#e4934a", "question": "#7fa7cf", "answer": "#4a7fb5"}
figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
axes.stackplot(range(len(shares)), shares.T, labels=list(groups), colors=list(colours.values()))
axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1), xlim=(0, len(shares) - 1))
axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.2))
plt.show()

# %% [markdown]
# ## And without them?
#
# Attention shows where the model looks, not what it makes of it. The test is to take the steps away: the same
# prompts, no latent step. `avp-agents bench quality` does that over whole tasks, with intervals.

# %%
bare = engine.think(f"Work out which quantities matter and how they relate. {QUESTION}", steps=0)
print(engine.generate(f"Answer step by step. {QUESTION}", context=bare, max_tokens=TOKENS).text)
engine.close()
