"""Networks other than a GPU's own: `ladder-jax plan --network`."""

import json
from pathlib import Path
from typing import Any

from ladder_jax.config import ConfigError, require
from ladder_jax.hardware.aot import Target
from ladder_jax.hardware.chip_sources import Source
from ladder_jax.hardware.chips import Chip

# What changes in a chip's row. Without NVLink the long protocols are gone, too.
SLOW: dict[str, Any] = dict(
    long_all_reduce=(), long_gather=(), symmetric_bandwidth=0.0, interference=0.1
)
NETWORKS: dict[str, dict[str, Any]] = {
    "nvlink": {},
    # Published, derived: 70B on 8 H100 with NCCL_P2P_DISABLE=1 takes 62 us an
    # all-reduce at batch 1 and about 200 us in prefill (16 MiB); 405B in two nodes 100
    # and 144 us at 32 and 512 KiB. Interference: ladder's published steps of 70B leave
    # room for 0 at batch 1 and 0.17 at batch 4.
    "no-nvlink": SLOW
    | dict(
        collective_launch_s=19e-6,
        hop_latency_s=6.1e-6,
        link_bandwidth=110e9,
        internode_latency_s=38e-6,
        internode_bandwidth=11e9,
    ),
    # Assumed: the latency of "no-nvlink"; a ring through PCIe 5.0 x16 at 40 GB/s.
    "pcie": SLOW
    | dict(
        collective_launch_s=19e-6,
        hop_latency_s=6.1e-6,
        link_bandwidth=23e9,
        internode_latency_s=38e-6,
        internode_bandwidth=11e9,
    ),
}
# NCCL's all-reduce over symmetric buffers: (latency of 8 GPUs, bytes/s). Derived from
# its published reduce-scatters and all-gathers (Megatron-LM pull request 5596), 10.8
# and 10.9 us at 2 MiB, 28.8 and 27.4 us at 8 MiB, one after the other.
SYMMETRIC_S, SYMMETRIC_BANDWIDTH = 10e-6, 183e9
NAMES = (*NETWORKS, "symmetric")
SOURCES = {
    "no-nvlink": Source("modelled", "published runs with NCCL_P2P_DISABLE=1"),
    "pcie": Source("assumed", "latency as without NVLink; a ring at 40 GB/s"),
    "symmetric": Source("modelled", "Megatron-LM pull request 5596"),
}


def with_network(target: Target, name: str) -> Target:
    """A target of GPUs with another network.

    Args:
      target: the GPUs.
      name: one of NAMES; or a JSON file of measured all-reduces within a node, a list
        of {"bytes": B, "us": T}.
    Raises ConfigError for other names, for TPUs, and for a file that is not so.
    """
    if name == "nvlink":  # the default, also where there is none: no change
        return target
    if name in SOURCES and not target.chip.is_tpu:
        return target.change(change(target.chip, name), SOURCES[name])
    accepted = f"one of {', '.join(NAMES)}, or a JSON file of measured all-reduces"
    if target.chip.is_tpu:
        raise ConfigError(
            f"network={name!r} is not accepted for {target.name}: a TPU's network is "
            "that of its slice"
        )
    require(name.endswith(".json"), "network", name, accepted)
    measured = target.chip._replace(all_reduce_points=read_points(name))
    return target.change(measured, Source("measured", f"all-reduces of {name}"))


def change(chip: Chip, name: str) -> Chip:
    """A GPU's row with the network `name`, one of NAMES."""
    if name == "symmetric":
        return chip._replace(
            collective_launch_s=SYMMETRIC_S,
            hop_latency_s=0.0,
            link_bandwidth=SYMMETRIC_BANDWIDTH,
        )
    return chip._replace(**NETWORKS[name])


def read_points(path: str) -> tuple[tuple[float, float], ...]:
    """The (bytes, seconds) of a file of measured all-reduces, sorted by bytes.

    Raises ConfigError, with the fault, for a file that has none.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"network={path!r} cannot be read: {error}") from None
    return points_of(rows, f"network={path!r}")


def points_of(rows: Any, where: str) -> tuple[tuple[float, float], ...]:
    """The (bytes, seconds) of rows {"bytes": B, "us": T}, sorted by bytes.

    Raises ConfigError, which starts with `where`, for other values.
    """
    accepted = 'a list of {"bytes": B, "us": T} with positive numbers'
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where} is not accepted: it must be {accepted}")
    points = {}
    for row in rows:
        size: Any = None
        us: Any = None
        if isinstance(row, dict):
            size, us = row.get("bytes"), row.get("us")
        if not (_is_positive(size) and _is_positive(us)):
            raise ConfigError(f"{where} has the row {row!r}: it must be {accepted}")
        points[float(size)] = float(us) * 1e-6
    return tuple(sorted(points.items()))


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < float("inf")
