// Grouped-query attention of every row over its own sequence's run of cells, run inside ggml's threads as a custom op. The segments
// of a run are a table (AttentionSegment), so a program is recorded once and no row looks at another sequence's cells.
//
// A unit of work is a few neighbouring rows times the query heads that share a key head. It streams its cells in chunks: scores
// of a chunk, running maximum and sum (online softmax; Milakov and Gimelshein, 2018), weighted sum of the values. Threads
// divide the units by their cost. The caller has checked the table; D is a multiple of 16, at most 256.

#include "numbers.h"

#define CHUNK 64
#define LOT 16 // cells whose scores are reduced together
#define QUERIES 32 // of a unit
#define HEAD_MAX 256
#define LOW (-3.0e38f)

struct span {
  int32_t row_start, row_count, cell_base, cells;
};

struct unit {
  const float *q; // first query
  float *y;
  int64_t row_stride, heads, rows, D; // queries = rows · heads; neighbours of a head are D apart
  const uint8_t *k, *v;               // first cell of the run, at this key head
  size_t cell_bytes;
  int half; // cells are f16
  int64_t groups; // key heads; more than one only for a lone row
  int64_t seen; // cells that the first row sees; each further row sees one more
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// e^x for x ≤ 0: 2^n · e^r with |r| ≤ ln 2 / 2, degree 6 (relative error below 3e-7); 0 far below.
static inline vec exponential(vec x) {
  x = (vec)(((words)x & (words)(x > -87.f)) | ((words)splat(-87.f) & ~(words)(x > -87.f)));
  const float magic = 12582912.f; // 1.5 · 2^23: adding it rounds to an integer
  vec n = (x * 1.44269504f + magic) - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = splat(1.38888889e-3f);
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return (vec)((words)p + ((words)__builtin_convertvector(n, ints) << 23));
}

// Cells side by side: `half` ones of the cache, or f32 ones that were made of them.
struct cells {
  const uint8_t *at;
  size_t bytes;
  int64_t count;
};

INLINE vec numbers(const uint8_t *p, const int half, int64_t d) {
  return half ? halves(p + d * 2) : *(const vec *)(p + d * 4);
}

// What will be needed next, fetched into the second cache a share with every cell: in order, so that the machine's own
// prefetcher follows (6.5 -> 16 GB/s on one core of a Zen 4).
struct ahead {
  const uint8_t *at; // null: nothing
  size_t share;      // bytes a cell
};

INLINE void fetch(struct ahead next, int64_t cell, int64_t cells) {
  for (size_t at = 0; at < cells * next.share; at += 64) __builtin_prefetch(next.at + cell * next.share + at, 0, 2);
}

// scores[m][c] = q[m] · cell c of M queries. Each cell is loaded once for all of them.
INLINE void scores_of(const int M, const int half, const float *const *q, struct cells k, int64_t D,
                      float (*scores)[CHUNK], struct ahead next) {
  const float scale = 1.f / __builtin_sqrtf((float)D);
  for (int64_t c = 0; c < k.count; c += 4) {
    const uint8_t *cell[4]; // beyond the last: the last again, whose scores nobody looks at
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) cell[i] = k.at + (c + i < k.count ? c + i : k.count - 1) * k.bytes;
    if (next.at) fetch(next, c, 4);
    vec sums[4][4];
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 4; i++) sums[m][i] = (vec){0};
    for (int64_t d = 0; d < D; d += LANES) {
      vec v[4];
      for (int i = 0; i < 4; i++) v[i] = numbers(cell[i], half, d);
      for (int m = 0; m < M; m++) {
        vec a = *(const vec *)(q[m] + d);
        for (int i = 0; i < 4; i++) sums[m][i] += a * v[i];
      }
    }
    for (int m = 0; m < M; m++) *(four *)(scores[m] + c) = scale * sums4(sums[m]);
  }
}

// y[m] += Σ scores[m][c] · cell c, W vectors of y at a time in registers.
INLINE void values_at(const int M, const int W, const int half, const float (*scores)[CHUNK], struct cells v, int64_t D,
                      float *y, int64_t d, struct ahead next) {
  vec sums[4][4];
  for (int m = 0; m < M; m++)
    for (int i = 0; i < W; i++) sums[m][i] = *(vec *)(y + m * D + d + i * LANES);
  for (int64_t c = 0; c < v.count; c++) {
    vec cell[4];
    if (next.at && c % 4 == 0) fetch(next, c, 4);
    for (int i = 0; i < W; i++) cell[i] = numbers(v.at + c * v.bytes, half, d + i * LANES);
    for (int m = 0; m < M; m++)
      for (int i = 0; i < W; i++) sums[m][i] += scores[m][c] * cell[i];
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < W; i++) *(vec *)(y + m * D + d + i * LANES) = sums[m][i];
}

