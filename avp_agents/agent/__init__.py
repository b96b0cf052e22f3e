"""One turn of an agent, for any framework: from messages and handles to an answer or a thought that is kept.

    turns      messages as a turn reads them, and what a message claims to stand for
    ladder     which rung each handle resolves to (kv, replay, rethink, text, lost), and why
    exchange   think, answer, or both; and how it went, as metadata
    steps      acts written once as generators, carried out in a thread or on an event loop

The integrations, the OpenAI-compatible endpoint and MCP take their turns here; what is theirs alone is how their
messages are read, and in what form an answer goes back.
"""
