"""KV caches of one layer: one for any attention function, and one for CUDA graphs.

train.GPT's attention layers call cache.attend(module, heads) instead of their attention function.
It stores the keys and values of new positions, and attends from these to all stored positions.
"""

import torch


class KVCache:
    """One layer's keys, values and other attention inputs, for up to `size` positions.

    If queries see only the last w positions of an input, it is stored in a ring buffer of w slots.
    Position t is in slot t % w. For w = 4, after position 5:   slots [4, 5, 2, 3]
    """

    def __init__(self, size):
        self.size = size
        self.length = 0  # positions stored so far
        self.tensors = None  # ring buffers (B, Hkv, w, D), one per input after q; made at first use

    def attend(self, module, heads):
        """Store T new positions and attend from q (B, H, T, D) to all stored -> (B, H, T, D)."""
        q, *new = heads
        return module.function(q, *self.extend(module.windows, new), **module.options)

    def extend(self, windows, new):
        """Store T new positions of each input; return what their queries may see of each.

        windows: window of each input, or None. new: the inputs, (B, Hkv, T, D) each.
        """
        start = self.length
        end = start + new[0].shape[2]
        if end > self.size:
            raise ValueError(f"the KV cache has room for {self.size} positions, not for {end}")
        if self.tensors is None:  # first use: allocate
            self.tensors = []
            for t, window in zip(new, windows):
                w = min(window or self.size, self.size)
                self.tensors.append(t.new_empty(t.shape[0], t.shape[1], w, t.shape[3]))

        visible = []
        for ring, t in zip(self.tensors, new):
            w = ring.shape[2]
            if end == start + 1:
                # one new position: its query sees every slot, so their order does not matter
                ring[:, :, start % w] = t[:, :, 0]
                visible.append(ring[:, :, : min(end, w)])
            else:
                # several: put all in order, old ones first, and keep the last w of them
                #     w = 4, new [6 7 8]: slots [4 5 2 3], in order [2 3 4 5 6 7 8], slots [8 5 6 7]
                past = torch.arange(max(0, start - w), start, device=t.device)
                kept = torch.arange(max(0, end - w), end, device=t.device)
                in_order = torch.cat([ring[:, :, past % w], t], dim=2)
                ring[:, :, kept % w] = in_order[:, :, -w:]
                visible.append(in_order)
        self.length = end
        return visible


class StaticKVCache:
    """A KV cache for softmax attention whose tensors never move or grow, as CUDA graphs need.

    length: positions stored so far, an int64 tensor (1,) on the device. The caller advances it. So
    a step launches the same kernels at every position.
    """

    def __init__(self, config, size, length, dtype):
        shape = (1, config.n_kv_head, size, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=length.device)
        self.v = torch.zeros_like(self.k)
        self.length = length

    def attend(self, module, heads):
        """Attend from one new token to all stored ones, or from a prompt, the first T tokens."""
        q, k, v = heads  # (1, H, T, D), (1, Hkv, T, D), (1, Hkv, T, D)
        T = q.shape[2]
        positions = self.length + torch.arange(T, device=q.device)
        self.k.index_copy_(2, positions, k)
        self.v.index_copy_(2, positions, v)
        if T > 1:
            return module.function(q, k, v, **module.options)

        # one query: compute scores for all `size` positions, and mask those after its own
        q = q.squeeze(2).unflatten(1, (k.shape[1], -1))  # (1, Hkv, H / Hkv, D)
        scores = q @ self.k.transpose(2, 3) * q.shape[-1] ** -0.5  # (1, Hkv, H / Hkv, size)
        is_future = torch.arange(self.k.shape[2], device=q.device) > self.length
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        p = scores.masked_fill(is_future, -torch.inf).softmax(-1).to(q.dtype)
        return (p @ self.v).flatten(1, 2).unsqueeze(2)  # (1, H, 1, D)
