/* 3 x 3 convolutions, stride 1, one pixel of zeros around, by Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308).
 *
 * A tile of 4 x 4 results takes 36 products a pair of channels instead of 144. Images are [N, H, W, channels], their
 * channels a multiple of LANES. Between the transforms lie, for each of the 36 places of a tile, ordinary products of
 * matrices: tiles x C by C x K. Both are done for `block` tiles at a time, which stay in the caches of a core.
 *
 *   u       transformed weights, [36][panels][C][PANEL]: panels of PANEL output channels, the last filled with zeros
 *   space   for each thread the tiles before and after the products, [36][block][C] and [36][block][panels * PANEL],
 *           each of the 36 places followed by GAP unused floats; what the last panel has beyond K is never used
 *
 * Images and gradients are float32, or bfloat16 if `half` is set. All that lies between is float32, and so are weights.
 * No result depends on the number of threads.
 */
#include <omp.h>
#include <stdint.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifndef LANES
#define LANES 8 /* floats in a vector of the processor */
#endif
#define PANEL (2 * LANES)
#define PLACES 36
#define GAP 16     /* so that the 36 places do not all fall on the same lines of the cache */
#define SMALL 1024 /* vectors of weights that one thread transforms sooner than others wake up */
#define SLICE 128 /* most channels on a side of the gradient of weights that a thread sums up at a time */
#define INLINE static inline __attribute__((always_inline))

typedef int64_t size;
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef struct {
  size n, h, w, c, k, block, half;
} shape;

INLINE lanes load(const float *p) { return *(const lanes *)p; }
INLINE void store(float *p, lanes v) { *(lanes *)p = v; }
static size tiles_of(size side) { return (side + 3) / 4; }
static size panels_of(size k) { return (k + PANEL - 1) / PANEL; }
static size smaller(size a, size b) { return a < b ? a : b; }

/* Element `i` and those after it of an image or gradient. A bfloat16 is the upper half of a float32, ... */
INLINE lanes load_from(const void *image, size i, int half) {
  if (!half) return load((const float *)image + i);
  return (lanes)(__builtin_convertvector(*(const halves *)((const uint16_t *)image + i), bits) << 16);
}

/* ... rounded to the nearest, to an even one in the middle between two. NaN stays NaN. */
INLINE void store_to(void *image, size i, lanes v, int half) {
  if (!half) {
    store((float *)image + i, v);
    return;
  }
#if defined(__AVX512BF16__) && LANES == 16
  *(halves *)((uint16_t *)image + i) = (halves)_mm512_cvtneps_pbh((__m512)v);
#else
  bits b = (bits)v, whole = (bits)(v == v), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  *(halves *)((uint16_t *)image + i) = __builtin_convertvector((rounded & whole) | (0x7fc0 & ~whole), halves);
#endif
}

static const float ZEROS[LANES];

/* The five small matrices of the paper, applied to a row or column whose elements are `step` apart. */

static inline void input_side(lanes *o, size step, const lanes *d) { /* B^T: 6 -> 6 */
  lanes a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
  o[0] = 4 * d[0] - 5 * d[2] + d[4];
  o[step] = a + b;
  o[2 * step] = a - b;
  o[3 * step] = c + e;
  o[4 * step] = c - e;
  o[5 * step] = 4 * d[1] - 5 * d[3] + d[5];
}

static inline void output_side(lanes *o, size step, const lanes *m) { /* A^T: 6 -> 4 */
  lanes a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
  o[0] = m[0] + a + c;
  o[step] = b + 2 * e;
  o[2 * step] = a + 4 * c;
  o[3 * step] = b + 8 * e + m[5];
}

static inline void gradient_side(lanes *o, size step, const lanes *d) { /* A: 4 -> 6 */
  lanes a = d[0] + d[2], b = d[1] + d[3], c = d[0] + 4 * d[2], e = 2 * d[1] + 8 * d[3];
  o[0] = d[0];
  o[step] = a + b;
  o[2 * step] = a - b;
  o[3 * step] = c + e;
  o[4 * step] = c - e;
  o[5 * step] = d[3];
}

static inline void weight_side(lanes *o, size step, const lanes *g) { /* G: 3 -> 6 */
  lanes a = (g[0] + g[2]) * (-1.0f / 6), b = g[1] * (1.0f / 6), c = g[0] * (1.0f / 24) + g[2] * (1.0f / 6),
        e = g[1] * (1.0f / 12);
  o[0] = 0.25f * g[0];
  o[step] = a - b;
  o[2 * step] = a + b;
  o[3 * step] = c + e;
  o[4 * step] = c - e;
  o[5 * step] = g[2];
}

