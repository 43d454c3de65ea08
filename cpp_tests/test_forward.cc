// The forward pass executes plans: identities that hold bit for bit, on every kernel table.
#include <gtest/gtest.h>

#include <cstring>

#include "cache/policy.h"
#include "support.h"
#include "tiny_model.h"

namespace bicache {
namespace {

constexpr int64_t kP = 19, kU = 6, kG = 8, kN = kP + kU + kG;

std::vector<int32_t> canvas(const TinyModel& t, unsigned seed, int64_t p = kP, int64_t u = kU,
                            int64_t g = kG) {
  std::vector<int32_t> tokens = t.ids(p + u, seed);
  tokens.resize(static_cast<size_t>(p + u + g), t.mask());
  return tokens;
}

std::vector<float> run(const Model& m, RequestState& r, const StepPlan& plan, int threads = 1,
                       PrefixEntry* record = nullptr) {
  Workspace ws;
  Pass pass{&r, &plan, record, {}};
  m.forward({&pass, 1}, ws, threads);
  return {pass.logits.data, pass.logits.data + pass.logits.rows * pass.logits.cols};
}

// One step: passes until one predicts.
std::vector<float> step(const Model& m, RequestState& r, const Policy& policy, StepInfo s) {
  for (;; ++s.repeat) {
    settle(policy, s);
    const StepPlan plan = policy.plan(s);
    std::vector<float> logits = run(m, r, plan);
    if (!logits.empty()) return logits;
  }
}

StepInfo info(const TinyModel& t, int64_t step) {
  StepInfo s;
  s.request = {t.layers, kP, kU, kG, t.shift || t.family == "dream" ? 1 : 0};
  s.step = s.block_step = step;
  s.block = {kP + kU, kN};
  s.wanted = RowSet::span(kP + kU, kN);
  if (step > 0) s.committed = RowSet::of({kP + kU + 1, kP + kU + 4});
  return s;
}

std::vector<std::string> policies(int layers) {
  std::vector<std::string> specs = {"none",
                                    "naive:source=alone",
                                    "naive:source=first_request",
                                    "bicache:depth=2,refresh=block",
                                    "bicache:depth=1,refresh=drift:0.1",
                                    "bicache:depth=probe:0.9,refresh_steps=2",
                                    "fast_dllm:mode=prefix",
                                    "fast_dllm:mode=dual",
                                    "fast_dllm:mode=dual,refresh_steps=2",
                                    "fast_dllm:mode=dual,block_start=fill",
                                    "dllm_cache:prompt_interval_steps=3,gen_interval_steps=2",
                                    "dllm_cache:transfer_ratio=0",
                                    "dllm_cache:transfer_ratio=1",
                                    "dllm_cache:gen_interval_steps=1",
                                    "dllm_cache:gen_interval_steps=2,drift=since_recompute",
                                    "dllm_cache:transfer_ratio=0.9,new_tokens=recompute"};
  for (const char* body : {"fast_dllm:mode=prefix", "fast_dllm:mode=dual,block_start=fill",
                           "dllm_cache:prompt_interval_steps=3,gen_interval_steps=2",
                           "dllm_cache:drift=since_recompute"}) {
    specs.push_back(std::string("naive+") + body);
    for (const char* depth : {"0", "2"})
      specs.push_back(std::string("bicache:refresh_steps=3,depth=") + depth + "+" + body);
  }
  for (int b = 0; b <= layers; ++b) {
    for (const char* splice : {"official", "strict"}) {
      for (const char* refresh : {"1", "3"}) {
        specs.push_back("bicache:depth=" + std::to_string(b) + ",refresh_steps=" + refresh +
                        ",splice=" + splice);
      }
    }
  }
  return specs;
}

std::vector<TinyModel> models() {
  TinyModel gqa, mha, normed, shifted;
  mha.kv_heads = 4;
  normed.qk_norm = true;
  shifted.shift = true;
  TinyModel dream, illada, moe;
  dream.family = "dream";
  illada.family = "illada";
  moe.family = "llada-moe";
  return {gqa, mha, normed, shifted, dream, illada, moe};
}

// What K and V may be held in.
class ForwardKv : public testing::TestWithParam<DType> {
 protected:
  const DType kv = GetParam();
};

INSTANTIATE_TEST_SUITE_P(, ForwardKv, testing::Values(DType::f32, DType::bf16),
                         [](const auto& info) { return std::string(name(info.param)); });

// Everything a request could have cached, taken from the canvas's own full forward pass: then no
// plan may change a bit.
TEST_P(ForwardKv, FreshCacheIdentity) {
  for (const Kernels* kernels : tables_under_test(kSanitized)) {
    for (const TinyModel& t : thinned(models())) {
      const auto m = t.load(*kernels, DType::f32, kv);
      const auto tokens = canvas(t, 3);
      EntryNeeds all{EntryNeeds::Source::alone, t.layers, {}};
      for (int l = 1; l < t.layers; ++l) all.joins.push_back(l);
      const auto& c = m->config();
      const auto entry =
          std::make_shared<PrefixEntry>(kP, c.kv_width(), c.dim, all, entry_types(kv, DType::f32));
      RequestState full = m->make_request(tokens, kP, Kept::everything(kN));
      const StepPlan everything = StepPlan::uniform(RowSet::span(0, kN), RowSet::span(kP + kU, kN));
      const auto want = run(*m, full, everything, 1, entry.get());

      for (const std::string& spec : policies(t.layers)) {
        const PolicyPtr policy = make_policy(spec);
        for (const int64_t at : {0, 1, 3}) {
          RequestState r = m->make_request(tokens, kP, Kept::everything(kN));
          run(*m, r, everything);  // its own caches
          r.entry = entry;         // and the entry
          EXPECT_TRUE(same_bits(step(*m, r, *policy, info(t, at)), want))
              << kernels->isa << " " << spec << " step " << at;
        }
        // with nothing of its own but what the policy keeps: the first pass, and the one after it
        RequestState r = m->make_request(tokens, kP, policy->kept(info(t, 0).request));
        r.entry = entry;
        for (const int64_t at : {0, 1}) {
          EXPECT_TRUE(same_bits(step(*m, r, *policy, info(t, at)), want))
              << kernels->isa << " " << spec << " alone";
        }
      }
      // select and deltas: rows that are not recomputed add the delta they last computed
      RequestState r = m->make_request(tokens, kP, Kept::everything(kN));
      run(*m, r, everything);
      const RowSet all_rows = RowSet::span(0, kN), prompt = RowSet::span(0, 9);
      const StepPlan plan{
          {{0, {all_rows, all_rows, {}}},
           {1, {all_rows, prompt, {{RowSet::span(9, 20), 4}, {RowSet::span(20, kN), 0}}}},
           {3, {RowSet::span(9, kN), {}, {{RowSet::span(12, kN), 5}}}}},
          RowSet::span(kP + kU, kN),
          false};
      EXPECT_TRUE(same_bits(run(*m, r, plan), want)) << kernels->isa;
    }
  }
}

double cosine(const float* a, const float* b, int64_t n) {
  double ab = 0, aa = 0, bb = 0;
  for (int64_t i = 0; i < n; ++i) {
    ab += static_cast<double>(a[i]) * b[i];
    aa += static_cast<double>(a[i]) * a[i];
    bb += static_cast<double>(b[i]) * b[i];
  }
  return ab / std::sqrt(aa * bb);
}

// Observed rows run over the keys that are lent; where these are the canvas's own, what they
// compute is what the full forward pass computes.
TEST_P(ForwardKv, ObservedRowsMeasureAndChangeNothing) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const TinyModel& t : models()) {
      const auto m = t.load(bicache::kernels(), DType::f32, kv);
      const auto& c = m->config();
      EntryNeeds all{EntryNeeds::Source::alone, t.layers, {}};
      for (int l = 1; l < t.layers; ++l) all.joins.push_back(l);
      const auto tokens = canvas(t, 3);
      // the entry: of the prefix alone; `full`: of the canvas
      const EntryTypes types = entry_types(kv, dtype);
      const auto entry = std::make_shared<PrefixEntry>(kP, c.kv_width(), c.dim, all, types);
      // K and V are compared as the entry holds them
      PrefixEntry full(kP, c.kv_width(), c.dim, all, {types.kv, DType::f32});
      const std::vector<int32_t> prefix(tokens.begin(), tokens.begin() + kP);
      RequestState alone = m->make_request(prefix, 0, {});
      run(*m, alone, StepPlan::uniform(RowSet::span(0, kP), {}), 1, entry.get());
      RequestState r = m->make_request(tokens, kP, Kept::everything(kN));
      r.entry = entry;
      const StepPlan everything = StepPlan::uniform(RowSet::span(0, kN), RowSet::span(kP + kU, kN));
      run(*m, r, everything, 1, &full);

      const RowSet rows = RowSet::of({1, 4, kP - 1}), suffix = RowSet::span(kP, kN);
      StepPlan plan = StepPlan::uniform(suffix, RowSet::span(kP + kU, kN));
      RequestState plain = m->make_request(tokens, kP, Kept::everything(kN));
      run(*m, plain, everything);
      const auto want = run(*m, plain, plan);
      for (const bool to_entry : {false, true}) {
        plan.observe = {rows, 0, t.layers - 1, to_entry};
        r.work.assign(r.work.size(), Work{});
        Workspace ws;
        Pass pass{&r, &plan, nullptr, {}};
        m->forward({&pass, 1}, ws, 1);
        const std::vector<float> got(pass.logits.data,
                                     pass.logits.data + pass.logits.rows * pass.logits.cols);
        EXPECT_TRUE(same_bits(got, want));
        ASSERT_EQ(pass.similarity.size(), static_cast<size_t>(t.layers - 1));
        for (int l = 0; l < t.layers; ++l) {
          const RowCount count = predicted_rows(plan, l);
          EXPECT_EQ(count.recomputed, suffix.size() + (l < t.layers - 1 ? 3 : 0));
          EXPECT_EQ(r.work[l].rows_of(Op::attention), count.recomputed);
          EXPECT_EQ(r.work[l].rows_of(Op::v), count.recomputed);
        }
        for (int l = 0; l < t.layers - 1; ++l) {
          const Similarity& s = pass.similarity[l];
          if (!to_entry) {
            EXPECT_EQ(s.kv(), 1) << l;
            EXPECT_TRUE(std::isnan(s.residual));
            continue;
          }
          double k = 0, v = 0, h = 0;
          const int64_t w = c.kv_width();
          std::vector<float> a(2 * w), b(2 * w), x(c.dim), y(c.dim);
          rows.for_each([&](int64_t row) {
            entry->get_kv(l, row, a.data());
            full.get_kv(l, row, b.data());
            k += cosine(a.data(), b.data(), w) / 3;
            v += cosine(a.data() + w, b.data() + w, w) / 3;
            if (l == 0) return;
            entry->get_h(l, row, x.data());
            full.get_h(l, row, y.data());
            h += cosine(x.data(), y.data(), c.dim) / 3;
          });
          EXPECT_NEAR(s.k, k, 1e-4) << l;
          EXPECT_NEAR(s.v, v, 1e-4) << l;
          if (l > 0) {
            EXPECT_NEAR(s.residual, h, 1e-4) << l;
          }
          if (l > 1) {
            EXPECT_LT(s.kv(), 0.99) << l;
          }
        }
      }
    }
  }
}

