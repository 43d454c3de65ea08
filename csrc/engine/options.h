// GenerationOptions: every option once. Python keywords, command-line flags and help are made from
// visit().
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "base/check.h"

namespace bicache {

struct GenerationOptions {
  static constexpr const char* kRemasking = "low_confidence|random";

  int64_t gen_length = 128;
  std::optional<int64_t> steps;
  std::optional<int64_t> block_length;
  double temperature = 0.0;
  std::string remasking = "low_confidence";
  bool logits_eos_inf = false;
  bool confidence_eos_eot_inf = false;
  int64_t seed = 0;

  // f(name, field, help, choices): every option, in the order of the help text; choices: "a|b", or
  // "" for any value.
  template <class F>
  void visit(F&& f) {
    f("gen_length", gen_length, "response length g, in tokens", "");
    f("steps", steps, "denoising steps, a multiple of the number of blocks; default: gen_length",
      "");
    f("block_length", block_length,
      "length of the blocks that are decoded one after the other, a divisor of gen_length; "
      "default: 32 if that divides "
      "gen_length, otherwise gen_length",
      "");
    f("temperature", temperature, "Gumbel noise on the logits; 0: greedy", "");
    f("remasking", remasking,
      "which masked positions are committed first: the most probable, or random ones", kRemasking);
    f("logits_eos_inf", logits_eos_inf, "never predict the end-of-text token (LLaDA EVAL.md)", "");
    f("confidence_eos_eot_inf", confidence_eos_eot_inf,
      "commit end-of-text and end-of-turn tokens last (LLaDA EVAL.md); as in the reference, with "
      "temperature > 0 only end of "
      "turn is affected",
      "");
    f("seed", seed, "of the counter-based noise: same seed, same tokens, whatever the batch", "");
  }

  // Fills in what depends on other options, and checks: std::invalid_argument "[generate] option:
  // expected X, got Y".
  void resolve() {
    constexpr int64_t kMax = int64_t{1} << 31;
    require(1 <= gen_length && gen_length < kMax, "[generate] gen_length: expected 1..2^31-1, got ",
            gen_length);
    if (!steps) steps = gen_length;
    if (!block_length) block_length = gen_length % 32 == 0 ? 32 : gen_length;
    require(1 <= *block_length && gen_length % *block_length == 0,
            "[generate] block_length: expected a divisor of gen_length (", gen_length, "), got ",
            *block_length);
    const int64_t blocks = gen_length / *block_length;
    require(1 <= *steps && *steps < kMax && *steps % blocks == 0,
            "[generate] steps: expected a positive multiple of the number of blocks (", gen_length,
            " / ", *block_length, " = ", blocks, "), got ", *steps);
    require(std::isfinite(temperature) && temperature >= 0,
            "[generate] temperature: expected a finite number >= 0, got ", temperature);
    require(remasking == "low_confidence" || remasking == "random",
            "[generate] remasking: expected low_confidence or random, got \"", remasking, "\"");
    require(seed >= 0, "[generate] seed: expected >= 0, got ", seed);
  }

  // After resolve().
  int64_t steps_per_block() const { return *steps / (gen_length / *block_length); }
};

}  // namespace bicache
