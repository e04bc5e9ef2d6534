"""Every model type that can have narrower experts: written, loaded by stock mlx-lm, compared.

Half of the experts go as well, so that both ways are tried together.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from moe_lens.compress import simulated, width_for
from moe_lens.errors import UnsupportedModelError
from test_compress_families import (
    NOT_IN_4_BIT,
    ROUNDS_ITS_OUTPUT,
    TOKENS,
    open_router,
    save_in_mode,
    stock_load,
    write_smaller,
)
from tiny_models import CONFIGS
from twins import kept_per_layer, narrow_plan

NO_WIDTH_OF_ITS_OWN = {"jamba", "phixtral", "llama4", "deepseek_v41", "deepseek_v41/softmax"}
"""The number that sets the width of the experts also sets other weights, or there is none."""

MODES = (None, "affine", "mxfp4")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_narrower_model_equals_the_masked_original(
    name: str, mode: str | None, tmp_path: Path
) -> None:
    if mode is not None and name in NOT_IN_4_BIT:
        pytest.skip("its own rule leaves experts in half precision, which no CPU multiplies")
    source = save_in_mode(name, tmp_path / "source", mode)
    router = open_router(name, source)
    if name in NO_WIDTH_OF_ITS_OWN:
        with pytest.raises(UnsupportedModelError, match="remove whole experts instead"):
            width_for(router.config, router.layers, 0.5)
        return
    width = width_for(router.config, router.layers, 0.5)
    # Whole groups of the tiny models' 32: nothing is quantised again, so nothing is rounded.
    group = 1 if mode is None else 32
    plan = narrow_plan(router, width, kept_per_layer(router, 8), whole_groups_of=group)
    with simulated(router, plan):
        masked = router.forward(TOKENS)
        mx.eval(masked)
    plain = router.forward(TOKENS)
    model = stock_load(name, write_smaller(name, plan, source, tmp_path / "smaller"))
    logits = model(TOKENS)
    scale = float(mx.abs(masked).max())
    tolerance = 2**-8 if name in ROUNDS_ITS_OUTPUT else 1e-5
    np.testing.assert_allclose(np.array(logits), np.array(masked), atol=tolerance * scale, rtol=0)
    assert float(mx.abs(masked - plain).max()) > 1e-3 * scale
