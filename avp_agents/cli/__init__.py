"""The command line: ``avp-agents demo | doctor | bench``.

Commands import torch, transformers and the engine when they run, so that ``--help`` answers at once.
"""

from avp_agents.cli.app import app

__all__ = ["app"]
