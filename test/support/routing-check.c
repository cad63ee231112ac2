// Routing against the obvious way, for whatever level this is compiled for: prints, per size, how many choices differ and the
// largest error of a weight. The obvious way takes the best that is left, k times, in doubles. Seeded; many scores are equal.

#include "../../src/kernels/ggml/native/numbers.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

void rankgate_route_ranks(struct tensor *, int, int, void *);
void rankgate_route_atoms(struct tensor *, int, int, void *);

enum { T = 9, K = 37, MAX = 256, THREADS = 2 };

// weights[i] of the k best of n: 1 where temperature is 0, else their softmax.
static void obvious(const double *score, int n, int k, double temperature, double *weights) {
  char taken[MAX] = {0};
  double total = 0;
  for (int i = 0; i < n; i++) weights[i] = 0;
  for (int round = 0; round < k && round < n; round++) {
    int best = -1;
    for (int i = 0; i < n; i++)
      if (!taken[i] && (best < 0 || score[i] > score[best])) best = i;
    taken[best] = 1;
    total += weights[best] = temperature > 0 ? exp(score[best] / temperature) : 1;
  }
  for (int i = 0; i < n && temperature > 0; i++) weights[i] /= total;
}

static void compare(const char *what, int n, const float *got, const double *wanted, int count) {
  int others = 0;
  double error = 0;
  for (int i = 0; i < count; i++) {
    others += (got[i] != 0) != (wanted[i] != 0);
    error = fmax(error, fabs(got[i] - wanted[i]));
  }
  printf("%s %d %d %.3g\n", what, n, others, error);
}

// Row t has use t: k = t + 1, fly's choice where t is even; groups of all pages.
static void ranks(int P) {
  static float x[T * K], h[T * MAX], bias[T * MAX], temperatures[T * 32], y[T * MAX];
  static double wanted[T * MAX];
  int32_t uses[T], groups[T * 32];
  const int n = 8 * P;
  for (int i = 0; i < T * K; i++) x[i] = (float)(rand() % 201 - 100) / 100;
  for (int i = 0; i < T * n; i++) h[i] = (float)(rand() % 9 - 4) / 2 + .25f, bias[i] = (float)(rand() % 4 + 1) / 4;
  for (int t = 0; t < T; t++) {
    double score[MAX], squares = 0;
    const double temperature = t % 2 ? .1 : 0;
    uses[t] = t;
    for (int p = 0; p < P; p++) groups[t * P + p] = p ? -1 : t + 1, temperatures[t * P + p] = temperature;
    for (int i = 0; i < K; i++) squares += x[t * K + i] * (double)x[t * K + i];
    for (int i = t * n; i < (t + 1) * n; i++)
      score[i - t * n] = t % 2 ? fabs(h[i]) * bias[i] / sqrt(squares) : fabs(h[i]) + bias[i];
    obvious(score, n, t + 1, temperature, wanted + t * n);
    for (int i = t * n; i < (t + 1) * n; i++) wanted[i] *= h[i];
  }
  struct tensor sources[6] = {{.ne = {K, T}, .data = x},      {.ne = {n, T}, .data = h}, {.ne = {T}, .data = uses},
                              {.ne = {P, T}, .data = groups}, {.ne = {P, T}, .data = temperatures}, {.ne = {n, T}, .data = bias}};
  struct tensor dst = {.ne = {n, T}, .data = y};
  for (int i = 0; i < 6; i++) dst.src[i] = &sources[i];
  for (int i = 0; i < THREADS; i++) rankgate_route_ranks(&dst, i, THREADS, 0);
  compare("ranks", n, y, wanted, T * n);
}

// Row t has use t, which takes t atoms; each key is there twice.
static void atoms(int count) {
  enum { R = 8, Q = 5 };
  static float h[T * R], query[Q * R], keys[T * MAX * Q], bias[T * MAX], weights[T * (1 + MAX)];
  static double wanted[T * (1 + MAX)];
  int32_t uses[T], top[T];
  for (int i = 0; i < T * R; i++) h[i] = (float)(rand() % 5 - 2);
  for (int i = 0; i < Q * R; i++) query[i] = (float)(rand() % 5 - 2) / 8;
  for (int t = 0; t < T; t++) {
    double q[Q] = {0}, score[MAX];
    uses[t] = top[t] = t;
    for (int i = 0; i < Q; i++)
      for (int s = 0; s < R; s++) q[i] += query[i * R + s] * (double)h[t * R + s];
    for (int j = 0; j < count; j++) {
      double dot = 0;
      for (int i = 0; i < Q; i++) {
        float *key = keys + (t * count + j) * Q + i;
        *key = j % 2 ? key[-Q] : (float)(rand() % 5 - 2) / 4;
        dot += *key * q[i];
      }
      bias[t * count + j] = j % 2 ? bias[t * count + j - 1] : (float)(rand() % 100) / 100;
      score[j] = dot / sqrt(Q) + bias[t * count + j];
    }
    obvious(score, count, t, 1, wanted + t * (1 + count) + 1);
    wanted[t * (1 + count)] = t == 0;
    for (int j = 1; j <= count && t == 0; j++) wanted[j] = 0;
  }
  struct tensor sources[6] = {{.ne = {R, T}, .data = h},           {.ne = {R, Q}, .data = query},  {.ne = {T}, .data = uses},
                              {.ne = {Q, count, T}, .data = keys}, {.ne = {count, T}, .data = bias}, {.ne = {T}, .data = top}};
  struct tensor dst = {.ne = {1 + count, T}, .data = weights};
  for (int i = 0; i < 6; i++) dst.src[i] = &sources[i];
  for (int i = 0; i < THREADS; i++) rankgate_route_atoms(&dst, i, THREADS, 0);
  compare("atoms", count, weights, wanted, T * (1 + count));
}

int main(void) {
  srand(7);
  for (int P = 1; P <= 32; P = P < 4 ? P + 1 : P * 2) ranks(P);
  for (int count = 1; count <= 256; count = count < 20 ? count + 3 : count * 2) atoms(count);
}