static inline void weight_gradient_side(lanes *o, size step, const lanes *m) { /* G^T: 6 -> 3 */
  lanes a = (m[1] + m[2]) * (-1.0f / 6), b = m[3] + m[4];
  o[0] = 0.25f * m[0] + a + b * (1.0f / 24);
  o[step] = (m[2] - m[1]) * (1.0f / 6) + (m[3] - m[4]) * (1.0f / 12);
  o[2 * step] = a + b * (1.0f / 6) + m[5];
}

/* Where the pixels of a square of `side` x `side` lie whose first is (y, x) of an image [h, w, c]; zeros for those outside,
 * which `within` (0 outside, else all ones) keeps there. */
INLINE void find_pixels(const void *image, size from, size h, size w, size c, size y, size x, int side, int half,
                        const void **at, size *within) {
  for (int i = 0; i < side; i++)
    for (int j = 0; j < side; j++) {
      int there = y + i >= 0 && y + i < h && x + j >= 0 && x + j < w;
      size element = from + ((y + i) * w + x + j) * c;
      at[i * side + j] = there ? (const char *)image + element * (half ? 2 : 4) : (const char *)ZEROS;
      within[i * side + j] = there ? -1 : 0;
    }
}

/* The first `count` channels of an image [h, w, c] from (y, x) on, zeros outside, into places `step` apart: the 6 x 6
 * pixels that a tile reads ... */
INLINE void read_tile(const void *image, size from, size h, size w, size c, size count, size y, size x, float *to,
                      size step, int half) {
  const void *at[36];
  size within[36];
  find_pixels(image, from, h, w, c, y, x, 6, half, at, within);
  for (size ch = 0; ch < count; ch += LANES) {
    lanes mid[36], d[6], q[6];
    for (int j = 0; j < 6; j++) {
      for (int i = 0; i < 6; i++) d[i] = load_from(at[6 * i + j], ch & within[6 * i + j], half);
      input_side(mid + j, 6, d);
    }
    for (int i = 0; i < 6; i++) {
      input_side(q, 1, mid + 6 * i);
      for (int j = 0; j < 6; j++) store(to + (6 * i + j) * step + ch, q[j]);
    }
  }
}

/* ... and the 4 x 4 gradients that arrive at its results. */
INLINE void read_gradient(const void *image, size from, size h, size w, size c, size count, size y, size x, float *to,
                          size step, int half) {
  const void *at[16];
  size within[16];
  find_pixels(image, from, h, w, c, y, x, 4, half, at, within);
  for (size ch = 0; ch < count; ch += LANES) {
    lanes mid[24], d[4], q[6];
    for (int j = 0; j < 4; j++) {
      for (int i = 0; i < 4; i++) d[i] = load_from(at[4 * i + j], ch & within[4 * i + j], half);
      gradient_side(mid + j, 4, d);
    }
    for (int i = 0; i < 6; i++) {
      gradient_side(q, 1, mid + 4 * i);
      for (int j = 0; j < 6; j++) store(to + (6 * i + j) * step + ch, q[j]);
    }
  }
}

INLINE void write_tile(const float *from, size step, const float *bias, void *image, size to, size h, size w, size k,
                       size y, size x, int half) {
  for (size ch = 0; ch < k; ch += LANES) {
    lanes mid[24], m[6], q[4], extra = bias ? load(bias + ch) : (lanes){0};
    for (int j = 0; j < 6; j++) {
      for (int i = 0; i < 6; i++) m[i] = load(from + (6 * i + j) * step + ch);
      output_side(mid + j, 6, m);
    }
    for (int i = 0; i < 4 && y + i < h; i++) {
      output_side(q, 1, mid + 6 * i);
      for (int j = 0; j < 4 && x + j < w; j++) store_to(image, to + ((y + i) * w + x + j) * k + ch, q[j] + extra, half);
    }
  }
}

