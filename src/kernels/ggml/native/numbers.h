// Vectors of the machine's own width, ggml's tensor struct, and 32 numbers of every weight type as f32.
//
// The width is a compile-time parameter: GCC 12 spills every operation on vectors wider than the machine's (ten times slower,
// measured). No -ffast-math: it would switch the whole process to flush-to-zero when the library is loaded.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define VECS (32 / LANES) // vectors that 32 numbers take

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint8_t octets __attribute__((vector_size(LANES), aligned(1)));
typedef uint16_t halfwords __attribute__((vector_size(LANES * 2), aligned(1)));

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

enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

static inline vec splat(float f) { return f - (vec){0}; }

static inline float half(const uint8_t *p) {
#if defined(__F16C__) || defined(__aarch64__)
  _Float16 h;
  memcpy(&h, p, 2);
  return h; // one instruction
#else
  uint16_t h;
  memcpy(&h, p, 2);
  uint32_t u = (uint32_t)(h & 0x7fff) << 13;
  float f;
  memcpy(&f, &u, 4);
  f *= 0x1p112f; // rebases the exponent, subnormals included
  return h & 0x8000 ? -f : f;
#endif
}

static inline vec halves(const uint8_t *p) {
#if LANES == 16 && defined(__AVX512F__)
  // GCC 12 converts vectors of _Float16 number by number; this is the instruction.
  typedef short v16 __attribute__((vector_size(32)));
  v16 h;
  memcpy(&h, p, sizeof h);
  return __builtin_ia32_vcvtph2ps512_mask(h, (vec){0}, -1, 4);
#elif LANES == 8 && defined(__F16C__)
  typedef short v8 __attribute__((vector_size(16)));
  v8 h;
  memcpy(&h, p, sizeof h);
  return __builtin_ia32_vcvtph2ps256(h);
#else
  words u = __builtin_convertvector(*(const halfwords *)p, words);
  vec f = (vec)((u & 0x7fff) << 13) * 0x1p112f;
  return (vec)((words)f | ((u & 0x8000) << 16));
#endif
}

static inline vec brains(const uint8_t *p) {
  return (vec)(__builtin_convertvector(*(const halfwords *)p, words) << 16);
}

static inline vec floats(octets q) { return __builtin_convertvector(__builtin_convertvector(q, ints), vec); }
static inline octets octets_at(const uint8_t *p) { return *(const octets *)p; }

// GCC 12 widens vectors of signed octets number by number; where there is an instruction, this is it.
static inline vec signed_floats(const uint8_t *p) {
#if LANES == 16 && defined(__AVX512F__)
  typedef char v16 __attribute__((vector_size(16)));
  v16 q;
  memcpy(&q, p, sizeof q);
  return __builtin_convertvector((ints)__builtin_ia32_pmovsxbd512_mask(q, (ints){0}, -1), vec);
#elif LANES == 8 && defined(__AVX2__)
  typedef char v16 __attribute__((vector_size(16)));
  v16 q = {0};
  memcpy(&q, p, 8);
  return __builtin_convertvector((ints)__builtin_ia32_pmovsxbd256(q), vec);
#else
  return floats(octets_at(p) ^ 128) - 128;
#endif
}

// d·q + m for nibbles. Where one instruction permutes 16 floats, the 16 possible values are looked up; elsewhere a permutation
// across registers would be done number by number, so they are computed.
#if LANES == 16
static const vec ramp = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
typedef vec affine;
static inline affine line(float d, float m) { return ramp * d + m; }
static inline vec on(affine table, octets q) { return __builtin_shuffle(table, __builtin_convertvector(q, ints)); }
#else
typedef struct {
  float d, m;
} affine;
static inline affine line(float d, float m) { return (affine){d, m}; }
static inline vec on(affine l, octets q) { return floats(q) * l.d + l.m; }
#endif

// The fifth bits of LANES numbers: bit i of `word` belongs to number i.
static inline vec sixteens(uint32_t word) {
  words bit;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) bit[i] = 1u << i;
  return __builtin_convertvector((ints)((word & bit) != 0) & 16, vec);
}

// load_TYPE(row, b, v): numbers 32b … 32b+31 of a row.
#define INLINE static inline __attribute__((always_inline))
#define LOAD(TYPE) INLINE void load_##TYPE(const uint8_t *row, int64_t b, vec v[VECS])
#define EACH _Pragma("GCC unroll 8") for (int i = 0; i < VECS; i++)
#define EACH_HALF _Pragma("GCC unroll 4") for (int i = 0; i < VECS / 2; i++)

