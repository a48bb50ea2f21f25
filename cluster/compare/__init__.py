"""Runs and models side by side: `grao compare` and `grao evaluate`."""
