"""What the papers' ideas are compared with: --attn experiments.controls:tau=2 and so on."""

import torch
import torch.nn.functional as F

import laser
from sonew import SONew
from train import softmax_attention


def attention(q, k, v, *, tau=0.0, gelu=False, window=0):
    """Softmax attention with one change; shapes as in train.softmax_attention.

    tau: attend over exp(v / tau), and take tau times the log: LASER with a temperature; 0: no exp.
    gelu: a pointwise nonlinearity after it. window: see the last `window` positions; 0: all.
    """
    if tau:
        return tau * laser.attention(q, k, v / tau)
    out = window_attention(q, k, v, window) if window else softmax_attention(q, k, v)
    return F.gelu(out) if gelu else out


def window_attention(q, k, v, window):
    """Softmax attention to the last `window` positions, the query's own included."""
    positions = torch.arange(k.shape[2], device=q.device)
    distance = positions[-q.shape[2] :, None] - positions  # (Tq, Tk)
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])


def optimizer(groups, lr, *, name="muon"):
    """Build an optimizer for groups of matrices, the embedding first, and of gains.

    name: "muon" (torch.optim.Muon, with AdamW for the embedding and the gains), "shuffled" (SONew,
    whose chains go through each row in a random order) or, for the adapters of LoRA, "lora_plus".
    """
    if name == "muon":
        return MuonAdamW(groups, lr)
    if name == "shuffled":
        return ShuffledSONew(groups, lr, (0.9, 0.95))
    if name == "lora_plus":
        return LoRAPlus(groups, lr)
    raise ValueError(f"the optimizer {name!r} is unknown; give muon, shuffled or lora_plus")


class LoRAPlus(torch.optim.AdamW):
    """AdamW with a larger rate for each B than for each A (Hayou et al., arXiv 2402.12354)."""

    def __init__(self, groups, lr, ratio=16.0):
        sides = []  # the parameters of each group are A, B, A, B, ...
        for group in groups:
            sides.append({**group, "params": group["params"][::2], "ratio": 1.0})
            sides.append({**group, "params": group["params"][1::2], "ratio": ratio})
        super().__init__(sides, lr, fused=True)

    def step(self):
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates):
            group["lr"] = rate * group["ratio"]
        super().step()
        for group, rate in zip(self.param_groups, rates):
            group["lr"] = rate


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices but the embedding; AdamW for all others. Both at AdamW's rate."""

    def __init__(self, groups, lr):
        matrices, vectors = groups
        embedding, *hidden = matrices["params"]
        weight_decay = matrices["weight_decay"]
        rate = {"lr": lr, "weight_decay": weight_decay}
        self.muon = torch.optim.Muon(hidden, **rate, adjust_lr_fn="match_rms_adamw")
        others = [{**matrices, "params": [embedding]}, vectors]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), fused=True)
        super().__init__([p for group in groups for p in group["params"]], {"lr": lr})

        # the two share the state and the groups of this one
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self.muon.state = self.state
        self.adamw.state = self.state

    def step(self):
        self.muon.step()
        self.adamw.step()


class ShuffledSONew(SONew):
    """SONew on matrices whose columns are in a random order, so that no neighbours are related."""

    def __init__(self, groups, *options):
        super().__init__(groups, *options)
        self.orders = {}  # {matrix: order of its columns}, made here: a captured step cannot copy
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() > 1:
                    generator = torch.Generator().manual_seed(p.shape[1])
                    order = torch.randperm(p.shape[1], generator=generator)
                    self.orders[p] = order.to(p.device)

    @torch.no_grad()
    def step(self):
        for p, order in self.orders.items():
            p.copy_(p[:, order])
            p.grad.copy_(p.grad[:, order])
        super().step()
        for p, order in self.orders.items():
            p.copy_(p[:, order.argsort()])
