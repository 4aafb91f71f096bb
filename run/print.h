// Numbers, durations, text of others and curves, as a terminal shows them.
#pragma once
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

// One number through a pattern of printf.
inline std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

// 1234567 -> "1,234,567".
inline std::string grouped(size_t n) {
  std::string text = std::to_string(n);
  for (size_t at = text.size(); at > 3; at -= 3) text.insert(at - 3, ",");
  return text;
}

// 49152 -> "48 KiB"; four digits, binary units.
inline std::string human_bytes(size_t bytes) {
  static const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = double(bytes);
  int unit = 0;
  while (value >= 1023.95 && unit < 5) value /= 1024, ++unit;
  char text[32];
  std::snprintf(text, sizeof text, "%.4g %s", value, units[unit]);
  return text;
}

// 9437 -> "9.44k", 4620000 -> "4.62M"; three digits.
inline std::string metric(double x) {
  static const char* units[] = {"", "k", "M", "G"};
  int unit = 0;
  while (x >= 999.5 && unit < 3) x /= 1000, ++unit;
  return format(x < 9.995 ? "%.2f" : x < 99.95 ? "%.1f" : "%.0f", x) + units[unit];
}

// Columns of the terminal that standard output is; 100 for a file.
inline int terminal_width() {
  winsize size{};
  return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 100;
}

// Text in lines of at most `width` columns. Long lines are broken between words, and go on with the indent that they
// begin with; one with tabs, the row of a table, is broken at these only, so that its columns stay below each other.
// Tabs take no room. UTF-8; the ANSI sequences of colours take no room either.
inline std::string fit(const std::string& text, size_t width) {
  auto columns = [](const std::string& s) {
    size_t n = 0;
    for (size_t i = 0; i < s.size(); ++i) {
      if (s[i] == '\033') i = std::min(s.find('m', i), s.size());
      else n += s[i] != '\t' && (s[i] & 0xc0) != 0x80;
    }
    return n;
  };
  std::string out;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    const bool row = line.find('\t') != std::string::npos;
    const std::string indent(std::min(line.find_first_not_of(' '), line.size()) + 2 * row, ' ');
    std::string fitted;
    size_t used = 0;
    for (size_t at = 0; at < line.size();) {  // a piece: a word and the gap before it, or a cell of a row
      const size_t word = row ? at + (line[at] == '\t') : line.find_first_not_of(' ', at);
      size_t next = std::min(line.find(row ? '\t' : ' ', std::min(word, line.size())), line.size());
      std::string piece = line.substr(at, next - at);
      piece.erase(std::remove(piece.begin(), piece.end(), '\t'), piece.end());
      if (used && used + columns(piece) > width) {
        fitted += "\n" + indent;
        used = indent.size();
        if (!row) piece = piece.substr(std::min(piece.find_first_not_of(' '), piece.size()));
      }
      fitted += piece;
      used += columns(piece);
      at = next;
    }
    out += fitted;
    if (end < text.size()) out += "\n";
    begin = end + 1;
  }
  return out;
}

// 75 -> "1:15", 3700 -> "1:01:40".
inline std::string duration_text(double seconds) {
  const long s = std::lround(std::max(0.0, seconds));
  char text[32];
  if (s < 3600)
    std::snprintf(text, sizeof text, "%ld:%02ld", s / 60, s % 60);
  else
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  return text;
}

// Takes UTF-8 from the front of `bytes`; what is none becomes U+FFFD. The beginning of a character that may still go on
// stays there, unless this is the `end`.
inline std::string take_utf8(std::string& bytes, bool end) {
  std::string text;
  size_t at = 0;
  while (at < bytes.size()) {
    const unsigned char first = bytes[at];
    const size_t length = first < 0x80 ? 1 : first >= 0xc2 && first < 0xe0 ? 2 : first >= 0xe0 && first < 0xf0 ? 3
                          : first >= 0xf0 && first < 0xf5 ? 4 : 0;
    size_t n = length > 0;
    for (; n < length && at + n < bytes.size(); ++n) {
      const unsigned char next = bytes[at + n];
      // Some second bytes would mean a character that has a shorter form, a surrogate, or one above U+10FFFF.
      const unsigned char low = n > 1 ? 0x80 : first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80,
                          high = n > 1 ? 0xbf : first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
      if (next < low || next > high) break;
    }
    if (n < length && at + n == bytes.size() && !end) break;
    const bool whole = n && n == length;
    text += whole ? bytes.substr(at, n) : "\xef\xbf\xbd";
    at += n ? n : 1;
  }
  bytes.erase(0, at);
  return text;
}

// A model may say any byte; a terminal should not obey them. Control bytes become '?', what is no UTF-8 U+FFFD.
inline std::string printable(std::string text) {
  text = take_utf8(text, true);
  for (char& c : text)
    if ((static_cast<unsigned char>(c) < 32 && c != '\n' && c != '\t') || c == 127) c = '?';
  return text;
}

// The loss over the steps as a picture of text: a column per stretch of steps, its mean as a dot; the floor as a line.
// The axis is logarithmic: most of a run happens near its end.
inline void print_curve(const std::vector<double>& steps, const std::vector<double>& losses, double floor) {
  const int width = 42, height = 12;
  if (losses.size() < 2) return;
  std::vector<double> sum(width), count(width);
  for (size_t i = 0; i < losses.size(); ++i) {
    const size_t column = i * width / losses.size();
    sum[column] += losses[i];
    count[column] += 1;
  }
  double high = -INFINITY, low = std::isnan(floor) ? INFINITY : floor;
  for (int x = 0; x < width; ++x)
    if (count[x]) high = std::max(high, sum[x] / count[x]), low = std::min(low, sum[x] / count[x]);
  if (!(low > 0 && high > low)) return;
  const double range = std::log(high / low);
  auto line_of = [&](double value) { return int(std::lround(std::log(high / value) / range * (height - 1))); };
  std::printf("\n  training loss, nats per token\n");
  for (int y = 0; y < height; ++y) {
    std::string line(width, !std::isnan(floor) && line_of(floor) == y ? '.' : ' ');
    for (int x = 0; x < width; ++x)
      if (count[x] && line_of(sum[x] / count[x]) == y) line[x] = '*';
    std::printf("  %6.2f |%s%s\n", high * std::exp(-range * y / (height - 1)), line.c_str(),
                !std::isnan(floor) && line_of(floor) == y ? " floor" : "");
  }
  std::printf("         +%s\n          step %-10.0f%*s%.0f\n\n", std::string(width, '-').c_str(), steps.front(),
              width - 22, "", steps.back());
}
