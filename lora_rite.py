"""LoRA-RITE: an optimizer for low-rank adapters that does not care how Z = B A is factored (Yen, Si, Meng, Yu, Duvvuri, Dhillon,
Hsieh and Kumar, ICLR 2025, arXiv 2410.20625).

LoRA freezes a matrix W and trains Z = B A beside it, A (r, n) and B (m, r). (B R, R^-1 A) is the same Z for every invertible R, and
yet Adam and LoRA+ step differently in Z for different R. LoRA-RITE takes the same step. With a = A^T, b = B, bases Ua, Ub
of their columns, a = Ua Ra, b = Ub Rb, it measures the gradient of each factor in the basis of the other one, where R cancels but for
a rotation, and preconditions it there with an r x r second moment. For a (and for b with the letters exchanged), at step t:

    h = ga Rb^-1                        the unmagnified gradient, dL/dZ^T Ub
    P = Ub^T Ub,old                     what moves the state into the new basis; what that loses may be kept as rho ("escape")
    V = d2 P V P^T + (1 - d2) h^T h / n              d = beta (1 - beta^(t-1)) / (1 - beta^t)
    M = d1 M P^T + (1 - d1) h ((V + rho)^1/2 + eps)^-1
    a <- a - lr (M Rb^-T + weight_decay a)           both factors step from the old ones

where h is first scaled by min(1, clip / |h|), the norm being that of all h of all pairs. A clip of the raw gradients from outside
breaks the invariance; leave it off.

No basis is kept and no QR taken here: all that is r x r follows from the Gram matrices of a, b, ga, gb, Ma, Mb, taken in float64.
Rb is any root of b^T b (Cholesky's; the symmetric one, without the directions that are missing, when b is 0 or rank-deficient), and
the old b is the new one with the last step undone. The released code keeps bases and takes QR and pinv for each pair; it skips
steps with a large h by default, which freezes training if the loss is scaled by 1e3 (here `skip`, off, and counted), and takes
roots of slightly negative eigenvalues (here clamped).

Start with B = 0, or with factors of ordinary size: a tiny B that is not 0 is a trap. The step in A is lr M Rb^-T, as large as B is small;
times the step in B, which is not small, it is a step in Z that grows as lr^2 / |B|. On the tests' regression (lr 0.05, Z of norm 20) the
first step moves Z by 0.4 from B = 0 and by 0.8 from unit normals, but by 78 from these times 1e-4 (the loss goes from 44 to 916) and by
8e5 from these times 1e-8. This is the algorithm's, whoever computes it; clip, which bounds gradients and not steps, does not prevent it.

On a GPU kernels/lora_rite.py takes the same step for all pairs in four launches, elsewhere PyTorch does.

    python lora_rite.py             the experiments below, in about two minutes on two CPU cores -> results/lora_rite-cpu.*
    python lora_rite.py --sweep     how their learning rates were found
    python lora_rite.py --full --init SMOLLM2 --tasks DIR        SmolLM2-135M and four sets of questions, on one GPU
    python lora_rite.py --bench --init SMOLLM2                   a training step's time there -> results/lora_rite-bench.json
    python train.py --init DIR --lora-rank 16 --optim lora_rite --data x.jsonl       fine-tune with it
"""
import hashlib, json, math, os, re, shutil, statistics, sys, tempfile, time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from kernels import lora_rite as kernel
except ModuleNotFoundError as e:
    if (e.name or "").partition(".")[0] != "triton":
        raise
    kernel = None                                                    # no Triton on this machine

# ---------------------------------------------------------------------------------------------------------------------
# LoRA: W x + alpha / r B A x

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_adapter(linear, inputs, y):                                  # a forward hook: x (..., n), y = W x (..., m)
    x, = inputs
    return y + F.linear(F.linear(x, linear.lora_A.to(x.dtype)), linear.lora_B.to(x.dtype)) * linear.lora_scale


def start(name, shape, seed=0):
    """How the adapter `name` begins: A uniform, as PEFT's, from a generator of its own; B zero, so that Z = 0."""
    if name.endswith("lora_B"):
        return torch.zeros(shape)
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big"))
    return (2 * torch.rand(shape, generator=draw) - 1) / math.sqrt(shape[1])


def inject(model, rank=16, alpha=None, targets=TARGETS, seed=0):
    """Put adapters on every nn.Linear whose name ends with one of `targets` (regular expressions, whole parts of the name), in place,
    and freeze all else; the layers get parameters lora_A (rank, n) and lora_B (m, rank). alpha: the adapter counts alpha / rank times
    (default: once). -> the model. ValueError: a target that no layer has, a rank out of range, or adapters that are there already."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    try:
        found = {target: {name for name in linears if re.fullmatch(rf"(.*\.)?({target})", name)} for target in targets}
    except re.error as e:
        raise ValueError(f"the targets {', '.join(targets)} are not all regular expressions ({e})") from None
    missing = [target for target, names in found.items() if not names]
    if missing or not found:
        ends = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(f"no linear layer is called {', '.join(missing) or 'nothing'}; there are {', '.join(ends)}")
    chosen = {name: linear for name, linear in linears.items() if any(name in names for names in found.values())}
    most, where = min((min(linear.weight.shape), name) for name, linear in chosen.items())
    if not 1 <= rank <= most:
        raise ValueError(f"the rank is {rank}; it must be from 1 to {most}, the smaller side of {where}")
    if adapters(model):
        raise ValueError("the model has adapters already; merge them first")
    model.requires_grad_(False)
    for name, linear in chosen.items():
        for key, shape in (("lora_A", (rank, linear.in_features)), ("lora_B", (linear.out_features, rank))):
            dtype = torch.promote_types(linear.weight.dtype, torch.float32)
            linear.register_parameter(key, nn.Parameter(start(f"{name}.{key}", shape, seed).to(linear.weight.device, dtype)))
        linear.lora_scale = (rank if alpha is None else alpha) / rank
        linear.lora_hook = linear.register_forward_hook(add_adapter)
    return model


def adapters(model):
    """-> {name: layer} of the layers that carry an adapter."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def pairs(model):
    """-> what an optimizer is given: one group A, B, A, B, ... in which neighbours are a pair."""
    return [{"params": [p for m in adapters(model).values() for p in (m.lora_A, m.lora_B)], "pair": True}]


