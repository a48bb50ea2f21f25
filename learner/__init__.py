"""Learner room: scored groups to updates, updates to published parameters."""
