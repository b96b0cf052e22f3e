"""The name by which both sides know what is spoken over A2A."""

EXTENSION_URI = "urn:avp-agents:contexts:1"
"""Identifies the extension in cards, messages and the header ``A2A-Extensions``."""
