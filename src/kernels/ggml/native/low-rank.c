// The low-rank delta of rows with different adapters and ranks, run inside ggml's threads as custom ops. Neighbouring rows with
// the same pages are one group: a group of one row streams its pages once, a larger one multiplies matrices. A rank whose
// gates (or values) are all zero in a group is not read. A row's gates are those of its use. Pages come from memory once a step, in pieces too short for the machine's
// own prefetcher: while one piece is used, the next is fetched into the second cache. The caller has checked shapes and indices; widths are multiples
// of 32.

#include "numbers.h"

#define PAGE 8
#define GROUP 16 // rows of a group at most: spreads a long prompt over the threads
#define QUAD 4   // ranks that are computed or skipped together

static int64_t group_end(const int32_t *pages, int64_t P, int64_t T, int64_t t) {
  int64_t end = t + 1;
  while (end < T && end - t < GROUP && memcmp(pages + t * P, pages + end * P, P * sizeof *pages) == 0) end++;
  return end;
}

// Ranks up to the last page of a group: the table has room for the widest row of all.
static int64_t ranks_of(const int32_t *pages, int64_t P) {
  while (P > 0 && pages[P - 1] == 0) P--;
  return P * PAGE;
}

// `uses` says which of the rows of `values` a row has; without, it has its own.
static int all_zero(const float *values, const int32_t *uses, int64_t stride, int64_t rows) {
  for (int64_t t = 0; t < rows; t++) {
    if (uses && t > 0 && uses[t] == uses[t - 1]) continue;
    for (int r = 0; r < QUAD; r++)
      if (values[(uses ? uses[t] : t) * stride + r] != 0) return 0;
  }
  return 1;
}

struct quad {
  const uint8_t *a; // QUAD rows of the pool
  size_t row_bytes;
  int64_t K, rows, stride; // of h and gate, in numbers
  const float *x, *gate;   // of use 0
  const int32_t *uses;     // of the group's rows
  float *h;
  int type;
  const uint8_t *next; // what will be read after this; null: nothing
};

// 32 numbers of a row without their common scale, which is returned: 1 where the type has none.
#define UNSCALED(TYPE) \
  static inline float unscaled_##TYPE(const uint8_t *row, int64_t b, vec v[VECS]) { \
    load_##TYPE(row, b, v); \
    return 1; \
  }
UNSCALED(f32) UNSCALED(f16) UNSCALED(bf16)
static inline float unscaled_q8_0(const uint8_t *row, int64_t b, vec v[VECS]) {
  row += b * 34;
  EACH v[i] = signed_floats(row + 2 + i * LANES);
  return half(row);
}
enum { SCALES_f32 = 0, SCALES_f16 = 0, SCALES_bf16 = 0, SCALES_q8_0 = 1 };

#define DOTS(TYPE, C)                                                                                                 \
  static void dots_##TYPE##_##C(const struct quad *q, int64_t t) {                                                    \
    const size_t share = q->next ? QUAD * q->row_bytes * 32 / q->K : 0;                                               \
    vec sums[C][QUAD];                                                                                                \
    for (int r = 0; r < QUAD; r++)                                                                                    \
      for (int c = 0; c < C; c++) sums[c][r] = (vec){0};                                                              \
    for (int64_t b = 0; b < q->K / 32; b++) {                                                                         \
      vec v[QUAD][VECS];                                                                                              \
      float d[QUAD];                                                                                                  \
      for (size_t at = 0; at < share; at += 64) __builtin_prefetch(q->next + b * share + at, 0, 2);                    \
      for (int r = 0; r < QUAD; r++) d[r] = unscaled_##TYPE(q->a + r * q->row_bytes, b, v[r]);                        \
      for (int c = 0; c < C; c++) {                                                                                   \
        const vec *x = (const vec *)(q->x + (t + c) * q->K + b * 32);                                                 \
        for (int r = 0; r < QUAD; r++) {                                                                              \
          if (SCALES_##TYPE) {                                                                                        \
            vec sum = v[r][0] * x[0];                                                                                 \
            for (int i = 1; i < VECS; i++) sum += v[r][i] * x[i];                                                     \
            sums[c][r] += sum * d[r];                                                                                 \
          } else                                                                                                      \
            EACH sums[c][r] += v[r][i] * x[i];                                                                        \
        }                                                                                                             \
      }                                                                                                               \
    }                                                                                                                 \
    for (int c = 0; c < C; c++) {                                                                                     \
      int64_t at = (t + c) * q->stride;                                                                               \
      *(four *)(q->h + at) = *(const four *)(q->gate + q->uses[t + c] * q->stride) * sums4(sums[c]);                  \
    }                                                                                                                 \
  }
