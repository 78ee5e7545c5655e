// Counts what emulated kernels ask of a GPU. They are compiled with -fsanitize=thread, which calls
// a __tsan_* function at every access to memory, and -fsanitize-coverage=trace-pc, which calls one
// at every basic block; this file, compiled without, supplies both.
//
// The emulator runs lane after lane, a GPU a warp's lanes together. Lanes that come to the same
// instruction the same number of times since their warp last met (at a collective or a barrier) are
// taken to execute it together: exact where lanes go the same way, the least where they part.
//
// Shared memory: 32 banks of 4 bytes; a wavefront serves every bank once. Accesses of 8 bytes are
// served by half warps, of 16 by quarters; lanes that read (or write) the same word share it, and
// atomic operations on it follow one another. Global memory: sectors of 32 bytes, and lines of 128,
// of which the first-level cache, the same unit as shared memory, serves one a wavefront; what
// cp.async brings goes past it.
#include <array>
#include <cstdio>
#include <map>
#include <unordered_map>
#include <unordered_set>

#include "scheduler.h"

namespace nefkern::emulator {
namespace {

constexpr size_t kSector = 32, kLine = 128, kBanks = 32, kWord = 4;

struct Counts {
  uint64_t launches = 0, blocks = 0;
  uint64_t longest_block = 0, finished = 0;  // clocks of shared memory and first-level cache
  uint64_t shared_wavefronts = 0, shared_instructions = 0;
  uint64_t global_instructions = 0;
  uint64_t lines = 0;              // of the first-level cache, by every instruction
  uint64_t sectors_read = 0;       // by every instruction
  uint64_t sectors_read_once = 0;  // by every block
  uint64_t sectors_written = 0;
  uint64_t sectors_touched = 0;  // by every launch
  uint64_t shuffles = 0, meetings = 0, barriers = 0, mma = 0;
  std::map<uintptr_t, uint64_t> code;  // basic block: executions by a warp

  uint64_t first_level() const { return shared_wavefronts + shuffles + lines; }
};

enum class Kind : uint8_t { kRead, kWrite, kAtomic, kCopy };  // kCopy: a read past the first level

// An instruction of a warp: what its lanes access.
struct Instruction {
  Kind kind;
  bool shared;
  size_t bytes;
  unsigned mask = 0;
  std::array<uintptr_t, kWarp> address{};
};

struct Site {
  std::array<uint32_t, kWarp> visits{};
  std::vector<Instruction> instructions;
};

struct Warp {
  std::unordered_map<uintptr_t, Site> sites;
  std::unordered_map<uintptr_t, std::array<uint32_t, kWarp>> code;
};

struct Range {
  uintptr_t begin, end;
  bool shared;
};

// By the kernel's address.
std::map<uintptr_t, Counts>& all_counts() {
  static auto* counts = new std::map<uintptr_t, Counts>;  // read when the program ends
  return *counts;
}
Counts* counts = nullptr;  // of the running kernel
std::vector<Range> ranges;
uintptr_t lowest = ~uintptr_t{0}, highest = 0;
std::array<Warp, kMaxThreads / kWarp> warps;
std::unordered_set<uintptr_t> seen_by_block, seen_by_launch;
int quiet = 0;

const Range* range_of(uintptr_t address) {
  if (address < lowest || address >= highest) return nullptr;
  for (const Range& range : ranges)
    if (address >= range.begin && address < range.end) return &range;
  return nullptr;
}

// The fewest wavefronts that serve the lanes of a group.
uint64_t wavefronts_of(const Instruction& one, unsigned first, unsigned lanes) {
  std::array<std::vector<uintptr_t>, kBanks> banks;
  for (unsigned lane = first; lane < first + lanes; ++lane) {
    if (!(one.mask >> lane & 1)) continue;
    for (size_t byte = 0; byte < one.bytes; byte += kWord) {
      const uintptr_t word = (one.address[lane] + byte) / kWord;
      auto& bank = banks[word % kBanks];
      const bool known = std::find(bank.begin(), bank.end(), word) != bank.end();
      if (one.kind == Kind::kAtomic || !known) bank.push_back(word);
    }
  }
  size_t most = 0;
  for (const auto& bank : banks) most = std::max(most, bank.size());
  return most;
}

void add_shared(const Instruction& one) {
  const unsigned lanes = kWarp / std::max<size_t>(1, std::min<size_t>(4, one.bytes / kWord));
  for (unsigned first = 0; first < kWarp; first += lanes)
    counts->shared_wavefronts += wavefronts_of(one, first, lanes);
  ++counts->shared_instructions;
}

void add_global(const Instruction& one) {
  std::vector<uintptr_t> sectors;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(one.mask >> lane & 1)) continue;
    const uintptr_t last = (one.address[lane] + one.bytes - 1) / kSector;
    for (uintptr_t s = one.address[lane] / kSector; s <= last; ++s) sectors.push_back(s);
  }
  std::sort(sectors.begin(), sectors.end());
  if (one.kind != Kind::kAtomic)
    sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  const bool reads = one.kind == Kind::kRead || one.kind == Kind::kCopy;
  (reads ? counts->sectors_read : counts->sectors_written) += sectors.size();
  uintptr_t line = 0;
  for (const uintptr_t sector : sectors) {
    const uintptr_t own = sector / (kLine / kSector);
    if (one.kind != Kind::kCopy && own != line) ++counts->lines;
    line = own;
    if (one.kind == Kind::kRead) counts->sectors_read_once += seen_by_block.insert(sector).second;
    if (one.kind == Kind::kCopy) ++counts->sectors_read_once;
    counts->sectors_touched += seen_by_launch.insert(sector).second;
  }
  ++counts->global_instructions;
}

