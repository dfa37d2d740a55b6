"""LoRA-RITE: an optimizer for LoRA that does not depend on how Z = B A is
factored.

Yen, Si, Meng, Yu, Duvvuri, Dhillon, Hsieh and Kumar, ICLR 2025, arXiv
2410.20625.

LoRA (support/lora.py) freezes a weight W and trains a low-rank update Z = B A,
with A (r, n) and B (m, r). For every invertible (r, r) matrix C, the factors
B C and C^-1 A have the same product, yet Adam and LoRA+ change Z differently
for each C. LoRA-RITE makes the same change for all.

Let a = A^T and b = B, with gradients ga and gb, and take their QR
decompositions a = Ua Ra and b = Ub Rb. The gradient of each factor is expressed
in the orthonormal basis U of the other factor. There, C leaves at most a
rotation. Step t = 1, 2, ... of a (for b, exchange the letters):

    h = ga Rb^-1             the "unmagnified" gradient, dL/dZ^T Ub, (n, r)
    P = Ub^T Ub,old          moves V and M into the new basis, (r, r)
    V = d2 P V P^T + (1 - d2) h^T h / n                 second moment, (r, r)
    M = d1 M P^T + (1 - d1) h ((V + rho)^1/2 + eps)^-1  first moment, (n, r)
    a <- a - lr (M Rb^-T + weight_decay a)              Rb: before b's step

    d1, d2 = beta (1 - beta^(t-1)) / (1 - beta^t) for beta1 and beta2

h is first scaled by min(1, clip / |h|), where |h| is the norm over both factors
of all pairs. Clipping the raw gradients instead would break the invariance. rho
(the "escaped mass", off by default as in the released recipe) adds back what V
loses when it moves between bases.

Where we depart from the paper:
- No QR decomposition, and U is not stored: every (r, r) matrix above follows
  from Gram matrices (such as b^T b) in float64. Rb may be any matrix with
  Rb^T Rb = b^T b: the Cholesky factor or, if b is zero or rank-deficient, the
  symmetric root. P needs the old b, which is b with the last step undone.
- The released code skips steps with a large h, which stops training if the loss
  is multiplied by 1e3. We do not skip them.
- The released code takes roots of slightly negative eigenvalues. We clamp them
  to 0.

Start with B = 0 or with factors of ordinary size. The step of A, lr M Rb^-T, is
inversely proportional to the size of B, so with a tiny B the first steps of Z
are huge: about lr^2 / |B|. clip limits gradients, not steps.

On a GPU, kernels/lora_rite.py steps all pairs in four launches; elsewhere,
PyTorch does. To use the optimizer in another project, copy these two files.

    python lora_rite.py             the drift between factorizations
    python train.py --init DIR --adapter lora_rite:rank=16 --optim lora_rite
"""

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
MAX_PLANS = 16  # cached; the allocator tends to put gradients at one of a few addresses

# --------------------------------------------------------------------------------------------------
# The algorithm as the paper writes it


