#pragma once

namespace sep_attn {

// For tests: fills every result with NaN before a kernel runs, so that a value left out shows.
void poison_results(bool enabled);

}  // namespace sep_attn
