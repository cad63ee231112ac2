// Products of f32 matrices for training, run inside ggml's threads as custom ops. C[M,N] = X[M,K] · W, where W lies as
// [N,K] (linear) or [K,N] (linearT, outer) and X as [M,K] or [K,M] (outer). Vector extensions only: the compiler picks the
// instructions of the machine that it builds for.
//
// A thread packs a panel of W as [K][2 vectors], then tiles of rows go through it with all sums in registers. K is cut so
// that a panel stays in the second cache. About 100 GFLOPS a thread on Zen 4 (peak 112), from 16 columns up.

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define HEIGHT 12 // rows of a tile: 24 sums, 2 weights and 1 number of X in 32 registers
#elif defined(__AVX__)
#define LANES 8
#define HEIGHT 6 // 12 sums, 2 weights, 1 number in 16 registers
#else
#define LANES 4
#define HEIGHT 6
#endif
#define PANEL (2 * LANES)
#define DEPTH 512 // of a packed panel: 64 KiB with 16 lanes

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t pick __attribute__((vector_size(LANES * 4)));

// struct ggml_tensor of ggml 0.23: library.ts checks the offsets at load.
struct tensor {
  int32_t type;
  void *buffer;
  int64_t ne[4];
  size_t nb[4];
  int32_t op, op_params[16], flags;
  struct tensor *src[10];
  struct tensor *view_src;
  size_t view_offs;
  void *data;
};
_Static_assert(__builtin_offsetof(struct tensor, src) == 152, "ggml 0.23");
_Static_assert(__builtin_offsetof(struct tensor, data) == 248, "ggml 0.23");

struct matrix {
  const float *at;
  int64_t row, column; // distance of neighbours
};