void finish_interval(unsigned number) {
  Warp& warp = warps[number];
  for (auto& [place, site] : warp.sites)
    for (const Instruction& one : site.instructions) one.shared ? add_shared(one) : add_global(one);
  for (const auto& [place, visits] : warp.code)
    counts->code[place] += *std::max_element(visits.begin(), visits.end());
  warp.sites.clear();
  warp.code.clear();
}

Block* counted_block() {
  Block* block = current_block();
  return counts && !quiet && block && block->inside() ? block : nullptr;
}

void note(const void* pointer, size_t bytes, Kind kind, void* place) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address < lowest || address >= highest) return;
  Block* block = counted_block();
  const Range* range = block ? range_of(address) : nullptr;
  if (!range) return;
  const Thread& me = block->running();
  Site& site = warps[me.warp].sites[reinterpret_cast<uintptr_t>(place)];
  const uint32_t visit = site.visits[me.lane]++;
  if (visit >= site.instructions.size()) site.instructions.push_back({kind, range->shared, bytes});
  Instruction& one = site.instructions[visit];
  one.mask |= 1u << me.lane;
  one.address[me.lane] = range->shared ? address - range->begin : address;
}

void write_all() {
  const char* path = std::getenv("NEFKERN_COUNTS");
  std::FILE* file = path ? std::fopen(path, "w") : nullptr;
  if (!file) return;
  std::fprintf(file, "{");
  const char* comma = "";
  for (const auto& [kernel, one] : all_counts()) {
    std::fprintf(file, "%s\n\"%zu\": {", comma, static_cast<size_t>(kernel));
    const std::pair<const char*, uint64_t> numbers[] = {
        {"launches", one.launches},
        {"blocks", one.blocks},
        {"longest_block", one.longest_block},
        {"shared_wavefronts", one.shared_wavefronts},
        {"shared_instructions", one.shared_instructions},
        {"global_instructions", one.global_instructions},
        {"lines", one.lines},
        {"sectors_read", one.sectors_read},
        {"sectors_read_once", one.sectors_read_once},
        {"sectors_written", one.sectors_written},
        {"sectors_touched", one.sectors_touched},
        {"shuffles", one.shuffles},
        {"meetings", one.meetings},
        {"barriers", one.barriers},
        {"mma", one.mma}};
    for (const auto& [key, number] : numbers)
      std::fprintf(file, "\"%s\": %llu, ", key, static_cast<unsigned long long>(number));
    std::fprintf(file, "\"code\": {");
    const char* between = "";
    for (const auto& [place, times] : one.code) {
      std::fprintf(file, "%s\"%zu\": %llu", between, static_cast<size_t>(place),
                   static_cast<unsigned long long>(times));
      between = ", ";
    }
    std::fprintf(file, "}}");
    comma = ",";
  }
  std::fprintf(file, "\n}\n");
  std::fclose(file);
}

}  // namespace

extern "C" {

void nefkern_race_track(const void* begin, size_t bytes, size_t, bool shared) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  lowest = std::min(lowest, address);
  highest = std::max(highest, address + bytes);
  ranges.push_back({address, address + bytes, shared});
}
void nefkern_race_forget(bool only_shared) {
  std::erase_if(ranges, [&](const Range& range) { return range.shared || !only_shared; });
}
void nefkern_race_begin_launch() { seen_by_launch.clear(); }
void nefkern_race_atomic(const void* address, size_t bytes) {
  note(address, bytes, Kind::kAtomic, __builtin_return_address(0));
}

void nefkern_count_kernel(const void* kernel, uint64_t blocks) {
  if (!counts) std::atexit(write_all);
  counts = &all_counts()[reinterpret_cast<uintptr_t>(kernel)];
  ++counts->launches;
  counts->blocks += blocks;
}
void nefkern_count_block_end() {
  for (unsigned warp = 0; warp < warps.size(); ++warp) finish_interval(warp);
  seen_by_block.clear();
  if (!counts) return;
  counts->longest_block = std::max(counts->longest_block, counts->first_level() - counts->finished);
  counts->finished = counts->first_level();
}
void nefkern_count_meeting(const char* name, unsigned warp, bool whole, unsigned parts) {
  if (!counts) return;
  if (std::strncmp(name, "mma", 3) == 0)
    ++counts->mma;
  else if (std::strncmp(name, "__shfl", 6) == 0)
    counts->shuffles += parts;
  else if (std::strncmp(name, "ldmatrix", 8) != 0)  // an access to shared memory
    ++counts->meetings;
  if (whole) finish_interval(warp);
}
void nefkern_count_barrier(unsigned size) {
  if (!counts) return;
  counts->barriers += size;
  for (unsigned warp = 0; warp < size; ++warp) finish_interval(warp);
}
void nefkern_count_wide(const void* address, bool write, void* place) {
  const Range* range = range_of(reinterpret_cast<uintptr_t>(address));
  const Kind read = range && !range->shared ? Kind::kCopy : Kind::kRead;
  note(address, 16, write ? Kind::kWrite : read, place);
}
void nefkern_count_quiet(bool begin) { quiet += begin ? 1 : -1; }

void __sanitizer_cov_trace_pc() {
  Block* block = counted_block();
  if (!block) return;
  const Thread& me = block->running();
  ++warps[me.warp].code[reinterpret_cast<uintptr_t>(__builtin_return_address(0))][me.lane];
}

#define NEFKERN_ON_ACCESS(address, bytes, kind) \
  note(address, bytes, kind, __builtin_return_address(0))
#include "access_hooks.h"

}  // extern "C"
}  // namespace nefkern::emulator
