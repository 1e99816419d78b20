//! Counting the distinct pieces of a text that is never held whole.
//!
//! Any number of threads count at once: each has a small table of its own, where the frequent
//! pieces stay, and hands the others on to one large table, which holds every piece once.

use std::sync::{Mutex, PoisonError};

use crate::key::Key;
use crate::varint;
use crate::{hash, lock, Splitter};

/// The large table's parts, so that threads seldom wait for one another. A power of two.
const SHARDS: usize = 64;
/// Pieces in a thread's own table. A power of two.
const OWN_PIECES: usize = 1 << 15;

/// The large table.
#[derive(Debug)]
pub struct Counts {
    shards: Vec<Mutex<Shard>>,
}

/// One part of the table: open addressing over records in `bytes`.
#[derive(Debug, Default)]
pub struct Shard {
    slots: Vec<Slot>,
    len: usize,
    /// for each piece its length in LEB128 and its bytes
    bytes: Vec<u8>,
    /// what counts beyond 32 bits stand for: (offset, multiples of 2^32)
    carried: Vec<(u32, u64)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// of the record in `bytes`
    offset: u32,
    /// zero where the slot is free
    count: u32,
}

impl Counts {
    pub fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    /// Adds to the count of a piece.
    pub fn add(&self, piece: &[u8], count: u64) {
        if count == 0 {
            return;
        }
        let hash = hash(piece);
        let shard = &self.shards[(hash >> 32) as usize % SHARDS];
        lock(shard).add(piece, hash, count);
    }

    pub fn into_shards(self) -> impl Iterator<Item = Shard> {
        let shards = self.shards.into_iter();
        shards.map(|shard| shard.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls `visit` with every piece and its count, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for shard in &self.shards {
            lock(shard).for_each(&mut visit);
        }
    }
}

impl Default for Counts {
    fn default() -> Self {
        Self::new()
    }
}

impl Shard {
    fn add(&mut self, piece: &[u8], hash: u64, count: u64) {
        if self.len * 8 >= self.slots.len() * 7 {
            self.grow();
        }
        let mut at = hash as usize & (self.slots.len() - 1);
        loop {
            let slot = self.slots[at];
            if slot.count == 0 {
                break;
            }
            if self.piece(slot.offset) == piece {
                let sum = u64::from(slot.count) + count;
                self.set(at, slot.offset, sum);
                return;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
        let offset = u32::try_from(self.bytes.len()).expect("a shard holds less than 4 GiB");
        varint::write(&mut self.bytes, piece.len() as u64);
        self.bytes.extend_from_slice(piece);
        self.len += 1;
        self.set(at, offset, count);
    }

    /// Stores a count; what does not fit in 32 bits is carried, and at least one is kept.
    fn set(&mut self, at: usize, offset: u32, count: u64) {
        let mut low = count & u64::from(u32::MAX);
        let mut high = count >> 32;
        if low == 0 {
            (low, high) = (u64::from(u32::MAX), high - 1);
            self.carried.push((offset, 1)); // the one that the line above takes away
        }
        if high > 0 {
            self.carried.push((offset, high << 32));
        }
        self.slots[at] = Slot {
            offset,
            count: low as u32,
        };
    }

    fn piece(&self, offset: u32) -> &[u8] {
        let record = &self.bytes[offset as usize..];
        let (length, start) = varint::read(record);
        &record[start..start + length as usize]
    }

    fn grow(&mut self) {
        let size = (self.slots.len() * 2).max(16);
        let old = std::mem::replace(&mut self.slots, vec![Slot::default(); size]);
        for slot in old.into_iter().filter(|slot| slot.count > 0) {
            let mut at = hash(self.piece(slot.offset)) as usize & (size - 1);
            while self.slots[at].count > 0 {
                at = (at + 1) & (size - 1);
            }
            self.slots[at] = slot;
        }
    }

    /// Calls `visit` with every piece and its count.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| slot.count > 0) {
            let more = self.carried.iter().filter(|(at, _)| *at == slot.offset);
            let carried: u64 = more.map(|(_, more)| more).sum();
            visit(self.piece(slot.offset), u64::from(slot.count) + carried);
        }
    }
}

/// One thread's counter: what it counts reaches the large table when it is dropped, at the latest.
pub struct Counter<'c> {
    counts: &'c Counts,
    /// two neighbours share a place, and the rarer of them makes room for what is new
    own: Vec<[(Key, u64); 2]>,
}

