"""The text of the routing kernel: one body for Metal and CUDA, behind a small macro header each.

The body is written in the C++ that both languages share. What differs stands behind ``ROUTE_``
words, which [`METAL_HEADER`][moe_lens.kernels.body.METAL_HEADER] and
[`CUDA_HEADER`][moe_lens.kernels.body.CUDA_HEADER] define. Three rules keep it valid on both, and
for every shape:

- No pointer variables: MLX puts inputs of fewer than 8 elements into Metal's ``constant`` address
  space, so a pointer to an input has no fixed type. Inputs are only indexed.
- All 32 lanes of a SIMD group reach every ``simd_*`` call: no call stands behind a condition that
  differs between lanes.
- Every element of every output is written: MLX hands out uninitialised memory.
"""

from __future__ import annotations

from typing import Literal

Language = Literal["metal", "cuda"]

INPUTS = ("scores", "per_expert", "given_ids", "whole", "real")
OUTPUTS = ("out_ids", "out_weights", "out_entropy", "out_margin", "out_mass")

WHOLE = (
    "tokens",
    "experts",
    "k",
    "score_kind",
    "is_logits",
    "chosen_kind",
    "masked_is_set",
    "tie_high",
    "group_count",
    "group_drop",
    "group_top2",
    "zero_dropped",
    "normalise",
    "ids_given",
    "logits_dtype",
    "capped_dtype",
    "score_dtype",
    "choice_dtype",
    "chosen_dtype",
    "scaled_dtype",
    "weight_dtype",
    "sum_dtype",
)
"""The whole numbers of a call, by their place in the array `whole`."""

REAL = (
    "multiplier",
    "softcap",
    "temperature",
    "masked_score",
    "group_fill",
    "epsilon",
    "scale",
    "nan_choice",
)
"""The real numbers of a rule, by their place in the array `real`."""

PER_EXPERT = ("selection_bias", "logit_bias", "expert_scale", "weight_scale", "state")
"""The rows of the array `per_expert` [5, E]; `state` is 1 for masked, 2 for forced, else 0."""

SCORE_KINDS = {
    "identity": 0,
    "softmax": 1,
    "softmax_precise": 2,
    "softmax_float32": 2,
    "sigmoid": 3,
    "sigmoid_float32": 3,
    "sqrt_softplus_float32": 4,
}
"""Numbers of the score formulas. The dtype codes tell apart those that share a number; ``softmax``
rounds every step to its dtype and the other two only the last."""

NORMALISE_KINDS = {"no": 0, "sum": 1, "sum_floor": 2, "l1": 3}

METAL_HEADER = r"""
#define ROUTE_FN inline
#define ROUTE_LANE uint(thread_index_in_simdgroup)
#define ROUTE_ROW uint(thread_position_in_grid.y)
#define ROUTE_BITS(x) as_type<uint>(x)
#define ROUTE_FLOAT(x) as_type<float>(x)
#define ROUTE_SHUFFLE(v, l) simd_shuffle(v, ushort(l))
#define ROUTE_HALF(x) float(half(x))
#define ROUTE_BFLOAT(x) float(bfloat16_t(x))
#define ROUTE_EXP(x) metal::precise::exp(x)
#define ROUTE_EXP_SOFTMAX(x) metal::fast::exp(x)
#define ROUTE_LOG(x) metal::precise::log(x)
#define ROUTE_SQRT(x) metal::precise::sqrt(x)
#define ROUTE_TANH(x) metal::precise::tanh(x)
"""
"""Softmax takes the fast exponential and the sigmoid the precise one, as MLX's own kernels do."""

CUDA_HEADER = r"""
typedef unsigned int uint;
#define ROUTE_FN __device__ __forceinline__
#define ROUTE_LANE uint(threadIdx.x & 31u)
#define ROUTE_ROW uint(blockIdx.y * blockDim.y + threadIdx.y)
#define ROUTE_BITS(x) __float_as_uint(x)
#define ROUTE_FLOAT(x) __uint_as_float(x)
#define ROUTE_SHUFFLE(v, l) __shfl_sync(0xffffffffu, v, int(l))
#define ROUTE_HALF(x) float(__half(x))
#define ROUTE_BFLOAT(x) float(__nv_bfloat16(x))
#define ROUTE_EXP(x) expf(x)
#define ROUTE_EXP_SOFTMAX(x) expf(x)
#define ROUTE_LOG(x) logf(x)
#define ROUTE_SQRT(x) sqrtf(x)
#define ROUTE_TANH(x) tanhf(x)
ROUTE_FN float simd_sum(float v) {
  for (int o = 16; o > 0; o >>= 1) { v += __shfl_xor_sync(0xffffffffu, v, o); }
  return v;
}
ROUTE_FN float simd_max(float v) {
  for (int o = 16; o > 0; o >>= 1) { v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o)); }
  return v;
}
ROUTE_FN uint simd_max(uint v) {
  for (int o = 16; o > 0; o >>= 1) {
    const uint w = __shfl_xor_sync(0xffffffffu, v, o);
    v = w > v ? w : v;
  }
  return v;
}
ROUTE_FN uint simd_min(uint v) {
  for (int o = 16; o > 0; o >>= 1) {
    const uint w = __shfl_xor_sync(0xffffffffu, v, o);
    v = w < v ? w : v;
  }
  return v;
}
"""

