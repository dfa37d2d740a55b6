"""SONew: a sparsified online Newton optimizer (arXiv 2311.10085).

Let g (n) be the gradient of a tensor with n entries, its coordinates. A full
second-order method keeps a matrix S (n, n), where S_ij is the running mean of
g_i g_j, and multiplies the momentum by its inverse. SONew keeps a band of S:
the diagonal S_0 and the b diagonals next to it, S_k[i] = E[g_i g_{i+k}]. It
replaces the inverse by a matrix X with the same band. For n = 4 and b = 1:

    S =  S_0[0] S_1[0]   ?      ?        X =  X_00  X_01   0     0
         S_1[0] S_0[1] S_1[1]   ?             X_10  X_11  X_12   0
           ?    S_1[1] S_0[2] S_1[2]           0    X_21  X_22  X_23
           ?      ?    S_1[2] S_0[3]           0     0    X_32  X_33

The entries marked ? are not kept. They are not needed, because X is 0 there: X
minimises tr(X S) - log det X over the positive definite matrices of this form.
That makes X the closest of them to the inverse of S, in LogDet divergence.

X follows from predicting each g_i from its successors, the next b coordinates
in memory. For b = 1 this takes two numbers per coordinate:

    psi_i = S_1[i] / S_0[i+1]        the best prediction of g_i is psi_i g_{i+1}
    s_i   = S_0[i] - psi_i S_1[i]    its mean squared error

    L =     1      0      0    0     X = L diag(1/s) L^T
         -psi_0    1      0    0     u = X m: the direction of the step (n),
            0   -psi_1    1    0         where m (n) is the momentum
            0      0   -psi_2  1

For any b, psi_i has a weight for each successor, and L[i+k, i] = -psi_i[k]:

    W_i (b, b)   entries of S between the successors of i
    c_i (b)      entries of S between i and each successor
    psi_i (b)    W_i^-1 c_i: the weights with the least mean squared error
    s_i          S_0[i] - psi_i . c_i: that error, a Schur complement

Edge removal (Algorithm 3): coordinates form a chain, with an edge from each to
its successors. Where s_i <= gamma S_0[i], the edges from i are dropped: psi_i
becomes 0, and s_i becomes S_0[i]. A successor that is nearly a linear
combination of those before it loses its edge, too. So X stays positive
definite.

Grafting: u is scaled to the length of Adam's step, tensor by tensor. For b = 0
u is m / S_0, Adam without its square root. Biases and gains take Adam's step.

Damping: eps scale^2 is added to S_0. scale is the size of a typical gradient:
the mean of sqrt(S_0[i]) over the tensor after the previous step, and of |g_i|
in the first step. So multiplying all gradients by a constant changes no step.

Where we depart from the released PyTorch code: it adds eps without a scale.
1e-8 is then fine for an autoencoder on MNIST, but exceeds S_0 in most
coordinates of a GPT. In the grafting, it has an eps and does not correct the
bias of Adam's variance: its first step is 1 / sqrt(1 - beta2) times too long.
We remove edges relative to S_0, end chains with the rows of a matrix
(chain="flat": with the tensor, as released), and skip the step of a tensor
whose gradient is not finite.

    python sonew.py                 the LogDet problem, an autoencoder on MNIST
    python train.py --optim sonew   train with it; sonew:help prints its options
"""

if __name__ == "__main__":
    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

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

LEAST_SCALE = 1e-15  # a smaller scale counts as 0: squares of its gradients may underflow

# --------------------------------------------------------------------------------------------------
# The method, as pure functions. A tensor is viewed as (R, C): R chains of C coordinates each.
# Edges for R = 2, C = 4, b = 1:   g[0, 0] -- g[0, 1] -- g[0, 2] -- g[0, 3]
#                                  g[1, 0] -- g[1, 1] -- g[1, 2] -- g[1, 3]


