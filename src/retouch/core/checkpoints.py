"""Files without pickle: nested states as one safetensors file, models as folders, all of them written at once or not.

A state is any nesting of dicts, lists and tuples over tensors, numbers, strings, booleans and None, such as the
state_dict of an optimizer. Its tensors go into the file's body, its structure as JSON into the file's header.
"""

import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.errors import InputError

FORMAT = "retouch.state/1"
PLAIN_CONFIG = "retouch.json"  # beside model.safetensors of a model that is not from transformers


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write to the given temporary name beside `path`; it becomes `path` if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{next(tempfile._get_candidate_names())}")  # type: ignore[attr-defined]
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill the given temporary folder beside `path`; it becomes `path` if the block ends without an error.

    Raises:
        InputError: if `path` is a file, or a folder with something in it.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"The output folder {path} is in use, but must be new or empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_state(path: str | Path, state: Any) -> None:
    """Write a nested state; the file is there whole or not at all."""
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, Tensor):
            # Tied weights share memory: they are written once, and read back as one tensor.
            identity = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if value.numel() == 0 or identity not in seen:
                seen[identity] = str(len(tensors))
                tensors[seen[identity]] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": seen[identity]}
        if isinstance(value, Mapping):
            return {"dict": [[encode(key), encode(child)] for key, child in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [encode(child) for child in value]}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise InputError(f"A state holds a {type(value).__name__}, but may hold only tensors, numbers and text")

    structure = json.dumps(encode(state))
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "structure": structure})


def load_state(path: str | Path) -> Any:
    """Read a state that `save_state` wrote.

    Raises:
        InputError: if the file is missing, truncated, or was written by something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path} is not a checkpoint of retouch: its format is {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise InputError(f"The checkpoint {path} is damaged or not one of ours ({error})") from None

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {decode(key): decode(child) for key, child in content}
        return (list if kind == "list" else tuple)(decode(child) for child in content)

    return decode(json.loads(metadata["structure"]))


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors (a mask, importances, a datamodel) as one safetensors file."""
    with atomic_file(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error})") from None


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a model into a folder: with its own save_pretrained, or as weights beside its class and settings.

    A plain module must have a `config` of JSON values that its class takes as keywords.
    """
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    config = getattr(model, "config", None)
    if not isinstance(config, dict):
        raise InputError(f"{type(model).__name__} cannot be saved: it has neither save_pretrained nor a config mapping")
    folder.mkdir(parents=True, exist_ok=True)
    kind = type(model)
    description = {"class": f"{kind.__module__}:{kind.__qualname__}", "config": config}
    (folder / PLAIN_CONFIG).write_text(json.dumps(description, indent=1) + "\n")
    save_tensors(folder / "model.safetensors", model.state_dict())


def load_model(folder: str | Path) -> nn.Module:
    """Read a model from a folder that `save_model` or transformers' save_pretrained wrote.

    Raises:
        InputError: if the folder is missing, holds no model, or its weights do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no model folder at {folder}")
    try:
        if (folder / PLAIN_CONFIG).exists():
            return _load_plain(folder)
        if (folder / "config.json").exists():
            return _load_transformers(folder)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The model at {folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    raise InputError(f"{folder} holds no model: there is neither config.json (transformers) nor {PLAIN_CONFIG}")


def _load_plain(folder: Path) -> nn.Module:
    description = json.loads((folder / PLAIN_CONFIG).read_text())
    module, _, name = description["class"].partition(":")
    if module.partition(".")[0] != "retouch":
        raise InputError(f"{folder} names the class {description['class']}, but must name one of retouch")
    kind = getattr(importlib.import_module(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):  # a folder must not be able to call functions
        raise InputError(f"{folder} names the class {description['class']}, which is no model")
    with seeds.isolated():
        model: nn.Module = kind(**description["config"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _load_transformers(folder: Path) -> nn.Module:
    import transformers

    architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
    kind = getattr(transformers, architectures[0], None) if len(architectures) == 1 else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(f"{folder}/config.json names the architectures {architectures}, but must name one it knows")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no .safetensors weights: save the model again with a recent transformers")
    with seeds.isolated():
        loaded: Any = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise InputError(f"The weights in {folder} lack {', '.join(sorted(info['missing_keys']))}")
    return model.eval()
