// The second launch of attend, where rows are split or a KV head has several tiles of query heads:
// joins the partial outputs [B, H, G, splits, DV] by their (maximum, sum) and turns the logits
// [B, H, G, capacity] into scores. Grid: x one threadgroup for the output of each query head, then
// one for every CHUNK rows of the head; z batch * KV heads; 8 simdgroups.

constexpr int SIMDS = 8;
threadgroup float peaks[G], inverse[G];  // maximum and 1 / sum of each query head over all splits
threadgroup float shares[SIMDS * 32];    // of 256 splits in the output

const int me = thread_index_in_threadgroup;
const int simd = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
const int part = threadgroup_position_in_grid.x, bh = threadgroup_position_in_grid.z;
const int kept_rows = kept_score_shape[1], heads = recent_score_shape[1], recent_rows = recent_score_shape[2];
const int capacity = logits_shape[3], splits = partial_output_shape[3];
const int b = bh / heads, h = bh % heads;
const size_t head = size_t(bh) * G;

const bool is_output = part < G;
for (int g = is_output ? part + simd * G : simd; g < G; g += SIMDS) {
  const size_t at = (head + g) * splits;
  const float sink = SINKS ? sinks[h * G + g] : ZM_NEG_INF;
  float peak = sink, sum = 0;
  for (int s = lane; s < splits; s += 32) peak = max(peak, partial_sums[(at + s) * 2]);
  peak = simd_max(peak);
  for (int s = lane; s < splits; s += 32)
    sum += partial_sums[(at + s) * 2 + 1] * exp(partial_sums[(at + s) * 2] - peak);
  sum = simd_sum(sum);
  if (lane == 0) {
    peaks[g] = peak;
    inverse[g] = 1 / (sum + exp(sink - peak));
  }
  if (is_output) break;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (is_output) {
  const size_t at = (head + part) * splits;
  float sum = 0;
  for (int s0 = 0; s0 < splits; s0 += SIMDS * 32) {
    if (s0 + me < splits) shares[me] = exp(partial_sums[(at + s0 + me) * 2] - peaks[part]) * inverse[part];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (me < DV)
      for (int s = 0; s < min(SIMDS * 32, splits - s0); s++) sum += shares[s] * partial_output[(at + s0 + s) * DV + me];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (me < DV) output[(head + part) * DV + me] = static_cast<O>(sum);
  return;
}

const int edge = lane < 2 ? starts[h + lane] : 0;
const int start = simd_broadcast(edge, 0), rows = simd_broadcast(edge, 1) - start, old = min(departed, rows);
const size_t first = size_t(b) * kept_rows + start, recent = size_t(bh) * recent_rows;
const int begin = (part - G) * CHUNK, end = min(begin + CHUNK, rows + recent_rows);
for (int i = begin + me; i < end; i += SIMDS * 32) {
  const bool in_kept = i < rows;
  const bool holds = in_kept ? i < old : i - rows < filled;
  float mass = 0;
  if (holds)
    for (int g = 0; g < G; g++)
      mass += exp(logits[(head + g) * capacity + (in_kept ? i : old + i - rows)] - peaks[g]) * inverse[g];
  if (in_kept)
    new_kept_score[first + i] = decay * kept_score[first + i] + mass;
  else
    new_recent_score[recent + i - rows] = holds ? decay * recent_score[recent + i - rows] + mass : 0.0f;
}