def decay(beta, t):
    """Return Adafactor's decay. It is 0 at t = 1, so moments need no bias correction."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def reference(pairs, states, t, lr, betas, eps, clip=0.0, weight_decay=0.0, escape=False):
    """Take step t = 1, 2, ... by QR decompositions. Slow; for tests, in float64.

    pairs: a list of (a (n, r), b (m, r), ga, gb); ga and gb are the gradients.
    states: for each pair two dicts, empty before the first step and updated in place.
    Returns a list of the new (a, b).
    """
    d1 = decay(betas[0], t)
    d2 = decay(betas[1], t)

    # h (n or m, r), the unmagnified gradient, and its norm over all factors
    factors = []
    norm_squared = 0.0
    for (a, b, ga, gb), (state_a, state_b) in zip(pairs, states):
        Ua, Ra = torch.linalg.qr(a)  # (n, r), (r, r)
        Ub, Rb = torch.linalg.qr(b)
        Ra_inv = torch.linalg.pinv(Ra)  # (r, r)
        Rb_inv = torch.linalg.pinv(Rb)
        ha = ga @ Rb_inv
        hb = gb @ Ra_inv
        factors.append((a, ha, Ub, Rb_inv, state_a))
        factors.append((b, hb, Ua, Ra_inv, state_b))
        norm_squared = norm_squared + ha.square().sum()
        norm_squared = norm_squared + hb.square().sum()

    new_factors = []
    for x, h, U, R_inv, state in factors:  # x: a or b; U and R_inv: of the other factor
        if clip:
            h = h * min(1.0, clip / norm_squared.sqrt())

        # move the second moment V into the new basis; rho collects what it loses
        P = U.T @ state.get("U", U)  # (r, r)
        V_old = state.get("V", torch.zeros_like(P))
        V = P @ V_old @ P.T
        rho = state.get("rho", 0.0)
        if escape:
            most_lost = (torch.linalg.eigvalsh(V_old) - torch.linalg.eigvalsh(V)).max()
            trace_lost = V_old.trace() - V.trace()
            rho = d2 * (rho + torch.minimum(most_lost, trace_lost).clamp(min=0))

        # second moment V, preconditioner ((V + rho)^1/2 + eps)^-1, first moment M
        V = d2 * V + (1 - d2) * h.T @ h / len(h)
        w, Q = torch.linalg.eigh(V)  # V = Q diag(w) Q^T
        preconditioner = Q @ torch.diag(1 / ((w.clamp(min=0) + rho).sqrt() + eps)) @ Q.T
        M_old = state.get("M", torch.zeros_like(h))
        M = d1 * M_old @ P.T + (1 - d1) * h @ preconditioner
        state.update(U=U, V=V, M=M, rho=rho)
        new_factors.append(x - lr * (M @ R_inv.T + weight_decay * x))
    return list(zip(new_factors[0::2], new_factors[1::2]))


# --------------------------------------------------------------------------------------------------
# The same step from Gram matrices, for N pairs of equal shape at once


class FactorState(NamedTuple):
    """The state of N factors after a step, in float64, without the first moments M."""

    V: torch.Tensor  # (N, r, r) second moment, in the basis of the partner
    R_inv: torch.Tensor  # (N, r, r) R^-1, where R^T R = x^T x before the last step
    rho: torch.Tensor  # (N, 1, 1) escaped mass
    step: torch.Tensor  # (N, 1, 1) number of steps so far
    lr: torch.Tensor  # (N, 1, 1) learning rate of the last step, 0 if x was not updated
    shrink: torch.Tensor  # (N, 1, 1) 1 - lr * weight_decay of the last step
    skipped: torch.Tensor  # (N, 1, 1) number of gradients skipped because they were not finite


def unpack(packed, rank):
    """Return a FactorState of views into packed (N, 2 r^2 + 5): V, R_inv, then the 5 numbers."""
    V, R_inv = packed[..., :-5].unflatten(-1, (2, rank, rank)).unbind(-3)  # (N, r, r)
    numbers = packed[..., -5:, None, None].unbind(-3)  # 5 of (N, 1, 1)
    return FactorState(V, R_inv, *numbers)


def pack(state):
    """Return the fields of a FactorState as one tensor (N, 2 r^2 + 5)."""
    return torch.cat([field.flatten(-2) for field in state], -1)


def inverse_root(K):
    """Return R^-1 (N, r, r), where R^T R = K, for Gram matrices K (N, r, r).

    R is the Cholesky factor. Where K is close to singular, R^-1 is Q w^-1/2 Q^T instead, from the
    eigenvalues w and eigenvectors Q of K. Eigenvalues below 1e-12 of the largest are left out.
    """
    # by Cholesky decomposition, where the pivots show that it is accurate
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    R, info = torch.linalg.cholesky_ex(K, upper=True)
    pivots = R.diagonal(dim1=-2, dim2=-1)  # (N, r)
    is_accurate = (info == 0) & (pivots.amin(-1) > 1e-7 * pivots.amax(-1))
    is_accurate = is_accurate[:, None, None]
    R = torch.where(is_accurate, R, eye)
    by_cholesky = torch.linalg.solve_triangular(R, eye, upper=True)

    # by eigenvalues, in ascending order
    w, Q = torch.linalg.eigh(K)  # (N, r), (N, r, r)
    is_nonzero = w > 1e-12 * w[..., -1:]
    w_inv_root = torch.where(is_nonzero, torch.where(is_nonzero, w, 1).rsqrt(), 0)
    by_eigenvalues = Q * w_inv_root[..., None, :] @ Q.mT
    return torch.where(is_accurate, by_cholesky, by_eigenvalues)


def trace(matrices):
    """Return the traces (N, 1, 1) of matrices (N, r, r)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


