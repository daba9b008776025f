// One decode step of one KV head (method.md 2, 3, 7): a threadgroup serves a tile of GT query heads
// over one split of the head's filled rows. Row i of a head is kept row i for i < old, then recent
// row i - old. Grid: x splits, y tiles, z batch * KV heads; 8 simdgroups.
//
// ZM_CODED (BITS, GS): kept rows are codes, but for the residual ones, and so are the first `closed` recent rows; with
// their scales and biases there are more arrays, so that numbers come in `counts` and `settings`, for Metal takes 31.
//
// SPLIT (several splits or tiles): the outputs are scratch for attend_join: output the unnormalised
// float32 outputs [B, H, G, splits, DV], new_kept_score the logits [B, H, G, capacity], new_recent_score
// the (maximum, sum) behind each of the outputs [B, H, G, splits, 2].

constexpr int SIMDS = 8;
constexpr int PADDED = GT > 4 ? 8 : GT > 2 ? 4 : GT;  // 8 dot products go through one reduction:
constexpr int BLOCK = 8 / PADDED;                     // those of BLOCK rows with all heads of the tile
constexpr int FLIGHT = BLOCK > 4 ? BLOCK : 4;         // rows that a simdgroup loads at once
#ifdef ZM_CODED
constexpr int ND = Lane<D>::size == 3 ? 4 : Lane<D>::size, NV = Lane<DV>::size == 3 ? 4 : Lane<DV>::size;  // whole bytes
const int departed = counts[0], filled = counts[1], capacity = counts[2], closed = counts[3];
const float scale = settings[0], alpha = settings[1], kappa = settings[2], decay = settings[3], cap = settings[4];
#else
constexpr int ND = Lane<D>::size, NV = Lane<DV>::size, closed = 0;
#endif

threadgroup float logits[GT * ROWS];  // later the probabilities, not normalised
threadgroup float log_mass[ROWS];
threadgroup float shared[SIMDS * (D > DV ? D : DV)];
threadgroup float half_norms[GT], peaks[GT], sums[GT];

const int me = thread_index_in_threadgroup;
const int simd = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
const int split = threadgroup_position_in_grid.x, splits = threadgroups_per_grid.x;
const int tile = threadgroup_position_in_grid.y, bh = threadgroup_position_in_grid.z;

const int kept_rows = kept_keys_shape[1], heads = recent_keys_shape[1];
const int open_rows = recent_keys_shape[2], recent_rows = closed + open_rows;
const int b = bh / heads, h = bh % heads;
const int edge = lane < 2 ? starts[h + lane] : 0;
const int start = simd_broadcast(edge, 0), rows = simd_broadcast(edge, 1) - start;
const size_t first = size_t(b) * kept_rows + start;  // of the head's kept rows
const size_t recent = size_t(bh) * recent_rows, newest = size_t(bh) * open_rows;  // of its scores, and of its numbers
const int old = min(departed, rows), total = old + filled;
const int merged = departed > rows ? R : 0;
const int length = (total + splits - 1) / splits;
const int begin = min(split * length, total), count = min(length, total - begin);
const size_t head = size_t(bh) * G + tile * GT;  // first query head of the tile
const int members = min(GT, G - tile * GT);

// Queries, scaled, and the log mass of each row.
for (int i = me; i < GT * D; i += SIMDS * 32)
  shared[i] = i < members * D ? float(queries[head * D + i]) * scale : 0.0f;
