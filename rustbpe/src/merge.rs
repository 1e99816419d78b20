//! Merging the pairs of one piece: the earliest merge first, and from left to right.
//!
//! Ids are in the order of the merges, so the pair with the smallest result comes first.

use crate::pairs::PairTable;

/// Up to this many ids the next pair is looked for in a plain scan; it takes `O(n²)` steps, few of
/// them. Longer pieces go by [`merge_long`].
const SHORT: usize = 128;
/// The memory for pieces of up to this many ids is kept: two megabytes.
const KEPT: usize = 1 << 16;
/// Places whose memory is waited for at once, before any of it is needed.
const TOGETHER: usize = 64;
const NONE: u32 = u32::MAX;

/// Memory for merging long pieces, which is used again for the next one.
#[derive(Debug, Default)]
pub struct Merger {
    nodes: Vec<Node>,
    todo: Todo,
    places: Vec<u32>,
}

impl Merger {
    /// Merges `ids` in place: what is left is the front of it, of the returned length.
    ///
    /// At most `u32::MAX - 1` ids.
    pub fn merge(&mut self, pairs: &PairTable, ids: &mut [u32]) -> usize {
        match ids.len() {
            0..=16 => merge_short::<16>(pairs, ids),
            17..=SHORT => merge_short::<SHORT>(pairs, ids),
            n => {
                let left = merge_long(self, pairs, ids);
                if n > KEPT {
                    *self = Self::default();
                }
                left
            }
        }
    }
}

/// For at most `N` ids.
fn merge_short<const N: usize>(pairs: &PairTable, ids: &mut [u32]) -> usize {
    let mut n = ids.len();
    // merged[i] is what ids[i] and ids[i + 1] merge into, NONE if they do not
    let mut merged = [NONE; N];
    let look_up = |left, right| pairs.get((left, right)).unwrap_or(NONE);
    for i in 1..n {
        merged[i - 1] = look_up(ids[i - 1], ids[i]);
    }
    while n > 1 {
        let (mut best, mut at) = (NONE, 0);
        for (i, &id) in merged[..n - 1].iter().enumerate() {
            if id < best {
                (best, at) = (id, i);
            }
        }
        if best == NONE {
            break;
        }
        n -= 1;
        ids[at] = best;
        ids.copy_within(at + 2..n + 1, at + 1);
        merged.copy_within(at + 2..n + 1, at + 1);
        merged[at] = NONE;
        if at + 1 < n {
            merged[at] = look_up(best, ids[at + 1]);
        }
        if at > 0 {
            merged[at - 1] = look_up(ids[at - 1], best);
        }
    }
    n
}

/// The same in about linear time.
///
/// A merge makes only pairs that merge later than itself, since an id is made of smaller ones. So
/// the merges can be gone through once in their order, each with the places where it may apply.
fn merge_long(memory: &mut Merger, pairs: &PairTable, ids: &mut [u32]) -> usize {
    let Merger {
        nodes,
        todo,
        places,
    } = memory;
    // what is left is a linked list
    nodes.clear();
    nodes.extend(ids.iter().enumerate().map(|(i, &id)| Node {
        id,
        previous: (i as u32).wrapping_sub(1),
        next: i as u32 + 1,
    }));
    todo.start();
    for (i, two) in ids.windows(2).enumerate() {
        if let Some(id) = pairs.get((two[0], two[1])) {
            todo.add(id, i as u32);
        }
    }
    while let Some(id) = todo.take_earliest(places) {
        let pair_at = |nodes: &[Node], place: u32| {
            let node = nodes[place as usize];
            let right = nodes.get(node.next as usize)?;
            (node.id != NONE).then_some((node.id, right.id))
        };
        let is_there =
            |&place: &u32| pair_at(nodes, place).filter(|&pair| pairs.get(pair) == Some(id));
        let Some(pair) = places.iter().find_map(is_there) else {
            continue; // all were merged with their other neighbours
        };
        if pair.0 == pair.1 {
            places.sort(); // in "aaa" the left one counts
        }
        for (k, &place) in places.iter().enumerate() {
            if k % TOGETHER == 0 {
                let soon = &places[k..places.len().min(k + TOGETHER)];
                let touched = soon.iter().map(|&place| nodes[place as usize].id);
                std::hint::black_box(touched.fold(0, u32::max));
            }
            if pair_at(nodes, place) != Some(pair) {
                continue;
            }
            let Node { previous, next, .. } = nodes[place as usize];
            let right = std::mem::replace(&mut nodes[next as usize].id, NONE);
            debug_assert_eq!(right, pair.1);
            let after = nodes[next as usize].next;
            nodes[place as usize].id = id;
            nodes[place as usize].next = after;
            if let Some(node) = nodes.get_mut(after as usize) {
                node.previous = place;
                if let Some(later) = pairs.get((id, node.id)) {
                    todo.add(later, place);
                }
            }
            if let Some(node) = nodes.get(previous as usize) {
                if let Some(later) = pairs.get((node.id, id)) {
                    todo.add(later, previous);
                }
            }
        }
    }
    let mut kept = 0;
    for node in nodes.iter().filter(|node| node.id != NONE) {
        ids[kept] = node.id;
        kept += 1;
    }
    kept
}

