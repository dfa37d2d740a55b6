"""SONew: the LogDet problem, the optimizer in PyTorch, its state, shards, runs of train.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import sonew
import train
from tests.common import is_equal


def banded(n, b, seed=0):
    """Return b+1 diagonals (n,) of a mean of outer products, and a momentum (n,), in float64."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(3 * n + 9, n, generator=generator, dtype=torch.float64)
    g[:, 1:] += 0.8 * g[:, :-1]  # neighbours are correlated
    full = g.T @ g / len(g)
    S = []
    for k in range(b + 1):
        diagonal = full.diagonal(k) if k < n else torch.zeros(0, dtype=torch.float64)
        S.append(F.pad(diagonal, (0, n - len(diagonal))))
    return S, g[0]


def dense_X(psi, s):
    """Return X = L diag(1/s) L^T as a matrix (n, n), of psi and s (1, n)."""
    n = s.shape[1]
    L = torch.eye(n, dtype=s.dtype)
    for k, x in enumerate(psi, 1):
        for i in range(n - k):
            L[i + k, i] = -x[0, i]
    return L @ torch.diag(1 / s[0]) @ L.T


def row(tensors):
    """Return vectors (n,) as single chains (1, n)."""
    return [t[None] for t in tensors]


# --------------------------------------------------------------------------------------------------
# The method


@pytest.mark.parametrize("b", range(5))
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 30])
def test_completes_the_band_to_maximal_determinant(n, b):
    S, m = banded(n, b)
    psi, s = sonew.factor(row(S), 0.0)
    X = dense_X(psi, s)
    inverse = torch.linalg.inv(X)
    for k in range(min(b, n - 1) + 1):
        assert torch.allclose(inverse.diagonal(k), S[k][: n - k], atol=1e-12), "X^-1 = S on band"
    assert not X.triu(b + 1).any(), "X is banded"
    assert torch.linalg.eigvalsh(X).min() > 0
    assert abs(torch.logdet(X) + s.log().sum()) < 1e-10

    X_reference, u = sonew.reference(S, m)
    assert torch.allclose(X, X_reference, atol=1e-11)
    assert torch.allclose(sonew.precondition(m[None], psi, s)[0], u, atol=1e-11)


def test_is_newton_where_the_band_is_all_and_on_an_ar1_chain():
    S, m = banded(5, 4)
    full = torch.diag(S[0])
    for k in range(1, 5):
        full = full + torch.diag(S[k][: 5 - k], k) + torch.diag(S[k][: 5 - k], -k)
    u = sonew.precondition(m[None], *sonew.factor(row(S), 0.0))[0]
    assert torch.allclose(u, torch.linalg.solve(full, m), atol=1e-10)

    positions = torch.arange(40, dtype=torch.float64)
    ar1 = 0.9 ** (positions[:, None] - positions).abs()
    S = row([F.pad(ar1.diagonal(k), (0, k)) for k in range(2)])
    m = torch.randn(1, 40, dtype=torch.float64)
    u = sonew.precondition(m, *sonew.factor(S, 0.0))
    assert torch.allclose(u[0], torch.linalg.solve(ar1, m[0]), atol=1e-10)
    u = sonew.precondition(m, *sonew.factor(S[:1], 0.0))
    assert torch.equal(u, m / S[0]), "band 0 has no square root"


def test_edges_are_removed_at_gamma():
    """Coordinate 0 is explained by its successor but for 1e-3 of its variance."""
    S = row([torch.tensor([1.0, 1.0]), torch.tensor([(1 - 1e-3) ** 0.5, 0.0])])
    m = torch.tensor([[1.0, 2.0]])
    psi, s = sonew.factor(S, 0.9e-3)
    assert psi[0][0, 0] == S[1][0, 0] and abs(s[0, 0] - 1e-3) < 1e-6
    psi, s = sonew.factor(S, 1.1e-3)
    assert not psi[0].any() and torch.equal(s, S[0])
    assert torch.equal(sonew.precondition(m, psi, s), m / S[0])

    # the threshold is relative to the successor's own S_0, before elimination
    for unit, eps in ((1e-2, 1e-3), (1e2, 1e-3)):
        S = row([torch.full((2,), unit), torch.tensor([0.5 * unit, 0.0])])
        psi, s = sonew.factor(S, eps)
        assert torch.allclose(psi[0][0, 0], torch.tensor(0.5))
    S = row([torch.ones(3) * 9, torch.tensor([1.0, 9.0 * (1 - 1e-3), 0.0]), torch.ones(3)])
    psi, _ = sonew.factor(S, 1e-3)
    assert psi[1][0, 0] != 0, "2e-3 of the second successor is left"
    psi, _ = sonew.factor(S, 3e-3)
    assert psi[1][0, 0] == 0 and psi[0][0, 0] != 0

    # a successor that the one before it explains has no edge, others keep theirs
    g = torch.tensor([[1.0, 2.0, 2.0], [1.0, -1.0, -1.0]])
    S = row([F.pad((g[:, : 3 - k] * g[:, k:]).mean(0), (0, k)) for k in range(3)])
    psi, s = sonew.factor(S, 1e-3)
    assert psi[1][0, 0] == 0 and psi[0][0, 0] == S[1][0, 0] / S[0][0, 1]
    assert torch.allclose(s[0, 0], S[0][0, 0] - S[1][0, 0] ** 2 / S[0][0, 1])


