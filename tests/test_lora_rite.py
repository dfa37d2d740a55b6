"""LoRA-RITE in PyTorch: the paper's algorithm, its invariance, training, options."""

import math

import pytest
import torch
import torch.nn as nn

import lora_rite
from lora_rite import LoRARITE
from tests.common import is_equal

# -- the optimizer, on a regression of low rank ----------------------------------------------------


def low_rank(r=4, n=24, m=17, count=2, samples=None):
    """Return pairs (A (r, n), B (m, r)), and a loss of their products B A.

    The loss is a regression: (B A - Z) X should vanish for a random Z, with samples X.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = [(randn(r, n), randn(m, r)) for _ in range(count)]
    targets = [randn(m, n) for _ in range(count)]
    X = randn(n, samples or 2 * n)

    def loss(products):
        total = 0.0
        for product, target in zip(products, targets):
            error = (product - target.to(product)) @ X.to(product)
            total = total + error.square().mean()
        return total

    return pairs, loss


def descend(
    pairs, loss, steps=50, lr=0.05, make=LoRARITE, dtype=torch.float64, scale=1.0, **options
):
    """Take steps with a falling learning rate. Return the products B A, losses, the optimizer.

    make: the class of the optimizer. scale: the loss is multiplied by it.
    """
    parameters = [nn.Parameter(p.clone().to(dtype)) for pair in pairs for p in pair]
    optimizer = make([{"params": parameters, "pair": True}], lr, **options)
    losses = []
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - 0.5 * t / steps)
        optimizer.zero_grad()
        value = loss([B @ A for A, B in zip(parameters[::2], parameters[1::2])])
        (value * scale).backward()
        losses.append(value.item())
        optimizer.step()
    products = [(B @ A).detach() for A, B in zip(parameters[::2], parameters[1::2])]
    return products, losses, optimizer


def distance(a, b):
    """Return the largest relative distance |x - y| / |y| between two lists of matrices."""
    distances = [(x - y).norm() / y.norm() for x, y in zip(a, b)]
    return max(distances).item()


def state_of(optimizer, p):
    """Return the numbers that are packed into the state of a parameter, as a named tuple."""
    packed = optimizer.state[p]["packed"]  # (2 r^2 + 5,)
    return lora_rite.unpack(packed, math.isqrt(len(packed) // 2 - 2))


OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"escape": True},
    {"clip": 0.0},
    {"clip": 0.3, "escape": True, "weight_decay": 0.1},
]
# rank, columns of A, rows of B, and a number by which B is multiplied
SHAPES = [(4, 24, 17, 1), (1, 5, 9, 1), (16, 20, 33, 1), (4, 24, 17, 0), (3, 3, 3, 0)]
CASES = [(options, SHAPES[0]) for options in OPTIONS]
CASES += [(options, shape) for options in OPTIONS[::4] for shape in SHAPES[1:]]


@pytest.mark.parametrize("options,shape", CASES, ids=str)
def test_it_is_the_papers_algorithm(options, shape):
    r, n, m, size_of_B = shape
    pairs, loss = low_rank(r, n, m)
    pairs = [(A, B * size_of_B) for A, B in pairs]
    ours, _, optimizer = descend(pairs, loss, **options)

    # the same steps by lora_rite.reference
    factors = [(A.T.clone(), B.clone()) for A, B in pairs]
    states = [({}, {}) for _ in pairs]
    options = {"clip": 1.0, **options}
    for t in range(50):
        leaves = [[x.clone().requires_grad_() for x in pair] for pair in factors]
        loss([b @ a.T for a, b in leaves]).backward()
        with_grads = [(a.detach(), b.detach(), a.grad, b.grad) for a, b in leaves]
        lr = 0.05 * (1 - 0.5 * t / 50)
        factors = lora_rite.reference(with_grads, states, t + 1, lr, (0.9, 0.999), 1e-6, **options)
    expected = [b @ a.T for a, b in factors]
    assert distance(ours, expected) < 1e-11

    # the state is the paper's up to a rotation of the basis, so V has the same eigenvalues
    A = optimizer.param_groups[0]["params"][0]
    V = state_of(optimizer, A).V
    expected = torch.linalg.eigvalsh(states[0][0]["V"])
    assert torch.allclose(torch.linalg.eigvalsh(V), expected, rtol=1e-8, atol=1e-14)
    if options.get("escape"):
        rho = states[0][0]["rho"]
        assert torch.allclose(state_of(optimizer, A).rho, rho, rtol=1e-6, atol=1e-13)
        if r not in (1, 3):
            assert rho > 0


def test_the_reference_is_the_formula_of_the_paper():
    """Two steps at rank 1, written out: P is the cosine between the old and the new factor."""
    lr, beta1, beta2, eps, decay = 0.1, 0.9, 0.99, 1e-3, 0.2
    a = torch.tensor([[3.0], [4.0]]).double()
    b = torch.tensor([[2.0], [1.0], [0.5]]).double()
    old_a = a
    old_b = b
    ga = torch.tensor([[1.0], [2.0]]).double()
    gb = torch.tensor([[0.5], [0.1], [-1.0]]).double()
    states = [({}, {})]
    M_a = M_b = V_a = V_b = 0.0
    for t in (1, 2):
        ((next_a, next_b),) = lora_rite.reference(
            [(a, b, ga, gb)], states, t, lr, (beta1, beta2), eps, clip=2.0, weight_decay=decay
        )
        h_a = ga / b.norm()
        h_b = gb / a.norm()
        scale = min(1.0, 2.0 / math.sqrt(h_a.square().sum() + h_b.square().sum()))
        is_clipped = scale < 1
        assert is_clipped == (t == 2)
        h_a = scale * h_a
        h_b = scale * h_b
        d1 = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
        d2 = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        P_a = torch.cosine_similarity(b, old_b, 0)  # of the state of a
        P_b = torch.cosine_similarity(a, old_a, 0)
        V_a = d2 * P_a**2 * V_a + (1 - d2) * h_a.square().mean()
        V_b = d2 * P_b**2 * V_b + (1 - d2) * h_b.square().mean()
        M_a = d1 * P_a * M_a + (1 - d1) * h_a / (V_a.sqrt() + eps)
        M_b = d1 * P_b * M_b + (1 - d1) * h_b / (V_b.sqrt() + eps)
        old_a, old_b = a, b
        a = old_a - lr * (M_a / old_b.norm() + decay * old_a)
        b = old_b - lr * (M_b / old_a.norm() + decay * old_b)
        assert torch.allclose(next_a, a, rtol=1e-12)
        assert torch.allclose(next_b, b, rtol=1e-12)
        ga = ga * 20  # so large that they are clipped
        gb = gb * 30


@pytest.mark.parametrize(
    "kind,options",
    [("any", {}), ("scalar", {}), ("rotation", {})] + [("uneven", options) for options in OPTIONS],
    ids=str,
)
def test_steps_do_not_depend_on_how_the_product_is_factored(kind, options):
    """From B R and R^-1 A, the products B A take the same path."""
    pairs, loss = low_rank()
    generator = torch.Generator().manual_seed(1)
    R = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(R).Q
    uneven = torch.diag(torch.tensor([10.0, 1.0, 0.3, 0.1]).double())
    scalar = 7.0 * torch.eye(4).double().expand(2, 4, 4)
    R = {"any": R, "scalar": scalar, "rotation": Q, "uneven": Q @ uneven}[kind]
    refactored = [(torch.linalg.solve(r, A), B @ r) for r, (A, B) in zip(R, pairs)]

    products, losses, _ = descend(pairs, loss, **options)
    refactored_products, _, _ = descend(refactored, loss, **options)
    assert distance(products, refactored_products) < 1e-12
    assert losses[-1] < 0.9 * losses[0]
    if kind != "rotation":
        products, _, _ = descend(pairs, loss, make=torch.optim.AdamW)
        refactored_products, _, _ = descend(refactored, loss, make=torch.optim.AdamW)
        changed = distance(products, refactored_products)
        assert changed > 0.01, "AdamW passes, so this test could not fail"


def test_the_first_step_does_not_depend_on_the_scale_of_the_loss():
    """At t = 1 the preconditioned gradient is orthonormal."""
    pairs, loss = low_rank()
    moved = []
    for scale in (1.0, 1e-3, 1e3):
        after, _, optimizer = descend(pairs, loss, steps=1, scale=scale, clip=0.0, eps=1e-15)
        moved.append([p - B @ A for p, (A, B) in zip(after, pairs)])
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            M = optimizer.state[p]["M"]
            M = M if i % 2 else M.T  # (rows, r)
            assert torch.allclose(M.T @ M / len(M), torch.eye(4).double(), atol=1e-9)
    assert distance(moved[1], moved[0]) < 1e-9
    assert distance(moved[2], moved[0]) < 1e-9


def test_a_tiny_B_explodes():
    """The first step moves the product, whose target has norm 20, by 78 if B is of size 1e-4."""
    pairs, loss = low_rank()
    moved = {}
    for size in (0.0, 1.0, 1e-4, 1e-8):
        start = [(A, B * size) for A, B in pairs]
        products, _, _ = descend(start, loss, steps=1)
        A, B = start[0]
        moved[size] = (products[0] - B @ A).norm().item()
    assert max(moved[0.0], moved[1.0]) < 1, moved
    assert moved[1e-4] > 50, moved
    assert 9e3 < moved[1e-8] / moved[1e-4] < 1.1e4, moved


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_trains_whatever_the_size_of_the_loss(scale):
    pairs, loss = low_rank()
    start = [(A, 0 * B) for A, B in pairs]
    losses = descend(start, loss, dtype=torch.float32, scale=scale)[1]
    assert losses[-1] < 0.8 * losses[0]


BEND = torch.diag(torch.tensor([1e8, 1.0, 1.0, 1e-4]).double())
BAD_FACTORS = {
    "cond 1e8": lambda A, B: (torch.linalg.solve(BEND, A), B @ BEND),
    "A copies a row": lambda A, B: (A[[0, 0, 1, 2]], B),
    "two samples": lambda A, B: (A, 0 * B),
    "A zero too": lambda A, B: (0 * A, 0 * B),
}


@pytest.mark.parametrize("case", BAD_FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bad_factors(case, dtype):
    pairs, loss = low_rank(samples=2 if case == "two samples" else None)
    start = [BAD_FACTORS[case](A, B) for A, B in pairs]
    after, losses, optimizer = descend(start, loss, dtype=dtype)
    for product in after:
        assert product.isfinite().all()
    for state in optimizer.state.values():
        assert state["M"].isfinite().all()
        assert state["packed"].isfinite().all()
    if case == "A zero too":
        assert losses[-1] == losses[0], "with A = B = 0 nothing should move"
    elif dtype != torch.bfloat16 or case != "cond 1e8":  # there 1e8 is rounded to 1e6
        assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "eigenvalues,kept",
    [
        ((4, 4, 1, 0), (0, 1, 1, 1)),  # Cholesky fails; eigenvalues above 1e-12 of the largest stay
        ((4, 1, 1.2e-11, 0), (0, 1, 1, 1)),
        ((4, 1, 1.2e-12, 0), (0, 0, 1, 1)),
        ((4, 1, 1, 1.2e-12), (1, 1, 1, 1)),  # Cholesky still works, and keeps all
        ((0, 0, 0, 0), (0, 0, 0, 0)),
    ],
)
def test_inverse_root(eigenvalues, kept):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    K = Q @ torch.diag(torch.tensor(eigenvalues).double()) @ Q.T
    K = torch.stack([(K + K.T) / 2, 9 * torch.eye(4).double()])
    root = lora_rite.inverse_root(K)
    identity = torch.linalg.eigvalsh(root.mT @ K @ root)
    assert torch.allclose(identity[0], torch.tensor(kept).double(), atol=1e-2)
    assert torch.allclose(root[1], torch.eye(4).double() / 3)


def test_float32_follows_float64():
    pairs, loss = low_rank()
    truth, _, _ = descend(pairs, loss)
    ours, _, _ = descend(pairs, loss, dtype=torch.float32)
    ours = [p.double() for p in ours]
    assert distance(ours, truth) < 1e-5

    # with Gram matrices in float32, this would be off by 0.3
    generator = torch.Generator().manual_seed(5)
    Q1 = torch.linalg.qr(torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)).Q
    Q2 = torch.linalg.qr(torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)).Q
    R = Q1 @ torch.diag(torch.tensor([1e2, 1.0, 1.0, 1e-2]).double()) @ Q2
    bent = [(torch.linalg.solve(r, A), B @ r) for r, (A, B) in zip(R, pairs)]
    ours, _, _ = descend(bent, loss, dtype=torch.float32)
    ours = [p.double() for p in ours]
    assert distance(ours, truth) < 5e-3


def test_autocast_does_not_round_a_step():
    results = []
    for is_autocast in (False, True):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(shape)) for shape in ((4, 24), (17, 4))]
        optimizer = LoRARITE([{"params": ps, "pair": True}], 0.1)
        for _ in range(3):
            for p in ps:
                p.grad = torch.randn_like(p)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                optimizer.step()
        results.append(ps)
    assert is_equal(*results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_gradient_that_is_not_finite_is_skipped(bad):
    pairs, _ = low_rank(count=3)
    parameters = [nn.Parameter(p.clone()) for pair in pairs for p in pair]
    optimizer = LoRARITE([{"params": parameters, "pair": True}], 0.01, weight_decay=0.1)
    for t in range(3):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn_like(p)
        if t == 1:
            parameters[2].grad[0, 0] = bad
        optimizer.step()
        has_moved = [not torch.equal(p, old) for p, old in zip(parameters, before)]
        is_skipped = t == 1
        assert has_moved == [True, True, not is_skipped, True, True, True]
    for p in parameters:
        assert p.isfinite().all()
    skipped = [state_of(optimizer, p).skipped.item() for p in parameters]
    assert skipped == [0, 0, 1, 0, 0, 0]


def test_the_steps_after_a_skipped_one_are_the_papers():
    """A skipped factor does not decay, and its moments change as with a gradient of zeros."""
    ((A, B),), _ = low_rank(count=1)
    parameters = [nn.Parameter(A.clone()), nn.Parameter(B.clone())]
    optimizer = LoRARITE([{"params": parameters, "pair": True}], 0.1, weight_decay=0.3)
    a = A.T
    b = B
    states = [({}, {})]
    for t in range(4):
        ga = torch.randn_like(a)
        gb = torch.randn_like(b)
        is_skipped = t == 1
        parameters[0].grad = ga.T * math.nan if is_skipped else ga.T
        parameters[1].grad = gb
        optimizer.step()
        ga = 0 * ga if is_skipped else ga
        ((next_a, b),) = lora_rite.reference(
            [(a, b, ga, gb)], states, t + 1, 0.1, (0.9, 0.999), 1e-6, clip=1.0, weight_decay=0.3
        )
        a = a if is_skipped else next_a
        assert distance([parameters[1] @ parameters[0]], [b @ a.T]) < 1e-11


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_spoils_its_own_pair_only(bad):
    """Nothing raises, so that a training loop can report the loss instead."""
    pairs, _ = low_rank()
    parameters = [nn.Parameter(p.clone()) for pair in pairs for p in pair]
    optimizer = LoRARITE([{"params": parameters, "pair": True}], 0.01, clip=0.0)
    for t in range(4):
        for p in parameters:
            p.grad = torch.randn_like(p)
        if t == 1:
            parameters[0].data[0, 0] = bad
        optimizer.step()
    assert not parameters[0].isfinite().all()
    assert parameters[2].isfinite().all()
    assert parameters[3].isfinite().all()


def test_missing_gradients():
    """A factor without a gradient does not move. From the state, each step can be undone."""
    pairs, loss = low_rank()
    ps = [nn.Parameter(p.clone()) for pair in pairs for p in pair]
    optimizer = LoRARITE([{"params": ps, "pair": True}], 0.05, weight_decay=0.1)
    for missing in ([], [0], [2, 3], []):  # parameters without a gradient, in four steps
        optimizer.zero_grad()
        loss([ps[1] @ ps[0], ps[3] @ ps[2]]).backward()
        for i in missing:
            ps[i].grad = None
        before = [p.detach().clone() for p in ps]
        optimizer.step()
        for i, p in enumerate(ps):
            has_moved = not torch.equal(p, before[i])
            assert has_moved == (i not in missing), i

        # the step was x = shrink x_old - lr M R^-T, with the partner's R: undo it
        for i, p in enumerate(ps):
            partner = i ^ 1  # parameters 0 and 1 are a pair, 2 and 3 too
            if i in missing and partner in missing:
                continue  # the pair took no step
            state = state_of(optimizer, p)
            R_inv = state_of(optimizer, ps[partner]).R_inv
            M = optimizer.state[p]["M"]
            x = p.detach()
            x_old = before[i]
            if i % 2 == 0:  # A (r, n)
                M, x, x_old = M.T, x.T, x_old.T
            undone = (x + state.lr * M @ R_inv.T) / state.shrink
            assert torch.allclose(undone, x_old, atol=1e-12)

    # a step without any gradient is no error
    optimizer.zero_grad()
    optimizer.step()


def test_equal_pairs_are_batched_and_their_order_is_free():
    pairs, _ = low_rank(count=3)
    pairs.append((torch.randn(4, 9).double(), torch.randn(6, 4).double()))
    grads = [[torch.randn(2, *p.shape).double() for p in pair] for pair in pairs]

    def run(order, split):
        """Take two steps. split: each pair is in a group of its own."""
        net = {i: [nn.Parameter(p.clone()) for p in pairs[i]] for i in order}
        groups = [{"params": net[i], "pair": True} for i in order]
        if not split:
            groups = [{"params": sum((net[i] for i in order), []), "pair": True}]
        optimizer = LoRARITE(groups, 0.1)
        for t in range(2):
            for i in order:
                for p, g in zip(net[i], grads[i]):
                    p.grad = g[t].clone()
            optimizer.step()
        return [B @ A for _, (A, B) in sorted(net.items())]

    one_group = run([0, 1, 2, 3], split=False)
    four_groups = run([0, 1, 2, 3], split=True)
    another_order = run([3, 1, 0, 2], split=False)
    assert distance(four_groups, one_group) < 1e-13
    assert distance(another_order, one_group) < 1e-13


def test_each_group_has_its_own_options():
    """Two groups take the steps that two optimizers take. Without clipping they are independent."""
    pairs, _ = low_rank()
    grads = [[torch.randn(3, *p.shape).double() for p in pair] for pair in pairs]
    options = [
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.0, "escape": False},
        {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.3, "escape": True},
    ]

    def run(together):
        net = [[nn.Parameter(p.clone()) for p in pair] for pair in pairs]
        groups = []
        for parameters, settings in zip(net, options):
            groups.append({"params": parameters, "pair": True, "clip": 0.0, **settings})
        optimizers = [LoRARITE(groups)] if together else [LoRARITE([group]) for group in groups]
        for t in range(3):
            for parameters, pair_grads in zip(net, grads):
                for p, g in zip(parameters, pair_grads):
                    p.grad = g[t].clone()
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach() for parameters in net for p in parameters]

    for ours, expected in zip(run(together=True), run(together=False)):
        assert torch.equal(ours, expected)


def test_pairs_of_mixed_dtypes():
    """A in float32 and B in float64 are not stacked with a pair in float32."""
    pairs, _ = low_rank()
    dtypes = [(torch.float32, torch.float32), (torch.float32, torch.float64)]
    net = []
    for pair, pair_dtypes in zip(pairs, dtypes):
        net += [nn.Parameter(p.to(dtype)) for p, dtype in zip(pair, pair_dtypes)]
    optimizer = LoRARITE([{"params": net, "pair": True}], 0.1)
    for p in net:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert len(optimizer.find_batches()) == 2
    for p, dtype in zip(net, sum(dtypes, ())):
        assert p.dtype == dtype
        assert optimizer.state[p]["M"].dtype == dtype


def test_pairs_that_share_one_shape_only():
    net = []
    for n, m in ((6, 5), (7, 5), (6, 8)):
        net += [nn.Parameter(torch.randn(4, n)), nn.Parameter(torch.randn(m, 4))]
    optimizer = LoRARITE([{"params": net, "pair": True}], 0.1)
    for p in net:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert len(optimizer.find_batches()) == 3


def test_a_closure_is_called_with_gradients_on():
    pairs, loss = low_rank()
    ps = [nn.Parameter(p.clone()) for pair in pairs for p in pair]
    optimizer = LoRARITE([{"params": ps, "pair": True}], 0.05)

    def closure():
        optimizer.zero_grad()
        value = loss([ps[1] @ ps[0], ps[3] @ ps[2]])
        value.backward()
        return value

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


# -- its options -----------------------------------------------------------------------------------


OPTION_ERRORS = [
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"betas": (-0.1, 0.9)}, "betas"),
    ({"betas": (1.0, 0.9)}, "betas"),
    ({"betas": (0.9, -0.1)}, "betas"),
    ({"eps": 0.0}, "eps is 0.0; it must be above 0"),
    ({"eps": math.inf}, "eps is inf"),
    ({"lr": -1.0}, "lr"),
    ({"clip": math.nan}, "clip"),
    ({"weight_decay": math.inf}, "weight_decay"),
]


@pytest.mark.parametrize("options,part", OPTION_ERRORS, ids=str)
def test_bad_options_are_refused(options, part):
    A, B = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5, 4))
    with pytest.raises(ValueError, match=part):
        LoRARITE([{"params": [A, B], "pair": True}], **options)


def test_options_may_be_zero():
    A, B = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5, 4))
    zeros = {"lr": 0.0, "betas": (0.0, 0.0), "clip": 0.0, "weight_decay": 0.0}
    optimizer = LoRARITE([{"params": [A, B], "pair": True}], **zeros)
    before = [A.detach().clone(), B.detach().clone()]
    (B @ A).square().sum().backward()
    optimizer.step()
    assert torch.equal(A, before[0]) and torch.equal(B, before[1])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert A.isfinite().all() and not torch.equal(A, before[0])


def test_what_is_no_pair_is_refused():
    A, B = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5, 4))
    empty = nn.Parameter(torch.zeros(0, 4))
    no_rank = nn.Parameter(torch.zeros(0, 6)), nn.Parameter(torch.zeros(5, 0))
    vector = nn.Parameter(torch.zeros(4))
    for params in ([B, A], [A, empty], no_rank, [A, vector]):
        with pytest.raises(ValueError, match="are no pair"):
            LoRARITE([{"params": list(params), "pair": True}])
    for group in ({"params": [A, B]}, {"params": [A], "pair": True}):
        with pytest.raises(ValueError, match="in pairs"):
            LoRARITE([group])


def test_options_of_the_plug_in():
    A = nn.Parameter(torch.randn(4, 6))
    B = nn.Parameter(torch.randn(5, 4))
    given = {"eps": 1e-3, "clip": 2.0, "escape": True}
    groups = [{"params": [A, B], "pair": True, "weight_decay": 0.3}]
    optimizer = lora_rite.optimizer(groups, 0.5, beta1=0.1, beta2=0.2, **given)
    expected = {**given, "lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.3}
    for name, value in expected.items():
        assert optimizer.param_groups[0][name] == value, name
    default = lora_rite.optimizer([{"params": [A, B], "pair": True}], 1e-3)
    plain = LoRARITE([{"params": [A, B], "pair": True}])  # its own dict: options are added to it
    assert is_equal(default.param_groups, plain.param_groups)
    assert not default.clips_gradients
