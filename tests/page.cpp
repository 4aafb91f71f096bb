// Tests of eval/trace_page.h and run/report.h: what the pages hold, and that no text in them becomes anything else. How
// they look and move in a browser: tests/page.py.
#include "eval/trace_page.h"

#include <regex>

#include "run/flags.h"
#include "run/report.h"
#include "tests/helpers.h"

namespace {

// Texts that would break out of a page, turn it around, or be no text.
const std::vector<std::string> hostile = {"</script><img src=x onerror=alert(1)>", "<!--<script>", "\"\\&amp;'",
                                          "\xe2\x80\xae\xe2\x80\xa8", "\xff\xfe\xc3", std::string("\0\n\x1b[31m", 7)};

struct HostileTokenizer : Tokenizer {
  std::string name() const override { return "hostile"; }
  int vocabulary() const override { return int(hostile.size()) + 1; }
  int end_of_text() const override { return int(hostile.size()); }
  void encode(const char*, size_t, std::vector<int>&) const override {}
  void decode(int token, std::string& text) const override { text += hostile[token]; }
};

Config small_config() {
  Config c;
  c.layers = 2, c.width = 48, c.heads = 4, c.kv_heads = 2, c.head_size = 12, c.mlp_hidden = 64, c.context = 24,
  c.vocab = 264, c.rotary_dim = kRotaryDim.value_or(4), c.qk_norm = true;
  if (!kRotaryDim) c.rotary_layers = "2,4", c.rope_scaling = "yarn:4,24";
  resolve(c);
  return c;
}

// As the page does it.
std::vector<double> unpacked(const nlohmann::json& packed) {
  const std::string text = packed["text"];
  auto digit = [&](size_t i) { return text[i] - 35 - (text[i] > 60) - (text[i] > 92); };
  std::vector<double> values(text.size() / 3);
  const size_t columns = values.size() / packed["scale"].size();
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = packed["scale"][i / columns].get<double>() *
                ((digit(3 * i) * 8100 + digit(3 * i + 1) * 90 + digit(3 * i + 2)) / 364499.0 - 1);
  return values;
}

std::string page_data(const std::string& page) {
  const std::string begin = "id=\"numbers\">";
  const size_t at = page.find(begin) + begin.size();
  return page.substr(at, page.find("</script>", at) - at);
}

}  // namespace

TEST_CASE("packed: every number within half a step of its row's scale, in characters that nothing escapes") {
  std::vector<float> values = random_values<float>(6 * 50, 1);
  for (int i = 0; i < 50; ++i) values[50 + i] = 0, values[100 + i] *= 1e-20f, values[150 + i] *= 1e20f;
  values[200] = 7, values[201] = -7;
  const nlohmann::json object = packed(values.data(), 5, 50, 50);
  const std::vector<double> back = unpacked(object);
  REQUIRE(back.size() == 250);
  for (size_t i = 0; i < back.size(); ++i) {
    const double scale = object["scale"][i / 50];
    CHECK(std::fabs(values[i]) <= scale);
    CHECK(std::fabs(back[i] - values[i]) <= 0.5 / 364499 * scale * (1 + 1e-9));
  }
  CHECK(back[60] == 0);
  const std::string text = object["text"];
  for (char c : text) CHECK((c > ' ' && c < 127 && c != '"' && c != '\\' && c != '<'));
  const float nothing[2] = {NAN, INFINITY};
  for (double x : unpacked(packed(nothing, 1, 2, 2))) CHECK(x == 0);
  // Rows that lie apart.
  CHECK(unpacked(packed(values.data() + 3, 2, 4, 200)).back() == doctest::Approx(values[206]).epsilon(1e-4));
}

