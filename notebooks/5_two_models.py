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
# # 5. Two models and the shared vocabulary
#
# A KV-cache means nothing to another model. What can cross is text that the first model read, and its next-token
# distribution: two vocabularies share the tokens that stand for the same bytes. This notebook looks at both, and at
# how little the second one carries.
#
# From a clone of the repository: `pip install -e .`; the second model is 1 GB.

# %%
from avp_agents import LatentEngine, MemoryStore

SOURCE = None  # SmolLM2-135M-Instruct reads and thinks
TARGET = "Qwen/Qwen2.5-Coder-0.5B-Instruct"  # ... and this one answers
STEPS = 10
TOKENS = 24
FACTS = "The lighthouse of Ormen was built in 1874 by the engineer Tilda Brask. Its light is green."
QUESTION = "Who built the lighthouse of Ormen?"

# %%
store = MemoryStore()
source = LatentEngine.from_pretrained(SOURCE, store=store)
target = LatentEngine.from_pretrained(TARGET, store=store)
for engine in (source, target):
    engine.load()
    print(engine.model_path, engine.fingerprint[:12])

# %% [markdown]
# ## What they share
#
# Tokens are compared by their bytes, not by their spelling in a vocabulary file.

# %%
shared = target.crossing.shared_vocabulary(source.crossing)
print(
    f"{len(shared):,} tokens: {shared.share_of_source:.1%} of the source's,",
    f"{shared.share_of_target:.1%} of the other's",
)

# %%
ours = set(shared.source_ids.tolist())
pieces = source.crossing.token_bytes.pieces
alone = [piece for i, piece in enumerate(pieces) if piece is not None and i not in ours]
print("both:  ", [pieces[i] for i in shared.source_ids[2000:2008].tolist()])
print("source:", alone[2000:2008])

# %% [markdown]
# ## A thought as bytes
#
# After its latent steps the source was about to say something. `express` writes that down as byte strings with
# probabilities; the message it read travels beside it.

# %%
context = source.think(f"Read this, then think about the question. {FACTS} {QUESTION}", steps=STEPS)
thought = source.crossing.express(context)
(distribution,) = thought.distributions
for piece, probability in list(zip(distribution.pieces, distribution.probabilities, strict=True))[:6]:
    print(f"{probability:.3f} {piece!r}")
print(len(thought.encode()), "bytes with the message that was read")

# %% [markdown]
# ## What the target makes of it
#
# The pieces that it has tokens for become one input embedding. *Mass* is how much of the source's probability that
# is.

# %%
projection = target.crossing.embeddings_of(thought)
print(f"{tuple(projection.embeddings.shape)}, mass {projection.mass[0]:.0%}")

# %% [markdown]
# ## The default: read it again
#
# Give the context to the other engine as if it were its own. The two shake hands, and the text is read again; the
# answer says so.

# %%
ask = f"{QUESTION} Answer with a name."
answer = target.generate(ask, context=context, max_tokens=TOKENS)
print(answer.text)
print(answer.handoff.mode, "-", answer.handoff.reason)

# %% [markdown]
# ## The vector alone
#
# Without the text the target has one vector. It holds about as much as one token, so the name is not in it. That is
# the limit of this way across, whatever the models.

# %%
vector = target.crossing.project(source.crossing.express(context, reread=False))
print(target.generate(ask, context=vector, max_tokens=TOKENS).text)

# %% [markdown]
# To measure it on your own pair: `avp-agents bench comprehension --target MODEL`, and `avp-agents bench quality
# comprehension --source MODEL --modes projection,text-cross-model`.

# %%
source.close()
target.close()
