"""The mathematics of binary-coding quantization: tensors in, tensors out."""
