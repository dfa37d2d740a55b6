"""LoRA-RITE, an optimizer that does not care how LoRA's Z = B A is factored.

Yen, Si, Meng, Yu, Duvvuri, Dhillon, Hsieh and Kumar, ICLR 2025, arXiv
2410.20625.

LoRA freezes a weight W and trains a low-rank update Z = B A, with A (r, n) and
B (m, r). Many pairs of factors have the same product: B C and C^-1 A, for every
invertible matrix C (r, r). Adam and LoRA+ change Z differently for each of
these pairs. LoRA-RITE changes it in the same way for all of them.

Let a = A^T (n, r) and b = B (m, r), with gradients ga and gb. First, let r = 1.
If we double b and halve a, then Z = b a^T is the same, and ga doubles. So the
quotient h = ga / |b| does not depend on this choice. LoRA-RITE computes Adam's
moments from h, with a step M as the result, and subtracts lr M / |b| from a.
Then Z changes by -lr (b / |b|) M^T, which does not depend on the choice either.

For any r, write b = Ub Rb (QR decomposition). The columns of Ub (m, r) are an
orthonormal basis in place of b / |b|, and Rb (r, r) takes the place of |b|. If
B C replaces B, the basis is rotated, but spans the same space. A step of a is

    h = ga Rb^-1                           the "unmagnified" gradient, (n, r)
    P = Ub^T Ub,old                        moves V, M to the new basis, (r, r)
    V <- d2 P V P^T + (1 - d2) h^T h / n   second moment, (r, r)
    S = (V + rho I)^1/2 + eps I            Adam's denominator, (r, r)
    M <- d1 M P^T + (1 - d1) h S^-1        first moment, (n, r)
    a <- a - lr (M Rb^-T + weight_decay a)

The update of b is the same with the letters exchanged. Both use a and b as they
were before the step. The decays d1 and d2 approach beta1 and beta2.

Before that, h is clipped: scaled by min(1, clip / |h|), where |h| is the norm
over both factors of all pairs. Clipping the raw gradients would break the
invariance. rho is 0, unless escape=True: then it is the "escaped mass", a
running sum with decay d2 of what V loses in P V P^T, if the new basis spans
another space than the old one.

Where we depart from the paper:
- We compute no QR decomposition and store no U. Any Rb with Rb^T Rb = b^T b
  will do. We take the Cholesky factor of b^T b or, if b is zero or
  rank-deficient, its symmetric root. As Ub = b Rb^-1, all (r, r) matrices above
  follow from such Gram matrices, in float64. See `projection` for P.
- The released code skips steps with a large h. This stops training if the loss
  is multiplied by 1e3, so we do not skip them.
- The paper's algorithm has the escaped mass. By default we leave it out, as the
  released code does.

Start with B = 0 or with factors of ordinary size. The step of A, lr M Rb^-T, is
inversely proportional to the size of B. With a tiny B, the product of the first
steps of B and A is huge, about lr^2 / (|A| |B|). clip does not prevent that: it
limits gradients and not steps.

On a GPU, kernels/lora_rite.py steps all pairs in four launches. To use
LoRA-RITE in another project, copy both files.

    python lora_rite.py             the drift under reparametrisation
    python train.py --init DIR --adapter lora_rite:rank=16 --optim lora_rite
"""

if __name__ == "__main__":
    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

import math
import warnings
from typing import NamedTuple

import torch

try:
    from kernels import lora_rite as kernel
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernel = None

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_PLANS = 16  # cached, see LoRARITE.find_batches; gradients alternate between a few addresses

# --------------------------------------------------------------------------------------------------
# The algorithm as the paper writes it


