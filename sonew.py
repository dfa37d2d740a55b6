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

    python sonew.py                 the LogDet problem drawn, an autoencoder of MNIST, in one to two minutes on two CPU cores -> results/sonew-cpu.*
    python sonew.py --sweep         how its settings were found
    python sonew.py --full          the paper's protocol and a language model on one GPU -> results/sonew-h200.*
    python train.py --optim sonew   train with it
"""
import hashlib, importlib.util, json, math, statistics, sys, time, urllib.request
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
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
    g: torch.Tensor                                                  # its gradient; the kernel may leave u in its place
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
    tensor still for that step, which state["skipped"] counts. On CUDA .grad may hold u after the step.
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
        for p in g["params"]:
            shards(p, g["chain"])

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
        chain = p.numel() if group["chain"] == "flat" and p.dim() > 1 else math.prod(p.shape[1:])
        return Work(local(p).contiguous(), local(p.grad).contiguous(), local(state["m"]), [local(state[f"s{k}"]) for k in range(band + 1)],
                    state["step"], state["skipped"], max(1, chain))

    @staticmethod
    def fits(p):                                                     # is it one for the kernel?
        return kernel and p.is_cuda and p.dtype != torch.float64

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            fused = {}                                               # what one call of the kernel can do together
            for p in group["params"]:
                if p.grad is not None:
                    work, groups, plain = self.work(p, group), shards(p, group["chain"]), p.dim() < 2
                    if self.fits(work.p):
                        fused.setdefault((work.p.device, groups, plain), []).append((p, work))
                    else:
                        self.eager(work, group, plain, groups)
                        self.put_back(p, work)
            for (_, groups, plain), pairs in fused.items():
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


# ---------------------------------------------------------------------------------------------------------------------
# The experiment: the paper's own benchmark, an autoencoder of MNIST's digits, shortened

def sonew(**options):
    return lambda parameters, lr, eps, **more: SONew(parameters, lr, (0.9, 0.99), eps, **options, **more)


def soap(parameters, lr, eps):
    from pytorch_optimizer import SOAP                               # only where it is installed
    return SOAP(parameters, lr=lr, betas=(0.9, 0.99), eps=eps, weight_decay=0.0)


def sgd(parameters, lr, momentum):                                   # lr is a tensor where steps are recorded
    return torch.optim.SGD(parameters, lr, momentum=momentum, fused=torch.is_tensor(lr))


def rmsprop(parameters, lr, eps):
    return torch.optim.RMSprop(parameters, lr, 0.99, eps, capturable=torch.is_tensor(lr))


def adam(parameters, lr, eps):
    return torch.optim.Adam(parameters, lr, (0.9, 0.99), eps, capturable=torch.is_tensor(lr))


RATES, EPS = (1e-2, 3e-2, 1e-1, 3e-1), (1e-10, 1e-8, 1e-6)
# name: how to make it; a grid of 4 learning rates and 3 values of a second setting; the best of them, as --sweep found it
ARMS = {
    "SGD": (sgd, (1e-3, 3e-3, 1e-2, 3e-2), (0.8, 0.9, 0.95), (3e-2, 0.8)),
    "RMSProp": (rmsprop, (1e-3, 3e-3, 1e-2, 3e-2), (1e-8, 1e-2, 1e-1), (1e-2, 1e-2)),
    "Adam": (adam, (3e-3, 1e-2, 3e-2, 1e-1), (1e-8, 1e-1, 1.0), (1e-1, 1.0)),
    "SOAP": (soap, RATES, (1e-8, 1e-6, 1e-4), (3e-2, 1e-6)),
    "SONew, band 0": (sonew(band=0), RATES, (1e-12, 1e-10, 1e-8), (1e-1, 1e-10)),
    "SONew, band 1": (sonew(), RATES, EPS, (1e-1, 1e-8)),
    "band 1, flat": (sonew(chain="flat"), RATES, EPS, (1e-1, 1e-8)),
    "band 1, shuffled": (sonew(), RATES, EPS, (1e-1, 1e-8)),
    "SONew, band 4": (sonew(band=4), RATES, EPS, (1e-1, 1e-6)),
}
WIDTHS, BATCH, STEPS, SEEDS = (784, 64, 32, 16), 250, 300, (1, 2, 3)
FULL = dict(widths=(784, 1000, 500, 250, 30), batch=1000, steps=6000)   # the paper's: 100 epochs
MNIST = ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz", "https://s3.amazonaws.com/img-datasets/mnist.npz")
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"


def load_mnist(train, path):
    """-> training and test images, (60000, 784) and (10000, 784), from 0 to 1: from the file `path`, else from where a copy may lie, else
    from the network, kept for the next time if its checksum is right."""
    kept = Path("out/mnist.npz")
    found = [Path(path)] if path else [p for p in (kept, train.HERE.parent / "shared/data/mnist.npz") if p.is_file()]
    for url in () if found else MNIST:
        try:
            content = urllib.request.urlopen(url, timeout=10).read()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == MNIST_SHA256:
            with train.atomic(kept) as f:
                f.write(content)
            found = [kept]
            break
    if not found:
        train.fail("there is no MNIST here, and it cannot be fetched now; give --mnist FILE.npz with the arrays x_train and x_test")
    try:
        with np.load(found[0]) as arrays:
            images = [arrays[name].reshape(-1, 784) for name in ("x_train", "x_test")]
    except (OSError, ValueError, KeyError, EOFError):
        train.fail(f"{found[0]} is not MNIST: what is needed is an .npz file with x_train and x_test, images of 28 x 28 bytes")
    return [torch.from_numpy(x).float() / 255 for x in images]


def autoencoder(widths, seed):
    """784-...-code-...-784, tanh except at the code and the output; Glorot-uniform weights."""
    torch.manual_seed(seed)
    sizes, layers = [*widths, *widths[-2::-1]], []
    for n, (a, b) in enumerate(zip(sizes, sizes[1:]), 2):
        linear = torch.nn.Linear(a, b)
        torch.nn.init.xavier_uniform_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        layers += [linear] if n in (len(widths), len(sizes)) else [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers)


def cross_entropy(net, x):                                           # nats per image, summed over its pixels
    return F.binary_cross_entropy_with_logits(net(x), x, reduction="sum") / len(x)


def run(arm, lr, second, images, widths, batch, steps, seed, **options):
    """Train with a warm-up over a tenth of the steps and a linear decay to 0 -> dict(train, test, curve, milliseconds), in nats. On a GPU
    a step is recorded once and replayed: so small a network waits for the host otherwise."""
    x, test = images
    if arm.endswith("shuffled"):                                     # neighbours in a row of weights are neighbours no more
        order = torch.randperm(784, generator=torch.Generator().manual_seed(0)).to(x.device)
        x, test = x[:, order], test[:, order]
    net, index = autoencoder(widths, seed).to(x.device), torch.zeros(batch, dtype=torch.long, device=x.device)
    rate = torch.tensor(lr, device=x.device) if x.is_cuda else lr    # what is replayed reads it there
    opt, draw, graph = ARMS[arm][0](list(net.parameters()), rate, second, **options), torch.Generator().manual_seed(seed), None
    curve, spent = {}, []

    def take_step():
        loss = cross_entropy(net, x[index])
        opt.zero_grad()
        loss.backward()
        began = time.perf_counter()
        opt.step()
        spent.append(time.perf_counter() - began)

    for step in range(steps):
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                curve[step] = cross_entropy(net, x[:5000]).item()
        now = lr * min((step + 1) / (steps / 10), (steps - step) / (steps * 0.9), 1.0)
        if x.is_cuda:
            rate.fill_(now)
        for group in opt.param_groups:
            group["lr"] = rate if x.is_cuda else now
        index.copy_(torch.randint(len(x), (batch,), generator=draw))
        if x.is_cuda and step == 3:                                  # the first steps made what stays: state, libraries' handles
            torch.cuda.synchronize()
            graph, began = torch.cuda.CUDAGraph(), time.perf_counter()
            with torch.cuda.graph(graph):
                take_step()
        graph.replay() if graph else take_step()
    with torch.no_grad():
        scores = {"train": cross_entropy(net, x[:10000]).item(), "test": cross_entropy(net, test).item()}
    if isinstance(opt, SONew):
        scores |= health(opt)
    scores["curve"] = {**curve, steps: scores["train"]}
    if graph:
        return {**scores, "ms_per_step": 1e3 * (time.perf_counter() - began) / (steps - 3)}
    return {**scores, "ms_per_optimizer_step": 1e3 * statistics.median(spent)}


def health(opt):
    """-> the share of coordinates whose edges are removed, and the smallest Schur complement kept, in units of S_0."""
    removed = there = 0
    least = math.inf
    for group in opt.param_groups:
        for p in group["params"]:
            work = opt.work(p, group)
            if len(work.S) > 1:
                S = [s.float().view(-1, work.chain) for s in work.S]
                correct = -1 / torch.expm1(work.step * math.log(group["betas"][1]))
                S = [S[0] * correct + group["eps"], *(s * correct for s in S[1:])]
                psi, s = factor(S, opt.options(group)["gamma"])
                asked = torch.stack(S[1:]).any(0)
                kept = torch.stack(psi).any(0)
                removed, there = removed + (asked & ~kept).sum().item(), there + asked.sum().item()
                least = min(least, (s / S[0])[kept].min().item()) if kept.any() else least
    return {"edges_removed": removed / there, "least_schur": least} if there else {}


def logdet(images):
    """The sub-problem on real statistics: gradients of one hidden unit's weights, image by image, before training; 112 neighbouring
    pixels -> the statistics C (n, n), the completions X^-1 of its band for b = 0 ... 4 by `factor`, how far they are from the oracle and
    from C on the band, and the divergence tr(X C) - log det(X C) - n of each, for the pixels as they lie and shuffled."""
    x, net = images[0][:5000].double(), autoencoder(WIDTHS, 0).double()
    hidden = net[0](x).requires_grad_()
    delta = torch.autograd.grad(F.binary_cross_entropy_with_logits(net[1:](hidden), x, reduction="sum"), hidden)[0][:, :1]     # (N, 1)
    g = (delta * x)[:, 336:448]                                      # (N, n)
    n, C = g.shape[1], g.T @ g / len(g)
    C = C + 1e-3 * C.diagonal().mean() * torch.eye(n)                # some pixels are always black
    order, eye = torch.randperm(n, generator=torch.Generator().manual_seed(0)), torch.eye(n).double()
    result = {"divergence": {}, "divergence_shuffled": {}, "from_oracle": {}, "from_band": {}}
    inverses = {}
    for b in range(5):
        for name, c in (("divergence_shuffled", C[order][:, order]), ("divergence", C)):
            S = [F.pad(c.diagonal(k), (0, k)) for k in range(b + 1)]
            psi, s = factor([t[None] for t in S], 1e-12)
            X = torch.cat([precondition(e[None], psi, s) for e in eye])                      # (n, n), a column at a time: X = X^T
            result[name][b] = (torch.trace(X @ c) - torch.logdet(X @ c) - n).item()
        inverse, oracle = torch.linalg.inv(X), reference(S, eye[0])[0]
        result["from_oracle"][b] = ((X - oracle).abs().max() / oracle.abs().max()).item()
        band = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= b
        result["from_band"][b] = ((inverse - C)[band].abs().max() / C.max()).item()
        inverses[b] = inverse
    return result, C, inverses


def language_model(train, folder):
    """AdamW and SONew on train.py's small GPT, 300 steps at 3 learning rates each -> bits per byte of each run, and the steps and seconds
    that SONew's best takes to AdamW's best final loss (None: it does not get there)."""
    runs = {}
    for name, rates in (("adamw", (2.5e-4, 5e-4, 1e-3)), ("sonew", (1e-4, 3e-4, 1e-3))):
        for lr in rates:
            out = folder / f"{name}-{lr}"
            result, _ = train.part(f"--model small --optim {name} --lr {lr} --steps 300 --eval-every 25 --sample 1 --out {out}".split())
            rows = train.Log(out / "log.csv", 300).rows
            runs[f"{name} {lr}"] = {"curve": {int(r["step"]): float(r["val_bpb"]) for r in rows if r["val_bpb"]},
                                    "bits_per_byte": result["val_bpb"], "steps_per_s": result["tokens_per_s"] / 64 / 512}
    best = {name: min((k for k in runs if k.startswith(name)), key=lambda k: runs[k]["bits_per_byte"]) for name in ("adamw", "sonew")}
    adamw, ours = runs[best["adamw"]], runs[best["sonew"]]
    there = next((step for step, bpb in ours["curve"].items() if bpb <= adamw["bits_per_byte"]), None)
    return {"runs": runs, "best": best, "steps_to_adamw": there, "seconds_to_adamw": there and there / ours["steps_per_s"],
            "seconds_of_adamw": 300 / adamw["steps_per_s"]}


def sweep(arms, images, shape, points):
    """Seed 0 at each of points(arm) -> {arm: [[lr, second, train loss], ...] best first}; a run that diverges comes last."""
    found = {}
    for arm in arms:
        tried = [(*point, run(arm, *point, images, *shape, 0)["train"]) for point in points(arm)]
        found[arm] = sorted(tried, key=lambda t: t[2] if math.isfinite(t[2]) else math.inf)
        print(f"{arm:18s} lr {found[arm][0][0]:.2g}, second {found[arm][0][1]:.2g}: {found[arm][0][2]:.1f}; all "
              + " ".join(f"{t[2]:.0f}" for t in tried), flush=True)
    return found


def main(argv=None):
    import train                                                     # the only place that knows the GPT
    parser = train.Parser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sweep", action="store_true", help="seed 0 at 12 settings for each optimizer")
    which.add_argument("--full", action="store_true", help="on one GPU, 6 minutes on an H200: the whole protocol, then the language model")
    parser.add_argument("--mnist", metavar="FILE", help="mnist.npz (default: out/mnist.npz, fetched if there is a network)")
    parser.add_argument("--out", default="results", help="folder for what comes out (default: results)")
    args = parser.parse_args(argv)
    if args.full and not torch.cuda.is_available():
        train.fail("--full takes hours without a GPU; leave it out for the experiment of two minutes")
    began, out, name = time.perf_counter(), train.writable(args.out), "sonew-h200" if args.full else "sonew-cpu"
    images = load_mnist(train, args.mnist)
    soap_there = not args.full and importlib.util.find_spec("pytorch_optimizer")             # its steps cannot be recorded
    arms = [arm for arm in ARMS if arm != "SOAP" or soap_there]
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    grid = lambda arm: [(lr, second) for lr in ARMS[arm][1] for second in ARMS[arm][2]]

    def write(name, result):
        with train.atomic(out / name) as f:
            f.write(json.dumps({**result, **machine, "seconds": time.perf_counter() - began}, indent=1).encode())
    if args.sweep:
        found = sweep(arms, images, (WIDTHS, BATCH, STEPS), grid)
        write("sonew-cpu-sweep.json", {"seed": 0, "steps": STEPS, "train": found})
        return found

    problem, C, inverses = logdet(images)
    shape, settings, extra = (WIDTHS, BATCH, STEPS), {arm: ARMS[arm][3] for arm in arms}, {}
    if args.full:
        machine["device"], images = torch.cuda.get_device_name(), [x.cuda() for x in images]
        random = np.random.default_rng(0)
        drawn = lambda arm: [[float(10 ** random.uniform(math.log10(min(v)) - 0.5, math.log10(max(v)) + 0.5)) if max(v) < 0.5
                              else float(random.choice(v)) for v in ARMS[arm][1:3]] for _ in range(16)]
        extra["sweep"] = sweep(arms, images, (FULL["widths"], FULL["batch"], FULL["steps"] // 10), drawn)
        shape, settings = tuple(FULL.values()), {arm: extra["sweep"][arm][0][:2] for arm in arms}
        extra["gamma"] = {g: run("SONew, band 1", *settings["SONew, band 1"], images, *shape[:2], 600, 1, gamma=g)["train"] for g in (0.0, 1e-6, 1e-3)}
        extra["bf16_state"] = {arm: [run(arm, *settings[arm], images, *shape, seed, bf16_state=True) for seed in SEEDS]
                               for arm in ("SONew, band 0", "SONew, band 1")}
    runs = {}
    for arm in arms:
        runs[arm] = [run(arm, *settings[arm], images, *shape, seed) for seed in SEEDS]
        mean = lambda what: f"{statistics.mean(r[what] for r in runs[arm]):6.1f} +- {statistics.stdev(r[what] for r in runs[arm]):.1f}"
        what, ms = next((what, ms) for what, ms in runs[arm][0].items() if what.startswith("ms_per_"))
        print(f"{arm:18s} train {mean('train')}   test {mean('test')}   {ms:.2f} {what.replace('_', ' ')}", flush=True)
    if args.full:
        extra["language_model"] = language_model(train, Path("out") / f"sonew-{time.time_ns()}")
    paired = {}                                                      # mean and half the width of the 95% interval (Student's t)
    for arm in (a for a in arms if "band" in a and a != "SONew, band 1"):
        paired[arm] = train.interval([a["test"] - b["test"] for a, b in zip(runs["SONew, band 1"], runs[arm])])
        print(f"band 1 less {arm}, paired, test: {paired[arm][0]:+.1f} +- {paired[arm][1]:.1f} (95%)")
    result = {"logdet": problem, "runs": runs, "band_1_less": paired, "settings": settings, "shape": shape, "seeds": SEEDS, **extra}
    write(f"{name}.json", result)
    draw(train, out / f"{name}.png", result, C, inverses)
    print(f"X^-1 = S on the band to {max(problem['from_band'].values()):.0e}, X = the oracle's to {max(problem['from_oracle'].values()):.0e}; "
          + "LogDet divergence " + ", ".join(f"b={b} {d:.0f} ({problem['divergence_shuffled'][b]:.0f} shuffled)"
                                             for b, d in problem["divergence"].items()))
    return result


def draw(train, path, result, C, inverses):
    figure, axes = train.figure((12, 7.4), 2, 3)
    size = C.diagonal().sqrt()
    shown = [("statistics $E[g g^T]$, as correlations", C)]
    shown += [(f"$X^{{-1}}$, band {b}; X is the oracle's to {result['logdet']['from_oracle'][b]:.0e}", inverses[b]) for b in (1, 4)]
    for ax, (title, matrix) in zip(axes[0], shown):
        ax.imshow((matrix / size / size[:, None]).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set_title(title, fontsize=10)
        ax.set(xticks=[], yticks=[])
    left, middle, right = axes[1]
    for label, style in (("divergence", "o-"), ("divergence_shuffled", "s--")):
        values = result["logdet"][label]
        left.plot(list(values), list(values.values()), style, label="shuffled pixels" if "shuffled" in label else "pixels as they lie")
    left.set(xlabel="band", ylabel="LogDet divergence from the statistics", xticks=range(5), title="what neighbours explain")
    left.legend(fontsize=8)
    for n, (arm, runs) in enumerate(result["runs"].items()):
        middle.plot([int(step) for step in runs[0]["curve"]], list(runs[0]["curve"].values()), f"C{n}", label=arm)
        tests = [r["test"] for r in runs]
        right.errorbar(statistics.mean(tests), -n, xerr=statistics.stdev(tests), fmt="o", color=f"C{n}")
    middle.set(xlabel="step", ylabel="training cross-entropy, nats per image", yscale="log", title="autoencoder of MNIST, seed 1")
    middle.legend(fontsize=7)
    right.set(xlabel="test cross-entropy, nats per image", yticks=[-n for n in range(len(result["runs"]))], yticklabels=list(result["runs"]),
              title=f"{len(result['seeds'])} seeds, mean and deviation")
    train.keep(figure, path, dpi=110)


if __name__ == "__main__":
    import train
    train.leave(main)
