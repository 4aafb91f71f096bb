// stories.h: the built-in corpus, drawn from a small probabilistic grammar in which order matters.
//
// A document is a run of short lines, each one of eight kinds: who did what before whom, things passed along, lists
// and words to be repeated forwards or backwards, rows with questions about places in them, brackets to be closed in
// order, swaps. A line first draws something at random and then asks about it, and the answer follows from what stands
// earlier in the same line. So a model pays for the draws, which nobody can predict, and for every answer it misses.
//
// Every document has exactly one derivation: the draws can be read back from the text. Its probability is therefore
// the product of the probabilities of the draws, and the mean of -log p over the corpus is the lowest loss that
// any model can reach on it. tests/data.cpp has a parser that recomputes it from the text alone.
#pragma once
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// SplitMix64 (Steele, Lea, Flood 2014): 64 random bits per call, the same on every platform, unlike std:: distributions.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed) {}

  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

  // Uniform in [0, n). The bias of the multiplication is below n / 2^32, far under the precision of a reported loss.
  int below(int n) { return int(((next() >> 32) * uint64_t(n)) >> 32); }
};

// The closed vocabulary. Within a list every word has its own first letter, so that a draw is paid for in one byte.
inline const std::vector<std::string> story_names = {
    "Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim",
    "Lee", "Max", "Ned", "Oz",  "Pam", "Ray", "Sue", "Tom", "Una", "Val", "Zoe"};
inline const std::vector<std::string> story_things = {"ant", "bag", "cup", "dog", "egg", "fig", "gem", "hat",
                                                      "ink", "jar", "key", "log", "map", "net", "oar", "pen",
                                                      "rug", "saw", "tie", "urn", "van", "wax", "yam", "zip"};
inline const std::vector<std::string> story_verbs = {"ate",  "bet", "dug", "fell", "hid",  "knelt",
                                                     "left", "met", "ran", "sat",  "wept", "yawned"};
inline const std::vector<std::string> story_looks = {"big", "cold", "dry", "fat", "hot",  "icy",
                                                     "new", "old",  "red", "sad", "tall", "wet"};
inline const std::vector<std::string> story_places = {"First", "Second", "Third", "Fourth", "Fifth", "Sixth"};
inline const std::string story_brackets = "()[]{}<>";

struct Story {
  std::string text;            // printable ASCII, lines ended by '\n'; 100 to 2,000 bytes
  double log_probability = 0;  // natural log of the probability of the text and of its end

  static constexpr size_t shortest = 100, longest = 2000, longest_line = 160;
};

// Draws stories. Every random choice goes through choose(), which also counts its probability: no other function
// touches the generator, so the sum cannot forget a draw.
class Storyteller {
 public:
  explicit Storyteller(uint64_t seed) : random_(seed) {}

  // The next story. The end of the document is a draw too (1 in 8 after each line), except where it is certain:
  // no end before `shortest` bytes, none later than the length from which another line might pass `longest`.
  Story next() {
    story_ = Story();
    do line();
    while (story_.text.size() < Story::shortest ||
           (story_.text.size() <= Story::longest - Story::longest_line && choose(8) != 0));
    return std::move(story_);
  }

 private:
  Random random_;
  Story story_;

  int choose(int n) {
    story_.log_probability -= std::log(double(n));
    return random_.below(n);
  }

  // `count` different numbers below n, in the order drawn: probability 1 / (n (n-1) ... (n-count+1)).
  std::vector<int> pick(int count, int n) {
    std::vector<int> left(n), taken;
    for (int i = 0; i < n; i++) left[i] = i;
    for (int i = 0; i < count; i++) {
      int k = choose(int(left.size()));
      taken.push_back(left[k]);
      left.erase(left.begin() + k);
    }
    return taken;
  }

  std::vector<std::string> pick(int count, const std::vector<std::string>& words) {
    std::vector<std::string> taken;
    for (int i : pick(count, int(words.size()))) taken.push_back(words[i]);
    return taken;
  }

  void say(const std::string& words) { story_.text += words; }

  static std::string letter(int i) { return std::string(1, char('a' + i)); }

  static std::string join(const std::vector<std::string>& words, const std::string& between) {
    std::string all;
    for (size_t i = 0; i < words.size(); i++) all += (i ? between : "") + words[i];
    return all;
  }

  void line() {
    switch (choose(8)) {
      case 0: deeds(); break;
      case 1: passing(); break;
      case 2: list(); break;
      case 3: row(); break;
      case 4: word(); break;
      case 5: nest(); break;
      case 6: looks(); break;
      case 7: swap(); break;
    }
    say("\n");
  }

