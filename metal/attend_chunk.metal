// Flash-style attention of a prompt's queries with compensated logits and a causal tail (method.md 2, 7).
//
// The G * L queries of a KV head lie one after the other in memory. A threadgroup takes SG * 8 of them and
// walks over tiles of BK filled rows, kept ones first; each simdgroup owns 8 queries, whose output stays in
// float fragments. Rows may be split over threadgroups: each writes its own normalised output and log-sum-exp.
//
// template: T, OT (of the output), D, DV, R, BK, SG, SINKS, VALUES (false: only the log-sum-exp)
const int KS = D + 16 / sizeof(T), VS = DV + 16 / sizeof(T);  // padded against bank conflicts
threadgroup T key_tile[BK * KS];
threadgroup T value_tile[VALUES ? BK * VS : 1];
threadgroup float scratch[SG * 8 * BK];  // logits, then probabilities, of each simdgroup
threadgroup float diagonals[SG * 64];
threadgroup T edges[SG * 64];
threadgroup float log_mass[BK];
threadgroup float spread[BK];

const int kept_rows = kept_keys_shape[1], heads = recent_keys_shape[1], recent_rows = recent_keys_shape[2];
const int group = queries_shape[1] / heads, length = queries_shape[2];
const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int h = threadgroup_position_in_grid.y, b = threadgroup_position_in_grid.z;
const int split = threadgroup_position_in_grid.x % splits;
const int total = group * length;
const int first = threadgroup_position_in_grid.x / splits * (SG * 8);
const int begin = starts[h], rows = starts[h + 1] - begin, old = min(departed, rows);
const int merged = departed > rows ? R : 0;
const int head = b * heads + h;

// Four lanes share a query: lane / 4 of the simdgroup's 8.
const int mine = first + simd * 8, query = mine + lane / 4;
const int sees = query < total ? filled - length + query % length + 1 : 0;  // recent rows
const int last = min(first + SG * 8, total) - 1;
const int furthest = last / length > first / length ? length - 1 : last % length;
const int visible = filled - length + furthest + 1;

const device T* q = queries + (size_t(head) * total + min(mine, total)) * D;
simdgroup_matrix<T, 8, 8> query_fragment[D / 8];
ZM_UNROLL
for (int d = 0; d < D / 8; d++) {
  zm_load_edge(query_fragment[d], q + d * 8, D, total - mine, false, edges + simd * 64, lane);
}
float norm = 0;
if (query < total && merged > 0) {
  for (int d = lane % 4; d < D; d += 4) {
    float x = float(q[(lane / 4) * D + d]);
    norm += x * x;
  }
}
norm += simd_shuffle_xor(norm, 1);
norm += simd_shuffle_xor(norm, 2);
const float half_norm = 0.5f * scale * scale * norm;

