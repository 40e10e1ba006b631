"""The chapter `uni-3dar`: refusals, the method done again in plain loops, verdicts, the paper-scale path."""

import argparse
import json
import math
import types
from unittest import mock

import IPython.display
import nbformat
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.chapters.conftest import NOTEBOOKS
from tests.chapters.invented import verdicts_in
from tokenbook.parameters import ParameterError

CHAPTER = "uni-3dar"
SMALL = {"scale": "smoke", "hidden": 24, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def method(run_cells):
    """The chapter's definitions and data, nothing trained."""
    return run_cells(CHAPTER, before="training", **SMALL)


@pytest.fixture(scope="module")
def smoke(run_cells):
    """The whole chapter at smoke scale."""
    return run_cells(CHAPTER, **SMALL)


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid_len": 0.33}, "must round to an even number of bins, at least 2; got 11"),
        (
            {"grid_len": 0.05, "xyz_resolution": 0.1},
            "must round to an even number of bins, at least 2; got 0",
        ),
        ({"hidden": 16, "heads": 4}, "head width of at least 6, two channels an axis; got 16 / 4"),
        ({"hidden": 27, "heads": 3}, "must be an even head width .* got 27 / 3"),
        ({"hidden": 50, "heads": 4}, "must be an even head width .* got 50 / 4"),
        ({"rank_ratio": 0.01}, "rank_ratio \\* n_samples must keep at least one sample; got 0.01"),
        ({"t_atom": 0.0}, "t_atom must be .*got 0.0"),
        ({"t_tree": -1.0}, "t_tree must be .*got -1.0"),
        ({"merge_level": 11}, "merge_level must be .*2..10; got 11"),
        ({"merge_level": 2}, r"merge_level must be at least 3: a structure is \d+ cells .* wide; got 2"),
        ({"variants": ["no_mntp"]}, r"variants must contain uni3dar, the method; got \['no_mntp'\]"),
        ({"elements": ["H", "C", "Xe"]}, "elements must be among H, C, N, O, F; got Xe"),
        ({"dataset": "nowhere.xyz"}, "dataset 'nowhere.xyz' cannot be read: there is no file nowhere.xyz"),
        ({"rotation": "flip"}, "rotation must be one of none, tilt, z90, so3; got 'flip'"),
        ({"scale": "paper"}, "dataset must be 'generated', a file, a folder or a hub id; got ''"),
    ],
)
def test_bad_parameters_are_refused_in_one_sentence(run_cells, given, message):
    with pytest.raises(ParameterError, match=message):
        run_cells(CHAPTER, before="training", **SMALL | given)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"atom_type": ["H"], "atom_pos": [[0, 0, math.nan]]}], "finite coordinates; got nan or infinity"),
        ([{"atom_type": [], "atom_pos": []}], "structures of at least one atom; got an empty one"),
        (
            [{"atom_type": ["Xe"], "atom_pos": [[0, 0, 0]]}],
            "must hold all of the data set's; got .* without Xe",
        ),
        (
            [{"atom_type": ["H", "H"], "atom_pos": [[0, 0, 0], [0, 0, 0.01]]}],
            "at most 5 % of the atoms share",
        ),
        ([{"atom_type": ["H", "H"], "atom_pos": [[0, 0, 0], [0, 0, 7.0]]}], "merge_level must be at least 5"),
        ([{"atom_type": ["H"]}], "no column atom_pos"),
    ],
)
def test_bad_structures_are_refused_in_one_sentence(run_cells, tmp_path, rows, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows * 40))
    with pytest.raises(ParameterError, match=message):
        run_cells(CHAPTER, before="training", **SMALL, dataset=str(path))


def test_a_resolution_that_does_not_divide_is_told(run_cells):
    space = run_cells(CHAPTER, before="imports", **SMALL | {"grid_len": 0.37})
    assert space["K"] == 12


def test_a_loss_that_is_not_finite_names_the_training_and_the_step(method, run_cells):
    space = run_cells(CHAPTER, before="baseline-jobs", **SMALL)
    model = space["Uni3DAR"](space["Variant"]())
    with pytest.raises(FloatingPointError, match=r"joint: the loss of step 0 is nan; lower lr"):
        space["train"]([model], lambda step: [torch.tensor(math.nan)], 3, "joint")


# The octree, done again by recursion -----------------------------------------------------------------------