@torch.no_grad()
def merge(model):
    """Add every adapter to the weights it stands beside, and take it away; all is left frozen. -> the model."""
    for m in adapters(model).values():
        m.weight.copy_(m.weight + m.lora_B @ m.lora_A * m.lora_scale)                        # rounded once
        m.lora_hook.remove()
        del m.lora_A, m.lora_B, m.lora_scale, m.lora_hook
    return model


def peft_names(layers, prefix):                                      # -> {PEFT's name: (our layer's, lora_A or lora_B)}
    return {f"base_model.model.{prefix}{n}.{key}.weight": (n, key) for n in layers for key in ("lora_A", "lora_B")}


def save(model, folder, prefix=""):
    """Write the adapters alone, as PEFT does: adapter_model.safetensors and adapter_config.json in `folder`. prefix: what PEFT's model
    has before our names, "model." for a train.GPT."""
    from safetensors.torch import save_file
    layers = adapters(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    rank, scale = max((m.lora_A.shape[0], m.lora_scale) for m in layers.values())            # all are alike
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank * scale, "lora_dropout": 0.0, "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True, "base_model_name_or_path": None, "target_modules": [prefix + n for n in layers]}
    tensors = {name: getattr(layers[n], key).detach().cpu().contiguous() for name, (n, key) in peft_names(layers, prefix).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as d:               # each file is there whole or not at all
        save_file(tensors, Path(d, "adapter_model.safetensors"), {"format": "pt"})
        Path(d, "adapter_config.json").write_text(json.dumps(config, indent=1))
        for path in Path(d).iterdir():
            os.replace(path, Path(folder, path.name))


def load(model, folder, prefix=""):
    """Inject the adapters that `save` or PEFT wrote. ValueError: the folder holds none, or they do not fit the model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        config, tensors = json.loads(Path(folder, "adapter_config.json").read_text()), load_file(Path(folder, "adapter_model.safetensors"))
        rank, alpha, kind = config["r"], config["lora_alpha"], config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise ValueError(f"{folder} holds no LoRA adapters that can be read ({type(e).__name__}: {e})") from None
    special = [k for k in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out") if config.get(k)]
    if kind != "LORA" or special or config.get("bias", "none") != "none":
        raise ValueError(f"{folder} holds adapters of a kind that is not implemented ({', '.join(special) or kind}); only plain LoRA is")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers = {name.removeprefix(f"base_model.model.{prefix}").rpartition(".lora_")[0] for name in tensors}
    lost = sorted(layers - linears.keys())
    if lost or not layers:
        raise ValueError(f"{folder} has an adapter for {lost[0] if lost and lost[0] else 'nothing'}, which is no linear layer of the model")
    names = peft_names(layers, prefix)
    shapes = {name: (rank, linears[n].in_features) if key == "lora_A" else (linears[n].out_features, rank) for name, (n, key) in names.items()}
    wrong = next((name for name in sorted({*shapes, *tensors}) if name not in tensors or tuple(tensors[name].shape) != shapes.get(name)), None)
    if wrong is not None:
        raise ValueError(f"{folder}: the tensor {wrong} is missing, or is not {shapes.get(wrong, 'one of an adapter')}")
    inject(model, rank, alpha, [re.escape(n) for n in layers])
    with torch.no_grad():
        for name, (n, key) in names.items():
            getattr(linears[n], key).copy_(tensors[name])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer

def decay(beta, t):                                                  # Adafactor's: 0 at t = 1, so no bias is left to correct
    return beta * (1 - beta ** (t - 1)) / (1 - beta ** t)


def reference(pairs, states, t, lr, beta1, beta2, eps, clip=0.0, weight_decay=0.0, escape=False):
    """Step t = 1, 2, ... as the paper writes it, with bases by QR, for a list of pairs (a (n, r), b (m, r), ga, gb) -> [(a, b), ...].
    states: for each pair two dicts, {} at first, changed in place. Slow; the tests run it in float64."""
    d1, d2, work = decay(beta1, t), decay(beta2, t), []
    for (a, b, ga, gb), (sa, sb) in zip(pairs, states):
        (Ua, Ra), (Ub, Rb) = torch.linalg.qr(a), torch.linalg.qr(b)
        Ia, Ib = torch.linalg.pinv(Ra), torch.linalg.pinv(Rb)                                # (r, r)
        work += [(a, ga @ Ib, Ub, Ib, sa), (b, gb @ Ia, Ua, Ia, sb)]
    norm, new = sum(h.square().sum() for _, h, *_ in work).sqrt(), []
    for x, h, U, I, s in work:
        h = h * min(1.0, clip / norm) if clip else h                                         # (rows, r)
        P = U.T @ s.get("U", U)                                                              # (r, r)
        V_old, rho = s.get("V", torch.zeros_like(P)), s.get("rho", 0.0)
        V = P @ V_old @ P.T
        if escape:
            lost = (torch.linalg.eigvalsh(V_old) - torch.linalg.eigvalsh(V)).max().clamp(min=0)
            rho = d2 * (rho + torch.minimum(lost, (V_old.trace() - V.trace()).clamp(min=0)))
        V = d2 * V + (1 - d2) * h.T @ h / len(h)
        w, Q = torch.linalg.eigh(V)
        S = h @ Q @ torch.diag(1 / ((w.clamp(min=0) + rho).sqrt() + eps)) @ Q.T
        M = d1 * s.get("M", torch.zeros_like(h)) @ P.T + (1 - d1) * S
        s.update(U=U, V=V, M=M, rho=rho)
        new.append(x - lr * (M @ I.T + weight_decay * x))
    return list(zip(new[::2], new[1::2]))


def inverse_root(K):
    """Gram matrices K (N, r, r), float64 -> I (N, r, r) with I^T K I = 1 on the directions that are there: I = R^-1 of Cholesky's
    K = R^T R. Where that has lost its accuracy, I = Q w^-1/2 Q^T without the eigenvalues below 1e-12 of the largest; I = 0 for K = 0."""
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    R, info = torch.linalg.cholesky_ex(K, upper=True)
    pivots = R.diagonal(dim1=-2, dim2=-1)
    good = ((info == 0) & (pivots.amin(-1) > 1e-7 * pivots.amax(-1)))[..., None, None]
    w, Q = torch.linalg.eigh(K)
    live = w > 1e-12 * w[..., -1:]
    safe = Q * torch.where(live, torch.where(live, w, 1).rsqrt(), 0)[..., None, :] @ Q.mT
    return torch.where(good, torch.linalg.solve_triangular(torch.where(good, R, eye), eye, upper=True), safe)


def trace(x):                                                        # (N, r, r) -> (N)
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def column(x):                                                       # (N) -> (N, 1, 1)
    return x[:, None, None]


class Side(NamedTuple):
    """One side of N pairs: what a step reads, sums over rows, what the last step left. All but x, g, M in float64."""
    x: torch.Tensor                                                  # (N, rows, r) factors, A transposed or B as it is
    g: torch.Tensor                                                  # (N, rows, r) gradients
    M: torch.Tensor                                                  # (N, rows, r) the moments that made the last step
    good: torch.Tensor                                               # (N) whether g^2 is finite; where not, g counts as 0
    still: torch.Tensor                                              # (N) whether x holds still: g is missing, or not good
    K: torch.Tensor                                                  # (N, r, r) x^T x
    G: torch.Tensor                                                  # (N, r, r) g^T g
    T: torch.Tensor                                                  # (N, r, r) x^T M
    V: torch.Tensor                                                  # (N, r, r) second moment, in the basis of the other side
    I: torch.Tensor                                                  # (N, r, r) inverse root of K at the last step
    rho: torch.Tensor                                                # (N) escaped mass
    step: torch.Tensor                                               # (N) steps counted
    lr: torch.Tensor                                                 # (N) of the last step, 0 if x held still
    shrink: torch.Tensor                                             # (N) 1 - lr weight_decay of the last step
    skipped: torch.Tensor                                            # (N) gradients left out

    @staticmethod
    def of(ps, states, A):
        """Of parameters of one shape and their states; A: they are As."""
        tall = lambda tensors: torch.stack([t.mT if A else t for t in tensors]).to(states[0]["m"].dtype)                     # (N, rows, r)
        x, M = tall(ps), tall([s["m"] for s in states])
        g = tall([torch.zeros_like(p) if p.grad is None else p.grad for p in ps])
        K, G, T = (a.double().mT @ b.double() for a, b in ((x, x), (g, g), (x, M)))          # (N, r, r)
        good = G.isfinite().all(-1).all(-1)
        still = ~good | torch.tensor([p.grad is None for p in ps]).to(x.device, non_blocking=True)
        K, G, T = (torch.where(fine, sums, 0) for fine, sums in ((K.isfinite(), K), (column(good), G), (T.isfinite(), T)))
        return Side(x, g, M, good, still, K, G, T, *(torch.stack([s[name] for s in states]) for name in Side._fields[8:]))


def update(side, other, I_other, h2, c, beta1, beta2, eps, escape, own_count):
    """A Side's r x r part of a step, given its partner, whose inverse root is now I_other (N, r, r); h2 (N, r, r) = h^T h, 0 where it is
    skipped; c (): scale of the gradient. -> D, C (N, r, r), with which M becomes M D^T + g C; V, rho, step."""
    step = side.step + (trace(h2) > 0) if own_count else side.step + 1
    t = step.clamp(min=1)
    d1, d2 = decay(beta1, t), decay(beta2, t)                                                # (N)
    undone = other.K + column(other.lr) * other.T @ side.I.mT                                # (N, r, r) x_now^T x_old, times shrink
    P = I_other.mT @ undone @ other.I / column(other.shrink)
    moved, rho = P @ side.V @ P.mT, side.rho
    if escape:
        before, after = torch.linalg.eigvalsh(torch.stack([side.V, moved]))                  # (N, r) each, ascending
        lost = before - after
        rho = d2 * (rho + torch.minimum(lost.amax(-1).clamp(min=0), lost.sum(-1).clamp(min=0)))
    V = column(d2) * moved + column(1 - d2) * c ** 2 * h2 / side.x.shape[1]
    w, Q = torch.linalg.eigh((V + V.mT) / 2)
    inverse = Q * (1 / ((w.clamp(min=0) + rho[:, None]).sqrt() + eps))[:, None] @ Q.mT       # (V + rho)^1/2 + eps, inverted
    return column(d1) * P, column(1 - d1) * c * I_other @ inverse, V, rho, step


@cache
def warn_slow():
    print("there is no Triton here, so LoRA-RITE takes PyTorch's slower way (pip install triton)", file=sys.stderr)


class LoRARITE(torch.optim.Optimizer):
    """params: a model with adapters of `inject`, or groups {"params": [A, B, A, B, ...], "pair": True} with A (r, n), B (m, r).

    eps           added to the root of the second moment of the unmagnified gradient, a mean over rows
    clip          largest norm of the unmagnified gradients of all pairs; 0: never. Clip nothing outside: it would break the invariance
    skip          a factor's gradient counts as 0 where the RMS of its unmagnified gradient is larger; 0: never (1 in the released code)
    weight_decay  decoupled, x -= lr weight_decay x
    escape        add what the second moment loses between bases to all its directions
    own_count     count a factor's steps from its first gradient that is not 0 (after B = 0, A's is 0); else all steps, as released

    State: a moment like the parameter in at least float32, and r x r matrices in float64. The kernel takes contiguous pairs in float32,
    float16 and bfloat16 up to rank 64 on CUDA and never waits for the device; elsewhere torch's own eigensolver does. A factor without
    gradient holds still; one whose gradient or its square is not finite does, too, for that step. state[A or B]["skipped"] counts both
    the latter and what `skip` left out.
    ValueError: an option out of range, a parameter without its partner, a device without float64."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, *, clip=1.0, skip=0.0, weight_decay=0.0, escape=False, own_count=False):
        super().__init__(pairs(params) if isinstance(params, nn.Module) else params,
                         dict(lr=lr, betas=betas, eps=eps, clip=clip, skip=skip, weight_decay=weight_decay, escape=escape,
                              own_count=own_count, pair=False))

    def add_param_group(self, group):
        super().add_param_group(group)
        g = self.param_groups[-1]
        for name, good, want in (("betas", all(0 <= beta < 1 for beta in g["betas"]), "two numbers from 0 to below 1"),
                                 ("eps", 0 < g["eps"] < math.inf, "above 0"),
                                 *((n, 0 <= g[n] < math.inf, "at least 0") for n in ("lr", "clip", "skip", "weight_decay"))):
            if not good:
                raise ValueError(f"{name} is {g[name]}; it must be {want}")
        if not g["pair"] or len(g["params"]) % 2:
            raise ValueError("LoRA-RITE trains adapters in pairs A, B and nothing else; give it a model with adapters (--lora-rank)")
        for A, B in zip(g["params"][::2], g["params"][1::2]):
            if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
                raise ValueError(f"{tuple(A.shape)} and {tuple(B.shape)} are no pair; what is needed is A (r, n), B (m, r)")
            if A.device.type == "mps":
                raise ValueError("LoRA-RITE needs float64 for its r x r matrices, which mps does not have; use the CPU")

    def small(self, p, rank, saved=None):
        """-> the state of p, made when it is first seen, and anew where p or the state was cast or moved. The kernel is given addresses: it
        wants all that is r x r together with the five numbers. saved: what to take instead of what there is."""
        state, size = self.state[p], 16 * rank * rank                # bytes of V and I
        if saved or not state or state["skipped"].data_ptr() - state["V"].data_ptr() != size + 32 \
                or (m := state["m"]).element_size() != max(4, p.element_size()) or m.device != p.device:
            dtype = torch.promote_types(p.dtype, torch.float32)
            old, numbers = dict(saved or state), torch.zeros(2 * rank * rank + 5, dtype=torch.float64, device=p.device)
            V, I = numbers[:-5].view(2, rank, rank)
            state.update(m=torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format), V=V, I=I,
                         **dict(zip(("rho", "step", "lr", "shrink", "skipped"), numbers[-5:])))
            state["shrink"].fill_(1)
            for name, tensor in old.items():
                state[name].copy_(tensor)
        return state

    @staticmethod
    def fits(A, B):                                                  # is it a pair for the kernel?
        return kernel and A.is_cuda and kernel.takes(A, B)

    def batches(self):
        """-> [(fused, group, [(A, B), ...]), ...]: the pairs with gradients; those of one rank together for the kernel, else those of
        equal shape."""
        found = {}
        for n, group in enumerate(self.param_groups):
            for A, B in zip(group["params"][::2], group["params"][1::2]):
                if A.grad is not None or B.grad is not None:
                    fused = self.fits(A, B)
                    key = (n, A.shape[0], A.dtype, A.device) if fused else (n, A.shape, B.shape, A.dtype, B.dtype, A.device)
                    found.setdefault(key, (fused, group, []))[2].append((A, B))
        return list(found.values())

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        work = [(self.fused if fused else self.eager)(group, pairs) for fused, group, pairs in self.batches()]
        total = sum(part.to(work[0][0].device) for part, _ in work)  # |h|^2 over all pairs
        for _, finish in work:
            finish(total)
        return loss

    def fused(self, group, pairs):
        """What `eager` does, with the same numbers."""
        sides, rank = [], pairs[0][0].shape[0]
        for p in (p for pair in pairs for p in pair):
            state = self.small(p, rank)
            sides.append(kernel.Side(p, p.grad if p.grad is None else p.grad.contiguous(), state["m"], state["V"]))
        return kernel.measure(sides, group["skip"], *group["betas"],
                              *(group[name] for name in ("eps", "clip", "weight_decay", "lr", "escape", "own_count")))

    def eager(self, group, pairs):
        """The first half of a step for pairs of equal shape -> their |h|^2 (), and a function that is given its sum over all pairs and does
        the second half."""
        if pairs[0][0].is_cuda and not kernel:
            warn_slow()
        factors, rank = list(zip(*pairs)), pairs[0][0].shape[0]      # (A, A, ...), (B, B, ...)
        states = [[self.small(p, rank) for p in ps] for ps in factors]
        sides = [Side.of(ps, s, A=k == 0) for k, (ps, s) in enumerate(zip(factors, states))]
        roots, h2, skipped = [inverse_root(side.K) for side in sides], [], []
        for side, I in zip(sides, roots[::-1]):
            h2.append(I.mT @ side.G @ I)                                                     # (N, r, r)
            limit = group["skip"] ** 2 * side.x[0].numel() if group["skip"] else math.inf
            skipped.append(~(side.good & (trace(h2[-1]) <= limit)))
            h2[-1] = torch.where(column(skipped[-1]), 0, h2[-1])

        def finish(total):
            norm = total.to(roots[0].device).sqrt()
            c = torch.where(norm > group["clip"], group["clip"] / norm, 1.0) if group["clip"] else torch.ones_like(norm)
            for k, side in enumerate(sides):
                I, kind = roots[1 - k], side.x.dtype
                D, C, V, rho, step = update(side, sides[1 - k], I, h2[k], c, *group["betas"],
                                            *(group[name] for name in ("eps", "escape", "own_count")))
                lr = torch.where(side.still, 0.0, torch.as_tensor(group["lr"], dtype=torch.float64, device=I.device))        # (N)
                shrink, g = 1 - lr * group["weight_decay"], torch.where(column(skipped[k]), 0, side.g)
                m = side.M @ D.mT.to(kind) + g @ C.to(kind)                                  # (N, rows, r)
                x = column(shrink).to(kind) * side.x - m @ (column(lr) * I.mT).to(kind)
                kept = dict(m=m if k else m.mT, V=V, I=roots[k], rho=rho, step=step, lr=lr, shrink=shrink, skipped=side.skipped + skipped[k])
                for name, values in kept.items():
                    torch._foreach_copy_([s[name] for s in states[k]], list(values.unbind()))
                torch._foreach_copy_(factors[k], list((x if k else x.mT).unbind()))
        return sum(trace(part).sum() for part in h2), finish

    def load_state_dict(self, state_dict):
        """As any optimizer's, but torch would cast float64 to the parameter's dtype."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, (p for group in self.param_groups for p in group["params"])):
            if saved := state_dict["state"].get(i):
                self.small(p, len(saved["V"]), saved)


def optimizer(groups, lr, *, beta1=0.9, beta2=0.999, eps=1e-6, rite_clip=1.0, skip=0.0, escape=False, own_count=False):
    return LoRARITE(groups, lr, (beta1, beta2), eps, clip=rite_clip, skip=skip, escape=escape, own_count=own_count)


# ---------------------------------------------------------------------------------------------------------------------
# The experiments: the same frozen weights, text and steps; only the optimizer of the adapters differs

def adamw(groups, lr, ratio=1.0):
    """AdamW over the groups of `pairs`. With ratio > 1 it is LoRA+ (Hayou, Ghosh and Yu, ICML 2024, arXiv 2402.12354): every B learns
    that many times faster than every A."""
    sides = [{"params": group["params"][k::2], "lr": lr * ratio ** k} for group in groups for k in (0, 1)]
    return torch.optim.AdamW(sides, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


ARMS = {"AdamW": adamw, "LoRA+": adamw, "LoRA-RITE": LoRARITE}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def trials(low, plus):
    """What an arm takes beside the groups, six of it each: learning rates from RATES[low] on, or LoRA+'s of A from RATES[plus] on with
    two ratios."""
    rates = [(lr,) for lr in RATES[low:low + 6]]
    return {"AdamW": rates, "LoRA-RITE": rates,
            "LoRA+": [(lr, 4.0) for lr in RATES[plus + 1:plus + 4]] + [(lr, 16.0) for lr in RATES[plus:plus + 3]]}


LAPTOP = {"name": "lora_rite-cpu", "device": "cpu", "steps": 60, "batch": 8, "block": 128, "ranks": (4, 16), "seeds": (1, 2, 3, 4),
          "base": "--model tiny --steps 300", "trials": trials(1, 2),
          "best": {4: {"AdamW": (1e-2,), "LoRA+": (1e-2, 4.0), "LoRA-RITE": (1e-2,)},                  # of --sweep
                   16: {"AdamW": (1e-2,), "LoRA+": (3e-3, 16.0), "LoRA-RITE": (3e-3,)}}}
FULL = {"name": "lora_rite-h200", "device": "cuda", "steps": 150, "batch": 64, "block": 128, "ranks": (16,), "seeds": (1, 2, 3),
        "trials": trials(0, 0)}


KEPT = "out/lora_rite-full"                                          # runs of --full that are done, until all are


def frozen(train, base, recipe):                                     # -> the GPT as it is before, and its tokenizer
    device = torch.device(recipe["device"])
    return train.load_model(base, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def finetune(train, base, text, recipe, rank, arm, point, seed):
    """Train adapters on a text, (tokens, where windows may begin), as train.py would -> the model, and the seconds it took. point: what
    the arm takes beside the groups."""
    (model, _), run, began = frozen(train, base, recipe), train.RunConfig(steps=recipe["steps"], lr=1.0), time.perf_counter()
    optimizer = ARMS[arm](pairs(inject(model, rank, seed=seed)), *point)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in train.tqdm(range(recipe["steps"]), f"{arm}, rank {rank}", leave=False, delay=1):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * train.learning_rate(step, run)
        starts = train.batch_starts(seed, step, text[1], recipe["batch"])
        batch = train.windows(text[0], starts, recipe["block"], torch.device(recipe["device"]))
        train.take_step(model, model, optimizer, [batch], clip=0)
    return model, time.perf_counter() - began


def study(train, base, text, recipe, seeds, score):
    """Each arm's trials with seed 0, unless its best is known, and its best with the seeds; score(model) is a dict of numbers ->
    {rank: {"sweep": {arm: [(point, bits per byte), ...]}, "best": {arm: point}, "runs": {arm: [score and seconds, ...]}}}"""
    found, settings = {}, [str(base), len(text[0]), *(recipe[k] for k in ("device", "steps", "batch", "block"))]
    kept = lambda key, work: train.remembered(KEPT, settings + key, work) if recipe["name"] == FULL["name"] else work()
    for rank in recipe["ranks"]:
        sweep, best = {}, recipe.get("best", {}).get(rank)
        if not best:
            bits = lambda arm, point: kept([rank, arm, point, 0], lambda: score(
                finetune(train, base, text, recipe, rank, arm, point, 0)[0], quick=True)["bits_per_byte"])
            sweep = {arm: [(point, bits(arm, point)) for point in points] for arm, points in recipe["trials"].items()}
            best = {arm: min(tried, key=lambda t: t[1] if math.isfinite(t[1]) else math.inf)[0] for arm, tried in sweep.items()}
            for arm, tried in sweep.items():
                print(f"rank {rank:2} {arm:9} bits/byte " + "  ".join(f"{' x '.join(map('{:g}'.format, p))}: {b:.4f}" for p, b in tried))
        again = lambda model, seconds: {**score(model), "seconds": seconds}
        runs = {arm: [kept([rank, arm, best[arm], seed], lambda: again(*finetune(train, base, text, recipe, rank, arm, best[arm], seed)))
                      for seed in seeds] for arm in ARMS}
        found[rank] = {"sweep": sweep, "best": best, "runs": runs}
    return found


def invariance(train, base, text, recipe, rank, points, steps=30):
    """Train (A, B) and (R^-1 A, B R), which are the same products, side by side in float64 -> {arm: |Z' - Z| / |Z| over all adapters,
    after 0, 1, ... steps}."""
    far = {}
    for arm, point in points.items():
        draw = torch.Generator().manual_seed(0)
        rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
        both = [inject(train.load_model(base, dtype=torch.float64)[0].double(), rank) for _ in range(2)]
        for one, other in zip(*(adapters(model).values() for model in both)):
            R = torch.linalg.qr(rand(rank, rank))[0] * torch.logspace(-0.5, 0.5, rank, dtype=torch.float64)        # of condition 10
            one.lora_B.data = 0.1 * rand(*one.lora_B.shape)
            other.lora_A.data, other.lora_B.data = torch.linalg.solve(R, one.lora_A.data), one.lora_B.data @ R
        optimizers, far[arm] = [ARMS[arm](pairs(model), *point) for model in both], []
        for step in range(steps + 1):
            Z, turned = ([(m.lora_B @ m.lora_A).detach() for m in adapters(model).values()] for model in both)
            far[arm].append((sum((z - t).square().sum() for z, t in zip(Z, turned)) / sum(z.square().sum() for z in Z)).sqrt().item())
            batch = train.windows(text[0], train.batch_starts(0, step, text[1], 2), recipe["block"] // 2, torch.device("cpu"))
            for model, optimizer in zip(both, optimizers):
                train.take_step(model, model, optimizer, [batch], clip=0)
    return far


def pydoc(train, folder, init, flags):
    """-> the weights to adapt, and text for them: what Python says about its own language. The weights are those in `init`, else a tiny
    GPT's, trained here as the flags say on the standard library without that text."""
    from pydoc_data.topics import topics
    library, pages, base = (folder / name for name in ("library", "pages", "base"))
    pages.mkdir()
    for n, page in enumerate(topics.values()):
        (pages / f"{n}.txt").write_text(page, encoding="utf-8")
    if init:
        return Path(init), str(pages)
    library.mkdir()
    for n, path in enumerate(train.find_documents("stdlib")):
        if path.parent.name != "pydoc_data":
            shutil.copy(path, library / f"{n}.py")
    train.part(f"{flags} --device cpu --sample 0 --data {library} --out {base}".split())
    return base, str(pages)


