"""The exported modeling files: for schedules that no class of transformers has.

A folder with these files loads with `trust_remote_code=True`. They have a model type of
their own, so that no other program takes the model for a Llama.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladder_jax import schedule
from ladder_jax.config import ConfigError, short_repr

MODEL_TYPE = "ladder_llama"
CLASS_NAME = "LadderLlamaForCausalLM"
FILES = ("configuration_ladder_llama.py", "modeling_ladder_llama.py")
FOLDER = Path(__file__).parent / "exported"
AUTO_MAP = {
    "AutoConfig": "configuration_ladder_llama.LadderLlamaConfig",
    "AutoModel": "modeling_ladder_llama.LadderLlamaModel",
    "AutoModelForCausalLM": "modeling_ladder_llama.LadderLlamaForCausalLM",
}


def write_ladder_llama(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Copies the modeling files into a folder. Returns `config` with their names.

    Args:
      folder: an existing folder. config.json is for the caller to write.
      config: the keys of LadderLlamaConfig (exported/configuration_ladder_llama.py).
    """
    for name in FILES:
        shutil.copyfile(FOLDER / name, folder / name)
    return {
        **config,
        "model_type": MODEL_TYPE,
        "architectures": [CLASS_NAME],
        "auto_map": AUTO_MAP,
    }


def schedule_keys(residual: str, layers: int) -> dict[str, Any]:
    """Returns the keys of LadderLlamaConfig for a residual schedule.

    Args:
      residual: in the notation of schedule.py.
      layers: of the model.

    Raises:
      ConfigError: if the schedule depends on the number of tensor shards.
    """
    parsed = schedule.parse(residual, layers)
    blocks = [block for layer in parsed.layers for block in layer]
    if parsed.local or not all(block.reduce for block in blocks):
        raise ConfigError(
            f"model.residual={residual!r} cannot be exported: its outputs depend on "
            "mesh.tensor, and a model for one device has no such axis"
        )
    if len(blocks) == layers:
        return {"delays": None, "parallel": True, "residual": residual}
    delays = [block.delay for block in blocks]
    return {"delays": delays, "parallel": False, "residual": residual}


def residual_of(config: Mapping[str, Any], layers: int) -> str:
    """Returns the residual schedule of a config.json that `schedule_keys` made.

    Raises:
      ConfigError: if its keys contradict each other or are of the wrong kind.
    """
    is_parallel, delays = config.get("parallel", False), config.get("delays")
    if is_parallel is True and not any(delays or ()):
        return "parallel"
    delays = [0] * (2 * layers) if delays is None else delays
    is_list = isinstance(delays, list) and len(delays) == 2 * layers
    if is_parallel or not is_list or not all(type(d) is int and d >= 0 for d in delays):
        raise ConfigError(
            f"delays={short_repr(delays)} is not accepted: it must be a list of "
            f"{2 * layers} whole numbers, two a layer (with parallel: null)"
        )
    exact = "delays:" + ",".join(map(str, delays))
    try:
        wanted = schedule.parse(exact, layers)
    except ValueError as error:
        raise ConfigError(
            f"delays={short_repr(delays)} is not accepted: {error}"
        ) from None
    for notation in (config.get("residual"), "standard", "ladder"):
        try:
            if schedule.parse(str(notation), layers) == wanted:
                return str(notation)
        except ValueError:
            continue
    return exact
