// A page of f16 numbers rounded to q8_0, as page-numbers.ts says: the same bytes.

#include "numbers.h"

// To the nearest f16, for f ≥ 0 below infinity.
static uint16_t half_bits(float f) {
  uint32_t u;
  if (f < 0x1p-14f) { // subnormal: adding 0.5 leaves the rounded number in the last bits
    f += 0.5f;
    memcpy(&u, &f, 4);
    return (uint16_t)(u - 0x3f000000);
  }
  memcpy(&u, &f, 4);
  return (uint16_t)((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}

void rankgate_round_page(uint8_t *to, const uint8_t *from, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++, to += 34, from += 64) {
    float v[32], max = 0;
    EACH {
      vec each = halves(from + i * LANES * 2);
      memcpy(v + i * LANES, &each, sizeof each);
    }
    for (int i = 0; i < 32; i++) {
      float size = __builtin_fabsf(v[i]);
      max = size > max ? size : max;
    }
    const uint16_t scale = half_bits(max / 127);
    memcpy(to, &scale, 2);
    const float d = half(to), inverse = d > 0 ? 1 / d : 0;
    for (int i = 0; i < 32; i++) {
      float q = v[i] * inverse;
      q = q > 127 ? 127 : q < -127 ? -127 : q;
      to[2 + i] = (uint8_t)(int8_t)((q + 0x1.8p23f) - 0x1.8p23f);
    }
  }
}
