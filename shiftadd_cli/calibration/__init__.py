"""Statistics of calibration inputs: second moments, gradients, and expert shares."""
