//! Encoding: text to ids, with a cache from piece to ids, on any number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, TrySendError};
use std::sync::{Arc, Mutex};

use crate::cache::{Cache, Entry, FEW};
use crate::key::Key;
use crate::merge::Merger;
use crate::{lock, Error, Splitter, Vocab};

/// Pieces that are looked up together.
const TOGETHER: usize = 64;
/// Threads are given about this many bytes of text at a time.
const CHUNK_BYTES: usize = 1 << 17;

/// What a thread that encodes has for itself.
#[derive(Debug, Default)]
struct Memory {
    /// without a cache every piece is merged anew
    cache: Option<Cache>,
    merger: Merger,
}

/// A vocabulary with its splitter, ready to encode.
#[derive(Debug)]
pub struct Encoder {
    splitter: Splitter,
    vocab: Vocab,
    /// what no thread uses at the moment: caches stay warm from call to call
    memories: Mutex<Vec<Memory>>,
}

/// How a batch is encoded.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub threads: usize,
    /// an id to put in front of every text
    pub prepend: Option<u32>,
    /// without the cache every piece is merged anew
    pub cache: bool,
}

/// The ids of several texts.
#[derive(Debug)]
pub struct Batch {
    /// by the order of the texts
    encoded: Vec<(usize, Ids)>,
    /// how many ids each text has
    pub lengths: Vec<usize>,
}

impl Batch {
    /// The ids end to end, in chunks that follow one another.
    pub fn chunks(&self) -> impl Iterator<Item = &Ids> {
        self.encoded.iter().map(|(_, ids)| ids)
    }

    /// Takes what the threads have done, and lets go of its texts.
    fn collect<T>(&mut self, done: &Mutex<Vec<Encoded<T>>>) {
        let done = std::mem::take(&mut *lock(done));
        for Encoded {
            portion,
            ids,
            lengths,
        } in done
        {
            for ((text, ..), n) in portion.parts.iter().zip(lengths) {
                self.lengths[*text] += n;
            }
            self.encoded.push((portion.index, ids));
        }
    }
}

/// What a thread is given at a time: parts of texts (the text's number, the text, its bytes).
#[derive(Debug)]
struct Portion<T> {
    index: usize,
    bytes: usize,
    parts: Vec<(usize, Arc<T>, Range<usize>)>,
}

impl<T> Default for Portion<T> {
    fn default() -> Self {
        Self {
            index: 0,
            bytes: 0,
            parts: Vec::new(),
        }
    }
}