def run_update(grads, b, eps=0.0, gamma=1e-6, beta1=0.9, beta2=0.99):
    """Feed gradients (R, C); return m, S, u, a of the last step, as SONew computes them."""
    dtype = grads[0].dtype
    m = torch.zeros_like(grads[0])
    S = [torch.zeros_like(m) for _ in range(b + 1)]
    scale = grads[0].abs().mean()
    for t, g in enumerate(grads, 1):
        m, S, is_good = sonew.update_statistics(g, m, S, beta1, beta2)
        step = torch.tensor(float(t), dtype=dtype)
        u, a, root = sonew.directions(m, S, step, scale, beta1, beta2, eps, gamma)
        scale = root.mean() * sonew.unit_of(scale)
        assert is_good.all()
    return m, S, u, a, scale


@pytest.mark.parametrize("b", range(5))
@pytest.mark.parametrize("case", ["rank one", "equal", "zero", "huge", "tiny", "half zero"])
def test_stays_positive_definite(case, b):
    g = torch.randn(1, 24, generator=torch.Generator().manual_seed(3))
    g = {
        "rank one": g,
        "equal": torch.ones(1, 24),
        "zero": g * 0,
        "huge": g * 1e18,
        "tiny": g * 1e-18,
        "half zero": g * (torch.arange(24) % 4 > 1),
    }[case]
    for eps in (0.0, 1e-5):
        for steps in (1, 2, 3):
            m, S, u, a, scale = run_update([g] * steps, b, eps)
            S_hat = [S_k / (scale * scale).clamp(min=1e-30) for S_k in S]
            S_hat[0] = S_hat[0] + eps
            psi, s = sonew.factor(S_hat, 1e-6)
            assert all(x.isfinite().all() for x in (m, *S, u, a, s, *psi))
            assert (s >= 0).all() and scale >= 0
            assert not u[g == 0].any(), "no gradient, no step"
            if (S_hat[0] > 0).all() and case != "tiny":  # tiny^2 is subnormal
                assert (s > 1e-6 * S_hat[0]).all()
                X = dense_X([x.double() for x in psi], s.double())
                assert torch.linalg.eigvalsh(X).min() > 0


@pytest.mark.parametrize("b", [0, 1, 3])
def test_is_equivariant_under_diagonal_scaling(b):
    generator = torch.Generator().manual_seed(0)
    g, d = torch.rand(2, 6, 2, 9, generator=generator, dtype=torch.float64) + 0.1
    d = d[0]
    _, _, u, a, scale = run_update(g, b, gamma=1e-12)
    _, _, u_d, a_d, scale_d = run_update(g * d, b, gamma=1e-12)
    u = u / scale  # back from units of 1 / scale; those of the last step cancel in the graft
    u_d = u_d / scale_d
    ratio = (u_d * d / u).flatten()
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-6), "g -> d g: u -> u / d"
    assert torch.allclose(a_d, a), "g -> d g leaves Adam's step as it was"


