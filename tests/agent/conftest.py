"""What the agent's tests share."""

from doubles.hosts import world, worlds

__all__ = ["world", "worlds"]
