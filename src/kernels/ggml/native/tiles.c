// Linear layers and embeddings over weights laid out in tiles: LANES rows side by side, one block of 32 numbers of each after
// another, so that a sum belongs to a lane and nothing is added across. A number is d·q + m with q an unsigned nibble or
// octet, d and m f16 per row and block: exact for Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, rounded to f16 for the scales of the
// K types. Activations are rounded per block of 32 to 8 bits, or to 16 in two halves, each a product of octets of its own:
// the machine multiplies octets four at a time.
//
// A tile: f16 d[LANES], f16 m[LANES], then the numbers, four of a row beside each other. It takes the bytes of ggml's
// Q4_1 (nibbles: numbers 0 … 15 of a block are the low ones) or Q8_1 (octets), which is the type that the tensor has.

#include "numbers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { Q8_1 = 9 };
#define HEAD (LANES * 4)

// 32 numbers of x, their scale, and scale · their sum. `low` only where activations have 16 bits: 256·high + low.
struct octets32 {
  float scale, sum;
  int8_t high[32], low[32];
};
#define SHORT (sizeof(struct octets32) - 32)
typedef int32_t quad __attribute__((may_alias, aligned(1)));

#define EACH_FOUR _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)
// acc + Σ q·x, 32 products a lane.
#define GENERIC_DOT(NAME)                                                                                             \
  INLINE ints NAME(ints acc, const words q[8], const int8_t *x) {                                                     \
    EACH_FOUR {                                                                                                       \
      for (int j = 0; j < 4; j++) acc += (ints)(q[i] >> (8 * j) & 255) * x[4 * i + j];                                \
    }                                                                                                                 \
    return acc;                                                                                                       \
  }
#if defined(__AVX512VNNI__) && LANES == 16
INLINE ints dot_octets(ints acc, const words q[8], const int8_t *x) {
  EACH_FOUR acc = (ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)q[i], _mm512_set1_epi32(((const quad *)x)[i]));
  return acc;
}
#define dot_nibbles dot_octets
#elif LANES >= 8
// Pairs in 16 bits: eight times 2 · 15 · 128 fit, octets would not.
#define PAIRS(BITS)                                                                                                   \
  INLINE ints dot_nibbles(ints acc, const words q[8], const int8_t *x) {                                              \
    __m##BITS##i pairs = _mm##BITS##_set1_epi16(0);                                                                   \
    EACH_FOUR {                                                                                                       \
      __m##BITS##i four = _mm##BITS##_set1_epi32(((const quad *)x)[i]);                                               \
      pairs = _mm##BITS##_add_epi16(pairs, _mm##BITS##_maddubs_epi16((__m##BITS##i)q[i], four));                      \
    }                                                                                                                 \
    return acc + (ints)_mm##BITS##_madd_epi16(pairs, _mm##BITS##_set1_epi16(1));                                      \
  }
#if LANES == 16
PAIRS(512)
#else
PAIRS(256)
#endif
INLINE ints dot_octets(ints acc, const words q[8], const int8_t *x) {
  words low[8], high[8];
  EACH_FOUR low[i] = q[i] & 0x0f0f0f0f, high[i] = q[i] >> 4 & 0x0f0f0f0f;
  return dot_nibbles(acc + (dot_nibbles((ints){0}, high, x) << 4), low, x);
}
#else
GENERIC_DOT(dot_octets)
#define dot_nibbles dot_octets
#endif

INLINE void take_nibbles(const uint8_t *p, words q[8]) {
  for (int i = 0; i < 4; i++) {
    words both;
    memcpy(&both, p + i * LANES * 4, sizeof both);
    q[i] = both & 0x0f0f0f0f;
    q[4 + i] = both >> 4 & 0x0f0f0f0f;
  }
}
INLINE void take_octets(const uint8_t *p, words q[8]) { memcpy(q, p, LANES * 32); }

struct tiles {
  const uint8_t *w;
  int64_t blocks, N, tile_bytes;
  const uint8_t *x; // [T, blocks] of octets32, SHORT bytes or all of it
  float *y;         // [T, N]
};

