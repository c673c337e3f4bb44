"""`InputCache`: the attention's input is kept instead of keys and values."""

from contextlm.compress.input_cache.install import InputCache as InputCache
