use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::{Error, Splitter};

/// Two neighbouring ids.
pub type Pair = (u32, u32);

/// The longest token that training makes or that is accepted from outside. Without a limit
/// forty merges, each doubling the last, would ask for a terabyte.
pub const MAX_TOKEN_BYTES: usize = 1024;
/// The largest vocabulary that is trained or accepted from outside.
pub const MAX_VOCAB_SIZE: usize = 1 << 20;
/// Bound on all tokens' bytes together; real vocabularies need about a hundredth of it.
const MAX_TOTAL_BYTES: usize = 1 << 26;

/// A finished vocabulary: encodes and decodes.
#[derive(Debug, Clone)]
pub struct Bpe {
    splitter: Splitter,
    merges: Vec<Pair>,
    /// the id that a pair merges into; the smaller it is, the earlier the pair merges
    merged: FxHashMap<Pair, u32>,
    /// the bytes of every id
    tokens: Vec<Box<[u8]>>,
    /// pieces that are one token: nine words in ten
    whole: FxHashMap<Box<[u8]>, u32>,
}

impl Bpe {
    /// The vocabulary that `merges` describes, after checking that training could have made it.
    pub fn new(splitter: Splitter, merges: Vec<Pair>) -> Result<Self, Error> {
        if 256 + merges.len() > MAX_VOCAB_SIZE {
            return Err(Error::VocabSize(256 + merges.len()));
        }
        let mut tokens: Vec<Box<[u8]>> = (0..=255).map(|b| Box::from([b])).collect();
        let mut merged = FxHashMap::default();
        let mut whole: FxHashMap<Box<[u8]>, u32> =
            (0..=255).map(|b| (Box::from([b]), u32::from(b))).collect();
        let mut total = tokens.len();
        for (k, &(left, right)) in merges.iter().enumerate() {
            let id = 256 + k as u32;
            let refuse =
                |why: &str| Error::Merges(format!("merge {k}, of ids {left} and {right}, {why}"));
            if left >= id || right >= id {
                return Err(refuse("uses an id that does not exist yet"));
            }
            let bytes = [&*tokens[left as usize], &*tokens[right as usize]].concat();
            total += bytes.len();
            if bytes.len() > MAX_TOKEN_BYTES || total > MAX_TOTAL_BYTES {
                return Err(refuse("makes a token that is too long"));
            }
            let bytes = bytes.into_boxed_slice();
            if whole.insert(bytes.clone(), id).is_some() {
                return Err(refuse("makes a token that exists already"));
            }
            merged.insert((left, right), id);
            tokens.push(bytes);
        }
        let mut bpe = Self {
            splitter,
            merges,
            merged,
            tokens,
            whole,
        };
        // A trained token's own bytes always merge into it. Foreign merges may not have that
        // property, and then the short cut would change what a text encodes to.
        let mut whole = std::mem::take(&mut bpe.whole);
        whole.retain(|bytes, id| bpe.merge_piece(bytes) == [*id]);
        bpe.whole = whole;
        Ok(bpe)
    }

    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    pub fn merges(&self) -> &[Pair] {
        &self.merges
    }

    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_with(&self.splitter, text)
    }

    /// Encodes the texts on the threads of the current rayon pool; the order is kept.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Vec<Vec<u32>> {
        texts
            .par_iter()
            // a splitter each, because threads that share one wait for its scratch memory
            .map_init(
                || self.splitter.clone(),
                |splitter, text| self.encode_with(splitter, text.as_ref()),
            )
            .collect()
    }

    fn encode_with(&self, splitter: &Splitter, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 4);
        splitter.for_each(text, |piece| match self.whole.get(piece.as_bytes()) {
            Some(&id) => ids.push(id),
            None => ids.extend(self.merge_piece(piece.as_bytes())),
        });
        ids
    }

    /// Merges the pairs of one piece, earliest merge first and from left to right.
    ///
    /// The ids form a linked list and the candidates wait in a heap, so that `n` bytes take
    /// `O(n log n)` steps; looking for the best pair anew each time would take `O(n²)`.
    fn merge_piece(&self, piece: &[u8]) -> Vec<u32> {
        const NONE: usize = usize::MAX;
        let n = piece.len();
        let mut ids: Vec<Option<u32>> = piece.iter().map(|&b| Some(u32::from(b))).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.checked_sub(1).unwrap_or(NONE)).collect();
        let mut next: Vec<usize> = (1..=n).map(|i| if i < n { i } else { NONE }).collect();
        // the id that the pair at `i` merges into, if it merges
        let candidate = |ids: &[Option<u32>], next: &[usize], i: usize| -> Option<u32> {
            let right = *next.get(i)?;
            let pair = ((*ids.get(i)?)?, (*ids.get(right)?)?);
            self.merged.get(&pair).copied()
        };
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = (0..n)
            .filter_map(|i| Some(Reverse((candidate(&ids, &next, i)?, i))))
            .collect();
        while let Some(Reverse((id, i))) = heap.pop() {
            if candidate(&ids, &next, i) != Some(id) {
                continue; // one of the two was merged with its other neighbour meanwhile
            }
            let right = next[i];
            ids[i] = Some(id);
            ids[right] = None;
            next[i] = next[right];
            if next[i] != NONE {
                previous[next[i]] = i;
            }
            for start in [previous[i], i] {
                if let Some(id) = candidate(&ids, &next, start) {
                    heap.push(Reverse((id, start)));
                }
            }
        }
        ids.into_iter().flatten().collect()
    }

    pub fn decode_bytes(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            let token = self.tokens.get(id as usize).ok_or(Error::Id {
                id,
                vocab_size: self.vocab_size(),
            })?;
            bytes.extend_from_slice(token);
        }
        Ok(bytes)
    }

    /// The text of the ids; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        let bytes = self.decode_bytes(ids)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{count_pieces, train, PATTERN};
    use proptest::prelude::*;
    use std::ops::ControlFlow;

    fn splitter() -> Splitter {
        Splitter::new(PATTERN).unwrap()
    }

    fn trained(texts: &[&str], vocab_size: usize) -> Bpe {
        let counts = count_pieces(&splitter(), texts);
        let merges = train(&counts, vocab_size, &mut |_| ControlFlow::Continue(())).unwrap();
        Bpe::new(splitter(), merges).unwrap()
    }

    /// The definition: the whole list is searched for the earliest pair before every merge.
    fn naive(bpe: &Bpe, piece: &[u8]) -> Vec<u32> {
        let mut ids: Vec<u32> = piece.iter().map(|&b| u32::from(b)).collect();
        loop {
            let best = (1..ids.len())
                .filter_map(|i| Some((*bpe.merged.get(&(ids[i - 1], ids[i]))?, i)))
                .min();
            let Some((id, i)) = best else { return ids };
            ids.splice(i - 1..=i, [id]);
        }
    }

    const TEXT: &str =
        "the cat sat on the mat, then the other cat sat there; aaaa aaaaaaa aaa 1234";

    #[test]
    fn known_merges() {
        // pieces "aaa", " aaa", " aaa": (a, a) occurs six times, then (aa, a) three times
        let bpe = trained(&["aaa aaa aaa"], 258);
        assert_eq!(bpe.merges(), [(97, 97), (256, 97)]);
        assert_eq!(bpe.encode("aaa aaa"), [257, 32, 257]);
    }

    #[test]
    fn impossible_merges_are_refused() {
        let refused =
            |merges: Vec<Pair>| matches!(Bpe::new(splitter(), merges), Err(Error::Merges(_)));
        assert!(refused(vec![(256, 97)]));
        assert!(refused(vec![(97, u32::MAX)]));
        assert!(refused(vec![(97, 98), (97, 98)]));
        assert!(refused(vec![(97, 98), (98, 99), (256, 99), (97, 257)]));
        let doubling = (0..40).map(|k| if k == 0 { (97, 97) } else { (255 + k, 255 + k) });
        assert!(refused(doubling.collect()));
    }

    #[test]
    fn an_id_outside_is_refused() {
        let bpe = trained(&[TEXT], 262);
        assert_eq!(bpe.vocab_size(), 262);
        assert!(bpe.decode(&[261]).is_ok());
        assert_eq!(
            bpe.decode(&[262]),
            Err(Error::Id {
                id: 262,
                vocab_size: 262
            })
        );
    }

    #[test]
    fn half_a_character_decodes_to_the_replacement() {
        let bpe = Bpe::new(splitter(), vec![]).unwrap();
        assert_eq!(bpe.decode(&[104, 0xC3]).unwrap(), "h\u{FFFD}");
        assert_eq!(bpe.decode_bytes(&[104, 0xC3]).unwrap(), [104, 0xC3]);
    }

    #[test]
    fn a_long_piece_is_fast() {
        let bpe = trained(&[TEXT], 300);
        let piece = "a".repeat(1 << 20);
        let ids = bpe.encode(&piece);
        assert_eq!(bpe.decode(&ids).unwrap(), piece);
    }

    #[test]
    fn the_short_cut_is_kept_only_where_it_is_true() {
        // "abc" as (a, bc) can never be reached, because (a, b) merges first
        let bpe = Bpe::new(splitter(), vec![(97, 98), (98, 99), (97, 257)]).unwrap();
        assert_eq!(bpe.encode("abc"), [256, 99]);
    }

    proptest! {
        #[test]
        fn decoding_inverts_encoding(text in any::<String>(), more in "[ aehst]{0,40}") {
            let bpe = trained(&[TEXT], 300);
            for text in [text, more] {
                let ids = bpe.encode(&text);
                prop_assert_eq!(bpe.decode(&ids).unwrap(), text);
            }
        }

        #[test]
        fn encoding_is_the_naive_merge_loop(piece in "[aehst ]{0,60}", corpus in "[aehst ]{0,200}") {
            let bpe = trained(&[&corpus, TEXT], 320);
            prop_assert_eq!(bpe.merge_piece(piece.as_bytes()), naive(&bpe, piece.as_bytes()));
            let mut expected = Vec::new();
            splitter().for_each(&piece, |p| expected.extend(naive(&bpe, p.as_bytes())));
            prop_assert_eq!(bpe.encode(&piece), expected);
        }

        #[test]
        fn arbitrary_merges_never_panic(merges in prop::collection::vec((0u32..300, 0u32..300), 0..40), text in any::<String>()) {
            if let Ok(bpe) = Bpe::new(splitter(), merges) {
                let ids = bpe.encode(&text);
                prop_assert_eq!(bpe.decode(&ids).unwrap(), text);
            }
        }

        #[test]
        fn a_batch_is_its_texts(texts in prop::collection::vec(any::<String>(), 0..8)) {
            let bpe = trained(&[TEXT], 300);
            let one_by_one: Vec<_> = texts.iter().map(|t| bpe.encode(t)).collect();
            prop_assert_eq!(bpe.encode_batch(&texts), one_by_one);
        }
    }
}
