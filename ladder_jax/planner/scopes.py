"""Says which part of a model an instruction is in, by its scope: JAX's name stack."""

import re
from typing import NamedTuple

# XLA may name a fusion by a weight, such as layers[3].mlp.up. A scan of layers has one
# scope for all of them, such as layers0to3.
LAYER = re.compile(r"\b(layers?)\[?(\d+)(to\d+)?")
BLOCK = re.compile(r"(?<=[/(.])(attention\+mlp|attention|mlp|embedding|last)(?=[/).])")


class Place(NamedTuple):
    """The part of a model that an instruction belongs to."""

    direction: str  # "forward" or "backward"
    layer: str  # "layer3"; "layers0to3" in a scan; "" outside of the stack
    block: str  # "attention", "mlp", "attention+mlp"; "embedding", "last"; or ""

    def __str__(self) -> str:
        return " ".join(filter(None, self))

    @property
    def scanned(self) -> bool:
        """Whether `layer` names all layers of a scan."""
        return "to" in self.layer

    @property
    def number(self) -> int | None:
        """The layer's number; in a scan, the first layer's; outside of layers, None."""
        match = re.search(r"\d+", self.layer)
        return int(match[0]) if match else None


def place_of(scope: str) -> Place:
    """The `Place` that a scope names."""
    layer, block = LAYER.search(scope), BLOCK.search(scope)
    name = ""
    if layer:
        name = layer[0] if layer[3] else "layer" + layer[2]
    direction = "backward" if "transpose(" in scope else "forward"
    return Place(direction, name, block[0] if block else "")
