#include "reduce.h"

#include <algorithm>

namespace soap::cpu {

Numbers reduce(const Numbers& partials, int64_t count) {
  const size_t n = partials.size() / static_cast<size_t>(count);
  Numbers sum(n, 0.);
  for (int64_t q = 0; q < count; ++q)
    for (size_t k = 0; k < n; ++k) sum[k] += partials[q * n + k];
  return sum;
}

void reduce_conv(const float* partials, int64_t count, const ConvPartials& s, int input, double* out) {
  const int64_t chunk = static_cast<int64_t>(9) * s.inputs_padded * s.outputs_padded;
  Numbers row(s.outputs_padded);
  for (int tap = 0; tap < 9; ++tap) {
    std::fill(row.begin(), row.end(), 0.);
    const float* p = partials + (static_cast<int64_t>(tap) * s.inputs_padded + input) * s.outputs_padded;
    for (int64_t q = 0; q < count; ++q, p += chunk)
      for (int o = 0; o < s.outputs_padded; ++o) row[o] += p[o];
    for (int o = 0; o < s.outputs; ++o)
      out[(static_cast<int64_t>(o) * s.inputs + input) * 9 + tap] = row[o / s.group * s.group_padded + o % s.group];
  }
}

}  // namespace soap::cpu
