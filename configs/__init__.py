"""Configs room: the schema of a run and complete example configs."""
