"""SONew: a sparsified online Newton optimizer (arXiv 2311.10085).

A full second-order method preconditions a tensor's n gradients with the inverse
of their (n, n) statistics S = E[g g^T]. SONew keeps b + 1 diagonals of S,
S_k[i] = E[g_i g_{i+k}], and takes the banded X that is closest to the inverse
of S in LogDet divergence:

    minimise  tr(X S) - log det X   over X > 0 with X_ij = 0 for |i - j| > b

In memory order, the coordinates form a chain, in which i has edges to its b
successors i+1 ... i+b only. So the minimiser has a closed form:

    psi_i = W_i^-1 c_i            W_i (b, b): S of the successors of i, among
                                  each other; c_i (b): S of i with each of them
    s_i   = S_0[i] - psi_i . c_i  Schur complement: the variance of g_i that its
                                  successors do not explain
    X     = L diag(1/s) L^T       L[i+k, i] = -psi_i[k], ones on the diagonal
    u     = X m                   the direction, where m is the momentum

Edge removal (Algorithm 3): where s_i <= gamma S_0[i], the edges from i to its
successors are dropped; where a successor depends linearly on those before it,
the edge to it is. So X stays positive definite. Grafting: each tensor's step
gets the length of Adam's. With b = 0, u is m / S_0, Adam without its square
root. Biases and gains take Adam's step.

Damping: S_0 is replaced by S_0 + eps scale^2. scale is the tensor's mean
root-mean-square gradient, mean_i sqrt(S_0[i]), after the previous step; in the
first step it is the mean magnitude of the gradient. So multiplying all
gradients by a constant changes no step. An absolute eps is right for one scale
only: 1e-8 is fine for an autoencoder on MNIST, but exceeds S_0 in most
coordinates of a GPT, whose gradients are far smaller.

Where we depart from the released code: its eps is absolute. The variance of
Adam's step in the grafting is bias-corrected here, and there is no eps in it
(the first step of the released code is 1 / sqrt(1 - beta2) times too long). The
test for edge removal is relative to S_0. Chains end with the rows of a matrix,
not with the tensor (chain="flat"). A gradient that is not finite counts as 0.

    python sonew.py                 the LogDet problem, an autoencoder on MNIST
    python train.py --optim sonew   train with it; sonew:help prints its options
"""

import functools
import math
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

try:
    from kernels import sonew as kernel
except ModuleNotFoundError as missing:  # macOS and Windows
    if missing.name != "triton":
        raise
    kernel = None

LEAST_SCALE = 1e-15  # squares of smaller gradients lose precision in float32

# --------------------------------------------------------------------------------------------------
# The method, as pure functions. A tensor is viewed as R chains of C coordinates.


def reference(S, m):
    """Solve the LogDet problem of one chain with dense matrices, in any dtype.

    S: b+1 diagonals (n,), where S[k][i] is the entry (i, i+k). m: the momentum (n,).
    Returns X (n, n) and X m (n,).

    X is the inverse of the maximum-determinant completion of the banded matrix: invert S on every
    window of b+1 neighbours, add these up, and subtract the inverses on the b coordinates that two
    successive windows share.
    """
    n = len(m)
    b = min(len(S), n) - 1

    # the banded matrix
    dense = torch.diag(S[0])  # (n, n)
    for k in range(1, b + 1):
        dense = dense + torch.diag(S[k][: n - k], k) + torch.diag(S[k][: n - k], -k)

    # inverses of windows
    X = torch.zeros_like(dense)
    for i in range(n - b):
        window = slice(i, i + b + 1)
        X[window, window] += torch.linalg.inv(dense[window, window])
    for i in range(1, n - b):
        shared = slice(i, i + b)
        X[shared, shared] -= torch.linalg.inv(dense[shared, shared])
    return X, X @ m


def shift(x, k):
    """Return y (R, C) with y[:, i] = x[:, i + k], and zeros past the ends. k may be negative."""
    if k < 0:
        return F.pad(x, (-k, 0))[:, : x.shape[1]]
    return F.pad(x, (0, k))[:, k:]


