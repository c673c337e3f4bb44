"""Corpora, tokenizers, token stores and windows. Imports nothing of the other rooms."""