def test_directions_equal_dense_algebra_with_damping():
    """The eps of a step is in units of the squared scale after the step before."""
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(5, 1, 7, generator=generator, dtype=torch.float64) * 1e-3
    m, S, _, _, scale = run_update(grads[:4], 2)
    m, S, _ = sonew.update_statistics(grads[4], m, S, 0.9, 0.99)
    step = torch.tensor(5.0, dtype=torch.float64)
    eps = 0.3
    u, a, root = sonew.directions(m, S, step, scale, 0.9, 0.99, eps, 1e-12)
    S_hat = [S_k[0] / (1 - 0.99**5) for S_k in S]
    m_hat = m[0] / (1 - 0.9**5)
    _, u_dense = sonew.reference([S_hat[0] + eps * scale**2, *S_hat[1:]], m_hat)
    assert torch.allclose(u[0] / scale, u_dense, rtol=1e-9)
    assert torch.allclose(a[0], m_hat / S_hat[0].sqrt(), rtol=1e-12)
    assert torch.allclose(root[0] * scale, S_hat[0].sqrt(), rtol=1e-12)

    # the scale itself: the mean root-mean-square gradient after four steps
    weights = 0.99 ** torch.arange(3, -1, -1, dtype=torch.float64)
    mean_square = (weights[:, None] * grads[:4, 0] ** 2).sum(0) / weights.sum()
    assert torch.allclose(scale, mean_square.sqrt().mean(), rtol=1e-12)


# --------------------------------------------------------------------------------------------------
# The optimizer


def take_steps(options, grads, shape=(6, 7), start=1.0, use_kernel=False):
    """Return the parameter after each step."""
    p = torch.nn.Parameter(torch.full(shape, start))
    optimizer = sonew.SONew([p], use_kernel=use_kernel, **options)
    path = []
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path, optimizer


@pytest.mark.parametrize("options", [{}, {"band": 0}, {"band": 4, "chain": "flat"}], ids=str)
@pytest.mark.parametrize("shape", [(6, 7), (5,)], ids=str)
def test_the_scale_of_gradients_does_not_matter(shape, options):
    """Bit for bit for powers of two; 1e-4 rounds the gradients themselves."""
    options = {"lr": 0.1, "weight_decay": 0.1, **options}
    grads = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)) * 3e-5
    path, optimizer = take_steps(options, grads, shape)
    for factor in (2.0**-13, 2.0**20):
        scaled, other = take_steps(options, grads * factor, shape)
        assert is_equal(path, scaled)
        (p,), (q,) = optimizer.state, other.state
        assert torch.equal(optimizer.state[p]["scale"] * factor, other.state[q]["scale"])
    scaled, _ = take_steps({**options, "eps": 1e-2}, grads * 1e-4, shape)
    path, _ = take_steps({**options, "eps": 1e-2}, grads, shape)
    assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(path, scaled, strict=True))


def test_statistics_and_not_eps_precondition_a_gpt(tiny):
    """S_0 exceeds the eps that is added to it, in 95% of the coordinates of all matrices."""
    steps = 40
    argv = [*tiny, "--optim", "sonew", "--lr", "0.003", "--sample", "0", "--n-layer", "3"]
    out = train.main([*argv, "--steps", str(steps)])["out"]
    saved = train.load_checkpoint(out)["optimizer"]
    n_above = 0
    n_all = 0
    for group in saved["param_groups"]:
        for i in group["params"]:
            state = saved["state"][i]
            if "s1" in state:  # a matrix
                S_0 = state["s0"] / (1 - group["betas"][1] ** steps)
                n_above += (S_0 > group["eps"] * state["scale"] ** 2).sum().item()
                n_all += S_0.numel()
    assert n_above >= 0.95 * n_all


@pytest.mark.parametrize("band,chain", [(0, "row"), (1, "row"), (1, "flat"), (4, "row")])
def test_takes_steps_of_adams_length(band, chain):
    p, q = (torch.nn.Parameter(torch.zeros(6, 7)) for _ in range(2))
    b, c = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
    lr = 0.01
    ours = sonew.SONew([p, b], lr, band=band, chain=chain)
    adam = torch.optim.Adam([q, c], lr, (0.9, 0.99))
    for t in range(10):
        before = p.detach().clone()
        adam_before = q.detach().clone()
        p.grad = torch.randn(6, 7)
        b.grad = torch.randn(5)
        q.grad = p.grad.clone()
        c.grad = b.grad.clone()
        ours.step()
        adam.step()
        length = (p - before).norm() / (q - adam_before).norm()
        assert abs(length - 1) < 1e-5, f"step {t + 1}"
        move = p - before
        assert t > 0 or abs(move.norm() / lr / 42**0.5 - 1) < 1e-5, "the first: lr for each"
        assert not torch.allclose(move, q - adam_before, atol=1e-4)
    assert torch.allclose(b, c, atol=1e-6), "gains take Adam's step"

    before = p.detach().clone()
    ours.param_groups[0]["weight_decay"] = 0.5
    p.grad = torch.zeros(6, 7)
    b.grad = None
    for tensor in ours.state[p].values():
        tensor.zero_()
    ours.step()
    assert torch.allclose(p, before * (1 - lr * 0.5)), "a zero gradient: nothing but decay"