#define SHRINK(TYPE)                                                                                                  \
  DOTS(TYPE, 1) DOTS(TYPE, 4)                                                                                         \
  static void shrink_##TYPE(const struct quad *q) {                                                                   \
    int64_t t = 0;                                                                                                    \
    for (; t + 4 <= q->rows; t += 4) dots_##TYPE##_4(q, t);                                                           \
    for (; t < q->rows; t++) dots_##TYPE##_1(q, t);                                                                   \
  }
SHRINK(f32) SHRINK(f16) SHRINK(bf16) SHRINK(q8_0)

static void shrink_quad(const struct quad *q) {
  switch (q->type) {
    case F32: shrink_f32(q); break;
    case F16: shrink_f16(q); break;
    case BF16: shrink_bf16(q); break;
    case Q8_0: shrink_q8_0(q); break;
  }
}

// Whether any row of the group uses the quad of ranks; `values` are the gates, or the ranks of the group's first row.
static int in_use(int32_t page, const float *values, const int32_t *uses, int64_t ranks, int64_t rows) {
  return page != 0 && !all_zero(values, uses, ranks, rows);
}

// Rows times quads that are in use, over all groups.
static int64_t work(const int32_t *pages, const float *values, const int32_t *uses, int64_t P, int64_t T) {
  int64_t sum = 0;
  for (int64_t t = 0, end; t < T; t = end) {
    end = group_end(pages, P, T, t);
    const float *first = values + (uses ? 0 : t * P * PAGE);
    const int64_t ranks = ranks_of(pages + t * P, P);
    for (int64_t r = 0; r < ranks; r += QUAD)
      if (in_use(pages[t * P + r / PAGE], first + r, uses ? uses + t : 0, P * PAGE, end - t)) sum += end - t;
  }
  return sum;
}

// dst [8P, T, parts], src = {x [K, T], pages [P, T], uses [T], then a [K, 8, pages] and gate [8P, G] of every part}. Each thread
// takes quads that follow one another in memory, as many as the others: rows times quads.
void rankgate_shrink(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const struct tensor *x = dst->src[0], *ids = dst->src[1];
  int64_t K = x->ne[0], P = ids->ne[0], T = ids->ne[1], ranks = P * PAGE, total = 0, done = 0;
  const int32_t *pages = ids->data, *uses = dst->src[2]->data;
  for (int64_t part = 0; part < dst->ne[2]; part++) total += work(pages, dst->src[4 + 2 * part]->data, uses, P, T);
  struct quad last = {0}; // computed once it is known what comes next
  for (int64_t t = 0, end; t < T; t = end) {
    end = group_end(pages, P, T, t);
    const int64_t used = ranks_of(pages + t * P, P);
    for (int64_t part = 0; part < dst->ne[2]; part++) {
      const struct tensor *a = dst->src[3 + 2 * part], *gate = dst->src[4 + 2 * part];
      float *rest = (float *)dst->data + (part * T + t) * ranks + used;
      if (ith == 0 && used < ranks)
        for (int64_t row = t; row < end; row++, rest += ranks) memset(rest, 0, (ranks - used) * sizeof *rest);
      for (int64_t r = 0; r < used; r += QUAD) {
        int64_t page = pages[t * P + r / PAGE], at = t * ranks + r;
        struct quad q = {(const uint8_t *)a->data + page * a->nb[2] + r % PAGE * a->nb[1],
                         a->nb[1], K, end - t, ranks, (const float *)x->data + t * K,
                         (const float *)gate->data + r, uses + t, (float *)dst->data + part * T * ranks + at,
                         a->type, 0};
        if (!in_use(page, q.gate, q.uses, ranks, q.rows)) {
          if (ith != 0) continue;
          for (int64_t row = 0; row < q.rows; row++) memset(q.h + row * ranks, 0, QUAD * sizeof(float));
          continue;
        }
        if (done >= total * ith / nth && done < total * (ith + 1) / nth) {
          last.next = q.a;
          if (last.a) shrink_quad(&last);
          last = q;
        }
        done += q.rows;
      }
    }
  }
  if (last.a) shrink_quad(&last);
}

