"""pyattn's Triton kernels: fused attention forward and backward. Imports torch and triton only."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is pyattn's own triton_kernels and is imported as pyattn.triton_kernels; the bare name belongs to "
        "another project's package (an import from inside pyattn's checkout finds this folder first)"
    )
