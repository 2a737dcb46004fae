"""Which kernel a layer computes with, the torch operators of the CPU kernels, and the Triton kernels."""
