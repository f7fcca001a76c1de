// What the templates of a variant need of the standard library, included before the variant's instructions
// are switched on.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "program.h"
#include "scan.h"
#include "wait_word.h"