def factor(S, gamma):
    """Factor X = L diag(1/s) L^T by Gaussian elimination, elementwise over (R, C).

    S: b+1 statistics (R, C); S[k][:, i] belongs to coordinates i and i+k.
    Returns psi, b tensors (R, C), and s (R, C).

    A successor is dropped where at most gamma of its own S_0 is left after eliminating those before
    it. All successors of i are dropped where s_i is at most gamma S_0[i].
    """
    b = len(S) - 1

    # For each i, successor p = 0 ... b-1 is coordinate i+1+p. W[p][q], q <= p, is the entry of S
    # for successors p and q: S[p - q] at i+1+q. c[p] is the entry for i and successor p.
    W = []
    for p in range(b):
        W.append([shift(S[p - q], q + 1) for q in range(p + 1)])
    c = list(S[1:])
    variance = [W[p][p] for p in range(b)]

    # forward elimination of successor j from the rows below it, in W and in c
    pivot_inv = [None] * b
    for j in range(b):
        pivot_inv[j] = torch.where(W[j][j] > gamma * variance[j], 1 / W[j][j], 0)
        for p in range(j + 1, b):
            ratio = W[p][j] * pivot_inv[j]
            for q in range(j + 1, p + 1):
                W[p][q] = W[p][q] - ratio * W[q][j]
            c[p] = c[p] - ratio * c[j]

    # Schur complement s = S_0 - c^T W^-1 c
    s = S[0]
    for j in range(b):
        s = s - c[j] * (c[j] * pivot_inv[j])

    # back substitution: psi = W^-1 c
    psi = [None] * b
    for j in reversed(range(b)):
        psi[j] = c[j] * pivot_inv[j]
        for p in range(j + 1, b):
            psi[j] = psi[j] - W[p][j] * pivot_inv[j] * psi[p]

    # edge removal
    keep = s > gamma * S[0]
    psi = [torch.where(keep, psi_k, 0) for psi_k in psi]
    s = torch.where(keep, s, S[0])
    return psi, s


def precondition(m, psi, s):
    """Return the direction u = L diag(1/s) L^T m; all are (R, C), psi is b of them.

    u is 0 where s is 0, which means that there has been no gradient yet.
    """
    # w = diag(1/s) L^T m: subtract psi_i[k] m[i+k] from m[i]
    w = m
    for k, psi_k in enumerate(psi, start=1):
        w = w - psi_k * shift(m, k)
    w = torch.where(s > 0, w / s, 0)

    # u = L w: subtract psi_i[k] w[i] from w[i+k]
    u = w
    for k, psi_k in enumerate(psi, start=1):
        u = u - shift(psi_k * w, -k)
    return u


def bias_correction(beta, step):
    """Return 1 - beta^step without cancellation, in the dtype of the tensor step."""
    if beta == 0:
        return torch.ones_like(step)
    return -torch.expm1(step * math.log(beta))


def unit_of(scale):
    """Return the unit in which to measure gradients, (): scale, or 1 if it is too small."""
    return torch.where(scale > LEAST_SCALE, scale, 1)


def update_statistics(g, m, S, beta1, beta2):
    """Add gradient g to the momentum m and the b+1 statistics S; all are (R, C).

    Returns m, S and is_good: False where g or its square is not finite, where g counts as 0.
    """
    is_good = (g * g).isfinite()
    g = torch.where(is_good, g, 0)
    m = beta1 * m + (1 - beta1) * g
    S = [beta2 * S_k + (1 - beta2) * (g * shift(g, k)) for k, S_k in enumerate(S)]
    return m, S, is_good


def directions(m, S, step, scale, beta1, beta2, eps, gamma):
    """Return u, a and root (R, C): the directions of SONew and Adam, and sqrt(S_0) / scale.

    m, S: the momentum and the b+1 statistics (R, C) after `step` gradients.
    step, scale: (). If the scale is 0 (all gradients have been 0), u is the momentum.
    """
    # correct the bias, and divide by the scale, so that eps has no unit
    unit = unit_of(scale)
    m_hat = m * (1 / (bias_correction(beta1, step) * unit))
    S_correction = 1 / (bias_correction(beta2, step) * (unit * unit))
    S_hat = [S_k * S_correction for S_k in S]

    root = S_hat[0].sqrt()
    a = torch.where(root > 0, m_hat / root, 0)
    psi, s = factor([S_hat[0] + eps, *S_hat[1:]], gamma)
    u = torch.where(scale > LEAST_SCALE, precondition(m_hat, psi, s), m_hat)
    return u, a, root


