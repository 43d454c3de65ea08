// GenerationOptions: every option once. Python keywords, command-line flags and help are made from
// visit().
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"

namespace bicache {

struct GenerationOptions {
  static constexpr const char* kRemasking =
      "low_confidence|random|origin|maskgit_plus|topk_margin|entropy";

  int64_t gen_length = 128;
  std::optional<int64_t> steps;
  std::optional<int64_t> block_length;
  double temperature = 0.0;
  std::string remasking = "low_confidence";
  std::optional<double> threshold, factor;
  double alg_temp = 0.0;
  std::optional<double> top_p;
  std::optional<int64_t> top_k;
  double cfg_scale = 0.0;
  std::vector<int64_t> suppress_tokens;
  bool logits_eos_inf = false;
  bool confidence_eos_eot_inf = false;
  std::optional<std::vector<int64_t>> end_tokens;
  bool early_stop = false;
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
      "gen_length, otherwise gen_length; with Dream's rules gen_length",
      "");
    f("temperature", temperature, "Gumbel noise on the logits; 0: greedy", "");
    f("remasking", remasking,
      "which masked positions are committed first: by LLaDA's rules, equally many at every step, "
      "the most probable (low_confidence) or random ones (random); by Dream's, on Dream's "
      "schedule, random ones (origin) or those of the highest probability (maskgit_plus), the "
      "widest margin "
      "over the second best token (topk_margin) or the lowest entropy (entropy)",
      kRemasking);
    f("threshold", threshold,
      "commit every masked position of the block whose confidence reaches this, and no fewer than "
      "`steps` asks for (Fast-dLLM; with low_confidence, maskgit_plus, topk_margin)",
      "");
    f("factor", factor,
      "commit the n most confident positions as long as the n-th confidence is at least "
      "1 - factor / (n + 1), the last position always if it comes to that, and no fewer than "
      "`steps` "
      "asks for (Fast-dLLM; in place of threshold)",
      "");
    f("alg_temp", alg_temp,
      "randomness of the order in maskgit_plus, topk_margin and entropy; 0: the most confident "
      "first",
      "");
    f("top_p", top_p,
      "only the most probable tokens that hold this much probability: for what is drawn with "
      "temperature > 0, and for the confidence in Dream's rules",
      "");
    f("top_k", top_k, "only so many of the most probable tokens: for the same", "");
    f("cfg_scale", cfg_scale,
      "classifier-free guidance: logits = un + (cfg_scale + 1) (cond - un), where un is predicted "
      "with every prompt token masked; twice the work; 0: off",
      "");
    f("suppress_tokens", suppress_tokens, "token ids that are never predicted", "");
    f("logits_eos_inf", logits_eos_inf, "never predict the end-of-text token (LLaDA EVAL.md)", "");
    f("confidence_eos_eot_inf", confidence_eos_eot_inf,
      "commit end-of-text and end-of-turn tokens last (LLaDA EVAL.md); as in the reference, with "
      "temperature > 0 only end of "
      "turn is affected",
      "");
    f("end_tokens", end_tokens,
      "token ids that end the text; an empty list (on the command line: none) for no such ids; "
      "default: the model's end of text and end of turn",
      "");
    f("early_stop", early_stop,
      "end once one of end_tokens or a stop string is committed and so is everything before it: "
      "the same text in fewer steps; positions still masked become the first of end_tokens, with "
      "NaN as confidence",
      "");
    f("seed", seed, "of the counter-based noise: same seed, same tokens, whatever the batch", "");
  }

  // Fills in what depends on other options, and checks: std::invalid_argument "[generate] option:
  // expected X, got Y".
  void resolve() {
    check_rules();
    constexpr int64_t kMax = int64_t{1} << 31;
    require(1 <= gen_length && gen_length < kMax, "[generate] gen_length: expected 1..2^31-1, got ",
            gen_length);
    if (!steps) steps = gen_length;
    if (!block_length) block_length = gen_length % 32 == 0 && !dream() ? 32 : gen_length;
    require(1 <= *block_length && gen_length % *block_length == 0,
            "[generate] block_length: expected a divisor of gen_length (", gen_length, "), got ",
            *block_length);
    const int64_t blocks = gen_length / *block_length;
    require(1 <= *steps && *steps < kMax && *steps % blocks == 0,
            "[generate] steps: expected a positive multiple of the number of blocks (", gen_length,
            " / ", *block_length, " = ", blocks, "), got ", *steps);
    require(seed >= 0, "[generate] seed: expected >= 0, got ", seed);
  }

  // After resolve().
  int64_t steps_per_block() const { return *steps / (gen_length / *block_length); }
  // One of Dream's rules.
  bool dream() const { return remasking != "low_confidence" && remasking != "random"; }
  // How many positions a step commits depends on what is predicted.
  bool adaptive() const { return threshold || factor; }

 private:
  // What follows from no other length or count.
  void check_rules() const {
    const auto known = [&] {
      const std::string names = cat("|", kRemasking, "|");
      return remasking.find('|') == std::string::npos &&
             names.find(cat("|", remasking, "|")) != std::string::npos;
    };
    require(known(), "[generate] remasking: expected one of ", kRemasking, ", got \"", remasking,
            "\"");
    for (const auto& [name, x] :
         {std::pair{"temperature", temperature}, std::pair{"alg_temp", alg_temp},
          std::pair{"cfg_scale", cfg_scale}})
      require(std::isfinite(x) && x >= 0, "[generate] ", name,
              ": expected a finite number >= 0, got ", x);
    const bool ranked = remasking != "random" && remasking != "origin";
    require(
        alg_temp == 0 || (dream() && ranked),
        "[generate] alg_temp: expected with remasking maskgit_plus, topk_margin or entropy, got ",
        remasking);
    require(!top_p || (0 < *top_p && *top_p <= 1),
            "[generate] top_p: expected above 0 and up to 1, "
            "got ",
            top_p.value_or(0));
    require(!top_k || *top_k >= 1, "[generate] top_k: expected >= 1, got ", top_k.value_or(0));
    require(!threshold || !factor, "[generate] factor: expected without threshold, got both");
    require(!threshold || (0 <= *threshold && *threshold <= 1),
            "[generate] threshold: expected 0..1, got ", threshold.value_or(0));
    require(!factor || (std::isfinite(*factor) && *factor >= 0),
            "[generate] factor: expected a finite number >= 0, got ", factor.value_or(0));
    require(!confidence_eos_eot_inf || !dream(),
            "[generate] confidence_eos_eot_inf: expected with remasking low_confidence or random, "
            "got ",
            remasking);
    require(!adaptive() || (ranked && remasking != "entropy" && alg_temp == 0), "[generate] ",
            threshold ? "threshold" : "factor",
            ": expected with remasking low_confidence, maskgit_plus or topk_margin, and without "
            "alg_temp, got ",
            remasking, alg_temp > 0 ? " with alg_temp" : "");
  }
};

}  // namespace bicache
