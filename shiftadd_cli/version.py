__version__ = "0.1.0"
# The name of our quantization method in transformers and vLLM.
QUANT_METHOD = "shiftadd"
