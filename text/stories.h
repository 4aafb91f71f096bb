// The built-in corpus, drawn from a small probabilistic grammar in which order matters.
//
// A document is a run of short lines of seven kinds: who did what in which order, a thing passed along, things swapped,
// a bag packed, a row of letters, a word said again or backwards, brackets closed in order. A line first draws
// something at random and then says what follows from it, which only a reader who kept track of the order can know.
// So a model pays for the draws, which nobody can predict, and for every answer that it misses.
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

#include "run/random.h"

// The closed vocabulary. Within a list every word has its own first letter, so that a draw is paid for in one byte.
inline const std::vector<std::string> story_names = {
    "Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim",
    "Lee", "Max", "Ned", "Oz",  "Pam", "Ray", "Sue", "Tom", "Una", "Val", "Zoe"};
inline const std::vector<std::string> story_verbs = {"ate", "bet", "cut", "dug", "fed", "hid",
                                                     "led", "met", "ran", "sat", "won"};
inline const std::vector<std::string> story_things = {"ant", "bag", "cup", "dog", "egg", "fig", "gem", "hat",
                                                      "ink", "jar", "key", "log", "map", "net", "oar", "pen",
                                                      "rug", "saw", "tie", "urn", "van", "wax", "yam", "zip"};
inline const std::vector<std::string> story_looks = {"big", "cold", "dry", "fat", "hot",  "icy",
                                                     "new", "old",  "red", "sad", "tall", "wet"};
inline const std::vector<std::string> story_ordinals = {"First", "Second", "Third", "Fourth"};
inline const std::string story_brackets = "()[]{}<>";

struct Story {
  std::string text;            // printable ASCII, lines ended by '\n'; 100 to 2,000 bytes
  double log_probability = 0;  // natural log of the probability of the text and of its end

  static constexpr size_t shortest = 100, longest = 2000, longest_line = 100;
};

// Draws stories. Every random choice goes through choose() or chance(), which also count its probability: nothing else
// touches the generator. A draw must show in the text in full: a draw of 1 in 8 of which the text tells only whether it
// was 0 would have to count as 1/8 or 7/8, which is what chance() does.
class Storyteller {
 public:
  explicit Storyteller(uint64_t seed) : random_(seed) {}

  // The next story. The end of the document is a draw too (1 in 8 after each line), except where it is certain:
  // no end before `shortest` bytes, and no line after which the text might be longer than `longest`.
  Story next() {
    story_ = Story();
    do line();
    while (story_.text.size() < Story::shortest ||
           (story_.text.size() <= Story::longest - Story::longest_line && !chance(8)));
    return std::move(story_);
  }

 private:
  Random random_;
  Story story_;

  // One of 0..n-1, equally likely.
  int choose(int n) {
    story_.log_probability -= std::log(double(n));
    return random_.below(n);
  }

  // True once in n times.
  bool chance(int n) {
    bool yes = random_.below(n) == 0;
    story_.log_probability += std::log(yes ? 1.0 / n : 1 - 1.0 / n);
    return yes;
  }

  // `count` different words in the order drawn: probability 1 / (n (n-1) ... (n-count+1)).
  std::vector<std::string> pick(int count, std::vector<std::string> words) {
    std::vector<std::string> taken;
    for (int i = 0; i < count; i++) {
      int k = choose(int(words.size()));
      taken.push_back(words[k]);
      words.erase(words.begin() + k);
    }
    return taken;
  }

  // A word of `count` different letters.
  std::string letters(int count) {
    static const std::vector<std::string> alphabet = [] {
      std::vector<std::string> all;
      for (char c = 'a'; c <= 'z'; c++) all.push_back(std::string(1, c));
      return all;
    }();
    return join(pick(count, alphabet), "");
  }

  static std::string join(const std::vector<std::string>& words, const std::string& between) {
    std::string all;
    for (size_t i = 0; i < words.size(); i++) all += (i ? between : "") + words[i];
    return all;
  }

  void say(const std::string& words) { story_.text += words; }

  void line() {
    switch (choose(7)) {
      case 0: deeds(); break;
      case 1: passing(); break;
      case 2: swap(); break;
      case 3: pack(); break;
      case 4: row(); break;
      case 5: word(); break;
      case 6: nest(); break;
    }
    say("\n");
  }

  // "Ann ran, Bob dug, Eve hid. Second? Bob.": who did something first.
  void deeds() {
    std::vector<std::string> who = pick(3, story_names), did = pick(3, story_verbs);
    int i = choose(3);
    say(who[0] + " " + did[0] + ", " + who[1] + " " + did[1] + ", " + who[2] + " " + did[2] + ". ");
    say(story_ordinals[i] + "? " + who[i] + ".");
  }

  // "The red cup went to Ann, Bob, Eve. Eve has it.": the last one keeps it.
  void passing() {
    std::string look = pick(1, story_looks)[0], thing = pick(1, story_things)[0];
    std::vector<std::string> who = pick(2 + choose(3), story_names);
    say("The " + look + " " + thing + " went to " + join(who, ", ") + ". " + who.back() + " has it.");
  }

  // "Ann has jar, Eve ink. Swap: Ann ink.": what the first one has in the end.
  void swap() {
    std::vector<std::string> who = pick(2, story_names), thing = pick(2, story_things);
    say(who[0] + " has " + thing[0] + ", " + who[1] + " " + thing[1] + ". ");
    say("Swap: " + who[0] + " " + thing[1] + ".");
  }

  // "Pack cup egg net. Third? net."
  void pack() {
    std::vector<std::string> thing = pick(3, story_things);
    int i = choose(3);
    say("Pack " + join(thing, " ") + ". " + story_ordinals[i] + "? " + thing[i] + ".");
  }

  // "Row kdpa. Fourth? a."
  void row() {
    std::string word = letters(4);
    int i = choose(4);
    say("Row " + word + ". " + story_ordinals[i] + "? " + word[i] + ".");
  }

  // "Say mse mse mse." or "Say mse mse esm.": twice the same, then once more or backwards.
  void word() {
    std::string word = letters(3);
    say("Say " + word + " " + word + " ");
    say((choose(2) ? word : std::string(word.rbegin(), word.rend())) + ".");
  }

  // "Nest ([]{<>})()[].": four kinds of brackets, closed in order, at most four deep. Inside a bracket another one
  // opens half of the time; outside of all, the line ends once in twelve times, and for certain from 60 brackets on.
  void nest() {
    std::string owed;  // the closing brackets, innermost last
    say("Nest ");
    for (int n = 0;; n++) {
      if (owed.empty() && n > 0 && (n >= 60 || chance(12))) break;
      if (owed.empty() || (n < 60 && owed.size() < 4 && chance(2))) {
        int kind = choose(4);
        say(std::string(1, story_brackets[2 * kind]));
        owed += story_brackets[2 * kind + 1];
      } else {
        say(std::string(1, owed.back()));
        owed.pop_back();
      }
    }
    say(".");
  }
};
