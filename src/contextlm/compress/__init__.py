"""Smaller caches for models that are trained already: a policy a file, known by its import here."""

from contextlm.compress import checkpoint as checkpoint
from contextlm.compress import evict as evict
from contextlm.compress import full as full
from contextlm.compress import inputs as inputs
from contextlm.compress import interval as interval
from contextlm.compress import latent as latent
from contextlm.compress import quantised as quantised
from contextlm.compress import representatives as representatives
from contextlm.compress import window as window
