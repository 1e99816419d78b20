//! A finished vocabulary: what every id stands for, and what merges into it.

use rustc_hash::FxHashSet;

use crate::merge::Merger;
use crate::pairs::{PairTable, ID_BITS};
use crate::{hash, Error};

/// Two neighbouring ids.
pub type Pair = (u32, u32);

/// The longest token that training makes or that is accepted from outside. Without a limit
/// forty merges, each doubling the last, would ask for a terabyte.
pub const MAX_TOKEN_BYTES: usize = 1024;
/// The largest vocabulary that is trained or accepted from outside, special tokens included.
pub const MAX_VOCAB_SIZE: usize = 1 << ID_BITS;
/// Bound on all tokens' bytes together; real vocabularies need a fiftieth of it.
const MAX_TOTAL_BYTES: usize = 1 << 25;
/// Longer pieces are merged in parts of this many bytes.
const MAX_PIECE_BYTES: usize = 1 << 30;

/// Tokens in the order in which they merge, and special tokens behind them.
///
/// A piece that is a token becomes that token. In every other piece those neighbours merge first
/// whose union is the earliest token, as in tiktoken. For tokens that were trained this is the
/// same as doing the merges in their order: a token's bytes by themselves merge as they did in
/// training, up to the two parts that were its merge.
#[derive(Debug, Clone)]
pub struct Vocab {
    /// all tokens' bytes end to end, special tokens' names included, and some padding
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]` is the token `id`
    ends: Vec<u32>,
    n_special: usize,
    byte_ids: [u32; 256],
    pairs: PairTable,
    /// what each token is merged from; None for bytes, and for tokens that no merges reach
    merges: Vec<Option<Pair>>,
    whole: Vec<u32>,
}

/// Bytes behind the last token, so that a copy may be longer than its token.
const PADDING: usize = 16;
const FREE: u32 = u32::MAX;

impl Vocab {
    /// The vocabulary of these tokens, which must hold every single byte. Merges follow from the
    /// order: a token is merged from the two parts that the tokens before it make of its bytes.
    pub fn new<T: AsRef<[u8]>, S: AsRef<str>>(tokens: &[T], special: &[S]) -> Result<Self, Error> {
        let size = tokens.len() + special.len();
        if !(256..=MAX_VOCAB_SIZE).contains(&size) || tokens.len() < 256 {
            return Err(Error::VocabSize(size));
        }
        let mut vocab = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(size),
            n_special: special.len(),
            byte_ids: [FREE; 256],
            pairs: PairTable::with_capacity(tokens.len()),
            merges: vec![None; tokens.len()],
            whole: vec![FREE; (tokens.len() * 2).next_power_of_two()],
        };
        for (id, token) in tokens.iter().enumerate() {
            let token = token.as_ref();
            if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
                let n = token.len();
                return Err(Error::Tokens(format!(
                    "token {id} has {n} bytes: it must have 1 to {MAX_TOKEN_BYTES}"
                )));
            }
            vocab.push(token)?;
            vocab.insert_whole(id as u32)?;
            if let [byte] = token {
                vocab.byte_ids[*byte as usize] = id as u32;
            }
        }
        if let Some(byte) = vocab.byte_ids.iter().position(|&id| id == FREE) {
            return Err(Error::Tokens(format!("no token is the byte 0x{byte:02x}")));
        }
        let mut seen = FxHashSet::default();
        for (k, name) in special.iter().enumerate() {
            let name = name.as_ref();
            let again = !seen.insert(name);
            if name.is_empty() || name.len() > MAX_TOKEN_BYTES || again {
                let why = if again {
                    "is there twice"
                } else {
                    "has no usable length"
                };
                let id = tokens.len() + k;
                return Err(Error::Tokens(format!("special token {id} {why}")));
            }
            // without `insert_whole` and merges, so that no text becomes a special token
            vocab.push(name.as_bytes())?;
        }
        vocab.bytes.extend_from_slice(&[0; PADDING]);
        vocab.find_merges()?;
        Ok(vocab)
    }

    /// The vocabulary that training made: every byte, then a token for each merge.
    pub fn from_merges<S: AsRef<str>>(merges: &[Pair], special: &[S]) -> Result<Self, Error> {
        if 256 + merges.len() > MAX_VOCAB_SIZE {
            return Err(Error::VocabSize(256 + merges.len()));
        }
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|b| vec![b]).collect();
        let refuse = |k: usize, why: &str| {
            let (left, right) = merges[k];
            Error::Tokens(format!("merge {k}, of ids {left} and {right}, {why}"))
        };
        let mut total = 0;
        for (k, &(left, right)) in merges.iter().enumerate() {
            let (Some(l), Some(r)) = (tokens.get(left as usize), tokens.get(right as usize)) else {
                return Err(refuse(k, "uses an id that does not exist yet"));
            };
            let token = [&l[..], &r[..]].concat();
            total += token.len();
            if token.len() > MAX_TOKEN_BYTES || total > MAX_TOTAL_BYTES {
                return Err(refuse(k, "makes a token that is too long"));
            }
            tokens.push(token);
        }
        let vocab = Self::new(&tokens, special)?;
        for (k, &pair) in merges.iter().enumerate() {
            if vocab.merges[256 + k] != Some(pair) {
                return Err(refuse(k, "can never happen after the merges before it"));
            }
        }
        Ok(vocab)
    }

    fn push(&mut self, token: &[u8]) -> Result<(), Error> {
        self.bytes.extend_from_slice(token);
        if self.bytes.len() > MAX_TOTAL_BYTES {
            let most = MAX_TOTAL_BYTES;
            return Err(Error::Tokens(format!(
                "the tokens together have more than {most} bytes"
            )));
        }
        self.ends.push(self.bytes.len() as u32);
        Ok(())
    }

    fn insert_whole(&mut self, id: u32) -> Result<(), Error> {
        let mut slot = self.whole_slot(self.token(id));
        while self.whole[slot] != FREE {
            let other = self.whole[slot];
            if self.token(other) == self.token(id) {
                return Err(Error::Tokens(format!(
                    "tokens {other} and {id} are the same"
                )));
            }
            slot = (slot + 1) & (self.whole.len() - 1);
        }
        self.whole[slot] = id;
        Ok(())
    }

    fn whole_slot(&self, piece: &[u8]) -> usize {
        hash(piece) as usize & (self.whole.len() - 1)
    }

    fn find_merges(&mut self) -> Result<(), Error> {
        let tokens = 0..self.n_tokens() as u32;
        let mut merger = Merger::default();
        for id in tokens.clone() {
            if let Some(pair) = self.two_parts(id, &mut merger) {
                self.pairs.insert(pair, id);
                self.merges[id as usize] = Some(pair);
            }
        }
        // What the tokens before it do not make, the tokens behind it must not make either: a
        // merge that makes an earlier one possible would have to come before itself.
        for id in tokens {
            let unmade = self.merges[id as usize].is_none();
            if unmade && self.two_parts(id, &mut merger).is_some() {
                let why = format!("token {id} is made of tokens that come after it");
                return Err(Error::Tokens(why));
            }
        }
        Ok(())
    }

    /// The two ids that the merges so far make of a token, if it is two.
    fn two_parts(&self, id: u32, merger: &mut Merger) -> Option<Pair> {
        let bytes = self.token(id).iter();
        let mut parts: Vec<u32> = bytes.map(|&b| self.byte_ids[b as usize]).collect();
        let two = parts.len() > 1 && merger.merge(&self.pairs, &mut parts) == 2;
        two.then(|| (parts[0], parts[1]))
    }

    /// How many ids there are, special tokens included.
    pub fn size(&self) -> usize {
        self.ends.len()
    }

    /// How many ids a text can become.
    pub fn n_tokens(&self) -> usize {
        self.merges.len()
    }

    /// What each token is merged from: None for bytes, and for tokens that no merges reach.
    pub fn merges(&self) -> &[Option<Pair>] {
        &self.merges
    }

    /// The ids of the single bytes.
    pub fn byte_ids(&self) -> &[u32; 256] {
        &self.byte_ids
    }

    /// The bytes of an id below `size()`.
    #[inline]
    pub fn token(&self, id: u32) -> &[u8] {
        &self.bytes[self.start(id)..self.ends[id as usize] as usize]
    }

    #[inline]
    fn start(&self, id: u32) -> usize {
        match id {
            0 => 0,
            _ => self.ends[id as usize - 1] as usize,
        }
    }

    /// The names of the special tokens, whose ids are the last.
    pub fn special_tokens(&self) -> impl Iterator<Item = String> + '_ {
        let first = self.size() - self.n_special;
        (first..self.size()).map(|id| String::from_utf8_lossy(self.token(id as u32)).into_owned())
    }

    /// The id of a piece that is a token.
    #[inline]
    pub fn whole(&self, piece: &[u8]) -> Option<u32> {
        let mut slot = self.whole_slot(piece);
        loop {
            let id = self.whole[slot];
            if id == FREE {
                return None;
            }
            if self.token(id) == piece {
                return Some(id);
            }
            slot = (slot + 1) & (self.whole.len() - 1);
        }
    }

    /// Appends the ids of one piece.
    pub fn encode_piece(&self, piece: &[u8], merger: &mut Merger, ids: &mut Vec<u32>) {
        if piece.len() <= MAX_TOKEN_BYTES {
            if let Some(id) = self.whole(piece) {
                ids.push(id);
                return;
            }
        }
        for part in piece.chunks(MAX_PIECE_BYTES) {
            let start = ids.len();
            ids.extend(part.iter().map(|&b| self.byte_ids[b as usize]));
            let n = merger.merge(&self.pairs, &mut ids[start..]);
            ids.truncate(start + n);
        }
    }

    /// The bytes of the ids; those of a special token are its name.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut length = 0;
        for &id in ids {
            if id as usize >= self.size() {
                let vocab_size = self.size();
                return Err(Error::Id { id, vocab_size });
            }
            length += self.token(id).len();
        }
        // Nearly all tokens are short, and copying sixteen bytes is one instruction where copying
        // as many as there are is a call. What is too much, the next token writes over.
        let mut bytes = vec![0; length + PADDING];
        let mut at = 0;
        for &id in ids {
            let token = self.token(id);
            let start = self.start(id);
            if token.len() <= PADDING {
                let padded = &self.bytes[start..start + PADDING];
                bytes[at..at + PADDING].copy_from_slice(padded);
            } else {
                bytes[at..at + token.len()].copy_from_slice(token);
            }
            at += token.len();
        }
        bytes.truncate(length);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NONE: [&str; 0] = [];

    fn single_bytes() -> Vec<Vec<u8>> {
        (0..=255).map(|b| vec![b]).collect()
    }

    fn encode(vocab: &Vocab, piece: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        vocab.encode_piece(piece.as_bytes(), &mut Merger::default(), &mut ids);
        ids
    }

    /// tiktoken's rule, word for word.
    fn by_ranks(tokens: &[Vec<u8>], piece: &[u8]) -> Vec<u32> {
        let rank = |bytes: &[u8]| tokens.iter().position(|t| t == bytes);
        if let Some(id) = rank(piece) {
            return vec![id as u32];
        }
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|&b| vec![b]).collect();
        loop {
            let union = |i: usize| [&parts[i - 1][..], &parts[i][..]].concat();
            let best = (1..parts.len())
                .filter_map(|i| Some((rank(&union(i))?, i)))
                .min();
            let Some((_, i)) = best else { break };
            let merged = union(i);
            parts.splice(i - 1..=i, [merged]);
        }
        parts.iter().map(|p| rank(p).unwrap() as u32).collect()
    }

    #[test]
    fn merges_make_tokens() {
        let vocab = Vocab::from_merges(&[(97, 97), (256, 97)], &["<|bos|>"]).unwrap();
        assert_eq!((vocab.size(), vocab.n_tokens()), (259, 258));
        assert_eq!(encode(&vocab, "aaaaa"), [256, 257]);
        assert_eq!(vocab.decode(&[257, 258]).unwrap(), b"aaa<|bos|>");
        assert_eq!(vocab.special_tokens().collect::<Vec<_>>(), ["<|bos|>"]);
    }

    #[test]
    fn impossible_merges_are_refused() {
        let refused = |merges: &[Pair]| {
            let result = Vocab::from_merges(merges, &NONE);
            assert!(matches!(result, Err(Error::Tokens(_))), "{result:?}");
        };
        refused(&[(256, 97)]);
        refused(&[(97, u32::MAX)]);
        refused(&[(97, 98), (97, 98)]);
        refused(&[(97, 98), (98, 99), (256, 99), (97, 257)]);
        // "abc" as (a, bc) can never be reached, because (a, b) merges first
        refused(&[(97, 98), (98, 99), (97, 257)]);
        let doubling = |k: u32| if k == 0 { (97, 97) } else { (255 + k, 255 + k) };
        refused(&(0..40).map(doubling).collect::<Vec<_>>());
    }

    #[test]
    fn impossible_tokens_are_refused() {
        let with = |more: &[&[u8]]| {
            let mut tokens = single_bytes();
            tokens.extend(more.iter().map(|t| t.to_vec()));
            Vocab::new(&tokens, &NONE)
        };
        assert!(with(&[b"ab"]).is_ok());
        assert!(with(&[b""]).is_err());
        assert!(with(&[b"ab", b"ab"]).is_err());
        assert!(with(&[&[b'a'; MAX_TOKEN_BYTES + 1]]).is_err());
        assert!(Vocab::new(&single_bytes()[1..], &NONE).is_err());
        let mut no_zero = single_bytes();
        no_zero[0] = b"ab".to_vec();
        assert!(Vocab::new(&no_zero, &NONE).is_err());
        assert!(Vocab::new(&single_bytes(), &["<|x|>", "<|x|>"]).is_err());
        assert!(Vocab::new(&single_bytes(), &[""]).is_err());
    }

    #[test]
    fn many_special_tokens_take_no_longer_than_others() {
        let mut names: Vec<String> = (0..500_000).map(|i| format!("<|{i}|>")).collect();
        let started = std::time::Instant::now();
        assert!(Vocab::new(&single_bytes(), &names).is_ok());
        names.push(names[0].clone());
        assert!(Vocab::new(&single_bytes(), &names).is_err());
        assert!(started.elapsed().as_secs() < 20); // with every pair compared it was hours
    }

    #[test]
    fn a_token_that_no_merge_reaches_is_still_a_whole_piece() {
        let mut tokens = single_bytes();
        tokens.push(b"abc".to_vec());
        let vocab = Vocab::new(&tokens, &NONE).unwrap();
        assert_eq!(vocab.merges()[256], None);
        assert_eq!(encode(&vocab, "abc"), [256]);
        assert_eq!(encode(&vocab, "abcd"), [97, 98, 99, 100]);
    }

    #[test]
    fn an_id_outside_is_refused() {
        let vocab = Vocab::from_merges(&[(97, 98)], &NONE).unwrap();
        assert_eq!(vocab.decode(&[256]).unwrap(), b"ab");
        let outside = Error::Id {
            id: 257,
            vocab_size: 257,
        };
        assert_eq!(vocab.decode(&[257]), Err(outside));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// For any tokens in any order, trained or not, and wherever the single bytes stand.
        #[test]
        fn encoding_is_the_rule_of_ranks(
            more in prop::collection::hash_set("[abc]{2,6}", 0..40),
            pieces in prop::collection::vec("[abcd]{1,30}", 1..8),
            order in prop::option::of(any::<u64>()),
        ) {
            let mut tokens = single_bytes();
            tokens.extend(more.into_iter().map(String::into_bytes));
            let n = tokens.len();
            for i in 0..order.map_or(0, |_| n) {
                let other = order.unwrap_or(0).rotate_left(i as u32 % 64) % n as u64;
                tokens.swap(i, other as usize);
            }
            // a token that is made of later ones is refused
            let Ok(vocab) = Vocab::new(&tokens, &NONE) else { return Ok(()) };
            for piece in pieces {
                let ids = encode(&vocab, &piece);
                prop_assert_eq!(&ids, &by_ranks(&tokens, piece.as_bytes()));
                prop_assert_eq!(vocab.decode(&ids).unwrap(), piece.into_bytes());
            }
        }

        #[test]
        fn arbitrary_merges_never_panic(merges in prop::collection::vec((0u32..300, 0u32..300), 0..40), piece in any::<String>()) {
            if let Ok(vocab) = Vocab::from_merges(&merges, &NONE) {
                let ids = encode(&vocab, &piece);
                prop_assert_eq!(vocab.decode(&ids).unwrap(), piece.into_bytes());
            }
        }
    }
}
