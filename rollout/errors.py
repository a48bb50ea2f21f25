"""Errors that leave the rollout room. Each is one line, survives pickling, and drags no engine's class along."""

from __future__ import annotations


class EngineDead(RuntimeError):
    """The engine is gone or can no longer be trusted with its parameters: replace the worker."""


class RolloutError(RuntimeError):
    """The engine lives, but this call failed. The line names the setting or the prompt."""


class ParametersRefused(RuntimeError):
    """A published version is torn, foreign, of another version or out of reach. The old version stays live."""