class Factor:
    """One factor, A or B, of N pairs of equal shape. Its partner is the other factor of the pairs.

    x (N, rows, r) stands for either factor: A^T with n rows, or B with m rows.
    """

    def __init__(self, parameters, states, is_A):
        self.parameters = parameters  # N of A (r, n), or N of B (m, r)
        self.states = states  # {"M", "packed"} of each
        self.is_A = is_A
        rank = parameters[0].shape[0 if is_A else 1]

        # stack parameters, first moments and gradients; a missing gradient counts as 0
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.x = self.stack(parameters)  # (N, rows, r)
        self.M = self.stack([state["M"] for state in states])
        self.grad = self.stack(grads)
        has_grad = torch.tensor([p.grad is not None for p in parameters])[:, None, None]
        self.has_grad = has_grad.to(self.x.device, non_blocking=True)  # (N, 1, 1)
        packed = torch.stack([state["packed"] for state in states])
        self.old = unpack(packed, rank)  # FactorState after the last step

        # Gram matrices in float64, (N, r, r): xx = x^T x, xM = x^T M, gg = grad^T grad
        x = self.x.double()
        xx = x.mT @ x
        xM = x.mT @ self.M.double()
        self.xx = torch.where(xx.isfinite(), xx, 0)
        self.xM = torch.where(xM.isfinite(), xM, 0)
        self.gg = self.grad.double().mT @ self.grad.double()
        self.R_inv = inverse_root(self.xx)  # R^T R = x^T x

    def stack(self, tensors):
        """Return N tensors of the parameters' shape as (N, rows, r), in float32 or float64."""
        tall = [t.mT if self.is_A else t for t in tensors]
        return torch.stack(tall).to(self.states[0]["M"].dtype)

    def unmagnify(self, partner):
        """Set hh (N, r, r) to h^T h, where h = grad R^-1 with R of the partner. Return |h|^2, ().

        h^T h is 0 and is_finite is False where the gradient or its square is not finite.
        """
        is_finite = self.gg.isfinite().all((-2, -1), keepdim=True)  # (N, 1, 1)
        gg = torch.where(is_finite, self.gg, 0)
        hh = partner.R_inv.mT @ gg @ partner.R_inv
        self.is_finite = is_finite & trace(hh).isfinite()
        self.hh = torch.where(self.is_finite, hh, 0)
        return trace(self.hh).sum()

    def update(self, partner, h_scale, lr, betas, eps, weight_decay, escape):
        """Update the parameters and their states; h_scale (): the factor by which h is clipped."""
        old = self.old
        dtype = self.x.dtype
        step = old.step + 1
        d1 = decay(betas[0], step)  # (N, 1, 1)
        d2 = decay(betas[1], step)

        # P = U^T U_old = R^-T (x^T x_old) R_old^-1, (N, r, r), where U, R and x are the partner's.
        # The partner's last step was x = shrink x_old - lr M old.R_inv^T. Solved for x_old, it
        # gives x^T x_old = (x^T x + lr (x^T M) old.R_inv^T) / shrink.
        xx_old = partner.xx + partner.old.lr * partner.xM @ old.R_inv.mT  # times shrink
        P = partner.R_inv.mT @ xx_old @ partner.old.R_inv / partner.old.shrink

        # second moment V, and the escaped mass rho: what V loses when it moves between bases
        V = P @ old.V @ P.mT  # (N, r, r)
        rho = old.rho
        if escape:
            lost = torch.linalg.eigvalsh(old.V) - torch.linalg.eigvalsh(V)  # (N, r), ascending
            lost = torch.minimum(lost.amax(-1), lost.sum(-1)).clamp(min=0)
            rho = d2 * (rho + lost[:, None, None])
        V = d2 * V + (1 - d2) * h_scale**2 * self.hh / self.x.shape[1]

        # preconditioner ((V + rho)^1/2 + eps)^-1, from the eigenvalues w of V
        w, Q = torch.linalg.eigh((V + V.mT) / 2)  # (N, r), (N, r, r)
        scales = 1 / ((w[:, None, :].clamp(min=0) + rho).sqrt() + eps)  # (N, 1, r)
        preconditioner = Q * scales @ Q.mT

        # first moment M = M_old M_matrix + grad grad_matrix
        M_matrix = d1 * P.mT  # (N, r, r)
        grad_matrix = (1 - d1) * h_scale * partner.R_inv @ preconditioner
        grad = torch.where(self.is_finite, self.grad, 0)
        M = self.M @ M_matrix.to(dtype) + grad @ grad_matrix.to(dtype)  # (N, rows, r)

        # parameters: a factor without a finite gradient is not updated
        lr = torch.as_tensor(lr, dtype=torch.float64, device=V.device)  # a number or a tensor ()
        lr = torch.where(self.is_finite & self.has_grad, lr, 0.0)  # (N, 1, 1)
        shrink = 1 - lr * weight_decay
        x = shrink.to(dtype) * self.x - M @ (lr * partner.R_inv.mT).to(dtype)

        # write everything back
        skipped = old.skipped + ~self.is_finite
        state = FactorState(V, self.R_inv, rho, step, lr, shrink, skipped)
        if self.is_A:  # A is stored as (r, n)
            x = x.mT
            M = M.mT
        torch._foreach_copy_([s["packed"] for s in self.states], list(pack(state).unbind()))
        torch._foreach_copy_([s["M"] for s in self.states], list(M.unbind()))
        torch._foreach_copy_(self.parameters, list(x.unbind()))


