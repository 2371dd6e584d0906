// What is read off rows of logits: tokens that are drawn, the best ones, log-probs and ranks.
#pragma once
#include "types.h"

// A row to be read. The model's distribution is softmax(logits); the processed one softmax(adjusted / temperature) over the
// tokens that pass top-k, then top-p of what is left, then min-p.
struct Entry {
  const void* logits;     // [vocab] of FLOAT32 or BFLOAT16
  const float* adjusted;  // [vocab], logits after bans, bias and penalties; null: there are none
  double top_p;           // 1: off
  double min_p;           // 0: off
  int64_t top_k;          // below 1: off
  uint64_t seed, stream;  // they and `position` key the draw
  uint32_t position;
  float temperature;  // above 0, but for GREEDY
  int32_t token;      // of a GIVEN one
  uint32_t flags;
};

enum EntryFlag : uint32_t {
  GREEDY = 1,     // the most probable token is taken; the temperature counts as 1
  GIVEN = 2,      // the token is given
  PROCESSED = 4,  // log-probs, ranks and the order of the best are those of the processed distribution
  RANKED = 8,     // ranks are asked for
  SHAPED = 16,    // temperature and limits count; else they are off
  AS_LOGP = 32,   // in a merge: the adjusted values, or the logits where there are none, are log-probs themselves
};

// Where the findings go, [entries] or [entries, n]; a null pointer: nobody asks. Those of bad entries mean nothing.
struct Found {
  uint8_t* bad;      // NaN, +inf or nothing but -inf
  uint8_t* emptied;  // bad, though the model's logits are good
  float* floor;      // the smallest value that passes the limits
  int32_t* token;
  float* logp;
  int32_t* rank;     // 1 + how many tokens are better; 0: not asked for
  int32_t* best_id;  // by reported log-prob, or by chance where that is asked for; ties to the lower id
  float* best_logp;
  float* best_chance;  // processed probability; where it is 0 the id is -1
  int32_t* best_rank;
};

struct ScoredPair {
  uint64_t key;  // the score in the order of its bits, then the id, reversed; 0: no pair
  float logp, own_logp;
  int32_t entry;
  int32_t unused;
};

// Pairs of an entry and a token, the n best of every group of entries by score = bias + log-prob; ties to the lower entry,
// then the lower id. Log-probs are those of softmax(adjusted), or of softmax(logits), at temperature 1 and without limits.
struct Merges {
  const float* bias;     // [entries], below +inf
  const int64_t* edges;  // [groups + 1], first entries of the groups
  int64_t groups, n;
  ScoredPair* pairs;     // memory, [entries, n]
  int32_t* parent;  // [groups, n] and so on; -1 where fewer pairs are possible
  int32_t* token;
  float* score;
  float* logp;      // of which the score is made
  float* own_logp;  // the model's
  uint8_t* bad;     // [entries], NaN, +inf or nothing but -inf in the logits
};

struct SamplingKernels {
  // Bytes of memory that each thread needs.
  int64_t (*scratch)(int64_t vocab);
  void (*read_rows)(const Entry* entries, int64_t count, int64_t vocab, int32_t kind, int64_t n, const Found& found,
                    void* scratch, int threads);
  void (*merge_rows)(const Entry* entries, int64_t count, int64_t vocab, int32_t kind, const Merges& merges, void* scratch,
                     int threads);
  // The model's log-probs, out [count, vocab].
  void (*log_probs)(const Entry* entries, int64_t count, int64_t vocab, int32_t kind, float* out, void* scratch, int threads);
};
