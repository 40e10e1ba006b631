"""Tokenbook: the shared library of a reproduction book about token positions.

Dimension letters, the same in every module and every chapter:

    B batch    T positions    D width    H heads    d head width
    V vocabulary    L layers    N state size    K codebook size

Importing this package imports neither torch nor Triton.
"""

__version__ = "0.1.0"
