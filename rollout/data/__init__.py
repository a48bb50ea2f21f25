"""Rows of a data set to prompts."""
