"""Reward room: groups to scored groups."""
