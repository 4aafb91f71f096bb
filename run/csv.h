#pragma once
// The csv files of a run: written a row at a time, cut on resume, read back by the names of their columns.

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "run/files.h"

// A number as the csv files have it; NaN without the sign that it may carry.
inline double unsigned_nan(double x) { return std::isnan(x) ? NAN : x; }
inline std::string decimals(double x) {
  char text[340];
  std::snprintf(text, sizeof text, "%.6f", unsigned_nan(x));
  return text;
}

// A csv file of the run, a row per step or several, steps in the first column. On resume, rows of steps after the
// checkpoint are dropped: they will be computed again. So is what a machine that stopped has left of a row.
class CsvLog {
 public:
  CsvLog(const std::string& path, const std::string& header, int keep_up_to_step) : path_(path) {
    std::string kept = header + "\n";
    const auto commas = [](const std::string& s) { return std::count(s.begin(), s.end(), ','); };
    std::ifstream before(path);
    std::string line;
    std::getline(before, line);
    while (std::getline(before, line)) {
      const bool whole = !before.eof() && commas(line) == commas(header);  // eof: without the line's end
      if (whole && std::atoi(line.c_str()) <= keep_up_to_step && keep_up_to_step > 0) kept += line + "\n";
    }
    replace_text_file(path, kept);
    file_ = std::fopen(path.c_str(), "a");
    if (!file_) throw UserError(path + ": cannot write: " + std::strerror(errno));
  }
  CsvLog(const CsvLog&) = delete;
  CsvLog& operator=(const CsvLog&) = delete;
  ~CsvLog() { std::fclose(file_); }
  template <class... Values>
  void row(const char* format, Values... values) {
    if (std::fprintf(file_, format, cell(values)...) < 0) fail();
  }
  void flush() {  // after the rows of a step
    if (std::fflush(file_) != 0) fail();
  }
  void sync() {  // before a checkpoint: it must not know of steps that the file does not have, if the machine stops
    if (::fsync(::fileno(file_)) != 0) fail();
  }

 private:
  std::string path_;
  std::FILE* file_;
  static double cell(double x) { return unsigned_nan(x); }
  template <class T>
  static T cell(T x) {
    return x;
  }
  void fail() { throw UserError(path_ + ": cannot write: " + std::strerror(errno)); }
};

// The columns of a csv file by name, as text; without rows if there is no file.
inline std::map<std::string, std::vector<std::string>> read_csv(const std::string& path) {
  std::map<std::string, std::vector<std::string>> columns;
  std::ifstream file(path);
  std::string line, cell;
  std::vector<std::string> names;
  std::getline(file, line);
  for (std::stringstream cells(line); std::getline(cells, cell, ',');) names.push_back(cell);
  while (std::getline(file, line)) {
    std::stringstream cells(line);
    for (const std::string& name : names) {
      cell.clear();
      std::getline(cells, cell, ',');
      columns[name].push_back(cell);
    }
  }
  return columns;
}

// A column of it as numbers.
inline std::vector<double> read_column(const std::string& path, const std::string& name) {
  std::vector<double> values;
  auto columns = read_csv(path);
  for (const std::string& cell : columns[name]) values.push_back(std::atof(cell.c_str()));
  return values;
}