# --------------------------------------------------------------------------------------------------
# The optimizer


class LocalParam(NamedTuple):
    """This process's shard of a parameter, of its gradient and of its state, all contiguous."""

    p: torch.Tensor
    grad: torch.Tensor
    state: dict  # step, skipped and scale: (); m, s0 ... sb: shaped like p
    band: int  # b, successors of each coordinate
    chain: int  # C, coordinates per chain
    is_adam: bool  # whether to take Adam's step
    numel: int  # coordinates of the parameter in all processes together
    process_groups: tuple  # those over which its rows are sharded


def to_local(t):
    """Return this process's shard of a DTensor, and any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


def shard_groups(p, chain):
    """Return the process groups over which p is sharded. ValueError if that would cut a chain."""
    if not isinstance(p, DTensor):
        return ()
    groups = []
    for mesh_dim, placement in enumerate(p.placements):
        if not placement.is_shard():
            continue
        if p.dim() > 1 and (chain == "flat" or placement.dim > 0):
            raise ValueError("a chain would be cut: shard parameters by rows and use chain='row'")
        groups.append(p.device_mesh.get_group(mesh_dim))
    return tuple(groups)


def step_torch(params, *, lr, weight_decay, beta1, beta2, eps, gamma):
    """Take one step in PyTorch, one tensor after the other.

    params: a list of LocalParam, updated in place. lr: a number, or a tensor ().
    """
    for param in params:
        # gradient g, momentum m, statistics S (b+1 of them); in float32 or float64
        state = param.state
        dtype = torch.promote_types(param.p.dtype, torch.float32)
        names = ["m", *(f"s{k}" for k in range(param.band + 1))]
        g = param.grad.to(dtype).view(-1, param.chain)  # (R, C)
        m, *S = [state[name].to(dtype).view(-1, param.chain) for name in names]
        m, S, is_good = update_statistics(g, m, S, beta1, beta2)
        for name, new in zip(names, (m, *S), strict=True):
            state[name].copy_(new.view_as(param.p))
        state["step"] += 1
        # u, a: the directions of SONew and Adam; root: sqrt(S_0) / scale
        scale = state["scale"]
        u, a, root = directions(m, S, state["step"], scale, beta1, beta2, eps, gamma)

        # sums over all shards: |a|^2, |u|^2, and root, which is inf if a gradient was bad
        root = torch.where(is_good, root, math.inf)
        sums = torch.stack([a.square().sum(), u.square().sum(), root.sum()])
        for process_group in param.process_groups:
            dist.all_reduce(sums, group=process_group)
        norm_a, norm_u = sums[:2].sqrt()
        graft = torch.where(norm_u > 0, norm_a / norm_u, 0)
        u = a if param.is_adam else graft * u

        # update the parameter and its scale, unless a gradient was bad
        all_good = sums[2] < math.inf
        p = param.p.to(dtype)
        rate = torch.where(all_good, lr, 0)
        param.p.copy_(p - rate * (u.view_as(p) + weight_decay * p))
        state["skipped"] += ~all_good
        new_scale = sums[2] / max(1, param.numel) * unit_of(scale)
        scale.copy_(torch.where(all_good, new_scale, scale))


class SONew(torch.optim.Optimizer):
    """SONew, grafted to the length of Adam's step. lr, betas and weight_decay: as in AdamW.

    eps: damping, added to S_0 in units of scale^2, see the top of this file.
    band: b, successors of each coordinate, 0 to 4. The state is b + 2 tensors of the parameter's
        shape, and three scalars.
    gamma: edges are removed where the Schur complement is at most gamma S_0. With bf16_state, gamma
        is at least 2^-7, the rounding error of bfloat16.
    chain: "row", one chain per p[i].flatten(), or "flat", one through the whole tensor.
    bf16_state: keep momentum and statistics in bfloat16; else in float32 (float64 for float64).
    use_kernel: use the Triton kernel. None: for CUDA tensors; False: never; True: always.

    If an entry of a gradient or its square is not finite, it counts as 0 in the statistics, and its
    tensor is not updated. state["skipped"] counts these steps. No step waits for the device.

    Raises ValueError for an option out of range, a sparse or complex gradient, a parameter that is
    sharded other than by rows, or a state that does not fit the parameters.
    """

    # A CUDA graph can capture a step after prepare(): no step waits for the device, counters and lr
    # can be tensors on the device, and plan_cache keeps alive what replays read.
    capturable = True
    use_kernel = None  # these two are for copies of the optimizer, which skip __init__
    plan_cache = None

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.99),
        eps=1e-3,
        *,
        band=1,
        gamma=1e-6,
        chain="row",
        weight_decay=0.0,
        bf16_state=False,
        use_kernel=None,
    ):
        self.use_kernel = use_kernel
        defaults = {"lr": lr, "betas": betas, "eps": eps, "band": band, "gamma": gamma}
        defaults |= {"chain": chain, "weight_decay": weight_decay, "bf16_state": bf16_state}
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_options(group)
        for p in group["params"]:
            shard_groups(p, group["chain"])

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, params, uses_kernel in self._batches():
            self._step_params(params, group, uses_kernel)
        return loss

    @torch.no_grad()
    def prepare(self):
        """Plan the launches of the next step before a capture, which cannot upload their tables."""
        for group, params, uses_kernel in self._batches():
            if uses_kernel:
                self._find_plans(params, [self._local_tensors(p, group) for p in params], group)

    def _batches(self):
        """Return a list of (group, parameters with gradients, whether the kernel takes them)."""
        batches = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for uses_kernel in (True, False):
                batch = [p for p in params if self._uses_kernel(p) == uses_kernel]
                if batch:
                    batches.append((group, batch, uses_kernel))
        return batches

    def _uses_kernel(self, p):
        if self.use_kernel is not None:
            return self.use_kernel
        if p.is_cuda and kernel is None:
            warnings.warn("Triton is not installed: SONew takes the slower PyTorch path")
            return False
        return p.is_cuda and p.dtype != torch.float64

    def _step_params(self, params, group, uses_kernel):
        options = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        options["beta1"], options["beta2"] = group["betas"]
        options["gamma"] = max(group["gamma"], 2**-7 if group["bf16_state"] else 0.0)
        tensors = [self._local_tensors(p, group) for p in params]

        if uses_kernel:
            kernel.run(self._find_plans(params, tensors, group), **options)
            torch.autograd.graph.increment_version([p for p, _, _ in tensors])
        else:
            step_torch(local_params(params, tensors, group), **options)

        # write back parameters that are not contiguous: the step has updated a contiguous copy
        for p, (local_p, _, _) in zip(params, tensors, strict=True):
            if local_p is not p and not to_local(p).is_contiguous():
                to_local(p).copy_(local_p)

    def _find_plans(self, params, tensors, group):
        """Return the kernel's launches, from the cache unless a tensor has moved or changed."""
        if self.plan_cache is None:
            self.plan_cache = kernel.PlanCache()
        make_params = functools.partial(local_params, params, tensors, group)
        return self.plan_cache.get(tensors, group["chain"], make_params)

    def _local_tensors(self, p, group):
        """Return this process's shards of p, its gradient and its state as contiguous tensors."""
        grad = p.grad
        if grad.layout != torch.strided or not p.is_floating_point():
            raise ValueError("SONew takes dense gradients of real numbers")
        if not self.state[p]:
            self.state[p] = init_state(p, group)
            self.state[p]["scale"].copy_(mean_magnitude(p, group["chain"]))
        state = self.state[p]
        if isinstance(p, DTensor):
            p = p.to_local()
            grad = grad.to_local()
            state = {name: to_local(tensor) for name, tensor in state.items()}
        return p.contiguous(), grad.contiguous(), state

    def load_state_dict(self, state_dict):
        """Load a copy of a state as torch.optim.Adam does, hooks included, but keep its dtype.

        PyTorch would cast it to the dtype of the parameters. Raises ValueError if it does not fit.
        """
        states = []

        def read(_, final):
            params = [p for group in self.param_groups for p in group["params"]]
            owners = [(i, group) for group in final["param_groups"] for i in group["params"]]
            for p, (i, group) in zip(params, owners, strict=False):  # PyTorch checks the lengths
                check_options(group)
                if i in final["state"]:
                    states.append((p, copy_state(p, group, final["state"][i])))

        def install(_):
            for p, state in states:
                self.state[p] = state

        # `read` runs after the user's pre-hooks, `install` before the user's post-hooks
        pre_hook = self.register_load_state_dict_pre_hook(read)
        post_hook = self.register_load_state_dict_post_hook(install, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            pre_hook.remove()
            post_hook.remove()


def local_params(params, tensors, group):
    """Return a LocalParam for each parameter; tensors: (p, gradient, state) of each, local."""
    result = []
    for p, (local_p, grad, state) in zip(params, tensors, strict=True):
        band, chain = band_and_chain(p, group)
        groups = shard_groups(p, group["chain"])
        is_adam = p.dim() < 2
        result.append(LocalParam(local_p, grad, state, band, chain, is_adam, p.numel(), groups))
    return result


def check_options(group):
    """Raise ValueError if an option of SONew is missing or out of range."""
    for name in ("lr", "betas", "eps", "band", "gamma", "chain", "weight_decay", "bf16_state"):
        if name not in group:
            raise ValueError(f"SONew's options lack {name!r}")
    for name in ("lr", "eps", "gamma", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} is {group[name]}; it must be at least 0")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas is {group['betas']}; it must be two numbers from 0 to below 1")
    if group["band"] not in range(5):
        raise ValueError(f"band is {group['band']}; it must be 0 to 4")
    if group["chain"] not in ("row", "flat"):
        raise ValueError(f"chain is {group['chain']}; it must be row or flat")


