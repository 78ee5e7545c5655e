// A row of y is held in registers while the rows of x that it needs stream by. What limits this is
// not arithmetic but the way of x's rows from the second- and third-level cache; hence no copies,
// whole rows (long runs of lines) and a prefetch some entries ahead.
#include "cpu/spmm.h"

#include <cstring>

#include "cpu/tiles.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMostVectors = 16;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMostVectors = 8;  // of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kMostVectors = 8;
#endif
constexpr int64_t kPrefetchAhead = 8;  // entries
constexpr int64_t kRowsAPiece = 32;

using BFloat16 = uint16_t;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  // The masked form, all lanes on, avoids a false warning of GCC 12.
  return reinterpret_cast<Floats>(
      reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, halves)) << 16);
#else
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Floats>(__builtin_convertvector(h, Words) << 16);
#endif
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline void store(BFloat16* p, Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const Words result = (v == v) ? rounded : quiet;
  const Halves h = __builtin_convertvector(result, Halves);
  std::memcpy(p, &h, sizeof h);
}

inline float load_one(const float* p) { return *p; }
inline float load_one(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void store_one(float* p, float value) { *p = value; }
inline void store_one(BFloat16* p, float value) {
  Floats v = {};
  v[0] = value;
  BFloat16 lanes[kLanes];
  store(lanes, v);
  *p = lanes[0];
}

// Columns [begin, begin + (kVectors - 1) kLanes) of y's row, and the kLanes columns from `last` on.
// `last` lets a ragged end overlap its neighbour, which then is computed twice, alike.
// Returns whether all columns of the row exist; others are left out.
template <int kVectors, class X, class Y>
bool row_panel(const SpmmArgs& args, int64_t row, int64_t begin, int64_t last) {
  const int64_t k = args.num_columns, nnz = args.row_offsets[args.num_nodes];
  const X* x = static_cast<const X*>(args.x);
  constexpr int kVectorsALine = 64 / (kLanes * static_cast<int>(sizeof(X)));
  const int64_t shift = last - begin;
  bool valid = true;
  Floats sum[kVectors] = {};
  for (int64_t e = args.row_offsets[row], end = args.row_offsets[row + 1]; e < end; ++e) {
    const int64_t ahead = e + kPrefetchAhead < nnz ? e + kPrefetchAhead : e;
    const X* soon = x + args.columns[ahead] * k + begin;
    if (static_cast<uint32_t>(args.columns[e]) >= args.num_nodes) {
      valid = false;
      continue;
    }
    for (int i = 0; i < kVectors; i += kVectorsALine) __builtin_prefetch(soon + i * kLanes);
    const X* from = x + args.columns[e] * k + begin;
    const float value = args.values[e];
    for (int i = 0; i < kVectors - 1; ++i) sum[i] += value * load(from + i * kLanes);
    sum[kVectors - 1] += value * load(from + shift);
  }
  Y* y = static_cast<Y*>(args.y) + row * k + begin;
  for (int i = 0; i < kVectors - 1; ++i) store(y + i * kLanes, sum[i]);
  store(y + shift, sum[kVectors - 1]);
  return valid;
}

// Fewer columns than lanes.
template <class X, class Y>
bool narrow_row(const SpmmArgs& args, int64_t row) {
  const int64_t k = args.num_columns;
  bool valid = true;
  const X* x = static_cast<const X*>(args.x);
  float sum[kLanes] = {};
  for (int64_t e = args.row_offsets[row]; e < args.row_offsets[row + 1]; ++e) {
    if (static_cast<uint32_t>(args.columns[e]) >= args.num_nodes) {
      valid = false;
      continue;
    }
    for (int64_t c = 0; c < k; ++c)
      sum[c] += args.values[e] * load_one(x + args.columns[e] * k + c);
  }
  for (int64_t c = 0; c < k; ++c) store_one(static_cast<Y*>(args.y) + row * k + c, sum[c]);
  return valid;
}

// Columns from `begin` on in panels of kVectors vectors, what remains in narrower ones.
template <int kVectors, class X, class Y>
bool rows_from(const SpmmArgs& args, int64_t row_begin, int64_t row_end, int64_t begin) {
  const int64_t k = args.num_columns;
  bool valid = true;
  for (; k - begin > (kVectors - 1) * kLanes; begin += kVectors * kLanes) {
    const int64_t full = begin + (kVectors - 1) * kLanes;
    const int64_t last = full + kLanes <= k ? full : k - kLanes;
    for (int64_t row = row_begin; row < row_end; ++row)
      valid &= row_panel<kVectors, X, Y>(args, row, begin, last);
  }
  if constexpr (kVectors > 1)
    if (begin < k) valid &= rows_from<kVectors / 2, X, Y>(args, row_begin, row_end, begin);
  return valid;
}

template <class X, class Y>
bool spmm_typed(const SpmmArgs& args) {
  const int64_t pieces = (args.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  const int64_t work = args.row_offsets[args.num_nodes] * args.num_columns;
  const int64_t workers = work < 32768 ? 1 : num_threads();
  std::atomic<bool> valid{true};
  for_each_piece(pieces, workers, [&](int64_t piece, int64_t) {
    const int64_t begin = piece * kRowsAPiece;
    const int64_t end = begin + kRowsAPiece < args.num_nodes ? begin + kRowsAPiece : args.num_nodes;
    bool good = true;
    if (args.num_columns >= kLanes)
      good = rows_from<kMostVectors, X, Y>(args, begin, end, 0);
    else
      for (int64_t row = begin; row < end; ++row) good &= narrow_row<X, Y>(args, row);
    if (!good) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load();
}

}  // namespace

bool spmm(const SpmmArgs& args) {
  const bool x_half = args.x_storage == Storage::kBFloat16;
  const bool y_half = args.y_storage == Storage::kBFloat16;
  if (args.num_nodes == 0 || args.num_columns == 0) return true;
  if (x_half && y_half) return spmm_typed<BFloat16, BFloat16>(args);
  if (x_half) return spmm_typed<BFloat16, float>(args);
  if (y_half) return spmm_typed<float, BFloat16>(args);
  return spmm_typed<float, float>(args);
}

}  // namespace nefkern::cpu::NEFKERN_ISA
