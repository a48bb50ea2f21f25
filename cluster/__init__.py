"""Cluster room: the only one that knows Ray and all rooms."""
