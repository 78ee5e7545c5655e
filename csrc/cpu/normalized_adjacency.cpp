#include "cpu/normalized_adjacency.h"

#include "cpu/adjacency_rows.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

// A is this part of what a row holds.
inline double share(const AdjacencyArgs& args) { return args.take_union ? 1 : 0.5; }

// Writes row i of A, not yet normalised, and its scale d^(-1/2). False where d is not finite.
template <class Index>
bool fill_row(const AdjacencyArgs& args, Unit unit, Row& row, int64_t i) {
  if (args.take_union)
    collect_row<Index, true>(args.lists, row, i, unit);
  else
    collect_row<Index, false>(args.lists, row, i, unit);
  const int64_t size = row.drain_entries(), begin = args.row_offsets[i];
  std::copy_n(row.columns(), size, args.columns + begin);
  std::copy_n(row.values(), size, args.values + begin);
  const double degree = share(args) * sum_of_magnitudes(row.values(), size);
  args.scale[i] = inverse_root(degree);
  return std::isfinite(degree);
}

template <class Index>
bool count(const AdjacencyArgs& args) {
  if (!transpose_lists<Index>(args.workspace, args.lists)) return false;
  count_rows(args.workspace, args.row_offsets,
             [&](Row& row, int64_t i) { return count_row<Index>(row, i, args.lists); });
  return true;
}

template <class Index>
void fill(const AdjacencyArgs& args) {
  fill_rows(args.workspace,
            [&](Unit unit, Row& row, int64_t i) { return fill_row<Index>(args, unit, row, i); });
}

}  // namespace

bool adjacency_count(const AdjacencyArgs& args) {
  clear(args.workspace);
  return args.lists.wide_indices ? count<int64_t>(args) : count<int32_t>(args);
}

void adjacency_fill(const AdjacencyArgs& args) {
  if (args.lists.wide_indices)
    fill<int64_t>(args);
  else
    fill<int32_t>(args);
  for_each_row(args.workspace, [&](Row&, int64_t i) {
    for (int64_t e = args.row_offsets[i]; e < args.row_offsets[i + 1]; ++e)
      args.values[e] =
          normalized(share(args) * args.values[e], args.scale[i], args.scale[args.columns[e]]);
  });
}

}  // namespace nefkern::cpu::NEFKERN_ISA
