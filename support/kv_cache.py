"""KV caches of one layer: one for any attention function, and one for CUDA graphs.

With a cache, attention modules of train.GPT call cache.attend(module, heads) instead of their
attention function. It stores the keys and values of new positions, and returns the attention of
these positions to all that are stored.
"""

import torch


class KVCache:
    """One layer's keys, values and other attention inputs, for up to `size` positions.

    An input that is only seen through a window of w positions uses a ring buffer of w slots, with
    position t in slot t % w. For example, for w = 4 after the positions 0 to 5:

        slot       0  1  2  3
        position   4  5  2  3
    """

    def __init__(self, size):
        self.size = size
        self.length = 0
        self.tensors = None  # one (B, Hkv, w, D) per input after q, allocated at first use

    def attend(self, module, heads):
        """Return the attention of T new positions, (B, H, T, D), to the cache and themselves.

        heads: q (B, H, T, D), and the other inputs of the attention function, (B, Hkv, T, D) each.
        """
        q, *new = heads
        return module.function(q, *self.extend(module.windows, new), **module.options)

    def extend(self, windows, new):
        """Store new (B, Hkv, T, D) for each input. Return for each what the T queries may see."""
        start = self.length
        end = start + new[0].shape[2]
        if end > self.size:
            raise ValueError(f"the KV cache has room for {self.size} positions, not for {end}")
        if self.tensors is None:
            self.tensors = []
            for t, window in zip(new, windows):
                w = min(window or self.size, self.size)
                self.tensors.append(t.new_empty(t.shape[0], t.shape[1], w, t.shape[3]))

        visible = []
        for ring, t in zip(self.tensors, new):
            w = ring.shape[2]
            if end == start + 1:
                # one query sees all slots; attention does not depend on their order
                ring[:, :, start % w] = t[:, :, 0]
                visible.append(ring[:, :, : min(end, w)])
            else:
                # several queries see the last w past positions, in order, and then the new ones;
                # the last w of all these stay in the ring
                past = torch.arange(max(0, start - w), start, device=t.device)
                kept = torch.arange(max(0, end - w), end, device=t.device)
                in_order = torch.cat([ring[:, :, past % w], t], dim=2)
                ring[:, :, kept % w] = in_order[:, :, -w:]
                visible.append(in_order)
        self.length = end
        return visible


class StaticKVCache:
    """A KV cache for softmax attention whose tensors never move or grow, as CUDA graphs need.

    length: int64 tensor (1,) on the device, the number of tokens in the cache. The caller counts
    them there, so a step is the same work at every position.
    """

    def __init__(self, config, size, length, dtype):
        shape = (1, config.n_kv_head, size, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=length.device)
        self.v = torch.zeros_like(self.k)
        self.length = length

    def attend(self, module, heads):
        """Return the attention of one token to the cache, or of a first prompt to itself."""
        q, k, v = heads  # (1, H, T, D), (1, Hkv, T, D), (1, Hkv, T, D)
        T = q.shape[2]
        positions = self.length + torch.arange(T, device=q.device)
        self.k.index_copy_(2, positions, k)
        self.v.index_copy_(2, positions, v)
        if T > 1:
            return module.function(q, k, v, **module.options)

        # compare the query with every position in the cache, and mask those after its own
        q = q.squeeze(2).unflatten(1, (k.shape[1], -1))  # (1, Hkv, H / Hkv, D)
        scores = q @ self.k.transpose(2, 3) * q.shape[-1] ** -0.5  # (1, Hkv, H / Hkv, size)
        is_future = torch.arange(self.k.shape[2], device=q.device) > self.length
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        p = scores.masked_fill(is_future, -torch.inf).softmax(-1).to(q.dtype)
        return (p @ self.v).flatten(1, 2).unsqueeze(2)  # (1, H, 1, D)
