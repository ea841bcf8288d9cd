"""Modules built on `pyattn.attention`."""
