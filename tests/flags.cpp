// flags.h: how presets, files and the command line settle R.

#include "run/settings.h"

#include "tests/helpers.h"

namespace {

// The settings of a preset with flags on top.
Settings settled(const std::string& preset, const std::vector<std::string>& flags = {}) {
  Settings s;
  apply_flags(s, preset_flags(preset));
  apply_flags(s, flags);
  if (s.model.vocab == 0) s.model.vocab = 264;
  resolve_settings(s);
  return s;
}
int R_of(const std::string& preset, const std::vector<std::string>& flags = {}) {
  return settled(preset, flags).model.rotary_dim;
}

}  // namespace

TEST_CASE("flags: every preset has an R: a tenth of the head unless it says another share, or the program has its own") {
  for (const auto& [name, flags] : presets()) {
    CAPTURE(name);
    const int HS = settled(name).model.head_size;
    const bool pythia = name.rfind("pythia", 0) == 0;
    CHECK(R_of(name) == kRotaryDim.value_or(rotary_dim_from_fraction(pythia ? 0.25 : 0.1, HS)));
  }
}

TEST_CASE("flags: R on the command line overrides the preset's, whichever way it is said") {
  const int R = kRotaryDim.value_or(8);
  const std::string dim = "--rotary-dim=" + std::to_string(R), share = "--rotary-fraction=" + std::to_string(R / 64.0),
                    other = "--rotary-dim=" + std::to_string(R + 2);
  CHECK(R_of("pythia-70m", {dim}) == R);
  CHECK(R_of("pythia-70m", {share}) == R);
  CHECK(R_of("pythia-70m", {dim, share}) == R);
  CHECK(R_of("pythia-70m", {other, dim}) == R);  // the last of a flag counts
  CHECK(contains(error_of([&] { R_of("pythia-70m", {other, share}); }), kRotaryDim ? "was built for" : "disagree"));
  if (kRotaryDim) CHECK(contains(error_of([&] { R_of("nano", {other}); }), "was built for"));
  if (!kRotaryDim) CHECK(R_of("nano", {"--rotary-fraction=0"}) == 0);
}

TEST_CASE("flags: files hold R and its share; R counts when they are read, and a flag overrides it") {
  const int R = kRotaryDim.value_or(8);
  Settings s = settled("nano", {"--rotary-dim=" + std::to_string(R), "--lanes=4"});
  const nlohmann::ordered_json json = settings_json(s);
  nlohmann::ordered_json older = json;
  older.erase("lanes");
  CHECK(settings_from_json("there", older).lanes == 1);  // a run of before there were several
  CHECK(json["rotary_dim"] == R);
  CHECK(json["rotary_fraction"] == R / 32.0);
  nlohmann::ordered_json changed = json;
  changed["rotary_fraction"] = 0.9;
  Settings again = settings_from_json("there", changed);
  resolve_settings(again);
  CHECK(again.model.rotary_dim == R);
  CHECK(settings_json(again) == json);
  apply_flags(again, {"--rotary-fraction=1"});
  if (!kRotaryDim) {
    resolve_settings(again);
    CHECK(again.model.rotary_dim == 32);
  } else {
    CHECK(contains(error_of([&] { resolve_settings(again); }), "was built for"));
  }
  changed["rotary_dim"] = 7.5;
  CHECK(contains(error_of([&] { settings_from_json("there", changed); }), "--rotary-dim 7.5: not such a number"));
}

TEST_CASE("flags: a soft cap that fp32 could not tell from none, or from one of 0, is refused") {
  CHECK(settled("nano", {"--attention-softcap=50"}).model.attention_softcap == 50);
  for (const char* cap : {"-1", "0.001", "1e5", "inf", "nan"})
    CHECK(contains(error_of([&] { settled("nano", {std::string("--attention-softcap=") + cap}); }),
                   "must be a number from 0.01 to 10000, or 0 for none"));
}