LOAD(f32) { EACH v[i] = *(const vec *)(row + b * 128 + i * LANES * 4); }
LOAD(f16) { EACH v[i] = halves(row + b * 64 + i * LANES * 2); }
LOAD(bf16) { EACH v[i] = brains(row + b * 64 + i * LANES * 2); }

INLINE void nibbles(const uint8_t *p, affine table, vec v[VECS]) {
  EACH_HALF {
    octets q = octets_at(p + i * LANES);
    v[i] = on(table, q & 15);
    v[VECS / 2 + i] = on(table, q >> 4);
  }
}
LOAD(q4_0) {
  const uint8_t *p = row + b * 18;
  float d = half(p);
  nibbles(p + 2, line(d, -8 * d), v);
}
LOAD(q4_1) {
  const uint8_t *p = row + b * 20;
  nibbles(p + 4, line(half(p), half(p + 2)), v);
}

INLINE void fives(const uint8_t *p, float d, float m, vec v[VECS]) {
  uint32_t high;
  memcpy(&high, p, 4);
  EACH_HALF {
    octets q = octets_at(p + 4 + i * LANES);
    v[i] = (floats(q & 15) + sixteens(high >> (i * LANES))) * d + m;
    v[VECS / 2 + i] = (floats(q >> 4) + sixteens(high >> (16 + i * LANES))) * d + m;
  }
}
LOAD(q5_0) {
  const uint8_t *p = row + b * 22;
  float d = half(p);
  fives(p + 2, d, -16 * d, v);
}
LOAD(q5_1) {
  const uint8_t *p = row + b * 24;
  fives(p + 4, half(p), half(p + 2), v);
}

LOAD(q8_0) {
  const uint8_t *p = row + b * 34;
  float d = half(p);
  EACH v[i] = signed_floats(p + 2 + i * LANES) * d;
}

// Scale and minimum j of eight, six bits each in twelve bytes.
static inline void scale_min(const uint8_t *s, int j, float *scale, float *min) {
  *scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
  *min = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
}
LOAD(q4_k) {
  const uint8_t *p = row + (b >> 3) * 144;
  int j = b & 7;
  float s, m;
  scale_min(p + 4, j, &s, &m);
  affine table = line(half(p) * s, -half(p + 2) * m);
  const uint8_t *q = p + 16 + (j >> 1) * 32;
  EACH {
    octets a = octets_at(q + i * LANES);
    v[i] = on(table, j & 1 ? a >> 4 : a & 15);
  }
}
LOAD(q5_k) {
  const uint8_t *p = row + (b >> 3) * 176;
  int j = b & 7;
  float s, m;
  scale_min(p + 4, j, &s, &m);
  float d = half(p) * s, min = half(p + 2) * m;
  const uint8_t *q = p + 48 + (j >> 1) * 32;
  EACH {
    octets a = octets_at(q + i * LANES), high = octets_at(p + 16 + i * LANES) >> j & 1;
    v[i] = floats((j & 1 ? a >> 4 : a & 15) | high << 4) * d - min;
  }
}
LOAD(q6_k) {
  const uint8_t *p = row + (b >> 3) * 210;
  int part = (b & 7) >> 2, quarter = b & 3;
  const uint8_t *low = p + part * 64 + (quarter & 1) * 32, *top = p + 128 + part * 32;
  const int8_t *scales = (const int8_t *)p + 192 + part * 8 + quarter * 2;
  float d = half(p + 208);
  EACH {
    octets a = octets_at(low + i * LANES), high = octets_at(top + i * LANES) >> (quarter * 2) & 3;
    v[i] = (floats((quarter >> 1 ? a >> 4 : a & 15) | high << 4) - 32) * (d * scales[i * LANES / 16]);
  }
}

static inline float sum(vec a) {
#if LANES == 16
  typedef float v8 __attribute__((vector_size(32)));
  v8 e = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LANES == 8
  vec e = a;
#endif
  typedef float v4 __attribute__((vector_size(16)));
#if LANES > 4
  v4 s = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
#else
  v4 s = a;
#endif
  return (s[0] + s[2]) + (s[1] + s[3]);
}

typedef float four __attribute__((vector_size(16), aligned(4)));

// The sums of four vectors: with 16 lanes, 14 instructions instead of 40.
static inline four sums4(const vec a[4]) {
#if LANES == 16
  typedef float v16 __attribute__((vector_size(64)));
#define HALVES(x, y) \
  (__builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + \
   __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  v16 ab = HALVES(a[0], a[1]), cd = HALVES(a[2], a[3]);
  v16 s = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  s += __builtin_shufflevector(s, s, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  s += __builtin_shufflevector(s, s, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return __builtin_shufflevector(s, s, 0, 4, 8, 12);
#undef HALVES
#else
  return (four){sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])};
#endif
}
