"""Operations with a reference, a fast torch path and a Triton kernel: one file each."""
