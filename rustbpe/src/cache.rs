//! What short pieces were encoded to when they were last seen.

use crate::key::Key;

/// Places for two pieces each: eight megabytes. What is looked up often stays near the processor
/// by itself.
const PLACES: usize = 1 << 17;
/// Ids that an entry holds by itself; nearly all pieces have one.
pub const FEW: usize = 3;
/// When the ids of pieces that have more are so many, the cache begins anew.
const MOST_MORE: usize = 1 << 20;

/// A piece and its ids.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entry {
    key: Key,
    /// the ids, or where they begin in `more` if they are not few
    pub ids: [u32; FEW],
    /// zero where there is no piece
    pub n: u32,
}

/// The two pieces of a hash that were seen last, the newer one first: so the cache is never full,
/// and its size is a constant. One line of a processor's cache.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Place([Entry; 2]);

/// A table from piece to ids that forgets what has not been seen for long.
#[derive(Debug)]
pub struct Cache {
    places: Box<[Place; PLACES]>,
    more: Vec<u32>,
}

impl Cache {
    pub fn new() -> Self {
        let places = vec![Place::default(); PLACES].into_boxed_slice();
        Self {
            places: places.try_into().expect("it has this length"),
            more: Vec::new(),
        }
    }

    #[inline(always)]
    fn place_of(key: &Key) -> usize {
        key.hash() as usize % PLACES
    }

    /// Touches the places of several pieces, so that the processor waits for their memory at once
    /// and not for one after the other. That wait is most of what encoding costs.
    #[inline(always)]
    pub fn touch<'k>(&self, keys: impl Iterator<Item = &'k Key>) {
        let touched = keys.map(|key| self.places[Self::place_of(key)].0[0].n);
        std::hint::black_box(touched.fold(0, u32::max));
    }

    /// The entry of a piece, if it is there.
    #[inline(always)]
    pub fn get(&mut self, key: &Key) -> Option<Entry> {
        let [newer, older] = &mut self.places[Self::place_of(key)].0;
        if newer.key != *key {
            if older.key != *key {
                return None;
            }
            std::mem::swap(newer, older);
        }
        Some(*newer)
    }

    /// The ids of an entry that has more than a few.
    pub fn ids(&self, entry: &Entry) -> &[u32] {
        let start = entry.ids[0] as usize;
        &self.more[start..start + entry.n as usize]
    }

    /// Adds a piece that is not there.
    pub fn insert(&mut self, key: Key, ids: &[u32]) {
        let mut entry = Entry {
            key,
            ids: [0; FEW],
            n: ids.len() as u32,
        };
        if ids.len() <= FEW {
            entry.ids[..ids.len()].copy_from_slice(ids);
        } else {
            if self.more.len() > MOST_MORE {
                *self = Self::new();
            }
            entry.ids[0] = self.more.len() as u32;
            self.more.extend_from_slice(ids);
        }
        let place = &mut self.places[Self::place_of(&key)].0;
        *place = [entry, place[0]];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up(cache: &mut Cache, key: &Key) -> Option<Vec<u32>> {
        let entry = cache.get(key)?;
        Some(match entry.n as usize {
            n if n <= FEW => entry.ids[..n].to_vec(),
            _ => cache.ids(&entry).to_vec(),
        })
    }

    #[test]
    fn it_forgets_but_is_never_wrong() {
        let piece = |i: u32| Key::new(&i.to_le_bytes(), 0, 4);
        let ids = |i: u32| (0..1 + i % 8).map(|k| i + k).collect::<Vec<_>>();
        let mut cache = Cache::new();
        let pieces = 500_000; // more than it holds, and more ids than it keeps
        for i in 0..pieces {
            assert_eq!(look_up(&mut cache, &piece(i)), None);
            cache.insert(piece(i), &ids(i));
            assert_eq!(look_up(&mut cache, &piece(i)), Some(ids(i)));
        }
        let mut kept = 0;
        for i in 0..pieces {
            if let Some(found) = look_up(&mut cache, &piece(i)) {
                assert_eq!(found, ids(i));
                kept += 1;
            }
        }
        assert!(0 < kept && kept < 2 * PLACES, "{kept}");
    }

    #[test]
    fn the_older_of_two_makes_room() {
        let mut cache = Cache::new();
        let place = |i: u32| Cache::place_of(&Key::new(&i.to_le_bytes(), 0, 4));
        let same: Vec<u32> = (0..).filter(|&i| place(i) == place(0)).take(3).collect();
        let [a, b, c] = [0, 1, 2].map(|k| Key::new(&same[k].to_le_bytes(), 0, 4));
        cache.insert(a, &[1]);
        cache.insert(b, &[2]);
        assert_eq!(look_up(&mut cache, &a), Some(vec![1])); // now b is the older
        cache.insert(c, &[3]);
        assert_eq!(look_up(&mut cache, &b), None);
        assert_eq!(look_up(&mut cache, &a), Some(vec![1]));
        assert_eq!(look_up(&mut cache, &c), Some(vec![3]));
    }
}
