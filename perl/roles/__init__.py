"""The roles in alignment on one frozen base: their weights and forward passes.

Axis letters, with which names of tensors end in the whole package:

    B  completions, or rows that are scored      D  hidden dimension
    P  positions of a prompt                     V  tokens of the vocabulary
    T  positions of a completion                 N  tokens of a batch, flattened
    L  P + T, all positions of a row

A 1 is an axis of length 1; a lower-case letter is a part of an axis, such as n of the N tokens.
"""
