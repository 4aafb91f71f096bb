#pragma once
// Parsing a command line. CLI11 does it; this says what is wrong in one line, and what was probably meant.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "run/error.h"

// The closest of some words to a mistyped one (fewest letters inserted, deleted or changed), or "" if none is close.
inline std::string closest(const std::string& word, const std::vector<std::string>& known) {
  std::string best;
  size_t best_distance = word.size() / 2 + 1;
  for (const std::string& candidate : known) {
    std::vector<size_t> row(candidate.size() + 1);
    for (size_t j = 0; j < row.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= word.size(); ++i) {
      size_t diagonal = row[0]++;
      for (size_t j = 1; j < row.size(); ++j) {
        const size_t change = diagonal + (word[i - 1] != candidate[j - 1]);
        diagonal = row[j];
        row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
      }
    }
    if (row.back() < best_distance) best_distance = row.back(), best = candidate;
  }
  return best;
}

inline std::string version_text() {
  std::string text = "partial-rope 1.0, " +
#ifdef __CUDACC__
                     std::string("for the CPU and CUDA ") + std::to_string(__CUDACC_VER_MAJOR__) + "." +
                     std::to_string(__CUDACC_VER_MINOR__);
#else
                     std::string("for the CPU");
#endif
  return text + ", compiler " + __VERSION__;
}

// --help and --version print and end the program; a mistake is a UserError.
inline void parse_command_line(CLI::App& app, std::vector<std::string> args) {
  app.set_version_flag("--version", version_text(), "what was built, and with what");
  std::reverse(args.begin(), args.end());  // as CLI11 wants them
  try {
    app.parse(args);
  } catch (const CLI::Success& e) {
    app.exit(e);
    std::cout.flush();
    flush_output();
    std::exit(0);
  } catch (const CLI::ExtrasError&) {
    const std::string word = app.remaining(true).front();
    std::vector<std::string> known;
    const CLI::App* active = app.get_subcommands().empty() ? &app : app.get_subcommands().front();
    for (const CLI::Option* option : active->get_options()) known.push_back(option->get_name());
    for (const CLI::App* command : app.get_subcommands({})) known.push_back(command->get_name());
    const std::string guess = closest(word.substr(0, word.find('=')), known);
    throw UserError("unknown flag " + word + (guess.empty() ? "; --help lists them" : "; did you mean " + guess + "?"));
  } catch (const CLI::ParseError& e) {
    std::string message = e.what();
    throw UserError(message.substr(0, message.find('\n')) + "; see --help");
  }
}
