// Who may include whom: the layout of the tree as a table, held against every #include "..." in it.

#include <regex>

#include "tests/helpers.h"

namespace {

using Names = std::vector<std::string>;                           // of files, or of folders with their slash
using Includes = std::map<std::string, std::vector<std::string>>;  // file -> what it includes

Names operator+(Names a, const Names& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// From the bottom to the top. The first row that fits a file counts. No row names a program on its right.
const std::vector<std::pair<Names, Names>>& layout() {
  static const Names ground = {"run/error.h",  "run/files.h",        "run/print.h",
                               "run/random.h", "run/command_line.h", "run/program.h"},
                     operations = {"rope.cuh", "attention.cuh", "layers.cuh", "norms.cuh", "loss.cuh", "optimizer.cuh"},
                     model = Names{"device/", "model.h"} + operations,
                     run = model + Names{"text/", "run/"};
  static const std::vector<std::pair<Names, Names>> rows = {
      {ground, ground},
      {{"device/"}, {"device/", "run/error.h"}},
      {{"text/"}, Names{"text/"} + ground},
      {{"rope.cuh", "norms.cuh", "optimizer.cuh"}, {"device/"}},
      {{"attention.cuh", "layers.cuh"}, {"device/", "rope.cuh"}},
      {{"loss.cuh"}, {"device/", "layers.cuh"}},
      {{"model.h"}, Names{"device/", "run/random.h"} + operations},
      {{"run/"}, run},
      {{"eval/"}, run + Names{"eval/", "python.h", "page.h"}},  // python.h, page.h: made by the Makefile
      {{"data.cpp"}, Names{"text/"} + ground},
      {{"train.cu", "eval.cpp"}, run + Names{"eval/"}},
      {{"tests/"}, run + Names{"eval/", "tests/"}},
      {{"bench/"}, run + Names{"bench/"}},
      {{"notebooks/"}, model},
  };
  return rows;
}

bool fits(const std::string& file, const Names& names) {
  for (const std::string& name : names)
    if (file == name || (name.back() == '/' && file.rfind(name, 0) == 0)) return true;
  return false;
}

// What is against the layout: a line each.
Names offences(Includes includes) {
  Names found;
  for (const auto& [file, included] : includes) {
    const auto row = std::find_if(layout().begin(), layout().end(),
                                  [&, name = &file](const auto& r) { return fits(*name, r.first); });
    if (row == layout().end()) found.push_back(file + ": has no place in the layout");
    for (const std::string& other : included)
      if (row != layout().end() && !fits(other, row->second)) found.push_back(file + ": may not include " + other);
  }
  // Take away, again and again, the files that include none of those that are left, or that none of them includes: what
  // stays is circles, and what lies between two of them.
  for (bool smaller = true; smaller;) {
    smaller = false;
    for (auto at = includes.begin(); at != includes.end();) {
      bool leaf = true, root = true;
      for (const std::string& other : at->second) leaf = leaf && !includes.count(other);
      for (const auto& [file, included] : includes)
        root = root && std::find(included.begin(), included.end(), at->first) == included.end();
      smaller = smaller || leaf || root;
      at = leaf || root ? includes.erase(at) : std::next(at);
    }
  }
  for (const auto& [file, included] : includes) found.push_back(file + ": is in a circle of includes");
  return found;
}

Includes includes_of_the_tree() {
  static const std::regex line_of_include("^\\s*#\\s*include\\s*\"([^\"]+)\"");
  Includes includes;
  for (const char* folder : {".", "device", "text", "run", "eval", "tests", "bench", "notebooks"})
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      const std::string kind = entry.path().extension();
      if (kind != ".h" && kind != ".cuh" && kind != ".cu" && kind != ".cpp") continue;
      auto& included = includes[entry.path().lexically_normal()];
      std::ifstream file(entry.path());
      std::smatch match;
      for (std::string line; std::getline(file, line);)
        if (std::regex_search(line, match, line_of_include)) included.push_back(match[1]);
    }
  return includes;
}

}  // namespace

TEST_CASE("includes: as the layout has them, and none in a circle") {
  const Includes includes = includes_of_the_tree();
  CHECK(includes.at("model.h").size() >= 5);  // that lines of includes are found
  for (const std::string& offence : offences(includes)) FAIL_CHECK(offence);
}

TEST_CASE("includes: what is against the layout is found") {
  CHECK(offences({{"model.h", {"rope.cuh"}}, {"rope.cuh", {"device/backend.h"}}, {"device/backend.h", {}}}).empty());
  CHECK(offences({{"rope.cuh", {"model.h"}}}) == Names{"rope.cuh: may not include model.h"});
  CHECK(offences({{"device/matmul.cuh", {"run/files.h"}}}) == Names{"device/matmul.cuh: may not include run/files.h"});
  CHECK(offences({{"text/shards.h", {"run/flags.h"}}}) == Names{"text/shards.h: may not include run/flags.h"});
  CHECK(offences({{"run/flags.h", {"eval/loss.h"}}}) == Names{"run/flags.h: may not include eval/loss.h"});
  CHECK(offences({{"tests/model.cpp", {"train.cu"}}}) == Names{"tests/model.cpp: may not include train.cu"});
  CHECK(offences({{"run/flags.h", {"command_line.h"}}}) == Names{"run/flags.h: may not include command_line.h"});
  CHECK(offences({{"words.h", {}}}) == Names{"words.h: has no place in the layout"});
  CHECK(offences({{"run/a.h", {"run/b.h"}}, {"run/b.h", {"run/c.h"}}, {"run/c.h", {"run/b.h"}}}) ==
        Names{"run/b.h: is in a circle of includes", "run/c.h: is in a circle of includes"});
}
