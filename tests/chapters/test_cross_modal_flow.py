"""The chapter `cross-modal-flow`: refusals, knockout done again by hand, verdicts, the paper-scale path."""

import contextlib
import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.chapters.invented import verdicts_in
from tokenbook.parameters import ParameterError

CHAPTER = "cross-modal-flow"
SIX = ["Question->Last", "Image->Last", "Last->Last"]
SIX += ["Image->Question", "Related->Question", "Other->Question"]


@pytest.fixture(scope="module")
def method(run_cells):
    """The chapter's definitions and its questions, nothing trained."""
    return run_cells(CHAPTER, before="jobs", scale="smoke", layers=4)


@pytest.fixture(scope="module")
def learned(run_cells):
    """The whole chapter on one small model that learns, and the two planted ones."""
    return run_cells(CHAPTER, scale="smoke", layers=3, train_steps=500, windows=[3])


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"flows": [*SIX, "Picture->Last"]},
            r"flows must read SOURCE->TARGET .*Question.*got 'Picture->Last'",
        ),
        ({"flows": [*SIX, "Question->Image"]}, r"'Question->Image': Question comes behind Image"),
        ({"flows": [*SIX[:5], "All->Last"]}, r"flows must contain the paper's six; missing: \['Other->Que"),
        ({"windows": [5]}, r"windows must be at most the 4 layers; got \[5\]"),
        ({"windows": [0]}, r"windows must be .*got"),
        ({"tasks": ["place", "ChooseAttr"]}, r"tasks must be items of choice, place.*without a model"),
        ({"model": "somewhere", "tasks": ["tint"]}, r"tasks must be tasks of GQA.*with a model"),
        ({"model": "somewhere", "tasks": ["ChooseAttr"]}, "dataset and image_dir must name"),
        ({"patch_size": 5}, "patch_size must divide 16"),
        ({"n_questions": 5}, "n_questions must be .*got 5"),
    ],
)
def test_bad_parameters_are_refused_in_one_sentence(run_cells, given, message):
    with pytest.raises(ParameterError, match=message):
        run_cells(CHAPTER, before="cross-modal-flow-08", **{"scale": "smoke", "layers": 4, **given})


def test_an_even_window_is_allowed_with_a_warning(run_cells):
    with pytest.warns(UserWarning, match="a window of 2 layers has no middle"):
        run_cells(CHAPTER, before="cross-modal-flow-08", scale="smoke", layers=4, windows=[2])


@pytest.mark.parametrize(
    ("template", "count"), [("{question} <answer>", 0), ("<image> <image> {question}", 2)]
)
def test_a_prompt_needs_exactly_one_placeholder(method, monkeypatch, template, count):
    monkeypatch.setitem(method, "TEMPLATE", template)
    with pytest.raises(ValueError, match=rf"must have 1 placeholder <image>, toy 0 has {count}"):
        method["encode"](method["toy_processor"], method["toys"])


def test_image_tokens_and_features_must_agree(method, monkeypatch):
    batch = method["encode"](method["toy_processor"], method["toys"])
    short = [replace(q, flags=q.flags[:3]) for q in batch.questions]
    with pytest.raises(ValueError, match="toy 0: 4 image tokens in a run, 3 features"):
        method["locate"](method["toy_processor"], replace(batch, questions=short), 0)
    ids = batch.inputs["input_ids"].clone()
    ids[ids == method["toy_processor"].image_token_id] = 4
    ids[:, 1] = method["toy_processor"].image_token_id
    with pytest.raises(ValueError, match=r"tokens: 3, features: \d+"):
        method["toy"](**batch.inputs | {"input_ids": ids})


def test_a_question_that_is_not_behind_the_image_is_named(method):
    batch = method["encode"](method["toy_processor"], method["toys"])
    lost = [replace(q, text="the square ?") for q in batch.questions]
    with pytest.raises(
        ValueError, match=r"question toy 0: 'the square \?' is not in the text .*the ring red"
    ):
        method["locate"](method["toy_processor"], replace(batch, questions=lost), 0)


