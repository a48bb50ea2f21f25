"""The one error of the learner room that a user may see."""

from __future__ import annotations


class LearnerError(RuntimeError):
    """The learner cannot go on. One line that names the step or field and the fix."""
