"""The roles of alignment on one frozen base: who computes, and with what.

Axis letters, which end the names of tensors in the whole package:

    B  completions, or rows that are scored      D  hidden states
    P  positions of a prompt                     V  tokens of the vocabulary
    T  positions of a completion                 N  tokens of a batch, flattened
    L  P + T, all positions of a row

A 1 is an axis of that length; a small letter is a part of the axis, such as n of the N tokens.
"""