def reference(S, m):
    """Solve the LogDet problem of one chain with dense matrices, in any dtype.

    S: a list of b+1 diagonals, (n,) each; S[k][i] is the entry (i, i+k). m: the momentum (n,).
    Returns X (n, n) and X m (n,).

    X is a sum of small inverses. Add the inverse of S on every window of b+1 neighbours, and
    subtract its inverse on the b coordinates that two successive windows share.
    """
    n = len(m)
    b = min(len(S), n) - 1

    # the banded matrix S
    dense = torch.diag(S[0])  # (n, n)
    for k in range(1, b + 1):
        dense = dense + torch.diag(S[k][: n - k], k) + torch.diag(S[k][: n - k], -k)

    # b = 1: inverses on {0, 1}, {1, 2}, {2, 3}, ... minus those on {1}, {2}, ...
    X = torch.zeros_like(dense)
    for i in range(n - b):
        window = slice(i, i + b + 1)
        X[window, window] += torch.linalg.inv(dense[window, window])
    for i in range(1, n - b):
        shared = slice(i, i + b)
        X[shared, shared] -= torch.linalg.inv(dense[shared, shared])
    return X, X @ m


def shift(x, k):
    """Return y (R, C) with y[r, i] = x[r, i + k], and 0 where i + k is outside the chain."""
    # [[5, 6, 7]] becomes [[6, 7, 0]] for k = 1, and [[0, 5, 6]] for k = -1
    if k < 0:
        return F.pad(x, (-k, 0))[:, : x.shape[1]]
    return F.pad(x, (0, k))[:, k:]


def factor(S, gamma):
    """Return psi and s of X = L diag(1/s) L^T, by Gaussian elimination for all i at once.

    S: a list of b+1 statistics, (R, C) each: S[k][r, i] = E[g_i g_{i+k}] in chain r.
    psi: a list of b tensors (R, C): psi[k - 1][r, i] is the weight of g_{i+k} in predicting g_i.
    s (R, C): the mean squared error of that prediction.
    """
    b = len(S) - 1

    # each coordinate i has its own equations W psi = c; for b = 2, with successors i+1 and i+2:
    #     W = [[S_0[i+1], S_1[i+1]],     c = [S_1[i],
    #          [S_1[i+1], S_0[i+2]]]          S_2[i]]
    # W[p][q] (R, C) has this entry for every i. W is symmetric, so q <= p is enough.
    # shift(S_k, j)[i] is S_k[i+j].
    W = []
    for p in range(b):
        W.append([shift(S[p - q], q + 1) for q in range(p + 1)])
    c = list(S[1:])
    variance = [W[p][p] for p in range(b)]

    # forward elimination: subtract multiples of row j from the rows p below it, in W and in c
    pivot_inv = [None] * b
    for j in range(b):
        # W[j][j] is now the mean squared error of predicting successor j from those before it: if
        # it is at most gamma of its variance, they are nearly dependent, so do without j
        pivot_inv[j] = torch.where(W[j][j] > gamma * variance[j], 1 / W[j][j], 0)
        for p in range(j + 1, b):
            ratio = W[p][j] * pivot_inv[j]
            for q in range(j + 1, p + 1):
                W[p][q] = W[p][q] - ratio * W[q][j]
            c[p] = c[p] - ratio * c[j]

    # Schur complement: S_0 - c^T W^-1 c, with W and c as they were before the elimination
    s = S[0]
    for j in range(b):
        s = s - c[j] * (c[j] * pivot_inv[j])

    # back substitution, from the last row up. Row j now says
    #     W[j][j] psi[j] + sum_{p>j} W[p][j] psi[p] = c[j]
    psi = [None] * b
    for j in reversed(range(b)):
        psi[j] = c[j] * pivot_inv[j]
        for p in range(j + 1, b):
            psi[j] = psi[j] - W[p][j] * pivot_inv[j] * psi[p]

    # edge removal: where the error s is at most gamma S_0, do not predict g_i at all
    keep = s > gamma * S[0]
    psi = [torch.where(keep, psi_k, 0) for psi_k in psi]
    s = torch.where(keep, s, S[0])
    return psi, s


def precondition(m, psi, s):
    """Return the direction u = L diag(1/s) L^T m (R, C), given psi and s from `factor`.

    m: the momentum (R, C). L has ones on its diagonal and -psi_k[i] in row i+k of column i, where
    psi_k (R, C) is the weight of g_{i+k} in predicting g_i. s (R, C) is the error of predicting it.
    u is 0 where s is 0: there, all gradients have been 0.
    """
    # w = diag(1/s) L^T m: w[i] = (m[i] - sum_k psi_k[i] m[i+k]) / s[i]; shift(m, k)[i] is m[i+k]
    w = m
    for k, psi_k in enumerate(psi, start=1):
        w = w - psi_k * shift(m, k)
    w = torch.where(s > 0, w / s, 0)

    # u = L w: u[i] = w[i] - sum_k psi_k[i-k] w[i-k]; shift(x, -k)[i] is x[i-k]
    u = w
    for k, psi_k in enumerate(psi, start=1):
        u = u - shift(psi_k * w, -k)
    return u