TEST_CASE("page: heads of every layer before RoPE, the model's log-sum-exps, its table") {
  const Config c = small_config();
  Cpu cpu;
  Model<Cpu, float> model(cpu, c, 1, c.context, false);
  const std::vector<float> weights = random_values<float>(model.table.total, 2, 0.3);
  model.set_weights(weights.data());
  const std::vector<int> tokens = random_tokens(20, 257, 3);
  const Trace trace = trace_head(model, tokens, 11, 1, 3, 4);
  const ByteTokenizer tokenizer;
  const nlohmann::json object = nlohmann::json::parse(dump_json(page_json(model, trace, tokens, &tokenizer, "a run")));
  const int T = 20, HS = c.head_size;
  const nlohmann::json head_alone = trace_json(trace, c, tokens, &tokenizer);
  for (const auto& [key, value] : head_alone.items()) CHECK(object[key] == value);
  REQUIRE(object["layers"].size() == 2);
  const size_t slots = c.heads + 2 * c.kv_heads;
  for (int l = 0; l < 2; ++l) {
    const std::vector<float> before = layer_heads(model, l, T).before;
    REQUIRE(object["layers"][l]["heads"].size() == size_t(c.heads + c.kv_heads));
    for (int slot = 0; slot < c.heads + c.kv_heads; ++slot) {
      const nlohmann::json& head = object["layers"][l]["heads"][slot];
      const std::vector<double> values = unpacked(head);
      REQUIRE(values.size() == size_t(T * HS));
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < HS; ++i)
          CHECK(std::fabs(values[t * HS + i] - before[(t * slots + slot) * HS + i]) <=
                0.501 / 364499 * head["scale"][t].get<double>());
    }
    for (int h = 0; h < c.heads; ++h)
      for (int t = 0; t < T; ++t)
        CHECK(float(object["layers"][l]["lse"][h][t].get<double>()) == model.acts.blocks[l].lse[h * T + t]);
    CHECK(unpacked(object["layers"][l]["x2"]).size() == size_t(c.width));
  }
  for (int l = 0; l < 2; ++l) {
    const nlohmann::json& rope = object["ropes"][object["layers"][l]["rope"].get<size_t>()];
    CHECK(rope["rotary_dim"] == model.rope[l].R);
    CHECK(rope["theta"] == c.angles(model.rope[l].R).theta);
    REQUIRE(rope["cos_sin"].size() == size_t(T * model.rope[l].R));
    for (int i = 0; i < T * model.rope[l].R; ++i)
      CHECK(float(rope["cos_sin"][i].get<double>()) == model.rope[l].cos_sin[i]);
  }
  CHECK(object["next"].size() == 5);
  CHECK(object["next"][0]["probability"] >= object["next"][1]["probability"]);
  // 1 GiB at 1 M positions for 256 channels, 104 MiB for 26 of them; a KV cache of 16 layers, 8 heads, 256 channels.
  const nlohmann::json& pythia = object["bytes"][2];
  CHECK(pythia["name"] == "Pythia 1B");
  CHECK(pythia["table"][3] == nlohmann::json{1 << 20, 104 << 20, 1 << 30});
  CHECK(pythia["kv_cache"] == 128 << 10);
  if (!kRotaryDim) CHECK(object["bytes"][0]["table"][3][1] == (2 + 4) * 4 << 20);  // a table for each R
}

