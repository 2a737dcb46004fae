"""Statistics of calibration inputs: second moments, gradients, and the shares of experts."""
