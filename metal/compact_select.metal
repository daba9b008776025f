// The first launch of compact, one threadgroup a head: where each row of the new kept store comes from, and
// who is to be merged (method.md 4).
//
// The M-th largest pooled importance is found digit by digit (11, 11 and 10 bits) with integer
// histograms; a last pass in the order of positions hands out the rows. Importance goes through a ring in
// threadgroup memory, where a pool of up to RING rows stays: it is read once.
constexpr int RING = 5120, BINS = 2048;
threadgroup uint ring[RING];
threadgroup atomic_uint bins[BINS];
threadgroup uint sums[32];
threadgroup uint found[2];  // the digits so far; how many rows are still to be chosen below them

const int t = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int h = threadgroup_position_in_grid.x, b = threadgroup_position_in_grid.y;
const int K = kept_importance_shape[1], H = recent_importance_shape[1], recent_rows = recent_importance_shape[2];
const int first = ZM_UNIFORM(starts[h]), rows = ZM_UNIFORM(starts[h + 1]) - first;
const size_t head = size_t(b) * H + h;
device int* to = source + size_t(b) * K;
device int* merging = victims + head * max_victims;

if (departed + leaving <= rows) {  // raw phase: nothing is lost
  for (int i = t; i < rows; i += THREADS) {
    bool arrives = i >= departed && i < departed + leaving;
    to[first + i] = arrives ? zm_recent_row(h * recent_rows + i - departed, K) : first + i;
  }
  for (int i = t; i < max_victims; i += THREADS) merging[i] = -1;
  if (t == 0) victim_count[head] = phase[head] = 0;
  return;
}

// The pool: raw rows of the kept store (from row `begin`), then those that leave the recent one.
const bool fresh = departed <= rows;
const int begin = first + (fresh ? 0 : R), raw = fresh ? departed : rows - R;
const int n = raw + leaving, context = rows - R;
for (int i = t; i < R; i += THREADS) to[first + i] = -1 - (h * R + i);
for (int i = t + n - context; i < max_victims; i += THREADS) merging[i] = -1;
if (t == 0) {
  victim_count[head] = n - context;
  phase[head] = fresh ? 1 : 2;
}

uint least = ~0u, seats = context;  // rows above `least` are chosen, and `seats` of those level with it
uint above = 0, level = 0;          // how many of either there are among the rows done
int loaded = 0;
for (int pass = context > 0 ? 0 : 3; pass < 4; pass++) {
  const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, known = pass == 1 ? 21 : 10;
  for (int i = t; i < BINS && pass < 3; i += THREADS) atomic_store_explicit(&bins[i], 0, memory_order_relaxed);
  if (n > RING) loaded = 0;
  for (int done = 0; done < n;) {
    const int until = min(n, done + RING - reach);
    for (int i = loaded + t; i < until; i += THREADS) {
      float x = i < raw ? kept_importance[size_t(b) * K + begin + i] : recent_importance[head * recent_rows + i - raw];
      ring[i % RING] = zm_ordered(x);
    }
    loaded = max(loaded, until);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int ready = loaded == n ? n : loaded - reach;
    for (int base = done; base < ready; base += THREADS) {
      const int i = base + t;
      uint pooled = 0;
      if (i < ready) {
        for (int j = max(0, i - reach); j <= min(n - 1, i + reach); j++) pooled = max(pooled, ring[j % RING]);
      }
      if (pass < 3) {
        if (i < ready && (pass == 0 || (pooled ^ least) >> known == 0)) {
          atomic_fetch_add_explicit(&bins[(pooled >> shift) % (pass < 2 ? 2048 : 1024)], 1, memory_order_relaxed);
        }
        continue;
      }
      const bool is_above = i < ready && pooled > least, is_level = i < ready && pooled == least;
      uint total;
      uint before = zm_scan(uint(is_above) << 16 | uint(is_level), sums, lane, simd, THREADS / 32, total);
      const uint older = level + (before & 0xffff);  // rows level with this one
      const int slot = above + (before >> 16) + min(older, seats);
      above += total >> 16;
      level += total & 0xffff;
      if (i < ready) {
        int from = i < raw ? zm_kept_row(begin + i, K) : zm_recent_row(h * recent_rows + i - raw, K);
        if (is_above || (is_level && older < seats)) to[first + R + slot] = from;
        else if (i - slot < max_victims) merging[i - slot] = from;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    done = ready;
  }
  if (pass < 3) {  // the digit below whose higher ones fewer than `seats` rows lie
    constexpr int each = BINS / THREADS;
    uint count = 0, total;
    for (int i = 0; i < each; i++) {
      count += atomic_load_explicit(&bins[BINS - 1 - (t * each + i)], memory_order_relaxed);
    }
    uint before = zm_scan(count, sums, lane, simd, THREADS / 32, total);
    if (before < seats && seats <= before + count) {
      uint digit = BINS - 1 - t * each;
      for (uint here; before + (here = atomic_load_explicit(&bins[digit], memory_order_relaxed)) < seats; digit--) {
        before += here;
      }
      found[0] = (pass == 0 ? 0 : least) | digit << shift;
      found[1] = seats - before;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    least = found[0];
    seats = found[1];
  }
}