FUNCTIONS = r"""
#define ROUTE_NONE 0xffffffffu
#define ROUTE_INFINITY ROUTE_FLOAT(0x7f800000u)

// A number whose order as an unsigned integer is that of `v`, which is not NaN. -0 equals 0; no
// number gives 0, which stands for "taken", or the largest, which stands for "none".
ROUTE_FN uint route_key(float v) {
  const uint b = ROUTE_BITS(v == 0.0f ? 0.0f : v);
  return (b & 0x80000000u) != 0u ? ~b : (b | 0x80000000u);
}

// The number that `route_key` was given.
ROUTE_FN float route_value(uint key) {
  return (key & 0x80000000u) != 0u ? ROUTE_FLOAT(key ^ 0x80000000u) : ROUTE_FLOAT(~key);
}

// `v` rounded to a dtype: 0 float32, 1 float16, 2 bfloat16.
ROUTE_FN float route_round(float v, int dtype) {
  if (dtype == 1) { return ROUTE_HALF(v); }
  if (dtype == 2) { return ROUTE_BFLOAT(v); }
  return v;
}

ROUTE_FN float route_sigmoid(float v) {
  const float y = 1.0f / (1.0f + ROUTE_EXP(v < 0.0f ? -v : v));
  return v < 0.0f ? y : 1.0f - y;
}

// sqrt(log(1 + exp(v))). log(1 + t) is taken as log(u) * t / (u - 1) with u = 1 + t rounded, which
// keeps its digits for small t.
ROUTE_FN float route_sqrt_softplus(float v) {
  const float t = ROUTE_EXP(v < 0.0f ? v : -v);
  const float u = 1.0f + t;
  const float l = u == 1.0f ? t : ROUTE_LOG(u) * (t / (u - 1.0f));
  return ROUTE_SQRT(l + (v < 0.0f ? 0.0f : v));
}

// The sum of `v` over the first k lanes, one after another in the order of a block's slots: MLX
// adds short rows so, and a sum in another order may differ in its last bit. Partial sums are
// rounded to `dtype`.
ROUTE_FN float route_sum(float v, int k, bool backwards, int dtype) {
  float total = 0.0f;
  for (int j = 0; j < k; ++j) {
    total = route_round(total + ROUTE_SHUFFLE(v, backwards ? k - 1 - j : j), dtype);
  }
  return total;
}
"""
"""What the body calls, in the words of either header."""

