"""One live vLLM engine."""
