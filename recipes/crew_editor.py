"""Three researchers think at once, and an editor writes on top of all three thoughts.

    python recipes/crew_editor.py "a bicycle for the city"

The researchers are asynchronous tasks and run in one batch. Their contexts are joined into one for the editor; what
``join_strategy`` means for quality and speed is told in ``avp_agents.engine.join``.
"""

import sys

from crewai import Agent, Crew, Task
from crewai.llms.base_llm import BaseLLM

from avp_crewai import AvpLLM

ASPECTS = ("what it is used for", "what it costs", "what goes wrong with it")


def build_crew(researcher_llms: list[BaseLLM], editor_llm: BaseLLM) -> Crew:
    research = []
    for aspect, llm in zip(ASPECTS, researcher_llms, strict=True):
        researcher = Agent(role="Researcher", goal=f"Know {aspect}", backstory="You are thorough.", llm=llm)
        description = f"Think about {{subject}}: {aspect}."
        task = Task(description=description, expected_output="What matters.", agent=researcher, async_execution=True)
        research.append(task)
    editor = Agent(role="Editor", goal="Write short advice", backstory="You are clear.", llm=editor_llm)
    write = Task(
        description="Advise somebody who wants to buy {subject}.",
        expected_output="Three sentences.",
        agent=editor,
        context=research,
    )
    return Crew(agents=[*(task.agent for task in research if task.agent), editor], tasks=[*research, write])


def main() -> None:
    subject = " ".join(sys.argv[1:]) or "a bicycle for the city"
    researchers: list[BaseLLM] = [AvpLLM(mode="latent", latent_steps=10) for _ in ASPECTS]
    crew = build_crew(researchers, AvpLLM(max_tokens=96, join_strategy="replay"))
    advice = crew.kickoff(inputs={"subject": subject})

    for task in crew.tasks[:-1]:
        print(task.output)
    print(advice)


if __name__ == "__main__":
    main()