def band_and_chain(p, group):
    """Return b and the coordinates per chain for p; Adam's step has b = 0 and chains of 1."""
    if p.dim() < 2:
        return 0, 1
    chain = p.numel() if group["chain"] == "flat" else math.prod(p.shape[1:])
    return group["band"], max(1, chain)


def init_state(p, group):
    """Return the state of p before its first step: scalars step, skipped, scale; m, s0 ... sb."""
    wide_dtype = torch.promote_types(p.dtype, torch.float32)
    dtype = torch.bfloat16 if group["bf16_state"] else wide_dtype
    band, _ = band_and_chain(p, group)
    state = {}
    for name in ("step", "skipped", "scale"):
        state[name] = torch.zeros((), dtype=wide_dtype, device=to_local(p).device)
    for name in ("m", *(f"s{k}" for k in range(band + 1))):
        state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
    return state


def mean_magnitude(p, chain):
    """Return the mean magnitude of p's gradient over all processes, or 0 if it is not finite."""
    total = to_local(p.grad).abs().sum(dtype=torch.promote_types(p.dtype, torch.float32))
    for process_group in shard_groups(p, chain):
        dist.all_reduce(total, group=process_group)
    return torch.where(total.isfinite(), total / max(1, p.numel()), 0)


@torch.no_grad()
def copy_state(p, group, saved):
    """Return a copy of the saved state of p, {name: tensor}; ValueError if it does not fit."""
    state = init_state(p, group)
    if saved.keys() != state.keys():
        raise ValueError(f"SONew's state has {sorted(saved)}; it must have {sorted(state)}")
    for name, tensor in state.items():
        value = saved[name]
        is_dense = torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
        if not is_dense or value.shape != tensor.shape:
            shape = tuple(tensor.shape)
            raise ValueError(f"SONew's state {name} must be a dense tensor of shape {shape}")
        tensor.copy_(value)
    return state


def optimizer(
    groups,
    lr,
    *,
    beta1=0.9,
    beta2=0.95,
    eps=1e-3,
    band=1,
    gamma=1e-6,
    chain="row",
    bf16_state=False,
):
    """Build SONew for train.py --optim sonew:option=value."""
    options = {"band": band, "gamma": gamma, "chain": chain, "bf16_state": bf16_state}
    return SONew(groups, lr, (beta1, beta2), eps, **options)


def main(argv=None):
    """Plot the LogDet problem, and train an autoencoder on MNIST."""
    from experiments import sonew as study

    return study.main(argv)


if __name__ == "__main__":
    from support.cli import run_main

    run_main(main)
