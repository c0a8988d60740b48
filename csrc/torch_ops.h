#pragma once

#include <string>

#include "kernels/kernels.h"

namespace sep_attn {

// The type of that name, such as "float32"; throws std::invalid_argument for any other.
DType dtype_named(const std::string& name);

// For tests: fills every result with NaN before a kernel runs, so that a value left out shows.
void poison_results(bool enabled);

}  // namespace sep_attn
