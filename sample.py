"""Stand-in until sample.py arrives: KV caches and where a text begins."""

import torch


class KVCache:
    """One layer's keys and values; sliding-window tensors use a ring buffer."""

    def __init__(self, size):
        self.size = size
        self.length = 0
        self.tensors = None

    def attend(self, module, heads):
        q, *new = heads
        sizes = [min(w or self.size, self.size) for w in module.windows]
        if self.tensors is None:
            self.tensors = [
                t.new_empty(*t.shape[:2], w, t.shape[3]) for t, w in zip(new, sizes)
            ]
        start = self.length
        T = q.shape[2]
        self.length += T
        seen = []
        for old, t, w in zip(self.tensors, new, sizes):
            if T == 1:
                old[:, :, start % w] = t[:, :, 0]
                seen.append(old[:, :, : min(self.length, w)])
                continue
            before, after = (
                torch.arange(max(0, end - w), end, device=t.device) % w
                for end in (start, self.length)
            )
            seen.append(torch.cat([old[:, :, before], t], 2))
            old[:, :, after] = seen[-1][:, :, -len(after) :]
        return module.function(q, *seen, **module.options)


def first_ids(tokenizer):
    return getattr(tokenizer, "start", None) or [tokenizer.eot_token]