// Right after a refresh nothing has moved: rows observed from the splice on are what they were.
TEST_P(ForwardKv, ObservedFromTheSpliceOnNothingHasMovedAfterARefresh) {
  for (const TinyModel& t : models()) {
    const auto m = t.load(bicache::kernels(), DType::f32, kv);
    const auto& c = m->config();
    const auto tokens = canvas(t, 3);
    for (const char* splice : {"official", "strict"}) {
      for (int b = 0; b < t.layers; ++b) {
        const PolicyPtr policy = make_policy("bicache:depth=" + std::to_string(b) +
                                             ",refresh=drift:0.1,probe_rows=4,splice=" + splice);
        StepInfo s = info(t, 0);
        RequestState r = m->make_request(tokens, kP, policy->kept(s.request));
        if (const EntryNeeds needs = policy->needs(s.request); !needs.nothing()) {
          const auto entry = std::make_shared<PrefixEntry>(kP, c.kv_width(), c.dim, needs,
                                                           entry_types(kv, DType::f32));
          RequestState alone = m->make_request({tokens.begin(), tokens.begin() + kP}, 0, {});
          run(*m, alone, StepPlan::uniform(RowSet::span(0, kP), {}), 1, entry.get());
          r.entry = entry;
        }
        settle(*policy, s);
        run(*m, r, policy->plan(s));
        s.step = 1;
        settle(*policy, s);
        const StepPlan plan = policy->plan(s);
        Workspace ws;
        Pass pass{&r, &plan, nullptr, {}};
        m->forward({&pass, 1}, ws, 1);
        for (int l = plan.observe.first; l < t.layers; ++l)
          EXPECT_EQ(pass.similarity[l].kv(), 1) << splice << " " << b << " layer " << l;
        r.tokens[kP] = r.tokens[kP] == 1 ? 2 : 1;  // now something has
        m->forward({&pass, 1}, ws, 1);
        double lowest = 1;
        for (int l = plan.observe.first; l < t.layers; ++l)
          lowest = std::min(lowest, pass.similarity[l].kv());
        // layer c itself sees what it saw; the ones above do not
        if (plan.observe.first < t.layers - 1) {
          EXPECT_LT(lowest, 1 - 1e-4) << splice << " " << b;
        }
      }
    }
  }
}