@pytest.mark.parametrize("box", [(0, 0, 0, 4), (12, 0, 8, 4), (-1, 0, 3, 3)])
def test_bad_boxes_are_skipped_and_counted(method, box):
    good, bad = method["toys"][0], replace(method["toys"][0], boxes=[box])
    kept = list(method["with_flags"](method["toy_processor"], [good] * 19 + [bad] * 2))
    assert len(kept) == 19
    with pytest.raises(ValueError, match=r"3 of 20 questions have no usable box, at most 10 %"):
        list(method["with_flags"](method["toy_processor"], [good] * 17 + [bad] * 3))


def test_an_object_that_is_cropped_away_leaves_no_patch(method):
    wide = replace(method["toys"][0], image=Image.new("RGB", (48, 16)), boxes=[(0, 0, 10, 16)])
    with pytest.raises(method["BadBox"], match="no patch is left of the object"):
        method["patch_flags"](method["toy_processor"], wide)


def test_attention_that_ignores_masks_is_refused(method):
    model = method["new_model"](1)
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"'flash_attention_2' ignores masks per query: load .* eager or sdpa"
    ):
        method["base_run"](model, method["toy_batch"])


@pytest.mark.parametrize("width", [0, 5])
def test_windows_that_do_not_fit_the_model_are_refused(method, width):
    blocked = method["edges_of"](method["toy_batch"], "Image->Last")
    with pytest.raises(ValueError, match=rf"a window must be 1\.\.4 layers of this model; got {width}"):
        method["cut"](method["toy_base"], blocked, width)


def test_a_model_that_is_never_right_leaves_nothing_to_follow(method):
    wrong = [replace(q, answer="nothing") for q in method["toys"]]
    batch = replace(method["toy_batch"], questions=wrong)
    monkey = {"MAX_NEW": 1, "processor": method["toy_processor"]}
    with pytest.raises(ValueError, match="at least 2 questions must be answered correctly; 0 of 3 are"):
        exec_with(method, monkey, lambda: method["follow"](method["toy"], [batch], []))


def exec_with(space, values, call):
    before = {name: space.get(name) for name in values}
    space.update(values)
    try:
        return call()
    finally:
        space.update(before)


def test_a_loss_that_is_not_finite_names_the_seed_and_the_step(method):
    broken = method["new_model"](7)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="seed 7: the loss of step 0 is nan"):
        method["train"](broken, 7)


# The method, done again by hand ----------------------------------------------------------------------------


@torch.no_grad()
def probabilities_by_hand(model, embeds, blocked_by_layer):
    """The language model in a loop: eager attention with additive -inf, embeds [B, T, D] -> [B, V]."""
    decoder, (_, T, D) = model.get_decoder(), embeds.shape
    heads, h = decoder.config.num_attention_heads, embeds
    cos, sin = decoder.rotary_emb(h, torch.arange(T)[None])

    def turn(x):
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]

    for index, layer in enumerate(decoder.layers):
        x, a = layer.input_layernorm(h), layer.self_attn
        q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        scores = turn(q) @ turn(k).mT / math.sqrt(D / heads)
        scores += torch.full((T, T), -math.inf).triu(1)
        if index in blocked_by_layer:
            scores = scores.masked_fill(blocked_by_layer[index][:, None], -math.inf)
        h = h + a.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.lm_head(decoder.norm(h[:, -1])).softmax(-1)


