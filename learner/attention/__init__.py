"""Attention in which a group's answers share their prompt."""