def bias_correction(beta, step):
    """Return 1 - beta^step, accurate for a beta near 1 too. step and the result are scalars ()."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(step * log_beta)


def unit_of(scale):
    """Return the unit, (), that gradients are divided by: scale, but 1 if that is too small."""
    return torch.where(scale > LEAST_SCALE, scale, 1)


def update_statistics(g, m, S, beta1, beta2):
    """Add the gradient g to the running averages m and S; g, m and each S[k] are (R, C).

    Returns the new momentum m, the new list S of b+1 statistics, and is_good (R, C). It is False
    where g or its square is not finite; such an entry of g counts as 0.
    """
    is_good = (g * g).isfinite()
    g = torch.where(is_good, g, 0)
    m = beta1 * m + (1 - beta1) * g
    products = [g * shift(g, k) for k in range(len(S))]  # g_i g_{i+k}
    S = [beta2 * S_k + (1 - beta2) * product for S_k, product in zip(S, products)]
    return m, S, is_good


def directions(m, S, step, scale, beta1, beta2, eps, gamma):
    """Return SONew's direction u, Adam's direction a, and root = sqrt(S_0) / scale, (R, C) each.

    m, S: the momentum (R, C) and the list of b+1 statistics (R, C), after `step` gradients.
    step, scale: (); the scale is the size of a typical gradient of this tensor. If it is at most
    LEAST_SCALE, as while all gradients have been 0, u is the momentum.
    """
    # correct the bias of the averages, and divide gradients by the scale: eps is relative to it
    unit = unit_of(scale)
    m_factor = 1 / (bias_correction(beta1, step) * unit)
    S_factor = 1 / (bias_correction(beta2, step) * (unit * unit))
    m_hat = m * m_factor
    S_hat = [S_k * S_factor for S_k in S]

    # Adam's direction, then SONew's, for which eps is added to S_0
    root = S_hat[0].sqrt()
    a = torch.where(root > 0, m_hat / root, 0)
    psi, s = factor([S_hat[0] + eps, *S_hat[1:]], gamma)
    u = torch.where(scale > LEAST_SCALE, precondition(m_hat, psi, s), m_hat)
    return u, a, root


# --------------------------------------------------------------------------------------------------
# The optimizer


class LocalParam(NamedTuple):
    """What one step needs of a parameter. Its tensors are this process's shard, contiguous."""

    p: torch.Tensor
    grad: torch.Tensor
    state: dict  # step, skipped and scale: (); m, s0 ... sb: shaped like p
    band: int  # b, the number of successors of a coordinate
    chain: int  # C, the number of coordinates in a chain: in a row p[i], or in all of p
    is_adam: bool  # whether to take Adam's step, as for biases and gains
    numel: int  # coordinates on all processes together
    process_groups: tuple  # process groups over which the rows are sharded
    shard: torch.Tensor | None = None  # this process's part of the parameter; p may be a copy of it


