// Search by words: each must occur. Titles count more than headings, headings more than text, and a phrase more than its words.
"use strict";
window.Fuse = class {
  constructor(entries) { this.entries = entries.map((item) => ({ item, fields: [[item.title, 12], [item.section, 10], [item.text, 1]].map(([text, weight]) => [(text || "").toLowerCase(), weight]) })); }
  score(fields, words, phrase) {
    let sum = 0;
    for (const word of words) {
      let best = 0;
      for (const [text, weight] of fields) best += weight * Math.log2(1 + (text.match(word) || []).length);
      if (!best) return 0;
      sum += best;
    }
    if (words.length > 1) for (const [text, weight] of fields) sum += 3 * weight * Math.log2(1 + (text.match(phrase) || []).length);
    return sum;
  }
  search(query, { limit = 20 } = {}) {
    const terms = query.toLowerCase().split(/[\s-]+/).filter(Boolean).map((term) => term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    if (!terms.length) return [];
    const start = "(?<![\\p{L}\\p{N}])", words = terms.map((term) => new RegExp(start + term, "gu")), phrase = new RegExp(start + terms.join("[\\s-]+"), "gu");
    const hits = this.entries.map(({ item, fields }) => ({ item, score: this.score(fields, words, phrase) })).filter((hit) => hit.score > 0).sort((a, b) => b.score - a.score);
    const shown = {}; // of one page only the best few places
    return hits.filter((hit) => (shown[hit.item.title] = (shown[hit.item.title] || 0) + 1) <= 3).slice(0, limit);
  }
};
