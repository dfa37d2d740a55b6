"""Compile kernels for GPUs that are not here, and read what the assembler reports.

Triton compiles without a GPU, and its wheel carries ptxas. A process in which Triton interprets
cannot compile, so another one does, which serves all tests. A test lists what real calls launch:

    CASES = [
        Case("forward_kernel", {"D": 128, "BN": 64, "PREC": "tf32"}, arch=90, num_warps=8),
        Case("forward_kernel", {"D": 64, "BN": 16, "PREC": "ieee"}, dtype="fp32"),
    ]

    def test_kernels_build():
        check_build("kernels.mine", CASES)

`build(module, cases)` returns the reports without checking them: a list of dicts with the keys
kernel, chip, constants, registers (per thread), spilled (bytes per thread), shared (bytes per
block), tensor_core_instructions, has_tf32.
"""

import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes per block
# the instructions of tensor cores; those of float64 round like any others
TENSOR_CORE = r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*(?<!f64)\s"


@dataclass
class Case:
    """One specialization of a kernel.

    constants: values of the constexpr arguments (Triton dtypes, too) and None pointers. types: of
    the other arguments, as Triton writes them: "*bf16", "i32", "fp32", "tensordesc<...>". An
    argument in neither is a pointer to `dtype` if its name ends in _ptr, fp32 if it is in FLOATS,
    else i32. Pointers are taken to be 16-byte aligned, as those of torch are.
    """

    kernel: str  # its name in the module
    constants: dict = field(default_factory=dict)
    types: dict = field(default_factory=dict)
    dtype: str = "bf16"
    arch: int = 90  # 80 A100, 90 H100 and H200, 100 B200, 120 RTX 50
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # most registers per thread
    aligned: tuple = ()  # integer arguments that calls pass as multiples of 16, such as strides
    max_spilled: int = 48  # bytes per thread that check_build lets pass
    uses_tensor_cores: bool | None = None  # True: must; False: must not, nor TF32; None: either


FLOATS = ("scale", "eps")


@functools.cache
def start_compiler():
    """Start the process that compiles. It ends when this one closes its stdin."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # the assembler's report comes only with compilation, not from Triton's cache
    environment |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth faster, with the same registers
    command = [sys.executable, "-m", "tests.build"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=pipe, stdout=pipe, text=True
    )


def build(module, cases):
    """Compile the cases, all kernels of one module ("kernels.laser"). Return a report for each."""
    compiler = start_compiler()
    job = json.dumps([module, [asdict(case) for case in cases]], default=encode_dtype)
    print(job, file=compiler.stdin, flush=True)
    reports, error = json.loads(compiler.stdout.readline())
    assert not error, error
    return reports


def check_build(module, cases):
    """Assert that the cases fit the GPU, hardly spill and use tensor cores as stated; -> reports"""
    reports = build(module, cases)
    check_reports(cases, reports)
    return reports


def check_reports(cases, reports):
    for case, report in zip(cases, reports, strict=True):
        assert report["shared"] <= SHARED_LIMIT[case.arch], f"too much shared memory: {report}"
        assert report["spilled"] <= case.max_spilled, f"registers spill: {report}"
        if case.uses_tensor_cores is True:
            assert report["tensor_core_instructions"] > 0, f"no tensor cores: {report}"
        if case.uses_tensor_cores is False:
            assert report["tensor_core_instructions"] == 0, f"tensor cores: {report}"
            assert not report["has_tf32"], f"float32 must not become TF32: {report}"


def encode_dtype(value):
    """JSON for a Triton dtype: {"triton dtype": "fp32"}"""
    return {"triton dtype": value.name}


def decode_dtype(value):
    import triton.language as tl

    return tl.dtype(value["triton dtype"]) if "triton dtype" in value else value


def compile_case(module, case):
    """Compile one case, in a process without the interpreter. Return its report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = getattr(importlib.import_module(module), case["kernel"])
    constants = case["constants"]
    signature = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        default = "fp32" if name in FLOATS else "i32"
        if name.endswith("_ptr"):
            default = f"*{case['dtype']}"
        signature[name] = "constexpr" if name in constants else case["types"].get(name, default)
        if signature[name].startswith("*") or name in case["aligned"]:
            attributes[(i,)] = [["tt.divisibility", 16]]

    source = GluonASTSource if kernel.is_gluon() else ASTSource
    options = {name: case[name] for name in ("num_warps", "num_stages", "maxnreg")}
    with redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(
            source(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", case["arch"], 32),
            options=options,
        )

    # what the assembler said while Triton compiled
    log = printed.getvalue()
    assert "registers" in log, f"ptxas said nothing about {case}"
    ptx = compiled.asm["ptx"]

    def largest(pattern):
        return max(map(int, re.findall(pattern, log)), default=0)

    return {
        "kernel": case["kernel"],
        "chip": re.search(r"\.target (\w+)", ptx)[1],  # sm_80, sm_90a, ...
        "constants": str(constants),
        "registers": largest(r"Used (\d+) registers"),
        "spilled": largest(r"(\d+) bytes spill stores"),
        "shared": compiled.metadata.shared,
        "tensor_core_instructions": len(re.findall(TENSOR_CORE, ptx)),
        "has_tf32": "tf32" in ptx,
    }


def compile_cases(job):
    """Return the reports on a job, see `build`, and a traceback or ""."""
    try:
        module, cases = json.loads(job, object_hook=decode_dtype)
        importlib.import_module(module)  # once, and not in each process of the pool
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_case, [module] * len(cases), cases)), ""
    except Exception:
        return [], traceback.format_exc()


def main():
    for job in sys.stdin:
        print(json.dumps(compile_cases(job)), flush=True)


if __name__ == "__main__":
    main()
