"""Match3 solved by one head of 2-simplicial attention, with weights set by hand.

Is there a pair (j, k), j, k <= i, with x_i + x_j + x_k = 0 modulo M?
"""

import math

import torch

from simplicial import attention


def match3(x, M):
    """Solve Match3 by trying all pairs. x (B, T) -> (B, T) bool"""
    T = x.shape[1]
    x_i = x[:, :, None, None]  # (B, T, 1, 1)
    x_j = x[:, None, :, None]  # (B, 1, T, 1)
    x_k = x[:, None, None, :]  # (B, 1, 1, T)
    is_match = (x_i + x_j + x_k) % M == 0  # (B, T, T, T)

    # a query i sees the keys j <= i and k <= i
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    is_match = is_match & causal[:, :, None] & causal[:, None, :]
    return is_match.flatten(-2).any(-1)


def match3_by_hand(x, M, function=attention):
    """Solve Match3 with one head of width 5 and weights set by hand. x (B, T) -> (B, T) bool

    Each number x becomes an angle 2 pi x / M. The logit of a pair with angles b and c, for a query
    with angle a, is beta cos(a + b + c), which is largest for a match. It is a trilinear form:

        cos(a + b + c) =   cos a cos b cos c - cos a sin b sin c
                         - sin a cos b sin c - sin a sin b cos c

    A blank token comes first. The pair (blank, blank) has the logit of a match and the value 0; all
    other pairs have the value 1. So the output is about n / (n + 1) with n matches, and 0 without.
    """
    B, T = x.shape
    angle = 2 * math.pi / M * x
    cos = angle.cos()
    sin = angle.sin()
    one = torch.ones_like(cos)
    zero = torch.zeros_like(cos)

    def with_blank(*channels, blank):
        """Stack 5 channels (B, T) each, and put the blank token (5) before the others."""
        tokens = torch.stack(channels, -1)  # (B, T, 5)
        first = torch.tensor(blank).to(tokens).expand(B, 1, 5)
        return torch.cat([first, tokens], 1)[:, None]  # (B, 1, 1 + T, 5)

    # inverse temperature: large enough that all pairs without a match together weigh at most a
    # tenth of one match
    beta = math.log(10 * (T + 1) ** 2) / (1 - math.cos(2 * math.pi / M))

    # four channels for the four products of the form above, and a fifth for (blank, blank) alone
    blank = [0.0, 0.0, 0.0, 0.0, 1.0]
    q = with_blank(cos, cos, sin, sin, one, blank=blank) * beta * 5**0.5  # undo 1 / sqrt(D), D = 5
    k = with_blank(cos, -sin, -cos, -sin, zero, blank=blank)
    k2 = with_blank(cos, sin, sin, cos, zero, blank=blank)
    v = with_blank(one, one, one, one, one, blank=[0.0] * 5)  # v2 is the same
    out = function(q, k, v, k2, v, w1=T + 1, w2=T + 1)  # (B, 1, 1 + T, 5); windows of all tokens
    return out[:, 0, 1:, 0] > 0.4  # about 1 / 2 or more with a match, at most 0.1 without


def score_by_hand():
    """Return the accuracy of the weights set by hand for several M and T."""
    generator = torch.Generator().manual_seed(0)
    accuracies = {}
    for M, T in (16, 6), (64, 12), (256, 20), (997, 30):
        x = torch.randint(M, (64, T), generator=generator)
        is_right = match3_by_hand(x, M) == match3(x, M)
        accuracies[f"M={M}, T={T}"] = is_right.float().mean().item()
    return accuracies