struct column {
  float *y; // [rows, N]
  const float *h;
  const int32_t *pages; // of the group
  const uint8_t *b;     // the pool
  size_t row_bytes, page_bytes;
  int64_t N, ranks, used, rows, b0, b1; // of `ranks`, the first `used`; blocks of 32 numbers b0 … b1 are this thread's
};

// QUAD ranks of a lone row.
struct strip {
  float *y;
  const float *h;
  const uint8_t *b; // of this quad
  size_t row_bytes;
  int64_t b0, b1;
  int type;
  const uint8_t *next; // of the one after it; null: none
  size_t next_bytes;   // for each block of this one
};

// A lone row: y stays in the first cache while the quads of ranks stream past. A group: 32 columns of all its ranks are
// dequantised once, and its rows go through them.
#define EXPAND(TYPE)                                                                                                  \
  static void expand_strip_##TYPE(const struct strip *s) {                                                            \
    const uint8_t *next = s->next;                                                                                    \
    for (int64_t block = s->b0; block < s->b1; block++, next += s->next_bytes) {                                      \
      vec *y = (vec *)(s->y + block * 32), sums[VECS];                                                                \
      for (size_t at = 0; at < s->next_bytes; at += 64) __builtin_prefetch(next + at, 0, 2);                          \
      EACH sums[i] = y[i];                                                                                            \
      for (int q = 0; q < QUAD; q++) {                                                                                \
        vec v[VECS];                                                                                                  \
        const float d = unscaled_##TYPE(s->b + q * s->row_bytes, block, v) * s->h[q];                                 \
        EACH sums[i] += v[i] * d;                                                                                     \
      }                                                                                                               \
      EACH y[i] = sums[i];                                                                                            \
    }                                                                                                                 \
  }                                                                                                                   \
  static void expand_many_##TYPE(const struct column *c) {                                                            \
    for (int64_t block = c->b0; block < c->b1; block++) {                                                             \
      vec turned[PAGE * 32][VECS];                                                                                    \
      int64_t at[PAGE * 32], used = 0;                                                                                \
      for (int64_t r = 0; r < c->used; r += QUAD) {                                                                   \
        int32_t page = c->pages[r / PAGE];                                                                            \
        if (page == 0 || all_zero(c->h + r, 0, c->ranks, c->rows)) continue;                                          \
        const uint8_t *b = c->b + page * c->page_bytes + r % PAGE * c->row_bytes;                                     \
        for (int q = 0; q < QUAD; q++, used++) {                                                                      \
          load_##TYPE(b + q * c->row_bytes, block, turned[used]);                                                     \
          at[used] = r + q;                                                                                           \
        }                                                                                                             \
      }                                                                                                               \
      for (int64_t t = 0; t < c->rows; t++) {                                                                         \
        vec *y = (vec *)(c->y + t * c->N + block * 32), sums[VECS];                                                   \
        EACH sums[i] = y[i];                                                                                          \
        for (int64_t r = 0; r < used; r++) EACH sums[i] += turned[r][i] * c->h[t * c->ranks + at[r]];                 \
        EACH y[i] = sums[i];                                                                                          \
      }                                                                                                               \
    }                                                                                                                 \
  }
