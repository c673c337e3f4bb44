"""Smaller caches for models that are trained already."""
