"""The shared Vision Mamba: against transformers' mixer, against plain loops, and its hooks."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.func import functional_call, stack_module_state, vmap
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from tokenbook.models.token_positions import Kept, continuous_paths, gaps
from tokenbook.models.vision_mamba import SIZES, Mixer, VimConfig, VisionMamba, read_checkpoint

SMALL = VimConfig(image_size=8, patch=2, channels=1, width=20, depth=3, n_states=3, n_classes=10)
DIRECTIONS = {"": "A_log", "_b": "A_b_log"}


def random_model(config=SMALL, seed=0, dtype=torch.float64):
    """Every parameter away from its initial value, so that none can be forgotten or confused."""
    with torch.random.fork_rng():  # initial weights come from torch's global generator
        torch.manual_seed(seed)
        model = VisionMamba(config).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64).to(dtype))
    return model


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The mixer -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("suffix", "a_name"), DIRECTIONS.items())
def test_each_direction_is_the_mixer_of_transformers(suffix, a_name):
    ours = random_model(dtype=torch.float32).layers[0].mixer
    options = {"use_conv_bias": True, "use_bias": False, "use_mambapy": False}
    config = MambaConfig(hidden_size=20, state_size=3, expand=2, conv_kernel=4, time_step_rank=2, **options)
    theirs = MambaMixer(config, layer_idx=0)
    state = {"in_proj.weight": ours.in_proj.weight, "out_proj.weight": ours.out_proj.weight}
    state |= {"A_log": getattr(ours, a_name), "D": getattr(ours, f"D{suffix}")}
    for name in ("conv1d", "x_proj", "dt_proj"):
        state |= {f"{name}.{k}": p for k, p in getattr(ours, name + suffix).named_parameters()}
    theirs.load_state_dict(state)
    h = draw(2, 17, 20).float()
    _, y = ours(h, return_y=True)
    got = ours.out_proj(y[1] if suffix else y[0])
    wanted = theirs(h.flip(1)).flip(1) if suffix else theirs(h)
    # Relative to the outputs, which lie in the tens and hundreds; over 800 drawn mixers the worst was 3e-7.
    assert (got - wanted).square().mean().sqrt() < 1e-6 * wanted.square().mean().sqrt()
    assert wanted.abs().max() > 0.1


def direction_in_loops(mixer, suffix, h, positions, length, decay, conv):
    """One direction for one image, over all original positions: h [n, D] -> gated y [n, D_i]."""
    convolution, x_proj, dt_proj = (getattr(mixer, n + suffix) for n in ("conv1d", "x_proj", "dt_proj"))
    A = -getattr(mixer, DIRECTIONS[suffix]).exp()
    skip = getattr(mixer, f"D{suffix}")
    xz = h @ mixer.in_proj.weight.T
    x, z = xz[:, : len(A)], xz[:, len(A) :]
    at = {p: i for i, p in enumerate(positions)}
    state, step, y = torch.zeros_like(A), None, torch.empty_like(x)
    for p in range(length):
        i = at.get(p)
        if i is None:
            if decay != "none" and step is not None:
                rate = step if decay == "previous" else F.softplus(dt_proj.bias)
                state = torch.exp(rate[:, None] * A) * state
            continue
        u = convolution.bias.clone()
        for tap in range(4):
            before = i - tap if conv == "packed" else at.get(p - tap, -1)
            if before >= 0:
                u = u + convolution.weight[:, 0, 3 - tap] * x[before]
        u = F.silu(u)
        dt, B, C = (x_proj.weight @ u).split([mixer.rank, mixer.n_states, mixer.n_states])
        step = F.softplus(dt_proj.weight @ dt + dt_proj.bias)
        state = torch.exp(step[:, None] * A) * state + (step * u)[:, None] * B
        y[i] = (state @ C + skip * u) * F.silu(z[i])
    return y


@torch.no_grad()
@pytest.mark.parametrize("conv", ["packed", "gap_zero"])
@pytest.mark.parametrize("decay", ["previous", "bias", "none"])
def test_the_mixer_over_gaps_is_its_definition_in_loops(decay, conv):
    mixer, h = random_model().layers[1].mixer, draw(2, 6, 20)
    rows = [[0, 1, 4, 5, 9, 12], [2, 3, 4, 8, 10, 11]]
    out, y = mixer(h, Kept(torch.tensor(rows), 13, decay, conv), return_y=True)
    for b, positions in enumerate(rows):
        forward = direction_in_loops(mixer, "", h[b], positions, 13, decay, conv)
        mirrored = [12 - p for p in reversed(positions)]
        backward = direction_in_loops(mixer, "_b", h[b].flip(0), mirrored, 13, decay, conv).flip(0)
        torch.testing.assert_close(y[:, b], torch.stack((forward, backward)), rtol=1e-10, atol=1e-10)
        wanted = (forward + backward) / 2 @ mixer.out_proj.weight.T
        torch.testing.assert_close(out[b], wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("conv", ["packed", "gap_zero"])
@pytest.mark.parametrize("decay", ["previous", "bias", "none"])
def test_keeping_every_token_changes_nothing(decay, conv):
    mixer, h = random_model().layers[0].mixer, draw(2, 17, 20)
    everyone = Kept(torch.arange(17).expand(2, -1), 17, decay, conv)
    if conv == "packed":
        assert torch.equal(mixer(h, everyone)[0], mixer(h)[0])
    torch.testing.assert_close(mixer(h, everyone)[0], mixer(h)[0], rtol=1e-12, atol=1e-12)


def test_gaps_are_counted_in_scan_order():
    kept = Kept(torch.tensor([[1, 2, 5, 9]]), 12)
    assert gaps(kept.positions).tolist() == [[0, 0, 2, 3]]
    assert kept.reversed().positions.tolist() == [[2, 6, 9, 10]]
    assert gaps(kept.reversed().positions).tolist() == [[0, 3, 2, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0, 2, 2]], 5), r"positions must be strictly increasing in 0..4, got \[0, 2, 2\]"),
        (([[0, 1], [3, 5]], 5), r"positions must be .*got \[3, 5\]"),
        (([0, 1], 5), r"positions must be \[B, n\], got shape \[2\]"),
        (([[0, 1]], 5, "half"), "decay must be one of previous, bias, none, .*got 'half'"),
        (([[0, 1]], 5, "bias", "same"), "conv one of packed, gap_zero, got 'bias' and 'same'"),
    ],
)
def test_bad_positions_are_refused(arguments, message):
    positions, *others = arguments
    with pytest.raises(ValueError, match=message):
        Kept(torch.tensor(positions), *others)


# Blocks and orders -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("per_row", [False, True])
def test_an_order_equals_moving_hidden_and_residual_and_putting_both_back(per_row):
    block, hidden, residual = random_model().layers[1], draw(3, 9, 20), draw(3, 9, 20, seed=2)
    shape = (3, 9) if per_row else (9,)
    order = draw(*shape, seed=3).argsort(-1)
    rows = order.expand(3, 9)[..., None].expand(-1, -1, 20)
    moved = block(hidden.gather(1, rows), residual.gather(1, rows))
    wanted = [torch.empty_like(t).scatter(1, rows, t) for t in moved]
    got = block(hidden, residual, order, return_y=True)
    torch.testing.assert_close(got[:2], tuple(wanted))
    assert not torch.allclose(got[0], block(hidden, residual)[0])
    y = block(hidden.gather(1, rows), residual.gather(1, rows), return_y=True)[2]
    inner = rows[..., :1].expand(2, -1, -1, y.shape[-1])
    torch.testing.assert_close(got[2], torch.empty_like(y).scatter(2, inner, y))


@torch.no_grad()
def test_orders_reach_their_block_and_the_identity_changes_nothing():
    model, images = random_model(), draw(2, 1, 8, 8)
    identity = torch.arange(17).expand(3, -1).clone()
    assert torch.equal(model(images, identity), model(images))
    orders = identity.clone()
    orders[1] = draw(17).argsort()
    hidden, residual = model.embed(images), None
    for i, block in enumerate(model.layers):
        hidden, residual = block(hidden, residual, orders[1] if i == 1 else None)
    assert torch.equal(model(images, orders), model.read(hidden, residual))
    assert not torch.allclose(model(images, orders), model(images))


def test_order_and_kept_positions_exclude_each_other():
    kept = Kept(torch.arange(4)[None], 9)
    with pytest.raises(ValueError, match="an order or kept positions, not both"):
        random_model().layers[0](draw(1, 4, 20), None, torch.arange(4), kept)


@torch.no_grad()
def test_stochastic_depth_drops_rows_of_the_block_before():
    model = VisionMamba(VimConfig(image_size=8, patch=2, channels=1, width=16, depth=5, drop_path=0.4))
    assert [b.drop_path for b in model.layers] == pytest.approx([0, 0, 0.1, 0.2, 0.3])
    hidden, residual = draw(4000, 1, 16).float(), draw(4000, 1, 16, seed=2).float()
    block = model.layers[4].train()
    added = block(hidden, residual)[1] - residual
    dropped = (added == 0).all(-1)
    assert dropped.double().mean() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(added[~dropped], hidden[~dropped] / 0.7, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.eval()(hidden, residual)[1], residual + hidden)


# The model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "index"), [("first", 0), ("middle", 8), (3, 3), (16, 16)])
@torch.no_grad()
def test_the_class_token_stands_where_it_is_asked_for(position, index):
    config = VimConfig(**{**vars(SMALL), "class_position": position})
    model, images = random_model(config), draw(2, 1, 8, 8)
    tokens = model.embed(images) - model.pos_embed
    torch.testing.assert_close(tokens[:, index], model.cls_token[0].expand(2, -1))
    patches = torch.cat((tokens[:, :index], tokens[:, index + 1 :]), 1)
    torch.testing.assert_close(patches, model.patch_embed(images))
    first_patch = (model.patch_embed.proj.weight * images[0, :, :2, 2:4]).sum((1, 2, 3))
    torch.testing.assert_close(patches[0, 1], first_patch + model.patch_embed.proj.bias)
    hidden, residual = draw(2, 17, 20), draw(2, 17, 20, seed=2)
    wanted = model.head(model.norm_f(hidden + residual)[:, index])
    torch.testing.assert_close(model.read(hidden, residual), wanted)
    everywhere = model.head(model.norm_f(hidden + residual))
    moved = model.read(hidden, residual, torch.tensor([4, 7]))
    torch.testing.assert_close(moved, everywhere[[0, 1], [4, 7]])


def test_the_residual_stays_in_float32_when_weights_are_narrow():
    model = random_model(dtype=torch.bfloat16)
    hidden, residual = model.layers[0](draw(2, 17, 20).bfloat16(), None)
    assert (hidden.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    assert model(draw(2, 1, 8, 8).bfloat16()).dtype == torch.bfloat16


def test_several_models_in_one_scan_give_each_its_own_values_and_gradients():
    models, images = [random_model(seed=s) for s in range(3)], draw(3, 2, 1, 8, 8)
    orders = draw(3, 3, 17, seed=4).argsort(-1)
    weights, _ = stack_module_state(models)
    together = vmap(lambda w, x, o: functional_call(models[0], w, (x, o)))(weights, images, orders)
    together.square().sum().backward()
    for i, model in enumerate(models):
        alone = model(images[i], orders[i])
        alone.square().sum().backward()
        torch.testing.assert_close(together[i], alone)
        for name, p in model.named_parameters():
            torch.testing.assert_close(weights[name].grad[i], p.grad, msg=name)


def test_initial_weights():
    torch.manual_seed(0)
    config = VimConfig(image_size=32, patch=4, width=64, depth=4, init="truncated")
    model = VisionMamba(config)
    mixer = model.layers[2].mixer
    assert torch.allclose(mixer.A_b_log.exp(), torch.arange(1.0, 17.0).expand(128, -1))
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.002
    assert 0.05 < steps.max() <= 0.1
    assert mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(128) / 2
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert VisionMamba(VimConfig(width=64, depth=1)).layers[0].mixer.in_proj.weight.std() > 0.06
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 16) ** -0.5, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.cls_token.any()
    assert isinstance(model.layers[0].norm, torch.nn.RMSNorm)


def test_published_sizes():
    def millions(**options):
        with torch.device("meta"):
            model = VisionMamba(VimConfig(**options))
        return sum(p.numel() for p in model.parameters()) / 1e6

    width, depth = SIZES["tiny"]
    assert millions(width=width, depth=depth) == pytest.approx(7, abs=0.5)
    width, depth = SIZES["base"]
    assert millions(width=width, depth=depth) == pytest.approx(98, abs=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "patch must divide image_size = 8, got 3"),
        ({"norm": "batch"}, "norm must be rms or layer, got 'batch'"),
        ({"init": "zeros"}, "init must be vim or truncated, got 'zeros'"),
        ({"class_position": 17}, r"class_position must be first, middle or an index in 0..16, got 17"),
        ({"class_position": "last"}, "class_position must be .*got 'last'"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VimConfig(**{**vars(SMALL), **change})


# Checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_checkpoints_load_by_name(kind, tmp_path):
    model, path = random_model(dtype=torch.float32), tmp_path / f"tiny.{kind}"
    if kind == "pth":
        torch.save({"model": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    loaded, images = VisionMamba(SMALL).load(read_checkpoint(path)), draw(2, 1, 8, 8).float()
    assert torch.equal(loaded(images), model(images))


def test_names_of_parameters_are_those_of_the_official_checkpoints():
    mixer = {"in_proj.weight", "out_proj.weight", "A_log", "A_b_log", "D", "D_b"}
    for suffix in ("", "_b"):
        mixer |= {f"conv1d{suffix}.weight", f"conv1d{suffix}.bias", f"x_proj{suffix}.weight"}
        mixer |= {f"dt_proj{suffix}.weight", f"dt_proj{suffix}.bias"}
    assert set(dict(Mixer(20, 3, 2).named_parameters())) == mixer
    outside = {n for n in VisionMamba(SMALL).state_dict() if not n.startswith("layers.")}
    assert outside == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm_f.weight",
        "head.weight", "head.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.mixer.A_b_log"), "no layers.0.mixer.A_b_log"),
        (lambda s: s.pop("norm_f.weight"), r"lacks \['norm_f.weight'\]"),
        (lambda s: s.update({"neck.weight": torch.zeros(1)}), r"beyond this model \['neck.weight'\]"),
        (
            lambda s: s.update({"pos_embed": torch.zeros(1, 197, 20)}),
            r"pos_embed must have .*\[1, 197, 20\] in the checkpoint, \[1, 17, 20\] in this model",
        ),
    ],
)
def test_checkpoints_of_another_layout_are_refused(change, message):
    state = VisionMamba(SMALL).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        VisionMamba(SMALL).load(state)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a .safetensors or .pth file that exists, got"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save({"model": {}, "args": VimConfig()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="must hold tensors only"):
        read_checkpoint(tmp_path / "code.pth")


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 4), (1, 5)])
def test_continuous_paths_visit_every_patch_by_steps_of_one(height, width):
    for path in continuous_paths(height, width):
        assert sorted(path.tolist()) == list(range(height * width))
        rows, columns = path // width, path % width
        assert (rows.diff().abs() + columns.diff().abs() == 1).all()
    assert continuous_paths(2, 2).tolist() == [[0, 1, 3, 2], [0, 2, 3, 1], [2, 3, 1, 0], [1, 3, 2, 0]]
