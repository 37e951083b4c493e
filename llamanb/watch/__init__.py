"""Watching a run: memory sampled in a thread, drawn and put into words by the training thread."""
