"""LoRA, and LoRA-RITE: an optimizer that ignores how Z = B A is factored.

Yen, Si, Meng, Yu, Duvvuri, Dhillon, Hsieh and Kumar, ICLR 2025, arXiv
2410.20625.

LoRA freezes a matrix W and trains Z = B A beside it, A (r, n), B (m, r). (B R,
R^-1 A) is the same Z for every invertible R, yet Adam and LoRA+ take a
different step in Z for each R. LoRA-RITE takes the same one. With a = A^T, b =
B and orthonormal bases Ua, Ub of their columns, a = Ua Ra, b = Ub Rb, it
measures the gradient of each factor in the basis of the other one, where R
cancels but for a rotation, and preconditions it there with an r x r second
moment. For a (and for b with the letters exchanged), at step t:

    h = ga Rb^-1                        the unmagnified gradient, dL/dZ^T Ub
    P = Ub^T Ub,old                     moves the state into the new basis
    V = d2 P V P^T + (1 - d2) h^T h / n
    M = d1 M P^T + (1 - d1) h ((V + rho)^1/2 + eps)^-1
    a <- a - lr (M Rb^-T + weight_decay a)      both step from the old factors

    d1, d2 = beta (1 - beta^(t-1)) / (1 - beta^t) for beta1 and beta2

h is first scaled by min(1, clip / |h|), with the norm of all h of all pairs.
rho, off by default (escape), adds back what V loses when it moves between
bases. Clipping the raw gradients from outside would break the invariance.

Where we depart from the paper: no basis is kept and no QR taken, since every r
x r matrix follows from Gram matrices of a, b, ga, gb, Ma and Mb in float64. Rb
may be any root of b^T b (Cholesky's; the symmetric one without the missing
directions if b is 0 or rank-deficient), and the old b is the new one with the
last step undone. The released code skips steps with a large h by default,
which freezes training if the loss is scaled by 1e3 (here `skip`, off, and
counted), and takes roots of slightly negative eigenvalues (here clamped).

Start with B = 0 or with factors of ordinary size: a tiny B that is not 0 is a
trap. The step in A is lr M Rb^-T, inversely proportional to the size of B;
multiplied by the step in B, it moves Z by about lr^2 / |B|. On the regression
of the tests (lr 0.05, Z of norm 20) the first step moves Z by 0.4 from B = 0
and by 78 from unit normals times 1e-4. This is the algorithm's own behaviour,
and clip, which bounds gradients and not steps, does not prevent it.

On a GPU kernels/lora_rite.py takes the step for all pairs in four launches,
elsewhere PyTorch does.

    python lora_rite.py             the drift between factorizations
    python train.py --init DIR --adapter lora_rite:rank=16 --optim lora_rite
"""

import hashlib
import math
import warnings
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from kernels import lora_rite as kernel
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernel = None

# --------------------------------------------------------------------------------------------------
# LoRA: y = W x + scale B A x

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def adapt(
    model, *, rank=16, alpha=0.0, targets="q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj"
):
    """Put adapters on linear layers, freeze all else, and return parameter groups for an optimizer.

    targets: ends of the layers' names, in whole parts, separated by "+"; * stands for any
    characters and [01] for one of these ("q_proj+layers.0.mlp.*"). alpha: the adapter counts
    alpha / rank times; 0: once. The first weights depend on the names and torch.initial_seed()
    alone, so they are the same on any device and in every process.
    """
    seed = torch.initial_seed()
    inject(model, rank, alpha or None, targets.split("+"), seed)
    return adapter_groups(model)


def inject(model, rank, alpha=None, targets=("q_proj", "v_proj"), seed=0):
    """Put adapters on every nn.Linear whose name ends with one of `targets`, and freeze all else.

    The layers get parameters lora_A (rank, n) and lora_B (m, rank), in float32 at least. alpha: the
    adapter counts alpha / rank times; None: once. Returns the model. ValueError: a target that no
    layer has, a layer that cannot carry an adapter, a rank out of range, adapters already there.
    """
    attach(model, find_layers(model, targets), rank, alpha, seed)
    return model


