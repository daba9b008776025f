// New scores: the old ones, faded, plus decayed column sums of the attention probabilities (method.md 3, 7).
//
// Each simdgroup owns 8 rows of a KV head, whose keys it holds in fragments: keys are read once. A threadgroup
// of SG simdgroups walks over the G * L queries in tiles of BQ. Nothing is added by more than one thread at a
// time, so that results are always the same.
//
// `fade` is what is left of the old scores.
//
// template: T, D, R, BQ, SG
const int QS = D + 16 / sizeof(T);  // padded against bank conflicts
const int SHARE = SG * 32 / BQ;  // threads that compute the norm of a query together
threadgroup T query_tile[BQ * QS];
threadgroup float scratch[SG * BQ * 8];
threadgroup T edges[SG * 64];
threadgroup float normaliser[BQ];  // the log-sum-exp
threadgroup float decays[BQ];
threadgroup float half_norms[BQ];
threadgroup int sees[BQ];  // recent rows

const int kept_rows = kept_keys_shape[1], heads = recent_keys_shape[1], recent_rows = recent_keys_shape[2];
const int group = queries_shape[1] / heads, length = queries_shape[2];
const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int h = threadgroup_position_in_grid.y, b = threadgroup_position_in_grid.z;
const int head = b * heads + h, total = group * length;
const int begin = starts[h], rows = starts[h + 1] - begin, old = min(departed, rows);
const int merged = departed > rows ? R : 0;

// Tiles of 8 rows: those with filled kept rows, with filled recent rows, the other kept, the other recent ones.
const int kept_filled = (old + 7) / 8, recent_filled = (filled + 7) / 8, read = kept_filled + recent_filled;
const int kept_tiles = (rows + 7) / 8;
const int first = threadgroup_position_in_grid.x * SG, tile = first + simd;
const bool is_kept = tile < read ? tile < kept_filled : tile < recent_filled + kept_tiles;
const int skipped = is_kept ? (tile < read ? 0 : recent_filled) : (tile < read ? kept_filled : kept_tiles);
const int at = 8 * (tile - skipped);
const int count = tile < read ? min(8, (is_kept ? old : filled) - at) : 0;
const size_t row = is_kept ? size_t(b) * kept_rows + begin + at : size_t(head) * recent_rows + at;
const int column = lane % 8;  // the row of this lane
float mass = 0;

if (first < read) {
  simdgroup_matrix<T, 8, 8> key[D / 8];
  const device T* keys = count == 0 ? recent_keys : (is_kept ? kept_keys : recent_keys) + row * D;
  ZM_UNROLL
  for (int d = 0; d < D / 8; d++) {
    zm_load_edge(key[d], keys + d * 8, D, count, true, edges + simd * 64, lane);
  }
  const float log_mass = zm_log_mass(column >= count ? 0.0f : is_kept ? kept_weight[row + column] : 1.0f, alpha);
  const bool lifted = is_kept && column < count && at + column < merged;
  const float spread = lifted ? residual_spread[head * R + at + column] : 0.0f;
  const bool needs_norms = first * 8 < merged;
  threadgroup float* dots = scratch + simd * BQ * 8;

  for (int q = 0; q < total; q += BQ) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    zm_copy_rows<T, D, QS, BQ, SG * 32>(
        queries + (size_t(head) * total + q) * D, query_tile, total - q, thread_index_in_threadgroup);
    for (int i = thread_index_in_threadgroup; i < BQ; i += SG * 32) {
      const int age = length - 1 - (q + i) % length;
      normaliser[i] = q + i < total ? log_sum_exp[size_t(head) * total + q + i] : INFINITY;
      decays[i] = pow(decay, float(age));
      sees[i] = filled - age;
      half_norms[i] = 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (needs_norms) {
      const int i = thread_index_in_threadgroup / SHARE;
      float norm = 0;
      for (int d = thread_index_in_threadgroup % SHARE; d < D; d += SHARE) {
        const float x = float(query_tile[i * QS + d]);
        norm += x * x;
      }
      for (int other = 1; other < SHARE; other *= 2) {
        norm += simd_shuffle_xor(norm, other);
      }
      if (thread_index_in_threadgroup % SHARE == 0) {
        half_norms[i] = 0.5f * scale * scale * norm;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    simdgroup_matrix<float, 8, 8> products[BQ / 8];
    ZM_UNROLL
    for (int i = 0; i < BQ / 8; i++) {
      products[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    ZM_UNROLL
    for (int d = 0; d < D / 8; d++) {
      ZM_UNROLL
      for (int i = 0; i < BQ / 8; i++) {
        simdgroup_matrix<T, 8, 8> query;
        zm_load(query, query_tile + i * 8 * QS + d * 8, QS);
        zm_multiply_accumulate(products[i], query, key[d]);
      }
    }
    ZM_UNROLL
    for (int i = 0; i < BQ / 8; i++) {
      zm_store(products[i], dots + i * 64, 8);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = lane / 8; i < BQ; i += 4) {
      const float dot = scale * dots[i * 8 + column];
      const float logit = zm_compensated(CAPPED ? zm_capped(dot, cap) : dot, log_mass, kappa, spread, half_norms[i]);
      if (is_kept || at + column < sees[i]) {
        mass += decays[i] * exp(logit - normaliser[i]);
      }
    }
  }
  mass += simd_shuffle_xor(mass, 8);
  mass += simd_shuffle_xor(mass, 16);
}

if (lane < 8 && is_kept && at + column < rows) {
  new_kept_score[row + column] = fade * kept_score[row + column] + mass;
}
if (lane < 8 && !is_kept && at + column < recent_rows) {
  new_recent_score[row + column] = at + column < filled ? fade * recent_score[row + column] + mass : 0;
}
