"""The cost of query-only training: FLOPs, the tokens of thinking that cost the same, memory.

A multiply-add counts as two FLOPs; norms, softmax and the embedding lookup are left out.
"""

import bisect
import os

import torch


def count_weights(model):
    """Return the number of weights in matrix products: all layers and the output layer."""
    output_layer = model.embed_tokens.weight.numel()  # the same size, tied or not
    return output_layer + sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)


def head_width(model):
    """Return the total width of the query heads in all layers.

    Layers do not count if their attention function has no product of queries and keys.
    """
    functions = [layer.self_attn.function for layer in model.layers]
    n_layer = sum(getattr(function, "has_logits", True) for function in functions)
    return n_layer * model.config.n_head * model.config.head_dim


def flops_of_tokens(model, T, n):
    """Return the FLOPs to generate n tokens after T, each with attention to all up to itself."""
    n_keys = n * T + n * (n + 1) // 2  # sum of T + 1, ..., T + n
    return 2 * n * count_weights(model) + 4 * head_width(model) * n_keys


def flops_of_spans(model, n_tokens, T):
    """Return the FLOPs to train W_Q on spans of n_tokens in total, forward and backward.

    T: tokens of the prompt. A token of a span attends to half of them on average.
    """
    n_layer = model.config.n_layer
    attention = model.layers[0].self_attn
    w_q = attention.q_proj.weight.numel()
    w_kv = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    used = count_weights(model) - n_layer * w_kv  # keys and values come from the cache

    # linear layers, per token
    forward = 2 * used
    backward = 2 * (used - w_q)  # gradients of inputs; that of the first W_Q is not needed
    backward += 2 * n_layer * w_q  # gradients of the W_Q

    # attention, per key: scores and outputs forward (4); scores, dp and dq backward (6)
    n_keys = n_tokens * (T + 1) // 2
    return n_tokens * (forward + backward) + (4 + 6) * head_width(model) * n_keys


def thinking_tokens(model, T, flops):
    """Return the largest number of tokens that can be generated after T with these FLOPs."""
    upper_limit = int(flops // flops_of_tokens(model, T, 1))  # the first token costs least
    counts = range(1, upper_limit + 1)
    # binary search, because flops_of_tokens grows with the count
    return bisect.bisect_right(counts, flops, key=lambda n: flops_of_tokens(model, T, n))


def check_memory(model, n_tokens, n_span_tokens):
    """Raise ValueError if there is too little memory for a prompt of n_tokens and for the training.

    n_span_tokens: the tokens of all spans of a step. The memory needed is an estimate.
    """
    # numbers per token
    c = model.config
    kv = 2 * c.n_layer * c.n_kv_head * c.head_dim  # keys and values in all layers
    activations = 4 * c.n_embd + 3 * c.n_hidden + 3 * c.n_head * c.head_dim  # in one layer

    # the prompt runs through one layer at a time; spans keep all layers for the backward pass
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
