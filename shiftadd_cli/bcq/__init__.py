"""Binary-coding quantization: the mathematics, tensors in and tensors out."""