def linear_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def find_layers(model, targets):
    """Return {name: layer} of the linear layers whose names end with one of the targets."""
    linears = linear_layers(model)
    chosen = set()
    for target in targets:
        found = {name for name in linears if fnmatchcase("." + name, f"*.{target}")}
        if not found:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise ValueError(f"no linear layer is called {target!r}; there are {ends or 'none'}")
        chosen |= found
    if not chosen:
        raise ValueError("no targets are given; name the linear layers that get adapters")
    return {name: linear for name, linear in linears.items() if name in chosen}


def check_layers(model, layers):
    """Raise ValueError for layers whose output or weight an adapter could not stand for."""
    owners = []  # of each tensor of the model
    for module_name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if type(tensor) in (torch.Tensor, nn.Parameter):
                owners.append((module, f"{module_name}.{key}", tensor.untyped_storage()))

    for name, linear in layers.items():
        weight = linear._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.dtype not in WEIGHT_DTYPES or weight.is_meta:
            raise ValueError(
                f"the weight of {name} is no plain tensor of floats (it is sharded, quantized, "
                f"computed or not there yet), so it cannot carry an adapter"
            )
        storage = weight.untyped_storage()
        for module, owner, other in owners:
            if other is storage and module is not linear:
                raise ValueError(
                    f"the weight of {name} is shared with {owner}, which an adapter would change, "
                    f"too; choose other targets"
                )


def attach(model, layers, rank, alpha, seed):
    """Put adapters on `layers`, {name: nn.Linear}, and freeze all else; check everything before."""
    check_layers(model, layers)
    largest, where = min((min(linear.weight.shape), name) for name, linear in layers.items())
    if not 1 <= rank <= largest:
        raise ValueError(f"the rank is {rank}; it must be from 1 to {largest}, the size of {where}")
    if alpha is not None and not 0 <= alpha < 2**63:
        raise ValueError(f"alpha is {alpha}; it must be at least 0")
    if adapters(model):
        raise ValueError("the model has adapters already; merge them first")

    model.requires_grad_(False)
    for name, linear in layers.items():
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        device = linear.weight.device
        A = draw_A(f"{name}.lora_A", (rank, linear.in_features), seed)
        B = torch.zeros(linear.out_features, rank)
        linear.lora_A = nn.Parameter(A.to(device, dtype))
        linear.lora_B = nn.Parameter(B.to(device, dtype))
        linear.lora_scale = 1.0 if alpha is None else alpha / rank
        linear.lora_called = False
        linear.lora_hook = linear.register_forward_hook(add_adapter)
    model.lora_check = model.register_forward_hook(check_called)


def draw_A(name, shape, seed):
    """Draw uniform numbers in +-1 / sqrt(n), as PEFT does, from a generator for each name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


def add_adapter(linear, inputs, y):
    """Forward hook of a layer: x (..., n), y = W x (..., m) -> y + scale B A x."""
    linear.lora_called = True
    (x,) = inputs
    z = F.linear(F.linear(x, linear.lora_A.to(x.dtype)), linear.lora_B.to(x.dtype))
    return y + z * linear.lora_scale


def check_called(model, inputs, output):
    """Forward hook of the model: after its first pass, refuse adapters on layers never called.

    A model may use a layer's weight without calling the layer (an output layer inside the loss,
    nn.MultiheadAttention). Such an adapter would do nothing in training, but something when merged.
    """
    if torch.compiler.is_compiling():
        return
    model.lora_check.remove()
    for name, linear in adapters(model).items():
        if not linear.lora_called:
            raise ValueError(
                f"the model does not call its layer {name}, so an adapter has no effect there; "
                f"choose other targets"
            )


def adapters(model):
    """Return {name: layer} of the layers that carry an adapter."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def adapter_groups(model):
    """Return one parameter group A, B, A, B, ...; "pair": neighbours belong together."""
    parameters = []
    for linear in adapters(model).values():
        parameters += [linear.lora_A, linear.lora_B]
    return [{"params": parameters, "pair": True}]


@torch.no_grad()
def merge(model):
    """Add each adapter to its layer's weight and remove it; all stays frozen. Returns the model."""
    for linear in adapters(model).values():
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        Z = linear.lora_B.to(dtype) @ linear.lora_A.to(dtype)
        linear.weight.copy_(linear.weight + Z * linear.lora_scale)  # rounded once
        linear.lora_hook.remove()
        del linear.lora_A, linear.lora_B, linear.lora_scale, linear.lora_called, linear.lora_hook
    for module in model.modules():
        if hasattr(module, "lora_check"):
            module.lora_check.remove()
            del module.lora_check
    return model