  // "Ann ran, Bob fell, Eve hid. Second? Bob. Who ran? Ann.": who did what, in which order.
  void deeds() {
    int n = 2 + choose(3);
    std::vector<std::string> who = pick(n, story_names), did = pick(n, story_verbs);
    for (int i = 0; i < n; i++) say((i ? ", " : "") + who[i] + " " + did[i]);
    say(".");
    for (int questions = 1 + choose(2); questions > 0; questions--) {
      int i = choose(n);
      if (choose(2)) say(" " + story_places[i] + "? " + who[i] + ".");
      else say(" Who " + did[i] + "? " + who[i] + ".");
    }
  }

  // "The cup went to Ann, Bob, Eve. Eve has the cup.": the last one keeps it.
  void passing() {
    int n = 2 + choose(4);
    std::string thing = pick(1, story_things)[0];
    std::vector<std::string> who = pick(n, story_names);
    say("The " + thing + " went to " + join(who, ", ") + ". " + who[n - 1] + " has the " + thing + ".");
  }

  // "Pack cup egg net. Again cup egg net." or "Back net egg cup."
  void list() {
    std::vector<std::string> things = pick(3 + choose(3), story_things);
    say("Pack " + join(things, " ") + ".");
    repeat(things, " ");
  }

  // "Word kdpaf. Again kdpaf." or "Back fapdk.": the same with letters.
  void word() {
    std::vector<std::string> letters;
    for (int i : pick(3 + choose(6), 26)) letters.push_back(letter(i));
    say("Word " + join(letters, "") + ".");
    repeat(letters, "");
  }

  void repeat(const std::vector<std::string>& items, const std::string& between) {
    if (choose(2)) say(" Again " + join(items, between) + ".");
    else say(" Back " + join({items.rbegin(), items.rend()}, between) + ".");
  }

  // "Row k d p a f. Third? p. After k? d. Before f? a.": places in a row, counted and relative.
  void row() {
    int n = 4 + choose(3);
    std::vector<int> letters = pick(n, 26);
    say("Row");
    for (int i : letters) say(" " + letter(i));
    say(".");
    for (int questions = 1 + choose(2); questions > 0; questions--) {
      int kind = choose(3), i = choose(kind == 0 ? n : n - 1);
      if (kind == 0) say(" " + story_places[i] + "? " + letter(letters[i]) + ".");
      if (kind == 1) say(" After " + letter(letters[i]) + "? " + letter(letters[i + 1]) + ".");
      if (kind == 2) say(" Before " + letter(letters[i + 1]) + "? " + letter(letters[i]) + ".");
    }
  }

  // "Nest ([]{<>})()[].": four kinds of brackets, closed in order. 4 to 12 pairs; outside of all brackets the line may
  // end from the fourth pair on, and inside opening and closing are equally likely until the pairs are used up.
  void nest() {
    const int fewest = 4, most = 12;
    std::string open;  // the stack of closing brackets still owed
    say("Nest ");
    for (int pairs = 0;;) {
      bool opens = open.empty() ? pairs < fewest || (pairs < most && choose(2)) : pairs < most && choose(2);
      if (!opens && open.empty()) break;
      if (opens) {
        int kind = choose(4);
        say(std::string(1, story_brackets[2 * kind]));
        open += story_brackets[2 * kind + 1];
        pairs++;
      } else {
        say(std::string(1, open.back()));
        open.pop_back();
      }
    }
    say(".");
  }

  // "A red cup, old hat, wet net. The hat? Old."-like: which look goes with which thing.
  void looks() {
    int n = 2 + choose(3);
    std::vector<std::string> look = pick(n, story_looks), thing = pick(n, story_things);
    say("See");
    for (int i = 0; i < n; i++) say((i ? ", " : " ") + look[i] + " " + thing[i]);
    int i = choose(n);
    say(". The " + thing[i] + " is " + look[i] + ".");
  }

  // "Ann has cup, Bob hat, Eve net. Ann and Eve swap. Eve has cup.": who has what after one exchange.
  void swap() {
    int n = 2 + choose(2);
    std::vector<std::string> who = pick(n, story_names), thing = pick(n, story_things);
    for (int i = 0; i < n; i++) say((i ? ", " : "") + who[i] + (i ? " " : " has ") + thing[i]);
    std::vector<int> two = pick(2, n);
    say(". " + who[two[0]] + " and " + who[two[1]] + " swap. ");
    std::swap(thing[two[0]], thing[two[1]]);
    int i = choose(n);
    say(who[i] + " has " + thing[i] + ".");
  }
};