// The running maximum is finite from the start, so that rows without any probability give no NaN.
float top = -FLT_MAX, sum = 0;
if (SINKS && split == 0 && query < total) {
  top = sinks[h * group + query / length];
  sum = lane % 4 == 0 ? 1 : 0;
}
simdgroup_matrix<float, 8, 8> sums[DV / 8];
ZM_UNROLL
for (int d = 0; d < DV / 8; d++) {
  sums[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

threadgroup float* logits = scratch + simd * 8 * BK;
threadgroup float* diagonal = diagonals + simd * 64;
const int kept_tiles = (old + BK - 1) / BK;
const int tiles = kept_tiles + (visible + BK - 1) / BK;
for (int t = tiles * split / splits; t < tiles * (split + 1) / splits; t++) {
  const bool is_kept = t < kept_tiles;
  const int at = (is_kept ? t : t - kept_tiles) * BK;
  const int count = min(BK, (is_kept ? old : visible) - at);
  const size_t row = is_kept ? size_t(b) * kept_rows + begin + at : size_t(head) * recent_rows + at;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  zm_copy_rows<T, D, KS, BK, SG * 32>(
      (is_kept ? kept_keys : recent_keys) + row * D, key_tile, count, thread_index_in_threadgroup);
  if (VALUES) {
    zm_copy_rows<T, DV, VS, BK, SG * 32>(
        (is_kept ? kept_values : recent_values) + row * DV, value_tile, count, thread_index_in_threadgroup);
  }
  for (int j = thread_index_in_threadgroup; j < BK; j += SG * 32) {
    log_mass[j] = zm_log_mass(j >= count ? 0.0f : is_kept ? kept_weight[row + j] : 1.0f, alpha);
    spread[j] = is_kept && j < count && at + j < merged ? residual_spread[head * R + at + j] : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  simdgroup_matrix<float, 8, 8> dots[BK / 8];
  ZM_UNROLL
  for (int c = 0; c < BK / 8; c++) {
    dots[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  ZM_UNROLL
  for (int d = 0; d < D / 8; d++) {
    ZM_UNROLL
    for (int c = 0; c < BK / 8; c++) {
      simdgroup_matrix<T, 8, 8> key;
      zm_load(key, key_tile + c * 8 * KS + d * 8, KS, true);
      zm_multiply_accumulate(dots[c], query_fragment[d], key);
    }
  }
  ZM_UNROLL
  for (int c = 0; c < BK / 8; c++) {
    zm_store(dots[c], logits + c * 8, BK);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  float x[BK / 4];
  float highest = top;
  ZM_UNROLL
  for (int c = 0; c < BK / 4; c++) {
    const int j = lane % 4 + 4 * c;
    const float score = scale * logits[(lane / 4) * BK + j];
    x[c] = zm_compensated(CAPPED ? zm_capped(score, cap) : score, log_mass[j], kappa, spread[j], half_norm);
    x[c] = is_kept || at + j < sees ? x[c] : ZM_NEG_INF;
    highest = max(highest, x[c]);
  }
  highest = max(highest, simd_shuffle_xor(highest, 1));
  highest = max(highest, simd_shuffle_xor(highest, 2));
  const float fade = exp(top - highest);
  top = highest;
  sum *= fade;
  ZM_UNROLL
  for (int c = 0; c < BK / 4; c++) {
    const float p = exp(x[c] - top);
    sum += p;
    logits[(lane / 4) * BK + lane % 4 + 4 * c] = p;
  }
  if (VALUES) {
    if (simd_any(fade != 1)) {  // rows of the output fade through a product with a diagonal matrix
      for (int e = 0; e < 2; e++) {
        const int column = lane % 4 + 4 * e;
        diagonal[(lane / 4) * 8 + column] = column == int(lane / 4) ? fade : 0;
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_matrix<float, 8, 8> fades;
      zm_load(fades, diagonal, 8);
      ZM_UNROLL
      for (int d = 0; d < DV / 8; d++) {
        simdgroup_matrix<float, 8, 8> faded = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        zm_multiply_accumulate(faded, fades, sums[d]);
        sums[d] = faded;
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    ZM_UNROLL
    for (int c = 0; c < BK / 8; c++) {
      simdgroup_matrix<float, 8, 8> probabilities;
      zm_load(probabilities, logits + c * 8, BK);
      ZM_UNROLL
      for (int d = 0; d < DV / 8; d++) {
        simdgroup_matrix<T, 8, 8> value;
        zm_load(value, value_tile + c * 8 * VS + d * 8, VS);
        zm_multiply_accumulate(sums[d], probabilities, value);
      }
    }
  }
}

sum += simd_shuffle_xor(sum, 1);
sum += simd_shuffle_xor(sum, 2);
const size_t place = (size_t(split) * threadgroups_per_grid.z * heads + head) * total + query;
if (query < total && lane % 4 == 0) {
  log_sum_exp[place] = sum == 0 ? ZM_NEG_INF : top + log(sum);  // NaN stays NaN
}
if (VALUES) {
  const float inverse = sum == 0 ? 0 : 1 / sum;
  ZM_UNROLL
  for (int d = 0; d < DV / 8; d++) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    zm_store(sums[d], diagonal, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = 0; e < 2; e++) {
      const int column = lane % 4 + 4 * e;
      if (query < total) {
        output[place * DV + d * 8 + column] = static_cast<OT>(inverse * diagonal[(lane / 4) * 8 + column]);
      }
    }
  }
} else if (all(thread_position_in_grid == uint3(0))) {
  output[0] = static_cast<OT>(0.0f);
}
