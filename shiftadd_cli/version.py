__version__ = "0.1.0"
# The name that transformers and vLLM know our checkpoints by.
QUANT_METHOD = "shiftadd"
