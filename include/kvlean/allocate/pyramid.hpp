// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kvlean/allocate/uniform.hpp"

KVLEAN_NAMESPACE_BEGIN

/// The layer schedules that go by the name of PyramidKV (arXiv 2406.02069). In all of them, with b
/// slots a head outside the window w, n tokens, L layers: mn = b / beta, mx = 2b - mn, clamped to
/// mx <= n - w with mn = 2b - mx; layer l gets mx - l (mx - mn) / (L - 1).
enum class PyramidForm : u8 {
  /// The schedule in exact rational numbers, rounded by largest remainder (ties: lower layer): the
  /// layers sum to L * nominal.
  exact,
  /// kvpress: mn and mx are shares of the nominal with the window in it, steps are real, every
  /// layer
  /// is rounded half to even; a flat schedule unless n >= mx >= mn >= w. The total drifts by
  /// rounding. kvpress starts from a real number of kept tokens, allocators from whole nominals, so
  /// layers can differ by one; kvpress_pyramid_slots() takes the real number.
  kvpress,
  /// The authors' code and Ada-KV's: mn and the step between layers are rounded down, so early
  /// layers' excess is not made up for and the total OVERSHOOTS (15 % at b = 96, L = 32).
  authors,
};

/// kvpress's schedule for a real number of kept tokens, which is tokens * (1 - ratio) there: slots
/// of one head in `layer`, window included. beta >= 1.
[[nodiscard]] inline u32 kvpress_pyramid_slots(double kept, u32 tokens, u32 window, u32 beta,
                                               u32 layer, u32 num_layers) noexcept {
  const auto rounded = [](double value) noexcept {
    const double whole = std::floor(value);
    const u32 slots = static_cast<u32>(whole);
    const double rest = value - whole;
    return rest > 0.5 || (rest == 0.5 && slots % 2 == 1) ? slots + 1 : slots;
  };
  const double n = tokens;
  const double w = window;
  double mn = kept / beta;
  double mx = 2.0 * kept - mn;
  if (mx >= n - w) {
    mx = n - w;
    mn = 2.0 * kept - mx;
  }
  const bool sloped = num_layers > 1 && n >= mx && mx >= mn && mn >= w;
  if (!sloped) return rounded(std::min(kept, n));
  return rounded(mx - layer * (mx - mn) / (num_layers - 1.0));
}

/// Slots of one head in `layer` of `num_layers`, window included, when every head of every layer
/// has `tokens` tokens and `nominal` slots on average: a pure function, so no prompt governs the
/// next. `window` counts the tokens that are kept in any case (kvpress: its window_size). With one
/// layer, or nominal >= tokens, the nominal, at most `tokens`. Needs 1 <= beta <= 65536 and
/// num_layers <= 16384. O(num_layers) for the exact form, else O(1).
[[nodiscard]] inline u32 pyramid_slots(PyramidForm form, u32 nominal, u32 tokens, u32 window,
                                       u32 beta, u32 layer, u32 num_layers) noexcept {
  if (nominal >= tokens) return tokens;
  if (num_layers <= 1 || layer >= num_layers) return nominal;
  if (form == PyramidForm::kvpress) {
    return kvpress_pyramid_slots(nominal, tokens, window, beta, layer, num_layers);
  }
  window = std::min(window, nominal);
  const u64 b = nominal - window;
  const u64 most = tokens - window;
  const u64 steps = num_layers - 1;
  if (form == PyramidForm::authors) {
    u64 mn = b / beta;
    u64 mx = 2 * b - mn;
    if (mx >= most) {
      mx = most;
      mn = 2 * b - mx;
    }
    return window + static_cast<u32>(mx - layer * ((mx - mn) / steps));
  }
  // In units of 1 / (beta * steps) slots everything is an integer.
  u64 mn = b;
  u64 mx = 2 * b * beta - b;
  if (mx >= most * beta) {
    mx = most * beta;
    mn = 2 * b * beta - mx;
  }
  const u64 unit = beta * steps;
  const auto quota = [&](u64 l) noexcept { return mx * steps - l * (mx - mn); };
  const u64 mine = quota(layer) % unit;
  u64 left = b * num_layers;  // slots that rounding down leaves over
  u64 before = 0;             // layers with a better claim to one of them
  for (u32 l = 0; l < num_layers; ++l) {
    left -= quota(l) / unit;
    const u64 remainder = quota(l) % unit;
    before += remainder > mine || (remainder == mine && l < layer) ? 1 : 0;
  }
  return window + static_cast<u32>(quota(layer) / unit + (before < left ? 1 : 0));
}

/// PyramidKV: lower layers get more slots, upper ones fewer; `heads` shares a layer's slots among
/// its heads, so PyramidAllocator<AdaKVAllocator> is Ada-Pyramid. The layer's place is
/// context.layer plus its index in the span, of context.num_layers: a span of one layer gets that
/// layer's own share, which may be more or less than its nominal. Where all nominals are the same
/// (a budget of slots), there is one schedule, that of the longest segment: layers that were
/// compressed before, and are as long as their shares, get these shares again. Otherwise every
/// segment has its own. What a segment shorter than its share can't use goes to the others of its
/// layer when `heads` shares slots. A span that holds all layers is brought to the exact total of
/// the nominals, as far as there are tokens (exact form; largest remainder, in proportion to the
/// room between floor and length): in a stream give all layers at once.
///
/// Errors: budget_below_protected when a layer's nominals sum to less than its floors;
/// invalid_option for beta outside [1, 65536] or more than 16384 layers; null_pointer; those of
/// `heads`; workspace_too_small, out_of_memory. On an error the limits are unchanged. O(segments *
/// layers).
template <class Heads = UniformAllocator>
struct PyramidAllocator {
  u32 beta = 20;  ///< how steep: the last layer gets about nominal / beta; 1 is flat
  PyramidForm form = PyramidForm::exact;
  Heads heads = {};
  u32 window =
      32;  ///< kvpress form only: its window_size. The other forms use each segment's floor

