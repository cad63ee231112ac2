// What a token chooses inside the bottleneck, as rank-routing.ts says: which of its ranks stay, how it mixes shared atoms, and the
// mix. Run as custom ops; threads take rows. The caller has checked shapes and the rows' uses; no value of an input can
// lead outside: counts beyond a group or the atoms mean all of them.

#include "numbers.h"
#include <math.h>

#define PAGE 8
#define MAX 256 // ranks, numbers of a query

static const ints lanes = {0, 1, 2, 3,
#if LANES > 4
                           4, 5, 6, 7,
#endif
#if LANES > 8
                           8, 9, 10, 11, 12, 13, 14, 15
#endif
};

// Whether fewer than k of n ≥ 1 come before each: larger scores, and equal ones at lower indices. Both have room for whole vectors.
static void among_largest(float *score, int64_t n, int32_t k, int32_t *stays) {
  *(vec *)(score + n) = (vec){0}; // what else the last vector has
  int64_t i = 0;
  do {
    const vec own = *(const vec *)(score + i);
    const ints at = lanes + (int32_t)i;
    ints before = {0};
    for (int64_t j = 0; j < n; j++) {
      const vec other = splat(score[j]);
      before -= (other > own) | ((other == own) & (at > (int32_t)j));
    }
    *(ints *)(stays + i) = before < k;
  } while ((i += LANES) < n);
}

// exp of what stays as shares of their sum, 0 elsewhere.
static void softmax(float *score, const int32_t *stays, int64_t n, float scale) {
  float top = -INFINITY, total = 0;
  for (int64_t i = 0; i < n; i++)
    if (stays[i] && score[i] > top) top = score[i];
  for (int64_t i = 0; i < n; i++) total += score[i] = stays[i] ? expf((score[i] - top) * scale) : 0;
  for (int64_t i = 0; i < n; i++) score[i] /= total;
}

static float norm(const float *x, int64_t K) {
  vec squares = {0};
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) squares += *(const vec *)(x + k) * *(const vec *)(x + k);
  float total = sum(squares);
  for (; k < K; k++) total += x[k] * x[k];
  return sqrtf(total);
}

static void route_group(const float *h, float *y, const float *bias, int64_t n, int32_t k, float temperature, float inverse) {
  float score[MAX + LANES];
  int32_t stays[MAX + LANES];
  for (int64_t i = 0; i < n; i++) {
    const float size = __builtin_fabsf(h[i]);
    score[i] = temperature > 0 ? size * bias[i] : size + bias[i];
  }
  among_largest(score, n, k, stays);
  if (temperature > 0) {
    softmax(score, stays, n, inverse / temperature);
    for (int64_t i = 0; i < n; i++) y[i] = h[i] * score[i];
  } else
    for (int64_t i = 0; i < n; i++) y[i] = stays[i] ? h[i] : 0;
}

// dst [8P, T], src = {x [K, T], h [8P, T], uses [T], groups [P, G], temperatures [P, G], bias [8P, G]}. P is at most 32.
void rankgate_route_ranks(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const int64_t ranks = dst->ne[0], P = ranks / PAGE, T = dst->ne[1], K = dst->src[0]->ne[0];
  for (int64_t t = T * ith / nth; t < T * (ith + 1) / nth; t++) {
    const int32_t use = ((const int32_t *)dst->src[2]->data)[t];
    const float *x = (const float *)dst->src[0]->data + t * K, *h = (const float *)dst->src[1]->data + t * ranks;
    const int32_t *groups = (const int32_t *)dst->src[3]->data + use * P;
    const float *temperatures = (const float *)dst->src[4]->data + use * P;
    const float *bias = (const float *)dst->src[5]->data + use * ranks;
    float *y = (float *)dst->data + t * ranks, size = -1; // of x, once it is wanted
    for (int64_t p = 0, end; p < P; p = end) {
      for (end = p + 1; end < P && groups[end] == -1;) end++;
      const int64_t at = p * PAGE, n = (end - p) * PAGE;
      if (groups[p] <= 0) {
        memcpy(y + at, h + at, n * sizeof *y);
        continue;
      }
      if (temperatures[p] > 0 && size < 0) size = norm(x, K);
      // An input of zeros makes all scores 0.
      route_group(h + at, y + at, bias + at, n, groups[p], temperatures[p], size > 0 ? 1 / size : 0);
    }
  }
}

// y [N] = m [r, N] · v [r]
static void times(const float *m, const float *v, int64_t r, int64_t N, float *y) {
  for (int64_t n = 0; n < N; n++, m += r) {
    float total = 0;
    for (int64_t s = 0; s < r; s++) total += m[s] * v[s];
    y[n] = total;
  }
}

