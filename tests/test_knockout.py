"""Edges cut inside whole models, against layers run by hand with the same additive masks."""

import math

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tokenbook.models.knockout import edges, full_peek, knockout, only_heads, self_peek, window

N, LAYERS, HEADS = 9, 4, 4
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS)


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        made = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES))
    else:
        made = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, **SIZES))
    for parameter in made.parameters():  # the usual 0.02 would leave attention almost uniform
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture
def ids():
    return torch.randint(50, (2, N), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_by_hand(model, ids, blocked_by_layer):
    """The model's layers in a loop, eager attention, additive masks of -inf."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    embed = decoder.embed_tokens if hasattr(decoder, "embed_tokens") else decoder.embed_in
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm
    hidden, positions = embed(ids), torch.arange(ids.shape[1])[None]
    rotary = decoder.rotary_emb(hidden, positions)
    for index, layer in enumerate(decoder.layers):
        mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)[None, None].repeat(1, HEADS, 1, 1)
        mask[blocked_by_layer.get(index, torch.tensor(False)).expand_as(mask)] = -math.inf
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    decoder.set_attn_implementation(before)
    return model.get_output_embeddings()(norm(hidden))


CASES = {
    "nothing": {},
    "self peek": dict.fromkeys(range(LAYERS), self_peek(N)),
    "full peek, then self peek": {1: full_peek(N), 2: self_peek(N), 3: self_peek(N)},
    "a window": dict.fromkeys(window(2, 3, LAYERS), edges(N, [N - 1], range(2, 6))),
    "some heads": {
        0: only_heads(edges(N, range(4, N), [1, 2]), [1, 3], HEADS),
        2: self_peek(N, sink=1) & False,
    },
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_the_layers_run_by_hand(model, ids, name):
    with knockout(model, CASES[name]):
        found = model(ids).logits
    expected = logits_by_hand(model, ids, CASES[name])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = model(ids).logits  # everything is as before behind the context
    torch.testing.assert_close(plain, logits_by_hand(model, ids, {}), rtol=1e-5, atol=1e-5)
    if name != "nothing":
        assert (plain - found).abs().max() > 1e-2
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_blocked_key_has_no_influence_at_all(model, ids):
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % 50
    cut = dict.fromkeys(range(LAYERS), edges(N, range(4, N), [3]))
    with knockout(model, cut):
        a, b = model(ids).logits, model(other).logits
    assert torch.equal(a[:, 4:], b[:, 4:])
    assert not torch.equal(a[:, 3], b[:, 3])


@torch.no_grad()
def test_one_batch_holds_several_interventions(model, ids):
    both = ids[:1].repeat(2, 1)
    first, second = edges(N, [N - 1], [2, 3]), edges(N, [N - 1], [5])
    with knockout(model, {1: torch.stack([first, second])[:, None]}):
        batched = model(both).logits
    for row, blocked in enumerate((first, second)):
        with knockout(model, {1: blocked}):
            torch.testing.assert_close(batched[row], model(ids[:1]).logits[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_stays_masked(model, ids):
    blocked = {1: edges(N, [N - 1], [4])}
    padding = torch.ones_like(ids)
    padding[1, :3] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    with knockout(model, blocked):
        found = model(ids, attention_mask=padding, position_ids=positions).logits[1, 3:]
    with knockout(model, {1: edges(N - 3, [N - 4], [1])}):
        alone = model(ids[1:, 3:]).logits[0]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cached_prefix_counts_as_positions(model, ids):
    blocked = {0: edges(N, [N - 1], [2, 3]), 2: edges(N, [N - 1], [5])}
    with knockout(model, blocked):
        expected = model(ids).logits[:, -1]
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    with knockout(model, blocked):
        found = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_sink_stays_visible(model, ids):
    everything = torch.ones(N, N, dtype=torch.bool)
    with knockout(model, {1: everything}, sink=0):
        found = model(ids).logits
    only_sink = everything.clone()
    only_sink[:, 0] = False
    torch.testing.assert_close(found, logits_by_hand(model, ids, {1: only_sink}), rtol=1e-5, atol=1e-5)


def test_a_fully_blocked_row_raises_and_leaves_the_model_as_it_was(model, ids):
    with (
        pytest.raises(ValueError, match=r"layer 2, head 0, query 4: every key is blocked"),
        knockout(model, {2: edges(N, [4], range(5))}),
    ):
        model(ids)
    assert model.config._attn_implementation == "sdpa"
    with knockout(model, {}):
        model(ids)


@pytest.mark.parametrize(
    ("blocked_by_layer", "message"),
    [
        ({LAYERS: self_peek(N)}, rf"layers in 0\.\.{LAYERS - 1}, got \[{LAYERS}\]"),
        ({0: self_peek(N).float()}, "must be bool"),
        ({0: self_peek(N)[:3]}, r"got torch.bool \[3, 9\]"),
        ({0: self_peek(N).expand(3, N, N)}, r"got torch.bool \[3, 9, 9\]"),
        ({0: self_peek(N + 1)}, "made for 10 positions and a batch of 1, but the model runs on 9"),
        ({0: self_peek(N).expand(5, 1, N, N)}, "a batch of 5"),
    ],
)
def test_masks_that_do_not_fit_are_refused(model, ids, blocked_by_layer, message):
    with pytest.raises(ValueError, match=message), knockout(model, blocked_by_layer):
        model(ids)


def test_a_knockout_inside_a_knockout_is_refused(model):
    with knockout(model, {}), pytest.raises(ValueError, match="already runs inside"), knockout(model, {}):
        pass


def test_masks_by_their_definition():
    assert edges(3, [2], [0, 1]).tolist() == [[False] * 3, [False] * 3, [True, True, False]]
    assert (~self_peek(4)).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert (~full_peek(4)).int()[3].tolist() == [1, 1, 1, 1]
    assert torch.equal(full_peek(4)[:3], self_peek(4)[:3])
    assert list(window(5, 9, 32)) == list(range(1, 10))
    assert list(window(1, 9, 32)) == list(range(6))
    assert list(window(31, 9, 32)) == list(range(27, 32))
    assert list(window(5, 10, 32)) == list(range(10))
    for bad in (lambda: edges(3, [3], [0]), lambda: edges(3, [0], [-1]), lambda: self_peek(3, sink=3)):
        with pytest.raises(ValueError, match=r"must lie in 0\.\.2"):
            bad()
    with pytest.raises(ValueError, match="width must be >= 1"):
        window(0, 0, 4)


@torch.no_grad()
def test_llava_is_cut_in_its_language_model_only():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=49,
            vision_feature_select_strategy="default",
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.tensor([[1, 49, 49, 49, 49, 7, 8, 9]])
    image, other = torch.randn(2, 1, 3, 8, 8)
    cut = dict.fromkeys(range(LAYERS), edges(8, range(5, 8), range(1, 5)))
    with knockout(model, cut):
        a = model(input_ids=ids, pixel_values=image).logits
        b = model(input_ids=ids, pixel_values=other).logits
    assert torch.equal(a[:, 5:], b[:, 5:])
    assert not torch.equal(a[:, 4], b[:, 4])
    full = model(input_ids=ids, pixel_values=image).logits
    assert (full - a).abs()[:, 5:].max() > 1e-2
