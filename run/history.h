#pragma once
// history.json of a run: which settings and which data held from which step on. A run that is extended, or that goes on
// with other data, adds to it; so each step can be repeated as it was.

#include <string>
#include <vector>

#include "run/settings.h"

struct Stretch {
  int from = 0;  // steps that were done before it
  Settings s;
  std::string train, val;  // fingerprints of the data; empty: unknown
};

// One stretch for a run from before there was such a file. UserError if the file is none.
inline std::vector<Stretch> read_history(const std::string& directory) {
  const std::string path = directory + "/history.json", config = directory + "/config.json";
  if (!std::filesystem::exists(path)) return {{0, settings_from_json(config, read_json_file(config)), "", ""}};
  std::vector<Stretch> history;
  try {
    for (const nlohmann::json& json : read_json_file(path))
      history.push_back({json.at("steps_before").get<int>(), settings_from_json(path, json.at("settings")),
                         json.at("train_data").get<std::string>(), json.at("val_data").get<std::string>()});
  } catch (const nlohmann::json::exception& e) {
    throw UserError(path + ": not a run's history: " + e.what());
  }
  if (history.empty() || history[0].from != 0) throw UserError(path + ": not a run's history: its beginning is missing");
  return history;
}

inline void write_history(const std::string& directory, std::vector<Stretch>& history) {
  nlohmann::ordered_json json;
  for (Stretch& stretch : history)
    json.push_back({{"steps_before", stretch.from},
                    {"train_data", stretch.train},
                    {"val_data", stretch.val},
                    {"settings", settings_json(stretch.s)}});
  replace_text_file(directory + "/history.json", json.dump(2) + "\n");
}

// The stretch that the step after `done` steps is in.
inline const Stretch& stretch_of(const std::vector<Stretch>& history, int done) {
  size_t i = history.size() - 1;
  while (i > 0 && history[i].from > done) --i;
  return history[i];
}