TEST(Forward, ObservingWithoutAnEntryIsAnError) {
  TinyModel t;
  const auto m = t.load();
  RequestState r = m->make_request(canvas(t, 3), kP, Kept::everything(kN));
  StepPlan plan = StepPlan::uniform(RowSet::span(0, kN), {});
  plan.observe = {RowSet::span(0, 2), 0, 2, true};
  EXPECT_THROW(run(*m, r, plan), std::invalid_argument);
  plan.observe = {RowSet::span(0, 2), 1, 2, false};  // begins with the entry's residual
  EXPECT_THROW(run(*m, r, plan), std::invalid_argument);
}

TEST_P(ForwardKv, CountsExactlyThePlannedWork) {
  for (const char* family : {"llada", "llada-moe"}) {
    TinyModel t;
    t.family = family;
    const auto m = t.load(bicache::kernels(), DType::f32, kv);
    RequestState r = m->make_request(canvas(t, 4), kP, Kept::everything(kN));
    const RowSet all = RowSet::span(0, kN), rest = RowSet::span(5, kN);
    run(*m, r, StepPlan::uniform(all, {}));
    r.work.assign(r.work.size(), Work{});
    const StepPlan plan{{{0, {all, all, {}}},
                         {1, {rest, RowSet::span(5, 8), {{RowSet::span(10, 30), 6}}}},
                         {3, {rest, rest, {}}}},
                        RowSet::span(kP + kU, kN),
                        false};
    run(*m, r, plan);
    const auto& c = m->config();
    for (int l = 0; l < t.layers; ++l) {
      const RowCount want = predicted_rows(plan, l);
      const Work& w = r.work[l];
      EXPECT_EQ(w.rows_of(Op::attention), want.recomputed) << l;
      EXPECT_EQ(w.rows_of(Op::v) - w.rows_of(Op::attention), want.value_only) << l;
      for (const Op op : {Op::q, Op::k, Op::attention_out}) {
        EXPECT_EQ(w.rows_of(op), want.recomputed) << l;
      }
      const int64_t ffns = t.moe() ? t.top_k : 1, experts = t.moe() ? t.experts : 0;
      for (const Op op : {Op::gate, Op::up, Op::down}) {
        EXPECT_EQ(w.rows_of(op), ffns * want.recomputed) << l;
      }
      EXPECT_EQ(w.rows_of(Op::router), t.moe() ? want.recomputed : 0) << l;
      const int64_t q = c.q_width(), kv = c.kv_width(), e = c.dim, rows = want.recomputed;
      EXPECT_EQ(w.flops, 2 * rows * (2 * e * q + 2 * e * kv + (3 * ffns * c.ffn + experts) * e) +
                             2 * want.value_only * e * kv + 4 * rows * kN * q);
    }
    EXPECT_EQ(r.work[t.layers].rows_of(Op::head), kG);
    EXPECT_EQ(r.work[t.layers].flops, 2 * kG * c.dim * c.vocab);
  }
}