def test_betas_of_zero_are_the_sign_of_the_gradient():
    grads = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    path, _ = take_steps({"lr": 0.1, "betas": (0.0, 0.0)}, grads, (5,), start=0.0)
    expected = -0.1 * grads.sign().cumsum(0)
    assert torch.allclose(torch.stack(path), expected, atol=1e-6)


def test_tiny_gradients_after_none_take_steps_of_full_length():
    g = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    grads = [torch.zeros(4, 5), g * 1e-13]
    path, _ = take_steps({"lr": 0.1, "betas": (0.0, 0.0)}, grads, (4, 5), start=0.0)
    assert abs(path[1].norm() / 0.1 / 20**0.5 - 1) < 1e-4


def test_rows_are_chains_and_flat_joins_them():
    """What a row's gradient does must not depend on another row's, unless chains are flat."""
    grads = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
    changed = grads.clone()
    changed[:, 1] = -grads[:, 1].flip(-1)
    moves = {}
    for chain in ("row", "flat"):
        for name, g in (("one", grads), ("other", changed)):
            path, optimizer = take_steps({"band": 2, "chain": chain}, g, (2, 5))
            (p,) = optimizer.state
            moves[chain, name] = optimizer.state[p]["s1"]
    assert torch.equal(moves["row", "one"][0], moves["row", "other"][0])
    assert not moves["row", "one"][:, -1].any(), "a row ends its chain"
    assert moves["flat", "one"][0, -1] != 0 and moves["flat", "one"][1, -1] == 0


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1, 1), (5, 1), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("chain", ["row", "flat"])
def test_small_and_empty_parameters(shape, chain):
    grads = torch.randn(3, *shape)
    path, optimizer = take_steps({"lr": 0.1, "band": 2, "chain": chain}, grads, shape)
    (state,) = optimizer.state.values()
    assert path[-1].isfinite().all() and state["step"] == 3 and state["skipped"] == 0
    assert all(value.isfinite().all() for value in state.values())
    assert not path[-1].numel() or (path[-1] != 1).all()


def test_the_first_step_and_its_scale():
    """The first scale is the mean magnitude of the first gradient, which damps its own step."""
    g = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    path, optimizer = take_steps({"lr": 0.1, "eps": 0.5, "band": 1}, [g], (4, 5))
    (state,) = optimizer.state.values()
    scale = g.double().abs().mean()
    assert torch.allclose(state["scale"].double(), scale)
    u = []
    for row in g.double():
        S = [row**2 + 0.5 * scale**2, F.pad(row[:-1] * row[1:], (0, 1))]
        u.append(sonew.reference(S, row)[1])
    u = torch.stack(u)
    expected = 1 - 0.1 * u * 20**0.5 / u.norm()
    assert torch.allclose(path[0].double(), expected, atol=1e-5)


