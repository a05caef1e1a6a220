// The experts of a mixture-of-experts layer; kernels/moe_mlp.py has the formula.
//
// The choices of all tokens are sorted by expert. Then, each a loop shared by the threads: gate and up of every choice
// (panels of the experts' weights, read once each), its activation, its down projection, and each token's weighted sum in
// the order of its choices. The products are those of linear, so experts equal to a dense layer give its very bits.
#include <vector>

#include "gated_activation.h"
#include "panel.h"
#include "scratch.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 8192;

template <class Weight>
struct Experts {
  const Weight* data;  // [experts, rows, size]
  int64_t expert_stride, row_stride, num_rows, size;

  Matrix<Weight> matrix(int64_t expert) const { return {data + expert * expert_stride, row_stride, num_rows, size}; }
};

// Choices sorted by expert: those of expert active[i] are `choices` [starts[i], starts[i + 1]), as token * top_k + c.
struct Routing {
  std::vector<int64_t> active, starts, choices;
  std::vector<int64_t> places;  // of each choice in `choices`, -1 where its expert is not here
};

Routing sort_choices(const int32_t* experts, int64_t num_choices, int64_t num_experts) {
  Routing routing;
  std::vector<int64_t> next(num_experts + 1);
  for (int64_t i = 0; i < num_choices; ++i) {
    if (experts[i] >= 0) ++next[experts[i] + 1];
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    if (next[e + 1] > 0) {
      routing.active.push_back(e);
      routing.starts.push_back(next[e]);
    }
    next[e + 1] += next[e];
  }
  routing.starts.push_back(next[num_experts]);
  routing.choices.resize(next[num_experts]);
  routing.places.assign(num_choices, -1);
  for (int64_t i = 0; i < num_choices; ++i) {
    if (experts[i] < 0) continue;
    routing.places[i] = next[experts[i]]++;
    routing.choices[routing.places[i]] = i;
  }
  return routing;
}

// y_row(place) = w[expert] @ x_row(place) for every sorted choice.
template <class Weight, class XRow, class YRow>
void multiply_experts(const Experts<Weight>& w, const Routing& routing, int64_t num_threads, XRow x_row, YRow y_row) {
  const int64_t num_active = routing.active.size();
  if (num_active == 0 || w.num_rows == 0) return;
  const int64_t rows = panel_rows(w.matrix(0), std::max<int64_t>(num_threads / num_active, 1));
  const int64_t num_panels = ceil_div(w.num_rows, rows);
  share_out(num_active * num_panels, num_threads, [&](int64_t i) {
    const int64_t expert = i / num_panels, begin = i % num_panels * rows, first = routing.starts[expert];
    multiply_panel<Weight>(
        w.matrix(routing.active[expert]), nullptr, begin, std::min(begin + rows, w.num_rows),
        routing.starts[expert + 1] - first, [=](int64_t m) { return x_row(first + m); },
        [=](int64_t m) { return y_row(first + m); });
  });
}

template <class Weight>
void moe_mlp(const float* x, int64_t x_stride, const Experts<Weight>& gate_up, const Experts<Weight>& down,
             const float* weights, const int32_t* experts, float* out, int64_t num_tokens, int64_t top_k,
             int64_t num_experts, Activation activation, int64_t num_threads) {
  const int64_t hidden = down.num_rows, intermediate = down.size;
  const Routing routing = sort_choices(experts, num_tokens * top_k, num_experts);
  const int64_t num_places = routing.choices.size();
  thread_local AlignedBuffer memory;
  float* gates = memory.reserve(num_places * (3 * intermediate + hidden));
  float* activated = gates + num_places * 2 * intermediate;
  float* products = activated + num_places * intermediate;

  const int64_t* choices = routing.choices.data();
  multiply_experts(
      gate_up, routing, num_threads, [=](int64_t place) { return x + choices[place] / top_k * x_stride; },
      [=](int64_t place) { return gates + place * 2 * intermediate; });
  const int64_t few_threads = threads_for(num_places * intermediate, kElementsPerThread, num_threads);
  share_out(num_places, few_threads, [=](int64_t place) {
    const float* gate = gates + place * 2 * intermediate;
    gated_activation_row(gate, gate + intermediate, activation, activated + place * intermediate, intermediate);
  });
  multiply_experts(
      down, routing, num_threads, [=](int64_t place) { return activated + place * intermediate; },
      [=](int64_t place) { return products + place * hidden; });
  share_out(num_tokens, few_threads, [&](int64_t token) {
    float* sum = out + token * hidden;
    std::fill(sum, sum + hidden, 0.0f);
    for (int64_t choice = token * top_k; choice < (token + 1) * top_k; ++choice) {
      if (routing.places[choice] < 0) continue;
      const float* product = products + routing.places[choice] * hidden;
      for (int64_t h = 0; h < hidden; ++h) sum[h] += product[h] * weights[choice];
    }
  });
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_moe_mlp_f32(const float* x, int64_t x_stride, const float* gate_up, int64_t gate_up_expert_stride,
                      int64_t gate_up_row_stride, const float* down, int64_t down_expert_stride,
                      int64_t down_row_stride, const float* weights, const int32_t* experts, float* out,
                      int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t hidden, int64_t intermediate,
                      int64_t activation, int64_t num_threads) {
  pilotfish::moe_mlp<float>(x, x_stride, {gate_up, gate_up_expert_stride, gate_up_row_stride, 2 * intermediate, hidden},
                            {down, down_expert_stride, down_row_stride, hidden, intermediate}, weights, experts, out,
                            num_tokens, top_k, num_experts, static_cast<pilotfish::Activation>(activation),
                            num_threads);
}

EXPORT(void)
pilotfish_moe_mlp_bf16(const float* x, int64_t x_stride, const pilotfish::BFloat16* gate_up,
                       int64_t gate_up_expert_stride, int64_t gate_up_row_stride, const pilotfish::BFloat16* down,
                       int64_t down_expert_stride, int64_t down_row_stride, const float* weights,
                       const int32_t* experts, float* out, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                       int64_t hidden, int64_t intermediate, int64_t activation, int64_t num_threads) {
  pilotfish::moe_mlp<pilotfish::BFloat16>(
      x, x_stride, {gate_up, gate_up_expert_stride, gate_up_row_stride, 2 * intermediate, hidden},
      {down, down_expert_stride, down_row_stride, hidden, intermediate}, weights, experts, out, num_tokens, top_k,
      num_experts, static_cast<pilotfish::Activation>(activation), num_threads);
}
