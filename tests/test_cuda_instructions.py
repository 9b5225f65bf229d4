"""tests/cuda_instructions.py on a disassembly in small; make cuda-instructions runs it on the kernels."""

from __future__ import annotations

from tests import cuda_instructions

DISASSEMBLY = """
.text._Z5otherv:
        /*0000*/                   EXIT ;
.text._Z17block_rows_kernelv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R8, R8 ;
        /*0030*/                   MUFU.EX2 R9, R9 ;
        /*0040*/                   MUFU.EX2 R10, R10 ;
        /*0050*/                   MUFU.EX2 R11, R11 ;
        /*0060*/              @!P1 MUFU.EX2 R12, R12 ;
        /*0070*/                   STS.128 [R4], R8 ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
.L_x_3:
        /*0090*/                   MUFU.EX2 R8, R8 ;
        /*00a0*/                   MUFU.EX2 R9, R9 ;
        /*00b0*/                   MUFU.EX2 R10, R10 ;
        /*00c0*/                   MUFU.EX2 R11, R11 ;
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00e0*/               @P2 BRA `(.L_x_3) ;
        /*00f0*/               @P3 BRA `(.L_x_2) ;
"""


def test_functions_and_loops() -> None:
    found = cuda_instructions.functions(DISASSEMBLY)
    assert list(found) == ["_Z5otherv", "_Z17block_rows_kernelv"]
    loops = cuda_instructions.innermost_loops(found["_Z17block_rows_kernelv"])
    assert [len(loop.instructions) for loop in loops] == [8, 6], "the loop around the second is no innermost one"


def test_instructions_an_element() -> None:
    lines = cuda_instructions.functions(DISASSEMBLY)["_Z17block_rows_kernelv"]
    assert cuda_instructions.instructions_an_element(lines, 4) == (8 / 4, 6 / 4)