/// What a thread makes of a portion. It holds the texts, too: the thread that reads them lets go of
/// them.
#[derive(Debug)]
struct Encoded<T> {
    portion: Portion<T>,
    ids: Ids,
    /// how many ids each part has
    lengths: Vec<usize>,
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
            memories: Mutex::default(),
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
        let ids = self.encode_or_stop(text, || Ok::<(), std::convert::Infallible>(()));
        ids.unwrap_or_else(|never| match never {})
    }

    /// The ids of a text, or the error of `look`, which is asked again and again in a long text.
    pub fn encode_or_stop<E>(
        &self,
        text: &str,
        mut look: impl FnMut() -> Result<(), E>,
    ) -> Result<Vec<u32>, E> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut memory = self.take_memory();
        let mut start = 0;
        while start < text.len() {
            let end = self.next_cut(text, start);
            self.encode_into(&self.splitter, &text[start..end], &mut memory, &mut ids);
            start = end;
            look()?;
        }
        lock(&self.memories).push(memory);
        Ok(ids)
    }

    /// Where a part of a text that begins here may end: a long text is cut where that changes nothing.
    fn next_cut(&self, text: &str, start: usize) -> usize {
        if text.len() - start > 2 * CHUNK_BYTES {
            self.splitter.safe_cut(text, start + CHUNK_BYTES)
        } else {
            text.len()
        }
    }

    /// The ids of the texts on this many threads.
    ///
    /// This thread reads the texts while others encode. Where they do not keep up, and in the end, it
    /// encodes too, in a call of `detached`, which may give up a lock for as long as it calls what it
    /// is given. An error of `detached`, as of a text, ends the work at once.
    pub fn encode_batch<T, E>(
        &self,
        texts: impl IntoIterator<Item = Result<T, E>>,
        options: Options,
        mut detached: impl FnMut(&mut (dyn FnMut() + Send)) -> Result<(), E>,
    ) -> Result<Batch, E>
    where
        T: AsRef<str> + Send + Sync,
        E: From<Error>,
    {
        let vocab_size = self.vocab.size();
        match options.prepend {
            Some(id) if id as usize >= vocab_size => {
                return Err(Error::Id { id, vocab_size }.into());
            }
            _ => {}
        }
        let (sender, receiver) = sync_channel::<Portion<T>>(2 * options.threads);
        let receiver = Mutex::new(receiver);
        let done = Mutex::new(Vec::new());
        let stopped = AtomicBool::new(false);
        // encodes portions for as long as there are any
        let work = |next: &mut dyn FnMut() -> Option<Portion<T>>| {
            let mut memory = match options.cache {
                true => self.take_memory(),
                false => Memory::default(),
            };
            // a splitter each, because threads that share a regex wait for its scratch memory
            let splitter = self.splitter.clone();
            let mut ids = Vec::new();
            while let Some(portion) = next() {
                ids.clear();
                let lengths = self.encode_portion(
                    &splitter,
                    &portion,
                    options.prepend,
                    &mut memory,
                    &mut ids,
                );
                let ids = match self.id_bytes() {
                    2 => Ids::U16(ids.iter().map(|&id| id as u16).collect()),
                    _ => Ids::U32(ids.clone()),
                };
                lock(&done).push(Encoded {
                    portion,
                    ids,
                    lengths,
                });
            }
            if options.cache {
                lock(&self.memories).push(memory);
            }
        };
        let next = || match stopped.load(Ordering::Relaxed) {
            true => None,
            false => lock(&receiver).recv().ok(),
        };
        let mut batch = Batch {
            encoded: Vec::new(),
            lengths: Vec::new(),
        };
        let result = std::thread::scope(|scope| {
            let mut workers = 1; // this thread
            let read = || -> Result<(), E> {
                let mut send = |batch: &mut Batch, portion: Portion<T>| -> Result<(), E> {
                    if workers < options.threads {
                        scope.spawn(|| work(&mut || next()));
                        workers += 1;
                    }
                    if let Err(TrySendError::Full(portion)) = sender.try_send(portion) {
                        let mut portion = Some(portion);
                        detached(&mut || work(&mut || portion.take()))?;
                    }
                    batch.collect(&done);
                    Ok(())
                };
                let mut portion = Portion::default();
                for text in texts {
                    batch.lengths.push(0);
                    self.deal_out(&mut batch, text?, &mut portion, &mut send)?;
                }
                let mut last = Some(portion);
                detached(&mut || work(&mut || last.take()))
            };
            let result = read();
            stopped.store(result.is_err(), Ordering::Relaxed);
            drop(sender);
            result?;
            detached(&mut || work(&mut || next()))
        });
        result?;
        batch.collect(&done);
        batch.encoded.sort_unstable_by_key(|&(index, _)| index);
        Ok(batch)
    }

    /// Adds a text to a portion, and sends portions that are full on.
    fn deal_out<T: AsRef<str>, E>(
        &self,
        batch: &mut Batch,
        text: T,
        portion: &mut Portion<T>,
        send: &mut impl FnMut(&mut Batch, Portion<T>) -> Result<(), E>,
    ) -> Result<(), E> {
        let number = batch.lengths.len() - 1;
        let text = Arc::new(text);
        let length = (*text).as_ref().len();
        let mut start = 0;
        loop {
            if portion.bytes >= CHUNK_BYTES {
                let next = Portion {
                    index: portion.index + 1,
                    ..Portion::default()
                };
                send(batch, std::mem::replace(portion, next))?;
            }
            let end = self.next_cut((*text).as_ref(), start);
            portion.bytes += end - start;
            portion.parts.push((number, Arc::clone(&text), start..end));
            start = end;
            if start == length {
                return Ok(());
            }
        }
    }

    /// Appends the ids of a portion, and says how many each of its parts has.
    fn encode_portion<T: AsRef<str>>(
        &self,
        splitter: &Splitter,
        portion: &Portion<T>,
        prepend: Option<u32>,
        memory: &mut Memory,
        ids: &mut Vec<u32>,
    ) -> Vec<usize> {
        let parts = portion.parts.iter().map(|(_, text, range)| {
            let before = ids.len();
            if range.start == 0 {
                ids.extend(prepend);
            }
            let text = &(**text).as_ref()[range.clone()];
            self.encode_into(splitter, text, memory, ids);
            ids.len() - before
        });
        parts.collect()
    }

    /// Appends the ids of a text.
    fn encode_into(
        &self,
        splitter: &Splitter,
        text: &str,
        memory: &mut Memory,
        ids: &mut Vec<u32>,
    ) {
        let bytes = text.as_bytes();
        let Memory { cache, merger } = memory;
        let Some(cache) = cache else {
            splitter.for_each(text, |start, end| {
                self.vocab.encode_piece(&bytes[start..end], merger, ids);
            });
            return;
        };
        let mut waiting = [(Key::default(), 0, 0); TOGETHER];
        let mut n = 0;
        splitter.for_each(text, |start, end| {
            let is_short = end - start <= Key::MAX;
            if n == TOGETHER || !is_short {
                self.look_up(bytes, &waiting[..n], cache, merger, ids);
                n = 0;
            }
            if is_short {
                waiting[n] = (Key::new(bytes, start, end), start, end);
                n += 1;
            } else {
                self.vocab.encode_piece(&bytes[start..end], merger, ids);
            }
        });
        self.look_up(bytes, &waiting[..n], cache, merger, ids);
    }

    /// Appends the ids of up to [`TOGETHER`] short pieces of a text: their keys, and where they
    /// start and end.
    fn look_up(
        &self,
        text: &[u8],
        pieces: &[(Key, usize, usize)],
        cache: &mut Cache,
        merger: &mut Merger,
        ids: &mut Vec<u32>,
    ) {
        cache.touch(pieces.iter().map(|(key, ..)| key));
        // All of an entry's ids are written, and then only those kept that count: that is quicker
        // than to ask how many there are.
        let mut found = [0; FEW * TOGETHER];
        let mut n = 0;
        for &(key, start, end) in pieces {
            let entry = cache.get(&key);
            if let Some(Entry { ids, n: few, .. }) = entry.filter(|entry| entry.n <= FEW as u32) {
                found[n..n + FEW].copy_from_slice(&ids);
                n += few as usize;
                continue;
            }
            ids.extend_from_slice(&found[..n]);
            n = 0;
            if let Some(entry) = entry {
                ids.extend_from_slice(cache.ids(&entry));
            } else {
                let before = ids.len();
                self.vocab.encode_piece(&text[start..end], merger, ids);
                cache.insert(key, &ids[before..]);
            }
        }
        ids.extend_from_slice(&found[..n]);
    }

    fn take_memory(&self) -> Memory {
        let memory = lock(&self.memories).pop();
        memory.unwrap_or_else(|| Memory {
            cache: Some(Cache::new()),
            merger: Merger::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::tests::texts;
    use crate::PATTERN;
    use proptest::prelude::*;

    fn encoder(pattern: &str) -> Encoder {
        let merges = [
            (32, 116),
            (256, 104),
            (97, 97),
            (258, 258),
            (257, 101),
            (49, 50),
            (195, 169),
        ];
        let vocab = Vocab::from_merges(&merges, &["<|bos|>"]).unwrap();
        Encoder::new(Splitter::new(pattern).unwrap(), vocab)
    }

    /// Every piece by itself, without a cache.
    fn plainly(encoder: &Encoder, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        encoder.splitter.for_each(text, |start, end| {
            let piece = &text.as_bytes()[start..end];
            encoder
                .vocab
                .encode_piece(piece, &mut Merger::default(), &mut ids);
        });
        ids
    }

    fn batch<T: AsRef<str> + Send + Sync>(
        encoder: &Encoder,
        texts: &[T],
        threads: usize,
        prepend: Option<u32>,
        cache: bool,
    ) -> Result<(Vec<u32>, Vec<usize>), Error> {
        let options = Options {
            threads,
            prepend,
            cache,
        };
        let texts = texts.iter().map(|text| Ok(text.as_ref()));
        let batch = encoder.encode_batch(texts, options, |work| {
            work();
            Ok::<(), Error>(())
        })?;

        let widen = |ids: &Ids| match ids {
            Ids::U16(ids) => ids.iter().map(|&id| u32::from(id)).collect(),
            Ids::U32(ids) => ids.clone(),
        };
        Ok((batch.chunks().flat_map(widen).collect(), batch.lengths))
    }

    #[test]
    fn long_texts_are_shared_among_threads_and_change_nothing() {
        let encoder = encoder(PATTERN);
        let words = "the aaaa theé 12 aa  taaaa the\n";
        let long: String = words.repeat(5 * CHUNK_BYTES / words.len());
        let texts = [
            &long[..],
            "",
            "the",
            &"a".repeat(3 * CHUNK_BYTES),
            &long[..99],
        ];
        let expected: Vec<_> = texts.iter().map(|text| plainly(&encoder, text)).collect();
        let lengths: Vec<usize> = expected.iter().map(Vec::len).collect();
        for threads in 1..4 {
            let found = batch(&encoder, &texts, threads, None, true).unwrap();
            assert_eq!(found, (expected.concat(), lengths.clone()));
        }
    }

    #[test]
    fn an_id_may_be_put_in_front() {
        let encoder = encoder(PATTERN);
        let bos = encoder.vocab.size() as u32 - 1;
        let (ids, lengths) = batch(&encoder, &["the", "", " the"], 1, Some(bos), true).unwrap();
        assert_eq!(ids, [bos, 116, 104, 101, bos, bos, 260]);
        assert_eq!(lengths, [4, 1, 2]);
        assert!(batch(&encoder, &["a"], 1, Some(bos + 1), true).is_err());
    }

    #[test]
    fn no_text_is_no_ids() {
        let none: [&str; 0] = [];
        let found = batch(&encoder(PATTERN), &none, 4, None, true).unwrap();
        assert_eq!(found, (vec![], vec![]));
    }

    #[test]
    fn an_error_among_the_texts_is_handed_on() {
        let mut texts = vec![Ok("the"); 100];
        texts.push(Err(Error::Interrupted));
        let options = Options {
            threads: 2,
            prepend: None,
            cache: true,
        };
        let work = |work: &mut (dyn FnMut() + Send)| {
            work();
            Ok(())
        };
        let result = encoder(PATTERN).encode_batch(texts, options, work);
        assert_eq!(result.err(), Some(Error::Interrupted));
    }

    #[test]
    fn endless_texts_end_when_the_caller_wants() {
        let encoder = encoder(PATTERN);
        let long = "the aaaa theé ".repeat(CHUNK_BYTES);
        for threads in 1..4 {
            let mut calls = 0;
            let options = Options {
                threads,
                prepend: None,
                cache: true,
            };
            let texts = std::iter::repeat_with(|| Ok(&long));
            let result = encoder.encode_batch(texts, options, |work| {
                work();
                calls += 1;
                match calls {
                    10 => Err(Error::Interrupted),
                    _ => Ok(()),
                }
            });
            assert_eq!(result.err(), Some(Error::Interrupted));
        }
        let mut looks = 0;
        let stopped = encoder.encode_or_stop(&long, || {
            looks += 1;
            if looks == 3 {
                Err(Error::Interrupted)
            } else {
                Ok(())
            }
        });
        assert_eq!((stopped, looks), (Err(Error::Interrupted), 3));
    }

    proptest! {
        #[test]
        fn the_cache_changes_nothing(texts in prop::collection::vec(texts(), 0..8), threads in 1usize..4, cache in any::<bool>(), regex in any::<bool>()) {
            let pattern = if regex { format!("(?:{PATTERN})") } else { PATTERN.to_owned() };
            let encoder = encoder(&pattern);
            let expected: Vec<_> = texts.iter().map(|text| plainly(&encoder, text)).collect();
            for _ in 0..2 {
                let (ids, _) = batch(&encoder, &texts, threads, None, cache).unwrap();
                prop_assert_eq!(ids, expected.concat());
                for (text, ids) in texts.iter().zip(&expected) {
                    prop_assert_eq!(&encoder.encode(text), ids);
                    prop_assert_eq!(&encoder.vocab.decode(ids).unwrap(), text.as_bytes());
                }
            }
        }
    }
}