/* m[r][0..PANEL) (+)= sum over i < n of a(r, i) * b[i][0..PANEL), some rows at a time that fit the registers */
#define ROWS(R)                                                                                                      \
  static void rows_##R(const float *a, size row, size next, const float *b, size below, float *m, size wide,        \
                       size n, int add) {                                                                            \
    lanes sum[R][2];                                                                                                 \
    for (int r = 0; r < R; r++)                                                                                      \
      for (int p = 0; p < 2; p++) sum[r][p] = add ? load(m + r * wide + p * LANES) : (lanes){0};                     \
    for (size i = 0; i < n; i++) {                                                                                   \
      lanes left = load(b + i * below), right = load(b + i * below + LANES);                                         \
      for (int r = 0; r < R; r++) {                                                                                  \
        float value = a[i * next + r * row];                                                                         \
        sum[r][0] += value * left;                                                                                   \
        sum[r][1] += value * right;                                                                                  \
      }                                                                                                              \
    }                                                                                                                \
    for (int r = 0; r < R; r++)                                                                                      \
      for (int p = 0; p < 2; p++) store(m + r * wide + p * LANES, sum[r][p]);                                        \
  }
#if LANES == 16
#define MOST 12
ROWS(12) ROWS(11) ROWS(10) ROWS(9) ROWS(8) ROWS(7)
#else
#define MOST 6
#endif
ROWS(6) ROWS(5) ROWS(4) ROWS(3) ROWS(2) ROWS(1)

typedef void kernel(const float *, size, size, const float *, size, float *, size, size, int);
static kernel *const BY_ROWS[MOST] = {
    rows_1, rows_2, rows_3, rows_4, rows_5, rows_6,
#if LANES == 16
    rows_7, rows_8, rows_9, rows_10, rows_11, rows_12,
#endif
};

static void product(const float *a, size row, size next, const float *b, size below, size panel, float *m, size wide,
                    size rows, size n, size panels, int add) {
  for (size p = 0; p < panels; p++, b += panel, m += PANEL)
    for (size r = 0; r < rows; r += MOST)
      BY_ROWS[smaller(rows - r, MOST) - 1](a + r * row, row, next, b, below, m + r * wide, wide, n, add);
}

/* How many floats `u` and, for each thread, `space` take. */
size weight_floats(size c, size k) { return PLACES * c * panels_of(k) * PANEL; }
size space_floats(size c, size k, size block) { return PLACES * (block * (c + panels_of(k) * PANEL + 2 * GAP) + 2 * GAP); }

/* w: [k][c][3][3], its elements `at` apart along each axis */
static void transform_weights(const float *w, const size *at, float *u, size c, size k, int threads) {
  size panels = panels_of(k), step = panels * c * PANEL;
#pragma omp parallel for num_threads(threads) schedule(static) if (panels * c > SMALL)
  for (size place = 0; place < panels * c; place++) {
    size first = place / c * PANEL, ch = place % c;
    float kernel[9][PANEL];
    for (int i = 0; i < 9; i++)
      for (size o = 0; o < PANEL; o++)
        kernel[i][o] = first + o < k ? w[(first + o) * at[0] + ch * at[1] + i / 3 * at[2] + i % 3 * at[3]] : 0;
    for (size o = 0; o < PANEL; o += LANES) {
      lanes mid[18], g[3], q[6];
      for (int j = 0; j < 3; j++) {
        for (int i = 0; i < 3; i++) g[i] = load(kernel[3 * i + j] + o);
        weight_side(mid + j, 3, g);
      }
      for (int i = 0; i < 6; i++) {
        weight_side(q, 1, mid + 3 * i);
        for (int j = 0; j < 6; j++) store(u + (6 * i + j) * step + place * PANEL + o, q[j]);
      }
    }
  }
}

INLINE void convolve_as(const void *x, const float *w, const size *at, const float *bias, void *y, float *u, float *space,
                        const shape *s, int threads, int half) {
  size across = tiles_of(s->w), each = tiles_of(s->h) * across, tiles = s->n * each;
  size panels = panels_of(s->k), wide = panels * PANEL, blocks = (tiles + s->block - 1) / s->block;
  size into = s->block * s->c + GAP, out = s->block * wide + GAP;
  transform_weights(w, at, u, s->c, s->k, threads);
#pragma omp parallel num_threads(threads)
  {
    float *before = space + omp_get_thread_num() * space_floats(s->c, s->k, s->block), *after = before + PLACES * into;
#pragma omp for schedule(dynamic)
    for (size b = 0; b < blocks; b++) {
      size first = b * s->block, count = smaller(s->block, tiles - first);
      for (size r = 0; r < count; r++) {
        size image = (first + r) / each * s->h * s->w, tile = (first + r) % each;
        read_tile(x, image * s->c, s->h, s->w, s->c, s->c, tile / across * 4 - 1, tile % across * 4 - 1,
                  before + r * s->c, into, half);
      }
      for (size i = 0; i < PLACES; i++)
        product(before + i * into, s->c, 1, u + i * s->c * wide, PANEL, s->c * PANEL, after + i * out, wide, count,
                s->c, panels, 0);
      for (size r = 0; r < count; r++) {
        size image = (first + r) / each * s->h * s->w, tile = (first + r) % each;
        write_tile(after + r * wide, out, bias, y, image * s->k, s->h, s->w, s->k, tile / across * 4,
                   tile % across * 4, half);
      }
    }
  }
}