class TorchBatch:
    """Pairs of equal shape, dtype and device, stepped in PyTorch. On a GPU: kernel.KernelBatch.

    parameters: [A (r, n), B (m, r), A, B, ...]; states: {"M", "packed"} for each. Call `measure`
    on all batches and then `finish`, since clipping needs the norm over all pairs.
    """

    def __init__(self, parameters, states):
        self.parameters = parameters
        self.states = states

    def measure(self):
        """Return |h|^2 of these pairs, (), where h are the unmagnified gradients."""
        A = Factor(self.parameters[0::2], self.states[0::2], is_A=True)
        B = Factor(self.parameters[1::2], self.states[1::2], is_A=False)
        self.factors = A, B
        return A.unmagnify(B) + B.unmagnify(A)

    def finish(self, total, clip, **options):
        """Update the parameters; total: |h|^2 over all pairs; clip: the largest |h|, 0 for none."""
        norm = total.to(self.parameters[0].device).sqrt()
        clip = clip or math.inf
        h_scale = torch.where(norm > clip, clip / norm, 1.0)  # ()
        A, B = self.factors
        A.update(B, h_scale, **options)  # changes no attribute that B's update reads
        B.update(A, h_scale, **options)
        self.factors = None


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
    """Return the state of p before its first step."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    packed = torch.zeros(2 * rank * rank + 5, dtype=torch.float64, device=p.device)
    unpack(packed, rank).shrink.fill_(1)
    return {"M": torch.zeros(p.shape, dtype=dtype, device=p.device), "packed": packed}


def is_valid_state(loaded, rank, expected):
    """Return whether a loaded state has the names, shapes and ranges of the `expected` one."""
    if not isinstance(loaded, dict) or loaded.keys() != expected.keys():
        return False
    for name, t in loaded.items():
        if not torch.is_tensor(t) or t.layout != torch.strided or t.is_meta:
            return False
        if t.shape != expected[name].shape or t.dtype not in FLOATS or not t.isfinite().all():
            return False
    numbers = unpack(loaded["packed"], rank)
    is_negative = min(numbers.rho, numbers.step, numbers.lr, numbers.skipped) < 0
    return not is_negative and numbers.shrink != 0


class LoRARITE(torch.optim.Optimizer):
    """LoRA-RITE for groups {"params": [A, B, A, B, ...], "pair": True} with A (r, n), B (m, r).

    eps           added to the root of the second moment of the unmagnified gradient
    clip          limit on the norm of the unmagnified gradients of all pairs; 0: no limit
    weight_decay  decoupled, x -= lr weight_decay x
    escape        add what the second moment loses between bases to all its eigenvalues
    use_kernel    None: for CUDA tensors; True: always (interpreted on a CPU); False: never

    State: M, shaped like the parameter, in float32 or float64; "packed", a FactorState in float64.
    The kernel supports contiguous float32, float16 and bfloat16 pairs of up to rank 64. A factor
    is not updated if its gradient is missing, or if the gradient or its square is not finite;
    state["packed"] counts the latter as skipped. Raises ValueError if an option is out of range or
    a parameter has no partner.
    """

    clips_gradients = False  # clipping raw gradients would depend on how Z is factored

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

    def __getstate__(self):
        return {**super().__getstate__(), "use_kernel": self.use_kernel}

    def __setstate__(self, state):  # called on a copy, and after loading
        super().__setstate__(state)
        self.plans = {}
        self.captured_plans = getattr(self, "captured_plans", [])

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_options(group)
        if not group["pair"] or len(group["params"]) % 2:
            raise ValueError(
                "LoRA-RITE only trains LoRA factors in pairs A, B; create them with "
                "--adapter lora_rite"
            )
        for A, B in pairs_of(group):
            fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]
            if not fits or 0 in (*A.shape, *B.shape):
                shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
                raise ValueError(f"{shapes} are no pair A (r, n), B (m, r)")

    # -- batches: which pairs are stepped together ------------------------------------------------

    def init_state(self, p, rank):
        """Create the state of p if needed, and move it to the device of p and the right dtype."""
        state = self.state[p]
        if not state:
            state.update(new_state(p, rank))
        dtype = torch.promote_types(p.dtype, torch.float32)
        state["M"] = state["M"].to(p.device, dtype).contiguous()
        state["packed"] = state["packed"].to(p.device, torch.float64).contiguous()

    def make_batches(self):
        """Return a list of (group, batch) that covers all pairs with gradients.

        A KernelBatch holds all pairs of one rank, a TorchBatch all pairs of one shape.
        """
        batch_parameters = {}  # {what the pairs of a batch have in common: [A, B, A, B, ...]}
        for n, group in enumerate(self.param_groups):
            for A, B in pairs_of(group):
                if A.grad is None and B.grad is None:
                    continue
                if kernel is None and A.is_cuda:
                    warnings.warn("LoRA-RITE runs in PyTorch, which is slower: pip install triton")
                wants_kernel = A.is_cuda if self.use_kernel is None else self.use_kernel
                is_fused = wants_kernel and kernel is not None and kernel.takes(A, B)
                rank = len(A)
                self.init_state(A, rank)
                self.init_state(B, rank)
                key = (is_fused, n, A.device, A.dtype, rank)
                if not is_fused:
                    key += (A.shape, B.shape, B.dtype)
                batch_parameters.setdefault(key, []).extend([A, B])

        batches = []
        for (is_fused, n, *_), parameters in batch_parameters.items():
            Batch = kernel.KernelBatch if is_fused else TorchBatch
            states = [self.state[p] for p in parameters]
            batches.append((self.param_groups[n], Batch(parameters, states)))
        return batches

    def addresses(self):
        """Return the addresses and layouts of all tensors of a step: the key of its batches."""
        key = [self.use_kernel]
        for group in self.param_groups:
            for p in group["params"]:
                key += (p.data_ptr(), p.shape, p.dtype, p.is_contiguous())
                if p.grad is not None:
                    key += (p.grad.data_ptr(), p.grad.dtype, p.grad.is_contiguous())
                for t in self.state.get(p, {}).values():
                    key.append(t.data_ptr())
        return tuple(key)

    def find_batches(self):
        """Return the batches of this step, from the cache if the addresses are known."""
        batches = self.plans.get(self.addresses())
        is_capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if batches is None and is_capturing:
            raise RuntimeError("a tensor has moved since prepare(), so the step cannot be captured")
        if batches is None:
            batches = self.make_batches()
            self.plans[self.addresses()] = batches  # addresses now include those of new states
        if is_capturing:
            self.captured_plans.append(batches)
        if len(self.plans) > MAX_PLANS:
            del self.plans[next(iter(self.plans))]  # the oldest
        return batches

    # -- a step -----------------------------------------------------------------------------------

    @property
    def capturable(self):
        """Whether a CUDA graph can capture step(): only the kernels never wait for the GPU."""
        pairs = [pair for group in self.param_groups for pair in pairs_of(group)]
        return kernel is not None and all(kernel.takes(A, B) for A, B in pairs)

    def prepare(self):
        """Build the batches of the next step before a capture, which cannot upload their tables."""
        self.find_batches()

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
        """Load a state as torch.optim.Adam does, hooks included, but keep "packed" in float64.

        PyTorch would cast it to the dtype of the parameters. Raises ValueError if it does not fit.
        """
        states = {}  # {parameter: state}

        def copy_states(_, loaded):
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            pairs = [pair for group in self.param_groups for pair in pairs_of(group)]
            parameters = [(p, len(A)) for A, B in pairs for p in (A, B)]
            for i, (p, rank) in zip(ids, parameters):  # PyTorch has checked that there are as many
                loaded_state = loaded["state"].get(i)
                if not loaded_state:
                    continue
                states[p] = new_state(p, rank)
                if not is_valid_state(loaded_state, rank, states[p]):
                    raise ValueError(
                        f"the state of a factor {tuple(p.shape)} is not one of LoRA-RITE "
                        f"at rank {rank}"
                    )
                for name, t in states[p].items():
                    t.copy_(loaded_state[name])

        def install_states(_):
            self.state.update(states)

        # copy after the user's pre-hooks, and replace what PyTorch has cast before the post-hooks
        pre_hook = self.register_load_state_dict_pre_hook(copy_states)
        post_hook = self.register_load_state_dict_post_hook(install_states, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            pre_hook.remove()
            post_hook.remove()


# --------------------------------------------------------------------------------------------------
# What --optim lora_rite and --adapter lora_rite call


def optimizer(groups, lr, *, beta1=0.9, beta2=0.999, eps=1e-6, clip=1.0, escape=False):
    """Build LoRA-RITE for --optim lora_rite; groups: the parameter groups from `adapt`."""
    return LoRARITE(groups, lr, (beta1, beta2), eps, clip=clip, escape=escape)


def adapt(
    model, *, rank=16, alpha=0.0, targets="q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj"
):
    """Put LoRA adapters on linear layers, freeze all else, and return the parameter groups.

    targets: patterns for the ends of the layers' names, joined by "+", where * matches anything and
        [01] one of these characters. "q_proj+layers.0.mlp.*": all q_proj, and the MLP of layer 0.
    alpha: the adapter's output is multiplied by alpha / rank; with 0, by 1.
    Initial weights depend on the layers' names and torch.initial_seed() only, so they are the same
    on every device and in every process.
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
    from support.cli import run_main

    run_main(main)
