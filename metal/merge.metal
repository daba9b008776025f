// The second launch of compact, one threadgroup a head: its victims join residual rows, TILE at a time (method.md 4).
//
// A victim's key is read once, into threadgroup memory: for the dot products with all residual rows
// (a simdgroup keeps its share of those in registers) and then for the sums. A value is read once,
// by the thread that adds it. A thread keeps the sums of one column of the keys or values for every
// GROUPS-th residual row in registers, and adds the victims in their order.
constexpr int TILE = 16, SIMDS = 16, THREADS = SIMDS * 32;
constexpr int W = D + DV, GROUPS = THREADS / W, SUMS = (R + GROUPS - 1) / GROUPS;
constexpr int SHARES = R < SIMDS ? SIMDS / R : 1;                     // simdgroups that share a residual row
constexpr int CENTRES = (R + SIMDS - 1) / SIMDS, PART = (D + 31) / 32;  // a simdgroup's rows, a lane's elements
threadgroup T tile[TILE][D];
threadgroup float dots[TILE][R], square[TILE], victim_score[TILE], norms[THREADS], total[R], squares[R];
threadgroup int from[TILE], target[TILE];

const int t = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int h = threadgroup_position_in_grid.x, b = threadgroup_position_in_grid.y;
const int K = kept_keys_shape[1], H = recent_keys_shape[1], V = victims_shape[2];
const size_t head = size_t(b) * H + h, row = head * R;  // the head's first residual row in the outputs
const size_t old = size_t(b) * K, recent = size_t(b) * H * recent_keys_shape[2];
const int first = ZM_UNIFORM(starts[h]), count = ZM_UNIFORM(victim_count[head]), now = ZM_UNIFORM(phase[head]);
const bool raw = now == 0, fresh = now == 1, join = now == 2;

// The residual rows whose dot products this simdgroup computes, and its share of the victims of a tile.
const int first_centre = R < SIMDS ? simd % R : simd, share = R < SIMDS ? simd / R : 0;
float centre[CENTRES][PART];
if (R < SIMDS && join) {  // those that share a row read it once
  for (int d = lane; d < D && simd < R; d += 32) tile[simd][d] = kept_keys[(old + first + simd) * D + d];
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (int j = 0; j < CENTRES && join; j++) {
  for (int i = 0; i < PART; i++) {
    const int r = first_centre + j * SIMDS, d = lane + 32 * i;
    if (R < SIMDS) {
      centre[j][i] = d < D ? float(tile[r][d]) : 0.0f;
    } else {
      centre[j][i] = r < R && d < D ? float(kept_keys[(old + first + r) * D + d]) : 0.0f;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const int column = t % W, group = t / W;
const bool adds = group < GROUPS;
float sum[SUMS];
for (int a = 0; a < SUMS; a++) sum[a] = 0;
float weight_sum = 0, square_total = 0, best = ZM_NEG_INF;  // of residual row t

for (int begin = 0; begin < count; begin += TILE) {
  const int size = min(TILE, count - begin);
  if (simd < size) {  // a simdgroup loads one victim
    const int c = ZM_UNIFORM(victims[head * V + begin + simd]) - K;
    float norm = 0;
    for (int i = 0; i < PART; i++) {
      const int d = lane + 32 * i;
      if (d >= D) break;
      T k = c < K ? kept_keys[(old + c) * D + d] : recent_keys[(recent + c - K) * D + d];
      tile[simd][d] = k;
      norm += float(k) * float(k);
    }
    norm = simd_sum(norm);
    if (lane == 0) {
      from[simd] = c;
      square[simd] = norm;
      victim_score[simd] = c < K ? kept_score[old + c] : recent_score[recent + c - K];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (join && share < SHARES) {
    for (int v = share; v < size; v += SHARES) {
      for (int j = 0; j < CENTRES; j++) {
        float dot = 0;
        for (int i = 0; i < PART; i++) {
          const int d = lane + 32 * i;
          if (d < D) dot += float(tile[v][d]) * centre[j][i];
        }
        dot = simd_sum(dot);
        const int r = first_centre + j * SIMDS;
        if (lane == 0 && r < R) dots[v][r] = zm_is_nan(dot) ? ZM_NEG_INF : dot;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t < size) {
    int r = 0;
    if (fresh) {
      r = (begin + t) * R / count;  // contiguous groups of equal size
    } else {
      for (int i = 1; i < R; i++) r = dots[t][i] > dots[t][r] ? i : r;
    }
    target[t] = r;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (adds) {
    for (int v = 0; v < size; v++) {
      if (target[v] % GROUPS != group) continue;
      const int d = column - D, c = from[v];
      float x;
      if (d < 0) {
        x = float(tile[v][column]);
      } else {
        x = float(c < K ? kept_values[(old + c) * DV + d] : recent_values[(recent + c - K) * DV + d]);
      }
      for (int a = 0; a < SUMS; a++) sum[a] += a == target[v] / GROUPS ? x : 0.0f;
    }
  }
  if (t < R) {
    for (int v = 0; v < size; v++) {
      if (target[v] != t) continue;
      weight_sum += 1;
      square_total += square[v];
      best = max(best, victim_score[v]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

if (t < R) {
  if (!fresh) square_total += square_sum[row + t];
  if (join) {
    weight_sum += kept_weight[old + first + t];
    best = max(best, kept_score[old + first + t]);
  }
  total[t] = max(weight_sum, 1.0f);
  merged_weight[row + t] = weight_sum;
  merged_score[row + t] = weight_sum > 0 ? best : 0.0f;
  squares[t] = new_square_sum[row + t] = square_total;
  if (raw) new_spread[row + t] = residual_spread[row + t];
}
for (int a = 0; a < SUMS; a++) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int r = group + a * GROUPS, d = column - D;
  if (adds && r < R) {
    if (d < 0) {
      const size_t at = (row + r) * D + column;
      float s = fresh ? sum[a] : key_sum[at] + sum[a];
      float mean = s / total[r];
      new_key_sum[at] = s;
      merged_keys[at] = static_cast<T>(mean);
      norms[group * D + column] = mean * mean;
    } else {
      const size_t at = (row + r) * DV + d;
      float s = fresh ? sum[a] : value_sum[at] + sum[a];
      new_value_sum[at] = s;
      merged_values[at] = static_cast<T>(s / total[r]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int mine = simd + a * GROUPS;
  if (simd < GROUPS && mine < R && !raw) {
    float norm = 0;
    for (int d = lane; d < D; d += 32) norm += norms[simd * D + d];
    norm = simd_sum(norm);
    if (lane == 0) new_spread[row + mine] = max(0.0f, squares[mine] / total[mine] - norm) / D;
  }
}