def decay(beta, t):
    """Return Adafactor's decay at step t = 1, 2, ...

    It is 0 at t = 1 and approaches beta, so the moments need no bias correction.
    """
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def reference(pairs, states, t, lr, betas, eps, clip=0.0, weight_decay=0.0, escape=False):
    """Take step t = 1, 2, ... with QR decompositions. Slow; for tests, in float64.

    pairs: a list of (a, b, ga, gb), where a (n, r) is A^T, b (m, r) is B, and ga and gb are their
        gradients.
    states: for each pair two dicts, empty before the first step and updated in place.
    Returns a list of the new (a, b).
    """
    d1 = decay(betas[0], t)
    d2 = decay(betas[1], t)

    # unmagnified gradient h of each factor x, from the other factor y of its pair
    factors = []
    for (a, b, ga, gb), (state_a, state_b) in zip(pairs, states):
        for x, grad, y, state in ((a, ga, b, state_a), (b, gb, a, state_b)):
            U, R = torch.linalg.qr(y)  # U has the shape of y, R is (r, r)
            R_inv = torch.linalg.pinv(R)
            h = grad @ R_inv  # the shape of x
            factors.append((x, h, U, R_inv, state))
    norm = torch.stack([h.norm() for _, h, *_ in factors]).norm()

    new_factors = []
    for x, h, U, R_inv, state in factors:
        if clip:
            h = h * min(1.0, clip / norm)

        # move the second moment V into the basis of this step; rho collects what it loses
        P = U.T @ state.get("U", U)  # (r, r); the identity at t = 1
        V_old = state.get("V", torch.zeros_like(P))
        V = P @ V_old @ P.T
        rho = state.get("rho", 0.0)
        if escape:
            lost = torch.linalg.eigvalsh(V_old) - torch.linalg.eigvalsh(V)  # (r,)
            lost = torch.minimum(lost.max(), lost.sum())  # the largest one, or the trace
            rho = d2 * (rho + lost.clamp(min=0))

        # second moment V
        V = d2 * V + (1 - d2) * h.T @ h / len(h)

        # preconditioner ((V + rho)^1/2 + eps)^-1; eigenvalues below 0 are rounding errors
        w, Q = torch.linalg.eigh(V)  # V = Q diag(w) Q^T
        root = (w.clamp(min=0) + rho).sqrt()
        preconditioner = Q @ torch.diag(1 / (root + eps)) @ Q.T

        # first moment M and the step
        M_old = state.get("M", torch.zeros_like(h))
        M = d1 * M_old @ P.T + (1 - d1) * h @ preconditioner
        new_factors.append(x - lr * (M @ R_inv.T + weight_decay * x))
        state.update(U=U, V=V, M=M, rho=rho)
    return list(zip(new_factors[0::2], new_factors[1::2]))  # they are a, b, a, b, ...


# --------------------------------------------------------------------------------------------------
# The same step from Gram matrices such as x^T x (r, r), for N pairs of equal shape at once


class FactorState(NamedTuple):
    """What factors x (A^T or B) keep from step to step, in float64, besides M."""

    V: torch.Tensor  # (..., r, r) second moment of the unmagnified gradient
    R_inv: torch.Tensor  # (..., r, r) R^-1, where R^T R = x^T x before the last step
    rho: torch.Tensor  # (..., 1, 1) escaped mass
    step: torch.Tensor  # (..., 1, 1) number of steps so far
    lr: torch.Tensor  # (..., 1, 1) learning rate of the last step, 0 if x was not updated
    shrink: torch.Tensor  # (..., 1, 1) 1 - lr * weight_decay of the last step
    skipped: torch.Tensor  # (..., 1, 1) number of gradients skipped because they were not finite


def unpack(packed, rank):
    """Return a FactorState of views into packed (..., 2 r^2 + 5).

    Each row of `packed` is one factor: V and R_inv with r^2 numbers each, then the five scalars.
    """
    matrices = packed[..., :-5].unflatten(-1, (2, rank, rank))  # (..., 2, r, r): V and R_inv
    numbers = packed[..., -5:, None, None]  # (..., 5, 1, 1)
    return FactorState(*matrices.unbind(-3), *numbers.unbind(-3))


