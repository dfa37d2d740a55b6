"""Device and host times of a function on a GPU, as a training loop would see them."""

import statistics
import time

import torch


def median_ms(function, repeats=50):
    """Return median milliseconds on the device, its L2 emptied before each call.

    The device sleeps as long as the host takes to launch the call, so that the host is ahead, as
    in a training loop: what is timed are the kernels.
    """
    l2 = torch.empty(2**28, dtype=torch.int8, device="cuda")
    time_events(function, 5, 0, l2)  # compile, warm up
    sleep_cycles = int(2e6 * 1.5 * host_ms(function))
    return statistics.median(time_events(function, repeats, sleep_cycles, l2))


def time_events(function, repeats, sleep_cycles, l2):
    """Return the milliseconds between events before and after each of some calls."""
    pairs = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        l2.zero_()
        torch.cuda._sleep(sleep_cycles)
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def host_ms(function):
    """Return the milliseconds that the host takes to launch a call."""
    torch.cuda.synchronize()
    start_time = time.perf_counter()
    for _ in range(5):
        function()
    seconds = (time.perf_counter() - start_time) / 5
    torch.cuda.synchronize()
    return 1e3 * seconds


def measure_ceilings():
    """Return the speed of a large copy and of a large bfloat16 matrix product."""
    a, b = torch.empty(2, 2**29, dtype=torch.bfloat16, device="cuda")
    x, y = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy_tb = 4 * a.numel() / median_ms(lambda: a.copy_(b)) / 1e9
    matmul_tflop = 2 * 8192**3 / median_ms(lambda: x @ y) / 1e9
    return {"copy_TB_per_s": copy_tb, "matmul_TFLOP_per_s": matmul_tflop}
