"""The GPU kernel against a loop written straight from the definition, without a GPU.

It runs in Triton's interpreter and is compiled for GPUs, each in a process of its own: Triton reads
TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contextlm.ops.context_scan import triton as module
from contextlm.ops.context_scan.triton import context_scan_triton, is_available, is_supported

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

INTERPRET = """
import sys, torch
from contextlm.ops.context_scan.triton import context_scan_triton, is_available
assert is_available()
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
from contextlm.ops.context_scan.triton import padded_width, warps
from contextlm.ops.context_scan.triton_kernel import scan_kernel
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
    (80, 1, 5, "fp32", True),
    (80, 1, 256, "bf16", False),
    (90, 1, 256, "fp32", True),
    (90, 4, 100, "fp32", False),
    (90, 1, 128, "fp64", False),
]


def naive_scan(projected, weights, scales, shifts, initial, mask_BT=None, eps=1e-5) -> Tensor:
    """Row by row, token by token, layer by layer, in fp64."""
    projected, weights, scales, shifts = (
        [t.double() for t in part] for part in (projected, weights, scales, shifts)
    )
    (batch, tokens, width), layers = projected[0].shape, len(weights)
    out = torch.zeros(layers, batch, tokens, width, dtype=torch.float64)
    for b in range(batch):
        state = initial[b].double()
        for t in range(tokens):
            context = state
            for layer in range(layers):
                if mask_BT is None or mask_BT[b, t]:
                    u = weights[layer] @ context + projected[layer][b, t]
                    x = context + 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
                    variance = ((x - x.mean()) ** 2).mean()
                    context = (x - x.mean()) / torch.sqrt(variance + eps)
                    context = context * scales[layer] + shifts[layer]
                out[layer, b, t] = context
            state = context
    return out


def make(layers: int, batch: int, tokens: int, width: int, dtype=torch.float64):
    g = torch.Generator().manual_seed(layers + batch + tokens + width)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    projected = [rand(batch, tokens, width) for _ in range(layers)]
    weights = [rand(width, width) / math.sqrt(width) for _ in range(layers)]
    scales = [rand(width) for _ in range(layers)]
    shifts = [rand(width) for _ in range(layers)]
    return projected, weights, scales, shifts, rand(batch, width)


def cases() -> dict[str, tuple[tuple, dict]]:
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, :4], mask[1] = False, False
    apart = make(2, 2, 5, 6)
    apart[0][0] = apart[0][0].transpose(1, 2).contiguous().transpose(1, 2)
    apart[1][1] = apart[1][1].t().contiguous().t()
    return {
        "one number": (make(1, 1, 1, 1), {}),
        "one token": (make(1, 2, 1, 3), {}),
        "a power of two": (make(1, 2, 7, 8), {}),
        "not a power of two": (make(1, 3, 9, 13), {}),
        "three layers": (make(3, 2, 7, 5), {}),
        "padding": (make(2, 3, 9, 5), {"mask_BT": mask}),
        "another eps": (make(1, 2, 5, 3), {"eps": 0.25}),
        "not contiguous": (apart, {}),
        "float32": (make(2, 2, 7, 11, torch.float32), {}),
        "bfloat16": (make(2, 2, 7, 11, torch.bfloat16), {}),
        "long": (make(1, 1, 200, 7), {}),
    }


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
    torch.testing.assert_close(
        interpreted[name].double(), naive_scan(*tensors, **more), rtol=tolerance, atol=tolerance
    )


@needs_triton
def test_padding_passes_the_state_unchanged(interpreted: dict[str, Tensor]) -> None:
    (*_, initial), _ = CASES["padding"]
    states = interpreted["padding"]
    torch.testing.assert_close(states[:, 1], initial[1].expand(2, 9, 5), rtol=0, atol=0)
    torch.testing.assert_close(states[:, 0, :4], initial[0].expand(2, 4, 5), rtol=0, atol=0)


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings NVIDIA's assembler on Linux")
def test_it_compiles_for_gpus_with_the_weights_in_registers(tmp_path: Path) -> None:
    """Of a thread's 512 bytes of weights, at most half are put aside into its stack."""
    arguments = (json.dumps(COMPILED), tmp_path / "kernel.cubin")
    stacks = json.loads(in_its_own_process(COMPILE, tmp_path, *arguments, interpret=False))
    assert len(stacks) == len(COMPILED)
    assert max(stacks) <= 256, stacks


def test_what_fits_on_chip() -> None:
    assert is_supported(1, 256, torch.float32)
    assert is_supported(1, 200, torch.bfloat16)
    assert is_supported(4, 128, torch.float32)
    assert is_supported(1, 128, torch.float64)
    assert not is_supported(1, 257, torch.float32)
    assert not is_supported(1, 257, torch.bfloat16), "the kernel computes in float32 at least"
    assert not is_supported(5, 128, torch.float32)
    assert not is_supported(1, 256, torch.float64)


def test_where_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module, "is_installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not is_available()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert is_available()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert is_available()
    monkeypatch.setattr(module, "is_installed", lambda package: False)
    assert not is_available()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="2 layers of width 300 do not fit on chip"):
        context_scan_triton(*make(2, 1, 1, 300))
    tensors = make(1, 1, 2, 3)
    tensors[-1].requires_grad_()
    with pytest.raises(ValueError, match="has no gradients"):
        context_scan_triton(*tensors)
