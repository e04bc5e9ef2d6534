"""All tiny configurations under their names: 54 model types and 19 further branches."""

from __future__ import annotations

from tiny_models.grouped import GROUPED
from tiny_models.sigmoid import SIGMOID
from tiny_models.sizes import Config, changed
from tiny_models.softmax import SOFTMAX_THEN_TOP_K, TOP_K_THEN_SOFTMAX
from tiny_models.special import SPECIAL
from tiny_models.variants import VARIANTS

BASE: dict[str, Config] = SOFTMAX_THEN_TOP_K | TOP_K_THEN_SOFTMAX | SIGMOID | GROUPED | SPECIAL
"""One configuration for each model type of mlx-lm that has routed experts."""

CONFIGS: dict[str, Config] = BASE | {
    name: changed(BASE[name.split("/")[0]], **changes) for name, changes in VARIANTS.items()
}
"""What stands in ``config.json``, so that ``mlx_lm.utils.load_model`` rebuilds the model."""
