// The third launch of compact: one simdgroup a row of the new kept store, copied from where `source` says (common.h).
const int lane = thread_index_in_simdgroup;
const int K = kept_keys_shape[1], H = recent_keys_shape[1], recent_rows = recent_keys_shape[2];
const size_t b = thread_position_in_grid.z, to = b * K + thread_position_in_grid.y;
const int c = ZM_UNIFORM(source[to]);

const device T *k, *v;
float row_weight = 1, row_score = 0;
int row_position = -1;
if (c < 0) {
  const size_t from = b * H * R + size_t(-1 - c);
  k = merged_keys + from * D;
  v = merged_values + from * DV;
  if (lane == 0) {
    row_weight = merged_weight[from];
    row_score = merged_score[from];
  }
} else if (c < 2 * K) {
  const size_t from = b * K + size_t(c < K ? c : c - K);
  k = kept_keys + from * D;
  v = kept_values + from * DV;
  if (lane == 0) {
    if (c < K) row_weight = kept_weight[from];
    row_score = kept_score[from];
    row_position = kept_position[from];
  }
} else {
  const size_t row = size_t(c - 2 * K), from = b * H * recent_rows + row;
  k = recent_keys + from * D;
  v = recent_values + from * DV;
  if (lane == 0) {
    row_score = recent_score[from];
    row_position = departed + int(row % recent_rows);
  }
}
if (lane == 0) {
  new_kept_weight[to] = row_weight;
  new_kept_score[to] = row_score;
  new_kept_position[to] = row_position;
}
// 16 bytes a lane: every supported row is a multiple of that.
constexpr int UNIT = 16 / sizeof(T), KEY_UNITS = D / UNIT, UNITS = (D + DV) / UNIT;
for (int i = lane; i < UNITS; i += 32) {
  const int j = i - KEY_UNITS;
  if (j < 0) {
    ((device uint4*)(new_kept_keys + to * D))[i] = ((const device uint4*)k)[i];
  } else {
    ((device uint4*)(new_kept_values + to * DV))[j] = ((const device uint4*)v)[j];
  }
}
