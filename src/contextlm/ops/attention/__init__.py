"""Attention of a new token to what is kept of earlier ones, in one compiled call (`step`).

The plain form, for any number of tokens, is the mixers' own (`models.hybrid.window` and others),
through whichever function of attention is configured.
"""
