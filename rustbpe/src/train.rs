use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::ControlFlow;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::{Error, Pair, Splitter, MAX_TOKEN_BYTES, MAX_VOCAB_SIZE};

/// How often each piece occurs in the training text.
pub type PieceCounts = FxHashMap<Box<str>, u64>;

/// Counts the pieces of the texts: every thread counts a share, and the shares are added up.
pub fn count_pieces<T: AsRef<str> + Sync>(splitter: &Splitter, texts: &[T]) -> PieceCounts {
    let share = texts.len().div_ceil(rayon::current_num_threads()).max(1);
    texts
        .par_chunks(share)
        .map(|texts| {
            let splitter = splitter.clone();
            let mut counts = PieceCounts::default();
            for text in texts {
                splitter.for_each(text.as_ref(), |piece| match counts.get_mut(piece) {
                    Some(count) => *count += 1,
                    None => {
                        counts.insert(piece.into(), 1);
                    }
                });
            }
            counts
        })
        .reduce(PieceCounts::default, |a, b| {
            let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
            for (piece, count) in small {
                *large.entry(piece).or_insert(0) += count;
            }
            large
        })
}

/// A distinct piece while its pairs merge.
struct Word {
    ids: Vec<u32>,
    count: u64,
}

impl Word {
    /// Replaces every `pair` by `id`, from left to right, and tells `change` which pairs came
    /// (`true`) and went (`false`).
    fn merge(&mut self, pair: Pair, id: u32, mut change: impl FnMut(Pair, bool)) {
        let mut kept = 0; // ids[..kept] is done; ids[read..] is still to be read
        let mut read = 0;
        while read < self.ids.len() {
            if self.ids[read..].starts_with(&[pair.0, pair.1]) {
                change(pair, false);
                if kept > 0 {
                    let left = self.ids[kept - 1];
                    change((left, pair.0), false);
                    change((left, id), true);
                }
                if let Some(&right) = self.ids.get(read + 2) {
                    change((pair.1, right), false);
                    change((id, right), true);
                }
                self.ids[kept] = id;
                read += 2;
            } else {
                self.ids[kept] = self.ids[read];
                read += 1;
            }
            kept += 1;
        }
        self.ids.truncate(kept);
    }
}

/// A pair's count, and the words that it may occur in (in order, each once).
#[derive(Default)]
struct Occurrences {
    count: u64,
    words: Vec<usize>,
}