def octree_by_recursion(cells, depth):
    """(level, corner, mask) breadth first, from the definition."""
    found, frontier = [], [(0, 0, 0)] if len(cells) else []
    cells = {tuple(c) for c in cells}
    for level in range(depth, -1, -1):
        following = []
        for x, y, z in frontier:
            half, mask = 2**level // 2, 0
            for b in range(8 if level else 0):
                corner = (x + half * (b & 1), y + half * (b >> 1 & 1), z + half * (b >> 2 & 1))
                if any(all(a <= v < a + half for a, v in zip(corner, c, strict=True)) for c in cells):
                    mask |= 1 << b
                    following.append(corner)
            found.append((level, [x, y, z], mask))
        frontier = following
    return found


@pytest.mark.parametrize("n", [0, 1, 5, 40, 512])
def test_the_octree_is_its_definition(method, n):
    draw = torch.Generator().manual_seed(n)
    flat = torch.randperm(512, generator=draw)[:n]
    cells = method["deinterleave"](flat, 3)
    tree = method["octree_encode"](cells, 3)
    got = list(zip(tree.level.tolist(), tree.corner.tolist(), tree.mask.tolist(), strict=True))
    assert got == octree_by_recursion(cells.tolist(), 3)
    back = method["octree_decode"](tree.mask[tree.level > 0], 3)
    assert sorted(back.tolist()) == sorted(cells.tolist())
    assert back.tolist() == tree.corner[tree.level == 0].tolist()


def test_structures_encoded_together_are_those_encoded_alone(method):
    clouds = [method["deinterleave"](torch.randperm(4096)[:n], 4) for n in (3, 1, 17)]
    owner = torch.tensor([i for i, c in enumerate(clouds) for _ in c])
    together = method["octree_encode"](torch.cat(clouds), 4, owner)
    for i, cloud in enumerate(clouds):
        alone, mine = method["octree_encode"](cloud, 4), together.owner == i
        assert torch.equal(alone.mask, together.mask[mine])
        assert torch.equal(alone.corner, together.corner[mine])


def test_masks_of_the_wrong_number_are_refused(method):
    decode, masks = method["octree_decode"], torch.tensor([131, 1, 4, 128, 5, 128, 128])
    with pytest.raises(ValueError, match="masks must hold 7 tokens or more, got 6"):
        decode(masks[:-1], 3)
    with pytest.raises(ValueError, match="masks must hold 7 tokens, got 8"):
        decode(torch.cat((masks, masks[:1])), 3)


def test_rounding_carries_into_the_next_cell(method):
    place, g, delta = method["place_on_grid"], 0.36, 0.03
    p = np.array([[[0.0, 0, 0], [0.36 - 0.01, 0.1, 1.0], [-0.36 + 0.01, -0.1, -1.0]]])
    cells, bins, placed = place(p, np.ones((1, 3), bool), g=g, depth=4, delta=delta)
    assert bins.min() >= 0
    assert bins.max() < 12
    assert np.abs(cells * g + bins * delta - placed).max() <= delta / 2 + 1e-9
    moved = placed - p
    assert np.allclose(moved, moved[:, :1])
    assert cells.mean(1).round().tolist() == [[8, 8, 8]]


def test_tokens_of_both_sequences_written_out(method):
    cells = np.array([[[0, 0, 0], [5, 3, 1], [15, 15, 15]]])
    bins, types, present = np.arange(9).reshape(1, 3, 3), np.array([[2, 1, 0]]), np.ones((1, 3), bool)
    nodes = method["tokenize"](types, cells, bins, present)
    expected = octree_by_recursion(cells[0].tolist(), 4)
    assert nodes.token[0].tolist() == [m for _, _, m in expected]
    assert nodes.level[0].tolist() == [n for n, _, _ in expected]
    centres = [[12 * (c + 2**n / 2) for c in corner] for n, corner, _ in expected]
    assert nodes.centre[0].tolist() == centres
    assert nodes.type[0][-3:].tolist() == [2, 1, 0]
    assert nodes.bins[0][-3:].tolist() == bins[0].tolist()
    assert nodes.fine[0][-2].tolist() == [12 * 5 + 3, 12 * 3 + 4, 12 * 1 + 5]
    plain = method["tokenize"](types, cells, bins, present, plain=True)
    inner = [m for n, _, m in expected if n > 0]
    assert plain.token[0][:-3].tolist() == [m >> b & 1 for m in inner for b in range(8)]
    assert plain.level[0][-3:].tolist() == [4, 4, 4]
    assert plain.lengths.tolist() == [8 * len(inner) + 3]


