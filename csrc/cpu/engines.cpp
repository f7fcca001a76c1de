// The choice among the variants: what the processor can run, or what RNNKIT_CPU_ISA asks for. And which dot
// products of bfloat16 it has, for whoever chooses among libraries that use them.

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "native.h"
#include "scan.h"

namespace rnnkit {

#if defined(RNNKIT_HAS_AVX512_BF16)
namespace avx512_bf16 {
extern const Engine engine;
}
#endif
#if defined(RNNKIT_HAS_NEON_BF16)
namespace neon_bf16 {
extern const Engine engine;
}
#endif
#if defined(__x86_64__)
namespace avx512 {
extern const Engine engine;
}
namespace avx2 {
extern const Engine engine;
}
#endif
namespace baseline {
extern const Engine engine;
}

namespace {

#if defined(__x86_64__)
// Whether the system keeps these parts of the registers, by the bits of XCR0.
bool system_keeps(uint32_t bits) {
  uint32_t a, b, c, d;
  constexpr uint32_t osxsave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & osxsave) == 0) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & bits) == bits;
}

const char* find_native_bf16() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  constexpr uint32_t tiles = 3u << 17, vectors = 0xe6;  // of XCR0
  constexpr uint32_t amx_bf16 = 1u << 22, amx_tile = 1u << 24, avx512_bf16 = 1u << 5;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx_bf16) && (d & amx_tile) && system_keeps(tiles)) {
    return "amx_bf16";
  }
  const bool has = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx512_bf16);
  return has && system_keeps(vectors) ? "avx512_bf16" : "";
}
#elif defined(__aarch64__) && defined(__linux__)
const char* find_native_bf16() {
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return getauxval(AT_HWCAP2) & bf16 ? "neon_bf16" : "";
}
#else
const char* find_native_bf16() { return ""; }
#endif

}  // namespace

const char* native_bf16() {
  static const char* const found = find_native_bf16();
  return found;
}

void unknown_cell(int64_t number) {
  std::string known;
  for (int64_t k = 0; k < cell_count; ++k) {
    known += (k == 0 ? "" : ", ") + std::to_string(k) + " " + cell_names[k];
  }
  throw std::runtime_error("rnnkit: cell must be one of " + known + "; got " + std::to_string(number));
}

const std::vector<const Engine*>& engines() {
  static const std::vector<const Engine*> able = [] {
    std::vector<const Engine*> found;
    for (const Engine* e : {
#if defined(RNNKIT_HAS_AVX512_BF16)
             &avx512_bf16::engine,
#endif
#if defined(RNNKIT_HAS_NEON_BF16)
             &neon_bf16::engine,
#endif
#if defined(__x86_64__)
             &avx512::engine, &avx2::engine,
#endif
             &baseline::engine}) {
      if (e->supported()) found.push_back(e);
    }
    return found;
  }();
  return able;
}

const Engine& engine() {
  static const Engine* chosen = [] {
    const char* asked = std::getenv("RNNKIT_CPU_ISA");
    if (asked == nullptr || *asked == '\0') return engines().front();
    std::string known;
    for (const Engine* e : engines()) {
      if (std::string(asked) == e->name) return e;
      known += (known.empty() ? "" : ", ") + std::string(e->name);
    }
    throw std::runtime_error("RNNKIT_CPU_ISA must be one of " + known + " on this processor, got '" + asked +
                             "'; unset it to let rnnkit choose");
  }();
  return *chosen;
}

}  // namespace rnnkit
