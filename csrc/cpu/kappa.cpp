// A row is the union of the feature graph's and the pixel graph's row, assembled once. Feature
// weights are never negative, so between the two steps an entry's sign says whether the pixel graph
// has it too: -w for both, -0 for the pixel graph alone.
#include "cpu/kappa.h"

#include "cpu/adjacency_rows.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

// Marks the pixel graph's entries of row i; returns their number, the pixel graph's degree.
template <class Index>
int64_t mark_pixels(const NeighbourLists& pixels, Row& row, int64_t i) {
  int64_t degree = 0;
  for_each_neighbour<Index>(pixels, i, [&](int64_t node) {
    row.insert(node);
    float& weight = row.weight(node);
    degree += !std::signbit(weight);
    weight = -std::fabs(weight);
  });
  return degree;
}

// Writes row i of both graphs, not yet normalised, and its scales. False where the feature graph's
// degree is not finite.
template <class Index>
bool fill_row(const KappaArgs& args, Unit unit, Row& row, int64_t i) {
  collect_row<Index, false>(args.features, row, i, unit);
  const int64_t pixel_degree = mark_pixels<Index>(args.pixels, row, i);
  const int64_t size = row.drain_entries(), begin = args.row_offsets[i];
  std::copy_n(row.columns(), size, args.columns + begin);
  std::copy_n(row.values(), size, args.values + begin);
  const double degree = 0.5 * sum_of_magnitudes(row.values(), size);
  args.scale[i] = inverse_root(degree);
  args.pixel_scale[i] = inverse_root(static_cast<double>(pixel_degree));
  return std::isfinite(degree);
}

// Scales row i, and adds the pixel graph where an entry is marked. A node without neighbours in one
// graph has an infinite scale there, which must not meet an entry that only the other graph has.
void scale_row(const KappaArgs& args, int64_t i) {
  const double alpha = args.alpha;
  for (int64_t e = args.row_offsets[i]; e < args.row_offsets[i + 1]; ++e) {
    const int32_t column = args.columns[e];
    const float mark = args.values[e], weight = std::fabs(mark);
    const float feature =
        weight == 0 ? 0 : normalized(0.5 * weight, args.scale[i], args.scale[column]);
    const float pixel = std::signbit(mark) ? args.pixel_scale[i] * args.pixel_scale[column] : 0;
    // In double, as add() does: the product is exact, so that fusing it changes nothing.
    args.values[e] = static_cast<float>(feature + alpha * pixel);
  }
}

template <class Index>
bool count(const KappaArgs& args) {
  if (!transpose_lists<Index>(args.workspace, args.features) ||
      !transpose_lists<Index>(args.workspace, args.pixels))
    return false;
  count_rows(args.workspace, args.row_offsets, [&](Row& row, int64_t i) {
    return count_row<Index>(row, i, args.features, args.pixels);
  });
  return true;
}

template <class Index>
void fill(const KappaArgs& args) {
  fill_rows(args.workspace,
            [&](Unit unit, Row& row, int64_t i) { return fill_row<Index>(args, unit, row, i); });
}

}  // namespace

bool kappa_count(const KappaArgs& args) {
  clear(args.workspace);
  return args.features.wide_indices ? count<int64_t>(args) : count<int32_t>(args);
}

void kappa_fill(const KappaArgs& args) {
  if (args.features.wide_indices)
    fill<int64_t>(args);
  else
    fill<int32_t>(args);
  for_each_row(args.workspace, [&](Row&, int64_t i) { scale_row(args, i); });
}

}  // namespace nefkern::cpu::NEFKERN_ISA