/* y[n, h, w, k] = x[n, h, w, c] * w, plus a bias or none. The gradient to x is the same with w turned and transposed. */
void convolve(const void *x, const float *w, const size *at, const float *bias, void *y, float *u, float *space,
              const shape *s, int threads) {
  if (s->half)
    convolve_as(x, w, at, bias, y, u, space, s, threads, 1);
  else
    convolve_as(x, w, at, bias, y, u, space, s, threads, 0);
}

/* to_w[k][c][3][3], its elements `at` apart: the gradient of y to w where `gradient` arrives at y; u takes its transform.
 *
 * Input and output channels are cut into slices, and a thread takes a slice of each through all tiles: no thread waits
 * for another, every sum has one order, and what is summed up stays in the caches of a core. For that some slices are
 * read more than once. The rows of a tile have GAP unused floats between them too.
 */
INLINE void weight_gradient_as(const void *x, const void *gradient, float *to_w, const size *at, float *u, float *space,
                               const shape *s, int threads, int half) {
  size across = tiles_of(s->w), each = tiles_of(s->h) * across, tiles = s->n * each;
  size groups = s->c / LANES, panels = panels_of(s->k), wide = panels * PANEL;
  size rows = (s->c + SLICE - 1) / SLICE, columns = (wide + SLICE - 1) / SLICE;
  while (rows * columns < threads && (rows < groups || columns < panels)) {
    if (columns == panels || (rows < groups && groups * columns >= 2 * panels * rows))
      rows++;
    else
      columns++;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (size part = 0; part < rows * columns; part++) {
    size row = part / columns, column = part % columns;
    size c0 = groups * row / rows * LANES, c = groups * (row + 1) / rows * LANES - c0;
    size k0 = panels * column / columns * PANEL, last = panels * (column + 1) / columns * PANEL;
    size k = smaller(last, s->k) - k0, width = last - k0;
    float *before = space + omp_get_thread_num() * space_floats(s->c, s->k, s->block);
    size from = c + GAP, to_row = width + GAP, into = s->block * from + GAP, arriving = s->block * to_row + GAP;
    float *after = before + PLACES * into, *to = u + PLACES * (c0 * wide + c * k0);
    for (size b = 0; b * s->block < tiles; b++) {
      size first = b * s->block, count = smaller(s->block, tiles - first);
      for (size r = 0; r < count; r++) {
        size image = (first + r) / each * s->h * s->w, tile = (first + r) % each;
        size y = tile / across * 4, left = tile % across * 4;
        read_tile(x, image * s->c + c0, s->h, s->w, s->c, c, y - 1, left - 1, before + r * from, into, half);
        read_gradient(gradient, image * s->k + k0, s->h, s->w, s->k, k, y, left, after + r * to_row, arriving, half);
      }
      for (size i = 0; i < PLACES; i++)
        product(before + i * into, 1, from, after + i * arriving, to_row, PANEL, to + i * c * width, width, c, count,
                width / PANEL, b > 0);
    }
    for (size ch = 0; ch < c; ch++)
      for (size o = 0; o < k; o += LANES) {
        lanes mid[18], m[6], q[3];
        for (int j = 0; j < 6; j++) {
          for (int i = 0; i < 6; i++) m[i] = load(to + ((6 * i + j) * c + ch) * width + o);
          weight_gradient_side(mid + j, 6, m);
        }
        for (int i = 0; i < 3; i++) {
          weight_gradient_side(q, 1, mid + 6 * i);
          for (int j = 0; j < 3; j++)
            for (size l = 0; l < LANES; l++)
              to_w[(k0 + o + l) * at[0] + (c0 + ch) * at[1] + i * at[2] + j * at[3]] = q[j][l];
        }
      }
  }
}

void weight_gradient(const void *x, const void *gradient, float *to_w, const size *at, float *u, float *space,
                     const shape *s, int threads) {
  if (s->half)
    weight_gradient_as(x, gradient, to_w, at, u, space, s, threads, 1);
  else
    weight_gradient_as(x, gradient, to_w, at, u, space, s, threads, 0);
}
