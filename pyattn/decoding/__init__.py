"""Turning a model's next-token logits into text."""
