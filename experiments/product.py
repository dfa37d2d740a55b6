"""The product of two softmax attentions, to compare 2-simplicial attention with."""

from experiments.controls import window_attention


def attention(q, k, v, k2, v2, *, w1=128, w2=16):
    """2-simplicial attention with the sum of two logits, instead of a trilinear one, for a pair."""
    return window_attention(q, k, v, w1) * window_attention(q, k2, v2, w2)


attention.rotary = ()  # as in 2-simplicial attention