// LANES rows of W [N,K] turned: block swaps of 8, 4, 2, 1.
static inline __attribute__((always_inline)) void turn(vec r[LANES]) {
#pragma GCC unroll 4
  for (int s = LANES / 2; s > 0; s /= 2) {
    pick low, high;
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
      low[j] = j & s ? LANES + j - s : j;
      high[j] = j & s ? LANES + j : j + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & s) continue;
      vec a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

static void pack(float *panel, struct matrix w, int64_t columns, int64_t depth) {
  if (w.column == 1) { // [K,N]
    for (int64_t k = 0; k < depth; k++) {
      float *to = panel + k * PANEL;
      const float *from = w.at + k * w.row;
      if (columns == PANEL) memcpy(to, from, PANEL * 4);
      else for (int64_t n = 0; n < PANEL; n++) to[n] = n < columns ? from[n] : 0;
    }
    return;
  }
  int64_t k = 0;
  if (columns == PANEL) {
    for (; k + LANES <= depth; k += LANES) {
      for (int half = 0; half < 2; half++) {
        vec r[LANES];
        const float *from = w.at + half * LANES * w.column + k;
        for (int i = 0; i < LANES; i++) r[i] = *(const vec *)(from + i * w.column);
        turn(r);
        for (int i = 0; i < LANES; i++) *(vec *)(panel + (k + i) * PANEL + half * LANES) = r[i];
      }
    }
  }
  for (; k < depth; k++) {
    float *to = panel + k * PANEL;
    for (int64_t n = 0; n < PANEL; n++) to[n] = n < columns ? w.at[n * w.column + k] : 0;
  }
}

struct target {
  float *at;
  int64_t stride, rows, columns; // at most PANEL columns
};

// `height` rows of C over a packed panel; `more` adds to what C holds.
static inline __attribute__((always_inline)) void tile(
    const int height, struct target c, struct matrix x, const float *panel, int64_t depth, int more) {
  vec sum[HEIGHT][2];
#pragma GCC unroll 12
  for (int i = 0; i < height; i++) sum[i][0] = sum[i][1] = (vec){0};
  for (int64_t k = 0; k < depth; k++) {
    vec w0 = *(const vec *)(panel + k * PANEL), w1 = *(const vec *)(panel + k * PANEL + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < height; i++) {
      float number = x.at[i * x.row + k * x.column];
      sum[i][0] += number * w0;
      sum[i][1] += number * w1;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < height; i++) {
    float *to = c.at + i * c.stride;
    if (c.columns == PANEL) {
      if (more) {
        sum[i][0] += *(vec *)to;
        sum[i][1] += *(vec *)(to + LANES);
      }
      *(vec *)to = sum[i][0];
      *(vec *)(to + LANES) = sum[i][1];
    } else {
      float out[PANEL];
      memcpy(out, sum[i], sizeof out);
      for (int64_t n = 0; n < c.columns; n++) to[n] = more ? to[n] + out[n] : out[n];
    }
  }
}

// One panel of columns of C.
static void multiply(struct target c, struct matrix x, struct matrix w, int64_t inner) {
  const int low = HEIGHT * 2 / 3; // 16 rows, a usual rank, are two of these
  _Alignas(64) float panel[DEPTH * PANEL];
  for (int64_t from = 0; from < inner; from += DEPTH) {
    int64_t depth = inner - from < DEPTH ? inner - from : DEPTH;
    pack(panel, (struct matrix){w.at + from * w.row, w.row, w.column}, c.columns, depth);
    for (int64_t m = 0, rest; (rest = c.rows - m) > 0;) {
      struct matrix left = {x.at + m * x.row + from * x.column, x.row, x.column};
      struct target to = {c.at + m * c.stride, c.stride, rest, c.columns};
      if (rest >= HEIGHT && rest != 2 * low) {
        tile(HEIGHT, to, left, panel, depth, from > 0);
        m += HEIGHT;
      } else if (rest >= low) {
        tile(low, to, left, panel, depth, from > 0);
        m += low;
      } else {
        tile(1, to, left, panel, depth, from > 0);
        m += 1;
      }
    }
  }
}

enum form { LINEAR, LINEAR_T, OUTER };

// src[0] is X and src[1] is W; ggml's axes 0 and 1 are a matrix, the others a batch that all three share.
static void product(struct tensor *c, int ith, int nth, enum form form) {
  const struct tensor *x = c->src[0], *w = c->src[1];
  const int64_t columns = c->ne[0], rows = c->ne[1];
  const int64_t inner = form == OUTER ? x->ne[1] : x->ne[0];
  const int64_t panels = (columns + PANEL - 1) / PANEL, batch = c->ne[2] * c->ne[3];
  // With fewer panels than threads would share evenly, rows are shared too.
  const int64_t parts = panels * batch >= 4 * nth ? 1 : nth;
  const int64_t high = ((rows + parts - 1) / parts + HEIGHT - 1) / HEIGHT * HEIGHT;
  for (int64_t job = ith; job < panels * batch * parts; job += nth) {
    const int64_t m = job % parts * high, n = job / parts % panels * PANEL;
    const int64_t b2 = job / parts / panels % c->ne[2], b3 = job / parts / panels / c->ne[2];
    if (m >= rows) continue;
    const float *xb = (const float *)((const char *)x->data + b2 * x->nb[2] + b3 * x->nb[3]);
    const float *wb = (const float *)((const char *)w->data + b2 * w->nb[2] + b3 * w->nb[3]);
    float *cb = (float *)((char *)c->data + b2 * c->nb[2] + b3 * c->nb[3]);
    const int64_t xs = x->nb[1] / 4, ws = w->nb[1] / 4, cs = c->nb[1] / 4;
    const struct target target = {
        cb + m * cs + n, cs,
        rows - m < high ? rows - m : high,
        columns - n < PANEL ? columns - n : PANEL,
    };
    const struct matrix left =
        form == OUTER ? (struct matrix){xb + m, 1, xs} : (struct matrix){xb + m * xs, xs, 1};
    const struct matrix right =
        form == LINEAR ? (struct matrix){wb + n * ws, 1, ws} : (struct matrix){wb + n, ws, 1};
    multiply(target, left, right, inner);
  }
}

void rankgate_linear_f32(struct tensor *c, int ith, int nth, void *unused) {
  (void)unused;
  product(c, ith, nth, LINEAR);
}

void rankgate_linear_t_f32(struct tensor *c, int ith, int nth, void *unused) {
  (void)unused;
  product(c, ith, nth, LINEAR_T);
}

void rankgate_outer_f32(struct tensor *c, int ith, int nth, void *unused) {
  (void)unused;
  product(c, ith, nth, OUTER);
}