// One strip of LANES outputs against C rows of x.
#define STRIP(KIND, BITS, C)                                                                                          \
  static void strip_##KIND##_##BITS##_##C(const struct tiles *j, int64_t strip, int64_t t) {                          \
    const int64_t step = BITS == 16 ? sizeof(struct octets32) : SHORT, row = j->blocks * step;                        \
    const uint8_t *w = j->w + strip * j->blocks * j->tile_bytes, *x = j->x + t * row;                                 \
    vec sums[C];                                                                                                      \
    for (int c = 0; c < C; c++) sums[c] = (vec){0};                                                                   \
    for (int64_t b = 0; b < j->blocks; b++, w += j->tile_bytes, x += step) {                                          \
      words q[8];                                                                                                     \
      take_##KIND(w + HEAD, q);                                                                                       \
      vec d = halves(w), m = halves(w + LANES * 2);                                                                   \
      for (int c = 0; c < C; c++) {                                                                                   \
        const struct octets32 *o = (const struct octets32 *)(x + c * row);                                            \
        ints acc = dot_##KIND((ints){0}, q, o->high);                                                                 \
        if (BITS == 16) acc = dot_##KIND(acc << 8, q, o->low);                                                        \
        sums[c] += __builtin_convertvector(acc, vec) * (d * o->scale);                                                \
        sums[c] += m * o->sum;                                                                                        \
      }                                                                                                               \
    }                                                                                                                 \
    for (int c = 0; c < C; c++) *(vec *)(j->y + (t + c) * j->N + strip * LANES) = sums[c];                            \
  }
#define STRIPS(KIND, BITS)                                                                                            \
  STRIP(KIND, BITS, 1) STRIP(KIND, BITS, 2) STRIP(KIND, BITS, 4) STRIP(KIND, BITS, 8)                                 \
  static void strips_##KIND##_##BITS(const struct tiles *j, int64_t from, int64_t to, int64_t T) {                    \
    for (int64_t strip = from; strip < to; strip++) {                                                                 \
      int64_t t = 0;                                                                                                  \
      for (; t + 8 <= T; t += 8) strip_##KIND##_##BITS##_8(j, strip, t);                                              \
      if (t + 4 <= T) strip_##KIND##_##BITS##_4(j, strip, t), t += 4;                                                 \
      if (t + 2 <= T) strip_##KIND##_##BITS##_2(j, strip, t), t += 2;                                                 \
      if (t < T) strip_##KIND##_##BITS##_1(j, strip, t);                                                              \
    }                                                                                                                 \
  }
STRIPS(nibbles, 8) STRIPS(nibbles, 16) STRIPS(octets, 8) STRIPS(octets, 16)

static int64_t tile_bytes(const struct tensor *w) { return HEAD + LANES * (w->type == Q4_1 ? 16 : 32); }

// dst [N, T], src = {tiles [K, N], x as rankgate_round leaves it}.
void rankgate_linear_tiles(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const struct tensor *w = dst->src[0], *x = dst->src[1];
  struct tiles j = {w->data, w->ne[0] / 32, w->ne[1], tile_bytes(w), x->data, dst->data};
  int is16 = x->nb[1] == j.blocks * sizeof(struct octets32);
  int64_t strips = j.N / LANES, from = strips * ith / nth, to = strips * (ith + 1) / nth;
  if (w->type == Q4_1) (is16 ? strips_nibbles_16 : strips_nibbles_8)(&j, from, to, x->ne[1]);
  else (is16 ? strips_octets_16 : strips_octets_8)(&j, from, to, x->ne[1]);
}

// To the nearest whole number, for |v| < 2^22.
static inline ints nearest(vec v) { return (ints)(v + 0x1.8p23f) - (ints)splat(0x1.8p23f); }

// dst [10 or 18 words a block, T] = x [K, T] in 8 or 16 bits.
void rankgate_round(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const struct tensor *x = dst->src[0];
  const int64_t blocks = x->ne[0] / 32, all = blocks * x->ne[1], step = dst->nb[1] / blocks;
  const int is16 = step == sizeof(struct octets32);
  const float top = is16 ? 32512 : 127; // 127 · 256: the high half of no number is 128
  for (int64_t b = all * ith / nth; b < all * (ith + 1) / nth; b++) {
    const float *v = (const float *)x->data + b * 32;
    struct octets32 *o = (struct octets32 *)((uint8_t *)dst->data + b * step);
    ints large = {0}; // sizes as bits: they compare as the floats do
    EACH {
      ints size = *(const ints *)(v + i * LANES) & 0x7fffffff, more = size > large;
      large = (size & more) | (large & ~more);
    }
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = large[i] > bits ? large[i] : bits;
    float max;
    memcpy(&max, &bits, 4);
    const float inverse = max > 0 ? top / max : 0;
    ints total = {0};
    int32_t q[32];
    EACH {
      ints each = nearest(*(const vec *)(v + i * LANES) * inverse);
      total += each;
      memcpy(q + i * LANES, &each, sizeof each);
    }
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += total[i];
    o->scale = max / top;
    o->sum = o->scale * (float)sum;
    if (is16) {
      for (int i = 0; i < 32; i++) o->high[i] = (int8_t)((q[i] + 128) >> 8);
      for (int i = 0; i < 32; i++) o->low[i] = (int8_t)q[i];
    } else {
      for (int i = 0; i < 32; i++) o->high[i] = (int8_t)q[i];
    }
  }
}