_STEPS = r"""
  if (int(row) >= tokens) { return; }

  // Lane l holds the experts l, l + 32, l + 64 and so on, SLOTS of them; a place without an expert
  // holds -inf at first.
  float score[SLOTS];
  float choice[SLOTS];
  uint key[SLOTS];

  // 1. The logits, changed as the rule and the override say, or scores as they come.
  float peak = -ROUTE_INFINITY;
  for (int i = 0; i < SLOTS; ++i) {
    const int e = int(lane) + 32 * i;
    score[i] = -ROUTE_INFINITY;
    if (e < experts) {
      float v = float(scores[size_t(row) * experts + e]);
      v = route_round(v + per_expert[logit_bias * experts + e], logits_dtype);
      v = route_round(v * multiplier, logits_dtype);
      if (softcap > 0.0f) { v = ROUTE_TANH(v / softcap) * softcap; }
      v = route_round(v / temperature, capped_dtype);
      if (masked_is_set != 0 && per_expert[state * experts + e] == 1.0f) { v = masked_score; }
      score[i] = v;
      peak = v > peak ? v : peak;
    }
  }
  peak = simd_max(peak);

  // 2. Scores.
  if (score_kind == 1 || score_kind == 2) {
    float sum = 0.0f;
    for (int i = 0; i < SLOTS; ++i) {
      score[i] = ROUTE_EXP_SOFTMAX(score[i] - peak);
      sum += score[i];
    }
    const float inverse = 1.0f / simd_sum(sum);
    for (int i = 0; i < SLOTS; ++i) { score[i] = route_round(score[i] * inverse, score_dtype); }
  }
  for (int i = 0; i < SLOTS; ++i) {
    if (score_kind == 3) { score[i] = route_sigmoid(score[i]); }
    if (score_kind == 4) { score[i] = route_sqrt_softplus(score[i]); }
  }

  // 3. The router distribution: the scores' share of their sum, or the softmax of plain logits.
  float norm = 0.0f;
  for (int i = 0; i < SLOTS; ++i) {
    if (int(lane) + 32 * i < experts) {
      norm += is_logits != 0 ? ROUTE_EXP(score[i] - peak) : score[i];
    }
  }
  norm = simd_sum(norm);
  float entropy = 0.0f;
  for (int i = 0; i < SLOTS; ++i) {
    if (int(lane) + 32 * i < experts) {
      const float p = (is_logits != 0 ? ROUTE_EXP(score[i] - peak) : score[i]) / norm;
      entropy -= p > 0.0f ? p * ROUTE_LOG(p) : p;
    }
  }
  entropy = simd_sum(entropy);

  // 4. What the selection sees: biased, masked.
  for (int i = 0; i < SLOTS; ++i) {
    const int e = int(lane) + 32 * i;
    choice[i] = -ROUTE_INFINITY;
    if (e < experts) {
      const float v = score[i] + per_expert[selection_bias * experts + e];
      const bool masked = per_expert[state * experts + e] == 1.0f;
      choice[i] = masked ? -ROUTE_INFINITY : (v == v ? route_round(v, choice_dtype) : nan_choice);
    }
  }

  // 5. Groups: lane g holds the score of group g; the worst are dropped, lower index first.
  uint dropped = 0u;
  const int group_size = experts / (group_count > 0 ? group_count : 1);
  if (group_drop > 0) {
    uint mine = ROUTE_NONE;
    for (int g = 0; g < group_count; ++g) {
      uint best = 0u;
      for (int i = 0; i < SLOTS; ++i) {
        const int e = int(lane) + 32 * i;
        const uint its = route_key(choice[i]);
        if (e < experts && e / group_size == g && its > best) { best = its; }
      }
      uint of_group = simd_max(best);
      if (group_top2 != 0) {
        uint holder = ROUTE_NONE;
        for (int i = 0; i < SLOTS; ++i) {
          const uint e = lane + 32u * uint(i);
          const bool inside = int(e) < experts && int(e) / group_size == g;
          if (inside && route_key(choice[i]) == of_group && e < holder) { holder = e; }
        }
        holder = simd_min(holder);
        uint second = 0u;
        for (int i = 0; i < SLOTS; ++i) {
          const uint e = lane + 32u * uint(i);
          const bool inside = int(e) < experts && int(e) / group_size == g;
          const uint its = route_key(choice[i]);
          if (inside && e != holder && its > second) { second = its; }
        }
        float both = route_value(of_group) + route_value(simd_max(second));
        // inf - inf: the group is kept.
        both = both == both ? both : (nan_choice < 0.0f ? -nan_choice : nan_choice);
        of_group = route_key(route_round(both, choice_dtype));
      }
      if (int(lane) == g) { mine = of_group; }
    }
    for (int r = 0; r < group_drop; ++r) {
      const uint worst = simd_min(mine);
      const uint g = simd_min(mine == worst ? lane : ROUTE_NONE);
      dropped |= 1u << (g & 31u);
      if (lane == g) { mine = ROUTE_NONE; }
    }
  }
  for (int i = 0; i < SLOTS; ++i) {
    const int e = int(lane) + 32 * i;
    key[i] = 0u;
    if (e < experts) {
      const float its_state = per_expert[state * experts + e];
      float v = choice[i];
      if (its_state != 1.0f && ((dropped >> (uint(e / group_size) & 31u)) & 1u) != 0u) {
        v = group_fill;
      }
      key[i] = route_key(its_state == 2.0f ? ROUTE_INFINITY : v);
    }
  }

  // 6. k rounds of the best: lane r keeps the r-th. The lowest chosen and the best left out give
  // the margin.
  uint my_id = 0u;
  float my_score = 0.0f;
  uint lowest = ROUTE_NONE;
  for (int r = 0; r < k; ++r) {
    uint winner = 0u;
    if (ids_given != 0) {
      winner = given_ids[size_t(row) * k + r];
    } else {
      uint best = 0u;
      for (int i = 0; i < SLOTS; ++i) { best = key[i] > best ? key[i] : best; }
      best = simd_max(best);
      uint low = ROUTE_NONE;
      uint high = 0u;
      for (int i = 0; i < SLOTS; ++i) {
        const uint e = lane + 32u * uint(i);
        if (key[i] == best) {
          low = e < low ? e : low;
          high = e;
        }
      }
      winner = tie_high != 0 ? simd_max(high) : simd_min(low);
    }
    float its_score = 0.0f;
    uint its_key = 0u;
    for (int i = 0; i < SLOTS; ++i) {
      if (lane + 32u * uint(i) == winner) {
        its_score = score[i];
        its_key = key[i];
        key[i] = 0u;
      }
    }
    its_score = ROUTE_SHUFFLE(its_score, winner & 31u);
    its_key = ROUTE_SHUFFLE(its_key, winner & 31u);
    lowest = its_key < lowest ? its_key : lowest;
    if (int(lane) == r) {
      my_id = winner;
      my_score = its_score;
    }
  }
  uint rest = 0u;
  for (int i = 0; i < SLOTS; ++i) { rest = key[i] > rest ? key[i] : rest; }
  rest = simd_max(rest);
  const float apart = lowest == rest ? 0.0f : route_value(lowest) - route_value(rest);
  const float margin = rest == 0u ? ROUTE_INFINITY : apart;

  // 7. Weights, one lane each.
  const bool on = int(lane) < k;
  const int at = my_id < uint(experts) ? int(my_id) : 0;
  const float share = (is_logits != 0 ? ROUTE_EXP(my_score - peak) : my_score) / norm;
  const float mass = simd_sum(on ? share : 0.0f);
  float w = my_score;
  if (zero_dropped != 0 && ids_given == 0 && per_expert[state * experts + at] != 2.0f) {
    if (((dropped >> (uint(at / group_size) & 31u)) & 1u) != 0u) { w = 0.0f; }
  }
  const bool backwards = tie_high != 0 && ids_given == 0;
  if (chosen_kind == 1 || chosen_kind == 2) {
    const int step = chosen_kind == 1 ? chosen_dtype : 0;
    const float top = simd_max(on && w == w ? w : -ROUTE_INFINITY);
    w = route_round(ROUTE_EXP_SOFTMAX(route_round(w - top, step)), step);
    const float sum = route_sum(w, k, backwards, step);
    w = route_round(w * route_round(1.0f / sum, step), chosen_dtype);
  }
  if (chosen_kind == 3) { w = route_round(route_sigmoid(w), chosen_dtype); }
  if (chosen_kind == 4) { w = route_sqrt_softplus(w); }
  if (normalise != 0) {
    float sum = route_sum(normalise == 3 && w < 0.0f ? -w : w, k, backwards, sum_dtype);
    sum = route_round(sum, chosen_dtype);
    if (normalise == 1) { sum = route_round(sum + epsilon, chosen_dtype); }
    if (normalise == 2) { sum = sum < epsilon ? epsilon : sum; }
    w = route_round(w / sum, chosen_dtype);
  }
  w = route_round(w * scale, chosen_dtype);
  w = route_round(w * per_expert[expert_scale * experts + at], scaled_dtype);
  w = route_round(w, weight_dtype);
  w = route_round(w * per_expert[weight_scale * experts + at], weight_dtype);

  // 8. Out by falling weight: the rank of a slot is the number of slots before it. NaN comes last,
  // equal weights by rising id.
  int rank = 0;
  for (int j = 0; j < k; ++j) {
    const float other = ROUTE_SHUFFLE(w, j);
    const uint its = ROUTE_SHUFFLE(my_id, j);
    const bool same = other == w || (other != other && w != w);
    const bool above = other > w || (other == other && w != w);
    if (above || (same && (its < my_id || (its == my_id && j < int(lane))))) { ++rank; }
  }
  if (on) {
    out_ids[size_t(row) * k + rank] = my_id;
    out_weights[size_t(row) * k + rank] = W(w);
  }
  if (lane == 0u) {
    out_entropy[row] = entropy;
    out_margin[row] = margin;
    out_mass[row] = mass;
  }
"""


def _declarations() -> str:
    """The names of the places in the parameter arrays, so that they are written down once."""
    lines = [f"const int {name} = whole[{place}];" for place, name in enumerate(WHOLE)]
    lines += [f"const float {name} = real[{i}];" for i, name in enumerate(REAL)]
    lines += [f"const int {name} = {row};" for row, name in enumerate(PER_EXPERT)]
    return "".join(f"  {line}\n" for line in lines)


# MLX passes the thread attributes whose names it finds in the body; the header is not searched.
BODY = (
    "  // One SIMD group for each token: thread_index_in_simdgroup, thread_position_in_grid.\n"
    "  const uint lane = ROUTE_LANE;\n"
    "  const uint row = ROUTE_ROW;\n" + _declarations() + _STEPS
)
"""The body of the kernel.

Template words: `T` the dtype of `scores`, `W` that of the weights, `SLOTS` the experts of a lane
(the number of experts rounded up to 32 times a power of two, so that the arrays stay in
registers). Everything else is read when it runs.
"""


def header(language: Language) -> str:
    """The macro header of `language` and the functions that the body calls."""
    return (METAL_HEADER if language == "metal" else CUDA_HEADER) + FUNCTIONS