def to_local(t):
    """Return this process's shard of a DTensor; return any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


def shard_groups(p, chain):
    """Return the process groups over which p is sharded. Raise ValueError if that cuts a chain."""
    if not isinstance(p, DTensor):
        return ()
    groups = []
    for mesh_dim, placement in enumerate(p.placements):
        if not placement.is_shard():
            continue
        # p is cut along placement.dim; a cut along dimension 0 keeps each row p[i], a chain, whole
        if p.dim() > 1 and (chain == "flat" or placement.dim > 0):
            raise ValueError("a chain would be cut: shard parameters by rows and use chain='row'")
        groups.append(p.device_mesh.get_group(mesh_dim))
    return tuple(groups)


def band_and_chain(p, group):
    """Return b, the number of successors of a coordinate, and C, the length of a chain.

    A chain is a row p[i], or all of p if chain="flat". A vector, which takes Adam's step, has no
    neighbours: b = 0 and C = 1.
    """
    if p.dim() < 2:
        return 0, 1
    chain = p.numel() if group["chain"] == "flat" else math.prod(p.shape[1:])
    return group["band"], max(1, chain)


def local_param(p, group, state):
    """Return the LocalParam of a parameter that has a gradient."""
    band, chain = band_and_chain(p, group)
    shard = p
    grad = p.grad
    if isinstance(p, DTensor):
        shard = p.to_local()
        grad = grad.to_local()
        state = {name: to_local(tensor) for name, tensor in state.items()}
    return LocalParam(
        p=shard.contiguous(),
        grad=grad.contiguous(),
        state=state,
        band=band,
        chain=chain,
        is_adam=p.dim() < 2,
        numel=p.numel(),
        process_groups=shard_groups(p, group["chain"]),
        shard=shard,
    )


def step_torch(params, *, lr, weight_decay, beta1, beta2, eps, gamma):
    """Take one step in PyTorch, one tensor after the other.

    params: a list of LocalParam, updated in place. lr: a number, or a tensor ().
    """
    for param in params:
        # load the gradient g, the momentum m and the b+1 statistics S, in float32 or float64
        state = param.state
        dtype = torch.promote_types(param.p.dtype, torch.float32)
        g = param.grad.to(dtype).view(-1, param.chain)  # (R, C)
        m = state["m"].to(dtype).view_as(g)
        S = [state[f"s{k}"].to(dtype).view_as(g) for k in range(param.band + 1)]

        # update m and S with g, and store them
        m, S, is_good = update_statistics(g, m, S, beta1, beta2)
        state["step"] += 1
        state["m"].copy_(m.view_as(param.p))
        for k, S_k in enumerate(S):
            state[f"s{k}"].copy_(S_k.view_as(param.p))

        # u, a: the directions of SONew and Adam (R, C); root: sqrt(S_0) / scale (R, C)
        scale = state["scale"]
        u, a, root = directions(m, S, state["step"], scale, beta1, beta2, eps, gamma)

        # sums over all shards: |a|^2, |u|^2, and root, whose mean is the factor to the next scale;
        # it is infinite if an entry of g is not finite, and then no shard takes the step
        root = torch.where(is_good, root, math.inf)
        sums = torch.stack([a.square().sum(), u.square().sum(), root.sum()])
        for process_group in param.process_groups:
            dist.all_reduce(sums, group=process_group)
        all_good = sums[2] < math.inf

        # grafting: scale u to the length of Adam's step
        norm_a, norm_u = sums[:2].sqrt()
        graft = torch.where(norm_u > 0, norm_a / norm_u, 0)
        u = a if param.is_adam else graft * u

        # update p and the scale, the mean of sqrt(S_0), unless an entry of g is not finite
        p = param.p.to(dtype)
        rate = torch.where(all_good, lr, 0)
        param.p.copy_(p - rate * (u.view_as(p) + weight_decay * p))
        state["skipped"] += ~all_good
        new_scale = sums[2] / max(1, param.numel) * unit_of(scale)
        scale.copy_(torch.where(all_good, new_scale, scale))


class SONew(torch.optim.Optimizer):
    """SONew, grafted to the length of Adam's step. lr, betas and weight_decay: as in AdamW.

    eps: damping; eps scale^2 is added to S_0, where scale is the size of a typical gradient.
    band: b, the number of successors of a coordinate, 0 to 4. The state of a parameter is b + 2
        tensors of its shape (momentum and statistics) and three scalars.
    gamma: a coordinate is not predicted from its successors if the error would be at most this
        fraction of its variance. With bf16_state at least 2^-7, the epsilon of bfloat16.
    chain: "row", one chain per p[i].flatten(), or "flat", one through the whole tensor.
    bf16_state: keep momentum and statistics in bfloat16; else in float32 (float64 for float64).
    use_kernel: use the Triton kernel. None: for CUDA tensors but float64; False: never; True:
        always, which needs Triton.

    A gradient entry that is not finite, or whose square is not, counts as 0 in the statistics. Its
    tensor skips that step, which state["skipped"] counts. No step waits for the device.

    Raises ValueError for an option out of range, a sparse or complex gradient, a parameter that is
    sharded other than by rows, a state that does not fit the parameters, or use_kernel=True without
    Triton.
    """

    # A CUDA graph can capture step() after prepare(): no step waits for the device, lr may be a
    # tensor on the device, and plan_cache keeps the tables of addresses that a replay reads
    capturable = True
    use_kernel = None  # copies of the optimizer skip __init__, so these two need a default
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
        if use_kernel and kernel is None:
            raise ValueError("the kernel of SONew needs Triton: pip install triton")
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
        for group in self.param_groups:
            # options of the update
            beta1, beta2 = group["betas"]
            gamma = max(group["gamma"], 2**-7) if group["bf16_state"] else group["gamma"]
            options = {"beta1": beta1, "beta2": beta2, "gamma": gamma}
            options |= {name: group[name] for name in ("lr", "weight_decay", "eps")}

            # take the step; autograd has to be told that the kernel changes parameters
            for_kernel, for_torch = self._local_params(group)
            if for_kernel:
                kernel.run(self._plans(for_kernel), **options)
                torch.autograd.graph.increment_version([param.p for param in for_kernel])
            step_torch(for_torch, **options)

            # if a parameter is not contiguous, the step has updated a copy; copy it back
            for param in for_kernel + for_torch:
                if param.shard is not param.p:
                    param.shard.copy_(param.p)
        return loss

    @torch.no_grad()
    def prepare(self):
        """Plan the kernel launches of step(). A capture of step() could not upload their tables."""
        for group in self.param_groups:
            for_kernel, _ = self._local_params(group)
            if for_kernel:
                self._plans(for_kernel)

    def _local_params(self, group):
        """Return two lists: LocalParams for the kernel, and LocalParams for step_torch."""
        for_kernel = []
        for_torch = []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided or not p.is_floating_point():
                raise ValueError("SONew takes dense gradients of real numbers")
            if not self.state[p]:
                self.state[p] = init_state(p, group)
                self.state[p]["scale"].copy_(mean_magnitude(p, group["chain"]))
            params = for_kernel if self._uses_kernel(p) else for_torch
            params.append(local_param(p, group, self.state[p]))
        return for_kernel, for_torch

    def _uses_kernel(self, p):
        if self.use_kernel is not None:
            return self.use_kernel
        if p.is_cuda and kernel is None:
            warnings.warn("Triton is not installed: SONew takes the slower PyTorch path")
            return False
        return p.is_cuda and p.dtype != torch.float64

    def _plans(self, params):
        """Return the kernel's launches, from the cache unless a tensor has moved or changed."""
        if self.plan_cache is None:
            self.plan_cache = kernel.PlanCache()
        return self.plan_cache.get(params)

    def load_state_dict(self, state_dict):
        """Load a copy of an optimizer state. Raises ValueError if it does not fit."""
        # PyTorch would cast bfloat16 state to the dtype of the parameters, so copy it ourselves
        states = {}

        def copy_states(_, saved):
            for group, saved_group in zip(self.param_groups, saved["param_groups"]):
                check_options(saved_group)
                for p, i in zip(group["params"], saved_group["params"]):  # PyTorch checks lengths
                    if i in saved["state"]:
                        states[p] = copy_state(p, saved_group, saved["state"][i])

        def install_states(_):
            self.state.update(states)

        # copy after the user's pre-hooks, which may change state_dict; install before post-hooks
        pre_hook = self.register_load_state_dict_pre_hook(copy_states)
        post_hook = self.register_load_state_dict_post_hook(install_states, prepend=True)
        with pre_hook, post_hook:  # removes both at the end
            super().load_state_dict(state_dict)


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


