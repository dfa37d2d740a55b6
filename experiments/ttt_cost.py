"""The cost of query-only training: FLOPs, the tokens of thinking that cost the same, memory.

A multiply-add counts as two FLOPs; norms, softmax and the embedding lookup are left out.
"""

import bisect
import os

import torch


def count_weights(model):
    """Return how many numbers are in all matrices that a token is multiplied with."""
    output_layer = model.embed_tokens.weight.numel()  # tied or not
    return output_layer + sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)


def head_width(model):
    """Return the width of all heads together, over all layers that have attention logits."""
    attending = [getattr(x.self_attn.function, "has_logits", True) for x in model.layers]
    return model.config.n_head * model.config.head_dim * sum(attending)


def flops_of_tokens(model, T, n):
    """Return the FLOPs to generate n tokens after T; each sees all before it and itself."""
    n_keys = n * T + n * (n + 1) // 2
    return 2 * n * count_weights(model) + 4 * head_width(model) * n_keys


def flops_of_spans(model, n_tokens, T):
    """Return the FLOPs to train W_Q on n_tokens of spans, forward and backward, in a text of T.

    A token sees half the text on average.
    """
    n_layer = model.config.n_layer
    attention = model.layers[0].self_attn
    kv = n_layer * (attention.k_proj.weight.numel() + attention.v_proj.weight.numel())
    used = count_weights(model) - kv  # keys and values come from the cache

    # linear layers: forward, and gradients of the inputs, but for the first W_Q; gradients of W_Q
    first_q = attention.q_proj.weight.numel()
    linear = 2 * used + 2 * (used - first_q) + 2 * n_layer * first_q

    # attention: scores and outputs forward; scores, dp and dq backward
    n_keys = n_tokens * (T + 1) // 2
    return n_tokens * linear + (4 + 6) * head_width(model) * n_keys


def thinking_tokens(model, T, flops):
    """Return how many tokens can be generated after T for at most so many FLOPs."""
    most = int(flops // flops_of_tokens(model, T, 1))  # each later token costs more than the first
    counts = range(1, most + 1)
    return bisect.bisect_right(counts, flops, key=lambda n: flops_of_tokens(model, T, n))


def check_memory(model, n_tokens, n_span_tokens):
    """Raise ValueError if the memory is too small for a prompt, and spans of so many tokens a step.

    An estimate: keys, values and, of one layer at a time, activations of the prompt; activations of
    the spans in every layer, for the backward pass.
    """
    c = model.config
    kv = 2 * c.n_layer * c.n_kv_head * c.head_dim
    activations = 4 * c.n_embd + 3 * c.n_hidden + 3 * c.n_head * c.head_dim
    numbers = n_tokens * (kv + activations) + n_span_tokens * c.n_layer * activations
    needed = numbers * model.dtype.itemsize
    free = free_bytes(model.embed_tokens.weight.device)
    if needed > free:
        raise ValueError(
            f"{n_tokens} tokens take about {needed / 2**30:.1f} GB, but only {free / 2**30:.1f} GB "
            f"are free; give a shorter text or a smaller --batch-spans"
        )


def free_bytes(device):
    """Return the free memory of a GPU, or all memory of the machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
