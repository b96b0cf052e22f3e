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
# # 4. A latent crew
#
# CrewAI hands the output of one task to the next as text. With `AvpLLM` the text stays out of the prompt: the task is
# answered on the *contexts* of the tasks it builds on. Agents, tasks and crew stay as they are.
#
# From a clone of the repository: `pip install -e ".[crewai]"` (Python 3.11 to 3.13).

# %%
import os

# set before CrewAI is imported; leave them out if you want its telemetry and tracing
os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")

from crewai import Agent, Crew, Task
from crewai.events import crewai_event_bus
from crewai.events.types.llm_events import LLMCallCompletedEvent

from avp_agents import LatentEngine, MemoryStore
from avp_crewai import AvpLLM

MODEL = None  # SmolLM2-135M-Instruct; with a GPU, for example "Qwen/Qwen2.5-7B-Instruct"
STEPS = 20
TOKENS = 64
SUBJECT = "a bicycle for the city"

# %% [markdown]
# ## Three agents
#
# Each has an LLM of its own, and all of them share one engine. Two think, the third one writes.

# %%
engine = LatentEngine.from_pretrained(MODEL, store=MemoryStore())


def agent(role: str, goal: str, llm: AvpLLM) -> Agent:
    return Agent(role=role, goal=goal, backstory="You are thorough and brief.", llm=llm)


def thinker() -> AvpLLM:
    return AvpLLM(engine=engine, mode="latent", latent_steps=STEPS)


use = agent("Researcher", "Know what things are used for", thinker())
price = agent("Buyer", "Know what things cost", thinker())
editor = agent("Editor", "Write short advice", AvpLLM(engine=engine, max_tokens=TOKENS))

# %% [markdown]
# ## Tasks that build on one another
#
# `context=[...]` is CrewAI's own way of saying so.

# %%
uses = Task(description="Think about the uses of {subject}.", expected_output="What matters.", agent=use)
costs = Task(
    description="Think about the costs of {subject}.", expected_output="What matters.", agent=price, context=[]
)
advice = Task(
    description="Advise somebody who wants to buy {subject}.",
    expected_output="Two sentences.",
    agent=editor,
    context=[uses, costs],
)

# %% [markdown]
# ## Kick off, and see how the work arrived
#
# Each call's `avp` metadata comes with CrewAI's own event. The editor stands on both contexts, joined to one. (A
# notebook runs an event loop, hence `kickoff_async`; in a script it is `crew.kickoff`.)

# %%
calls = []
crew = Crew(agents=[use, price, editor], tasks=[uses, costs, advice])
with crewai_event_bus.scoped_handlers():
    crewai_event_bus.on(LLMCallCompletedEvent)(lambda source, event: calls.append(event.usage["avp"]))
    output = await crew.kickoff_async(inputs={"subject": SUBJECT})  # noqa: F704
    crewai_event_bus.flush()
for call in calls:
    print(f"{call['mode']:6s} {call['reason']}")

# %%
print(output.raw)

# %% [markdown]
# ## What a human reads
#
# A thought has no text. Where somebody has to read what a researcher found, use `mode="text"` for that agent, and the
# others stay latent.

# %%
print(uses.output)
engine.close()
