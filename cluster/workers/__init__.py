"""The run's actors on Ray: where they are placed, how they are called and replaced."""