INLINE void values_of(const int M, const int half, const float (*scores)[CHUNK], struct cells v, int64_t D, float *y,
                      struct ahead next) {
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) values_at(M, 4, half, scores, v, D, y, d, d == 0 ? next : (struct ahead){0, 0});
  for (; d < D; d += LANES) values_at(M, 1, half, scores, v, D, y, d, d == 0 ? next : (struct ahead){0, 0});
}

#define KIND(M, HALF, NAME)                                                                                           \
  static void scores_##M##NAME(const float *const *q, struct cells k, int64_t D, float (*s)[CHUNK], struct ahead a) { \
    scores_of(M, HALF, q, k, D, s, a);                                                                                \
  }                                                                                                                   \
  static void values_##M##NAME(const float (*s)[CHUNK], struct cells v, int64_t D, float *y, struct ahead a) {      \
    values_of(M, HALF, s, v, D, y, a);                                                                                \
  }
KIND(1, 1, h) KIND(2, 1, h) KIND(3, 1, h) KIND(4, 1, h) KIND(1, 0, f) KIND(2, 0, f) KIND(3, 0, f) KIND(4, 0, f)

typedef void scores_function(const float *const *, struct cells, int64_t, float (*)[CHUNK], struct ahead);
typedef void values_function(const float (*)[CHUNK], struct cells, int64_t, float *, struct ahead);
static scores_function *const scores_by[2][4] = {{scores_1f, scores_2f, scores_3f, scores_4f},
                                                 {scores_1h, scores_2h, scores_3h, scores_4h}};
static values_function *const values_by[2][4] = {{values_1f, values_2f, values_3f, values_4f},
                                                 {values_1h, values_2h, values_3h, values_4h}};

// A chunk's scores become weights; the running maximum, sum and y are brought to the new maximum.
static void soften(float *s, int64_t seen, int64_t D, float *top, float *total, float *y) {
  for (int64_t c = seen < 0 ? 0 : seen; c < CHUNK; c++) s[c] = LOW;
  vec most = splat(*top), added = {0};
  for (int64_t c = 0; c < CHUNK; c += LANES) {
    vec x = *(vec *)(s + c);
    most = (vec)(((words)x & (words)(x > most)) | ((words)most & ~(words)(x > most)));
  }
  float high = most[0];
  for (int i = 1; i < LANES; i++) high = most[i] > high ? most[i] : high;
  for (int64_t c = 0; c < CHUNK; c += LANES) {
    vec x = *(vec *)(s + c), p = exponential(x - high);
    p = (vec)((words)p & (words)(x > LOW));
    *(vec *)(s + c) = p;
    added += p;
  }
  if (high == *top) {
    *total += sum(added);
    return;
  }
  float shrink = exponential(splat(*top - high))[0];
  *total = *total * shrink + sum(added);
  *top = high;
  for (int64_t d = 0; d < D; d += LANES) *(vec *)(y + d) *= shrink;
}

static void widen(struct cells from, int half, int64_t D, float *lot) {
  for (int64_t i = 0; i < from.count; i++)
    for (int64_t d = 0; d < D; d += LANES) *(vec *)(lot + i * D + d) = numbers(from.at + i * from.bytes, half, d);
}

static struct cells chunk_of(const uint8_t *run, size_t bytes, int64_t first, int64_t end) {
  return (struct cells){run + first * bytes, bytes, least(CHUNK, end - first)};
}

static void finish(const float *y, const float *total, int64_t queries, int64_t D, float *out) {
  for (int64_t m = 0; m < queries; m++)
    for (int64_t d = 0; d < D; d += LANES) *(vec *)(out + m * D + d) = *(const vec *)(y + m * D + d) / total[m];
}

// A lone row, straight from the cache. All its key heads go through a chunk together: their numbers lie side by side, so the
// chunk is read from memory once and in order.
static void attend_row(const struct unit *u) {
  float scores[QUERIES][CHUNK], y[QUERIES * HEAD_MAX], top[QUERIES], total[QUERIES];
  const int64_t D = u->D, M = u->heads, queries = M * u->groups, end = u->seen, step = D * (u->half ? 2 : 4);
  const float *q[QUERIES];
  for (int64_t m = 0; m < queries; m++) q[m] = u->q + m * D, top[m] = LOW, total[m] = 0;
  memset(y, 0, queries * D * sizeof *y);
  for (int64_t first = 0; first < end; first += CHUNK) {
    struct cells k = chunk_of(u->k, u->cell_bytes, first, end), v = chunk_of(u->v, u->cell_bytes, first, end);
    // The values of this chunk come while its keys are used, the keys of the next while its values are.
    const int last = first + CHUNK >= end;
    const int whole = (size_t)(step * u->groups) == k.bytes; // else most of a line would be other units'
    const size_t share = whole ? k.bytes / u->groups : 0, part = share * k.count;
    const uint8_t *values = v.at, *keys = k.at + CHUNK * k.bytes;
    for (int64_t g = 0; g < u->groups; g++, k.at += step)
      scores_by[u->half][M - 1](q + g * M, k, D, scores + g * M, (struct ahead){values + g * part, share});
    for (int64_t m = 0; m < queries; m++) soften(scores[m], end - first, D, top + m, total + m, y + m * D);
    for (int64_t g = 0; g < u->groups; g++, v.at += step)
      values_by[u->half][M - 1]((const float(*)[CHUNK])(scores + g * M), v, D, y + g * M * D,
                                (struct ahead){last ? 0 : keys + g * part, share});
  }
  finish(y, total, queries, D, u->y);
}

