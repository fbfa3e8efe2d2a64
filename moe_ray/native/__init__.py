"""Kernels in C++ for CPUs with bfloat16 instructions; built on first use, and not needed for anything but speed."""
