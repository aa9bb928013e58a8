// Stage `reduce`: the chunks' partial sums, added in their order and in double.
#pragma once

#include "fold.h"

namespace soap::cpu {

// count vectors one after the other, added.
Numbers reduce(const Numbers& partials, int64_t count);

struct ConvPartials {  // what one chunk leaves: (9, inputs_padded, outputs_padded) floats, outputs in padded groups
  int inputs, outputs, inputs_padded, outputs_padded, group_padded, group;
};

// One input's share of dW (outputs, inputs, 9).
void reduce_conv(const float* partials, int64_t count, const ConvPartials& shape, int input, double* out);

}  // namespace soap::cpu
