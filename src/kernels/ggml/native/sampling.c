// What sampling reads of a whole row of logits (src/kernels/row-math.ts): called by the engine's own thread, once or twice a
// row. Blocks of 64 numbers; the last one may be shorter.

#include "numbers.h"

#define BLOCK 64
#define HALF (LANES / 2)

typedef float few __attribute__((vector_size(HALF * 4), aligned(4)));
typedef double wide __attribute__((vector_size(HALF * 8), aligned(8)));
typedef int64_t longs __attribute__((vector_size(HALF * 8), aligned(8)));

static inline vec larger(vec a, vec b) {
  words first = (words)(a > b);
  return (vec)((first & (words)a) | (~first & (words)b));
}

// maxima[b] of every block; 0 when a number is NaN or infinite.
int rankgate_row_maxima(const float *x, int64_t count, float *maxima) {
  vec poison = {0};
  float rest = 0;
  int64_t i = 0;
  for (; i + BLOCK <= count; i += BLOCK) {
    vec most = *(const vec *)(x + i);
    for (int j = 0; j < BLOCK; j += LANES) {
      vec v = *(const vec *)(x + i + j);
      poison += v * 0; // NaN for NaN and infinities, and NaN stays
      most = larger(v, most);
    }
    float max = most[0];
    for (int l = 1; l < LANES; l++) max = most[l] > max ? most[l] : max;
    maxima[i / BLOCK] = max;
  }
  if (i < count) {
    float max = x[i];
    for (int64_t j = i; j < count; j++) {
      rest += x[j] * 0;
      max = x[j] > max ? x[j] : max;
    }
    maxima[i / BLOCK] = max;
  }
  return sum(poison) + rest == 0;
}

// e^y for -700 ≤ y ≤ 0: 2^n · e^r with |r| ≤ ln 2 / 2, Taylor of degree 11 (relative error below 1e-14).
static inline wide exponential(wide y) {
  const double magic = 0x1.8p52; // adding it rounds to an integer
  wide shifted = y * 0x1.71547652b82fep0 + magic;
  wide n = shifted - magic;
  wide r = (y - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  wide p = r * (1.0 / 39916800) + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return (wide)((longs)p + ((longs)shifted << 52));
}

// masses[b] = Σ exp((x - max) · inverse) of every block whose maximum is at least `least`, 0 of the others; returns their sum.
double rankgate_row_masses(const float *x, int64_t count, const float *maxima, double max, double inverse, double least,
                           double *masses) {
  double total = 0;
  for (int64_t b = 0; b * BLOCK < count; b++) {
    masses[b] = 0;
    if (maxima[b] < least) continue;
    float tail[BLOCK];
    const float *from = x + b * BLOCK;
    int64_t length = count - b * BLOCK;
    if (length < BLOCK) {
      for (int j = 0; j < BLOCK; j++) tail[j] = j < length ? from[j] : -__builtin_inff();
      from = tail;
    }
    wide sums[4] = {{0}, {0}, {0}, {0}};
    for (int j = 0; j < BLOCK; j += 4 * HALF) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        wide y = (__builtin_convertvector(*(const few *)(from + j + k * HALF), wide) - max) * inverse;
        longs in = y > -700.0;
        wide weight = exponential((wide)((longs)y & in)); // e^0 where it is out
        sums[k] += (wide)((longs)weight & in);
      }
    }
    wide all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int l = 0; l < HALF; l++) masses[b] += all[l];
    total += masses[b];
  }
  return total;
}
