"""Tensor functions. Imports torch and optional kernel compilers only."""