def inverse_root(K):
    """Return R^-1 (..., r, r), where R^T R = K, for Gram matrices K (..., r, r).

    R is the Cholesky factor. Where K is close to singular, R^-1 is the symmetric root Q w^-1/2 Q^T
    instead, without the eigenvalues w below 1e-12 of the largest.
    """
    # Cholesky decomposition. It is accurate unless a pivot is much smaller than another one.
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    R, info = torch.linalg.cholesky_ex(K, upper=True)
    pivots = R.diagonal(dim1=-2, dim2=-1)  # (..., r)
    is_well_conditioned = pivots.amin(-1) > 1e-7 * pivots.amax(-1)
    is_accurate = ((info == 0) & is_well_conditioned)[..., None, None]  # (..., 1, 1)
    by_cholesky = torch.linalg.solve_triangular(R, eye, upper=True)  # solves R R^-1 = I

    # eigendecomposition, with eigenvalues w in ascending order
    w, Q = torch.linalg.eigh(K)  # (..., r), (..., r, r)
    is_kept = w > 1e-12 * w[..., -1:]
    w_inv_root = torch.where(is_kept, w.rsqrt(), 0)  # without 1 / sqrt(0)
    by_eigenvalues = Q * w_inv_root[..., None, :] @ Q.mT
    return torch.where(is_accurate, by_cholesky, by_eigenvalues)


def projection(Ry_inv, yy, yM, x_old, y_old):
    """Return P = U^T U_old (..., r, r), which moves V and M of a factor x into the new basis.

    The basis is U, from the QR decomposition y = U Ry of the partner y. It was U_old before the
    last step. yy = y^T y; yM = y^T M, where M is the first moment of y. x_old and y_old are the
    FactorStates after the last step, with Rx_old^-1 and Ry_old^-1. As U = y Ry^-1,

        P = Ry^-T (y^T y_old) Ry_old^-1

    We do not store y_old, but the last step was y = shrink y_old - lr M Rx_old^-T. Multiply by y^T:

        shrink (y^T y_old) = y^T y + lr (y^T M) Rx_old^-T
    """
    shrink_yy_old = yy + y_old.lr * yM @ x_old.R_inv.mT
    return Ry_inv.mT @ shrink_yy_old @ y_old.R_inv / y_old.shrink


def tall(tensors):
    """Split a list, all A (r, n) and then all B (m, r), into those of all A^T, views, and all B."""
    N = len(tensors) // 2
    return [A.mT for A in tensors[:N]], tensors[N:]


def gram(xs, ys):
    """Return x^T y of each factor in float64, (2, N, r, r). xs, ys: [all A^T, all B] each."""
    return torch.stack([x.double().mT @ y.double() for x, y in zip(xs, ys)])


