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
# # 1. Quick start
#
# Two agents work on a question. Usually the first one writes notes, token by token, and the second one reads them.
# Here the first one *thinks*: it reads the question, runs a few latent steps, and hands over what it computed.
#
# From a clone of the repository: `pip install -e ".[langgraph]" matplotlib`. On a CPU this notebook takes a minute or
# two. With a GPU (a free T4 is enough), change one line: `MODEL = "Qwen/Qwen2.5-1.5B-Instruct"`.

# %%
import json

import matplotlib.pyplot as plt

from avp_agents import LatentEngine, MemoryStore

MODEL = None  # SmolLM2-135M-Instruct: small enough for a CPU, too small to be right
STEPS = 20
TOKENS = 96
QUESTION = "A shop sells pens at 3 dollars each. How much do 14 pens cost?"

# %%
engine = LatentEngine.from_pretrained(MODEL, store=MemoryStore())
engine.load()
print(engine.model_path, engine.dtype, engine.device)

# %% [markdown]
# ## Think
#
# `think` reads the prompt and then runs latent steps: the last hidden state becomes the next input, and no token is
# chosen. What comes back is a *context*.

# %%
context = engine.think(f"Work out which quantities matter and how they relate. {QUESTION}", steps=STEPS)
for segment in context.lineage:
    print(f"{type(segment).__name__}: {len(segment)} positions")

# %% [markdown]
# ## Answer on it
#
# The second agent gets the context. All of its keys and values are reused; nothing is read again.

# %%
latent = engine.generate(f"Answer step by step. {QUESTION}", context=context, max_tokens=TOKENS)
print(latent.text)
print(f"\n{latent.handoff.reason}; {latent.usage.positions_reused} positions reused")

# %% [markdown]
# ## The same with text
#
# The first agent writes notes, the second one reads them.

# %%
notes = engine.generate(f"Work out which quantities matter and how they relate. {QUESTION}", max_tokens=2 * TOKENS)
text = engine.generate(f"Answer step by step. {QUESTION}\n\nNotes: {notes.text}", max_tokens=TOKENS)
print(text.text)

# %% [markdown]
# ## What it took
#
# The answer has to be decoded either way, so that part stays. What goes away is the decoding of the notes.

# %%
phases = {"prefill": "#9aa8b8", "latent": "#e4934a", "decode": "#4a7fb5"}
teams = {"latent": (context.usage, latent.usage), "text": (notes.usage, text.usage)}
figure, axes = plt.subplots(figsize=(7, 1.8))
for row, (name, agents) in enumerate(teams.items()):
    left = 0.0
    for usage, hatch in zip(agents, ("///", ""), strict=True):
        for phase, colour in phases.items():
            seconds = getattr(usage, f"{phase}_seconds")
            axes.barh(row, seconds, left=left, color=colour, hatch=hatch, edgecolor="white")
            left += seconds
    print(f"{name}: {left:.1f} s, {sum(usage.completion_tokens for usage in agents)} tokens decoded")
axes.set_yticks(range(len(teams)), list(teams))
axes.set_xlabel("seconds (hatched: the first agent)")
plt.show()

# %% [markdown]
# ## A handle is enough
#
# Graph state and messages do not carry tensors. They carry a handle, which the store resolves.

# %%
handle = engine.store.put(context)
print(json.dumps(handle.to_state(), indent=1))
print(len(engine.resolve(handle)), "positions")

# %% [markdown]
# ## Losing the KV-cache loses nothing
#
# Keys and values are only a cache of the lineage: token ids and the embeddings of the latent steps. Where they are
# gone, they are computed again in one pass, and the answer says so. (The prompt's are still in memory here, from the
# notes above, so only those of the latent steps are computed.)

# %%
lineage_only = context.prefix(len(context))
engine.store.delete(handle)
del context, latent
again = engine.generate(f"Answer step by step. {QUESTION}", context=lineage_only, max_tokens=TOKENS // 4)
print(again.handoff.mode, "-", again.handoff.reason)

# %%
engine.close()
