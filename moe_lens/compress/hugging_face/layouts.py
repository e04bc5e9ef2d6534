"""What the checkpoints of each model type look like on the hub, by mlx-lm's name of the type.

Each entry is the way back from what the `sanitize` of the type makes of them. Whether it is right
is never taken on trust: what is exported must be, by stock mlx-lm's own loader, the smaller model
again, tensor for tensor and bit for bit (`check`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .expert_layout import ExpertLayout, Numbered, Stack, Stacked

GATE, UP, DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"

PROJECTIONS = Numbered()
W123 = Numbered(names={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"})
GATE_UP = Stacked((Stack("experts.gate_up_proj", (GATE, UP)), Stack("experts.down_proj", (DOWN,))))
INPUTS_FIRST = Stacked(
    (
        Stack("experts.gate_up_proj", (GATE, UP), transposed=True),
        Stack("experts.down_proj", (DOWN,), transposed=True),
    )
)
LINEARS = Stacked(
    (Stack("input_linear.weight", (GATE, UP)), Stack("output_linear.weight", (DOWN,)))
)
SEPARATE = Stacked(tuple(Stack(name, (name,)) for name in (GATE, UP, DOWN)))
FP4_BLOCKS = Stacked(
    (
        Stack("experts.gate_up_proj_blocks", (GATE, UP), interleaved=True, blocks=True),
        Stack(
            "experts.gate_up_proj_scales", ("gate_proj.scales", "up_proj.scales"), interleaved=True
        ),
        Stack("experts.gate_up_proj_bias", ("gate_proj.bias", "up_proj.bias"), interleaved=True),
        Stack("experts.down_proj_blocks", (DOWN,), blocks=True),
        Stack("experts.down_proj_scales", ("down_proj.scales",)),
        Stack("experts.down_proj_bias", ("down_proj.bias",)),
    )
)
FLAT = Stacked(
    (
        Stack("experts.mlp.w1", ("w1.weight",), flat=True),
        Stack("experts.mlp.v1", ("v1.weight",), flat=True),
        Stack("experts.mlp.w2", ("w2.weight",), transposed=True, flat=True),
    )
)

ONE_PLUS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
LANGUAGE_MODEL_INSIDE = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)


@dataclass(frozen=True)
class Layout:
    """The tensors of a model type on the hub, where they are not named and laid out as in mlx-lm.

    `experts` are the ways in which its experts are stored; the first is used where the parent is
    in mlx-lm's layout. `block` is what a routed block is called, and `renames` are parts of names,
    replaced in this order. `latent` attention has one tensor for what mlx-lm splits into two.
    Tensors whose names end with `convolutions` have their last two axes swapped, and 1 is taken
    from those that end with `one_plus`. `lost` says what mlx-lm's loader changes beyond return,
    which leaves parents that are in this layout already.
    """

    experts: tuple[ExpertLayout, ...] = (PROJECTIONS,)
    block: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    latent: bool = False
    convolutions: tuple[str, ...] = ()
    one_plus: tuple[str, ...] = ()
    lost: str | None = None

    def rename(self, name: str, blocks: Iterable[str] = ()) -> str:
        """The name on the hub of what mlx-lm calls `name`.

        Args:
            name: Of a tensor, or of a routed block.
            blocks: The paths of all routed blocks.
        """
        if self.block is not None:
            for path in blocks:
                if name == path or name.startswith(f"{path}."):
                    name = f"{path.rpartition('.')[0]}.{self.block}{name[len(path) :]}"
                    break
        for old, new in self.renames:
            name = name.replace(old, new)
        return name


_PLAIN = Layout()
_LATENT = Layout(latent=True)
_BAILING = Layout(renames=((".mlp.gate.gate_proj.", ".mlp.gate."),))
_MIXTRAL = Layout((W123,))
_QWEN_VISION = Layout((GATE_UP,), renames=LANGUAGE_MODEL_INSIDE)
_CONVOLUTION = ("conv1d.weight",)

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        ("Klear", "afmoe", "deepseek", "deepseek_v2", "dots1", "ernie4_5_moe", "glm4_moe"), _PLAIN
    ),
    **dict.fromkeys(("mellum", "mimo_v2_flash", "olmoe", "qwen2_moe", "qwen3_moe"), _PLAIN),
    "solar_open": _PLAIN,
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"), _LATENT
    ),
    "kimi_k25": _LATENT,
    "longcat_flash_ngram": Layout(
        latent=True,
        renames=(("model.ngram_embeddings.word_embeddings.", "model.embed_tokens."),),
    ),
    "mistral4": Layout((GATE_UP, PROJECTIONS), latent=True),
    "mistral3": Layout((GATE_UP, PROJECTIONS), latent=True),
    "bailing_moe": _BAILING,
    "bailing_moe_linear": _BAILING,
    "bailing_hybrid": replace(_BAILING, latent=True),
    "exaone_moe": Layout(
        renames=((".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),)
    ),
    "laguna": Layout(
        renames=(
            (".mlp.gate.proj.", ".mlp.gate."),
            (".mlp.gate.e_score_correction_bias", ".mlp.experts.e_score_correction_bias"),
        )
    ),
    "jamba": Layout(convolutions=_CONVOLUTION),
    "nemotron_h": Layout(
        (Numbered(names={"fc1": "up_proj", "fc2": "down_proj"}),), convolutions=_CONVOLUTION
    ),
    "phixtral": Layout((Numbered("mlp"),)),
    "qwen3_next": Layout(convolutions=_CONVOLUTION, one_plus=ONE_PLUS),
    "qwen3_5_moe": replace(_QWEN_VISION, convolutions=_CONVOLUTION, one_plus=ONE_PLUS),
    "qwen3_vl_moe": replace(_QWEN_VISION, experts=(INPUTS_FIRST,)),
    "gemma4": Layout((GATE_UP,), renames=LANGUAGE_MODEL_INSIDE[:1]),
    "gemma4_text": Layout((GATE_UP,)),
    "llama4": Layout((INPUTS_FIRST,)),
    "granitemoe": Layout((LINEARS,)),
    "granitemoehybrid": Layout((LINEARS,), convolutions=_CONVOLUTION),
    "gpt_oss": Layout((FP4_BLOCKS,)),
    "dbrx": Layout((FLAT,)),
    **dict.fromkeys(("mixtral", "phimoe", "minimax", "minimax_m3_vl"), _MIXTRAL),
    "lfm2_moe": Layout(
        (W123,),
        renames=tuple(
            (f".feed_forward.{old}.", f".feed_forward.{new}.") for old, new in W123.names.items()
        ),
        convolutions=(".conv.conv.weight",),
    ),
    "step3p5": Layout(
        (SEPARATE,),
        block="moe",
        renames=(
            (".moe.gate.gate.", ".moe.gate."),
            (".moe.gate.router_bias", ".moe.router_bias"),
            (".moe.share_expert.", ".share_expert."),
        ),
        one_plus=("norm.weight",),
    ),
    "kimi_linear": Layout(
        (W123,),
        block="block_sparse_moe",
        renames=(
            (".block_sparse_moe.e_score_", ".block_sparse_moe.gate.e_score_"),
            ("q_conv.conv.", "q_conv1d."),
            ("k_conv.conv.", "k_conv1d."),
            ("v_conv.conv.", "v_conv1d."),
        ),
        latent=True,
        convolutions=("_conv.conv.weight",),
    ),
    "kimi_k3": Layout(
        (W123,),
        block="block_sparse_moe",
        renames=((".block_sparse_moe.e_score_", ".block_sparse_moe.gate.e_score_"),),
        lost="the projections of its attention are joined",
    ),
    "kimi_vl": Layout(lost="mlx-lm does not read its attention as it is stored there"),
    "qwen3_5": Layout(lost="mlx-lm does not read experts of this type there"),
    "hunyuan": Layout(lost="the joined projections of its attention are split"),
    "muse_spark": Layout((GATE_UP,), lost="fixed gates are computed once"),
    "deepseek_v41": Layout(
        (W123,),
        block="ffn",
        renames=((".gate.e_score_correction_bias", ".gate.bias"),),
        lost="packed weights are laid out anew",
    ),
}
"""By model type; others are not known to be on the hub in a layout that mlx-lm reads."""