TEST(Forward, ABatchOfDifferentLengthsEqualsEachAlone) {
  for (const Kernels* kernels : tables_under_test(kSanitized)) {
    for (const char* family : {"llada", "llada-moe"}) {
      TinyModel t = big_enough_for_threads();
      t.qk_norm = true;
      t.family = family;
      const auto m = t.load(*kernels);
      const std::vector<std::array<int64_t, 3>> shapes = {
          {19, 6, 8}, {3, 1, 1}, {0, 40, 16}, {60, 2, 4}};
      std::vector<StepPlan> plans;
      std::vector<RequestState> together;
      std::vector<std::vector<float>> alone;
      for (size_t i = 0; i < shapes.size(); ++i) {
        const auto [p, u, g] = shapes[i];
        const int64_t n = p + u + g;
        plans.push_back(StepPlan::uniform(RowSet::span(0, n), RowSet::span(p + u, n)));
        RequestState r = m->make_request(canvas(t, 10 + static_cast<unsigned>(i), p, u, g), p, {});
        alone.push_back(run(*m, r, plans[i]));
        together.push_back(
            m->make_request(canvas(t, 10 + static_cast<unsigned>(i), p, u, g), p, {}));
      }
      for (const int threads : thinned<int>({4, 2, 1})) {
        std::vector<Pass> batch;
        for (size_t i = 0; i < shapes.size(); ++i)
          batch.push_back({&together[i], &plans[i], nullptr, {}});
        Workspace ws;
        m->forward(batch, ws, threads);
        for (size_t i = 0; i < shapes.size(); ++i) {
          const View<float> l = batch[i].logits;
          EXPECT_TRUE(same_bits({l.data, l.data + l.rows * l.cols}, alone[i]))
              << kernels->isa << " " << family << " request " << i;
        }
      }
    }
  }
}

