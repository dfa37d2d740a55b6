"""Run a training step as CUDA graphs: capture its kernels once, then replay them every step."""

import warnings

import torch

from support.distributed import print0, world_size

WARM_UP = 3  # eager steps before the capture: kernels are compiled and optimizer state allocated


def prepare(asked, device, optimizer):
    """Decide whether to capture the training step, and print why. If so, lr moves to the device.

    asked: True, False, or None to capture where it is possible. The optimizer has to keep all
    numbers that change between steps on the device: one with an attribute `capturable = True`, or
    one of PyTorch's fused optimizers, which have an option of this name.
    """
    # what makes a capture impossible, if anything
    is_fused = all("capturable" in group and group.get("fused") for group in optimizer.param_groups)
    obstacle = None
    if device.type != "cuda":
        obstacle = "they need a CUDA GPU"
    elif world_size() > 1:
        obstacle = "they are for a single process"
    elif not (is_fused or getattr(optimizer, "capturable", False)):
        obstacle = f"{type(optimizer).__name__} is not capturable"
    if asked and obstacle:
        raise ValueError(f"--graph cannot be used here ({obstacle}); leave it out")

    # decide and report
    use_graph = asked is not False and obstacle is None
    reason = obstacle or "they save the host's work"
    if asked is not None:
        reason = "set by flag"
    print0(f"graphs   {'on' if use_graph else 'off'} ({reason})")
    if use_graph:
        lr = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = lr
    return use_graph


class CapturedStep:
    """A training step as three CUDA graphs: forward, backward, update.

    A replay reads the addresses of the capture, so each batch is copied there first. Gradients and
    activations live in a memory pool that the graphs share and keep.
    step: a train.Step whose optimizer is capturable and has taken some steps. pool: a memory pool
    to share with other captured steps, never replayed at the same time. Raises RuntimeError if an
    operation cannot be captured.
    """

    def __init__(self, step, batch, pool=None):
        micro_batches, count = batch
        self.optimizer = step.optimizer
        for group in self.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
        self.micro_batches = [(x.clone(), y.clone()) for x, y in micro_batches]
        self.count = count.clone()
        self.pool = pool or torch.cuda.graph_pool_handle()

        # capture in the order of replay: a graph may reuse memory that the one before has freed
        static_batch = self.micro_batches, self.count
        self.forward_graph, self.total_loss = self.capture(step.forward, static_batch)
        self.backward_graph, self.grad_norm = self.capture(step.backward)
        if hasattr(self.optimizer, "prepare"):  # the addresses of the gradients are final now
            self.optimizer.prepare()
        self.update_graph, _ = self.capture(step.optimizer.step)

    def capture(self, function, *args):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function(*args)
        return graph, result

    def forward(self, batch):
        micro_batches, count = batch
        for static, given in zip(self.micro_batches, micro_batches):
            for static_tensor, tensor in zip(static, given):
                static_tensor.copy_(tensor)
        self.count.copy_(count)
        self.forward_graph.replay()
        return self.total_loss

    def backward(self):
        self.backward_graph.replay()
        return self.grad_norm

    def update(self):
        self.update_graph.replay()

    def clear(self):
        """Keep the gradients: the next backward pass overwrites them."""


def capture_step(step, batch):
    """Return a CapturedStep, or if that fails the step itself, with a warning."""
    try:
        return CapturedStep(step, batch)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"the step runs eagerly, since it cannot be captured: {reason}")
        # the failed capture leaves PyTorch's generator in capture mode; a cloned state is not
        generator = torch.cuda.default_generators[batch[1].device.index]
        generator.graphsafe_set_state(generator.clone_state())
        step.clear()
        return step
