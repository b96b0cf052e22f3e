"""A Flow with a latent step: its state holds the thought as a handle, and another process can go on from it.

    python recipes/crew_flow.py "What is 24 * 17 + 3?"
    python recipes/crew_flow.py "And times two?" FLOW-ID      # continues that flow's thought

The handle is plain JSON in the flow's persisted state; the context itself stays in the context store on disk.
"""

import sys
from typing import Any

from crewai.flow.flow import Flow, FlowState, listen, start
from crewai.flow.persistence import persist
from crewai.llms.base_llm import BaseLLM

from avp_crewai import AvpLLM, handover


class State(FlowState):
    question: str = ""
    thought: dict[str, Any] | None = None
    answer: str = ""


@persist()
class LatentFlow(Flow[State]):
    def __init__(self, thinker: BaseLLM, solver: BaseLLM) -> None:
        super().__init__()
        self._thinker, self._solver = thinker, solver

    @start()
    def think(self) -> None:
        if self.state.thought is not None:
            return
        with handover(scope=self.state.id) as made:
            self._thinker.call(f"Analyze the question: {self.state.question}")
        assert made.handle is not None
        self.state.thought = dict(made.handle.to_state())

    @listen(think)
    def solve(self) -> str:
        with handover(self.state.thought, scope=self.state.id):
            self.state.answer = self._solver.call(f"Answer: {self.state.question}")
        return self.state.answer


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else "A shop sells pens at 3 dollars each. How much do 14 pens cost?"
    flow = LatentFlow(AvpLLM(mode="latent", latent_steps=20), AvpLLM(max_tokens=48))
    flow_id = {"id": sys.argv[2]} if len(sys.argv) > 2 else {}
    answer = flow.kickoff(inputs={"question": question, **flow_id})

    print(f"flow {flow.state.id}, thought {flow.state.thought}")
    print(answer)


if __name__ == "__main__":
    main()
