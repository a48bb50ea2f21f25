"""The models that are trained, from hidden states to loss and export."""