#[derive(Debug, Clone, Copy)]
struct Node {
    /// NONE where it has become a part of the one before
    id: u32,
    previous: u32,
    next: u32,
}

/// The merges that wait, each with its places.
#[derive(Debug, Default)]
struct Todo {
    /// for every id its first and its last block
    lists: Vec<Option<(u32, u32)>>,
    blocks: Vec<Block>,
    /// one bit for every id that has places
    waiting: Vec<u64>,
    /// no id in an earlier word of `waiting` waits
    word: usize,
}

/// A few places: following a link for each of them would take longer than everything else.
#[derive(Debug, Default)]
struct Block {
    places: [u32; 14],
    n: u32,
    /// the block behind this one, unless this is the last
    next: u32,
}

impl Todo {
    /// Begins anew, when everything has been taken.
    fn start(&mut self) {
        self.blocks.clear();
        self.word = 0;
    }

    fn add(&mut self, id: u32, place: u32) {
        let at = id as usize;
        if at >= self.lists.len() {
            let size = (at + 1).next_power_of_two().max(64);
            self.lists.resize(size, None);
            self.waiting.resize(size / 64, 0);
        }
        let new = self.blocks.len() as u32;
        let last = match &mut self.lists[at] {
            Some((_, last)) => {
                let block = &mut self.blocks[*last as usize];
                if (block.n as usize) < block.places.len() {
                    block.places[block.n as usize] = place;
                    block.n += 1;
                    return;
                }
                block.next = new;
                last
            }
            none => {
                self.waiting[at / 64] |= 1 << (at % 64);
                &mut none.insert((new, new)).1
            }
        };
        *last = new;
        let mut block = Block {
            n: 1,
            ..Block::default()
        };
        block.places[0] = place;
        self.blocks.push(block);
    }

    /// Takes the earliest merge that waits, and its places in the order in which they came.
    fn take_earliest(&mut self, places: &mut Vec<u32>) -> Option<u32> {
        while *self.waiting.get(self.word)? == 0 {
            self.word += 1;
        }
        let bits = &mut self.waiting[self.word];
        let id = self.word as u32 * 64 + bits.trailing_zeros();
        *bits &= *bits - 1;
        places.clear();
        let (mut at, last) = self.lists[id as usize].take()?;
        loop {
            let block = &self.blocks[at as usize];
            places.extend_from_slice(&block.places[..block.n as usize]);
            if at == last {
                return Some(id);
            }
            at = block.next;
        }
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
        fn both_ways_are_the_definition(table in tables(), ids in prop::collection::vec(0u32..5, 1..=SHORT)) {
            let expected = naive(&table, &ids);
            let mut short = ids.clone();
            let n = merge_short::<SHORT>(&table, &mut short);
            prop_assert_eq!(&short[..n], &expected);
            let mut merger = Merger::default();
            for _ in 0..2 {
                let mut long = ids.clone();
                let n = merge_long(&mut merger, &table, &mut long);
                prop_assert_eq!(&long[..n], &expected);
            }
        }

        #[test]
        fn long_repeats(table in tables(), unit in prop::collection::vec(0u32..5, 1..4)) {
            let ids: Vec<u32> = unit.iter().copied().cycle().take(700).collect();
            let mut merged = ids.clone();
            let n = Merger::default().merge(&table, &mut merged);
            prop_assert_eq!(&merged[..n], &naive(&table, &ids));
        }
    }
}
