// Runs a CUDA kernel on the processor: a fiber for every thread of a block, block after block.
//
// Threads change places only where they wait (barriers, warp collectives), in one of three orders.
// What a kernel may not do is reported as a Failure: barriers that only a part of a block reaches,
// collectives that name an exited lane or that lanes meet with different arguments, threads that
// wait for each other for ever. Races are found by race_check.cpp where it is linked in.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace nefkern::emulator {

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The kernel under test did what CUDA leaves undefined.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kForward, kReverse, kRandom };

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 1;  // of the random order
};
inline Settings& settings() {
  static Settings chosen;
  return chosen;
}

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxDynamicShared = 227 << 10;

// A happens-before clock: entry l counts the collectives of lane l that this lane has seen.
using WarpClock = uint32_t[kWarp];

enum class State : uint8_t { kReady, kAtBarrier, kAtCollective, kDone };

struct Thread {
  Fiber fiber;
  uint3 index{};
  unsigned number = 0, lane = 0, warp = 0;
  State state = State::kDone;
  // Where it waits:
  const char* waits_at = nullptr;
  unsigned mask = 0;
  int line = 0;
  void* payload = nullptr;
  int64_t tally = 0;  // what the barrier before counted
  WarpClock clock{};
  // Copies by cp.async: issued, and not yet waited for.
  struct Copy {
    void* to;
    const void* from;
    int group;
  };
  std::vector<Copy> copies;
  int copy_groups = 0;
};

// Called with the payload of every lane in the mask, once all have arrived.
using Combine = void (*)(void* const* payloads, unsigned mask);

class Block;
inline Block*& current_block() {
  static Block* block = nullptr;
  return block;
}

// race_check.cpp, where it is linked in.
extern "C" {
__attribute__((weak)) void nefkern_race_track(const void* begin, size_t bytes, size_t granule,
                                              bool shared);
__attribute__((weak)) void nefkern_race_forget(bool only_shared);
__attribute__((weak)) void nefkern_race_begin_launch();
__attribute__((weak)) void nefkern_race_atomic(const void* address, size_t bytes);
}

// cost_counter.cpp, where it is linked in.
extern "C" {
__attribute__((weak)) void nefkern_count_kernel(const void* kernel, uint64_t blocks);
__attribute__((weak)) void nefkern_count_block_end();
__attribute__((weak)) void nefkern_count_meeting(const char* name, unsigned warp, bool whole,
                                                 unsigned parts);
__attribute__((weak)) void nefkern_count_barrier(unsigned warps);
__attribute__((weak)) void nefkern_count_wide(const void* address, bool write, void* place);
__attribute__((weak)) void nefkern_count_quiet(bool begin);
}

// Accesses while it lives are the emulator's own, and not counted.
struct Quiet {
  NEFKERN_UNCHECKED Quiet() {
    if (nefkern_count_quiet) nefkern_count_quiet(true);
  }
  NEFKERN_UNCHECKED ~Quiet() {
    if (nefkern_count_quiet) nefkern_count_quiet(false);
  }
};

class Block {
 public:
  Block(dim3 grid, dim3 shape, size_t dynamic_bytes, void (*entry)())
      : grid_(grid), shape_(shape), dynamic_bytes_(dynamic_bytes), entry_(entry) {
    threads_ = std::vector<Thread>(shape.x * shape.y * shape.z);
  }

  dim3 grid() const { return grid_; }
  dim3 shape() const { return shape_; }
  uint3 index() const { return index_; }
  uint64_t number() const { return index_.x + grid_.x * (index_.y + uint64_t{grid_.y} * index_.z); }
  Thread& running() const { return *running_; }
  bool inside() const { return running_ != nullptr; }
  uint32_t epoch() const { return epoch_; }  // barriers passed

  // Runs the block to its end, or throws a Failure.
  NEFKERN_UNCHECKED void run(uint3 index) {
    index_ = index;
    random_ = (settings().seed * 0x9e3779b97f4a7c15u) ^ ((number() + 1) * 0xd1b54a32d192ed03u);
    start_threads();
    while (alive_ && failure_.empty()) {
      if (!sweep()) report_deadlock();
    }
    running_ = nullptr;
    if (nefkern_count_block_end) nefkern_count_block_end();
    if (nefkern_race_forget) nefkern_race_forget(true);
    shared_.clear();
    if (!failure_.empty()) throw Failure(failure_);
  }

