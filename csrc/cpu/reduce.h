// Stage `reduce`: the chunks' partial sums, added in their order and in double.
#pragma once

#include "fold.h"

namespace soap::cpu {

// count vectors one after the other, added.
Numbers reduce(const Numbers& parts, int64_t count);

struct ConvParts {  // what one chunk leaves: (9, inputs_padded, outputs_padded) floats, outputs in padded groups
  int inputs, outputs, inputs_padded, outputs_padded, group_padded, group;
};

// One input's part of dW (outputs, inputs, 9).
void reduce_conv(const float* parts, int64_t count, const ConvParts& shape, int input, double* out);

}  // namespace soap::cpu