def init_state(p, group):
    """Return the state before the first step: scalars, momentum m and statistics s0 ... sb."""
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
    """Return mean_i |g_i| of p's gradient over all processes, or 0 if it is not finite."""
    total = to_local(p.grad).abs().sum(dtype=torch.promote_types(p.dtype, torch.float32))
    for process_group in shard_groups(p, chain):
        dist.all_reduce(total, group=process_group)
    return torch.where(total.isfinite(), total / max(1, p.numel()), 0)


@torch.no_grad()
def copy_state(p, group, saved):
    """Return a copy of the saved state of p, {name: tensor}. ValueError if it does not fit."""
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
    """Build SONew for train.py --optim sonew:option=value.

    beta1, beta2: decays of the momentum and of the statistics.
    eps: damping, relative to the square of a typical gradient.
    band: the number of successors of a coordinate that predict it, 0 to 4.
    gamma: edge removal: successors that explain all but this share of its variance are ignored.
    chain: "row": successors end with the row of a matrix; "flat": with the whole tensor.
    bf16_state: keep momentum and statistics in bfloat16.
    """
    options = {"band": band, "gamma": gamma, "chain": chain, "bf16_state": bf16_state}
    return SONew(groups, lr, (beta1, beta2), eps, **options)


def main(argv=None):
    """Plot the LogDet problem, and train an autoencoder on MNIST."""
    from experiments import sonew as study

    return study.main(argv)


if __name__ == "__main__":
    cli.run_main(main)