TEST_CASE("page: hostile text stays text") {
  Config c = small_config();
  c.vocab = 16;
  Cpu cpu;
  Model<Cpu, float> model(cpu, c, 1, 6, false);
  model.initialise_weights(1);
  const std::vector<int> tokens = {0, 1, 2, 3, 4, 5};
  const HostileTokenizer tokenizer;
  const Trace trace = trace_head(model, tokens, 5, 0, 0, -1);
  const std::string page = trace_page(page_json(model, trace, tokens, &tokenizer, "<b>\xff" + hostile[0])),
                    data = page_data(page);
  for (char letter : data) CHECK((letter >= ' ' && letter < 127 && letter != '<'));
  const nlohmann::json object = nlohmann::json::parse(data);
  for (int t : {0, 1, 2, 3, 5}) CHECK(object["texts"][t] == hostile[t]);
  CHECK(object["texts"][4] == "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
  CHECK(object["name"] == "<b>\xef\xbf\xbd" + hostile[0]);
  // All else is page.html.
  const std::string mark = "{\"the numbers\": \"stand here\"}";
  std::string without = page;
  without.replace(page.find(data), data.size(), mark);
  CHECK(without == std::string(kPage));
}

TEST_CASE("page: under 1 MB for `small` with 60 tokens; a run's own text is as long as fits") {
  Settings s;
  apply_flags(s, preset_flags("small"));
  s.model.vocab = 264;
  resolve_settings(s);
  Cpu cpu;
  Model<Cpu, float> model(cpu, s.model, 1, 60, false);
  model.initialise_weights(1);
  const std::vector<int> tokens = random_tokens(60, 257, 4);
  const ByteTokenizer tokenizer;
  const Trace trace = trace_head(model, tokens, 59, 0, 0, -1);
  CHECK(trace_page(page_json(model, trace, tokens, &tokenizer, "small")).size() < 1'000'000);
  CHECK(page_length(s.model) == 54);
  s.model.context = 8;
  CHECK(page_length(s.model) == 8);
}

TEST_CASE("page: the functions that it names stand in the files that it names") {
  const std::string page = read_text_file("eval/page.html");
  const std::regex call("code(?:_name)?\\(\"([a-z.]+)\",([^)]*)\\)"), name("\"(\\w+)\"");
  std::set<std::string> found;
  for (std::sregex_iterator at(page.begin(), page.end(), call), end; at != end; ++at) {
    const std::string file = (*at)[1], names = (*at)[2], text = read_text_file(file);
    for (std::sregex_iterator n(names.begin(), names.end(), name); n != end; ++n) {
      const std::string function = (*n)[1];
      if (function == "swiglu") continue;  // a value that the page compares with
      CHECK_MESSAGE(std::regex_search(text, std::regex("void " + function + "\\(")), file << ": " << function);
      found.insert(function);
    }
  }
  CHECK(found.size() >= 11);
  CHECK(found.count("rope_rotate_head"));
}

TEST_CASE("report: plots of what the csv files hold; text of others is escaped") {
  const TemporaryDirectory run;
  std::string log = "step,tokens,loss,lr,grad_norm,tokens_per_second,log_z\n", val = "step,tokens,val_loss\n",
              layers = "step,layer,head,max_logit,entropy,q_rms,k_rms,residual_rms\n";
  for (int step = 1; step <= 2000; ++step)
    log += std::to_string(step) + ",0," + (step == 7 ? "nan" : format("%.4f", 1 + 4.0 / step)) + ",0.001," +
           format("%.3f", 2.0 + step % 3) + ",1,0\n";
  for (int step : {1000, 2000}) {
    val += std::to_string(step) + ",0,1.5\n";
    for (int layer : {0, 1})
      for (int head : {0, 1})
        layers += std::to_string(step) + format(",%.0f", layer) + format(",%.0f", head) + ",3,1,1,1,1\n";
  }
  write_text_file(run / "log.csv", log), write_text_file(run / "val.csv", val);
  write_text_file(run / "spikes.csv", "step,loss,z_score,micro_batch\n12,9,8,7\n");
  write_text_file(run / "config.json", R"({"clip": 1.0, "data": "</table><script>alert(1)</script>&"})");
  write_text_file(run / "summary.json", R"({"steps": 2000, "tokens": 64000, "val_loss": 1.5, "floor": 1.2,
    "rotary_dim": 4, "head_size": 32, "parameters": 1000000, "clip_rate": 0.25})");
  auto count = [](const std::string& text, const std::string& part) {
    size_t n = 0;
    for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
    return n;
  };
  std::string page = report_html(run.path);
  CHECK(count(page, "<figure>") == 3);
  CHECK(count(page, "class='line'") == 4);
  CHECK(count(page, "class='level'") == 2);  // the floor, the clipping
  CHECK(contains(page, "25.0 % above the floor"));
  CHECK(contains(page, "25.0 % of the steps"));
  CHECK(contains(page, "4 of 32 channels"));
  CHECK(!contains(page, "<script"));
  CHECK(contains(page, "&lt;/table&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;"));
  CHECK(!contains(page, "nan"));
  write_text_file(run / "layers.csv", layers);
  page = report_html(run.path);
  CHECK(count(page, "<figure>") == 7);
  CHECK(count(page, "class='line'") == 4 + 4 * 2);
  CHECK(page.size() < 200'000);  // long runs are drawn as means
}
