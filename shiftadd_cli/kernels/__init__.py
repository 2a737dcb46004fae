"""The choice of a kernel for a layer, the torch operators of the CPU kernels, and the Triton kernels."""
