"""Vision Mamba (Vim, "bimamba v2"): images cut into tokens, scanned in both directions by every block.

    model = VisionMamba(VimConfig(image_size=8, patch=2, channels=1, width=16, depth=4, n_classes=10))
    model.load(read_checkpoint("vim_s.safetensors"))  # by name; refuses another layout in one sentence
    logits = model(images)  # [B, channels, height, width] -> [B, n_classes]
    logits = model(images, orders)  # [L, M]: block l scans the tokens in the order orders[l], then restores

The parts, for whoever walks through the blocks himself (this is all that `forward` does):

    hidden, residual = model.embed(images), None  # [B, M, D], M patches and the class token
    for block in model.layers:
        hidden, residual = block(hidden, residual)
    logits = model.read(hidden, residual)  # or read(hidden, residual, index): where the class token is now

`block(hidden, residual, order=None, kept=None, return_y=False)`:
- `order` [M] or [B, M], a permutation: the mixer sees token order[i] at place i; its output goes back to
  where the tokens were. Norm and residual work on each token alone, so no more has to move.
- `kept`: a `token_positions.Kept`, the original positions of tokens of which others were removed. The state
  decays over the gaps as `kept.decay` says; `kept.conv` says what the convolution meets there.
  Any object with the methods `reversed`, `convolve` and `steps` of `Kept` will do: a probe of the scan.
- `return_y`: a third result, the gated outputs of both scans [2, B, M, D_i], each token at its own place.

A block: residual += hidden (float32); hidden = mixer(norm(residual)). The mixer: [x, z] = in_proj(h); in each
direction u = SiLU(causal depthwise convolution(x)), (dt, B, C) = x_proj(u), delta = softplus(dt_proj(dt)),
y = scan(u) * SiLU(z); the result is out_proj((y_forward + y_backward) / 2). Both directions are one call of
`selective_scan`. Parameters are named as in the official checkpoints. torch.func.vmap over models works.

Letters: B batch, M tokens, D width, D_i = 2 D inner width, N states, R = ceil(D / 16), L blocks.

Source: Zhu et al., Vision Mamba (2401.09417) and its repository; ShuffleMamba (2408.17081), class token
first; Zhan et al., Exploring Token Pruning in Vision State Space Models (2409.18962), gaps. Of PlainMamba
(2403.17695) only the four paths are here (`token_positions.continuous_paths`): which weights its directions
share, and where its direction embeddings enter, could not be verified, so its block is not.
Used by the chapters `shufflemamba` and `ssm-token-pruning`.
"""

import math
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenbook.kernels.selective_scan import selective_scan
from tokenbook.models.token_positions import Kept

#: Width and depth of the published sizes (ShuffleMamba's large also exists with 40 blocks).
SIZES = {"tiny": (192, 24), "small": (384, 24), "middle": (576, 32), "base": (768, 24), "large": (1024, 48)}


