// Grouped-query attention of every row over its own sequence's run of cells, run inside ggml's threads as a custom op. The segments
// of a run are a table (AttentionSegment), so a program is recorded once and no row looks at another sequence's cells.
//
// A unit of work is a few neighbouring rows times the query heads that share a key head. It streams its cells in chunks: scores
// of a chunk, running maximum and sum (online softmax; Milakov and Gimelshein, 2018), weighted sum of the values. Threads
// divide the units by their cost. The caller has checked the table; D is a multiple of 16, at most 256.

#include "numbers.h"

#define CHUNK 64
#define LOT 16 // cells whose scores are reduced together
#define QUERIES 16
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
  int64_t seen; // cells that the first row sees; each further row sees one more
};

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

INLINE void numbers(const uint8_t *p, int half, int64_t D, float *out) {
  for (int64_t d = 0; d < D; d += LANES) *(vec *)(out + d) = half ? halves(p + d * 2) : *(const vec *)(p + d * 4);
}

// scores[m][c] = q[m] · k[c] of M queries and one lot of cells, k as f32 [LOT, D].
#define SCORES(M)                                                                                                     \
  static void scores_##M(const float *const *q, const float *k, int64_t D, float (*scores)[CHUNK]) {                  \
    const float scale = 1.f / __builtin_sqrtf((float)D);                                                              \
    for (int c = 0; c < LOT; c += 4) {                                                                                \
      vec sums[M][4];                                                                                                 \
      for (int m = 0; m < M; m++)                                                                                     \
        for (int i = 0; i < 4; i++) sums[m][i] = (vec){0};                                                            \
      for (int64_t d = 0; d < D; d += LANES) {                                                                        \
        vec cell[4];                                                                                                  \
        for (int i = 0; i < 4; i++) cell[i] = *(const vec *)(k + (c + i) * D + d);                                    \
        for (int m = 0; m < M; m++) {                                                                                 \
          vec a = *(const vec *)(q[m] + d);                                                                           \
          for (int i = 0; i < 4; i++) sums[m][i] += a * cell[i];                                                      \
        }                                                                                                             \
      }                                                                                                               \
      for (int m = 0; m < M; m++) *(four *)(scores[m] + c) = scale * sums4(sums[m]);                                  \
    }                                                                                                                 \
  }
SCORES(1) SCORES(2) SCORES(3) SCORES(4)

static void lot_scores(int64_t queries, const float *const *q, const float *k, int64_t D, float (*scores)[CHUNK]) {
  for (; queries >= 4 && queries != 5 && queries != 6; queries -= 4, q += 4, scores += 4) scores_4(q, k, D, scores);
  for (; queries >= 3; queries -= 3, q += 3, scores += 3) scores_3(q, k, D, scores);
  if (queries == 2) scores_2(q, k, D, scores);
  if (queries == 1) scores_1(q, k, D, scores);
}

// y += Σ scores[c] · v[c] over a lot's cells, v as f32 [LOT, D]: four vectors of y at a time in registers.
static inline void lot_values(const float *scores, const float *v, int64_t cells, int64_t D, float *y) {
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) {
    vec sums[4];
    for (int i = 0; i < 4; i++) sums[i] = *(vec *)(y + d + i * LANES);
    for (int64_t c = 0; c < cells; c++)
      for (int i = 0; i < 4; i++) sums[i] += scores[c] * *(const vec *)(v + c * D + d + i * LANES);
    for (int i = 0; i < 4; i++) *(vec *)(y + d + i * LANES) = sums[i];
  }
  for (; d < D; d += LANES) {
    vec sum = *(vec *)(y + d);
    for (int64_t c = 0; c < cells; c++) sum += scores[c] * *(const vec *)(v + c * D + d);
    *(vec *)(y + d) = sum;
  }
}