EXPAND(f32) EXPAND(f16) EXPAND(bf16) EXPAND(q8_0)

static void expand_strip(const struct strip *s) {
  switch (s->type) {
    case F32: expand_strip_f32(s); break;
    case F16: expand_strip_f16(s); break;
    case BF16: expand_strip_bf16(s); break;
    case Q8_0: expand_strip_q8_0(s); break;
  }
}

static void expand_many(int type, const struct column *c) {
  switch (type) {
    case F32: expand_many_f32(c); break;
    case F16: expand_many_f16(c); break;
    case BF16: expand_many_bf16(c); break;
    case Q8_0: expand_many_q8_0(c); break;
  }
}

// The blocks that begin before `share`, where each costs `cost` and the first begins at `done`.
static int64_t up_to(int64_t blocks, int64_t done, int64_t cost, int64_t share) {
  int64_t block = (share - done) / cost;
  return block < 0 ? 0 : block > blocks ? blocks : block;
}

// dst [parts] is not written, src = {pages [P, T], then y [N, T], h [8P, T] and b [N, 8, pages] of every part}: adds to the y,
// which are different ones. Each thread takes as much as the others, rows times quads of ranks times columns: whole rows, whose
// pages it reads from end to end, and where its share begins and ends some of a row's columns. P is at most 32.
void rankgate_expand(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const struct tensor *ids = dst->src[0];
  int64_t P = ids->ne[0], T = ids->ne[1], ranks = P * PAGE, total = 0, done = 0;
  const int32_t *pages = ids->data;
  for (int64_t part = 0; part < dst->ne[0]; part++)
    total += work(pages, dst->src[2 + 3 * part]->data, 0, P, T) * (dst->src[1 + 3 * part]->ne[0] / 32);
  // Shares are cut by columns of groups, so that the sums of two threads never meet.
  const int64_t from = total * ith / nth, to = total * (ith + 1) / nth;
  struct strip last = {0}; // computed once it is known what comes next
  for (int64_t t = 0, end; t < T; t = end) {
    end = group_end(pages, P, T, t);
    const int64_t used = ranks_of(pages + t * P, P);
    for (int64_t part = 0; part < dst->ne[0]; part++) {
      const struct tensor *y = dst->src[1 + 3 * part], *h = dst->src[2 + 3 * part], *b = dst->src[3 + 3 * part];
      const int64_t N = y->ne[0], blocks = N / 32;
      const float *values = (const float *)h->data + t * ranks;
      const int64_t cost = work(pages + t * P, values, 0, P, end - t);
      if (cost == 0) continue;
      struct column c = {(float *)y->data + t * N, values, pages + t * P, b->data, b->nb[1], b->nb[2],
                         N, ranks, used, end - t,
                         up_to(blocks, done, cost, from), up_to(blocks, done, cost, to)};
      done += cost * blocks;
      if (c.b0 >= c.b1) continue;
      if (c.rows > 1) {
        expand_many(b->type, &c);
        continue;
      }
      for (int64_t r = 0; r < used; r += QUAD) {
        int32_t page = c.pages[r / PAGE];
        if (!in_use(page, c.h + r, 0, 0, 1)) continue;
        struct strip s = {c.y, c.h + r, c.b + page * c.page_bytes + r % PAGE * c.row_bytes, c.row_bytes, c.b0, c.b1,
                          b->type, 0, 0};
        if (last.b) {
          last.next = s.b + s.b0 * (s.row_bytes / blocks);
          last.next_bytes = QUAD * s.row_bytes * (s.b1 - s.b0) / (blocks * (last.b1 - last.b0));
          expand_strip(&last);
        }
        last = s;
      }
    }
  }
  if (last.b) expand_strip(&last);
}
