"""Operations with a reference, a fast torch path and a Triton kernel: one file each."""

from tokenbook.kernels._dispatch import backends_used, forget_backends

__all__ = ["backends_used", "forget_backends"]
