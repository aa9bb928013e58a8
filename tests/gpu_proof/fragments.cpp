// One warp's mma and ldmatrix as cuda_shim.h models them, for a test that compares them with another source's layouts.
// A fragment is [lane][register]; c is [lane][4], rows are the addresses that the lanes give ldmatrix.
#include "cuda_shim.h"

namespace {
void mma(float* c, const uint32_t* a, const uint32_t* b, int k, bool half) {
  const int lane = threadIdx.x;
  const uint32_t *own_a = a + lane * (k / 4), *own_b = b + lane * (k / 8);
  if (k == 16 && half) soap::cuda::mma_k16<true>(c + 4 * lane, own_a, own_b[0], own_b[1]);
  else if (k == 16) soap::cuda::mma_k16<false>(c + 4 * lane, own_a, own_b[0], own_b[1]);
  else if (half) soap::cuda::mma_k8<true>(c + 4 * lane, own_a, own_b[0]);
  else soap::cuda::mma_k8<false>(c + 4 * lane, own_a, own_b[0]);
}

void ldmatrix(uint32_t* out, const uint16_t* tiles, int count, bool transposed) {
  const int lane = threadIdx.x;
  const soap::cuda::Address row = soap::cuda::address_of(tiles + lane % (8 * count) * 8);
  soap::cuda::Fragment found;
  if (count == 4) transposed ? soap::cuda::ldmatrix_x4_trans(found, row) : soap::cuda::ldmatrix_x4(found, row);
  else transposed ? soap::cuda::ldmatrix_x2_trans(found.v[0], found.v[1], row) : soap::cuda::ldmatrix_x2(found.v[0], found.v[1], row);
  for (int i = 0; i < count; ++i) out[count * lane + i] = found.v[i];
}
}  // namespace

extern "C" void shim_mma(float* c, const uint32_t* a, const uint32_t* b, int k, int half) {
  SOAP_LAUNCH(mma, dim3(1), dim3(32), 0, nullptr, c, a, b, k, half != 0);
}
extern "C" void shim_ldmatrix(uint32_t* out, const uint16_t* tiles, int count, int transposed) {
  SOAP_LAUNCH(ldmatrix, dim3(1), dim3(32), 0, nullptr, out, tiles, count, transposed != 0);
}
