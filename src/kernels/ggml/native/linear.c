// Linear layers over unmodified weights with f32 activations: y[T,N] = x[T,K] · w[N,K]ᵀ, run inside ggml's threads as a custom
// op. Few rows: weights are dequantised in registers and met by up to eight rows of x. Many: four rows of weights are
// dequantised into a panel in the second cache, met by tiles of six rows in the first. The caller has checked the shapes; K is
// a multiple of 32.

#include "numbers.h"

#if LANES == 16
#define PANEL_T 6 // 24 sums, 4 weights, 1 x in 32 registers
#define ROWS_MANY 8
#else
#define PANEL_T 2 // 8 sums, 4 weights, 1 x in 16 registers
#define ROWS_MANY 4
#endif
#define PANEL_R 4
#define PANEL_FLOATS (64 * 1024)
#define PANEL_MAX 64 // rows: a tile of x stays in the first cache while they pass from the second
#define PANEL_FROM 12 // rows from which filling a panel pays

struct job {
  const uint8_t *w;
  size_t row_bytes;
  int64_t K, N, T, n0, n1; // outputs n0 … n1 are this thread's
  const float *x;          // [T, K]
  float *y;                // [T, N]
};

// R rows of weights against C rows of x.
#define TILE(TYPE, R, C)                                                                                              \
  static void tile_##TYPE##_##R##_##C(const struct job *j, int64_t n, int64_t t) {                                    \
    vec sums[C][R];                                                                                                   \
    for (int r = 0; r < R; r++)                                                                                       \
      for (int c = 0; c < C; c++) sums[c][r] = (vec){0};                                                              \
    const uint8_t *w = j->w + n * j->row_bytes;                                                                       \
    const float *x = j->x + t * j->K;                                                                                 \
    /* The next tile's weights, a share in every block: four short rows are not a stream to the prefetcher. */         \
    const size_t part = R * j->row_bytes * 32 / j->K;                                                                 \
    for (int64_t b = 0; b < j->K / 32; b++) {                                                                         \
      vec v[R][VECS];                                                                                                 \
      for (size_t at = 0; at < part; at += 64) __builtin_prefetch(w + R * j->row_bytes + b * part + at);              \
      for (int r = 0; r < R; r++) load_##TYPE(w + r * j->row_bytes, b, v[r]);                                         \
      for (int c = 0; c < C; c++) EACH {                                                                              \
          vec a = *(const vec *)(x + c * j->K + b * 32 + i * LANES);                                                  \
          for (int r = 0; r < R; r++) sums[c][r] += v[r][i] * a;                                                      \
        }                                                                                                             \
    }                                                                                                                 \
    for (int c = 0; c < C; c++) {                                                                                     \
      float *y = j->y + (t + c) * j->N + n;                                                                           \
      if (R == 4) *(four *)y = sums4(sums[c]);                                                                        \
      else for (int r = 0; r < R; r++) y[r] = sum(sums[c][r]);                                                        \
    }                                                                                                                 \
  }
#define SPAN(TYPE, R, C)                                                                                              \
  for (; n + R <= j->n1; n += R) tile_##TYPE##_##R##_##C(j, n, t);
#define ROWS(TYPE, R, C)                                                                                              \
  {                                                                                                                   \
    SPAN(TYPE, R, C) SPAN(TYPE, 1, C) t += C;                                                                         \
  }

INLINE void tile_panel(const float *panel, const struct job *j, int64_t n, int64_t t) {
  vec sums[PANEL_T][PANEL_R];
  for (int r = 0; r < PANEL_R; r++)
    for (int c = 0; c < PANEL_T; c++) sums[c][r] = (vec){0};
  for (int64_t k = 0; k < j->K; k += LANES) {
    vec w[PANEL_R];
    for (int r = 0; r < PANEL_R; r++) w[r] = *(const vec *)(panel + r * j->K + k);
    for (int c = 0; c < PANEL_T; c++) {
      vec a = *(const vec *)(j->x + (t + c) * j->K + k);
      for (int r = 0; r < PANEL_R; r++) sums[c][r] += w[r] * a;
    }
  }
  for (int c = 0; c < PANEL_T; c++) *(four *)(j->y + (t + c) * j->N + n) = sums4(sums[c]);
}

