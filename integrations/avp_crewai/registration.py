"""Teaching CrewAI's checkpoints to bring an AvpLLM back."""

from __future__ import annotations

from crewai.agents.agent_builder import base_agent

LLM_TYPE = "avp"
"""What CrewAI's checkpoints call an `AvpLLM`."""


def register_crewai_llm() -> None:
    """Let CrewAI restore agents whose LLM is an `AvpLLM`. Call it before ``Crew.from_checkpoint``; again does no harm.

    A checkpoint holds the LLM's options, never weights or contexts: the restored LLM looks its engine up by them. An
    engine that was passed as ``AvpLLM(engine=...)`` is not in the checkpoint; assign it again (``agent.llm.engine``).

    CrewAI has no public way to register an LLM class, so this adds a line to the table of its own.
    """
    base_agent._LLM_TYPE_REGISTRY[LLM_TYPE] = "avp_crewai.llm.AvpLLM"
