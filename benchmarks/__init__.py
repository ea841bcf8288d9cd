"""Attention side by side with its peers: the same cases, peers and clock for the CPU, the GPU and pytest-benchmark."""
