"""The GPU kernel against the naive loop, without a GPU.

It runs in Triton's interpreter and is compiled for GPUs, each in a process of its own: Triton reads
TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contextlm.ops.context_scan.naive import context_scan_naive

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

INTERPRET = """
import sys, torch
from contextlm.ops.context_scan.triton import context_scan_triton
cases = torch.load(sys.argv[1])
results = {name: context_scan_triton(*tensors, **more) for name, (tensors, more) in cases.items()}
torch.save(results, sys.argv[2])
"""

COMPILE = """
import json, re, subprocess, sys
from pathlib import Path
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from contextlm.ops.context_scan.triton import padded_width, scan_kernel, warps
lister = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
binary = Path(sys.argv[2])
stacks = []
for capability, layers, width, kind, masked in json.loads(sys.argv[1]):
    constants = {"EPS": 1e-5, "WIDTH": width, "PADDED": padded_width(width), "LAYERS": layers,
                 "MASKED": masked, "STATE": tl.float64 if kind == "fp64" else tl.float32}
    types = {"mask_BT": "*i1", "batch": "i32", "tokens": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*" + kind) for name in scan_kernel.arg_names}
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps(layers, width)}
    kernel = triton.compile(ASTSource(scan_kernel, signature, constants), target, options)
    binary.write_bytes(kernel.asm["cubin"])
    used = subprocess.run([lister, "--dump-resource-usage", binary], capture_output=True, text=True)
    stacks.append(int(re.search("STACK:([0-9]+)", used.stdout)[1]))
print(json.dumps(stacks))
"""
# Compute capability, layers, width, type of the tensors, with a mask.
COMPILED = [
    (90, 1, 256, "fp32", True),
    (90, 4, 100, "fp32", False),
]


def make(layers: int, batch: int, tokens: int, width: int, dtype=torch.float64):
    g = torch.Generator().manual_seed(layers + batch + tokens + width)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    projected = [rand(batch, tokens, width) for _ in range(layers)]
    weights = [rand(width, width) * width**-0.5 for _ in range(layers)]
    scales = [rand(width) for _ in range(layers)]
    shifts = [rand(width) for _ in range(layers)]
    return projected, weights, scales, shifts, rand(batch, width)


def cases() -> dict[str, tuple[tuple, dict]]:
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, :4], mask[1] = False, False
    apart = make(2, 2, 5, 6)
    apart[0][0] = apart[0][0].transpose(1, 2).contiguous().transpose(1, 2)
    apart[1][1] = apart[1][1].t().contiguous().t()
    sizes = {
        "one number": make(1, 1, 1, 1),
        "a power of two": make(1, 2, 7, 8),
        "three layers": make(3, 2, 7, 5),
        "padding": make(2, 3, 9, 13),
        "not contiguous": apart,
        "float32": make(2, 2, 7, 11, torch.float32),
        "bfloat16": make(2, 2, 7, 11, torch.bfloat16),
        "long": make(1, 1, 60, 7),
    }
    options = {name: {"mask_BT": None, "eps": 1e-5} for name in sizes}
    options["padding"] = {"mask_BT": mask, "eps": 0.25}
    return {name: (tensors, options[name]) for name, tensors in sizes.items()}


CASES = cases()
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def in_its_own_process(script: str, folder: Path, *arguments: object, interpret: bool) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("triton")
    torch.save(CASES, folder / "cases")
    arguments = (folder / "cases", folder / "results")
    in_its_own_process(INTERPRET, folder, *arguments, interpret=True)
    return torch.load(folder / "results")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_naive_loop(interpreted: dict[str, Tensor], name: str) -> None:
    tensors, more = CASES[name]
    assert interpreted[name].dtype == tensors[0][0].dtype
    tolerance = TOLERANCE.get(name, 1e-12)
    *parts, initial = tensors
    exact = [[tensor.double() for tensor in part] for part in parts]
    expected = context_scan_naive(*exact, initial.double(), **more)
    actual = interpreted[name].double()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings NVIDIA's assembler on Linux")
def test_it_compiles_for_gpus_with_the_weights_in_registers(tmp_path: Path) -> None:
    """Of a thread's 512 bytes of weights, at most half are put aside into its stack."""
    arguments = (json.dumps(COMPILED), tmp_path / "kernel.cubin")
    stacks = json.loads(in_its_own_process(COMPILE, tmp_path, *arguments, interpret=False))
    assert len(stacks) == len(COMPILED)
    assert max(stacks) <= 256, stacks


@needs_triton
def test_what_fits_on_chip() -> None:
    from contextlm.ops.context_scan.triton import is_supported

    float32, bfloat16, float64 = torch.float32, torch.bfloat16, torch.float64
    for fitting in ((1, 256, float32), (1, 200, bfloat16), (4, 128, float32), (1, 128, float64)):
        assert is_supported(*fitting)
    for other in ((1, 257, float32), (1, 257, bfloat16), (5, 128, float32), (1, 256, float64)):
        assert not is_supported(*other), "the kernel computes in float32 at least"
