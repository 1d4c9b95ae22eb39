"""The CUDA kernels compile for every shipped architecture, without register spills."""

from __future__ import annotations

import pytest

from bench import nvcc_gate

REPORT = """
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90a'
ptxas info    : Function properties for _Z1gPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""


def test_parse_reads_every_number() -> None:
    first, second = nvcc_gate.parse("file", REPORT)
    assert first == nvcc_gate.KernelUse("file", "_Z1kPf", "sm_80", 40, 2048, 8, 4, 12)
    assert second == nvcc_gate.KernelUse("file", "_Z1gPf", "sm_90a", 8, 0, 0, 0, 0)
    assert first.spills and not second.spills


@pytest.mark.slow
def test_kernels_compile_without_spills() -> None:
    nvcc = nvcc_gate.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc not found")
    kernels, errors = nvcc_gate.compile_all(nvcc, quick=True)  # all of it takes 90 s
    assert not errors, errors
    assert {k.source for k in kernels} == {path.stem for path in nvcc_gate.SOURCES.glob("*.cu")}
    assert {k.arch for k in kernels} == {f"sm_{nvcc_gate.ARCHITECTURES[0]}"}
    assert "__CUDA_ARCH__" not in "".join(
        path.read_text() for path in nvcc_gate.SOURCES.parent.rglob("*.cu*")
    ), "an architecture has code of its own: compile it too"
    assert not [k for k in kernels if k.spills]
