// A row of x stays in the first-level cache while the rows of y that it meets stream by, four at a
// time: as in spmm, what limits this is their way from the outer caches.
#include "cpu/sddmm.h"

#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

constexpr int64_t kRowsAPiece = 32;
constexpr int kTogether = 4;  // entries

// x . y[i] for kCount rows; `soon` are rows that will be needed next.
template <int kCount>
void products(const float* x, const float* const* y, const float* const* soon, int64_t k,
              float* values) {
  Vec total[kCount] = {};
  int64_t c = 0;
  for (; c + kLanes <= k; c += kLanes) {
    const Vec row = load(x + c);
    for (int i = 0; i < kCount; ++i) {
      __builtin_prefetch(soon[i] + c);
      total[i] = fma(row, load(y[i] + c), total[i]);
    }
  }
  if (c < k) {
    const Vec row = load(x + c, k - c);
    for (int i = 0; i < kCount; ++i) total[i] = fma(row, load(y[i] + c, k - c), total[i]);
  }
  for (int i = 0; i < kCount; ++i) values[i] = sum(total[i]);
}

// The row of y of entry e; the first one where the entry's column is none, and `valid` turns false.
const float* row_of(const SddmmArgs& args, int64_t e, bool* valid) {
  const int32_t column = args.columns[e];
  if (static_cast<uint32_t>(column) < static_cast<uint64_t>(args.num_nodes))
    return args.y + column * args.num_columns;
  *valid = false;
  return args.y;
}

bool row_products(const SddmmArgs& args, int64_t row) {
  const float* x = args.x + row * args.num_columns;
  const int64_t end = args.row_offsets[row + 1];
  int64_t e = args.row_offsets[row];
  bool valid = true;
  for (; e < end; e += kTogether) {
    const int count = static_cast<int>(end - e < kTogether ? end - e : kTogether);
    const float *y[kTogether], *soon[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      const int64_t at = i < count ? e + i : e, next = at + kTogether;
      y[i] = row_of(args, at, &valid);
      soon[i] = next < end ? row_of(args, next, &valid) : x;
    }
    if (count == kTogether) {
      products<kTogether>(x, y, soon, args.num_columns, args.values + e);
    } else {
      for (int i = 0; i < count; ++i)
        products<1>(x, y + i, soon + i, args.num_columns, args.values + e + i);
    }
  }
  return valid;
}

}  // namespace

bool sddmm(const SddmmArgs& args) {
  const int64_t pieces = (args.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  if (pieces == 0) return true;
  const int64_t work = args.row_offsets[args.num_nodes] * (args.num_columns + 1);
  std::atomic<bool> valid{true};
  for_each_piece(pieces, work < 32768 ? 1 : num_threads(), [&](int64_t piece, int64_t) {
    const int64_t begin = piece * kRowsAPiece;
    const int64_t end = begin + kRowsAPiece < args.num_nodes ? begin + kRowsAPiece : args.num_nodes;
    bool good = true;
    for (int64_t row = begin; row < end; ++row) good &= row_products(args, row);
    if (!good) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load();
}

}  // namespace nefkern::cpu::NEFKERN_ISA
