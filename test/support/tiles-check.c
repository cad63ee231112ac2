// Tiles against linears over the same rows, for whatever level this is compiled for: prints the largest error of each type and
// number of bits, as a share of the result's size (mean squares). Seeded; scales are f16 numbers from 2^-7 to 2^-5.

#include "../../src/kernels/ggml/native/numbers.h"
#include <stdio.h>
#include <stdlib.h>

void rankgate_linear(struct tensor *, int, int, void *);
void rankgate_linear_tiles(struct tensor *, int, int, void *);
void rankgate_round(struct tensor *, int, int, void *);
void rankgate_tile(uint8_t *, const uint8_t *, int, int64_t, int64_t, int64_t);

enum { N = 48, K = 512, T = 15 };
static const struct {
  const char *name;
  int type, block, bytes, scales, tiles; // tiles: ggml's type of them
} types[] = {{"q4_0", Q4_0, 32, 18, 1, Q4_1},   {"q4_1", Q4_1, 32, 20, 2, Q4_1},   {"q5_0", Q5_0, 32, 22, 1, 9},
             {"q5_1", Q5_1, 32, 24, 2, 9},      {"q8_0", Q8_0, 32, 34, 1, 9},      {"q4_k", Q4_K, 256, 144, 2, Q4_1},
             {"q5_k", Q5_K, 256, 176, 2, 9}};

int main(void) {
  static float x[T * K], wanted[T * N], got[T * N], rounded[T * K / 32 * 18];
  static uint8_t rows[N * K * 2], tiles[N * K * 2];
  srand(11);
  for (int i = 0; i < T * K; i++) x[i] = (float)(rand() % 4001 - 2000) / 700;
  for (unsigned k = 0; k < sizeof types / sizeof *types; k++) {
    const int rowBytes = K / types[k].block * types[k].bytes;
    for (int i = 0; i < N * rowBytes; i++) rows[i] = rand() >> 7;
    for (int i = 0; i < N * rowBytes; i += types[k].bytes)
      for (int s = 0; s < types[k].scales; s++) {
        uint16_t half = 0x2000 + rand() % 0x800;
        memcpy(rows + i + 2 * s, &half, 2);
      }
    struct tensor xs = {.ne = {K, T, 1, 1}, .nb = {4, K * 4}, .data = x};
    struct tensor w = {.type = types[k].type, .ne = {K, N, 1, 1}, .nb = {types[k].bytes, rowBytes}, .data = rows};
    struct tensor tiled = {.type = types[k].tiles, .ne = {K, N, 1, 1}, .data = tiles};
    struct tensor y = {.data = wanted, .src = {&w, &xs}};
    rankgate_linear(&y, 0, 1, 0);
    rankgate_tile(tiles, rows, types[k].type, N, K, rowBytes);
    for (int bits = 8; bits <= 16; bits += 8) {
      struct tensor r = {.ne = {0, T, 1, 1}, .nb = {4, K / 32 * (2 + bits) * 4}, .data = rounded, .src = {&xs}};
      struct tensor z = {.data = got, .src = {&tiled, &r}};
      for (int i = 0; i < 3; i++) rankgate_round(&r, i, 3, 0);
      for (int i = 0; i < 2; i++) rankgate_linear_tiles(&z, i, 2, 0);
      double error = 0, size = 0;
      for (int i = 0; i < T * N; i++) error += (got[i] - wanted[i]) * (double)(got[i] - wanted[i]), size += wanted[i] * (double)wanted[i];
      printf("%s %d %.3g\n", types[k].name, bits, error / size);
    }
  }
}
