"""One run: its loop, queue, state and checkpoints."""
