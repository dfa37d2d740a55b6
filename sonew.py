"""SONew: a sparsified online Newton optimizer (Devvrit, Duvvuri, Anil, Gupta, Hsieh and Dhillon, NeurIPS 2023, arXiv 2311.10085).

A full second-order method would precondition a tensor's n gradients with the inverse of their n x n statistics S = E[g g^T].
SONew keeps S on the diagonal and b diagonals beside it, S_k[i] = E[g_i g_{i+k}], and takes the X that is nearest to an inverse of S
among those that vanish outside that band, by the LogDet divergence:

    minimise  tr(X S) - log det X   over X > 0 banded           so that X^-1 = S on the band (maximum-determinant completion)

On a chain the minimiser has a closed form, in which each coordinate meets its b next neighbours and nothing is sequential:

    psi_i = W_i^-1 c_i,   s_i = S_0[i] - psi_i . c_i            W_i: S on i+1 ... i+b,  c_i: between i and these
    X = L diag(1/s) L^T,  L[i+k, i] = -psi_i[k]                 step  u = X m,  m the momentum

s_i is what is left of coordinate i once its neighbours have explained it. Where it is next to nothing, or a neighbour is itself
explained by the nearer ones (at most gamma of its own S_0), the edge is removed (the paper's Algorithm 3): X stays positive definite
whatever the gradients, and so does the diagonal case b = 0, which is m / S_0, Adam without its square root. The length of the step is
Adam's, tensor by tensor ("grafting"), because u is in units of 1 / gradient. Biases and gains take Adam's step as it is.

What differs from the released code: Adam's variance in the graft is bias-corrected too (their first step is 1 / sqrt(1 - beta2) times too
long), a zero gradient gives no 0/0, the test for an edge is relative, the chains end with the rows of a matrix (chain="flat": with
the tensor, as released), which leaves them whole when rows are sharded, and a gradient that is not finite is counted, not spread.

    python sonew.py                 the LogDet problem drawn, an autoencoder of MNIST -> results/sonew-cpu.*
    python sonew.py --sweep         how its settings were found
    python train.py --optim sonew   train with it
"""
import math, sys
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

try:
    from kernels import sonew as kernel
except ModuleNotFoundError as e:                                     # macOS and Windows: PyTorch does it all
    if e.name != "triton":
        raise
    kernel = None


def ahead(x, k):                                                     # (R, C) -> x[:, i + k], 0 past the end of the chain
    return F.pad(x[:, k:], (0, min(k, x.shape[1])))


def behind(x, k):                                                    # (R, C) -> x[:, i - k], 0 before its beginning
    return F.pad(x[:, :max(0, x.shape[1] - k)], (min(k, x.shape[1]), 0))


def reference(S, m):
    """X and X m by dense algebra, any dtype, for one chain: S, b+1 diagonals (n) as above, m (n) -> X (n, n), u (n). The completion of a
    banded matrix is known from graphical models: X is the sum of the inverses of S over all windows of b+1 neighbours, each padded
    with zeros, less those over the b that consecutive windows share."""
    b, n = min(len(S), len(m)) - 1, len(m)
    full = sum((torch.diag(S[k][:n - k], k) + torch.diag(S[k][:n - k], -k)) / (2 if k == 0 else 1) for k in range(b + 1))   # (n, n)
    X = torch.zeros_like(full)
    for i in range(n - b):
        for sign, window in ((1, slice(i, i + b + 1)), (-1, slice(i + 1, i + b + 1))):
            if sign == 1 or i + b + 1 < n:
                X[window, window] += sign * torch.linalg.inv(full[window, window])
    return X, X @ m


def solve(W, c, d, s, gamma):
    """psi = W^-1 c and s - psi . c, elementwise over (R, C), by eliminating the nearest neighbour and solving for the rest. W: the lower
    triangle, row after row; c: the right-hand side; d: the diagonal before any elimination. A neighbour of which no more than
    gamma d is left is linearly dependent on the nearer ones: its edge is removed."""
    if not c:
        return [], s
    pivot, *column = (W[p][0] for p in range(len(c)))
    inverse = torch.where(pivot > gamma * d[0], 1 / pivot, 0)
    L = [w * inverse for w in column]
    rest = [[w - l * v for w, v in zip(row[1:], column)] for row, l in zip(W[1:], L)]
    psi, s = solve(rest, [y - l * c[0] for y, l in zip(c[1:], L)], d[1:], s - c[0] * (c[0] * inverse), gamma)
    return [c[0] * inverse - sum(l * x for l, x in zip(L, psi)), *psi], s


