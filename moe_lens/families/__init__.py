"""Router families: for each block class of mlx-lm, where its seams are and which rule it has.

A new architecture is one more `Block` in the file of the family that routes alike; a block that
needs code of its own gets a file named after its model type.
"""

from .cpu_experts import (
    AUTO,
    LIST_NOTE,
    SEGMENTED,
    STOCK,
    decide,
    segment,
    segmented,
    unsegment,
)
from .declaration import OVERRIDES, VALUES, Block
from .layer import REFERENCE, MoELayer, down_name
from .registry import FAMILIES, Support, all_supported, find_moe_layers, support
from .seams import Attachment, SeamError

__all__ = [
    "AUTO",
    "FAMILIES",
    "LIST_NOTE",
    "OVERRIDES",
    "REFERENCE",
    "SEGMENTED",
    "STOCK",
    "VALUES",
    "Attachment",
    "Block",
    "MoELayer",
    "SeamError",
    "Support",
    "all_supported",
    "decide",
    "down_name",
    "find_moe_layers",
    "segment",
    "segmented",
    "support",
    "unsegment",
]