def test_entries_show_what_they_may(method):
    nodes, entries_of = method["random_nodes"](3), method["entries_of"]
    n, MASK = int(nodes.lengths[0]), method["MASK"]
    two = entries_of(nodes, method["Variant"](), closing=True)
    assert (two.kind[0, : 2 * n : 2] == MASK).all()
    assert torch.equal(two.place[0, : 2 * n : 2], nodes.centre[0, :n])
    assert torch.equal(two.place[0, 1 : 2 * n : 2], nodes.fine[0, :n])
    assert (two.bins[0, : 2 * n : 2] == method["K"] // 2).all()
    assert two.kind[0, 2 * n : 2 * n + 2].tolist() == [MASK, method["CLS"]]
    assert two.level[0, 2 * n] == -1
    other = method["random_nodes"](3)
    other.token.add_(1), other.type.add_(1), other.bins.add_(1)
    blind = entries_of(other, method["Variant"]())
    assert (blind.kind[:, ::2] == MASK).all()
    assert torch.equal(blind.bins[:, ::2], torch.full_like(blind.bins[:, ::2], method["K"] // 2))
    plain = entries_of(nodes, method["Variant"](mntp=False))
    assert torch.equal(plain.kind[:, 1:], entries_of(nodes, method["Variant"]()).kind[:, 1:-1:2])
    constant = entries_of(nodes, method["Variant"](constant=True))
    assert (constant.place[:, ::2] == method["CENTRE"]).all()


# The model under the names of the published checkpoint, done again in loops ---------------------------------


def official_weights(space, D=24, n_layers=2, rows=None):
    """Random weights under the official names."""
    draw, n_types, K, L = torch.Generator().manual_seed(0), space["N_TYPES"], space["K"], space["L"]
    make = lambda *shape: 0.3 * torch.randn(*shape, generator=draw)  # noqa: E731
    inner = 8 * math.ceil(D / 3)
    w = {"atom_emb.weight": make(rows or n_types, D), "cur_level.weight": make(L + 2, D)}
    w |= {f"xyz_emb.{i}.weight": make(K, D) for i in range(3)} | {"norm.weight": 1 + make(D)}
    for i in range(n_layers):
        p = f"decoder.layers.{i}."
        w |= {p + "attn_norm.weight": 1 + make(D), p + "ffn_norm.weight": 1 + make(D)}
        w |= {p + f"attn.{x}_proj.weight": make(D, D) for x in ("q", "k", "v", "out")}
        w |= {p + "ffn.w1.weight": make(inner, D), p + "ffn.w3.weight": make(inner, D),
              p + "ffn.w2.weight": make(D, inner)}  # fmt: skip
    heads = {"tree_heads.0": 255} | {
        f"atom_heads.0.pred_heads.{j}": n for j, n in enumerate((n_types, K, K, K))
    }
    for name, n in heads.items():
        w |= {name + ".dense.weight": make(D, D), name + ".out.weight": make(n, D)}
    return w | {f"atom_heads.0.emb_layers.{j}.weight": make(n, D) for j, n in enumerate((n_types, K, K))}


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x, places):
    """Rotary pairs (2j, 2j + 1) by x, y, z in turn: x [T, d], places [T, 3] in units of the resolution."""
    pairs, n_ax = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()), x.shape[-1] // 6
    angle = torch.zeros(pairs.shape, dtype=torch.float64)
    for axis in range(3):
        for k in range(n_ax):
            angle[:, axis * n_ax + k] = places[:, axis] * 10_000 ** (-2 * k / (2 * n_ax))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def states_in_loops(w, entries, heads=2, n_layers=2):
    """The states [T, D] of one sequence, from the official names."""
    w = {k: v.double() for k, v in w.items()}
    x = w["atom_emb.weight"][entries.kind[0]] + w["cur_level.weight"][entries.level[0] + 1]
    for axis in range(3):
        x = x + w[f"xyz_emb.{axis}.weight"][entries.bins[0, :, axis]]
    for i in range(n_layers):
        p, T = f"decoder.layers.{i}.", len(x)
        y = rms(x, w[p + "attn_norm.weight"])
        q, k, v = (y @ w[p + f"attn.{n}_proj.weight"].T for n in "qkv")
        out = []
        for h in range(heads):
            at = slice(h * 12, h * 12 + 12)
            scores = turned(q[:, at], entries.place[0]) @ turned(k[:, at], entries.place[0]).T / math.sqrt(12)
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
            out.append(scores.softmax(-1) @ v[:, at])
        x = x + torch.cat(out, -1) @ w[p + "attn.out_proj.weight"].T
        y = rms(x, w[p + "ffn_norm.weight"])
        gate = torch.nn.functional.silu(y @ w[p + "ffn.w1.weight"].T)
        x = x + (gate * (y @ w[p + "ffn.w3.weight"].T)) @ w[p + "ffn.w2.weight"].T
    return rms(x, w["norm.weight"])


def head_in_loops(w, name, y):
    inner = torch.nn.functional.gelu(y @ w[name + ".dense.weight"].double().T)
    return inner @ w[name + ".out.weight"].double().T


def test_official_weights_give_the_logits_of_plain_loops(run_cells, tmp_path):
    space = run_cells(CHAPTER, before="jobs", **SMALL)
    weights = official_weights(space)
    torch.save(
        {"ema": {"params": weights}, "model": {}, "args": argparse.Namespace(seed=1)}, tmp_path / "a.pt"
    )
    model = space["load_official"](str(tmp_path / "a.pt"))
    save_file(weights, tmp_path / "a.safetensors")
    same = space["load_official"](str(tmp_path / "a.safetensors"))
    for a, b in zip(model.state_dict().items(), same.state_dict().items(), strict=True):
        assert a[0].startswith("property_head") or torch.equal(a[1], b[1])
    nodes = space["random_nodes"](1)
    entries = space["entries_of"](nodes, space["Variant"]())
    y = states_in_loops(weights, entries)
    got = model(entries)[0].double()
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4)
    tree, kind, xyz, _ = space["losses_of"](model, space["pack"](nodes, model))
    inner = ~nodes.is_leaf[0]
    logits = head_in_loops(weights, "tree_heads.0", y[::2][inner])
    expected = torch.nn.functional.cross_entropy(logits, nodes.token[0][inner] - 1, reduction="none")
    torch.testing.assert_close(tree.double(), expected, rtol=1e-3, atol=1e-3)
    state, values = y[::2][~inner], torch.cat((nodes.type[0, :, None], nodes.bins[0]), 1)[~inner]
    losses = []
    for j in range(4):
        logits = head_in_loops(weights, f"atom_heads.0.pred_heads.{j}", state)
        losses.append(torch.nn.functional.cross_entropy(logits, values[:, j], reduction="none"))
        if j < 3:
            state = state + weights[f"atom_heads.0.emb_layers.{j}.weight"].double()[values[:, j]]
    torch.testing.assert_close(kind.double(), losses[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(xyz.double(), sum(losses[1:]), rtol=1e-3, atol=1e-3)


def test_training_weighs_places_by_a_tenth_and_averages_over_nodes(method):
    model, nodes = method["bold"](method["Variant"]()), method["random_nodes"](4)
    tree, kind, xyz = method["structure_nll"](model, nodes).sum(0)
    expected = (tree + kind + 0.1 * xyz) / int(nodes.lengths.sum())
    assert method["training_loss"](model, method["pack"](nodes, model)).item() == pytest.approx(
        expected, rel=1e-4
    )


# Sampling, baselines, data ---------------------------------------------------------------------------------


class Sparse(torch.nn.Module):
    """A tree head that likes few children."""

    def __init__(self, head, plain):
        super().__init__()
        bits = torch.tensor([m.bit_count() for m in range(1, 256)])
        self.head, self.bonus = head, torch.tensor([1.7, 0.0]) if plain else 8.0 * (bits == 1)

    def forward(self, y):
        return 0.1 * self.head(y) + self.bonus


@pytest.mark.parametrize("name", ["uni3dar", "no_mntp", "no_2lsc"])
def test_a_generated_sequence_is_the_one_that_its_structure_has(method, name):
    variant = method["VARIANTS"][name]
    model = method["bold"](variant)
    model.tree_head = Sparse(model.tree_head, variant.plain)
    made = method["generate"](model, 400, (1.0, 1.0, 1.0), 0)
    kept = [i for i in range(400) if made.whole[i] and made.queue.leaves[i] > 0]
    assert len(kept) > 4
    for i in kept[:40]:
        q, n = made.queue, int(made.queue.length[i])
        leaf = q.is_leaf[i, :n]
        cells, kinds = q.corner[i, :n][leaf].numpy()[None], q.type[i, :n][leaf].numpy()[None]
        present = np.ones(kinds.shape, bool)
        nodes = method["tokenize"](kinds, cells, q.bins[i, :n][leaf].numpy()[None], present, variant.plain)
        assert torch.equal(nodes.token[0], q.token[i, :n])
        assert torch.equal(nodes.level[0], q.level[i, :n])


def test_too_many_leaves_and_null_atoms_are_counted(method):
    model = method["bold"](method["Variant"]())
    made = method["generate"](model, 32, (10.0, 10.0, 10.0), 0)
    over = made.queue.leaves > method["P"].max_atoms
    assert over.any()
    assert not made.whole[over.numpy()].any()
    made.queue.type.fill_(method["NULL"])
    assert (method["harvest"](made.queue, torch.zeros(32)).types == -1).all()


@pytest.mark.parametrize("name", ["uni3dar", "no_2lsc"])
def test_a_sample_that_is_not_whole_is_ranked_last(method, name):
    """No type was drawn for what was cut off: its mean log p of none must not count as the likeliest."""
    variant = method["VARIANTS"][name]
    model = method["bold"](variant)
    model.tree_head = Sparse(model.tree_head, variant.plain)
    made = method["generate"](model, 100, (1.0, 1.0, 1.0), 0)
    assert made.whole.any()
    assert not made.whole.all()
    assert np.isfinite(made.score).tolist() == made.whole.tolist()


def test_the_strip_shows_a_molecule_whose_queue_was_kept(smoke):
    """Of many samples only the first ones' queue is there; the likeliest good one may be another."""
    made, results = dict(smoke["made"]), dict(smoke["results"])
    key = ("uni3dar", 0, "paper")
    few, n = made[key], len(made[key].score)
    made[key] = few._replace(
        types=np.tile(few.types, (2, 1)), positions=np.tile(few.positions, (2, 1, 1)),
        score=np.append(few.score, np.zeros(n)),
    )  # fmt: skip
    results[key] = results[key] | {"good": np.arange(2 * n) >= n}
    space = dict(smoke) | {"made": made, "results": results}
    cells = nbformat.read(NOTEBOOKS / f"{CHAPTER}.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if cell.id == "figure-strip")
    with mock.patch.object(IPython.display, "display"):
        exec(compile(source, "figure-strip", "exec"), space)
    assert space["best"] < n


def test_diffusion_with_a_perfect_denoiser_returns_the_data(method):
    torch.manual_seed(0)
    model = method["Diffusion"](torch.tensor([3, 3]), 50)
    clean = torch.zeros(4, 3, 8)
    clean[:, :, :3] = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [0, -1, 0]])
    clean[:, 0, 4], clean[:, 1:, 3] = 0.25, 0.25
    model.noise_in = lambda x, present, a: (x - a.sqrt() * clean) / (1 - a).sqrt()
    for steps in (50, 5):
        types, positions = model.sample(4, steps, 1)
        assert types.tolist() == [[1, 0, 0]] * 4
        np.testing.assert_allclose(positions, clean[..., :3], atol=1e-4)


def test_atoms_as_text_come_back(method):
    model, s = method["Points"](), method["held_out"]
    ids = model.ids(s)
    for i in range(4):
        n = int(s.present[i].sum())
        row = ids[i][ids[i] >= 0]
        assert row[0] == row[-1] == model.end
        atoms = row[1:-1].view(n, 4) - torch.tensor(model.first)
        got = {tuple(a) for a in atoms.tolist()}
        at = s.cells[i] * method["K"] + s.bins[i]
        assert got == {
            (int(t), *map(int, p)) for t, p, e in zip(s.types[i], at, s.present[i], strict=True) if e
        }
        assert atoms[:, 3].tolist() == sorted(atoms[:, 3].tolist())


def test_the_dipole_of_water_and_of_methane(method):
    half, bond = math.radians(104.5) / 2, 0.96
    water = [
        [0, 0, 0],
        [bond * math.sin(half), bond * math.cos(half), 0],
        [-bond * math.sin(half), bond * math.cos(half), 0],
    ]
    got = method["dipole"](np.array([[3, 0, 0]]), np.array([water]))
    assert got[0] == pytest.approx(2 * (3.44 - 2.20) * bond * math.cos(half))
    types, positions = method["templates"]()
    assert method["dipole"](types, positions)[0] == pytest.approx(0, abs=1e-9)


def test_shuffled_types_keep_places_and_counts(run_cells):
    space = run_cells(CHAPTER, before="jobs", **SMALL)
    s = space["learned_from"]
    other = space["shuffled"](s, 0)
    assert (np.sort(other.types, 1) == np.sort(s.types, 1)).all()
    assert ((other.types >= 0) == s.present).all()
    heavy = s.types > 0
    assert heavy.any()
    assert (other.types[heavy] == 0).all()


def test_dropping_takes_level_one_only(run_cells):
    space = run_cells(CHAPTER, before="jobs", **SMALL, tree_drop=1.0)
    nodes = space["random_nodes"](50)
    fewer = space["without_some"](nodes, torch.Generator().manual_seed(0))
    assert int(fewer.lengths.sum()) < int(nodes.lengths.sum())
    for level in (0, 2, 3, 4):
        count = lambda x, level=level: ((x.level == level) & x.present).sum(1)  # noqa: E731
        assert torch.equal(count(fewer), count(nodes))


# Verdicts --------------------------------------------------------------------------------------------------


def world(smoke, **changes):
    """Results of a world in which the paper holds, as changes to the namespace."""
    rng, n = np.random.default_rng(0), 200
    P = type(smoke["P"])(smoke["P"].as_dict() | {"n_samples": n}, None)
    level = {"uni3dar": 20.0, "no_mntp": 24.0, "longer": 22.0, "next_place": 22.0, "constant_place": 24.0,
             "no_2lsc": 25.0, "neither": 26.0, "joint": 20.0, "shuffled": 25.0}  # fmt: skip
    level |= changes.get("level", {})
    seeds, noise = range(2), rng.normal(0, 0.3, P.n_eval)
    nll = {
        (v, s): np.stack([np.full(P.n_eval, x) + noise + 0.05 * s, 0 * noise, 0 * noise], 1)
        for v, x in level.items() for s in seeds
    }  # fmt: skip
    good = {"uni3dar": 0.6, "no_mntp": 0.4, "joint": 0.8, "shuffled": 0.0, "untrained": 0.0, "diffusion": 0.3}
    results, made = {}, {}
    for v, x in (good | changes.get("good", {})).items():
        for s in seeds:
            score, stable = rng.random(n), rng.permutation(n) < x * n
            if v == "uni3dar" and changes.get("ranked", True):
                score = np.where(stable, score, score + 0.5)
            for how in ("paper", smoke["D_STEPS"][-1]):
                results[v, s, how] = {"good": stable}
            made[v, s, "paper"] = smoke["Samples"](None, None, None, score, None)
    errors = {"joint": 0.1, "shuffled": 1.0} | changes.get("wrong", {})
    wrong = {(v, s): np.abs(rng.normal(0, x, P.n_eval)) for v, x in errors.items() for s in seeds}
    floor = lambda x: np.abs(rng.normal(0, x, P.n_eval))  # noqa: E731
    speed = {k: np.array([changes.get("ours", 1.0) if k[0] == "uni3dar" else 4.0]) for k in smoke["speed"]}
    return {
        "P": P, "SEEDS": seeds, "nll": nll, "results": results, "made": made, "wrong": wrong, "speed": speed,
        "constant": floor(1.0), "composition": floor(0.3), "seen_before": nll["uni3dar", 0],
    }  # fmt: skip


TESTED = ("C1", "C2", "C3", "C4", "C6", "C8a", "C8b", "C9")


def test_a_world_in_which_the_paper_holds_is_called_so(smoke):
    got = verdicts_in(dict(smoke) | world(smoke), CHAPTER)
    assert {claim: got[claim] for claim in TESTED} == dict.fromkeys(TESTED, "reproduced")
    assert {got[claim] for claim in ("C5", "C7", "C10")} == {"untested"}


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("C2", {"level": {"uni3dar": 23.8}}),  # MNTP brings too little
        ("C2", {"level": {"constant_place": 20.0}}),  # the MASK's place does not matter
        ("C2", {"good": {"no_mntp": 0.9}}),
        ("C4", {"good": {"diffusion": 0.7}}),
        ("C4", {"good": {"shuffled": 0.7}}),  # molecules whose elements mean nothing count as well
        ("C6", {"ours": 10.0}),  # slower than diffusion
        ("C6", {"good": {"untrained": 0.9}}),
        ("C8a", {"wrong": {"joint": 0.6}}),
        ("C8a", {"wrong": {"joint": 0.35}}),  # knows the composition, no geometry
        ("C8a", {"wrong": {"shuffled": 0.1}}),
        ("C8b", {"good": {"joint": 0.5}}),
        ("C9", {"ranked": False}),
    ],
)
def test_a_broken_world_costs_the_verdict(smoke, claim, changes):
    assert verdicts_in(dict(smoke) | world(smoke, **changes), CHAPTER)[claim] != "reproduced"