  /// Whether `heads` hands slots that a short segment can't use to the others of its layer.
  static constexpr bool shares_slots = requires { requires Heads::shares_slots; };

  /// Shares of layers differ, so only an exact total over all of them tells that every token fits
  /// where some segment is longer than its nominal.
  [[nodiscard]] bool everything_fits(std::span<const LayerLimits> layers,
                                     const Context& context) const noexcept {
    if (detail::allocation::each_fits(layers)) return true;
    return form == PyramidForm::exact && layers.size() == places(layers.size(), context) &&
           detail::allocation::all_fit(layers);
  }

  Status allocate(std::span<LayerLimits> layers, Context& context) const noexcept {
    static_assert(Allocator<Heads>);
    namespace allocation = detail::allocation;
    const u64 all = places(layers.size(), context);
    if (beta < 1 || beta > 65536 || all > 16384) return StatusCode::invalid_option;
    Workspace& workspace = context.workspace;
    WorkspaceScope scope(workspace);
    allocation::Group group;
    KVLEAN_RETURN_IF_ERROR(allocation::gather(layers, context, group));
    u32* wanted = workspace.take<u32>(group.count);
    if (wanted == nullptr) return workspace.exhausted();
    const u32 longest = tokens_of_one_schedule(group);
    u32 first = 0;
    u32 place = context.layer;
    for (const LayerLimits& layer : layers) {
      const u32 segments = layer.cache->segments;
      const allocation::Group mine = group.slice(first, segments);
      const u64 total = shares_slots ? mine.shared_total() : mine.total();
      KVLEAN_RETURN_IF_ERROR(allocation::raise_to_floors(mine, total, workspace));
      for (u32 s = 0; s < segments; ++s) {
        u32 nominal = mine.value[s];
        u32 kept = mine.low[s];
        u32 tokens = mine.high[s];
        if (longest != 0) {
          nominal = mine.nominal[s];
          tokens = longest;
          kept = std::max(kept, context.options.protection.count(tokens, layer.cache->frozen));
        }
        if (form == PyramidForm::kvpress) kept = window;
        wanted[first + s] =
            std::max(pyramid_slots(form, nominal, tokens, kept, beta, place, static_cast<u32>(all)),
                     mine.low[s]);
      }
      KVLEAN_RETURN_IF_ERROR(share_layer(mine, wanted + first, workspace));
      first += segments;
      ++place;
    }
    if (form == PyramidForm::exact && layers.size() == all) {
      KVLEAN_RETURN_IF_ERROR(allocation::fit_total(group.value, group.low, group.high, group.count,
                                                   group.shared_total(), workspace));
    }
    first = 0;
    for (const LayerLimits& layer : layers) {
      give_wanted(group.slice(first, layer.cache->segments), wanted + first);
      first += layer.cache->segments;
    }
    allocation::scatter(group, layers);
    const Status shared = heads.allocate(layers, context);
    if (!shared) {
      group.value = group.nominal;
      allocation::scatter(group, layers);
    }
    return shared;
  }

 private:
  using Group = detail::allocation::Group;

  static u64 places(std::size_t layers, const Context& context) noexcept {
    return std::max<u64>(context.num_layers, u64{context.layer} + layers);
  }
  // The length of the longest segment where all nominals are the same and lengths are not, else 0.
  static u32 tokens_of_one_schedule(const Group& group) noexcept {
    u32 longest = 0;
    bool ragged = false;
    for (u32 i = 0; i < group.count; ++i) {
      if (group.nominal[i] != group.nominal[0]) return 0;
      ragged = ragged || group.high[i] != group.high[0];
      longest = std::max(longest, group.high[i]);
    }
    return ragged ? longest : 0;
  }
  // Cuts the wanted slots to the lengths; where heads share, the layer keeps their sum.
  static Status share_layer(const Group& mine, const u32* wanted, Workspace& workspace) noexcept {
    u64 sum = 0;
    u64 tokens = 0;
    for (u32 s = 0; s < mine.count; ++s) {
      mine.value[s] = std::min(wanted[s], mine.high[s]);
      sum += wanted[s];
      tokens += mine.high[s];
    }
    if (!shares_slots) return StatusCode::ok;
    return detail::allocation::fit_total(mine.value, mine.low, mine.high, mine.count,
                                         std::min(sum, tokens), workspace);
  }
  // Heads that share are told what each is meant to get, where the layer's total is still that.
  static void give_wanted(const Group& mine, const u32* wanted) noexcept {
    u64 sum = 0;
    for (u32 s = 0; s < mine.count; ++s) sum += wanted[s];
    if (shares_slots && mine.total() == sum) std::copy_n(wanted, mine.count, mine.value);
  }
};

static_assert(Allocator<PyramidAllocator<>>);

KVLEAN_NAMESPACE_END