# ---------------------------------------------------------------------------------------------------------------------
# Questions: which of its choices does the model find likeliest?

TASKS = ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq")
# Accuracy of Adam and of LoRA-RITE in percent as others state it, with larger models that write their answers
PUBLISHED = {"README of the released code, Gemma-2B": {"ARC-Easy": (76.43, 77.60), "ARC-Challenge": (59.55, 59.30), "openbookqa": (68.40, 69.60),
                                                       "boolq": (62.87, 62.17), "mean": (64.40, 66.85)},             # of eight tasks
             "Riemannion's paper, Llama-3-8B": {"mean": (87.1, 84.5)}}


def questions(train, path):
    """-> [(prompt, choices, number of the right one), ...] of a file in LLM-Adapters' format. The choices are taken out of the prompt: so
    small a model foresees the text of an answer better than the number of a choice."""
    found = []
    try:
        for row in json.loads(path.read_text(encoding="utf-8")):
            body, _, labels = row["instruction"].rpartition("\n\nAnswer format: ")
            question, *choices = re.split(r"\s*\bAnswer\d: ", body)
            labels = labels.split("/")                               # answer1, answer2, ..., or true and false
            if len(choices or labels) != len(labels):
                raise ValueError(f"{len(choices)} choices for {len(labels)} labels")
            prompt = f"Question: {question.partition('question: ')[2]}\nAnswer:"
            found.append((prompt, [f" {choice}" for choice in choices or labels], labels.index(row["answer"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        train.fail(f"{path} does not hold questions in the format of LLM-Adapters ({type(e).__name__}: {e})")
    return found


@torch.no_grad()
def likelihoods(model, sequences, most=2 ** 13):
    """sequences: ids of a prompt and ids of an answer each -> log p(answer | prompt) of each, (N). most: tokens at a time."""
    device, result = model.embed_tokens.weight.device, torch.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda i: -sum(map(len, sequences[i])))        # alike lengths together
    while order:
        T = sum(map(len, sequences[order[0]]))
        part, order = order[:max(1, most // T)], order[max(1, most // T):]
        ids, counts = torch.zeros(2, len(part), T, dtype=torch.long)                         # (n, T) each
        for n, (prompt, answer) in enumerate(sequences[i] for i in part):
            end = len(prompt) + len(answer)
            ids[n, :end], counts[n, len(prompt):end] = torch.tensor([*prompt, *answer]), 1
        ids, counts = ids.to(device), counts.to(device)
        logp = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)   # (n, T - 1)
        result[part] = (logp * counts[:, 1:]).sum(1).cpu()
    return result


def accuracy(model, tokenizer, asked):
    """-> the share of questions whose right choice is the one with the largest mean log p of a token."""
    encode, start = tokenizer.encode_ordinary, getattr(tokenizer, "start", [])
    sequences = [([*start, *encode(prompt)], [*encode(choice)]) for prompt, choices, _ in asked for choice in choices]
    mean = likelihoods(model, sequences) / torch.tensor([len(answer) for _, answer in sequences])
    each = mean.split([len(choices) for _, choices, _ in asked])
    return statistics.mean(float(m.argmax() == right) for m, (*_, right) in zip(each, asked))


def reasoning(train, folder, tasks):
    """-> the path of a .jsonl with every training question and its answer, but for those in a test; {task: its test}."""
    tests, lessons = ({task: questions(train, Path(tasks, task, f"{part}.json")) for task in TASKS} for part in ("test", "train"))
    asked = {prompt for test in tests.values() for prompt, *_ in test}
    rows = [{"prompt": prompt, "answer": choices[right]} for lesson in lessons.values() for prompt, choices, right in lesson]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row["prompt"] not in asked))
    return str(folder / "train.jsonl"), tests


def bench(train, init, recipe, out, turns=5):
    """Times a whole step of train.py with AdamW and with LoRA-RITE, in turn -> and writes {"ms_per_step": {optimizer: one a turn}, ...}"""
    flags = (f"--bench --init {init} --lora-rank {recipe['ranks'][0]} --batch-size {recipe['batch']} --block-size {recipe['block']} "
             f"--device {recipe['device']}").split()
    runs = {optim: [] for optim in ("adamw", "lora_rite")}
    for optim in [*runs] * turns:
        runs[optim].append(train.part([*flags, "--optim", optim])[0])
        print(f"{optim:9} {runs[optim][-1]['ms_per_step']:.2f} ms a step", flush=True)
    result = {"ms_per_step": {optim: [r["ms_per_step"] for r in found] for optim, found in runs.items()},
              **{key: runs["adamw"][0][key] for key in ("tokens_per_step", "parameters", "dtype", "torch", "device")}}
    slower = statistics.median(result["ms_per_step"]["lora_rite"]) / statistics.median(result["ms_per_step"]["adamw"]) - 1
    print(f"LoRA-RITE's median against AdamW's: {slower:+.1%}")
    with train.atomic(out / "lora_rite-bench.json") as f:
        f.write(json.dumps(result, indent=1).encode())
    return result


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    import train                                                     # the only place that knows the GPT
    parser = train.Parser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="on one GPU: answers to questions; needs --init and --tasks; "
                       "cut short, it goes on where it stopped")
    which.add_argument("--sweep", action="store_true", help="the laptop's learning rates, seed 0, six trials for each optimizer and rank")
    which.add_argument("--bench", action="store_true", help="on one GPU: time of a training step beside AdamW's; needs --init")
    parser.add_argument("--init", metavar="DIR", help="the weights to adapt (default: a tiny GPT, trained first)")
    parser.add_argument("--tasks", metavar="DIR", help="holds ARC-Easy, ARC-Challenge, openbookqa and boolq, a train.json and a test.json in each")
    parser.add_argument("--out", default="results", help="folder for what comes out (default: results)")
    args = parser.parse_args(argv)
    seconds, out = train.stopwatch(args.full and KEPT), train.writable(args.out)
    recipe = FULL if args.full or args.bench else LAPTOP
    if args.bench and not args.init:
        train.fail("--bench times a step on pretrained weights; give --init DIR, SmolLM2-135M's")
    if args.full and not (args.init and args.tasks):
        train.fail("--full adapts pretrained weights to questions; give --init DIR, SmolLM2-135M's, and --tasks DIR")
    if recipe["device"] == "cuda" and not torch.cuda.is_available():
        train.fail("adapting 135 M parameters needs a CUDA GPU; leave --full and --bench out for the version for a laptop")
    if args.bench:
        return bench(train, args.init, recipe, out)

    with tempfile.TemporaryDirectory() as d:
        if args.full:
            base, (data, tests) = Path(args.init), reasoning(train, Path(d), args.tasks)
        else:
            (base, data), tests = pydoc(train, Path(d), args.init, recipe["base"]), {}
        (model, tokenizer), T = frozen(train, base, recipe), recipe["block"]
        tokens, held_out = train.split(train.load_tokens(data, tokenizer, Path(d, ".tokens")), T, data)
        text = tokens, train.starts_of(tokens, T, tokenizer, data)
        test = train.windows(held_out, range(0, len(held_out) - T, T), T, torch.device(recipe["device"]))
        bits = 1 / math.log(2) / train.bytes_per_token(held_out, tokenizer)

        @torch.no_grad()
        def score(model, quick=False):
            model.float().dtype = torch.float32                      # logits of 20 are 0.125 apart in bfloat16: true would tie with false
            right = {task: accuracy(model, tokenizer, asked) for task, asked in tests.items() if not quick}
            return {"bits_per_byte": model(*test).item() * bits, **right} | ({"mean": statistics.mean(right.values())} if right else {})
        result = {"before": score(model)}
        result["ranks"] = study(train, base, text, {**recipe, "best": {}} if args.sweep else recipe, () if args.sweep else recipe["seeds"], score)
        if not args.full and not args.sweep:
            result["invariance"] = invariance(train, base, text, recipe, recipe["ranks"][0], recipe["best"][recipe["ranks"][0]])
    machine = {"published": PUBLISHED, "gpu": torch.cuda.get_device_name() if recipe["device"] == "cuda" else None} if args.full else {}
    result |= {"recipe": recipe, "torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": seconds(), **machine}
    for rank, found in result["ranks"].items():
        for arm, runs in found["runs"].items():
            for key in result["before"] if runs else ():
                values, ours = ([r[key] for r in found["runs"][a]] for a in (arm, "LoRA-RITE"))
                line = f"rank {rank:2} {key:13} {arm:9} {statistics.mean(values):.4f}, before {result['before'][key]:.4f}"
                if arm != "LoRA-RITE":
                    mean, half = train.interval([r - a for r, a in zip(ours, values)])
                    found.setdefault("difference", {}).setdefault(arm, {})[key] = mean, half
                    line += f"; LoRA-RITE - {arm}, paired: {mean:+.4f} +- {half:.4f} (95%)"
                print(line)
    for arm, far in result.get("invariance", {}).items():
        print(f"{arm:9} from turned factors: the products are {far[-1]:.1e} apart after {len(far) - 1} steps")
    with train.atomic(out / f"{recipe['name']}{'-sweep' if args.sweep else ''}.json") as f:
        f.write(json.dumps(result, indent=1).encode())
    if not args.sweep:
        draw(train, out / f"{recipe['name']}.png", result)
    if args.full:
        shutil.rmtree(KEPT, ignore_errors=True)
    return result


def draw(train, path, result):
    figure, (left, right) = train.figure((10, 4), 1, 2)
    ranks, tasks = result["ranks"], [key for key in result["before"] if key != "bits_per_byte"]
    shown = [(rank, task) for rank in ranks for task in tasks or ["bits_per_byte"]]
    axes, names = left if tasks else right, tasks or [f"rank {rank}" for rank in ranks]
    for n, arm in enumerate(ARMS):
        for x, (rank, key) in enumerate(shown):
            values = [r[key] for r in ranks[rank]["runs"][arm]]
            axes.errorbar(x + 0.2 * n - 0.2, *train.interval(values), fmt="o", color=f"C{n}", capsize=3, label=None if x else arm)
            axes.plot([x + 0.2 * n - 0.14] * len(values), values, ".", color=f"C{n}", ms=3)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="accuracy" if tasks else "held-out bits per byte",
             title=f"fine-tuned, {len(values)} seeds, mean and 95%")
    for arm, far in result.get("invariance", {}).items():
        left.semilogy(far, label=arm)
        left.set(xlabel="step", ylabel="|Z' - Z| / |Z|", title="(A, B) and (R$^{-1}$A, B R) side by side, float64")
    if tasks:
        left.plot(range(len(tasks)), [result["before"][task] for task in tasks], "k_", ms=30, label="before")
        paired = [ranks[rank]["difference"]["AdamW"][task] for rank, task in shown]
        means, halves = ([100 * x for x in column] for column in zip(*paired))
        right.errorbar(range(len(tasks)), means, halves, fmt="C2o", capsize=3, label="here, 95%")
        for n, (source, rows) in enumerate(PUBLISHED.items()):
            right.plot([tasks.index(task) + 0.15 for task in rows], [rite - adam for adam, rite in rows.values()], f"C{n + 3}x", label=source)
        right.axhline(0, color="gray", lw=0.8)
        right.set(xticks=range(len(names)), xticklabels=names, ylabel="points of accuracy", title="LoRA-RITE - Adam")
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8)
    train.keep(figure, path)


if __name__ == "__main__":
    import train
    train.leave(main)
