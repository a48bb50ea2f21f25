"""Rollout room: data set rows to prompts, prompts to groups."""
