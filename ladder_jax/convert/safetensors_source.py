"""A Hugging Face folder, or a name on the Hub, as a TensorSource."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ladder_jax.addresses import local_path
from ladder_jax.config import ConfigError, short_repr
from ladder_jax.convert.safetensors_file import Place, read_header, read_tensor
from ladder_jax.convert.source import TEXTS, FileState, TensorInfo, state_of
from ladder_jax.data.foreign_files import is_file, read_object
from ladder_jax.data.tokenizer_files import SENTENCEPIECE, texts_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a download from the Hub takes: the weights, and the texts beside them.
DOWNLOAD = ("config.json", INDEX, "*.safetensors", *TEXTS, SENTENCEPIECE)


class SafetensorsSource:
    """A folder with config.json and safetensors files; see source.TensorSource.

    The constructor reads config.json. `tensors` reads the headers of the weights when
    it is first used, so that a config that is not supported is refused before that.

    Args:
      folder: the folder.

    Raises ConfigError, one line, where the folder holds no such checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)
        _require_folder(folder)
        self.config: dict[str, Any] = read_object(folder / "config.json")
        self._text = texts_of(folder)
        self._places: dict[str, tuple[Path, Place]] | None = None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: place.info for name, (_, place) in self._located().items()}

    def read(self, name: str) -> np.ndarray:
        path, place = self._located()[name]
        return read_tensor(path, place)

    def text(self, name: str) -> str | None:
        return self._text(name)

    def files(self) -> list[FileState]:
        paths = {path for path, _ in self._located().values()}
        return [state_of(path) for path in sorted(paths)]

    def _located(self) -> dict[str, tuple[Path, Place]]:
        if self._places is None:
            self._places = _locate(self.folder)
        return self._places


def open_source(where: str | Path) -> SafetensorsSource:
    """Returns the checkpoint in a folder, or of a name on the Hub such as org/model.

    A name that is no folder here is downloaded with the package huggingface_hub, into
    its cache.
    """
    folder = local_path(where, "source")
    if folder.is_dir():
        return SafetensorsSource(folder)
    if folder.is_file():
        raise ConfigError(
            f"{folder} is a file: a Hugging Face folder with config.json is accepted "
            "(a GGUF file: ladder-jax convert from-gguf)"
        )
    parts = str(where).split("/")
    is_name = len(parts) == 2 and all(parts) and not parts[0].startswith((".", "~"))
    if not is_name:
        raise ConfigError(
            f"{str(where)!r} does not exist: it must be a folder with config.json, or "
            "a name on the Hugging Face Hub such as org/model"
        )
    return SafetensorsSource(_download(str(where)))


def _download(name: str) -> Path:
    """The folder of a Hub repository in the cache of huggingface_hub."""
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            f"{name!r} is no folder here, and to download it from the Hugging Face Hub "
            "needs the package huggingface_hub: pip install 'ladder_jax[hf]'"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(DOWNLOAD))
        )
    except Exception as error:  # of the network, of the Hub, of the name
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(
            f"{name!r} is no folder here and cannot be downloaded from the Hugging "
            f"Face Hub: {reason}"
        ) from None


def _require_folder(folder: Path) -> None:
    """Raises ConfigError where a folder is another kind of checkpoint, by its files."""
    if is_file(folder / "config.json"):
        return
    kinds = {
        "adapter_config.json": "a LoRA adapter without its model: merge it into the "
        "model first (merge_and_unload of peft)",
        "consolidated*.pth": "a checkpoint in Meta's format: take the one in Hugging "
        "Face's format",
        "params.json": "a checkpoint of another format: take the one in Hugging Face's",
        "*.gguf": "a folder of GGUF files: name the file, with from-gguf",
        "checkpoints": "a run of this project: no conversion is needed",
    }
    for pattern, kind in kinds.items():
        if next(folder.glob(pattern), None) is not None:
            raise ConfigError(f"{folder} is not accepted: it is {kind}")
    raise ConfigError(f"{folder} is not accepted: it has no config.json")


def _locate(folder: Path) -> dict[str, tuple[Path, Place]]:
    """The file and place of every tensor in a folder."""
    if is_file(folder / INDEX):
        return _locate_sharded(folder)
    if not is_file(folder / SINGLE):
        raise ConfigError(_without_weights(folder))
    path = folder / SINGLE
    return {name: (path, place) for name, place in read_header(path).items()}


def _locate_sharded(folder: Path) -> dict[str, tuple[Path, Place]]:
    """The same, for weights in several files. The index and the files must agree."""
    index = folder / INDEX
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} is not accepted: it has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(
                f"{index} is not accepted: {name} is in {short_repr(file)}, which is "
                "not the name of a file"
            )
    located: dict[str, tuple[Path, Place]] = {}
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if not is_file(path):
            raise ConfigError(f"{path} is missing: {INDEX} names it")
        places = read_header(path)
        named = {name for name, where in weight_map.items() if where == file}
        if lost := sorted(named - places.keys()):
            name = short_repr(lost[0], 200)
            raise ConfigError(f"{index} is wrong: {file} does not hold {name}")
        if extra := sorted(places.keys() - named):
            raise ConfigError(
                f"{index} is wrong: it does not name {extra[0]} of {file}"
            )
        located |= {name: (path, place) for name, place in places.items()}
    return located


def _without_weights(folder: Path) -> str:
    """The message about a folder that has a config and no safetensors weights."""
    if next(folder.glob("pytorch_model*.bin"), None) is not None:
        return (
            f"{folder} is not accepted: its weights are pickles (pytorch_model.bin), "
            "which can run code; save it as safetensors with transformers first"
        )
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} is not accepted: it is a LoRA adapter without its model: merge "
            "it into the model first (merge_and_unload of peft)"
        )
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        return f"{folder} is not accepted: it has {found[0]} and no {INDEX}"
    return f"{folder} is not accepted: it has no {SINGLE} and no {INDEX}"
