// Gated activation of rows whose first half is the gate and whose second half is up.
#include "gated_activation.h"
#include "parallel.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 8192;

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_gated_activation(const float* gate_up, int64_t row_stride, float* y, int64_t num_rows, int64_t size,
                           int64_t activation, int64_t num_threads) {
  using namespace pilotfish;
  share_out(num_rows, threads_for(num_rows * size, kElementsPerThread, num_threads), [=](int64_t row) {
    const float* gate = gate_up + row * row_stride;
    gated_activation_row(gate, gate + size, static_cast<Activation>(activation), y + row * size, size);
  });
}
