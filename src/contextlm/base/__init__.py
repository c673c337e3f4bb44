"""Errors, files, locks, interrupts, progress, devices: what knows nothing of language models."""
