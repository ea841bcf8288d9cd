"""A machine that executes compiled PTX on the CPU, and with it pyattn's GPU kernels where there is no GPU.

Triton and Gluon compile the kernels for sm_80, sm_90, sm_90a and sm_100 as for a launch, and NVRTC those in CUDA C++.
The machine runs what they made, instruction by instruction, on the memory of CPU tensors, and the results are held
against float64 by the rule of `pyattn.testing`. So what is tested is what the compiler produced: layouts, swizzles,
fragments, descriptors, copies, barriers; not the kernels' source, which Triton's interpreter and tests/cuda_host run.
It needs g++, an x86-64 CPU with F16C, and Triton.

    text.py         PTX text to statements
    assembler.py    statements to bytecode: registers, constants, labels, the registry of instructions
    arithmetic.py, conversions.py, memory.py, atomics.py, control.py, matrices.py, copies.py, wgmma.py, tcgen05.py
                    the instructions, by family
    core/           the machine, in C++
    program.py      a kernel, its run and its faults
    tensor_map.py   what tensor copies are described by
    launch.py       Triton's launches, and pyattn's GPU backends, in the machine
    nvrtc.py        kernels in CUDA C++, and pyattn's cuda backend, in the machine
    small.py        kernels written by hand, for the tests of single instructions
    cases.py, contract.py, branches.py
                    which calls of pyattn run, how they are judged, which branches of the kernels they entered

How it runs: warps of 32 lanes in lockstep, those of the lowest address first where they part. Warps take turns, and
CTAs follow one another, in an order that the seed of a `Schedule` draws; asynchronous copies and products take effect
at once or as late as what waits for them allows. A fault names the instruction and the kernel's line.

What it proves of a run:
- An instruction, a modifier or an operand that the manual does not describe so, or that the machine lacks, is an error.
- Every access lies on elements of the tensors that the kernel was given, aligned, and in shared memory on what was
  written before.
- Order between lanes, warps and copies in shared and tensor memory, and between CTAs in global memory, comes from
  barriers, mbarriers, waits and proxy fences, and not from the schedule that happened: it is judged by vector clocks.
- Registers that a wgmma or a tcgen05.ld in flight holds are left alone, and fenced before they are summed into.
- Barriers complete: counts, bytes and phases add up, nothing waits forever, nothing is left unfinished at the end.
- The numbers are as accurate as the contract asks.

What it does not prove:
- PTX is not machine code: what ptxas makes of it, registers and spills, and how long anything takes is out of sight.
- Products are summed exactly and rounded once per instruction (or truncated, if the schedule says so); a tensor core
  rounds in between. ex2 and its like are the C library's, better than a GPU's.
- Three kinds of fences that the manual asks for and Triton leaves out are not asked for unless a `Check` says so:
  between cp.async and wgmma, before registers that a wgmma multiplies, and around tensor memory's synchronization.
- Clusters, multicast, im2col, fp8, sparse products and calls of functions are not there. A wgmma's quarters and a
  wait that may give up early are not told apart from the whole.
- One schedule of many was run: races and fences do not depend on it, values read in a race would.
"""
