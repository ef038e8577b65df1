"""Clamp weights → files that anyone can load."""

from export.checkpoint import CheckpointPlan, plan_checkpoint, write_checkpoint

__all__ = ["CheckpointPlan", "plan_checkpoint", "write_checkpoint"]