// dst [K, T] f32, src = {tiles [K, N], ids [T]}.
void rankgate_embed_tiles(struct tensor *dst, int ith, int nth, void *unused) {
  (void)unused;
  const struct tensor *w = dst->src[0], *ids = dst->src[1];
  const int64_t K = w->ne[0], T = ids->ne[0], bytes = tile_bytes(w);
  for (int64_t t = T * ith / nth; t < T * (ith + 1) / nth; t++) {
    const int32_t id = ((const int32_t *)ids->data)[t], lane = id % LANES;
    const uint8_t *tile = (const uint8_t *)w->data + id / LANES * (K / 32) * bytes;
    float *y = (float *)dst->data + t * K;
    for (int64_t b = 0; b < K / 32; b++, tile += bytes, y += 32) {
      const float d = half(tile + lane * 2), m = half(tile + LANES * 2 + lane * 2);
      const uint8_t *q = tile + HEAD + lane * 4;
      for (int i = 0; i < 32; i++) {
        const uint8_t *four = q + (w->type == Q4_1 ? i % 16 : i) / 4 * LANES * 4;
        const int number = w->type == Q8_1 ? four[i % 4] : i < 16 ? four[i % 4] & 15 : four[i % 4] >> 4;
        y[i] = d * (float)number + m;
      }
    }
  }
}

// A block of a row as it is in the file.
struct affine32 {
  float d, m;
  uint8_t q[32];
};

INLINE void open_block(int type, const uint8_t *row, int64_t b, struct affine32 *o) {
  static const int sizes[] = {[Q4_0] = 18, [Q4_1] = 20, [Q5_0] = 22, [Q5_1] = 24, [Q8_0] = 34, [Q4_K] = 144, [Q5_K] = 176};
  const int isK = type == Q4_K || type == Q5_K, j = b & 7, hasMin = type == Q4_1 || type == Q5_1;
  const uint8_t *p = row + (isK ? b >> 3 : b) * sizes[type];
  o->d = half(p), o->m = half(p + 2);
  if (isK) {
    float s, m;
    scale_min(p + 4, j, &s, &m);
    o->d *= s, o->m *= -m;
    for (int i = 0; i < 32; i++) {
      const int four = p[(type == Q4_K ? 16 : 48) + (j >> 1) * 32 + i] >> (j & 1) * 4 & 15;
      o->q[i] = type == Q4_K ? four : four | (p[16 + i] >> j & 1) << 4;
    }
    return;
  }
  if (!hasMin) o->m = o->d * (type == Q4_0 ? -8 : type == Q5_0 ? -16 : -128);
  p += hasMin ? 4 : 2;
  if (type == Q8_0) {
    for (int i = 0; i < 32; i++) o->q[i] = p[i] ^ 128;
    return;
  }
  const int is5 = type == Q5_0 || type == Q5_1;
  for (int i = 0; i < 16; i++) o->q[i] = p[is5 * 4 + i] & 15, o->q[16 + i] = p[is5 * 4 + i] >> 4;
  if (is5)
    for (int i = 0; i < 32; i++) o->q[i] |= (p[i / 8] >> i % 8 & 1) << 4;
}

INLINE void tile_rows(int type, uint8_t *tiles, const uint8_t *rows, int64_t N, int64_t K, int64_t row_bytes) {
  const int four = type == Q4_0 || type == Q4_1 || type == Q4_K;
  for (int64_t n = 0; n < N; n += LANES)
    for (int64_t b = 0; b < K / 32; b++, tiles += HEAD + LANES * (four ? 16 : 32))
      for (int lane = 0; lane < LANES; lane++) {
        struct affine32 o;
        open_block(type, rows + (n + lane) * row_bytes, b, &o);
        const _Float16 d = (_Float16)o.d, m = (_Float16)o.m;
        memcpy(tiles + lane * 2, &d, 2);
        memcpy(tiles + LANES * 2 + lane * 2, &m, 2);
        uint8_t *q = tiles + HEAD + lane * 4;
        if (four)
          for (int i = 0; i < 16; i++) o.q[i] |= o.q[16 + i] << 4;
        for (int i = 0; i < (four ? 4 : 8); i++) memcpy(q + i * LANES * 4, o.q + i * 4, 4);
      }
}

// Called directly. rows: [N, K] of a file's type; tiles: nibbles for the types of four bits, octets for the others.
void rankgate_tile(uint8_t *tiles, const uint8_t *rows, int type, int64_t N, int64_t K, int64_t row_bytes) {
#define OF(TYPE) case TYPE: tile_rows(TYPE, tiles, rows, N, K, row_bytes); break;
  switch (type) { OF(Q4_0) OF(Q4_1) OF(Q5_0) OF(Q5_1) OF(Q8_0) OF(Q4_K) OF(Q5_K) }
}
