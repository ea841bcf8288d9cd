"""The models of the attention literature: one file per architecture, read top to bottom."""
