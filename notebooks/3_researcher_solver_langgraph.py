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
# # 3. Researcher and solver in LangGraph
#
# An ordinary graph: nodes, edges, `MessagesState`, a checkpointer. Only the chat models are swapped.
#
# From a clone of the repository: `pip install -e ".[langgraph]"`.

# %%
import json

from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from avp_agents import LatentEngine, MemoryStore
from avp_langgraph import AvpChatModel, ContextState, GenerateNode, JoinNode, ThinkNode

MODEL = None  # SmolLM2-135M-Instruct; with a GPU, for example "Qwen/Qwen2.5-7B-Instruct"
STEPS = 20
TOKENS = 64
QUESTION = "A shop sells pens at 3 dollars each. How much do 14 pens cost?"

# %%
engine = LatentEngine.from_pretrained(MODEL, store=MemoryStore())
researcher = AvpChatModel(engine=engine, mode="latent", latent_steps=STEPS)
solver = AvpChatModel(engine=engine, max_tokens=TOKENS)

# %% [markdown]
# ## The graph
#
# The researcher's message holds no text worth reading, but a handle. The solver finds it among the messages and
# answers on what it stands for.


# %%
def build(first, second):
    graph = StateGraph(MessagesState)
    graph.add_node("researcher", lambda state: {"messages": [first.invoke(state["messages"])]})
    graph.add_node("solver", lambda state: {"messages": [second.invoke(state["messages"])]})
    graph.add_edge(START, "researcher").add_edge("researcher", "solver")
    return graph.compile(checkpointer=InMemorySaver())


graph = build(researcher, solver)
thread = {"configurable": {"thread_id": "pens"}}
result = graph.invoke({"messages": [HumanMessage(QUESTION)]}, thread)
print(result["messages"][-1].text)

# %% [markdown]
# ## What travelled
#
# The state carries a few hundred bytes; the metadata of the answer says how the context arrived.

# %%
thought, answer = result["messages"][-2:]
print(json.dumps(thought.response_metadata["avp_context"], indent=1))
made = answer.response_metadata["avp"]
print({name: made[name] for name in ("mode", "reason", "positions_reused", "tokens_decoded")})

# %% [markdown]
# ## Going on
#
# The thread is in the checkpointer as any other, so the next turn goes on from it, and from what is computed already.

# %%
result = graph.invoke({"messages": [HumanMessage("And 20 pens?")]}, thread)
print(result["messages"][-1].text)
print(result["messages"][-1].response_metadata["avp"]["positions_reused"], "positions reused")

# %% [markdown]
# ## The same graph with text
#
# Nothing else changes when the researcher writes instead.

# %%
writer = researcher.with_options(mode="text", max_tokens=2 * TOKENS)
notes, written = build(writer, solver).invoke({"messages": [HumanMessage(QUESTION)]}, thread)["messages"][-2:]
for name, messages in {"latent": (thought, answer), "text": (notes, written)}.items():
    usages = [message.usage_metadata for message in messages]
    print(f"{name}: {sum(usage['output_tokens'] for usage in usages)} tokens written")

# %% [markdown]
# ## Three researchers at once
#
# `ThinkNode` puts a context into the state under its node's name. The three run in one batch; `JoinNode` makes one
# context of theirs.


# %%
class State(MessagesState, ContextState):
    pass


SIDES = ("quantities", "method", "mistakes")
team = StateGraph(State)
for side in SIDES:
    task = HumanMessage(f"Think about this question from the side of its {side}.")
    team.add_node(side, ThinkNode(solver, steps=STEPS, prompt=lambda state, task=task: [*state["messages"], task]))
    team.add_edge(START, side)
team.add_node("join", JoinNode(solver, contexts=SIDES, strategy="replay"))
team.add_node("writer", GenerateNode(solver, context="join", prompt="Answer in one sentence."))
team.add_edge([*SIDES], "join").add_edge("join", "writer")

# %% [markdown]
# While it runs, `stream_mode="custom"` tells of every handoff.

# %%
for kind, chunk in team.compile().stream({"messages": [HumanMessage(QUESTION)]}, stream_mode=["custom", "values"]):
    if kind == "custom":
        print(f"{chunk['node']}: {chunk['mode']}, {chunk['positions_reused']} positions reused")
    else:
        last = chunk["messages"][-1]
print(last.text)
engine.close()