class TorchBatch:
    """Pairs of equal shape, dtype and device, which take their steps together, in PyTorch.

    parameters: [A (r, n), B (m, r), A, B, ...]
    states: for each {"M": the first moment in this shape, "packed": a FactorState, see `unpack`}.

    Clipping needs the norm over the pairs of all batches, so a step has two halves: `measure` on
    every batch, then `finish` on every batch. kernel.KernelBatch has the same two methods.

    x is a factor as a tall matrix (rows, r): A^T (n, r) or B (m, r). y is its partner, the other
    factor of the pair. A list of two tensors has a tall matrix for each x: all A^T (N, n, r), then
    all B (N, m, r). One tensor (2, N, r, r) has an (r, r) matrix for each x: index 0 is for the A,
    index 1 for the B. In its flip(0), the place of each x has the matrix of its partner y.
    """

    def __init__(self, parameters, states):
        self.parameters = parameters[0::2] + parameters[1::2]  # all A, then all B
        self.states = states[0::2] + states[1::2]
        A, B = parameters[:2]
        # rows of x: n for each A^T, m for each B
        self.rows = torch.tensor([A.shape[1], B.shape[0]], device=A.device).view(2, 1, 1, 1)
        has_grad = [p.grad is not None for p in self.parameters]
        self.has_grad = torch.tensor(has_grad, device=A.device).view(2, -1, 1, 1)

    def measure(self):
        """Return |h|^2 summed over these pairs, where h = grad Ry^-1 are unmagnified gradients."""
        # stack x, M and the gradients; a missing gradient counts as 0
        moments = [state["M"] for state in self.states]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.x = [torch.stack(ts) for ts in tall(self.parameters)]
        self.M = [torch.stack(ts) for ts in tall(moments)]
        self.grad = [torch.stack(ts) for ts in tall(grads)]

        # Rx^-1, where Rx^T Rx = x^T x, which must be finite for eigendecompositions
        xx = gram(self.x, self.x).nan_to_num(0, posinf=0, neginf=0)
        xM = gram(self.x, self.M).nan_to_num(0, posinf=0, neginf=0)
        self.Rx_inv = inverse_root(xx)
        Ry_inv = self.Rx_inv.flip(0)  # of the partner

        # h^T h = Ry^-T (grad^T grad) Ry^-1, or 0 where the gradient or its square is not finite
        hh = Ry_inv.mT @ gram(self.grad, self.grad) @ Ry_inv
        norms = hh.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]  # |h|^2, (2, N, 1, 1)
        self.is_finite = norms.isfinite()  # inf and NaN reach the trace, as 0 * inf is NaN
        self.hh = torch.where(self.is_finite, hh, 0)

        # P, from the states of x and y after the last step
        packed = torch.stack([state["packed"] for state in self.states]).unflatten(0, (2, -1))
        self.old = unpack(packed, rank=xx.shape[-1])
        y_old = unpack(packed.flip(0), rank=xx.shape[-1])
        self.P = projection(Ry_inv, xx.flip(0), xM.flip(0), self.old, y_old)

        norms_A, norms_B = torch.where(self.is_finite, norms, 0)
        return norms_A.sum() + norms_B.sum()

    def finish(self, total, lr, betas, eps, clip, weight_decay, escape):
        """Update the parameters and their states.

        total: |h|^2 of all pairs. clip: limit on |h|; 0: no limit. lr: a number or a tensor ().
        """
        norm = total.to(self.P.device).sqrt()
        clip = clip or math.inf
        h_scale = torch.where(norm > clip, clip / norm, 1.0)  # ()
        old = self.old
        step = old.step + 1  # (2, N, 1, 1)
        d1 = decay(betas[0], step)
        d2 = decay(betas[1], step)

        # move the second moment V into the basis of this step; rho collects what it loses
        V = self.P @ old.V @ self.P.mT  # (2, N, r, r)
        rho = old.rho
        if escape:
            lost = torch.linalg.eigvalsh(old.V) - torch.linalg.eigvalsh(V)  # (2, N, r)
            lost = torch.minimum(lost.amax(-1), lost.sum(-1))  # the largest one, or the trace
            rho = d2 * (rho + lost.clamp(min=0)[..., None, None])

        # second moment V = d2 P V P^T + (1 - d2) h^T h / rows, where h is clipped
        V = d2 * V + (1 - d2) * h_scale**2 * self.hh / self.rows

        # preconditioner ((V + rho)^1/2 + eps)^-1, where V = Q diag(w) Q^T
        w, Q = torch.linalg.eigh((V + V.mT) / 2)  # (2, N, r), (2, N, r, r)
        root = (w[..., None, :].clamp(min=0) + rho).sqrt()  # (2, N, 1, r)
        preconditioner = Q * (1 / (root + eps)) @ Q.mT

        # learning rate; 0 where the gradient is missing or not finite, so x stays as it is
        lr = torch.as_tensor(lr, dtype=torch.float64, device=V.device)
        lr = torch.where(self.is_finite & self.has_grad, lr, 0.0)  # (2, N, 1, 1)
        shrink = 1 - lr * weight_decay

        # first moment M = d1 M P^T + (1 - d1) h preconditioner, and x = shrink x - lr M Ry^-T.
        # With h = h_scale grad Ry^-1, multiply the (r, r) matrices first, in float64.
        Ry_inv = self.Rx_inv.flip(0)
        M_matrix = d1 * self.P.mT
        grad_matrix = (1 - d1) * h_scale * Ry_inv @ preconditioner
        x_matrix = lr * Ry_inv.mT
        moments = tall([state["M"] for state in self.states])
        parameters = tall(self.parameters)
        for i in (0, 1):  # all A, then all B
            M = self.M[i]  # (N, rows, r)
            dtype = M.dtype
            grad = torch.where(self.is_finite[i], self.grad[i], 0).to(dtype)
            with torch.autocast(M.device.type, enabled=False):  # it would round to bfloat16
                M = M @ M_matrix[i].to(dtype) + grad @ grad_matrix[i].to(dtype)
                x = shrink[i].to(dtype) * self.x[i].to(dtype) - M @ x_matrix[i].to(dtype)
            torch._foreach_copy_(moments[i], list(M))
            torch._foreach_copy_(parameters[i], list(x))

        # state
        skipped = old.skipped + ~self.is_finite
        state = FactorState(V, self.Rx_inv, rho, step, lr, shrink, skipped)
        packed = torch.cat([field.flatten(-2) for field in state], -1)  # as `unpack` reads it
        torch._foreach_copy_([s["packed"] for s in self.states], list(packed.flatten(0, 1)))

        # free this memory until the next step
        del self.x, self.M, self.grad, self.Rx_inv, self.hh, self.is_finite, self.old, self.P