def factor(S, gamma):
    """S, list of b+1 (R, C) statistics of R chains of length C -> psi, list of b (R, C), and s (R, C), with edges removed."""
    b = len(S) - 1
    W = [[ahead(S[p - q], q) for q in range(1, p + 1)] for p in range(1, b + 1)]
    psi, s = solve(W, S[1:], [row[-1] for row in W], S[0], gamma)
    keep = s > gamma * S[0]
    return [torch.where(keep, x, 0) for x in psi], torch.where(keep, s, S[0])


def precondition(m, psi, s):
    """u = L diag(1/s) L^T m, all (R, C). Where s = 0 no gradient ever was, and u = 0."""
    w = torch.where(s > 0, (m - sum(x * ahead(m, k) for k, x in enumerate(psi, 1))) / s, 0)
    return w - sum(behind(x * w, k) for k, x in enumerate(psi, 1))


def update(g, m, S, t, beta1, beta2, eps, gamma, graft_eps):
    """Step t = 1, 2, ... of the statistics and its direction. g, m (R, C): gradient and momentum of R chains; S, list of b+1 (R, C); t, a
    tensor () -> m, S, new; u (R, C), preconditioned; a (R, C), Adam's step; how many gradients are too large to square or not
    finite: these count as 0."""
    good = (g * g).isfinite()
    g = torch.where(good, g, 0)
    m = beta1 * m + (1 - beta1) * g
    S = [beta2 * s + (1 - beta2) * (g * ahead(g, k)) for k, s in enumerate(S)]
    correct = [-1 / torch.expm1(t * math.log(beta)) if beta else 1 for beta in (beta1, beta2)]           # 1 / (1 - beta^t)
    mh, Sh = m * correct[0], [s * correct[1] for s in S]
    u = precondition(mh, *factor([Sh[0] + eps, *Sh[1:]], gamma))
    return m, S, u, mh / (Sh[0].sqrt() + graft_eps), (~good).sum()


class Work(NamedTuple):
    """A parameter's part in a step: what is on this device, contiguous."""
    p: torch.Tensor
    g: torch.Tensor                                                  # its gradient; the kernel leaves u in its place
    m: torch.Tensor
    S: list                                                          # b+1 statistics
    step: torch.Tensor                                               # (), float32 on the device: nothing waits for it
    skipped: torch.Tensor                                            # (), steps that its gradients spoiled
    chain: int                                                       # length of a chain


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def shards(p, chain):
    """The groups of processes over which a parameter is spread (FSDP2), each process with whole chains."""
    if not isinstance(p, DTensor):
        return ()
    cut = [(dim, place) for dim, place in enumerate(p.placements) if place.is_shard()]
    if p.dim() > 1 and cut and (chain == "flat" or any(place.dim for _, place in cut)):
        raise ValueError("a chain would be cut: parameters can be sharded by rows with chain='row', and not otherwise")
    return tuple(p.device_mesh.get_group(dim) for dim, _ in cut)


def total(groups, x):                                                # sums over the shards of a tensor
    for group in groups:
        dist.all_reduce(x, group=group)


@cache
def warn_slow():
    print("there is no Triton here, so SONew takes PyTorch's slower way (pip install triton)", file=sys.stderr)