for (int j = me; j < count; j += SIMDS * 32) {
  log_mass[j] = zm_log_mass(begin + j < old ? kept_weight[first + begin + j] : 1.0f, alpha);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float q[GT][ND];
for (int g = 0; g < GT; g++)
  for (int e = 0; e < ND; e++)
    q[g][e] = lane * ND + e < D ? shared[g * D + lane * ND + e] : 0.0f;
if (simd < GT) {
  float square = 0;
  for (int i = lane; i < D; i += 32) square += shared[simd * D + i] * shared[simd * D + i];
  square = simd_sum(square);
  if (lane == 0) half_norms[simd] = 0.5f * square;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// A lane's elements of row i; every lane of the simdgroup reads the same row.
#ifdef ZM_CODED
#define ZM_CODES(store, at, x, width, keys, key) \
  zm_decoded<BITS, GS, width>( \
      store##_##keys + (at) * (width * BITS / 32), store##_##key##_scales + (at) * (width / GS), \
      store##_##key##_biases + (at) * (width / GS), lane, x)
#define ZM_ROW(x, width, keys, key) \
  if (i < merged) zm_numbers<width>(residual_##keys + (size_t(bh) * R + i) * width, lane, x); \
  else if (i < old) ZM_CODES(kept, first + i, x, width, keys, key); \
  else if (i < old + closed) ZM_CODES(closed, size_t(bh) * closed + i - old, x, width, keys, key); \
  else zm_numbers<width>(recent_##keys + (newest + i - old - closed) * width, lane, x)
#else
#define ZM_ROW(x, width, keys, key) \
  zm_numbers<width>(i < old ? kept_##keys + (first + i) * width : recent_##keys + (newest + i - old) * width, lane, x)
#endif

// Logits. Rows of weight 0 are not read.
for (int j0 = simd * FLIGHT; j0 < count; j0 += SIMDS * FLIGHT) {
  float k[FLIGHT][ND];
  for (int r = 0; r < FLIGHT; r++) {
    const int j = j0 + r, i = begin + j;
    const bool used = j < count && log_mass[j] != ZM_NEG_INF;
    for (int e = 0; e < ND; e++) k[r][e] = 0;
    if (used) { ZM_ROW(k[r], D, keys, key); }
  }
#pragma clang loop unroll(full)
  for (int r0 = 0; r0 < FLIGHT; r0 += BLOCK) {
    float dots[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int r = 0; r < BLOCK; r++)
      for (int g = 0; g < GT; g++)
        for (int e = 0; e < ND; e++) dots[r * PADDED + g] += q[g][e] * k[r0 + r][e];
    const float dot = zm_sum_of_8(dots, lane);  // of row lane / 4 / PADDED, head lane / 4 % PADDED
    const int g = lane / 4 % PADDED, j = j0 + r0 + lane / 4 / PADDED, i = begin + j;
    if (lane % 4 == 0 && g < GT && j < count) {
      const float spread = i < merged ? residual_spread[size_t(bh) * R + i] : 0.0f;
      const float score = CAPPED ? zm_capped(dot, cap) : dot;
      const float logit = zm_compensated(score, log_mass[j], kappa, spread, half_norms[g]);
      logits[g * ROWS + j] = logit;
      if (SPLIT && g < members) new_kept_score[(head + g) * capacity + i] = logit;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Softmax: one head a simdgroup.
if (simd < GT) {
  threadgroup float* of_head = logits + simd * ROWS;
  const float sink = SINKS && !SPLIT ? float(sinks[h * G + simd]) : ZM_NEG_INF;
  float peak = sink, sum = 0;
  for (int j = lane; j < count; j += 32) peak = max(peak, of_head[j]);
  peak = simd_max(peak);
  const float level = peak == ZM_NEG_INF ? 0 : peak;  // no row holds anything: all probabilities are 0
  for (int j = lane; j < count; j += 32) {
    const float p = exp(of_head[j] - level);
    of_head[j] = p;
    sum += p;
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    peaks[simd] = peak;
    sums[simd] = sum + exp(sink - level);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Values. Rows of weight 0 are not read.
float acc[GT][NV];
for (int g = 0; g < GT; g++)
  for (int e = 0; e < NV; e++) acc[g][e] = 0;
for (int j0 = simd * FLIGHT; j0 < count; j0 += SIMDS * FLIGHT) {
  float v[FLIGHT][NV];
  for (int r = 0; r < FLIGHT; r++) {
    const int j = j0 + r, i = begin + j;
    const bool used = j < count && log_mass[j] != ZM_NEG_INF;
    for (int e = 0; e < NV; e++) v[r][e] = 0;
    if (used) { ZM_ROW(v[r], DV, values, value); }
  }
  for (int r = 0; r < FLIGHT; r++)
    for (int g = 0; g < GT; g++) {
      const float p = j0 + r < count ? logits[g * ROWS + j0 + r] : 0.0f;
      for (int e = 0; e < NV; e++) acc[g][e] += p * v[r][e];
    }
}

// Sum over the simdgroups, head by head.
#pragma clang loop unroll(full)
for (int g = 0; g < GT; g++) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = 0; e < NV; e++)
    if (lane * NV + e < DV) shared[simd * DV + lane * NV + e] = acc[g][e];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (g >= members) continue;
  for (int d = me; d < DV; d += SIMDS * 32) {
    float sum = 0;
    for (int s = 0; s < SIMDS; s++) sum += shared[s * DV + d];
    if (SPLIT)
      output[((head + g) * splits + split) * DV + d] = static_cast<O>(sum);
    else
      output[(head + g) * DV + d] = static_cast<O>(sum / sums[g]);
  }
}

if (SPLIT) {
  if (me < members) {
    new_recent_score[((head + me) * splits + split) * 2] = peaks[me];
    new_recent_score[((head + me) * splits + split) * 2 + 1] = sums[me];
  }
} else {
  for (int i = me; i < rows + recent_rows; i += SIMDS * 32) {
    const bool in_kept = i < rows;
    const int j = in_kept ? i : old + i - rows;  // among the filled rows
    float mass = 0;
    if (in_kept ? i < old : i - rows < filled)
      for (int g = 0; g < GT; g++) mass += logits[g * ROWS + j] / sums[g];
    if (in_kept)
      new_kept_score[first + i] = decay * kept_score[first + i] + mass;
    else
      new_recent_score[recent + i - rows] = i - rows < filled ? decay * recent_score[recent + i - rows] + mass : 0.0f;
  }
}