  // The block's memory for `key`, made and poisoned at the first request.
  NEFKERN_UNCHECKED void* shared(const void* key, size_t bytes, size_t alignment) {
    for (const Shared& one : shared_)
      if (one.key == key) return one.memory.get();
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes)) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);
    shared_.push_back({key, std::unique_ptr<void, void (*)(void*)>(memory, &std::free)});
    constexpr size_t kGranule = 2;  // a race between two single bytes would be a false alarm
    if (nefkern_race_track) nefkern_race_track(memory, bytes, kGranule, true);
    return memory;
  }
  void* dynamic_shared() { return shared(this, dynamic_bytes_, 128); }

  // __syncthreads and its counting relatives; returns the sum of all threads' `value`.
  NEFKERN_UNCHECKED int64_t barrier(int64_t value, int line) {
    Thread& me = *running_;
    if (waiting_ && barrier_line_ != line)
      fail("divergent __syncthreads: line " + std::to_string(line) + " against line " +
           std::to_string(barrier_line_));
    if (alive_ != threads_.size())
      fail("__syncthreads at line " + std::to_string(line) + " after threads have exited");
    barrier_line_ = line;
    tally_ += value;
    wait_at("__syncthreads", State::kAtBarrier, line);
    if (++waiting_ == alive_) {
      for (Thread& thread : threads_) {
        thread.tally = tally_;
        thread.state = State::kReady;
      }
      waiting_ = 0;
      tally_ = 0;
      ++epoch_;
      if (nefkern_count_barrier) nefkern_count_barrier((alive_ + kWarp - 1) / kWarp);
      if (settings().order != Order::kRandom) return me.tally;
    }
    Fiber::suspend();
    return me.tally;
  }

  // A warp collective: the last lane of `mask` to arrive combines all payloads. It takes `parts`
  // instructions.
  NEFKERN_UNCHECKED void collective(const char* name, unsigned mask, void* payload, Combine combine,
                                    int line, unsigned parts = 1) {
    Thread& me = *running_;
    Thread* lanes = &threads_[me.warp * kWarp];
    const unsigned size = std::min<unsigned>(kWarp, threads_.size() - me.warp * kWarp);
    if (size < kWarp) mask &= (1u << size) - 1;
    if (!(mask >> me.lane & 1))
      fail(described(name, line) + ": the calling lane is not in its mask");
    wait_at(name, State::kAtCollective, line);
    me.mask = mask;
    me.payload = payload;
    bool complete = true;
    for_each_lane(mask,
                  [&](unsigned lane) { complete = has_arrived(me, lanes[lane]) && complete; });
    if (!complete) return Fiber::suspend();
    void* payloads[kWarp] = {};
    for_each_lane(mask, [&](unsigned lane) { payloads[lane] = lanes[lane].payload; });
    combine(payloads, mask);
    if (nefkern_count_meeting)
      nefkern_count_meeting(name, me.warp, mask == ~0u >> (kWarp - size), parts);
    if (nefkern_race_track) join_clocks(lanes, mask);
    for_each_lane(mask, [&](unsigned lane) { lanes[lane].state = State::kReady; });
    if (settings().order == Order::kRandom) Fiber::suspend();  // the last goes not always first
  }

  // Ends the block: the running thread broke a rule.
  [[noreturn]] NEFKERN_UNCHECKED void fail(const std::string& what) {
    if (failure_.empty())
      failure_ = what + " [block " + std::to_string(number()) + ", thread " +
                 std::to_string(running_->number) + "]";
    running_->state = State::kDone;
    Fiber::finish();
  }

 private:
  struct Shared {
    const void* key;
    std::unique_ptr<void, void (*)(void*)> memory;
  };

  static std::string described(const char* name, int line) {
    return std::string(name) + " at line " + std::to_string(line);
  }

  template <class F>
  static void for_each_lane(unsigned mask, const F& f) {
    for (; mask; mask &= mask - 1) f(static_cast<unsigned>(__builtin_ctz(mask)));
  }

  void wait_at(const char* name, State state, int line) {
    running_->waits_at = name;
    running_->state = state;
    running_->line = line;
  }

  // Whether `other` waits in the collective of `me`; fails where it never can.
  NEFKERN_UNCHECKED bool has_arrived(const Thread& me, const Thread& other) {
    if (other.state == State::kDone)
      fail(described(me.waits_at, me.line) + ": the mask names lane " + std::to_string(other.lane) +
           ", which has exited");
    if (other.state != State::kAtCollective) return false;
    if (std::strcmp(other.waits_at, me.waits_at) == 0 && other.mask == me.mask) return true;
    // It may still come here, unless it waits for this very lane elsewhere.
    if (other.mask >> me.lane & 1)
      fail("divergent collective: " + described(me.waits_at, me.line) + " against " +
           described(other.waits_at, other.line));
    return false;
  }

  NEFKERN_UNCHECKED static void join_clocks(Thread* lanes, unsigned mask) {
    WarpClock joined{};
    for_each_lane(mask, [&](unsigned lane) {
      for (unsigned l = 0; l < kWarp; ++l) joined[l] = std::max(joined[l], lanes[lane].clock[l]);
    });
    for_each_lane(mask, [&](unsigned lane) {
      std::memcpy(lanes[lane].clock, joined, sizeof joined);
      ++lanes[lane].clock[lane];
    });
  }

  NEFKERN_UNCHECKED void start_threads() {
    alive_ = threads_.size();
    waiting_ = 0;
    tally_ = 0;
    epoch_ = 1;
    for (unsigned i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.index = {i % shape_.x, i / shape_.x % shape_.y, i / shape_.x / shape_.y};
      thread.number = i;
      thread.lane = i % kWarp;
      thread.warp = i / kWarp;
      thread.state = State::kReady;
      std::memset(thread.clock, 0, sizeof thread.clock);
      thread.clock[thread.lane] = 1;
      thread.copies.clear();
      thread.copy_groups = 0;
      thread.fiber.prepare(&Block::thread_main);
    }
  }

  NEFKERN_UNCHECKED static void thread_main() {
    Block& block = *current_block();
    block.entry_();
    block.on_exit(*block.running_);
  }

  NEFKERN_UNCHECKED void on_exit(Thread& me) {
    if (!me.copies.empty()) fail("a thread exits with cp.async copies that it never waited for");
    me.state = State::kDone;
    --alive_;
    if (waiting_)
      fail("a thread exits while others wait in " + described("__syncthreads", barrier_line_));
    const unsigned first = me.warp * kWarp;
    for (unsigned i = first; i < std::min<size_t>(first + kWarp, threads_.size()); ++i)
      if (threads_[i].state == State::kAtCollective && (threads_[i].mask >> me.lane & 1))
        fail("a lane exits that is named in the mask of " +
             described(threads_[i].waits_at, threads_[i].line));
  }

  uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_;
  }

  // 0 to size - 1 in the chosen order.
  NEFKERN_UNCHECKED void arrange(std::vector<unsigned>& places, unsigned size) {
    places.resize(size);
    for (unsigned i = 0; i < size; ++i)
      places[i] = settings().order == Order::kReverse ? size - 1 - i : i;
    if (settings().order == Order::kRandom)
      for (unsigned i = size; i > 1; --i) std::swap(places[i - 1], places[random() % i]);
  }

  // Lets every warp run until its threads wait (in random order: or until chance ends its turn).
  // Returns whether any thread ran.
  NEFKERN_UNCHECKED bool sweep() {
    bool progress = false;
    arrange(warps_, (threads_.size() + kWarp - 1) / kWarp);
    for (const unsigned warp : warps_) {
      const unsigned first = warp * kWarp;
      const unsigned size = std::min<unsigned>(kWarp, threads_.size() - first);
      for (bool ran = true; ran && failure_.empty();) {
        ran = false;
        arrange(lanes_, size);
        for (const unsigned lane : lanes_) {
          Thread& thread = threads_[first + lane];
          if (thread.state != State::kReady || !failure_.empty()) continue;
          running_ = &thread;
          thread.fiber.resume();
          ran = progress = true;
        }
        if (settings().order == Order::kRandom && random() % 4 == 0) break;
      }
    }
    return progress;
  }

  NEFKERN_UNCHECKED void report_deadlock() {
    failure_ = "deadlock:";
    constexpr size_t kEnough = 200;
    for (const Thread& thread : threads_)
      if (thread.state != State::kDone && failure_.size() < kEnough)
        failure_ += " thread " + std::to_string(thread.number) + " in " +
                    described(thread.waits_at, thread.line) + ";";
  }

  dim3 grid_, shape_;
  uint3 index_{};
  size_t dynamic_bytes_;
  void (*entry_)();
  std::vector<Thread> threads_;
  std::vector<Shared> shared_;
  std::vector<unsigned> warps_, lanes_;
  Thread* running_ = nullptr;
  size_t alive_ = 0, waiting_ = 0;
  int64_t tally_ = 0;
  int barrier_line_ = 0;
  uint32_t epoch_ = 0;
  uint64_t random_ = 1;
  std::string failure_;
};

// Runs `body` once for every thread of every block.
template <class Body>
void launch(dim3 grid, dim3 shape, size_t dynamic_bytes, const Body& body) {
  const size_t threads = size_t{shape.x} * shape.y * shape.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || shape.z > 64 || blocks == 0 || grid.x > 0x7fffffff ||
      grid.y > 65535 || grid.z > 65535)
    throw Failure("invalid launch configuration");
  if (dynamic_bytes > kMaxDynamicShared) throw Failure("more shared memory than a block can have");
  static const Body* running = nullptr;
  running = &body;
  Block block(grid, shape, dynamic_bytes, [] { (*running)(); });
  struct Current {  // also when a Failure leaves
    explicit Current(Block* block) { current_block() = block; }
    ~Current() { current_block() = nullptr; }
  } current(&block);
  if (nefkern_race_begin_launch) nefkern_race_begin_launch();
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = settings().order == Order::kReverse ? blocks - 1 - i : i;
    block.run({static_cast<unsigned>(number % grid.x),
               static_cast<unsigned>(number / grid.x % grid.y),
               static_cast<unsigned>(number / grid.x / grid.y)});
  }
}

}  // namespace nefkern::emulator
