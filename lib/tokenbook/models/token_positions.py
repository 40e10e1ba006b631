"""Where tokens stand once some were removed, and the paths on which a scan may visit them.

Used by `vision_mamba` and by the chapter `ssm-token-pruning`. What the scan does over a gap reconstructs
Zhan et al., Exploring Token Pruning in Vision State Space Models (2409.18962); the chapter says from what.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

DECAYS, CONVS = ("previous", "bias", "none"), ("packed", "gap_zero")


@dataclass(frozen=True)
class Kept:
    """Original positions of the tokens at hand, others having been removed.

    positions: int64 [B, n], strictly increasing in each row, below `length`, the number of original tokens.
    decay: what the state does at a removed position: `previous` decays once more by the step of the kept
        token before it (in scan order), `bias` by softplus(dt bias), the step of an all-zero token, `none`
        nothing, which is the scan of the packed tokens.
    conv: the convolution runs over the `packed` tokens, or over all positions with zeros where tokens miss
        (`gap_zero`).
    """

    positions: Tensor
    length: int
    decay: str = "previous"
    conv: str = "packed"

    def __post_init__(self):
        if self.decay not in DECAYS or self.conv not in CONVS:
            got = f"got {self.decay!r} and {self.conv!r}"
            raise ValueError(
                f"decay must be one of {', '.join(DECAYS)}, conv one of {', '.join(CONVS)}, {got}"
            )
        wanted, p = f"strictly increasing in 0..{self.length - 1}", self.positions
        if p.dim() != 2:
            raise ValueError(f"positions must be [B, n], got shape {list(p.shape)}")
        bad = (p.diff(dim=1) < 1).any(1) | (p < 0).any(1) | (p >= self.length).any(1)
        if bad.any():
            raise ValueError(f"positions must be {wanted}, got {p[bad][0].tolist()}")

    def missing(self) -> Tensor:
        """How many removed positions lie directly before each token, in scan order: int64 [B, n]."""
        return gaps(self.positions)

    def reversed(self) -> "Kept":
        """The same tokens as the backward direction meets them."""
        return replace(self, positions=(self.length - 1 - self.positions).flip(1))

    def convolve(self, convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The causal convolution as the kept tokens meet it: x [B, n, D_i], in scan order -> [B, n, D_i]."""
        if self.conv == "packed":
            return convolution(x)
        places = self.positions[..., None].expand(x.shape)
        full = x.new_zeros(x.shape[0], self.length, x.shape[2]).scatter(1, places, x)
        return convolution(full).gather(1, places)

    def steps(self, step: Tensor, empty: Tensor) -> tuple[Tensor, Tensor | None]:
        """The steps by which tokens are written and by which the state decays (None: the same).

        step [B, n, D_i]: of the kept tokens, in scan order; empty [D_i]: of an all-zero token.
        """
        if self.decay == "none":
            return step, None
        before = F.pad(step[:, :-1], (0, 0, 1, 0))  # the step of the kept token before
        return step, step + self.missing()[..., None] * (before if self.decay == "previous" else empty)


def gaps(positions: Tensor) -> Tensor:
    """How many removed positions lie directly before each token: int64 [B, n] -> [B, n]; 0 for the first,
    since the state is zero there. For the backward direction give the positions of `Kept.reversed`."""
    return F.pad(positions.diff(dim=1) - 1, (1, 0))


def continuous_paths(height: int, width: int) -> Tensor:
    """PlainMamba's four scan orders over a grid: rows in zigzag, columns in zigzag, and both reversed.

    int64 [4, height * width], row-major patch numbers: neighbours on a path are neighbours in the image.
    """
    grid = torch.arange(height * width).view(height, width)
    paths = []
    for g in (grid, grid.T):
        g = g.clone()
        g[1::2] = g[1::2].flip(1)
        paths.append(g.flatten())
    return torch.stack(paths + [p.flip(0) for p in paths])
