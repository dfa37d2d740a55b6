"""LoRA-RITE's cache of batches: rebuilt when tensors move, kept for a captured CUDA graph."""

import weakref

import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")

import lora_rite
from lora_rite import LoRARITE
from tests.common import gpu, is_equal
from tests.test_lora_rite_kernel import EAGER, KERNEL, problem, run, state_of


@pytest.mark.parametrize("use_kernel", [KERNEL, EAGER])
def test_batches_are_rebuilt_only_when_tensors_move(use_kernel):
    pairs, grads = problem([(2, 9, 7), (2, 5, 8)], 1, torch.float32)
    ps, optimizer = run(use_kernel, pairs, grads, torch.float32)
    assert optimizer.find_batches() is optimizer.find_batches()
    assert len(optimizer.plans) == 1

    def rebuilds_after(change):
        """Return whether other batches are found after a change."""
        before = optimizer.find_batches()
        change()
        after = optimizer.find_batches()
        if use_kernel is KERNEL:  # the first two columns of a table hold addresses
            for _, batch in after:
                addresses = [[p.data_ptr(), p.grad.data_ptr()] for p in batch.parameters]
                assert batch.table[:, :2].tolist() == addresses
        return after is not before

    state = optimizer.state[ps[1]]
    assert rebuilds_after(lambda: setattr(ps[0], "data", ps[0].data.clone()))
    assert rebuilds_after(lambda: setattr(ps[3], "grad", ps[3].grad.clone()))
    assert rebuilds_after(lambda: state.update(M=state["M"].clone()))
    assert rebuilds_after(lambda: state.update(packed=state["packed"].clone()))
    assert rebuilds_after(lambda: optimizer.load_state_dict(optimizer.state_dict()))
    assert not rebuilds_after(lambda: optimizer.param_groups[0].update(lr=0.3, clip=0.1))
    before = optimizer.find_batches()
    optimizer.use_kernel = not use_kernel
    assert optimizer.find_batches() is not before


def test_cached_batches_keep_no_tensors_of_a_step():
    """There are up to 16 of them, and their (r, r) tensors would add up."""
    pairs, grads = problem([(2, 9, 7)], 2, torch.float64)
    _, optimizer = run(EAGER, pairs, grads, torch.float64)
    for batches in optimizer.plans.values():
        for _, batch in batches:
            assert vars(batch).keys() == {"parameters", "states", "rows", "has_grad"}


def test_the_tables_of_a_graph_are_kept(monkeypatch):
    """A graph reads its tables of addresses at each replay, so they must outlive other plans."""
    pairs, grads = problem([(2, 9, 7)], 1, torch.float32)
    ps, optimizer = run(KERNEL, pairs, grads, torch.float32)

    def current_table():
        ((_, batch),) = optimizer.find_batches()
        return weakref.ref(batch.table)

    def set_capturing(is_capturing):  # what PyTorch says about the current stream
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_capturing)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)

    captured = current_table()
    set_capturing(True)
    assert current_table()() is captured()

    # a new table cannot be uploaded during a capture
    ps[0].grad = ps[0].grad.clone()
    with pytest.raises(RuntimeError, match="has moved since prepare"):
        current_table()
    set_capturing(False)
    optimizer.prepare()
    ((_, batch),) = optimizer.plans[optimizer.addresses()]
    not_captured = weakref.ref(batch.table)
    del batch

    # the oldest plans are dropped, but not the captured one
    old_grads = []  # kept alive, so that each new gradient has a new address
    for _ in range(2 * lora_rite.MAX_PLANS):
        old_grads.append(ps[0].grad)
        ps[0].grad = ps[0].grad.clone()
        current_table()
    assert len(optimizer.plans) == lora_rite.MAX_PLANS
    assert captured() is not None
    assert not_captured() is None


def is_capturable(use_kernel, dtype=torch.float32):
    pair = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((2, 7), (9, 2))]
    group = {"params": pair, "pair": True}
    return LoRARITE([group], use_kernel=use_kernel).capturable


def test_steps_of_the_kernel_alone_are_capturable(monkeypatch):
    assert is_capturable(KERNEL)
    assert not is_capturable(KERNEL, torch.float64), "the kernels do not support float64"
    assert not is_capturable(EAGER)
    assert not is_capturable(None), "on a CPU, PyTorch is the default"
    monkeypatch.setattr(lora_rite, "kernel", None)
    assert not is_capturable(None)


@gpu
@pytest.mark.parametrize("moves_grads", [False, True])
def test_a_cuda_graph(moves_grads):
    """The graph reads lr on the device, and its tables are of earlier steps or of prepare()."""
    pairs, grads = problem([(16, 200, 300)], 8, torch.float32)
    captured_ps = [nn.Parameter(p.cuda()) for p in pairs[0]]
    plain_ps = [nn.Parameter(p.cuda()) for p in pairs[0]]
    lr = torch.zeros((), dtype=torch.float64, device="cuda")
    captured = LoRARITE([{"params": captured_ps, "pair": True}], lr)
    plain = LoRARITE([{"params": plain_ps, "pair": True}])
    graph = torch.cuda.CUDAGraph()
    for p in (*captured_ps, *plain_ps):
        p.grad = torch.empty_like(p)
    for t, step_grads in enumerate(grads):
        lr.fill_(0.05 / (t + 1))
        plain.param_groups[0]["lr"] = 0.05 / (t + 1)
        if t == 3 and moves_grads:
            for p in captured_ps:
                p.grad = torch.empty_like(p)
        for ps in (captured_ps, plain_ps):
            for p, grad in zip(ps, step_grads):
                p.grad.copy_(grad)
        plain.step()

        # three steps without a graph, then capture one and replay it
        if t < 3:
            captured.step()
            continue
        if t == 3:
            captured.prepare()
            with torch.cuda.graph(graph):
                captured.step()
            captured_grads = [p.grad for p in captured_ps]
            # if the captured table had been freed, these plans would take its memory
            for _ in range(2 * lora_rite.MAX_PLANS):
                for p in captured_ps:
                    p.grad = p.grad.clone()
                captured.find_batches()
            for p, grad in zip(captured_ps, captured_grads):
                p.grad = grad
        graph.replay()
    assert is_equal(captured_ps, plain_ps)
    assert state_of(captured, captured_ps, 0)["step"] == 8