# --------------------------------------------------------------------------------------------------
# The optimizer


def pairs_of(group):
    """Return the pairs (A, B) of a parameter group."""
    return list(zip(group["params"][0::2], group["params"][1::2]))


def check_options(group):
    """Raise ValueError if an option of a parameter group is out of range."""
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas are {group['betas']}; they must be from 0 to below 1")
    if not 0 < group["eps"] < math.inf:
        raise ValueError(f"eps is {group['eps']}; it must be above 0")
    for name in ("lr", "clip", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} is {group[name]}; it must be at least 0")


def new_state(p, rank):
    """Return the state of p before its first step: M, and a FactorState as the tensor "packed"."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    packed = torch.zeros(2 * rank * rank + 5, dtype=torch.float64, device=p.device)
    unpack(packed, rank).shrink.fill_(1)  # a view: it sets this number in `packed`
    return {"M": torch.zeros(p.shape, dtype=dtype, device=p.device), "packed": packed}


def is_valid_state(saved, rank, expected):
    """Return whether a saved state has the names, shapes and ranges of the `expected` one."""
    if not isinstance(saved, dict) or saved.keys() != expected.keys():
        return False
    for name, t in saved.items():
        if not torch.is_tensor(t) or t.layout != torch.strided or t.is_meta:
            return False
        if t.shape != expected[name].shape or t.dtype not in FLOATS or not t.isfinite().all():
            return False
    numbers = unpack(saved["packed"], rank)
    is_negative = min(numbers.rho, numbers.step, numbers.lr, numbers.skipped) < 0
    return not is_negative and numbers.shrink != 0


@torch.no_grad()
def copy_state(p, rank, saved):
    """Return a copy of the saved state of p, in the dtypes and on the device of a new one."""
    state = new_state(p, rank)
    if not is_valid_state(saved, rank, state):
        raise ValueError(
            f"the state of a factor {tuple(p.shape)} is not one of LoRA-RITE at rank {rank}"
        )
    for name, tensor in state.items():
        tensor.copy_(saved[name])
    return state


class LoRARITE(torch.optim.Optimizer):
    """LoRA-RITE for groups {"params": [A, B, A, B, ...], "pair": True} with A (r, n), B (m, r).

    eps           added to the root of the second moment of the unmagnified gradient
    clip          limit on the norm of the unmagnified gradients of all pairs; 0: no limit
    weight_decay  decoupled, x -= lr weight_decay x
    escape        add the escaped mass rho to all eigenvalues of the second moment
    use_kernel    None: for CUDA tensors; True: on a CPU, too (interpreted); False: never

    The state of a parameter is "M" in float32 or float64, and "packed": the numbers of its
    FactorState as one float64 tensor.
    The kernel supports contiguous float32, float16 and bfloat16 pairs of up to rank 64.

    A factor is not updated if its gradient is missing, or if the gradient or its square is not
    finite. The FactorState counts the latter as skipped.

    Raises ValueError if an option is out of range or a parameter has no partner.
    """

    clips_gradients = False  # the norm of raw gradients depends on how Z is factored

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, *, clip=1.0, weight_decay=0.0,
        escape=False, use_kernel=None,
    ):  # fmt: skip
        if use_kernel and kernel is None:
            raise ValueError("the kernel of LoRA-RITE needs Triton: pip install triton")
        self.use_kernel = use_kernel
        self.plans = {}  # {addresses of all tensors: the batches of a step}
        self.captured_plans = []  # CUDA graphs read these at each replay, so they are never freed
        defaults = {"lr": lr, "betas": betas, "eps": eps, "clip": clip}
        defaults.update(weight_decay=weight_decay, escape=escape, pair=False)
        super().__init__(params, defaults)

    def __getstate__(self):  # copy.deepcopy and pickle skip __init__; a copy has empty caches
        own = {"use_kernel": self.use_kernel, "plans": {}, "captured_plans": []}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_options(group)
        if not group["pair"] or len(group["params"]) % 2:
            raise ValueError("LoRA-RITE trains factors in pairs A, B only: use --adapter lora_rite")
        for A, B in pairs_of(group):
            fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]
            if not fits or 0 in (*A.shape, *B.shape):
                shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
                raise ValueError(f"{shapes} are no pair A (r, n), B (m, r)")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # Gram matrices, and the squared norm of the unmagnified gradients of all pairs
        batches = self.find_batches()
        if not batches:
            return loss
        norms_squared = [batch.measure() for _, batch in batches]
        total = sum(t.to(norms_squared[0].device) for t in norms_squared)

        # moments and parameters
        for group, batch in batches:
            names = ("lr", "betas", "eps", "clip", "weight_decay", "escape")
            batch.finish(total, **{name: group[name] for name in names})
        return loss

    def load_state_dict(self, state_dict):
        """Load a copy of a state as torch.optim.Adam does, hooks included, with its own dtypes.

        PyTorch would cast it to the dtype of the parameters. Raises ValueError if it does not fit.
        """
        states = {}  # parameter: state

        def copy_states(_, saved):
            for group, saved_group in zip(self.param_groups, saved["param_groups"]):
                # A (r, n), B (m, r), A, B, ...; PyTorch has checked that there are as many
                for i, (p, index) in enumerate(zip(group["params"], saved_group["params"])):
                    rank = p.shape[0] if i % 2 == 0 else p.shape[1]
                    if saved["state"].get(index):
                        states[p] = copy_state(p, rank, saved["state"][index])

        def install_states(_):
            self.state.update(states)
            self.plans = {}  # the cached batches hold the tensors of the state before

        # copy after the user's pre-hooks, which may change state_dict; install before post-hooks
        pre_hook = self.register_load_state_dict_pre_hook(copy_states)
        post_hook = self.register_load_state_dict_post_hook(install_states, prepend=True)
        with pre_hook, post_hook:  # removes both at the end
            super().load_state_dict(state_dict)

    # -- batches: which pairs are stepped together ------------------------------------------------

    def find_batches(self):
        """Return the batches of this step, from the cache unless a tensor has moved."""
        is_capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        batches = self.plans.get(self.addresses())
        if batches is None and is_capturing:
            raise RuntimeError("a tensor has moved since prepare(), so the step cannot be captured")
        if batches is None:
            batches = self.make_batches()
            self.plans[self.addresses()] = batches  # make_batches may have allocated states
            if len(self.plans) > MAX_PLANS:
                del self.plans[next(iter(self.plans))]  # the oldest
        if is_capturing:
            self.captured_plans.append(batches)
        return batches

    def addresses(self):
        """Return the addresses and layouts of all tensors of a step, the key of a plan."""
        key = [self.use_kernel]
        for group in self.param_groups:
            for p in group["params"]:
                key += (p.data_ptr(), p.shape, p.dtype, p.is_contiguous())
                if p.grad is not None:
                    key += (p.grad.data_ptr(), p.grad.dtype, p.grad.is_contiguous())
                for t in self.state.get(p, {}).values():
                    key.append(t.data_ptr())
        return tuple(key)

    def make_batches(self):
        """Return a list of (group, batch) that covers all pairs with gradients.

        The pairs of a batch are of one group and rank; in a TorchBatch, they have equal shapes too.
        """
        batches = []
        for group in self.param_groups:
            batch_parameters = {}  # {what the pairs of a batch share: [A, B, A, B, ...]}
            for A, B in pairs_of(group):
                if A.grad is None and B.grad is None:
                    continue
                Batch = kernel.KernelBatch if self.uses_kernel(A, B) else TorchBatch
                key = (Batch, A.device, A.dtype, len(A))
                if Batch is TorchBatch:
                    key += (A.shape, B.shape, B.dtype)
                batch_parameters.setdefault(key, []).extend([A, B])
                self.init_state(A, len(A))
                self.init_state(B, len(A))

            for (Batch, *_), parameters in batch_parameters.items():
                states = [self.state[p] for p in parameters]
                batches.append((group, Batch(parameters, states)))
        return batches

    def uses_kernel(self, A, B):
        """Return whether a pair is stepped by the kernels; else PyTorch does it."""
        if kernel is None and A.is_cuda:
            warnings.warn("LoRA-RITE runs in PyTorch, which is slower: pip install triton")
        wants_kernel = A.is_cuda if self.use_kernel is None else self.use_kernel
        return wants_kernel and kernel is not None and kernel.supports(A, B)

    def init_state(self, p, rank):
        """Create the state of p if needed. The kernel needs it on p's device in these dtypes."""
        state = self.state[p]
        for name, tensor in new_state(p, rank).items():
            state[name] = state.get(name, tensor).to(tensor).contiguous()

    # -- for train.py, which captures steps as CUDA graphs ----------------------------------------

    @property
    def capturable(self):
        """Whether a CUDA graph can capture step(). It can if the kernels step all pairs."""
        pairs = [pair for group in self.param_groups for pair in pairs_of(group)]
        return all(self.uses_kernel(A, B) for A, B in pairs)

    def prepare(self):
        """Build the batches of the next step: a capture of it could not copy their tables."""
        self.find_batches()


