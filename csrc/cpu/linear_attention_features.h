// Tiles of tokens: rows read and written, and the feature maps φ of queries and keys.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/linear_attention_products.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

// ---- rows ----

// The next tokens of a block that count, at most kTile.
struct Tokens {
  int64_t count = 0;
  int64_t index[kTile];
  // Moves `next` behind the last token taken.
  bool take(const bool* mask, int64_t& next, int64_t end) {
    for (count = 0; next < end && count < kTile; ++next)
      if (!mask || mask[next]) index[count++] = next;
    return count > 0;
  }
};

// Heads lie side by side in a token, so that a head's next row is often a page away, where the
// processor does not prefetch by itself. So each pass asks for the rows that it will read or write
// one tile later, token by token between the exponentials: as many requests at once would stall.
struct Stream {
  template <class T>
  Stream(T* head, int64_t token_stride, int64_t n)
      : data(reinterpret_cast<const char*>(head)),
        stride(token_stride * static_cast<int64_t>(sizeof(T))),
        bytes(n * static_cast<int64_t>(sizeof(T))) {}

  void prefetch(int64_t token) const {
    const char* row = data + (token + kTile) * stride;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
  }

  const char* data;
  int64_t stride, bytes;
};

// to [tokens, n_pad], the padding 0.
template <class T>
void read_rows(const T* from, int64_t stride, const Tokens& tokens, int64_t n, int64_t n_pad,
               float* to) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    const T* row = from + tokens.index[t] * stride;
    for (int64_t j = 0; j < n_pad; j += kLanes) store(to + t * n_pad + j, load(row + j, n - j));
  }
}

// Writes a vector of results.
template <class T>
inline void write(T* to, Vec x, int64_t n) {
  store(to, x, n);
}

#if defined(__AVX512BF16__)
// The same as a factor over channels: adjacent numbers are pairs already.
inline void read_rows(const BFloat16* from, int64_t stride, const Tokens& tokens, int64_t n,
                      int64_t n_pad, Pair* to) {
  for (int64_t t = 0; t < tokens.count; ++t, to += row_stride<Pair>(n_pad)) {
    const BFloat16* row = from + tokens.index[t] * stride;
    for (int64_t j = 0; j < n_pad; j += 2 * kLanes) {
      const __mmask32 inside = n - j >= 32 ? ~0u : n > j ? (1u << (n - j)) - 1 : 0;
      store(to + j / 2, (IntVec)_mm512_maskz_loadu_epi16(inside, row + j));
    }
  }
}

// A tenth of the instructions of `store`; subnormal results are written as 0.
inline void write(BFloat16* to, Vec x, int64_t n) {
  const __mmask16 inside = n >= kLanes ? 0xffff : (1u << n) - 1;
  _mm256_mask_storeu_epi16(to, inside, (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

template <class T>
void write_rows(const float* from, int64_t n_pad, const Tokens& tokens, int64_t n, T* to,
                int64_t stride) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    T* row = to + tokens.index[t] * stride;
    for (int64_t j = 0; j < n; j += kLanes) write(row + j, load(from + t * n_pad + j), n - j);
  }
}

// Multiplies each token's row by a factor.
inline void scale_rows(const float* factor, int64_t rows, int64_t n_pad, float* to) {
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t j = 0; j < n_pad; j += kLanes)
      store(to + t * n_pad + j, load(to + t * n_pad + j) * factor[t]);
}

// ---- feature maps ----

// e^x for x ≤ 0, φ of inputs of type T. Where φ is going to be rounded to bfloat16, within 3e-6 and
// in half the instructions: with n the integer nearest to x·log2(e), e^x = 2^n 2^f and |f| ≤ 1/2;
// the polynomial is minimax with 2^0 = 1.
template <class T>
inline Vec feature_exp(Vec x) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<Factor<T>>) {
    const Vec power = max(broadcast(-160.f), x * 1.44269504f);  // 2^-160 becomes 0
    const Vec n = _mm512_maskz_roundscale_ps(0xffff, power, _MM_FROUND_TO_NEAREST_INT);
    const Vec f = power - n;
    Vec p = broadcast(9.582818386e-3f);
    p = fma(p, f, broadcast(5.590637020e-2f));
    p = fma(p, f, broadcast(2.402409887e-1f));
    p = fma(p, f, broadcast(6.931241998e-1f));
    p = fma(p, f, broadcast(1.f));
    return _mm512_maskz_scalef_ps(0xffff, p, n);
  }
#endif
  return exp_nonpositive(x);
}

