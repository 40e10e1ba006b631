"""Real Python source that everybody has: the standard library of the running interpreter.

The top-level `*.py` files of the standard library in sorted order (about 4 MB, PSF licence), mapped to
96 symbols: newline and the 95 printable ASCII characters; everything else becomes a space.  The last files
are held out *by file*, so no held-out line was ever seen in training.

The files differ between Python versions, so numbers measured on them do too (in the second digit).
`_sysconfigdata*` is left out: it is generated per machine and holds that machine's paths.
"""

from __future__ import annotations

import sysconfig
import tokenize
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
VOCAB_SIZE = len(ALPHABET)
_SYMBOL_OF_BYTE = np.full(256, ALPHABET.index(" "), dtype=np.uint8)
_SYMBOL_OF_BYTE[[ord(c) for c in ALPHABET]] = np.arange(VOCAB_SIZE, dtype=np.uint8)


@dataclass(frozen=True)
class SourceFile:
    """One source file: its name and its text over the 96 symbols."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out files; no file is in both."""

    train: tuple[SourceFile, ...]
    heldout: tuple[SourceFile, ...]

    def train_ids(self) -> np.ndarray:
        """All training files behind each other as symbols, [n_symbols] uint8."""
        return np.concatenate([encode(file.text) for file in self.train])


def encode(text: str) -> np.ndarray:
    """Map text to symbols 0..95, [len(text)] uint8; what is not in the alphabet becomes a space."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return _SYMBOL_OF_BYTE[np.where(codes < 256, codes, ord(" "))]


def decode(ids) -> str:
    """Map symbols 0..95 (any sequence of integers) back to text."""
    return "".join(ALPHABET[int(i)] for i in ids)


def files() -> list[Path]:
    """The top-level source files of this interpreter's standard library, in sorted order.

    Raises FileNotFoundError where the interpreter ships without source (some embedded builds).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(p for p in folder.glob("*.py") if not p.name.startswith("_sysconfigdata"))
    if len(found) < 120:
        raise FileNotFoundError(
            f"this Python ships {len(found)} source files of its standard library, at least 120 are needed: "
            "use an interpreter that comes with the library's source (any from python.org, conda or pyenv)"
        )
    return found


@lru_cache(maxsize=4)
def corpus(heldout: float = 0.05) -> Corpus:
    """The whole corpus; the last `heldout` share of the files (0 < heldout < 1), by name, is kept apart."""
    if not 0.0 < heldout < 1.0:
        raise ValueError(f"heldout must lie between 0 and 1, got {heldout}")
    sources = []
    for path in files():
        with tokenize.open(path) as handle:  # honours the file's coding line
            sources.append(SourceFile(path.name, decode(encode(handle.read()))))
    n_heldout = min(max(1, round(heldout * len(sources))), len(sources) - 1)
    return Corpus(train=tuple(sources[:-n_heldout]), heldout=tuple(sources[-n_heldout:]))
