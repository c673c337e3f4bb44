"""Tensor functions, a folder an op: the naive form (the truth), the fast forms, the choice.

Names of tensors end in a letter for each dimension, the same everywhere in contextlm:

    B  rows of a batch                          D  width of the stream (the model's)
    T  new tokens, or tokens of a window        C  width of a context, channels of a recurrence
    S  entries kept and new: what is attended   E  width of a head
    K  entries kept from before                 H  heads of queries (or of a state)
    M  entries that one query reads             G  heads of keys and values
    P  positions of a whole stream              V  entries of the vocabulary
    N  positions of a batch of it               L  layers of a block
    U  distinct tokens of a stream              W  tokens of a window

A 1 stands for a dimension of one, and a file that needs another letter says so at its top.
"""