def test_a_tensor_that_wakes_late():
    """No gradient for a while, then some, first as momentum; and rows that never see one."""
    grads = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    grads[:2] = 0
    grads[:, 3] = 0
    path, optimizer = take_steps({"lr": 0.1, "band": 2}, grads, (4, 5))
    (state,) = optimizer.state.values()
    assert torch.equal(path[1], torch.ones(4, 5)), "nothing has happened yet"
    mean_root = grads[2, :3].abs().sum() * (0.01 / (1 - 0.99**3)) ** 0.5 / 20
    _, third = take_steps({"lr": 0.1, "band": 2}, grads[:3], (4, 5))
    assert torch.allclose(list(third.state.values())[0]["scale"], mean_root)
    assert all(torch.equal(x[3], torch.ones(5)) for x in path)
    assert all(x.isfinite().all() for x in (*path, *state.values()))
    assert (path[-1][:3] != 1).all()
    move = path[2] - path[1]
    assert torch.allclose(move / move.norm(), -grads[2] / grads[2].norm(), atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_skips_a_bad_gradient(bad):
    p, q = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = sonew.SONew([p, q], 0.1, weight_decay=0.1)
    for t in range(3):
        p.grad = torch.randn(3, 4)
        q.grad = torch.randn(3, 4)
        p_before = p.detach().clone()
        q_before = q.detach().clone()
        if t == 1:
            p.grad[1, 2] = bad
        m_before = optimizer.state[p]["m"].clone() if t else None
        S_before = optimizer.state[p]["s0"].clone() if t else None
        optimizer.step()
        assert torch.equal(p, p_before) == (t == 1) and not torch.equal(q, q_before)
        if t == 1:  # it counts as a gradient of 0
            assert optimizer.state[p]["m"][1, 2] == 0.9 * m_before[1, 2]
            assert optimizer.state[p]["s0"][1, 2] == 0.99 * S_before[1, 2]
    p_state = optimizer.state[p]
    assert p_state["skipped"] == 1 and optimizer.state[q]["skipped"] == 0 and p_state["step"] == 3
    assert all(value.isfinite().all() for value in (p, q, *p_state.values()))


def test_a_bad_first_gradient_sets_no_scale():
    grads = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))
    grads[0, 0, 0] = math.inf
    _, optimizer = take_steps({"lr": 0.1}, grads[:1], (3, 4))
    (state,) = optimizer.state.values()
    assert state["scale"] == 0
    path, optimizer = take_steps({"lr": 0.1}, grads, (3, 4))
    (state,) = optimizer.state.values()
    assert torch.equal(path[0], torch.ones(3, 4)) and (path[2] != 1).all()
    assert path[2].isfinite().all() and state["skipped"] == 1 and 0 < state["scale"] < 10


def test_a_closure_has_gradients_and_returns_its_loss():
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = sonew.SONew([p], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 12 and (p != 1).any()


def test_bf16_state_removes_edges_within_its_rounding():
    """With neighbours that agree to 0.4%, the edge is kept in float32 and removed in bfloat16."""
    g = torch.tensor([[1.0, 1.0]])
    grads = [g, torch.tensor([[1.0, 0.9]]), g]
    steps = {}
    for bf16_state in (False, True):
        options = {"lr": 0.1, "eps": 0.0, "betas": (0.5, 0.5), "bf16_state": bf16_state}
        steps[bf16_state] = take_steps(options, grads, (1, 2), start=0.0)[0][-1]
    diagonal = take_steps({**options, "band": 0}, grads, (1, 2), start=0.0)[0][-1]
    assert torch.allclose(steps[True], diagonal, rtol=1e-3)
    assert not torch.allclose(steps[False], diagonal, rtol=1e-2)


def test_gradients_whose_squares_sum_to_infinity():
    grads = torch.full((3, 40, 40), 1.8e19)
    path, optimizer = take_steps({"lr": 0.1}, grads, (40, 40))
    (state,) = optimizer.state.values()
    assert all(value.isfinite().all() for value in (*path, *state.values()))
    assert state["skipped"] == 0 and (path[-1] != 1).any()
    assert torch.allclose(state["scale"], torch.tensor(1.8e19))


def test_refuses_bad_options():
    p = torch.nn.Parameter(torch.ones(3, 4))
    for options, part in (
        ({"band": 5}, "band is 5"),
        ({"band": -1}, "band is -1"),
        ({"chain": "rows"}, "row or flat"),
        ({"lr": -1.0}, "lr is -1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"eps": math.nan}, "eps is nan"),
        ({"eps": -1e-9}, "eps is -1e-09"),
        ({"gamma": math.inf}, "gamma is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ):
        with pytest.raises(ValueError, match=part):
            sonew.SONew([p], **options)
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense"):
        sonew.SONew(embedding.parameters()).step()
    z = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    z.grad = z.detach()
    with pytest.raises(ValueError, match="real"):
        sonew.SONew([z]).step()


def test_parameters_and_gradients_may_be_views():
    grads = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    expected, _ = take_steps({"lr": 0.1, "band": 2}, grads, (6, 8))
    p = torch.nn.Parameter(torch.ones(8, 6).T)
    optimizer = sonew.SONew([p], 0.1, band=2)
    address = p.data_ptr()
    for g in grads:
        p.grad = g.T.contiguous().T
        before = p.grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, before), "the gradient is left as it was"
    assert torch.equal(p, expected[-1]) and p.data_ptr() == address