// Opaque on purpose: GCC otherwise looks the address up again, by a call, in the innermost loop of a shared library (half the
// speed, measured).
static __attribute__((noipa)) float *panel_memory(void) {
  static _Thread_local float memory[PANEL_FLOATS] __attribute__((aligned(64)));
  return memory;
}

#define KERNEL(TYPE)                                                                                                  \
  TILE(TYPE, 4, 1) TILE(TYPE, 1, 1) TILE(TYPE, 4, 2) TILE(TYPE, 1, 2) TILE(TYPE, 2, 3) TILE(TYPE, 1, 3)               \
  TILE(TYPE, 4, 4) TILE(TYPE, 1, 4) TILE(TYPE, 4, 8) TILE(TYPE, 1, 8)                                                 \
  static void rows_##TYPE(const struct job *j, int64_t t) {                                                           \
    while (t < j->T) {                                                                                                \
      int64_t n = j->n0, left = j->T - t;                                                                             \
      if (left >= ROWS_MANY && ROWS_MANY == 8) ROWS(TYPE, 4, 8)                                                       \
      else if (left >= 4) ROWS(TYPE, 4, 4)                                                                            \
      else if (left == 3) ROWS(TYPE, 2, 3)                                                                            \
      else if (left == 2) ROWS(TYPE, 4, 2)                                                                            \
      else ROWS(TYPE, 4, 1)                                                                                           \
    }                                                                                                                 \
  }                                                                                                                   \
  static void linear_##TYPE(const struct job *j) {                                                                    \
    struct job rest = *j;                                                                                             \
    int64_t height = PANEL_FLOATS / j->K / PANEL_R * PANEL_R;                                                         \
    if (height > PANEL_MAX) height = PANEL_MAX;                                                                       \
    if (j->T >= PANEL_FROM && height > 0) {                                                                           \
      float *const panel = panel_memory();                                                                            \
      int64_t n = j->n0;                                                                                              \
      while (n + PANEL_R <= j->n1) {                                                                                  \
        int64_t whole = (j->n1 - n) / PANEL_R * PANEL_R, rows = height < whole ? height : whole, t = 0;               \
        for (int64_t r = 0; r < rows; r++)                                                                            \
          for (int64_t b = 0; b < j->K / 32; b++)                                                                     \
            load_##TYPE(j->w + (n + r) * j->row_bytes, b, (vec *)(panel + r * j->K + b * 32));                        \
        for (; t + PANEL_T <= j->T; t += PANEL_T)                                                                     \
          for (int64_t r = 0; r < rows; r += PANEL_R) tile_panel(panel + r * j->K, j, n + r, t);                      \
        rest.n0 = n, rest.n1 = n + rows;                                                                              \
        rows_##TYPE(&rest, t);                                                                                        \
        n += rows;                                                                                                    \
      }                                                                                                               \
      rest.n0 = n, rest.n1 = j->n1;                                                                                   \
    }                                                                                                                 \
    rows_##TYPE(&rest, 0);                                                                                            \
  }
KERNEL(f32) KERNEL(f16) KERNEL(bf16) KERNEL(q4_0) KERNEL(q4_1) KERNEL(q5_0) KERNEL(q5_1) KERNEL(q8_0)
KERNEL(q4_k) KERNEL(q5_k) KERNEL(q6_k)

// dst [N, T], src = {w [K, N], x [K, T]}; ggml's order, innermost first.
void rankgate_linear(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const struct tensor *w = dst->src[0], *x = dst->src[1];
  int64_t N = w->ne[1], groups = (N + 7) / 8;
  struct job j = {w->data,  w->nb[1], w->ne[0], N, x->ne[1], groups * ith / nth * 8, groups * (ith + 1) / nth * 8,
                  x->data, dst->data};
  if (j.n1 > N) j.n1 = N;
  switch (w->type) {
    case F32: linear_f32(&j); break;
    case F16: linear_f16(&j); break;
    case BF16: linear_bf16(&j); break;
    case Q4_0: linear_q4_0(&j); break;
    case Q4_1: linear_q4_1(&j); break;
    case Q5_0: linear_q5_0(&j); break;
    case Q5_1: linear_q5_1(&j); break;
    case Q8_0: linear_q8_0(&j); break;
    case Q4_K: linear_q4_k(&j); break;
    case Q5_K: linear_q5_k(&j); break;
    case Q6_K: linear_q6_k(&j); break;
  }
}