// Rows of one key head: a lot of cells is made f32 once for all of them.
static void attend_block(const struct unit *u) {
  float lot[LOT * HEAD_MAX], scores[QUERIES][CHUNK], y[QUERIES * HEAD_MAX], top[QUERIES], total[QUERIES];
  const int64_t D = u->D, queries = u->rows * u->heads, end = u->seen + u->rows - 1;
  const float *q[QUERIES];
  for (int64_t m = 0; m < queries; m++) {
    q[m] = u->q + m / u->heads * u->row_stride + m % u->heads * D;
    top[m] = LOW, total[m] = 0;
  }
  memset(y, 0, queries * D * sizeof *y);
  for (int64_t first = 0; first < end; first += CHUNK) {
    const struct cells k = chunk_of(u->k, u->cell_bytes, first, end), v = chunk_of(u->v, u->cell_bytes, first, end);
    for (int64_t c = 0; c < k.count; c += LOT) {
      const struct cells some = {k.at + c * k.bytes, k.bytes, least(LOT, k.count - c)};
      const struct cells wide = {(const uint8_t *)lot, D * sizeof(float), some.count};
      widen(some, u->half, D, lot);
      for (int64_t m = 0, group; m < queries; m += group) {
        group = least(4, queries - m);
        scores_by[0][group - 1](q + m, wide, D, (float(*)[CHUNK])(&scores[m][c]), (struct ahead){0, 0}); // the same rows, from cell c on
      }
    }
    for (int64_t m = 0; m < queries; m++)
      soften(scores[m], u->seen + m / u->heads - first, D, top + m, total + m, y + m * D);
    for (int64_t c = 0; c < v.count; c += LOT) {
      const struct cells some = {v.at + c * v.bytes, v.bytes, least(LOT, v.count - c)};
      const struct cells wide = {(const uint8_t *)lot, D * sizeof(float), some.count};
      widen(some, u->half, D, lot);
      for (int64_t m = 0, group; m < queries; m += group) {
        group = least(4, queries - m);
        if (u->seen + (m + group - 1) / u->heads <= first + c) continue;
        values_by[0][group - 1]((const float(*)[CHUNK])(&scores[m][c]), wide, D, y + m * D, (struct ahead){0, 0});
      }
    }
  }
  for (int64_t row = 0; row < u->rows; row++)
    finish(y + row * u->heads * D, total + row * u->heads, u->heads, D, u->y + row * u->row_stride);
}

// dst [H·D, T], src = {q [D, H, T], k [Hkv·D, cells], v, table [4, S] i32}; spans of no rows are unused.
void rankgate_attend(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const struct tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *table = dst->src[3];
  const int64_t D = q->ne[0], H = q->ne[1], groups = k->ne[0] / D, share = H / groups;
  const struct span *spans = table->data;
  double total = 0, before = 0;
  int64_t units = 0;
  for (int64_t s = 0; s < table->ne[1]; s++) {
    total += (double)spans[s].row_count * spans[s].cells * groups;
    units += spans[s].row_count * groups;
  }
  // Few rows are cut into single query heads, so that every thread has some.
  const int64_t heads = nth > 1 && units < 4 * nth ? 1 : least(share, QUERIES), block = QUERIES / heads;
  for (int64_t s = 0; s < table->ne[1]; s++) {
    const struct span span = spans[s];
    const int lone = span.row_count == 1 && heads <= 4;
    const int64_t together = lone && heads == share ? least(groups, QUERIES / share) : 1;
    for (int64_t row = 0; row < span.row_count; row += block) {
      int64_t rows = least(block, span.row_count - row);
      for (int64_t head = 0, count; head < H; head += count) {
        const int64_t wide = least(together, groups - head / share); // key heads
        const int64_t each = least(heads, share - head % share);     // never past the heads of one key head
        count = each * wide;
        double cost = (double)rows * span.cells * count / share;
        int owner = total > 0 ? (int)((before + cost / 2) / total * nth) : 0;
        before += cost;
        if ((owner < nth ? owner : nth - 1) != ith) continue;
        size_t at = span.cell_base * k->nb[1] + head / share * D * k->nb[0], from = (span.row_start + row) * H * D + head * D;
        struct unit u = {(const float *)q->data + from, (float *)dst->data + from, H * D, each, rows, D,
                         (const uint8_t *)k->data + at, (const uint8_t *)v->data + at, k->nb[1], k->type == F16, wide,
                         span.cells - span.row_count + row + 1};
        if (lone) attend_row(&u);
        else attend_block(&u);
      }
    }
  }
}
