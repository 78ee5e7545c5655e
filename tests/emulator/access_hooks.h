// The functions that -fsanitize=thread calls at every access to memory, for a file that watches
// emulated kernels in place of the sanitizer's library: before this, it defines NEFKERN_ON_ACCESS(
// address, bytes, kind), which may ask for __builtin_return_address(0), the instruction. Included
// inside extern "C".
#define NEFKERN_HOOK(name, bytes, kind) \
  void name(void* address) { NEFKERN_ON_ACCESS(address, bytes, kind); }
#define NEFKERN_HOOKS(bytes)                                       \
  NEFKERN_HOOK(__tsan_read##bytes, bytes, Kind::kRead)             \
  NEFKERN_HOOK(__tsan_write##bytes, bytes, Kind::kWrite)           \
  NEFKERN_HOOK(__tsan_unaligned_read##bytes, bytes, Kind::kRead)   \
  NEFKERN_HOOK(__tsan_unaligned_write##bytes, bytes, Kind::kWrite) \
  NEFKERN_HOOK(__tsan_volatile_read##bytes, bytes, Kind::kRead)    \
  NEFKERN_HOOK(__tsan_volatile_write##bytes, bytes, Kind::kWrite)
NEFKERN_HOOKS(1)
NEFKERN_HOOKS(2)
NEFKERN_HOOKS(4)
NEFKERN_HOOKS(8)
NEFKERN_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) {
  NEFKERN_ON_ACCESS(address, bytes, Kind::kRead);
}
void __tsan_write_range(void* address, size_t bytes) {
  NEFKERN_ON_ACCESS(address, bytes, Kind::kWrite);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