@pytest.mark.parametrize("width", [1, 2, 3, "all"])
@pytest.mark.parametrize("flow", [*SIX, "Random edges", "All->Last", "Object->Last", "True option->Last"])
def test_a_cut_is_its_definition(method, flow, width):
    base, batch, L = method["toy_base"], method["toy_batch"], 4
    blocked = method["edges_of"](batch, flow, seed=3)
    found, kept = method["cut"](base, blocked, width)
    assert found.shape == kept.shape == (3, 1 if width == "all" else L)
    assert not blocked.triu(1).any()
    untouched = probabilities_by_hand(base.model, base.embeds, {}).max(-1)
    torch.testing.assert_close(untouched.values, base.p1, rtol=1e-5, atol=1e-7)
    for centre in range(found.shape[1]):
        if width == "all":
            layers = range(L)
        else:  # max(0, l - floor(k/2)) .. min(L, l + ceil(k/2)) - 1
            layers = [x for x in range(L) if centre - width // 2 <= x < centre + math.ceil(width / 2)]
        p = probabilities_by_hand(base.model, base.embeds, dict.fromkeys(layers, blocked))
        torch.testing.assert_close(found[:, centre], p[range(3), base.y], rtol=1e-4, atol=1e-6)
        assert kept[:, centre].tolist() == (p.argmax(-1) == base.y).tolist()


def test_groups_are_those_of_the_prompt(method):
    groups = {name: mask[0].nonzero()[:, 0].tolist() for name, mask in method["toy_batch"].groups.items()}
    # <begin> image image image image the ring red or blue ? <answer>
    assert groups["Image"] == [1, 2, 3, 4]
    assert groups["Question"] == [5, 6, 7, 8, 9, 10]
    assert (groups["Object"], groups["True option"], groups["False option"]) == ([6], [7], [9])
    assert groups["Question without options"] == [5, 6, 8, 10]
    assert (groups["Last"], groups["All"]) == ([11], list(range(1, 12)))
    assert groups["Behind"] == [5, 6, 7, 8, 9, 10, 11]
    assert (groups["Related"], groups["Other"]) == ([1], [2, 3, 4])
    assert len(groups["Random"]) == 1
    assert sorted(groups["Random"] + groups["Rest"]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("flow", "targets", "sources"),
    [
        ("Question->Last", [11], range(5, 11)),
        ("Image->Last", [11], range(1, 5)),
        ("Last->Last", [11], [11]),
        ("Image->Question", range(5, 11), range(1, 5)),
        ("Related->Question", range(5, 11), [1]),
        ("Other->Question", range(5, 11), [2, 3, 4]),
        ("All->Last", [11], range(1, 12)),
        ("Image->Behind", range(5, 12), range(1, 5)),
        ("Object->Question", range(6, 11), [6]),  # a word in front of the object cannot see it anyway
    ],
)
def test_a_flow_is_the_edges_from_its_targets_to_its_sources(method, flow, targets, sources):
    # <begin> image image image image the ring red or blue ? <answer>: the ring is in the first quadrant
    found = method["edges_of"](method["toy_batch"], flow)[0].nonzero().tolist()
    assert found == [[target, source] for target in targets for source in sources]


def test_random_patches_are_not_the_related_ones(method):
    locate, processor = method["locate"], method["toy_processor"]
    batch = method["encode"](processor, method["toys"])
    groups = [locate(processor, batch, seed).groups for seed in range(30)]
    hits = torch.stack([g["Random"] & g["Related"] for g in groups]).sum((1, 2)).double()
    assert hits.mean() == pytest.approx(3 / 4, abs=0.4)  # three pictures, one patch of four each
    assert all(torch.equal(g["Random"].sum(1), g["Related"].sum(1)) for g in groups)


def test_edges_closed_in_training_carry_no_gradient(method, monkeypatch):
    parameters = type(method["P"])(method["P"].as_dict() | {"train_steps": 1}, None)
    monkeypatch.setitem(method, "P", parameters)
    blind = method["edges_of"](method["toy_batch"], "Image->Behind")[0]
    short = [i for i in range(12) if i not in (6, 7, 8)]  # a prompt about a place: <begin> <image> the ... ?
    for closed in (None, blind[short][:, short]):
        model = method["new_model"](0)
        before = model.model.multi_modal_projector.linear_1.weight.clone()
        after = method["train"](model, 0, closed).model.multi_modal_projector.linear_1.weight
        only_decayed = torch.allclose(after, before * (1 - method["RATE"] * 0.01), rtol=1e-6, atol=0)
        assert only_decayed == (closed is not None)


def test_random_edges_are_as_many_and_leave_every_position_itself(method):
    blocked = method["edges_of"](method["toy_batch"], "Random edges", seed=5)
    assert blocked.sum((1, 2)).tolist() == [6, 6, 6]
    assert not blocked.diagonal(dim1=1, dim2=2).any()
    assert not torch.equal(blocked[0], blocked[1])


@pytest.mark.parametrize("patch", [4, 8])
def test_related_patches_are_those_that_the_box_touches(method, monkeypatch, patch):
    processor = method["small_processor"]()
    processor.patch_size = patch
    rng = np.random.default_rng(patch)
    for _ in range(20):
        x, y = rng.integers(0, 15, 2)
        w, h = rng.integers(1, 17 - x), rng.integers(1, 17 - y)
        painted = np.zeros((16, 16), bool)
        painted[y : y + h, x : x + w] = True
        expected = [
            painted[i : i + patch, j : j + patch].any()
            for i in range(0, 16, patch)
            for j in range(0, 16, patch)
        ]
        q = replace(method["toys"][0], boxes=[(int(x), int(y), int(w), int(h))])
        assert method["patch_flags"](processor, q).bool().tolist() == expected


def test_drawn_questions_say_what_the_picture_shows(method):
    names, rgb = list(method["COLOURS"]), method["RGB"].numpy()
    for task in ("place", "shape", "choice", "tint"):
        pixels, questions = method["draw_questions"](
            task, 40, torch.Generator().manual_seed(1), pictures=True
        )
        for q, x in zip(questions, pixels.permute(0, 2, 3, 1).numpy(), strict=True):
            assert np.abs(np.asarray(q.image) / 255 - x).max() < 0.01
            seen, grounds = {}, []
            for place, (i, j) in zip(method["PLACES"], [(0, 0), (0, 8), (8, 0), (8, 8)], strict=True):
                part = x[i : i + 8, j : j + 8]
                is_object = np.ptp(part, axis=-1) > 0.45  # coloured, not grey
                shape = min(method["SHAPES"], key=lambda s: (is_object != pattern(method, s)).sum())
                colour = names[np.abs(part[is_object].mean(0) - rgb).sum(-1).argmin()]
                seen[place] = seen[shape] = (colour, (j, i, 8, 8))
                grounds.append(part[~is_object].mean())
            assert len(seen) == 8  # four places, four different shapes
            word = q.text.split()[1]
            if task == "tint":
                assert q.answer == ("light" if np.mean(grounds) > 0.5 else "dark")
                assert q.false != q.answer
                continue
            assert (q.answer, q.boxes[0]) == seen[word]
            assert q.false != q.answer
            if len({colour for colour, _ in seen.values()}) > 1:
                assert q.false in {colour for colour, _ in seen.values()}
            if task == "choice":
                assert {q.answer, q.false} == {q.text.split()[2], q.text.split()[4]}


def pattern(method, shape):
    return method["PATTERNS"][list(method["SHAPES"]).index(shape)].numpy().astype(bool)


def test_the_lens_reads_the_states_without_the_norm_but_for_the_last(method):
    base = method["toy_base"]
    found = method["lens"](base, base.y)
    assert found.shape == (3, 5)
    torch.testing.assert_close(found[:, -1], 100 * base.p1, rtol=1e-4, atol=1e-4)
    E = base.model.lm_head.weight
    first = torch.softmax(base.embeds[:, -1] @ E.T, -1)[range(3), base.y]
    torch.testing.assert_close(found[:, 0], 100 * first, rtol=1e-4, atol=1e-4)
    assert method["first_tokens"](method["toy_processor"], ["red", "Red"]) is None
    assert method["first_tokens"](method["toy_processor"], ["red", "blue"]).tolist() == [
        method["WORDS"].index("red"),
        method["WORDS"].index("blue"),
    ]


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_zeroed_outputs_are_left_out_of_the_stream(method, part):
    base, model = method["toy_base"], method["toy"]
    found = method["zeroed"](base, part, 4)[:, 2]  # four layers around layer 2 are all
    keep = ~base.batch.groups["Question"][..., None]
    h = base.embeds
    decoder, T = model.get_decoder(), base.embeds.shape[1]
    angles = decoder.rotary_emb(h, torch.arange(T)[None])
    mask = torch.full((T, T), -math.inf).triu(1)[None, None]
    with torch.no_grad():
        for layer in decoder.layers:
            a = layer.self_attn(layer.input_layernorm(h), attention_mask=mask, position_embeddings=angles)[0]
            h = h + (a * keep if part == "attention" else a)
            m = layer.mlp(layer.post_attention_layernorm(h))
            h = h + (m * keep if part == "mlp" else m)
        p = model.lm_head(decoder.norm(h[:, -1])).softmax(-1)
    torch.testing.assert_close(found, p[range(3), base.y], rtol=1e-4, atol=1e-6)
    assert (found - base.p1).abs().max() > 1e-4


def test_statistics_of_known_curves(method):
    two = np.array([[-10.0, 0, -30, 0], [5, 5, 5, 5]])
    assert method["drop"](two).tolist() == [-30, 0]
    assert method["centroid"](two)[0] == pytest.approx((0 * 10 + 2 * 30) / 40)
    assert np.isnan(method["centroid"](two)[1])
    early, late = np.array([[-50.0, 0, 0]]), np.array([[0.0, 0, -50]])
    assert method["later"](late, early).tolist() == [2]
    assert method["later"](late, np.zeros((1, 3))).tolist() == [0]
    assert method["ratio"](np.array([-20.0, 0]), np.array([-80.0, -1])) == pytest.approx(0.25)
    assert method["ratio"](np.array([-0.5]), np.array([-0.1])) == pytest.approx(0.5)
    assert method["per_edge"](np.array([-30.0, 0]), 3) == pytest.approx(10)
    assert method["per_edge"](np.array([-0.03, 0]), 3) == pytest.approx(0.1)
    dips = method["two_dips"]
    assert dips(-np.array([9.0, 6, 9]))
    assert not dips(-np.array([9.0, 6.1, 9]))
    assert not dips(-np.array([0.9, 0, 0.9]))


# Verdicts --------------------------------------------------------------------------------------------------


def test_the_small_model_learns_and_needs_its_picture(learned):
    assert learned["able"]
    assert learned["results"][0]["place", "trained"].accuracy >= 0.9
    assert learned["done"][0][1]["swapped picture"] < 65
    assert learned["done"][0][1]["shuffled question"] < 65


def test_knockout_finds_the_ways_that_were_planted(learned):
    drops = {
        name: {key: learned["drop"](c.mean(0)) for key, c in learned["done"][name].curves.items()}
        for name in learned["PLANTED"]
    }
    by_question, direct = drops["by way of the question"], drops["directly"]
    assert by_question["Image->Question", "all"] < -30
    assert abs(by_question["Image->Last", 3]) < 1e-3
    assert direct["Image->Last", "all"] < -30
    assert abs(direct["Image->Question", "all"]) < 1e-3


def test_a_knockout_that_masks_nothing_costs_the_verdict(learned, monkeypatch):
    def nothing(model, masks):
        return contextlib.nullcontext()

    cuts, model = learned["CUTS"], learned["done"][0][2]
    broken = {}
    with monkeypatch.context() as patch:
        patch.setitem(learned, "knockout", nothing)
        for task in ("place", "tint"):
            broken[task, "trained"] = learned["follow"](model, learned["encoded"](task), cuts[task])
            broken[task, "untrained"] = learned["results"][0][task, "untrained"]
    assert max(np.abs(c).max() for c in broken["place", "trained"].curves.values()) < 1e-2
    honest = learned["results"][0]["place", "trained"].curves
    assert np.abs(honest["Question->Last", 3]).max() > 10
    got = verdicts_with(learned, monkeypatch, {0: broken})
    assert {got[claim] for claim in ("X1", "X2", "X4", "X5", "X6", "X8")} <= {
        "not reproduced",
        "direction only",
    }
    assert got["X1"] == "not reproduced"


WORLD = {  # (task, flow) -> (depth, layer) in a world in which the paper holds
    ("place", "Question->Last"): (-80, 4), ("place", "Image->Last"): (-5, 4),
    ("place", "Last->Last"): (-0.5, 4), ("place", "Image->Question"): (-60, 2),
    ("place", "Related->Question"): (-55, 2),
    ("place", "Other->Question"): (-3, 2), ("place", "All->Last"): (-90, 4),
    ("place", "Random->Question"): (-14, 2), ("place", "Rest->Question"): (-42, 2),
    ("tint", "Question->Last"): (-80, 4), ("tint", "Image->Last"): (-5, 4), ("tint", "Last->Last"): (-0.5, 4),
    ("tint", "Image->Question"): (-60, 0), ("tint", "Related->Question"): (-15, 0),
    ("tint", "Other->Question"): (-45, 0), ("untrained", "Question->Last"): (-2, 1),
    ("untrained", "Image->Last"): (-2, 1),
}  # fmt: skip


def world(space, changes, n_seeds=3, n=24):
    """Results of seeds as the chapter holds them; a change may name one seed: (task, flow, seed)."""
    rng, results = np.random.default_rng(0), {}
    for seed in range(n_seeds):
        results[seed] = {}
        for task in ("place", "tint", "untrained"):
            found = space["Followed"](accuracy=1.0)
            for (where, flow), given in WORLD.items():
                if where != task:
                    continue
                depth, layer = changes.get((task, flow, seed), changes.get((task, flow), given))
                curve = rng.normal(0, 0.01, (n, 6))
                curve[:, layer] += depth
                found.curves[flow, 3] = curve
                found.sources[flow] = np.full(n, 3 if flow[:5] in ("Other", "Rest-") else 1)
            results[seed][task, "trained"] = found
        blank = results[seed].pop(("untrained", "trained"))
        results[seed] |= {(task, "untrained"): blank for task in ("place", "tint")}
    return results


def verdicts_with(space, monkeypatch, results):
    """The chapter's own cells from the ledger on, over these results."""
    changes = {"results": results, "USED": list(results), "SEEDS": list(results), "able": True}
    with monkeypatch.context() as patch:
        for name, value in changes.items():
            patch.setitem(space, name, value)
        return verdicts_in(space, CHAPTER)


def test_flows_named_twice_are_followed_once(run_cells):
    six = run_cells(CHAPTER, before="cross-modal-flow-08", scale="smoke")["SIX"]
    space = run_cells(CHAPTER, before="jobs", scale="smoke", flows=[*six, six[0], "All->Last"])
    for cuts in space["CUTS"].values():
        assert len(cuts) == len(set(cuts))
        assert {flow for flow, _ in cuts} >= {*six, "All->Last"}


def test_a_world_in_which_the_paper_holds_is_called_so(learned, monkeypatch):
    got = verdicts_with(learned, monkeypatch, world(learned, {}))
    assert {claim for claim, verdict in got.items() if verdict == "reproduced"} == {
        "X1", "X2", "X3", "X4", "X5", "X6", "X8"
    }  # fmt: skip
    assert got["X7"] == "untested"


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("X1", {("place", "Question->Last", 1): (-45, 4)}),  # one seed falls short
        ("X1", {("untrained", "Question->Last"): (-55, 1)}),  # the untrained model drops as far
        ("X2", {("place", "Image->Last", 2): (-40, 4)}),  # one seed reads the picture directly
        ("X2", {("place", "All->Last"): (-10, 4)}),  # cutting everything costs nothing either
        ("X3", {("place", "Last->Last", 0): (-12, 4)}),
        ("X3", {("place", "Last->Last", 0): (+12, 4)}),
        ("X4", {("tint", "Image->Question"): (-60, 2)}),  # both steps in one layer
        ("X4", {("place", "Image->Question"): (-20, 2)}),
        ("X5", {("place", "Other->Question"): (-150, 2)}),
        ("X5", {("place", "Random->Question"): (-55, 2)}),  # random patches do what the related ones do
        ("X5", {("tint", "Related->Question"): (-45, 0)}),
        ("X5", {("tint", "Image->Question"): (-4, 0)}),  # no general step at all
        ("X6", {("place", "Question->Last"): (-80, 2)}),
        ("X6", {("place", "Image->Question"): (-0.5, 2)}),  # a curve without a drop has no place
        ("X8", {("tint", "Question->Last", 1): (-45, 4)}),
        ("X8", {("untrained", "Question->Last"): (-60, 1)}),
    ],
)
def test_a_broken_world_costs_the_verdict(learned, monkeypatch, claim, changes):
    assert verdicts_with(learned, monkeypatch, world(learned, changes))[claim] != "reproduced"