static float dot(const float *a, const float *b, int64_t n) {
  float total;
  times(a, b, n, 1, &total);
  return total;
}

// What earlier blocks add to the query: dst [dq, T], src = {h [R, T], summary [r, r], context [r, dq], then at most 7 summaries
// [R, T]}.
void rankgate_atom_context(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const int64_t dq = dst->ne[0], T = dst->ne[1], R = dst->src[0]->ne[0], r = dst->src[1]->ne[0];
  const int32_t all[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  int64_t n = 0;
  while (n < 7 && dst->src[3 + n]) n++;
  for (int64_t t = T * ith / nth; t < T * (ith + 1) / nth; t++) {
    float sought[MAX], depth[MAX] = {0}, share[16];
    times(dst->src[1]->data, (const float *)dst->src[0]->data + t * R, r, r, sought);
    for (int64_t j = 0; j < n; j++) share[j] = dot((const float *)dst->src[3 + j]->data + t * R, sought, r) / sqrtf(dq);
    softmax(share, all, n, 1);
    for (int64_t j = 0; j < n; j++)
      for (int64_t s = 0; s < r; s++) depth[s] += share[j] * ((const float *)dst->src[3 + j]->data)[t * R + s];
    times(dst->src[2]->data, depth, r, dq, (float *)dst->data + t * dq);
  }
}

// dst [1+K, T], src = {h [R, T], query [r, dq], uses [T], keys [dq, K, G], bias [K, G], topK [G], context [dq, T] or nothing}.
void rankgate_route_atoms(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const int64_t K = dst->ne[0] - 1, T = dst->ne[1], R = dst->src[0]->ne[0], r = dst->src[1]->ne[0], dq = dst->src[1]->ne[1];
  const struct tensor *context = dst->src[6];
  for (int64_t t = T * ith / nth; t < T * (ith + 1) / nth; t++) {
    const int32_t use = ((const int32_t *)dst->src[2]->data)[t], k = ((const int32_t *)dst->src[5]->data)[use];
    const float *bias = (const float *)dst->src[4]->data + use * K;
    float *weights = (float *)dst->data + t * (1 + K), q[MAX], score[MAX + LANES];
    int32_t stays[MAX + LANES];
    weights[0] = k <= 0;
    memset(weights + 1, 0, K * sizeof *weights);
    if (k <= 0) continue;
    times(dst->src[1]->data, (const float *)dst->src[0]->data + t * R, r, dq, q);
    for (int64_t i = 0; context && i < dq; i++) q[i] += ((const float *)context->data)[t * dq + i];
    times((const float *)dst->src[3]->data + use * K * dq, q, dq, K, score);
    for (int64_t j = 0; j < K; j++) score[j] = score[j] / sqrtf(dq) + bias[j];
    among_largest(score, K, k, stays);
    softmax(score, stays, K, 1);
    memcpy(weights + 1, score, K * sizeof *weights);
  }
}

// dst [N, T], src = {x [N, T], k [1], scale [1]}: softmax(scale·x) over a row's k largest, the others 0. N is at most 256.
void rankgate_softmax_top(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const int64_t N = dst->ne[0], T = dst->ne[1];
  const int32_t k = *(const float *)dst->src[1]->data;
  const float scale = *(const float *)dst->src[2]->data;
  for (int64_t t = T * ith / nth; t < T * (ith + 1) / nth; t++) {
    float score[MAX + LANES];
    int32_t stays[MAX + LANES];
    memcpy(score, (const float *)dst->src[0]->data + t * N, N * sizeof *score);
    among_largest(score, N, k, stays);
    softmax(score, stays, N, scale);
    memcpy((float *)dst->data + t * N, score, N * sizeof *score);
  }
}

// dst [R, T], src = {h [R, T], atoms [r, r, K], weights [1+K, T]}: the first r numbers of a row are mixed.
void rankgate_mix_ranks(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const struct tensor *atoms = dst->src[1];
  const int64_t R = dst->ne[0], T = dst->ne[1], r = atoms->ne[0], K = atoms->ne[2];
  for (int64_t t = T * ith / nth; t < T * (ith + 1) / nth; t++) {
    const float *h = (const float *)dst->src[0]->data + t * R, *weights = (const float *)dst->src[2]->data + t * (1 + K);
    float *y = (float *)dst->data + t * R, mapped[MAX];
    memcpy(y, h, R * sizeof *y);
    for (int64_t s = 0; s < r; s++) y[s] *= weights[0];
    for (int64_t j = 0; j < K; j++) {
      if (weights[1 + j] == 0) continue;
      times((const float *)atoms->data + j * r * r, h, r, r, mapped);
      for (int64_t s = 0; s < r; s++) y[s] += weights[1 + j] * mapped[s];
    }
  }
}