// Which rows a select takes: those whose V moved most, ties to the lower row: a V that did not move
// has a cosine of exactly 1, however it was rounded. V of a layer-0 row depends on its token alone.
TEST_P(ForwardKv, SelectTakesTheRowsThatMoved) {
  TinyModel t;
  const auto m = t.load(bicache::kernels(), DType::f32, kv);
  const auto bytes = static_cast<size_t>(m->config().kv_width() * size_bytes(kv));
  for (const Since since : {Since::last_pass, Since::recompute}) {
    RequestState r = m->make_request(canvas(t, 5), 0, Kept::everything(kN));
    run(*m, r, StepPlan::uniform(RowSet::span(0, kN), {}));
    for (const int64_t row : {7, 21}) r.tokens[row] = (r.tokens[row] + 1) % 50;
    // A row that is recomputed writes K.
    const std::vector<std::byte> none(bytes, std::byte{0x3f});
    for (int64_t row = 0; row < kN; ++row) std::memcpy(r.cache.k(0, row), none.data(), bytes);
    const Select four{RowSet::span(0, kN), 4, since};
    run(*m, r, {{{0, {RowSet::span(0, kN), {}, {four}}}}, {}, false});
    for (int64_t row = 0; row < kN; ++row) {
      const bool taken = std::memcmp(none.data(), r.cache.k(0, row), bytes) != 0;
      EXPECT_EQ(taken, row == 0 || row == 1 || row == 7 || row == 21) << row;
    }
  }
}

// What attention reads is rounded, also in a pass that keeps nothing; and nothing else is.
TEST(Forward, KAndVAreRoundedToTheirType) {
  TinyModel t;
  const auto wide = t.load(bicache::kernels(), DType::f32, DType::f32);
  const auto half = t.load(bicache::kernels(), DType::f32, DType::bf16);
  const StepPlan plan = StepPlan::uniform(RowSet::span(0, kN), RowSet::span(kP + kU, kN));
  RequestState a = wide->make_request(canvas(t, 3), 0, Kept::everything(kN));
  RequestState b = half->make_request(canvas(t, 3), 0, Kept::everything(kN));
  const auto x = run(*wide, a, plan), y = run(*half, b, plan);
  EXPECT_FALSE(same_bits(x, y));
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], y[i], 0.2) << i;
  const int64_t width = wide->config().kv_width();
  for (int64_t row = 0; row < kN; ++row) {  // in layer 0 they depend on the token alone
    for (const auto& [from, to] : {std::pair{a.cache.k(0, row), b.cache.k(0, row)},
                                   {a.cache.v(0, row), b.cache.v(0, row)}}) {
      for (int64_t i = 0; i < width; ++i)
        EXPECT_EQ(static_cast<bf16*>(to)[i].bits, to_bf16(static_cast<float*>(from)[i]).bits);
    }
  }
  EXPECT_LT(b.cache.size_bytes(), a.cache.size_bytes());
}