def broken_encoders(space):
    """Encoders that are wrong on purpose."""
    encode, Tree = space["octree_encode"], space["Tree"]

    def swapped(cells, depth, owner=None):
        """Levels 1 and 2 in each other's place."""
        tree = encode(cells, depth, owner)
        level = torch.where(tree.level == 1, 2, torch.where(tree.level == 2, 1, tree.level))
        order = torch.argsort(tree.owner * (depth + 1) + depth - level, stable=True)
        return Tree(*(x[order] for x in (tree.owner, level, tree.corner, tree.mask)))

    def reversed_bits(cells, depth, owner=None):
        """Child b written as child 7 - b."""
        tree = encode(cells, depth, owner)
        mask = sum(((tree.mask >> b) & 1) << (7 - b) for b in range(8))
        return Tree(tree.owner, tree.level, tree.corner, mask)

    def a_child_lost(cells, depth, owner=None):
        """Nodes forget their last child where they have two or more."""
        tree = encode(cells, depth, owner)
        low = tree.mask & (tree.mask - 1)
        return Tree(tree.owner, tree.level, tree.corner, torch.where(low > 0, low, tree.mask))

    return {"swapped": swapped, "reversed": reversed_bits, "lost": a_child_lost}


@pytest.mark.parametrize("how", ["swapped", "reversed", "lost"])
def test_a_broken_octree_costs_both_verdicts(smoke, how):
    space = dict(smoke) | world(smoke)
    cells = nbformat.read(NOTEBOOKS / f"{CHAPTER}.ipynb", as_version=4).cells
    source = {cell.id: cell.source for cell in cells}
    for cell in ("octree", "octree-decode", "tokens", "tokenize", "corpus"):  # they see the copy's globals
        exec(compile(source[cell], cell, "exec"), space)
    space["octree_encode"] = broken_encoders(space)[how]
    got = verdicts_in(space, CHAPTER, besides=("round-trips", "grids"))
    assert got["C3"] == "not reproduced"
    assert got["C1"] == "not reproduced"


