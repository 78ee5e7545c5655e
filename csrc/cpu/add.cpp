// A sorted merge of each pair of rows. One row is usually much shorter than the other (15 pixel
// neighbours against some 300), so the merge walks the shorter one and copies runs of the longer.
#include "cpu/add.h"

#include "cpu/tiles.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

constexpr int64_t kRowsAPiece = 128;

struct Row {
  const int32_t* columns;
  const float* values;
  int64_t size;
  float factor;
};

inline Row row_of(const SparseRows& matrix, float factor, int64_t row) {
  const int64_t begin = matrix.row_offsets[row];
  return {matrix.columns + begin, matrix.values + begin, matrix.row_offsets[row + 1] - begin,
          factor};
}

// The first place from `begin` on whose column isn't below `column`: steps that double, then
// bisection.
inline int64_t gallop(const Row& row, int64_t begin, int32_t column) {
  int64_t step = 1, low = begin;
  while (low + step < row.size && row.columns[low + step] < column) {
    low += step;
    step *= 2;
  }
  int64_t high = low + step < row.size ? low + step : row.size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row.columns[middle] < column)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Walks the union in order: run(long row, begin, end) for columns that only the longer row has,
// single(short row's place, long row's place or -1) for each of the shorter.
template <class Run, class Single>
inline void merge(const Row& longer, const Row& shorter, const Run& run, const Single& single) {
  int64_t done = 0;
  for (int64_t s = 0; s < shorter.size; ++s) {
    const int64_t until = gallop(longer, done, shorter.columns[s]);
    run(done, until);
    const bool both = until < longer.size && longer.columns[until] == shorter.columns[s];
    single(s, both ? until : -1);
    done = until + both;
  }
  run(done, longer.size);
}

int64_t union_size(const Row& longer, const Row& shorter) {
  int64_t size = longer.size + shorter.size;
  merge(longer, shorter, [](int64_t, int64_t) {}, [&](int64_t, int64_t l) { size -= l >= 0; });
  return size;
}

void fill(const Row& longer, const Row& shorter, int32_t* columns, float* values) {
  merge(
      longer, shorter,
      [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
          *columns++ = longer.columns[e];
          *values++ = longer.factor * longer.values[e];
        }
      },
      [&](int64_t s, int64_t l) {
        // In double the products are exact, so that the sum is the same whichever row is the
        // longer and whether or not the compiler fuses: a symmetric sum stays symmetric.
        const double own = static_cast<double>(shorter.factor) * shorter.values[s];
        const double other = l < 0 ? 0 : static_cast<double>(longer.factor) * longer.values[l];
        *columns++ = shorter.columns[s];
        *values++ = static_cast<float>(own + other);
      });
}

// The gradient at the matrix's places of a row of the sum; false if one is missing there.
bool gather(const Row& sum, const int32_t* columns, int64_t size, float* values) {
  int64_t place = 0;
  for (int64_t e = 0; e < size; ++e, ++place) {
    place = gallop(sum, place, columns[e]);
    if (place >= sum.size || sum.columns[place] != columns[e]) return false;
    values[e] = sum.values[place];
  }
  return true;
}

// f(row number, longer row, shorter row) for all rows, in parallel.
template <class F>
void for_each_pair(const AddArgs& args, const F& f) {
  const int64_t pieces = (args.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  const int64_t work =
      args.a.row_offsets[args.num_nodes] + args.b.row_offsets[args.num_nodes] + args.num_nodes;
  for_each_piece(pieces, work < 16384 ? 1 : num_threads(), [&](int64_t piece, int64_t) {
    const int64_t begin = piece * kRowsAPiece;
    for (int64_t row = begin; row < begin + kRowsAPiece && row < args.num_nodes; ++row) {
      const Row a = row_of(args.a, 1.0f, row), b = row_of(args.b, args.alpha, row);
      if (a.size < b.size)
        f(row, b, a);
      else
        f(row, a, b);
    }
  });
}

}  // namespace

void add_count(const AddArgs& args) {
  for_each_pair(args, [&](int64_t row, const Row& longer, const Row& shorter) {
    args.row_offsets[row + 1] = union_size(longer, shorter);
  });
  args.row_offsets[0] = 0;
  for (int64_t row = 0; row < args.num_nodes; ++row)
    args.row_offsets[row + 1] += args.row_offsets[row];
}

void add_fill(const AddArgs& args) {
  for_each_pair(args, [&](int64_t row, const Row& longer, const Row& shorter) {
    fill(longer, shorter, args.columns + args.row_offsets[row],
         args.values + args.row_offsets[row]);
  });
}

bool add_backward(const AddBackwardArgs& args) {
  const int64_t pieces = (args.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  const int64_t work = args.sum.row_offsets[args.num_nodes] + args.num_nodes;
  std::atomic<bool> valid{true};
  for_each_piece(pieces, work < 16384 ? 1 : num_threads(), [&](int64_t piece, int64_t) {
    const int64_t begin = piece * kRowsAPiece;
    bool good = true;
    for (int64_t row = begin; row < begin + kRowsAPiece && row < args.num_nodes; ++row) {
      const int64_t first = args.row_offsets[row];
      good &= gather(row_of(args.sum, 1.0f, row), args.columns + first,
                     args.row_offsets[row + 1] - first, args.values + first);
    }
    if (!good) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load();
}

}  // namespace nefkern::cpu::NEFKERN_ISA