class SONew(torch.optim.Optimizer):
    """params, lr, betas as Adam's; eps is added to S_0, in units of gradient^2: where |g| is below sqrt(eps) the step is momentum's.

    band          neighbours b, 0 to 4: 0 diagonal, 1 tridiagonal; state of b + 2 tensors like the parameter
    gamma         an edge goes where the Schur complement is at most gamma S_0 (with bf16_state: at least 2^-7, its rounding)
    graft         "adam": each tensor's step has the length of Adam's, with graft_eps in it; "none": u as it is, lr in gradient^2
    chain         "row": one chain per row, p[i].flatten(); "flat": one through the whole tensor
    weight_decay  decoupled, p -= lr weight_decay p
    bf16_state    keep momentum and statistics in bfloat16; else float32 (float64 for float64 parameters)

    Nothing waits for the device. A gradient that is not finite, or whose square is not, counts as 0 in the statistics and holds its
    tensor still for that step, which state["skipped"] counts. On CUDA .grad holds u after the step.
    ValueError: an option out of range, or a parameter sharded other than by rows."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, *, band=1, gamma=1e-6, graft="adam", graft_eps=1e-8, chain="row",
                 weight_decay=0.0, bf16_state=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, band=band, gamma=gamma, graft=graft, graft_eps=graft_eps,
                                      chain=chain, weight_decay=weight_decay, bf16_state=bf16_state))

    def add_param_group(self, group):
        super().add_param_group(group)
        g = self.param_groups[-1]
        for name, good, want in (("band", g["band"] in range(5), "0 to 4"), ("graft", g["graft"] in ("adam", "none"), "adam or none"),
                                 ("chain", g["chain"] in ("row", "flat"), "row or flat"),
                                 ("betas", all(0 <= beta < 1 for beta in g["betas"]), "two numbers from 0 to below 1"),
                                 ("graft_eps", 0 < g["graft_eps"] < math.inf, "above 0"),
                                 *((n, 0 <= g[n] < math.inf, "at least 0") for n in ("lr", "eps", "gamma", "weight_decay"))):
            if not good:
                raise ValueError(f"{name} is {g[name]}; it must be {want}")

    def work(self, p, group):
        """-> the Work of parameter p, whose state is made when it is first seen."""
        if p.grad.layout != torch.strided or not p.is_floating_point():
            raise ValueError("SONew takes dense gradients of real numbers")
        state, band = self.state[p], group["band"] if p.dim() > 1 else 0
        if not state:
            dtype = torch.bfloat16 if group["bf16_state"] else torch.promote_types(p.dtype, torch.float32)
            for name in ("m", *(f"s{k}" for k in range(band + 1))):
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
            for name in ("step", "skipped"):
                state[name] = torch.zeros((), device=local(p).device)
        chain = p.numel() if group["chain"] == "flat" else math.prod(p.shape[1:])
        return Work(local(p).contiguous(), local(p.grad).contiguous(), local(state["m"]), [local(state[f"s{k}"]) for k in range(band + 1)],
                    state["step"], state["skipped"], max(1, chain))

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            fused = {}                                               # what one call of the kernel can do together
            for p in group["params"]:
                if p.grad is not None:
                    work, groups, plain = self.work(p, group), shards(p, group["chain"]), p.dim() < 2
                    if kernel and work.p.is_cuda and p.dtype != torch.float64:
                        fused.setdefault((groups, plain), []).append((p, work))
                    else:
                        self.eager(work, group, plain, groups)
                        self.put_back(p, work)
            for (groups, plain), pairs in fused.items():
                kernel.step([work for _, work in pairs], **self.options(group), lr=group["lr"], weight_decay=group["weight_decay"],
                            graft="none" if group["graft"] == "none" else "plain" if plain else "adam",
                            reduce=partial(total, groups) if groups else None)
                for p, work in pairs:
                    self.put_back(p, work)
        return loss

    @staticmethod
    def options(group):
        gamma = max(group["gamma"], 2 ** -7 if group["bf16_state"] else 0.0)
        return dict(beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], gamma=gamma, graft_eps=group["graft_eps"])

    @staticmethod
    def eager(work, group, plain, groups):
        """What the kernel does, with the same numbers."""
        if work.p.is_cuda and not kernel:
            warn_slow()
        work.step.add_(1)
        wide = torch.promote_types(work.p.dtype, torch.float32)
        rows = lambda x: x.to(wide).view(-1, work.chain)             # (R, C)
        m, S, u, a, bad = update(rows(work.g), rows(work.m), [rows(s) for s in work.S], work.step, **SONew.options(group))
        for old, new in zip((work.m, *work.S), (m, *S)):
            old.copy_(new.view_as(old))
        sums = torch.stack([a.square().sum(), u.square().sum(), bad.to(wide)])
        total(groups, sums)
        if group["graft"] == "adam":
            u = a if plain else u * (sums[0].sqrt() / (sums[1].sqrt() + 1e-12))
        p, lr = work.p.to(wide), torch.where(sums[2] > 0, 0, group["lr"])
        work.p.copy_(p - lr * (u.view_as(p) + group["weight_decay"] * p))
        work.skipped.add_(sums[2] > 0)

    @staticmethod
    def put_back(p, work):
        if work.p.data_ptr() != local(p).data_ptr():                 # it was not contiguous
            local(p).copy_(work.p)

    def load_state_dict(self, state_dict):
        """As any optimizer's, but each tensor keeps the dtype it was saved in: torch would cast it to the parameter's."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"])):
            if i in state_dict["state"]:
                self.state[p] = {k: v.detach().clone().to(local(p).device) for k, v in state_dict["state"][i].items()}


def optimizer(groups, lr, *, beta1=0.9, beta2=0.95, eps=1e-8, band=1, gamma=1e-6, graft="adam", chain="row", bf16_state=False):
    return SONew(groups, lr, (beta1, beta2), eps, band=band, gamma=gamma, graft=graft, chain=chain, bf16_state=bf16_state)