@pytest.mark.parametrize("name", ["uni3dar", "no_mntp", "next_place", "constant_place", "no_2lsc", "neither"])
def test_the_state_that_predicts_a_node_sees_all_contents_before_and_not_its_own(method, name):
    variant = method["VARIANTS"][name]
    model, last = method["bold"](variant), 5

    def asked(changed):
        """The states at which the first six nodes of each structure are predicted, [4, 6, D]."""
        nodes = method["random_nodes"](4, variant.plain)
        if changed is not None:  # contents only: where the nodes lie stays as it is
            nodes.token[:, changed] = 1 - nodes.token[:, changed] if variant.plain else 7
        packed = method["pack"](nodes, model)
        if variant.mntp:
            assert (packed.entries.kind[packed.ask_inner] == method["MASK"]).all()
            assert (packed.entries.kind[packed.ask_leaf] == method["MASK"]).all()
        states, ask = model.read(packed), packed.ask_inner
        return torch.stack([states[ask[packed.of_inner == i][: last + 1]] for i in range(4)])

    states = asked(None)
    torch.testing.assert_close(asked(last), states)
    before = (asked(last - 1) - states).abs().amax(-1)
    assert (before[:, :last] < 1e-5).all()
    assert (before[:, last] > 1e-3).all()


def test_a_structure_has_its_own_likelihood_whatever_stands_beside_it(method):
    model, nodes = method["bold"](method["Variant"]()), method["random_nodes"](6)
    together = method["structure_nll"](model, nodes, rows=4)
    alone = np.concatenate([method["structure_nll"](model, nodes[slice(i, i + 1)]) for i in range(6)])
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_models_trained_together_are_those_trained_alone(run_cells):
    space = run_cells(CHAPTER, before="jobs", **SMALL)
    space["ENTRIES"] = {"uni3dar": 1.0}
    make, fit = space["octree_models"], space["train_octree"]
    together, alone = fit("joint", make("joint", [0, 1])), fit("joint", make("joint", [1]))
    assert list(together) == [("joint", 0), ("joint", 1)]
    for a, b in zip(together["joint", 1][0].parameters(), alone["joint", 1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    curve = {seed: np.array(together["joint", seed][1]) for seed in (0, 1)}
    np.testing.assert_allclose(curve[1], alone["joint", 1][1], rtol=1e-5)
    assert not np.allclose(curve[0], curve[1], rtol=1e-5)


def test_scores_come_from_logits_before_the_temperature(method):
    model, y = method["bold"](method["Variant"]()), torch.randn(7, 48)
    values, log_p = method["draw_atoms"](model, y, (5.0, 5.0), torch.Generator().manual_seed(0))
    expected = model.atom_head.pred_heads[0](y).log_softmax(-1)[torch.arange(7), values[:, 0]]
    torch.testing.assert_close(log_p, expected)
    assert set(values[:, 0].tolist()) <= {0, 1, 2, 3, 4, method["NULL"]}


def test_ranking_compares_samples_of_one_seed_only(smoke):
    two_seeds = dict(smoke) | {"SEEDS": range(2)}
    gains = types.FunctionType(smoke["rank_gains"].__code__, two_seeds, argdefs=(False,))
    score = np.append(
        np.arange(20.0), np.arange(20.0) + 100
    )  # the first seed's samples are likelier and good
    good = np.repeat([100.0, 0.0], 20)
    assert gains(score, good).tolist() == [0, 0]
    good[20:22] = 100.0  # the likeliest tenth of the second seed
    assert gains(score, good).tolist() == [0, 90]
    assert gains(score, good, True).tolist() == [0, -10]


def test_two_runs_with_one_seed_agree(run_cells, smoke):
    one, two = (space["ledger"].payload() for space in (smoke, run_cells(CHAPTER, **SMALL)))
    for payload in (one, two):  # seconds differ
        payload["claims"] = [row for row in payload["claims"] if row["claim"] != "C6"]
    assert one == two


# The paper-scale path --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qm9(tmp_path_factory, method):
    """A small file in the form of the archives' rows."""
    folder = tmp_path_factory.mktemp("qm9")
    types, positions = method["templates"]()
    elements = method["P"].elements
    with (folder / "train.jsonl").open("w") as lines:
        for t, p in list(zip(types, positions, strict=True))[:20]:
            row = {"atom_type": [elements[k] for k in t if k >= 0], "atom_pos": p[t >= 0].tolist()}
            lines.write(json.dumps(row) + "\n")
    return folder


PAPER = {"scale": "paper", "device": "cpu", "heads": 2, "merge_level": 4, "n_samples": 20, "n_eval": 8,
         "n_train": 12, "max_atoms": 8}  # fmt: skip


def test_the_published_checkpoint_runs_through_the_same_cells(run_cells, method, qm9, tmp_path):
    path = tmp_path / "qm9.pt"
    space = run_cells(
        CHAPTER, before="jobs", **SMALL, dataset="generated", xyz_resolution=0.01, grid_len=0.24
    )
    torch.save({"ema": {"params": official_weights(space)}, "args": argparse.Namespace(arch="uni3dar")}, path)
    space = run_cells(CHAPTER, **PAPER, model=str(path), dataset=str(qm9))
    verdicts = {row["claim"]: row["verdict"] for row in space["ledger"].rows()}
    assert verdicts["C1"] == verdicts["C3"] == "reproduced"
    assert verdicts["C9"] != "untested"
    assert {c for c, v in verdicts.items() if v == "untested"} >= {"C2", "C4", "C6", "C8a", "C8b"}
    assert space["K"] == 24
    assert np.isfinite(space["nll"]["uni3dar", 0]).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"elements": ["H", "C", "N", "O"]},
            "elements must fit the checkpoint, whose atom_emb.weight has 265 rows",
        ),
        ({"merge_level": 5}, "merge_level must fit the checkpoint, whose cur_level.weight has 6 rows; got 7"),
        (
            {"grid_len": 0.36},
            "grid_len / xyz_resolution must fit the checkpoint, whose xyz_emb.0.weight has 12",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(run_cells, method, tmp_path, given, message):
    save_file(official_weights(method), tmp_path / "a.safetensors")
    fitting = {"xyz_resolution": 0.02, "grid_len": 0.24}
    space = run_cells(CHAPTER, before="jobs", **SMALL | fitting | given)
    with pytest.raises(ParameterError, match=message):
        space["load_official"](str(tmp_path / "a.safetensors"))


def test_other_checkpoints_are_refused_and_nothing_in_them_runs(run_cells, method, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    space = run_cells(CHAPTER, before="jobs", **SMALL)
    weights = official_weights(method)
    torch.save({"model": weights, "extra": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ParameterError, match=r"bomb\.pt does not, and nothing in it was run"):
        space["load_official"](str(tmp_path / "bomb.pt"))
    assert not (tmp_path / "ran").exists()
    save_file({"embed.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ParameterError, match=r"must be a Uni-3DAR checkpoint; .* has no atom_emb.weight"):
        space["load_official"](str(tmp_path / "other.safetensors"))
    del weights["norm.weight"]
    save_file(weights, tmp_path / "cut.safetensors")
    with pytest.raises(ParameterError, match=r"has no norm\.weight"):
        space["load_official"](str(tmp_path / "cut.safetensors"))
    with pytest.raises(
        ParameterError, match=r"model must be a file or REPOSITORY:FILE\[@REVISION\]; got 'qm9'"
    ):
        space["load_official"]("qm9")
