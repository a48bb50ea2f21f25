"""Seeds that are the same on every machine and in every Python."""

from __future__ import annotations

MASK = 2**64 - 1


def sample_seed(group_seed: int, index: int) -> int:
    """32-bit seed of sample `index` in a group.

    A step of the splitmix64 generator (Steele, Lea and Flood, 2014), its halves folded together: neighbouring group
    seeds and indices give unrelated seeds.
    """
    mixed = (group_seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    mixed ^= mixed >> 31
    return (mixed ^ (mixed >> 32)) & 0xFFFFFFFF
