"""Checkpoints and rows load from local folders, and everything that cannot be used is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tokenbook import hub


@pytest.fixture
def checkpoint(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_local_checkpoint_loads_frozen_in_eval_mode_and_dtype(checkpoint):
    model = hub.load_model(AutoModelForCausalLM, str(checkpoint), "cpu", "bfloat16")
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_pickled_weights_are_not_read(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(hub.HubError, match="weights as safetensors"):
        hub.load_model(AutoModelForCausalLM, str(checkpoint))


def test_code_in_a_checkpoint_is_not_executed(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {
        "model_type": "own-kind",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "evil.py").write_text("raise SystemExit('code was executed')")
    with pytest.raises(hub.HubError, match="cannot be loaded"):
        hub.load_model(AutoModelForCausalLM, str(checkpoint))


@pytest.mark.parametrize(("model", "message"), [
    ("", "is empty"), ("./nowhere", "nothing at that place"), ("a/b/c", "nothing at that place"),
])  # fmt: skip
def test_models_that_are_not_there_are_refused(model, message):
    with pytest.raises(hub.HubError, match=message):
        hub.load_model(AutoModelForCausalLM, model)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(hub.HubError, match=r"has no config\.json"):
        hub.load_model(AutoModelForCausalLM, str(tmp_path))


def test_revision_reaches_the_loader():
    seen = {}

    class Recorder:
        @staticmethod
        def from_pretrained(name, **options):
            seen.update(options, name=name)
            return torch.nn.Linear(1, 1)

    hub.load_model(Recorder, "owner/name@abc123")
    assert (seen["name"], seen["revision"]) == ("owner/name", "abc123")
    assert seen["use_safetensors"] is True
    assert seen["trust_remote_code"] is False


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert hub.split_revision(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "cuda:99", ""])
def test_unknown_devices_are_refused_with_the_value(name):
    with pytest.raises(ValueError, match=f"device must be .*got '{name}'"):
        hub.resolve_device(name)


def test_auto_takes_what_is_there():
    assert hub.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*got 'fp8'"):
        hub.resolve_dtype("fp8")


ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}, {"a": 3, "b": "z"}]


@pytest.fixture(params=["jsonl", "parquet"])
def rows_folder(request, tmp_path):
    if request.param == "jsonl":
        (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    return tmp_path


def test_rows_come_from_a_folder_or_its_file_up_to_the_limit(rows_folder):
    assert list(hub.load_rows(str(rows_folder), "train", columns=["a"])) == ROWS
    file = next(rows_folder.iterdir())
    assert list(hub.load_rows(str(file), "train", limit=2)) == ROWS[:2]


def test_missing_split_and_column_are_named(rows_folder):
    with pytest.raises(hub.HubError, match=r"split must be one that .* holds \(train\), got 'test'"):
        list(hub.load_rows(str(rows_folder), "test"))
    with pytest.raises(hub.HubError, match="has no column c; it has a, b"):
        list(hub.load_rows(str(rows_folder), "train", columns=["a", "c"]))


def test_a_broken_line_is_named_by_number(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(hub.HubError, match="line 2 is no JSON"):
        list(hub.load_rows(str(tmp_path), "train"))


def test_hub_rows_are_streamed_at_the_revision_and_errors_are_named(monkeypatch):
    seen = {}

    def load_dataset(name, config, **options):
        seen.update(options, name=name, config=config)
        if options["split"] == "script":
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py\nmore")
        return iter(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(hub.load_rows("owner/data@v1", "train", limit=2)) == ROWS[:2]
    assert seen == {
        "name": "owner/data",
        "config": None,
        "split": "train",
        "revision": "v1",
        "streaming": True,
    }
    with pytest.raises(hub.HubError, match=r"scripts are no longer supported, but found x\.py$"):
        list(hub.load_rows("owner/data", "script"))
