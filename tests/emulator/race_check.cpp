// A race detector for emulated kernels. They are compiled with -fsanitize=thread, which calls a
// __tsan_* function at every access to memory; this file, compiled without, supplies those
// functions in place of the sanitizer's library, and knows what orders two CUDA threads: barriers
// and warp collectives inside a block, launches between blocks, nothing else.
#include <cstdio>

#include "scheduler.h"

namespace nefkern::emulator {
namespace {

struct Access {
  uint64_t launch = 0, block = 0;  // launch 0: none
  uint32_t epoch = 0, clock = 0;
  uint16_t thread = 0;
  bool atomic = false;
};

// The last write to a granule of memory, and the last reads of two different threads since.
struct Cell {
  Access write, reads[2];
};

struct Range {
  uintptr_t begin, end;
  size_t granule;
  bool shared;
  std::vector<Cell> cells;
};

std::vector<Range>& ranges() {
  static std::vector<Range> all;
  return all;
}
// The memory that all ranges lie in: most accesses, to the stacks, are elsewhere.
uintptr_t lowest = ~uintptr_t{0}, highest = 0;
uint64_t launches = 0;
bool busy = false;  // the checker's own accesses are not checked

// Whether `before` is ordered before what `me` does now.
bool is_ordered(const Access& before, const Thread& me, const Block& block, bool shared) {
  if (before.launch != launches) return true;
  if (before.block != block.number()) return shared;
  if (before.thread == me.number || before.epoch != block.epoch()) return true;
  if (before.thread / kWarp != me.warp) return false;
  return me.clock[before.thread % kWarp] >= before.clock;
}

enum class Kind { kRead, kWrite, kAtomic };

[[noreturn]] void report(const char* what, const Range& range, size_t place, const Access& before,
                         const Block& block, void* where) {
  char text[200];
  std::snprintf(text, sizeof text,
                "race: %s in %s memory, byte %zu of %zu, thread %u of block %llu", what,
                range.shared ? "shared" : "global", place * range.granule,
                static_cast<size_t>(range.end - range.begin), before.thread,
                static_cast<unsigned long long>(before.block));
  char code[32];
  std::snprintf(code, sizeof code, ", code at %p", where);
  busy = false;
  const_cast<Block&>(block).fail(std::string(text) + code);
}

void check_cell(Range& range, size_t place, Kind kind, const Block& block, void* where) {
  const Thread& me = block.running();
  Cell& cell = range.cells[place];
  const bool atomic = kind == Kind::kAtomic;
  const Access now{
      launches, block.number(), block.epoch(), me.clock[me.lane], static_cast<uint16_t>(me.number),
      atomic};
  const auto conflicts = [&](const Access& before) {
    return !(atomic && before.atomic) && !is_ordered(before, me, block, range.shared);
  };
  if (conflicts(cell.write))
    report(kind == Kind::kRead ? "a read beside the write" : "a write beside the write", range,
           place, cell.write, block, where);
  if (kind == Kind::kRead) {
    const bool first = is_ordered(cell.reads[0], me, block, range.shared);
    cell.reads[first ? 0 : 1] = now;
    return;
  }
  for (const Access& read : cell.reads)
    if (conflicts(read)) report("a write beside the read", range, place, read, block, where);
  cell.write = now;
  cell.reads[0] = cell.reads[1] = Access{};
}

void check(const void* address, size_t bytes, Kind kind, void* where) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (begin < lowest || begin >= highest) return;
  Block* block = current_block();
  if (busy || !block || !block->inside() || block->running().state == State::kDone) return;
  for (Range& range : ranges()) {
    if (begin < range.begin || begin >= range.end) continue;
    busy = true;
    const size_t first = (begin - range.begin) / range.granule;
    const size_t last = (begin + bytes - 1 - range.begin) / range.granule;
    for (size_t place = first; place <= last && place < range.cells.size(); ++place)
      check_cell(range, place, kind, *block, where);
    busy = false;
    return;
  }
}

}  // namespace

extern "C" {

void nefkern_race_track(const void* begin, size_t bytes, size_t granule, bool shared) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  lowest = std::min(lowest, address);
  highest = std::max(highest, address + bytes);
  ranges().push_back({address, address + bytes, granule, shared,
                      std::vector<Cell>((bytes + granule - 1) / granule)});
}
void nefkern_race_forget(bool only_shared) {
  std::erase_if(ranges(), [&](const Range& range) { return range.shared || !only_shared; });
}
void nefkern_race_begin_launch() { ++launches; }
void nefkern_race_atomic(const void* address, size_t bytes) {
  check(address, bytes, Kind::kAtomic, __builtin_return_address(0));
}

#define NEFKERN_ON_ACCESS(address, bytes, kind) \
  check(address, bytes, kind, __builtin_return_address(0))
#include "access_hooks.h"

}  // extern "C"
}  // namespace nefkern::emulator
