// Products of small matrices, in float32 or of pairs of bfloat16.
//
// A processor that multiplies bfloat16 takes two of them from each factor and adds both products to
// a float32 sum. So an element of a factor is a float, or a Pair of numbers that are adjacent along
// the depth, the index that the product sums over. A matrix that lies in rows becomes a factor
// `over_columns`, pairs within a row, or `over_rows`, each row interleaved with the next. Of floats
// every matrix is a factor as it is.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/linear_attention_memory.h"

namespace nefkern::cpu::NEFKERN_ISA {

// Two bfloat16, the first in the low half.
struct Pair {
  uint32_t bits;
};

#if defined(__AVX512BF16__)
inline constexpr bool kMultipliesPairs = true;
#else
inline constexpr bool kMultipliesPairs = false;
#endif

// What products of inputs of type T are made of.
template <class T>
using Factor = std::conditional_t<kMultipliesPairs && std::is_same_v<T, BFloat16>, Pair, float>;
template <class F>
constexpr bool kPaired = std::is_same_v<F, Pair>;

// Elements of a factor along a depth.
template <class F>
int64_t steps(int64_t depth) {
  return kPaired<F> ? (depth + 1) / 2 : depth;
}

// Elements between rows, paired over n_pad columns.
template <class F>
int64_t row_stride(int64_t n_pad) {
  return kPaired<F> ? round_up(n_pad / 2) : n_pad;
}

// ---- elements ----

#if defined(__AVX512BF16__)
using ShortPairs = uint16_t __attribute__((vector_size(4 * kLanes)));

inline IntVec load(const Pair* p) {
  IntVec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(Pair* p, IntVec x) { std::memcpy(p, &x, sizeof x); }
inline IntVec broadcast(Pair x) { return static_cast<int32_t>(x.bits) - IntVec{}; }

// The processor takes subnormal factors and sums as 0.
inline Vec fma(IntVec a, IntVec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

// 32 numbers to the nearest bfloat16, in order.
inline IntVec rounded(Vec low, Vec high) { return (IntVec)_mm512_cvtne2ps_pbh(high, low); }

// Lane j: the pair (first[j], second[j]).
inline IntVec interleaved(Vec first, Vec second) {
  const auto x = (ShortPairs)rounded(first, second);
  return (IntVec)__builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                         23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                         15, 31);
}

// Sixteen bfloat16, each in the low half of its lane.
inline IntVec low_halves(const void* p) {
  ShortVec x;
  std::memcpy(&x, p, sizeof x);
  return widen(x);
}
#endif

// x as a product of `F` will see it.
template <class F>
inline Vec as_factor(Vec x) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<F>) return (Vec)(widen((ShortVec)_mm512_cvtneps_pbh(x)) << 16);
#endif
  return x;
}

// ---- matrices as factors: `to` is used where they are not factors as they are ----

inline const float* over_columns(const float* from, int64_t, int64_t, float*) { return from; }
inline const float* over_rows(const float* from, int64_t, int64_t, float*) { return from; }

#if defined(__AVX512BF16__)
// to [rows][row_stride(n_pad)] from [rows][n_pad].
inline const Pair* over_columns(const float* from, int64_t rows, int64_t n_pad, Pair* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n_pad; j += 2 * kLanes) {
      const float* low = from + i * n_pad + j;
      const Vec high = j + kLanes < n_pad ? load(low + kLanes) : Vec{};
      store(to + i * row_stride<Pair>(n_pad) + j / 2, rounded(load(low), high));
    }
  return to;
}

// to [steps(rows)][n_pad] from [rows][n_pad].
inline const Pair* over_rows(const float* from, int64_t rows, int64_t n_pad, Pair* to) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < n_pad; j += kLanes) {
      const float* first = from + i * n_pad + j;
      const Vec second = i + 1 < rows ? load(first + n_pad) : Vec{};
      store(to + i / 2 * n_pad + j, interleaved(load(first), second));
    }
  return to;
}

// The same from a factor over columns, [rows][row_stride(n_pad)].
inline const Pair* over_rows(const Pair* from, int64_t rows, int64_t n_pad, Pair* to) {
  const int64_t stride = row_stride<Pair>(n_pad);
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < n_pad; j += kLanes) {
      const Pair* first = from + i * stride + j / 2;
      const IntVec second = i + 1 < rows ? low_halves(first + stride) : IntVec{};
      store(to + i / 2 * n_pad + j, low_halves(first) | second << 16);
    }
  return to;
}
#endif

// to [columns][rows padded] = from [rows][columns] transposed, the padding 0.
template <class F>
void transpose(const F* from, int64_t stride, int64_t rows, int64_t columns, F* to,
               int64_t rows_pad) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[j * rows_pad + i] = from[i * stride + j];
    fill(to + j * rows_pad + rows, rows_pad - rows, F{});
  }
}

// ---- products ----

// c [R, V vectors] = or += Σ_p a(r, p) b[p], with a(r, p) = a[r·lda + p], or a[p·lda + r] if
// kTransposed. The R·V sums stay in registers.
template <int R, int V, bool kTransposed, bool kAdd, class F>
inline __attribute__((always_inline)) void register_tile(int64_t depth, const F* a, int64_t lda,
                                                         const F* b, int64_t ldb, float* c,
                                                         int64_t ldc) {
  Vec total[R][V] = {};
  for (int64_t p = 0; p < depth; ++p) {
    decltype(load(b)) row[V];
    for (int j = 0; j < V; ++j) row[j] = load(b + p * ldb + j * kLanes);
    for (int i = 0; i < R; ++i) {
      const auto factor = broadcast(kTransposed ? a[p * lda + i] : a[i * lda + p]);
      for (int j = 0; j < V; ++j) total[i][j] = fma(factor, row[j], total[i][j]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) {
      float* to = c + i * ldc + j * kLanes;
      store(to, kAdd ? load(to) + total[i][j] : total[i][j]);
    }
}

// Register tiles of R rows down a panel of V vectors, then what is left by halves of R.
template <int R, int V, bool kTransposed, bool kAdd, class F>
void panel(int64_t rows, int64_t depth, const F* a, int64_t lda, const F* b, int64_t ldb, float* c,
           int64_t ldc) {
  int64_t i = 0;
  const int64_t step = kTransposed ? 1 : lda;
  for (; i + R <= rows; i += R)
    register_tile<R, V, kTransposed, kAdd>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc);
  if constexpr (R > 1)
    if (i < rows)
      panel<R / 2, V, kTransposed, kAdd>(rows - i, depth, a + i * step, lda, b, ldb, c + i * ldc,
                                         ldc);
}

// c [rows, columns] = or += a b, b [depth, columns]; columns is a whole number of vectors, and the
// depth is in elements.
template <bool kTransposed, bool kAdd, class F>
void multiply(int64_t rows, int64_t columns, int64_t depth, const F* a, int64_t lda, const F* b,
              int64_t ldb, float* c, int64_t ldc) {
  constexpr int kRows = kLanes == 16 ? 8 : 4;
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    panel<kRows, 2, kTransposed, kAdd>(rows, depth, a, lda, b + j, ldb, c + j, ldc);
  if (j < columns) panel<kRows, 1, kTransposed, kAdd>(rows, depth, a, lda, b + j, ldb, c + j, ldc);
}

}  // namespace nefkern::cpu::NEFKERN_ISA
