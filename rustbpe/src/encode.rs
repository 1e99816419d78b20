//! Encoding: text to ids, with a cache from piece to ids, on any number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::key::Key;
use crate::{Error, Splitter, Vocab};

/// Entries of a cache: two megabytes, of which a processor's second-level cache holds a good part.
const CACHE_ENTRIES: usize = 1 << 16;
/// A cached piece has at most this many ids; nearly all have one.
const CACHED_IDS: usize = 3;
/// Threads are given about this many bytes of text at a time.
const CHUNK_BYTES: usize = 1 << 17;

/// What a piece was encoded to when it was last seen. Pieces that share an entry replace one
/// another, so the cache is never full and its size is a constant.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(32))]
struct Entry {
    key: Key,
    ids: [u32; CACHED_IDS],
    n: u32,
}

type Cache = Vec<Entry>;

/// A vocabulary with its splitter, ready to encode.
#[derive(Debug)]
pub struct Encoder {
    splitter: Splitter,
    vocab: Vocab,
    /// caches that no thread uses at the moment; they stay warm from call to call
    caches: Mutex<Vec<Cache>>,
}

/// The ids of several texts end to end.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// in chunks that follow one another
    pub chunks: Vec<Ids>,
    /// how many ids each text has
    pub lengths: Vec<usize>,
}

/// Ids in as few bytes as the vocabulary allows.
#[derive(Debug, PartialEq, Eq)]
pub enum Ids {
    U16(Vec<u16>),
    U32(Vec<u32>),
}

impl Encoder {
    pub fn new(splitter: Splitter, vocab: Vocab) -> Self {
        Self {
            splitter,
            vocab,
            caches: Mutex::default(),
        }
    }

    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    /// The bytes of an id in [`Ids`].
    pub fn id_bytes(&self) -> usize {
        if self.vocab.size() <= 1 << 16 {
            2
        } else {
            4
        }
    }