# --------------------------------------------------------------------------------------------------
# What --optim lora_rite and --adapter lora_rite call


def optimizer(groups, lr, *, beta1=0.9, beta2=0.999, eps=1e-6, clip=1.0, escape=False):
    """Build LoRA-RITE for --optim lora_rite; groups: the parameter groups from `adapt`.

    eps: added to the root of the second moment.
    clip: limit on the norm of the unmagnified gradients of all pairs; 0: no limit.
    escape: add the escaped mass to the second moment.
    """
    return LoRARITE(groups, lr, (beta1, beta2), eps, clip=clip, escape=escape)


def adapt(
    model, *, rank=16, alpha=0.0, targets="q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj"
):
    """Put LoRA adapters on linear layers, freeze all else, and return the parameter groups.

    targets: ends of layer names, joined by "+", as patterns where * matches anything and [01]
        matches 0 or 1. "q_proj+layers.0.mlp.*" selects all q_proj, and the MLP of layer 0.
    alpha: the adapter's output is multiplied by alpha / rank; 0 means a factor of 1.
    """
    from support import lora

    lora.inject(model, rank, alpha or None, targets.split("+"), seed=torch.initial_seed())
    return lora.adapter_groups(model)


def merge(model):
    """Add each adapter to its layer's weight and remove it. Returns the model."""
    from support import lora

    return lora.merge(model)


def main(argv=None):
    """Measure the drift under reparametrisation; see experiments/lora_rite.py."""
    from experiments import lora_rite as study

    return study.main(argv)


if __name__ == "__main__":
    cli.run_main(main)