def test_two_runs_with_one_seed_agree_and_models_that_guess_are_not_judged(run_cells):
    few = {"scale": "smoke", "layers": 2, "windows": [1]}
    one, two = (run_cells(CHAPTER, seed=3, **few)["ledger"].payload() for _ in range(2))
    assert one == two
    assert {row["verdict"] for row in one["claims"]} == {"untested"}
    assert "the models did not learn: 0 of 1 seeds" in one["claims"][0]["reason"]


def test_choices_and_questions_of_several_lengths_run_through(run_cells):
    space = run_cells(
        CHAPTER, scale="smoke", layers=2, windows=[1], tasks=["choice", "shape", "tint"],
        flows=[*SIX, "True option->Last", "False option->Last", "Question without options->Last"],
        patch_size=4,
    )  # fmt: skip
    found = space["results"][0]["choice", "trained"]
    assert found.sources["True option->Last"].max() == 1
    assert found.sources["Question without options->Last"].max() == 4
    assert found.sources["Related->Question"].max() == 4  # a quadrant has four patches of 4 pixels
    assert set(space["done"]) == {0}  # no planted models: they have one length


# The paper-scale path --------------------------------------------------------------------------------------

PROMPT = "USER: <image>\n{question} \nAnswer the question using a single word or phrase. ASSISTANT:"
ASKED = ["Is the jar full or empty?", "Is that floor brown or white?", "Is the kite blue or red?"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def byte_tokenizer():
    core = Tokenizer(token_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )  # fmt: skip
    core.train_from_iterator([PROMPT, *ASKED], trainer)
    from tokenizers import decoders

    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def tiny(request, tmp_path_factory):
    """A folder with a tiny checkpoint, its processor, pictures, and CSV files with the model's answers."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer, side = byte_tokenizer(), {"height": 16, "width": 16}
    vision = CLIPVisionConfig(**SIZES, num_hidden_layers=2, image_size=16, patch_size=4)
    text = LlamaConfig(
        **SIZES, num_hidden_layers=3, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1
    )
    common = {"vision_config": vision, "text_config": text, "image_token_index": len(tokenizer) - 1,
              "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}  # fmt: skip
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    torch.manual_seed(0)
    if request.param == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**common, image_seq_length=16))
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)
        processor = LlavaProcessor(images, tokenizer, **options)
    else:
        grid = [[16, 32], [32, 16], [32, 32]]
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**common, image_grid_pinpoints=grid))
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=side, image_grid_pinpoints=grid
        )
        processor = LlavaNextProcessor(images, tokenizer, **options)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = list(range(1, 250))  # most tokens end an answer: answers are short
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "images").mkdir()
    write_questions(folder, model, processor)
    return folder, request.param


def write_questions(folder, model, processor):
    rng, rows = np.random.default_rng(0), []
    for k in range(6):
        shape = [(40, 30), (30, 40), (33, 31)][k % 3]
        picture = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
        picture.save(folder / "images" / f"{k}.jpg")
        question = ASKED[k % 3]
        true, false = question.rstrip("?").split(" or ")
        prompt = PROMPT.replace("{question}", question)
        with Image.open(folder / "images" / f"{k}.jpg") as image:
            inputs = processor(images=image.convert("RGB"), text=prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=128, do_sample=False, pad_token_id=1)
        said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        box = dict(zip("xywh", (8, 8, 9, 7), strict=True))
        rows.append(
            {"question_id": f"0{k}", "img_id": k, "question": question, "answer": said.strip().lower(),
             "true option": true.split()[-1], "false option": false,
             "central object name": question.split()[2]}
            | {f"central object {c}": v for c, v in box.items()}
            | {f"object1 {c}": v for c, v in box.items()} | {f"object2 {c}": "-" for c in "xywh"}
        )  # fmt: skip
    rows[5]["answer"] = "something that no model says"
    for task in ("ChooseAttr", "CompareAttr"):
        with (folder / f"GQA_val_{task}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


def test_paper_scale_runs_on_local_checkpoints_through_the_same_cells(run_cells, tiny):
    folder, kind = tiny
    space = run_cells(
        CHAPTER, scale="paper", device="cpu", dtype="float32", model=str(folder), dataset=str(folder),
        image_dir=str(folder / "images"), tasks=["ChooseAttr", "CompareAttr"], windows=[3, 1],
        flows=[*SIX, "True option->Last", "Object->Last"],
    )  # fmt: skip
    found = space["results"][0]["ChooseAttr", "trained"]
    assert found.accuracy == pytest.approx(5 / 6)
    assert found.curves["Image->Question", 3].shape == (5, 3)
    followed = [
        f"{word}{form}" for word in ("the answer", "a false answer") for form in ("", ", capitalised")
    ]
    assert {name: value.shape for name, value in found.words.items()} == dict.fromkeys(followed, (5, 4))
    assert {row["claim"]: row["verdict"] for row in space["ledger"].rows()}["X4"] == "untested"
    q = space["questions"]["ChooseAttr"][0]
    assert set(q.flags.tolist()) == ({0, 1} if kind == "llava" else {-1, 0, 1})
    if kind == "llava_next":  # the base tile first, then a newline behind each row of the grid
        assert not (q.flags[:16] == -1).any()
        assert q.flags[16:].tolist().count(-1) == 8
    batch = next(iter(space["batches"]([q])))
    group = batch.groups["Question"][0]
    said = space["processor"].tokenizer.decode(batch.inputs["input_ids"][0, group])
    assert said.strip() == q.text
    assert int(batch.groups["Image"].sum()) == len(q.flags)


@pytest.mark.parametrize("tiny", ["llava"], indirect=True)
def test_paper_scale_names_what_is_missing(run_cells, tiny, tmp_path):
    folder, _ = tiny
    given = {"scale": "paper", "device": "cpu", "model": str(folder), "image_dir": str(folder / "images")}
    with pytest.raises(ValueError, match=r"dataset must hold a file \*_QueryAttr.csv"):
        run_cells(CHAPTER, before="jobs", dataset=str(folder), tasks=["QueryAttr"], **given)
    (tmp_path / "x_ChooseAttr.csv").write_text("question_id,img_id,question,answer\n")
    with pytest.raises(ValueError, match="has no column central object h, central object w"):
        run_cells(CHAPTER, before="jobs", dataset=str(tmp_path), tasks=["ChooseAttr"], **given)
    with pytest.raises(ParameterError, match=r"windows must be at most the 3 layers of the model; got \[9\]"):
        run_cells(CHAPTER, before="jobs", dataset=str(folder), tasks=["ChooseAttr"], **given)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"model must be of the kinds llava, llava_next; .* is of 'llama'"):
        run_cells(
            CHAPTER, before="jobs", dataset=str(folder), tasks=["ChooseAttr"], **given | {"model": str(other)}
        )
