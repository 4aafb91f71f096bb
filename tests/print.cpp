// What a terminal shows: numbers, and text that may be anything.
#include "run/print.h"

#include <doctest/doctest.h>

#include <cstring>

TEST_CASE("print: three digits with a unit, durations") {
  CHECK(metric(0) == "0.00");
  CHECK(metric(9.437) == "9.44");
  CHECK(metric(999.4) == "999");
  CHECK(metric(999.6) == "1.00k");
  CHECK(metric(9437) == "9.44k");
  CHECK(metric(4.62e6) == "4.62M");
  CHECK(metric(99990) == "100k");
  CHECK(duration_text(75) == "1:15");
  CHECK(duration_text(3700) == "1:01:40");
}

TEST_CASE("print: what is no UTF-8 becomes U+FFFD, and a character waits for its last byte") {
  const std::string bad = "\xef\xbf\xbd";
  // The table of well-formed sequences in the Unicode standard (3.9), its bounds and their neighbours.
  for (const char* good : {"a", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80", "\xef\xbf\xbf",
                           "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    CHECK(printable(good) == good);
    std::string bytes, text;
    for (const char* c = good; *c; ++c) {
      bytes += *c;
      text += take_utf8(bytes, false);
      CHECK(text == (c[1] ? "" : good));
    }
    bytes = std::string(good).substr(0, std::strlen(good) - 1);
    CHECK(take_utf8(bytes, true) == (std::strlen(good) > 1 ? bad : ""));
  }
  CHECK(printable("\x80") == bad);
  CHECK(printable("\xc0\xaf") == bad + bad);
  CHECK(printable("\xc1\xbf") == bad + bad);
  CHECK(printable("\xe0\x9f\x80") == bad + bad + bad);
  CHECK(printable("\xed\xa0\x80") == bad + bad + bad);
  CHECK(printable("\xf0\x8f\x80\x80") == bad + bad + bad + bad);
  CHECK(printable("\xf4\x90\x80\x80") == bad + bad + bad + bad);
  CHECK(printable("\xf5") == bad);
  CHECK(printable("a\xe2\x82z") == "a" + bad + "z");
  CHECK(printable("\x1b[31m\x7f\t\n") == "?[31m?\t\n");
}

TEST_CASE("print: lines fit, words stay whole, columns stay below each other") {
  CHECK(fit("  one two three four\nshort\n", 12) == "  one two\n  three four\nshort\n");
  CHECK(fit("a  b", 80) == "a  b");
  CHECK(fit("\n\na\n", 10) == "\n\na\n");
  CHECK(fit("", 10) == "");
  CHECK(fit("ab\033[1mcd\033[0m ef", 7) == "ab\033[1mcd\033[0m ef");  // 7 columns
  CHECK(fit("→→→ →→→", 7) == "→→→ →→→");
  CHECK(fit("→→→ →→→", 6) == "→→→\n→→→");
  CHECK(fit(" name\t  size\n x   \t    12\n", 80) == " name  size\n x       12\n");
  CHECK(fit(" name\t  size\n x   \t    12\n", 8) == " name\n     size\n x   \n       12\n");
}
