"""An agent with a tool: the call is decoded under a grammar, so that even a small model always calls correctly.

    python recipes/crew_tools.py "What do 14 pens cost?"

After the tool's result the agent goes on from its own KV-cache, and so does the agent that reads its findings. With
``native_tools=False`` CrewAI's text format (Thought, Action, Action Input) is used instead.
"""

import sys

from crewai import Agent, Crew, Task
from crewai.llms.base_llm import BaseLLM
from crewai.tools import tool

from avp_crewai import AvpLLM

PRICES = {"pen": 3, "notebook": 5, "stapler": 12}


@tool("price_of")
def price_of(thing: str) -> str:
    """The price of one thing in our shop, in dollars."""
    return f"{PRICES[thing]} dollars" if thing in PRICES else f"We sell {', '.join(PRICES)} only."


def build_crew(clerk_llm: BaseLLM, solver_llm: BaseLLM) -> Crew:
    clerk = Agent(
        role="Clerk", goal="Look prices up", backstory="You never guess.", llm=clerk_llm, tools=[price_of], max_iter=3
    )
    solver = Agent(role="Solver", goal="Answer the question", backstory="You are brief.", llm=solver_llm)
    look_up = Task(description="Look up the price for: {question}", expected_output="The price.", agent=clerk)
    solve = Task(description="Answer: {question}", expected_output="The answer.", agent=solver, context=[look_up])
    return Crew(agents=[clerk, solver], tasks=[look_up, solve])


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What do 14 pens cost?"
    crew = build_crew(AvpLLM(max_tokens=96), AvpLLM(max_tokens=64))
    answer = crew.kickoff(inputs={"question": question})

    print(answer)
    print(crew.usage_metrics)


if __name__ == "__main__":
    main()
