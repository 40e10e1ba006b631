"""Cut attention edges inside a whole transformers model: chosen layers, heads and (query, key) pairs.

A mask of blocked edges is a bool tensor, True where query t must not see key s; build it from `edges`,
`self_peek` and `full_peek`, join masks by `|`, restrict one to some heads by `only_heads`:

    blocked = edges(n, queries=[n - 1], keys=range(5, 20))
    with knockout(model, {layer: blocked for layer in window(12, 9, n_layers)}):
        logits = model(input_ids).logits

Blocked weights are exactly 0 and the others are renormalised: edges are removed before the softmax by a
boolean rule, on top of the causal and padding mask that the model would have used. (Adding the most negative
number twice overflows to -inf, and a row of equal, very negative numbers silently becomes uniform.)

Works with every model whose attention goes through transformers' attention interface (Llama, GPT-NeoX, GPT-2,
Qwen, the language model inside Llava, ...). Inside the context that attention runs as SDPA.

Used by all-for-one (peeking patterns), cross-modal-flow and prism (knockout in a window of layers).
"""

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "tokenbook_knockout"

# The masks in force, by the identity of the language model's config, which its attention modules share.
_in_force: dict[int, Mapping[int, Tensor]] = {}


def edges(n: int, queries: Iterable[int], keys: Iterable[int]) -> Tensor:
    """Block every edge from a query in `queries` to a key in `keys`: bool [n, n].

    Raises ValueError for a position outside 0..n-1.
    """
    blocked = torch.zeros(n, n, dtype=torch.bool)
    rows, columns = _positions("queries", queries, n), _positions("keys", keys, n)
    blocked[rows[:, None], columns] = True
    return blocked


def self_peek(n: int, sink: int = 0) -> Tensor:
    """Every position sees itself and the sink only: bool [n, n] of what is blocked."""
    blocked = ~torch.eye(n, dtype=torch.bool)
    blocked[:, _positions("sink", [sink], n)] = False
    return blocked


def full_peek(n: int, sink: int = 0, last: int | None = None) -> Tensor:
    """`self_peek`, but position `last` (None: n - 1) sees everything before it."""
    blocked = self_peek(n, sink)
    blocked[_positions("last", [n - 1 if last is None else last], n)] = False
    return blocked


def only_heads(blocked: Tensor, heads: Iterable[int], n_heads: int) -> Tensor:
    """Restrict a mask [n, n] to some query heads: bool [H, n, n]. Raises ValueError for unknown heads."""
    restricted = torch.zeros(n_heads, *blocked.shape, dtype=torch.bool)
    restricted[_positions("heads", heads, n_heads)] = blocked
    return restricted


def window(centre: int, width: int, n_layers: int) -> range:
    """Layers around `centre`: max(0, centre - width // 2) .. min(n_layers, centre + ceil(width / 2)) - 1.

    Nine layers around l are l-4..l+4, clipped to the model; ten are l-5..l+4.
    """
    if width < 1 or not 0 <= centre < n_layers:
        raise ValueError(f"width must be >= 1 and centre in 0..{n_layers - 1}, got {width} and {centre}")
    return range(max(0, centre - width // 2), min(n_layers, centre + (width + 1) // 2))


@contextlib.contextmanager
def knockout(model: PreTrainedModel, blocked_by_layer: Mapping[int, Tensor], sink: int | None = None):
    """Run `model` with attention edges removed for as long as the context lasts.

    Args:
        model: a decoder, or a model that contains one (`model.get_decoder()`: Llava's language model).
        blocked_by_layer: {layer: blocked}, bool [n, n], [H, n, n] or [B, 1 or H, n, n], True = removed; n is
            the number of positions of the whole sequence, cached ones included. Layers left out run in full.
        sink: a key that stays visible to every later position whatever is blocked; None = no such key.

    Raises ValueError for unknown layers, masks of another shape or dtype, a knockout inside a knockout of the
    same model, a sequence of another length (when the model runs), and a query all of whose keys are blocked.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    config = decoder.config
    n_layers = config.num_hidden_layers
    unknown = sorted(layer for layer in blocked_by_layer if layer not in range(n_layers))
    if unknown:
        raise ValueError(f"blocked_by_layer must name layers in 0..{n_layers - 1}, got {unknown}")
    if id(config) in _in_force:
        raise ValueError("this model already runs inside a knockout: join the masks by | instead")
    device = next(decoder.parameters()).device
    prepared = {}
    for layer, blocked in blocked_by_layer.items():
        prepared[layer] = _prepared(layer, blocked, sink, config.num_attention_heads).to(device)
    before = config._attn_implementation
    _in_force[id(config)] = prepared
    try:
        decoder.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        decoder.set_attn_implementation(before)
        del _in_force[id(config)]


def _prepared(layer: int, blocked: Tensor, sink: int | None, n_heads: int) -> Tensor:
    """The mask as [B or 1, H or 1, n, n], its sink visible."""
    square = (
        blocked.dtype == torch.bool and blocked.ndim in (2, 3, 4) and blocked.shape[-1] == blocked.shape[-2]
    )
    if not square or (blocked.ndim > 2 and blocked.shape[-3] not in (1, n_heads)):
        raise ValueError(
            f"blocked_by_layer[{layer}] must be bool [n, n], [{n_heads}, n, n] or "
            f"[B, 1 or {n_heads}, n, n], got {blocked.dtype} {list(blocked.shape)}"
        )
    blocked = blocked[(None,) * (4 - blocked.ndim)].clone()
    if sink is not None:
        blocked[..., _positions("sink", [sink], blocked.shape[-1])] = False
    return blocked


def _attention(module, query, key, value, attention_mask, **kwargs):
    """Attention as SDPA computes it, without the edges that are blocked in this module's layer."""
    blocked = _in_force[id(module.config)].get(module.layer_idx)
    if blocked is not None:
        attention_mask = _without(blocked, attention_mask, query, key.shape[2], module.layer_idx)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _without(blocked: Tensor, mask: Tensor | None, query: Tensor, n_keys: int, layer: int) -> Tensor:
    n_queries, n = query.shape[2], blocked.shape[-1]
    if n_keys != n or (blocked.shape[0] not in (1, query.shape[0])):
        raise ValueError(
            f"blocked_by_layer[{layer}] is made for {n} positions and a batch of {blocked.shape[0]}, but "
            f"the model runs on {n_keys} positions and a batch of {query.shape[0]}"
        )
    blocked = blocked[:, :, n - n_queries :]  # with a cache, the queries are the last positions
    if mask is None:  # the model leaves the causal mask to the attention kernel
        mask = torch.ones(n_queries, n, dtype=torch.bool, device=query.device).tril(n - n_queries)[None, None]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    emptied = visible.any(-1) & ~(visible & ~blocked).any(-1)  # a padding row was empty before: leave it
    if emptied.any():
        _, head, position = emptied.nonzero()[0].tolist()
        raise ValueError(
            f"layer {layer}, head {head}, query {position + n - n_queries}: every key is blocked; "
            "leave one, or name a sink"
        )
    return mask & ~blocked if mask.dtype == torch.bool else mask.masked_fill(blocked, -torch.inf)


def _positions(name: str, positions: Iterable[int], n: int) -> Tensor:
    positions = torch.as_tensor(list(positions), dtype=torch.int64)
    outside = positions[(positions < 0) | (positions >= n)]
    if len(outside):
        raise ValueError(f"{name} must lie in 0..{n - 1}, got {outside[0].item()}")
    return positions


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