    /// The ids of a text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut cache = self.take_cache();
        self.encode_into(&self.splitter, text, &mut cache, &mut ids);
        self.give_back(cache);
        ids
    }

    /// The ids of the texts on this many threads, each text behind the id `prepend`.
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        threads: usize,
        prepend: Option<u32>,
        use_cache: bool,
    ) -> Result<Batch, Error> {
        if let Some(id) = prepend.filter(|&id| id as usize >= self.vocab.size()) {
            let vocab_size = self.vocab.size();
            return Err(Error::Id { id, vocab_size });
        }
        let work = self.portions(texts);
        let next = AtomicUsize::new(0);
        let done = Mutex::new(Vec::with_capacity(work.len()));
        let worker = || {
            let mut cache = if use_cache { self.take_cache() } else { Cache::new() };
            // a splitter each, because threads that share a regex wait for its scratch memory
            let splitter = self.splitter.clone();
            let mut ids = Vec::with_capacity(CHUNK_BYTES);
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(portion) = work.get(index) else { break };
                let mut lengths = Vec::with_capacity(portion.len());
                ids.clear();
                for (text, range) in portion {
                    let before = ids.len();
                    if range.start == 0 {
                        ids.extend(prepend);
                    }
                    let text = &texts[*text].as_ref()[range.clone()];
                    self.encode_into(&splitter, text, &mut cache, &mut ids);
                    lengths.push(ids.len() - before);
                }
                let ids = match self.id_bytes() {
                    2 => Ids::U16(ids.iter().map(|&id| id as u16).collect()),
                    _ => Ids::U32(ids.clone()),
                };
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                done.push((index, ids, lengths));
            }
            if use_cache {
                self.give_back(cache);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(work.len()) {
                scope.spawn(worker);
            }
            worker();
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable_by_key(|(index, ..)| *index);
        let mut batch = Batch {
            chunks: Vec::with_capacity(work.len()),
            lengths: vec![0; texts.len()],
        };
        for (index, ids, lengths) in done {
            for ((text, _), n) in work[index].iter().zip(lengths) {
                batch.lengths[*text] += n;
            }
            batch.chunks.push(ids);
        }
        Ok(batch)
    }

    /// The texts in portions of about [`CHUNK_BYTES`]: (text, its bytes). Long texts are cut where
    /// that changes nothing.
    fn portions<T: AsRef<str>>(&self, texts: &[T]) -> Vec<Vec<(usize, Range<usize>)>> {
        let mut portions = Vec::new();
        let (mut portion, mut bytes) = (Vec::new(), 0);
        for (i, text) in texts.iter().enumerate() {
            let text = text.as_ref();
            let mut start = 0;
            loop {
                let mut end = text.len();
                if end - start > 2 * CHUNK_BYTES {
                    end = self.splitter.safe_cut(text, start + CHUNK_BYTES);
                }
                portion.push((i, start..end));
                bytes += end - start;
                start = end;
                if bytes >= CHUNK_BYTES {
                    portions.push(std::mem::take(&mut portion));
                    bytes = 0;
                }
                if start == text.len() {
                    break;
                }
            }
        }
        if !portion.is_empty() {
            portions.push(portion);
        }
        portions
    }

    /// Appends the ids of a text. Without a cache (an empty one) every piece is merged anew.
    fn encode_into(
        &self,
        splitter: &Splitter,
        text: &str,
        cache: &mut [Entry],
        ids: &mut Vec<u32>,
    ) {
        let bytes = text.as_bytes();
        let Ok(cache) = <&mut [Entry; CACHE_ENTRIES]>::try_from(cache) else {
            splitter.for_each(text, |start, end| {
                self.vocab.encode_piece(&bytes[start..end], ids);
            });
            return;
        };
        splitter.for_each(text, |start, end| {
            if end - start > Key::MAX {
                self.vocab.encode_piece(&bytes[start..end], ids);
                return;
            }
            let key = Key::new(bytes, start, end);
            let entry = &mut cache[key.hash() as usize % CACHE_ENTRIES];
            if entry.key != key {
                let before = ids.len();
                self.vocab.encode_piece(&bytes[start..end], ids);
                let new = &ids[before..];
                if new.len() <= CACHED_IDS {
                    entry.key = key;
                    entry.ids[..new.len()].copy_from_slice(new);
                    entry.n = new.len() as u32;
                }
                return;
            }
            ids.push(entry.ids[0]);
            if entry.n > 1 {
                ids.extend_from_slice(&entry.ids[1..entry.n as usize]);
            }
        });
    }

    fn take_cache(&self) -> Cache {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let cache = caches.pop();
        drop(caches);
        cache.unwrap_or_else(|| vec![Entry::default(); CACHE_ENTRIES])
    }

    fn give_back(&self, cache: Cache) {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.push(cache);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::tests::texts;
    use crate::PATTERN;
    use proptest::prelude::*;

    fn encoder(pattern: &str) -> Encoder {
        let merges = [(32, 116), (256, 104), (97, 97), (258, 258), (257, 101), (49, 50), (195, 169)];
        let vocab = Vocab::from_merges(&merges, &["<|bos|>"]).unwrap();
        Encoder::new(Splitter::new(pattern).unwrap(), vocab)
    }

    /// Every piece by itself, without a cache.
    fn plainly(encoder: &Encoder, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        encoder.splitter.for_each(text, |start, end| {
            encoder.vocab.encode_piece(&text.as_bytes()[start..end], &mut ids);
        });
        ids
    }

    fn joined(batch: &Batch) -> Vec<u32> {
        let widen = |ids: &Ids| match ids {
            Ids::U16(ids) => ids.iter().map(|&id| u32::from(id)).collect(),
            Ids::U32(ids) => ids.clone(),
        };
        batch.chunks.iter().flat_map(widen).collect()
    }

    #[test]
    fn long_texts_are_shared_among_threads_and_change_nothing() {
        let encoder = encoder(PATTERN);
        let words = "the aaaa theé 12 aa  taaaa the\n";
        let long: String = words.repeat(5 * CHUNK_BYTES / words.len());
        let texts = [&long[..], "", "the", &"a".repeat(3 * CHUNK_BYTES), &long[..99]];
        let expected: Vec<_> = texts.iter().map(|text| plainly(&encoder, text)).collect();
        for threads in 1..4 {
            let batch = encoder.encode_batch(&texts, threads, None, true).unwrap();
            assert!(batch.chunks.len() > 4);
            assert_eq!(joined(&batch), expected.concat());
            let lengths: Vec<usize> = expected.iter().map(Vec::len).collect();
            assert_eq!(batch.lengths, lengths);
        }
    }

    #[test]
    fn an_id_may_be_put_in_front() {
        let encoder = encoder(PATTERN);
        let bos = encoder.vocab.size() as u32 - 1;
        let batch = encoder.encode_batch(&["the", "", " the"], 1, Some(bos), true).unwrap();
        assert_eq!(joined(&batch), [bos, 116, 104, 101, bos, bos, 260]);
        assert_eq!(batch.lengths, [4, 1, 2]);
        assert!(encoder.encode_batch(&["a"], 1, Some(bos + 1), true).is_err());
    }

    #[test]
    fn no_text_is_no_ids() {
        let none: [&str; 0] = [];
        let batch = encoder(PATTERN).encode_batch(&none, 4, None, true).unwrap();
        assert_eq!(batch, Batch::default());
    }

    proptest! {
        #[test]
        fn the_cache_changes_nothing(texts in prop::collection::vec(texts(), 0..8), threads in 1usize..4, cache in any::<bool>(), regex in any::<bool>()) {
            let pattern = if regex { format!("(?:{PATTERN})") } else { PATTERN.to_owned() };
            let encoder = encoder(&pattern);
            let expected: Vec<_> = texts.iter().map(|text| plainly(&encoder, text)).collect();
            for _ in 0..2 {
                let batch = encoder.encode_batch(&texts, threads, None, cache).unwrap();
                prop_assert_eq!(joined(&batch), expected.concat());
                for (text, ids) in texts.iter().zip(&expected) {
                    prop_assert_eq!(&encoder.encode(text), ids);
                    let mut bytes = Vec::new();
                    encoder.vocab.decode(ids, &mut bytes).unwrap();
                    prop_assert_eq!(&bytes, text.as_bytes());
                }
            }
        }
    }
}