template <class T>
inline Vec elu1(Vec x) {
  const Vec e = feature_exp<T>(min(Vec{}, x));
  return x > Vec{} ? x + 1.f : e;
}

// φ(q) for a tile of tokens, as a product of `F` will see it, and the reciprocals of its divisors,
// 0 for a divisor of 0. The divisor sums what is multiplied, so that weights add up to 1.
template <FeatureMap kMap, class F, class T, size_t kStreams>
void query_features(const T* q, int64_t stride, const Tokens& tokens, const Sizes& sizes,
                    const float* z, float eps, const Stream (&next)[kStreams], float* phi,
                    float* reciprocal) {
  [[maybe_unused]] float largest[kTile];
  if constexpr (kMap == FeatureMap::kSoftmax) {
    for (int64_t t = 0; t < tokens.count; ++t) {
      const T* row = q + tokens.index[t] * stride;
      Vec top = broadcast(-INFINITY);
      for (int64_t j = 0; j < sizes.d_pad; j += kLanes)
        top = max(top, load(row + j, sizes.d - j, -INFINITY));
      largest[t] = max(top);
    }
  }
  const float root = std::sqrt(static_cast<float>(sizes.d));
  for (int64_t t = 0; t < tokens.count; ++t) {
    const T* row = q + tokens.index[t] * stride;
    for (const Stream& stream : next) stream.prefetch(tokens.index[t]);
    Vec total = {};
    for (int64_t j = 0; j < sizes.d_pad; j += kLanes) {
      Vec x;
      if constexpr (kMap == FeatureMap::kSoftmax) {
        x = as_factor<F>(
            feature_exp<T>(load(row + j, sizes.d - j, -INFINITY) - broadcast(largest[t])));
        total = total + x;
      } else {
        x = as_factor<F>(elu1<T>(load(row + j, sizes.d - j)));
        total = fma(x, load(z + j), total);
      }
      store(phi + t * sizes.d_pad + j, x);
    }
    float divisor = sum(total);
    if constexpr (kMap == FeatureMap::kSoftmax)
      divisor *= root;
    else
      divisor += eps;
    reciprocal[t] = divisor == 0 ? 0 : 1 / divisor;
  }
}

// φ(k) for a tile of tokens, as a product of `F` will see it: elu + 1, or exp(k − shift)·scale.
template <FeatureMap kMap, class F, class T, size_t kStreams>
void key_features(const T* k, int64_t stride, const Tokens& tokens, const Sizes& sizes,
                  const float* shift, const float* scale, const Stream (&next)[kStreams],
                  float* phi) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    const T* row = k + tokens.index[t] * stride;
    for (const Stream& stream : next) stream.prefetch(tokens.index[t]);
    for (int64_t j = 0; j < sizes.d_pad; j += kLanes) {
      Vec x = load(row + j, sizes.d - j);
      if constexpr (kMap == FeatureMap::kSoftmax)
        x = feature_exp<T>(x - load(shift + j)) * load(scale + j);
      else
        x = elu1<T>(x);
      store(phi + t * sizes.d_pad + j, as_factor<F>(x));
    }
  }
}

// The largest valid keys of V vectors of channels.
template <int V, class T>
void largest_of(const T* k, int64_t stride, const bool* mask, int64_t begin, int64_t end,
                int64_t channels, float* largest) {
  const Stream next(k, stride, channels < V * kLanes ? channels : V * kLanes);
  Vec top[V];
  for (int i = 0; i < V; ++i) top[i] = broadcast(-INFINITY);
  for (int64_t n = begin; n < end; ++n) {
    const T* row = k + n * stride;
    next.prefetch(n);
    if (mask && !mask[n]) continue;
    for (int i = 0; i < V; ++i) top[i] = max(top[i], load(row + i * kLanes, channels - i * kLanes));
  }
  for (int i = 0; i < V; ++i) store(largest + i * kLanes, top[i]);
}

template <class T>
void largest_keys(const T* k, int64_t stride, const bool* mask, int64_t begin, int64_t end,
                  const Sizes& sizes, float* largest) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= sizes.d_pad; j += 4 * kLanes)
    largest_of<4>(k + j, stride, mask, begin, end, sizes.d - j, largest + j);
  for (; j < sizes.d_pad; j += kLanes)
    largest_of<1>(k + j, stride, mask, begin, end, sizes.d - j, largest + j);
  for (j = 0; j < sizes.d_pad; ++j)
    if (largest[j] == -INFINITY) largest[j] = 0;  // no key counts: exp(−inf − 0) = 0
}

}  // namespace
}  // namespace nefkern::cpu::NEFKERN_ISA