TEST(Forward, KAndVFollowTheWeights) {
  TinyModel t;
  const auto& table = bicache::kernels();
  EXPECT_EQ(t.load(table, DType::f32)->kv_dtype(), DType::f32);
  EXPECT_EQ(t.load(table, DType::bf16)->kv_dtype(), DType::bf16);
  EXPECT_EQ(t.load(table, DType::f32, DType::bf16)->kv_dtype(), DType::bf16);
  EXPECT_EQ(t.load(table, DType::bf16, DType::f32)->kv_dtype(), DType::f32);
}

TEST(Forward, AnEntryThatHoldsMoreBitsThanTheModelIsAnError) {
  TinyModel t;
  const auto m = t.load(bicache::kernels(), DType::f32, DType::bf16);
  const auto& c = m->config();
  RequestState r = m->make_request(canvas(t, 6), kP, {});
  r.entry = std::make_shared<PrefixEntry>(kP, c.kv_width(), c.dim,
                                          EntryNeeds{EntryNeeds::Source::alone, t.layers, {}});
  EXPECT_THROW(run(*m, r, StepPlan::uniform(RowSet::span(kP, kN), {})), std::logic_error);
}

TEST(Forward, APlanThatReadsWhatNobodyWroteFails) {
  TinyModel t;
  const auto m = t.load();
  const RowSet suffix = RowSet::span(kP, kN), all = RowSet::span(0, kN);
  RequestState r = m->make_request(canvas(t, 6), kP, {});
  EXPECT_THROW(run(*m, r, {{{0, {suffix, suffix, {}}}}, {}, false}),
               std::invalid_argument);  // no prefix K/V
  EXPECT_THROW(run(*m, r, {{{0, {all, suffix, {}}}}, {}, false}),
               std::invalid_argument);  // no delta
  EXPECT_THROW(run(*m, r, {{{0, {all, {}, {{suffix, 1}}}}}, {}, false}),
               std::invalid_argument);  // no cached V
  EXPECT_THROW(run(*m, r, {{{0, {suffix, suffix, {}}}, {1, {all, all, {}}}}, {}, false}),
               std::invalid_argument);
}

TEST(Forward, TapShowsEveryStage) {
  TinyModel t;
  const auto m = t.load();
  RequestState r = m->make_request(canvas(t, 7), kP, {});
  const StepPlan plan = StepPlan::uniform(RowSet::span(0, kN), RowSet::span(kN - 2, kN));
  std::map<std::string, int> seen;
  Workspace ws;
  Pass pass{&r, &plan, nullptr, {}};
  m->forward({&pass, 1}, ws, 1, [&](int layer, const char* name, View<const float> values) {
    ++seen[name];
    const bool logits = std::string(name) == "logits";
    EXPECT_EQ(values.rows, logits ? 2 : kN);
    EXPECT_EQ(layer == t.layers, logits);
  });
  for (const char* name : {"residual", "q", "k", "v", "attention", "ffn"})
    EXPECT_EQ(seen[name], t.layers) << name;
  EXPECT_EQ(seen["logits"], 1);
}

// Experts see gathered rows: neither their number nor their neighbours show in a row's bits.
TEST(Forward, ExpertsGiveARowTheSameBitsInAnyCompany) {
  for (const Kernels* kernels : available_kernels()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::int8, DType::int4}) {
      TinyModel t;
      t.family = "llada-moe";
      const auto m = t.load(*kernels, dtype);
      const RowSet all = RowSet::span(0, kN), some = RowSet::of({2, 3, 11, kN - 4, kN - 1});
      RequestState r = m->make_request(canvas(t, 8), 0, Kept::everything(kN));
      const auto want = run(*m, r, StepPlan::uniform(all, all));
      const auto got = run(*m, r, StepPlan::uniform(some, some));
      const int64_t vocab = m->config().vocab;
      int64_t at = 0;
      some.for_each([&](int64_t row) {
        EXPECT_EQ(std::memcmp(got.data() + at++ * vocab, want.data() + row * vocab,
                              static_cast<size_t>(vocab) * sizeof(float)),
                  0)
            << kernels->isa << " " << name(dtype) << " row " << row;
      });
    }
  }
}

}  // namespace
}  // namespace bicache
