#pragma once
// The one table behind the settings of a run. It makes the parser, --help, the print at the start and config.json, and
// presets are rows of the same flags.

#include <CLI/CLI.hpp>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "run/command_line.h"
#include "run/settings.h"

struct Flag {
  std::string name;  // without the dashes
  std::string group;
  std::function<nlohmann::json()> get;
  std::function<void(const nlohmann::json&)> set;
};

// The parser of a program and the table behind its flags. CLI11 does the parsing.
class Flags {
 public:
  CLI::App app;
  std::vector<Flag> table;

  Flags(const std::string& description, const std::string& program) : app(description, program) {
    app.get_formatter()->column_width(34);
    app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  }

  void group(const std::string& name) { group_ = name; }

  template <class T>
  CLI::Option* add(const std::string& name, T& value, const std::string& help) {
    table.push_back({name, group_, [&value] { return nlohmann::json(value); },
                     [&value, name](const nlohmann::json& j) { value = number<T>(name, j); }});
    return app.add_option("--" + name, value, help)->group(group_)->capture_default_str();
  }
  // Up to 2^64 - 1. What does not fit is refused, where CLI11 would take something else for it.
  CLI::Option* add(const std::string& name, uint64_t& value, const std::string& help) {
    table.push_back({name, group_, [&value] { return nlohmann::json(value); },
                     [&value, name](const nlohmann::json& j) { value = number<uint64_t>(name, j); }});
    auto read = [&value, name](const std::string& text) {
      errno = 0;
      const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
      const uint64_t number = std::strtoull(text.c_str(), nullptr, 10);
      if (!digits || errno)
        throw UserError("--" + name + " " + text + ": must be a whole number from 0 to 18446744073709551615");
      value = number;
    };
    return app.add_option_function<std::string>("--" + name, read, help)
        ->group(group_)
        ->type_name("UINT")
        ->default_str(std::to_string(value));
  }
  // What only the command line gives: files get and set something else in its place.
  template <class T, class Get, class Set>
  CLI::Option* add(const std::string& name, std::optional<T>& value, const std::string& help, Get get, Set set) {
    table.push_back({name, group_, [get] { return nlohmann::json(get()); },
                     [set, name](const nlohmann::json& j) { set(number<T>(name, j)); }});
    return app.add_option("--" + name, value, help)->group(group_);
  }
  CLI::Option* add(const std::string& name, std::string& value, const std::string& help) {
    table.push_back({name, group_, [&value] { return nlohmann::json(value); },
                     [&value](const nlohmann::json& j) { value = j.get<std::string>(); }});
    return app.add_option("--" + name, value, help)->group(group_)->capture_default_str();
  }
  CLI::Option* add(const std::string& name, bool& value, const std::string& help) {
    table.push_back({name, group_, [&value] { return nlohmann::json(value); },
                     [&value](const nlohmann::json& j) { value = j.get<bool>(); }});
    return app.add_flag("--" + name + ",!--no-" + name, value, help)->group(group_);
  }
  // One of several words; word i stands for value i of the enumeration.
  template <class Enum>
  void add_choice(const std::string& name, Enum& value, const std::vector<std::string>& words,
                  const std::string& help) {
    std::string all;
    for (const std::string& word : words) all += (all.empty() ? "" : "|") + word;
    auto choose = [&value, words, name, all](const std::string& word) {
      const auto found = std::find(words.begin(), words.end(), word);
      if (found == words.end()) throw UserError("--" + name + " " + word + ": must be one of " + all);
      value = Enum(found - words.begin());
    };
    table.push_back({name, group_, [&value, words] { return nlohmann::json(words[int(value)]); },
                     [choose](const nlohmann::json& j) { choose(j.get<std::string>()); }});
    app.add_option_function<std::string>("--" + name, choose, help)
        ->group(group_)
        ->type_name(all)
        ->default_str(words[int(value)]);
  }

  void parse(const std::vector<std::string>& args) { parse_command_line(app, args); }

 private:
  std::string group_;

  template <class T>
  static T number(const std::string& name, const nlohmann::json& j) {
    const bool whole = j.is_number_integer() && nlohmann::json(j.get<T>()) == j;
    if (!(std::is_integral_v<T> ? whole : j.is_number()))
      throw UserError("--" + name + " " + j.dump() + ": not such a number");
    return j.get<T>();
  }
};

// `rotary` takes what the command line says of R; files hold R itself, and its share for the reader.
void add_model_flags(Flags& f, Config& c, RotaryRequest& rotary);
