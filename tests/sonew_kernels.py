"""All kernels of SONew in one module, so that tests/build.py compiles them in one process."""

from kernels.sonew import direction_kernel, norms_kernel, update_kernel
from kernels.sonew_fused import halo_kernel, step_kernel
from kernels.sonew_hopper import ring_kernel

__all__ = ["direction_kernel", "norms_kernel", "update_kernel"]
__all__ += ["halo_kernel", "step_kernel", "ring_kernel"]
