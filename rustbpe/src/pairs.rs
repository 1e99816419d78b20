//! The table that is asked most: which id do two neighbouring ids merge into?

use crate::Pair;

/// Ids fit in this many bits, so that a pair and its id fit in one word.
pub const ID_BITS: u32 = 20;
const EMPTY: u64 = u64::MAX;

/// A map from pairs to ids with open addressing, at most half full.
#[derive(Debug, Clone)]
pub struct PairTable {
    /// `left << 40 | right << 20 | id`
    slots: Vec<u64>,
}

impl PairTable {
    /// An empty table with room for this many pairs.
    pub fn with_capacity(pairs: usize) -> Self {
        Self {
            slots: vec![EMPTY; (pairs.max(8) * 2).next_power_of_two()],
        }
    }

    #[inline(always)]
    fn key((left, right): Pair) -> u64 {
        u64::from(left) << ID_BITS | u64::from(right)
    }

    /// Where the search for a key begins: the product's high bits depend on all of the key's.
    #[inline(always)]
    fn home(&self, key: u64) -> usize {
        let mixed = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    /// Adds a pair that is not there yet. All ids must be below `1 << ID_BITS`.
    pub fn insert(&mut self, pair: Pair, id: u32) {
        let key = Self::key(pair);
        let mut slot = self.home(key);
        while self.slots[slot] != EMPTY {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = key << ID_BITS | u64::from(id);
    }

    #[inline(always)]
    pub fn get(&self, pair: Pair) -> Option<u32> {
        let key = Self::key(pair);
        let mut slot = self.home(key);
        loop {
            // the mask is the bound that the compiler would check
            let found = self.slots[slot & (self.slots.len() - 1)];
            if found >> ID_BITS == key {
                return Some((found & ((1 << ID_BITS) - 1)) as u32);
            }
            if found == EMPTY {
                return None;
            }
            slot += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn it_is_a_map(pairs in prop::collection::hash_map((0u32..40, 0u32..(1 << ID_BITS)), 0u32..(1 << ID_BITS), 0..200)) {
            let mut table = PairTable::with_capacity(pairs.len());
            for (&pair, &id) in &pairs {
                table.insert(pair, id);
            }
            for (&pair, &id) in &pairs {
                prop_assert_eq!(table.get(pair), Some(id));
            }
            let absent: HashMap<_, _> = (0..40).map(|l| ((l, l), 0)).collect();
            for &pair in absent.keys() {
                prop_assert_eq!(table.get(pair), pairs.get(&pair).copied());
            }
        }
    }
}