/// Learns merges until the vocabulary has `vocab_size` ids or no pair occurs twice.
///
/// Each step merges the pair with the highest count, the smallest pair where counts are equal,
/// so the result depends neither on the order of the texts nor on the number of threads.
/// `progress` is called before each merge with the number of merges so far, and may stop.
pub fn train(
    counts: &PieceCounts,
    vocab_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Pair>, Error> {
    if !(256..=MAX_VOCAB_SIZE).contains(&vocab_size) {
        return Err(Error::VocabSize(vocab_size));
    }
    let mut words: Vec<Word> = counts
        .iter()
        .map(|(piece, &count)| Word {
            ids: piece.bytes().map(u32::from).collect(),
            count,
        })
        .collect();
    let mut pairs: FxHashMap<Pair, Occurrences> = FxHashMap::default();
    for (index, word) in words.iter().enumerate() {
        for pair in word.ids.windows(2) {
            add(&mut pairs, (pair[0], pair[1]), index, word.count);
        }
    }
    // Counts only fall once a pair exists, so an entry of the heap is never too low: it is
    // compared with the true count when it comes to the top, and put back if it was stale.
    let mut heap: BinaryHeap<(u64, Reverse<Pair>)> = pairs
        .iter()
        .map(|(&pair, seen)| (seen.count, Reverse(pair)))
        .collect();
    let mut token_bytes: Vec<usize> = vec![1; 256];
    let mut merges = Vec::new();

    while token_bytes.len() < vocab_size {
        if progress(merges.len()).is_break() {
            return Err(Error::Interrupted);
        }
        let Some((count, Reverse(pair))) = heap.pop() else {
            break;
        };
        let now = pairs.get(&pair).map_or(0, |seen| seen.count);
        if now < count {
            heap.push((now, Reverse(pair)));
            continue;
        }
        if count < 2 {
            break;
        }
        let length = token_bytes[pair.0 as usize] + token_bytes[pair.1 as usize];
        if length > MAX_TOKEN_BYTES {
            continue; // off the heap for good
        }
        let id = token_bytes.len() as u32;
        token_bytes.push(length);
        merges.push(pair);

        let seen = pairs.remove(&pair).unwrap_or_default();
        let mut born: FxHashMap<Pair, Occurrences> = FxHashMap::default();
        for index in seen.words {
            let word = &mut words[index];
            let count = word.count;
            word.merge(pair, id, |changed, came| {
                let new = changed.0 == id || changed.1 == id;
                if came {
                    add(&mut born, changed, index, count);
                } else if let Some(seen) =
                    if new { &mut born } else { &mut pairs }.get_mut(&changed)
                {
                    seen.count -= count;
                }
            });
        }
        for (pair, seen) in born {
            if seen.count > 0 {
                heap.push((seen.count, Reverse(pair)));
                pairs.insert(pair, seen);
            }
        }
    }
    Ok(merges)
}

/// Adds `count` occurrences of a pair in the word `index`; words come in order.
fn add(pairs: &mut FxHashMap<Pair, Occurrences>, pair: Pair, index: usize, count: u64) {
    let seen = pairs.entry(pair).or_default();
    seen.count += count;
    if seen.words.last() != Some(&index) {
        seen.words.push(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PATTERN;
    use proptest::prelude::*;

    fn learn(texts: &[&str], vocab_size: usize) -> Vec<Pair> {
        let counts = count_pieces(&Splitter::new(PATTERN).unwrap(), texts);
        train(&counts, vocab_size, &mut |_| ControlFlow::Continue(())).unwrap()
    }

    /// The definition: all pairs are counted anew before every merge.
    fn naive(texts: &[&str], vocab_size: usize) -> Vec<Pair> {
        let splitter = Splitter::new(PATTERN).unwrap();
        let mut words: Vec<Vec<u32>> = Vec::new();
        for text in texts {
            splitter.for_each(text, |p| words.push(p.bytes().map(u32::from).collect()));
        }
        let mut merges = Vec::new();
        for id in 256..vocab_size as u32 {
            let mut counts: FxHashMap<Pair, u64> = FxHashMap::default();
            for pair in words.iter().flat_map(|w| w.windows(2)) {
                *counts.entry((pair[0], pair[1])).or_insert(0) += 1;
            }
            let best = counts
                .into_iter()
                .max_by_key(|&(pair, count)| (count, Reverse(pair)));
            let Some((pair, 2..)) = best else { break };
            merges.push(pair);
            for word in &mut words {
                let mut merged = Vec::new();
                let mut rest = &word[..];
                while let Some((&first, tail)) = rest.split_first() {
                    let hit = rest.starts_with(&[pair.0, pair.1]);
                    merged.push(if hit { id } else { first });
                    rest = if hit { &tail[1..] } else { tail };
                }
                *word = merged;
            }
        }
        merges
    }

    #[test]
    fn ties_go_to_the_smallest_pair() {
        assert_eq!(
            learn(&["zz", "zz", "bb", "bb"], 258),
            [(98, 98), (122, 122)]
        );
    }

    #[test]
    fn it_ends_when_nothing_occurs_twice() {
        assert!(learn(&[], 1000).is_empty());
        assert!(learn(&["abcdef"], 1000).is_empty());
        assert_eq!(learn(&["ab", "ab"], 1000), [(97, 98)]);
    }

    #[test]
    fn a_vocabulary_smaller_than_the_bytes_is_refused() {
        let result = train(&PieceCounts::default(), 255, &mut |_| {
            ControlFlow::Continue(())
        });
        assert_eq!(result, Err(Error::VocabSize(255)));
    }

    #[test]
    fn it_stops_when_told() {
        let counts: PieceCounts = [("aaaa".into(), 10)].into_iter().collect();
        let result = train(&counts, 300, &mut |_| ControlFlow::Break(()));
        assert_eq!(result, Err(Error::Interrupted));
    }

    #[test]
    fn tokens_do_not_grow_without_bound() {
        let counts: PieceCounts = [("a".repeat(100_000).into(), 2)].into_iter().collect();
        let merges = train(&counts, 600, &mut |_| ControlFlow::Continue(())).unwrap();
        let mut lengths = vec![1; 256];
        for (left, right) in merges {
            lengths.push(lengths[left as usize] + lengths[right as usize]);
        }
        assert_eq!(lengths.into_iter().max(), Some(MAX_TOKEN_BYTES));
    }

    #[test]
    fn counts_may_exceed_32_bits() {
        let counts: PieceCounts = [("ab".into(), 1 << 40), ("cd".into(), 1)]
            .into_iter()
            .collect();
        let merges = train(&counts, 300, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(merges, [(97, 98)]);
    }

    proptest! {
        #[test]
        fn it_learns_what_the_definition_says(texts in prop::collection::vec("[abc ]{0,40}", 0..6)) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            prop_assert_eq!(learn(&texts, 300), naive(&texts, 300));
        }

        #[test]
        fn order_and_threads_do_not_matter(
            (texts, shuffled) in prop::collection::vec("[abc é1]{0,40}", 0..12)
                .prop_flat_map(|t| (Just(t.clone()), Just(t).prop_shuffle())),
            threads in 1usize..4,
        ) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let shuffled: Vec<&str> = shuffled.iter().map(String::as_str).collect();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            prop_assert_eq!(learn(&texts, 320), pool.install(|| learn(&shuffled, 320)));
        }
    }
}