# --------------------------------------------------------------------------------------------------
# Adapters on disk, in the format of Hugging Face's PEFT


def save(model, folder, prefix=""):
    """Write the adapters alone, as PEFT does, into a folder that holds none yet.

    prefix: what PEFT's model has in front of our layers' names: "model." for a train.GPT.
    """
    from support import peft_files

    layers = adapters(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    tensors = {}
    for name, linear in layers.items():
        tensors[prefix + name] = linear.lora_A.detach(), linear.lora_B.detach()
    peft_files.write_adapters(folder, tensors, linear.lora_scale)  # the same for all layers


def load(model, folder, prefix=""):
    """Inject the adapters that `save` or PEFT wrote, and return the model; dropout is not applied.

    ValueError: the folder holds none, or another kind than plain LoRA, or they do not fit.
    """
    from support import peft_files

    rank, alpha, tensors = peft_files.read_adapters(folder)
    linears = {prefix + name: m for name, m in linear_layers(model).items()}
    layers = {}
    for name, (A, B) in tensors.items():
        if name not in linears:
            raise ValueError(f"{folder} adapts {name!r}, which is no linear layer of the model")
        wanted = linears[name].weight.shape
        if wanted != (len(B), A.shape[1]):
            raise ValueError(f"{folder}: the adapter of {name} is not one of a matrix {wanted}")
        layers[name.removeprefix(prefix)] = linears[name]
    attach(model, layers, rank, alpha, seed=0)
    with torch.no_grad():
        for name, (A, B) in tensors.items():
            linears[name].lora_A.copy_(A)
            linears[name].lora_B.copy_(B)
    return model


# --------------------------------------------------------------------------------------------------
# The algorithm as the paper writes it


def decay(beta, t):
    """Adafactor's decay: 0 at t = 1, so that no bias is left to correct."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def reference(
    pairs, states, t, lr, beta1, beta2, eps, clip=0.0, weight_decay=0.0, escape=False
):  # fmt: skip
    """Take step t = 1, 2, ... with bases by QR. Slow; for tests, in float64.

    pairs: (a (n, r), b (m, r), ga, gb) for each pair; states: two dicts for each, {} at first,
    changed in place. Returns the new (a, b) for each pair.
    """
    d1 = decay(beta1, t)
    d2 = decay(beta2, t)

    # unmagnified gradients, each in the basis of the other factor
    work = []
    for (a, b, ga, gb), (state_a, state_b) in zip(pairs, states):
        Ua, Ra = torch.linalg.qr(a)
        Ub, Rb = torch.linalg.qr(b)
        Ia = torch.linalg.pinv(Ra)  # (r, r)
        Ib = torch.linalg.pinv(Rb)
        work.append((a, ga @ Ib, Ub, Ib, state_a))
        work.append((b, gb @ Ia, Ua, Ia, state_b))
    norm = sum(h.square().sum() for _, h, *_ in work).sqrt()

    new = []
    for x, h, U, I, state in work:
        if clip:
            h = h * min(1.0, clip / norm)  # (rows, r)

        # move the second moment into the new basis
        P = U.T @ state.get("U", U)  # (r, r)
        V_old = state.get("V", torch.zeros_like(P))
        V = P @ V_old @ P.T
        rho = state.get("rho", 0.0)
        if escape:
            lost = (torch.linalg.eigvalsh(V_old) - torch.linalg.eigvalsh(V)).max().clamp(min=0)
            lost_trace = (V_old.trace() - V.trace()).clamp(min=0)
            rho = d2 * (rho + torch.minimum(lost, lost_trace))

        # precondition, then the first moment
        V = d2 * V + (1 - d2) * h.T @ h / len(h)
        w, Q = torch.linalg.eigh(V)
        S = h @ Q @ torch.diag(1 / ((w.clamp(min=0) + rho).sqrt() + eps)) @ Q.T
        M = d1 * state.get("M", torch.zeros_like(h)) @ P.T + (1 - d1) * S
        state.update(U=U, V=V, M=M, rho=rho)
        new.append(x - lr * (M @ I.T + weight_decay * x))
    return list(zip(new[::2], new[1::2]))


# --------------------------------------------------------------------------------------------------
# The step from Gram matrices, for N pairs of equal shape at once


class FactorState(NamedTuple):
    """What the last step left of N factors, beside their first moments; float64."""

    V: torch.Tensor  # (N, r, r) second moment, in the basis of the partner
    root: torch.Tensor  # (N, r, r) inverse root of x^T x
    rho: torch.Tensor  # (N,) escaped mass
    step: torch.Tensor  # (N,) steps counted
    lr: torch.Tensor  # (N,) learning rate of that step, 0 if x did not move
    shrink: torch.Tensor  # (N,) 1 - lr * weight_decay of that step
    skipped: torch.Tensor  # (N,) gradients left out so far


def unpack(packed, rank):
    """packed (..., 2 r^2 + 5), as stored and as the kernel reads it -> FactorState of views"""
    V, root = packed[..., :-5].unflatten(-1, (2, rank, rank)).unbind(-3)  # (..., r, r)
    return FactorState(V, root, *packed[..., -5:].unbind(-1))


def pack(state):
    numbers = torch.stack(state[2:], -1)  # (..., 5)
    return torch.cat([state.V.flatten(-2), state.root.flatten(-2), numbers], -1)


class Factor(NamedTuple):
    """One side of N pairs, seen as tall matrices: A transposed, or B."""

    x: torch.Tensor  # (N, rows, r)
    grad: torch.Tensor  # (N, rows, r)
    M: torch.Tensor  # (N, rows, r) first moment
    state: FactorState
    xx: torch.Tensor  # (N, r, r) x^T x, float64, like all that follow
    gg: torch.Tensor  # (N, r, r) grad^T grad, 0 where not finite
    xM: torch.Tensor  # (N, r, r) x^T M
    root: torch.Tensor  # (N, r, r) inverse root of x^T x
    is_finite: torch.Tensor  # (N,) whether grad^T grad is
    is_still: torch.Tensor  # (N,) x does not move: its gradient is missing or not finite


def read_factor(parameters, states, is_A):
    """Return the Factor of parameters of one shape; states: [{"M", "packed"}], one for each."""
    dtype = states[0]["M"].dtype
    rank = parameters[0].shape[0 if is_A else 1]

    def tall(tensors):
        return torch.stack([t.mT if is_A else t for t in tensors]).to(dtype)  # (N, rows, r)

    x = tall(parameters)
    M = tall([state["M"] for state in states])
    grad = tall([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    state = unpack(torch.stack([state["packed"] for state in states]), rank)

    xx = x.double().mT @ x.double()  # (N, r, r)
    gg = grad.double().mT @ grad.double()
    xM = x.double().mT @ M.double()
    is_finite = gg.isfinite().all(-1).all(-1)
    is_missing = torch.tensor([p.grad is None for p in parameters])
    is_still = ~is_finite | is_missing.to(x.device, non_blocking=True)
    xx = torch.where(xx.isfinite(), xx, 0)
    gg = torch.where(column(is_finite), gg, 0)
    xM = torch.where(xM.isfinite(), xM, 0)
    return Factor(x, grad, M, state, xx, gg, xM, inverse_root(xx), is_finite, is_still)


def inverse_root(K):
    """Return I with I^T K I = 1 for Gram matrices K (N, r, r), on the directions that exist.

    I is R^-1 of Cholesky's K = R^T R. Where that has lost its accuracy, I = Q w^-1/2 Q^T without
    the eigenvalues below 1e-12 of the largest; for K = 0, I = 0.
    """
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    R, info = torch.linalg.cholesky_ex(K, upper=True)
    pivots = R.diagonal(dim1=-2, dim2=-1)
    is_good = column((info == 0) & (pivots.amin(-1) > 1e-7 * pivots.amax(-1)))
    by_cholesky = torch.linalg.solve_triangular(torch.where(is_good, R, eye), eye, upper=True)

    w, Q = torch.linalg.eigh(K)
    is_live = w > 1e-12 * w[..., -1:]
    w_inverse_root = torch.where(is_live, torch.where(is_live, w, 1).rsqrt(), 0)
    by_eigenvalues = Q * w_inverse_root[..., None, :] @ Q.mT
    return torch.where(is_good, by_cholesky, by_eigenvalues)


def trace(x):  # (N, r, r) -> (N,)
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def column(x):  # (N,) -> (N, 1, 1)
    return x[:, None, None]


def unmagnified_gram(factor, partner, skip):
    """Return h^T h (N, r, r), zero where the gradient is left out, and where that is, (N,)."""
    hh = partner.root.mT @ factor.gg @ partner.root
    limit = skip**2 * factor.x[0].numel() if skip else math.inf
    is_skipped = ~(factor.is_finite & (trace(hh) <= limit))
    return torch.where(column(is_skipped), 0, hh), is_skipped


def update(
    factor, partner, hh, is_skipped, c, lr, *, betas, eps, weight_decay, escape, own_count
):  # fmt: skip
    """Take a step: return the new x and M (N, rows, r) and the new FactorState.

    factor, partner: the two sides of the pairs; hh (N, r, r): h^T h before clipping; is_skipped
    (N,): gradients left out; c (): scale of the gradients by clipping; lr: number or tensor ().
    """
    old = factor.state
    dtype = factor.x.dtype

    # decays of this step
    step = old.step + (trace(hh) > 0) if own_count else old.step + 1
    t = step.clamp(min=1)
    d1 = decay(betas[0], t)  # (N,)
    d2 = decay(betas[1], t)

    # P = U^T U_old of the partner, whose last step x_old -> shrink x_old - lr M root^T is undone
    xx_old = partner.xx + column(partner.state.lr) * partner.xM @ old.root.mT  # times shrink
    P = partner.root.mT @ xx_old @ partner.state.root / column(partner.state.shrink)

    # second moment
    V = P @ old.V @ P.mT
    rho = old.rho
    if escape:
        before, after = torch.linalg.eigvalsh(torch.stack([old.V, V]))  # (N, r) each, ascending
        lost = before - after
        lost = torch.minimum(lost.amax(-1).clamp(min=0), lost.sum(-1).clamp(min=0))
        rho = d2 * (rho + lost)
    V = column(d2) * V + column(1 - d2) * c**2 * hh / factor.x.shape[1]
    w, Q = torch.linalg.eigh((V + V.mT) / 2)
    scales = 1 / ((w.clamp(min=0) + rho[:, None]).sqrt() + eps)  # (N, r)
    preconditioner = Q * scales[:, None] @ Q.mT  # ((V + rho)^1/2 + eps)^-1

    # first moment and parameters
    D = column(d1) * P
    C = column(1 - d1) * c * partner.root @ preconditioner
    grad = torch.where(column(is_skipped), 0, factor.grad)
    M = factor.M @ D.mT.to(dtype) + grad @ C.to(dtype)
    lr = torch.as_tensor(lr, dtype=torch.float64, device=V.device)
    lr = torch.where(factor.is_still, 0.0, lr)  # (N,)
    shrink = 1 - lr * weight_decay
    x = column(shrink).to(dtype) * factor.x - M @ (column(lr) * partner.root.mT).to(dtype)
    skipped = old.skipped + is_skipped
    return x, M, FactorState(V, factor.root, rho, step, lr, shrink, skipped)


class Measured(NamedTuple):
    """The first half of a step, for pairs of equal shape; A first."""

    parameters: tuple  # ([A, A, ...], [B, B, ...])
    states: tuple  # their states
    factors: tuple
    hh: tuple  # unmagnified gradients, h^T h
    is_skipped: tuple
    norm_squared: torch.Tensor  # () |h|^2


def measure(parameters, states, skip):
    """Take the first half of a step, for parameters [A, B, A, B, ...] of pairs of equal shape."""
    parameters = parameters[::2], parameters[1::2]
    states = states[::2], states[1::2]
    A = read_factor(parameters[0], states[0], is_A=True)
    B = read_factor(parameters[1], states[1], is_A=False)
    hh_A, is_skipped_A = unmagnified_gram(A, B, skip)
    hh_B, is_skipped_B = unmagnified_gram(B, A, skip)
    norm_squared = trace(hh_A).sum() + trace(hh_B).sum()
    is_skipped = is_skipped_A, is_skipped_B
    return Measured(parameters, states, (A, B), (hh_A, hh_B), is_skipped, norm_squared)


def finish(measured, total, *, clip, lr, **options):
    """Take the second half of a step, given |h|^2 of all pairs; clip 0: none."""
    norm = total.to(measured.norm_squared.device).sqrt()
    c = torch.ones_like(norm)
    if clip:
        c = torch.where(norm > clip, clip / norm, 1.0)
    for k, factor in enumerate(measured.factors):
        partner = measured.factors[1 - k]
        hh = measured.hh[k]
        x, M, state = update(factor, partner, hh, measured.is_skipped[k], c, lr, **options)
        if k == 0:
            x = x.mT
            M = M.mT
        states = measured.states[k]
        torch._foreach_copy_([s["packed"] for s in states], list(pack(state).unbind()))
        torch._foreach_copy_([s["M"] for s in states], list(M.unbind()))
        torch._foreach_copy_(measured.parameters[k], list(x.unbind()))


# --------------------------------------------------------------------------------------------------
# The optimizer


def check_options(group):
    """Raise ValueError if an option of a parameter group is out of range."""
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas are {group['betas']}; they must be from 0 to below 1")
    if not 0 < group["eps"] < math.inf:
        raise ValueError(f"eps is {group['eps']}; it must be above 0")
    for name in ("lr", "clip", "skip", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} is {group[name]}; it must be at least 0")


def check_state(state, p, rank):
    """Raise ValueError if a loaded state does not fit the parameter."""
    shapes = {"M": p.shape, "packed": (2 * rank * rank + 5,)}
    is_good = isinstance(state, dict) and state.keys() == shapes.keys()
    for name, shape in shapes.items() if is_good else ():
        t = state[name]
        is_good &= (
            torch.is_tensor(t)
            and t.shape == shape
            and t.dtype in WEIGHT_DTYPES
            and t.layout == torch.strided
            and not t.is_meta
            and bool(t.isfinite().all())
        )
    if is_good:
        numbers = unpack(state["packed"], rank)
        is_good = min(numbers.rho, numbers.step, numbers.lr, numbers.skipped) >= 0
        is_good &= bool(numbers.shrink != 0)
    if not is_good:
        raise ValueError(
            f"the state of a factor {tuple(p.shape)} is not one of LoRA-RITE at rank {rank}"
        )


class LoRARITE(torch.optim.Optimizer):
    """LoRA-RITE for groups {"params": [A, B, A, B, ...], "pair": True} with A (r, n), B (m, r).

    eps           added to the root of the second moment of the unmagnified gradient
    clip          largest norm of the unmagnified gradients of all pairs; 0: never
    skip          leave out a factor's gradient if the RMS of its unmagnified gradient is larger;
                  0: never (1 in the released code)
    weight_decay  decoupled, x -= lr weight_decay x
    escape        add what the second moment loses between bases to all its directions
    own_count     count a factor's steps from its first gradient that is not 0 (after B = 0, A's is
                  0); else all steps, as released
    use_kernel    None: on CUDA; True: always (interpreted on a CPU); False: never

    State: M like the parameter, in float32 at least, and "packed" in float64, see `unpack`. The
    kernel takes contiguous pairs in float32, float16 and bfloat16 up to rank 64 and never waits for
    the device. A factor without gradient does not move; one whose gradient or its square is not
    finite does not either, for that step, and counts as skipped.
    ValueError: an option out of range, a parameter without its partner, a device without float64.
    """

    capturable = True
    clips_gradients = False  # a clip of the raw gradients depends on how Z is factored

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, *, clip=1.0, skip=0.0,
        weight_decay=0.0, escape=False, own_count=False, use_kernel=None,
    ):  # fmt: skip
        if use_kernel and kernel is None:
            raise ValueError("the kernel of LoRA-RITE needs Triton: pip install triton")
        self.use_kernel = use_kernel
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip": clip,
            "skip": skip,
            "weight_decay": weight_decay,
            "escape": escape,
            "own_count": own_count,
            "pair": False,
        }
        super().__init__(params, defaults)

    def __getstate__(self):
        return {**super().__getstate__(), "use_kernel": self.use_kernel}

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_options(group)
        if not group["pair"] or len(group["params"]) % 2:
            raise ValueError(
                "LoRA-RITE trains adapters in pairs A, B and nothing else; give it those of "
                "--adapter lora_rite"
            )
        for A, B in pairs_of(group):
            if (
                A.dim() != 2
                or B.dim() != 2
                or A.shape[0] != B.shape[1]
                or not A.numel() * B.numel()
            ):
                raise ValueError(
                    f"{tuple(A.shape)} and {tuple(B.shape)} are no pair A (r, n), B (m, r)"
                )
            if A.device.type == "mps":
                raise ValueError(
                    "LoRA-RITE needs float64 for its r x r matrices, which mps does not have; "
                    "use the CPU"
                )

    def get_state(self, p, rank):
        """Return the state of p, created when first needed, and moved if p was moved or cast."""
        state = self.state[p]
        dtype = torch.promote_types(p.dtype, torch.float32)
        if not state:
            state["M"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
            state["packed"] = torch.zeros(2 * rank * rank + 5, dtype=torch.float64, device=p.device)
            unpack(state["packed"], rank).shrink.fill_(1)
        state["M"] = state["M"].to(p.device, dtype).contiguous()
        state["packed"] = state["packed"].to(p.device, torch.float64).contiguous()
        return state

    def batches(self):
        """Return [(group, [A, B, A, B, ...], is_fused)] of the pairs with gradients.

        The kernel takes all pairs of a rank at once, PyTorch those of equal shape.
        """
        found = {}
        for n, group in enumerate(self.param_groups):
            for A, B in pairs_of(group):
                if A.grad is None and B.grad is None:
                    continue
                if kernel is None and A.is_cuda:
                    warnings.warn("LoRA-RITE runs in PyTorch, which is slower: pip install triton")
                wanted = A.is_cuda if self.use_kernel is None else self.use_kernel
                is_fused = wanted and kernel is not None and kernel.takes(A, B)
                key = (n, is_fused, A.device, A.dtype, A.shape[0])
                if not is_fused:
                    key += (A.shape, B.shape, B.dtype)
                found.setdefault(key, (group, [], is_fused))[1].extend([A, B])
        return list(found.values())

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # first half: Gram matrices, and the norm of the unmagnified gradients of all pairs
        halves = []
        for group, parameters, is_fused in self.batches():
            states = []
            for A, B in zip(parameters[::2], parameters[1::2]):
                states += [self.get_state(A, len(A)), self.get_state(B, len(A))]
            first, second = (kernel.measure, kernel.finish) if is_fused else (measure, finish)
            halves.append((group, first(parameters, states, group["skip"]), second))
        if not halves:
            return loss
        device = halves[0][1].norm_squared.device
        total = sum(measured.norm_squared.to(device) for _, measured, _ in halves)

        # second half
        names = ("clip", "lr", "betas", "eps", "weight_decay", "escape", "own_count")
        for group, measured, second in halves:
            second(measured, total, **{name: group[name] for name in names})
        return loss

    def load_state_dict(self, state_dict):
        """Like any optimizer's, but torch would cast the float64 state to the parameter's dtype."""
        given = {}  # what is loaded, after the user's own hooks

        def check(_, state_dict):
            given.update(state_dict)
            for p, rank, state in self.match(given):
                check_state(state, p, rank)

        def restore(_):
            for p, _, state in self.match(given):
                M = torch.empty_like(
                    p, dtype=state["M"].dtype, memory_format=torch.contiguous_format
                )
                packed = torch.empty(state["packed"].shape, dtype=torch.float64, device=p.device)
                self.state[p] = {"M": M.copy_(state["M"]), "packed": packed.copy_(state["packed"])}

        last = self.register_load_state_dict_pre_hook(check)
        first = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def match(self, state_dict):
        """Return [(parameter, rank, its state in `state_dict`)] for the parameters with a state."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        pairs = [pair for group in self.param_groups for pair in pairs_of(group)]
        parameters = [(p, len(A)) for A, B in pairs for p in (A, B)]
        states = state_dict["state"]
        return [(p, rank, states[i]) for i, (p, rank) in zip(ids, parameters) if states.get(i)]


def pairs_of(group):
    return zip(group["params"][::2], group["params"][1::2])


def optimizer(
    groups, lr, *, beta1=0.9, beta2=0.999, eps=1e-6, clip=1.0, skip=0.0, escape=False,
    own_count=False,
):  # fmt: skip
    """LoRA-RITE for --optim lora_rite; the groups are those of `adapt`."""
    betas = (beta1, beta2)
    return LoRARITE(
        groups, lr, betas, eps, clip=clip, skip=skip, escape=escape, own_count=own_count
    )


def main(argv=None):
    """Measure the drift under reparametrisation; see experiments/lora_rite.py."""
    from experiments import lora_rite as study

    return study.main(argv)


if __name__ == "__main__":
    from support.cli import run_main

    run_main(main)