static void attend_unit(const struct unit *u) {
  float lot[LOT * HEAD_MAX], scores[QUERIES][CHUNK], y[QUERIES * HEAD_MAX], top[QUERIES], total[QUERIES];
  const int64_t D = u->D, queries = u->rows * u->heads, end = u->seen + u->rows - 1;
  const float *q[QUERIES];
  for (int64_t m = 0; m < queries; m++) {
    q[m] = u->q + m / u->heads * u->row_stride + m % u->heads * D;
    top[m] = LOW, total[m] = 0;
  }
  memset(y, 0, queries * D * sizeof *y);
  for (int64_t first = 0; first < end; first += CHUNK) {
    int64_t count = end - first < CHUNK ? end - first : CHUNK;
    for (int64_t c = 0; c < count; c += LOT) {
      int64_t cells = count - c < LOT ? count - c : LOT;
      for (int64_t i = 0; i < cells; i++) {
        const uint8_t *next = u->k + (first + c + i + LOT) * u->cell_bytes; // beyond the run it is a hint, not a read
        for (int64_t at = 0; at < D * 2; at += 64) __builtin_prefetch(next + at);
        numbers(u->k + (first + c + i) * u->cell_bytes, u->half, D, lot + i * D);
      }
      memset(lot + cells * D, 0, (LOT - cells) * D * sizeof *lot);
      float(*into)[CHUNK] = (float(*)[CHUNK])(&scores[0][c]); // the same rows, from cell c on
      lot_scores(queries, q, lot, D, into);
    }
    for (int64_t m = 0; m < queries; m++) {
      int64_t seen = u->seen + m / u->heads - first; // of this chunk
      float *s = scores[m], high = top[m];
      for (int64_t c = seen < 0 ? 0 : seen; c < CHUNK; c++) s[c] = LOW;
      for (int64_t c = 0; c < count && c < seen; c++) high = s[c] > high ? s[c] : high;
      if (seen <= 0) continue;
      float shrink = exponential(splat(top[m] - high))[0];
      vec added = {0};
      for (int64_t c = 0; c < CHUNK; c += LANES) {
        vec p = exponential(*(vec *)(s + c) - high), keep = *(vec *)(s + c);
        p = (vec)((words)p & (words)(keep > LOW));
        *(vec *)(s + c) = p;
        added += p;
      }
      total[m] = total[m] * shrink + sum(added);
      top[m] = high;
      if (shrink != 1)
        for (int64_t d = 0; d < D; d += LANES) *(vec *)(y + m * D + d) *= shrink;
    }
    for (int64_t c = 0; c < count; c += LOT) {
      int64_t cells = count - c < LOT ? count - c : LOT;
      for (int64_t i = 0; i < cells; i++) {
        const uint8_t *next = u->v + (first + c + i + LOT) * u->cell_bytes;
        for (int64_t at = 0; at < D * 2; at += 64) __builtin_prefetch(next + at);
        numbers(u->v + (first + c + i) * u->cell_bytes, u->half, D, lot + i * D);
      }
      for (int64_t m = 0; m < queries; m++) {
        if (u->seen + m / u->heads <= first + c) continue;
        lot_values(scores[m] + c, lot, cells, D, y + m * D);
      }
    }
  }
  for (int64_t m = 0; m < queries; m++) {
    float *out = u->y + m / u->heads * u->row_stride + m % u->heads * D;
    for (int64_t d = 0; d < D; d += LANES) *(vec *)(out + d) = *(vec *)(y + m * D + d) / total[m];
  }
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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
    for (int64_t row = 0; row < span.row_count; row += block) {
      int64_t rows = least(block, span.row_count - row);
      for (int64_t head = 0, count; head < H; head += count) {
        count = least(heads, share - head % share); // never past the heads of one key head
        double cost = (double)rows * span.cells * count / share;
        int owner = total > 0 ? (int)((before + cost / 2) / total * nth) : 0;
        before += cost;
        if ((owner < nth ? owner : nth - 1) != ith) continue;
        size_t at = span.cell_base * k->nb[1] + head / share * D * k->nb[0], from = (span.row_start + row) * H * D + head * D;
        struct unit u = {(const float *)q->data + from, (float *)dst->data + from, H * D, count, rows, D,
                         (const uint8_t *)k->data + at, (const uint8_t *)v->data + at, k->nb[1], k->type == F16,
                         span.cells - span.row_count + row + 1};
        attend_unit(&u);
      }
    }
  }
}
