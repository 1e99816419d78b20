//! Learning merges from counted pieces.
//!
//! Each step merges the pair of neighbours that occurs most often, the smallest pair of ids where
//! counts are equal. So the result depends neither on the order of the texts nor on threads.
//!
//! Three things make this fast and small. A step touches only the places of its pair. What changes
//! at a pair's places is added up by neighbour before any table is asked. And pairs too rare to be
//! merged soon are not followed at all: a pair's count only falls once it exists, so below a
//! threshold it can be forgotten until all that is more frequent has been merged.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::ControlFlow;

use rustc_hash::FxHashMap;

use crate::count::Counts;
use crate::varint;
use crate::{Error, Pair, MAX_TOKEN_BYTES, MAX_VOCAB_SIZE};

/// The first threshold assumes that the last merge is at least this much rarer than the average
/// merge would be if all pairs were merged at once; where that is wrong, one more pass is needed.
const RARER: u64 = 64;
/// About so many pairs are counted in one pass, in some thirty megabytes.
const PAIRS_IN_A_PASS: usize = 1 << 20;
/// Pieces that occur more often than this are sorted one by one.
const FREQUENT: u64 = 4096;

/// Learns merges until the vocabulary has `vocab_size` ids or no pair occurs twice.
///
/// `progress` is called with the number of merges so far at least every few milliseconds, and may
/// stop the training.
pub fn train(
    counts: Counts,
    vocab_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Pair>, Error> {
    train_above(None, counts, vocab_size, progress)
}

/// The same with a first threshold of one's own, which changes nothing but the time it takes.
fn train_above(
    threshold: Option<u64>,
    counts: Counts,
    vocab_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Pair>, Error> {
    if !(256..=MAX_VOCAB_SIZE).contains(&vocab_size) {
        return Err(Error::VocabSize(vocab_size));
    }
    if vocab_size < usize::from(u16::RESERVED) {
        Trainer::<u16>::new(counts, vocab_size, progress)?.run(threshold, progress)
    } else {
        Trainer::<u32>::new(counts, vocab_size, progress)?.run(threshold, progress)
    }
}

/// An id in as few bytes as will do. The two largest values mean something else.
trait Id: Copy + Eq + Into<u64> {
    /// Ids are below this.
    const RESERVED: Self;
    /// Between two pieces.
    const GAP: Self;
    /// Where a token began that is now a part of another.
    const GONE: Self;
    fn from_index(id: usize) -> Self;
    fn index(self) -> usize;
}

macro_rules! id {
    ($type:ty) => {
        impl Id for $type {
            const RESERVED: Self = Self::MAX - 1;
            const GAP: Self = Self::MAX;
            const GONE: Self = Self::MAX - 1;
            fn from_index(id: usize) -> Self {
                id as Self
            }
            fn index(self) -> usize {
                self as usize
            }
        }
    };
}
id!(u16);
id!(u32);

/// All distinct pieces, the frequent ones first, with a slot for every byte.
///
/// A token writes its id into its first and its last slot, so that both neighbours find it.
struct Pieces<I> {
    /// pieces with a gap before, between and behind them
    slots: Vec<I>,
    /// where a run of pieces with the same count begins, and that count
    runs: Vec<(u32, u64)>,
    /// for every 64 slots the run of the first of them
    run_of_block: Vec<u32>,
}

impl<I: Id> Pieces<I> {
    fn new(
        counts: Counts,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Self, Error> {
        // a counting sort by count, in two passes that hold nothing twice
        let mut space = vec![0u64; FREQUENT as usize];
        let mut frequent: Vec<(Reverse<u64>, Box<[u8]>)> = Vec::new();
        counts.for_each(|piece, count| {
            if piece.len() < 2 {
                // nothing to merge
            } else if count >= FREQUENT {
                frequent.push((Reverse(count), piece.into()));
            } else {
                space[count as usize] += piece.len() as u64 + 1;
            }
        });
        frequent.sort_unstable();
        let frequent_slots: u64 = frequent
            .iter()
            .map(|(_, piece)| piece.len() as u64 + 1)
            .sum();
        let size = 1 + frequent_slots + space.iter().sum::<u64>();
        if size >= u64::from(u32::MAX) {
            return Err(Error::TooManyPieces);
        }
        let mut slots = vec![I::GAP; size as usize];
        let mut runs: Vec<(u32, u64)> = vec![(0, 0)];
        let mut at = 1;
        for (Reverse(count), piece) in frequent {
            if runs.last().is_none_or(|&(_, last)| last != count) {
                runs.push((at as u32, count));
            }
            at += write(&mut slots[at..], &piece);
        }
        let mut starts = vec![0; space.len()];
        for count in (1..space.len()).rev().filter(|&count| space[count] > 0) {
            starts[count] = at;
            runs.push((at as u32, count as u64));
            at += space[count] as usize;
        }
        for shard in counts.into_shards() {
            if progress(0).is_break() {
                return Err(Error::Interrupted);
            }
            shard.for_each(|piece, count| {
                if piece.len() >= 2 && count < FREQUENT {
                    let start = &mut starts[count as usize];
                    *start += write(&mut slots[*start..], piece);
                }
            });
        }
        let mut run = 0;
        let run_of_block = (0..slots.len().div_ceil(64) as u32)
            .map(|block| {
                while runs
                    .get(run + 1)
                    .is_some_and(|&(start, _)| start <= block * 64)
                {
                    run += 1;
                }
                run as u32
            })
            .collect();
        Ok(Self {
            slots,
            runs,
            run_of_block,
        })
    }

    /// How often the piece at this place occurs.
    #[inline]
    fn count(&self, place: usize) -> u64 {
        let mut run = self.run_of_block[place / 64] as usize;
        while self
            .runs
            .get(run + 1)
            .is_some_and(|&(start, _)| start as usize <= place)
        {
            run += 1;
        }
        self.runs[run].1
    }

    /// Calls `visit` with every pair of neighbours: its place, the two ids, and how often it occurs.
    fn for_each_pair(&self, lengths: &[u16], mut visit: impl FnMut(usize, Pair, u64)) {
        let (mut before, mut at, mut run) = (None, 0, 0);
        while at < self.slots.len() {
            let id = self.slots[at];
            if id == I::GAP {
                before = None;
                at += 1;
                while self
                    .runs
                    .get(run + 1)
                    .is_some_and(|&(start, _)| start as usize <= at)
                {
                    run += 1;
                }
                continue;
            }
            if let Some((place, left)) = before {
                visit(place, (left, id.index() as u32), self.runs[run].1);
            }
            before = Some((at, id.index() as u32));
            at += usize::from(lengths[id.index()]);
        }
    }
}

/// Writes a piece, and says how many slots it takes with the gap behind it.
fn write<I: Id>(slots: &mut [I], piece: &[u8]) -> usize {
    for (slot, &byte) in slots.iter_mut().zip(piece) {
        *slot = I::from_index(usize::from(byte));
    }
    piece.len() + 1
}

/// Rising numbers, stored as their differences in LEB128: one or two bytes each.
#[derive(Default)]
struct Places {
    bytes: Vec<u8>,
    last: u32,
}

impl Places {
    fn push(&mut self, place: usize) {
        let place = place as u32;
        varint::write(&mut self.bytes, u64::from(place - self.last));
        self.last = place;
    }

    #[inline]
    fn for_each(&self, mut visit: impl FnMut(usize)) {
        let (mut place, mut rest) = (0, &self.bytes[..]);
        while !rest.is_empty() {
            let (difference, length) = varint::read(rest);
            place += difference as usize;
            visit(place);
            rest = &rest[length..];
        }
    }
}

/// A pair that may be merged soon.
struct Candidate {
    count: u64,
    /// where it was when it came to be; some places may have gone since
    places: Places,
}

/// What a merge changes on one side of its places, added up by neighbour.
#[derive(Default)]
struct Side {
    counts: Vec<u64>,
    /// which neighbours have a count
    met: Vec<usize>,
    /// one more than the index of the neighbour's new candidate; zero if it gets none
    candidate: Vec<u32>,
}

impl Side {
    fn new(vocab_size: usize) -> Self {
        Self {
            counts: vec![0; vocab_size],
            met: Vec::new(),
            candidate: vec![0; vocab_size],
        }
    }

    #[inline]
    fn add(&mut self, id: usize, count: u64) {
        if self.counts[id] == 0 {
            self.met.push(id);
        }
        self.counts[id] += count;
    }
}

struct Trainer<I> {
    vocab_size: usize,
    pieces: Pieces<I>,
    merges: Vec<Pair>,
    /// the bytes of every id
    lengths: Vec<u16>,
    /// pairs that occur less often are not followed
    threshold: u64,
    candidates: FxHashMap<Pair, Candidate>,
    /// Candidates with the counts that they once had: what comes to the top is compared with the
    /// count of today.
    heap: BinaryHeap<(u64, Reverse<Pair>)>,
    left: Side,
    right: Side,
}

impl<I: Id> Trainer<I> {
    fn new(
        counts: Counts,
        vocab_size: usize,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Self, Error> {
        Ok(Self {
            vocab_size,
            pieces: Pieces::new(counts, progress)?,
            merges: Vec::new(),
            lengths: vec![1; 256],
            threshold: 0,
            candidates: FxHashMap::default(),
            heap: BinaryHeap::new(),
            left: Side::new(vocab_size),
            right: Side::new(vocab_size),
        })
    }

    fn run(
        mut self,
        threshold: Option<u64>,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<Pair>, Error> {
        let mut total = 0;
        self.pieces
            .for_each_pair(&self.lengths, |_, _, count| total += count);
        let first = threshold.unwrap_or(total / (self.vocab_size as u64 * RARER));
        self.find_candidates(first.max(2), progress)?;
        while self.lengths.len() < self.vocab_size {
            if progress(self.merges.len()).is_break() {
                return Err(Error::Interrupted);
            }
            match self.take_most_frequent() {
                Some((pair, candidate)) => self.merge(pair, &candidate.places),
                None if self.threshold == 2 => break,
                None => self.find_candidates((self.threshold / 4).max(2), progress)?,
            }
        }
        Ok(self.merges)
    }

    fn length(&self, pair: Pair) -> usize {
        usize::from(self.lengths[pair.0 as usize]) + usize::from(self.lengths[pair.1 as usize])
    }

    /// Starts to follow all pairs that occur at least `threshold` times.
    fn find_candidates(
        &mut self,
        threshold: u64,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.threshold = threshold;
        self.candidates.clear();
        self.heap.clear();
        // all pairs at once would need more memory than everything else
        let mut distinct = 0;
        self.pieces
            .for_each_pair(&self.lengths, |_, _, _| distinct += 1);
        let distinct = self.lengths.len().saturating_pow(2).min(distinct);
        let passes = distinct.div_ceil(PAIRS_IN_A_PASS).max(1) as u32;
        let mut counts: FxHashMap<Pair, u64> = FxHashMap::default();
        for pass in 0..passes {
            if progress(self.merges.len()).is_break() {
                return Err(Error::Interrupted);
            }
            counts.clear();
            self.pieces
                .for_each_pair(&self.lengths, |_, (left, right), count| {
                    if passes == 1
                        || (left ^ right.wrapping_mul(0x9E37_79B1) >> 16) % passes == pass
                    {
                        *counts.entry((left, right)).or_default() += count;
                    }
                });
            for (&pair, &count) in counts.iter().filter(|(_, &count)| count >= threshold) {
                if self.length(pair) <= MAX_TOKEN_BYTES {
                    let places = Places::default();
                    self.candidates.insert(pair, Candidate { count, places });
                    self.heap.push((count, Reverse(pair)));
                }
            }
        }
        self.pieces.for_each_pair(&self.lengths, |place, pair, _| {
            if let Some(candidate) = self.candidates.get_mut(&pair) {
                candidate.places.push(place);
            }
        });
        Ok(())
    }

    fn take_most_frequent(&mut self) -> Option<(Pair, Candidate)> {
        while let Some((count, Reverse(pair))) = self.heap.pop() {
            match self.candidates.get(&pair).map(|candidate| candidate.count) {
                None => {}
                Some(now) if now < count => self.heap.push((now, Reverse(pair))),
                Some(_) => return Some((pair, self.candidates.remove(&pair)?)),
            }
        }
        None
    }

    /// Takes from the count of a pair; it is forgotten when it becomes too rare.
    fn lose(&mut self, pair: Pair, count: u64) {
        if let Some(candidate) = self.candidates.get_mut(&pair) {
            candidate.count -= count;
            if candidate.count < self.threshold {
                self.candidates.remove(&pair);
            }
        }
    }

    fn merge(&mut self, pair: Pair, places: &Places) {
        let new = self.lengths.len();
        let twice = self.replace(pair, places, new);
        self.merges.push(pair);
        self.lengths.push(self.length(pair) as u16);

        let (a, b, c) = (pair.0, pair.1, new as u32);
        let mut born: Vec<(Pair, Candidate)> = Vec::new();
        let mut bear = |trainer: &Self, pair, count| {
            if count < trainer.threshold || trainer.length(pair) > MAX_TOKEN_BYTES {
                return 0;
            }
            let places = Places::default();
            born.push((pair, Candidate { count, places }));
            born.len() as u32
        };
        let (mut left, mut right) = (
            std::mem::take(&mut self.left),
            std::mem::take(&mut self.right),
        );
        for x in left.met.iter().copied() {
            let count = std::mem::take(&mut left.counts[x]);
            self.lose((x as u32, a), count);
            left.candidate[x] = bear(self, (x as u32, c), count);
        }
        for y in right.met.iter().copied() {
            let count = std::mem::take(&mut right.counts[y]);
            self.lose((b, y as u32), count);
            let replaced = if y as u32 == a { twice } else { 0 };
            right.candidate[y] = bear(self, (c, y as u32), count - replaced);
        }
        left.candidate[new] = bear(self, (c, c), twice);
        left.met.push(new);

        if !born.is_empty() {
            let mut end = 0; // of the last new token: some places of "aaa" are inside it
            places.for_each(|place| {
                if place < end || self.pieces.slots[place] != I::from_index(new) {
                    return;
                }
                end = place + usize::from(self.lengths[new]);
                let before = self.pieces.slots[place - 1];
                if before != I::GAP {
                    if let Some(k) = left.candidate[before.index()].checked_sub(1) {
                        let start = place - usize::from(self.lengths[before.index()]);
                        born[k as usize].1.places.push(start);
                    }
                }
                let after = self.pieces.slots[end];
                if after != I::GAP && after.index() != new {
                    if let Some(k) = right.candidate[after.index()].checked_sub(1) {
                        born[k as usize].1.places.push(place);
                    }
                }
            });
        }
        for side in [&mut left, &mut right] {
            for neighbour in side.met.drain(..) {
                side.candidate[neighbour] = 0;
            }
        }
        (self.left, self.right) = (left, right);
        for (pair, mut candidate) in born {
            candidate.places.bytes.shrink_to_fit();
            self.heap.push((candidate.count, Reverse(pair)));
            self.candidates.insert(pair, candidate);
        }
    }

    /// Writes the id `new` over the pair at its places, and adds up the neighbours that it meets:
    /// on the left as they are then, on the right as they were before. Says how often two new
    /// tokens stand side by side.
    fn replace(&mut self, pair: Pair, places: &Places, new: usize) -> u64 {
        let (a, b) = (
            I::from_index(pair.0 as usize),
            I::from_index(pair.1 as usize),
        );
        let new_id = I::from_index(new);
        let length_a = usize::from(self.lengths[pair.0 as usize]);
        let length = self.length(pair);
        let mut twice = 0;
        places.for_each(|place| {
            let slots = &mut self.pieces.slots;
            if slots[place] != a || slots[place + length_a] != b {
                return; // one of the two has been merged with its other neighbour
            }
            slots[place + length_a] = I::GONE;
            slots[place] = new_id;
            slots[place + length - 1] = new_id;
            let (before, after) = (slots[place - 1], slots[place + length]);
            let count = self.pieces.count(place);
            if before == new_id {
                twice += count;
            } else if before != I::GAP {
                self.left.add(before.index(), count);
            }
            if after != I::GAP {
                self.right.add(after.index(), count);
            }
        });
        twice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::Counter;
    use crate::{Splitter, PATTERN};
    use proptest::prelude::*;

    fn go_on(_: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn count(texts: &[&str]) -> Counts {
        let counts = Counts::new();
        let splitter = Splitter::new(PATTERN).unwrap();
        let mut counter = Counter::new(&counts);
        texts.iter().for_each(|text| counter.count(&splitter, text));
        drop(counter);
        counts
    }

    fn learn(texts: &[&str], vocab_size: usize) -> Vec<Pair> {
        train(count(texts), vocab_size, &mut go_on).unwrap()
    }

    fn of_pieces(pieces: &[(&str, u64)]) -> Counts {
        let counts = Counts::new();
        for (piece, count) in pieces {
            counts.add(piece.as_bytes(), *count);
        }
        counts
    }

    /// The definition: all pairs are counted anew before every merge.
    fn naive(texts: &[&str], vocab_size: usize) -> Vec<Pair> {
        let splitter = Splitter::new(PATTERN).unwrap();
        let mut words: Vec<Vec<u32>> = Vec::new();
        for text in texts {
            splitter.for_each(text, |start, end| {
                words.push(
                    text.as_bytes()[start..end]
                        .iter()
                        .map(|&b| u32::from(b))
                        .collect(),
                );
            });
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
    fn known_merges() {
        // pieces "aaa", " aaa", " aaa": (a, a) occurs six times, then (aa, a) three times
        assert_eq!(learn(&["aaa aaa aaa"], 258), [(97, 97), (256, 97)]);
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
    fn impossible_sizes_are_refused() {
        for size in [255, MAX_VOCAB_SIZE + 1] {
            let result = train(Counts::new(), size, &mut go_on);
            assert_eq!(result, Err(Error::VocabSize(size)));
        }
    }

    #[test]
    fn it_stops_when_told() {
        let counts = of_pieces(&[("aaaa", 10)]);
        let result = train(counts, 300, &mut |_| ControlFlow::Break(()));
        assert_eq!(result, Err(Error::Interrupted));
    }

    #[test]
    fn tokens_do_not_grow_without_bound() {
        let merges = train(of_pieces(&[(&"a".repeat(100_000), 2)]), 600, &mut go_on).unwrap();
        let mut lengths = vec![1; 256];
        for (left, right) in merges {
            lengths.push(lengths[left as usize] + lengths[right as usize]);
        }
        assert_eq!(lengths.into_iter().max(), Some(MAX_TOKEN_BYTES));
    }

    #[test]
    fn counts_may_exceed_32_bits() {
        let counts = of_pieces(&[("ab", 1 << 40), ("cd", 1 << 33), ("ef", 1)]);
        let merges = train(counts, 300, &mut go_on).unwrap();
        assert_eq!(merges, [(97, 98), (99, 100)]);
    }

    #[test]
    fn a_large_vocabulary_has_wider_ids() {
        let texts = ["the cat sat on the mat, and the other cat sat there"];
        let wide = learn(&texts, 100_000);
        assert_eq!(wide, learn(&texts, 1000));
        assert!(!wide.is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        #[test]
        fn it_learns_what_the_definition_says(
            texts in prop::collection::vec("[ab]{0,12}[abc ]{0,40}", 0..8),
            threshold in prop::option::of(0u64..200),
            repeats in 1usize..4,
        ) {
            let mut all: Vec<&str> = Vec::new();
            for _ in 0..repeats {
                all.extend(texts.iter().map(String::as_str));
            }
            let expected = naive(&all, 300);
            for vocab_size in [300, 100_000] {
                let learned = train_above(threshold, count(&all), vocab_size, &mut go_on).unwrap();
                prop_assert_eq!(&learned[..learned.len().min(44)], &expected);
            }
        }

        #[test]
        fn places_are_what_was_pushed(places in prop::collection::btree_set(0usize..1 << 32, 0..50)) {
            let mut stored = Places::default();
            places.iter().for_each(|&place| stored.push(place));
            let mut found = Vec::new();
            stored.for_each(|place| found.push(place));
            prop_assert_eq!(found, places.into_iter().collect::<Vec<_>>());
        }
    }
}
