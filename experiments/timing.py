"""Time a function on a GPU as it runs in a training loop."""

import statistics
import time

import torch


def median_ms(function, repeats=50):
    """Return the median milliseconds of a call on the device, with an empty L2 cache.

    In a training loop, the host runs ahead of the device. Here, the device sleeps before each call
    for as long as the host needs to launch it, so only the kernels are timed.
    """
    buffer = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than L2
    time_calls(function, 5, 0, buffer)  # compile and warm up
    sleep_cycles = int(2e6 * 1.5 * host_ms(function))  # a GPU has up to 2e6 cycles per millisecond
    return statistics.median(time_calls(function, repeats, sleep_cycles, buffer))


def time_calls(function, repeats, sleep_cycles, buffer):
    """Return the milliseconds of each call on the device."""
    pairs = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        buffer.zero_()  # overwrites L2
        torch.cuda._sleep(sleep_cycles)
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def host_ms(function):
    """Return the milliseconds that the host needs to launch a call."""
    torch.cuda.synchronize()
    start_time = time.perf_counter()
    for _ in range(5):
        function()
    seconds = (time.perf_counter() - start_time) / 5
    torch.cuda.synchronize()
    return 1e3 * seconds


def measure_ceilings():
    """Return the speed of a large copy and of a large matrix product in bfloat16."""
    a, b = torch.empty(2, 2**29, dtype=torch.bfloat16, device="cuda")
    x, y = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy_tb = 4 * a.numel() / median_ms(lambda: a.copy_(b)) / 1e9
    matmul_tflop = 2 * 8192**3 / median_ms(lambda: x @ y) / 1e9
    return {"copy_TB_per_s": copy_tb, "matmul_TFLOP_per_s": matmul_tflop}
