// Whose tokens are these? Ids mean something to one tokenizer only, and a run can be repeated on its own data only.
#pragma once
#include "text/shards.h"
#include "text/tokenizer.h"

// A tokenizer's name, as in meta.json and in checkpoints, and the fingerprint of what it does. Empty: unknown.
struct TokenizerIdentity {
  std::string name, fingerprint;
};

inline TokenizerIdentity identity_of(const Tokenizer* tokenizer) {
  return tokenizer ? TokenizerIdentity{tokenizer->name(), tokenizer->fingerprint()} : TokenizerIdentity{};
}

// Of the tokens in shards, with their meta.json. One from before there were fingerprints has none; then the tokenizer
// beside it counts, if there is one.
inline TokenizerIdentity identity_of(const Meta& meta, const std::string& pattern) {
  TokenizerIdentity identity{meta.tokenizer, meta.tokenizer_fingerprint};
  if (identity.name.empty() || !identity.fingerprint.empty()) return identity;
  try {
    identity.fingerprint = make_tokenizer(meta.tokenizer, directory_of(pattern))->fingerprint();
  } catch (const UserError&) {
  }
  return identity;
}

// Refuses tokens of another tokenizer. `what` names theirs, such as "--data PATTERN", `whose` ours, such as "the model".
// What cannot be compared is taken, with a note on stderr. UserError if they differ.
inline void check_same_tokenizer(const std::string& what, const TokenizerIdentity& theirs, const std::string& whose,
                                 const TokenizerIdentity& ours) {
  auto known = [](const TokenizerIdentity& identity) {
    return "\"" + identity.name + "\"" + (identity.fingerprint.empty() ? "" : " " + identity.fingerprint);
  };
  const bool fingerprints = !theirs.fingerprint.empty() && !ours.fingerprint.empty();
  const bool names = !theirs.name.empty() && !ours.name.empty();
  if (fingerprints ? theirs.fingerprint != ours.fingerprint : names && theirs.name != ours.name)
    throw UserError(what + ": its tokenizer is " + known(theirs) + ", that of " + whose + " is " + known(ours) +
                    "; their ids mean different text");
  if (!fingerprints && (!theirs.name.empty() || !ours.name.empty()))
    std::fprintf(stderr, "note: %s: nothing says whether its tokenizer is that of %s; taken for the same\n", what.c_str(),
                 whose.c_str());
}

// Refuses shards with another content than meta.json says. Those that it does not list are taken. Reads all the data.
inline void check_content(const Dataset& data, const Meta& meta) {
  for (const Shard& shard : data.shards()) {
    const size_t slash = shard.path().rfind('/');
    const auto listed = meta.shards.find(slash == std::string::npos ? shard.path() : shard.path().substr(slash + 1));
    if (listed != meta.shards.end() && listed->second != shard.fingerprint())
      throw UserError(shard.path() + ": its content has the fingerprint " + shard.fingerprint() + ", in meta.json it is " +
                      listed->second + "; the shard is damaged, or from elsewhere");
  }
}
