"""Training a model on text: data, learning rate, loop, checkpoints, curves."""