@dataclass(frozen=True)
class VimConfig:
    """Sizes of a model. `class_position`: "first", "middle" or an index in 0..n_patches."""

    image_size: int = 224
    patch: int = 16
    channels: int = 3
    width: int = 192
    depth: int = 24
    n_states: int = 16
    n_classes: int = 1000
    class_position: str | int = "middle"
    norm: str = "rms"  # or layer: ShuffleMamba's middle size
    drop_path: float = 0.0  # of the last block; rises linearly from 0
    dropout: float = 0.0  # behind the position embedding
    init: str = "vim"  # or truncated: ShuffleMamba's, every linear map from a normal of 0.02

    def __post_init__(self):
        if self.patch < 1 or self.image_size % self.patch:
            raise ValueError(f"patch must divide image_size = {self.image_size}, got {self.patch}")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm must be rms or layer, got {self.norm!r}")
        if self.init not in ("vim", "truncated"):
            raise ValueError(f"init must be vim or truncated, got {self.init!r}")
        named = self.class_position in ("first", "middle")
        if not named and not (
            isinstance(self.class_position, int) and 0 <= self.class_position <= self.n_patches
        ):
            wanted = f"first, middle or an index in 0..{self.n_patches}"
            raise ValueError(f"class_position must be {wanted}, got {self.class_position!r}")

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def class_index(self) -> int:
        """Place of the class token among the M = n_patches + 1 tokens."""
        named = {"first": 0, "middle": self.n_patches // 2}
        return named[self.class_position] if isinstance(self.class_position, str) else self.class_position

    @property
    def rank(self) -> int:
        return math.ceil(self.width / 16)


class Mixer(nn.Module):
    """The bidirectional mixer; names of parameters as in the checkpoints, `_b` for the backward direction."""

    def __init__(self, width: int, n_states: int, rank: int):
        super().__init__()
        inner = 2 * width
        self.n_states, self.rank = n_states, rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for suffix in ("", "_b"):
            setattr(self, f"conv1d{suffix}", nn.Conv1d(inner, inner, 4, groups=inner, padding=3))
            setattr(self, f"x_proj{suffix}", nn.Linear(inner, rank + 2 * n_states, bias=False))
            setattr(self, f"dt_proj{suffix}", nn.Linear(rank, inner))
        for name in ("A_log", "A_b_log"):  # S4D-real: A = -(1, ..., N) in every channel
            setattr(self, name, nn.Parameter(torch.arange(1.0, n_states + 1).log().repeat(inner, 1)))
        self.D, self.D_b = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, h: Tensor, kept: Kept | None = None, return_y: bool = False):
        """h [B, M, D] -> output [B, M, D], and both gated outputs [2, B, M, D_i] or None."""
        x, z = self.in_proj(h).chunk(2, dim=2)  # (B, M, D_i) each
        forward = self._direction(x, self.conv1d, self.x_proj, self.dt_proj, kept)
        reverse = None if kept is None else kept.reversed()
        backward = self._direction(x.flip(1), self.conv1d_b, self.x_proj_b, self.dt_proj_b, reverse)
        # The directions become two blocks of rows of one scan: (2 B, D_i, M), and (2 B, N, M) for B and C.
        pairs = zip(forward, backward, strict=True)
        u, step, B, C, decay = (None if a is None else torch.cat((a, b)).mT for a, b in pairs)
        A = -torch.exp(_wide(torch.stack((self.A_log, self.A_b_log))))
        y = selective_scan(u, step, A, B, C, torch.stack((self.D, self.D_b)), delta_decay=decay)
        y_forward, y_backward = y.mT.chunk(2)  # (B, M, D_i)
        y_backward, gate = y_backward.flip(1), F.silu(z)  # gated here: once for both, and z needs no flip
        out = self.out_proj((y_forward + y_backward) * gate / 2)
        return out, torch.stack((y_forward, y_backward)) * gate if return_y else None

    def _direction(self, x, conv, x_proj, dt_proj, kept):
        """x [B, M, D_i] in scan order -> u, step, B, C and the decay step or None, [B, M, .] each."""
        convolve = partial(_causal_conv, conv=conv)
        u = F.silu(convolve(x) if kept is None else kept.convolve(convolve, x))
        dt, B, C = x_proj(u).split([self.rank, self.n_states, self.n_states], dim=2)
        step = F.softplus(_wide(dt_proj(dt)))
        if kept is None:
            return u, step, B, C, None
        write, decay = kept.steps(step, F.softplus(_wide(dt_proj.bias)))
        return u, write, B, C, decay


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(norm(residual)); see the top of this module."""

    def __init__(self, config: VimConfig, drop_path: float):
        super().__init__()
        self.mixer = Mixer(config.width, config.n_states, config.rank)
        self.norm = _norm(config)
        self.drop_path = drop_path

    def forward(self, hidden, residual, order=None, kept=None, return_y=False):
        if order is not None and kept is not None:
            raise ValueError("a block takes an order or kept positions, not both")
        residual = _add(residual, hidden, self.drop_path, self.training)
        h = _normed(self.norm, residual).to(self.mixer.in_proj.weight.dtype)
        if order is not None:
            h = _take(h, order)
        hidden, y = self.mixer(h, kept, return_y)
        if order is not None:
            back = order.argsort(-1)
            hidden, y = _take(hidden, back), _take(y, back) if return_y else None
        return (hidden, residual, y) if return_y else (hidden, residual)


class PatchEmbed(nn.Module):
    """Patches to tokens, row by row: [B, channels, height, width] -> [B, n_patches, D]."""

    def __init__(self, config: VimConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


class VisionMamba(nn.Module):
    """The whole classifier; the interface stands at the top of this module."""

    def __init__(self, config: VimConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.n_patches + 1, config.width))
        # Block i adds the output of block i - 1, and drops rows of that one by its rate.
        rates = [config.drop_path * max(0, i - 1) / max(1, config.depth - 1) for i in range(config.depth)]
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm_f, self.head = _norm(config), nn.Linear(config.width, config.n_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights again, from torch's global generator."""
        for name, module in self.named_modules():
            linear = isinstance(module, nn.Linear) and (self.config.init == "truncated" or name == "head")
            if linear and "dt_proj" not in name:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):  # LeCun normal: a truncated normal of variance 1 / fan-in
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Mixer):
                _reset_steps(module.dt_proj, module.rank)
                _reset_steps(module.dt_proj_b, module.rank)
        for block in self.layers:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            block.mixer.out_proj.weight.div_(math.sqrt(self.config.depth))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.zeros_(self.cls_token)

    def embed(self, images: Tensor) -> Tensor:
        """Patches with the class token in its place, position embedding added: [B, M, D]."""
        x, at = self.patch_embed(images), self.config.class_index
        token = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat((x[:, :at], token, x[:, at:]), dim=1) + self.pos_embed
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def read(self, hidden: Tensor, residual: Tensor | None, index: int | Tensor | None = None) -> Tensor:
        """Logits [B, n_classes] from the class token at `index` (int, int64 [B], or None: where it began)."""
        residual = _add(residual, hidden, self.config.drop_path, self.training)
        index = self.config.class_index if index is None else index
        rows = torch.arange(len(residual), device=residual.device)
        token = residual[rows, index] if isinstance(index, Tensor) else residual[:, index]
        return self.head(_normed(self.norm_f, token).to(self.head.weight.dtype))

    def forward(self, images: Tensor, orders: Tensor | None = None) -> Tensor:
        hidden, residual = self.embed(images), None
        for i, block in enumerate(self.layers):
            hidden, residual = block(hidden, residual, None if orders is None else orders[i])
        return self.read(hidden, residual)

    def load(self, state: dict[str, Tensor]) -> "VisionMamba":
        """Load a checkpoint's state by name. Raises ValueError naming what does not fit, and both shapes."""
        if "layers.0.mixer.A_b_log" not in state:
            raise ValueError("the checkpoint must be bidirectional (v2): it has no layers.0.mixer.A_b_log")
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"the checkpoint lacks {missing[:3]} and has beyond this model {unknown[:3]}")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                shapes = f"{list(state[name].shape)} in the checkpoint, {list(tensor.shape)} in this model"
                raise ValueError(f"{name} must have the shape that the sizes and the image ask for: {shapes}")
        self.load_state_dict(state)
        return self


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, or a `.pth` that holds tensors only (often under "model")."""
    path = Path(path)
    if not path.is_file() or path.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"a checkpoint must be a .safetensors or .pth file that exists, got {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} must hold tensors only, nothing that runs code: convert it"
        ) from error
    return state.get("model", state)


def _causal_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """The causal depthwise convolution along M of x [B, M, D_i], as shifted products: on a CPU its gradients
    take an eighth of the time of those of F.conv1d with one channel per group."""
    width = conv.kernel_size[0]
    padded = F.pad(x, (0, 0, width - 1, 0))
    u = conv.bias.to(x.dtype)
    for tap in range(width):
        u = torch.addcmul(u, padded[:, tap : tap + x.shape[1]], conv.weight[:, 0, tap].to(x.dtype))
    return u


def _norm(config: VimConfig) -> nn.Module:
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.width, eps=1e-5)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm in the precision of x, whatever that of the weights."""
    weight = norm.weight.to(x.dtype)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(x, norm.normalized_shape, weight, norm.eps)
    return F.layer_norm(x, norm.normalized_shape, weight, norm.bias.to(x.dtype), norm.eps)


def _add(residual, hidden, drop_path, training):
    """The residual stream in float32; stochastic depth drops whole rows of `hidden` and scales the others."""
    if drop_path and training:
        keep = torch.rand(hidden.shape[0], 1, 1, device=hidden.device) >= drop_path
        hidden = hidden * keep / (1 - drop_path)
    return _wide(hidden) if residual is None else residual + _wide(hidden)


def _wide(t: Tensor) -> Tensor:
    """At least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x [..., M, D] in the order [M] or [B, M]."""
    return x.gather(-2, order[..., None].expand(x.shape))


def _reset_steps(dt_proj: nn.Linear, rank: int) -> None:
    """Steps softplus(bias) between 0.001 and 0.1, uniform in their logarithm."""
    nn.init.uniform_(dt_proj.weight, -(rank**-0.5), rank**-0.5)
    low, high = math.log(0.001), math.log(0.1)
    step = torch.exp(torch.rand_like(dt_proj.bias) * (high - low) + low).clamp_min(1e-4)
    dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