impl<'c> Counter<'c> {
    pub fn new(counts: &'c Counts) -> Self {
        Self {
            counts,
            own: vec![Default::default(); OWN_PIECES / 2],
        }
    }

    /// Counts the pieces of a text.
    pub fn count(&mut self, splitter: &Splitter, text: &str) {
        let bytes = text.as_bytes();
        let Ok(own) = <&mut [[(Key, u64); 2]; OWN_PIECES / 2]>::try_from(&mut self.own[..]) else {
            unreachable!("the table is made with this size");
        };
        splitter.for_each(text, |start, end| {
            if end - start > Key::MAX {
                self.counts.add(&bytes[start..end], 1);
                return;
            }
            let key = Key::new(bytes, start, end);
            let place = &mut own[key.hash() as usize % (OWN_PIECES / 2)];
            if place[0].0 == key {
                place[0].1 += 1;
            } else if place[1].0 == key {
                place[1].1 += 1;
            } else {
                let rarer = usize::from(place[1].1 < place[0].1);
                let (old, count) = std::mem::replace(&mut place[rarer], (key, 1));
                hand_on(self.counts, old, count);
            }
        });
    }
}

impl Drop for Counter<'_> {
    fn drop(&mut self) {
        for &(key, count) in self.own.iter().flatten() {
            hand_on(self.counts, key, count);
        }
    }
}

fn hand_on(counts: &Counts, key: Key, count: u64) {
    let (bytes, n) = key.bytes();
    counts.add(&bytes[..n], count);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::tests::texts;
    use crate::PATTERN;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn all(counts: &Counts) -> HashMap<Vec<u8>, u64> {
        let mut found = HashMap::new();
        counts.for_each(|piece, count| {
            assert!(found.insert(piece.to_vec(), count).is_none());
        });
        found
    }

    #[test]
    fn counts_may_exceed_32_bits() {
        let counts = Counts::new();
        let mut expected = 0;
        for count in [
            1,
            u64::from(u32::MAX),
            1 << 32,
            (1 << 40) - 1,
            1,
            3 << 32,
            5,
        ] {
            counts.add(b"ab", count);
            counts.add(b"cd", 1);
            expected += count;
            assert_eq!(all(&counts)[&b"ab"[..]], expected);
        }
        assert_eq!(all(&counts)[&b"cd"[..]], 7);
    }

    #[test]
    fn long_pieces_are_counted_too() {
        let counts = Counts::new();
        let lengths = [15, 16, 127, 128, 20_000, 3_000_000];
        for n in lengths {
            let text = "é".repeat(n);
            for _ in 0..2 {
                Counter::new(&counts).count(&Splitter::new(PATTERN).unwrap(), &text);
            }
        }
        let found = all(&counts);
        assert_eq!(found.len(), lengths.len());
        assert!(found.values().all(|&count| count == 2));
    }

    proptest! {
        #[test]
        fn it_counts(texts in prop::collection::vec(texts(), 0..20), repeats in 1usize..4) {
            let splitter = Splitter::new(PATTERN).unwrap();
            let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
            for text in &texts {
                splitter.for_each(text, |start, end| {
                    *expected.entry(text.as_bytes()[start..end].to_vec()).or_default() += repeats as u64;
                });
            }
            let counts = Counts::new();
            std::thread::scope(|scope| {
                for _ in 0..repeats {
                    scope.spawn(|| {
                        let mut counter = Counter::new(&counts);
                        texts.iter().for_each(|text| counter.count(&splitter, text));
                    });
                }
            });
            prop_assert_eq!(all(&counts), expected);
        }
    }
}
