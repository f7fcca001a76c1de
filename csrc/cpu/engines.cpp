// The choice among the variants: what the processor can run, or what RNNKIT_CPU_ISA asks for.

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
