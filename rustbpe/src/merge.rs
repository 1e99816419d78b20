//! Merging the pairs of one piece: the earliest merge first, and from left to right.
//!
//! Ids are in the order of the merges, so the pair with the smallest result comes first.

use crate::pairs::PairTable;

/// Up to this many ids the next pair is looked for in a plain scan; it takes `O(n²)` steps, few of
/// them. Longer pieces go by [`merge_long`].
const SHORT: usize = 256;
const NONE: u32 = u32::MAX;

/// Merges `ids` in place: what is left is the front of it, of the returned length.
///
/// At most `u32::MAX - 1` ids.
pub fn merge(pairs: &PairTable, ids: &mut [u32]) -> usize {
    if ids.len() <= SHORT {
        merge_short(pairs, ids)
    } else {
        merge_long(pairs, ids)
    }
}

fn merge_short(pairs: &PairTable, ids: &mut [u32]) -> usize {
    let mut n = ids.len();
    if n < 2 {
        return n;
    }
    // merged[i] is what ids[i] and ids[i + 1] merge into, NONE if they do not
    let mut merged = [NONE; SHORT];
    let lookup = |left, right| pairs.get((left, right)).unwrap_or(NONE);
    for i in 0..n - 1 {
        merged[i] = lookup(ids[i], ids[i + 1]);
    }
    loop {
        let (mut best, mut at) = (NONE, 0);
        for (i, &id) in merged[..n - 1].iter().enumerate() {
            if id < best {
                (best, at) = (id, i);
            }
        }
        if best == NONE {
            return n;
        }
        ids[at] = best;
        ids.copy_within(at + 2..n, at + 1);
        merged.copy_within(at + 2..n, at + 1);
        n -= 1;
        if n == 1 {
            return 1;
        }
        if at > 0 {
            merged[at - 1] = lookup(ids[at - 1], best);
        }
        merged[at] = if at + 1 < n {
            lookup(best, ids[at + 1])
        } else {
            NONE
        };
    }
}

/// The same in linear time but for the sorting of overlaps.
///
/// A merge makes only pairs that merge later than itself, since an id is made of smaller ones. So
/// the merges can be gone through once in their order, each with the places where it may apply.
/// The ids that are left form a linked list.
fn merge_long(pairs: &PairTable, ids: &mut [u32]) -> usize {
    let n = ids.len();
    let mut previous: Vec<u32> = (0..n as u32).map(|i| i.wrapping_sub(1)).collect();
    let mut next: Vec<u32> = (1..=n as u32).collect();
    let mut todo = Todo::default();
    for i in 0..n - 1 {
        if let Some(id) = pairs.get((ids[i], ids[i + 1])) {
            todo.add(id, i as u32);
        }
    }
    let mut places = Vec::new();
    while let Some(id) = todo.take_earliest(&mut places) {
        for &place in &places {
            let i = place as usize;
            let right = next[i] as usize;
            // either of the two may be merged with its other neighbour by now
            if ids[i] == NONE || right >= n || pairs.get((ids[i], ids[right])) != Some(id) {
                continue;
            }
            ids[i] = id;
            ids[right] = NONE;
            next[i] = next[right];
            if let Some(after) = previous.get_mut(next[i] as usize) {
                *after = place;
            }
            if let Some(&before) = ids.get(previous[i] as usize) {
                if let Some(later) = pairs.get((before, id)) {
                    todo.add(later, previous[i]);
                }
            }
            if let Some(&after) = ids.get(next[i] as usize) {
                if let Some(later) = pairs.get((id, after)) {
                    todo.add(later, place);
                }
            }
        }
    }
    let mut kept = 0;
    for i in 0..n {
        if ids[i] != NONE {
            ids[kept] = ids[i];
            kept += 1;
        }
    }
    kept
}

/// The merges that wait, each with its places.
#[derive(Default)]
struct Todo {
    /// for every id the newest of its notes, NONE if there is none
    newest: Vec<u32>,
    /// one bit for every id that has notes
    waiting: Vec<u64>,
    /// a place, and the id's note before this one
    notes: Vec<(u32, u32)>,
    /// no id in an earlier word of `waiting` waits
    word: usize,
}

impl Todo {
    fn add(&mut self, id: u32, place: u32) {
        let at = id as usize;
        if at >= self.newest.len() {
            let size = (at + 1).next_power_of_two().max(64);
            self.newest.resize(size, NONE);
            self.waiting.resize(size / 64, 0);
        }
        self.notes.push((place, self.newest[at]));
        self.newest[at] = self.notes.len() as u32 - 1;
        self.waiting[at / 64] |= 1 << (at % 64);
    }

    /// Takes the earliest merge that waits and its places from left to right.
    fn take_earliest(&mut self, places: &mut Vec<u32>) -> Option<u32> {
        while *self.waiting.get(self.word)? == 0 {
            self.word += 1;
        }
        let bits = &mut self.waiting[self.word];
        let id = self.word as u32 * 64 + bits.trailing_zeros();
        *bits &= *bits - 1;
        places.clear();
        let mut note = std::mem::replace(&mut self.newest[id as usize], NONE);
        while note != NONE {
            let (place, before) = self.notes[note as usize];
            places.push(place);
            note = before;
        }
        places.sort_unstable();
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: the whole list is searched for the earliest pair before every merge.
    fn naive(pairs: &PairTable, ids: &[u32]) -> Vec<u32> {
        let mut ids = ids.to_vec();
        loop {
            let best = (1..ids.len())
                .filter_map(|i| Some((pairs.get((ids[i - 1], ids[i]))?, i)))
                .min();
            let Some((id, i)) = best else { return ids };
            ids.splice(i - 1..=i, [id]);
        }
    }

    /// Merges in which every id is made of smaller ones, over five bytes.
    fn tables() -> impl Strategy<Value = PairTable> {
        prop::collection::vec((0u32..1000, 0u32..1000), 0..60).prop_map(|raw| {
            let mut table = PairTable::with_capacity(raw.len());
            for (k, (left, right)) in raw.into_iter().enumerate() {
                let id = k as u32 + 5;
                let pair = (left % id, right % id);
                if table.get(pair).is_none() {
                    table.insert(pair, id);
                }
            }
            table
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn both_ways_are_the_definition(table in tables(), ids in prop::collection::vec(0u32..5, 2..120)) {
            let expected = naive(&table, &ids);
            for way in [merge_short, merge_long] {
                let mut merged = ids.clone();
                let n = way(&table, &mut merged);
                prop_assert_eq!(&merged[..n], &expected);
            }
        }

        #[test]
        fn long_repeats(table in tables(), unit in prop::collection::vec(0u32..5, 1..4)) {
            let ids: Vec<u32> = unit.iter().copied().cycle().take(700).collect();
            let mut merged = ids.clone();
            let n = merge(&table, &mut merged);
            prop_assert_eq!(&merged[..n], &naive(&table, &ids));
        }
    }
}
