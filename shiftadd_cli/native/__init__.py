"""The compiled CPU kernels, in C++, and their loader. Imports torch alone."""
