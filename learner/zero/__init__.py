"""Models under DeepSpeed's ZeRO-3."""
