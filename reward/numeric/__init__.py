"""The numeric reward: the result of a text, its value, and when two values are equal."""
