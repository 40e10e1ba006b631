"""Checkpoints, tokenizers and data rows, by hub id or by local folder.

An id may carry a revision (`owner/name@revision`), so that a run says exactly what it used.  Weights are
read from safetensors only; code that a checkpoint brings along runs only if the caller asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_ROW_FILES = (".jsonl", ".parquet")


class HubError(ValueError):
    """A checkpoint or data set that cannot be used; the message says which, and what would be needed."""


def resolve_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device; refuse a GPU that is not there."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if n_gpus else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(index or 0) >= n_gpus:
        raise ValueError(f"device must be one that this machine has ({n_gpus} CUDA devices), got {name!r}")
    return torch.device(name)


def resolve_dtype(name: str) -> torch.dtype:
    """Turn the name of a floating point type into the torch dtype."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def split_revision(id_or_path: str) -> tuple[str, str | None]:
    """Split `owner/name@revision`; an existing folder or file is taken as it is."""
    if not id_or_path:
        raise HubError("model or dataset is empty: give a hub id (owner/name[@revision]) or a local folder")
    if Path(id_or_path).exists():
        return id_or_path, None
    name, _, revision = id_or_path.partition("@")
    if id_or_path.startswith((".", "/", "~")) or name.count("/") > 1:
        raise HubError(f"{id_or_path!r} looks like a local path, and there is nothing at that place")
    return name, revision or None


def load_model(
    cls: Any,
    id_or_path: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> torch.nn.Module:
    """Load `cls.from_pretrained` in eval mode without gradients, from safetensors only.

    `cls` is a model class or an auto class of transformers.  `options` go to `from_pretrained` (for instance
    `attn_implementation`).  Raises HubError with the reason when the checkpoint cannot be loaded.
    """
    name, revision = split_revision(id_or_path)
    if Path(name).is_dir():
        _check_local_checkpoint(Path(name))
    dtype = resolve_dtype(dtype) if isinstance(dtype, str) else dtype
    try:
        model = cls.from_pretrained(
            name, revision=revision or "main", dtype=dtype, use_safetensors=True,
            trust_remote_code=trust_remote_code, **options,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise HubError(f"model {id_or_path!r} cannot be loaded: {_first_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(id_or_path: str, *, trust_remote_code: bool = False, **options: Any):
    """Load the fast tokenizer of a checkpoint.  Raises HubError with the reason when it cannot."""
    from transformers import AutoTokenizer

    name, revision = split_revision(id_or_path)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision or "main", use_fast=True, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise HubError(f"the tokenizer of {id_or_path!r} cannot be loaded: {_first_line(error)}") from error


def load_rows(
    dataset: str,
    split: str,
    *,
    columns: Iterable[str] = (),
    config: str | None = None,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split as dictionaries: at most `limit` of them, each with all of `columns`.

    `dataset` is a local `.jsonl` or `.parquet` file, a local folder that holds `SPLIT.jsonl` or
    `SPLIT.parquet`, or a hub id, which is streamed.  Loading scripts are not executed.  Raises HubError when
    the split or a column does not exist.
    """
    path = Path(dataset)
    rows = _local_rows(path, split) if path.exists() else _hub_rows(dataset, split, config)
    for n_rows, row in enumerate(rows):
        if limit is not None and n_rows >= limit:
            return
        missing = sorted(set(columns) - set(row))
        if missing:
            raise HubError(
                f"dataset {dataset!r} has no column {', '.join(missing)}; it has {', '.join(sorted(row))}"
            )
        yield row


def _local_rows(path: Path, split: str) -> Iterator[dict[str, Any]]:
    if path.is_dir():
        files = [path / f"{split}{suffix}" for suffix in _ROW_FILES]
        found = [file for file in files if file.is_file()]
        if not found:
            held = ", ".join(sorted(p.stem for p in path.iterdir() if p.suffix in _ROW_FILES)) or "none"
            raise HubError(f"split must be one that {str(path)!r} holds ({held}), got {split!r}")
        path = found[0]
    if path.suffix not in _ROW_FILES:
        raise HubError(
            f"dataset must be a {' or '.join(_ROW_FILES)} file, a folder of them or a hub id, got {path}"
        )
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise HubError(f"{path} line {number} is no JSON: {error}") from error


def _hub_rows(dataset: str, split: str, config: str | None) -> Iterator[dict[str, Any]]:
    import datasets

    name, revision = split_revision(dataset)
    try:
        yield from datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: "Dataset scripts are no longer supported"
        raise HubError(
            f"dataset {dataset!r}, split {split!r} cannot be loaded: {_first_line(error)}"
        ) from error


def _check_local_checkpoint(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise HubError(f"model must be a folder that transformers saved; {str(folder)!r} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise HubError(
            f"model must hold its weights as safetensors, {str(folder)!r} does not: "
            "convert it with save_pretrained (pickled weights can run code, so they are not read)"
        )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
